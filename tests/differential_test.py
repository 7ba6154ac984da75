"""Private sums through the real runtime: what is added, what is let through, refused."""

import collections
import dataclasses
import math

import dp_accounting
import keras
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
from tff_kd.compat import tff

from tests import helpers
import tff_kd
from tff_kd.client import exchanges
from tff_kd.client import prototypes
from tff_kd import knowledge
from tff_kd import models
from tff_kd.models import cohorts
from tff_kd import privacy
from tff_kd.rounds import description
from tff_kd.server import distill
from tff_kd import simulation

_UNIFORM = tff.learning.ClientWeighting.UNIFORM
_CLIENTS = [helpers.dataset(*helpers.examples(8, k)) for k in range(4)]
_TRANSFER = tff_kd.TransferSet(helpers.examples(16, 99)[0])
_NAN = helpers.dataset(np.nan * helpers.examples(8, 8)[0], helpers.examples(8, 8)[1])
_EMPTY = helpers.dataset(*helpers.examples(0, 8))


def _dp(noise=1.0, clients=4, **kwargs):
  clips = dict(model_clip=1.0, knowledge_clip=1.0)
  return privacy.DifferentialPrivacy(
      noise_multiplier=noise, clients_per_round=clients, **{**clips, **kwargs}
  )


_OPEN = _dp(0.0, model_clip=math.inf, knowledge_clip=math.inf)
_BUILDERS = {
    'fed_avg': lambda **kwargs: helpers.build(
        'fed_avg', client_weighting=_UNIFORM, **kwargs
    ),
    'fed_df': lambda **kwargs: helpers.build(
        'fed_df', client_weighting=_UNIFORM, transfer_set=_TRANSFER, **kwargs
    ),
    'fed_distillation': lambda **kwargs: helpers.build(
        'fed_distillation', client_weighting=_UNIFORM, transfer_set=_TRANSFER,
        teacher_fn=helpers.dense_fn((6,)), **kwargs,
    ),
    'ds_fl': lambda **kwargs: helpers.build('ds_fl', transfer_set=_TRANSFER, **kwargs),
    'fd': lambda **kwargs: helpers.build('fd', **kwargs),
}


@helpers.shared
def _build(name, **kwargs):
  return _BUILDERS[name](**kwargs)


def _draw(factory, value, rounds, clients=1):
  """The results of so many rounds in which all clients have one value."""
  value_type = tff.types.tensorflow_to_type(
      tf.nest.map_structure(lambda v: tf.TensorSpec(v.shape, v.dtype), value)
  )
  process = factory.create(value_type)
  state, results = process.initialize(), []
  for _ in range(rounds):
    output = process.next(state, [value] * clients)
    state = output.state
    results.append(output.result)
  return results, state


def _assert_stddev(draws, stddev):
  """A two-sided chi-square test of normal draws of mean 0, at one in 100,000."""
  draws = np.ravel(draws)
  statistic = np.sum(np.square(draws / stddev))
  low, high = scipy.stats.chi2.ppf([5e-6, 1 - 5e-6], draws.size)
  assert low < statistic < high
  assert scipy.stats.kstest(draws / stddev, 'norm').pvalue > 1e-5


@pytest.mark.parametrize('clip', [0.5, 3.0])
def test_the_noise_on_weights_is_as_stated(clip):
  factory = _dp(1.7, clients=10, model_clip=clip).build_factory('model', ['model'])
  value = [np.zeros((30, 40), np.float32), np.zeros(300, np.float32)]
  results, state = _draw(factory, value, 4)
  draws = [np.concatenate([np.ravel(leaf) for leaf in its]) for its in results]
  _assert_stddev(draws, 1.7 * clip / 10)
  # Every round has its own.
  assert abs(np.corrcoef(draws[0], draws[1])[0, 1]) < 0.15
  event = tff.aggregators.differential_privacy.extract_dp_event_from_state(state)
  assert event.noise_multiplier == pytest.approx(1.7)


def test_the_seed_of_a_run_does_not_tell_the_noise():
  draws = []
  for _ in range(2):
    keras.utils.set_random_seed(0)
    factory = _dp().build_factory('model', ['model'])
    draws.append(_draw(factory, np.zeros(500, np.float32), 1)[0])
  assert abs(np.corrcoef(np.ravel(draws[0]), np.ravel(draws[1]))[0, 1]) < 0.25


