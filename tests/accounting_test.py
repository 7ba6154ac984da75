"""What rounds cost, against dp-accounting itself and closed forms."""

import json
import math

import dp_accounting
import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from tests import helpers
from tff_kd.privacy import accounting

_SAMPLINGS = st.sampled_from(['poisson', 'uniform', 'cyclic'])


def _sampling(kind='poisson', clients=100, a_round=10):
  return accounting.ClientSampling(
      num_clients=clients, clients_per_round=a_round, sampling=kind
  )


# As ledgers have the noise and the sampling of `_accountant`.
_TERMS = {
    'noise_multiplier': 1.0,
    'sampling': {'num_clients': 100, 'clients_per_round': 10, 'sampling': 'poisson'},
}


def _accountant(z=1.0, kind='poisson', delta=1e-5, **kwargs):
  return accounting.PrivacyAccountant([z], _sampling(kind), delta, **kwargs)


@pytest.mark.parametrize('rounds', [1, 7, 30])
@pytest.mark.parametrize('noise', [[0.8], [3.0, 2.0]])
def test_epsilon_is_dp_accountings(noise, rounds):
  relation = dp_accounting.NeighboringRelation

  def epsilon(neighbors, event):
    accountant = dp_accounting.rdp.RdpAccountant(neighboring_relation=neighbors)
    accountant.compose(event, rounds)
    return accountant.get_epsilon(1e-6)

  def gaussians(scale):
    return dp_accounting.ComposedDpEvent(
        [dp_accounting.GaussianDpEvent(scale * z) for z in noise]
    )

  expected = {
      'poisson': epsilon(
          relation.ADD_OR_REMOVE_ONE,
          dp_accounting.PoissonSampledDpEvent(0.1, gaussians(1.0)),
      ),
      # A client that is replaced moves the sum by twice the clip.
      'uniform': epsilon(
          relation.REPLACE_ONE,
          dp_accounting.SampledWithoutReplacementDpEvent(100, 10, gaussians(0.5)),
      ),
  }
  for kind, value in expected.items():
    found = accounting.PrivacyAccountant(noise, _sampling(kind), 1e-6)
    assert found.epsilon(rounds) == pytest.approx(value, rel=1e-9)


def _closed_form(participations, z):
  """The epsilon of Gaussian sums without sampling, replacement, at delta 1e-5."""
  rdp = participations / (2 * (z / 2) ** 2)  # Twice the clip is the sensitivity.
  orders = np.array(dp_accounting.rdp.RdpAccountant().orders)
  orders = orders[orders > 1]
  # Canonne, Kamath and Steinke (2020), proposition 12.
  epsilons = rdp * orders + np.log1p(-1 / orders) - (
      math.log(1e-5) + np.log(orders)
  ) / (orders - 1)
  return pytest.approx(epsilons.min(), rel=1e-6)


def test_without_chance_it_is_the_closed_form():
  # 25 rounds of 10 of 100: nobody is in more than three.
  accountant = _accountant(4.0, 'cyclic')
  assert accountant.epsilon(25) == _closed_form(3, 4.0)
  assert accountant.epsilon(30) == accountant.epsilon(21)
  assert accountant.epsilon(31) > accountant.epsilon(30)


@pytest.mark.parametrize(
    'begun, participations',
    [
        ([1, 1, 1], 3),  # Clients 0 to 4, three times.
        ([1, 2, 3, 4], 1),
        ([1, 2, 3, 4, 2, 5], 3),  # Clients 0 to 4 twice, and 5 to 9 twice: a bound.
        ([1, 5, 9], 3),  # Rounds that are four apart have the same clients.
        ([3, 4, 5], 1),
    ],
)
def test_without_chance_a_round_that_begins_again_has_the_same_clients(
    begun, participations
):
  sampling = _sampling('cyclic', clients=20, a_round=5)
  accountant = accounting.PrivacyAccountant([4.0], sampling, 1e-5)
  for round_num in begun:
    accountant.begin_round(round_num)
  assert accountant.rounds == len(begun)
  assert accountant.epsilon() == _closed_form(participations, 4.0)


