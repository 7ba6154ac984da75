"""Cohorts with architectures of their own: whole rounds against NumPy."""

import keras
import numpy as np
import pytest
from tff_kd.compat import tff

import tff_kd
from tests import helpers
from tff_kd.client.companions import contrast
from tff_kd.client.companions import control_variates
from tff_kd.client.companions import dynamic_regularizer
from tff_kd.models import cohorts

_SCALES = (1.0, 2.0)
_COHORTS = [0, 1, 1, 0]
_SIZES = [8, 4, 12, 5]
_RATE = 0.1
_CLOSE = dict(rtol=1e-5, atol=1e-5)


def _student_fn(scale):
  """A linear model of the inputs times a constant: the cohort's architecture."""

  def build():
    return keras.Sequential([
        keras.layers.InputLayer((helpers.DIM,)),
        keras.layers.Rescaling(scale),
        keras.layers.Dense(helpers.CLASSES),
    ])

  return build


STUDENTS = [_student_fn(scale) for scale in _SCALES]


class _Model:
  """The same, by hand."""

  def __init__(self, scale, weights):
    self.scale = scale
    self.w = [np.array(v, np.float64) for v in weights]

  def logits(self, x):
    return helpers.linear_logits(self.w, self.scale * x)

  def step(self, x, d_logits, rate):
    self.w = helpers.linear_step(self.w, self.scale * x, d_logits, rate)

  def train(self, x, y):
    for i in range(0, len(x), 4):
      rows = slice(i, i + 4)
      self.w = helpers.linear_fit(self.w, self.scale * x[rows], y[rows], _RATE)
    return self

  def learn(self, x, target, rate):
    target = helpers.softmax(target)
    self.w = helpers.linear_distil(self.w, self.scale * x, target, rate)


def _clients():
  return [helpers.examples(n, i) for i, n in enumerate(_SIZES)]


def _arguments(clients, numbers=tuple(_COHORTS)):
  return [
      {'cohort': cohort, 'data': helpers.dataset(x, y)}
      for cohort, (x, y) in zip(numbers, clients)
  ]


def _averaged(students, clients):
  """Each cohort's mean, and the clients' models."""
  trained = [
      _Model(_SCALES[c], students[c].w).train(x.astype(np.float64), y)
      for c, (x, y) in zip(_COHORTS, clients)
  ]
  means = []
  for cohort, student in enumerate(students):
    own = [k for k, c in enumerate(_COHORTS) if c == cohort]
    total = sum(_SIZES[k] for k in own)
    means.append(_Model(student.scale, [
        sum(_SIZES[k] / total * trained[k].w[i] for k in own) for i in range(2)
    ]))
  return means, trained


def _models(weights):
  return [_Model(s, w.trainable) for s, w in zip(_SCALES, weights, strict=True)]


def test_prototypes_learn_from_the_ensemble_of_all():
  public, _ = helpers.examples(9, 99)
  clients = _clients()
  process = helpers.build(
      'fed_df', student_fn=STUDENTS, client_optimizer=helpers.sgd(_RATE),
      transfer_set=tff_kd.TransferSet(public), student_optimizer=helpers.sgd(0.3),
      distillation=tff_kd.Distillation(
          distillation_weight=1.0, num_steps=1, batch_size=9
      ),
  )
  state = process.initialize()
  students = _models(state.global_model_weights)
  x = public.astype(np.float64)
  for _ in range(2):
    output = process.next(state, _arguments(clients))
    state = output.state
    students, trained = _averaged(students, clients)
    for mean, found in zip(students, state.aggregated_model_weights):
      helpers.assert_weights_close(found.trainable, mean.w, **_CLOSE)
    weights = np.array(_SIZES) / sum(_SIZES)
    ensemble = sum(w * model.logits(x) for w, model in zip(weights, trained))
    for student in students:
      student.learn(x, ensemble, 0.3)
    for student, found in zip(students, state.global_model_weights):
      helpers.assert_weights_close(found.trainable, student.w, **_CLOSE)
  assert output.metrics['client_work']['train']['num_examples'] == sum(_SIZES)
  assert set(output.metrics['server_distillation']) == {'student_0', 'student_1'}


