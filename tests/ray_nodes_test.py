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
  with tff_kd.runtime.ray(num_workers=2, start_timeout_s=300.0) as context:
    ray_faults_test.all_ready(context, 2)
    print('ready', flush=True)
    while True:
      run()
'''


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
      address=cluster.address, start_timeout_s=ray_faults_test.START_S
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
      env=environment, capture_output=True, text=True, timeout=120, check=True,
  ).stdout
  assert output.startswith(expected), output


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
    limit = 120.0 if all(name in _AGENTS for _, name in left) else 30.0
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
