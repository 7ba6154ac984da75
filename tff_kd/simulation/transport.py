"""What crosses between the script and a worker: counted, sent once, copied little.

A worker that is gone, or answers no more, is an error soon.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import threading
from typing import Any, Optional

import cachetools
import grpc
import numpy as np
from tff_kd.compat import tff
from tensorflow_federated.proto.v0 import executor_pb2
from tensorflow_federated.proto.v0 import executor_pb2_grpc
# Not public, and the release that has it is the last: `RemoteValue`.
from tensorflow_federated.python.core.impl.executors import remote_executor

# After so many seconds without an answer a worker is lost.
SILENCE_S = 30.0
# How often it is asked in that time.
_BEATS = 6
# A request that changes nothing.
_NOTHING = executor_pb2.DisposeRequest(
    executor=executor_pb2.ExecutorId(id='heartbeat')
)
_UNKNOWN_EXECUTOR = 'No executor found'
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
    reason: Why.
  """

  def __init__(self, worker: str, reason: str):
    super().__init__(f'The worker {worker} is lost: {reason}')
    self.worker = worker
    self.reason = reason


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


class Stub(tff.framework.RemoteExecutorStub):
  """The calls of a worker's service: counted; none goes on once the worker is lost.

  Unlike TFF's, a call to a lost worker is an error at once, not tried for ever.

  Attributes:
    lost: Why the worker is lost; `None` while it is not.
    ended: Whether what it holds needs no release any more.
  """

  def __init__(self, name: str, channel: grpc.Channel, traffic: Traffic):
    """Initializes the stub.

    Args:
      name: What the worker is called.
      channel: To the worker.
      traffic: What counts what crosses.
    """
    self.lost: Optional[str] = None
    self.ended = False
    self._name = name
    self._service = executor_pb2_grpc.ExecutorGroupStub(channel)
    self._traffic = traffic

  def lose(self, reason: str) -> None:
    """Says that the worker is lost, unless that is known."""
    self.lost = self.lost or reason

  def _call(self, method: Callable[[Any], Any], request: Any) -> Any:
    if self.lost is None:
      try:
        return method(request)
      except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE or (
            # Another process than before is there.
            error.code() is grpc.StatusCode.FAILED_PRECONDITION
            and _UNKNOWN_EXECUTOR in error.details()
        ):
          self.lose(error.details())
        elif self.lost is None:
          raise
      except ValueError:  # The channel is closed.
        if self.lost is None:
          raise
    raise WorkerLostError(self._name, self.lost)

  def get_executor(self, request):
    return self._call(self._service.GetExecutor, request)

  def create_value(self, request):
    self._traffic.bytes_sent += request.ByteSize()
    return self._call(self._service.CreateValue, request)

  def create_struct(self, request):
    return self._call(self._service.CreateStruct, request)

  def create_call(self, request):
    return self._call(self._service.CreateCall, request)

  def create_selection(self, request):
    return self._call(self._service.CreateSelection, request)

  def compute(self, request):
    response = self._call(self._service.Compute, request)
    self._traffic.bytes_received += response.ByteSize()
    return response

  def dispose(self, request):
    self._release(self._service.Dispose, request)

  def dispose_executor(self, request):
    self._release(self._service.DisposeExecutor, request)

  def _release(self, method: Callable[[Any], Any], request: Any) -> None:
    # What is left when the worker ends has ended with it.
    if not self.ended and self.lost is None:
      with contextlib.suppress(WorkerLostError):
        self._call(method, request)

  @property
  def is_ready(self) -> bool:
    return self.lost is None


class Connection:
  """A channel to a worker, with a heartbeat; once lost, it stays lost.

  A worker that is frozen, or whose machine is gone, answers no call and breaks no
  connection. So it is asked every few seconds for something that costs nothing, which
  TFF's worker answers also while it computes; without an answer, all calls end.

  Attributes:
    channel: The `grpc.Channel`.
    stub: The `Stub`.
  """

  def __init__(
      self,
      name: str,
      channel: grpc.Channel,
      traffic: Traffic,
      *,
      silence_s: float = SILENCE_S,
  ):
    """Initializes the connection; does not wait for the worker.

    Args:
      name: What the worker is called in messages.
      channel: To the worker; is closed with the connection.
      traffic: What counts what crosses.
      silence_s: After so many seconds without an answer the worker is lost.
    """
    self.channel = channel
    self.stub = Stub(name, channel, traffic)
    self._traffic = traffic
    self._silence_s = silence_s
    self._service = executor_pb2_grpc.ExecutorGroupStub(channel)
    self._closed = threading.Event()
    self._heart = threading.Thread(
        target=self._beat, name=f'heartbeat of {name}', daemon=True
    )
    self._heart.start()

  def why_silent(self, timeout_s: float, wait: bool = False) -> Optional[str]:
    """Asks the worker for nothing.

    Args:
      timeout_s: How long the answer may take.
      wait: Whether to wait so long for the connection, too.

    Returns:
      What went wrong; `None` if it answered.
    """
    try:
      self._service.Dispose(_NOTHING, timeout=timeout_s, wait_for_ready=wait)
    except grpc.RpcError as error:
      if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f'it has not answered for {timeout_s:g} s.'
      # If the heartbeat has closed the channel meanwhile, it knows better.
      return self.stub.lost or error.details()
    except ValueError:
      return self.stub.lost or 'its connection is closed.'
    return None

  def _beat(self) -> None:
    while not self._closed.wait(self._silence_s / _BEATS):
      # Asked twice: this process may have slept meanwhile.
      if self.why_silent(self._silence_s / 2) is not None:
        reason = self.why_silent(self._silence_s / 2)
        if reason is not None and not self._closed.is_set():
          self.stub.lose(reason)
          # Ends the calls that wait.
          self.channel.close()
          return

  def executor_factory(self) -> tff.framework.ExecutorFactory:
    """Makes executors on the worker."""

    def stack_fn(cardinalities):
      executor = Executor(self.stub, self._traffic)
      executor.set_cardinalities({tff.CLIENTS: 0, **cardinalities})
      return executor

    return tff.framework.ResourceManagingExecutorFactory(stack_fn)

  def close(self) -> None:
    """Ends the connection, and the calls that wait."""
    self._closed.set()
    self.stub.ended = True
    self.channel.close()
    self._heart.join()


class Executor(tff.framework.RemoteExecutor):
  """Sends a computation to the worker once, not with every call, and copies less.

  TFF's own sends the whole graph of a round in every round, and the worker reads it
  anew each time; and it copies a value once for each level of its nesting.
  """

  def __init__(self, stub: Stub, traffic: Traffic):
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
