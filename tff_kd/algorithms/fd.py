"""FD: clients keep their models and exchange each class's mean logits.

Jeong et al., "Communication-Efficient On-Device Machine Learning: Federated Distillation
and Augmentation under Non-IID Private Data" (2018), Algorithm 1: a client adds up its
logits by label while it trains; from the next round on, its loss has the term

  lambda CE(softmax(z_mean of the label's class), z),

where the mean is over the other clients of the last round: its own part is left out. It
is the mean over their examples, so that sums suffice; the paper's is the mean of their
means. No transfer set, no server model, and a few hundred bytes a round.
"""

from __future__ import annotations


import tff_kd
from tff_kd.algorithms import info
from tff_kd import rounds


@rounds.takes_options
def build_fd(
    *,
    student_fn: tff_kd.models.cohorts.StudentFn,
    training: rounds.ClientTraining,
    regularizer_weight: float = 1.0,
    options: rounds.Options,
) -> rounds.StatefulClientsProcess:
  """Builds FD. Labels must be class indices.

  Args:
    student_fn: Returns a new `keras.Model`, of which each client has its own; a list
      of such functions, one a cohort.
    training: Each field of `tff_kd.rounds.ClientTraining` as an argument of its own.
    regularizer_weight: lambda, above 0.
    options: Each field of `tff_kd.rounds.Options` as an argument of its own.

  Returns:
    A `StatefulClientsProcess` without a server model.
  """
  students = training.build_students(student_fn)
  return rounds.compose_process(
      rounds.Parts(
          students=students,
          client_optimizer=training.client_optimizer,
          client_model=rounds.ClientModel.KEPT,
          exchange=tff_kd.client.exchanges.ClassExchange(
              students.first, regularizer_weight
          ),
      ),
      options,
  )


INFO = info.Info(
    build=build_fd,
    summary="clients keep their models and exchange each class's mean logits",
    uploads=('logits by class',),
    client_state=True,
    keeps='model',
    flags={'regularizer_weight': 'regularizer_weight'},
    flag_defaults={'knowledge_clip': '50'},
)
