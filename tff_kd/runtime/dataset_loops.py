"""`tf.data.Dataset.reduce` as a loop whose body is prepared once.

The op behind `reduce`, with which `tff.learning` trains on a client's dataset, has
TensorFlow optimize and instantiate its function anew in each run: 50 ms a client for a
small model, of which less than 5 are training. A loop over an iterator is instantiated
with the function that it is in, once.
"""

from collections.abc import Iterable, Sequence
import itertools
from typing import Any

import tensorflow as tf

REDUCE = 'ReduceDataset'
_CPU = '/device:CPU:0'
_numbers = itertools.count()


def replace_reduces(graph_def: Any) -> None:
  """Replaces each `ReduceDataset` in a graph and in its functions by a loop.

  Args:
    graph_def: The graph; changed in place. Functions that change get new names, so that
      the graph can be used beside the one that it was.
  """
  rewriter = _Rewriter(graph_def.library)
  rewriter.rewrite(graph_def.node)
  graph_def.library.function.extend(rewriter.added.values())


class _Rewriter:
  """Rewrites the functions of a library, from the callees up.

  Attributes:
    added: New functions by name.
  """

  def __init__(self, library: Any):
    self._functions = {its.signature.name: its for its in library.function}
    self._new_names: dict[str, str] = {}
    self.added: dict[str, Any] = {}

  def rewrite(self, nodes: Iterable[Any]) -> set[str]:
    """Rewrites nodes; returns the names of all that changed."""
    changed = set()
    for node in nodes:
      for function in _functions_in(node):
        new_name = self._rewritten(function.name)
        if new_name != function.name:
          function.name = new_name
          changed.add(node.name)
      if node.op == REDUCE:
        self._replace(node)
        changed.add(node.name)
    return changed

  def _rewritten(self, name: str) -> str:
    """Returns the name of a function as it is after the rewriting."""
    if name in self._new_names or name not in self._functions:
      return self._new_names.get(name, name)
    self._new_names[name] = name
    function = tf.compat.v1.GraphDef().library.function.add()
    function.CopyFrom(self._functions[name])
    reduces = {its.name for its in function.node_def if its.op == REDUCE}
    if self.rewrite(function.node_def):
      # In functions, inputs name the outputs of an op.
      old, new = ':components:', ':output:'
      for node in function.node_def:
        for i, value in enumerate(node.input):
          if value.partition(':')[0] in reduces:
            node.input[i] = value.replace(old, new)
      for key, value in function.ret.items():
        if value.partition(':')[0] in reduces:
          function.ret[key] = value.replace(old, new)
      function.signature.name = f'{name}_loop_{next(_numbers)}'
      self._new_names[name] = function.signature.name
      self.added[function.signature.name] = function
    return self._new_names[name]

  def _replace(self, node: Any) -> None:
    """Makes a `ReduceDataset` a call of a function with the loop."""
    name = node.attr['f'].func.name
    num_state, num_other = (
        len(node.attr[attr].list.type) for attr in ('Tstate', 'Targuments')
    )
    loop = _loop(name, self._reachable(name), num_state, num_other)
    for function in [*loop.graph.as_graph_def().library.function, loop.function_def]:
      if function.signature.name not in self._functions:
        self.added[function.signature.name] = function
    call = _call(loop.function_def, node.name, node.input)
    call.device = node.device
    node.CopyFrom(call)

  def _reachable(self, name: str) -> list[Any]:
    """Returns a function and those that it calls."""
    found, left = {}, [name]
    while left:
      name = left.pop()
      function = self.added.get(name) or self._functions.get(name)
      if name not in found and function is not None:
        found[name] = function
        left += [its.name for node in function.node_def for its in _functions_in(node)]
    return list(found.values())


def _functions_in(node: Any) -> list[Any]:
  """Returns the functions that a node's attributes name."""
  found = []
  for attr in node.attr.values():
    kind = attr.WhichOneof('value')
    if kind == 'func':
      found.append(attr.func)
    elif kind == 'list':
      found += attr.list.func
  return found


def _call(function: Any, name: str, inputs: Sequence[str]) -> Any:
  """Returns the node that calls a function."""
  node = tf.compat.v1.NodeDef(name=name, input=inputs)
  stateful = function.signature.is_stateful
  node.op = 'StatefulPartitionedCall' if stateful else 'PartitionedCall'
  node.attr['f'].func.name = function.signature.name
  for attr, args in (
      ('Tin', function.signature.input_arg), ('Tout', function.signature.output_arg),
  ):
    node.attr[attr].list.type.extend([its.type for its in args])
  for attr in ('config', 'config_proto', 'executor_type'):
    node.attr[attr].s = b''
  return node


def _loop(name: str, library: Sequence[Any], num_state: int, num_other: int) -> Any:
  """Returns a concrete function that does what `ReduceDataset` does.

  Args:
    name: The name of the function of the state, an element, and other arguments.
    library: The function and those that it calls.
    num_state: How many tensors the state has.
    num_other: How many other arguments there are.
  """
  function = next(its for its in library if its.signature.name == name)
  dtypes = [tf.as_dtype(its.type) for its in function.signature.input_arg]
  first_other = len(dtypes) - num_other
  elements = dict(
      output_types=dtypes[num_state:first_other],
      output_shapes=[tf.TensorShape(None)] * (first_other - num_state),
  )

  def loop(dataset, *rest):
    state, other = rest[:num_state], rest[num_state:]
    with tf.device(_CPU):
      iterator = tf.raw_ops.AnonymousIteratorV3(**elements)
      tf.raw_ops.MakeIterator(dataset=dataset, iterator=iterator)

    def next_element():
      with tf.device(_CPU):
        return tf.raw_ops.IteratorGetNextAsOptional(iterator=iterator, **elements)

    def body(optional, *state):
      with tf.device(_CPU):
        element = tf.raw_ops.OptionalGetValue(optional=optional, **elements)
      args = [*state, *element, *(tf.identity(its) for its in other)]  # In this graph.
      return (next_element(), *_apply(function, library, args))

    first = next_element()
    return tf.while_loop(
        lambda optional, *_: tf.raw_ops.OptionalHasValue(optional=optional),
        body,
        (first, *state),
        shape_invariants=(first.shape, *[tf.TensorShape(None)] * num_state),
        parallel_iterations=1,  # The function may have side effects.
    )[1:]

  others = dtypes[:num_state] + dtypes[first_other:]
  specs = [tf.TensorSpec(None, dtype) for dtype in others]
  specs.insert(0, tf.TensorSpec((), tf.variant))
  # As `tf.function`, what comes after the call waits for side effects in the loop.
  return tf.function(loop, autograph=False).get_concrete_function(*specs)


def _apply(
    function: Any, library: Sequence[Any], tensors: Sequence[tf.Tensor]
) -> Sequence[tf.Tensor]:
  """Adds a call of a function to the graph that is being built."""
  names = [f'arg_{i}' for i in range(len(tensors))]
  graph_def = tf.compat.v1.GraphDef()
  graph_def.library.function.extend(library)
  for name, tensor in zip(names, tensors):
    node = graph_def.node.add(name=name, op='Placeholder')
    node.attr['dtype'].type = tensor.dtype.as_datatype_enum
  graph_def.node.append(_call(function, 'call', names))
  return tf.graph_util.import_graph_def(
      graph_def,
      input_map=dict(zip(names, tensors)),
      return_elements=[f'call:{i}' for i in range(len(function.signature.output_arg))],
      name='reduce',
  )
