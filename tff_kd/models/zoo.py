"""Student and teacher models ready to use. All return logits.

Each builder has the signature (num_classes, input_shape) -> `keras.Model`;
`STUDENTS` and `TEACHERS` list them by name.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import math

import keras
from keras import ops

_register = keras.saving.register_keras_serializable(package='tff_kd')


@_register
class MeanOfTokens(keras.layers.Layer):
  """Averages the vectors of a text's tokens; token 0 is padding and does not count.

  Takes [tokens, int `[batch, length]`, vectors, `[batch, length, width]`], returns
  `[batch, width]`; zeros for a text without tokens.
  """

  def call(self, inputs):
    tokens, vectors = inputs
    there = ops.cast(tokens > 0, vectors.dtype)[..., None]
    count = ops.sum(there, axis=1)
    return ops.sum(vectors * there, axis=1) / ops.maximum(count, 1.0)


@_register
class AttendedTokens(keras.layers.Layer):
  """Averages the vectors of a text's tokens with a weight for each token.

  The weights are the softmax over the text of a score that each token of the vocabulary
  has, 0 at first. Takes [tokens, int `[batch, length]`, vectors, `[batch, length,
  width]`], returns `[batch, width]`; token 0 is padding and does not count.

  Args:
    vocabulary_size: The number of tokens.
    **kwargs: Arguments of `keras.layers.Layer`, such as `name`.
  """

  def __init__(self, vocabulary_size: int, **kwargs):
    super().__init__(**kwargs)
    self.vocabulary_size = vocabulary_size
    self.scores = keras.layers.Embedding(
        vocabulary_size, 1, embeddings_initializer='zeros', dtype=self.dtype_policy
    )

  def build(self, input_shape):
    self.scores.build(input_shape[0])
    super().build(input_shape)

  def call(self, inputs):
    tokens, vectors = inputs
    there = tokens > 0
    # Half precision has no -1e9, and would round the shares of a long text.
    scores = ops.cast(self.scores(tokens)[..., 0], 'float32')
    shares = ops.softmax(ops.where(there, scores, -1e9), axis=1)
    # Zeros for a text without tokens.
    shares = ops.cast(ops.where(there, shares, 0.0), vectors.dtype)
    return ops.sum(shares[..., None] * vectors, axis=1)

  def get_config(self):
    return {**super().get_config(), 'vocabulary_size': self.vocabulary_size}


@_register
class DenseModel(keras.Model):
  """Flattens the inputs, then applies dense layers with relu and one for the logits.

  Args:
    hidden_units: The widths of the hidden layers.
    num_classes: The number of outputs.
    **kwargs: Arguments of `keras.Model`, such as `name`.
  """

  def __init__(
      self, hidden_units: Sequence[int] = (32,), num_classes: int = 10, **kwargs
  ):
    super().__init__(**kwargs)
    self.hidden_units = tuple(hidden_units)
    self.num_classes = num_classes
    # A saved model has one dtype policy for all of it.
    policy = self.dtype_policy
    self.flatten = keras.layers.Flatten(dtype=policy)
    self.hidden = [
        keras.layers.Dense(units, activation='relu', dtype=policy)
        for units in self.hidden_units
    ]
    # No softmax: the losses take logits.
    self.classifier = keras.layers.Dense(num_classes, dtype=policy)

  def build(self, input_shape):
    width = math.prod(input_shape[1:])
    for layer in [*self.hidden, self.classifier]:
      layer.build((None, width))
      width = layer.units
    super().build(input_shape)

  def call(self, inputs, training=False):
    outputs = self.flatten(inputs)
    for layer in self.hidden:
      outputs = layer(outputs)
    return self.classifier(outputs)

  def get_config(self):
    return {
        **super().get_config(),
        'hidden_units': self.hidden_units,
        'num_classes': self.num_classes,
    }


@_register
class SmallMlp(DenseModel):
  """A student of one hidden layer: Dense 32 relu, then the classes' logits.

  Args:
    num_classes: The number of outputs.
    hidden_units: The widths of the hidden layers.
    **kwargs: Arguments of `keras.Model`, such as `name`.
  """

  def __init__(self, num_classes: int = 10, hidden_units=(32,), **kwargs):
    super().__init__(hidden_units, num_classes, **kwargs)


@_register
class LargeMlp(DenseModel):
  """A teacher of two hidden layers: Dense 64 and 32 relu, then the classes' logits.

  Args:
    num_classes: The number of outputs.
    hidden_units: The widths of the hidden layers.
    **kwargs: Arguments of `keras.Model`, such as `name`.
  """

  def __init__(self, num_classes: int = 10, hidden_units=(64, 32), **kwargs):
    super().__init__(hidden_units, num_classes, **kwargs)


def build_cnn(
    num_classes: int,
    input_shape: Sequence[int],
    *,
    filters: Sequence[int],
    units: int,
    dropout: float = 0.0,
) -> keras.Model:
  """Builds 3 x 3 convolutions, each followed by 2 x 2 pooling, and one dense layer.

  Args:
    num_classes: The number of logits.
    input_shape: [height, width, channels].
    filters: The number of filters of each convolution.
    units: The width of the dense layer.
    dropout: The dropout rate before the logits; no dropout layer if 0.

  Returns:
    The model.
  """
  layers = keras.layers
  model = keras.Sequential([keras.Input(tuple(input_shape))])
  for count in filters:
    model.add(layers.Conv2D(count, 3, padding='same', activation='relu'))
    model.add(layers.MaxPool2D())
  model.add(layers.Flatten())
  model.add(layers.Dense(units, activation='relu'))
  if dropout:
    model.add(layers.Dropout(dropout))
  model.add(layers.Dense(num_classes))
  return model


def build_group_norm_resnet(
    num_classes: int,
    input_shape: Sequence[int],
    *,
    blocks: int,
    width: int,
) -> keras.Model:
  """Builds a CIFAR ResNet of depth 6 * blocks + 2 with group norm.

  Source: He et al., "Deep Residual Learning" (2016), section 4.2, and Hsieh et
  al., "The Non-IID Data Quagmire" (2020), section 5.1, for group norm in place of
  batch norm.

  Args:
    num_classes: The number of logits.
    input_shape: [height, width, channels].
    blocks: Residual blocks in each of the three stages.
    width: Channels of the first stage, a multiple of 8; doubled twice.

  Returns:
    The model.
  """
  layers = keras.layers

  def conv(x, channels, stride):
    x = layers.Conv2D(
        channels, 3, stride, padding='same', use_bias=False,
        kernel_initializer='he_normal',
    )(x)
    return layers.GroupNormalization(8)(x)

  inputs = keras.Input(tuple(input_shape))
  x = layers.ReLU()(conv(inputs, width, 1))
  for stage in range(3):
    channels = width * 2**stage
    for block in range(blocks):
      stride = 2 if stage > 0 and block == 0 else 1
      shortcut = x
      x = layers.ReLU()(conv(x, channels, stride))
      x = conv(x, channels, 1)
      if shortcut.shape[-1] != channels or stride != 1:
        shortcut = layers.Conv2D(channels, 1, stride, use_bias=False)(shortcut)
      x = layers.ReLU()(layers.Add()([x, shortcut]))
  x = layers.GlobalAveragePooling2D()(x)
  return keras.Model(inputs, layers.Dense(num_classes)(x))


ModelBuilder = Callable[[int, Sequence[int]], keras.Model]

STUDENTS: dict[str, ModelBuilder] = {
    'mlp_small': lambda classes, shape: SmallMlp(classes),
    'cnn': lambda classes, shape: build_cnn(
        classes, shape, filters=(8, 16), units=32
    ),
    'resnet': lambda classes, shape: build_group_norm_resnet(
        classes, shape, blocks=1, width=8
    ),
}

TEACHERS: dict[str, ModelBuilder] = {
    'mlp_large': lambda classes, shape: LargeMlp(classes),
    'cnn': lambda classes, shape: build_cnn(
        classes, shape, filters=(32, 64), units=64, dropout=0.25
    ),
    'resnet': lambda classes, shape: build_group_norm_resnet(
        classes, shape, blocks=2, width=16
    ),
}


def of_shape(
    builders: Mapping[str, ModelBuilder], num_classes: int, input_shape: Sequence[int]
) -> dict[str, Callable[[], keras.Model]]:
  """Returns builders without arguments, for inputs of a shape and a number of classes.

  Args:
    builders: By name, (num_classes, input_shape) -> `keras.Model`.
    num_classes: The number of logits.
    input_shape: Without the batch dimension.

  Returns:
    By name, () -> `keras.Model`.
  """
  return {
      name: functools.partial(build, num_classes, tuple(input_shape))
      for name, build in builders.items()
  }
