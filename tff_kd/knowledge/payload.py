"""Uploaded predictions on the transfer set, as sums.

A client's predictions travel as `values` and `weights`, a pair of which any TFF
aggregation factory can take the weighted mean over clients, so that the server never sees
one client's predictions. The consensus on an example is the ratio of the two means; the
client's weight w_k cancels wherever all clients predicted, and a missing prediction is a
zero in both.
"""

from typing import NamedTuple, Optional

import tensorflow as tf

from tff_kd.data import transfer
from tff_kd import losses
from tff_kd import models


class KnowledgePayload(NamedTuple):
  """One client's uploaded knowledge, or the weighted mean over clients.

  Attributes:
    values: float32 `[m, ..., classes]`, the predictions times `weights`.
    weights: float32 `[m]`, how much each prediction counts (0 = missing). A rule
      may send several such pairs an example: both then have one more axis after the
      first.
  """

  values: tf.Tensor
  weights: tf.Tensor


class Consensus(NamedTuple):
  """The clients' joint opinion on the transfer examples.

  Attributes:
    logits: float32 `[m, ..., classes]`, finite everywhere.
    mask: float32 `[m]`, 1 where at least one client predicted, else 0.
    diversity: The joint opinion of those who do not share it, a `Consensus` with
      mask 0 where all agree; `None` from rules that do not tell.
  """

  logits: tf.Tensor
  mask: tf.Tensor
  diversity: Optional['Consensus'] = None


def predict_logits(
    model: models.BoundModel,
    transfer_set: transfer.TransferSet,
    ids: tf.Tensor,
) -> tf.Tensor:
  """Computes a model's logits on rows of the transfer set, in inference mode.

  Args:
    model: Anything with `logits(inputs)`, such as a `models.BoundModel`.
    transfer_set: The examples.
    ids: int32 `[k]` with a static k.

  Returns:
    float32 `[k, ..., classes]`.
  """
  logits = transfer_set.map_inputs(model.logits, ids)
  if isinstance(model, models.BoundModel):
    # In a graph, a recurrent layer may have lost the length.
    logits.set_shape([ids.shape[0], *logits_shape(model.spec, transfer_set)])
  return logits


def logits_shape(
    model: models.ModelSpec, transfer_set: transfer.TransferSet
) -> tf.TensorShape:
  """Returns the static shape of a model's logits for one example of a transfer set.

  Args:
    model: The model.
    transfer_set: The examples.
  """
  return model.logits_shape_for(transfer_set.inputs_spec)


def without_rows(logits: tf.Tensor, kept: tf.Tensor) -> tf.Tensor:
  """Marks rows of logits as missing.

  Args:
    logits: Float `[m, ..., classes]`.
    kept: bool `[m]`, the rows that are not missing.

  Returns:
    The logits, NaN in the missing rows.
  """
  return tf.where(per_row(kept, logits), logits, float('nan'))


def finite_rows(values: tf.Tensor) -> tf.Tensor:
  """Returns in which rows all numbers are finite.

  Args:
    values: Float `[m, ...]`.

  Returns:
    bool `[m]`.
  """
  axes = list(range(1, values.shape.rank))
  return tf.reduce_all(tf.math.is_finite(values), axis=axes)


def payload_of(values: tf.Tensor, weights: tf.Tensor) -> KnowledgePayload:
  """Makes a payload of weighted predictions: the contract of what clients send.

  Args:
    values: float32 `[m, ..., classes]`. A row in which something is not finite is
      missing: it has weight 0 and values 0, so that sums stay finite.
    weights: float32 `[m]`, 0 or more; not finite: missing, too.

  Returns:
    The payload of `values` times `weights`.
  """
  present = finite_rows(values) & tf.math.is_finite(weights)
  weights = tf.where(present, weights, 0.0)
  return KnowledgePayload(
      values=tf.math.multiply_no_nan(values, per_row(weights, values)),
      weights=weights,
  )


def mean_of(mean_payload: KnowledgePayload) -> tuple[tf.Tensor, tf.Tensor]:
  """Returns the weighted mean of predictions, and its weights.

  Args:
    mean_payload: The clients' payloads as aggregated; a factor common to values and
      weights cancels.

  Returns:
    float32 `[m, ..., classes]`, 0 where no client predicted, and float32 `[m]`.
  """
  values, weights = mean_payload
  return tf.math.divide_no_nan(values, per_row(weights, values)), weights


def consensus_of(logits: tf.Tensor, weights: tf.Tensor) -> Consensus:
  """Makes a consensus of logits.

  Args:
    logits: float32 `[m, ..., classes]`.
    weights: float32 `[m]`.

  Returns:
    A `Consensus` with mask 1 where the weight is above 0 and all logits are finite, and
    with logits 0 elsewhere.
  """
  mask = tf.cast((weights > 0.0) & finite_rows(logits), tf.float32)
  return Consensus(
      logits=tf.math.multiply_no_nan(logits, per_row(mask, logits)), mask=mask
  )


def per_row(weights: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
  return tf.reshape(weights, [-1] + [1] * (values.shape.rank - 1))


def probabilities(logits: tf.Tensor) -> tf.Tensor:
  return tf.sigmoid(logits) if logits.shape[-1] == 1 else tf.nn.softmax(logits)


def class_probabilities(logits: tf.Tensor) -> tf.Tensor:
  """Returns the probabilities of logits.

  Args:
    logits: Float `[..., classes]`; a last axis of one is a binary label's log-odds.

  Returns:
    Float `[..., classes]`, two classes or more.
  """
  return tf.nn.softmax(losses.two_classes(logits))
