"""`pipelines.audit`, as a user runs it."""

import json
import subprocess
import sys

import pytest

from pipelines import audit_job
from pipelines import UserError
from tests import helpers


def _script(name, *args):
  return subprocess.run(
      [sys.executable, '-m', f'pipelines.{name}', *args],
      cwd=helpers.ROOT, capture_output=True, text=True, timeout=300,
  )


@pytest.fixture(scope='module')
def run_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('audited') / 'run'
  helpers.train_here(
      *helpers.TINY_RUN, f'--output_dir={folder}', '--algorithm=fed_df', '--rounds=1',
      '--server_steps=5', '--epsilon=20', '--nocompare_with_fed_avg',
  )
  return folder


def test_it_attacks_and_reports(run_dir):
  done = _script('audit', f'--run={run_dir}', '--victims=2', '--inversion_epochs=2')
  assert done.returncode == 0, done.stderr
  assert 'membership by loss, AUC' in done.stdout
  assert 'before its noise, is not' in done.stdout
  report = json.loads((run_dir / 'audit' / 'report.json').read_text())
  student = report['membership']['student']['overall']
  auc = student['auc']
  assert 0 <= auc['low'] <= auc['value'] <= auc['high'] <= 1
  # Who took part is secret; half of what they have, or of the 1,000 others.
  assert 10 <= student['num_members'] == student['num_non_members'] <= 500
  assert len(report['clients']['numbers']) == 2
  assert set(report['inversion']) == {
      'class PSNR', 'class SSIM', 'example PSNR', 'example SSIM'
  }
  text = (run_dir / 'audit' / 'report.md').read_text()
  assert '## What this does not test' in text
  for name in ('membership.png', 'inversion.png'):
    assert f']({name})' in text
    assert (run_dir / 'audit' / name).stat().st_size > 5000


def test_clients_that_keep_their_models(tmp_path, capsys):
  helpers.train_here(
      *helpers.TINY_RUN, f'--output_dir={tmp_path / "run"}', '--algorithm=fd',
      '--rounds=1', '--nocompare_with_fed_avg', '--student=document,cnn',
  )
  with helpers.flags_of():
    audit_job.run(
        tmp_path / 'run', tmp_path / 'audit', num_victims=2, seed=0, num_epochs=60
    )
  printed = capsys.readouterr().out
  assert 'This run releases no model.' in printed
  assert "clients' own models, about which they send" in printed
  assert 'one mean for each class' in printed


def test_what_is_no_finished_run_is_named(tmp_path):

  def audit():
    audit_job.run(tmp_path, tmp_path / 'audit', num_victims=1, seed=0, num_epochs=0)

  with helpers.flags_of(), pytest.raises(
      UserError, match='holds no run: there is no config'
  ):
    audit()
  (tmp_path / 'config.json').write_text('{"flags": {}}')
  with pytest.raises(UserError, match='has not ended'):
    audit()
  (tmp_path / 'config.json').write_text('{"flags": {"unheard_of": 1}}')
  (tmp_path / 'results.json').write_text('{"rounds": 1}')
  with pytest.raises(UserError, match='not known here: unheard_of'):
    audit()


def test_help_does_not_list_the_flags_of_training():
  done = _script('audit', '--help')
  assert '--victims' in done.stdout and '--clients_per_round' not in done.stdout
