"""The training loop, which stops at convergence, keeps the best state and resumes."""

import asyncio
import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
import contextlib
import dataclasses
import functools
import json
import math
import time
from typing import Any, NamedTuple, Optional, Union

from absl import logging
import numpy as np
from tff_kd.compat import tff
import tree

from tff_kd import checks
from tff_kd.client import conditions
from tff_kd import communication
from tff_kd.data import client_names
from tff_kd import optimizers
from tff_kd.privacy import accounting
from tff_kd.privacy import differential
from tff_kd import rounds
from tff_kd.rounds import description
from tff_kd.rounds import round_arguments
from tff_kd.simulation import callbacks as callbacks_lib
from tff_kd.simulation import checkpoints
from tff_kd.simulation import client_states as client_states_lib
from tff_kd.simulation import participation

ROUND_SECONDS = 'round_seconds'
_COUNTS = 'client_work/participation/num_'
_SKIPPED = 'round_skipped'
# The key, in a checkpoint's JSON, of the metric that chose the best state, and its mode.
_MONITORED = 'monitored'
# The names of hyperparameters in the states of TFF's optimizers. Other optimizers' states
# have no names.
_HYPERPARAMETERS = frozenset(
    [
        'learning_rate', 'momentum', 'beta_1', 'beta_2', 'epsilon', 'weight_decay',
        'clip_norm',
    ]
)
# The most rounds for which to warn about clients that are left out.
_MAX_WARNINGS = 3


class TrainingResult(NamedTuple):
  """The result of a training.

  Attributes:
    state: The process state after the last round.
    round_num: The number of completed rounds.
    best_state: The state with the best monitored metric; `state` itself if no metric is
      monitored.
    best_round: The round that produced `best_state`.
    history: One flat dict of metrics for each round of this call.
    converged: Whether `patience` ended the training, not the number of rounds.
    budget_spent: Whether the privacy budget ended the training.
    stop_reason: Why a callback stopped the training; `None` if none did.
    interrupted: Whether Ctrl-C, or a notebook's stop button, ended the training.
  """

  state: Any
  round_num: int
  best_state: Any
  best_round: int
  history: list[dict[str, float]]
  converged: bool
  budget_spent: bool = False
  stop_reason: Optional[str] = None
  interrupted: bool = False


class _Progress(NamedTuple):
  """The content of a checkpoint, from which a training resumes."""

  state: Any
  best_state: Any
  best_round: Any
  best_value: Any
  # How often each private round has begun, as JSON; b'' without an accountant.
  private_rounds: Any
  # The settings of the process, as JSON: a process of another model, rate or noise cannot
  # resume from here. Also what is monitored, which may change.
  made_by: Any
  # The states of callbacks, as JSON.
  callbacks: Any


class _Completed(NamedTuple):
  """The results of the completed rounds, consistent whenever training is interrupted.

  Attributes:
    progress: The progress after the last completed round.
    round_num: The number of that round.
    history: The metrics of each round of this training.
  """

  progress: _Progress
  round_num: int
  history: tuple[dict[str, Any], ...]


def flatten_metrics(metrics: Any, prefix: str = '') -> dict[str, Any]:
  """Flattens nested metrics to one level: 'client_work/train/loss'.

  Each number of an array has its own name: 'client_work/train/f1_score_0'.

  Args:
    metrics: Nested mappings of numbers and arrays.
    prefix: The beginning of each name.

  Returns:
    By name, the numbers.
  """
  if isinstance(metrics, Mapping):
    flat = {}
    for key, value in metrics.items():
      flat.update(flatten_metrics(value, f'{prefix}{key}/'))
    return flat
  if isinstance(metrics, tuple) and not metrics:
    return {}
  name = prefix.rstrip('/')
  if isinstance(metrics, np.ndarray) and metrics.ndim:
    return {
        '_'.join([name, *map(str, place)]): metrics[place]
        for place in np.ndindex(metrics.shape)
    }
  return {name: metrics}


