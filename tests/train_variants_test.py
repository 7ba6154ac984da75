"""`pipelines.train` with other data, other algorithms, hindered clients.

Whole runs are in `make slow`: the first run is in `train_script_test`, the processes
that flags ask for are built in `train_flags_test` and `documents_test`, and what they
compute is in the tests of the algorithms.
"""

import json
import os
import shutil

from absl import flags
import keras
import numpy as np
import pytest

import pipelines
from pipelines import evaluate_job
from pipelines import kept
from pipelines import train_flags
from pipelines import train_alone
from tests import data_test
from tests import helpers
import tff_kd
from tff_kd.models import zoo


def _without(*beginnings):
  return [flag for flag in helpers.TINY_FUSION if not flag.startswith(beginnings)]


@pytest.mark.slow
@pytest.mark.parametrize('compares', [False, True])
def test_idx_files_fed_df_cohorts_and_pretraining(compares, tmp_path):
  data_test._write_idx(tmp_path, n_train=120, n_test=30, zipped=True)
  printed = helpers.train_here(
      '--task=idx', f'--data_dir={tmp_path}', '--algorithm=fed_df',
      '--partition=shards', '--num_clients=5', '--clients_per_round=3',
      '--client_weighting=uniform', '--transfer_size=30', '--transfer_labels=30',
      '--validation_size=20', '--pretrain_epochs=1', '--server_steps=2',
      '--distillation_weight=0.5', '--local_target=student', '--rounds=2',
      '--student=mlp_small,cnn', f'--output_dir={tmp_path / "out"}',
      '--model_bits=8', '--consensus=mean_probabilities', '--prediction_top=2',
      f'--compare_with_fed_avg={compares}',
  )
  assert "student before the server's distillation" in printed
  assert ('FedAvg, same rounds' in printed) == compares
  assert 'teacher' not in printed
  assert not (tmp_path / 'out' / 'teacher.keras').exists()
  # Clients 0, 2, 4 have the one architecture, 1 and 3 the other.
  assert 'student, cohort 1 (cnn)' in printed
  for row in helpers.rows(tmp_path / 'out' / 'metrics.csv'):
    # Arrays of 1,000 numbers are rounded; of 3 probabilities 2 are sent, 34 bits each.
    assert float(row['bytes/up_model']) < 0.7 * float(row['bytes/down_student'])
    assert float(row['bytes/up_knowledge']) == 3 * 30 * 2 * 34 / 8
    each = [float(row[f'test/student_{i}_accuracy']) for i in (0, 1)]
    assert float(row['test/student_accuracy']) == pytest.approx(np.mean(each))
  first, second = (
      keras.models.load_model(tmp_path / 'out' / f'student_{i}.keras')
      for i in (0, 1)
  )
  assert isinstance(first, zoo.SmallMlp)
  assert isinstance(second, keras.Sequential)


_OWN = '--algorithm=examples/own_algorithm.py'
_OWN_RULE = '--consensus=examples/own_rule.py'


@pytest.mark.parametrize(
    'own', [(_OWN, '--proximal_weight=10'), ('--algorithm=fed_df', _OWN_RULE)]
)
def test_an_algorithm_and_a_rule_of_ones_own_are_built(own):
  printed = helpers.train_here(*own, *helpers.TINY_RUN[1:], '--rounds=1', '--dry_run')
  assert 'Nothing was trained' in printed


def test_a_fed_avg_of_ones_own_is_compared_with_fed_avg(tmp_path):
  own = shutil.copy(helpers.ROOT / 'tff_kd' / 'algorithms' / 'fed_avg.py', tmp_path)
  for algorithm, is_compared in ((own, True), ('fed_avg', False)):
    printed = helpers.train_here(
        *helpers.TINY_RUN, f'--algorithm={algorithm}', '--rounds=1',
        f'--output_dir={tmp_path / str(is_compared)}',
    )
    assert ('FedAvg, same rounds' in printed) == is_compared


@pytest.mark.slow
def test_an_algorithm_and_a_rule_of_ones_own(tmp_path):
  flags_of_run = [
      *helpers.TINY_RUN[1:], '--rounds=1', '--compare_with_fed_avg=false',
  ]
  decayed = []
  for weight in (0.01, 10.0):
    folder = tmp_path / f'decay_{weight}'
    helpers.train_here(
        _OWN, f'--proximal_weight={weight}',
        f'--output_dir={folder}', *flags_of_run,
    )
    model = keras.models.load_model(folder / 'student.keras')
    decayed.append(sum(np.sum(np.square(w)) for w in model.get_weights()))
  # At a rate of .1, a weight of 10 takes all that a step begins with.
  assert decayed[1] < 0.2 * decayed[0]
  helpers.train_here(
      '--algorithm=fed_df', _OWN_RULE, '--server_steps=2',
      '--clients_start_from=average', '--student_start=released', '--augment',
      f'--output_dir={tmp_path / "rule"}', *flags_of_run,
  )
  assert helpers.rows(tmp_path / 'rule' / 'metrics.csv')


