"""The models that come with the package: files, dtype policies, steps in a graph."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import helpers
from tff_kd.data.tasks import movielens
from tff_kd.data.tasks import newsgroups
from tff_kd.data.tasks import shakespeare
from tff_kd import graphs
from tff_kd.models import zoo

_IMAGE = (28, 28, 1)


def _builders():
  """Name -> a function that returns a new model."""
  of_images = {
      f'{role}_{name}': build
      for role, builders in (
          ('student', zoo.STUDENTS), ('teacher', zoo.TEACHERS)
      )
      for name, build in zoo.of_shape(builders, 10, _IMAGE).items()
  }
  return {
      **of_images,
      'embedding': lambda: newsgroups.build_embedding(20),
      'attention': lambda: newsgroups.build_attention(20, width=16),
      'factors': movielens.build_factors,
      'deep': movielens.build_deep,
      'gru': lambda: shakespeare.build_model(width=8, units=(12, 12)),
  }


_BUILDERS = _builders()


def _inputs(name, size=4):
  """Random inputs of a model; the first text is empty, the others have padding."""
  rng = np.random.default_rng(0)
  if name.startswith(('student', 'teacher')):
    return rng.normal(size=(size, *_IMAGE)).astype(np.float32)
  if name == 'gru':
    return rng.integers(1, 90, (size, shakespeare.WINDOW)).astype(np.int32)
  if name in ('embedding', 'attention'):
    words = rng.integers(1, 200, (size, newsgroups.LENGTH)).astype(np.int32)
    words[:, 100:] = words[0] = newsgroups.PAD
    return words
  films = rng.integers(0, movielens.NUM_FILMS, (size, movielens.HISTORY))
  stars = np.where(films > 0, rng.integers(1, 6, films.shape), 0)
  return {
      'film': rng.integers(1, movielens.NUM_FILMS, size).astype(np.int32),
      'films': films.astype(np.int32), 'stars': stars.astype(np.float32),
  }


@pytest.fixture
def policy(request):
  """The dtype policy of layers that are built in the test."""
  before = keras.config.dtype_policy()
  keras.config.set_dtype_policy(request.param)
  yield request.param
  keras.config.set_dtype_policy(before)


@pytest.mark.parametrize(
    'name, policy',
    [
        *((name, 'mixed_bfloat16') for name in sorted(_BUILDERS)),
        # Of images, in float32, in `models_test`, too.
        *(
            (name, policy)
            if name in ('attention', 'factors')
            else helpers.slow(name, policy)
            for policy in ('float32', 'float64') for name in sorted(_BUILDERS)
        ),
    ],
    indirect=['policy'],
)
def test_a_file_keeps_outputs_and_policy(name, policy, tmp_path):
  model, inputs = _BUILDERS[name](), _inputs(name)
  model(inputs)
  rng = np.random.default_rng(1)
  model.set_weights([
      w + 0.05 * rng.normal(size=w.shape) for w in model.get_weights()
  ])
  outputs = model(inputs)
  assert np.isfinite(np.asarray(outputs, np.float32)).all()
  assert outputs.dtype == keras.DTypePolicy(policy).compute_dtype
  model.save(tmp_path / 'model.keras')
  # Where it is loaded another policy may hold.
  keras.config.set_dtype_policy('float32')
  again = keras.models.load_model(tmp_path / 'model.keras')
  np.testing.assert_array_equal(again(inputs), outputs)
  assert [v.dtype for v in again.variables] == [v.dtype for v in model.variables]


# Of two sizes of one architecture, one is enough.
@pytest.mark.parametrize(
    'name',
    [helpers.slow(its) if its == 'teacher_resnet' else its for its in sorted(_BUILDERS)],
)
def test_a_step_is_a_graph_without_variables(name):
  model, inputs = _BUILDERS[name](), _inputs(name)
  model(inputs)
  values = [
      [v.numpy() for v in variables]
      for variables in (model.trainable_variables, model.non_trainable_variables)
  ]

  def step(trainable, non_trainable, x):
    with tf.GradientTape() as tape:
      tape.watch(trainable)
      outputs, non_trainable, losses = model.stateless_call(
          trainable, non_trainable, x, training=True, return_losses=True
      )
      loss = tf.reduce_sum(outputs) + sum(losses)
    gradients = tape.gradient(loss, trainable)
    return [tf.convert_to_tensor(g) for g in gradients], list(non_trainable)

  specs = tf.nest.map_structure(
      lambda a: tf.TensorSpec(a.shape, a.dtype), [*values, inputs]
  )
  traced = graphs.TracedFunction(step, specs)
  with tf.Graph().as_default() as graph:
    results = traced(*tf.nest.map_structure(tf.constant, [*values, inputs]))
    with tf.compat.v1.Session() as session:
      gradients, after = session.run(results)
  definition = graph.as_graph_def()
  used = {node.op for node in definition.node} | {
      node.op for function in definition.library.function for node in function.node_def
  }
  assert not {op for op in used if 'Variable' in op or 'VarHandle' in op or 'Cudnn' in op}
  assert all(np.isfinite(gradient).all() for gradient in gradients)
  moved = [
      variable.name
      for variable, new, old in zip(model.non_trainable_variables, after, values[1])
      if not np.array_equal(new, old)
  ]
  # Only dropout has a state.
  has_dropout = name in ('teacher_cnn', 'attention')
  assert moved == ['seed_generator_state'] * has_dropout


def test_means_of_tokens_against_numpy():
  rng = np.random.default_rng(0)
  tokens = np.array([[3, 1, 0, 0], [2, 2, 4, 1], [0, 0, 0, 0]])
  vectors = rng.normal(size=(3, 4, 2)).astype(np.float32)
  scores = rng.normal(size=5).astype(np.float32)
  attended = zoo.AttendedTokens(5)
  attended.build([(None, 4), (None, 4, 2)])
  attended.set_weights([scores[:, None]])
  means = zoo.MeanOfTokens()([tokens, vectors]).numpy()
  shares = attended([tokens, vectors]).numpy()
  for row, there in enumerate(tokens > 0):
    if there.any():
      weights = np.exp(scores[tokens[row][there]])
      expected = weights @ vectors[row][there] / weights.sum()
      np.testing.assert_allclose(shares[row], expected, rtol=1e-5)
      np.testing.assert_allclose(means[row], vectors[row][there].mean(0), rtol=1e-5)
  np.testing.assert_array_equal(means[2], 0.0)
  np.testing.assert_array_equal(shares[2], 0.0)
