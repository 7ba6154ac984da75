"""One way to step TFF and Keras optimizers: values and states in and out."""

from collections.abc import Callable, Sequence
import collections
from typing import Any, Optional, Union

import keras
import numpy as np
import tensorflow as tf
from tff_kd.compat import tff
from tff_kd import internals
from tff_kd import models
from tff_kd.models import stateless

Optimizer = Union[
    tff.learning.optimizers.Optimizer,
    Callable[[], keras.optimizers.Optimizer],
]

_LEARNING_RATE = tff.learning.optimizers.LEARNING_RATE_KEY
# The key of the inner optimizer's state in the state of a `_Wrapped`.
_INNER = 'optimizer'


def check_optimizer(
    optimizer: Any, name: str, *, scheduled: bool = False
) -> Optimizer:
  """Checks that a value can be used as an optimizer, and returns it.

  Args:
    optimizer: A `tff.learning.optimizers.Optimizer`, or a no-argument function
      that returns a new `keras.optimizers.Optimizer`.
    name: The argument's name, for the error.
    scheduled: Whether its learning rate will be scaled from step to step.

  Returns:
    The value.

  Raises:
    TypeError: If it is neither.
    ValueError: If the rate is to be scaled and the optimizer has a schedule of
      its own, or no rate.
  """
  if isinstance(optimizer, tff.learning.optimizers.Optimizer):
    if scheduled and _LEARNING_RATE not in initial_hparams(optimizer):
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
  made = optimizer() if models.is_builder(optimizer) else optimizer
  if not isinstance(made, keras.optimizers.Optimizer):
    raise TypeError(
        f'`{name}` must be a `tff.learning.optimizers.Optimizer` or a no-argument '
        f'function that returns a `keras.optimizers.Optimizer`, found {made!r}. Pass, '
        f'for example, `{name}=tff.learning.optimizers.build_sgdm(0.1)` or '
        f'`{name}=lambda: keras.optimizers.Adam(1e-3)`.'
    )
  # A schedule's rate cannot be assigned.
  if scheduled and isinstance(
      internals.learning_rate_of(made),
      keras.optimizers.schedules.LearningRateSchedule,
  ):
    raise ValueError(
        f'`{name}` has a learning rate schedule of its own. Use it without a '
        'schedule inside the round, or give it a constant rate.'
    )
  return optimizer


def initial_hparams(optimizer: Optimizer) -> collections.OrderedDict[str, Any]:
  """Returns the hyperparameters of a TFF optimizer that can be set.

  Args:
    optimizer: A TFF optimizer or a function that returns a Keras one.

  Returns:
    By name, such as `learning_rate`, float32 values; empty for a Keras optimizer.
  """
  if isinstance(optimizer, tff.learning.optimizers.Optimizer):
    state = optimizer.initialize(tf.TensorSpec([], tf.float32))
    return optimizer.get_hparams(state)
  return collections.OrderedDict()


def settings(optimizer: Optimizer) -> dict[str, Any]:
  """Returns what an optimizer is made with, by name.

  Two optimizers that differ only in a function, such as a user's schedule, may give the
  same settings.

  Args:
    optimizer: A TFF optimizer or a function that returns a Keras one.

  Returns:
    The name of the type, and the hyperparameters as numbers or as Keras serializes them.
  """
  if isinstance(optimizer, tff.learning.optimizers.Optimizer):
    hparams = initial_hparams(optimizer).items()
    found = {name: np.asarray(value).tolist() for name, value in hparams}
    return {'type': type(optimizer).__name__, **found}
  made = optimizer()
  try:
    config = dict(made.get_config())
  except NotImplementedError:  # A schedule without `get_config`.
    config = {}
  config.pop('name', None)
  return {'type': type(made).__name__, **config}


