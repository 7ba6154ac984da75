"""DS-FL: clients keep their models; a sharpened consensus teaches them and the server's.

Itahara et al., "Distillation-Based Semi-Supervised Federated Learning for
Communication-Efficient Collaborative Training with Non-IID Private Data" (2020): in each
round clients train on their own examples and send their probabilities on the transfer
examples; the server sharpens the mean (entropy reduction aggregation, ERA), and clients
and the server's model learn it by cross-entropy.
"""

from typing import Any, Optional

from tff_kd.compat import tff

from tff_kd import arguments
from tff_kd import cohorts
from tff_kd import knowledge
from tff_kd import models
from tff_kd import optimizers
from tff_kd import private_process
from tff_kd import process
from tff_kd import server_distillation
from tff_kd import transfer

DEFAULT_DISTILLATION = server_distillation.Distillation(
    distillation_weight=1.0, num_steps=60, reset_optimizer=True
)


@arguments.checked
def build_ds_fl(
    *,
    student_fn: cohorts.StudentFn,
    input_spec: Any,
    loss_fn: models.LossFn,
    transfer_set: transfer.TransferSet,
    client_optimizer: optimizers.Optimizer,
    student_optimizer: Optional[optimizers.Optimizer] = None,
    distillation: server_distillation.Distillation = DEFAULT_DISTILLATION,
    consensus_rule: knowledge.ConsensusRule = knowledge.MeanProbabilities(
        temperature=0.1
    ),
    metrics_fn: Optional[models.MetricsFn] = None,
    seed: int = 0,
    **kwargs,
) -> process.PrivateProcess:
  """Builds DS-FL.

  Args:
    student_fn: Returns a new `keras.Model`, of which each client has its own, and
      the server one; a list of such functions, one a cohort, of which the first is the
      server's.
    input_spec: The clients' `dataset.element_spec`.
    loss_fn: Returns a `keras.losses.Loss`.
    transfer_set: The examples on which clients predict.
    client_optimizer: For the clients' own examples.
    student_optimizer: For the transfer examples, of the clients and of the server;
      Adam with rate 1e-3 if `None`.
    distillation: How both learn from the consensus. (KL's gradient is that of the
      paper's cross-entropy against the soft labels.)
    consensus_rule: ERA with the paper's temperature. `MeanProbabilities(power=2.0)` is
      Enhanced ERA; `MeanProbabilities()` is the paper's simple aggregation.
    metrics_fn: Returns a list of `keras.metrics.Metric`s.
    seed: With the round number, decides the order of the transfer examples.
    **kwargs: Further arguments of `private_process.build_private_process`.

  Returns:
    A `PrivateProcess` with a server model.
  """
  students = cohorts.build_students(
      student_fn, input_spec=input_spec, loss_fn=loss_fn, metrics_fn=metrics_fn
  )
  stage = server_distillation.DistillationStage(
      'student',
      student_optimizer or tff.learning.optimizers.build_adam(1e-3),
      distillation,
  )
  return private_process.build_private_process(
      students,
      client_optimizer=client_optimizer,
      exchange=private_process.TransferExchange(
          students.first, transfer_set, consensus_rule, stage, seed
      ),
      server_stage=stage,
      consensus_rule=consensus_rule,
      seed=seed,
      **kwargs,
  )
