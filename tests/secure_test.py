"""Secure sums: what is clipped and rounded, and that nothing else leaves a client."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tff_kd.compat import tff

from tests import helpers
import tff_kd
from tff_kd import knowledge
from tff_kd import privacy

_CLIENTS = [helpers.dataset(*helpers.examples(6 + k, k)) for k in range(4)]
_UNIFORM = tff.learning.ClientWeighting.UNIFORM
_TRANSFER = tff_kd.TransferSet(helpers.examples(16, 99)[0])
_BITS = dict(bits=16, model_bound=40.0, knowledge_bound=400.0, max_clients=4)


@helpers.shared
def _build(name, **kwargs):
  parts = dict(
      transfer_set=lambda: _TRANSFER, teacher_fn=lambda: helpers.dense_fn((6,)),
      negatives=lambda: helpers.examples(12, 98)[0], epsilon=lambda: None,
  )
  return helpers.build_with_parts(name, parts, **kwargs)


def _sum(secure, values, bound):
  value_type = tff.TensorType(np.float32, values[0].shape)
  process = secure.build_sum(bound).create(value_type)
  return process.next(process.initialize(), values).result


@pytest.mark.parametrize(
    'name, settings',
    [
        ('fed_avg', _BITS), ('fd', {}), helpers.slow('ds_fl', _BITS),
        helpers.slow('fed_distillation', {}), helpers.slow('fed_df', _BITS),
        helpers.slow('fed_aux', dict(model_bound=40.0, knowledge_bound=1.0)),
    ],
)
def test_secure_sums_change_little(name, settings):
  secure = _build(
      name, secure_aggregation=privacy.SecureAggregation(**settings)
  )
  # With the default bits, of every algorithm: `contract_test`.
  tff.test.assert_not_contains_unsecure_aggregation(secure.next)
  # Secure predictions weigh the same, whoever the client is.
  alike = {} if name in ('fed_avg', 'fd') else dict(knowledge_weighting=_UNIFORM)
  plain, plain_kept = helpers.rounds(_build(name, **alike), _CLIENTS)
  output, kept = helpers.rounds(secure, _CLIENTS)
  tolerance = 0.05 if 'bits' in settings else 1e-3
  if name == 'fed_aux':
    np.testing.assert_equal(kept, plain_kept)  # Scorers stay with their clients.
  if name == 'fd':
    # Nobody can take its own part out of a sum that is rounded.
    tolerance = 0.1
    helpers.assert_weights_close(
        kept[0].weights, plain_kept[0].weights, atol=tolerance
    )
  else:
    helpers.assert_weights_close(
        output.state.global_model_weights, plain.state.global_model_weights,
        atol=tolerance,
    )
  found, expected = output.metrics['client_work'], plain.metrics['client_work']
  assert found['train']['loss'] == pytest.approx(
      expected['train']['loss'], abs=tolerance
  )
  assert found['participation'] == expected['participation']


def _mean(secure, payloads):
  """The weighted mean of payloads of two clients, and its measurements."""
  process = secure.build_mean('knowledge').create(
      tff.types.tensorflow_to_type(
          knowledge.KnowledgePayload(*(tf.TensorSpec(t.shape) for t in payloads[0]))
      ),
      tff.TensorType(np.float32),
  )
  output = process.next(process.initialize(), payloads, [1.0, 2.0])
  return output.result, output.measurements


@pytest.mark.parametrize('groups', [(), (3,)])  # (3,): several pairs a row.
def test_rows_beyond_the_bound_say_the_same_and_count_less(groups):
  rng = np.random.default_rng(0)
  values = np.float32(rng.uniform(-4, 4, [2, 8, *groups, 5]))
  weights = np.float32(rng.uniform(0, 6, [2, 8, *groups]))
  payloads = [knowledge.KnowledgePayload(*its) for its in zip(values, weights)]
  of_client = np.float32([1, 2]).reshape(2, *[1] * weights[0].ndim)
  for secure, bound in (
      (privacy.SecureAggregation(knowledge_bound=3), 3.0),
      (privacy.SecureAggregation(bits=16, knowledge_bound=3.0, max_clients=2), 3.0),
      # The estimate begins with 100.
      (privacy.SecureAggregation(), 100.0),
  ):
    found, _ = _mean(secure, payloads)
    largest = of_client * np.maximum(np.abs(values).max(-1), weights)
    factor = of_client * np.minimum(1.0, bound / largest)
    np.testing.assert_allclose(
        found.values, (factor[..., None] * values).sum(0) / 3, atol=1e-4
    )
    np.testing.assert_allclose(found.weights, (factor * weights).sum(0) / 3, atol=1e-4)


def test_an_estimated_bound_scales_rows_and_counts_their_clients():
  payload = knowledge.KnowledgePayload(
      np.float32([[400.0, -300.0], [40.0, 30.0]]), np.float32([200.0, 10.0])
  )
  found, measured = _mean(privacy.SecureAggregation(), [payload] * 2)
  np.testing.assert_allclose(
      found.values, [[200 / 3, -150 / 3], [40, 30]], rtol=1e-5
  )
  np.testing.assert_allclose(found.weights, [100 / 3, 10], rtol=1e-5)
  assert measured['mean_value']['secure_upper_clipped_count'] == 2


def test_an_infinite_row_is_missing():
  payload = knowledge.KnowledgePayload(
      np.float32([[np.inf, 1.0], [2.0, 1.0]]), np.float32([1.0, 1.0])
  )
  found, _ = _mean(privacy.SecureAggregation(knowledge_bound=9.0), [payload] * 2)
  np.testing.assert_allclose(found.values, [[0, 0], [2, 1]], rtol=1e-5)
  np.testing.assert_allclose(found.weights, [0, 1], rtol=1e-5)


@pytest.mark.parametrize('name', ['fd', helpers.slow('fed_proto')])
def test_means_by_class_do_not_depend_on_the_bound(name):
  """Of clients that say the same."""
  means, student_fn = [], helpers.features_fn(4)
  for secure in (None, privacy.SecureAggregation(knowledge_bound=0.5)):
    output, _ = helpers.rounds(
        _build(name, student_fn=student_fn, secure_aggregation=secure),
        [_CLIENTS[3]] * 2, 1,
    )
    sums, counts = output.state.shared
    means.append(sums / counts[:, np.newaxis])
  np.testing.assert_allclose(means[1], means[0], atol=1e-4)


def test_metrics_may_be_negative():
  below = lambda: [
      keras.metrics.MeanMetricWrapper(lambda y, z: 0.0 * z[..., 0] - 3.0, name='below')
  ]
  process = _build.anew(
      'fed_avg', metrics_fn=below, secure_aggregation=privacy.SecureAggregation(**_BITS)
  )
  train = process.next(process.initialize(), _CLIENTS).metrics['client_work']['train']
  assert train['below'] == pytest.approx(-3.0, abs=1e-3)


def test_sums_are_rounded_as_stated():
  rng = np.random.default_rng(0)
  values = [np.float32(rng.uniform(-3, 3, 50)) for _ in range(5)]
  secure = privacy.SecureAggregation(
      bits=8, model_bound=2.0, knowledge_bound=2.0, max_clients=5
  )
  step = 2.0 / 127
  expected = sum(np.round(np.clip(v, -2, 2) / step) * step for v in values)
  np.testing.assert_allclose(_sum(secure, values, 2.0), expected, atol=1e-4)


def test_the_largest_sum_does_not_wrap_around():
  secure = privacy.SecureAggregation(
      bits=4, model_bound=1.0, knowledge_bound=1.0, max_clients=6
  )
  assert secure.modulus == 6 * 7 + 1 and secure.message_bits == 7
  for sign in (1, -1):
    values = [np.full(3, 9.0 * sign, np.float32)] * 6
    np.testing.assert_allclose(_sum(secure, values, 1.0), 6.0 * sign, atol=1e-5)


def test_one_more_client_than_the_modulus_is_for_wraps_around():
  # What a real protocol would do; a process refuses such a round.
  secure = privacy.SecureAggregation(
      bits=4, model_bound=1.0, knowledge_bound=1.0, max_clients=2
  )
  result = _sum(secure, [np.ones(1, np.float32)] * 3, 1.0)
  assert result[0] == pytest.approx((21 - 29) / 7)


def test_a_round_of_more_clients_is_refused():
  batches = helpers.batches([helpers.examples(6, k) for k in range(4)])
  process = _build(
      'fed_avg', client_data=batches,
      secure_aggregation=privacy.SecureAggregation(
          bits=8, model_bound=1.0, max_clients=2
      ),
  )
  state = process.initialize()
  assert process.next(state, [0, 3]).state.round_num == 1
  with pytest.raises(ValueError, match='at most 2 clients, .* found 3: .* Pass fewer'):
    process.next(state, [0, 1, 3])
  with pytest.raises(ValueError, match='clients_per_round=3, .* of 2 clients at most'):
    tff_kd.simulation.train(
        process, num_rounds=1,
        select_clients=tff_kd.simulation.Participation(
            num_clients=4, clients_per_round=3
        ),
    )


def test_thirty_two_bits_are_tffs():
  values = [np.float32([0.25, -1.5, 7.0]), np.float32([1.0, 1.0, 1.0])]
  found = _sum(privacy.SecureAggregation(), values, 2.0)
  np.testing.assert_allclose(found, [1.25, -0.5, 3.0], atol=1e-6)


@pytest.mark.parametrize('bits, needed', [helpers.slow(8, 11), (16, 19)])
def test_the_ledger_counts_elements_of_the_group(bits, needed):
  """Of 8 bits, four clients' sums need 11, of 16 bits 19; and a few for the weights."""
  process = _build(
      'fed_avg', secure_aggregation=privacy.SecureAggregation(**{**_BITS, 'bits': bits})
  )
  size = tff_kd.communication.round_bytes(process).up
  numbers = tff_kd.communication.round_bytes(_build('fed_avg')).up // 4
  assert numbers * needed / 8 <= size <= numbers * needed / 8 + 40


