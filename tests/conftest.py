"""One TFF worker for the whole test process: starting one costs seconds."""

import os
import warnings

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
warnings.filterwarnings('ignore', message='pkg_resources is deprecated')

import pytest
import tensorflow as tf

from tff_kd.simulation import runtime


@pytest.fixture(scope='session', autouse=True)
def worker():
  tf.get_logger().setLevel('ERROR')
  with runtime.local_runtime() as started:
    yield started
