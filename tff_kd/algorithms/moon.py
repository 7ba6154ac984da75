"""MOON: averaging; a client's features are drawn to the received model's.

Li, He & Song, "Model-Contrastive Federated Learning" (CVPR 2021), Algorithm 1: the local
loss is CE + mu l with

  l = -log(exp(s(z, z_r) / tau) / (exp(s(z, z_r) / tau) + exp(s(z, z_p) / tau))),

where z are the features of an example, z_r those of the received model, z_p those of the
model with which the client ended its last round, and s is the cosine similarity. Nothing
but weights travels. (The paper's models have a projection head, whose outputs are z:
build it into the student, and name its last layer in `split_layer`.)
"""

from __future__ import annotations

from typing import Optional

import tff_kd
from tff_kd.algorithms import info
from tff_kd import rounds


@rounds.takes_options
def build_moon(
    *,
    student_fn: tff_kd.models.KerasModelFn,
    training: rounds.ClientTraining,
    split_layer: Optional[str] = None,
    contrast_weight: float = 1.0,
    contrast_temperature: float = 0.5,
    options: rounds.Options,
) -> rounds.StatefulClientsProcess:
  """Builds MOON. Examples must have one prediction each.

  Args:
    student_fn: Returns a new `keras.Model` that applies its layers one after the
      other; one architecture for all clients.
    training: Each field of `tff_kd.rounds.ClientTraining` as an argument of its own.
    split_layer: The name of the student's layer whose outputs are compared; the one
      before the last with weights if `None`.
    contrast_weight: mu, above 0; the paper chooses of .1, 1, 5 and 10.
    contrast_temperature: tau, above 0; .5 in the paper.
    options: Each field of `tff_kd.rounds.Options` as an argument of its own.

  Returns:
    A `StatefulClientsProcess`: clients keep their last models.

  Raises:
    ValueError: If there are several architectures, or the student cannot be split.
  """
  students = training.build_students(student_fn)
  return rounds.compose_process(
      rounds.Parts(
          students=students,
          client_optimizer=training.client_optimizer,
          companion=tff_kd.client.companions.contrast.ModelContrast(
              students.first,
              split_layer=split_layer,
              weight=contrast_weight,
              temperature=contrast_temperature,
          ),
      ),
      options,
  )


INFO = info.Info(
    build=build_moon,
    summary="averaging; a client's features are drawn to the received model's",
    uploads=('weights',),
    client_state=True,
    keeps='model',
    flags={
        'split_layer': 'split_layer',
        'contrast_weight': 'contrast_weight',
        'contrast_temperature': 'contrast_temperature',
    },
)
