"""FedAvg (and FedOpt): no knowledge channel, no teacher.

McMahan et al., "Communication-Efficient Learning of Deep Networks from
Decentralized Data" (AISTATS 2017), Algorithm 1; with another server optimizer,
Reddi et al., "Adaptive Federated Optimization" (ICLR 2021), Algorithm 1.
"""

from __future__ import annotations

from typing import Any, Optional

import tff_kd
from tff_kd.algorithms import info
from tff_kd import rounds


@rounds.takes_options
def build_fed_avg(
    *,
    student_fn: tff_kd.models.cohorts.StudentFn,
    input_spec: Any,
    loss_fn: tff_kd.models.LossFn,
    client_optimizer: tff_kd.optimizers.Optimizer,
    metrics_fn: Optional[tff_kd.models.MetricsFn] = None,
    options: rounds.Options,
) -> rounds.DistillationProcess:
  """Builds federated averaging of any Keras model.

  Equals `tff.learning.algorithms.build_weighted_fed_avg` where that takes the
  model, and also averages batch norm's statistics.

  Args:
    student_fn: Returns a new `keras.Model`; a list of such functions, one a cohort.
    input_spec: The clients' `dataset.element_spec`.
    loss_fn: Returns a `keras.losses.Loss`.
    client_optimizer: The clients' optimizer.
    metrics_fn: Returns a list of `keras.metrics.Metric`s.
    options: Each field of `tff_kd.rounds.Options` as an argument of its own.

  Returns:
    A `DistillationProcess` without a teacher.
  """
  students = tff_kd.models.cohorts.build_students(
      student_fn, input_spec=input_spec, loss_fn=loss_fn, metrics_fn=metrics_fn
  )
  return rounds.compose_process(
      rounds.Parts(students=students, client_optimizer=client_optimizer), options
  )


INFO = info.Info(
    build=build_fed_avg,
    summary='weighted averaging of the student (FedAvg, FedOpt)',
    uploads=('weights',),
)
