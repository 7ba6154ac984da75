"""The two kinds of learning processes, and their descriptions."""

import dataclasses
from typing import Any, NamedTuple, Optional

import keras
from tff_kd.compat import tff

from tff_kd.client import conditions
from tff_kd import communication
from tff_kd.data import client_data as client_data_lib
from tff_kd.data import transfer
from tff_kd import models
from tff_kd.models import cohorts
from tff_kd import optimizers as optimizers_lib
from tff_kd.privacy import differential
from tff_kd.privacy import secure

_NO_TEACHER = (
    'This process has no teacher. Build one with `teacher_fn`, for example '
    '`tff_kd.algorithms.build_fed_distillation`.'
)


@dataclasses.dataclass(frozen=True)
class Protection:
  """The protection of what clients send.

  Attributes:
    channels: The channels in use, of 'model' and 'knowledge'.
    privacy: The `DifferentialPrivacy`, or `None`.
    secure_aggregation: The `SecureAggregation`, or `None`.
  """

  channels: tuple[str, ...] = ()
  privacy: Optional[differential.DifferentialPrivacy] = None
  secure_aggregation: Optional[secure.SecureAggregation] = None

  @property
  def max_clients(self) -> Optional[int]:
    """The largest number of clients whose sum cannot wrap around; any if `None`."""
    secure_sums = self.secure_aggregation
    if secure_sums is None or secure_sums.bits is None:
      return None
    return secure_sums.max_clients


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
  """The parts of a process and the types of its messages.

  Attributes:
    students: The architectures of the server's student; of the clients' models, where
      the server has none.
    teacher_spec: The teacher's `ModelSpec`, or `None`.
    kept_models: The architectures of the models that clients keep, or `None`.
    transfer_set: The `TransferSet`, or `None`.
    protection: The `Protection` of what clients send.
    broadcast_type: The `tff.Type` that goes down to each client.
    update_type: The `tff.Type` that comes up from each client, channel by channel,
      before an aggregator encodes it.
    coded_bytes: The `CodedBytes` of one message without a previous one.
    exchanged_bytes: Bytes that a client moves down and up in a companion's exchange.
    aggregated_bytes: Bytes that a client hands to a channel's own aggregator, by channel.
    client_data: The `ClientBatches` from which clients read, or `None`.
    reporting: The `Reporting` of clients that come with conditions, or `None`.
    sends_average: Whether clients are sent the average as it was before the server's
      distillation, and not the student that is released.
    optimizers: The optimizers of the clients, the server, the companion and the lessons,
      by name.
  """

  students: cohorts.Students
  teacher_spec: Optional[models.ModelSpec]
  kept_models: Optional[cohorts.Students]
  transfer_set: Optional[transfer.TransferSet]
  protection: Protection
  broadcast_type: tff.Type
  update_type: tff.Type
  coded_bytes: communication.CodedBytes
  exchanged_bytes: tuple[int, int]
  aggregated_bytes: dict[str, int]
  client_data: Optional[client_data_lib.ClientBatches]
  reporting: Optional[conditions.Reporting]
  sends_average: bool
  optimizers: dict[str, optimizers_lib.Optimizer]


class Accessors(NamedTuple):
  """`tff.Computation`s that read and replace parts of a state S.

  Attributes:
    get_model_weights: (S -> the student's `ModelWeights`); `None` without a student.
    set_model_weights: (<S, `ModelWeights`> -> S), or `None`.
    get_teacher_weights: (S -> the teacher's `ModelWeights`), or `None`.
    set_teacher_weights: (<S, `ModelWeights`> -> S), or `None`.
    get_hparams: (S -> the optimizers' hyperparameters).
    set_hparams: (<S, hyperparameters> -> S).
  """

  get_model_weights: Optional[tff.Computation]
  set_model_weights: Optional[tff.Computation]
  get_teacher_weights: Optional[tff.Computation]
  set_teacher_weights: Optional[tff.Computation]
  get_hparams: tff.Computation
  set_hparams: tff.Computation


