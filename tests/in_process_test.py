"""Computations run in this process as on the worker that TFF ships."""

import asyncio
import collections
import functools
import os
import subprocess
import sys
import textwrap
import threading
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf
import tree

from tff_kd import graphs
from tff_kd import runtime
from tff_kd.compat import tff
from tff_kd.runtime import tff_internals

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
        return total + tf.reduce_sum(batch['x']) * tf.cast(tf.size(batch['y']), tf.float32)

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
            lambda its: tff.sequence_sum(tff.sequence_map(square, its)),
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
  learning = tff.learning
  return _state_of_factory(
      learning.robust_aggregator(zeroing=True, clipping=True, weighted=False)
  )


def _compressed_factory():
  return _state_of_factory(
      tff.learning.compression_aggregator(zeroing=True, clipping=True, weighted=False)
  )


def _secure_factory():
  return _state_of_factory(tff.learning.secure_aggregator(weighted=False))


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
    return collections.OrderedDict(count=tf.function(lambda its: its[0]))

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
  return [comp(*its) for its in args]


@pytest.fixture(scope='module')
def of_worker():
  """What TFF's own worker gives."""
  with runtime.tff_worker():
    return {
        **{case: _run(case) for case in _CASES},
        **{kind: _two_rounds(kind) for kind in ('functional', 'variables')},
    }


@pytest.fixture(autouse=True)
def in_process():
  with runtime.in_process() as context:
    yield context


def _as_lists(value):
  if isinstance(value, tf.data.Dataset):
    return list(value.as_numpy_iterator())
  return value


def _assert_same(ours, theirs):
  ours, theirs = (tree.map_structure(_as_lists, its) for its in (ours, theirs))
  tree.assert_same_structure(ours, theirs, check_types=True)
  for x, y in zip(tree.flatten(ours), tree.flatten(theirs)):
    assert type(x) is type(y)
    assert getattr(x, 'dtype', None) == getattr(y, 'dtype', None)
    if isinstance(x, (np.ndarray, np.generic)) and x.dtype.kind == 'f':
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    else:
      np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize('case', _CASES, ids=lambda case: case.__name__)
def test_results_are_the_workers(case, of_worker):
  _assert_same(_run(case), of_worker[case])


@pytest.mark.parametrize('kind', ['functional', 'variables'])
def test_federated_averaging_is_the_workers(kind, of_worker):
  _assert_same(_two_rounds(kind), of_worker[kind])


def test_operators_on_sequences():
  # TFF's worker, as TFF starts it, has none of them.
  assert _run(_sequences) == [np.int32(139)]
