"""Folders of runs: which there are, and what is read and written; no TensorFlow."""

from collections.abc import Sequence
import csv
import itertools
import json
import pathlib
from typing import Any, Optional

from pipelines import tables
from pipelines import UserError

# Where `pipelines.train` makes folders of runs.
RUNS = pathlib.Path('runs')
# What a run leaves: its flags, a row for each round, and, once it is over, the results.
CONFIG, METRICS, RESULTS = 'config.json', 'metrics.csv', 'results.json'
_MAX_LISTED = 10
# The same as `tff_kd.communication.CLIENT_BYTES`, which needs TensorFlow.
_CLIENT_BYTES = 'bytes/client'


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
  if not (folder / CONFIG).is_file():
    raise UserError(
        f'--run={path} holds no run: there is no {CONFIG} of pipelines.train in it. '
        + _those_there(script)
    )
  return folder


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes a file of JSON, whole or not at all.

  Args:
    path: The file; what is there stays until the new one is complete.
    content: What JSON can hold.
  """
  # Written beside it first: a full disk would leave half of the file.
  partial = path.with_name(f'{path.name}.partial')
  partial.write_text(json.dumps(content, indent=2) + '\n')
  partial.replace(path)


def read_history(path: pathlib.Path) -> list[dict[str, float]]:
  """Returns the rows of metrics.csv, those of a resumed run's earlier rounds included."""
  with open(path, newline='') as file:
    return [
        {key: float(value) for key, value in row.items() if value}
        for row in csv.DictReader(file)
    ]


def megabytes(history: Sequence[dict[str, float]]) -> list[float]:
  """Returns the mean MB that a participating client has moved up to each round."""
  moved = itertools.accumulate(row[_CLIENT_BYTES] for row in history)
  return [size / 1e6 for size in moved]


def moved_rows(
    history: Sequence[dict[str, float]], client: str
) -> list[tuple[str, ...]]:
  """Returns rows of a table with the MB moved in all rounds, and in one.

  Args:
    history: The rows of metrics.csv.
    client: The name of the last row, of a participating client; the other rows are
      of all clients, by channel.
  """
  channels = {
      name: tables.words(name.removeprefix('bytes/'))
      for name in history[0] if name.startswith('bytes/') and name != _CLIENT_BYTES
  }
  rows: list[tuple[str, ...]] = []
  for name, shown in (channels | {_CLIENT_BYTES: client}).items():
    total = sum(row.get(name, 0.0) for row in history) / 1e6
    rows.append((shown, f'{total:.4g}', f'{total / len(history):.3g}'))
  return rows


def _those_there(script: str) -> str:
  """Says which runs there are, the newest first, and how to pass one."""
  found = sorted(
      RUNS.glob(f'*/{CONFIG}'), key=lambda path: path.stat().st_mtime, reverse=True
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
