"""Alignment of predictions to a prior: each equation against NumPy, and what holds."""

import dataclasses
import functools

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import keras
import numpy as np
import pytest
import scipy.special
import tensorflow as tf
from tff_kd.compat import tff

from tests import helpers
import tff_kd
from tff_kd import knowledge
from tff_kd import models
from tff_kd.client.companions import certainty
from tff_kd.knowledge import alignment
from tff_kd.knowledge import rules

_CLOSE = dict(rtol=2e-4, atol=2e-5)


def _aligned(z, prior=None, steps=5):
  """z - mean_c z, then z - log(C mean softmax(z)) (+ log C pi), in float64."""
  z = np.asarray(z, np.float64)
  classes = z.shape[-1]
  prior = np.full(classes, 1 / classes) if prior is None else np.asarray(prior)
  z = z - z.mean(-1, keepdims=True)
  for _ in range(steps):
    marginal = helpers.softmax(z).reshape(-1, classes).mean(0)
    z = z - np.log(classes * marginal) + np.log(classes * prior)
  return z


def _em(z, steps=50):
  """Saerens et al., equation 2.9, with a uniform prior of the classifier."""
  p = helpers.softmax(z).reshape(-1, z.shape[-1])
  prior = np.full(p.shape[-1], 1 / p.shape[-1])
  for _ in range(steps):
    posterior = p * prior
    prior = (posterior / posterior.sum(-1, keepdims=True)).mean(0)
  return prior


def _logits(seed, clients=3, rows=7, classes=4, scale=2.0):
  """Of clients that are each sure of a class or two."""
  rng = np.random.default_rng(seed)
  bias = rng.normal(size=(clients, 1, classes)) * scale
  return (bias + scale * rng.normal(size=(clients, rows, classes))).astype(np.float32)


@functools.cache
def _many_steps(num_steps):
  """`align` as a graph: operation by operation, many steps take long."""
  return tf.function(
      lambda z, prior=None: alignment.align(
          z, tf.ones(len(z)), prior, num_steps=num_steps
      )
  )


@functools.cache
def _whole_rule(rule):
  """The consensus's logits of logits `[3, rows, classes]`, as a graph."""
  return tf.function(
      lambda z: rule.decode(
          tf.nest.map_structure(
              lambda *parts: tf.add_n(parts), *map(rule.encode, tf.unstack(z))
          )
      ).logits
  )


def _ones(logits):
  return np.ones(len(logits), np.float32)


@pytest.mark.parametrize('prior', [None, [0.5, 0.3, 0.15, 0.05]])
@pytest.mark.parametrize('steps', [0, 1, 5])
def test_align_is_the_formula(prior, steps):
  z = _logits(0)[0]
  found = alignment.align(z, _ones(z), prior, num_steps=steps)
  np.testing.assert_allclose(found, _aligned(z, prior, steps), **_CLOSE)


def test_rows_that_do_not_count_change_nothing_and_stay():
  z = _logits(1)[0]
  mask = np.array([1, 0, 1, 1, 0, 1, 1], np.float32)
  z[4] = np.nan
  found = alignment.align(z, mask, num_steps=5).numpy()
  np.testing.assert_allclose(found[mask > 0], _aligned(z[mask > 0]), **_CLOSE)
  np.testing.assert_array_equal(found[mask == 0], z[mask == 0])
  np.testing.assert_allclose(
      alignment.marginal(z, mask), helpers.softmax(z[mask > 0]).mean(0), **_CLOSE
  )


def test_without_rows_nothing_is_aligned():
  z = _logits(1)[0]
  none = np.zeros(len(z), np.float32)
  np.testing.assert_array_equal(alignment.align(z, none, num_steps=5), z)
  for estimate in (alignment.marginal, alignment.em_prior):
    np.testing.assert_allclose(estimate(z, none), 0.25)


