"""How good a model is: centrally, in its confidence, and client by client."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tff_kd.compat import tff

from tff_kd import models

_BATCH_SIZE = 256


def expected_calibration_error(
    logits: np.ndarray, labels: np.ndarray, *, num_bins: int = 15
) -> float:
  """How far a classifier's confidence is from its accuracy.

  Source: Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017),
  equation 3: bins of equal width over the confidence of the predicted class.

  Args:
    logits: float `[n, classes]`.
    labels: int `[n]`.
    num_bins: How many bins.

  Returns:
    A number between 0 (calibrated) and 1.
  """
  # Imported where it is used: it costs seconds.
  import tensorflow_probability as tfp  # pylint: disable=g-import-not-at-top

  return float(
      tfp.stats.expected_calibration_error(
          num_bins,
          logits=tf.constant(logits, tf.float32),
          labels_true=tf.constant(labels, tf.int32),
      )
  )


def score_names(spec: models.ModelSpec) -> tuple[str, ...]:
  """The names of what `score` returns; the first one is the most telling."""
  if spec.is_regression:
    return ('rmse', 'mae')
  return ('accuracy', 'loss', 'calibration_error')


def score(
    outputs: np.ndarray, labels: np.ndarray, *, spec: models.ModelSpec
) -> dict[str, float]:
  """How good a model's outputs are.

  Args:
    outputs: Logits `[n, ..., classes]`, or numbers `[n, 1]` of a regression.
    labels: Class numbers `[n, ...]`, those that the loss ignores not counted; or numbers
      `[n]`.
    spec: The model.

  Returns:
    Accuracy, mean cross-entropy and expected calibration error; of a regression root
    mean squared error and mean absolute error.
  """
  if spec.is_regression:
    errors = outputs.reshape(len(labels), -1) - labels.reshape(len(labels), -1)
    return {
        'rmse': float(np.sqrt(np.mean(np.square(errors)))),
        'mae': float(np.mean(np.abs(errors))),
    }
  logits, labels = counted_predictions(outputs, labels, spec)
  log_p = tf.nn.log_softmax(logits).numpy()
  return {
      'accuracy': float(np.mean(np.argmax(logits, axis=-1) == labels)),
      'loss': float(-np.mean(log_p[np.arange(len(labels)), labels])),
      'calibration_error': expected_calibration_error(logits, labels),
  }


def counted_predictions(
    logits: np.ndarray, labels: np.ndarray, spec: models.ModelSpec
) -> tuple[np.ndarray, np.ndarray]:
  """Logits `[m, classes]` and labels `[m]` of all positions that count."""
  logits = logits.reshape(-1, logits.shape[-1])
  labels = np.asarray(labels).reshape(-1)
  if spec.ignored_label is None:
    return logits, labels
  counted = labels != spec.ignored_label
  return logits[counted], labels[counted]


class CentralEvaluator:
  """Evaluates weights on examples that the server holds.

  One Keras model and one traced function serve all calls.
  """

  def __init__(self, spec: models.ModelSpec):
    """Initializes the evaluator.

    Args:
      spec: The model whose weights will be evaluated.
    """
    self._spec = spec
    self._model = spec.model_fn()
    self._logits = tf.function(self._model.logits, reduce_retracing=True)

  def logits(self, weights: Any, inputs: Any) -> np.ndarray:
    """The model's logits `[n, ..., classes]` under `ModelWeights`."""
    self._model.assign(weights)
    size = len(tf.nest.flatten(inputs)[0])
    return np.concatenate([
        self._logits(
            tf.nest.map_structure(
                lambda a: tf.constant(a[start : start + _BATCH_SIZE]), inputs
            )
        ).numpy()
        for start in range(0, size, _BATCH_SIZE)
    ])

  def evaluate(
      self, weights: Any, inputs: Any, labels: np.ndarray
  ) -> dict[str, float]:
    """The scores of `score`.

    Args:
      weights: `ModelWeights` of the model.
      inputs: Inputs as the model takes them, n of each.
      labels: `[n, ...]`: class numbers, or numbers of a regression.
    """
    return score(self.logits(weights, inputs), labels, spec=self._spec)


