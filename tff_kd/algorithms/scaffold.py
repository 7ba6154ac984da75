"""SCAFFOLD: averaging; clients' steps are corrected by control variates.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning"
(ICML 2020), Algorithm 1 with option II: a client steps along g - c_k + c, where c_k is
its own estimate of its gradient and c the mean of all clients'; after its K steps of rate
eta from x to y,

  c_k <- c_k - c + (x - y) / (K eta),

and the change of c_k goes up beside the weights.
"""

from __future__ import annotations

from typing import Optional

import tff_kd
from tff_kd.algorithms import info
from tff_kd import rounds


@rounds.takes_options
def build_scaffold(
    *,
    student_fn: tff_kd.models.KerasModelFn,
    training: rounds.ClientTraining,
    num_clients: Optional[int] = None,
    options: rounds.Options,
) -> rounds.StatefulClientsProcess:
  """Builds SCAFFOLD.

  The clients' optimizer must be plain SGD of TFF,
  `tff.learning.optimizers.build_sgdm(rate)`.

  Twice the bytes of FedAvg go down (weights and c) and up (weights and the change of
  c_k). The paper's mean over a round's clients is plain, so `client_weighting` is
  `UNIFORM` unless given.

  Args:
    student_fn: Returns a new `keras.Model`; one architecture for all clients.
    training: Each field of `tff_kd.rounds.ClientTraining` as an argument of its own.
    num_clients: The total number of clients; that of `client_data` if `None`.
    options: Each field of `tff_kd.rounds.Options` as an argument of its own.

  Returns:
    A `StatefulClientsProcess`: clients keep their control variates.

  Raises:
    ValueError: If there are several architectures, the optimizer is not plain SGD, or
      the number of clients is not known.
  """
  num_clients = options.count_clients(num_clients)
  students = training.build_students(student_fn)
  return rounds.compose_process(
      rounds.Parts(
          students=students,
          client_optimizer=training.client_optimizer,
          companion=tff_kd.client.companions.control_variates.ControlVariates(
              students.first, num_clients
          ),
      ),
      options.with_defaults(
          client_weighting=tff_kd.tff.learning.ClientWeighting.UNIFORM
      ),
  )


INFO = info.Info(
    build=build_scaffold,
    summary="averaging; clients' steps are corrected for how their gradients differ",
    uploads=('weights', 'control variates'),
    client_state=True,
    flag_defaults={'client_weighting': 'uniform'},
)
