"""SCAFFOLD and FedDyn: whole rounds against NumPy, with clients that come and go."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import helpers
import tff_kd
from tff_kd.client.companions import dynamic_regularizer
from tff_kd.compat import tff

_RATE, _NUM_CLIENTS, _ALPHA = 0.2, 4, 0.3
_CLOSE = dict(rtol=1e-4, atol=1e-5)
# Unequal: not all clients do as many steps.
_CLIENTS = {k: helpers.examples(n, k) for k, n in enumerate([8, 4, 12])}
_ROUNDS = ([0, 1], [2, 0], [1, 2])


@helpers.shared
def _build(name, **kwargs):
  keras.utils.set_random_seed(1)
  return helpers.build(name, client_optimizer=helpers.sgd(_RATE), **kwargs)


def _gradient(w, x, y):
  dz = helpers.softmax(x @ w[0] + w[1]) - np.eye(helpers.CLASSES)[y]
  return [x.T @ dz / len(y), dz.mean(axis=0)]


def _steps(w, x, y, slope_of):
  """Weights after an epoch along the gradient plus a slope, and how many steps."""
  count = 0
  for i in range(0, len(x), 4):
    gradients = _gradient(w, x[i : i + 4].astype(np.float64), y[i : i + 4])
    w = [v - _RATE * (g + s) for v, g, s in zip(w, gradients, slope_of(w))]
    count += 1
  return w, count


class _Scaffold:
  """Algorithm 1, option II."""

  kwargs = {}

  def __init__(self, weights):
    self.w = weights
    self.c = [np.zeros_like(v) for v in weights]
    self.own = {k: self.c for k in range(_NUM_CLIENTS)}

  def client(self, k, x, y):
    correction = [c - own for c, own in zip(self.c, self.own[k])]
    w, count = _steps(self.w, x, y, lambda _: correction)
    new = [
        own - c + (old - v) / (count * _RATE)
        for own, c, old, v in zip(self.own[k], self.c, self.w, w)
    ]
    return w, new

  def round(self, present):
    found = {k: self.client(k, *_CLIENTS[k]) for k in present}
    self.w = [np.mean(its, axis=0) for its in zip(*(w for w, _ in found.values()))]
    for k, (_, new) in found.items():
      self.c = [
          c + (a - b) / _NUM_CLIENTS for c, a, b in zip(self.c, new, self.own[k])
      ]
      self.own[k] = new

  @property
  def server(self):
    return self.c


class _FedDyn:
  """Algorithm 1."""

  kwargs = dict(dynamic_weight=_ALPHA)

  def __init__(self, weights):
    self.w = weights
    self.h = [np.zeros_like(v) for v in weights]
    self.own = {k: self.h for k in range(_NUM_CLIENTS)}

  def round(self, present):
    left = []
    start = self.w
    for k in present:
      own = self.own[k]
      w, _ = _steps(
          start, *_CLIENTS[k],
          lambda w, own=own: [-h + _ALPHA * (v - r) for h, v, r in zip(own, w, start)],
      )
      self.own[k] = [h - _ALPHA * (v - r) for h, v, r in zip(own, w, start)]
      left.append(w)
    self.h = [
        h - _ALPHA * sum(w[i] - start[i] for w in left) / _NUM_CLIENTS
        for i, h in enumerate(self.h)
    ]
    self.w = [
        np.mean(its, axis=0) - h / _ALPHA for its, h in zip(zip(*left), self.h)
    ]

  @property
  def server(self):
    return [h / _ALPHA for h in self.h]


def _next(process, state, states, present):
  """A round's output of these clients, whose states it replaces."""
  datasets = {k: helpers.dataset(*_CLIENTS[k]) for k in present}
  return helpers.round_of(process, state, datasets, states)


@pytest.mark.parametrize('name, numpy', [('scaffold', _Scaffold), ('fed_dyn', _FedDyn)])
def test_rounds_equal_numpy(name, numpy):
  process = _build(name, num_clients=_NUM_CLIENTS, **numpy.kwargs)
  assert isinstance(process, tff_kd.StatefulClientsProcess)
  assert process.kept_models is None
  state = process.initialize()
  expected = numpy([np.float64(w) for w in state.global_model_weights.trainable])
  states = {k: process.initialize_client() for k in _CLIENTS}
  for present in _ROUNDS:
    output = _next(process, state, states, present)
    state = output.state
    expected.round(present)
    helpers.assert_weights_close(
        state.global_model_weights.trainable, expected.w, **_CLOSE
    )
    helpers.assert_weights_close(state.companion.values, expected.server, **_CLOSE)
    for k, kept in states.items():
      helpers.assert_weights_close(kept.values, expected.own[k], **_CLOSE)
  # The correction is no part of the loss that is told.
  assert 0.5 < output.metrics['client_work']['train']['loss'] < 2.0