@pytest.mark.slow
def test_students_may_change_their_inputs_at_clients(tmp_path):
  printed = helpers.train_here(
      *helpers.TINY_RUN, '--task=examples/shifting_clients.py', '--rounds=1',
      f'--output_dir={tmp_path / "out"}',
  )
  assert 'mnist5k, clients shift' in printed
  (row,) = helpers.rows(tmp_path / 'out' / 'metrics.csv')
  # Evaluation shifts nothing: the file's model, asked twice, has the score of the run.
  model = keras.models.load_model(tmp_path / 'out' / 'student.keras')
  task = tff_kd.data.TASKS['mnist5k'].load(seed=0, transfer_size=60)
  found = [model.predict(task.test.inputs, verbose=0).argmax(-1) for _ in range(2)]
  np.testing.assert_array_equal(*found)
  accuracy = np.mean(found[0] == task.test.labels)
  assert float(row['test/student_accuracy']) == pytest.approx(accuracy, abs=1e-6)


@pytest.mark.slow
def test_the_average_goes_on_and_what_is_released_is_aligned(tmp_path):
  folder = tmp_path / 'aligned'
  helpers.train_here(
      *_without('--transfer_labels'), '--transfer_labels=0', '--consensus=aligned',
      '--prior=average', '--consensus_sharpness=1.5', '--clients_start_from=average',
      '--student_start=released', '--augment', '--rounds=2', '--nocompare_with_fed_avg',
      f'--output_dir={folder}',
  )
  rows = helpers.rows(folder / 'metrics.csv')
  results = json.loads((folder / 'results.json').read_text())
  best = rows[results['best_round'] - 1]
  task = tff_kd.data.TASKS['mnist5k'].load(seed=0)
  of_file = {'student.keras': 'student', 'sent/student.keras': 'student_before'}
  for path, name in of_file.items():
    logits = keras.models.load_model(folder / path).predict(task.test.inputs, verbose=0)
    accuracy = np.mean(logits.argmax(-1) == task.test.labels)
    assert float(best[f'test/{name}_accuracy']) == pytest.approx(accuracy, abs=1e-6)


@pytest.mark.slow
def test_the_average_is_calibrated(tmp_path):
  folder = tmp_path / 'calibrated'
  helpers.train_here(
      *helpers.TINY_RUN, '--calibrate', '--rounds=2', '--nocompare_with_fed_avg',
      f'--output_dir={folder}',
  )
  for row in helpers.rows(folder / 'metrics.csv'):
    distances = [
        float(row[f'server_distillation/student/marginal_distance_{when}'])
        for when in ('before', 'after')
    ]
    assert distances[1] < 1e-3 < distances[0]
    # Nothing more is sent.
    assert 'bytes/up_knowledge' not in row


@pytest.mark.parametrize(
    'flag, message',
    [
        ('--algorithm=no_such.py', 'There is no file no_such.py'),
        ('--algorithm=examples/own_rule.py', 'must define `INFO'),
        ('--algorithm=fedavg', 'no algorithm .* among fed_avg'),
        ('--consensus=examples/own_algorithm.py', 'must define `RULE`'),
        ('--consensus=median', 'no consensus rule .* among mean_logits'),
    ],
)
def test_what_is_no_algorithm_or_rule(flag, message):
  with pytest.raises(flags.IllegalFlagValueError, match=message):
    helpers.refused_here(flag)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['ds_fl', 'fed_md'])
def test_clients_with_models_of_their_own(name, tmp_path, monkeypatch):
  folder = tmp_path / 'out'
  tiny = _without('--server_', '--back_', '--teacher')
  flags_of_run = [
      *tiny, f'--algorithm={name}', f'--output_dir={folder}',
      '--nocompare_with_fed_avg',
  ]
  if name == 'fed_md':
    # Clients do that themselves: no model is trained to be thrown away.
    flags_of_run.append('--pretrain_epochs=1')
    monkeypatch.delattr(train_alone, 'pretrain')
  printed = helpers.train_here(*flags_of_run, '--rounds=2')
  assert "clients' own models, mean" in printed
  rows = helpers.rows(folder / 'metrics.csv')
  assert len(rows) == 2
  # Only fed_md's clients are all there is.
  assert ('test/client_accuracy' in rows[0]) == (name == 'ds_fl')
  assert (folder / 'student.keras').exists() == (name == 'ds_fl')
  assert list((folder / 'clients').glob('client-*-round-*.npz'))
  if name == 'fed_md':
    # There is no other model; each client's own is judged on that client's examples.
    with helpers.flags_of(f'--config={folder / "config.json"}'):
      train_flags.take_defaults()
      evaluate_job.run(folder, folder / 'evaluation', part='test', num_worst=1)
    report = json.loads((folder / 'evaluation' / 'report.json').read_text())
    assert list(report['models']) == ['client']
    of_clients = helpers.rows(folder / 'evaluation' / 'clients.csv')
    mean = np.mean([float(row['client_accuracy']) for row in of_clients])
    assert report['models']['client']['clients']['mean'] == pytest.approx(mean)
    assert (folder / 'evaluation' / 'confusion_client.png').exists()
    for path in (folder / 'clients').iterdir():
      path.write_bytes(b'')
    damaged = r"client .*'s state after .* is damaged: .*/clients/client-"
    with helpers.flags_of(f'--config={folder / "config.json"}'):
      train_flags.take_defaults()
      with pytest.raises(pipelines.UserError, match=damaged):
        evaluate_job.run(folder, folder / 'evaluation', part='test', num_worst=1)
    message = helpers.refused_here(*flags_of_run, '--rounds=3')
    assert 'is damaged' in message and 'To go on: python -m pipelines.train' in message
    (folder / 'results.json').unlink(missing_ok=True)
    with pytest.raises(pipelines.UserError, match='has not ended.*Go on with it'):
      kept.load(folder)


