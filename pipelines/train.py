r"""Trains one algorithm on one task and compares it with FedAvg.

  python -m pipelines.train
  python -m pipelines.train --alpha=1 --rounds=50 --target=0.5
  python -m pipelines.train --algorithm=fed_df --teacher= --seed=1
  python -m pipelines.train --task=idx --data_dir=/data/mnist --num_clients=100
"""

from collections.abc import Iterator, Mapping
import contextlib
import csv
import dataclasses
import datetime
import functools
import inspect
import json
import pathlib
import sys
from typing import Any, Optional

from absl import app
from absl import flags
from absl import logging

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff
import tqdm

from pipelines import plots
from pipelines import tables
import tff_kd
from tff_kd import algorithms
from tff_kd import keras_models
from tff_kd import server_distillation

_OPTIMIZERS = {
    'sgd': tff.learning.optimizers.build_sgdm,
    'adam': tff.learning.optimizers.build_adam,
}
_SCHEDULES = {'constant': None, 'cosine': server_distillation.cosine_schedule}
_DEFAULT_ALGORITHM = 'fed_distillation'
# Of the models trained on the server's labels alone, for the table.
_ALONE_EPOCHS = 40

# What to run.
_ALGORITHM = flags.DEFINE_enum(
    'algorithm', _DEFAULT_ALGORITHM, sorted(algorithms.REGISTRY),
    'The algorithm. '
    + '; '.join(f'{n}: {a.summary}' for n, a in algorithms.REGISTRY.items()),
)
_ROUNDS = flags.DEFINE_integer('rounds', 30, 'Rounds at most.', lower_bound=1)
_PATIENCE = flags.DEFINE_integer(
    'patience', 15, 'Stop after so many rounds without a better --monitor; '
    '0 for never.', lower_bound=0,
)
_MONITOR = flags.DEFINE_string(
    'monitor', 'validation/student_accuracy',
    'The metric whose highest value makes the best round, a column of metrics.csv.'
)
_SEED = flags.DEFINE_integer(
    'seed', 0, 'Decides the split, the initial weights, who takes part and every '
    'order of examples.', lower_bound=0,
)
_FEDAVG = flags.DEFINE_bool(
    'compare_with_fed_avg', True,
    'Also train plain FedAvg of the same student, to the same bytes.'
)

# Data and clients.
_TASK = flags.DEFINE_enum('task', 'mnist5k', sorted(tff_kd.data.TASKS), 'The data.')
_DATA_DIR = flags.DEFINE_string(
    'data_dir', None, 'The folder with IDX files, for --task=idx.'
)
_TRANSFER_SIZE = flags.DEFINE_integer(
    'transfer_size', 1000, 'Examples that the server holds.', lower_bound=1
)
_VALIDATION_SIZE = flags.DEFINE_integer(
    'validation_size', 500, 'Labelled examples for choosing the best round.',
    lower_bound=1,
)
_NUM_CLIENTS = flags.DEFINE_integer('num_clients', 20, 'Clients.', lower_bound=1)
_CLIENTS_PER_ROUND = flags.DEFINE_integer(
    'clients_per_round', 8, 'Of these, how many take part.', lower_bound=1
)
_PARTITION = flags.DEFINE_enum(
    'partition', 'dirichlet', sorted(tff_kd.data.partition.PARTITIONS),
    'How the examples are split over clients.',
)
_ALPHA = flags.DEFINE_float(
    'alpha', 0.1, 'Concentration, for dirichlet and quantity_skew.'
)
_SHARDS = flags.DEFINE_integer(
    'shards_per_client', 2, 'For --partition=shards.', lower_bound=1
)

