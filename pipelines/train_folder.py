"""The folder of a run: what it must not hold, and what a run leaves in it."""

from collections.abc import Iterator, Mapping
import contextlib
import datetime
import json
import math
import pathlib
import shlex
from typing import Any

import numpy as np
import tensorflow as tf

from pipelines import parallel
from pipelines import released
from pipelines import run_folders
from pipelines import train_checks
from pipelines import train_flags as args
from pipelines import UserError
import tff_kd
from tff_kd.compat import tff


def named() -> pathlib.Path:
  """Returns the folder of the run, as flags name it."""
  if args.OUTPUT_DIR.value:
    return pathlib.Path(args.OUTPUT_DIR.value)
  now = datetime.datetime.now().strftime('%Y%m%d-%H%M%S')
  name = tff_kd.data.task_info(args.TASK.value).name
  return pathlib.Path('runs', f'{now}-{args.algorithm().name}-{name}')


def check(run_dir: pathlib.Path) -> None:
  """Refuses a folder that holds another run than this one, or none to resume."""
  config, path = args.config()['flags'], run_dir / run_folders.CONFIG
  # A run that ended before its first round left nothing to go on with.
  has_rounds = (run_dir / run_folders.METRICS).exists()
  if path.exists() and has_rounds:
    if not args.RESUME.value:
      raise UserError(
          f'{run_dir} already holds a run. Leave out --noresume to go on with it, or '
          'name another --output_dir.'
      )
    before = json.loads(path.read_text())['flags']
    free = set(args.FREE_ON_RESUME)
    if args.NOISE_MULTIPLIER.value is not None:
      free.add('epsilon')  # It is only the budget.
    elif args.EPSILON.value is not None:
      free.discard('rounds')  # The noise was computed for them.
    if train_checks.has_falling_rate():
      free.discard('rounds')  # Rates fall to 0 after the last of them.
    changed = sorted(
        name for name in config if name not in free and config[name] != before.get(name)
    )
    if changed:
      raise UserError(
          f'The run in {run_dir} had other values of '
          + ', '.join(f'--{n} ({before.get(n)!r})' for n in changed)
          + '. Go on with the same, or name another --output_dir.'
      )
  elif train_checks.must_resume():
    raise UserError(f'{run_dir} holds no run to resume (no rounds).')


def check_free(run_dir: pathlib.Path) -> None:
  """Refuses a folder that another run is in, before anything is built for this one."""
  if run_dir.exists():
    with parallel.exclusive_lock(run_dir):
      pass


@contextlib.contextmanager
def held(run_dir: pathlib.Path) -> Iterator[pathlib.Path]:
  """Makes the run folder, or goes on in it, and keeps other runs out of it.

  Args:
    run_dir: As flags name it.

  Yields:
    The folder: a new one where --output_dir names none.

  Raises:
    UserError: If another run is in it, or has been since it was checked.
  """
  if not args.OUTPUT_DIR.value:
    run_dir = _new(run_dir)
  with parallel.exclusive_lock(run_dir):
    check(run_dir)
    versions = {m.__name__: m.__version__ for m in (tf, tff, np)}
    run_folders.write_json(
        run_dir / run_folders.CONFIG, {**args.config(), 'versions': versions}
    )
    # The results of a run that goes on will be others.
    (run_dir / run_folders.RESULTS).unlink(missing_ok=True)
    yield run_dir


def _new(run_dir: pathlib.Path) -> pathlib.Path:
  """Makes a folder that was not there, of this name or with a number behind it."""
  number, made = 1, run_dir
  while True:
    try:
      made.mkdir(parents=True)
      return made
    except FileExistsError:
      number += 1
      made = run_dir.with_name(f'{run_dir.name}-{number}')


def resume_command(run_dir: pathlib.Path) -> str:
  """Returns the command that goes on with a run, whose flags are in the folder."""
  words = [
      'python', '-m', 'pipelines.train', f'--config={run_dir / run_folders.CONFIG}',
      f'--output_dir={run_dir}',
  ]
  return shlex.join(words)


def best_row(
    history: list[dict[str, float]], rounds: int, monitor: str, task: tff_kd.data.Task
) -> dict[str, float]:
  """Returns the row with the best monitored metric within the first rounds."""
  sign = -1.0 if task.is_lower_better(monitor) else 1.0

  def value(row: dict[str, float]) -> float:
    # NaN, of a round that has diverged, is the worst.
    return -math.inf if math.isnan(row[monitor]) else sign * row[monitor]

  return max((row for row in history if row['round'] <= rounds), key=value)


def save_models(
    models: Mapping[str, tuple[Any, Any]],
    specs: Mapping[str, tff_kd.models.ModelSpec],
    run_dir: pathlib.Path,
    sends_average: bool,
) -> None:
  """Saves a run's models, and the students that clients were sent, if others.

  Args:
    models: As `train_evaluation.Evaluation.models` returns them.
    specs: The models that are released, by name.
    run_dir: The run's folder.
    sends_average: Whether clients are sent others.
  """
  for name, (_, weights) in models.items():
    if name in specs:
      released.save(specs[name].to_keras(weights), run_dir, name)
    sent = name.replace('student_before', 'student')
    if name != sent and sends_average:
      # Clients begin with these, which `pipelines.audit` needs to repeat their training.
      (run_dir / released.SENT).mkdir(exist_ok=True)
      released.save(specs[sent].to_keras(weights), run_dir / released.SENT, sent)
