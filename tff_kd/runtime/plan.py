"""Compiles a computation into stages: the server, the clients, the server, and so on.

All TensorFlow graphs of one stage become one TensorFlow function, and all sums that
clients can add to in one pass are added to in one pass.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any, Optional

from tff_kd.compat import tff
from tff_kd.runtime import dataflow
from tff_kd.runtime import evaluation
from tff_kd.runtime import executables

_CLIENTS, _SERVER = dataflow.CLIENTS, dataflow.SERVER
_NEVER = float('inf')


@dataclasses.dataclass(frozen=True, eq=False)
class Sums:
  """The sums over clients of one pass.

  Attributes:
    zero: Leaves of the accumulators of no clients.
    values: Leaves that a client adds.
    total: Leaves of the accumulators of all clients.
    accumulate: Takes accumulators, a client's values and `accumulate_captured`.
    accumulate_captured: Leaves at the server.
    merge: Takes the accumulators of two groups of clients and `merge_captured`.
    merge_captured: Leaves at the server.
  """

  zero: Sequence[dataflow.Leaf]
  values: Sequence[dataflow.Leaf]
  total: Sequence[dataflow.Leaf]
  accumulate: executables.Executable
  accumulate_captured: Sequence[dataflow.Leaf]
  merge: executables.Executable
  merge_captured: Sequence[dataflow.Leaf]


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
  """Work that is done at the server at once, or with each client in one pass.

  Attributes:
    of_clients: Whether it is the clients'.
    work: Takes `inputs`, gives `outputs`; `None` if there is nothing to compute.
    inputs: Leaves from elsewhere.
    outputs: Leaves that are needed elsewhere.
    sums: The sums that clients add to; `None` if there are none.
    kept: The outputs at the clients that are needed after the pass.
    dropped: Leaves kept by earlier passes that no later one needs.
  """

  of_clients: bool
  work: Optional[executables.Executable]
  inputs: Sequence[dataflow.Leaf]
  outputs: Sequence[dataflow.Leaf]
  sums: Optional[Sums]
  kept: Sequence[dataflow.Leaf]
  dropped: Sequence[dataflow.Leaf]

  @property
  def needed(self) -> Sequence[dataflow.Leaf]:
    """Leaves that a client's work or the sums take; some may be the stage's own."""
    return [*self.inputs, *(self.sums.values if self.sums else ())]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """A compiled computation.

  Attributes:
    proto: The serialized computation; compiled elsewhere it gives the same plan.
    arguments: The parts of its argument.
    stages: In the order in which they run.
    result: The leaves of its result in nested lists.
    result_type: The result's type, without Python's containers.
  """

  proto: Any
  arguments: Sequence[evaluation.Argument]
  stages: Sequence[Stage]
  result: Any
  result_type: tff.Type

  @functools.cached_property
  def leaves(self) -> Sequence[dataflow.Leaf]:
    """Leaves that come to clients or from them, in the same order wherever compiled."""
    found = {leaf: None for argument in self.arguments for leaf in argument.leaves}
    for stage in self.stages:
      if stage.of_clients:
        found |= dict.fromkeys([*stage.needed, *stage.outputs])
        if stage.sums:
          found |= dict.fromkeys([
              *stage.sums.zero, *stage.sums.accumulate_captured,
              *stage.sums.merge_captured,
          ])
    return list(found)


def compile_computation(proto: Any) -> Plan:
  """Compiles a computation.

  Args:
    proto: The computation, serialized by `tff.framework.serialize_computation`.

  Returns:
    The plan. TensorFlow's graphs are only read when its stages run first.

  Raises:
    NotImplementedError: If it uses something that does not run in process.
  """
  arguments, result = evaluation.evaluate(proto)
  return Plan(
      proto=proto,
      arguments=arguments,
      stages=_stages(evaluation.flatten(result)),
      result=result,
      result_type=tff.types.deserialize_type(proto.type.function.result),
  )


def _schedule(
    nodes: Sequence[dataflow.Node], results: Sequence[dataflow.Leaf]
) -> Mapping[dataflow.Node, int]:
  """Returns when each node is done: at even times by the server, at odd by the clients.

  Sums are made as early as possible, so that there are few passes over the clients.
  Other work of clients is done in the pass that needs it first, so that little is kept
  between passes; the server's as late as possible, so that what only the result needs
  comes last.
  """
  earliest: dict[dataflow.Node, int] = {}
  for node in nodes:
    earliest[node] = _earliest(node, earliest)
  last = max((time + time % 2 for time in earliest.values()), default=0)
  times: dict[dataflow.Node, int] = {}
  needed = {
      leaf.node: last if leaf.node.place is _SERVER else earliest[leaf.node]
      for leaf in results
  }
  for node in reversed(nodes):
    movable = not isinstance(node, (evaluation.Argument, dataflow.Aggregate))
    time = times[node] = needed[node] if movable else earliest[node]
    for leaf in node.needs():
      before = time - 1 if time % 2 and leaf.node.place is _SERVER else time
      needed[leaf.node] = min(needed.get(leaf.node, last), before)
  return times


def _earliest(node: dataflow.Node, earliest: Mapping[dataflow.Node, int]) -> int:
  """Returns when a node can be done; for a sum, when clients can add to it."""
  ready = [
      earliest[leaf.node] + isinstance(leaf.node, dataflow.Aggregate)
      for leaf in node.needs()
  ]
  time = max(ready, default=0)
  of_clients = node.place is _CLIENTS or isinstance(node, dataflow.Aggregate)
  return time | 1 if of_clients else time


def _stages(results: Sequence[dataflow.Leaf]) -> list[Stage]:
  """Returns the stages that make results."""
  nodes = dataflow.reachable(
      [leaf.node for leaf in results], lambda node: [leaf.node for leaf in node.needs()]
  )
  nodes.sort(key=lambda node: node.number)
  times = _schedule(nodes, results)
  last_use: dict[dataflow.Leaf, float] = {}
  for node in nodes:
    for leaf in node.needs():
      last_use[leaf] = max(last_use.get(leaf, 0), times[node])
  last_use.update({leaf: _NEVER for leaf in results})
  stages = []
  for time in sorted(set(times.values())):
    done = [
        node for node in nodes
        if times[node] == time and not isinstance(node, evaluation.Argument)
    ]
    if done:
      stages.append(_stage(time, done, last_use))
  return stages


def _stage(
    time: int,
    nodes: Sequence[dataflow.Node],
    last_use: Mapping[dataflow.Leaf, float],
) -> Stage:
  aggregates = [node for node in nodes if isinstance(node, dataflow.Aggregate)]
  work = [node for node in nodes if not isinstance(node, dataflow.Aggregate)]
  sums = _sums(aggregates)
  made = {leaf for node in work for leaf in node.leaves}
  added = set(sums.values) if sums else set()
  inputs = {leaf: None for node in work for leaf in node.args if leaf not in made}
  outputs = [
      leaf for node in work for leaf in node.leaves
      if leaf in added or last_use.get(leaf, -1) > time
  ]
  return Stage(
      of_clients=time % 2 == 1,
      work=executables.Executable(list(inputs), outputs) if outputs else None,
      inputs=list(inputs),
      outputs=outputs,
      sums=sums,
      kept=[leaf for leaf in outputs if last_use.get(leaf, -1) > time],
      dropped=[leaf for leaf in last_use if last_use[leaf] == time],
  )


def _sums(aggregates: Sequence[dataflow.Aggregate]) -> Optional[Sums]:
  """Returns the sums of a pass as one; `None` if they have no leaves."""

  def all_of(get: Callable[[dataflow.Aggregate], Sequence[dataflow.Leaf]]):
    return [leaf for aggregate in aggregates for leaf in get(aggregate)]

  def executable(get_body: Callable[[dataflow.Aggregate], dataflow.Body]):
    """Joins all bodies: takes first arguments, second ones, then captured leaves."""
    first = all_of(lambda each: get_body(each).params[: len(each.zero)])
    second = all_of(lambda each: get_body(each).params[len(each.zero) :])
    captured = all_of(lambda each: get_body(each).captured)
    results = all_of(lambda each: get_body(each).results)
    return executables.Executable([*first, *second, *captured], results), captured

  if not all_of(lambda each: each.leaves):
    return None
  accumulate, accumulate_captured = executable(lambda each: each.accumulate)
  merge, merge_captured = executable(lambda each: each.merge)
  return Sums(
      zero=all_of(lambda each: each.zero),
      values=all_of(lambda each: each.values),
      total=all_of(lambda each: each.leaves),
      accumulate=accumulate,
      accumulate_captured=accumulate_captured,
      merge=merge,
      merge_captured=merge_captured,
  )
