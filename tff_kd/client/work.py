"""A client's part of a round, whatever the algorithm.

A client begins with the student that it received, with its own model or with the initial
weights, learns from what was shared, trains on its examples, and leaves a
`ClientOutput`, every part of which is summed over clients, and what it keeps.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple, Optional

import numpy as np
import tensorflow as tf
from tff_kd.compat import tff

from tff_kd.client import companions
from tff_kd.client import conditions as conditions_lib
from tff_kd.client import exchanges
from tff_kd.client import inclusion
from tff_kd.client import local_terms as local_terms_lib
from tff_kd.client import local_training
from tff_kd.data import client_data as client_data_lib
from tff_kd.data import raw_files
from tff_kd import graphs
from tff_kd import knowledge
from tff_kd import models
from tff_kd.models import cohorts
from tff_kd.models import personal as personal_lib
from tff_kd import optimizers
from tff_kd.server import distill


class Broadcast(NamedTuple):
  """The server's broadcast to each client; parts that are not needed are ().

  Attributes:
    student: The `ModelWeights` of the global student; with cohorts a tuple, of which a
      client needs its own.
    teacher: The teacher's `ModelWeights`, where clients learn from it.
    student_history: The mean of the last global students, as `student`.
    shared: The result of the last round's exchange.
    shared_round: int32 scalar, that round; -1 before the first.
    round_num: int32 scalar; with the seeds, decides the round's transfer examples and
      the order of a client's own.
    companion: The broadcast of the companion's server part.
  """

  student: Any
  teacher: Any
  student_history: Any
  shared: Any
  shared_round: Any
  round_num: Any
  companion: Any


class ClientUpdate(NamedTuple):
  """A client's upload, or the weights of the two channels.

  Attributes:
    model: A `ModelWeights` of changes (received minus trained), of weights and of
      statistics; with cohorts a tuple, with zeros for the others. () where weights stay
      at clients. As a weight: a float32 scalar, or () as above.
    knowledge: A `knowledge.KnowledgePayload`, or () without that channel. As a
      weight: a float32 scalar or ().
  """

  model: Any
  knowledge: Any


class ClientOutput(NamedTuple):
  """All that a client sends; every part of it is summed over clients.

  Attributes:
    update: A `ClientUpdate`.
    weight: A `ClientUpdate` of float32 scalars, the weight in each channel.
    metrics: The model's unfinalized metrics.
    participation: Counts, see `inclusion.Inclusion`; with an exchange that teaches
      clients also `num_taught`, and with encoded payloads `knowledge_bits`.
  """

  update: ClientUpdate
  weight: ClientUpdate
  metrics: Any
  participation: Any


class ClientLeft(NamedTuple):
  """The part of a round's result that stays at the client and is not summed.

  Attributes:
    client_state: For the client's next round.
    exchanged: For `Companion.exchange`.
  """

  client_state: Any
  exchanged: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientPlan:
  """The plan of the clients' part of a round.

  Attributes:
    students: The model to train, or those of the cohorts.
    optimizer: A TFF optimizer or a function that returns a Keras one; fresh for every
      client and round.
    receives_student: Whether a client begins with the server's student, and sends back
      its change.
    keeps_model: Whether a client begins with its own model of its last round. If neither
      of the two holds, it begins with the initial weights; if both do, only the
      `personal` layers are its own.
    personal: By cohort, the layers that are not received and not sent; none if empty.
    weightings: A client's weight in each channel, a `ClientUpdate` of
      `ClientWeighting`s.
    applies_weight: By channel, whether the client multiplies its update by its weight
      itself (a computation of its own for that would take longer than the product); a
      `ClientUpdate` of bools.
    client_data: Where clients read their examples, if not from datasets in memory.
    exchange: The exchange beside, or in place of, weights.
    teacher: The teacher, if it is the target of a term.
    local_terms: Further terms of the local loss.
    companion: An auxiliary component of the training; its terms come after those.
    pretraining: How a new client's kept model learns from the transfer set's labels.
    learning_rate_fn: The optimizer's rate in a round, int32 from 0; constant if `None`.
    reporting: Policy for late, partial or insufficient reports; clients then come with
      their `ClientConditions`.
    releases_metrics: Whether clients report their metrics and why they are excluded; else
      only that there was one.
    seed: With the round and the client, decides what training draws (dropout).
  """

  students: cohorts.Students
  optimizer: optimizers.Optimizer
  receives_student: bool
  keeps_model: bool
  personal: Sequence[personal_lib.PersonalLayers] = ()
  weightings: ClientUpdate
  applies_weight: ClientUpdate
  client_data: Optional[client_data_lib.ClientBatches] = None
  exchange: Optional[exchanges.Exchange] = None
  teacher: Optional[models.ModelSpec] = None
  local_terms: Sequence[local_terms_lib.LocalTerm] = ()
  companion: Optional[companions.Companion] = None
  pretraining: Optional[distill.DistillationStage] = None
  learning_rate_fn: Optional[local_training.LearningRateFn] = None
  reporting: Optional[conditions_lib.Reporting] = None
  releases_metrics: bool = True
  seed: int = 0

  @property
  def targets(self) -> frozenset[str]:
    """The names of the models that local terms learn from."""
    return frozenset(t.target for t in self.local_terms if t.target is not None)

  @property
  def needs_round(self) -> bool:
    """Whether clients must know the round's number."""
    return (
        self.exchange is not None
        or self.client_data is not None
        or self.companion is not None
        or self.learning_rate_fn is not None
        or not self.receives_student
        or any(spec.is_random for spec in self.students.specs)
    )

  @property
  def keeps_state(self) -> bool:
    """Whether clients have a state from round to round."""
    of_companion = self.companion is not None and self.companion.has_client_state
    return not self.state_is_companions or of_companion

  @property
  def state_is_companions(self) -> bool:
    """Whether what a client keeps is its companion's, if anything, and no model."""
    return self.receives_student and not self.keeps_model

  def shared(self, values: Sequence[Any]) -> list[Any]:
    """Returns the part of students' values that travels.

    Args:
      values: The values of whole students, by cohort.
    """
    if not self.personal:
      return list(values)
    return [own.shared(whole) for own, whole in zip(self.personal, values)]

  @functools.cached_property
  def broadcast_type(self) -> tff.Type:
    """The `tff.Type` of a `Broadcast`."""
    student, shared, companion = (), (), ()
    if self.receives_student:
      specs = self.shared([spec.weights_spec for spec in self.students.specs])
      student = tff.types.tensorflow_to_type(self.students.pack(specs))
    if self.exchange is not None:
      shared = type_of(self.exchange.initial_shared())
    if self.companion is not None:
      companion = type_of(
          self.companion.broadcast(self.companion.initial_server_state())
      )
    shares = self.exchange is not None and self.exchange.sends_down
    return tff.to_type(
        Broadcast(
            student=student,
            teacher=self.teacher.weights_type if 'teacher' in self.targets else (),
            student_history=(
                self.students.weights_type if 'student_history' in self.targets else ()
            ),
            shared=shared,
            shared_round=np.int32 if shares else (),
            round_num=np.int32 if self.needs_round else (),
            companion=companion,
        )
    )

  @functools.cached_property
  def broadcast_history(self) -> conditions_lib.BroadcastHistory:
    """The `BroadcastHistory` of the last rounds, for clients that are late."""
    return conditions_lib.BroadcastHistory(
        self.broadcast_type, self.reporting.max_delay if self.reporting else 0
    )

  @property
  def data_type(self) -> tff.Type:
    """The type of what `next` is given for each client."""
    if self.client_data is not None:
      data_type = tff.TensorType(np.int32)
    else:
      data_type = tff.SequenceType(
          tff.types.tensorflow_to_type(self.students.first.input_spec)
      )
    parts = collections.OrderedDict()
    if self.students.has_cohorts:
      parts['cohort'] = tff.TensorType(np.int32)
    parts['data'] = data_type
    if self.reporting is not None:
      parts['conditions'] = conditions_lib.CONDITIONS_TYPE
    return tff.to_type(parts) if len(parts) > 1 else data_type

  @property
  def metric_finalizers(self) -> Mapping[str, Any]:
    """The finalizers of the metrics' sums, by name."""
    if not self.releases_metrics:
      return collections.OrderedDict()
    return self.students.first.metrics.finalizers()

  def initial_weights(self, cohort: int) -> Any:
    """Returns the weights of a new model of a cohort, in a trace."""
    spec = self.students.specs[cohort]
    weights = tf.nest.map_structure(tf.constant, spec.initial_weights)
    if self.pretraining is None:
      return weights
    # The rows of all rounds, as a new client has seen none.
    transfer_set, rule = self.exchange.transfer_set.whole(), self.exchange.rule
    # It learns from labels only: no example has a target.
    nothing = rule.decode(
        rule.zero_payload(
            knowledge.logits_shape(spec, transfer_set), transfer_set.num_predictions
        )
    )
    lesson = distill.Lesson(self.pretraining, spec, transfer_set)
    return lesson(
        weights, None, {}, nothing, tf.constant(0), tf.constant([self.seed, 2])
    ).weights

  def initial_client_state(self) -> Any:
    """Returns a new client's state, in a trace; a tuple with cohorts of kept models."""
    if self.state_is_companions:
      return self.companion.initial_client_state() if self.companion else ()
    keeps_sent = self.exchange is not None and self.exchange.keeps_sent
    without_model = companions.ClientState(
        weights=(),
        sent=self.exchange.zero_payload() if keeps_sent else (),
        sent_round=tf.constant(-1) if keeps_sent else (),
    )
    if not self.keeps_model:
      return without_model
    return self.students.pack([
        without_model._replace(
            weights=self.students.only(cohort, self.initial_weights(cohort))
        )
        for cohort in range(len(self.students.specs))
    ])

  def client_state_type(self, initialize_client: tff.Computation) -> tff.Type:
    """Returns the type of a client's state.

    Args:
      initialize_client: The computation of `initial_client_state`.
    """
    initial = initialize_client.type_signature.result
    if not self.keeps_model or not self.students.has_cohorts:
      return initial
    # One type for all cohorts: arrays of any size.
    return tff.to_type(
        companions.ClientState(
            weights=tff.types.tensorflow_to_type(
                tf.nest.map_structure(
                    lambda w: tf.TensorSpec([None] * np.ndim(w), w.dtype),
                    self.students.initial_weights,
                )
            ),
            sent=initial[0].sent,
            sent_round=initial[0].sent_round,
        )
    )


