"""Accuracy, calibration, and client by client."""

import collections

import keras
import numpy as np
import pytest
import scipy.special
import tensorflow as tf

from tests import helpers
from tff_kd import evaluation
from tff_kd import models


def _spec(**kwargs):
  return helpers.model_spec(helpers.dense_fn(**kwargs), metrics_fn=helpers.metrics_fn)


def test_central_evaluation_matches_numpy():
  spec = _spec()
  x, y = helpers.examples(600, 0)  # More than two batches.
  values = evaluation.CentralEvaluator(spec).evaluate(spec.initial_weights, x, y)
  kernel, bias = spec.initial_weights.trainable
  p = scipy.special.softmax(x @ kernel + bias, -1)
  np.testing.assert_allclose(values['accuracy'], np.mean(p.argmax(-1) == y))
  np.testing.assert_allclose(
      values['loss'], -np.mean(np.log(p[np.arange(600), y])), rtol=1e-5
  )
  # Guo et al., equation 3, by hand.
  confidence, right = p.max(-1), p.argmax(-1) == y
  bins = np.minimum((confidence * 15).astype(int), 14)
  error = sum(
      np.mean(bins == b)
      * abs(right[bins == b].mean() - confidence[bins == b].mean())
      for b in np.unique(bins)
  )
  np.testing.assert_allclose(values['calibration_error'], error, atol=1e-4)


_MAPPINGS = {
    'dict': {'a': 2, 'b': 2}, 'other order': {'b': 2, 'a': 2},
    'ordered': collections.OrderedDict(b=2, a=2),
}


@pytest.mark.parametrize('declared', _MAPPINGS)
def test_several_inputs_are_told_apart_by_name(declared):
  """Not by the order in which a mapping has them."""
  def build():
    inputs = tf.nest.map_structure(lambda n: keras.Input((n,)), _MAPPINGS[declared])
    joined = keras.layers.Concatenate()([inputs['a'], inputs['b']])
    return keras.Model(inputs, keras.layers.Dense(3)(joined))

  rng = np.random.default_rng(0)
  values = dict(zip('ab', rng.normal(size=(2, 4, 2)).astype(np.float32)))
  for mapping in _MAPPINGS.values():
    spec = helpers.model_spec(
        build,
        input_spec=(
            tf.nest.map_structure(lambda n: tf.TensorSpec([None, n]), mapping),
            tf.TensorSpec([None], tf.int32),
        ),
    )
    evaluator = evaluation.CentralEvaluator(spec)
    kernel, bias = spec.initial_weights.trainable
    expected = np.concatenate([values['a'], values['b']], axis=-1) @ kernel + bias
    for other in _MAPPINGS.values():
      inputs = type(other)((name, values[name]) for name in other)
      found = evaluator.outputs(spec.initial_weights, inputs)
      np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
  with pytest.raises(ValueError, match='must have the keys'):
    evaluator.outputs(spec.initial_weights, {'a': values['a'], 'c': values['b']})


@pytest.mark.parametrize('batches', ['pair', 'mapping'])
@pytest.mark.parametrize(
    ('mapping', 'order'), [(dict, 'ba'), (collections.OrderedDict, 'ba'), (dict, 'ab')]
)
def test_clients_inputs_are_told_apart_by_name(mapping, order, batches):
  def build():
    inputs = {name: keras.Input((2,), name=name) for name in 'ab'}
    joined = keras.layers.Concatenate()(list(inputs.values()))
    return keras.Model(inputs, keras.layers.Dense(3)(joined))

  rng = np.random.default_rng(0)
  x = mapping((name, rng.normal(size=(4, 2)).astype(np.float32)) for name in order)
  y = np.array([0, 1, 2, 0], np.int32)
  batch = {'y': y, 'x': x} if batches == 'mapping' else (x, y)
  data = tf.data.Dataset.from_tensor_slices(batch).batch(4)
  process = helpers.build('fed_avg', student_fn=build, input_spec=data.element_spec)
  state = process.initialize()
  joined = np.concatenate([x['a'], x['b']], axis=-1)
  linear = [np.asarray(w) for w in state.global_model_weights.trainable]
  x = {name: x[name] for name in reversed(order)}
  batch = {'x': x, 'y': y} if batches == 'mapping' else (x, y)
  other = tf.data.Dataset.from_tensor_slices(batch).batch(4)
  helpers.assert_weights_close(
      process.next(state, [data, other]).state.global_model_weights.trainable,
      helpers.linear_fit(linear, joined, y, 0.1), rtol=1e-4, atol=1e-6,
  )


def test_calibration_of_known_cases():
  sure = np.array([[50.0, 0.0], [0.0, 50.0]])
  np.testing.assert_allclose(
      evaluation.expected_calibration_error(sure, np.array([0, 1])), 0.0, atol=1e-6
  )
  np.testing.assert_allclose(
      evaluation.expected_calibration_error(sure, np.array([1, 0])), 1.0, atol=1e-6
  )


