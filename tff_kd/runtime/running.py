"""Runs compiled computations: the server here, the clients wherever they compute."""

import abc
from collections.abc import Callable, Mapping, Sequence
import threading
from typing import Any, Optional, cast

import cachetools
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
# Arguments with more numbers and strings are not shown in messages.
_MAX_SHOWN = 4

# The clients' arguments: each part is a list of one value for each client.
Arguments = Mapping[evaluation.Argument, Sequence[Any]]


class ComputationError(RuntimeError):
  """A computation failed while it ran; TensorFlow's error is the cause."""


class RunClients(abc.ABC):
  """The clients of one run of a computation, and what is kept of them in between."""

  @abc.abstractmethod
  def run_pass(
      self,
      stage: plan_lib.Stage,
      scope: Mapping[dataflow.Leaf, tf.Tensor],
      stop: threading.Event,
  ) -> Optional[clients.Tensors]:
    """Does the work of a stage for every client.

    Args:
      stage: One of the plan's stages at the clients.
      scope: Tensors at the server.
      stop: No client starts once it is set.

    Returns:
      The accumulators of the stage's sums, if it has any.

    Raises:
      ComputationError: If a client fails.
    """

  @abc.abstractmethod
  def kept(self, leaf: dataflow.Leaf) -> Optional[Sequence[tf.Tensor]]:
    """Returns a leaf's tensor of each client; `None` if no pass has kept it."""

  @abc.abstractmethod
  def drop(self, leaf: dataflow.Leaf) -> None:
    """Forgets a leaf, if it is kept."""


# Makes the clients of a run from the plan, their arguments, their number and the threads.
MakeClients = Callable[[plan_lib.Plan, Arguments, int, clients.Workers], RunClients]


class ClientsHere(RunClients):
  """Clients that compute in this process, in parallel on its cores or devices."""

  def __init__(
      self,
      plan: plan_lib.Plan,
      arguments: Arguments,
      num_clients: int,
      workers: clients.Workers,
  ):
    """Initializes them.

    Args:
      plan: The compiled computation.
      arguments: The clients' arguments.
      num_clients: The number of clients.
      workers: The threads that compute.
    """
    del plan
    self._arguments = arguments
    self._num_clients = num_clients
    self._workers = workers
    self._kept: dict[dataflow.Leaf, list[Any]] = {}

  def run_pass(self, stage, scope, stop):
    arguments = needed_arguments(stage, self._arguments)
    one_pass = clients.ClientPass(
        stage, arguments, scope, self._kept, self._num_clients
    )
    try:
      return one_pass.run(self._workers, stop)
    except clients.ClientFailure as failure:
      error = failure.__cause__
      if not isinstance(error, tf.errors.OpError):
        raise error from None
      who = client_name(failure.client, self._num_clients, arguments)
      raise failed(who, error.message) from error

  def kept(self, leaf):
    return self._kept.get(leaf)

  def drop(self, leaf):
    self._kept.pop(leaf, None)


class Runner:
  """Compiles computations once and runs them."""

  def __init__(
      self,
      device: devices.Device,
      max_concurrent_clients: Optional[int],
      make_clients: MakeClients = ClientsHere,
  ):
    """Initializes it.

    Args:
      device: Where the server computes, and clients that compute here; as `in_process`
        takes it.
      max_concurrent_clients: The number of clients that compute here at a time.
      make_clients: Makes the clients of a run.
    """
    tff_internals.check_version()
    devices.prepare(device, max_concurrent_clients)
    self._device = device
    self._max_concurrent_clients = max_concurrent_clients
    self._make_clients = make_clients
    self._lock = threading.Lock()
    # By `id`, with the computation, so that no other computation gets the same `id`.
    self._plans: cachetools.LRUCache = cachetools.LRUCache(_MAX_PLANS)
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
        slots = devices.find_slots(self._device, self._max_concurrent_clients)
        self._workers = clients.Workers(slots)
      plan = self._plan(comp)
    with self._workers.server.scope():
      run = _Run(plan, comp, arg, self._workers, self._make_clients)
      result = run.run(stop or threading.Event())
    return tff.types.type_to_py_container(result, comp.type_signature.result)

  def _plan(self, comp: tff.framework.ConcreteComputation) -> plan_lib.Plan:
    if id(comp) not in self._plans:
      proto = tff.framework.serialize_computation(comp)
      self._plans[id(comp)] = (comp, plan_lib.compile_computation(proto))
    return self._plans[id(comp)][1]


