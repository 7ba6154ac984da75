"""`pipelines.audit`, as a user runs it."""

import json
import types

from absl import app
import keras
import numpy as np
import pytest
import tensorflow as tf

from pipelines import audit_job
from pipelines import train_data
from pipelines import train_flags
from pipelines import UserError
from tests import helpers
import tff_kd


@pytest.fixture(scope='module')
def run_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('audited') / 'run'
  helpers.train_here(
      *helpers.TINY_RUN, f'--output_dir={folder}', '--algorithm=fed_df', '--rounds=1',
      '--server_steps=5', '--epsilon=20', '--nocompare_with_fed_avg',
  )
  return folder


# What it calls is in `membership_test` and `inversion_test`.
@pytest.mark.slow
def test_it_attacks_and_reports(run_dir):
  done = helpers.script(
      'pipelines.audit', f'--run={run_dir}', '--victims=2', '--inversion_epochs=2'
  )
  assert 'membership by loss, AUC' in done.stdout
  assert 'before its noise, is not' in done.stdout
  report = json.loads((run_dir / 'audit' / 'report.json').read_text())
  student = report['membership']['student']['overall']
  auc = student['auc']
  assert 0 <= auc['low'] <= auc['value'] <= auc['high'] <= 1
  # Who took part is secret; half of what they have, or of the 1,000 others.
  assert 10 <= student['num_members'] == student['num_non_members'] <= 500
  assert len(report['clients']['names']) == 2
  assert set(report['inversion']) == {
      'class PSNR', 'class SSIM', 'example PSNR', 'example SSIM'
  }
  text = (run_dir / 'audit' / 'report.md').read_text()
  assert '## What this does not test' in text
  assert report['shadow_models'] is None and '--shadow_models=16` runs them' in text
  for name in ('membership.png', 'inversion.png'):
    assert f']({name})' in text
    assert (run_dir / 'audit' / name).stat().st_size > 5000


