"""Clients' data by reference: the same rounds as from memory, and sound files."""

import collections
import json

from absl import logging
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import keras
import numpy as np
import pytest
import tensorflow as tf
from tff_kd.compat import tff

import tff_kd
from tests import helpers

SIZES = (7, 0, 12, 5)


@pytest.fixture(scope='module')
def clients():
  return {f'c{n}': helpers.examples(n, n) for n in SIZES}


@pytest.fixture(scope='module')
def data(clients):
  return tff_kd.FileClientData.from_clients(clients)


def _read(dataset):
  """All examples of a dataset of batches, end to end."""
  batches = list(dataset.as_numpy_iterator())
  return [np.concatenate(parts) for parts in zip(*batches)]


def test_each_client_reads_its_own_examples(data, clients):
  batches = tff_kd.ClientBatches(data=data, batch_size=4, shuffle=False)
  assert data.client_ids == list(clients)
  assert data.numbers(['c12', 'c0']) == [2, 1]
  np.testing.assert_array_equal(data.num_examples, SIZES)
  np.testing.assert_array_equal(batches.num_batches, [2, 0, 3, 2])
  for number, (x, y) in enumerate(clients.values()):
    dataset = batches.dataset(number)
    assert dataset.element_spec == batches.element_spec
    if len(y):
      found = _read(dataset)
      np.testing.assert_array_equal(found[0], x)
      np.testing.assert_array_equal(found[1], y)
    else:
      assert not list(dataset)


@pytest.mark.parametrize('names', [['b', 'a', 'b', 'c'], [20, 7, 20, 300]])
def test_a_column_says_whose_an_example_is(names):
  """As `df.groupby('client').indices` does, whose keys may be NumPy's numbers."""
  x, y = helpers.examples(4, 0)
  found = tff_kd.data.partition.by_client(names)
  assert list(found) == [str(its) for its in sorted(set(names))]
  of_table = dict(zip(np.unique(names), found.values()))
  for rows in (found, of_table):
    data = tff_kd.FileClientData.from_arrays((x, y), rows)
    assert data.client_ids == list(found)
    batches = tff_kd.ClientBatches(data=data, batch_size=4, shuffle=False)
    np.testing.assert_array_equal(_read(batches.dataset(str(names[0])))[0], x[[0, 2]])
    np.testing.assert_array_equal(_read(batches.dataset(str(names[3])))[1], y[[3]])
  with pytest.raises(ValueError, match=r'found the shape \(1, 4\)'):
    tff_kd.data.partition.by_client([names])


def test_datasets_are_read_as_arrays(clients, data):
  """Also one without examples, whose structure is known all the same."""
  found = tff_kd.FileClientData.from_clients({
      name: tf.data.Dataset.from_tensor_slices(its) for name, its in clients.items()
  })
  assert found.client_ids == data.client_ids and found.element_spec == data.element_spec
  np.testing.assert_array_equal(found.num_examples, SIZES)
  batches = tff_kd.ClientBatches(data=found, batch_size=5, shuffle=False)
  x, y = _read(batches.dataset('c12'))
  np.testing.assert_array_equal(x, clients['c12'][0])
  np.testing.assert_array_equal(y, clients['c12'][1])


