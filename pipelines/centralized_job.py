"""The job behind `pipelines.centralized`."""

import functools
import pathlib

import keras
import numpy as np

import pipelines
from pipelines import central
from pipelines import released
from pipelines import run_folders
from pipelines import tables
from pipelines import train_checks
from pipelines import train_data
from pipelines import train_flags as args
from pipelines import train_setup
from pipelines import UserError
import tff_kd


def run(
    folder: pathlib.Path, *, epochs: int, learning_rate: float, batch_size: int
) -> None:
  """Trains student and teacher in one place and reports.

  Args:
    folder: Where the results go.
    epochs: The maximum number of passes.
    learning_rate: The learning rate of Adam.
    batch_size: The number of examples in a step.
  """
  with train_setup.errors_for_users():
    task = train_data.load_task()
    examples = _examples(task)
    train_checks.check_models('student', list(task.students))
    train_checks.check_models('teacher', list(task.teachers))
    folder.mkdir(parents=True, exist_ok=True)
  print(
      f'{task.name}: {len(examples)} examples in one place; validation '
      f'{len(task.validation)}, test {len(task.test)}.'
  )
  results, rows = {}, []
  for name in _model_names():
    keras.utils.set_random_seed(args.SEED.value)
    evaluator = tff_kd.evaluation.CentralEvaluator(released.build_spec(task, name))
    training = central.Training(
        evaluator.spec, examples, batch_size=batch_size, seed=args.SEED.value,
        optimizer_fn=lambda: keras.optimizers.Adam(learning_rate),
    )
    model, best = _fit(name, task, evaluator, training, epochs)
    scores = _test_scores(task, evaluator, model)
    released.save(model, folder, name)
    results[name] = {
        'weights': model.count_params(), 'epochs': best,
        **{f'test_{key}': float(value) for key, value in scores.items()},
    }
    rows.append((
        name, f'{model.count_params():,}', str(best),
        *(f'{value:.4f}' for value in scores.values()),
    ))
  content = {
      'metric': task.metric, 'lower_is_better': task.is_lower_better(),
      'models': results,
  }
  run_folders.write_json(folder / 'results.json', content)
  print()
  head = ('model', 'weights', 'epochs', *(f'test {tables.words(key)}' for key in scores))
  tables.print_table([head, *rows])
  print(f'\nOn the test part, after the best epoch by validation. {folder}')


def _examples(task: tff_kd.data.Task) -> tff_kd.data.Examples:
  """Returns the examples of all clients: of those used, where the data have clients."""
  if task.client_rows is None:
    # Any split deals out all of them, and not every split is possible.
    return task.clients
  return task.clients.take(np.concatenate(train_data.split_clients(task)))


def _fit(
    name: str, task: tff_kd.data.Task, evaluator: tff_kd.evaluation.CentralEvaluator,
    training: central.Training, epochs: int,
) -> tuple[keras.Model, int]:
  """Trains a model until validation is not better; returns it with its best epoch."""
  weights, best = central.fit(
      training, evaluator, task, max_epochs=epochs,
      on_look=lambda epoch, score: pipelines.say(
          f'{name}, validation {task.metric}, epoch {epoch}: {score:.4f}'
      ),
  )
  if not best:
    raise UserError(
        f'{name}: the validation {task.metric} is not a number after an epoch. Lower '
        '--central_learning_rate.'
    )
  return evaluator.spec.to_keras(weights), best


def _test_scores(
    task: tff_kd.data.Task, evaluator: tff_kd.evaluation.CentralEvaluator,
    model: keras.Model,
) -> dict[str, float]:
  """Returns a model's scores on the test part, the task's own included."""
  scores = evaluator.evaluate(evaluator.spec.weights_of(model), *task.test)
  if task.scores_fn is not None:
    scores |= task.scores_fn(functools.partial(released.predict, model))
  return scores


def _model_names() -> list[str]:
  """Returns the names of the models, the same as in a run."""
  number = len(args.STUDENT.value)
  students = ['student'] if number == 1 else [f'student_{i}' for i in range(number)]
  return [*students, 'teacher']
