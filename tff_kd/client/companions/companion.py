"""Auxiliary client-side components beside the student.

A companion may keep something at the client from round to round (a private model), have
a state at the server that goes down (a generator), train beside the student, add terms
to its loss, and exchange further sums after the local training. Any algorithm that
averages students takes one: `companion=...`.
"""

import abc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

import keras
import tensorflow as tf
from tff_kd.compat import tff

from tff_kd.client import local_terms
from tff_kd import models
from tff_kd import optimizers


class Observer(NamedTuple):
  """Sums over a client's steps.

  Attributes:
    zero: () -> the structure of tensors to begin with.
    observe: (`LocalStep`) -> what a batch adds to it. `LocalStep.one_hot_labels` are its
      labels without those that do not count.
  """

  zero: Callable[[], Any]
  observe: Callable[[local_terms.LocalStep], Any]


class ClientState(NamedTuple):
  """The state that a client keeps for itself.

  Attributes:
    weights: The `ModelWeights` of its own model.
    sent: The client's last upload, if it must remember it; else ().
    sent_round: int32, the round of that upload, -1 before the first; or ().
  """

  weights: Any
  sent: Any = ()
  sent_round: Any = ()


class ClientExamples(NamedTuple):
  """A client's own examples, for what looks at them beside the training.

  Attributes:
    client: The client's number, int32; `None` where its data is a dataset.
    map_inputs: (fn) -> the results of `fn`, a function from a batch of inputs to a tensor
      `[batch, ...]`, for all examples but those of weight 0, concatenated. Examples that
      are read by reference count once, whatever the epochs; those of a dataset as often
      as it has them.
  """

  client: Optional[tf.Tensor]
  map_inputs: Callable[[Callable[[Any], tf.Tensor]], tf.Tensor]


class CompanionValues(NamedTuple):
  """The tensors of a companion that change during a client's training.

  Attributes:
    trainable: Weights that are trained beside the student's, by the clients' optimizer.
    state: A structure of anything else.
  """

  trainable: list[Any] = []
  state: Any = ()


class Beginning(NamedTuple):
  """The inputs of a companion when a client's training begins.

  Attributes:
    received: The result of `Companion.broadcast`.
    client_state: The client's state.
    round_num: int32 scalar.
    examples: The `ClientExamples`.
    seed: int32 `[2]`, decides what this training draws.
    student: The `models.BoundModel` with which the training begins.
    learning_rate: float32 scalar, the optimizer's rate in this round; `None` for a Keras
      optimizer, or one with a schedule of its own.
  """

  received: Any
  client_state: Any
  round_num: Any
  examples: ClientExamples
  seed: tf.Tensor
  student: Optional[models.BoundModel] = None
  learning_rate: Optional[tf.Tensor] = None


def _begin_nothing(beginning: Beginning):
  del beginning
  return (), CompanionValues()


def _end_nothing(observed: Any, student: models.BoundModel, values: CompanionValues):
  del observed, student, values
  return (), ()


class Attachment(NamedTuple):
  """A companion within the computation of one client's round.

  Attributes:
    begin: (`Beginning`) -> (local terms, `CompanionValues`): called before the training.
    end: (observed, student, `CompanionValues`) -> (client_state, exchanged): what the
      client keeps for its next round, and what `Companion.exchange` gets of it, from the
      observer's sums, the student as a `BoundModel` and the companion's values. Called
      after the training, and also for a client that is left out: then the old client
      state stays.
    joint_loss: (loss, `LocalStep`, `CompanionValues`) -> (loss, `CompanionValues`): the
      loss with a term that trains the companion's weights too; after all other terms.
    trainable_variables: The Keras variables of `CompanionValues.trainable`.
    observer: The sums to take over the steps, if any.
    certainty: (inputs, `CompanionValues`) -> float32 `[batch]`, 0 or more: how certain
      the client is of its predictions on them. There if the companion `gives_certainty`.
  """

  begin: Callable[
      [Beginning], tuple[Sequence[local_terms.LocalTerm], CompanionValues]
  ] = _begin_nothing
  end: Callable[
      [Any, models.BoundModel, CompanionValues], tuple[Any, Any]
  ] = _end_nothing
  joint_loss: Optional[
      Callable[
          [tf.Tensor, local_terms.LocalStep, CompanionValues],
          tuple[tf.Tensor, CompanionValues],
      ]
  ] = None
  trainable_variables: Sequence[keras.Variable] = ()
  observer: Optional[Observer] = None
  certainty: Optional[Callable[[Any, CompanionValues], tf.Tensor]] = None


