"""FedAUX: the scorer, its privacy, and whole rounds against NumPy."""

import dp_accounting
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import tensorflow as tf

from tests import helpers
import tff_kd
from tff_kd.client import companions
from tff_kd.client.companions import certainty
from tff_kd import knowledge

_LAMBDA = 0.05
_SIZES = (6, 8, 4)
_RATE, _SERVER_RATE = 0.2, 0.3
_PUBLIC, _ = helpers.examples(10, 77)
_NEGATIVES, _ = helpers.examples(12, 78)


def _features(x):
  x = np.asarray(x, np.float64).reshape(len(x), -1)
  x = x / np.maximum(1.0, np.linalg.norm(x, axis=1, keepdims=True))
  return np.concatenate([x, np.ones([len(x), 1])], axis=1) / np.sqrt(2.0)


def _minimiser(positives, negatives, regularization):
  """By SciPy."""
  signed = np.concatenate([positives, -negatives])

  def objective(w):
    margins = signed @ w
    value = np.logaddexp(0.0, -margins).mean() + regularization / 2 * w @ w
    pull = scipy.special.expit(-margins) / len(signed)
    return value, regularization * w - signed.T @ pull

  return scipy.optimize.minimize(
      objective, np.zeros(signed.shape[1]), jac=True, method='BFGS',
      options=dict(gtol=1e-9),
  ).x


def _score(w, x):
  return scipy.special.expit(_features(x) @ w) + 1e-8


def _rows(seed, n, dim, scale=3.0):
  return np.random.default_rng(seed).normal(size=(n, dim), scale=scale)


def _bounded(rows):
  return certainty.bounded_features(tf.constant(rows, tf.float32))


@pytest.mark.parametrize('regularization', [1e-3, 0.01, 1.0, 100.0])
@pytest.mark.parametrize('shift', [0.0, 4.0])
def test_a_fit_reaches_the_minimiser(regularization, shift):
  positives, negatives = _rows(0, 9, 5) + shift, _rows(1, 14, 5)
  found = certainty.fit(_bounded(positives), _bounded(negatives), regularization)
  expected = _minimiser(_features(positives), _features(negatives), regularization)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_fit_reaches_the_minimiser_with_more_features_than_examples():
  positives, negatives = _rows(0, 7, 200), _rows(1, 6, 200)
  found = certainty.fit(_bounded(positives), _bounded(negatives), 0.01)
  expected = _minimiser(_features(positives), _features(negatives), 0.01)
  np.testing.assert_allclose(found, expected, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 5), st.integers(0, 5),
    st.floats(0.01, 2.0), st.floats(0.1, 100.0),
)
def test_replacing_one_example_moves_a_fit_within_its_sensitivity(
    seed, num_positives, num_negatives, regularization, scale
):
  rng = np.random.default_rng(seed)
  positives = rng.normal(size=(num_positives, 2), scale=scale)
  negatives = _bounded(rng.normal(size=(num_negatives, 2)))
  other = positives.copy()
  other[rng.integers(num_positives)] = rng.normal(size=2, scale=scale)
  distance = np.linalg.norm(
      certainty.fit(_bounded(positives), negatives, regularization)
      - certainty.fit(_bounded(other), negatives, regularization)
  )
  n = num_positives + num_negatives
  assert distance <= certainty.sensitivity(regularization, n)


def test_the_sensitivity_is_within_a_factor_of_what_can_happen():
  # One example alone, and strong regularisation: the fit is its gradient at 0.
  one, other = _bounded([[1.0, 0.0]]), _bounded([[-1.0, 0.0]])
  none, regularization = tf.zeros([0, 3]), 10.0
  distance = np.linalg.norm(
      certainty.fit(one, none, regularization)
      - certainty.fit(other, none, regularization)
  )
  # Half the gradient's bound, twice, in one of two directions of norm 1 / sqrt(2).
  bound = certainty.sensitivity(regularization, 1)
  assert 0.3 * bound < distance < 0.4 * bound


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-6, 1e6), st.integers(1, 6))
def test_features_are_bounded(seed, scale, dim):
  rows = _rows(seed, 4, dim, scale)
  found = _bounded(rows).numpy()
  assert found.shape == (4, dim + 1)
  assert (np.linalg.norm(found, axis=1) <= 1 + 1e-6).all()
  np.testing.assert_allclose(found, _features(rows), rtol=1e-5, atol=1e-7)


