"""Local training, with further terms in its loss, and what it sends up.

One client work serves every algorithm: it trains the student on the client's data
and returns two payloads, the weight delta and, where the server distils from an
ensemble, the predictions on this round's transfer examples.
"""

import collections
from collections.abc import Callable, Sequence
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
from tff_kd import models
from tff_kd import optimizers
from tff_kd import raw_files
from tff_kd import transfer

# The round's number, from 0 -> a learning rate; as TFF's optimizer schedules.
LearningRateFn = Callable[[tf.Tensor], Any]


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
    model: A `ModelWeights` of deltas (received minus trained): `trainable`, and
      in `non_trainable` only the statistics that layers keep (batch norm); of
      several cohorts by cohort, with zeros for the others. As a weight: a float32
      scalar, likewise.
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


def model_update_spec(student: models.ModelSpec) -> tff.learning.models.ModelWeights:
  """The `tf.TensorSpec`s of the model channel: deltas of weights and statistics."""
  with tf.Graph().as_default():
    model = student.blank_model_fn()
    return tff.learning.models.ModelWeights(
        trainable=[
            tf.TensorSpec(v.shape, v.dtype) for v in model.trainable_variables
        ],
        non_trainable=[tf.TensorSpec(v.shape, v.dtype) for v in model.statistics],
    )


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

  Returns:
    A `ClientWork`.
  """
  for term in local_terms:
    if term.needs_labels and client_data is not None and client_data.label_share < 1.0:
      raise ValueError(
          f'{term} needs the label of every example: `label_share` must be 1, found '
          f'{client_data.label_share}.'
      )
    if term.needs_classes:
      models.check_has_classes(students.first, type(term).__name__)
  targets = {term.target for term in local_terms if term.target is not None}
  hparams = optimizers.initial_hparams(optimizer)
  broadcast_type = tff.to_type(
      Broadcast(
          student=students.weights_type,
          teacher=teacher.weights_type if 'teacher' in targets else (),
          student_history=(
              students.weights_type if 'student_history' in targets else ()
          ),
          round_num=(
              np.int32
              if transfer_set is not None
              or client_data is not None
              or companion is not None
              or learning_rate_fn is not None
              else ()
          ),
          companion=companion_type(
              lambda: companion.broadcast(companion.initial_server_state())
              if companion is not None
              else ()
          ),
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
  with tf.Graph().as_default():
    metric_finalizers = students.first.blank_model_fn().metric_finalizers()
  if not releases_metrics:
    metric_finalizers = collections.OrderedDict()
  update_specs = [model_update_spec(spec) for spec in students.specs]

  @tff.federated_computation
  def initialize():
    return tff.federated_value(hparams, tff.SERVER)

  hparams_type = initialize.type_signature.result.member

  def build_update(cohort: int):
    """One client's round; returns a function of what the computation gets."""
    student = students.specs[cohort]
    model = student.blank_model_fn()
    target_models = {
        name: (teacher if name == 'teacher' else student).blank_model_fn()
        for name in sorted(targets)
    }
    attached = None
    if companion is not None:
      attached = companion.attach(model)
    train = build_training(
        model,
        target_models,
        optimizer,
        client_data,
        observer=attached.observer if attached else None,
        extra_variables=attached.trainable_variables if attached else (),
        learning_rate_fn=learning_rate_fn,
    )

    def client_update(client_hparams, sent, data, client_state=(), conditions=None):
      broadcast, step_share = sent, None
      if reporting is not None:
        conditions_lib.check_conditions(reporting, conditions)
        broadcast = broadcast_history.received(sent, conditions.delay)
        step_share = conditions.step_share
      # A read-only view of what came in, before any variable changes.
      received = students.unpack(broadcast.student)[cohort]
      model.assign(received)
      for name, target in target_models.items():
        weights = getattr(broadcast, name)
        if name != 'teacher':
          weights = students.unpack(weights)[cohort]
        target.assign(weights)
      terms = list(local_terms)
      if attached is not None:
        terms += attached.begin(
            broadcast.companion,
            client_state,
            broadcast.round_num,
            _client_examples(client_data, data),
        )
      num_examples, bad_labels, observed = train(
          client_hparams,
          data,
          broadcast.round_num,
          terms,
          received.trainable,
          step_share,
      )

      delta = tf.nest.map_structure(
          tf.subtract, _exchanged(model, received), _exchanged(model)
      )
      left = None
      if attached is not None:
        left = CompanionOutput(*attached.end(observed))
      # One pass each, where looking at every number would take two.
      sums = [
          tf.reduce_sum(tf.cast(d, tf.float32))
          for d in tf.nest.flatten([delta, left])
          if d is not None
      ]
      finite = tf.reduce_all(tf.math.is_finite(tf.stack(sums)))
      is_empty = tf.equal(num_examples, 0)
      valid = finite & ~is_empty & ~bad_labels
      included = valid
      if reporting is not None:
        included = valid & conditions.reports
      model.reset_metrics_unless(included)

      def in_cohort(value, specs):
        """The value at the cohort's place, with zeros for the others."""
        return students.pack([
            value
            if i == cohort
            else tf.nest.map_structure(lambda t: tf.zeros(t.shape, t.dtype), spec)
            for i, spec in enumerate(specs)
        ])

      def weight_of(weighting):
        weight = client_weight(weighting, num_examples, included)
        if reporting is not None:
          weight *= reporting.weight(conditions.delay)
        return weight

      def prepared(update, weighting, is_multiplied):
        """A channel's update, on its way up."""
        if not is_multiplied:
          return update
        weight = weight_of(weighting)
        return tf.nest.map_structure(
            lambda t: t * tf.cast(weight, t.dtype), update
        )

      model_update = tf.cond(
          included,
          lambda: prepared(delta, model_weighting, multiplied.model),
          lambda: tf.nest.map_structure(tf.zeros_like, delta),
      )
      payload, knowledge_weight = (), ()
      if not releases_metrics:
        counts = public_participation()
      else:
        counts = participation(included, is_empty, bad_labels, finite)
        if reporting is not None:
          counts.update(conditions_lib.condition_counts(conditions, valid))
      if transfer_set is not None:

        def predict():
          round_num = broadcast.round_num
          if reporting is not None:
            round_num = broadcast_history.current(sent).round_num
          ids = transfer_set.prediction_ids(round_num)
          logits = knowledge.predict_logits(model, transfer_set, ids)
          if reporting is not None:
            covered = conditions_lib.covered_rows(
                transfer_set, conditions, broadcast.round_num, round_num
            )
            logits = knowledge.without_rows(logits, covered)
          predictions = [logits]
          if consensus_rule.needs_certainty:
            predictions.append(transfer_set.map_inputs(attached.certainty, ids))
          return prepared(
              consensus_rule.encode(*predictions),
              knowledge_weighting,
              multiplied.knowledge,
          )

        payload = tf.cond(
            included,
            predict,
            lambda: consensus_rule.zero_payload(
                students.first.logits_shape, transfer_set.num_predictions
            ),
        )
        knowledge_weight = weight_of(knowledge_weighting)
        if consensus_rule.is_coded:
          # Clients keep nothing here: there is no message to code it against.
          bits = consensus_rule.message_bits(payload)
          counts['knowledge_bits'] = tf.where(included, bits, tf.zeros_like(bits))
      output = ClientOutput(
          update=ClientUpdate(
              model=in_cohort(model_update, update_specs), knowledge=payload
          ),
          weight=ClientUpdate(
              model=in_cohort(
                  weight_of(model_weighting), [tf.TensorSpec([])] * len(update_specs)
              ),
              knowledge=knowledge_weight,
          ),
          metrics=(
              model.report_local_unfinalized_metrics() if releases_metrics else ()
          ),
          participation=counts,
      )
      if left is None:
        return output
      return output, CompanionOutput(
          client_state=tf.nest.map_structure(
              lambda new, old: tf.where(valid, new, old),
              left.client_state,
              client_state,
          ),
          exchanged=tf.nest.map_structure(
              lambda t: tf.where(included, t, tf.zeros_like(t)), left.exchanged
          ),
      )

    return graphs.function(client_update)

  def run(client_hparams, broadcast, client, client_state=()):
    updates = [build_update(i) for i in range(len(students.specs))]
    return students.run_client(
        client,
        updates,
        (client_hparams, broadcast),
        client_state,
        has_conditions=reporting is not None,
    )

  if companion is None:

    @tff.tensorflow.computation(
        hparams_type, broadcast_history.sent_type, data_type
    )
    def client_computation(client_hparams, broadcast, data):
      return run(client_hparams, broadcast, data)

  else:
    client_state_type = companion_type(companion.initial_client_state)

    @tff.tensorflow.computation(
        hparams_type, broadcast_history.sent_type, data_type, client_state_type
    )
    def client_computation(client_hparams, broadcast, data, client_state):
      return run(client_hparams, broadcast, data, client_state)

  @tff.tensorflow.computation(hparams_type)
  def get_hparams_fn(state):
    return state

  @tff.tensorflow.computation(hparams_type, hparams_type)
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