# Models and local training.
_STUDENT = flags.DEFINE_enum(
    'student', 'document', sorted(keras_models.STUDENTS), 'The student model.'
)
_TEACHER = flags.DEFINE_enum(
    'teacher', 'cnn', sorted(keras_models.TEACHERS), 'The teacher model.'
)
_PRETRAIN_EPOCHS = flags.DEFINE_integer(
    'pretrain_epochs', 0, 'Epochs of central training, of student and teacher, on '
    'the labelled transfer examples, before round 1.', lower_bound=0,
)
_CLIENT_OPTIMIZER = flags.DEFINE_enum(
    'client_optimizer', 'sgd', sorted(_OPTIMIZERS), "The clients' optimizer."
)
_CLIENT_RATE = flags.DEFINE_float(
    'client_learning_rate', 0.1, 'Its rate.', lower_bound=0.0
)
_CLIENT_EPOCHS = flags.DEFINE_integer(
    'client_epochs', 5, 'Local epochs a round.', lower_bound=1
)
_BATCH_SIZE = flags.DEFINE_integer(
    'batch_size', 20, 'Examples a local step.', lower_bound=1
)
_SERVER_OPTIMIZER = flags.DEFINE_enum(
    'server_optimizer', 'sgd', sorted(_OPTIMIZERS),
    'Applies the mean delta to the student.',
)
_SERVER_RATE = flags.DEFINE_float(
    'server_learning_rate', 1.0, 'Its rate.', lower_bound=0.0
)
_WEIGHTING = flags.DEFINE_enum(
    'client_weighting', 'num_examples', ['num_examples', 'uniform'],
    'A client\'s weight in both means.',
)
_LOCAL_TARGET = flags.DEFINE_enum(
    'local_target', 'none', ['none', 'student', 'teacher'],
    'What clients distil from while they train.',
)
_LOCAL_WEIGHT = flags.DEFINE_float(
    'local_weight', 0.2, 'The share of that in their loss.'
)

# The server's distillation. Unset: the algorithm's own default.
_TRANSFER_LABELS = flags.DEFINE_integer(
    'transfer_labels', 200, 'How many of the transfer examples have labels: the '
    "server's limited labelled set. 0 for none.", lower_bound=0,
)
_TRANSFER_PER_ROUND = flags.DEFINE_integer(
    'transfer_per_round', None, 'Transfer examples a round; all if unset.',
    lower_bound=1,
)
_TRANSFER_VALIDATION = flags.DEFINE_integer(
    'transfer_validation', 0, 'Transfer examples set aside to judge the '
    "server's distillation and roll it back.", lower_bound=0,
)
_TARGET = flags.DEFINE_string(
    'target', None, 'ensemble, student, or a number between 0 (student) and 1 '
    '(ensemble).'
)
_TEMPERATURE = flags.DEFINE_float('temperature', None, 'T, in all distillation.')
_DISTILLATION_WEIGHT = flags.DEFINE_float(
    'distillation_weight', None, 'The share of the distillation in the loss, where '
    'there are --transfer_labels; the rest is their cross-entropy.'
)
_SERVER_STEPS = flags.DEFINE_integer(
    'server_steps', None, 'Steps a round.', lower_bound=1
)
_SERVER_BATCH = flags.DEFINE_integer(
    'server_batch_size', None, 'Examples a step.', lower_bound=1
)
_SCHEDULE = flags.DEFINE_enum(
    'server_schedule', None, sorted(_SCHEDULES),
    "The learning rate's course within a round.",
)
_VALIDATE_EVERY = flags.DEFINE_integer(
    'validate_every', None, 'Steps between looks at --transfer_validation.',
    lower_bound=1,
)
_SERVER_PATIENCE = flags.DEFINE_integer(
    'server_patience', None, 'Looks without improvement before stopping.',
    lower_bound=1,
)
_TEACHER_RATE = flags.DEFINE_float(
    'teacher_learning_rate', None, "The teacher's Adam.", lower_bound=0.0
)
_BACK = flags.DEFINE_bool(
    'back_distillation', True, 'Refresh the student from the teacher.'
)
_BACK_STEPS = flags.DEFINE_integer(
    'back_steps', None, 'Steps of that a round.', lower_bound=1
)
_STUDENT_RATE = flags.DEFINE_float(
    'student_learning_rate', None, "The student's Adam on the server.",
    lower_bound=0.0,
)

