"""One round as a federated computation: its stages, and what goes between them.

```
 state -> broadcast -> client work -> channels -> finalizer -> server distillation
                                         |                          |
                                         +----- knowledge ----------+--> shared next
```

The student that is sent is the released one, as distillation left it, or, with
`clients_start_from='average'`, as averaging left it: `Round.sent_field` of the state. The
next average, and the history of students, follow the student that is sent.
"""

import collections
from typing import Any

import numpy as np
import tensorflow as tf
from tff_kd.compat import tff

from tff_kd.client import work as work_lib
from tff_kd import graphs
from tff_kd import knowledge
from tff_kd import models
from tff_kd.rounds import checks
from tff_kd.rounds import description as description_lib
from tff_kd.rounds import options as options_lib
from tff_kd.rounds import parts as parts_lib
from tff_kd.rounds import state as state_lib
from tff_kd.server import distill as server_distillation_lib
from tff_kd.server import finalizer as finalizer_lib


def _nothing() -> tff.Value:
  return tff.federated_value((), tff.SERVER)


class Round:
  """The stages of a round, and the computations that they compose to."""

  def __init__(
      self,
      parts: parts_lib.Parts,
      options: options_lib.Options,
      client_work: work_lib.ClientWork,
      aggregator: tff.templates.MeasuredProcess,
  ):
    self.parts, self.plan = parts, client_work.plan
    self.client_work, self.aggregator = client_work, aggregator
    self.min_reports = options.reporting.min_reports if options.reporting else 0
    # With Poisson sampling the number is secret, and what goes down is public.
    self.tells_num_included = options.privacy is None
    self.sends_average = options.clients_start_from == 'average'
    self.sent_field = (
        'aggregated_model_weights' if self.sends_average else 'global_model_weights'
    )
    self.distributor = tff.learning.templates.build_broadcast_process(
        self.plan.broadcast_history.sent_type
    )
    self.finalizer, self.server_distillation = None, None
    self.server_optimizer = None
    if parts.averages:
      self.server_optimizer = (
          options.server_optimizer or tff.learning.optimizers.build_sgdm(1.0)
      )
      self.finalizer = finalizer_lib.build_student_finalizer(
          parts.students, self.server_optimizer
      )
    if parts.stages:
      self.server_distillation = server_distillation_lib.build_server_distillation(
          parts.server_students,
          parts.teacher,
          parts.distils_on,
          parts.stages,
          consensus_rule=(
              parts.exchange.rule if parts.exchange else knowledge.MeanLogits()
          ),
          seed=options.seed,
          has_released=self.sends_average,
      )
    self.initial_history, self.remember = state_lib.build_history(
        parts.students, checks.history_size(parts.local_terms)
    )

  def build_initialize(self) -> tff.Computation:
    """Builds ( -> RoundState@SERVER)."""
    parts, students = self.parts, self.parts.server_students

    @graphs.computation()
    def initial_values():
      """Returns the initial values that no stage initializes."""
      student = ()
      if students is not None:
        student = students.pack([
            self.plan.initial_weights(i) for i in range(len(students.specs))
        ])
      teacher, companion, shared = (), (), ()
      if parts.teacher is not None:
        teacher = tf.nest.map_structure(tf.constant, parts.teacher.initial_weights)
      if parts.companion is not None:
        companion = parts.companion.initial_server_state()
      if parts.exchange is not None:
        shared = parts.exchange.initial_shared()
      return student, teacher, companion, shared

    sends_down = parts.exchange is not None and parts.exchange.sends_down

    def initial_of(stage: Any) -> tff.Value:
      return stage.initialize() if stage is not None else _nothing()

    @tff.federated_computation
    def init_fn():
      student, teacher, companion, shared = tff.federated_eval(
          initial_values, tff.SERVER
      )
      both = parts.averages and parts.stages
      return tff.federated_zip(
          state_lib.RoundState(
              global_model_weights=student,
              aggregated_model_weights=student if both else _nothing(),
              teacher_weights=teacher,
              student_history=tff.federated_eval(self.initial_history, tff.SERVER),
              shared=shared,
              shared_round=(
                  tff.federated_value(np.int32(-1), tff.SERVER)
                  if sends_down else _nothing()
              ),
              round_num=tff.federated_value(np.int32(0), tff.SERVER),
              distributor=self.distributor.initialize(),
              client_work=self.client_work.initialize(),
              aggregator=self.aggregator.initialize(),
              finalizer=initial_of(self.finalizer),
              server_distillation=initial_of(self.server_distillation),
              companion=companion,
              broadcasts=tff.federated_eval(
                  self.plan.broadcast_history.initial, tff.SERVER
              ),
          )
      )

    return init_fn

  def build_next(self, state_type: tff.Type) -> tff.Computation:
    """Builds the round, of the type that `compose_process` returns."""
    self._build_server_parts(state_type.member)
    types = [state_type, tff.FederatedType(self.plan.data_type, tff.CLIENTS)]
    if self.plan.keeps_state:
      client_state_type = self.client_work.next.type_signature.parameter[3]
      types.append(tff.FederatedType(client_state_type, tff.CLIENTS))

      @tff.federated_computation(*types)
      def next_fn(state, client_data, client_states):
        return description_lib.StatefulClientsOutput(
            *self._run(state, client_data, client_states)
        )

    else:

      @tff.federated_computation(*types)
      def next_fn(state, client_data):
        no_states = tff.federated_value((), tff.CLIENTS)
        new_state, _, metrics = self._run(state, client_data, no_states)
        return tff.learning.templates.LearningProcessOutput(new_state, metrics)

    return next_fn

  def _build_server_parts(self, member: tff.Type) -> None:
    """Builds the small computations between the stages."""
    parts, self.increment = self.parts, graphs.computation(np.int32)(lambda x: x + 1)
    self.shared_of, self.whole_of = state_lib.build_personal_parts(self.plan)
    self.share = self.keep_or_skip = self.undo_if_skipped = None
    if self.min_reports:
      self.keep_or_skip = state_lib.build_skipping(member, self.min_reports)
    if self.min_reports and self.plan.keeps_state:
      self.undo_if_skipped = state_lib.build_undoing(
          self.client_work.next.type_signature.parameter[3]
      )
    self._build_companion_parts(member)
    if parts.exchange is None or not parts.exchange.sends_down:
      return
    exchange, student = parts.exchange, parts.students.first
    needs_model = exchange.needs_server_model

    @graphs.computation(
        tff.types.tensorflow_to_type(exchange.payload_spec()),
        np.int32 if self.tells_num_included else tff.to_type(()),
        member.global_model_weights if needs_model else tff.to_type(()),
        np.int32,
    )
    def share(mean_payload, num_included, server_weights, round_num):
      server_model = None
      if needs_model:
        server_model = models.BoundModel(student, student.values(server_weights))
      return exchange.share(
          knowledge.KnowledgePayload(mean_payload.values, mean_payload.weights),
          tf.cast(num_included, tf.float32) if self.tells_num_included else None,
          server_model,
          round_num,
      )

    self.share = share

  def _build_companion_parts(self, member: tff.Type) -> None:
    """Builds the computations of a companion's state at the server."""
    companion = self.parts.companion
    self.broadcast_companion = self.correct = None
    if companion is None:
      return
    self.broadcast_companion = graphs.computation(member.companion)(companion.broadcast)
    if companion.corrects_student:
      self.correct = graphs.computation(
          member.companion,
          member.global_model_weights,
          self.parts.students.update_type,
          np.int32,
      )(companion.correct)

  def _run(self, state, client_data, client_states):
    """One round: the next state, what clients keep, the metrics."""
    received, changed, distributor_metrics = self._send(state)
    output, left = self._work(state, received, client_data, client_states)
    companion, companion_metrics = state.companion, _nothing()
    if self.parts.companion is not None:
      companion, companion_metrics = self.parts.companion.exchange(
          state.companion, left.exchanged, state.round_num
      )
    up = self.aggregator.next(state.aggregator, output)
    participation = up.measurements.client_work['participation']
    changed['aggregator'] = up.state
    learned, learned_metrics = self._learn(state, up, companion)
    changed.update(learned)
    if self.share is not None:
      changed['shared'] = self._shared(state, up, changed['global_model_weights'])
      changed['shared_round'] = state.round_num
    changed['round_num'] = tff.federated_map(self.increment, state.round_num)
    new_state = tff.federated_zip(state_lib.replaced(state, **changed))
    skipped = _nothing()
    if self.keep_or_skip is not None:
      new_state, skipped = tff.federated_map(
          self.keep_or_skip, (state, new_state, participation['num_included'])
      )
    metrics = collections.OrderedDict(
        distributor=distributor_metrics,
        client_work=(
            up.measurements.client_work if self.plan.releases_metrics else _nothing()
        ),
        aggregator=up.measurements.aggregator,
        **learned_metrics,
        companion=companion_metrics,
        round_skipped=skipped,
    )
    kept = left.client_state if self.plan.keeps_state else None
    if self.undo_if_skipped is not None:
      kept = tff.federated_map(
          self.undo_if_skipped, (client_states, kept, tff.federated_broadcast(skipped))
      )
    return new_state, kept, tff.federated_zip(metrics)

  def _send(self, state) -> tuple[tff.Value, dict[str, tff.Value], tff.Value]:
    """Returns what clients receive, the changed fields of the state, the measurements."""
    changed, mean_of_history = {}, _nothing()
    if self.remember is not None:
      changed['student_history'], mean_of_history = tff.federated_map(
          self.remember, (state.student_history, getattr(state, self.sent_field))
      )
    companion = _nothing()
    if self.parts.companion is not None:
      companion = tff.federated_map(self.broadcast_companion, state.companion)
    student = _nothing()
    if self.parts.averages:
      student = getattr(state, self.sent_field)
      if self.shared_of is not None:
        student = tff.federated_map(self.shared_of, student)
    sent = tff.federated_zip(
        work_lib.Broadcast(
            student=student,
            teacher=(
                state.teacher_weights if 'teacher' in self.plan.targets else _nothing()
            ),
            student_history=mean_of_history,
            shared=state.shared,
            shared_round=state.shared_round,
            round_num=state.round_num if self.plan.needs_round else _nothing(),
            companion=companion,
        )
    )
    if self.plan.broadcast_history.push is not None:
      changed['broadcasts'], sent = tff.federated_map(
          self.plan.broadcast_history.push, (state.broadcasts, sent)
      )
    distributed = self.distributor.next(state.distributor, sent)
    changed['distributor'] = distributed.state
    return distributed.result, changed, distributed.measurements

  def _work(self, state, received: tff.Value, client_data, client_states):
    """Returns what clients send, and what they keep, if anything."""
    arguments = (tff.federated_broadcast(state.client_work), received, client_data)
    if self.parts.companion is None and not self.plan.keeps_state:
      return tff.federated_map(self.client_work.next, arguments), None
    return tff.federated_map(self.client_work.next, (*arguments, client_states))

  def _learn(self, state, up, companion: tff.Value) -> tuple[dict, dict]:
    """Moves the student along the mean update, then distils on the server.

    Returns the changed fields of the state, and the measurements.
    """
    mean, sent = up.result, getattr(state, self.sent_field)
    student, changed = sent, {}
    metrics = {'finalizer': _nothing(), 'server_distillation': _nothing()}
    if self.finalizer is not None:
      change = mean.model
      if self.whole_of is not None:
        change = tff.federated_map(self.whole_of, change)
      finalized = self.finalizer.next(state.finalizer, student, change)
      student, changed['finalizer'] = finalized.result, finalized.state
      metrics['finalizer'] = finalized.measurements
    if self.correct is not None:
      num_reports = up.measurements.client_work['participation']['num_included']
      companion, student = tff.federated_map(
          self.correct, (companion, student, mean.model, num_reports)
      )
    changed.update(global_model_weights=student, companion=companion)
    if self.server_distillation is None:
      return changed, metrics
    distilled = self.server_distillation.next(
        state.server_distillation,
        tff.federated_zip(
            server_distillation_lib.ServerModels(
                student=student,
                teacher=state.teacher_weights,
                released=(
                    state.global_model_weights if self.sends_average else _nothing()
                ),
                sent=sent if self.sends_average else _nothing(),
            )
        ),
        mean.knowledge if self.parts.uses_ensemble else _nothing(),
        state.round_num,
    )
    if self.parts.averages:
      changed['aggregated_model_weights'] = student
    changed.update(
        global_model_weights=distilled.result.student,
        teacher_weights=distilled.result.teacher,
        server_distillation=distilled.state,
    )
    metrics['server_distillation'] = distilled.measurements
    return changed, metrics

  def _shared(self, state, up, student) -> tff.Value:
    """Returns what the exchange sends down in the next round."""
    num_included = _nothing()
    if self.tells_num_included:
      num_included = up.measurements.client_work['participation']['num_included']
    return tff.federated_map(
        self.share,
        (
            up.result.knowledge,
            num_included,
            student if self.parts.exchange.needs_server_model else _nothing(),
            state.round_num,
        ),
    )

  def build_accessors(self, member: tff.Type) -> description_lib.Accessors:
    """Builds what reads and replaces parts of a state: selections, nothing to trace."""

    def getter(field: str) -> tff.Computation:
      @tff.federated_computation(member)
      def get_fn(state):
        return getattr(state, field)

      return get_fn

    def setter(field: str, *also: str) -> tff.Computation:
      @tff.federated_computation(member, getattr(member, field))
      def set_fn(state, value):
        return state_lib.replaced(state, **{name: value for name in (field, *also)})

      return set_fn

    @tff.federated_computation(member)
    def get_hparams(state):
      hparams = collections.OrderedDict(client_work=state.client_work)
      if self.finalizer is not None:
        hparams['finalizer'] = self.finalizer.get_hparams(state.finalizer)
      return hparams

    @tff.federated_computation(member, get_hparams.type_signature.result)
    def set_hparams(state, hparams):
      changed = {'client_work': hparams['client_work']}
      if self.finalizer is not None:
        changed['finalizer'] = self.finalizer.set_hparams(
            state.finalizer, hparams['finalizer']
        )
      return state_lib.replaced(state, **changed)

    model = teacher = (None, None)
    if self.parts.releases_student:
      # Clients go on from a student that is set, whichever they are sent.
      model = (
          getter('global_model_weights'), setter('global_model_weights', self.sent_field)
      )
    if self.parts.teacher is not None:
      teacher = getter('teacher_weights'), setter('teacher_weights')
    return description_lib.Accessors(*model, *teacher, get_hparams, set_hparams)
