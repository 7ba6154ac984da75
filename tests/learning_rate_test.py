"""Learning rates that follow the rounds."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tff_kd.compat import tff

import tff_kd
from tests import helpers
from tff_kd import optimizers

RATES = (0.3, 0.02, 0.1)
# Of different sizes: fewer than a batch, and several.
DATA = [helpers.examples(n, n) for n in (3, 9)]


def _learning_rate(round_num):
  return tf.gather(tf.constant(RATES), round_num)


@pytest.fixture(scope='module')
def batches():
  return helpers.batches(DATA, num_epochs=2)


def _build(name, batches, rate, **kwargs):
  keras.utils.set_random_seed(0)
  return helpers.build(
      name, client_optimizer=helpers.sgd(rate), client_data=batches, **kwargs
  )


@pytest.mark.parametrize('name', ['fed_avg', helpers.slow('fd')])
def test_each_round_has_its_rate(name, batches):
  scheduled = _build(name, batches, 123.0, learning_rate_fn=_learning_rate)
  is_private = isinstance(scheduled, tff_kd.StatefulClientsProcess)

  def advance(process, state, clients):
    if is_private:
      output = process.next(state, [0, 1], clients)
      return output.state, output.client_states
    return process.next(state, [0, 1]).state, clients

  def models(state, clients):
    return [c.weights for c in clients] if is_private else state.global_model_weights

  # A state carries the optimizer's own rate.
  constant = _build(name, batches, 123.0)
  state, clients = scheduled.initialize(), None
  if is_private:
    clients = [scheduled.initialize_client()] * 2
  for rate in RATES:
    # The same round with a constant rate, from the same place.
    own = constant.initialize().client_work
    assert tf.nest.flatten(own) == [np.float32(123.0)]
    same = state._replace(
        client_work=tf.nest.map_structure(lambda _, its=rate: np.float32(its), own)
    )
    expected = models(*advance(constant, same, clients))
    start = models(state, clients)
    state, clients = advance(scheduled, state, clients)
    found = models(state, clients)
    helpers.assert_weights_close(found, expected, rtol=1e-5, atol=1e-6)
    moved = [
        np.abs(a - b).max()
        for a, b in zip(tf.nest.flatten(found), tf.nest.flatten(start))
    ]
    assert max(moved) > 1e-3


def test_the_rate_reaches_clients_that_get_datasets():
  process = helpers.build('fed_avg', learning_rate_fn=lambda n: tf.where(n < 1, 0.1, 0.0))
  data = [helpers.dataset(*its) for its in DATA]
  first = process.next(process.initialize(), data).state
  second = process.next(first, data).state
  before = process.initialize().global_model_weights
  assert np.abs(first.global_model_weights.trainable[0] - before.trainable[0]).max() > 0
  helpers.assert_weights_close(
      second.global_model_weights, first.global_model_weights, rtol=0
  )


@pytest.mark.parametrize('name', ['fed_avg', 'fd'])
@pytest.mark.parametrize(
    'optimizer',
    [
        lambda: keras.optimizers.SGD(0.1),
        tff.learning.optimizers.schedule_learning_rate(
            helpers.sgd(), lambda step: 0.1 / (1.0 + tf.cast(step, tf.float32))
        ),
    ],
)
def test_an_optimizer_without_a_rate_to_set_is_refused(name, optimizer):
  with pytest.raises(ValueError, match='`learning_rate_fn` needs a TFF optimizer'):
    helpers.build(name, client_optimizer=optimizer, learning_rate_fn=_learning_rate)


def test_small_and_large_clients_do_equally_many_steps():
  data = tff_kd.FileClientData.from_clients(
      [helpers.examples(n, n) for n in (3, 50, 700)]
  )
  batches = tff_kd.ClientBatches(
      data=data, batch_size=32, num_epochs=300, max_batches=20
  )
  np.testing.assert_array_equal(batches.num_batches, [20, 20, 20])
  for client, (start, size) in enumerate([(0, 3), (3, 50), (53, 700)]):
    rows = batches.rows(tf.constant(client), tf.constant(0)).numpy() - start
    assert len(rows) == 640
    for pass_ in np.split(rows, np.arange(size, 640, size)):
      assert len(set(pass_)) == len(pass_) and pass_.max() < size


def _trajectory(optimizer, steps=4):
  """The weights of a model of two after some steps of fixed gradients."""
  values = [tf.constant([1.0, -2.0]), tf.constant(3.0)]
  variables = [keras.Variable(its.numpy()) for its in values]
  stepper = optimizers.build_stepper(optimizer, variables)
  state = stepper.initialize()
  for step in range(steps):
    gradients = [tf.constant([0.5 * step, 3.0]), tf.constant(-1.0)]
    state, values = stepper.apply(state, values, gradients)
  return [np.asarray(value) for value in values]


@pytest.mark.parametrize(
    'ours, kerass',
    [
        (
            lambda: optimizers.with_weight_decay(helpers.sgd(0.1, 0.9), 0.3),
            lambda: keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.3),
        ),
        (
            lambda: optimizers.with_clipped_gradients(helpers.sgd(0.1), 1.5),
            lambda: keras.optimizers.SGD(0.1, global_clipnorm=1.5),
        ),
        (
            lambda: optimizers.with_clipped_gradients(
                optimizers.with_weight_decay(
                    tff.learning.optimizers.build_adam(0.05), 0.2
                ), 0.7
            ),
            lambda: keras.optimizers.Adam(0.05, weight_decay=0.2, global_clipnorm=0.7),
        ),
    ],
)
def test_decay_and_clipping_are_those_of_keras(ours, kerass):
  helpers.assert_weights_close(_trajectory(ours()), _trajectory(kerass), rtol=1e-5)


@pytest.mark.parametrize(
    'optimizer',
    [
        optimizers.with_weight_decay(helpers.sgd(0.1), 0.5),
        lambda: keras.optimizers.SGD(0.1, weight_decay=0.5),
    ],
)
@pytest.mark.filterwarnings('ignore:Gradients do not exist')
def test_a_weight_without_a_gradient_does_not_decay(optimizer):
  values = [tf.constant([2.0]), tf.constant([2.0])]
  stepper = optimizers.build_stepper(
      optimizer, [keras.Variable(its.numpy()) for its in values]
  )
  _, values = stepper.apply(stepper.initialize(), values, [tf.constant([1.0]), None])
  # 2 (1 - 0.1 * 0.5) - 0.1.
  helpers.assert_weights_close(values, [[1.8], [2.0]], rtol=1e-6)


def test_decay_follows_the_rate():
  """A rate of 0 leaves the weights as they are, and the rate can be set."""
  optimizer = optimizers.with_weight_decay(helpers.sgd(0.5), 0.4)
  spec, weight = tf.TensorSpec([2]), tf.constant([1.0, 2.0])
  state = optimizer.initialize(spec)
  for rate, expected in ((0.5, 0.8), (0.0, 1.0), (0.25, 0.9)):
    hparams = optimizer.get_hparams(state)
    hparams['learning_rate'] = rate
    state = optimizer.set_hparams(state, hparams)
    _, found = optimizer.next(state, weight, tf.zeros([2]))
    np.testing.assert_allclose(found, expected * weight, rtol=1e-6)
  clipped = optimizers.with_clipped_gradients(optimizer, 2.0)
  hparams = clipped.get_hparams(clipped.initialize(spec))
  assert dict(hparams) == {'learning_rate': 0.5, 'weight_decay': 0.4, 'clip_norm': 2.0}
  with pytest.raises(ValueError, match='must be plain SGD'):
    optimizers.check_plain_sgd(clipped, 'client_optimizer', 'It must.')


@pytest.mark.parametrize(
    'make, error, message',
    [
        (
            lambda: optimizers.with_weight_decay(lambda: keras.optimizers.SGD(), 0.1),
            TypeError, 'Keras optimizers take `weight_decay` and `global_clipnorm`',
        ),
        (
            lambda: optimizers.with_weight_decay(helpers.sgd(), -0.1), ValueError,
            'finite, 0 or more, found -0.1',
        ),
        (
            lambda: optimizers.with_clipped_gradients(helpers.sgd(), 0.0), ValueError,
            '`norm` must be a finite number above 0, found 0.0',
        ),
        (
            lambda: optimizers.with_weight_decay(
                tff.learning.optimizers.schedule_learning_rate(
                    helpers.sgd(), lambda step: 0.1 / (1.0 + tf.cast(step, tf.float32))
                ), 0.1,
            ),
            ValueError, 'needs an optimizer with a learning rate to read',
        ),
    ],
)
def test_what_cannot_be_decayed_or_clipped_is_refused(make, error, message):
  with pytest.raises(error, match=message):
    make()
