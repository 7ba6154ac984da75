"""Regressions and padded sequences, from the loss to whole rounds."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from tff_kd.compat import tff

import tff_kd
from tff_kd import evaluation
from tff_kd import knowledge
from tff_kd import losses
from tff_kd import models
from tests import helpers

_PAD = 0


def _sequence_model(units=4, classes=5):
  layers = keras.layers
  return keras.Sequential([
      layers.Input((6,), dtype=tf.int32), layers.Embedding(classes, units),
      layers.Dense(classes),
  ])


_sequence_loss = helpers.loss_with(ignore_class=_PAD)
_SEQUENCES = (
    tf.TensorSpec([None, 6], tf.int32), tf.TensorSpec([None, 6], tf.int32)
)


def _regression_model(units=4):
  return keras.Sequential([
      keras.layers.Dense(units, activation='relu', input_shape=(3,)),
      keras.layers.Dense(1),
  ])


_NUMBERS = (tf.TensorSpec([None, 3], tf.float32), tf.TensorSpec([None], tf.float32))


def _spec_of_sequences(**kwargs):
  return models.build_model_spec(
      _sequence_model, input_spec=_SEQUENCES, loss_fn=_sequence_loss, **kwargs
  )


def _spec_of_numbers():
  return models.build_model_spec(
      _regression_model, input_spec=_NUMBERS, loss_fn=keras.losses.MeanSquaredError
  )


def _regression(**kwargs):
  return dict(
      student_fn=_regression_model, input_spec=_NUMBERS,
      loss_fn=keras.losses.MeanSquaredError, client_optimizer=helpers.sgd(0.05),
      **kwargs,
  )


def _cross_entropy(logits, labels):
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return -np.take_along_axis(log_p, labels[..., None], -1)[..., 0]


@pytest.mark.parametrize('mask', [None, [1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
def test_padding_counts_nowhere(mask):
  spec = _spec_of_sequences(metrics_fn=helpers.metrics_fn)
  assert spec.ignored_label == _PAD and not spec.is_regression
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(3, 6, 5)).astype(np.float32)
  labels = rng.integers(1, 5, (3, 6)).astype(np.int32)
  labels[0, 2:] = _PAD
  labels[2] = _PAD
  weights = (labels != _PAD) * (np.ones(3) if mask is None else np.array(mask))[:, None]
  batch = tf.constant(labels), tf.constant(logits)
  mask = None if mask is None else tf.constant(mask)
  loss = spec.supervised_loss(*batch, mask)
  each = _cross_entropy(logits, labels)
  expected = (each * weights).sum() / max(weights.sum(), 1.0)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  state = spec.metrics.update(
      spec.metrics.initial_state(), *batch, spec.metric_mask(*batch, mask)
  )
  right = (logits.argmax(-1) == labels) * weights
  np.testing.assert_allclose(
      spec.metrics.result(state)['accuracy'], right.sum() / max(weights.sum(), 1),
      rtol=1e-6,
  )


def test_all_padding_has_no_loss_and_no_gradient():
  spec = _spec_of_sequences()
  zeros = tf.zeros([2, 6], tf.int32)
  values = spec.values(spec.initial_weights)
  with tf.GradientTape() as tape:
    tape.watch(values.trainable)
    loss = spec.supervised_loss(zeros, spec.call(values, zeros).outputs)
  assert float(loss) == 0.0
  for gradient in tape.gradient(loss, values.trainable):
    assert np.all(tf.convert_to_tensor(gradient).numpy() == 0.0)


def test_local_distillation_leaves_padding_out():
  rng = np.random.default_rng(1)
  target, own = (tf.constant(rng.normal(size=(2, 6, 5)), tf.float32) for _ in range(2))
  counted = tf.constant(rng.integers(0, 2, (2, 6)), tf.float32)
  step = tff_kd.client.local_terms.LocalStep(
      inputs=None, logits=own, labels=tf.ones([2, 6], tf.int32), labelled=None,
      target_logits=target, supervised_loss=tf.constant(0.0), step_num=tf.constant(0),
      weights=[], received=[], counted=counted,
  )
  loss = tff_kd.LocalDistillation(weight=1.0)(tf.constant(0.0), step)
  each = losses.kl_divergence(target, own).numpy()
  np.testing.assert_allclose(
      loss, (each * counted.numpy()).sum() / counted.numpy().sum(), rtol=1e-5
  )
  regression = step._replace(is_regression=True, counted=None)
  loss = tff_kd.LocalDistillation(weight=1.0)(tf.constant(0.0), regression)
  np.testing.assert_allclose(loss, np.mean((target - own) ** 2), rtol=1e-5)


def test_scores():
  sequences = _spec_of_sequences()
  logits = np.eye(5, dtype=np.float32)[np.array([[1, 2, 3, 0, 0, 0]])] * 9
  labels = np.array([[1, 2, 4, 0, 0, 0]])
  found = evaluation.score(logits, labels, spec=sequences)
  assert found['accuracy'] == pytest.approx(2 / 3)
  numbers = _spec_of_numbers()
  assert numbers.is_regression
  found = evaluation.score(
      np.array([[1.0], [5.0]], np.float32), np.array([1.0, 1.0]), spec=numbers
  )
  assert found == {'rmse': pytest.approx(np.sqrt(8)), 'mae': pytest.approx(2.0)}
  assert evaluation.score_names(numbers) == tuple(found)


def test_a_regression_is_distilled_by_squared_distance():
  rng = np.random.default_rng(2)
  x = rng.normal(size=(40, 3)).astype(np.float32)
  y = (x @ np.array([1.0, -2.0, 0.5]) + 3.0).astype(np.float32)
  clients = [
      tf.data.Dataset.from_tensor_slices((x[k::2], y[k::2])).batch(5) for k in range(2)
  ]
  process = tff_kd.algorithms.build_fed_distillation(
      teacher_fn=lambda: _regression_model(16),
      transfer_set=tff_kd.TransferSet(x[:20]), back_distillation=None, **_regression(),
  )
  state = process.initialize()
  spec = process.teacher_spec
  evaluator = evaluation.CentralEvaluator(spec)
  before = evaluator.evaluate(state.teacher_weights, x, y)['rmse']
  for _ in range(15):
    output = process.next(state, clients)
    state = output.state
  after = evaluator.evaluate(state.teacher_weights, x, y)['rmse']
  assert after < 0.5 * before
  # The first loss of the teacher is the mean squared distance to the ensemble.
  measured = output.metrics['server_distillation']['teacher']
  assert 0.0 <= measured['last_loss'] < 5.0


def test_what_compares_classes_is_refused_for_a_regression():
  transfer_set = tff_kd.TransferSet(np.zeros((4, 3), np.float32))
  with pytest.raises(ValueError, match='MeanProbabilities is about classes'):
    tff_kd.algorithms.build_fed_df(
        transfer_set=transfer_set, consensus_rule=knowledge.MeanProbabilities(),
        **_regression(),
    )
  with pytest.raises(ValueError, match='leave `temperature` at 1'):
    tff_kd.algorithms.build_fed_df(
        transfer_set=transfer_set,
        distillation=tff_kd.Distillation(temperature=3.0), **_regression(),
    )


def _build_for_numbers(name):
  x = np.zeros((4, 3), np.float32)
  parts = dict(
      transfer_set=lambda: tff_kd.TransferSet(x),
      negatives=lambda: x,
      teacher_fn=lambda: _regression_model,
      mentor_fn=lambda: _regression_model,
      generator_steps=lambda: 2,
  )
  return helpers.build_with_parts(
      name, parts, metrics_fn=None,
      **_regression(client_data=helpers.batches(
          [(x, np.zeros(4, np.float32))], batch_size=2, num_epochs=1
      )),
  )


# A refusal is quick. Of those that are built, a distillation is above, and here is one.
_BUILT_OFTEN = 'fed_md'
_PAGE = (helpers.ROOT / 'docs' / 'choosing.md').read_text()
(_ROW,) = (its for its in _PAGE.splitlines() if its.startswith('| a regression |'))
_NAMED = set(re.findall('`([a-z_]+)`', _ROW))


@pytest.mark.parametrize(
    'name',
    [
        helpers.slow(its) if its in _NAMED - {_BUILT_OFTEN} else its
        for its in tff_kd.algorithms.REGISTRY
    ],
)
def test_the_page_on_choosing_names_the_algorithms_without_classes(name):
  if name in _NAMED:
    _build_for_numbers(name)
    return
  with pytest.raises(ValueError, match='class') as refusal:
    _build_for_numbers(name)
  assert 'in user code' not in str(refusal.value)
  if 'is about classes' in str(refusal.value):
    assert all(its in str(refusal.value) for its in _NAMED)


def test_masked_regression_labels():
  spec = _spec_of_numbers()
  labels, outputs = np.array([1.0, 2.0, 9.0]), np.array([[2.0], [4.0], [0.0]])
  loss = spec.supervised_loss(
      tf.constant(labels, tf.float32), tf.constant(outputs, tf.float32),
      tf.constant([1.0, 1.0, 0.0]),
  )
  assert float(loss) == pytest.approx((1 + 4) / 2)
  assert isinstance(spec.weights_type, tff.StructType)


@pytest.mark.parametrize('size', [6, 4])  # As many examples as positions, or fewer.
def test_examples_without_labels_leave_out_all_their_positions(size):
  spec = helpers.model_spec(_sequence_model, input_spec=_SEQUENCES)
  rng = np.random.default_rng(3)
  logits = rng.normal(size=(size, 6, 5)).astype(np.float32)
  labels = rng.integers(0, 5, (size, 6)).astype(np.int32)
  mask = np.arange(size) % 3 > 0
  loss = spec.supervised_loss(
      tf.constant(labels), tf.constant(logits), tf.constant(mask, tf.float32)
  )
  np.testing.assert_allclose(loss, _cross_entropy(logits, labels)[mask].mean(), rtol=1e-5)


def _of_length(length, recurrent=False):
  def build():
    keras.utils.set_random_seed(0)
    layers = keras.layers
    return keras.Sequential([
        layers.Input((length,), dtype='int32'), layers.Embedding(5, 3),
        layers.GRU(4, return_sequences=True)  # In a graph, it forgets the length.
        if recurrent else layers.Conv1D(4, 2, padding='same', activation='relu'),
        layers.Dense(5),
    ])

  return build


def _next_tokens(n, length, seed):
  x = np.random.default_rng(seed).integers(0, 5, (n, length)).astype(np.int32)
  return x, (x + 1) % 5


def _fusion_of_sequences(length):
  x, y = _next_tokens(12, 6, 9)
  few = tff_kd.Distillation(num_steps=3, batch_size=6)
  return tff_kd.algorithms.build_fed_distillation(
      student_fn=_of_length(length), teacher_fn=_of_length(length),
      loss_fn=helpers.loss_fn, metrics_fn=helpers.metrics_fn,
      input_spec=(tf.TensorSpec([None, length], tf.int32),) * 2,
      transfer_set=tff_kd.TransferSet(x, y, label_mask=np.arange(12) < 8),
      client_optimizer=helpers.sgd(0.5), distillation=few,
      back_distillation=tff_kd.Distillation(target='teacher', num_steps=3, batch_size=6),
  )


@helpers.shared
def _fusion_of_sequences_of_any_length():
  return _fusion_of_sequences(None)


@pytest.mark.slow
def test_sequences_of_any_length_are_distilled_as_those_of_a_fixed_one():
  clients = [helpers.dataset(*_next_tokens(8, 6, seed)) for seed in range(2)]
  free, fixed = (
      process.next(process.initialize(), clients)
      for process in (_fusion_of_sequences_of_any_length(), _fusion_of_sequences(6))
  )
  for name in ('global_model_weights', 'teacher_weights'):
    helpers.assert_weights_close(
        getattr(free.state, name), getattr(fixed.state, name), rtol=1e-5, atol=1e-6
    )
  helpers.assert_weights_close(
      free.metrics['client_work'], fixed.metrics['client_work'], rtol=1e-5
  )


def test_clients_sequences_may_have_other_lengths_than_the_transfer_set():
  process = _fusion_of_sequences_of_any_length()
  clients = [helpers.dataset(*_next_tokens(8, n, seed)) for seed, n in enumerate([3, 9])]
  output = process.next(process.initialize(), clients)
  assert output.metrics['client_work']['participation']['num_included'] == 2
  spec = process.student_spec
  x, y = _next_tokens(5, 11, 0)
  scores = evaluation.CentralEvaluator(spec).evaluate(spec.initial_weights, x, y)
  logits = spec.to_keras(spec.initial_weights)(x).numpy()
  np.testing.assert_allclose(scores['accuracy'], np.mean(logits.argmax(-1) == y))


# Without a recurrent layer, and of other lengths at the server, in the test before.
@pytest.mark.slow
def test_models_that_clients_keep_take_sequences_of_any_length():
  data = tff_kd.FileClientData.from_clients(
      [_next_tokens(6, 6, seed) for seed in range(2)]
  )
  x, _ = _next_tokens(10, 4, 9)
  process = tff_kd.algorithms.build_fed_md(
      student_fn=_of_length(None, recurrent=True), client_optimizer=helpers.sgd(0.5),
      loss_fn=helpers.loss_fn, input_spec=(tf.TensorSpec([None, None], tf.int32),) * 2,
      transfer_set=tff_kd.TransferSet(x),
      client_data=tff_kd.ClientBatches(data=data, batch_size=3, num_epochs=1),
  )
  states = [process.initialize_client()] * 2
  output = process.next(process.initialize(), [0, 1], states)
  assert output.metrics['client_work']['participation']['num_included'] == 2
  shared = output.state.shared
  assert shared.logits.shape == (10, 4, 5) and np.all(np.isfinite(shared.logits))


def test_a_length_that_only_the_model_tells():
  """As of datasets whose batches are padded to no fixed length."""

  def build():
    layers = keras.layers
    inputs = keras.Input((6,), dtype='int32')
    x = layers.Flatten()(layers.Embedding(5, 3)(inputs))
    return keras.Model(inputs, layers.Dense(2)(x))

  labels = tf.TensorSpec([None], tf.int32)
  spec = helpers.model_spec(
      build, input_spec=(tf.TensorSpec([None, None], tf.int32), labels)
  )
  assert spec.outputs_shape.as_list() == [2]
  model = spec.to_keras(spec.initial_weights)
  assert model.input_shape == (None, 6)

  class Flat(keras.Model):

    def __init__(self):
      super().__init__()
      self.embed, self.dense = keras.layers.Embedding(5, 3), keras.layers.Dense(2)

    def call(self, x):
      x = keras.ops.reshape(self.embed(x), (-1, 18))
      return self.dense(x)

  with pytest.raises(ValueError, match='tried with a length of 16.*keras.Input'):
    helpers.model_spec(Flat, input_spec=(tf.TensorSpec([None, None], tf.int32), labels))
