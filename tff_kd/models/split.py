"""A model as a body, whose outputs are features, and a head that works on these."""

from collections.abc import Sequence
import inspect
import math
from typing import Any, Optional

import keras
import numpy as np
import tensorflow as tf

from tff_kd.models import batches
from tff_kd.models import embeddings
from tff_kd.models import spec as spec_lib

_TOLERANCE = 1e-4


def split_layers(
    model_layers: Sequence[keras.layers.Layer], split_layer: Optional[str]
) -> tuple[list[keras.layers.Layer], list[keras.layers.Layer]]:
  """Returns the layers up to and with the split layer, and those after it: the head.

  Args:
    model_layers: Those of a model that applies them one after the other.
    split_layer: The name of the layer whose outputs are the features; if `None`, the
      one before the last with weights.

  Raises:
    ValueError: If there is no such layer, or nothing before or in the head.
  """
  layers = [
      layer for layer in model_layers
      if not isinstance(layer, keras.layers.InputLayer)
  ]
  names = [layer.name for layer in layers]
  if split_layer is None:
    index = max((i for i, layer in enumerate(layers) if layer.weights), default=0) - 1
  elif split_layer in names:
    index = names.index(split_layer)
  else:
    raise ValueError(
        f"`split_layer` must be one of the student's layers {names}, found "
        f'{split_layer!r}.'
    )
  body, head = layers[: index + 1], layers[index + 1 :]
  if not body or not any(layer.trainable_weights for layer in head):
    raise ValueError(
        'The student must have layers before the split, and weights to train after it; '
        f'found the layers {[layer.name for layer in body]} and '
        f'{[layer.name for layer in head]}. Choose another `split_layer`.'
    )
  return body, head


def _apply(layers: list[keras.layers.Layer], inputs: Any) -> tf.Tensor:
  """Applies layers in inference mode: statistics are of real examples only."""
  outputs = inputs
  for layer in layers:
    takes_training = 'training' in inspect.signature(layer.call).parameters
    outputs = layer(outputs, training=False) if takes_training else layer(outputs)
  return outputs


class SplitModel:
  """A student as body and head; both are called in inference mode.

  Attributes:
    spec: The `ModelSpec`.
    feature_shape: The static shape of one example's features.
  """

  def __init__(self, spec: spec_lib.ModelSpec, split_layer: Optional[str] = None):
    """Initializes the split.

    Args:
      spec: A model that applies its layers one after the other.
      split_layer: As `split_layers` has it.

    Raises:
      ValueError: If the model cannot be split there.
    """
    self.spec = spec
    self._body, self._head = split_layers(spec.layers, split_layer)
    self.feature_shape = self._checked_feature_shape()

  @property
  def num_features(self) -> int:
    """How many numbers the features of one example are."""
    return math.prod(self.feature_shape)

  def _checked_feature_shape(self) -> tuple[int, ...]:
    """Returns the shape of an example's features; raises if layers form no chain."""
    inputs_spec = batches.split_batch(self.spec.input_spec)[0]
    names = [layer.name for layer in self._body + self._head]
    refusal = (
        'To be split, the student must apply its layers one after the other; here '
        f'{names} in turn are not the model. Use a sequential model, or one whose '
        '`layers` are in the order of their use.'
    )
    if not isinstance(inputs_spec, tf.TensorSpec):
      raise ValueError(refusal)
    shape = [None] + [d or 1 for d in inputs_spec.shape[1:]]
    inputs = batches.example_of(
        tf.TensorSpec(shape, inputs_spec.dtype),
        self.spec.batch_size or 8,
        np.random.default_rng(0),
    )
    try:
      features = _apply(self._body, inputs)
      outputs = _apply(self._head, features)
    except (TypeError, ValueError) as error:
      raise ValueError(f'{refusal} Keras says: {error}') from error
    expected = self.spec.call(
        self.spec.values(self.spec.initial_weights), inputs
    ).outputs
    if outputs.shape != expected.shape or not np.allclose(
        outputs, expected, atol=_TOLERANCE
    ):
      raise ValueError(refusal)
    return tuple(features.shape[1:])

  @property
  def head_variables(self) -> list[keras.Variable]:
    """The Keras variables of the head."""
    return [variable for layer in self._head for variable in layer.variables]

  def features(self, model: spec_lib.BoundModel, inputs: Any) -> tf.Tensor:
    """Returns what a model's body makes of inputs.

    Args:
      model: A model of the same builder, with values of its own.
      inputs: A batch of inputs.

    Returns:
      float32 `[batch, num_features]`; not numbers for ids that an embedding does not
      have.
    """
    with model.scope(), embeddings.checked_ids(training=False):
      features = _apply(self._body, inputs)
    return tf.reshape(tf.cast(features, tf.float32), [-1, self.num_features])

  def head_logits(self, features: tf.Tensor) -> tf.Tensor:
    """Returns the head's logits, within the scope of a model's values.

    Args:
      features: float32 `[batch, num_features]`.
    """
    shaped = tf.reshape(features, [-1, *self.feature_shape])
    return self.spec.class_logits(_apply(self._head, shaped))
