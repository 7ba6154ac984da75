"""One round's clients over several workers, on this machine or on others.

A computation runs in stages (`stages.split`). The clients of a round are split into
parts, as many as there are workers; each worker has the clients of its part do their
work and add up what they send; the parts' sums are merged, in the parts' order, and the
server's work is done by one worker. So a round's result does not depend on which workers
are there: if one is lost, others do its part.
"""

import asyncio
import collections
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
import concurrent.futures
import contextlib
import dataclasses
import functools
import math
from typing import Any, Optional, Protocol

from absl import logging
import cachetools
from tff_kd.compat import tff
# Not public, and the release that has them is the last: `Executor`, `ExecutorValue`.
from tensorflow_federated.python.core.impl.executors import executor_base
from tensorflow_federated.python.core.impl.executors import executor_value_base

from tff_kd.simulation import contexts
from tff_kd.simulation import stages
from tff_kd.simulation import transport

_START_TIMEOUT_S = 10.0
_CHECK_TIMEOUT_S = 2.0
_STOP_TIMEOUT_S = 2.0
_MAX_PLANS = 32
# After so many losses within one computation, a worker does not get another part of it.
_MAX_LOSSES = 2

_Task = Callable[[executor_base.Executor], Awaitable[Any]]


class NoWorkerError(RuntimeError):
  """No worker is left."""


class WorkerLike(Protocol):
  """What `remote_runtime` needs of a worker.

  Attributes:
    name: What it is called in messages, for example its address.
  """

  name: str

  def executor_factory(self) -> tff.framework.ExecutorFactory:
    """Makes executors whose calls block; `transport.WorkerLostError` ends them.

    After a loss it is called again. To release what a lost worker held must then be
    no error.
    """

  def why_silent(self, timeout_s: float) -> Optional[str]:
    """Why it does not answer; `None` if it does."""

  def close(self) -> None:
    """Ends the connection."""


class _Remote:
  """A worker with a thread of its own, in which all calls to it are made."""

  def __init__(self, worker: WorkerLike):
    self.worker = worker
    self.lost = False
    # Another one after each loss: what the worker held before is gone.
    self.session = object()
    self._factory: Optional[tff.framework.ExecutorFactory] = None
    self._sizes: set[int] = set()
    self._thread = concurrent.futures.ThreadPoolExecutor(
        1, thread_name_prefix=f'worker {worker.name}'
    )
    self._check: Optional[concurrent.futures.Future] = None

  def submit(self, num_clients: int, task: _Task) -> concurrent.futures.Future:
    """Runs a task with the executor for a number of clients."""
    return self._thread.submit(self._run, num_clients, task)

  def _run(self, num_clients: int, task: _Task) -> Any:
    name = self.worker.name
    if self.lost:
      raise transport.WorkerLostError(name, 'it was lost before.')
    try:
      if self._factory is None:
        self._factory = self.worker.executor_factory()
      self._sizes.add(num_clients)
      executor = self._factory.create_executor({tff.CLIENTS: num_clients})
      return asyncio.run(task(executor))
    except transport.WorkerLostError:
      self._lose()
      raise

  def _lose(self) -> None:
    self.lost = True
    self.session = object()
    self._factory = None
    self._sizes.clear()

  def check(self) -> concurrent.futures.Future:
    """Asks a lost worker whether it is back; in its own thread, one at a time."""
    if self._check is None or self._check.done():
      self._check = self._thread.submit(self._look)
    return self._check

  def _look(self) -> None:
    if self.lost and self.worker.why_silent(_CHECK_TIMEOUT_S) is None:
      self.lost = False
      logging.warning('The worker %s is back.', self.worker.name)

  def close(self) -> None:
    """Frees what the worker holds, if it is idle; ends the connection."""
    released = self._thread.submit(self._release)
    # An error of the release is of no use any more.
    concurrent.futures.wait([released], _STOP_TIMEOUT_S)
    self.worker.close()
    self._thread.shutdown(wait=False, cancel_futures=True)

  def _release(self) -> None:
    if not self.lost:
      for num_clients in self._sizes:
        self._factory.clean_up_executor({tff.CLIENTS: num_clients})


