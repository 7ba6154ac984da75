"""What a few bad clients can do to the means, and what they cannot."""

import collections

import hypothesis
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
from tff_kd.compat import tff

import tff_kd
from tests import helpers
from tff_kd.aggregators import robust
from tff_kd import knowledge

_GOOD = [helpers.dataset(*helpers.examples(4 + k, k)) for k in range(4)]
# Learning from it takes the weights very far, to numbers that are finite.
_HUGE = helpers.dataset(1e6 * helpers.examples(5, 8)[0], helpers.examples(5, 8)[1])
_NAN = helpers.dataset(np.nan * helpers.examples(5, 8)[0], helpers.examples(5, 8)[1])


def _aggregate(factory, values, weights):
  """One round of a factory over clients' values, a structure of arrays each."""
  value_type = tff.types.tensorflow_to_type(
      tf.nest.map_structure(
          lambda v: tf.TensorSpec(np.shape(v), np.float32), values[0]
      )
  )
  process = factory.create(value_type, tff.TensorType(np.float32))
  values = [tf.nest.map_structure(np.float32, value) for value in values]
  return process.next(process.initialize(), values, [np.float32(w) for w in weights])


@hypothesis.settings(deadline=None)
@hypothesis.given(
    values=hnp.arrays(
        np.float64, st.tuples(st.integers(1, 9), st.integers(1, 3)),
        elements=st.floats(-100, 100),
    ),
    share=st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5]),
    seed=st.integers(0, 99),
)
def test_trimmed_mean_is_the_textbooks(values, share, seed):
  rng = np.random.default_rng(seed)
  is_there = rng.random(len(values)) < 0.7
  found = robust.trimmed_mean(tf.constant(values), tf.constant(is_there), share)
  left = values[is_there]
  if not len(left):
    expected = np.zeros(values.shape[1])
  elif share == 0.5:
    expected = np.median(left, axis=0)
  else:
    expected = scipy.stats.trim_mean(left, share, axis=0)
  np.testing.assert_allclose(found, expected, atol=1e-9)
  order = rng.permutation(len(values))
  again = robust.trimmed_mean(
      tf.constant(values[order]), tf.constant(is_there[order]), share
  )
  np.testing.assert_allclose(again, found, atol=1e-9)


@hypothesis.settings(deadline=None)
@hypothesis.given(
    bad=st.integers(1, 3), size=st.floats(1, 1e30), seed=st.integers(0, 99)
)
def test_few_bad_values_stay_without_effect(bad, size, seed):
  rng = np.random.default_rng(seed)
  values = rng.normal(size=(7, 4))
  good = values[bad:].copy()
  values[:bad] = size * rng.choice([-1, 1, np.nan, np.inf], (bad, 4))
  found = robust.trimmed_mean(tf.constant(values), tf.ones([7], tf.bool), 0.5)
  assert (found >= good.min(axis=0)).numpy().all()
  assert (found <= good.max(axis=0)).numpy().all()


def test_the_middle_is_weighted():
  found = robust.trimmed_mean(
      tf.constant([9.0, 1.0, 2.0, 4.0, -7.0]), tf.ones([5], tf.bool), 0.2,
      tf.constant([8.0, 1.0, 1.0, 2.0, 8.0]),
  )
  np.testing.assert_allclose(found, (1 + 2 + 2 * 4) / 4)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -1e30, 30.0])
def test_what_is_out_of_bounds_is_left_out_of_the_mean(bad):
  value = collections.OrderedDict(a=[1.0, 2.0], b=[[3.0]])
  other = collections.OrderedDict(a=[2.0, 4.0], b=[[-3.0]])
  spoilt = collections.OrderedDict(a=[1.0, 2.0], b=[[bad]])
  output = _aggregate(
      robust.NormBoundFactory(10.0), [value, spoilt, other, spoilt], [1, 5, 3, 0]
  )
  helpers.assert_weights_close(output.result, [[1.75, 3.5], [[-1.5]]], rtol=1e-6)
  # The other one has no weight anyhow.
  assert output.measurements['num_left_out'] == 1


def test_where_all_are_left_out_the_mean_is_none():
  output = _aggregate(robust.NormBoundFactory(1.0), [[3.0], [4.0]], [1, 1])
  assert output.measurements['num_left_out'] == 2
  assert np.isnan(output.result).all()


def test_the_median_counts_clients_and_not_their_claims():
  output = _aggregate(
      robust.TrimmedMeanFactory(9), [[1.0], [2.0], [50.0], [-4.0]], [1, 1, 1e9, 0]
  )
  np.testing.assert_array_equal(output.result, [2.0])
  assert output.measurements['num_clients'] == 3


