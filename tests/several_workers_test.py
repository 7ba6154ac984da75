"""Rounds over several workers give what they give on one, whatever happens to these."""

import logging
import signal
import tempfile
import time

import keras
import numpy as np
import portpicker
import pytest
import tensorflow as tf
from tff_kd.compat import tff

import tff_kd
from tests import helpers
from tff_kd.simulation import channels
from tff_kd.simulation import connections
from tff_kd.simulation import several_workers
from tff_kd.simulation import transport
from tff_kd.simulation import worker_process

_CLIENTS = 5


class _Connection(transport.Connection):
  """Lets a test do something before the worker is asked to compute."""

  def __init__(self, worker):
    port = worker.process.port
    channel = channels.insecure_channel(f'127.0.0.1:{port}')
    super().__init__(worker.name, channel, worker.traffic, silence_s=2.0)
    for name in ('create_call', 'compute'):
      setattr(self.stub, name, self._before(worker, getattr(self.stub, name)))

  def _before(self, worker, call):
    def wrapped(request):
      worker.before_call()
      return call(request)

    return wrapped


class _LoopbackWorker(connections.RemoteWorker):
  """A worker that can be killed, frozen, and started again."""

  def __init__(self, name, log):
    self._log = log
    self._port = portpicker.pick_unused_port()
    super().__init__(f'127.0.0.1:{self._port}')
    self.name = name
    self.start()

  def start(self):
    self.process = worker_process.WorkerProcess(
        self._port, max_concurrent_calls=1, log=self._log
    )
    self.lose_at_call = None

  def before_call(self):
    if self.lose_at_call is not None:
      call, how = self.lose_at_call
      self.lose_at_call = (call - 1, how)
      if call == 1:
        self.kill() if how == 'killed' else self.freeze()

  def kill(self):
    self.process.process.kill()
    self.process.process.wait()

  def freeze(self):
    self.process.process.send_signal(signal.SIGSTOP)

  def _connect(self):
    return _Connection(self)

  def stop(self):
    self.close()
    self.kill()
    self.process.stop()


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
    if worker.why_silent(1.0) is not None:
      worker.kill()
      worker.start()
    worker.lose_at_call = None
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
      student_optimizer=helpers.sgd(),
      distillation=tff_kd.Distillation(num_steps=2, batch_size=4),
  )


def _fml():
  return tff_kd.algorithms.build_fml(**helpers.common(), mentor_fn=helpers.dense_fn((4,)))


def _fed_md():
  return tff_kd.algorithms.build_fed_md(
      **helpers.common(),
      transfer_set=_transfer_set(),
      digest_optimizer=helpers.sgd(),
  )


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


def _medians():
  """What is no sum: single clients' values are merged."""
  return tff_kd.algorithms.build_fed_df(
      **helpers.common(model_aggregator=tff_kd.aggregators.robust.TrimmedMeanFactory(_CLIENTS)),
      transfer_set=_transfer_set(),
      student_optimizer=helpers.sgd(),
      distillation=tff_kd.Distillation(num_steps=2, batch_size=4),
      knowledge_aggregator=tff_kd.aggregators.robust.NormBoundFactory(
          1000.0,
          tff_kd.aggregators.robust.TrimmedMeanFactory(_CLIENTS, trimmed_share=0.2),
      ),
  )


def _private():
  """An adaptive clip, summed and estimated over all workers; without noise it repeats."""
  return tff_kd.algorithms.build_fed_avg(
      **helpers.common(
          client_weighting=tff.learning.ClientWeighting.UNIFORM,
          privacy=tff_kd.privacy.DifferentialPrivacy(
              noise_multiplier=0.0, clients_per_round=_CLIENTS
          ),
      )
  )


def _secure():
  return tff_kd.algorithms.build_fed_avg(
      **helpers.common(
          secure_aggregation=tff_kd.privacy.SecureAggregation(
              bits=16, model_bound=40.0, max_clients=_CLIENTS
          )
      )
  )


