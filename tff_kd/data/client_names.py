"""Maps clients' names to their numbers.

Inside this package a client is a number, from 0 in the order of the data. Public
functions take a client by number or by name, and messages and tables show names.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Optional, Union

import numpy as np

# A client, by its number or by its name.
Client = Union[int, str]


class ClientNames(Sequence[str]):
  """The names of clients, in the order of their numbers: names[number] is a name.

  Example:

  ```
  names = ClientNames(['ada', 'ben'])
  names.numbers(['ben', 0])  # [1, 0]
  ```
  """

  def __init__(self, names: Iterable[Any]):
    """Initializes the names.

    Args:
      names: One for each client; keys that are not strings are converted by `str`.

    Raises:
      ValueError: If two clients have the same name.
    """
    self._names = [str(name) for name in names]
    self._numbers = {name: number for number, name in enumerate(self._names)}
    if len(self._numbers) < len(self._names):
      twice = next(
          name for number, name in enumerate(self._names)
          if self._numbers[name] != number
      )
      raise ValueError(f'Every client needs a name of its own, found {twice!r} twice.')

  def __len__(self) -> int:
    return len(self._names)

  def __getitem__(self, number: Any) -> Any:
    return self._names[number]

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __contains__(self, name: Any) -> bool:
    return name in self._numbers

  def number(self, client: Client) -> int:
    """Returns the number of a client.

    Args:
      client: The client's name, or the number itself.

    Raises:
      KeyError: If there is no client of that name.
      ValueError: If there is none of that number.
      TypeError: If `client` is neither a name nor a number.
    """
    if isinstance(client, str):
      if client not in self._numbers:
        raise KeyError(
            f'There is no client {client!r} among the {len(self)}; the first is '
            f'{self._names[0]!r}.'
        )
      return self._numbers[client]
    if isinstance(client, (bool, np.bool_)) or not isinstance(client, (int, np.integer)):
      raise TypeError(f'A client must be a name or a number, found {client!r}.')
    if not 0 <= client < len(self):
      name = f', and {str(client)!r} by name' if str(client) in self._numbers else ''
      raise ValueError(
          f'Clients are numbered from 0 to {len(self) - 1}{name}, found {client}.'
      )
    return int(client)

  def numbers(self, clients: Iterable[Client]) -> list[int]:
    """Returns the numbers of several clients; raises the errors that `number` raises.

    Args:
      clients: Names or numbers.
    """
    return [self.number(client) for client in clients]


def values_of(
    by_client: Mapping[Client, Any],
    num_clients: int,
    names: Optional[ClientNames],
    argument: str,
) -> list[Any]:
  """Returns the value of each client, in the order of the clients' numbers.

  Args:
    by_client: A value for each client, by number or, with `names`, by name.
    num_clients: The number of clients.
    names: The clients' names; `None` where clients have none.
    argument: What errors call the mapping.

  Raises:
    ValueError: If a client has no value, or two.
    KeyError, TypeError: If there is no such client.
  """
  names = ClientNames(range(num_clients)) if names is None else names
  found = {}
  for client, value in by_client.items():
    number = names.number(client)
    if number in found:
      raise ValueError(f'`{argument}` has client {names[number]!r} twice.')
    found[number] = value
  missing = [names[number] for number in range(num_clients) if number not in found]
  if missing:
    raise ValueError(
        f'`{argument}` must have a value for each of the {num_clients} clients, and has '
        f'none for {len(missing)} of them, such as {missing[0]!r}.'
    )
  return [found[number] for number in range(num_clients)]


def check_cohort_fn(cohort_fn: Any) -> None:
  """Checks that `cohort_of` takes a function or a mapping.

  Args:
    cohort_fn: A function from a client to its cohort's number, a mapping, or `None`.

  Raises:
    TypeError: If it is neither.
  """
  if cohort_fn is not None and not callable(cohort_fn) and not isinstance(
      cohort_fn, Mapping
  ):
    raise TypeError(
        '`cohort_fn` must be a function of a client, or a mapping from each client to '
        f'the number of its cohort, found {cohort_fn!r}.'
    )


def cohort_of(
    cohort_fn: Union[Callable[[Client], int], Mapping[Client, int]],
    client: int,
    names: Optional[ClientNames],
) -> int:
  """Returns the number of a client's cohort.

  Args:
    cohort_fn: A function of the client's name or, without `names`, number; or a mapping
      from names or numbers.
    client: The client's number.
    names: The clients' names; `None` where clients have none.

  Raises:
    KeyError: If the mapping does not have the client.
  """
  name = client if names is None else names[client]
  if not isinstance(cohort_fn, Mapping):
    return int(cohort_fn(name))
  for key in (name, client):
    if key in cohort_fn:
      return int(cohort_fn[key])
  raise KeyError(f'`cohort_fn` has no cohort for client {name!r}.')
