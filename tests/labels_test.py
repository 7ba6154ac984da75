"""Labels of every kind: trained on, distilled, evaluated."""


from absl import logging
import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import helpers
from tests.label_kinds import LABELS
import tff_kd
from tff_kd import evaluation

_RNG = np.random.default_rng(0)


def _dense_fn(kind, units=()):
  return helpers.dense_fn(units, kind.units, activation=kind.activation)


def _common(kind):
  return dict(
      loss_fn=kind.loss_fn, metrics_fn=lambda: [],
      input_spec=helpers.dataset(*kind.examples(4, 0)).element_spec,
  )


@helpers.shared
def _spec(name):
  kind = LABELS[name]
  return tff_kd.models.build_model_spec(_dense_fn(kind), **_common(kind))


def _process(kind, labelled):
  x, y = kind.examples(60, 100)
  optimizer = tff_kd.tff.learning.optimizers.build_adam(0.03)
  keras.utils.set_random_seed(0)
  return tff_kd.algorithms.build_fed_distillation(
      **_common(kind), student_fn=_dense_fn(kind), teacher_fn=_dense_fn(kind, (8,)),
      transfer_set=tff_kd.TransferSet(x, y if labelled else None),
      client_optimizer=helpers.sgd(0.3), teacher_optimizer=optimizer,
      student_optimizer=optimizer,
      distillation=tff_kd.Distillation(num_steps=20, batch_size=20),
      back_distillation=tff_kd.Distillation(
          target='teacher', num_steps=20, batch_size=20
      ),
  )


# The others are another dtype, shape or activation of one of these, or as in most tests.
_FAST = ('one-hot, softmax', 'several', 'binary, bool, sigmoid')


@pytest.mark.parametrize(
    'name, labelled',
    [
        (name, labelled)
        if labelled == (name != 'binary, bool, sigmoid') and name in _FAST
        else helpers.slow(name, labelled)
        for labelled in (True, False)
        for name in LABELS
    ],
)
def test_both_models_learn_and_are_evaluated(name, labelled):
  kind = LABELS[name]
  process = _process(kind, labelled)
  state = process.initialize()
  clients = [helpers.dataset(*kind.examples(40, seed)) for seed in range(2)]
  for _ in range(8):
    output = process.next(state, clients)
    state = output.state
  assert output.metrics['client_work']['participation']['num_included'] == 2
  x, y = kind.examples(300, 200)
  for spec, weights in (
      (process.student_spec, state.global_model_weights),
      (process.teacher_spec, state.teacher_weights),
  ):
    scores = evaluation.CentralEvaluator(spec).evaluate(weights, x, y)
    assert scores['accuracy'] > 0.85, (spec.name, scores)
    assert 0.0 <= scores['calibration_error'] < 0.5 and scores['loss'] < 0.7


@pytest.mark.parametrize('name', ['several', 'binary, [n]', 'one-hot'])
def test_scores_in_numpy(name):
  kind, spec = LABELS[name], _spec(name)
  x, y = kind.examples(50, 3)
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
  spec = _spec('several')
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
  kind = LABELS[name]
  process = tff_kd.algorithms.build_fed_avg(
      **_common(kind), student_fn=_dense_fn(kind), client_optimizer=helpers.sgd()
  )
  x, y = kind.examples(8, 0)
  bad = y.copy()
  bad.reshape(-1)[0] = wrong
  metrics = process.next(
      process.initialize(), [helpers.dataset(x, y), helpers.dataset(x, bad)]
  ).metrics['client_work']
  assert metrics['participation']['num_excluded_bad_labels'] == 1
  assert metrics['participation']['num_included'] == 1


def _files(labels, weights=None):
  """Client data of clients with these labels."""
  clients = []
  for k, y in enumerate(labels):
    parts = (_RNG.normal(size=(len(y), helpers.DIM)).astype(np.float32), np.int32(y))
    clients.append(parts if weights is None else (*parts, np.float32(weights[k])))
  return helpers.batches(clients)


