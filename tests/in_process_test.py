"""Computations run in this process as on the worker that TFF ships."""

import _thread
import asyncio
import collections
from concurrent import futures
import functools
import gc
import os
import textwrap
import threading
import time
from typing import NamedTuple

import numpy as np
import psutil
import pytest
import tensorflow as tf
import tree

from tests import helpers
from tff_kd import graphs
from tff_kd import runtime
from tff_kd.compat import tff
from tff_kd.runtime import dataflow

_FLOATS = tff.FederatedType(np.float32, tff.CLIENTS)
_INTS = tff.FederatedType(np.int32, tff.CLIENTS)
_VECTOR = tff.TensorType(np.float32, [3])


class Pair(NamedTuple):
  x: object
  y: object


def _vectors(num_clients):
  rng = np.random.default_rng(num_clients)
  return list(rng.normal(size=(num_clients, 3)).astype(np.float32))


def _sums():
  @tff.federated_computation(_FLOATS, tff.FederatedType(_VECTOR, tff.CLIENTS))
  def comp(weights, values):
    return collections.OrderedDict(
        sum=tff.federated_sum(values),
        mean=tff.federated_mean(values),
        weighted=tff.federated_mean(values, weights),
        min=tff.federated_min(values),
        max=tff.federated_max(weights),
    )

  weights = [float(i % 5 + 1) for i in range(21)]
  return comp, [(weights, _vectors(21)), (weights[:1], _vectors(1))]


def _no_clients():
  comp, _ = _sums()
  return comp, [([], [])]


def _integers():
  @tff.federated_computation(_INTS, tff.FederatedType(np.int64, tff.CLIENTS))
  def comp(x, y):
    zipped = tff.federated_zip((x, y))
    return tff.federated_sum(zipped), tff.federated_min(x), tff.federated_max(y)

  return comp, [([3, 1, -2], [10, 2**40, 7]), ([], [])]


def _aggregate():
  state = tff.StructType([('count', np.int32), ('joined', np.str_)])

  @tff.tensorflow.computation
  def zero():
    return collections.OrderedDict(count=0, joined='')

  @tff.tensorflow.computation(state, np.str_)
  def accumulate(state, value):
    return collections.OrderedDict(
        count=state['count'] + 1, joined=state['joined'] + value
    )

  @tff.tensorflow.computation(state, state)
  def merge(x, y):
    return collections.OrderedDict(
        count=x['count'] + y['count'], joined=x['joined'] + y['joined']
    )

  @tff.tensorflow.computation(state)
  def report(state):
    return Pair(state['joined'], state['count'] > 2)

  @tff.federated_computation(tff.FederatedType(np.str_, tff.CLIENTS))
  def comp(values):
    return tff.federated_aggregate(values, zero(), accumulate, merge, report)

  return comp, [([str(i) for i in range(20)],), (['a'],)]


def _passes():
  """Several passes over the clients, which keep what they have computed."""

  @tff.tensorflow.computation(np.float32, _VECTOR)
  def scale(x, y):
    return collections.OrderedDict(large=y * x, small=tf.reduce_sum(y))

  @tff.tensorflow.computation(np.float32, np.float32)
  def shift(mean, x):
    return x - mean

  @tff.tensorflow.computation(np.float32)
  def square(x):
    return x * x

  @tff.federated_computation(
      tff.FederatedType(np.float32, tff.SERVER), tff.FederatedType(_VECTOR, tff.CLIENTS)
  )
  def comp(factor, values):
    scaled = tff.federated_map(scale, (tff.federated_broadcast(factor), values))
    mean = tff.federated_mean(scaled['small'])
    shifted = tff.federated_map(shift, (tff.federated_broadcast(mean), scaled['small']))
    variance = tff.federated_mean(tff.federated_map(square, shifted))
    again = tff.federated_map(
        shift, (tff.federated_broadcast(variance), scaled['small'])
    )
    return (
        tff.federated_map(square, factor), variance, tff.federated_max(again),
        tff.federated_sum(scaled['large']), shifted,
    )

  return comp, [(2.0, _vectors(19))]


