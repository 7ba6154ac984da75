"""Labels of every kind: trained on, distilled, evaluated."""

from typing import NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import helpers
import tff_kd
from tff_kd import evaluation

_RNG = np.random.default_rng(0)
_DIRECTIONS = _RNG.normal(size=(helpers.DIM, 3))


class _Kind(NamedTuple):
  """Labels, and a model for them.

  Attributes:
    labels_of: Makes labels of the scores of three directions, `[n, 3]`.
    loss_fn: The loss.
    units: How many outputs the model has.
    activation: In which it ends.
  """

  labels_of: object
  loss_fn: object
  units: int = 3
  activation: object = None


def _best(scores):
  return scores.argmax(axis=-1)


def _is_positive(scores):
  return scores[:, 0] > 0


def _sparse(**kwargs):
  return lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True, **kwargs)


def _binary(from_logits=True):
  return lambda: keras.losses.BinaryCrossentropy(from_logits=from_logits)


_KINDS = {
    'class numbers': _Kind(lambda s: _best(s).astype(np.int32), _sparse()),
    'class numbers, uint8': _Kind(lambda s: _best(s).astype(np.uint8), _sparse()),
    'class numbers, [n, 1]': _Kind(lambda s: _best(s)[:, np.newaxis], _sparse()),
    'bool as class numbers': _Kind(_is_positive, _sparse(), units=2),
    'one-hot': _Kind(
        lambda s: np.eye(3, dtype=np.float32)[_best(s)],
        lambda: keras.losses.CategoricalCrossentropy(from_logits=True),
    ),
    'one-hot, softmax': _Kind(
        lambda s: np.eye(3, dtype=np.int32)[_best(s)],
        keras.losses.CategoricalCrossentropy, activation='softmax',
    ),
    'one-hot, hinge': _Kind(
        lambda s: np.eye(3, dtype=np.float32)[_best(s)], keras.losses.CategoricalHinge
    ),
    'binary, [n]': _Kind(lambda s: _is_positive(s).astype(np.int32), _binary(), units=1),
    'binary, float [n, 1]': _Kind(
        lambda s: _is_positive(s)[:, np.newaxis].astype(np.float32), _binary(), units=1
    ),
    'binary, bool, sigmoid': _Kind(
        _is_positive, _binary(from_logits=False), units=1, activation='sigmoid'
    ),
    'binary, hinge': _Kind(
        lambda s: np.where(_is_positive(s), 1, -1)[:, np.newaxis], keras.losses.Hinge,
        units=1,
    ),
    # All three agree: as classes of a softmax they would share one.
    'several': _Kind(
        lambda s: np.repeat(_is_positive(s)[:, np.newaxis], 3, axis=1).astype(np.int32),
        _binary(),
    ),
    'several, sigmoid': _Kind(
        lambda s: (s > 0).astype(np.float32), _binary(from_logits=False),
        activation='sigmoid',
    ),
}


def _examples(kind, n, seed):
  x = np.random.default_rng(seed).normal(size=(n, helpers.DIM)).astype(np.float32)
  return x, kind.labels_of(x @ _DIRECTIONS)


def _process(kind, labelled):
  x, y = _examples(kind, 60, 100)
  optimizer = tff_kd.tff.learning.optimizers.build_adam(0.03)
  dense = lambda units: helpers.dense_fn(units, kind.units, activation=kind.activation)
  keras.utils.set_random_seed(0)
  return tff_kd.algorithms.build_fed_distillation(
      student_fn=dense(()), teacher_fn=dense((8,)), loss_fn=kind.loss_fn,
      metrics_fn=lambda: [],
      input_spec=helpers.dataset(*_examples(kind, 4, 0)).element_spec,
      transfer_set=tff_kd.TransferSet(x, y if labelled else None),
      client_optimizer=helpers.sgd(0.3), teacher_optimizer=optimizer,
      student_optimizer=optimizer,
      distillation=tff_kd.Distillation(num_steps=20, batch_size=20),
      back_distillation=tff_kd.Distillation(
          target='teacher', num_steps=20, batch_size=20
      ),
  )


# The others are another dtype, shape or activation of one of these, or as in most tests.
_FAST = ('one-hot, softmax', 'binary, hinge', 'several')


@pytest.mark.parametrize(
    'name, labelled',
    [
        (name, labelled)
        if labelled and name in _FAST or name == 'binary, bool, sigmoid'
        else helpers.slow(name, labelled)
        for labelled in (True, False)
        for name in _KINDS
    ],
)
def test_both_models_learn_and_are_evaluated(name, labelled):
  kind = _KINDS[name]
  process = _process(kind, labelled)
  state = process.initialize()
  clients = [helpers.dataset(*_examples(kind, 40, seed)) for seed in range(2)]
  for _ in range(8):
    output = process.next(state, clients)
    state = output.state
  assert output.metrics['client_work']['participation']['num_included'] == 2
  x, y = _examples(kind, 300, 200)
  for spec, weights in (
      (process.student_spec, state.global_model_weights),
      (process.teacher_spec, state.teacher_weights),
  ):
    scores = evaluation.CentralEvaluator(spec).evaluate(weights, x, y)
    assert scores['accuracy'] > 0.85, (spec.name, scores)
    assert 0.0 <= scores['calibration_error'] < 0.5 and scores['loss'] < 0.7


@pytest.mark.parametrize('name', ['several', 'binary, [n]', 'one-hot'])
def test_scores_in_numpy(name):
  kind = _KINDS[name]
  spec = _process(kind, True).student_spec
  x, y = _examples(kind, 50, 3)
  z = x @ spec.initial_weights.trainable[0] + spec.initial_weights.trainable[1]
  scores = evaluation.CentralEvaluator(spec).evaluate(spec.initial_weights, x, y)
  if name == 'one-hot':
    log_p = z - np.log(np.sum(np.exp(z), axis=-1, keepdims=True))
    accuracy = np.mean(z.argmax(-1) == y.argmax(-1))
    loss = -np.mean(np.sum(y * log_p, axis=-1))
  else:
    y = y.reshape(z.shape)
    accuracy = np.mean((z > 0) == (y > 0))
    loss = np.mean(np.log1p(np.exp(z)) - y * z)
  np.testing.assert_allclose(scores['accuracy'], accuracy)
  np.testing.assert_allclose(scores['loss'], loss, rtol=1e-4)


@pytest.mark.parametrize('t', [1.0, 3.0])
def test_several_labels_are_distilled_each_by_itself(t):
  spec = _process(_KINDS['several'], True).student_spec
  assert spec.logits_shape.as_list() == [3, 1] and spec.is_multi_label
  z, target = _RNG.normal(size=(2, 4, 3)).astype(np.float32)
  p, q = (1 / (1 + np.exp(-a / t)) for a in (target, z))
  expected = t * t * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
  found = tff_kd.losses.kl_divergence(
      *(spec.class_logits(tf.constant(a)) for a in (target, z)), t
  )
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('name, wrong', [('several', 2), ('binary, [n]', -1)])
def test_a_client_whose_labels_are_not_binary_is_left_out(name, wrong):
  kind = _KINDS[name]
  process = _process(kind, True)
  x, y = _examples(kind, 8, 0)
  bad = y.copy()
  bad.reshape(-1)[0] = wrong
  metrics = process.next(
      process.initialize(), [helpers.dataset(x, y), helpers.dataset(x, bad)]
  ).metrics['client_work']
  assert metrics['participation']['num_excluded_bad_labels'] == 1
  assert metrics['participation']['num_included'] == 1
