"""FedKD: mutual learning that trusts as it learns, and updates of low rank.

Wu et al., "Communication-efficient federated learning via knowledge distillation" (Nature
Communications 2022): as FML, with adaptive mutual distillation,

  L = CE + KL(other || own) / (CE_mentor + CE_student)   for both,

and the student's update goes up as a truncated singular value decomposition that keeps a
share of its energy, which grows from round to round. (The paper also truncates what goes
down, and compares hidden states where both models are transformers.)
"""

from typing import Any, Optional

from tff_kd import arguments
from tff_kd import cohorts
from tff_kd import models
from tff_kd import mutual
from tff_kd import optimizers
from tff_kd import process
from tff_kd import svd


@arguments.checked
def build_fed_kd(
    *,
    student_fn: cohorts.StudentFn,
    mentor_fn: models.KerasModelFn,
    input_spec: Any,
    loss_fn: models.LossFn,
    client_optimizer: optimizers.Optimizer,
    start_energy: float = 0.95,
    end_energy: float = 0.98,
    energy_rounds: int = 100,
    temperature: float = 1.0,
    metrics_fn: Optional[models.MetricsFn] = None,
    **kwargs,
) -> process.PrivateProcess:
  """Builds FedKD.

  Args:
    student_fn: Returns a new, shared `keras.Model`; a list of such functions, one a
      cohort.
    mentor_fn: Returns a new, larger `keras.Model`, of which each client has its own.
    input_spec: The clients' `dataset.element_spec`.
    loss_fn: Returns a `keras.losses.Loss`, for both.
    client_optimizer: The clients' optimizer, for both.
    start_energy: The share of the update's energy that goes up in the first round.
    end_energy: And from round `energy_rounds` on; linear between them.
    energy_rounds: 1 or more.
    temperature: T of both divergences, above 0.
    metrics_fn: Returns a list of `keras.metrics.Metric`s, of the student.
    **kwargs: Further arguments of `process.build_distillation_process`; a
      `model_aggregator` is what the truncated updates go through, and must be weighted.

  Returns:
    A `PrivateProcess`: clients keep their mentors. `numbers_sent`, among the metrics of
    the model's aggregator, is what a client's update takes.
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
          student_weight=None,
          mentor_weight=None,
          temperature=temperature,
      ),
      model_aggregator=svd.TruncatedSvdFactory(
          start_energy, end_energy, energy_rounds, kwargs.pop('model_aggregator', None)
      ),
      **kwargs,
  )