def test_sequences_have_one_marginal_over_rows_and_positions():
  z = _logits(2, rows=30)[0].reshape(6, 5, 4)
  found = alignment.align(z, np.ones(6, np.float32), num_steps=5)
  np.testing.assert_allclose(found, _aligned(z), **_CLOSE)
  np.testing.assert_allclose(
      alignment.em_prior(z, np.ones(6, np.float32)), _em(z), **_CLOSE
  )


@pytest.mark.parametrize('prior', [None, (0.9, 0.1)])
def test_a_single_logit_is_the_second_of_two_classes(prior):
  z = _logits(3, classes=1, rows=9)[0]
  two = _aligned(np.concatenate([np.zeros_like(z), z], -1), prior)
  found = alignment.align(z, _ones(z), prior, num_steps=5)
  np.testing.assert_allclose(found[:, 0], two[:, 1] - two[:, 0], **_CLOSE)
  assert alignment.marginal(z, _ones(z)).shape == (2,)


@pytest.mark.parametrize('prior', [None, [[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]]])
def test_labels_that_are_present_or_not_are_aligned_each_by_itself(prior):
  z = np.random.default_rng(0).normal(1.0, 2.0, (8, 3, 1)).astype(np.float32)
  found = alignment.align(z, np.ones(8, np.float32), prior, num_steps=30).numpy()
  expected = [0.5] * 3 if prior is None else np.array(prior)[:, 1]
  np.testing.assert_allclose(
      scipy.special.expit(found).mean(0)[:, 0], expected, atol=1e-3
  )
  for label in range(3):
    alone = alignment.align(
        z[:, label], np.ones(8, np.float32),
        None if prior is None else prior[label], num_steps=30,
    )
    np.testing.assert_allclose(found[:, label], alone, **_CLOSE)


def test_em_finds_the_shares_of_the_classes():
  # One-dimensional Gaussians with means 0, 2 and 4: the posterior is known.
  rng = np.random.default_rng(0)
  truth = np.array([0.7, 0.2, 0.1])
  x = rng.choice([0.0, 2.0, 4.0], 4000, p=truth) + rng.normal(size=4000)
  z = (-0.5 * (x[:, None] - [0.0, 2.0, 4.0]) ** 2).astype(np.float32)
  found = alignment.em_prior(z, _ones(z)).numpy()
  np.testing.assert_allclose(found, _em(z), **_CLOSE)
  np.testing.assert_allclose(found, truth, atol=0.03)
  # Below it the marginal of the predictions themselves is far off.
  assert abs(helpers.softmax(z).mean(0) - truth).max() > 0.05


def test_em_keeps_the_consensus_where_a_class_is_absent():
  # Rows 1 to 3 are of class 0 and 4 to 6 of class 1. Client k says 2 on rows k and k + 3,
  # so that the consensus of the true class is 8, of 2 4, of the other 0.
  truth = np.eye(3)[[0, 0, 0, 1, 1, 1]]
  clients = np.stack([12.0 * truth] * 3)
  for k in range(3):
    clients[k, [k, k + 3]] = [0.0, 0.0, 12.0]
  clients = clients.astype(np.float32)
  mean = clients.mean(0)
  np.testing.assert_allclose(mean, 8.0 * truth + [0.0, 0.0, 4.0])
  found = alignment.em_prior(mean, _ones(mean)).numpy()
  np.testing.assert_allclose(found[:2], 0.5, atol=1e-5)
  np.testing.assert_allclose(found[2], 1e-8, rtol=1e-4)

  rule = knowledge.Aligned(knowledge.MeanLogits(), prior='em')
  found = rule.decode(helpers.mean_payload(rule, clients, [1.0] * 3))
  np.testing.assert_array_equal(found.mask, 1.0)
  consensus = np.mean([_aligned(z) for z in clients], 0)
  prior = np.maximum(_em(consensus), 1e-8)
  np.testing.assert_allclose(prior, [0.5, 0.5, 0.0], atol=2e-6)
  np.testing.assert_allclose(
      found.logits, _aligned(consensus, prior / prior.sum()), rtol=1e-3
  )
  np.testing.assert_allclose(helpers.softmax(found.logits), truth, atol=1e-2)


