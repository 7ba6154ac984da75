"""Membership inference: it finds what is there, and nothing where there is nothing."""

import math
import statistics

import hypothesis
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import numpy as np
import pytest
import scipy.stats
from sklearn import metrics

from tests import helpers
from tff_kd.audits import membership

_CLASSES, _DIM = 4, 10


def _data(n, seed):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, _CLASSES, n)
  return np.float32(rng.normal(size=(n, _DIM))), labels


def _fit(inputs, labels, ridge=0.1, seed=0):
  """Ridge regression on 400 random features; it learns random labels by heart."""
  project = np.random.default_rng(seed).normal(size=(_DIM, 400)) / 3.0
  features = lambda x: np.maximum(x @ project, 0.0)
  f = features(inputs)
  weights = f.T @ np.linalg.solve(
      f @ f.T + ridge * np.eye(len(f)), np.eye(_CLASSES)[labels]
  )
  return lambda x: np.float32(5.0 * features(x) @ weights)


def _predictions(model, data):
  return membership.Predictions(model(data[0]), data[1])


@pytest.fixture(scope='module')
def overfitted():
  """A model that knows random labels by heart, and those."""
  members = _data(200, 0)
  return _fit(*members), members


def test_an_overfitted_model_is_found_out(overfitted):
  model, members = overfitted
  report = membership.infer_membership(
      _predictions(model, members), _predictions(model, _data(300, 1))
  )
  assert report.member_accuracy > 0.9 and report.non_member_accuracy < 0.4
  assert report.overall.auc.low > 0.8 and report.overall.advantage.low > 0.4
  assert report.overall.num_members == report.overall.num_non_members == 100
  assert report.worst_class.auc.low > 0.7 and report.worst_class.label in range(4)
  # And by loss alone, for the few examples of a client.
  few = tuple(array[:12] for array in members)
  value = membership.infer_by_loss(
      _predictions(model, few), _predictions(model, _data(300, 1))
  )
  assert value > 0.9


def _in_shape(predictions, shape):
  labels = np.asarray(predictions.labels)
  if shape == 'one-hot':
    labels = np.eye(_CLASSES, dtype=np.float32)[labels]
  else:
    labels = labels[:, np.newaxis]
  return predictions._replace(labels=labels)


@pytest.mark.parametrize('shape', ['one-hot', '[n, 1]'])
def test_labels_of_any_shape_are_class_numbers(overfitted, shape):
  model, members = overfitted
  members, others = _predictions(model, members), _predictions(model, _data(300, 1))
  shaped = _in_shape(members, shape), _in_shape(others, shape)
  found, expected = (
      membership.infer_membership(*both) for both in (shaped, (members, others))
  )
  assert found.overall.auc == expected.overall.auc
  assert found.worst_class.label == expected.worst_class.label
  assert found.member_accuracy == expected.member_accuracy
  assert membership.infer_by_loss(*shaped) == membership.infer_by_loss(members, others)
  np.testing.assert_array_equal(
      membership.logit_scaled_confidences(shaped[0]),
      membership.logit_scaled_confidences(members),
  )


def test_labels_of_several_classes_are_refused(overfitted):
  model, members = overfitted
  labels = np.zeros((200, _CLASSES))
  labels[:, 0] = labels[3:, 1] = 1
  predictions = membership.Predictions(model(members[0]), labels)
  with pytest.raises(ValueError, match=r'a single 1 .* found \[1.0, 1.0.* in row 3'):
    membership.infer_membership(predictions, predictions)


# Of 12 intervals at 95 %, 9 or more but for one case in 450.
@pytest.mark.parametrize('num_seeds, least', [(4, 3), helpers.slow(12, 9)])
def test_what_was_held_out_is_at_chance(num_seeds, least, overfitted):
  model, _ = overfitted
  contained = {'auc': 0, 'advantage': 0, 'worst': 0}
  for seed in range(num_seeds):
    report = membership.infer_membership(
        _predictions(model, _data(200, 100 + seed)),
        _predictions(model, _data(200, 200 + seed)),
        seed=seed,
    )
    for name, estimate, chance in (
        ('auc', report.overall.auc, 0.5),
        ('advantage', report.overall.advantage, 0.0),
        ('worst', report.worst_class.auc, 0.5),
    ):
      contained[name] += estimate.low <= chance <= estimate.high
  assert min(contained.values()) >= least