# The run folder.
_OUTPUT_DIR = flags.DEFINE_string(
    'output_dir', None, 'The run folder; a new one under runs/ if unset.'
)
_RESUME = flags.DEFINE_bool(
    'resume', False, 'Go on with the run in --output_dir where it was stopped.'
)
_ROUNDS_PER_CHECKPOINT = flags.DEFINE_integer(
    'rounds_per_checkpoint', 5, 'Rounds between checkpoints.', lower_bound=1
)

# Flags that only some algorithms use, by the builder's parameter they feed.
_FLAGS_OF_PARAMETER = {
    'transfer_set': [
        'transfer_per_round', 'transfer_validation',
    ],
    'distillation': [
        'target', 'temperature', 'distillation_weight', 'server_steps',
        'server_batch_size', 'server_schedule', 'validate_every',
        'server_patience',
    ],
    'teacher_fn': ['teacher', 'teacher_learning_rate'],
    'back_distillation': ['back_distillation', 'back_steps'],
    'student_optimizer': ['student_learning_rate'],
}
# A resumed run may change these: they do not change what a round does.
_FREE_ON_RESUME = {
    'rounds', 'patience', 'output_dir', 'resume', 'rounds_per_checkpoint',
    'compare_with_fed_avg',
}


class UserError(Exception):
  """Something that the user can mend; shown as one sentence."""


def _own_flags() -> dict[str, flags.Flag]:
  by_module = flags.FLAGS.flags_by_module_dict()
  names = {sys.argv[0], __name__, '__main__'}
  return {
      flag.name: flag
      for module, its in by_module.items()
      for flag in its
      if module in names or module.endswith('pipelines/train.py')
  }


def _check_flags(algorithm: algorithms.Algorithm) -> None:
  """Refuses flags that were set for something that was not chosen."""

  def refuse(name: str, why: str) -> None:
    if flags.FLAGS[name].present:
      raise UserError(f'--{name} has no effect {why}. Leave it out.')

  for parameter, names in _FLAGS_OF_PARAMETER.items():
    if not algorithm.takes(parameter):
      for name in names:
        refuse(name, f'with --algorithm={_ALGORITHM.value}')
  if _PARTITION.value not in ('dirichlet', 'quantity_skew'):
    refuse('alpha', f'with --partition={_PARTITION.value}')
  if _PARTITION.value != 'shards':
    refuse('shards_per_client', f'with --partition={_PARTITION.value}')
  if _LOCAL_TARGET.value == 'none':
    refuse('local_weight', 'without --local_target')
  if not _BACK.value:
    refuse('back_steps', 'with --noback_distillation')
  if _TASK.value != 'idx':
    refuse('data_dir', f'with --task={_TASK.value}')
  if _CLIENTS_PER_ROUND.value > _NUM_CLIENTS.value:
    raise UserError(
        f'--clients_per_round is {_CLIENTS_PER_ROUND.value}, but there are only '
        f'{_NUM_CLIENTS.value} clients. Lower it, or raise --num_clients.'
    )
  if _TRANSFER_LABELS.value > _TRANSFER_SIZE.value:
    raise UserError(
        f'--transfer_labels is {_TRANSFER_LABELS.value}, but the transfer set has '
        f'only {_TRANSFER_SIZE.value} examples. Lower it, or raise --transfer_size.'
    )
  if _PRETRAIN_EPOCHS.value and not _TRANSFER_LABELS.value:
    raise UserError('--pretrain_epochs needs labels: set --transfer_labels.')
  if _DISTILLATION_WEIGHT.value not in (None, 1.0) and not _TRANSFER_LABELS.value:
    raise UserError(
        '--distillation_weight below 1 needs labels: set --transfer_labels.'
    )
  if _RESUME.value and not _OUTPUT_DIR.value:
    raise UserError('--resume needs the --output_dir of the run to go on with.')


def _load_task() -> tff_kd.data.Task:
  kwargs = {'data_dir': _DATA_DIR.value} if _TASK.value == 'idx' else {}
  return tff_kd.data.TASKS[_TASK.value](
      seed=_SEED.value,
      transfer_size=_TRANSFER_SIZE.value,
      validation_size=_VALIDATION_SIZE.value,
      **kwargs,
  )