def _placed_at_clients():
  @tff.tensorflow.computation(np.int32)
  def double(x):
    return x * 2

  @tff.federated_computation(_INTS, tff.FederatedType(np.float32, tff.CLIENTS, True))
  def comp(x, y):
    ones = tff.federated_value(1, tff.CLIENTS)
    return (
        tff.federated_map(double, x), x, y, ones, tff.federated_zip((x, y)),
        tff.federated_eval(tff.tensorflow.computation(lambda: 5), tff.CLIENTS),
    )

  return comp, [([1, 2, 3], 0.5)]


def _nested_functions():
  @tff.tensorflow.computation(np.int32, np.int32)
  def add(x, y):
    return x + y

  @tff.federated_computation(np.int32)
  def twice(x):
    @tff.federated_computation(np.int32)
    def inner(y):
      return add(y, y), x

    return inner(add(x, x))

  @tff.federated_computation(_INTS, tff.FederatedType(np.int32, tff.SERVER))
  def comp(x, y):
    def both(pair):
      return twice(pair[0])[0], Pair(pair[1], twice(pair[1]))

    zipped = tff.federated_zip((x, tff.federated_broadcast(y)))
    mapped = tff.federated_map(
        tff.federated_computation(both, tff.StructType([np.int32, np.int32])), zipped
    )
    return tff.federated_sum(mapped[0]), mapped[1], tff.federated_map(twice, y)

  return comp, [([1, 2, 3], 4)]


def _local_structures():
  @tff.tensorflow.computation(
      Pair(np.float32, [np.int32, np.bool_]), tff.TensorType(np.str_, [None])
  )
  def comp(pair, names):
    return {
        'pair': Pair(pair.y[0] + 1, [pair.x, tf.logical_not(pair.y[1])]),
        'names': names, 'first': names[0], 'scalars': (np.int64(3), [1.5], True),
        'half': tf.cast([pair.x], tf.float16), 'matrix': tf.ones([2, 2]),
    }

  names = np.array(['a', 'b\0c', ''], object)
  return comp, [(Pair(1.5, [2, True]), names), (Pair(0.0, (2, False)), ['x', 'y'])]


def _datasets():
  element = collections.OrderedDict(
      y=tff.TensorType(np.int32, [None]), x=tff.TensorType(np.float32, [None, 2])
  )
  sequence = tff.SequenceType(element)

  @tff.tensorflow.computation(sequence)
  def summed(dataset):
    counted = tf.Variable(0)

    @tf.function
    def run():
      def add(total, batch):
        counted.assign_add(1)
        size = tf.cast(tf.size(batch['y']), tf.float32)
        return total + tf.reduce_sum(batch['x']) * size

      return dataset.reduce(0.0, add), counted.read_value()

    return run()

  @tff.federated_computation(tff.FederatedType(sequence, tff.CLIENTS))
  def comp(datasets):
    results = tff.federated_map(summed, datasets)
    return results, tff.federated_sum(results)

  def batches(size):
    xs = np.arange(2 * size, dtype=np.float32).reshape(size, 2)
    return collections.OrderedDict(y=np.arange(size, dtype=np.int32), x=xs)

  datasets = [
      tf.data.Dataset.from_tensor_slices(batches(size)).batch(4) for size in (3, 10, 8)
  ]
  return comp, [(datasets,), ([[batches(2), batches(1)], [], datasets[0]],)]


def _sequences():
  @tff.tensorflow.computation(np.int32)
  def square(x):
    return x * x

  @tff.tensorflow.computation(tff.SequenceType(np.int32))
  def shifted(dataset):
    return dataset.map(lambda x: x + 1)

  @tff.federated_computation(tff.FederatedType(tff.SequenceType(np.int32), tff.CLIENTS))
  def comp(datasets):
    mapped = tff.federated_map(
        tff.federated_computation(
            lambda each: tff.sequence_sum(tff.sequence_map(square, each)),
            tff.SequenceType(np.int32),
        ),
        tff.federated_map(shifted, datasets),
    )
    return tff.federated_sum(mapped)

  return comp, [([[1, 2], [3], [], [4, 5, 6]],)]


