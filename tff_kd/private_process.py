"""Clients that keep something for themselves: knowledge travels, weights do not.

```
 state -> what was shared -> learning from it -> local training -> payload -> mean
             each client's own state, in and out           |                   |
                                                 server_distillation   what is shared next
```

A client keeps its model, unless it begins every round anew (`keeps_models=False`).
An `Exchange` says what travels and how clients learn from it. A round of this process
ends where the papers' ends in the middle: what a round leaves is learned at the beginning
of the client's next one, so that a client computes once a round.
"""

import abc
import collections
from collections.abc import Callable
from typing import Any, NamedTuple, Optional, Union

import numpy as np
import tensorflow as tf
from tff_kd.compat import tff

from tff_kd import aggregation
from tff_kd import client_data as client_data_lib
from tff_kd import client_work as client_work_lib
from tff_kd import cohorts
from tff_kd import companions
from tff_kd import conditions as conditions_lib
from tff_kd import graphs
from tff_kd import knowledge
from tff_kd import local_terms as local_terms_lib
from tff_kd import local_training
from tff_kd import losses
from tff_kd import models
from tff_kd import optimizers
from tff_kd import process
from tff_kd import server_distillation as server_distillation_lib
from tff_kd import transfer
from tff_kd.privacy import differential
from tff_kd.privacy import secure as secure_lib


class PrivateState(NamedTuple):
  """The server's state.

  Attributes:
    global_model_weights: The server's `ModelWeights`, or () without a server model.
    shared: What the last round's `Exchange` left for clients.
    shared_round: int32, the round that left it, -1 before the first.
    round_num: int32, the number of finished rounds.
    client_work: The client optimizer's hyperparameters.
    aggregator: The state of the predictions' aggregator.
    server_distillation: The state of the server model's optimizer.
    broadcasts: What was sent in the last rounds, where clients may be late; else ().
  """

  global_model_weights: Any
  shared: Any
  shared_round: Any
  round_num: Any
  client_work: Any
  aggregator: Any
  server_distillation: Any
  broadcasts: Any


class PrivateBroadcast(NamedTuple):
  """What goes down to a client.

  Attributes:
    shared: What the last round's `Exchange` left.
    shared_round: int32 scalar, that round; -1 before the first.
    round_num: int32 scalar.
  """

  shared: Any
  shared_round: Any
  round_num: Any


class Exchange(abc.ABC):
  """What clients exchange in place of weights.

  Attributes:
    keeps_sent: Whether a client must know what it sent last.
    needs_equal_weights: Whether late clients must weigh as much as others.
    needs_server_model: Whether what goes down is made by the server's model.
    transfer_set: The `TransferSet` of the exchange, or `None`.
    rule: How predictions on it are combined, or `None`.
  """

  keeps_sent: bool = False
  needs_equal_weights: bool = False
  needs_server_model: bool = False
  transfer_set: Optional[transfer.TransferSet] = None
  rule: Optional[knowledge.ConsensusRule] = None

  def with_inexact_sums(self) -> 'Exchange':
    """This exchange, where sums are clipped, rounded or noised."""
    return self

  @abc.abstractmethod
  def payload_spec(self) -> knowledge.KnowledgePayload:
    """The `tf.TensorSpec`s of what a client sends."""

  @abc.abstractmethod
  def initial_shared(self) -> Any:
    """What goes down in the first round, a structure of tensors."""

  @abc.abstractmethod
  def share(
      self,
      mean_payload: knowledge.KnowledgePayload,
      num_included: tf.Tensor,
      server_model: Optional[models.BoundModel],
      round_num: tf.Tensor,
  ) -> Any:
    """What goes down in the next round.

    Args:
      mean_payload: The clients' payloads as aggregated.
      num_included: float32 scalar, how many clients are in it.
      server_model: The server's, after it has learned from them; `None` unless
        `needs_server_model`.
      round_num: int32 scalar, of the round that ends.
    """

  @abc.abstractmethod
  def build_learning(self, student: models.ModelSpec) -> Callable[..., Any]:
    """How a client learns from what was shared.

    Args:
      student: The client's model.

    Returns:
      (weights, broadcast, client_state) -> (weights, local_terms, has_learned): runs
      before the client's own examples; the terms are added to their loss; a bool tensor.
    """

  def observer(self) -> Optional[companions.Observer]:
    """What to add up over the local steps."""
    return None

  @abc.abstractmethod
  def payload(
      self,
      model: models.BoundModel,
      round_num: tf.Tensor,
      observed: Any,
      covered: Optional[tf.Tensor],
  ) -> knowledge.KnowledgePayload:
    """What the client sends, after its training.

    Args:
      model: The client's.
      round_num: int32 scalar, the round in which it reports.
      observed: The observer's sums.
      covered: bool `[m]`, on which of the round's transfer examples it has predictions;
        `None`: on all.
    """

  def message_bits(
      self, payload: knowledge.KnowledgePayload, client_state: companions.ClientState
  ) -> Optional[tf.Tensor]:
    """How long the payload's code is, an int64 scalar; `None` if it is not coded."""
    return None

  def coded_bytes(self) -> process.CodedBytes:
    """The sizes of what is coded."""
    return process.CodedBytes()


