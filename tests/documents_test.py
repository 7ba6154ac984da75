"""What README and docs say is run as it stands there."""

import os
import stat
import subprocess
import sys

from tests import helpers


def test_the_readmes_python_runs(tmp_path):
  blocks = (helpers.ROOT / 'README.md').read_text().split('```python\n')[1:]
  # The others go on where the first ends.
  assert len(blocks) == 5
  code = '\n'.join(block.split('```')[0] for block in blocks)
  done = subprocess.run(
      [sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True,
      timeout=300, check=False, env={**os.environ, 'PYTHONPATH': str(helpers.ROOT)},
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
      cwd=helpers.ROOT, capture_output=True, text=True, timeout=60, check=False,
  )
  assert done.returncode != 0
  lines = done.stderr.strip().splitlines()
  assert 'needs Python 3.11' in lines[0] and 'Python 3.12.1' in lines[0]
  assert len(lines) == 2  # That, and make's own line.
