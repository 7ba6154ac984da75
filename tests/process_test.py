"""Whole rounds through TFF's runtime, against NumPy and against TFF's FedAvg."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tff_kd.compat import tff

import tff_kd
from tests import helpers



class _Linear:
  """A linear classifier with momentum SGD, by hand, in float64."""

  def __init__(self, weights):
    self.w = [np.array(v, np.float64) for v in weights]
    self.momentum = [np.zeros_like(v) for v in self.w]

  def logits(self, x):
    return x @ self.w[0] + self.w[1]

  def step(self, x, d_logits, rate, momentum):
    for i, g in enumerate([x.T @ d_logits, d_logits.sum(0)]):
      self.momentum[i] = momentum * self.momentum[i] + g
      self.w[i] = self.w[i] - rate * self.momentum[i]


def _train_client(weights, x, y, batch_size, rate, momentum):
  """Local SGD; returns weights, summed loss and number of right answers."""
  model, loss, right = _Linear(weights), 0.0, 0
  for i in range(0, len(x), batch_size):
    xb, yb = x[i : i + batch_size], y[i : i + batch_size]
    p = helpers.softmax(model.logits(xb))
    loss -= np.log(p[np.arange(len(yb)), yb]).sum()
    right += (p.argmax(-1) == yb).sum()
    p[np.arange(len(yb)), yb] -= 1
    model.step(xb, p / len(xb), rate, momentum)
  return model, loss, right


def _distil(model, x, target, t, steps, rate, momentum):
  """Full-batch steps on T^2 KL; returns the loss at each step."""
  trace = []
  for _ in range(steps):
    p, q = helpers.softmax(target / t), helpers.softmax(model.logits(x) / t)
    trace.append(t * t * np.mean(np.sum(p * np.log(p / q), -1)))
    model.step(x, t * (q - p) / len(x), rate, momentum)
  return trace


@pytest.mark.parametrize('uniform', [helpers.slow(False), True])
def test_two_rounds_equal_numpy(uniform):
  sizes, t, m = [7, 4, 12], 3.0, 9
  clients = [helpers.examples(n, i) for i, n in enumerate(sizes)]
  public, _ = helpers.examples(m, 99)
  keras.utils.set_random_seed(1)
  distillation = dict(temperature=t, num_steps=2, batch_size=m)
  process = helpers.build(
      'fed_distillation', client_optimizer=helpers.sgd(0.1, 0.9),
      teacher_fn=helpers.dense_fn(), transfer_set=tff_kd.TransferSet(public),
      server_optimizer=helpers.sgd(0.7, 0.5), teacher_optimizer=helpers.sgd(0.2, 0.9),
      student_optimizer=helpers.sgd(0.3, 0.8),
      distillation=tff_kd.Distillation(target='ensemble', **distillation),
      back_distillation=tff_kd.Distillation(target='teacher', **distillation),
      client_weighting=(
          tff.learning.ClientWeighting.UNIFORM
          if uniform
          else tff.learning.ClientWeighting.NUM_EXAMPLES
      ),
  )
  state = process.initialize()
  student = _Linear(state.global_model_weights.trainable)
  teacher = _Linear(state.teacher_weights.trainable)
  server_momentum = [np.zeros_like(v) for v in student.w]
  back_momentum = [np.zeros_like(v) for v in student.w]
  weights = np.array([1, 1, 1] if uniform else sizes, np.float64)
  weights /= weights.sum()

  for _ in range(2):
    output = process.next(state, [helpers.dataset(x, y) for x, y in clients])
    state = output.state

    trained = [
        _train_client(student.w, x.astype(np.float64), y, 4, 0.1, 0.9)
        for x, y in clients
    ]
    x = public.astype(np.float64)
    for i in range(2):
      delta = sum(
          w * (student.w[i] - model.w[i])
          for w, (model, _, _) in zip(weights, trained)
      )
      server_momentum[i] = 0.5 * server_momentum[i] + delta
      student.w[i] = student.w[i] - 0.7 * server_momentum[i]
    averaged = [v.copy() for v in student.w]
    ensemble = sum(
        w * model.logits(x) for w, (model, _, _) in zip(weights, trained)
    )
    teacher_trace = _distil(teacher, x, ensemble, t, 2, 0.2, 0.9)
    student.momentum = back_momentum
    student_trace = _distil(student, x, teacher.logits(x), t, 2, 0.3, 0.8)
    back_momentum = student.momentum

    close = dict(rtol=1e-5, atol=1e-5)
    helpers.assert_weights_close(
        state.aggregated_model_weights.trainable, averaged, **close
    )
    helpers.assert_weights_close(
        state.global_model_weights.trainable, student.w, **close
    )
    helpers.assert_weights_close(
        state.teacher_weights.trainable, teacher.w, **close
    )
    train = output.metrics['client_work']['train']
    np.testing.assert_allclose(
        train['loss'], sum(loss for _, loss, _ in trained) / sum(sizes), **close
    )
    np.testing.assert_allclose(
        train['accuracy'], sum(r for _, _, r in trained) / sum(sizes), **close
    )
    assert train['num_examples'] == sum(sizes)
    server = output.metrics['server_distillation']
    for name, trace in (('teacher', teacher_trace), ('student', student_trace)):
      np.testing.assert_allclose(server[name]['first_loss'], trace[0], **close)
      np.testing.assert_allclose(server[name]['last_loss'], trace[1], **close)
      assert server[name]['num_steps'] == 2
      assert server[name]['num_targets'] == m
      assert server[name]['rolled_back'] == 0
  assert state.round_num == 2


@pytest.mark.parametrize(
    'weighting',
    [
        tff.learning.ClientWeighting.NUM_EXAMPLES,
        # Equal weights are in the rounds in NumPy, too.
        pytest.param(tff.learning.ClientWeighting.UNIFORM, marks=pytest.mark.slow),
    ],
)
def test_without_distillation_three_rounds_equal_tffs_fed_avg(weighting):
  units = (6,)
  ours = helpers.build(
      'fed_avg', student_fn=helpers.dense_fn(units),
      client_optimizer=helpers.sgd(0.1, 0.9),
      server_optimizer=tff.learning.optimizers.build_adam(0.01),
      client_weighting=weighting,
  )

  def model_fn():
    # TFF's own wrapper, of a model of Keras 2, which is all it takes.
    return tff.learning.models.from_keras_model(
        tf_keras.Sequential([
            tf_keras.layers.InputLayer((helpers.DIM,)),
            *(tf_keras.layers.Dense(u, activation='relu') for u in units),
            tf_keras.layers.Dense(helpers.CLASSES),
        ]),
        loss=tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        input_spec=helpers.INPUT_SPEC,
        metrics=[tf_keras.metrics.SparseCategoricalAccuracy(name='accuracy')],
    )

  theirs = tff.learning.algorithms.build_weighted_fed_avg(
      model_fn,
      client_optimizer_fn=helpers.sgd(0.1, 0.9),
      server_optimizer_fn=tff.learning.optimizers.build_adam(0.01),
      client_weighting=weighting,
  )
  state = ours.initialize()
  their_state = theirs.set_model_weights(
      theirs.initialize(), ours.get_model_weights(state)
  )
  for round_num in range(3):
    data = [
        helpers.dataset(*helpers.examples(n, n + round_num)) for n in (9, 3, 20)
    ]
    output = ours.next(state, data)
    their_output = theirs.next(their_state, data)
    state, their_state = output.state, their_output.state
    helpers.assert_weights_close(
        ours.get_model_weights(state),
        theirs.get_model_weights(their_state),
        rtol=1e-6,
        atol=1e-6,
    )
    for name in ('loss', 'accuracy', 'num_examples', 'num_batches'):
      np.testing.assert_allclose(
          output.metrics['client_work']['train'][name],
          their_output.metrics['client_work']['train'][name],
          rtol=1e-6,
      )
  assert state.teacher_weights == ()
  with pytest.raises(ValueError, match='no teacher'):
    _ = ours.get_teacher_weights


def _fusion(labelled=False, **kwargs):
  public, labels = helpers.examples(16, 5)
  steps = dict(num_steps=3, batch_size=8)
  defaults = dict(
      distillation=tff_kd.Distillation(target='ensemble', **steps),
      back_distillation=tff_kd.Distillation(target='teacher', **steps),
      teacher_fn=helpers.dense_fn((8,)),
      transfer_set=tff_kd.TransferSet(public, labels if labelled else None),
  )
  return helpers.build('fed_distillation', **{**defaults, **kwargs})


@pytest.fixture(scope='module')
def fusion():
  keras.utils.set_random_seed(0)
  return _fusion()


GOOD = [helpers.examples(9, 1), helpers.examples(6, 2)]


def _run(process, clients, batch_size=4):
  return process.next(
      process.initialize(),
      [helpers.dataset(x, y, batch_size) for x, y in clients],
  )


def _bad_client(kind):
  x, y = (a.copy() for a in helpers.examples(10, 3))
  if kind == 'empty':
    return x[:0], y[:0]
  if kind == 'nan':
    x[3, 2] = np.nan
  if kind == 'infinite':
    x[3, 2] = np.inf
  if kind == 'label too high':
    y[4] = helpers.CLASSES
  if kind == 'negative label':
    y[4] = -1
  return x, y


@pytest.mark.parametrize(
    'kind, counter',
    [
        ('empty', 'num_excluded_empty'),
        ('nan', 'num_excluded_non_finite'),
        ('infinite', 'num_excluded_non_finite'),
        ('label too high', 'num_excluded_bad_labels'),
        ('negative label', 'num_excluded_bad_labels'),
    ],
)
def test_a_bad_client_changes_nothing_and_is_counted(fusion, kind, counter):
  without = _run(fusion, GOOD)
  output = _run(fusion, [GOOD[0], _bad_client(kind), GOOD[1]])
  for field in ('global_model_weights', 'teacher_weights'):
    helpers.assert_weights_close(
        getattr(output.state, field), getattr(without.state, field), rtol=1e-6
    )
  participation = output.metrics['client_work']['participation']
  assert participation['num_clients'] == 3
  assert participation['num_included'] == 2
  assert participation[counter] == 1
  assert sum(participation.values()) == 3 + 2 + 1
  np.testing.assert_allclose(
      output.metrics['client_work']['train']['loss'],
      without.metrics['client_work']['train']['loss'],
      rtol=1e-6,
  )


def test_a_client_with_less_than_a_batch_counts(fusion):
  # Defect 9.
  small = helpers.examples(2, 7)
  output = _run(fusion, [*GOOD, small], batch_size=64)
  participation = output.metrics['client_work']['participation']
  assert participation['num_included'] == 3
  assert output.metrics['client_work']['train']['num_examples'] == 9 + 6 + 2


def test_weights_that_sum_to_zero_leave_every_model_as_it_was(fusion):
  state = fusion.initialize()
  output = fusion.next(
      state, [helpers.dataset(*_bad_client('empty'))] * 2
  )
  # The way back from the unchanged teacher may still refresh the student.
  for actual, before in (
      (output.state.aggregated_model_weights, state.global_model_weights),
      (output.state.teacher_weights, state.teacher_weights),
      (output.state.finalizer, state.finalizer),
      (
          output.state.server_distillation.lessons[0],
          state.server_distillation.lessons[0],
      ),
  ):
    helpers.assert_weights_close(actual, before, rtol=0)
  assert np.isfinite(output.state.global_model_weights.trainable[0]).all()
  assert output.metrics['finalizer']['update_non_finite'] == 1
  assert output.metrics['client_work']['participation']['num_included'] == 0
  server = output.metrics['server_distillation']
  assert server['teacher']['num_targets'] == 0
  assert server['teacher']['num_steps'] == 0
  assert output.state.round_num == 1


def test_order_and_duplicates_of_clients(fusion):
  forward = _run(fusion, GOOD)
  backward = _run(fusion, GOOD[::-1])
  doubled = _run(fusion, GOOD + GOOD)
  for other in (backward, doubled):
    helpers.assert_weights_close(
        other.state.teacher_weights, forward.state.teacher_weights, atol=1e-5
    )
    helpers.assert_weights_close(
        other.state.global_model_weights, forward.state.global_model_weights,
        atol=1e-5,
    )


def test_student_target_sends_no_predictions():
  process = _fusion(
      distillation=tff_kd.Distillation(target='student', num_steps=2),
      back_distillation=None,
  )
  sizes = tff_kd.communication.round_bytes(process)
  model_bytes = 4 * (helpers.DIM * helpers.CLASSES + helpers.CLASSES)
  assert sizes == tff_kd.communication.RoundBytes(
      down_student=model_bytes, up_model=model_bytes
  )
  output = _run(process, GOOD)
  assert output.metrics['server_distillation']['teacher']['num_targets'] == 16


@pytest.mark.parametrize(
    'kwargs, match',
    [
        (dict(consensus_rule=tff_kd.knowledge.MeanLogits()), 'for `consensus_rule` to'),
        (
            dict(knowledge_weighting=tff.learning.ClientWeighting.UNIFORM),
            'no predictions that `knowledge_weighting` could be about',
        ),
    ],
)
def test_what_is_about_predictions_needs_some(kwargs, match):
  with pytest.raises(ValueError, match=match):
    _fusion(distillation=tff_kd.Distillation(target='student'), **kwargs)


def test_a_blend_of_one_part_is_that_part():
  assert tff_kd.Distillation(target=0) == tff_kd.Distillation(target='student')
  of_ensemble = tff_kd.Distillation(target=1.0, diversity_weight=0.1)
  assert of_ensemble == tff_kd.Distillation(diversity_weight=0.1)
  with pytest.raises(ValueError, match='student cannot learn from itself'):
    helpers.build(
        'fed_df', transfer_set=tff_kd.TransferSet(helpers.examples(16, 5)[0]),
        distillation=tff_kd.Distillation(target=0.0),
    )


def test_a_blend_is_between_student_and_ensemble():
  process = _fusion(
      # Of linear models, the mean's logits are the logits' mean.
      student_fn=helpers.dense_fn((6,)),
      distillation=tff_kd.Distillation(
          target=0.25, num_steps=1, batch_size=16, loss='mse'
      ),
      teacher_optimizer=helpers.sgd(0.1),
      back_distillation=None,
  )
  x, _ = helpers.examples(16, 5)
  state = process.initialize()
  logits = lambda output: process.student_spec.logits(  # pylint: disable=g-long-lambda
      output.state.aggregated_model_weights, x
  ).numpy()
  output = _run(process, GOOD)
  student = logits(output)
  each = [logits(_run(process, [client])) for client in GOOD]
  ensemble = (9 * each[0] + 6 * each[1]) / 15
  assert np.abs(student - ensemble).max() > 1e-4
  teacher = process.teacher_to_keras(state)
  blend = 0.75 * student + 0.25 * ensemble
  expected, _ = helpers.eager_step(
      lambda: tf.reduce_mean(tff_kd.losses.mean_squared_error(blend, teacher(x))),
      teacher.trainable_variables,
  )
  helpers.assert_weights_close(
      output.state.teacher_weights.trainable, expected, atol=1e-6
  )


def test_labels_add_their_cross_entropy():
  process = _fusion(
      labelled=True,
      distillation=tff_kd.Distillation(
          target='ensemble', distillation_weight=0.0, num_steps=1, batch_size=16
      ),
      teacher_optimizer=helpers.sgd(0.1),
      back_distillation=None,
  )
  state = process.initialize()
  teacher = process.teacher_to_keras(state)
  x, y = helpers.examples(16, 5)
  expected, loss = helpers.eager_step(
      lambda: helpers.loss_fn()(y, teacher(x)), teacher.trainable_variables
  )
  output = process.next(state, [helpers.dataset(*c) for c in GOOD])
  helpers.assert_weights_close(
      output.state.teacher_weights.trainable, expected, atol=1e-6
  )
  np.testing.assert_allclose(
      output.metrics['server_distillation']['teacher']['first_loss'], loss,
      rtol=1e-5,
  )


@pytest.mark.parametrize('target', ['student', 'teacher'])
def test_local_distillation_equals_a_step_by_hand(target):
  terms = [tff_kd.LocalDistillation(target=target, weight=0.3, temperature=2.0)]
  if target == 'teacher':
    process = _fusion(local_terms=terms, back_distillation=None)
  else:
    process = helpers.build('fed_avg', local_terms=terms)
  state = process.initialize()
  student = process.to_keras(state)
  frozen = (
      process.teacher_to_keras if target == 'teacher' else process.to_keras
  )(state)
  x, y = helpers.examples(6, 4)

  # Two steps: at the first one the global student is its own target.
  def loss():
    z = student(x)
    near = tf.reduce_mean(tff_kd.losses.kl_divergence(frozen(x), z, 2.0))
    return 0.7 * helpers.loss_fn()(y, z) + 0.3 * near

  for _ in range(2):
    values, _ = helpers.eager_step(loss, student.trainable_variables)
    student.set_weights(values)
  data = tf.data.Dataset.from_tensor_slices((x, y)).batch(6).repeat(2)
  after = process.next(state, [data]).state
  helpers.assert_weights_close(
      after.global_model_weights.trainable, student.trainable_variables, atol=1e-6
  )
  down = 4 * sum(w.size for w in state.global_model_weights.trainable)
  if target == 'teacher':
    # Predictions on the transfer set need the round's number.
    down += 4 * sum(w.size for w in state.teacher_weights.trainable) + 4
  assert tff_kd.communication.round_bytes(process).down == down


@pytest.mark.parametrize('keras_optimizer', [False, helpers.slow(True)])
def test_optimizer_state_lives_in_the_process_state(keras_optimizer, fusion):
  """Two rounds from one state equal one round, then one from the saved state."""
  process = fusion  # Its teacher has TFF's Adam.
  if keras_optimizer:
    process = _fusion(teacher_optimizer=lambda: keras.optimizers.Adam(0.01))
  data = [helpers.dataset(*c) for c in GOOD]
  state = process.next(process.initialize(), data).state
  copied = tf.nest.map_structure(np.copy, state)
  helpers.assert_weights_close(
      process.next(copied, data).state, process.next(state, data).state, rtol=0
  )
  # Adam's first and second moments are there and have moved.
  moments = [w for w in tf.nest.flatten(state.server_distillation) if np.ndim(w)]
  assert moments and all(np.abs(w).max() > 0 for w in moments[:4])


def test_keras_and_tff_optimizers_agree():
  # Without momentum: Keras keeps the rate inside it, TFF outside, which differs
  # under a schedule.
  results = []
  for sgd in (helpers.sgd(0.1), lambda: keras.optimizers.SGD(0.1)):
    keras.utils.set_random_seed(0)
    process = helpers.build(
        'fed_df', client_optimizer=sgd, server_optimizer=sgd, student_optimizer=sgd,
        transfer_set=tff_kd.TransferSet(helpers.examples(16, 5)[0]),
        distillation=tff_kd.Distillation(
            num_steps=3, schedule=tff_kd.cosine_schedule
        ),
    )
    state = process.initialize()
    for _ in range(2):
      state = process.next(state, [helpers.dataset(*c) for c in GOOD]).state
    results.append(state.global_model_weights)
  helpers.assert_weights_close(*results, atol=1e-5)


def test_own_aggregators_per_channel(fusion):
  """Each channel has its own: clipped weights leave the predictions' mean alone."""
  own = _fusion(
      model_aggregator=tff.aggregators.clipping_factory(
          1e-6, tff.aggregators.MeanFactory()
      ),
      knowledge_aggregator=tff.aggregators.UnweightedMeanFactory(),
  )
  state = own.initialize()
  helpers.assert_weights_close(state, fusion.initialize(), rtol=0)
  # Of clients with as many examples, the weighted mean is the plain one.
  equal = [helpers.examples(6, 1), helpers.examples(6, 2)]
  output = _run(own, equal)
  helpers.assert_weights_close(
      output.state.aggregated_model_weights, state.global_model_weights,
      atol=1e-5,
  )
  helpers.assert_weights_close(
      output.state.teacher_weights, _run(fusion, equal).state.teacher_weights,
      atol=1e-6,
  )
  # Of others it is not.
  assert np.any(
      np.abs(
          _run(own, GOOD).state.teacher_weights.trainable[0]
          - _run(fusion, GOOD).state.teacher_weights.trainable[0]
      )
      > 1e-6
  )


