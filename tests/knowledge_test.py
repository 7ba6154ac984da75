"""Consensus rules: sums that are what the papers' formulas say."""

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import helpers
import tff_kd
from tff_kd import knowledge
from tff_kd.knowledge import codecs
from tff_kd.knowledge import rules

# Those that take a row by itself; the aligned ones are in alignment_test.
_RULES = {
    name: rules.get(name)
    for name in rules.RULES
    if name not in ('density', 'diversity', 'given') and not name.startswith('aligned')
}
_NAMES = sorted(_RULES)


def _logits(seed, clients=4, rows=3, classes=5, scale=2.0):
  rng = np.random.default_rng(seed)
  return (scale * rng.normal(size=(clients, rows, classes))).astype(np.float32)


def _consensus(rule, logits, weights):
  """What the server makes of the clients' payloads, with clients weighted."""
  return rule.decode(helpers.mean_payload(rule, logits, weights))


def _weighted_mean(values, weights):
  return (weights[..., None] * values).sum(0) / weights.sum(0)[:, None]


def _expected(name, logits, client_weights):
  """Each rule's probabilities, from its formula."""
  z = logits.astype(np.float64)
  w = np.array(client_weights, np.float64)[:, None] * np.ones(z.shape[1])
  p = helpers.softmax(z)
  mean_p = _weighted_mean(p, w)
  entropy = -(p * np.log(p)).sum(-1)
  soft_p = helpers.softmax(z / 4)
  soft_entropy = -(soft_p * np.log(soft_p)).sum(-1)
  return {
      'mean_logits': lambda: helpers.softmax(_weighted_mean(z, w)),
      'mean_probabilities': lambda: mean_p,
      'era': lambda: helpers.softmax(mean_p / 0.1),
      'enhanced_era': lambda: mean_p**2 / (mean_p**2).sum(-1, keepdims=True),
      'variance': lambda: helpers.softmax(_weighted_mean(z, w * z.var(-1))),
      'confidence': lambda: helpers.softmax(_weighted_mean(z, w * p.max(-1))),
      'entropy': lambda: helpers.softmax(
          _weighted_mean(z, w * (1 - entropy / np.log(z.shape[-1])))
      ),
      'soft_entropy': lambda: helpers.softmax(
          _weighted_mean(z, w * (1 - soft_entropy / np.log(z.shape[-1])))
      ),
  }[name]()


@pytest.mark.parametrize('name', _NAMES)
def test_against_numpy(name):
  logits, weights = _logits(0), [3.0, 1.0, 2.0, 5.0]
  consensus = _consensus(_RULES[name], logits, weights)
  np.testing.assert_allclose(
      tf.nn.softmax(consensus.logits), _expected(name, logits, weights),
      rtol=2e-4, atol=1e-6,
  )
  np.testing.assert_array_equal(consensus.mask, 1.0)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(_NAMES), st.integers(0, 999), st.randoms())
def test_order_and_splitting_of_clients_do_not_matter(name, seed, random):
  rule = _RULES[name]
  logits = _logits(seed)
  weights = np.random.default_rng(seed).uniform(0.5, 9.0, len(logits))
  expected = tf.nn.softmax(_consensus(rule, logits, weights).logits)
  order = list(range(len(logits)))
  random.shuffle(order)
  shuffled = _consensus(rule, logits[order], weights[order])
  np.testing.assert_allclose(
      tf.nn.softmax(shuffled.logits), expected, rtol=1e-3, atol=1e-5
  )
  # The first client twice, with half of its weight each time.
  twice = _consensus(
      rule, np.concatenate([logits[:1], logits]),
      np.concatenate([weights[:1] / 2, weights[:1] / 2, weights[1:]]),
  )
  np.testing.assert_allclose(
      tf.nn.softmax(twice.logits), expected, rtol=1e-3, atol=1e-5
  )


@pytest.mark.parametrize('name', ['entropy', 'soft_entropy'])
def test_no_prediction_counts_less_than_nothing(name):
  """Of nearly equal probabilities, rounding has the entropy above the highest."""
  for classes in (2, 3, 5, 10, 100):
    logits = _logits(classes, 1, 200, classes, scale=1e-3)[0]
    assert np.min(_RULES[name].encode(tf.constant(logits)).weights) >= 0.0


