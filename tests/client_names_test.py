"""A client's name stands for its number, everywhere."""

import numpy as np
import pytest

import tff_kd
from tests import helpers
from tff_kd.data import client_names
from tff_kd import evaluation
from tff_kd import simulation

_NAMES = ('ada', 'ben', 'cleo', '7')


@pytest.fixture(scope='module')
def data():
  return tff_kd.FileClientData.from_clients(
      {name: helpers.examples(6, seed) for seed, name in enumerate(_NAMES)}
  )


@pytest.fixture(scope='module')
def batches(data):
  return tff_kd.ClientBatches(data=data, batch_size=3, seed=0)


@pytest.fixture(scope='module')
def process(batches):
  return helpers.build('fed_avg', client_data=batches, input_spec=batches.element_spec)


def test_names_and_numbers():
  names = client_names.ClientNames(_NAMES)
  assert list(names) == list(_NAMES) and names[2] == 'cleo' and len(names) == 4
  assert names.numbers(['cleo', 0, np.int64(1), np.str_('7')]) == [2, 0, 1, 3]
  assert all(type(its) is int for its in names.numbers(np.arange(3)))


@pytest.mark.parametrize(
    'client, error, message',
    [
        ('dan', KeyError, "no client 'dan' among the 4; the first is 'ada'"),
        (4, ValueError, 'numbered from 0 to 3, found 4'),
        (-1, ValueError, 'numbered from 0 to 3, found -1'),
        (7, ValueError, "numbered from 0 to 3, and '7' by name, found 7"),
        (1.0, TypeError, 'must be a name or a number, found 1.0'),
        (True, TypeError, 'found True'),
    ],
)
def test_who_is_not_there(client, error, message):
  with pytest.raises(error, match=message):
    client_names.ClientNames(_NAMES).number(client)


def test_one_name_is_one_client():
  with pytest.raises(ValueError, match="name of its own, found '1' twice"):
    client_names.ClientNames([1, '1'])


def test_training_takes_names(data, process):
  """The round by names is the round by numbers, to the bit."""
  found = []
  for chosen in (['cleo', 'ada'], np.array(['cleo', 'ada']), [2, 0], np.array([2, 0])):
    result = simulation.train(
        process, select_clients=lambda _, chosen=chosen: chosen, num_rounds=1
    )
    found.append(result.state.global_model_weights)
    found.append(process.next(process.initialize(), chosen).state.global_model_weights)
  by_hand = process.next(process.initialize(), data.numbers(['cleo', 'ada']))
  for weights in found:
    helpers.assert_weights_close(
        weights, by_hand.state.global_model_weights, rtol=0, atol=0
    )
  with pytest.raises(KeyError, match="no client 'dan'"):
    simulation.train(process, select_clients=lambda _: ['dan'], num_rounds=1)
  with pytest.raises(ValueError, match='from 0 to 3, found 4'):
    simulation.train(process, select_clients=lambda _: [4], num_rounds=1)


def test_clients_states_by_name(data, batches, tmp_path):
  process = helpers.build('fd', client_data=batches, input_spec=batches.element_spec)
  states = simulation.ClientStates(
      process.initialize_client(), tmp_path / 'clients', names=data.names
  )
  simulation.train(
      process, select_clients=lambda _: ['ben', '7'], num_rounds=1, client_states=states
  )
  assert states.clients() == [1, 3]
  by_name, by_number = states.load(['ben']), states.load([1])
  helpers.assert_weights_close(by_name, by_number, rtol=0, atol=0)
  assert (tmp_path / 'clients').stat().st_mode & 0o777 == 0o700
  states.save(['cleo'], by_name, 2)
  helpers.assert_weights_close(states.load([2]), by_number, rtol=0, atol=0)
  (tmp_path / 'clients' / 'client-2-round-2.npz').write_bytes(b'')
  with pytest.raises(simulation.ClientStatesError, match="file of client 'cleo'"):
    states.load(['cleo'])
  with pytest.raises(KeyError, match="no client 'dan'"):
    states.load(['dan'])


def test_a_trace_by_name(data, tmp_path):
  path = tmp_path / 'trace.csv'
  path.write_text('client,first,last\nben,1,2\n2,2,2\n')
  by_file = simulation.Availability.from_csv(path, 4, data.names)
  by_hand = simulation.Availability({'ben': [(1, 2)], 2: [(2, 2)]}, data.names)
  for trace in (by_file, by_hand):
    participation = simulation.Participation(
        num_clients=4, clients_per_round=2, availability=trace
    )
    assert [sorted(participation(r)) for r in (1, 2, 3)] == [[1], [1, 2], []]
  path.write_text('client,first,last\ndan,1,2\n')
  with pytest.raises(ValueError, match="Line 2 of .* from 0 to 3, or .* such as 'ada'"):
    simulation.Availability.from_csv(path, 4, data.names)


def _participation(**kwargs):
  return simulation.Participation(num_clients=4, clients_per_round=2, **kwargs)


