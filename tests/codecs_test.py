"""Quantised soft labels and their code."""

import itertools
import math

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest
import tensorflow as tf

from tff_kd.knowledge import codecs


@st.composite
def distributions(draw):
  """Probabilities [rows, classes], some rows with zeros and ties, and bits."""
  rng = np.random.default_rng(draw(st.integers(0, 10**6)))
  shape = draw(st.integers(1, 6)), draw(st.integers(2, 12))
  p = rng.gamma(draw(st.sampled_from([0.05, 1.0, 100.0])), size=shape) + 1e-12
  if draw(st.booleans()):
    p = np.maximum(np.round(p / p.sum(-1, keepdims=True) * 4), [1] + [0] * (shape[1] - 1))
  p = (p / p.sum(-1, keepdims=True)).astype(np.float32)
  return p, draw(st.integers(1, codecs.MAX_BITS))


@st.composite
def messages(draw):
  """A message, the previous one and bits: some rows changed, some missing."""
  rng = np.random.default_rng(draw(st.integers(0, 10**6)))
  rows, classes = draw(st.integers(1, 40)), draw(st.integers(2, 11))
  bits = draw(st.integers(1, codecs.MAX_BITS))
  total = codecs.num_units(bits)
  alpha = np.full(classes, 0.3)

  def some():
    return np.stack([
        rng.multinomial(total, rng.dirichlet(alpha)) for _ in range(rows)
    ]).astype(np.int32)

  previous, other = some(), some()
  changes = rng.random([rows, 1]) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
  message = np.where(changes, other, previous)
  for its in (message, previous):
    its[rng.random(rows) < draw(st.sampled_from([0.0, 0.0, 0.3, 1.0]))] = 0
  return message, previous, bits


def _largest_remainders(p, total):
  p = p.astype(np.float64)
  scaled = total * p / p.sum()
  units = np.floor(scaled).astype(int)
  order = sorted(range(len(p)), key=lambda c: (units[c] - scaled[c], c))
  for c in order[: total - units.sum()]:
    units[c] += 1
  return units


@settings(deadline=None, max_examples=60)
@given(distributions())
def test_quantiser(case):
  p, bits = case
  total = codecs.num_units(bits)
  units = codecs.quantize(p, bits)
  assert units.dtype == tf.int32
  units = units.numpy()
  np.testing.assert_array_equal(units, [_largest_remainders(row, total) for row in p])
  assert (units >= 0).all() and (units.sum(-1) == total).all()
  exact = p / p.astype(np.float64).sum(-1, keepdims=True)
  assert (np.abs(units / total - exact) < 1 / total).all()
  for row, its in zip(p, units):
    # The first of the most likely has the most; more likely, no fewer.
    assert its[row.argmax()] == its.max()
    for a, b in itertools.permutations(range(len(row)), 2):
      assert its[a] >= its[b] or row[a] <= row[b]
  again = codecs.quantize((units / total).astype(np.float32), bits)
  np.testing.assert_array_equal(again, units)


def test_the_nearest_of_all_points():
  rng = np.random.default_rng(0)
  for bits, classes in ((1, 4), (2, 3), (3, 3)):
    total = codecs.num_units(bits)
    points = np.array([
        its for its in itertools.product(range(total + 1), repeat=classes)
        if sum(its) == total
    ])
    assert len(points) == codecs.num_points(classes, bits)
    p = rng.dirichlet(np.ones(classes), 50)
    found = codecs.quantize(p, bits).numpy() / total
    for norm in (1, 2):
      distances = (np.abs(points / total - p[:, np.newaxis]) ** norm).sum(-1)
      np.testing.assert_allclose(
          (np.abs(found - p) ** norm).sum(-1), distances.min(-1), atol=1e-12
      )


def test_one_bit_is_the_most_likely_class_in_a_graph_with_positions():
  p = np.random.default_rng(0).dirichlet(np.ones(5), (4, 3)).astype(np.float32)
  units = tf.function(lambda its: codecs.quantize(its, 1))(p)
  np.testing.assert_array_equal(units, np.eye(5)[p.argmax(-1)])
  tie = codecs.quantize([[0.25, 0.25, 0.25, 0.25]], 1)
  np.testing.assert_array_equal(tie, [[1, 0, 0, 0]])


