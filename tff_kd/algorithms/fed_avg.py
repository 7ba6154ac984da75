"""FedAvg (and FedOpt): no knowledge channel, no teacher.

McMahan et al., "Communication-Efficient Learning of Deep Networks from
Decentralized Data" (AISTATS 2017), Algorithm 1; with another server optimizer,
Reddi et al., "Adaptive Federated Optimization" (ICLR 2021), Algorithm 1.
"""

from typing import Any, Optional

from tff_kd import arguments
from tff_kd import cohorts
from tff_kd import models
from tff_kd import optimizers
from tff_kd import process


@arguments.checked
def build_fed_avg(
    *,
    student_fn: cohorts.StudentFn,
    input_spec: Any,
    loss_fn: models.LossFn,
    client_optimizer: optimizers.Optimizer,
    metrics_fn: Optional[models.MetricsFn] = None,
    **kwargs,
) -> process.DistillationProcess:
  """Builds federated averaging of any Keras model.

  Equals `tff.learning.algorithms.build_weighted_fed_avg` where that takes the
  model, and also averages batch norm's statistics.

  Args:
    student_fn: Returns a new `keras.Model`; a list of such functions, one a cohort.
    input_spec: The clients' `dataset.element_spec`.
    loss_fn: Returns a `keras.losses.Loss`.
    client_optimizer: The clients' optimizer.
    metrics_fn: Returns a list of `keras.metrics.Metric`s.
    **kwargs: Further arguments of `process.build_distillation_process`
      (`server_optimizer`, `client_weighting`, `model_aggregator`,
      `local_terms`, ...).

  Returns:
    A `DistillationProcess` without a teacher.
  """
  students = cohorts.build_students(
      student_fn, input_spec=input_spec, loss_fn=loss_fn, metrics_fn=metrics_fn
  )
  return process.build_distillation_process(
      students, client_optimizer=client_optimizer, **kwargs
  )
