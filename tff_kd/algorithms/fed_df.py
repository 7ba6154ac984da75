"""FedDF: the averaged student learns from the clients' ensemble.

Lin et al., "Ensemble Distillation for Robust Model Fusion in Federated Learning"
(NeurIPS 2020), Algorithm 1 and equation 2. Clients send their logits on the
transfer set where the paper sends models to the server: the mean is the same, and
no client's model is seen.
"""

from __future__ import annotations

from typing import Optional

import tff_kd
from tff_kd.algorithms import info
from tff_kd import rounds

DEFAULT_DISTILLATION = tff_kd.server.settings.FED_DF_DISTILLATION


@rounds.takes_options
def build_fed_df(
    *,
    student_fn: tff_kd.models.cohorts.StudentFn,
    training: rounds.ClientTraining,
    transfer_set: tff_kd.TransferSet,
    student_optimizer: Optional[tff_kd.optimizers.Optimizer] = None,
    distillation: tff_kd.Distillation = DEFAULT_DISTILLATION,
    consensus_rule: Optional[tff_kd.knowledge.ConsensusRule] = None,
    options: rounds.Options,
) -> rounds.DistillationProcess:
  """Builds FedDF.

  The paper takes up to 10,000 server steps a round, and stops after 1,000 without
  a better validation; `Distillation(num_steps=10_000, validate_every=100,
  patience=10, ...)` with a `validation_size` gives that. The default takes 200.

  Args:
    student_fn: Returns a new `keras.Model`; a list of such functions, one a cohort
      (the paper's prototypes), all of which learn from the ensemble of all clients.
    training: Each field of `tff_kd.rounds.ClientTraining` as an argument of its own.
    transfer_set: The examples on which the ensemble is distilled.
    student_optimizer: The server's, for the distillation; Adam with the paper's
      rate 1e-3 if `None`.
    distillation: How the student learns from the ensemble.
    consensus_rule: The rule that combines the clients' predictions; the mean of the
      logits, as in the paper, if `None`.
    options: Each field of `tff_kd.rounds.Options` as an argument of its own.

  Returns:
    A `DistillationProcess` without a teacher.
  """
  students = training.build_students(student_fn)
  stage = tff_kd.server.distill.DistillationStage(
      'student', student_optimizer, distillation
  )
  return rounds.compose_process(
      rounds.Parts(
          students=students,
          client_optimizer=training.client_optimizer,
          exchange=tff_kd.client.exchanges.for_stages(
              [stage], students.first, transfer_set, consensus_rule
          ),
          transfer_set=transfer_set,
          stages=[stage],
      ),
      options,
  )


INFO = info.Info(
    build=build_fed_df,
    summary="the student learns from the clients' ensemble",
    uploads=('weights', 'predictions'),
    consensus='mean_logits',
)