def test_a_prior_that_float32_takes_for_0_is_finite():
  z = _logits(8, classes=3)[0]
  for prior in ((0.5, 0.5, 1e-60), (0.5, 0.5, 0.0)):
    found = alignment.align(z, _ones(z), prior, num_steps=5).numpy()
    expected = _aligned(z, [0.5, 0.5, np.finfo(np.float32).tiny])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_an_average_without_a_class_counts_for_the_prior():
  # Each marginal's third share is below what float32 tells from 0.
  shares = np.array([0.6, 0.4, 0.0])
  z = np.array([[np.log(0.6), np.log(0.4), -200.0]] * 2, np.float32)
  state = alignment.initial_marginals(tf.TensorShape([3]))
  for _ in range(5):
    state = alignment.next_marginals(state, z, np.ones(2))
  np.testing.assert_allclose(alignment.prior_from(state), shares, atol=1e-5)


def _prior_from(marginals):
  """The prior after rounds whose averages had these marginals, by explicit sums."""
  t = len(marginals)
  if t < 2:
    return np.full_like(marginals[0], 1 / marginals[0].shape[-1])
  kept = 0.9 ** np.arange(t)[::-1]
  kept = (kept / kept.sum()).reshape([t] + [1] * np.ndim(marginals[0]))

  def centred_log(shares):
    logs = np.log(shares)
    return logs - logs.mean(-1, keepdims=True)

  logs = centred_log(np.array(marginals))
  mean = (kept * logs).sum(0)
  # An unbiased variance of one round, and that of the weighted mean.
  variance = (kept * (logs - mean) ** 2).sum(0) / (1 - (kept**2).sum())
  noise = (variance * (kept**2).sum()).mean(-1, keepdims=True)
  h = centred_log((kept * np.array(marginals)).sum(0))
  kappa = np.maximum(0, 1 - 4 * noise / (h**2).mean(-1, keepdims=True))
  return helpers.softmax(kappa * h)


def _after(marginals, logits_shape):
  """The prior that the rule would have after averages with these marginals."""
  state = alignment.initial_marginals(tf.TensorShape(logits_shape))
  for shares in marginals:
    # Two rows that predict these shares.
    z = np.log(np.stack([shares, shares]))
    if logits_shape[-1] == 1:
      z = z[..., 1:] - z[..., :1]
    state = alignment.next_marginals(state, z.astype(np.float32), np.ones(2))
  return alignment.prior_from(state).numpy()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 12), st.floats(0.5, 100.0))
def test_the_prior_from_averages_is_the_formula(seed, rounds, concentration):
  rng = np.random.default_rng(seed)
  base = rng.dirichlet([3.0] * 4)
  marginals = rng.dirichlet(concentration * base + 0.3, rounds)
  np.testing.assert_allclose(
      _after(marginals, [4]), _prior_from(marginals), rtol=2e-3, atol=2e-4
  )


def test_the_prior_from_averages_of_binary_labels_is_the_formula():
  rng = np.random.default_rng(0)
  several = rng.dirichlet([2.0, 5.0], [6, 3])
  np.testing.assert_allclose(
      _after(several, [3, 1]), _prior_from(several), rtol=2e-3, atol=2e-4
  )
  single = several[:, 0]
  np.testing.assert_allclose(
      _after(single, [1]), _prior_from(single), rtol=2e-3, atol=2e-4
  )


def test_the_prior_from_averages_tells_skew_from_noise():
  rng = np.random.default_rng(1)
  skewed = np.array([0.4, 0.4, 0.1, 0.1])
  noise = rng.dirichlet([10.0] * 4, 30)
  uniform = np.full(4, 0.25)
  # Averages that jump around the uniform distribution say nothing of the rows.
  np.testing.assert_allclose(_after(noise, [4]), uniform, atol=0.03)
  jumping = skewed * noise / (skewed * noise).sum(-1, keepdims=True)
  np.testing.assert_allclose(_after(jumping, [4]), skewed, atol=0.06)


