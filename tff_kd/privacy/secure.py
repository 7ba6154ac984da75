"""Secure aggregation: the server learns sums of integers, and no summand.

TFF's factories prepare the input of such a protocol: numbers are clipped to a range,
rounded to integers, and summed under a modulus. The runtimes of this project run no
secure protocol: they sum the same integers in the clear, which gives the same numbers.
"""

from collections.abc import Sequence
import dataclasses
import functools
import logging
import math
from typing import Any, Optional

import tensorflow as tf
from tff_kd.compat import tff

# The largest weight of a client, as in TFF's `secure_aggregator`.
_MAX_WEIGHT = 2.0**20 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SecureAggregation:
  """Secure sums of clients' reports: both channels, weights, and counts.

  Source: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine
  Learning" (CCS 2017), for the sums; `tff.learning.secure_aggregator` for the clipping.

  Attributes:
    model_bound: The range of the numbers in a client's weight delta, multiplied by the
      client's weight; they are clipped to +-`model_bound`. If `None`, TFF's running
      estimate, which also uses secure sums.
    knowledge_bound: The same for the uploaded predictions.
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

  def build_sum(
      self, bound: Optional[float]
  ) -> tff.aggregators.UnweightedAggregationFactory:
    """Builds a factory of the sum of numbers within a bound.

    Args:
      bound: The largest absolute value; estimated from past rounds if `None`.

    Returns:
      The factory.
    """
    _ignore_unused_assertions()
    if bound is None:
      # As TFF's `secure_aggregator` has it.
      bound = tff.aggregators.PrivateQuantileEstimationProcess.no_noise(
          initial_estimate=50.0,
          target_quantile=0.95,
          learning_rate=1.0,
          multiplier=2.0,
          secure_estimation=True,
      )
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
    return tff.aggregators.MeanFactory(
        value_sum_factory=self.build_sum(getattr(self, f'{channel}_bound')),
        weight_sum_factory=tff.aggregators.SecureSumFactory(
            upper_bound_threshold=_MAX_WEIGHT, lower_bound_threshold=0.0
        ),
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
