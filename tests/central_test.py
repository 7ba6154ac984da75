"""Training in one place: what ends it, and which weights remain."""

import types

import keras
import numpy as np
import tensorflow as tf

from pipelines import central
from tff_kd import data
from tff_kd import models


def _regression(n):
  """Examples of a linear function, and the spec of a model of it."""
  x = np.random.default_rng(0).normal(size=(n, 2)).astype(np.float32)
  spec = models.build_model_spec(
      lambda: keras.Sequential([keras.layers.Dense(1)]),
      input_spec=(tf.TensorSpec([None, 2]), tf.TensorSpec([None, 1])),
      loss_fn=keras.losses.MeanSquaredError,
  )
  return data.Examples(x, x @ np.float32([[1.0], [2.0]])), spec


def _fit(*scores, **kwargs):
  """The best epoch, the weights that remain, and those that were evaluated."""
  examples, spec = _regression(8)
  scores, seen = list(scores), []

  def evaluate(weights):
    seen.append(weights.trainable[0])
    return {'rmse': scores.pop(0)}

  task = types.SimpleNamespace(
      metric='rmse', validation=(), is_lower_better=lambda: True
  )
  kept, best = central.fit(
      central.Training(spec, examples, batch_size=4, seed=0),
      types.SimpleNamespace(evaluate=evaluate), task, **{'max_epochs': 10, **kwargs},
  )
  return best, kept.trainable[0], seen


def test_a_training_equals_keras():
  examples, spec = _regression(6)
  training = central.Training(spec, examples, batch_size=4, seed=3)
  training.run(2)
  model = spec.to_keras(spec.initial_weights)
  model.compile('adam', 'mse')
  order = np.random.default_rng(3)
  rows = np.concatenate([order.permutation(6) for _ in range(2)])
  model.fit(*examples.take(rows), batch_size=4, shuffle=False, verbose=0)
  np.testing.assert_allclose(
      training.weights.trainable[0], model.get_weights()[0], rtol=1e-5
  )


def test_a_weighted_training_equals_keras():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(6, 2)).astype(np.float32)
  y = np.array([0, 1, -1, 1, 0, -1], np.int32)  # Those of weight 0 may be anything.
  weights = np.array([1.0, 2.0, 0.0, 0.5, 3.0, 0.0], np.float32)
  loss_fn = lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True)
  spec = models.build_model_spec(
      lambda: keras.Sequential([keras.layers.Dense(2)]),
      input_spec=(tf.TensorSpec([None, 2]), tf.TensorSpec([None], tf.int32)),
      loss_fn=loss_fn,
  )
  training = central.Training(
      spec, data.Examples(x, y, weights), batch_size=4, seed=3
  )
  training.run(2)
  model = spec.to_keras(spec.initial_weights)
  model.compile('adam', loss_fn())
  order = np.random.default_rng(3)
  rows = np.concatenate([order.permutation(6) for _ in range(2)])
  model.fit(
      x[rows], np.maximum(y, 0)[rows], sample_weight=weights[rows], batch_size=4,
      shuffle=False, verbose=0,
  )
  np.testing.assert_allclose(
      training.weights.trainable[0], model.get_weights()[0], rtol=1e-5
  )


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
