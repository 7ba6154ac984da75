"""Updates that travel as truncated singular value decompositions.

Source: Wu et al., "Communication-efficient federated learning via knowledge distillation"
(FedKD, Nature Communications 2022), dynamic gradient approximation.
"""

import collections
import math
from typing import Optional

import numpy as np
import tensorflow as tf
from tff_kd.compat import tff

from tff_kd.aggregators import robust
from tff_kd import checks


def energy_rank(singular_values: tf.Tensor, energy: tf.Tensor) -> tf.Tensor:
  """Returns the fewest components that hold a share of the energy, their squares' sum.

  Args:
    singular_values: float `[n]`, falling, not negative.
    energy: The share; with 1 or more all components are kept.

  Returns:
    int32 scalar from 1 to n.
  """
  # In double precision: squares of floats overflow early.
  cumulative = tf.cumsum(tf.square(tf.cast(singular_values, tf.float64)))
  count = tf.shape(singular_values)[0]
  enough = tf.cast(
      cumulative < tf.cast(energy, tf.float64) * cumulative[-1], tf.int32
  )
  # Rounding may leave the last sum just below the whole.
  rank = tf.minimum(tf.reduce_sum(enough) + 1, count)
  return tf.where(energy >= 1.0, count, rank)


def truncate(
    value: tf.Tensor, energy: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
  """Returns a tensor as its truncated decomposition gives it back.

  Tensors of rank 2 or more are matrices of their last dimension by all others. What
  would not take fewer numbers decomposed, and every vector, travels whole.

  Args:
    value: A float tensor of static shape.
    energy: The share of the energy to keep.

  Returns:
    The tensor, and int32: how many numbers travel.
  """
  size = math.prod(value.shape)
  whole = value, tf.constant(size)
  if value.shape.rank < 2 or size == 0:
    return whole
  columns = value.shape[-1]
  rows = size // columns
  matrix = tf.reshape(value, [rows, columns])

  def decompose() -> tuple[tf.Tensor, tf.Tensor]:
    s, u, v = tf.linalg.svd(matrix)
    rank = energy_rank(s, tf.cast(energy, s.dtype))
    numbers = rank * (rows + columns + 1)
    kept = tf.where(tf.range(tf.shape(s)[0]) < rank, s, tf.zeros_like(s))
    near = tf.matmul(u * kept, v, transpose_b=True)
    is_smaller = numbers < size
    return (
        tf.reshape(tf.where(is_smaller, near, matrix), value.shape),
        tf.where(is_smaller, numbers, size),
    )

  # A decomposition of numbers that are not finite may not end.
  return tf.cond(
      tf.reduce_all(tf.math.is_finite(matrix)), decompose, lambda: whole
  )


class TruncatedSvdFactory(tff.aggregators.WeightedAggregationFactory):
  """Wraps another factory: clients' values reach it as truncated decompositions.

  The share of energy that is kept goes from `start_energy` in the first round to
  `end_energy` from round `num_rounds` on. Only uploads are truncated. In simulation
  clients send the products of the factors, whose values are the same.

  `measurements` has `numbers_sent`, the mean size of a client's update in numbers, and
  `num_senders`, the number of clients with a weight above 0.
  """

  def __init__(
      self,
      start_energy: float = 0.95,
      end_energy: float = 0.98,
      num_rounds: int = 100,
      inner_factory: Optional[tff.aggregators.WeightedAggregationFactory] = None,
  ):
    """Initializes the factory.

    Args:
      start_energy: Above 0 and at most 1.
      end_energy: The share in the last round.
      num_rounds: The round from which on `end_energy` holds, 1 or more.
      inner_factory: The factory that aggregates then; `tff.aggregators.MeanFactory()`
        if `None`.

    Raises:
      TypeError: If the inner factory is not weighted.
      ValueError: If a number is out of range.
    """
    for name, energy in (('start_energy', start_energy), ('end_energy', end_energy)):
      if not 0.0 < energy <= 1.0:
        raise ValueError(f'`{name}` must be above 0 and at most 1, found {energy!r}.')
    checks.check_positive_integer(num_rounds, 'num_rounds')
    self._energies = start_energy, end_energy
    self._num_rounds = num_rounds
    self._inner = robust.check_inner_factory(inner_factory)

  def create(self, value_type, weight_type):
    inner = self._inner.create(value_type, weight_type)
    start, end = self._energies

    @tff.tensorflow.computation(np.int32)
    def energy_of(round_num):
      progress = tf.cast(round_num, tf.float32) / max(self._num_rounds - 1, 1)
      return start + (end - start) * tf.minimum(progress, 1.0)

    @tff.tensorflow.computation(np.int32)
    def add_one(round_num):
      return round_num + 1

    @tff.tensorflow.computation(value_type, weight_type, np.float32)
    def client(value, weight, energy):
      parts, numbers = [], [tf.constant(0)]
      for leaf in tf.nest.flatten(value):
        part, count = leaf, tf.size(leaf)
        if leaf.dtype.is_floating:
          part, count = truncate(leaf, energy)
        parts.append(part)
        numbers.append(count)
      takes_part = tf.cast(weight > 0, tf.float32)
      return (
          tf.nest.pack_sequence_as(value, parts),
          tf.cast(tf.add_n(numbers), tf.float32) * takes_part,
          takes_part,
      )

    @tff.tensorflow.computation(np.float32, np.float32)
    def mean_of(numbers, count):
      return tf.math.divide_no_nan(numbers, count)

    @tff.federated_computation
    def init_fn():
      return tff.federated_zip(
          (tff.federated_value(np.int32(0), tff.SERVER), inner.initialize())
      )

    @tff.federated_computation(
        init_fn.type_signature.result,
        tff.FederatedType(value_type, tff.CLIENTS),
        tff.FederatedType(weight_type, tff.CLIENTS),
    )
    def next_fn(state, value, weight):
      round_num, inner_state = state
      energy = tff.federated_broadcast(tff.federated_map(energy_of, round_num))
      values, numbers, takes_part = tff.federated_map(client, (value, weight, energy))
      aggregated = inner.next(inner_state, values, weight)
      num_senders = tff.federated_sum(takes_part)
      mean_numbers = tff.federated_map(
          mean_of, (tff.federated_sum(numbers), num_senders)
      )
      return tff.templates.MeasuredProcessOutput(
          state=tff.federated_zip(
              (tff.federated_map(add_one, round_num), aggregated.state)
          ),
          result=aggregated.result,
          measurements=tff.federated_zip(
              collections.OrderedDict(
                  numbers_sent=mean_numbers,
                  num_senders=num_senders,
                  inner=aggregated.measurements,
              )
          ),
      )

    return tff.templates.AggregationProcess(init_fn, next_fn)
