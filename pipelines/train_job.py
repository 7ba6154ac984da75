"""The job behind `pipelines.train`: trains, compares, reports."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import collections
import concurrent.futures
import contextlib
import csv
import dataclasses
import datetime
import functools
import json
import math
import os
import pathlib
import re
import shlex
import sys
from typing import Any, NamedTuple, Optional

from absl import flags

import keras
import numpy as np
import tensorflow as tf
from tff_kd.compat import tff
import tqdm

from pipelines import central
from pipelines import released
from pipelines import tables
from pipelines import task_defaults
from pipelines import train_checks
from pipelines import train_flags as args
from pipelines import train_privacy
from pipelines import train_process
from pipelines import UserError
import tff_kd
from tff_kd import algorithms
from tff_kd.models import cohorts

_CLIENT_BYTES = tff_kd.communication.CLIENT_BYTES
# Written when a run is over.
RESULTS = 'results.json'
# Of training on the server's labels: examples a step. And of what they give alone: steps
# and epochs at most, steps at least between looks at the validation score, and looks
# without a better one.
_CENTRAL_BATCH = 32
_ALONE_STEPS, _ALONE_LEAST_STEPS, _ALONE_EPOCHS = 1500, 100, 100
_ALONE_LOOK = 50
_ALONE_PATIENCE = 10
# FedAvg, to compare with, gets so many times the rounds at most: where predictions are
# large, the same bytes would be a hundred times the rounds.
_MOST_FED_AVG = 3


# These look at no labels.
_PARTITIONS_BY_SIZE = ('iid', 'quantity_skew')


def load_task() -> tff_kd.data.Task:
  """The task, checked against the flags that depend on its data."""
  info = tff_kd.data.task_info(args.TASK.value)
  kwargs = {'data_dir': args.DATA_DIR.value} if 'data_dir' in info.options else {}
  task = info.load(
      seed=args.SEED.value,
      transfer_size=args.TRANSFER_SIZE.value,
      validation_size=args.VALIDATION_SIZE.value,
      **kwargs,
  )
  if not isinstance(task, tff_kd.data.Task):
    raise UserError(
        f'--task={args.TASK.value}: its load must return a tff_kd.data.Task, found '
        f'{type(task).__name__}.'
    )
  if info.path is not None:
    _apply_task_defaults(task)
  if task.num_labelled is not None and args.TRANSFER_LABELS.value > task.num_labelled:
    if flags.FLAGS['transfer_labels'].present:
      raise UserError(
          f'--transfer_labels is {args.TRANSFER_LABELS.value}, but only '
          f'{task.num_labelled} of the transfer examples of {task.name} have labels. '
          'Lower it, or raise --transfer_size.'
      )
    flags.FLAGS['transfer_labels'].value = task.num_labelled
  return task


def _apply_task_defaults(task: tff_kd.data.Task) -> None:
  """Sets flags that were not given to the defaults of the user's task."""
  algorithm = args.algorithm()
  defaults: dict[str, Any] = {}
  train_checks.check_partition(task.client_rows is not None)
  if task.client_rows is not None:
    count = len(task.client_rows)
    defaults = {
        'num_clients': count,
        'clients_per_round': min(count, args.CLIENTS_PER_ROUND.value),
    }
  elif task.class_numbers(task.clients) is None:
    defaults = {'partition': 'iid'}
  defaults |= {
      'student': [next(iter(task.students))], 'teacher': next(iter(task.teachers)),
      'mentor': next(iter(task.teachers)),
      'transfer_size': len(task.transfer),
      'transfer_labels': min(args.TRANSFER_LABELS.value, len(task.transfer)),
  }
  given = task_defaults.defaults_of(args.TASK.value, args.ALGORITHM.value)
  for name, value in defaults.items():
    if not flags.FLAGS[name].present and name not in given:
      flags.FLAGS[name].value = value
  for flag, known in (
      ('student', task.students), ('teacher', task.teachers), ('mentor', task.teachers)
  ):
    if args.is_taken(algorithm, flag):
      train_checks.check_models(flag, list(known))


def split_clients(task: tff_kd.data.Task) -> Sequence[np.ndarray]:
  """The rows of each client's examples."""
  if task.client_rows is not None:
    return [task.client_rows[k] for k in _clients_used(task)]
  kwargs: dict[str, Any] = {'seed': args.SEED.value}
  if args.PARTITION.value in ('dirichlet', 'quantity_skew'):
    kwargs['alpha'] = args.ALPHA.value
  if args.PARTITION.value == 'shards':
    kwargs['shards_per_client'] = args.SHARDS.value
  classes = task.class_numbers(task.clients)
  if classes is None:
    if args.PARTITION.value not in _PARTITIONS_BY_SIZE:
      raise UserError(
          f'--partition={args.PARTITION.value} splits by class, and an example of '
          f'{task.name} has several labels, or numbers. Choose of '
          f'{", ".join(_PARTITIONS_BY_SIZE)}.'
      )
    classes = np.zeros(len(task.clients), np.int64)
  split = tff_kd.data.partition.PARTITIONS[args.PARTITION.value]
  return split(classes, args.NUM_CLIENTS.value, **kwargs)


def _clients_used(task: tff_kd.data.Task) -> np.ndarray:
  """Which of the clients that the data have: all, or --num_clients at random."""
  there, used = len(task.client_rows), args.NUM_CLIENTS.value
  if used > there:
    raise UserError(
        f'--num_clients is {used}, but the data of {task.name} have {there} clients. '
        'Lower it.'
    )
  return np.sort(np.random.default_rng(args.SEED.value).permutation(there)[:used])


