"""Keras metrics as sums over clients: their states are values that go in and come out."""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import functools
import re
from typing import Any, NamedTuple, Optional, Union

import keras
import numpy as np
import tensorflow as tf

from tff_kd import graphs
from tff_kd import internals
from tff_kd import losses
from tff_kd.models import labels as labels_lib

MetricsFn = Callable[
    [],
    Union[
        Sequence[keras.metrics.Metric], Mapping[str, Sequence[keras.metrics.Metric]]
    ],
]
# The arguments of `keras.Model.compile` for metrics that ignore sample weights and for
# those that use them.
_KINDS = ('metrics', 'weighted_metrics')

# Always reported, unless the user has a metric of that name: their states before any
# example. As sums they are kept by the training loop itself: in every step they would
# cost as much as a small layer.
_INITIAL_TOTALS = {
    'num_examples': (np.int64(0),),
    'num_batches': (np.int64(0),),
    'loss': (np.float32(0.0), np.float32(0.0)),
}
TOTALS = tuple(_INITIAL_TOTALS)
# Parts of the names of scores that are better the lower they are.
_ERRORS = frozenset(['loss', 'rmse', 'mae', 'mse', 'error'])
# Metrics of Keras that silently take class numbers for one-hot labels.
_OF_ONE_HOT = (
    keras.metrics.CategoricalAccuracy, keras.metrics.TopKCategoricalAccuracy,
    keras.metrics.OneHotIoU, keras.metrics.OneHotMeanIoU,
)


class NewMetrics(NamedTuple):
  """The user's metrics, not yet built.

  Attributes:
    by_name: The metrics by name.
    weighted: The names of those that weigh each example by its sample weight.
  """

  by_name: collections.OrderedDict[str, keras.metrics.Metric]
  weighted: frozenset[str]


def new_metrics(metrics_fn: Optional[MetricsFn]) -> NewMetrics:
  """Returns the user's metrics, not yet built.

  Args:
    metrics_fn: A function that returns a list of new `keras.metrics.Metric`s, or, as
      for `keras.Model.compile`, a mapping with the keys 'metrics' and
      'weighted_metrics': the latter weigh each example by its sample weight. There are
      none if `None`.

  Raises:
    TypeError: If it returns something else.
    ValueError: If two metrics have one name, or the mapping other keys.
  """
  if metrics_fn is None:
    return NewMetrics(collections.OrderedDict(), frozenset())
  found = _by_kind(metrics_fn())
  # Keras numbers metrics without a name (`auc_3`) and counts all that were ever made: the
  # names that differ from call to call are such names.
  again = _by_kind(metrics_fn())
  metrics, weighted = collections.OrderedDict(), set()
  for kind, listed in found.items():
    for metric, other in zip(listed, again[kind]):
      name = metric.name
      if name != other.name:
        name = _counted_name(re.sub(r'_\d+$', '', other.name), metrics)
      if name in metrics or name == 'loss':
        raise ValueError(
            f'`metrics_fn` returns a metric named {name!r}, which is taken. Give each '
            'metric its own `name`; "loss" is always reported.'
        )
      metrics[name] = metric
      if kind == 'weighted_metrics':
        weighted.add(name)
  return NewMetrics(metrics, frozenset(weighted))


def _counted_name(base: str, taken: Mapping[str, Any]) -> str:
  """Returns `auc`, or `auc_1` and so on if that is taken."""
  name, number = base, 0
  while name in taken:
    number += 1
    name = f'{base}_{number}'
  return name


def _by_kind(made: Any) -> Mapping[str, Sequence[keras.metrics.Metric]]:
  """Returns the metrics of a `metrics_fn` as a mapping; raises if they are invalid."""
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
  return found


