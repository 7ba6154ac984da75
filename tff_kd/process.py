"""One round as a federated computation: the state and how the stages compose.

```
 state -> distributor -> client_work -> aggregator (two channels) -> finalizer
                                             |                          |
                                             +-- knowledge -> server_distillation
```

`build_distillation_process` is the one composition; an algorithm chooses its
parts (see `tff_kd.algorithms`).
"""

import collections
from collections.abc import Mapping, Sequence
import types
from typing import Any, NamedTuple, Optional, Union

import keras
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
from tff_kd import models
from tff_kd import optimizers
from tff_kd import server_distillation as server_distillation_lib
from tff_kd import transfer
from tff_kd.privacy import differential
from tff_kd.privacy import secure as secure_lib


class StudentHistory(NamedTuple):
  """The students that were sent out in the last rounds.

  Attributes:
    sent: A `ModelWeights` (with cohorts, a tuple) whose arrays have a leading axis of
      `history_size`; zeros where none was sent yet.
    num_sent: int32, how many were sent so far, in rounds that were not skipped.
  """

  sent: Any
  num_sent: Any


class DistillationState(NamedTuple):
  """The state of a distillation process.

  Attributes:
    global_model_weights: The student's `ModelWeights`, after distillation. Of several
      cohorts: a tuple of theirs, here and in the next two.
    aggregated_model_weights: The student as plain aggregation left it this round,
      before the server's distillation. () without one.
    teacher_weights: The teacher's `ModelWeights`, or () without a teacher.
    student_history: A `StudentHistory`; () unless clients learn from it.
    round_num: int32, the number of finished rounds.
    distributor: State of the distributor.
    client_work: State of the client work (the client optimizer's hyperparameters).
    aggregator: The states of the two channels' aggregators.
    finalizer: The student server optimizer's state.
    server_distillation: The states of the server's distillation optimizers.
    companion: The companion's server state, or ().
    broadcasts: What was sent in the last rounds, where clients may be late; else ().
  """

  global_model_weights: Any
  aggregated_model_weights: Any
  teacher_weights: Any
  student_history: Any
  round_num: Any
  distributor: Any
  client_work: Any
  aggregator: Any
  finalizer: Any
  server_distillation: Any
  companion: Any
  broadcasts: Any


class CodedBytes(NamedTuple):
  """The sizes of what is coded, of which the types tell nothing; `None`: not coded.

  Attributes:
    shared: Of what goes down beside the round's number.
    knowledge: Of a client's predictions.
  """

  shared: Optional[int] = None
  knowledge: Optional[int] = None


_NOT_CODED = CodedBytes()
_NO_TEACHER = (
    'This process has no teacher. Build one with `teacher_fn`, for example '
    '`tff_kd.algorithms.build_fed_distillation`.'
)


class Guard(NamedTuple):
  """How what clients send is guarded.

  Attributes:
    channels: What they send, of 'model' and 'knowledge'.
    privacy: The `DifferentialPrivacy`, or `None`.
    secure_aggregation: The `SecureAggregation`, or `None`.
  """

  channels: tuple[str, ...] = ()
  privacy: Optional[differential.DifferentialPrivacy] = None
  secure_aggregation: Optional[secure_lib.SecureAggregation] = None


_NO_GUARD = Guard()


def _keras_models(students: cohorts.Students, weights: Any) -> Any:
  """A Keras model, or a list of them by cohort."""
  models_by_cohort = [
      spec.to_keras(its) for spec, its in zip(students.specs, students.unpack(weights))
  ]
  return models_by_cohort if students.has_cohorts else models_by_cohort[0]


class _KerasOut:
  """How the models of a process come out of its state."""

  def to_keras(self, state: Any) -> Any:
    """The student as a Keras model.

    Args:
      state: The process's state.

    Returns:
      A new `keras.Model` of the builder, with the student's weights and statistics; with
      cohorts, a list of them.

    Raises:
      ValueError: If the server has no student.
    """
    if self.get_model_weights is None:
      raise ValueError(
          'The server of this process has no student: each client keeps its own model, '
          "in its `ClientState`'s `weights`."
      )
    return _keras_models(self.students, state.global_model_weights)

  def teacher_to_keras(self, state: Any) -> keras.Model:
    """The teacher as a Keras model.

    Raises:
      ValueError: If the process has no teacher.
    """
    if self.teacher_spec is None:
      raise ValueError(_NO_TEACHER)
    return self.teacher_spec.to_keras(state.teacher_weights)


