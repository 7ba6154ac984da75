"""Partitions, tasks and files."""

import gzip
import pickle
import struct

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest

from tests import helpers
from tff_kd import data
from tff_kd.data import partition
from tff_kd.data.tasks import idx

_SPLITS = {
    'dirichlet': dict(alpha=0.5),
    'shards': dict(shards_per_client=2),
    'quantity_skew': dict(alpha=0.5),
    'iid': {},
}


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(partition.PARTITIONS)),
    num_clients=st.integers(1, 12),
    n=st.integers(60, 300),
    classes=st.integers(1, 10),
    seed=st.integers(0, 1000),
)
def test_every_example_is_used_once(name, num_clients, n, classes, seed):
  labels = np.random.default_rng(seed).integers(0, classes, n)
  split = partition.PARTITIONS[name]
  clients = split(labels, num_clients, seed=seed, **_SPLITS[name])
  assert len(clients) == num_clients
  np.testing.assert_array_equal(np.sort(np.concatenate(clients)), np.arange(n))
  assert min(len(c) for c in clients) >= 1
  again = split(labels, num_clients, seed=seed, **_SPLITS[name])
  for a, b in zip(clients, again):
    np.testing.assert_array_equal(a, b)


def test_seeds_differ():
  labels = np.arange(200) % 10
  for name, split in partition.PARTITIONS.items():
    a, b = (split(labels, 5, seed=s, **_SPLITS[name]) for s in (0, 1))
    assert any(len(x) != len(y) or (x != y).any() for x, y in zip(a, b)), name


def test_dirichlet_skews_as_alpha_says():
  labels = np.arange(5000) % 10

  def classes_held(alpha):
    clients = partition.dirichlet(labels, 10, alpha=alpha, seed=0)
    # The effective number of classes: exp of the entropy.
    values = []
    for rows in clients:
      p = np.bincount(labels[rows], minlength=10) / len(rows)
      values.append(np.exp(-np.sum(p[p > 0] * np.log(p[p > 0]))))
    return np.mean(values)

  assert classes_held(0.1) < 4 < 8 < classes_held(100.0)


@settings(max_examples=40, deadline=None)
@given(cap=st.integers(100, 400), alpha=st.floats(0.1, 10.0), seed=st.integers(0, 1000))
def test_a_client_that_has_its_cap_gets_no_further_class(cap, alpha, seed):
  labels = np.arange(1000) % 10
  clients = partition.dirichlet(labels, 10, alpha=alpha, seed=seed, cap=cap)
  np.testing.assert_array_equal(np.sort(np.concatenate(clients)), np.arange(1000))
  for rows in clients:
    counts = np.bincount(labels[rows], minlength=10)
    # Classes are dealt out in their order.
    before = np.concatenate([[0], np.cumsum(counts)[:-1]])
    assert not counts[before >= cap].any()


def test_a_cap_that_is_never_reached_changes_nothing():
  labels = np.arange(500) % 10
  kwargs = dict(alpha=0.3, seed=3)
  for a, b in zip(
      partition.dirichlet(labels, 8, **kwargs),
      partition.dirichlet(labels, 8, cap=500, **kwargs),
  ):
    np.testing.assert_array_equal(a, b)


def test_shards_limit_the_classes():
  labels = np.arange(1000) % 10
  clients = partition.shards(labels, 10, shards_per_client=2, seed=0)
  assert max(len(np.unique(labels[rows])) for rows in clients) <= 4
  assert {len(rows) for rows in clients} == {100}


def test_quantity_skew_keeps_classes_and_skews_amounts():
  labels = np.arange(5000) % 2
  clients = partition.quantity_skew(labels, 8, alpha=0.3, seed=0)
  sizes = [len(rows) for rows in clients]
  assert max(sizes) > 5 * min(sizes)
  largest = clients[int(np.argmax(sizes))]
  assert 0.4 < labels[largest].mean() < 0.6


def test_matching_deals_out_by_the_clients_classes():
  labels, other = np.arange(400) % 4, np.arange(200) % 5
  clients = partition.shards(labels, 4, shards_per_client=1, seed=0)
  parts = partition.matching(labels, clients, other, seed=0)
  rows = np.concatenate(parts)
  assert len(rows) == len(set(rows.tolist())) == 160  # Nobody has class 4.
  for mine, theirs in zip(clients, parts):
    assert set(other[theirs]) == set(labels[mine])


@pytest.mark.parametrize(
    'call, message',
    [
        (lambda y: partition.iid(y, 0, seed=0), 'clients'),
        (lambda y: partition.iid(y, 101, seed=0), '101 clients'),
        (lambda y: partition.iid(y[:0], 2, seed=0), 'non-empty'),
        (lambda y: partition.dirichlet(y, 5, alpha=0.0, seed=0), 'alpha'),
        (lambda y: partition.dirichlet(y, 5, alpha=np.nan, seed=0), 'alpha'),
        (lambda y: partition.dirichlet(y, 5, alpha=1, seed=0, cap=19), 'at least 20'),
        (lambda y: partition.quantity_skew(y, 5, alpha=-1, seed=0), 'alpha'),
        (
            lambda y: partition.shards(y, 5, shards_per_client=0, seed=0),
            'shards_per_client',
        ),
        (
            lambda y: partition.dirichlet(
                y, 20, alpha=1e-3, seed=0, min_examples=5
            ),
            'No draw',
        ),
    ],
)
def test_bad_partitions_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call(np.arange(100) % 10)