class ClientWork(NamedTuple):
  """The client's part of a round, to be mapped over the clients.

  Attributes:
    plan: The `ClientPlan`.
    initialize: A `tff.Computation` ( -> H@SERVER), the optimizer's hyperparameters.
    initialize_client: ( -> what a new client has), or `None` if it keeps nothing.
    next: A `tff.Computation` (<H, `Broadcast`, D> -> `ClientOutput`), where D is a
      sequence of batches or a client's number; where there are cohorts, <cohort=int32,
      data=that>, and with conditions these, too. With a companion or a state, (<H,
      `Broadcast`, D, client state> -> <`ClientOutput`, `ClientLeft`>).
    output_type: The type of the `ClientOutput`.
  """

  plan: ClientPlan
  initialize: tff.Computation
  initialize_client: Optional[tff.Computation]
  next: tff.Computation
  output_type: tff.Type


def build_client_work(plan: ClientPlan) -> ClientWork:
  """Builds the client's part of a round.

  A client is excluded from both channels and from the metrics, and counted, if it has
  no examples, if its training ends in numbers that are not finite (or whose sum is
  not), what was summed over its steps included, if it has class labels out of range, or
  ids that an embedding does not have.

  Args:
    plan: The clients' part of a round.

  Returns:
    A `ClientWork`.
  """
  hparams = optimizers.initial_hparams(plan.optimizer)

  @tff.federated_computation
  def initialize():
    return tff.federated_value(hparams, tff.SERVER)

  updates = [_ClientUpdate(plan, i) for i in range(len(plan.students.specs))]

  def run(client_hparams, broadcast, client, client_state=()):
    has_cohorts, conditions = plan.students.has_cohorts, None
    if plan.reporting is not None:
      conditions = client['conditions']
    data = client['data'] if has_cohorts or conditions is not None else client
    branches = [
        functools.partial(
            update, client_hparams, broadcast, data, client_state, conditions
        )
        for update in updates
    ]
    if not has_cohorts:
      return branches[0]()
    cohort, last = client['cohort'], len(updates) - 1
    tf.debugging.Assert(
        (cohort >= 0) & (cohort <= last),
        [f"A client's cohort must be a number from 0 to {last}, found", cohort],
    )
    return tf.switch_case(cohort, branches)

  hparams_type = initialize.type_signature.result.member
  types = [hparams_type, plan.broadcast_history.sent_type, plan.data_type]
  if plan.companion is None and not plan.keeps_state:

    @graphs.computation(*types)
    def next_stateless(client_hparams, broadcast, data):
      return run(client_hparams, broadcast, data)[0]

    output_type = next_stateless.type_signature.result
    return ClientWork(plan, initialize, None, next_stateless, output_type)

  initialize_client = graphs.computation()(plan.initial_client_state)

  @graphs.computation(*types, plan.client_state_type(initialize_client))
  def next_fn(client_hparams, broadcast, data, client_state):
    return run(client_hparams, broadcast, data, client_state)

  output_type = next_fn.type_signature.result[0]
  return ClientWork(plan, initialize, initialize_client, next_fn, output_type)


