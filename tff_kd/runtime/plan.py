"""Compiles a computation into stages: the server, the clients, the server, and so on.

The serialized computation is evaluated once on names instead of values. What is left are
the calls of TensorFlow graphs, each at the server or at the clients, and the sums between
them. Selections, zips, broadcasts and functions of functions are gone. All calls of one
stage then become one TensorFlow function, and all sums that clients can add to in one
pass are added to in one pass.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
from typing import Any, Optional, Union

import tensorflow as tf

from tff_kd.compat import tff
from tff_kd.runtime import dataflow
from tff_kd.runtime import executables

_CLIENTS, _SERVER = dataflow.CLIENTS, dataflow.SERVER
_NEVER = float('inf')

# A value in the evaluation: a leaf, a list for a structure, or a function.
_Value = Union[dataflow.Leaf, list, Callable[[Any, Any], Any]]


class Argument(dataflow.Node):
  """A part of the computation's argument.

  Attributes:
    path: The indices that lead to it.
    type_spec: Its type, without the placement.
    each_client: Whether it is a list of one value a client.
  """

  def __init__(self, path: tuple[int, ...], type_proto: Any):
    federated = type_proto.WhichOneof('type') == 'federated'
    member = type_proto.federated.member if federated else type_proto
    self.path = path
    self.type_spec = tff.types.deserialize_type(member)
    self.each_client = (
        federated
        and type_proto.federated.placement.value.uri == tff.CLIENTS.uri
        and not type_proto.federated.all_equal
    )
    place = _CLIENTS if self.each_client else _SERVER
    super().__init__(place, [], dataflow.leaf_types(member), None)


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
  """What is done at the server at once, or with each client in one pass.

  Attributes:
    of_clients: Whether it is the clients'.
    work: Takes `inputs`, gives `outputs`; `None` if there is nothing to compute.
    inputs: Leaves from elsewhere.
    outputs: Leaves that are needed elsewhere.
    sums: The sums that clients add to; `None` if there are none.
    kept: Of the outputs at the clients, those that are needed after the pass.
    dropped: Leaves kept by earlier passes that no later one needs.
  """

  of_clients: bool
  work: Optional[executables.Executable]
  inputs: Sequence[dataflow.Leaf]
  outputs: Sequence[dataflow.Leaf]
  sums: Optional[Sums]
  kept: Sequence[dataflow.Leaf]
  dropped: Sequence[dataflow.Leaf]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """A compiled computation.

  Attributes:
    arguments: The parts of its argument.
    stages: In the order in which they run.
    result: The leaves of its result in nested lists.
    result_type: The result's type, without Python's containers.
  """

  arguments: Sequence[Argument]
  stages: Sequence[Stage]
  result: Any
  result_type: tff.Type


def compile_computation(comp: tff.framework.ConcreteComputation) -> Plan:
  """Compiles a computation.

  Args:
    comp: The computation.

  Returns:
    The plan. TensorFlow's graphs are only read when its stages run first.

  Raises:
    NotImplementedError: If it uses something that does not run in process.
  """
  proto = tff.framework.serialize_computation(comp)
  evaluation = _Evaluation()
  function = evaluation.evaluate(proto, {}, _SERVER)
  argument = None
  if proto.type.function.HasField('parameter'):
    argument = evaluation.argument(proto.type.function.parameter, ())
  result = function(argument, _SERVER)
  return Plan(
      arguments=evaluation.arguments,
      stages=_stages(flatten(result)),
      result=result,
      result_type=tff.types.deserialize_type(proto.type.function.result),
  )


def flatten(value: _Value) -> list[dataflow.Leaf]:
  """Returns the leaves of a value."""
  if isinstance(value, list):
    return [leaf for element in value for leaf in flatten(element)]
  return [value]


def _struct(leaves: Iterable[dataflow.Leaf], type_proto: Any) -> _Value:
  """Returns leaves, an iterator, as the value of a type."""
  kind = type_proto.WhichOneof('type')
  if kind == 'struct':
    return [_struct(leaves, its.value) for its in type_proto.struct.element]
  if kind == 'federated':
    return _struct(leaves, type_proto.federated.member)
  return next(leaves)


class _Evaluation:
  """Evaluates a serialized computation on leaves, which makes its nodes."""

  def __init__(self):
    self.arguments: list[Argument] = []

  def argument(self, type_proto: Any, path: tuple[int, ...]) -> _Value:
    """Returns the value that stands for a part of the argument."""
    if type_proto.WhichOneof('type') == 'struct':
      return [
          self.argument(its.value, (*path, i))
          for i, its in enumerate(type_proto.struct.element)
      ]
    self.arguments.append(Argument(path, type_proto))
    return _struct(iter(self.arguments[-1].leaves), type_proto)

  def evaluate(self, proto: Any, scope: Mapping[str, _Value], place: Any) -> _Value:
    """Returns the value of an expression.

    Args:
      proto: The serialized expression.
      scope: Values by name.
      place: Where calls in it are done.
    """
    kind = proto.WhichOneof('computation')
    if kind == 'reference':
      return scope[proto.reference.name]
    if kind == 'selection':
      return self.evaluate(proto.selection.source, scope, place)[proto.selection.index]
    if kind == 'struct':
      return [self.evaluate(its.value, scope, place) for its in proto.struct.element]
    if kind == 'block':
      scope = dict(scope)
      for local in proto.block.local:
        scope[local.name] = self.evaluate(local.value, scope, place)
      return self.evaluate(proto.block.result, scope, place)
    if kind == 'call':
      function = self.evaluate(proto.call.function, scope, place)
      argument = None
      if proto.call.HasField('argument'):
        argument = self.evaluate(proto.call.argument, scope, place)
      return function(argument, place)
    if kind == 'lambda':
      return functools.partial(self._call_lambda, getattr(proto, 'lambda'), scope)
    if kind == 'tensorflow':
      return functools.partial(self._call_graph, proto)
    if kind == 'intrinsic':
      return functools.partial(self._call_intrinsic, proto)
    if kind == 'literal':
      return self._literal(proto, place)
    raise NotImplementedError(
        f'The in-process runtime cannot run a computation that holds {kind!r}: only '
        'TensorFlow graphs and federated operators. Use TFF\'s own runtime '
        '(`tff_kd.runtime.tff_worker`).'
    )

  def _call_lambda(self, proto, scope, argument, place) -> _Value:
    return self.evaluate(
        proto.result, {**scope, proto.parameter_name: argument}, place
    )

  def _call_graph(self, proto, argument, place) -> _Value:
    args = [] if argument is None else flatten(argument)
    result = proto.type.function.result
    emit = functools.partial(dataflow.emit_graph, proto.tensorflow)
    node = dataflow.Node(place, args, dataflow.leaf_types(result), emit)
    return _struct(iter(node.leaves), result)

  def _literal(self, proto, place) -> _Value:
    literal = tff.framework.ComputationBuildingBlock.from_proto(proto)
    dtype = dataflow.tensor_spec(literal.type_signature).dtype
    emit = lambda _: [tf.constant(literal.value, dtype)]
    return dataflow.Node(place, [], [proto.type], emit).leaves[0]

  def _call_intrinsic(self, proto, argument, place) -> _Value:
    uri = proto.intrinsic.uri
    types = proto.type.function.parameter
    if uri in _AT_CLIENTS or uri in _AT_SERVER:
      place = _CLIENTS if uri in _AT_CLIENTS else _SERVER
      if uri.startswith('federated_eval'):
        return argument(None, place)
      return argument[0](argument[1], place)
    if uri in _ARRANGEMENTS:
      return argument
    if uri in _OPERATORS:
      return self._reduce(argument, proto.type.function.result, *_OPERATORS[uri])
    if uri.startswith('federated_secure'):
      return self._secure_sum(argument, uri, proto.type.function.result)
    if uri == 'federated_aggregate':
      return self._aggregate(argument, types)
    if uri == 'sequence_map':
      return self._sequence_map(argument, proto.type.function, place)
    if uri == 'sequence_sum':
      return self._sequence_sum(argument, proto.type.function, place)
    if uri == 'sequence_reduce':
      return self._sequence_reduce(argument, types, place)
    block = tff.framework.ComputationBuildingBlock.from_proto(proto)
    block, is_known = tff.tensorflow.replace_intrinsics_with_bodies(block)
    if not is_known:
      raise _not_supported(uri)
    return self.evaluate(block.proto, {}, place)(argument, place)

  def _body(self, function: _Value, types: Sequence[Any]) -> dataflow.Body:
    """Returns the body of a function of one argument, or of a pair."""
    body = dataflow.Body()
    params = [
        _struct(iter(body.add_params(dataflow.leaf_types(its))), its) for its in types
    ]
    result = function(params[0] if len(params) == 1 else params, body)
    body.results = flatten(result)
    return body

  def _reduce(self, value, type_proto, operator, fill) -> _Value:
    """Adds a sum, minimum or maximum over clients."""
    types = dataflow.leaf_types(type_proto)
    body, zero = _operation(types, operator, fill, _SERVER)
    node = dataflow.Aggregate(flatten(value), zero, body, body)
    return _struct(iter(node.leaves), type_proto)

  def _secure_sum(self, argument, uri, type_proto) -> _Value:
    """Adds a sum in the clear: simulated clients have no protocol between them."""
    if uri not in _SECURE_CHECKS:
      raise _not_supported(uri)
    value, bound = argument
    types = dataflow.leaf_types(type_proto)
    bounds = flatten(bound) if isinstance(bound, list) else [bound] * len(types)
    emit = functools.partial(_pairwise, _SECURE_CHECKS[uri])
    if uri == 'federated_secure_modular_sum':
      total = flatten(self._reduce(value, type_proto, *_OPERATORS['federated_sum']))
      node = dataflow.Node(_SERVER, [*total, *bounds], types, emit)
      return _struct(iter(node.leaves), type_proto)
    node = dataflow.Node(_CLIENTS, [*flatten(value), *bounds], types, emit)
    return self._reduce(node.leaves, type_proto, *_OPERATORS['federated_sum'])

  def _aggregate(self, argument, types) -> _Value:
    value, zero, accumulate, merge, report = argument
    pair = types.struct.element[2].value.function.parameter.struct.element
    state = pair[0].value
    node = dataflow.Aggregate(
        flatten(value),
        flatten(zero),
        self._body(accumulate, [state, pair[1].value]),
        self._body(merge, [state, state]),
    )
    return report(_struct(iter(node.leaves), state), _SERVER)

  def _sequence_map(self, argument, function_type, place) -> _Value:
    element = function_type.parameter.struct.element[1].value.sequence.element
    new = function_type.result
    body = self._body(argument[0], [element])
    types = tuple(
        tff.types.deserialize_type(its) for its in (element, new.sequence.element)
    )
    emit = functools.partial(dataflow.emit_sequence_map, body, types)
    args = [argument[1], *body.captured]
    return dataflow.Node(place, args, [new], emit).leaves[0]

  def _sequence_reduce(self, argument, types, place) -> _Value:
    sequence, zero, function = argument
    pair = types.struct.element[2].value.function.parameter.struct.element
    state, element = pair[0].value, pair[1].value
    body = self._body(function, [state, element])
    return self._reduce_sequence(sequence, flatten(zero), body, (state, element), place)

  def _sequence_sum(self, sequence, function_type, place) -> _Value:
    element = function_type.parameter.sequence.element
    add, fill = _OPERATORS['federated_sum']
    body, zero = _operation(dataflow.leaf_types(element), add, fill, place)
    return self._reduce_sequence(sequence, zero, body, (element, element), place)

  def _reduce_sequence(self, sequence, zero, body, types, place) -> _Value:
    state, element = types
    emit = functools.partial(
        dataflow.emit_sequence_reduce, body, tff.types.deserialize_type(element), len(zero)
    )
    args = [sequence, *zero, *body.captured]
    node = dataflow.Node(place, args, dataflow.leaf_types(state), emit)
    return _struct(iter(node.leaves), state)


def _operation(types, operator, fill, place) -> tuple[dataflow.Body, list[dataflow.Leaf]]:
  """Returns the body that combines two values of some types, and their zero."""
  body = dataflow.Body()
  params = body.add_params([*types, *types])
  emit = functools.partial(_pairwise, operator)
  body.results = dataflow.Node(body, params, types, emit).leaves
  specs = [dataflow.tensor_spec(tff.types.deserialize_type(its)) for its in types]
  fill_all = lambda _: [tf.fill(its.shape, fill(its.dtype)) for its in specs]
  return body, dataflow.Node(place, [], types, fill_all).leaves


def _pairwise(operator, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
  """Combines each tensor of the first half with its one of the second."""
  half = len(tensors) // 2
  return [operator(x, y) for x, y in zip(tensors[:half], tensors[half:])]


def _at_most(value: tf.Tensor, bound: tf.Tensor) -> tf.Tensor:
  """Checks what a client adds to a secure sum."""
  message = 'client value larger than maximum specified for secure sum'
  in_range = tf.cast(value, tf.int64) <= tf.cast(bound, tf.int64)
  check = tf.raw_ops.Assert(
      condition=tf.reduce_all(in_range), data=[message, value, bound]
  )
  with tf.control_dependencies([check]):
    return tf.identity(value)


def _not_supported(uri: str) -> NotImplementedError:
  return NotImplementedError(
      f'The in-process runtime does not support `tff.{uri}`. Use another operator, or '
      "TFF's own runtime (`tff_kd.runtime.tff_worker`)."
  )


_AT_CLIENTS = {'federated_map', 'federated_eval_at_clients'}
# What is the same for all clients is computed once.
_AT_SERVER = {'federated_apply', 'federated_eval_at_server', 'federated_map_all_equal'}
_ARRANGEMENTS = {
    'federated_broadcast', 'federated_value_at_clients', 'federated_value_at_server',
    'federated_zip_at_clients', 'federated_zip_at_server',
}
_OPERATORS = {
    'federated_sum': (tf.add, lambda dtype: tf.zeros((), dtype)),
    'federated_min': (tf.minimum, lambda dtype: tf.constant(dtype.max, dtype)),
    'federated_max': (tf.maximum, lambda dtype: tf.constant(dtype.min, dtype)),
}
_SECURE_CHECKS = {
    'federated_secure_sum': _at_most,
    'federated_secure_sum_bitwidth': lambda value, bits: _at_most(
        value, 2 ** tf.cast(bits, tf.int64) - 1
    ),
    'federated_secure_modular_sum': tf.math.mod,
}


class _Schedule:
  """Gives each node its time: the server's are even, the clients' odd.

  Sums are made as early as possible, so that there are few passes over the clients. Other
  work of clients is done in the pass that needs it first, so that little is kept between
  passes; the server's as late as possible, so that what only the result needs comes last.
  """

  def __init__(self, results: Sequence[dataflow.Leaf]):
    self.nodes = _reachable(results)
    earliest = {}
    for node in self.nodes:
      earliest[node] = self._earliest(node, earliest)
    ready = [time + (time % 2) for time in earliest.values()]
    self.last = max(ready, default=0)
    self.time: dict[dataflow.Node, int] = {}
    needed: dict[dataflow.Node, int] = {}
    for leaf in results:
      if leaf.node.place is _SERVER:
        needed[leaf.node] = self.last
      else:
        needed[leaf.node] = earliest[leaf.node]
    for node in reversed(self.nodes):
      movable = not isinstance(node, (Argument, dataflow.Aggregate))
      time = self.time[node] = needed[node] if movable else earliest[node]
      for leaf in node.needs():
        before = time - 1 if time % 2 and leaf.node.place is _SERVER else time
        needed[leaf.node] = min(needed.get(leaf.node, self.last), before)

  @staticmethod
  def _earliest(node: dataflow.Node, earliest: Mapping[dataflow.Node, int]) -> int:
    """Returns when a node can be done; for a sum, when clients can add to it."""
    ready = [
        earliest[leaf.node] + isinstance(leaf.node, dataflow.Aggregate)
        for leaf in node.needs()
    ]
    time = max(ready, default=0)
    of_clients = node.place is _CLIENTS or isinstance(node, dataflow.Aggregate)
    return time | 1 if of_clients else time


def _reachable(results: Iterable[dataflow.Leaf]) -> list[dataflow.Node]:
  """Returns the nodes that results need, in order."""
  found, left = set(), [leaf.node for leaf in results]
  while left:
    node = left.pop()
    if node not in found:
      found.add(node)
      left += [leaf.node for leaf in node.needs()]
  return sorted(found, key=lambda node: node.number)


def _stages(results: Sequence[dataflow.Leaf]) -> list[Stage]:
  """Returns the stages that make results."""
  schedule = _Schedule(results)
  last_use: dict[dataflow.Leaf, float] = {}
  for node in schedule.nodes:
    for leaf in node.needs():
      last_use[leaf] = max(last_use.get(leaf, 0), schedule.time[node])
  last_use.update({leaf: _NEVER for leaf in results})
  stages = []
  for time in range(schedule.last + 1):
    nodes = [
        node for node in schedule.nodes
        if schedule.time[node] == time and not isinstance(node, Argument)
    ]
    if nodes:
      stages.append(_stage(time, nodes, last_use))
  return stages


def _stage(
    time: int,
    nodes: Sequence[dataflow.Node],
    last_use: Mapping[dataflow.Leaf, float],
) -> Stage:
  aggregates = [its for its in nodes if isinstance(its, dataflow.Aggregate)]
  work = [its for its in nodes if not isinstance(its, dataflow.Aggregate)]
  sums = _sums(aggregates) if aggregates else None
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
    return [leaf for its in aggregates for leaf in get(its)]

  def split(body: dataflow.Body, first: int):
    return body.params[:first], body.params[first:]

  if not all_of(lambda its: its.leaves):
    return None
  added = [split(its.accumulate, len(its.zero)) for its in aggregates]
  merged = [split(its.merge, len(its.zero)) for its in aggregates]
  accumulate_captured = all_of(lambda its: its.accumulate.captured)
  merge_captured = all_of(lambda its: its.merge.captured)
  join = lambda pairs: [leaf for side in zip(*pairs) for part in side for leaf in part]
  return Sums(
      zero=all_of(lambda its: its.zero),
      values=all_of(lambda its: its.values),
      total=all_of(lambda its: its.leaves),
      accumulate=executables.Executable(
          [*join(added), *accumulate_captured],
          all_of(lambda its: its.accumulate.results),
      ),
      accumulate_captured=accumulate_captured,
      merge=executables.Executable(
          [*join(merged), *merge_captured], all_of(lambda its: its.merge.results)
      ),
      merge_captured=merge_captured,
  )
