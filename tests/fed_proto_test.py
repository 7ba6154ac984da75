"""FedProto: rounds against NumPy, with clients that come and go."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import helpers
import tff_kd

_RATE, _WEIGHT, _FEATURES = 0.2, 3.0, 4
# Client 1 has no example of class 2, and nobody in the last round has one of class 0.
_CLIENTS = {
    0: helpers.examples(8, 0),
    1: (helpers.examples(4, 1)[0], np.int32([0, 1, 1, 0])),
    2: (helpers.examples(12, 2)[0], np.int32([1, 2] * 6)),
}
_student_fn = helpers.features_fn(_FEATURES)


@helpers.shared
def _build(**kwargs):
  keras.utils.set_random_seed(4)
  defaults = dict(
      student_fn=_student_fn, client_optimizer=helpers.sgd(_RATE),
      prototype_weight=_WEIGHT,
  )
  return helpers.build('fed_proto', **{**defaults, **kwargs})


def _trained(w, x, y, prototypes):
  """Weights after an epoch, and the sums and counts of features by class."""
  sums, counts = np.zeros((helpers.CLASSES, _FEATURES)), np.zeros(helpers.CLASSES)
  for i in range(0, len(x), 4):
    xb, yb = np.float64(x[i : i + 4]), y[i : i + 4]
    z = helpers.features_of(w, xb)
    np.add.at(sums, yb, z)
    np.add.at(counts, yb, 1)
    distances = np.zeros_like(z)
    for row, label in enumerate(yb):
      if label in prototypes:
        distances[row] = z[row] - prototypes[label]
    further = _WEIGHT * 2 * distances / _FEATURES / len(yb)
    w = helpers.features_step(w, xb, yb, _RATE, further)
  return w, sums, counts


def test_rounds_equal_numpy():
  process = _build()
  state, initial = process.initialize(), process.initialize_client()
  assert not len(tf.nest.flatten(state.global_model_weights))
  own = {k: [np.float64(w) for w in initial.weights.trainable] for k in _CLIENTS}
  states = dict.fromkeys(_CLIENTS, initial)
  prototypes = {}
  for present in ([0, 1], [2, 1], [2], [0, 1, 2]):
    datasets = {k: helpers.dataset(*_CLIENTS[k]) for k in present}
    state = helpers.round_of(process, state, datasets, states).state
    total, counts = 0.0, 0.0
    for k in present:
      own[k], its_sums, its_counts = _trained(own[k], *_CLIENTS[k], prototypes)
      total, counts = total + its_sums, counts + its_counts
      helpers.assert_weights_close(
          states[k].weights.trainable, own[k], rtol=1e-3, atol=1e-5
      )
    prototypes = {
        c: total[c] / counts[c] for c in range(helpers.CLASSES) if counts[c]
    }
  assert len(prototypes) == helpers.CLASSES


def test_a_round_of_nobody_and_of_bad_data_leaves_numbers():
  process = _build()
  state, initial = process.initialize(), process.initialize_client()
  x, y = _CLIENTS[1]
  for data in ([], [helpers.dataset(np.full_like(x, np.nan), y)]):
    output = process.next(state, data, [initial] * len(data))
    assert all(np.isfinite(t).all() for t in tf.nest.flatten(output.state.shared))
    for kept in output.client_states:
      helpers.assert_weights_close(kept.weights, initial.weights, rtol=0, atol=0)
  # A prototype of nobody teaches nothing.
  after = process.next(output.state, [helpers.dataset(x, y)], [initial])
  plain = process.next(state, [helpers.dataset(x, y)], [initial])
  helpers.assert_weights_close(
      after.client_states[0].weights, plain.client_states[0].weights, rtol=0, atol=0
  )
  assert after.metrics['client_work']['participation']['num_taught'] == 0


def _two_rounds(process):
  _, kept = helpers.rounds(process, [helpers.dataset(*_CLIENTS[k]) for k in (0, 2)])
  return [its.weights for its in kept]


# That nothing is summed in the clear is in `contract_test`.
@pytest.mark.slow
def test_secure_sums_change_little():
  secure = _build(
      secure_aggregation=tff_kd.privacy.SecureAggregation(knowledge_bound=50.0)
  )
  tff_kd.tff.test.assert_not_contains_unsecure_aggregation(secure.next)
  helpers.assert_weights_close(
      _two_rounds(secure), _two_rounds(_build()), rtol=1e-2, atol=1e-3
  )


def test_private_prototypes():
  process = _build(
      privacy=tff_kd.privacy.DifferentialPrivacy(
          noise_multiplier=1e-4, clients_per_round=2, knowledge_clip=100.0
      )
  )
  helpers.assert_weights_close(
      _two_rounds(process), _two_rounds(_build()), rtol=5e-2, atol=1e-2
  )


def test_architectures_with_as_many_features_learn_from_each_other():
  process = _build(student_fn=[_student_fn, helpers.features_fn(_FEATURES, (6,))])
  state, kept = process.initialize(), list(process.initialize_client())
  for _ in range(2):
    output = process.next(
        state,
        [
            {'cohort': np.int32(k), 'data': helpers.dataset(*_CLIENTS[k])}
            for k in (0, 1)
        ],
        kept,
    )
    state, kept = output.state, output.client_states
  assert output.metrics['client_work']['participation']['num_taught'] == 2


@pytest.mark.parametrize(
    'kwargs, match',
    [
        (dict(prototype_weight=0.0), '`prototype_weight` must be above 0'),
        (dict(split_layer='nowhere'), "must be one of the student's layers"),
        (dict(student_fn=helpers.dense_fn()), 'must have layers before the split'),
        (
            dict(student_fn=[_student_fn, helpers.features_fn(5)]),
            r'as many, found \[4, 5\]',
        ),
        (
            dict(
                loss_fn=keras.losses.MeanSquaredError, metrics_fn=None,
                student_fn=helpers.dense_fn((3,), classes=1),
            ),
            'FedProto is about classes',
        ),
    ],
)
def test_what_does_not_fit_is_refused(kwargs, match):
  with pytest.raises(ValueError, match=match):
    helpers.build('fed_proto', **{'student_fn': _student_fn, **kwargs})
