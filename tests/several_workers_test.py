"""Rounds over several workers give what they give on one, whatever happens to these."""

import logging
import tempfile
import time

import numpy as np
import portpicker
import pytest
import tensorflow as tf
import tensorflow_federated as tff

import tff_kd
from tests import helpers
from tff_kd.simulation import runtime
from tff_kd.simulation import several_workers
from tff_kd.simulation import transport

_CLIENTS = 5


class _Stub(transport.CountingStub):
  """Lets a test do something before the worker is asked to compute."""

  def __init__(self, channel, worker):
    super().__init__(channel, worker.traffic)
    self._worker = worker

  def create_call(self, request):
    self._worker.before_call()
    return super().create_call(request)

  def compute(self, request):
    self._worker.before_call()
    return super().compute(request)


class _Process(runtime.Worker):
  """A worker process on a given port."""

  def __init__(self, port, log):
    self.traffic = transport.Traffic()
    self._start(port, 1, log)
    assert self._wait_until_ready()


class _LoopbackWorker:
  """A worker that can be killed, started again, and made to seem frozen."""

  def __init__(self, name, log):
    self.name = name
    self.traffic = transport.Traffic()
    self._port = portpicker.pick_unused_port()
    self._log = log
    self._process = None
    self._stubs = []
    self.start()

  def start(self):
    self._process = _Process(self._port, self._log)
    self.frozen = False
    self.kill_at_call = None

  def before_call(self):
    if self.kill_at_call is not None:
      self.kill_at_call -= 1
      if self.kill_at_call == 0:
        self.kill()
    if self.frozen:
      raise transport.WorkerLostError(self.name, 'it is frozen.')

  def kill(self):
    self._process.process.kill()
    self._process.process.wait()

  def answers(self, timeout_s):
    del timeout_s
    return not self.frozen and self._process.process.poll() is None

  def executor_factory(self):
    stub = _Stub(self._process.channel, self)

    def stack_fn(cardinalities):
      executor = transport.Executor(stub, self.traffic)
      executor.set_cardinalities({tff.CLIENTS: 0, **cardinalities})
      return executor

    return tff.framework.ResourceManagingExecutorFactory(stack_fn)

  def close(self):
    pass

  def stop(self):
    self._process.stop()


@pytest.fixture(scope='module')
def processes():
  with tempfile.TemporaryFile() as log:
    workers = [_LoopbackWorker(name, log) for name in 'ab']
    yield workers
    for worker in workers:
      worker.stop()


@pytest.fixture
def workers(processes):
  """Both workers, alive."""
  for worker in processes:
    if not worker.answers(0):
      worker.start()
    worker.traffic = transport.Traffic()
  return processes


def _cohort():
  return [helpers.dataset(*helpers.examples(4 + k, k)) for k in range(_CLIENTS)]


def _transfer_set():
  return tff_kd.TransferSet(helpers.examples(12, 99)[0])


def _fed_distillation():
  return tff_kd.algorithms.build_fed_distillation(
      **helpers.common(),
      teacher_fn=helpers.dense_fn((7,)),
      transfer_set=_transfer_set(),
      teacher_optimizer=helpers.sgd(),
      student_optimizer=helpers.sgd(),
      distillation=tff_kd.Distillation(num_steps=2, batch_size=4),
  )


def _fed_df():
  return tff_kd.algorithms.build_fed_df(
      **helpers.common(),
      transfer_set=_transfer_set(),
      distillation_optimizer=helpers.sgd(),
      distillation=tff_kd.Distillation(num_steps=2, batch_size=4),
  )


def _fml():
  return tff_kd.algorithms.build_fml(**helpers.common(), mentor_fn=helpers.dense_fn((4,)))


def _fed_md():
  return tff_kd.algorithms.build_fed_md(**helpers.common(), transfer_set=_transfer_set())


def _fed_gen():
  return tff_kd.algorithms.build_fed_gen(
      **helpers.common(student_fn=helpers.dense_fn((4,))),
      generator_steps=3,
      hidden_units=6,
      noise_dim=3,
      generator_batch_size=5,
      generator_optimizer=helpers.sgd(),
  )


def _robust():
  return tff_kd.algorithms.build_fed_avg(
      **helpers.common(
          model_aggregator=tff.learning.robust_aggregator(zeroing=True, clipping=True)
      )
  )


def _rounds(process, cohort=None, num_rounds=3):
  """The state, the clients' states and the metrics after some rounds."""
  cohort = _cohort() if cohort is None else cohort
  state = process.initialize()
  states = None
  if hasattr(process, 'initialize_client'):
    states = [process.initialize_client()] * len(cohort)
  for _ in range(num_rounds):
    if states is None:
      output = process.next(state, cohort)
    else:
      output = process.next(state, cohort, states)
      states = output.client_states
    state = output.state
  return [state, states, output.metrics]


def _assert_same(actual, expected):
  assert type(actual[0]) is type(expected[0])
  helpers.assert_weights_close(actual[0], expected[0], rtol=1e-6, atol=1e-6)
  if expected[1] is not None:
    helpers.assert_weights_close(actual[1], expected[1], rtol=1e-6, atol=1e-6)
  helpers.assert_weights_close(actual[2], expected[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    'build', [_fed_distillation, _fed_df, _fml, _fed_md, _fed_gen, _robust]
)
def test_as_on_one_worker(build, workers, caplog):
  tf.keras.utils.set_random_seed(1)
  process = build()
  expected = _rounds(process)
  with several_workers.remote_runtime(workers), caplog.at_level(logging.WARNING):
    _assert_same(_rounds(process), expected)
  for worker in workers:
    assert worker.traffic.bytes_sent > 0
  assert not caplog.text