def train(
    process: tff.learning.templates.LearningProcess,
    *,
    select_clients: Callable[[int], Any],
    num_rounds: int,
    evaluate: Optional[Callable[[Any], Mapping[str, float]]] = None,
    monitor: Optional[str] = None,
    monitor_mode: str = 'max',
    patience: Optional[int] = None,
    initial_state: Optional[Any] = None,
    program_state_manager: Optional[tff.program.ProgramStateManager] = None,
    rounds_per_saving: int = 1,
    release_managers: Sequence[tff.program.ReleaseManager] = (),
    client_states: Optional[client_states_lib.ClientStates] = None,
    accountant: Optional[accounting.PrivacyAccountant] = None,
    callbacks: Sequence[callbacks_lib.Callback] = (),
    progress_bar: Union[bool, callbacks_lib.ProgressBar] = True,
) -> TrainingResult:
  """Runs a number of rounds, or fewer if a metric stops improving.

  Like `tff.simulation.run_training_process`, and with the same managers, but it stops at
  convergence and keeps the best state. If the program state manager has a saved state,
  training resumes from it. A round depends on its number only through `select_clients`
  and the process, so a resumed training gives the same results as an uninterrupted one
  if these do.

  Ctrl-C, or a notebook's stop button, ends the training. The last completed round is
  saved and returned with the history so far; the interrupted round has no effect. A
  second Ctrl-C is raised as `KeyboardInterrupt`.

  Args:
    process: Any `LearningProcess`.
    select_clients: Maps the round number, from 1, to the round's client data: datasets,
      or a list or an array of clients' numbers or names. If it is a `Participation`, its
      counts are added to the metrics.
    num_rounds: The number of the last round.
    evaluate: Maps the state after a round to metrics. If it has an attribute
      `metric_names`, it is not called before the first round to learn the names.
    monitor: The metric, of `evaluate` or of the process, that chooses the best state.
      Needed for `patience`. If a training is resumed with another metric or mode, the
      best state is chosen from the rounds after that, with a warning.
    monitor_mode: 'max' if higher is better, 'min' if lower is, as in Keras.
    patience: Stop after so many rounds without a better `monitor`.
    initial_state: The state to begin with if nothing was saved; `process.initialize()`
      if `None`. It holds noise and clip, so the state of a process with another
      `privacy` is refused.
    program_state_manager: Saves the training's progress; see
      `tff.program.FileProgramStateManager`.
    rounds_per_saving: The number of rounds between savings; the last round is always
      saved.
    release_managers: Get each round's flat metrics with the round number as key. For a
      process of this package, these include the bytes moved (`communication.ledger`).
    client_states: The states of the clients of a `StatefulClientsProcess`;
      `select_clients` must then return numbers or names. A resumed training continues
      with the states at its checkpoint. With an `initial_state`, training begins with
      the clients' present states, which are saved at once as round 0 if there is a
      `program_state_manager`. States that belong neither to a checkpoint nor to the best
      state nor, without checkpoints, to the last round are deleted.
    accountant: For a process with `privacy`. Adds `privacy/epsilon`, the cost of all
      rounds so far, and `privacy/rounds`, the number of rounds that have begun, to the
      metrics; saves the account with the training; and ends the training before its
      budget would be exceeded. A round that is run again is accounted as a second
      release of the same clients' sums. So are, with an `initial_state`, the rounds of
      an earlier training with the same accountant.
    callbacks: Called around rounds, in their order; may stop the training. See
      `tff_kd.simulation.Callback`, `EarlyStopping`, `LearningRateSchedule`.
    progress_bar: Whether to show the progress on standard error (as a widget in
      notebooks), or the `ProgressBar` to use.

  Returns:
    A `TrainingResult`.

  Raises:
    CheckpointError: If the saved training had another model, other optimizers or another
      `privacy` (for a process of TFF's own: another model, or a hyperparameter that the
      state names), or had an accountant and this one has none, or the other way round.
    TypeError: If a callback is not a `Callback`.
    ValueError: If the arguments contradict each other or the process, `monitor` is not
      among the metrics, the noise or sampling of the `accountant` differs from that of
      the process or of the saved training, or the `initial_state` has another noise or
      clip.
  """
  if num_rounds < 1 or rounds_per_saving < 1:
    raise ValueError(
        '`num_rounds` and `rounds_per_saving` must be at least 1, found '
        f'{num_rounds} and {rounds_per_saving}.'
    )
  if patience is not None and (patience < 1 or monitor is None):
    raise ValueError(
        '`patience` must be at least 1 and needs a metric to `monitor`, found '
        f'patience={patience}, monitor={monitor!r}.'
    )
  if monitor_mode not in ('max', 'min'):
    raise ValueError(f"`monitor_mode` must be 'max' or 'min', found {monitor_mode!r}.")
  called = callbacks_lib.check_callbacks(callbacks)
  if progress_bar:
    bar = progress_bar
    if not isinstance(bar, callbacks_lib.ProgressBar):
      bar = callbacks_lib.ProgressBar()
    called += (bar,)
  training = _Training(
      process=process,
      select_clients=select_clients,
      evaluate=evaluate,
      monitor=monitor,
      monitor_mode=monitor_mode,
      patience=patience,
      program_state_manager=program_state_manager,
      rounds_per_saving=rounds_per_saving,
      release_managers=release_managers,
      client_states=client_states,
      callbacks=called,
      accountant=accountant,
  )
  _check_accountant(accountant, training.protection, select_clients)
  _check_participation(process, select_clients)
  _check_client_states(process, client_states)
  # Not `asyncio.Runner`: it leaves the thread without the loop that TFF's own
  # training loop looks for.
  with contextlib.closing(asyncio.new_event_loop()) as loop:
    training.begin(loop, initial_state)
    return training.run(num_rounds)