def test_rounds_without_a_consensus_leave_the_prior():
  state = alignment.initial_marginals(tf.TensorShape([4]))
  np.testing.assert_array_equal(alignment.prior_from(state), 0.25)
  z = _logits(3)[0]
  state = alignment.next_marginals(state, z, _ones(z))
  for logits, mask in ((z, 0 * _ones(z)), (np.full_like(z, np.nan), _ones(z))):
    after = alignment.next_marginals(state, logits, mask)
    tf.nest.map_structure(np.testing.assert_array_equal, after, state)


def test_a_rule_that_keeps_a_state_is_the_outermost():
  student = helpers.model_spec(name='student')
  rule = knowledge.Aligned(knowledge.MeanLogits(), prior='average')
  knowledge.check_rule(rule, student)
  with pytest.raises(ValueError, match='the outermost consensus rule'):
    knowledge.check_rule(knowledge.consensus.WrappedRule(rule), student)


_INNER = {
    'mean_logits': lambda z, w: (w * z).sum(0) / w.sum(),
    'mean_probabilities': lambda z, w: np.log((w * helpers.softmax(z)).sum(0) / w.sum()),
    'soft_entropy': lambda z, w: _by_entropy(z, w),
}


def _by_entropy(z, w, temperature=4.0):
  p = helpers.softmax(z / temperature)
  certainty = 1 + (p * np.log(p)).sum(-1, keepdims=True) / np.log(z.shape[-1])
  return (w * certainty * z).sum(0) / (w * certainty).sum(0)


@pytest.mark.parametrize('inner', sorted(_INNER))
@pytest.mark.parametrize('prior', [None, (0.4, 0.3, 0.2, 0.1), 'average', 'em'])
def test_the_rule_is_alignment_before_and_after_the_inner_rule(inner, prior):
  logits, weights = _logits(4), [3.0, 1.0, 2.0]
  rule = knowledge.Aligned(rules.get(inner), prior=prior, sharpness=2.0)
  average = _logits(5)[0]
  arguments = [tf.constant(average)] if rule.needs_average else []
  assert rule.needs_average == (prior == 'average')
  found = rule.decode(helpers.mean_payload(rule, logits, weights), *arguments)

  clients = np.stack([_aligned(z) for z in logits])
  consensus = _INNER[inner](clients, np.array(weights)[:, None, None])
  pi = prior
  if prior == 'average':
    pi = None  # The first round.
  elif prior == 'em':
    pi = _em(consensus)
  np.testing.assert_allclose(found.logits, _aligned(2.0 * consensus, pi), rtol=5e-3,
                             atol=5e-4)
  np.testing.assert_array_equal(found.mask, 1.0)


def test_missing_rows_are_left_out_at_clients_and_in_the_consensus():
  rule = knowledge.Aligned(knowledge.MeanLogits())
  logits = _logits(6)
  logits[0, 2] = np.nan
  logits[1, 5] = np.inf
  logits[:, 3] = np.nan
  found = rule.decode(helpers.mean_payload(rule, logits, [1.0] * 3))
  present = np.isfinite(logits).all(-1)
  clients = np.zeros(logits.shape)
  for z, kept, out in zip(logits, present, clients):
    out[kept] = _aligned(z[kept])
  some = present.any(0)
  consensus = clients.sum(0)[some] / present.sum(0)[some, None]
  np.testing.assert_array_equal(found.mask, some)
  np.testing.assert_allclose(found.logits[some], _aligned(consensus), **_CLOSE)
  np.testing.assert_array_equal(found.logits[~some], 0.0)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 9999), st.floats(0.3, 3.0))
