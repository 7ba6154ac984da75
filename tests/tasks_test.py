"""The tasks: what their files hold, how they are split, what their models take."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from pipelines import task_defaults
from tff_kd.compat import tff
from tensorflow_federated.python.simulation.baselines import client_spec
from tensorflow_federated.python.simulation.baselines.shakespeare import (
    char_prediction_preprocessing as tff_shakespeare,
)

from tests import helpers
from tff_kd import data
from tff_kd.data.tasks import downloads
from tff_kd.data.tasks import emnist
from tff_kd.data.tasks import movielens
from tff_kd.data.tasks import newsgroups
from tff_kd.data.tasks import shakespeare
from tff_kd import models

_INSTALLED = ('mnist5k', 'movielens', 'newsgroups', 'shakespeare')


@functools.cache
def _load(name):
  return data.TASKS[name].load(seed=0, transfer_size=40, validation_size=30)


@pytest.fixture(params=_INSTALLED)
def task(request):
  return _load(request.param)


def test_the_registry_says_what_the_task_is(task):
  info = data.task_info(task.name)
  assert sorted(task.students) == list(info.students)
  assert sorted(task.teachers) == list(info.teachers)
  assert (task.client_rows is not None) == info.has_clients
  assert len(task.transfer) == 40 and len(task.validation) == 30
  if info.has_clients:
    defaults = task_defaults.DEFAULTS[info.name]
    assert defaults['num_clients'] == len(task.client_rows) == len(task.test_rows)
    for rows, examples in (
        (task.client_rows, task.clients), (task.test_rows, task.test)
    ):
      # Every example is one client's.
      np.testing.assert_array_equal(np.concatenate(rows), np.arange(len(examples)))


def test_models_fit_the_data_and_the_teacher_is_larger(task):
  input_spec = tf.nest.map_structure(
      lambda a: tf.TensorSpec([None, *a.shape[1:]], a.dtype), tuple(task.clients)
  )
  specs = [
      models.build_model_spec(
          build, input_spec=input_spec, loss_fn=task.loss_fn, metrics_fn=task.metrics_fn
      )
      for build in (
          next(iter(task.students.values())), list(task.teachers.values())[-1]
      )
  ]
  sizes = [
      sum(w.size for w in tf.nest.flatten(spec.initial_weights)) for spec in specs
  ]
  assert sizes[0] < sizes[1]
  assert {spec.is_regression for spec in specs} == {task.is_regression}


def _keys(examples):
  arrays = tf.nest.flatten(examples.inputs)
  return {b''.join(a[row].tobytes() for a in arrays) for row in range(len(examples))}


def test_the_servers_examples_are_no_clients(task):
  clients = _keys(task.clients)
  assert not clients & _keys(task.transfer)
  assert not clients & _keys(task.validation)


# In plays a short speech comes again; a post is one example.
@pytest.mark.parametrize('name', ['mnist5k', 'newsgroups'])
def test_the_test_part_has_no_example_of_another_part(name):
  tested = _keys(_load(name).test)
  for part in ('clients', 'transfer', 'validation'):
    assert not tested & _keys(getattr(_load(name), part))


def test_shakespeare_is_encoded_as_tff_does():
  assert ''.join(tff_shakespeare.CHAR_VOCAB) == shakespeare._CHARACTERS
  assert tff_shakespeare.get_special_tokens() == (
      shakespeare.PAD, shakespeare.UNKNOWN, shakespeare.BEGIN, shakespeare.END
  )
  speeches = ['To be, or not to be: that is the question', '\xe9', 'x' * 200]
  # TFF reads bytes: e with an accent is two of them there, one character here.
  preprocess = tff_shakespeare.create_preprocess_fn(
      client_spec.ClientSpec(num_epochs=1, batch_size=16, shuffle_buffer_size=1)
  )
  theirs = preprocess(
      tf.data.Dataset.from_tensor_slices({'snippets': [speeches[0], '{', speeches[2]]})
  )
  inputs, labels = next(theirs.as_numpy_iterator())
  ours = shakespeare.windows([speeches[0], speeches[1], speeches[2]])
  np.testing.assert_array_equal(ours.inputs, inputs)
  np.testing.assert_array_equal(ours.labels, labels)


def test_a_play_is_read_by_role():
  text = '''# A play

## ACT I

_Enter A_

**A**
Now _[Aside]_ go
_Exit_

hence.

**ALL**
Ho!

**B**
_Dies_

**A**
Then.
'''
  assert shakespeare.parse(text) == {'A': ['Now go', 'Then.']}


def test_no_transfer_window_has_padding():
  task = shakespeare.load(seed=1, transfer_size=50, validation_size=20)
  assert (task.transfer.labels != shakespeare.PAD).all()
  assert (task.clients.labels == shakespeare.PAD).any()
  np.testing.assert_array_equal(task.clients.inputs[:, 1:], task.clients.labels[:, :-1])


def test_words_are_numbered_by_how_many_texts_have_them():
  frequent = [f'w{chr(97 + i)}{chr(97 + j)}' for i in range(5) for j in range(10)]
  texts = [' '.join(frequent)] * 3 + ['apple apple pear', 'apple']
  vocabulary = newsgroups.build_vocabulary(texts, size=10)
  assert vocabulary == ['apple', 'pear']
  encoded = newsgroups.encode(['pear plum x apple'], vocabulary)
  assert encoded[0, :4].tolist() == [3, newsgroups.UNKNOWN, 2, newsgroups.PAD]


def test_a_history_never_holds_what_is_asked():
  rng = np.random.default_rng(0)
  its = np.array([[7, film, 1 + film % 5] for film in range(1, 61)], np.int32)
  examples = movielens.build_examples(its, {7: its}, rng)
  for row in range(len(examples)):
    films = examples.inputs['films'][row]
    assert examples.inputs['film'][row] not in films
    assert len(set(films)) == movielens.HISTORY and 0 not in films
    np.testing.assert_array_equal(examples.inputs['stars'][row], 1 + films % 5)
  short = movielens.build_examples(its[:3], {7: its[:3]}, rng)
  assert (np.count_nonzero(short.inputs['films'], axis=1) == 2).all()


def test_no_training_example_shows_a_test_rating():
  task = _load('movielens')
  for rows, tests in list(zip(task.client_rows, task.test_rows))[:50]:
    held_out = set(task.test.inputs['film'][tests])
    seen = set(task.clients.inputs['films'][rows].ravel())
    seen |= set(task.clients.inputs['film'][rows])
    assert not held_out & seen
    # And a test example's history holds none of the test ratings either.
    assert not held_out & set(task.test.inputs['films'][tests].ravel())
  # Pairs without a rating are in the second half only.
  assert (task.transfer.labels[:20] > 0).all() and (task.transfer.labels[20:] == 0).all()
  assert task.num_labelled == 20


def test_tastes_against_numpy():
  task = _load('movielens')
  model = movielens.build_factors(width=3)
  layer = next(its for its in model.layers if isinstance(its, movielens.Tastes))
  rng = np.random.default_rng(0)
  layer.set_weights([rng.normal(size=w.shape) for w in layer.get_weights()])
  mean, bias, rated, asked = (
      its.numpy() for its in (
          layer.mean, layer.bias.embeddings, layer.rated.embeddings,
          layer.asked.embeddings,
      )
  )
  batch = task.validation.take(np.arange(5))
  outputs = model(batch.inputs).numpy()
  for row in range(5):
    films, stars = (batch.inputs[name][row] for name in ('films', 'stars'))
    films, stars = films[films > 0], stars[films > 0]
    film = batch.inputs['film'][row]
    above = stars - mean - bias[films, 0]
    own = above.sum() / (len(films) + 5)
    tastes = ((above - own)[:, None] * rated[films]).sum(0) / np.sqrt(len(films) + 1)
    expected = mean + bias[film, 0] + own + tastes @ asked[film]
    np.testing.assert_allclose(outputs[row, 0], expected, rtol=1e-4)


def test_ranking_scores_in_closed_form():
  films = np.tile(np.arange(100), 3)
  candidates = data.Examples({'film': films}, np.zeros(300))
  scores = -np.tile(np.arange(100.0), 3)
  scores[100] = -2.5  # Of the second person the liked one comes third.
  scores[200] = -50.0
  found = movielens.ranking_scores(lambda inputs: scores[:, None], candidates)
  assert found['hit_rate_10'] == pytest.approx(2 / 3)
  assert found['ndcg_10'] == pytest.approx((1.0 + 1 / np.log2(4)) / 3)


def test_emnist_is_by_writer():
  def client_data(sizes):
    return tff.simulation.datasets.TestClientData({
        name: {
            'pixels': np.full((n, 28, 28), float(number), np.float32),
            'label': np.full(n, number, np.int32),
        }
        for number, (name, n) in enumerate(sizes.items())
    })

  task = emnist.build(
      client_data({'a': 20, 'b': 30, 'c': 10}), client_data({'a': 2, 'b': 3, 'c': 1}),
      seed=0, transfer_size=6, validation_size=4,
  )
  assert len(task.clients) == 50 and len(task.transfer) == 6
  for number, (rows, tests) in enumerate(zip(task.client_rows, task.test_rows)):
    assert set(task.clients.labels[rows]) == set(task.test.labels[tests]) == {number}
  np.testing.assert_array_equal(np.concatenate(task.client_rows), np.arange(50))


def test_what_cannot_be_downloaded_says_what_to_do():
  def load():
    raise Exception('URL fetch failure on https://x')

  with pytest.raises(OSError, match='fashion_mnist are not in ~/x.*--task=idx'):
    downloads.fetch('fashion_mnist', load, '~/x')


@pytest.mark.parametrize('name', ['fashion_mnist', 'cifar10'])
def test_keras_datasets(name, monkeypatch):
  rng = np.random.default_rng(0)
  shape = {'fashion_mnist': (28, 28), 'cifar10': (32, 32, 3)}[name]

  def part(n):
    labels = rng.integers(0, 10, (n, 1) if name == 'cifar10' else n)
    return rng.integers(0, 256, (n, *shape), np.uint8), labels.astype(np.uint8)

  source = getattr(keras.datasets, name)
  monkeypatch.setattr(source, 'load_data', lambda: (part(50), part(9)))
  task = data.TASKS[name].load(seed=0, transfer_size=10, validation_size=5)
  assert len(task.clients) == 35 and len(task.test) == 9
  assert task.clients.inputs.shape[1:] == (*shape, 1)[:3]
  assert task.clients.labels.shape == (35,) and task.clients.inputs.max() <= 1.0


def _small_task(labels, num_classes=3, **kwargs):
  part = data.Examples(np.zeros((len(labels), 2), np.float32), np.asarray(labels))
  return helpers.task(part, num_classes=num_classes, **kwargs)


def test_what_a_task_is_measured_by():
  def distance(y, p):
    return keras.ops.abs(y - p)

  task = _small_task(
      [0, 2], lower_is_better=['distance'], metrics_fn=lambda: [
          keras.metrics.MeanMetricWrapper(distance, name='distance'),
          keras.metrics.AUC(), keras.metrics.MeanSquaredError(name='brier'),
      ],
  )
  assert task.metric == 'distance' and task.is_lower_better()
  for name, lower in (
      ('test/student_auc', False), ('brier', True), ('calibration_error', True),
      ('validation/teacher_distance', True), ('validation/teacher_accuracy', False),
  ):
    assert task.is_lower_better(name) == lower, name
  assert _small_task([0, 2]).metric == 'accuracy'
  assert len(_small_task([0, 2]).metrics_fn()) == 1
  numbers = _small_task([0.5, 2.0], None, loss_fn=keras.losses.MeanSquaredError)
  assert numbers.metric == 'rmse' and numbers.is_lower_better()
  assert not numbers.metrics_fn()  # Keras's accuracy would be that of class numbers.
