"""FedMD: clients keep their models and learn from the mean of all predictions.

Li & Wang, "FedMD: Heterogenous Federated Learning via Model Distillation" (2019),
Algorithm 1: a client first learns from the transfer set's labels, if it has any
("transfer learning"); then, in each round, it digests the consensus (it fits the mean
logits on the transfer examples, by their absolute error), revisits its own examples, and
sends its logits on the transfer examples. The server has no model.
"""

from __future__ import annotations

from typing import Optional

import tff_kd
from tff_kd.algorithms import info
from tff_kd import rounds


@rounds.takes_options
def build_fed_md(
    *,
    student_fn: tff_kd.models.cohorts.StudentFn,
    training: rounds.ClientTraining,
    transfer_set: tff_kd.TransferSet,
    digest_optimizer: Optional[tff_kd.optimizers.Optimizer] = None,
    digest_epochs: int = 1,
    digest_batch_size: int = 256,
    pretraining_epochs: int = 0,
    consensus_rule: Optional[tff_kd.knowledge.ConsensusRule] = None,
    options: rounds.Options,
) -> rounds.StatefulClientsProcess:
  """Builds FedMD.

  Args:
    student_fn: Returns a new `keras.Model`, of which each client has its own; a list
      of such functions, one a cohort.
    training: Each field of `tff_kd.rounds.ClientTraining` as an argument of its own.
    transfer_set: The examples on which clients predict; 5,000 a round in the paper.
    digest_optimizer: For the transfer examples; Adam with the paper's rate 1e-3 if
      `None`. It starts anew each round.
    digest_epochs: Passes over the round's transfer examples.
    digest_batch_size: Examples a step.
    pretraining_epochs: Passes over all of the transfer set's labels, also with a
      `subset_size`, before a client's first round; with them the transfer set must have
      labels.
    consensus_rule: The rule that combines the clients' predictions; the mean of the
      logits, as in the paper, if `None`.
    options: Each field of `tff_kd.rounds.Options` as an argument of its own.

  Returns:
    A `StatefulClientsProcess` without a server model.
  """
  students = training.build_students(student_fn)

  def stage(
      epochs: int, size: int, **settings
  ) -> tff_kd.server.distill.DistillationStage:
    return tff_kd.server.distill.DistillationStage(
        'student',
        digest_optimizer,
        tff_kd.Distillation(
            num_steps=epochs * -(-size // min(digest_batch_size, size)),
            batch_size=digest_batch_size,
            reset_optimizer=True,
            **settings,
        ),
    )

  pretraining = None
  if pretraining_epochs:
    pretraining = stage(
        pretraining_epochs, transfer_set.whole().subset_size, distillation_weight=0.0
    )
  return rounds.compose_process(
      rounds.Parts(
          students=students,
          client_optimizer=training.client_optimizer,
          client_model=rounds.ClientModel.KEPT,
          exchange=tff_kd.client.exchanges.TransferExchange(
              students.first,
              transfer_set,
              consensus_rule or tff_kd.knowledge.MeanLogits(),
              stage(
                  digest_epochs,
                  transfer_set.subset_size,
                  loss='mae',
                  distillation_weight=1.0,
              ),
              options.seed,
          ),
          pretraining=pretraining,
      ),
      options,
  )


INFO = info.Info(
    build=build_fed_md,
    summary='clients keep their models and learn from the mean of all predictions',
    uploads=('predictions',),
    client_state=True,
    keeps='model',
    consensus='mean_logits',
    flags={
        'digest_epochs': 'digest_epochs',
        'digest_batch_size': 'digest_batch_size',
        'pretraining_epochs': 'pretrain_epochs',
    },
)
