"""Prediction inversion: reconstructs private examples from predictions on public ones."""

from typing import NamedTuple

import keras
import numpy as np
import scipy.special
import tensorflow as tf

# The number of public examples, of the highest confidence, that represent a class.
_NUM_SUREST = 5
_HIDDEN_UNITS = 256
_BATCH_SIZE = 32


class Pairs(NamedTuple):
  """Predictions of two models on the same examples.

  Attributes:
    client: float32 `[n, classes]`, logits of the client's model.
    server: float32 `[n, classes]`, of the server's.
  """

  client: np.ndarray
  server: np.ndarray


class Inverter:
  """Learns to reconstruct an example from the predictions of two models on it.

  The server has the transfer inputs, a client's predictions on them, and its own. It fits
  a network that maps a pair of predictions to the input, and applies it to the pairs that
  it expects on the client's private examples. The difference between the two models is
  what only the client's data teach.

  Source: Takahashi, Liu and Liu, "Breaching FedMD: Image Recovery via Paired-Logits
  Inversion Attack" (CVPR 2023). There the network is convolutional and the pair of a
  private class is set by a prior on its confidences; here the network is dense and the
  pair is the mean over the public examples on which the client is surest of that class.
  """

  def __init__(
      self,
      inputs: np.ndarray,
      pairs: Pairs,
      *,
      num_epochs: int = 60,
      seed: int = 0,
  ):
    """Fits the network.

    Args:
      inputs: float32 `[n, ...]`, the public examples.
      pairs: The predictions of both models on them.
      num_epochs: Passes over the examples, with Adam.
      seed: Decides the initial weights and the order.

    Raises:
      ValueError: If the arrays do not fit, or are not finite.
    """
    inputs = np.asarray(inputs, np.float32)
    for name, logits in pairs._asdict().items():
      if np.ndim(logits) != 2 or len(logits) != len(inputs):
        raise ValueError(
            f"The {name}'s logits must be [{len(inputs)}, classes], as many as inputs, "
            f'found {np.shape(logits)}.'
        )
      if not np.all(np.isfinite(logits)):
        raise ValueError(
            f"The {name}'s logits are not finite: the model that made them is broken."
        )
    self._pairs = pairs
    self._shape = inputs.shape[1:]
    self._low, self._range = float(inputs.min()), float(np.ptp(inputs)) or 1.0
    features = _features(pairs)
    self._mean, self._scale = features.mean(0), features.std(0) + 1e-3
    generator = tf.random.Generator.from_seed(seed)
    drawn = generator.uniform([2], 0, 2**31 - 1, tf.int32)
    weight_seeds = [int(number) for number in drawn]
    self._network = keras.Sequential([
        keras.layers.InputLayer(features.shape[1:]),
        keras.layers.Dense(
            _HIDDEN_UNITS, 'relu',
            kernel_initializer=keras.initializers.GlorotUniform(weight_seeds[0]),
        ),
        keras.layers.Dense(
            int(np.prod(self._shape)), 'sigmoid',
            kernel_initializer=keras.initializers.GlorotUniform(weight_seeds[1]),
        ),
    ])
    self._network.compile('adam', 'mse')
    targets = ((inputs - self._low) / self._range).reshape(len(inputs), -1)
    examples = tf.data.Dataset.from_tensor_slices(
        (self._scaled(features), targets)
    ).shuffle(len(inputs), seed=seed).batch(_BATCH_SIZE)
    # The dataset shuffles; Keras warns that it cannot.
    self._network.fit(examples, epochs=num_epochs, shuffle=False, verbose=0)

  def invert(self, pairs: Pairs) -> np.ndarray:
    """Reconstructs examples from their predictions.

    Args:
      pairs: The predictions of k examples.

    Returns:
      float32 `[k, ...]`, in the shape of the public examples.
    """
    # Not `predict`, which is traced anew for each network.
    flat = self._network(self._scaled(_features(pairs))).numpy()
    return (self._low + self._range * flat).reshape(-1, *self._shape)

  def pair_of(self, label: int) -> Pairs:
    """Returns the predictions that are expected on a private example of a class.

    Args:
      label: The class.

    Returns:
      A pair of arrays `[1, classes]`.
    """
    sure = scipy.special.log_softmax(self._pairs.client, axis=-1)[:, label]
    rows = np.argsort(-sure, kind='stable')[:_NUM_SUREST]
    return Pairs(*(logits[rows].mean(0, keepdims=True) for logits in self._pairs))

  def _scaled(self, features: np.ndarray) -> np.ndarray:
    return ((features - self._mean) / self._scale).astype(np.float32)


def similarity(images: np.ndarray, others: np.ndarray, value_range: float):
  """Computes peak signal-to-noise ratios and structural similarities of examples.

  Args:
    images: float32 `[k, height, width]` or `[k, height, width, channels]`; for other
      ranks there is no structural similarity.
    others: Examples of the same shape, to compare with.
    value_range: Largest minus smallest possible value.

  Returns:
    The ratios in decibels, float32 `[k]`, and the similarities from -1 to 1, float32
    `[k]`, NaN if the examples are not images.
  """
  images, others = (np.asarray(array, np.float32) for array in (images, others))
  axes = tuple(range(1, images.ndim))
  errors = np.mean(np.square(images - others), axis=axes)
  psnr = 10 * np.log10(value_range**2 / np.maximum(errors, 1e-12))
  ssim = np.full(len(images), np.nan, np.float32)
  if images.ndim == 3:
    images, others = images[..., np.newaxis], others[..., np.newaxis]
  if images.ndim == 4 and min(images.shape[1:3]) >= 11:
    ssim = tf.image.ssim(images, others, value_range).numpy()
  return psnr, ssim


def _features(pairs: Pairs) -> np.ndarray:
  return np.concatenate(
      [scipy.special.log_softmax(logits, axis=-1) for logits in pairs], axis=-1
  )