def _bits_by_formula(message, previous, bits):
  points = codecs.num_points(message.shape[-1], bits)
  points += bool((message.sum(-1) == 0).any() or (
      previous is not None and (previous.sum(-1) == 0).any()
  ))
  m = len(message)
  if previous is None:
    return 1 + (points**m - 1).bit_length()
  k = (message != previous).any(-1).sum()
  possible = math.comb(m, k) * (points - 1) ** int(k)
  return 1 + math.ceil(math.log2(m + 1)) + (possible - 1).bit_length()


@settings(deadline=None, max_examples=80)
@given(messages())
def test_round_trip_and_length(case):
  message, previous, bits = case
  for before in (None, previous):
    code = codecs.encode(message, bits, before)
    found = codecs.decode(code, message.shape, bits, before)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, message)
    length = _bits_by_formula(message, before, bits)
    assert len(code) == -(-length // 8)
    counted = codecs.message_bits(
        tf.constant(message), bits, None if before is None else tf.constant(before)
    )
    assert counted.dtype == tf.int64
    assert abs(int(counted) - length) <= 1


def test_every_message_has_a_code_of_its_own():
  """Two rows over three points and "missing", against each previous one."""
  rows = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]
  every = [np.array(its) for its in itertools.product(rows, repeat=2)]
  for previous in (None, *every):
    codes = {codecs.encode(its, 1, previous) for its in every}
    assert len(codes) == len(every)


@pytest.mark.parametrize('bits, classes, points', [
    (1, 10, 10), (1, 2, 2), (2, 2, 4), (8, 10, math.comb(264, 9)), (8, 300, None),
])
def test_lengths_known_by_hand(bits, classes, points):
  if points is not None:
    assert codecs.num_points(classes, bits) == points
  rng = np.random.default_rng(0)
  message = codecs.quantize(rng.dirichlet(np.ones(classes), 200), bits)
  same = int(codecs.message_bits(message, bits, message))
  assert same == 1 + 8  # Which of 0, ..., 200 rows changed.
  first = int(codecs.message_bits(message, bits))
  assert first == codecs.first_message_bits(200, classes, bits)
  if (bits, classes) == (1, 10):
    assert first == 1 + math.ceil(200 * math.log2(10))
  if points in (2, 4):  # Powers of two: no rounding in the way.
    assert first == 1 + 200 * int(math.log2(points))
  other = message.numpy()
  other[7] = np.roll(other[7], 1)
  one = int(codecs.message_bits(tf.constant(other), bits, message))
  possible = 200 * (codecs.num_points(classes, bits) - 1)
  assert one == same + math.ceil(math.log2(possible))


def test_many_rows():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 10, 5000)
  eye = np.eye(10, dtype=np.int32)
  before = eye[labels]
  after = eye[np.where(rng.random(5000) < 0.3, rng.integers(0, 10, 5000), labels)]
  code = codecs.encode(after, 1, before)
  np.testing.assert_array_equal(codecs.decode(code, after.shape, 1, before), after)
  in_graph = int(
      tf.function(codecs.message_bits)(tf.constant(after), 1, tf.constant(before))
  )
  assert abs(in_graph - _bits_by_formula(after, before, 1)) <= 1
  assert len(code) < len(codecs.encode(after, 1))


@pytest.mark.parametrize('bits', [0, 9, 1.0, True, None])
def test_bits_out_of_range(bits):
  with pytest.raises(ValueError, match='from 1 .* to 8'):
    codecs.quantize([[0.5, 0.5]], bits)


def test_what_is_no_message_is_refused():
  message = np.eye(3, dtype=np.int32)
  with pytest.raises(ValueError, match='add up to 1'):
    codecs.encode(2 * message, 1)
  with pytest.raises(ValueError, match='add up to 3'):
    codecs.encode(np.array([[4, -1, 0]]), 2)
  with pytest.raises(ValueError, match='one shape'):
    codecs.encode(message, 1, message[:2])
  code = codecs.encode(message, 1, message[::-1].copy())
  for damaged in (b'', code + b'\0', code[:-1], b'\xff' * len(code)):
    with pytest.raises(ValueError, match='damaged'):
      codecs.decode(damaged, message.shape, 1, message[::-1].copy())
