"""Models as `tff.learning` takes them."""

from typing import Any

import tensorflow as tf

from tff_kd import graphs
from tff_kd.compat import tff


def functional_model(spec: Any) -> tff.learning.models.FunctionalModel:
  """Returns a model as TFF's functional model.

  Args:
    spec: Its `ModelSpec`.
  """

  def predict(training: bool):
    def fn(trainable, non_trainable, inputs, seed):
      weights = tff.learning.models.ModelWeights(list(trainable), list(non_trainable))
      called = spec.call(spec.values(weights, seed), inputs, training=training)
      if called.bad_inputs is None:
        return called.outputs
      nan = tf.constant(float('nan'), called.outputs.dtype)
      return tf.where(called.bad_inputs, nan, called.outputs)

    return graphs.placed(fn)

  predict_fns = {training: predict(training) for training in (False, True)}

  @tf.function(autograph=False)
  def predict_on_batch(model_weights, x, training):
    seed = tf.random.uniform([2], maxval=tf.int32.max, dtype=tf.int32)
    return predict_fns[bool(training)](*map(tuple, model_weights), x, seed)

  def loss(output, label, sample_weight=None):
    del sample_weight
    return graphs.placed(spec.supervised_loss)(label, output)

  def update(state, labels, batch_output, sample_weight=None):
    del sample_weight

    def fn(state, labels, predictions, num_examples, loss):
      mask = spec.metric_mask(labels, predictions)
      state = spec.metrics.update(state, labels, predictions, mask)
      loss_sum = loss * tf.cast(num_examples, loss.dtype)
      return spec.metrics.add_totals(state, loss_sum, num_examples, tf.constant(1))

    return graphs.placed(fn)(
        state, labels, batch_output.predictions, batch_output.num_examples,
        batch_output.loss,
    )

  return tff.learning.models.FunctionalModel(
      initial_weights=(
          tuple(spec.initial_weights.trainable),
          tuple(spec.initial_weights.non_trainable),
      ),
      predict_on_batch_fn=predict_on_batch,
      loss_fn=loss,
      metrics_fns=(
          tf.function(spec.metrics.initial_state, autograph=False),
          tf.function(update, autograph=False),
          tf.function(spec.metrics.result, autograph=False),
      ),
      input_spec=spec.input_spec,
  )
