"""Exchanges of knowledge beside, or in place of, weights.

An `Exchange` says what a client uploads after its training, what the server sends back,
and how a client learns from that before its own examples. Clients learn what the server
sends back at the beginning of their next round, so that they compute once a round, also
where a paper's round has two phases.
"""

import abc
from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, NamedTuple, Optional

import tensorflow as tf

from tff_kd.client import class_counts
from tff_kd.client import companions
from tff_kd.client import local_terms as local_terms_lib
from tff_kd import communication
from tff_kd.data import transfer
from tff_kd import graphs
from tff_kd import knowledge
from tff_kd import losses
from tff_kd import models
from tff_kd.server import distill as server_distillation_lib


class Report(NamedTuple):
  """The inputs of a client's payload.

  Attributes:
    model: The trained student, a `BoundModel`.
    round_num: int32 scalar, the round in which the client reports.
    observed: The sums of `Exchange.observer`; () without one.
    covered: bool `[m]`, the rows of the round's transfer examples on which the client
      has predictions; `None`: all of them.
    certainty: (inputs) -> float32 `[batch]`, from a companion; `None` without one.
  """

  model: models.BoundModel
  round_num: tf.Tensor
  observed: Any
  covered: Optional[tf.Tensor] = None
  certainty: Optional[Callable[[Any], tf.Tensor]] = None


class Exchange(abc.ABC):
  """Knowledge that travels as a sum over clients.

  The smallest exchange defines `payload_spec` and `payload`: clients upload something
  that the server's distillation learns from. One that also sends something back defines
  `initial_shared`, `share` and `build_learning`.

  Attributes:
    sends_down: Whether the server sends something back.
    keeps_sent: Whether a client must remember what it sent last.
    needs_exact_sums: Whether every included client must count the same, unrounded.
    needs_server_model: Whether the server's model makes what goes down.
    transfer_set: The `TransferSet` of the exchange, or `None`.
    rule: The `ConsensusRule` of predictions on it, or `None`.
    digest: The `DistillationStage` by which a client learns from what comes down, or
      `None`.
  """

  sends_down: bool = False
  keeps_sent: bool = False
  needs_exact_sums: bool = False
  needs_server_model: bool = False
  transfer_set: Optional[transfer.TransferSet] = None
  rule: Optional[knowledge.ConsensusRule] = None
  digest: Optional[server_distillation_lib.DistillationStage] = None

  def with_inexact_sums(self) -> 'Exchange':
    """Returns this exchange for sums that are clipped, rounded or noised."""
    return self

  @abc.abstractmethod
  def payload_spec(self) -> knowledge.KnowledgePayload:
    """Returns the `tf.TensorSpec`s of what a client sends."""

  def zero_payload(self) -> knowledge.KnowledgePayload:
    """Returns what an excluded client sends."""
    return tf.nest.map_structure(
        lambda spec: tf.zeros(spec.shape, spec.dtype), self.payload_spec()
    )

  @abc.abstractmethod
  def payload(self, report: Report) -> knowledge.KnowledgePayload:
    """Returns what a client sends after its training.

    Args:
      report: The inputs of the payload.
    """

  def initial_shared(self) -> Any:
    """Returns what the server sends in the first round, a structure of tensors."""
    return ()

  def share(
      self,
      mean_payload: knowledge.KnowledgePayload,
      num_included: Optional[tf.Tensor],
      server_model: Optional[models.BoundModel],
      round_num: tf.Tensor,
  ) -> Any:
    """Returns what the server sends to clients in the next round.

    Args:
      mean_payload: The clients' payloads as aggregated.
      num_included: float32 scalar, the number of included clients; `None` under
        differential privacy, where nothing that is sent may tell it.
      server_model: The server's model after its distillation; `None` unless
        `needs_server_model`.
      round_num: int32 scalar, the round that ends.

    Returns:
      A structure of tensors, of the type of `initial_shared`.
    """
    del mean_payload, num_included, server_model, round_num
    return ()

  def build_learning(
      self, student: models.ModelSpec
  ) -> Optional[Callable[..., 'Learned']]:
    """Builds the function by which a client learns from what was shared.

    Args:
      student: The client's model.

    Returns:
      (weights, broadcast, client_state) -> `Learned`, called before the training on the
      client's own examples; `None` if a client learns nothing.
    """
    del student
    return None

  def observer(self, student: models.ModelSpec) -> Optional[companions.Observer]:
    """Returns what to sum over the local steps, or `None`.

    Args:
      student: The client's model.
    """
    del student
    return None

  def message_bits(
      self, payload: knowledge.KnowledgePayload, client_state: companions.ClientState
  ) -> Optional[tf.Tensor]:
    """Returns the encoded length of a payload.

    Args:
      payload: What the client sends.
      client_state: The client's state, with what it sent last.

    Returns:
      An int64 scalar, in bits; `None` if payloads are not encoded.
    """
    del payload, client_state
    return None

  def coded_bytes(self) -> communication.CodedBytes:
    """Returns the sizes of the messages that are encoded."""
    return communication.CodedBytes()


