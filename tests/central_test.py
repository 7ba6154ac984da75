"""Training in one place: what ends it, and which weights remain."""

import types

import keras
import numpy as np

from pipelines import central
from tff_kd import data
from tff_kd import models


class _Scores:
  """An evaluator with the validation scores of a script; keeps the weights it saw."""

  def __init__(self, *scores):
    self._scores = list(scores)
    self.weights = []

  def evaluate(self, weights, inputs, labels):
    del inputs, labels
    self.weights.append(weights.trainable[0])
    return {'rmse': self._scores.pop(0)}


def _fit(*scores, **kwargs):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(8, 2)).astype(np.float32)
  examples = data.Examples(x, x @ np.float32([[1.0], [2.0]]))
  model = keras.Sequential([keras.layers.Dense(1, input_shape=(2,))])
  model.compile('adam', 'mse')
  task = types.SimpleNamespace(is_regression=True, metric='rmse', validation=examples)
  evaluator = _Scores(*scores)
  best = central.fit(
      model, evaluator, task, examples, batch_size=4, seed=0,
      **{'max_epochs': 10, **kwargs},
  )
  return best, models.weights_of(model).trainable[0], evaluator.weights


def test_the_best_epoch_remains_and_patience_ends_it():
  best, kept, seen = _fit(0.5, 0.3, 0.4, 0.3, 0.35)
  assert best == 2 and len(seen) == 5  # Not better three times in a row.
  np.testing.assert_array_equal(kept, seen[1])
  assert not np.array_equal(kept, seen[-1])


def test_a_better_score_begins_the_patience_anew():
  best, _, seen = _fit(0.5, 0.6, 0.6, 0.4, 0.5, 0.5, 0.3, max_epochs=7)
  assert best == 7 and len(seen) == 7


def test_several_epochs_a_look():
  best, kept, seen = _fit(0.5, 0.4, 0.3, max_epochs=7, epochs_per_look=3)
  assert best == 9 and len(seen) == 3  # The last look's epochs are whole.
  np.testing.assert_array_equal(kept, seen[-1])


def test_what_is_not_finite_ends_it():
  best, kept, seen = _fit(0.5, float('nan'))
  assert best == 1
  np.testing.assert_array_equal(kept, seen[0])
  best, kept, seen = _fit(float('nan'))
  assert best == 0 and not np.array_equal(kept, seen[0])
