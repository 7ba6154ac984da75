"""Keras optimizers as functions, with TensorFlow as the backend.

`keras.optimizers.Optimizer.stateless_apply` refuses TensorFlow, because there Keras's
optimizers update `tf.Variable`s under a `tf.distribute` strategy. Beneath that layer each
optimizer is written for all backends. `optimizer` removes the layer from one optimizer;
this can go when Keras offers `stateless_apply` for TensorFlow.
"""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tff_kd import internals

# `keras.optimizers.Optimizer` inherits from both; the backend's layer overrides the base.
_BASE, _BACKEND_LAYER = internals.optimizer_bases()


class _Stateless(keras.optimizers.Optimizer):
  """The base's own methods again, where the backend's layer has others."""

  for _name in set(vars(_BASE)) & set(vars(_BACKEND_LAYER)):
    if callable(vars(_BASE)[_name]) and not _name.startswith('__'):
      locals()[_name] = vars(_BASE)[_name]
  del _name


def optimizer(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]
) -> keras.optimizers.Optimizer:
  """Builds an optimizer for `apply`.

  Args:
    optimizer: A new Keras optimizer; it is changed.
    variables: The variables that it will update; they are not changed.

  Raises:
    ValueError: If the optimizer scales the loss, or averages weights over steps.
  """
  if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
    raise ValueError(
        f'A `LossScaleOptimizer` is not supported: pass the optimizer inside of it '
        f'({type(optimizer.inner_optimizer).__name__}), and use the mixed_bfloat16 '
        'policy, which needs no scaling.'
    )
  if optimizer.use_ema or optimizer.gradient_accumulation_steps:
    raise ValueError(
        f'{type(optimizer).__name__} has use_ema={optimizer.use_ema} and '
        f'gradient_accumulation_steps={optimizer.gradient_accumulation_steps}, which are '
        'not supported. Leave them at their defaults.'
    )
  # The base comes after the optimizer's own class, so that `super()` finds these methods.
  kind = type(optimizer)
  optimizer.__class__ = type(kind.__name__, (kind, _Stateless), {})
  optimizer.build(list(variables))
  return optimizer


def apply(
    optimizer: keras.optimizers.Optimizer,
    state: Sequence[tf.Tensor],
    gradients: Sequence[Any],
    values: Sequence[tf.Tensor],
) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
  """Makes one step.

  Args:
    optimizer: From `optimizer`.
    state: The values of its variables.
    gradients: One tensor a value, or `None`.
    values: The values of the variables that it was built with.

  Returns:
    The values and the state after the step.
  """
  values, state = optimizer.stateless_apply(list(state), list(gradients), list(values))
  return [tf.convert_to_tensor(v) for v in values], [
      tf.convert_to_tensor(v) for v in state
  ]
