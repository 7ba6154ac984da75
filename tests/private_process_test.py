"""Clients that keep their models: whole rounds against NumPy, and resumed."""

import dataclasses
import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from tff_kd.compat import tff

from tests import helpers
import tff_kd
from tff_kd.client import companions
from tff_kd import knowledge
from tff_kd.knowledge import codecs
from tff_kd.server import distill
from tff_kd.simulation import client_states

_X, _Y = helpers.examples(10, 77)
_SIZES = (6, 8, 4)
_RATE, _DIGEST_RATE = 0.2, 0.3
_CLOSE = dict(rtol=1e-4, atol=1e-6)
_step, _logits = helpers.linear_step, helpers.linear_logits
_fit, _distilled = helpers.linear_fit, helpers.linear_distil


def _client(k):
  return helpers.examples(_SIZES[k], k)


def _dataset(k):
  return helpers.dataset(*_client(k), batch_size=_SIZES[k])


def _datasets(numbers):
  return {k: _dataset(k) for k in numbers}


@helpers.shared
def _fed_md(**kwargs):
  defaults = dict(
      client_optimizer=helpers.sgd(_RATE),
      transfer_set=tff_kd.TransferSet(_X),
      digest_optimizer=helpers.sgd(_DIGEST_RATE),
  )
  return helpers.build('fed_md', **(defaults | kwargs))


def _with_student(name, num_steps, **kwargs):
  """A process whose server has a student that is distilled."""
  defaults = dict(
      client_optimizer=helpers.sgd(_RATE),
      transfer_set=tff_kd.TransferSet(_X),
      student_optimizer=helpers.sgd(_DIGEST_RATE),
      distillation=tff_kd.Distillation(
          num_steps=num_steps, batch_size=10, distillation_weight=1.0
      ),
  )
  return helpers.build(name, **(defaults | kwargs))


@helpers.shared
def _ds_fl(**kwargs):
  return _with_student('ds_fl', 1, **kwargs)


@helpers.shared
def _cfd(**kwargs):
  return _with_student('cfd', 2, **kwargs)


def _weights(state):
  return [np.array(w, np.float64) for w in state.weights.trainable]


def _check(found, expected):
  helpers.assert_weights_close(found, expected, rtol=1e-4, atol=1e-5)


def test_fed_md_in_numpy():
  process = _fed_md()
  assert process.get_model_weights is None
  state, first = process.initialize(), process.initialize_client()
  models = [_weights(first) for _ in _SIZES]
  consensus, states = None, dict.fromkeys(range(3), first)
  for taking_part in ([0, 1], [1, 2], [0, 2, 1]):
    for k in taking_part:
      if consensus is not None:
        # The mean over classes and examples of |z - consensus|.
        sign = np.sign(_logits(models[k], _X) - consensus)
        dz = sign / sign.size
        models[k] = _step(models[k], _X, dz, _DIGEST_RATE)
      models[k] = _fit(models[k], *_client(k), _RATE)
    consensus = np.mean([_logits(models[k], _X) for k in taking_part], axis=0)
    output = helpers.round_of(process, state, _datasets(taking_part), states)
    state = output.state
    for k in taking_part:
      _check(_weights(states[k]), models[k])
  counts = output.metrics['client_work']['participation']
  assert counts['num_included'] == counts['num_taught'] == 3


def test_ds_fl_in_numpy():
  process = _ds_fl()
  state, first = process.initialize(), process.initialize_client()
  models, server = [_weights(first)] * 2, _weights(first)
  target, states, rate = None, [first] * 2, _RATE
  for round_num in range(4):
    if round_num == 3:
      # From without: another model of the server, and another rate of the clients.
      server, rate = [0.5 * w for w in server], 0.05
      state = process.set_model_weights(
          state, tff.learning.models.ModelWeights([np.float32(w) for w in server], [])
      )
      assert process.get_hparams(state) == {
          'client_work': {'learning_rate': np.float32(_RATE)}
      }
      state = process.set_hparams(
          state, {'client_work': {'learning_rate': np.float32(rate)}}
      )
    if target is not None:
      models = [_distilled(its, _X, target, _DIGEST_RATE) for its in models]
    models = [_fit(its, *_client(k), rate) for k, its in enumerate(models)]
    mean = np.mean([helpers.softmax(_logits(its, _X)) for its in models], axis=0)
    target = helpers.softmax(mean / 0.1)
    server = _distilled(server, _X, target, _DIGEST_RATE)
    output = process.next(state, [_dataset(0), _dataset(1)], states)
    state, states = output.state, output.client_states
    for its, model in zip(states, models):
      _check(_weights(its), model)
    _check(process.get_model_weights(state).trainable, server)


