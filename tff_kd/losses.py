"""Distillation losses in plain TensorFlow.

Every loss maps `[..., classes] -> [...]` (one value an example, or one a
position for sequences) and leaves the mean to `weighted_mean`. Targets never
receive a gradient. A last axis of size one is a single logit, the log-odds of a
binary label: the losses that need a distribution read `z` as the two classes
`[0, z]`.

Source: Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network"
(2015), section 2, for the temperature and its T^2 factor.
"""

from typing import Optional

import tensorflow as tf

from tff_kd import checks

# Probabilities are clipped to at least this before the logarithm, as in Keras.
_PROBABILITY_FLOOR = 1e-7


def logits_from_probabilities(probabilities: tf.Tensor) -> tf.Tensor:
  """Turns the outputs of a model that ends in softmax (or sigmoid) into logits.

  Args:
    probabilities: A float tensor `[..., classes]`, each row summing to one, or
      `[..., 1]` with the probability of the positive label.

  Returns:
    A tensor of the same shape: log-probabilities, or log-odds for a last axis of
    one. `softmax` (or `sigmoid`) of it gives the probabilities back.
  """
  p = tf.clip_by_value(probabilities, _PROBABILITY_FLOOR, 1.0)
  if probabilities.shape[-1] == 1:
    q = tf.clip_by_value(1.0 - probabilities, _PROBABILITY_FLOOR, 1.0)
    return tf.math.log(p) - tf.math.log(q)
  return tf.math.log(p)


def two_classes(logits: tf.Tensor) -> tf.Tensor:
  """Returns logits of two or more classes, also where the model has a single one.

  Args:
    logits: A float tensor `[..., classes]`.

  Returns:
    The logits as they are; for a last axis of one, the log-odds z of a binary label,
    `[..., 2]`: those of the two classes, [0, z].
  """
  if logits.shape[-1] == 1:
    return tf.concat([tf.zeros_like(logits), logits], axis=-1)
  return logits


def kl_divergence(
    target_logits: tf.Tensor, logits: tf.Tensor, temperature: float = 1.0
) -> tf.Tensor:
  """Computes T^2 KL(softmax(target / T) || softmax(logits / T)) over the classes.

  Args:
    target_logits: A float tensor `[..., classes]`; receives no gradient.
    logits: A float tensor of the same shape.
    temperature: T, above 0. The factor T^2 keeps the gradient's size
      independent of T (Hinton et al. 2015, section 2).

  Returns:
    A float tensor `[...]`.

  Raises:
    ValueError: If `temperature` is not above 0.
  """
  t = checks.check_temperature(temperature)
  logits = tf.convert_to_tensor(logits)
  # In float64: at a high temperature all terms nearly cancel. In float32, the result for
  # T = 1000 is off by .4.
  target, predicted = (
      tf.nn.log_softmax(tf.cast(two_classes(values), tf.float64) / t, axis=-1)
      for values in (tf.stop_gradient(target_logits), logits)
  )
  divergence = tf.reduce_sum(tf.exp(target) * (target - predicted), axis=-1)
  # A result below 0 is due to rounding, and this correction has no gradient.
  divergence += tf.stop_gradient(tf.maximum(-divergence, 0.0))
  return tf.cast(t * t * divergence, logits.dtype)


def not_true_kl_divergence(
    target_logits: tf.Tensor,
    logits: tf.Tensor,
    labels: tf.Tensor,
    temperature: float = 1.0,
) -> tf.Tensor:
  """Computes T^2 KL over all classes but the label's.

  Source: Lee et al., "Preservation of the Global Knowledge by Not-True
  Distillation in Federated Learning" (NeurIPS 2022), equation 4.

  Args:
    target_logits: A float tensor `[..., classes]` with at least three classes
      (with two, nothing is left to compare); receives no gradient.
    logits: A float tensor of the same shape.
    labels: An integer tensor `[...]` (or `[..., 1]`) of true classes.
    temperature: T, above 0.

  Returns:
    A float tensor `[...]`. It does not depend on the true class's logits.

  Raises:
    ValueError: If there are fewer than three classes or `temperature` is not
      above 0.
  """
  target_logits, logits = map(tf.convert_to_tensor, (target_logits, logits))
  labels = tf.convert_to_tensor(labels)
  num_classes = logits.shape[-1]
  if num_classes is None or num_classes < 3:
    raise ValueError(
        'The not-true divergence needs at least 3 classes, found logits of '
        f'shape {logits.shape}.'
    )
  if labels.shape.rank == logits.shape.rank:
    labels = tf.squeeze(labels, axis=-1)
  labels = tf.cast(labels, tf.int32)
  # The other classes' positions: 0..C-2, skipping the label.
  others = tf.range(num_classes - 1)
  others = others + tf.cast(others >= labels[..., tf.newaxis], tf.int32)
  rank = logits.shape.rank - 1
  return kl_divergence(
      tf.gather(target_logits, others, batch_dims=rank),
      tf.gather(logits, others, batch_dims=rank),
      temperature,
  )


