"""MOON: rounds against a reference, with clients that come and go."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import helpers
import tff_kd
from tff_kd.client.companions import contrast

_RATE, _MU, _TAU, _FEATURES = 0.2, 2.0, 0.4, 4
_CLIENTS = {k: helpers.examples(n, k) for k, n in enumerate([8, 4, 12])}
_student_fn = helpers.features_fn(_FEATURES)


@helpers.shared
def _build(**kwargs):
  keras.utils.set_random_seed(4)
  defaults = dict(
      student_fn=_student_fn, client_optimizer=helpers.sgd(_RATE),
      contrast_weight=_MU, contrast_temperature=_TAU,
  )
  return helpers.build('moon', **{**defaults, **kwargs})


_features = helpers.features_of


def _normalized(z):
  return z / np.linalg.norm(z, axis=-1, keepdims=True)


def _by_features(w, x, received, previous):
  """The gradient of mu l by the features, written out."""
  z = _features(w, x)
  # d l / d s_p = sigmoid((s_p - s_r) / tau) / tau, and the reverse for s_r.
  direction = _normalized(_features(previous, x)) - _normalized(_features(received, x))
  unit = _normalized(z)
  difference = (unit * direction).sum(-1, keepdims=True)
  factor = 1 / (1 + np.exp(-difference / _TAU)) / _TAU
  # Of a cosine by its first argument: (v - (u.v) u) / |z|.
  by_features = direction - difference * unit
  by_features /= np.linalg.norm(z, axis=-1, keepdims=True)
  return _MU * factor * by_features / len(x)


def _trained(received, previous, x, y):
  w = received
  for i in range(0, len(x), 4):
    xb = np.float64(x[i : i + 4])
    further = _by_features(w, xb, received, previous)
    w = helpers.features_step(w, xb, y[i : i + 4], _RATE, further)
  return w


def test_rounds_equal_numpy():
  process = _build()
  assert process.kept_models.first is process.student_spec
  state, initial = process.initialize(), process.initialize_client()
  student = [np.float64(w) for w in state.global_model_weights.trainable]
  own = {k: student for k in _CLIENTS}
  states = dict.fromkeys(_CLIENTS, initial)
  # Client 2 comes late, and contrasts with the initial weights.
  for present in ([0, 1], [0, 2], [1, 2]):
    datasets = {k: helpers.dataset(*_CLIENTS[k]) for k in present}
    state = helpers.round_of(process, state, datasets, states).state
    for k in present:
      own[k] = _trained(student, own[k], *_CLIENTS[k])
      helpers.assert_weights_close(
          states[k].weights.trainable, own[k], rtol=1e-3, atol=1e-5
      )
    sizes = [len(_CLIENTS[k][1]) for k in present]
    student = [
        np.average(its, axis=0, weights=sizes) for its in zip(*(own[k] for k in present))
    ]
    helpers.assert_weights_close(
        state.global_model_weights.trainable, student, rtol=1e-3, atol=1e-5
    )


def test_the_contrast():
  z = tf.constant([[3.0, 0.0], [0.0, 2.0]])
  near, far = tf.constant([[1.0, 0.0]] * 2), tf.constant([[0.0, 5.0]] * 2)
  found = contrast.contrastive_loss(z, near, far, 0.5)
  np.testing.assert_allclose(found, np.log1p(np.exp([-2.0, 2.0])), rtol=1e-5)
  # Where both are the same there is nothing to learn; features of 0 are no error.
  with tf.GradientTape() as tape:
    tape.watch(z)
    same = tf.reduce_sum(contrast.contrastive_loss(z, near, near, 0.5))
  np.testing.assert_allclose(tape.gradient(same, z), 0.0, atol=1e-7)
  assert np.isfinite(contrast.contrastive_loss(0.0 * z, near, far, 0.5)).all()


def test_nothing_but_weights_travels_and_it_goes_with_secure_sums_and_privacy():
  plain = tff_kd.communication.round_bytes(
      helpers.build('fed_avg', student_fn=_student_fn)
  )
  found = tff_kd.communication.round_bytes(_build())
  assert found.up == plain.up
  # The number of the round goes down, too.
  assert found.down == plain.down + 4
  uniform = tff_kd.tff.learning.ClientWeighting.UNIFORM
  process = _build(
      client_weighting=uniform,
      secure_aggregation=tff_kd.privacy.SecureAggregation(),
      privacy=tff_kd.privacy.DifferentialPrivacy(
          noise_multiplier=1.0, clients_per_round=2, model_clip=1.0
      ),
  )
  tff_kd.tff.test.assert_not_contains_unsecure_aggregation(process.next)


@pytest.mark.parametrize(
    'kwargs, match',
    [
        (dict(contrast_weight=0.0), '`contrast_weight` must be above 0'),
        (dict(contrast_temperature=0.0), '`contrast_temperature` must be above 0'),
        (dict(split_layer='nowhere'), "must be one of the student's layers"),
        (dict(student_fn=helpers.dense_fn()), 'must have layers before the split'),
    ],
)
def test_what_does_not_fit_is_refused(kwargs, match):
  with pytest.raises(ValueError, match=match):
    helpers.build('moon', **{'student_fn': _student_fn, **kwargs})


def test_several_predictions_an_example_are_refused():
  with pytest.raises(ValueError, match='several predictions an example'):
    helpers.build(
        'moon',
        student_fn=lambda: keras.Sequential([
            keras.Input((3, helpers.DIM)), keras.layers.Dense(4),
            keras.layers.Dense(helpers.CLASSES),
        ]),
        input_spec=(
            tf.TensorSpec([None, 3, helpers.DIM]), tf.TensorSpec([None, 3], tf.int32)
        ),
        metrics_fn=None,
    )
