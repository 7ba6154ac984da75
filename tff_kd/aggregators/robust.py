"""Byzantine-robust means of weights and of predictions.

Aggregation factories for the `model_aggregator` and `knowledge_aggregator` of a
process. TFF's own `tff.learning.robust_aggregator` (adaptive zeroing and clipping) goes
there, too.
"""

import collections
import math
from typing import Optional

import numpy as np
import tensorflow as tf
from tff_kd.compat import tff

from tff_kd import checks
from tff_kd import knowledge
from tff_kd import losses


def check_inner_factory(
    factory: Optional[tff.aggregators.WeightedAggregationFactory],
) -> tff.aggregators.WeightedAggregationFactory:
  """Checks the factory that another one wraps.

  Args:
    factory: The factory, or `None`.

  Returns:
    The factory; `tff.aggregators.MeanFactory()` if `None`.

  Raises:
    TypeError: If it is not weighted.
  """
  if factory is None:
    return tff.aggregators.MeanFactory()
  if not isinstance(factory, tff.aggregators.WeightedAggregationFactory):
    raise TypeError(
        'The aggregator inside another one must be a '
        f'`tff.aggregators.WeightedAggregationFactory`, found {factory!r}. Pass, for '
        'example, `tff.aggregators.MeanFactory()`.'
    )
  return factory


class NormBoundFactory(tff.aggregators.WeightedAggregationFactory):
  """Wraps another factory: values beyond a norm, or not finite, are left out.

  A client that is left out has the weight 0, where TFF's zeroing counts it with zeros.
  `measurements` has `num_left_out`, int32, the number of clients left out whose weight
  was above 0, and `inner`, the measurements of the wrapped factory.

  The norm is taken over all numbers of the value, as in
  `tff.aggregators.clipping_factory`.

  Source: Sun et al., "Can You Really Backdoor Federated Learning?" (2019), norm
  thresholding of updates (there by scaling them down).
  """

  def __init__(
      self,
      norm_bound: float,
      inner_factory: Optional[tff.aggregators.WeightedAggregationFactory] = None,
  ):
    """Initializes the factory.

    Args:
      norm_bound: The highest L2 norm that is taken, above 0.
      inner_factory: The factory that aggregates then; `tff.aggregators.MeanFactory()`
        if `None`.

    Raises:
      TypeError: If the inner factory is not weighted.
      ValueError: If the bound is not above 0.
    """
    if not norm_bound > 0.0:
      raise ValueError(f'`norm_bound` must be above 0, found {norm_bound!r}.')
    self._norm_bound = norm_bound
    self._inner = check_inner_factory(inner_factory)

  def create(self, value_type, weight_type):
    inner = self._inner.create(value_type, weight_type)

    @tff.tensorflow.computation(value_type, weight_type)
    def keep_within(value, weight):
      norm = tf.linalg.global_norm(
          [tf.cast(leaf, tf.float32) for leaf in tf.nest.flatten(value)]
      )
      within = norm <= self._norm_bound  # False for NaN.
      is_left_out = tf.logical_and(weight > 0, tf.logical_not(within))
      return (
          tf.nest.map_structure(
              lambda leaf: tf.where(within, leaf, tf.zeros_like(leaf)), value
          ),
          tf.where(within, weight, tf.zeros_like(weight)),
          tf.cast(is_left_out, tf.int32),
      )

    @tff.federated_computation(
        inner.initialize.type_signature.result,
        tff.FederatedType(value_type, tff.CLIENTS),
        tff.FederatedType(weight_type, tff.CLIENTS),
    )
    def next_fn(state, value, weight):
      kept, kept_weight, is_left_out = tff.federated_map(
          keep_within, (value, weight)
      )
      aggregated = inner.next(state, kept, kept_weight)
      return tff.templates.MeasuredProcessOutput(
          state=aggregated.state,
          result=aggregated.result,
          measurements=tff.federated_zip(
              collections.OrderedDict(
                  num_left_out=tff.federated_sum(is_left_out),
                  inner=aggregated.measurements,
              )
          ),
      )

    return tff.templates.AggregationProcess(inner.initialize, next_fn)


