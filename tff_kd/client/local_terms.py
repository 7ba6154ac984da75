"""Terms of the clients' loss beside the supervised one; they combine freely.

A term takes the loss so far and returns the loss with its own part, and may adjust the
logits on which the supervised loss is taken: terms apply in the order in which they are
given.
"""

import abc
from collections.abc import Sequence
import dataclasses
from typing import Any, NamedTuple, Optional

import tensorflow as tf

from tff_kd import checks
from tff_kd.client import class_counts
from tff_kd import losses
from tff_kd import models

# The models that a term may learn from; all but the teacher are students.
TARGETS = ('student', 'student_history', 'teacher')


class LocalStep(NamedTuple):
  """The values of one step of local training, as a term sees them.

  Attributes:
    inputs: The batch's inputs.
    logits: float32 `[batch, ..., classes]`, of the model in training.
    labels: The batch's labels; class indices are in range.
    labelled: float32 `[batch]`, 1 where the label is known; `None` if all are.
    target_logits: Like `logits`, of the term's target; `None` without one.
    supervised_loss: float32 scalar, the loss on the labels alone; `None` in
      `adjusted_logits`, which comes before it.
    step_num: int32, how many of the client's steps in this round came before.
    weights: The model's trainable weights.
    received: The trainable weights as the server sent them.
    counted: 0/1 float32 of leading axes of `labels`, 0 where the loss ignores the label
      or Keras masks the output (padding); `None` where all count.
    is_regression: Whether the outputs are numbers to be fitted, not logits.
    model: The `models.BoundModel` in training, for terms that call it again.
    sample_weight: float32, of the leading axes of `logits`; `None` without weights.
    class_counts: float32 `[classes]` (two of a single logit), how often each class is
      among the client's labels of this round, see `client.class_counts`; `None` unless a
      term `needs_class_counts`. They are the client's own and never sent.
  """

  inputs: Any
  logits: tf.Tensor
  labels: Any
  labelled: Optional[tf.Tensor]
  target_logits: Optional[tf.Tensor]
  supervised_loss: Optional[tf.Tensor]
  step_num: tf.Tensor
  weights: list[tf.Tensor]
  received: Sequence[tf.Tensor]
  counted: Optional[tf.Tensor] = None
  is_regression: bool = False
  model: Optional[models.BoundModel] = None
  sample_weight: Optional[tf.Tensor] = None
  class_counts: Optional[tf.Tensor] = None

  def one_hot_labels(self) -> tf.Tensor:
    """Returns the labels as one-hot vectors, zeros where a label does not count.

    For models with one class a prediction, see `client.class_counts`.

    Returns:
      float32 `[predictions, classes]`.
    """
    mask = self.labelled
    if self.counted is not None:
      mask = self.counted
      if self.labelled is not None:
        mask *= losses.with_rank(self.labelled, mask.shape.rank)
    return class_counts.one_hot(self.model.spec, self.labels, mask, self.sample_weight)

  def mean(self, values: tf.Tensor) -> tf.Tensor:
    """Returns the mean over the batch, as the supervised loss takes it.

    Args:
      values: float32 `[batch, ...]`, one an example or a position.

    Returns:
      A scalar: the sum, each value times its sample weight, divided by how many labels
      count; 0 if none does.
    """
    return losses.weighted_mean(values, self.counted, self.sample_weight)


class LocalTerm(abc.ABC):
  """A term of the clients' loss.

  Attributes:
    target: The model whose logits the term needs: 'student' (the global one as received),
      'student_history' (the mean of the last global ones), 'teacher', or `None`. Any
      other than the received student is sent down too, and costs bytes.
    history_size: For 'student_history': how many global students the mean is taken of.
      The server's state holds that many.
    needs_labels: Whether it needs the label of every example.
    needs_classes: Whether it cannot serve a regression model.
    needs_received: Whether it compares with `LocalStep.received`, so that the server must
      send weights.
    needs_class_counts: Whether it looks at `LocalStep.class_counts`, which costs a pass
      over the client's labels before the training. It then serves models of one class
      a prediction only.
  """

  target: Optional[str] = None
  history_size: int = 5
  needs_labels: bool = False
  needs_classes: bool = False
  needs_received: bool = False
  needs_class_counts: bool = False

  def adjusted_logits(self, logits: tf.Tensor, step: LocalStep) -> tf.Tensor:
    """Returns the logits on which the supervised loss is taken.

    All else (other terms, metrics, what is sent) sees the model's own logits.

    Args:
      logits: float32 `[batch, ..., classes]`, as the terms before have adjusted them.
      step: The `LocalStep`, whose `logits` are the model's own.

    Returns:
      Logits of the same shape; here, those given.
    """
    del step
    return logits

  @abc.abstractmethod
  def __call__(self, loss: tf.Tensor, step: LocalStep) -> tf.Tensor:
    """Returns the scalar loss with this term."""


