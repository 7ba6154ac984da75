"""Draws the pictures under docs/results from the tables of the pages, and from runs.

  python docs/draw_results.py         # those of tables
  python docs/draw_results.py runs    # and those of the runs in this folder
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import csv
import functools
import json
import pathlib
import re
import sys
from typing import Any

import numpy as np

from tff_kd import plots

FOLDER = pathlib.Path(__file__).with_name('results')
_SCORE = re.compile(r'(0?\.\d+)(?: ± (0?\.\d+))?')
_A_ROUND = 'MB moved per participating client in a round (up and down)'


def tables(page: str) -> list[list[list[str]]]:
  """Returns the tables of a page: rows of cells, without marks; the head first.

  Args:
    page: The file's name.
  """
  text = (FOLDER / page).read_text()
  found = []
  for block in re.findall(r'(?m)(?:^ *\|.*\n)+', text):
    rows = [line.strip().strip('|').split('|') for line in block.splitlines()]
    rows = [[re.sub(r'[`*]', '', cell).strip() for cell in row] for row in rows]
    found.append([row for row in rows if set(''.join(row)) - set('-')])
  return found


def _score(cell: str) -> tuple[float, float]:
  """Returns the mean and the deviation, 0 where there is none."""
  mean, deviation = _SCORE.match(cell).groups('0')
  return float(mean), float(deviation)


def _without_note(name: str) -> str:
  return re.sub(r' \(\d\)$', '', name)


def _points(table: Sequence[Sequence[str]], column: str) -> dict[str, tuple[float, ...]]:
  """Returns by the first cell the MB a round and the score of a column."""
  head, *rows = table
  return {
      _without_note(row[0]): (
          float(_without_note(row[head.index('MB a round')])),
          *_score(row[head.index(column)]),
      )
      for row in rows
  }


def _rows(
    table: Sequence[Sequence[str]], columns: Mapping[str, str]
) -> dict[str, dict[str, tuple[float, float]]]:
  """Returns by the first cell the scores of columns that have another name here."""
  head, *rows = table
  return {
      row[0]: {
          name: _score(row[head.index(column)]) for column, name in columns.items()
          if _SCORE.match(row[head.index(column)])
      }
      for row in rows
  }


def _algorithms() -> Any:
  return plots.comparison(
      _points(tables('algorithms.md')[0], 'alpha .1'), metric="student's test accuracy",
      against=_A_ROUND, title='MNIST-5k without labels on the server, alpha .1',
  )


def _bytes() -> Any:
  return plots.comparison(
      _points(tables('bytes.md')[0], 'student'), metric="student's test accuracy",
      against=_A_ROUND, title='MNIST-5k without labels on the server, alpha .1',
  )


def _client_faults() -> Any:
  columns = {
      'FedAvg': 'FedAvg', 'FedDF': 'FedDF',
      'fed_distillation: student': 'fed_distillation: student',
      'teacher': 'fed_distillation: teacher',
  }
  rows = _rows(tables('client_faults.md')[0], columns)
  return plots.scores(rows, metric='test accuracy')


def _privacy() -> Any:
  """A row for each model; a point for each epsilon."""
  found = {}
  algorithm = ''
  for first, epsilon, student, teacher, *_ in tables('privacy.md')[0][1:]:
    algorithm = first or algorithm
    noise = 'without noise' if epsilon == 'none' else f'epsilon {epsilon}'
    found.setdefault(f'{algorithm}: student', {})[noise] = _score(student)
    if teacher:
      found.setdefault(f'{algorithm}: teacher', {})[noise] = _score(teacher)
  return plots.scores(found, metric='test accuracy')


def _ablation() -> Any:
  columns = {
      'student': 'student: best round',
      'its last ten rounds': 'student: last ten rounds',
  }
  return plots.scores(_rows(tables('unlabelled.md')[1], columns), metric='test accuracy')


def _task(number: int, metric: str) -> Any:
  columns = {'student': 'student', 'teacher': 'teacher'}
  return plots.scores(_rows(tables('tasks.md')[number], columns), metric=metric)


# By file, what draws it from a table.
PICTURES: dict[str, Callable[[], Any]] = {
    'algorithms-alpha-0.1.png': _algorithms,
    'bytes.png': _bytes,
    'client_faults.png': _client_faults,
    'privacy.png': _privacy,
    'ablation.png': _ablation,
    'mnist5k.png': functools.partial(_task, 0, 'test accuracy'),
    'newsgroups.png': functools.partial(_task, 1, 'test accuracy'),
    'shakespeare.png': functools.partial(_task, 2, 'test accuracy'),
    'movielens.png': functools.partial(_task, 3, 'test RMSE (lower is better)'),
}


_THREE, _FIVE = (3, 4, 5), (3, 4, 5, 6, 7)


def _histories(
    folder: pathlib.Path, seeds: Sequence[int] = _THREE
) -> list[list[dict[str, float]]]:
  """Returns the rows of the runs of these seeds."""
  found = []
  for seed in seeds:
    with open(f'{folder}-{seed}/metrics.csv', newline='') as file:
      found.append([
          {name: float(value) for name, value in row.items() if value}
          for row in csv.DictReader(file)
      ])
  return found


_MODELS = {'test/student_accuracy': 'student', 'test/teacher_accuracy': 'teacher'}


def _of_runs(runs: pathlib.Path) -> Iterator[tuple[str, Any]]:
  """Yields the pictures of the runs of unlabelled.md, by the name of the file."""
  folder = runs / 'unlabelled-0.05'
  flags = 'consensus=mean_logits-clients_start_from=distilled-noaugment'
  first_edition = [  # The student.
      [{name: row[name] for name in row if 'teacher' not in name} for row in rows]
      for rows in _histories(folder / f'fed_distillation-{flags}')
  ]
  yield 'unlabelled.png', plots.curves(
      {
          'FedAvg': _histories(folder / 'fed_avg', _FIVE),
          # In this order the colours are those of labelled.png.
          'fed_distillation': _histories(folder / 'fed_distillation', _FIVE),
          'FedAvg, calibrated': _histories(folder / 'fed_avg-calibrate', _FIVE),
          'fed_distillation as the first edition had it': first_edition,
      },
      metric='test accuracy', columns=_MODELS,
      title='MNIST-5k without labels on the server, alpha .05',
  )
  labelled = runs / 'labelled' / 'fed_distillation'
  alone = [
      json.loads(pathlib.Path(f'{labelled}-{seed}', 'results.json').read_text())['alone']
      for seed in _THREE
  ]
  yield 'labelled.png', plots.curves(
      {
          'FedAvg': _histories(runs / 'unlabelled-0.1' / 'fed_avg'),
          'fed_distillation': _histories(labelled),
      },
      metric='test accuracy', columns=_MODELS,
      levels={
          f"{model} on the server's 200 labels alone": float(
              np.mean([scores[model]['accuracy'] for scores in alone])
          )
          for model in ('student', 'teacher')
      },
      title='MNIST-5k with 200 labels on the server, alpha .1',
  )


def main(argv: Sequence[str]) -> None:
  for name, draw in PICTURES.items():
    draw().savefig(FOLDER / name)
  for runs in argv:
    for name, figure in _of_runs(pathlib.Path(runs)):
      figure.savefig(FOLDER / name)


if __name__ == '__main__':
  main(sys.argv[1:])
