"""A consensus rule of your own: the mean of clipped logits.

  python -m pipelines.train --algorithm=fed_df --consensus=examples/own_rule.py
"""

import tensorflow as tf

from tff_kd import knowledge


class ClippedMean(knowledge.ConsensusRule):
  """The mean of logits that are at most `bound` from their own mean over the classes."""

  has_unit_weights = True  # Predictions of all clients have the weight 1.

  def __init__(self, bound: float):
    self._bound = bound

  def encode(self, logits):
    centred = logits - tf.reduce_mean(logits, axis=-1, keepdims=True)
    clipped = tf.clip_by_value(centred, -self._bound, self._bound)
    return knowledge.payload_of(clipped, tf.ones(tf.shape(logits)[:1]))

  def decode(self, mean_payload):
    return knowledge.consensus_of(*knowledge.mean_of(mean_payload))


RULE = ClippedMean(bound=10.0)