def _secure_by_tff():
  return tff_kd.algorithms.build_fed_df(
      **helpers.common(secure_aggregation=tff_kd.privacy.SecureAggregation()),
      transfer_set=_transfer_set(),
      student_optimizer=helpers.sgd(),
      distillation=tff_kd.Distillation(num_steps=2, batch_size=4),
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
    'build',
    [
        _fed_distillation, _fed_md, _medians,
        # Those of FML and FedGen are in other tests, too.
        *map(helpers.slow, (_fed_df, _fml, _fed_gen, _robust)),
    ],
)
def test_as_on_one_worker(build, workers, caplog):
  keras.utils.set_random_seed(1)
  process = build()
  expected = _rounds(process)
  with several_workers.remote_runtime(workers), caplog.at_level(logging.WARNING):
    _assert_same(_rounds(process), expected)
  for worker in workers:
    assert worker.traffic.bytes_sent > 0
  assert not caplog.text


@pytest.mark.parametrize(
    'build', [_private, helpers.slow(_secure), helpers.slow(_secure_by_tff)]
)
def test_private_and_secure_sums_as_on_one_worker(build, workers):
  keras.utils.set_random_seed(1)
  process = build()
  (expected, _, _), found = _rounds(process), None
  with several_workers.remote_runtime(workers):
    found, _, _ = _rounds(process)
  helpers.assert_weights_close(
      found.global_model_weights, expected.global_model_weights, rtol=1e-5, atol=1e-6
  )
  for worker in workers:
    assert worker.traffic.bytes_sent > 0


@pytest.fixture(scope='module')
def fed_gen():
  """The process that exchanges the most in a round, and what it gives."""
  keras.utils.set_random_seed(1)
  process = _fed_gen()
  return process, _rounds(process)


@pytest.fixture(scope='module')
def fml():
  keras.utils.set_random_seed(1)
  process = _fml()
  return process, _rounds(process)


@tff.federated_computation(tff.FederatedType(np.int32, tff.CLIENTS))
def _total(values):
  return tff.federated_sum(values)


@pytest.mark.parametrize('num_clients', [0, 1, 2, 3])
def test_few_clients(num_clients, workers):
  with several_workers.remote_runtime(workers):
    assert _total(list(range(num_clients))) == sum(range(num_clients))
  # A single client's round is not split.
  assert (workers[1].traffic.bytes_sent > 0) == (num_clients > 1)


def test_a_round_of_one_client(workers, fml):
  process, _ = fml
  expected = _rounds(process, _cohort()[:1])
  with several_workers.remote_runtime(workers):
    _assert_same(_rounds(process, _cohort()[:1]), expected)


def test_large_cohorts_in_more_parts(workers, monkeypatch):
  sizes = []
  run_stages = several_workers._run_stages

  def counted(part, work, executor):
    sizes.append(part.stop - part.start)
    return run_stages(part, work, executor)

  monkeypatch.setattr(several_workers, '_run_stages', counted)
  with several_workers.remote_runtime(workers, part_bytes=1):
    assert _total(list(range(37))) == sum(range(37))
  # 16 a part at most, so two parts a worker; the last is the server's.
  assert sorted(sizes[:-1]) == [9, 9, 9, 10] and sizes[-1] == 0


def test_each_client_works_once_and_in_order(workers, tmp_path):
  @tff.tensorflow.computation(np.int32)
  def double(value):
    # A file for each time that a client works.
    name = tf.strings.as_string(tf.random.uniform((), maxval=2**31 - 1, dtype=tf.int32))
    path = tf.strings.join([str(tmp_path), '/', name])
    with tf.control_dependencies([tf.io.write_file(path, '')]):
      return 2 * value

  @tff.federated_computation(tff.FederatedType(np.int32, tff.CLIENTS))
  def doubled(values):
    doubles = tff.federated_map(double, values)
    total = tff.federated_sum(doubles)
    return [doubles, total, tff.federated_broadcast(total), values]

  with several_workers.remote_runtime(workers):
    doubles, total, told, values = doubled([5, 3, 4, 1, 2])
  assert [int(v) for v in doubles] == [10, 6, 8, 2, 4]
  assert total == told == 30
  assert [int(v) for v in values] == [5, 3, 4, 1, 2]
  assert len(list(tmp_path.iterdir())) == 5