class TransferExchange(Exchange):
  """Predictions on the transfer set up; the consensus on them down, to be digested.

  Quantised predictions (`knowledge.Quantized`) are coded against those that the client
  sent last, which it keeps for that, if the transfer set has the same rows in every
  round (no `subset_size`); else each message stands for itself.
  """

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
      digest: How a client's model learns from that.
      seed: With the round number, decides the order of the examples.
      relabelling: What goes down is then not the consensus, but what this rule makes of
        the predictions of the server's model alone.

    Raises:
      TypeError, ValueError: If the parts do not fit together.
    """
    process.check_transfer_set(transfer_set, student)
    _check_stage(digest, transfer_set, rule)
    knowledge.check_rule(rule, student)
    digest.distillation.check_outputs(student)
    self.transfer_set = transfer_set
    self.rule, self._digest, self._seed = rule, digest, seed
    self._relabelling = relabelling
    self._shape = student.logits_shape, transfer_set.num_predictions
    self.needs_server_model = relabelling is not None
    self.keeps_sent = (
        rule.is_coded and rule.codes_changes and transfer_set.is_same_every_round
    )

  def payload_spec(self):
    return self.rule.payload_spec(*self._shape)

  def initial_shared(self):
    nothing = self.rule.zero_payload(*self._shape)
    return self.rule.decode(nothing)._replace(diversity=())

  def share(self, mean_payload, num_included, server_model, round_num):
    if self._relabelling is None:
      # As ever, the factor cancels. Clients have no use for the diversity.
      return self.rule.decode(mean_payload)._replace(diversity=())
    own = self._relabelling.encode(self._predict(server_model, round_num))
    labels = self._relabelling.decode(own)
    # Without any client there is nothing new to learn.
    mask = tf.where(num_included > 0.0, labels.mask, 0.0)
    return labels._replace(mask=mask, diversity=())

  def build_learning(self, student):
    learn = server_distillation_lib.Lesson(self._digest, student, self.transfer_set)

    def run(weights, broadcast, client_state):
      del client_state
      consensus = knowledge.Consensus(
          broadcast.shared.logits, broadcast.shared.mask
      )
      # On the examples of the round that the consensus comes from.
      shared_round = tf.maximum(broadcast.shared_round, 0)
      learned = learn(
          weights, None, {}, consensus, shared_round, tf.constant([self._seed, 1])
      )
      return learned.weights, (), learned.measurements['num_steps'] > 0

    return run

  def payload(self, model, round_num, observed, covered):
    logits = self._predict(model, round_num)
    if covered is not None:
      logits = knowledge.without_rows(logits, covered)
    return self.rule.encode(logits)

  def _predict(self, model, round_num):
    return knowledge.predict_logits(
        model, self.transfer_set, self.transfer_set.prediction_ids(round_num)
    )

  def message_bits(self, payload, client_state):
    if not self.rule.is_coded:
      return None
    alone = self.rule.message_bits(payload)
    if not self.keeps_sent:
      return alone
    return tf.where(
        client_state.sent_round < 0,
        alone,
        self.rule.message_bits(payload, client_state.sent),
    )

  def coded_bytes(self):
    return process.CodedBytes(*(
        rule.first_message_bytes(*self._shape)
        if rule is not None and rule.is_coded else None
        for rule in (self._relabelling, self.rule)
    ))


def _check_stage(
    stage: server_distillation_lib.DistillationStage,
    transfer_set: transfer.TransferSet,
    rule: knowledge.ConsensusRule,
) -> None:
  if rule.needs_certainty:
    raise ValueError(
        f'The rule {rule!r} weighs by a certainty that is given, which clients that '
        'keep their models do not have. Take a rule that weighs by the predictions, '
        "such as CertaintyWeighted('variance')."
    )
  server_distillation_lib.check_stages(
      [stage],
      has_teacher=False,
      labelled=transfer_set.labelled,
      has_validation=transfer_set.validation_size > 0,
      has_diversity=rule.has_diversity,
  )


class ClassExchange(Exchange):
  """Each class's mean logits up and down; a client's own part is left out of its target.

  Source: Jeong et al., "Communication-Efficient On-Device Machine Learning: Federated
  Distillation and Augmentation under Non-IID Private Data" (2018), Algorithm 1.
  """

  def __init__(
      self, student: models.ModelSpec, weight: float, *, leaves_own_out: bool = True
  ):
    """Initializes the exchange.

    Args:
      student: The clients' model; one prediction an example or a position.
      weight: Of the distillation term in the clients' loss.
      leaves_own_out: Whether a client's own part is taken out of its target, as in the
        paper; that needs the exact sums.

    Raises:
      ValueError: If the weight is not above 0, or there are no classes to tell apart.
    """
    if not 0.0 < weight < float('inf'):
      raise ValueError(
          'The weight of the class knowledge must be finite and above 0, found '
          f'{weight!r}.'
      )
    self._classes, self._weight = student.logits_shape[-1], weight
    self._student = student
    self.keeps_sent = self.needs_equal_weights = leaves_own_out
    labels = tf.nest.flatten(models.split_batch(student.input_spec)[1])
    if (
        self._classes < 2
        or len(labels) != 1
        or not labels[0].dtype.is_integer
        or labels[0].shape.rank > len(student.logits_shape)
    ):
      raise ValueError(
          'Knowledge by class needs class indices as labels and two logits or more, '
          f'found labels {labels} and {self._classes} logits.'
      )

  def with_inexact_sums(self):
    # Of such sums nobody can take out its own part.
    return ClassExchange(self._student, self._weight, leaves_own_out=False)

  def payload_spec(self):
    return knowledge.KnowledgePayload(
        values=tf.TensorSpec([self._classes, self._classes], tf.float32),
        weights=tf.TensorSpec([self._classes], tf.float32),
    )

  def initial_shared(self):
    return tf.nest.map_structure(
        lambda spec: tf.zeros(spec.shape), self.payload_spec()
    )

  def share(self, mean_payload, num_included, server_model, round_num):
    if not self.keeps_sent:
      return mean_payload
    # Sums, so that a client can take its own part out again.
    # Without any client the mean is no number.
    return tf.nest.map_structure(
        lambda t: tf.math.multiply_no_nan(t, num_included), mean_payload
    )

  def build_learning(self, student):
    del student

    def run(weights, broadcast, client_state):
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
      mask = tf.cast(is_known, tf.float32)
      targets = tf.math.divide_no_nan(
          values, tf.where(is_known, counts, 0.0)[:, tf.newaxis]
      )
      term = _ClassTargets(self._weight, targets, mask)
      return weights, (term,), tf.reduce_any(mask > 0.0)

    return run

  def observer(self):
    def observe(logits, labels):
      one_hot = tf.one_hot(
          tf.reshape(tf.cast(labels, tf.int32), [-1]), self._classes
      )
      counted = self._student.counted_labels(labels)
      if counted is not None:  # What the loss ignores may be no class, or one.
        one_hot *= tf.reshape(counted, [-1, 1])
      flat = tf.reshape(logits, [-1, self._classes])
      return knowledge.KnowledgePayload(
          values=tf.matmul(one_hot, flat, transpose_a=True),
          weights=tf.reduce_sum(one_hot, axis=0),
      )

    return companions.Observer(
        zero=self.initial_shared,
        observe=observe,
    )

  def payload(self, model, round_num, observed, covered):
    return observed


class _ClassTargets(local_terms_lib.LocalTerm):
  """L + weight CE(softmax(the label's class's target), z)."""

  def __init__(self, weight: float, targets: tf.Tensor, mask: tf.Tensor):
    self._weight, self._targets, self._mask = weight, targets, mask

  def __call__(self, loss, step):
    labels = tf.cast(step.labels, tf.int32)
    if labels.shape.rank == step.logits.shape.rank:
      labels = tf.squeeze(labels, axis=-1)
    mask = tf.ones(tf.shape(labels))
    if step.counted is not None:
      mask = tf.reshape(step.counted, tf.shape(labels))
      labels = tf.where(mask > 0.0, labels, 0)
    each = losses.soft_target_cross_entropy(
        tf.nn.softmax(tf.gather(self._targets, labels)), step.logits
    )
    # Over the whole batch: an example without a target has no such loss.
    return loss + self._weight * tf.reduce_mean(
        each * mask * tf.gather(self._mask, labels)
    )


def build_private_process(
    student: Union[models.ModelSpec, cohorts.Students],
    *,
    client_optimizer: optimizers.Optimizer,
    exchange: Exchange,
    server_stage: Optional[server_distillation_lib.DistillationStage] = None,
    consensus_rule: knowledge.ConsensusRule = knowledge.MeanLogits(),
    pretraining: Optional[server_distillation_lib.DistillationStage] = None,
    client_data: Optional[client_data_lib.ClientBatches] = None,
    knowledge_weighting: tff.learning.ClientWeighting = (
        tff.learning.ClientWeighting.UNIFORM
    ),
    knowledge_aggregator: Optional[aggregation.AggregationFactory] = None,
    metrics_aggregator: Optional[Any] = None,
    keeps_models: bool = True,
    learning_rate_fn: Optional[client_work_lib.LearningRateFn] = None,
    reporting: Optional[conditions_lib.Reporting] = None,
    privacy: Optional[differential.DifferentialPrivacy] = None,
    secure_aggregation: Optional[secure_lib.SecureAggregation] = None,
    seed: int = 0,
) -> process.PrivateProcess:
  """Composes a round of clients that keep their models, or what they sent.

  Args:
    student: The model of each client, and of the server if it has one; or those of the
      cohorts, the first of which is the server's.
    client_optimizer: For the clients' own examples.
    exchange: What travels, and how clients learn from it.
    server_stage: How a server's model learns from the clients' predictions; there is
      none if `None`. Needs an exchange on a transfer set.
    consensus_rule: How the predictions become what that model learns.
    pretraining: How a new client's model, and the server's, learn from the transfer
      set's labels before the first round; not at all if `None`.
    client_data: Where and how clients read their examples; `next` then takes numbers.
      With cohorts, `next` takes {'cohort': number, 'data': dataset or number} a client.
    knowledge_weighting: A client's weight in what is exchanged.
    knowledge_aggregator: Aggregates that; the weighted mean if `None`.
    metrics_aggregator: As in `tff.learning.algorithms`.
    keeps_models: Whether a client goes on with its model of its last round; else it
      begins every round with the initial weights, and keeps none.
    learning_rate_fn: Maps a round's number, an int32 tensor from 0, to the clients'
      learning rate in it; needs a TFF optimizer.
    reporting: As of `build_distillation_process`.
    privacy: Likewise.
    secure_aggregation: Likewise.
    seed: With the round number, decides the order of the transfer examples.

  Returns:
    A `PrivateProcess`.

  Raises:
    TypeError, ValueError: If the parts do not fit together.
  """
  students = cohorts.as_students(student)
  student = students.first
  transfer_set = exchange.transfer_set
  if transfer_set is None and (server_stage or pretraining):
    raise ValueError('A server model and pretraining need a transfer set.')
  if exchange.needs_server_model and server_stage is None:
    raise ValueError(
        "What this exchange sends down is made by the server's model: give it a "
        '`server_stage`.'
    )
  if pretraining is not None and not keeps_models:
    raise ValueError(
        'Pretraining needs clients that keep their models: with `keeps_models=False` '
        'they begin every round with the initial weights.'
    )
  for stage in (server_stage, pretraining):
    if stage is not None:
      _check_stage(stage, transfer_set, consensus_rule)
  if client_data is not None:
    process.check_client_data(client_data, student)
  optimizers.check_optimizer(client_optimizer, 'client_optimizer')
  optimizers.check_learning_rate_fn(learning_rate_fn, client_optimizer)
  process.check_reporting(reporting, client_data)
  if exchange.needs_equal_weights:
    own_out = "This exchange leaves a client's own part out of a sum, so that all parts "
    if knowledge_aggregator is not None:
      raise ValueError(
          f'{own_out}must be in it as they are: `knowledge_aggregator` must be `None`, '
          f'found {knowledge_aggregator!r}.'
      )
    if knowledge_weighting is not tff.learning.ClientWeighting.UNIFORM:
      raise ValueError(
          f'{own_out}must weigh the same: `knowledge_weighting` must be '
          f'`tff.learning.ClientWeighting.UNIFORM`, found {knowledge_weighting}.'
      )
  if exchange.needs_equal_weights and reporting is not None:
    if reporting.max_delay and reporting.staleness_power:
      raise ValueError(
          "This exchange leaves a client's own part out of a sum, so that late clients "
          'must weigh as much as others: `staleness_power` must be 0, found '
          f'{reporting.staleness_power}.'
      )
  guard = process.Guard(('knowledge',), privacy, secure_aggregation)
  _, knowledge_aggregator = process.build_guarded_aggregators(
      guard,
      None,
      knowledge_aggregator,
      weightings=dict(knowledge_weighting=knowledge_weighting),
      metrics_aggregator=metrics_aggregator,
      rule=exchange.rule,
      num_predictions=transfer_set.num_predictions if transfer_set is not None else 1,
      has_cohorts=students.has_cohorts,
      reporting=reporting,
  )
  if privacy is not None or secure_aggregation is not None:
    exchange = exchange.with_inexact_sums()
  hparams = optimizers.initial_hparams(client_optimizer)
  payload_spec = exchange.payload_spec()
  payload_type = tff.types.tensorflow_to_type(payload_spec)

  def zero_payload() -> knowledge.KnowledgePayload:
    return tf.nest.map_structure(lambda s: tf.zeros(s.shape), payload_spec)

  @graphs.computation()
  def initial_shared():
    return exchange.initial_shared()

  def initial_weights_of(cohort: int) -> Any:
    """The weights of a new client of a cohort, in a trace."""
    spec = students.specs[cohort]
    weights = tf.nest.map_structure(tf.constant, spec.initial_weights)
    if pretraining is None:
      return weights
    # Labels only: no example has a target.
    nothing = consensus_rule.decode(
        consensus_rule.zero_payload(spec.logits_shape, transfer_set.num_predictions)
    )
    pretrain = server_distillation_lib.Lesson(pretraining, spec, transfer_set)
    return pretrain(
        weights, None, {}, nothing, tf.constant(0), tf.constant([seed, 2])
    ).weights

  @graphs.computation()
  def initial_server_weights():
    return initial_weights_of(0)

  def in_cohort(cohort: int, weights: Any) -> Any:
    """A cohort's weights at its place; arrays without entries for the others."""
    return students.pack([
        weights
        if i == cohort
        else tf.nest.map_structure(
            lambda w: tf.zeros([0] * len(w.shape), w.dtype), spec.initial_weights
        )
        for i, spec in enumerate(students.specs)
    ])

  @graphs.computation()
  def initialize_client():
    keeps = exchange.keeps_sent
    return students.pack([
        companions.ClientState(
            weights=in_cohort(i, initial_weights_of(i)) if keeps_models else (),
            sent=zero_payload() if keeps else (),
            sent_round=tf.constant(-1) if keeps else (),
        )
        for i in range(len(students.specs))
    ])

  broadcast_type = tff.to_type(
      PrivateBroadcast(
          shared=initial_shared.type_signature.result,
          shared_round=np.int32,
          round_num=np.int32,
      )
  )
  broadcasts = conditions_lib.BroadcastHistory(
      broadcast_type, reporting.max_delay if reporting is not None else 0
  )
  if client_data is not None:
    data_type = tff.TensorType(np.int32)
  else:
    data_type = tff.SequenceType(
        tff.types.tensorflow_to_type(student.input_spec)
    )
  data_type = conditions_lib.client_data_type(
      cohorts.client_data_type(students, data_type), reporting
  )
  client_state_type = initialize_client.type_signature.result
  if students.has_cohorts:
    # One type for all cohorts: arrays of any size.
    client_state_type = tff.to_type(
        companions.ClientState(
            weights=tff.types.tensorflow_to_type(
                tf.nest.map_structure(
                    lambda w: tf.TensorSpec([None] * np.ndim(w), w.dtype),
                    students.initial_weights if keeps_models else (),
                )
            ),
            sent=client_state_type[0].sent,
            sent_round=client_state_type[0].sent_round,
        )
    )

  @tff.federated_computation
  def initial_hparams():
    return tff.federated_value(hparams, tff.SERVER)

  hparams_type = initial_hparams.type_signature.result.member

  def build_update(cohort: int):
    """One client's round; returns a function of what the computation gets."""
    spec = students.specs[cohort]
    learn = exchange.build_learning(spec)
    train = local_training.LocalTraining(
        spec,
        client_optimizer,
        client_data,
        observer=exchange.observer(),
        learning_rate_fn=learning_rate_fn,
    )

    def client_update(client_hparams, sent, data, client_state, conditions):
      broadcast, step_share = sent, None
      if reporting is not None:
        conditions_lib.check_conditions(reporting, conditions)
        broadcast = broadcasts.received(sent, conditions.delay)
        step_share = conditions.step_share
      before = tf.nest.map_structure(tf.constant, spec.initial_weights)
      if keeps_models:
        before = tf.nest.map_structure(
            lambda its, w: tf.ensure_shape(its, np.shape(w)),
            students.unpack(client_state.weights)[cohort],
            spec.initial_weights,
        )
      taught, local_terms, has_learned = learn(before, broadcast, client_state)
      draws = local_training.client_seed(
          seed, broadcast.round_num, data if client_data is not None else None
      )
      trained = train(
          data,
          local_training.Start(
              values=spec.values(taught, draws),
              received=(),
              terms=local_terms,
              targets={},
              companion=companions.CompanionValues(),
              hparams=client_hparams,
              round_num=broadcast.round_num,
              step_share=step_share,
          ),
      )
      num_examples, bad_labels = trained.num_examples, trained.bad_labels
      after = trained.values.weights
      finite = graphs.all_finite(after)
      is_empty = tf.equal(num_examples, 0)
      valid = finite & ~is_empty & ~bad_labels
      included, covered = valid, None
      round_num = broadcast.round_num
      counts = collections.OrderedDict()
      if reporting is not None:
        included = valid & conditions.reports
        round_num = broadcasts.current(sent).round_num
        counts = conditions_lib.condition_counts(conditions, valid)
        if transfer_set is not None:
          covered = conditions_lib.covered_rows(
              transfer_set, conditions, broadcast.round_num, round_num
          )
      weight = client_work_lib.client_weight(
          knowledge_weighting, num_examples, included
      )
      if reporting is not None:
        weight *= reporting.weight(conditions.delay)
      payload = tf.cond(
          included,
          lambda: exchange.payload(
              models.BoundModel(spec, trained.values),
              round_num,
              trained.observed,
              covered,
          ),
          zero_payload,
      )
      factor = 1.0 if knowledge_aggregator is not None else weight
      kept = ()
      if keeps_models:
        kept = in_cohort(
            cohort,
            tf.nest.map_structure(
                lambda new, old: tf.where(valid, new, old), after, before
            ),
        )
      last_sent, sent_round = (), ()
      if exchange.keeps_sent:
        # What was lost on the way is in no sum.
        last_sent = tf.nest.map_structure(
            lambda new, old: tf.where(included, new, old), payload, client_state.sent
        )
        sent_round = tf.where(included, round_num, client_state.sent_round)
      counts = collections.OrderedDict(
          client_work_lib.participation(included, is_empty, bad_labels, finite),
          num_taught=tf.cast(has_learned, tf.int32),
          **counts,
      )
      if privacy is not None:
        counts = client_work_lib.public_participation()
      bits = exchange.message_bits(payload, client_state)
      if bits is not None:
        counts['knowledge_bits'] = tf.where(included, bits, tf.zeros_like(bits))
      metrics = ()
      if privacy is None:
        metrics = client_work_lib.reported_metrics(spec, trained, included)
      output = client_work_lib.ClientOutput(
          update=client_work_lib.ClientUpdate(
              model=(),
              knowledge=tf.nest.map_structure(lambda t: t * factor, payload),
          ),
          weight=client_work_lib.ClientUpdate(model=(), knowledge=weight),
          metrics=metrics,
          participation=counts,
      )
      return output, companions.ClientState(kept, last_sent, sent_round)

    return client_update

  updates = [build_update(i) for i in range(len(students.specs))]

  @graphs.computation(
      hparams_type, broadcasts.sent_type, data_type, client_state_type
  )
  def client_computation(client_hparams, sent, client, client_state):
    return students.run_client(
        client,
        updates,
        (client_hparams, sent),
        client_state,
        has_conditions=reporting is not None,
    )

  output_type, _ = client_computation.type_signature.result
  metric_finalizers = collections.OrderedDict()
  if privacy is None:
    metric_finalizers = student.metrics.finalizers()
  aggregator, aggregated_bytes = aggregation.build_client_output_aggregator(
      output_type,
      metric_finalizers,
      knowledge_factory=knowledge_aggregator,
      metrics_aggregator=metrics_aggregator,
      secure=secure_aggregation,
  )
  server_distillation = None
  if server_stage is not None:
    server_distillation = server_distillation_lib.build_server_distillation(
        cohorts.as_students(student),  # The server's is of the first cohort.
        None,
        transfer_set,
        [server_stage],
        consensus_rule=consensus_rule,
        seed=seed,
    )

  needs_model = exchange.needs_server_model

  @graphs.computation(
      payload_type,
      np.int32,
      student.weights_type if needs_model else tff.to_type(()),
      np.int32,
  )
  def share(mean_payload, num_included, server_weights, round_num):
    server_model = None
    if needs_model:
      server_model = models.BoundModel(student, student.values(server_weights))
    return exchange.share(
        knowledge.KnowledgePayload(mean_payload.values, mean_payload.weights),
        tf.cast(num_included, tf.float32),
        server_model,
        round_num,
    )

  @graphs.computation(np.int32)
  def add_one(x):
    return x + 1

  @tff.federated_computation
  def init_fn():
    nothing = tff.federated_value((), tff.SERVER)
    return tff.federated_zip(
        PrivateState(
            global_model_weights=(
                tff.federated_eval(initial_server_weights, tff.SERVER)
                if server_stage is not None else nothing
            ),
            shared=tff.federated_eval(initial_shared, tff.SERVER),
            shared_round=tff.federated_value(np.int32(-1), tff.SERVER),
            round_num=tff.federated_value(np.int32(0), tff.SERVER),
            client_work=initial_hparams(),
            aggregator=aggregator.initialize(),
            server_distillation=(
                server_distillation.initialize()
                if server_stage is not None else nothing
            ),
            broadcasts=tff.federated_eval(broadcasts.initial, tff.SERVER),
        )
    )

  state_type = init_fn.type_signature.result
  keep_or_skip = None
  if reporting is not None and reporting.min_reports:
    keep_or_skip = process.build_skipping(
        state_type.member, reporting.min_reports, ('round_num', 'broadcasts')
    )

  @tff.federated_computation(
      state_type,
      tff.FederatedType(data_type, tff.CLIENTS),
      tff.FederatedType(client_state_type, tff.CLIENTS),
  )
  def next_fn(state, client_data, client_states):
    nothing = tff.federated_value((), tff.SERVER)
    sent = tff.federated_zip(
        PrivateBroadcast(
            shared=state.shared,
            shared_round=state.shared_round,
            round_num=state.round_num,
        )
    )
    new_broadcasts = nothing
    if broadcasts.max_delay:
      new_broadcasts, sent = tff.federated_map(
          broadcasts.push, (state.broadcasts, sent)
      )
    output, new_client_states = tff.federated_map(
        client_computation,
        (
            tff.federated_broadcast(state.client_work),
            tff.federated_broadcast(sent),
            client_data,
            client_states,
        ),
    )
    aggregated = aggregator.next(state.aggregator, output)
    weights, distillation_state = state.global_model_weights, nothing
    distillation_metrics = nothing
    if server_stage is not None:
      distilled = server_distillation.next(
          state.server_distillation,
          tff.federated_zip(
              server_distillation_lib.ServerModels(student=weights, teacher=nothing)
          ),
          aggregated.result.knowledge,
          state.round_num,
      )
      weights = distilled.result.student
      distillation_state = distilled.state
      distillation_metrics = distilled.measurements
    new_state = tff.federated_zip(
        PrivateState(
            global_model_weights=weights,
            shared=tff.federated_map(
                share,
                (
                    aggregated.result.knowledge,
                    aggregated.measurements.client_work['participation'][
                        'num_included'
                    ],
                    weights if needs_model else nothing,
                    state.round_num,
                ),
            ),
            shared_round=state.round_num,
            round_num=tff.federated_map(add_one, state.round_num),
            client_work=state.client_work,
            aggregator=aggregated.state,
            server_distillation=distillation_state,
            broadcasts=new_broadcasts,
        )
    )
    skipped = nothing
    if keep_or_skip is not None:
      participation = aggregated.measurements.client_work['participation']
      new_state, skipped = tff.federated_map(
          keep_or_skip, (state, new_state, participation['num_included'])
      )
    metrics = tff.federated_zip(
        collections.OrderedDict(
            client_work=(
                aggregated.measurements.client_work if privacy is None else nothing
            ),
            aggregator=aggregated.measurements.aggregator,
            server_distillation=distillation_metrics,
            round_skipped=skipped,
        )
    )
    return process.PrivateOutput(new_state, new_client_states, metrics)

  get_model_weights = None
  if server_stage is not None:

    @tff.federated_computation(state_type.member)
    def get_model_weights(state):
      return state.global_model_weights

  return process.PrivateProcess(
      init_fn,
      next_fn,
      initialize_client_fn=initialize_client,
      clients=students if keeps_models else None,
      get_model_weights_fn=get_model_weights,
      broadcast_type=broadcast_type,
      update_type=output_type.update,
      students=(
          cohorts.as_students(student) if server_stage is not None else students
      ),
      transfer_set=transfer_set,
      client_data=client_data,
      coded_bytes=exchange.coded_bytes(),
      aggregated_bytes=aggregated_bytes,
      guard=guard,
  )