@pytest.mark.parametrize('optimizer', ['momentum', helpers.slow('adam')])
def test_fed_dyn_adds_up_how_far_clients_moved_whatever_the_server_optimizer(optimizer):
  server_optimizer = helpers.sgd(0.7, 0.5)
  if optimizer == 'adam':
    server_optimizer = tff.learning.optimizers.build_adam(0.01)
  process = _build(
      'fed_dyn', num_clients=_NUM_CLIENTS, dynamic_weight=_ALPHA,
      server_optimizer=server_optimizer,
  )
  state, new = process.initialize(), process.initialize_client()
  states = dict.fromkeys(_CLIENTS, new)
  for present in _ROUNDS:
    output = _next(process, state, states, present)
    state = output.state
    # The server's h is the mean of all clients' h_k, those included that never came.
    for u, *own in zip(state.companion.values, *(s.values for s in states.values())):
      np.testing.assert_allclose(u * _ALPHA, sum(own) / _NUM_CLIENTS, **_CLOSE)


def test_fed_dyn_does_not_move_the_student_where_there_is_no_mean():
  process = _build(
      'fed_dyn', num_clients=_NUM_CLIENTS,
      model_aggregator=tff_kd.aggregators.robust.NormBoundFactory(2.0),
  )
  x, y = _CLIENTS[0]
  state, new = process.initialize(), process.initialize_client()
  first = process.next(state, [helpers.dataset(x, y)], [new]).state
  assert np.abs(first.companion.values[0]).max() > 1e-3
  # Finite, and beyond the bound: the client reports, and no report is in the mean.
  output = process.next(first, [helpers.dataset(x * np.float32(1e3), y)], [new])
  assert output.metrics['aggregator']['model']['num_left_out'] == 1
  assert output.metrics['client_work']['participation']['num_included'] == 1
  helpers.assert_weights_close(
      [output.state.companion, output.state.global_model_weights],
      [first.companion, first.global_model_weights], rtol=0, atol=0,
  )


def test_fed_dyn_moves_the_student_within_the_constraints_of_its_layers():
  student = tff_kd.models.cohorts.build_students(
      helpers.dense_fn(
          kernel_constraint=keras.constraints.NonNeg(), kernel_initializer='ones'
      ),
      input_spec=helpers.INPUT_SPEC, loss_fn=helpers.loss_fn,
  ).first
  companion = dynamic_regularizer.DynamicRegularizer(student, 4, _ALPHA)
  weights, update = (
      tf.nest.map_structure(lambda w, v=v: tf.fill(w.shape, v), student.initial_weights)
      for v in (1.0, 6.0)
  )
  server, moved = companion.correct(
      companion.initial_server_state(), weights, update, tf.constant(1)
  )
  # By a fourth of 6, to -.5; the bias has no constraint.
  np.testing.assert_allclose(server.values[0], 1.5)
  np.testing.assert_allclose(moved.trainable[0], 0.0)
  np.testing.assert_allclose(moved.trainable[1], -0.5)


@pytest.fixture(scope='module')
def batches():
  return helpers.batches([*_CLIENTS.values(), _CLIENTS[0]], shuffle=False)


def _client(number, **conditions):
  return {
      'data': number, 'conditions': tff_kd.ClientConditions(**conditions),
  }


@pytest.mark.parametrize('name', ['scaffold', helpers.slow('fed_dyn')])
def test_states_move_with_reports_that_count_only(name, batches):
  """What a skipped round leaves is in `contract_test`."""
  process = _build(
      name, client_data=batches, reporting=tff_kd.Reporting(min_reports=1)
  )
  state, new = process.initialize(), process.initialize_client()
  lost = np.bool_(False)
  # One report counts, one is lost: as if the other client had not been there.
  both = process.next(state, [_client(0), _client(2, reports=lost)], [new] * 2)
  alone = process.next(state, [_client(0)], [new])
  helpers.assert_weights_close(both.state, alone.state, rtol=0, atol=1e-7)
  helpers.assert_weights_close(both.client_states[0], alone.client_states[0], atol=1e-7)
  helpers.assert_weights_close(both.client_states[1], new, rtol=0, atol=0)
  assert np.abs(both.client_states[0].values[0]).max() > 1e-3


@pytest.mark.slow
def test_what_late_clients_of_fed_dyn_keep_adds_up_to_what_the_server_has(batches):
  process = _build(
      'fed_dyn', client_data=batches, dynamic_weight=_ALPHA,
      reporting=tff_kd.Reporting(max_delay=1, staleness_power=0.0),
  )
  state, new = process.initialize(), process.initialize_client()
  first = process.next(state, [_client(0)], [new])
  second = process.next(
      first.state, [_client(1, delay=np.int32(1)), _client(2)], [new] * 2
  )
  kept = [s.values for s in (*first.client_states, *second.client_states)]
  for u, *own in zip(second.state.companion.values, *kept):
    np.testing.assert_allclose(u * _ALPHA, sum(own) / _NUM_CLIENTS, **_CLOSE)