@pytest.mark.slow
def test_clients_without_models_of_their_own(tmp_path):
  tiny = _without('--server_', '--back_', '--teacher')
  printed = helpers.train_here(
      *tiny, '--algorithm=cfd', '--prediction_bits=2', '--rounds=2',
      f'--output_dir={tmp_path}', '--nocompare_with_fed_avg',
  )
  assert 'up knowledge' in printed
  rows = helpers.rows(tmp_path / 'metrics.csv')
  assert len(rows) == 2 and (tmp_path / 'student.keras').exists()
  assert 'test/student_accuracy' in rows[0]
  assert not any('client_accuracy' in name for name in rows[0])


@pytest.mark.slow
def test_hindered_clients_are_counted_and_a_damaged_run_repeats(tmp_path):
  tiny = _without('--back_', '--teacher', '--student')
  hindered = [
      *tiny, '--algorithm=fed_df', '--nocompare_with_fed_avg',
      '--dropout_before=0.2', '--dropout_after=0.2',
      '--straggler_share=0.5', '--delay_share=0.5', '--max_delay=1', '--coverage=0.5',
      '--min_reports=1', '--label_share=0.5', '--local_target=student', '--seed=4',
      '--robust_model=trimmed_mean', '--model_norm_bound=1e3',
      '--robust_knowledge=zeroing,clipping', '--knowledge_norm_bound=1e6',
  ]
  whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
  helpers.train_here(*hindered, '--rounds=4', f'--output_dir={whole}')
  # As if it had been stopped in its last round. The newest checkpoint is damaged: the
  # round after the one before comes again.
  shutil.copytree(whole, resumed)
  (resumed / 'results.json').unlink()
  lines = (resumed / 'metrics.csv').read_text().splitlines(keepends=True)
  (resumed / 'metrics.csv').write_text(''.join(lines[:-1]))
  newest = resumed / 'checkpoints/program_state_4'
  os.truncate(newest, newest.stat().st_size // 2)
  done = helpers.train(*hindered, '--rounds=4', f'--output_dir={resumed}', '--resume')
  assert 'checkpoint of round 4 is damaged' in done.stderr
  rows = helpers.rows(whole / 'metrics.csv')
  assert sum(float(row['participation/num_begun_late']) for row in rows) > 0
  for cause in ('dropped_after_training', 'late', 'stragglers'):
    assert f'client_work/participation/num_{cause}' in rows[0]
  assert 'round_skipped' in rows[0]
  for channel in ('model', 'knowledge'):
    assert f'aggregator/{channel}/num_left_out' in rows[0]
  assert 'aggregator/model/inner/num_clients' in rows[0]
  assert 'aggregator/knowledge/inner/zeroed_count' in rows[0]
  differing = {'round_seconds'}
  for row, again in zip(rows, helpers.rows(resumed / 'metrics.csv'), strict=True):
    assert {k for k in row if row[k] != again[k]} <= differing


@pytest.mark.slow
@pytest.mark.parametrize('name', ['scaffold', 'fed_dyn', 'moon'])
def test_stateful_clients_with_terms_for_label_skew(name, tmp_path):
  helpers.train_here(
      *(flag for flag in helpers.TINY_RUN if not flag.startswith('--algorithm')),
      f'--algorithm={name}', '--prior_tau=1', '--prior_smoothing=0.1',
      '--vacant_weight=0.1', '--absent_scale=0.9', '--rounds=2',
      f'--output_dir={tmp_path}', '--nocompare_with_fed_avg',
  )
  rows = helpers.rows(tmp_path / 'metrics.csv')
  assert len(rows) == 2 and (tmp_path / 'student.keras').exists()
  assert list((tmp_path / 'clients').glob('client-*-round-*.npz'))
  # Control variates go up beside the weights.
  assert ('bytes/up_companion' in rows[0]) == (name == 'scaffold')
