"""What clients say about the transfer set, and what the server makes of it.

A client's predictions travel as sums: `values` and `weights`, a pair of which any
TFF aggregation factory can take the weighted mean over clients, so that the
server never sees one client's predictions. The consensus on an example is the
ratio of the two means; the client's weight w_k cancels wherever all clients
predicted, and a missing prediction is a zero in both.
"""

import abc
from collections.abc import Callable
import dataclasses
import math
from typing import NamedTuple, Optional, Union

import tensorflow as tf

from tff_kd import checks
from tff_kd import codecs
from tff_kd import losses
from tff_kd import models
from tff_kd import transfer


class KnowledgePayload(NamedTuple):
  """What one client sends up, or the weighted mean of it over clients.

  Attributes:
    values: float32 `[m, ..., classes]`, the predictions times `weights`.
    weights: float32 `[m]`, how much each prediction counts (0 = missing). A rule
      may send several such pairs an example: both then have one more axis after the
      first.
  """

  values: tf.Tensor
  weights: tf.Tensor


class Consensus(NamedTuple):
  """The clients' joint opinion on the transfer examples.

  Attributes:
    logits: float32 `[m, ..., classes]`, finite everywhere.
    mask: float32 `[m]`, 1 where at least one client predicted, else 0.
    diversity: The joint opinion of those who do not share it, a `Consensus` with
      mask 0 where all agree; `None` from rules that do not tell.
  """

  logits: tf.Tensor
  mask: tf.Tensor
  diversity: Optional['Consensus'] = None


def predict_logits(
    model: models.BoundModel,
    transfer_set: transfer.TransferSet,
    ids: tf.Tensor,
) -> tf.Tensor:
  """A model's logits on rows of the transfer set, in inference mode.

  Args:
    model: Anything with `logits(inputs)`, such as a `models.BoundModel`.
    transfer_set: Where the inputs are read.
    ids: int32 `[k]` with a static k.

  Returns:
    float32 `[k, ..., classes]`.
  """
  logits = transfer_set.map_inputs(model.logits, ids)
  if isinstance(model, models.BoundModel):
    # In a graph, a recurrent layer may have lost the length.
    logits.set_shape([ids.shape[0], *logits_shape(model.spec, transfer_set)])
  return logits


def logits_shape(
    model: models.ModelSpec, transfer_set: transfer.TransferSet
) -> tf.TensorShape:
  """The static shape of a model's logits of one example of the transfer set."""
  return model.logits_shape_for(transfer_set.inputs_spec)


def without_rows(logits: tf.Tensor, kept: tf.Tensor) -> tf.Tensor:
  """Logits in which other rows than those of a bool mask `[m]` are missing."""
  return tf.where(_per_row(kept, logits), logits, float('nan'))


class ConsensusRule(abc.ABC):
  """How clients' predictions become sums, and how those become a consensus.

  Attributes:
    has_diversity: Whether its consensus has a `diversity`.
    over_probabilities: Whether its sums are of probabilities, not of logits.
    needs_certainty: Whether its `encode` also takes the client's certainties, float32
      `[m]`, which a companion gives.
    is_coded: Whether it is a `CodedRule`, whose messages are shorter than their floats.
    has_unit_weights: Whether the weight of a prediction is 1, whoever the client is.
    needs_classes: Whether it takes outputs for logits, so that regression models cannot
      use it.
  """

  has_diversity: bool = False
  over_probabilities: bool = False
  needs_certainty: bool = False
  is_coded: bool = False
  has_unit_weights: bool = False
  needs_classes: bool = True

  def payload_spec(
      self, logits_shape: tf.TensorShape, num_rows: int
  ) -> KnowledgePayload:
    """The `tf.TensorSpec`s of a payload.

    Args:
      logits_shape: Of one example's logits, `[..., classes]`.
      num_rows: m.
    """
    return KnowledgePayload(
        values=tf.TensorSpec([num_rows, *logits_shape], tf.float32),
        weights=tf.TensorSpec([num_rows], tf.float32),
    )

  def zero_payload(
      self, logits_shape: tf.TensorShape, num_rows: int
  ) -> KnowledgePayload:
    """The payload of a client that predicted nothing."""
    return tf.nest.map_structure(
        lambda spec: tf.zeros(spec.shape, spec.dtype),
        self.payload_spec(logits_shape, num_rows),
    )

  @abc.abstractmethod
  def encode(self, logits: tf.Tensor) -> KnowledgePayload:
    """A client's payload.

    Args:
      logits: float32 `[m, ..., classes]`. A row that is not finite is missing.
    """

  @abc.abstractmethod
  def decode(self, mean_payload: KnowledgePayload) -> Consensus:
    """The consensus.

    Args:
      mean_payload: The clients' payloads as aggregated (a mean or a sum: the
        factor cancels).

    Returns:
      A `Consensus`. Rows that nobody predicted, or that came out non-finite, have
      logits 0 and mask 0.
    """