def _partition(task: tff_kd.data.Task) -> list[np.ndarray]:
  kwargs = {'seed': _SEED.value}
  if _PARTITION.value in ('dirichlet', 'quantity_skew'):
    kwargs['alpha'] = _ALPHA.value
  if _PARTITION.value == 'shards':
    kwargs['shards_per_client'] = _SHARDS.value
  split = tff_kd.data.partition.PARTITIONS[_PARTITION.value]
  return split(task.clients.labels, _NUM_CLIENTS.value, **kwargs)


def _distillation(default: tff_kd.Distillation, **changes) -> tff_kd.Distillation:
  """The algorithm's default with the flags that were set."""
  changes = {k: v for k, v in changes.items() if v is not None}
  return dataclasses.replace(default, **changes)


def _target() -> Any:
  if _TARGET.value is None or _TARGET.value in ('ensemble', 'student'):
    return _TARGET.value
  try:
    return float(_TARGET.value)
  except ValueError:
    raise UserError(
        '--target must be ensemble, student or a number between 0 and 1, found '
        f'{_TARGET.value!r}.'
    ) from None


def _common_arguments(task: tff_kd.data.Task, input_spec: Any) -> dict[str, Any]:
  """What every algorithm takes, FedAvg in the comparison too."""
  return dict(
      student_fn=functools.partial(
          keras_models.STUDENTS[_STUDENT.value], task.num_classes,
          task.input_shape,
      ),
      input_spec=input_spec,
      loss_fn=task.loss_fn,
      metrics_fn=task.metrics_fn,
      client_optimizer=_OPTIMIZERS[_CLIENT_OPTIMIZER.value](_CLIENT_RATE.value),
      server_optimizer=_OPTIMIZERS[_SERVER_OPTIMIZER.value](_SERVER_RATE.value),
      client_weighting=tff.learning.ClientWeighting[_WEIGHTING.value.upper()],
  )


def _specs(process) -> dict[str, tff_kd.models.ModelSpec]:
  specs = {'student': process.student_spec, 'teacher': process.teacher_spec}
  return {name: spec for name, spec in specs.items() if spec is not None}


def _build_process(
    algorithm: algorithms.Algorithm, task: tff_kd.data.Task, common: dict[str, Any]
) -> tff_kd.DistillationProcess:
  """Builds the process from the flags."""
  kwargs = dict(common, seed=_SEED.value)
  if _LOCAL_TARGET.value != 'none':
    kwargs['local_distillation'] = tff_kd.LocalDistillation(
        target=_LOCAL_TARGET.value,
        weight=_LOCAL_WEIGHT.value,
        temperature=_TEMPERATURE.value or 1.0,
    )
  defaults = {
      name: parameter.default
      for name, parameter in inspect.signature(
          algorithm.build
      ).parameters.items()
  }
  if algorithm.takes('transfer_set'):
    has_labels = np.arange(len(task.transfer)) < _TRANSFER_LABELS.value
    kwargs['transfer_set'] = tff_kd.TransferSet(
        task.transfer.inputs,
        task.transfer.labels if has_labels.any() else None,
        label_mask=None if has_labels.all() or not has_labels.any() else has_labels,
        subset_size=_TRANSFER_PER_ROUND.value,
        validation_size=_TRANSFER_VALIDATION.value,
        seed=_SEED.value,
    )
  if algorithm.takes('teacher_fn'):
    kwargs['teacher_fn'] = functools.partial(
        keras_models.TEACHERS[_TEACHER.value], task.num_classes, task.input_shape
    )
    if _TEACHER_RATE.value is not None:
      kwargs['teacher_optimizer'] = tff.learning.optimizers.build_adam(
          _TEACHER_RATE.value
      )
  if algorithm.takes('student_optimizer') and _STUDENT_RATE.value is not None:
    kwargs['student_optimizer'] = tff.learning.optimizers.build_adam(
        _STUDENT_RATE.value
    )
  shared = dict(
      temperature=_TEMPERATURE.value,
      distillation_weight=_DISTILLATION_WEIGHT.value,
      batch_size=_SERVER_BATCH.value,
      validate_every=_VALIDATE_EVERY.value,
      patience=_SERVER_PATIENCE.value,
  )
  if algorithm.takes('distillation'):
    kwargs['distillation'] = _distillation(
        defaults['distillation'], target=_target(),
        num_steps=_SERVER_STEPS.value, **shared,
    )
    if _SCHEDULE.value is not None:
      kwargs['distillation'] = dataclasses.replace(
          kwargs['distillation'], schedule=_SCHEDULES[_SCHEDULE.value]
      )
  if algorithm.takes('back_distillation'):
    kwargs['back_distillation'] = (
        _distillation(
            defaults['back_distillation'], num_steps=_BACK_STEPS.value, **shared
        )
        if _BACK.value
        else None
    )
  # The same initial weights whatever the algorithm, given the seed.
  tf.keras.utils.set_random_seed(_SEED.value)
  return algorithm.build(**kwargs)


