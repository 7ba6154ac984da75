"""Dynamic regularisation: each client's loss is moved so that all have one minimum.

Each client keeps h_k, an estimate of its own gradient where it ended last, and minimises
L_k(w) - <h_k, w> + alpha / 2 ||w - w_received||^2. The server keeps what the clients' h_k
add up to, and moves the mean of their models by it. Nothing but weights travels.

Source: Acar et al., "Federated Learning Based on Dynamic Regularization" (FedDyn, ICLR
2021), Algorithm 1.
"""

from typing import Any, NamedTuple

import tensorflow as tf
from tff_kd.compat import tff

from tff_kd.client import companions
from tff_kd.client import local_terms
from tff_kd.client.companions import control_variates
from tff_kd import graphs
from tff_kd import models


class Gradient(NamedTuple):
  """The state of a client, or of the server.

  Attributes:
    values: A list of tensors like the trainable weights, those of 16 bits in float32:
      at a client h_k; at the server the sum over all clients of how far they moved,
      divided by their number (the paper's h / alpha).
  """

  values: list[Any]


class _Kept(NamedTuple):
  """The values that a client's training carries from step to step.

  Attributes:
    own: h_k.
    start: The trainable weights that were received.
  """

  own: list[tf.Tensor]
  start: list[tf.Tensor]


class _DynamicTerm(local_terms.LocalTerm):
  """L - <h_k, w> + alpha / 2 ||w - w_received||^2; the linear part's value is 0."""

  needs_received = True

  def __init__(self, alpha: float, own: list[tf.Tensor]):
    self._proximal = local_terms.ProximalTerm(weight=alpha)
    self._slope = [-h for h in own]

  def __call__(self, loss, step):
    linear = control_variates.linear_term(step.weights, self._slope)
    return self._proximal(loss, step) + linear


class DynamicRegularizer(companions.Companion):
  """Regularises each client's loss, and moves the student at the server.

  A client's h_k moves only in rounds that count its report, and all reports weigh the
  same, so that the server's state stays what all of them add up to. The student is moved
  within the constraints of its layers.
  """

  exchanges = False
  state_follows_report = True
  needs_one_architecture = True
  corrects_student = True

  def __init__(self, student: models.ModelSpec, num_clients: int, alpha: float):
    """Initializes the companion.

    Args:
      student: The clients' model.
      num_clients: The total number of clients.
      alpha: Above 0.

    Raises:
      ValueError: If `alpha` is out of range.
    """
    local_terms.check_weight('alpha', alpha)
    self._student, self._num_clients, self._alpha = student, num_clients, alpha

  def initial_client_state(self):
    return Gradient(control_variates.zeros_like_trainable(self._student))

  def initial_server_state(self):
    return Gradient(control_variates.zeros_like_trainable(self._student))

  def attach(self, student):
    del student  # The one that this was built for.

    def begin(beginning):
      own = list(beginning.client_state.values)
      kept = _Kept(own, list(beginning.student.values.trainable))
      return [_DynamicTerm(self._alpha, own)], companions.CompanionValues(state=kept)

    def end(observed, student, values):
      del observed
      own, start = values.state
      moved = [
          h - self._alpha * (tf.cast(w, h.dtype) - tf.cast(old, h.dtype))
          for h, w, old in zip(own, student.values.trainable, start)
      ]
      return Gradient(moved), ()

    return companions.Attachment(begin, end)

  def correct(self, server_state, student, change, num_reports):
    share = tf.cast(num_reports, tf.float32) / self._num_clients
    # After a round without a mean the student stays as it was.
    has_mean = (num_reports > 0) & graphs.all_finite(change)
    offsets, moved = [], []
    for u, w, mean in zip(server_state.values, student.trainable, change.trainable):
      # The offset follows the clients' mean change, whatever the server optimizer made of
      # it.
      offset = tf.where(has_mean, u + tf.cast(share, u.dtype) * mean, u)
      offsets.append(offset)
      moved.append(tf.cast(tf.cast(w, u.dtype) - offset, w.dtype))
    # The constraints of the layers hold again after this further step.
    moved = models.apply_constraints(self._student.trainable_variables, moved)
    trainable = [
        tf.where(has_mean, new, old) for new, old in zip(moved, student.trainable)
    ]
    weights = tff.learning.models.ModelWeights(trainable, list(student.non_trainable))
    return Gradient(offsets), weights
