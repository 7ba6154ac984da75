"""Python values to tensors and back, as TFF takes and returns them."""

from collections.abc import Iterator, Sequence
from typing import Any
import weakref

import numpy as np
import tensorflow as tf
import tree

from tff_kd import graphs
from tff_kd.compat import tff
from tff_kd.runtime import tff_internals


# Whether a dataset shuffles, for each dataset that has been looked at.
_SHUFFLES = weakref.WeakKeyDictionary()

_SCALARS = (bool, int, float, complex, str, bytes, np.generic)
_TENSOR_TYPES = (*_SCALARS, np.ndarray)


def to_tensors(value: Any, type_spec: tff.Type) -> list[tf.Tensor]:
  """Returns a value's leaves as tensors.

  Args:
    value: Tensors, NumPy arrays, numbers, strings, and for a sequence a
      `tf.data.Dataset`, a list of elements or TFF's serialized form, in the containers
      that TFF takes.
    type_spec: The type, without placements.

  Returns:
    The tensors, in the order of the type; a dataset as its variant tensor.

  Raises:
    TypeError: If the value does not fit the type.
  """
  if isinstance(type_spec, tff.TensorType):
    return [_to_tensor(value, type_spec)]
  if isinstance(type_spec, tff.SequenceType):
    return [_to_variant(value, type_spec)]
  if not isinstance(type_spec, tff.StructType):
    raise TypeError(f'A computation cannot take an argument of type {type_spec}.')
  elements = tff.structure.from_container(value)
  if len(elements) != len(type_spec):
    raise TypeError(
        f'A struct value of {len(elements)} elements does not match a struct type of '
        f'{len(type_spec)} elements, found\n{value!r}\nfor the type\n{type_spec}.'
    )
  leaves = []
  for (name, element), (wanted, element_type) in zip(
      tff.structure.iter_elements(elements), tff.structure.iter_elements(type_spec)
  ):
    if isinstance(value, tff.structure.Struct) and name not in (wanted, None):
      raise TypeError(
          f'Value {value} does not match type {type_spec}: mismatching tuple element '
          f'names {name} vs. {wanted}.'
      )
    leaves += to_tensors(element, element_type)
  return leaves


def _to_tensor(value: Any, type_spec: tff.TensorType) -> tf.Tensor:
  if (
      isinstance(value, (np.ndarray, np.generic))
      and value.dtype == type_spec.dtype
      and value.shape == type_spec.shape
  ):
    return tf.constant(value)
  dtype = tf.as_dtype(type_spec.dtype)
  if isinstance(value, tf.Variable):
    value = value.read_value()
  if isinstance(value, tf.Tensor):
    if value.dtype == dtype and value.shape.is_compatible_with(type_spec.shape):
      return value
    value = value.numpy()
  elif isinstance(value, (list, tuple)):
    for number in tree.flatten(value):
      tff_internals.check_array(number, tff.TensorType(type_spec.dtype.type))
    value = np.asarray(value, object if dtype == tf.string else dtype.as_numpy_dtype)
  elif not isinstance(value, _TENSOR_TYPES):
    raise TypeError(f'Expected a value of type {type_spec}, found {type(value)}.')
  tff_internals.check_array(value, type_spec)
  if dtype == tf.string and isinstance(value, (np.ndarray, np.generic)):
    value = value.astype(object)
  return tf.constant(value, dtype)


def _to_variant(value: Any, type_spec: tff.SequenceType) -> tf.Tensor:
  if isinstance(value, list):
    value = tff_internals.dataset_of_elements(value, type_spec.element)
  elif hasattr(value, 'WhichOneof'):
    value, _ = tff.framework.deserialize_value(value, type_spec)
  if not isinstance(value, tf.data.Dataset):
    raise TypeError(
        f'Cannot take a value of Python type {type(value).__qualname__} as a value of '
        f'TFF type {type_spec}: expected a `tf.data.Dataset` or a list.'
    )
  return _anew(_of_type(value, type_spec))