@pytest.mark.parametrize('kind', ['poisson', 'uniform'])
def test_a_sampled_round_that_begins_again_is_one_sample_with_less_noise(kind):
  accountant = _accountant(3.0, kind)
  for round_num in (1, 2, 2, 3, 2):
    accountant.begin_round(round_num)
  relation = dp_accounting.NeighboringRelation
  neighbors, scale = relation.REPLACE_ONE, 0.5
  if kind == 'poisson':
    neighbors, scale = relation.ADD_OR_REMOVE_ONE, 1.0
  expected = dp_accounting.rdp.RdpAccountant(neighboring_relation=neighbors)
  # Three sums of the same clients tell what one with noise / sqrt(3) does.
  for noise, count in ((3.0, 2), (3.0 / math.sqrt(3), 1)):
    gaussian = dp_accounting.GaussianDpEvent(scale * noise)
    event = dp_accounting.SampledWithoutReplacementDpEvent(100, 10, gaussian)
    if kind == 'poisson':
      event = dp_accounting.PoissonSampledDpEvent(0.1, gaussian)
    expected.compose(event, count)
  assert accountant.rounds == 5
  assert accountant.epsilon() == pytest.approx(expected.get_epsilon(1e-5), rel=1e-6)
  assert accountant.epsilon() > 1.1 * accountant.epsilon(5)


@pytest.mark.parametrize('kind', ['poisson', 'uniform', 'cyclic'])
def test_the_budget_knows_whether_the_next_round_is_a_new_one(kind):
  accountant = _accountant(3.0, kind)
  for round_num in (1, 2, 3):
    accountant.begin_round(round_num)
  new_one = accountant.epsilon(4)
  allowed = _accountant(3.0, kind, max_epsilon=new_one * (1 + 1e-9))
  allowed.restore(accountant.saved())
  assert allowed.allows_another_round(4) and not allowed.allows_another_round(3)
  with pytest.raises(RuntimeError, match='Round 3 would pass .*: 3 have begun'):
    allowed.begin_round(3)
  allowed.begin_round(4)
  assert allowed.epsilon() == pytest.approx(new_one)


@hypothesis.settings(deadline=None, max_examples=6)
@hypothesis.given(
    kind=_SAMPLINGS,
    noise=st.floats(0.5, 20.0),
    more=st.floats(1.0, 3.0),
    rounds=st.integers(1, 50),
)
def test_more_noise_costs_no_more_and_more_rounds_no_less(kind, noise, more, rounds):
  less_noise, more_noise = _accountant(noise, kind), _accountant(more * noise, kind)
  assert more_noise.epsilon(rounds) <= less_noise.epsilon(rounds) * (1 + 1e-9)
  assert less_noise.epsilon(rounds) <= less_noise.epsilon(rounds + 1)
  assert less_noise.epsilon(0) == 0.0


@hypothesis.given(z=st.lists(st.floats(0.1, 50), min_size=1, max_size=4))
def test_composed_noise_is_dp_accountings(z):
  both = dp_accounting.ComposedDpEvent([dp_accounting.GaussianDpEvent(i) for i in z])
  single = dp_accounting.GaussianDpEvent(accounting.composed_noise(z))
  costs = [
      dp_accounting.rdp.RdpAccountant().compose(event).get_epsilon(1e-5)
      for event in (both, single)
  ]
  assert costs[0] == pytest.approx(costs[1], rel=1e-6)


@pytest.mark.parametrize(
    'kind, epsilon',
    [
        ('poisson', 8.0), ('uniform', 2.0), ('cyclic', 2.0), ('cyclic', 8.0),
        *helpers.slow_each(('poisson', 2.0), ('uniform', 8.0)),
    ],
)
def test_the_noise_that_is_found_is_the_smallest(kind, epsilon):
  z = accounting.find_noise_multiplier(epsilon, 1e-5, 20, _sampling(kind))
  assert epsilon * 0.98 < _accountant(z, kind).epsilon(20) <= epsilon
  assert _accountant(z - 2e-3, kind).epsilon(20) > epsilon


def test_a_small_budget_is_found_by_large_orders():
  z = accounting.find_noise_multiplier(0.05, 1e-5, 1, _sampling())
  assert 0.045 < _accountant(z).epsilon(1) <= 0.05


def test_no_noise_is_no_privacy():
  assert _accountant(0.0).epsilon(1) == math.inf
  found = accounting.PrivacyAccountant([5.0, 0.0], _sampling(), 1e-5)
  assert found.epsilon(1) == math.inf
  assert accounting.composed_noise([5.0, 0.0]) == 0.0


