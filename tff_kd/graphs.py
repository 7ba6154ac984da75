"""TensorFlow computations that are traced as TensorFlow 2, then handed to TFF as graphs.

The graph in which `tff.tensorflow.computation` traces is one of TensorFlow 1: there
`a == b` compares the identities of two tensors, `if` on a tensor takes a branch by that,
and what was made eagerly before (constants, Keras models) cannot be used. `computation`
therefore traces a function eagerly, once, as `tf.function` does, and makes a TFF
computation of its finished graph: users' models, losses, metrics and schedules mean what
they mean in Keras.

AutoGraph, which would parse and rewrite every function that it meets, is off: this
package uses `tf.cond` and `tf.while_loop`. What users pass as plain functions is called
through `user_function`, where it is on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import collections
import inspect
import re
import traceback
from typing import Any, Optional

import tensorflow as tf

from tff_kd import internals
from tff_kd import temporary
from tff_kd.compat import tff

# In the system's temporary folder they would stay if the process is killed.
internals.write_autograph_files_with(temporary.named_file)
# The graphs traced last, whose operations know where they were created.
_GRAPHS = collections.deque(maxlen=200)
# How many places are shown, if several made nodes of one name.
_MAX_PLACES = 3
_LIBRARIES = re.compile(r'/(tensorflow|keras|tensorflow_federated)/')
_NODE = re.compile(r'\{\{(?:function_node [^}]*?\}\} ?\{\{)?node ([^}]+?)\}\}')


def function(fn: Callable[..., Any]) -> Any:
  """Returns a `tf.function` without AutoGraph, which would read this package's code."""

  return tf.function(fn, autograph=False)


def user_function(fn: Callable[..., Any]) -> Callable[..., Any]:
  """Returns a user's function to be traced with AutoGraph.

  Args:
    fn: A function, or a bound method. One of this package is returned as it is.
  """
  if getattr(fn, '__module__', None) and fn.__module__.startswith(f'{__package__}.'):
    return fn
  return internals.convert_with_autograph(fn)


def wide_dtype(dtype: tf.DType) -> tf.DType:
  """Returns the dtype in which numbers are summed: float32 for floats of 16 bits."""
  return tf.float32 if dtype.is_floating and dtype.size < 4 else dtype


def where(condition: tf.Tensor, chosen: Any, otherwise: Any) -> Any:
  """Returns one of two structures of tensors, as `tf.where` does of two tensors."""
  return tf.nest.map_structure(
      lambda a, b: tf.where(condition, a, b), chosen, otherwise
  )


def all_finite(values: Any) -> tf.Tensor:
  """Returns whether the sums of all tensors are finite.

  Args:
    values: Tensors in any structure; those of integers and `None` are passed over.

  Returns:
    A bool scalar.
  """
  # One sum for each tensor: this is in the graph of every client and of the server.
  axes, sums = {}, {}
  for value in tf.nest.flatten(values):
    if value is None or not value.dtype.is_floating:
      continue
    value = tf.cast(value, wide_dtype(value.dtype))
    rank = value.shape.rank
    if rank not in axes:
      axes[rank] = None if rank is None else tf.constant([*range(rank)], tf.int32)
    sums.setdefault(value.dtype, []).append(tf.reduce_sum(value, axes[rank]))
  return tf.reduce_all([tf.math.is_finite(tf.add_n(each)) for each in sums.values()])


def specs_of(type_spec: tff.Type) -> Any:
  """Returns the structure of `tf.TypeSpec`s of a TFF type, in its Python containers.

  Args:
    type_spec: A type without placements and functions.

  Returns:
    Tensors as `tf.TensorSpec`, sequences as `tf.data.DatasetSpec`, structures as the
    NamedTuple, dict, list or tuple that they came from.
  """
  if isinstance(type_spec, tff.TensorType):
    return tf.TensorSpec(type_spec.shape, type_spec.dtype)
  if isinstance(type_spec, tff.SequenceType):
    return tf.data.DatasetSpec(specs_of(type_spec.element))
  if not isinstance(type_spec, tff.StructType):
    raise TypeError(f'A TensorFlow computation cannot take {type_spec}.')
  return _pack(type_spec, [specs_of(element) for element in type_spec])


