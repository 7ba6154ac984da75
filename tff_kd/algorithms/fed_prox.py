"""FedProx: averaging, with local training held near the global student.

Li et al., "Federated Optimization in Heterogeneous Networks" (MLSys 2020), Algorithm
2 and equation 2: L(w) + mu / 2 ||w - w_t||^2. Without the distillation server side it
is a baseline; the term itself, `tff_kd.ProximalTerm`, goes with any algorithm.

Not to be compared with `build_weighted_fed_prox` of TFF 0.87: that one adds
mu (w_t - w) to the gradient where the paper has mu (w - w_t), and so pushes clients away
from the server's model. With mu it is what this would be with -mu.
"""

from tff_kd import arguments
from tff_kd import local_terms
from tff_kd import process
from tff_kd.algorithms import fed_avg


@arguments.checked
def build_fed_prox(
    *,
    proximal_weight: float = 0.01,
    **kwargs,
) -> process.DistillationProcess:
  """Builds FedProx.

  Args:
    proximal_weight: mu, above 0; the paper tries 0.001, 0.01, 0.1 and 1.
    **kwargs: The arguments of `build_fed_avg`; further `local_terms` come after
      this one.

  Returns:
    A `DistillationProcess` without a teacher.
  """
  term = local_terms.ProximalTerm(weight=proximal_weight)
  return fed_avg.build_fed_avg(
      local_terms=[term, *kwargs.pop('local_terms', ())], **kwargs
  )