def soft_target_cross_entropy(
    target_probabilities: tf.Tensor, logits: tf.Tensor
) -> tf.Tensor:
  """Computes the cross-entropy with a distribution: -sum_c p_c log softmax(logits)_c.

  Args:
    target_probabilities: A float tensor `[..., classes]` of probabilities (not
      logits), or `[..., 1]` of the positive label's; receives no gradient.
    logits: A float tensor of the same shape.

  Returns:
    A float tensor `[...]`.
  """
  p = tf.stop_gradient(target_probabilities)
  if p.shape[-1] == 1:
    p = tf.concat([1.0 - p, p], axis=-1)
  return -tf.reduce_sum(
      p * tf.nn.log_softmax(two_classes(logits), axis=-1), axis=-1
  )


def hard_label_cross_entropy(
    target_logits: tf.Tensor, logits: tf.Tensor
) -> tf.Tensor:
  """Computes the cross-entropy against the target's most likely class, as in Fed-ET.

  Source: Cho et al., "Heterogeneous Ensemble Knowledge Transfer for Training Large
  Models in Federated Learning" (Fed-ET, IJCAI 2022), section 3.2.

  Args:
    target_logits: A float tensor `[..., classes]`; receives no gradient.
    logits: A float tensor of the same shape.

  Returns:
    A float tensor `[...]`.
  """
  logits = two_classes(logits)
  label = tf.argmax(two_classes(target_logits), axis=-1)
  return soft_target_cross_entropy(
      tf.one_hot(label, logits.shape[-1], dtype=logits.dtype), logits
  )


def mean_absolute_error(target_logits: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
  """Computes the mean over the classes of |logits - target|, FedMD's digest loss.

  Source: Li & Wang, "FedMD" (2019), section 3, "Digest".

  Args:
    target_logits: A float tensor `[..., classes]`; receives no gradient.
    logits: A float tensor of the same shape.

  Returns:
    A float tensor `[...]`.
  """
  return tf.reduce_mean(
      tf.abs(logits - tf.stop_gradient(target_logits)), axis=-1
  )


def mean_squared_error(target_logits: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
  """Computes the mean over the classes of (logits - target)^2.

  Source: Ba & Caruana, "Do Deep Nets Really Need to be Deep?" (2014), eq. 1.

  Args:
    target_logits: A float tensor `[..., classes]`; receives no gradient.
    logits: A float tensor of the same shape.

  Returns:
    A float tensor `[...]`.
  """
  return tf.reduce_mean(
      tf.math.squared_difference(logits, tf.stop_gradient(target_logits)), axis=-1
  )


def output_divergence(
    target_outputs: tf.Tensor,
    outputs: tf.Tensor,
    temperature: float = 1.0,
    *,
    is_regression: bool,
) -> tf.Tensor:
  """Computes how far outputs are from target outputs.

  Args:
    target_outputs: A float tensor `[..., classes]` of logits, or of a regression
      `[..., numbers]`; receives no gradient.
    outputs: A float tensor of the same shape.
    temperature: T of `kl_divergence`, above 0; not used in a regression.
    is_regression: Whether the outputs are numbers and not logits.

  Returns:
    A float tensor `[...]`: the `kl_divergence`, or in a regression the
    `mean_squared_error`.
  """
  if is_regression:
    return mean_squared_error(target_outputs, outputs)
  return kl_divergence(target_outputs, outputs, temperature)


def with_rank(weights: tf.Tensor, rank: int) -> tf.Tensor:
  """Adds axes of size one to weights of leading axes, so that they broadcast.

  Args:
    weights: A tensor of at most `rank` axes, or of `rank + 1` whose last has size one.
    rank: The number of axes of the tensor that is weighted.

  Returns:
    The weights as a tensor of `rank` axes.

  Raises:
    ValueError: If they have more axes.
  """
  missing = rank - weights.shape.rank
  if missing < -1 or (missing == -1 and weights.shape[-1] not in (1, None)):
    raise ValueError(
        f'Expected weights of the first {rank} axes of what is weighted, found weights '
        f'of shape {weights.shape}. Of sequences, return one loss a position.'
    )
  if missing < 0:
    return tf.squeeze(weights, axis=-1)
  if not missing:
    return weights
  return tf.reshape(
      weights, tf.concat([tf.shape(weights), tf.ones([missing], tf.int32)], 0)
  )


def weighted_mean(
    values: tf.Tensor,
    weights: Optional[tf.Tensor] = None,
    sample_weight: Optional[tf.Tensor] = None,
) -> tf.Tensor:
  """Returns the mean of losses (one an example or a position) under weights or a mask.

  Args:
    values: A float tensor `[batch, ...]`.
    weights: Non-negative weights or a 0/1 mask: a tensor of the same shape, or
      of its leading axes (then each weight covers the rest). An entry of weight
      zero is left out whatever its value, NaN included.
    sample_weight: Non-negative factors of the values, of the same shape or of its
      leading axes. As in Keras, the divisor does not depend on them.

  Returns:
    A scalar: sum(s w v) / sum(w), and 0 if all weights are zero.
  """
  values = tf.convert_to_tensor(values)
  rank = values.shape.rank
  if sample_weight is not None:
    factors = with_rank(tf.cast(sample_weight, values.dtype), rank)
    values = tf.math.multiply_no_nan(values, factors)
  if weights is None:
    return tf.reduce_mean(values)
  weights = with_rank(tf.cast(weights, values.dtype), rank)
  weights = tf.broadcast_to(weights, tf.shape(values))
  return tf.math.divide_no_nan(
      tf.reduce_sum(tf.math.multiply_no_nan(values, weights)),
      tf.reduce_sum(weights),
  )