@pytest.mark.parametrize('name', _NAMES)
def test_missing_rows_leave_the_others_opinion(name):
  rule = _RULES[name]
  logits = _logits(1)
  broken = logits.copy()
  broken[0, 1] = np.nan
  broken[1, 1] = np.inf
  broken[:, 2] = np.nan
  consensus = _consensus(rule, broken, [1.0] * 4)
  np.testing.assert_array_equal(consensus.mask, [1, 1, 0])
  np.testing.assert_array_equal(consensus.logits[2], 0.0)
  np.testing.assert_allclose(
      tf.nn.softmax(consensus.logits[1]),
      tf.nn.softmax(_consensus(rule, logits[2:], [1.0] * 2).logits[1]),
      rtol=1e-4, atol=1e-6,
  )


def test_consensus_is_the_weighted_mean_with_masks():
  rule = knowledge.MeanLogits()
  rng = np.random.default_rng(0)
  z = rng.normal(size=(3, 4, 2, 5)).astype('f')  # clients, rows, time, classes
  mask = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0]], 'f')
  w = np.array([1.0, 5.0, 2.0], 'f')
  said = np.where(mask[..., None, None] > 0, z, np.float32(np.nan))
  consensus = _consensus(rule, said, w)
  np.testing.assert_array_equal(consensus.mask, [1, 1, 1, 0])
  weights = (w[:, None] * mask)[..., None, None]
  with np.errstate(invalid='ignore'):
    expected = (weights * z).sum(0) / weights.sum(0)
  np.testing.assert_allclose(consensus.logits[:3], expected[:3], rtol=1e-5)
  np.testing.assert_array_equal(consensus.logits[3], 0)


def test_limits_of_sharpening():
  logits = _logits(2)
  mean = _expected('mean_probabilities', logits, [1.0] * 4)

  def probabilities(rule):
    return tf.nn.softmax(_consensus(rule, logits, [1.0] * 4).logits).numpy()

  best = np.eye(5)[mean.argmax(-1)]
  rule = knowledge.MeanProbabilities
  np.testing.assert_allclose(probabilities(rule(temperature=1e-4)), best, atol=1e-6)
  np.testing.assert_allclose(probabilities(rule(power=1e3)), best, atol=1e-6)
  np.testing.assert_allclose(probabilities(rule(temperature=1e4)), 0.2, atol=1e-4)
  np.testing.assert_allclose(probabilities(rule(power=1e-5)), 0.2, atol=1e-4)
  np.testing.assert_allclose(probabilities(rule(power=1.0)), mean, rtol=1e-4)


@pytest.mark.parametrize('name', _NAMES)
def test_a_single_logit_is_the_two_class_case(name):
  z = _logits(3, classes=1)
  two = np.concatenate([np.zeros_like(z), z], axis=-1)
  one = _consensus(_RULES[name], z, [1.0, 2.0, 3.0, 4.0])
  both = _consensus(_RULES[name], two, [1.0, 2.0, 3.0, 4.0])
  np.testing.assert_allclose(
      tf.sigmoid(one.logits)[..., 0], tf.nn.softmax(both.logits)[..., 1],
      rtol=1e-3, atol=1e-5,
  )


@pytest.mark.parametrize('name', _NAMES)
def test_sequences_have_a_weight_an_example(name):
  z = np.random.default_rng(0).normal(size=(3, 2, 4, 5)).astype(np.float32)
  payload = _RULES[name].encode(tf.constant(z[0]))
  assert payload.values.shape == (2, 4, 5) and payload.weights.shape == (2,)
  consensus = _consensus(_RULES[name], z, [1.0] * 3)
  assert np.isfinite(consensus.logits).all() and consensus.mask.shape == (2,)


def test_clients_that_all_know_nothing_give_no_target():
  rule = knowledge.CertaintyWeighted('variance')
  consensus = _consensus(rule, np.ones((2, 3, 5), np.float32), [1.0, 1.0])
  np.testing.assert_array_equal(consensus.mask, 0.0)


