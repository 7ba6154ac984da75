"""The clients of a run as groups that Ray's workers compute, summed in their order."""

from collections.abc import Mapping, Sequence
from concurrent import futures
import heapq
import threading
from typing import Any, Optional
import uuid

import tensorflow as tf

from tff_kd.runtime import clients
from tff_kd.runtime import dataflow
from tff_kd.runtime import plan as plan_lib
from tff_kd.runtime import ray_worker
from tff_kd.runtime import ray_workers
from tff_kd.runtime import running
from tff_kd.runtime import values

_POLL_S = 0.2
# A group is not tried again after this many workers were lost with it.
_MAX_TRIES = 4
# How many groups, for each group at work, may wait for their turn in the sum.
_WINDOW = 4


class ClientsOnRay(running.RunClients):
  """The clients of one run."""

  def __init__(
      self,
      pool: ray_workers.Pool,
      plan: plan_lib.Plan,
      arguments: running.Arguments,
      num_clients: int,
      workers: clients.Workers,
  ):
    """Initializes them.

    Args:
      pool: The workers.
      plan: The compiled computation.
      arguments: The clients' arguments.
      num_clients: The number of clients.
      workers: Where this process adds up the groups.
    """
    self.pool = pool
    self.plan = plan
    self.name = uuid.uuid4().hex
    self.num_clients = num_clients
    self.num_groups = -(-num_clients // clients.GROUP_SIZE)
    self.workers = workers
    self.numbers = {leaf: number for number, leaf in enumerate(plan.leaves)}
    self.arguments = arguments
    # The references to what all clients of a pass are given, by stage.
    self._shared: dict[int, Any] = {}
    # References to what a stage keeps, one for each group, by the number of the stage.
    self._kept: dict[int, list[Any]] = {}
    self._dropped: set[dataflow.Leaf] = set()

  def run_pass(self, stage, scope, stop):
    if not self.num_groups:
      return [scope[leaf] for leaf in stage.sums.zero] if stage.sums else None
    number = self.plan.stages.index(stage)
    needed = list(stage.needed)
    if stage.sums:
      needed += [*stage.sums.zero, *stage.sums.accumulate_captured]
    self._shared[number] = self.pool.ray.put({
        self.numbers[leaf]: ray_worker.to_sent(scope[leaf])
        for leaf in needed if leaf in scope
    })
    if stage.kept:
      self._kept[number] = [None] * self.num_groups
    return _Pass(self, number, scope).run(stop)

  def kept(self, leaf):
    for number, references in self._kept.items():
      if leaf in self.plan.stages[number].kept:
        return [
            ray_worker.from_sent(sent, leaf.tensor_spec.dtype)
            for group in range(self.num_groups)
            for sent in self._get_kept(number, group, references)[self.numbers[leaf]]
        ]
    return None

  def drop(self, leaf):
    self._dropped.add(leaf)
    for number in list(self._kept):
      if self._dropped.issuperset(self.plan.stages[number].kept):
        del self._kept[number]

  def _get_kept(self, number: int, group: int, references: Sequence[Any]) -> Any:
    """Gets what a stage has kept of a group; a node that is lost has taken it along."""
    ray, limit = self.pool.ray, self.pool.silence_s
    try:
      return ray.get(references[group], timeout=limit)
    except ray.exceptions.RayError:
      _Pass(self, number, None).run(threading.Event(), [group])
      return ray.get(references[group], timeout=limit)

  def submit(
      self, number: int, group: int, worker: ray_workers.WorkerRecord, again: bool
  ) -> Any:
    """Gives a group of clients to a worker.

    Args:
      number: The number of the stage.
      group: The number of the group.
      worker: The worker.
      again: Whether to do anew what earlier passes have kept, as it may be lost.

    Returns:
      The reference to the result.
    """
    references = {n: kept[group] for n, kept in self._kept.items() if n != number}
    if again:
      references = {}
      for earlier in sorted(n for n in self._shared if n < number):
        if self.plan.stages[earlier].kept:
          _, references[earlier] = self._call(earlier, group, worker, references)
          if earlier in self._kept:
            self._kept[earlier][group] = references[earlier]
    result, kept = self._call(number, group, worker, references)
    if number in self._kept:
      self._kept[number][group] = kept
    return result

  def _call(
      self,
      number: int,
      group: int,
      worker: ray_workers.WorkerRecord,
      references: Mapping[int, Any],
  ) -> Sequence[Any]:
    stage = self.plan.stages[number]
    needed = set(stage.needed)
    kept = [
        reference for earlier, reference in references.items()
        if needed.intersection(self.plan.stages[earlier].kept)
    ]
    plan_reference = self.pool.plan_reference(self.plan)
    members = _members(group, self.num_clients)
    return worker.actor.run_group.options(num_returns=2).remote(
        self.name,
        [plan_reference, self._shared[number]],
        number,
        len(members),
        self._own(stage, members),
        *kept,
    )

  def _own(
      self, stage: plan_lib.Stage, members: Sequence[int]
  ) -> ray_worker.SentOfClients:
    """Returns the arguments of a group's clients that a stage needs."""
    needed = set(stage.needed)
    own = {}
    for argument, value in running.needed_arguments(stage, self.arguments).items():
      tensors = [
          values.to_tensors(value[client], argument.type_spec) for client in members
      ]
      for position, leaf in enumerate(argument.leaves):
        if leaf in needed:
          sent = [ray_worker.to_sent(each[position]) for each in tensors]
          own[self.numbers[leaf]] = sent
    return own


class _Pass:
  """One pass over the clients, or over some groups of them."""

  def __init__(
      self,
      run: ClientsOnRay,
      number: int,
      scope: Optional[Mapping[dataflow.Leaf, tf.Tensor]],
  ):
    """Initializes it.

    Args:
      run: The clients of the run.
      number: The number of the stage.
      scope: Tensors at the server; `None` if sums are not wanted.
    """
    self._run = run
    self._number = number
    self._sums = run.plan.stages[number].sums if scope is not None else None
    captured = self._sums.merge_captured if self._sums else ()
    self._captured = [scope[leaf] for leaf in captured]
    self._total: Optional[clients.Tensors] = None
    self._waiting: list[int] = []
    self._at_work: dict[Any, tuple[int, ray_workers.WorkerRecord]] = {}
    self._done: dict[int, Sequence[ray_worker.Sent]] = {}
    self._merged = 0
    self._tries: dict[int, list[str]] = {}
    self._failures: dict[int, running.ComputationError] = {}

  def run(
      self, stop: threading.Event, groups: Optional[Sequence[int]] = None
  ) -> Optional[clients.Tensors]:
    """Computes the groups.

    Args:
      stop: No client starts once it is set.
      groups: The groups' numbers, in order; all if `None`.

    Returns:
      The accumulators of all clients, if sums are wanted.

    Raises:
      concurrent.futures.CancelledError: If it was stopped.
      ray_workers.NoWorkerError: If there is no worker left.
      running.ComputationError: If a client fails.
    """
    if groups is None:
      groups = range(self._run.num_groups)
    self._waiting = list(groups)
    try:
      while self._merged < len(groups):
        if stop.is_set():
          raise futures.CancelledError()
        self._submit(stop)
        self._collect()
        self._raise_failure()
    except BaseException:
      self._stop_workers()
      raise
    finally:
      for _, worker in self._at_work.values():
        worker.num_groups -= 1
    return self._total

  def _submit(self, stop: threading.Event) -> None:
    """Gives waiting groups to the workers that have the fewest."""
    pool = self._run.pool
    if not self._at_work and not self._failures:
      pool.wait_for_one(stop)
    free = [worker for worker in pool.ready() if worker.num_groups < ray_workers.DEPTH]
    window = _WINDOW * (len(self._at_work) + len(free) + 1)
    while free and self._waiting and not self._failures:
      group = self._waiting[0]
      if len(self._done) > window and group != self._merged:
        return  # Results wait for an earlier group: no more of them are held.
      worker = min(free, key=lambda each: each.num_groups)
      heapq.heappop(self._waiting)
      reference = self._run.submit(
          self._number, group, worker, again=group in self._tries
      )
      self._at_work[reference] = group, worker
      worker.num_groups += 1
      if worker.num_groups >= ray_workers.DEPTH:
        free.remove(worker)

  def _collect(self) -> None:
    """Waits for a group that is done, or lost; adds up those whose turn it is."""
    if not self._at_work:
      return
    ray = self._run.pool.ray
    done, _ = ray.wait(list(self._at_work), num_returns=1, timeout=_POLL_S)
    for reference in done:
      group, worker = self._at_work.pop(reference)
      worker.num_groups -= 1
      try:
        outcome = ray.get(reference, timeout=self._run.pool.silence_s)
      except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ray.exceptions.RayError):
          self._note_try(group, worker, error.cause)  # An argument is lost.
        else:
          self._failures[group] = error
      except ray.exceptions.RayError as error:
        if isinstance(error, ray.exceptions.RayActorError):
          self._run.pool.lose(worker, _first_line(error))
        self._note_try(group, worker, error)
      else:
        self._take(group, worker, outcome)
    if not done:
      self._run.pool.check_silent(
          [worker for _, worker in self._at_work.values()]
      )
      self._take_back()

  def _note_try(
      self, group: int, worker: ray_workers.WorkerRecord, reason: object
  ) -> None:
    """Has a group done again whose worker, or whose result, is gone."""
    tries = self._tries.setdefault(group, [])
    tries.append(f'{worker.name}: {_first_line(reason)}')
    if len(tries) >= _MAX_TRIES:
      members = _members(group, self._run.num_clients)
      raise ray_workers.NoWorkerError(
          f'The clients {members[0]} to {members[-1]} of the {self._run.num_clients} in '
          f'this round were not computed: {len(tries)} workers in a row were lost with '
          f'them ({"; ".join(tries)}). A worker that needs more memory than its node has '
          'is killed by the system or by Ray: give it more, or let fewer clients compute '
          'at a time (`resources`).'
      )
    heapq.heappush(self._waiting, group)

  def _take_back(self) -> None:
    """Has the groups of workers that are given up done by others."""
    for reference, (group, worker) in list(self._at_work.items()):
      if worker.lost is not None:
        del self._at_work[reference]
        worker.num_groups -= 1
        self._note_try(group, worker, worker.lost)

  def _take(
      self, group: int, worker: ray_workers.WorkerRecord, outcome: Any
  ) -> None:
    """Takes what a worker has made of a group; adds up all groups whose turn it is."""
    if isinstance(outcome, ray_worker.Failure):
      self._failures[group] = self._failed(group, outcome, worker.info.host)
      return
    self._done[group] = outcome
    if self._sums is None:
      self._merged += 1
      self._done.clear()
      return
    while self._merged in self._done:
      self._merge(self._done.pop(self._merged))
      self._merged += 1

  def _failed(
      self, group: int, failure: ray_worker.Failure, host: str
  ) -> running.ComputationError:
    """Returns the error for the failure of a client of a group."""
    run = self._run
    arguments = running.needed_arguments(run.plan.stages[self._number], run.arguments)
    client = group * clients.GROUP_SIZE + failure.client
    who = running.client_name(client, run.num_clients, arguments)
    if failure.of_tensorflow:
      return running.failed(who, failure.message)
    return running.ComputationError(f'{who} failed on the node {host}: {failure.message}')

  def _merge(self, sent: Sequence[ray_worker.Sent]) -> None:
    tensors: Sequence[Any] = [
        ray_worker.from_sent(each, leaf.tensor_spec.dtype)
        for each, leaf in zip(sent, self._sums.total, strict=True)
    ]
    if self._total is not None:
      args = [*self._total, *tensors, *self._captured]
      tensors = self._run.workers.server.run(self._sums.merge, args)
    self._total = tensors

  def _raise_failure(self) -> None:
    """Raises the first client's failure, once no earlier group is at work."""
    if self._failures:
      first = min(self._failures)
      if all(group > first for group, _ in self._at_work.values()):
        raise self._failures[first]

  def _stop_workers(self) -> None:
    for worker in {worker for _, worker in self._at_work.values()}:
      if worker.lost is None:
        call = worker.actor.stop.options(concurrency_group=ray_workers.HEALTH)
        call.remote(self._run.name)


def _first_line(error: object) -> str:
  return str(error).strip().partition('\n')[0]


def _members(group: int, num_clients: int) -> range:
  """Returns the clients of a group."""
  start = group * clients.GROUP_SIZE
  return range(start, min(start + clients.GROUP_SIZE, num_clients))
