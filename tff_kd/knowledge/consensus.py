"""Consensus rules: how clients' predictions are combined into one target."""

import abc
from collections.abc import Callable
import dataclasses
from typing import Any, Optional, Union

import tensorflow as tf

from tff_kd import checks
from tff_kd.knowledge import payload as payload_lib
from tff_kd import losses
from tff_kd import models


class ConsensusRule(abc.ABC):
  """How clients' predictions become sums, and how those become a consensus.

  Attributes:
    has_diversity: Whether its consensus has a `diversity`.
    over_probabilities: Whether its sums are of probabilities, not of logits.
    needs_certainty: Whether its `encode` also takes the client's certainties, float32
      `[m]`, which a companion gives.
    is_coded: Whether it is a `CodedRule`, whose messages are shorter than their floats.
    codes_changes: Whether its code takes the client's last message about the same rows.
    has_unit_weights: Whether the weight of a prediction is 1, whoever the client is.
    needs_classes: Whether it takes outputs for logits, so that regression models cannot
      use it.
    needs_average: Whether its `decode` also takes the averaged student's logits on the
      same rows, float32 `[m, ..., classes]`; needs an algorithm that averages weights.
    keeps_state: Whether it remembers something from round to round, by `initial_state`
      and `decode_next`. Such a rule cannot be wrapped by another one.
  """

  has_diversity: bool = False
  over_probabilities: bool = False
  needs_certainty: bool = False
  is_coded: bool = False
  codes_changes: bool = False
  has_unit_weights: bool = False
  needs_classes: bool = True
  needs_average: bool = False
  keeps_state: bool = False

  def payload_spec(
      self, logits_shape: tf.TensorShape, num_rows: int
  ) -> payload_lib.KnowledgePayload:
    """Returns the `tf.TensorSpec`s of a payload.

    Args:
      logits_shape: The shape of one example's logits, `[..., classes]`.
      num_rows: m, the number of rows.
    """
    return payload_lib.KnowledgePayload(
        values=tf.TensorSpec([num_rows, *logits_shape], tf.float32),
        weights=tf.TensorSpec([num_rows], tf.float32),
    )

  def zero_payload(
      self, logits_shape: tf.TensorShape, num_rows: int
  ) -> payload_lib.KnowledgePayload:
    """Returns the payload of a client that predicted nothing.

    Args:
      logits_shape: The shape of one example's logits, `[..., classes]`.
      num_rows: m, the number of rows.
    """
    return tf.nest.map_structure(
        lambda spec: tf.zeros(spec.shape, spec.dtype),
        self.payload_spec(logits_shape, num_rows),
    )

  @abc.abstractmethod
  def encode(self, logits: tf.Tensor) -> payload_lib.KnowledgePayload:
    """Encodes one client's predictions as a payload.

    Args:
      logits: float32 `[m, ..., classes]`. A row that is not finite is missing.

    Returns:
      The payload, of the types of `payload_spec`.
    """

  @abc.abstractmethod
  def decode(self, mean_payload: payload_lib.KnowledgePayload) -> payload_lib.Consensus:
    """Decodes the clients' mean payload to the consensus.

    Args:
      mean_payload: The clients' payloads as aggregated (a mean or a sum: the
        factor cancels).

    Returns:
      A `Consensus`. Rows that nobody predicted, or that came out non-finite, have
      logits 0 and mask 0.
    """

  def initial_state(self, logits_shape: tf.TensorShape) -> Any:
    """Returns what the server remembers before the first round: by default, nothing.

    Args:
      logits_shape: The shape of one example's logits, `[..., classes]`.

    Returns:
      A structure of tensors.
    """
    del logits_shape
    return ()

  def decode_next(
      self,
      state: Any,
      mean_payload: payload_lib.KnowledgePayload,
      *average_logits: tf.Tensor,
  ) -> tuple[Any, payload_lib.Consensus]:
    """Decodes as `decode`, with what the last round left.

    Args:
      state: As `initial_state` or the last round returned it.
      mean_payload: As in `decode`.
      *average_logits: As in `decode`.

    Returns:
      The next state, of the types of `state`, and the `Consensus`.
    """
    return state, self.decode(mean_payload, *average_logits)