def test_fed_df_distils_the_ensemble_into_the_student():
  process = helpers.build(
      'fed_df', student_fn=helpers.dense_fn((6,)), client_optimizer=helpers.sgd(1.0),
      transfer_set=tff_kd.TransferSet(helpers.examples(32, 5)[0]),
  )
  output = _run(process, GOOD)
  measured = output.metrics['server_distillation']['student']
  assert measured['num_steps'] == 200
  assert measured['last_loss'] < measured['first_loss']
  assert output.state.teacher_weights == ()
  assert list(output.metrics['server_distillation']) == ['student']


def test_teacher_weights_go_in_and_out(fusion):
  state = fusion.initialize()
  keras_teacher = helpers.dense_fn((8,))()
  state = fusion.set_teacher_weights(
      state, fusion.teacher_spec.weights_of(keras_teacher)
  )
  other = fusion.teacher_to_keras(state)
  x, _ = helpers.examples(4, 0)
  np.testing.assert_allclose(other(x), keras_teacher(x))


def test_hparams_are_those_of_clients_and_finalizer(fusion):
  state = fusion.initialize()
  hparams = fusion.get_hparams(state)
  assert hparams['client_work'] == {'learning_rate': np.float32(0.1)}
  hparams['client_work']['learning_rate'] = np.float32(0.0)
  state = fusion.set_hparams(state, hparams)
  output = fusion.next(state, [helpers.dataset(*c) for c in GOOD])
  helpers.assert_weights_close(
      output.state.aggregated_model_weights, state.global_model_weights, rtol=0
  )


