"""The terms of the clients' loss, against NumPy."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import helpers
import tff_kd
from tff_kd.client import local_terms

_RATE, _STEPS = 0.1, 3
_X, _Y = helpers.examples(6, 4)


def _kl_gradient(target, z, t):
  """Of mean T^2 KL(softmax(target / T) || softmax(z / T)) by z."""
  return t * (helpers.softmax(z / t) - helpers.softmax(target / t)) / len(z)


def _not_true_kl_gradient(target, z, t):
  gradient = np.zeros_like(z)
  for i, label in enumerate(_Y):
    others = [c for c in range(helpers.CLASSES) if c != label]
    gradient[i, others] = _kl_gradient(target[i : i + 1, others], z[i : i + 1, others], t)
  return gradient / len(z)


def _ce_gradient(z):
  return (helpers.softmax(z) - np.eye(helpers.CLASSES)[_Y]) / len(z)


def _trained(received, logits_gradient, proximal=0.0):
  """A linear model after some steps: (kernel, bias), in NumPy."""
  w = [np.array(v, np.float64) for v in received]
  for _ in range(_STEPS):
    z = _X @ w[0] + w[1]
    dz = logits_gradient(z)
    gradients = [_X.T @ dz, dz.sum(axis=0)]
    w = [
        v - _RATE * (g + proximal * (v - r))
        for v, g, r in zip(w, gradients, received)
    ]
  return w


@helpers.shared
def _process(name, **kwargs):
  return helpers.build(name, client_optimizer=helpers.sgd(_RATE), **kwargs)


_GKD = dict(local_weight=0.6, local_temperature=2.0)


def _round(process, state):
  data = tf.data.Dataset.from_tensor_slices((_X, _Y)).batch(6).repeat(_STEPS)
  return process.next(state, [data]).state


def _weights(state):
  return [np.array(w) for w in state.global_model_weights.trainable]


def test_fed_prox_in_numpy():
  process = _process('fed_prox', proximal_weight=0.7)
  state = process.initialize()
  expected = _trained(_weights(state), _ce_gradient, proximal=0.7)
  helpers.assert_weights_close(
      _weights(_round(process, state)), expected, rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize('beta, tau', [helpers.slow(1.0, 1.0), (0.4, 3.0)])
def test_fed_ntd_in_numpy(beta, tau):
  process = _process('fed_ntd', not_true_weight=beta, not_true_temperature=tau)
  state = process.initialize()
  received = _weights(state)
  target = _X @ received[0] + received[1]
  expected = _trained(
      received,
      lambda z: _ce_gradient(z) + beta * _not_true_kl_gradient(target, z, tau),
  )
  helpers.assert_weights_close(
      _weights(_round(process, state)), expected, rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize('size', [*helpers.slow_each(1, 2), 3])
def test_fed_gkd_in_numpy(size):
  gamma, t = _GKD.values()
  process = _process('fed_gkd', **_GKD, history_size=size)
  state = process.initialize()
  sent = [_weights(state)]
  for _ in range(4):
    mean = [np.mean(its, axis=0) for its in zip(*sent[-size:])]
    target = _X @ mean[0] + mean[1]
    expected = _trained(
        sent[-1],
        lambda z, target=target: (
            (1 - gamma) * _ce_gradient(z) + gamma * _kl_gradient(target, z, t)
        ),
    )
    state = _round(process, state)
    helpers.assert_weights_close(_weights(state), expected, rtol=1e-4, atol=1e-6)
    sent.append(_weights(state))


class _NearThePast(local_terms.LocalTerm):
  """A term of a user, who declares nothing but what it compares with."""

  target = 'student_history'

  def __call__(self, loss, step):
    squares = tf.reduce_sum(tf.square(step.logits - step.target_logits), axis=-1)
    return loss + 0.5 * tf.reduce_mean(squares)


class _NearTheLastTwo(_NearThePast):
  history_size = 2


@pytest.mark.parametrize(
    'term, size', [helpers.slow(_NearThePast(), 5), (_NearTheLastTwo(), 2)]
)
def test_a_term_of_ones_own_learns_from_past_students(term, size):
  process = _process('fed_avg', local_terms=[term])
  state = process.initialize()
  assert state.student_history.sent.trainable[0].shape[0] == size
  sent = [_weights(state)]
  for _ in range(3):
    mean = [np.mean(its, axis=0) for its in zip(*sent[-size:])]
    target = _X @ mean[0] + mean[1]
    expected = _trained(
        sent[-1],
        lambda z, target=target: _ce_gradient(z) + (z - target) / len(z),
    )
    state = _round(process, state)
    helpers.assert_weights_close(_weights(state), expected, rtol=1e-4, atol=1e-6)
    sent.append(_weights(state))


@pytest.mark.parametrize('size', [0, 2.0, None])
def test_a_history_without_a_size_is_refused(size):
  term = _NearThePast()
  term.history_size = size
  with pytest.raises(ValueError, match='`history_size` must be a positive integer'):
    _process('fed_avg', local_terms=[term])


def test_a_history_of_one_costs_nothing_and_a_longer_one_its_mean():
  down = [
      tff_kd.communication.round_bytes(
          _process('fed_gkd', **_GKD, history_size=n)
      ).down
      for n in (1, 2, 3)
  ]
  plain = tff_kd.communication.round_bytes(_process('fed_avg'))
  assert down[0] == plain.down
  # And the round's number is not needed by clients.
  assert down[1] == down[2] == 2 * plain.down


def test_terms_combine_in_order():
  mu, gamma = 0.5, 0.3
  process = _process(
      'fed_prox',
      proximal_weight=mu,
      local_terms=[tff_kd.LocalDistillation(weight=gamma)],
  )
  state = process.initialize()
  received = _weights(state)
  target = _X @ received[0] + received[1]
  expected = _trained(
      received,
      lambda z: (1 - gamma) * _ce_gradient(z) + gamma * _kl_gradient(target, z, 1.0),
      # The proximal term came first: the distillation scales it, too.
      proximal=(1 - gamma) * mu,
  )
  helpers.assert_weights_close(
      _weights(_round(process, state)), expected, rtol=1e-5, atol=1e-6
  )


# With `fed_df`, in `start_test`.
@pytest.mark.slow
def test_terms_go_with_the_fusion():
  process = _process(
      'fed_distillation',
      teacher_fn=helpers.dense_fn((4,)),
      transfer_set=tff_kd.TransferSet(_X),
      local_terms=[
          tff_kd.NotTrueDistillation(),
          tff_kd.ProximalTerm(),
          tff_kd.LocalDistillation(target='student_history', history_size=2),
          tff_kd.LocalDistillation(target='teacher'),
      ],
  )
  state = process.initialize()
  for _ in range(2):
    state = _round(process, state)
  assert all(np.isfinite(w).all() for w in _weights(state))


@pytest.mark.parametrize(
    'build, error, match',
    [
        (lambda: tff_kd.LocalDistillation(target='ensemble'), ValueError, 'ensemble'),
        (lambda: tff_kd.LocalDistillation(weight=1.5), ValueError, '1.5'),
        (lambda: tff_kd.LocalDistillation(weight=0.0), ValueError, 'weight'),
        (lambda: tff_kd.LocalDistillation(temperature=0), ValueError, 'temperature'),
        (lambda: tff_kd.LocalDistillation(history_size=0), ValueError, 'history_size'),
        (lambda: tff_kd.NotTrueDistillation(weight=0), ValueError, 'weight'),
        (lambda: tff_kd.NotTrueDistillation(temperature=-1), ValueError, 'temperature'),
        (lambda: tff_kd.ProximalTerm(weight=float('nan')), ValueError, 'nan'),
        (
            lambda: _process('fed_avg', local_terms=[lambda loss: loss]),
            TypeError, 'LocalTerm',
        ),
        (
            lambda: _process(
                'fed_avg', local_terms=[tff_kd.LocalDistillation(target='teacher')]
            ),
            ValueError, 'teacher_fn',
        ),
        (
            lambda: _process(
                'fed_gkd',
                local_terms=[
                    tff_kd.LocalDistillation(target='student_history', history_size=2)
                ],
            ),
            ValueError, r'\[2, 5\]',
        ),
    ],
)
def test_bad_terms_are_refused(build, error, match):
  with pytest.raises(error, match=match):
    build()


def test_the_not_true_term_needs_class_indices_of_three_classes():
  two = helpers.dense_fn(classes=2)
  with pytest.raises(ValueError, match='at least 3 classes'):
    helpers.build('fed_ntd', student_fn=two)
  x, y = helpers.examples(4, 0)
  one_hot = tf.data.Dataset.from_tensor_slices(
      (x, np.eye(helpers.CLASSES, dtype=np.float32)[y])
  ).batch(2)
  with pytest.raises(ValueError, match='class indices'):
    helpers.build(
        'fed_ntd', input_spec=one_hot.element_spec,
        loss_fn=lambda: keras.losses.CategoricalCrossentropy(from_logits=True),
        metrics_fn=None,
    )
