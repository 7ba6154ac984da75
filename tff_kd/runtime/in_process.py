"""Contexts that run TFF's computations in this process, with its own TensorFlow."""

import asyncio
from collections.abc import Iterator
import contextlib
import inspect
import threading
from typing import Any, Optional

from tff_kd.compat import tff
from tff_kd.runtime import devices
from tff_kd.runtime import running
from tff_kd.runtime import tff_internals


class _Context:
  """What both contexts of this process have."""

  def __init__(
      self,
      device: devices.Device = None,
      max_concurrent_clients: Optional[int] = None,
  ):
    """Initializes the context.

    Args:
      device: As `in_process` takes it.
      max_concurrent_clients: As `in_process` takes it.

    Raises:
      ValueError: If there is no such device.
    """
    self._runner = running.Runner(device, max_concurrent_clients)


class InProcessContext(_Context, tff.framework.SyncContext):
  """Runs computations in this process, with its TensorFlow and its devices.

  It starts no process and opens no port, and building it costs nothing: TensorFlow's
  devices are initialized by the first computation. It may be called from several threads
  at once, and where an event loop runs.
  """

  def invoke(self, comp: tff.framework.ConcreteComputation, arg: Any) -> Any:
    """Runs a computation; see `tff.framework.SyncContext`.

    Args:
      comp: The computation.
      arg: Its argument; `None` if it takes none.

    Returns:
      Its result, of the same Python types as from TFF's own context.

    Raises:
      ComputationError: If it fails while it runs; a client's failure names the client.
      NotImplementedError: If it uses an operator that does not run in process.
      TypeError: If the argument does not fit the computation's type.
    """
    return self._runner.run(comp, arg)


class AsyncInProcessContext(_Context, tff.framework.AsyncContext):
  """An `InProcessContext` for `tff.program` and `tff.learning.programs`.

  Computations run in threads; the event loop goes on meanwhile.
  """

  async def invoke(self, comp: tff.framework.ConcreteComputation, arg: Any) -> Any:
    """Runs a computation; see `tff.framework.AsyncContext`.

    Args:
      comp: The computation.
      arg: Its argument, or what can be awaited for it; `None` if it takes none.

    Returns:
      Its result, of the same Python types as from TFF's own context.

    Raises:
      ComputationError: If it fails while it runs; a client's failure names the client.
      NotImplementedError: If it uses an operator that does not run in process.
      TypeError: If the argument does not fit the computation's type.
    """
    if inspect.isawaitable(arg):
      arg = await arg
    stop = threading.Event()
    try:
      return await asyncio.to_thread(self._runner.run, comp, arg, stop)
    except asyncio.CancelledError:
      stop.set()
      raise


@contextlib.contextmanager
def in_process(
    device: devices.Device = None, max_concurrent_clients: Optional[int] = None
) -> Iterator[InProcessContext]:
  """Runs TFF's computations in this process while the block lasts.

  Sets TFF's default context, for all threads that have not set one; afterwards puts back
  the one before.

  Args:
    device: Where clients and the server compute: 'CPU', 'GPU', 'GPU:0' or a list of such
      names; a name without a number is all devices of the kind. If `None`, TensorFlow
      places each operation. Clients run in parallel on the cores of a CPU, one at a time
      on an accelerator, and spread over several devices.
    max_concurrent_clients: How many clients compute at a time; if `None`, one a core, or
      one an accelerator.

  Yields:
    The context.

  Raises:
    ValueError: If there is no such device, with the names of those that there are.
  """
  context = InProcessContext(device, max_concurrent_clients)
  with tff_internals.default_context(context):
    yield context


def set_default() -> InProcessContext:
  """Makes a context in this process TFF's default, in all threads that have set none.

  Returns:
    The context.
  """
  context = InProcessContext()
  tff_internals.set_default_context(context)
  return context


@contextlib.contextmanager
def tff_worker() -> Iterator[tff.framework.SyncContext]:
  """Runs TFF's computations on the worker that TFF ships while the block lasts.

  The worker is a child process with a TensorFlow of its own, without GPUs, on Linux on
  x86-64; what it prints is dropped, and it ends with the block. Secure sums are made in
  the clear, as it has no protocol for them.

  Yields:
    The context.
  """

  def compile_computation(comp):
    proto = tff.framework.serialize_computation(comp)
    if b'federated_secure' in proto.SerializeToString():
      comp = tff.backends.test.replace_secure_intrinsics_with_bodies(comp)
    return tff.backends.native.desugar_and_transform_to_native(comp)

  with tff_internals.worker_factory() as factory:
    context = tff.framework.SyncExecutionContext(
        factory,
        compile_computation,
        transform_args=tff.tensorflow.transform_args,
        transform_result=tff.tensorflow.transform_result,
    )
    try:
      with tff_internals.default_context(context):
        yield context
    finally:
      tff_internals.end_thread(context)
