"""TensorFlow's log lines: quiet unless the user has set the level.

TensorFlow takes the level from TF_CPP_MIN_LOG_LEVEL (0 shows information, 1 warnings, 2
errors, 3 what is fatal), but writes some lines, of GPU libraries that are not there,
before it reads that. Errors of a computation are Python's exceptions at any level.

Imports no TensorFlow.
"""

from collections.abc import Iterator
import contextlib
import importlib.abc
import importlib.util
import os
import subprocess
import sys
from typing import Any, Optional

LEVEL = 'TF_CPP_MIN_LOG_LEVEL'
# Made by the driver of a GPU, or by WSL. Where there is a GPU, errors about it are shown.
_GPUS = ('/dev/nvidiactl', '/dev/nvidia0', '/dev/dxg')
_SEVERITIES = 'IWE'
_FILTER_SECONDS = 5.0


def level() -> int:
  """Returns the level that the environment sets; 0 without one, or without a number."""
  text = os.environ.get(LEVEL, '')
  return int(text) if text.isdecimal() else 0


def quiet_tensorflow() -> None:
  """Sets the level if the user has not, and has TensorFlow keep it while it is imported.

  Does nothing if TensorFlow is imported already.
  """
  if 'tensorflow' in sys.modules:
    return
  has_gpu = any(map(os.path.exists, _GPUS))
  os.environ.setdefault(LEVEL, '2' if has_gpu else '3')
  if level() and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
    sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
  """Finds TensorFlow as others do, and has it loaded with a filtered log, once."""

  def find_spec(self, fullname, path=None, target=None):
    if fullname != 'tensorflow':
      return None
    sys.meta_path.remove(self)
    spec = importlib.util.find_spec(fullname)
    if spec is not None and spec.loader is not None:
      loader: Any = spec.loader
      exec_module = loader.exec_module

      def exec_quietly(module):
        del loader.exec_module  # The loader's own is used from now on.
        with filtered_stderr(level()):
          exec_module(module)

      loader.exec_module = exec_quietly
    return spec


@contextlib.contextmanager
def filtered_stderr(min_level: int) -> Iterator[None]:
  """Keeps absl's log lines below a level from the process's standard error.

  Another process (`grep`) filters, so that what this one writes when it is killed is
  shown. Without `grep`, or without a standard error, all lines are shown.

  Args:
    min_level: Lines of lower severity are left out: 1 leaves out information, 2 also
      warnings, 3 also errors.
  """
  kept = _start_filter(_SEVERITIES[:min_level])
  if kept is None:
    yield
    return
  stderr, process = kept
  try:
    yield
  finally:
    # There may be no stream, or a closed one.
    with contextlib.suppress(AttributeError, ValueError):
      sys.stderr.flush()
    os.dup2(stderr, 2)
    os.close(stderr)
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(_FILTER_SECONDS)


def _start_filter(severities: str) -> Optional[tuple[int, subprocess.Popen]]:
  """Puts `grep` before the standard error; returns that and the process."""
  # As I0000 00:00:1795812589.579664    1258 cudart_stub.cc:31] Could not find ...
  pattern = (
      r'^WARNING: All log messages before absl::InitializeLog\(\) is called'
      rf'|^[{severities}][0-9]{{4}} [0-9:.]+ +[0-9]+ [A-Za-z0-9_]+\.cc:[0-9]+\] '
  )
  try:
    stderr = os.dup(2)
  except OSError:
    return None
  try:
    process = subprocess.Popen(
        ['grep', '--line-buffered', '-a', '-v', '-E', pattern], stdin=subprocess.PIPE,
        stdout=stderr, stderr=subprocess.DEVNULL, env={**os.environ, 'LC_ALL': 'C'},
    )
  except OSError:
    os.close(stderr)
    return None
  os.dup2(process.stdin.fileno(), 2)
  process.stdin.close()
  return stderr, process
