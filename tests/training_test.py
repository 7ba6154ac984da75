"""The training loop: convergence, the best state, resuming."""

import collections
import math

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