def test_a_sum_that_needs_another(workers, caplog):
  @tff.tensorflow.computation(np.int32, np.int32)
  def add(x, y):
    return x + y

  @tff.federated_computation(
      tff.FederatedType(np.int32, tff.SERVER), tff.FederatedType(np.int32, tff.CLIENTS)
  )
  def twice(offset, values):
    total = tff.federated_map(add, (offset, tff.federated_sum(values)))
    sums = tff.federated_map(add, (values, tff.federated_broadcast(total)))
    return tff.federated_sum(sums), total

  with several_workers.remote_runtime(workers), caplog.at_level(logging.WARNING):
    assert twice(100, [1, 2, 3, 4]) == (450, 110)
  assert not caplog.text
  assert workers[1].traffic.bytes_sent > 0


def test_what_cannot_be_split_runs_on_one_worker_and_says_so(workers, caplog):
  @tff.tensorflow.computation(tff.types.to_type((np.int32, [3])), np.int32)
  def row(table, key):
    return table[key]

  @tff.federated_computation(
      tff.FederatedType(tff.TensorType(np.int32, [1]), tff.CLIENTS),
      tff.FederatedType(tff.TensorType(np.int32, [3]), tff.SERVER),
  )
  def selected(keys, table):
    return tff.federated_select(
        keys, tff.federated_value(3, tff.SERVER), table, row
    )

  keys = [np.array([k], np.int32) for k in (2, 0)]
  with several_workers.remote_runtime(workers), caplog.at_level(logging.WARNING):
    for _ in range(2):
      found = selected(keys, np.array([5, 6, 7], np.int32))
      assert [list(values) for values in found] == [[7], [5]]
  assert caplog.text.count('runs on one worker only') == 1
  assert workers[1].traffic.bytes_sent == 0


def test_a_sum_that_grows(workers):
  """Its zero has length 0, the sum any: the values of a sample."""
  values = tff.aggregators.UnweightedReservoirSamplingFactory(
      sample_size=3
  ).create(tff.TensorType(np.int32))
  with several_workers.remote_runtime(workers):
    output = values.next(values.initialize(), [4, 7])
  assert sorted(output.result) == [4, 7]


def test_computations_without_clients(workers, fml):
  process, (state, _, _) = fml
  expected = process.get_model_weights(state)
  with several_workers.remote_runtime(workers):
    helpers.assert_weights_close(
        tf.nest.flatten(process.get_model_weights(state)), tf.nest.flatten(expected)
    )
    workers[0].kill()
    helpers.assert_weights_close(
        tf.nest.flatten(process.initialize()), tf.nest.flatten(process.initialize())
    )


def test_the_context_before_comes_back(workers):
  before = tff.framework.get_context_stack().current
  with several_workers.remote_runtime(workers):
    assert tff.framework.get_context_stack().current is not before
  assert tff.framework.get_context_stack().current is before


def _timed(call):
  start = time.monotonic()
  call()
  assert time.monotonic() - start < 15


def test_a_worker_killed_between_rounds(workers, fml, caplog):
  process, expected = fml
  with several_workers.remote_runtime(workers), caplog.at_level(logging.WARNING):
    assert _total([1, 2]) == 3
    workers[1].kill()
    _timed(lambda: _assert_same(_rounds(process), expected))
  assert caplog.text.count('The worker b is lost') == 1


def test_results_do_not_depend_on_who_is_there(workers, fml):
  process, _ = fml
  with several_workers.remote_runtime(workers):
    expected = _rounds(process)
    workers[0].kill()
    for a, b in zip(tf.nest.flatten(_rounds(process)), tf.nest.flatten(expected)):
      np.testing.assert_array_equal(a, b)


# In the clients' work, between two exchanges, and in the server's work.
@pytest.mark.parametrize(
    'call, which, how',
    [
        (1, 0, 'killed'), (7, 1, 'frozen'),
        helpers.slow(2, 1, 'killed'), helpers.slow(4, 0, 'frozen'),
        helpers.slow(9, 1, 'killed'), helpers.slow(20, 0, 'killed'),
    ],
)
def test_a_worker_lost_in_mid_round(call, which, how, workers, fed_gen, caplog):
  process, expected = fed_gen
  with several_workers.remote_runtime(workers), caplog.at_level(logging.WARNING):
    workers[which].lose_at_call = (call, how)
    _timed(lambda: _assert_same(_rounds(process), expected))
  assert f'The worker {"ab"[which]} is lost' in caplog.text