@dataclasses.dataclass(eq=False)
class _Part:
  """Some of a round's clients; or the server, which is none of them.

  Attributes:
    start: The first one's index.
    stop: The index after the last one's.
    remote: Who does their work.
    session: The worker's when it began.
    kept: What stays on the worker between stages, by name.
  """

  start: int
  stop: int
  remote: Optional[_Remote] = None
  session: Optional[object] = None
  kept: dict[str, executor_value_base.ExecutorValue] = dataclasses.field(
      default_factory=dict
  )


@dataclasses.dataclass
class _Sum:
  """A sum over clients: its parts' accumulators, and what merges two."""

  merge: tff.framework.ConcreteComputation
  accumulators: Sequence[Any]


@dataclasses.dataclass
class _Work:
  """What a stage needs: its inputs, of all clients, and sums."""

  inputs: Sequence[Any]
  sums: Sequence[_Sum]


class _Pool:
  """The workers, and how a computation runs on them."""

  def __init__(self, workers: Sequence[WorkerLike], part_bytes: int):
    self._remotes = [_Remote(worker) for worker in workers]
    self._part_bytes = part_bytes
    # By identity; with the computation, so that it is not given to another.
    self._plans = cachetools.LRUCache(_MAX_PLANS)

  def close(self) -> None:
    with concurrent.futures.ThreadPoolExecutor(len(self._remotes)) as threads:
      list(threads.map(_Remote.close, self._remotes))

  def run(
      self,
      comp: tff.framework.ConcreteComputation,
      argument: Any,
      num_clients: int,
  ) -> Any:
    """Runs a computation: spread if it is of several clients, else on one worker."""
    for remote in self._remotes:
      if remote.lost:
        remote.check()
    # Fewer clients than two are no round to be split.
    plan = self._plan(comp) if num_clients > 1 else None
    if plan is None:
      return _Run(self._remotes).whole(comp, argument, num_clients)
    parts = self._parts(plan, num_clients)
    return _Run(self._remotes).in_stages(plan, argument, parts)

  def _plan(self, comp: tff.framework.ConcreteComputation) -> Optional[stages.Plan]:
    if id(comp) not in self._plans:
      try:
        plan = stages.split(comp)
      except stages.CannotSplitError as error:
        plan = None
        logging.warning(
            'A computation with clients runs on one worker only, because it cannot be '
            'split: %s', error,
        )
      self._plans[id(comp)] = (comp, plan)
    return self._plans[id(comp)][1]

  def _parts(self, plan: stages.Plan, num_clients: int) -> list[_Part]:
    """As many as there are workers, or a multiple if these would be too large."""
    workers = len(self._remotes)
    size = contexts.part_size(plan.client_bytes, self._part_bytes)
    count = min(num_clients, workers * math.ceil(num_clients / (workers * size)))
    bounds = [i * num_clients // count for i in range(count + 1)]
    return [_Part(start, stop) for start, stop in zip(bounds, bounds[1:])]


class _Run:
  """One run of one computation."""

  def __init__(self, remotes: Sequence[_Remote]):
    self._remotes = remotes
    self._losses = collections.Counter()
    self._last_error: Optional[transport.WorkerLostError] = None

  def whole(
      self, comp: tff.framework.ConcreteComputation, argument: Any, num_clients: int
  ) -> Any:
    async def task(executor):
      fn = await executor.create_value(comp, comp.type_signature)
      value = None
      if comp.type_signature.parameter is not None:
        value = await executor.create_value(argument, comp.type_signature.parameter)
      return await (await executor.create_call(fn, value)).compute()

    return self._on_one(num_clients, task)

  def in_stages(
      self, plan: stages.Plan, argument: Any, parts: Sequence[_Part]
  ) -> Any:
    # What the server's stages gave and the clients' results; the sums of the parts.
    values: dict[str, Any] = {}
    sums: dict[str, _Sum] = {}
    server = [_Part(0, 0)]
    # The stages that kept something, for a place whose worker is lost.
    keeping: dict[bool, dict[stages.Stage, _Work]] = {True: {}, False: {}}
    for i, stage in enumerate(plan.stages):
      places = parts if stage.of_clients else server
      work = keeping[stage.of_clients]
      work[stage] = _Work(
          _inputs(stage, argument, values), [sums[name] for name in stage.sums]
      )
      fetched = self._on_parts(places, work)
      if not stage.kept:
        del work[stage]
      for name, of_parts in zip(stage.fetched, zip(*fetched), strict=True):
        if stage.of_clients and name in plan.merges:
          sums[name] = _Sum(plan.merges[name], of_parts)
        elif plan.client_results.get(name, True):
          values[name] = of_parts[0]
        else:
          values[name] = [value for part in of_parts for value in part]
      needed = {name for later in plan.stages[i + 1 :] for name in later.held}
      for place in places:
        place.kept = {n: ref for n, ref in place.kept.items() if n in needed}
    return _assemble(plan.result, values)

  def _on_one(self, num_clients: int, task: _Task) -> Any:
    """Runs a task on the first worker that is there."""
    while True:
      remote = self._live()[0]
      try:
        return remote.submit(num_clients, task).result()
      except transport.WorkerLostError as error:
        self._note_loss(remote, error)

  def _on_parts(
      self, parts: Sequence[_Part], work: Mapping[stages.Stage, _Work]
  ) -> list[Any]:
    """Runs the last of some stages on all parts.

    Args:
      parts: The parts.
      work: Stages and what they need; those before the last one are for parts whose
        worker is lost, with all that it kept.

    Returns:
      What the last stage gave, by part.
    """
    results = {}
    while len(results) < len(parts):
      live = self._live()
      futures = {}
      for i, part in enumerate(parts):
        if i in results:
          continue
        todo = list(work)[-1:]
        if part.remote not in live or part.session is not part.remote.session:
          part.remote = live[i % len(live)]
          part.session = part.remote.session
          part.kept = {}
          todo = list(work)
        futures[i] = part.remote.submit(
            part.stop - part.start,
            functools.partial(_run_stages, part, {s: work[s] for s in todo}),
        )
      concurrent.futures.wait(futures.values())
      lost = {}
      for i, future in futures.items():
        try:
          results[i] = future.result()
        except transport.WorkerLostError as error:
          lost.setdefault(parts[i].remote, error)
      for remote, error in lost.items():
        self._note_loss(remote, error)
    return [results[i] for i in range(len(parts))]

  def _note_loss(self, remote: _Remote, error: transport.WorkerLostError) -> None:
    self._losses[remote] += 1
    self._last_error = error
    logging.warning('%s. Its work goes to another worker.', str(error).rstrip('.'))

  def _live(self) -> list[_Remote]:
    """The workers to go on with; asks again those that were lost if there is none."""
    may_work = [r for r in self._remotes if self._losses[r] < _MAX_LOSSES]
    live = [r for r in may_work if not r.lost]
    if not live:
      checks = [remote.check() for remote in may_work]
      concurrent.futures.wait(checks, 2 * _CHECK_TIMEOUT_S)
      live = [r for r in may_work if not r.lost]
    if not live:
      names = ', '.join(r.worker.name for r in self._remotes)
      raise NoWorkerError(
          f'None of the workers is left ({names}). Start them again, and go on from '
          'the last checkpoint.'
      ) from self._last_error
    return live


def _at(value: Any, path: Sequence[int]) -> Any:
  for index in path:
    value = tff.structure.from_container(value)[index]
  return value


def _inputs(
    stage: stages.Stage, argument: Any, values: Mapping[str, Any]
) -> list[Any]:
  """What a stage is sent, of all clients."""
  found = []
  for its in stage.inputs:
    if its.source is stages.Source.ARGUMENT:
      found.append(_at(argument, its.where))
    elif its.source is stages.Source.SERVER:
      found.append(values[its.where])
    else:
      found.append(its.where)
  return found


async def _run_stages(
    part: _Part,
    work: Mapping[stages.Stage, _Work],
    executor: executor_base.Executor,
) -> Any:
  """Runs stages of one part, or of the server; returns what the last one gives."""
  for stage, its in work.items():
    inputs = [
        list(value[part.start : part.stop]) if _is_by_client(given.type_spec) else value
        for given, value in zip(stage.inputs, its.inputs, strict=True)
    ]
    sums = [await _merge(each, executor) for each in its.sums]
    fetched = await _run_stage(stage, inputs, sums, part.kept, executor)
  return fetched


async def _run_stage(
    stage: stages.Stage,
    inputs: Sequence[Any],
    sums: Sequence[executor_value_base.ExecutorValue],
    kept: dict[str, executor_value_base.ExecutorValue],
    executor: executor_base.Executor,
) -> Any:
  # With few calls: each is a way there and back.
  fn = await executor.create_value(stage.comp, stage.comp.type_signature)
  type_spec = stage.comp.type_signature.parameter
  sent = tff.structure.Struct.unnamed(*inputs)
  if sums or stage.held:
    argument = await executor.create_struct([
        await executor.create_value(sent, type_spec[0]),
        *sums,
        *(kept[name] for name in stage.held),
    ])
  else:
    argument = await executor.create_value(
        tff.structure.Struct.unnamed(sent), type_spec
    )
  result = await executor.create_call(fn, argument)
  for i, name in enumerate(stage.kept, 1):
    kept[name] = await executor.create_selection(result, i)
  return await (await executor.create_selection(result, 0)).compute()


async def _merge(
    its: _Sum, executor: executor_base.Executor
) -> executor_value_base.ExecutorValue:
  """Merges the parts' accumulators, in the parts' order."""
  type_spec = its.merge.type_signature.result
  first, *others = its.accumulators
  if not others:
    return await executor.create_value(first, type_spec)
  fn = await executor.create_value(its.merge, its.merge.type_signature)
  pair = await executor.create_value(
      tff.structure.Struct.unnamed(first, others[0]),
      tff.StructType([type_spec, type_spec]),
  )
  total = await executor.create_call(fn, pair)
  for other in others[1:]:
    pair = await executor.create_struct(
        [total, await executor.create_value(other, type_spec)]
    )
    total = await executor.create_call(fn, pair)
  return total


def _is_by_client(type_spec: tff.Type) -> bool:
  return (
      isinstance(type_spec, tff.FederatedType)
      and type_spec.placement is tff.CLIENTS
      and not type_spec.all_equal
  )


def _assemble(names: Any, values: Mapping[str, Any]) -> Any:
  if isinstance(names, tff.structure.Struct):
    return tff.structure.Struct(
        (name, _assemble(element, values))
        for name, element in tff.structure.iter_elements(names)
    )
  return values[names]


class _Value(executor_value_base.ExecutorValue):
  """A value in this process."""

  def __init__(self, value: Any, type_spec: tff.Type):
    self.value = value
    self._type_spec = type_spec

  @property
  def type_signature(self) -> tff.Type:
    return self._type_spec

  @property
  def reference(self) -> Any:
    return self.value

  async def compute(self) -> Any:
    return self.value


class _Executor(executor_base.Executor):
  """Lets TFF's execution contexts run computations on a pool."""

  def __init__(self, pool: _Pool, num_clients: int):
    self._pool = pool
    self._num_clients = num_clients

  def close(self) -> None:
    pass

  async def create_value(self, value, type_spec=None):
    if type_spec is None:
      type_spec = value.type_signature
    return _Value(value, type_spec)

  async def create_struct(self, elements):
    elements = tff.structure.from_container(elements)
    return _Value(
        tff.structure.map_structure(lambda its: its.value, elements),
        tff.StructType([
            (name, its.type_signature) if name else its.type_signature
            for name, its in tff.structure.iter_elements(elements)
        ]),
    )

  async def create_selection(self, source, index):
    return _Value(_at(source.value, [index]), source.type_signature[index])

  async def create_call(self, comp, arg=None):
    argument = None if arg is None else arg.value
    result = await asyncio.to_thread(
        self._pool.run, comp.value, argument, self._num_clients
    )
    return _Value(result, comp.type_signature.result)


class _ExecutorFactory(tff.framework.ExecutorFactory):
  """Makes the executors of a pool."""

  def __init__(self, pool: _Pool):
    self._pool = pool

  def create_executor(self, cardinalities):
    return _Executor(self._pool, cardinalities.get(tff.CLIENTS, 0))

  def clean_up_executor(self, cardinalities):
    del cardinalities


def _check_workers(workers: Sequence[WorkerLike]) -> None:
  names = [worker.name for worker in workers]
  if not names or len(set(names)) < len(names):
    raise ValueError(
        'There must be at least one worker, each with a name of its own, found '
        f'{names}.'
    )
  with concurrent.futures.ThreadPoolExecutor(len(workers)) as threads:
    reasons = threads.map(lambda worker: worker.why_silent(_START_TIMEOUT_S), workers)
    missing = {name: why for name, why in zip(names, reasons) if why is not None}
  if missing:
    raise transport.WorkerLostError(
        ', '.join(missing),
        f'{"; ".join(missing.values())} Start it, or leave it out.',
    )


@contextlib.contextmanager
def remote_runtime(
    workers: Sequence[WorkerLike], *, part_bytes: int = contexts.PART_BYTES
) -> Iterator[None]:
  """Spreads the clients of all TFF computations over workers while the block lasts.

  Sets TFF's default context, as `tff_kd.runtime.in_process` does, and puts back the
  one before. Every computation with clients is spread, also those with clients' own
  states and those that need several sums in turn (FedGen); only one that uses intrinsics
  unknown to `stages` runs on a single worker, and a warning says so. Results are those
  of one process but for the order in which floating-point numbers are added, which
  depends on the number of workers, not on which of them are there.

  A worker that is lost (`transport.WorkerLostError`) is named in a warning, and its
  clients' work of this round is done again by the others. It is used again in a later
  computation if it answers by then.

  What crosses: the state, clients' numbers and private states, the parts' sums, and
  each graph once. Files of clients' data and transfer sets are read by the workers, so
  all machines must see them under the same paths.

  Args:
    workers: The workers; they are closed when the block ends.
    part_bytes: What the values of one part's clients may take on a worker; a worker
      does more clients one part after the other.

  Yields:
    Nothing.

  Raises:
    ValueError: If there is no worker, or two have the same name.
    transport.WorkerLostError: If a worker does not answer at the start.
    NoWorkerError: From a computation in the block, if no worker is left.
  """
  _check_workers(workers)
  with contextlib.ExitStack() as resources:
    pool = _Pool(workers, part_bytes)
    context = tff.framework.SyncExecutionContext(
        _ExecutorFactory(pool),
        compiler_fn=contexts.compile_computation,
        transform_args=tff.tensorflow.transform_args,
        transform_result=tff.tensorflow.transform_result,
    )
    resources.callback(contexts.end_thread, context)
    resources.callback(pool.close)
    stack = tff.framework.get_context_stack()
    resources.callback(tff.framework.set_default_context, stack.current)
    tff.framework.set_default_context(context)
    yield