class TrimmedMeanFactory(tff.aggregators.WeightedAggregationFactory):
  """The mean of the middle of clients' values, number by number; or their median.

  For each number, the highest and the lowest share of clients is left out. Every client
  counts the same: only whether a weight is above 0 matters, because a weight is what a
  client claims. In predictions (a `knowledge.KnowledgePayload`), only clients that
  predicted an example count for it; their certainties, if the consensus rule has any,
  weigh the clients in the middle. Numbers that are not finite are missing.

  This is not a sum: the server gets the values of single clients, of all of them or of
  a uniform sample (TFF's reservoir). It does not go with secure aggregation, and hides no
  client from the server. `measurements` has `num_clients`, int32, the number of clients
  in the mean. Without any, the mean of weights is not a number, so that the student
  stays, and all predictions are missing.

  Source: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal
  Statistical Rates" (ICML 2018), definitions 1 and 2.
  """

  def __init__(self, sample_size: int, trimmed_share: float = 0.5):
    """Initializes the factory.

    Args:
      sample_size: The largest number of clients whose values the server holds, 1 or
        more. It is exact, and equal in every repetition, for cohorts up to this size.
      trimmed_share: The share left out at each end, rounded down to whole clients, from
        0 (the plain mean) to .5 (the median).

    Raises:
      ValueError: If a number is out of range.
    """
    checks.check_positive_integer(sample_size, 'sample_size')
    if not 0.0 <= trimmed_share <= 0.5:
      raise ValueError(
          f'`trimmed_share` must be from 0 to .5, found {trimmed_share!r}.'
      )
    self._sample_size = sample_size
    self._trimmed_share = trimmed_share

  def create(self, value_type, weight_type):
    value_type = tff.to_type(value_type)
    for leaf in tff.structure.flatten(value_type):
      if not np.issubdtype(leaf.dtype, np.floating):
        raise TypeError(f'Only floating numbers can be trimmed, found {value_type}.')
    sampling = tff.aggregators.UnweightedReservoirSamplingFactory(
        self._sample_size
    ).create(
        tff.to_type(collections.OrderedDict(value=value_type, weight=weight_type))
    )
    sample_type = sampling.next.type_signature.result.result.member
    is_knowledge = (
        getattr(value_type, 'python_container', None) is knowledge.KnowledgePayload
    )
    if is_knowledge and len(value_type.weights.shape) > 1:
      raise ValueError(
          'A consensus rule with several predictions an example, such as '
          '`CertaintyWithDiversity`, needs sums over clients: it cannot be trimmed.'
      )

    @tff.tensorflow.computation(sample_type)
    def combine(sample):
      takes_part = sample['weight'] > 0
      num_clients = tf.reduce_sum(tf.cast(takes_part, tf.int32))

      def trimmed(values, is_there=takes_part, weights=None):
        return trimmed_mean(values, is_there, self._trimmed_share, weights)

      if is_knowledge:
        values, weights = sample['value']
        predicted = losses.with_rank(takes_part, weights.shape.rank) & (weights > 0)
        weight = trimmed(weights, predicted)
        prediction = trimmed(
            tf.math.divide_no_nan(values, losses.with_rank(weights, values.shape.rank)),
            predicted & tf.math.is_finite(weights),
            weights,
        )
        result = knowledge.KnowledgePayload(
            values=prediction * losses.with_rank(weight, prediction.shape.rank),
            weights=weight,
        )
      else:
        result = tf.nest.map_structure(
            lambda values: tf.where(
                num_clients > 0, trimmed(values), tf.cast(float('nan'), values.dtype)
            ),
            sample['value'],
        )
      return result, num_clients

    @tff.federated_computation(
        sampling.initialize.type_signature.result,
        tff.FederatedType(value_type, tff.CLIENTS),
        tff.FederatedType(weight_type, tff.CLIENTS),
    )
    def next_fn(state, value, weight):
      sampled = sampling.next(
          state,
          tff.federated_zip(collections.OrderedDict(value=value, weight=weight)),
      )
      result, num_clients = tff.federated_map(combine, sampled.result)
      return tff.templates.MeasuredProcessOutput(
          state=sampled.state,
          result=result,
          measurements=tff.federated_zip(
              collections.OrderedDict(num_clients=num_clients)
          ),
      )

    return tff.templates.AggregationProcess(sampling.initialize, next_fn)


def build_adaptive_mean(
    zeroing: bool,
    clipping: bool,
    inner_factory: tff.aggregators.WeightedAggregationFactory,
) -> tff.aggregators.WeightedAggregationFactory:
  """Builds TFF's adaptive zeroing and clipping around a mean of another kind.

  Around an encoded sum it is `tff.learning.compression_aggregator`, whose bits and
  smallest array cannot be set.

  Args:
    zeroing: Whether values far beyond those seen so far are replaced by zeros.
    clipping: Whether values are scaled down to a norm that most values have.
    inner_factory: Aggregates the values after that.

  Returns:
    The factory.
  """
  estimate = tff.aggregators.PrivateQuantileEstimationProcess.no_noise
  factory = inner_factory
  if clipping:
    norm = estimate(initial_estimate=1.0, target_quantile=0.8, learning_rate=0.2)
    factory = tff.aggregators.clipping_factory(norm, factory)
  if zeroing:
    norm = estimate(
        initial_estimate=10.0,
        target_quantile=0.98,
        learning_rate=math.log(10.0),
        multiplier=2.0,
        increment=1.0,
    )
    factory = tff.aggregators.zeroing_factory(norm, factory)
  return factory


def trimmed_mean(
    values: tf.Tensor,
    is_there: tf.Tensor,
    trimmed_share: float,
    weights: Optional[tf.Tensor] = None,
) -> tf.Tensor:
  """Returns the mean of the middle of values, number by number.

  Args:
    values: float `[n, ...]`. What is not finite is missing.
    is_there: bool, the first dimensions of `values`: the others are missing.
    trimmed_share: The share of the values that is left out at each end; .5 for the
      median, of an even number the mean of both in the middle.
    weights: The weights of the mean, above 0, of the shape of `is_there`; equal if
      `None`.

  Returns:
    float `[...]`; 0 where nothing is there.
  """
  rank = values.shape.rank
  is_there = losses.with_rank(is_there, rank) & tf.math.is_finite(values)
  count = tf.reduce_sum(tf.cast(is_there, tf.int32), axis=0)
  # A share of .3 of 10 is 3, whatever the product's last digit.
  share = tf.cast(trimmed_share * tf.cast(count, tf.float64) + 1e-9, tf.int32)
  cut = tf.minimum(share, tf.maximum(count - 1, 0) // 2)
  # What is missing comes last.
  missing = tf.constant(float('inf'), values.dtype)
  order = tf.argsort(tf.where(is_there, values, missing), axis=0, stable=True)
  place = tf.argsort(order, axis=0)
  is_middle = (place >= cut) & (place < count - cut)
  weight = tf.ones_like(values)
  if weights is not None:
    weight *= tf.cast(losses.with_rank(weights, rank), values.dtype)
  weight = tf.where(is_middle, weight, tf.zeros_like(weight))
  return tf.math.divide_no_nan(
      tf.reduce_sum(tf.math.multiply_no_nan(values, weight), axis=0),
      tf.reduce_sum(weight, axis=0),
  )
