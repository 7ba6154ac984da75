"""Trackers: what reaches MLflow and Weights & Biases, by stand-ins and by themselves."""

import importlib.machinery
import json
import math
import os
import shlex
import sys
import types

import numpy as np
import pytest

from pipelines import train_evaluation
from tests import helpers
from tff_kd import simulation
from tff_kd.simulation import trackers


@pytest.fixture(scope='module')
def process():
  return helpers.fed_avg()


def _train(process, num_rounds=2, **kwargs):
  return simulation.train(
      process, select_clients=lambda _: [helpers.dataset(*helpers.examples(6, 0))],
      num_rounds=num_rounds, progress_bar=False, **kwargs,
  )


def _stand_in(monkeypatch, name, **attributes):
  module = types.ModuleType(name)
  module.__spec__ = importlib.machinery.ModuleSpec(name, None)
  vars(module).update(attributes)
  monkeypatch.setitem(sys.modules, name, module)


class _MlflowClient:
  """What is logged, in the order of calls, by all clients."""

  calls = []

  def __init__(self, tracking_uri):
    self.calls.append(('client', tracking_uri))

  def get_experiment_by_name(self, name):
    known = [call for call in self.calls if call == ('experiment', name)]
    return types.SimpleNamespace(experiment_id='7') if known else None

  def create_experiment(self, name):
    self.calls.append(('experiment', name))
    return '7'

  def create_run(self, experiment_id, run_name):
    self.calls.append(('run', experiment_id, run_name))
    return types.SimpleNamespace(info=types.SimpleNamespace(run_id='id'))

  def log_batch(self, run_id, metrics=(), params=()):
    assert run_id == 'id' and len(params) <= 100
    for key, value in params:
      self.calls.append(('param', key, value))
    for key, value, _, step in metrics:
      self.calls.append((step, key, value))

  def update_run(self, run_id, status):
    self.calls.append((run_id, status))

  set_terminated = update_run


@pytest.fixture
def mlflow_calls(monkeypatch):
  _stand_in(
      monkeypatch, 'mlflow', MlflowClient=_MlflowClient,
      entities=types.SimpleNamespace(
          Param=lambda *its: its, Metric=lambda *its: its
      ),
  )
  _MlflowClient.calls = []
  return _MlflowClient.calls


def _mlflow(**kwargs):
  return simulation.MLflowTracker(experiment='tests', run_name='mine', **kwargs)


def test_mlflow_gets_parameters_and_metrics(process, mlflow_calls, tmp_path):
  params = {'rate': 0.1, **{f'p{i}': i for i in range(150)}}
  files = dict(program_state_manager=simulation.Checkpoints(tmp_path))
  tracker = _mlflow(params=params, tracking_uri='uri')
  result = _train(process, callbacks=[tracker], **files)
  assert mlflow_calls[:3] == [
      ('client', 'uri'), ('experiment', 'tests'), ('run', '7', 'mine')
  ]
  assert ('param', 'rate', '0.1') in mlflow_calls
  assert sum(its[0] == 'param' for its in mlflow_calls) == 151
  name = 'client_work/train/loss'
  assert [its for its in mlflow_calls if its[1] == name] == [
      (round_num, name, pytest.approx(row[name]))
      for round_num, row in enumerate(result.history, 1)
  ]
  assert mlflow_calls[-1] == ('id', 'FINISHED')
  # A resumed training goes on with the run.
  del mlflow_calls[3:]
  _train(process, 3, callbacks=[_mlflow()], **files)
  assert mlflow_calls[3:5] == [('client', None), ('id', 'RUNNING')]
  assert {its[0] for its in mlflow_calls[5:-1]} == {3}


@pytest.mark.parametrize(
    'error, status', [(KeyboardInterrupt, 'KILLED'), (RuntimeError, 'FAILED')]
)
def test_mlflow_is_told_how_it_ended(process, mlflow_calls, error, status):
  class Ends(simulation.Callback):

    def on_round_end(self, training, metrics):
      raise error

  try:
    _train(process, callbacks=[_mlflow(), Ends()])
  except RuntimeError:
    pass
  assert mlflow_calls[-1] == ('id', status)


class _WandbRun:

  def __init__(self, calls, **kwargs):
    self.id, self._calls = kwargs.get('id') or 'made', calls
    calls.append(kwargs)

  def log(self, metrics, step):
    self._calls.append((step, metrics))

  def finish(self, exit_code):
    self._calls.append(exit_code)


