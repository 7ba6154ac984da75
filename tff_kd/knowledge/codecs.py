"""Quantised soft labels, and a short code for messages of them.

A prediction over C classes is rounded to k/N with whole k >= 0 that add up to
N = 2^bits - 1: one of binomial(N + C - 1, C - 1) points. A message of m rows is coded
against what the same sender said last, where there is such a thing: how many rows
changed, which, and to which other point each; all of that as one number (an enumerative
code), so that its length is a formula and no statistics need to be sent.

Sources: Sattler, Marban, Rischke & Samek, "CFD: Communication-Efficient Federated
Distillation via Soft-Label Quantization and Delta Coding" (2021), for the quantiser and
for sending what changed; Cover, "Enumerative Source Encoding" (1973), for the code.

The code of m rows, in bits, where A is the number of points, plus one for "missing" if a
row of the message or of the previous one is missing:

  without a previous message: 1 + ceil(log2(A^m))
  else, with k changed rows:  1 + ceil(log2(m + 1))
                                + ceil(log2(binomial(m, k) (A - 1)^k))

The first bit says whether a row of the message is missing. A row is missing where all
its units are 0.
"""

from collections.abc import Iterable, Sequence
import math
from typing import Optional

import numpy as np
import tensorflow as tf

MAX_BITS = 8
# The logarithm of a power of two may come out a little above a whole number.
_TOLERANCE = 1e-6


def num_units(bits: int) -> int:
  """Returns N = 2^bits - 1, the sum of a row's units.

  Args:
    bits: A whole number from 1 to 8.

  Raises:
    ValueError: If `bits` is not a whole number from 1 to 8.
  """
  if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MAX_BITS:
    raise ValueError(
        f'`bits` must be a whole number from 1 (the most likely class) to {MAX_BITS}, '
        f'found {bits!r}.'
    )
  return 2**bits - 1


def num_points(num_classes: int, bits: int) -> int:
  """Returns the number of points of the quantised simplex: binomial(N + C - 1, C - 1).

  Args:
    num_classes: C, two or more.
    bits: A whole number from 1 to 8.
  """
  return math.comb(num_units(bits) + num_classes - 1, num_classes - 1)


def quantize(probabilities: tf.Tensor, bits: int) -> tf.Tensor:
  """Quantises probabilities to the nearest point of the simplex, by largest remainders.

  Every class gets the whole part of N p; what is missing to N goes, one each, to the
  classes with the largest remainders, the lowest class first among equals. No class is
  off by 1/N or more, and a class that is more likely than another gets no fewer.

  Args:
    probabilities: A float tensor `[..., C]` with two classes or more. Rows are
      normalised; they must be finite and not all 0.
    bits: 1 to 8. With 1, all goes to the most likely class.

  Returns:
    int32 of the same shape, units of 1/N; each row adds up to N = 2^bits - 1.
  """
  units = num_units(bits)
  p = tf.cast(probabilities, tf.float64)
  scaled = units * p / tf.reduce_sum(p, axis=-1, keepdims=True)
  whole = tf.floor(scaled)
  # The place of each class in the order of the remainders; stable, so ties keep theirs.
  order = tf.argsort(scaled - whole, direction='DESCENDING', stable=True)
  place = tf.argsort(order)
  whole = tf.cast(whole, tf.int32)
  left = units - tf.reduce_sum(whole, axis=-1, keepdims=True)
  return whole + tf.cast(place < left, tf.int32)