def test_after_alignment_the_marginal_is_near_the_prior(seed, scale):
  rng = np.random.default_rng(seed)
  z = _logits(seed, rows=40, scale=scale)[0]
  prior = rng.dirichlet([5.0] * 4).astype(np.float32)
  found = helpers.softmax(_many_steps(60)(z, prior))
  np.testing.assert_allclose(found.mean(0), prior, atol=0.02)
  few = helpers.softmax(_many_steps(5)(z, prior)).mean(0)
  assert abs(few - prior).sum() <= abs(helpers.softmax(z).mean(0) - prior).sum() + 1e-5


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 9999))
def test_alignment_of_what_is_aligned_changes_nothing(seed):
  z = _logits(seed, rows=40, scale=1.0)[0]
  once = _many_steps(200)(z)
  twice = _many_steps(5)(once)
  np.testing.assert_allclose(helpers.softmax(twice), helpers.softmax(once), atol=2e-3)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 9999))
def test_a_class_bias_of_a_client_changes_nothing(seed):
  rng = np.random.default_rng(seed)
  logits = _logits(seed, rows=40, scale=1.0)
  biased = logits + rng.normal(size=(3, 1, 4)).astype(np.float32)
  rule = knowledge.Aligned(knowledge.MeanLogits(), num_steps=200)
  consensus = _whole_rule(rule)
  found, expected = (helpers.softmax(consensus(z)) for z in (biased, logits))
  np.testing.assert_allclose(found, expected, atol=5e-3)


def test_without_steps_it_is_the_inner_rule_and_sharpness_alone():
  logits, inner = _logits(7), knowledge.MeanLogits()
  expected = inner.decode(helpers.mean_payload(inner, logits, [1.0] * 3))
  for rule, factor in (
      (knowledge.consensus.WrappedRule(inner), 1.0),
      (knowledge.Aligned(inner, num_steps=0), 1.0),
      (knowledge.Aligned(inner, num_steps=0, sharpness=2.0), 2.0),
  ):
    found = rule.decode(helpers.mean_payload(rule, logits, [1.0] * 3))
    np.testing.assert_allclose(found.logits, factor * expected.logits, rtol=1e-6)


def test_what_is_coded_is_aligned_before():
  inner = knowledge.Quantized(knowledge.MeanProbabilities(), bits=3)
  rule = knowledge.Aligned(inner)
  z = _logits(8)[0]
  payload = rule.encode(tf.constant(z))
  expected = inner.encode(alignment.align(z, _ones(z), num_steps=5))
  np.testing.assert_array_equal(payload.values, expected.values)
  assert rule.is_coded and rule.codes_changes
  assert rule.message_bits(payload) == inner.message_bits(expected) > 0
  shape = tf.TensorShape([4])
  assert rule.first_message_bytes(shape, 7) == inner.first_message_bytes(shape, 7)
  with pytest.raises(ValueError, match='Wrap the other way round'):
    knowledge.Quantized(knowledge.Aligned(knowledge.MeanProbabilities()), bits=3)


def test_the_inner_rules_properties_are_its_own():
  mean, variance = knowledge.MeanLogits(), knowledge.CertaintyWeighted('variance')
  assert knowledge.Aligned(mean).has_unit_weights
  assert not knowledge.Aligned(variance).has_unit_weights
  assert knowledge.Aligned(mean).needs_classes and not mean.needs_classes
  assert knowledge.Aligned(knowledge.CertaintyWeighted('given')).needs_certainty
  diverse = knowledge.Aligned(knowledge.CertaintyWithDiversity('variance'))
  assert diverse.has_diversity
  found = diverse.decode(helpers.mean_payload(diverse, _logits(9), [1.0] * 3))
  assert found.diversity.logits.shape == (7, 4)
  # Equal rules are equal, so that what is built with one can be kept.
  prior = np.array([0.5, 0.5])
  assert hash(knowledge.Aligned(mean, prior=prior)) is not None
  assert knowledge.Aligned(mean, prior='uniform') == knowledge.Aligned(mean)


