"""Metrics over clients, over all examples and client by client: each as Keras has it."""

from typing import NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import helpers
import tff_kd
from tff_kd import evaluation
from tff_kd.models import metrics as metrics_lib

metrics = keras.metrics
_SIZES = (30, 7, 18)
_STEPS, _CLASSES = 6, 4


class _Shares(metrics.Metric):
  """A dict of numbers, and a variable that does not begin with 0."""

  def __init__(self, name='shares'):
    super().__init__(name=name)
    self.seen = self.add_weight(initializer='zeros', name='seen')
    self.high = self.add_weight(initializer='zeros', name='high')
    self.bound = self.add_weight(initializer=lambda *_, **__: 0.4, name='bound')

  def update_state(self, y_true, y_pred, sample_weight=None):
    highest = keras.ops.max(y_pred, axis=-1)
    self.seen.assign_add(keras.ops.cast(keras.ops.size(highest), 'float32'))
    is_high = keras.ops.cast(highest > self.bound, 'float32')
    self.high.assign_add(keras.ops.sum(is_high))

  def result(self):
    return {'high': self.high / self.seen, 'low': 1.0 - self.high / self.seen}

  def reset_state(self):
    for variable, value in zip(self.variables, (0.0, 0.0, 0.4)):
      variable.assign(value)


class _Kind(NamedTuple):
  """A model with labels, and metrics for them.

  Attributes:
    loss_fn: The loss.
    metrics_fn: The metrics.
    labels_of: Makes labels of random integers below 3, `[n]`.
    activation: In which the model ends.
    units: How many outputs it has.
  """

  loss_fn: object
  metrics_fn: object
  labels_of: object
  activation: object = None
  units: int = 3


def _one_hot(drawn):
  return np.eye(3, dtype=np.float32)[drawn]


_KINDS = {
    'class numbers': _Kind(
        helpers.loss_fn,
        lambda: [
            metrics.SparseCategoricalAccuracy(),
            metrics.SparseTopKCategoricalAccuracy(k=2),
            metrics.SparseCategoricalCrossentropy(from_logits=True),
            metrics.MeanIoU(num_classes=3, sparse_y_pred=False),
            metrics.IoU(3, target_class_ids=[2], sparse_y_pred=False, name='iou_of_2'),
        ],
        lambda drawn: drawn.astype(np.int32),
    ),
    'one-hot': _Kind(
        keras.losses.CategoricalCrossentropy,
        lambda: [
            metrics.F1Score(),
            metrics.F1Score(average='macro', name='f1_macro'),
            metrics.FBetaScore(average='weighted', beta=2.0),
            metrics.AUC(multi_label=True),
            metrics.AUC(),  # By Keras's count another number at each call.
            metrics.AUC(curve='PR', summation_method='majoring', name='pr'),
            metrics.AUC(curve='PRGAIN', thresholds=[0.2, 0.4], name='prgain'),
            metrics.CategoricalAccuracy(name='accuracy'),
            metrics.TopKCategoricalAccuracy(k=2),
            metrics.OneHotMeanIoU(3),
            metrics.Recall(top_k=2),
            metrics.PrecisionAtRecall(0.5, num_thresholds=20),
            _Shares(),
        ],
        _one_hot, 'softmax',
    ),
    'several': _Kind(
        keras.losses.BinaryCrossentropy,
        lambda: [
            metrics.AUC(multi_label=True, label_weights=[0.2, 0.5, 0.3]),
            metrics.F1Score(average='micro', threshold=0.5),
            metrics.BinaryAccuracy(),
            metrics.BinaryIoU(target_class_ids=[0]),
            metrics.TrueNegatives(thresholds=[0.3, 0.5]),
        ],
        lambda drawn: 1.0 - _one_hot(drawn), 'sigmoid',
    ),
    'binary': _Kind(
        lambda: keras.losses.BinaryCrossentropy(from_logits=True),
        lambda: [
            metrics.AUC(from_logits=True),
            metrics.BinaryAccuracy(threshold=0.0),
            metrics.BinaryCrossentropy(from_logits=True),
            metrics.Precision(thresholds=0.0),
        ],
        lambda drawn: (drawn > 0).astype(np.int32), units=1,
    ),
    'numbers': _Kind(
        keras.losses.MeanSquaredError,
        lambda: [
            metrics.R2Score(),
            metrics.R2Score(class_aggregation=None, name='r2_each'),
            metrics.RootMeanSquaredError(name='rmse'),
            metrics.MeanAbsolutePercentageError(),
            metrics.CosineSimilarity(),
            metrics.PearsonCorrelation(),
            metrics.LogCoshError(),
        ],
        lambda drawn: np.stack([drawn, drawn**2 - 1, 3 - drawn], 1).astype(np.float32),
    ),
}