def _rows(examples):
  return {e.tobytes() for e in examples.inputs}


def test_mnist5k_is_whole_and_disjoint():
  task = data.TASKS['mnist5k'].load(seed=3)
  parts = [task.clients, task.transfer, task.validation, task.test]
  assert [len(p) for p in parts] == [2500, 1000, 500, 1000]
  rows = [_rows(p) for p in parts]
  assert len(set.union(*rows)) == sum(len(r) for r in rows) == 5000
  labels = np.concatenate([p.labels for p in parts])
  np.testing.assert_array_equal(np.bincount(labels), [500] * 10)
  assert task.clients.inputs.shape[1:] == (28, 28, 1)
  assert task.clients.inputs.min() == 0.0 and task.clients.inputs.max() == 1.0
  other = data.TASKS['mnist5k'].load(seed=4)
  assert _rows(other.test) == _rows(task.test)
  assert _rows(other.transfer) != _rows(task.transfer)


def test_parts_that_leave_nothing_are_refused():
  with pytest.raises(ValueError, match='do not fit'):
    data.TASKS['mnist5k'].load(seed=0, transfer_size=4000)


def _idx(values):
  codes = {'u1': 8, 'i4': 12, 'f4': 13}
  code = codes[values.dtype.str[1:]]
  header = struct.pack(f'>BBBB{values.ndim}I', 0, 0, code, values.ndim, *values.shape)
  return header + values.astype(values.dtype.newbyteorder('>')).tobytes()


def _write_idx(folder, n_train=40, n_test=10, zipped=False):
  rng = np.random.default_rng(0)
  for split, n in (('train', n_train), ('t10k', n_test)):
    images = rng.integers(0, 256, (n, 4, 4)).astype('u1')
    labels = (np.arange(n) % 3).astype('u1')
    for name, values in (('images-idx3', images), ('labels-idx1', labels)):
      raw = _idx(values)
      path = folder / f'{split}-{name}-ubyte{".gz" if zipped else ""}'
      path.write_bytes(gzip.compress(raw) if zipped else raw)


@pytest.mark.parametrize('dtype', ['u1', '<i4', '<f4'])
@pytest.mark.parametrize('shape', [(5,), (3, 2, 2)])
def test_idx_round_trip(tmp_path, dtype, shape):
  values = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
  (tmp_path / 'a').write_bytes(_idx(values))
  (tmp_path / 'b.gz').write_bytes(gzip.compress(_idx(values)))
  for name in ('a', 'b.gz'):
    read = idx.read_idx(tmp_path / name)
    np.testing.assert_array_equal(read, values)
    assert read.dtype == values.dtype


@pytest.mark.parametrize('zipped', [False, True])
def test_idx_task(tmp_path, zipped):
  _write_idx(tmp_path, zipped=zipped)
  task = data.TASKS['idx'].load(
      data_dir=tmp_path, seed=0, transfer_size=8, validation_size=4
  )
  assert [
      len(p) for p in (task.clients, task.transfer, task.validation, task.test)
  ] == [28, 8, 4, 10]
  assert task.clients.inputs.shape[1:] == (4, 4, 1) and task.num_classes == 3
  assert 0.0 <= task.clients.inputs.min() < task.clients.inputs.max() <= 1.0


@settings(max_examples=40, deadline=None)
@given(keep=st.floats(0.0, 0.999))
@pytest.mark.parametrize('zipped', [False, True])
def test_a_truncated_file_is_named(tmp_path_factory, zipped, keep):
  path = tmp_path_factory.mktemp('idx') / 'broken-file'
  raw = _idx(np.arange(60, dtype='u1').reshape(5, 3, 4))
  raw = gzip.compress(raw) if zipped else raw
  path.write_bytes(raw[: int(keep * len(raw))])
  with pytest.raises(ValueError, match='broken-file'):
    idx.read_idx(path)


def test_damaged_folders_are_explained(tmp_path):
  with pytest.raises(ValueError, match='data_dir'):
    data.TASKS['idx'].load(data_dir=None, seed=0)
  with pytest.raises(ValueError, match='train-images'):
    data.TASKS['idx'].load(data_dir=tmp_path, seed=0)
  _write_idx(tmp_path)
  labels = tmp_path / 'train-labels-idx1-ubyte'
  labels.write_bytes(_idx(np.zeros(39, 'u1')))
  with pytest.raises(ValueError, match='as many images as labels') as error:
    data.TASKS['idx'].load(data_dir=tmp_path, seed=0)
  assert 'train-labels-idx1-ubyte' in str(error.value)


