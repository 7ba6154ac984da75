"""Mutual learning: a private mentor and the shared student teach each other.

Each client has a model of its own beside the student, of any architecture, which never
leaves it. In every local step both learn from the same batch and from each other.

Sources: Shen et al., "Federated Mutual Learning" (FML, 2020), the local loss of its
"meme" (here the student) and its personal model (the mentor); Wu et al.,
"Communication-efficient federated learning via knowledge distillation" (FedKD, Nature
Communications 2022), adaptive mutual distillation, here of the predictions (the paper
also has a loss on hidden states, which asks for models of one kind).
"""

from typing import Optional

import tensorflow as tf

from tff_kd import checks
from tff_kd.client import companions
from tff_kd import losses
from tff_kd import models


# Separates the mentor's random draws from the student's.
_MENTOR_STREAM = 1


class MutualLearning(companions.Companion):
  """Trains a private mentor of each client beside the student.

  With weights w the losses are (1 - w) L + w KL_T(other || own), of student and mentor
  each with its own w; adaptive, L + KL_T(other || own) / (L_student + L_mentor), whose
  divisor receives no gradient: the better both know the labels, the more they trust
  each other. Both take the steps of the clients' optimizer, fresh in each round.
  """

  exchanges = False

  def __init__(
      self,
      student: models.ModelSpec,
      mentor: models.ModelSpec,
      *,
      student_weight: Optional[float] = 0.5,
      mentor_weight: Optional[float] = 0.5,
      temperature: float = 1.0,
  ):
    """Initializes mutual learning.

    Args:
      student: The shared model.
      mentor: The private one; a new client's has its initial weights.
      student_weight: w of the student, between 0 and 1; adaptive if both are `None`.
      mentor_weight: w of the mentor.
      temperature: T, above 0.

    Raises:
      ValueError: If a number is out of range or the models' outputs differ in shape.
    """
    models.check_same_outputs(student, mentor)
    checks.check_temperature(temperature)
    weights = student_weight, mentor_weight
    is_adaptive = weights == (None, None)
    if not is_adaptive and any(w is None or not 0.0 <= w <= 1.0 for w in weights):
      raise ValueError(
          '`student_weight` and `mentor_weight` must be between 0 and 1, or both None '
          f'(adaptive), found {student_weight!r} and {mentor_weight!r}.'
      )
    self.client_spec = mentor
    self._weights = None if is_adaptive else weights
    self._temperature = temperature

  def attach(self, student):
    del student  # The mentor learns from its predictions.
    mentor = self.client_spec

    def begin(beginning):
      seed = tf.random.experimental.stateless_fold_in(beginning.seed, _MENTOR_STREAM)
      values = mentor.values(beginning.client_state.weights, seed)
      return (), companions.CompanionValues(
          values.trainable, values._replace(trainable=[])
      )

    def end(observed, student, companion):
      del observed, student
      return companions.ClientState(weights=_mentor_values(companion).weights), ()

    return companions.Attachment(
        begin, end, self._joint_loss, trainable_variables=mentor.trainable_variables
    )

  def _joint_loss(self, loss, step, companion):
    """Both losses in one: neither depends on the other's weights."""
    mentor = self.client_spec
    outputs, values, regularization, _ = mentor.call(
        _mentor_values(companion), step.inputs, training=True
    )
    mentor_loss = tf.cast(
        mentor.supervised_loss(
            step.labels, outputs, step.labelled, step.sample_weight
        ),
        tf.float32,
    )
    logits = mentor.class_logits(outputs)

    def divergence(target: tf.Tensor, own: tf.Tensor) -> tf.Tensor:
      return step.mean(
          losses.output_divergence(
              target, own, self._temperature, is_regression=step.is_regression
          )
      )

    to_student = divergence(logits, step.logits)
    to_mentor = divergence(step.logits, logits)
    if self._weights is None:
      # The loss on the labels only, whatever other terms there are.
      doubt = tf.stop_gradient(step.supervised_loss + mentor_loss)
      both = loss + mentor_loss + tf.math.divide_no_nan(to_student + to_mentor, doubt)
    else:
      w, v = self._weights
      both = (1 - w) * loss + w * to_student + (1 - v) * mentor_loss + v * to_mentor
    return both + regularization, companions.CompanionValues(
        values.trainable, values._replace(trainable=[])
    )


def _mentor_values(companion: companions.CompanionValues) -> models.ModelValues:
  return companion.state._replace(trainable=companion.trainable)