def test_the_teacher_learns_from_the_mean_of_the_cohorts_students():
  public, _ = helpers.examples(9, 99)
  clients = _clients()
  one_step = dict(num_steps=1, batch_size=9)
  process = helpers.build(
      'fed_distillation', student_fn=STUDENTS, client_optimizer=helpers.sgd(_RATE),
      teacher_fn=helpers.dense_fn(), transfer_set=tff_kd.TransferSet(public),
      teacher_optimizer=helpers.sgd(0.2), student_optimizer=helpers.sgd(0.3),
      distillation=tff_kd.Distillation(target='student', **one_step),
      back_distillation=tff_kd.Distillation(target='teacher', **one_step),
  )
  state = process.initialize()
  teacher = _Model(1.0, state.teacher_weights.trainable)
  students, _ = _averaged(_models(state.global_model_weights), clients)
  state = process.next(state, _arguments(clients)).state
  x = public.astype(np.float64)
  teacher.learn(x, sum(s.logits(x) for s in students) / 2, 0.2)
  for student in students:
    student.learn(x, teacher.logits(x), 0.3)
  helpers.assert_weights_close(state.teacher_weights.trainable, teacher.w, **_CLOSE)
  for student, found in zip(students, state.global_model_weights):
    helpers.assert_weights_close(found.trainable, student.w, **_CLOSE)


@pytest.fixture(scope='module')
def fed_avg():
  return helpers.build(
      'fed_avg', student_fn=STUDENTS, server_optimizer=helpers.sgd(1.0, 0.5)
  )


def test_a_cohort_without_clients_stays_and_is_counted(fed_avg):
  state = fed_avg.initialize()
  output = fed_avg.next(state, _arguments(_clients(), [1] * 4))
  first, second = output.state.global_model_weights
  helpers.assert_weights_close(
      first, state.global_model_weights[0], rtol=0, atol=0
  )
  assert not np.allclose(
      second.trainable[0], state.global_model_weights[1].trainable[0]
  )
  assert output.metrics['finalizer']['update_non_finite'] == 1


def test_cohorts_with_an_own_aggregator_equal_the_plain_mean(fed_avg):
  own = helpers.build(
      'fed_avg', student_fn=STUDENTS, server_optimizer=helpers.sgd(1.0, 0.5),
      model_aggregator=tff.aggregators.MeanFactory(),
  )
  state = fed_avg.initialize()
  expected = fed_avg.next(state, _arguments(_clients())).state
  start = own.set_model_weights(own.initialize(), state.global_model_weights)
  found = own.next(start, _arguments(_clients())).state
  helpers.assert_weights_close(
      found.global_model_weights, expected.global_model_weights, **_CLOSE
  )


@pytest.mark.parametrize('number', [-1, 2])
def test_a_cohort_out_of_range_is_refused(fed_avg, number):
  with pytest.raises(Exception, match=f'an integer from 0 to 1, found {number}'):
    fed_avg.next(
        fed_avg.initialize(), _arguments(_clients(), [0, 1, number, 0])
    )


def test_refused_before_anything_is_built():
  with pytest.raises(ValueError, match='student of cohort 1 must have outputs'):
    helpers.build('fed_avg', student_fn=[STUDENTS[0], helpers.dense_fn(classes=4)])
  with pytest.raises(ValueError, match='at least one student'):
    cohorts.Students([])
  with pytest.raises(ValueError, match='model_aggregator` must be weighted'):
    helpers.build(
        'fed_avg', student_fn=STUDENTS, model_aggregator=tff.aggregators.SumFactory()
    )


@pytest.mark.parametrize(
    'make',
    [
        lambda spec: control_variates.ControlVariates(spec, 4),
        lambda spec: dynamic_regularizer.DynamicRegularizer(spec, 4, 0.1),
        lambda spec: contrast.ModelContrast(spec),
    ],
    ids=['ControlVariates', 'DynamicRegularizer', 'ModelContrast'],
)
def test_companions_of_one_architecture_are_refused(make):
  companion = make(
      cohorts.build_students(
          helpers.features_fn(4), input_spec=helpers.INPUT_SPEC, loss_fn=helpers.loss_fn
      ).first
  )
  name = type(companion).__name__
  with pytest.raises(ValueError, match=f'{name} .* one architecture, .* are 2 students'):
    helpers.build('fed_avg', student_fn=STUDENTS, companion=companion)


