"""One way to step TFF and Keras optimizers on the variables of a model."""

from collections.abc import Callable, Sequence
import collections
from typing import Any, Optional, Union

import keras
import tensorflow as tf
from tff_kd.compat import tff

Optimizer = Union[
    tff.learning.optimizers.Optimizer,
    Callable[[], keras.optimizers.Optimizer],
]

_LEARNING_RATE = tff.learning.optimizers.LEARNING_RATE_KEY


def check_optimizer(
    optimizer: Any, name: str, *, scheduled: bool = False
) -> Optimizer:
  """Returns `optimizer`, or refuses what cannot be used as one.

  Args:
    optimizer: A `tff.learning.optimizers.Optimizer`, or a no-argument function
      that returns a new `keras.optimizers.Optimizer`.
    name: The argument's name, for the error.
    scheduled: Whether its learning rate will be scaled from step to step.

  Raises:
    TypeError: If it is neither.
    ValueError: If the rate is to be scaled and the optimizer has a schedule of
      its own, or no rate.
  """
  if isinstance(optimizer, tff.learning.optimizers.Optimizer):
    state = optimizer.initialize(tf.TensorSpec([], tf.float32))
    if scheduled and _LEARNING_RATE not in optimizer.get_hparams(state):
      raise ValueError(
          f'`{name}` offers no learning rate to scale (it may have a schedule of '
          'its own). Use it without a schedule inside the round, or pass the '
          'plain optimizer.'
      )
    return optimizer
  if isinstance(optimizer, keras.optimizers.Optimizer):
    raise TypeError(
        f'`{name}` must be a function that returns a new Keras optimizer, found '
        f'an optimizer object. Its variables belong to one model, so pass '
        f'`lambda: keras.optimizers.{type(optimizer).__name__}(...)`.'
    )
  made = optimizer() if callable(optimizer) else optimizer
  if not isinstance(made, keras.optimizers.Optimizer):
    raise TypeError(
        f'`{name}` must be a `tff.learning.optimizers.Optimizer` or a no-argument '
        f'function that returns a `keras.optimizers.Optimizer`, found {made!r}.'
    )
  # A schedule's rate cannot be assigned; Keras offers no public way to ask.
  if scheduled and isinstance(
      getattr(made, '_learning_rate', None),
      keras.optimizers.schedules.LearningRateSchedule,
  ):
    raise ValueError(
        f'`{name}` has a learning rate schedule of its own. Use it without a '
        'schedule inside the round, or give it a constant rate.'
    )
  return optimizer


def initial_hparams(optimizer: Optimizer) -> collections.OrderedDict[str, Any]:
  """The hyperparameters a TFF optimizer lets one set; none for a Keras one."""
  if isinstance(optimizer, tff.learning.optimizers.Optimizer):
    state = optimizer.initialize(tf.TensorSpec([], tf.float32))
    return optimizer.get_hparams(state)
  return collections.OrderedDict()


def check_learning_rate_fn(
    learning_rate_fn: Optional[Callable[[Any], Any]], optimizer: Optimizer
) -> None:
  """Refuses a schedule over rounds for an optimizer whose rate cannot be set.

  Raises:
    ValueError: If there is a schedule, and the optimizer has no rate to set.
  """
  if learning_rate_fn is not None and _LEARNING_RATE not in initial_hparams(optimizer):
    raise ValueError(
        '`learning_rate_fn` needs a TFF optimizer with a learning rate, such as '
        f'`tff.learning.optimizers.build_sgdm()`, found {optimizer!r}.'
    )


def with_learning_rate(
    hparams: collections.OrderedDict[str, Any], learning_rate: Any
) -> collections.OrderedDict[str, Any]:
  """The hyperparameters of a TFF optimizer with another learning rate."""
  changed = collections.OrderedDict(hparams)
  changed[_LEARNING_RATE] = tf.cast(learning_rate, tf.float32)
  return changed


def build_stepper(
    optimizer: Optimizer, variables: Sequence[tf.Variable]
) -> Union['_TffStepper', '_KerasStepper']:
  """Binds an optimizer to variables, inside the computation that has them.

  The result has `initialize() -> state` (tensors to carry between rounds) and
  `begin(state) -> carry`, `apply(carry, gradients, rate_scale) -> carry`,
  `end(carry) -> state` around a loop. A gradient of `None` leaves its variable.
  """
  if isinstance(optimizer, tff.learning.optimizers.Optimizer):
    return _TffStepper(optimizer, variables)
  return _KerasStepper(optimizer, variables)


class _TffStepper:
  """The optimizer's state is the loop's carry."""

  def __init__(self, optimizer, variables):
    self._optimizer = optimizer
    self._variables = tuple(variables)

  def initialize(self, hparams=None):
    state = self._optimizer.initialize(
        tuple(tf.TensorSpec(v.shape, v.dtype) for v in self._variables)
    )
    if hparams is not None:
      state = self._optimizer.set_hparams(state, hparams)
    return state

  def begin(self, state):
    return state

  def end(self, carry):
    return carry

  def apply(self, carry, gradients, rate_scale: Optional[tf.Tensor] = None):
    if rate_scale is not None:
      hparams = self._optimizer.get_hparams(carry)
      scaled = collections.OrderedDict(hparams)
      scaled[_LEARNING_RATE] = hparams[_LEARNING_RATE] * rate_scale
      carry = self._optimizer.set_hparams(carry, scaled)
    carry, weights = self._optimizer.next(
        carry, self._variables, tuple(gradients)
    )
    if rate_scale is not None:
      carry = self._optimizer.set_hparams(carry, hparams)
    for variable, weight in zip(self._variables, weights, strict=True):
      variable.assign(weight)
    return carry


class _KerasStepper:
  """The state lives in the Keras optimizer's variables while the loop runs."""

  def __init__(self, optimizer_fn, variables):
    self._optimizer = optimizer_fn()
    self._variables = list(variables)
    self._optimizer.build(self._variables)
    # The optimizer's own list may gain nothing after `build`.
    self._state_variables = list(self._optimizer.variables)

  def initialize(self, hparams=None):
    del hparams  # A Keras optimizer has none that can be set from outside.
    return tuple(v.read_value() for v in self._state_variables)

  def begin(self, state):
    for variable, value in zip(self._state_variables, state, strict=True):
      variable.assign(value)
    return ()

  def end(self, carry):
    del carry
    return tuple(v.read_value() for v in self._state_variables)

  def apply(self, carry, gradients, rate_scale: Optional[tf.Tensor] = None):
    if rate_scale is not None:
      rate = tf.identity(self._optimizer.learning_rate)
      self._optimizer.learning_rate.assign(rate * rate_scale)
    self._optimizer.apply_gradients(zip(gradients, self._variables))
    if rate_scale is not None:
      self._optimizer.learning_rate.assign(rate)
    return carry