def check_rule(rule: ConsensusRule, student: models.ModelSpec) -> None:
  """Refuses a rule over classes for a student that predicts numbers.

  Raises:
    ValueError: If they do not fit.
  """
  if rule.needs_classes:
    models.check_has_classes(student, f'The consensus {type(rule).__name__}')


class MeanLogits(ConsensusRule):
  """sum_k w_k z_k(x) / sum_k w_k over those who predicted x.

  Source: Lin et al., "Ensemble Distillation for Robust Model Fusion in Federated
  Learning" (FedDF, NeurIPS 2020), equation 2 (there with equal weights).
  """

  has_unit_weights = True
  needs_classes = False

  def encode(self, logits):
    return payload_of(logits, tf.ones(tf.shape(logits)[:1]))

  def decode(self, mean_payload):
    return consensus_of(*mean_of(mean_payload))


@dataclasses.dataclass(frozen=True)
class MeanProbabilities(ConsensusRule):
  """The mean of the clients' probabilities, plain or sharpened.

  Source: Itahara et al., "Distillation-Based Semi-Supervised Federated Learning for
  Communication-Efficient Collaborative Training with Non-IID Private Data" (DS-FL,
  2020): simple aggregation, and entropy reduction aggregation (ERA).

  Attributes:
    temperature: ERA: softmax(mean / temperature), 0.1 in the paper; the lower the
      sharper. Off if `None`.
    power: Enhanced ERA: mean^power / sum of mean^power; 1 is the plain mean.
  """

  temperature: Optional[float] = None
  power: float = 1.0

  over_probabilities = True
  has_unit_weights = True

  def __post_init__(self):
    if self.temperature is not None:
      checks.check_temperature(self.temperature)
    if not 0.0 < self.power < float('inf'):
      raise ValueError(
          f'`power` must be a finite number above 0, found {self.power!r}.'
      )
    if self.temperature is not None and self.power != 1.0:
      raise ValueError(
          'Sharpen by `temperature` (ERA) or by `power` (Enhanced ERA), not by '
          f'both; found {self.temperature!r} and {self.power!r}.'
      )

  def encode(self, logits):
    return payload_of(_probabilities(logits), tf.ones(tf.shape(logits)[:1]))

  def decode(self, mean_payload):
    mean, weights = mean_of(mean_payload)
    if self.temperature is not None:
      # As logits: softmax (or sigmoid, of a single one) of them is ERA.
      logits = (2.0 * mean - 1.0 if mean.shape[-1] == 1 else mean) / self.temperature
    else:
      logits = self.power * losses.logits_from_probabilities(mean)
    return consensus_of(logits, weights)


