"""Control variates: clients' steps are corrected for how their gradients differ.

Each client keeps c_k, an estimate of its own gradient, and the server c, the mean of all
clients' c_k. A local step goes along g - c_k + c in place of the gradient g, so that
clients with different data drift less apart.

Source: Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated
Learning" (ICML 2020), Algorithm 1 with option II.
"""

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tff_kd.compat import tff

from tff_kd.client import companions
from tff_kd import graphs
from tff_kd import models


class ControlVariate(NamedTuple):
  """A gradient by the trainable weights, at the server or at a client.

  Attributes:
    values: A list of tensors like the trainable weights; those of 16 bits in float32.
  """

  values: list[Any]


class _Running(NamedTuple):
  """The values that a client's training carries from step to step.

  Attributes:
    server: c, as received.
    own: c_k, as kept.
    start: The trainable weights with which the training began.
    num_steps: float32 scalar, how many steps it has done.
    learning_rate: float32 scalar.
  """

  server: list[tf.Tensor]
  own: list[tf.Tensor]
  start: list[tf.Tensor]
  num_steps: tf.Tensor
  learning_rate: tf.Tensor


def linear_term(weights: list[tf.Tensor], slope: list[tf.Tensor]) -> tf.Tensor:
  """Returns a scalar of value 0 whose gradient by the weights is the slope.

  Args:
    weights: Tensors that are watched.
    slope: Tensors of the same shapes, of the dtypes in which to add up.
  """
  products = [
      tf.reduce_sum(tf.cast(w, s.dtype) * tf.stop_gradient(s))
      for w, s in zip(weights, slope, strict=True)
  ]
  total = tf.cast(tf.add_n(products), tf.float32)
  return total - tf.stop_gradient(total)


def zeros_like_trainable(student: models.ModelSpec) -> list[tf.Tensor]:
  """Returns zeros like a model's trainable weights, in the dtype of their updates.

  Args:
    student: The model.
  """
  return [tf.zeros(s.shape, s.dtype) for s in student.update_spec.trainable]


class ControlVariates(companions.Companion):
  """Corrects the clients' steps by control variates.

  The clients' optimizer must be plain SGD: the change of the weights, divided by the
  number of steps and the rate, is then the mean of the corrected gradients. (Where layers
  constrain their weights, it is what the constraints leave of it.)

  A client's c_k moves only in rounds that count its report, so that c stays the mean of
  all of them.
  """

  state_follows_report = True
  needs_one_architecture = True
  needs_plain_sgd = True

  def __init__(self, student: models.ModelSpec, num_clients: int):
    """Initializes the companion.

    Args:
      student: The clients' model.
      num_clients: The total number of clients.
    """
    self._student, self._num_clients = student, num_clients

  def initial_client_state(self):
    return ControlVariate(zeros_like_trainable(self._student))

  def initial_server_state(self):
    return ControlVariate(zeros_like_trainable(self._student))

  def broadcast(self, server_state):
    return server_state

  def attach(self, student):
    del student  # The one that this was built for.

    def begin(beginning):
      running = _Running(
          server=list(beginning.received.values),
          own=list(beginning.client_state.values),
          start=list(beginning.student.values.trainable),
          num_steps=tf.constant(0.0),
          learning_rate=tf.cast(beginning.learning_rate, tf.float32),
      )
      return (), companions.CompanionValues(state=running)

    def joint_loss(loss, step, values):
      running = values.state
      slope = [c - own for c, own in zip(running.server, running.own)]
      advanced = running._replace(num_steps=running.num_steps + 1.0)
      return (
          loss + linear_term(step.weights, slope), values._replace(state=advanced)
      )

    def end(observed, student, values):
      del observed
      running = values.state
      length = running.num_steps * running.learning_rate
      new = []
      for c, own, old, w in zip(
          running.server, running.own, running.start, student.values.trainable
      ):
        mean_step = (tf.cast(old, c.dtype) - tf.cast(w, c.dtype)) / tf.cast(
            length, c.dtype
        )
        # With a rate of 0 nothing is learned of the gradient either.
        new.append(tf.where(length > 0.0, own - c + mean_step, own))
      changes = [a - b for a, b in zip(new, running.own)]
      return ControlVariate(new), ControlVariate(changes)

    return companions.Attachment(begin, end, joint_loss)

  def exchange(self, server_state, exchanged, round_num):
    del round_num
    state_type = server_state.type_signature.member

    @graphs.computation(state_type, state_type)
    def add(state, total):
      return ControlVariate([
          c + change / tf.cast(self._num_clients, c.dtype)
          for c, change in zip(state.values, total.values)
      ])

    new = tff.federated_map(add, (server_state, tff.federated_sum(exchanged)))
    return new, tff.federated_value((), tff.SERVER)

  def exchange_bytes(self):
    spec = self._student.update_spec.trainable
    return 0, sum(int(np.prod(s.shape)) * s.dtype.size for s in spec)
