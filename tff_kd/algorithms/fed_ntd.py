"""FedNTD: averaging, with clients that keep what the global student knows.

Lee et al., "Preservation of the Global Knowledge by Not-True Distillation in
Federated Learning" (NeurIPS 2022), section 4: the local loss is
CE + beta tau^2 KL over all classes but the true one, with the received student as
target. Nothing but weights travels; the term itself, `tff_kd.NotTrueDistillation`,
goes with any algorithm.
"""

from __future__ import annotations


import tff_kd
from tff_kd.algorithms import info
from tff_kd import rounds


@rounds.takes_options
def build_fed_ntd(
    *,
    student_fn: tff_kd.models.cohorts.StudentFn,
    training: rounds.ClientTraining,
    not_true_weight: float = 1.0,
    not_true_temperature: float = 1.0,
    options: rounds.Options,
) -> rounds.DistillationProcess:
  """Builds FedNTD. Labels must be class indices, of three classes or more.

  Args:
    student_fn: Returns a new `keras.Model`; a list of such functions, one a cohort.
    training: Each field of `tff_kd.rounds.ClientTraining` as an argument of its own.
    not_true_weight: beta, above 0; 1 in the paper.
    not_true_temperature: tau, above 0; 1 in the paper.
    options: Each field of `tff_kd.rounds.Options` as an argument of its own.

  Returns:
    A `DistillationProcess` without a teacher.
  """
  term = tff_kd.client.local_terms.NotTrueDistillation(
      weight=not_true_weight, temperature=not_true_temperature
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
    build=build_fed_ntd,
    summary='averaging; clients keep what the global student says of other classes',
    uploads=('weights',),
    flags={
        'not_true_weight': 'not_true_weight',
        'not_true_temperature': 'not_true_temperature',
    },
)