@pytest.mark.parametrize('name', ['fed_avg', *helpers.slow_each('fed_df', 'fed_aux')])
def test_private_and_secure(name):
  dp = privacy.DifferentialPrivacy(
      noise_multiplier=0.0, clients_per_round=4, model_clip=0.05, knowledge_clip=3.0
  )
  both = _build(
      name, client_weighting=_UNIFORM, privacy=dp,
      secure_aggregation=privacy.SecureAggregation(),
  )
  tff.test.assert_not_contains_unsecure_aggregation(both.next)
  found, _ = helpers.rounds(both, _CLIENTS)
  expected, _ = helpers.rounds(
      _build(name, client_weighting=_UNIFORM, privacy=dp), _CLIENTS
  )
  helpers.assert_weights_close(
      found.state.global_model_weights, expected.state.global_model_weights, atol=1e-3
  )


@pytest.mark.parametrize(
    'name, kwargs, message',
    [
        (
            'fed_avg',
            dict(model_aggregator=tff.learning.robust_aggregator()),
            'may need what single clients send',
        ),
        (
            'ds_fl',
            dict(consensus_rule=knowledge.TopClasses(knowledge.MeanProbabilities(), 1)),
            'what masks hide cannot be told by a code',
        ),
        (
            'fed_avg',
            dict(secure_aggregation=privacy.SecureAggregation(bits=8, max_clients=4)),
            '`model_bound` must be given',
        ),
        ('fed_avg', dict(secure_aggregation=True), 'must be a `tff_kd.privacy.Secure'),
        (
            'fed_df',
            dict(
                secure_aggregation=privacy.SecureAggregation(bits=8, max_clients=4),
                client_weighting=tff.learning.ClientWeighting.UNIFORM,
                privacy=privacy.DifferentialPrivacy(
                    noise_multiplier=1.0, clients_per_round=2, channels=('knowledge',)
                ),
            ),
            '`model_bound` must be given',
        ),
    ],
)
def test_what_is_not_secure_is_refused(name, kwargs, message):
  with pytest.raises((TypeError, ValueError), match=message):
    _build(name, **{'secure_aggregation': privacy.SecureAggregation(), **kwargs})


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(bits=1, max_clients=3), '`bits` must be an integer from 2 to 24, found 1'),
        (dict(bits=8), '`bits` needs `max_clients`'),
        (dict(bits=24, max_clients=1000), 'do not fit into 32'),
        (dict(model_bound=0.0), '`model_bound` must be finite and above 0'),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
  with pytest.raises(ValueError, match=message):
    privacy.SecureAggregation(**kwargs)
