"""Bytes per client and round, read off the computations' own types, or their code's."""

from typing import NamedTuple

import numpy as np
import tensorflow_federated as tff

from tff_kd import process as process_lib


class RoundBytes(NamedTuple):
  """What one client moves in one round; of several cohorts, the mean.

  Attributes:
    down: Bytes that the client receives.
    up_model: Bytes of its weight delta and statistics.
    up_knowledge: Bytes of its predictions.
    up_companion: Bytes of what a companion exchanges after the local training.
  """

  down: int
  up_model: int
  up_knowledge: int
  up_companion: int = 0

  @property
  def up(self) -> int:
    return self.up_model + self.up_knowledge + self.up_companion

  @property
  def total(self) -> int:
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
  What clients really send is measured in each round:
  `metrics['client_work']['participation']['knowledge_bits']`, summed over them.
  """
  count = len(process.students.specs)
  broadcast, update = process.broadcast_type, process.update_type
  down = type_bytes(broadcast)
  if count > 1:
    students = [
        getattr(broadcast, name, tff.to_type(()))
        for name in ('student', 'student_history')
    ]
    down -= sum(map(type_bytes, students)) * (count - 1) // count
  coded = process.coded_bytes
  if coded.shared is not None:
    down = coded.shared + sum(
        type_bytes(its) for its in (broadcast.shared_round, broadcast.round_num)
    )
  up_knowledge = type_bytes(update.knowledge)
  if coded.knowledge is not None:
    up_knowledge = coded.knowledge
  exchanged_down, exchanged_up = process.exchanged_bytes
  return RoundBytes(
      down=down + exchanged_down,
      up_model=type_bytes(update.model) // count,
      up_knowledge=up_knowledge,
      up_companion=exchanged_up,
  )
