"""Loops in graphs, rewritten for where they are run."""

import numpy as np
import pytest
import tensorflow as tf

from tff_kd.runtime import graph_rewriting


def _steps(forward):
  """Three steps of gradient descent, with what only the gradient needs given beside."""

  def train(kernel, examples, factor):
    def step(number, kernel, examples, factor):
      with tf.GradientTape() as tape:
        tape.watch(kernel)
        loss = tf.reduce_mean(forward(examples, kernel) ** 2) * factor
      return number + 1, kernel - 0.1 * tape.gradient(loss, kernel), examples, factor

    return tf.while_loop(
        lambda number, *_: number < 3, step, (0, kernel, examples, factor)
    )[1]

  return train


def _convolved(examples, kernel):
  hidden = tf.nn.relu(tf.nn.conv2d(examples, kernel, 1, 'SAME'))
  return tf.nn.max_pool2d(hidden, 2, 2, 'SAME')


def _rewritten(train, arguments):
  """A function's loop after it, the loop's body, and the function's result."""
  traced = tf.function(train).get_concrete_function(
      *(tf.TensorSpec(a.shape, a.dtype) for a in arguments)
  )
  graph_def = traced.graph.as_graph_def()
  graph_rewriting.rewrite(graph_def, in_one_thread=True)
  run = tf.compat.v1.wrap_function(
      lambda *tensors: tf.graph_util.import_graph_def(
          graph_def,
          input_map=dict(zip((t.name for t in traced.inputs), tensors, strict=True)),
          return_elements=[traced.outputs[0].name],
      ),
      [tf.TensorSpec(a.shape, a.dtype) for a in arguments],
  )
  loop, = (node for node in graph_def.node if 'While' in node.op)
  functions = {each.signature.name: each for each in graph_def.library.function}
  return loop, functions[loop.attr['body'].func.name], run(*arguments)[0]


@pytest.mark.parametrize(
    ('forward', 'shapes', 'spread'),
    [
        (_convolved, [(3, 3, 2, 4), (5, 6, 6, 2)], True),
        (tf.matmul, [(4, 4), (4, 4)], False),
    ],
    ids=['convolution', 'matmul'],
)
def test_loops_with_convolutions_are_left_to_onednn(forward, shapes, spread):
  rng = np.random.default_rng(0)
  kernel, examples = (tf.constant(rng.normal(size=s), tf.float32) for s in shapes)
  arguments = (kernel, examples, tf.constant(0.5))
  loop, body, found = _rewritten(_steps(forward), arguments)
  np.testing.assert_allclose(found, _steps(forward)(*arguments), rtol=1e-5, atol=1e-6)
  assert loop.attr['_lower_using_switch_merge'].b == spread
  nodes = {node.name: node for node in body.node_def}
  entries = [name for name, node in nodes.items() if node.op == 'IdentityN']
  if not spread:
    assert not entries
    return
  # TensorFlow meets a MaxPool before its gradient, wherever it enters the loop.
  entry, = entries
  assert set(nodes[entry].input) == {each.name for each in body.signature.input_arg}
  for name, node in nodes.items():
    before = {i.lstrip('^').partition(':')[0] for i in node.input}
    assert name == entry or (before and before <= set(nodes))