def has_reports(
    mean_payload: knowledge.KnowledgePayload, num_included: Optional[tf.Tensor]
) -> tf.Tensor:
  """Returns whether there is anything to share, a bool scalar.

  Args:
    mean_payload: The clients' payloads as aggregated.
    num_included: float32 scalar, the number of included clients, more than 0 if there
      is. If `None`, the number is secret: a noised mean is shared, whoever is in it, if
      it is finite.
  """
  if num_included is None:
    return graphs.all_finite(mean_payload)
  return num_included > 0.0


class Learned(NamedTuple):
  """The result of a client's learning from what was shared.

  Attributes:
    weights: The `ModelWeights` with which its own training begins.
    terms: Terms of its loss, a sequence of `LocalTerm`s.
    has_learned: bool scalar, whether there was anything to learn.
  """

  weights: Any
  terms: tuple[local_terms_lib.LocalTerm, ...] = ()
  has_learned: Any = False


class TransferPredictions(Exchange):
  """Uploads predictions on the transfer set, from which the server distils."""

  def __init__(
      self,
      student: models.ModelSpec,
      transfer_set: transfer.TransferSet,
      rule: knowledge.ConsensusRule,
  ):
    """Initializes the exchange.

    Args:
      student: The clients' model.
      transfer_set: The examples on which clients predict.
      rule: How the predictions become the consensus.

    Raises:
      ValueError: If the rule does not fit the model's outputs.
    """
    knowledge.check_rule(rule, student)
    self.transfer_set, self.rule = transfer_set, rule
    self._shape = (
        knowledge.logits_shape(student, transfer_set), transfer_set.num_predictions
    )

  def payload_spec(self):
    return self.rule.payload_spec(*self._shape)

  def zero_payload(self):
    return self.rule.zero_payload(*self._shape)

  def payload(self, report):
    ids = self.transfer_set.prediction_ids(report.round_num)
    logits = knowledge.predict_logits(report.model, self.transfer_set, ids)
    if report.covered is not None:
      logits = knowledge.without_rows(logits, report.covered)
    if not self.rule.needs_certainty:
      return self.rule.encode(logits)
    return self.rule.encode(
        logits, self.transfer_set.map_inputs(report.certainty, ids)
    )

  def message_bits(self, payload, client_state):
    return self.rule.message_bits(payload) if self.rule.is_coded else None

  def coded_bytes(self):
    return communication.CodedBytes(knowledge=self._first_message_bytes(self.rule))

  def _first_message_bytes(
      self, rule: Optional[knowledge.ConsensusRule]
  ) -> Optional[int]:
    if rule is None or not rule.is_coded:
      return None
    return rule.first_message_bytes(*self._shape)