@pytest.mark.parametrize(
    ('labels', 'weights', 'message'),
    [
        # Some clients lack the highest class: they would take part, each label wrong.
        ([[1, 2], [2, 3], [1]], None, 'from 0 to 2, .* found 1 to 3. .* subtract 1'),
        ([[0, 5], [-2]], None, 'from 0 to 2, .* found -2 to 5. Mend them'),
        ([[0, 1], [1, 7]], [[1, 1], [1, 0]], None),
        ([[0, 1], [], [2]], None, None),
        ([[1, 3], [2, -9]], [[1, 1], [1, 0]], '.* found 1 to 3.* subtract 1'),
    ],
)
def test_labels_in_files_are_looked_at_before_the_first_round(labels, weights, message):
  batches = _files(labels, weights)
  build = lambda: helpers.build(
      'fed_avg', client_data=batches, input_spec=batches.element_spec
  )
  if message is None:
    build()
    return
  with pytest.raises(ValueError, match=f"labels of the clients' data must be {message}"):
    build()


def test_some_clients_with_wrong_labels_are_named_and_left_out(monkeypatch):
  warnings = []
  monkeypatch.setattr(logging, 'warning', lambda m, *a: warnings.append(m % a))
  process = helpers.build('fed_avg', client_data=_files([[0, 2], [1], [3, 1, 0], []]))
  (warning,) = warnings
  assert '1 of 3 clients' in warning and 'found 0 to 3' in warning
  output = process.next(process.initialize(), [0, 1, 2])
  counts = output.metrics['client_work']['participation']
  assert counts['num_included'] == 2 and counts['num_excluded_bad_labels'] == 1


def test_labels_that_no_client_has_may_be_anything(monkeypatch):
  warnings = []
  monkeypatch.setattr(logging, 'warning', lambda m, *a: warnings.append(m % a))
  x = np.zeros((6, helpers.DIM), np.float32)
  for unused in (-1, 3):  # Not known; or as if all were counted from 1.
    labels = np.array([1, 2, 1, *[unused] * 3], np.int32)
    data = tff_kd.FileClientData.from_arrays((x, labels), [[0, 1], [2], []])
    data.check_labels(helpers.loss_fn(), (helpers.CLASSES,))
  assert not warnings


@pytest.mark.parametrize(
    ('dtype', 'labels'),
    [('bool', [0, 1, 1]), ('uint8', [0, 1, 255]), ('int8', [0, 1, -1]),
     ('float32', [0, 1, -1])],
)
def test_an_ignored_label_below_0_is_none_of_other_types(dtype, labels):
  spec = tff_kd.models.build_model_spec(
      helpers.dense_fn(), input_spec=(
          tf.TensorSpec([None, helpers.DIM]), tf.TensorSpec([None], dtype)
      ),
      loss_fn=helpers.loss_with(ignore_class=-1),
  )
  given = tf.constant(np.array(labels).astype(dtype))
  np.testing.assert_array_equal(
      spec.counted_labels(given), [its != -1 for its in labels]
  )
  assert bool(spec.usable_labels(given)[1]) == (255 in labels)


def _task(labels, **kwargs):
  x = np.zeros((3, helpers.DIM), np.float32)
  parts = {name: tff_kd.data.Examples(x, np.array(y)) for name, y in labels.items()}
  return helpers.task(tff_kd.data.Examples(x, np.arange(3)), **kwargs, **parts)


def test_labels_of_a_task():
  _task({'transfer': [0, 1, -1]}, num_labelled=2)
  _task({'test': [0, 1, 9]}, loss_fn=helpers.loss_with(ignore_class=9))
  for labels, message in (
      ({'clients': [1, 2, 3]}, 'part `clients`, must be from 0 to 2, .* subtract 1'),
      ({'test': [0, 1, 3]}, 'part `test`, must be from 0 to 2, .* found 0 to 3. Mend'),
      ({'transfer': [0, 1, -1]}, 'part `transfer`, .* found -1 to 1'),
      ({'validation': ['a', 'b', 'c']}, 'must be numbers, found .* Encode them'),
  ):
    with pytest.raises(ValueError, match=message):
      _task(labels)
