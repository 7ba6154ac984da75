"""Keras metrics as sums over clients: their states are values that go in and come out."""

import collections
from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any, NamedTuple, Optional, Union

import keras
import numpy as np
import tensorflow as tf

from tff_kd import graphs
from tff_kd import losses

MetricsFn = Callable[
    [],
    Union[
        Sequence[keras.metrics.Metric], Mapping[str, Sequence[keras.metrics.Metric]]
    ],
]
# The arguments of `keras.Model.compile` for metrics that are blind to the weights of
# examples, and for those that are not.
_KINDS = ('metrics', 'weighted_metrics')

# Always reported, unless the user has a metric of that name. As sums they are kept by the
# training loop itself: in every step they would cost as much as a small layer.
_TOTALS = ('num_examples', 'num_batches', 'loss')


def with_axis_of_outputs(labels: Any, outputs: tf.Tensor) -> Any:
  """Labels `[n]` of outputs `[n, 1]` as `[n, 1]`.

  Else Keras takes the axis from the outputs, and has one value for the whole batch.
  """
  rank = outputs.shape.rank
  if outputs.shape[-1] == 1 and rank > 1 and labels.shape.rank == rank - 1:
    return labels[..., tf.newaxis]
  return labels


class NewMetrics(NamedTuple):
  """The user's metrics, not yet built.

  Attributes:
    by_name: The metrics by name.
    weighted: The names of those that weigh each example by its sample weight.
  """

  by_name: collections.OrderedDict[str, keras.metrics.Metric]
  weighted: frozenset[str]


def new_metrics(metrics_fn: Optional[MetricsFn]) -> NewMetrics:
  """The user's metrics, not yet built.

  Args:
    metrics_fn: A function that returns a list of new `keras.metrics.Metric`s, or, as
      for `keras.Model.compile`, a mapping with the keys 'metrics' and
      'weighted_metrics': the latter weigh each example by its sample weight. There are
      none if `None`.

  Raises:
    TypeError: If it returns something else.
    ValueError: If two metrics have one name, or the mapping other keys.
  """
  made = metrics_fn() if metrics_fn is not None else []
  found = made if isinstance(made, Mapping) else {'metrics': made}
  if not set(found) <= set(_KINDS):
    raise ValueError(
        f'A mapping that `metrics_fn` returns must have the keys {_KINDS}, found '
        f'{sorted(found)}. Return a list if no metric is weighted.'
    )
  if not all(isinstance(each, (list, tuple)) for each in found.values()) or not all(
      isinstance(metric, keras.metrics.Metric)
      for each in found.values() for metric in each
  ):
    raise TypeError(
        '`metrics_fn` must return a list of `keras.metrics.Metric`s, found '
        f'{made!r}. Pass, for example, `metrics_fn=lambda: [keras.metrics.AUC()]`.'
    )
  metrics = collections.OrderedDict()
  for metric in [metric for each in found.values() for metric in each]:
    if metric.name in metrics or metric.name == 'loss':
      raise ValueError(
          f'`metrics_fn` returns a metric named {metric.name!r}, which is taken. '
          'Give each metric its own `name`; "loss" is always reported.'
      )
    metrics[metric.name] = metric
  weighted = frozenset(m.name for m in found.get('weighted_metrics', ()))
  return NewMetrics(metrics, weighted)