def _pack(type_spec: tff.StructType, values: Sequence[Any]) -> Any:
  """Returns values of a structure's elements in the Python container of its type."""
  names = [name for name, _ in tff.structure.iter_elements(type_spec)]
  container = getattr(type_spec, 'python_container', None)
  if all(name is None for name in names):
    return list(values) if container is list else tuple(values)
  named = collections.OrderedDict(zip(names, values, strict=True))
  if container is None or issubclass(container, Mapping):
    return named
  return container(**named)


def _elements(value: Any) -> Optional[list[Any]]:
  """Returns the elements of a structure in their order; `None` for a leaf."""
  if isinstance(value, Mapping):
    return list(value.values())
  if isinstance(value, (tff.structure.Struct, tuple, list)):
    return list(value)
  if hasattr(type(value), '__attrs_attrs__'):
    return [getattr(value, attribute.name) for attribute in type(value).__attrs_attrs__]
  return None


def _unpack(value: Any) -> list[Any]:
  """Returns the leaves of a structure in the order of its elements, as TFF does.

  `tf.nest.flatten` sorts the keys of a mapping.
  """
  elements = _elements(value)
  if elements is None:
    return [value]
  return [leaf for element in elements for leaf in _unpack(element)]


def unpack_as(spec: Any, value: Any) -> list[Any]:
  """Returns the leaves of a value in the order of a spec; mappings are read by key.

  Args:
    spec: A structure of `tf.TypeSpec`s.
    value: A value of the same structure.

  Raises:
    TypeError: If the value has a leaf where the spec has a structure.
    ValueError: If a mapping has other keys.
  """
  if isinstance(spec, tf.TypeSpec):
    return [value]
  elements = _elements(value)
  if isinstance(spec, Mapping) and isinstance(value, Mapping):
    if set(spec) != set(value):
      raise ValueError(
          f'A mapping must have the keys {list(spec)}, found {list(value)}.'
      )
    elements = [value[name] for name in spec]
  if elements is None:
    raise TypeError(f'An argument must be like {spec}, found {value!r}.')
  parts = zip(_elements(spec), elements, strict=True)
  return [leaf for part, element in parts for leaf in unpack_as(part, element)]


def pack_as(spec: Any, leaves: Iterator[Any]) -> Any:
  """Returns leaves in the structure of a spec; the reverse of `unpack_as`.

  Args:
    spec: A structure of `tf.TypeSpec`s.
    leaves: The leaves in the order of the spec.
  """
  if isinstance(spec, tf.TypeSpec):
    return next(leaves)
  parts = [pack_as(element, leaves) for element in _elements(spec)]
  if isinstance(spec, Mapping):
    return collections.OrderedDict(zip(spec, parts))
  if hasattr(type(spec), '__attrs_attrs__') or hasattr(spec, '_fields'):
    return type(spec)(*parts)
  return parts if isinstance(spec, list) else tuple(parts)


