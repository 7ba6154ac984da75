"""Callbacks of the training loop, which act around rounds and may stop it."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import math
import sys
from typing import Any, Optional

import numpy as np
import tqdm.auto
import tree

OPTIMIZERS = ('client', 'server')
SCHEDULES = ('constant', 'cosine', 'linear')
_LEARNING_RATE = 'learning_rate'
# The parts of a process's hyperparameters.
_PARTS = {'client': 'client_work', 'server': 'finalizer'}
_TRAIN_METRICS = 'client_work/train/'


@dataclasses.dataclass(kw_only=True)
class Training:
  """A training under way, as callbacks see it.

  Attributes:
    process: The process.
    num_rounds: The number of the last round.
    round_num: The number of completed rounds; 0 before the first one.
    state: The process's state after that round. A callback may assign another one, of
      the same type, with which the next round begins.
    history: The flat metrics of the rounds that this call of `train` has run.
    monitor: The metric that `train` monitors, or `None`.
    stop_reason: Why a callback has stopped the training; `None` if none has.
    ending: In `on_train_end`: 'finished' (also if a callback stopped it), 'interrupted',
      or 'failed'.
  """

  process: Any
  num_rounds: int
  round_num: int
  state: Any
  history: list[Mapping[str, Any]]
  monitor: Optional[str] = None
  stop_reason: Optional[str] = None
  ending: str = 'failed'

  def stop(self, reason: str) -> None:
    """Ends the training after this round, as if it was the last one.

    Args:
      reason: Why, for `TrainingResult.stop_reason`.
    """
    self.stop_reason = reason


class Callback:
  """Hooks around rounds: override the ones that are needed.

  Example, which stops at a goal:

  ```
  class Goal(tff_kd.simulation.Callback):

    def on_round_end(self, training, metrics):
      if metrics['client_work/train/accuracy'] > 0.9:
        training.stop('The clients are good enough.')
  ```

  A callback with state returns it from `get_state`, so that a resumed training restores
  it. States are matched by class (several of a class by their order), so callbacks may be
  added or left out when a training is resumed.
  """

  def on_train_begin(self, training: Training) -> None:
    """Acts before the first round of a call of `train`, resumed or not.

    Args:
      training: The training, with the state that the first round will begin with.
    """

  def on_round_end(self, training: Training, metrics: Mapping[str, Any]) -> None:
    """Acts after each round, when its metrics are released and before it is saved.

    Args:
      training: The training; `training.state` is the state after the round.
      metrics: The round's flat metrics.
    """

  def on_train_end(self, training: Training) -> None:
    """Acts at the end, also if the training is interrupted or fails.

    Args:
      training: The training; `training.ending` says how it ended.
    """

  def get_state(self) -> Any:
    """Returns this callback's state for checkpoints, a value that `json` can write."""
    return None

  def set_state(self, state: Any) -> None:
    """Restores the state, before `on_train_begin` of a resumed training.

    Args:
      state: The value that `get_state` returned, as `json` reads it.
    """


class ProgressBar(Callback):
  """Shows the progress on standard error; as a widget in notebooks."""

  def __init__(
      self,
      description: str = 'training',
      summary_fn: Optional[Callable[[Training, Mapping[str, Any]], str]] = None,
  ):
    """Initializes the bar.

    Args:
      description: The text before the bar.
      summary_fn: Maps the training and a round's flat metrics to the text after the bar.
        If `None`, this is the monitored metric, or else the clients' training metrics.
    """
    self._description = description
    self._summary_fn = summary_fn or _summary
    self._bar: Any = None

  def on_train_begin(self, training: Training) -> None:
    self._bar = tqdm.auto.tqdm(
        total=training.num_rounds, initial=training.round_num, unit='round',
        desc=self._description, file=sys.stderr, dynamic_ncols=True,
    )
    if training.round_num < training.num_rounds:
      self._bar.set_postfix_str('the first round takes longer: it prepares the graphs')

  def on_round_end(self, training: Training, metrics: Mapping[str, Any]) -> None:
    self._bar.n = training.round_num
    self._bar.set_postfix_str(self._summary_fn(training, metrics))

  def on_train_end(self, training: Training) -> None:
    if not training.history:
      self._bar.set_postfix_str('')
    self._bar.close()


