"""The tasks by name, without their data: imports no TensorFlow.

Each task is one file here with a function `load(*, seed, transfer_size,
validation_size, ...)` that returns a `Task`.
"""

import importlib
import inspect
import pathlib
from typing import Any, Callable, NamedTuple, Optional

from tff_kd import checks
from tff_kd import own_files

_IMAGE_STUDENTS = ('cnn', 'mlp_small', 'resnet')
_IMAGE_TEACHERS = ('cnn', 'mlp_large', 'resnet')


class TaskInfo(NamedTuple):
  """A row of the registry.

  Attributes:
    name: The name of its module here.
    summary: One line for a list of tasks.
    students: The names of its student models.
    teachers: The names of its teacher models.
    has_clients: Whether its data have clients of their own, which are then not split by
      a partition.
    options: Arguments of its `load` beyond those that all tasks have.
    path: The file of a user's own task, `None` for those of the package.
  """

  name: str
  summary: str
  students: tuple[str, ...] = _IMAGE_STUDENTS
  teachers: tuple[str, ...] = _IMAGE_TEACHERS
  has_clients: bool = False
  options: tuple[str, ...] = ()
  path: Optional[str] = None

  @property
  def load(self) -> Callable[..., Any]:
    """The task's `load` function: seed, transfer_size, validation_size -> `Task`."""
    if self.path is not None:
      return own_files.load(self.path).load
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
        TaskInfo('fashion_mnist', '70,000 images of clothes; downloaded'),
        TaskInfo('cifar10', '60,000 colour images of ten kinds of things; downloaded'),
        TaskInfo(
            'emnist', 'handwritten digits by 3,383 writers; downloaded',
            has_clients=True,
        ),
        TaskInfo(
            'shakespeare', 'the next character, by 562 speaking roles of 34 plays',
            students=('gru',), teachers=('gru',), has_clients=True,
        ),
        TaskInfo(
            'newsgroups', 'posts of 20 newsgroups, by topic',
            students=('embedding',), teachers=('attention',),
        ),
        TaskInfo(
            'movielens', 'stars that 843 people give to films; a regression',
            students=('factors',), teachers=('deep',), has_clients=True,
        ),
    )
}


def task_info(name: str) -> TaskInfo:
  """Returns the task of a name, or of a user's own file.

  The file has a function `load(*, seed, transfer_size, validation_size, ...)` that
  returns a `tff_kd.data.Task`.

  Args:
    name: As in `TASKS`, or the path of a Python file.

  Raises:
    ValueError: If there is no such task, or the file has no `load`.
  """
  if not own_files.is_own(name):
    if name not in TASKS:
      raise ValueError(
          f'There is no task {name!r} among {", ".join(TASKS)}; the path of a file of '
          f'your own ends in .py.{checks.did_you_mean(name, TASKS)}'
      )
    return TASKS[name]
  module = own_files.load(name)
  if not callable(getattr(module, 'load', None)):
    raise ValueError(
        f'{name} must have a function load(*, seed, transfer_size, validation_size) that '
        'returns a tff_kd.data.Task, and has none.'
    )
  options = set(inspect.signature(module.load).parameters)
  options -= {'seed', 'transfer_size', 'validation_size'}
  return TaskInfo(
      pathlib.Path(name).stem, 'of your own', students=(), teachers=(),
      options=tuple(sorted(options)), path=name,
  )
