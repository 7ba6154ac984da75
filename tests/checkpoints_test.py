"""Checkpoints: damaged ones, full disks, folders that cannot be written."""

import errno
import os

import numpy as np
import pytest
import tensorflow as tf

from tests import helpers
from tff_kd import simulation


def _state(number):
  return {'weights': np.full([1000], number, np.float32), 'round': np.int32(number)}


def _saved(folder, numbers, **kwargs):
  checkpoints = simulation.Checkpoints(folder, **kwargs)
  for number in numbers:
    helpers.run(checkpoints.save(_state(number), number))
  return checkpoints


def _latest(folder):
  return helpers.run(simulation.Checkpoints(folder).load_latest(_state(0)))


def _files(folder, version):
  return [
      path for path in (folder / f'program_state_{version}').rglob('*')
      if path.is_file() and path.stat().st_size
  ]


def test_it_keeps_the_newest(tmp_path):
  assert _latest(tmp_path) == (None, 0)
  checkpoints = _saved(tmp_path, [1, 2, 5], keep_total=2)
  assert helpers.run(checkpoints.get_versions()) == [2, 5]
  state, version = _latest(tmp_path)
  assert version == 5
  np.testing.assert_array_equal(state['weights'], _state(5)['weights'])


@pytest.mark.parametrize(
    'name, damage',
    [
        (name, damage)
        for name in (
            'saved_model.pb', 'variables.index', 'variables.data-00000-of-00001'
        )
        for damage in ('truncate', 'flip', 'remove')
        # A byte of the graph may mean nothing; tensors have checksums.
        if (name, damage) != ('saved_model.pb', 'flip')
    ],
)
def test_of_a_damaged_one_the_one_before_is_used(tmp_path, name, damage):
  checkpoints = _saved(tmp_path, [3, 4])
  (path,) = [its for its in _files(tmp_path, 4) if its.name == name]
  content = path.read_bytes()
  if damage == 'remove':
    path.unlink()
  elif damage == 'truncate':
    path.write_bytes(content[: len(content) // 2])
  else:
    middle = len(content) // 2
    flipped = bytes([content[middle] ^ 0xFF])
    path.write_bytes(content[:middle] + flipped + content[middle + 1 :])
  state, version = helpers.run(checkpoints.load_latest(_state(0)))
  assert version == 3
  np.testing.assert_array_equal(state['weights'], _state(3)['weights'])
  assert (tmp_path / 'damaged_4').is_dir()
  # Its round comes again.
  helpers.run(checkpoints.save(_state(4), 4))
  assert _latest(tmp_path)[1] == 4


def test_with_none_left_it_does_not_begin_anew(tmp_path):
  _saved(tmp_path, [3])
  for path in _files(tmp_path, 3):
    path.unlink()
  with pytest.raises(simulation.CheckpointError, match=r'None of .* rounds \[3\]'):
    _latest(tmp_path)


def test_a_full_disk_leaves_the_last_one(tmp_path, monkeypatch):
  checkpoints = _saved(tmp_path, [1])
  save = tf.saved_model.save

  def full(module, path, **kwargs):
    save(module, path, **kwargs)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(tf.saved_model, 'save', full)
  with pytest.raises(simulation.CheckpointError, match='No space left.*make room'):
    helpers.run(checkpoints.save(_state(2), 2))
  assert not list(tmp_path.glob('*_temp*'))
  assert _latest(tmp_path)[1] == 1


def test_what_a_killed_run_had_begun_is_removed(tmp_path):
  _saved(tmp_path, [1])
  (tmp_path / 'program_state_2_temp1234').mkdir()
  assert _latest(tmp_path)[1] == 1
  assert not list(tmp_path.glob('*_temp*'))


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
  file = tmp_path / 'file'
  file.touch()
  with pytest.raises(simulation.CheckpointError, match='cannot be written to .*file'):
    simulation.Checkpoints(file / 'checkpoints')
