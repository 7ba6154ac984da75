"""The models that a run has released: its .keras files, as the task defines them."""

import pathlib
from typing import Any, NamedTuple

import keras

from pipelines import train_flags as args
from pipelines import UserError
import tff_kd


class Released(NamedTuple):
  """A model of a run.

  Attributes:
    name: 'student', 'teacher', or of cohorts 'student_0' and so on.
    keras_model: It.
    spec: What it predicts.
    weights: Its `ModelWeights`.
  """

  name: str
  keras_model: keras.Model
  spec: tff_kd.models.ModelSpec
  weights: Any


def load(
    run_dir: pathlib.Path, task: tff_kd.data.Task, must_exist: bool = True
) -> list[Released]:
  """All models in the folder of a run.

  Args:
    run_dir: The folder.
    task: What the run was about.
    must_exist: Whether to refuse a folder without any.

  Raises:
    UserError: If there are none, or a file is damaged.
  """
  paths = sorted(run_dir.glob('*.keras'))
  if not paths and must_exist:
    why = (
        'its clients keep their models, and no model of the server is released'
        if (run_dir / 'results.json').exists()
        else 'a run leaves its models when it is over'
    )
    raise UserError(f'{run_dir} has no model (*.keras): {why}.')
  found = []
  for path in paths:
    builders = task.teachers
    name = args.TEACHER.value
    if path.stem.startswith('student'):
      builders = task.students
      number = path.stem.removeprefix('student').removeprefix('_')
      name = args.STUDENT.value[int(number) if number else 0]
    spec = tff_kd.models.build_model_spec(
        builders[name], input_spec=task.input_spec, loss_fn=task.loss_fn,
        metrics_fn=task.metrics_fn, name=path.stem,
    )
    try:
      model = keras.models.load_model(path, compile=False)
    except (OSError, ValueError) as error:
      raise UserError(
          f'{path} is damaged or not a Keras model: {str(error).splitlines()[0]}'
      ) from error
    found.append(Released(path.stem, model, spec, spec.weights_of(model)))
  return found