def test_the_noise_on_predictions_is_as_stated():
  payload = knowledge.KnowledgePayload(
      np.zeros((200, 10), np.float32), np.zeros(200, np.float32)
  )
  dp = _dp(2.0, clients=5, knowledge_clip=3.0)
  factory = dp.build_factory('knowledge', ['knowledge'], has_unit_weights=True)
  results, _ = _draw(factory, payload, 3)
  _assert_stddev([its.values for its in results], 2.0 * 3.0 / 5)
  for its in results:
    np.testing.assert_array_equal(its.weights, 1.0)


def test_weights_that_are_secret_are_noised_too():
  # So large that they stand out from the noise.
  payload = knowledge.KnowledgePayload(
      np.zeros((100, 10), np.float32), np.full(100, 100.0, np.float32)
  )
  dp = _dp(0.01, clients=5, knowledge_clip=1000.0)
  factory = dp.build_factory('knowledge', ['knowledge'])
  results, _ = _draw(factory, payload, 4, clients=5)
  _assert_stddev([its.values for its in results], 0.01 * 1000 / 5)
  _assert_stddev([its.weights - 100.0 for its in results], 0.01 * 1000 / 5)
  # Where they do not, nothing counts as said.
  nothing = knowledge.KnowledgePayload(payload.values, np.zeros(100, np.float32))
  results, _ = _draw(factory, nothing, 3, clients=5)
  said = np.array([its.weights for its in results]) > 0
  assert said.mean() < 0.02  # Three standard deviations: .00135.
  for its in results:
    np.testing.assert_array_equal(its.values[its.weights == 0], 0.0)


def test_two_channels_share_what_the_account_says():
  dp = _dp(1.5, clients=8, knowledge_share=0.2)
  noise = dp.noise_multipliers(['model', 'knowledge'])
  assert privacy.composed_noise(list(noise.values())) == pytest.approx(1.5)
  assert noise['knowledge'] == pytest.approx(1.5 / math.sqrt(0.2))
  sent = ['model', 'knowledge']
  results, _ = _draw(dp.build_factory('model', sent), np.zeros(2000, np.float32), 1)
  _assert_stddev(results, noise['model'] / 8)
  payload = knowledge.KnowledgePayload(
      np.zeros((200, 10), np.float32), np.ones(200, np.float32)
  )
  factory = dp.build_factory('knowledge', sent, has_unit_weights=True)
  results, _ = _draw(factory, payload, 1)
  _assert_stddev(results[0].values, noise['knowledge'] / 8)
  accountant = privacy.build_accountant(
      description.Protection(tuple(sent), dp),
      sampling=privacy.ClientSampling(num_clients=80, clients_per_round=8),
      delta=1e-5,
  )
  alone = privacy.PrivacyAccountant([1.5], accountant.sampling, 1e-5)
  assert accountant.epsilon(9) == pytest.approx(alone.epsilon(9), rel=1e-6)


def test_an_adaptive_clip_is_in_the_account():
  factory = _dp(1.2, clients=20, model_clip='adaptive').build_factory('model', ['model'])
  # Norms above the clip: it grows, and the noise with it.
  value = np.full(1000, 1.0, np.float32)
  _, state = _draw(factory, value, 3, clients=20)
  event = tff.aggregators.differential_privacy.extract_dp_event_from_state(state)
  costs = [
      dp_accounting.rdp.RdpAccountant().compose(its).get_epsilon(1e-5)
      for its in (event, dp_accounting.GaussianDpEvent(1.2))
  ]
  assert costs[0] == pytest.approx(costs[1], rel=1e-3)
  assert state.query_state.numerator_state.sum_state.l2_norm_clip > 0.1


@pytest.mark.parametrize('channel', ['model', 'knowledge'])
@pytest.mark.parametrize('scale', [1e-3, 1.0, 1e4])
def test_one_client_moves_a_sum_by_its_clip_at_most(channel, scale):
  dp = _dp(0.0, clients=5, model_clip=2.0, knowledge_clip=2.0)
  rng = np.random.default_rng(0)
  values = np.float32(scale * rng.normal(size=(20, 3)))
  if channel == 'model':
    value = [values, values[0]]
  else:
    value = knowledge.KnowledgePayload(values, np.float32(scale * rng.random(20)))
  results, _ = _draw(dp.build_factory(channel, [channel]), value, 1)
  before = np.linalg.norm(np.concatenate([np.ravel(leaf) for leaf in value]))
  after = 5 * np.linalg.norm(np.concatenate([np.ravel(leaf) for leaf in results[0]]))
  assert after == pytest.approx(min(2.0, before), rel=1e-4)