class _Run:
  """One run of a computation."""

  def __init__(
      self,
      plan: plan_lib.Plan,
      comp: tff.framework.ConcreteComputation,
      arg: Any,
      workers: clients.Workers,
      make_clients: MakeClients,
  ):
    self._plan = plan
    self._workers = workers
    self._num_clients = tff_internals.num_clients(arg, comp.type_signature.parameter)
    # Tensors at the server.
    self._scope: dict[dataflow.Leaf, tf.Tensor] = {}
    self._of_clients: dict[evaluation.Argument, Any] = {}
    for argument in plan.arguments:
      value = _part(arg, argument.path)
      if argument.each_client:
        self._of_clients[argument] = value
      else:
        tensors = values.to_tensors(value, argument.type_spec)
        self._scope.update(zip(argument.leaves, tensors, strict=True))
    self._clients = make_clients(plan, self._of_clients, self._num_clients, workers)

  def run(self, stop: threading.Event) -> Any:
    """Runs all stages; returns the result in `tff.structure.Struct`s."""
    for stage in self._plan.stages:
      if stage.of_clients:
        total = self._clients.run_pass(stage, self._scope, stop)
        if stage.sums is not None:
          self._scope.update(zip(stage.sums.total, total, strict=True))
      elif stage.work is not None:
        self._run_at_server(stage)
      for leaf in stage.dropped:
        self._clients.drop(leaf)
    return self._result(self._plan.result, self._plan.result_type)

  def _run_at_server(self, stage: plan_lib.Stage) -> None:
    args = [self._scope[leaf] for leaf in stage.inputs]
    try:
      made = self._workers.server.run(stage.work, args)
    except tf.errors.OpError as error:
      raise failed('The server', error.message) from error
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
    of_clients = [self._of_each_client(leaf) for leaf in leaves]
    return [
        values.from_tensors((tensors[client] for tensors in of_clients), type_spec.member)
        for client in range(self._num_clients)
    ]

  def _of_each_client(self, leaf: dataflow.Leaf) -> Sequence[tf.Tensor]:
    if leaf in self._scope:
      return [self._scope[leaf]] * self._num_clients
    kept = self._clients.kept(leaf)
    if kept is not None:
      return kept
    # The result holds a part of the argument.
    argument = cast(evaluation.Argument, leaf.node)
    number = argument.leaves.index(leaf)
    return [
        values.to_tensors(value, argument.type_spec)[number]
        for value in self._of_clients[argument]
    ]


def _part(arg: Any, path: tuple[int, ...]) -> Any:
  for index in path:
    arg = tff.structure.from_container(arg)[index]
  return arg


def needed_arguments(stage: plan_lib.Stage, arguments: Arguments) -> Arguments:
  """Returns those of the clients' arguments that a stage needs."""
  needed = set(stage.needed)
  return {
      argument: value for argument, value in arguments.items()
      if needed.intersection(argument.leaves)
  }


def client_name(client: int, num_clients: int, arguments: Arguments) -> str:
  """Returns which client it is, for messages: its position and its short arguments."""
  shown = [
      short for value in arguments.values()
      for short in values.short_values(value[client])
  ]
  return f'Client {client} of the {num_clients} in this round' + (
      f', with the argument {shown},' if 0 < len(shown) <= _MAX_SHOWN else ''
  )


def failed(who: str, message: str) -> ComputationError:
  """Returns the error for an error of TensorFlow, with the user's line of code.

  Args:
    who: What failed, such as `client_name`.
    message: TensorFlow's message.
  """
  text = f'{who} failed: {message}'
  where = graphs.user_traceback(message)
  if where:
    text += f'\nThe operation was made here:\n{where}'
  return ComputationError(text)
