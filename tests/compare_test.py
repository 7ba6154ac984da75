"""`python -m pipelines.compare` as a user runs it."""

import functools
import json
import shutil
import signal
import statistics
import subprocess
import threading
import time

import pytest

from pipelines import parallel
from pipelines import tables
from tests import helpers

_TINY = [
    '--num_clients=4', '--clients_per_round=2', '--client_epochs=1', '--alpha=1',
    '--server_steps=2', '--rounds=2', '--transfer_size=60', '--transfer_labels=20',
    '--rounds_per_checkpoint=1',
]
_COMPARED = ['--algorithms=fed_avg,fed_df', '--seeds=0']


_run = functools.partial(helpers.script, 'pipelines.compare')


@pytest.fixture(scope='module', params=[(0,), helpers.slow((0, 1))], ids=str)
def finished(request, tmp_path_factory):
  """A comparison that was stopped once, then ended.

  Its seeds, its folder, and what it printed.
  """
  seeds, folder = request.param, tmp_path_factory.mktemp('compare') / 'out'
  command = [
      _COMPARED[0], f'--seeds={",".join(map(str, seeds))}', *_TINY,
      f'--output_dir={folder}',
  ]
  with helpers.running(
      '-m', 'pipelines.compare', *command, '--jobs=1', python=helpers.WARM
  ) as script:
    for line in script.stdout:
      if line.startswith('[1/'):
        break
    script.terminate()
    assert script.wait(helpers.HANGING_S) == 130
  first = sorted(folder.glob('*/results.json'))
  assert 1 <= len(first) < 2 * len(seeds)
  changed = [path.stat().st_mtime_ns for path in first]
  done = _run(*command)
  assert changed == [path.stat().st_mtime_ns for path in first]
  return seeds, folder, done.stdout


def test_it_goes_on_and_ends_with_a_table_and_a_picture(finished):
  seeds, folder, printed = finished
  assert f'of {2 * len(seeds)} runs are done already' in printed
  # The deviation, where there are several seeds.
  has_deviation = len(seeds) > 1
  of_mean = lambda values: f'{statistics.mean(values):.3f}' + has_deviation * ' ± '
  rows = {row['algorithm']: row for row in helpers.rows(folder / 'table.csv')}
  floor = rows.pop("the server's labels alone")
  assert floor['seeds'] == str(len(seeds))
  assert not floor['MB a round'] and not floor['teacher']
  alone = [
      json.loads((folder / f'fed_df-{seed}' / 'results.json').read_text())['alone']
      for seed in seeds
  ]
  assert floor['student'].startswith(of_mean(its['student']['accuracy'] for its in alone))
  assert set(rows) == {'fed_avg', 'fed_df'}
  for row in rows.values():
    assert row['seeds'] == str(len(seeds)) and row['teacher'] == ''
    assert ('±' in row['student']) == has_deviation
    last = []
    for seed in seeds:
      history = helpers.rows(folder / f'{row["algorithm"]}-{seed}' / 'metrics.csv')
      scores = [float(its['test/student_accuracy']) for its in history]
      last.append(statistics.mean(scores[-10:]))
    assert row['student, last 10'].startswith(of_mean(last))
    assert row['teacher, last 10'] == ''
  assert float(rows['fed_df']['MB a round']) > float(rows['fed_avg']['MB a round'])
  markdown = (folder / 'table.md').read_text().splitlines()
  assert len(markdown) == 5 and markdown[0].startswith('| algorithm | student |')
  assert (folder / 'curves.png').stat().st_size > 10_000


def test_all_met_the_same_problem(finished):
  seeds, folder, _ = finished
  # After a round, the two differ by the server's distillation only.
  before = [
      helpers.rows(folder / f'{name}-{seeds[-1]}' / 'metrics.csv')[0]
      for name in ('fed_avg', 'fed_df')
  ]
  clients = [k for k in before[0] if k.startswith('client_work')]
  assert clients
  for key in clients:
    assert float(before[0][key]) == pytest.approx(float(before[1][key]), rel=1e-6)


def test_another_problem_needs_another_folder(finished):
  _, folder, _ = finished
  done = _run(
      *_COMPARED, *_TINY, '--batch_size=7', f'--output_dir={folder}', status=1
  )
  assert 'choose another --output_dir' in done.stdout + done.stderr


def _own_fed_avg(tmp_path):
  """A file of one's own whose function has the name of one of the registry."""
  return shutil.copy(helpers.ROOT / 'tff_kd' / 'algorithms' / 'fed_avg.py', tmp_path)


