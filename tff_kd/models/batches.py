"""Batches of examples: inputs, labels and weights, and examples of their form."""

from collections.abc import Mapping, Sequence
import collections
from typing import Any, Optional

import keras
import tensorflow as tf

from tff_kd import internals
from tff_kd import losses

# The key of the weights in a batch that is a mapping, as an argument of Keras's `fit`.
_SAMPLE_WEIGHT = 'sample_weight'
UNKNOWN_DIMENSION = 16


def split_batch(batch: Any) -> tuple[Any, Any]:
  """Returns the (inputs, labels) of a batch or of an `input_spec`.

  Args:
    batch: A pair, a triple or a mapping.
  """
  if isinstance(batch, Mapping):
    return batch['x'], batch['y']
  return batch[0], batch[1]


def sample_weight_of(batch: Any) -> Any:
  """Returns the sample weights of a batch or of an `input_spec`.

  Args:
    batch: A pair, a triple or a mapping.

  Returns:
    The weights, or `None` without any.
  """
  if isinstance(batch, Mapping):
    return batch.get(_SAMPLE_WEIGHT)
  return batch[2] if len(batch) == 3 else None


def num_examples(outputs: tf.Tensor, sample_weight: Optional[tf.Tensor]) -> tf.Tensor:
  """Counts the examples of a batch; those of weight 0 do not count.

  Args:
    outputs: The model's outputs for it.
    sample_weight: As `ModelSpec.sample_weight` returns it for it.

  Returns:
    An int32 scalar.
  """
  if sample_weight is None:
    return tf.shape(outputs)[0]
  has_weight = tf.reduce_any(
      sample_weight > 0.0, axis=list(range(1, sample_weight.shape.rank))
  )
  return tf.reduce_sum(tf.cast(has_weight, tf.int32))


def unmasked(
    outputs: tf.Tensor, mask: Optional[tf.Tensor] = None
) -> Optional[tf.Tensor]:
  """Returns which outputs count: those that Keras masks (`mask_zero`) do not.

  Args:
    outputs: A model's outputs, as the model returned them.
    mask: Optional 0/1 float32 of leading axes of the outputs: which of them count
      otherwise.

  Returns:
    0/1 float32 of leading axes of the outputs; `None` if all count.
  """
  kept = internals.keras_mask(outputs)
  if kept is None:
    return mask
  kept = tf.cast(kept, tf.float32)
  if mask is None:
    return kept
  rank = max(kept.shape.rank, mask.shape.rank)
  return losses.with_rank(kept, rank) * losses.with_rank(mask, rank)


def as_batch(batch: Any) -> Any:
  """Returns a batch, or the spec of one, as a tuple or an `OrderedDict`.

  Args:
    batch: (x, y), (x, y, sample_weight), or a mapping with these keys.

  Returns:
    A tuple, or for a mapping an `OrderedDict` with sorted keys, as TFF needs them; `None`
    if the batch has another structure.
  """
  if isinstance(batch, Mapping):
    if set(batch) - {_SAMPLE_WEIGHT} != {'x', 'y'}:
      return None
    return collections.OrderedDict((key, batch[key]) for key in sorted(batch))
  if isinstance(batch, (tuple, list)):
    batch = tuple(batch)  # `len` of `tff_kd.data.Examples` is the number of examples.
    return batch if len(batch) in (2, 3) else None
  return None


