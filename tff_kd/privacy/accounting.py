"""Computes the privacy cost of rounds with dp-accounting.

The unit of privacy is a client with all of its examples. Each round releases noised sums
and everything that is computed from them.
"""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import functools
import json
import math
import os
import pathlib
from typing import Any, Optional, Union

import dp_accounting
import numpy as np

# By the kind of sampling: the difference between two neighbouring sets of clients.
NEIGHBORS = {
    'poisson': 'one client added or removed',
    'uniform': 'one client replaced by another',
    'cyclic': 'one client replaced by another',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientSampling:
  """How the clients of a round are chosen, as far as it matters for privacy.

  Attributes:
    num_clients: The number of all clients, which is public.
    clients_per_round: The number of clients in a round; for 'poisson', the expected
      number.
    sampling: 'poisson': each client independently, with the probability
      `clients_per_round / num_clients`; 'uniform': `clients_per_round` clients without
      replacement; 'cyclic': one after the other, so that everybody may know who is in a
      round.
  """

  num_clients: int
  clients_per_round: int
  sampling: str = 'uniform'

  def __post_init__(self):
    if self.sampling not in NEIGHBORS:
      raise ValueError(
          f'`sampling` must be one of {sorted(NEIGHBORS)}, found {self.sampling!r}: the '
          'privacy cost of other samplings is not known.'
      )
    if not 1 <= self.clients_per_round <= self.num_clients:
      raise ValueError(
          f'`clients_per_round` must be from 1 to the {self.num_clients} clients, found '
          f'{self.clients_per_round}.'
      )

  @property
  def neighbors(self) -> str:
    """The relation of two neighbouring sets of clients."""
    return NEIGHBORS[self.sampling]

  @property
  def accountant(self) -> dp_accounting.rdp.RdpAccountant:
    """A new accountant of dp-accounting, for these neighbours."""
    return _new_accountant(self.sampling)

  def event(
      self, noise_multipliers: Sequence[float], times: int = 1
  ) -> dp_accounting.DpEvent:
    """Returns the privacy event of one round; with 'cyclic', of one participation.

    dp-accounting takes a Gaussian's noise multiplier as the ratio of its standard
    deviation to the sensitivity. That is the clip where a client is added or removed,
    and twice the clip where it is replaced.

    A round that is run again has the same clients. It is one sample, whose sums are
    released several times, each time with new noise. This costs more than the same number
    of rounds with independent samples.

    Args:
      noise_multipliers: For each channel's sum, the noise's standard deviation divided by
        the clip.
      times: How often the round has begun.

    Returns:
      The event, of dp-accounting.
    """
    if not all(z > 0 for z in noise_multipliers):
      return dp_accounting.NonPrivateDpEvent()
    by_sensitivity = 1.0 if self.sampling == 'poisson' else 0.5
    noised = dp_accounting.ComposedDpEvent([
        dp_accounting.GaussianDpEvent(float(z) * by_sensitivity)
        for z in noise_multipliers
    ] * times)
    if self.sampling == 'poisson':
      return dp_accounting.PoissonSampledDpEvent(
          self.clients_per_round / self.num_clients, noised
      )
    if self.sampling == 'uniform':
      return dp_accounting.SampledWithoutReplacementDpEvent(
          self.num_clients, self.clients_per_round, noised
      )
    return noised

  def num_events(self, num_rounds: int) -> int:
    """Returns how many such events may concern a single client.

    Args:
      num_rounds: The number of consecutive rounds, each of which has begun once.
    """
    if self.sampling != 'cyclic':
      return num_rounds
    return math.ceil(num_rounds * self.clients_per_round / self.num_clients)

  def count_events(self, begun: Mapping[int, int]) -> dict[int, int]:
    """Counts the events that may concern a single client, by their `times`.

    With 'cyclic', every repetition of a round counts as one with the client that was in
    most rounds, which is an upper bound.

    Args:
      begun: How often each round has begun, by its number.

    Returns:
      The number of events by `times`, the argument of `event`; with 'cyclic' all events
      have `times` 1.
    """
    if self.sampling != 'cyclic':
      return dict(collections.Counter(begun.values()))
    if not begun:
      return {}
    # If rounds are missing in between, a client may have been in each of the others.
    span = max(begun) - min(begun) + 1
    again = sum(begun.values()) - len(begun)
    return {1: min(len(begun), self.num_events(span)) + again}


def _new_accountant(
    sampling: str, orders: Optional[Sequence[float]] = None
) -> dp_accounting.rdp.RdpAccountant:
  """Returns a new accountant of some Renyi orders.

  Args:
    sampling: The `sampling` of a `ClientSampling`.
    orders: The orders; those of dp-accounting if `None`. With fewer orders, an epsilon
      may be larger.
  """
  relation = dp_accounting.NeighboringRelation
  return dp_accounting.rdp.RdpAccountant(
      orders,
      neighboring_relation=(
          relation.ADD_OR_REMOVE_ONE if sampling == 'poisson' else relation.REPLACE_ONE
      ),
  )


def composed_noise(noise_multipliers: Sequence[float]) -> float:
  """Returns the noise multiplier of the one Gaussian equivalent to several.

  All are sums over the same clients.

  Source: McMahan et al., "A General Approach to Adding Differential Privacy to
  Iterative Training Procedures" (2018), section 3: (sum_i z_i^-2)^-1/2.

  Args:
    noise_multipliers: The standard deviation of each, divided by its sensitivity.

  Returns:
    The multiplier; 0 if one of them is 0.
  """
  if not all(z > 0 for z in noise_multipliers):
    return 0.0
  return sum(z**-2 for z in noise_multipliers) ** -0.5


def is_same_noise(first: float, second: float) -> bool:
  """Returns whether two noise multipliers are equal but for rounding."""
  return math.isclose(first, second, rel_tol=1e-6)


def find_noise_multiplier(
    epsilon: float, delta: float, num_rounds: int, sampling: ClientSampling
) -> float:
  """Returns the smallest noise with which rounds stay within (epsilon, delta).

  Args:
    epsilon: Above 0.
    delta: Between 0 and 1.
    num_rounds: The number of rounds, 1 or more.
    sampling: How clients are chosen.

  Returns:
    The `composed_noise` of the channels' noise multipliers that is needed, at most 1e-3
    too large.

  Raises:
    ValueError: If a number is out of range, or no noise is enough.
  """
  check_budget(epsilon, delta)
  if num_rounds < 1:
    raise ValueError(f'`num_rounds` must be 1 or more, found {num_rounds}.')
  try:
    return _calibrated(epsilon, delta, sampling.num_events(num_rounds), sampling)
  except dp_accounting.mechanism_calibration.NoBracketIntervalFoundError:
    raise ValueError(
        f'No noise keeps {num_rounds} rounds within epsilon={epsilon} at '
        f'delta={delta}. Allow a larger epsilon.'
    ) from None


# Takes seconds, and is often called again with the same arguments.
@functools.lru_cache(maxsize=64)
def _calibrated(
    epsilon: float, delta: float, num_events: int, sampling: ClientSampling
) -> float:
  def event(z):
    return dp_accounting.SelfComposedDpEvent(sampling.event([z]), num_events)

  # An epsilon is the minimum over all orders, and each order takes time. A few of them,
  # with those around the best one, give the same noise.
  every = sampling.accountant.orders
  kept = {*every[::16], every[-1]}
  while True:
    orders = sorted(kept)
    found = dp_accounting.calibrate_dp_mechanism(
        lambda orders=orders: _new_accountant(sampling.sampling, orders), event, epsilon,
        delta, dp_accounting.LowerEndpointAndGuess(0.0, 1.0), tol=1e-3,
    )
    accountant = sampling.accountant.compose(event(found))
    _, best = accountant.get_epsilon_and_optimal_order(delta)
    place = int(np.argmin(np.abs(every - best)))
    around = set(every[max(0, place - 2) : place + 3])
    if around <= kept:
      return float(found)
    kept |= around


def check_budget(epsilon: float, delta: float, name: str = 'epsilon') -> None:
  """Checks the ranges of epsilon, which has this name, and delta."""
  if not 0.0 < epsilon:
    raise ValueError(f'`{name}` must be above 0, found {epsilon!r}.')
  if not 0.0 < delta < 1.0:
    raise ValueError(
        f'`delta` must be between 0 and 1, well below 1 / clients, found {delta!r}.'
    )


class PrivacyAccountant:
  """Counts how often each round of a private process has begun, and what that costs.

  A round counts when it begins. A round that is run again, after a crash or because the
  training starts again at round 1, releases sums of the same clients a second time, with
  new noise: see `ClientSampling.event`. With a `ledger_path`, the count is written to
  disk before the round begins.
  """

  def __init__(
      self,
      noise_multipliers: Sequence[float],
      sampling: ClientSampling,
      delta: float,
      *,
      max_epsilon: float = math.inf,
      ledger_path: Optional[os.PathLike] = None,
  ):
    """Initializes the accountant.

    Args:
      noise_multipliers: For each channel that is released, the standard deviation of the
        noise of its sum, divided by its clip. See
        `DifferentialPrivacy.noise_multipliers`.
      sampling: How clients are chosen.
      delta: The delta of (epsilon, delta).
      max_epsilon: The budget; rounds that would exceed it are refused.
      ledger_path: A JSON file that records how often each round has begun, and with which
        noise and sampling. Without it, this is recorded only in this object and in
        checkpoints, which do not cover rounds after the last one that was saved.

    Raises:
      ValueError: If a number is out of range, the file is not such a ledger, or its
        rounds had another noise or sampling.
    """
    check_budget(max_epsilon, delta, name='max_epsilon')
    self.sampling, self.delta, self.max_epsilon = sampling, delta, max_epsilon
    self._noise_multipliers = tuple(noise_multipliers)
    self._path = pathlib.Path(ledger_path) if ledger_path is not None else None
    self._begun: collections.Counter[int] = collections.Counter()
    self._rdp_by_times: dict[int, np.ndarray] = {}
    if self._path is not None and self._path.exists():
      self._add(read_ledger(self._path), f'The ledger {self._path}')

  @property
  def noise_multiplier(self) -> float:
    """The `composed_noise` of all channels."""
    return composed_noise(self._noise_multipliers)

  @property
  def rounds(self) -> int:
    """The number of rounds that have begun; repeated rounds count each time."""
    return self._begun.total()

  def saved(self) -> bytes:
    """Returns how often each round has begun, and with which noise and sampling.

    The value is for a checkpoint; see `restore`.
    """
    return _account_to_json(self._terms() | {'begun': self._begun}).encode()

  def _terms(self) -> dict[str, Any]:
    """Returns the settings that determine the cost of a round, for JSON."""
    return {
        'noise_multiplier': float(self.noise_multiplier),
        'sampling': {
            'num_clients': int(self.sampling.num_clients),
            'clients_per_round': int(self.sampling.clients_per_round),
            'sampling': self.sampling.sampling,
        },
    }

  def _add(self, account: Mapping[str, Any], name: str) -> None:
    """Adds the rounds of an account; the larger count of each round holds.

    Args:
      account: How often each round has `begun`, with the `_terms` of the rounds.
      name: The account's name, for the error.

    Raises:
      ValueError: If there are rounds that had another noise or sampling, which would
        get the wrong cost.
    """
    here, noise = self._terms(), account.get('noise_multiplier', math.nan)
    if not account['begun'] or (
        account.get('sampling') == here['sampling']
        and is_same_noise(noise, here['noise_multiplier'])
    ):
      self._begun |= account['begun']
      return
    changed = '; '.join(
        f'{key}: {account.get(key, "not known")} there, {value} here'
        for key, value in here.items()
        if account.get(key) != value
    )
    raise ValueError(
        f'{name} is of rounds with another noise or sampling than the accountant\'s '
        f'({changed}), which does not know what they have spent. Go on with the same, '
        'or start a new run with an account of its own; what both have spent, epsilon '
        'and delta, adds up.'
    )

  def _rdp(self, times: int) -> np.ndarray:
    """Returns the Renyi divergences, by order, of a round that begins `times` times."""
    if times not in self._rdp_by_times:
      event = self.sampling.event(self._noise_multipliers, times)
      self._rdp_by_times[times] = self.sampling.accountant.compose(event).rdp
    return self._rdp_by_times[times]

  def _epsilon(self, begun: Mapping[int, int]) -> float:
    if not begun:
      return 0.0
    rdp = sum(
        count * self._rdp(times)
        for times, count in self.sampling.count_events(begun).items()
    )
    orders = self.sampling.accountant.orders
    return float(dp_accounting.rdp.compute_epsilon(orders, rdp, self.delta)[0])

  def epsilon(self, num_rounds: Optional[int] = None) -> float:
    """Returns the epsilon that rounds cost, at the accountant's delta.

    Args:
      num_rounds: The number of rounds, each of which begins once. If `None`, the rounds
        that have begun, with their repetitions.
    """
    if num_rounds is None:
      return self._epsilon(self._begun)
    return self._epsilon(dict.fromkeys(range(1, num_rounds + 1), 1))

  def allows_another_round(self, round_num: int) -> bool:
    """Returns whether a round stays within the budget.

    Args:
      round_num: The number of the round that would begin, from 1; it may have begun
        before.
    """
    return self._epsilon(self._with(round_num)) <= self.max_epsilon

  def _with(self, round_num: int) -> collections.Counter[int]:
    """Returns how often each round will have begun, including this one."""
    if round_num < 1:
      raise ValueError(f'`round_num` must be 1 or more, found {round_num}.')
    return self._begun + collections.Counter([int(round_num)])

  def restore(self, saved: bytes) -> None:
    """Restores the rounds of a checkpoint; the larger count of each round holds.

    Args:
      saved: The value that `saved` returned.

    Raises:
      ValueError: If it is another value, or its rounds had another noise or sampling.
    """
    try:
      account = _account_from_json(saved)
    except (ValueError, TypeError, KeyError):
      raise ValueError(
          'The checkpoint does not say how often each private round has begun, so that '
          'what was spent is not known: it was made by an earlier version of tff_kd. '
          f'Go on with that version, or start a new run. Found {saved!r}.'
      ) from None
    self._add(account, 'The account of the checkpoint')

  def begin_round(self, round_num: int) -> None:
    """Counts a round, first on disk.

    Args:
      round_num: The number of the round, from 1; the same number if the round is run
        again with the same clients.

    Raises:
      RuntimeError: If the budget does not allow it.
    """
    if not self.allows_another_round(round_num):
      raise RuntimeError(
          f'Round {round_num} would pass the budget of epsilon={self.max_epsilon:g} at '
          f'delta={self.delta:g}: {self.rounds} have begun.'
      )
    begun = self._with(round_num)
    if self._path is not None:
      kept = read_ledger(self._path) if self._path.exists() else {}
      write_ledger(self._path, kept | self._terms() | {'begun': begun})
    self._begun = begun


def _as_runs(begun: Mapping[int, int]) -> list[list[int]]:
  """Returns runs of rounds that have begun equally often: [first, last, times]."""
  runs: list[list[int]] = []
  for round_num, times in sorted(begun.items()):
    if runs and runs[-1][1:] == [round_num - 1, times]:
      runs[-1][1] = round_num
    else:
      runs.append([round_num, round_num, times])
  return runs


def _from_runs(runs: Any) -> collections.Counter[int]:
  """Returns how often each round has begun, from the value of `_as_runs`.

  Raises:
    TypeError, ValueError: If it is no such value.
  """
  begun: collections.Counter[int] = collections.Counter()
  for first, last, times in runs:
    if not max(begun, default=0) < first <= last or times < 1:
      raise ValueError
    begun.update(dict.fromkeys(range(first, last + 1), times))
  return begun


def _account_to_json(account: Mapping[str, Any]) -> str:
  return json.dumps({**account, 'begun': _as_runs(account['begun'])})


def _account_from_json(text: Union[str, bytes]) -> dict[str, Any]:
  """Returns the account of which `_account_to_json` has made a text.

  Raises:
    KeyError, TypeError, ValueError: If it is no such text.
  """
  account = json.loads(text)
  return account | {'begun': _from_runs(account['begun'])}


def read_ledger(path: pathlib.Path) -> dict[str, Any]:
  """Returns the content of a ledger file.

  Args:
    path: A JSON file with a list `begun` of runs of rounds, [first, last, how often each
      of them has begun], in ascending order, and the `noise_multiplier` and `sampling`
      of these rounds.

  Returns:
    The content, with `begun` as a counter by the round's number.

  Raises:
    ValueError: If it is not a ledger. What was spent is then not known.
  """
  try:
    return _account_from_json(path.read_text())
  except (ValueError, TypeError, KeyError):
    raise ValueError(
        f'{path} must be the JSON of a privacy ledger that says in `begun` how often '
        'each round has begun (earlier versions of tff_kd did not). What was spent is '
        'not known without it: bring it back from a copy, or start a new run.'
    ) from None


def write_ledger(path: pathlib.Path, ledger: Mapping[str, Any]) -> None:
  """Writes a ledger atomically.

  Args:
    path: The file.
    ledger: A value like that of `read_ledger`.
  """
  partial = path.with_suffix('.partial')
  with open(partial, 'w') as file:
    file.write(_account_to_json(ledger))
    file.flush()
    os.fsync(file.fileno())
  partial.replace(path)
