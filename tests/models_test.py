"""Any Keras model in, its weights back out, and clear refusals."""

import collections

import keras
import numpy as np
import pytest
import tensorflow as tf
from tff_kd.compat import tff

import tff_kd
from tests import helpers
from tff_kd.models import zoo

layers = keras.layers


class _Subclassed(keras.Model):
  """Unbuilt until called; draws its loss and its dropout in `call`."""

  def __init__(self):
    super().__init__()
    self.dense = layers.Dense(6, activation='relu')
    self.head = layers.Dense(helpers.CLASSES)

  def call(self, inputs, training=False):
    x = self.dense(inputs)
    if training:
      x = tf.nn.dropout(x, 0.2)
    self.add_loss(1e-3 * tf.reduce_sum(tf.square(self.dense.kernel)))
    return self.head(x)


def _functional():
  inputs = layers.Input((helpers.DIM,))
  x = layers.Dense(6, activation='relu')(inputs)
  x = layers.Concatenate()([x, inputs])
  return keras.Model(inputs, layers.Dense(helpers.CLASSES)(x))


def _batch_norm():
  return keras.Sequential([
      layers.Dense(6), layers.BatchNormalization(momentum=0.5), layers.ReLU(),
      layers.Dense(helpers.CLASSES),
  ])


def _dropout():
  return keras.Sequential([
      layers.Dense(6, activation='relu'), layers.Dropout(0.5),
      layers.Dense(helpers.CLASSES),
  ])


def _regularized():
  return keras.Sequential([
      layers.Dense(helpers.CLASSES, kernel_regularizer=keras.regularizers.L2(0.1))
  ])


def _frozen():
  return keras.Sequential([
      layers.InputLayer((helpers.DIM,)),
      layers.Dense(6, activation='relu', trainable=False),
      layers.BatchNormalization(),
      layers.BatchNormalization(trainable=False),
      layers.Dense(helpers.CLASSES),
  ])


def _compiled():
  model = helpers.dense_fn((4,))()
  model.compile('adam', 'mse')
  return model


def _all_kinds():
  """All of the above but the subclassed one."""
  inputs = layers.Input((helpers.DIM,))
  x = layers.Dense(6, activation='relu', trainable=False)(inputs)
  x = layers.BatchNormalization(trainable=False)(x)
  x = layers.Dropout(0.5)(layers.ReLU()(layers.BatchNormalization(momentum=0.5)(x)))
  x = layers.Concatenate()([x, inputs])
  regularizer = keras.regularizers.L2(0.1)
  outputs = layers.Dense(helpers.CLASSES, kernel_regularizer=regularizer)(x)
  model = keras.Model(inputs, outputs)
  model.compile('adam', 'mse')
  return model


@pytest.mark.parametrize(
    'student_fn, teacher_fn',
    [
        (_all_kinds, _Subclassed), helpers.slow(_Subclassed, _all_kinds),
        *(
            helpers.slow(its, its)
            for its in (
                _functional, _batch_norm, _dropout, _regularized, _frozen, _compiled
            )
        ),
    ],
)
def test_every_kind_of_model_trains_on_both_sides(student_fn, teacher_fn):
  process = helpers.build(
      'fed_distillation', student_fn=student_fn, teacher_fn=teacher_fn,
      transfer_set=tff_kd.TransferSet(helpers.examples(16, 9)[0]),
      distillation=tff_kd.Distillation(num_steps=3, batch_size=8),
      back_distillation=tff_kd.Distillation(
          target='teacher', num_steps=3, batch_size=8
      ),
  )
  state = process.initialize()
  data = [helpers.dataset(*helpers.examples(n, n)) for n in (8, 12)]
  output = process.next(state, data)
  assert output.metrics['client_work']['participation']['num_included'] == 2
  assert np.isfinite(output.metrics['client_work']['train']['loss'])
  x, _ = helpers.examples(4, 0)
  student = process.to_keras(output.state)
  teacher = process.teacher_to_keras(output.state)
  assert np.isfinite(student(x)).all() and np.isfinite(teacher(x)).all()
  np.testing.assert_allclose(
      student(x), process.student_spec.logits(output.state.global_model_weights, x),
      rtol=1e-6,
  )
  for before, after in (
      (state.global_model_weights, output.state.global_model_weights),
      (state.teacher_weights, output.state.teacher_weights),
  ):
    assert any(
        np.abs(a - b).max() > 0
        for a, b in zip(before.trainable, after.trainable)
    )
    # Those of batch norm that trains.
    for a, b in zip(before.non_trainable, after.non_trainable):
      assert np.abs(a - b).max() > 1e-3


