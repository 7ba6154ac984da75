"""Whether labels, a loss and a model's outputs go together."""

from collections.abc import Sequence
import contextlib
from typing import Any, Optional, Union

import keras
import numpy as np
import tensorflow as tf

from tff_kd import losses

_BINARY_CROSS_ENTROPIES = (
    keras.losses.BinaryCrossentropy, keras.losses.BinaryFocalCrossentropy
)
# Keras's losses of outputs that are labels of their own, present or not.
BINARY_LOSSES = (
    *_BINARY_CROSS_ENTROPIES, keras.losses.Hinge, keras.losses.SquaredHinge
)
# Keras's losses of numbers. Another loss of numbers is taken for one of logits.
REGRESSION_LOSSES = (
    keras.losses.MeanSquaredError,
    keras.losses.MeanAbsoluteError,
    keras.losses.MeanAbsolutePercentageError,
    keras.losses.MeanSquaredLogarithmicError,
    keras.losses.Huber,
    keras.losses.LogCosh,
    keras.losses.Poisson,
)


def with_axis_of_outputs(labels: Any, outputs: tf.Tensor) -> Any:
  """Returns labels `[n]` of outputs `[n, 1]` as `[n, 1]`; others as they are.

  Without the axis Keras broadcasts the labels against the outputs.
  """
  rank = outputs.shape.rank
  if outputs.shape[-1] == 1 and rank > 1 and labels.shape.rank == rank - 1:
    return labels[..., tf.newaxis]
  return labels


def highest_label(
    loss: keras.losses.Loss, outputs_shape: Sequence[Optional[int]]
) -> Optional[int]:
  """Returns the highest label that a loss takes; `None` if it takes any number.

  The lowest label is 0.

  Args:
    loss: The loss.
    outputs_shape: The shape of the model's outputs.
  """
  if isinstance(loss, keras.losses.SparseCategoricalCrossentropy):
    return outputs_shape[-1] - 1
  return 1 if isinstance(loss, _BINARY_CROSS_ENTROPIES) else None


def wrong_labels(
    labels: np.ndarray, loss: keras.losses.Loss, outputs_shape: Sequence[Optional[int]]
) -> np.ndarray:
  """Returns which labels are out of a loss's range, bool in their shape.

  Args:
    labels: An array of labels.
    loss: The loss. Those that it ignores are in its range.
    outputs_shape: The shape of the model's outputs.

  Raises:
    ValueError: If they are not numbers.
  """
  if labels.dtype.kind not in 'fiub':
    raise ValueError(
        f'Labels must be numbers, found an array of the dtype {labels.dtype}. Encode '
        'them: `names, y = np.unique(labels, return_inverse=True)`.'
    )
  highest = highest_label(loss, outputs_shape)
  if highest is None:
    return np.zeros(labels.shape, bool)
  ignored = config_of(loss, 'ignore_class')
  wrong = ~((labels >= 0) & (labels <= highest))  # Also what is not a number.
  return wrong if ignored is None else wrong & (labels != ignored)


def wrong_labels_message(
    labels: np.ndarray, loss: keras.losses.Loss, outputs_shape: Sequence[Optional[int]]
) -> str:
  """Says which labels a loss takes, which labels there are, and what to do.

  Args:
    labels: An array of labels, some of which are wrong.
    loss: The loss.
    outputs_shape: The shape of the model's outputs.

  Returns:
    The end of a sentence that begins with the labels.
  """
  highest, ignored = highest_label(loss, outputs_shape), config_of(loss, 'ignore_class')
  used = labels[labels != ignored] if ignored is not None else labels
  hint = 'Mend them, or give the model an output for each class.'
  if (used.min(), used.max()) == (1, highest + 1):
    hint = 'They seem to be counted from 1: subtract 1.'
  elif isinstance(loss, _BINARY_CROSS_ENTROPIES):
    hint = 'Mend them, or take another loss.'
  return (
      f'must be from 0 to {highest}, as {type(loss).__name__} takes them'
      + (f' (or {ignored}, which it ignores)' if ignored is not None else '')
      + f', found {used.min()} to {used.max()}. {hint}'
  )


def config_of(made: Union[keras.losses.Loss, keras.metrics.Metric], key: str) -> Any:
  """Returns an argument that a loss or metric was built with; `None` if not known."""
  value = getattr(made, key, None)
  if value is None:
    with contextlib.suppress(Exception):  # A user's class may have no config.
      value = made.get_config().get(key)
  return value


def check_loss(loss, labels, outputs, name) -> int:
  """Raises an error for a loss that does not fit; returns the rank of its losses."""
  try:
    value = loss(labels, outputs)
  except Exception as error:
    shapes = tf.nest.map_structure(lambda t: (t.shape, t.dtype.name), labels)
    raise ValueError(
        f'The loss {type(loss).__name__} does not take labels of shape and dtype '
        f'{shapes} with outputs of shape {outputs.shape} of the {name}. '
        f'Keras says: {error}'
    ) from error
  if value.shape.rank != 0:
    raise ValueError(
        f'The loss {type(loss).__name__} must return a scalar, found the shape '
        f'{value.shape}. Leave its `reduction` at the default.'
    )
  each: Optional[tf.Tensor] = None
  with contextlib.suppress(NotImplementedError):  # It has a `__call__` of its own.
    labels = with_axis_of_outputs(labels, outputs)
    each = tf.convert_to_tensor(loss.call(labels, outputs))
  ignored = config_of(loss, 'ignore_class')
  if ignored is not None and (each is None or each.shape != outputs.shape[:-1]):
    raise ValueError(
        f'The loss {type(loss).__name__} has ignore_class={ignored}, so that `call` must '
        f'return one loss a label, of shape {outputs.shape[:-1]}, found '
        f'{"no `call`" if each is None else each.shape}. Leave the reduction to Keras.'
    )
  return 1 if each is None else max(each.shape.rank, 1)


def check_sample_weight(loss, labels, outputs, weight) -> None:
  """Raises an error for sample weights that do not fit."""
  try:
    weight = losses.with_rank(tf.cast(weight, tf.float32), outputs.shape.rank - 1)
    loss(labels, outputs, sample_weight=weight)
  except Exception as error:
    raise ValueError(
        'The sample weights must be `[batch]`, or have the shape of the outputs without '
        f'the last axis, found weights of shape {weight.shape} with outputs of shape '
        f'{outputs.shape} and the loss {type(loss).__name__}. Keras says: {error}'
    ) from error


def check_from_logits(loss, activation: Optional[str], name: str) -> bool:
  """Returns whether outputs are logits; raises an error if the loss disagrees."""
  from_logits = config_of(loss, 'from_logits')
  if from_logits and activation is not None:
    raise ValueError(
        f'The {name} ends in {activation} (its outputs are probabilities), but '
        f'{type(loss).__name__} has from_logits=True and would apply {activation}'
        f' again. Remove the last activation of the {name}, or build the loss '
        'with from_logits=False.'
    )
  if from_logits is False and activation is None:
    raise ValueError(
        f'{type(loss).__name__} has from_logits=False and expects probabilities, '
        f'but the outputs of the {name} are not probabilities: it ends in no softmax or '
        f'sigmoid. Build the loss with from_logits=True, or end the {name} in one.'
    )
  return activation is None if from_logits is None else bool(from_logits)