class DistillationProcess(_KerasOut, tff.learning.templates.LearningProcess):
  """A `LearningProcess` for a student that may also carry a teacher.

  `to_keras(state)` gives the student as a Keras model, `teacher_to_keras(state)` the
  teacher.

  `get_model_weights` and `set_model_weights` are the student's, as everywhere in
  `tff.learning`.

  Attributes:
    broadcast_type: The `tff.Type` that goes down to each client.
    update_type: The `tff.Type` that comes up from each client, channel by channel,
      before its aggregator encodes it.
    client_data: The `ClientBatches` that clients read by number; `None` if `next` takes
      datasets.
    students: The `cohorts.Students`: one architecture, or one a cohort.
    student_spec: The (first) student's `ModelSpec`.
    teacher_spec: The teacher's `ModelSpec`, or `None`.
    transfer_set: The `TransferSet`, or `None`.
    coded_bytes: The `CodedBytes` of one message without a previous one.
    exchanged_bytes: What a client moves down and up in a companion's exchange.
    aggregated_bytes: What a client hands to each channel's own aggregator, by channel.
    guard: How what clients send is private and secure.
  """

  def __init__(
      self,
      *args,
      get_teacher_weights_fn: Optional[tff.Computation],
      set_teacher_weights_fn: Optional[tff.Computation],
      broadcast_type: tff.Type,
      update_type: tff.Type,
      students: cohorts.Students,
      teacher_spec: Optional[models.ModelSpec],
      transfer_set: Optional[transfer.TransferSet],
      client_data: Optional[client_data_lib.ClientBatches] = None,
      coded_bytes: CodedBytes = _NOT_CODED,
      exchanged_bytes: tuple[int, int] = (0, 0),
      aggregated_bytes: Mapping[str, int] = types.MappingProxyType({}),
      guard: Guard = _NO_GUARD,
      **kwargs,
  ):
    super().__init__(*args, **kwargs)
    self._get_teacher_weights = get_teacher_weights_fn
    self._set_teacher_weights = set_teacher_weights_fn
    self.broadcast_type = broadcast_type
    self.update_type = update_type
    self.students = students
    self.student_spec = students.first
    self.teacher_spec = teacher_spec
    self.transfer_set = transfer_set
    self.client_data = client_data
    self.coded_bytes = coded_bytes
    self.exchanged_bytes = exchanged_bytes
    self.aggregated_bytes = aggregated_bytes
    self.guard = guard

  @property
  def get_teacher_weights(self) -> tff.Computation:
    """A `tff.Computation` (S -> teacher's `ModelWeights`).

    Raises:
      ValueError: If the process has no teacher.
    """
    self._check_has_teacher()
    return self._get_teacher_weights

  @property
  def set_teacher_weights(self) -> tff.Computation:
    """A `tff.Computation` (<S, teacher's `ModelWeights`> -> S).

    Raises:
      ValueError: If the process has no teacher.
    """
    self._check_has_teacher()
    return self._set_teacher_weights

  def _check_has_teacher(self) -> None:
    if self._get_teacher_weights is None:
      raise ValueError(_NO_TEACHER)


class PrivateOutput(NamedTuple):
  """What a round leaves, where clients have states of their own.

  Attributes:
    state: The server's next state.
    client_states: The clients' next `ClientState`s, in their order.
    metrics: As of a `LearningProcess`.
  """

  state: Any
  client_states: Any
  metrics: Any


class PrivateProcess(_KerasOut, tff.templates.IterativeProcess):
  """Rounds of clients that keep something for themselves.

  `next` has the type (<S@SERVER, {D}@CLIENTS, {ClientState}@CLIENTS> ->
  PrivateOutput). `tff_kd.simulation.ClientStates` keeps the clients' states.

  Attributes:
    initialize_client: A `tff.Computation` ( -> ClientState); where `clients` are of
      several cohorts, a tuple of such, by cohort.
    clients: The `cohorts.Students` of the models that clients keep; `None` if they keep
      something else. A state's `weights` then are a tuple, too, of which a client has
      its cohort's.
    get_model_weights: A `tff.Computation` (S -> the server's student's
      `ModelWeights`), or `None` where the server has none.
    set_model_weights: (<S, `ModelWeights`> -> S), or `None`.
    get_teacher_weights: Likewise of the teacher, or `None`.
    set_teacher_weights: Likewise.
    broadcast_type: The `tff.Type` that goes down to each client.
    update_type: The `tff.Type` that comes up.
    client_data: The `ClientBatches` that clients read by number; `None` if `next` takes
      datasets.
    students: The `cohorts.Students` of the server (of the clients' models, where it
      has none).
    student_spec: The first of them.
    teacher_spec: The teacher's `ModelSpec`, or `None`.
    transfer_set: The `TransferSet`, or `None`.
    coded_bytes: The `CodedBytes` of one message without a previous one.
    exchanged_bytes: What a client moves down and up in a companion's exchange.
    aggregated_bytes: What a client hands to each channel's own aggregator, by channel.
    guard: How what clients send is private and secure.
  """

  def __init__(
      self,
      initialize_fn: tff.Computation,
      next_fn: tff.Computation,
      *,
      initialize_client_fn: tff.Computation,
      clients: Optional[cohorts.Students],
      broadcast_type: tff.Type,
      update_type: tff.Type,
      students: cohorts.Students,
      transfer_set: Optional[transfer.TransferSet],
      client_data: Optional[client_data_lib.ClientBatches] = None,
      teacher_spec: Optional[models.ModelSpec] = None,
      get_model_weights_fn: Optional[tff.Computation] = None,
      set_model_weights_fn: Optional[tff.Computation] = None,
      get_teacher_weights_fn: Optional[tff.Computation] = None,
      set_teacher_weights_fn: Optional[tff.Computation] = None,
      coded_bytes: CodedBytes = _NOT_CODED,
      exchanged_bytes: tuple[int, int] = (0, 0),
      aggregated_bytes: Mapping[str, int] = types.MappingProxyType({}),
      guard: Guard = _NO_GUARD,
  ):
    super().__init__(initialize_fn, next_fn)
    self.initialize_client = initialize_client_fn
    self.clients = clients
    self.get_model_weights = get_model_weights_fn
    self.set_model_weights = set_model_weights_fn
    self.get_teacher_weights = get_teacher_weights_fn
    self.set_teacher_weights = set_teacher_weights_fn
    self.broadcast_type = broadcast_type
    self.update_type = update_type
    self.students = students
    self.student_spec = students.first
    self.teacher_spec = teacher_spec
    self.transfer_set = transfer_set
    self.client_data = client_data
    self.coded_bytes = coded_bytes
    self.exchanged_bytes = exchanged_bytes
    self.aggregated_bytes = aggregated_bytes
    self.guard = guard


