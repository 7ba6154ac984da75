"""Validation, rollback, early stop, masks."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tff_kd
from tests import helpers
from tff_kd import knowledge
from tff_kd import models
from tff_kd.models import cohorts
from tff_kd.server import distill


def _run(distillation, *, labelled=False, validation=8, rate=0.1, payload=(),
         label_mask=None):
  """One run of a single stage, the student a fixed linear model."""
  keras.utils.set_random_seed(3)
  student = helpers.model_spec(name='student')
  teacher = helpers.model_spec(helpers.dense_fn((8,)), name='teacher')
  x, y = helpers.examples(24, 0)
  if label_mask is not None:
    # Unknown labels may be anything; those that are known can be learned.
    y = np.where(label_mask, x[:, 0] > 0, -7).astype(np.int32)
  transfer = tff_kd.TransferSet(
      x, y if labelled else None, label_mask=label_mask, validation_size=validation
  )
  stage = distill.DistillationStage('student', helpers.sgd(rate, 0.9), distillation)
  process = distill.build_server_distillation(
      cohorts.as_students(student), teacher, transfer, [stage]
  )
  weights = distill.ServerModels(
      student.initial_weights, teacher.initial_weights
  )
  return helpers.distil_once(process, weights, payload), weights


def test_distillation_that_harms_is_rolled_back():
  # Defect 8: a rate this high makes any model worse.
  output, before = _run(
      tff_kd.Distillation(target='teacher', num_steps=10), rate=1e4
  )
  measured = output.measurements['student']
  assert measured['rolled_back'] == 1 and measured['best_step'] == 0
  assert (
      measured['validation_loss_after'] == measured['validation_loss_before'] > 0
  )
  helpers.assert_weights_close(output.result.student, before.student, rtol=0)
  # The optimizer goes back with the weights.
  assert all(
      np.abs(w).max() == 0
      for w in tf.nest.flatten(output.state)
      if np.ndim(w) > 0
  )


def test_without_validation_only_finite_results_are_kept():
  output, before = _run(
      tff_kd.Distillation(target='teacher', num_steps=30, loss='mse'),
      validation=0, rate=1e30,
  )
  assert output.measurements['student']['rolled_back'] == 1
  helpers.assert_weights_close(output.result.student, before.student, rtol=0)


def _labels_alone(num_validated, **kwargs):
  """A stage that learns from some labels, in a round without reports."""
  ids = tff_kd.TransferSet(helpers.examples(24, 0)[0], validation_size=8)
  payload = knowledge.KnowledgePayload(
      np.zeros([24, helpers.CLASSES], 'f'), np.zeros([24], 'f')
  )
  known = np.zeros(24, bool)
  known[ids.round_ids(0).numpy()[:10]] = True
  known[ids.validation_ids().numpy()[:num_validated]] = True
  return *_run(
      tff_kd.Distillation(num_steps=20, distillation_weight=0.0),
      labelled=True, label_mask=known, payload=payload, **kwargs,
  ), known, ids.validation_ids().numpy()


def _cross_entropy(weights, rows):
  x = helpers.examples(24, 0)[0][rows]
  p = helpers.softmax(x @ weights.trainable[0] + weights.trainable[1])
  return -np.log(p[np.arange(len(x)), (x[:, 0] > 0).astype(int)]).mean()


def test_without_targets_labels_validate():
  output, before, known, rows = _labels_alone(5, rate=0.02)
  measured = output.measurements['student']
  assert measured['num_targets'] == 0 and measured['rolled_back'] == 0
  assert measured['best_step'] == measured['num_steps'] == 20
  rows = rows[known[rows]]
  for name, weights in (('before', before.student), ('after', output.result.student)):
    np.testing.assert_allclose(
        measured[f'validation_loss_{name}'], _cross_entropy(weights, rows), rtol=1e-4
    )
  assert measured['validation_loss_after'] < measured['validation_loss_before']


def test_without_targets_labels_roll_back_what_harms():
  output, before, _, _ = _labels_alone(3, rate=1e4)
  assert output.measurements['student']['rolled_back'] == 1
  helpers.assert_weights_close(output.result.student, before.student, rtol=0)


def test_without_targets_and_labels_there_is_no_validation():
  output, before, known, _ = _labels_alone(0)
  measured = output.measurements['student']
  assert measured['rolled_back'] == 0 and measured['best_step'] == 20
  known = np.flatnonzero(known)
  assert _cross_entropy(output.result.student, known) < _cross_entropy(
      before.student, known
  )


@pytest.mark.parametrize('labelled', [False, True])
def test_good_distillation_is_kept(labelled):
  # A small rate: the labels are noise, and only careful steps fit them better.
  output, before = _run(
      tff_kd.Distillation(target='teacher', num_steps=50, validate_every=5),
      labelled=labelled, rate=0.01,
  )
  measured = output.measurements['student']
  assert measured['rolled_back'] == 0
  assert measured['validation_loss_after'] < measured['validation_loss_before']
  helpers.assert_weights_close(output.result.teacher, before.teacher, rtol=0)


def test_early_stop_keeps_the_best_look():
  distillation = tff_kd.Distillation(
      target='teacher', num_steps=1000, batch_size=4, validate_every=5, patience=3
  )
  output, _ = _run(distillation, rate=0.2)
  measured = output.measurements['student']
  assert measured['num_steps'] < 1000
  assert measured['num_steps'] == measured['best_step'] + 3 * 5


def _payload(x, mask):
  z = np.random.default_rng(1).normal(size=(len(x), helpers.CLASSES)).astype('f')
  return z, knowledge.KnowledgePayload(z * mask[:, None], mask)


def test_missing_predictions_are_left_out():
  x, _ = helpers.examples(24, 0)
  mask = (np.arange(24) % 3 > 0).astype('f')
  z, payload = _payload(x, mask)
  output, before = _run(
      tff_kd.Distillation(target='ensemble', num_steps=1, batch_size=24),
      validation=0, payload=payload,
  )
  measured = output.measurements['student']
  assert measured['num_targets'] == mask.sum()
  ids = tff_kd.TransferSet(x).round_ids(0).numpy()
  logits = x @ before.student.trainable[0] + before.student.trainable[1]
  expected = np.mean(
      tff_kd.losses.kl_divergence(z, logits[ids]).numpy()[mask > 0]
  )
  np.testing.assert_allclose(measured['first_loss'], expected, rtol=1e-5)


def test_a_consensus_that_is_not_finite_teaches_nothing():
  x, _ = helpers.examples(24, 0)
  payload = knowledge.KnowledgePayload(
      np.full([24, helpers.CLASSES], np.nan, 'f'), np.full([24], np.nan, 'f')
  )
  output, before = _run(
      tff_kd.Distillation(target='ensemble'), validation=0, payload=payload
  )
  assert output.measurements['student']['num_steps'] == 0
  helpers.assert_weights_close(output.result.student, before.student, rtol=0)


def test_batch_order_uses_every_row_equally():
  order = distill._batch_order(
      7, 60, tf.constant(4), tf.constant([0, 1])
  ).numpy()
  counts = np.bincount(order, minlength=7)
  assert len(order) == 60 and counts.max() - counts.min() <= 1
  assert sorted(order[:7]) == list(range(7))
  other = distill._batch_order(
      7, 60, tf.constant(5), tf.constant([0, 1])
  ).numpy()
  assert (order != other).any()


def test_prediction_in_batches_equals_prediction_at_once():
  spec = helpers.model_spec(helpers.dense_fn((6,)), name='student')
  model = models.BoundModel(spec, spec.values(spec.initial_weights))
  for n in (3, 512, 513, 1024, 1300):
    x = helpers.examples(n, n)[0]
    transfer = tff_kd.TransferSet(x)
    np.testing.assert_allclose(
        knowledge.predict_logits(model, transfer, tf.range(n)),
        model.logits(x),
        atol=1e-5,
    )


def test_cosine_schedule():
  values = [float(tff_kd.cosine_schedule(p)) for p in (0.0, 0.5, 1.0)]
  np.testing.assert_allclose(values, [1.0, 0.5, 0.0], atol=1e-6)