class TracedFunction:
  """A function that has been traced eagerly, to be called in any graph.

  Attributes:
    output: The structure of what the function returned, of `tf.TensorSpec`s.
  """

  def __init__(self, fn: Callable[..., Any], specs: Sequence[Any]):
    """Traces a function.

    Args:
      fn: Takes the arguments that `specs` describe, returns a structure of tensors.
      specs: One structure of `tf.TypeSpec`s an argument.

    Raises:
      ValueError: If the function reads a variable that is not among its arguments.
    """
    self._specs = list(specs)
    structure = None

    def flat_fn(*leaves):
      nonlocal structure
      structure = fn(*pack_as(self._specs, iter(leaves)))
      return [tf.convert_to_tensor(leaf) for leaf in tf.nest.flatten(structure)]

    # Out of TFF's graph, where `tf.init_scope` would stay.
    with internals.eager_mode():
      self._traced = function(flat_fn).get_concrete_function(*_unpack(self._specs))
      constants = self._constants(fn)
    self.output = tf.nest.pack_sequence_as(
        structure, [tf.TensorSpec(t.shape, t.dtype) for t in self._traced.outputs]
    )
    self._inputs = [t for t in self._traced.inputs if t.name not in constants]
    self._graph_def = self._traced.graph.as_graph_def()
    for node in self._graph_def.node:
      if f'{node.name}:0' in constants:
        value, dtype = constants[f'{node.name}:0'], node.attr['dtype'].type
        node.CopyFrom(_constant(node.name, value, dtype))
    _GRAPHS.append(self._traced.graph)

  def _constants(self, fn) -> dict[str, Any]:
    """Returns the values that the function captures, by placeholder."""
    constants = {}
    for value, placeholder in self._traced.graph.captures:
      if value.dtype in (tf.resource, tf.variant):
        raise ValueError(
            'A model, loss, metric or term uses something that Keras does not track, '
            f'such as a `tf.Variable`, a table or a generator: {value!r} (in '
            f'{getattr(fn, "__qualname__", fn)}). Keep the state of layers, losses and '
            'metrics in `keras.Variable`s (`self.add_weight`), and random states in a '
            '`keras.random.SeedGenerator`; apply layers with a table, such as '
            '`TextVectorization`, to the examples before.'
        )
      constants[placeholder.name] = value.numpy()
    return constants

  def __call__(self, *args: Any) -> Any:
    """Returns the function's result, in the graph (or eager context) of the call."""
    leaves = self._leaves(args)
    if tf.executing_eagerly():
      results = self._traced(*leaves)
    else:
      results = self._place(leaves)
    return tf.nest.pack_sequence_as(self.output, results)

  def call_op(self, *args: Any) -> Any:
    """Calls the function as one op, which a gradient tape of the caller records.

    What is imported into a graph is recorded on no tape.
    """
    leaves = self._leaves(args)
    with internals.eager_mode():
      called = tf.compat.v1.wrap_function(
          lambda *tensors: self._place(tensors),
          [tf.TensorSpec(leaf.shape, leaf.dtype) for leaf in leaves],
      )
    return tf.nest.pack_sequence_as(self.output, called(*leaves))

  def to_computation(self, parameter_type: Optional[tff.Type]) -> tff.Computation:
    """Makes a TFF computation of the traced graph, without tracing or importing it again.

    Args:
      parameter_type: The type of the computation's parameter, whose leaves are those of
        the function's arguments; `None` if it takes none.

    Returns:
      The `tff.Computation`.
    """
    # Here and not above: `tff_kd.runtime` uses this module.
    from tff_kd.runtime import tff_internals

    graph_def = tf.compat.v1.GraphDef()
    graph_def.CopyFrom(self._graph_def)
    outputs = [t.name for t in self._traced.outputs]
    return tff_internals.computation_of_graph(
        graph_def,
        parameter_type,
        [t.name for t in self._inputs],
        tff.types.tensorflow_to_type(self.output),
        _unpack(tf.nest.pack_sequence_as(self.output, outputs)),
    )

  def _leaves(self, args: Sequence[Any]) -> list[Any]:
    """Returns the tensors of the arguments' leaves."""
    return [
        _as_tensor(leaf)
        for spec, arg in zip(self._specs, args, strict=True)
        for leaf in unpack_as(spec, arg)
    ]

  def _place(self, leaves: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    # Results come after assertions: traced outputs have these as control inputs.
    results = tf.graph_util.import_graph_def(
        self._graph_def,
        input_map={t.name: leaf for t, leaf in zip(self._inputs, leaves, strict=True)},
        return_elements=[t.name for t in self._traced.outputs],
        name='',
    )
    for result, traced in zip(results, self._traced.outputs):
      result.set_shape(traced.shape)
    return results


def _constant(name: str, value: Any, dtype: int) -> Any:
  """Returns a `Const` node."""
  node = tf.compat.v1.NodeDef(name=name, op='Const')
  node.attr['dtype'].type = dtype
  node.attr['value'].tensor.CopyFrom(tf.make_tensor_proto(value, dtype))
  return node


def _as_tensor(leaf: Any) -> Any:
  if isinstance(leaf, tf.data.Dataset):
    return tf.data.experimental.to_variant(leaf) if not tf.executing_eagerly() else leaf
  return tf.convert_to_tensor(leaf)


def placed(fn: Callable[..., Any]) -> Callable[..., Any]:
  """Returns a function that is traced eagerly for the arguments of each call.

  It is for functions that TFF calls in graphs: finalizers of metrics, parts of models.
  """

  def call(*args):
    if tf.compat.v1.executing_eagerly_outside_functions():
      return fn(*args)
    specs = [
        tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), arg)
        for arg in args
    ]
    return TracedFunction(fn, specs).call_op(*args)

  return call