class Companion(abc.ABC):
  """Auxiliary client-side component; the parts that it lacks are ().

  Attributes:
    client_spec: The `ModelSpec` of the model in its `ClientState`; `None` if clients
      keep none.
    gives_certainty: Whether it tells a client's certainty, for a consensus rule that
      weighs by a given one.
    exchanges: Whether clients send something for it, beside their weights and
      predictions.
    sums_securely: Whether that is a secure sum, which secure aggregation allows.
    needs_client_number: Whether it works only where clients read their examples by
      reference (`client_data`), and so have a number.
    state_follows_report: Whether a client's state moves only in rounds that count its
      report. Else it moves whenever its training was valid, also if its report was
      lost. In a skipped round (`Reporting.min_reports`) no client's state moves.
    needs_one_architecture: Whether it is built for one student, that of all clients, so
      that there can be no cohorts.
    needs_plain_sgd: Whether the clients' optimizer must be SGD without momentum.
    corrects_student: Whether it moves the student at the server, see `correct`. All
      reports must then weigh the same.
    optimizer: The optimizer of the companion's own weights at the server, or `None`.
  """

  client_spec: Optional[models.ModelSpec] = None
  gives_certainty: bool = False
  exchanges: bool = True
  sums_securely: bool = False
  needs_client_number: bool = False
  state_follows_report: bool = False
  needs_one_architecture: bool = False
  needs_plain_sgd: bool = False
  corrects_student: bool = False
  optimizer: Optional[optimizers.Optimizer] = None

  @property
  def has_client_state(self) -> bool:
    """Whether clients keep something from round to round."""
    return bool(tf.nest.flatten(self.initial_client_state()))

  def initial_client_state(self) -> Any:
    """Returns the state of a new client: a structure of tensors, a `ClientState`, or ().

    By default a `ClientState` with the initial weights of `client_spec`, if there is one.
    """
    if self.client_spec is None:
      return ()
    return ClientState(
        weights=tf.nest.map_structure(tf.constant, self.client_spec.initial_weights)
    )

  def initial_server_state(self) -> Any:
    """Returns the companion's part of the process state: a structure of tensors, or ().
    """
    return ()

  def broadcast(self, server_state: Any) -> Any:
    """Returns the part of the companion's server state that is sent to each client.

    Args:
      server_state: As `initial_server_state` returns it, or after a later round.
    """
    del server_state
    return ()

  @abc.abstractmethod
  def attach(self, student: models.ModelSpec) -> Attachment:
    """Returns the companion's part of a client's computation.

    Args:
      student: The client's model.
    """

  def exchange(
      self, server_state: tff.Value, exchanged: tff.Value, round_num: tff.Value
  ) -> tuple[tff.Value, tff.Value]:
    """Returns what server and clients do after the local training; federated values.

    Args:
      server_state: At the server.
      exchanged: At the clients, from `Attachment.end`; zeros of a client that was
        left out of the round.
      round_num: int32, at the server.

    Returns:
      The next server state and measurements, both at the server.
    """
    del exchanged, round_num
    return server_state, tff.federated_value((), tff.SERVER)

  def correct(
      self, server_state: Any, student: Any, change: Any, num_reports: tf.Tensor
  ) -> tuple[Any, Any]:
    """Moves the student at the server, between averaging and distillation.

    Called if the companion `corrects_student`, where a computation is traced.

    Args:
      server_state: The server's part, after `exchange`.
      student: The student's `ModelWeights`, as the server optimizer left them.
      change: The clients' mean update, `ModelWeights` of those sent minus those trained,
        in the dtypes of updates. If not finite, as that of no client, the server
        optimizer has taken no step.
      num_reports: int32 scalar, how many clients' reports are in the mean.

    Returns:
      The next server state and the student's next `ModelWeights`.
    """
    del change, num_reports
    return server_state, student

  def exchange_bytes(self) -> tuple[int, int]:
    """Returns how many bytes one client receives and sends in `exchange`."""
    return 0, 0
