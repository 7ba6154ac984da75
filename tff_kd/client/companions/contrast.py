"""Model contrast: a client's features are drawn to the received model's.

Each client keeps the model with which its last round ended. In local training the
features of each example are drawn to those that the received student has of it, and away
from those of the kept model.

Source: Li, He & Song, "Model-Contrastive Federated Learning" (MOON, CVPR 2021), equation
3 and Algorithm 1.
"""

import dataclasses
import math
from typing import Optional

import tensorflow as tf

from tff_kd.client import companions
from tff_kd.client import local_terms
from tff_kd import models
from tff_kd.models import split


def contrastive_loss(
    features: tf.Tensor,
    received: tf.Tensor,
    previous: tf.Tensor,
    temperature: float,
) -> tf.Tensor:
  """Computes -log(exp(s_r / T) / (exp(s_r / T) + exp(s_p / T))), s being cosines.

  s_r is the cosine similarity of the features and the received model's, s_p that of the
  features and the previous model's.

  Source: Li, He & Song (MOON, CVPR 2021), equation 3.

  Args:
    features: float32 `[batch, features]`, of the model in training.
    received: float32 `[batch, features]`, of the received model; receives no gradient.
    previous: float32 `[batch, features]`, of the client's previous model; receives no
      gradient.
    temperature: T, above 0.

  Returns:
    float32 `[batch]`.
  """
  own, near, far = (
      tf.math.l2_normalize(vectors, axis=-1)
      for vectors in (features, tf.stop_gradient(received), tf.stop_gradient(previous))
  )
  difference = tf.reduce_sum(own * (far - near), axis=-1)
  return tf.nn.softplus(difference / temperature)


@dataclasses.dataclass(frozen=True, eq=False)
class _ContrastTerm(local_terms.LocalTerm):
  """L + weight times the contrastive loss."""

  split_model: split.SplitModel
  received: models.BoundModel
  previous: models.BoundModel
  weight: float
  temperature: float

  def __call__(self, loss, step):
    own, received, previous = (
        self.split_model.features(model, step.inputs)
        for model in (step.model, self.received, self.previous)
    )
    return loss + self.weight * step.mean(
        contrastive_loss(own, received, previous, temperature=self.temperature)
    )


class ModelContrast(companions.Companion):
  """Keeps each client's previous model, and contrasts the student with it.

  A new client's previous model has the initial weights: where these are what it receives,
  the term's gradient is 0. Features are those of inference mode (no dropout, and the
  running statistics of batch norm).
  """

  exchanges = False
  needs_one_architecture = True

  def __init__(
      self,
      student: models.ModelSpec,
      *,
      split_layer: Optional[str] = None,
      weight: float = 1.0,
      temperature: float = 0.5,
  ):
    """Initializes the companion.

    Args:
      student: The clients' model, one prediction an example.
      split_layer: As `models.split.split_layers` has it.
      weight: mu, above 0.
      temperature: tau, above 0.

    Raises:
      ValueError: If a number is out of range, the student cannot be split, or has
        several predictions an example.
    """
    local_terms.check_weight('contrast_weight', weight)
    if not 0.0 < temperature < math.inf:
      raise ValueError(
          '`contrast_temperature` must be above 0 and finite, found '
          f'{temperature!r}; the paper has 0.5.'
      )
    if len(student.outputs_shape) != 1:
      raise ValueError(
          'MOON compares the features of whole examples, and the student has several '
          f'predictions an example: its outputs have the shape {student.outputs_shape}. '
          'Choose another algorithm.'
      )
    self.client_spec = student
    self._split = split.SplitModel(student, split_layer)
    self._weight, self._temperature = weight, temperature

  def attach(self, student):
    del student  # The one that this was built for.
    spec = self.client_spec

    def begin(beginning):
      previous = models.BoundModel(spec, spec.values(beginning.client_state.weights))
      term = _ContrastTerm(
          self._split, beginning.student, previous, self._weight, self._temperature
      )
      return [term], companions.CompanionValues()

    def end(observed, student, values):
      del observed, values
      return companions.ClientState(weights=student.values.weights), ()

    return companions.Attachment(begin, end)
