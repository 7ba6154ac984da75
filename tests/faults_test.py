"""What dies, freezes or knocks, with real processes, and what then becomes of a round."""

import contextlib
import csv
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import portpicker
import psutil
import pytest
from tff_kd.compat import tff

import tff_kd
from tests import helpers
from tff_kd.simulation import connections
from tff_kd.simulation import tls
from tff_kd.simulation import transport

_OWN_MOUNTS = ['unshare', '--user', '--map-root-user', '--mount']


@tff.federated_computation(tff.FederatedType(np.int32, tff.CLIENTS))
def _total(values):
  return tff.federated_sum(values)


def _listening(pid):
  return [
      s.laddr for s in psutil.Process(pid).net_connections('inet')
      if s.status == psutil.CONN_LISTEN
  ]


def _reaches(host, port):
  try:
    socket.create_connection((host, port), 2.0).close()
    return True
  except OSError:
    return False


_WITHOUT_PTRACE = """
import ctypes, struct, tempfile
import portpicker
from tff_kd.simulation import worker_process

# A filter under which call 101 of x86-64, ptrace, is not permitted.
rules = b''.join(struct.pack('HBBI', *rule) for rule in [
    (0x20, 0, 0, 0), (0x15, 0, 1, 101), (0x06, 0, 0, 0x00050001),
    (0x06, 0, 0, 0x7FFF0000)])
class Program(ctypes.Structure):
  _fields_ = [('len', ctypes.c_ushort), ('rules', ctypes.c_char_p)]
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(4, rules))) == 0

def start(allow_open):
  with tempfile.TemporaryFile() as log:
    worker_process.WorkerProcess(
        portpicker.pick_unused_port(), max_concurrent_calls=1, log=log,
        allow_open=allow_open,
    ).stop()

try:
  start(False)
except worker_process.RuntimeStartError as error:
  print(error)
start(True)
print('started')
"""


def test_where_a_worker_cannot_be_hidden_it_does_not_start():
  with helpers.running('-c', _WITHOUT_PTRACE) as script:
    said, errors = script.communicate(timeout=60)
  assert script.returncode == 0, errors
  assert 'ptrace is not permitted here' in said and 'choose allow_open' in said
  assert said.splitlines()[-1] == 'started'


@contextlib.contextmanager
def _worker_script(*args, port=None):
  """`pipelines.worker`, on a free port if none is named, ready."""
  port = port or portpicker.pick_unused_port()
  with helpers.running('-m', 'pipelines.worker', f'--port={port}', *args) as script:
    said = script.stdout.readline()
    assert said.startswith('Worker on'), script.stderr.read()
    yield port, script


def _binary(script):
  (found,) = psutil.Process(script.pid).children()
  return found


@pytest.fixture(scope='module')
def certificates(tmp_path_factory):
  folder = tmp_path_factory.mktemp('certificates')
  made = {}
  for name in ('ours', 'theirs'):
    tls.make_certificates(folder / name)
    made[name] = folder / name
  return made


def test_only_holders_of_our_certificates_are_let_in(certificates):
  ours = certificates['ours']
  with _worker_script(f'--tls_dir={ours / "worker"}') as (port, script):
    address = f'127.0.0.1:{port}'
    # Only the front is open to other machines.
    (front,) = [its for its in _listening(script.pid)]
    assert front.port == port
    assert all('127.0.0.1' in its.ip for its in _listening(_binary(script).pid))

    def silent(**kwargs):
      return connections.RemoteWorker(address, **kwargs).why_silent(5.0)

    assert silent(tls_dir=ours / 'script') is None
    assert silent() is not None
    assert silent(tls_dir=certificates['theirs'] / 'script') is not None
    # A worker's certificate is none for a script.
    assert silent(tls_dir=ours / 'worker') is not None
    authority = (ours / 'script' / 'authority.pem').read_bytes()
    with grpc.secure_channel(
        address, grpc.ssl_channel_credentials(authority), tls.CLIENT_OPTIONS
    ) as channel:
      without = transport.Connection('', channel, transport.Traffic())
      assert without.why_silent(5.0) is not None
      without.close()
    with tff_kd.simulation.remote_runtime(
        [connections.RemoteWorker(address, tls_dir=ours / 'script')]
    ):
      assert _total([1, 2, 3]) == 6


def test_private_keys_are_for_their_owner_only_and_are_not_overwritten(certificates):
  for folder in ('worker', 'script'):
    key = certificates['ours'] / folder / 'key.pem'
    assert key.stat().st_mode & 0o077 == 0
  with pytest.raises(FileExistsError, match='are kept'):
    tls.make_certificates(certificates['ours'])


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_worker_script_ends_with_its_worker(number):
  with _worker_script() as (port, script):
    binary = _binary(script)
    script.send_signal(number)
    assert script.wait(20) == (-9 if number == signal.SIGKILL else 0)
    psutil.wait_procs([binary], 10)
    assert not binary.is_running()
    assert not _reaches('127.0.0.1', port)


def test_a_worker_script_starts_its_worker_again():
  with _worker_script() as (port, script):
    worker = connections.RemoteWorker(f'127.0.0.1:{port}')
    with tff_kd.simulation.remote_runtime([worker]):
      assert _total([1, 2]) == 3
      _binary(script).kill()
      assert script.stdout.readline().startswith('Worker on')
      deadline = time.monotonic() + 20
      while worker.why_silent(1.0) and time.monotonic() < deadline:
        time.sleep(0.1)
      assert _total([1, 2]) == 3


