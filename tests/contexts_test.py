"""Large cohorts in parts give what they give at once."""

import logging

import keras
import numpy as np
import pytest
import tensorflow as tf
from tff_kd.compat import tff

import tff_kd
from tests import helpers
from tff_kd.simulation import contexts

_CLIENTS = 37


@pytest.fixture
def in_parts(worker, monkeypatch):
  """The context of small parts, and how many parts each call took."""
  context = contexts.CohortContext(
      worker.executor_factory(),
      part_bytes=1,
      compiler_fn=tff.backends.native.desugar_and_transform_to_native,
      transform_args=tff.tensorflow.transform_args,
      transform_result=tff.tensorflow.transform_result,
  )
  calls = []
  context_of = context._context_of
  monkeypatch.setattr(
      context, '_context_of', lambda parts: calls.append(parts) or context_of(parts)
  )
  with tff.framework.get_context_stack().install(context):
    yield calls


def _cohort():
  rng = np.random.default_rng(0)
  return [
      helpers.dataset(*helpers.examples(int(n), seed))
      for seed, n in enumerate(rng.integers(0, 9, _CLIENTS))
  ]


def _batch_norm_fn():
  return keras.Sequential([
      keras.layers.InputLayer((helpers.DIM,)),
      keras.layers.BatchNormalization(),
      keras.layers.Dense(helpers.CLASSES),
  ])


@pytest.mark.parametrize('weighting', list(tff.learning.ClientWeighting)[:2])
def test_rounds_of_both_channels(weighting, worker, request):
  keras.utils.set_random_seed(1)
  x, _ = helpers.examples(12, 99)
  process = tff_kd.algorithms.build_fed_distillation(
      **helpers.common(student_fn=_batch_norm_fn, client_weighting=weighting),
      teacher_fn=helpers.dense_fn((7,)),
      transfer_set=tff_kd.TransferSet(x),
      # Not Adam, which makes steps of rounding errors where gradients are 0.
      teacher_optimizer=helpers.sgd(),
      student_optimizer=helpers.sgd(),
      distillation=tff_kd.Distillation(num_steps=2, batch_size=4),
  )

  def two_rounds():
    state = process.initialize()
    for _ in range(2):
      output = process.next(state, _cohort())
      state = output.state
    return state, output.metrics

  whole, whole_metrics = two_rounds()
  calls = request.getfixturevalue('in_parts')
  parts, parts_metrics = two_rounds()
  assert calls == [3, 3]  # 37 clients, 16 at a time.
  helpers.assert_weights_close(parts, whole, rtol=1e-4, atol=1e-5)
  helpers.assert_weights_close(
      tf.nest.flatten(parts_metrics), tf.nest.flatten(whole_metrics), rtol=1e-4
  )
  participation = whole_metrics['client_work']['participation']
  assert participation['num_clients'] == _CLIENTS
  assert participation['num_excluded_empty'] > 0


def test_a_factory_of_its_own_runs_in_parts_too(worker, request):
  keras.utils.set_random_seed(1)
  process = tff_kd.algorithms.build_fed_avg(
      **helpers.common(model_aggregator=tff.learning.robust_aggregator(zeroing=False))
  )
  state = process.initialize()
  whole = process.next(state, _cohort())
  calls = request.getfixturevalue('in_parts')
  helpers.assert_weights_close(
      process.next(state, _cohort()).state, whole.state, rtol=1e-4, atol=1e-5
  )
  assert calls == [3]


def test_clients_that_keep_their_models_run_at_once(in_parts, caplog):
  keras.utils.set_random_seed(1)
  process = tff_kd.algorithms.build_fd(**helpers.common())
  first = process.initialize_client()
  with caplog.at_level(logging.WARNING, 'absl'):
    output = process.next(process.initialize(), _cohort(), [first] * _CLIENTS)
  # Each client gets a value of its own back: not a sum.
  assert not in_parts and 'at once' in caplog.text
  assert len(output.client_states) == _CLIENTS
  participation = output.metrics['client_work']['participation']
  assert participation['num_clients'] == _CLIENTS


def test_a_sum_that_needs_another_runs_at_once_and_says_so(in_parts, caplog):
  @tff.tensorflow.computation(np.int32, np.int32)
  def add(x, y):
    return x + y

  @tff.federated_computation(tff.FederatedType(np.int32, tff.CLIENTS))
  def twice(values):
    total = tff.federated_broadcast(tff.federated_sum(values))
    return tff.federated_sum(tff.federated_map(add, (values, total)))

  with caplog.at_level(logging.WARNING, 'absl'):
    assert [twice([1] * 40), twice([1] * 40)] == [1640, 1640]
  assert not in_parts
  assert caplog.text.count('not one sum') == 1


def test_small_cohorts_and_small_values_run_at_once(in_parts):
  @tff.federated_computation(tff.FederatedType(np.int32, tff.CLIENTS))
  def total(values):
    return tff.federated_sum(values)

  assert total(list(range(16))) == 120
  assert not in_parts
  assert total(list(range(40))) == 780
  assert in_parts == [3]


def test_memory_decides():
  # Two copies of 10 float32 each, 80 bytes a client: fewer than the minimum fit.
  assert contexts.part_size(40, 1000) == 16
  assert contexts.part_size(4, 1000) == 125
  assert contexts.part_size(0, 1000) == 1000