def test_participation_by_name_is_that_by_number(data):
  weights = {'cleo': 5.0, 'ada': 1.0, '7': 0.5, 'ben': 2.0}
  named = _participation(sampling='weighted', weights=weights, names=data.names)
  numbered = _participation(sampling='weighted', weights=np.array([1.0, 2.0, 5.0, 0.5]))
  by_number = _participation(sampling='weighted', weights=dict(enumerate([1, 2, 5, 0.5])))
  for round_num in range(1, 6):
    assert named(round_num) == numbered(round_num) == by_number(round_num)


@pytest.mark.parametrize(
    'cohort_fn', [
        {'ada': 1, 'ben': 0, 'cleo': 0, '7': 1}, lambda name: int(name in ('ada', '7')),
    ],
)
def test_cohorts_by_name(data, cohort_fn, tmp_path):
  chosen = _participation(sampling='cyclic', cohort_fn=cohort_fn, names=data.names)
  assert chosen(1) == [{'cohort': 1, 'data': 0}, {'cohort': 0, 'data': 1}]
  assert chosen(2) == [{'cohort': 0, 'data': 2}, {'cohort': 1, 'data': 3}]
  initial = (np.float32(0), np.float32(100))
  states = simulation.ClientStates(initial, tmp_path, cohort_fn, data.names)
  assert states.load(['ada', 'cleo', 3, 1]) == [100, 0, 100, 0]


def test_names_that_do_not_fit_are_refused(data, process, tmp_path):
  names, cohorts = data.names, {'ada': 1, 'ben': 0, 'cleo': 0}
  with pytest.raises(ValueError, match="`cohort_fn` must .* of them, such as '7'"):
    _participation(cohort_fn=cohorts, names=names)
  with pytest.raises(KeyError, match="no client 'dan'"):
    _participation(cohort_fn={**cohorts, 'dan': 1}, names=names)
  with pytest.raises(ValueError, match="`weights` has client 'ada' twice"):
    _participation(sampling='weighted', weights={'ada': 1.0, 0: 1.0}, names=names)
  with pytest.raises(ValueError, match='`names` must be of the 3 clients, found 4'):
    simulation.Participation(num_clients=3, clients_per_round=1, names=names)
  with pytest.raises(TypeError, match=r'a mapping .* found \[0, 1\]'):
    _participation(cohort_fn=[0, 1])
  with pytest.raises(TypeError, match='a function of a client'):
    simulation.ClientStates(np.float32(0), tmp_path, cohort_fn=1)
  states = simulation.ClientStates(np.zeros(2), tmp_path, cohorts, names)
  with pytest.raises(KeyError, match="no cohort for client '7'"):
    states.load(['7'])
  with pytest.raises(TypeError, match="needs `names`.*found client 'ada'"):
    simulation.Availability({'ada': [(1, 2)]})
  others = client_names.ClientNames(['ben', 'ada', 'cleo', '7'])
  with pytest.raises(ValueError, match='must have the `names` of the process'):
    simulation.train(
        process, select_clients=_participation(names=others), num_rounds=1
    )


def test_evaluation_by_name(batches, process):
  evaluator = evaluation.ClientsEvaluator(process.student_spec, metric='accuracy')
  weights = process.student_spec.initial_weights
  found = evaluator.evaluate(weights, {its: batches.dataset(its) for its in _NAMES})
  kernel, bias = weights.trainable
  expected = {}
  for seed, name in enumerate(_NAMES):
    x, y = helpers.examples(6, seed)
    expected[name] = np.mean((x @ kernel + bias).argmax(-1) == y)
  assert found.by_client == pytest.approx(expected)
  by_number = evaluator.evaluate(weights, [batches.dataset(k) for k in range(4)])
  assert list(by_number.by_client) == [0, 1, 2, 3]
  assert list(by_number.by_client.values()) == list(found.by_client.values())


def test_a_tasks_clients_have_names():
  clients = {
      name: tff_kd.data.Examples(*helpers.examples(6, seed))
      for seed, name in enumerate(_NAMES)
  }
  arguments = dict(
      server=tff_kd.data.Examples(*helpers.examples(9, 9)), seed=0, transfer_size=3,
      validation_size=3, students={}, teachers={}, num_classes=helpers.CLASSES,
  )
  task = tff_kd.data.task_from_clients('own', clients=clients, **arguments)
  assert task.client_names == list(_NAMES)
  unnamed = tff_kd.data.task_from_clients(
      'own', clients=list(clients.values()), **arguments
  )
  assert unnamed.client_names is None
  np.testing.assert_equal(unnamed.client_rows, task.client_rows)
  kept = {name: getattr(task, name) for name in task.__dataclass_fields__}
  with pytest.raises(ValueError, match='as many `client_names` as .* found 1 and'):
    tff_kd.data.Task(**kept | {'client_names': ['ada']})
  with pytest.raises(ValueError, match="found 'ada' twice"):
    tff_kd.data.Task(**kept | {'client_names': ['ada'] * 4})
