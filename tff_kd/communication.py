"""Bytes of each channel, read off the computations' own types, or their code's."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow_federated as tff

from tff_kd import process as process_lib

# The name in `ledger` of what a client moved in the mean.
CLIENT_BYTES = 'bytes/client'
_COUNTS = 'client_work/participation/'


class RoundBytes(NamedTuple):
  """What moves in one round, by channel.

  The transfer examples of a round follow from its number, and never move.

  Attributes:
    down_student: The student's weights (of several cohorts, a client's own).
    down_teacher: The teacher's, where clients learn from it.
    down_student_history: The mean of past students, likewise.
    down_shared: What clients that keep their models learn from: the consensus, or each
      class's.
    down_companion: What a companion's server part sends, and what it sends in its
      exchanges.
    down_round: Round numbers.
    up_model: Weight deltas and statistics.
    up_knowledge: Predictions, or each class's.
    up_companion: What a companion exchanges after the local training.
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
    return sum(v for k, v in self._asdict().items() if k.startswith('down'))

  @property
  def up(self) -> float:
    return self.up_model + self.up_knowledge + self.up_companion

  @property
  def total(self) -> float:
    return self.down + self.up


def type_bytes(type_spec: tff.Type) -> int:
  """The size of a value of an unplaced type with fully defined shapes, in bytes."""
  if isinstance(type_spec, tff.TensorType):
    return int(np.prod(type_spec.shape, dtype=np.int64)) * np.dtype(
        type_spec.dtype
    ).itemsize
  return sum(type_bytes(t) for t in tff.structure.flatten(type_spec))


def round_bytes(process: process_lib.DistillationProcess) -> RoundBytes:
  """What each participating client of `process` moves in a round.

  Where there are cohorts, a client moves its own student's weights only: the mean over
  the cohorts is given.

  Read off the types of what is broadcast and of what clients hand to their
  aggregators: an aggregator that compresses moves less. Weights of the weighted
  mean (one scalar a channel) and metrics are left out.

  Quantised predictions (`knowledge.Quantized`) count as the code of a message of all
  rows without a previous one, which depends on no values. Coded against the last one a
  message is shorter where little changed, and else longer by two bytes or so at most.
  What clients really send is measured in each round: see `cohort_bytes`.
  """
  count = len(process.students.specs)
  broadcast, update, coded = (
      process.broadcast_type, process.update_type, process.coded_bytes
  )

  def of_broadcast(name: str) -> int:
    return type_bytes(getattr(broadcast, name, tff.to_type(())))

  exchanged_down, exchanged_up = process.exchanged_bytes
  return RoundBytes(
      down_student=of_broadcast('student') // count,
      down_teacher=of_broadcast('teacher'),
      down_student_history=of_broadcast('student_history') // count,
      down_shared=(
          of_broadcast('shared') if coded.shared is None else coded.shared
      ),
      down_companion=of_broadcast('companion') + exchanged_down,
      down_round=of_broadcast('round_num') + of_broadcast('shared_round'),
      up_model=type_bytes(update.model) // count,
      up_knowledge=(
          type_bytes(update.knowledge) if coded.knowledge is None else coded.knowledge
      ),
      up_companion=exchanged_up,
  )


def ledger(each: RoundBytes, metrics: Mapping[str, Any]) -> dict[str, float]:
  """What the clients of one round moved, by channel.

  A client that was gone before it began received nothing, and one whose report did not
  arrive counts as having sent nothing. What clients code counts as long as it was:
  predictions of a few bits, and truncated updates.

  Args:
    each: The process's `round_bytes`.
    metrics: The round's, flat, as `tff_kd.simulation.train` has them.

  Returns:
    `bytes/` and the name of each channel of `RoundBytes` that the process has: the sum
    over the clients; `bytes/client`: what one that received and sent moved, in the mean.
  """
  present = int(metrics[f'{_COUNTS}num_clients'])
  senders = present - int(metrics.get(f'{_COUNTS}num_dropped_after_training', 0))
  receivers = present
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
  numbers = metrics.get('aggregator/model/numbers_sent')
  if numbers is not None:
    included = int(metrics[f'{_COUNTS}num_included'])
    total = total._replace(up_model=4.0 * float(numbers) * included)
  found = {
      f'bytes/{name}': float(value)
      for name, value in total._asdict().items() if getattr(each, name)
  }
  found[CLIENT_BYTES] = total.down / max(receivers, 1) + total.up / max(senders, 1)
  return found
