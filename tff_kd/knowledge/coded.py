"""Consensus rules over compressed predictions: a few bits, or the most likely classes."""

import abc
import dataclasses
import math
from typing import Optional

import tensorflow as tf

from tff_kd import checks
from tff_kd.knowledge import codecs
from tff_kd.knowledge import consensus
from tff_kd.knowledge import payload as payload_lib
from tff_kd import losses


@dataclasses.dataclass(frozen=True)
class CodedRule(consensus.WrappedRule):
  """Another rule, over predictions that clients make coarser.

  A client changes its probabilities before the other rule's `encode`: it says less, and
  its payload is one as ever, which every aggregator can sum. How many bytes the message
  takes in its code, the process measures (`knowledge_bits`). The code is for one client's
  message on its way to the server; what adds up masked values (secure aggregation) cannot
  use it.

  Rules over logits are refused: compressed probabilities may be 0, and the mean of logits
  would be that of arbitrary floors.

  Attributes:
    rule: The rule that combines them, a rule over probabilities.
  """

  rule: consensus.ConsensusRule = consensus.MeanProbabilities()

  is_coded = True
  codes_changes = False
  over_probabilities = False
  has_unit_weights = False
  needs_classes = True

  def __post_init__(self):
    if isinstance(self.rule, consensus.WrappedRule):
      raise ValueError(
          f'`{type(self).__name__}` codes what a client sends, so that nothing may '
          f'change it afterwards, found {self.rule!r} inside. Wrap the other way round: '
          '`tff_kd.knowledge.Aligned(tff_kd.knowledge.Quantized(rule, bits=4))`.'
      )
    if not getattr(self.rule, 'over_probabilities', False):
      raise ValueError(
          f'`{type(self).__name__}` needs a rule over probabilities, such as '
          f'`tff_kd.knowledge.MeanProbabilities()`, found {self.rule!r}: a probability '
          'of 0 has no logit.'
      )

  @abc.abstractmethod
  def compress_probabilities(self, probabilities: tf.Tensor) -> tf.Tensor:
    """Compresses probabilities to those that are sent.

    Args:
      probabilities: float32 `[..., classes]`, two classes or more.

    Returns:
      float32 `[..., classes]`.
    """

  @abc.abstractmethod
  def message_bits(
      self,
      payload: payload_lib.KnowledgePayload,
      previous: Optional[payload_lib.KnowledgePayload] = None,
  ) -> tf.Tensor:
    """Returns the encoded length of one client's message, in bits.

    Args:
      payload: As `encode` makes it, also times a number above 0.
      previous: The client's last one about the same rows, to be coded against, where
        `codes_changes`.

    Returns:
      int64 scalar.
    """

  @abc.abstractmethod
  def first_message_bytes(self, logits_shape: tf.TensorShape, num_rows: int) -> int:
    """Returns the length of a message of all rows without a previous one, in bytes.

    Args:
      logits_shape: The shape of one example's logits, `[..., classes]`.
      num_rows: m, the number of rows.
    """

  def encode(self, logits, *certainty):
    p = self.compress_probabilities(payload_lib.class_probabilities(logits))
    if logits.shape[-1] == 1:
      p = p[..., 1:]
    # Rows that are not finite have no probabilities: they stay so, and count as missing.
    logits_of = losses.logits_from_probabilities(p)
    return self.rule.encode(
        tf.where(tf.math.is_finite(logits), logits_of, float('nan')), *certainty
    )


@dataclasses.dataclass(frozen=True)
class Quantized(CodedRule):
  """Another rule, over predictions that clients round to a few bits a class.

  A client rounds its probabilities to the nearest point of the quantised simplex. The
  code is that of `tff_kd.knowledge.codecs`, also against the client's last message.

  Source: Sattler et al., "CFD: Communication-Efficient Federated Distillation via
  Soft-Label Quantization and Delta Coding" (2021).

  Attributes:
    rule: The rule that combines them, a rule over probabilities.
    bits: 1 (the most likely class only) to 8: multiples of 1 / (2^bits - 1).
  """

  bits: int = 1

  codes_changes = True

  def __post_init__(self):
    codecs.num_units(self.bits)
    super().__post_init__()

  def compress_probabilities(self, probabilities):
    units = codecs.quantize(probabilities, self.bits)
    return tf.cast(units, tf.float32) / codecs.num_units(self.bits)

  def units(self, payload: payload_lib.KnowledgePayload) -> tf.Tensor:
    """Returns the units of one client's payload, as `codecs` takes them.

    Args:
      payload: As `encode` makes it, also times a number above 0.

    Returns:
      int32 `[m, ..., classes]` (two classes of a single logit); 0 in missing rows.
    """
    if self.has_diversity:
      payload = payload_lib.KnowledgePayload(
          *(tf.reduce_sum(part, axis=1) for part in payload)
      )
    p, weights = payload_lib.mean_of(payload)
    if p.shape[-1] == 1:
      p = tf.concat([1.0 - p, p], axis=-1)
    present = payload_lib.per_row(weights, p) > 0.0
    units = codecs.quantize(tf.where(present, p, 1.0), self.bits)
    return tf.where(present, units, 0)

  def message_bits(self, payload, previous=None):
    return codecs.message_bits(
        self.units(payload),
        self.bits,
        self.units(previous) if previous is not None else None,
    )

  def first_message_bytes(self, logits_shape, num_rows):
    *positions, classes = logits_shape
    bits = codecs.first_message_bits(
        num_rows * math.prod(positions), max(classes, 2), self.bits
    )
    return -(-bits // 8)


@dataclasses.dataclass(frozen=True)
class TopClasses(CodedRule):
  """Another rule, over the most likely classes of each prediction.

  A client sends the probabilities of its `num_classes` most likely classes; what is left
  of 1 is spread evenly over the others. A message has, for each prediction, the numbers
  of these classes (the fewest bits that can tell them) and their probabilities (float32).

  Attributes:
    rule: The rule that combines them, a rule over probabilities.
    num_classes: 1 or more, and fewer than there are.
  """

  num_classes: int = 1

  def __post_init__(self):
    checks.check_positive_integer(self.num_classes, 'num_classes')
    super().__post_init__()

  def payload_spec(self, logits_shape, num_rows):
    classes = max(logits_shape[-1], 2)
    if self.num_classes >= classes:
      raise ValueError(
          f'`num_classes` must be below the number of classes, {classes}, found '
          f'{self.num_classes}.'
      )
    return super().payload_spec(logits_shape, num_rows)

  def compress_probabilities(self, probabilities):
    classes = probabilities.shape[-1]
    kept = tf.reduce_sum(
        tf.one_hot(tf.math.top_k(probabilities, self.num_classes).indices, classes),
        axis=-2,
    )
    top = kept * probabilities
    left = tf.maximum(1.0 - tf.reduce_sum(top, axis=-1, keepdims=True), 0.0)
    return top + (1.0 - kept) * left / (classes - self.num_classes)

  def _prediction_bits(self, classes: int) -> int:
    return self.num_classes * (32 + math.ceil(math.log2(max(classes, 2))))

  def message_bits(self, payload, previous=None):
    del previous
    values, weights = payload
    if self.has_diversity:
      weights = tf.reduce_sum(weights, axis=1)
      values = values[:, 0]
    rows = tf.math.count_nonzero(weights > 0.0)
    each = math.prod(values.shape[1:-1]) * self._prediction_bits(values.shape[-1])
    return rows * each

  def first_message_bytes(self, logits_shape, num_rows):
    *positions, classes = logits_shape
    bits = num_rows * math.prod(positions) * self._prediction_bits(classes)
    return -(-bits // 8)
