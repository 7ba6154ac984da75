"""Local training, with further terms in its loss, and what it sends up.

One client work serves every algorithm: it trains the student on the client's data
and returns two payloads, the weight delta and, where the server distils from an
ensemble, the predictions on this round's transfer examples.
"""

import collections
from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple, Optional

import numpy as np
import tensorflow as tf
from tff_kd.compat import tff

from tff_kd import client_data as client_data_lib
from tff_kd import cohorts
from tff_kd import companions
from tff_kd import conditions as conditions_lib
from tff_kd import graphs
from tff_kd import knowledge
from tff_kd import local_terms as local_terms_lib
from tff_kd import local_training
from tff_kd import models
from tff_kd import optimizers
from tff_kd import raw_files
from tff_kd import transfer

LearningRateFn = local_training.LearningRateFn


class Broadcast(NamedTuple):
  """What the server sends down to each client.

  Attributes:
    student: The `ModelWeights` of the global student; of several cohorts, by cohort,
      of which a client needs its own.
    teacher: The teacher's `ModelWeights` where clients learn from it, else ().
    student_history: The mean of the last global students, likewise.
    round_num: int32 scalar; with the seeds, tells the round's transfer examples and
      the order of a client's own. () where nothing needs it.
    companion: What the companion's server part sends, else ().
  """

  student: Any
  teacher: Any
  student_history: Any
  round_num: Any
  companion: Any


class ClientUpdate(NamedTuple):
  """What a client sends up, or the weights of the two channels.

  Attributes:
    model: A `ModelWeights` of deltas (received minus trained), of weights and of
      statistics; of several cohorts by cohort, with zeros for the others. As a
      weight: a float32 scalar, likewise.
    knowledge: A `knowledge.KnowledgePayload`, or () without that channel. As a
      weight: a float32 scalar or ().
  """

  model: Any
  knowledge: Any


class ClientOutput(NamedTuple):
  """All that a client's work leaves; every part of it is to be summed over clients.

  Attributes:
    update: A `ClientUpdate`.
    weight: A `ClientUpdate` of float32 scalars, the weight in each channel.
    metrics: The model's unfinalized metrics.
    participation: Counts: whether it took part, or why it was left out; with
      coded predictions also `knowledge_bits`, the length of its coded message.
  """

  update: ClientUpdate
  weight: ClientUpdate
  metrics: Any
  participation: Any


class CompanionOutput(NamedTuple):
  """What a companion leaves at the client; nothing of it is summed.

  Attributes:
    client_state: For the client's next round.
    exchanged: For `Companion.exchange`.
  """

  client_state: Any
  exchanged: Any


class ClientWork(NamedTuple):
  """The client's part of a round, to be mapped over the clients.

  Attributes:
    initialize: A `tff.Computation` ( -> H@SERVER), the optimizer's hyperparameters.
    next: A `tff.Computation` (<H, `Broadcast`, D> -> `ClientOutput`), where D is a
      sequence of batches or a client's number; where there are cohorts, <cohort=int32,
      data=that>, and with conditions these, too. With a companion, (<H, `Broadcast`, D,
      client state> -> <`ClientOutput`, `CompanionOutput`>).
    broadcast_type: The `tff.Type` of a `Broadcast`.
    broadcast_history: What makes a `Broadcast` into what `next` takes.
    metric_finalizers: The finalizers of the metrics' sums, by name.
    get_hparams: A `tff.Computation` (H -> hyperparameters).
    set_hparams: A `tff.Computation` (<H, hyperparameters> -> H).
  """

  initialize: tff.Computation
  next: tff.Computation
  broadcast_type: tff.Type
  broadcast_history: conditions_lib.BroadcastHistory
  metric_finalizers: Any
  get_hparams: tff.Computation
  set_hparams: tff.Computation

  @property
  def data_type(self) -> tff.Type:
    return self.next.type_signature.parameter[2]

  @property
  def output_type(self) -> tff.Type:
    """The type of its `ClientOutput`."""
    result = self.next.type_signature.result
    return result if result.python_container is ClientOutput else result[0]


