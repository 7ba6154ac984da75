"""Truncated decompositions of updates."""

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
import tensorflow as tf
from tff_kd.compat import tff

from tests import helpers
from tff_kd.aggregators import robust
from tff_kd.aggregators import svd


def _truncate(value, energy):
  near, numbers = svd.truncate(tf.constant(value), tf.constant(energy, tf.float32))
  return near.numpy(), int(numbers)


def _low_rank(rows, columns, rank, seed=0):
  rng = np.random.default_rng(seed)
  factors = rng.normal(size=(rows, rank)), rng.normal(size=(rank, columns))
  return (factors[0] @ factors[1]).astype(np.float32)


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(
    seed=st.integers(0, 99), size=st.integers(1, 12), energy=st.floats(0.05, 1.0)
)
def test_the_rank_is_the_smallest_that_keeps_the_energy(seed, size, energy):
  energy = np.float32(energy)
  values = np.sort(np.random.default_rng(seed).exponential(size=size))[::-1]
  values = values.astype(np.float32)
  rank = int(svd.energy_rank(tf.constant(values), tf.constant(energy)))
  kept = np.cumsum(values**2) / np.sum(values**2)
  assert 1 <= rank <= size
  assert kept[rank - 1] >= energy - 1e-5
  assert rank == 1 or kept[rank - 2] < energy + 1e-5 or energy == 1.0


@pytest.mark.parametrize('values', [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [3.0, 0.0, 0.0]])
def test_energy_one_keeps_every_component(values):
  # Defect 6: where all are needed, none was kept, and the update vanished.
  assert int(svd.energy_rank(tf.constant(values), tf.constant(1.0))) == 3


def test_what_is_kept_is_the_best_of_that_rank_and_counted():
  value = _low_rank(30, 20, 20)
  near, numbers = _truncate(value, 0.7)
  u, s, v = np.linalg.svd(value.astype(np.float64), full_matrices=False)
  rank = int(np.argmax(np.cumsum(s**2) / np.sum(s**2) >= 0.7)) + 1
  assert rank < 10 and numbers == rank * (30 + 20 + 1)
  np.testing.assert_allclose(near, (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-4)


def test_energy_one_is_lossless():
  value = _low_rank(40, 30, 3)
  for shape in [(40, 30), (5, 8, 30)]:
    near, _ = _truncate(value.reshape(shape), 1.0)
    np.testing.assert_allclose(near, value.reshape(shape), atol=1e-5)


def test_what_would_not_be_smaller_travels_whole():
  small, vector = _low_rank(4, 3, 3), np.arange(5, dtype=np.float32)
  for value in (small, vector):
    near, numbers = _truncate(value, 0.99)
    np.testing.assert_array_equal(near, value)
    assert numbers == value.size
  zero = np.zeros((20, 20), np.float32)
  near, _ = _truncate(zero, 0.9)
  np.testing.assert_array_equal(near, zero)


def test_what_is_not_finite_stays_so():
  value = _low_rank(20, 20, 2)
  value[3, 4] = np.nan
  near, numbers = _truncate(value, 0.9)
  np.testing.assert_array_equal(near, value)
  assert numbers == 400


def test_the_mean_of_truncated_values_and_the_schedule():
  factory = svd.TruncatedSvdFactory(0.5, 0.9, num_rounds=3)
  value_type = tff.to_type([(np.float32, [30, 20]), (np.float32, [5])])
  process = factory.create(value_type, tff.TensorType(np.float32))
  clients = [
      [_low_rank(30, 20, 20, seed), np.full(5, seed, np.float32)] for seed in (1, 2, 3)
  ]
  weights = [2.0, 1.0, 0.0]
  state = process.initialize()
  for energy in (0.5, 0.7, 0.9, 0.9):
    output = process.next(state, clients, weights)
    state = output.state
    near = [_truncate(value, energy) for value, _ in clients]
    np.testing.assert_allclose(
        output.result[0], (2 * near[0][0] + near[1][0]) / 3, atol=1e-4
    )
    np.testing.assert_allclose(output.result[1], np.full(5, 4 / 3), rtol=1e-6)
    # Of the clients that take part.
    assert output.measurements['num_senders'] == 2
    assert output.measurements['numbers_sent'] == 5 + (near[0][1] + near[1][1]) / 2


@pytest.mark.parametrize(
    'kwargs, match',
    [
        (dict(start_energy=0.0), '`start_energy` must be above 0'),
        (dict(end_energy=1.1), '`end_energy` must be above 0 and at most 1'),
        (dict(num_rounds=0), '`num_rounds` must be a positive integer'),
    ],
)
def test_bad_numbers(kwargs, match):
  with pytest.raises(ValueError, match=match):
    svd.TruncatedSvdFactory(**kwargs)


@pytest.mark.parametrize(
    'build',
    [
        lambda inner: svd.TruncatedSvdFactory(inner_factory=inner),
        lambda inner: robust.NormBoundFactory(1.0, inner),
        lambda inner: helpers.build(
            'fed_kd', model_aggregator=inner, mentor_fn=helpers.dense_fn()
        ),
    ],
)
def test_a_sum_without_weights_is_refused_inside_another_factory(build):
  with pytest.raises(TypeError, match='must be a `tff.aggregators.WeightedAgg.*Sum'):
    build(tff.aggregators.SumFactory())