def _of_inner_rule(name: str) -> property:
  """Returns a property of a `WrappedRule` that has the value of the inner rule."""
  return property(lambda wrapped: getattr(wrapped.rule, name))


@dataclasses.dataclass(frozen=True)
class WrappedRule(ConsensusRule):
  """A rule that changes what another rule is given, or what it returns.

  Whatever a subclass does not define is the inner rule's: `WrappedRule(rule)` itself is
  the identity. The exception is `has_unit_weights`, false of a subclass with an `encode`
  of its own, which may weigh otherwise; one that leaves the weights as they are says so.
  The inner rule must not be one that keeps a state.

  Example, of a rule whose clients clip their logits:

  ```
  @dataclasses.dataclass(frozen=True)
  class Clipped(tff_kd.knowledge.WrappedRule):
    bound: float = 5.0

    @property
    def has_unit_weights(self):
      return self.rule.has_unit_weights

    def encode(self, logits, *certainty):
      clipped = tf.clip_by_value(logits, -self.bound, self.bound)
      return self.rule.encode(clipped, *certainty)
  ```

  Attributes:
    rule: The inner rule.
  """

  rule: Any

  has_diversity = _of_inner_rule('has_diversity')
  over_probabilities = _of_inner_rule('over_probabilities')
  needs_certainty = _of_inner_rule('needs_certainty')
  is_coded = _of_inner_rule('is_coded')
  codes_changes = _of_inner_rule('codes_changes')
  needs_classes = _of_inner_rule('needs_classes')
  needs_average = _of_inner_rule('needs_average')

  @property
  def has_unit_weights(self):
    return type(self).encode is WrappedRule.encode and self.rule.has_unit_weights

  def payload_spec(self, logits_shape, num_rows):
    return self.rule.payload_spec(logits_shape, num_rows)

  def encode(self, logits, *certainty):
    return self.rule.encode(logits, *certainty)

  def decode(self, mean_payload, *average_logits):
    return self.rule.decode(mean_payload, *average_logits)

  def message_bits(self, payload, previous=None):
    """Returns the encoded length of a message, if the inner rule is a `CodedRule`.

    Args:
      payload: As `encode` makes it.
      previous: The client's last payload about the same rows, or `None`.

    Returns:
      int64 scalar, in bits.
    """
    return self.rule.message_bits(payload, previous)

  def first_message_bytes(self, logits_shape, num_rows):
    """Returns the length of a first message, if the inner rule is a `CodedRule`.

    Args:
      logits_shape: The shape of one example's logits, `[..., classes]`.
      num_rows: m, the number of rows.

    Returns:
      The length in bytes.
    """
    return self.rule.first_message_bytes(logits_shape, num_rows)


def check_rule(rule: ConsensusRule, student: models.ModelSpec) -> None:
  """Raises an error if the server cannot use a rule.

  Args:
    rule: The consensus rule.
    student: The clients' model.

  Raises:
    ValueError: If the rule is over classes and the student predicts numbers, or if it
      wraps a rule that keeps a state.
  """
  inner = rule
  while isinstance(inner, WrappedRule):
    inner = inner.rule
    if inner.keeps_state:
      raise ValueError(
          f'{inner!r} keeps a state from round to round, so it must be the outermost '
          f'consensus rule, found {rule!r}. Let it wrap the others.'
      )
  if rule.needs_classes:
    models.check_has_classes(student, f'The consensus {type(rule).__name__}')