def _variables():
  @tff.tensorflow.computation(np.int32)
  def count(x):
    variable = tf.Variable(1)
    table = tf.lookup.StaticHashTable(
        tf.lookup.KeyValueTensorInitializer([1, 2, 3], [10, 20, 30]), -1
    )

    @tf.function
    def run():
      for _ in tf.range(x):
        variable.assign_add(x)
      return variable.read_value() + table.lookup(x)

    return run()

  @tff.federated_computation(_INTS)
  def comp(x):
    return tff.federated_map(count, x), tff.federated_sum(tff.federated_map(count, x))

  return comp, [(list(range(9)),), ([2],)]


def _secure_sums():
  @tff.federated_computation(_INTS)
  def comp(x):
    return (
        tff.federated_secure_sum_bitwidth(x, 8), tff.federated_secure_sum(x, 100),
        tff.backends.mapreduce.federated_secure_modular_sum(x, 7),
    )

  return comp, [([3, 50, 4],)]


def _state_of_factory(factory, num_clients=11):
  process = factory.create(tff.to_type([_VECTOR, (np.float32, [2, 2])]))
  rng = np.random.default_rng(0)
  values = [
      [rng.normal(size=3).astype(np.float32), rng.normal(size=(2, 2)).astype(np.float32)]
      for _ in range(num_clients)
  ]

  @tff.federated_computation(process.next.type_signature.parameter[1])
  def comp(values):
    state = process.initialize()
    for _ in range(2):
      output = process.next(state, values)
      state = output.state
    return output

  return comp, [(values,)]


def _robust_factory():
  return _state_of_factory(
      tff.learning.robust_aggregator(zeroing=True, clipping=True, weighted=False)
  )


def _compressed_factory():
  return _state_of_factory(
      tff.learning.compression_aggregator(zeroing=True, clipping=True, weighted=False)
  )


def _secure_factory():
  return _state_of_factory(tff.aggregators.SecureSumFactory(8.0, -8.0))


def _private_factory():
  return _state_of_factory(tff.learning.dp_aggregator(0.0, 11.0))


_CASES = [
    _sums, _no_clients, _integers, _aggregate, _passes, _placed_at_clients,
    _nested_functions, _local_structures, _datasets, _variables, _secure_sums,
    _robust_factory, _compressed_factory, _secure_factory, _private_factory,
]


def _functional_model():
  def predict(weights, x, training):
    del training  # Unused.
    (kernel, bias), _ = weights
    return tf.matmul(x, kernel) + bias

  def loss(output, label, sample_weight=None):
    del sample_weight  # Unused.
    return tf.reduce_mean((output - label) ** 2)

  return tff.learning.models.FunctionalModel(
      initial_weights=([np.ones([3, 1], np.float32), np.zeros([1], np.float32)], []),
      predict_on_batch_fn=tf.function(predict),
      loss_fn=loss,
      input_spec=(tf.TensorSpec([None, 3]), tf.TensorSpec([None, 1])),
  )


class _VariableModel(tff.learning.models.VariableModel):
  """A linear model that counts examples in a variable."""

  input_spec = (tf.TensorSpec([None, 3]), tf.TensorSpec([None, 1]))
  non_trainable_variables = ()

  def __init__(self):
    self._kernel = tf.Variable(tf.ones([3, 1]))
    self._count = tf.Variable(0.0, trainable=False)

  trainable_variables = property(lambda self: [self._kernel])
  local_variables = property(lambda self: [self._count])

  @tf.function
  def predict_on_batch(self, x, training=True):
    return tf.matmul(x, self._kernel)

  @tf.function
  def forward_pass(self, batch_input, training=True):
    x, y = batch_input
    predictions = self.predict_on_batch(x, training)
    self._count.assign_add(tf.cast(len(x), tf.float32))
    return tff.learning.models.BatchOutput(
        tf.reduce_mean((predictions - y) ** 2), predictions, tf.shape(x)[0]
    )

  @tf.function
  def report_local_unfinalized_metrics(self):
    return collections.OrderedDict(count=[self._count])

  def metric_finalizers(self):
    return collections.OrderedDict(count=tf.function(lambda each: each[0]))

  @tf.function
  def reset_metrics(self):
    self._count.assign(0.0)