@pytest.mark.parametrize(
    'optimizer',
    [helpers.sgd(0.1, 0.9), helpers.slow(lambda: keras.optimizers.SGD(0.1, 0.9))],
)
def test_one_feature_a_position(optimizer):
  """A gradient of a kernel [1, units], whose shape TensorFlow does not know."""
  x, y = helpers.examples(8, 0, dim=6)
  x, y = x[..., np.newaxis], np.tile(y[:, np.newaxis], 6)
  batches = helpers.dataset(x, y, batch_size=8)
  build = lambda: keras.Sequential(
      [layers.InputLayer((6, 1)), layers.Dense(helpers.CLASSES)]
  )
  process = helpers.build(
      'fed_avg', student_fn=build, input_spec=batches.element_spec,
      client_optimizer=optimizer,
  )
  state = process.initialize()
  model = process.to_keras(state)
  for _ in range(2):
    state = process.next(state, [batches.repeat(2)]).state
    # Momentum begins anew with the round.
    model.compile(keras.optimizers.SGD(0.1, 0.9), helpers.loss_fn())
    model.fit(batches, epochs=2, verbose=0)
  helpers.assert_weights_close(
      state.global_model_weights.trainable, model.get_weights(), rtol=1e-4, atol=1e-6
  )


def test_initial_weights_are_the_builders():
  trained = helpers.dense_fn((4,))().get_weights()

  def build():
    model = helpers.dense_fn((4,))()
    for variable, value in zip(model.variables, trained):
      variable.assign(value)
    return model

  process = helpers.build('fed_avg', student_fn=build)
  helpers.assert_weights_close(
      process.initialize().global_model_weights.trainable, trained,
      rtol=0,
  )


def test_batch_norm_statistics_are_the_weighted_mean_of_the_clients():
  process = helpers.build(
      'fed_avg', student_fn=_batch_norm, client_optimizer=helpers.sgd(0.0),
      server_optimizer=tff.learning.optimizers.build_adam(0.1),
  )
  state = process.initialize()
  kernel, bias = state.global_model_weights.trainable[:2]
  clients = [helpers.examples(n, n) for n in (4, 12)]
  state = process.next(
      state, [helpers.dataset(x, y, batch_size=16) for x, y in clients]
  ).state
  means, variances = [], []
  for x, _ in clients:
    z = x @ kernel + bias
    means.append(0.5 * z.mean(0))
    variances.append(0.5 + 0.5 * z.var(0))
  weights = np.array([4, 12]) / 16
  mean, variance = state.global_model_weights.non_trainable
  np.testing.assert_allclose(mean, weights @ np.array(means), atol=1e-5)
  np.testing.assert_allclose(variance, weights @ np.array(variances), atol=1e-5)