class FederatedEvaluation(NamedTuple):
  """A metric over clients, each on its own data.

  Attributes:
    mean: Over clients, each counting once.
    percentile_10: A tenth of the clients are worse: below, or, of errors, above.
    worst: The lowest; of errors, the highest.
    num_clients: How many clients had data and were counted.
  """

  mean: float
  percentile_10: float
  worst: float
  num_clients: int


class ClientsEvaluator:
  """Evaluates weights on each client's data, by `tff.learning`'s `build_fed_eval`.

  One computation serves all calls.
  """

  def __init__(
      self, spec: models.ModelSpec, num_clients: int, *, metric: str,
      lower_is_better: bool = False,
  ):
    """Initializes the evaluator.

    Args:
      spec: The model whose weights will be evaluated.
      num_clients: How many clients there are at most.
      metric: The name of a metric of the model.
      lower_is_better: Whether it is an error: low values are good.

    Raises:
      ValueError: If there is no such metric.
    """
    finalizers = list(spec.model_fn().metric_finalizers())
    if metric not in finalizers:
      raise ValueError(f'`metric` must be one of {finalizers}, found {metric!r}.')
    self._metric = metric
    self._lower_is_better = lower_is_better
    self._process = tff.learning.algorithms.build_fed_eval(
        spec.model_fn,
        metrics_aggregation_process=_build_per_client_aggregation(
            spec, max(num_clients, 1)
        ),
    )

  def evaluate(
      self, weights: Any, client_datasets: Sequence[tf.data.Dataset]
  ) -> FederatedEvaluation:
    """The metric over the clients; those without examples are left out.

    Args:
      weights: `ModelWeights` of the model.
      client_datasets: Batched datasets, one a client.

    Raises:
      ValueError: If no client has an example.
    """
    state = self._process.set_model_weights(self._process.initialize(), weights)
    output = self._process.next(state, list(client_datasets))
    per_client = output.metrics['client_work']['eval']['current_round_metrics']
    values = np.asarray(per_client[self._metric], np.float64)
    counts = np.asarray(per_client['num_examples'])
    values = values[counts > 0]
    if not len(values):
      raise ValueError('No client has an example to evaluate on.')
    return FederatedEvaluation(
        mean=float(values.mean()),
        percentile_10=float(np.percentile(values, 90 if self._lower_is_better else 10)),
        worst=float(values.max() if self._lower_is_better else values.min()),
        num_clients=len(values),
    )


def _build_per_client_aggregation(
    spec: models.ModelSpec, num_clients: int
) -> tff.templates.AggregationProcess:
  """Brings every client's finalized metrics to the server, as vectors.

  TFF's own factory for this carries samples over rounds in its state, which does
  not fit `build_fed_eval`; this takes one round's.
  """
  with tf.Graph().as_default():
    model = spec.model_fn()
    unfinalized_type = tff.types.tensorflow_to_type(
        tf.nest.map_structure(
            lambda t: tf.TensorSpec(t.shape, t.dtype),
            model.report_local_unfinalized_metrics(),
        )
    )
    sample = tff.learning.metrics.finalize_then_sample(
        model.metric_finalizers(), unfinalized_type, num_clients
    )

  @tff.federated_computation
  def init_fn():
    return tff.federated_value((), tff.SERVER)

  @tff.federated_computation(
      init_fn.type_signature.result,
      tff.FederatedType(unfinalized_type, tff.CLIENTS),
  )
  def next_fn(state, unfinalized):
    metrics = sample(unfinalized)
    return tff.templates.MeasuredProcessOutput(
        state,
        tff.federated_zip((metrics, metrics)),
        tff.federated_value((), tff.SERVER),
    )

  return tff.templates.AggregationProcess(init_fn, next_fn)
