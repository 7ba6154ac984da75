"""FedGKD: averaging, with clients that distil from past global students.

Yao et al., "Local-Global Knowledge Distillation in Heterogeneous Federated Learning
with Non-IID Data" (2021), the local objective:
(1 - gamma) CE + gamma KL(target || z), with the mean of the last M global students as
target. With M = 1 that is the global student itself (FedAvg+KD), and nothing more goes
down. The term, `tff_kd.LocalDistillation`, goes with any algorithm.
"""

from __future__ import annotations


import tff_kd
from tff_kd.algorithms import info
from tff_kd import rounds


@rounds.takes_options
def build_fed_gkd(
    *,
    student_fn: tff_kd.models.cohorts.StudentFn,
    training: rounds.ClientTraining,
    local_weight: float = 0.2,
    local_temperature: float = 1.0,
    history_size: int = 5,
    options: rounds.Options,
) -> rounds.DistillationProcess:
  """Builds FedGKD.

  Args:
    student_fn: Returns a new `keras.Model`; a list of such functions, one a cohort.
    training: Each field of `tff_kd.rounds.ClientTraining` as an argument of its own.
    local_weight: gamma, above 0 and at most 1.
    local_temperature: T, above 0.
    history_size: M, 1 or more. The server's state holds M students; with more than
      one their mean goes down, too.
    options: Each field of `tff_kd.rounds.Options` as an argument of its own.

  Returns:
    A `DistillationProcess` without a teacher.
  """
  term = tff_kd.client.local_terms.LocalDistillation(
      target='student' if history_size == 1 else 'student_history',
      weight=local_weight,
      temperature=local_temperature,
      history_size=history_size,
  )
  students = training.build_students(student_fn)
  return rounds.compose_process(
      rounds.Parts(
          students=students,
          client_optimizer=training.client_optimizer,
          local_terms=[term],
      ),
      options,
  )


INFO = info.Info(
    build=build_fed_gkd,
    summary='averaging; clients learn from past global students',
    uploads=('weights',),
    flags={
        'local_weight': 'local_weight',
        'local_temperature': 'local_temperature',
        'history_size': 'history_size',
    },
)