def _describes_itself(process: tff.learning.templates.LearningProcess) -> bool:
  """Returns whether a process is of this package, and not only a `LearningProcess`."""
  return isinstance(
      process, (rounds.DistillationProcess, rounds.StatefulClientsProcess)
  )


@dataclasses.dataclass(kw_only=True)
class _Training:
  """A training under way; the first attributes are arguments of `train`.

  Attributes:
    loop: The event loop of the managers' coroutines.
    completed: The results of the completed rounds.
    saved_round: The last round that is saved.
    best_rounds: By checkpoint, its best round, if known.
    seen: The training as callbacks see it.
  """

  process: tff.learning.templates.LearningProcess
  select_clients: Callable[[int], Any]
  evaluate: Optional[Callable[[Any], Mapping[str, float]]]
  monitor: Optional[str]
  monitor_mode: str
  patience: Optional[int]
  program_state_manager: Optional[tff.program.ProgramStateManager]
  rounds_per_saving: int
  release_managers: Sequence[tff.program.ReleaseManager]
  client_states: Optional[client_states_lib.ClientStates]
  callbacks: Sequence[callbacks_lib.Callback]
  accountant: Optional[accounting.PrivacyAccountant]
  loop: Optional[asyncio.AbstractEventLoop] = None
  completed: Optional[_Completed] = None
  saved_round: int = 0
  best_rounds: dict[int, int] = dataclasses.field(default_factory=dict)
  seen: Optional[callbacks_lib.Training] = None

  @property
  def protection(self) -> description.Protection:
    """How the clients' reports are protected."""
    if not _describes_itself(self.process):
      return description.Protection()
    return self.process.protection

  @property
  def privacy(self) -> Any:
    """The process's differential privacy, or `None`."""
    return self.protection.privacy

  @functools.cached_property
  def names(self) -> Optional[client_names.ClientNames]:
    """The names of the clients whose data the process reads by number."""
    if not _describes_itself(self.process) or self.process.client_data is None:
      return None
    return self.process.client_data.data.names

  @functools.cached_property
  def round_bytes(self) -> Optional[communication.RoundBytes]:
    """The bytes that each client of a round moves, or `None` if not known."""
    if not _describes_itself(self.process):
      return None
    return communication.round_bytes(self.process)

  def _wait(self, awaitable: Any) -> Any:
    """Returns the result of a coroutine, or of a future of the loop.

    A notebook calls its cells from a running loop, and a thread can run only one. That
    loop waits for the cell, so it is set aside meanwhile.
    """
    outer = asyncio._get_running_loop()
    asyncio._set_running_loop(None)
    try:
      return self.loop.run_until_complete(awaitable)
    finally:
      asyncio._set_running_loop(outer)

  def begin(self, loop: asyncio.AbstractEventLoop, initial_state: Any) -> None:
    """Initializes the training, or restores the saved one."""
    self.loop = loop
    state = self.process.initialize() if initial_state is None else initial_state
    progress = _Progress(
        state, state, np.int32(0), np.float64(-math.inf),
        b'' if self.accountant is None else self.accountant.saved(),
        _made_by(self.process, state, self._monitored),
        callbacks_lib.saved_states(self.callbacks),
    )
    round_num, is_resumed = 0, False
    if self.program_state_manager is not None:
      saved, version = self._wait(
          self.program_state_manager.load_latest(progress)
      )
      if saved is not None:
        _check_made_by(saved.made_by, progress.made_by)
        is_resumed, made_by = True, progress.made_by
        progress, round_num = saved, version
        self._restore_account(progress.private_rounds, round_num)
        callbacks_lib.restore_states(self.callbacks, progress.callbacks)
    if not is_resumed and initial_state is not None and self.privacy is not None:
      differential.check_initial_state(initial_state, self.process.initialize())
    self.completed = _Completed(progress, round_num, ())
    self._note_saved(self.completed)
    if is_resumed:
      progress = _choosing_by(progress, round_num, made_by)
      self.completed = self.completed._replace(progress=progress)
    self._check_monitors(state)
    if self.client_states is not None:
      self._begin_clients(is_resumed, initial_state)

  def _restore_account(self, saved: bytes, round_num: int) -> None:
    """Restores the account of private rounds; refuses to lose count of them."""
    if self.accountant is not None and saved:
      self.accountant.restore(saved)
    elif self.accountant is not None:
      raise checkpoints.CheckpointError(
          f'The checkpoint of round {round_num} was made without an `accountant`, so '
          'that how often its private rounds have begun is not known. Go on without '
          'one, or start again with one in another folder.'
      )
    elif saved:
      raise checkpoints.CheckpointError(
          f'The checkpoint of round {round_num} has the account of its private rounds, '
          'in which further ones would be missing. Go on with an `accountant` of the '
          'same noise and sampling.'
      )

  @property
  def _monitored(self) -> Optional[str]:
    """The metric that chooses the best state, and its mode; `None` without one."""
    return None if self.monitor is None else f'{self.monitor} ({self.monitor_mode})'

  def _begin_clients(self, is_resumed: bool, initial_state: Any) -> None:
    """Brings clients' states to the round where the training begins or resumes."""
    if is_resumed:
      self.client_states.rewind(self.completed.round_num)
    elif initial_state is not None:
      self.client_states.restart()
      if self.program_state_manager is not None:
        # A training that is killed in the first rounds restarts here, not with the
        # clients' states after these rounds.
        self._save(self.completed)
    elif self.client_states.clients():
      raise ValueError(
          '`client_states` holds what clients have after earlier rounds, and the '
          'training starts from round 1. Call `client_states.rewind(0)` to forget it, or '
          'choose another folder; to go on, pass the server\'s `initial_state`.'
      )

  def _check_monitors(self, state: Any) -> None:
    """Refuses to monitor metrics that no round will report."""
    monitors = [self.monitor, *(getattr(c, 'monitor', None) for c in self.callbacks)]
    monitors = [monitor for monitor in monitors if monitor is not None]
    if not monitors:
      return
    evaluated = getattr(self.evaluate, 'metric_names', None)
    if evaluated is None:
      evaluated = self.evaluate(state) if self.evaluate is not None else ()
    for monitor in monitors:
      check_monitor(monitor, [*process_metric_names(self.process), *evaluated])

  def run(self, num_rounds: int) -> TrainingResult:
    """Runs the remaining rounds."""
    budget_spent = interrupted = False
    self.seen = callbacks_lib.Training(
        process=self.process, num_rounds=num_rounds, round_num=self.completed.round_num,
        state=self.completed.progress.state, history=[], monitor=self.monitor,
    )
    with contextlib.ExitStack() as stack:
      try:
        for callback in self.callbacks:
          callback.on_train_begin(self.seen)
          stack.callback(callback.on_train_end, self.seen)
        progress = self._with_callbacks(self.completed.progress)
        self.completed = self.completed._replace(progress=progress)
        while self._goes_on(num_rounds):
          if self.accountant is not None:
            round_num = self.completed.round_num + 1
            if not self.accountant.allows_another_round(round_num):
              budget_spent = True
              break
            self.accountant.begin_round(round_num)
          self._run_round()
      except KeyboardInterrupt:
        interrupted = True
        self._leave_the_round()
      if self.program_state_manager is not None and (
          self.saved_round != self.completed.round_num
      ):
        self._save(self.completed)
      self.seen.ending = 'interrupted' if interrupted else 'finished'
    progress = self.completed.progress
    return TrainingResult(
        state=progress.state,
        round_num=self.completed.round_num,
        best_state=progress.best_state,
        best_round=int(progress.best_round),
        history=list(self.completed.history),
        converged=self._has_converged(),
        budget_spent=budget_spent,
        stop_reason=self.seen.stop_reason,
        interrupted=interrupted,
    )

  def _goes_on(self, num_rounds: int) -> bool:
    return (
        self.completed.round_num < num_rounds
        and not self._has_converged()
        and self.seen.stop_reason is None
    )

  def _has_converged(self) -> bool:
    waited = self.completed.round_num - int(self.completed.progress.best_round)
    return self.patience is not None and waited >= self.patience

  def _run_round(self) -> None:
    """Runs a round, evaluates, releases and saves it."""
    round_num = self.completed.round_num + 1
    start = time.perf_counter()
    output = self._next(round_num)
    seconds = time.perf_counter() - start
    metrics = self._metrics(round_num, output)
    if self.evaluate is not None:
      metrics.update(self.evaluate(output.state))
    metrics[ROUND_SECONDS] = seconds
    progress = self._advance(output.state, round_num, metrics)
    if self.accountant is not None:
      progress = progress._replace(private_rounds=self.accountant.saved())
    released = collections.OrderedDict(metrics)
    for manager in self.release_managers:
      self._wait(manager.release(released, round_num))
    self.seen.round_num, self.seen.state = round_num, progress.state
    self.seen.history.append(metrics)
    for callback in self.callbacks:
      callback.on_round_end(self.seen, metrics)
    # One assignment: an interrupted round is either completed or has no effect.
    self.completed = _Completed(
        self._with_callbacks(progress), round_num, (*self.completed.history, metrics)
    )
    has_manager = self.program_state_manager is not None
    is_saved = has_manager and not round_num % self.rounds_per_saving
    if is_saved:
      self._save(self.completed)
    if self.client_states is not None and (is_saved or not has_manager):
      self._prune_clients()

  def _advance(
      self, state: Any, round_num: int, metrics: Mapping[str, float]
  ) -> _Progress:
    """Returns the progress after a round; a better monitored value makes a new best."""
    progress = self.completed.progress._replace(state=state)
    new_best = progress._replace(best_state=state, best_round=np.int32(round_num))
    if self.monitor is None:
      return new_best
    # The best value is kept as the highest one.
    sign = 1.0 if self.monitor_mode == 'max' else -1.0
    value = sign * np.float64(metrics[self.monitor])
    if value > progress.best_value:  # False for a value that is not a number.
      return new_best._replace(best_value=value)
    return progress

  def _prune_clients(self) -> None:
    """Deletes clients' states that belong to no checkpoint and no best state.

    Without checkpoints, the training can go back to its last round only.
    """
    versions = [self.completed.round_num]
    best_rounds = [int(self.completed.progress.best_round)]
    if self.program_state_manager is not None:
      versions = self._wait(self.program_state_manager.get_versions())
      best_rounds = [self.best_rounds.get(version) for version in versions]
    # The best rounds of an earlier program's checkpoints are not known, except the last.
    if None not in best_rounds:
      self.client_states.prune(min(versions), best_rounds)

  def _with_callbacks(self, progress: _Progress) -> _Progress:
    """Returns the progress with the state as callbacks have left it."""
    if self.seen.state is not progress.state:
      if progress.best_state is progress.state:
        progress = progress._replace(best_state=self.seen.state)
      progress = progress._replace(state=self.seen.state)
    return progress._replace(callbacks=callbacks_lib.saved_states(self.callbacks))

  def _leave_the_round(self) -> None:
    """Discards the effects of an interrupted round."""
    tasks = asyncio.all_tasks(self.loop)
    if tasks:  # Such as a checkpoint that is being written.
      self._wait(asyncio.gather(*tasks, return_exceptions=True))
    round_num = self.completed.round_num
    if self.program_state_manager is not None:
      versions = self._wait(self.program_state_manager.get_versions())
      self.saved_round = max(versions or [0])
    if self.client_states is not None:
      self.client_states.rewind(round_num)
    self.seen.round_num, self.seen.state = round_num, self.completed.progress.state
    self.seen.history[:] = self.completed.history

  def _next(self, round_num: int) -> Any:
    """Runs the process on the round's clients."""
    selected = round_arguments.as_list(self.select_clients(round_num))
    state = self.completed.progress.state
    if self.client_states is None:
      return self.process.next(state, selected)
    numbers = _client_numbers(selected, self.names)
    output = self.process.next(state, selected, self.client_states.load(numbers))
    # If a round is skipped, `next` returns the clients' states before it.
    if not output.metrics.get(_SKIPPED):
      self.client_states.save(numbers, output.client_states, round_num)
    return output

  def _metrics(self, round_num: int, output: Any) -> dict[str, Any]:
    """Returns a round's flat metrics, with counts of clients, bytes and privacy."""
    metrics = flatten_metrics(output.metrics)
    _warn_of_left_out(round_num, metrics, self.completed.history)
    select = self.select_clients
    if isinstance(select, participation.Participation) and (
        # The accountant assumes that the number of clients is secret.
        self.privacy is None or select.sampling != 'poisson'
    ):
      metrics |= flatten_metrics(select.counts(round_num), 'participation/')
    if self.round_bytes is not None:
      expected = None if self.privacy is None else self.privacy.clients_per_round
      metrics |= communication.ledger(self.round_bytes, metrics, expected)
    if self.accountant is not None:
      metrics['privacy/epsilon'] = self.accountant.epsilon()
      metrics['privacy/rounds'] = self.accountant.rounds
    return metrics

  def _save(self, completed: _Completed) -> None:
    self._wait(
        self.program_state_manager.save(completed.progress, completed.round_num)
    )
    self._note_saved(completed)

  def _note_saved(self, completed: _Completed) -> None:
    self.saved_round = completed.round_num
    self.best_rounds[completed.round_num] = int(completed.progress.best_round)


