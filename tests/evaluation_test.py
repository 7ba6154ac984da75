"""Accuracy, calibration, and client by client."""

import numpy as np
import pytest
import scipy.special

from tests import helpers
from tff_kd import evaluation
from tff_kd import models


def _spec(**kwargs):
  return models.build_model_spec(
      helpers.dense_fn(**kwargs), input_spec=helpers.INPUT_SPEC,
      loss_fn=helpers.loss_fn, metrics_fn=helpers.metrics_fn,
  )


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
