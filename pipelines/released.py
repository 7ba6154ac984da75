"""The models that a run has released: its files of weights, as the task defines them.

Models are built as the task says and get their weights from the files, so that classes
of one's own need not be registered with Keras.
"""

from collections.abc import Callable
import operator
import pathlib
from typing import Any, NamedTuple, Optional
import zipfile

import keras
import numpy as np
import tensorflow as tf

from pipelines import run_folders
from pipelines import train_flags as args
from pipelines import UserError
import tff_kd
from tff_kd import internals


class Released(NamedTuple):
  """A model of a run.

  Attributes:
    name: 'student', 'teacher', or of cohorts 'student_0' and so on; of a client's own
      model 'client_NAME'.
    path: The file; `None` for a client's own model.
    keras_model: The Keras model.
    spec: The spec of the model.
    weights: The `ModelWeights`.
  """

  name: str
  path: Optional[pathlib.Path]
  keras_model: keras.Model
  spec: tff_kd.models.ModelSpec
  weights: Any


# The folder of the students that clients were sent, in a run that released others.
SENT = 'sent'
# The suffixes of a whole model, and of the weights of one that Keras cannot serialize.
_WHOLE, _WEIGHTS = '.keras', '.weights.h5'


def predict(model: keras.Model, inputs: Any) -> np.ndarray:
  """Returns a model's outputs, float32 `[n, ...]`.

  Args:
    model: The model.
    inputs: An array `[n, ...]`, or a dict of such.
  """

  def call(batch: Any) -> np.ndarray:
    # `predict` refuses classes whose names begin with an underscore.
    outputs = model(tf.nest.map_structure(tf.constant, batch), training=False)
    # Under a mixed policy, outputs are bfloat16.
    return tf.cast(outputs, tf.float32).numpy()

  return in_batches(call, inputs)


def in_batches(
    call: Callable[[Any], np.ndarray], inputs: Any, batch_size: int = 256
) -> np.ndarray:
  """Returns the outputs of a function that is called with one batch after the other.

  Args:
    call: Maps a batch of inputs to outputs.
    inputs: An array `[n, ...]`, or a dict of such.
    batch_size: The number of examples in a batch; the last one may have fewer.
  """
  size = len(tf.nest.flatten(inputs)[0])
  batches = [slice(start, start + batch_size) for start in range(0, size, batch_size)]
  return np.concatenate([
      call(tf.nest.map_structure(operator.itemgetter(rows), inputs)) for rows in batches
  ])


def save(model: keras.Model, folder: pathlib.Path, name: str) -> None:
  """Saves a model as NAME.keras; what has no configuration, as NAME.weights.h5.

  Args:
    model: The model.
    folder: Where to.
    name: The file's name, without its suffix.
  """
  path = folder / f'{name}{_WHOLE}'
  try:
    model.save(path)
  except NotImplementedError:  # Keras raises it where a class has no `get_config`.
    path.unlink(missing_ok=True)
    model.save_weights(folder / f'{name}{_WEIGHTS}')
    print(
        f'{name}{_WEIGHTS} has the weights only: {type(model).__name__} has no '
        f'`get_config()`, which Keras needs for {name}{_WHOLE}.'
    )


def own_classes(model: keras.Model) -> dict[str, type]:
  """Returns the classes of a model and of its layers that are not Keras's, by name."""
  return {
      type(layer).__name__: type(layer)
      for layer in (model, *internals.all_layers(model))
      if not type(layer).__module__.startswith('keras.')
  }


def _architecture(name: str) -> str:
  """Returns which of the task's models a model of a run is."""
  if not name.startswith('student'):
    return args.TEACHER.value
  number = name.removeprefix('student').removeprefix('_')
  return args.STUDENT.value[int(number or 0)]


def builder(task: tff_kd.data.Task, name: str) -> tff_kd.models.KerasModelFn:
  """Returns the function that builds a model of a run.

  Args:
    task: What the run is about.
    name: The name of the model: 'student', 'student_0' and so on, or 'teacher'.
  """
  models = task.students if name.startswith('student') else task.teachers
  return models[_architecture(name)]


def build_spec(task: tff_kd.data.Task, name: str) -> tff_kd.models.ModelSpec:
  """Returns the spec of a model of a run.

  Args:
    task: What the run is about.
    name: The name of the model, as for `builder`.
  """
  return tff_kd.models.build_model_spec(
      builder(task, name), input_spec=task.input_spec, loss_fn=task.loss_fn,
      metrics_fn=task.metrics_fn, name=name,
  )


def load(
    run_dir: pathlib.Path, task: tff_kd.data.Task, must_exist: bool = True
) -> list[Released]:
  """Loads all models in the folder of a run.

  Args:
    run_dir: The folder.
    task: The task of the run.
    must_exist: Whether to refuse a folder without any.

  Raises:
    UserError: If there are none, or a file is damaged.
  """
  paths = sorted(
      path for suffix in (_WHOLE, _WEIGHTS) for path in run_dir.glob(f'*{suffix}')
  )
  if not paths and must_exist:
    why = (
        'its clients keep their models, and no model of the server is released'
        if (run_dir / run_folders.RESULTS).exists()
        else 'a run leaves its models when it is over'
    )
    raise UserError(f'{run_dir} has no model (*{_WHOLE}, *{_WEIGHTS}): {why}.')
  found = []
  for path in paths:
    name = path.name.removesuffix(_WHOLE).removesuffix(_WEIGHTS)
    spec = build_spec(task, name)
    model = spec.to_keras(spec.initial_weights)
    try:
      model.load_weights(path)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
      raise UserError(
          f'{path} is damaged, or not of the model {_architecture(name)!r} of the task '
          f'{task.name}: {str(error).splitlines()[0]}'
      ) from error
    found.append(Released(name, path, model, spec, spec.weights_of(model)))
  return found
