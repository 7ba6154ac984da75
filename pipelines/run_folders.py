"""Folders of runs: which one is asked for, and which there are; no TensorFlow."""

import json
import pathlib
from typing import Any, Optional

from pipelines import UserError

# Where `pipelines.train` makes them.
RUNS = pathlib.Path('runs')
_CONFIG = 'config.json'
_MAX_LISTED = 10


def chosen(path: Optional[str], script: str) -> pathlib.Path:
  """Returns the folder that --run names.

  Args:
    path: The flag's value, `None` if it is not given.
    script: The script that is called, such as 'evaluate'.

  Raises:
    UserError: If it is not given, or names no run; lists the runs that are there.
  """
  if path is None:
    raise UserError(f'--run must name the folder of a run. {_those_there(script)}')
  folder = pathlib.Path(path)
  if not (folder / _CONFIG).is_file():
    raise UserError(
        f'--run={path} holds no run: there is no {_CONFIG} of pipelines.train in it. '
        + _those_there(script)
    )
  return folder


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes a file of JSON, whole or not at all.

  Args:
    path: The file; what is there stays until the new one is complete.
    content: What JSON can hold.
  """
  # Not in its place: a full disk would leave half of it.
  partial = path.with_name(f'{path.name}.partial')
  partial.write_text(json.dumps(content, indent=2) + '\n')
  partial.replace(path)


def _those_there(script: str) -> str:
  """Says which runs there are, the newest first, and how to pass one."""
  found = sorted(
      RUNS.glob(f'*/{_CONFIG}'), key=lambda path: path.stat().st_mtime, reverse=True
  )
  folders = [str(path.parent) for path in found]
  if not folders:
    return (
        f'There is none in {RUNS.absolute()}: `python -m pipelines.train` makes one, or '
        'name a folder that you gave as --output_dir.'
    )
  listed = ''.join(f'\n  {folder}' for folder in folders[:_MAX_LISTED])
  more = len(folders) - _MAX_LISTED
  if more > 0:
    listed += f'\n  and {more} more'
  return (
      f'For example: python -m pipelines.{script} --run={folders[0]}\n'
      f'Those in {RUNS}/, the newest first:{listed}'
  )