def _made_by(
    process: tff.learning.templates.LearningProcess, state: Any, monitored: Optional[str]
) -> bytes:
  """Returns the settings of a process that the shapes of its state do not show."""
  made_by = {_MONITORED: monitored}
  for path, leaf in tree.flatten_with_path(state):
    if path and path[-1] in _HYPERPARAMETERS:
      made_by['/'.join(map(str, path))] = np.asarray(leaf).tolist()
  if _describes_itself(process):
    for spec in (*process.students.specs, process.teacher_spec):
      if spec is not None:
        made_by[f'loss of the {spec.name}'] = spec.loss_description
    described = {
        name: optimizers.settings(optimizer)
        for name, optimizer in process.description.optimizers.items()
    }
    # Noise and clip are in the state, too, and a checkpoint brings back the old ones.
    for name in ('privacy', 'secure_aggregation'):
      protection = getattr(process.protection, name)
      described[name] = {} if protection is None else dataclasses.asdict(protection)
    for name, values in described.items():
      made_by |= {f'{name}/{key}': value for key, value in values.items()}
  return json.dumps(made_by, sort_keys=True, default=_plain).encode()


def _plain(value: Any) -> Any:
  """Converts values for JSON: numbers of NumPy, and other objects to their type."""
  return np.asarray(value).tolist() if hasattr(value, 'dtype') else type(value).__name__


