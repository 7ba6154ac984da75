"""`python -m pipelines.train` as a user runs it."""

import json
import shutil
import signal
import time
import types

import keras
import numpy as np
import psutil
import pytest
import tensorflow as tf

import pipelines
from pipelines import kept
from pipelines import parallel
from pipelines import run_folders
from pipelines import train_folder
from pipelines import train_job
from pipelines import train_report
from tests import helpers
import tff_kd


@pytest.fixture(scope='module')
def run_dir(tmp_path_factory):
  """One finished run, and what it printed."""
  folder = tmp_path_factory.mktemp('run') / 'out'
  done = helpers.train(
      *helpers.TINY_FUSION, '--rounds=2', '--transfer_validation=10',
      f'--output_dir={folder}',
  )
  (folder / 'stdout.txt').write_text(done.stdout)
  (folder / 'stderr.txt').write_text(done.stderr)
  return folder


def test_it_leaves_a_whole_run_folder(run_dir):
  names = {path.name for path in run_dir.iterdir()}
  assert names >= {
      'config.json', 'metrics.csv', 'tensorboard', 'curves.png', 'partition.png',
      'student.keras', 'teacher.keras', 'checkpoints', 'fed_avg_metrics.csv',
  }
  config = json.loads((run_dir / 'config.json').read_text())
  assert config['flags']['alpha'] == 1.0 and config['flags']['seed'] == 0
  assert config['versions']['tensorflow'] == tf.__version__
  rows = helpers.rows(run_dir / 'metrics.csv')
  assert [row['round'] for row in rows] == ['1', '2']
  assert 0 <= float(rows[1]['test/teacher_accuracy']) <= 1
  assert float(rows[1]['client_work/participation/num_clients']) == 2
  # One tag in the folders of both models: one chart with two curves.
  for name in ('student', 'teacher'):
    (path,) = (run_dir / 'tensorboard' / name).glob('events*')
    tags = {
        value.tag
        for event in tf.compat.v1.train.summary_iterator(str(path))
        for value in event.summary.value
    }
    assert 'test/accuracy' in tags and 'validation/calibration_error' in tags
  assert list((run_dir / 'tensorboard' / 'round').glob('events*'))
  assert list((run_dir / 'checkpoints').iterdir())
  for picture in ('curves.png', 'partition.png'):
    assert (run_dir / picture).read_bytes().startswith(b'\x89PNG')


def test_it_prints_the_comparison(run_dir):
  printed = (run_dir / 'stdout.txt').read_text()
  for text in (
      'student', 'teacher', 'student before back-distillation',
      'FedAvg, same rounds', 'FedAvg, same bytes', 'up knowledge',
      'Seconds per round', "student on the server's 20 labels alone",
  ):
    assert text in printed
  # The bar shows round, accuracies and bytes, and nothing else is noisy.
  errors = (run_dir / 'stderr.txt').read_text()
  assert 'student=' in errors and 'teacher=' in errors and 'MB/client=' in errors
  assert 'Traceback' not in errors and 'Warning' not in errors


def test_the_saved_models_are_the_best_rounds(run_dir):
  rows = helpers.rows(run_dir / 'metrics.csv')
  best = max(rows, key=lambda row: float(row['validation/student_accuracy']))
  test = tff_kd.data.TASKS['mnist5k'].load(seed=0, transfer_size=60).test
  for name in ('student', 'teacher'):
    model = keras.models.load_model(run_dir / f'{name}.keras')
    accuracy = np.mean(
        np.argmax(model.predict(test.inputs, verbose=0), -1) == test.labels
    )
    np.testing.assert_allclose(
        accuracy, float(best[f'test/{name}_accuracy']), atol=1.1e-3
    )


def test_it_resumes_exactly(run_dir, tmp_path):
  """A run that was stopped in the second round has the rows of the whole one."""
  resumed = tmp_path / 'resumed'
  shutil.copytree(run_dir, resumed)
  (resumed / 'results.json').unlink()
  (resumed / 'checkpoints' / 'program_state_2').unlink()
  lines = (resumed / 'metrics.csv').read_text().splitlines(keepends=True)
  (resumed / 'metrics.csv').write_text(''.join(lines[:-1]))
  helpers.train(
      *helpers.TINY_FUSION, '--rounds=2', '--transfer_validation=10', '--resume',
      '--nocompare_with_fed_avg', f'--output_dir={resumed}',
  )
  for a, b in zip(
      helpers.rows(resumed / 'metrics.csv'), helpers.rows(run_dir / 'metrics.csv'),
      strict=True,
  ):
    a.pop('round_seconds'), b.pop('round_seconds')
    assert a == b


def test_a_folder_in_use_is_not_overwritten(run_dir):
  before = (run_dir / 'metrics.csv').read_text()
  given = [*helpers.TINY_FUSION, f'--output_dir={run_dir}']
  said = helpers.refused_here(*given, '--noresume')
  assert 'already holds a run' in said and '--noresume' in said
  said = helpers.refused_here(*given, '--transfer_validation=10', '--seed=1')
  assert '--seed (0)' in said
  assert (run_dir / 'metrics.csv').read_text() == before


