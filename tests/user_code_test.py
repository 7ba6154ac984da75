"""Models, losses and optimizers mean in a round what they mean in Keras."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tff_kd.compat import tff

from tests import helpers
import tff_kd
from tff_kd import internals

layers = keras.layers
_LIMIT = tf.constant(0.5)  # Made eagerly, outside of everything.


def _eager_round(build, loss_fn, x, y, rate=0.1, optimizer=None):
  """One client's step in plain Keras: the weights after it, and the loss."""
  model = build()
  optimizer = optimizer or keras.optimizers.SGD(rate)
  optimizer.build(model.trainable_variables)
  with tf.GradientTape() as tape:
    loss = loss_fn()(y, model(x, training=True)) + tf.add_n([0.0, *model.losses])
  optimizer.apply(tape.gradient(loss, model.trainable_variables))
  return [v.numpy() for v in model.trainable_variables], float(loss)


def _round(build, loss_fn, x, y, **kwargs):
  """The same as a round with one client."""
  process = helpers.build(
      'fed_avg', student_fn=build, loss_fn=loss_fn, metrics_fn=None, **kwargs
  )
  state = process.initialize()
  output = process.next(state, [helpers.dataset(x, y, batch_size=len(x))])
  return (
      output.state.global_model_weights.trainable,
      output.metrics['client_work']['train']['loss'],
  )


class _NotZero(keras.losses.Loss):
  """Counts only labels that are not 0, by `!=` on tensors."""

  def call(self, y_true, y_pred):
    each = keras.losses.sparse_categorical_crossentropy(
        y_true, y_pred, from_logits=True
    )
    return each * tf.cast(y_true != 0, tf.float32) * _LIMIT


@keras.saving.register_keras_serializable(package='tff_kd_tests')
class _MaskedMean(layers.Layer):
  """Pools by `==` on tensors."""

  def call(self, x):
    there = tf.cast(tf.logical_not(x == 0.0), x.dtype)
    return x * there / (1.0 + tf.reduce_sum(there, axis=1, keepdims=True))


class _TwoBranches(layers.Layer):

  def call(self, x):
    return tf.cond(tf.reduce_min(x) < _LIMIT, lambda: 2.0 * x, lambda: -x)


def _with(layer):
  def build():
    keras.utils.set_random_seed(1)
    return keras.Sequential([
        layers.InputLayer((helpers.DIM,)), layer(), layers.Dense(helpers.CLASSES)
    ])

  return build


def _all_layers():
  return keras.Sequential([
      _MaskedMean(), _TwoBranches(), layers.Dense(4, kernel_regularizer='l2'),
      layers.Dense(3, kernel_constraint='non_neg'),
  ])


@pytest.mark.parametrize(
    ['build', 'loss_fn'],
    [
        pytest.param(_with(_all_layers), _NotZero, id='all'),
        # One by one.
        helpers.slow(_with(lambda: layers.Dense(3)), _NotZero, id='loss'),
        helpers.slow(_with(_MaskedMean), helpers.loss_fn, id='equal'),
        helpers.slow(_with(_TwoBranches), helpers.loss_fn, id='cond'),
        helpers.slow(
            _with(lambda: layers.Dense(3, kernel_regularizer='l2')), helpers.loss_fn,
            id='regularizer',
        ),
        helpers.slow(
            _with(lambda: layers.Dense(3, kernel_constraint='non_neg')), helpers.loss_fn,
            id='constraint',
        ),
    ],
)
def test_a_round_is_a_step_of_keras(build, loss_fn):
  x, y = helpers.examples(8, 3)
  x[::2, 0] = 0.0
  expected, expected_loss = _eager_round(build, loss_fn, x, y)
  weights, loss = _round(build, loss_fn, x, y)
  helpers.assert_weights_close(weights, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)


