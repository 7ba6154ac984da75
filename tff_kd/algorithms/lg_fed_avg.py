"""LG-FedAvg: the head is averaged, and each client keeps a body of its own.

Liang et al., "Think Locally, Act Globally: Federated Learning with Local and Global
Representations" (2020), Algorithm 1: clients learn representations of their own, on which
a global model works that is averaged. (The paper starts from a model of FedAvg's, which
makes the representations alike: load its weights in `student_fn` for that.)
"""

from __future__ import annotations

from typing import Optional

import tff_kd
from tff_kd.algorithms import info
from tff_kd import rounds


@rounds.takes_options
def build_lg_fed_avg(
    *,
    student_fn: tff_kd.models.cohorts.StudentFn,
    training: rounds.ClientTraining,
    split_layer: Optional[str] = None,
    options: rounds.Options,
) -> rounds.StatefulClientsProcess:
  """Builds LG-FedAvg.

  The server has a head and no body, so what there is to evaluate are clients' own models.

  Args:
    student_fn: Returns a new `keras.Model`; a list of such functions, one a cohort.
    training: Each field of `tff_kd.rounds.ClientTraining` as an argument of its own.
    split_layer: The name of the last layer of the body; the one before the last layer
      with weights if `None`.
    options: Each field of `tff_kd.rounds.Options` as an argument of its own.

  Returns:
    A `StatefulClientsProcess`: clients keep their models, of which they receive the
    head anew in each round.

  Raises:
    ValueError: If the body or the head has nothing to train.
  """
  students = training.build_students(student_fn)
  return rounds.compose_process(
      rounds.Parts(
          students=students,
          client_optimizer=training.client_optimizer,
          personal=tff_kd.models.personal.build_personal(
              students, split_layer, keeps='body'
          ),
      ),
      options,
  )


INFO = info.Info(
    build=build_lg_fed_avg,
    summary='the head is averaged; clients keep their bodies',
    uploads=('weights',),
    client_state=True,
    keeps='layers',
    flags={'split_layer': 'split_layer'},
)