def _client_datasets():
  rng = np.random.default_rng(3)
  return [
      tf.data.Dataset.from_tensor_slices((
          rng.normal(size=(size, 3)).astype(np.float32),
          rng.normal(size=(size, 1)).astype(np.float32),
      )).batch(4)
      for size in (5, 8, 13)
  ]


@functools.cache
def _process(kind):
  model = _functional_model() if kind == 'functional' else _VariableModel
  return tff.learning.algorithms.build_weighted_fed_avg(
      model, client_optimizer_fn=tff.learning.optimizers.build_sgdm(0.1)
  )


def _two_rounds(kind):
  process = _process(kind)
  state = process.initialize()
  for _ in range(2):
    output = process.next(state, _client_datasets())
    state = output.state
  return output, process.get_model_weights(state), process.initialize()


@functools.cache
def _built(case):
  return case()


def _run(case):
  comp, args = _built(case)
  return [comp(*each) for each in args]


@pytest.fixture(scope='module')
def of_worker():
  """What TFF's own worker gives."""
  with runtime.tff_worker():
    return {case: _run(case) for case in _CASES}


@pytest.fixture(autouse=True)
def in_process():
  with runtime.in_process() as context:
    yield context


def _as_lists(value):
  if isinstance(value, tf.data.Dataset):
    return list(value.as_numpy_iterator())
  return value


def _assert_same(ours, theirs):
  ours, theirs = (tree.map_structure(_as_lists, each) for each in (ours, theirs))
  tree.assert_same_structure(ours, theirs, check_types=True)
  for x, y in zip(tree.flatten(ours), tree.flatten(theirs)):
    assert type(x) is type(y)
    assert getattr(x, 'dtype', None) == getattr(y, 'dtype', None)
    if isinstance(x, (np.ndarray, np.generic)) and x.dtype.kind == 'f':
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    else:
      np.testing.assert_array_equal(x, y)


# Starts the worker, whose whole rounds are in `runtimes_test`.
@pytest.mark.slow
@pytest.mark.parametrize('case', _CASES, ids=lambda case: case.__name__)
def test_results_are_the_workers(case, of_worker):
  _assert_same(_run(case), of_worker[case])


def test_sums_and_passes_in_numpy():
  comp, args = _built(_sums)
  for weights, values in args:
    found = comp(weights, values)
    expected = dict(
        sum=np.sum(values, 0), mean=np.mean(values, 0), min=np.min(values, 0),
        weighted=np.average(values, axis=0, weights=weights), max=np.max(weights),
    )
    assert list(found) == ['sum', 'mean', 'weighted', 'min', 'max']
    for name, value in expected.items():
      np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)
  comp, ((factor, values),) = _built(_passes)
  small = np.sum(values, 1)
  shifted = small - small.mean()
  expected = [
      factor**2, np.var(small), np.max(small - np.var(small)),
      factor * np.sum(values, 0), shifted,
  ]
  for found, value in zip(comp(factor, values), expected, strict=True):
    np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-5)


def test_what_clients_and_the_server_are_given_and_give():
  comp, _ = _built(_integers)
  zipped, smallest, largest = comp([3, 1, -2], [10, 2**40, 7])
  assert tuple(zipped) == (2, 2**40 + 17) and (smallest, largest) == (-2, 2**40)
  comp, args = _built(_aggregate)
  for (names,) in args:
    joined = ''.join(names).encode()
    assert comp(names) == Pair(joined, len(names) > 2)
  comp, _ = _built(_nested_functions)
  total, each, twice = comp([1, 2, 3], 4)
  assert total == 2 * 2 * (1 + 2 + 3)
  assert each == [Pair(4, (16, 4))] * 3 and tuple(twice) == (16, 4)
  comp, _ = _built(_secure_sums)
  assert tuple(comp([3, 50, 4])) == (57, 57, 57 % 7)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['functional', 'variables'])
def test_federated_averaging_is_the_workers(kind):
  with runtime.tff_worker():
    expected = _two_rounds(kind)
  _assert_same(_two_rounds(kind), expected)