@pytest.mark.parametrize(
    'name', ['Nadam', *helpers.slow_each('Adafactor', 'Adam', 'Ftrl', 'Lion')]
)
def test_keras_optimizers_are_those_of_keras(name):
  build = _with(lambda: layers.Dense(3))
  x, y = helpers.examples(8, 3)
  make = getattr(keras.optimizers, name)
  expected, _ = _eager_round(build, helpers.loss_fn, x, y, optimizer=make(0.01))
  weights, _ = _round(
      build, helpers.loss_fn, x, y, client_optimizer=lambda: make(0.01)
  )
  helpers.assert_weights_close(weights, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('policy', [helpers.slow('float64'), 'mixed_bfloat16'])
def test_policies(policy):
  def build():
    keras.utils.set_random_seed(1)
    return keras.Sequential([
        layers.InputLayer((helpers.DIM,)),
        layers.Dense(4, activation='relu', dtype=policy),
        layers.BatchNormalization(dtype=policy),
        layers.Dense(helpers.CLASSES, dtype=policy),
    ])

  x, y = helpers.examples(8, 3)
  expected, _ = _eager_round(build, helpers.loss_fn, x, y)
  weights, _ = _round(build, helpers.loss_fn, x, y)
  assert weights[0].dtype == np.dtype('float64' if policy == 'float64' else 'float32')
  tolerance = 1e-6 if policy == 'float64' else 2e-2
  helpers.assert_weights_close(weights, expected, rtol=tolerance, atol=tolerance)


def test_the_servers_models_keep_their_constraints():
  process = helpers.build(
      'fed_distillation',
      teacher_fn=_with(lambda: layers.Dense(3, kernel_constraint='non_neg')),
      transfer_set=tff_kd.TransferSet(helpers.examples(16, 9)[0]),
      distillation=tff_kd.Distillation(num_steps=4, batch_size=8),
      teacher_optimizer=helpers.sgd(5.0),
  )
  state = process.next(
      process.initialize(), [helpers.dataset(*helpers.examples(8, 1))]
  ).state
  assert np.min(state.teacher_weights.trainable[0]) >= 0.0


class _OwnTerm(tff_kd.client.local_terms.LocalTerm):
  """Python's `if` and `==` on tensors, as AutoGraph reads them."""

  def __call__(self, loss, step):
    if tf.reduce_mean(step.logits) == 12345.0:
      loss = loss * 0.0
    else:
      loss = loss + 1.0
    return loss


def test_terms_and_schedules_may_branch_on_tensors():
  x, y = helpers.examples(8, 3)
  build = _with(lambda: layers.Dense(3))
  _, plain = _round(build, helpers.loss_fn, x, y)

  def rate(round_num):
    if round_num > 0:
      return 0.1
    return 0.0

  process = helpers.build(
      'fed_avg', student_fn=build, local_terms=[_OwnTerm()], learning_rate_fn=rate
  )
  state = process.initialize()
  first = process.next(state, [helpers.dataset(x, y, batch_size=8)])
  loss = first.metrics['client_work']['train']['loss']
  np.testing.assert_allclose(loss, plain + 1.0, rtol=1e-6)
  helpers.assert_weights_close(
      first.state.global_model_weights, state.global_model_weights, rtol=0
  )
  second = process.next(first.state, [helpers.dataset(x, y, batch_size=8)])
  assert np.any(
      second.state.global_model_weights.trainable[0]
      != state.global_model_weights.trainable[0]
  )


def test_an_adapted_normalization_keeps_its_numbers():
  x, y = helpers.examples(32, 3)

  def build():
    normalization = layers.Normalization()
    normalization.adapt(5.0 + x)
    return keras.Sequential([normalization, layers.Dense(helpers.CLASSES)])

  process = helpers.build('fed_avg', student_fn=build)
  state = process.initialize()
  assert not state.global_model_weights.non_trainable
  after = process.next(state, [helpers.dataset(5.0 + x, y)]).state
  model = process.to_keras(after)
  np.testing.assert_allclose(model.layers[0].mean, [(5.0 + x).mean(0)], rtol=1e-5)
  np.testing.assert_allclose(
      model(x), process.student_spec.logits(after.global_model_weights, x), rtol=1e-5
  )


def _conv_binary(seed):
  def build():
    keras.utils.set_random_seed(seed)
    return keras.Sequential([
        layers.InputLayer((helpers.DIM,)), layers.Reshape((helpers.DIM, 1)),
        layers.Conv1D(2, 2, activation='relu'), layers.GlobalAveragePooling1D(),
        layers.Dense(1),
    ])

  return build


class _OwnBinary(keras.losses.Loss):

  def call(self, y_true, y_pred):
    return keras.losses.binary_crossentropy(y_true, y_pred, from_logits=True)


@pytest.mark.parametrize(
    'loss_fn',
    [
        helpers.slow(lambda: keras.losses.BinaryCrossentropy(from_logits=True)),
        _OwnBinary,
    ],
)
def test_whether_outputs_are_logits_does_not_depend_on_the_weights(loss_fn):
  spec = (
      tf.TensorSpec([None, helpers.DIM]), tf.TensorSpec([None, 1])
  )
  for seed in range(12):
    built = tff_kd.models.build_model_spec(
        _conv_binary(seed), input_spec=spec, loss_fn=loss_fn
    )
    assert built.from_logits


def test_a_variable_that_keras_does_not_know_is_refused():
  hidden = tf.Variable(1.0)

  class Hidden(layers.Layer):

    def call(self, x):
      return x * hidden

  with pytest.raises(ValueError, match='tf.Variable'):
    helpers.build('fed_avg', student_fn=_with(Hidden))


def _dropout_fn():
  keras.utils.set_random_seed(0)
  return keras.Sequential([
      layers.InputLayer((helpers.DIM,)), layers.Dense(16), layers.Dropout(0.5),
      layers.Dense(helpers.CLASSES),
  ])


def test_dropout_follows_from_seed_round_and_client():
  batches = helpers.batches([helpers.examples(8, 0)] * 2, shuffle=False)

  @helpers.shared
  def build(seed):
    return helpers.build(
        'fed_avg', student_fn=_dropout_fn, client_data=batches, seed=seed
    )

  def weights(client, round_num=0, seed=0, build=build):
    process = build(seed)
    state = process.initialize()._replace(round_num=np.int32(round_num))
    return process.next(state, [client]).state.global_model_weights.trainable[0]

  first = weights(0)
  np.testing.assert_array_equal(first, weights(0, build=build.anew))
  # The same examples in the same order: only the masks differ.
  for other in (weights(1), weights(0, round_num=1), weights(0, seed=1)):
    assert np.any(first != other)


@pytest.mark.parametrize('kind', ['sequential', 'subclassed', 'bidirectional', 'unused'])
def test_states_of_recurrent_layers_are_those_before_any_call(kind):
  """Not what the calls left there by which the model was looked at."""

  class Half(layers.Layer):
    """Calls one of two recurrent layers."""

    def __init__(self, used):
      super().__init__()
      self.used, self.unused = used, layers.GRU(3, stateful=True)

    def build(self, input_shape):
      self.used.build(input_shape)

    def call(self, x):
      return self.used(x)

  def parts():
    recurrent = layers.GRU(3, stateful=True)
    if kind == 'bidirectional':
      recurrent = layers.Bidirectional(recurrent)
    if kind == 'unused':
      recurrent = Half(recurrent)
    return [
        layers.Dense(2, bias_initializer='ones'), recurrent,
        layers.Dense(helpers.CLASSES),
    ]

  class Subclassed(keras.Model):

    def __init__(self):
      super().__init__()
      self.parts = parts()

    def call(self, x):
      for layer in self.parts:
        x = layer(x)
      return x

  def build():
    if kind == 'subclassed':
      return Subclassed()
    return keras.Sequential([layers.InputLayer(batch_shape=(4, 3, 2)), *parts()])

  spec = helpers.model_spec(
      build, input_spec=(tf.TensorSpec([4, 3, 2]), tf.TensorSpec([4], tf.int32))
  )
  states = spec.values(spec.initial_weights).local
  assert len(states) == (2 if kind == 'bidirectional' else 1)
  for state in states:
    np.testing.assert_array_equal(state, np.zeros((4, 3)))
  x = np.random.default_rng(0).normal(size=(4, 3, 2)).astype('f')
  model = build()
  model(np.zeros_like(x))
  model.set_weights(spec.initial_weights.trainable)
  for layer in internals.all_layers(model):
    if getattr(layer, 'states', None) is not None:
      layer.reset_state()
  expected = model(x)
  np.testing.assert_allclose(spec.logits(spec.initial_weights, x), expected, rtol=1e-5)
  np.testing.assert_allclose(
      spec.to_keras(spec.initial_weights)(x), expected, rtol=1e-5
  )


def test_a_fixed_batch_with_outputs_of_another_dtype_than_the_model():
  """As Keras advises for mixed precision: the last layer in float32."""
  def build():
    inputs = keras.Input(batch_shape=(4, helpers.DIM))
    x = layers.Dense(4, dtype='mixed_bfloat16')(inputs)
    model = keras.Model(inputs, layers.Dense(helpers.CLASSES, dtype='float32')(x))
    model.dtype_policy = keras.DTypePolicy('mixed_bfloat16')
    return model

  spec = helpers.model_spec(build)
  x, _ = helpers.examples(6, 0)
  whole = spec.logits(spec.initial_weights, tf.constant(x[:4]))
  found = spec.logits(spec.initial_weights, tf.constant(x))
  assert found.shape == (6, helpers.CLASSES)
  np.testing.assert_allclose(found[:4], whole, rtol=1e-5)


def test_a_fixed_batch_of_examples_in_files():
  x, y = helpers.examples(11, 0)
  batches = helpers.batches([(x, y)], shuffle=False, drop_remainder=True)

  def build():
    return keras.Sequential([
        layers.InputLayer(batch_shape=(4, helpers.DIM)), layers.Dense(helpers.CLASSES)
    ])

  process = helpers.build('fed_avg', student_fn=build, client_data=batches)
  state = process.initialize()
  linear = [np.asarray(w) for w in state.global_model_weights.trainable]
  for start in (0, 4):
    rows = slice(start, start + 4)
    linear = helpers.linear_fit(linear, x[rows], y[rows], 0.1)
  output = process.next(state, [0])
  helpers.assert_weights_close(
      output.state.global_model_weights.trainable, linear, rtol=1e-4, atol=1e-6
  )


def test_recurrent_layers_with_states_begin_anew():
  def build():
    return keras.Sequential([
        layers.InputLayer(batch_shape=(4, 3, 2)),
        layers.GRU(3, stateful=True), layers.Dense(helpers.CLASSES),
    ])

  x = np.random.default_rng(0).normal(size=(8, 3, 2)).astype('f')
  y = np.arange(8).astype(np.int32) % helpers.CLASSES
  data = tf.data.Dataset.from_tensor_slices((x, y)).batch(4, drop_remainder=True)
  process = helpers.build('fed_avg', student_fn=build, input_spec=data.element_spec)
  state = process.initialize()
  assert not state.global_model_weights.non_trainable
  output = process.next(state, [data, data])
  assert output.metrics['client_work']['participation']['num_included'] == 2


def test_types_are_those_of_keras():
  spec = helpers.model_spec(_dropout_fn)
  assert spec.is_random
  assert str(spec.weights_type) == (
      '<trainable=<float32[5,16],float32[16],float32[16,3],float32[3]>,non_trainable=<>>'
  )
  assert isinstance(spec.weights_type, tff.StructType)
