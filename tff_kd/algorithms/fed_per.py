"""FedPer: the body is averaged, and each client keeps a head of its own.

Arivazhagan et al., "Federated Learning with Personalization Layers" (2019), Algorithm 1:
clients receive the base layers, train them together with personalization layers of their
own, and send the change of the base layers only.
"""

from __future__ import annotations

from typing import Optional

import tff_kd
from tff_kd.algorithms import info
from tff_kd import rounds


@rounds.takes_options
def build_fed_per(
    *,
    student_fn: tff_kd.models.cohorts.StudentFn,
    training: rounds.ClientTraining,
    split_layer: Optional[str] = None,
    options: rounds.Options,
) -> rounds.StatefulClientsProcess:
  """Builds FedPer.

  The server has a body and no head, so what there is to evaluate are clients' own models.

  Args:
    student_fn: Returns a new `keras.Model`; a list of such functions, one a cohort.
    training: Each field of `tff_kd.rounds.ClientTraining` as an argument of its own.
    split_layer: The name of the last layer of the body; the one before the last layer
      with weights if `None`.
    options: Each field of `tff_kd.rounds.Options` as an argument of its own.

  Returns:
    A `StatefulClientsProcess`: clients keep their models, of which they receive the
    body anew in each round.

  Raises:
    ValueError: If the body or the head has nothing to train.
  """
  students = training.build_students(student_fn)
  return rounds.compose_process(
      rounds.Parts(
          students=students,
          client_optimizer=training.client_optimizer,
          personal=tff_kd.models.personal.build_personal(
              students, split_layer, keeps='head'
          ),
      ),
      options,
  )


INFO = info.Info(
    build=build_fed_per,
    summary='the body is averaged; clients keep their heads',
    uploads=('weights',),
    client_state=True,
    keeps='layers',
    flags={'split_layer': 'split_layer'},
)