def test_features_of_zeros_and_of_several_inputs():
  assert np.isfinite(_bounded(np.zeros([2, 3]))).all()
  flat = certainty.flat_inputs({
      'a': tf.constant([[[1, 2], [3, 4]]], tf.uint8), 'b': tf.constant([5.0]),
  })
  np.testing.assert_array_equal(flat, [[1, 2, 3, 4, 5]])


@pytest.mark.parametrize('epsilon, delta', [(0.1, 1e-5), (0.5, 1e-5), (3.0, 1e-6)])
def test_the_noise_spends_epsilon(epsilon, delta):
  multiplier = certainty.noise_multiplier(epsilon, delta)
  accountant = dp_accounting.pld.PLDAccountant()
  accountant.compose(dp_accounting.GaussianDpEvent(multiplier))
  assert accountant.get_epsilon(delta) == pytest.approx(epsilon, rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 1e4))
def test_scores_are_above_0_and_at_most_1(seed, scale):
  weights = tf.constant(_rows(seed, 1, 4, scale)[0], tf.float32)
  found = certainty.score(weights, _bounded(_rows(seed + 1, 5, 3))).numpy()
  assert (found > 0).all() and (found <= 1).all()


def test_what_is_like_the_clients_examples_scores_higher():
  own, others = _rows(0, 60, 4, 0.1) + [1, 0, 0, 0], _rows(1, 60, 4, 0.1) - [1, 0, 0, 0]
  weights = tf.cast(certainty.fit(_bounded(own), _bounded(others), 0.01), tf.float32)
  like = certainty.score(weights, _bounded(_rows(2, 20, 4, 0.1) + [1, 0, 0, 0]))
  unlike = certainty.score(weights, _bounded(_rows(3, 20, 4, 0.1) - [1, 0, 0, 0]))
  assert like.numpy().min() > 0.7 and unlike.numpy().max() < 0.3


def _scorer(**kwargs):
  defaults = dict(
      input_spec=helpers.INPUT_SPEC, negatives=_NEGATIVES, epsilon=0.5,
      regularization=_LAMBDA,
  )
  return certainty.CertaintyScorer(**(defaults | kwargs))


def _released(scorer, clients, x):
  """The scorers that some clients release, all with the same examples."""
  attached = scorer.attach(None)

  @tf.function
  def release(client):
    examples = companions.ClientExamples(client, lambda fn: fn(tf.constant(x)))
    beginning = companions.Beginning(
        received=(), client_state=scorer.initial_client_state(),
        round_num=tf.constant(0), examples=examples, seed=tf.constant([0, 0]),
    )
    _, values = attached.begin(beginning)
    return attached.end((), None, values)[0].weights

  return np.stack([release(tf.constant(k)) for k in clients])


def test_the_noise_has_its_standard_deviation_and_follows_from_the_client():
  x, _ = helpers.examples(6, 0)
  found = _released(_scorer(), range(400), x)
  exact = _minimiser(_features(x), _features(_NEGATIVES), _LAMBDA)
  sigma = certainty.noise_multiplier(0.5, 1e-5) * 2 / (_LAMBDA * 18)
  noise = (found - exact) / sigma
  # 2,400 draws: .03 is two standard errors of the deviation.
  assert abs(noise.std() - 1) < 0.06 and abs(noise.mean()) < 0.08
  assert np.abs(np.corrcoef(noise.T) - np.eye(6)).max() < 0.2
  again = _released(_scorer(), [3, 5], x)
  np.testing.assert_array_equal(again, found[[3, 5]])
  assert not np.isclose(_released(_scorer(seed=1), [3], x), found[3]).any()


def test_without_epsilon_there_is_no_noise():
  x, _ = helpers.examples(6, 0)
  exact = _minimiser(_features(x), _features(_NEGATIVES), _LAMBDA)
  found = _released(_scorer(epsilon=None), [0, 1], x)
  np.testing.assert_allclose(found, [exact, exact], atol=1e-5)


def _client(k):
  return helpers.examples(_SIZES[k], k)


def _batches():
  # Two epochs: the scorer counts each example once all the same.
  return helpers.batches(
      [_client(k) for k in range(3)], batch_size=100, num_epochs=2, shuffle=False
  )