def test_operators_on_sequences():
  # TFF's worker, as TFF starts it, has none of them.
  assert _run(_sequences) == [np.int32(139)]


def _uneven_client():
  """A client whose work takes the longer the smaller its number."""

  @tff.tensorflow.computation(np.int32)
  def work(client):
    x = tf.cast(client, tf.float32) + 0.1
    steps = tf.maximum(0, 60 - client) * 20
    slow = tf.while_loop(lambda i, _: i < steps, lambda i, y: (i + 1, tf.sin(y)), (0, x))
    scale = tf.pow(10.0, tf.cast(client % 7, tf.float32))
    return scale * tf.sin(x * tf.range(1.0, 40.0)) + 1e-9 * slow[1]

  return work


def test_results_do_not_depend_on_the_number_of_threads():
  work = _uneven_client()

  @tff.federated_computation(_INTS)
  def comp(clients):
    values = tff.federated_map(work, clients)
    mean = tff.federated_mean(values)
    return mean, tff.federated_sum(values), values

  clients = list(range(60))
  results = []
  for num_threads in (1, 2, 5):
    with runtime.in_process(max_concurrent_clients=num_threads):
      results.append(tree.flatten(comp(clients)))
  for other in results[1:]:
    for x, y in zip(results[0], other, strict=True):
      np.testing.assert_array_equal(x, y)