@pytest.mark.parametrize(
    'name',
    ['fed_df', *helpers.slow_each('ds_fl', 'fed_avg', 'fed_distillation')],
)
def test_without_noise_and_clip_a_run_is_the_plain_one(name):
  plain, plain_kept = helpers.rounds(_build(name), _CLIENTS)
  private, kept = helpers.rounds(_build(name, privacy=_OPEN), _CLIENTS)
  for field in ('global_model_weights', 'teacher_weights'):
    if tf.nest.flatten(getattr(plain.state, field, ())):
      helpers.assert_weights_close(
          getattr(private.state, field), getattr(plain.state, field), rtol=0, atol=0
      )
  if kept is not None:
    helpers.assert_weights_close(kept[0].weights, plain_kept[0].weights, rtol=0, atol=0)


@dataclasses.dataclass(frozen=True)
class _Weighing(knowledge.WrappedRule):
  """A rule whose weights are not the inner rule's."""

  def encode(self, logits):
    return knowledge.payload_of(logits, tf.reduce_max(tf.nn.softmax(logits), -1))


def test_weights_that_a_wrapping_rule_gives_are_in_the_sum():
  mean = knowledge.MeanLogits()
  assert knowledge.WrappedRule(mean).has_unit_weights
  assert not _Weighing(mean).has_unit_weights
  plain, private = [
      helpers.rounds(_build('fed_df', consensus_rule=_Weighing(mean), **its), _CLIENTS)[0]
      for its in ({}, dict(privacy=_OPEN))
  ]
  helpers.assert_weights_close(
      private.state.global_model_weights, plain.state.global_model_weights, rtol=1e-5
  )


@pytest.mark.parametrize(
    'name',
    [
        'fed_avg', 'fd', *helpers.slow_each('fed_distillation', 'fed_df', 'ds_fl'),
    ],
)
def test_what_clients_measure_is_not_released(name):
  process = _build(name, privacy=_dp())
  names = simulation.process_metric_names(process)
  assert not [its for its in names if its.startswith('client_work')]
  assert process.protection.channels == (
      ('model',) if name == 'fed_avg'
      else ('model', 'knowledge') if name in ('fed_df', 'fed_distillation')
      else ('knowledge',)
  )
  output, _ = helpers.rounds(process, _CLIENTS, 1)
  assert not [v for v in tf.nest.flatten(output.metrics.get('client_work', ()))]
  each = tff_kd.communication.round_bytes(process)
  moved = tff_kd.communication.ledger(each, {}, 4)
  assert moved['bytes/client'] == each.total
  assert sum(v for k, v in moved.items() if k != 'bytes/client') == 4 * each.total


@pytest.mark.parametrize('name', [helpers.slow('fed_distillation'), 'fd'])
def test_bad_clients_count_as_zeros_and_a_round_may_be_empty(name):
  process = _build(name, privacy=_dp())
  for clients in ([_NAN, _EMPTY, _CLIENTS[0], _CLIENTS[1]], []):
    output, _ = helpers.rounds(process, clients)
    for leaf in tf.nest.flatten(output.state):
      if np.issubdtype(np.asarray(leaf).dtype, np.floating):
        assert np.all(np.isfinite(leaf))


def test_fd_learns_from_what_stands_out():
  # Nearly no noise: the classes' means are known, their own part in them.
  process = _build('fd', privacy=_dp(1e-4, knowledge_clip=1e3))
  output, kept = helpers.rounds(process, _CLIENTS)
  assert np.all(output.state.shared.weights > 0)
  # Drowned: nothing is.
  process = _build('fd', privacy=_dp(1e4))
  output, _ = helpers.rounds(process, _CLIENTS)
  assert np.mean(output.state.shared.weights > 0) < 0.5


def _exchanges():
  """The exchanges whose `share` looks at the number of included clients."""
  student = helpers.model_spec(helpers.features_fn(4))
  stage = distill.DistillationStage(
      'student', helpers.sgd(),
      tff_kd.Distillation(target='ensemble', num_steps=1, batch_size=4),
  )
  labels = exchanges.TransferExchange(
      student, _TRANSFER, knowledge.MeanLogits(), stage,
      relabelling=knowledge.MeanLogits(),
  )
  found = [
      exchanges.ClassExchange(student, 1.0),
      prototypes.PrototypeExchange(cohorts.as_students(student), 1.0),
      labels,
  ]
  model = models.BoundModel(student, student.values(student.initial_weights))
  return [(each.with_inexact_sums(), model) for each in found]


