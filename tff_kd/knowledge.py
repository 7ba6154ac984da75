"""What clients say about the transfer set, and what the server makes of it.

A client's predictions travel as sums: `values` and `weights`, a pair of which any
TFF aggregation factory can take the weighted mean over clients, so that the
server never sees one client's predictions. The consensus on an example is the
ratio of the two means; the client's weight w_k cancels wherever all clients
predicted, and a missing prediction is a zero in both.
"""

from typing import NamedTuple

import tensorflow as tf
import tensorflow_federated as tff

from tff_kd import models
from tff_kd import transfer

# Rows predicted at a time: bounds the memory of a pass over the transfer set.
_PREDICTION_BATCH = 512


class KnowledgePayload(NamedTuple):
  """What one client sends up, or the weighted mean of it over clients.

  Attributes:
    values: float32 `[m, ..., classes]`, the logits times `weights`.
    weights: float32 `[m]`, how much each prediction counts (0 = missing).
  """

  values: tf.Tensor
  weights: tf.Tensor


class Consensus(NamedTuple):
  """The clients' joint opinion on the transfer examples.

  Attributes:
    logits: float32 `[m, ..., classes]`, finite everywhere.
    mask: float32 `[m]`, 1 where at least one client predicted, else 0.
  """

  logits: tf.Tensor
  mask: tf.Tensor


def predict_logits(
    model: models.KerasModel,
    transfer_set: transfer.TransferSet,
    ids: tf.Tensor,
) -> tf.Tensor:
  """A model's logits on rows of the transfer set, in inference mode.

  Args:
    model: The model.
    transfer_set: Where the inputs are read.
    ids: int32 `[k]` with a static k.

  Returns:
    float32 `[k, ..., classes]`.
  """
  num_rows = ids.shape[0]
  examples = transfer_set.open()

  def predict(rows: tf.Tensor) -> tf.Tensor:
    return model.logits(examples.gather_inputs(rows))

  logits = [predict(ids[:_PREDICTION_BATCH])]
  whole, rest = divmod(max(num_rows - _PREDICTION_BATCH, 0), _PREDICTION_BATCH)
  if whole:
    # One traced body for all further whole batches.
    batches = tf.reshape(
        ids[_PREDICTION_BATCH : _PREDICTION_BATCH * (1 + whole)],
        [whole, _PREDICTION_BATCH],
    )
    more = tf.map_fn(
        predict,
        batches,
        fn_output_signature=tf.TensorSpec(logits[0].shape, tf.float32),
        parallel_iterations=1,
    )
    logits.append(tf.reshape(more, tf.concat([[-1], tf.shape(more)[2:]], 0)))
  if rest:
    logits.append(predict(ids[-rest:]))
  result = tf.concat(logits, axis=0)
  return tf.ensure_shape(result, [num_rows, *logits[0].shape[1:]])


def encode(logits: tf.Tensor) -> KnowledgePayload:
  """A client's payload from its logits `[m, ..., classes]`: all rows, weight 1.

  A row that is not finite counts as missing.
  """
  axes = list(range(1, logits.shape.rank))
  present = tf.reduce_all(tf.math.is_finite(logits), axis=axes)
  weights = tf.cast(present, tf.float32)
  return KnowledgePayload(
      values=tf.math.multiply_no_nan(logits, _per_row(weights, logits)),
      weights=weights,
  )


def payload_type(
    logits_shape: tf.TensorShape, transfer_set: transfer.TransferSet
) -> tff.Type:
  """The type of a payload for all of a round's predictions."""
  rows = transfer_set.num_predictions
  return tff.types.tensorflow_to_type(
      KnowledgePayload(
          values=tf.TensorSpec([rows, *logits_shape], tf.float32),
          weights=tf.TensorSpec([rows], tf.float32),
      )
  )


def zero_payload(logits_shape: tf.TensorShape, num_rows: int) -> KnowledgePayload:
  """The payload of a client that predicted nothing."""
  return KnowledgePayload(
      values=tf.zeros([num_rows, *logits_shape]), weights=tf.zeros([num_rows])
  )


def decode(mean_payload: KnowledgePayload) -> Consensus:
  """The mean consensus: sum_k w_k z_k(x) / sum_k w_k over those who predicted.

  Source: Lin et al., "Ensemble Distillation for Robust Model Fusion in Federated
  Learning" (NeurIPS 2020), equation 2 (there with equal weights).

  Args:
    mean_payload: The clients' payloads as aggregated (a mean or a sum: the
      factor cancels).

  Returns:
    A `Consensus`. Rows that nobody predicted, or that came out non-finite, have
    logits 0 and mask 0.
  """
  values, weights = mean_payload
  logits = tf.math.divide_no_nan(values, _per_row(weights, values))
  axes = list(range(1, values.shape.rank))
  valid = tf.logical_and(
      weights > 0.0, tf.reduce_all(tf.math.is_finite(logits), axis=axes)
  )
  mask = tf.cast(valid, tf.float32)
  return Consensus(
      logits=tf.math.multiply_no_nan(logits, _per_row(mask, logits)), mask=mask
  )


def _per_row(weights: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
  return tf.reshape(weights, [-1] + [1] * (values.shape.rank - 1))
