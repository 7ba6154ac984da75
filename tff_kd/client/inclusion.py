"""Whether a client's report counts, with which weight, and what is counted of it."""

import collections
from typing import Any, NamedTuple, Optional

import tensorflow as tf
from tff_kd.compat import tff

from tff_kd.client import conditions as conditions_lib
from tff_kd.client import local_training
from tff_kd import graphs


class Inclusion(NamedTuple):
  """Whether a client takes part in a round, and why not.

  Attributes:
    finite: bool scalar, whether all that its training leaves is finite.
    is_empty: bool scalar, whether it has no examples.
    bad_labels: bool scalar, whether it has class labels out of range.
    bad_inputs: bool scalar, whether it has ids that an embedding does not have.
    valid: bool scalar, none of these; it then goes on with what it has learned.
    included: bool scalar, whether it is valid and its report arrives.
  """

  finite: tf.Tensor
  is_empty: tf.Tensor
  bad_labels: tf.Tensor
  bad_inputs: tf.Tensor
  valid: tf.Tensor
  included: tf.Tensor

  def counts(
      self, conditions: Optional[conditions_lib.ClientConditions] = None
  ) -> collections.OrderedDict[str, tf.Tensor]:
    """Returns a client's counts, int32 scalars: whether it is included, or why not."""
    causes = dict(
        empty=self.is_empty,
        bad_labels=self.bad_labels,
        bad_inputs=self.bad_inputs & ~self.bad_labels,
        non_finite=~self.finite & ~self.bad_labels & ~self.bad_inputs,
    )
    counts = collections.OrderedDict(
        num_clients=tf.constant(1),
        num_included=tf.cast(self.included, tf.int32),
        **{
            f'num_excluded_{cause}': tf.cast(found, tf.int32)
            for cause, found in causes.items()
        },
    )
    if conditions is not None:
      of_conditions = dict(
          num_dropped_after_training=self.valid & ~conditions.reports,
          num_late=self.included & (conditions.delay > 0),
          num_stragglers=self.included & (conditions.step_share < 1.0),
      )
      for name, found in of_conditions.items():
        counts[name] = tf.cast(found, tf.int32)
    return counts


def decide(
    trained: local_training.Trained,
    left: Any,
    conditions: Optional[conditions_lib.ClientConditions],
) -> Inclusion:
  """Decides whether a client is included.

  Args:
    trained: The result of its training.
    left: All else that must be finite: tensors in any structure.
    conditions: Its conditions, or `None`.
  """
  finite = graphs.all_finite(left)
  is_empty = tf.equal(trained.num_examples, 0)
  valid = finite & ~is_empty & ~trained.bad_labels & ~trained.bad_inputs
  included = valid if conditions is None else valid & conditions.reports
  return Inclusion(
      finite, is_empty, trained.bad_labels, trained.bad_inputs, valid, included
  )


def weight(
    weighting: tff.learning.ClientWeighting,
    num_examples: tf.Tensor,
    included: tf.Tensor,
    staleness: Optional[tf.Tensor] = None,
) -> tf.Tensor:
  """Returns a client's weight in a sum.

  Args:
    weighting: By the number of examples, or 1.
    num_examples: int64 scalar.
    included: bool scalar.
    staleness: float32 scalar, the factor of a late client's weight, or `None`.

  Returns:
    A float32 scalar, 0 if the client is not included.
  """
  if weighting is tff.learning.ClientWeighting.NUM_EXAMPLES:
    value = tf.cast(num_examples, tf.float32)
  else:
    value = tf.constant(1.0)
  if staleness is not None:
    value *= staleness
  return tf.where(included, value, 0.0)
