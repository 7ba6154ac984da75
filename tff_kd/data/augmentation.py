"""Random changes of inputs that preserve their class."""

import dataclasses
from typing import Any

# Keras's `RandomTranslation` takes no seed tensor: a resumed run could not repeat it.
# TensorFlow is imported in the call, so that settings can be made without it.


@dataclasses.dataclass(frozen=True)
class RandomShift:
  """Shifts each image of a batch by a few whole pixels, filled with 0.

  Each image has its own shifts, down and to the right, drawn uniformly from
  -`max_pixels` to `max_pixels`.

  Attributes:
    max_pixels: The largest shift, 1 or more.
  """

  max_pixels: int = 2

  def __post_init__(self):
    if not isinstance(self.max_pixels, int) or self.max_pixels < 1:
      raise ValueError(
          f'`max_pixels` must be a positive integer, found {self.max_pixels!r}.'
      )

  def __call__(self, images: Any, seed: Any) -> Any:
    """Shifts a batch.

    Args:
      images: `[batch, height, width, channels]`.
      seed: int32 `[2]`; the same shifts for the same seed.

    Returns:
      Images of the same shape and dtype.

    Raises:
      ValueError: If `images` are not images.
    """
    import tensorflow as tf

    if not isinstance(images, tf.Tensor) or images.shape.rank != 4:
      raise ValueError(
          '`RandomShift` takes a batch of images, one tensor of shape [batch, height, '
          f'width, channels], found {images!r}. Pass a function of your own as '
          '`augment`, or none.'
      )
    most = self.max_pixels
    shifts = tf.random.stateless_uniform(
        [tf.shape(images)[0], 2], seed, 0, 2 * most + 1, tf.int32
    )
    padded = tf.pad(images, [[0, 0], [most, most], [most, most], [0, 0]])
    rows = shifts[:, :1] + tf.range(images.shape[1])
    columns = shifts[:, 1:] + tf.range(images.shape[2])
    shifted = tf.gather(padded, rows, batch_dims=1)
    shifted = tf.gather(shifted, columns, axis=2, batch_dims=1)
    return tf.ensure_shape(shifted, images.shape)