def _summary(training: Training, metrics: Mapping[str, Any]) -> str:
  if training.monitor is not None:
    shown = {training.monitor: metrics[training.monitor]}
  else:
    shown = {
        name.removeprefix(_TRAIN_METRICS): value
        for name, value in metrics.items()
        if name.startswith(_TRAIN_METRICS) and isinstance(value, (float, np.floating))
    }
  return ', '.join(f'{name}={value:.4g}' for name, value in shown.items())


class EarlyStopping(Callback):
  """Stops when a metric has not improved for some rounds.

  Like `keras.callbacks.EarlyStopping`. Its state is part of checkpoints. If a training is
  resumed with another metric or mode, counting starts again.
  """

  def __init__(
      self, monitor: str, *, patience: int, mode: str = 'max', min_delta: float = 0.0
  ):
    """Initializes the callback.

    Args:
      monitor: The metric, of `evaluate` or of the process.
      patience: The number of rounds without a better value after which to stop.
      mode: 'max' if higher is better, 'min' if lower is.
      min_delta: The smallest improvement that counts, 0 or more.

    Raises:
      ValueError: If an argument is out of range.
    """
    if not isinstance(patience, int) or patience < 1:
      raise ValueError(f'`patience` must be an integer of 1 or more, found {patience!r}.')
    if mode not in ('max', 'min'):
      raise ValueError(f"`mode` must be 'max' or 'min', found {mode!r}.")
    if not 0.0 <= min_delta < math.inf:
      raise ValueError(f'`min_delta` must be finite, 0 or more, found {min_delta!r}.')
    self.monitor = monitor
    self._patience, self._min_delta = patience, min_delta
    self._mode, self._sign = mode, 1.0 if mode == 'max' else -1.0
    self._best, self._best_round = -math.inf, 0
    self._is_restored = False

  def on_train_begin(self, training: Training) -> None:
    if not training.round_num or not self._is_restored:
      # The state is that of another training.
      self._best, self._best_round = -math.inf, training.round_num
    self._is_restored = False
    self._check(training)

  def on_round_end(self, training: Training, metrics: Mapping[str, Any]) -> None:
    value = self._sign * float(metrics[self.monitor])
    if value > self._best + self._min_delta:
      self._best, self._best_round = value, training.round_num
    self._check(training)

  def _check(self, training: Training) -> None:
    if training.round_num - self._best_round >= self._patience:
      training.stop(f'{self.monitor} was not better for {self._patience} rounds')

  def get_state(self) -> Any:
    return {
        'best': self._best, 'best_round': self._best_round,
        'monitor': self.monitor, 'mode': self._mode,
    }

  def set_state(self, state: Any) -> None:
    if (state.get('monitor'), state.get('mode')) == (self.monitor, self._mode):
      self._best, self._best_round = state['best'], state['best_round']
      self._is_restored = True


class LearningRateSchedule(Callback):
  """Sets the learning rate of each round.

  The rate is set in the process's state, so a TFF optimizer is needed. It depends only on
  the round's number, so a resumed training has the same rates. Alternatively, a builder's
  `learning_rate_fn` makes the clients' rate part of the process; use only one of them.
  """

  def __init__(self, schedule: Callable[[int], float], *, optimizer: str = 'client'):
    """Initializes the callback.

    Args:
      schedule: Maps a round's number, from 1, to the learning rate, 0 or more; see
        `round_schedule`.
      optimizer: 'client', or 'server' for the optimizer that applies the mean delta.

    Raises:
      TypeError: If `schedule` is not a function.
      ValueError: If there is no such optimizer.
    """
    if not callable(schedule):
      raise TypeError(
          '`schedule` must be a function of the round\'s number, such as '
          f'`lambda r: 0.1 / r`, found {schedule!r}.'
      )
    if optimizer not in OPTIMIZERS:
      raise ValueError(f'`optimizer` must be one of {OPTIMIZERS}, found {optimizer!r}.')
    self._schedule, self._optimizer = schedule, optimizer

  def on_train_begin(self, training: Training) -> None:
    self._set_rate(training)

  def on_round_end(self, training: Training, metrics: Mapping[str, Any]) -> None:
    del metrics
    self._set_rate(training)

  def _set_rate(self, training: Training) -> None:
    """Sets the rate of the next round, if there is one."""
    round_num = training.round_num + 1
    if round_num > training.num_rounds:
      return
    rate = float(self._schedule(round_num))
    if not 0.0 <= rate < math.inf:
      raise ValueError(
          f'`schedule` must return finite rates of 0 or more, found {rate} for round '
          f'{round_num}.'
      )
    hparams = training.process.get_hparams(training.state)
    part, found = _PARTS[self._optimizer], []

    def with_rate(path: tuple[Any, ...], value: Any) -> Any:
      if path[0] != part or path[-1] != _LEARNING_RATE:
        return value
      found.append(path)
      return np.float32(rate)

    hparams = tree.map_structure_with_path(with_rate, hparams)
    if not found:
      raise ValueError(
          f'The process has no learning rate of a {self._optimizer} optimizer to set: '
          'use a TFF optimizer, such as `tff.learning.optimizers.build_sgdm(0.1)`, and '
          'for the server an algorithm that averages weights.'
      )
    training.state = training.process.set_hparams(training.state, hparams)


