"""What the runtime over several workers needs of TFF's compiler and contexts."""

import math
from typing import Any, Optional

import numpy as np
from tff_kd.compat import tff

# What the clients' values of one part may take in the worker.
PART_BYTES = 256 * 2**20
_MIN_PART_CLIENTS = 16
# The worker holds so many copies of each client's value until all are summed.
_COPIES = 2
_STOP_TIMEOUT_S = 5.0


def compile_computation(comp: tff.Computation) -> tff.Computation:
  """Compiles a computation for TFF's workers."""
  return tff.backends.native.desugar_and_transform_to_native(
      sum_in_the_clear(comp)
  )


def sum_in_the_clear(comp: tff.Computation) -> tff.Computation:
  """Replaces secure sums, for which workers have no protocol, by the plain ones."""
  proto = tff.framework.serialize_computation(comp)
  # Looking for them takes a hundredth of the time.
  if b'federated_secure' not in proto.SerializeToString():
    return comp
  return tff.backends.test.replace_secure_intrinsics_with_bodies(comp)


def end_thread(context: Any) -> None:
  """Ends the thread of one of TFF's synchronous contexts.

  TFF means to end it when the context is collected, which it never is: the running
  thread refers to it.

  Args:
    context: A `tff.framework.SyncExecutionContext` or `MergeableCompExecutionContext`
      with no computation running, or none that will end.
  """
  # pylint: disable=protected-access
  loop = context._async_runner._event_loop
  thread = context._async_runner._thread
  # pylint: enable=protected-access
  loop.call_soon_threadsafe(loop.stop)
  thread.join(_STOP_TIMEOUT_S)


def part_size(client_bytes: int, part_bytes: int) -> int:
  """How many clients are in one part.

  Args:
    client_bytes: What each of them returns, in bytes.
    part_bytes: What all of them may take.
  """
  fitting = part_bytes // max(1, _COPIES * client_bytes)
  return max(_MIN_PART_CLIENTS, fitting)


def num_clients(value: Any, type_spec: Optional[tff.Type]) -> int:
  """The number of clients of an argument, 0 if it holds no client's value."""
  if isinstance(type_spec, tff.FederatedType):
    if type_spec.placement is tff.CLIENTS and isinstance(value, (list, tuple)):
      return len(value)
  elif isinstance(type_spec, tff.StructType):
    elements = tff.structure.from_container(value)
    return max(
        (num_clients(v, t) for v, t in zip(elements, type_spec)), default=0
    )
  return 0


def num_bytes(type_spec: tff.Type) -> int:
  """The bytes of all tensors of known shape in a type, one client's of each."""
  if isinstance(type_spec, tff.TensorType):
    shape = [d or 0 for d in type_spec.shape or ()]
    return math.prod(shape) * np.dtype(type_spec.dtype).itemsize
  if isinstance(type_spec, tff.FederatedType):
    return num_bytes(type_spec.member)
  if isinstance(type_spec, tff.StructType):
    return sum(num_bytes(t) for t in type_spec)
  return 0
