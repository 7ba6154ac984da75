"""Ids that an embedding does not have."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import helpers
import tff_kd
from tff_kd import evaluation

_IDS = 10


@keras.saving.register_keras_serializable('ids_test')
class Tokens(keras.layers.Layer):
  """A layer with an embedding inside, as users write them."""

  def __init__(self, **kwargs):
    super().__init__(**kwargs)
    self.tokens = keras.layers.Embedding(_IDS, 3)

  def call(self, x):
    return self.tokens(x) + 1.0


class Subclassed(keras.Model):

  def __init__(self):
    super().__init__()
    self.tokens = Tokens()
    self.head = keras.layers.Dense(helpers.CLASSES)

  def call(self, x):
    return self.head(keras.ops.mean(self.tokens(x), axis=1))


def _sequential(tokens):
  def build():
    return keras.Sequential([
        keras.layers.Input((4,), dtype='int32'), tokens(), keras.layers.Flatten(),
        keras.layers.Dense(helpers.CLASSES),
    ])

  return build


_MODELS = {
    'an embedding': _sequential(lambda: keras.layers.Embedding(_IDS, 3)),
    'masked': _sequential(lambda: keras.layers.Embedding(_IDS, 3, mask_zero=True)),
    'within a layer': _sequential(Tokens),
    'within a model': Subclassed,
}


def _examples(seed=0, wrong=None):
  rng = np.random.default_rng(seed)
  x = rng.integers(0, _IDS, (6, 4)).astype(np.int32)
  if wrong is not None:
    x[3, 1] = wrong
  return x, rng.integers(0, helpers.CLASSES, 6).astype(np.int32)


def _common(model_fn):
  return helpers.common(
      student_fn=model_fn, input_spec=helpers.dataset(*_examples()).element_spec
  )


@pytest.mark.parametrize(
    'name',
    ['an embedding', 'within a model', *helpers.slow_each('masked', 'within a layer')],
)
def test_a_client_with_other_ids_is_left_out(name):
  process = tff_kd.algorithms.build_fed_avg(**_common(_MODELS[name]))
  state = process.initialize()
  good = helpers.dataset(*_examples())
  expected = process.next(state, [good])
  output = process.next(state, [
      good,
      *(helpers.dataset(*_examples(1, wrong)) for wrong in (_IDS, -1, 2**31 - 1)),
  ])
  helpers.assert_weights_close(
      output.state.global_model_weights, expected.state.global_model_weights, rtol=0
  )
  counts = output.metrics['client_work']['participation']
  assert counts['num_included'] == 1 and counts['num_excluded_bad_inputs'] == 3
  assert counts['num_excluded_non_finite'] == counts['num_excluded_bad_labels'] == 0
  assert np.isfinite(output.metrics['client_work']['train']['loss'])
  assert tff_kd.simulation.left_out(
      tff_kd.simulation.flatten_metrics(output.metrics)
  ) == {'excluded bad inputs': 3}


def _spec(name='an embedding', **kwargs):
  return helpers.model_spec(
      _MODELS[name], input_spec=helpers.dataset(*_examples()).element_spec, **kwargs
  )


def test_a_prediction_of_other_ids_is_no_number():
  spec = _spec()
  x, _ = _examples(0, wrong=_IDS)
  logits = evaluation.CentralEvaluator(spec).logits(spec.initial_weights, x)
  bad = np.isnan(logits).any(axis=1)
  np.testing.assert_array_equal(bad, np.arange(6) == 3)
  model = spec.to_keras(spec.initial_weights)
  np.testing.assert_allclose(logits[~bad], model(x[~bad]), rtol=1e-6)


def test_a_training_with_other_ids_has_no_loss():
  spec = _spec()
  values = spec.values(spec.initial_weights)
  for wrong, is_bad in ((None, False), (_IDS, True)):
    called = spec.call(values, tf.constant(_examples(0, wrong)[0]), training=True)
    assert bool(called.bad_inputs) == is_bad
    assert np.isnan(called.regularization_loss) == is_bad


@pytest.mark.parametrize('algorithm', ['moon', 'fed_proto'])
def test_features_of_texts(algorithm):
  """Of a model that is split after its embedding; other ids exclude their client."""
  process = helpers.build_with_parts(algorithm, {}, **_common(_MODELS['an embedding']))
  good = helpers.dataset(*_examples())
  kept = [process.initialize_client() for _ in range(3)]
  state = process.initialize()
  for _ in range(2):  # The prototypes are there from the second round on.
    output = process.next(
        state, [good, *(helpers.dataset(*_examples(1, w)) for w in (_IDS, -1))], kept
    )
    state, kept = output.state, output.client_states
    counts = output.metrics['client_work']['participation']
    assert counts['num_included'] == 1 and counts['num_excluded_bad_inputs'] == 2
    assert np.isfinite(output.metrics['client_work']['train']['loss'])
  _, own = helpers.rounds(process, [good])
  helpers.assert_weights_close(kept[0].weights, own[0].weights, rtol=1e-6)


def test_ids_within_a_loop():
  """There the flag cannot leave the loop, and the loss is no number."""

  class Looped(keras.layers.Layer):

    def __init__(self):
      super().__init__()
      self.tokens = keras.layers.Embedding(_IDS, 3)

    def build(self, shape):
      self.tokens.build()

    def call(self, x):
      return tf.map_fn(self.tokens, x, fn_output_signature=tf.TensorSpec([4, 3]))

  process = tff_kd.algorithms.build_fed_avg(**_common(_sequential(Looped)))
  output = process.next(process.initialize(), [
      helpers.dataset(*_examples()), helpers.dataset(*_examples(1, _IDS))
  ])
  counts = output.metrics['client_work']['participation']
  assert counts['num_included'] == counts['num_excluded_non_finite'] == 1


def test_keras_is_left_as_it_was():
  before = keras.layers.Embedding.call
  _spec()
  assert keras.layers.Embedding.call is before
  assert not helpers.model_spec().has_ids


@pytest.mark.parametrize('batch_size', [None, 4])
@pytest.mark.parametrize('who', ['student', 'teacher'])
def test_transfer_inputs_with_other_ids_are_refused(who, batch_size):
  def build(num_ids):
    return lambda: keras.Sequential([
        keras.layers.Input(batch_shape=(batch_size, 4), dtype='int32'),
        keras.layers.Embedding(num_ids, 3), keras.layers.Flatten(),
        keras.layers.Dense(helpers.CLASSES),
    ])

  sizes = {'student': _IDS + 1, 'teacher': _IDS + 1, who: _IDS}
  spec = helpers.dataset(*_examples()).element_spec
  if batch_size is not None:
    spec = tf.nest.map_structure(
        lambda s: tf.TensorSpec([batch_size, *s.shape[1:]], s.dtype), spec
    )
  with pytest.raises(ValueError, match=f'ids that an embedding of the {who} does not'):
    tff_kd.algorithms.build_fed_distillation(
        **{**_common(build(sizes['student'])), 'input_spec': spec},
        teacher_fn=build(sizes['teacher']),
        transfer_set=tff_kd.TransferSet(_examples(0, wrong=_IDS)[0]),
    )
