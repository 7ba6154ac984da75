"""The job behind `pipelines.train`: trains, compares, reports."""

from collections.abc import Callable, Mapping
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import pathlib
import re
from typing import Any, Optional

import keras
import tensorflow as tf

import pipelines
from pipelines import run_folders
from pipelines import tables
from pipelines import train_alone
from pipelines import train_checks
from pipelines import train_evaluation
from pipelines import train_flags as args
from pipelines import train_folder
from pipelines import train_privacy
from pipelines import train_process
from pipelines import train_report
from pipelines import train_setup
from pipelines import UserError
import tff_kd
from tff_kd import algorithms
from tff_kd.compat import tff

_CLIENT_BYTES = tff_kd.communication.CLIENT_BYTES


def run() -> None:
  """Trains and reports, or prints the plan of a dry run."""
  with contextlib.ExitStack() as stack:
    with train_setup.errors_for_users():
      run_dir = None if args.DRY_RUN.value else train_folder.named()
      setup = train_setup.prepare(run_dir)
      if run_dir is None:
        train_report.print_plan(setup)
        return
      run_dir = stack.enter_context(train_folder.held(run_dir))
      setup, accountant = _begin(setup, run_dir)
    _run_in(run_dir, setup, accountant)


def _run_in(
    run_dir: pathlib.Path,
    setup: train_setup.Setup,
    accountant: Optional[tff_kd.privacy.PrivacyAccountant],
) -> None:
  """Trains and reports; says how to go on where that ends early."""
  try:
    with train_setup.runtime(), concurrent.futures.ThreadPoolExecutor(1) as pool:
      if accountant is None:  # During the first round, which leaves a core free.
        drawn = pool.submit(train_report.draw_partition, setup, run_dir)
      _train_and_report(setup, accountant, run_dir)
      if accountant is None:
        drawn.result()
  except KeyboardInterrupt as error:
    raise KeyboardInterrupt(
        f'Stopped. To go on: {train_folder.resume_command(run_dir)}'
    ) from error
  except (
      tff_kd.simulation.CheckpointError,
      tff_kd.runtime.NoWorkerError,
  ) as error:
    raise UserError(str(error)) from error
  except tff_kd.simulation.ClientStatesError as error:
    raise UserError(
        f'{error} Nothing that the run has saved is lost. To go on: '
        f'{train_folder.resume_command(run_dir)}'
    ) from error
  # A full disk raises either.
  except (OSError, tf.errors.ResourceExhaustedError) as error:
    reason = str(error).splitlines()[0]
    raise UserError(
        f'The run cannot go on: {reason}. Its last checkpoint in {run_dir} is whole: '
        'make room, or mend what is said here, and start it again: '
        f'{train_folder.resume_command(run_dir)}'
    ) from error


def _begin(
    setup: train_setup.Setup, run_dir: pathlib.Path
) -> tuple[train_setup.Setup, Optional[tff_kd.privacy.PrivacyAccountant]]:
  """Begins the privacy account, if there is one, and says what is run."""
  accountant = None
  if train_checks.is_private():
    setup = setup._replace(
        participation=dataclasses.replace(
            setup.participation, seed=train_privacy.sampling_seed(run_dir)
        )
    )
    accountant = train_privacy.build_accountant(setup.process, run_dir)
  train_report.print_setup(setup, accountant)
  print(f'Run folder: {run_dir}', flush=True)
  return setup, accountant