def build_distillation_process(
    student: Union[models.ModelSpec, cohorts.Students],
    *,
    client_optimizer: optimizers.Optimizer,
    client_data: Optional[client_data_lib.ClientBatches] = None,
    teacher: Optional[models.ModelSpec] = None,
    transfer_set: Optional[transfer.TransferSet] = None,
    stages: Sequence[server_distillation_lib.DistillationStage] = (),
    consensus_rule: knowledge.ConsensusRule = knowledge.MeanLogits(),
    local_terms: Sequence[local_terms_lib.LocalTerm] = (),
    server_optimizer: Optional[optimizers.Optimizer] = None,
    client_weighting: tff.learning.ClientWeighting = (
        tff.learning.ClientWeighting.NUM_EXAMPLES
    ),
    knowledge_weighting: Optional[tff.learning.ClientWeighting] = None,
    model_aggregator: Optional[aggregation.AggregationFactory] = None,
    knowledge_aggregator: Optional[aggregation.AggregationFactory] = None,
    metrics_aggregator: Optional[Any] = None,
    companion: Optional[companions.Companion] = None,
    learning_rate_fn: Optional[client_work_lib.LearningRateFn] = None,
    reporting: Optional[conditions_lib.Reporting] = None,
    privacy: Optional[differential.DifferentialPrivacy] = None,
    secure_aggregation: Optional[secure_lib.SecureAggregation] = None,
    seed: int = 0,
) -> Union[DistillationProcess, PrivateProcess]:
  """Composes the stages of one round into a learning process.

  Args:
    student: The model that clients train, or those of the cohorts.
    client_optimizer: The clients' TFF optimizer, or a function that returns a
      Keras one.
    client_data: Where and how clients read their examples. `next` then takes
      clients' numbers in place of their datasets; nothing else is as fast. With
      cohorts, `next` takes {'cohort': number, 'data': dataset or number} a client.
    teacher: The server's model, if it has one.
    transfer_set: The examples on which knowledge is exchanged, if it is.
    stages: The server's distillation, in order; none if empty.
    consensus_rule: How the clients' predictions become the ensemble's.
    local_terms: Terms of the clients' loss beside the supervised one, in order.
    server_optimizer: Applies the mean delta to the student (FedOpt); plain
      averaging (SGD with rate 1) if `None`.
    client_weighting: A client's weight in the mean delta: its number of examples,
      or 1 (`UNIFORM`).
    knowledge_weighting: Its weight in the consensus; as `client_weighting` if
      `None`.
    model_aggregator: Aggregates the deltas; the weighted mean if `None`, as
      `tff.aggregators.MeanFactory()` but with the products made by the clients.
      Unweighted factories get no weights.
    knowledge_aggregator: Aggregates the predictions, likewise.
    metrics_aggregator: As in `tff.learning.algorithms`.
    companion: What takes part in a client's round beside the student.
    learning_rate_fn: Maps a round's number, an int32 tensor from 0, to the clients'
      learning rate in it, as in TFF's
      `build_weighted_fed_avg_with_optimizer_schedule`; needs a TFF optimizer.
    reporting: How late, partial and too few reports are taken. `next` then takes
      {'data': number, 'conditions': `ClientConditions`} a client. Needs `client_data`.
    privacy: Makes what clients send differentially private, all channels together; no
      client's metrics are then released. Needs UNIFORM weights.
    secure_aggregation: Sums what clients send as a secure protocol would.
    seed: With the round number, decides the server's order of examples.

  Returns:
    A `DistillationProcess`; a `PrivateProcess` if clients keep a companion's state.

  Raises:
    TypeError, ValueError: If the parts do not fit together.
  """
  students = cohorts.as_students(student)
  student = students.first
  if teacher is not None:
    models.check_same_outputs(student, teacher)
  if transfer_set is not None:
    transfer_set = transfer.as_transfer_set(transfer_set)
    check_transfer_set(transfer_set, student)
  if stages and transfer_set is None:
    raise ValueError('Distillation on the server needs a `transfer_set`.')
  if stages:
    server_distillation_lib.check_stages(
        stages,
        has_teacher=teacher is not None,
        labelled=transfer_set.labelled,
        has_validation=transfer_set.validation_size > 0,
        has_diversity=consensus_rule.has_diversity,
    )
  history_size = _check_local_terms(local_terms, has_teacher=teacher is not None)
  if client_data is not None:
    check_client_data(client_data, student)
  optimizers.check_optimizer(client_optimizer, 'client_optimizer')
  optimizers.check_learning_rate_fn(learning_rate_fn, client_optimizer)
  check_reporting(reporting, client_data)
  if server_optimizer is None:
    server_optimizer = tff.learning.optimizers.build_sgdm(1.0)
  optimizers.check_optimizer(server_optimizer, 'server_optimizer')
  uses_ensemble = any(s.distillation.uses_ensemble for s in stages)
  if knowledge_aggregator is not None and not uses_ensemble:
    raise ValueError(
        'There are no predictions for `knowledge_aggregator` to aggregate: no stage '
        'distils from the ensemble.'
    )
  if uses_ensemble:
    # Refuses what the rule cannot say of such predictions.
    consensus_rule.payload_spec(student.logits_shape, transfer_set.num_predictions)
  _check_companion(companion, consensus_rule if uses_ensemble else None, client_data)
  has_client_state = companion is not None and companion.has_client_state
  guard = Guard(
      ('model', 'knowledge') if uses_ensemble else ('model',),
      privacy,
      secure_aggregation,
  )
  model_aggregator, knowledge_aggregator = build_guarded_aggregators(
      guard,
      model_aggregator,
      knowledge_aggregator,
      weightings=dict(
          client_weighting=client_weighting,
          knowledge_weighting=knowledge_weighting or client_weighting,
      ),
      metrics_aggregator=metrics_aggregator,
      rule=consensus_rule if uses_ensemble else None,
      num_predictions=transfer_set.num_predictions if uses_ensemble else 1,
      has_cohorts=students.has_cohorts,
      reporting=reporting,
      companion=companion,
  )

  client_work = client_work_lib.build_client_work(
      students,
      optimizer=client_optimizer,
      model_weighting=client_weighting,
      knowledge_weighting=knowledge_weighting or client_weighting,
      multiplied=client_work_lib.ClientUpdate(
          model=model_aggregator is None, knowledge=knowledge_aggregator is None
      ),
      client_data=client_data,
      transfer_set=transfer_set if uses_ensemble else None,
      teacher=teacher,
      consensus_rule=consensus_rule,
      local_terms=local_terms,
      companion=companion,
      learning_rate_fn=learning_rate_fn,
      reporting=reporting,
      releases_metrics=privacy is None,
      seed=seed,
  )
  broadcast_type = client_work.broadcast_type
  broadcasts = client_work.broadcast_history
  distributor = tff.learning.templates.build_broadcast_process(broadcasts.sent_type)
  aggregator, aggregated_bytes = aggregation.build_client_output_aggregator(
      client_work.output_type,
      client_work.metric_finalizers,
      model_factory=model_aggregator,
      knowledge_factory=knowledge_aggregator,
      metrics_aggregator=metrics_aggregator,
      secure=secure_aggregation,
  )
  finalizer = build_student_finalizer(students, server_optimizer)
  server_distillation = None
  if stages:
    server_distillation = server_distillation_lib.build_server_distillation(
        students,
        teacher,
        transfer_set,
        stages,
        consensus_rule=consensus_rule,
        seed=seed,
    )
  coded_bytes = _NOT_CODED
  if uses_ensemble and consensus_rule.is_coded:
    coded_bytes = CodedBytes(
        knowledge=consensus_rule.first_message_bytes(
            student.logits_shape, transfer_set.num_predictions
        )
    )
  broadcasts_teacher = len(tff.structure.flatten(broadcast_type.teacher)) > 0
  broadcasts_round = isinstance(broadcast_type.round_num, tff.TensorType)

  @graphs.computation()
  def initial_student():
    return tf.nest.map_structure(tf.constant, students.initial_weights)

  @graphs.computation()
  def initial_teacher():
    if teacher is None:
      return ()
    return tf.nest.map_structure(tf.constant, teacher.initial_weights)

  initial_history, remember = _build_history(students, history_size)

  @graphs.computation()
  def initial_companion():
    return companion.initial_server_state() if companion is not None else ()

  @tff.federated_computation
  def init_fn():
    weights = tff.federated_eval(initial_student, tff.SERVER)
    nothing = tff.federated_value((), tff.SERVER)
    return tff.federated_zip(
        DistillationState(
            global_model_weights=weights,
            aggregated_model_weights=weights if stages else nothing,
            teacher_weights=tff.federated_eval(initial_teacher, tff.SERVER),
            student_history=tff.federated_eval(initial_history, tff.SERVER),
            round_num=tff.federated_value(np.int32(0), tff.SERVER),
            distributor=distributor.initialize(),
            client_work=client_work.initialize(),
            aggregator=aggregator.initialize(),
            finalizer=finalizer.initialize(),
            server_distillation=(
                server_distillation.initialize() if stages else nothing
            ),
            companion=tff.federated_eval(initial_companion, tff.SERVER),
            broadcasts=tff.federated_eval(broadcasts.initial, tff.SERVER),
        )
    )

  state_type = init_fn.type_signature.result
  client_data_type = tff.FederatedType(client_work.data_type, tff.CLIENTS)

  @graphs.computation(np.int32)
  def add_one(x):
    return x + 1

  @graphs.computation(state_type.member.companion)
  def broadcast_companion(server_state):
    return companion.broadcast(server_state) if companion is not None else ()

  keep_or_skip = None
  if reporting is not None and reporting.min_reports:
    keep_or_skip = build_skipping(
        state_type.member, reporting.min_reports, ('round_num', 'broadcasts')
    )

  def run_round(state, client_data, client_states):
    """One round: the next state, what a companion leaves, the metrics."""
    nothing = tff.federated_value((), tff.SERVER)
    # Down.
    history, mean_of_history = state.student_history, nothing
    if history_size:
      history, mean_of_history = tff.federated_map(
          remember,
          (state.student_history, state.global_model_weights),
      )
    sent = tff.federated_zip(
        client_work_lib.Broadcast(
            student=state.global_model_weights,
            teacher=state.teacher_weights if broadcasts_teacher else nothing,
            student_history=mean_of_history,
            round_num=state.round_num if broadcasts_round else nothing,
            companion=(
                tff.federated_map(broadcast_companion, state.companion)
                if companion is not None
                else nothing
            ),
        )
    )
    new_broadcasts = nothing
    if broadcasts.max_delay:
      new_broadcasts, sent = tff.federated_map(
          broadcasts.push, (state.broadcasts, sent)
      )
    distributed = distributor.next(state.distributor, sent)
    # Local work, and up.
    arguments = (
        tff.federated_broadcast(state.client_work),
        distributed.result,
        client_data,
    )
    companion_state, companion_metrics, new_client_states = nothing, nothing, None
    if companion is None:
      output = tff.federated_map(client_work.next, arguments)
    else:
      output, left = tff.federated_map(
          client_work.next, (*arguments, client_states)
      )
      new_client_states = left.client_state
      companion_state, companion_metrics = companion.exchange(
          state.companion, left.exchanged, state.round_num
      )
    aggregated = aggregator.next(state.aggregator, output)
    # The student moves along the mean delta.
    finalized = finalizer.next(
        state.finalizer, state.global_model_weights, aggregated.result.model
    )
    # The server distils.
    student_weights, teacher_weights = finalized.result, state.teacher_weights
    distillation_state, distillation_metrics = nothing, nothing
    if stages:
      distilled = server_distillation.next(
          state.server_distillation,
          tff.federated_zip(
              server_distillation_lib.ServerModels(
                  student=student_weights, teacher=teacher_weights
              )
          ),
          aggregated.result.knowledge if uses_ensemble else nothing,
          state.round_num,
      )
      student_weights = distilled.result.student
      teacher_weights = distilled.result.teacher
      distillation_state = distilled.state
      distillation_metrics = distilled.measurements

    new_state = tff.federated_zip(
        DistillationState(
            global_model_weights=student_weights,
            aggregated_model_weights=finalized.result if stages else nothing,
            teacher_weights=teacher_weights,
            student_history=history,
            round_num=tff.federated_map(add_one, state.round_num),
            distributor=distributed.state,
            client_work=state.client_work,
            aggregator=aggregated.state,
            finalizer=finalized.state,
            server_distillation=distillation_state,
            companion=companion_state,
            broadcasts=new_broadcasts,
        )
    )
    participation = aggregated.measurements.client_work['participation']
    skipped = nothing
    if reporting is not None and reporting.min_reports:
      new_state, skipped = tff.federated_map(
          keep_or_skip, (state, new_state, participation['num_included'])
      )
    metrics = tff.federated_zip(
        collections.OrderedDict(
            distributor=distributed.measurements,
            client_work=(
                aggregated.measurements.client_work if privacy is None else nothing
            ),
            aggregator=aggregated.measurements.aggregator,
            finalizer=finalized.measurements,
            server_distillation=distillation_metrics,
            companion=companion_metrics,
            round_skipped=skipped,
        )
    )
    return new_state, new_client_states, metrics

  member = state_type.member

  if has_client_state:

    @tff.federated_computation(
        state_type,
        client_data_type,
        tff.FederatedType(
            client_work_lib.type_of(companion.initial_client_state()),
            tff.CLIENTS,
        ),
    )
    def next_fn(state, client_data, client_states):
      return PrivateOutput(*run_round(state, client_data, client_states))

  else:

    @tff.federated_computation(state_type, client_data_type)
    def next_fn(state, client_data):
      no_states = tff.federated_value((), tff.CLIENTS)
      new_state, _, metrics = run_round(state, client_data, no_states)
      return tff.learning.templates.LearningProcessOutput(new_state, metrics)

  # Selections only: nothing to trace.
  def build_getter(field):
    @tff.federated_computation(member)
    def get_fn(state):
      return getattr(state, field)

    return get_fn

  def build_setter(field):
    @tff.federated_computation(member, getattr(member, field))
    def set_fn(state, value):
      return _replaced(state, {field: value})

    return set_fn

  @tff.federated_computation(member)
  def get_hparams_fn(state):
    return collections.OrderedDict(
        client_work=client_work.get_hparams(state.client_work),
        finalizer=finalizer.get_hparams(state.finalizer),
    )

  @tff.federated_computation(member, get_hparams_fn.type_signature.result)
  def set_hparams_fn(state, hparams):
    changed = {
        'client_work': client_work.set_hparams(
            state.client_work, hparams['client_work']
        ),
        'finalizer': finalizer.set_hparams(state.finalizer, hparams['finalizer']),
    }
    return _replaced(state, changed)

  has_teacher = teacher is not None
  shared = dict(
      get_teacher_weights_fn=build_getter('teacher_weights') if has_teacher else None,
      set_teacher_weights_fn=build_setter('teacher_weights') if has_teacher else None,
      broadcast_type=broadcast_type,
      update_type=client_work.output_type.update,
      students=students,
      teacher_spec=teacher,
      transfer_set=transfer_set,
      client_data=client_data,
      coded_bytes=coded_bytes,
      exchanged_bytes=companion.exchange_bytes() if companion is not None else (0, 0),
      aggregated_bytes=aggregated_bytes,
      guard=guard,
  )
  get_model_weights = build_getter('global_model_weights')
  set_model_weights = build_setter('global_model_weights')
  if has_client_state:
    return PrivateProcess(
        init_fn,
        next_fn,
        initialize_client_fn=graphs.computation()(companion.initial_client_state),
        clients=(
            cohorts.as_students(companion.client_spec)
            if companion.client_spec is not None
            else None
        ),
        get_model_weights_fn=get_model_weights,
        set_model_weights_fn=set_model_weights,
        **shared,
    )
  return DistillationProcess(
      init_fn,
      next_fn,
      get_model_weights,
      set_model_weights,
      get_hparams_fn=get_hparams_fn,
      set_hparams_fn=set_hparams_fn,
      **shared,
  )


