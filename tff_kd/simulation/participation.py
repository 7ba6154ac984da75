"""Participation, client faults and stragglers, drawn from (seed, round, client)."""

from collections.abc import Callable, Mapping, Sequence
import csv
import dataclasses
import os
from typing import Any, NamedTuple, Optional, Union, cast

import numpy as np
from tff_kd.compat import tff

from tff_kd.client import conditions
from tff_kd.data import client_names

SAMPLINGS = ('uniform', 'weighted', 'cyclic', 'poisson')
# Keep the random streams of one seed apart.
_SAMPLE_STREAM, _CLIENT_STREAM = 41, 42


class _Beginning(NamedTuple):
  """A client that begins its work in a round.

  Attributes:
    client: The client's number.
    reports_in: The round in which its report arrives.
    conditions: Its simulated conditions.
  """

  client: int
  reports_in: int
  conditions: conditions.ClientConditions


class Availability:
  """When each client can be reached."""

  def __init__(
      self,
      intervals: Mapping[client_names.Client, Sequence[tuple[int, int]]],
      names: Optional[client_names.ClientNames] = None,
  ):
    """Initializes the trace.

    Args:
      intervals: By client, its (first, last) rounds, both included. Clients without
        intervals can never be reached.
      names: The clients' names, of `FileClientData.names`, where clients are given by
        name.

    Raises:
      TypeError: If a client is given by name without `names`.
    """
    named = [client for client in intervals if isinstance(client, str)]
    if named and names is None:
      raise TypeError(
          'An `Availability` of clients by name needs `names`, the `names` of the '
          f'clients\' data, found client {named[0]!r}.'
      )
    self._intervals = {
        client if names is None else names.number(client): rounds
        for client, rounds in intervals.items()
    }

  @classmethod
  def from_csv(
      cls,
      path: os.PathLike,
      num_clients: int,
      names: Optional[client_names.ClientNames] = None,
  ) -> 'Availability':
    """Reads a trace: lines of client, first round, last round, below a header.

    Args:
      path: The file.
      num_clients: Clients are numbered from 0 to one below this.
      names: The clients' names, if the file may have these in place of numbers.

    Returns:
      The availability.

    Raises:
      ValueError: If a line has another form; gives its number.
    """
    intervals = {}
    with open(path, newline='') as file:
      for number, row in enumerate(csv.reader(file), 1):
        if number == 1 or not row:
          continue
        try:
          text, (first, last) = row[0].strip(), map(int, row[1:])
          is_name = names is not None and text in names
          client = names.number(text) if is_name else int(text)
          if not 0 <= client < num_clients or not 1 <= first <= last:
            raise ValueError
        except ValueError:
          who = f'a client from 0 to {num_clients - 1}'
          if names is not None:
            who += f", or a client's name, such as {names[0]!r}"
          raise ValueError(
              f'Line {number} of {os.fspath(path)} must be {who}, its first '
              f'round (from 1) and its last, found {",".join(row)!r}.'
          ) from None
        intervals.setdefault(client, []).append((first, last))
    if not intervals:
      raise ValueError(f'{os.fspath(path)} has no line of client, first, last round.')
    return cls(intervals)

  def __contains__(self, client_and_round: tuple[int, int]) -> bool:
    client, round_num = client_and_round
    return any(
        first <= round_num <= last for first, last in self._intervals.get(client, ())
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Participation:
  """Chooses the clients of each round and draws the faults of each.

  Called with a round's number, from 1, it returns what a process's `next` takes: client
  numbers; with `has_conditions`, {'data': number, 'conditions': `ClientConditions`}
  each, for a process that is built with a `tff_kd.Reporting`. A late client works with
  the broadcast of the round in which it began, and is among the clients of the round in
  which it reports. Until then it is not chosen again.

  Attributes:
    num_clients: Clients are numbered from 0.
    clients_per_round: The number of clients chosen to begin in a round; fewer if fewer
      are available. For 'poisson', the expected number.
    sampling: 'uniform'; 'weighted' by `weights`; 'cyclic', one after the other;
      'poisson', each client independently with the probability `clients_per_round /
      num_clients`.
    weights: Numbers above 0, for 'weighted', such as numbers of examples: `[clients]`,
      or a mapping from clients' names or numbers.
    availability: When each client can be reached; always if `None`.
    dropout_before: The probability that a chosen client drops out before its training.
    dropout_after: The probability that a client's report is lost after its training.
    straggler_share: The probability that a client does only a part of its steps.
    straggler_steps: The smallest such part; it is drawn uniformly from there to 1.
    delay_share: The probability that a client reports late.
    max_delay: The longest delay in rounds; delays are drawn uniformly from 1.
    coverage: The share of the transfer examples on which each client predicts.
    cohort_fn: Where there are cohorts, maps a client to the number of its cohort: a
      function of the client's name or, without `names`, number; or a mapping from names
      or numbers.
    gives_conditions: Whether clients come with conditions even without simulated faults,
      for a process with a `Reporting`.
    names: The clients' names, of `FileClientData.names`, if `weights` or `cohort_fn`
      give clients by name.
    seed: Decides all draws, with the round and the client.
  """

  num_clients: int
  clients_per_round: int
  sampling: str = 'uniform'
  weights: Union[None, np.ndarray, Mapping[client_names.Client, float]] = None
  availability: Optional[Availability] = None
  dropout_before: float = 0.0
  dropout_after: float = 0.0
  straggler_share: float = 0.0
  straggler_steps: float = 0.5
  delay_share: float = 0.0
  max_delay: int = 0
  coverage: float = 1.0
  cohort_fn: Union[
      None, Callable[[client_names.Client], int], Mapping[client_names.Client, int]
  ] = None
  gives_conditions: bool = False
  names: Optional[client_names.ClientNames] = None
  seed: int = 0
  _begun: dict[int, tuple[list[_Beginning], dict[str, int]]] = dataclasses.field(
      default_factory=dict, init=False, repr=False, compare=False
  )

  def __post_init__(self):
    if not 1 <= self.clients_per_round <= self.num_clients:
      raise ValueError(
          f'`clients_per_round` must be from 1 to the {self.num_clients} clients, found '
          f'{self.clients_per_round}.'
      )
    if self.sampling not in SAMPLINGS:
      raise ValueError(
          f'`sampling` must be one of {SAMPLINGS}, found {self.sampling!r}.'
      )
    if self.names is not None and len(self.names) != self.num_clients:
      raise ValueError(
          f'`names` must be of the {self.num_clients} clients, found {len(self.names)}.'
      )
    self._resolve_names()
    if (self.weights is not None) != (self.sampling == 'weighted'):
      raise ValueError("`weights` are needed for sampling='weighted', and only for it.")
    weights = cast(np.ndarray, self.weights)  # `_resolve_names` has made it an array.
    if weights is not None and (
        len(weights) != self.num_clients
        or not np.all(np.isfinite(weights))
        or np.min(weights) <= 0
    ):
      raise ValueError(
          f'`weights` must be {self.num_clients} finite numbers above 0, found '
          f'{self.weights!r}.'
      )
    for name in (
        'dropout_before', 'dropout_after', 'straggler_share', 'delay_share', 'coverage'
    ):
      value = getattr(self, name)
      if not 0.0 <= value <= 1.0:
        raise ValueError(f'`{name}` must be from 0 to 1, found {value!r}.')
    if not 0.0 < self.straggler_steps <= 1.0:
      raise ValueError(
          '`straggler_steps` must be above 0 and at most 1, found '
          f'{self.straggler_steps!r}.'
      )
    if not isinstance(self.max_delay, int) or self.max_delay < 0:
      raise ValueError(
          f'`max_delay` must be an integer, 0 or more, found {self.max_delay!r}.'
      )
    if (self.max_delay > 0) != (self.delay_share > 0.0):
      raise ValueError(
          '`delay_share` and `max_delay` must both be above 0, or both be 0, found '
          f'{self.delay_share} and {self.max_delay}.'
      )

  def _resolve_names(self) -> None:
    """Puts mappings from clients in the order of the clients' numbers."""
    client_names.check_cohort_fn(self.cohort_fn)
    for name in ('weights', 'cohort_fn'):
      value = getattr(self, name)
      if isinstance(value, Mapping):
        values = client_names.values_of(value, self.num_clients, self.names, name)
        in_order = np.array(values) if name == 'weights' else dict(enumerate(values))
        object.__setattr__(self, name, in_order)

  @property
  def has_conditions(self) -> bool:
    """Whether clients come with conditions, so that the process needs a `Reporting`."""
    return bool(
        self.gives_conditions or self.dropout_after or self.straggler_share
        or self.max_delay or self.coverage < 1.0
    )

  @property
  def max_reports(self) -> int:
    """The largest number of clients that can report in a round."""
    if self.sampling == 'poisson':
      return self.num_clients
    # Those that begin in the round, and those that are late from each round before.
    return min(self.num_clients, self.clients_per_round * (1 + self.max_delay))

  def __call__(self, round_num: int) -> list[Any]:
    """Returns the clients that report in a round, as `next` takes them."""
    return [
        self._client(beginning)
        for began in range(max(1, round_num - self.max_delay), round_num + 1)
        for beginning in self._begin(began)[0]
        if beginning.reports_in == round_num
    ]

  def counts(self, round_num: int) -> dict[str, int]:
    """Returns how many clients could not begin in a round, by cause.

    Args:
      round_num: From 1.

    Returns:
      `num_chosen`; `num_missing`, how many fewer than `clients_per_round` could be
      chosen; `num_dropped_before_training`; `num_begun_late`, how many of those that
      begin will report in a later round.
    """
    return dict(self._begin(round_num)[1])

  def _client(self, beginning: _Beginning) -> Union[int, dict[str, Any]]:
    parts: dict[str, Any] = {}
    if self.cohort_fn is not None:
      parts['cohort'] = client_names.cohort_of(
          self.cohort_fn, beginning.client, self.names
      )
    parts['data'] = beginning.client
    if self.has_conditions:
      parts['conditions'] = beginning.conditions
    return parts if len(parts) > 1 else beginning.client

  def _begin(self, round_num: int) -> tuple[list[_Beginning], dict[str, int]]:
    """Returns the clients that begin in a round, and its counts.

    Where clients may be late, who is free in a round depends on all rounds before; only
    those from which somebody may yet report are kept.
    """
    if round_num not in self._begun:
      if round_num < max(self._begun, default=0):
        self._begun.clear()
      first = max(self._begun, default=0) + 1 if self.max_delay else round_num
      for number in range(first, round_num + 1):
        self._begun[number] = self._draw_round(number)
        for old in [n for n in self._begun if n < number - self.max_delay]:
          del self._begun[old]
    return self._begun[round_num]

  def _draw_round(self, round_num: int) -> tuple[list[_Beginning], dict[str, int]]:
    busy = {
        beginning.client
        for began in range(max(1, round_num - self.max_delay), round_num)
        for beginning in self._begun[began][0]
        if beginning.reports_in >= round_num
    }
    chosen = self._choose(round_num, busy)
    begun = []
    for client in chosen:
      rng = np.random.default_rng([self.seed, _CLIENT_STREAM, round_num, client])
      gone, lost, slow, late = rng.random(4)
      share = rng.uniform(self.straggler_steps, 1.0)
      delay = int(rng.integers(1, self.max_delay + 1)) if self.max_delay else 0
      delay = delay if late < self.delay_share else 0
      drawn = conditions.ClientConditions(
          delay=np.int32(delay),
          step_share=np.float32(share if slow < self.straggler_share else 1.0),
          reports=np.bool_(lost >= self.dropout_after),
          coverage=np.float32(self.coverage),
          seed=rng.integers(0, 2**31, 2).astype(np.int32),
      )
      if gone >= self.dropout_before:
        begun.append(_Beginning(client, round_num + delay, drawn))
    return begun, {
        'num_chosen': len(chosen),
        'num_missing': (
            0 if self.sampling == 'poisson' else self.clients_per_round - len(chosen)
        ),
        'num_dropped_before_training': len(chosen) - len(begun),
        'num_begun_late': sum(beginning.reports_in > round_num for beginning in begun),
    }

  def _choose(self, round_num: int, busy: set[int]) -> list[int]:
    free = [
        client for client in range(self.num_clients)
        if client not in busy
        and (self.availability is None or (client, round_num) in self.availability)
    ]
    if self.sampling == 'poisson':
      rng = np.random.default_rng([self.seed, _SAMPLE_STREAM, round_num])
      chosen = rng.random(self.num_clients) < self.clients_per_round / self.num_clients
      return [client for client in free if chosen[client]]
    size = min(self.clients_per_round, len(free))
    if self.sampling == 'cyclic':
      first = (round_num - 1) * self.clients_per_round % self.num_clients
      return sorted(free, key=lambda client: (client - first) % self.num_clients)[:size]
    # TFF's seed has 32 bits, which are too few for a secret.
    is_for_tff = self.seed < 2**32 and len(free) == self.num_clients
    if self.sampling == 'uniform' and is_for_tff:
      sample = tff.simulation.build_uniform_sampling_fn(free, random_seed=self.seed)
      return [int(client) for client in sample(round_num, size)]
    rng = np.random.default_rng([self.seed, _SAMPLE_STREAM, round_num])
    odds = None
    if self.weights is not None and size:
      odds = np.asarray(self.weights, np.float64)[free]
      odds /= odds.sum()
    return [int(client) for client in rng.choice(free, size, replace=False, p=odds)]
