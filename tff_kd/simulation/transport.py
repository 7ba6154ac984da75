"""What crosses between the script and its worker: counted, sent once, copied little.
"""

import dataclasses
import functools
from typing import Any

import cachetools
import grpc
import numpy as np
import tensorflow_federated as tff
from tensorflow_federated.proto.v0 import executor_pb2
# Not public, and the release that has it is the last: `RemoteValue`.
from tensorflow_federated.python.core.impl.executors import remote_executor

# That an executor keeps on the worker, for one number of clients.
_MAX_COMPUTATIONS = 32
# Where a message holds a scalar.
_SCALAR_FIELDS = {
    np.bool_: 'bool_list',
    np.int32: 'int32_list',
    np.int64: 'int64_list',
    np.float32: 'float32_list',
    np.float64: 'float64_list',
}


class WorkerLostError(RuntimeError):
  """A worker is gone, or answers no more.

  Attributes:
    worker: Its name.
  """

  def __init__(self, worker: str, reason: str):
    super().__init__(f'The worker {worker} is lost: {reason}')
    self.worker = worker


@dataclasses.dataclass
class Traffic:
  """What crossed between the script and its worker.

  Attributes:
    bytes_sent: Values and computations to the worker.
    bytes_received: Values from it.
    computations_sent: How many computations it was sent; each one once, as long as
      the number of clients in a round does not change.
  """

  bytes_sent: int = 0
  bytes_received: int = 0
  computations_sent: int = 0


class CountingStub(tff.framework.RemoteExecutorGrpcStub):
  """Counts what crosses; all data does in these two calls."""

  def __init__(self, channel: grpc.Channel, traffic: Traffic):
    super().__init__(channel)
    self._traffic = traffic
    self.ended = False

  def create_value(self, request):
    self._traffic.bytes_sent += request.ByteSize()
    return super().create_value(request)

  def compute(self, request):
    response = super().compute(request)
    self._traffic.bytes_received += response.ByteSize()
    return response

  def dispose(self, request):
    # What is left when the worker ends has ended with it.
    if not self.ended:
      super().dispose(request)

  def dispose_executor(self, request):
    if not self.ended:
      super().dispose_executor(request)


class Executor(tff.framework.RemoteExecutor):
  """Sends a computation to the worker once, not with every call, and copies less.

  TFF's own sends the whole graph of a round in every round, and the worker reads it
  anew each time; and it copies a value once for each level of its nesting.
  """

  def __init__(self, stub: CountingStub, traffic: Traffic):
    super().__init__(stub)
    self._traffic = traffic
    # By identity: TFF's compiler returns the same object for the same computation.
    self._computations = cachetools.LRUCache(_MAX_COMPUTATIONS)

  async def create_value(self, value, type_spec=None):
    if isinstance(value, tff.framework.ConcreteComputation):
      known = self._computations.get(id(value))
      if known is None:
        remote = await super().create_value(value, type_spec)
        self._traffic.computations_sent += 1
        # With the computation, so that its identity is not given to another.
        known = self._computations[id(value)] = (value, remote)
      return known[1]
    if type_spec is None:
      return await super().create_value(value)
    self._check_has_executor_id()
    request = executor_pb2.CreateValueRequest(executor=self._executor_id)
    serialize_into(request.value, value, type_spec)
    response = self._stub.create_value(request)
    return remote_executor.RemoteValue(response.value_ref, type_spec, self)

  async def _compute(self, value_ref, type_spec):
    self._check_has_executor_id()
    response = self._stub.compute(
        executor_pb2.ComputeRequest(
            executor=self._executor_id, value_ref=value_ref
        )
    )
    return deserialize(response.value, type_spec)

  def close(self):
    super().close()
    self._computations.clear()


