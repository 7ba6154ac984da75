"""Late, slow, lost and partly informed clients: whole rounds and what they equal."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

import tff_kd
from tests import helpers
from tff_kd.client import conditions

_SIZES = (3, 9, 6)
_DATA = [helpers.examples(n, n) for n in _SIZES]
_X, _ = helpers.examples(12, 99)


@helpers.shared
def _batches(data, **kwargs):
  return tff_kd.ClientBatches(data=data, batch_size=4, num_epochs=2, **kwargs)


@pytest.fixture(scope='module')
def data():
  return tff_kd.FileClientData.from_clients(_DATA)


@helpers.shared
def _build(name, batches, **kwargs):
  return helpers.build(name, client_data=batches, **kwargs)


@helpers.shared
def _fed_df(batches, **kwargs):
  defaults = dict(
      transfer_set=tff_kd.TransferSet(_X),
      student_optimizer=helpers.sgd(),
      distillation=tff_kd.Distillation(target='ensemble', num_steps=2, batch_size=6),
  )
  return _build('fed_df', batches, **(defaults | kwargs))


# Shared by many tests: clients that report in time are as without.
_TWO_REPORTS = tff_kd.Reporting(max_delay=1, min_reports=2)
_STALE = tff_kd.Reporting(max_delay=2, staleness_power=0.5)


def _client(number, **kwargs):
  return {'data': number, 'conditions': tff_kd.ClientConditions(**kwargs)}


def _participation(output):
  return output.metrics['client_work']['participation']


def test_unhindered_clients_are_as_ever(data):
  plain = _fed_df(_batches(data))
  hindered = _fed_df(_batches(data), reporting=_TWO_REPORTS)
  expected, state = plain.initialize(), hindered.initialize()
  for _ in range(2):
    expected = plain.next(expected, [0, 1, 2]).state
    output = hindered.next(state, [_client(k) for k in range(3)])
    state = output.state
  helpers.assert_weights_close(
      state.global_model_weights, expected.global_model_weights, rtol=0, atol=1e-6
  )
  assert output.metrics['round_skipped'] == 0
  assert _participation(output)['num_late'] == 0


def test_what_does_not_arrive_counts_for_nothing(data):
  process = _fed_df(_batches(data), reporting=_TWO_REPORTS)
  state = process.initialize()
  expected = process.next(state, [_client(0), _client(2)]).state
  output = process.next(
      state, [_client(0), _client(1, reports=np.bool_(False)), _client(2)]
  )
  helpers.assert_weights_close(
      output.state.global_model_weights, expected.global_model_weights, atol=1e-6
  )
  counts = _participation(output)
  assert counts['num_dropped_after_training'] == 1
  assert (counts['num_clients'], counts['num_included']) == (3, 2)


def test_a_late_client_trained_from_what_was_sent_then(data):
  process = _build('fed_avg', _batches(data), reporting=_STALE)
  states = [process.initialize()]
  for k in (0, 1):
    states.append(process.next(states[-1], [_client(k)]).state)

  def delta(state, k):
    after = process.next(state, [_client(k)]).state
    return [
        a - b
        for a, b in zip(
            tf.nest.flatten(after.global_model_weights),
            tf.nest.flatten(state.global_model_weights),
        )
    ]

  output = process.next(states[2], [_client(1, delay=np.int32(2)), _client(2)])
  # Weights by examples: two epochs of each client's.
  late, on_time = 2 * _SIZES[1] * 3.0**-0.5, 2.0 * _SIZES[2]
  expected = [
      w + (late * a + on_time * b) / (late + on_time)
      for w, a, b in zip(
          tf.nest.flatten(states[2].global_model_weights),
          delta(states[0], 1),
          delta(states[2], 2),
      )
  ]
  helpers.assert_weights_close(
      output.state.global_model_weights, expected, rtol=1e-4, atol=1e-6
  )
  assert _participation(output)['num_late'] == 1


@pytest.mark.parametrize(
    'share, steps',
    [(0.4, 2), *helpers.slow_each((0.01, 1), (0.6, 3), (1.0, 5))],
)
def test_a_straggler_does_the_first_of_its_steps(data, share, steps):
  # Client 1: 18 examples in 5 steps.
  process = _build('fed_avg', _batches(data), reporting=_STALE)
  short = _build('fed_avg', _batches(data, max_batches=steps))
  output = process.next(
      process.initialize(), [_client(1, step_share=np.float32(share))]
  )
  expected = short.next(short.initialize(), [1]).state
  helpers.assert_weights_close(
      output.state.global_model_weights, expected.global_model_weights, atol=1e-6
  )
  assert _participation(output)['num_stragglers'] == (share < 1.0)


def test_what_was_sent_is_kept_of_a_skipped_round(data):
  """Late clients may have begun in it; nothing else is, see `contract_test`."""
  process = _fed_df(_batches(data), reporting=_TWO_REPORTS)
  state = process.initialize()
  output = process.next(state, [_client(0), _client(1, reports=np.bool_(False))])
  assert output.metrics['round_skipped'] == 1
  assert output.state.round_num == 1
  assert helpers.changed_fields(state, output.state) == {'round_num', 'broadcasts'}


def test_a_student_does_not_learn_from_a_teacher_that_nobody_taught(data):
  stage = tff_kd.Distillation(num_steps=3, batch_size=4)
  process = _build(
      'fed_distillation', _batches(data),
      transfer_set=tff_kd.TransferSet(_X), teacher_fn=helpers.dense_fn((6,)),
      distillation=stage,
      back_distillation=dataclasses.replace(stage, target='teacher'),
  )
  state = process.initialize()
  output = process.next(state, [])
  for name in ('student', 'teacher'):
    assert output.metrics['server_distillation'][name]['num_steps'] == 0
  assert np.isnan(output.metrics['client_work']['train']['loss'])
  helpers.assert_weights_close(
      output.state.global_model_weights, state.global_model_weights, rtol=0, atol=0
  )
  learned = process.next(state, [0, 1]).metrics['server_distillation']
  assert learned['student']['num_steps'] == learned['teacher']['num_steps'] == 3


def test_a_round_of_nobody_leaves_the_student(data):
  process = _fed_df(_batches(data), reporting=_TWO_REPORTS)
  state = process.initialize()
  output = process.next(state, [])
  assert output.metrics['round_skipped'] == 1
  helpers.assert_weights_close(
      output.state.global_model_weights, state.global_model_weights, rtol=0, atol=0
  )


def test_a_client_can_have_begun_in_the_first_round_and_not_before(data):
  process = _build('fed_avg', _batches(data), reporting=_STALE)
  state = process.next(process.initialize(), [_client(0)]).state
  output = process.next(state, [_client(1, delay=np.int32(1))])
  assert _participation(output)['num_late'] == 1
  with pytest.raises(Exception, match='at most the number of rounds before this one'):
    process.next(state, [_client(1, delay=np.int32(2))])


def test_predictions_on_a_part_are_of_that_part():
  transfer_set = tff_kd.TransferSet(np.zeros([1000, 2], np.float32), subset_size=400)

  def covered(began, coverage, seed=(1, 2)):
    its = tff_kd.ClientConditions(
        coverage=np.float32(coverage), seed=np.array(seed, np.int32)
    )
    return conditions.covered_rows(
        transfer_set, its, tf.constant(began), tf.constant(5)
    ).numpy()

  assert covered(5, 1.0).all() and not covered(5, 0.0).any()
  part = covered(5, 0.3)
  assert 0.2 < part.mean() < 0.4
  assert (part != covered(5, 0.3, (1, 3))).any()
  # A late client predicted what was drawn when it began.
  both = np.isin(transfer_set.prediction_ids(5), transfer_set.prediction_ids(3))
  np.testing.assert_array_equal(covered(3, 1.0), both)
  np.testing.assert_array_equal(covered(3, 0.3), both & part)


def test_a_client_without_predictions_is_not_in_the_consensus(data):
  process = _fed_df(
      _batches(data), reporting=tff_kd.Reporting(),
      # Weights of the students do not move: only the distillation does.
      server_optimizer=helpers.sgd(0.0),
  )
  state = process.initialize()
  clients = [_client(0), _client(1, coverage=np.float32(0.0))]
  found = process.next(state, clients).state.global_model_weights
  expected = process.next(state, [_client(0)]).state.global_model_weights
  helpers.assert_weights_close(found, expected, atol=1e-6)
  both = process.next(state, [_client(0), _client(1)]).state.global_model_weights
  assert np.abs(both.trainable[0] - expected.trainable[0]).max() > 1e-6


def test_class_knowledge_that_was_lost_or_late_is_not_left_out(data):
  process = _build(
      'fd', _batches(data),
      reporting=tff_kd.Reporting(max_delay=1, staleness_power=0.0),
  )
  own = process.initialize_client()
  state = process.initialize()
  lost = process.next(
      state, [_client(0), _client(1, reports=np.bool_(False))], [own, own]
  )
  kept, trained = lost.client_states
  assert kept.sent_round == 0
  # It has learned, but what it sent is in no sum.
  assert trained.sent_round == -1 and not np.any(trained.sent.values)
  assert np.any(trained.weights.trainable[0] != own.weights.trainable[0])
  late = process.next(lost.state, [_client(2, delay=np.int32(1))], [own])
  assert late.client_states[0].sent_round == 1


def test_what_clients_remember_agrees_with_the_server_after_a_skipped_round(data):
  process = _build('fd', _batches(data), reporting=tff_kd.Reporting(min_reports=2))
  new = process.initialize_client()
  first = process.next(process.initialize(), [_client(0), _client(1)], [new] * 2)
  skipped = process.next(first.state, [_client(0)], first.client_states[:1])
  assert skipped.metrics['round_skipped'] == 1
  kept, state = skipped.client_states[0], skipped.state
  helpers.assert_weights_close(kept, first.client_states[0], rtol=0, atol=0)
  assert kept.sent_round == state.shared_round == 0
  # So client 0 learns in round 2 from what client 1 has sent alone.
  alone = tf.nest.map_structure(np.copy, first.client_states[1].sent)
  both = [_client(0), _client(2)]
  found = process.next(state, both, [kept, new])
  expected = process.next(
      state._replace(shared=alone, shared_round=np.int32(-7)), both, [kept, new]
  )
  helpers.assert_weights_close(
      found.client_states[0].weights, expected.client_states[0].weights, atol=1e-5
  )
  assert _participation(found)['num_taught'] == 2


def test_only_known_labels_teach(data):
  batches = tff_kd.ClientBatches(
      data=data, batch_size=9, label_share=0.5, shuffle=False
  )
  rows, labelled = batches.rows_and_labelled(tf.constant(1), tf.constant(0))
  labelled = labelled.numpy()
  assert 0 < labelled.sum() < len(labelled) == 9
  # The same in every round.
  again = batches.rows_and_labelled(tf.constant(1), tf.constant(7))[1]
  np.testing.assert_array_equal(again, labelled)
  process = _build('fed_avg', batches)
  state = process.initialize()
  x, y = _DATA[1]
  (kernel, bias), _ = state.global_model_weights
  logits = x @ kernel + bias
  error = helpers.softmax(logits) - np.eye(helpers.CLASSES)[y]
  error *= labelled[:, None] / labelled.sum()
  output = process.next(state, [1])
  helpers.assert_weights_close(
      output.state.global_model_weights,
      [kernel - 0.1 * x.T @ error, bias - 0.1 * error.sum(0)],
      rtol=1e-4, atol=1e-6,
  )
  accuracy = output.metrics['client_work']['train']['accuracy']
  right = (logits.argmax(-1) == y)[labelled > 0].mean()
  np.testing.assert_allclose(accuracy, right, rtol=1e-6)


def test_features_that_a_client_lacks_are_zero(data):
  batches = _batches(data, input_share=0.5, shuffle=False)
  masks = [batches.input_mask(tf.constant(k)).numpy() for k in range(3)]
  assert {tuple(np.unique(m)) for m in masks} <= {(0.0, 1.0), (0.0,), (1.0,)}
  assert len({tuple(m) for m in masks}) > 1
  process = _build('fed_avg', batches)
  first, _ = next(batches.dataset(1).as_numpy_iterator())
  np.testing.assert_allclose(first, _DATA[1][0][:4] * masks[1])
  plain = _build('fed_avg', None)
  expected = plain.next(plain.initialize(), [batches.dataset(1)]).state
  found = process.next(process.initialize(), [1]).state
  helpers.assert_weights_close(
      found.global_model_weights, expected.global_model_weights, atol=1e-6
  )


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda d: tff_kd.Reporting(max_delay=-1), '`max_delay` must be an integer, 0'),
        (lambda d: tff_kd.Reporting(staleness_power=-1.0), '`staleness_power` must be'),
        (
            lambda d: _build('fed_avg', None, reporting=tff_kd.Reporting()),
            '`reporting` needs clients that read',
        ),
        (
            lambda d: _build(
                'fd', _batches(d), reporting=tff_kd.Reporting(max_delay=1)
            ),
            '`staleness_power` must be 0, found 0.5',
        ),
        (lambda d: _batches(d, label_share=0.0), '`label_share` must be above 0'),
        (
            lambda d: _build('fed_ntd', _batches(d, label_share=0.5)),
            'needs the label of every example',
        ),
        (
            lambda d: _build('fd', _batches(d, label_share=0.5)),
            '`label_share` must be 1, found 0.5',
        ),
        (
            lambda d: _batches(d, label_share=0.5).dataset(0),
            'A dataset cannot say which labels are unknown',
        ),
    ],
)
def test_refusals(data, make, message):
  with pytest.raises(ValueError, match=message):
    make(data)


@pytest.mark.parametrize(
    'bad',
    [
        {'delay': np.int32(3)},
        {'delay': np.int32(1)},  # Before the first round.
        {'step_share': np.float32(0.0)},
    ],
)
def test_conditions_that_make_no_sense(data, bad):
  process = _build('fed_avg', _batches(data), reporting=_STALE)
  with pytest.raises(Exception, match='conditions of a client must be a delay from 0'):
    process.next(process.initialize(), [_client(0, **bad)])