@helpers.shared
def _fed_aux(**kwargs):
  defaults = dict(
      client_optimizer=helpers.sgd(_RATE),
      transfer_set=tff_kd.TransferSet(_PUBLIC),
      negatives=_NEGATIVES,
      client_data=_batches(),
      student_optimizer=helpers.sgd(_SERVER_RATE),
      distillation=tff_kd.Distillation(
          num_steps=1, batch_size=10, distillation_weight=1.0
      ),
      regularization=_LAMBDA,
  )
  return helpers.build('fed_aux', **(defaults | kwargs))


@pytest.fixture(scope='module')
def private():
  return _fed_aux(epsilon=2.0)


_logits = helpers.linear_logits


def _expected_round(student, scorers, clients, epochs=1):
  """FedAUX by hand; returns the average before the distillation and the student."""
  trained = []
  for k in clients:
    x, y = _client(k)
    x, y = np.tile(x, (epochs, 1)), np.tile(y, epochs)
    trained.append(helpers.linear_fit(student, x, y, _RATE))
  shares = np.array([_SIZES[k] for k in clients]) / sum(_SIZES[k] for k in clients)
  mean = [sum(s * model[i] for s, model in zip(shares, trained)) for i in range(2)]
  s = np.stack([_score(w, _PUBLIC) for w in scorers])
  p = np.stack([helpers.softmax(_logits(m, _PUBLIC)) for m in trained])
  consensus = (s[..., np.newaxis] * p).sum(0) / s.sum(0)[:, np.newaxis]
  return mean, helpers.linear_distil(mean, _PUBLIC, consensus, _SERVER_RATE)


def _check(weights, expected):
  helpers.assert_weights_close(weights.trainable, expected, rtol=1e-4, atol=1e-5)


def test_rounds_in_numpy_and_one_fit_a_client(private):
  state = private.initialize()
  states = [private.initialize_client()] * 3
  student = [np.array(w, np.float64) for w in state.global_model_weights.trainable]
  exact = [
      _minimiser(_features(_client(k)[0]), _features(_NEGATIVES), _LAMBDA)
      for k in range(3)
  ]
  for clients in ([0, 1], [2, 1], [0, 2, 1]):
    output = private.next(state, clients, [states[k] for k in clients])
    state = output.state
    for k, new in zip(clients, output.client_states):
      assert new.is_fitted
      if states[k].is_fitted:
        np.testing.assert_array_equal(new.weights, states[k].weights)
      states[k] = new
    scorers = [np.array(states[k].weights, np.float64) for k in clients]
    mean, student = _expected_round(student, scorers, clients, epochs=2)
    _check(state.aggregated_model_weights, mean)
    _check(state.global_model_weights, student)
  sigma = certainty.noise_multiplier(2.0, 1e-5) * 2 / (
      _LAMBDA * (np.array(_SIZES) + len(_NEGATIVES))
  )
  noise = np.stack([its.weights for its in states]) - exact
  # Each has its own, of the size that its number of examples asks for.
  assert (0.3 < noise.std(axis=1) / sigma).all()
  assert (noise.std(axis=1) / sigma < 2.0).all()
  assert np.abs(noise[0] - noise[1]).min() > 0
  assert private.get_model_weights(state) is not None


def test_a_kept_scorer_is_used_as_it_is(private):
  state = private.initialize()
  kept = certainty.ScorerState(
      np.linspace(-2, 2, helpers.DIM + 1).astype(np.float32), np.array(True)
  )
  output = private.next(state, [0, 1], [kept, private.initialize_client()])
  np.testing.assert_array_equal(output.client_states[0].weights, kept.weights)
  student = [np.array(w, np.float64) for w in state.global_model_weights.trainable]
  scorers = [kept.weights, output.client_states[1].weights]
  _, expected = _expected_round(student, scorers, [0, 1], epochs=2)
  _check(output.state.global_model_weights, expected)


