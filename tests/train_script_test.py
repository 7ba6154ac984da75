"""`python -m pipelines.train` as a user runs it."""

import csv
import json
import os
import pathlib
import signal
import stat
import subprocess
import sys
import time

from absl import app
from absl import flags
import numpy as np
import pytest
import tensorflow as tf

from pipelines import train
from pipelines import train_flags
from tests import data_test
from tests import helpers
import tff_kd
from tff_kd import keras_models

_ROOT = pathlib.Path(__file__).parent.parent
_TINY = [
    '--num_clients=4', '--clients_per_round=2', '--client_epochs=1', '--alpha=1',
    '--server_steps=2', '--back_steps=2', '--teacher=document',
    '--student=cnn',
    '--transfer_size=60', '--transfer_labels=20', '--rounds_per_checkpoint=1',
]


def _command(*args):
  return [sys.executable, '-m', 'pipelines.train', *args]


def _run(*args):
  """Runs the script with its output in pipes; hangs if a worker keeps them."""
  return subprocess.run(
      _command(*args), cwd=_ROOT, capture_output=True, text=True, timeout=240,
      check=False,
  )


def _children(pid):
  """Worker processes whose parent is `pid`, or that lost their parent."""
  found = []
  for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
    try:
      if b'worker_binary' not in path.read_bytes():
        continue
      parent = (path.parent / 'stat').read_text().rsplit(')', 1)[1].split()[1]
    except (FileNotFoundError, ProcessLookupError):
      continue
    if int(parent) in (pid, 1):
      found.append(int(path.parent.name))
  return found


def _rows(path):
  with open(path, newline='') as file:
    return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def run_dir(tmp_path_factory):
  """One finished run, and what it printed."""
  folder = tmp_path_factory.mktemp('run') / 'out'
  done = _run(
      *_TINY, '--rounds=2', '--transfer_validation=10', f'--output_dir={folder}'
  )
  assert done.returncode == 0, done.stderr
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
  rows = _rows(run_dir / 'metrics.csv')
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
  rows = _rows(run_dir / 'metrics.csv')
  best = max(rows, key=lambda row: float(row['validation/student_accuracy']))
  test = tff_kd.data.TASKS['mnist5k'].load(seed=0, transfer_size=60).test
  for name in ('student', 'teacher'):
    model = tf.keras.models.load_model(run_dir / f'{name}.keras')
    accuracy = np.mean(
        np.argmax(model.predict(test.inputs, verbose=0), -1) == test.labels
    )
    np.testing.assert_allclose(
        accuracy, float(best[f'test/{name}_accuracy']), atol=1.1e-3
    )


def test_it_resumes_exactly(run_dir, tmp_path):
  resumed = _run(
      *_TINY, '--rounds=3', '--transfer_validation=10', '--resume',
      '--nocompare_with_fed_avg', f'--output_dir={run_dir}',
  )
  assert resumed.returncode == 0, resumed.stderr
  whole = _run(
      *_TINY, '--rounds=3', '--transfer_validation=10',
      '--nocompare_with_fed_avg', f'--output_dir={tmp_path / "whole"}',
  )
  assert whole.returncode == 0, whole.stderr
  for a, b in zip(
      _rows(run_dir / 'metrics.csv'), _rows(tmp_path / 'whole' / 'metrics.csv'),
      strict=True,
  ):
    a.pop('round_seconds'), b.pop('round_seconds')
    assert a == b


def test_a_folder_in_use_is_not_overwritten(run_dir):
  before = (run_dir / 'metrics.csv').read_text()
  again = _run(*_TINY, f'--output_dir={run_dir}', '--noresume')
  assert again.returncode == 1
  assert 'already holds a run' in again.stderr and '--noresume' in again.stderr
  other = _run(
      *_TINY, '--transfer_validation=10', '--seed=1',
      f'--output_dir={run_dir}',
  )
  assert other.returncode == 1 and '--seed (0)' in other.stderr
  assert (run_dir / 'metrics.csv').read_text() == before


