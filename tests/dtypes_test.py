"""Models and data of other dtypes than float32."""

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

from tests import helpers
import tff_kd
from tff_kd import evaluation
from tff_kd.rounds import state as state_lib

_BFLOAT16 = ml_dtypes.bfloat16
_LABELS_OF = np.random.default_rng(0).normal(size=(helpers.DIM, helpers.CLASSES))


def _examples(n, seed, dtype=np.float32):
  x = np.random.default_rng(seed).normal(size=(n, helpers.DIM)).astype(dtype)
  return x, (x.astype(np.float32) @ _LABELS_OF).argmax(-1).astype(np.int32)


def _model_fn(policy, units):
  def build():
    layers = keras.layers
    model = keras.Sequential([
        layers.InputLayer((helpers.DIM,)),
        layers.Dense(units, activation='tanh', dtype=policy),
        layers.Dense(helpers.CLASSES, dtype=policy),
    ])
    rng = np.random.default_rng(1)  # Keras draws others for other dtypes.
    model.set_weights([0.5 * rng.normal(size=w.shape) for w in model.get_weights()])
    return model

  return build


def _process(policy, **kwargs):
  x, y = _examples(40, 100)
  few = dict(num_steps=20, batch_size=20)
  return helpers.build(
      'fed_distillation', student_fn=_model_fn(policy, 8),
      teacher_fn=_model_fn(policy, 16), transfer_set=tff_kd.TransferSet(x, y),
      client_optimizer=helpers.sgd(0.3), teacher_optimizer=helpers.sgd(0.1),
      student_optimizer=helpers.sgd(0.1), distillation=tff_kd.Distillation(**few),
      back_distillation=tff_kd.Distillation(target='teacher', **few), **kwargs,
  )


def _trained(policy, rounds=4, **kwargs):
  process = _process(policy, **kwargs)
  state = process.initialize()
  clients = [helpers.dataset(*_examples(40, seed)) for seed in range(2)]
  for _ in range(rounds):
    output = process.next(state, clients)
    state = output.state
  assert output.metrics['client_work']['participation']['num_included'] == 2
  return process, state, output.metrics['client_work']['train']


@pytest.fixture(scope='module')
def in_float32():
  return _trained('float32')


@pytest.mark.parametrize(
    'policy, tolerance',
    [
        ('float16', 0.05),
        *helpers.slow_each(('bfloat16', 0.2), ('float64', 1e-3), ('mixed_float16', 0.05)),
    ],
)
def test_both_models_learn_as_in_float32(policy, tolerance, in_float32):
  process, state, train = _trained(policy)
  _, expected, expected_train = in_float32
  name = policy.removeprefix('mixed_') if 'mixed' not in policy else 'float32'
  for weights in (state.global_model_weights, state.teacher_weights):
    assert weights.trainable[0].dtype == tf.as_dtype(name)
  for field in ('global_model_weights', 'teacher_weights'):
    helpers.assert_weights_close(
        tf.nest.map_structure(lambda a: a.astype(np.float64), getattr(state, field)),
        getattr(expected, field), atol=tolerance,
    )
  np.testing.assert_allclose(train['loss'], expected_train['loss'], atol=tolerance)
  x, y = _examples(300, 200)
  for spec, weights in (
      (process.student_spec, state.global_model_weights),
      (process.teacher_spec, state.teacher_weights),
  ):
    scores = evaluation.CentralEvaluator(spec).evaluate(weights, x, y)
    assert scores['accuracy'] > 0.7 and scores['loss'] < 0.7
    model = spec.to_keras(weights)
    accuracy = np.mean(np.asarray(model(x), np.float32).argmax(-1) == y)
    assert abs(scores['accuracy'] - accuracy) < 0.01


@pytest.mark.parametrize('policy', ['float64', 'bfloat16', 'float16'])
def test_losses_are_those_of_keras(policy):
  """With padding, with a mask, of numbers: all in float32, as Keras's losses are."""
  dtype = tf.as_dtype(policy)
  rng = np.random.default_rng(0)
  outputs = tf.cast(rng.normal(size=(4, 3)), dtype)
  labels = tf.constant([0, 2, 1, 0])
  mask = tf.constant([1.0, 0.0, 1.0, 1.0])
  for loss, y, kept in (
      (keras.losses.SparseCategoricalCrossentropy(from_logits=True), labels, [0, 2, 3]),
      (
          keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=1),
          labels, [0, 3],
      ),
      (keras.losses.MeanSquaredError(), tf.cast(outputs > 0, dtype), [0, 2, 3]),
  ):
    spec = tff_kd.models.build_model_spec(
        _model_fn(policy, 4), loss_fn=lambda loss=loss: loss,
        input_spec=(
            tf.TensorSpec([None, helpers.DIM]),
            tf.TensorSpec([None, *y.shape[1:]], y.dtype),
        ),
    )
    found = spec.supervised_loss(y, outputs, mask)
    config = loss.get_config()
    config.pop('ignore_class', None)
    expected = type(loss)(**config)(tf.gather(y, kept), tf.gather(outputs, kept))
    assert found.dtype == tf.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize('dtype', [helpers.slow('bfloat16'), 'float16'])