@settings(max_examples=25, deadline=None)
@given(
    client=st.sampled_from([0, 2, 3]),
    round_num=st.integers(0, 1000),
    epochs=st.integers(1, 3),
    batch_size=st.integers(1, 9),
    max_elements=st.none() | st.integers(1, 30),
    max_batches=st.none() | st.integers(1, 5),
    drop_remainder=st.booleans(),
)
def test_a_clients_order(
    data, client, round_num, epochs, batch_size, max_elements, max_batches,
    drop_remainder,
):
  batches = tff_kd.ClientBatches(
      data=data, batch_size=batch_size, num_epochs=epochs,
      max_elements=max_elements, max_batches=max_batches,
      drop_remainder=drop_remainder,
  )
  n = SIZES[client]
  rows = batches.rows(tf.constant(client), tf.constant(round_num)).numpy()
  rows -= sum(SIZES[:client])
  total = min(
      n * epochs,
      max_elements or n * epochs,
      max_batches * batch_size if max_batches else n * epochs,
  )
  if drop_remainder:
    total -= total % batch_size
  assert len(rows) == total
  assert batches.num_batches[client] == -(-total // batch_size)
  for start in range(0, total, n):
    # Each pass uses each example once; the last may be cut short.
    part = rows[start : start + n]
    assert len(set(part)) == len(part)
    assert set(part) <= set(range(n))


def test_the_order_is_decided_by_seed_round_and_client(data):
  def order(seed=0, client=2, round_num=0):
    batches = tff_kd.ClientBatches(data=data, batch_size=4, seed=seed)
    rows = batches.rows(tf.constant(client), tf.constant(round_num)).numpy()
    return tuple(rows)

  assert order() == order()
  others = [order(seed=1), order(round_num=1)]
  assert len({order(), *others}) == 3
  assert all(sorted(o) == sorted(order()) for o in others)


@pytest.mark.parametrize('kind', ['fed_avg', helpers.slow('fed_distillation')])
def test_by_reference_equals_in_memory(data, kind):
  """Two rounds, momentum, both channels, an empty client: the same numbers."""
  batches = tff_kd.ClientBatches(data=data, batch_size=4, num_epochs=2, seed=3)
  parts = dict(
      teacher_fn=lambda: helpers.dense_fn((4,)),
      transfer_set=lambda: tff_kd.TransferSet(helpers.examples(10, 9)[0]),
      distillation=lambda: tff_kd.Distillation(num_steps=2, batch_size=4),
  )
  outputs = []
  for client_data in (batches, None):
    keras.utils.set_random_seed(0)
    process = helpers.build_with_parts(
        kind, parts, client_optimizer=helpers.sgd(0.1, 0.9), client_data=client_data
    )
    state = process.initialize()
    for round_num in range(2):
      chosen = [2, 1, 0] if round_num else [0, 1, 3]
      if client_data is None:
        chosen = [batches.dataset(c, round_num) for c in chosen]
      output = process.next(state, chosen)
      state = output.state
    outputs.append(output)
  helpers.assert_weights_close(
      outputs[0].state.global_model_weights,
      outputs[1].state.global_model_weights, atol=1e-6,
  )
  reference, memory = (o.metrics['client_work'] for o in outputs)
  assert reference['participation'] == memory['participation']
  assert reference['participation']['num_excluded_empty'] == 1
  np.testing.assert_allclose(
      list(reference['train'].values()), list(memory['train'].values()), rtol=1e-5
  )


def test_a_round_traces_nothing_new():
  """The guard of speed that needs no clock."""
  traced = []

  def student_fn():
    traced.append(1)
    return helpers.dense_fn(dim=50)()

  x, y = helpers.examples(4000, 0, dim=50)
  batches = tff_kd.ClientBatches(
      data=tff_kd.FileClientData.from_arrays((x, y), np.split(np.arange(4000), 4)),
      batch_size=20,
  )
  process = helpers.build(
      'fed_distillation', student_fn=student_fn, input_spec=batches.element_spec,
      client_data=batches, teacher_fn=student_fn,
      transfer_set=tff_kd.TransferSet(helpers.examples(500, 1, dim=50)[0]),
      distillation=tff_kd.Distillation(num_steps=2),
  )
  state = process.next(process.initialize(), [0, 1, 2, 3]).state
  calls = len(traced)
  for _ in range(3):
    state = process.next(state, [3, 2, 1, 0]).state
  assert len(traced) == calls


def test_other_processes_take_its_datasets(data):
  """TFF's own composition, over a dataset computation."""
  batches = tff_kd.ClientBatches(data=data, batch_size=4)
  process = tff.simulation.compose_dataset_computation_with_learning_process(
      batches.dataset_computation,
      helpers.build('fed_avg'),
  )
  chosen = [
      tff_kd.data.client_data.ClientRound(np.int32(c), np.int32(5)) for c in (0, 2)
  ]
  metrics = process.next(process.initialize(), chosen).metrics
  assert metrics['client_work']['train']['num_examples'] == 19


def test_from_tff_client_data(tmp_path):
  clients = {
      name: collections.OrderedDict(
          x=helpers.examples(n, n)[0], y=helpers.examples(n, n)[1]
      )
      for name, n in (('b', 3), ('a', 2))
  }
  source = tff.simulation.datasets.TestClientData(clients)
  read = []

  def preprocess(dataset):
    read.append(1)
    return dataset

  def prepare(key):
    read.clear()
    return tff_kd.FileClientData.from_client_data(
        source, directory=tmp_path, key=key, preprocess_fn=preprocess
    )

  data = prepare('first')
  assert data.client_ids == source.client_ids
  (number,) = data.numbers(['b'])
  batch = next(iter(tff_kd.ClientBatches(
      data=data, batch_size=9, shuffle=False
  ).dataset(number)))
  np.testing.assert_array_equal(batch['x'], clients['b']['x'])
  first_time = len(read)
  prepare('first')
  assert len(read) == 1 < first_time  # Its spec, but not its examples.
  prepare('second')
  assert len(read) == first_time
  with pytest.raises(ValueError, match='`key` must name what is read'):
    tff_kd.FileClientData.from_client_data(source, directory=tmp_path)


def test_files_are_written_once_and_a_damaged_one_again(
    tmp_path, clients, monkeypatch
):
  warnings = []
  monkeypatch.setattr(logging, 'warning', lambda m, *a: warnings.append(m % a))

  def prepare():
    data = tff_kd.FileClientData.from_clients(clients, directory=tmp_path)
    return _read(
        tff_kd.ClientBatches(data=data, batch_size=4, shuffle=False).dataset(2)
    )[0]

  prepare()
  files = sorted(tmp_path.iterdir())
  assert not [f for f in files if 'partial' in f.name]
  before = {f: f.stat().st_mtime_ns for f in files}
  prepare()
  assert {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()} == before
  assert not warnings
  largest = max(files, key=lambda f: f.stat().st_size)
  manifest = next(f for f in files if f.suffix == '.json')
  damages = [
      (largest, largest.read_bytes()[:-4]),
      (largest, b'\x01' + largest.read_bytes()[1:]),
      (manifest, manifest.read_bytes()[:-9]),
  ]
  for file, contents in damages:
    # A new file: the old one is still mapped into the worker's memory.
    file.unlink()
    file.write_bytes(contents)
    warnings.clear()
    np.testing.assert_array_equal(prepare(), clients['c12'][0])
    assert file.name in warnings[0]
  largest.unlink()
  prepare()
  assert largest.exists()
  assert json.loads(manifest.read_text())['client_ids'] == list(clients)


def test_an_interrupted_preparation_leaves_nothing(tmp_path):
  def broken():
    x, _ = helpers.examples(5000, 0)
    x[4999] = np.nan
    return x

  with pytest.raises(ValueError, match="clients' data must be finite"):
    tff_kd.FileClientData.from_arrays(
        (broken(), np.zeros(5000, np.int32)), [np.arange(5000)],
        directory=tmp_path,
    )
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('make', 'error', 'message'),
    [
        (lambda d: tff_kd.FileClientData.from_clients({}), ValueError, 'at least one'),
        (
            lambda d: tff_kd.FileClientData.from_clients(
                [helpers.examples(2, 0), helpers.examples(2, 0, dim=3)]
            ),
            ValueError, "of one kind; '1' has",
        ),
        (
            lambda d: tff_kd.FileClientData.from_arrays(
                helpers.examples(4, 0), [np.array([4])]
            ),
            ValueError, "client '0' must be from 0 to 3, found 4",
        ),
        (
            lambda d: tff_kd.FileClientData.from_arrays(
                helpers.examples(4, 0), {'a': np.array([True, False, True, False])}
            ),
            ValueError, "rows of client 'a' must be integers, .* bool. .*flatnonzero",
        ),
        (
            lambda d: tff_kd.FileClientData.from_arrays(
                helpers.examples(4, 0), {'a': [0.5, 1.0]}
            ),
            ValueError, "rows of client 'a' must be integers, .* float64.$",
        ),
        (
            lambda d: tff_kd.FileClientData.from_arrays(
                (np.zeros([4, 2]), np.zeros(3)), [[0]]
            ),
            ValueError, r'one row an example, found arrays of \[3, 4\]',
        ),
        (
            lambda d: tff_kd.FileClientData.from_arrays(
                (np.array(['a']), np.zeros(1)), [[0]]
            ),
            ValueError, 'numbers and booleans',
        ),
        (lambda d: d.numbers(['nobody']), KeyError, "no client 'nobody'"),
        (
            lambda d: tff_kd.FileClientData.from_clients(
                [helpers.dataset(*helpers.examples(4, 0))]
            ),
            ValueError, 'Pass them unbatched',
        ),
        (
            lambda d: tff_kd.FileClientData.from_clients([{'pixels': [1], 'label': [1]}]),
            ValueError, 'found a dict with the keys pixels, label. Make such pairs first',
        ),
        (
            lambda d: tff_kd.ClientBatches(data=d, batch_size=2).dataset('nobody'),
            KeyError, "no client 'nobody'",
        ),
        (
            lambda d: tff_kd.ClientBatches(data=d, batch_size=0),
            ValueError, '`batch_size` must be a positive integer, found 0',
        ),
        (
            lambda d: tff_kd.ClientBatches(data=[1], batch_size=2),
            TypeError, '`data` must be a `tff_kd.FileClientData`',
        ),
        (
            lambda d: helpers.build('fed_avg', client_data=d),
            TypeError, '`client_data` must be a `tff_kd.ClientBatches`',
        ),
        (
            lambda d: helpers.build(
                'fed_avg', student_fn=helpers.dense_fn(dim=4),
                input_spec=helpers.dataset(
                    *helpers.examples(4, 0, dim=4)
                ).element_spec,
                client_data=tff_kd.ClientBatches(data=d, batch_size=2),
            ),
            ValueError, '`input_spec` and `client_data` must have batches of one',
        ),
    ],
)
def test_refusals(data, make, error, message):
  with pytest.raises(error, match=message):
    make(data)


