"""Who takes part: what is drawn, from what, and how often."""

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
from tff_kd.compat import tff

from tff_kd import simulation

_ROUNDS = 30


def _numbers(clients):
  return [its['data'] if isinstance(its, dict) else its for its in clients]


def test_by_default_it_samples_as_tff_does():
  participation = simulation.Participation(num_clients=20, clients_per_round=5, seed=3)
  sample = tff.simulation.build_uniform_sampling_fn(range(20), random_seed=3)
  for round_num in range(1, 5):
    assert participation(round_num) == [int(k) for k in sample(round_num, 5)]
  assert not participation.has_conditions


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(
    seed=st.integers(0, 1000),
    max_delay=st.integers(0, 4),
    sampling=st.sampled_from(['uniform', 'weighted', 'cyclic']),
    dropout=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_every_beginning_is_reported_once_and_nobody_twice(
    seed, max_delay, sampling, dropout
):
  def make():
    return simulation.Participation(
        num_clients=9, clients_per_round=4, sampling=sampling,
        weights=np.arange(1, 10) if sampling == 'weighted' else None,
        dropout_before=dropout, dropout_after=0.2, straggler_share=0.5,
        straggler_steps=0.25, delay_share=0.5 if max_delay else 0.0,
        max_delay=max_delay, coverage=0.5, seed=seed,
    )

  one, other = make(), make()
  rounds = [one(r) for r in range(1, _ROUNDS + 1)]
  # Asked in any order, and again, it says the same.
  np.testing.assert_equal(other(_ROUNDS), rounds[-1])
  np.testing.assert_equal(one(1), rounds[0])
  began = reported = late = 0
  for r, clients in enumerate(rounds, 1):
    numbers = _numbers(clients)
    assert len(set(numbers)) == len(numbers)
    counts = one.counts(r)
    assert counts['num_chosen'] + counts['num_missing'] == 4
    began += counts['num_chosen'] - counts['num_dropped_before_training']
    reported += len(clients)
    for its in clients:
      assert 0 <= its['conditions'].delay <= min(max_delay, r - 1)
      assert 0.25 <= its['conditions'].step_share <= 1.0
      late += its['conditions'].delay > 0
  pending = began - reported
  assert 0 <= pending <= 4 * max_delay
  if dropout == 1.0:
    assert reported == 0
  elif max_delay:
    assert late > 0


class _Asked(simulation.Availability):
  """Clients that can always be reached, and the rounds for which this was asked."""

  def __init__(self):
    self.rounds = set()

  def __contains__(self, client_and_round):
    self.rounds.add(client_and_round[1])
    return True


@pytest.mark.parametrize('max_delay', [0, 2])
def test_rounds_are_drawn_and_kept_only_as_far_as_needed(max_delay):
  asked = _Asked()
  participation = simulation.Participation(
      num_clients=9, clients_per_round=4, availability=asked, coverage=0.5,
      delay_share=0.5 if max_delay else 0.0, max_delay=max_delay,
  )
  participation(20)
  # Late clients of the rounds before are not free.
  assert asked.rounds == (set(range(1, 21)) if max_delay else {20})
  asked.rounds.clear()
  for round_num in (21, 22):
    participation(round_num)
    participation.counts(round_num)
  assert asked.rounds == {21, 22}
  assert len(participation._begun) == 1 + max_delay


def test_the_shares_are_as_asked():
  participation = simulation.Participation(
      num_clients=100, clients_per_round=50, dropout_before=0.3, dropout_after=0.2,
      straggler_share=0.4, delay_share=0.25, max_delay=2, seed=1,
  )
  clients = [its for r in range(1, 101) for its in participation(r)]
  counts = [participation.counts(r) for r in range(1, 101)]
  chosen = sum(c['num_chosen'] for c in counts)
  gone = sum(c['num_dropped_before_training'] for c in counts)
  # Four standard errors of some 3,500 draws.
  near = dict(abs=0.035)
  assert gone / chosen == pytest.approx(0.3, **near)
  found = [its['conditions'] for its in clients]
  assert np.mean([not c.reports for c in found]) == pytest.approx(0.2, **near)
  assert np.mean([c.step_share < 1 for c in found]) == pytest.approx(0.4, **near)
  assert np.mean([c.delay > 0 for c in found]) == pytest.approx(0.25, **near)
  assert len({tuple(c.seed) for c in found}) == len(found)


def test_cyclic_takes_all_in_turn():
  participation = simulation.Participation(
      num_clients=6, clients_per_round=4, sampling='cyclic'
  )
  found = [participation(r) for r in (1, 2, 3, 4)]
  assert found == [[0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5], [0, 1, 2, 3]]


def test_weighted_prefers_the_heavy():
  participation = simulation.Participation(
      num_clients=4, clients_per_round=1, sampling='weighted', weights=[1, 1, 1, 7]
  )
  found = [participation(r)[0] for r in range(1, 1001)]
  assert np.mean(np.array(found) == 3) == pytest.approx(0.7, abs=0.06)


def test_a_trace_says_who_can_be_reached(tmp_path):
  path = tmp_path / 'trace.csv'
  path.write_text('client,first,last\n0,1,2\n1,2,3\n1,5,5\n')
  trace = simulation.Availability.from_csv(path, 3)
  participation = simulation.Participation(
      num_clients=3, clients_per_round=2, availability=trace
  )
  assert [sorted(participation(r)) for r in range(1, 6)] == [[0], [0, 1], [1], [], [1]]
  assert [participation.counts(r)['num_missing'] for r in range(1, 6)] == [1, 0, 1, 2, 1]


@pytest.mark.parametrize('line', ['3,1,2', '0,2,1', '0,0,1', '0,1', 'a,1,2'])
def test_a_wrong_line_of_a_trace_is_named(tmp_path, line):
  path = tmp_path / 'trace.csv'
  path.write_text(f'client,first,last\n0,1,2\n{line}\n')
  with pytest.raises(ValueError, match='Line 3 of .*trace.csv must be a client from'):
    simulation.Availability.from_csv(path, 3)


@pytest.mark.parametrize(
    ('kwargs', 'expected'),
    [
        ({}, 4), (dict(delay_share=0.5, max_delay=1), 8),
        (dict(delay_share=0.5, max_delay=2), 9), (dict(sampling='poisson'), 9),
    ],
)
def test_the_largest_number_of_reports(kwargs, expected):
  participation = simulation.Participation(num_clients=9, clients_per_round=4, **kwargs)
  assert participation.max_reports == expected


def test_cohorts_stand_beside_the_numbers():
  participation = simulation.Participation(
      num_clients=4, clients_per_round=4, sampling='cyclic', cohort_fn=lambda k: k % 2
  )
  assert participation(1)[3] == {'cohort': 1, 'data': 3}


@pytest.mark.parametrize(
    'bad, message',
    [
        ({'clients_per_round': 5}, '`clients_per_round` must be from 1 to the 4 clients'),
        ({'sampling': 'some'}, '`sampling` must be one of'),
        ({'sampling': 'weighted'}, "`weights` are needed for sampling='weighted'"),
        ({'dropout_before': 1.5}, '`dropout_before` must be from 0 to 1, found 1.5'),
        ({'straggler_steps': 0.0}, '`straggler_steps` must be above 0'),
        ({'max_delay': 2}, '`delay_share` and `max_delay` must both be above 0'),
    ],
)
def test_refusals(bad, message):
  with pytest.raises(ValueError, match=message):
    simulation.Participation(**{'num_clients': 4, 'clients_per_round': 2, **bad})
