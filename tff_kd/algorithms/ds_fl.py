"""DS-FL: clients keep their models; a sharpened consensus teaches them and the server's.

Itahara et al., "Distillation-Based Semi-Supervised Federated Learning for
Communication-Efficient Collaborative Training with Non-IID Private Data" (2020): in each
round clients train on their own examples and send their probabilities on the transfer
examples; the server sharpens the mean (entropy reduction aggregation, ERA), and clients
and the server's model learn it by cross-entropy.
"""

from __future__ import annotations

from typing import Optional

import tff_kd
from tff_kd.algorithms import info
from tff_kd import rounds

DEFAULT_DISTILLATION = tff_kd.Distillation(
    distillation_weight=1.0, num_steps=60, reset_optimizer=True
)


@rounds.takes_options
def build_ds_fl(
    *,
    student_fn: tff_kd.models.cohorts.StudentFn,
    training: rounds.ClientTraining,
    transfer_set: tff_kd.TransferSet,
    student_optimizer: Optional[tff_kd.optimizers.Optimizer] = None,
    distillation: tff_kd.Distillation = DEFAULT_DISTILLATION,
    consensus_rule: Optional[tff_kd.knowledge.ConsensusRule] = None,
    options: rounds.Options,
) -> rounds.StatefulClientsProcess:
  """Builds DS-FL.

  Args:
    student_fn: Returns a new `keras.Model`, of which each client has its own, and
      the server one; a list of such functions, one a cohort, of which the first is the
      server's.
    training: Each field of `tff_kd.rounds.ClientTraining` as an argument of its own.
    transfer_set: The examples on which clients predict.
    student_optimizer: For the transfer examples, of the clients and of the server;
      Adam with rate 1e-3 if `None`.
    distillation: How both learn from the consensus. (KL's gradient is that of the
      paper's cross-entropy against the soft labels.)
    consensus_rule: ERA with the paper's temperature 0.1 if `None`.
      `MeanProbabilities(power=2.0)` is Enhanced ERA; `MeanProbabilities()` is the
      paper's simple aggregation.
    options: Each field of `tff_kd.rounds.Options` as an argument of its own.

  Returns:
    A `StatefulClientsProcess` with a server model.
  """
  students = training.build_students(student_fn)
  rule = consensus_rule or tff_kd.knowledge.MeanProbabilities(temperature=0.1)
  stage = tff_kd.server.distill.DistillationStage(
      'student', student_optimizer, distillation
  )
  return rounds.compose_process(
      rounds.Parts(
          students=students,
          client_optimizer=training.client_optimizer,
          client_model=rounds.ClientModel.KEPT,
          exchange=tff_kd.client.exchanges.TransferExchange(
              students.first, transfer_set, rule, stage, options.seed
          ),
          stages=[stage],
      ),
      options,
  )


INFO = info.Info(
    build=build_ds_fl,
    summary=(
        "clients keep their models; a sharpened consensus teaches them and the server's"
    ),
    uploads=('predictions',),
    client_state=True,
    keeps='model',
    consensus='era',
)
