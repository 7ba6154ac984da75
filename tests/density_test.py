"""Weights by how dense a client's data are at a transfer example, under label shift."""

import numpy as np
import pytest
import scipy.stats
from tff_kd.compat import tff

from tests import helpers
import tff_kd
from tff_kd import privacy
from tff_kd.client.companions import density
from tff_kd.knowledge import rules

_SIZES = {1: 4, 2: 12, 5: 8}  # Examples by a client's seed.
_SMOOTHING = 0.2
_UNIFORM = tff.learning.ClientWeighting.UNIFORM


def test_it_is_the_ratio_of_densities_under_label_shift():
  """Of a mixture of three normal distributions, whose densities are known."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=50) * 2
  of_class = np.stack([scipy.stats.norm.pdf(x, mean) for mean in (-2, 0, 3)], -1)
  own, shares = np.float32([0.7, 0.3, 0.0]), np.float32([0.2, 0.3, 0.5])
  posterior = of_class * shares / (of_class @ shares)[:, np.newaxis]
  found = density.density_ratio(np.float32(posterior), own, shares)
  np.testing.assert_allclose(
      found, (of_class @ own) / (of_class @ shares), rtol=1e-4, atol=1e-6
  )


@pytest.mark.parametrize(
    ('counts', 'smoothing', 'expected'),
    [
        ([0, 0, 0, 0], 0.0, [0.25] * 4),
        ([3, 1, 0, 0], 0.0, [0.75, 0.25, 0, 0]),
        ([3, 1, 0, 0], 0.5, [0.5, 0.25, 0.125, 0.125]),
    ],
)
def test_shares_are_mixed_with_the_uniform_distribution(counts, smoothing, expected):
  found = density.class_shares(np.float32(counts), smoothing)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


@helpers.shared
def _process(**kwargs):
  defaults = dict(
      transfer_set=tff_kd.TransferSet(helpers.examples(20, 0)[0]),
      client_optimizer=helpers.sgd(1.0),
      student_optimizer=helpers.sgd(0.5),
      consensus_rule=rules.get('density'),
      companion=density.LabelDensity(helpers.CLASSES, _SMOOTHING),
      knowledge_weighting=tff.learning.ClientWeighting.NUM_EXAMPLES,
      distillation=tff_kd.Distillation(num_steps=1, batch_size=20),
  )
  return helpers.build('fed_df', **defaults | kwargs)


def _datasets():
  return [
      helpers.dataset(*helpers.examples(size, seed), batch_size=size)
      for seed, size in _SIZES.items()
  ]


def _round_in_numpy(model, totals):
  """FedDF's student and the next totals, after one step of each client and the server."""
  x = helpers.examples(20, 0)[0]
  shares = np.full(helpers.CLASSES, 1 / helpers.CLASSES)
  if totals.any():
    shares = (1 - _SMOOTHING) * totals / totals.sum() + _SMOOTHING * shares
  received = helpers.softmax(helpers.linear_logits(model, x))
  students, values, weights = [], 0.0, 0.0
  for seed, size in _SIZES.items():
    cx, cy = helpers.examples(size, seed)
    students.append(helpers.linear_fit(model, cx, cy, 1.0))
    counts = np.bincount(cy, minlength=helpers.CLASSES)
    weight = size * received @ (counts / size / shares)
    own = helpers.softmax(helpers.linear_logits(students[-1], x))
    values += weight[:, np.newaxis] * own
    weights += weight
    totals = totals + counts
  average = [
      np.average(parts, axis=0, weights=list(_SIZES.values())) for parts in zip(*students)
  ]
  target = values / weights[:, np.newaxis]
  return helpers.linear_distil(average, x, target, 0.5), totals


def test_rounds_equal_numpy():
  process = _process()
  state = process.initialize()
  model = [np.array(w, np.float64) for w in state.global_model_weights.trainable]
  totals = np.zeros(helpers.CLASSES)
  for _ in range(3):
    state = process.next(state, _datasets()).state
    model, totals = _round_in_numpy(model, totals)
    np.testing.assert_array_equal(state.companion, totals)
    helpers.assert_weights_close(
        state.global_model_weights.trainable, model, rtol=1e-3, atol=1e-5
    )


def test_counts_go_up_as_a_secure_sum():
  process = _process(
      secure_aggregation=privacy.SecureAggregation(
          model_bound=40.0, knowledge_bound=400.0
      )
  )
  tff.test.assert_not_contains_unsecure_aggregation(process.next)
  output = process.next(process.initialize(), _datasets())
  assert output.state.companion.sum() == sum(_SIZES.values())
  plain = _process().next(_process().initialize(), _datasets())
  helpers.assert_weights_close(
      output.state.global_model_weights, plain.state.global_model_weights, atol=1e-3
  )


def test_a_small_bound_of_secure_sums_leaves_probabilities():
  """Of one client, whose weights cancel."""
  students = []
  for secure in (
      None, privacy.SecureAggregation(model_bound=400.0, knowledge_bound=0.2)
  ):
    process = _process(secure_aggregation=secure)
    output = process.next(process.initialize(), _datasets()[:1])
    students.append(output.state.global_model_weights)
  helpers.assert_weights_close(*students, atol=1e-3)


def test_labels_that_do_not_count_are_not_counted():
  """Of a client without examples, and of examples of weight 0."""
  process = _process()
  x, y = helpers.examples(4, 1)
  empty = helpers.dataset(x, y).take(0)
  output = process.next(process.initialize(), [empty, helpers.dataset(x, y)])
  np.testing.assert_array_equal(
      output.state.companion, np.bincount(y, minlength=helpers.CLASSES)
  )


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(companion=density.LabelDensity(4)), 'that of the student, 3, found 4'),
        (
            dict(
                privacy=privacy.DifferentialPrivacy(
                    noise_multiplier=1.0, clients_per_round=3
                ),
                client_weighting=_UNIFORM, knowledge_weighting=_UNIFORM,
            ),
            'what it exchanges with clients is not noised',
        ),
    ],
    ids=['classes', 'privacy'],
)
def test_what_does_not_fit_is_refused(change, message):
  with pytest.raises(ValueError, match=message):
    _process.anew(**change)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((1,), '`num_classes` must be a whole number of 2 or more, found 1'),
        ((3, 0.0), '`smoothing` must be above 0 and at most 1, found 0.0'),
    ],
)
def test_arguments_out_of_range(arguments, message):
  with pytest.raises(ValueError, match=message):
    density.LabelDensity(*arguments)


def test_the_script_takes_it(tmp_path):
  helpers.train_here(
      *helpers.TINY_RUN, '--algorithm=fed_df', '--consensus=aligned_density',
      '--rounds=1', '--server_steps=2', f'--output_dir={tmp_path / "run"}',
      '--compare_with_fed_avg=false',
  )
  ledger = helpers.rows(tmp_path / 'run' / 'metrics.csv')[0]
  assert float(ledger['bytes/up_companion']) > 0
  assert 'has none' in helpers.refused_here(
      '--task=movielens', '--algorithm=fed_df', '--consensus=density', '--rounds=1',
      f'--output_dir={tmp_path / "films"}',
  )