def lower_is_better(
    name: str, metrics: Mapping[str, keras.metrics.Metric]
) -> bool:
  """Returns whether a score is better the lower it is.

  Args:
    name: The name of the score, or of a column that ends in it.
    metrics: The user's metrics by name.

  Returns:
    What the metric says, as those of Keras do; for any other score, whether its name is
    that of an error or a loss.
  """
  for known in sorted(metrics, key=len, reverse=True):
    if re.search(rf'(^|[_/]){re.escape(known)}(_|$)', name):
      # Keras's own callbacks choose 'auto' by it.
      direction = internals.direction_of(metrics[known])
      if direction is not None:
        return direction == 'down'
  return not _ERRORS.isdisjoint(name.rpartition('/')[2].split('_'))


def flat_scores(name: str, value: Any) -> dict[str, Any]:
  """Returns the result of a metric as numbers by name.

  Args:
    name: The metric's.
    value: A scalar, an array (then `f1_score_0` and so on), or a dict of such.
  """
  if isinstance(value, Mapping):
    parts = list(value.items())
  elif isinstance(value, (list, tuple)):
    parts = list(enumerate(value))
  elif len(value.shape):
    parts = [(i, value[i]) for i in range(value.shape[0])]
  else:
    return {name: value}
  return {
      key: number
      for part, of_part in parts
      for key, number in flat_scores(f'{name}_{part}', of_part).items()
  }