def _train_centrally(
    spec: tff_kd.models.ModelSpec, task: tff_kd.data.Task, epochs: int
) -> tff.learning.models.ModelWeights:
  """Training by `fit` on the server's labelled examples, from the first weights."""
  model = spec.model_fn().keras_model
  tff.learning.models.ModelWeights(*spec.initial_weights).assign_weights_to(model)
  tf.keras.utils.set_random_seed(_SEED.value)
  model.compile('adam', task.loss_fn(), task.metrics_fn())
  labelled = task.transfer.take(np.arange(_TRANSFER_LABELS.value))
  model.fit(*labelled, batch_size=32, epochs=epochs, verbose=0)
  return tff_kd.models.weights_of(model)


class _Evaluation:
  """Evaluates the models of a process on the validation and the test part."""

  @staticmethod
  def names(process: tff_kd.DistillationProcess) -> list[str]:
    """The names of the metrics."""
    found = list(_specs(process))
    if process.transfer_set is not None:
      found.append('student_before')
    return [
        f'{part}/{name}_{key}'
        for part in ('validation', 'test')
        for name in found
        for key in ('accuracy', 'loss', 'calibration_error')
    ]

  def __init__(self, process: tff_kd.DistillationProcess, task):
    self._process = process
    self._task = task
    self._student = tff_kd.evaluation.CentralEvaluator(process.student_spec)
    self._teacher = None
    if process.teacher_spec is not None:
      self._teacher = tff_kd.evaluation.CentralEvaluator(process.teacher_spec)

  def models(self, state) -> dict[str, tuple[Any, Any]]:
    """Name -> (evaluator, weights) of all models in a state."""
    found = {'student': (self._student, state.global_model_weights)}
    if self._teacher is not None:
      found['teacher'] = (self._teacher, state.teacher_weights)
    if len(state.aggregated_model_weights):
      found['student_before'] = (self._student, state.aggregated_model_weights)
    return found

  def __call__(self, state) -> dict[str, float]:
    metrics = {}
    for part in ('validation', 'test'):
      examples = getattr(self._task, part)
      for name, (evaluator, weights) in self.models(state).items():
        values = evaluator.evaluate(weights, *examples)
        for key, value in values.items():
          metrics[f'{part}/{name}_{key}'] = value
    return metrics


def _read_history(path: pathlib.Path) -> list[dict[str, float]]:
  """The rows of metrics.csv, a resumed run's earlier rounds included."""
  with open(path, newline='') as file:
    return [
        {key: float(value) for key, value in row.items() if value != ''}
        for row in csv.DictReader(file)
    ]


