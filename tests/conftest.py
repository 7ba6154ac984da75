"""One TFF worker for the whole test process; nothing that a test starts outlives it."""

import gc
import os
import warnings

# What this process starts, and what that starts, has it in its environment.
_MARK, _MARKED = 'TFF_KD_TESTS', str(os.getpid())
os.environ[_MARK] = _MARKED

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
warnings.filterwarnings('ignore', message='pkg_resources is deprecated')

import psutil
import pytest
import tensorflow as tf

from tff_kd.simulation import runtime

runtime.end_tffs_own_worker_at_exit()
# As `pipelines.run`; and what is there by now stays, and need not be looked at.
gc.set_threshold(100_000, 20, 20)
gc.freeze()


@pytest.fixture(scope='session', autouse=True)
def worker():
  """Starting one costs seconds."""
  tf.get_logger().setLevel('ERROR')
  with runtime.local_runtime() as started:
    yield started


@pytest.fixture(scope='module', autouse=True)
def nothing_is_left(worker):
  """No process of ours is alive when a module's tests and fixtures have ended."""
  yield
  left = [
      process
      for process in psutil.process_iter(['environ'])
      if (process.info['environ'] or {}).get(_MARK) == _MARKED
      and process.pid not in (os.getpid(), worker.process.pid)
  ]
  _, alive = psutil.wait_procs(left, 5.0)
  assert not alive