def test_algorithms_of_one_name_do_not_share_folders(tmp_path):
  own = _own_fed_avg(tmp_path)
  done = _run(f'--algorithms=fed_avg,{own}', f'--output_dir={tmp_path / "out"}', status=1)
  assert not (tmp_path / 'out').exists()
  assert f'{own} would be in the folders of fed_avg' in done.stderr
  assert 'called build_fed_avg. Rename the function' in done.stderr


def test_results_of_an_algorithm_of_the_same_name_are_no_results(finished, tmp_path):
  _, folder, _ = finished
  own = _own_fed_avg(tmp_path)
  table = (folder / 'table.csv').read_text()
  its_flags = [flag for flag in _TINY if 'server_steps' not in flag]
  done = _run(
      f'--algorithms={own}', '--seeds=0', *its_flags, f'--output_dir={folder}', status=1
  )
  assert 'done already' not in done.stdout
  assert "had other values of --algorithm ('fed_avg')" in done.stdout
  assert table == (folder / 'table.csv').read_text()


def test_a_run_that_diverged_is_in_the_table(finished, tmp_path):
  _, folder, _ = finished
  out, score = shutil.copytree(folder, tmp_path / 'out'), 'test/student_accuracy'
  for name in ('fed_avg', 'fed_df'):
    shutil.copytree(out / f'{name}-0', out / f'{name}-1', dirs_exist_ok=True)
  path = out / 'fed_avg-1' / 'results.json'
  results = json.loads(path.read_text())
  results['best'][score] = float('nan')
  path.write_text(json.dumps(results))
  path = out / 'fed_avg-1' / 'metrics.csv'
  rows = helpers.rows(path)
  rows[-1][score] = 'nan'
  helpers.write_rows(path, rows)
  _run(_COMPARED[0], '--seeds=0,1', *_TINY, f'--output_dir={out}')
  diverged, other = helpers.rows(out / 'table.csv')[:2]
  assert diverged['student'] == diverged['student, last 10'] == 'nan ± nan'
  assert other['student'].endswith(' ± 0.000')
  # What the others are compared with is of those that did not.
  target = 0.95 * float(other['student'].partition(' ')[0])
  assert f'rounds to {target:.3f}' in other and other[f'rounds to {target:.3f}']


def test_a_mean_of_what_is_not_finite():
  infinite = float('inf')
  assert tables.spread([infinite, 1.0], 3) == 'inf ± nan'
  assert tables.spread([infinite, -infinite], 3) == 'nan ± nan'
  assert tables.spread([0.5], 1) == '0.5' and tables.spread([], 1) == ''


def test_a_folder_has_one_user_at_a_time(tmp_path):
  with parallel.exclusive_lock(tmp_path):
    done = _run(*_COMPARED, *_TINY, f'--output_dir={tmp_path}', status=1)
  assert 'in use by another' in done.stdout + done.stderr


@pytest.mark.parametrize('error', [KeyboardInterrupt, FileNotFoundError])
def test_what_ends_a_comparison_ends_a_run_that_is_just_starting(
    error, tmp_path, monkeypatch
):
  interrupted, started = threading.Event(), []
  start = subprocess.Popen

  def start_late(command, **kwargs):
    process = start(command, **kwargs)
    started.append(process)
    if command[0] == 'sleep':
      assert interrupted.wait(helpers.HANGING_S)
      time.sleep(0.2)  # The main thread has ended what it knows of.
    return process

  def interrupt(job, seconds):
    while len(started) < 2:
      time.sleep(0.01)
    interrupted.set()
    raise error

  monkeypatch.setattr(parallel.subprocess, 'Popen', start_late)
  jobs = [
      parallel.Job(name, command, tmp_path / name)
      for name, command in (('first', ['true']), ('second', ['sleep', '100']))
  ]
  with pytest.raises(error):
    parallel.run_all(jobs, 1, interrupt)
  assert started[1].wait(60) == -signal.SIGTERM


def test_a_dry_run_is_of_one_run(tmp_path):
  done = _run('--dry_run', f'--output_dir={tmp_path / "out"}', status=1)
  assert '--dry_run is of one run' in done.stderr
  assert not (tmp_path / 'out').exists()


def test_a_run_that_fails_is_named(tmp_path):
  done = _run(
      '--algorithms=fed_avg', '--seeds=0', *_TINY[:4], '--transfer_labels=100000',
      f'--output_dir={tmp_path}', status=1,
  )
  assert 'fed_avg, seed 0 failed' in done.stdout and '100000' in done.stdout
  assert 'error: failed: fed_avg, seed 0.' in done.stderr
  # As nothing ran, other flags may follow.
  done = _run(
      '--algorithms=fed_avg', '--seeds=0', *_TINY[:4], '--transfer_labels=100001',
      f'--output_dir={tmp_path}', status=1,
  )
  assert 'fed_avg, seed 0 failed' in done.stdout and '100001' in done.stdout


