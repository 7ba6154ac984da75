"""The data of a run and its clients, as flags say."""

from collections.abc import Callable, Sequence
import inspect
from typing import Any, Optional

from absl import flags
import numpy as np

from pipelines import task_defaults
from pipelines import train_checks
from pipelines import train_flags as args
from pipelines import UserError
import tff_kd

# These look at no labels.
_PARTITIONS_BY_SIZE = ('iid', 'quantity_skew')


def load_task() -> tff_kd.data.Task:
  """Loads the task, and checks the flags that depend on its data."""
  info = tff_kd.data.task_info(args.TASK.value)
  task = info.load(
      seed=args.SEED.value,
      transfer_size=args.TRANSFER_SIZE.value,
      validation_size=args.VALIDATION_SIZE.value,
      **_data_dir(info),
  )
  if not isinstance(task, tff_kd.data.Task):
    raise UserError(
        f'--task={args.TASK.value}: its load must return a tff_kd.data.Task, found '
        f'{type(task).__name__}.'
    )
  if info.path is not None:
    _apply_task_defaults(task)
  # A user's own task may have fewer transfer examples than --transfer_size.
  there = len(task.transfer)
  num_labelled = there if task.num_labelled is None else min(task.num_labelled, there)
  if args.TRANSFER_LABELS.value > num_labelled:
    if flags.FLAGS['transfer_labels'].present:
      raise UserError(
          f'--transfer_labels is {args.TRANSFER_LABELS.value}, but only '
          f'{num_labelled} of the {there} transfer examples of {task.name} have labels. '
          'Lower it, or raise --transfer_size.'
      )
    flags.FLAGS['transfer_labels'].value = num_labelled
  return task


def _data_dir(info: tff_kd.data.tasks.TaskInfo) -> dict[str, str]:
  """Returns --data_dir as an argument of a task's `load`, if it is given."""
  if args.DATA_DIR.value is not None:
    return {'data_dir': args.DATA_DIR.value}
  parameter = inspect.signature(info.load).parameters.get('data_dir')
  if parameter is not None and parameter.default is parameter.empty:
    raise UserError(
        f'--task={args.TASK.value} needs --data_dir, the folder of its data; it is not '
        'given.'
    )
  return {}


def _apply_task_defaults(task: tff_kd.data.Task) -> None:
  """Sets flags that were not given to the defaults of the user's task."""
  defaults: dict[str, Any] = {}
  train_checks.check_partition(task.client_rows is not None)
  has_classes = task.class_numbers(task.clients) is not None
  if task.client_rows is not None:
    count = len(task.client_rows)
    defaults = {
        'num_clients': count,
        'clients_per_round': min(count, args.CLIENTS_PER_ROUND.value),
    }
  elif not has_classes:
    defaults = {'partition': 'iid'}
  defaults |= {
      'student': [next(iter(task.students))], 'teacher': next(iter(task.teachers)),
      'mentor': next(iter(task.teachers)),
      'transfer_size': len(task.transfer),
      'transfer_labels': min(args.TRANSFER_LABELS.value, len(task.transfer)),
  }
  if args.algorithm().name == 'fed_distillation' and has_classes:
    defaults |= task_defaults.ALIGNED
  settled = args.settled(
      task_defaults.defaults_of(args.TASK.value, args.ALGORITHM.value)
  )
  for name, value in defaults.items():
    if name not in settled:
      flags.FLAGS[name].value = value
  train_checks.check_models_of(task)


def split_clients(task: tff_kd.data.Task) -> Sequence[np.ndarray]:
  """Returns the rows of each client's examples."""
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
  """Returns which clients of the data are used: all, or --num_clients at random."""
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
  """Returns the clients' names: those of the data, or their numbers.

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
  """Returns each client's rows of the test part: its own, or drawn like its classes."""
  if task.test_rows is not None:
    return [task.test_rows[k] for k in _clients_used(task)]
  classes = task.class_numbers(task.clients)
  if classes is None:
    rows = np.random.default_rng(args.SEED.value).permutation(len(task.test))
    return [np.sort(part) for part in np.array_split(rows, len(clients))]
  return tff_kd.data.partition.matching(
      classes, clients, task.class_numbers(task.test), seed=args.SEED.value
  )


def build_batches(
    task: tff_kd.data.Task, clients: Sequence[np.ndarray]
) -> tff_kd.ClientBatches:
  """Returns how clients read their examples, given the rows of each."""
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


def cohort_fn(num_cohorts: int) -> Optional[Callable[[int], int]]:
  """Returns the function of a client's number to its cohort; `None` without cohorts."""
  return (lambda client: client % num_cohorts) if num_cohorts > 1 else None


def build_participation(
    batches: tff_kd.ClientBatches,
) -> tff_kd.simulation.Participation:
  """Builds the participation and the client faults from the flags."""
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
      cohort_fn=cohort_fn(len(args.STUDENT.value)),
      gives_conditions=args.MIN_REPORTS.value > 0,
      seed=args.SEED.value,
  )