@dataclasses.dataclass(frozen=True)
class CertaintyWeighted(ConsensusRule):
  """sum_k w_k s_k(x) z_k(x) / sum_k w_k s_k(x), by a certainty s_k of each prediction.

  Source: Cho et al., "Heterogeneous Ensemble Knowledge Transfer for Training Large
  Models in Federated Learning" (Fed-ET, IJCAI 2022), section 3.2, for 'variance' (of
  the logits over the classes; there all w_k are equal).

  Attributes:
    certainty: 'variance'; 'confidence' (the highest probability); 'entropy' (how far
      the prediction's entropy is below the highest possible, as a share of that);
      'given' (what a companion says, such as `certainty.CertaintyScorer`); or a
      function from logits `[m, ..., classes]` to finite certainties `[m]`, 0 or more.
    average: What is averaged, 'logits' or 'probabilities' (as FedAUX does: Sattler et
      al., "FedAUX: Leveraging Unlabeled Auxiliary Data in Federated Learning", 2021).
  """

  certainty: Union[str, Callable[[tf.Tensor], tf.Tensor]] = 'variance'
  average: str = 'logits'

  def __post_init__(self):
    names = sorted([*_CERTAINTIES, 'given'])
    if not callable(self.certainty) and self.certainty not in names:
      raise ValueError(
          f'`certainty` must be one of {names} or a function, found '
          f'{self.certainty!r}.'
      )
    if self.average not in ('logits', 'probabilities'):
      raise ValueError(
          "`average` must be 'logits' or 'probabilities', found "
          f'{self.average!r}.'
      )

  @property
  def over_probabilities(self):
    return self.average == 'probabilities'

  @property
  def needs_certainty(self):
    return self.certainty == 'given'

  def encode(self, logits, certainty=None):
    score = self.certainty
    if not self.needs_certainty:
      certainty = (score if callable(score) else _CERTAINTIES[score])(logits)
    # Of sequences: the mean over the positions.
    axes = list(range(1, certainty.shape.rank))
    values = logits if self.average == 'logits' else _probabilities(logits)
    return payload_of(values, tf.reduce_mean(certainty, axis=axes))

  def decode(self, mean_payload):
    mean, weights = mean_of(mean_payload)
    if self.average == 'probabilities':
      mean = losses.logits_from_probabilities(mean)
    return consensus_of(mean, weights)


@dataclasses.dataclass(frozen=True)
class CertaintyWithDiversity(CertaintyWeighted):
  """`CertaintyWeighted`, and the same mean of those who predict another class.

  Clients add up their predictions by the class that they predict, so that the server
  can leave out those who agree with the consensus and never sees one client. That
  costs as many times the bytes as there are classes.

  Source: Cho et al. (Fed-ET, IJCAI 2022), section 3.2, the diversity term.
  """

  has_diversity = True

  def payload_spec(self, logits_shape, num_rows):
    if len(logits_shape) != 1 or logits_shape[-1] < 2:
      raise ValueError(
          'Diversity needs one prediction over two classes or more an example, found '
          f'logits of shape {logits_shape}.'
      )
    groups = logits_shape[-1]
    return KnowledgePayload(
        values=tf.TensorSpec([num_rows, groups, groups], tf.float32),
        weights=tf.TensorSpec([num_rows, groups], tf.float32),
    )

  def encode(self, logits, certainty=None):
    values, weights = super().encode(logits, certainty)
    group = tf.one_hot(tf.argmax(values, axis=-1), values.shape[-1])
    return KnowledgePayload(
        values=group[..., tf.newaxis] * values[:, tf.newaxis, :],
        weights=group * weights[:, tf.newaxis],
    )

  def decode(self, mean_payload):
    values, weights = mean_payload

    def mean_over(groups: tf.Tensor) -> Consensus:
      kept = tf.math.multiply_no_nan(weights, groups)
      return super(CertaintyWithDiversity, self).decode(
          KnowledgePayload(
              tf.einsum('igc,ig->ic', values, groups), tf.reduce_sum(kept, axis=1)
          )
      )

    consensus = mean_over(tf.ones_like(weights))
    label = tf.argmax(consensus.logits, axis=-1)
    others = 1.0 - tf.one_hot(label, weights.shape[-1])
    return consensus._replace(diversity=mean_over(others))