def test_frozen_values_never_move_and_never_travel():
  process = helpers.build('fed_avg', student_fn=_frozen)
  state = process.initialize()
  after = process.next(state, [helpers.dataset(*helpers.examples(8, 1))]).state
  # Two of batch norm that trains; neither those of the frozen one nor its weights.
  assert [w.shape for w in state.global_model_weights.non_trainable] == [(6,), (6,)]
  assert np.abs(after.global_model_weights.non_trainable[0]).max() > 0
  sizes = tff_kd.communication.round_bytes(process)
  trained = 4 * (2 * 6 + 2 * 6 + 6 * 3 + 3)
  assert sizes.up_model == sizes.down == trained
  first, second = process.to_keras(state), process.to_keras(after)
  helpers.assert_weights_close(
      first.layers[0].weights + first.layers[2].weights,
      second.layers[0].weights + second.layers[2].weights,
      rtol=0,
  )


def test_regularization_is_in_the_gradient():
  process = helpers.build('fed_avg', student_fn=_regularized)
  state = process.initialize()
  x, y = helpers.examples(4, 1)
  model = process.to_keras(state)
  expected, loss = helpers.eager_step(
      lambda: helpers.loss_fn()(y, model(x)) + tf.add_n(model.losses),
      model.trainable_variables,
  )
  output = process.next(state, [helpers.dataset(x, y)])
  helpers.assert_weights_close(
      output.state.global_model_weights.trainable, expected, atol=1e-6
  )
  np.testing.assert_allclose(
      output.metrics['client_work']['train']['loss'], loss, rtol=1e-6
  )


def test_dropout_acts_in_training_only():
  spec = helpers.model_spec(_dropout)
  x, _ = helpers.examples(64, 0)

  def outputs(training, seed):
    values = spec.values(spec.initial_weights, tf.constant([seed, 0]))
    return spec.call(values, x, training=training).outputs.numpy()

  np.testing.assert_array_equal(outputs(False, 0), outputs(False, 1))
  np.testing.assert_array_equal(outputs(True, 0), outputs(True, 0))
  assert np.any(outputs(True, 0) != outputs(True, 1))
  # Each call goes on from what the one before left.
  values = spec.values(spec.initial_weights, tf.constant([0, 0]))
  first = spec.call(values, x, training=True)
  assert np.any(first.outputs != spec.call(first.values, x, training=True).outputs)


def _two_inputs(kind):
  a, b = layers.Input((3,), name='a'), layers.Input((2,), name='b')
  out = layers.Dense(helpers.CLASSES)(layers.Concatenate()([a, b]))
  return keras.Model({'a': a, 'b': b} if kind == 'dict' else (a, b), out)


@pytest.mark.parametrize(
    'kind, mapping_batches',
    [
        ('dict', True),
        *helpers.slow_each(('tuple', False), ('dict', False), ('tuple', True)),
    ],
)
def test_several_inputs(kind, mapping_batches):
  def inputs(n, seed):
    a, b = helpers.examples(n, seed, 3)[0], helpers.examples(n, seed, 2)[0]
    return collections.OrderedDict(a=a, b=b) if kind == 'dict' else (a, b)

  def dataset(n):
    x, y = inputs(n, n), helpers.examples(n, n)[1]
    elements = collections.OrderedDict(x=x, y=y) if mapping_batches else (x, y)
    return tf.data.Dataset.from_tensor_slices(elements).batch(4)

  process = helpers.build(
      'fed_distillation', student_fn=lambda: _two_inputs(kind),
      input_spec=dataset(2).element_spec, teacher_fn=lambda: _two_inputs(kind),
      transfer_set=tff_kd.TransferSet(inputs(10, 0)),
      distillation=tff_kd.Distillation(num_steps=2),
  )
  output = process.next(process.initialize(), [dataset(6), dataset(9)])
  assert output.metrics['client_work']['participation']['num_included'] == 2
  assert output.metrics['server_distillation']['teacher']['num_targets'] == 10


