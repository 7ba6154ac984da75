"""FedMD: clients keep their models and learn from the mean of all predictions.

Li & Wang, "FedMD: Heterogenous Federated Learning via Model Distillation" (2019),
Algorithm 1: a client first learns from the transfer set's labels, if it has any
("transfer learning"); then, in each round, it digests the consensus (it fits the mean
logits on the transfer examples, by their absolute error), revisits its own examples, and
sends its logits on the transfer examples. The server has no model.
"""

from typing import Any, Optional

from tff_kd.compat import tff

from tff_kd import cohorts
from tff_kd import knowledge
from tff_kd import models
from tff_kd import optimizers
from tff_kd import rounds
from tff_kd import server_distillation
from tff_kd import transfer
from tff_kd.client import exchanges


@rounds.takes_options
def build_fed_md(
    *,
    student_fn: cohorts.StudentFn,
    input_spec: Any,
    loss_fn: models.LossFn,
    transfer_set: transfer.TransferSet,
    client_optimizer: optimizers.Optimizer,
    digest_optimizer: Optional[optimizers.Optimizer] = None,
    digest_epochs: int = 1,
    digest_batch_size: int = 256,
    pretraining_epochs: int = 0,
    consensus_rule: knowledge.ConsensusRule = knowledge.MeanLogits(),
    metrics_fn: Optional[models.MetricsFn] = None,
    options: rounds.Options,
) -> rounds.StatefulClientsProcess:
  """Builds FedMD.

  Args:
    student_fn: Returns a new `keras.Model`, of which each client has its own; a list
      of such functions, one a cohort.
    input_spec: The clients' `dataset.element_spec`.
    loss_fn: Returns a `keras.losses.Loss`.
    transfer_set: The examples on which clients predict; 5,000 a round in the paper.
    client_optimizer: For the clients' own examples.
    digest_optimizer: For the transfer examples; Adam with the paper's rate 1e-3 if
      `None`. It starts anew each round.
    digest_epochs: Passes over the round's transfer examples.
    digest_batch_size: Examples a step.
    pretraining_epochs: Passes over the transfer set's labels before a client's first
      round; with them the transfer set must have labels.
    consensus_rule: How the predictions become what clients fit; the mean logits, as in
      the paper.
    metrics_fn: Returns a list of `keras.metrics.Metric`s.
    options: Each field of `tff_kd.rounds.Options` as an argument of its own.

  Returns:
    A `StatefulClientsProcess` without a server model.
  """
  students = cohorts.build_students(
      student_fn, input_spec=input_spec, loss_fn=loss_fn, metrics_fn=metrics_fn
  )
  optimizer = digest_optimizer or tff.learning.optimizers.build_adam(1e-3)
  size = transfer_set.subset_size

  def stage(epochs: int, **settings) -> server_distillation.DistillationStage:
    return server_distillation.DistillationStage(
        'student',
        optimizer,
        server_distillation.Distillation(
            num_steps=epochs * -(-size // min(digest_batch_size, size)),
            batch_size=digest_batch_size,
            reset_optimizer=True,
            **settings,
        ),
    )

  pretraining = None
  if pretraining_epochs:
    pretraining = stage(pretraining_epochs, distillation_weight=0.0)
  return rounds.compose_process(
      rounds.Parts(
          students=students,
          client_optimizer=client_optimizer,
          client_model=rounds.ClientModel.KEPT,
          exchange=exchanges.TransferExchange(
              students.first,
              transfer_set,
              consensus_rule,
              stage(digest_epochs, loss='mae', distillation_weight=1.0),
              options.seed,
          ),
          pretraining=pretraining,
      ),
      options,
  )
