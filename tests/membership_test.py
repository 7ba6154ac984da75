"""Membership inference: it finds what is there, and nothing where there is nothing."""

import hypothesis
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import keras
import numpy as np
import pytest
import tensorflow as tf

from tff_kd.privacy import membership


def _data(n, seed, dim=10, classes=4):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, classes, n)
  return np.float32(rng.normal(size=(n, dim))), labels


def _predictions(model, data):
  return membership.Predictions(model.predict(data[0], verbose=0), data[1])


@pytest.fixture(scope='module')
def overfitted():
  """A model that knows random labels by heart."""
  keras.utils.set_random_seed(0)
  model = keras.Sequential([
      keras.layers.Dense(64, 'relu'), keras.layers.Dense(4)
  ])
  model.compile(
      keras.optimizers.Adam(0.01),
      keras.losses.SparseCategoricalCrossentropy(from_logits=True),
  )
  members = _data(200, 0)
  model.fit(*members, epochs=60, batch_size=20, verbose=0)
  return model, members


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
  few = tuple(its[:12] for its in members)
  value = membership.infer_by_loss(
      _predictions(model, few), _predictions(model, _data(300, 1))
  )
  assert value > 0.9


def test_what_was_held_out_is_at_chance(overfitted):
  model, _ = overfitted
  contained = {'auc': 0, 'advantage': 0, 'worst': 0}
  for seed in range(20):
    report = membership.infer_membership(
        _predictions(model, _data(200, 100 + seed)),
        _predictions(model, _data(200, 200 + seed)),
        seed=seed,
    )
    for name, its, chance in (
        ('auc', report.overall.auc, 0.5),
        ('advantage', report.overall.advantage, 0.0),
        ('worst', report.worst_class.auc, 0.5),
    ):
      contained[name] += its.low <= chance <= its.high
  # Of 20 intervals at 95 %, 16 or more but for one case in 300.
  assert min(contained.values()) >= 16


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