def test_softmax_models_exchange_log_probabilities():
  """A model with softmax and one with logits, same weights: same round."""
  results = []
  for activation, from_logits in ((None, True), ('softmax', False)):
    keras.utils.set_random_seed(0)
    build = helpers.dense_fn((6,), activation=activation)
    process = helpers.build(
        'fed_df', student_fn=build,
        loss_fn=helpers.loss_with(from_logits=from_logits),
        transfer_set=tff_kd.TransferSet(helpers.examples(12, 0)[0]),
        distillation=tff_kd.Distillation(num_steps=2),
    )
    output = process.next(
        process.initialize(), [helpers.dataset(*helpers.examples(8, 1))]
    )
    results.append(output.state)
  helpers.assert_weights_close(
      results[0].global_model_weights, results[1].global_model_weights, atol=1e-4
  )


def test_a_single_sigmoid_logit():
  # Without a layer whose units may all be 0: a logit of 0 is on neither side.
  build = helpers.dense_fn(classes=1)
  x, _ = helpers.examples(12, 0)
  data = tf.data.Dataset.from_tensor_slices(
      (x, (x[:, :1] > 0).astype(np.float32))
  ).batch(4)
  # What it teaches and learns is in `labels_test`.
  process = helpers.build(
      'fed_avg', student_fn=build, input_spec=data.element_spec,
      client_optimizer=helpers.sgd(0.0),
      loss_fn=lambda: keras.losses.BinaryCrossentropy(from_logits=True),
      metrics_fn=lambda: [keras.metrics.BinaryAccuracy(threshold=0.0)],
  )
  state = process.initialize()
  train = process.next(state, [data]).metrics['client_work']['train']
  predicted = process.to_keras(state)(x)[:, 0] > 0
  assert train['binary_accuracy'] == pytest.approx(np.mean(predicted == (x[:, 0] > 0)))


class _HalfLoss(keras.losses.Loss):

  def call(self, y_true, y_pred):
    return 0.5 * keras.losses.sparse_categorical_crossentropy(
        y_true, y_pred, from_logits=True
    )


class _CountOf(keras.metrics.Metric):
  """A user's metric whose constructor takes an argument Keras knows nothing of."""

  def __init__(self, label, name='count_of'):
    super().__init__(name=name)
    self.label = label
    self.count = self.add_weight(name='count', initializer='zeros')

  def update_state(self, y_true, y_pred, sample_weight=None):
    self.count.assign_add(
        tf.reduce_sum(tf.cast(tf.equal(y_true, self.label), tf.float32))
    )

  def result(self):
    return self.count


def test_own_loss_and_metric():
  process = helpers.build('fed_avg', loss_fn=_HalfLoss, metrics_fn=lambda: [_CountOf(1)])
  state = process.initialize()
  clients = [helpers.examples(n, n) for n in (8, 5)]
  output = process.next(state, [helpers.dataset(x, y) for x, y in clients])
  train = output.metrics['client_work']['train']
  assert train['count_of'] == sum((y == 1).sum() for _, y in clients)
  full = helpers.fed_avg()
  full_output = full.next(
      full.set_model_weights(full.initialize(), state.global_model_weights),
      [helpers.dataset(*clients[0], batch_size=8)],
  )
  half_output = process.next(
      state, [helpers.dataset(*clients[0], batch_size=8)]
  )
  np.testing.assert_allclose(
      half_output.metrics['client_work']['train']['loss'],
      full_output.metrics['client_work']['train']['loss'] / 2,
      rtol=1e-6,
  )


def _refused(match, error=ValueError, **kwargs):
  with pytest.raises(error, match=match):
    helpers.model_spec(**{'name': 'student', **kwargs})


def test_softmax_under_a_from_logits_loss_is_refused():
  _refused(
      'student ends in softmax.*from_logits=True',
      keras_model_fn=helpers.dense_fn(activation='softmax'),
  )

  class HiddenSoftmax(_Subclassed):

    def call(self, inputs, training=False):
      return tf.nn.softmax(super().call(inputs, training))

  _refused('student ends in softmax', keras_model_fn=HiddenSoftmax)
  _refused(
      'ends in sigmoid',
      keras_model_fn=helpers.dense_fn(classes=1, activation='sigmoid'),
      loss_fn=lambda: keras.losses.BinaryCrossentropy(from_logits=True),
  )


