"""The bytes that each channel moves, from the types of the computations."""

from collections.abc import Mapping
import re
from typing import Any, NamedTuple, Optional

import numpy as np
from tff_kd.compat import tff
from tff_kd.runtime import tff_internals

# The key in `ledger` of the mean bytes that a client moved.
CLIENT_BYTES = 'bytes/client'
_COUNTS = 'client_work/participation/'
# Measurements of `svd.TruncatedSvdFactory`, one for each cohort if there are several.
_TRUNCATED = re.compile(r'(aggregator/model(?:_\d+)?)/numbers_sent')


class CodedBytes(NamedTuple):
  """The encoded sizes of messages whose types do not determine them.

  Attributes:
    shared: The size of the consensus that is sent to a client, in bytes; `None` if it
      is not encoded.
    knowledge: The size of what a client uploads, in bytes, or `None`.
  """

  shared: Optional[int] = None
  knowledge: Optional[int] = None


class RoundBytes(NamedTuple):
  """Bytes that one client moves in one round, by channel.

  The transfer examples of a round follow from its number, and never move.

  Attributes:
    down_student: The student's weights. With several cohorts, a client moves the
      weights of its own student; this is the mean of their sizes, and so is `up_model`.
    down_teacher: The teacher's weights, where clients learn from them.
    down_student_history: The mean of past students, where clients learn from it.
    down_shared: Where clients keep their models, the consensus or the mean outputs of
      each class, from which they learn.
    down_companion: The broadcast of a companion's server part, and what it sends in its
      exchanges.
    down_round: Round numbers.
    up_model: Weight deltas and statistics.
    up_knowledge: Predictions, or the mean outputs of each class.
    up_companion: A companion's uploads after the local training.
  """

  down_student: float = 0
  down_teacher: float = 0
  down_student_history: float = 0
  down_shared: float = 0
  down_companion: float = 0
  down_round: float = 0
  up_model: float = 0
  up_knowledge: float = 0
  up_companion: float = 0

  @property
  def down(self) -> float:
    """Bytes from the server to a client, over all channels."""
    return sum(v for k, v in self._asdict().items() if k.startswith('down'))

  @property
  def up(self) -> float:
    """Bytes from a client to the server, over all channels."""
    return self.up_model + self.up_knowledge + self.up_companion

  @property
  def total(self) -> float:
    """Bytes in both directions."""
    return self.down + self.up


def type_bytes(type_spec: tff.Type) -> int:
  """Returns the size of a value of a type, in bytes.

  Args:
    type_spec: An unplaced type with fully defined shapes.
  """
  if isinstance(type_spec, tff.TensorType):
    return int(np.prod(type_spec.shape, dtype=np.int64)) * np.dtype(
        type_spec.dtype
    ).itemsize
  return sum(type_bytes(t) for t in tff.structure.flatten(type_spec))


def aggregated_bytes(aggregator: tff.templates.AggregationProcess) -> int:
  """Returns how many bytes one client hands over to an aggregation, as it is encoded.

  These are the arguments of all its federated sums and the like. A secure sum counts as
  the integers that go in, without what its protocol adds.

  Args:
    aggregator: A process that a factory has created.
  """
  total = 0
  for uri, argument in tff_internals.intrinsic_calls(aggregator.next):
    if uri.startswith('federated_') and ('sum' in uri or 'aggregate' in uri):
      value = argument if isinstance(argument, tff.FederatedType) else argument[0]
      total += type_bytes(value.member)
  return total


def round_bytes(process: Any) -> RoundBytes:
  """Computes how many bytes each participating client moves in a round, by channel.

  Where there are cohorts, a client moves only the weights of its own student, and the
  mean over the cohorts is given.

  The sizes come from the types of what is broadcast and of what clients hand over: to a
  channel's own aggregator, as it encodes them (`aggregated_bytes`); else to the common
  sum, without metrics and weights (one scalar a channel).

  Quantised predictions (`knowledge.Quantized`) count as the code of a message of all
  rows without a previous one, whose length does not depend on the values. Coded against
  the last message, a message is shorter where little changed, and otherwise longer by
  about two bytes at most. `ledger` has the sizes that are measured in each round.

  Args:
    process: A `DistillationProcess` or a `StatefulClientsProcess`.

  Returns:
    The bytes of each channel.
  """
  count = len(process.students.specs)
  description = process.description
  broadcast, update = description.broadcast_type, description.update_type
  coded = description.coded_bytes

  def of_broadcast(name: str) -> int:
    return type_bytes(getattr(broadcast, name, tff.to_type(())))

  def of_update(name: str, value_type: tff.Type) -> int:
    encoded = [
        size for channel, size in description.aggregated_bytes.items()
        if channel.partition('_')[0] == name
    ]
    return sum(encoded) if encoded else type_bytes(value_type)

  exchanged_down, exchanged_up = description.exchanged_bytes
  return RoundBytes(
      down_student=of_broadcast('student') // count,
      down_teacher=of_broadcast('teacher'),
      down_student_history=of_broadcast('student_history') // count,
      down_shared=(
          of_broadcast('shared') if coded.shared is None else coded.shared
      ),
      down_companion=of_broadcast('companion') + exchanged_down,
      down_round=of_broadcast('round_num') + of_broadcast('shared_round'),
      up_model=of_update('model', update.model) // count,
      up_knowledge=(
          of_update('knowledge', update.knowledge)
          if coded.knowledge is None
          else coded.knowledge
      ),
      up_companion=exchanged_up,
  )


def ledger(
    each: RoundBytes,
    metrics: Mapping[str, Any],
    expected_clients: Optional[int] = None,
) -> dict[str, float]:
  """Computes how many bytes the clients of one round moved, by channel.

  A client that left before it began received nothing, and one whose report did not
  arrive counts as having sent nothing. Encoded messages, of predictions of a few bits
  and of truncated updates, count with their measured size.

  Args:
    each: The process's `round_bytes`.
    metrics: The round's metrics, flat, as `tff_kd.simulation.train` reports them.
    expected_clients: For a private process, which does not reveal the number of
      clients: their expected number; they count as if nothing was lost.

  Returns:
    `bytes/` and the name of each channel of `RoundBytes` that the process has: the sum
    over the clients; `bytes/client`: what a client that received and sent moved, on
    average.
  """
  if expected_clients is not None:
    senders = receivers = expected_clients
  else:
    receivers = int(metrics[f'{_COUNTS}num_clients'])
    senders = receivers - int(metrics.get(f'{_COUNTS}num_dropped_after_training', 0))
    if 'participation/num_chosen' in metrics:
      receivers = int(metrics['participation/num_chosen']) - int(
          metrics['participation/num_dropped_before_training']
      )
  total = RoundBytes(*(
      value * (receivers if name.startswith('down') else senders)
      for name, value in each._asdict().items()
  ))
  bits = metrics.get(f'{_COUNTS}knowledge_bits')
  if bits is not None:
    total = total._replace(up_knowledge=float(bits) / 8)
  truncated = [match[1] for match in map(_TRUNCATED.fullmatch, metrics) if match]
  if truncated:
    numbers = sum(
        float(metrics[f'{channel}/numbers_sent'])
        * float(metrics[f'{channel}/num_senders'])
        for channel in truncated
    )
    total = total._replace(up_model=4.0 * numbers)
  found = {
      f'bytes/{name}': float(value)
      for name, value in total._asdict().items() if getattr(each, name)
  }
  found[CLIENT_BYTES] = total.down / max(receivers, 1) + total.up / max(senders, 1)
  return found
