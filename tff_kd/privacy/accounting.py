"""The privacy cost of rounds, by dp-accounting, for the sampling that happens.

The unit is a client: all of its examples together. What is released is the noised sums
of each round, and whatever is computed from them.
"""

from collections.abc import Sequence
import dataclasses
import functools
import json
import math
import os
import pathlib
from typing import Optional

import dp_accounting
import numpy as np

# By how clients are sampled: what two neighbouring sets of clients differ in.
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
    clients_per_round: The number of clients in a round; in expectation for 'poisson'.
    sampling: 'poisson': each client by itself, with the probability
      `clients_per_round / num_clients`; 'uniform': so many of them, without
      replacement; 'cyclic': one after the other, so that everybody may know who is in a
      round.
  """

  num_clients: int
  clients_per_round: int
  sampling: str = 'uniform'

  def __post_init__(self):
    if self.sampling not in NEIGHBORS:
      raise ValueError(
          f'`sampling` must be one of {sorted(NEIGHBORS)}, found {self.sampling!r}: of '
          'another the cost in privacy is not known.'
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
    relation = dp_accounting.NeighboringRelation
    return dp_accounting.rdp.RdpAccountant(
        neighboring_relation=(
            relation.ADD_OR_REMOVE_ONE
            if self.sampling == 'poisson'
            else relation.REPLACE_ONE
        )
    )

  def event(self, noise_multipliers: Sequence[float]) -> dp_accounting.DpEvent:
    """Returns the privacy event of one round; with 'cyclic', of one participation.

    dp-accounting takes a Gaussian's noise multiplier as the ratio of its standard
    deviation to the sensitivity. That is the clip where a client is added or removed,
    and twice the clip where it is replaced.

    Args:
      noise_multipliers: For the sum of each channel, the noise's standard deviation
        divided by the clip.

    Returns:
      The event, of dp-accounting.
    """
    if not all(z > 0 for z in noise_multipliers):
      return dp_accounting.NonPrivateDpEvent()
    by_sensitivity = 1.0 if self.sampling == 'poisson' else 0.5
    noised = dp_accounting.ComposedDpEvent([
        dp_accounting.GaussianDpEvent(float(z) * by_sensitivity)
        for z in noise_multipliers
    ])
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
      num_rounds: The number of rounds.
    """
    if self.sampling != 'cyclic':
      return num_rounds
    return math.ceil(num_rounds * self.clients_per_round / self.num_clients)


def composed_noise(noise_multipliers: Sequence[float]) -> float:
  """Returns the noise multiplier of the one Gaussian that several are equivalent to.

  All are about the same clients.

  Source: McMahan et al., "A General Approach to Adding Differential Privacy to
  Iterative Training Procedures" (2018), section 3: (sum_i z_i^-2)^-1/2.

  Args:
    noise_multipliers: Each one's standard deviation divided by its sensitivity.

  Returns:
    The multiplier; 0 if one of them is 0.
  """
  if not all(z > 0 for z in noise_multipliers):
    return 0.0
  return sum(z**-2 for z in noise_multipliers) ** -0.5


