"""Evaluates a serialized computation on leaves instead of values.

The result is a graph of `dataflow.Node`s: the calls of TensorFlow graphs, each at the
server or at the clients, and the sums between them. Selections, zips, broadcasts and
functions of functions are resolved.
"""

from collections.abc import Iterator, Mapping, Sequence
import functools
from typing import Any

import tensorflow as tf

from tff_kd.compat import tff
from tff_kd.runtime import dataflow
from tff_kd.runtime import emitting

_CLIENTS, _SERVER = dataflow.CLIENTS, dataflow.SERVER

# A `dataflow.Leaf`, a list of values, or a function (argument, place) -> value.
_Value = Any


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


def evaluate(proto: Any) -> tuple[list[Argument], _Value]:
  """Evaluates a computation.

  Args:
    proto: The serialized computation.

  Returns:
    The parts of its argument, and its result.

  Raises:
    NotImplementedError: If it uses something that does not run in process.
  """
  evaluation = _Evaluation()
  function = evaluation.evaluate(proto, {}, _SERVER)
  argument = None
  if proto.type.function.HasField('parameter'):
    argument = evaluation.argument(proto.type.function.parameter, ())
  return evaluation.arguments, function(argument, _SERVER)


def flatten(value: _Value) -> list[dataflow.Leaf]:
  """Returns the leaves of a value."""
  if isinstance(value, list):
    return [leaf for element in value for leaf in flatten(element)]
  return [value]


def _struct(leaves: Iterator[dataflow.Leaf], type_proto: Any) -> _Value:
  """Returns leaves, an iterator, as the value of a type."""
  kind = type_proto.WhichOneof('type')
  if kind == 'struct':
    return [_struct(leaves, element.value) for element in type_proto.struct.element]
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
          self.argument(element.value, (*path, i))
          for i, element in enumerate(type_proto.struct.element)
      ]
    self.arguments.append(Argument(path, type_proto))
    return _struct(iter(self.arguments[-1].leaves), type_proto)

  def evaluate(self, proto: Any, scope: Mapping[str, _Value], place: Any) -> _Value:
    """Returns the value of an expression.

    Args:
      proto: The serialized expression.
      scope: Values by name.
      place: Where the work of its calls is done: `dataflow.SERVER`,
        `dataflow.CLIENTS` or a `dataflow.Body`.
    """
    kind = proto.WhichOneof('computation')
    if kind == 'reference':
      return scope[proto.reference.name]
    if kind == 'selection':
      return self.evaluate(proto.selection.source, scope, place)[proto.selection.index]
    if kind == 'struct':
      elements = proto.struct.element
      return [self.evaluate(element.value, scope, place) for element in elements]
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
        "TensorFlow graphs and federated operators. Use TFF's own runtime "
        '(`tff_kd.runtime.tff_worker`).'
    )

  def _call_lambda(self, proto, scope, argument, place) -> _Value:
    return self.evaluate(
        proto.result, {**scope, proto.parameter_name: argument}, place
    )

  def _call_graph(self, proto, argument, place) -> _Value:
    args = [] if argument is None else flatten(argument)
    result = proto.type.function.result
    # The server runs alone and may use all threads.
    emit = functools.partial(
        emitting.emit_graph, proto.tensorflow, place is not _SERVER
    )
    node = dataflow.Node(place, args, dataflow.leaf_types(result), emit)
    return _struct(iter(node.leaves), result)

  def _literal(self, proto, place) -> _Value:
    literal = tff.framework.ComputationBuildingBlock.from_proto(proto)
    dtype = dataflow.tensor_spec(proto.type).dtype
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
    if uri == 'federated_sum':
      return self._sum(argument, proto.type.function.result)
    if uri == 'federated_aggregate':
      return self._aggregate(argument, types)
    if uri == 'sequence_map':
      return self._sequence_map(argument, proto.type.function, place)
    if uri == 'sequence_sum':
      return self._sequence_sum(argument, proto.type.function, place)
    if uri == 'sequence_reduce':
      return self._sequence_reduce(argument, types, place)
    block = tff.framework.ComputationBuildingBlock.from_proto(proto)
    is_secure = uri.startswith('federated_secure')
    if is_secure:  # In the clear: simulated clients have no protocol between them.
      comp = tff.framework.ConcreteComputation.from_building_block(block)
      comp = tff.backends.test.replace_secure_intrinsics_with_bodies(comp)
      block = comp.to_building_block()
    block, is_known = tff.tensorflow.replace_intrinsics_with_bodies(block)
    if not (is_known or is_secure):
      raise NotImplementedError(
          f'The in-process runtime does not support `tff.{uri}`. Use another operator, '
          "or TFF's own runtime (`tff_kd.runtime.tff_worker`)."
      )
    return self.evaluate(block.proto, {}, place)(argument, place)

  def _body(self, function: _Value, types: Sequence[Any]) -> dataflow.Body:
    """Returns the body of a function of one argument, or of a pair."""
    body = dataflow.Body()
    params = [
        _struct(iter(body.add_params(dataflow.leaf_types(each))), each) for each in types
    ]
    result = function(params[0] if len(params) == 1 else params, body)
    body.results = flatten(result)
    return body

  def _sum(self, value, type_proto) -> _Value:
    types = dataflow.leaf_types(type_proto)
    body, zero = _addition(types, _SERVER)
    node = dataflow.Aggregate(flatten(value), zero, body, body)
    return _struct(iter(node.leaves), type_proto)

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
        tff.types.deserialize_type(each) for each in (element, new.sequence.element)
    )
    emit = functools.partial(emitting.emit_sequence_map, body, types)
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
    body, zero = _addition(dataflow.leaf_types(element), place)
    return self._reduce_sequence(sequence, zero, body, (element, element), place)

  def _reduce_sequence(self, sequence, zero, body, types, place) -> _Value:
    state, element = types
    type_spec = tff.types.deserialize_type(element)
    emit = functools.partial(
        emitting.emit_sequence_reduce, body, type_spec, len(zero)
    )
    args = [sequence, *zero, *body.captured]
    node = dataflow.Node(place, args, dataflow.leaf_types(state), emit)
    return _struct(iter(node.leaves), state)


def _addition(types, place) -> tuple[dataflow.Body, list[dataflow.Leaf]]:
  """Returns the body that adds two values of some types, and their zero."""
  body = dataflow.Body()
  params = body.add_params([*types, *types])
  add = lambda tensors: list(map(tf.add, tensors[: len(types)], tensors[len(types) :]))
  body.results = dataflow.Node(body, params, types, add).leaves
  specs = [dataflow.tensor_spec(each) for each in types]
  zeros = lambda _: [tf.zeros(spec.shape, spec.dtype) for spec in specs]
  return body, dataflow.Node(place, [], types, zeros).leaves


_AT_CLIENTS = {'federated_map', 'federated_eval_at_clients'}
# Values that are the same for all clients are computed once, at the server.
_AT_SERVER = {'federated_apply', 'federated_eval_at_server', 'federated_map_all_equal'}
_ARRANGEMENTS = {
    'federated_broadcast', 'federated_value_at_clients', 'federated_value_at_server',
    'federated_zip_at_clients', 'federated_zip_at_server',
}