def test_choosing_and_measuring_on_the_same_examples_would_not_be(overfitted):
  model, _ = overfitted
  found = []
  for seed in range(8):
    scores = [
        _predictions(model, _data(100, 300 + 2 * seed + i)).logits.max(-1)
        for i in range(2)
    ]
    threshold = membership.best_threshold(*scores)
    found.append(np.mean(scores[0] >= threshold) - np.mean(scores[1] >= threshold))
  assert np.mean(found) > 0.05


def test_it_finds_what_tensorflow_privacys_attacks_found():
  # What this function returned when it called tensorflow-empirical-privacy 0.1.0, with
  # scikit-learn 1.4 and statsmodels.
  rng = np.random.default_rng(0)

  def draw(n, boost):
    labels = rng.integers(0, 4, n).astype(np.int32)
    logits = rng.normal(size=(n, 4))
    logits[np.arange(n), labels] += 1 + boost * rng.random(n)
    return membership.Predictions(np.float32(logits), labels)

  report = membership.infer_membership(draw(200, 2), draw(280, 0), seed=0)
  assert report.overall.attack == 'logistic regression'
  np.testing.assert_allclose(report.overall.auc, (0.6824, 0.6085, 0.7563), atol=2e-3)
  np.testing.assert_allclose(report.overall.advantage, (0.27, 0.1345, 0.392), atol=2e-3)
  worst = report.worst_class
  assert (worst.attack, worst.label, worst.num_members) == ('threshold', 1, 25)
  np.testing.assert_allclose(worst.auc, (0.75, 0.5988, 0.9012), atol=1e-4)
  np.testing.assert_allclose(worst.advantage, (0.31, 0.0207, 0.5317), atol=1e-4)


_logits = hnp.arrays(
    np.float64, st.tuples(st.integers(1, 6), st.integers(2, 5)),
    elements=st.floats(-8, 8),
)


@hypothesis.settings(deadline=None)
@hypothesis.given(logits=_logits, data=st.data())
def test_scores_are_the_formulas_of_probabilities(logits, data):
  labels = data.draw(
      hnp.arrays(np.int64, len(logits), elements=st.integers(0, logits.shape[1] - 1))
  )
  predictions = membership.Predictions(logits, labels)
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  right = p[np.arange(len(p)), labels]
  np.testing.assert_allclose(
      membership.logit_scaled_confidences(predictions),
      np.log(right / (1 - right)), rtol=1e-6, atol=1e-6,
  )
  np.testing.assert_allclose(
      membership._modified_entropies(predictions),
      [
          -sum(
              (1 - q) * np.log(q) if i == label else q * np.log(1 - q)
              for i, q in enumerate(row)
          )
          for row, label in zip(p, labels)
      ],
      rtol=1e-6, atol=1e-9,
  )


def test_scores_of_the_surest_predictions_are_exact():
  predictions = membership.Predictions(
      np.float32([[1000, 0], [0, 1000], [40, 0]]), np.array([0, 0, 1])
  )
  np.testing.assert_array_equal(
      membership.logit_scaled_confidences(predictions), [1000, -1000, -40]
  )
  # Twice the loss, of two classes.
  np.testing.assert_allclose(
      membership._modified_entropies(predictions), [0, 2000, 80], atol=1e-12
  )


@hypothesis.settings(deadline=None)
@hypothesis.given(
    positives=hnp.arrays(np.float64, st.integers(2, 20), elements=st.integers(-5, 5)),
    negatives=hnp.arrays(np.float64, st.integers(2, 20), elements=st.integers(-5, 5)),
)
def test_auc_and_its_variance_are_the_definitions(positives, negatives):
  wins = np.where(
      positives[:, None] == negatives, 0.5, positives[:, None] > negatives
  )
  assert membership.auc(positives, negatives) == pytest.approx(wins.mean())
  estimate = membership.auc_with_interval(positives, negatives)
  stderr = np.sqrt(
      wins.mean(1).var(ddof=1) / len(positives)
      + wins.mean(0).var(ddof=1) / len(negatives)
  )
  assert estimate.value == pytest.approx(wins.mean())
  assert estimate.value == pytest.approx(
      metrics.roc_auc_score(
          np.repeat([1, 0], [len(positives), len(negatives)]),
          np.concatenate([positives, negatives]),
      )
  )
  reach = 1.959963984540054 * stderr  # Of a normal, 95 %.
  assert estimate.low == pytest.approx(max(0.0, wins.mean() - reach), abs=1e-9)
  assert estimate.high == pytest.approx(min(1.0, wins.mean() + reach), abs=1e-9)