def _check_made_by(saved: bytes, now: bytes) -> None:
  """Refuses to resume what another process has saved."""
  before, after = json.loads(saved), json.loads(now)
  for settings in (before, after):
    settings.pop(_MONITORED, None)
  changed = checks.differences(before, after)
  if changed:
    raise checkpoints.CheckpointError(
        f'The checkpoint was made by another process ({changed}). Go on with the same '
        'settings, or start again in another folder.'
    )


def _choosing_by(progress: _Progress, round_num: int, made_by: bytes) -> _Progress:
  """Returns the loaded progress; if another metric chose the best state, resets it.

  Args:
    progress: The loaded progress.
    round_num: The round after which it was saved.
    made_by: The `made_by` of this training.
  """
  before, now = json.loads(progress.made_by), json.loads(made_by)[_MONITORED]
  # It is not known for checkpoints of an earlier version.
  is_same = before.get(_MONITORED, now) == now
  progress = progress._replace(made_by=made_by)
  if is_same:
    return progress
  logging.warning(
      'The best state of the checkpoint of round %d was chosen by %s, and this training '
      'chooses by %s: the best state is chosen anew among those after it, and until '
      'then it is that of round %d.',
      round_num, before[_MONITORED] or 'no metric', now or 'no metric', round_num,
  )
  return progress._replace(
      best_state=progress.state, best_round=np.int32(round_num),
      best_value=np.float64(-math.inf),
  )


