"""Checkpoints that are whole or not there, and that say what is wrong."""

import os
import pathlib
import shutil
from typing import Any, Optional

from absl import logging
import tensorflow as tf
from tff_kd.compat import tff

_PREFIX = 'program_state_'
_DAMAGED = 'damaged_'
# What TensorFlow raises where a disk is full or a folder is not ours.
_WRITE_ERRORS = (OSError, tf.errors.OpError)


class CheckpointError(RuntimeError):
  """A checkpoint cannot be written, or none can be read."""


class Checkpoints(tff.program.FileProgramStateManager):
  """TFF's file manager, for runs that are killed and disks that are full.

  A checkpoint is written beside its place and then moved there. One that cannot be read
  (its tensors have checksums) is named in a warning, put aside as `damaged_...`, and the
  one before it is used.
  """

  def __init__(self, root_dir: os.PathLike, *, keep_total: int = 2):
    """Opens the folder, and makes it if need be.

    Args:
      root_dir: The folder.
      keep_total: How many checkpoints to keep, the newest ones.

    Raises:
      CheckpointError: If the folder cannot be made or written.
    """
    self._folder = pathlib.Path(root_dir)
    try:
      super().__init__(root_dir, _PREFIX, keep_total=keep_total, keep_first=False)
      self._remove_unfinished()
      probe = self._folder / f'probe_{os.getpid()}'
      probe.touch()
      probe.unlink()
    except _WRITE_ERRORS as error:
      raise CheckpointError(
          f'Checkpoints cannot be written to {root_dir} ({error}). Choose another '
          'folder, or mend its permissions.'
      ) from error

  async def load_latest(self, structure: Any) -> tuple[Optional[Any], int]:
    """The newest checkpoint that can be read, and its version; `(None, 0)` if none is.

    Args:
      structure: As in TFF's.

    Raises:
      CheckpointError: If there are checkpoints, and none can be read.
    """
    versions = await self.get_versions() or []
    for version in reversed(versions):
      try:
        return await self.load(version, structure), version
      # TensorFlow reads a damaged file with errors of any kind.
      except Exception as error:  # pylint: disable=broad-except
        aside = self._put_aside(version)
        logging.warning(
            'The checkpoint of round %d is damaged (%s); it is now %s.',
            version, _first_line(error), aside,
        )
    if versions:
      raise CheckpointError(
          f'None of the checkpoints in {self._folder} can be read: rounds {versions}. '
          'Start the run anew in another folder.'
      )
    return None, 0

  async def save(self, program_state: Any, version: int) -> None:
    """As TFF's.

    Raises:
      CheckpointError: If it cannot be written; what was saved before stays.
    """
    try:
      await super().save(program_state, version)
    except _WRITE_ERRORS as error:
      self._remove_unfinished()
      raise CheckpointError(
          f'The checkpoint of round {version} cannot be written to {self._folder} '
          f'({_first_line(error)}). The one before it is whole: make room, or '
          'mend the folder, and resume.'
      ) from error

  def _put_aside(self, version: int) -> pathlib.Path:
    aside = self._folder / f'{_DAMAGED}{version}'
    shutil.rmtree(aside, ignore_errors=True)
    (self._folder / f'{_PREFIX}{version}').rename(aside)
    return aside

  def _remove_unfinished(self) -> None:
    """What a killed or failed run has begun to write."""
    for path in self._folder.glob(f'{_PREFIX}*_temp*'):
      shutil.rmtree(path, ignore_errors=True)


def _first_line(error: Exception) -> str:
  return (str(error) or type(error).__name__).splitlines()[0]
