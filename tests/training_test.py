"""The training loop: convergence, the best state, resuming."""

import collections
import math

import keras
import numpy as np
import pytest
from tff_kd.compat import tff

from tests import helpers
import tff_kd
from tff_kd import simulation


@pytest.fixture(scope='module')
def process():
  return tff_kd.algorithms.build_fed_avg(**helpers.common())


def _data(round_num):
  return [helpers.dataset(*helpers.examples(6, round_num))]


def _scripted(values):
  """An evaluation that returns a value a round."""
  return lambda state: {'score': [0.0, *values][int(state.round_num)]}


def test_stops_at_convergence_with_the_best_state(process):
  scores = [0.1, 0.5, 0.4, math.nan, 0.5, 0.6]
  result = simulation.train(
      process, select_clients=_data, num_rounds=6, evaluate=_scripted(scores),
      monitor='score', patience=3,
  )
  assert result.converged and result.round_num == 5 and result.best_round == 2
  assert result.state.round_num == 5 and result.best_state.round_num == 2
  assert len(result.history) == 5
  assert result.history[1]['score'] == 0.5
  assert result.history[0]['client_work/participation/num_clients'] == 1
  assert result.history[0][simulation.ROUND_SECONDS] > 0


def test_rounds_end_it_first(process):
  result = simulation.train(
      process, select_clients=_data, num_rounds=2,
      evaluate=_scripted([0.3, 0.2]), monitor='score', patience=3,
  )
  assert not result.converged and result.round_num == 2 and result.best_round == 1


def test_nothing_monitored_keeps_the_last(process):
  result = simulation.train(process, select_clients=_data, num_rounds=2)
  assert result.best_round == 2 and result.best_state is result.state


@pytest.mark.parametrize('rounds_per_saving', [1, 2])
def test_a_resumed_run_is_exact(process, tmp_path, rounds_per_saving):
  scores = [0.1, 0.5, 0.4, 0.2, 0.3]
  kwargs = dict(
      select_clients=_data, evaluate=_scripted(scores), monitor='score',
      rounds_per_saving=rounds_per_saving,
  )
  whole = simulation.train(process, num_rounds=5, **kwargs)
  files = dict(
      program_state_manager=tff.program.FileProgramStateManager(
          tmp_path, keep_total=2, keep_first=False
      ),
      release_managers=[
          tff.program.CSVFileReleaseManager(
              tmp_path / 'metrics.csv', key_fieldname='round'
          )
      ],
  )
  calls = []

  def fails_in_round_4(round_num):
    calls.append(round_num)
    if round_num == 4:
      raise RuntimeError('killed')
    return _data(round_num)

  with pytest.raises(RuntimeError, match='killed'):
    simulation.train(
        process, num_rounds=5, **files, **{**kwargs, 'select_clients': fails_in_round_4}
    )
  resumed = simulation.train(process, num_rounds=5, **files, **kwargs)
  assert len(resumed.history) == 5 - (3 if rounds_per_saving == 1 else 2)
  assert resumed.best_round == whole.best_round == 2
  helpers.assert_weights_close(resumed.state, whole.state, rtol=0)
  helpers.assert_weights_close(resumed.best_state, whole.best_state, rtol=0)
  lines = (tmp_path / 'metrics.csv').read_text().splitlines()
  assert len(lines) == 1 + 5
  finished = simulation.train(process, num_rounds=5, **files, **kwargs)
  assert finished.history == [] and finished.best_round == 2


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(num_rounds=0), 'num_rounds'),
        (dict(patience=2), 'monitor'),
        (dict(patience=0, monitor='score'), 'patience'),
        (dict(monitor='scores'), "one of .*'client_work/train/loss'.*'score'"),
    ],
)
def test_bad_arguments_are_refused(process, kwargs, message):
  with pytest.raises(ValueError, match=message):
    simulation.train(
        process,
        **{
            'select_clients': _data, 'num_rounds': 1,
            'evaluate': _scripted([0.1]), **kwargs,
        },
    )


def test_the_process_own_metrics_can_be_monitored(process):
  result = simulation.train(
      process, select_clients=_data, num_rounds=1,
      monitor='client_work/train/accuracy',
  )
  assert result.best_round == 1


def test_flatten_metrics():
  nested = collections.OrderedDict(x={'y': 1, 'z': ()}, w=np.float32(2))
  assert simulation.flatten_metrics(nested) == {'x/y': 1, 'w': 2.0}


@pytest.mark.parametrize(
    'change, message',
    [
        (
            dict(client_optimizer=helpers.sgd(0.2)),
            'client_work/learning_rate: 0.1.* there, 0.2.* here',
        ),
        (
            dict(loss_fn=lambda: keras.losses.SparseCategoricalCrossentropy(
                from_logits=True, ignore_class=2
            )),
            'loss of the student: .*None.* there, .*2.* here',
        ),
        (dict(student_fn=helpers.dense_fn((4,))), 'arrays'),
        (dict(student_fn=helpers.dense_fn(classes=4)), r'shape \(5, 3\), \(5, 4\) is'),
    ],
)
def test_what_another_process_saved_is_named_and_stays(
    process, tmp_path, change, message
):
  kwargs = dict(
      select_clients=_data, program_state_manager=simulation.Checkpoints(tmp_path)
  )
  simulation.train(process, num_rounds=1, **kwargs)
  other = tff_kd.algorithms.build_fed_avg(**helpers.common(**change))
  with pytest.raises(simulation.CheckpointError, match=message):
    simulation.train(other, num_rounds=2, **kwargs)
  resumed = simulation.train(process, num_rounds=2, **kwargs)
  assert len(resumed.history) == 1


def test_clients_that_do_not_count_are_warned_of(process, caplog):
  x, y = helpers.examples(6, 0)
  bad = helpers.dataset(x, np.full(6, helpers.CLASSES, np.int32))
  with caplog.at_level('WARNING'):
    simulation.train(process, select_clients=lambda _: [bad], num_rounds=1)
  assert 'includes no client (excluded bad labels: 1)' in caplog.text
  caplog.clear()
  with caplog.at_level('WARNING'):
    result = simulation.train(
        process, select_clients=lambda _: [bad, helpers.dataset(x, y)], num_rounds=1
    )
  assert 'leaves out clients (excluded bad labels: 1)' in caplog.text
  assert simulation.left_out(result.history[0]) == {'excluded bad labels': 1}


def test_an_evaluation_that_tells_its_names_is_not_called_to_see_them(process):
  class Evaluation:
    metric_names = ['score']
    rounds = []

    def __call__(self, state):
      self.rounds.append(int(state.round_num))
      return {'score': 1.0}

  simulation.train(
      process, select_clients=_data, num_rounds=1, evaluate=Evaluation(), monitor='score'
  )
  assert Evaluation.rounds == [1]


def test_clients_may_be_chosen_by_numpy():
  batches = tff_kd.ClientBatches(
      data=tff_kd.FileClientData.from_clients([helpers.examples(6, k) for k in range(3)]),
      batch_size=3,
  )
  process = tff_kd.algorithms.build_fed_avg(**helpers.common(client_data=batches))
  for selected in (np.array([2, 0]), [np.int64(2), np.int32(0)], (2, 0)):
    result = simulation.train(
        process, select_clients=lambda _, its=selected: its, num_rounds=1
    )
    assert result.history[0]['client_work/train/num_examples'] == 12