def test_updates_are_summed_in_float32(dtype):
  """In float16, 40 clients' steps times their examples would be infinite."""
  process = helpers.build(
      'fed_avg', student_fn=_model_fn(dtype, 4), client_optimizer=helpers.sgd(4.0)
  )
  assert tff_kd.communication.round_bytes(process).up_model == 4 * (5 * 4 + 4 + 4 * 3 + 3)
  state = process.initialize()
  client = helpers.dataset(*_examples(4000, 0), batch_size=4000)
  one = process.next(state, [client]).state.global_model_weights
  many = process.next(state, [client] * 40)
  assert many.metrics['finalizer']['update_non_finite'] == 0
  # What TFF's factories refuse in 16 bits.
  helpers.build(
      'fed_avg', student_fn=_model_fn(dtype, 4),
      model_aggregator=tff_kd.tff.learning.robust_aggregator(),
  )
  as_float = lambda weights: tf.nest.map_structure(lambda a: a.astype(float), weights)
  helpers.assert_weights_close(
      as_float(many.state.global_model_weights), as_float(one), rtol=1e-2, atol=1e-3
  )


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_the_mean_of_past_students_is_taken_in_float32(dtype):
  """In float16 the sum would be infinite; in bfloat16 the mean of equals is another."""
  students = tff_kd.models.cohorts.build_students(
      [_model_fn(dtype, 4)], input_spec=helpers.INPUT_SPEC, loss_fn=helpers.loss_fn
  )
  initial_history, remember = state_lib.build_history(students, 7)
  weights = tf.nest.map_structure(
      lambda w: np.linspace(2e4, 4e4, w.size).reshape(w.shape).astype(w.dtype),
      students.initial_weights,
  )
  history = initial_history()
  for _ in range(7):
    history, mean = remember(history, weights)
  helpers.assert_weights_close(mean, weights, rtol=0, atol=0)


def test_a_training_in_bfloat16_goes_on(tmp_path):
  process = helpers.build('fed_avg', student_fn=_model_fn('bfloat16', 4))
  clients = [helpers.dataset(*_examples(8, 0))]

  def train(num_rounds, folder):
    return tff_kd.simulation.train(
        process, select_clients=lambda _: clients, num_rounds=num_rounds,
        program_state_manager=tff_kd.simulation.Checkpoints(tmp_path / folder),
    )

  expected = train(2, 'whole').state
  train(1, 'parts')
  resumed = train(2, 'parts')
  assert len(resumed.history) == 1
  helpers.assert_weights_close(
      resumed.state.global_model_weights, expected.global_model_weights, rtol=0
  )


def test_bfloat16_in_files(tmp_path):
  clients = [_examples(12, seed, _BFLOAT16) for seed in range(2)]
  x, y = _examples(20, 9, _BFLOAT16)

  def weights_after(dtype, folder):
    data = tff_kd.FileClientData.from_clients(
        [(its.astype(dtype), labels) for its, labels in clients], directory=folder
    )
    batches = tff_kd.ClientBatches(data=data, batch_size=4, num_epochs=1)
    few = tff_kd.Distillation(num_steps=3, batch_size=10)
    process = helpers.build(
        'fed_df', input_spec=batches.element_spec, client_data=batches, distillation=few,
        student_fn=_model_fn('float32', 4),
        transfer_set=tff_kd.TransferSet(x.astype(dtype), y, directory=folder),
    )
    assert process.student_spec.input_spec[0].dtype == tf.as_dtype(dtype)
    return process.next(process.initialize(), [0, 1]).state.global_model_weights

  found = weights_after(_BFLOAT16, tmp_path)
  helpers.assert_weights_close(found, weights_after(np.float32, None), rtol=1e-6)
  files = {path: path.stat().st_mtime_ns for path in tmp_path.glob('*.bin')}
  # The files are found again.
  again = tff_kd.TransferSet(x, y, directory=tmp_path)
  np.testing.assert_array_equal(again.gather_inputs(tf.range(20)), x)
  data = tff_kd.FileClientData.from_clients(clients, directory=tmp_path)
  expected = np.concatenate([inputs for inputs, _ in clients])
  np.testing.assert_array_equal(data.open()[0], expected)
  assert sum(its.stat().st_mtime_ns == files[its] for its in files) >= 4


def test_bfloat16_in_files_must_be_finite():
  x, y = _examples(3, 0, _BFLOAT16)
  x[1, 2] = np.nan
  with pytest.raises(ValueError, match='must be finite'):
    tff_kd.TransferSet(x)
  with pytest.raises(ValueError, match='must be finite'):
    tff_kd.FileClientData.from_clients([(x, y)])
  with pytest.raises(ValueError, match='of the dtype complex64'):
    tff_kd.TransferSet(np.zeros((3, 2), np.complex64))


def test_bfloat16_datasets_in_files():
  x, y = _examples(6, 0, _BFLOAT16)
  dataset = tf.data.Dataset.from_tensor_slices((tf.constant(x), tf.constant(y)))
  transfer_set = tff_kd.TransferSet.from_dataset(dataset, labelled=True)
  assert transfer_set.inputs_spec.dtype == tf.bfloat16
  np.testing.assert_array_equal(transfer_set.gather_inputs(tf.range(6)), x)
