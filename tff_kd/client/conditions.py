"""Simulated system conditions of clients, and the policy for their reports.

Devices are late, stop early, vanish after their work, and answer in part. Here such
conditions come to a process with each client, as a value beside its number; who draws
them (`tff_kd.simulation.Participation`) does not concern the process.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tff_kd.compat import tff

from tff_kd.data import transfer


class ClientConditions(NamedTuple):
  """The conditions of one client in a round; by default nothing hinders it.

  Attributes:
    delay: int32, how many rounds ago the client began: it has what was sent then, and
      reports in this round. At most the number of rounds before this one.
    step_share: float32, the share of the local steps that it takes, above 0 and at most
      1; at least one step.
    reports: Whether what it sends arrives.
    coverage: float32, the share of this round's transfer examples on which it predicts.
    seed: int32 `[2]`, decides which examples these are.
  """

  delay: Any = np.int32(0)
  step_share: Any = np.float32(1.0)
  reports: Any = np.bool_(True)
  coverage: Any = np.float32(1.0)
  seed: Any = np.zeros([2], np.int32)


CONDITIONS_TYPE = tff.to_type(
    ClientConditions(*(tff.TensorType(v.dtype.type, v.shape) for v in ClientConditions()))
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reporting:
  """The policy for reports that are late, partial or too few.

  A process that is built with one is given `{'data': number, 'conditions':
  ClientConditions}` a client.

  Attributes:
    max_delay: The largest `ClientConditions.delay`; never more than the number of
      rounds before this one. The server's state holds what was sent in so many rounds,
      and a round sends it all to the runtime (which a real client of course does not
      get). The optimizer's hyperparameters are not among it: a late client trains with
      those of the round in which it reports (a learning rate that a callback or
      `set_hparams` has set since), but with the rate that `learning_rate_fn` gives for
      the round in which it began.
    staleness_power: a of the factor (1 + delay)^-a of a late client's weight, in
      weights and in predictions; 0 for none. Source: Xie et al., "Asynchronous
      Federated Optimization" (2019), the polynomial staleness function.
    min_reports: With fewer clients whose reports count, the round is skipped: its
      server state is the one before, with the next round number, and clients keep what
      they had before.
  """

  max_delay: int = 0
  staleness_power: float = 0.5
  min_reports: int = 0

  def __post_init__(self):
    for name in ('max_delay', 'min_reports'):
      value = getattr(self, name)
      if not isinstance(value, int) or value < 0:
        raise ValueError(f'`{name}` must be an integer, 0 or more, found {value!r}.')
    if not 0.0 <= self.staleness_power < float('inf'):
      raise ValueError(
          '`staleness_power` must be a finite number, 0 or more, found '
          f'{self.staleness_power!r}.'
      )

  def weight(self, delay: tf.Tensor) -> tf.Tensor:
    """Returns the factor of a client's weight.

    Args:
      delay: int32 scalar, by how many rounds the report is late.

    Returns:
      A float32 scalar.
    """
    return (1.0 + tf.cast(delay, tf.float32)) ** -self.staleness_power


class BroadcastHistory:
  """The broadcasts of the last rounds, for clients that began in one of them.

  With `max_delay=0` nothing is kept and what is sent is as it is.
  """

  def __init__(self, broadcast_type: tff.Type, max_delay: int):
    """Initializes the history.

    Args:
      broadcast_type: The type of one round's broadcast; tensors of known shapes.
      max_delay: The number of earlier rounds to keep.
    """
    self.max_delay = max_delay
    self.initial, self.push, self.sent_type = _nothing, None, broadcast_type
    if not max_delay:
      return
    specs = tff.types.type_to_tf_tensor_specs(broadcast_type)

    @tff.tensorflow.computation
    def initial():
      return tf.nest.map_structure(
          lambda spec: tf.zeros([max_delay, *spec.shape], spec.dtype), specs
      )

    @tff.tensorflow.computation(initial.type_signature.result, broadcast_type)
    def push(kept, current):
      sent = tf.nest.map_structure(
          lambda earlier, new: tf.concat([new[tf.newaxis], earlier], axis=0),
          kept, current,
      )
      return tf.nest.map_structure(lambda stacked: stacked[:-1], sent), sent

    self.initial, self.push = initial, push
    self.sent_type = push.type_signature.result[1]

  def received(self, sent: Any, delay: tf.Tensor) -> Any:
    """Returns what a client received that began `delay` rounds ago.

    Args:
      sent: The last broadcasts, stacked, newest first, as clients receive them.
      delay: int32 scalar.

    Returns:
      The broadcast of that round.
    """
    if not self.max_delay:
      return sent
    # `check_conditions` reports a delay out of range more clearly than a slice would.
    delay = tf.clip_by_value(delay, 0, self.max_delay)
    return tf.nest.map_structure(lambda stacked: stacked[delay], sent)

  def current(self, sent: Any) -> Any:
    """Returns the broadcast of this round.

    Args:
      sent: The last broadcasts, stacked, newest first, as clients receive them.
    """
    return self.received(sent, tf.constant(0))


@tff.tensorflow.computation
def _nothing():
  return ()


def check_conditions(
    reporting: Reporting, conditions: ClientConditions, round_num: tf.Tensor
) -> tf.Operation:
  """Builds an assertion that fails if a client's conditions are out of range.

  Args:
    reporting: The policy, which bounds the delay.
    conditions: The client's conditions.
    round_num: int32 scalar, the round in which the client reports, from 0. Before the
      first round nothing was sent with which it could have begun.

  Returns:
    The operation, as a control dependency.
  """
  return tf.debugging.Assert(
      (conditions.delay >= 0)
      & (conditions.delay <= tf.minimum(reporting.max_delay, round_num))
      & (conditions.step_share > 0.0)
      & (conditions.step_share <= 1.0)
      & (conditions.coverage >= 0.0)
      & (conditions.coverage <= 1.0),
      [
          f'The conditions of a client must be a delay from 0 to {reporting.max_delay} '
          'and at most the number of rounds before this one, a step_share above 0 and at '
          'most 1, and a coverage from 0 to 1; found',
          conditions.delay, conditions.step_share, conditions.coverage,
          'after so many rounds:', round_num,
      ],
  )


def covered_rows(
    transfer_set: transfer.TransferSet,
    conditions: ClientConditions,
    began: tf.Tensor,
    round_num: tf.Tensor,
) -> tf.Tensor:
  """Returns for which of a round's transfer examples a client has predictions.

  A late client predicted in the round in which it began. A prediction counts if the
  example is also among those of the round in which the client reports.

  Args:
    transfer_set: The examples.
    conditions: The client's conditions.
    began: int32, the round in which it began.
    round_num: int32, the round in which it reports.

  Returns:
    bool `[m]`, for the rows of `transfer_set.prediction_ids(round_num)`.
  """
  ids = transfer_set.prediction_ids(round_num)
  covered = (
      tf.random.stateless_uniform([transfer_set.num_predictions], conditions.seed)
      < conditions.coverage
  )
  if transfer_set.is_same_every_round:
    return covered
  then = transfer_set.prediction_ids(began)
  predicted = tf.scatter_nd(
      then[:, tf.newaxis], tf.ones_like(then), [transfer_set.size]
  )
  return covered & (tf.gather(predicted, ids) > 0)
