"""Workers in other network namespaces, and a disk that is really full.

Both need namespaces that an ordinary user may make on most Linux machines; where not,
these tests are skipped.
"""

import csv
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests import helpers
from tests import two_machines
from tff_kd.simulation import tls

_OWN_NETWORK = [
    'unshare', '--user', '--map-root-user', '--net', '--pid', '--fork', '--kill-child',
    '--mount-proc',
]
_OWN_MOUNTS = ['unshare', '--user', '--map-root-user', '--mount']


def _is_allowed(*command: str) -> bool:
  return shutil.which(command[0]) is not None and (
      subprocess.run(command, capture_output=True).returncode == 0
  )


@pytest.mark.skipif(
    not _is_allowed(*_OWN_NETWORK, 'ip', 'link', 'add', 'type', 'veth'),
    reason='network namespaces may not be made here',
)
def test_two_machines_are_as_one(tmp_path):
  certificates, path = tmp_path / 'certificates', tmp_path / 'weights.npz'
  tls.make_certificates(certificates)
  subprocess.run(
      [*_OWN_NETWORK, sys.executable, '-m', 'tests.two_machines', certificates, path],
      cwd=helpers.ROOT, check=True, timeout=300,
  )
  found = dict(np.load(path))
  # Both took part, and of each only the port with certificates is open.
  assert (found.pop('traffic') > 10_000).all()
  np.testing.assert_array_equal(found.pop('ports'), [[8000], [8000]])
  expected = two_machines.final_weights()
  assert found.keys() == expected.keys() and len(found) > 20
  for name, its in expected.items():
    np.testing.assert_allclose(found[name], its, atol=1e-6, err_msg=name)


_FULL_DISK = '''
set -u
disk=$1; shift
mount -t tmpfs -o size=60m none "$disk"
"$@" --rounds=2 > "$disk/output" 2>&1 || exit 11
free=$(df --output=avail -k "$disk" | tail -n 1)
dd if=/dev/zero of="$disk/fill" bs=1k count=$((free - 20)) 2> /dev/null || exit 12
"$@" --rounds=4 2>&1 > /dev/null && exit 13
dd if=/dev/zero of="$disk/fill" bs=1k oflag=append conv=notrunc 2> /dev/null
"$@" --rounds=4 2>&1 > /dev/null && exit 14
rm "$disk/fill"
"$@" --rounds=4 > "$disk/output" 2>&1 || { cat "$disk/output"; exit 15; }
cat "$disk/run/metrics.csv"
'''


@pytest.mark.skipif(
    not _is_allowed(*_OWN_MOUNTS, 'mount', '-t', 'tmpfs', 'none', '/mnt'),
    reason='file systems may not be mounted here',
)
def test_a_run_stops_at_a_full_disk_and_goes_on(tmp_path):
  def command(folder):
    return [
        sys.executable, '-m', 'pipelines.train', *helpers.TINY_RUN,
        f'--cache_dir={tmp_path / "cache"}', f'--output_dir={folder}',
    ]

  disk = tmp_path / 'disk'
  disk.mkdir()
  script = subprocess.run(
      [*_OWN_MOUNTS, 'sh', '-c', _FULL_DISK, 'sh', disk, *command(disk / 'run')],
      cwd=helpers.ROOT, capture_output=True, text=True, timeout=300,
  )
  assert script.returncode == 0, script.stdout + script.stderr
  errors, metrics = script.stdout.split('round,', 1)
  assert errors.count('error: ') == 2 and 'Traceback' not in errors
  assert 'error: The checkpoint of round 3 cannot be written' in errors
  assert errors.count('No space left on device') == 2
  subprocess.run(
      [*command(tmp_path / 'undisturbed'), '--rounds=4'], cwd=helpers.ROOT,
      capture_output=True, check=True, timeout=300,
  )
  expected = (tmp_path / 'undisturbed' / 'metrics.csv').read_text()
  found = [list(csv.DictReader(its.splitlines())) for its in (
      'round,' + metrics, expected
  )]
  for rows in found:
    assert len(rows) == 4
    for row in rows:
      del row['round_seconds']
  assert found[0] == found[1]