def test_a_certainty_of_ones_own():
  rule = knowledge.CertaintyWeighted(lambda z: tf.cast(z[:, 0] > 0, tf.float32))
  logits = np.array([[[1.0, 5.0]], [[-1.0, 7.0]]], np.float32)
  np.testing.assert_allclose(_consensus(rule, logits, [1, 1]).logits, [[1.0, 5.0]])


def test_probabilities_by_certainty_as_fed_aux_averages_them():
  logits, weights = _logits(4), [1.0, 2.0, 0.5, 3.0]
  rule = knowledge.CertaintyWeighted('confidence', average='probabilities')
  p = helpers.softmax(logits.astype(np.float64))
  expected = _weighted_mean(p, np.array(weights)[:, None] * p.max(-1))
  np.testing.assert_allclose(
      tf.nn.softmax(_consensus(rule, logits, weights).logits), expected, rtol=1e-4
  )


@pytest.mark.parametrize(
    'build',
    [
        lambda: knowledge.CertaintyWeighted(average='median'),
        lambda: knowledge.MeanProbabilities(temperature=0.0),
        lambda: knowledge.MeanProbabilities(power=0.0),
        lambda: knowledge.MeanProbabilities(temperature=0.1, power=2.0),
        lambda: knowledge.CertaintyWeighted('guess'),
        lambda: knowledge.Quantized(bits=0),
        lambda: knowledge.Quantized(bits=9),
        lambda: knowledge.Quantized(knowledge.MeanLogits()),
        lambda: knowledge.Quantized(knowledge.CertaintyWeighted()),
    ],
)
def test_bad_rules_are_refused(build):
  with pytest.raises(ValueError, match='found'):
    build()


def test_a_custom_rule_serves_a_whole_round():
  x, _ = helpers.examples(12, 0)
  # ERA's in a round is DS-FL's, in NumPy in `private_process_test`.
  process = helpers.build(
      'fed_df', transfer_set=tff_kd.TransferSet(x), consensus_rule=_RULES['variance'],
      distillation=tff_kd.Distillation(num_steps=3, batch_size=12),
  )
  clients = [helpers.dataset(*helpers.examples(8, seed)) for seed in (1, 2)]
  output = process.next(process.initialize(), clients)
  metrics = output.metrics['server_distillation']['student']
  assert metrics['num_targets'] == 12
  assert 0 < metrics['last_loss'] < metrics['first_loss']


_QUANTIZABLE = [
    knowledge.MeanProbabilities(),
    knowledge.CertaintyWeighted('confidence', average='probabilities'),
    knowledge.CertaintyWithDiversity('confidence', average='probabilities'),
]


@pytest.mark.parametrize('rule', _QUANTIZABLE, ids=lambda its: type(its).__name__)
def test_quantized_rules_say_a_point_of_the_simplex(rule):
  (logits,) = _logits(0, clients=1, rows=6)
  logits[2, 1], logits[4, 0] = np.nan, np.inf
  rows = [0, 1, 3, 5]
  for bits in (1, 3, 8):
    quantized = knowledge.Quantized(rule, bits)
    assert quantized.has_diversity == rule.has_diversity
    assert quantized.payload_spec(tf.TensorShape([5]), 6) == rule.payload_spec(
        tf.TensorShape([5]), 6
    )
    payload = quantized.encode(tf.constant(logits))
    units = codecs.quantize(helpers.softmax(logits[rows]), bits).numpy()
    heavier = tf.nest.map_structure(lambda its: 7.0 * its, payload)
    for its in (payload, heavier):
      found = quantized.units(its).numpy()
      np.testing.assert_array_equal(found[rows], units)
      assert not found[[2, 4]].any()
    consensus = quantized.decode(payload)
    np.testing.assert_allclose(
        helpers.softmax(consensus.logits.numpy()[rows]),
        units / codecs.num_units(bits), atol=1e-5,
    )
    np.testing.assert_array_equal(consensus.mask, [1, 1, 0, 1, 0, 1])
    assert int(quantized.message_bits(payload, payload)) == 1 + 3