def check_input_spec(input_spec: Any) -> Any:
  """Checks an `input_spec`, and returns it as a batch.

  Args:
    input_spec: A structure of `tf.TensorSpec`s, such as a dataset's `element_spec`.

  Returns:
    A pair, a triple or a mapping; see `as_batch`.

  Raises:
    TypeError: If it does not only hold `tf.TensorSpec`s.
    ValueError: If it does not describe batches of inputs and labels.
  """
  batch_spec = as_batch(input_spec)
  if batch_spec is None:
    raise ValueError(
        '`input_spec` must describe batches as a pair (x, y), a triple (x, y, '
        "sample_weight) or a mapping with the keys 'x', 'y' and perhaps "
        f"'sample_weight', found {input_spec!r}. Pass the clients' "
        '`dataset.element_spec`.'
    )
  for spec in tf.nest.flatten(input_spec):
    if not isinstance(spec, tf.TensorSpec):
      raise TypeError(
          f'`input_spec` must hold only `tf.TensorSpec`s, found {spec!r}.'
      )
    if spec.shape.rank is None:
      raise ValueError(
          f'`input_spec` must tell how many dimensions there are, found {spec!r}. Give '
          '`tf.data.Dataset.from_generator` an `output_signature` with shapes.'
      )
    if spec.shape.rank < 1:
      raise ValueError(
          f'`input_spec` must have a batch dimension, found {spec!r}. Call '
          '`.batch(...)` on the datasets.'
      )
  _, labels_spec = split_batch(batch_spec)
  if not isinstance(labels_spec, tf.TensorSpec):
    raise ValueError(
        f'The labels must be one tensor, found {labels_spec!r}. Train on one output of '
        'the model at a time, or put the labels side by side in one array.'
    )
  if labels_spec.dtype == tf.string:
    raise ValueError(
        'The labels must be numbers, found strings. Encode them: '
        '`names, y = np.unique(labels, return_inverse=True)`.'
    )
  weight_spec = sample_weight_of(batch_spec)
  if weight_spec is not None and (
      not isinstance(weight_spec, tf.TensorSpec)
      or weight_spec.dtype in (tf.string, tf.complex64, tf.complex128)
  ):
    raise ValueError(
        'The sample weights must be one tensor of numbers `[batch]`, found '
        f'{weight_spec!r}.'
    )
  return batch_spec


def is_compatible(expected: Any, found: Any) -> bool:
  """Returns whether batches of one spec, of any size, can stand for those of another.

  Args:
    expected: A structure of `tf.TensorSpec`s.
    found: Another one, whose unknown dimensions fit any.
  """
  try:
    tf.nest.assert_same_structure(expected, found)
  except (TypeError, ValueError):
    return False

  def fits(e: tf.TensorSpec, f: Any) -> bool:
    if not isinstance(f, tf.TensorSpec) or e.dtype != f.dtype:
      return False
    if f.shape.rank is None:
      return True
    return e.shape.rank == f.shape.rank and (
        e.shape[1:].is_compatible_with(f.shape[1:])
    )

  return all(map(fits, tf.nest.flatten(expected), tf.nest.flatten(found)))


def example_of(spec: Any, batch_size: int, rng=None) -> Any:
  """Makes zeros, or random values, of a batched spec."""

  def make(leaf: tf.TensorSpec):
    shape = [batch_size] + [
        d if d is not None else UNKNOWN_DIMENSION
        for d in leaf.shape.as_list()[1:]
    ]
    if rng is None or leaf.dtype == tf.string:
      return tf.zeros(shape, leaf.dtype)
    if leaf.dtype.is_floating:
      return tf.constant(rng.standard_normal(shape), leaf.dtype)
    return tf.cast(tf.constant(rng.integers(0, 2, shape)), leaf.dtype)

  return tf.nest.map_structure(make, spec)


def by_name(model: keras.Model, inputs: Any) -> Any:
  """Returns inputs as a model takes them by name; all but mappings unchanged.

  Keras takes the values of an `OrderedDict` by position, those of a dict by name.
  """
  if not isinstance(inputs, Mapping):
    return inputs
  declared = internals.inputs_structure(model)
  if isinstance(declared, collections.OrderedDict) and set(declared) == set(inputs):
    return collections.OrderedDict((name, inputs[name]) for name in declared)
  return dict(inputs)


def with_lengths(spec: tf.TensorSpec, shape: Sequence[Optional[int]]) -> tf.TensorSpec:
  """Fills the unknown dimensions of a batched spec with those of a shape that fits."""
  known = [*shape, *[None] * spec.shape.rank][: spec.shape.rank]
  dims = [d if d is not None else k for d, k in zip(spec.shape.as_list(), known)]
  return tf.TensorSpec([spec.shape[0], *dims[1:]], spec.dtype)


def with_lengths_of(model: keras.Model, inputs_spec: Any) -> Any:
  """Fills the unknown dimensions of inputs with those that the model declares."""
  declared = getattr(model, 'inputs', None) or ()
  specs = tf.nest.flatten(inputs_spec)
  if len(declared) != len(specs):
    return inputs_spec
  if isinstance(inputs_spec, Mapping):
    named = {tensor.name: tensor.shape for tensor in declared}
    shapes = [named.get(name, ()) for name in sorted(inputs_spec)]
  else:
    shapes = [tensor.shape for tensor in declared]
  return tf.nest.pack_sequence_as(
      inputs_spec,
      [
          with_lengths(leaf, shape) if len(shape) == leaf.shape.rank else leaf
          for leaf, shape in zip(specs, shapes)
      ],
  )
