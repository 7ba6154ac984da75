"""Values cross to the worker as TFF itself would send them."""

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest
import tensorflow as tf
from tff_kd.compat import tff
from tensorflow_federated.proto.v0 import executor_pb2

from tff_kd.simulation import transport

_DTYPES = [
    np.bool_, np.int8, np.int32, np.int64, np.uint8, np.uint32, np.float16,
    np.float32, np.float64,
]


@st.composite
def _tensors(draw):
  dtype = draw(st.sampled_from(_DTYPES))
  shape = draw(st.lists(st.integers(0, 3), max_size=3))
  rng = np.random.default_rng(draw(st.integers(0, 99)))
  array = np.asarray(rng.normal(size=shape) * 50).astype(dtype)
  if array.ndim:
    if array.ndim == 2 and draw(st.booleans()):
      array = array.T
    known = draw(st.booleans())
    type_spec = tff.TensorType(dtype, array.shape if known else [None] * array.ndim)
    return array, type_spec
  return dtype(array), tff.TensorType(dtype)


@st.composite
def _structs(draw, children):
  values, types = zip(*draw(st.lists(children, min_size=1, max_size=3)))
  if draw(st.booleans()):
    names = [f'n{i}' for i in range(len(values))]
    return (
        dict(zip(names, values)),
        tff.StructWithPythonType(list(zip(names, types)), dict),
    )
  return list(values), tff.StructWithPythonType(types, list)


_NOTHING = st.just(((), tff.StructType([])))
_MEMBERS = st.recursive(_tensors() | _NOTHING, _structs, max_leaves=5)


@st.composite
def _values(draw):
  value, type_spec = draw(_MEMBERS)
  kind = draw(st.sampled_from(['plain', 'server', 'clients']))
  if kind == 'server':
    return value, tff.FederatedType(type_spec, tff.SERVER)
  if kind == 'clients':
    count = draw(st.integers(1, 3))
    return [value] * count, tff.FederatedType(type_spec, tff.CLIENTS)
  return value, type_spec


@settings(max_examples=150, deadline=None)
@given(_values())
def test_as_tff_serializes_and_back(value_and_type):
  value, type_spec = value_and_type
  expected, _ = tff.framework.serialize_value(value, type_spec)
  message = executor_pb2.Value()
  transport.serialize_into(message, value, type_spec)
  assert message == expected
  back = transport.deserialize(message, type_spec)
  tffs, _ = tff.framework.deserialize_value(message, type_spec)
  _assert_same(back, tffs)


def _assert_same(actual, expected):
  assert type(actual) is type(expected)
  if isinstance(expected, tff.structure.Struct):
    assert tff.structure.name_list_with_nones(
        actual
    ) == tff.structure.name_list_with_nones(expected)
    actual, expected = list(actual), list(expected)
  if isinstance(expected, list):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected):
      _assert_same(a, e)
  else:
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    'value, type_spec',
    [
        (3, tff.TensorType(np.int32)),
        (True, tff.TensorType(np.bool_)),
        ('text', tff.TensorType(np.str_)),
        ([1, 2], tff.TensorType(np.int32, [2])),
    ],
)
def test_python_values_and_strings(value, type_spec):
  message = executor_pb2.Value()
  transport.serialize_into(message, value, type_spec)
  assert message == tff.framework.serialize_value(value, type_spec)[0]


@pytest.mark.parametrize(
    'value, type_spec',
    [
        (np.zeros(3, np.float32), tff.TensorType(np.float32, [2])),
        (np.zeros(2, np.float64), tff.TensorType(np.int32, [2])),
        (2**40, tff.TensorType(np.int32)),
        ([1.0], tff.StructType([np.float32, np.float32])),
        (np.float32(1), tff.FederatedType(np.float32, tff.CLIENTS)),
    ],
)
def test_what_does_not_fit_is_tffs_error(value, type_spec):
  with pytest.raises((TypeError, ValueError)):
    transport.serialize_into(executor_pb2.Value(), value, type_spec)


def test_datasets():
  message = executor_pb2.Value()
  type_spec = tff.SequenceType(np.int64)
  transport.serialize_into(message, tf.data.Dataset.range(3), type_spec)
  assert list(transport.deserialize(message, type_spec)) == [0, 1, 2]
