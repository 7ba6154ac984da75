"""CFD: labels of a few bits up and down; clients restart every round.

Sattler, Marban, Rischke & Samek, "CFD: Communication-Efficient Federated Distillation
via Soft-Label Quantization and Delta Coding" (2021), the algorithm with dual
distillation: in each round a client begins with the initial weights, learns the labels
that came down on the transfer examples, trains on its own examples, and sends its labels
for the transfer examples, quantised and coded against those that it sent last. The
server's model learns the mean of the clients' labels and relabels the transfer
examples; these labels, quantised, go down in the next round.
"""

from __future__ import annotations

from typing import Optional

import tff_kd
from tff_kd.algorithms import info
from tff_kd import rounds

# The number of bits for labels that are not quantised, but floats.
NOT_QUANTIZED = 32

DEFAULT_DISTILLATION = tff_kd.Distillation(
    distillation_weight=1.0, num_steps=100, reset_optimizer=True
)


@rounds.takes_options
def build_cfd(
    *,
    student_fn: tff_kd.models.cohorts.StudentFn,
    training: rounds.ClientTraining,
    transfer_set: tff_kd.TransferSet,
    student_optimizer: Optional[tff_kd.optimizers.Optimizer] = None,
    distillation: tff_kd.Distillation = DEFAULT_DISTILLATION,
    up_bits: int = 1,
    down_bits: int = 1,
    options: rounds.Options,
) -> rounds.StatefulClientsProcess:
  """Builds CFD.

  What a client keeps is what it sent last, and only if the transfer set has the same
  rows in every round: with a `subset_size` it keeps nothing, and each message is coded
  alone. Coding each client's message against its last one means that the server sees
  each client's labels; the process itself only adds them up, and counts the code's
  bits.

  Args:
    student_fn: Returns a new `keras.Model`; its first weights are those with which
      every client begins each round. A list of such functions, one a cohort, of which
      the first is the server's.
    training: Each field of `tff_kd.rounds.ClientTraining` as an argument of its own.
    transfer_set: The examples on which labels are exchanged.
    student_optimizer: For the transfer examples, of the clients and of the server; Adam
      with rate 1e-3 if `None`.
    distillation: How both learn labels; a client all of them in each round. (KL's
      gradient is that of cross-entropy against the soft labels.)
    up_bits: Bits of a class's probability in what clients send: 1 (the most likely
      class only) to 8, or 32: not quantised.
    down_bits: The bits of a class's probability in the server's labels.
    options: Each field of `tff_kd.rounds.Options` as an argument of its own.

  Returns:
    A `StatefulClientsProcess` with a server model, whose clients keep no model.

  Raises:
    ValueError: If a number of bits has no meaning.
  """
  up, down = _labels('up_bits', up_bits), _labels('down_bits', down_bits)
  students = training.build_students(student_fn)
  stage = tff_kd.server.distill.DistillationStage(
      'student', student_optimizer, distillation
  )
  return rounds.compose_process(
      rounds.Parts(
          students=students,
          client_optimizer=training.client_optimizer,
          client_model=rounds.ClientModel.INITIAL,
          exchange=tff_kd.client.exchanges.TransferExchange(
              students.first, transfer_set, up, stage, options.seed, relabelling=down
          ),
          stages=[stage],
      ),
      options,
  )


def _labels(name: str, bits: int) -> tff_kd.knowledge.ConsensusRule:
  """The rule for labels of so many bits."""
  mean = tff_kd.knowledge.MeanProbabilities()
  if bits == NOT_QUANTIZED:
    return mean
  try:
    return tff_kd.knowledge.Quantized(mean, bits)
  except ValueError as error:
    raise ValueError(f'`{name}`: {error} {NOT_QUANTIZED} is for none.') from error


INFO = info.Info(
    build=build_cfd,
    summary=(
        "clients reset each round and learn the server's labels; labels of a few bits"
    ),
    uploads=('predictions',),
    client_state=True,
    flags={'up_bits': 'prediction_bits', 'down_bits': 'down_bits'},
)