def _anew(dataset: tf.data.Dataset) -> tf.Tensor:
  """Returns the variant of a dataset whose shuffles start as in a first iteration.

  A dataset is a value: rounds that are given the same one read the same order, as where
  TFF serializes it, and a resumed run repeats an unbroken one.
  """
  variant = tf.data.experimental.to_variant(dataset)
  if not _SHUFFLES.get(dataset, True):
    return variant
  serialized = tf.raw_ops.DatasetToGraphV2(input_dataset=variant).numpy()
  _SHUFFLES[dataset] = b'ShuffleDatasetV3' in serialized
  if not _SHUFFLES[dataset]:
    return variant
  graph = tf.compat.v1.GraphDef.FromString(serialized)
  for node in graph.node:
    if node.op == 'ShuffleDatasetV3':
      # `ShuffleDataset` has a generator of its own; that of `ShuffleDatasetV3` goes on
      # from one iteration to the next.
      node.op = 'ShuffleDataset'
      del node.input[4:]
  return tf.raw_ops.DatasetFromGraph(graph_def=graph.SerializeToString())


def _of_type(
    dataset: tf.data.Dataset, type_spec: tff.SequenceType
) -> tf.data.Dataset:
  """Returns a dataset with elements of a type, or raises an error.

  Shapes that the dataset leaves open (as many of `from_generator` do) are checked when an
  element is read.
  """
  spec = dataset.element_spec
  element = tff.types.tensorflow_to_type(spec)
  tff_internals.check_dataset_containers(element)
  found = tff.SequenceType(element)
  if type_spec.is_assignable_from(found):
    return dataset
  closed = _with_shapes(spec, graphs.specs_of(type_spec.element))
  if not type_spec.is_assignable_from(
      tff.SequenceType(tff.types.tensorflow_to_type(closed))
  ):
    raise TypeError(
        f'Cannot take a dataset with elements of type {found} as a value of TFF type '
        f'{type_spec}.'
    )

  def ensure_shapes(*parts):
    element = parts if len(parts) > 1 else parts[0]
    return tf.nest.map_structure(
        lambda t, s: tf.ensure_shape(t, s.shape), element, closed
    )

  return dataset.map(ensure_shapes)


def _with_shapes(spec: Any, expected: Any) -> Any:
  """Returns the specs of an element with open shapes replaced by expected ones."""
  shapes = [spec.shape for spec in tf.nest.flatten(expected)]
  leaves = tf.nest.flatten(spec)
  if len(shapes) != len(leaves):
    return spec
  return tf.nest.pack_sequence_as(spec, [
      tf.TensorSpec(shape, leaf.dtype) if leaf.shape.is_compatible_with(shape) else leaf
      for leaf, shape in zip(leaves, shapes)
  ])


def from_tensors(tensors: Iterator[tf.Tensor], type_spec: tff.Type) -> Any:
  """Returns what TFF returns for tensors.

  Args:
    tensors: The leaves' tensors.
    type_spec: The type, without placements.

  Returns:
    NumPy arrays and scalars, `bytes` for scalar strings and `tf.data.Dataset`s, in
    `tff.structure.Struct`s.
  """
  if isinstance(type_spec, tff.StructType):
    return tff.structure.Struct(
        (name, from_tensors(tensors, element))
        for name, element in tff.structure.iter_elements(type_spec)
    )
  tensor = next(tensors)
  if isinstance(type_spec, tff.SequenceType):
    spec = graphs.specs_of(type_spec.element)
    return tf.data.experimental.from_variant(tensor, spec)
  return tensor.numpy()


def short_values(value: Any) -> Sequence[Any]:
  """Returns the numbers and strings in an argument, for messages."""
  if isinstance(value, tff.structure.Struct):
    value = list(value)
  return [
      leaf.item() if isinstance(leaf, np.generic) else leaf
      for leaf in tree.flatten(value)
      if isinstance(leaf, _SCALARS)
  ]