def _train_and_report(
    setup: train_setup.Setup,
    accountant: Optional[tff_kd.privacy.PrivacyAccountant],
    run_dir: pathlib.Path,
) -> None:
  task, process = setup.task, setup.process
  specs = train_evaluation.specs_of(process)
  # Pre-trained once, when the first process begins with them; the models that clients
  # keep are pre-trained by the clients.
  pretrained = functools.cache(lambda name: train_alone.pretrain(specs[name], task))

  def initial_state(of_process):
    state = of_process.initialize()
    if args.PRETRAIN_EPOCHS.value and of_process.set_model_weights is not None:
      of_students = [pretrained(n) for n in specs if n.startswith('student')]
      state = of_process.set_model_weights(
          state, of_process.students.pack(of_students)
      )
      if of_process.teacher_spec is not None:
        state = of_process.set_teacher_weights(state, pretrained('teacher'))
    return state

  state = initial_state(process)
  evaluation = train_evaluation.Evaluation(process, task, run_dir / 'clients')
  result, history = _train(
      process, state, evaluation, task, setup.participation, run_dir, '',
      args.ROUNDS.value, args.PATIENCE.value or None, train_evaluation.monitored(task),
      accountant,
  )
  train_folder.save_models(
      evaluation.models(result.best_state), specs, run_dir,
      process.description.sends_average,
  )

  baseline = None
  # Not compared by name: a user's file may have a function of the same name.
  is_fed_avg = args.algorithm().build is algorithms.build_fed_avg
  if args.FEDAVG.value and not is_fed_avg and accountant is None:
    baseline = _train_fed_avg(setup, initial_state, result.round_num, history, run_dir)
  # The lower bound: what the server achieves without any client.
  alone = lambda: {}
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    if args.TRANSFER_LABELS.value:
      alone = pool.submit(
          train_alone.all_alone, evaluation.evaluators, specs, task, history
      ).result
    train_report.report(
        train_report.Finished(
            setup=setup, evaluation=evaluation, result=result, history=history,
            baseline=baseline, accountant=accountant, run_dir=run_dir,
        ),
        alone,
    )


def _train_fed_avg(
    setup: train_setup.Setup,
    initial_state: Callable[[Any], Any],
    num_rounds: int,
    history: list[dict[str, float]],
    run_dir: pathlib.Path,
) -> train_report.Baseline:
  """Trains FedAvg of the same student, for as many rounds and as many bytes.

  Args:
    setup: What the run began with.
    initial_state: Maps a process to the state that it begins with.
    num_rounds: The run's rounds.
    history: The run's rows of metrics.csv.
    run_dir: The run's folder.

  Returns:
    Its rows, and the rounds of as many bytes.
  """
  task = setup.task
  keras.utils.set_random_seed(args.SEED.value)
  pipelines.say('Building fed_avg, to compare with.')
  process = algorithms.build_fed_avg(**setup.common)
  moved = int(run_folders.megabytes(history)[-1] * 1e6)
  for_bytes = moved // tff_kd.communication.round_bytes(process).total
  _, rows = _train(
      process, initial_state(process),
      train_evaluation.Evaluation(process, task, run_dir), task, setup.participation,
      run_dir, 'fed_avg_',
      max(num_rounds, min(for_bytes, train_report.most_fed_avg(num_rounds))), None,
      f'validation/student_{task.metric}',
  )
  return train_report.Baseline(rows, for_bytes)


def _train(
    process, initial_state, evaluation, task, select_clients, run_dir, prefix, num_rounds,
    patience, monitor, accountant=None,
) -> tuple[tff_kd.simulation.TrainingResult, list[dict[str, float]]]:
  """Trains with a progress bar; metrics, events and checkpoints in `run_dir`.

  Raises:
    KeyboardInterrupt: If the user ends it; what is whole is saved.
  """
  metrics_path = run_dir / f'{prefix}metrics.csv'
  checkpoints = tff_kd.simulation.Checkpoints(run_dir / f'{prefix}checkpoints')
  if evaluation.client_states is not None and checkpoints.is_empty():
    # A run may have been killed before its first checkpoint.
    evaluation.client_states.rewind(0)
  release_managers = [
      tff.program.CSVFileReleaseManager(metrics_path, key_fieldname='round')
  ]
  if 'tensorboard' in args.TRACKER.value:
    release_managers.append(
        _ModelsTogether(
            run_dir / 'tensorboard' / prefix.rstrip('_'), evaluation.metric_names
        )
    )
  result = tff_kd.simulation.train(
      process,
      initial_state=initial_state,
      select_clients=select_clients,
      num_rounds=num_rounds,
      evaluate=evaluation,
      client_states=evaluation.client_states,
      monitor=monitor,
      monitor_mode='min' if task.is_lower_better(monitor) else 'max',
      patience=patience,
      program_state_manager=checkpoints,
      rounds_per_saving=args.ROUNDS_PER_CHECKPOINT.value,
      accountant=accountant,
      release_managers=release_managers,
      callbacks=[
          *train_process.schedules(), *_trackers(run_dir, prefix)
      ],
      progress_bar=tff_kd.simulation.ProgressBar(
          prefix.rstrip('_') or args.algorithm().name,
          _Summary(task, metrics_path, accountant),
      ),
  )
  if result.interrupted:
    raise KeyboardInterrupt
  return result, run_folders.read_history(metrics_path)


