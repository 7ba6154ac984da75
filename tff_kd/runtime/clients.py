"""One pass over the clients: in parallel, summed in a fixed order, little held."""

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import functools
import itertools
import queue
import threading
from typing import Any, Optional

import tensorflow as tf

from tff_kd.runtime import dataflow
from tff_kd.runtime import devices
from tff_kd.runtime import evaluation
from tff_kd.runtime import plan as plan_lib
from tff_kd.runtime import values

# The number of consecutive clients that are added up one after the other. The sums of
# such groups are then added up in order, so that the result, in floating-point numbers,
# does not depend on which client is ready first.
GROUP_SIZE = 8
_POLL_S = 0.1

Tensors = Sequence[tf.Tensor]


class ClientFailure(Exception):
  """Tells which client's work failed; the error itself is the cause.

  Attributes:
    client: The client's position.
  """

  def __init__(self, client: int):
    super().__init__(client)
    self.client = client


class Workers:
  """Threads, each at work in one slot.

  Attributes:
    num_slots: How many there are.
    server: Where the server computes.
  """

  def __init__(self, slots: Sequence[devices.Slot]):
    self.num_slots = len(slots)
    self.server = slots[0]
    self._pool = futures.ThreadPoolExecutor(len(slots), 'tff_kd_client')
    self._free: queue.SimpleQueue[devices.Slot] = queue.SimpleQueue()
    for slot in slots:
      self._free.put(slot)

  def submit(self, fn: Callable[..., None], *args: Any) -> futures.Future:
    """Runs `fn(slot, *args)` in a slot that is free."""
    return self._pool.submit(self._in_slot, fn, *args)

  def _in_slot(self, fn: Callable[..., None], *args: Any) -> None:
    slot = self._free.get()
    try:
      with slot.scope():
        fn(slot, *args)
    finally:
      self._free.put(slot)


class _InOrder:
  """Hands on items in the order of their numbers, one at a time, from any thread."""

  def __init__(self):
    self._lock = threading.Lock()
    self._waiting: dict[int, Any] = {}
    self._next = 0
    self._busy = False

  def put(
      self,
      number: int,
      item: Any,
      slot: devices.Slot,
      consume: Callable[[int, Any, devices.Slot], None],
  ) -> None:
    """Adds an item and hands it on, unless another thread is handing items on.

    Args:
      number: The item's, from 0.
      item: The item.
      slot: Where to work on it.
      consume: Takes number, item and slot. It is not kept, as a method would refer to
        the owner of this object: tensors in such a cycle stay until Python looks for
        cycles, which in a large program is after hundreds of rounds.
    """
    with self._lock:
      self._waiting[number] = item
      if self._busy:
        return
      self._busy = True
    while True:
      with self._lock:
        number = self._next
        if number not in self._waiting:
          self._busy = False
          return
        item = self._waiting.pop(number)
        self._next += 1
      consume(number, item, slot)


class _GroupedSum:
  """Adds up clients in groups, then the groups.

  Attributes:
    total: The accumulators of all clients that have been added up so far.
    num_done: How many clients these are.
  """

  def __init__(
      self,
      sums: plan_lib.Sums,
      scope: Mapping[dataflow.Leaf, tf.Tensor],
      num_clients: int,
  ):
    get = lambda leaves: [scope[leaf] for leaf in leaves]
    self._sums = sums
    self._num_clients = num_clients
    self._zero = get(sums.zero)
    self._accumulate_captured = get(sums.accumulate_captured)
    self._merge_captured = get(sums.merge_captured)
    self._lock = threading.Lock()
    self._groups: dict[int, _InOrder] = {}
    self._partial: dict[int, Tensors] = {}
    self._merges = _InOrder()
    self.total: Tensors = self._zero
    self.num_done = 0

  def add(self, client: int, tensors: Tensors, slot: devices.Slot) -> None:
    """Adds what a client gives."""
    group = client // GROUP_SIZE
    with self._lock:
      if group not in self._groups:
        self._groups[group] = _InOrder()
        self._partial[group] = self._zero
      in_order = self._groups[group]
    in_order.put(
        client % GROUP_SIZE, tensors, slot, functools.partial(self._add, group)
    )

  def _add(
      self, group: int, number: int, tensors: Tensors, slot: devices.Slot
  ) -> None:
    client = group * GROUP_SIZE + number
    args = [*self._partial[group], *tensors, *self._accumulate_captured]
    try:
      self._partial[group] = slot.run(self._sums.accumulate, args)
    except Exception as error:
      raise ClientFailure(client) from error
    if number == GROUP_SIZE - 1 or client == self._num_clients - 1:
      with self._lock:
        del self._groups[group]
      self._merges.put(group, self._partial.pop(group), slot, self._merge)

  def _merge(self, group: int, tensors: Tensors, slot: devices.Slot) -> None:
    if group:
      args = [*self.total, *tensors, *self._merge_captured]
      tensors = slot.run(self._sums.merge, args)
    self.total = tensors
    self.num_done = min((group + 1) * GROUP_SIZE, self._num_clients)


