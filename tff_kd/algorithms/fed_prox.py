"""FedProx: averaging, with local training held near the global student.

Li et al., "Federated Optimization in Heterogeneous Networks" (MLSys 2020), Algorithm
2 and equation 2: L(w) + mu / 2 ||w - w_t||^2. Without the distillation server side it
is a baseline; the term itself, `tff_kd.ProximalTerm`, goes with any algorithm.

Not to be compared with `build_weighted_fed_prox` of TFF 0.87: that one adds
mu (w_t - w) to the gradient where the paper has mu (w - w_t), and so pushes clients away
from the server's model. With mu it is what this would be with -mu.
"""

from __future__ import annotations


import tff_kd
from tff_kd.algorithms import info
from tff_kd import rounds


@rounds.takes_options
def build_fed_prox(
    *,
    student_fn: tff_kd.models.cohorts.StudentFn,
    training: rounds.ClientTraining,
    proximal_weight: float = 0.01,
    options: rounds.Options,
) -> rounds.DistillationProcess:
  """Builds FedProx.

  Args:
    student_fn: Returns a new `keras.Model`; a list of such functions, one a cohort.
    training: Each field of `tff_kd.rounds.ClientTraining` as an argument of its own.
    proximal_weight: mu, above 0; the paper tries 0.001, 0.01, 0.1 and 1.
    options: Each field of `tff_kd.rounds.Options` as an argument of its own.

  Returns:
    A `DistillationProcess` without a teacher.
  """
  term = tff_kd.client.local_terms.ProximalTerm(weight=proximal_weight)
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
    build=build_fed_prox,
    summary='averaging; clients stay near the global student',
    uploads=('weights',),
    flags={'proximal_weight': 'proximal_weight'},
)
