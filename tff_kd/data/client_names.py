"""Clients' names and numbers: the one place where they meet.

A client is a number inside this package, from 0 in the order of the data. Whatever takes
a client takes its name as well, and what is shown of one shows its name.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Union

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
      names: One a client; what is no string, such as a key of a table, as its `str`.

    Raises:
      ValueError: If two clients have one name.
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
      TypeError: If it is neither.
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
    """Returns the numbers of several clients; raises what `number` does."""
    return [self.number(client) for client in clients]
