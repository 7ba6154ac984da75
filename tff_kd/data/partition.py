"""Splits of labelled examples over clients. Every example is used exactly once.

Each function gives one sorted int64 array of example numbers a client, and depends only
on its arguments.
"""

from collections.abc import Callable, Sequence
from typing import Any, Optional

import numpy as np

_MAX_DRAWS = 1000


def _check(labels: np.ndarray, num_clients: int, min_examples: int) -> None:
  if np.ndim(labels) != 1 or len(labels) == 0:
    raise ValueError(
        '`labels` must be a non-empty vector of class numbers, found the shape '
        f'{np.shape(labels)}.'
    )
  if num_clients < 1 or num_clients * max(min_examples, 1) > len(labels):
    raise ValueError(
        f'{len(labels)} examples cannot give {num_clients} clients at least '
        f'{max(min_examples, 1)} each. Use fewer clients.'
    )


def _check_alpha(alpha: float) -> None:
  if not 0.0 < alpha < np.inf:
    raise ValueError(f'`alpha` must be a finite number above 0, found {alpha!r}.')


def iid(labels: np.ndarray, num_clients: int, *, seed: int) -> list[np.ndarray]:
  """Shuffles, then deals out equal shares (give or take one example)."""
  _check(labels, num_clients, 1)
  order = np.random.default_rng(seed).permutation(len(labels))
  return [np.sort(part) for part in np.array_split(order, num_clients)]


def dirichlet(
    labels: np.ndarray,
    num_clients: int,
    *,
    alpha: float,
    seed: int,
    min_examples: int = 1,
    cap: Optional[int] = None,
) -> list[np.ndarray]:
  """Deals out each class by proportions drawn from a symmetric Dirichlet.

  Source: Hsu, Qi & Brown, "Measuring the Effects of Non-Identical Data
  Distribution" (2019); per class as in Li et al., "Federated Learning on Non-IID
  Data Silos" (2022), section 4.1, drawn again until each client has enough.

  Args:
    labels: Class numbers, `[n]`.
    num_clients: The number of clients.
    alpha: Concentration, above 0: the smaller, the fewer classes a client has.
    seed: Decides the draw.
    min_examples: The least that any client must get.
    cap: A client that already has this many examples gets none of the remaining
      classes; it can end above the cap. Li et al.'s own code uses an equal share of all
      examples, others use more.

  Raises:
    ValueError: If an argument is out of range, or no draw gives every client
      `min_examples`.
  """
  _check(labels, num_clients, min_examples)
  _check_alpha(alpha)
  if cap is not None and cap * num_clients < len(labels):
    raise ValueError(
        f'`cap` must be at least {len(labels) / num_clients:g}, an equal share of '
        f'{len(labels)} examples over {num_clients} clients, found {cap!r}.'
    )
  labels = np.asarray(labels)
  rng = np.random.default_rng(seed)
  for _ in range(_MAX_DRAWS):
    parts = [[] for _ in range(num_clients)]
    for label in np.unique(labels):
      members = rng.permutation(np.flatnonzero(labels == label))
      shares = rng.dirichlet(np.full(num_clients, alpha))
      if cap is not None:
        shares *= np.array([sum(map(len, part)) for part in parts]) < cap
        if shares.sum() == 0.0:  # Draws can be too small to be told from 0.
          break
        shares /= shares.sum()
      cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
      for part, chunk in zip(parts, np.split(members, cuts)):
        part.append(chunk)
    else:
      clients = [np.sort(np.concatenate(part)) for part in parts]
      if min(len(client) for client in clients) >= min_examples:
        return clients
  raise ValueError(
      f'No draw of Dirichlet({alpha}) gave each of {num_clients} clients at least '
      f'{min_examples} of {len(labels)} examples in {_MAX_DRAWS} tries. Use a '
      'larger `alpha`, fewer clients, or a smaller `min_examples`.'
  )


