"""Clients' private states in files."""

import os
import pathlib

import ml_dtypes
import numpy as np
import pytest

from tests import helpers
from tff_kd.simulation import client_states


def _state(value):
  return {'w': [np.full((2, 3), value, np.float32)], 'n': np.int64(value)}


def _value(state):
  helpers.assert_weights_close(
      [state['w'][0]], [np.full((2, 3), float(state['n']))], rtol=0
  )
  assert state['w'][0].dtype == np.float32
  return int(state['n'])


def _values(store, clients, round_num=None):
  return [_value(its) for its in store.load(clients, round_num)]


def test_by_client_and_round(tmp_path):
  store = client_states.ClientStates(_state(0), tmp_path / 'new' / 'folder')
  assert _values(store, [3, 1]) == [0, 0] and store.clients() == []
  store.save([1, 2], [_state(11), _state(12)], round_num=1)
  store.save([2, 3], [_state(22), _state(23)], round_num=2)
  assert _values(store, [3, 2, 1, 7]) == [23, 22, 11, 0]
  assert _values(store, [3, 2, 1], round_num=1) == [0, 12, 11]
  assert _values(store, [2], round_num=0) == [0]
  # Another program sees the same.
  again = client_states.ClientStates(_state(0), tmp_path / 'new' / 'folder')
  assert again.clients() == [1, 2, 3]
  assert _values(again, [3, 2, 1]) == [23, 22, 11]


def test_going_back_and_forgetting(tmp_path):
  store = client_states.ClientStates(_state(0), tmp_path)
  for round_num in (1, 2, 3, 4):
    store.save([5], [_state(round_num)], round_num)
  store.save([6], [_state(1)], 1)
  store.prune(3)
  # Round 3 can still be gone back to.
  assert _values(store, [5, 6], round_num=3) == [3, 1]
  assert len(list(tmp_path.iterdir())) == 3
  store.rewind(3)
  assert _values(store, [5, 6]) == [3, 1]
  store.rewind(0)
  assert store.clients() == [] and not list(tmp_path.iterdir())
  assert _values(store, [5]) == [0]


def test_further_rounds_are_kept(tmp_path):
  store = client_states.ClientStates(_state(0), tmp_path)
  for round_num in (1, 3, 5, 7, 9):
    store.save([5], [_state(round_num)], round_num)
  store.save([6], [_state(4)], 4)
  store.prune(8, [4, 0])
  assert [_values(store, [5, 6], round_num=n) for n in (4, 8, 9)] == [
      [3, 4], [7, 4], [9, 4],
  ]
  # Those after rounds 3, 7 and 9, and the other client's.
  assert len(list(tmp_path.iterdir())) == 4


def test_each_cohort_has_its_own_beginning(tmp_path):
  store = client_states.ClientStates(
      (_state(0), _state(100)), tmp_path, cohort_fn=lambda client: client % 2
  )
  assert _values(store, [4, 5]) == [0, 100]
  store.save([5], [_state(7)], 1)
  assert _values(store, [4, 5, 7]) == [0, 7, 100]


@pytest.mark.parametrize('damage', [b'', b'no zip', None])
def test_a_damaged_file_is_named(tmp_path, damage):
  store = client_states.ClientStates(_state(0), tmp_path)
  store.save([5], [_state(1)], 1)
  (path,) = tmp_path.iterdir()
  path.write_bytes(path.read_bytes()[:-40] if damage is None else damage)
  error = client_states.ClientStatesError
  with pytest.raises(error, match='client 5.*round 1.*has its initial state'):
    store.load([5])
  store.save([5], [_state(2)], 2)
  store.save([5], [_state(3)], 3)
  (tmp_path / 'client-5-round-3.npz').write_bytes(b'')
  with pytest.raises(error, match='client 5.*round 3.*has its state after round 2'):
    store.load([5])


def test_a_file_of_another_model_is_refused(tmp_path):
  store = client_states.ClientStates(_state(0), tmp_path)
  store.save([5], [{'w': [np.zeros(3, np.float32)], 'n': np.int64(0)}], 1)
  with pytest.raises(client_states.ClientStatesError, match='of another model'):
    store.load([5])