class _ClientUpdate:
  """One client's round in a cohort, to be called where a computation is traced.

  Optimizers, and whatever else must be built outside of a trace, are built before.
  """

  def __init__(self, plan: ClientPlan, cohort: int):
    self.plan, self.cohort = plan, cohort
    self.student = plan.students.specs[cohort]
    self.attachment = companions.Attachment()
    if plan.companion is not None:
      self.attachment = plan.companion.attach(self.student)
    self.learn, observers = None, {'companion': self.attachment.observer}
    if plan.exchange is not None:
      self.learn = plan.exchange.build_learning(self.student)
      observers['exchange'] = plan.exchange.observer(self.student)
    self.training = local_training.LocalTraining(
        self.student,
        plan.optimizer,
        plan.client_data,
        self.attachment,
        {name: each for name, each in observers.items() if each is not None},
    )

  def __call__(self, hparams, sent, data, client_state, conditions):
    """Returns a client's `ClientOutput` and its `ClientLeft`."""
    plan = self.plan
    broadcast, step_share = sent, None
    # A late client began in an earlier round, whose broadcast it has.
    round_num = plan.broadcast_history.current(sent).round_num
    if plan.reporting is not None:
      conditions_lib.check_conditions(plan.reporting, conditions, round_num)
      broadcast = plan.broadcast_history.received(sent, conditions.delay)
      step_share = conditions.step_share
    before = self._before(broadcast, client_state)
    learned = exchanges.Learned(before)
    if self.learn is not None:
      learned = self.learn(before, broadcast, client_state)
    trained = self.training(
        data, self._start(hparams, broadcast, data, client_state, learned, step_share)
    )
    change = trained.values.weights
    if plan.receives_student:
      change = tf.nest.map_structure(
          lambda old, new, spec: tf.cast(old, spec.dtype) - tf.cast(new, spec.dtype),
          before, change, self.student.update_spec,
      )
    companion_state, exchanged = self.attachment.end(
        trained.observed.get('companion', ()),
        models.BoundModel(self.student, trained.values),
        trained.companion,
    )
    # The sums over the steps may be all that is sent, and may be infinite where the
    # weights are finite.
    decision = inclusion.decide(
        trained, [change, companion_state, exchanged, trained.observed], conditions
    )
    included = decision.included
    payload = self._payload(
        round_num, broadcast.round_num, conditions, included, trained
    )
    output = self._output(
        change, payload, trained, decision, conditions,
        self._counts(decision, conditions, learned, payload, client_state),
    )
    if plan.state_is_companions:
      follows = plan.companion is not None and plan.companion.state_follows_report
      new_state = graphs.where(
          included if follows else decision.valid, companion_state, client_state
      )
    else:
      new_state = companions.ClientState(
          self._kept_weights(trained.values.weights, before, decision.valid),
          *self._last_sent(payload, round_num, client_state, included),
      )
    zeros = tf.nest.map_structure(tf.zeros_like, exchanged)
    return output, ClientLeft(new_state, graphs.where(included, exchanged, zeros))

  def _before(self, broadcast: Broadcast, client_state: Any) -> Any:
    """Returns the `ModelWeights` with which the client's round begins."""
    received, own = None, None
    if self.plan.receives_student:
      received = self.plan.students.unpack(broadcast.student)[self.cohort]
    if self.plan.keeps_model:
      own = tf.nest.map_structure(
          lambda kept, w: tf.ensure_shape(kept, np.shape(w)),
          self.plan.students.unpack(client_state.weights)[self.cohort],
          self.student.initial_weights,
      )
    if received is not None and own is not None:
      return self.plan.personal[self.cohort].merged(received, own)
    if received is None and own is None:
      return tf.nest.map_structure(tf.constant, self.student.initial_weights)
    return own if received is None else received

  def _start(
      self, hparams, broadcast, data, client_state, learned, step_share
  ) -> local_training.Start:
    """Returns the inputs of the client's training."""
    plan = self.plan
    client = data if plan.client_data is not None else None
    seed = local_training.client_seed(plan.seed, broadcast.round_num, client)
    values = self.student.values(learned.weights, seed)
    if plan.learning_rate_fn is not None:
      rate = graphs.user_function(plan.learning_rate_fn)(broadcast.round_num)
      hparams = optimizers.with_learning_rate(hparams, rate)
    terms, companion = self.attachment.begin(
        companions.Beginning(
            received=broadcast.companion,
            client_state=client_state,
            round_num=broadcast.round_num,
            examples=_client_examples(plan.client_data, data),
            seed=seed,
            student=models.BoundModel(self.student, values),
            learning_rate=optimizers.learning_rate(hparams),
        )
    )
    return local_training.Start(
        values=values,
        received=learned.weights.trainable if plan.receives_student else (),
        terms=[*plan.local_terms, *learned.terms, *terms],
        targets=self._targets(broadcast),
        companion=companion,
        hparams=hparams,
        round_num=broadcast.round_num,
        step_share=step_share,
    )

  def _targets(self, broadcast: Broadcast) -> dict[str, models.BoundModel]:
    """Returns the models that local terms learn from, by the name of their target."""
    targets = {}
    for name in sorted(self.plan.targets):
      spec, weights = self.plan.teacher, getattr(broadcast, name)
      if name != 'teacher':
        spec = self.student
        weights = self.plan.students.unpack(weights)[self.cohort]
      targets[name] = models.BoundModel(spec, spec.values(weights))
    return targets

  def _payload(self, round_num, began, conditions, included, trained) -> Any:
    """Returns the payload of the exchange, without the client's weight."""
    plan = self.plan
    if plan.exchange is None:
      return ()

    def report():
      covered = None
      if plan.reporting is not None and plan.exchange.transfer_set is not None:
        covered = conditions_lib.covered_rows(
            plan.exchange.transfer_set, conditions, began, round_num
        )
      certainty = None
      if self.attachment.certainty is not None:
        certainty = lambda x: self.attachment.certainty(x, trained.companion)
      return plan.exchange.payload(
          exchanges.Report(
              models.BoundModel(self.student, trained.values),
              round_num,
              trained.observed.get('exchange', ()),
              covered,
              certainty,
          )
      )

    return tf.cond(included, report, plan.exchange.zero_payload)

  def _output(
      self, change, payload, trained, decision, conditions, counts
  ) -> ClientOutput:
    """Returns all that goes up."""
    plan, included = self.plan, decision.included
    staleness = None
    if plan.reporting is not None:
      staleness = plan.reporting.weight(conditions.delay)

    def weight_of(weighting: tff.learning.ClientWeighting) -> tf.Tensor:
      return inclusion.weight(weighting, trained.num_examples, included, staleness)

    model, model_weight, knowledge_weight = (), (), ()
    if plan.receives_student:
      weight = weight_of(plan.weightings.model)
      if plan.personal:
        change = plan.personal[self.cohort].shared(change)
      model = tf.cond(
          included,
          lambda: _times(change, weight) if plan.applies_weight.model else change,
          lambda: tf.nest.map_structure(tf.zeros_like, change),
      )
      specs = plan.students.specs
      model = self._in_cohort(model, plan.shared([spec.update_spec for spec in specs]))
      model_weight = self._in_cohort(weight, [tf.TensorSpec([])] * len(specs))
    if plan.exchange is not None:
      knowledge_weight = weight_of(plan.weightings.knowledge)
      if plan.applies_weight.knowledge:
        payload = _times(payload, knowledge_weight)
    metrics: Any = ()
    if plan.releases_metrics:
      initial = self.student.metrics.initial_state()
      states = graphs.where(included, trained.metrics, initial)
      # Lists, as `tff.learning.metrics` expects.
      metrics = collections.OrderedDict((n, list(s)) for n, s in states.items())
    return ClientOutput(
        ClientUpdate(model, payload),
        ClientUpdate(model_weight, knowledge_weight),
        metrics,
        counts,
    )

  def _in_cohort(self, value: Any, specs: Sequence[Any]) -> Any:
    """Returns the value at the place of the cohort, with zeros for the others."""
    return self.plan.students.pack([
        value
        if cohort == self.cohort
        else tf.nest.map_structure(lambda t: tf.zeros(t.shape, t.dtype), spec)
        for cohort, spec in enumerate(specs)
    ])

  def _counts(self, decision, conditions, learned, payload, client_state):
    """Returns the client's counts."""
    # It tells nothing of the client's examples.
    counts = collections.OrderedDict(num_included=tf.constant(1))
    if self.plan.releases_metrics:
      counts = decision.counts(conditions)
      if self.learn is not None:
        counts['num_taught'] = tf.cast(learned.has_learned, tf.int32)
    if self.plan.exchange is not None:
      bits = self.plan.exchange.message_bits(payload, client_state)
      if bits is not None:
        counts['knowledge_bits'] = tf.where(
            decision.included, bits, tf.zeros_like(bits)
        )
    return counts

  def _kept_weights(self, after: Any, before: Any, valid: tf.Tensor) -> Any:
    """Returns the client's own model for its next round; () if it keeps none."""
    if not self.plan.keeps_model:
      return ()
    return self.plan.students.only(self.cohort, graphs.where(valid, after, before))

  def _last_sent(self, payload, round_num, client_state, included) -> tuple[Any, Any]:
    """Returns what the client sent last, and in which round; () if it need not know."""
    if self.plan.exchange is None or not self.plan.exchange.keeps_sent:
      return (), ()
    # A report that was lost is in no sum.
    return (
        graphs.where(included, payload, client_state.sent),
        tf.where(included, round_num, client_state.sent_round),
    )