def test_the_auc_of_normals_is_in_the_interval():
  rng = np.random.default_rng(0)
  inside = 0
  for _ in range(200):
    estimate = membership.auc_with_interval(
        rng.normal(1.0, size=60), rng.normal(size=60)
    )
    inside += estimate.low <= 0.7602499 <= estimate.high  # Phi(1 / sqrt(2)).
  assert 180 <= inside <= 200


@pytest.mark.parametrize(
    'counts, low, high',
    [
        # Newcombe 1998, table II, method 10.
        ((56, 70, 48, 80), 0.0524, 0.3339),
        ((9, 10, 3, 10), 0.1705, 0.8090),
        ((0, 10, 0, 10), -0.2775, 0.2775),
        ((10, 10, 0, 10), 0.6075, 1.0),
    ],
)
def test_differences_of_proportions_are_newcombes(counts, low, high):
  estimate = membership.difference_with_interval(*counts)
  assert estimate.value == pytest.approx(counts[0] / counts[1] - counts[2] / counts[3])
  assert estimate.low == pytest.approx(low, abs=5e-5)
  assert estimate.high == pytest.approx(high, abs=5e-5)


def test_proportions_are_clopper_and_pearsons():
  assert membership.proportion_with_interval(0, 30) == pytest.approx(
      (0.0, 0.0, 1 - 0.025 ** (1 / 30))
  )
  assert membership.proportion_with_interval(30, 30) == pytest.approx(
      (1.0, 0.025 ** (1 / 30), 1.0)
  )
  # At each end, what was seen has a chance of 2.5 %.
  estimate = membership.proportion_with_interval(7, 40)
  assert scipy.stats.binom.sf(6, 40, estimate.low) == pytest.approx(0.025)
  assert scipy.stats.binom.cdf(7, 40, estimate.high) == pytest.approx(0.025)


def test_the_mean_over_clients_is_students():
  estimate = membership.mean_with_interval([0.4, 0.6, 0.8])
  assert estimate.value == pytest.approx(0.6)
  assert estimate.high - 0.6 == pytest.approx(4.302653 * 0.2 / np.sqrt(3))
  assert membership.mean_with_interval([0.5]).high == np.inf


def test_labels_alone_tell_nothing():
  # All members have label 0, on which the model's loss is small for everybody.
  rng = np.random.default_rng(0)
  labels = np.repeat([0, 1], 500)
  logits = np.float32(rng.normal(size=(1000, 3)))
  logits[:, 0] += 3
  others = membership.Predictions(logits, labels)
  own = np.float32(rng.normal(size=(200, 3)))
  own[:, 0] += 3
  value = membership.infer_by_loss(
      membership.Predictions(own, np.zeros(200, int)), others
  )
  assert value == pytest.approx(0.5, abs=0.07)
  with pytest.raises(ValueError, match='no label that members and non-members share'):
    membership.infer_by_loss(membership.Predictions(own, np.full(200, 2)), others)


def test_the_seed_decides_and_the_callers_numbers_stay(overfitted):
  model, members = overfitted
  both = _predictions(model, members), _predictions(model, _data(200, 1))
  np.random.seed(3)
  expected = np.random.RandomState(3).random(4)
  first = membership.infer_membership(*both, seed=5)
  np.testing.assert_array_equal(np.random.random(4), expected)
  second = membership.infer_membership(*both, seed=5)
  assert first.overall.auc == second.overall.auc
  assert first.overall.advantage == second.overall.advantage


@pytest.mark.parametrize(
    'logits, labels, message',
    [
        (np.zeros((5, 4)), np.zeros(5, int), '20 examples or more, .* found 5'),
        (np.zeros((30, 4)), np.zeros(29, int), r'found \(30, 4\) and \(29,\)'),
        (np.zeros((30, 3)), np.zeros(30, int), 'of the same classes'),
        (np.full((30, 4), np.nan), np.zeros(30, int), 'not finite'),
    ],
)
def test_bad_predictions_are_named(logits, labels, message):
  good = membership.Predictions(np.zeros((30, 4)), np.arange(30) % 4)
  with pytest.raises(ValueError, match=message):
    membership.infer_membership(good, membership.Predictions(logits, labels))


