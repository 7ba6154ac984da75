"""The parts of a round that an algorithm chooses."""

from collections.abc import Sequence
import dataclasses
import enum
from typing import Optional

from tff_kd.client import companions
from tff_kd.client import exchanges
from tff_kd.client import local_terms as local_terms_lib
from tff_kd.data import transfer
from tff_kd import models
from tff_kd.models import cohorts
from tff_kd.models import personal as personal_lib
from tff_kd import optimizers
from tff_kd.server import distill


class ClientModel(enum.Enum):
  """The weights with which a client's round begins.

  Attributes:
    RECEIVED: The server's student; the change goes up and is averaged.
    KEPT: The client's own of its last round, which never leave it.
    INITIAL: The initial weights in every round; they never leave the client.
  """

  RECEIVED = 'received'
  KEPT = 'kept'
  INITIAL = 'initial'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
  """The parts of a round that an algorithm chooses.

  Attributes:
    students: The model that clients train, or those of the cohorts. Where clients do
      not receive weights, the server's student, if there is one, is the first of them.
    client_optimizer: The clients' TFF optimizer, or a function that returns a Keras
      one.
    client_model: The weights with which clients begin.
    personal: By cohort, the layers that a client keeps for itself, where it receives
      the others; none if empty.
    local_terms: Terms of the clients' loss beside the supervised one, in order.
    companion: An auxiliary component of the clients' training.
    exchange: The exchange beside, or in place of, weights.
    transfer_set: The examples that the server distils on; those of the exchange if
      `None`.
    teacher: The server's large model, if it has one.
    stages: The server's distillation, in order; none if empty.
    pretraining: How a new client's model, and the server's, learn from the transfer
      set's labels before the first round; `None`: not at all.
  """

  students: cohorts.Students
  client_optimizer: optimizers.Optimizer
  client_model: ClientModel = ClientModel.RECEIVED
  personal: Sequence[personal_lib.PersonalLayers] = ()
  local_terms: Sequence[local_terms_lib.LocalTerm] = ()
  companion: Optional[companions.Companion] = None
  exchange: Optional[exchanges.Exchange] = None
  transfer_set: Optional[transfer.TransferSet] = None
  teacher: Optional[models.ModelSpec] = None
  stages: Sequence[distill.DistillationStage] = ()
  pretraining: Optional[distill.DistillationStage] = None

  @property
  def averages(self) -> bool:
    """Whether clients receive the student's weights and send back their change."""
    return self.client_model is ClientModel.RECEIVED

  @property
  def averages_statistics(self) -> bool:
    """Whether these hold statistics that training moves, such as batch norm's."""
    sent = [spec.weights_spec for spec in self.students.specs if self.averages]
    if self.personal:
      sent = [own.shared(weights) for own, weights in zip(self.personal, sent)]
    return any(weights.non_trainable for weights in sent)

  @property
  def keeps_model(self) -> bool:
    """Whether clients keep a model, or layers of one, from round to round."""
    return self.client_model is ClientModel.KEPT or bool(self.personal)

  @property
  def releases_student(self) -> bool:
    """Whether the server has a student that is of use by itself."""
    return self.server_students is not None and not self.personal

  @property
  def distils_on(self) -> Optional[transfer.TransferSet]:
    """The transfer set, if there is one."""
    if self.transfer_set is not None or self.exchange is None:
      return self.transfer_set
    return self.exchange.transfer_set

  @property
  def server_students(self) -> Optional[cohorts.Students]:
    """The architectures of the server's student; `None`: it has none."""
    if self.averages:
      return self.students
    return cohorts.as_students(self.students.first) if self.stages else None

  @property
  def uses_ensemble(self) -> bool:
    """Whether the server distils from what clients upload."""
    return any(stage.uses_ensemble for stage in self.stages)

  @property
  def refines_student(self) -> bool:
    """Whether the server changes the student after averaging it."""
    return self.averages and any(stage.learner == 'student' for stage in self.stages)
