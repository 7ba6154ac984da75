"""Prototypes: clients exchange each class's mean features, and draw theirs to these."""

from typing import Optional

import tensorflow as tf

from tff_kd.client import class_counts
from tff_kd.client import companions
from tff_kd.client import exchanges
from tff_kd.client import local_terms
from tff_kd import knowledge
from tff_kd import losses
from tff_kd.models import cohorts
from tff_kd.models import split


class PrototypeExchange(exchanges.Exchange):
  """Sums and counts of each class's features up, their quotients' parts down.

  A client adds up the features of its examples by class while it trains. Both sums and
  counts are sums over clients, so the mean features of a class can be had without any
  client's own. A class that no client of the last round had has no prototype.

  Source: Tan et al., "FedProto: Federated Prototype Learning across Heterogeneous
  Clients" (AAAI 2022), equations 3, 6 and 7 and Algorithm 1. The distance is the authors'
  implementation's: the mean squared difference of an example's features and the
  prototype of its class.
  """

  sends_down = True

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
    self._shape = class_counts.num_classes(students.first), sizes[0]
    self._weight = weight

  def payload_spec(self):
    return knowledge.KnowledgePayload(
        values=tf.TensorSpec(self._shape, tf.float32),
        weights=tf.TensorSpec(self._shape[:1], tf.float32),
    )

  def initial_shared(self):
    return self.zero_payload()

  def share(self, mean_payload, num_included, server_model, round_num):
    del server_model, round_num
    # Without any client the mean is NaN. The factor of a mean cancels.
    has_any = exchanges.has_reports(mean_payload, num_included)
    return tf.nest.map_structure(lambda t: tf.where(has_any, t, 0.0), mean_payload)

  def build_learning(self, student):
    split_model = self._splits[id(student)]

    def learn(weights, broadcast, client_state):
      del client_state
      sums, counts = broadcast.shared
      is_known = counts > 0.0
      prototypes = tf.math.divide_no_nan(
          sums, tf.where(is_known, counts, 0.0)[:, tf.newaxis]
      )
      term = _PrototypeTerm(
          split_model, self._weight, prototypes, tf.cast(is_known, tf.float32)
      )
      return exchanges.Learned(weights, (term,), tf.reduce_any(is_known))

    return learn

  def observer(self, student):
    split_model = self._splits[id(student)]

    def observe(step):
      one_hot = step.one_hot_labels()
      features = split_model.features(step.model, step.inputs)
      return knowledge.KnowledgePayload(
          values=tf.matmul(one_hot, features, transpose_a=True),
          weights=tf.reduce_sum(one_hot, axis=0),
      )

    return companions.Observer(zero=self.zero_payload, observe=observe)

  def payload(self, report):
    return report.observed


class _PrototypeTerm(local_terms.LocalTerm):
  """L + weight times the mean squared distance of features to the class's prototype."""

  def __init__(
      self,
      split_model: split.SplitModel,
      weight: float,
      prototypes: tf.Tensor,
      is_known: tf.Tensor,
  ):
    self._split, self._weight = split_model, weight
    self._prototypes, self._is_known = prototypes, is_known

  def __call__(self, loss, step):
    one_hot = step.one_hot_labels()
    features = self._split.features(step.model, step.inputs)
    distance = losses.mean_squared_error(tf.matmul(one_hot, self._prototypes), features)
    # Over all labels that count: one without a prototype has no such loss.
    has_one = tf.linalg.matvec(one_hot, self._is_known)
    return loss + self._weight * step.mean(has_one * distance)
