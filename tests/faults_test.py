"""What becomes of a run whose process is killed, or whose disk is full."""

import pathlib
import subprocess
import sys
import time

import pytest

from tests import helpers

_OWN_MOUNTS = ['unshare', '--user', '--map-root-user', '--mount']


def _metrics(folder):
  return [
      {k: float(v) for k, v in row.items() if k != 'round_seconds'}
      for row in helpers.rows(pathlib.Path(folder, 'metrics.csv'))
  ]


def _wait_for_rounds(folder, count, script):
  path = pathlib.Path(folder, 'metrics.csv')
  deadline = time.monotonic() + helpers.HANGING_S
  while time.monotonic() < deadline:
    assert script.poll() is None, script.stderr.read()
    if path.exists() and len(path.read_text().splitlines()) > count:
      return
    time.sleep(0.02)
  raise AssertionError('There is no round.')


def _train(folder, *args):
  return ['-m', 'pipelines.train', *helpers.TINY_RUN, f'--output_dir={folder}', *args]


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  folder = tmp_path_factory.mktemp('undisturbed')
  helpers.train_here(*helpers.TINY_RUN, f'--output_dir={folder}', '--rounds=12')
  return _metrics(folder)


@pytest.mark.slow
def test_a_script_killed_in_mid_run_goes_on_exactly(undisturbed, tmp_path):
  with helpers.running(*_train(tmp_path, '--rounds=12')) as script:
    _wait_for_rounds(tmp_path, 2, script)
    script.kill()
  helpers.train(*_train(tmp_path, '--rounds=12')[2:])
  assert _metrics(tmp_path) == undisturbed


_FULL_DISK = '''
set -u
disk=$1; begun=$2; out=$3; shift 3
mount -t tmpfs -o size=60m none "$disk"
cp -r "$begun" "$disk/run" || exit 11
free=$(df --output=avail -k "$disk" | tail -n 1)
dd if=/dev/zero of="$disk/fill" bs=1k count=$((free - 20)) 2> /dev/null || exit 12
"$@" --rounds=12 2>&1 > /dev/null && exit 13
rm "$disk/fill"
"$@" --rounds=12 > "$disk/output" 2>&1 || { cat "$disk/output"; exit 14; }
cp "$disk/run/metrics.csv" "$out"
'''


# Two starts of Python; what a full disk leaves is in `checkpoints_test`, too.
@pytest.mark.slow
@pytest.mark.skipif(
    not helpers.is_allowed(*_OWN_MOUNTS, 'mount', '-t', 'tmpfs', 'none', '/mnt'),
    reason='file systems may not be mounted here',
)
def test_a_run_stops_at_a_full_disk_and_goes_on(undisturbed, tmp_path):
  disk, begun = tmp_path / 'disk', tmp_path / 'begun'
  disk.mkdir()
  helpers.train_here(*helpers.TINY_RUN, f'--output_dir={begun}', '--rounds=2')
  command = [sys.executable, *_train(disk / 'run')]
  script = subprocess.run(
      [*_OWN_MOUNTS, 'sh', '-c', _FULL_DISK, 'sh', disk, begun, tmp_path, *command],
      cwd=helpers.ROOT, capture_output=True, text=True, timeout=helpers.HANGING_S,
  )
  assert script.returncode == 0, script.stdout + script.stderr
  assert 'error: The checkpoint of round 3 cannot be written' in script.stdout
  assert 'No space left on device' in script.stdout
  assert 'Traceback' not in script.stdout
  assert _metrics(tmp_path) == undisturbed