def for_stages(
    stages: Sequence[server_distillation_lib.DistillationStage],
    student: models.ModelSpec,
    transfer_set: transfer.TransferSet,
    rule: Optional[knowledge.ConsensusRule],
    default: Optional[knowledge.ConsensusRule] = None,
) -> Optional[TransferPredictions]:
  """Returns the exchange that the server's distillation needs, `None` if it needs none.

  Args:
    stages: The server's distillation.
    student: The clients' model.
    transfer_set: The examples on which clients predict.
    rule: How the predictions become the consensus; `None` for the default.
    default: The rule if none is given; `knowledge.MeanLogits()` if `None`.

  Raises:
    ValueError: If there is a rule and nothing that it could combine.
  """
  if any(stage.uses_ensemble for stage in stages):
    rule = rule or default or knowledge.MeanLogits()
    return TransferPredictions(student, transfer_set, rule)
  if rule is not None:
    raise ValueError(
        'There are no predictions for `consensus_rule` to combine: no stage distils from '
        f"the ensemble. Leave it out, or take target='ensemble', found {rule!r}."
    )
  return None


class TransferExchange(TransferPredictions):
  """Uploads predictions on the transfer set, and sends labels for it down.

  Coded predictions (`knowledge.CodedRule`) are encoded as changes of those that the
  client sent last, which it keeps for that, if the transfer set has the same rows in
  every round (no `subset_size`); else each message is encoded by itself.
  """

  sends_down = True

  def __init__(
      self,
      student: models.ModelSpec,
      transfer_set: transfer.TransferSet,
      rule: knowledge.ConsensusRule,
      digest: server_distillation_lib.DistillationStage,
      seed: int = 0,
      relabelling: Optional[knowledge.ConsensusRule] = None,
  ):
    """Initializes the exchange.

    Args:
      student: The clients' model.
      transfer_set: The examples on which clients predict.
      rule: How the predictions become the consensus.
      digest: How a client's model learns from what comes down.
      seed: With the round number, decides the order of the examples.
      relabelling: A rule by which the server's model labels the transfer set; the
        consensus of the clients goes down if `None`.

    Raises:
      TypeError, ValueError: If the parts do not fit together.
    """
    super().__init__(student, transfer_set, rule)
    check_stage(digest, transfer_set, rule)
    self.digest, self._seed, self._relabelling = digest, seed, relabelling
    self.needs_server_model = relabelling is not None
    self.keeps_sent = rule.codes_changes and transfer_set.is_same_every_round

  def initial_shared(self):
    return self.rule.decode(self.zero_payload())._replace(diversity=())

  def share(self, mean_payload, num_included, server_model, round_num):
    if self._relabelling is None:
      # The factor of the mean cancels. Clients have no use for the diversity.
      return self.rule.decode(mean_payload)._replace(diversity=())
    logits = knowledge.predict_logits(
        server_model, self.transfer_set, self.transfer_set.prediction_ids(round_num)
    )
    labels = self._relabelling.decode(self._relabelling.encode(logits))
    # Without any client there is nothing new to learn.
    mask = tf.where(has_reports(mean_payload, num_included), labels.mask, 0.0)
    return labels._replace(mask=mask, diversity=())

  def build_learning(self, student):
    lesson = server_distillation_lib.Lesson(self.digest, student, self.transfer_set)

    def learn(weights, broadcast, client_state):
      del client_state
      consensus = knowledge.Consensus(broadcast.shared.logits, broadcast.shared.mask)
      # The rows of the round in which the consensus was made.
      shared_round = tf.maximum(broadcast.shared_round, 0)
      learned = lesson(
          weights, None, {}, consensus, shared_round, tf.constant([self._seed, 1])
      )
      return Learned(
          learned.weights, has_learned=learned.has_learned
      )

    return learn

  def message_bits(self, payload, client_state):
    alone = super().message_bits(payload, client_state)
    if not self.keeps_sent:
      return alone
    return tf.where(
        client_state.sent_round < 0,
        alone,
        self.rule.message_bits(payload, client_state.sent),
    )

  def coded_bytes(self):
    return super().coded_bytes()._replace(
        shared=self._first_message_bytes(self._relabelling)
    )


