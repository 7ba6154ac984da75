"""FedGKD: averaging, with clients that distil from past global students.

Yao et al., "Local-Global Knowledge Distillation in Heterogeneous Federated Learning
with Non-IID Data" (2021), the local objective:
(1 - gamma) CE + gamma KL(target || z), with the mean of the last M global students as
target. With M = 1 that is the global student itself (FedAvg+KD), and nothing more goes
down. The term, `tff_kd.LocalDistillation`, goes with any algorithm.
"""

from tff_kd import arguments
from tff_kd import local_terms
from tff_kd import process
from tff_kd.algorithms import fed_avg


@arguments.checked
def build_fed_gkd(
    *,
    local_weight: float = 0.2,
    local_temperature: float = 1.0,
    history_size: int = 5,
    **kwargs,
) -> process.DistillationProcess:
  """Builds FedGKD.

  Args:
    local_weight: gamma, above 0 and at most 1.
    local_temperature: T, above 0.
    history_size: M, 1 or more. The server's state holds M students; with more than
      one their mean goes down, too.
    **kwargs: The arguments of `build_fed_avg`; further `local_terms` come after
      this one.

  Returns:
    A `DistillationProcess` without a teacher.
  """
  term = local_terms.LocalDistillation(
      target='student' if history_size == 1 else 'student_history',
      weight=local_weight,
      temperature=local_temperature,
      history_size=history_size,
  )
  return fed_avg.build_fed_avg(
      local_terms=[term, *kwargs.pop('local_terms', ())], **kwargs
  )