@pytest.mark.parametrize(
    'address, said',
    [
        ('localhost', 'host:port'),
        ('localhost:x', 'host:port'),
        ('192.0.2.1:8000', 'on another machine, and without certificates'),
        ('no.such.host.invalid:8000', 'is not known'),
    ],
)
def test_addresses_that_will_not_do(address, said):
  with pytest.raises(ValueError, match=said):
    connections.RemoteWorker(address)


def test_a_taken_port_is_a_sentence():
  with socket.socket() as taken:
    taken.bind(('127.0.0.1', 0))
    taken.listen()
    with helpers.running(
        '-m', 'pipelines.worker', f'--port={taken.getsockname()[1]}'
    ) as script:
      _, errors = script.communicate(timeout=60)
  assert script.returncode == 1
  assert errors.startswith('error: Port') and 'Traceback' not in errors


def _metrics(folder):
  with open(pathlib.Path(folder, 'metrics.csv')) as file:
    return [
        {k: float(v) for k, v in row.items() if k != 'round_seconds'}
        for row in csv.DictReader(file)
    ]


def _wait_for_rounds(folder, count, script):
  path = pathlib.Path(folder, 'metrics.csv')
  deadline = time.monotonic() + 120
  while time.monotonic() < deadline:
    assert script.poll() is None, script.stderr.read()
    if path.exists() and len(path.read_text().splitlines()) > count:
      return
    time.sleep(0.02)
  raise AssertionError('No round in two minutes.')


def _train(folder, *args):
  return ['-m', 'pipelines.train', *helpers.TINY_RUN, f'--output_dir={folder}', *args]


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  folder = tmp_path_factory.mktemp('undisturbed')
  helpers.train_here(*helpers.TINY_RUN, f'--output_dir={folder}', '--rounds=12')
  return _metrics(folder)


def test_a_script_killed_in_mid_run_goes_on_exactly(undisturbed, tmp_path):
  with helpers.running(*_train(tmp_path, '--rounds=12')) as script:
    _wait_for_rounds(tmp_path, 2, script)
    script.kill()
  resumed = helpers.train(*_train(tmp_path, '--rounds=12')[2:])
  assert resumed.returncode == 0, resumed.stderr
  assert _metrics(tmp_path) == undisturbed


def test_a_run_loses_workers_and_gets_them_back(undisturbed, certificates, tmp_path):
  worker_dir = f'--tls_dir={certificates["ours"] / "worker"}'
  log = tmp_path / 'errors.txt'
  with _worker_script(worker_dir) as (a, _), _worker_script(worker_dir) as (b, second):
    command = _train(
        tmp_path, '--rounds=12', f'--workers=127.0.0.1:{a},127.0.0.1:{b}',
        f'--tls_dir={certificates["ours"] / "script"}', '--silence_s=2',
    )
    script = helpers.running(*command, python=helpers.WARM)
    with script as script, open(log, 'w') as file:
      copying = threading.Thread(target=lambda: file.writelines(script.stderr))
      copying.start()
      _wait_for_rounds(tmp_path, 2, script)
      # The front dies, too, or TFF's worker would soon be there again.
      binary = _binary(second)
      second.kill()
      binary.kill()
      _wait_for_rounds(tmp_path, 3, script)
      with _worker_script(worker_dir, port=b) as (_, third):
        # It is used again, and then freezes.
        deadline = time.monotonic() + 60
        while f'{b} is back' not in log.read_text() and time.monotonic() < deadline:
          time.sleep(0.02)
          file.flush()
        for its in (third, _binary(third)):
          its.send_signal(signal.SIGSTOP)
        script.wait(240)
        third.kill()
      copying.join()
  errors = log.read_text()
  assert script.returncode == 0, errors
  assert errors.count(f'The worker 127.0.0.1:{b} is lost') == 2
  assert errors.count(f'The worker 127.0.0.1:{b} is back') == 1
  assert 'Its work goes to another worker' in errors
  for row, expected in zip(_metrics(tmp_path), undisturbed, strict=True):
    assert row == pytest.approx(expected, abs=2e-3, rel=1e-3)


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
      cwd=helpers.ROOT, capture_output=True, text=True, timeout=300,
  )
  assert script.returncode == 0, script.stdout + script.stderr
  assert 'error: The checkpoint of round 3 cannot be written' in script.stdout
  assert 'No space left on device' in script.stdout
  assert 'Traceback' not in script.stdout
  assert _metrics(tmp_path) == undisturbed


def test_a_worker_that_is_down_is_named_before_a_round(tmp_path):
  port = portpicker.pick_unused_port()
  # The second one has other flags: nothing was begun that they could contradict.
  for flags in (helpers.TINY_RUN, ['--algorithm=fed_prox']):
    errors = helpers.refused_here(
        *flags, f'--output_dir={tmp_path}', f'--workers=127.0.0.1:{port}'
    )
    assert f'error: The worker 127.0.0.1:{port} is lost' in errors
    assert 'Traceback' not in errors and not (tmp_path / 'metrics.csv').exists()