def computation(*types: Any) -> Callable[[Callable[..., Any]], tff.Computation]:
  """Builds a `tff.tensorflow.computation` that is traced as TensorFlow 2, and once.

  Args:
    *types: The types of the function's arguments, or what `tff.to_type` takes.

  Returns:
    A decorator of a function from tensors, in the Python containers of the types, to a
    structure of tensors.
  """
  type_specs = [tff.to_type(type_spec) for type_spec in types]

  def decorator(fn: Callable[..., Any]) -> tff.Computation:
    traced = TracedFunction(fn, [specs_of(type_spec) for type_spec in type_specs])
    parameter_type = type_specs[0] if len(type_specs) == 1 else None
    if len(type_specs) > 1:
      # As TFF does, parameters are named after those of the function.
      names = list(inspect.signature(fn).parameters)[: len(type_specs)]
      parameter_type = tff.types.StructWithPythonType(
          list(zip(names, type_specs, strict=True)), collections.OrderedDict
      )
    return traced.to_computation(parameter_type)

  return decorator


def user_traceback(message: str) -> Optional[str]:
  """Returns the traceback of the code that made the node which a TensorFlow error names.

  Args:
    message: The error's message.

  Returns:
    The frames of the Python traceback outside of TensorFlow, Keras and TFF, the latest
    last, as `traceback` prints them, or the latest few of such tracebacks if several
    computations have a node of that name; `None` if the node is not known.
  """
  for name in _NODE.findall(message):
    places = _places_of(name.split('}}')[0].strip())
    if places:
      return 'or here:\n'.join(places[:_MAX_PLACES])
  return None


def _places_of(name: str) -> list[str]:
  """Returns where the operations of a name were made, the latest first."""
  while name:
    places = {}
    for graph in reversed(_GRAPHS):
      for op in _operations(graph, name):
        frames = [
            traceback.FrameSummary(frame.filename, frame.lineno, frame.name)
            for frame in op.traceback
            if not _LIBRARIES.search(frame.filename.replace('\\', '/'))
        ]
        places[''.join(traceback.format_list(frames))] = None
    if places:
      return list(places)
    name = name.partition('/')[2]  # Inlining prepends the names of calls.
  return []


def _operations(graph: tf.Graph, name: str) -> Iterator[tf.Operation]:
  """Yields the operations of a name in a graph and in its functions."""
  try:
    yield graph.get_operation_by_name(name)
  except KeyError:
    pass
  for inner in internals.functions_of(graph).values():
    if getattr(inner, 'graph', None) is not None:
      yield from _operations(inner.graph, name)