def _build_history(students: cohorts.Students, size: int):
  """The computations that keep the last students: ( -> H), (<H, w, n> -> <H, mean>).

  Args:
    students: The student, or those of the cohorts.
    size: How many to keep; with 0 the history is (), and never to be updated.
  """

  @graphs.computation()
  def initial_history():
    if not size:
      return ()
    sent = tf.nest.map_structure(
        lambda w: tf.zeros([size, *w.shape], w.dtype), students.initial_weights
    )
    return StudentHistory(sent, tf.constant(0))

  if not size:
    return initial_history, None

  @graphs.computation(initial_history.type_signature.result, students.weights_type)
  def remember(history, weights):
    place = [[history.num_sent % size]]
    sent = tf.nest.map_structure(
        lambda its, w: tf.tensor_scatter_nd_update(its, place, [w]),
        history.sent, weights,
    )
    # Not the round's number: a round that is skipped leaves the history as it was.
    num_sent = history.num_sent + 1
    count = tf.minimum(num_sent, size)

    def mean(its, w):
      # What is no real number (a counter) has no mean: its last value.
      if not w.dtype.is_floating:
        return w
      return tf.reduce_sum(its, 0) / tf.cast(count, its.dtype)

    mean_of_history = tf.nest.map_structure(mean, sent, weights)
    return StudentHistory(sent, num_sent), mean_of_history

  return initial_history, remember


