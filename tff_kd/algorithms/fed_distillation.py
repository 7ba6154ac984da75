"""Teacher-student federated distillation, with a teacher on the server.

Clients train the student, the server averages it, the teacher learns with its own
optimizer from the averaged student or from the clients' ensemble,

  theta_T <- theta_T - a grad [(1 - w) CE(y, z_T) + w KL_T(z_target || z_T)],

and the student is refreshed from the teacher; clients go on from it, or from the average.
"""

from __future__ import annotations

from typing import Optional

import tff_kd
from tff_kd.algorithms import info
from tff_kd import rounds

DEFAULT_DISTILLATION = tff_kd.Distillation(
    target='ensemble', num_steps=60
)
DEFAULT_BACK_DISTILLATION = tff_kd.Distillation(
    target='teacher', num_steps=100, reset_optimizer=True
)


@rounds.takes_options
def build_fed_distillation(
    *,
    student_fn: tff_kd.models.cohorts.StudentFn,
    teacher_fn: tff_kd.models.KerasModelFn,
    training: rounds.ClientTraining,
    transfer_set: tff_kd.TransferSet,
    teacher_optimizer: Optional[tff_kd.optimizers.Optimizer] = None,
    student_optimizer: Optional[tff_kd.optimizers.Optimizer] = None,
    distillation: tff_kd.Distillation = DEFAULT_DISTILLATION,
    back_distillation: Optional[tff_kd.Distillation] = (
        DEFAULT_BACK_DISTILLATION
    ),
    consensus_rule: Optional[tff_kd.knowledge.ConsensusRule] = None,
    options: rounds.Options,
) -> rounds.DistillationProcess:
  """Builds teacher-student federated distillation: averaging, and a teacher.

  Args:
    student_fn: Returns a new, small `keras.Model`, which clients train; a list of
      such functions, one a cohort.
    teacher_fn: Returns a new, large `keras.Model`, which stays on the server.
    training: Each field of `tff_kd.rounds.ClientTraining` as an argument of its own.
    transfer_set: The examples on which knowledge passes between models.
    teacher_optimizer: The teacher's own; its state lives in the process state.
      Adam with rate 1e-3 if `None`.
    student_optimizer: The student's for the way back; Adam with rate 1e-3 if
      `None`. (`server_optimizer` is the one that applies the mean delta.)
    distillation: How the teacher learns.
    back_distillation: How the student learns from the teacher afterwards; not at
      all if `None`.
    consensus_rule: The rule that combines the clients' predictions; the mean of the
      logits if `None`.
    options: Each field of `tff_kd.rounds.Options` as an argument of its own.

  Returns:
    A `DistillationProcess` with a teacher.
  """
  students = training.build_students(student_fn)
  teacher = training.build_model(teacher_fn, 'teacher')
  stage = tff_kd.server.distill.DistillationStage
  stages = [stage('teacher', teacher_optimizer, distillation)]
  if back_distillation is not None:
    stages.append(stage('student', student_optimizer, back_distillation))
  return rounds.compose_process(
      rounds.Parts(
          students=students,
          teacher=teacher,
          client_optimizer=training.client_optimizer,
          exchange=tff_kd.client.exchanges.for_stages(
              stages, students.first, transfer_set, consensus_rule
          ),
          transfer_set=transfer_set,
          stages=stages,
      ),
      options,
  )


INFO = info.Info(
    build=build_fed_distillation,
    summary='teacher-student distillation: ensemble to teacher, teacher to student',
    uploads=('weights', 'predictions'),
    consensus='mean_logits',
)
