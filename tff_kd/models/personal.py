"""Layers that each client keeps for itself, while the others are averaged."""

from collections.abc import Sequence
import itertools
from typing import Any, Optional

import keras
import tensorflow as tf
from tff_kd.compat import tff

from tff_kd.models import cohorts
from tff_kd.models import spec as spec_lib
from tff_kd.models import split


class PersonalLayers:
  """Tells the values of personal layers from those that are shared.

  A model's values here are `ModelWeights`; those of the shared layers are `ModelWeights`
  too, with fewer arrays in the same order. Statistics of personal layers (batch norm's)
  are personal as well.
  """

  def __init__(self, spec: spec_lib.ModelSpec, layers: Sequence[keras.layers.Layer]):
    """Initializes it.

    Args:
      spec: The model.
      layers: Its personal layers.

    Raises:
      ValueError: If they have nothing to train, or if nothing is shared.
    """
    personal = {id(variable) for layer in layers for variable in layer.variables}
    self._is_shared = tff.learning.models.ModelWeights(
        [id(variable) not in personal for variable in spec.trainable_variables],
        [id(variable) not in personal for variable in spec.statistics_variables],
    )
    if len(set(self._is_shared.trainable)) < 2:
      raise ValueError(
          'Clients keep some trained layers and share others; of the trained weights '
          f'{[variable.path for variable in spec.trainable_variables]} the layers '
          f'{[layer.name for layer in layers]} have all or none. Choose another '
          '`split_layer`.'
      )

  def shared(self, values: Any) -> tff.learning.models.ModelWeights:
    """Returns the shared part.

    Args:
      values: `ModelWeights` of the whole model, of anything.
    """
    return tff.learning.models.ModelWeights(
        list(itertools.compress(values.trainable, self._is_shared.trainable)),
        list(itertools.compress(values.non_trainable, self._is_shared.non_trainable)),
    )

  def merged(self, shared: Any, own: Any) -> tff.learning.models.ModelWeights:
    """Returns a whole model: shared layers of one, personal ones of another.

    Args:
      shared: As `shared` returns it.
      own: `ModelWeights` of the whole model.
    """
    return tff.learning.models.ModelWeights(
        _merged(self._is_shared.trainable, shared.trainable, own.trainable),
        _merged(self._is_shared.non_trainable, shared.non_trainable, own.non_trainable),
    )

  def padded(self, shared: Any, like: Any) -> tff.learning.models.ModelWeights:
    """Returns a change of the whole model, zero where it is personal.

    Args:
      shared: As `shared` returns it.
      like: `ModelWeights` of `tf.TensorSpec`s of the whole model's change.
    """
    zeros = tf.nest.map_structure(lambda spec: tf.zeros(spec.shape, spec.dtype), like)
    return self.merged(shared, zeros)


def _merged(is_shared: Sequence[bool], shared: Any, own: Any) -> list[Any]:
  """Takes values in turn from `shared` and, where they are not shared, from `own`."""
  rest = iter(shared)
  return [
      next(rest) if from_shared else value
      for from_shared, value in zip(is_shared, own, strict=True)
  ]


def build_personal(
    students: cohorts.Students, split_layer: Optional[str], *, keeps: str
) -> list[PersonalLayers]:
  """Returns the layers that clients keep, by cohort.

  Args:
    students: The student, or those of the cohorts.
    split_layer: The name of the last layer of the body, as `split.split_layers` has it.
    keeps: Which part they keep: 'body' or 'head'.

  Raises:
    ValueError: If a model cannot be split there, or a part has nothing to train.
  """
  found = []
  for spec in students.specs:
    body, head = split.split_layers(spec.layers, split_layer)
    found.append(PersonalLayers(spec, {'body': body, 'head': head}[keeps]))
  return found