def message_bits(
    units: tf.Tensor, bits: int, previous: Optional[tf.Tensor] = None
) -> tf.Tensor:
  """Returns the encoded length of a message, without encoding it.

  Args:
    units: int32 `[..., C]` with static shape, of `quantize`; 0 in all of a missing row.
    bits: That it was quantised with.
    previous: The sender's last message, of the same shape, if both sides know it.

  Returns:
    int64 scalar, the bits of what `encode` makes, give or take one by rounding.
  """
  num_rows, num_classes = math.prod(units.shape[:-1]), units.shape[-1]
  points = num_points(num_classes, bits)
  missing = _any_missing(units)
  if previous is not None:
    missing = missing | _any_missing(previous)

  def log2_of(whole: int) -> tf.Tensor:
    """log2(whole), or log2(whole + 1) with a symbol for "missing"."""
    one_more = tf.constant(math.log2(whole + 1), tf.float64)
    return tf.where(missing, one_more, tf.constant(math.log2(whole), tf.float64))

  def ceil(logarithm: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.math.ceil(logarithm - _TOLERANCE), tf.int64)

  if previous is None:
    return 1 + ceil(float(num_rows) * log2_of(points))
  is_changed = tf.reduce_any(tf.not_equal(units, previous), axis=-1)
  changed = tf.cast(tf.math.count_nonzero(is_changed), tf.float64)
  total = tf.constant(num_rows, tf.float64)
  which = (
      tf.math.lgamma(total + 1.0)
      - tf.math.lgamma(changed + 1.0)
      - tf.math.lgamma(total - changed + 1.0)
  ) / math.log(2.0)
  return 1 + num_rows.bit_length() + ceil(which + changed * log2_of(points - 1))


def first_message_bits(num_rows: int, num_classes: int, bits: int) -> int:
  """Returns the length of a message of all rows without a previous one, in bits.

  A message with one is at most ceil(log2(num_rows + 1)) bits longer.

  Args:
    num_rows: The number of rows.
    num_classes: C, two or more.
    bits: A whole number from 1 to 8.
  """
  return 1 + _width(num_points(num_classes, bits) ** num_rows)


def encode(
    units: np.ndarray, bits: int, previous: Optional[np.ndarray] = None
) -> bytes:
  """Codes a message.

  Args:
    units: Integers `[..., C]`; each row adds up to 2^bits - 1, or is all 0 (missing).
    bits: That it was quantised with.
    previous: The sender's last message, of the same shape.

  Returns:
    The code, in whole bytes.

  Raises:
    ValueError: If a row is not a point of the quantised simplex, or shapes differ.
  """
  symbols = _symbols(units, bits, 'units')
  num_rows, num_classes = len(symbols), units.shape[-1]
  points = num_points(num_classes, bits)
  is_missing = points in symbols
  if previous is None:
    alphabet = points + is_missing
    width = _width(alphabet**num_rows)
    return _to_bytes([(is_missing, 1), (_number(symbols, alphabet), width)])
  if previous.shape != units.shape:
    raise ValueError(
        f'A message and the previous one must have one shape, found {units.shape} '
        f'and {previous.shape}.'
    )
  before = _symbols(previous, bits, 'previous')
  others = points + (is_missing or points in before) - 1
  changed = [i for i in range(num_rows) if symbols[i] != before[i]]
  # A symbol's place among those that differ from the old one.
  digits = [symbols[i] - (symbols[i] > before[i]) for i in changed]
  sets = math.comb(num_rows, len(changed))
  number = _number(digits, others) * sets + _rank(changed, num_rows)
  return _to_bytes([
      (is_missing, 1),
      (len(changed), num_rows.bit_length()),
      (number, _width(sets * others ** len(changed))),
  ])


def decode(
    message: bytes,
    shape: Sequence[int],
    bits: int,
    previous: Optional[np.ndarray] = None,
) -> np.ndarray:
  """Decodes a message that `encode` has coded.

  Args:
    message: The code.
    shape: `[..., C]`, of the units.
    bits: As in `encode`.
    previous: As in `encode`.

  Returns:
    The units, int32 of that shape.

  Raises:
    ValueError: If the message is damaged, or of another shape, `bits` or previous
      message.
  """
  num_rows, num_classes = math.prod(shape[:-1]), shape[-1]
  points = num_points(num_classes, bits)
  reader = _Reader(message)
  is_missing = reader.read(1)
  if previous is None:
    alphabet = points + is_missing
    number = reader.read_last(alphabet**num_rows)
    symbols = _digits(number, alphabet, num_rows)
  else:
    symbols = _symbols(previous, bits, 'previous')
    others = points + (is_missing or points in symbols) - 1
    num_changed = reader.read(num_rows.bit_length())
    if num_changed > num_rows:
      raise ValueError(_DAMAGED)
    sets = math.comb(num_rows, num_changed)
    number = reader.read_last(sets * others**num_changed)
    number, index = divmod(number, sets)
    digits = _digits(number, others, num_changed)
    for i, digit in zip(_unrank(index, num_changed, num_rows), digits):
      symbols[i] = digit + (digit >= symbols[i])
  rows = [_point(symbol, num_classes, bits) for symbol in symbols]
  return np.array(rows, np.int32).reshape(shape)