def test_of_nobody_weights_have_no_median_and_predictions_are_missing():
  factory, nobody = robust.TrimmedMeanFactory(9), [0, 0]
  output = _aggregate(factory, [[1.0, 2.0], [3.0, 4.0]], nobody)
  assert np.isnan(output.result).all() and output.measurements['num_clients'] == 0
  payload = knowledge.KnowledgePayload(np.ones([3, 2]), np.ones([3]))
  output = _aggregate(factory, [payload] * 2, nobody)
  helpers.assert_weights_close(output.result, payload.__class__(0.0, 0.0), atol=0)


def test_a_sample_is_of_that_size():
  output = _aggregate(
      robust.TrimmedMeanFactory(3), [[float(k)] for k in range(8)], [1] * 8
  )
  assert output.measurements['num_clients'] == 3
  assert output.result[0] in range(8)


def test_of_predictions_the_missing_do_not_count():
  def payload(values, weights):
    return knowledge.KnowledgePayload(
        np.array(values)[:, np.newaxis] * np.array(weights)[:, np.newaxis],
        np.array(weights),
    )

  output = _aggregate(
      robust.TrimmedMeanFactory(5),
      [
          payload([1.0, 5.0, 0.0], [1.0, 1.0, 0.0]),
          payload([2.0, 0.0, 0.0], [2.0, 0.0, 0.0]),
          payload([90.0, 7.0, 0.0], [1e9, 3.0, 0.0]),
      ],
      [1, 1, 1],
  )
  consensus = knowledge.MeanLogits().decode(
      knowledge.KnowledgePayload(*(tf.constant(its) for its in output.result))
  )
  # Of two in the middle: their mean by certainty, 1 and 3.
  np.testing.assert_allclose(consensus.logits[:, 0], [2.0, 6.5, 0.0], rtol=1e-6)
  np.testing.assert_array_equal(consensus.mask, [1, 1, 0])


@pytest.mark.parametrize(
    'build, said',
    [
        (lambda: robust.NormBoundFactory(0.0), 'above 0, found 0'),
        (lambda: robust.NormBoundFactory(float('nan')), 'found nan'),
        (lambda: robust.TrimmedMeanFactory(0), 'positive integer, found 0'),
        (lambda: robust.TrimmedMeanFactory(3, 0.6), 'from 0 to .5, found 0.6'),
        (
            lambda: _fed_df(
                consensus_rule=knowledge.CertaintyWithDiversity(),
                knowledge_aggregator=robust.TrimmedMeanFactory(3),
            ),
            'needs sums',
        ),
        (
            lambda: helpers.build(
                'fed_avg', knowledge_aggregator=robust.NormBoundFactory(1.0)
            ),
            'no predictions',
        ),
    ],
)
def test_what_cannot_be_is_refused(build, said):
  with pytest.raises(ValueError, match=said):
    build()


@helpers.shared
def _fed_df(**kwargs):
  defaults = dict(
      transfer_set=tff_kd.TransferSet(helpers.examples(12, 99)[0]),
      student_optimizer=helpers.sgd(),
      distillation=tff_kd.Distillation(num_steps=2, batch_size=4),
  )
  return helpers.build('fed_df', **{**defaults, **kwargs})


_BOUNDED = dict(
    model_aggregator=robust.NormBoundFactory(100.0),
    knowledge_aggregator=robust.NormBoundFactory(1000.0),
)


def _round(process, cohort):
  output = process.next(process.initialize(), cohort)
  assert all(np.isfinite(w).all() for w in tf.nest.flatten(output.state))
  return output


def _assert_same_models(output, expected, **kwargs):
  helpers.assert_weights_close(
      output.state.global_model_weights, expected.state.global_model_weights, **kwargs
  )


def test_one_nan_client_is_counted_and_has_no_effect():
  process = _fed_df()
  output = _round(process, [*_GOOD, _NAN])
  _assert_same_models(output, _round(process, _GOOD), atol=1e-6)
  counts = output.metrics['client_work']['participation']
  assert counts['num_included'] == 4 and counts['num_excluded_non_finite'] == 1


