"""What a round is given for its clients: taken, or refused in a sentence before it."""

from concurrent import futures

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import helpers
import tff_kd

_CLIENTS = [helpers.examples(n, n) for n in (6, 4, 5)]


@pytest.fixture(scope='module')
def batches():
  return helpers.batches(_CLIENTS, shuffle=False)


@pytest.fixture(scope='module')
def by_number(batches):
  keras.utils.set_random_seed(0)
  return helpers.build('fed_avg', client_data=batches)


@pytest.fixture(scope='module')
def by_dataset():
  return helpers.fed_avg()


def _datasets(numbers=(0, 1, 2)):
  return [helpers.dataset(*_CLIENTS[k]) for k in numbers]


def _weights(process, clients):
  return process.next(process.initialize(), clients).state.global_model_weights


@pytest.mark.parametrize(
    'clients',
    [
        np.array([0, 2]), np.array([0, 2], np.int64), tf.constant([0, 2]), (0, 2),
        range(0, 3, 2), [np.int64(0), np.uint8(2)], [np.array(0), tf.constant(2)],
    ],
)
def test_numbers_in_every_form(by_number, by_dataset, clients):
  helpers.assert_weights_close(
      _weights(by_number, clients), _weights(by_dataset, _datasets((0, 2))), rtol=1e-6
  )
  state = by_number.initialize()
  helpers.assert_weights_close(
      by_number.next(state=state, client_data=clients).state,
      by_number.next(state, [0, 2]).state, rtol=0,
  )


@pytest.mark.parametrize(
    ('clients', 'error', 'message'),
    [
        ([0, 3], ValueError, 'Client 1 of the round must be an integer from 0 to 2.*3'),
        ([-1], ValueError, 'Client 0 .* from 0 to 2, found -1'),
        (['eve'], KeyError, "no client 'eve' among the 3"),
        ([1.0], TypeError, 'must be an integer from 0 to 2, found 1.0'),
        ([True], TypeError, 'must be an integer .* found True'),
        ([None], TypeError, 'must be an integer .* found None'),
        (np.array([0.0]), TypeError, 'must be an integer'),
        (np.array([[0], [1]]), TypeError, 'must be a list .* found a ndarray of 2'),
        (2, TypeError, r'must be a list with one element a client, found 2'),
        ('012', TypeError, "must be a list .* found '012'"),
        ({0, 1}, TypeError, 'must be a list'),
        ([(0, 1)], TypeError, r'must be an integer .* found \(0, 1\)'),
        (_datasets()[:1], TypeError, 'is a dataset, and this process takes numbers'),
        ([{'data': 1}], TypeError, 'must be an integer'),
    ],
)
def test_what_is_no_number_of_a_client(by_number, clients, error, message):
  with pytest.raises(error, match=f'(?s){message}'):
    by_number.next(by_number.initialize(), clients)


def test_a_name_is_a_client(by_number):
  helpers.assert_weights_close(
      _weights(by_number, ['2', '0']), _weights(by_number, [2, 0]), rtol=0
  )


_X, _Y = _CLIENTS[0]


@pytest.mark.parametrize(
    ('clients', 'message'),
    [
        ([3], 'is the number 3, and this process takes datasets'),
        ([np.int32(3)], 'is the number 3, and this process takes datasets'),
        (_datasets()[0], 'must be a list with one element a client'),
        ([(_X, _Y)], 'must be a batched `tf.data.Dataset`, found a tuple of 2'),
        ([{'x': _X, 'y': _Y}], 'must be a batched .* found a dict of 2'),
        ([_X], 'must be a batched .* found a ndarray of 6'),
        (['client'], "must be a batched .* found 'client'"),
        ([list(zip(_X, _Y))], 'single examples: batch them'),
        (
            [tf.data.Dataset.from_tensor_slices((_X, _Y))],
            'single examples: batch them, .*batch',
        ),
        (
            [tf.data.Dataset.from_tensor_slices(_X).batch(4)],
            'must have batches like .* the `input_spec`, found',
        ),
        ([helpers.dataset(_X, _Y.astype(np.int64))], 'int32.*found .*int64'),
        ([helpers.dataset(_X[:, :3], _Y)], r'Client 0 .*\(None, 5\).*\(None, 3\)'),
        (
            [tf.data.Dataset.from_tensors((_X, _Y, np.ones(6, np.float32)))],
            'must have batches like',
        ),
    ],
)
def test_what_is_no_clients_dataset(by_dataset, clients, message):
  with pytest.raises(TypeError, match=f'(?s){message}'):
    by_dataset.next(by_dataset.initialize(), clients)