def check_stage(
    stage: server_distillation_lib.DistillationStage,
    transfer_set: transfer.TransferSet,
    rule: Optional[knowledge.ConsensusRule],
) -> None:
  """Raises an error if clients cannot learn from a consensus in this way.

  A client learns from the consensus alone: it has no other model beside its own, what
  comes down has no diversity, and every round's consensus is made anew.

  Args:
    stage: The lesson of a client.
    transfer_set: The examples of the consensus.
    rule: How the predictions become the consensus, or `None`.

  Raises:
    TypeError: If the stage's optimizer is not one.
    ValueError: If the stage lacks something it needs, or has or needs something that
      does not come down to clients.
  """
  if rule is not None and rule.needs_certainty:
    raise ValueError(
        f'The rule {rule!r} weighs by a certainty that is given, which clients that '
        'keep their models do not have. Take a rule that weighs by the predictions, '
        "such as CertaintyWeighted('variance')."
    )
  if rule is not None and rule.needs_average:
    raise ValueError(
        f'The rule {rule!r} takes what the averaged student predicts, and where clients '
        "keep their models nothing is averaged. Take a `prior` of 'uniform', 'em' or "
        'given probabilities.'
    )
  if rule is not None and rule.keeps_state:
    raise ValueError(
        f'The rule {rule!r} keeps a state from round to round, and the consensus that '
        'clients learn from is made by `decode`, without a state. Take a rule that keeps '
        'none.'
    )
  d = stage.distillation
  if not isinstance(d.target, str):
    raise ValueError(
        'Clients that learn from the consensus have no other model to blend it with: '
        f"the distillation's `target` must be 'ensemble', found {d.target!r}."
    )
  if d.diversity_weight:
    raise ValueError(
        'The diversity of the consensus is not sent to clients, which learn from the '
        f'consensus alone: leave `diversity_weight` at 0, found {d.diversity_weight!r}.'
    )
  stage.check(
      transfer_set,
      has_teacher=False,
      has_diversity=rule is not None and rule.has_diversity,
  )


class SumsByClass(Exchange):
  """Sums of vectors by class, with the classes' counts; their quotients teach clients.

  A client adds up a vector for each of its predictions while it trains. In the next
  round, each class's mean vector is the target of a term of the clients' loss. Values
  and counts are both sums over clients, so no client's own means are seen. A class that
  no client of the last round had has no target.

  Subclasses set `keeps_sent` and `needs_exact_sums` if a client's own part is to be taken
  out of its targets; that needs the exact sums.
  """

  sends_down = True

  def __init__(self, num_classes: int, size: int):
    """Initializes the exchange.

    Args:
      num_classes: The number of classes.
      size: The length of the vectors.
    """
    self._shape = num_classes, size

  @abc.abstractmethod
  def vectors(
      self, student: models.ModelSpec, step: local_terms_lib.LocalStep
  ) -> tf.Tensor:
    """Returns what is added up by class, float32 `[predictions, size]`.

    Args:
      student: The client's model.
      step: The step of the local training.
    """

  @abc.abstractmethod
  def term(
      self, student: models.ModelSpec, means: tf.Tensor, is_known: tf.Tensor
  ) -> local_terms_lib.LocalTerm:
    """Returns the term by which a client learns.

    Args:
      student: The client's model.
      means: float32 `[classes, size]`, the mean vectors; 0 where there is none.
      is_known: float32 `[classes]`, 1 where a class has a mean vector, else 0.
    """

  def payload_spec(self):
    return knowledge.KnowledgePayload(
        values=tf.TensorSpec(self._shape, tf.float32),
        weights=tf.TensorSpec(self._shape[:1], tf.float32),
    )

  def initial_shared(self):
    return self.zero_payload()

  def share(self, mean_payload, num_included, server_model, round_num):
    # The number of clients cancels in a mean, but a client can take its own part out of
    # sums only.
    factor = num_included if self.needs_exact_sums else 1.0
    has_any = has_reports(mean_payload, num_included)
    # Without any client the mean is NaN.
    return tf.nest.map_structure(
        lambda t: tf.where(has_any, t * factor, 0.0), mean_payload
    )

  def build_learning(self, student):

    def learn(weights, broadcast, client_state):
      values, counts = broadcast.shared
      min_count = 0.0
      if self.keeps_sent:
        # Before the first round both are -1, and the client has sent nothing.
        is_in = tf.equal(client_state.sent_round, broadcast.shared_round)
        own = tf.cast(is_in, tf.float32)
        values -= own * client_state.sent.values
        counts -= own * client_state.sent.weights
        min_count = 0.5  # They are whole numbers, give or take rounding.
      is_known = counts > min_count
      means = tf.math.divide_no_nan(
          values, tf.where(is_known, counts, 0.0)[:, tf.newaxis]
      )
      term = self.term(student, means, tf.cast(is_known, tf.float32))
      return Learned(weights, (term,), tf.reduce_any(is_known))

    return learn

  def observer(self, student):

    def observe(step):
      one_hot = step.one_hot_labels()
      return knowledge.KnowledgePayload(
          values=tf.matmul(one_hot, self.vectors(student, step), transpose_a=True),
          weights=tf.reduce_sum(one_hot, axis=0),
      )

    return companions.Observer(zero=self.zero_payload, observe=observe)

  def payload(self, report):
    return report.observed


