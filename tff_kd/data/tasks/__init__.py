"""The tasks by name, without their data: imports no TensorFlow.

Each task is one file here with a function `load(*, seed, transfer_size,
validation_size, ...)` that returns a `Task`.
"""

from collections.abc import Mapping
import importlib
import importlib.util
import inspect
import pathlib
from typing import Any, Callable, NamedTuple, Optional

_IMAGE_MODELS = ('cnn', 'document', 'resnet')


class TaskInfo(NamedTuple):
  """A row of the registry.

  Attributes:
    name: That of its module here.
    summary: One line for a list of tasks.
    students: The names of its student models.
    teachers: Of its teachers.
    defaults: Its own defaults of flags of `pipelines.train`.
    algorithm_defaults: By algorithms, what is above those.
    has_clients: Whether its data have clients of their own, which are then not split by a
      partition.
    options: Arguments of its `load` beyond those all have.
  """

  name: str
  summary: str
  students: tuple[str, ...] = _IMAGE_MODELS
  teachers: tuple[str, ...] = _IMAGE_MODELS
  defaults: Mapping[str, Any] = {}
  algorithm_defaults: Mapping[tuple[str, ...], Mapping[str, Any]] = {}
  has_clients: bool = False
  options: tuple[str, ...] = ()
  path: Optional[str] = None

  def defaults_with(self, algorithm: str) -> dict[str, Any]:
    """Its defaults of flags where an algorithm is run."""
    found = dict(self.defaults)
    for those, defaults in self.algorithm_defaults.items():
      if algorithm in those:
        found.update(defaults)
    return found

  @property
  def load(self) -> Callable[..., Any]:
    """Its `load` function: seed, transfer_size, validation_size -> `Task`."""
    if self.path is not None:
      return _own_module(self.path).load
    return importlib.import_module(f'{__name__}.{self.name}').load


# A new task is one file and one entry.
TASKS = {
    info.name: info
    for info in (
        TaskInfo('mnist5k', '5,000 images of digits, in an installed package'),
        TaskInfo(
            'idx', 'any data set in IDX files, such as MNIST, in --data_dir',
            options=('data_dir',),
        ),
        TaskInfo(
            'fashion_mnist', '70,000 images of clothes; downloaded',
            defaults={'num_clients': 100, 'clients_per_round': 10},
        ),
        TaskInfo(
            'cifar10', '60,000 colour images of ten kinds of things; downloaded',
            defaults={
                'num_clients': 100, 'clients_per_round': 10, 'student': ['cnn'],
                'teacher': 'resnet',
            },
        ),
        TaskInfo(
            'emnist', 'handwritten digits by 3,383 writers; downloaded',
            defaults={'num_clients': 3383, 'clients_per_round': 20, 'student': ['cnn']},
            has_clients=True,
        ),
        TaskInfo(
            'shakespeare', 'the next character, by 562 speaking roles of 34 plays',
            students=('gru',), teachers=('gru',),
            defaults={
                'student': ['gru'], 'teacher': 'gru', 'mentor': 'gru',
                'num_clients': 562, 'clients_per_round': 10, 'client_epochs': 1,
                'batch_size': 4, 'client_learning_rate': 2.0, 'transfer_size': 4000,
                # A text has its next characters.
                'transfer_labels': 4000, 'transfer_per_round': 100,
                'validation_size': 200, 'server_steps': 60, 'server_batch_size': 32,
                'back_steps': 60, 'teacher_learning_rate': 0.003,
            },
            algorithm_defaults={
                ('fed_df',): {'server_steps': 30},
                # Not of FedDF: its student needs the rest of the predictions.
                ('fed_distillation',): {
                    'consensus': 'mean_probabilities', 'prediction_top': 5,
                    'transfer_per_round': 400,
                },
                ('fed_aux',): {'transfer_labels': 3000},
            },
            has_clients=True,
        ),
        TaskInfo(
            'newsgroups', 'posts of 20 newsgroups, by topic',
            students=('embedding',), teachers=('attention',),
            defaults={
                'student': ['embedding'], 'teacher': 'attention', 'mentor': 'attention',
                'client_optimizer': 'adam', 'client_learning_rate': 0.01,
                'transfer_size': 3000, 'transfer_labels': 600, 'server_steps': 120,
                'teacher_learning_rate': 0.003,
            },
        ),
        TaskInfo(
            'movielens', 'stars that 843 people give to films; a regression',
            students=('factors',), teachers=('deep',),
            defaults={
                'student': ['factors'], 'teacher': 'deep', 'mentor': 'deep',
                'num_clients': 843, 'clients_per_round': 40, 'client_epochs': 2,
                'server_optimizer': 'adam', 'server_learning_rate': 0.01, 'rounds': 80,
                'transfer_size': 18_000, 'transfer_per_round': 4000,
                'transfer_labels': 9000, 'validation_size': 2000,
                'distillation_weight': 0.95, 'server_steps': 120,
                'server_batch_size': 128, 'back_steps': 30,
                'teacher_learning_rate': 0.002, 'student_learning_rate': 0.0003,
            },
            has_clients=True,
        ),
    )
}


def is_own(name: str) -> bool:
  """Whether a task is a file of the user's."""
  return name.endswith('.py')


def task_info(name: str) -> TaskInfo:
  """The task of a name, or of a user's own file.

  The file has a function `load(*, seed, transfer_size, validation_size, ...)` that
  returns a `tff_kd.data.Task`, and may have a dict `DEFAULTS` of its own defaults of
  flags.

  Args:
    name: As in `TASKS`, or the path of a Python file.

  Raises:
    ValueError: If there is no such task, or the file has no `load`.
  """
  if not is_own(name):
    if name not in TASKS:
      raise ValueError(
          f'There is no task {name!r} among {", ".join(TASKS)}; the path of a file of '
          'your own ends in .py.'
      )
    return TASKS[name]
  module = _own_module(name)
  options = set(inspect.signature(module.load).parameters)
  options -= {'seed', 'transfer_size', 'validation_size'}
  return TaskInfo(
      pathlib.Path(name).stem, 'of your own', students=(), teachers=(),
      defaults=getattr(module, 'DEFAULTS', {}), options=tuple(sorted(options)),
      path=name,
  )


_OWN_MODULES = {}


def _own_module(name: str) -> Any:
  path = pathlib.Path(name).resolve()
  if path in _OWN_MODULES:
    return _OWN_MODULES[path]
  if not path.is_file():
    raise ValueError(f'There is no file {name} with a task.')
  spec = importlib.util.spec_from_file_location(f'own_task_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not callable(getattr(module, 'load', None)):
    raise ValueError(
        f'{name} must have a function load(*, seed, transfer_size, validation_size) that '
        'returns a tff_kd.data.Task, and has none.'
    )
  _OWN_MODULES[path] = module
  return module
