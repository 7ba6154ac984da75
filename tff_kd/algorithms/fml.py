"""FML: averaging; each client's private mentor and the shared student teach each other.

Shen et al., "Federated Mutual Learning" (2020): the student ("meme") is averaged, the
mentor ("personalized model") stays with its client from round to round, and in each local
step

  L_student = (1 - w) CE + w KL(mentor || student),
  L_mentor = (1 - v) CE + v KL(student || mentor).
"""

from __future__ import annotations


import tff_kd
from tff_kd.algorithms import info
from tff_kd import rounds


@rounds.takes_options
def build_fml(
    *,
    student_fn: tff_kd.models.cohorts.StudentFn,
    mentor_fn: tff_kd.models.KerasModelFn,
    training: rounds.ClientTraining,
    student_weight: float = 0.5,
    mentor_weight: float = 0.5,
    temperature: float = 1.0,
    options: rounds.Options,
) -> rounds.StatefulClientsProcess:
  """Builds FML.

  Args:
    student_fn: Returns a new, shared `keras.Model`; a list of such functions, one a
      cohort.
    mentor_fn: Returns a new `keras.Model`, of which each client has its own. It is
      trained by the clients' optimizer, too.
    training: Each field of `tff_kd.rounds.ClientTraining` as an argument of its own.
    student_weight: w, between 0 and 1.
    mentor_weight: v, between 0 and 1.
    temperature: T of both divergences, above 0.
    options: Each field of `tff_kd.rounds.Options` as an argument of its own.

  Returns:
    A `StatefulClientsProcess`: clients keep their mentors.
  """
  students = training.build_students(student_fn)
  mentor = training.build_model(mentor_fn, 'mentor')
  return rounds.compose_process(
      rounds.Parts(
          students=students,
          client_optimizer=training.client_optimizer,
          companion=tff_kd.client.companions.mutual.MutualLearning(
              students.first,
              mentor,
              student_weight=student_weight,
              mentor_weight=mentor_weight,
              temperature=temperature,
          ),
      ),
      options,
  )


INFO = info.Info(
    build=build_fml,
    summary="averaging; clients' private mentors and the student teach each other",
    uploads=('weights',),
    client_state=True,
    keeps='model',
)