def test_a_list_of_batches_is_a_dataset(by_dataset):
  batches = [(_X[:4], _Y[:4]), (_X[4:], _Y[4:])]
  helpers.assert_weights_close(
      _weights(by_dataset, [batches]), _weights(by_dataset, _datasets([0])), rtol=0
  )


@pytest.mark.parametrize('known', ['nothing', 'dtypes', 'ranks', 'all'])
def test_generators(by_dataset, known):
  def batches():
    for start in (0, 4):
      yield _X[start : start + 4], _Y[start : start + 4]

  shapes = {'ranks': ([None, None], [None]), 'all': ([None, helpers.DIM], [None])}
  x, y = shapes.get(known, (None, None))
  signature = (tf.TensorSpec(x, tf.float32), tf.TensorSpec(y, tf.int32))
  if known == 'nothing':
    dataset = tf.data.Dataset.from_generator(
        batches, output_types=(tf.float32, tf.int32)
    )
  else:
    dataset = tf.data.Dataset.from_generator(batches, output_signature=signature)
  helpers.assert_weights_close(
      _weights(by_dataset, [dataset]),
      _weights(by_dataset, _datasets([0])), rtol=0,
  )
  # Their examples, one at a time, in batches.
  single = tf.data.Dataset.from_generator(
      lambda: zip(_X, _Y), output_signature=(
          tf.TensorSpec([None], tf.float32), tf.TensorSpec([], tf.int32)
      ),
  )
  helpers.assert_weights_close(
      _weights(by_dataset, [single.shuffle(1).batch(4)]),
      _weights(by_dataset, _datasets([0])), rtol=0,
  )


def test_a_generator_whose_shapes_are_others(by_dataset):
  dataset = tf.data.Dataset.from_generator(
      lambda: [(_X[:, :3], _Y)], output_types=(tf.float32, tf.int32)
  )
  with pytest.raises(tff_kd.runtime.ComputationError, match=r'(?s)Client 1 .*\[6,3\]'):
    _weights(by_dataset, [*_datasets([0]), dataset])


def test_a_spec_without_ranks_is_refused():
  dataset = tf.data.Dataset.from_generator(
      lambda: [(_X, _Y)], output_types=(tf.float32, tf.int32)
  )
  with pytest.raises(ValueError, match='how many dimensions .*`output_signature`'):
    helpers.build('fed_avg', input_spec=dataset.element_spec)


def test_keys_in_another_order():
  x, y = _CLIENTS[0]
  w = np.ones(len(y), np.float32)
  parts = {'y': y, 'x': x, 'sample_weight': w}
  dataset = tf.data.Dataset.from_tensor_slices(parts).batch(4)
  process = helpers.build('fed_avg', input_spec=dataset.element_spec)
  batches = helpers.batches([parts], shuffle=False)
  helpers.assert_weights_close(
      _weights(process, [dataset]), _weights(process, [batches.dataset(0)]), rtol=0
  )


@pytest.mark.parametrize('kind', ['by_number', 'by_dataset'])
def test_rounds_in_other_threads(kind, request):
  process = request.getfixturevalue(kind)
  clients = [0, 2] if kind == 'by_number' else _datasets((0, 2))
  with futures.ThreadPoolExecutor(3) as pool:
    found = list(pool.map(lambda _: _weights(process, clients), range(3)))
  for weights in found:
    helpers.assert_weights_close(weights, _weights(process, clients), rtol=0)


