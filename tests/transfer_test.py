"""The transfer set: rows, rounds, files."""

import collections

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest
import tensorflow as tf
from tff_kd.compat import tff

import tff_kd
from tests import helpers
from tff_kd.data import transfer as transfer_lib


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 50),
    fraction=st.floats(0, 1),
    validation=st.floats(0, 0.9),
    seed=st.integers(0, 100),
    round_num=st.integers(0, 100),
)
def test_subsets(n, fraction, validation, seed, round_num):
  v = min(int(validation * n), n - 1)
  m = max(1, int(fraction * (n - v)))
  x = np.arange(n, dtype='f')[:, None]
  transfer = tff_kd.TransferSet(
      x, subset_size=m, validation_size=v, seed=seed
  )
  ids = transfer.round_ids(round_num).numpy()
  validation_ids = transfer.validation_ids().numpy()
  assert len(set(ids.tolist())) == len(ids) == m
  assert len(set(validation_ids.tolist())) == len(validation_ids) == v
  assert not set(ids.tolist()) & set(validation_ids.tolist())
  np.testing.assert_array_equal(ids, transfer.round_ids(round_num).numpy())
  np.testing.assert_array_equal(transfer.gather_inputs(ids), x[ids])
  assert transfer.num_predictions == len(transfer.prediction_ids(round_num))


def test_rounds_and_seeds_differ():
  x = np.arange(100, dtype='f')[:, None]
  a = tff_kd.TransferSet(x, subset_size=20, seed=0)
  b = tff_kd.TransferSet(x, subset_size=20, seed=1)
  assert set(a.round_ids(0).numpy()) != set(a.round_ids(1).numpy())
  assert set(a.round_ids(0).numpy()) != set(b.round_ids(0).numpy())


def test_clients_and_server_draw_the_same_rows():
  x = np.arange(1000, dtype='f')[:, None]
  transfer = tff_kd.TransferSet(x, subset_size=30, seed=5)

  @tff.tensorflow.computation(np.int32)
  def rows(round_num):
    return transfer.gather_inputs(transfer.round_ids(round_num))

  @tff.federated_computation(tff.FederatedType(np.int32, tff.SERVER))
  def both(round_num):
    at_clients = tff.federated_map(rows, tff.federated_broadcast(round_num))
    return tff.federated_mean(at_clients), tff.federated_map(rows, round_num)

  ids = transfer.round_ids(7).numpy()

  @tff.federated_computation(
      tff.FederatedType(np.int32, tff.SERVER),
      tff.FederatedType(np.int32, tff.CLIENTS),
  )
  def with_clients(round_num, clients):
    del clients
    return both(round_num)

  clients, server = with_clients(np.int32(7), [0, 0])
  np.testing.assert_array_equal(clients, server)
  np.testing.assert_array_equal(server, x[ids])


def test_a_large_set_is_not_in_the_graph():
  inputs = np.zeros([200_000, helpers.DIM], 'f')
  process = helpers.build(
      'fed_df', transfer_set=tff_kd.TransferSet(inputs, subset_size=10)
  )
  serialized = tff.framework.serialize_computation(process.next)
  assert serialized.ByteSize() < 0.2 * inputs.nbytes
  output = process.next(
      process.initialize(), [helpers.dataset(*helpers.examples(8, 0))]
  )
  assert output.metrics['server_distillation']['student']['num_targets'] == 10