def _units(p, bits):
  """Largest remainders, row by row."""
  total = 2**bits - 1
  units = np.floor(total * p).astype(np.int32)
  for row, its in zip(p, units):
    remainders = total * row - its
    its[np.argsort(-remainders, kind='stable')[: total - its.sum()]] += 1
  return units


@pytest.mark.parametrize(
    'up_bits, down_bits', [(1, 3), *helpers.slow_each((2, 32), (32, 3))]
)
def test_cfd_in_numpy(up_bits, down_bits):
  """Who takes part changes; each codes against what it sent itself."""
  process = _cfd(up_bits=up_bits, down_bits=down_bits)
  assert process.kept_models is None
  state, first = process.initialize(), process.initialize_client()
  assert first.weights == ()
  initial = [
      np.array(w, np.float64) for w in process.get_model_weights(state).trainable
  ]
  server, labels = initial, None
  states, sent = dict.fromkeys(range(3), first), {}
  rows = process.transfer_set.prediction_ids(0).numpy()

  def distilled(model, target):
    for _ in range(2):
      model = _distilled(model, _X, target, _DIGEST_RATE)
    return model

  for taking_part in ([0, 1], [1, 2], [2, 0, 1], [1]):
    said, bits = [], 0
    for k in taking_part:
      model = initial if labels is None else distilled(initial, labels)
      p = helpers.softmax(_logits(_fit(model, *_client(k), _RATE), _X))
      if up_bits < 32:
        units = _units(p, up_bits)
        p = units / (2**up_bits - 1)
        message = codecs.encode(units, up_bits, sent.get(k))
        bits += 8 * len(message)
        sent[k] = units
      said.append(p)
    server = distilled(server, np.mean(said, axis=0))
    labels = helpers.softmax(_logits(server, _X))
    if down_bits < 32:
      labels = _units(labels, down_bits) / (2**down_bits - 1)
    output = helpers.round_of(process, state, _datasets(taking_part), states)
    state = output.state
    _check(process.get_model_weights(state).trainable, server)
    np.testing.assert_allclose(
        helpers.softmax(state.shared.logits), labels[rows], rtol=1e-4, atol=1e-5
    )
    counts = output.metrics['client_work']['participation']
    if up_bits < 32:
      # Each message is within a byte of its code.
      assert 0 <= bits - counts['knowledge_bits'] + 1 < 9 * len(taking_part)
      found = [states[k].sent.values for k in taking_part]
      np.testing.assert_allclose(found, np.array(said)[:, rows], atol=1e-5)
      assert all(states[k].sent_round >= 0 for k in taking_part)
    else:
      assert 'knowledge_bits' not in counts
  assert counts['num_taught'] == 1


def test_cfd_over_rows_that_change_codes_each_message_alone(tmp_path):
  process = _cfd(transfer_set=tff_kd.TransferSet(_X, subset_size=6))
  state, client = process.initialize(), process.initialize_client()
  assert not tf.nest.flatten(client)
  store = client_states.ClientStates(client, tmp_path)
  alone = codecs.first_message_bits(6, helpers.CLASSES, 1)
  for round_num in range(1, 4):
    output = process.next(state, [_dataset(0), _dataset(1)], store.load([0, 1]))
    state = output.state
    store.save([0, 1], output.client_states, round_num)
    counts = output.metrics['client_work']['participation']
    assert counts['knowledge_bits'] == 2 * alone
  assert store.clients() == [0, 1]


