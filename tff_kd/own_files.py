"""Python files of the user's own: a task, an algorithm, a consensus rule."""

import functools
import importlib.util
import pathlib
import sys
from typing import Any


def is_own(name: str) -> bool:
  """Returns whether a name is the path of a user's file.

  Args:
    name: A value of a flag, such as `--task`.
  """
  return name.endswith('.py')


def load(path: str) -> Any:
  """Returns the module of a file, which is loaded once.

  It may import modules beside it, as a script may; installed ones come first.

  Args:
    path: The file's path.

  Raises:
    ValueError: If there is no such file.
  """
  return _load(pathlib.Path(path).resolve(), path)


@functools.cache
def _load(file: pathlib.Path, path: str) -> Any:
  if not file.is_file():
    raise ValueError(f'There is no file {path}.')
  folder = str(file.parent)
  if folder not in sys.path:
    sys.path.append(folder)
  spec = importlib.util.spec_from_file_location(f'tff_kd_own_{file.stem}', file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
