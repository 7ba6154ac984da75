"""How good a model is: centrally, in its confidence, and client by client."""

from collections.abc import Callable, Mapping, Sequence
import concurrent.futures
import functools
import os
from typing import Any, NamedTuple, Optional, Union

import numpy as np
from scipy import special
import tensorflow as tf
from tff_kd.compat import tff

from tff_kd.data import client_names
from tff_kd import graphs
from tff_kd import models

_BATCH_SIZE = 256
# The number of examples in one update of a user's metric: an AUC makes many copies.
_METRIC_BATCH = 1024
_NOBODY = 'No client has an example to evaluate on.'


def expected_calibration_error(
    logits: np.ndarray, labels: np.ndarray, *, num_bins: int = 15
) -> float:
  """Returns the expected calibration error: how far confidence is from accuracy.

  Source: Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017),
  equation 3: bins of equal width over the confidence of the predicted class.

  Args:
    logits: float `[n, classes]`.
    labels: int `[n]`.
    num_bins: The number of bins.

  Returns:
    A number between 0 (calibrated) and 1; not a number if a logit is not finite.
  """
  if not np.all(np.isfinite(logits)):
    return float('nan')
  # Not tensorflow_probability's: it takes seconds to import, and Keras 2 with it.
  probabilities = special.softmax(np.asarray(logits, np.float64), axis=-1)
  confidence = probabilities.max(axis=-1)
  is_right = probabilities.argmax(axis=-1) == labels
  bins = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
  gaps = np.bincount(bins, is_right - confidence, minlength=num_bins)
  return float(np.abs(gaps).sum() / len(confidence))


def score_names(spec: models.ModelSpec) -> tuple[str, ...]:
  """Returns the names of the scores that `score` computes, the user's metrics last.

  Args:
    spec: The model.
  """
  return tuple(dict.fromkeys([*_own_names(spec), *spec.metrics.score_names]))


def _own_names(spec: models.ModelSpec) -> tuple[str, ...]:
  if spec.is_regression:
    return ('rmse', 'mae')
  return ('accuracy', 'loss', 'calibration_error')


def score(
    outputs: np.ndarray,
    labels: np.ndarray,
    *,
    spec: models.ModelSpec,
    names: Optional[Sequence[str]] = None,
    sample_weight: Optional[np.ndarray] = None,
) -> dict[str, float]:
  """Scores a model's outputs against labels.

  Args:
    outputs: Float `[n, ...]`, as the model returns them: logits or probabilities, or
      numbers of a regression.
    labels: As the model is trained on: class numbers `[n, ...]`, where labels that the
      loss ignores do not count; one-hot labels `[n, ..., classes]`; binary labels
      `[n, ...]`; or numbers.
    spec: The model.
    names: The scores to compute; all of `score_names` if `None`.
    sample_weight: Optional weights, float `[n]`, or of the positions of sequences. As
      in Keras they are factors of the losses, and `weighted_metrics` count by them; all
      other scores count examples alike, but for those of weight 0, which count nowhere
      and whose labels may be anything. The loss is the weighted sum over the number of
      labels that count.

  Returns:
    By name: for classes, the accuracy, the mean cross-entropy (`loss`) and the expected
    calibration error, over all labels where an example has several; for a regression,
    the root mean squared error and the mean absolute error. Then the user's metrics, as
    Keras computes them over all examples; a metric of several numbers as `f1_score_0`
    and so on. A metric of the user's that is called `accuracy` takes the place of ours.
    Predictions that are not finite count as wrong in our accuracy, and make all other
    scores NaN.

  Raises:
    ValueError: If the user's metrics do not take such labels, or weights do not fit.
  """
  sample_weight = _weights(sample_weight, outputs)
  names = score_names(spec) if names is None else names
  found = {}
  asks_users = any(name in spec.metrics.score_names for name in names)
  if asks_users and np.all(np.isfinite(outputs)):
    found = _user_scores(outputs, labels, spec, sample_weight)
  if any(name in _own_names(spec) and name not in found for name in names):
    found = _own_scores(outputs, labels, spec, sample_weight) | found
  return {name: found.get(name, float('nan')) for name in names}


def _weights(
    sample_weight: Optional[np.ndarray], outputs: np.ndarray
) -> Optional[np.ndarray]:
  """Returns weights with the axes of the outputs but the last."""
  if sample_weight is None:
    return None
  weights, axes = np.asarray(sample_weight, np.float32), np.shape(outputs)[:-1]
  shape = weights.shape + (1,) * (len(axes) - weights.ndim)
  if shape[len(axes) :] == (1,):
    shape = shape[: len(axes)]
  fits = len(shape) == len(axes) and weights.shape[:1] == axes[:1] and all(
      size in (1, axis_size) for size, axis_size in zip(shape, axes)
  )
  if not fits or not np.all(np.isfinite(weights)) or np.any(weights < 0):
    raise ValueError(
        '`sample_weight` must be finite numbers of 0 or more, of the shape '
        f'{axes[:1]} or of the outputs without the last axis, {axes}, found '
        f'{np.shape(sample_weight)}, {np.min(weights)} to {np.max(weights)}.'
    )
  return weights.reshape(shape)


