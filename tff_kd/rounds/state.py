"""The server's state of a round, and what is computed on it."""

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tff_kd.compat import tff

from tff_kd.client import work as work_lib
from tff_kd import graphs
from tff_kd.models import cohorts


class StudentHistory(NamedTuple):
  """The students that were sent out in the last rounds.

  Attributes:
    sent: A `ModelWeights` (with cohorts, a tuple) whose arrays have a leading axis of
      `history_size`; zeros where none was sent yet.
    num_sent: int32, how many were sent so far, in rounds that were not skipped.
  """

  sent: Any
  num_sent: Any


class RoundState(NamedTuple):
  """The server's state; fields that an algorithm does not use are ().

  Attributes:
    global_model_weights: The `ModelWeights` of the student that is released, after
      distillation; with cohorts a tuple, here and in the next two. Clients begin with it,
      unless `clients_start_from` is 'average'.
    aggregated_model_weights: The student as averaging left it, before the server's
      distillation; with 'average' what clients begin with.
    teacher_weights: The teacher's `ModelWeights`.
    student_history: A `StudentHistory`, where clients learn from it.
    shared: The part of the last round's exchange that is sent to clients.
    shared_round: int32, the round that left it; -1 before the first.
    round_num: int32, the number of finished rounds.
    distributor: State of the distributor.
    client_work: State of the client work (the client optimizer's hyperparameters).
    aggregator: The states of the channels' aggregators.
    finalizer: State of the optimizer that applies the mean update.
    server_distillation: The distillation's `DistillationState`.
    companion: The companion's server state.
    broadcasts: The broadcasts of the last rounds, where clients may be late.
  """

  global_model_weights: Any
  aggregated_model_weights: Any
  teacher_weights: Any
  student_history: Any
  shared: Any
  shared_round: Any
  round_num: Any
  distributor: Any
  client_work: Any
  aggregator: Any
  finalizer: Any
  server_distillation: Any
  companion: Any
  broadcasts: Any


def replaced(state: tff.Value, **changed: Any) -> RoundState:
  """Returns a state with some fields changed, where TFF is traced: `_replace` for it."""
  return RoundState(**{
      field: changed.get(field, getattr(state, field)) for field in RoundState._fields
  })


def build_history(students: cohorts.Students, size: int):
  """Builds the computations that keep the last students.

  Args:
    students: The student, or those of the cohorts.
    size: The number of students to keep; with 0 the history is () and never updated.

  Returns:
    ( -> H) and (<H, weights> -> <H, the mean of the history>); the second is `None` with
    size 0.
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
        lambda past, w: tf.tensor_scatter_nd_update(past, place, [w]),
        history.sent, weights,
    )
    # Skipped rounds do not count: this is not the number of rounds.
    num_sent = history.num_sent + 1
    count = tf.minimum(num_sent, size)

    def mean(past, w):
      # A value that is not a real number (a counter) has no mean: the last value.
      if not w.dtype.is_floating:
        return w
      total = tf.reduce_sum(tf.cast(past, graphs.wide_dtype(past.dtype)), 0)
      return tf.cast(total / tf.cast(count, total.dtype), past.dtype)

    mean_of_history = tf.nest.map_structure(mean, sent, weights)
    return StudentHistory(sent, num_sent), mean_of_history

  return initial_history, remember


def build_personal_parts(plan: work_lib.ClientPlan):
  """Builds the computations between whole students and the part that travels.

  Args:
    plan: The clients' part of a round.

  Returns:
    (weights -> the shared part) and (the shared part of a change -> a change, zero in
    the personal layers); `None` for both where nothing is personal.
  """
  if not plan.personal:
    return None, None
  students = plan.students

  @graphs.computation(students.weights_type)
  def shared_of(weights):
    return students.pack(plan.shared(students.unpack(weights)))

  specs = [spec.update_spec for spec in students.specs]
  shared_type = tff.types.tensorflow_to_type(students.pack(plan.shared(specs)))

  @graphs.computation(shared_type)
  def whole_of(change):
    return students.pack([
        personal.padded(shared, spec)
        for personal, shared, spec in zip(
            plan.personal, students.unpack(change), specs
        )
    ])

  return shared_of, whole_of


def build_undoing(client_state_type: tff.Type) -> tff.Computation:
  """Builds (<client state before, after, int32 skipped> -> the one that holds)."""

  @graphs.computation(client_state_type, client_state_type, np.int32)
  def undo_if_skipped(before, after, skipped):
    return graphs.where(skipped > 0, before, after)

  return undo_if_skipped


def build_skipping(state_type: tff.Type, min_reports: int) -> tff.Computation:
  """Builds the computation that skips a round with too few reports.

  Args:
    state_type: The type of the `RoundState`.
    min_reports: The number of reports that suffices.

  Returns:
    A `tff.Computation` (<state before, state after, number of reports> -> <next state,
    int32 1 if the round is skipped>).
  """

  @graphs.computation(state_type, state_type, np.int32)
  def keep_or_skip(before, after, num_reports):
    skipped = num_reports < min_reports
    # Rounds are counted, and broadcasts remembered, in any case.
    before = before._replace(round_num=after.round_num, broadcasts=after.broadcasts)
    return graphs.where(skipped, before, after), tf.cast(skipped, tf.int32)

  return keep_or_skip
