"""A computation as a graph of steps on tensors, and how steps become TensorFlow.

A `Node` is one step, such as a call of a TensorFlow graph; its `Leaf`s are the single
tensors (or datasets) that it gives. A `Body` is a function of leaves, for work that is
done again and again: adding one client's value, or mapping a sequence.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import functools
import itertools
from typing import Any, Optional, TypeVar

import tensorflow as tf

from tff_kd.compat import tff

# Where a node's work is done; a third possibility is a `Body`.
SERVER: str = 'server'
CLIENTS: str = 'clients'

Emit = Callable[[Sequence[tf.Tensor]], Sequence[tf.Tensor]]
_T = TypeVar('_T')


class Leaf:
  """One tensor or dataset that a node gives.

  Attributes:
    node: The `Node`.
    type_proto: Its type, serialized: a tensor or a sequence.
  """

  def __init__(self, node: 'Node', type_proto: Any):
    self.node = node
    self.type_proto = type_proto

  @functools.cached_property  # On Ray each group of clients asks for it.
  def tensor_spec(self) -> tf.TensorSpec:
    """The spec of the tensor that holds the leaf."""
    return tensor_spec(self.type_proto)


class Node:
  """One step, or something given.

  Attributes:
    place: `SERVER`, `CLIENTS`, or the `Body` that the step belongs to.
    args: The leaves that it takes.
    leaves: The leaves that it gives.
    emit: Makes its tensors from those of `args`; `None` if they are given.
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
    return _nodes_to(self.results, lambda leaf: leaf.node.place is not self)[1]

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


def reachable(
    starts: Iterable[_T], neighbours: Callable[[_T], Iterable[_T]]
) -> list[_T]:
  """Returns what can be reached in a graph, each item once.

  Args:
    starts: The items to begin with, which are part of the result.
    neighbours: Returns the items to go on to from an item.
  """
  found, left = {}, list(starts)
  while left:
    item = left.pop()
    if item not in found:
      found[item] = None
      left += neighbours(item)
  return list(found)


def _nodes_to(
    leaves: Iterable[Leaf], is_given: Callable[[Leaf], bool]
) -> tuple[list[Node], list[Leaf]]:
  """Returns the nodes that make leaves, in order, and the given leaves that they need."""
  leaves = list(leaves)
  nodes = reachable(
      [leaf.node for leaf in leaves if not is_given(leaf)],
      lambda node: [leaf.node for leaf in node.args if not is_given(leaf)],
  )
  needed = itertools.chain(leaves, *(node.args for node in nodes))
  given = list(dict.fromkeys(leaf for leaf in needed if is_given(leaf)))
  return sorted(nodes, key=lambda node: node.number), given


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
  nodes, _ = _nodes_to(results, given.__contains__)
  for node in nodes:
    if node.emit is not None:
      made = node.emit([tensors[leaf] for leaf in node.args])
      tensors.update(zip(node.leaves, made, strict=True))
  return [tensors[leaf] for leaf in results]


def leaf_types(type_proto: Any) -> list[Any]:
  """Returns the serialized types of the leaves of a serialized type."""
  kind = type_proto.WhichOneof('type')
  if kind == 'struct':
    return [
        leaf
        for element in type_proto.struct.element
        for leaf in leaf_types(element.value)
    ]
  return leaf_types(type_proto.federated.member) if kind == 'federated' else [type_proto]


def tensor_spec(type_proto: Any) -> tf.TensorSpec:
  """Returns the spec of the tensor that holds a leaf of a serialized type."""
  type_spec = tff.types.deserialize_type(type_proto)
  if isinstance(type_spec, tff.SequenceType):
    return tf.TensorSpec((), tf.variant)  # A dataset.
  return tf.TensorSpec(type_spec.shape, type_spec.dtype)