def names_of_clients(
    task: tff_kd.data.Task, clients: Sequence[np.ndarray]
) -> tff_kd.data.client_names.ClientNames:
  """The clients' names: those of the data, or their numbers.

  Args:
    task: The data.
    clients: The rows of each client, of `split_clients`.
  """
  if task.client_names is None:
    return tff_kd.data.client_names.ClientNames(range(len(clients)))
  return tff_kd.data.client_names.ClientNames(
      task.client_names[k] for k in _clients_used(task)
  )


def split_tests(
    task: tff_kd.data.Task, clients: Sequence[np.ndarray]
) -> list[np.ndarray]:
  """Each client's rows of the test part: its own, or drawn like its classes."""
  if task.test_rows is not None:
    return [task.test_rows[k] for k in _clients_used(task)]
  classes = task.class_numbers(task.clients)
  if classes is None:
    rows = np.random.default_rng(args.SEED.value).permutation(len(task.test))
    return [np.sort(part) for part in np.array_split(rows, len(clients))]
  return tff_kd.data.partition.matching(
      classes, clients, task.class_numbers(task.test), seed=args.SEED.value
  )


def _monitor(task: tff_kd.data.Task) -> str:
  return args.MONITOR.value or f'validation/student_{task.metric}'


def _best(task: tff_kd.data.Task, monitor: str) -> str:
  """Which value of a metric is the best, in words."""
  return 'lowest' if task.is_lower_better(monitor) else 'highest'


def build_batches(
    task: tff_kd.data.Task, clients: Sequence[np.ndarray]
) -> tff_kd.ClientBatches:
  """How clients read their examples, given the rows of each."""
  return tff_kd.ClientBatches(
      data=tff_kd.FileClientData.from_arrays(
          tuple(task.clients),
          dict(zip(names_of_clients(task, clients), clients)),
          directory=args.CACHE_DIR.value,
      ),
      batch_size=args.BATCH_SIZE.value,
      num_epochs=args.CLIENT_EPOCHS.value,
      label_share=args.LABEL_SHARE.value,
      input_share=args.INPUT_SHARE.value,
      seed=args.SEED.value,
  )


def build_participation(
    batches: tff_kd.ClientBatches,
) -> tff_kd.simulation.Participation:
  """Builds the participation and the client faults from the flags."""
  num_cohorts = len(args.STUDENT.value)
  trace = args.AVAILABILITY.value
  if trace is not None:
    trace = tff_kd.simulation.Availability.from_csv(
        trace, args.NUM_CLIENTS.value, batches.data.names
    )
  weights = None
  if args.SAMPLING.value == 'weighted':
    # A client without examples could never be chosen.
    weights = np.maximum(batches.data.num_examples, 1)
  return tff_kd.simulation.Participation(
      num_clients=args.NUM_CLIENTS.value,
      clients_per_round=args.CLIENTS_PER_ROUND.value,
      sampling=args.SAMPLING.value,
      weights=weights,
      availability=trace,
      dropout_before=args.DROPOUT_BEFORE.value,
      dropout_after=args.DROPOUT_AFTER.value,
      straggler_share=args.STRAGGLER_SHARE.value,
      straggler_steps=args.STRAGGLER_STEPS.value,
      delay_share=args.DELAY_SHARE.value,
      max_delay=args.MAX_DELAY.value,
      coverage=args.COVERAGE.value,
      cohort_fn=(lambda client: client % num_cohorts) if num_cohorts > 1 else None,
      gives_conditions=args.MIN_REPORTS.value > 0,
      seed=args.SEED.value,
  )


def _reporting(
    participation: tff_kd.simulation.Participation,
) -> Optional[tff_kd.Reporting]:
  """How the process takes what comes late or in part; `None` where nothing does."""
  if not participation.has_conditions:
    return None
  return tff_kd.Reporting(
      max_delay=args.MAX_DELAY.value,
      staleness_power=args.STALENESS_POWER.value,
      min_reports=args.MIN_REPORTS.value,
  )


def specs_of(process) -> dict[str, tff_kd.models.ModelSpec]:
  """The models by name; the students of cohorts are `student_0` and so on."""
  specs = _by_cohort('student', process.students, process.students.specs)
  if process.teacher_spec is not None:
    specs['teacher'] = process.teacher_spec
  return specs


def _by_cohort(
    name: str, students: cohorts.Students, values: Sequence[Any]
) -> dict[str, Any]:
  if not students.has_cohorts:
    return {name: values[0]}
  return {f'{name}_{i}': value for i, value in enumerate(values)}


def _save_models(
    models: Mapping[str, tuple[Any, Any]],
    specs: Mapping[str, tff_kd.models.ModelSpec],
    run_dir: pathlib.Path,
    sends_average: bool,
) -> None:
  """Saves a run's models, and the students that clients were sent, if others.

  Args:
    models: As `_Evaluation.models` returns them.
    specs: The models that are released, by name.
    run_dir: The run's folder.
    sends_average: Whether clients are sent others.
  """
  for name, (_, weights) in models.items():
    if name in specs:
      released.save(specs[name].to_keras(weights), run_dir, name)
    sent = name.replace('student_before', 'student')
    if name != sent and sends_average:
      # From these clients really begin, for what repeats their training.
      (run_dir / released.SENT).mkdir(exist_ok=True)
      released.save(specs[sent].to_keras(weights), run_dir / released.SENT, sent)


def _clients(process) -> Optional[cohorts.Students]:
  """The models that clients keep, if they do."""
  return getattr(process, 'kept_models', None)


def _on_server_labels(
    spec: tff_kd.models.ModelSpec, task: tff_kd.data.Task
) -> central.Training:
  """A model about to be trained on the server's examples with labels."""
  labelled = task.transfer.take(np.arange(args.TRANSFER_LABELS.value))
  return central.Training(
      spec, labelled, batch_size=_CENTRAL_BATCH, seed=args.SEED.value
  )


