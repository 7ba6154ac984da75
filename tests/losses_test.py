"""Losses against NumPy and against the defects known from elsewhere."""

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest
import scipy.special
import tensorflow as tf

from tff_kd import losses

_SHAPES = [(6, 4), (2, 5, 4), (6, 1)]


def _logits(shape, seed):
  return np.random.default_rng(seed).normal(scale=3, size=shape).astype('f')


def _probabilities(z, t):
  if z.shape[-1] == 1:
    z = np.concatenate([np.zeros_like(z), z], -1)
  return scipy.special.softmax(z.astype(np.float64) / t, axis=-1)


def _np_kl(target, z, t):
  p, q = _probabilities(target, t), _probabilities(z, t)
  return t * t * np.sum(p * (np.log(p) - np.log(q)), axis=-1)


@pytest.mark.parametrize('shape', _SHAPES)
@pytest.mark.parametrize('t', [0.5, 1.0, 3.0])
def test_kl_matches_numpy(shape, t):
  target, z = _logits(shape, 0), _logits(shape, 1)
  actual = losses.kl_divergence(target, z, t)
  # Defect 1: one value an example, summed over the classes, not averaged.
  assert actual.shape == shape[:-1]
  np.testing.assert_allclose(actual, _np_kl(target, z, t), rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), t=st.floats(0.2, 20.0))
def test_kl_gradient_has_the_temperatures_factor(seed, t):
  # Defect 2: d/dz [T^2 KL_T] = T (softmax(z / T) - softmax(target / T)).
  target, z = _logits((3, 4), seed), tf.constant(_logits((3, 4), seed + 1))
  with tf.GradientTape() as tape:
    tape.watch(z)
    loss = tf.reduce_sum(losses.kl_divergence(target, z, t))
  expected = t * (_probabilities(z.numpy(), t) - _probabilities(target, t))
  np.testing.assert_allclose(tape.gradient(loss, z), expected, atol=2e-4 * t)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), t=st.floats(50.0, 1e4))
def test_kl_keeps_its_precision_at_high_temperatures(seed, t):
  target, z = _logits((3, 4), seed), _logits((3, 4), seed + 1)
  p, q = (
      scipy.special.log_softmax(a.astype(np.longdouble) / t, axis=-1)
      for a in (target, z)
  )
  actual = losses.kl_divergence(target, z, t)
  assert actual.dtype == tf.float32 and np.all(actual >= 0.0)
  np.testing.assert_allclose(
      actual, t * t * np.sum(np.exp(p) * (p - q), axis=-1), rtol=1e-4, atol=1e-5
  )
  np.testing.assert_array_equal(losses.kl_divergence(target, target, t), [0.0] * 3)


def test_kl_at_high_temperature_is_the_squared_difference_of_centred_logits():
  # Hinton et al. (2015), equation 4, with this loss's 1 / 2 and 1 / classes.
  target, z = _logits((5, 4), 0), _logits((5, 4), 1)
  difference = (z - z.mean(-1, keepdims=True)) - (
      target - target.mean(-1, keepdims=True)
  )
  np.testing.assert_allclose(
      losses.kl_divergence(target, z, 300.0),
      np.sum(difference**2, -1) / (2 * 4),
      rtol=0.05,
  )


def test_soft_targets_are_probabilities_not_logits():
  # Defect 3: a cross-entropy against logits would differ.
  target, z = _logits((6, 4), 0), _logits((6, 4), 1)
  p, q = _probabilities(target, 1.0), _probabilities(z, 1.0)
  np.testing.assert_allclose(
      losses.soft_target_cross_entropy(p.astype('f'), z),
      -np.sum(p * np.log(q), -1),
      rtol=1e-4,
  )


def test_soft_target_cross_entropy_of_a_single_logit():
  p = np.array([[0.2], [0.9]], 'f')
  z = np.array([[1.0], [-2.0]], 'f')
  q = scipy.special.expit(z)
  np.testing.assert_allclose(
      losses.soft_target_cross_entropy(p, z),
      (-(p * np.log(q) + (1 - p) * np.log(1 - q)))[:, 0],
      rtol=1e-5,
  )


@pytest.mark.parametrize(
    'loss',
    [
        losses.kl_divergence,
        losses.mean_absolute_error,
        losses.mean_squared_error,
        losses.hard_label_cross_entropy,
        lambda t, z: losses.soft_target_cross_entropy(tf.nn.softmax(t), z),
        lambda t, z: losses.not_true_kl_divergence(t, z, tf.constant([0, 1, 2])),
    ],
)
def test_targets_receive_no_gradient(loss):
  # Defect 4.
  target, z = tf.Variable(_logits((3, 4), 0)), tf.Variable(_logits((3, 4), 1))
  with tf.GradientTape() as tape:
    value = tf.reduce_sum(loss(target, z))
  to_target, to_logits = tape.gradient(value, [target, z])
  assert to_target is None
  assert np.abs(to_logits).max() > 0


