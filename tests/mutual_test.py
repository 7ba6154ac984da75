"""Mutual learning: whole rounds against NumPy, with clients that come and go."""

import keras
import numpy as np
import pytest

import tff_kd
from tests import helpers
from tff_kd.client.companions import mutual
from tff_kd import models

_RATE = 0.1
_CLOSE = dict(rtol=1e-4, atol=1e-5)
_logits = helpers.linear_logits


def _train(student, mentor, x, y, weights, t):
  """Local steps of both linear models, simultaneous; `weights` None is adaptive."""
  one_hot = np.eye(helpers.CLASSES)
  for i in range(0, len(x), 4):
    xb, yb = x[i : i + 4].astype(np.float64), y[i : i + 4]
    z, m = _logits(student, xb), _logits(mentor, xb)
    p, q = helpers.softmax(z), helpers.softmax(m)
    rows = np.arange(len(yb))
    ce = [-np.mean(np.log(its[rows, yb])) for its in (p, q)]
    # Of T^2 KL(target || own): T (softmax(own / T) - softmax(target / T)).
    pt, qt = helpers.softmax(z / t), helpers.softmax(m / t)
    if weights is None:
      (a, b), (c, d) = [(1.0, 1.0 / sum(ce))] * 2
    else:
      (a, b), (c, d) = [(1.0 - w, w) for w in weights]
    dz = (a * (p - one_hot[yb]) + b * t * (pt - qt)) / len(yb)
    dm = (c * (q - one_hot[yb]) + d * t * (qt - pt)) / len(yb)
    student = helpers.linear_step(student, xb, dz, _RATE)
    mentor = helpers.linear_step(mentor, xb, dm, _RATE)
  return student, mentor


_FML = dict(student_weight=0.3, mentor_weight=0.6, temperature=2.0)


@helpers.shared
def _build(name, **kwargs):
  keras.utils.set_random_seed(2)
  return helpers.build(
      name, client_optimizer=helpers.sgd(_RATE), mentor_fn=helpers.dense_fn(), **kwargs
  )


@pytest.mark.parametrize(
    'name, kwargs, weights',
    [
        ('fml', _FML, (0.3, 0.6)),
        ('fed_kd', dict(start_energy=1.0, end_energy=1.0), None),
    ],
)
def test_rounds_equal_numpy(name, kwargs, weights):
  process = _build(name, **kwargs)
  t = kwargs.get('temperature', 1.0)
  clients = {k: helpers.examples(n, k) for k, n in enumerate([8, 4, 12])}
  state = process.initialize()
  initial = process.initialize_client()
  student = [np.float64(w) for w in state.global_model_weights.trainable]
  mentors = {k: [np.float64(w) for w in initial.weights.trainable] for k in clients}
  states = dict.fromkeys(clients, initial)
  # Clients miss rounds, and go on with the mentor that they had.
  for present in ([0, 1], [2, 0], [1, 2]):
    datasets = {k: helpers.dataset(*clients[k]) for k in present}
    state = helpers.round_of(process, state, datasets, states).state
    total = sum(len(clients[k][1]) for k in present)
    trained = []
    for k in present:
      own, mentors[k] = _train(student, mentors[k], *clients[k], weights, t)
      trained.append(own)
      helpers.assert_weights_close(states[k].weights.trainable, mentors[k], **_CLOSE)
    student = [
        sum(len(clients[k][1]) / total * w[i] for k, w in zip(present, trained))
        for i in range(2)
    ]
    helpers.assert_weights_close(
        state.global_model_weights.trainable, student, **_CLOSE
    )


def test_with_a_rate_of_0_set_from_without_nothing_moves():
  process = _build('fml', **_FML)
  state, initial = process.initialize(), process.initialize_client()
  hparams = process.get_hparams(state)
  assert hparams['client_work']['learning_rate'] == np.float32(_RATE)
  assert hparams['finalizer']['learning_rate'] == 1.0
  hparams['client_work']['learning_rate'] = np.float32(0.0)
  state = process.set_hparams(state, hparams)
  after = process.next(state, [helpers.dataset(*helpers.examples(4, 0))], [initial])
  helpers.assert_weights_close(
      [after.state.global_model_weights, after.client_states[0].weights],
      [state.global_model_weights, initial.weights], rtol=0,
  )


# Mentors without are above, batch norm at clients in `models_test` and `runtimes_test`.
@pytest.mark.slow
def test_mentors_with_batch_norm_beside_fed_df():
  keras.utils.set_random_seed(3)
  common = helpers.common()
  del common['client_optimizer'], common['student_fn']

  def mentor_fn():
    return keras.Sequential([
        keras.layers.InputLayer((helpers.DIM,)),
        keras.layers.Dense(4, kernel_regularizer='l2'),
        keras.layers.BatchNormalization(momentum=0.5),
        keras.layers.Dense(helpers.CLASSES),
    ])

  student, mentor = (
      models.build_model_spec(fn, name=name, **common)
      for name, fn in (('student', helpers.dense_fn()), ('mentor', mentor_fn))
  )
  process = helpers.build(
      'fed_df', transfer_set=tff_kd.TransferSet(helpers.examples(8, 9)[0]),
      distillation=tff_kd.Distillation(num_steps=2),
      companion=mutual.MutualLearning(student, mentor),
  )
  initial = process.initialize_client()
  data = [helpers.dataset(*helpers.examples(8, k)) for k in range(2)]
  output = process.next(process.initialize(), data, [initial] * 2)
  assert output.metrics['server_distillation']['student']['num_steps'] == 2
  first, second = output.client_states
  # The statistics are the client's own.
  assert not np.allclose(first.weights.non_trainable[0], 0.0)
  assert not np.allclose(
      first.weights.non_trainable[0], second.weights.non_trainable[0]
  )
  weights = process.get_model_weights(output.state)
  again = process.set_model_weights(output.state, weights)
  helpers.assert_weights_close(again.global_model_weights, weights, rtol=0)


@pytest.mark.parametrize(
    'kwargs, match',
    [
        (dict(student_weight=1.5), 'must be between 0 and 1'),
        (dict(student_weight=None), 'or both None'),
        (dict(temperature=0.0), '`temperature` must be'),
        (dict(mentor_fn=helpers.dense_fn(classes=4)), 'student and the mentor'),
    ],
)
def test_refused_before_anything_is_built(kwargs, match):
  with pytest.raises(ValueError, match=match):
    helpers.build('fml', **{'mentor_fn': helpers.dense_fn(), **kwargs})
