"""Counts of the classes among a client's labels.

`count` counts them before the training, for terms of the client's own loss; these counts
stay at the client. `one_hot` returns the rows that others add up over the steps (FD,
FedProto, FedGen, label density), and send as sums over clients.
"""

from typing import Any, Optional

import tensorflow as tf

from tff_kd import models


def check(spec: models.ModelSpec, subject: str) -> None:
  """Refuses a model whose labels have no classes to count.

  Args:
    spec: The model.
    subject: Names what needs the counts, for the error.

  Raises:
    ValueError: If the outputs are numbers, or labels of their own, or if the labels are
      neither class indices nor distributions over the classes.
  """
  models.check_has_classes(spec, subject)
  if spec.is_multi_label:
    raise ValueError(
        f'{subject} needs one class an example, and each output of the {spec.name} is a '
        f'label of its own (by its loss, {type(spec.loss).__name__}). Leave it out, or '
        'train one label at a time.'
    )
  labels = models.split_batch(spec.input_spec)[1]
  rank = len(spec.outputs_shape)
  if labels.shape.rank == rank or (
      labels.shape.rank == rank + 1
      and labels.shape[-1] in (1, None, spec.outputs_shape[-1])
  ):
    return
  raise ValueError(
      f'{subject} counts the classes of labels, which must be class indices or '
      f'distributions over the classes, one a prediction; found labels of shape '
      f'{labels.shape} with outputs of shape {spec.outputs_shape} an example.'
  )


def check_indices(spec: models.ModelSpec, subject: str) -> None:
  """Refuses a model whose labels are not class indices, of two classes or more.

  Args:
    spec: The model.
    subject: Names what needs the indices, for the error.

  Raises:
    ValueError: If labels are no integers, or not one a prediction, or if there is a
      single logit.
  """
  labels = tf.nest.flatten(models.split_batch(spec.input_spec)[1])
  if (
      spec.logits_shape[-1] < 2
      or len(labels) != 1
      or not labels[0].dtype.is_integer
      or labels[0].shape.rank > len(spec.logits_shape)
  ):
    raise ValueError(
        f'{subject} needs class indices as labels and two logits or more, found labels '
        f'{labels} and {spec.logits_shape[-1]} logits.'
    )


def num_classes(spec: models.ModelSpec) -> int:
  """Returns how many classes a model tells apart; a single logit tells two.

  Args:
    spec: The model.
  """
  return max(spec.logits_shape[-1], 2)


def count(
    spec: models.ModelSpec,
    labels: Any,
    mask: Optional[tf.Tensor] = None,
    sample_weight: Optional[tf.Tensor] = None,
) -> tf.Tensor:
  """Counts the classes of a batch's labels.

  A label does not count if the loss ignores it (padding), if the mask says so, or if its
  example has weight 0. All others count 1, whatever their weight.

  Args:
    spec: The model, for its classes and its loss.
    labels: Class indices `[batch, ...]` or `[batch, ..., 1]`, one a prediction; 0 or 1
      for a single logit; or distributions `[batch, ..., classes]`.
    mask: 0/1 float32 of leading axes of the labels: 1 where the label is known, and
      Keras does not mask the output; `None` if all are.
    sample_weight: As `ModelSpec.sample_weight` returns it; `None` without weights.

  Returns:
    float32 `[classes]`.
  """
  labels, mask = _usable(spec, labels, mask, sample_weight)
  if _are_distributions(spec, labels) or spec.logits_shape[-1] == 1:
    return tf.reduce_sum(_rows(spec, labels, mask), axis=0)
  # One-hot rows of all examples of a client would be large.
  indices, mask = _in_range(spec, labels, mask)
  # Whole numbers: their sum does not depend on the order.
  return tf.math.unsorted_segment_sum(mask, indices, num_classes(spec))


def one_hot(
    spec: models.ModelSpec,
    labels: Any,
    mask: Optional[tf.Tensor] = None,
    sample_weight: Optional[tf.Tensor] = None,
) -> tf.Tensor:
  """Returns labels as rows whose sum is `count`.

  Args:
    spec: As in `count`.
    labels: As in `count`.
    mask: As in `count`.
    sample_weight: As in `count`.

  Returns:
    float32 `[predictions, classes]`, one row a prediction; zeros where the label does
    not count.
  """
  return _rows(spec, *_usable(spec, labels, mask, sample_weight))


def _are_distributions(spec: models.ModelSpec, labels: tf.Tensor) -> bool:
  """Whether labels `[batch, ...]` have an axis of classes."""
  rank = len(spec.outputs_shape)
  return labels.shape.rank == rank + 1 and labels.shape[-1] == num_classes(spec)


def _usable(
    spec: models.ModelSpec,
    labels: Any,
    mask: Optional[tf.Tensor],
    sample_weight: Optional[tf.Tensor],
) -> tuple[tf.Tensor, tf.Tensor]:
  """Labels without a last axis of one, and float32 `[predictions]`: 1 if they count."""
  labels, _ = spec.usable_labels(tf.convert_to_tensor(labels), sample_weight)
  are_distributions = _are_distributions(spec, labels)
  if labels.shape.rank == len(spec.outputs_shape) + 1 and not are_distributions:
    labels = tf.squeeze(labels, axis=-1)
  outputs = labels if are_distributions else labels[..., tf.newaxis]
  mask = spec.metric_mask(
      labels[..., 0] if are_distributions else labels, outputs, mask, sample_weight
  )
  if mask is None:
    mask = tf.ones(tf.shape(outputs)[:-1])
  return labels, tf.reshape(mask, [-1])


def _in_range(
    spec: models.ModelSpec, labels: tf.Tensor, mask: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
  """Class indices `[predictions]`, and the mask without those out of range."""
  indices = tf.reshape(tf.cast(labels, tf.int32), [-1])
  in_range = (indices >= 0) & (indices < num_classes(spec))
  return tf.where(in_range, indices, 0), tf.where(in_range, mask, 0.0)


def _rows(spec: models.ModelSpec, labels: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
  """float32 `[predictions, classes]`, zeros where the mask is."""
  classes = num_classes(spec)
  if _are_distributions(spec, labels):
    rows = tf.reshape(tf.cast(labels, tf.float32), [-1, classes])
  elif spec.logits_shape[-1] == 1:
    # 0 or 1, or the probability of 1. (Keras's hinge losses also take -1 for 0.)
    positive = tf.clip_by_value(tf.reshape(tf.cast(labels, tf.float32), [-1]), 0.0, 1.0)
    rows = tf.stack([1.0 - positive, positive], axis=-1)
  else:
    indices, mask = _in_range(spec, labels, mask)
    rows = tf.one_hot(indices, classes)
  return rows * mask[:, tf.newaxis]
