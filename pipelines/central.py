"""Training in one place, by one compiled loop."""

from collections.abc import Callable
from typing import Any, Optional

import keras
import numpy as np
import tensorflow as tf
from tff_kd.compat import tff

import tff_kd
from tff_kd import graphs
from tff_kd import optimizers

OptimizerFn = Callable[[], keras.optimizers.Optimizer]


class Training:
  """Trains a model on examples in one place.

  Attributes:
    weights: The present `ModelWeights`.
  """

  def __init__(
      self,
      spec: tff_kd.models.ModelSpec,
      examples: tff_kd.data.Examples,
      *,
      batch_size: int,
      seed: int,
      optimizer_fn: OptimizerFn = keras.optimizers.Adam,
      initial_weights: Optional[tff.learning.models.ModelWeights] = None,
  ):
    """Initializes the training.

    Args:
      spec: The model.
      examples: The examples; with sample weights, as in Keras's `fit`.
      batch_size: The number of examples in a step; the last step may have fewer.
      seed: Decides the order of the examples, and what training draws.
      optimizer_fn: Returns a new optimizer.
      initial_weights: The initial weights; those of the spec if `None`.
    """
    self._spec, self._batch_size = spec, batch_size
    self._size, self._rng = len(examples), np.random.default_rng(seed)
    self._stepper = optimizers.build_stepper(optimizer_fn, spec.trainable_variables)
    self._examples = tf.nest.map_structure(tf.constant, tuple(examples))
    self._state = self._stepper.initialize()
    self._values = spec.values(
        initial_weights or spec.initial_weights, tf.constant([seed, 0])
    )
    self._run = graphs.function(self._steps)

  @property
  def weights(self) -> tff.learning.models.ModelWeights:
    return tf.nest.map_structure(lambda t: t.numpy(), self._values.weights)

  def run(self, num_epochs: int) -> None:
    """Trains for some epochs, each in an order of its own."""
    rows = [self._rng.permutation(self._size) for _ in range(num_epochs)]
    rows = tf.constant(np.concatenate(rows), tf.int32)
    self._values, self._state = self._run(
        self._examples, self._values, self._state, rows
    )

  def _steps(self, examples: Any, values: Any, state: Any, rows: tf.Tensor) -> Any:
    def step(start, values, state):
      batch = rows[start : start + self._batch_size]
      taken = tf.nest.map_structure(lambda a: tf.gather(a, batch), examples)
      inputs, labels = taken[:2]
      weight = self._spec.sample_weight(taken)
      if weight is not None:  # The label of an example of weight 0 may be anything.
        labels, _ = self._spec.usable_labels(labels, weight)
      with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(values.trainable)
        outputs, after, regularization, _ = self._spec.call(
            values, inputs, training=True
        )
        loss = self._spec.supervised_loss(labels, outputs, sample_weight=weight)
        loss = tf.cast(loss, tf.float32)
        loss += regularization
      state, trainable = self._stepper.apply(
          state, values.trainable, tape.gradient(loss, values.trainable)
      )
      after = after._replace(trainable=list(trainable))
      return start + self._batch_size, after, state

    loop = tf.while_loop(
        lambda start, *_: start < tf.size(rows), step, (0, values, state)
    )
    return loop[1:]


def fit(
    training: Training,
    evaluator: tff_kd.evaluation.CentralEvaluator,
    task: tff_kd.data.Task,
    *,
    max_epochs: int,
    epochs_per_look: int = 1,
    patience: int = 3,
    on_look: Optional[Callable[[int, float], None]] = None,
) -> tuple[tff.learning.models.ModelWeights, int]:
  """Trains a model until its validation score is not better any more.

  Args:
    training: The training, before its first epoch.
    evaluator: Evaluates the model.
    task: The task, whose metric on its validation part is the score.
    max_epochs: The maximum number of passes, rounded up to a multiple of
      `epochs_per_look`.
    epochs_per_look: The number of passes between looks at the validation score.
    patience: The number of looks without a better score that ends the training.
    on_look: Called with the epoch and the score at each look.

  Returns:
    The best weights and the best epoch; the initial weights and 0 if the first score is
    not finite.
  """
  sign = -1.0 if task.is_lower_better() else 1.0
  best_score, best_epoch, best_weights, misses = -np.inf, 0, training.weights, 0
  for epoch in range(epochs_per_look, max_epochs + epochs_per_look, epochs_per_look):
    training.run(epochs_per_look)
    weights = training.weights
    score = evaluator.evaluate(weights, *task.validation)[task.metric]
    if on_look is not None:
      on_look(epoch, score)
    if not np.isfinite(score):
      break
    if sign * score > best_score:
      best_score, best_epoch, best_weights = sign * score, epoch, weights
      misses = 0
    else:
      misses += 1
      if misses == patience:
        break
  return best_weights, best_epoch
