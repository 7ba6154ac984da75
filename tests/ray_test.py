"""A round on Ray equals one in this process to the bit; what fails says where."""

import importlib.util

import numpy as np
import pytest
import tensorflow as tf

from tests import helpers
from tests import ray_stand_in
from tests import runtimes_test
import tff_kd
from tff_kd import graphs
from tff_kd.compat import tff

pytest.importorskip('ray', reason='pip install --require-hashes -r requirements-ray.txt')

_NUM_CLIENTS = 20  # Three groups, of which the last one is not full.


@pytest.fixture(scope='module')
def many():
  clients = [helpers.examples(3 + 5 * k % 7, k) for k in range(_NUM_CLIENTS)]
  return helpers.batches(clients, num_epochs=2, seed=0)


@pytest.fixture(scope='module', params=['stand-in', helpers.slow('ray')])
def on_ray(request):
  """Two workers of Ray, whose start takes a minute; or what does their work here."""
  if request.param == 'stand-in':
    with ray_stand_in.context(num_workers=2) as context:
      yield context
    return
  with tff_kd.runtime.ray(
      num_workers=2, resources={'CPU': 0.25}, start_timeout_s=helpers.HANGING_S
  ) as context:
    yield context


@helpers.shared
def two_rounds(name, data):
  """An algorithm's process, and two rounds of it in this process."""
  process = runtimes_test.build(name, data)
  with tff_kd.runtime.in_process():
    return process, rounds(process)


def rounds(process):
  """All that two rounds give, with what clients keep."""
  return helpers.rounds(process, list(range(_NUM_CLIENTS)))


def assert_same_bits(found, expected):
  tf.nest.assert_same_structure(found, expected)
  for a, b in zip(tf.nest.flatten(found), tf.nest.flatten(expected)):
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert a.tobytes() == b.tobytes()


def test_two_workers_give_the_bits_of_this_process(on_ray, many):
  process, here = two_rounds('fed_distillation', many)
  assert_same_bits(rounds(process), here)


def test_clients_values_come_back_and_datasets_go_there(on_ray):
  ids = tff.FederatedType(np.int32, tff.CLIENTS)

  @tff.tensorflow.computation(tff.SequenceType(np.int64), np.int32)
  def spread(examples, shift):
    values = examples.map(lambda x: x + tf.cast(shift, tf.int64))
    return values.reduce(np.int64(0), lambda x, y: x + y), tf.strings.as_string(shift)

  @tff.federated_computation(
      tff.FederatedType(tff.SequenceType(np.int64), tff.CLIENTS), ids
  )
  def each(examples, shifts):
    return tff.federated_map(spread, (examples, shifts))

  data = [tf.data.Dataset.range(k) for k in range(11)]
  shifts = list(range(11))
  found = each(data, shifts)
  with tff_kd.runtime.in_process():
    expected = each(data, shifts)
  assert [(int(a), b) for a, b in found] == [(int(a), b) for a, b in expected]
  assert found[2][1] == b'2'


def test_no_clients_are_a_sum_of_none(on_ray):

  @tff.federated_computation(tff.FederatedType(np.float32, tff.CLIENTS))
  def total(values):
    return tff.federated_sum(values)

  assert total([]) == 0.0


def test_an_error_names_the_client(on_ray):

  @graphs.computation(np.int32)  # Which knows where its operations were made.
  def check(x):
    with tf.control_dependencies([tf.debugging.assert_less(x, 30, 'too large')]):
      return tf.identity(x)

  @tff.federated_computation(tff.FederatedType(np.int32, tff.CLIENTS))
  def total(values):
    return tff.federated_sum(tff.federated_map(check, values))

  with pytest.raises(
      tff_kd.runtime.ComputationError,
      match=r'Client 9 of the 12 in this round, with the argument \[42\], failed: .*',
  ) as raised:
    total([*range(9), 42, 1, 2])
  assert 'too large' in str(raised.value)
  assert 'ray_test.py' in str(raised.value)
  assert total([1, 2, 3]) == 6  # And the workers go on.


def test_a_file_that_a_node_lacks_is_named_with_the_node(on_ray, tmp_path):
  path = tmp_path / 'examples.raw'

  @tff.tensorflow.computation(np.float32)
  def read(x):
    values = tf.raw_ops.ImmutableConst(
        dtype=tf.float32, shape=[2], memory_region_name=str(path)
    )
    return x + tf.reduce_sum(values)

  @tff.federated_computation(tff.FederatedType(np.float32, tff.CLIENTS))
  def total(values):
    return tff.federated_sum(tff.federated_map(read, values))

  with pytest.raises(
      tff_kd.runtime.ComputationError, match=f'on the node .*: .*{path} .*cache_dir'
  ):
    total([1.0])
  path.write_bytes(np.ones(2, np.float32).tobytes())
  assert total([1.0]) == 3.0


def test_a_python_dataset_is_refused(on_ray):

  @tff.tensorflow.computation(tff.SequenceType(np.int32))
  def count(examples):
    return examples.reduce(0, lambda x, _: x + 1)

  @tff.federated_computation(
      tff.FederatedType(tff.SequenceType(np.int32), tff.CLIENTS)
  )
  def total(examples):
    return tff.federated_sum(tff.federated_map(count, examples))

  data = tf.data.Dataset.from_generator(
      lambda: iter([1, 2]), output_signature=tf.TensorSpec([], tf.int32)
  )
  with pytest.raises(TypeError, match='from_generator.*cannot be sent'):
    total([data])


@pytest.mark.slow
def test_the_script_has_the_same_rounds(tmp_path):
  tables = []
  for name, flags in {
      'here': (), 'ray': ('--ray_address=local', '--ray_resources=CPU=0.25')
  }.items():
    folder = tmp_path / name
    helpers.train_here(
        *helpers.TINY_RUN, '--rounds=2', f'--output_dir={folder}',
        f'--cache_dir={tmp_path}/cache', *flags,
    )
    rows = helpers.rows(folder / 'metrics.csv')
    for row in rows:
      del row['round_seconds']
    tables.append(rows)
  assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'address': 'ray://head:10001'}, "`address` must be .*'ray://head:10001'"),
        ({'address': 'head'}, "`address` must be .*'head'"),
        ({'num_workers': 0}, '`num_workers` must be a positive integer .* found 0'),
        ({'num_workers': True}, '`num_workers` .* found True'),
        ({'resources': {'GPU': 0}}, '`resources` must name positive amounts'),
        ({'resources': {}}, '`resources` must name positive amounts'),
        ({'silence_s': 0}, '`silence_s` must be above 0 seconds, found 0'),
        ({'start_timeout_s': -1.0}, '`start_timeout_s` must be above 0 seconds'),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    with tff_kd.runtime.ray(**arguments):
      pass


def test_without_ray_the_error_says_how_to_install_it(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ImportError, match='pip install ray'):
    with tff_kd.runtime.ray():
      pass