def _times(update: Any, weight: tf.Tensor) -> Any:
  return tf.nest.map_structure(lambda t: t * tf.cast(weight, t.dtype), update)


def _client_examples(
    client_data: Optional[client_data_lib.ClientBatches], data: Any
) -> companions.ClientExamples:
  """Returns a client's examples, from its number or its dataset."""
  if client_data is None:

    def map_dataset(fn):
      def map_batch(*batch):  # `map` hands over the parts of a tuple.
        return _map_inputs(fn, batch if len(batch) > 1 else batch[0])

      parts = data.map(map_batch)
      empty = tf.zeros([0, *parts.element_spec.shape[1:]], parts.element_spec.dtype)
      return parts.reduce(empty, lambda all_, part: tf.concat([all_, part], 0))

    return companions.ClientExamples(None, map_dataset)

  def map_rows(fn):
    start, count = client_data.data.span(data)
    rows = client_data.data.rows(start + tf.range(count))
    batch = raw_files.gather(client_data.data.open(), rows)
    batch = client_data_lib.masked_inputs(batch, client_data.input_mask(data))
    return _map_inputs(fn, batch)

  return companions.ClientExamples(data, map_rows)


def _map_inputs(fn: Callable[[Any], tf.Tensor], batch: Any) -> tf.Tensor:
  """Returns what a function makes of a batch's inputs, without examples of weight 0."""
  mapped = fn(models.split_batch(batch)[0])
  weight = models.sample_weight_of(batch)
  if weight is None:
    return mapped
  weight = tf.reshape(tf.cast(weight, tf.float32), [tf.shape(mapped)[0], -1])
  return tf.boolean_mask(mapped, tf.reduce_any(weight > 0.0, axis=1))


def type_of(value: Any) -> tff.Type:
  """Returns the type of a structure of tensors."""
  return tff.types.tensorflow_to_type(
      tf.nest.map_structure(
          lambda t: tf.TensorSpec.from_tensor(tf.convert_to_tensor(t)), value
      )
  )