def left_out(metrics: Mapping[str, float]) -> dict[str, int]:
  """Returns how many clients' reports did not count, by cause.

  Args:
    metrics: The flat metrics of a round.
  """
  return {
      name.removeprefix(_COUNTS).replace('_', ' '): int(value)
      for name, value in metrics.items()
      if name.startswith(f'{_COUNTS}excluded_') and value
  }


def _warn_of_left_out(
    round_num: int, metrics: Mapping[str, float], history: Sequence[Mapping[str, float]]
) -> None:
  """Warns that a round is skipped, or has left out clients, with the causes."""
  causes = ', '.join(f'{name}: {count}' for name, count in left_out(metrics).items())
  if metrics.get(_SKIPPED):
    if sum(bool(row[_SKIPPED]) for row in history) < _MAX_WARNINGS:
      logging.warning(
          'Round %d is skipped: the reports of %d clients count, fewer than the '
          '`min_reports` of the `Reporting` (left out: %s).',
          round_num, metrics[f'{_COUNTS}included'], causes or 'none',
      )
  elif metrics.get(f'{_COUNTS}included') == 0:
    logging.warning(
        'Round %d includes no client (%s): nothing is learned from any.',
        round_num, causes or 'none reported',
    )
  elif causes and sum(bool(left_out(row)) for row in history) < _MAX_WARNINGS:
    logging.warning('Round %d leaves out clients (%s).', round_num, causes)