def test_the_budget_ends_it_and_the_ledger_knows(tmp_path):
  path = tmp_path / 'privacy.json'
  path.write_text(json.dumps({'begun': [], 'sampling_seed': 5}))
  most = _accountant().epsilon(3)
  accountant = _accountant(max_epsilon=most, ledger_path=path)
  for n in range(1, 4):
    assert accountant.allows_another_round(n)
    accountant.begin_round(n)
    assert json.loads(path.read_text()) == {
        'begun': [[1, n, 1]], 'sampling_seed': 5, **_TERMS
    }
  assert not accountant.allows_another_round(4)
  with pytest.raises(RuntimeError, match='would pass the budget of epsilon='):
    accountant.begin_round(4)
  assert accountant.rounds == 3 and accountant.epsilon() == most


def test_another_process_goes_on_with_what_is_spent(tmp_path):
  path = tmp_path / 'privacy.json'
  first = _accountant(ledger_path=path)
  for round_num in (1, 2, 3, 4, 3, 5):
    first.begin_round(round_num)
  runs = [[1, 2, 1], [3, 3, 2], [4, 5, 1]]
  assert json.loads(path.read_text()) == {'begun': runs, **_TERMS}
  # No checkpoint takes back what the ledger knows, and both know some.
  checkpoint = _accountant()
  for round_num in (1, 2, 2):
    checkpoint.begin_round(round_num)
  again = _accountant(ledger_path=path)
  assert again.rounds == 6 and again.epsilon() == first.epsilon()
  again.restore(checkpoint.saved())
  first.begin_round(2)
  assert again.rounds == 7 and again.saved() == first.saved()


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(z=10.0), r'\(noise_multiplier: 1.0 there, 10.0 here\)'),
        (dict(kind='uniform'), "sampling: .*'poisson'.* there, .*'uniform'.* here"),
    ],
)
def test_rounds_of_another_noise_or_sampling_are_not_taken_over(
    tmp_path, change, message
):
  path = tmp_path / 'privacy.json'
  # Of no rounds it does not matter: they have spent nothing.
  _accountant(**change).restore(_accountant().saved())
  first = _accountant(ledger_path=path)
  first.begin_round(1)
  other = _accountant(**change)
  for take_over in (
      lambda: other.restore(first.saved()),
      lambda: _accountant(**change, ledger_path=path),
  ):
    with pytest.raises(ValueError, match=f'{message}.* an account of its own'):
      take_over()
  assert other.rounds == 0
  # A ledger that does not tell is of nobody knows what.
  path.write_text('{"begun": [[1, 1, 1]]}')
  with pytest.raises(ValueError, match='noise_multiplier: not known there, 1.0 here'):
    _accountant(ledger_path=path)


def test_channels_that_are_worth_the_same_noise_go_on():
  one = _accountant(accounting.composed_noise([3.0, 2.0]))
  one.begin_round(1)
  both = accounting.PrivacyAccountant([3.0, 2.0], _sampling(), 1e-5)
  both.restore(one.saved())
  assert both.rounds == 1 and both.epsilon() == pytest.approx(one.epsilon())


@pytest.mark.parametrize(
    'text',
    [
        '', '{}', '{"begun": [[1, 2, 1]]', '[]', '{"begun": [[1, 2, 0]]}',
        '{"begun": [[2, 1, 1]]}', '{"begun": [[1, 3, 1], [3, 3, 2]]}',
        '{"rounds": 3}',  # As earlier versions wrote it.
    ],
)
def test_a_damaged_ledger_is_named(tmp_path, text):
  path = tmp_path / 'privacy.json'
  path.write_text(text)
  with pytest.raises(ValueError, match='privacy.json must be the JSON .* from a copy'):
    _accountant(ledger_path=path)


@pytest.mark.parametrize(
    'call, message',
    [
        (lambda: _sampling('weighted'), "'weighted': the privacy cost of other"),
        (lambda: _sampling(a_round=101), 'from 1 to the 100 clients, found 101'),
        (lambda: _accountant(delta=1.0), '`delta` must be between 0 and 1, .* found 1'),
        (lambda: _accountant(max_epsilon=0.0), '`max_epsilon` must be above 0, found 0'),
        (
            lambda: accounting.find_noise_multiplier(1.0, 1e-5, 0, _sampling()),
            '`num_rounds` must be 1 or more, found 0',
        ),
        (lambda: _accountant().begin_round(0), '`round_num` must be 1 or more, found 0'),
        (
            lambda: _accountant().restore(np.int32(3)),  # Of a checkpoint of before.
            'does not say how often each private round has begun, .* Found .*3',
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
