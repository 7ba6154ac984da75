"""What clients are sent and what is released: the average, or the distilled student."""

import dataclasses

import numpy as np
import pytest
import scipy.special
import tensorflow as tf
from tff_kd.compat import tff

from tests import helpers
import tff_kd

_SIZES = (3, 9, 6)
_PUBLIC, _ = helpers.examples(12, 99)
_X = _PUBLIC.astype(np.float64)
_STEPS = tff_kd.Distillation(num_steps=2, batch_size=6)
# All that is about the student that was sent: the server's momentum, terms that learn
# from it and from those before it, late reports and skipped rounds.
_TERMS = (
    tff_kd.ProximalTerm(weight=0.1),
    tff_kd.LocalDistillation(target='student', weight=0.3),
    tff_kd.LocalDistillation(target='student_history', weight=0.4, history_size=2),
)
_REPORTING = tff_kd.Reporting(max_delay=1, min_reports=2)
_COHORTS = (helpers.dense_fn(), helpers.dense_fn((4,)))


@pytest.fixture(scope='module')
def batches():
  return helpers.batches([helpers.examples(n, n) for n in _SIZES], num_epochs=2)


@helpers.shared
def _build(name, batches, start='average', cohorts=False, **kwargs):
  kwargs.setdefault('server_optimizer', helpers.sgd(0.7, 0.5))
  if cohorts:
    kwargs['student_fn'] = list(_COHORTS)
  parts = dict(
      transfer_set=lambda: tff_kd.TransferSet(_PUBLIC),
      teacher_fn=lambda: helpers.dense_fn((8,)),
      student_optimizer=lambda: helpers.sgd(0.5),
      teacher_optimizer=lambda: helpers.sgd(0.5),
      distillation=lambda: _STEPS,
      back_distillation=lambda: dataclasses.replace(_STEPS, target='teacher'),
  )
  return helpers.build_with_parts(
      name, parts, client_data=batches, clients_start_from=start, **kwargs
  )


def _client(number, **kwargs):
  return {'data': number, 'conditions': tff_kd.ClientConditions(**kwargs)}


# On time; one late; too few; again.
_ROUNDS = (
    [_client(0), _client(1), _client(2)],
    [_client(0), _client(2, delay=np.int32(1))],
    [_client(1)],
    [_client(1), _client(0)],
)


@pytest.mark.parametrize(
    'name', ['fed_df', helpers.slow('fed_distillation')]
)
def test_the_average_is_fed_avgs_whatever_is_released(name, batches):
  options = dict(local_terms=_TERMS, reporting=_REPORTING)
  process = _build(name, batches, **options)
  fed_avg = _build('fed_avg', batches, start=None, **options)
  assert process.description.sends_average and not fed_avg.description.sends_average
  state, expected = process.initialize(), fed_avg.initialize()
  for clients in _ROUNDS:
    before, expected_before = state, expected
    output = process.next(state, clients)
    state, expected = output.state, fed_avg.next(expected, clients).state
    helpers.assert_weights_close(
        state.aggregated_model_weights, expected.global_model_weights, atol=1e-6
    )
    helpers.assert_weights_close(
        state.student_history.sent, expected.student_history.sent, atol=1e-6
    )
    distance = np.abs(
        state.global_model_weights.trainable[0]
        - state.aggregated_model_weights.trainable[0]
    ).max()
    assert distance > 1e-3
    if output.metrics['round_skipped']:
      for field in ('global_model_weights', 'aggregated_model_weights', 'finalizer'):
        helpers.assert_weights_close(
            getattr(state, field), getattr(before, field), rtol=0
        )
      assert state.round_num == before.round_num + 1 == expected_before.round_num + 1


@pytest.mark.slow
def test_cohorts_go_on_from_their_averages(batches):
  process = _build('fed_df', batches, cohorts=True)
  fed_avg = _build('fed_avg', batches, start=None, cohorts=True)
  state, expected = process.initialize(), fed_avg.initialize()
  # In the second round nobody of the second cohort takes part; the ensemble teaches it.
  for cohorts in ([0, 1, 1], [0]):
    clients = [
        {'cohort': np.int32(c), 'data': np.int32(k)} for k, c in enumerate(cohorts)
    ]
    released = state.global_model_weights[1]
    state = process.next(state, clients).state
    expected = fed_avg.next(expected, clients).state
    helpers.assert_weights_close(
        state.aggregated_model_weights, expected.global_model_weights, atol=1e-6
    )
    assert np.abs(
        state.global_model_weights[1].trainable[0] - released.trainable[0]
    ).max() > 1e-4


def test_the_released_student_is_distilled_from_the_average(batches):
  process, distilled = _build('fed_df', batches), _build('fed_df', batches, 'distilled')
  state = process.next(process.initialize(), [0, 1, 2]).state
  # The first rounds are the same: clients begin with the initial student.
  first = distilled.next(distilled.initialize(), [0, 1, 2]).state
  helpers.assert_weights_close(
      state.global_model_weights, first.global_model_weights, rtol=0
  )
  after = process.next(state, [2, 1]).state
  # The second as if what is released were the average of the first.
  expected = distilled.next(
      first._replace(global_model_weights=first.aggregated_model_weights), [2, 1]
  ).state
  for field in ('global_model_weights', 'aggregated_model_weights', 'finalizer'):
    helpers.assert_weights_close(
        getattr(after, field), getattr(expected, field), atol=1e-6
    )


