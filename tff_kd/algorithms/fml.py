"""FML: averaging; each client's private mentor and the shared student teach each other.

Shen et al., "Federated Mutual Learning" (2020): the student ("meme") is averaged, the
mentor ("personalized model") stays with its client from round to round, and in each local
step

  L_student = (1 - w) CE + w KL(mentor || student),
  L_mentor = (1 - v) CE + v KL(student || mentor).
"""

from typing import Any, Optional

from tff_kd import arguments
from tff_kd import cohorts
from tff_kd import models
from tff_kd import mutual
from tff_kd import optimizers
from tff_kd import process


@arguments.checked
def build_fml(
    *,
    student_fn: cohorts.StudentFn,
    mentor_fn: models.KerasModelFn,
    input_spec: Any,
    loss_fn: models.LossFn,
    client_optimizer: optimizers.Optimizer,
    student_weight: float = 0.5,
    mentor_weight: float = 0.5,
    temperature: float = 1.0,
    metrics_fn: Optional[models.MetricsFn] = None,
    **kwargs,
) -> process.PrivateProcess:
  """Builds FML.

  Args:
    student_fn: Returns a new, shared `keras.Model`; a list of such functions, one a
      cohort.
    mentor_fn: Returns a new `keras.Model`, of which each client has its own.
    input_spec: The clients' `dataset.element_spec`.
    loss_fn: Returns a `keras.losses.Loss`, for both.
    client_optimizer: The clients' optimizer, for both.
    student_weight: w, between 0 and 1.
    mentor_weight: v, between 0 and 1.
    temperature: T of both divergences, above 0.
    metrics_fn: Returns a list of `keras.metrics.Metric`s, of the student.
    **kwargs: Further arguments of `process.build_distillation_process`.

  Returns:
    A `PrivateProcess`: clients keep their mentors.
  """
  kinds = dict(input_spec=input_spec, loss_fn=loss_fn, metrics_fn=metrics_fn)
  students = cohorts.build_students(student_fn, **kinds)
  mentor = models.build_model_spec(mentor_fn, name='mentor', **kinds)
  return process.build_distillation_process(
      students,
      client_optimizer=client_optimizer,
      companion=mutual.MutualLearning(
          students.first,
          mentor,
          student_weight=student_weight,
          mentor_weight=mentor_weight,
          temperature=temperature,
      ),
      **kwargs,
  )