@pytest.mark.parametrize('name', ['scaffold', 'fed_dyn'])
def test_a_round_of_nobody_and_of_bad_data(name):
  process = _build(name, num_clients=_NUM_CLIENTS)
  x, y = _CLIENTS[1]
  state, new = process.initialize(), process.initialize_client()
  first = process.next(state, [helpers.dataset(x, y)], [new])
  kept = first.client_states[0]
  bad = np.full_like(x, np.nan)
  for data in ([], [helpers.dataset(bad, y)], [helpers.dataset(x[:0], y[:0])]):
    output = process.next(first.state, data, [kept] * len(data))
    helpers.assert_weights_close(
        [output.state.companion, output.state.global_model_weights],
        [first.state.companion, first.state.global_model_weights], rtol=0, atol=0,
    )
    for its in output.client_states:
      helpers.assert_weights_close(its, kept, rtol=0, atol=0)


def test_control_variates_follow_the_rate_and_cost_as_much_as_weights(batches):
  rates = tf.constant([0.2, 0.05])
  process = _build(
      'scaffold', client_data=batches, learning_rate_fn=lambda t: tf.gather(rates, t)
  )
  state, kept = process.initialize(), [process.initialize_client()]
  for t in range(2):
    before = [np.float64(w) for w in state.global_model_weights.trainable]
    # With one client, c_k is c / .25 after the first round.
    output = process.next(state, [1], kept)
    after = output.state.global_model_weights.trainable
    expected = [
        own - c + (old - new) / float(rates[t])
        for own, c, old, new in zip(
            kept[0].values, state.companion.values, before, after
        )
    ]
    helpers.assert_weights_close(output.client_states[0].values, expected, **_CLOSE)
    state, kept = output.state, output.client_states
  each = tff_kd.communication.round_bytes(process)
  plain = tff_kd.communication.round_bytes(_build('fed_avg'))
  assert each.down >= 2 * plain.down and each.up == 2 * plain.up


@pytest.mark.parametrize('name', ['scaffold', 'fed_dyn'])
@pytest.mark.parametrize(
    'kwargs, match',
    [
        (dict(), 'how many clients there are in all: pass `num_clients`'),
        (dict(num_clients=0), '`num_clients` must be a positive integer'),
        (
            dict(
                num_clients=4,
                privacy=tff_kd.privacy.DifferentialPrivacy(
                    noise_multiplier=1.0, clients_per_round=2
                ),
            ),
            'With differential privacy there can be no',
        ),
    ],
)
def test_what_does_not_fit_is_refused(name, kwargs, match):
  with pytest.raises(ValueError, match=match):
    helpers.build(name, **kwargs)


def test_what_does_not_fit_one_of_them_is_refused(batches):
  with pytest.raises(ValueError, match='must be plain SGD.*ControlVariates tells'):
    helpers.build(
        'scaffold', client_optimizer=lambda: keras.optimizers.Adam(), num_clients=4
    )
  with pytest.raises(ValueError, match='must be plain SGD'):
    helpers.build('scaffold', client_optimizer=helpers.sgd(0.1, 0.9), num_clients=4)
  with pytest.raises(ValueError, match='must be that of `client_data`, 4, found 5'):
    helpers.build('scaffold', client_data=batches, num_clients=5)
  with pytest.raises(ValueError, match='`alpha` must be above 0'):
    helpers.build('fed_dyn', num_clients=4, dynamic_weight=0.0)
  with pytest.raises(ValueError, match='changes add up .* `staleness_power` must'):
    helpers.build('fed_dyn', client_data=batches, reporting=tff_kd.Reporting(max_delay=1))
  with pytest.raises(ValueError, match='`client_weighting` must be .*UNIFORM.*NUM_EX'):
    helpers.build(
        'fed_dyn', num_clients=4,
        client_weighting=tff.learning.ClientWeighting.NUM_EXAMPLES,
    )
  # The default of plain averaging.
  with pytest.raises(ValueError, match='DynamicRegularizer .* `client_weighting` must'):
    helpers.build(
        'fed_avg',
        companion=dynamic_regularizer.DynamicRegularizer(
            helpers.fed_avg().student_spec, 4, _ALPHA
        ),
    )


def test_the_average_is_corrected_before_the_server_distils():
  algorithm = _build('fed_dyn', num_clients=_NUM_CLIENTS, dynamic_weight=_ALPHA)
  keras.utils.set_random_seed(1)  # The same initial weights.
  process = helpers.build(
      'fed_df', client_optimizer=helpers.sgd(_RATE),
      transfer_set=tff_kd.TransferSet(helpers.examples(6, 9)[0]),
      distillation=tff_kd.Distillation(num_steps=2),
      client_weighting=tff.learning.ClientWeighting.UNIFORM,
      companion=dynamic_regularizer.DynamicRegularizer(
          algorithm.student_spec, _NUM_CLIENTS, _ALPHA
      ),
  )
  data = [helpers.dataset(*_CLIENTS[k]) for k in (0, 1)]
  found, expected = (
      its.next(its.initialize(), data, [its.initialize_client()] * 2).state
      for its in (process, algorithm)
  )
  helpers.assert_weights_close(
      [found.aggregated_model_weights, found.companion],
      [expected.global_model_weights, expected.companion], **_CLOSE,
  )
  distilled = found.global_model_weights.trainable[0]
  assert np.abs(distilled - found.aggregated_model_weights.trainable[0]).max() > 1e-5