def test_bfloat16_comes_back_as_it_was(tmp_path):
  values = np.array([[1.5, -2.0, 3.0]], ml_dtypes.bfloat16)
  initial = {'w': np.zeros_like(values), 'n': np.zeros([], ml_dtypes.bfloat16)}
  store = client_states.ClientStates(initial, tmp_path)
  store.save([5], [{'w': values, 'n': values[0, 0]}], 1)
  (found,) = client_states.ClientStates(initial, tmp_path).load([5])
  assert found['w'].dtype == found['n'].dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(found['w'], values)
  assert found['n'] == 1.5 and found['n'].shape == ()
  # Other numbers of as many bytes are not taken for it.
  half = {'w': np.zeros([1, 3], np.float16), 'n': np.zeros([], np.float16)}
  with pytest.raises(client_states.ClientStatesError, match='of another model'):
    client_states.ClientStates(half, tmp_path).load([5])


def test_a_write_that_broke_off_leaves_what_was_there(tmp_path):
  store = client_states.ClientStates(_state(0), tmp_path)
  store.save([5], [_state(1)], 1)

  class Unwritable:

    def __array__(self, *args, **kwargs):
      raise OSError('no space left on device')

  with pytest.raises(OSError, match='no space'):
    store.save([5], [{'w': [Unwritable()], 'n': np.int64(2)}], 2)
  again = client_states.ClientStates(_state(0), tmp_path)
  assert _values(again, [5]) == [1]


def test_states_and_clients_go_together(tmp_path):
  store = client_states.ClientStates(_state(0), tmp_path)
  with pytest.raises(ValueError, match='2 clients and 1 states'):
    store.save([1, 2], [_state(1)], 1)


def test_what_an_earlier_run_left_is_not_taken_for_this_ones(tmp_path):
  store = client_states.ClientStates(_state(0), tmp_path)
  for round_num in (1, 2):
    store.save([5], [_state(round_num)], round_num)
  again = client_states.ClientStates(_state(0), tmp_path)
  with pytest.raises(
      client_states.ClientStatesError, match='after round 2 of an .*this is round 1'
  ):
    again.save([5], [_state(10)], 1)
  again.save([5], [_state(3)], 3)  # It goes on.
  again = client_states.ClientStates(_state(0), tmp_path)
  again.rewind(0)
  assert _values(again, [5]) == [0]
  again.save([5], [_state(10)], 1)
  assert _values(again, [5]) == [10]


def test_a_run_can_begin_with_what_clients_had(tmp_path):
  store = client_states.ClientStates(_state(0), tmp_path)
  for round_num in (1, 2):
    store.save([5], [_state(round_num)], round_num)
  store.save([6], [_state(7)], 1)
  again = client_states.ClientStates(_state(0), tmp_path)
  again.restart()
  assert _values(again, [5, 6, 7], round_num=0) == [2, 7, 0]
  again.save([5], [_state(20)], 1)
  again.rewind(0)
  assert _values(again, [5, 6]) == [2, 7] and len(list(tmp_path.iterdir())) == 2


def test_a_restart_that_broke_off_can_be_repeated(tmp_path, monkeypatch):
  class Killed(Exception):
    pass

  for done in range(5):  # Each client: two files are dropped, one is moved.
    folder = tmp_path / str(done)
    store = client_states.ClientStates(_state(0), folder)
    for round_num in (1, 2, 3):
      store.save([5, 6], [_state(round_num), _state(10 + round_num)], round_num)
    left = iter(range(done))

    def killed_after(function, left=left):
      def call(*args, **kwargs):
        if next(left, None) is None:
          raise Killed
        return function(*args, **kwargs)

      return call

    with monkeypatch.context() as patch:
      patch.setattr(os, 'replace', killed_after(os.replace))
      patch.setattr(pathlib.Path, 'unlink', killed_after(pathlib.Path.unlink))
      with pytest.raises(Killed):
        client_states.ClientStates(_state(0), folder).restart()
    again = client_states.ClientStates(_state(0), folder)
    again.restart()
    assert _values(again, [5, 6], round_num=0) == [3, 13]
    assert len(list(folder.iterdir())) == 2
