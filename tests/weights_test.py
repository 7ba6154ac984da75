"""Sample weights: in the loss as in Keras, in counts and in metrics."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import helpers
import tff_kd
from tff_kd import evaluation
from tff_kd import models

_RATE = 0.3
_BATCH = 4


def _dataset(*parts):
  return tf.data.Dataset.from_tensor_slices(parts).batch(_BATCH)


def _client(seed, weights):
  """Examples with these weights; labels of those without any are out of range."""
  weights = np.array(weights, np.float32)
  x, y = helpers.examples(len(weights), seed)
  return x, np.where(weights > 0, y, -1).astype(np.int32), weights


# Whole batches, padding within one and beyond, nothing but padding.
_CLIENTS = [
    _client(0, [1.0, 0.5, 2.0, 3.0, 0.25, 1.0, 1.0, 4.0]),
    _client(1, [2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
    _client(2, [0.0, 0.0, 0.0]),
]
_NUM_EXAMPLES = [8, 2, 0]


def _metrics():
  return {
      'metrics': [keras.metrics.SparseCategoricalAccuracy(name='accuracy')],
      'weighted_metrics': [keras.metrics.SparseCategoricalAccuracy(name='weighted')],
  }


@pytest.fixture(scope='module', params=['datasets', 'files'])
def round_of(request):
  """A process, and what makes its argument of clients' arrays."""
  keras.utils.set_random_seed(0)
  batches = None
  if request.param == 'files':
    batches = helpers.batches(_CLIENTS, batch_size=_BATCH, shuffle=False)
  process = helpers.build(
      'fed_avg', input_spec=_dataset(*_CLIENTS[0]).element_spec, metrics_fn=_metrics,
      client_optimizer=helpers.sgd(_RATE), client_data=batches,
  )
  if batches is not None:
    return process, [0, 1, 2]
  return process, [_dataset(*its) for its in _CLIENTS]


def _fit(spec, x, y, weights):
  """What Keras's `fit` makes of the initial weights."""
  model = spec.to_keras(spec.initial_weights)
  model.compile(keras.optimizers.SGD(_RATE), helpers.loss_fn())
  y = np.maximum(y, 0)  # Keras would look the others up.
  model.fit(
      x, y, sample_weight=weights, batch_size=_BATCH, shuffle=False, verbose=0
  )
  return model.get_weights()


def test_a_round_is_the_mean_of_what_fit_makes(round_of):
  process, clients = round_of
  output = process.next(process.initialize(), clients)
  fitted = [_fit(process.student_spec, *its) for its in _CLIENTS[:2]]
  expected = [(8 * a + 2 * b) / 10 for a, b in zip(*fitted)]
  helpers.assert_weights_close(
      output.state.global_model_weights.trainable, expected, atol=1e-6
  )
  counts = output.metrics['client_work']['participation']
  assert counts['num_included'] == 2
  assert counts['num_excluded_empty'] == 1 and counts['num_excluded_bad_labels'] == 0
  train = output.metrics['client_work']['train']
  assert train['num_examples'] == sum(_NUM_EXAMPLES)


def test_metrics_with_and_without_weights(round_of):
  process, clients = round_of
  train = process.next(process.initialize(), clients[1:2]).metrics['client_work']['train']
  spec = process.student_spec
  x, y, w = (its[:2] for its in _CLIENTS[1])
  model = spec.to_keras(spec.initial_weights)
  z = model(x).numpy()
  log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
  losses = -np.take_along_axis(log_p, y[:, np.newaxis], 1)[:, 0]
  right = z.argmax(-1) == y
  np.testing.assert_allclose(train['loss'], np.sum(w * losses) / 2, rtol=1e-5)
  np.testing.assert_allclose(train['accuracy'], right.mean())
  np.testing.assert_allclose(train['weighted'], np.sum(w * right) / w.sum())
  for metric, expected in (('accuracy', right.mean()), ('weighted', train['weighted'])):
    found = evaluation.ClientsEvaluator(spec, metric=metric).evaluate(
        spec.initial_weights, [_dataset(*_CLIENTS[1])]
    )
    np.testing.assert_allclose(found.mean, expected)


@pytest.mark.parametrize('bad', [-1.0, np.nan, np.inf])
def test_a_client_with_a_weight_that_is_none_is_left_out(round_of, bad):
  process, clients = round_of
  x, y, weights = _CLIENTS[0]
  weights = weights.copy()
  weights[1] = bad
  if isinstance(clients[0], int):
    with pytest.raises(ValueError, match='not be negative|must be finite'):
      tff_kd.FileClientData.from_clients([(x, y, weights)])
    return
  counts = process.next(
      process.initialize(), [clients[1], _dataset(x, y, weights)]
  ).metrics['client_work']['participation']
  assert counts['num_included'] == counts['num_excluded_bad_labels'] == 1