def _clients(kind):
  rng = np.random.default_rng(1)
  return [
      (rng.normal(size=(n, helpers.DIM)).astype(np.float32),
       kind.labels_of(rng.integers(0, 3, n)))
      for n in _SIZES
  ]


def _keras(kind, outputs, labels):
  """The metrics by name, each over these examples in Keras's own way."""
  labels = np.asarray(labels)
  if labels.ndim == 1 and outputs.shape[-1] == 1:
    labels = labels[:, np.newaxis]
  found = {}
  for name, metric in metrics_lib.new_metrics(kind.metrics_fn).by_name.items():
    metric.update_state(labels, outputs)
    result = tf.nest.map_structure(np.asarray, metric.result())
    if isinstance(result, dict):
      found |= {f'{name}_{key}': value for key, value in result.items()}
    elif result.ndim:
      found |= {f'{name}_{i}': value for i, value in enumerate(result)}
    else:
      found[name] = result
  return found


# A metric of each of the other bases is in those two.
@pytest.mark.parametrize(
    'name',
    [its if its in ('one-hot', 'numbers') else helpers.slow(its) for its in _KINDS],
)
def test_metrics_are_those_of_keras(name):
  kind = _KINDS[name]
  clients = _clients(kind)
  process = tff_kd.algorithms.build_fed_avg(
      student_fn=helpers.dense_fn(classes=kind.units, activation=kind.activation),
      input_spec=helpers.dataset(*clients[0]).element_spec, loss_fn=kind.loss_fn,
      metrics_fn=kind.metrics_fn, client_optimizer=helpers.sgd(0.0),
  )
  state = process.initialize()
  spec, weights = process.student_spec, state.global_model_weights
  evaluator = evaluation.CentralEvaluator(spec)
  x, y = (np.concatenate(parts) for parts in zip(*clients))
  expected = _keras(kind, evaluator.outputs(weights, x), y)
  assert list(expected) == spec.metrics.score_names

  # Over clients. With a rate of 0, every client has the model that was sent.
  datasets = [helpers.dataset(*client) for client in clients]
  released = process.next(state, datasets).metrics
  train = tff_kd.simulation.flatten_metrics(released['client_work']['train'])
  found = {key.replace('/', '_'): value for key, value in train.items()}
  flat = [f'client_work/train/{key}' for key in train]
  assert set(flat) <= set(tff_kd.simulation.process_metric_names(process))
  # Over all examples.
  scores = evaluation.score(evaluator.outputs(weights, x), y, spec=spec)
  assert list(scores) == list(evaluation.score_names(spec))
  for key, value in expected.items():
    np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-6, err_msg=key)
    np.testing.assert_allclose(scores[key], value, rtol=1e-4, atol=1e-6, err_msg=key)

  if len(scores) > 12:
    return
  # Client by client.
  key = list(expected)[0]
  mean = evaluation.ClientsEvaluator(spec, metric=key).evaluate(weights, datasets).mean
  each = [_keras(kind, evaluator.outputs(weights, x), y)[key] for x, y in clients]
  np.testing.assert_allclose(mean, np.mean(each), rtol=1e-5)


def test_metrics_leave_padding_out():
  def build():
    return keras.Sequential([
        keras.layers.Input((_STEPS,), dtype='int32'),
        keras.layers.Embedding(_CLASSES, 3), keras.layers.Dense(_CLASSES),
    ])

  def metrics_fn():
    return [
        metrics.SparseCategoricalAccuracy(name='accuracy'),
        metrics.MeanIoU(_CLASSES, sparse_y_pred=False),
        metrics.SparseTopKCategoricalAccuracy(k=2),
    ]

  spec = tff_kd.models.build_model_spec(
      build, input_spec=(tf.TensorSpec([None, _STEPS], tf.int32),) * 2,
      loss_fn=helpers.loss_with(ignore_class=0), metrics_fn=metrics_fn,
  )
  rng = np.random.default_rng(0)
  # With as many positions in each, Keras's mean over examples is that over positions.
  y = rng.integers(1, _CLASSES, (20, _STEPS)).astype(np.int32)
  y[:, 4:] = 0
  outputs = rng.normal(size=(20, _STEPS, _CLASSES)).astype(np.float32)
  scores = evaluation.score(outputs, y, spec=spec)
  for metric in metrics_fn():
    metric.update_state(y[:, :4].reshape(-1), outputs[:, :4].reshape(-1, _CLASSES))
    name = 'mean_io_u' if isinstance(metric, metrics.MeanIoU) else metric.name
    np.testing.assert_allclose(scores[name], metric.result(), rtol=1e-6, err_msg=name)


