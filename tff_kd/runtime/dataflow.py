"""A computation as a graph of steps on tensors, and how steps become TensorFlow.

A `Node` is one step, such as a call of a TensorFlow graph; its `Leaf`s are the single
tensors (or datasets) that it gives. A `Body` is a function of leaves, for what is done
again and again: adding one client's value, or mapping a sequence.
"""

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
import itertools
from typing import Any, Optional

import tensorflow as tf

from tff_kd.compat import tff
from tff_kd.runtime import dataset_loops

# Where a node's work is done; a third possibility is a `Body`.
SERVER, CLIENTS = 'server', 'clients'

# The name that makes a variable a new one in each run of its op (TensorFlow's
# `anonymous_name`): concurrent calls, and calls one after the other, share none.
_ANONYMOUS_VARIABLE = b'cd2c89b7-88b7-44c8-ad83-06c2a9158347'
# Ops that find a resource by name, and the ops that make a new one in each run.
_ANONYMOUS_OPS = {
    'HashTableV2': 'AnonymousHashTable',
    'MutableHashTableV2': 'AnonymousMutableHashTable',
    'MutableHashTableOfTensorsV2': 'AnonymousMutableHashTableOfTensors',
    'MutableDenseHashTableV2': 'AnonymousMutableDenseHashTable',
    'IteratorV2': 'AnonymousIteratorV3',
}
_NAME_ATTRS = ('container', 'shared_name', 'use_node_name_sharing')

Emit = Callable[[Sequence[tf.Tensor]], Sequence[tf.Tensor]]


class Leaf:
  """One tensor or dataset that a node gives.

  Attributes:
    node: The `Node`.
    type_proto: Its type, serialized: a tensor or a sequence.
  """

  __slots__ = ('node', 'type_proto')

  def __init__(self, node: 'Node', type_proto: Any):
    self.node = node
    self.type_proto = type_proto

  def type_spec(self) -> tff.Type:
    """Returns the leaf's type, a `tff.TensorType` or `tff.SequenceType`."""
    return tff.types.deserialize_type(self.type_proto)

  def tensor_spec(self) -> tf.TensorSpec:
    """Returns the spec of the tensor that holds the leaf."""
    return tensor_spec(self.type_spec())


class Node:
  """One step, or something given.

  Attributes:
    place: `SERVER`, `CLIENTS`, or the `Body` that the step belongs to.
    args: The leaves that it takes.
    leaves: The leaves that it gives.
    emit: Makes its tensors from those of `args`; `None` for what is given.
    number: Grows in the order in which nodes are made; a node only takes leaves of nodes
      with a smaller one.
  """

  _numbers = itertools.count()

  def __init__(
      self, place: Any, args: Sequence[Leaf], types: Iterable[Any], emit: Optional[Emit]
  ):
    self.place = place
    self.args = list(args)
    self.leaves = [Leaf(self, type_proto) for type_proto in types]
    self.emit = emit
    self.number = next(self._numbers)

  def needs(self) -> Sequence[Leaf]:
    """Returns the leaves that have to be there first."""
    return self.args