def _train(
    process, initial_state, task, select_clients, run_dir, prefix, num_rounds,
    patience, megabytes_per_round, monitor,
) -> tuple[tff_kd.simulation.TrainingResult, list[dict[str, float]]]:
  """Trains with a progress bar; metrics, events and checkpoints in `run_dir`."""
  bar = tqdm.tqdm(
      total=num_rounds, desc=prefix.rstrip('_') or _ALGORITHM.value, unit='round',
      file=sys.stderr, dynamic_ncols=True,
  )

  def on_round(round_num: int, metrics: Mapping[str, float]) -> None:
    shown = {'student': f"{metrics['test/student_accuracy']:.3f}"}
    if 'test/teacher_accuracy' in metrics:
      shown['teacher'] = f"{metrics['test/teacher_accuracy']:.3f}"
    shown['MB/client'] = f'{round_num * megabytes_per_round:.1f}'
    bar.n = round_num
    bar.set_postfix(shown)

  metrics_path = run_dir / f'{prefix}metrics.csv'
  try:
    result = tff_kd.simulation.train(
        process,
        initial_state=initial_state,
        select_clients=select_clients,
        num_rounds=num_rounds,
        evaluate=_Evaluation(process, task),
        monitor=monitor,
        patience=patience,
        program_state_manager=tff.program.FileProgramStateManager(
            run_dir / f'{prefix}checkpoints', keep_total=2, keep_first=False
        ),
        rounds_per_saving=_ROUNDS_PER_CHECKPOINT.value,
        release_managers=[
            tff.program.CSVFileReleaseManager(metrics_path, key_fieldname='round'),
            tff.program.TensorBoardReleaseManager(
                run_dir / 'tensorboard' / (prefix.rstrip('_') or 'main')
            ),
        ],
        on_round=on_round,
    )
  finally:
    bar.close()
  return result, _read_history(metrics_path)


def _best_row(history: list[dict[str, float]], rounds: int, monitor: str):
  """The row with the best monitored metric within the first rounds."""
  return max(
      (row for row in history if row['round'] <= rounds),
      key=lambda row: row[monitor],
  )


def _open_run_dir() -> pathlib.Path:
  """The run folder, with `config.json` in it."""
  config = {
      name: flag.value for name, flag in sorted(_own_flags().items())
  }
  if _OUTPUT_DIR.value:
    run_dir = pathlib.Path(_OUTPUT_DIR.value)
  else:
    now = datetime.datetime.now().strftime('%Y%m%d-%H%M%S')
    run_dir = pathlib.Path('runs', f'{now}-{_ALGORITHM.value}-{_TASK.value}')
  path = run_dir / 'config.json'
  if path.exists():
    if not _RESUME.value:
      raise UserError(
          f'{run_dir} already holds a run. Pass --resume to go on with it, or '
          'another --output_dir.'
      )
    before = json.loads(path.read_text())['flags']
    changed = sorted(
        name for name in config
        if name not in _FREE_ON_RESUME and config[name] != before.get(name)
    )
    if changed:
      raise UserError(
          f'The run in {run_dir} had other values of '
          + ', '.join(f'--{n} ({before.get(n)!r})' for n in changed)
          + '. Resume with the same, or start another run.'
      )
  elif _RESUME.value:
    raise UserError(f'{run_dir} holds no run to resume (no config.json).')
  run_dir.mkdir(parents=True, exist_ok=True)
  versions = {m.__name__: m.__version__ for m in (tf, tff, np)}
  path.write_text(
      json.dumps({'flags': config, 'versions': versions}, indent=2) + '\n'
  )
  return run_dir


def _save_keras(
    spec: tff_kd.models.ModelSpec, weights: Any, path: pathlib.Path
) -> None:
  model = spec.model_fn().keras_model
  weights.assign_weights_to(model)
  model.save(path)


@contextlib.contextmanager
def _errors_for_users() -> Iterator[None]:
  """Turns refusals of bad settings into one sentence, without a traceback."""
  try:
    yield
  except (ValueError, FileNotFoundError) as error:
    raise UserError(str(error)) from error


def _run() -> None:
  """The whole job."""
  with _errors_for_users():
    setup = _set_up()
  with tff_kd.simulation.local_runtime():
    _train_and_report(*setup)