def _client_examples(
    client_data: Optional[client_data_lib.ClientBatches], data: Any
) -> companions.ClientExamples:
  """A client's examples, from its number or its dataset."""
  if client_data is None:

    def map_dataset(fn):
      def map_batch(*batch):  # Of a pair, `map` hands over the parts.
        return fn(models.split_batch(batch if len(batch) > 1 else batch[0])[0])

      parts = data.map(map_batch)
      empty = tf.zeros([0, *parts.element_spec.shape[1:]], parts.element_spec.dtype)
      return parts.reduce(empty, lambda all_, part: tf.concat([all_, part], 0))

    return companions.ClientExamples(None, map_dataset)

  def map_rows(fn):
    start, count = client_data.data.span(data)
    rows = client_data.data.rows(start + tf.range(count))
    batch = raw_files.gather(client_data.data.open(), rows)
    batch = client_data_lib.masked_inputs(batch, client_data.input_mask(data))
    return fn(models.split_batch(batch)[0])

  return companions.ClientExamples(data, map_rows)


def companion_type(make: Callable[[], Any]) -> tff.Type:
  """The type of what a companion's method makes."""
  return tff.tensorflow.computation(make).type_signature.result


def _exchanged(
    model: models.KerasModel,
    weights: Optional[tff.learning.models.ModelWeights] = None,
) -> tff.learning.models.ModelWeights:
  """The part of the weights that a client sends: trained ones and statistics.

  Args:
    model: Tells which those are.
    weights: Values to pick from; the model's own variables if `None`.
  """
  if weights is None:
    weights = model.weights()
  sent = {v.ref() for v in model.statistics}
  return tff.learning.models.ModelWeights(
      trainable=[tf.convert_to_tensor(w) for w in weights.trainable],
      non_trainable=[
          tf.convert_to_tensor(w)
          for v, w in zip(
              model.non_trainable_variables, weights.non_trainable, strict=True
          )
          if v.ref() in sent
      ],
  )