def test_client_dataset_is_seeded_and_complete():
  examples = data.Examples(
      np.arange(7, dtype='f')[:, None], np.arange(7, dtype='i4')
  )

  def labels(seed):
    dataset = data.client_dataset(examples, batch_size=3, epochs=2, seed=seed)
    return [y.tolist() for _, y in dataset.as_numpy_iterator()]

  first = labels([0, 1, 2])
  assert first == labels([0, 1, 2]) != labels([0, 2, 2])
  flat = sum(first, [])
  assert sorted(flat[:7]) == sorted(flat[7:]) == list(range(7))
  assert flat[:7] != flat[7:]
  assert [len(b) for b in first] == [3, 3, 3, 3, 2]
  empty = data.client_dataset(
      examples.take(np.zeros(0, int)), batch_size=3, epochs=2, seed=[0]
  )
  assert not list(empty)


def test_examples_are_pairs_or_triples():
  x, y, w = np.arange(6.0).reshape(3, 2), np.array([1, 0, 1]), np.array([1.0, 0.0, 2.0])
  pair, triple = data.Examples(x, y), data.Examples(x, y, w)
  assert len(pair) == len(triple) == 3 and len(tuple(triple)) == 3
  assert pair.sample_weight is None and triple.sample_weight is w
  inputs, labels, weights = triple.take([2, 0])
  np.testing.assert_array_equal(inputs, x[[2, 0]])
  np.testing.assert_array_equal(labels, [1, 1])
  np.testing.assert_array_equal(weights, [2.0, 1.0])
  assert triple.counted.tolist() == [True, False, True] and pair.counted.all()
  again = pickle.loads(pickle.dumps(triple))
  assert type(again) is data.Examples and again.sample_weight.tolist() == w.tolist()
  # A set of two or three examples is no batch of two or three parts.
  files = data.client_data.FileClientData.from_clients([triple, triple.take([0])])
  assert files.num_examples.tolist() == [3, 1]


def _weighted(n, weights=None, label=0):
  weights = np.ones(n, np.float32) if weights is None else np.float32(weights)
  return data.Examples(np.zeros((n, 2), np.float32), np.full(n, label), weights)


def _weighted_task(clients):
  return data.task_from_clients(
      'weighted', clients=clients, server=_weighted(9), seed=0, transfer_size=3,
      validation_size=3, students={}, teachers={}, num_classes=2,
  )


def test_a_tasks_examples_may_have_weights():
  padding = _weighted(5, np.zeros(5), label=-1)
  task = _weighted_task({'ada': _weighted(5, label=1), 'ben': padding})
  assert [its.shape.as_list() for its in task.input_spec] == [[None, 2], [None], [None]]
  for name, label, weight in (('ada', 1, 1.0), ('ben', -1, 0.0)):
    its = task.clients.take(task.client_rows[task.client_names.index(name)])
    assert (its.labels == label).all() and (its.sample_weight == weight).all()
  assert set(task.class_numbers(padding)) == {0}
  assert task.validation.sample_weight.tolist() == [1.0] * 3
  assert task.counted(task.clients).tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize('ignored, classes', [(-1, [0, 1, 0, 1]), (0, [0, 1, 0, 1])])
def test_labels_that_the_loss_ignores_do_not_count(ignored, classes):
  examples = data.Examples(np.zeros((4, 2)), np.array([ignored, 1, 0, 1]))
  windows = data.Examples(
      np.zeros((3, 2)), np.array([[ignored, 1], [ignored, ignored], [1, 1]]),
      np.array([1.0, 1.0, 0.0]),
  )
  loss_fn = helpers.loss_with(ignore_class=ignored)
  task = helpers.task(examples, num_classes=2, loss_fn=loss_fn)
  assert task.class_numbers(examples).tolist() == classes
  assert task.counted(examples).tolist() == [False, True, ignored == -1, True]
  assert task.counted(windows).tolist() == [True, False, False]
  # A client may have no example of the test part.
  for nothing in (examples.take([]), windows.take([])):
    assert task.counted(nothing).shape == nothing.counted.shape == (0,)


@pytest.mark.parametrize(
    'clients, message',
    [
        ([_weighted(5), data.Examples(*_weighted(5)[:2])], 'client 1 has none, and cli'),
        ([_weighted(5, [1, 1, 1, 1, -1])] * 2, '`clients`, must be finite and 0 or more'),
        ([_weighted(5, np.full(5, np.nan))] * 2, 'must be finite .* found nan'),
        ([_weighted(5, np.ones((5, 3)))] * 2, r'numbers \[8\], or .* \(8, 3\)'),
        ([_weighted(5, label=2)] * 2, 'part `clients`, must be from 0 to 1'),
    ],
)
def test_weights_that_do_not_fit_are_refused(clients, message):
  with pytest.raises(ValueError, match=message):
    _weighted_task(clients)


def test_a_task_without_examples_of_clients_is_refused():
  some = _weighted(3)
  with pytest.raises(ValueError, match='mine has no examples of clients'):
    helpers.task(some, clients=some.take([]), client_rows=None)