def find_noise_multiplier(
    epsilon: float, delta: float, num_rounds: int, sampling: ClientSampling
) -> float:
  """Returns the smallest noise with which so many rounds stay within (epsilon, delta).

  Args:
    epsilon: Above 0.
    delta: Between 0 and 1.
    num_rounds: 1 or more.
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


# Takes seconds, for numbers that are often asked for again.
@functools.lru_cache(maxsize=64)
def _calibrated(
    epsilon: float, delta: float, num_events: int, sampling: ClientSampling
) -> float:
  return float(
      dp_accounting.calibrate_dp_mechanism(
          lambda: sampling.accountant,
          lambda z: dp_accounting.SelfComposedDpEvent(sampling.event([z]), num_events),
          epsilon,
          delta,
          dp_accounting.LowerEndpointAndGuess(0.0, 1.0),
          tol=1e-3,
      )
  )


def check_budget(epsilon: float, delta: float) -> None:
  """Refuses what is no (epsilon, delta)."""
  if not 0.0 < epsilon:
    raise ValueError(f'`epsilon` must be above 0, found {epsilon!r}.')
  if not 0.0 < delta < 1.0:
    raise ValueError(
        f'`delta` must be between 0 and 1, well below 1 / clients, found {delta!r}.'
    )


class PrivacyAccountant:
  """Counts the rounds of a private process, and says what they have cost.

  A round counts when it begins: one that is run again, after a crash, has been released
  twice, with other noise. With a `ledger_path` the count is on disk before the round
  is.
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
      noise_multipliers: For each channel that is released, the standard deviation of
        its sum's noise, by its clip. See `DifferentialPrivacy.noise_multipliers`.
      sampling: How clients are chosen.
      delta: The delta of (epsilon, delta).
      max_epsilon: The budget: there is no round with which it would be passed.
      ledger_path: A JSON file that holds the number of rounds.

    Raises:
      ValueError: If a number is out of range, or the file holds no such number.
    """
    check_budget(max_epsilon, delta)
    self.sampling, self.delta, self.max_epsilon = sampling, delta, max_epsilon
    self._event = sampling.event(noise_multipliers)
    self._path = pathlib.Path(ledger_path) if ledger_path is not None else None
    self._rounds = 0
    if self._path is not None and self._path.exists():
      self.restore(read_ledger(self._path)['rounds'])

  @property
  def rounds(self) -> int:
    """How many rounds have begun."""
    return self._rounds

  @functools.cached_property
  def _of_one_event(self) -> tuple[np.ndarray, np.ndarray]:
    accountant = self.sampling.accountant.compose(self._event)
    return accountant.orders, accountant.rdp

  def epsilon(self, num_rounds: Optional[int] = None) -> float:
    """Returns the epsilon that rounds cost, at the accountant's delta.

    Args:
      num_rounds: The number of rounds; those that have begun if `None`.
    """
    count = self.sampling.num_events(
        self._rounds if num_rounds is None else num_rounds
    )
    if not count:
      return 0.0
    orders, rdp = self._of_one_event
    return float(
        dp_accounting.rdp.compute_epsilon(orders, count * rdp, self.delta)[0]
    )

  def allows_another_round(self) -> bool:
    """Returns whether one more stays within the budget."""
    return self.epsilon(self._rounds + 1) <= self.max_epsilon

  def restore(self, rounds: int) -> None:
    """Takes over the number of rounds of a checkpoint, unless more are known.

    Args:
      rounds: The number of rounds that have begun.
    """
    self._rounds = max(self._rounds, int(rounds))

  def begin_round(self) -> None:
    """Counts a round, on disk first.

    Raises:
      RuntimeError: If the budget does not allow it.
    """
    if not self.allows_another_round():
      raise RuntimeError(
          f'Another round would pass the budget of epsilon={self.max_epsilon:g} at '
          f'delta={self.delta:g}: {self._rounds} have begun.'
      )
    if self._path is not None:
      kept = read_ledger(self._path) if self._path.exists() else {}
      write_ledger(self._path, kept | {'rounds': self._rounds + 1})
    self._rounds += 1


def read_ledger(path: pathlib.Path) -> dict[str, int]:
  """Returns the content of a ledger file.

  Raises:
    ValueError: If it is none. What was spent is then not known.
  """
  try:
    ledger = json.loads(path.read_text())
    if int(ledger['rounds']) < 0:
      raise ValueError
  except (ValueError, TypeError, KeyError):
    raise ValueError(
        f'{path} must be the JSON of a privacy ledger with its number of rounds. What '
        'was spent is not known without it: bring it back from a copy, or start a new '
        'run.'
    ) from None
  return ledger


def write_ledger(path: pathlib.Path, ledger: dict[str, int]) -> None:
  """Writes a ledger so that a crash leaves the old one or the new."""
  partial = path.with_suffix('.partial')
  with open(partial, 'w') as file:
    json.dump(ledger, file)
    file.flush()
    os.fsync(file.fileno())
  partial.replace(path)