def participation(
    included: tf.Tensor, is_empty: tf.Tensor, bad_labels: tf.Tensor, finite: tf.Tensor
) -> collections.OrderedDict[str, tf.Tensor]:
  """A client's counts, int32 scalars: that it was there, and in or why not."""
  return collections.OrderedDict(
      num_clients=tf.constant(1),
      num_included=tf.cast(included, tf.int32),
      num_excluded_empty=tf.cast(is_empty, tf.int32),
      num_excluded_bad_labels=tf.cast(bad_labels, tf.int32),
      num_excluded_non_finite=tf.cast(~finite & ~bad_labels, tf.int32),
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


def _dataset_options() -> tf.data.Options:
  """For a few batches that are read once: tuning itself would cost as much."""
  options = tf.data.Options()
  options.autotune.enabled = False
  options.experimental_optimization.apply_default_optimizations = False
  options.threading.private_threadpool_size = 1
  options.threading.max_intra_op_parallelism = 1
  return options


class _Progress(NamedTuple):
  """What the training loop carries, beside the variables.

  Attributes:
    carry: The stepper's.
    loss_sum: float32, over the examples.
    num_examples: int32.
    num_batches: int32.
    bad_labels: Whether there were any so far.
    observed: The observer's sums.
  """

  carry: Any
  loss_sum: tf.Tensor
  num_examples: tf.Tensor
  num_batches: tf.Tensor
  bad_labels: tf.Tensor
  observed: Any


def build_training(
    model: models.KerasModel,
    target_models: dict[str, models.KerasModel],
    optimizer: optimizers.Optimizer,
    client_data: Optional[client_data_lib.ClientBatches],
    observer: Optional[companions.Observer] = None,
    extra_variables: Sequence[tf.Variable] = (),
    learning_rate_fn: Optional[LearningRateFn] = None,
):
  """A client's training as a function, to be called in a `tf.function`.

  Args:
    model: Is trained in place.
    target_models: What the terms compare it with, by the name of their target.
    optimizer: As `build_client_work` takes it.
    client_data: Where clients read their examples, if not from datasets.
    observer: Looks at each step, if something is to be added up over them.
    extra_variables: Trained, too; some term of the loss must depend on them.
    learning_rate_fn: The optimizer's rate in a round, if it changes.

  Returns:
    (hparams, data, round_num, local_terms, received, step_share) -> (num_examples,
    bad_labels, observed): the client's dataset or number, the terms of the loss beside
    the supervised one, the trainable weights as sent and the part of its steps that it
    does (all if `None`), to an int64, a bool and the observer's sums, () without one.
  """
  if client_data is not None and client_data.label_share < 1.0 and observer is not None:
    raise ValueError(
        'This algorithm adds up something by label over the steps, so all labels must be '
        f'known: `label_share` must be 1, found {client_data.label_share}.'
    )
  trainable = model.trainable_variables
  all_variables = [*trainable, *extra_variables]
  stepper = optimizers.build_stepper(optimizer, all_variables)

  def gradients_on(batch, step_num, labelled, local_terms, received):
    inputs, labels = models.split_batch(batch)
    target_logits = {
        name: target.logits(inputs) for name, target in target_models.items()
    }
    with tf.GradientTape() as tape:
      outputs = model.keras_model(inputs, training=True)
      labels, bad = model.usable_labels(labels, outputs.shape)
      supervised_loss = model.supervised_loss(labels, outputs, labelled)
      loss = supervised_loss
      for term in local_terms:
        loss = term(
            loss,
            local_terms_lib.LocalStep(
                inputs=inputs,
                logits=model.class_logits(outputs),
                labels=labels,
                labelled=labelled,
                target_logits=target_logits.get(term.target),
                supervised_loss=supervised_loss,
                step_num=step_num,
                weights=trainable,
                received=received,
                counted=model.counted_labels(labels),
                is_regression=model.is_regression,
            ),
        )
      loss += model.regularization_loss()
    model.update_metrics(labels, outputs, labelled)
    seen = ()
    if observer is not None:
      seen = observer.observe(model.class_logits(outputs), labels)
    gradients = tape.gradient(loss, all_variables)
    return loss, gradients, tf.shape(outputs)[0], bad, seen

  def step(
      progress: _Progress, batch: Any, extra: Any, may_be_empty: bool,
      labelled: Optional[tf.Tensor] = None,
  ):
    loss, gradients, batch_size, bad, seen = gradients_on(
        batch, progress.num_batches, labelled, *extra
    )
    carry = progress.carry
    loss_sum = loss * tf.cast(batch_size, loss.dtype)
    if may_be_empty:
      # Its mean loss is 0 / 0: it takes no step.
      loss_sum = tf.where(batch_size > 0, loss_sum, 0.0)
      carry = tf.cond(
          batch_size > 0, lambda: stepper.apply(carry, gradients), lambda: carry
      )
    else:
      carry = stepper.apply(carry, gradients)
    return _Progress(
        carry,
        progress.loss_sum + loss_sum,
        progress.num_examples + batch_size,
        progress.num_batches + 1,
        tf.logical_or(progress.bad_labels, bad),
        tf.nest.map_structure(tf.add, progress.observed, seen),
    )

  def train(
      hparams: Any,
      data: Any,
      round_num: tf.Tensor,
      local_terms: Sequence[local_terms_lib.LocalTerm],
      received: Sequence[tf.Tensor],
      step_share: Optional[tf.Tensor] = None,
  ):
    extra = local_terms, received
    if learning_rate_fn is not None:
      # The user's: AutoGraph reads it, if nothing else here.
      rate = tf.function(learning_rate_fn)(round_num)
      hparams = optimizers.with_learning_rate(hparams, rate)
    progress = _Progress(
        carry=stepper.begin(stepper.initialize(hparams)),
        loss_sum=tf.constant(0.0),
        num_examples=tf.constant(0),
        num_batches=tf.constant(0),
        bad_labels=tf.constant(False),
        observed=observer.zero() if observer is not None else (),
    )
    if client_data is None:
      batches = iter(data.with_options(_dataset_options()))

      def next_batch(_, progress: _Progress):
        batch = batches.get_next_as_optional()
        return tf.cond(
            batch.has_value(),
            lambda: (True, step(progress, batch.get_value(), extra, may_be_empty=True)),
            lambda: (False, progress),
        )

      _, progress = tf.while_loop(lambda more, _: more, next_batch, (True, progress))
    else:
      # Slices, not a `tf.data.Dataset`: its iterator costs as much as a small step.
      examples = client_data.data.open()
      rows, labelled = client_data.rows_and_labelled(data, round_num)
      if step_share is not None:
        rows = rows[: client_data.num_elements(tf.size(rows), step_share)]
      observed_inputs = client_data.input_mask(data)

      def next_slice(start: tf.Tensor, progress: _Progress):
        end = start + client_data.batch_size
        batch = client_data_lib.masked_inputs(
            raw_files.gather(examples, rows[start:end]), observed_inputs
        )
        mask = None if labelled is None else labelled[start:end]
        return end, step(progress, batch, extra, may_be_empty=False, labelled=mask)

      _, progress = tf.while_loop(
          lambda start, _: start < tf.size(rows), next_slice, (0, progress)
      )
    model.add_totals(
        progress.loss_sum, progress.num_examples, progress.num_batches
    )
    return (
        tf.cast(progress.num_examples, tf.int64),
        progress.bad_labels,
        progress.observed,
    )

  return train