def build_client_work(
    students: cohorts.Students,
    *,
    optimizer: optimizers.Optimizer,
    model_weighting: tff.learning.ClientWeighting,
    knowledge_weighting: tff.learning.ClientWeighting,
    multiplied: ClientUpdate,
    client_data: Optional[client_data_lib.ClientBatches] = None,
    transfer_set: Optional[transfer.TransferSet] = None,
    teacher: Optional[models.ModelSpec] = None,
    consensus_rule: knowledge.ConsensusRule = knowledge.MeanLogits(),
    local_terms: Sequence[local_terms_lib.LocalTerm] = (),
    companion: Optional[companions.Companion] = None,
    learning_rate_fn: Optional[LearningRateFn] = None,
    reporting: Optional[conditions_lib.Reporting] = None,
    releases_metrics: bool = True,
    seed: int = 0,
) -> ClientWork:
  """Builds the client's part of a round.

  A client is left out of both channels and of the metrics, and counted, if it has
  no examples, if its training ends in numbers that are not finite (or whose sum is
  not), or if it has class labels out of range.

  Args:
    students: The model to train, or those of the cohorts.
    optimizer: A TFF optimizer or a function that returns a Keras one; fresh for
      every client and round.
    model_weighting: The weight of a client's delta: by examples, or 1.
    knowledge_weighting: The weight of a client's predictions, likewise.
    multiplied: By channel, whether the client multiplies its update by its weight
      itself; a computation of its own for that would take longer than the product.
    client_data: Where clients read their examples, if not from datasets in memory.
    transfer_set: On what to send predictions; none are sent if `None`.
    teacher: The teacher, if it is the target of a term.
    consensus_rule: How predictions become a payload.
    local_terms: Further terms of the local loss.
    companion: What takes part beside the student; its terms come after those.
    learning_rate_fn: The optimizer's rate in a round, int32 from 0; constant if `None`.
    reporting: How what comes late or in part is taken; clients then come with their
      `ClientConditions`. Needs `client_data`.
    releases_metrics: Whether clients report their metrics, and why they are left out;
      else nothing but `public_participation`.
    seed: With the round and the client, decides what training draws (dropout).

  Returns:
    A `ClientWork`.
  """
  _check_terms(students.first, local_terms, client_data)
  targets = {term.target for term in local_terms if term.target is not None}
  hparams = optimizers.initial_hparams(optimizer)
  needs_round = (
      transfer_set is not None
      or client_data is not None
      or companion is not None
      or learning_rate_fn is not None
      or any(spec.is_random for spec in students.specs)
  )
  nothing = companion.broadcast(companion.initial_server_state()) if companion else ()
  broadcast_type = tff.to_type(
      Broadcast(
          student=students.weights_type,
          teacher=teacher.weights_type if 'teacher' in targets else (),
          student_history=(
              students.weights_type if 'student_history' in targets else ()
          ),
          round_num=np.int32 if needs_round else (),
          companion=type_of(nothing),
      )
  )
  if client_data is not None:
    data_type = tff.TensorType(np.int32)
  else:
    data_type = tff.SequenceType(
        tff.types.tensorflow_to_type(students.first.input_spec)
    )
  data_type = conditions_lib.client_data_type(
      cohorts.client_data_type(students, data_type), reporting
  )
  broadcast_history = conditions_lib.BroadcastHistory(
      broadcast_type, reporting.max_delay if reporting is not None else 0
  )
  metric_finalizers = collections.OrderedDict()
  if releases_metrics:
    metric_finalizers = students.first.metrics.finalizers()

  @tff.federated_computation
  def initialize():
    return tff.federated_value(hparams, tff.SERVER)

  hparams_type = initialize.type_signature.result.member
  updates = [
      _ClientUpdate(
          students=students,
          cohort=cohort,
          optimizer=optimizer,
          weightings=ClientUpdate(model_weighting, knowledge_weighting),
          multiplied=multiplied,
          client_data=client_data,
          transfer_set=transfer_set,
          teacher=teacher,
          consensus_rule=consensus_rule,
          local_terms=tuple(local_terms),
          companion=companion,
          learning_rate_fn=learning_rate_fn,
          reporting=reporting,
          broadcast_history=broadcast_history,
          releases_metrics=releases_metrics,
          seed=seed,
      )
      for cohort in range(len(students.specs))
  ]

  for update in updates:
    update.prepare()

  def run(client_hparams, broadcast, client, client_state=()):
    return students.run_client(
        client,
        updates,
        (client_hparams, broadcast),
        client_state,
        has_conditions=reporting is not None,
    )

  types = [hparams_type, broadcast_history.sent_type, data_type]
  if companion is None:

    @graphs.computation(*types)
    def client_computation(client_hparams, broadcast, data):
      return run(client_hparams, broadcast, data)

  else:

    @graphs.computation(*types, type_of(companion.initial_client_state()))
    def client_computation(client_hparams, broadcast, data, client_state):
      return run(client_hparams, broadcast, data, client_state)

  @graphs.computation(hparams_type)
  def get_hparams_fn(state):
    return state

  @graphs.computation(hparams_type, hparams_type)
  def set_hparams_fn(state, hparams):
    del state
    return hparams

  return ClientWork(
      initialize=initialize,
      next=client_computation,
      broadcast_type=broadcast_type,
      broadcast_history=broadcast_history,
      metric_finalizers=metric_finalizers,
      get_hparams=get_hparams_fn,
      set_hparams=set_hparams_fn,
  )