def test_logits_under_a_probability_loss_are_refused():
  _refused('are not probabilities', loss_fn=helpers.loss_with(from_logits=False))


def test_what_is_no_builder_of_a_keras_model_is_refused():
  _refused('must be a function', TypeError, keras_model_fn=helpers.dense_fn()())
  _refused('must return a `keras.Model`', TypeError, keras_model_fn=lambda: 3)
  tf_keras = pytest.importorskip('tf_keras')
  _refused(
      'Keras 2', TypeError,
      keras_model_fn=lambda: tf_keras.Sequential([tf_keras.layers.Dense(3)]),
  )

  class OwnStep(keras.Sequential):

    def train_step(self, data):
      return {}

  _refused(
      'train_step', keras_model_fn=lambda: OwnStep([layers.Dense(helpers.CLASSES)])
  )


def test_a_model_made_before_is_used_as_it_is():
  model = helpers.dense_fn((4,))()
  x, _ = helpers.examples(6, 0)
  before = model(x).numpy()
  process = helpers.build('fed_avg', student_fn=lambda: model)
  state = process.initialize()
  np.testing.assert_allclose(
      process.student_spec.logits(state.global_model_weights, x), before, rtol=1e-6
  )
  process.next(state, [helpers.dataset(*helpers.examples(8, 1))])
  np.testing.assert_array_equal(model(x), before)  # Rounds leave the user's alone.


def test_pairs_with_other_outputs_are_refused():
  with pytest.raises(ValueError, match=r'same shape.*\(3,\).*\(4,\)'):
    helpers.build(
        'fed_distillation', teacher_fn=helpers.dense_fn(classes=4),
        transfer_set=tff_kd.TransferSet(helpers.examples(4, 0)[0]),
    )


def test_specs_that_do_not_fit_are_refused():
  x, y = helpers.examples(8, 0)
  _refused(
      'does not take inputs', input_spec=helpers.dataset(x[:, :3], y).element_spec
  )
  _refused(
      'batch dimension',
      input_spec=tf.data.Dataset.from_tensor_slices((x, y)).element_spec,
  )
  _refused(
      'does not take labels',
      input_spec=helpers.dataset(x, np.zeros([8, 7], 'f')).element_spec,
  )
  _refused('must return a scalar', loss_fn=helpers.loss_with(reduction='none'))


@pytest.mark.parametrize(
    'student, teacher',
    [('cnn', 'cnn'), ('mlp_small', 'mlp_large'), ('resnet', 'resnet')],
)
def test_ready_pairs(student, teacher, tmp_path):
  for build in (zoo.STUDENTS[student], zoo.TEACHERS[teacher]):
    model = build(10, (28, 28, 1))
    x = np.random.default_rng(0).normal(size=(3, 28, 28, 1)).astype('f')
    outputs = model(x)
    assert outputs.shape == (3, 10)
    assert np.any(np.asarray(outputs) < 0)  # Logits.
    model.save(tmp_path / 'model.keras')
    loaded = keras.models.load_model(tmp_path / 'model.keras')
    np.testing.assert_allclose(loaded(x), outputs, atol=1e-6)
  assert (
      zoo.TEACHERS[teacher](10, (28, 28, 1))(x).shape
      == zoo.STUDENTS[student](10, (28, 28, 1))(x).shape
  )


def test_mlp_sizes():
  student, teacher = zoo.SmallMlp(), zoo.LargeMlp()
  x = np.zeros([1, 784], 'f')
  student(x), teacher(x)
  assert [w.shape.as_list() for w in student.weights] == [
      [784, 32], [32], [32, 10], [10]
  ]
  assert [w.shape.as_list() for w in teacher.weights] == [
      [784, 64], [64], [64, 32], [32], [32, 10], [10]
  ]