def shards(
    labels: np.ndarray, num_clients: int, *, shards_per_client: int, seed: int
) -> list[np.ndarray]:
  """Sorts by label, cuts into equal shards, and deals out so many to each client.

  Source: McMahan et al. (AISTATS 2017), section 3 ("pathological non-IID").

  Args:
    labels: Class numbers, `[n]`.
    num_clients: The number of clients.
    shards_per_client: About how many classes a client sees.
    seed: Decides the order within classes and who gets what.
  """
  if shards_per_client < 1:
    raise ValueError(
        f'`shards_per_client` must be at least 1, found {shards_per_client}.'
    )
  _check(labels, num_clients, shards_per_client)
  labels = np.asarray(labels)
  rng = np.random.default_rng(seed)
  shuffled = rng.permutation(len(labels))
  by_label = shuffled[np.argsort(labels[shuffled], kind='stable')]
  pieces = np.array_split(by_label, num_clients * shards_per_client)
  dealt = rng.permutation(len(pieces)).reshape(num_clients, shards_per_client)
  return [np.sort(np.concatenate([pieces[i] for i in row])) for row in dealt]


def quantity_skew(
    labels: np.ndarray,
    num_clients: int,
    *,
    alpha: float,
    seed: int,
    min_examples: int = 1,
) -> list[np.ndarray]:
  """Gives clients different amounts of data, by shares drawn from a Dirichlet.

  Source: Li et al., "Federated Learning on Non-IID Data Silos" (2022), section
  4.3.

  Args:
    labels: Class numbers, `[n]`.
    num_clients: The number of clients.
    alpha: Concentration, above 0: the smaller, the more unequal.
    seed: Decides the draw.
    min_examples: Given to every client first; the rest is dealt by the shares.
  """
  _check(labels, num_clients, min_examples)
  _check_alpha(alpha)
  rng = np.random.default_rng(seed)
  order = rng.permutation(len(labels))
  rest = len(labels) - num_clients * min_examples
  shares = rng.dirichlet(np.full(num_clients, alpha))
  cuts = np.round(np.cumsum(shares)[:-1] * rest).astype(int)
  cuts += min_examples * np.arange(1, num_clients)
  return [np.sort(part) for part in np.split(order, cuts)]


def by_client(clients: Sequence[Any]) -> dict[str, np.ndarray]:
  """Splits examples by a column that names the client of each.

  Equivalent to `df.groupby('client').indices` of a pandas table.

  Args:
    clients: Each example's client, `[n]`; values that are not strings are converted by
      `str`.

  Returns:
    The rows of each client by its name, in the order of the names.
  """
  column = np.asarray(clients)
  if column.ndim != 1:
    raise ValueError(
        f'`clients` must be one client an example, found the shape {column.shape}.'
    )
  found, numbers = np.unique(column, return_inverse=True)
  order = np.argsort(numbers, kind='stable')
  ends = np.cumsum(np.bincount(numbers, minlength=len(found)))
  return dict(zip(map(str, found), np.split(order, ends[:-1])))


def consecutive(sizes: Sequence[int]) -> list[np.ndarray]:
  """Returns the rows of parts of these sizes that are stored one after the other.

  Args:
    sizes: The number of rows of each part.
  """
  return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])


# Flag value -> the function.
PARTITIONS: dict[str, Callable[..., Sequence[np.ndarray]]] = {
    'dirichlet': dirichlet,
    'shards': shards,
    'quantity_skew': quantity_skew,
    'iid': iid,
}


def matching(
    labels: np.ndarray,
    clients: Sequence[np.ndarray],
    other_labels: np.ndarray,
    *,
    seed: int,
) -> list[np.ndarray]:
  """Splits other examples so that each client has the same classes as before.

  Use it to give every client a test set of its own distribution: a client gets the
  share of each class that it has among the first examples.

  Args:
    labels: Class numbers of the first examples, `[n]`.
    clients: Their split over clients.
    other_labels: Class numbers of the examples to deal out, `[m]`.
    seed: Decides who gets which.

  Returns:
    A split of the m examples; a client may get none. Examples of a class that no
    client has are left out.
  """
  rng = np.random.default_rng(seed)
  parts = [[np.zeros(0, np.int64)] for _ in clients]
  for label in np.unique(other_labels):
    counts = np.array([np.sum(labels[rows] == label) for rows in clients])
    if counts.sum() == 0:
      continue
    members = rng.permutation(np.flatnonzero(other_labels == label))
    cuts = np.round(np.cumsum(counts)[:-1] / counts.sum() * len(members))
    for part, chunk in zip(parts, np.split(members, cuts.astype(int))):
      part.append(chunk)
  return [np.sort(np.concatenate(part)) for part in parts]
