"""The benchmark as a user runs it, on a case of seconds."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def _run(*flags):
  return subprocess.run(
      [sys.executable, '-m', 'pipelines.benchmark', *flags],
      cwd=ROOT, capture_output=True, text=True, timeout=300,
  )


def test_a_small_case(tmp_path):
  done = _run(
      '--cases=batch_norm-2x40', '--scaling=', '--long_rounds=3', '--rounds=3',
      '--warm_up=1', f'--output_dir={tmp_path}',
  )
  assert done.returncode == 0, done.stderr
  assert 'batch_norm-2x40' in done.stdout
  results = json.loads((tmp_path / 'results.json').read_text())
  (case,) = results['cases']
  assert set(case['seconds']) == {'floor', 'tff', 'memory', 'ours'}
  assert all(len(times) == 3 for times in case['all_seconds'].values())
  # The weights and little else; the 80 examples would be 251,000 bytes more.
  assert 700_000 < case['sent'] < 900_000
  assert results['memory']['rounds'] == [1, 2, 3]
  assert (tmp_path / 'speed.png').stat().st_size > 10_000


@pytest.mark.parametrize('case', ['mlp', 'mlp-10', 'rnn-10x20', 'mlp-10x30', 'mlp-0x20'])
def test_a_bad_case_is_a_sentence(case):
  done = _run(f'--cases={case}')
  assert done.returncode != 0
  assert f"'{case}' is not MODEL-CLIENTSxEXAMPLES" in done.stdout + done.stderr