class _Summary:
  """Returns the text after the progress bar: scores, bytes, and the privacy spent."""

  def __init__(
      self, task: tff_kd.data.Task, metrics_path: pathlib.Path,
      accountant: Optional[tff_kd.privacy.PrivacyAccountant],
  ):
    self._task, self._path, self._accountant = task, metrics_path, accountant
    self._moved: Optional[float] = None

  def __call__(self, training: Any, metrics: Mapping[str, float]) -> str:
    del training
    if self._moved is None:  # With the rounds before the run was resumed.
      history = run_folders.read_history(self._path)
      self._moved = sum(row[_CLIENT_BYTES] for row in history)
    else:
      self._moved += metrics[_CLIENT_BYTES]
    metric = self._task.metric
    models = ' '.join(
        f"{name}={metrics[f'test/{name}_{metric}']:.3f}"
        for name in ('student', 'teacher') if f'test/{name}_{metric}' in metrics
    )
    shown = [
        f'test {tables.words(metric)}: {models}', f'MB/client={self._moved / 1e6:.3g}'
    ]
    if self._accountant is not None:
      shown.append(f'epsilon={self._accountant.epsilon():.3g}')
    return ', '.join(shown)


def _trackers(run_dir: pathlib.Path, prefix: str) -> list[tff_kd.simulation.Callback]:
  """Returns the trackers that --tracker names, except TensorBoard."""
  project, name = f'tff_kd {args.TASK.value}', f'{run_dir.name}{prefix and " FedAvg"}'
  settings = {key: flag.value for key, flag in sorted(args.own_flags().items())}
  found = []
  if 'mlflow' in args.TRACKER.value:
    # Where MLflow is set up to, or else in the run's folder.
    store = f'sqlite:///{run_dir.absolute() / "mlflow.db"}'
    is_set_up = 'MLFLOW_TRACKING_URI' in os.environ
    found.append(
        tff_kd.simulation.MLflowTracker(
            experiment=project, run_name=name, params=settings,
            tracking_uri=None if is_set_up else store,
        )
    )
  if 'wandb' in args.TRACKER.value:
    found.append(
        tff_kd.simulation.WandbTracker(
            project=re.sub(r'[/\\#?%: ]', '-', project), name=name, config=settings,
            directory=run_dir,
        )
    )
  return found


class _ModelsTogether(tff.program.ReleaseManager):
  """Writes metrics to TensorBoard so that student and teacher share a chart.

  TensorBoard draws a chart for each tag, and in it a curve for each folder:
  `test/teacher_accuracy` goes as `test/accuracy` to the folder `teacher`, and metrics of
  no model go to `round`.
  """

  def __init__(self, folder: pathlib.Path, names: Mapping[str, tuple[str, str]]):
    self._folder = folder
    self._names = names  # As of `train_evaluation.Evaluation.names`.
    self._managers = {}

  async def release(self, value: Mapping[str, Any], key: int) -> None:
    by_folder = {}
    for name, scalars in value.items():
      folder, tag = self._names.get(name, ('round', name))
      by_folder.setdefault(folder, collections.OrderedDict())[tag] = scalars
    for folder, scalars in by_folder.items():
      if folder not in self._managers:
        self._managers[folder] = tff.program.TensorBoardReleaseManager(
            self._folder / folder
        )
      await self._managers[folder].release(scalars, key)