def check_weight(name: str, value: float, at_most: float = float('inf')) -> None:
  """Raises an error if the weight of a term is not above 0, or above its limit.

  Args:
    name: The argument's name, for the error.
    value: The weight.
    at_most: The limit, inclusive.

  Raises:
    ValueError: Naming the weight.
  """
  if not 0.0 < value <= at_most or value == float('inf'):
    limit = 'finite' if at_most == float('inf') else f'at most {at_most:g}'
    raise ValueError(f'`{name}` must be above 0 and {limit}, found {value!r}.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalDistillation(LocalTerm):
  """(1 - weight) L + weight KL_T(target || z); of a regression model, their MSE.

  Source: Yao et al., "Local-Global Knowledge Distillation in Heterogeneous
  Federated Learning with Non-IID Data" (FedGKD, 2021), the local objective.

  Attributes:
    target: 'student', 'student_history' or 'teacher'.
    weight: Above 0 and at most 1, the share of the distillation term.
    temperature: Above 0.
    history_size: M of FedGKD, for 'student_history': how many global students the
      mean is taken of. The server's state holds that many.
  """

  target: str = 'student'
  weight: float = 0.2
  temperature: float = 1.0
  history_size: int = 5

  def __post_init__(self):
    checks.check_temperature(self.temperature)
    if self.target not in TARGETS:
      raise ValueError(
          f'`target` of a local distillation must be one of {TARGETS}, found '
          f'{self.target!r}.'
      )
    check_weight('weight', self.weight, at_most=1.0)
    checks.check_positive_integer(self.history_size, 'history_size')

  def __call__(self, loss, step):
    divergence = step.mean(
        losses.output_divergence(
            step.target_logits, step.logits, self.temperature,
            is_regression=step.is_regression,
        )
    )
    return (1.0 - self.weight) * loss + self.weight * divergence


@dataclasses.dataclass(frozen=True, kw_only=True)
class NotTrueDistillation(LocalTerm):
  """L + weight KL_T(received student || z) over all classes but the true one.

  Source: Lee et al., "Preservation of the Global Knowledge by Not-True
  Distillation in Federated Learning" (FedNTD, NeurIPS 2022), section 4.

  Attributes:
    weight: beta, above 0.
    temperature: tau, above 0.
  """

  weight: float = 1.0
  temperature: float = 1.0
  target: str = dataclasses.field(default='student', init=False)

  needs_labels = True
  needs_classes = True

  def __post_init__(self):
    checks.check_temperature(self.temperature)
    check_weight('weight', self.weight)

  def __call__(self, loss, step):
    labels = tf.convert_to_tensor(step.labels)
    if not labels.dtype.is_integer:
      raise ValueError(
          'The not-true distillation needs class indices as labels, found labels '
          f'of dtype {labels.dtype.name} and shape {labels.shape}.'
      )
    return loss + self.weight * step.mean(
        losses.not_true_kl_divergence(
            step.target_logits, step.logits, labels, self.temperature
        )
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProximalTerm(LocalTerm):
  """L + weight / 2 ||w - w_received||^2, over the trainable weights.

  Source: Li et al., "Federated Optimization in Heterogeneous Networks" (FedProx,
  MLSys 2020), equation 2.

  Attributes:
    weight: mu, above 0.
  """

  weight: float = 0.01

  needs_received = True

  def __post_init__(self):
    check_weight('weight', self.weight)

  def __call__(self, loss, step):
    squares = [
        # In float32, as the loss: a sum in bfloat16 stops growing at 256.
        tf.reduce_sum(
            tf.math.squared_difference(tf.cast(w, tf.float32), tf.cast(old, tf.float32))
        )
        for w, old in zip(
            step.weights, map(tf.stop_gradient, step.received), strict=True
        )
    ]
    return loss + 0.5 * self.weight * tf.add_n(squares)