def round_schedule(
    kind: str, learning_rate: float, *, num_rounds: int, warmup_rounds: int = 0
) -> Callable[[int], float]:
  """Makes a learning-rate schedule over rounds, with a warm-up.

  The rate rises in equal steps to `learning_rate` in round `warmup_rounds`, and then
  follows the schedule towards 0 after the last round.

  Source: Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts"
  (ICLR 2017), equation 5, without restarts, for 'cosine'; Goyal et al., "Accurate, Large
  Minibatch SGD" (2017), section 2.2, the gradual warm-up.

  Args:
    kind: 'constant', 'cosine' (half a cosine), or 'linear'.
    learning_rate: The highest rate.
    num_rounds: The number of rounds.
    warmup_rounds: The number of warm-up rounds, among these.

  Returns:
    A function from a round's number, from 1, to the rate.

  Raises:
    ValueError: If an argument is out of range.
  """
  if kind not in SCHEDULES:
    raise ValueError(f'`kind` must be one of {SCHEDULES}, found {kind!r}.')
  if not 0 <= warmup_rounds < num_rounds:
    raise ValueError(
        f'`warmup_rounds` must be 0 or more, and below the {num_rounds} rounds, found '
        f'{warmup_rounds}.'
    )

  def rate(round_num: int) -> float:
    if round_num <= warmup_rounds:
      return learning_rate * round_num / warmup_rounds
    # The share of the rounds after the warm-up that are completed.
    done = min((round_num - 1 - warmup_rounds) / (num_rounds - warmup_rounds), 1.0)
    factors = {
        'constant': 1.0, 'cosine': 0.5 * (1.0 + math.cos(math.pi * done)),
        'linear': 1.0 - done,
    }
    return learning_rate * factors[kind]

  return rate


def check_callbacks(callbacks: Any) -> tuple[Callback, ...]:
  """Returns callbacks as a tuple.

  Args:
    callbacks: A sequence of callbacks.

  Raises:
    TypeError: If they are not a sequence of `Callback`s.
  """
  if not isinstance(callbacks, Sequence):
    raise TypeError(f'`callbacks` must be a list of callbacks, found {callbacks!r}.')
  for callback in callbacks:
    if not isinstance(callback, Callback):
      raise TypeError(
          'Each of `callbacks` must be a `tff_kd.simulation.Callback`, found '
          f'{callback!r}. Derive a class from it, with `on_round_end(self, training, '
          'metrics)`.'
      )
  return tuple(callbacks)


def saved_states(callbacks: Sequence[Callback]) -> bytes:
  """Returns the states of callbacks for a checkpoint.

  Args:
    callbacks: The callbacks.
  """
  return json.dumps(
      [[type(callback).__qualname__, callback.get_state()] for callback in callbacks]
  ).encode()


def restore_states(callbacks: Sequence[Callback], saved: bytes) -> None:
  """Restores the states of callbacks, matched by class.

  Args:
    callbacks: The callbacks.
    saved: From `saved_states`.
  """
  states = json.loads(saved)
  for callback in callbacks:
    name = type(callback).__qualname__
    found = next((saved for saved in states if saved[0] == name), None)
    if found is not None:
      states.remove(found)
      callback.set_state(found[1])