def test_hyperparameters_of_all_cohorts(fed_avg):
  state = fed_avg.initialize()
  hparams = fed_avg.get_hparams(state)
  changed = fed_avg.set_hparams(state, hparams)
  np.testing.assert_equal(fed_avg.get_hparams(changed), hparams)


# What was sent is counted in `communication_test`, what is left out in `svd_test`.
@pytest.mark.slow
def test_truncated_updates_count_as_long_as_they_are():
  process = helpers.build(
      'fed_kd', student_fn=[helpers.dense_fn((n,)) for n in (30, 20)],
      mentor_fn=helpers.dense_fn(),
      start_energy=0.01,  # One component of each matrix.
      end_energy=0.01,
  )
  output = process.next(
      process.initialize(), _arguments(_clients()[:3], [0, 1, 1]),
      [process.initialize_client()] * 3,
  )
  found = tff_kd.communication.ledger(
      tff_kd.communication.round_bytes(process),
      tff_kd.simulation.flatten_metrics(output.metrics),
  )
  numbers = {n: (helpers.DIM + n + 1) + n + (n + helpers.CLASSES + 1) + helpers.CLASSES
             for n in (30, 20)}
  assert found['bytes/up_model'] == 4 * (numbers[30] + 2 * numbers[20])


def test_what_clients_keep_beside_models_is_of_no_cohort():
  transfer_set = tff_kd.TransferSet(helpers.examples(6, 99)[0])
  process = helpers.build('cfd', student_fn=STUDENTS, transfer_set=transfer_set)
  new = process.initialize_client()
  assert process.kept_models is None and new.sent_round == -1
  output = process.next(process.initialize(), _arguments(_clients()), [new] * 4)
  assert [its.sent_round for its in output.client_states] == [0] * 4


def test_private_models_of_different_architectures(tmp_path):
  public, _ = helpers.examples(6, 99)
  x = public.astype(np.float64)
  process = helpers.build(
      'fed_md', student_fn=STUDENTS, client_optimizer=helpers.sgd(_RATE),
      transfer_set=tff_kd.TransferSet(public), digest_optimizer=helpers.sgd(0.3),
      digest_batch_size=6,
  )
  clients = _clients()
  store = tff_kd.simulation.ClientStates(
      process.initialize_client(), tmp_path, cohort_fn=lambda k: _COHORTS[k]
  )
  own = [
      _Model(_SCALES[c], store.load([k])[0].weights[c].trainable)
      for k, c in enumerate(_COHORTS)
  ]
  state, consensus = process.initialize(), None
  # Client 0 misses a round, and goes on with the model that it had.
  for round_num, present in enumerate([[0, 1, 2], [1, 2, 3], [0, 3]], 1):
    output = process.next(
        state,
        [_arguments(clients)[k] for k in present],
        store.load(present),
    )
    state = output.state
    store.save(present, output.client_states, round_num)
    for k in present:
      model = own[k]
      if consensus is not None:
        sign = np.sign(model.logits(x) - consensus)
        model.step(x, sign / sign.size, 0.3)
      model.train(clients[k][0].astype(np.float64), clients[k][1])
    consensus = np.mean([own[k].logits(x) for k in present], axis=0)
    rows = process.transfer_set.prediction_ids(round_num).numpy()
    np.testing.assert_allclose(state.shared.logits, consensus[rows], **_CLOSE)
    for k in present:
      (kept,) = store.load([k])
      mine, others = _COHORTS[k], 1 - _COHORTS[k]
      helpers.assert_weights_close(
          kept.weights[mine].trainable, own[k].w, **_CLOSE
      )
      # Of the other architecture it holds nothing.
      assert not any(w.size for w in kept.weights[others].trainable)
