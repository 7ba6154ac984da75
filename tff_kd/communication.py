"""Bytes per client and round, read off the computations' own types, or their code's."""

from typing import NamedTuple

import numpy as np
import tensorflow_federated as tff

from tff_kd import process as process_lib


class RoundBytes(NamedTuple):
  """What one client moves in one round.

  Attributes:
    down: Bytes that the client receives.
    up_model: Bytes of its weight delta and statistics.
    up_knowledge: Bytes of its predictions.
  """

  down: int
  up_model: int
  up_knowledge: int

  @property
  def up(self) -> int:
    return self.up_model + self.up_knowledge

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

  Read off the types of what is broadcast and of what clients hand to their
  aggregators: an aggregator that compresses moves less. Weights of the weighted
  mean (one scalar a channel) and metrics are left out.

  Quantised predictions (`knowledge.Quantized`) count as the code of a message of all
  rows without a previous one, which depends on no values. Coded against the last one a
  message is shorter where little changed, and else longer by two bytes or so at most.
  What clients really send is measured in each round:
  `metrics['client_work']['participation']['knowledge_bits']`, summed over them.
  """
  coded = process.coded_bytes
  down = type_bytes(process.broadcast_type)
  if coded.shared is not None:
    down = coded.shared + type_bytes(process.broadcast_type.round_num)
  up_knowledge = type_bytes(process.update_type.knowledge)
  if coded.knowledge is not None:
    up_knowledge = coded.knowledge
  return RoundBytes(
      down=down,
      up_model=type_bytes(process.update_type.model),
      up_knowledge=up_knowledge,
  )