def test_participation_of_clients_that_are_not_there(by_number, by_dataset):
  def train(process, num_clients):
    return tff_kd.simulation.train(
        process, num_rounds=1,
        select_clients=tff_kd.simulation.Participation(
            num_clients=num_clients, clients_per_round=2
        ),
    )

  assert train(by_number, 3).round_num == 1
  with pytest.raises(ValueError, match='num_clients=4, .* data of 3 clients. Lower it'):
    train(by_number, 4)
  with pytest.raises(ValueError, match='takes datasets. Build it with `client_data=`'):
    train(by_dataset, 3)


@pytest.fixture(scope='module')
def reporting(batches):
  return helpers.build(
      'fed_avg', client_data=batches,
      reporting=tff_kd.Reporting(max_delay=1, min_reports=2),
  )


@pytest.mark.parametrize(
    ('kind', 'kwargs', 'message'),
    [
        ('by_number', dict(dropout_after=0.5), r'Build it with `reporting=.*max_delay=0'),
        ('by_number', dict(delay_share=0.5, max_delay=3), r'Reporting\(max_delay=3\)'),
        ('reporting', {}, 'Set its `gives_conditions=True`'),
        (
            'reporting', dict(delay_share=0.5, max_delay=3),
            'max_delay=3, and the `Reporting` of the process max_delay=1',
        ),
    ],
)
def test_participation_with_other_conditions(kind, kwargs, message, request):
  chosen = tff_kd.simulation.Participation(num_clients=3, clients_per_round=2, **kwargs)
  with pytest.raises(ValueError, match=message):
    tff_kd.simulation.train(
        request.getfixturevalue(kind), select_clients=chosen, num_rounds=1
    )


def test_rounds_with_too_few_reports(reporting, caplog):
  def train(clients_per_round, **kwargs):
    return tff_kd.simulation.train(
        reporting, num_rounds=4, progress_bar=False,
        select_clients=tff_kd.simulation.Participation(
            num_clients=3, clients_per_round=clients_per_round, gives_conditions=True,
            **kwargs,
        ),
    )

  with pytest.raises(ValueError, match='min_reports=2, and a round .* 1 reports at most'):
    train(1)
  with caplog.at_level('WARNING'):
    result = train(2, dropout_after=1.0)
  assert [row['round_skipped'] for row in result.history] == [1] * 4
  said = [its for its in caplog.messages if 'is skipped: the reports of 0 clients' in its]
  assert len(said) == len(caplog.messages) == 3


def test_conditions_that_a_process_does_not_take(by_number):
  client = {'data': 0, 'conditions': tff_kd.ClientConditions()}
  with pytest.raises(ValueError, match='Client 1 of .* has conditions, .*`reporting='):
    by_number.next(by_number.initialize(), [0, client])


@pytest.fixture(scope='module')
def of_states(batches):
  """FD of two cohorts, whose clients keep their models."""
  keras.utils.set_random_seed(0)
  return helpers.build(
      'fd', client_data=batches, student_fn=[helpers.dense_fn(), helpers.dense_fn((4,))]
  )


def test_states_of_the_clients(of_states):
  server, new = of_states.initialize(), of_states.initialize_client()
  clients = [{'cohort': k, 'data': k} for k in (0, 1)]
  output = of_states.next(server, clients, list(new))
  for arguments in (
      dict(client_states=output.client_states),
      dict(client_data=clients, client_states=output.client_states),
  ):
    positional = () if 'client_data' in arguments else (clients,)
    assert of_states.next(output.state, *positional, **arguments).state.round_num == 2
  for states, error, message in (
      (None, TypeError, 'needs the states .*, found None. Pass `client_states.load'),
      (new[0], TypeError, 'needs the states .*, found a ClientState of 3'),
      (new[:1], ValueError, 'one state for each of the 2 clients .*, found 1. Pass'),
      (new[::-1], ValueError, r'client 0 .* of its cohort, 0, .*_client\(\)\[0\]'),
      ([new] * 2, ValueError, 'state of client 0 of the round must be of its cohort, 0'),
  ):
    with pytest.raises(error, match=message):
      of_states.next(server, clients, *([] if states is None else [states]))