_LOSSES = {
    'classes': (3, (3,), helpers.loss_fn, lambda r: r.integers(0, 3, 6)),
    'classes, padding': (
        3, (4, 3), helpers.loss_with(ignore_class=0),
        lambda r: r.integers(0, 3, (6, 4)),
    ),
    'several labels': (
        3, (3,), lambda: keras.losses.BinaryCrossentropy(from_logits=True),
        lambda r: r.integers(0, 2, (6, 3)),
    ),
    'numbers': (1, (1,), keras.losses.MeanSquaredError, lambda r: r.normal(size=6)),
    'a sum': (
        1, (1,), lambda: keras.losses.MeanSquaredError(reduction='sum'),
        lambda r: r.normal(size=6),
    ),
}


@pytest.mark.parametrize('name', _LOSSES)
@pytest.mark.parametrize('shape', ['[n]', '[n, 1]', 'positions'])
def test_the_loss_is_that_of_keras(name, shape):
  units, outputs_shape, loss_fn, labels = _LOSSES[name]
  rng = np.random.default_rng(0)
  y = labels(rng).astype(np.float32 if units == 1 else np.int32)
  weights = rng.integers(0, 4, outputs_shape[:-1] and (6, 4) or 6).astype(np.float32)
  if shape != 'positions':
    weights = rng.integers(0, 4, 6).astype(np.int64)
    weights = weights[:, np.newaxis] if shape == '[n, 1]' else weights
  spec = models.build_model_spec(
      lambda: keras.Sequential([
          keras.layers.Input((*outputs_shape[:-1], helpers.DIM)),
          keras.layers.Dense(units),
      ]),
      input_spec={
          'y': tf.TensorSpec([None, *y.shape[1:]], y.dtype),
          'x': tf.TensorSpec([None, *outputs_shape[:-1], helpers.DIM]),
          'sample_weight': tf.TensorSpec([None, *weights.shape[1:]], weights.dtype),
      },
      loss_fn=loss_fn,
  )
  z = rng.normal(size=(6, *outputs_shape)).astype(np.float32)
  found = spec.supervised_loss(
      tf.constant(y), tf.constant(z), None, spec.sample_weight({'sample_weight': weights})
  )
  y = y[:, np.newaxis] if units == 1 else y
  if len(outputs_shape) == 2 and weights.ndim == 1:
    weights = weights[:, np.newaxis]  # Which Keras leaves to the user.
  np.testing.assert_allclose(
      found, loss_fn()(y, z, sample_weight=weights.astype(np.float32)), rtol=1e-5
  )


class _Scaled(keras.losses.SparseCategoricalCrossentropy):
  """A user's own loss upon one of Keras's."""

  def call(self, y_true, y_pred):
    return 3.0 * super().call(y_true, y_pred)


def _spec_of_loss(loss_fn, layers=(), shape=(helpers.DIM,), dtype=tf.float32, y_shape=()):
  return models.build_model_spec(
      lambda: keras.Sequential([
          keras.layers.Input(shape, dtype=dtype), *layers, keras.layers.Dense(3)
      ]),
      input_spec=(
          tf.TensorSpec([None, *shape], dtype), tf.TensorSpec([None, *y_shape], tf.int32)
      ),
      loss_fn=loss_fn,
  )


@pytest.mark.parametrize(
    'reduction', ['sum_over_batch_size', 'sum', 'mean_with_sample_weight']
)
@pytest.mark.parametrize('ignored', [None, 2])
def test_what_counts_is_reduced_as_the_loss_says(reduction, ignored):
  spec = _spec_of_loss(
      lambda: _Scaled(from_logits=True, reduction=reduction, ignore_class=ignored)
  )
  rng = np.random.default_rng(0)
  z = rng.normal(size=(5, 3)).astype(np.float32)
  y = np.array([0, 1, 2, 0, 1], np.int32)
  each = -3.0 * np.log(helpers.softmax(z))[np.arange(5), y]
  weights = np.array([2.0, 0.5, 1.0, 3.0, 4.0], np.float32)
  for mask in (None, np.array([1, 0, 1, 1, 0], np.float32)):
    for sample_weight in (None, weights):
      if mask is None and sample_weight is None and ignored is None:
        continue  # Keras's own value.
      counted = np.ones(5) if mask is None else mask.astype(np.float64)
      if ignored is not None:
        counted = counted * (y != ignored)
      factors = counted if sample_weight is None else counted * sample_weight
      divisor = {
          'sum': 1.0, 'mean_with_sample_weight': factors.sum(),
          'sum_over_batch_size': counted.sum(),
      }[reduction]
      found = spec.supervised_loss(
          tf.constant(y), tf.constant(z), None if mask is None else tf.constant(mask),
          None if sample_weight is None else tf.constant(sample_weight),
      )
      np.testing.assert_allclose(found, np.sum(each * factors) / divisor, rtol=1e-5)