def _user_scores(
    outputs: np.ndarray, labels: np.ndarray, spec: models.ModelSpec,
    weights: Optional[np.ndarray],
) -> dict[str, float]:
  """Returns the user's metrics over all examples, computed in batches."""
  _, expected = models.split_batch(spec.input_spec)
  labels = np.asarray(labels)
  if not expected.shape[1:].is_compatible_with(labels.shape[1:]):
    raise ValueError(
        "The user's metrics take labels like the clients' (`input_spec`): expected "
        f'{expected}, found an array of shape {labels.shape}.'
    )
  update = spec.metric_update if weights is None else spec.weighted_metric_update
  state = spec.metrics.initial_state()
  for start in range(0, len(labels), _METRIC_BATCH):
    batch = slice(start, start + _METRIC_BATCH)
    weight = () if weights is None else (weights[batch],)
    state = update(
        state, tf.cast(labels[batch], expected.dtype), outputs[batch], *weight
    )
  return {name: float(value) for name, value in spec.metric_scores(state).items()}


def _own_scores(
    outputs: np.ndarray, labels: np.ndarray, spec: models.ModelSpec,
    weights: Optional[np.ndarray],
) -> dict[str, float]:
  """Returns accuracy, loss and calibration, or the errors of a regression."""
  if spec.is_regression:
    errors = outputs.reshape(len(labels), -1) - labels.reshape(len(labels), -1)
    if weights is not None:
      each = np.broadcast_to(weights[..., np.newaxis], outputs.shape)
      errors = errors[each.reshape(len(labels), -1) > 0]
    return {
        'rmse': float(np.sqrt(np.mean(np.square(errors)))),
        'mae': float(np.mean(np.abs(errors))),
    }
  logits = spec.class_logits(tf.constant(outputs)).numpy()
  logits, labels, weights = _counted(logits, labels, spec, weights)
  is_finite = np.all(np.isfinite(logits), axis=-1)
  log_p = tf.nn.log_softmax(logits).numpy()
  return {
      'accuracy': float(np.mean((np.argmax(logits, axis=-1) == labels) & is_finite)),
      'loss': float(-np.mean(weights * log_p[np.arange(len(labels)), labels])),
      'calibration_error': expected_calibration_error(logits, labels),
  }