def test_memory_does_not_grow_with_the_cohort():
  @tff.tensorflow.computation(np.int32)
  def update(client):
    return tf.fill([200_000], tf.cast(client, tf.float32))

  @tff.tensorflow.computation(tff.TensorType(np.float32, [200_000]), np.int32)
  def again(mean, client):
    return mean[0] + tf.reduce_sum(tf.fill([200_000], tf.cast(client, tf.float32)))

  @tff.federated_computation(_INTS)
  def comp(clients):
    mean = tff.federated_sum(tff.federated_map(update, clients))
    return tff.federated_max(
        tff.federated_map(again, (tff.federated_broadcast(mean), clients))
    )

  def peak(num_clients):
    """Megabytes at most while it runs."""
    ended, seen = threading.Event(), []

    def watch():
      while not ended.wait(0.002):
        seen.append(psutil.Process().memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
      result = comp([1] * num_clients)
    finally:
      ended.set()
      watcher.join()
    assert result == num_clients + 200_000
    return max(seen) / 2**20

  comp([1] * 10)
  assert peak(1000) < peak(10) + 60  # All clients' values are 760 MB.


def test_a_round_leaves_no_tensors_to_pythons_collector():
  # It looks at old objects only after hundreds of rounds, each of which leaves a state.
  comp, ((weights, vectors), _) = _sums()

  def num_tensors():
    is_tensor = lambda value: isinstance(value, tf.Tensor)
    return sum(map(is_tensor, gc.get_objects()))

  comp(weights, vectors)
  gc.collect()
  gc.disable()
  try:
    before = num_tensors()
    for _ in range(3):
      comp(weights, vectors)
    assert num_tensors() <= before
  finally:
    gc.enable()


def test_random_numbers_differ_between_clients_and_calls():
  @tff.federated_computation
  def comp():
    draw = tff.tensorflow.computation(lambda: tf.random.normal([]))
    noise = tff.federated_eval(draw, tff.SERVER)
    return noise, tff.federated_eval(draw, tff.SERVER)

  @tff.tensorflow.computation(np.float32)
  def add_noise(x):
    return x + tf.random.normal([])

  @tff.federated_computation(_FLOATS)
  def of_clients(values):
    return tff.federated_map(add_noise, values)

  drawn = [*comp(), *comp(), *of_clients([0.0] * 20), *of_clients([0.0] * 20)]
  assert len(set(drawn)) == len(drawn)


def _failing():
  @graphs.computation(np.int32, np.int32)
  def fail(limit, client):
    tf.debugging.assert_less(client, limit, 'too large')
    return client

  @tff.federated_computation(tff.FederatedType(np.int32, tff.SERVER), _INTS)
  def comp(limit, clients):
    limit = tff.federated_broadcast(limit)
    return tff.federated_sum(tff.federated_map(fail, (limit, clients)))

  return comp


def test_a_clients_failure_names_the_client_and_the_users_code():
  with pytest.raises(runtime.ComputationError) as caught:
    _failing()(7, [3, 4, 9, 5])
  message = str(caught.value)
  assert 'Client 2 of the 4' in message and '[9]' in message and 'too large' in message
  assert os.path.basename(__file__) in message
  assert isinstance(caught.value.__cause__, tf.errors.InvalidArgumentError)


def test_a_secure_sum_refuses_what_is_too_large():
  comp, _ = _secure_sums()
  with pytest.raises(runtime.ComputationError, match='(?s)Client 1 of the 3.*maximum'):
    comp([3, 101, 4])


def test_a_failure_at_the_server_says_so():
  @tff.tensorflow.computation(np.int32)
  def fail(x):
    with tf.control_dependencies([tf.debugging.assert_equal(x, 0, 'not zero')]):
      return tf.identity(x)

  with pytest.raises(runtime.ComputationError, match='The server failed:(.|\n)*not zero'):
    fail(1)


def test_an_operator_that_is_not_supported_is_named():
  @tff.tensorflow.computation(np.int32, np.int32)
  def select(x, key):
    return x + key

  @tff.federated_computation(
      tff.FederatedType(tff.TensorType(np.int32, [1]), tff.CLIENTS),
      tff.FederatedType(np.int32, tff.SERVER),
  )
  def comp(keys, value):
    return tff.federated_select(keys, tff.federated_value(1, tff.SERVER), value, select)

  with pytest.raises(NotImplementedError, match='federated_select'):
    comp([np.array([0], np.int32)], 3)


@pytest.mark.parametrize(
    'weights, values', [
        (1.0, [np.zeros(3, np.float32)]),
        ([1.0], [np.zeros(4, np.float32)]),
        ([1.0], [np.zeros(3)]),
        (['a'], [np.zeros(3, np.float32)]),
        ([None], [np.zeros(3, np.float32)]),
    ],
)
def test_arguments_that_do_not_fit_are_type_errors(weights, values):
  comp, _ = _built(_sums)
  with pytest.raises(TypeError):
    comp(weights, values)


def test_cohorts_that_differ_are_an_error():
  comp, _ = _built(_sums)
  with pytest.raises(ValueError, match='[Cc]onflicting'):
    comp([1.0, 2.0], _vectors(1))


def test_a_dataset_with_other_elements_is_a_type_error():
  comp, _ = _built(_datasets)
  with pytest.raises(TypeError, match='dataset with elements'):
    comp([tf.data.Dataset.range(3)])


def test_an_interrupt_starts_no_further_client():
  started = []

  def begin(client):
    started.append(client)
    if len(started) == 3:
      _thread.interrupt_main()
      time.sleep(0.5)  # The main thread has to see it.
    return client

  @tff.tensorflow.computation(np.int32)
  def work(client):
    return tf.ensure_shape(tf.numpy_function(begin, [client], tf.int32), [])

  @tff.federated_computation(_INTS)
  def comp(clients):
    return tff.federated_sum(tff.federated_map(work, clients))

  with runtime.in_process(max_concurrent_clients=1):
    with pytest.raises(KeyboardInterrupt):
      comp(list(range(50)))
  time.sleep(0.7)
  assert len(started) == 3


def test_clients_that_wait_for_threads_leave_some():
  # A client's loop waits for TensorFlow's threads to read its dataset: if each of these
  # threads had such a loop, all would wait for ever.
  x, y = np.zeros([10, 4], np.float32), np.zeros([10], np.int32)
  dataset = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(10).batch(2)
  process = helpers.build(
      'fed_avg', student_fn=helpers.dense_fn(dim=4), input_spec=dataset.element_spec
  )
  state = process.initialize()
  found = []
  thread = threading.Thread(
      target=lambda: found.append(process.next(state, [dataset] * 16)), daemon=True
  )
  thread.start()
  thread.join(helpers.HANGING_S)
  assert not thread.is_alive()
  assert found[0].metrics['client_work']['train']['num_examples'] == 160


def test_several_threads_at_once():
  comp, args = _built(_passes)
  expected = comp(*args[0])
  with futures.ThreadPoolExecutor(4) as pool:
    found = list(pool.map(lambda _: comp(*args[0]), range(4)))
  for result in found:
    _assert_same(result, expected)


def test_in_a_running_event_loop(in_process):
  del in_process  # Unused.
  comp, args = _built(_integers)

  async def cell():
    return comp(*args[0])

  assert helpers.run(cell()) == comp(*args[0])


def test_the_asynchronous_context_does_not_block_the_loop():
  comp, args = _built(_integers)
  expected = comp(*args[0])

  async def main():
    context = runtime.AsyncInProcessContext()
    with tff.framework.get_context_stack().install(context):
      task = asyncio.gather(comp(*args[0]), comp(*args[0]))
    turns = 0
    while not task.done():
      turns += 1
      await asyncio.sleep(0)
    return turns, await task

  turns, results = helpers.run(main())
  assert turns > 1 and results == [expected, expected]


def test_a_federated_program():
  async def main():
    context = tff.program.NativeFederatedContext(runtime.AsyncInProcessContext())
    with tff.framework.get_context_stack().install(context):
      source = tff.program.DatasetDataSource(_client_datasets())
      process = _process('functional')
      state = process.initialize()
      cohort = source.iterator().select(2)
      output = process.next(state, cohort)
      return await tff.program.materialize_value(output)

  output = helpers.run(main())
  assert np.isfinite(output.state.global_model_weights.trainable[0]).all()


def test_the_block_puts_back_the_context_before():
  current = lambda: tff.framework.get_context_stack().current
  before = current()
  with runtime.in_process() as context:
    assert current() is context
    with pytest.raises(ZeroDivisionError), runtime.in_process():
      raise ZeroDivisionError
    assert current() is context
  assert current() is before


def test_an_unknown_device_lists_those_that_there_are():
  with pytest.raises(ValueError, match="'TPU:3'.*CPU:0"):
    runtime.InProcessContext('TPU:3')
  with pytest.raises(ValueError, match='at least 1'):
    runtime.InProcessContext(max_concurrent_clients=0)
  with runtime.in_process(device='cpu:0', max_concurrent_clients=3):
    comp, args = _built(_integers)
    assert comp(*args[0])[0][0] == 2


def test_several_devices_and_the_default_context():
  program = textwrap.dedent('''
    import threading
    import numpy as np
    import tensorflow as tf

    cpu = tf.config.list_physical_devices('CPU')[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * 3
    )
    from tests import in_process_test
    from tff_kd import runtime

    def results():
      return [
          in_process_test._run(case)
          for case in (in_process_test._passes, in_process_test._datasets)
      ]

    runtime.set_default()
    expected, others = results(), []
    thread = threading.Thread(target=lambda: others.append(results()))
    thread.start()
    thread.join()
    for device in ('CPU', 'CPU:1', ['CPU:1', 'CPU:2']):
      with runtime.in_process(device=device):
        others.append(results())
    assert len(others) == 4
    for other in others:
      in_process_test._assert_same(other, expected)
    print('same')
  ''')
  assert helpers.python(program).stdout.endswith('same\n')


def test_steps_are_found_in_time_linear_in_their_tensors(monkeypatch):
  width, depth, looked_up = 50, 4, 0

  def counted_hash(leaf):
    nonlocal looked_up
    looked_up += 1
    return id(leaf)

  monkeypatch.setattr(dataflow.Leaf, '__hash__', counted_hash)
  given = dataflow.Node(dataflow.SERVER, [], [None] * width, None)
  last = given
  for _ in range(depth):
    last = dataflow.Node(dataflow.SERVER, last.leaves, [None] * width, lambda t: t)
  nodes, needed = dataflow._nodes_to(last.leaves, lambda leaf: leaf.node is given)
  assert [node.number for node in nodes] == [given.number + i + 1 for i in range(depth)]
  assert needed == given.leaves
  # Each leaf a few times; with a look at all arguments for each result, `width` times.
  assert looked_up <= 4 * width * (depth + 1)
