"""The last bias of a model: found by trying, set so that the marginal is the prior."""

import keras
import numpy as np
import pytest
import scipy.special
import tensorflow as tf

import tff_kd
from tff_kd import graphs
from tff_kd import models
from tff_kd.knowledge import alignment
from tff_kd.server import calibration

_DIM = 6
_X = np.random.default_rng(0).normal(1.0, 2.0, (20, _DIM)).astype(np.float32)
_TRANSFER = tff_kd.TransferSet(_X)


class _Subclassed(keras.Model):
  """The last layer is built before the others, and only its bias is at the end."""

  def __init__(self):
    super().__init__()
    self.last = keras.layers.Dense(3)
    self.first = keras.layers.Dense(3, activation='relu')

  def call(self, inputs):
    return self.last(self.first(inputs))


def _spec(layers, loss, labels):
  build = layers
  if isinstance(layers, list):
    build = lambda: keras.Sequential([
        keras.layers.InputLayer((_DIM,)),
        *(keras.layers.deserialize(keras.layers.serialize(layer)) for layer in layers),
    ])
  keras.utils.set_random_seed(0)
  return models.build_model_spec(
      build, loss_fn=lambda: loss, name='student',
      input_spec=(tf.TensorSpec([None, _DIM]), labels),
  )


_CLASSES = tf.TensorSpec([None], tf.int32)
_CE = keras.losses.SparseCategoricalCrossentropy
_DENSE = keras.layers.Dense
_KINDS = {
    'logits': lambda: _spec([_DENSE(4), _DENSE(3)], _CE(from_logits=True), _CLASSES),
    'softmax': lambda: _spec([_DENSE(3, activation='softmax')], _CE(), _CLASSES),
    'subclassed': lambda: _spec(_Subclassed, _CE(from_logits=True), _CLASSES),
    'binary': lambda: _spec(
        [_DENSE(1)], keras.losses.BinaryCrossentropy(from_logits=True),
        tf.TensorSpec([None, 1]),
    ),
    'multi-label': lambda: _spec(
        [_DENSE(4, activation='sigmoid')], keras.losses.BinaryCrossentropy(),
        tf.TensorSpec([None, 4]),
    ),
    'sequence': lambda: _spec(
        [keras.layers.Reshape((2, 3)), _DENSE(3)], _CE(from_logits=True),
        tf.TensorSpec([None, 2], tf.int32),
    ),
}


@pytest.mark.parametrize('kind', sorted(_KINDS))
def test_the_marginal_becomes_the_prior(kind):
  spec = _KINDS[kind]()
  calibrate = calibration.CalibrationStage().build_lesson(spec, _TRANSFER)
  found = graphs.function(
      lambda: calibrate(spec.initial_weights, (), {}, None, 0, None)
  )()
  changed = [
      i for i, (new, old) in enumerate(
          zip(found.weights.trainable, spec.initial_weights.trainable)
      )
      if np.abs(new - old).max() > 0
  ]
  place = calibration.output_bias(spec, _TRANSFER)
  assert changed == [place]
  assert spec.trainable_variables[place].name == 'bias'
  logits = spec.logits(found.weights, _X)
  marginal = alignment.marginal(logits, np.ones(20, np.float32)).numpy()
  np.testing.assert_allclose(marginal, 1 / marginal.shape[-1], atol=1e-3)
  if kind == 'multi-label':
    np.testing.assert_allclose(scipy.special.expit(logits).mean(0), 0.5, atol=1e-3)
  assert found.measurements['marginal_distance_after'] < 1e-3


@pytest.mark.parametrize(
    'layers',
    [
        [_DENSE(3, use_bias=False)],
        # The bias is scaled, so that it is not what is added to the logits.
        [_DENSE(3), keras.layers.Rescaling(2.0)],
        [_DENSE(4), _DENSE(3, trainable=False)],
    ],
)
def test_a_model_without_such_a_bias_is_refused(layers):
  spec = _spec(layers, _CE(from_logits=True), _CLASSES)
  with pytest.raises(ValueError, match=r'a trainable bias of shape \[3\].*use_bias'):
    calibration.output_bias(spec, _TRANSFER)


def test_regression_and_priors_of_other_classes_are_refused():
  numbers = _spec(
      [_DENSE(1)], keras.losses.MeanSquaredError(), tf.TensorSpec([None, 1])
  )
  with pytest.raises(ValueError, match='Calibration.*classes'):
    calibration.CalibrationStage().build_lesson(numbers, _TRANSFER)
  with pytest.raises(ValueError, match='a probability for each class'):
    calibration.CalibrationStage(prior=(0.5, 0.5)).build_lesson(
        _KINDS['logits'](), _TRANSFER
    )
