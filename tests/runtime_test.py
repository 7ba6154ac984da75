"""The worker ends with its script, however that ends."""

import signal
import time

import pytest

from tests import helpers

_SCRIPT = """
import sys, time
import numpy as np
from tff_kd.compat import tff
from tff_kd.simulation import runtime

@tff.federated_computation(tff.FederatedType(np.int32, tff.CLIENTS))
def total(values):
  return tff.federated_sum(values)

with runtime.local_runtime() as worker:
  assert total([1, 2, 3]) == 6
  print('worker', worker.process.pid, flush=True)
  {ending}
"""


def _start(ending):
  return helpers.running('-c', _SCRIPT.format(ending=ending))


def _worker_pid(script):
  for line in script.stdout:
    if line.startswith('worker'):
      return int(line.split()[1])
  raise AssertionError(script.stderr.read())


def _is_alive(pid):
  try:
    with open(f'/proc/{pid}/stat') as file:
      return file.read().rsplit(')', 1)[1].split()[0] != 'Z'
  except FileNotFoundError:
    return False


def _assert_gone(pid):
  deadline = time.monotonic() + 10
  while _is_alive(pid) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not _is_alive(pid)


@pytest.mark.parametrize(
    'ending, code',
    [
        ('pass', 0),
        ('raise ValueError("no")', 1),
        ('sys.exit(3)', 3),
        ('import os; os._exit(4)', 4),
    ],
)
def test_the_worker_is_gone_when_the_script_ends(ending, code):
  with _start(ending) as script:
    pid = _worker_pid(script)
    # Reading to the end returns only if nobody else holds the pipe.
    script.stdout.read()
    assert script.wait(30) == code
  _assert_gone(pid)


def test_tffs_own_worker_of_a_later_call_ends_too():
  with _start('pass\nassert total([1, 2]) == 3') as script:
    _worker_pid(script)
    script.stdout.read()
    assert script.wait(30) == 0
    assert 'Exception ignored' not in script.stderr.read()


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_worker_is_gone_when_the_script_is_stopped(number):
  with _start('time.sleep(60)') as script:
    pid = _worker_pid(script)
    assert _is_alive(pid)
    script.send_signal(number)
    script.stdout.read()
    assert script.wait(30) != 0
  _assert_gone(pid)


def test_the_context_before_comes_back(worker, tmp_path):
  import tensorflow_federated as tff  # pylint: disable=g-import-not-at-top
  from tff_kd.simulation import runtime

  before = tff.framework.get_context_stack().current
  log = tmp_path / 'worker.log'
  with runtime.local_runtime(log_path=log) as inner:
    assert tff.framework.get_context_stack().current is not before
    assert inner.process.pid != worker.process.pid
  assert tff.framework.get_context_stack().current is before
  assert inner.process.poll() is not None and log.exists()
  assert _is_alive(worker.process.pid)


def test_a_worker_that_does_not_start_says_why(monkeypatch):
  from tff_kd.simulation import runtime  # pylint: disable=g-import-not-at-top
  from tff_kd.simulation import worker_process

  monkeypatch.setattr(worker_process, 'worker_path', lambda: '/bin/cat')
  with pytest.raises(runtime.RuntimeStartError, match='--port'):
    with runtime.local_runtime():
      pass