def _filled(exchange, value):
  return tf.nest.map_structure(
      lambda spec: tf.fill(spec.shape, tf.cast(value, spec.dtype)),
      exchange.payload_spec(),
  )


def test_the_same_noised_mean_is_shared_whoever_is_in_it():
  for exchange, model in _exchanges():
    mean, round_num = _filled(exchange, 1.5), tf.constant(0)
    private = exchange.share(mean, None, model, round_num)
    # No factor of it, and no emptiness: the same as of any number of clients.
    for number in (1.0, 7.0):
      public = exchange.share(mean, tf.constant(number), model, round_num)
      for a, b in zip(tf.nest.flatten(private), tf.nest.flatten(public), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.any(tf.nest.flatten(private)[-1])
    # A mean of nobody, without noise.
    nobody = exchange.share(_filled(exchange, np.nan), None, model, round_num)
    assert not np.any(tf.nest.flatten(nobody)[-1])


def test_what_is_shared_is_not_made_of_the_number_of_clients(monkeypatch):
  given = []
  share = exchanges.ClassExchange.share

  def recorded(self, mean_payload, num_included, *args):
    given.append(num_included)
    return share(self, mean_payload, num_included, *args)

  monkeypatch.setattr(exchanges.ClassExchange, 'share', recorded)
  for protections, tells in (({'privacy': _dp(2.0)}, False), ({}, True)):
    helpers.build('fd', **protections)
    assert given and all((number is not None) == tells for number in given)
    given.clear()


def _reporting(**kwargs):
  data = helpers.batches([helpers.examples(4, k) for k in range(2)])
  return dict(client_data=data, reporting=tff_kd.Reporting(**kwargs))


@pytest.mark.parametrize(
    'name, kwargs, message',
    [
        (
            'fed_avg',
            dict(client_weighting=tff.learning.ClientWeighting.NUM_EXAMPLES),
            '`client_weighting` must be UNIFORM, .* a weight without a bound',
        ),
        (
            'fed_df',
            dict(knowledge_weighting=tff.learning.ClientWeighting.NUM_EXAMPLES),
            '`knowledge_weighting` must be UNIFORM',
        ),
        (
            'ds_fl',
            dict(knowledge_weighting=tff.learning.ClientWeighting.NUM_EXAMPLES),
            '`knowledge_weighting` must be UNIFORM',
        ),
        (
            'fed_avg',
            dict(model_aggregator=tff.learning.robust_aggregator()),
            '`model_aggregator` must be None, .* is not in the account',
        ),
        (
            'fed_avg',
            dict(metrics_aggregator=tff.learning.metrics.sum_then_finalize),
            'metrics would be released without noise',
        ),
        (
            'fed_avg',
            dict(student_fn=[helpers.dense_fn(), helpers.dense_fn((4,))]),
            'one student only',
        ),
        (
            'fed_avg',
            dict(student_fn=lambda: keras.Sequential([
                keras.layers.InputLayer((helpers.DIM,)),
                keras.layers.BatchNormalization(), keras.layers.Dense(helpers.CLASSES),
            ])),
            'as those of BatchNormalization: noise makes a variance negative',
        ),
        (
            'ds_fl',
            dict(consensus_rule=knowledge.Quantized(knowledge.MeanProbabilities(), 1)),
            'the length of a code tells what is in it',
        ),
        ('fed_avg', _reporting(max_delay=2), '`max_delay` must be 0, found 2'),
        ('fed_avg', _reporting(min_reports=2), '`min_reports` must be 0, found 2'),
        ('fd', dict(privacy=_dp(knowledge_clip='adaptive')), 'must be a number'),
        (
            'fed_avg',
            dict(
                privacy=_dp(model_clip='adaptive'),
                secure_aggregation=privacy.SecureAggregation(),
            ),
            '`model_clip` that is a number',
        ),
        ('fed_avg', dict(privacy=1.0), 'must be a `tff_kd.privacy.Differential'),
        (
            'fed_avg', dict(privacy=_dp(channels=['knowledge'])),
            r"names \['knowledge'\], which this .* does not send.* sends \['model'\]",
        ),
    ],
)
def test_a_false_guarantee_is_refused_with_its_reason(name, kwargs, message):
  common = dict(privacy=_dp(), client_weighting=_UNIFORM)
  if name in ('fed_df', 'ds_fl'):
    common['transfer_set'] = _TRANSFER
  if name in ('ds_fl', 'fd'):
    del common['client_weighting']
  with pytest.raises((TypeError, ValueError), match=message):
    helpers.build(name, **{**common, **kwargs})


def test_a_companion_that_exchanges_is_refused():
  with pytest.raises(ValueError, match='no FeatureGenerator: what it exchanges'):
    helpers.build(
        'fed_gen', student_fn=helpers.dense_fn((4,)), client_weighting=_UNIFORM,
        privacy=_dp(),
    )


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(noise=-1.0), '`noise_multiplier` must be finite, 0 or more, found -1'),
        (dict(clients=0), '`clients_per_round` must be 1 or more, found 0'),
        (dict(model_clip=0.0), "`model_clip` must be above 0, or 'adaptive', found 0"),
        (dict(knowledge_clip='much'), "found 'much'"),
        (dict(model_clip=math.inf), '`model_clip` must be finite: without a clip'),
        (dict(knowledge_share=1.0), '`knowledge_share` must be between 0 and 1'),
        (dict(channels=['weights']), "must be of 'model' and 'knowledge'"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
  with pytest.raises(ValueError, match=message):
    _dp(**kwargs)


def test_whole_numbers_cannot_be_noised():
  factory = _dp().build_factory('model', ['model'])
  with pytest.raises(TypeError, match='Only floating numbers can be noised'):
    factory.create(tff.to_type(collections.OrderedDict(a=np.float32, b=np.int32)))


_SAMPLING = privacy.ClientSampling(num_clients=4, clients_per_round=2)
_POISSON = privacy.ClientSampling(
    num_clients=4, clients_per_round=2, sampling='poisson'
)


def _accountant(process, sampling=_SAMPLING, **kwargs):
  return privacy.build_accountant(
      process.protection, sampling=sampling, delta=1e-5, **kwargs
  )


def _train(process, num_rounds, **kwargs):
  return simulation.train(
      process, select_clients=lambda n: _CLIENTS[:2], num_rounds=num_rounds,
      progress_bar=False, **kwargs,
  )


def test_training_counts_ends_at_the_budget_and_goes_on_with_the_count(tmp_path):
  process = _build('fed_avg', privacy=_dp(clients=2))
  whole = _accountant(process)
  for round_num in (1, 2, 3, 3):
    whole.begin_round(round_num)
  most = whole.epsilon()

  def train(num_rounds):
    accountant = _accountant(
        process, max_epsilon=most, ledger_path=tmp_path / 'privacy.json'
    )
    saved = simulation.Checkpoints(tmp_path / 'checkpoints')
    return accountant, _train(
        process, num_rounds, program_state_manager=saved, accountant=accountant
    )

  accountant, result = train(2)
  costs = [its['privacy/epsilon'] for its in result.history]
  assert costs == [accountant.epsilon(1), accountant.epsilon(2)]
  assert not result.budget_spent
  # A round that was begun, and lost, has been seen all the same.
  accountant.begin_round(3)
  accountant, result = train(9)
  assert result.budget_spent and result.round_num == 3
  assert [its['privacy/rounds'] for its in result.history] == [4]
  assert accountant.epsilon() == most > accountant.epsilon(4)
  # The checkpoint knows it without the file.
  (tmp_path / 'privacy.json').unlink()
  accountant, result = train(9)
  assert accountant.rounds == 4 and not result.history


def test_a_resumed_training_keeps_to_its_noise_clip_and_account(tmp_path):
  def train(folder, num_rounds, accounted, **changes):
    process = _build('fed_avg', privacy=_dp(clients=2, **changes))
    return _train(
        process, num_rounds, accountant=_accountant(process) if accounted else None,
        program_state_manager=simulation.Checkpoints(tmp_path / folder),
    )

  for folder, accounted in (('accounted', True), ('not', False)):
    train(folder, 1, accounted)
    for changes, message in (
        # Its rounds would still have the old noise.
        (dict(noise=10.0), 'privacy/noise_multiplier: 1.0 there, 10.0 here'),
        (dict(model_clip=5.0), 'privacy/model_clip: 1.0 there, 5.0 here'),
    ):
      with pytest.raises(simulation.CheckpointError, match=message):
        train(folder, 2, accounted, **changes)
    message = 'has the account of' if accounted else 'made without an `accountant`'
    with pytest.raises(simulation.CheckpointError, match=message):
      train(folder, 2, not accounted)
    assert len(train(folder, 2, accounted).history) == 1


@pytest.mark.parametrize(
    'clip, changes, message',
    [
        (privacy.differential.ADAPTIVE, dict(noise=3.0), r'multiplier: 1\..*, 3\.'),
        (1.0, dict(model_clip=5.0), 'l2_norm_clip: 1.0 there, 5.0 here'),
    ],
)
def test_a_state_of_another_noise_or_clip_is_no_beginning(clip, changes, message):
  def train(initial_state, **kwargs):
    process = _build('fed_avg', privacy=_dp(clients=2, **{'model_clip': clip, **kwargs}))
    return _train(process, 2, initial_state=initial_state).state

  # What is learned of an adaptive clip goes on.
  state = train(train(None))
  with pytest.raises(ValueError, match=f'another `privacy`.*{message}.*Begin with'):
    train(state, **changes)
  process = _build('fed_avg', privacy=_dp(clients=2, **{'model_clip': clip, **changes}))
  weights = process.get_model_weights(state)
  train(process.set_model_weights(process.initialize(), weights), **changes)


def test_training_from_round_1_again_is_accounted_as_the_same_clients_again():
  process = _build('fed_avg', privacy=_dp(clients=2))
  accountant, state = _accountant(process), None
  for num_rounds in (2, 1):
    state = _train(
        process, num_rounds, initial_state=state, accountant=accountant
    ).state
  expected = _accountant(process)
  for round_num in (1, 1, 2):
    expected.begin_round(round_num)
  assert accountant.saved() == expected.saved()
  assert accountant.epsilon() == expected.epsilon() > accountant.epsilon(3)


def test_an_accountant_of_something_else_is_refused():
  dp = _dp(clients=2)
  process, plain = _build('fed_avg', privacy=dp), _build('fed_avg')
  with pytest.raises(ValueError, match='is not built with `privacy`'):
    privacy.build_accountant(plain.protection, sampling=None, delta=1e-5)
  accountant = _accountant(process, _POISSON)
  chosen = simulation.Participation(num_clients=4, clients_per_round=2)
  for its, select, message in (
      (plain, chosen, 'needs a process that is built with `privacy`'),
      (process, chosen, 'of the sampling that happens'),
      (_build('fed_avg', privacy=_dp(clients=3)), lambda n: [], 'must agree on'),
  ):
    with pytest.raises(ValueError, match=message):
      simulation.train(its, select_clients=select, num_rounds=1, accountant=accountant)
  # Epsilon would be that of noise which nobody adds.
  accountant = privacy.PrivacyAccountant([50.0], _POISSON, 1e-5)
  with pytest.raises(ValueError, match="{'model': 1.0}, worth one of 1: found one of 50"):
    simulation.train(
        process, select_clients=lambda n: [], num_rounds=1, accountant=accountant
    )


def test_poisson_sampling_is_each_client_by_itself():
  participation = simulation.Participation(
      num_clients=30, clients_per_round=6, sampling='poisson', seed=2**100
  )
  rounds = 400
  drawn = np.zeros((rounds, 30))
  for n in range(rounds):
    drawn[n, participation(n + 1)] = 1
  low, high = scipy.stats.binom.ppf([1e-6, 1 - 1e-6], rounds, 0.2)
  assert np.all((low <= drawn.sum(0)) & (drawn.sum(0) <= high))
  # Independent: the size of a round varies as a binomial's.
  assert drawn.sum(1).var() == pytest.approx(30 * 0.2 * 0.8, rel=0.3)
  again = simulation.Participation(
      num_clients=30, clients_per_round=6, sampling='poisson', seed=2**100
  )
  assert again(7) == participation(7)
  assert participation.counts(7)['num_missing'] == 0


def test_how_many_came_is_not_told():
  dp = _dp(clients=2)
  data = helpers.batches([helpers.examples(3, k) for k in range(4)])
  process = _build('fed_avg', privacy=dp, client_data=data)
  result = simulation.train(
      process,
      select_clients=simulation.Participation(
          num_clients=4, clients_per_round=2, sampling='poisson'
      ),
      num_rounds=6,
      accountant=_accountant(process, _POISSON),
  )
  for row in result.history:
    assert not [name for name in row if 'num_' in name]
    assert row['bytes/up_model'] == result.history[0]['bytes/up_model']