def test_type_of_clients_datasets_and_bytes(fusion):
  """The types of what travels are in `contract_test`."""
  parameter = fusion.next.type_signature.parameter
  assert str(parameter[1]) == '{<float32[?,5],int32[?]>*}@CLIENTS'
  assert tff_kd.communication.round_bytes(fusion) == tff_kd.communication.RoundBytes(
      down_student=18 * 4, down_round=4, up_model=18 * 4, up_knowledge=64 * 4
  )


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(distillation=tff_kd.Distillation(target='teacher')), 'itself'),
        (
            dict(distillation=tff_kd.Distillation(distillation_weight=0.5)),
            'transfer set has none',
        ),
        (
            dict(distillation=tff_kd.Distillation(validate_every=5, patience=2)),
            'validation part',
        ),
        (
            dict(
                distillation=tff_kd.Distillation(schedule=tff_kd.cosine_schedule),
                teacher_optimizer=tff.learning.optimizers.schedule_learning_rate(
                    helpers.sgd(), lambda i: 0.1
                ),
            ),
            'no learning rate to scale',
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(kwargs, message):
  with pytest.raises(ValueError, match=message):
    _fusion(**kwargs)


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(temperature=0), 'temperature'),
        (dict(temperature=-3.0), 'temperature'),
        (dict(target='students'), 'target'),
        (dict(target=1.5), 'between 0'),
        (dict(distillation_weight=2.0), 'distillation_weight'),
        (dict(loss='l1'), 'loss'),
        (dict(loss='mse', temperature=2.0), "loss='mse' has no temperature.*found 2.0"),
        (dict(loss='label', temperature=0.5), "loss='label' has no temperature"),
        (dict(num_steps=0), 'num_steps'),
        (dict(patience=-1), 'patience'),
        (dict(patience=1), 'set `validate_every` below `num_steps`, found None'),
        (dict(patience=1, num_steps=60, validate_every=60), 'the 60 steps.*found 60'),
        (dict(augment='shift'), "`augment` must be a function .* found 'shift'"),
        (dict(start='student'), "`start` must be 'average' or 'released', found 'stud"),
    ],
)
def test_distillation_refuses_values_without_a_meaning(kwargs, message):
  with pytest.raises(ValueError, match=message):
    tff_kd.Distillation(**kwargs)