def test_a_masks_mean_is_over_the_positions_of_texts():
  """Those that Keras masks as padding do not count among them."""
  tokens = keras.layers.Embedding(9, 4, mask_zero=True)
  spec = _spec_of_loss(helpers.loss_fn, [tokens], (4,), tf.int32, (4,))
  x = tf.constant([[1, 0, 0, 0], [1, 2, 3, 4], [5, 6, 0, 0]])
  y = np.array([[0, 0, 0, 0], [0, 1, 2, 0], [1, 2, 0, 0]])
  outputs = spec.call(spec.values(spec.initial_weights), x, training=True).outputs
  each = -np.log(helpers.softmax(outputs))
  each = np.take_along_axis(each, y[..., np.newaxis], -1)[..., 0]
  found = spec.supervised_loss(tf.constant(y), outputs, tf.constant([1.0, 0.0, 1.0]))
  np.testing.assert_allclose(found, (each[0, 0] + each[2, :2].sum()) / 3, rtol=1e-5)
  assert spec.supervised_loss(tf.constant(y), outputs, tf.zeros([3])) == 0.0


def test_a_loss_that_ignores_a_class_must_tell_one_from_another():
  class OfBatch(keras.losses.Loss):
    ignore_class = 0

    def call(self, y_true, y_pred):
      return tf.reduce_mean(y_pred, axis=[1, 2])

  class Own(keras.losses.Loss):
    ignore_class = 0

    def __call__(self, y_true, y_pred, sample_weight=None):
      return tf.reduce_mean(y_pred)

  for loss_fn, message in ((OfBatch, r'found \(16,\)'), (Own, 'found no `call`')):
    with pytest.raises(ValueError, match=f'return one loss a label.*{message}'):
      _spec_of_loss(loss_fn, shape=(4, helpers.DIM), y_shape=(4,))


def test_a_term_weighs_like_the_loss():
  rng = np.random.default_rng(0)
  target, own = (tf.constant(rng.normal(size=(3, 4)), tf.float32) for _ in range(2))
  weights = np.float32([2.0, 0.0, 0.5])
  step = tff_kd.client.local_terms.LocalStep(
      inputs=None, logits=own, labels=tf.constant([0, 1, 2]), labelled=None,
      target_logits=target, supervised_loss=tf.constant(0.0), step_num=tf.constant(0),
      weights=[], received=[], sample_weight=tf.constant(weights),
  )
  each = tff_kd.losses.kl_divergence(target, own).numpy()
  np.testing.assert_allclose(
      tff_kd.LocalDistillation(weight=1.0)(tf.constant(0.0), step),
      np.sum(weights * each) / 3, rtol=1e-5,
  )


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(metrics_fn=lambda: {'other': []}), "must have the keys .* found .'other'"),
        (
            dict(input_spec=(*helpers.INPUT_SPEC, tf.TensorSpec([None, 7]))),
            r'weights must be `\[batch\]`, or .* found weights of shape \(16, 7\)',
        ),
        (
            dict(input_spec=(*helpers.INPUT_SPEC, (tf.TensorSpec([None]),) * 2)),
            'sample weights must be one tensor of numbers',
        ),
        (
            dict(
                input_spec=(
                    helpers.INPUT_SPEC[0], {'a': helpers.INPUT_SPEC[1]}
                )
            ),
            'labels must be one tensor.*Train on one output',
        ),
        (
            dict(input_spec=(helpers.INPUT_SPEC[0], tf.TensorSpec([None], tf.string))),
            'labels must be numbers, found strings. Encode them',
        ),
    ],
)
def test_refusals(change, message):
  kwargs = dict(
      input_spec=helpers.INPUT_SPEC, loss_fn=helpers.loss_fn,
      metrics_fn=helpers.metrics_fn,
  )
  with pytest.raises(ValueError, match=f'(?s){message}'):
    models.build_model_spec(helpers.dense_fn(), **{**kwargs, **change})


@pytest.mark.parametrize('container', [list, dict])
def test_several_outputs_are_refused_with_what_to_do(container):
  def build():
    x = keras.Input((helpers.DIM,))
    outputs = [keras.layers.Dense(3, name=name)(x) for name in ('a', 'b')]
    return keras.Model(x, outputs if container is list else dict(zip('ab', outputs)))

  with pytest.raises(ValueError, match='one output tensor.*model.outputs.0.*Concatenate'):
    helpers.model_spec(build)


def test_tffs_functional_model_would_leave_weights_out():
  spec = helpers.model_spec(input_spec=(*helpers.INPUT_SPEC, tf.TensorSpec([None])))
  with pytest.raises(ValueError, match="TFF's own algorithms have no sample weights"):
    _ = spec.functional_model
