"""The process runs unchanged under TFF's own loops, programs and evaluation."""

import collections
import dataclasses
import os

from absl import logging
import keras
import numpy as np
import pytest
import tensorflow as tf
from tff_kd.compat import tff

import tff_kd
from tests import helpers

_CLIENTS = {f'client_{i}': helpers.examples(6 + 3 * i, i) for i in range(4)}


@pytest.fixture(scope='module')
def process():
  keras.utils.set_random_seed(0)
  return helpers.build(
      'fed_distillation', teacher_fn=helpers.dense_fn((8,)),
      transfer_set=tff_kd.TransferSet(helpers.examples(16, 9)[0]),
      distillation=tff_kd.Distillation(num_steps=3),
  )


def _datasets(ids):
  return [helpers.dataset(*_CLIENTS[i]) for i in ids]


@pytest.fixture(scope='module')
def by_id(process):
  """The process, its client data chosen by id."""
  sizes = {i: len(y) for i, (_, y) in _CLIENTS.items()}
  xs = np.concatenate([x for x, _ in _CLIENTS.values()])
  ys = np.concatenate([y for _, y in _CLIENTS.values()])
  ends = np.cumsum(list(sizes.values()))

  @tff.tensorflow.computation(np.str_)
  def dataset_computation(client_id):
    index = tf.argmax(tf.equal(client_id, list(_CLIENTS)))
    end = tf.gather(tf.constant(ends), index)
    start = end - tf.gather(tf.constant(list(sizes.values()), tf.int64), index)
    return tf.data.Dataset.from_tensor_slices(
        (tf.constant(xs)[start:end], tf.constant(ys)[start:end])
    ).batch(4)

  return tff.simulation.compose_dataset_computation_with_learning_process(
      dataset_computation, process
  )


def test_run_training_process(process, tmp_path):
  sample = tff.simulation.build_uniform_sampling_fn(
      sorted(_CLIENTS), random_seed=3
  )
  manager = tff.program.FileProgramStateManager(tmp_path)
  released = tff.program.MemoryReleaseManager()
  run = lambda rounds: tff.simulation.run_training_process(
      process,
      training_selection_fn=lambda r: _datasets(sample(r, 2)),
      total_rounds=rounds,
      program_state_manager=manager,
      metrics_managers=[released],
  )
  run(2)
  resumed = run(3)  # From the saved state.
  assert sorted(released.values()) == [1, 2, 3]

  state = process.initialize()
  for r in range(1, 4):
    state = process.next(state, _datasets(sample(r, 2))).state
  helpers.assert_weights_close(resumed, state, rtol=0)
  teacher = process.get_teacher_weights(resumed)
  assert np.isfinite(teacher.trainable[0]).all()


def test_compose_dataset_computation(process, by_id):
  ids = ['client_1', 'client_3']
  composed = by_id.next(by_id.initialize(), ids)
  plain = process.next(process.initialize(), _datasets(ids))
  helpers.assert_weights_close(composed.state, plain.state, rtol=0)
  # The state is the process's own, so its getters work on it.
  helpers.assert_weights_close(
      process.get_teacher_weights(composed.state), plain.state.teacher_weights,
      rtol=0,
  )


def test_train_model(process, by_id, tmp_path):
  train_source = tff.program.ClientIdDataSource(sorted(_CLIENTS))
  metrics = tff.program.MemoryReleaseManager()
  model_output = tff.program.MemoryReleaseManager()
  stack = tff.framework.get_context_stack()
  with stack.install(
      tff.program.NativeFederatedContext(tff_kd.runtime.AsyncInProcessContext())
  ):
    helpers.run(
        tff.learning.programs.train_model(
            train_process=by_id,
            train_data_source=train_source,
            train_per_round_clients=2,
            train_total_rounds=2,
            program_state_manager=tff.program.FileProgramStateManager(
                os.fspath(tmp_path)
            ),
            model_output_manager=model_output,
            train_metrics_manager=metrics,
            evaluation_manager=None,
            evaluation_periodicity=1,
        )
    )
  values = metrics.values()
  assert len(values) == 2
  last = tff_kd.simulation.flatten_metrics(list(values.values())[-1])
  assert any(name.endswith('loss') and np.isfinite(v) for name, v in last.items())
  assert len(model_output.values()) >= 1


