"""FedGen's generator: its sums against the objective with all heads in one place."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tff_kd
from tests import helpers
from tff_kd.client.companions import generator
from tff_kd import models
from tff_kd.models import split

_FEATURES, _NOISE, _BATCH, _STEPS = 4, 3, 6, 3
_RATE = 0.05


def _student_fn():
  return keras.Sequential([
      keras.layers.InputLayer((helpers.DIM,)),
      keras.layers.Dense(_FEATURES, activation='tanh', name='features'),
      keras.layers.Dense(helpers.CLASSES, name='last'),
  ])


@pytest.fixture(scope='module')
def process():
  keras.utils.set_random_seed(5)
  return helpers.build(
      'fed_gen', student_fn=_student_fn, noise_dim=_NOISE, hidden_units=7,
      generator_steps=_STEPS, generator_batch_size=_BATCH,
      generator_optimizer=helpers.sgd(_RATE, 0.9),
  )


def _fold(*numbers):
  seed = tf.constant(numbers[:2])
  for number in numbers[2:]:
    seed = tf.random.experimental.stateless_fold_in(seed, number)
  return seed


def _dense(x, kernel, bias):
  return tf.matmul(x, kernel) + bias


def _generate(weights, noise, labels):
  x = tf.concat([noise, tf.one_hot(labels, helpers.CLASSES)], -1)
  return _dense(tf.nn.relu(_dense(x, *weights[:2])), *weights[2:])


def _cross_entropy(labels, logits):
  return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)


def _train(received, gen, seen, data, round_num, weight):
  """One client's local training, written out; returns weights and label counts."""
  w = [tf.constant(v) for v in received]
  counts = np.zeros(helpers.CLASSES)
  x, y = data
  for i in range(0, len(x), 4):
    xb, yb = tf.constant(x[i : i + 4]), tf.constant(y[i : i + 4])
    counts += np.bincount(yb, minlength=helpers.CLASSES)
    with tf.GradientTape() as tape:
      tape.watch(w)
      logits = _dense(tf.tanh(_dense(xb, *w[:2])), *w[2:])
      loss = tf.reduce_mean(_cross_entropy(yb, logits))
      if round_num > 0:
        digest = int(np.sum(yb * np.arange(1, len(yb) + 1)))
        seeds = tf.random.experimental.stateless_split(
            _fold(0, 21, round_num, i // 4, digest), 3
        )
        others = tf.random.stateless_categorical(
            tf.math.log(seen)[None], len(yb), seeds[0], dtype=tf.int32
        )[0]
        noise = [tf.random.stateless_normal([len(yb), _NOISE], s) for s in seeds]
        taught = _dense(_generate(gen, noise[1], others), *w[2:])
        target = tf.stop_gradient(_dense(_generate(gen, noise[2], yb), *w[2:]))
        p = tf.nn.softmax(target)
        near = tf.reduce_sum(
            p * (tf.nn.log_softmax(target) - tf.nn.log_softmax(logits)), -1
        )
        loss += weight * (
            tf.reduce_mean(_cross_entropy(others, taught)) + tf.reduce_mean(near)
        )
    w = [v - 0.1 * g for v, g in zip(w, tape.gradient(loss, w))]
  return w, counts


def _learn(gen, momentum, heads, counts, round_num):
  """The paper's server: all heads in one place, one loss, one gradient."""
  total = sum(counts)
  for step in range(_STEPS):
    seed = _fold(0, 22, round_num, step)
    noise = tf.random.stateless_normal([_BATCH, _NOISE], seed)
    labels = tf.random.stateless_categorical(
        tf.math.log(tf.cast(total > 0, tf.float32))[None], _BATCH, seed, dtype=tf.int32
    )[0]
    with tf.GradientTape() as tape:
      tape.watch(gen)
      features = _generate(gen, noise, labels)
      loss = 0.0
      for head, own in zip(heads, counts):
        share = tf.cast(own[labels.numpy()] / total[labels.numpy()], tf.float32)
        loss += tf.reduce_mean(share * _cross_entropy(labels, _dense(features, *head)))
      pairs = [
          (
              np.mean((noise[i] - noise[j]) ** 2),
              tf.reduce_mean(tf.abs(features[i] - features[j])),
          )
          for i in range(_BATCH) for j in range(_BATCH)
      ]
      diversity = tf.exp(-tf.add_n([a * b for a, b in pairs]) / _BATCH**2)
      whole = loss + diversity
    gradients = tape.gradient(whole, gen)
    momentum = [0.9 * m + g for m, g in zip(momentum, gradients)]
    gen = [v - _RATE * m for v, m in zip(gen, momentum)]
  return gen, momentum, float(loss), float(diversity)


def test_three_rounds_equal_the_objective_with_all_heads_in_one_place(process):
  sizes = [8, 4, 12]
  state = process.initialize()
  student = list(state.global_model_weights.trainable)
  gen = [tf.constant(v) for v in state.companion.weights.trainable]
  momentum = [tf.zeros_like(v) for v in gen]
  seen = np.zeros(helpers.CLASSES, np.float32)
  for round_num in range(3):
    # Clients have different labels; nobody has the last class in the first round.
    clients = [helpers.examples(n, 10 * round_num + i) for i, n in enumerate(sizes)]
    if round_num == 0:
      clients = [(x, np.minimum(y, 1)) for x, y in clients]
    clients[1] = (clients[1][0], np.zeros_like(clients[1][1]))
    output = process.next(state, [helpers.dataset(x, y) for x, y in clients])
    state = output.state
    weight = 0.98 ** (round_num - 1)
    trained = [
        _train(student, gen, seen, data, round_num, weight) for data in clients
    ]
    student = [
        sum(n / sum(sizes) * w[i] for n, (w, _) in zip(sizes, trained))
        for i in range(4)
    ]
    counts = [own for _, own in trained]
    gen, momentum, loss, diversity = _learn(
        gen, momentum, [w[2:] for w, _ in trained], counts, round_num
    )
    seen = np.maximum(seen, sum(counts) > 0).astype(np.float32)
    close = dict(rtol=1e-4, atol=1e-5)
    helpers.assert_weights_close(
        state.global_model_weights.trainable, student, **close
    )
    helpers.assert_weights_close(state.companion.weights.trainable, gen, **close)
    np.testing.assert_array_equal(state.companion.seen, seen)
    measured = output.metrics['companion']
    np.testing.assert_allclose(measured['generator_loss'], loss, **close)
    np.testing.assert_allclose(measured['diversity_loss'], diversity, **close)
  assert seen.all()


def test_the_order_of_clients_does_not_matter(process):
  clients = [helpers.dataset(*helpers.examples(n, n)) for n in (4, 8, 12)]
  state = process.initialize()
  one = process.next(state, clients).state
  other = process.next(state, clients[::-1]).state
  helpers.assert_weights_close(
      one.companion.weights, other.companion.weights, rtol=1e-5, atol=1e-6
  )


def test_without_any_client_the_generator_stays(process):
  state = process.initialize()
  x, y = helpers.examples(4, 0)
  after = process.next(state, [helpers.dataset(x[:0], y[:0])]).state
  helpers.assert_weights_close(
      after.companion.weights, state.companion.weights, rtol=0
  )
  assert not after.companion.seen.any()


def test_bytes(process):
  moved = tff_kd.communication.round_bytes(process)
  floats = _STEPS * _BATCH * (_FEATURES + 1)
  assert moved.up_companion == 4 * (floats + helpers.CLASSES)
  plain = tff_kd.communication.round_bytes(
      helpers.build('fed_avg', student_fn=_student_fn)
  )
  inputs = _NOISE + helpers.CLASSES
  weights = inputs * 7 + 7 + 7 * _FEATURES + _FEATURES
  # The generator, the classes seen, the round's number, and each step's batch.
  assert moved.down - plain.down == 4 * (weights + helpers.CLASSES + 1 + floats)
  assert moved.up == plain.up + moved.up_companion


def test_the_split():
  model = _student_fn()
  body, head = split.split_layers(model.layers, None)
  assert [its.name for its in body] == ['features']
  assert [its.name for its in head] == ['last']
  deeper = keras.Sequential([
      keras.layers.InputLayer((4, 4, 1)),
      keras.layers.Conv2D(2, 3, name='conv'),
      keras.layers.BatchNormalization(),
      keras.layers.Flatten(),
      keras.layers.Dense(3, name='last'),
  ])
  body, head = split.split_layers(deeper.layers, 'conv')
  assert len(body) == 1 and len(head) == 3


# Such layers are split in `test_the_split`.
@pytest.mark.slow
def test_a_subclassed_model_with_batch_norm_and_features_of_any_shape():
  process = helpers.build(
      'fed_gen',
      student_fn=lambda: keras.Sequential([
          keras.layers.InputLayer((helpers.DIM,)),
          keras.layers.Reshape((helpers.DIM, 1)),
          keras.layers.Conv1D(2, 2, name='conv'),
          keras.layers.BatchNormalization(),
          keras.layers.Flatten(),
          keras.layers.Dense(helpers.CLASSES),
      ]),
      split_layer='conv', generator_steps=2,
      generator_optimizer=lambda: keras.optimizers.Adam(1e-3),
  )
  state = process.initialize()
  for _ in range(2):
    output = process.next(state, [helpers.dataset(*helpers.examples(8, 0))])
    state = output.state
  assert np.isfinite(output.metrics['companion']['generator_loss'])
  student = tff_kd.models.zoo.SmallMlp
  built = helpers.build(
      'fed_gen', student_fn=lambda: student(helpers.CLASSES), generator_steps=1
  )
  assert built.student_spec.logits_shape[-1] == helpers.CLASSES


class _Skip(keras.Model):
  """Adds its layers' outputs up: no chain."""

  def __init__(self):
    super().__init__()
    self.first = keras.layers.Dense(helpers.CLASSES)
    self.second = keras.layers.Dense(helpers.CLASSES)

  def call(self, inputs):
    first = self.first(inputs)
    return first + self.second(first)


@pytest.mark.parametrize(
    'kwargs, match',
    [
        (dict(split_layer='nowhere'), "must be one of the student's layers"),
        (dict(split_layer='last'), 'weights to train after it'),
        (dict(generator_steps=0), '`generator_steps` must be a positive integer'),
        (dict(generative_weight=0.0), 'must be above 0'),
        (dict(generative_decay=1.5), 'at most 1'),
        (
            dict(generator_fn=lambda: keras.Sequential([keras.layers.Dense(9)])),
            'outputs of shape',
        ),
        (dict(student_fn=_Skip), 'one after the other'),
        (dict(student_fn=helpers.dense_fn()), 'must have layers before the split'),
    ],
)
def test_refused_before_anything_is_built(kwargs, match):
  with pytest.raises(ValueError, match=match):
    helpers.build('fed_gen', **{'student_fn': _student_fn, **kwargs})


def test_labels_must_be_class_indices():
  spec = models.build_model_spec(
      helpers.dense_fn((4,), classes=1),
      input_spec=(
          tf.TensorSpec([None, helpers.DIM]), tf.TensorSpec([None, 1], tf.float32)
      ),
      loss_fn=lambda: keras.losses.BinaryCrossentropy(from_logits=True),
      name='student',
  )
  with pytest.raises(ValueError, match='class indices'):
    generator.FeatureGenerator(spec, optimizer=helpers.sgd())


def test_diversity_of_equal_features_is_one():
  noise = tf.random.stateless_normal([5, 3], [0, 1])
  assert float(generator.diversity_loss(noise, tf.ones([5, 4]))) == 1.0
  spread = tf.random.stateless_normal([5, 4], [2, 3])
  assert float(generator.diversity_loss(noise, spread)) < 1.0
