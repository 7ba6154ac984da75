"""Adds serialized TensorFlow graphs and operators on sequences to a function's graph."""

from collections.abc import Mapping, Sequence
import os
import platform
from typing import Any

import tensorflow as tf

from tff_kd import graphs
from tff_kd.compat import tff
from tff_kd.runtime import dataflow
from tff_kd.runtime import graph_rewriting

# The name that makes a variable a new one in each run of its operation (TensorFlow's
# `anonymous_name`): concurrent calls, and calls one after the other, share none.
_ANONYMOUS_VARIABLE = b'cd2c89b7-88b7-44c8-ad83-06c2a9158347'
# Operations that find a resource by name, and those that make a new one in each run.
_ANONYMOUS_OPS = {
    'HashTableV2': 'AnonymousHashTable',
    'MutableHashTableV2': 'AnonymousMutableHashTable',
    'MutableHashTableOfTensorsV2': 'AnonymousMutableHashTableOfTensors',
    'MutableDenseHashTableV2': 'AnonymousMutableDenseHashTable',
    'IteratorV2': 'AnonymousIteratorV3',
}
_NAME_ATTRS = ('container', 'shared_name', 'use_node_name_sharing')


def emit_graph(
    tensorflow_proto: Any, in_one_thread: bool, tensors: Sequence[tf.Tensor]
) -> Sequence[tf.Tensor]:
  """Adds a serialized TensorFlow computation to the graph that is being built.

  Args:
    tensorflow_proto: The `tensorflow` field of a serialized computation.
    in_one_thread: Whether loops stay in one thread if there is only one device.
    tensors: The arguments' tensors.

  Returns:
    The tensors of the result.
  """
  graph_def = tf.compat.v1.GraphDef()
  tensorflow_proto.graph_def.Unpack(graph_def)
  inputs = _binding_names(tensorflow_proto.parameter)
  outputs = _binding_names(tensorflow_proto.result)
  init = _op_name(tensorflow_proto.initialize_op)
  _prepare(graph_def, inputs, outputs, init)
  only_device = len(tf.config.list_logical_devices()) == 1
  graph_rewriting.rewrite(graph_def, in_one_thread and only_device)
  input_map = dict(zip(inputs, tensors, strict=True))
  input_map[tensorflow_proto.session_token_tensor_name] = tf.constant('in_process')
  there = {node.name for node in graph_def.node}
  input_map = {name: t for name, t in input_map.items() if _op_name(name) in there}
  for node in graph_def.node:
    if node.op == 'ImmutableConst':
      input_map[f'{node.name}:0'] = tf.identity(_mapped_file(node.attr))
  return tf.graph_util.import_graph_def(
      graph_def, input_map=input_map, return_elements=outputs, name='graph'
  )


def _mapped_file(attrs: Mapping[str, Any]) -> tf.Tensor:
  """Returns the tensor over a file, which is mapped once and not in each run."""
  path = attrs['memory_region_name'].s.decode()
  if not os.path.exists(path):
    raise FileNotFoundError(
        f'The file {path} of examples is not on the machine {platform.node()}. Every '
        'machine that computes must have it under this path: name a folder that all of '
        'them share as the `directory` of `FileClientData` and `TransferSet` (of '
        'scripts, --cache_dir), or copy it there.'
    )
  with tf.init_scope(), tf.device('/device:CPU:0'):
    return tf.raw_ops.ImmutableConst(
        dtype=tf.as_dtype(attrs['dtype'].type),
        shape=tf.TensorShape(attrs['shape'].shape),
        memory_region_name=path,
    )


def _binding_names(binding: Any) -> list[str]:
  """Returns the names of the tensors in a binding of a serialized computation."""
  kind = binding.WhichOneof('binding')
  if kind == 'struct':
    return [name for part in binding.struct.element for name in _binding_names(part)]
  if kind == 'sequence':
    return [binding.sequence.variant_tensor_name]
  return [binding.tensor.tensor_name] if kind else []


def _op_name(tensor_name: str) -> str:
  return tensor_name.lstrip('^').partition(':')[0]


def _prepare(graph_def: Any, inputs: Sequence[str], outputs: Sequence[str], init: str):
  """Makes of a graph for sessions one that can be a part of a function.

  Nodes that no output needs are left out. Variables and tables become new ones in each
  run, and their users wait until they are initialized, which a session does beforehand.

  Args:
    graph_def: The graph; changed in place.
    inputs: The names of tensors that are given.
    outputs: The names of tensors that are asked for.
    init: The name of the operation that initializes; empty if there is none.
  """
  nodes = {node.name: node for node in graph_def.node}
  given = {_op_name(name) for name in inputs}
  inputs_of = lambda name: map(_op_name, nodes[name].input)
  first = set(dataflow.reachable([init] if init else [], inputs_of))
  used = first.union(dataflow.reachable(map(_op_name, outputs), inputs_of))
  resources = {
      name for name in used
      if nodes[name].op == 'VarHandleOp' or nodes[name].op in _ANONYMOUS_OPS
  }
  for name in used:
    node = nodes[name]
    kept = [each for each in node.input if not (each[0] == '^' and each[1:] in given)]
    if init and name not in first and any(_op_name(each) in resources for each in kept):
      kept.append(f'^{init}')
    if kept != node.input:
      node.input[:] = kept
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


def emit_sequence_map(
    body: dataflow.Body, types: Sequence[tff.Type], tensors: Sequence[tf.Tensor]
) -> Sequence[tf.Tensor]:
  """Adds a `sequence_map` to the graph that is being built.

  Args:
    body: The work on each element.
    types: The type of an element before and after.
    tensors: The dataset's tensor, then those that the body captures.

  Returns:
    The tensor of the new dataset.
  """
  variant, *captured = tensors
  spec, new_spec = map(graphs.specs_of, types)

  @tf.autograph.experimental.do_not_convert
  def map_element(*parts):
    element = parts if isinstance(spec, tuple) else parts[0]
    here = [tf.identity(tensor) for tensor in captured]
    made = body.emit([*graphs.unpack_as(spec, element), *here])
    return graphs.pack_as(new_spec, iter(made))

  dataset = tf.data.experimental.from_variant(variant, spec).map(map_element)
  return [tf.data.experimental.to_variant(dataset)]


def emit_sequence_reduce(
    body: dataflow.Body, type_spec: tff.Type, num_state: int, tensors: Sequence[tf.Tensor]
) -> Sequence[tf.Tensor]:
  """Adds a `sequence_reduce` to the graph that is being built.

  Args:
    body: Makes a new state of the state and an element.
    type_spec: The type of an element.
    num_state: How many leaves the state has.
    tensors: The dataset's tensor, those of the first state, then those that the body
      captures.

  Returns:
    The tensors of the last state.
  """
  spec = graphs.specs_of(type_spec)
  captured = tensors[1 + num_state :]

  @tf.autograph.experimental.do_not_convert
  def reduce_element(state, element):
    here = [tf.identity(tensor) for tensor in captured]
    return tuple(body.emit([*state, *graphs.unpack_as(spec, element), *here]))

  dataset = tf.data.experimental.from_variant(tensors[0], spec)
  return dataset.reduce(tuple(tensors[1 : 1 + num_state]), reduce_element)