def test_with_none_left_an_error_comes_at_once(workers, fml):
  process, expected = fml
  with several_workers.remote_runtime(workers):
    state = process.initialize()
    states = [process.initialize_client()] * _CLIENTS
    workers[0].kill()
    workers[1].lose_at_call = (2, 'killed')

    def lost_round():
      with pytest.raises(several_workers.NoWorkerError, match='a, b'):
        process.next(state, _cohort(), states)

    _timed(lost_round)
    _timed(lost_round)
    # Both are back, and nothing has to be set up anew.
    workers[0].start()
    workers[1].start()
    _timed(lambda: _assert_same(_rounds(process), expected))


def test_a_worker_that_comes_back_is_used_again(workers):
  with several_workers.remote_runtime(workers):
    assert _total([1, 2]) == 3
    workers[1].kill()
    assert _total([1, 2]) == 3
    workers[1].start()
    before = workers[1].traffic.bytes_sent
    deadline = time.monotonic() + 10
    while workers[1].traffic.bytes_sent == before and time.monotonic() < deadline:
      assert _total([1, 2]) == 3
    assert workers[1].traffic.bytes_sent > before


def test_workers_started_again_unnoticed(workers):
  with several_workers.remote_runtime(workers):
    assert _total([1, 2]) == 3
    for worker in workers:
      worker.kill()
      worker.start()
    _timed(lambda: _total([1, 2]) == 3)


def test_an_error_of_the_computation_is_no_loss(workers, caplog):
  @tff.tensorflow.computation(np.int32)
  def check(value):
    with tf.control_dependencies([tf.debugging.assert_less(value, 9, 'too large')]):
      return tf.identity(value)

  @tff.federated_computation(tff.FederatedType(np.int32, tff.CLIENTS))
  def checked(values):
    return tff.federated_sum(tff.federated_map(check, values))

  with several_workers.remote_runtime(workers), caplog.at_level(logging.WARNING):
    with pytest.raises(Exception, match='too large'):
      checked([1, 2, 9])
    assert checked([1, 2, 3]) == 6
  assert not caplog.text


def test_a_worker_that_is_down_at_the_start_is_named(workers):
  workers[1].kill()
  with pytest.raises(transport.WorkerLostError, match='The worker b is lost: .*Start'):
    with several_workers.remote_runtime(workers):
      pass


@pytest.mark.parametrize('names', ['', 'aa'])
def test_workers_need_names_of_their_own(names, workers):
  with pytest.raises(ValueError, match='a name of its own'):
    with several_workers.remote_runtime([workers[0] for _ in names]):
      pass


def test_only_numbers_states_and_weights_cross(workers, tmp_path):
  x, y = helpers.examples(4000, 0)
  data = tff_kd.FileClientData.from_arrays(
      (x, y), np.array_split(np.arange(4000), 4), directory=tmp_path
  )
  batches = tff_kd.ClientBatches(data=data, batch_size=50, num_epochs=1, seed=0)
  process = tff_kd.algorithms.build_fed_distillation(
      **helpers.common(input_spec=batches.element_spec, client_data=batches),
      teacher_fn=helpers.dense_fn((7,)),
      transfer_set=tff_kd.TransferSet(helpers.examples(2000, 99)[0], subset_size=20),
      teacher_optimizer=helpers.sgd(),
      student_optimizer=helpers.sgd(),
      distillation=tff_kd.Distillation(num_steps=2, batch_size=4),
  )
  with several_workers.remote_runtime(workers):
    state = process.initialize()
    for _ in range(2):
      before = [worker.traffic.bytes_sent for worker in workers]
      state = process.next(state, [0, 1, 2, 3]).state
    sent = [w.traffic.bytes_sent - b for w, b in zip(workers, before)]
  # The student's 18 weights, the ensemble's 20 x 4 numbers of each part, the teacher's
  # 66, and what frames them. The examples are 100,000 bytes.
  assert max(sent) < 4000
  # Graphs cross once. Both: the clients' work. The first one: to initialize, to merge
  # two sums, and the server's work.
  assert [w.traffic.computations_sent for w in workers] == [4, 1]