@pytest.mark.slow
def test_shadow_models(run_dir, tmp_path):
  done = helpers.script(
      'pipelines.audit', f'--run={run_dir}', f'--report_dir={tmp_path}', '--victims=1',
      '--inversion_epochs=0', '--shadow_models=4', '--shadow_epochs=1',
  )
  assert 'student: trains 4 shadow models on' in done.stderr
  assert 'shadow model 4 of 4, best after pass 1; about 0 s to go' in done.stderr
  assert 'members found at 0.1 %' in done.stdout
  found = json.loads((tmp_path / 'report.json').read_text())['shadow_models']
  assert found['num_models'] == 4 and set(found['students']) == {'student'}
  student = found['students']['student']
  # All members and the 1,000 others were shared out.
  online = student['online']
  assert online['num_non_members'] == 1000
  assert found['num_examples'] == -(-(online['num_members'] + 1000) // 2)
  assert student['of_shadow'] is None and student['fixed_variance']
  for attack in ('online', 'offline', 'loss'):
    low, high = student[attack]['detections']
    assert (low['allowed_rate'], high['allowed_rate']) == (0.001, 0.01)
    assert low['true_positive_rate']['value'] <= high['true_positive_rate']['value']
    rate = low['false_positive_rate']
    assert 0 <= rate['low'] <= rate['value'] <= 0.001 < rate['high']
  text = (tmp_path / 'report.md').read_text()
  assert '## As one who also trains shadow models' in text
  assert 'not by the algorithm of the run' in text and '--shadow_models=16' not in text
  assert '](shadow_models.png)' in text
  assert (tmp_path / 'shadow_models.png').stat().st_size > 5000


def test_a_wrong_number_of_shadow_models_is_named():
  done = helpers.script('pipelines.audit', '--run=nowhere', '--shadow_models=5', status=1)
  assert 'an even number of 4 or more' in done.stderr


@pytest.mark.slow
def test_clients_that_keep_their_models(tmp_path, capsys):
  helpers.train_here(
      *helpers.TINY_RUN, f'--output_dir={tmp_path / "run"}', '--algorithm=fd',
      '--rounds=1', '--nocompare_with_fed_avg', '--student=mlp_small,cnn',
  )
  with helpers.flags_of():
    audit_job.run(
        tmp_path / 'run', tmp_path / 'audit', num_victims=2, seed=0, num_epochs=60,
        num_shadow_models=4,
    )
  printed = capsys.readouterr().out
  assert 'This run releases no model.' in printed
  assert "clients' own models, about which they send" in printed
  assert 'one mean for each class' in printed
  assert 'no attacks with shadow models: this run releases no student' in printed
  text = (tmp_path / 'audit' / 'report.md').read_text()
  assert '--shadow_models=16` runs them' in text


@pytest.mark.slow
@pytest.mark.parametrize(
    'labels, is_audited',
    [('one-hot, softmax', True), ('binary, float [n, 1]', True), ('several', False)],
)
def test_labels_that_are_no_class_numbers(labels, is_audited, tmp_path):
  kind = {'labels': labels, 'model': 'functional'}
  (tmp_path / 'kind.json').write_text(json.dumps(kind))
  folder = tmp_path / 'run'
  helpers.train_here(
      '--task=tests/label_kinds.py', f'--data_dir={tmp_path}', '--rounds=2',
      '--algorithm=fed_avg', '--rounds_per_checkpoint=2', '--transfer_labels=0',
      f'--output_dir={folder}', f'--cache_dir={tmp_path / "cache"}',
  )

  def audit():
    audit_job.run(folder, tmp_path / 'report', num_victims=2, seed=0, num_epochs=0)

  with helpers.flags_of():
    if not is_audited:
      with pytest.raises(UserError, match='classifiers with one prediction an example'):
        audit()
      return
    audit()
  report = json.loads((tmp_path / 'report' / 'report.json').read_text())
  results = json.loads((folder / 'results.json').read_text())
  found = report['membership']['student']
  assert found['non_member_accuracy'] == pytest.approx(
      results['best']['test/student_accuracy'], abs=0.05
  )


def test_what_is_no_finished_run_is_named(tmp_path):
  for content, error, match in (
      (None, app.UsageError, 'must be the config.json in the folder of a run'),
      ({'flags': {}, 'given': []}, UserError, 'has not ended'),
      ({'flags': {'unheard_of': 1}}, app.UsageError, 'not known here: unheard_of'),
  ):
    if content is not None:
      (tmp_path / 'config.json').write_text(json.dumps(content))
    with helpers.flags_of(), pytest.raises(error, match=match):
      audit_job.run(tmp_path, tmp_path / 'audit', num_victims=1, seed=0, num_epochs=0)


@pytest.mark.parametrize('faults', [(), ('--dropout_after=0.5',)])
def test_members_are_those_of_whom_the_kept_models_have_learnt(faults, tmp_path):
  best, last, skipped = 4, 12, 2
  batches = types.SimpleNamespace(
      data=types.SimpleNamespace(num_examples=np.array([0] + [5] * 11))
  )
  (tmp_path / 'results.json').write_text(
      json.dumps({'rounds': last, 'best_round': best})
  )
  (tmp_path / 'metrics.csv').write_text(
      'round,round_skipped\n'
      + ''.join(f'{n},{int(n == skipped)}\n' for n in range(1, last + 1))
  )
  with helpers.flags_of('--num_clients=12', '--clients_per_round=2', *faults):
    participation = train_data.build_participation(batches)
    found = audit_job._who_took_part(tmp_path, batches)
  expected, every = set(), set()
  for round_num in range(1, last + 1):
    for client in participation(round_num):
      number = client['data'] if faults else client
      every.add(number)
      is_heard = not faults or bool(client['conditions'].reports)
      if is_heard and round_num <= best and round_num != skipped:
        expected.add(number)
  assert found == sorted(expected - {0}) and len(found) < len(every - {0})


@pytest.mark.parametrize(
    'args, is_of_all',
    [
        ([], False), (['--algorithm=fed_df'], False), (['--algorithm=fed_gkd'], True),
        (['--local_target=student'], True), (['--label_share=1'], True),
    ],
)
def test_members_are_what_clients_were_trained_on(args, is_of_all, tmp_path):
  rows = [np.arange(40)[::-1], np.array([], int), np.arange(40, 47)]
  x = np.zeros((47, 1), np.float32)
  with helpers.flags_of('--algorithm=fed_avg', '--label_share=0.4', *args):
    batches = tff_kd.ClientBatches(
        data=tff_kd.FileClientData.from_arrays((x, x[:, 0]), rows, directory=tmp_path),
        batch_size=3, num_epochs=2, label_share=train_flags.LABEL_SHARE.value,
    )
    found = audit_job._trained_on(rows, batches, train_flags.algorithm())
  for client, of_client in enumerate(rows):
    expected = of_client
    if not is_of_all:
      used, known = batches.rows_and_labelled(tf.constant(client), tf.constant(7))
      expected = sorted({row for row, k in zip(used.numpy(), known.numpy()) if k})
    np.testing.assert_array_equal(found[client], expected)
  assert is_of_all or 0 < len(found[0]) < 40


class _Own(keras.Model):
  """Keras's `predict` refuses a name that begins with an underscore."""

  def call(self, inputs):
    return 2.0 * inputs


def test_models_of_any_class_are_read():
  x = np.float32([[1, 2], [3, 4]])
  spec = helpers.model_spec(
      helpers.dense_fn(dim=2, classes=2),
      input_spec=(tf.TensorSpec([None, 2]), tf.TensorSpec([None], tf.int32)),
  )
  found = audit_job._Reader(None, spec).logits(_Own(), x)
  np.testing.assert_array_equal(found, 2 * x)


def test_help_does_not_list_the_flags_of_training():
  done = helpers.script('pipelines.audit', '--help')
  assert '--victims' in done.stdout and '--clients_per_round' not in done.stdout