@dataclasses.dataclass(frozen=True)
class CodedRule(ConsensusRule):
  """Another rule, over predictions that clients make coarser.

  A client changes its probabilities before the other rule's `encode`: it says less, and
  its payload is one as ever, which every aggregator can sum. How many bytes the message
  takes in its code, the process measures (`knowledge_bits`). The code is for one client's
  message on its way to the server; what adds up masked values (secure aggregation) cannot
  use it.

  Rules over logits are refused: coarse probabilities may be 0, and the mean of logits
  would be that of arbitrary floors.

  Attributes:
    rule: What is done with them, a rule over probabilities.
    codes_changes: Whether its code takes the client's last message about the same rows.
  """

  rule: ConsensusRule = MeanProbabilities()

  is_coded = True
  codes_changes = False

  def __post_init__(self):
    if not getattr(self.rule, 'over_probabilities', False):
      raise ValueError(
          f'`{type(self).__name__}` needs a rule over probabilities, such as '
          f'`tff_kd.knowledge.MeanProbabilities()`, found {self.rule!r}: a probability '
          'of 0 has no logit.'
      )

  @property
  def has_diversity(self):
    return self.rule.has_diversity

  @property
  def needs_certainty(self):
    return self.rule.needs_certainty

  def payload_spec(self, logits_shape, num_rows):
    return self.rule.payload_spec(logits_shape, num_rows)

  @abc.abstractmethod
  def coarse(self, probabilities: tf.Tensor) -> tf.Tensor:
    """The probabilities that are sent, of float32 `[..., classes]`, two or more."""

  @abc.abstractmethod
  def message_bits(
      self, payload: KnowledgePayload, previous: Optional[KnowledgePayload] = None
  ) -> tf.Tensor:
    """The length of one client's message in its code.

    Args:
      payload: As `encode` makes it, also times a number above 0.
      previous: The client's last one about the same rows, to be coded against, where
        `codes_changes`.

    Returns:
      int64 scalar.
    """

  @abc.abstractmethod
  def first_message_bytes(self, logits_shape: tf.TensorShape, num_rows: int) -> int:
    """Bytes of a message of all rows without a previous one.

    Args:
      logits_shape: Of one example's logits, `[..., classes]`.
      num_rows: m.
    """

  def encode(self, logits, *certainty):
    p = self.coarse(_all_probabilities(logits))
    if logits.shape[-1] == 1:
      p = p[..., 1:]
    # What is not finite has no probabilities: it stays so, and is missing.
    logits_of = losses.logits_from_probabilities(p)
    return self.rule.encode(
        tf.where(tf.math.is_finite(logits), logits_of, float('nan')), *certainty
    )

  def decode(self, mean_payload):
    return self.rule.decode(mean_payload)