def test_datasets_without_noise_and_a_client_without_examples():
  scale = np.linspace(0.1, 0.5, helpers.DIM).astype(np.float32)
  process = _fed_aux(
      client_data=None, epsilon=None, feature_fn=lambda x: tf.tanh(x * scale)
  )
  first = process.initialize_client()
  empty = tuple(a[:0] for a in _client(2))
  output = process.next(
      process.initialize(),
      # Batches of 3, 3, 2 examples are read together.
      [helpers.dataset(*_client(0), 100), helpers.dataset(*_client(1), 3),
       helpers.dataset(*empty)],
      [first] * 3,
  )

  def features(x):
    return _features(np.tanh(x * scale))

  for k in range(2):
    expected = _minimiser(features(_client(k)[0]), features(_NEGATIVES), _LAMBDA)
    np.testing.assert_allclose(
        output.client_states[k].weights, expected, atol=1e-4
    )
  assert not output.client_states[2].is_fitted
  assert output.metrics['client_work']['participation']['num_excluded_empty'] == 1


def test_quantised_predictions_keep_their_certainty():
  z = tf.constant(_rows(0, 4, 3), tf.float32)
  s = tf.constant([0.1, 0.2, 0.5, 1.0])
  rule = knowledge.CertaintyWeighted('given', average='probabilities')
  payload = knowledge.Quantized(rule, 1).encode(z, s)
  np.testing.assert_array_equal(payload.weights, s)
  np.testing.assert_allclose(
      payload.values, s[:, np.newaxis] * np.eye(3)[np.argmax(z, -1)], atol=1e-6
  )


_GIVEN = knowledge.CertaintyWeighted('given')


@pytest.mark.parametrize(
    'build, match',
    [
        (lambda: _scorer(epsilon=0.0), '`epsilon`'),
        (lambda: _scorer(epsilon=float('inf')), '`epsilon`'),
        (lambda: _scorer(delta=1.0), '`delta`'),
        (lambda: _scorer(regularization=0.0), '`regularization`'),
        (lambda: _scorer(negatives=_NEGATIVES[:, :3]), '`negatives` must be like'),
        (
            lambda: _scorer(negatives=_NEGATIVES.astype(np.float64)),
            '`negatives` must be like',
        ),
        (lambda: _scorer(feature_fn=lambda x: x[:, 0]), '`feature_fn`'),
        (lambda: _scorer(feature_fn=lambda x: tf.cast(x, tf.int32)), '`feature_fn`'),
        (lambda: _fed_aux(client_data=None), '`client_data='),
        (
            lambda: _fed_aux(consensus_rule=knowledge.MeanProbabilities()),
            r"CertaintyWeighted\('given'\), found MeanProb",
        ),
        (
            lambda: helpers.build(
                'fed_distillation', transfer_set=tff_kd.TransferSet(_PUBLIC),
                teacher_fn=helpers.dense_fn(), companion=_scorer(epsilon=None),
                distillation=tff_kd.Distillation(target='student'),
            ),
            'distillation from the ensemble',
        ),
        (
            lambda: helpers.build(
                'fed_df', transfer_set=tff_kd.TransferSet(_PUBLIC), consensus_rule=_GIVEN
            ),
            'no companion gives one',
        ),
        (
            lambda: helpers.build(
                'ds_fl', transfer_set=tff_kd.TransferSet(_PUBLIC), consensus_rule=_GIVEN
            ),
            'keep their models do not have',
        ),
        (lambda: knowledge.CertaintyWeighted('taken'), 'given'),
    ],
)
def test_refused_before_anything_is_built(build, match):
  with pytest.raises(ValueError, match=match):
    build()


# Cohorts of `fed_aux` are in `contract_test`.
@pytest.mark.slow
def test_cohorts_of_another_algorithm_take_the_scorer():
  process = helpers.build(
      'fed_df', student_fn=[helpers.dense_fn(), helpers.dense_fn((4,))],
      transfer_set=tff_kd.TransferSet(_PUBLIC), client_data=_batches(),
      consensus_rule=_GIVEN, companion=_scorer(), local_terms=[tff_kd.ProximalTerm()],
  )
  state, first = process.initialize(), process.initialize_client()
  data = [{'cohort': k % 2, 'data': k} for k in range(3)]
  output = process.next(state, data, [first] * 3)
  again = process.next(output.state, data, output.client_states)
  for before, after in zip(output.client_states, again.client_states):
    assert before.is_fitted
    np.testing.assert_array_equal(before.weights, after.weights)
  assert np.isfinite(again.metrics['client_work']['train']['loss'])
