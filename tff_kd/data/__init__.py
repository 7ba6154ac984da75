"""Tasks (one file each) and how their examples are split over clients."""

import functools
import importlib
from typing import Any

from tff_kd import _lazy
from tff_kd.data import partition


def _load(name: str, **kwargs) -> Any:
  return importlib.import_module(f'{__name__}.{name}').load(**kwargs)


# Flag value -> the function that loads it. A new task is one file and one line.
TASKS = {name: functools.partial(_load, name) for name in ('idx', 'mnist5k')}

__getattr__, __dir__ = _lazy.attach(
    __name__,
    {name: name for name in TASKS}
    | {name: 'tasks' for name in ('client_dataset', 'Examples', 'Task')},
)
