"""Rewrites graphs so that they run faster where they are run again and again.

- `tf.data.Dataset.reduce`, with which `tff.learning` trains on a client's dataset, has
  TensorFlow optimize and instantiate its function anew in each run: 50 ms a client for a
  small model, of which less than 5 are training. It becomes a loop over an iterator,
  which is instantiated once, with the function that it is in.
- `tf.while_loop` spreads its operations over TensorFlow's threads. Where each core is at
  work for a client of its own, that costs a fifth of its time: there, loops stay in one
  thread. Not those with anything that waits for other threads, as branches and calls do:
  all of TensorFlow's threads could wait, and none be left for what they wait for. And not
  those with convolutions: TensorFlow gives these to oneDNN, which takes half of the time,
  only where a loop is spread.
- Of such a loop, all that a step is given goes through one operation first. TensorFlow
  meets the nodes of a graph in an order that, in a loop, depends on where it enters;
  a `MaxPoolGrad` that it meets before its `MaxPool` is not given to oneDNN, and takes
  fourteen times as long.
- Functions get names that are new in this process: a graph may come from another one.
"""

from collections.abc import Iterable, Sequence
import contextlib
import itertools
import re
from typing import Any

import tensorflow as tf

from tff_kd.runtime import dataflow
from tff_kd.runtime import devices

_REDUCE = 'ReduceDataset'
_SPREAD = '_lower_using_switch_merge'
_LOOPS = ('While', 'StatelessWhile')
# Operations that wait for other threads, beside those that run a function.
_WAITING = re.compile('Iterator|Dataset|Collective|Recv|Queue|Barrier|Stage')
# Operations that oneDNN computes, beside products of matrices.
_CONVOLUTION = re.compile('Conv[23]D|DepthwiseConv|(Max|Avg)Pool')
_ENTRY = 'all_arguments'
_CPU = '/device:CPU:0'
_numbers = itertools.count()


def rewrite(graph_def: Any, in_one_thread: bool) -> None:
  """Rewrites a graph and its functions.

  Args:
    graph_def: The graph; changed in place.
    in_one_thread: Whether loops stay in one thread, if nothing in them waits.
  """
  if not graph_def.library.function:
    return  # Loops, branches and reductions all have functions.
  rewriter = _Rewriter(graph_def.library.function, in_one_thread)
  rewriter.rewrite(graph_def.node)
  del graph_def.library.function[:]
  graph_def.library.function.extend(rewriter.rewritten.values())


class _Rewriter:
  """Rewrites functions, from the callees up.

  Attributes:
    rewritten: The functions by new name.
  """

  def __init__(self, functions: Iterable[Any], in_one_thread: bool):
    self._functions = {function.signature.name: function for function in functions}
    self._in_one_thread = in_one_thread
    self._new_names: dict[str, str] = {}
    self.rewritten: dict[str, Any] = {}

  def rewrite(self, nodes: Iterable[Any]) -> None:
    """Rewrites nodes, and the functions that they call."""
    for node in nodes:
      if node.op in self._functions:
        node.op = self._rewrite_function(node.op)
      for function in _functions_in(node):
        function.name = self._rewrite_function(function.name)
      if node.op == _REDUCE:
        self._replace_reduce(node)
      if node.op in _LOOPS:
        self._rewrite_loop(node)

  def _rewrite_loop(self, loop: Any) -> None:
    """Keeps a loop in one thread, or prepares it for oneDNN; its functions are done."""
    held = [
        node
        for called in _functions_in(loop)
        for function in self._reachable(called.name)
        for node in function.node_def
    ]
    if devices.only_cpus() and any(_CONVOLUTION.match(node.op) for node in held):
      _enter_by_one_node(self.rewritten[loop.attr['body'].func.name])
    elif self._in_one_thread and not any(
        _WAITING.search(node.op) or (_functions_in(node) and node.op not in _LOOPS)
        for node in held
    ):
      loop.attr[_SPREAD].b = False

  def _rewrite_function(self, name: str) -> str:
    """Rewrites a function that has not been; returns its new name."""
    if name in self._new_names or name not in self._functions:
      return self._new_names.get(name, name)
    new_name = f'{name}_in_process_{next(_numbers)}'
    self._new_names[name] = new_name
    function = tf.compat.v1.GraphDef().library.function.add()
    function.CopyFrom(self._functions[name])
    function.signature.name = new_name
    reduces = {node.name for node in function.node_def if node.op == _REDUCE}
    self.rewrite(function.node_def)
    # In functions, inputs contain the output's name: `components` of `ReduceDataset`.
    rename = lambda value: (
        value.replace(':components:', ':output:')
        if value.partition(':')[0] in reduces
        else value
    )
    for node in function.node_def if reduces else ():
      node.input[:] = [rename(value) for value in node.input]
    for key, value in function.ret.items():
      function.ret[key] = rename(value)
    self.rewritten[new_name] = function
    return new_name

  def _replace_reduce(self, node: Any) -> None:
    """Makes a `ReduceDataset` a call of a function with the loop."""
    name = node.attr['f'].func.name
    num_state, num_other = (
        len(node.attr[attr].list.type) for attr in ('Tstate', 'Targuments')
    )
    loop = _trace_loop(name, self._reachable(name), num_state, num_other)
    for function in [*loop.graph.as_graph_def().library.function, loop.function_def]:
      if function.signature.name not in self.rewritten:
        self._functions[function.signature.name] = function
    call = _call(loop.function_def, node.name, node.input)
    call.attr['f'].func.name = self._rewrite_function(loop.function_def.signature.name)
    call.device = node.device
    node.CopyFrom(call)

  def _reachable(self, name: str) -> list[Any]:
    """Returns a function and those that it calls; all have been rewritten."""

    def called(name: str) -> list[str]:
      nodes = self.rewritten[name].node_def if name in self.rewritten else ()
      return [function.name for node in nodes for function in _functions_in(node)]

    found = dataflow.reachable([name], called)
    return [self.rewritten[each] for each in found if each in self.rewritten]


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


