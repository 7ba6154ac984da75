"""Checkpoints: damaged ones, full disks, folders that cannot be written."""

import errno
import os

import numpy as np
import pytest
import tensorflow as tf

from tests import helpers
from tff_kd import simulation
from tff_kd.compat import tff


def _state(number):
  return {'weights': np.full([1000], number, np.float32), 'round': np.int32(number)}


def _saved(folder, numbers, **kwargs):
  checkpoints = simulation.Checkpoints(folder, **kwargs)
  for number in numbers:
    helpers.run(checkpoints.save(_state(number), number))
  return checkpoints


def _latest(folder):
  return helpers.run(simulation.Checkpoints(folder).load_latest(_state(0)))


def test_it_keeps_the_newest(tmp_path):
  assert _latest(tmp_path) == (None, 0)
  checkpoints = _saved(tmp_path, [1, 2, 5], keep_total=2)
  assert helpers.run(checkpoints.get_versions()) == [2, 5]
  state, version = _latest(tmp_path)
  assert version == 5
  np.testing.assert_array_equal(state['weights'], _state(5)['weights'])


def _damage(path, damage):
  content = bytearray(path.read_bytes())
  if damage == 'flip':
    content[len(content) // 2] ^= 0xFF
  else:
    del content[len(content) // 2 if damage == 'truncate' else 0 :]
  path.write_bytes(content)


@pytest.mark.parametrize('damage', ['truncate', 'flip', 'empty', 'lose a record'])
def test_of_a_damaged_one_the_one_before_is_used(tmp_path, damage):
  checkpoints = _saved(tmp_path, [3, 4])
  path = tmp_path / 'program_state_4'
  if damage == 'lose a record':
    records = list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator())
    with tf.io.TFRecordWriter(str(path)) as writer:
      for record in records[:-1]:
        writer.write(record)
  else:
    _damage(path, damage)
  state, version = helpers.run(checkpoints.load_latest(_state(0)))
  assert version == 3
  np.testing.assert_array_equal(state['weights'], _state(3)['weights'])
  assert (tmp_path / 'damaged_4').exists()
  # Its round comes again.
  helpers.run(checkpoints.save(_state(4), 4))
  assert _latest(tmp_path)[1] == 4


def test_with_none_left_it_does_not_begin_anew(tmp_path):
  _saved(tmp_path, [3])
  _damage(tmp_path / 'program_state_3', 'empty')
  with pytest.raises(simulation.CheckpointError, match=r'None of .* rounds \[3\]'):
    _latest(tmp_path)


@pytest.mark.parametrize(
    'value',
    [
        np.arange(6, dtype=np.int64).reshape(2, 3), np.float64(-np.inf), np.bool_(True),
        np.zeros([0, 3], np.uint8), tf.ones([2], tf.bfloat16).numpy(),
        np.array([b'a\0', b''], object), b'\0bytes\0',
    ],
)
def test_values_come_back_as_from_tffs_manager(tmp_path, value):
  states = []
  for manager in (
      simulation.Checkpoints(tmp_path / 'ours'),
      tff.program.FileProgramStateManager(tmp_path / 'theirs'),
  ):
    helpers.run(manager.save({'a': (value, ())}, 1))
    states.append(helpers.run(manager.load(1, {'a': (value, ())}))['a'][0])
  ours, theirs = states
  assert type(ours) is type(theirs)
  assert getattr(ours, 'dtype', None) == getattr(theirs, 'dtype', None)
  np.testing.assert_array_equal(ours, theirs)


def test_one_of_another_process_is_named_and_stays(tmp_path):
  checkpoints = _saved(tmp_path, [1])
  with pytest.raises(simulation.CheckpointError, match='it holds 2 arrays, 1 are'):
    helpers.run(checkpoints.load_latest({'weights': np.zeros(3)}))
  wider = {**_state(0), 'weights': np.zeros([1001], np.float32)}
  with pytest.raises(
      simulation.CheckpointError, match=r'weights is of shape \(1000,\), \(1001,\) is'
  ):
    helpers.run(checkpoints.load_latest(wider))
  shorter = {**_state(0), 'weights': tf.zeros([1000], tf.bfloat16).numpy()}
  with pytest.raises(
      simulation.CheckpointError, match='weights is of type float32, bfloat16 is expected'
  ):
    helpers.run(checkpoints.load_latest(shorter))
  assert _latest(tmp_path)[1] == 1


def test_those_of_tffs_manager_are_named(tmp_path):
  helpers.run(tff.program.FileProgramStateManager(tmp_path).save(_state(1), 1))
  with pytest.raises(simulation.CheckpointError, match='FileProgramStateManager'):
    simulation.Checkpoints(tmp_path)


def test_a_version_twice_and_one_that_is_not_there(tmp_path):
  checkpoints = _saved(tmp_path, [1])
  with pytest.raises(tff.program.ProgramStateExistsError):
    helpers.run(checkpoints.save(_state(1), 1))
  with pytest.raises(tff.program.ProgramStateNotFoundError):
    helpers.run(checkpoints.load(2, _state(0)))
  with pytest.raises(ValueError, match='keep_total.*found 0'):
    simulation.Checkpoints(tmp_path, keep_total=0)


def test_a_full_disk_leaves_the_last_one(tmp_path, monkeypatch):
  checkpoints = _saved(tmp_path, [1])
  write = tf.io.TFRecordWriter.write

  def full(self, record):
    write(self, record)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(tf.io.TFRecordWriter, 'write', full)
  with pytest.raises(simulation.CheckpointError, match='No space left.*make room'):
    helpers.run(checkpoints.save(_state(2), 2))
  assert not list(tmp_path.glob('*_temp*'))
  assert _latest(tmp_path)[1] == 1


def test_what_a_killed_run_had_begun_is_removed(tmp_path):
  _saved(tmp_path, [1])
  (tmp_path / 'program_state_2_temp').touch()
  assert _latest(tmp_path)[1] == 1
  assert not list(tmp_path.glob('*_temp*'))


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
  file = tmp_path / 'file'
  file.touch()
  with pytest.raises(simulation.CheckpointError, match='cannot be written to .*file'):
    simulation.Checkpoints(file / 'checkpoints')
