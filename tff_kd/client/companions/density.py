"""How much of a client's data resembles a transfer example, where classes are skewed.

Where clients differ only in how frequent each class is among their examples (label
shift), the density of client k's inputs at x, relative to that of all clients', is

  p_k(x) / p(x) = sum_y pi_k(y) q(y | x) / pi(y),

with pi_k and pi the shares of the classes at the client and at all of them, and q(y | x)
the probabilities that the received student gives. So a client counts where its own
classes are likely, whatever it predicts of the others; and sum_k n_k p_k(x) p_k(y | x) /
sum_k n_k p_k(x) is p(y | x) of all the data.

Source: Jang, Park and Lee, "Provably Near-Optimal Federated Ensemble Distillation with
Negligible Overhead" (FedGO, ICML 2025): weights n_k p_k(x) are optimal, where the
densities come of discriminators; Wang et al., "DaFKD: Domain-aware Federated Knowledge
Distillation" (CVPR 2023) weighs likewise. That they are this sum under label shift is
Bayes' rule.

What clients send for it is one vector, how often each class is among the labels that
they have trained on, as a secure sum: the server sees their total only. pi is the share
in the totals of all rounds, smoothed.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tff_kd.compat import tff

from tff_kd.client import class_counts
from tff_kd.client import companions
from tff_kd import graphs
from tff_kd import knowledge
from tff_kd import models

# The largest count of a class that is sent: secure sums need a bound.
MAX_COUNT = 2**20 - 1


class _Running(NamedTuple):
  """The values that a client's training carries from step to step.

  Attributes:
    received: The `ModelValues` of the student with which the training began.
    totals: float32 `[classes]`, those of all clients in earlier rounds.
    counts: float32 `[classes]`, of the labels that the client has trained on so far.
  """

  received: models.ModelValues
  totals: tf.Tensor
  counts: tf.Tensor


def class_shares(counts: tf.Tensor, smoothing: float) -> tf.Tensor:
  """Returns the shares of classes, mixed with the uniform distribution.

  Args:
    counts: float32 `[classes]`; if all are 0, the shares are uniform.
    smoothing: The weight of the uniform distribution, from 0 to 1.

  Returns:
    float32 `[classes]`, of sum 1.
  """
  uniform = tf.ones_like(counts) / tf.cast(tf.size(counts), tf.float32)
  total = tf.reduce_sum(counts)
  found = tf.where(total > 0.0, tf.math.divide_no_nan(counts, total), uniform)
  return (1.0 - smoothing) * found + smoothing * uniform


def density_ratio(
    probabilities: tf.Tensor, own_shares: tf.Tensor, shares: tf.Tensor
) -> tf.Tensor:
  """Returns p_k(x) / p(x) under label shift.

  Args:
    probabilities: float32 `[..., classes]`, q(y | x).
    own_shares: float32 `[classes]`, pi_k.
    shares: float32 `[classes]`, pi, above 0.

  Returns:
    float32 `[...]`, 0 or more.
  """
  return tf.linalg.matvec(probabilities, own_shares / shares)


class LabelDensity(companions.Companion):
  """Weighs a client's predictions by how dense its data are at the transfer example.

  For a rule that weighs probabilities by a given certainty,
  `knowledge.CertaintyWeighted('given', average='probabilities')`, in any algorithm that
  averages students and sends predictions; n_k is the algorithm's `knowledge_weighting`.

  A client's weights tell of its classes, as predictions do; under an account of
  differential privacy the process is refused, as its counts are not noised.
  """

  gives_certainty = True
  sums_securely = True

  def __init__(self, num_classes: int, smoothing: float = 0.1):
    """Initializes the companion.

    Args:
      num_classes: The number of classes; 2 for a single logit.
      smoothing: How much of the uniform distribution is mixed into pi, above 0 and at
        most 1: a class that no client had so far must not have the share 0.

    Raises:
      ValueError: If a number is out of range.
    """
    if not isinstance(num_classes, int) or num_classes < 2:
      raise ValueError(
          f'`num_classes` must be a whole number of 2 or more, found {num_classes!r}.'
      )
    if not 0.0 < smoothing <= 1.0:
      raise ValueError(
          f'`smoothing` must be above 0 and at most 1, found {smoothing!r}.'
      )
    self._num_classes, self._smoothing = num_classes, smoothing

  def initial_server_state(self):
    return tf.zeros([self._num_classes])

  def broadcast(self, server_state):
    return server_state

  def attach(self, student):
    class_counts.check(student, 'LabelDensity')
    if class_counts.num_classes(student) != self._num_classes:
      raise ValueError(
          f'`num_classes` must be that of the {student.name}, '
          f'{class_counts.num_classes(student)}, found {self._num_classes}.'
      )

    def begin(beginning):
      return (), companions.CompanionValues(
          state=_Running(
              beginning.student.values, beginning.received,
              tf.zeros([self._num_classes]),
          )
      )

    def joint_loss(loss, step, values):
      running = values.state
      counts = running.counts + tf.reduce_sum(step.one_hot_labels(), axis=0)
      return loss, values._replace(state=running._replace(counts=counts))

    def end(observed, student, values):
      del observed, student
      counts = tf.round(tf.minimum(values.state.counts, float(MAX_COUNT)))
      return (), tf.cast(counts, tf.int32)

    def certainty(inputs, values):
      received, totals, counts = values.state
      logits = models.BoundModel(student, received).logits(inputs)
      return density_ratio(
          knowledge.class_probabilities(logits),
          class_shares(counts, 0.0),
          class_shares(totals, self._smoothing),
      )

    return companions.Attachment(begin, end, joint_loss, certainty=certainty)

  def exchange(self, server_state, exchanged, round_num):
    del round_num
    summed = tff.aggregators.SecureSumFactory(MAX_COUNT, 0).create(
        exchanged.type_signature.member
    )
    total = summed.next(tff.federated_value((), tff.SERVER), exchanged).result

    @graphs.computation(server_state.type_signature.member, total.type_signature.member)
    def add(state, counts):
      return state + tf.cast(counts, tf.float32)

    return (
        tff.federated_map(add, (server_state, total)),
        tff.federated_value((), tff.SERVER),
    )

  def exchange_bytes(self):
    return 0, self._num_classes * np.dtype(np.int32).itemsize