def check_learning_rate_fn(
    learning_rate_fn: Optional[Callable[[Any], Any]], optimizer: Optimizer
) -> None:
  """Raises an error if an optimizer's rate cannot follow a schedule over rounds.

  Args:
    learning_rate_fn: Maps a round's number to a learning rate; `None` for no schedule.
    optimizer: The optimizer that the schedule is for.

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
  """Returns the hyperparameters of a TFF optimizer with another learning rate.

  Args:
    hparams: Its hyperparameters, by name.
    learning_rate: A number or a float scalar.
  """
  changed = collections.OrderedDict(hparams)
  changed[_LEARNING_RATE] = tf.cast(learning_rate, tf.float32)
  return changed


def learning_rate(hparams: collections.OrderedDict[str, Any]) -> Optional[tf.Tensor]:
  """Returns the learning rate among a TFF optimizer's hyperparameters.

  Args:
    hparams: The hyperparameters, by name.

  Returns:
    The rate, or `None` if there is none.
  """
  return hparams[_LEARNING_RATE] if _LEARNING_RATE in hparams else None


def check_plain_sgd(optimizer: Optimizer, name: str, why: str) -> None:
  """Refuses an optimizer whose step is not the rate times the gradient.

  Args:
    optimizer: A TFF optimizer or a function that returns a Keras one.
    name: The argument's name, for the error.
    why: Why it must be SGD, a sentence.

  Raises:
    ValueError: If it is not SGD without momentum of TFF.
  """
  if list(initial_hparams(optimizer)) != [_LEARNING_RATE]:
    raise ValueError(
        f'`{name}` must be plain SGD, `tff.learning.optimizers.build_sgdm(rate)`, found '
        f'{optimizer!r}. {why}'
    )


class _Wrapped(tff.learning.optimizers.Optimizer):
  """A TFF optimizer that does something else before each step.

  The value that it needs is a further hyperparameter, which checkpoints therefore hold.
  """

  name: str

  def __init__(self, optimizer: tff.learning.optimizers.Optimizer, value: float):
    self._optimizer, self._value = optimizer, value

  def initialize(self, specs):
    return self._with_value(self._value, self._optimizer.initialize(specs))

  def next(self, state, weights, gradients):
    value, inner = state[self.name], state[_INNER]
    inner, weights = self._next(value, inner, weights, gradients)
    return self._with_value(value, inner), weights

  def get_hparams(self, state):
    hparams = collections.OrderedDict(self._optimizer.get_hparams(state[_INNER]))
    hparams[self.name] = state[self.name]
    return hparams

  def set_hparams(self, state, hparams):
    own = collections.OrderedDict(hparams)
    value = own.pop(self.name)
    return self._with_value(value, self._optimizer.set_hparams(state[_INNER], own))

  def _with_value(self, value, inner):
    return collections.OrderedDict([(self.name, value), (_INNER, inner)])


class _WithWeightDecay(_Wrapped):
  name = 'weight_decay'

  def _next(self, value, inner, weights, gradients):
    share = value * self._optimizer.get_hparams(inner)[_LEARNING_RATE]
    pairs = zip(tf.nest.flatten(weights), tf.nest.flatten(gradients), strict=True)
    decayed = [w if g is None else w * tf.cast(1.0 - share, w.dtype) for w, g in pairs]
    weights = tf.nest.pack_sequence_as(weights, decayed)
    return self._optimizer.next(inner, weights, gradients)


class _WithClippedGradients(_Wrapped):
  name = 'clip_norm'

  def _next(self, value, inner, weights, gradients):
    clipped, _ = tf.clip_by_global_norm(tf.nest.flatten(gradients), value)
    gradients = tf.nest.pack_sequence_as(gradients, clipped)
    return self._optimizer.next(inner, weights, gradients)


def with_weight_decay(
    optimizer: tff.learning.optimizers.Optimizer, weight_decay: float
) -> tff.learning.optimizers.Optimizer:
  """Adds decoupled weight decay to a TFF optimizer, as Keras's `weight_decay`.

  Before each step, each weight loses the share `learning_rate * weight_decay`. A weight
  without a gradient stays as it is.

  Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (ICLR 2019),
  algorithms 1 and 2.

  Args:
    optimizer: A TFF optimizer with a learning rate.
    weight_decay: Finite, 0 or more.

  Returns:
    An optimizer with the further hyperparameter `weight_decay`.

  Raises:
    TypeError: If it is no TFF optimizer.
    ValueError: If the decay is out of range, or the optimizer has no rate to read.
  """
  _check_tff_optimizer(optimizer)
  if not 0.0 <= weight_decay < float('inf'):
    raise ValueError(
        f'`weight_decay` must be finite, 0 or more, found {weight_decay!r}.'
    )
  if _LEARNING_RATE not in initial_hparams(optimizer):
    raise ValueError(
        'Weight decay needs an optimizer with a learning rate to read, such as '
        f'`tff.learning.optimizers.build_sgdm(0.1)`, found {optimizer!r}.'
    )
  return _WithWeightDecay(optimizer, weight_decay)


def with_clipped_gradients(
    optimizer: tff.learning.optimizers.Optimizer, norm: float
) -> tff.learning.optimizers.Optimizer:
  """Clips the gradients of a TFF optimizer's steps, as Keras's `global_clipnorm`.

  Source: Pascanu et al., "On the difficulty of training Recurrent Neural Networks"
  (ICML 2013), algorithm 1.

  Args:
    optimizer: A TFF optimizer.
    norm: The L2 norm of all gradients together is scaled down to this; finite, above 0.

  Returns:
    An optimizer with the further hyperparameter `clip_norm`.

  Raises:
    TypeError: If it is no TFF optimizer.
    ValueError: If the norm is out of range.
  """
  _check_tff_optimizer(optimizer)
  if not 0.0 < norm < float('inf'):
    raise ValueError(f'`norm` must be a finite number above 0, found {norm!r}.')
  return _WithClippedGradients(optimizer, norm)


def _check_tff_optimizer(optimizer: Any) -> None:
  if not isinstance(optimizer, tff.learning.optimizers.Optimizer):
    raise TypeError(
        '`optimizer` must be a `tff.learning.optimizers.Optimizer`, found '
        f'{optimizer!r}. Keras optimizers take `weight_decay` and `global_clipnorm` '
        'themselves.'
    )


def build_stepper(
    optimizer: Optimizer, variables: Sequence[keras.Variable]
) -> Union['_TffStepper', '_KerasStepper']:
  """Builds an optimizer as a function of the values of some variables.

  Args:
    optimizer: A TFF optimizer or a function that returns a Keras one.
    variables: Give names, shapes and constraints; they are not changed.

  Returns:
    An object with `initialize(hparams=None) -> state`, which gives the tensors to carry
    from step to step (and between rounds), and `apply(state, values, gradients,
    rate_scale=None) -> (state, values)`, which steps under the variables' constraints.
    A gradient of `None` leaves its value as it is.
  """
  if isinstance(optimizer, tff.learning.optimizers.Optimizer):
    return _TffStepper(optimizer, variables)
  return _KerasStepper(optimizer, variables)


def _of_known_shape(
    gradients: Sequence[Any], variables: Sequence[keras.Variable]
) -> tuple[Any, ...]:
  """Returns gradients with the shapes of the variables where TensorFlow lost them."""

  def known(gradient, shape):
    lost = isinstance(gradient, tf.Tensor) and not gradient.shape.is_fully_defined()
    return tf.ensure_shape(gradient, shape) if lost else gradient

  return tuple(known(g, v.shape) for g, v in zip(gradients, variables, strict=True))


class _TffStepper:

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

  def apply(self, state, values, gradients, rate_scale: Optional[tf.Tensor] = None):
    if rate_scale is not None:
      hparams = self._optimizer.get_hparams(state)
      scaled = with_learning_rate(hparams, hparams[_LEARNING_RATE] * rate_scale)
      state = self._optimizer.set_hparams(state, scaled)
    gradients = _of_known_shape(gradients, self._variables)
    state, values = self._optimizer.next(state, tuple(values), gradients)
    if rate_scale is not None:
      state = self._optimizer.set_hparams(state, hparams)
    return state, models.apply_constraints(self._variables, values)


class _KerasStepper:

  def __init__(self, optimizer_fn, variables):
    self._variables = list(variables)
    self._optimizer = stateless.optimizer(optimizer_fn(), self._variables)
    self._initial = [v.numpy() for v in self._optimizer.variables]
    self._rate = [
        i for i, v in enumerate(self._optimizer.variables)
        if v is internals.learning_rate_of(self._optimizer)
    ]

  def initialize(self, hparams=None):
    del hparams  # A Keras optimizer has none that can be set from outside.
    return tuple(tf.constant(v) for v in self._initial)

  def apply(self, state, values, gradients, rate_scale: Optional[tf.Tensor] = None):
    state = list(state)
    if rate_scale is not None:
      (place,) = self._rate
      rate = state[place]
      state[place] = rate * tf.cast(rate_scale, rate.dtype)
    gradients = [
        None if g is None else tf.convert_to_tensor(g)
        for g in _of_known_shape(gradients, self._variables)
    ]
    values, state = stateless.apply(self._optimizer, state, gradients, list(values))
    if rate_scale is not None:
      state[place] = rate
    return tuple(state), values
