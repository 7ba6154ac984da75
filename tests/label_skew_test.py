"""Terms of the clients' loss for label skew, and the counts that they look at."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import helpers
from tests import label_kinds
import tff_kd
from tff_kd import models
from tff_kd.client import class_counts
from tff_kd.client import local_terms

_RATE, _CLASSES = 0.3, 4
_X = helpers.examples(8, 4)[0]
_Y = np.int32([0, 0, 0, 1, 0, 1, 0, 0])  # Of four classes two are vacant.
_COUNTS = np.float64([6, 2, 0, 0])


@helpers.shared
def _process(*terms, **kwargs):
  defaults = dict(
      student_fn=helpers.dense_fn(classes=_CLASSES), client_optimizer=helpers.sgd(_RATE),
      local_terms=terms,
  )
  return helpers.build('fed_avg', **{**defaults, **kwargs})


def _trained(received, gradient, num_steps=1):
  """A linear model after some steps on all examples, in NumPy."""
  w = [np.float64(v) for v in received]
  for _ in range(num_steps):
    dz = gradient(_X @ w[0] + w[1]) / len(_Y)
    w = [w[0] - _RATE * _X.T @ dz, w[1] - _RATE * dz.sum(axis=0)]
  return w


def _one_round(process, num_steps=1):
  state = process.initialize()
  # Batches of any size would do: the counts are of the whole round.
  data = helpers.dataset(_X, _Y, len(_Y)).repeat(num_steps)
  received = [np.array(w) for w in state.global_model_weights.trainable]
  after = process.next(state, [data]).state.global_model_weights.trainable
  return received, after


def _prior_gradient(tau, smoothing, z):
  prior = (1 - smoothing) * _COUNTS / _COUNTS.sum() + smoothing / _CLASSES
  with np.errstate(divide='ignore'):
    log_prior = np.log(prior)
  return helpers.softmax(z + tau * log_prior) - np.eye(_CLASSES)[_Y]


@pytest.mark.parametrize('tau, smoothing', [helpers.slow(1.0, 0.0), (0.5, 0.3)])
def test_prior_correction_is_cross_entropy_on_shifted_logits(tau, smoothing):
  term = tff_kd.PriorCorrection(tau=tau, smoothing=smoothing)
  received, found = _one_round(_process(term), num_steps=2)
  expected = _trained(received, lambda z: _prior_gradient(tau, smoothing, z), 2)
  helpers.assert_weights_close(found, expected, rtol=1e-4, atol=1e-5)
  if not smoothing:
    # What speaks for a class that the client does not have is left as it was.
    np.testing.assert_allclose(found[1][2:], received[1][2:], rtol=0, atol=1e-7)


def test_restricted_softmax_scales_the_logits_of_absent_classes():
  received, found = _one_round(_process(tff_kd.RestrictedSoftmax(scale=0.7)))
  factors = np.where(_COUNTS > 0, 1.0, 0.7)
  expected = _trained(
      received,
      lambda z: factors * (helpers.softmax(factors * z) - np.eye(_CLASSES)[_Y]),
  )
  helpers.assert_weights_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('t', [helpers.slow(1.0), 2.0])
def test_vacant_classes_are_distilled_beside_a_corrected_loss(t):
  weight = 0.6
  terms = (
      tff_kd.PriorCorrection(smoothing=0.0),
      tff_kd.VacantClassDistillation(weight=weight, temperature=t),
  )
  received, found = _one_round(_process(*terms), num_steps=2)
  target = (_X @ received[0] + received[1])[:, 2:]
  # The first step finds nothing to distil: the model is the received one.

  def gradient(z):
    dz = _prior_gradient(1.0, 0.0, z)
    p, q = helpers.softmax(target / t), helpers.softmax(z[:, 2:] / t)
    dz[:, 2:] += weight * t * (q - p)
    return dz

  expected = _trained(received, gradient, 2)
  helpers.assert_weights_close(found, expected, rtol=1e-4, atol=1e-5)


def _step(logits, counts, target=None):
  return local_terms.LocalStep(
      inputs=None, logits=tf.constant(logits), labels=None, labelled=None,
      target_logits=target, supervised_loss=None, step_num=tf.constant(0),
      weights=[], received=[], class_counts=tf.constant(counts, tf.float32),
  )


def test_vacant_classes_of_which_there_are_fewer_than_two_cost_nothing():
  rng = np.random.default_rng(0)
  z, target = (tf.constant(rng.normal(size=(3, 4)), tf.float32) for _ in range(2))
  term = tff_kd.VacantClassDistillation(weight=1.0)
  for counts in ([1, 2, 3, 4], [1, 2, 3, 0]):
    with tf.GradientTape() as tape:
      tape.watch(z)
      value = term(tf.constant(0.0), _step(z, counts, target))
    np.testing.assert_allclose(value, 0.0, atol=1e-6)
    np.testing.assert_allclose(tape.gradient(value, z), 0.0, atol=1e-6)


def test_a_single_logit_is_two_classes():
  z = np.float32([[0.5], [-2.0]])
  term = tff_kd.PriorCorrection(tau=2.0, smoothing=0.0)
  shifted = term.adjusted_logits(z, _step(z, [3, 1]))
  np.testing.assert_allclose(shifted, z + 2 * np.log(1 / 3), rtol=1e-5)
  # From -z/2 and z/2 the softmax of -.6 z/2 and z/2.
  scaled = tff_kd.RestrictedSoftmax(scale=0.6).adjusted_logits(z, _step(z, [0, 1]))
  np.testing.assert_allclose(scaled, 0.8 * z, rtol=1e-6)


def test_a_client_without_any_label_loses_nothing():
  z = np.float32([[0.5, 1.0]])
  step = _step(z, [0, 0])
  expected = helpers.softmax(z)
  for smoothing in (0.0, 0.1):
    term = tff_kd.PriorCorrection(smoothing=smoothing)
    adjusted = term.adjusted_logits(tf.constant(z), step)
    np.testing.assert_allclose(helpers.softmax(adjusted), expected, rtol=1e-3)


# How a single logit or several, in indices or as distributions, are counted.
@pytest.mark.parametrize('kind', label_kinds.LABELS)
@pytest.mark.parametrize('per_position', [False, True])
def test_counts_of_labels_of_every_kind(kind, per_position):
  labels = label_kinds.LABELS[kind]
  x, y = labels.examples(12, 3, per_position)

  def model_fn():
    return keras.Sequential([
        keras.Input(x.shape[1:]),
        keras.layers.Dense(labels.units, activation=labels.activation),
    ])

  spec = models.build_model_spec(
      model_fn, input_spec=helpers.dataset(x, y).element_spec, loss_fn=labels.loss_fn,
      name='student',
  )
  if spec.is_regression or spec.is_multi_label:
    with pytest.raises(ValueError, match='Prior needs one class|is about classes'):
      class_counts.check(spec, 'Prior')
    return
  class_counts.check(spec, 'Prior')
  num = class_counts.num_classes(spec)
  rows = y if y.ndim > x.ndim - 1 and y.shape[-1] == num else None
  if rows is None:
    rows = np.eye(num)[np.maximum(np.int64(y), 0).reshape(x.shape[:-1])]
  np.testing.assert_allclose(
      class_counts.count(spec, tf.constant(y)), rows.reshape(-1, num).sum(0), rtol=1e-6
  )
  known = np.float32(np.arange(12) % 3 > 0)
  weight = np.float32(np.arange(12) % 2)
  weight = spec.sample_weight((x, y, tf.constant(weight)))
  found = class_counts.count(spec, tf.constant(y), tf.constant(known), weight)
  kept = (np.arange(12) % 3 > 0) & (np.arange(12) % 2 > 0)
  np.testing.assert_allclose(found, rows[kept].reshape(-1, num).sum(0), rtol=1e-6)


def test_padding_is_not_counted():
  spec = models.build_model_spec(
      lambda: keras.Sequential([keras.Input((None, 3)), keras.layers.Dense(4)]),
      input_spec=(tf.TensorSpec([None, 5, 3]), tf.TensorSpec([None, 5], tf.int32)),
      loss_fn=helpers.loss_with(ignore_class=-1),
  )
  y = tf.constant([[0, 1, 1, -1, -1], [3, 1, -1, -1, -1]])
  np.testing.assert_array_equal(class_counts.count(spec, y), [1, 3, 0, 1])


def test_counts_are_of_what_the_client_reads_and_knows_in_a_round(tmp_path):
  """Datasets, references, and a part of the labels known: the same rule."""
  data = tff_kd.FileClientData.from_clients([(_X, _Y)], directory=tmp_path)

  class Spy(local_terms.LocalTerm):
    """Moves the last bias down by its counts: one step of rate 1 shows them."""

    needs_class_counts = True

    def __call__(self, loss, step):
      return 0.0 * loss + tf.reduce_sum(step.weights[1] * step.class_counts)

  def counted(client, **kwargs):
    process = _process(Spy(), client_optimizer=helpers.sgd(1.0), **kwargs)
    state = process.initialize()
    before = state.global_model_weights.trainable[1]
    return before - process.next(state, [client]).state.global_model_weights.trainable[1]

  batches = tff_kd.ClientBatches(data=data, batch_size=8, num_epochs=1)
  np.testing.assert_allclose(counted(0, client_data=batches), _COUNTS, atol=1e-5)
  np.testing.assert_allclose(counted(helpers.dataset(_X, _Y, 8)), _COUNTS, atol=1e-5)
  batches = tff_kd.ClientBatches(data=data, batch_size=8, label_share=0.5, seed=3)
  _, labelled = batches.rows_and_labelled(tf.constant(0), tf.constant(0))
  assert 0 < labelled.numpy().sum() < 8
  rows = batches.rows(tf.constant(0), tf.constant(0)).numpy()
  expected = np.bincount(_Y[rows], labelled, minlength=_CLASSES)
  np.testing.assert_allclose(counted(0, client_data=batches), expected, atol=1e-5)


@pytest.mark.parametrize(
    'term',
    [tff_kd.PriorCorrection(), helpers.slow(tff_kd.RestrictedSoftmax(scale=0.5))],
)
def test_a_model_of_probabilities_learns_as_one_of_logits(term):
  left = []
  for activation, from_logits in ((None, True), ('softmax', False)):
    process = _process(
        term,
        student_fn=helpers.dense_fn(classes=2, activation=activation),
        loss_fn=helpers.loss_with(from_logits=from_logits),
    )
    received, found = _one_round(process)
    left.append([a - b for a, b in zip(found, received)])
    # Both classes are there: a factor changes nothing, a prior does.
  if isinstance(term, tff_kd.PriorCorrection):
    assert np.abs(left[0][1]).max() > 1e-3
  helpers.assert_weights_close(left[1], left[0], rtol=1e-3, atol=1e-5)


def test_counts_stay_at_the_client():
  """What goes up and comes down is that of FedAvg, so an account of privacy holds."""
  plain, own = (
      _process(*terms, client_weighting=None).next.type_signature
      for terms in ((), (tff_kd.PriorCorrection(),))
  )
  assert plain.is_equivalent_to(own)
  process = _process(
      tff_kd.PriorCorrection(),
      client_weighting=tff_kd.tff.learning.ClientWeighting.UNIFORM,
      privacy=tff_kd.privacy.DifferentialPrivacy(
          noise_multiplier=1.0, clients_per_round=2
      ),
  )
  _, found = _one_round(process)
  assert np.isfinite(found[0]).all()


@pytest.mark.parametrize(
    'build, match',
    [
        (lambda: tff_kd.PriorCorrection(tau=0.0), '`tau` must be above 0'),
        (lambda: tff_kd.PriorCorrection(smoothing=-1.0), '`smoothing` is a share'),
        (lambda: tff_kd.RestrictedSoftmax(scale=1.0), '`scale` must be .* below 1'),
        (lambda: tff_kd.VacantClassDistillation(weight=0), '`weight` must be above 0'),
        (
            lambda: _process(
                tff_kd.PriorCorrection(), loss_fn=keras.losses.MeanSquaredError,
                student_fn=helpers.dense_fn(classes=1), metrics_fn=None,
            ),
            'PriorCorrection is about classes',
        ),
        (
            lambda: _process(
                tff_kd.RestrictedSoftmax(),
                loss_fn=lambda: keras.losses.BinaryCrossentropy(from_logits=True),
                input_spec=(
                    helpers.INPUT_SPEC[0], tf.TensorSpec([None, _CLASSES], tf.int32)
                ),
                metrics_fn=None,
            ),
            'RestrictedSoftmax needs one class an example',
        ),
        (
            lambda: helpers.build('fd', local_terms=[tff_kd.VacantClassDistillation()]),
            'compares with the student that the server sends',
        ),
    ],
)
def test_what_does_not_fit_is_refused(build, match):
  with pytest.raises(ValueError, match=match):
    build()