class ClientPass:
  """Does the work of one stage for every client."""

  def __init__(
      self,
      stage: plan_lib.Stage,
      arguments: Mapping[evaluation.Argument, Sequence[Any]],
      scope: Mapping[dataflow.Leaf, tf.Tensor],
      kept: dict[dataflow.Leaf, list[Optional[tf.Tensor]]],
      num_clients: int,
  ):
    """Initializes it.

    Args:
      stage: The stage.
      arguments: The clients' arguments that it needs: a value for each client.
      scope: Tensors at the server.
      kept: What earlier passes kept of each client; this pass adds to it.
      num_clients: The number of clients.
    """
    self._stage = stage
    self._arguments = arguments
    self._kept = kept
    self._num_clients = num_clients
    self._sum = _GroupedSum(stage.sums, scope, num_clients) if stage.sums else None
    self._own = [leaf for leaf in stage.needed if leaf in kept]
    self._shared = {leaf: scope[leaf] for leaf in stage.needed if leaf in scope}
    self._shared_on: dict[Optional[str], Mapping[dataflow.Leaf, tf.Tensor]] = {}
    for leaf in stage.kept:
      kept[leaf] = [None] * num_clients
    self._window = 0
    self._lock = threading.Condition()
    self._numbers = itertools.count()
    self._failed: Optional[ClientFailure] = None

  def run(self, workers: Workers, stop: threading.Event) -> Optional[Tensors]:
    """Runs all clients.

    Args:
      workers: What runs them.
      stop: No client starts once it is set; an interrupt of the caller sets it.

    Returns:
      The accumulators of the stage's sums, if it has any.

    Raises:
      ClientFailure: If a client's work fails; the first one's of those that do.
      concurrent.futures.CancelledError: If it was stopped.
    """
    self._window = 2 * (workers.num_slots + GROUP_SIZE)
    running = [
        workers.submit(self._run_some, stop)
        for _ in range(min(workers.num_slots, self._num_clients))
    ]
    try:
      while futures.wait(running, _POLL_S).not_done:
        pass  # An interrupt that is no signal is seen between two waits.
    except BaseException:
      stop.set()
      raise
    for future in running:
      future.result()
    if self._failed is not None:
      raise self._failed
    if stop.is_set():
      raise futures.CancelledError()
    return self._sum.total if self._sum else None

  def _run_some(self, slot: devices.Slot, stop: threading.Event) -> None:
    """Runs clients, one after the other, until there is none left."""
    while (client := self._next_client(stop)) is not None:
      self._run_client(client, slot)

  def _next_client(self, stop: threading.Event) -> Optional[int]:
    """Returns the next client once it may start; `None` if there is none.

    A slow client holds up the sum of those after it: then these wait, so that no more
    than a few of their values are held.
    """
    with self._lock:
      client = next(self._numbers)
      while client < self._num_clients:
        if stop.is_set() or self._failed is not None:
          return None
        if self._sum is None or client < self._sum.num_done + self._window:
          return client
        self._lock.wait(_POLL_S)
    return None

  def _run_client(self, client: int, slot: devices.Slot) -> None:
    try:
      tensors = self._compute(client, slot)
      if self._sum is not None:
        self._sum.add(client, tensors, slot)
    except Exception as error:  # pylint: disable=broad-except
      if not isinstance(error, ClientFailure):
        failure = ClientFailure(client)
        failure.__cause__ = error
        error = failure
      with self._lock:
        if self._failed is None or error.client < self._failed.client:
          self._failed = error
    finally:
      with self._lock:
        self._lock.notify_all()

  def _compute(self, client: int, slot: devices.Slot) -> Tensors:
    """Does a client's work; returns what it adds to the sums."""
    stage = self._stage
    scope = dict(self._shared_at(slot))
    for argument, clients in self._arguments.items():
      tensors = values.to_tensors(clients[client], argument.type_spec)
      scope.update(zip(argument.leaves, tensors, strict=True))
    for leaf in self._own:
      scope[leaf] = self._kept[leaf][client]
    if stage.work is not None:
      made = slot.run(stage.work, [scope[leaf] for leaf in stage.inputs])
      scope.update(zip(stage.outputs, made, strict=True))
    for leaf in stage.kept:
      self._kept[leaf][client] = scope[leaf]
    return [scope[leaf] for leaf in stage.sums.values] if stage.sums else []

  def _shared_at(self, slot: devices.Slot) -> Mapping[dataflow.Leaf, tf.Tensor]:
    """Returns what all clients are given, brought to a slot's device once."""
    shared = self._shared_on.get(slot.name)
    if shared is None:
      tensors = slot.put(list(self._shared.values()))
      shared = self._shared_on[slot.name] = dict(zip(self._shared, tensors))
    return shared
