"""Checkpoints that are written atomically and verified when they are read."""

import asyncio
import os
import pathlib
import re
from typing import Any, Optional

from absl import logging
import numpy as np
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2
from tff_kd.compat import tff
import tree

_PREFIX = 'program_state_'
_DAMAGED = 'damaged_'
# Raised where a disk is full or a folder is not writable.
_WRITE_ERRORS = (OSError, tf.errors.OpError)


class CheckpointError(RuntimeError):
  """A checkpoint cannot be written, or none can be read."""


class Checkpoints(tff.program.ProgramStateManager):
  """Saves a program's state for runs that are killed and disks that are full.

  A checkpoint is one TFRecord file of serialized tensors, a hundred times faster than the
  SavedModel that `tff.program.FileProgramStateManager` traces for each. It is written to
  a temporary file, which is then renamed. A checkpoint that cannot be read (records have
  checksums) is renamed to `damaged_...`, with a warning, and the one before it is used.
  """

  def __init__(self, root_dir: os.PathLike, *, keep_total: int = 2):
    """Opens the folder, and makes it if need be.

    Args:
      root_dir: The folder.
      keep_total: The number of checkpoints to keep, the newest ones.

    Raises:
      CheckpointError: If the folder cannot be made or written, or holds checkpoints
        that this version cannot read.
      ValueError: If `keep_total` is below 1.
    """
    if keep_total < 1:
      raise ValueError(f'`keep_total` must be at least 1, found {keep_total}.')
    self._folder = pathlib.Path(root_dir)
    self._keep_total = keep_total
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
      for path in self._folder.glob(f'{_PREFIX}*_temp'):
        path.unlink()  # A run was killed while it wrote this file.
      probe = self._folder / f'probe_{os.getpid()}'
      probe.touch()
      probe.unlink()
    except OSError as error:
      raise CheckpointError(
          f'Checkpoints cannot be written to {root_dir} ({error}). Choose another '
          'folder, or mend its permissions.'
      ) from error
    if any(path.is_dir() for path in self._folder.glob(f'{_PREFIX}*')):
      raise CheckpointError(
          f'{root_dir} holds checkpoints that are folders: of '
          '`tff.program.FileProgramStateManager`, or of tff_kd before 0.2. Go on with '
          'what wrote them, or start again in another folder.'
      )

  def _path(self, version: int) -> pathlib.Path:
    return self._folder / f'{_PREFIX}{version}'

  def _versions(self) -> list[int]:
    return sorted(
        int(path.name.removeprefix(_PREFIX))
        for path in self._folder.glob(f'{_PREFIX}*')
        if re.fullmatch(f'{_PREFIX}[0-9]+', path.name)
    )

  def is_empty(self) -> bool:
    """Returns whether there is no checkpoint."""
    return not self._versions()

  async def get_versions(self) -> Optional[list[int]]:
    """Returns the versions of all checkpoints; see `tff.program.ProgramStateManager`."""
    return self._versions() or None

  async def load(self, version: int, structure: Any) -> Any:
    """Loads the checkpoint of a version.

    Args:
      version: Its number.
      structure: A value of the same structure.

    Returns:
      The state, with NumPy's arrays and scalars.

    Raises:
      CheckpointError: If it has another structure.
      tff.program.ProgramStateNotFoundError: If there is none.
      tf.errors.DataLossError: If it is damaged.
    """
    path = self._path(version)
    if not path.exists():
      raise tff.program.ProgramStateNotFoundError(version)
    leaves = [_parse(record) for record in await asyncio.to_thread(_read, path)]
    difference = _difference(leaves, structure)
    if difference:
      raise CheckpointError(
          f'The checkpoint {path} was made by another model, or with other settings: '
          f'{difference}. Go on with the same, or start again in another folder.'
      )
    return tree.unflatten_as(structure, leaves)

  async def load_latest(self, structure: Any) -> tuple[Optional[Any], int]:
    """Loads the newest checkpoint that can be read.

    Damaged checkpoints are renamed, with a warning.

    Args:
      structure: A value of the same structure.

    Returns:
      The state, with NumPy's arrays and scalars, and its version; `(None, 0)` without
      any checkpoint.

    Raises:
      CheckpointError: If there are checkpoints, and none can be read.
    """
    versions = self._versions()
    for version in reversed(versions):
      try:
        return await self.load(version, structure), version
      except tf.errors.DataLossError as error:
        aside = self._folder / f'{_DAMAGED}{version}'
        self._path(version).replace(aside)
        logging.warning(
            'The checkpoint of round %d is damaged (%s); it is now %s.',
            version, _first_line(error), aside,
        )
    if versions:
      raise CheckpointError(
          f'None of the checkpoints in {self._folder} can be read: rounds {versions}. '
          'Start the run again in another folder.'
      )
    return None, 0

  async def save(self, program_state: Any, version: int) -> None:
    """Saves a checkpoint; see `tff.program.ProgramStateManager`.

    Args:
      program_state: Numbers, strings and arrays in any structure.
      version: Its number, larger than those before.

    Raises:
      CheckpointError: If it cannot be written; earlier checkpoints stay.
      tff.program.ProgramStateExistsError: If there is one of this version.
    """
    path = self._path(version)
    if path.exists():
      raise tff.program.ProgramStateExistsError(version=version, path=str(self._folder))
    state = await tff.program.materialize_value(program_state)
    partial = path.with_name(f'{path.name}_temp')
    try:
      await asyncio.to_thread(_write, partial, tree.flatten(state))
      partial.replace(path)
    except _WRITE_ERRORS as error:
      partial.unlink(missing_ok=True)
      raise CheckpointError(
          f'The checkpoint of round {version} cannot be written to {self._folder} '
          f'({_first_line(error)}). The one before it is whole: make room, or '
          'mend the folder, and resume.'
      ) from error
    for old in self._versions()[: -self._keep_total]:
      self._path(old).unlink()


