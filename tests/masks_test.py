"""Keras's masks (`mask_zero`, `Masking`): padding counts nowhere, as in Keras."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import helpers

_LENGTH, _WORDS, _CLASSES = 5, 9, 3
_RNG = np.random.default_rng(0)
_X = _RNG.integers(1, _WORDS, (8, _LENGTH)).astype(np.int32)
_X[np.arange(_LENGTH) >= _RNG.integers(1, _LENGTH, (8, 1))] = 0
_Y = np.where(_X > 0, _X % _CLASSES, 0).astype(np.int32)  # Padding has a class, too.
_INPUT_SPEC = (tf.TensorSpec([None, _LENGTH], tf.int32),) * 2


def _student(batch_size=None, width=4):
  return keras.Sequential([
      keras.Input((_LENGTH,), batch_size, dtype='int32'),
      keras.layers.Embedding(_WORDS, width, mask_zero=True),
      keras.layers.Dense(_CLASSES),
  ])


def _spec(keras_model_fn=_student, **kwargs):
  return helpers.model_spec(keras_model_fn, input_spec=_INPUT_SPEC, **kwargs)


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('reduction', ['sum_over_batch_size', 'mean_with_sample_weight'])
def test_a_loss_that_ignores_a_class_knows_the_mask_too(weighted, reduction):
  y = _Y.copy()
  y[:, 0] = -1
  loss_fn = helpers.loss_with(ignore_class=-1, reduction=reduction)
  spec = _spec(loss_fn=loss_fn)
  weight = np.float32(_RNG.uniform(size=_Y.shape)) if weighted else None
  outputs = spec.call(spec.values(spec.initial_weights), tf.constant(_X)).outputs
  model = spec.to_keras(spec.initial_weights)
  model.compile(loss=loss_fn())
  np.testing.assert_allclose(
      spec.supervised_loss(
          tf.constant(y), outputs, sample_weight=spec.sample_weight((_X, y, weight))
      ),
      model.evaluate(_X, y, sample_weight=weight, batch_size=len(_X), verbose=0),
      rtol=1e-5,
  )