@pytest.mark.slow
def test_varied_flags_ceilings_and_a_run_without_any_client(tmp_path):
  _run(
      '--algorithms=fed_avg,fed_df', '--seeds=0', *_TINY[:5], '--rounds=2',
      '--vary=--dropout_before=1 --min_reports=1|--coverage=0.5', '--ceilings',
      '--central_epochs=1', f'--output_dir={tmp_path}',
  )
  rows = helpers.rows(tmp_path / 'table.csv')
  ceiling = rows.pop()
  assert ceiling['algorithm'] == 'in one place'
  assert 0 < float(ceiling['student']) < 1 and 0 < float(ceiling['teacher']) < 1
  with open(tmp_path / 'centralized-0' / 'results.json') as file:
    model = json.load(file)['models']['student']
  assert model['weights'] == 25_450 and model['epochs'] == 1
  # FedAvg's clients predict nothing that could cover a part.
  assert [row['algorithm'] for row in rows] == [
      'fed_avg --dropout_before=1 --min_reports=1',
      'fed_df --dropout_before=1 --min_reports=1', 'fed_df --coverage=0.5',
  ]
  for name in ('curves.png', 'varied.png'):
    assert (tmp_path / name).stat().st_size > 10_000
  folder = tmp_path / 'fed_df-dropout_before=1-min_reports=1-0'
  first, second = helpers.rows(folder / 'metrics.csv')
  assert first['round_skipped'] == second['round_skipped'] == '1'
  assert first['test/student_accuracy'] == second['test/student_accuracy']


@pytest.mark.slow
def test_ceilings_are_of_the_data_and_models_of_a_config(tmp_path):
  config = tmp_path / 'config.json'
  values = {'student': ['cnn'], 'transfer_size': 1500}
  config.write_text(json.dumps({'flags': values, 'given': list(values)}))
  _run(
      '--algorithms=fed_avg', '--seeds=0', '--rounds=1', '--client_epochs=1',
      f'--config={config}', '--ceilings', '--central_epochs=1',
      f'--output_dir={tmp_path / "all"}',
  )
  assert '2000 examples' in (tmp_path / 'all' / 'centralized-0.log').read_text()
  with open(tmp_path / 'all' / 'centralized-0' / 'results.json') as file:
    weights = json.load(file)['models']['student']['weights']
  log = (tmp_path / 'all' / 'fed_avg-0.log').read_text()
  assert f'student: {weights:,} weights.' in log and weights != 25_450


_SETTINGS = '''
import json, sys
from absl import flags
from pipelines import compare, train_flags
flags.FLAGS(sys.argv)
train_flags.take_given(compare._PER_RUN)
settings = {s.name: sorted(of_run) for s, of_run in compare._settings([]).items()}
print(json.dumps([train_flags.output_dir('compare').name, settings]))
'''


def test_a_config_gives_each_algorithm_the_flags_that_it_takes(tmp_path):
  config = tmp_path / 'config.json'
  values = {
      'algorithm': 'fed_df', 'task': 'newsgroups', 'patience': 5, 'server_steps': 30,
      'num_clients': 10, 'batch_size': 20,
  }
  given = sorted(values.keys() - {'batch_size'})
  config.write_text(json.dumps({'flags': values, 'given': given}))
  folder, settings = json.loads(
      helpers.python(
          _SETTINGS, f'--config={config}', '--algorithms=fed_avg,fed_df',
          '--num_clients=12',
      ).stdout
  )
  assert folder == 'compare-newsgroups'
  of_all = ['--num_clients=12', '--patience=5', '--task=newsgroups']
  assert settings == {'fed_avg': of_all, 'fed_df': sorted([*of_all, '--server_steps=30'])}


@pytest.mark.parametrize(
    'flags, match',
    [
        (['--vary=--magic=1'], "'--magic=1' is not a flag"),
        (['--vary=|--alpha=1', '--alpha=2'], '--alpha is set for all'),
        (['--vary=|'], 'the same flags twice'),
        (['--vary=--data_dir=a/b|--data_dir=a_b'], 'in two calls'),
        (['--algorithms=fed_avg', '--vary=|--teacher=cnn'], 'has no effect with any'),
        (['--algorithms=fed_avg,magic'], 'magic'),
        (['--central_epochs=2'], '--central_epochs has no effect without --ceilings'),
        (['--seeds=0,0'], 'different numbers'),
        (['--seed=3'], '--seed is set for each run'),
        (['--algorithms=fed_avg', '--teacher=cnn'], '--teacher has no effect'),
    ],
)
def test_bad_flags_are_a_sentence(flags, match):
  done = _run(*flags, status=1)
  assert match in done.stdout + done.stderr
