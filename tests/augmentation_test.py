"""Random changes of transfer inputs, and a student that goes on from round to round."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tff_kd.compat import tff

import tff_kd
from tests import helpers
from tff_kd.knowledge import KnowledgePayload
from tff_kd.models import cohorts
from tff_kd.server import distill

_ROWS, _RATE = 12, 0.5
_X, _ = helpers.examples(_ROWS, 0)


def _moved(weights, by):
  return tff.learning.models.ModelWeights(
      [w + by * (i + 1) for i, w in enumerate(weights.trainable)],
      list(weights.non_trainable),
  )


def _step(distillation, payload=(), *, has_released=False):
  """One step on all rows; returns the student's weights, and what it began with."""
  keras.utils.set_random_seed(3)
  student = helpers.model_spec(name='student')
  teacher = helpers.model_spec(helpers.dense_fn((8,)), name='teacher')
  process = distill.build_server_distillation(
      cohorts.as_students(student), teacher, tff_kd.TransferSet(_X),
      [distill.DistillationStage('student', helpers.sgd(_RATE), distillation)],
      has_released=has_released,
  )
  weights = distill.ServerModels(student.initial_weights, teacher.initial_weights)
  if has_released:
    weights = weights._replace(
        released=_moved(weights.student, 0.25), sent=_moved(weights.student, -0.125)
    )
  return helpers.distil_once(process, weights, payload).result.student, weights


def _expected(start, targets, inputs):
  """A step of gradient descent of KL(targets || student) with a linear student."""
  return helpers.linear_distil(start.trainable, inputs, helpers.softmax(targets), _RATE)


def _teacher_logits(weights, inputs):
  first, second, third, fourth = weights.teacher.trainable
  return np.maximum(inputs @ first + second, 0.0) @ third + fourth


def _settings(**kwargs):
  return tff_kd.Distillation(num_steps=1, batch_size=_ROWS, **kwargs)


def _plus_one(inputs, seed):
  del seed
  return inputs + 1.0


def _check(found, expected):
  helpers.assert_weights_close(found.trainable, expected, rtol=1e-4, atol=1e-6)


def test_a_target_that_is_a_model_sees_the_changed_inputs():
  found, before = _step(_settings(target='teacher', augment=_plus_one))
  targets = _teacher_logits(before, _X + 1.0)
  _check(found, _expected(before.student, targets, _X + 1.0))


def test_the_consensus_is_that_of_the_inputs_as_they_were():
  z = np.random.default_rng(1).normal(size=(_ROWS, helpers.CLASSES)).astype('f')
  payload = KnowledgePayload(z, np.ones([_ROWS], 'f'))
  found, before = _step(_settings(target='ensemble', augment=_plus_one), payload)
  order = tff_kd.TransferSet(_X).round_ids(0).numpy()
  _check(found, _expected(before.student, z, _X[order] + 1.0))


@pytest.mark.parametrize('start', ['average', 'released'])
def test_where_a_student_begins_that_clients_do_not_go_on_from(start):
  found, before = _step(_settings(target='teacher', start=start), has_released=True)
  begin = before.student
  if start == 'released':
    # Released, plus what the average moved since it was sent.
    begin = tff.learning.models.ModelWeights(
        [
            released + (average - sent)
            for released, average, sent in zip(
                before.released.trainable, begin.trainable, before.sent.trainable
            )
        ],
        [],
    )
  _check(found, _expected(begin, _teacher_logits(before, _X), _X))


@pytest.mark.parametrize(
    'augment', [lambda x, seed: x[:, :2], lambda x, seed: tf.cast(x, tf.float64),
                lambda x, seed: (x, x)],
)
def test_a_change_that_makes_other_inputs_is_refused(augment):
  with pytest.raises(ValueError, match='`augment` must return a batch of inputs'):
    _step(_settings(target='teacher', augment=augment))


def test_a_teacher_does_not_start_from_the_released_student():
  stage = distill.DistillationStage(
      'teacher', helpers.sgd(0.1), tff_kd.Distillation(start='released')
  )
  with pytest.raises(ValueError, match="Leave `start` out of the teacher's"):
    stage.check(tff_kd.TransferSet(_X), has_teacher=True, has_diversity=False)


def test_images_are_shifted_by_whole_pixels():
  images = np.random.default_rng(0).uniform(1, 2, size=(40, 5, 6, 2)).astype('f')
  shift = tff_kd.data.RandomShift(2)
  found = shift(tf.constant(images), tf.constant([3, 4])).numpy()
  padded = np.pad(images, [(0, 0), (2, 2), (2, 2), (0, 0)])
  seen = set()
  for image, number in zip(found, range(len(images))):
    matches = [
        (i, j)
        for i in range(5) for j in range(5)
        if np.array_equal(padded[number, i : i + 5, j : j + 6], image)
    ]
    assert len(matches) == 1
    seen.update(matches)
  assert len(seen) > 12
  again = shift(tf.constant(images), tf.constant([3, 4])).numpy()
  np.testing.assert_array_equal(again, found)
  assert (shift(tf.constant(images), tf.constant([3, 5])).numpy() != found).any()


def test_a_shift_needs_images_and_a_number_of_pixels():
  with pytest.raises(ValueError, match='`RandomShift` takes a batch of images'):
    tff_kd.data.RandomShift()(tf.zeros([2, 5]), tf.constant([0, 0]))
  with pytest.raises(ValueError, match='`max_pixels` must be a positive integer'):
    tff_kd.data.RandomShift(0)
