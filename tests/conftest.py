"""Nothing that a test starts outlives it."""

import gc
import os

# What this process starts, and what that starts, has it in its environment.
_MARK, _MARKED = 'TFF_KD_TESTS', str(os.getpid())
os.environ[_MARK] = _MARKED

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import psutil
import pytest
import tensorflow as tf

# As `pipelines.run`; and what is there by now stays, and need not be looked at.
gc.set_threshold(100_000, 20, 20)
gc.freeze()


@pytest.fixture(scope='session', autouse=True)
def quiet():
  tf.get_logger().setLevel('ERROR')


@pytest.fixture(scope='module', autouse=True)
def nothing_is_left():
  """No process of ours is alive when a module's tests and fixtures have ended."""
  yield
  left = [
      process
      for process in psutil.process_iter(['environ'])
      if (process.info['environ'] or {}).get(_MARK) == _MARKED
      and process.pid != os.getpid()
  ]
  _, alive = psutil.wait_procs(left, 5.0)
  assert not alive
