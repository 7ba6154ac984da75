"""Fed-ET: a large server model learns from the clients' variance-weighted ensemble.

Cho et al., "Heterogeneous Ensemble Knowledge Transfer for Training Large Models in
Federated Learning" (IJCAI 2022), section 3.2: the consensus on a transfer example is the
mean of the clients' logits, weighted by their variance over the classes; the server
model learns its most likely class as a label, and, with a small weight, the opinion of
the clients that disagree,

  CE(argmax z_consensus, z_T) + lambda KL(z_diversity || z_T).

The students are averaged, as there within models of one architecture.
"""

from __future__ import annotations

from typing import Optional

import tff_kd
from tff_kd.algorithms import info
from tff_kd import rounds

DEFAULT_DISTILLATION = tff_kd.Distillation(
    target='ensemble', loss='label', diversity_weight=0.05, num_steps=60
)


@rounds.takes_options
def build_fed_et(
    *,
    student_fn: tff_kd.models.cohorts.StudentFn,
    teacher_fn: tff_kd.models.KerasModelFn,
    training: rounds.ClientTraining,
    transfer_set: tff_kd.TransferSet,
    teacher_optimizer: Optional[tff_kd.optimizers.Optimizer] = None,
    distillation: tff_kd.Distillation = DEFAULT_DISTILLATION,
    consensus_rule: Optional[tff_kd.knowledge.ConsensusRule] = None,
    options: rounds.Options,
) -> rounds.DistillationProcess:
  """Builds Fed-ET.

  Predictions are added up by the class that they predict, which the diversity term
  needs: as many times the bytes as there are classes. Without that term
  (`diversity_weight=0`) they are plain sums.

  Args:
    student_fn: Returns a new, small `keras.Model`, which clients train; a list of
      such functions, one a cohort.
    teacher_fn: Returns a new, large `keras.Model`, the server's.
    training: Each field of `tff_kd.rounds.ClientTraining` as an argument of its own.
    transfer_set: The examples on which the ensemble is distilled.
    teacher_optimizer: The server model's; Adam with rate 1e-3 if `None`.
    distillation: How the server model learns.
    consensus_rule: The rule that combines the clients' predictions; the paper's, weighted
      by variance, if `None`.
    options: Each field of `tff_kd.rounds.Options` as an argument of its own.
      Predictions weigh the same whatever a client's examples, as in the paper, unless
      `knowledge_weighting` says otherwise.

  Returns:
    A `DistillationProcess` with the server model as teacher.
  """
  students = training.build_students(student_fn)
  teacher = training.build_model(teacher_fn, 'teacher')
  rules = (tff_kd.knowledge.CertaintyWeighted, tff_kd.knowledge.CertaintyWithDiversity)
  stage = tff_kd.server.distill.DistillationStage(
      'teacher', teacher_optimizer, distillation
  )
  exchange = tff_kd.client.exchanges.for_stages(
      [stage], students.first, transfer_set, consensus_rule,
      rules[bool(distillation.diversity_weight)]('variance'),
  )
  if exchange is not None:
    # Predictions weigh the same whatever a client's examples, as in the paper.
    options = options.with_defaults(
        knowledge_weighting=tff_kd.tff.learning.ClientWeighting.UNIFORM
    )
  return rounds.compose_process(
      rounds.Parts(
          students=students,
          teacher=teacher,
          client_optimizer=training.client_optimizer,
          exchange=exchange,
          transfer_set=transfer_set,
          stages=[stage],
      ),
      options,
  )


INFO = info.Info(
    build=build_fed_et,
    summary="a large server model learns from the clients' certainty-weighted ensemble",
    uploads=('weights', 'predictions'),
    consensus='diversity',
)
