"""The document's fusion: students up, a teacher on the server, knowledge down.

The source document's loop (its steps 1 to 6): clients train the student, the
server averages it, the teacher learns by its own optimizer from the aggregated
student or the clients' ensemble,

  theta_T <- theta_T - a grad [(1 - w) CE(y, z_T) + w KL_T(z_target || z_T)],

and the student is refreshed from the teacher before it goes back to the clients.
"""

from typing import Any, Optional

from tff_kd.compat import tff

from tff_kd import cohorts
from tff_kd import knowledge
from tff_kd import models
from tff_kd import optimizers
from tff_kd import rounds
from tff_kd import server_distillation
from tff_kd import transfer
from tff_kd.client import exchanges

DEFAULT_DISTILLATION = server_distillation.Distillation(
    target='ensemble', num_steps=60
)
DEFAULT_BACK_DISTILLATION = server_distillation.Distillation(
    target='teacher', num_steps=100, reset_optimizer=True
)


@rounds.takes_options
def build_fed_distillation(
    *,
    student_fn: cohorts.StudentFn,
    teacher_fn: models.KerasModelFn,
    input_spec: Any,
    loss_fn: models.LossFn,
    transfer_set: transfer.TransferSet,
    client_optimizer: optimizers.Optimizer,
    teacher_optimizer: Optional[optimizers.Optimizer] = None,
    student_optimizer: Optional[optimizers.Optimizer] = None,
    distillation: server_distillation.Distillation = DEFAULT_DISTILLATION,
    back_distillation: Optional[server_distillation.Distillation] = (
        DEFAULT_BACK_DISTILLATION
    ),
    consensus_rule: knowledge.ConsensusRule = knowledge.MeanLogits(),
    metrics_fn: Optional[models.MetricsFn] = None,
    options: rounds.Options,
) -> rounds.DistillationProcess:
  """Builds the fusion of federated averaging and distillation through a teacher.

  Args:
    student_fn: Returns a new, small `keras.Model`, which clients train; a list of
      such functions, one a cohort.
    teacher_fn: Returns a new, large `keras.Model`, which stays on the server.
    input_spec: The clients' `dataset.element_spec`.
    loss_fn: Returns a `keras.losses.Loss`, for both models.
    transfer_set: The examples on which knowledge passes between models.
    client_optimizer: The clients' optimizer.
    teacher_optimizer: The teacher's own; its state lives in the process state.
      Adam with rate 1e-3 if `None`.
    student_optimizer: The student's for the way back; Adam with rate 1e-3 if
      `None`. (`server_optimizer` is the one that applies the mean delta.)
    distillation: How the teacher learns.
    back_distillation: How the student learns from the teacher afterwards; not at
      all if `None`.
    consensus_rule: How the clients' predictions become the ensemble's.
    metrics_fn: Returns a list of `keras.metrics.Metric`s.
    options: Each field of `tff_kd.rounds.Options` as an argument of its own.

  Returns:
    A `DistillationProcess` with a teacher.
  """
  kinds = dict(input_spec=input_spec, loss_fn=loss_fn, metrics_fn=metrics_fn)
  students = cohorts.build_students(student_fn, **kinds)
  teacher = models.build_model_spec(teacher_fn, name='teacher', **kinds)
  stages = [
      server_distillation.DistillationStage(
          'teacher',
          teacher_optimizer or tff.learning.optimizers.build_adam(1e-3),
          distillation,
      )
  ]
  if back_distillation is not None:
    stages.append(
        server_distillation.DistillationStage(
            'student',
            student_optimizer or tff.learning.optimizers.build_adam(1e-3),
            back_distillation,
        )
    )
  return rounds.compose_process(
      rounds.Parts(
          students=students,
          teacher=teacher,
          client_optimizer=client_optimizer,
          exchange=exchanges.for_stages(
              stages, students.first, transfer_set, consensus_rule
          ),
          transfer_set=transfer_set,
          stages=stages,
      ),
      options,
  )