def build_skipping(
    state_type: tff.Type, min_reports: int, kept: Sequence[str]
) -> tff.Computation:
  """What skips a round with too few reports.

  Args:
    state_type: The type of the server's state, a NamedTuple.
    min_reports: How many are enough.
    kept: The fields that a skipped round changes all the same.

  Returns:
    A `tff.Computation` (<state before, state after, number of reports> -> <next state,
    int32 1 if the round is skipped>).
  """

  @graphs.computation(state_type, state_type, np.int32)
  def keep_or_skip(before, after, num_reports):
    skipped = num_reports < min_reports
    fields = {}
    for name in state_type.python_container._fields:
      new = getattr(after, name)
      fields[name] = new
      if name not in kept:
        fields[name] = tf.nest.map_structure(
            lambda old, new: tf.where(skipped, old, new), getattr(before, name), new
        )
    return state_type.python_container(**fields), tf.cast(skipped, tf.int32)

  return keep_or_skip


def build_guarded_aggregators(
    guard: Guard,
    model_aggregator: Optional[aggregation.AggregationFactory],
    knowledge_aggregator: Optional[aggregation.AggregationFactory],
    *,
    weightings: Mapping[str, tff.learning.ClientWeighting],
    metrics_aggregator: Any,
    rule: Optional[knowledge.ConsensusRule],
    num_predictions: int,
    has_cohorts: bool,
    reporting: Optional[conditions_lib.Reporting],
    companion: Optional[companions.Companion] = None,
) -> tuple[Any, Any]:
  """The factories of both channels: those given, or those of the guard.

  Args:
    guard: How what clients send is guarded.
    model_aggregator: As given.
    knowledge_aggregator: As given.
    weightings: Clients' weights, by the argument that says so.
    metrics_aggregator: As given.
    rule: How predictions are combined; `None` without a transfer set.
    num_predictions: How many examples they are about.
    has_cohorts: Whether there are several.
    reporting: As given.
    companion: As given.

  Raises:
    TypeError, ValueError: If a guarantee would be false, or the parts do not fit.
  """
  given = dict(model=model_aggregator, knowledge=knowledge_aggregator)
  if guard.privacy is not None:
    differential.check_private(
        guard.privacy,
        has_cohorts=has_cohorts,
        weightings=weightings,
        aggregators={f'{name}_aggregator': its for name, its in given.items()},
        metrics_aggregator=metrics_aggregator,
        rule=rule,
        reporting=reporting,
        companion=companion,
    )
  factories = differential.build_aggregators(
      guard.channels,
      given,
      privacy=guard.privacy,
      secure=guard.secure_aggregation,
      # A client with conditions may predict on some of the examples only.
      has_unit_weights=(
          rule is not None and rule.has_unit_weights and reporting is None
      ),
      num_predictions=num_predictions,
      rule=rule,
      companion=companion,
  )
  return factories['model'], factories['knowledge']