class _Described:
  """What both kinds of processes have besides `initialize` and `next`."""

  def _describe(self, description: Description, accessors: Accessors) -> None:
    self._accessors = accessors
    self.description = description
    self.students = description.students
    self.student_spec = description.students.first
    self.teacher_spec = description.teacher_spec
    self.transfer_set = description.transfer_set
    self.client_data = description.client_data
    self.protection = description.protection

  @property
  def get_teacher_weights(self) -> tff.Computation:
    """A `tff.Computation` (S -> teacher's `ModelWeights`).

    Raises:
      ValueError: If the process has no teacher.
    """
    self._check_has_teacher()
    return self._accessors.get_teacher_weights

  @property
  def set_teacher_weights(self) -> tff.Computation:
    """A `tff.Computation` (<S, teacher's `ModelWeights`> -> S).

    Raises:
      ValueError: If the process has no teacher.
    """
    self._check_has_teacher()
    return self._accessors.set_teacher_weights

  def to_keras(self, state: Any) -> Any:
    """Returns the student as a Keras model.

    Args:
      state: The process's state.

    Returns:
      A new `keras.Model` of the builder, with the student's weights and statistics; with
      cohorts, a list of them.

    Raises:
      ValueError: If the server has no student.
    """
    if self._accessors.get_model_weights is None:
      raise ValueError(
          'The server of this process has no whole student: each client keeps its own '
          "model, in its `ClientState`'s `weights`."
      )
    weights = self.students.unpack(state.global_model_weights)
    keras_models = [
        spec.to_keras(w) for spec, w in zip(self.students.specs, weights)
    ]
    return keras_models if self.students.has_cohorts else keras_models[0]

  def teacher_to_keras(self, state: Any) -> keras.Model:
    """Returns the teacher as a Keras model.

    Raises:
      ValueError: If the process has no teacher.
    """
    self._check_has_teacher()
    return self.teacher_spec.to_keras(state.teacher_weights)

  def _check_has_teacher(self) -> None:
    if self.teacher_spec is None:
      raise ValueError(_NO_TEACHER)


class DistillationProcess(_Described, tff.learning.templates.LearningProcess):
  """A `LearningProcess` for a student, which may also carry a teacher.

  `get_model_weights` and `set_model_weights` are the student's, as everywhere in
  `tff.learning`; `to_keras(state)` returns the student as a Keras model,
  `teacher_to_keras(state)` the teacher.

  Attributes:
    description: The `Description` of the process.
    students: The student's architectures: one, or one a cohort.
    student_spec: The `ModelSpec` of the (first) student.
    teacher_spec: The teacher's `ModelSpec`, or `None`.
    transfer_set: The `TransferSet`, or `None`.
    client_data: The `ClientBatches` from which clients read, or `None`.
    protection: The `Protection` of what clients send.
  """

  def __init__(
      self,
      initialize_fn: tff.Computation,
      next_fn: tff.Computation,
      description: Description,
      accessors: Accessors,
  ):
    super().__init__(
        initialize_fn,
        next_fn,
        accessors.get_model_weights,
        accessors.set_model_weights,
        get_hparams_fn=accessors.get_hparams,
        set_hparams_fn=accessors.set_hparams,
    )
    self._describe(description, accessors)


class StatefulClientsOutput(NamedTuple):
  """The output of a round with stateful clients.

  Attributes:
    state: The server's next state.
    client_states: The clients' next states, in their order.
    metrics: The round's metrics, as a `LearningProcess` returns them.
  """

  state: Any
  client_states: Any
  metrics: Any


class StatefulClientsProcess(_Described, tff.templates.IterativeProcess):
  """Rounds of stateful clients.

  `next` has the type (<S@SERVER, {D}@CLIENTS, {ClientState}@CLIENTS> ->
  StatefulClientsOutput). `tff_kd.simulation.ClientStates` stores the clients' states.
  It has the attributes of a `DistillationProcess`, too.

  Attributes:
    initialize_client: A `tff.Computation` ( -> ClientState); with cohorts of models that
      clients keep, a tuple of such, by cohort.
    get_model_weights: A `tff.Computation` (S -> the server's student's
      `ModelWeights`), or `None` where the server has none.
    set_model_weights: (<S, `ModelWeights`> -> S), or `None`.
    get_hparams: (S -> the optimizers' hyperparameters).
    set_hparams: (<S, hyperparameters> -> S).
    kept_models: The architectures of the models that clients keep, or `None`. Where
      there are several, `weights` of a client's state is a tuple by cohort.
  """

  def __init__(
      self,
      initialize_fn: tff.Computation,
      next_fn: tff.Computation,
      initialize_client_fn: tff.Computation,
      description: Description,
      accessors: Accessors,
  ):
    super().__init__(initialize_fn, next_fn)
    self._describe(description, accessors)
    self.initialize_client = initialize_client_fn
    self.get_model_weights = accessors.get_model_weights
    self.set_model_weights = accessors.set_model_weights
    self.get_hparams = accessors.get_hparams
    self.set_hparams = accessors.set_hparams
    self.kept_models = description.kept_models