def _set_up():
  """All that can be refused, before anything runs."""
  algorithm = algorithms.REGISTRY[_ALGORITHM.value]
  _check_flags(algorithm)
  task = _load_task()
  clients = _partition(task)
  client_examples = [task.clients.take(rows) for rows in clients]

  def dataset(client: int, round_num: int) -> tf.data.Dataset:
    return tff_kd.data.client_dataset(
        client_examples[client],
        batch_size=_BATCH_SIZE.value,
        epochs=_CLIENT_EPOCHS.value,
        seed=[_SEED.value, round_num, client],
    )

  sample = tff.simulation.build_uniform_sampling_fn(
      range(_NUM_CLIENTS.value), random_seed=_SEED.value
  )

  def select_clients(round_num: int) -> list[tf.data.Dataset]:
    chosen = sample(round_num, _CLIENTS_PER_ROUND.value)
    return [dataset(int(client), round_num) for client in chosen]

  common = _common_arguments(task, dataset(0, 0).element_spec)
  process = _build_process(algorithm, task, common)
  tff_kd.simulation.check_monitor(
      _MONITOR.value,
      [
          *tff_kd.simulation.process_metric_names(process),
          *_Evaluation.names(process),
      ],
  )
  run_dir = _open_run_dir()
  plots.plot_partition(
      task.clients.labels, clients, task.num_classes,
      f'{task.name}: {len(task.clients)} examples, {_PARTITION.value}',
      run_dir / 'partition.png',
  )
  print(
      f'{_ALGORITHM.value} on {task.name}: {_NUM_CLIENTS.value} clients with '
      f'{len(task.clients)} examples, {_CLIENTS_PER_ROUND.value} a round; '
      f'transfer {len(task.transfer)} ({_TRANSFER_LABELS.value} with labels), '
      f'validation {len(task.validation)}, test {len(task.test)}.'
  )
  for name, spec in _specs(process).items():
    size = sum(w.size for w in tf.nest.flatten(spec.initial_weights))
    print(f'{name}: {size:,} weights.')
  print(f'Run folder: {run_dir}', flush=True)
  return task, clients, process, common, select_clients, run_dir


def _train_and_report(
    task, clients, process, common, select_clients, run_dir
) -> None:
  per_round = tff_kd.communication.round_bytes(process)
  specs = _specs(process)
  pretrained = {}
  if _PRETRAIN_EPOCHS.value:
    pretrained = {
        name: _train_centrally(spec, task, _PRETRAIN_EPOCHS.value)
        for name, spec in specs.items()
    }

  def initial_state(of_process):
    state = of_process.initialize()
    if pretrained:
      state = of_process.set_model_weights(state, pretrained['student'])
      if of_process.teacher_spec is not None:
        state = of_process.set_teacher_weights(state, pretrained['teacher'])
    return state

  result, history = _train(
      process, initial_state(process), task, select_clients, run_dir, '',
      _ROUNDS.value, _PATIENCE.value or None, per_round.total / 1e6,
      _MONITOR.value,
  )
  evaluation = _Evaluation(process, task)
  for name, (_, weights) in evaluation.models(result.best_state).items():
    if name in specs:
      _save_keras(specs[name], weights, run_dir / f'{name}.keras')

  baseline = None
  if _FEDAVG.value and _ALGORITHM.value != 'fed_avg':
    tf.keras.utils.set_random_seed(_SEED.value)
    fed_avg = algorithms.build_fed_avg(**common)
    fed_avg_bytes = tff_kd.communication.round_bytes(fed_avg)
    more_rounds = max(
        result.round_num,
        result.round_num * per_round.total // fed_avg_bytes.total,
    )
    _, baseline = _train(
        fed_avg, initial_state(fed_avg), task, select_clients, run_dir,
        'fed_avg_', more_rounds, None, fed_avg_bytes.total / 1e6,
        'validation/student_accuracy',
    )
  _report(
      task, clients, process, evaluation, result, history, baseline,
      fed_avg_bytes.total if baseline else 0, run_dir,
  )