class Body:
  """A function of leaves.

  Attributes:
    params: The leaves that stand for its arguments.
    results: The leaves that it gives.
    captured: Leaves from outside of it that it uses.
  """

  def __init__(self):
    self.params: list[Leaf] = []
    self.results: list[Leaf] = []

  @property
  def captured(self) -> list[Leaf]:
    found = {}
    _nodes_to(self.results, lambda leaf: leaf.node.place is not self, found)
    return list(found)

  def add_params(self, types: Iterable[Any]) -> list[Leaf]:
    """Adds an argument with the types of its leaves; returns the leaves."""
    leaves = Node(self, [], types, None).leaves
    self.params += leaves
    return leaves

  def emit(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Returns the results' tensors, from those of `params`, then `captured`."""
    given = dict(zip([*self.params, *self.captured], tensors, strict=True))
    return emit(self.results, given)


class Aggregate(Node):
  """A sum over clients: its leaves are the accumulators, at the server.

  Attributes:
    values: What each client gives.
    zero: The accumulator of no clients.
    accumulate: A `Body` that adds a client's value to an accumulator.
    merge: A `Body` that adds two accumulators.
  """

  def __init__(
      self,
      values: Sequence[Leaf],
      zero: Sequence[Leaf],
      accumulate: Body,
      merge: Body,
  ):
    super().__init__(SERVER, [], [leaf.type_proto for leaf in merge.results], None)
    self.values = list(values)
    self.zero = list(zero)
    self.accumulate = accumulate
    self.merge = merge

  def needs(self) -> Sequence[Leaf]:
    return [
        *self.values, *self.zero, *self.accumulate.captured, *self.merge.captured,
    ]


def _nodes_to(
    leaves: Iterable[Leaf],
    is_given: Callable[[Leaf], bool],
    given: dict[Leaf, None],
) -> list[Node]:
  """Returns the nodes that make leaves, in order; adds what is given to `given`."""
  nodes, left = {}, list(leaves)
  while left:
    leaf = left.pop()
    if is_given(leaf):
      given[leaf] = None
    elif leaf.node not in nodes:
      nodes[leaf.node] = None
      left += leaf.node.args
  return sorted(nodes, key=lambda node: node.number)


def emit(
    results: Sequence[Leaf], given: Mapping[Leaf, tf.Tensor]
) -> list[tf.Tensor]:
  """Adds to the TensorFlow graph that is being built what makes leaves.

  Args:
    results: The leaves.
    given: Tensors for leaves that are there.

  Returns:
    The tensors of the results.
  """
  tensors = dict(given)
  for node in _nodes_to(results, given.__contains__, {}):
    if node.emit is not None:
      made = node.emit([tensors[leaf] for leaf in node.args])
      tensors.update(zip(node.leaves, made, strict=True))
  return [tensors[leaf] for leaf in results]


def leaf_types(type_proto: Any) -> list[Any]:
  """Returns the serialized types of the leaves of a serialized type."""
  kind = type_proto.WhichOneof('type')
  if kind == 'struct':
    return [
        leaf for its in type_proto.struct.element for leaf in leaf_types(its.value)
    ]
  return leaf_types(type_proto.federated.member) if kind == 'federated' else [type_proto]


def tensor_spec(type_spec: tff.Type) -> tf.TensorSpec:
  """Returns the spec of the tensor for a leaf's type; a dataset is a variant."""
  if isinstance(type_spec, tff.SequenceType):
    return tf.TensorSpec((), tf.variant)
  return tf.TensorSpec(type_spec.shape, type_spec.dtype)


def element_spec(type_spec: tff.Type) -> Any:
  """Returns the structure of `tf.TensorSpec`s of a sequence's element."""
  if not isinstance(type_spec, tff.StructType):
    return tensor_spec(type_spec)
  elements = [
      (name, element_spec(element))
      for name, element in tff.structure.iter_elements(type_spec)
  ]
  if elements and elements[0][0] is not None:
    return collections.OrderedDict(elements)
  return tuple(element for _, element in elements)


def _binding_names(binding: Any) -> list[str]:
  """Returns the names of the tensors in a binding of a serialized computation."""
  kind = binding.WhichOneof('binding')
  if kind == 'struct':
    return [name for its in binding.struct.element for name in _binding_names(its)]
  if kind == 'sequence':
    return [binding.sequence.variant_tensor_name]
  return [binding.tensor.tensor_name] if kind else []


def _op_name(tensor_name: str) -> str:
  return tensor_name.lstrip('^').partition(':')[0]


def _ancestors(nodes: Mapping[str, Any], names: Iterable[str]) -> set[str]:
  found, left = set(), list(names)
  while left:
    name = left.pop()
    if name not in found:
      found.add(name)
      left += [_op_name(tensor) for tensor in nodes[name].input]
  return found


def _prepare(graph_def: Any, inputs: Sequence[str], outputs: Sequence[str], init: str):
  """Makes of a graph for sessions one that can be a part of a function.

  What no output needs is left out. Variables and tables become new ones in each run, and
  what uses them waits until they are initialized, which a session does beforehand.

  Args:
    graph_def: The graph; changed in place.
    inputs: The names of tensors that are given.
    outputs: The names of tensors that are asked for.
    init: The name of the op that initializes; empty if there is none.
  """
  nodes = {node.name: node for node in graph_def.node}
  given = {_op_name(name) for name in inputs}
  first = _ancestors(nodes, [init]) if init else set()
  used = _ancestors(nodes, [_op_name(name) for name in outputs]) | first
  resources = {
      name for name in used
      if nodes[name].op == 'VarHandleOp' or nodes[name].op in _ANONYMOUS_OPS
  }
  for name in used:
    node = nodes[name]
    kept = [its for its in node.input if not (its[0] == '^' and its[1:] in given)]
    if init and name not in first and any(_op_name(its) in resources for its in kept):
      kept.append(f'^{init}')
    if kept != node.input:
      del node.input[:]
      node.input.extend(kept)
    dropped = ['_class']  # It may name nodes that are left out.
    if node.op == 'VarHandleOp':
      node.attr['shared_name'].s = _ANONYMOUS_VARIABLE
    elif node.op in _ANONYMOUS_OPS:
      node.op = _ANONYMOUS_OPS[node.op]
      dropped += _NAME_ATTRS
    for attr in dropped:
      if attr in node.attr:
        del node.attr[attr]
  if len(used) < len(nodes):
    kept = [node for node in graph_def.node if node.name in used]
    del graph_def.node[:]
    graph_def.node.extend(kept)


def emit_graph(
    tensorflow_proto: Any, tensors: Sequence[tf.Tensor]
) -> Sequence[tf.Tensor]:
  """Adds a serialized TensorFlow computation to the graph that is being built.

  Args:
    tensorflow_proto: The `tensorflow` field of a serialized computation.
    tensors: Its arguments' tensors.

  Returns:
    The tensors of the result.
  """
  graph_def = tf.compat.v1.GraphDef()
  tensorflow_proto.graph_def.Unpack(graph_def)
  inputs = _binding_names(tensorflow_proto.parameter)
  outputs = _binding_names(tensorflow_proto.result)
  init = _op_name(tensorflow_proto.initialize_op)
  token = tensorflow_proto.session_token_tensor_name
  _prepare(graph_def, inputs, outputs, init)
  if dataset_loops.REDUCE.encode() in tensorflow_proto.graph_def.value:
    dataset_loops.replace_reduces(graph_def)
  there = {node.name for node in graph_def.node}
  input_map = {
      name: tensor
      for name, tensor in zip(inputs, tensors, strict=True)
      if _op_name(name) in there
  }
  if token and _op_name(token) in there:
    input_map[token] = tf.constant('in_process')
  return tf.graph_util.import_graph_def(
      graph_def, input_map=input_map, return_elements=outputs, name='graph'
  )


def _flatten(value: Any, type_spec: tff.Type) -> list[tf.Tensor]:
  """Returns the tensors of a sequence's element in the order of its type."""
  if not isinstance(type_spec, tff.StructType):
    return [value]
  parts = value.values() if isinstance(value, Mapping) else value
  return [
      leaf
      for part, element in zip(parts, type_spec, strict=True)
      for leaf in _flatten(part, element)
  ]


def _pack(leaves: Any, spec: Any) -> Any:
  """Returns tensors, an iterator, in the structure of an element's spec."""
  if isinstance(spec, Mapping):
    return collections.OrderedDict((k, _pack(leaves, s)) for k, s in spec.items())
  if isinstance(spec, tuple):
    return tuple(_pack(leaves, s) for s in spec)
  return next(leaves)


def emit_sequence_map(
    body: Body, types: tuple[tff.Type, tff.Type], tensors: Sequence[tf.Tensor]
) -> Sequence[tf.Tensor]:
  """Adds a `sequence_map` to the graph that is being built.

  Args:
    body: What is done with each element.
    types: The type of an element before and after.
    tensors: The dataset's tensor, then those of what the body captures.

  Returns:
    The tensor of the new dataset.
  """
  variant, *captured = tensors
  spec, new_spec = (element_spec(its) for its in types)

  @tf.autograph.experimental.do_not_convert
  def map_element(*parts):
    element = parts if isinstance(spec, tuple) else parts[0]
    here = [tf.identity(its) for its in captured]
    results = body.emit([*_flatten(element, types[0]), *here])
    return _pack(iter(results), new_spec)

  dataset = tf.data.experimental.from_variant(variant, spec).map(map_element)
  return [tf.data.experimental.to_variant(dataset)]


def emit_sequence_reduce(
    body: Body, type_spec: tff.Type, num_state: int, tensors: Sequence[tf.Tensor]
) -> Sequence[tf.Tensor]:
  """Adds a `sequence_reduce` to the graph that is being built.

  Args:
    body: What makes a new state of the state and an element.
    type_spec: The type of an element.
    num_state: How many leaves the state has.
    tensors: The dataset's tensor, those of the first state, then those of what the body
      captures.

  Returns:
    The tensors of the last state.
  """
  variant, state = tensors[0], tensors[1 : 1 + num_state]
  captured = tensors[1 + num_state :]

  @tf.autograph.experimental.do_not_convert
  def reduce_element(state, element):
    here = [tf.identity(its) for its in captured]
    return tuple(body.emit([*state, *_flatten(element, type_spec), *here]))

  dataset = tf.data.experimental.from_variant(variant, element_spec(type_spec))
  return dataset.reduce(tuple(state), reduce_element)
