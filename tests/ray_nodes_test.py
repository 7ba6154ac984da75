"""Nodes of Ray that are killed and join; strangers; a script that is killed."""

import contextlib
import logging
import os
import secrets
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from tests import helpers
from tests import ray_faults_test
import tff_kd

ray = pytest.importorskip('ray')
pytestmark = pytest.mark.slow

_MARK = 'RAY_NODES_TEST'
_AGENTS = ('ray::DashboardAgent', 'ray::RuntimeEnvAgent')
_STRANGER = '''
import sys
import ray
try:
  ray.init(address=sys.argv[1], logging_level='ERROR')
except Exception as error:
  print('turned away:', type(error).__name__, error)
else:
  print('let in')
'''
_SCRIPT = '''
import numpy as np
from tests import ray_faults_test
import tff_kd

if __name__ == '__main__':
  run, _ = ray_faults_test.slow_run()
  with tff_kd.runtime.ray(num_workers=2, start_timeout_s=1800.0) as context:
    ray_faults_test.all_ready(context, 2)
    print('ready', flush=True)
    while True:
      run()
'''

_WITH_TLS = '''
import pathlib
import sys
import time
import numpy as np
from ray import cluster_utils
from tests import ray_faults_test
import tff_kd

if __name__ == '__main__':
  end = pathlib.Path(sys.argv[1])
  run, expected = ray_faults_test.slow_run()
  nodes = cluster_utils.Cluster(
      initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False)
  )
  try:
    nodes.add_node(num_cpus=1)
    with tff_kd.runtime.ray(address=nodes.address, start_timeout_s=1800.0) as context:
      ray_faults_test.all_ready(context, 2)
      np.testing.assert_array_equal(run(), expected)
      print(nodes.address, flush=True)
      while not end.exists():
        time.sleep(0.2)
  finally:
    nodes.shutdown()
'''
# So long a stranger tries; who belongs to the cluster is in after five seconds.
_STRANGER_S = 45.0


@pytest.fixture(scope='module')
def cluster():
  """A head node and another one, with a core each, on this machine."""
  from ray import cluster_utils

  os.environ.setdefault('RAY_AUTH_TOKEN', secrets.token_hex(32))
  os.environ['RAY_AUTH_MODE'] = 'token'
  ray._raylet.Config.initialize('')  # Ray has read the variable when it was imported.
  nodes = cluster_utils.Cluster(
      initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False)
  )
  try:
    yield nodes
  finally:
    nodes.shutdown()


def test_a_killed_node_takes_kept_values_along_and_another_joins(
    cluster, caplog, monkeypatch
):
  run, expected = ray_faults_test.slow_run()
  second = cluster.add_node(num_cpus=1)
  with tff_kd.runtime.ray(
      address=cluster.address, start_timeout_s=helpers.HANGING_S
  ) as context:
    before = ray_faults_test.all_ready(context, 2)
    np.testing.assert_array_equal(run(), expected)
    kill = lambda: cluster.remove_node(second, allow_graceful=False)
    ray_faults_test.at_sum(5, kill, monkeypatch)  # Between the two passes.
    with caplog.at_level(logging.WARNING):
      np.testing.assert_array_equal(run(), expected)
    assert 'is lost' in caplog.text
    [left] = ray_faults_test.all_ready(context, 1)
    assert left in before
    cluster.add_node(num_cpus=1)
    both = ray_faults_test.all_ready(context, 2)
    assert left in both
    np.testing.assert_array_equal(run(), expected)
  assert not ray.is_initialized()


@pytest.mark.parametrize(
    ('token', 'expected'),
    [(None, 'turned away'), ('f' * 64, 'turned away'), ('', 'let in')],
)
def test_only_who_has_the_token_is_let_in(token, expected, cluster, tmp_path):
  environment = {
      name: value for name, value in os.environ.items()
      if not name.startswith('RAY_')
  }
  environment['HOME'] = str(tmp_path)
  if token is not None:
    token = token or os.environ['RAY_AUTH_TOKEN']
    environment |= {'RAY_AUTH_MODE': 'token', 'RAY_AUTH_TOKEN': token}
  output = subprocess.run(
      [sys.executable, '-c', _STRANGER, cluster.address],
      env=environment, capture_output=True, text=True, timeout=helpers.HANGING_S,
      check=True,
  ).stdout
  assert output.startswith(expected), output


