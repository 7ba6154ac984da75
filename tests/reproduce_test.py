"""`python -m pipelines.reproduce_fedgen_table` as a user runs it, on a toy MNIST."""

import functools
import json

import numpy as np
import pytest

from tests import data_test
from tests import helpers


_run = functools.partial(helpers.script, 'pipelines.reproduce_fedgen_table')


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  """Ten classes, each a pattern with noise."""
  folder = tmp_path_factory.mktemp('mnist')
  rng = np.random.default_rng(0)
  patterns = rng.integers(0, 200, (10, 28, 28))
  for split, per_class in (('train', 60), ('t10k', 10)):
    labels = np.repeat(np.arange(10), per_class).astype(np.uint8)
    noise = rng.integers(0, 55, (len(labels), 28, 28))
    images = (patterns[labels] + noise).astype(np.uint8)
    for name, values in (('images-idx3', images), ('labels-idx1', labels)):
      (folder / f'{split}-{name}-ubyte').write_bytes(data_test._idx(values))
  return folder


# What it runs for each cell of the table are flags of `pipelines.train`.
@pytest.fixture(scope='module')
def finished(data_dir, tmp_path_factory):
  """FedAvg for a round, then FedAvg from there and FD to the second."""
  folder = tmp_path_factory.mktemp('table') / 'out'
  flags = [
      f'--data_dir={data_dir}', f'--output_dir={folder}', '--alphas=1', '--seeds=0',
      '--rounds_per_evaluation=1',
  ]
  _run(*flags, '--algorithms=fed_avg', '--rounds=1')
  flags += ['--algorithms=fed_avg,fd', '--rounds=2']
  _run(*flags)
  return folder, flags


@pytest.mark.slow
def test_the_table_has_ours_beside_the_papers(finished):
  folder, _ = finished
  rows = {
      (row['algorithm'], row['test'], row['rounds']): row['alpha 1']
      for row in helpers.rows(folder / 'table.csv')
  }
  assert rows.pop(('fed_avg, paper', 'own classes', '')) == '93.84'
  assert rows.pop(('fd, paper', 'own classes', '')) == '79.88'
  assert set(rows) == {
      (name, test, rounds)
      for name in ('fed_avg', "fd, users' own models")
      for test in ('all', 'own classes') for rounds in ('last', 'best five')
  } | {('fed_avg', 'own statistics', 'last')}
  assert all(0 <= float(value) <= 100 for value in rows.values())
  cells = json.loads((folder / 'table.json').read_text())
  assert len(cells) == 5
  for cell in cells:
    assert cell['seeds'] == [0] and cell['alpha'] == 1
    label = 'fed_avg' if cell['algorithm'] == 'fed_avg' else "fd, users' own models"
    for rounds in ('last', 'best five'):
      if cell['test'] == 'own statistics' and rounds == 'best five':
        assert not cell[rounds]  # Only at the end.
        continue
      assert f'{cell[rounds][0]:.2f}' == rows[label, cell['test'], rounds]
  markdown = (folder / 'table.md').read_text().splitlines()
  assert markdown[0] == '| algorithm | test | rounds | alpha 1 |'
  assert len(markdown) == 2 + 11


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_its_first_rounds(finished):
  folder, _ = finished
  results = json.loads((folder / 'fed_avg-1-0' / 'results-2.json').read_text())
  before = json.loads((folder / 'fed_avg-1-0' / 'results-1.json').read_text())
  assert [row['round'] for row in results['curve']] == [1, 2]
  assert results['curve'][0] == before['curve'][0]
  # Only at the end, and of the model that all have.
  assert 0.0 <= results['last'].pop('student/own statistics') <= 1.0
  assert results['last'].items() <= results['curve'][1].items()
  assert results['seconds_per_round'] > 0


@pytest.mark.slow
def test_users_of_their_own_models_are_better_at_their_own_classes(finished):
  folder, _ = finished
  results = json.loads((folder / 'fd-1-0' / 'results-2.json').read_text())
  last = results['last']
  assert last['student/own classes'] > last['student/all']


@pytest.mark.slow
def test_a_second_start_runs_nothing_again(finished):
  folder, flags = finished
  paths = sorted(folder.glob('*/results-2.json'))
  assert len(paths) == 2
  before = [path.stat().st_mtime_ns for path in paths]
  table = (folder / 'table.md').read_text()
  (folder / 'table.md').unlink()
  done = _run(*flags)
  assert '2 of 2 runs are done already' in done.stdout
  assert before == [path.stat().st_mtime_ns for path in paths]
  assert table == (folder / 'table.md').read_text()


def test_runs_of_other_data_are_not_shown(tmp_path):
  here, other, folder = tmp_path / 'data', tmp_path / 'other', tmp_path / 'out'
  run = folder / 'fed_avg-1-0'
  for path in (here, other, run):
    path.mkdir(parents=True)
  (run / 'results-1.json').write_text(
      json.dumps({'last': {'student/all': float('nan')}, 'curve': []})
  )
  # Nothing of it was run.
  (folder / 'problem.json').write_text(
      json.dumps({'data_dir': 'mistyped', 'rounds_per_evaluation': 3})
  )
  flags = (
      f'--output_dir={folder}', '--algorithms=fed_avg', '--alphas=1', '--seeds=0',
      '--rounds=1',
  )
  done = _run(f'--data_dir={here}', *flags)
  assert '1 of 1 runs are done already' in done.stdout
  (run / 'metrics.csv').touch()
  for given, match in (
      ([f'--data_dir={other}'], f'--data_dir={here}, not {other}. Go on with the same'),
      ([f'--data_dir={here}', '--rounds_per_evaluation=5'], 'evaluation=10, not 5.'),
  ):
    done = _run(*given, *flags, status=1)
    assert match in done.stderr
    assert 'or choose another --output_dir' in done.stderr


@pytest.mark.parametrize(
    'flags, match',
    [
        ([], '--data_dir must be a folder'),
        (['--data_dir=.', '--algorithms=magic'], 'magic'),
        (['--data_dir=.', '--seeds=0,0'], 'different numbers'),
        (['--data_dir=.', '--alphas=0'], 'above 0'),
    ],
)
def test_bad_flags_are_a_sentence(flags, match):
  done = _run(*flags, status=1)
  assert match in done.stdout + done.stderr
