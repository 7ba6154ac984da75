"""Training by Keras's `fit` until a validation score is not better any more."""

import sys
from typing import Optional

import keras
import numpy as np

import tff_kd


def fit(
    model: keras.Model,
    evaluator: tff_kd.evaluation.CentralEvaluator,
    task: tff_kd.data.Task,
    examples: tff_kd.data.Examples,
    *,
    max_epochs: int,
    batch_size: int,
    seed: int,
    epochs_per_look: int = 1,
    patience: int = 3,
    name: Optional[str] = None,
) -> int:
  """Trains a compiled model on examples in one place, and keeps its best weights.

  Args:
    model: Is trained; has the weights of the best epoch afterwards.
    evaluator: Of the model.
    task: Its validation part and its metric say which epoch is the best.
    examples: What it is trained on.
    max_epochs: Passes at most.
    batch_size: Examples a step.
    seed: Decides the order of the examples.
    epochs_per_look: Passes between looks at the validation score.
    patience: So many looks without a better score end it.
    name: Makes each look a line on stderr, of this name.

  Returns:
    The best epoch; 0, with the weights as they came, if the first score is not finite.
  """
  sign = -1.0 if task.is_regression else 1.0
  best_score, best_epoch, best_weights, misses = -np.inf, 0, model.get_weights(), 0
  rng = np.random.default_rng(seed)
  for epoch in range(epochs_per_look, max_epochs + epochs_per_look, epochs_per_look):
    # Not Keras's own order, which is of what the process has drawn before.
    rows = [rng.permutation(len(examples)) for _ in range(epochs_per_look)]
    model.fit(
        *examples.take(np.concatenate(rows)), batch_size=batch_size, shuffle=False,
        verbose=0,
    )
    weights = evaluator.spec.weights_of(model)
    score = evaluator.evaluate(weights, *task.validation)[task.metric]
    if name is not None:
      print(f'{name}, epoch {epoch}: validation {score:.4f}', file=sys.stderr, flush=True)
    if not np.isfinite(score):
      break
    if sign * score > best_score:
      best_score, best_epoch, best_weights = sign * score, epoch, model.get_weights()
      misses = 0
    else:
      misses += 1
      if misses == patience:
        break
  model.set_weights(best_weights)
  return best_epoch