def test_quantized_single_logits_and_positions():
  rng = np.random.default_rng(0)
  rule = knowledge.Quantized(bits=2)
  z = rng.normal(size=(9, 1)).astype(np.float32)
  payload = rule.encode(tf.constant(z))
  p = 1 / (1 + np.exp(-z))
  units = codecs.quantize(np.concatenate([1 - p, p], -1), 2)
  np.testing.assert_array_equal(rule.units(payload), units)
  np.testing.assert_allclose(payload.values, units.numpy()[:, 1:] / 3, atol=1e-5)
  assert rule.first_message_bytes(tf.TensorShape([1]), 9) == 3  # 1 + 9 * 2 bits.
  z = rng.normal(size=(4, 3, 5)).astype(np.float32)
  z[1, 2, 0] = np.nan
  payload = rule.encode(tf.constant(z))
  units = rule.units(payload).numpy()
  assert units.shape == z.shape
  np.testing.assert_array_equal(units.sum(-1), [[3] * 3, [0] * 3, [3] * 3, [3] * 3])
  exact = int(rule.message_bits(rule.encode(tf.zeros_like(z))))
  assert -(-exact // 8) == rule.first_message_bytes(tf.TensorShape([3, 5]), 4)


@settings(deadline=None)
@given(
    st.integers(1, 4), st.integers(2, 5), st.integers(0, 99)
)
def test_the_most_likely_classes_are_sent_and_the_rest_is_even(kept, more, seed):
  classes = kept + more
  logits = np.random.default_rng(seed).normal(0, 2, (6, classes)).astype(np.float32)
  rule = knowledge.TopClasses(num_classes=kept)
  payload = rule.encode(tf.constant(logits))
  p = helpers.softmax(logits.astype(np.float64))
  for found, its in zip(payload.values.numpy(), p):
    order = np.argsort(-its)
    expected = its.copy()
    expected[order[kept:]] = (1 - its[order[:kept]].sum()) / more
    np.testing.assert_allclose(found, expected, atol=1e-6)
  assert rule.message_bits(payload) == 6 * kept * (32 + int(np.ceil(np.log2(classes))))
  assert rule.first_message_bytes(tf.TensorShape([classes]), 6) == -(
      -int(rule.message_bits(payload)) // 8
  )


def test_of_the_most_likely_classes_missing_rows_and_positions_cost_what_they_are():
  rule = knowledge.TopClasses(num_classes=2)
  logits = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)
  logits[1] = np.nan
  payload = rule.encode(tf.constant(logits))
  np.testing.assert_array_equal(payload.weights, [1, 0, 1, 1])
  assert rule.message_bits(payload) == 3 * 3 * 2 * (32 + 3)
  # Of a single logit, the more likely of two classes.
  single = knowledge.TopClasses(num_classes=1).encode(tf.constant([[2.0], [-1.0]]))
  np.testing.assert_allclose(
      single.values[:, 0], tf.sigmoid([2.0, -1.0]), rtol=1e-6
  )