def counted_predictions(
    logits: np.ndarray,
    labels: np.ndarray,
    spec: models.ModelSpec,
    sample_weight: Optional[np.ndarray] = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the predictions and labels of all positions that count.

  Args:
    logits: Float `[n, ..., classes]`, as `ModelSpec.class_logits` returns them. A
      single logit z, the log-odds of a binary label, becomes the logits of two classes,
      [0, z].
    labels: As for `score`.
    spec: The model, which may ignore a label.
    sample_weight: As for `score`; positions of weight 0 do not count.

  Returns:
    Logits `[m, classes]` and int64 class numbers `[m]`.
  """
  outputs = logits[..., 0] if spec.is_multi_label else logits
  weights = _weights(sample_weight, outputs)
  return _counted(logits, labels, spec, weights)[:2]


def _counted(
    logits: np.ndarray, labels: np.ndarray, spec: models.ModelSpec,
    weights: Optional[np.ndarray],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns `counted_predictions` and the weights of these, float32 `[m]`."""
  places = logits.shape[:-1]
  if weights is None:
    weights = np.ones(places, np.float32)
  weights = weights.reshape(weights.shape + (1,) * (len(places) - weights.ndim))
  weights = np.broadcast_to(weights, places).reshape(-1)
  labels = np.asarray(labels)
  if logits.shape[-1] == 1:
    logits = np.concatenate([np.zeros_like(logits), logits], axis=-1)
    labels = (labels > 0.5).astype(np.int64)  # For a hinge loss they may be -1 and 1.
  elif labels.shape == logits.shape:
    labels = labels.argmax(axis=-1)
  logits = logits.reshape(-1, logits.shape[-1])
  labels = labels.reshape(-1).astype(np.int64)
  counted = weights > 0
  if spec.ignored_label is not None:
    counted &= labels != spec.ignored_label
  return logits[counted], labels[counted], weights[counted]


class CentralEvaluator:
  """Evaluates weights on examples that the server holds.

  One traced function serves all calls.

  Attributes:
    spec: The `ModelSpec`.
  """

  def __init__(self, spec: models.ModelSpec):
    """Initializes the evaluator.

    Args:
      spec: The model whose weights will be evaluated.
    """
    self.spec = spec

  def _traced(self, fn: Callable[[Any, Any], tf.Tensor]) -> graphs.TracedFunction:
    """Traces a function of the model's values and a batch of inputs."""
    spec = self.spec
    inputs, _ = models.split_batch(spec.input_spec)
    inputs = tf.nest.map_structure(
        lambda s: tf.TensorSpec([None, *s.shape[1:]], s.dtype), inputs
    )
    return graphs.TracedFunction(
        lambda weights, inputs: fn(spec.values(weights), inputs),
        [spec.weights_spec, inputs],
    )

  @functools.cached_property
  def _outputs(self) -> graphs.TracedFunction:
    return self._traced(
        lambda values, inputs: tf.cast(
            self.spec.call(values, inputs).outputs, tf.float32
        )
    )

  @functools.cached_property
  def _unmasked(self) -> graphs.TracedFunction:
    return self._traced(self.spec.unmasked)

  def outputs(self, weights: Any, inputs: Any) -> np.ndarray:
    """Computes the model's outputs under some weights, in batches.

    Args:
      weights: `ModelWeights` of the model.
      inputs: A structure of arrays `[n, ...]`, as the model takes them.

    Returns:
      float32 `[n, ...]`.
    """
    return self._in_batches(self._outputs, weights, inputs)

  def _in_batches(
      self, fn: graphs.TracedFunction, weights: Any, inputs: Any
  ) -> np.ndarray:
    weights = _model_weights(weights)
    size = len(tf.nest.flatten(inputs)[0])
    return np.concatenate([
        fn(
            weights,
            tf.nest.map_structure(
                lambda a: tf.constant(a[start : start + _BATCH_SIZE]), inputs
            ),
        ).numpy()
        for start in range(0, size, _BATCH_SIZE)
    ])

  def logits(self, weights: Any, inputs: Any) -> np.ndarray:
    """Computes the model's logits under some weights, in batches.

    Args:
      weights: `ModelWeights` of the model.
      inputs: A structure of arrays `[n, ...]`, as the model takes them.

    Returns:
      float32 `[n, ..., classes]`.
    """
    outputs = self.outputs(weights, inputs)
    return self.spec.class_logits(tf.constant(outputs)).numpy()

  def sample_weight(
      self, weights: Any, inputs: Any, sample_weight: Optional[np.ndarray] = None
  ) -> Optional[np.ndarray]:
    """Returns sample weights for `score`, 0 for outputs that Keras masks (`mask_zero`).

    Args:
      weights: `ModelWeights` of the model.
      inputs: A structure of arrays `[n, ...]`, as the model takes them.
      sample_weight: Optional weights of the examples, as for `score`.

    Returns:
      The weights given, where the model masks nothing; else float32 `[n, ...]`.
    """
    if not self.spec.has_mask:
      return sample_weight
    kept = self._in_batches(self._unmasked, weights, inputs)
    if sample_weight is None:
      return kept
    return kept * _weights(sample_weight, kept[..., np.newaxis])

  def evaluate(
      self,
      weights: Any,
      inputs: Any,
      labels: np.ndarray,
      sample_weight: Optional[np.ndarray] = None,
  ) -> dict[str, float]:
    """Scores the model under some weights; see `score`.

    Outputs that Keras masks (`mask_zero`, `Masking`) do not count.

    Args:
      weights: `ModelWeights` of the model.
      inputs: A structure of arrays `[n, ...]`, as the model takes them.
      labels: `[n, ...]`: class numbers, or numbers of a regression.
      sample_weight: Optional weights of the examples, as for `score`.

    Returns:
      By name, the scores.
    """
    return score(
        self.outputs(weights, inputs),
        labels,
        spec=self.spec,
        sample_weight=self.sample_weight(weights, inputs, sample_weight),
    )


class FederatedEvaluation(NamedTuple):
  """A metric over clients, each on its own data.

  Attributes:
    mean: Over clients, each counting once.
    percentile_10: The value than which a tenth of the clients are worse.
    worst: The lowest value; for an error, the highest.
    num_clients: How many clients had data and were counted.
    by_client: The metric of each of these, by the client's name, or by its number where
      clients have no names.
  """

  mean: float
  percentile_10: float
  worst: float
  num_clients: int
  by_client: Mapping[client_names.Client, float]


def over_clients(
    values: Union[np.ndarray, Mapping[client_names.Client, float]],
    *,
    lower_is_better: bool = False,
) -> FederatedEvaluation:
  """Summarises a metric over clients.

  Args:
    values: float `[clients]`, one for each client that has examples; or by client.
    lower_is_better: Whether the metric is an error.

  Returns:
    The mean, the tenth percentile, the worst client and the number of clients.

  Raises:
    ValueError: If there is no client.
  """
  by_client: dict[Union[int, str], float] = dict(
      values.items() if isinstance(values, Mapping) else enumerate(values)
  )
  if not by_client:
    raise ValueError(_NOBODY)
  array = np.array(list(by_client.values()))
  return FederatedEvaluation(
      mean=float(np.mean(array)),
      percentile_10=float(np.percentile(array, 90 if lower_is_better else 10)),
      worst=float(np.max(array) if lower_is_better else np.min(array)),
      num_clients=len(array),
      by_client=by_client,
  )


class ClientsEvaluator:
  """Evaluates weights on each client's data, in this process.

  One traced function serves all calls; clients are evaluated at the same time on the
  cores that there are.
  """

  def __init__(
      self,
      spec: models.ModelSpec,
      *,
      metric: str,
      lower_is_better: Optional[bool] = None,
  ):
    """Initializes the evaluator.

    Args:
      spec: The model whose weights will be evaluated.
      metric: The name of a score of the model, such as `f1_score_0` for a metric of
        several numbers.
      lower_is_better: Whether low values are good. If `None`, the metric or its name
        says so.

    Raises:
      ValueError: If there is no such metric.
    """
    known = [*spec.metrics.score_names, *models.TOTALS]
    if metric not in known:
      raise ValueError(f'`metric` must be one of {known}, found {metric!r}.')
    self._spec = spec
    self._metric = metric
    if lower_is_better is None:
      lower_is_better = spec.metrics.lower_is_better(metric)
    self._lower_is_better = lower_is_better
    self._evaluate: Any = None  # Traced for the first dataset.

  def _metric_and_count(
      self, weights: Any, dataset: tf.data.Dataset
  ) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the metric over a client's batches, and the number of examples."""
    spec, metrics = self._spec, self._spec.metrics
    values = spec.values(weights)

    def add(state, batch):
      inputs, labels = models.split_batch(batch)
      weight = spec.sample_weight(batch)
      outputs = spec.call(values, inputs).outputs
      labels, bad = spec.usable_labels(labels, weight)
      check = tf.debugging.Assert(~bad, ["A client's labels are out of range."])
      with tf.control_dependencies([check]):
        labels = tf.identity(labels)
      mask = spec.metric_mask(labels, outputs, sample_weight=weight)
      size = tf.shape(outputs)[0]
      loss = spec.supervised_loss(labels, outputs, sample_weight=weight)
      loss_sum = tf.cast(loss, tf.float32) * tf.cast(size, tf.float32)
      loss_sum = tf.where(size > 0, loss_sum, 0.0)
      state = metrics.update(state, labels, outputs, mask, weight)
      return metrics.add_totals(
          state, loss_sum, models.num_examples(outputs, weight), tf.constant(1)
      )

    state = dataset.reduce(metrics.initial_state(), add)
    scores = metrics.result(state) | metrics.scores(state)
    return scores[self._metric], scores['num_examples']

  def evaluate(
      self,
      weights: Any,
      client_datasets: Union[
          Sequence[tf.data.Dataset], Mapping[client_names.Client, tf.data.Dataset]
      ],
  ) -> FederatedEvaluation:
    """Computes the metric of each client; clients without examples are left out.

    Args:
      weights: `ModelWeights` of the model.
      client_datasets: Batched datasets, one a client, or by client's name; all of one
        `element_spec`.

    Returns:
      The metric by client, and a summary.

    Raises:
      ValueError: If no client has an example.
    """
    weights = _model_weights(weights)
    if not isinstance(client_datasets, Mapping):
      client_datasets = dict(enumerate(client_datasets))
    if not client_datasets:
      raise ValueError(_NOBODY)
    datasets = list(client_datasets.values())
    if self._evaluate is None:
      self._evaluate = graphs.TracedFunction(
          self._metric_and_count,
          [self._spec.weights_spec, tf.data.DatasetSpec(datasets[0].element_spec)],
      )
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      results = pool.map(lambda d: self._evaluate(weights, d), datasets)
    values = {
        client: float(value)
        for client, (value, count) in zip(client_datasets, results) if count > 0
    }
    return over_clients(values, lower_is_better=self._lower_is_better)


def _model_weights(weights: Any) -> tff.learning.models.ModelWeights:
  """Returns weights as `ModelWeights` of lists of tensors."""
  return tff.learning.models.ModelWeights(
      [tf.constant(w) for w in weights.trainable],
      [tf.constant(w) for w in weights.non_trainable],
  )