def test_a_round_of_nobody_releases_the_student_of_the_round_before(batches):
  process = _build('fed_distillation', batches, reporting=tff_kd.Reporting())
  state = process.next(process.initialize(), [_client(k) for k in range(3)]).state
  lost = [_client(0, reports=np.bool_(False))]
  after = process.next(state, lost).state
  for field in ('global_model_weights', 'aggregated_model_weights', 'teacher_weights'):
    helpers.assert_weights_close(getattr(after, field), getattr(state, field), rtol=0)


def test_a_student_that_is_set_is_sent(batches):
  process = _build('fed_df', batches)
  state = process.next(process.initialize(), [0, 1]).state
  given = tf.nest.map_structure(np.ones_like, process.get_model_weights(state))
  state = process.set_model_weights(state, given)
  helpers.assert_weights_close(state.aggregated_model_weights, given, rtol=0)
  helpers.assert_weights_close(process.get_model_weights(state), given, rtol=0)


def _train(process, folder, num_rounds):
  return tff_kd.simulation.train(
      process,
      select_clients=lambda round_num: [round_num % 3, (round_num + 1) % 3],
      num_rounds=num_rounds,
      program_state_manager=tff.program.FileProgramStateManager(folder),
      rounds_per_saving=1,
  ).state


@pytest.mark.slow
def test_a_resumed_run_repeats_an_unbroken_one(batches, tmp_path):
  process = _build('fed_distillation', batches)
  whole = _train(process, tmp_path / 'whole', 4)
  _train(process, tmp_path / 'parts', 2)
  resumed = _train(_build.anew('fed_distillation', batches), tmp_path / 'parts', 4)
  helpers.assert_weights_close(resumed, whole, rtol=0)


@pytest.mark.parametrize(
    'name, kwargs, message',
    [
        ('fed_df', dict(start='teacher'), "'distilled', 'average' or None.*'teacher'"),
        ('ds_fl', dict(server_optimizer=None), 'averages no weights'),
        ('fed_avg', {}, 'leaves the student as averaging made it'),
        ('fed_et', {}, 'leaves the student as averaging made it'),
    ],
)
def test_refused_where_there_is_nothing_to_choose(batches, name, kwargs, message):
  with pytest.raises(ValueError, match=f'`clients_start_from` .*{message}'):
    _build(name, batches, **kwargs)


# FedAvg, calibrated.


def _calibrated(batches, **kwargs):
  return _build('fed_avg', batches, None, calibrate_on=_PUBLIC, **kwargs)


def _bias_for(logits, prior, steps=300):
  """By the fixed-point iteration, in float64, on logits `[rows, classes]`."""
  bias = np.zeros(logits.shape[-1])
  for _ in range(steps):
    marginal = scipy.special.softmax(logits + bias, -1).mean(0)
    bias += np.log(prior) - np.log(marginal)
  return bias


@pytest.mark.parametrize('prior', [helpers.slow(None), (0.6, 0.3, 0.1)])
def test_calibrated_fed_avg_in_numpy(prior, batches):
  process = _calibrated(batches, prior=prior)
  fed_avg = _build('fed_avg', batches, start=None)
  state, expected = process.initialize(), fed_avg.initialize()
  pi = np.full(3, 1 / 3) if prior is None else np.array(prior)
  for clients in ([0, 1], [2, 1]):
    output = process.next(state, clients)
    state, expected = output.state, fed_avg.next(expected, clients).state
    # Clients go on from FedAvg's average.
    helpers.assert_weights_close(
        state.aggregated_model_weights, expected.global_model_weights, atol=1e-6
    )
    kernel, bias = (
        np.array(w, np.float64) for w in expected.global_model_weights.trainable
    )
    found_kernel, found_bias = state.global_model_weights.trainable
    np.testing.assert_allclose(found_kernel, kernel, atol=1e-6)
    moved = _bias_for(_X @ kernel + bias, pi)
    np.testing.assert_allclose(
        np.diff(found_bias - bias), np.diff(moved), atol=1e-3
    )
    logits = _X @ np.float64(found_kernel) + found_bias
    np.testing.assert_allclose(
        scipy.special.softmax(logits, -1).mean(0), pi, atol=1e-4
    )
    measured = output.metrics['server_distillation']['student']
    assert measured['num_targets'] == 12
    assert measured['marginal_distance_after'] < 1e-4
    assert measured['marginal_distance_after'] < measured['marginal_distance_before']


def test_clients_may_go_on_from_the_calibrated_average(batches):
  process = _build('fed_avg', batches, 'distilled', calibrate_on=_PUBLIC)
  assert not process.description.sends_average
  state = process.next(process.initialize(), [0, 1]).state
  expected = _build('fed_avg', batches, start=None)
  before = expected.next(expected.initialize(), [0, 1]).state
  after = process.next(state, [2]).state
  after_expected = expected.next(
      before._replace(global_model_weights=state.global_model_weights), [2]
  ).state
  helpers.assert_weights_close(
      after.aggregated_model_weights, after_expected.global_model_weights, atol=1e-6
  )


def test_a_prior_without_inputs_is_refused(batches):
  with pytest.raises(ValueError, match='pass both or neither'):
    _build('fed_avg', batches, None, prior=(0.5, 0.3, 0.2))
