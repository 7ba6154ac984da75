"""FedPer and LG-FedAvg: rounds against a reference, and what does not travel."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tff_kd.compat import tff

from tests import helpers
import tff_kd
from tff_kd.models import personal

_RATE, _FEATURES = 0.2, 4
_CLIENTS = {k: helpers.examples(n, k) for k, n in enumerate([8, 4, 12])}
# The places of the weights that travel.
_SHARED = {'fed_per': (0, 1), 'lg_fed_avg': (2, 3)}


_student_fn = helpers.features_fn(_FEATURES)


@helpers.shared
def _build(name, **kwargs):
  keras.utils.set_random_seed(4)
  defaults = dict(student_fn=_student_fn, client_optimizer=helpers.sgd(_RATE))
  return helpers.build(name, **{**defaults, **kwargs})


def _trained(w, x, y):
  for i in range(0, len(x), 4):
    w = helpers.features_step(w, np.float64(x[i : i + 4]), y[i : i + 4], _RATE)
  return w


@pytest.mark.parametrize('name', sorted(_SHARED))
def test_rounds_equal_numpy(name):
  process, places = _build(name), _SHARED[name]
  state, initial = process.initialize(), process.initialize_client()
  start = [np.float64(w) for w in initial.weights.trainable]
  server, own = start, {k: start for k in _CLIENTS}
  states = dict.fromkeys(_CLIENTS, initial)
  # Client 2 comes late, and client 0 goes on with what it kept.
  for present in ([0, 1], [1, 2], [0, 2]):
    datasets = {k: helpers.dataset(*_CLIENTS[k]) for k in present}
    state = helpers.round_of(process, state, datasets, states).state
    for k in present:
      begin = [
          theirs if i in places else mine
          for i, (theirs, mine) in enumerate(zip(server, own[k]))
      ]
      own[k] = _trained(begin, *_CLIENTS[k])
      helpers.assert_weights_close(
          states[k].weights.trainable, own[k], rtol=1e-3, atol=1e-5
      )
    sizes = [len(_CLIENTS[k][1]) for k in present]
    mean = [np.average(w, axis=0, weights=sizes) for w in zip(*(own[k] for k in present))]
    server = [mean[i] if i in places else w for i, w in enumerate(server)]
    helpers.assert_weights_close(
        state.global_model_weights.trainable, server, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize('name', sorted(_SHARED))
def test_there_is_no_whole_student(name):
  process = _build(name)
  assert process.get_model_weights is None
  with pytest.raises(ValueError, match='no whole student: each client keeps its own'):
    process.to_keras(process.initialize())
  assert process.kept_models.first is process.student_spec


def _normalized_fn():
  return keras.Sequential([
      keras.layers.InputLayer((helpers.DIM,)),
      keras.layers.Dense(_FEATURES, name='features'),
      keras.layers.BatchNormalization(name='norm'),
      keras.layers.Dense(helpers.CLASSES),
  ])


def test_statistics_belong_to_their_layer():
  spec = helpers.model_spec(_normalized_fn, name='student')
  layers = {layer.name: layer for layer in spec.layers}
  kept = personal.PersonalLayers(spec, [layers['norm']])
  names = tff.learning.models.ModelWeights(list('abcdef'), ['mean', 'variance'])
  shared = kept.shared(names)
  assert shared == tff.learning.models.ModelWeights(list('abef'), [])
  other = tff.learning.models.ModelWeights(list('ABCDEF'), ['MEAN', 'VARIANCE'])
  merged = tff.learning.models.ModelWeights(list('abCDef'), ['MEAN', 'VARIANCE'])
  assert kept.merged(shared, other) == merged
  numbers = tff.learning.models.ModelWeights([1.0, 2.0, 5.0, 6.0], [])
  like = tff.learning.models.ModelWeights(
      *[[tf.TensorSpec([])] * n for n in (6, 2)]
  )
  padded = kept.padded(numbers, like)
  assert padded.trainable == [1.0, 2.0, 0.0, 0.0, 5.0, 6.0]
  assert padded.non_trainable == [0.0, 0.0]


def test_what_needs_a_whole_student_is_refused():
  spec = helpers.model_spec(_student_fn, name='student')
  mentor = tff_kd.client.companions.mutual.MutualLearning(spec, spec)
  refused = [
      (dict(split_layer='features_2'), "must be one of the student's layers"),
      (dict(local_terms=[tff_kd.LocalDistillation(weight=0.5)]), 'lacks the layers'),
      (dict(companion=mentor), 'some of its layers: leave out .*MutualLearning'),
  ]
  for kwargs, message in refused:
    with pytest.raises(ValueError, match=message):
      _build('fed_per', **kwargs)
  frozen = lambda: keras.Sequential([
      keras.layers.InputLayer((helpers.DIM,)),
      keras.layers.Dense(_FEATURES, name='features', trainable=False),
      keras.layers.Dense(helpers.CLASSES),
  ])
  with pytest.raises(ValueError, match='have all or none. Choose another'):
    _build('lg_fed_avg', student_fn=frozen)


# Of other models, in `tasks_script_test`.
@pytest.mark.slow
def test_the_scripts_evaluate_clients_own_models(tmp_path):
  helpers.train_here(
      *helpers.TINY_RUN, '--algorithm=fed_per', '--rounds=2',
      '--compare_with_fed_avg=false', f'--output_dir={tmp_path}',
  )
  rows = helpers.rows(tmp_path / 'metrics.csv')
  assert len(rows) == 2
  # A pool of clients' models on all classes; no model is released.
  assert 0.1 < float(rows[1]['test/student_accuracy']) < 0.9
  assert 'test/client_accuracy' not in rows[1]
  assert not (tmp_path / 'student.keras').exists()
  helpers.script('pipelines.evaluate', f'--run={tmp_path}')


@pytest.mark.slow
def test_clients_own_models_are_exported(tmp_path):
  helpers.train_here(
      *helpers.TINY_RUN, '--algorithm=fed_per', '--rounds=1', '--clients_per_round=4',
      '--compare_with_fed_avg=false', f'--output_dir={tmp_path}',
  )
  helpers.script(
      'pipelines.export', f'--run={tmp_path}', '--clients=1,3', '--formats=keras',
      '--examples=50',
  )
  models = [
      keras.models.load_model(tmp_path / 'export' / f'client_{name}.keras')
      for name in (1, 3)
  ]
  heads = [model.get_weights()[-2] for model in models]
  assert heads[0].shape == heads[1].shape and not np.array_equal(*heads)
  card = (tmp_path / 'export' / 'MODEL_CARD.md').read_text()
  assert card.startswith('# client_1 and client_3: fed_per on mnist5k')
  for flag, message in (
      ('--clients=9', "there is no client '9' among the 4 of the run"),
      ('--models=student', 'student not among the models'),
  ):
    said = helpers.script(
        'pipelines.export', f'--run={tmp_path}', '--clients=1', flag, status=1
    )
    assert message in said.stderr