def _check_terms(
    student: models.ModelSpec,
    terms: Sequence[local_terms_lib.LocalTerm],
    client_data: Optional[client_data_lib.ClientBatches],
) -> None:
  """Refuses terms that need labels or classes where there are none."""
  for term in terms:
    if term.needs_labels and client_data is not None and client_data.label_share < 1.0:
      raise ValueError(
          f'{term} needs the label of every example: `label_share` must be 1, found '
          f'{client_data.label_share}.'
      )
    if term.needs_classes:
      models.check_has_classes(student, type(term).__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ClientUpdate:
  """One client's round in a cohort; the attributes are those of `build_client_work`."""

  students: cohorts.Students
  cohort: int
  optimizer: optimizers.Optimizer
  weightings: ClientUpdate
  multiplied: ClientUpdate
  client_data: Optional[client_data_lib.ClientBatches]
  transfer_set: Optional[transfer.TransferSet]
  teacher: Optional[models.ModelSpec]
  consensus_rule: knowledge.ConsensusRule
  local_terms: tuple[local_terms_lib.LocalTerm, ...]
  companion: Optional[companions.Companion]
  learning_rate_fn: Optional[LearningRateFn]
  reporting: Optional[conditions_lib.Reporting]
  broadcast_history: conditions_lib.BroadcastHistory
  releases_metrics: bool
  seed: int

  def prepare(self) -> None:
    """Builds optimizers and what else must be built outside of any trace."""
    _ = self.training

  @property
  def student(self) -> models.ModelSpec:
    return self.students.specs[self.cohort]

  @functools.cached_property
  def attachment(self) -> companions.Attachment:
    if self.companion is None:
      return companions.Attachment()
    return self.companion.attach(self.student)

  @functools.cached_property
  def training(self) -> local_training.LocalTraining:
    return local_training.LocalTraining(
        self.student,
        self.optimizer,
        self.client_data,
        attachment=self.attachment,
        learning_rate_fn=self.learning_rate_fn,
    )

  def __call__(self, hparams, sent, data, client_state=(), conditions=None):
    """A client's `ClientOutput`; with a companion, its `CompanionOutput` too."""
    broadcast, step_share = sent, None
    if self.reporting is not None:
      conditions_lib.check_conditions(self.reporting, conditions)
      broadcast = self.broadcast_history.received(sent, conditions.delay)
      step_share = conditions.step_share
    received = self.students.unpack(broadcast.student)[self.cohort]
    start = self._start(hparams, broadcast, data, client_state, received, step_share)
    trained = self.training(data, start)
    bound = models.BoundModel(self.student, trained.values)
    delta = tf.nest.map_structure(tf.subtract, received, trained.values.weights)
    left = None
    if self.companion is not None:
      left = CompanionOutput(
          *self.attachment.end(trained.observed, bound, trained.companion)
      )
    finite = graphs.all_finite([delta, left])
    is_empty = tf.equal(trained.num_examples, 0)
    valid = finite & ~is_empty & ~trained.bad_labels & ~trained.bad_inputs
    included, delay = valid, None
    if self.reporting is not None:
      included, delay = valid & conditions.reports, conditions.delay
    counts = public_participation()
    if self.releases_metrics:
      counts = participation(included, trained, finite)
      if self.reporting is not None:
        counts.update(conditions_lib.condition_counts(conditions, valid))
    weight = self._weights(trained.num_examples, included, delay)
    payload = self._payload(sent, broadcast, conditions, included, weight, trained)
    if self.transfer_set is not None and self.consensus_rule.is_coded:
      # Clients keep nothing here: there is no message to code it against.
      bits = self.consensus_rule.message_bits(payload)
      counts['knowledge_bits'] = tf.where(included, bits, tf.zeros_like(bits))
    output = ClientOutput(
        update=ClientUpdate(
            model=self._model_update(delta, included, weight.model), knowledge=payload
        ),
        weight=weight._replace(
            model=self._in_cohort(
                weight.model, [tf.TensorSpec([])] * len(self.students.specs)
            )
        ),
        metrics=self._metrics(trained, included),
        participation=counts,
    )
    if left is None:
      return output
    return output, CompanionOutput(
        client_state=tf.nest.map_structure(
            lambda new, old: tf.where(valid, new, old), left.client_state, client_state
        ),
        exchanged=tf.nest.map_structure(
            lambda t: tf.where(included, t, tf.zeros_like(t)), left.exchanged
        ),
    )

  def _start(
      self, hparams, broadcast, data, client_state, received, step_share
  ) -> local_training.Start:
    """With what the client's training begins."""
    client = data if self.client_data is not None else None
    seed = local_training.client_seed(self.seed, broadcast.round_num, client)
    terms, companion = self.attachment.begin(
        companions.Beginning(
            received=broadcast.companion,
            client_state=client_state,
            round_num=broadcast.round_num,
            examples=_client_examples(self.client_data, data),
            seed=seed,
        )
    )
    return local_training.Start(
        values=self.student.values(received, seed),
        received=received.trainable,
        terms=[*self.local_terms, *terms],
        targets=self._targets(broadcast),
        companion=companion,
        hparams=hparams,
        round_num=broadcast.round_num,
        step_share=step_share,
    )

  def _targets(self, broadcast: Broadcast) -> dict[str, models.BoundModel]:
    """The models that local terms learn from, by the name of their target."""
    targets = {}
    for name in sorted({term.target for term in self.local_terms} - {None}):
      spec, weights = self.teacher, getattr(broadcast, name)
      if name != 'teacher':
        spec, weights = self.student, self.students.unpack(weights)[self.cohort]
      targets[name] = models.BoundModel(spec, spec.values(weights))
    return targets

  def _weights(
      self, num_examples: tf.Tensor, included: tf.Tensor, delay: Optional[tf.Tensor]
  ) -> ClientUpdate:
    """The client's weight in each channel."""

    def weight_of(weighting):
      weight = client_weight(weighting, num_examples, included)
      return weight if delay is None else weight * self.reporting.weight(delay)

    return ClientUpdate(
        model=weight_of(self.weightings.model),
        knowledge=(
            weight_of(self.weightings.knowledge) if self.transfer_set is not None else ()
        ),
    )

  def _model_update(self, delta: Any, included: tf.Tensor, weight: tf.Tensor) -> Any:
    """The delta on its way up, at the place of the cohort."""
    update = tf.cond(
        included,
        lambda: _times(delta, weight) if self.multiplied.model else delta,
        lambda: tf.nest.map_structure(tf.zeros_like, delta),
    )
    return self._in_cohort(update, [spec.weights_spec for spec in self.students.specs])

  def _in_cohort(self, value: Any, specs: Sequence[Any]) -> Any:
    """The value at the place of the cohort, with zeros for the others."""
    return self.students.pack([
        value
        if cohort == self.cohort
        else tf.nest.map_structure(lambda t: tf.zeros(t.shape, t.dtype), spec)
        for cohort, spec in enumerate(specs)
    ])

  def _payload(
      self, sent, broadcast, conditions, included, weight: ClientUpdate, trained
  ) -> Any:
    """The predictions on their way up; () without that channel."""
    if self.transfer_set is None:
      return ()

    def predict():
      round_num = broadcast.round_num
      if self.reporting is not None:
        round_num = self.broadcast_history.current(sent).round_num
      ids = self.transfer_set.prediction_ids(round_num)
      logits = knowledge.predict_logits(
          models.BoundModel(self.student, trained.values), self.transfer_set, ids
      )
      if self.reporting is not None:
        covered = conditions_lib.covered_rows(
            self.transfer_set, conditions, broadcast.round_num, round_num
        )
        logits = knowledge.without_rows(logits, covered)
      predictions = [logits]
      if self.consensus_rule.needs_certainty:
        certainty = lambda x: self.attachment.certainty(x, trained.companion)
        predictions.append(self.transfer_set.map_inputs(certainty, ids))
      payload = self.consensus_rule.encode(*predictions)
      return _times(payload, weight.knowledge) if self.multiplied.knowledge else payload

    return tf.cond(
        included,
        predict,
        lambda: self.consensus_rule.zero_payload(
            self.student.logits_shape, self.transfer_set.num_predictions
        ),
    )

  def _metrics(self, trained: local_training.Trained, included: tf.Tensor) -> Any:
    """The metrics' states; as at the beginning for a client that is left out."""
    if not self.releases_metrics:
      return ()
    return reported_metrics(self.student, trained, included)


def reported_metrics(
    student: models.ModelSpec, trained: local_training.Trained, included: tf.Tensor
) -> Any:
  """The metrics' states of a client; as at the beginning if it is left out."""
  states = tf.nest.map_structure(
      lambda new, old: tf.where(included, new, old),
      trained.metrics,
      student.metrics.initial_state(),
  )
  # Lists, as `tff.learning.metrics` expects.
  return collections.OrderedDict((name, list(s)) for name, s in states.items())


def _times(update: Any, weight: tf.Tensor) -> Any:
  return tf.nest.map_structure(lambda t: t * tf.cast(weight, t.dtype), update)


def _client_examples(
    client_data: Optional[client_data_lib.ClientBatches], data: Any
) -> companions.ClientExamples:
  """A client's examples, from its number or its dataset."""
  if client_data is None:

    def map_dataset(fn):
      def map_batch(*batch):  # Of a tuple, `map` hands over the parts.
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
  """What a function makes of a batch's inputs, without examples of weight 0."""
  mapped = fn(models.split_batch(batch)[0])
  weight = models.sample_weight_of(batch)
  if weight is None:
    return mapped
  weight = tf.reshape(tf.cast(weight, tf.float32), [tf.shape(mapped)[0], -1])
  return tf.boolean_mask(mapped, tf.reduce_any(weight > 0.0, axis=1))


def type_of(value: Any) -> tff.Type:
  """The type of a structure of tensors."""
  return tff.types.tensorflow_to_type(
      tf.nest.map_structure(
          lambda t: tf.TensorSpec.from_tensor(tf.convert_to_tensor(t)), value
      )
  )


def participation(
    included: tf.Tensor, trained: local_training.Trained, finite: tf.Tensor
) -> collections.OrderedDict[str, tf.Tensor]:
  """A client's counts, int32 scalars: that it was there, and in or why not."""
  bad_labels, bad_inputs = trained.bad_labels, trained.bad_inputs
  causes = dict(
      empty=tf.equal(trained.num_examples, 0),
      bad_labels=bad_labels,
      bad_inputs=bad_inputs & ~bad_labels,
      non_finite=~finite & ~bad_labels & ~bad_inputs,
  )
  return collections.OrderedDict(
      num_clients=tf.constant(1),
      num_included=tf.cast(included, tf.int32),
      **{
          f'num_excluded_{cause}': tf.cast(its, tf.int32)
          for cause, its in causes.items()
      },
  )


def public_participation() -> collections.OrderedDict[str, tf.Tensor]:
  """A client's counts as far as they tell nothing of its examples, int32 scalars."""
  return collections.OrderedDict(num_included=tf.constant(1))


def client_weight(
    weighting: tff.learning.ClientWeighting,
    num_examples: tf.Tensor,
    included: tf.Tensor,
) -> tf.Tensor:
  """A client's weight in a channel: a float32 scalar, 0 if it is left out."""
  if weighting is tff.learning.ClientWeighting.NUM_EXAMPLES:
    weight = tf.cast(num_examples, tf.float32)
  else:
    weight = tf.constant(1.0)
  return tf.where(included, weight, 0.0)