@dataclasses.dataclass(frozen=True)
class MeanLogits(ConsensusRule):
  """sum_k w_k z_k(x) / sum_k w_k over those who predicted x.

  Source: Lin et al., "Ensemble Distillation for Robust Model Fusion in Federated
  Learning" (FedDF, NeurIPS 2020), equation 2 (there with equal weights).
  """

  has_unit_weights = True
  needs_classes = False

  def encode(self, logits):
    return payload_lib.payload_of(logits, tf.ones(tf.shape(logits)[:1]))

  def decode(self, mean_payload):
    return payload_lib.consensus_of(*payload_lib.mean_of(mean_payload))


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
    return payload_lib.payload_of(
        payload_lib.probabilities(logits), tf.ones(tf.shape(logits)[:1])
    )

  def decode(self, mean_payload):
    mean, weights = payload_lib.mean_of(mean_payload)
    if self.temperature is not None:
      # As logits: softmax (or sigmoid, of a single one) of them is ERA.
      logits = (2.0 * mean - 1.0 if mean.shape[-1] == 1 else mean) / self.temperature
    else:
      logits = self.power * losses.logits_from_probabilities(mean)
    return payload_lib.consensus_of(logits, weights)


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
    average: The values that are averaged, 'logits' or 'probabilities' (as FedAUX does:
      Sattler et al., "FedAUX: Leveraging Unlabeled Auxiliary Data in Federated
      Learning", 2021).
    temperature: T of the probabilities softmax(z / T) of which 'confidence' and
      'entropy' are taken. Above 1, predictions that are all but certain still differ.
  """

  certainty: Union[str, Callable[[tf.Tensor], tf.Tensor]] = 'variance'
  average: str = 'logits'
  temperature: float = 1.0

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
    checks.check_temperature(self.temperature)
    if self.temperature != 1.0 and self.certainty not in ('confidence', 'entropy'):
      raise ValueError(
          "`temperature` is of the probabilities of 'confidence' and 'entropy', found "
          f'{self.temperature!r} with certainty={self.certainty!r}. Leave it at 1.'
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
      certainty = (score if callable(score) else _CERTAINTIES[score])(
          logits / self.temperature
      )
    # The mean over the positions of sequences.
    axes = list(range(1, certainty.shape.rank))
    values = logits if self.average == 'logits' else payload_lib.probabilities(logits)
    return payload_lib.payload_of(values, tf.reduce_mean(certainty, axis=axes))

  def decode(self, mean_payload):
    mean, weights = payload_lib.mean_of(mean_payload)
    if self.average == 'probabilities':
      mean = losses.logits_from_probabilities(mean)
    return payload_lib.consensus_of(mean, weights)


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
    return payload_lib.KnowledgePayload(
        values=tf.TensorSpec([num_rows, groups, groups], tf.float32),
        weights=tf.TensorSpec([num_rows, groups], tf.float32),
    )

  def encode(self, logits, certainty=None):
    values, weights = super().encode(logits, certainty)
    group = tf.one_hot(tf.argmax(values, axis=-1), values.shape[-1])
    return payload_lib.KnowledgePayload(
        values=group[..., tf.newaxis] * values[:, tf.newaxis, :],
        weights=group * weights[:, tf.newaxis],
    )

  def decode(self, mean_payload):
    values, weights = mean_payload

    def mean_over(groups: tf.Tensor) -> payload_lib.Consensus:
      kept = tf.math.multiply_no_nan(weights, groups)
      return super(CertaintyWithDiversity, self).decode(
          payload_lib.KnowledgePayload(
              tf.einsum('igc,ig->ic', values, groups), tf.reduce_sum(kept, axis=1)
          )
      )

    consensus = mean_over(tf.ones_like(weights))
    label = tf.argmax(consensus.logits, axis=-1)
    others = 1.0 - tf.one_hot(label, weights.shape[-1])
    return consensus._replace(diversity=mean_over(others))


def _entropy_certainty(logits: tf.Tensor) -> tf.Tensor:
  p = payload_lib.class_probabilities(logits)
  entropy = -tf.reduce_sum(tf.math.xlogy(p, p), axis=-1)
  # For equal probabilities, rounding may give a number below 0.
  return tf.maximum(1.0 - entropy / tf.math.log(float(p.shape[-1])), 0.0)


_CERTAINTIES = {
    'variance': lambda z: tf.math.reduce_variance(losses.two_classes(z), axis=-1),
    'confidence': lambda z: tf.reduce_max(payload_lib.class_probabilities(z), axis=-1),
    'entropy': _entropy_certainty,
}