# Likelihood ratios, from shadow models.


@hypothesis.settings(deadline=None)
@hypothesis.given(
    positives=hnp.arrays(np.float64, st.integers(1, 30), elements=st.integers(-5, 5)),
    negatives=hnp.arrays(np.float64, st.integers(1, 30), elements=st.integers(-5, 5)),
    rate=st.sampled_from([0.001, 0.01, 0.1, 0.5, 0.99]),
)
def test_the_true_positive_rate_is_the_best_that_is_allowed(positives, negatives, rate):
  found = membership.tpr_at_fpr(positives, negatives, rate)
  candidates = [-np.inf, *positives, *negatives]
  best = max(
      np.mean(positives > t) for t in candidates if np.mean(negatives > t) <= rate
  )
  assert found.true_positive_rate.value == pytest.approx(best)
  false = found.false_positive_rate
  assert false.value == np.mean(negatives > found.threshold) <= rate + 1e-12
  assert false.low <= false.value <= false.high
  # Only the order counts.
  moved = membership.tpr_at_fpr(np.exp(positives), np.exp(negatives), rate)
  assert moved[:3] == found[:3]
  # And the curve has that point, or passes above it.
  curve = metrics.roc_curve(
      np.repeat([1, 0], [len(positives), len(negatives)]),
      np.concatenate([positives, negatives]), drop_intermediate=False,
  )
  assert curve[1][curve[0] <= rate + 1e-12].max() == pytest.approx(best)


def test_the_interval_holds_what_the_threshold_does_on_further_examples():
  rng = np.random.default_rng(0)
  covered = {0.001: 0, 0.01: 0, 0.1: 0}
  for _ in range(300):
    negatives = rng.random(150)
    for rate in covered:
      found = membership.tpr_at_fpr(np.ones(5), negatives, rate)
      false = found.false_positive_rate
      covered[rate] += false.low <= 1 - found.threshold <= false.high
  # Of 300 intervals at 95 % or more, 275 or more but for one case in 200.
  assert min(covered.values()) >= 275
  # Of few others, a low rate is not known to be low.
  assert membership.tpr_at_fpr(
      np.ones(5), rng.random(150), 0.001
  ).false_positive_rate.high == pytest.approx(1 - 0.025 ** (1 / 150))


@pytest.mark.parametrize('rate', [0.0, 1.0, -0.5])
def test_bad_rates_are_named(rate):
  with pytest.raises(ValueError, match='between 0 and 1, exclusively'):
    membership.tpr_at_fpr(np.ones(3), np.ones(3), rate)
  with pytest.raises(ValueError, match='of positives and of negatives'):
    membership.tpr_at_fpr(np.ones(3), np.ones(0), 0.1)


@pytest.mark.parametrize('fixed_variance', [True, False])
def test_of_known_normals_the_score_is_the_ratio_in_closed_form(fixed_variance):
  # Two values at a distance have exactly this mean and this variance.
  inside, outside = (2.0, 0.5), (-1.0, 3.0)
  shadows = np.array([
      mean + sign * np.sqrt(variance / 2)
      for mean, variance in (inside, outside) for sign in (-1, 1)
  ])
  x = np.linspace(-6, 6, 13)
  arguments = (
      x, np.repeat(shadows[:, np.newaxis], len(x), 1),
      np.repeat([[True], [True], [False], [False]], len(x), 1),
  )
  scores = membership.lira_scores(*arguments, fixed_variance=fixed_variance)
  expected = (
      -0.5 * (x - inside[0]) ** 2 / inside[1] + 0.5 * (x - outside[0]) ** 2 / outside[1]
      - 0.5 * np.log(inside[1] / outside[1])
  )
  np.testing.assert_allclose(scores, expected, rtol=1e-9)
  offline = membership.lira_scores(
      *arguments, online=False, fixed_variance=fixed_variance
  )
  # The source's 1 - P[Z > x], where it does not round to 1.
  np.testing.assert_allclose(
      scipy.stats.norm.cdf(offline),
      1 - scipy.stats.norm.sf(x, outside[0], np.sqrt(outside[1])), rtol=1e-9,
  )


