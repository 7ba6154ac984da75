"""The states that clients keep between rounds, in a file for each client and round."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import os
import pathlib
import re
from typing import Any, Optional, Union
import zipfile

import numpy as np
import tensorflow as tf

from tff_kd.data import client_names

_NAME = re.compile(r'client-(\d+)-round-(\d+)\.npz')


class ClientStatesError(RuntimeError):
  """A client's file is damaged."""


class ClientStates:
  """Clients' private states on disk, by client number and round.

  Memory holds only the states of one round. Files are written atomically and never
  changed: a client's state after a round stays until `prune`, so training can resume
  from an earlier checkpoint.
  """

  def __init__(
      self,
      initial: Any,
      directory: os.PathLike,
      cohort_fn: Union[
          None, Callable[[client_names.Client], int], Mapping[client_names.Client, int]
      ] = None,
      names: Optional[client_names.ClientNames] = None,
  ):
    """Opens the folder, and makes it if need be.

    Args:
      initial: The initial state of a client, a structure of arrays; with cohorts, a
        tuple with the initial state of each.
      directory: The folder of the files.
      cohort_fn: Maps a client to the number of its cohort: a function of the client's
        name or, without `names`, number; or a mapping from names or numbers. `None`
        without cohorts.
      names: The clients' names, of `FileClientData.names`: a name then stands for a
        client wherever a number does.

    Raises:
      TypeError: If `cohort_fn` is neither a function nor a mapping.
    """
    client_names.check_cohort_fn(cohort_fn)
    self._initial = tf.nest.map_structure(np.asarray, initial)
    self._cohort_fn = cohort_fn
    self._names = names
    self._directory = pathlib.Path(directory)
    # Clients' states are private: only the owner can read a folder that is made here.
    self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    self._rounds: dict[int, list[int]] = {}
    for path in self._directory.iterdir():
      match = _NAME.fullmatch(path.name)
      if match:
        self._rounds.setdefault(int(match[1]), []).append(int(match[2]))
    for rounds in self._rounds.values():
      rounds.sort()
    # The last round of an earlier program; this one must continue after it.
    self._earlier = max((rounds[-1] for rounds in self._rounds.values()), default=-1)

  @property
  def num_cohorts(self) -> int:
    """The number of cohorts, each with an initial state of its own."""
    return 1 if self._cohort_fn is None else len(self._initial)

  def clients(self) -> list[int]:
    """Returns the numbers of the clients that have a state of their own."""
    return sorted(self._rounds)

  def _number(self, client: client_names.Client) -> int:
    return int(client) if self._names is None else self._names.number(client)

  def _shown(self, client: int) -> str:
    return str(client) if self._names is None else repr(self._names[client])

  def load(
      self, clients: Iterable[client_names.Client], round_num: Optional[int] = None
  ) -> list[Any]:
    """Loads the states of some clients, for a process's `next`.

    Args:
      clients: Their numbers, or names.
      round_num: The round after which the states were saved; the latest if `None`.

    Returns:
      A list of structures like the initial one.

    Raises:
      ClientStatesError: If a file is damaged, or holds something else.
    """
    return [self._load_one(self._number(client), round_num) for client in clients]

  def _load_one(self, client: int, round_num: Optional[int]) -> Any:
    initial = self._initial
    if self._cohort_fn is not None:
      cohort = client_names.cohort_of(self._cohort_fn, client, self._names)
      initial = initial[cohort]
    rounds = [
        number for number in self._rounds.get(client, ())
        if round_num is None or number <= round_num
    ]
    if not rounds:
      return initial
    path = self._path(client, rounds[-1])
    leaves = tf.nest.flatten(initial)
    try:
      with np.load(path) as file:
        found = [file[str(i)] for i in range(len(leaves))]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
      before = 'its initial state'
      if len(rounds) > 1:
        before = f'its state after round {rounds[-2]}'
      raise ClientStatesError(
          f"The file of client {self._shown(client)}'s state after round {rounds[-1]} is "
          f'damaged: {path} ({error}). Bring it back from a copy, resume from an earlier '
          f'checkpoint, or delete it, and the client has {before}.'
      ) from error
    found = [_of_dtype(array, leaf.dtype) for array, leaf in zip(found, leaves)]
    for leaf, array in zip(leaves, found):
      if leaf.shape != array.shape or leaf.dtype != array.dtype:
        raise ClientStatesError(
            f'{path} holds an array of {array.dtype} {array.shape} where this process '
            f'has {leaf.dtype} {leaf.shape}. It is of another model; choose another '
            'folder.'
        )
    return tf.nest.pack_sequence_as(initial, found)

  def save(
      self, clients: Sequence[client_names.Client], states: Sequence[Any], round_num: int
  ) -> None:
    """Saves clients' states after a round.

    Args:
      clients: Their numbers, or names.
      states: Their states, in the same order.
      round_num: The round that has just ended.

    Raises:
      ClientStatesError: If the folder has states of an earlier program after this round
        or a later one, which `load` would return in place of this program's.
      ValueError: If there is not one state for each client.
    """
    if round_num <= self._earlier:
      raise ClientStatesError(
          f'{self._directory} holds what clients had after round {self._earlier} of an '
          f'earlier run, and this is round {round_num}. Call `rewind(0)` before the '
          'first round to reset all clients, `restart()` to begin with what they had, or '
          'choose another folder.'
      )
    if len(clients) != len(states):
      raise ValueError(
          f'There must be one state a client, found {len(clients)} clients and '
          f'{len(states)} states.'
      )
    for client, state in zip(map(self._number, clients), states):
      path = self._path(client, round_num)
      partial = path.with_suffix(f'.{os.getpid()}.partial')
      leaves = tf.nest.flatten(state)
      with open(partial, 'wb') as file:
        np.savez(file, **{str(i): leaf for i, leaf in enumerate(leaves)})
      os.replace(partial, path)
      rounds = self._rounds.setdefault(client, [])
      if round_num not in rounds:
        rounds.append(round_num)
        rounds.sort()

  def rewind(self, round_num: int) -> None:
    """Deletes the states of later rounds, to resume after a round.

    Args:
      round_num: The last round that is kept; 0 for none.
    """
    for client, rounds in list(self._rounds.items()):
      self._drop(client, [number for number in rounds if number > round_num])
    self._earlier = min(self._earlier, round_num)

  def restart(self) -> None:
    """Makes clients' latest states those before the first round."""
    for client, rounds in list(self._rounds.items()):
      # In this order, the latest file is still the last one if this is interrupted.
      self._drop(client, rounds[:-1])
      os.replace(self._path(client, rounds[-1]), self._path(client, 0))
      self._rounds[client] = [0]
    self._earlier = -1

  def prune(self, round_num: int, kept_rounds: Sequence[int] = ()) -> None:
    """Deletes states that are needed only to go back to before a round.

    Args:
      round_num: The earliest round to which `rewind` must still be able to go back.
      kept_rounds: Earlier rounds whose states `load` must still return, such as the
        best one.
    """
    for client, rounds in list(self._rounds.items()):
      before = [number for number in rounds if number <= round_num]
      needed = {
          max((number for number in before if number <= kept), default=None)
          for kept in (round_num, *kept_rounds)
      }
      self._drop(client, [number for number in before if number not in needed])

  def _drop(self, client: int, rounds: Sequence[int]) -> None:
    for round_num in rounds:
      self._path(client, round_num).unlink(missing_ok=True)
      self._rounds[client].remove(round_num)
    if not self._rounds[client]:
      del self._rounds[client]

  def _path(self, client: int, round_num: int) -> pathlib.Path:
    return self._directory / f'client-{client}-round-{round_num}.npz'


def _of_dtype(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Returns an array of a file with the dtype that it was saved with.

  The .npy format has no name for dtypes that NumPy does not know itself, such as
  bfloat16, and holds their bytes as void.
  """
  is_untyped = array.dtype.kind == dtype.kind == 'V'
  if is_untyped and array.dtype.itemsize == dtype.itemsize:
    return array.view(dtype)
  return array
