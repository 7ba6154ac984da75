"""Secure aggregation: the server learns sums of integers, and no summand.

TFF's factories prepare the input of such a protocol: numbers are clipped to a range,
rounded to integers, and summed under a modulus. The runtimes of this project run no
secure protocol: they sum the same integers in the clear, which gives the same numbers.

In a sum of predictions or of sums by class, a client says the quotient of a row's values
and its weight. Clipping single numbers would change it, so a row that is out of range is
scaled down as a whole: it says the same, and counts less.
"""

from collections.abc import Sequence
import dataclasses
import functools
import logging
import math
from typing import Any, Optional, Union

import numpy as np
import tensorflow as tf
from tff_kd.compat import tff

from tff_kd import knowledge

# The largest weight of a client, as in TFF's `secure_aggregator`.
_MAX_WEIGHT = 2.0**20 - 1
# Rows are scaled down to a bound times this: a hair beyond it, so that TFF counts their
# client among those that it clips.
_BEYOND = 1.0 + 2.0**-20
_Bound = Union[float, tff.templates.EstimationProcess]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SecureAggregation:
  """Secure sums of clients' reports: both channels, weights, and counts.

  Source: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine
  Learning" (CCS 2017), for the sums; `tff.learning.secure_aggregator` for the clipping.

  Attributes:
    model_bound: The range of the numbers in a client's weight delta, multiplied by the
      client's weight; they are clipped to +-`model_bound`. If `None`, TFF's running
      estimate, which also uses secure sums.
    knowledge_bound: The same for the uploaded predictions or sums by class, and how much
      they count. A row of them beyond the bound is not clipped number by number: its
      values and its weight are scaled down together, so that their quotient stays.
    bits: The bits of each number, 2 to 24: it is rounded to a multiple of
      bound / (2^(bits - 1) - 1), and summed under a modulus that no sum reaches. Needs
      the bounds. If `None`, TFF's 32 bits.
    max_clients: The largest number of clients in one sum; needed with `bits`. Rounds with
      more clients are refused.
  """

  model_bound: Optional[float] = None
  knowledge_bound: Optional[float] = None
  bits: Optional[int] = None
  max_clients: Optional[int] = None

  def __post_init__(self):
    for name in ('model_bound', 'knowledge_bound'):
      bound = getattr(self, name)
      if bound is not None and not 0.0 < bound < math.inf:
        raise ValueError(f'`{name}` must be finite and above 0, found {bound!r}.')
    if self.bits is None:
      return
    if not isinstance(self.bits, int) or not 2 <= self.bits <= 24:
      raise ValueError(f'`bits` must be an integer from 2 to 24, found {self.bits!r}.')
    if not self.max_clients or self.max_clients < 1:
      raise ValueError(
          '`bits` needs `max_clients`, 1 or more, which decides the modulus; found '
          f'{self.max_clients!r}.'
      )
    if self.modulus > 2**30:
      raise ValueError(
          f'{self.bits} bits of {self.max_clients} clients do not fit into 32: take '
          'fewer `bits`.'
      )

  @property
  def modulus(self) -> Optional[int]:
    """The modulus of the sums, above the largest possible sum; `None` without `bits`."""
    return self.bits and self.max_clients * (2 ** (self.bits - 1) - 1) + 1

  @property
  def message_bits(self) -> int:
    """The bits of an uploaded number, an element of the sum's group."""
    if self.bits is None:
      return 32
    return math.ceil(math.log2(2 * self.modulus - 1))

  def check_channels(self, channels: Sequence[str]) -> None:
    """Raises an error if `bits` are set without the bounds of these channels.

    Args:
      channels: 'model', 'knowledge', or both.

    Raises:
      ValueError: If a bound is missing.
    """
    for name in channels:
      if self.bits is not None and getattr(self, f'{name}_bound') is None:
        raise ValueError(
            f'`bits` need a fixed range: `{name}_bound` must be given.'
        )

  def build_sum(self, bound: _Bound) -> tff.aggregators.UnweightedAggregationFactory:
    """Builds a factory of the sum of numbers within a bound.

    Args:
      bound: The largest absolute value, or a process that estimates it.

    Returns:
      The factory.
    """
    _ignore_unused_assertions()
    if self.bits is None:
      return tff.aggregators.SecureSumFactory(bound)
    levels = 2 ** (self.bits - 1) - 1
    return _ClippedSumFactory(
        bound,
        tff.aggregators.discretization.DiscretizationFactory(
            tff.aggregators.SecureModularSumFactory(
                self.modulus, symmetric_range=True
            ),
            scale_factor=levels / bound,
        ),
    )

  def build_mean(self, channel: str) -> tff.aggregators.WeightedAggregationFactory:
    """Builds a factory of the weighted mean of a channel.

    Args:
      channel: 'model' or 'knowledge'.

    Returns:
      The factory.
    """
    bound = getattr(self, f'{channel}_bound')
    bound = _estimated_bound() if bound is None else float(bound)
    value_sum = self.build_sum(bound)
    if channel == 'knowledge':
      value_sum = _ScaledRowsFactory(bound, value_sum)
    return tff.aggregators.MeanFactory(
        value_sum_factory=value_sum,
        weight_sum_factory=tff.aggregators.SecureSumFactory(
            upper_bound_threshold=_MAX_WEIGHT, lower_bound_threshold=0.0
        ),
    )