@st.composite
def _shadows(draw):
  """Confidences of a target and of 6 shadow models, and who has what, balanced."""
  n = draw(st.integers(2, 5))
  values = st.floats(-10, 10).map(lambda v: round(v, 2))
  target = draw(hnp.arrays(np.float64, n, elements=values))
  # Distinct, so that no variance is 0.
  confidences = draw(
      hnp.arrays(np.float64, (6, n), elements=values, unique=True)
  )
  return target, confidences, membership.draw_shadow_membership(
      6, n, seed=draw(st.integers(0, 9))
  )


@hypothesis.settings(deadline=None)
@hypothesis.given(shadows=_shadows(), fixed_variance=st.booleans())
def test_scores_are_algorithm_1_example_by_example(shadows, fixed_variance):
  target, confidences, trained = shadows
  groups = [
      [list(confidences[trained[:, j] == kind, j]) for j in range(len(target))]
      for kind in (True, False)
  ]
  pooled = [
      sum(statistics.variance(g) * (len(g) - 1) for g in of_kind)
      / sum(len(g) - 1 for g in of_kind)
      for of_kind in groups
  ]
  for j, x in enumerate(target):
    logs = []
    for of_kind, of_all in zip(groups, pooled):
      variance = of_all if fixed_variance else statistics.variance(of_kind[j])
      distance = x - statistics.fmean(of_kind[j])
      logs.append(-0.5 * distance**2 / variance - 0.5 * math.log(variance))
    z = distance / math.sqrt(variance)  # Of the models without it.
    for online, expected in ((True, logs[0] - logs[1]), (False, z)):
      scores = membership.lira_scores(
          *shadows, online=online, fixed_variance=fixed_variance
      )
      assert scores[j] == pytest.approx(expected, rel=1e-6, abs=1e-6)


@hypothesis.settings(deadline=None)
@hypothesis.given(
    shadows=_shadows(), scale=st.floats(0.1, 10), shift=st.floats(-5, 5),
    online=st.booleans(), fixed_variance=st.booleans(),
)
def test_neither_scale_nor_the_models_order_counts(
    shadows, scale, shift, online, fixed_variance
):
  target, confidences, trained = shadows
  settings = dict(online=online, fixed_variance=fixed_variance)
  scores = membership.lira_scores(*shadows, **settings)
  for other in (
      (scale * target + shift, scale * confidences + shift, trained),
      (target, confidences[::-1], trained[::-1]),
  ):
    np.testing.assert_allclose(
        membership.lira_scores(*other, **settings), scores, rtol=1e-6, atol=1e-6
    )


def test_hard_examples_hide_members_from_the_loss_and_not_from_the_ratio():
  rng = np.random.default_rng(0)
  n, gain, spread = 1000, 1.5, 4.0
  hardness = rng.normal(scale=spread, size=n)
  is_member = np.arange(n) < n // 2
  draw = lambda trained: hardness + gain * trained + rng.normal(size=trained.shape)
  trained = membership.draw_shadow_membership(200, n, seed=1)
  report = membership.infer_by_shadow_models(
      draw(is_member), is_member, draw(trained), trained
  )
  assert report.num_shadow_models == 200 and not report.fixed_variance
  cdf = scipy.stats.norm.cdf
  for finding, expected in (
      (report.online, cdf(gain / np.sqrt(2))),
      (report.offline, cdf(gain / np.sqrt(2))),
      (report.of_shadow, cdf(gain / np.sqrt(2))),
      (report.loss, cdf(gain / np.sqrt(2 + 2 * spread**2))),
  ):
    reach = finding.auc.high - finding.auc.low
    assert finding.auc.value == pytest.approx(expected, abs=reach)
    assert finding.num_members == finding.num_non_members == 500
    assert [d.allowed_rate for d in finding.detections] == [0.001, 0.01]
  # Where 1 % are accused: of a normal at `gain`, what is above the others' 99 %.
  found = report.online.detections[1].true_positive_rate
  expected = cdf(gain - scipy.stats.norm.ppf(0.99))
  assert found.low - 0.05 < expected < found.high + 0.05
  assert report.loss.detections[1].true_positive_rate.high < found.low


def _attack(target, audited, is_member, num_models, ridge=0.1):
  trained = membership.draw_shadow_membership(num_models, len(audited[1]), seed=3)
  confidences = [
      membership.logit_scaled_confidences(
          _predictions(
              _fit(audited[0][rows], audited[1][rows], ridge, seed=10 + number), audited
          )
      )
      for number, rows in enumerate(trained)
  ]
  return membership.infer_by_shadow_models(
      membership.logit_scaled_confidences(_predictions(target, audited)), is_member,
      np.stack(confidences), trained,
  )