class Metrics:
  """The user's metrics and the totals, by name, as functions of their states.

  A state is an ordered dict of tuples of arrays, which are zeros before any example;
  the states of clients are summed. If the variables of a metric begin with other
  numbers, the state holds the difference from these.

  Attributes:
    score_names: The names of the scores of the user's metrics, as in `scores`.
  """

  def __init__(
      self,
      metrics: NewMetrics,
      labels: Any,
      outputs: tf.Tensor,
      *,
      from_logits: bool = False,
  ):
    """Builds the metrics once, eagerly.

    Args:
      metrics: `new_metrics`.
      labels: A batch of labels, which metrics that build on their first update need.
      outputs: The model's outputs for it.
      from_logits: Whether the outputs are logits.

    Raises:
      ValueError: If a metric does not take such labels, takes logits for probabilities,
        or has states that cannot be summed.
    """
    self._metrics, self._weighted = metrics
    self._initial, self._offsets = collections.OrderedDict(), {}
    self.score_names = []
    for name, metric in self._metrics.items():
      if from_logits:
        _check_takes_logits(name, metric)
      result = _build(name, metric, labels, outputs)
      self.score_names += flat_scores(name, result)
      offsets = [v.numpy() for v in metric.variables]
      _check_sums(name, metric, offsets, labels, outputs)
      self._initial[name] = tuple(np.zeros_like(value) for value in offsets)
      if any(np.any(value) for value in offsets):
        self._offsets[name] = offsets
    for name, state in _INITIAL_TOTALS.items():
      self._initial.setdefault(name, state)

  def lower_is_better(self, name: str) -> bool:
    """Returns whether lower values of a score are better; see `lower_is_better`.

    Args:
      name: The score's name.
    """
    return lower_is_better(name, self._metrics)

  def initial_state(self) -> Any:
    """Returns the state before any example, as tensors."""
    return tf.nest.map_structure(tf.constant, self._initial)

  def update(
      self,
      state: Any,
      labels: Any,
      outputs: tf.Tensor,
      mask: Optional[tf.Tensor],
      sample_weight: Optional[tf.Tensor] = None,
  ) -> Any:
    """Returns the state after a batch; the totals are left as they are.

    Args:
      state: The state before.
      labels: The labels of the batch.
      outputs: The model's outputs for it.
      mask: Optional 0/1 float32 like the outputs without the last axis, or `[batch]`:
        which ones count.
      sample_weight: Optional float32 of the same leading axes: how much each counts in
        weighted metrics.

    Raises:
      ValueError: If a metric cannot be updated so.
    """
    weights = mask
    if sample_weight is not None:
      weights = sample_weight
      if mask is not None:
        rank = max(mask.shape.rank, sample_weight.shape.rank)
        weights = losses.with_rank(mask, rank) * losses.with_rank(sample_weight, rank)
    labels = labels_lib.with_axis_of_outputs(labels, outputs)
    updated = collections.OrderedDict(state)
    for name, metric in self._metrics.items():
      given = weights if name in self._weighted else mask
      if given is not None and tf.as_dtype(metric.dtype).is_integer:
        given = tf.cast(given, metric.dtype)  # Such as a matrix of counts.
      with _errors_of(name, metric, 'cannot be updated in a graph, as in Keras\'s `fit`'):
        values = metric.stateless_update_state(
            self._variables(name, state[name]), labels, outputs,
            **({} if given is None else {'sample_weight': given}),
        )
        values = [tf.convert_to_tensor(value) for value in values]
      for i, offset in enumerate(self._offsets.get(name, ())):
        values[i] -= tf.constant(offset)
      updated[name] = tuple(values)
    return updated

  def _variables(self, name: str, state: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Returns the values of a metric's variables in a state."""
    if name not in self._offsets:
      return list(state)
    offsets = self._offsets[name]
    return [value + tf.constant(offset) for value, offset in zip(state, offsets)]

  def add_totals(
      self,
      state: Any,
      loss_sum: tf.Tensor,
      num_examples: tf.Tensor,
      num_batches: tf.Tensor,
  ) -> Any:
    """Returns the state after more batches, with their sums added to the totals.

    Args:
      state: The state before.
      loss_sum: The sum over examples of the loss.
      num_examples: The number of examples.
      num_batches: The number of batches.
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
    """Returns the functions from states summed over clients to values of metrics.

    Returns:
      By the metric's name, a function from the state to the value.
    """
    finalizers = collections.OrderedDict(
        (name, graphs.placed(functools.partial(self._result, name)))
        for name in self._metrics
    )
    for name in TOTALS:
      finalizers.setdefault(name, _mean_loss if name == 'loss' else _only_value)
    return finalizers

  def _result(self, name: str, state: Sequence[tf.Tensor]) -> Any:
    metric = self._metrics[name]
    values = self._variables(name, state)
    # Not `stateless_result`: a metric may return a variable, to be read within the scope.
    with keras.StatelessScope(list(zip(metric.variables, values))):
      with _errors_of(name, metric, 'cannot be computed of its state in a graph'):
        return tf.nest.map_structure(tf.convert_to_tensor, metric.result())

  def result(self, state: Any) -> collections.OrderedDict[str, Any]:
    """Returns the values of all metrics of a state.

    Args:
      state: As `initial_state` returns it, or summed over clients.
    """
    return collections.OrderedDict(
        (name, finalize(state[name])) for name, finalize in self.finalizers().items()
    )

  def scores(self, state: Any) -> dict[str, tf.Tensor]:
    """Returns the values of the user's metrics, each a single number (`flat_scores`).

    Args:
      state: As `initial_state` returns it, or summed over clients.
    """
    scores = {}
    for name in self._metrics:
      scores |= flat_scores(name, self._result(name, state[name]))
    return scores


@contextlib.contextmanager
def _errors_of(name: str, metric: keras.metrics.Metric, problem: str) -> Iterator[None]:
  """Raises errors of a metric's code with the name of the metric."""
  try:
    yield
  except Exception as error:
    raise ValueError(
        f'The metric {name!r} ({type(metric).__name__}) {problem}: compute with '
        '`keras.ops`, and take `sample_weight`. Keras or the metric says: '
        f'{str(error).strip() or type(error).__name__}'
    ) from error


def _check_takes_logits(name: str, metric: keras.metrics.Metric) -> None:
  """Raises an error for a metric that would take logits for probabilities."""
  if labels_lib.config_of(metric, 'from_logits') is False:
    raise ValueError(
        f'The metric {name!r} ({type(metric).__name__}) has from_logits=False and '
        'expects probabilities, but the outputs of the model are logits (by its loss). '
        'Build the metric with from_logits=True.'
    )


def _build(
    name: str, metric: keras.metrics.Metric, labels: Any, outputs: tf.Tensor
) -> Any:
  """Creates the metric's variables, with their values before any example.

  Returns:
    The metric's result, which tells its shape.
  """
  if isinstance(metric, _OF_ONE_HOT) and labels.shape != outputs.shape:
    raise ValueError(
        f'The metric {name!r} ({type(metric).__name__}) compares one-hot labels, found '
        f'labels of shape {labels.shape} and outputs of shape {outputs.shape}. For class '
        'numbers there are SparseCategoricalAccuracy, SparseTopKCategoricalAccuracy and '
        'MeanIoU(sparse_y_pred=False).'
    )
  try:
    metric.update_state(labels_lib.with_axis_of_outputs(labels, outputs), outputs)
    result = tf.nest.map_structure(tf.convert_to_tensor, metric.result())
  except Exception as error:
    hint = ''
    if labels.shape.rank < outputs.shape.rank and outputs.shape[-1] != 1:
      hint = (
          ' It may want one-hot labels, as F1Score does: encode the labels '
          '(`keras.ops.one_hot`), and train with CategoricalCrossentropy.'
      )
    raise ValueError(
        f'The metric {name!r} ({type(metric).__name__}) does not take labels of '
        f'shape {tf.nest.map_structure(lambda t: t.shape, labels)} with outputs of shape '
        f'{outputs.shape}.{hint} Keras says: {error}'
    ) from error
  metric.reset_state()
  return result


def _check_sums(
    name: str,
    metric: keras.metrics.Metric,
    initial: Sequence[np.ndarray],
    labels: Any,
    outputs: tf.Tensor,
) -> None:
  """Raises an error for a metric whose state is not a sum over batches.

  Args:
    name: The metric's name.
    metric: A metric that has been built.
    initial: The values of its variables before any example.
    labels: A batch of labels; others of the same kind are drawn.
    outputs: The model's outputs for it.
  """
  if not initial:
    raise _not_sums(name, metric, 'keeps its state in no Keras variable')

  def added(*batches: tuple[Any, tf.Tensor]) -> list[np.ndarray]:
    values = [tf.constant(value) for value in initial]
    for labels, outputs in batches:
      values = metric.stateless_update_state(
          values, labels_lib.with_axis_of_outputs(labels, outputs), outputs
      )
    return [
        np.asarray(tf.convert_to_tensor(value), np.float64) - initial_value
        for value, initial_value in zip(values, initial)
    ]

  reversed_outputs = tf.reverse(outputs, [0])
  drawn = np.random.default_rng(0).integers(0, 2, labels.shape)
  try:
    first = tf.cast(drawn, labels.dtype), outputs
    second = tf.cast(1 - drawn, labels.dtype), reversed_outputs
    alone = added(first), added(second)
  except Exception:  # Not every metric takes such labels.
    first, second = (labels, outputs), (labels, reversed_outputs)
    alone = added(first), added(second)
  for variable, one, two, both in zip(metric.variables, *alone, added(first, second)):
    size = np.nan_to_num(np.abs([one, two])).max()
    if not np.allclose(both, one + two, rtol=1e-2, atol=1e-3 * size, equal_nan=True):
      raise _not_sums(
          name, metric, f'keeps no sum in its variable {variable.name!r}: two batches do '
          'not add to it what each of them adds'
      )


def _not_sums(name: str, metric: keras.metrics.Metric, problem: str) -> ValueError:
  return ValueError(
      f'The metric {name!r} ({type(metric).__name__}) {problem}. Metrics are summed over '
      'clients: keep sums and counts, in variables that `self.add_weight` makes, and '
      'compute the value from them in `result`. What must see all predictions at once '
      'belongs into the `scores_fn` of a task.'
  )


def _mean_loss(state: Sequence[tf.Tensor]) -> tf.Tensor:
  return state[0] / state[1]  # NaN without examples.


def _only_value(state: Sequence[tf.Tensor]) -> tf.Tensor:
  return tf.convert_to_tensor(state[0])