def test_defaults_never_switch_distillation_off(fusion):
  # Defect 7.
  output = _run(fusion, GOOD)
  server = output.metrics['server_distillation']
  assert server['teacher']['first_loss'] > 0
  assert tff_kd.LocalDistillation().weight > 0
  assert any(
      np.abs(a - b).max() > 0
      for a, b in zip(
          output.state.global_model_weights.trainable,
          output.state.aggregated_model_weights.trainable,
      )
  )


def test_transfer_inputs_of_another_shape_are_refused():
  with pytest.raises(ValueError, match="transfer set's inputs"):
    helpers.build('fed_df', transfer_set=tff_kd.TransferSet(np.zeros([4, 9], np.float32)))


class Branching(keras.Model):
  """Takes a branch by what it sees, as Keras 3's `fit` does not allow."""

  def call(self, x):
    if tf.reduce_mean(x) > 0.0:
      return x[:, : helpers.CLASSES]
    return -2.0 * x[:, : helpers.CLASSES]


def test_a_branch_in_a_model_is_an_error_as_in_keras():
  x, y = helpers.examples(8, 0)
  model = Branching()
  model.compile('sgd', helpers.loss_fn())
  with pytest.raises(Exception, match='symbolic'):
    model.fit(x, y, verbose=0)
  with pytest.raises(ValueError, match='symbolic'):
    helpers.build('fed_avg', student_fn=Branching)