def test_a_given_certainty_goes_to_the_inner_rule():
  rule = knowledge.Aligned(knowledge.CertaintyWeighted('given'))
  z, certainty = _logits(10)[0], np.linspace(0.1, 0.9, 7).astype(np.float32)
  payload = rule.encode(tf.constant(z), tf.constant(certainty))
  np.testing.assert_allclose(payload.weights, certainty)
  np.testing.assert_allclose(payload.values, certainty[:, None] * _aligned(z), **_CLOSE)


@pytest.mark.parametrize(
    'prior', [[0.5, 0.6], [1.0, 0.0], [-0.5, 1.5], [np.nan, 1.0], 'even', [], 3.0, {}]
)
def test_bad_priors_are_refused(prior):
  with pytest.raises(ValueError, match='`prior` must be .*found'):
    knowledge.Aligned(knowledge.MeanLogits(), prior=prior)


def test_other_bad_arguments_are_refused():
  mean = knowledge.MeanLogits()
  with pytest.raises(ValueError, match='a probability for each class.*3.*found'):
    knowledge.Aligned(mean, prior=[0.5, 0.5]).payload_spec(tf.TensorShape([3]), 2)
  labels = knowledge.Aligned(mean, prior=[[0.5, 0.5]] * 3)
  assert labels.payload_spec(tf.TensorShape([3, 1]), 2).values.shape == (2, 3, 1)
  for kwargs, message in (
      (dict(sharpness=0.0), '`sharpness` must be'),
      (dict(num_steps=-1), '`num_steps` must be'),
      (dict(num_steps=0, prior='em'), 'nothing is aligned to a prior'),
  ):
    with pytest.raises(ValueError, match=message):
      knowledge.Aligned(mean, **kwargs)
  with pytest.raises(TypeError, match='wraps a consensus rule'):
    knowledge.Aligned('mean_logits')
  with pytest.raises(ValueError, match="of 'confidence' and 'entropy'"):
    knowledge.CertaintyWeighted('variance', temperature=2.0)


def test_regression_models_are_refused():
  x = tf.TensorSpec([None, 2], tf.float32)
  spec = models.build_model_spec(
      helpers.dense_fn(classes=1, dim=2), input_spec=(x, tf.TensorSpec([None, 1])),
      loss_fn=keras.losses.MeanSquaredError,
  )
  with pytest.raises(ValueError, match='Aligned.*classes'):
    knowledge.check_rule(knowledge.Aligned(knowledge.MeanLogits()), spec)


# Whole rounds: clients take one step, and so does each stage of the server.
_PUBLIC, _ = helpers.examples(10, 99)
_X = _PUBLIC.astype(np.float64)
_SIZES = (8, 5, 6)
_CLIENTS = [helpers.examples(n, n) for n in _SIZES]
_STEP = tff_kd.Distillation(num_steps=1, batch_size=10)
_PRIOR = (0.5, 0.3, 0.2)


def _build(name, teacher=False, **kwargs):
  keras.utils.set_random_seed(0)
  if teacher:
    kwargs |= dict(teacher_fn=helpers.dense_fn(), teacher_optimizer=helpers.sgd(0.5))
  return helpers.build(
      name, transfer_set=tff_kd.TransferSet(_PUBLIC), distillation=_STEP, **kwargs
  )


def _logits_of(model):
  return helpers.linear_logits(model, _X)


def _fit(model, k):
  """A client's step of SGD with rate .1 on all of its examples."""
  x, y = _CLIENTS[k]
  return helpers.linear_fit(model, x.astype(np.float64), y, 0.1)


def _learn(model, target, rate):
  """A step of distillation on the public examples."""
  return helpers.linear_distil(model, _X, helpers.softmax(target), rate)


def _mean(values, weights):
  return sum(w * v for w, v in zip(weights, values)) / sum(weights)


def _weights(found):
  return [np.array(w, np.float64) for w in found.trainable]


