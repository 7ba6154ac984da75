"""FD: clients keep their models and exchange each class's mean logits.

Jeong et al., "Communication-Efficient On-Device Machine Learning: Federated Distillation
and Augmentation under Non-IID Private Data" (2018), Algorithm 1: a client adds up its
logits by label while it trains; from the next round on, its loss has the term

  lambda CE(softmax(z_mean of the label's class), z),

where the mean is over the other clients of the last round: its own part is left out. No
transfer set, no server model, and a few hundred bytes a round.
"""

from typing import Any, Optional

from tff_kd import arguments
from tff_kd import cohorts
from tff_kd import models
from tff_kd import optimizers
from tff_kd import private_process
from tff_kd import process


@arguments.checked
def build_fd(
    *,
    student_fn: cohorts.StudentFn,
    input_spec: Any,
    loss_fn: models.LossFn,
    client_optimizer: optimizers.Optimizer,
    regularizer_weight: float = 1.0,
    metrics_fn: Optional[models.MetricsFn] = None,
    **kwargs,
) -> process.PrivateProcess:
  """Builds FD.

  Args:
    student_fn: Returns a new `keras.Model`, of which each client has its own; a list
      of such functions, one a cohort.
    input_spec: The clients' `dataset.element_spec`; labels are class indices.
    loss_fn: Returns a `keras.losses.Loss`.
    client_optimizer: The clients' optimizer.
    regularizer_weight: lambda, above 0.
    metrics_fn: Returns a list of `keras.metrics.Metric`s.
    **kwargs: Further arguments of `private_process.build_private_process`.

  Returns:
    A `PrivateProcess` without a server model.
  """
  students = cohorts.build_students(
      student_fn, input_spec=input_spec, loss_fn=loss_fn, metrics_fn=metrics_fn
  )
  return private_process.build_private_process(
      students,
      client_optimizer=client_optimizer,
      exchange=private_process.ClassExchange(students.first, regularizer_weight),
      **kwargs,
  )