def test_predictions_meet_their_inputs():
  """Defect 5: a consensus that is keyed by position would fit other inputs."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(40, helpers.DIM)).astype('f')
  process = helpers.build(
      'fed_distillation', client_optimizer=helpers.sgd(0.0),
      teacher_fn=helpers.dense_fn(),
      transfer_set=tff_kd.TransferSet(x, subset_size=24, seed=3),
      teacher_optimizer=helpers.sgd(0.5),
      distillation=tff_kd.Distillation(loss='mse', num_steps=400, batch_size=8),
      back_distillation=None,
  )
  state = process.initialize()
  data = [helpers.dataset(*helpers.examples(8, 0))]
  for _ in range(3):
    state = process.next(state, data).state
  # Clients do not move, so the teacher can only end at the student.
  helpers.assert_weights_close(
      state.teacher_weights.trainable, state.global_model_weights.trainable,
      atol=1e-3,
  )


def test_arrays_datasets_and_files_agree(tmp_path):
  x = np.random.default_rng(0).normal(size=(9000, 3)).astype('f')
  y = np.arange(9000, dtype='i4')
  np.save(tmp_path / 'x.npy', x)
  np.save(tmp_path / 'y.npy', y)
  sets = [
      tff_kd.TransferSet(x, y),
      tff_kd.TransferSet.from_dataset(
          tf.data.Dataset.from_tensor_slices((x, y)), labelled=True
      ),
      tff_kd.TransferSet.from_files(tmp_path / 'x.npy', tmp_path / 'y.npy'),
  ]
  ids = tf.constant([8999, 0, 4097])
  for transfer in sets:
    assert transfer.size == 9000
    np.testing.assert_array_equal(transfer.gather_inputs(ids), x[ids.numpy()])
    np.testing.assert_array_equal(transfer.gather_labels(ids), y[ids.numpy()])
  unlabelled = tff_kd.TransferSet.from_dataset(
      tf.data.Dataset.from_tensor_slices({'b': x, 'a': y}), labelled=False
  )
  rows = unlabelled.gather_inputs(ids)
  np.testing.assert_array_equal(rows['a'], y[ids.numpy()])
  np.testing.assert_array_equal(rows['b'], x[ids.numpy()])
  with pytest.raises(ValueError, match='no labels'):
    unlabelled.gather_labels(ids)


def test_named_tuples_are_tuples_wherever_they_come_from():
  pair = collections.namedtuple('Pair', ['left', 'right'])
  x, y = helpers.examples(6, 0)
  inputs = tf.data.Dataset.from_tensor_slices(pair(x, -x))
  examples = tf.data.Dataset.zip(inputs, tf.data.Dataset.from_tensor_slices(y))
  transfer = tff_kd.TransferSet.from_dataset(inputs, labelled=False)
  clients = tff_kd.FileClientData.from_clients([examples])
  assert type(transfer.inputs_spec) is type(clients.element_spec[0]) is tuple
  for part, expected in zip(transfer.gather_inputs(tf.constant([5, 1])), (x, -x)):
    np.testing.assert_array_equal(part, expected[[5, 1]])


def test_structures_and_dtypes():
  inputs = collections.OrderedDict(
      image=np.zeros([6, 4, 4], 'u1'), mask=np.ones([6], bool)
  )
  transfer = tff_kd.TransferSet(inputs)
  assert transfer.inputs_spec == collections.OrderedDict(
      image=tf.TensorSpec([None, 4, 4], tf.uint8),
      mask=tf.TensorSpec([None], tf.bool),
  )
  rows = transfer.gather_inputs(tf.constant([1, 2]))
  assert rows['mask'].numpy().all()


def test_files_are_kept_in_a_named_folder(tmp_path):
  x = np.ones([4, 2], 'f')
  kept = tff_kd.TransferSet(x, directory=tmp_path)
  again = tff_kd.TransferSet(x, directory=tmp_path)
  assert len(list(tmp_path.iterdir())) == 1  # The same content, one file.
  del kept, again
  assert len(list(tmp_path.iterdir())) == 1


def test_a_temporary_folder_lasts_as_long_as_the_program(tmp_path):
  code = (
      'import gc, os, numpy as np, tff_kd\n'
      'folder = tff_kd.TransferSet(np.ones([4, 2], "f"))._arrays.files[0].parent\n'
      'gc.collect()\n'
      'print(os.listdir(folder), folder)\n'
  )
  printed = helpers.python(code, TMPDIR=str(tmp_path)).stdout
  assert '.bin' in printed and str(tmp_path) in printed
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'build, message',
    [
        (lambda: tff_kd.TransferSet(np.zeros([0, 3], 'f')), 'empty'),
        (
            lambda: tff_kd.TransferSet.from_dataset(
                tf.data.Dataset.from_tensor_slices(np.zeros([0, 3], 'f')),
                labelled=False,
            ),
            'empty',
        ),
        (lambda: tff_kd.TransferSet(np.zeros([3, 2]), np.zeros([4])), 'one row'),
        (lambda: tff_kd.TransferSet(np.array([[1.0], [np.nan]])), 'finite'),
        (
            lambda: tff_kd.TransferSet(np.zeros([3, 2]), label_mask=[1, 0, 1]),
            'needs `labels`',
        ),
        (lambda: tff_kd.TransferSet(np.array(['a', 'b'])), 'numbers and booleans'),
        (
            lambda: tff_kd.TransferSet(np.zeros([3, 2]), subset_size=4),
            'subset_size',
        ),
        (
            lambda: tff_kd.TransferSet(np.zeros([3, 2]), validation_size=3),
            'validation_size',
        ),
        (
            lambda: tff_kd.TransferSet.from_dataset(
                tf.data.Dataset.range(3), labelled=True
            ),
            'pairs',
        ),
    ],
)
def test_bad_sets_are_refused(build, message):
  with pytest.raises(ValueError, match=message):
    build()


def test_a_damaged_file_is_named(tmp_path):
  path = tmp_path / 'broken.npy'
  np.save(path, np.zeros([100, 3]))
  path.write_bytes(path.read_bytes()[:-50])
  with pytest.raises(ValueError, match='broken.npy'):
    tff_kd.TransferSet.from_files(path)


def test_only_known_labels_count():
  """The cross-entropy is the mean over labelled rows; other entries are ignored."""
  x, y = helpers.examples(16, 5)
  mask = np.arange(16) % 4 == 0
  unknown = np.where(mask, y, -7)
  process = helpers.build(
      'fed_distillation', teacher_fn=helpers.dense_fn((8,)),
      transfer_set=tff_kd.TransferSet(x, unknown, label_mask=mask),
      distillation=tff_kd.Distillation(
          distillation_weight=0.0, num_steps=1, batch_size=16
      ),
      back_distillation=None,
  )
  state = process.initialize()
  teacher = process.teacher_to_keras(state)
  expected = helpers.loss_fn()(y[mask], teacher(x[mask]))
  output = process.next(state, [helpers.dataset(*helpers.examples(8, 0))])
  measured = output.metrics['server_distillation']['teacher']
  np.testing.assert_allclose(measured['first_loss'], expected, rtol=1e-5)
  assert measured['num_steps'] == 1


def test_labels_out_of_range_are_refused():
  x, y = helpers.examples(16, 5)
  with pytest.raises(ValueError, match='from 0 to 2, found 0 to 9'):
    helpers.build('fed_df', transfer_set=tff_kd.TransferSet(x, np.where(y == 2, 9, y)))


def test_arrays_and_datasets_are_taken_as_they_are():
  x, y = helpers.examples(6, 0)
  whole = transfer_lib.TransferSet(x)
  assert transfer_lib.as_transfer_set(whole) is whole
  pairs = tf.data.Dataset.from_tensor_slices((x, y))
  for value, labelled in (
      (x, False), (tf.constant(x), False), (pairs.map(lambda x, y: x), False),
      (pairs, True),
  ):
    found = transfer_lib.as_transfer_set(value)
    assert found.size == 6 and found.labelled == labelled
    np.testing.assert_array_equal(found.gather_inputs(tf.range(6)), x)
  with pytest.raises(TypeError, match=r'found tuple.*TransferSet\(inputs, labels\)'):
    transfer_lib.as_transfer_set((x, y))
  process = helpers.build('fed_df', transfer_set=x, student_optimizer=helpers.sgd())
  assert process.transfer_set.size == 6