class _Highest(metrics.Metric):

  def __init__(self):
    super().__init__(name='highest')
    self.value = self.add_weight(initializer='zeros', name='so_far')

  def update_state(self, y_true, y_pred, sample_weight=None):
    self.value.assign(keras.ops.maximum(self.value, keras.ops.max(y_pred)))

  def result(self):
    return self.value


class _InPython(metrics.Metric):
  """Counts where nobody sees it."""

  def __init__(self):
    super().__init__(name='in_python')
    self.count = 0

  def update_state(self, y_true, y_pred, sample_weight=None):
    self.count += 1

  def result(self):
    return keras.ops.convert_to_tensor(float(self.count))


class _OfNumPy(metrics.Mean):

  def update_state(self, y_true, y_pred, sample_weight=None):
    super().update_state(float(np.mean(np.asarray(y_pred))))


@pytest.mark.parametrize(
    'metric_fn, kind, message',
    [
        (_Highest, 'class numbers', "'highest'.*no sum in its variable 'so_far'"),
        (_InPython, 'class numbers', "'in_python'.*in no Keras variable"),
        (metrics.F1Score, 'class numbers', "'f1_score'.*want one-hot labels"),
        (metrics.CategoricalAccuracy, 'class numbers', 'Sparse'),
        (metrics.SparseCategoricalCrossentropy, 'class numbers', 'from_logits=True'),
        (metrics.AUC, 'binary', "'auc'.*from_logits=True"),
        (_OfNumPy, 'class numbers', "'mean'.*keras.ops"),
        (
            lambda: metrics.R2Score(num_regressors=2), 'numbers',
            "'r2_score'.*cannot be computed of its state in a graph",
        ),
    ],
    ids=lambda value: getattr(value, '__name__', None),
)
def test_what_cannot_be_summed_is_refused_by_name(metric_fn, kind, message):
  kind = _KINDS[kind]
  with pytest.raises(ValueError, match=message):
    tff_kd.algorithms.build_fed_avg(
        student_fn=helpers.dense_fn(classes=kind.units), loss_fn=kind.loss_fn,
        input_spec=helpers.dataset(*_clients(kind)[0]).element_spec,
        metrics_fn=lambda: [metric_fn()], client_optimizer=helpers.sgd(),
    )


def test_names_do_not_depend_on_earlier_metrics():
  def metrics_fn():
    return [metrics.AUC(), metrics.AUC(curve='PR'), metrics.AUC(name='auc_7')]

  for _ in range(2):
    assert list(metrics_lib.new_metrics(metrics_fn).by_name) == ['auc', 'auc_1', 'auc_7']


@pytest.mark.parametrize(
    'name, lower',
    [
        ('validation/student_auc', False), ('test/teacher_auc_1', True),
        ('client_work/train/loss', True), ('test/student_rmse', True),
        ('validation/student_0_calibration_error', True), ('rmse', True),
        ('server_distillation/teacher/validation_loss_after', True),
        ('validation/student_accuracy', False), ('test/student_glossy', False),
    ],
)
def test_which_metrics_are_better_the_lower_they_are(name, lower):
  known = {'auc': metrics.AUC(), 'auc_1': metrics.MeanSquaredError()}
  assert metrics_lib.lower_is_better(name, known) == lower


def test_scores_of_what_has_diverged_and_of_other_labels():
  kind = _KINDS['one-hot']
  spec = tff_kd.models.build_model_spec(
      helpers.dense_fn(activation='softmax'), loss_fn=kind.loss_fn,
      input_spec=helpers.dataset(*_clients(kind)[0]).element_spec,
      metrics_fn=lambda: [
          metrics.CategoricalAccuracy(name='accuracy'), metrics.AUC(name='auc')
      ],
  )
  outputs = np.array([[0.0, 1.0, 0.0], [np.nan, 0.0, 0.0]], np.float32)
  scores = evaluation.score(outputs, np.eye(3)[[1, 0]], spec=spec)
  assert scores['accuracy'] == 0.5 and np.isnan(scores['auc'])
  with pytest.raises(ValueError, match="labels like the clients'.*shape .2,"):
    evaluation.score(np.eye(3)[[1, 0]], np.array([1, 0]), spec=spec)