def test_a_part_of_the_steps_is_one_step_at_least(data):
  batches = tff_kd.ClientBatches(data=data, batch_size=4)
  for total, share, expected in (
      (10, 1e-5, 4), (3, 1e-5, 3), (10, 0.34, 8), (10, 1.0, 10), (0, 0.5, 0)
  ):
    found = batches.num_elements(tf.constant(total), tf.constant(share))
    assert found == expected


def test_only_numbers_are_left_out_of_the_inputs():
  """Indices and truth values have no value that says that there is none."""
  rng = np.random.default_rng(0)
  x = (
      rng.normal(size=(3, 20)).astype(np.float32), rng.integers(0, 9, (3, 2)),
      rng.integers(0, 2, (3, 2)).astype(bool),
  )
  batches = tff_kd.ClientBatches(
      data=tff_kd.FileClientData.from_arrays((x, np.zeros(3, np.int32)), [range(3)]),
      batch_size=3, shuffle=False, input_share=0.5,
  )
  (found, _), = batches.dataset(0).as_numpy_iterator()
  kept = np.all(found[0] == x[0], axis=0)
  assert 0 < kept.sum() < 20 and not np.any(found[0][:, ~kept])
  for part, expected in zip(found[1:], x[1:]):
    np.testing.assert_array_equal(part, expected)


def test_a_client_that_does_not_exist(data):
  process = helpers.build(
      'fed_avg', client_data=tff_kd.ClientBatches(data=data, batch_size=4)
  )
  state = process.initialize()
  with pytest.raises(ValueError, match='Client 1 of the round .* from 0 to 3, found 4'):
    process.next(state, [0, 4])
  assert process.next(state, [0, 3]).state.round_num == 1
