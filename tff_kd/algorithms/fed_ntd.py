"""FedNTD: averaging, with clients that keep what the global student knows.

Lee et al., "Preservation of the Global Knowledge by Not-True Distillation in
Federated Learning" (NeurIPS 2022), section 4: the local loss is
CE + beta tau^2 KL over all classes but the true one, with the received student as
target. Nothing but weights travels; the term itself, `tff_kd.NotTrueDistillation`,
goes with any algorithm.
"""

from tff_kd import arguments
from tff_kd import local_terms
from tff_kd import process
from tff_kd.algorithms import fed_avg


@arguments.checked
def build_fed_ntd(
    *,
    not_true_weight: float = 1.0,
    not_true_temperature: float = 1.0,
    **kwargs,
) -> process.DistillationProcess:
  """Builds FedNTD.

  Args:
    not_true_weight: beta, above 0; 1 in the paper.
    not_true_temperature: tau, above 0; 1 in the paper.
    **kwargs: The arguments of `build_fed_avg`; further `local_terms` come after
      this one. Labels must be class indices, of three classes or more.

  Returns:
    A `DistillationProcess` without a teacher.
  """
  term = local_terms.NotTrueDistillation(
      weight=not_true_weight, temperature=not_true_temperature
  )
  return fed_avg.build_fed_avg(
      local_terms=[term, *kwargs.pop('local_terms', ())], **kwargs
  )
