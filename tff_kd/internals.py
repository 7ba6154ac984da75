"""Every use of names that TensorFlow and Keras do not make public, and why.

Those of TensorFlow Federated are in `tff_kd/runtime/tff_internals.py`.
"""

from collections.abc import Callable, Mapping
import contextlib
import types
from typing import Any, Optional

import tensorflow as tf
from tensorflow.python.autograph.pyct import loader

# AutoGraph's status outside of any function; see `convert_with_autograph`.
_AUTOGRAPH_DEFAULT = tf.__internal__.autograph.control_status_ctx()


def eager_mode() -> contextlib.AbstractContextManager[None]:
  """Returns a context in which TensorFlow runs eagerly, also where TFF traces.

  Why: `tf.init_scope` stays in TFF's graph. Replacement: none is public.
  """
  return tf.__internal__.eager_context.eager_mode()


def convert_with_autograph(fn: Callable[..., Any]) -> Callable[..., Any]:
  """Returns a function as AutoGraph converts it, whatever the caller's status is.

  Why: `tf.autograph.to_graph` converts no callable objects and warns where it cannot
  convert. Replacement: none is public.

  Args:
    fn: A function, or a bound method.
  """
  return tf.__internal__.autograph.tf_convert(fn, _AUTOGRAPH_DEFAULT)


def write_autograph_files_with(named_file: Callable[..., Any]) -> None:
  """Makes AutoGraph write the code that it generates to files of ours.

  Why: it writes into the temporary folder, where the files stay if the process is
  killed. Replacement: none; there is no option for the folder.

  Args:
    named_file: Takes the arguments of `tempfile.NamedTemporaryFile`.
  """
  loader.tempfile = types.SimpleNamespace(NamedTemporaryFile=named_file)


def functions_of(graph: tf.Graph) -> Mapping[str, Any]:
  """Returns the functions that a graph calls, by name.

  Why: an error may name an operation of one of them. Replacement: none is public.

  Args:
    graph: The graph.
  """
  return getattr(graph, '_functions', {})


def learning_rate_of(optimizer: Any) -> Optional[Any]:
  """Returns an optimizer's learning rate, a variable or a schedule.

  Why: `Optimizer.learning_rate` gives the schedule's value of this step. Replacement:
  none is public.

  Args:
    optimizer: A Keras optimizer.

  Returns:
    The variable or the schedule; `None` if it has neither.
  """
  return getattr(optimizer, '_learning_rate', None)


def keras_mask(outputs: Any) -> Optional[tf.Tensor]:
  """Returns the mask that layers left on a tensor (`mask_zero`, `Masking`).

  Why: Keras's losses look for it, and a tensor that is made of another one has none.
  Replacement: none is public.

  Args:
    outputs: A tensor.

  Returns:
    A bool tensor of leading axes of the outputs, true where they count; `None` if there
    is none.
  """
  return getattr(outputs, '_keras_mask', None)


def set_keras_mask(outputs: Any, mask: Optional[tf.Tensor]) -> None:
  """Leaves a mask on a tensor, as layers do; see `keras_mask`.

  Args:
    outputs: The tensor.
    mask: The mask, or `None`.
  """
  # pylint: disable-next=protected-access
  outputs._keras_mask = mask


def optimizer_bases() -> tuple[type, type]:
  """Returns the base of optimizers of all backends, and the layer of the backend.

  Why: Keras's optimizers have no `stateless_apply` with TensorFlow, because of that
  layer. Replacement: `keras.optimizers.Optimizer.stateless_apply`, once it takes
  TensorFlow.
  """
  import keras  # Here, as `tff_kd.compat` has to check its backend first.

  bases = keras.optimizers.Optimizer.__mro__
  (base,) = (c for c in bases if c.__name__ == 'BaseOptimizer')
  return base, bases[1]


def direction_of(metric: Any) -> Optional[str]:
  """Returns whether a metric is better 'up' or 'down', if it says so.

  Why: Keras's own metrics say it there only. Replacement: none is public.

  Args:
    metric: A Keras metric.
  """
  return getattr(metric, '_direction', None)


def inputs_structure(model: Any) -> Any:
  """Returns the structure of inputs that a functional model was made of.

  Why: Keras sorts the names of a dict and keeps the order of an `OrderedDict`, and
  `Model.inputs` does not tell which of them it was. Replacement: none is public.

  Args:
    model: A `keras.Model`.

  Returns:
    The structure of `keras.KerasTensor`s; `None` if the model is not functional.
  """
  return getattr(model, '_inputs_struct', None)


def all_layers(model: Any) -> list[Any]:
  """Returns the layers of a model, also those within other layers.

  Why: `Model.layers` has the outer ones only. Replacement: none is public.

  Args:
    model: A `keras.Model`.
  """
  # pylint: disable-next=protected-access
  return list(model._flatten_layers(include_self=False))