def _report(
    task, clients, process, evaluation, result, history, baseline,
    baseline_bytes, run_dir,
) -> None:
  """Prints the table and draws the curves."""
  test_split = tff_kd.data.partition.matching(
      task.clients.labels, clients, task.test.labels, seed=_SEED.value
  )
  client_tests = [
      tff_kd.data.client_dataset(
          task.test.take(rows), batch_size=64, epochs=1, seed=[0]
      )
      for rows in test_split
  ]
  names = {
      'student': 'student',
      'teacher': 'teacher',
      'student_before': 'student before back-distillation',
  }
  if not _BACK.value or process.teacher_spec is None:
    names['student_before'] = "student before the server's distillation"
  rows = [(
      'model', 'round', 'accuracy', 'calibration error',
      'clients: mean', '10th pct.', 'worst',
  )]
  specs = _specs(process)
  for name, (_, weights) in evaluation.models(result.best_state).items():
    test = _best_row(history, result.round_num, _MONITOR.value)
    by_client = tff_kd.evaluation.evaluate_clients(
        specs.get(name, process.student_spec), weights, client_tests,
        metric='accuracy',
    )
    rows.append((
        names[name], str(result.best_round),
        f"{test[f'test/{name}_accuracy']:.4f}",
        f"{test[f'test/{name}_calibration_error']:.4f}",
        f'{by_client.mean:.4f}', f'{by_client.percentile_10:.4f}',
        f'{by_client.worst:.4f}',
    ))
  per_round = tff_kd.communication.round_bytes(process)
  test_column = 'test/student_accuracy'
  curves = {
      names[name]: (
          [row['round'] for row in history],
          [row['round'] * per_round.total / 1e6 for row in history],
          [row[f'test/{name}_accuracy'] for row in history],
      )
      for name in names
      if f'test/{name}_accuracy' in history[0]
  }
  if baseline is not None:
    rounds_at_bytes = int(baseline[-1]['round'])
    for label, rounds in (
        ('FedAvg, same rounds', result.round_num),
        ('FedAvg, same bytes', rounds_at_bytes),
    ):
      best = _best_row(baseline, rounds, 'validation/student_accuracy')
      rows.append((
          label, f"{best['round']:.0f}", f'{best[test_column]:.4f}',
          f"{best['test/student_calibration_error']:.4f}", '', '', '',
      ))
    curves['FedAvg'] = (
        [row['round'] for row in baseline],
        [row['round'] * baseline_bytes / 1e6 for row in baseline],
        [row[test_column] for row in baseline],
    )
  if _TRANSFER_LABELS.value:
    # What the server could do without any client: the honest lower bound.
    for name, spec in specs.items():
      evaluator, _ = evaluation.models(result.best_state)[name]
      alone = _train_centrally(spec, task, _ALONE_EPOCHS)
      values = evaluator.evaluate(alone, *task.test)
      rows.append((
          f"{name} on the server's {_TRANSFER_LABELS.value} labels alone", '',
          f"{values['accuracy']:.4f}", f"{values['calibration_error']:.4f}",
          '', '', '',
      ))
  plots.plot_curves(curves, run_dir / 'curves.png')
  print()
  tables.print_table(rows)
  print()
  ending = 'converged' if result.converged else 'reached the number of rounds'
  print(
      f'Ended after round {result.round_num} ({ending}); the best round by '
      f'{_MONITOR.value} is kept. Accuracy on {len(task.test)} test examples.'
  )
  print(
      f'MB per client and round: {per_round.up / 1e6:.3f} up '
      f'({per_round.up_knowledge / 1e6:.3f} of them predictions), '
      f'{per_round.down / 1e6:.3f} down.'
  )
  seconds = [row[tff_kd.simulation.ROUND_SECONDS] for row in history]
  print(f'Seconds per round: {np.median(seconds):.2f} (median).')
  if baseline is not None:
    goal = baseline[min(result.round_num, len(baseline)) - 1][test_column]
    reached = next((r['round'] for r in history if r[test_column] >= goal), None)
    print(
        f"FedAvg's accuracy after {result.round_num} rounds is {goal:.4f}; the "
        + (
            f'student reached it in round {reached:.0f}.'
            if reached is not None
            else 'student did not reach it.'
        )
    )


def main(argv: list[str]) -> Optional[int]:
  if len(argv) > 1:
    raise app.UsageError(f'Not a flag: {argv[1:]}.')
  tf.get_logger().setLevel('ERROR')
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)
  try:
    _run()
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print('Stopped. Checkpoints are kept; --resume goes on.', file=sys.stderr)
    return 130
  return 0


if __name__ == '__main__':
  app.run(main)