def test_fed_df_with_quantized_predictions_in_numpy():
  """One round, one server step, from the mean of labels of one bit."""
  x, _ = helpers.examples(20, 0)
  process = helpers.build(
      'fed_df', client_optimizer=helpers.sgd(0.5), student_optimizer=helpers.sgd(0.3),
      transfer_set=tff_kd.TransferSet(x), consensus_rule=knowledge.Quantized(bits=1),
      distillation=tff_kd.Distillation(num_steps=1, batch_size=20),
  )
  state, sizes = process.initialize(), (6, 10)
  initial = [np.array(v, np.float64) for v in state.global_model_weights.trainable]
  students, target = [], 0
  for seed, n in enumerate(sizes):
    students.append(helpers.linear_fit(initial, *helpers.examples(n, seed), 0.5))
    labels = helpers.linear_logits(students[-1], x).argmax(-1)
    target = target + n / 16 * np.eye(3)[labels]
  average = [np.average(its, axis=0, weights=sizes) for its in zip(*students)]
  output = process.next(
      state,
      [
          helpers.dataset(*helpers.examples(n, seed), batch_size=n)
          for seed, n in enumerate(sizes)
      ],
  )
  helpers.assert_weights_close(
      output.state.global_model_weights.trainable,
      helpers.linear_distil(average, x, target, 0.3), rtol=1e-4, atol=1e-5,
  )
  bits = codecs.first_message_bits(20, 3, 1)
  counts = output.metrics['client_work']['participation']
  assert counts['knowledge_bits'] == 2 * bits
  assert tff_kd.communication.round_bytes(process).up_knowledge == -(-bits // 8)
  empty = helpers.dataset(*helpers.examples(4, 0)).take(0)
  counts = process.next(state, [empty]).metrics['client_work']['participation']
  assert counts['knowledge_bits'] == 0


@pytest.mark.parametrize('seed', range(4))
def test_diversity_is_the_opinion_of_those_who_disagree(seed):
  logits = _logits(seed, clients=6, rows=8, classes=3).astype(np.float64)
  client_weights = np.random.default_rng(seed).uniform(0.5, 2.0, 6)
  rule = knowledge.CertaintyWithDiversity()
  consensus = _consensus(rule, logits.astype(np.float32), client_weights)
  plain = _consensus(
      knowledge.CertaintyWeighted(), logits.astype(np.float32), client_weights
  )
  np.testing.assert_allclose(consensus.logits, plain.logits, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(consensus.mask, plain.mask)
  for row in range(8):
    weights = client_weights * logits[:, row].var(-1)
    joint = weights @ logits[:, row] / weights.sum()
    differ = logits[:, row].argmax(-1) != joint.argmax()
    assert consensus.diversity.mask[row] == differ.any()
    expected = np.zeros(3)
    if differ.any():
      expected = (weights * differ) @ logits[:, row] / weights[differ].sum()
    np.testing.assert_allclose(
        consensus.diversity.logits[row], expected, rtol=1e-4, atol=1e-5
    )


def test_diversity_needs_classes():
  for shape in ([1], [4, 5]):
    with pytest.raises(ValueError, match='two classes or more'):
      knowledge.CertaintyWithDiversity().payload_spec(tf.TensorShape(shape), 3)


def test_fed_et_in_numpy():
  """One round, one server step: the teacher's gradient by hand."""
  keras.utils.set_random_seed(3)
  rate, share = 0.1, 0.4
  x, _ = helpers.examples(20, 0)
  process = helpers.build(
      'fed_et', teacher_fn=helpers.dense_fn(), transfer_set=tff_kd.TransferSet(x),
      teacher_optimizer=helpers.sgd(rate), client_optimizer=helpers.sgd(1.0),
      distillation=tff_kd.Distillation(
          loss='label', diversity_weight=share, num_steps=1, batch_size=20
      ),
  )
  # Its predictions are sums by class.
  assert process.description.update_type.knowledge.values.shape == (20, 3, 3)
  state = process.initialize()
  initial = [np.array(v, np.float64) for v in state.global_model_weights.trainable]
  clients = [helpers.examples(size, seed) for seed, size in ((1, 4), (2, 12), (5, 8))]
  output = process.next(state, [helpers.dataset(x, y, len(y)) for x, y in clients])
  students = [helpers.linear_fit(initial, *client, 1.0) for client in clients]
  logits = np.stack([helpers.linear_logits(its, x) for its in students])
  certainty = logits.var(-1)
  joint = _weighted_mean(logits, certainty)
  label = joint.argmax(-1)
  differ = certainty * (logits.argmax(-1) != label)
  rows = differ.sum(0) > 0
  assert 0 < rows.sum() < 20
  opinion = np.zeros_like(joint)
  opinion[rows] = _weighted_mean(logits[:, rows], differ[:, rows])
  teacher = [np.array(v, np.float64) for v in state.teacher_weights.trainable]
  p = helpers.softmax(helpers.linear_logits(teacher, x))
  dz = (p - np.eye(3)[label]) / 20
  dz[rows] += share * (p - helpers.softmax(opinion))[rows] / rows.sum()
  helpers.assert_weights_close(
      output.state.teacher_weights.trainable,
      helpers.linear_step(teacher, x, dz, rate), rtol=1e-4, atol=1e-5,
  )


def test_diversity_is_refused_without_a_rule_for_it():
  x, _ = helpers.examples(12, 0)
  with pytest.raises(ValueError, match='CertaintyWithDiversity'):
    helpers.build(
        'fed_df', transfer_set=tff_kd.TransferSet(x),
        distillation=tff_kd.Distillation(diversity_weight=0.1),
    )
  with pytest.raises(ValueError, match="target='ensemble'"):
    tff_kd.Distillation(target='teacher', diversity_weight=0.1)