def serialize_into(
    message: executor_pb2.Value, value: Any, type_spec: tff.Type
) -> None:
  """As `tff.framework.serialize_value`, but writes in place.

  Args:
    message: An empty message, which is filled.
    value: The value.
    type_spec: Its type.

  Raises:
    TypeError: If they do not fit.
  """
  if isinstance(type_spec, tff.FederatedType):
    values = [value] if type_spec.all_equal else value
    if isinstance(values, list):
      message.federated.type.CopyFrom(_serialized_type(type_spec).federated)
      for member in values:
        serialize_into(message.federated.value.add(), member, type_spec.member)
      return
  elif isinstance(type_spec, tff.StructType):
    elements = tff.structure.to_elements(tff.structure.from_container(value))
    types = tff.structure.to_elements(type_spec)
    if len(elements) == len(types):
      # A struct of nothing is set, too.
      message.struct.SetInParent()
      for (_, element), (name, element_type) in zip(elements, types):
        target = message.struct.element.add()
        if name:
          target.name = name
        serialize_into(target.value, element, element_type)
      return
  elif isinstance(type_spec, tff.TensorType):
    if _holds(type_spec, value):
      message.array.dtype = _serialized_type(type_spec).tensor.dtype
      message.array.shape.dim.extend(value.shape)
      message.array.content = value.tobytes()
      return
    if _holds_scalar(type_spec, value):
      message.array.dtype = _serialized_type(type_spec).tensor.dtype
      message.array.shape.SetInParent()
      field = getattr(message.array, _SCALAR_FIELDS[type_spec.dtype.type])
      field.value.append(value)
      return
  # Strings, sequences, and what does not fit: TFF's own, and its errors.
  message.CopyFrom(tff.framework.serialize_value(value, type_spec)[0])


def _holds(type_spec: tff.TensorType, value: Any) -> bool:
  """Whether a value is an array of this type, of numbers and not a scalar."""
  return (
      isinstance(value, np.ndarray)
      and value.ndim > 0
      and value.dtype == type_spec.dtype
      and value.dtype.kind in 'biuf'
      and type_spec.shape is not None
      and len(type_spec.shape) == value.ndim
      and all(t in (None, v) for t, v in zip(type_spec.shape, value.shape))
  )


def _holds_scalar(type_spec: tff.TensorType, value: Any) -> bool:
  dtype = type_spec.dtype.type
  if type_spec.shape != () or dtype not in _SCALAR_FIELDS:
    return False
  if type(value) is int and issubclass(dtype, np.integer):
    return np.iinfo(dtype).min <= value <= np.iinfo(dtype).max
  return type(value) is dtype


@functools.lru_cache(maxsize=256)
def _serialized_type(type_spec: tff.Type) -> Any:
  return tff.types.serialize_type(type_spec)


def deserialize(message: executor_pb2.Value, type_spec: tff.Type) -> Any:
  """As `tff.framework.deserialize_value`, without its checks and traces.

  Args:
    message: A value that the worker has sent.
    type_spec: Its type, which names what the message may leave unnamed.

  Returns:
    The value.
  """
  kind = message.WhichOneof('value')
  if kind == 'federated' and isinstance(type_spec, tff.FederatedType):
    values = [deserialize(v, type_spec.member) for v in message.federated.value]
    if not type_spec.all_equal:
      return values
    if len(values) == 1:
      return values[0]
  elif kind == 'struct' and isinstance(type_spec, tff.StructType):
    return tff.structure.Struct(
        (element.name or None, deserialize(element.value, element_type))
        for element, (_, element_type) in zip(
            message.struct.element, tff.structure.to_elements(type_spec), strict=True
        )
    )
  elif kind == 'array' and isinstance(type_spec, tff.TensorType):
    dtype = type_spec.dtype.type
    if message.array.content and message.array.shape.dim:
      content = np.frombuffer(message.array.content, dtype)
      return content.reshape(message.array.shape.dim)
    if type_spec.shape == () and dtype in _SCALAR_FIELDS:
      (scalar,) = getattr(message.array, _SCALAR_FIELDS[dtype]).value
      return dtype(scalar)
  return tff.framework.deserialize_value(message, type_spec)[0]
