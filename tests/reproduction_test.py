"""The README's result, from its own command. Long: `make slow`."""

import csv
import pathlib
import subprocess
import sys

import numpy as np
import pytest

_ROOT = pathlib.Path(__file__).parent.parent
_ROUNDS = 30


def _column(path, name):
  with open(path, newline='') as file:
    return np.array([float(row[name]) for row in csv.DictReader(file)])


@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_the_fusion_needs_half_the_rounds_and_lifts_the_teacher(seed, tmp_path):
  folder = tmp_path / 'out'
  subprocess.run(
      [
          sys.executable, '-m', 'pipelines.train', f'--seed={seed}',
          f'--rounds={_ROUNDS}', '--patience=0', f'--output_dir={folder}',
      ],
      cwd=_ROOT, check=True, timeout=1200,
  )
  column = 'test/student_accuracy'
  student = _column(folder / 'metrics.csv', column)
  teacher = _column(folder / 'metrics.csv', 'test/teacher_accuracy')
  fed_avg = _column(folder / 'fed_avg_metrics.csv', column)[:_ROUNDS]
  assert student[: _ROUNDS // 2].max() >= fed_avg[-1]
  assert teacher[-1] > student[-1]
