"""Keras's masks (`mask_zero`, `Masking`): padding counts nowhere, as in Keras."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipelines import train_evaluation
from tests import helpers
import tff_kd
from tff_kd import evaluation
from tff_kd import models
from tff_kd.client import local_terms
from tff_kd.models import cohorts
from tff_kd.server import distill

_LENGTH, _WORDS, _CLASSES = 5, 9, 3
_RNG = np.random.default_rng(0)
_X = _RNG.integers(1, _WORDS, (8, _LENGTH)).astype(np.int32)
_X[np.arange(_LENGTH) >= _RNG.integers(1, _LENGTH, (8, 1))] = 0
_Y = np.where(_X > 0, _X % _CLASSES, 0).astype(np.int32)  # Padding has a class, too.
_COUNTS = np.bincount(_Y[_X > 0], minlength=_CLASSES)
_INPUT_SPEC = (tf.TensorSpec([None, _LENGTH], tf.int32),) * 2


def _student(batch_size=None, width=4):
  return keras.Sequential([
      keras.Input((_LENGTH,), batch_size, dtype='int32'),
      keras.layers.Embedding(_WORDS, width, mask_zero=True),
      keras.layers.Dense(_CLASSES),
  ])


def _spec(keras_model_fn=_student, **kwargs):
  return helpers.model_spec(keras_model_fn, input_spec=_INPUT_SPEC, **kwargs)


@helpers.shared
def _process(*terms, **kwargs):
  return helpers.build(
      'fed_avg', student_fn=_student, input_spec=_INPUT_SPEC, local_terms=terms,
      client_optimizer=helpers.sgd(1.0), **kwargs
  )


def _cross_entropy(outputs, labels):
  each = -np.log(helpers.softmax(np.float64(outputs)))
  return np.take_along_axis(each, labels[..., np.newaxis], -1)[..., 0]


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('reduction', ['sum_over_batch_size', 'mean_with_sample_weight'])
def test_a_loss_that_ignores_a_class_knows_the_mask_too(weighted, reduction):
  y = _Y.copy()
  y[:, 0] = -1
  loss_fn = helpers.loss_with(ignore_class=-1, reduction=reduction)
  spec = _spec(loss_fn=loss_fn)
  weight = np.float32(_RNG.uniform(size=_Y.shape)) if weighted else None
  outputs = spec.call(spec.values(spec.initial_weights), tf.constant(_X)).outputs
  model = spec.to_keras(spec.initial_weights)
  model.compile(loss=loss_fn())
  np.testing.assert_allclose(
      spec.supervised_loss(
          tf.constant(y), outputs, sample_weight=spec.sample_weight((_X, y, weight))
      ),
      model.evaluate(_X, y, sample_weight=weight, batch_size=len(_X), verbose=0),
      rtol=1e-5,
  )


def _trained(process, client):
  output = process.next(process.initialize(), [client])
  return output.metrics['client_work']['train'], output.state.global_model_weights


def test_adjusted_logits_are_masked_like_the_models():
  """Where every class is there, restricted softmax changes nothing."""
  client = helpers.dataset(_X, _Y, 8)
  expected, found = (
      _trained(_process(*terms), client)
      for terms in ((), (tff_kd.RestrictedSoftmax(scale=0.5),))
  )
  assert found[0] == expected[0]
  helpers.assert_weights_close(found[1].trainable, expected[1].trainable, rtol=0)


class _Spy(local_terms.LocalTerm):
  """Moves the bias down by something of the step: one step of rate 1 shows it."""

  needs_class_counts = True

  def __init__(self, seen):
    self._seen = seen

  def __call__(self, loss, step):
    return 0.0 * loss + tf.reduce_sum(step.weights[-1] * self._seen(step))


@pytest.mark.parametrize(
    'seen, expected',
    [
        (lambda step: step.class_counts, _COUNTS),
        (lambda step: tf.reduce_sum(step.one_hot_labels(), axis=0), _COUNTS),
        (lambda step: step.mean(tf.cast(step.inputs == 0, tf.float32)), 0.0),
    ],
)
@pytest.mark.parametrize('from_files', [False, True])
def test_padding_counts_in_no_term(seen, expected, from_files):
  client, batches = helpers.dataset(_X, _Y, 8), None
  if from_files:
    client, batches = 0, helpers.batches([(_X, _Y)], batch_size=8)
  process = _process(_Spy(seen), client_data=batches)
  before = process.initialize().global_model_weights.trainable[-1]
  after = _trained(process, client)[1].trainable[-1]
  np.testing.assert_allclose(before - after, np.broadcast_to(expected, 3), atol=1e-5)


@pytest.mark.parametrize('batch_size', [None, helpers.slow(3)])
def test_padding_counts_in_no_score(batch_size):
  spec = _spec(lambda: _student(batch_size), metrics_fn=helpers.metrics_fn)
  evaluator, weights = evaluation.CentralEvaluator(spec), spec.initial_weights
  outputs = evaluator.outputs(weights, _X)
  each, is_right = _cross_entropy(outputs, _Y), outputs.argmax(-1) == _Y
  for weight in (None, np.arange(8, dtype=np.float32)):
    kept = _X > 0 if weight is None else (_X > 0) & (weight > 0)[:, np.newaxis]
    factors = kept if weight is None else kept * weight[:, np.newaxis]
    scores = evaluator.evaluate(weights, _X, _Y, weight)
    assert scores['loss'] == pytest.approx(np.sum(each * factors) / kept.sum(), rel=1e-5)
    assert scores['accuracy'] == pytest.approx(is_right[kept].mean())
  found = {
      metric: evaluation.ClientsEvaluator(spec, metric=metric).evaluate(
          weights, [helpers.dataset(_X, _Y, 8)]
      ).mean
      for metric in ('accuracy', 'loss')
  }
  assert found['loss'] == pytest.approx(each[_X > 0].mean(), rel=1e-5)
  assert found['accuracy'] == pytest.approx(is_right[_X > 0].mean())
  with pytest.raises(ValueError, match="Keras masks outputs .* padding included"):
    _ = spec.functional_model


def test_scripts_score_clients_without_padding():
  spec = _spec(metrics_fn=helpers.metrics_fn)
  evaluator, weights = evaluation.CentralEvaluator(spec), spec.initial_weights
  task = helpers.task(tff_kd.data.Examples(_X, _Y), num_classes=_CLASSES)
  split = [np.array([0, 1, 2]), np.array([3, 4, 5, 6, 7])]
  found = train_evaluation.over_clients(evaluator, weights, task, split)
  is_right = evaluator.outputs(weights, _X).argmax(-1) == _Y
  for client, rows in enumerate(split):
    expected = is_right[rows][_X[rows] > 0].mean()
    assert found.by_client[client] == pytest.approx(expected)


def test_a_loss_of_whole_texts_cannot_leave_padding_out():
  outputs = _spec().keras_model_fn()(_X)
  with pytest.raises(ValueError, match='first 1 axes.*return one loss a position'):
    tff_kd.losses.weighted_mean(tf.zeros([8]), models.unmasked(outputs))


@pytest.mark.parametrize('validation_size', [0, 3])
def test_padding_teaches_nothing(validation_size):
  student = _spec(name='student')
  teacher = _spec(lambda: _student(width=6), name='teacher')
  stage = distill.DistillationStage(
      'student', helpers.sgd(0.1),
      tff_kd.Distillation(target='teacher', num_steps=1, loss='mse'),
  )
  transfer = tff_kd.TransferSet(_X, validation_size=validation_size)
  process = distill.build_server_distillation(
      cohorts.as_students(student), teacher, transfer, [stage]
  )
  weights = distill.ServerModels(student.initial_weights, teacher.initial_weights)
  measured = helpers.distil_once(process, weights).measurements['student']
  own, target = (
      models.BoundModel(spec, spec.values(spec.initial_weights)).logits(tf.constant(_X))
      for spec in (student, teacher)
  )
  each = np.mean(np.square(own - target), axis=-1)
  expected = {'first_loss': transfer.round_ids(tf.constant(0)).numpy()}
  if validation_size:
    expected['validation_loss_before'] = transfer.validation_ids().numpy()
  for name, rows in expected.items():
    assert measured[name] == pytest.approx(each[rows][_X[rows] > 0].mean(), rel=1e-5)
