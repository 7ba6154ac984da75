"""Every use of names that TensorFlow Federated 0.87 does not make public, and why.

TFF 0.87 is the last release on PyPI. Its successor (TFF's main branch, unreleased, with
`federated_language`) has most of these under public names; each function says which. The
names are looked up when they are used, and `check_version` gives a clear error first.
"""

from collections.abc import Iterator, Sequence
from concurrent import futures
import contextlib
import functools
import inspect
import signal
import subprocess
import tempfile
from typing import Any, Optional
from unittest import mock

import tensorflow as tf

from tff_kd.compat import tff

_VERSION = '0.87.0'


def check_version() -> None:
  """Raises an error if TFF is not the release that this module is written for.

  Raises:
    ImportError: If it is another one.
  """
  if tff.__version__ != _VERSION:
    raise ImportError(
        f'tff_kd.runtime uses names of TensorFlow Federated {_VERSION} that are not '
        f'public, found version {tff.__version__}. Install '
        f'tensorflow-federated=={_VERSION}, or adapt tff_kd/runtime/tff_internals.py.'
    )


def num_clients(arg: Any, type_spec: Optional[tff.Type]) -> int:
  """Returns how many clients an argument has values for.

  Why: it has to raise the same errors as TFF's own context. Replacement:
  `federated_language.framework.infer_cardinalities`.

  Args:
    arg: The argument of a computation.
    type_spec: The type of the computation's parameter.

  Returns:
    The number, 0 if no part of the argument is placed at the clients.

  Raises:
    TypeError: If a value at the clients is not a list.
    ValueError: If parts differ in the number of clients.
  """
  if arg is None:
    return 0
  from tensorflow_federated.python.core.impl.executors import cardinalities_utils

  cardinalities = cardinalities_utils.infer_cardinalities(arg, type_spec)
  return cardinalities.get(tff.CLIENTS, 0)


def check_array(value: Any, type_spec: tff.TensorType) -> None:
  """Raises an error if TFF would not take a value as a tensor of a type.

  Why: TFF takes Python's numbers, and NumPy's of the same kind that are no larger.
  Replacement: `federated_language.array_is_compatible_dtype` and `..._shape`.

  Args:
    value: A number, a string or a NumPy array.
    type_spec: The type.

  Raises:
    TypeError: If the dtype or the shape does not fit.
  """
  from tensorflow_federated.python.core.impl.compiler import array

  if not array.is_compatible_shape(value, type_spec.shape):
    raise TypeError(
        f'Failed to serialize a value with shape {getattr(value, "shape", ())} to shape '
        f'{type_spec.shape}.'
    )
  if not array.is_compatible_dtype(value, type_spec.dtype.type):
    dtype = getattr(value, 'dtype', None)
    raise TypeError(
        f'Failed to serialize a value of dtype {dtype.type if dtype else type(value)} to '
        f'dtype {type_spec.dtype.type}.'
    )


def dataset_of_elements(elements: list[Any], type_spec: tff.Type) -> tf.data.Dataset:
  """Makes a dataset of a list, as TFF does with a list that stands for a sequence.

  Why: the rules are TFF's. Replacement: `tff.tensorflow.make_data_set_from_elements`.

  Args:
    elements: The elements.
    type_spec: The type of an element.

  Returns:
    The dataset.

  Raises:
    TypeError: If an element has another type.
  """
  from tensorflow_federated.python.core.impl.utils import tensorflow_utils

  return tensorflow_utils.make_data_set_from_elements(None, elements, type_spec)


def check_dataset_containers(type_spec: tff.Type) -> None:
  """Raises an error if the order of a dataset's tensors is not that of the type's names.

  Why: TFF and `tf.nest` order names differently; TFF refuses what is ambiguous.
  Replacement: none is public; it stays a private function of `tff.tensorflow`.

  Args:
    type_spec: The type of an element.

  Raises:
    ValueError: If the order is ambiguous.
  """
  from tensorflow_federated.python.core.impl.executors import value_serialization

  # pylint: disable=protected-access
  value_serialization._check_container_compat_with_tf_nest(type_spec)
  # pylint: enable=protected-access


def computation_of_graph(
    graph_def: tf.compat.v1.GraphDef,
    parameter_type: Optional[tff.Type],
    input_names: Sequence[str],
    result_type: tff.Type,
    output_names: Sequence[str],
) -> tff.Computation:
  """Makes a computation of a finished TensorFlow graph.

  Why: `tff.tensorflow.computation` takes a Python function, which it traces into a graph
  of its own: of a graph that is there, this makes each operation a second time.
  Replacement: `federated_language.framework.ConcreteComputation` of
  `federated_language.TensorFlow`; the messages and types are public there.

  Args:
    graph_def: The graph; a placeholder for TFF's session token is added.
    parameter_type: The type of the parameter; `None` without one.
    input_names: The names of the tensors of the parameter's leaves.
    result_type: The type of the result.
    output_names: The names of the tensors of the result's leaves.

  Returns:
    The computation, whose type has the Python containers of the two types.
  """
  from tensorflow_federated.proto.v0 import computation_pb2 as pb
  from tensorflow_federated.python.core.impl.types import type_serialization

  token = graph_def.node.add(name='session_token_tensor', op='Placeholder')
  token.attr['dtype'].type = tf.string.as_datatype_enum
  token.attr['shape'].shape.SetInParent()
  body = pb.TensorFlow(
      result=_binding(result_type, iter(output_names)),
      session_token_tensor_name=f'{token.name}:0',
  )
  if parameter_type is not None:
    body.parameter.CopyFrom(_binding(parameter_type, iter(input_names)))
  # Equal graphs have equal bytes.
  body.graph_def.Pack(graph_def, deterministic=True)
  type_signature = tff.FunctionType(parameter_type, result_type)
  return tff.framework.ConcreteComputation(
      computation_proto=pb.Computation(
          type=type_serialization.serialize_type(type_signature), tensorflow=body
      ),
      context_stack=tff.framework.get_context_stack(),
      annotated_type=type_signature,
  )


