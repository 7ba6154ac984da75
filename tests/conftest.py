"""Nothing that a test starts outlives it."""

import atexit
import gc
import os
import pathlib
import shutil
import tempfile

# What this process starts, and what that starts, has it in its environment.
_MARK, _MARKED = 'TFF_KD_TESTS', str(os.getpid())
os.environ[_MARK] = _MARKED

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import psutil
import pytest

from tests import warm_python

# For all processes of this test run; the server starts when a script does.
if warm_python.FOLDER not in os.environ:
  _folder = os.environ[warm_python.FOLDER] = tempfile.mkdtemp(prefix='warm_python_')
  pathlib.Path(_folder, 'pid').write_text(str(os.getpid()))
  atexit.register(shutil.rmtree, _folder, ignore_errors=True)


def pytest_configure(config):
  """Lets `-n` start its processes by the warm Python."""
  if getattr(config.option, 'tx', None):
    config.option.tx = [
        f'{its}//python={warm_python.client()}' if its == 'popen' else its
        for its in config.option.tx
    ]


# Files that take long, and go first, so that no process is left alone with one.
_FIRST = (
    # In `make slow`.
    'reproduction_test', 'notebooks_test', 'train_variants_test', 'runtimes_test',
    'tasks_script_test', 'kinds_test', 'compare_test',
    'contract_test', 'process_test', 'private_process_test', 'differential_test',
    'tasks_test', 'models_test', 'secure_test', 'robust_test', 'outputs_test',
    'certainty_test', 'alignment_test', 'label_skew_test', 'conditions_test',
    'keras_models_test', 'cohorts_test', 'training_test', 'user_code_test',
    'train_script_test', 'train_flags_test', 'documents_test', 'labels_test',
    'local_terms_test', 'metrics_test', 'accounting_test',
)


def pytest_collection_modifyitems(items):
  places = {name: place for place, name in enumerate(_FIRST)}
  items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope='session', autouse=True)
def quiet():
  # Here and not above: the process that only hands the tests out needs no TensorFlow.
  import tensorflow as tf

  tf.get_logger().setLevel('ERROR')
  # As `pipelines.run`; and what is there by now stays, and need not be looked at.
  gc.set_threshold(100_000, 20, 20)
  gc.freeze()


@pytest.fixture(scope='module', autouse=True)
def seeded_module():
  _seed()


@pytest.fixture(autouse=True)
def seeded():
  """What a test draws does not depend on the tests before it."""
  _seed()


def _seed():
  import keras

  keras.utils.set_random_seed(0)


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
  _, alive = psutil.wait_procs(left, 60.0)
  assert not alive