def test_a_folder_has_one_run_at_a_time(run_dir):
  before = (run_dir / 'results.json').read_text()
  with parallel.exclusive_lock(run_dir):
    said = helpers.refused_here(
        *helpers.TINY_FUSION, '--rounds=2', '--transfer_validation=10',
        f'--output_dir={run_dir}',
    )
  assert 'is in use by another run' in said
  assert (run_dir / 'results.json').read_text() == before


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path):
  found = [train_folder._new(tmp_path / 'runs' / 'now').name for _ in range(3)]
  assert found == ['now', 'now-2', 'now-3']


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
  path = tmp_path / 'results.json'
  run_folders.write_json(path, {'a': 1})
  assert json.loads(path.read_text()) == {'a': 1}
  (tmp_path / 'results.json.partial').mkdir()  # It cannot be written.
  with pytest.raises(OSError):
    run_folders.write_json(path, {'a': 2})
  assert json.loads(path.read_text()) == {'a': 1}


def test_a_damaged_file_of_a_client_is_an_error_for_users(tmp_path, monkeypatch):
  states = tff_kd.simulation.ClientStates(np.zeros(2), tmp_path)
  states.save([3], [np.ones(2)], 1)
  (path,) = tmp_path.iterdir()
  path.write_bytes(b'')
  # Where a run trains, and where the models that its clients keep are read.
  monkeypatch.setattr(train_job, '_train_and_report', lambda *_: states.load([3]))
  monkeypatch.setattr(train_report, 'draw_partition', lambda *_: None)
  with (
      helpers.flags_of(),
      pytest.raises(pipelines.UserError, match=f'{path} .* To go on: python -m pipeli'),
  ):
    train_job._run_in(tmp_path, None, None)
  monkeypatch.setattr(kept.KeptModels, '__init__', lambda self: None)
  models = kept.KeptModels()
  models._states, models._best_round = states, 1
  with pytest.raises(pipelines.UserError, match=f'client 3.*{path} .* or delete it'):
    models.weights(3)


@pytest.mark.parametrize(
    ('for_bytes', 'schedule', 'expected'),
    [
        (2, 'constant', {'FedAvg, same rounds': 4, 'FedAvg, same bytes': 2}),
        (0, 'constant', {'FedAvg, same rounds': 4}),
        (9, 'constant', {'FedAvg, same rounds': 4, 'FedAvg, same bytes': 9}),
        (90, 'constant', {'FedAvg, same rounds': 4, 'FedAvg, 3 times the rounds': 12}),
        (3, 'cosine', {'FedAvg, same rounds': 4, 'FedAvg, same bytes': 3}),
        (9, 'cosine', {'FedAvg, same rounds': 4}),
    ],
)
def test_fed_avg_is_judged_by_as_many_rounds_and_by_as_many_bytes(
    for_bytes, schedule, expected
):
  column = 'validation/student_accuracy'
  # Each round is better than the last one.
  rows = [{'round': n, column: n, 'test/student_accuracy': n} for n in range(1, 14)]
  finished = types.SimpleNamespace(
      baseline=train_report.Baseline(rows, for_bytes),
      result=types.SimpleNamespace(round_num=4),
      task=types.SimpleNamespace(metric='accuracy', is_lower_better=lambda name: False),
      scored=lambda values, prefix: [values[f'{prefix}accuracy']],
  )
  with helpers.flags_of('--rounds=4', f'--client_rate_schedule={schedule}'):
    found = {row[0]: row[2] for row in train_report._baseline_rows(finished)}
  assert found == expected


@pytest.mark.parametrize('average, lower_is_better', [(2, False), (1, True)])
def test_an_average_that_is_better_than_the_student_is_named(
    average, lower_is_better, capsys
):
  student, before = (f'validation/{name}_loss' for name in ('student', 'student_before'))
  finished = types.SimpleNamespace(
      history=[{'round': 1, student: 1.5, before: average}, {
          'round': 2, student: 1.5, before: 1.5
      }],
      names={'student_before': 'student before back-distillation'},
      result=types.SimpleNamespace(round_num=2),
      task=types.SimpleNamespace(
          metric='loss', is_lower_better=lambda name: lower_is_better
      ),
  )
  train_report._print_if_average_was_better(finished)
  assert f'loss {average:.4f} in round 1, the student 1.5000' in capsys.readouterr().out
  finished.task.is_lower_better = lambda name: not lower_is_better
  train_report._print_if_average_was_better(finished)
  assert not capsys.readouterr().out


def test_it_says_how_many_rounds_were_skipped(capsys):
  history = [{'round_skipped': 1.0}, {'round_skipped': 0.0}, {'round_skipped': 1.0}]
  with helpers.flags_of('--min_reports=3'):
    train_report._print_left_out(history)
    assert capsys.readouterr().out == (
        'Rounds that were skipped, with fewer than 3 reports: 2 of 3.\n'
    )
    train_report._print_left_out(history[1:2])
    assert not capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_ends_it(tmp_path):
  args = [*helpers.TINY_FUSION, '--rounds=1000', f'--output_dir={tmp_path / "out"}']
  with helpers.running('-m', 'pipelines.train', *args) as script:
    metrics = tmp_path / 'out' / 'metrics.csv'
    deadline = time.monotonic() + helpers.HANGING_S
    while not metrics.exists() and time.monotonic() < deadline:
      assert script.poll() is None, script.stderr.read()
      time.sleep(0.1)
    assert not psutil.Process(script.pid).children()  # It computes by itself.
    script.send_signal(signal.SIGINT)
    _, errors = script.communicate(timeout=helpers.HANGING_S)
    assert script.returncode == 130
  assert '--output_dir' in errors and 'Traceback' not in errors
