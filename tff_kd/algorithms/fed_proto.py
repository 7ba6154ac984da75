"""FedProto: clients keep their models and exchange each class's mean features.

Tan et al., "FedProto: Federated Prototype Learning across Heterogeneous Clients" (AAAI
2022), Algorithm 1: a client adds up its features by class while it trains; from the next
round on, its loss has the term

  lambda d(f(x), prototype of the label's class),

where the prototype is the mean of all clients' features of that class in the last round
and d the mean squared difference. What goes up are sums and counts, so secure sums and
differential privacy apply. No transfer set, no server model.
"""

from __future__ import annotations

from typing import Optional

import tff_kd
from tff_kd.algorithms import info
from tff_kd import rounds


@rounds.takes_options
def build_fed_proto(
    *,
    student_fn: tff_kd.models.cohorts.StudentFn,
    training: rounds.ClientTraining,
    prototype_weight: float = 1.0,
    split_layer: Optional[str] = None,
    options: rounds.Options,
) -> rounds.StatefulClientsProcess:
  """Builds FedProto.

  Examples must have one class each. A client predicts by its own model's outputs. (The
  paper also predicts by the nearest prototype.)

  Args:
    student_fn: Returns a new `keras.Model` that applies its layers one after the other,
      of which each client has its own; a list of such functions, one a cohort, whose
      features must be as many.
    training: Each field of `tff_kd.rounds.ClientTraining` as an argument of its own.
    prototype_weight: lambda, above 0; 1 in the authors' implementation.
    split_layer: The name of the student's layer whose outputs are the features; the one
      before the last with weights if `None`.
    options: Each field of `tff_kd.rounds.Options` as an argument of its own.

  Returns:
    A `StatefulClientsProcess` without a server model.

  Raises:
    ValueError: If a student has no classes, cannot be split, or has other features than
      another.
  """
  students = training.build_students(student_fn)
  return rounds.compose_process(
      rounds.Parts(
          students=students,
          client_optimizer=training.client_optimizer,
          client_model=rounds.ClientModel.KEPT,
          exchange=tff_kd.client.prototypes.PrototypeExchange(
              students, prototype_weight, split_layer
          ),
      ),
      options,
  )


INFO = info.Info(
    build=build_fed_proto,
    summary="clients keep their models and exchange each class's mean features",
    uploads=('prototypes',),
    client_state=True,
    keeps='model',
    flags={'prototype_weight': 'prototype_weight', 'split_layer': 'split_layer'},
    flag_defaults={'knowledge_clip': '50'},
)
