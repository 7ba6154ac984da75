"""The exchange of prototypes, the mean features of each class (FedProto)."""

import dataclasses
from typing import Optional

import tensorflow as tf

from tff_kd.client import class_counts
from tff_kd.client import exchanges
from tff_kd.client import local_terms
from tff_kd import losses
from tff_kd.models import cohorts
from tff_kd.models import split


class PrototypeExchange(exchanges.SumsByClass):
  """Sums of each class's features, whose means are the prototypes.

  Source: Tan et al., "FedProto: Federated Prototype Learning across Heterogeneous
  Clients" (AAAI 2022), equations 3, 6 and 7 and Algorithm 1. The distance is the authors'
  implementation's: the mean squared difference of an example's features and the
  prototype of its class.
  """

  def __init__(
      self,
      students: cohorts.Students,
      weight: float,
      split_layer: Optional[str] = None,
  ):
    """Initializes the exchange.

    Args:
      students: The clients' models, of one prediction an example; features of all of
        them must be as many.
      weight: lambda, above 0.
      split_layer: As `models.split.split_layers` has it.

    Raises:
      ValueError: If the weight is out of range, a model has no classes or cannot be
        split, or features differ in number.
    """
    local_terms.check_weight('prototype_weight', weight)
    for spec in students.specs:
      class_counts.check(spec, 'FedProto')
      if len(spec.outputs_shape) != 1:
        raise ValueError(
            'FedProto is about the classes of whole examples, and the student has '
            f'several predictions an example: its outputs have the shape '
            f'{spec.outputs_shape}. Choose another algorithm.'
        )
    self._splits = {id(s): split.SplitModel(s, split_layer) for s in students.specs}
    sizes = [split.num_features for split in self._splits.values()]
    if len(set(sizes)) > 1:
      raise ValueError(
          'Clients exchange features, of which all architectures must have as many, '
          f'found {sizes}. Give the layers before the heads one size.'
      )
    super().__init__(class_counts.num_classes(students.first), sizes[0])
    self._weight = weight

  def vectors(self, student, step):
    return self._splits[id(student)].features(step.model, step.inputs)

  def term(self, student, means, is_known):
    return _PrototypeTerm(self._splits[id(student)], self._weight, means, is_known)


@dataclasses.dataclass(frozen=True, eq=False)
class _PrototypeTerm(local_terms.LocalTerm):
  """L + weight times the mean squared distance of features to the class's prototype."""

  split_model: split.SplitModel
  weight: float
  prototypes: tf.Tensor
  is_known: tf.Tensor

  def __call__(self, loss, step):
    one_hot = step.one_hot_labels()
    features = self.split_model.features(step.model, step.inputs)
    distance = losses.mean_squared_error(tf.matmul(one_hot, self.prototypes), features)
    # The mean is over all labels that count; one without a prototype adds nothing.
    has_one = tf.linalg.matvec(one_hot, self.is_known)
    return loss + self.weight * step.mean(has_one * distance)