def _check(found, expected):
  helpers.assert_weights_close(found.trainable, expected, rtol=2e-4, atol=2e-5)


def _next(process, state, *states):
  data = [helpers.dataset(x, y, 100) for x, y in _CLIENTS]
  return process.next(state, data, *states)


@pytest.mark.parametrize('start', [helpers.slow('distilled'), 'average'])
def test_rounds_of_fed_distillation_in_numpy(start):
  process = _build(
      'fed_distillation', teacher=True,
      student_optimizer=helpers.sgd(0.4),
      server_optimizer=helpers.sgd(0.7, 0.5),
      back_distillation=dataclasses.replace(_STEP, target='teacher'),
      consensus_rule=knowledge.Aligned(
          knowledge.MeanLogits(), prior=_PRIOR, sharpness=1.5
      ),
      clients_start_from=start,
  )
  state = process.initialize()
  released = average = _weights(state.global_model_weights)
  teacher = _weights(state.teacher_weights)
  momentum = [0.0, 0.0]
  for _ in range(3):
    state = _next(process, state).state
    sent = average if start == 'average' else released
    trained = [_fit(sent, k) for k in range(3)]
    momentum = [
        0.5 * m + w - _mean([t[i] for t in trained], _SIZES)
        for i, (m, w) in enumerate(zip(momentum, sent))
    ]
    average = [w - 0.7 * m for w, m in zip(sent, momentum)]
    consensus = _mean([_aligned(_logits_of(t)) for t in trained], _SIZES)
    teacher = _learn(teacher, _aligned(1.5 * consensus, _PRIOR), 0.5)
    released = _learn(average, _logits_of(teacher), 0.4)
    _check(state.aggregated_model_weights, average)
    _check(state.teacher_weights, teacher)
    _check(state.global_model_weights, released)


@pytest.mark.parametrize('prior', ['average', helpers.slow('em')])
def test_rounds_of_fed_df_with_an_estimated_prior_in_numpy(prior):
  process = _build(
      'fed_df', student_optimizer=helpers.sgd(0.4),
      consensus_rule=knowledge.Aligned(knowledge.MeanProbabilities(), prior=prior),
  )
  state = process.initialize()
  student, marginals = _weights(state.global_model_weights), []
  for _ in range(3):
    state = _next(process, state).state
    trained = [_fit(student, k) for k in range(3)]
    average = [_mean(w, _SIZES) for w in zip(*trained)]
    consensus = np.log(
        _mean([helpers.softmax(_aligned(_logits_of(t))) for t in trained], _SIZES)
    )
    pi = _em(consensus)
    if prior == 'average':
      marginals.append(helpers.softmax(_logits_of(average)).mean(0))
      pi = _prior_from(marginals)
    student = _learn(average, _aligned(consensus, pi), 0.4)
    _check(state.global_model_weights, student)


@pytest.mark.slow
def test_a_round_of_fed_et_in_numpy():
  process = _build(
      'fed_et', teacher=True,
      consensus_rule=knowledge.Aligned(knowledge.CertaintyWeighted('variance')),
  )
  state = process.initialize()
  teacher = _weights(state.teacher_weights)
  trained = [_fit(_weights(state.global_model_weights), k) for k in range(3)]
  z = np.stack([_aligned(_logits_of(t)) for t in trained])
  certainty = z.var(-1, keepdims=True)
  consensus = (certainty * z).sum(0) / certainty.sum(0)
  state = _next(process, state).state
  _check(state.teacher_weights, _learn(teacher, _aligned(consensus), 0.5))


def test_a_round_of_ds_fl_in_numpy():
  process = _build(
      'ds_fl',
      consensus_rule=knowledge.Aligned(knowledge.MeanProbabilities(temperature=0.1)),
  )
  state = process.initialize()
  trained = [_fit(_weights(state.global_model_weights), k) for k in range(3)]
  mean = np.mean([helpers.softmax(_aligned(_logits_of(t))) for t in trained], 0)
  state = _next(process, state, [process.initialize_client()] * 3).state
  rows = tff_kd.TransferSet(_PUBLIC).prediction_ids(0).numpy()
  np.testing.assert_allclose(
      state.shared.logits, _aligned(mean / 0.1)[rows], **_CLOSE
  )