class Metrics:
  """The user's metrics and the totals, by name, as functions of their states.

  A state is an ordered dict of tuples of arrays; the states of clients are summed.

  Attributes:
    names: The names of all metrics.
  """

  def __init__(
      self,
      metrics: NewMetrics,
      labels: Any,
      outputs: tf.Tensor,
  ):
    """Builds the metrics once, eagerly.

    Args:
      metrics: `new_metrics`.
      labels: A batch of labels, which metrics that build on their first update need.
      outputs: The model's outputs for it.

    Raises:
      ValueError: If a metric does not take such labels.
    """
    self._metrics, self._weighted = metrics
    for metric in self._metrics.values():
      _build(metric, labels, outputs)
    self._initial = collections.OrderedDict(
        (name, tuple(v.numpy() for v in metric.variables))
        for name, metric in self._metrics.items()
    )
    for name in _TOTALS:
      self._initial.setdefault(name, _initial_total(name))

  @property
  def names(self) -> list[str]:
    return list(self._initial)

  def initial_state(self) -> Any:
    """The state before any example, as tensors."""
    return tf.nest.map_structure(tf.constant, self._initial)

  def update(
      self,
      state: Any,
      labels: Any,
      outputs: tf.Tensor,
      mask: Optional[tf.Tensor],
      sample_weight: Optional[tf.Tensor] = None,
  ) -> Any:
    """The state of the user's metrics after a batch; that of the totals as it was.

    Args:
      state: The state before.
      labels: The labels of the batch.
      outputs: The model's outputs for it.
      mask: Optional 0/1 float32 like the labels or `[batch]`: which ones count.
      sample_weight: Optional float32 of the same leading axes: how much each counts in
        weighted metrics.
    """
    weights = mask
    if sample_weight is not None:
      weights = sample_weight
      if mask is not None:
        rank = max(mask.shape.rank, sample_weight.shape.rank)
        weights = losses.with_rank(mask, rank) * losses.with_rank(sample_weight, rank)
    labels = with_axis_of_outputs(labels, outputs)
    updated = collections.OrderedDict(state)
    for name, metric in self._metrics.items():
      given = weights if name in self._weighted else mask
      values = metric.stateless_update_state(
          list(state[name]), labels, outputs,
          **({} if given is None else {'sample_weight': given}),
      )
      updated[name] = tuple(tf.convert_to_tensor(value) for value in values)
    return updated

  def add_totals(
      self,
      state: Any,
      loss_sum: tf.Tensor,
      num_examples: tf.Tensor,
      num_batches: tf.Tensor,
  ) -> Any:
    """The state after more batches, as far as it is plain sums.

    Args:
      state: The state before.
      loss_sum: The sum over examples of the loss.
      num_examples: How many examples.
      num_batches: In how many batches.
    """
    added = {
        'loss': [loss_sum, num_examples],
        'num_examples': [num_examples],
        'num_batches': [num_batches],
    }
    updated = collections.OrderedDict(state)
    for name, values in added.items():
      if name not in self._metrics:
        updated[name] = tuple(
            old + tf.cast(new, old.dtype) for old, new in zip(state[name], values)
        )
    return updated

  def finalizers(self) -> collections.OrderedDict[str, Callable[[Any], Any]]:
    """By name, what makes a state that is summed over clients into the metric."""
    finalizers = collections.OrderedDict(
        (name, graphs.placed(functools.partial(_result, metric)))
        for name, metric in self._metrics.items()
    )
    for name in _TOTALS:
      finalizers.setdefault(name, _mean_loss if name == 'loss' else _only_value)
    return finalizers

  def result(self, state: Any) -> dict[str, Any]:
    """The values of all metrics of a state."""
    return {name: finalize(state[name]) for name, finalize in self.finalizers().items()}


def _build(metric: keras.metrics.Metric, labels: Any, outputs: tf.Tensor) -> None:
  """Creates the metric's variables, with their values before any example."""
  try:
    metric.update_state(with_axis_of_outputs(labels, outputs), outputs)
    metric.result()
  except Exception as error:
    raise ValueError(
        f'The metric {metric.name!r} ({type(metric).__name__}) does not take labels of '
        f'shape {tf.nest.map_structure(lambda t: t.shape, labels)} with outputs of shape '
        f'{outputs.shape}. Keras says: {error}'
    ) from error
  metric.reset_state()


def _result(metric: keras.metrics.Metric, state: Sequence[tf.Tensor]) -> Any:
  # Not `stateless_result`: a metric may return a variable, to be read within the scope.
  with keras.StatelessScope(list(zip(metric.variables, state))):
    return tf.nest.map_structure(tf.convert_to_tensor, metric.result())


def _initial_total(name: str) -> tuple[np.ndarray, ...]:
  if name == 'loss':
    return np.float32(0.0), np.float32(0.0)
  return (np.int64(0),)


def _mean_loss(state: Sequence[tf.Tensor]) -> tf.Tensor:
  return state[0] / state[1]  # Of no examples, not a number.


def _only_value(state: Sequence[tf.Tensor]) -> tf.Tensor:
  return tf.convert_to_tensor(state[0])
