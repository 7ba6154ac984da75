"""Contexts that run TFF's computations in this process, with its own TensorFlow."""

import asyncio
import collections
from collections.abc import Iterator
import contextlib
import inspect
import threading
from typing import Any, Optional, cast

import tensorflow as tf

from tff_kd import graphs
from tff_kd.compat import tff
from tff_kd.runtime import clients
from tff_kd.runtime import dataflow
from tff_kd.runtime import devices
from tff_kd.runtime import evaluation
from tff_kd.runtime import plan as plan_lib
from tff_kd.runtime import tff_internals
from tff_kd.runtime import values

_MAX_PLANS = 128
# So many numbers and strings of an argument are shown in a message.
_MAX_SHOWN = 4


class ComputationError(RuntimeError):
  """A computation failed while it ran; TensorFlow's error is the cause."""


class _Runner:
  """Compiles computations once and runs them."""

  def __init__(
      self, device: devices.Device, max_concurrent_clients: Optional[int]
  ):
    tff_internals.check_version()
    self._slots = devices.Slots(device, max_concurrent_clients)
    self._lock = threading.Lock()
    # By identity; with the computation, so that its place is not given to another.
    self._plans: collections.OrderedDict[int, tuple[Any, plan_lib.Plan]] = (
        collections.OrderedDict()
    )
    self._workers: Optional[clients.Workers] = None

  def run(
      self,
      comp: tff.framework.ConcreteComputation,
      arg: Any,
      stop: Optional[threading.Event] = None,
  ) -> Any:
    """Runs a computation.

    Args:
      comp: The computation.
      arg: Its argument; `None` if it takes none.
      stop: No client starts once it is set.

    Returns:
      The result, as TFF's own contexts return it.

    Raises:
      ComputationError: If it fails while it runs.
      NotImplementedError: If it uses what does not run in process.
      TypeError: If the argument does not fit.
    """
    with self._lock:
      if self._workers is None:
        self._workers = clients.Workers(self._slots.get())
      plan = self._plan(comp)
    with self._workers.server.scope():
      run = _Run(plan, comp, arg, self._workers)
      result = run.run(stop or threading.Event())
    return tff.types.type_to_py_container(result, comp.type_signature.result)

  def _plan(self, comp: tff.framework.ConcreteComputation) -> plan_lib.Plan:
    if id(comp) not in self._plans:
      self._plans[id(comp)] = (comp, plan_lib.compile_computation(comp))
      if len(self._plans) > _MAX_PLANS:
        self._plans.popitem(last=False)
    self._plans.move_to_end(id(comp))
    return self._plans[id(comp)][1]


class _Run:
  """One run of a computation."""

  def __init__(
      self,
      plan: plan_lib.Plan,
      comp: tff.framework.ConcreteComputation,
      arg: Any,
      workers: clients.Workers,
  ):
    self._plan = plan
    self._workers = workers
    self._num_clients = tff_internals.num_clients(arg, comp.type_signature.parameter)
    # Tensors at the server, and of each client.
    self._scope: dict[dataflow.Leaf, tf.Tensor] = {}
    self._kept: dict[dataflow.Leaf, list[Any]] = {}
    self._of_clients: dict[evaluation.Argument, Any] = {}
    for argument in plan.arguments:
      value = _part(arg, argument.path)
      if argument.each_client:
        self._of_clients[argument] = value
      else:
        tensors = values.to_tensors(value, argument.type_spec)
        self._scope.update(zip(argument.leaves, tensors, strict=True))

  def run(self, stop: threading.Event) -> Any:
    """Runs all stages; returns the result in `tff.structure.Struct`s."""
    for stage in self._plan.stages:
      if stage.of_clients:
        self._run_at_clients(stage, stop)
      elif stage.work is not None:
        self._run_at_server(stage)
      for leaf in stage.dropped:
        self._kept.pop(leaf, None)
    return self._result(self._plan.result, self._plan.result_type)

  def _run_at_clients(self, stage: plan_lib.Stage, stop: threading.Event) -> None:
    needed = {*stage.inputs, *(stage.sums.values if stage.sums else ())}
    arguments = {
        argument: value for argument, value in self._of_clients.items()
        if needed.intersection(argument.leaves)
    }
    one_pass = clients.ClientPass(
        stage, arguments, self._scope, self._kept, self._num_clients
    )
    try:
      total = one_pass.run(self._workers, stop)
    except clients.ClientFailure as failure:
      error = failure.__cause__
      if not isinstance(error, tf.errors.OpError):
        raise error from None
      shown = [
          short for value in arguments.values()
          for short in values.short_values(value[failure.client])
      ]
      raise _failed(
          f'Client {failure.client} of the {self._num_clients} in this round'
          + (f', with the argument {shown},' if 0 < len(shown) <= _MAX_SHOWN else ''),
          error,
      ) from error
    if stage.sums is not None:
      self._scope.update(zip(stage.sums.total, total, strict=True))

  def _run_at_server(self, stage: plan_lib.Stage) -> None:
    args = [self._scope[leaf] for leaf in stage.inputs]
    try:
      made = self._workers.server.run(stage.work, args)
    except tf.errors.OpError as error:
      raise _failed('The server', error) from error
    self._scope.update(zip(stage.outputs, made, strict=True))

  def _result(self, value: Any, type_spec: tff.Type) -> Any:
    if isinstance(type_spec, tff.StructType):
      return tff.structure.Struct(
          (name, self._result(part, element))
          for part, (name, element) in zip(value, tff.structure.iter_elements(type_spec))
      )
    leaves = evaluation.flatten(value)
    if not isinstance(type_spec, tff.FederatedType):
      return values.from_tensors((self._scope[leaf] for leaf in leaves), type_spec)
    if type_spec.placement is tff.SERVER or type_spec.all_equal:
      return values.from_tensors((self._scope[leaf] for leaf in leaves), type_spec.member)
    return [
        values.from_tensors(
            (self._of_client(leaf, client) for leaf in leaves), type_spec.member
        )
        for client in range(self._num_clients)
    ]

  def _of_client(self, leaf: dataflow.Leaf, client: int) -> tf.Tensor:
    if leaf in self._scope:
      return self._scope[leaf]
    if leaf in self._kept:
      return self._kept[leaf][client]
    # The result holds a part of the argument.
    argument = cast(evaluation.Argument, leaf.node)
    tensors = values.to_tensors(self._of_clients[argument][client], argument.type_spec)
    return tensors[argument.leaves.index(leaf)]


def _part(arg: Any, path: tuple[int, ...]) -> Any:
  for index in path:
    arg = tff.structure.from_container(arg)[index]
  return arg


def _failed(who: str, error: tf.errors.OpError) -> ComputationError:
  message = f'{who} failed: {error.message}'
  where = graphs.user_traceback(error.message)
  if where:
    message += f'\nThe operation was made here:\n{where}'
  return ComputationError(message)


class InProcessContext(tff.framework.SyncContext):
  """Runs computations in this process, with its TensorFlow and its devices.

  It starts no process and opens no port, and building it costs nothing: TensorFlow's
  devices are initialized by the first computation. It may be called from several threads
  at once, and where an event loop runs.
  """

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
    self._runner = _Runner(device, max_concurrent_clients)

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


class AsyncInProcessContext(tff.framework.AsyncContext):
  """As `InProcessContext`, for `tff.program` and `tff.learning.programs`.

  Computations run in threads; the event loop goes on meanwhile.
  """

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
    self._runner = _Runner(device, max_concurrent_clients)

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
