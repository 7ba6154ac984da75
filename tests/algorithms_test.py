"""Every algorithm of the registry learns on real data, unbroken and resumed."""

import inspect
import math

import keras
import numpy as np
import pytest
from tff_kd.compat import tff

from tests import helpers
import tff_kd
from tff_kd import algorithms
from tff_kd.models import zoo

_ROUNDS = 10


@pytest.fixture(scope='module')
def task():
  return tff_kd.data.TASKS['mnist5k'].load(seed=0, transfer_size=200, validation_size=200)


@pytest.fixture(scope='module')
def batches(task):
  some = task.clients.take(np.arange(1500))
  split = tff_kd.data.partition.dirichlet(some.labels, 10, alpha=0.5, seed=0)
  data = tff_kd.FileClientData.from_arrays(tuple(some), split)
  return tff_kd.ClientBatches(data=data, batch_size=20, seed=0)


def _build(name, task, batches):
  keras.utils.set_random_seed(0)

  def model_fn():
    return zoo.STUDENTS['mlp_small'](10, task.clients.inputs.shape[1:])

  parts = dict(
      transfer_set=lambda: tff_kd.TransferSet(task.transfer.inputs),
      negatives=lambda: task.validation.inputs,
      teacher_fn=lambda: model_fn,
      mentor_fn=lambda: model_fn,
      generator_steps=lambda: 5,
  )
  return helpers.build_with_parts(
      name, parts,
      student_fn=model_fn,
      input_spec=batches.element_spec,
      client_data=batches,
      loss_fn=task.loss_fn,
      metrics_fn=task.metrics_fn,
  )


def _train(process, task, folder, num_rounds, rounds_per_saving):
  evaluator = tff_kd.evaluation.CentralEvaluator(process.student_spec)
  sample = tff.simulation.build_uniform_sampling_fn(range(10), random_seed=0)
  store = None
  if isinstance(process, tff_kd.StatefulClientsProcess):
    store = tff_kd.simulation.ClientStates(
        process.initialize_client(), folder / 'clients'
    )

  def evaluate(state):
    """The server's model, or the mean over the clients' own."""
    models = [getattr(state, 'global_model_weights', ())]
    if not len(models[0]):
      models = [its.weights for its in store.load(range(10))]
    values = [evaluator.evaluate(weights, *task.test) for weights in models]
    return {key: np.mean([v[key] for v in values]) for key in values[0]}

  return tff_kd.simulation.train(
      process,
      select_clients=lambda round_num: [int(k) for k in sample(round_num, 5)],
      num_rounds=num_rounds,
      evaluate=evaluate,
      client_states=store,
      program_state_manager=tff.program.FileProgramStateManager(folder / 'saved'),
      rounds_per_saving=rounds_per_saving,
  )


# Rounds are equal to NumPy's in the tests of each algorithm, and resumed to the bit in
# `contract_test`; a process that is built anew resumes in `private_process_test`.
@pytest.mark.slow
@pytest.mark.parametrize('name', sorted(algorithms.REGISTRY))
def test_ten_rounds_unbroken_and_resumed(name, task, batches, tmp_path):
  process = _build(name, task, batches)
  whole = _train(process, task, tmp_path / 'whole', _ROUNDS, _ROUNDS)
  accuracy = [metrics['accuracy'] for metrics in whole.history]
  assert accuracy[-1] > accuracy[0]
  assert all(
      math.isfinite(value)
      for metrics in whole.history for key, value in metrics.items() if 'loss' in key
  )
  _train(process, task, tmp_path / 'parts', 4, 4)
  # As another program would: built anew, from the files alone.
  process = _build(name, task, batches)
  resumed = _train(process, task, tmp_path / 'parts', _ROUNDS, _ROUNDS)
  assert len(resumed.history) == _ROUNDS - 4
  helpers.assert_weights_close(resumed.state, whole.state, rtol=0)


def test_the_registry_tells_what_builders_need():
  for name, algorithm in algorithms.REGISTRY.items():
    assert algorithm.name == name and algorithm.summary and algorithm.uploads
    needed = {
        'transfer set': 'transfer_set', 'teacher': 'teacher_fn', 'mentor': 'mentor_fn',
        'negatives': 'negatives',
    }
    required = {
        parameter.name
        for parameter in inspect.signature(algorithm.build).parameters.values()
        if parameter.default is parameter.empty
    }
    for what, parameter in needed.items():
      assert (what in algorithm.needs) == (parameter in required), (name, what)
    assert inspect.getdoc(inspect.getmodule(algorithm.build))


def test_an_algorithm_with_a_rule_to_choose_names_its_own():
  def build_mine(*, student_fn, consensus_rule=None):
    del student_fn, consensus_rule

  with pytest.raises(ValueError, match="mine: .* must name the rule .* 'mean_logits'"):
    algorithms.Info(build=build_mine, summary='mine', uploads=('predictions',))


def test_what_clients_keep_has_a_name():
  def build_mine(*, student_fn):
    del student_fn

  with pytest.raises(ValueError, match="mine: `keeps` must be one of .*found 'head'"):
    algorithms.Info(build=build_mine, summary='mine', uploads=(), keeps='head')