def _write(path: pathlib.Path, leaves: list[Any]) -> None:
  """Writes the number of values, then the values."""
  with tf.io.TFRecordWriter(os.fspath(path)) as writer:
    writer.write(str(len(leaves)).encode())
    for leaf in leaves:
      writer.write(tf.make_tensor_proto(leaf).SerializeToString())


def _read(path: pathlib.Path) -> list[bytes]:
  """Reads the serialized values.

  Raises:
    tf.errors.DataLossError: If the file is damaged.
  """
  records = list(tf.data.TFRecordDataset(os.fspath(path)).as_numpy_iterator())
  if not records or int(records[0]) != len(records) - 1:
    raise tf.errors.DataLossError(None, None, 'Some of its values are not there.')
  return records[1:]


def _parse(record: bytes) -> Any:
  """Returns a value: an array, or a scalar."""
  return tf.make_ndarray(tensor_pb2.TensorProto.FromString(record))[()]


def _difference(leaves: list[Any], structure: Any) -> str:
  """Returns how values differ in number, shape or type from a structure, or ''."""
  expected = tree.flatten_with_path(structure)
  if len(leaves) != len(expected):
    return f'it holds {len(leaves)} arrays, {len(expected)} are expected'
  for found, (path, leaf) in zip(leaves, expected):
    name = '/'.join(map(str, path))
    if np.shape(found) != np.shape(leaf):
      return f'{name} is of shape {np.shape(found)}, {np.shape(leaf)} is expected'
    # Python's numbers and strings have no dtype.
    types = [
        tf.as_dtype(value.dtype) for value in (found, leaf) if hasattr(value, 'dtype')
    ]
    if len(set(types)) > 1:
      return f'{name} is of type {types[0].name}, {types[1].name} is expected'
  return ''


def _first_line(error: Exception) -> str:
  return (str(error) or type(error).__name__).splitlines()[0]