def test_cfd_counts_the_bytes_of_the_code():
  process = _cfd(up_bits=1, down_bits=3)
  bytes_of = tff_kd.communication.round_bytes(process)
  size = lambda bits: -(-codecs.first_message_bits(10, helpers.CLASSES, bits) // 8)
  assert bytes_of.up_knowledge == bytes_of.up == size(1) == 3
  assert bytes_of.down == size(3) + 8
  state, client = process.initialize(), process.initialize_client()
  for round_num in range(2):
    output = process.next(state, [_dataset(0)], [client])
    (client,) = output.client_states
    bits = output.metrics['client_work']['participation']['knowledge_bits']
    # The second message, from the same state, says the same again.
    assert bits == (1 + 4 if round_num else codecs.first_message_bits(10, 3, 1))


def test_a_cfd_round_without_clients_teaches_nothing():
  process = _cfd(up_bits=1, down_bits=3)
  state, client = process.initialize(), process.initialize_client()
  given = tf.nest.map_structure(lambda w: w + 1.0, process.get_model_weights(state))
  state = process.set_model_weights(state, given)
  x, y = _client(0)
  output = process.next(state, [helpers.dataset(x[:0], y[:0])], [client])
  counts = output.metrics['client_work']['participation']
  assert counts['knowledge_bits'] == counts['num_included'] == 0
  assert output.client_states[0].sent_round == -1
  helpers.assert_weights_close(
      process.get_model_weights(output.state), given, rtol=0
  )
  output = process.next(output.state, [_dataset(0)], [client])
  assert output.metrics['client_work']['participation']['num_taught'] == 0


def test_cfd_refuses_bits_and_parts_without_a_meaning():
  for bits in ({'up_bits': 0}, {'down_bits': 9}, {'up_bits': 31}):
    with pytest.raises(ValueError, match='_bits.*from 1 .* to 8.* 32 is for none'):
      _cfd(**bits)
  stage = distill.DistillationStage(
      'student', helpers.sgd(), tff_kd.Distillation()
  )
  students = tff_kd.models.cohorts.build_students(
      helpers.common()['student_fn'],
      input_spec=helpers.INPUT_SPEC,
      loss_fn=helpers.loss_fn,
  )
  with pytest.raises(ValueError, match='Pretraining needs clients that keep'):
    tff_kd.rounds.compose_process(
        tff_kd.rounds.Parts(
            students=students,
            client_optimizer=helpers.sgd(),
            client_model=tff_kd.rounds.ClientModel.INITIAL,
            transfer_set=tff_kd.TransferSet(_X, _Y),
            pretraining=stage,
        )
    )


@dataclasses.dataclass(frozen=True)
class _Remembering(knowledge.consensus.WrappedRule):
  """A rule with a state that needs no average."""

  keeps_state = True

  def initial_state(self, logits_shape):
    return tf.zeros([])


@pytest.mark.parametrize('build', [_ds_fl, _fed_md])
def test_a_rule_with_a_state_is_refused_where_clients_learn_the_consensus(build):
  with pytest.raises(ValueError, match='_Remembering.*keeps a state.*keeps none'):
    build(consensus_rule=_Remembering(knowledge.MeanLogits()))


@pytest.mark.parametrize('build', [_ds_fl, _cfd])
def test_clients_have_nothing_to_blend_the_consensus_with(build):
  with pytest.raises(ValueError, match="`target` must be 'ensemble', found 0.5"):
    build(distillation=tff_kd.Distillation(target=0.5))


def test_clients_do_not_learn_from_diversity():
  with pytest.raises(ValueError, match='`diversity_weight` at 0, found 0.5'):
    _ds_fl(
        consensus_rule=knowledge.CertaintyWithDiversity(),
        distillation=tff_kd.Distillation(diversity_weight=0.5),
    )


def test_clients_that_keep_models_code_against_what_they_sent():
  """DS-FL with labels of two bits."""
  rule = knowledge.Quantized(knowledge.MeanProbabilities(temperature=0.1), 2)
  process = _ds_fl(consensus_rule=rule)
  state, states = process.initialize(), [process.initialize_client()] * 2
  sent = [None, None]
  rows = process.transfer_set.prediction_ids(0).numpy()
  for _ in range(3):
    output = process.next(state, [_dataset(0), _dataset(1)], states)
    state, states = output.state, output.client_states
    bits = 0
    for k, its in enumerate(states):
      p = helpers.softmax(_logits(_weights(its), _X))
      units = _units(p, 2)
      np.testing.assert_allclose(its.sent.values, units[rows] / 3, atol=1e-5)
      bits += 8 * len(codecs.encode(units, 2, sent[k]))
      sent[k] = units
    found = output.metrics['client_work']['participation']['knowledge_bits']
    assert 0 <= bits - found + 1 < 18
  bytes_of = tff_kd.communication.round_bytes(process)
  assert bytes_of.up == rule.first_message_bytes(tf.TensorShape([3]), 10)
  assert bytes_of.down == 4 * len(_X) * (helpers.CLASSES + 1) + 8


@helpers.shared
def _fd(share):
  return helpers.build(
      'fd', client_optimizer=helpers.sgd(_RATE), regularizer_weight=share
  )


def test_clients_states_of_the_best_round_stay(tmp_path):
  data = tff_kd.FileClientData.from_arrays(
      helpers.examples(8, 0), [np.arange(4), np.arange(4, 8)]
  )
  batches = tff_kd.ClientBatches(data=data, batch_size=4, num_epochs=1)
  process, found = helpers.build('fd', client_data=batches), {}
  train = functools.partial(
      tff_kd.simulation.train, process, select_clients=lambda n: [0, 1],
      progress_bar=False, monitor='score',
      evaluate=lambda state: {'score': -abs(float(state.round_num) - 3)},
  )
  for num_rounds in (3, 9):
    store = client_states.ClientStates(
        process.initialize_client(), tmp_path / f'{num_rounds}'
    )
    result = train(
        num_rounds=num_rounds, client_states=store, rounds_per_saving=2,
        program_state_manager=tff_kd.simulation.Checkpoints(
            tmp_path / f'checkpoints-{num_rounds}'
        ),
    )
    assert result.best_round == 3
    found[num_rounds] = store.load([0, 1], 3)
  helpers.assert_weights_close(found[9], found[3], rtol=0)
  assert len(list((tmp_path / '9').iterdir())) < 2 * 9
  # Without checkpoints it is what clients have after the last round and the best one.
  store = client_states.ClientStates(process.initialize_client(), tmp_path / 'unsaved')
  train(num_rounds=9, client_states=store)
  helpers.assert_weights_close(store.load([0, 1], 3), found[3], rtol=0)
  assert len(list((tmp_path / 'unsaved').iterdir())) == 2 * 2


@pytest.mark.parametrize('batch_size', [2, 8])
def test_fd_in_numpy(batch_size):
  """Four rounds; who was not in the last one has no part in its sums."""
  share = 0.6
  process = _fd(share)
  state, first = process.initialize(), process.initialize_client()
  models, states = [_weights(first) for _ in _SIZES], dict.fromkeys(range(3), first)
  eye, sums = np.eye(helpers.CLASSES), {}
  for taking_part in ([0, 1, 2], [0, 1], [2, 1, 0], [2]):
    new_sums = {}
    for k in taking_part:
      others = [its for client, its in sums.items() if client != k]
      values = sum((v for v, _ in others), np.zeros((3, 3)))
      counts = sum((n for _, n in others), np.zeros(3))
      x, y = _client(k)
      own = [np.zeros((3, 3)), np.zeros(3)]
      for start in range(0, len(x), batch_size):
        bx, by = x[start : start + batch_size], y[start : start + batch_size]
        z = _logits(models[k], bx)
        dz = helpers.softmax(z) - eye[by]
        for i, label in enumerate(by):
          if counts[label]:
            dz[i] += share * (
                helpers.softmax(z[i]) - helpers.softmax(values[label] / counts[label])
            )
          own[0][label] += z[i]
          own[1][label] += 1
        models[k] = _step(models[k], bx, dz / len(bx), _RATE)
      new_sums[k] = own
    sums = new_sums
    datasets = {k: helpers.dataset(*_client(k), batch_size) for k in taking_part}
    state = helpers.round_of(process, state, datasets, states).state
    for k in taking_part:
      _check(_weights(states[k]), models[k])
    np.testing.assert_allclose(
        state.shared.weights, sum(n for _, n in sums.values()), rtol=1e-5
    )


def test_fd_leaves_a_clients_own_part_out():
  found = []
  for share in (1e-30, 0.6):
    output, (client,) = helpers.rounds(_fd(share), [_dataset(0)], 3)
    found.append(client.weights)
  # Alone, it has nobody to learn from, its own past least of all.
  assert output.metrics['client_work']['participation']['num_taught'] == 0
  helpers.assert_weights_close(*found, rtol=1e-6)


@pytest.mark.parametrize('ignored', [helpers.slow(-1), 0])
def test_fd_shares_nothing_of_what_the_loss_ignores(ignored):
  x, y = helpers.examples(12, 0)
  y = np.where(np.arange(12) % 3, y, ignored).astype(np.int32)
  process = helpers.build(
      'fd', client_optimizer=helpers.sgd(1e-12),
      loss_fn=helpers.loss_with(ignore_class=ignored),
  )
  state, client = process.initialize(), process.initialize_client()
  output = process.next(state, [helpers.dataset(x, y)], [client])
  kept = y != ignored
  expected = process.next(state, [helpers.dataset(x[kept], y[kept])], [client])
  helpers.assert_weights_close(
      output.state.shared, expected.state.shared, rtol=1e-5, atol=1e-5
  )
  assert np.sum(output.state.shared.weights) == np.sum(kept)
  # Two learn from each other in the next round.
  output = process.next(state, [helpers.dataset(x, y)] * 2, [client] * 2)
  output = process.next(
      output.state, [helpers.dataset(x, y)] * 2, output.client_states
  )
  assert output.metrics['client_work']['participation']['num_included'] == 2


@pytest.mark.parametrize('algorithm', ['fd', 'fed_proto'])
def test_what_is_learned_of_a_class_does_not_depend_on_padding(algorithm):
  """As the loss on the labels, the term is a mean over what the loss does not ignore."""
  process = helpers.build(
      algorithm, student_fn=helpers.features_fn(4), client_optimizer=helpers.sgd(_RATE),
      loss_fn=helpers.loss_with(ignore_class=-1), metrics_fn=None,
  )
  first = process.initialize_client()
  (x, y), (other_x, other_y) = helpers.examples(6, 0), helpers.examples(6, 1)
  state = process.next(
      process.initialize(), [helpers.dataset(other_x, other_y, batch_size=6)], [first]
  ).state
  padding = helpers.examples(12, 2)[0], np.full(12, -1, np.int32)
  padded = np.concatenate([x, padding[0]]), np.concatenate([y, padding[1]])
  found, expected = (
      process.next(state, [helpers.dataset(*data, batch_size=18)], [first])
      for data in (padded, (x, y))
  )
  assert found.metrics['client_work']['participation']['num_taught'] == 1
  helpers.assert_weights_close(
      found.client_states[0].weights, expected.client_states[0].weights, **_CLOSE
  )


def test_fd_needs_sums_in_which_all_parts_are_as_they_are():
  learning = tff.learning
  with pytest.raises(ValueError, match='knowledge_weighting.*UNIFORM.*NUM_EXAMPLES'):
    helpers.build('fd', knowledge_weighting=learning.ClientWeighting.NUM_EXAMPLES)
  with pytest.raises(ValueError, match='own part .*knowledge_aggregator` must be `None`'):
    helpers.build('fd', knowledge_aggregator=learning.robust_aggregator(zeroing=True))


def test_fd_needs_class_indices():
  x, y = helpers.examples(4, 0)
  one_hot = helpers.dataset(x, np.eye(helpers.CLASSES, dtype=np.float32)[y])
  with pytest.raises(ValueError, match='class indices'):
    helpers.build(
        'fd', input_spec=one_hot.element_spec,
        loss_fn=lambda: keras.losses.CategoricalCrossentropy(from_logits=True),
        metrics_fn=None,
    )
  with pytest.raises(ValueError, match='above 0'):
    helpers.build('fd', regularizer_weight=0.0)


class _Steps(companions.Companion):
  """Counts the clients' steps."""

  def attach(self, student):
    return companions.Attachment(
        end=lambda observed, student, values: ((), observed),
        observer=companions.Observer(lambda: tf.constant(0), lambda _: tf.constant(1)),
    )

  def exchange(self, server_state, exchanged, round_num):
    return server_state, tff.federated_sum(exchanged)


def test_a_companion_and_the_exchange_each_add_up_over_the_steps():
  process = helpers.build('fd', companion=_Steps())
  output = process.next(
      process.initialize(),
      [_dataset(0), _dataset(1).repeat(2)],
      [process.initialize_client()] * 2,
  )
  assert output.metrics['companion'] == 1 + 2
  assert np.sum(output.state.shared.weights) == _SIZES[0] + 2 * _SIZES[1]


def test_a_companions_state_has_no_place_beside_models_that_clients_keep():
  class Remembers(_Steps):
    def initial_client_state(self):
      return tf.constant(0)

  with pytest.raises(ValueError, match='Remembers keeps a state at clients'):
    helpers.build('fd', companion=Remembers())


@pytest.mark.parametrize(
    'name, optimizers',
    [
        ('fd', ()),
        *helpers.slow_each(
            ('fed_md', ('digest_optimizer',)), ('ds_fl', ('student_optimizer',))
        ),
    ],
)
def test_keras_optimizers_and_any_keras_model(name, optimizers):
  model_fn = lambda: keras.Sequential([  # pylint: disable=g-long-lambda
      keras.layers.InputLayer((helpers.DIM,)),
      keras.layers.Dense(6),
      keras.layers.BatchNormalization(),
      keras.layers.Dense(helpers.CLASSES),
  ])
  adam = lambda: keras.optimizers.Adam(0.01)
  kwargs = dict.fromkeys(('client_optimizer', *optimizers), adam)
  builders = {'fed_md': _fed_md, 'ds_fl': _ds_fl}
  build = builders.get(name, functools.partial(helpers.build, name))
  process = build(student_fn=model_fn, **kwargs)
  state, states = process.initialize(), [process.initialize_client()] * 2
  losses = []
  for _ in range(6):
    output = process.next(state, [_dataset(0), _dataset(1)], states)
    state, states = output.state, output.client_states
    losses.append(output.metrics['client_work']['train']['loss'])
  # From the second round on with the term of what was learned from others.
  assert losses[-1] < losses[1]
  # Batch norm's statistics are the client's own, too.
  assert not np.array_equal(
      states[0].weights.non_trainable[0], states[1].weights.non_trainable[0]
  )


def test_pretraining_needs_labels():
  with pytest.raises(ValueError, match='labels'):
    _fed_md(pretraining_epochs=1)


@pytest.mark.parametrize('subset_size', [None, 4])
def test_clients_are_pretrained_on_all_labels(subset_size):
  transfer_set = tff_kd.TransferSet(_X, _Y, subset_size=subset_size)
  process = _fed_md(transfer_set=transfer_set, pretraining_epochs=3)
  plain = _weights(_fed_md().initialize_client())
  for _ in range(3):
    plain = _fit(plain, _X, _Y, _DIGEST_RATE)
  _check(_weights(process.initialize_client()), plain)


def test_pretraining_on_some_labels_is_kept_where_they_validate_it():
  x, _ = helpers.examples(24, 5)
  y = (x[:, 0] > 0).astype(np.int32)
  known = np.arange(24) % 3 > 0
  transfer_set = tff_kd.TransferSet(x, y, label_mask=known, validation_size=8)
  process = _fed_md(
      transfer_set=transfer_set, pretraining_epochs=3, digest_batch_size=16
  )
  expected = _weights(_fed_md().initialize_client())
  rows = transfer_set.round_ids(0).numpy()
  rows = rows[known[rows]]
  assert 0 < len(rows) < 16
  for _ in range(3):
    expected = _fit(expected, x[rows], y[rows], _DIGEST_RATE)
  _check(_weights(process.initialize_client()), expected)


def test_a_client_that_cannot_take_part_keeps_its_model():
  process = _ds_fl()
  state, first = process.initialize(), process.initialize_client()
  x, y = _client(1)
  bad = [
      helpers.dataset(x[:0], y[:0]),
      helpers.dataset(x * np.float32(np.nan), y),
      helpers.dataset(x, y + 50),
  ]
  output = process.next(state, [_dataset(0), *bad], [first] * 4)
  for its in output.client_states[1:]:
    helpers.assert_weights_close(its.weights, first.weights, rtol=0)
  counts = output.metrics['client_work']['participation']
  assert counts['num_included'] == 1
  assert counts['num_excluded_empty'] == counts['num_excluded_non_finite'] == 1
  assert counts['num_excluded_bad_labels'] == 1
  alone = process.next(state, [_dataset(0)], [first])
  helpers.assert_weights_close(
      output.state.shared, alone.state.shared, rtol=1e-5, atol=1e-6
  )


def _linear_features_fn():
  return keras.Sequential([
      keras.layers.InputLayer((helpers.DIM,)),
      keras.layers.Dense(4, kernel_initializer=keras.initializers.Constant(0.2)),
      keras.layers.Dense(
          helpers.CLASSES, kernel_initializer=keras.initializers.Constant(1e-3)
      ),
  ])


@pytest.mark.parametrize(
    'name, student_fn, size',
    [
        (
            'fd',
            helpers.dense_fn(kernel_initializer=keras.initializers.Constant(0.2)), 1.7e38,
        ),
        helpers.slow('fed_proto', _linear_features_fn, 3e38),
    ],
)
def test_sums_by_class_that_are_infinite_reach_nobody(name, student_fn, size):
  process = helpers.build(name, student_fn=student_fn, client_optimizer=helpers.sgd(1e-3))
  # Each output is finite, and so are the weights after a step; the sum of three is not.
  x, y = np.ones([9, helpers.DIM], np.float32), np.int32([0, 1, 2] * 3)
  good, bad = (helpers.dataset(scale * x, y, 9) for scale in (1, np.float32(size)))
  state, new = process.initialize(), process.initialize_client()
  alone = process.next(state, [good], [new])
  output = process.next(state, [good, bad], [new] * 2)
  counts = output.metrics['client_work']['participation']
  assert counts['num_included'] == counts['num_excluded_non_finite'] == 1
  helpers.assert_weights_close(output.state.shared, alone.state.shared, rtol=0, atol=0)
  assert np.abs(output.state.shared.values).max() > 0.0
  helpers.assert_weights_close(output.client_states[1].weights, new.weights, rtol=0)


def test_order_of_clients_does_not_matter():
  process = _ds_fl()
  state, first = process.initialize(), process.initialize_client()
  one = process.next(state, [_dataset(k) for k in (0, 1, 2)], [first] * 3)
  other = process.next(state, [_dataset(k) for k in (2, 0, 1)], [first] * 3)
  helpers.assert_weights_close(other.state, one.state, rtol=1e-5, atol=1e-6)
  for k, its in zip((2, 0, 1), other.client_states):
    helpers.assert_weights_close(its, one.client_states[k], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope='module')
def batches():
  return helpers.batches([helpers.examples(10, seed) for seed in range(6)], seed=0)


def _train(process, folder, num_rounds, **kwargs):
  return tff_kd.simulation.train(
      process,
      select_clients=lambda round_num: [(round_num + k) % 6 for k in range(3)],
      num_rounds=num_rounds,
      rounds_per_saving=2,
      program_state_manager=tff.program.FileProgramStateManager(
          folder / 'checkpoints', keep_total=2, keep_first=False
      ),
      client_states=client_states.ClientStates(
          process.initialize_client(), folder / 'clients'
      ),
      **kwargs,
  )


class _KilledError(Exception):
  pass


class _KilledIn(tff_kd.simulation.Callback):

  def __init__(self, round_num):
    self._round_num = round_num

  def on_round_end(self, training, metrics):
    if training.round_num == self._round_num:
      raise _KilledError


def test_a_resumed_run_repeats_an_unbroken_one(batches, tmp_path):
  arguments = dict(client_data=batches, input_spec=batches.element_spec)
  built = _ds_fl(**arguments)
  whole = _train(built, tmp_path / 'whole', 7)

  # The checkpoint is of round 4; clients have been further.
  with pytest.raises(_KilledError):
    _train(built, tmp_path / 'parts', 7, callbacks=[_KilledIn(5)])
  resumed = _train(_ds_fl.anew(**arguments), tmp_path / 'parts', 7)
  assert len(resumed.history) == 3
  helpers.assert_weights_close(resumed.state, whole.state, rtol=0)
  stores = [
      client_states.ClientStates(built.initialize_client(), tmp_path / its / 'clients')
      for its in ('whole', 'parts')
  ]
  assert stores[0].clients() == stores[1].clients() == list(range(6))
  for found, expected in zip(*(store.load(range(6)) for store in stores)):
    helpers.assert_weights_close(found, expected, rtol=0)
  # Two checkpoints are kept, and of each client what they need: not all 7 rounds.
  assert len(list((tmp_path / 'whole' / 'clients').iterdir())) <= 6 * 4


def test_training_begins_with_the_states_that_it_is_given(batches, tmp_path):
  process = _ds_fl(client_data=batches, input_spec=batches.element_spec)
  store = client_states.ClientStates(process.initialize_client(), tmp_path)
  train = functools.partial(
      tff_kd.simulation.train, process, select_clients=lambda _: [0, 1],
      client_states=store,
  )
  first = train(num_rounds=1)
  before = store.load([0, 1])
  with pytest.raises(ValueError, match=r'starts from round 1.*rewind\(0\)'):
    train(num_rounds=1)
  loaded = []
  load = store.load
  store.load = lambda clients: loaded.append(load(clients)) or loaded[-1]
  train(num_rounds=1, initial_state=first.state)
  helpers.assert_weights_close(loaded[0], before, rtol=0)


def test_a_run_that_is_killed_before_its_first_checkpoint_begins_with_the_same_states(
    batches, tmp_path
):
  process = _ds_fl(client_data=batches, input_spec=batches.element_spec)
  found = []
  for name in ('whole', 'parts'):
    store = client_states.ClientStates(
        process.initialize_client(), tmp_path / name / 'clients'
    )
    before = tff_kd.simulation.train(
        process, select_clients=lambda _: range(6), num_rounds=1, client_states=store
    )
    train = functools.partial(
        _train, process, tmp_path / name, 3, initial_state=before.state
    )
    if name == 'parts':  # Checkpoints are of rounds 2 and 3.
      with pytest.raises(_KilledError):
        train(callbacks=[_KilledIn(1)])
    state = train().state
    store = client_states.ClientStates(
        process.initialize_client(), tmp_path / name / 'clients'
    )
    found.append((state, store.load(range(6))))
  helpers.assert_weights_close(*found, rtol=0)


def test_client_numbers_are_needed_and_come_once(batches, tmp_path):
  process = _ds_fl(client_data=batches, input_spec=batches.element_spec)
  store = client_states.ClientStates(process.initialize_client(), tmp_path)
  for selected, error, match in (
      ([1, 1], ValueError, 'once only'),
      ([_dataset(0)], TypeError, "clients' numbers or names"),
  ):
    with pytest.raises(error, match=match):
      tff_kd.simulation.train(
          process, select_clients=lambda _, its=selected: its, num_rounds=1,
          client_states=store,
      )