def _check_participation(
    process: tff.learning.templates.LearningProcess, select_clients: Callable[[int], Any]
) -> None:
  """Refuses a `Participation` of clients that the process does not take."""
  if not isinstance(
      select_clients, participation.Participation
  ) or not _describes_itself(process):
    return
  if process.client_data is None:
    raise ValueError(
        'A `Participation` chooses clients by their numbers, and this process takes '
        'datasets. Build it with `client_data=`.'
    )
  there = len(process.client_data.data.client_ids)
  if select_clients.num_clients > there:
    raise ValueError(
        f'The `Participation` has num_clients={select_clients.num_clients}, and the '
        f'process has the data of {there} clients. Lower it to {there}.'
    )
  names = process.client_data.data.names
  if select_clients.names is not None and list(select_clients.names) != list(names):
    raise ValueError(
        'The `Participation` must have the `names` of the process\'s clients, '
        '`client_data.data.names`, in their order, found others: '
        f'{list(select_clients.names)[:3]} for {list(names)[:3]}.'
    )
  limit = process.protection.max_clients
  if limit is not None and select_clients.clients_per_round > limit:
    raise ValueError(
        'The `Participation` has clients_per_round='
        f'{select_clients.clients_per_round}, and the sums of the process are of '
        f'{limit} clients at most, the `max_clients` of its `SecureAggregation`. Lower '
        'the one, or build the process with more of the other.'
    )
  _check_reporting(process.description.reporting, select_clients)


def _check_reporting(
    reporting: Optional[conditions.Reporting], chosen: participation.Participation
) -> None:
  """Refuses a `Participation` of other conditions than those that a process takes."""
  if reporting is None:
    if chosen.has_conditions:
      raise ValueError(
          'The `Participation` gives its clients conditions (of `dropout_after`, '
          '`straggler_share`, `max_delay`, `coverage` or `gives_conditions`), and this '
          'process takes clients without. Build it with '
          f'`reporting=tff_kd.Reporting(max_delay={chosen.max_delay})`.'
      )
    return
  if not chosen.has_conditions:
    raise ValueError(
        'This process has a `reporting`, so clients come with conditions, and the '
        '`Participation` gives them none. Set its `gives_conditions=True`.'
    )
  if chosen.max_delay > reporting.max_delay:
    raise ValueError(
        f'The `Participation` has max_delay={chosen.max_delay}, and the `Reporting` of '
        f'the process max_delay={reporting.max_delay}, the longest delay that it takes. '
        'Lower the one, or build the process with more of the other.'
    )
  if reporting.min_reports > chosen.max_reports:
    raise ValueError(
        f'The `Reporting` of the process has min_reports={reporting.min_reports}, and a '
        f'round of the `Participation` has {chosen.max_reports} reports at most: every '
        'round would be skipped. Lower the one, or raise `clients_per_round`.'
    )


