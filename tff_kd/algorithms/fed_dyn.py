"""FedDyn: averaging; each client's loss is moved so that all have one minimum.

Acar et al., "Federated Learning Based on Dynamic Regularization" (ICLR 2021), Algorithm
1: a client minimises L_k(w) - <h_k, w> + alpha / 2 ||w - w_received||^2 and then moves

  h_k <- h_k - alpha (w_k - w_received);

the server moves h by alpha / m times the sum of these changes, m being the number of all
clients, and the student to the mean of the clients' models minus h / alpha.
"""

from __future__ import annotations

from typing import Optional

import tff_kd
from tff_kd.algorithms import info
from tff_kd import rounds


@rounds.takes_options
def build_fed_dyn(
    *,
    student_fn: tff_kd.models.KerasModelFn,
    training: rounds.ClientTraining,
    dynamic_weight: float = 0.1,
    num_clients: Optional[int] = None,
    options: rounds.Options,
) -> rounds.StatefulClientsProcess:
  """Builds FedDyn.

  Nothing but weights travels. The server tells from the mean over a round's clients what
  their changes add up to, so that all must weigh the same: `client_weighting` is
  `UNIFORM`, and clients that may be late need a `Reporting` with `staleness_power=0`.

  Args:
    student_fn: Returns a new `keras.Model`; one architecture for all clients.
    training: Each field of `tff_kd.rounds.ClientTraining` as an argument of its own.
    dynamic_weight: alpha, above 0; the paper chooses of .001, .01 and .1. The smaller,
      the further the server goes.
    num_clients: The total number of clients; that of `client_data` if `None`.
    options: Each field of `tff_kd.rounds.Options` as an argument of its own.

  Returns:
    A `StatefulClientsProcess`: clients keep their h_k.

  Raises:
    ValueError: If there are several architectures, clients do not weigh the same, or
      the number of clients is not known.
  """
  num_clients = options.count_clients(num_clients)
  students = training.build_students(student_fn)
  return rounds.compose_process(
      rounds.Parts(
          students=students,
          client_optimizer=training.client_optimizer,
          companion=tff_kd.client.companions.dynamic_regularizer.DynamicRegularizer(
              students.first, num_clients, dynamic_weight
          ),
      ),
      options.with_defaults(
          client_weighting=tff_kd.tff.learning.ClientWeighting.UNIFORM
      ),
  )


INFO = info.Info(
    build=build_fed_dyn,
    summary="averaging; each client's loss is moved so that all have one minimum",
    uploads=('weights',),
    client_state=True,
    flags={'dynamic_weight': 'dynamic_weight'},
    flag_defaults={'client_weighting': 'uniform'},
)