def test_one_huge_client_is_counted_and_has_no_effect():
  process = _fed_df(**_BOUNDED)
  output = _round(process, [_GOOD[0], _HUGE, *_GOOD[1:]])
  _assert_same_models(output, _round(_fed_df(), _GOOD), atol=1e-6)
  assert output.metrics['aggregator']['model']['num_left_out'] == 1
  assert output.metrics['aggregator']['knowledge']['num_left_out'] == 1
  spoilt = _fed_df().next(_fed_df().initialize(), [*_GOOD, _HUGE]).state
  assert np.abs(spoilt.aggregated_model_weights.trainable[0]).max() > 100


def test_a_round_of_huge_clients_leaves_the_student():
  process = _fed_df(**_BOUNDED)
  state = process.initialize()
  output = process.next(state, [_HUGE, _HUGE])
  helpers.assert_weights_close(
      output.state.aggregated_model_weights, state.global_model_weights, atol=0
  )
  assert output.metrics['aggregator']['model']['num_left_out'] == 2


def test_medians_bear_one_huge_client():
  median = robust.TrimmedMeanFactory(8)
  process = _fed_df(model_aggregator=median, knowledge_aggregator=median)
  output = _round(process, [_HUGE, *_GOOD])
  assert np.abs(output.state.aggregated_model_weights.trainable[0]).max() < 3
  assert output.metrics['aggregator']['model']['num_clients'] == 5
  # Of no client there is no median: neither the student moves nor the optimizer's state.
  for cohort in ([], [_NAN]):
    after = process.next(output.state, cohort)
    assert after.metrics['finalizer']['update_non_finite'] == 1
    helpers.assert_weights_close(
        after.state.aggregated_model_weights, output.state.global_model_weights, atol=0
    )
    assert all(np.isfinite(w).all() for w in tf.nest.flatten(after.state))


@pytest.mark.slow
def test_nothing_trimmed_is_the_plain_mean():
  mean = robust.TrimmedMeanFactory(8, trimmed_share=0.0)
  weighting = tff.learning.ClientWeighting.UNIFORM
  process = _fed_df(
      model_aggregator=mean, knowledge_aggregator=mean, client_weighting=weighting
  )
  _assert_same_models(
      _round(process, _GOOD), _round(_fed_df(client_weighting=weighting), _GOOD),
      atol=1e-6,
  )


def test_tffs_own_robust_mean_takes_both_channels():
  # The first estimates are far above what good clients send.
  process = _fed_df(
      model_aggregator=tff.learning.robust_aggregator(clipping=False),
      knowledge_aggregator=tff.learning.robust_aggregator(clipping=False),
  )
  output = _round(process, [*_GOOD, _HUGE])
  for channel in ('model', 'knowledge'):
    assert output.metrics['aggregator'][channel]['zeroed_count'] == 1


@pytest.mark.parametrize('name', ['fed_md', helpers.slow('ds_fl')])
def test_algorithms_of_predictions_alone_take_them(name):
  process = helpers.build(
      name, transfer_set=tff_kd.TransferSet(helpers.examples(12, 99)[0]),
      knowledge_aggregator=robust.NormBoundFactory(
          50.0, robust.TrimmedMeanFactory(8)
      ),
  )
  state = process.initialize()
  cohort = [*_GOOD, _HUGE]
  own = [process.initialize_client() for _ in cohort]
  output = process.next(state, cohort, own)
  measured = output.metrics['aggregator']['knowledge']
  # Of probabilities, as DS-FL's, no client can send many.
  assert measured['num_left_out'] == (name == 'fed_md')
  assert measured['inner']['num_clients'] == 5 - (name == 'fed_md')


def test_the_adaptive_mean_is_tffs_compression_aggregator():
  rng = np.random.default_rng(0)
  # As large as TFF's smallest array that is rounded.
  rounds = [
      [np.float32(rng.normal(size=20001) * scale) for scale in (0.01, 0.02, 5.0)]
      for _ in range(3)
  ]
  ours = robust.build_adaptive_mean(
      True,
      True,
      tff.aggregators.MeanFactory(
          tff.aggregators.EncodedSumFactory.quantize_above_threshold(
              8, 20000, stochastic=False
          )
      ),
  )
  theirs = tff.learning.compression_aggregator(stochastic=False)
  found = []
  for factory in (ours, theirs):
    process = factory.create(
        tff.TensorType(np.float32, [20001]), tff.TensorType(np.float32)
    )
    state, results = process.initialize(), []
    for values in rounds:
      output = process.next(state, values, [np.float32(1), np.float32(2), np.float32(1)])
      state = output.state
      results.append(output.result)
    found.append((results, output.measurements))
  np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-6)
  assert found[0][1] == found[1][1]
  assert found[0][1]['zeroed_count'] + found[0][1]['zeroing']['clipped_count'] > 0