_DAMAGED = (
    'The message is damaged, or of another shape, number of bits or previous message.'
)


def _any_missing(units: tf.Tensor) -> tf.Tensor:
  return tf.reduce_any(tf.equal(tf.reduce_sum(units, axis=-1), 0))


def _width(count: int) -> int:
  """ceil(log2(count)): the bits that tell one of `count` things."""
  return (count - 1).bit_length()


def _symbols(units: np.ndarray, bits: int, name: str) -> list[int]:
  """Each row's number among the points; the number of points if it is missing."""
  total, num_classes = num_units(bits), units.shape[-1]
  rows = units.reshape([-1, num_classes])
  sums = rows.sum(axis=-1)
  if (rows < 0).any() or not np.isin(sums, [0, total]).all():
    raise ValueError(
        f'Each row of `{name}` must have units from 0 that add up to {total} ({bits} '
        f'bits), or to 0 where it is missing; found sums of {np.unique(sums)} and '
        f'units from {rows.min()}.'
    )
  # The bars between the classes' units.
  bars = np.cumsum(rows, axis=-1)[:, :-1] + np.arange(num_classes - 1)
  missing = num_points(num_classes, bits)
  return [
      _rank(row, total + num_classes - 1) if present else missing
      for row, present in zip(bars.tolist(), sums)
  ]


def _point(symbol: int, num_classes: int, bits: int) -> list[int]:
  """The units of a symbol."""
  if symbol == num_points(num_classes, bits):
    return [0] * num_classes
  places = num_units(bits) + num_classes - 1
  bars = [-1, *_unrank(symbol, num_classes - 1, places), places]
  return [b - a - 1 for a, b in zip(bars, bars[1:])]


def _rank(chosen: Iterable[int], total: int) -> int:
  """The number of a set within those of its size: sum_j binomial(c_j, j)."""
  chosen = set(chosen)
  index, j = 0, len(chosen)
  count = math.comb(max(total - 1, 0), j)  # binomial(c, j), from step to step.
  for c in range(total - 1, 0, -1):
    if c in chosen:
      index += count
      count = count * j // c
      j -= 1
    else:
      count = count * (c - j) // c
  return index


def _unrank(index: int, size: int, total: int) -> list[int]:
  """The set of so many of `range(total)` with that number, in order."""
  chosen = []
  c, j = total - 1, size
  count = math.comb(max(c, 0), j)
  while j:
    while count > index:
      count = count * (c - j) // c
      c -= 1
    chosen.append(c)
    index -= count
    count = count * j // max(c, 1)
    c, j = c - 1, j - 1
  return chosen[::-1]


def _number(digits: Sequence[int], base: int) -> int:
  number = 0
  for digit in digits:
    number = number * base + digit
  return number


def _digits(number: int, base: int, count: int) -> list[int]:
  digits = []
  for _ in range(count):
    number, digit = divmod(number, base)
    digits.append(digit)
  return digits[::-1]


def _to_bytes(fields: Sequence[tuple[int, int]]) -> bytes:
  """Numbers of so many bits each, end to end; zeros up to a whole byte."""
  number, width = 0, 0
  for value, its_width in fields:
    number = (number << its_width) | value
    width += its_width
  padding = -width % 8
  return (number << padding).to_bytes((width + padding) // 8, 'big')


class _Reader:
  """Takes the fields of `_to_bytes` apart."""

  def __init__(self, message: bytes):
    self._number = int.from_bytes(message, 'big')
    self._left = 8 * len(message)

  def read(self, width: int) -> int:
    if width > self._left:
      raise ValueError(_DAMAGED)
    self._left -= width
    value, self._number = divmod(self._number, 1 << self._left)
    return value

  def read_last(self, count: int) -> int:
    """One of `count` things, and nothing but padding after it."""
    value = self.read(_width(count))
    if value >= count or self._left >= 8 or self._number:
      raise ValueError(_DAMAGED)
    return value