def _check_client_states(
    process: tff.learning.templates.LearningProcess,
    client_states: Optional[client_states_lib.ClientStates],
) -> None:
  """Refuses clients' states that are not those which the process takes."""
  if not _describes_itself(process):
    return
  is_stateful = isinstance(process, rounds.StatefulClientsProcess)
  if client_states is None:
    if is_stateful:
      raise ValueError(
          'The clients of this process keep a state from round to round: pass '
          '`client_states=tff_kd.simulation.ClientStates(process.initialize_client(), '
          "'the folder of their files')`."
      )
    return
  if not is_stateful:
    raise ValueError(
        'The clients of this process keep nothing from round to round: leave '
        '`client_states` out.'
    )
  kept = process.kept_models
  expected = 1 if kept is None else len(kept.specs)
  found = client_states.num_cohorts
  if found != expected:
    how = 'with the `cohort_fn` of' if expected > 1 else 'without a `cohort_fn` for'
    raise ValueError(
        '`client_states` must have one initial state for each architecture that clients '
        f'of this process keep, {expected}, found {found}. Build the `ClientStates` of '
        f'`process.initialize_client()`, {how} the clients.'
    )


def _check_accountant(
    accountant: Optional[accounting.PrivacyAccountant],
    protection: description.Protection,
    select_clients: Callable[[int], Any],
) -> None:
  """Refuses an accountant of another sampling or noise than the training has."""
  if accountant is None:
    return
  privacy = protection.privacy
  if privacy is None:
    raise ValueError(
        'An `accountant` needs a process that is built with `privacy`: without it '
        'nothing that clients send is private.'
    )
  if isinstance(select_clients, participation.Participation):
    expected = accounting.ClientSampling(
        num_clients=select_clients.num_clients,
        clients_per_round=select_clients.clients_per_round,
        sampling=select_clients.sampling,
    )
    if accountant.sampling != expected or (
        select_clients.availability is not None or select_clients.max_delay
    ):
      raise ValueError(
          'The `accountant` must be of the sampling that happens, without '
          '`availability` and `max_delay`, which change from how many clients those of '
          f'a round are chosen: found {accountant.sampling} and {select_clients}.'
      )
  if accountant.sampling.clients_per_round != privacy.clients_per_round:
    raise ValueError(
        'The `accountant` and the process must agree on `clients_per_round`, found '
        f'{accountant.sampling.clients_per_round} and {privacy.clients_per_round}.'
    )
  noise = privacy.noise_multipliers(protection.channels)
  happens = accounting.composed_noise(list(noise.values()))
  if not accounting.is_same_noise(accountant.noise_multiplier, happens):
    raise ValueError(
        'The `accountant` must be of the noise that the process adds, whose noise '
        f'multipliers are {noise}, worth one of {happens:.6g}: found one of '
        f'{accountant.noise_multiplier:.6g}. Build it by '
        '`tff_kd.privacy.build_accountant(process.protection, ...)`.'
    )


def _client_numbers(
    selected: Sequence[Any], names: Optional[client_names.ClientNames]
) -> list[int]:
  """Returns the clients' numbers, also of clients with a cohort or conditions."""
  clients = [
      client['data'] if isinstance(client, Mapping) else client for client in selected
  ]
  if names is None or not all(isinstance(client, (int, str)) for client in clients):
    raise TypeError(
        "With `client_states`, `select_clients` must return clients' numbers or names "
        '(and the process read its data by reference, `client_data=`), found '
        f'{selected!r}.'
    )
  numbers = names.numbers(clients)
  if len(set(numbers)) < len(numbers):
    raise ValueError(
        'A client can be in a round once only, or one of its states would be lost; '
        f'found {numbers}.'
    )
  return numbers


def process_metric_names(
    process: tff.learning.templates.LearningProcess,
) -> list[str]:
  """Returns the flat names of the metrics that the process reports each round.

  Args:
    process: Any learning process.
  """
  return _leaf_names(process.next.type_signature.result.metrics.member)


def check_monitor(monitor: str, names: Iterable[str]) -> None:
  """Raises an error if no round reports the metric to monitor.

  Args:
    monitor: The metric's name.
    names: The names of the metrics of each round.

  Raises:
    ValueError: If `monitor` is not among `names`.
  """
  if monitor not in names:
    raise ValueError(
        f'`monitor` must be one of {sorted(names)}, found {monitor!r}.'
    )


def _leaf_names(type_spec: tff.Type, prefix: str = '') -> list[str]:
  """Returns the names that `flatten_metrics` gives to a value of a type."""
  if not isinstance(type_spec, tff.StructType):
    name = prefix.rstrip('/')
    places = np.ndindex(*getattr(type_spec, 'shape', ()))
    return ['_'.join([name, *map(str, place)]) for place in places]
  return [
      name
      for key, element in tff.structure.iter_elements(type_spec)
      for name in _leaf_names(element, f'{prefix}{key}/')
  ]
