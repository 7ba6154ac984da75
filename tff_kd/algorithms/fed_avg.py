"""FedAvg (and FedOpt): no knowledge channel, no teacher; calibrated if asked for.

McMahan et al., "Communication-Efficient Learning of Deep Networks from
Decentralized Data" (AISTATS 2017), Algorithm 1; with another server optimizer,
Reddi et al., "Adaptive Federated Optimization" (ICLR 2021), Algorithm 1. With unlabelled
inputs on the server, the last bias of the averaged model is set so that it predicts the
classes as often as a prior says (`tff_kd.server.calibration`): an honest baseline for
distillation on the same inputs.
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
    training: rounds.ClientTraining,
    calibrate_on: Optional[tff_kd.TransferSet] = None,
    prior: Any = None,
    options: rounds.Options,
) -> rounds.DistillationProcess:
  """Builds federated averaging of any Keras model.

  Equals `tff.learning.algorithms.build_weighted_fed_avg` where that takes the
  model, and also averages batch norm's statistics.

  Args:
    student_fn: Returns a new `keras.Model`; a list of such functions, one a cohort.
    training: Each field of `tff_kd.rounds.ClientTraining` as an argument of its own.
    calibrate_on: Unlabelled inputs, on which the averaged model is calibrated before it
      is released; not at all if `None`. The model needs a trainable bias that is added
      to its logits. Clients then go on from the average as it is, unless
      `clients_start_from` says otherwise.
    prior: The share of each class in the predictions on `calibrate_on`: 'uniform', also
      if `None`; or probabilities `[classes]` above 0 that sum to 1, `[2]` of a single
      logit (no and yes), `[labels, 2]` of labels that are present or not.
    options: Each field of `tff_kd.rounds.Options` as an argument of its own.

  Returns:
    A `DistillationProcess` without a teacher.

  Raises:
    ValueError: If `prior` is given without `calibrate_on`.
  """
  students = training.build_students(student_fn)
  stages = []
  if calibrate_on is not None:
    stages = [tff_kd.server.calibration.CalibrationStage('student', prior)]
    options = options.with_defaults(clients_start_from='average')
  elif prior is not None:
    raise ValueError(
        '`prior` is of the calibration, which there is none of without `calibrate_on`: '
        f'pass both or neither, found prior={prior!r}.'
    )
  return rounds.compose_process(
      rounds.Parts(
          students=students,
          client_optimizer=training.client_optimizer,
          transfer_set=calibrate_on,
          stages=stages,
      ),
      options,
  )


INFO = info.Info(
    build=build_fed_avg,
    summary='weighted averaging of the student (FedAvg, FedOpt)',
    uploads=('weights',),
)
