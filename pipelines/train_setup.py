"""Builds a run and refuses what it cannot be, before anything runs."""

from collections.abc import Iterator, Sequence
import contextlib
import pathlib
from typing import Any, NamedTuple, Optional

from absl import flags
import numpy as np

import pipelines
from pipelines import train_checks
from pipelines import train_data
from pipelines import train_evaluation
from pipelines import train_flags as args
from pipelines import train_folder
from pipelines import train_privacy
from pipelines import train_process
from pipelines import UserError
import tff_kd


@contextlib.contextmanager
def errors_for_users() -> Iterator[None]:
  """Turns refusals of bad settings into one sentence, without a traceback."""
  try:
    yield
  except (ValueError, flags.Error) as error:
    raise UserError(str(error)) from error
  except OSError as error:
    # A full disk does not name the file.
    where = '' if error.filename or error.errno is None else f' ({args.OUTPUT_DIR.value})'
    raise UserError(f'{error}{where}') from error


def runtime() -> contextlib.AbstractContextManager:
  """Returns the runtime that --runtime, --device and --ray_address choose."""
  device = args.DEVICE.value or None
  if args.RAY_ADDRESS.value:
    return _on_ray(device)
  if args.RUNTIME.value == 'tff':
    return tff_kd.runtime.tff_worker()
  return tff_kd.runtime.in_process(device=device)


@contextlib.contextmanager
def _on_ray(device: Optional[list[str]]) -> Iterator[None]:
  """Starts `tff_kd.runtime.ray`; raises errors of the start as user errors."""
  with contextlib.ExitStack() as stack:
    try:
      stack.enter_context(tff_kd.runtime.ray(
          args.RAY_ADDRESS.value,
          args.RAY_WORKERS.value,
          train_checks.ray_resources(),
          device=device,
      ))
    except (
        ConnectionError, ValueError, tff_kd.runtime.NoWorkerError
    ) as error:
      raise UserError(str(error)) from error
    yield


class Setup(NamedTuple):
  """The parts of a run.

  Attributes:
    task: The data.
    clients: The rows of each client's examples.
    process: The process that is trained.
    common: The arguments that FedAvg in the comparison is built with, too.
    participation: Chooses who takes part in a round.
  """

  task: tff_kd.data.Task
  clients: Sequence[np.ndarray]
  process: Any
  common: dict[str, Any]
  participation: tff_kd.simulation.Participation


def prepare(run_dir: Optional[pathlib.Path] = None) -> Setup:
  """Builds the parts of a run, and refuses what can be refused before it runs.

  Args:
    run_dir: The folder of the run that follows, which must go with the flags; `None` if
      none follows.
  """
  algorithm = args.algorithm()
  if args.DEVICE.value:
    _check_device()
  pipelines.say(f'Loading the data of {args.TASK.value}.')
  task = train_data.load_task()
  if tff_kd.own_files.is_own(args.TASK.value):
    train_checks.run()  # Loading the task has set some flags.
  if args.RAY_ADDRESS.value:
    _check_ray()
  if run_dir is not None:
    train_folder.check(run_dir)
    train_folder.check_free(run_dir)
  clients = train_data.split_clients(task)
  batches = train_data.build_batches(task, clients)
  if train_checks.is_private():
    train_privacy.check_disjoint(task)
  participation = train_data.build_participation(batches)
  common = train_process.common_arguments(task, batches)
  common['reporting'] = _reporting(participation)
  pipelines.say(f'Building {algorithm.name}.')
  process = train_process.build_process(algorithm, task, common)
  _check_metric(task, process)
  tff_kd.simulation.check_monitor(
      train_evaluation.monitored(task),
      [
          *tff_kd.simulation.process_metric_names(process),
          *train_evaluation.Evaluation.names(process),
      ],
  )
  if train_checks.is_private():
    train_privacy.check_budget(process)
  return Setup(task, clients, process, common, participation)


def _check_device() -> None:
  try:
    tff_kd.runtime.check_device(args.DEVICE.value)
  except ValueError as error:
    raise UserError(f'--device: {error} Take one of these, or leave it out.') from error


def _check_ray() -> None:
  try:
    tff_kd.runtime.check_ray(
        args.RAY_ADDRESS.value, args.RAY_WORKERS.value, train_checks.ray_resources()
    )
  except ImportError as error:
    raise UserError(str(error)) from error


def _reporting(
    participation: tff_kd.simulation.Participation,
) -> Optional[tff_kd.Reporting]:
  """Returns how late and partial reports are taken; `None` if there are none."""
  if not participation.has_conditions:
    return None
  if args.MIN_REPORTS.value > participation.max_reports:
    raise UserError(
        f'--min_reports is {args.MIN_REPORTS.value}, and a round has '
        f'{participation.max_reports} reports at most: every round would be skipped. '
        'Lower it, or raise --clients_per_round.'
    )
  return tff_kd.Reporting(
      max_delay=args.MAX_DELAY.value,
      staleness_power=args.STALENESS_POWER.value,
      min_reports=args.MIN_REPORTS.value,
  )


def _check_metric(task: tff_kd.data.Task, process: Any) -> None:
  """Refuses a task whose first metric is not one number."""
  names = tff_kd.evaluation.score_names(process.students.first)
  if task.metric not in names:
    raise UserError(
        f'The first metric of {task.name}, {task.metric}, is the one that is reported '
        f'and chosen by, and must be one number; there are {", ".join(names)}. Put '
        "another first in `metrics_fn`, or build it so (F1Score(average='macro'))."
    )
