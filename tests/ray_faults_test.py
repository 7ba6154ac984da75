"""Any number of Ray's workers, some of which are killed or frozen."""

import contextlib
import functools
import itertools
import logging
import os
import secrets
import signal
import threading
import time

import numpy as np
import psutil
import pytest
import tensorflow as tf

from tests import helpers
from tests import ray_test
import tff_kd
from tff_kd.compat import tff
from tff_kd.runtime import ray_clients

ray = pytest.importorskip('ray')
pytestmark = pytest.mark.slow

many = ray_test.many


@pytest.fixture(scope='module')
def connected():
  """Ray on this machine, with room for more workers than cores."""
  os.environ.setdefault('RAY_AUTH_TOKEN', secrets.token_hex(32))
  ray.init(
      address='local', num_cpus=4, include_dashboard=False, log_to_driver=False,
      logging_level=logging.ERROR,
  )
  yield
  ray.shutdown()


def pool_of(context):
  return context._runner._make_clients.args[0]


def all_ready(context, number):
  deadline = time.monotonic() + helpers.HANGING_S
  while len(ready := pool_of(context).ready()) < number:
    assert time.monotonic() < deadline
    time.sleep(0.2)
  return [worker.info.pid for worker in ready]


@functools.cache
def slow_run():
  """A computation of two passes over clients, which keeps 100 KB of each in between."""
  size = 25_000

  @tff.tensorflow.computation(np.int32)
  def work(client):
    matrix = tf.random.stateless_normal([160, 160], tf.stack([client, 7])) / 160.0
    matrix = tf.while_loop(
        lambda i, _: i < 100,
        lambda i, m: (i + 1, tf.tanh(tf.matmul(m, m) + 0.1)),
        [0, matrix],
    )[1]
    return tf.reshape(matrix, [-1])[:size]

  vector = work.type_signature.result

  @tff.tensorflow.computation(vector, vector)
  def again(value, mean):
    return tf.while_loop(
        lambda i, _: i < 200,
        lambda i, v: (i + 1, tf.sin(v + mean)),
        [0, value],
    )[1]

  @tff.federated_computation(tff.FederatedType(np.int32, tff.CLIENTS))
  def both(clients):
    values = tff.federated_map(work, clients)
    mean = tff.federated_broadcast(tff.federated_mean(values))
    return tff.federated_mean(tff.federated_map(again, (values, mean)))

  clients = list(range(40))
  with tff_kd.runtime.in_process():
    expected = both(clients)
  return lambda: both(clients), expected


def at_sum(number, do, monkeypatch):
  """Does something when the script adds up a group for the so-manyeth time."""
  merge, calls = ray_clients._Pass._merge, itertools.count(1)

  def merged(self, sent):
    if next(calls) == number:
      do()
    merge(self, sent)

  monkeypatch.setattr(ray_clients._Pass, '_merge', merged)


# In the first pass over the five groups, and in the second one.
@pytest.mark.parametrize('number', [1, 6])
def test_a_killed_worker_is_replaced_in_mid_round(
    number, connected, caplog, monkeypatch
):
  run, expected = slow_run()
  with tff_kd.runtime.ray(num_workers=2, start_timeout_s=helpers.HANGING_S) as context:
    pids = all_ready(context, 2)
    at_sum(number, lambda: os.kill(pids[1], signal.SIGKILL), monkeypatch)
    with caplog.at_level(logging.WARNING):
      np.testing.assert_array_equal(run(), expected)
    assert f'(process {pids[1]} on ' in caplog.text
    assert 'computed elsewhere' in caplog.text
    # The one that was started in place of it is used.
    assert pids[1] not in all_ready(context, 2)
    np.testing.assert_array_equal(run(), expected)


# Also where no group may be done before its turn: a frozen one is the next.
@pytest.mark.parametrize('window', [4, 0])
def test_a_frozen_worker_is_given_up(window, connected, caplog, monkeypatch):
  monkeypatch.setattr(ray_clients, '_WINDOW', window)
  run, expected = slow_run()
  with tff_kd.runtime.ray(
      num_workers=2, silence_s=30.0, start_timeout_s=helpers.HANGING_S
  ) as context:
    pids = all_ready(context, 2)
    at_sum(1, lambda: os.kill(pids[1], signal.SIGSTOP), monkeypatch)
    with caplog.at_level(logging.WARNING):
      np.testing.assert_array_equal(run(), expected)
    assert f'(process {pids[1]} on ' in caplog.text
    assert 'it has not answered for 30 s' in caplog.text
    assert pids[1] not in all_ready(context, 2)
    deadline = time.monotonic() + helpers.HANGING_S
    while psutil.pid_exists(pids[1]):
      assert time.monotonic() < deadline, 'the frozen worker is still there'
      time.sleep(0.2)


def test_with_no_worker_left_an_error_says_so(connected):
  run, _ = slow_run()
  with tff_kd.runtime.ray(num_workers=1, start_timeout_s=helpers.HANGING_S) as context:
    [pid] = all_ready(context, 1)
    pool_of(context)._resources['no such thing'] = 1.0  # So that no other one starts.
    pool_of(context)._start_timeout_s = 5.0
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(
        tff_kd.runtime.NoWorkerError, match='No Ray worker is left.*within 5 s.*no such'
    ):
      run()


def test_more_than_the_cluster_has_is_an_error(connected):
  with pytest.raises(tff_kd.runtime.NoWorkerError, match="asks for {'CPU': 99}"):
    with tff_kd.runtime.ray(resources={'CPU': 99}, start_timeout_s=2.0):
      pass


def test_a_client_that_no_worker_survives_ends_the_round(connected, monkeypatch):
  monkeypatch.setattr(ray_clients, '_MAX_TRIES', 2)
  run, _ = slow_run()
  with tff_kd.runtime.ray(num_workers=2, start_timeout_s=helpers.HANGING_S) as context:
    all_ready(context, 2)
    stop = threading.Event()

    def kill_all():
      while not stop.wait(0.1):
        for worker in pool_of(context).ready():
          with contextlib.suppress(ProcessLookupError):
            os.kill(worker.info.pid, signal.SIGKILL)

    thread = threading.Thread(target=kill_all)
    thread.start()
    try:
      with pytest.raises(tff_kd.runtime.NoWorkerError, match='in a row .*memory'):
        run()
    finally:
      stop.set()
      thread.join()


# At the end: the workers stay until then, and the cluster has room for few.
@pytest.fixture(scope='module', params=[1, 2, 3])
def workers(request, connected):
  with tff_kd.runtime.ray(
      num_workers=request.param, start_timeout_s=helpers.HANGING_S
  ) as context:
    all_ready(context, request.param)
    yield request.param


@pytest.mark.parametrize('name', ['fed_distillation', 'fed_df', 'fml', 'fed_gen'])
def test_any_number_of_workers_gives_the_bits_of_this_process(name, workers, many):
  process, here = ray_test.two_rounds(name, many)
  ray_test.assert_same_bits(ray_test.rounds(process), here)