def _enter_by_one_node(function: Any) -> None:
  """Lets all nodes of a function come after one that has its arguments."""
  arguments = [argument.name for argument in function.signature.input_arg]
  if not arguments or any(node.name == _ENTRY for node in function.node_def):
    return
  passed_on = {name: f'{_ENTRY}:output:{i}' for i, name in enumerate(arguments)}
  passed_on |= {f'^{name}': f'^{_ENTRY}' for name in arguments}
  for node in function.node_def:
    node.input[:] = [passed_on.get(name, name) for name in node.input] or [f'^{_ENTRY}']
  for result, value in function.ret.items():
    function.ret[result] = passed_on.get(value, value)
  entry = function.node_def.add(name=_ENTRY, op='IdentityN', input=arguments)
  entry.attr['T'].list.type.extend(each.type for each in function.signature.input_arg)


def _call(function: Any, name: str, inputs: Sequence[str]) -> Any:
  """Returns the node that calls a function."""
  node = tf.compat.v1.NodeDef(name=name, input=inputs)
  signature = function.signature
  node.op = 'StatefulPartitionedCall' if signature.is_stateful else 'PartitionedCall'
  node.attr['f'].func.name = signature.name
  for attr, args in (('Tin', signature.input_arg), ('Tout', signature.output_arg)):
    node.attr[attr].list.type.extend([arg.type for arg in args])
  for attr in ('config', 'config_proto', 'executor_type'):
    node.attr[attr].s = b''
  return node


def _beside_accelerators() -> contextlib.AbstractContextManager:
  """Places iterators on the CPU, where there is something else.

  Not where there are only CPUs: with the iterator on one and its loop on another, two
  clients at the same time waited for ever for what one device sends to the other.
  """
  if devices.only_cpus():
    return contextlib.nullcontext()
  return tf.device(_CPU)


def _trace_loop(
    name: str, library: Sequence[Any], num_state: int, num_other: int
) -> Any:
  """Returns a concrete function that does what `ReduceDataset` does.

  Args:
    name: The name of the function of the state, an element, and other arguments.
    library: The function and those that it calls.
    num_state: How many tensors the state has.
    num_other: How many other arguments there are.
  """
  function = next(each for each in library if each.signature.name == name)
  dtypes = [tf.as_dtype(arg.type) for arg in function.signature.input_arg]
  first_other = len(dtypes) - num_other
  elements = dict(
      output_types=dtypes[num_state:first_other],
      output_shapes=[tf.TensorShape(None)] * (first_other - num_state),
  )

  def loop(dataset, *rest):
    state, other = rest[:num_state], rest[num_state:]
    with _beside_accelerators():
      iterator = tf.raw_ops.AnonymousIteratorV3(**elements)
      tf.raw_ops.MakeIterator(dataset=dataset, iterator=iterator)

    def next_element():
      with _beside_accelerators():
        return tf.raw_ops.IteratorGetNextAsOptional(iterator=iterator, **elements)

    def body(optional, *state):
      with _beside_accelerators():
        element = tf.raw_ops.OptionalGetValue(optional=optional, **elements)
      args = [*state, *element, *(tf.identity(tensor) for tensor in other)]
      return (next_element(), *_apply(function, library, args))

    first = next_element()
    return tf.while_loop(
        lambda optional, *_: tf.raw_ops.OptionalHasValue(optional=optional),
        body,
        (first, *state),
        shape_invariants=(first.shape, *[tf.TensorShape(None)] * num_state),
        parallel_iterations=1,  # The function may have side effects.
    )[1:]

  rest = dtypes[:num_state] + dtypes[first_other:]
  specs = [tf.TensorSpec((), tf.variant), *(tf.TensorSpec(None, dtype) for dtype in rest)]
  # A `tf.function`: operations after the call wait for its side effects.
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