def test_idx_files_fed_df_cohorts_and_pretraining(tmp_path):
  data_test._write_idx(tmp_path, n_train=120, n_test=30, zipped=True)
  done = _run(
      '--task=idx', f'--data_dir={tmp_path}', '--algorithm=fed_df',
      '--partition=shards', '--num_clients=5', '--clients_per_round=3',
      '--client_weighting=uniform', '--transfer_size=30', '--transfer_labels=30',
      '--validation_size=20', '--pretrain_epochs=1', '--server_steps=2',
      '--distillation_weight=0.5', '--local_target=student', '--rounds=2',
      '--student=document,cnn', f'--output_dir={tmp_path / "out"}',
      '--model_bits=8', '--consensus=mean_probabilities', '--prediction_top=2',
  )
  assert done.returncode == 0, done.stderr
  assert "student before the server's distillation" in done.stdout
  assert 'teacher' not in done.stdout
  assert not (tmp_path / 'out' / 'teacher.keras').exists()
  # Clients 0, 2, 4 have the one architecture, 1 and 3 the other.
  assert 'student, cohort 1 (cnn)' in done.stdout
  for row in _rows(tmp_path / 'out' / 'metrics.csv'):
    # Arrays of 1,000 numbers are rounded; of 3 probabilities 2 are sent, 34 bits each.
    assert float(row['bytes/up_model']) < 0.7 * float(row['bytes/down_student'])
    assert float(row['bytes/up_knowledge']) == 3 * 30 * 2 * 34 / 8
    each = [float(row[f'test/student_{i}_accuracy']) for i in (0, 1)]
    assert float(row['test/student_accuracy']) == pytest.approx(np.mean(each))
  first, second = (
      tf.keras.models.load_model(tmp_path / 'out' / f'student_{i}.keras')
      for i in (0, 1)
  )
  assert isinstance(first, keras_models.StudentModel)
  assert isinstance(second, tf.keras.Sequential)


def test_ctrl_c_ends_it_and_its_worker(tmp_path):
  args = [*_TINY, '--rounds=1000', f'--output_dir={tmp_path / "out"}']
  with helpers.running('-m', 'pipelines.train', *args) as script:
    metrics = tmp_path / 'out' / 'metrics.csv'
    deadline = time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < deadline:
      assert script.poll() is None, script.stderr.read()
      time.sleep(0.1)
    workers = _children(script.pid)
    assert workers
    script.send_signal(signal.SIGINT)
    _, errors = script.communicate(timeout=60)
    assert script.returncode == 130
  assert '--output_dir' in errors and 'Traceback' not in errors
  assert not [pid for pid in workers if os.path.exists(f'/proc/{pid}')]


