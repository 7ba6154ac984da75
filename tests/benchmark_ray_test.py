"""The benchmark of Ray as a user runs it, on sizes of seconds."""

import json
import math

import pytest

from pipelines import benchmark_work
from tests import helpers

pytest.importorskip('ray')


@pytest.mark.slow
def test_all_figures(tmp_path):
  """Starts five workers of Ray, each with TensorFlow."""
  done = helpers.script(
      'pipelines.benchmark_ray', '--clients=30', '--examples=90',
      '--clients_per_round=10', '--watched_rounds=3', '--cases=mlp-10x20',
      '--nodes_case=mlp-16x20', '--rounds=3', '--warm_up=1', f'--output_dir={tmp_path}',
  )
  results = json.loads((tmp_path / 'results.json').read_text())
  assert [(each['case'], each['workers']) for each in results['overhead']] == [
      ('mlp-10x20', 1), ('mlp-10x20', 2)
  ]
  sides = [each[side] for each in results['overhead'] for side in ('here', 'ray')]
  sides += [results['nodes'][side] for side in ('one', 'two')]
  for side in sides:
    assert len(side['all_seconds']) == 3 and 0 < side['seconds'] < math.inf
  assert 0 < results['nodes']['ratio'] < math.inf
  rows = helpers.rows(tmp_path / 'machines.csv')
  assert list(rows[0]) == [
      'round', 'seconds', 'script CPU seconds', 'script MiB', 'worker 1 MiB',
      'worker 2 MiB', 'gcs_server MiB', 'raylet MiB', 'object store MiB',
  ]
  assert [row['round'] for row in rows] == ['1', '2', '3']
  for row in rows:
    assert all(0 < float(value) < math.inf for value in row.values()), row
  assert (tmp_path / 'machines.png').stat().st_size > 10_000
  assert 'two nodes' in done.stdout and 'overhead ms' in done.stdout


# The script's flags are not for the process of the tests.
_PARTS = """
import os
import pathlib
import sys
from pipelines import benchmark_ray

folder = pathlib.Path(sys.argv[1])
assert 50 < benchmark_ray._resident_mib(os.getpid()) < 50_000
before = benchmark_ray._object_store_mib(os.getpid())
path = pathlib.Path('/dev/shm') / f'tff_kd_test_{os.getpid()}'
with path.open('wb') as file:
  path.unlink()
  file.write(bytes(3 * 2**20))
  file.flush()
  assert benchmark_ray._object_store_mib(os.getpid()) - before == 3.0
rows = [
    {
        'round': n, 'seconds': 1.0, 'script CPU seconds': 0.5, 'script MiB': 800.0 + n,
        'raylet MiB': 30.0,
    }
    for n in (1, 2, 3)
]
benchmark_ray._draw(rows, folder / 'machines.png')
benchmark_ray._write_csv(rows, folder / 'machines.csv')
"""


def test_memory_of_processes_and_the_picture(tmp_path):
  helpers.python(_PARTS, tmp_path)
  assert (tmp_path / 'machines.png').stat().st_size > 10_000
  head, first = (tmp_path / 'machines.csv').read_text().splitlines()[:2]
  assert head == 'round,seconds,script CPU seconds,script MiB,raylet MiB'
  assert first == '1,1.000,0.500,801.000,30.000'


def test_a_case_has_the_examples_of_its_seed():
  case = benchmark_work.parse_case('cases', 'cnn-2x20', seed=7)
  assert case == ('cnn', 2, 20, 7)
  (x, y), (other, _) = case.examples()
  assert x.shape == (20, 28, 28, 1) and y.shape == (20,)
  assert (x != other).any() and (x == next(case.examples())[0]).all()


@pytest.mark.parametrize(
    ('flag', 'message'),
    [
        ('--figures=memory,speed', "--figures must be some of ['memory', 'overhead'"),
        ('--figures=', '--figures must be some of'),
        ('--cases=mlp-10', "--cases: 'mlp-10' is not MODEL-CLIENTSxEXAMPLES"),
        ('--nodes_case=cnn', "--nodes_case: 'cnn' is not MODEL-CLIENTSxEXAMPLES"),
        ('--clients_per_round=20000', '--clients_per_round must be at most --clients'),
    ],
)
def test_flags_that_make_no_sense_are_a_sentence(flag, message):
  done = helpers.script('pipelines.benchmark_ray', flag, status=1)
  assert message in done.stderr and 'Traceback' not in done.stderr