def _estimated_bound() -> tff.templates.EstimationProcess:
  """Estimates a bound from past rounds, as TFF's `secure_aggregator` does."""
  _ignore_unused_assertions()
  return tff.aggregators.PrivateQuantileEstimationProcess.no_noise(
      initial_estimate=50.0,
      target_quantile=0.95,
      learning_rate=1.0,
      multiplier=2.0,
      secure_estimation=True,
  )


@functools.cache
def _ignore_unused_assertions() -> None:
  """Filters TensorFlow's log of unused assertions, which TFF's secure sums create."""

  def is_worth_it(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return not ('Object was never used' in text and 'assert_less_equal' in text)

  tf.get_logger().addFilter(is_worth_it)


class _ClippedSumFactory(tff.aggregators.UnweightedAggregationFactory):
  """Clips each number to +-bound before another aggregation."""

  def __init__(self, bound: float, inner: tff.aggregators.UnweightedAggregationFactory):
    self._bound, self._inner = bound, inner

  def create(self, value_type: tff.Type) -> tff.templates.AggregationProcess:
    inner = self._inner.create(value_type)

    @tff.tensorflow.computation(value_type)
    def clip(value: Any) -> Any:
      return tf.nest.map_structure(
          lambda t: tf.clip_by_value(
              t, tf.cast(-self._bound, t.dtype), tf.cast(self._bound, t.dtype)
          ),
          value,
      )

    @tff.federated_computation(
        inner.initialize.type_signature.result,
        tff.FederatedType(value_type, tff.CLIENTS),
    )
    def next_fn(state, value):
      return inner.next(state, tff.federated_map(clip, value))

    return tff.templates.AggregationProcess(inner.initialize, next_fn)


class _ScaledRowsFactory(tff.aggregators.UnweightedAggregationFactory):
  """Scales rows of a `KnowledgePayload` down to a bound, before a sum that clips."""

  def __init__(
      self, bound: _Bound, inner: tff.aggregators.UnweightedAggregationFactory
  ):
    """Initializes the factory.

    Args:
      bound: The bound of the sum.
      inner: The factory of the sum. If the bound is estimated, the state of the sum is
        that of the estimation, as in TFF's `SecureSumFactory`.
    """
    self._bound, self._inner = bound, inner

  def create(self, value_type: tff.Type) -> tff.templates.AggregationProcess:
    inner = self._inner.create(value_type)

    @tff.tensorflow.computation(value_type, np.float32)
    def scale(payload: Any, bound: tf.Tensor) -> knowledge.KnowledgePayload:
      values, weights = payload.values, payload.weights
      axes = list(range(weights.shape.rank, values.shape.rank))
      largest = tf.maximum(tf.reduce_max(tf.abs(values), axis=axes), tf.abs(weights))
      factor = tf.where(largest > bound, _BEYOND * bound / largest, 1.0)
      of_values = tf.reshape(factor, [*weights.shape, *[1] * len(axes)])
      return knowledge.KnowledgePayload(
          # An infinite row has the factor 0, and is missing.
          tf.math.multiply_no_nan(values, of_values),
          tf.math.multiply_no_nan(weights, factor),
      )

    @tff.federated_computation(
        inner.initialize.type_signature.result,
        tff.FederatedType(value_type, tff.CLIENTS),
    )
    def next_fn(state, value):
      if isinstance(self._bound, float):
        bound = tff.federated_value(np.float32(self._bound), tff.SERVER)
      else:
        bound = self._bound.report(state)
      bound = tff.federated_broadcast(bound)
      return inner.next(state, tff.federated_map(scale, (value, bound)))

    return tff.templates.AggregationProcess(inner.initialize, next_fn)