def test_weights_go_into_build_fed_eval(process):
  state = process.next(process.initialize(), _datasets(sorted(_CLIENTS))).state
  for spec, weights in (
      (process.student_spec, process.get_model_weights(state)),
      (process.teacher_spec, process.get_teacher_weights(state)),
  ):
    evaluation = tff.learning.algorithms.build_fed_eval(spec.functional_model)
    eval_state = evaluation.set_model_weights(evaluation.initialize(), weights)
    output = evaluation.next(eval_state, _datasets(sorted(_CLIENTS)))
    metrics = output.metrics['client_work']['eval']['current_round_metrics']
    model = spec.to_keras(weights)
    x = np.concatenate([x for x, _ in _CLIENTS.values()])
    y = np.concatenate([y for _, y in _CLIENTS.values()])
    np.testing.assert_allclose(
        metrics['accuracy'], np.mean(np.argmax(model(x), -1) == y), rtol=1e-6
    )
    assert metrics['num_examples'] == len(y)


@pytest.mark.parametrize('regularizer', [None, 'l2'])
def test_losses_of_layers_that_tff_leaves_out_are_warned_of(regularizer, monkeypatch):
  warnings = []
  monkeypatch.setattr(logging, 'warning', lambda m, *a: warnings.append(m % a))
  spec = helpers.model_spec(helpers.dense_fn(kernel_regularizer=regularizer))
  assert spec.functional_model.input_spec == helpers.INPUT_SPEC
  assert len(warnings) == (0 if regularizer is None else 1)
  assert all('without the losses of its layers' in its for its in warnings)


@dataclasses.dataclass(frozen=True)
class _Repulsion(tff_kd.client.local_terms.LocalTerm):
  """The proximal term with another sign, which `ProximalTerm` refuses."""

  weight: float

  def __call__(self, loss, step):
    return 2.0 * loss - tff_kd.ProximalTerm(weight=self.weight)(loss, step)


# What it finds is TFF's; `local_terms_test` holds ours.
@pytest.mark.slow
def test_tffs_fed_prox_has_the_other_sign(process):
  """TFF 0.87 with mu equals ours with -mu, as the documents say."""
  mu, spec = 0.9, process.student_spec
  clients = [
      helpers.dataset(*_CLIENTS[i], batch_size=2) for i in ('client_0', 'client_2')
  ]
  theirs = tff.learning.algorithms.build_weighted_fed_prox(
      spec.functional_model, proximal_strength=mu, client_optimizer_fn=helpers.sgd()
  )
  expected = theirs.get_model_weights(
      theirs.next(theirs.initialize(), clients).state
  ).trainable

  def difference(term):
    ours = tff_kd.rounds.compose_process(
        tff_kd.rounds.Parts(
            students=tff_kd.models.cohorts.as_students(spec),
            client_optimizer=helpers.sgd(),
            local_terms=[term],
        )
    )
    found = ours.next(ours.initialize(), clients).state.global_model_weights
    return max(
        np.abs(f - e).max() for f, e in zip(found.trainable, expected, strict=True)
    )

  assert difference(_Repulsion(mu)) < 1e-6
  assert difference(tff_kd.ProximalTerm(weight=mu)) > 1e-3


@pytest.mark.slow
def test_spec_serves_tffs_own_fed_avg(process):
  """A spec is also a functional model of TFF."""
  theirs = tff.learning.algorithms.build_weighted_fed_avg(
      process.student_spec.functional_model, client_optimizer_fn=helpers.sgd()
  )
  output = theirs.next(theirs.initialize(), _datasets(['client_0', 'client_2']))
  metrics = output.metrics['client_work']['train']
  assert isinstance(metrics, collections.OrderedDict)
  assert metrics['num_examples'] == 6 + 12
  ours = helpers.build(
      'fed_avg',
      student_fn=lambda: process.student_spec.to_keras(
          process.student_spec.initial_weights
      ),
  )
  found = ours.next(ours.initialize(), _datasets(['client_0', 'client_2'])).state
  helpers.assert_weights_close(
      found.global_model_weights.trainable,
      theirs.get_model_weights(output.state).trainable,
      rtol=1e-5,
      atol=1e-6,
  )
  initial = ours.initialize().global_model_weights.trainable[0]
  assert np.abs(found.global_model_weights.trainable[0] - initial).max() > 1e-4