def test_a_training_with_other_client_states(of_states, by_number, tmp_path):
  initial = of_states.initialize_client()

  def states(initial, cohort_fn=None):
    return tff_kd.simulation.ClientStates(initial, tmp_path, cohort_fn)

  for process, client_states, message in (
      (of_states, None, 'pass `client_states=tff_kd.simulation.ClientStates'),
      (by_number, states(initial), 'keep nothing .* leave `client_states` out'),
      (of_states, states(initial), ' 2, found 1. Build .* with the `cohort_fn` of'),
  ):
    with pytest.raises(ValueError, match=message):
      tff_kd.simulation.train(
          process, select_clients=lambda _: [0], num_rounds=1, progress_bar=False,
          client_states=client_states,
      )
  result = tff_kd.simulation.train(
      of_states, select_clients=lambda _: [{'cohort': 1, 'data': 0}], num_rounds=1,
      client_states=states(initial, lambda _: 1), progress_bar=False,
  )
  assert result.round_num == 1


def test_cohorts_and_conditions(batches):
  process = helpers.build(
      'fed_df', student_fn=[helpers.dense_fn(), helpers.dense_fn((4,))],
      client_data=batches, reporting=tff_kd.Reporting(),
      transfer_set=tff_kd.TransferSet(_X),
      distillation=tff_kd.Distillation(num_steps=1, batch_size=4),
  )
  conditions = tff_kd.simulation.Participation(
      num_clients=3, clients_per_round=1, cohort_fn=lambda _: 1, gives_conditions=True
  )(1)[0]['conditions']
  client = {'cohort': np.int64(1), 'data': np.int32(2), 'conditions': conditions}
  state = process.initialize()
  assert process.next(state, [client]).state.round_num == 1
  for change, error, message in (
      ({'cohort': 2}, ValueError, 'cohort of client 0 .* from 0 to 1, found 2'),
      ({'cohort': 'a'}, TypeError, "cohort of client 0 .* found 'a'"),
      ({'data': 3}, ValueError, 'Client 0 of the round .* from 0 to 2, found 3'),
      ({'other': 1}, ValueError, r"keys \['cohort', 'data', 'conditions'\]"),
  ):
    with pytest.raises(error, match=message):
      process.next(state, [{**client, **change}])
  with pytest.raises(ValueError, match='must be a dict with the keys .*, found 1'):
    process.next(state, [1])


def test_a_private_round_has_a_client_once(batches):
  process = helpers.build(
      'fed_avg', client_data=batches, reporting=tff_kd.Reporting(),
      client_weighting=tff_kd.tff.learning.ClientWeighting.UNIFORM,
      privacy=tff_kd.privacy.DifferentialPrivacy(
          noise_multiplier=1.0, clients_per_round=2, model_clip=1.0
      ),
  )
  clients = tff_kd.simulation.Participation(
      num_clients=3, clients_per_round=3, gives_conditions=True
  )(1)
  state = process.initialize()
  assert process.next(state, clients).state.round_num == 1
  with pytest.raises(ValueError, match=r"once only, found \['.'\] more .* client once"):
    process.next(state, [*clients, clients[1]])


@pytest.mark.parametrize(
    ('examples', 'message'),
    [
        ((_X, np.array(['a'] * 6)), 'found labels of the dtype <U1. Encode them'),
        ((_X, [[1, 2], [3]] * 3), 'A list of 6 is not an array: its rows have different'),
        ((_X, _Y[:4]), r"client '0' must have one row an example, .* \[4, 6\] rows"),
        ((_X, 1), 'one row an example'),
        (list(zip(_X, _Y)), 'found a list of 6. Put single examples together'),
        ([np.array(['a'] * 6), _Y], 'found inputs of the dtype .* Encode the inputs'),
        ((_X, _Y, np.array(['1'] * 6)), 'found sample weights of the dtype'),
        ((_X, _Y, -np.ones(6)), 'must not be negative, found -1.0'),
    ],
)
def test_examples_that_are_not_written_to_files(examples, message):
  with pytest.raises(ValueError, match=message):
    tff_kd.FileClientData.from_clients([examples])


def test_lists_are_arrays():
  x, y = _CLIENTS[0]
  data = tff_kd.FileClientData.from_clients([(x.tolist(), y.tolist())])
  assert data.num_examples == [6] and len(data.element_spec) == 2
  assert data.element_spec[0].shape.as_list() == [None, helpers.DIM]
