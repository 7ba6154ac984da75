"""Published results, from their own commands. Long: `make slow`."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests import helpers

_ROUNDS = 30


def _column(path, name):
  return np.array([float(row[name]) for row in helpers.rows(path)])


@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_the_fusion_needs_half_the_rounds_and_lifts_the_teacher(seed, tmp_path):
  folder = tmp_path / 'out'
  subprocess.run(
      [
          sys.executable, '-m', 'pipelines.train', f'--seed={seed}',
          f'--rounds={_ROUNDS}', '--patience=0', f'--output_dir={folder}',
      ],
      cwd=helpers.ROOT, check=True, timeout=helpers.HANGING_S,
  )
  column = 'test/student_accuracy'
  student = _column(folder / 'metrics.csv', column)
  teacher = _column(folder / 'metrics.csv', 'test/teacher_accuracy')
  fed_avg = _column(folder / 'fed_avg_metrics.csv', column)[:_ROUNDS]
  assert student[: _ROUNDS // 2].max() >= fed_avg[-1]
  assert teacher[-1] > student[-1]


@pytest.mark.slow
@pytest.mark.skipif(
    'TFF_KD_MNIST_DIR' not in os.environ,
    reason="needs TFF_KD_MNIST_DIR, a folder with MNIST's IDX files",
)
def test_the_fedgen_table_in_its_first_rounds(tmp_path):
  subprocess.run(
      [
          sys.executable, '-m', 'pipelines.reproduce_fedgen_table',
          f"--data_dir={os.environ['TFF_KD_MNIST_DIR']}", f'--output_dir={tmp_path}',
          '--algorithms=fed_avg,fed_df,fd', '--alphas=0.1', '--seeds=0', '--rounds=40',
          '--rounds_per_evaluation=20',
      ],
      cwd=helpers.ROOT, check=True, timeout=helpers.HANGING_S,
  )
  found = {
      (cell['algorithm'], cell['test']): cell['last'][0]
      for cell in json.loads((tmp_path / 'table.json').read_text())
  }
  # A model for all gets ahead on all classes; a user's own knows the user's.
  assert found['fed_df', 'all'] > found['fed_avg', 'all'] > 60.0
  assert found['fd', 'own classes'] > 1.5 * found['fd', 'all']