def check_reporting(
    reporting: Optional[conditions_lib.Reporting],
    client_data: Optional[client_data_lib.ClientBatches],
) -> None:
  """Refuses a `Reporting` that is none, or that lacks clients' numbers."""
  if reporting is None:
    return
  if not isinstance(reporting, conditions_lib.Reporting):
    raise TypeError(f'`reporting` must be a `tff_kd.Reporting`, found {reporting!r}.')
  if client_data is None:
    raise ValueError(
        '`reporting` needs clients that read their examples by reference: pass '
        '`client_data=`.'
    )


def _check_local_terms(
    terms: Sequence[local_terms_lib.LocalTerm], *, has_teacher: bool
) -> int:
  """Refuses terms that lack something; returns how many students to remember."""
  history_sizes = set()
  for term in terms:
    if not isinstance(term, local_terms_lib.LocalTerm):
      raise TypeError(
          '`local_terms` must be a list of `tff_kd.local_terms.LocalTerm`s, found '
          f'{term!r}.'
      )
    if term.target not in (None, *local_terms_lib.TARGETS):
      raise ValueError(
          f'The `target` of a local term must be one of {local_terms_lib.TARGETS} '
          f'or None, found {term.target!r}.'
      )
    if term.target == 'teacher' and not has_teacher:
      raise ValueError(
          "A local term with target='teacher' needs a teacher; pass `teacher_fn`."
      )
    if term.target == 'student_history':
      history_sizes.add(term.history_size)
  if len(history_sizes) > 1:
    raise ValueError(
        'Local terms must agree on `history_size`, found '
        f'{sorted(history_sizes)}.'
    )
  return max(history_sizes, default=0)


