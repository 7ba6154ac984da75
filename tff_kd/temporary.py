"""This process's own temporary folder, which goes with the process however that ends.

The folder is locked as long as its process lives. One that exits removes it; one that is
killed cannot, but its lock goes with it, and the next process that makes a folder removes
those that nobody holds. No handler of signals is needed, nor installed.
"""

import atexit
import fcntl
import os
import pathlib
import platform
import re
import shutil
import tempfile
import threading
from typing import Any, Optional

_lock = threading.Lock()
# The folder, once there is one.
_folder: Optional[pathlib.Path] = None


def new_directory(prefix: str) -> pathlib.Path:
  """Makes an empty folder that only its owner reads, inside this process's own.

  Args:
    prefix: The beginning of its name.
  """
  return pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=_own_folder()))


def named_file(*args, **kwargs) -> Any:
  """Opens a `tempfile.NamedTemporaryFile`, in this process's own folder by default."""
  if kwargs.get('dir') is None:
    kwargs['dir'] = _own_folder()
  return tempfile.NamedTemporaryFile(*args, **kwargs)


def _own_folder() -> pathlib.Path:
  """Returns the folder; the first call makes it, and removes those of dead processes."""
  global _folder
  with _lock:
    if _folder is None:
      parent = pathlib.Path(tempfile.gettempdir())
      _sweep(parent)
      _folder = _make(parent)
      atexit.register(_remove, _folder, os.getpid())
    return _folder


def _make(parent: pathlib.Path) -> pathlib.Path:
  """Makes a folder, whose lock this process keeps until it ends."""
  prefix = f'tff_kd_{platform.node()}_{os.getpid()}_'
  while True:
    path = tempfile.mkdtemp(prefix=prefix, dir=parent)  # Its mode is 0700.
    try:
      folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
      continue  # Swept before it was locked.
    try:
      fcntl.flock(folder, fcntl.LOCK_EX)
    except OSError:
      pass  # A file system without locks: nobody can take one to sweep it, either.
    if os.path.exists(path):
      # The lock lasts as long as `folder` is open, here or in a process that was forked.
      return pathlib.Path(path)
    os.close(folder)


def _sweep(parent: pathlib.Path) -> None:
  """Removes the folders of this user and machine that no process holds."""
  # Only this machine's: machines that share a folder may not see each other's locks.
  name = re.compile(rf'tff_kd_{re.escape(platform.node())}_\d+_\w{{8}}')
  for path in parent.iterdir():
    if not name.fullmatch(path.name):
      continue
    try:
      folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
      continue  # Gone by now.
    try:
      if os.fstat(folder).st_uid == os.getuid():
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    except OSError:
      pass  # Its process lives.
    finally:
      os.close(folder)


def _remove(folder: pathlib.Path, owner: int) -> None:
  if os.getpid() == owner:  # And not a process that it forked.
    shutil.rmtree(folder, ignore_errors=True)


def _forget() -> None:
  """Lets a forked process make a folder of its own."""
  global _folder, _lock
  _folder, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)