def test_shadow_models_find_an_overfitted_model_out(overfitted):
  model, members = overfitted
  audited = tuple(np.concatenate(pair) for pair in zip(members, _data(200, 1)))
  report = _attack(model, audited, np.arange(400) < 200, num_models=8)
  assert report.fixed_variance and report.num_shadow_models == 8
  for finding in (report.online, report.offline, report.of_shadow):
    assert finding.auc.low > 0.8
  for finding in (report.online, report.of_shadow):
    assert finding.detections[1].true_positive_rate.low > 0.2


def test_with_shadow_models_what_was_held_out_is_at_chance(overfitted):
  model, _ = overfitted
  contained = {'online': 0, 'offline': 0, 'loss': 0}
  for seed in range(12):
    report = _attack(model, _data(160, 400 + seed), np.arange(160) < 80, num_models=4)
    assert report.of_shadow is None
    for name in contained:
      estimate = getattr(report, name).auc
      contained[name] += estimate.low <= 0.5 <= estimate.high
  # Of 12 intervals at 95 %, 9 or more but for one case in 450.
  assert min(contained.values()) >= 9


def test_the_pair_of_an_attacked_shadow_model_gives_nothing_away():
  # Confidences that say nothing. If the pair took part, members would have fewer models
  # with them than others have, and the AUC would be below chance.
  rng = np.random.default_rng(0)
  trained = membership.draw_shadow_membership(6, 2000)
  report = membership.infer_by_shadow_models(
      rng.normal(size=2000), np.arange(2000) < 1000, rng.normal(size=(6, 2000)), trained
  )
  assert report.of_shadow.auc.low < 0.5 < report.of_shadow.auc.high
  biased = membership.lira_scores(
      rng.normal(size=2000), rng.normal(size=(5, 2000)), trained[1:]
  )
  found = membership.auc_with_interval(biased[trained[0]], biased[~trained[0]])
  assert found.high < 0.48


@pytest.mark.parametrize('num_examples', [10, 11])
def test_shadow_models_share_the_examples_out(num_examples):
  trained = membership.draw_shadow_membership(6, num_examples, seed=1)
  assert (trained.sum(axis=0) == 3).all()
  assert set(trained.sum(axis=1)) == {num_examples // 2, -(-num_examples // 2)}
  np.testing.assert_array_equal(trained[::2], ~trained[1::2])
  assert len(np.unique(trained, axis=0)) == 6
  again = membership.draw_shadow_membership(6, num_examples, seed=1)
  np.testing.assert_array_equal(trained, again)


def test_models_that_agree_exactly_make_no_infinite_score():
  trained = membership.draw_shadow_membership(4, 10)
  scores = membership.lira_scores(np.arange(10.0), np.zeros((4, 10)), trained)
  assert np.isfinite(scores).all()


def test_bad_shadow_models_are_named():
  trained = membership.draw_shadow_membership(4, 10)
  ok = np.zeros(10), np.arange(10) < 5, np.zeros((4, 10)), trained

  def refuse(message, **changes):
    names = ('target_confidences', 'is_member', 'shadow_confidences', 'shadow_membership')
    with pytest.raises(ValueError, match=message):
      membership.infer_by_shadow_models(**{**dict(zip(names, ok)), **changes})

  refuse('as long as `target_confidences`', is_member=np.zeros(9, bool))
  refuse('two members and two others', is_member=np.arange(10) < 1)
  refuse('of pairs of models', shadow_membership=trained[[0, 2, 1, 3]])
  refuse('of pairs of models', shadow_membership=trained[:3])
  refuse('must be finite', target_confidences=np.full(10, np.inf))
  refuse(r'found \(10,\), \(4, 9\) and', shadow_confidences=np.zeros((4, 9)))
  refuse('too few shadow models', shadow_confidences=np.zeros((2, 10)),
         shadow_membership=trained[:2])
  with pytest.raises(ValueError, match='even, .* 4 or more; found 5'):
    membership.draw_shadow_membership(5, 10)
  with pytest.raises(ValueError, match='even, .* 4 or more; found 2'):
    membership.draw_shadow_membership(2, 10)
  with pytest.raises(ValueError, match='two classes or more'):
    membership.logit_scaled_confidences(
        membership.Predictions(np.zeros((3, 1)), np.zeros(3, int))
    )