class ClassExchange(SumsByClass):
  """Exchanges each class's mean logits, without a client's own part in its target.

  Source: Jeong et al., "Communication-Efficient On-Device Machine Learning: Federated
  Distillation and Augmentation under Non-IID Private Data" (2018), Algorithm 1.
  """

  def __init__(
      self, student: models.ModelSpec, weight: float, *, leaves_own_out: bool = True
  ):
    """Initializes the exchange.

    Args:
      student: The clients' model; one prediction an example or a position.
      weight: The weight of the distillation term in the clients' loss.
      leaves_own_out: Whether a client's own part is taken out of its target, as in the
        paper; that needs the exact sums.

    Raises:
      ValueError: If the weight is not above 0, or there are no classes to tell apart.
    """
    local_terms_lib.check_weight('regularizer_weight', weight)
    class_counts.check_indices(student, 'Knowledge by class')
    super().__init__(student.logits_shape[-1], student.logits_shape[-1])
    self._student, self._weight = student, weight
    self.keeps_sent = self.needs_exact_sums = leaves_own_out

  def with_inexact_sums(self):
    # No client can take its own part out of such sums.
    return ClassExchange(self._student, self._weight, leaves_own_out=False)

  def vectors(self, student, step):
    return tf.reshape(step.logits, [-1, student.logits_shape[-1]])

  def term(self, student, means, is_known):
    return _ClassTargets(self._weight, means, is_known)


@dataclasses.dataclass(frozen=True, eq=False)
class _ClassTargets(local_terms_lib.LocalTerm):
  """L + weight CE(softmax(the label's class's target), z)."""

  weight: float
  targets: tf.Tensor
  mask: tf.Tensor

  def __call__(self, loss, step):
    labels = tf.cast(step.labels, tf.int32)
    if labels.shape.rank == step.logits.shape.rank:
      labels = tf.squeeze(labels, axis=-1)
    if step.counted is not None:
      counted = losses.with_rank(step.counted, labels.shape.rank)
      labels = tf.where(counted > 0.0, labels, 0)
    each = losses.soft_target_cross_entropy(
        tf.nn.softmax(tf.gather(self.targets, labels)), step.logits
    )
    # The mean is over all labels that count; one without a target adds nothing.
    return loss + self.weight * step.mean(each * tf.gather(self.mask, labels))