def test_flags_and_help_do_not_wait_for_tensorflow():
  for script in ('train', 'benchmark'):
    check = (
        f'import sys; from pipelines import {script}; import tff_kd;'
        "assert not {'tensorflow', 'tensorflow_federated'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, '-c', check], cwd=_ROOT, check=True)
  info = tff_kd.data.TASKS['mnist5k']
  assert info.students == tuple(sorted(keras_models.STUDENTS))
  assert info.teachers == tuple(sorted(keras_models.TEACHERS))
  for name, algorithm in tff_kd.algorithms.REGISTRY.items():
    assert callable(algorithm.build) and algorithm.build.__name__ == f'build_{name}'


def test_help_lists_the_algorithms():
  done = subprocess.run(
      _command('--help'), cwd=_ROOT, capture_output=True, text=True, timeout=60,
      check=False,
  )
  for name in tff_kd.algorithms.REGISTRY:
    assert name in done.stdout


@pytest.mark.parametrize(
    'args, message',
    [
        (['--temperature=0'], 'temperature'),
        (['--target=nobody'], '--target'),
        (['--algorithm=fed_avg', '--temperature=2'], '--temperature has no effect'),
        (['--algorithm=fed_df', '--teacher=cnn'], '--teacher has no effect'),
        (['--partition=iid', '--alpha=1'], '--alpha has no effect'),
        (['--shards_per_client=3'], '--shards_per_client has no effect'),
        (['--local_weight=0.5'], '--local_weight has no effect'),
        (['--noback_distillation', '--back_steps=2'], '--back_steps'),
        (['--data_dir=/nowhere'], '--data_dir has no effect'),
        (['--task=idx', '--data_dir=/nowhere'], 'data_dir'),
        (['--clients_per_round=21'], 'only 20 clients'),
        (['--num_clients=9999'], 'Use fewer clients'),
        (['--transfer_labels=2000'], '--transfer_labels'),
        (['--transfer_labels=0', '--pretrain_epochs=1'], 'needs labels'),
        (['--transfer_labels=0', '--distillation_weight=0.5'], 'needs labels'),
        (['--transfer_size=4000'], 'leave nothing'),
        (['--transfer_per_round=2000'], 'subset_size'),
        (['--server_patience=2'], 'validation part'),
        (['--alpha=0'], 'alpha'),
        (['--algorithm=cfd', '--prediction_bits=9'], '`up_bits`'),
        (['--algorithm=cfd', '--down_bits=12'], '`down_bits`'),
        (['--algorithm=cfd', '--consensus=era'], '--consensus has no effect'),
        (['--algorithm=fed_df', '--prediction_bits=1'], '--consensus=mean_probabilities'),
        (['--algorithm=ds_fl', '--prediction_bits=9'], 'from 1'),
        (['--algorithm=fed_avg', '--prediction_bits=1'], '--prediction_bits has no'),
        (['--algorithm=fed_df', '--prediction_top=1'], '--consensus=mean_probabilities'),
        (
            ['--algorithm=ds_fl', '--prediction_top=10'],
            '`num_classes` must be below the number of classes, 10',
        ),
        (['--algorithm=ds_fl', '--prediction_bits=1', '--knowledge_bits=8'], 'only one'),
        (['--model_bits=8', '--robust_model=median'], '--model_bits are of a sum'),
        (['--knowledge_norm_bound=-1'], '`norm_bound` must be above 0, found -1.0'),
        (['--trimmed_share=0.2'], '--trimmed_share has no effect'),
        (['--algorithm=fed_md', '--robust_model=median'], '--robust_model has no effect'),
        (['--algorithm=fed_gen', '--split_layer=x'], '`split_layer` must be one of'),
        (['--mentor=cnn'], '--mentor has no effect'),
        (['--resume'], '--output_dir'),
        (['--monitor=accuracy'], 'validation/teacher_accuracy'),
        (['--num_negatives=5'], '--num_negatives has no effect'),
        (['--algorithm=fed_aux', '--num_negatives=800'], '--num_negatives is 800'),
        (['--algorithm=fed_aux', '--consensus=era'], '--consensus has no effect'),
        (['--algorithm=fed_aux', '--certainty_epsilon=0'], '`epsilon` must be'),
        (['--delta=1e-6'], '--delta has no effect without --epsilon'),
        (['--epsilon=0'], '`epsilon` must be above 0'),
        (['--epsilon=8', '--client_weighting=num_examples'], 'and a weight without a'),
        (['--epsilon=8', '--compare_with_fed_avg'], 'is void'),
        (['--epsilon=8', '--sampling=weighted'], 'which is their secret'),
        (['--epsilon=8', '--private_channels=model'], 'without noise, so that there is'),
        (['--epsilon=8', '--algorithm=cfd'], 'the length of a code'),
        (['--epsilon=8', '--algorithm=fed_gen'], 'no FeatureGenerator'),
        (['--epsilon=8', '--model_bits=8'], '`model_aggregator` must be None'),
        (['--epsilon=8', '--student=document,cnn'], 'one student only'),
        (['--epsilon=8', '--delta=0.05'], 'well below 1 / --num_clients, 0.05'),
        (
            ['--algorithm=fed_avg', '--noise_multiplier=0.5', '--epsilon=1'],
            'One round costs an epsilon of',
        ),
        (['--secure_bits=8'], '--secure_bits has no effect without'),
        (
            ['--secure_aggregation', '--secure_knowledge_bound=1', '--algorithm=fed_avg'],
            '--secure_knowledge_bound has no effect with',
        ),
        (
            ['--secure_aggregation', '--secure_bits=8', '--secure_model_bound=1'],
            '`knowledge_bound` must be given',
        ),
    ],
)
def test_bad_flags_are_one_sentence(args, message, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  with helpers.flags_of(*args):
    assert train.main(['train']) == 1
  error = capsys.readouterr().err
  assert error.startswith('error: ') and message in error
  # No run was begun; the clients' files serve the next one.
  assert set(tmp_path.glob('runs/*')) <= {tmp_path / 'runs' / 'cache'}


def test_a_dry_run_says_what_would_be_and_leaves_nothing(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  with helpers.flags_of(
      *helpers.TINY_RUN, '--algorithm=fed_md', '--rounds=5', '--dry_run'
  ):
    assert train.main(['train']) == 0
  said = capsys.readouterr().out
  # 60 predictions of 10 classes and their weights; twice, of 2 clients, in 5 rounds.
  knowledge = 4 * 60 * 11 / 1e6
  assert f'up knowledge  {knowledge:17.3g}  {knowledge * 10:23.4g}' in said
  # Four clients with 25,450 weights each.
  kept = next(line for line in said.splitlines() if "clients' own states" in line)
  assert float(kept.split()[-1]) == pytest.approx(4 * 4 * 25450 / 1e6, rel=0.01)
  assert said.endswith('Nothing was trained (--dry_run).\n')
  assert set(tmp_path.glob('runs/*')) <= {tmp_path / 'runs' / 'cache'}


def test_a_config_repeats_a_run_where_nothing_else_is_said(tmp_path):
  path = tmp_path / 'config.json'
  with helpers.flags_of(*_TINY, '--algorithm=fed_df', '--seed=4', '--output_dir=x'):
    values = {
        flag.name: flag.value
        for flag in flags.FLAGS.flags_by_module_dict()[train_flags.__name__]
    }
  path.write_text(json.dumps({'flags': values, 'versions': {}}))
  with helpers.flags_of(f'--config={path}', '--seed=5'):
    train_flags.take_defaults()
    assert train_flags.ALGORITHM.value == 'fed_df' and train_flags.SEED.value == 5
    assert train_flags.STUDENT.value == ['cnn'] and train_flags.OUTPUT_DIR.value is None
    # As if they were given.
    assert flags.FLAGS['algorithm'].present and not flags.FLAGS['patience'].present
  assert train_flags.ALGORITHM.value == 'fed_distillation'
  assert not flags.FLAGS['algorithm'].present
  for text, message in (
      ('{}', '--config must be the config.json'),
      ('{"flags": {"unheard_of": 1}}', 'not known here: unheard_of'),
  ):
    path.write_text(text)
    with helpers.flags_of(f'--config={path}'):
      with pytest.raises(app.UsageError, match=message):
        train_flags.take_defaults()


def test_the_readmes_python_runs(tmp_path):
  blocks = (_ROOT / 'README.md').read_text().split('```python\n')[1:]
  # The others go on where the first ends.
  assert len(blocks) == 5
  code = '\n'.join(block.split('```')[0] for block in blocks)
  done = subprocess.run(
      [sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True,
      timeout=300, check=False, env={**os.environ, 'PYTHONPATH': str(_ROOT)},
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.count('sparse_categorical_accuracy') == 3
  assert list(tmp_path.glob('runs/clients/client-*-round-3.npz'))


def test_the_wrong_python_is_one_sentence(tmp_path):
  fake = tmp_path / 'python'
  fake.write_text(
      '#!/bin/sh\ncase "$1" in --version) echo Python 3.12.1;; *) exit 1;; esac\n'
  )
  fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
  done = subprocess.run(
      ['make', 'install', f'PYTHON={fake}', f'VENV={tmp_path / "venv"}'],
      cwd=_ROOT, capture_output=True, text=True, timeout=60, check=False,
  )
  assert done.returncode != 0
  lines = done.stderr.strip().splitlines()
  assert 'needs Python 3.11' in lines[0] and 'Python 3.12.1' in lines[0]
  assert len(lines) == 2  # That, and make's own line.


@pytest.mark.parametrize('name', ['ds_fl', 'fed_md'])
def test_clients_with_models_of_their_own(name, tmp_path):
  folder = tmp_path / 'out'
  tiny = [f for f in _TINY if not f.startswith(('--server_', '--back_', '--teacher'))]
  flags_of_run = [
      *tiny, f'--algorithm={name}', f'--output_dir={folder}',
      '--nocompare_with_fed_avg',
  ]
  done = _run(*flags_of_run, '--rounds=1')
  assert done.returncode == 0, done.stderr
  if name == 'ds_fl':
    done = _run(*flags_of_run, '--rounds=3', '--resume')
    assert done.returncode == 0, done.stderr
  assert "clients' own models, mean" in done.stdout
  rows = _rows(folder / 'metrics.csv')
  assert len(rows) == (3 if name == 'ds_fl' else 1)
  # Only fed_md's clients are all there is.
  assert ('test/client_accuracy' in rows[0]) == (name == 'ds_fl')
  assert (folder / 'student.keras').exists() == (name == 'ds_fl')
  assert list((folder / 'clients').glob('client-*-round-*.npz'))


def test_clients_without_models_of_their_own(tmp_path):
  tiny = [f for f in _TINY if not f.startswith(('--server_', '--back_', '--teacher'))]
  done = _run(
      *tiny, '--algorithm=cfd', '--prediction_bits=2', '--rounds=2',
      f'--output_dir={tmp_path}', '--nocompare_with_fed_avg',
  )
  assert done.returncode == 0, done.stderr
  assert 'up knowledge' in done.stdout
  rows = _rows(tmp_path / 'metrics.csv')
  assert len(rows) == 2 and (tmp_path / 'student.keras').exists()
  assert 'test/student_accuracy' in rows[0]
  assert not any('client_accuracy' in name for name in rows[0])


def test_flags_of_averaging_are_refused_where_nothing_is_averaged():
  for flag in ('--server_optimizer=adam', '--local_target=student'):
    done = _run('--algorithm=fd', flag)
    assert done.returncode == 1
    assert f'{flag.split("=")[0]} has no effect with --algorithm=fd' in done.stderr


def test_hindered_clients_are_counted_and_a_damaged_run_repeats(tmp_path):
  tiny = [f for f in _TINY if not f.startswith(('--back_', '--teacher', '--student'))]
  hindered = [
      *tiny, '--algorithm=fed_df', '--nocompare_with_fed_avg',
      '--dropout_before=0.2', '--dropout_after=0.2',
      '--straggler_share=0.5', '--delay_share=0.5', '--max_delay=1', '--coverage=0.5',
      '--min_reports=1', '--label_share=0.5', '--local_target=student', '--seed=4',
      '--robust_model=trimmed_mean', '--model_norm_bound=1e3',
      '--robust_knowledge=zeroing,clipping', '--knowledge_norm_bound=1e6',
  ]
  whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
  for folder, rounds in ((whole, 4), (resumed, 3)):
    done = _run(*hindered, f'--rounds={rounds}', f'--output_dir={folder}')
    assert done.returncode == 0, done.stderr
  # The newest checkpoint is damaged: the round after the one before comes again.
  (newest,) = resumed.glob('checkpoints/program_state_3/variables/*.data*')
  os.truncate(newest, newest.stat().st_size // 2)
  done = _run(*hindered, '--rounds=4', f'--output_dir={resumed}', '--resume')
  assert done.returncode == 0, done.stderr
  assert 'checkpoint of round 3 is damaged' in done.stderr
  rows = _rows(whole / 'metrics.csv')
  assert sum(float(row['participation/num_begun_late']) for row in rows) > 0
  for cause in ('dropped_after_training', 'late', 'stragglers'):
    assert f'client_work/participation/num_{cause}' in rows[0]
  assert 'round_skipped' in rows[0]
  for channel in ('model', 'knowledge'):
    assert f'aggregator/{channel}/num_left_out' in rows[0]
  assert 'aggregator/model/inner/num_clients' in rows[0]
  assert 'aggregator/knowledge/inner/zeroed_count' in rows[0]
  differing = {'round_seconds'}
  for row, again in zip(rows, _rows(resumed / 'metrics.csv'), strict=True):
    assert {k for k in row if row[k] != again[k]} <= differing


def test_a_share_out_of_range_is_a_sentence():
  done = _run(*_TINY, '--dropout_before=2')
  assert done.returncode == 1
  assert 'error: `dropout_before` must be from 0 to 1, found 2.0.' in done.stderr