def _pretrain(
    spec: tff_kd.models.ModelSpec, task: tff_kd.data.Task
) -> tff.learning.models.ModelWeights:
  """--pretrain_epochs on the server's labelled examples."""
  training = _on_server_labels(spec, task)
  training.run(args.PRETRAIN_EPOCHS.value)
  return training.weights


def _train_alone(
    evaluator: tff_kd.evaluation.CentralEvaluator,
    task: tff_kd.data.Task,
    most_steps: int,
    bar: tqdm.tqdm,
) -> dict[str, float]:
  """The test scores of what the server's labels give without any client."""
  steps = -(-args.TRANSFER_LABELS.value // _CENTRAL_BATCH)  # An epoch's.
  done = 0

  def show(epoch: int, score: float) -> None:
    nonlocal done
    bar.update((epoch - done) * steps)
    bar.set_postfix_str(
        f'{evaluator.spec.name}: validation {_words(task.metric)} {score:.4g}'
    )
    done = epoch

  weights, _ = central.fit(
      _on_server_labels(evaluator.spec, task),
      lambda weights: evaluator.evaluate(weights, *task.validation)[task.metric],
      higher_is_better=not task.is_lower_better(),
      max_epochs=min(_ALONE_EPOCHS, -(-most_steps // steps)),
      epochs_per_look=-(-_ALONE_LOOK // steps),
      patience=_ALONE_PATIENCE,
      on_look=show,
  )
  return evaluator.evaluate(weights, *task.test)


def _all_alone(
    evaluators: Mapping[str, tff_kd.evaluation.CentralEvaluator],
    names: Iterable[str],
    task: tff_kd.data.Task,
    history: list[dict[str, float]],
) -> dict[str, dict[str, float]]:
  """`_train_alone` of the models of these names, at the same time.

  Each takes as many steps at most as the server has taken with it in the run, which a
  short run would be held up by, but for a least number.
  """
  taken = collections.Counter()
  for row in history:
    for metric, value in row.items():
      found = re.fullmatch('server_distillation/(.+)/num_steps', metric)
      if found:
        taken[found[1]] += int(value)
  most = max(taken.values(), default=0) or _ALONE_STEPS
  steps = {
      name: min(max(taken[name] or most, _ALONE_LEAST_STEPS), _ALONE_STEPS)
      for name in names
  }
  _say(
      f"Training {', '.join(steps)} on the server's labels alone, to compare with: at "
      f'most {sum(steps.values()):,} steps.'
  )
  with (
      tqdm.tqdm(
          total=sum(steps.values()), desc='labels alone', unit='step', file=sys.stderr,
          dynamic_ncols=True,
      ) as bar,
      concurrent.futures.ThreadPoolExecutor() as pool,
  ):
    def train(name: str) -> dict[str, float]:
      return _train_alone(evaluators[name], task, steps[name], bar)

    return dict(zip(steps, pool.map(train, steps)))


def _say(text: str) -> None:
  """Says on standard error what begins and may take long."""
  print(text, file=sys.stderr, flush=True)


class _Evaluation:
  """Evaluates the models of a process on the validation and the test part.

  `student` is the server's; where only clients have models, the mean over theirs. Where
  both have, `client` is that mean. Of cohorts, `student` is the mean over their
  students, which are there too.

  Attributes:
    metric_names: What it returns the values of.
    client_states: What clients keep, in `clients_dir`; `None` if they keep nothing.
    evaluators: Name -> the evaluator of a kind of model.
  """

  @staticmethod
  def names(process) -> dict[str, tuple[str, str]]:
    """The names of the metrics, each with the model and the name without it."""
    found = {**specs_of(process), 'student': None}
    if _clients(process) is not None and process.get_model_weights is not None:
      found['client'] = None
    state_type = process.initialize.type_signature.result.member
    if len(getattr(state_type, 'aggregated_model_weights', ())):
      before = process.students.specs
      found |= _by_cohort('student_before', process.students, before)
      found['student_before'] = None
    return {
        f'{part}/{name}_{key}': (name, f'{part}/{key}')
        for part in ('validation', 'test')
        for name in found
        for key in tff_kd.evaluation.score_names(process.students.first)
    }

  def __init__(self, process, task, clients_dir: pathlib.Path):
    self._task = task
    self._students = process.students
    self._has_student = process.get_model_weights is not None
    self._clients = _clients(process)
    self.metric_names = self.names(process)
    self.client_states = None
    if isinstance(process, tff_kd.StatefulClientsProcess):
      count = len(self._clients.specs) if self._clients is not None else 1
      self.client_states = tff_kd.simulation.ClientStates(
          process.initialize_client(), clients_dir,
          cohort_fn=(lambda client: client % count) if count > 1 else None,
      )
    if self._clients is not None:
      self._client_evaluators = [
          tff_kd.evaluation.CentralEvaluator(spec) for spec in self._clients.specs
      ]
    self.evaluators = {
        name: tff_kd.evaluation.CentralEvaluator(spec)
        for name, spec in specs_of(process).items()
    }

  def models(self, state) -> dict[str, tuple[Any, Any]]:
    """Name -> (evaluator, weights) of the server's models in a state."""
    found = {}

    def add(name: str, kind: str, weights: Any) -> None:
      if len(weights):
        of_kind = _by_cohort(kind, self._students, self._students.unpack(weights))
        names = _by_cohort(name, self._students, list(of_kind))
        found.update(
            (column, (self.evaluators[kind], of_kind[kind]))
            for column, kind in names.items()
        )

    if self._has_student:
      add('student', 'student', state.global_model_weights)
    if 'teacher' in self.evaluators:
      found['teacher'] = (self.evaluators['teacher'], state.teacher_weights)
    add('student_before', 'student', getattr(state, 'aggregated_model_weights', ()))
    return found

  def __call__(self, state) -> dict[str, float]:
    metrics = {}
    models = self.models(state)
    for part in ('validation', 'test'):
      examples = getattr(self._task, part)
      found = {
          name: evaluator.evaluate(weights, *examples)
          for name, (evaluator, weights) in models.items()
      }
      if self._clients is not None:
        name = 'client' if 'student' in models else 'student'
        found[name] = self._mean_over_clients(examples)
      for name in ('student', 'student_before'):
        of_cohorts = [
            found[f'{name}_{i}']
            for i in range(len(self._students.specs)) if f'{name}_{i}' in found
        ]
        if of_cohorts:
          found[name] = _mean_of(of_cohorts)
      for name, values in found.items():
        for key, value in values.items():
          metrics[f'{part}/{name}_{key}'] = value
    return metrics

  def _mean_over_clients(self, examples) -> dict[str, float]:
    """Evaluates clients' own models; one that never took part has the initial model."""
    values = []
    numbers = np.random.default_rng(args.SEED.value).permutation(args.NUM_CLIENTS.value)
    for number in sorted(numbers[:args.EVALUATED_CLIENTS.value].tolist()):
      (state,) = self.client_states.load([number])
      cohort = number % len(self._clients.specs)
      weights = self._clients.unpack(state.weights)[cohort]
      evaluator = self._client_evaluators[cohort]
      values.append(evaluator.evaluate(weights, *examples))
    return _mean_of(values)


def _mean_of(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
  return {key: float(np.mean([v[key] for v in values])) for key in values[0]}


def read_history(path: pathlib.Path) -> list[dict[str, float]]:
  """The rows of metrics.csv, a resumed run's earlier rounds included."""
  with open(path, newline='') as file:
    return [
        {key: float(value) for key, value in row.items() if value != ''}
        for row in csv.DictReader(file)
    ]


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
          *train_process.schedules(num_rounds), *_trackers(run_dir, prefix)
      ],
      progress_bar=tff_kd.simulation.ProgressBar(
          prefix.rstrip('_') or args.algorithm().name,
          _Summary(task, metrics_path, accountant),
      ),
  )
  if result.interrupted:
    raise KeyboardInterrupt
  return result, read_history(metrics_path)


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
    if self._moved is None:  # With the rounds before a resumed run.
      self._moved = sum(row[_CLIENT_BYTES] for row in read_history(self._path))
    else:
      self._moved += metrics[_CLIENT_BYTES]
    metric = self._task.metric
    models = ' '.join(
        f"{name}={metrics[f'test/{name}_{metric}']:.3f}"
        for name in ('student', 'teacher') if f'test/{name}_{metric}' in metrics
    )
    shown = [f'test {_words(metric)}: {models}', f'MB/client={self._moved / 1e6:.3g}']
    if self._accountant is not None:
      shown.append(f'epsilon={self._accountant.epsilon():.3g}')
    return ', '.join(shown)


def _trackers(run_dir: pathlib.Path, prefix: str) -> list[tff_kd.simulation.Callback]:
  """The trackers that --tracker names, beside TensorBoard."""
  project, name = f'tff_kd {args.TASK.value}', f'{run_dir.name}{prefix and " FedAvg"}'
  settings = {key: flag.value for key, flag in sorted(args.own_flags().items())}
  found = []
  if 'mlflow' in args.TRACKER.value:
    # As MLflow is set up, or else in the run's folder.
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
  """To TensorBoard, a curve a model: student and teacher are on one chart.

  A chart is a tag, and a curve in it a folder: `test/teacher_accuracy` goes as
  `test/accuracy` to the folder `teacher`; what is about no model, to `round`.
  """

  def __init__(self, folder: pathlib.Path, names: Mapping[str, tuple[str, str]]):
    self._folder = folder
    self._names = names  # As of `_Evaluation.names`.
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


def _words(name: str) -> str:
  return name.replace('_', ' ')


def _best_row(
    history: list[dict[str, float]], rounds: int, monitor: str, task: tff_kd.data.Task
) -> dict[str, float]:
  """The row with the best monitored metric within the first rounds."""
  sign = -1.0 if task.is_lower_better(monitor) else 1.0

  def value(row: dict[str, float]) -> float:
    # A round that has diverged, not a number, is the worst.
    return -math.inf if math.isnan(row[monitor]) else sign * row[monitor]

  return max((row for row in history if row['round'] <= rounds), key=value)


def _run_dir() -> pathlib.Path:
  """The run folder, as flags name it."""
  if args.OUTPUT_DIR.value:
    return pathlib.Path(args.OUTPUT_DIR.value)
  now = datetime.datetime.now().strftime('%Y%m%d-%H%M%S')
  name = tff_kd.data.task_info(args.TASK.value).name
  return pathlib.Path('runs', f'{now}-{args.algorithm().name}-{name}')


def _config() -> dict[str, Any]:
  """The values of all flags of a run."""
  return {name: flag.value for name, flag in sorted(args.own_flags().items())}


def _check_run_dir(run_dir: pathlib.Path) -> None:
  """Refuses a folder that holds another run than this one, or none to resume."""
  config, path = _config(), run_dir / 'config.json'
  # One that ended before its first round left nothing to go on with.
  has_rounds = (run_dir / 'metrics.csv').exists()
  if path.exists() and has_rounds:
    if not args.RESUME.value:
      raise UserError(
          f'{run_dir} already holds a run. Leave out --noresume to go on with it, or '
          'name another --output_dir.'
      )
    before = json.loads(path.read_text())['flags']
    free = set(args.FREE_ON_RESUME)
    if args.NOISE_MULTIPLIER.value is not None:
      free.add('epsilon')  # The budget only.
    elif args.EPSILON.value is not None:
      free.discard('rounds')  # The noise was found for them.
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


def _open_run_dir(run_dir: pathlib.Path) -> None:
  """Makes the run folder, with `config.json` in it."""
  run_dir.mkdir(parents=True, exist_ok=True)
  path = run_dir / 'config.json'
  versions = {m.__name__: m.__version__ for m in (tf, tff, np)}
  # Not in its place: a full disk would leave half of it.
  partial = path.with_suffix('.partial')
  partial.write_text(
      json.dumps({'flags': _config(), 'versions': versions}, indent=2) + '\n'
  )
  partial.replace(path)


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


def run() -> None:
  """The whole job."""
  with errors_for_users():
    run_dir = None if args.DRY_RUN.value else _run_dir()
    setup = prepare(run_dir)
    if run_dir is None:
      _print_plan(setup)
      return
    setup, accountant = _begin(setup, run_dir)
  try:
    with runtime(), concurrent.futures.ThreadPoolExecutor(1) as pool:
      if accountant is None:  # Beside the first round, which leaves a core free.
        drawn = pool.submit(_draw_partition, setup, run_dir)
      _train_and_report(setup, accountant, run_dir)
      if accountant is None:
        drawn.result()
  except KeyboardInterrupt as error:
    raise KeyboardInterrupt(
        f'Stopped. To go on: {_resume_command(run_dir)}'
    ) from error
  except (
      tff_kd.simulation.CheckpointError,
      tff_kd.runtime.NoWorkerError,
  ) as error:
    raise UserError(str(error)) from error
  # Both of them where a disk is full.
  except (OSError, tf.errors.ResourceExhaustedError) as error:
    reason = str(error).splitlines()[0]
    raise UserError(
        f'The run cannot go on: {reason}. Its last checkpoint in {run_dir} is whole: '
        'make room, or mend what is said here, and start it again: '
        f'{_resume_command(run_dir)}'
    ) from error


def _resume_command(run_dir: pathlib.Path) -> str:
  """The command that goes on with a run, all of whose flags are in the folder."""
  words = [
      'python', '-m', 'pipelines.train', f'--config={run_dir / "config.json"}',
      f'--output_dir={run_dir}',
  ]
  return shlex.join(words)


def runtime() -> contextlib.AbstractContextManager:
  """Returns the runtime that --runtime, --device and --ray_address choose."""
  device = args.DEVICE.value or None
  if args.RAY_ADDRESS.value:
    return _on_ray(device)
  if args.RUNTIME.value == 'tff':
    return tff_kd.runtime.tff_worker()
  return tff_kd.runtime.in_process(device=device)


def _check_ray() -> None:
  try:
    tff_kd.runtime.check_ray(
        args.RAY_ADDRESS.value, args.RAY_WORKERS.value, train_checks.ray_resources()
    )
  except ImportError as error:
    raise UserError(str(error)) from error


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
    process: What is trained.
    common: The arguments that FedAvg has in common with it.
    participation: Who takes part.
  """

  task: tff_kd.data.Task
  clients: Sequence[np.ndarray]
  process: Any
  common: dict[str, Any]
  participation: tff_kd.simulation.Participation


def prepare(run_dir: Optional[pathlib.Path] = None) -> Setup:
  """All that can be refused, before anything runs.

  Args:
    run_dir: The folder of the run that follows, which must go with the flags; `None` if
      none follows.
  """
  algorithm = args.algorithm()
  _say(f'Loading the data of {args.TASK.value}.')
  task = load_task()
  if tff_kd.own_files.is_own(args.TASK.value):
    train_checks.run()  # It has set some.
  if args.RAY_ADDRESS.value:
    _check_ray()
  if run_dir is not None:
    _check_run_dir(run_dir)
  clients = split_clients(task)
  batches = build_batches(task, clients)
  if train_checks.is_private():
    train_privacy.check_disjoint(task)
  participation = build_participation(batches)
  common = train_process.common_arguments(task, batches)
  common['reporting'] = _reporting(participation)
  _say(f'Building {algorithm.name}.')
  process = train_process.build_process(algorithm, task, common)
  _check_metric(task, process)
  tff_kd.simulation.check_monitor(
      _monitor(task),
      [
          *tff_kd.simulation.process_metric_names(process),
          *_Evaluation.names(process),
      ],
  )
  if train_checks.is_private():
    train_privacy.check_budget(process)
  return Setup(task, clients, process, common, participation)


def _check_metric(task: tff_kd.data.Task, process: Any) -> None:
  """Refuses a task whose first metric is not one number."""
  names = tff_kd.evaluation.score_names(process.students.first)
  if task.metric not in names:
    raise UserError(
        f'The first metric of {task.name}, {task.metric}, is the one that is reported '
        f'and chosen by, and must be one number; there are {", ".join(names)}. Put '
        "another first in `metrics_fn`, or build it so (F1Score(average='macro'))."
    )


def _begin(
    setup: Setup, run_dir: pathlib.Path
) -> tuple[Setup, Optional[tff_kd.privacy.PrivacyAccountant]]:
  """Opens the run folder, and says what is run."""
  _open_run_dir(run_dir)
  accountant = None
  if train_checks.is_private():
    setup = setup._replace(
        participation=dataclasses.replace(
            setup.participation, seed=train_privacy.sampling_seed(run_dir)
        )
    )
    accountant = train_privacy.build_accountant(setup.process, run_dir)
  _print_setup(setup, accountant)
  print(f'Run folder: {run_dir}', flush=True)
  return setup, accountant


def _draw_partition(setup: Setup, run_dir: pathlib.Path) -> None:
  task = setup.task
  split = args.PARTITION.value if task.client_rows is None else 'its own clients'
  title = f'{task.name}: {len(task.clients)} examples, {split}'
  classes, names = task.class_numbers(task.clients), None
  if classes is None or len(setup.clients) > 100:
    counts = np.array([len(rows) for rows in setup.clients])
  else:
    counts = np.array([
        np.bincount(classes[rows], minlength=task.num_classes) for rows in setup.clients
    ])
    names = task.class_names
  figure = tff_kd.plots.partition(counts, class_names=names, title=title)
  figure.savefig(run_dir / 'partition.png')


def _print_setup(
    setup: Setup, accountant: Optional[tff_kd.privacy.PrivacyAccountant]
) -> None:
  task, process = setup.task, setup.process
  print(
      f'{args.algorithm().name} on {task.name}: {args.NUM_CLIENTS.value} clients with '
      f'{sum(map(len, setup.clients))} examples, {args.CLIENTS_PER_ROUND.value} a '
      'round; '
      f'transfer {len(task.transfer)} ({args.TRANSFER_LABELS.value} with labels), '
      f'validation {len(task.validation)}, test {len(task.test)}.'
  )
  for name, spec in specs_of(process).items():
    size = sum(w.size for w in tf.nest.flatten(spec.initial_weights))
    print(f'{name}: {size:,} weights.')
  monitor = _monitor(task)
  print(f'The best round: with the {_best(task, monitor)} {monitor}.')
  train_privacy.print_guards(process, accountant)


def _print_plan(setup: Setup) -> None:
  """Prints what would be built, moved and stored."""
  process = setup.process
  accountant = None
  if train_checks.is_private():
    accountant = train_privacy.build_accountant(process, None)
  _print_setup(setup, accountant)
  each = tff_kd.communication.round_bytes(process)
  clients, rounds = args.CLIENTS_PER_ROUND.value, args.ROUNDS.value
  rows = [('moved, MB', 'a client, a round', 'all clients, all rounds')]
  for name, value in each._asdict().items():
    if value:
      total = value * clients * rounds / 1e6
      rows.append((name.replace('_', ' '), f'{value / 1e6:.3g}', f'{total:.4g}'))
  total = each.total * clients * rounds / 1e6
  rows.append(('all', f'{each.total / 1e6:.3g}', f'{total:.4g}'))
  state = tff_kd.communication.type_bytes(
      process.initialize.type_signature.result.member
  )
  # Progress has the last state and the best, and two checkpoints stay.
  held = [
      ('held, MB', ''),
      ("the server's state", f'{state / 1e6:.3g}'),
      ('the checkpoints', f'{4 * state / 1e6:.3g}'),
  ]
  if isinstance(process, tff_kd.StatefulClientsProcess):
    kept = float(tff_kd.communication.type_bytes(
        process.initialize_client.type_signature.result
    ))
    if process.kept_models is not None:
      kept /= len(process.kept_models.specs)  # The mean over the cohorts.
    held.append(
        ("clients' own states, on disk", f'{kept * args.NUM_CLIENTS.value / 1e6:.3g}')
    )
  print()
  tables.print_table(rows)
  print()
  tables.print_table(held)
  print('\nNothing was trained (--dry_run).')


def _train_and_report(
    setup: Setup,
    accountant: Optional[tff_kd.privacy.PrivacyAccountant],
    run_dir: pathlib.Path,
) -> None:
  task, clients, process, common, select_clients = setup
  specs = specs_of(process)
  # When a process begins with them, and once: those of clients pre-train themselves.
  pretrained = functools.cache(lambda name: _pretrain(specs[name], task))

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
  evaluation = _Evaluation(process, task, run_dir / 'clients')
  result, history = _train(
      process, state, evaluation, task, select_clients, run_dir, '', args.ROUNDS.value,
      args.PATIENCE.value or None, _monitor(task), accountant,
  )
  _save_models(
      evaluation.models(result.best_state), specs, run_dir,
      process.description.sends_average,
  )

  baseline = None
  if args.FEDAVG.value and args.algorithm().name != 'fed_avg' and accountant is None:
    keras.utils.set_random_seed(args.SEED.value)
    _say('Building fed_avg, to compare with.')
    fed_avg = algorithms.build_fed_avg(**common)
    fed_avg_bytes = tff_kd.communication.round_bytes(fed_avg)
    moved = int(_megabytes(history)[-1] * 1e6)
    more_rounds = max(
        result.round_num,
        min(moved // fed_avg_bytes.total, _MOST_FED_AVG * result.round_num),
    )
    _, baseline = _train(
        fed_avg, initial_state(fed_avg), _Evaluation(fed_avg, task, run_dir), task,
        select_clients, run_dir, 'fed_avg_', more_rounds, None,
        f'validation/student_{task.metric}',
    )
  # What the server could do without any client: the honest lower bound.
  alone = lambda: {}
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    if args.TRANSFER_LABELS.value:
      alone = pool.submit(_all_alone, evaluation.evaluators, specs, task, history).result
    _report(
        _Finished(
            setup=setup, evaluation=evaluation, result=result, history=history,
            baseline=baseline, accountant=accountant, run_dir=run_dir,
        ),
        alone,
    )


def _over_clients(
    evaluator: tff_kd.evaluation.CentralEvaluator,
    weights: Any,
    task: tff_kd.data.Task,
    test_split: Sequence[np.ndarray],
) -> tff_kd.evaluation.FederatedEvaluation:
  """The task's metric over clients, each on its share of the test part."""
  outputs = evaluator.outputs(weights, task.test.inputs)
  values = [
      metric_of(outputs[rows], task.test.take(rows), evaluator.spec, task)
      for rows in test_split
  ]
  values = [value for value in values if value is not None]
  return tff_kd.evaluation.over_clients(
      np.array(values), lower_is_better=task.is_lower_better()
  )


def metric_of(
    outputs: np.ndarray,
    examples: tff_kd.data.Examples,
    spec: tff_kd.models.ModelSpec,
    task: tff_kd.data.Task,
) -> Optional[float]:
  """Returns the task's metric alone; `None` where no example counts."""
  if not examples.counted.any():
    return None
  name = task.metric
  return tff_kd.evaluation.score(
      outputs, examples.labels, spec=spec, names=[name],
      sample_weight=examples.sample_weight,
  )[name]


def _megabytes(history: list[dict[str, float]]) -> list[float]:
  """Returns the mean bytes that a participating client has moved up to each round."""
  return list(np.cumsum([row[_CLIENT_BYTES] for row in history]) / 1e6)


def _print_left_out(history: list[dict[str, float]]) -> None:
  """How many reports did not count in all rounds, and why."""
  causes = collections.Counter()
  for row in history:
    causes.update(tff_kd.simulation.left_out(row))
  if causes:
    print(
        'Reports of clients that did not count, in all rounds: '
        + ', '.join(f'{name} {count}' for name, count in causes.items()) + '.'
    )


def _print_ledger(history: list[dict[str, float]]) -> None:
  """Returns the bytes moved, by channel."""
  rows = [('moved, MB', 'all clients, all rounds', 'a round')]
  for name in history[0]:
    if name.startswith('bytes/') and name != _CLIENT_BYTES:
      total = sum(row[name] for row in history) / 1e6
      channel = name.removeprefix('bytes/').replace('_', ' ')
      rows.append((channel, f'{total:.4g}', f'{total / len(history):.3g}'))
  each = _megabytes(history)[-1]
  rows.append(('a client that takes part', f'{each:.4g}', f'{each / len(history):.3g}'))
  tables.print_table(rows)
  print()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Finished:
  """A training that is over.

  Attributes:
    setup: What it began with.
    evaluation: What judged its rounds.
    result: What it ended with.
    history: The rows of metrics.csv.
    baseline: FedAvg's rows; `None` without that comparison.
    accountant: The privacy accountant of a private run; else `None`.
    run_dir: The run's folder.
  """

  setup: Setup
  evaluation: '_Evaluation'
  result: tff_kd.simulation.TrainingResult
  history: list[dict[str, float]]
  baseline: Optional[list[dict[str, float]]]
  accountant: Optional[tff_kd.privacy.PrivacyAccountant]
  run_dir: pathlib.Path

  @property
  def task(self) -> tff_kd.data.Task:
    return self.setup.task

  @functools.cached_property
  def best(self) -> dict[str, float]:
    """The best round's row."""
    return _best_row(
        self.history, self.result.round_num, _monitor(self.task), self.task
    )

  @functools.cached_property
  def scores(self) -> list[str]:
    """The names of the scores that the table has."""
    names = tff_kd.evaluation.score_names(self.setup.process.students.first)
    return [name for name in names if name != 'loss']

  @functools.cached_property
  def server_models(self) -> dict[str, Any]:
    """By name, the evaluator and the weights of each model of the best round."""
    return self.evaluation.models(self.result.best_state)

  @functools.cached_property
  def names(self) -> dict[str, str]:
    """Returns the names of the models in the table and the plots."""
    process = self.setup.process
    has_student = process.get_model_weights is not None
    names = {
        'student': 'student' if has_student else "clients' own models, mean",
        'client': "clients' own models, mean",
        'teacher': 'teacher',
        'student_before': 'student before back-distillation',
    }
    if not args.BACK.value or process.teacher_spec is None:
      names['student_before'] = "student before the server's distillation"
    if args.CALIBRATE.value:
      names['student_before'] = 'student before calibration'
    if process.students.has_cohorts:
      for name in ('student', 'student_before'):
        for i, model in enumerate(args.STUDENT.value):
          names[f'{name}_{i}'] = f'{names[name]}, cohort {i} ({model})'
        names[name] += ', mean of cohorts'
    return names

  def scored(self, values: Mapping[str, float], prefix: str = '') -> list[str]:
    """Returns the table's cells of the scores."""
    return [f'{values[prefix + name]:.4f}' for name in self.scores]


def _report(finished: _Finished, alone: Callable[[], dict[str, Any]]) -> None:
  """Draws the curves and prints the table.

  Args:
    finished: The training.
    alone: Waits for `_all_alone`.
  """
  rows = [*_model_rows(finished), *_baseline_rows(finished)]
  of_labels = alone()
  levels = {}
  for name, values in of_labels.items():
    label = f"{name} on the server's {args.TRANSFER_LABELS.value} labels alone"
    rows.append((label, '', *finished.scored(values), '', '', ''))
    levels[label] = values[finished.task.metric]
  _draw_curves(finished, levels)
  further = _further_scores(finished)
  _write_results(finished, of_labels, further)
  print()
  tables.print_table(rows)
  print()
  _print_end(finished)
  print()
  for name, values in further.items():
    print(f'{name}: ' + ', '.join(f'{key} {score:.4f}' for key, score in values.items()))
  _print_ledger(finished.history)
  _print_privacy(finished.accountant)
  seconds = [row[tff_kd.simulation.ROUND_SECONDS] for row in finished.history]
  print(f'Seconds per round: {np.median(seconds):.2f} (median).')
  if finished.baseline is not None:
    _print_comparison(finished)


def _model_rows(finished: _Finished) -> list[tuple[str, ...]]:
  """The table's head, and a row for each model of the best round."""
  task, test = finished.task, finished.best
  test_split = split_tests(task, finished.setup.clients)
  rows = [(
      'model', 'round', *(f'test {_words(name)}' for name in finished.scores),
      f'clients: mean {_words(task.metric)}', '10th pct.', 'worst',
  )]
  best_round = str(finished.result.best_round)
  for name, (evaluator, weights) in finished.server_models.items():
    by_client = _over_clients(evaluator, weights, task, test_split)
    rows.append((
        finished.names[name], best_round, *finished.scored(test, f'test/{name}_'),
        f'{by_client.mean:.4f}', f'{by_client.percentile_10:.4f}',
        f'{by_client.worst:.4f}',
    ))
  for name in ('student', 'client', 'student_before'):
    is_known = f'test/{name}_{task.metric}' in test
    if name not in finished.server_models and is_known:
      scores = finished.scored(test, f'test/{name}_')
      rows.append((finished.names[name], best_round, *scores, '', '', ''))
  return rows


def _baseline_rows(finished: _Finished) -> list[tuple[str, ...]]:
  """The table's rows of FedAvg."""
  if finished.baseline is None:
    return []
  num_rounds = finished.result.round_num
  at_bytes = int(finished.baseline[-1]['round'])
  label = 'FedAvg, same bytes'
  if at_bytes == _MOST_FED_AVG * num_rounds:
    label = f'FedAvg, {_MOST_FED_AVG} times the rounds'
  rows = []
  for name, last in (('FedAvg, same rounds', num_rounds), (label, at_bytes)):
    best = _best_row(
        finished.baseline, last, f'validation/student_{finished.task.metric}',
        finished.task,
    )
    scores = finished.scored(best, 'test/student_')
    rows.append((name, f"{best['round']:.0f}", *scores, '', '', ''))
  return rows


def _draw_curves(finished: _Finished, levels: Mapping[str, float]) -> None:
  """Draws the test metric of each model, and what the labels give alone."""
  task = finished.task
  runs = {'': finished.history}
  if finished.baseline is not None:
    runs['FedAvg'] = finished.baseline
  figure = tff_kd.plots.curves(
      runs, metric=f'test {task.metric}',
      columns={
          f'test/{name}_{task.metric}': shown for name, shown in finished.names.items()
      },
      best_round={'': finished.result.best_round}, levels=levels,
      title=f'{args.algorithm().name} on {task.name}',
  )
  figure.savefig(finished.run_dir / 'curves.png')


def _further_scores(finished: _Finished) -> dict[str, dict[str, float]]:
  """Returns the task's own scores of a model, if the task has any."""
  task, specs = finished.task, specs_of(finished.setup.process)
  if task.scores_fn is None:
    return {}
  return {
      name: dict(
          task.scores_fn(
              functools.partial(finished.evaluation.evaluators[name].logits, weights)
          )
      )
      for name, (_, weights) in finished.server_models.items() if name in specs
  }


def _write_results(
    finished: _Finished, alone: dict[str, Any], further: dict[str, Any]
) -> None:
  """Writes results.json."""
  now = datetime.datetime.now(datetime.timezone.utc)
  results = {
      'finished': now.isoformat(timespec='seconds'),
      'rounds': finished.result.round_num,
      'best_round': finished.result.best_round,
      'best': finished.best,
      'metric': finished.task.metric,
      'lower_is_better': finished.task.is_lower_better(),
      'further_scores': further,
      'alone': alone,
  }
  if finished.accountant is not None:
    # Of all rounds: the best round is chosen among all of them.
    results['epsilon'] = finished.accountant.epsilon()
  (finished.run_dir / RESULTS).write_text(json.dumps(results, indent=2) + '\n')


def _print_end(finished: _Finished) -> None:
  """Says how the training ended, and which round is kept."""
  result, task = finished.result, finished.task
  ending = 'converged' if result.converged else 'reached the number of rounds'
  if result.budget_spent:
    ending = 'another round would pass the privacy budget'
  if result.stop_reason is not None:
    ending = result.stop_reason
  print(
      f'Ended after round {result.round_num} ({ending}); the round with the '
      f'{_best(task, _monitor(task))} {_monitor(task)} is kept. On {len(task.test)} test '
      'examples.'
  )
  _print_left_out(finished.history)


def _print_privacy(accountant: Optional[tff_kd.privacy.PrivacyAccountant]) -> None:
  """Says what all rounds have cost."""
  if accountant is None:
    return
  print(
      f'Privacy: epsilon {accountant.epsilon():.4g} at delta {accountant.delta:g} for '
      f'all that {accountant.rounds} rounds released ({accountant.sampling.neighbors}).'
  )


def _print_comparison(finished: _Finished) -> None:
  """Says in which round the student was as good as FedAvg at the end."""
  task, num_rounds = finished.task, finished.result.round_num
  column = f'test/student_{task.metric}'
  goal = finished.baseline[min(num_rounds, len(finished.baseline)) - 1][column]
  sign = -1.0 if task.is_lower_better() else 1.0
  reached = next(
      (r['round'] for r in finished.history if sign * r[column] >= sign * goal), None
  )
  ending = 'student did not reach it.'
  if reached is not None:
    ending = f'student reached it in round {reached:.0f}.'
  print(
      f"FedAvg's test {_words(task.metric)} after {num_rounds} rounds is {goal:.4f}; "
      f'the {ending}'
  )