def _openssl(command, folder):
  subprocess.run(
      f'openssl {command}', shell=True, executable='bash', cwd=folder, check=True,
      capture_output=True,
  )


def _certificates(folder):
  """An authority and a certificate of it, as docs/machines.md makes them; variables."""
  folder.mkdir()
  new = 'req -newkey rsa:2048 -noenc -subj /CN=ray'
  _openssl(f'{new} -x509 -keyout ca.key -out ca.crt', folder)
  _openssl(f'{new} -keyout node.key -out node.csr', folder)
  host = subprocess.run(['hostname', '-I'], capture_output=True, text=True).stdout
  names = ','.join(f'IP:{each}' for each in ['127.0.0.1', *host.split()])
  _openssl(
      'x509 -req -in node.csr -CA ca.crt -CAkey ca.key -CAcreateserial -out node.crt '
      f'-extfile <(echo subjectAltName={names},DNS:localhost)', folder,
  )
  return {
      'RAY_USE_TLS': '1',
      'RAY_TLS_SERVER_CERT': str(folder / 'node.crt'),
      'RAY_TLS_SERVER_KEY': str(folder / 'node.key'),
      'RAY_TLS_CA_CERT': str(folder / 'ca.crt'),
  }


@pytest.mark.skipif(
    not helpers.is_allowed('openssl', 'version'), reason='makes certificates'
)
def test_with_tls_only_who_has_a_certificate_connects(tmp_path, monkeypatch):
  ours, others = (_certificates(tmp_path / name) for name in ('ours', 'others'))
  others['RAY_TLS_CA_CERT'] = ours['RAY_TLS_CA_CERT']
  token = {'RAY_AUTH_MODE': 'token', 'RAY_AUTH_TOKEN': secrets.token_hex(32)}
  path, end = tmp_path / 'script.py', tmp_path / 'end'
  path.write_text(_WITH_TLS)
  monkeypatch.setenv('PYTHONPATH', str(helpers.ROOT))
  plain = {**os.environ, **token}
  for name, value in {**token, **ours}.items():
    monkeypatch.setenv(name, value)
  with helpers.running(str(path), str(end)) as script:
    address = script.stdout.readline().strip()
    assert address, script.stderr.read()
    # All have the token.
    strangers = [
        subprocess.Popen(
            [sys.executable, '-c', _STRANGER, address], env={**plain, **variables},
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for variables in (ours, {}, others)
    ]
    try:
      member, *outside = strangers
      assert member.communicate(timeout=helpers.HANGING_S)[0].startswith('let in')
      time.sleep(_STRANGER_S)
    finally:
      for stranger in strangers:
        stranger.kill()
    for stranger in outside:
      assert 'let in' not in stranger.communicate()[0]
    end.touch()
    script.wait(timeout=helpers.HANGING_S)


def test_a_script_that_is_killed_leaves_no_process(tmp_path, monkeypatch):
  mark = secrets.token_hex(8)
  monkeypatch.setenv(_MARK, mark)
  path = tmp_path / 'script.py'
  path.write_text(_SCRIPT)
  monkeypatch.setenv('PYTHONPATH', str(helpers.ROOT))
  with helpers.running(str(path)) as script:
    assert script.stdout.readline() == 'ready\n', script.stderr.read()
    time.sleep(1.0)
    assert len(_marked(mark)) > 4
    script.kill()
    script.wait()
  start = time.monotonic()
  while left := _marked(mark):
    # Two agents of Ray try for a minute to tell the head node, which is gone, too.
    limit = 600.0 if all(name in _AGENTS for _, name in left) else 300.0
    assert time.monotonic() - start < limit, left
    time.sleep(0.5)


def _marked(mark):
  """The processes with the mark in their environment, and what they run."""
  found = []
  for process in psutil.process_iter():
    with contextlib.suppress(psutil.Error):
      if process.environ().get(_MARK) == mark:
        found.append((process.pid, process.name()))
  return found