@pytest.mark.parametrize('as_datasets', [True, helpers.slow(False)])
def test_pythons_words_in_what_is_the_users(as_datasets, tmp_path):
  """Rates and distillation losses may branch as AutoGraph lets them."""

  def rate_in_python(progress):
    if progress < 0.5:
      return 0.3
    return 0.1

  def loss_in_python(target, logits, temperature):
    del temperature
    error = tf.reduce_mean(tf.square(target - logits), axis=-1)
    if tf.reduce_sum(error) > 100.0:
      error *= 0.0
    return error

  parts = [helpers.examples(9 + k, k) for k in range(2)]
  batches = tff_kd.ClientBatches(
      data=tff_kd.FileClientData.from_arrays(
          tuple(np.concatenate(its) for its in zip(*parts)),
          [np.arange(9), np.arange(9, 19)], directory=tmp_path,
      ),
      batch_size=4, num_epochs=1, shuffle=False,
  )
  found = []
  for in_python in (True, False):
    keras.utils.set_random_seed(0)
    process = helpers.build(
        'fed_df', student_fn=helpers.dense_fn(kernel_initializer='ones'),
        transfer_set=tff_kd.TransferSet(helpers.examples(8, 99)[0]),
        client_data=None if as_datasets else batches,
        learning_rate_fn=(
            (lambda n: 0.1 if n < 1 else 0.05)
            if in_python
            else lambda n: tf.where(n < 1, 0.1, 0.05)
        ),
        student_optimizer=helpers.sgd(0.1),
        distillation=tff_kd.Distillation(
            num_steps=4, batch_size=4,
            schedule=(
                rate_in_python
                if in_python
                else lambda progress: tf.where(progress < 0.5, 0.3, 0.1)
            ),
            loss=loss_in_python if in_python else 'mse',
        ),
    )
    state = process.initialize()
    for _ in range(2):
      clients = [helpers.dataset(*its) for its in parts] if as_datasets else [0, 1]
      state = process.next(state, clients).state
    found.append(state.global_model_weights)
  helpers.assert_weights_close(*found, atol=1e-6)