def _check_companion(
    companion: Optional[companions.Companion],
    rule: Optional[knowledge.ConsensusRule],
    client_data: Optional[client_data_lib.ClientBatches],
) -> None:
  """Refuses a companion, or none, that does not go with the rest.

  Args:
    companion: The companion.
    rule: How the clients' predictions are combined; `None` if they are not used.
    client_data: Where clients read their examples, if not from datasets.
  """
  gives = companion is not None and companion.gives_certainty
  needs = rule is not None and rule.needs_certainty
  if needs and not gives:
    raise ValueError(
        f'The rule {rule!r} weighs by a certainty that is given, but no companion '
        'gives one. Pass `companion=tff_kd.certainty.CertaintyScorer(...)`, or a rule '
        "that takes it from the predictions, such as CertaintyWeighted('variance')."
    )
  if gives and not needs:
    raise ValueError(
        "A companion that gives clients' certainties needs a distillation from the "
        f"ensemble and a rule that weighs by them, CertaintyWeighted('given'), found "
        f'{rule!r}.'
    )
  if companion is not None and companion.needs_client_number and client_data is None:
    raise ValueError(
        'This companion needs clients that read their examples by reference: pass '
        '`client_data=`. (For a private certainty: a dataset may hold an example '
        'several times, and the noise covers one.) Without noise, epsilon=None, '
        'datasets will do.'
    )


def _replaced(state: tff.Value, changed: Mapping[str, Any]) -> DistillationState:
  """A state in a TFF computation, where it has no `_replace`, with other fields."""
  return DistillationState(**{
      field: changed.get(field, getattr(state, field))
      for field in DistillationState._fields
  })


def _is_compatible(expected: Any, found: Any) -> bool:
  """Whether batches of one spec can stand for batches of the other."""
  try:
    tf.nest.assert_same_structure(expected, found)
  except (TypeError, ValueError):
    return False
  return all(
      e.dtype == f.dtype and e.shape[1:].is_compatible_with(f.shape[1:])
      for e, f in zip(tf.nest.flatten(expected), tf.nest.flatten(found))
  )