def test_clients_are_evaluated_each_on_its_own():
  spec = _spec()
  kernel, bias = spec.initial_weights.trainable
  datasets, accuracies = [], []
  for n in (4, 30, 9, 0, 17):
    x, y = helpers.examples(n, n)
    datasets.append(helpers.dataset(x, y))
    if n:
      accuracies.append(np.mean((x @ kernel + bias).argmax(-1) == y))
  evaluator = evaluation.ClientsEvaluator(spec, metric='accuracy')
  result = evaluator.evaluate(spec.initial_weights, datasets)
  assert result.num_clients == 4
  np.testing.assert_allclose(result.mean, np.mean(accuracies), rtol=1e-6)
  np.testing.assert_allclose(result.worst, np.min(accuracies), rtol=1e-6)
  np.testing.assert_allclose(
      result.percentile_10, np.percentile(accuracies, 10), rtol=1e-6
  )


def test_nothing_to_evaluate_is_refused():
  spec = _spec()
  empty = helpers.dataset(*helpers.examples(0, 0))
  with pytest.raises(ValueError, match='No client has an example'):
    evaluation.ClientsEvaluator(spec, metric='accuracy').evaluate(
        spec.initial_weights, [empty]
    )
  with pytest.raises(ValueError, match='accuracy'):
    evaluation.ClientsEvaluator(spec, metric='f1')


def test_what_has_diverged_is_scored_as_wrong():
  logits = np.array([[0.0, 1.0], [np.nan, 0.0], [np.inf, 0.0]], np.float32)
  scores = evaluation.score(logits, np.array([1, 0, 0]), spec=_spec(classes=2))
  assert scores['accuracy'] == pytest.approx(1 / 3)
  assert np.isnan(scores['calibration_error']) and np.isnan(scores['loss'])


def _weighted_metrics():
  return {
      'metrics': [keras.metrics.SparseCategoricalAccuracy(name='plain')],
      'weighted_metrics': [keras.metrics.SparseCategoricalAccuracy(name='weighted')],
  }


@pytest.mark.parametrize('in_spec', [True, False])
def test_weights_count_in_the_loss_and_in_weighted_metrics(in_spec):
  x, y = helpers.examples(40, 0)
  weights = np.random.default_rng(1).uniform(0.5, 3.0, 40).astype(np.float32)
  weights[::4] = 0.0
  labels = np.where(weights > 0, y, -1)
  parts = (x, y, weights)[: 2 + in_spec]
  spec = helpers.model_spec(
      input_spec=helpers.dataset(x, y).element_spec
      if len(parts) == 2 else (*helpers.INPUT_SPEC, tf.TensorSpec([None])),
      metrics_fn=_weighted_metrics,
  )
  found = evaluation.CentralEvaluator(spec).evaluate(
      spec.initial_weights, x, labels, weights
  )
  kernel, bias = spec.initial_weights.trainable
  log_p = scipy.special.log_softmax(x @ kernel + bias, -1)
  counts = weights > 0
  right = log_p.argmax(-1) == y
  loss = -(weights * log_p[np.arange(40), y]).sum() / counts.sum()
  assert found['loss'] == pytest.approx(loss, rel=1e-5)
  assert found['accuracy'] == pytest.approx(right[counts].mean())
  assert found['plain'] == pytest.approx(right[counts].mean())
  assert found['weighted'] == pytest.approx(np.average(right, weights=weights), rel=1e-5)
  assert found['calibration_error'] == pytest.approx(
      evaluation.expected_calibration_error(log_p[counts], y[counts]), abs=1e-5
  )
  with pytest.raises(ValueError, match=r'`sample_weight` must .* found \(39,\)'):
    evaluation.score(log_p, y, spec=spec, sample_weight=weights[1:])
  with pytest.raises(ValueError, match='`sample_weight` must .* -1.0 to'):
    evaluation.score(log_p, y, spec=spec, sample_weight=np.where(counts, weights, -1))


def test_weights_of_a_regression_and_of_positions():
  spec = models.build_model_spec(
      helpers.dense_fn(classes=1),
      input_spec=(tf.TensorSpec([None, helpers.DIM]), tf.TensorSpec([None, 1])),
      loss_fn=keras.losses.MeanSquaredError,
  )
  found = evaluation.score(
      np.float32([[1], [2], [9]]), np.float32([[0], [0], [0]]), spec=spec,
      sample_weight=np.float32([1, 5, 0]),
  )
  assert found == {'rmse': pytest.approx(np.sqrt(2.5)), 'mae': 1.5}
  positions = helpers.model_spec(
      lambda: keras.Sequential([keras.Input((2, 4)), keras.layers.Dense(2)]),
      input_spec=(tf.TensorSpec([None, 2, 4]), tf.TensorSpec([None, 2], tf.int32)),
  )
  logits = np.log(np.float32([[[0.5, 0.5], [0.9, 0.1]], [[0.2, 0.8], [0.6, 0.4]]]))
  found = evaluation.score(
      logits, np.array([[-1, 0], [1, 1]]), spec=positions,
      sample_weight=np.float32([[0, 1], [2, 3]]),
  )
  assert found['accuracy'] == pytest.approx(2 / 3)
  by_hand = -(np.log(0.9) + 2 * np.log(0.8) + 3 * np.log(0.4)) / 3
  assert found['loss'] == pytest.approx(by_hand, rel=1e-5)