def test_wandb_gets_its_configuration_and_metrics(process, monkeypatch, tmp_path):
  calls = []
  _stand_in(monkeypatch, 'wandb', init=lambda **kwargs: _WandbRun(calls, **kwargs))
  arguments = dict(project='tests', config={'a': 1}, directory=tmp_path, mode='offline')
  files = dict(program_state_manager=simulation.Checkpoints(tmp_path / 'checkpoints'))
  result = _train(process, callbacks=[simulation.WandbTracker(**arguments)], **files)
  assert calls[0] == dict(
      project='tests', name=None, config={'a': 1}, mode='offline', dir=str(tmp_path)
  )
  assert calls[1] == (1, trackers.numbers_of(result.history[0])) and calls[-1] == 0
  del calls[:]
  _train(process, 3, callbacks=[simulation.WandbTracker(**arguments)], **files)
  assert (calls[0]['id'], calls[0]['resume'], calls[1][0]) == ('made', 'allow', 3)


def test_single_numbers_are_logged():
  found = trackers.numbers_of(
      {'a': np.float32(0.5), 'b': 2, 'c': True, 'd': np.zeros(2), 'e': 'x', 'f': math.inf}
  )
  assert found == {'a': 0.5, 'b': 2.0, 'c': 1.0, 'f': math.inf}


@pytest.mark.parametrize(
    'make', [lambda: _mlflow(), lambda: simulation.WandbTracker(project='tests')]
)
def test_a_library_that_is_missing_is_named(make, monkeypatch):
  monkeypatch.setattr(trackers.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ImportError, match='needs the package (mlflow|wandb).*pip install'):
    make()


def test_mlflow_itself(process, tmp_path, monkeypatch):
  mlflow = pytest.importorskip('mlflow')
  pytest.importorskip('sqlalchemy')  # Not of `mlflow-skinny`.
  monkeypatch.chdir(tmp_path)
  uri = f'sqlite:///{tmp_path}/mlflow.db'
  result = _train(process, callbacks=[_mlflow(params={'a': 1}, tracking_uri=uri)])
  client = mlflow.MlflowClient(tracking_uri=uri)
  experiment = client.get_experiment_by_name('tests')
  (run,) = client.search_runs([experiment.experiment_id])
  assert run.info.status == 'FINISHED' and run.data.params == {'a': '1'}
  history = client.get_metric_history(run.info.run_id, 'client_work/train/loss')
  assert [(its.step, its.value) for its in history] == [
      (number, pytest.approx(row['client_work/train/loss']))
      for number, row in enumerate(result.history, 1)
  ]


def test_wandb_itself(process, tmp_path):
  wandb = pytest.importorskip('wandb')
  tracker = simulation.WandbTracker(project='tests', directory=tmp_path, mode='offline')
  try:
    _train(process, callbacks=[tracker])
  finally:
    wandb.teardown()  # Its service outlives a run.
  (folder,) = (tmp_path / 'wandb').glob('offline-run-*')
  assert any(path.stat().st_size for path in folder.glob('*.wandb'))


_FED_AVG = (*helpers.TINY_RUN, '--transfer_labels=0', '--rounds=3')


@pytest.mark.slow
def test_a_run_may_be_tracked_by_mlflow(mlflow_calls, tmp_path):
  helpers.train_here(*_FED_AVG, '--tracker=mlflow', f'--output_dir={tmp_path / "run"}')
  assert mlflow_calls[0][0] == 'client'
  assert mlflow_calls[0][1] == f'sqlite:///{tmp_path}/run/mlflow.db'
  assert ('param', 'rounds', '3') in mlflow_calls
  assert (3, 'round_seconds') in [its[:2] for its in mlflow_calls]
  assert not (tmp_path / 'run' / 'tensorboard').exists()


@pytest.mark.slow
def test_an_interrupted_run_prints_how_to_go_on(tmp_path, monkeypatch):
  folder = tmp_path / 'a run'
  call = train_evaluation.Evaluation.__call__

  def interrupted_in_round_2(self, state):
    if state.round_num == 2:
      raise KeyboardInterrupt
    return call(self, state)

  arguments = [*_FED_AVG, '--rounds_per_checkpoint=3', f'--output_dir={folder}']
  with monkeypatch.context() as patch:
    patch.setattr(train_evaluation.Evaluation, '__call__', interrupted_in_round_2)
    _, said = helpers.run_here(*arguments, status=130)
  command = said.rpartition('To go on: ')[2].strip()
  words = shlex.split(command)
  assert words[:3] == ['python', '-m', 'pipelines.train']
  assert [its['round'] for its in helpers.rows(folder / 'metrics.csv')] == ['1']
  helpers.train_here(*words[3:])
  rows = helpers.rows(folder / 'metrics.csv')
  assert [float(its['round']) for its in rows] == [1, 2, 3]
  before = json.loads((folder / 'config.json').read_text())['flags']
  assert before['rounds'] == 3 and before['algorithm'] == 'fed_avg'
  assert os.listdir(folder / 'tensorboard')
