"""FedKD: mutual learning that trusts as it learns, and updates of low rank.

Wu et al., "Communication-efficient federated learning via knowledge distillation" (Nature
Communications 2022): as FML, with adaptive mutual distillation,

  L = CE + KL(other || own) / (CE_mentor + CE_student)   for both,

and the student's update goes up as a truncated singular value decomposition that keeps a
share of its energy, which grows from round to round. (The paper also truncates what goes
down, and compares hidden states where both models are transformers.)
"""

from __future__ import annotations

import dataclasses

import tff_kd
from tff_kd.algorithms import info
from tff_kd import rounds


@rounds.takes_options
def build_fed_kd(
    *,
    student_fn: tff_kd.models.cohorts.StudentFn,
    mentor_fn: tff_kd.models.KerasModelFn,
    training: rounds.ClientTraining,
    start_energy: float = 0.95,
    end_energy: float = 0.98,
    energy_rounds: int = 100,
    temperature: float = 1.0,
    options: rounds.Options,
) -> rounds.StatefulClientsProcess:
  """Builds FedKD.

  Args:
    student_fn: Returns a new, shared `keras.Model`; a list of such functions, one a
      cohort.
    mentor_fn: Returns a new, larger `keras.Model`, of which each client has its own. It
      is trained by the clients' optimizer, too.
    training: Each field of `tff_kd.rounds.ClientTraining` as an argument of its own.
    start_energy: The share of the update's energy that goes up in the first round.
    end_energy: The share from round `energy_rounds` on; it is linear in between.
    energy_rounds: 1 or more.
    temperature: T of both divergences, above 0.
    options: Each field of `tff_kd.rounds.Options` as an argument of its own.
      A `model_aggregator` is what the truncated updates go through, and must be
      weighted. One that rounds saves no bytes, since what travels are the factors.

  Returns:
    A `StatefulClientsProcess`: clients keep their mentors. `numbers_sent`, among the
    metrics of the model's aggregator, is the size of a client's update.

  Raises:
    TypeError: If `model_aggregator` is not weighted.
    ValueError: If a number is out of range.
  """
  # First: a number out of range is refused before the models are built.
  aggregator = tff_kd.aggregators.svd.TruncatedSvdFactory(
      start_energy, end_energy, energy_rounds, options.model_aggregator
  )
  students = training.build_students(student_fn)
  mentor = training.build_model(mentor_fn, 'mentor')
  return rounds.compose_process(
      rounds.Parts(
          students=students,
          client_optimizer=training.client_optimizer,
          companion=tff_kd.client.companions.mutual.MutualLearning(
              students.first,
              mentor,
              student_weight=None,
              mentor_weight=None,
              temperature=temperature,
          ),
      ),
      dataclasses.replace(options, model_aggregator=aggregator),
  )


INFO = info.Info(
    build=build_fed_kd,
    summary='as fml, adaptive; updates travel as truncated decompositions',
    uploads=('weights',),
    client_state=True,
    keeps='model',
    flags={'energy_rounds': 'energy_rounds'},
)