def _binding(type_spec: tff.Type, names: Iterator[str]) -> Any:
  """Returns the binding of a type, whose leaves take one name after the other."""
  from tensorflow_federated.proto.v0 import computation_pb2 as pb

  binding = pb.TensorFlow.Binding
  if isinstance(type_spec, tff.StructType):
    parts = [_binding(element, names) for element in type_spec]
    return binding(struct=pb.TensorFlow.StructBinding(element=parts))
  if isinstance(type_spec, tff.SequenceType):
    return binding(
        sequence=pb.TensorFlow.SequenceBinding(variant_tensor_name=next(names))
    )
  return binding(tensor=pb.TensorFlow.TensorBinding(tensor_name=next(names)))


def intrinsic_calls(computation: tff.Computation) -> list[tuple[str, tff.Type]]:
  """Returns the calls of intrinsics in a computation.

  Why: the sizes of what clients hand over are the types of these arguments. Replacement:
  `federated_language.framework`, which has the building blocks and their visitors.

  Args:
    computation: Any computation.

  Returns:
    The intrinsic's URI, such as 'federated_sum', and the type of its argument, of each
    call.
  """
  from tensorflow_federated.python.core.impl.compiler import building_blocks
  from tensorflow_federated.python.core.impl.compiler import tree_analysis

  found = []

  def visit(block):
    if isinstance(block, building_blocks.Call) and isinstance(
        block.function, building_blocks.Intrinsic
    ):
      found.append((block.function.uri, block.argument.type_signature))

  tree_analysis.visit_preorder(computation.to_building_block(), visit)
  return found


def set_default_context(context: Any) -> None:
  """Sets TFF's default context, in this thread and in all that have set none.

  Why: TFF's stack of contexts is one a thread. A thread that has set none finds an object
  there, the same in all threads, that only raises an error; it is made to pass on what
  it is asked. Replacement: none.

  Args:
    context: The context.
  """
  tff.framework.set_default_context(context)
  _context_of_new_threads().invoke = context.invoke


@contextlib.contextmanager
def default_context(context: Any) -> Iterator[None]:
  """Sets TFF's default context while the block lasts.

  Why: `get_context_stack().current` is the innermost context, not the default one below
  all others. Replacement: none.

  Args:
    context: The context.
  """
  # pylint: disable=protected-access
  before = tff.framework.get_context_stack()._stack[0]
  # pylint: enable=protected-access
  with mock.patch.object(_context_of_new_threads(), 'invoke', context.invoke):
    tff.framework.set_default_context(context)
    try:
      yield
    finally:
      tff.framework.set_default_context(before)


@functools.cache
def _context_of_new_threads() -> Any:
  with futures.ThreadPoolExecutor(1) as pool:
    return pool.submit(lambda: tff.framework.get_context_stack().current).result()


@contextlib.contextmanager
def worker_factory() -> Iterator[tff.framework.ExecutorFactory]:
  """Starts the worker that TFF ships, and ends it when the block ends.

  Why: TFF's factory starts the worker at the first call, with the script's own output,
  and ends it when the factory is collected, which may be never. Replacement: none.

  Yields:
    What makes executors on the worker.
  """
  factory = tff.framework.local_cpp_executor_factory()
  # pylint: disable=protected-access
  stack_fn = inspect.getclosurevars(factory._executor_stack_fn).nonlocals
  manager = stack_fn['service_manager']
  # pylint: enable=protected-access
  with tempfile.TemporaryFile('w') as log:
    try:
      # TFF gives these to the process that it starts.
      with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        manager.get_stub()
      yield factory
    finally:
      process: Optional[subprocess.Popen] = manager._process
      manager._process = manager._stub = None
      if process is not None:
        process.send_signal(signal.SIGINT)
        try:
          process.wait(5.0)
        except subprocess.TimeoutExpired:
          process.kill()
          process.wait()


def end_thread(context: tff.framework.SyncExecutionContext) -> None:
  """Ends the thread of one of TFF's synchronous contexts, in which nothing runs.

  Why: TFF means to end it when the context is collected, which it never is, as the
  running thread refers to it. Replacement: none.

  Args:
    context: The context.
  """
  # pylint: disable=protected-access
  loop = context._async_runner._event_loop
  loop.call_soon_threadsafe(loop.stop)
  context._async_runner._thread.join()
  # pylint: enable=protected-access