@dataclasses.dataclass(frozen=True)
class Quantized(CodedRule):
  """Another rule, over predictions that clients round to a few bits a class.

  A client rounds its probabilities to the nearest point of the quantised simplex. The
  code is that of `tff_kd.codecs`, also against the client's last message.

  Source: Sattler et al., "CFD: Communication-Efficient Federated Distillation via
  Soft-Label Quantization and Delta Coding" (2021).

  Attributes:
    rule: What is done with them, a rule over probabilities.
    bits: 1 (the most likely class only) to 8: multiples of 1 / (2^bits - 1).
  """

  bits: int = 1

  codes_changes = True

  def __post_init__(self):
    codecs.num_units(self.bits)
    super().__post_init__()

  def coarse(self, probabilities):
    units = codecs.quantize(probabilities, self.bits)
    return tf.cast(units, tf.float32) / codecs.num_units(self.bits)

  def units(self, payload: KnowledgePayload) -> tf.Tensor:
    """What one client's payload says, as `codecs` takes it.

    Args:
      payload: As `encode` makes it, also times a number above 0.

    Returns:
      int32 `[m, ..., classes]` (two classes of a single logit); 0 in missing rows.
    """
    if self.has_diversity:
      payload = KnowledgePayload(*(tf.reduce_sum(its, axis=1) for its in payload))
    p, weights = mean_of(payload)
    if p.shape[-1] == 1:
      p = tf.concat([1.0 - p, p], axis=-1)
    present = _per_row(weights, p) > 0.0
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
    rule: What is done with them, a rule over probabilities.
    num_classes: 1 or more, and fewer than there are.
  """

  num_classes: int = 1

  def __post_init__(self):
    if not isinstance(self.num_classes, int) or self.num_classes < 1:
      raise ValueError(
          f'`num_classes` must be a positive integer, found {self.num_classes!r}.'
      )
    super().__post_init__()

  def payload_spec(self, logits_shape, num_rows):
    classes = max(logits_shape[-1], 2)
    if self.num_classes >= classes:
      raise ValueError(
          f'`num_classes` must be below the number of classes, {classes}, found '
          f'{self.num_classes}.'
      )
    return super().payload_spec(logits_shape, num_rows)

  def coarse(self, probabilities):
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


def _entropy_certainty(logits: tf.Tensor) -> tf.Tensor:
  p = _all_probabilities(logits)
  entropy = -tf.reduce_sum(tf.math.xlogy(p, p), axis=-1)
  return 1.0 - entropy / tf.math.log(float(p.shape[-1]))


_CERTAINTIES = {
    'variance': lambda z: tf.math.reduce_variance(losses.two_classes(z), axis=-1),
    'confidence': lambda z: tf.reduce_max(_all_probabilities(z), axis=-1),
    'entropy': _entropy_certainty,
}


def _probabilities(logits: tf.Tensor) -> tf.Tensor:
  return tf.sigmoid(logits) if logits.shape[-1] == 1 else tf.nn.softmax(logits)


def _all_probabilities(logits: tf.Tensor) -> tf.Tensor:
  return tf.nn.softmax(losses.two_classes(logits))


def payload_of(values: tf.Tensor, weights: tf.Tensor) -> KnowledgePayload:
  """Makes a payload of weighted predictions: the contract of what clients send.

  Args:
    values: float32 `[m, ..., classes]`. A row in which something is not finite is
      missing: it has weight 0 and values 0, so that sums stay finite.
    weights: float32 `[m]`, 0 or more; not finite: missing, too.

  Returns:
    The payload of `values` times `weights`.
  """
  axes = list(range(1, values.shape.rank))
  present = tf.reduce_all(tf.math.is_finite(values), axis=axes)
  present = tf.logical_and(present, tf.math.is_finite(weights))
  weights = tf.where(present, weights, 0.0)
  return KnowledgePayload(
      values=tf.math.multiply_no_nan(values, _per_row(weights, values)),
      weights=weights,
  )


def mean_of(mean_payload: KnowledgePayload) -> tuple[tf.Tensor, tf.Tensor]:
  """Returns the weighted mean of predictions, and its weights.

  Args:
    mean_payload: The clients' payloads as aggregated; a factor common to values and
      weights cancels.

  Returns:
    float32 `[m, ..., classes]`, 0 where no client predicted, and float32 `[m]`.
  """
  values, weights = mean_payload
  return tf.math.divide_no_nan(values, _per_row(weights, values)), weights


def consensus_of(logits: tf.Tensor, weights: tf.Tensor) -> Consensus:
  """Makes a consensus of logits.

  Args:
    logits: float32 `[m, ..., classes]`.
    weights: float32 `[m]`.

  Returns:
    A `Consensus` with mask 1 where the weight is above 0 and all logits are finite, and
    with logits 0 elsewhere.
  """
  axes = list(range(1, logits.shape.rank))
  valid = tf.logical_and(
      weights > 0.0, tf.reduce_all(tf.math.is_finite(logits), axis=axes)
  )
  mask = tf.cast(valid, tf.float32)
  return Consensus(
      logits=tf.math.multiply_no_nan(logits, _per_row(mask, logits)), mask=mask
  )


def _per_row(weights: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
  return tf.reshape(weights, [-1] + [1] * (values.shape.rank - 1))