@pytest.mark.slow
def test_a_round_of_fed_aux_in_numpy():
  process = _build(
      'fed_aux', negatives=helpers.examples(12, 98)[0], epsilon=None,
      student_optimizer=helpers.sgd(0.4),
      consensus_rule=knowledge.Aligned(rules.get('given')),
  )
  state = process.initialize()
  trained = [_fit(_weights(state.global_model_weights), k) for k in range(3)]
  average = [_mean(w, _SIZES) for w in zip(*trained)]
  output = _next(process, state, [process.initialize_client()] * 3)
  features = certainty.bounded_features(certainty.flat_inputs(_PUBLIC))
  s = np.stack([
      certainty.score(tf.constant(kept.weights), features).numpy()
      for kept in output.client_states
  ])[..., np.newaxis]
  p = np.stack([helpers.softmax(_aligned(_logits_of(t))) for t in trained])
  consensus = np.log((s * p).sum(0) / s.sum(0))
  _check(
      output.state.global_model_weights, _learn(average, _aligned(consensus), 0.4)
  )


def _aligned_fed_df(**kwargs):
  return _build(
      'fed_df', student_optimizer=helpers.sgd(0.4),
      **{'consensus_rule': knowledge.Aligned(knowledge.MeanLogits()), **kwargs},
  )


@pytest.mark.slow
def test_secure_sums_and_private_ones_are_of_aligned_predictions():
  uniform = tff.learning.ClientWeighting.UNIFORM
  plain = _aligned_fed_df(client_weighting=uniform)
  expected = _next(plain, plain.initialize()).state.global_model_weights
  for protected in (
      _aligned_fed_df(
          client_weighting=uniform,
          secure_aggregation=tff_kd.privacy.SecureAggregation(
              bits=24, max_clients=3, model_bound=10.0, knowledge_bound=50.0
          ),
      ),
      # No noise, and a clip that nothing reaches.
      _aligned_fed_df(
          client_weighting=uniform,
          privacy=tff_kd.privacy.DifferentialPrivacy(
              noise_multiplier=0.0, clients_per_round=3, model_clip=100.0,
              knowledge_clip=1000.0,
          ),
      ),
  ):
    found = _next(protected, protected.initialize()).state.global_model_weights
    helpers.assert_weights_close(found, expected, atol=1e-3)


def test_the_average_of_cohorts_is_the_mean_of_their_logits():
  students = [helpers.dense_fn(), helpers.dense_fn()]

  def one_round(prior):
    process = _aligned_fed_df(
        student_fn=students,
        consensus_rule=knowledge.Aligned(knowledge.MeanLogits(), prior=prior),
    )
    clients = [
        {'cohort': np.int32(k % 2), 'data': helpers.dataset(x, y, 100)}
        for k, (x, y) in enumerate(_CLIENTS)
    ]
    return process.next(process.initialize(), clients).state

  state = one_round('average')
  logits = [_logits_of(_weights(w)) for w in state.aggregated_model_weights]
  prior = helpers.softmax(np.mean(logits, 0)).mean(0)
  remembered = state.server_distillation.rule
  np.testing.assert_allclose(remembered.weight, 0.1, rtol=1e-5)
  np.testing.assert_allclose(remembered.shares, 0.1 * prior, rtol=1e-4)


def test_a_prior_of_the_average_needs_one():
  for name in ('ds_fl', 'fed_md'):
    with pytest.raises(ValueError, match='nothing is averaged.*Take a `prior`'):
      helpers.build(
          name, transfer_set=tff_kd.TransferSet(_PUBLIC),
          consensus_rule=knowledge.Aligned(knowledge.MeanLogits(), prior='average'),
      )