def check_client_data(
    client_data: client_data_lib.ClientBatches, student: models.ModelSpec
) -> None:
  """Refuses client data that is no `ClientBatches`, or does not fit the model."""
  if not isinstance(client_data, client_data_lib.ClientBatches):
    raise TypeError(
        '`client_data` must be a `tff_kd.ClientBatches`, which says how clients read '
        f'a `tff_kd.FileClientData`, found {client_data!r}.'
    )
  if not _is_compatible(student.input_spec, client_data.element_spec):
    raise ValueError(
        '`input_spec` and `client_data` must have batches of one kind, found '
        f'{student.input_spec} and {client_data.element_spec}. Pass '
        '`input_spec=client_data.element_spec`.'
    )


def check_transfer_set(
    transfer_set: transfer.TransferSet, student: models.ModelSpec
) -> None:
  """Refuses transfer examples that the models cannot take."""

  inputs_spec, labels_spec = models.split_batch(student.input_spec)
  parts = [('inputs', inputs_spec, transfer_set.inputs_spec)]
  if transfer_set.labelled:
    parts.append(('labels', labels_spec, transfer_set.labels_spec))
  for what, expected, found in parts:
    if not _is_compatible(expected, found):
      raise ValueError(
          f"The transfer set's {what} must be like the clients' {what}: expected "
          f'{expected}, found {found}. Convert them to that shape and dtype.'
      )
  if transfer_set.labelled:
    rows = tf.range(transfer_set.size)
    known = tf.boolean_mask(
        transfer_set.gather_labels(rows),
        transfer_set.gather_label_weights(rows) > 0.0,
    )
    outputs_shape = tf.TensorShape([None]).concatenate(student.outputs_shape)
    _, bad = student.usable_labels(known, outputs_shape)
    if bad:
      is_binary = student.logits_shape[-1] == 1
      raise ValueError(
          "The transfer set's labels must be "
          + ('0, 1 or between' if is_binary else 'class numbers from 0 to ')
          + ('' if is_binary else f'{student.logits_shape[-1] - 1}')
          + f', found {known.numpy().min()} to '
          f'{known.numpy().max()}. Mend them, or mark them as unknown in '
          '`label_mask`.'
      )


def build_student_finalizer(
    students: cohorts.Students, optimizer: optimizers.Optimizer
) -> tff.learning.templates.FinalizerProcess:
  """Moves the student, or each cohort's, along the mean delta.

  Trainable weights take a step of the server optimizer (FedOpt); the statistics
  that layers keep (batch norm) take the mean itself. An update that is not
  finite, such as the mean over no client, is rejected whole.

  Args:
    students: The student, or those of the cohorts.
    optimizer: A TFF optimizer, or a function that returns a Keras one.

  Returns:
    A `FinalizerProcess`. `update_non_finite` is 1 if the update was rejected; with
    cohorts, it counts those whose update was, also because none of its clients took
    part.
  """
  weights_type = students.weights_type
  steppers = [
      optimizers.build_stepper(optimizer, spec.trainable_variables)
      for spec in students.specs
  ]

  @graphs.computation()
  def init_tf():
    return students.pack([stepper.initialize() for stepper in steppers])

  state_type = init_tf.type_signature.result

  def finalize(stepper, state, weights, update):
    finite = graphs.all_finite(update)

    def apply():
      new_state, trainable = stepper.apply(
          state, weights.trainable, list(update.trainable)
      )
      statistics = [w - u for w, u in zip(weights.non_trainable, update.non_trainable)]
      return new_state, tff.learning.models.ModelWeights(list(trainable), statistics)

    new_state, new_weights = tf.cond(finite, apply, lambda: (state, weights))
    return new_state, new_weights, tf.cast(~finite, tf.int32)

  # A mean over clients has the type of what is averaged.
  @graphs.computation(state_type, weights_type, weights_type)
  def next_tf(state, weights, update):
    results = [
        finalize(*its)
        for its in zip(steppers, *map(students.unpack, (state, weights, update)))
    ]
    states, new_weights, rejected = zip(*results)
    measurements = collections.OrderedDict(update_non_finite=tf.add_n(rejected))
    return students.pack(states), students.pack(new_weights), measurements

  @tff.federated_computation
  def init_fn():
    return tff.federated_eval(init_tf, tff.SERVER)

  @tff.federated_computation(
      init_fn.type_signature.result,
      tff.FederatedType(weights_type, tff.SERVER),
      tff.FederatedType(weights_type, tff.SERVER),
  )
  def next_fn(state, weights, update):
    return tff.templates.MeasuredProcessOutput(
        *tff.federated_map(next_tf, (state, weights, update))
    )

  if not isinstance(optimizer, tff.learning.optimizers.Optimizer):
    return tff.learning.templates.FinalizerProcess(init_fn, next_fn)

  @graphs.computation(state_type)
  def get_hparams_fn(state):
    return students.pack([
        optimizer.get_hparams(its) for its in students.unpack(state)
    ])

  @graphs.computation(state_type, get_hparams_fn.type_signature.result)
  def set_hparams_fn(state, hparams):
    return students.pack([
        optimizer.set_hparams(*its)
        for its in zip(students.unpack(state), students.unpack(hparams))
    ])

  return tff.learning.templates.FinalizerProcess(
      init_fn,
      next_fn,
      get_hparams_fn=get_hparams_fn,
      set_hparams_fn=set_hparams_fn,
  )