@pytest.mark.parametrize('shape', [(6, 4), (2, 5, 4)])
@pytest.mark.parametrize('labels_have_last_axis', [False, True])
def test_not_true_kl_matches_numpy(shape, labels_have_last_axis):
  target, z = _logits(shape, 0), _logits(shape, 1)
  labels = np.random.default_rng(2).integers(0, 4, shape[:-1])
  expected = np.zeros(shape[:-1])
  for index in np.ndindex(*shape[:-1]):
    keep = np.arange(4) != labels[index]
    expected[index] = _np_kl(target[index][keep], z[index][keep], 2.0)
  if labels_have_last_axis:
    labels = labels[..., np.newaxis]
  actual = losses.not_true_kl_divergence(target, z, tf.constant(labels), 2.0)
  np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), shift=st.floats(-50, 50), t=st.floats(0.2, 5.0))
def test_not_true_kl_ignores_the_true_class(seed, shift, t):
  target, z = _logits((3, 4), seed), _logits((3, 4), seed + 1)
  labels = tf.constant([0, 2, 3])
  moved = z + shift * np.eye(4, dtype='f')[labels.numpy()]
  np.testing.assert_allclose(
      losses.not_true_kl_divergence(target, moved, labels, t),
      losses.not_true_kl_divergence(target, z, labels, t),
      rtol=1e-5, atol=1e-5,
  )


def test_not_true_kl_refuses_two_classes():
  with pytest.raises(ValueError, match='at least 3 classes'):
    losses.not_true_kl_divergence(
        _logits((3, 2), 0), tf.constant(_logits((3, 2), 1)), tf.constant([0, 1, 1])
    )


@pytest.mark.parametrize('shape', _SHAPES)
def test_logit_errors_match_numpy(shape):
  target, z = _logits(shape, 0), _logits(shape, 1)
  np.testing.assert_allclose(
      losses.mean_absolute_error(target, z), np.abs(z - target).mean(-1),
      rtol=1e-5,
  )
  np.testing.assert_allclose(
      losses.mean_squared_error(target, z), ((z - target) ** 2).mean(-1),
      rtol=1e-5,
  )


def test_hard_labels_are_the_targets_most_likely_class():
  target, z = _logits((6, 4), 0), _logits((6, 4), 1)
  p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
  np.testing.assert_allclose(
      losses.hard_label_cross_entropy(target, z),
      -np.log(p[np.arange(6), target.argmax(-1)]), rtol=1e-5,
  )
  single = losses.hard_label_cross_entropy(target[:, :1], z[:, :1])
  q = 1 / (1 + np.exp(-z[:, 0]))
  np.testing.assert_allclose(
      single, -np.log(np.where(target[:, 0] > 0, q, 1 - q)), rtol=1e-5
  )


def test_models_that_end_in_softmax_or_sigmoid():
  z = _logits((6, 4), 0)
  p = tf.nn.softmax(z)
  np.testing.assert_allclose(
      tf.nn.softmax(losses.logits_from_probabilities(p)), p, atol=1e-6
  )
  one = tf.sigmoid(_logits((6, 1), 0))
  np.testing.assert_allclose(
      tf.sigmoid(losses.logits_from_probabilities(one)), one, atol=1e-6
  )
  saturated = losses.logits_from_probabilities(tf.constant([[0.0, 1.0]]))
  assert np.isfinite(saturated).all()


@pytest.mark.parametrize('t', [0.0, -1.0, float('nan'), float('inf')])
def test_temperatures_that_make_no_sense_are_refused(t):
  with pytest.raises(ValueError, match='temperature.*above 0'):
    losses.kl_divergence(tf.zeros([1, 2]), tf.zeros([1, 2]), t)


def test_weighted_mean():
  values = tf.constant([[1.0, 2.0], [3.0, np.nan]])
  assert float(losses.weighted_mean(values[:1])) == 1.5
  # Weights of the leading axis cover the rest.
  assert float(losses.weighted_mean(values, tf.constant([1.0, 0.0]))) == 1.5
  mask = tf.constant([[1, 1], [1, 0]])
  assert float(losses.weighted_mean(values, mask)) == 2.0
  assert float(losses.weighted_mean(values, tf.zeros([2, 2]))) == 0.0
  weights = tf.constant([[1.0, 3.0], [0.5, 0.0]])
  np.testing.assert_allclose(
      losses.weighted_mean(values, weights), (1 + 6 + 1.5) / 4.5, rtol=1e-6
  )
