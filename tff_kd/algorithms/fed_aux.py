"""FedAUX: each client's predictions count as much as the example looks like its own.

Sattler et al., "FedAUX: Leveraging Unlabeled Auxiliary Data in Federated Learning"
(2021). As FedDF, but the student learns from

  sum_k s_k(x) p_k(x) / sum_k s_k(x),

where p_k are a client's probabilities and s_k its certainty: what a logistic regression,
fitted once to the client's own examples against public negatives, says of x
(`tff_kd.client.companions.certainty`), with noise for (epsilon, delta)-differential
privacy. The paper's other part, self-supervised pre-training on the auxiliary data, is
left to the user: pass the extractor as `feature_fn`, and start the student from it in
`student_fn`.
"""

from __future__ import annotations

from typing import Any, Optional

import tff_kd
from tff_kd.algorithms import info
from tff_kd import rounds

DEFAULT_DISTILLATION = tff_kd.server.settings.FED_DF_DISTILLATION


@rounds.takes_options
def build_fed_aux(
    *,
    student_fn: tff_kd.models.cohorts.StudentFn,
    training: rounds.ClientTraining,
    transfer_set: tff_kd.TransferSet,
    negatives: Any,
    student_optimizer: Optional[tff_kd.optimizers.Optimizer] = None,
    distillation: tff_kd.Distillation = DEFAULT_DISTILLATION,
    consensus_rule: Optional[tff_kd.knowledge.ConsensusRule] = None,
    feature_fn: Optional[tff_kd.client.companions.certainty.FeatureFn] = None,
    epsilon: Optional[float] = 0.5,
    delta: float = 1e-5,
    regularization: float = 0.01,
    options: rounds.Options,
) -> rounds.StatefulClientsProcess:
  """Builds FedAUX.

  (epsilon, delta) is the price of a client's certainty scores, of all rounds together,
  for replacing one of its examples. Its weights and predictions go up as in FedDF and
  are NOT covered; `model_aggregator` and `knowledge_aggregator` may be private ones.

  The noise in w_k has a standard deviation a coordinate of about
  (7 at epsilon 0.5) * 2 / (regularization n), where n counts the client's examples and
  the negatives; the scores say little where that is much above 1. More negatives, a
  larger `regularization` or a larger `epsilon` lower it.

  Args:
    student_fn: Returns a new `keras.Model`; a list of such functions, one a cohort.
    training: Each field of `tff_kd.rounds.ClientTraining` as an argument of its own.
    transfer_set: The examples on which the ensemble is distilled.
    negatives: Further public inputs, arrays or a `TransferSet`, for what is not a
      client's own; not those of the transfer set.
    student_optimizer: The server's, for the distillation; Adam with rate 1e-3 if
      `None`.
    distillation: How the student learns from the ensemble; FedDF's if not given.
    consensus_rule: A rule over given certainties; their mean probabilities if `None`.
    feature_fn: Inputs to features, float `[n, d]`, in plain TensorFlow; rows of a norm
      above 1 are scaled down to 1. The flattened inputs if not given.
    epsilon: The privacy of the scores; no noise and no privacy if `None`. Needs
      `client_data`.
    delta: The delta of the scores' privacy.
    regularization: lambda of the logistic regression.
    options: Each field of `tff_kd.rounds.Options` as an argument of its own.
      Predictions weigh the same whatever a client's examples, unless
      `knowledge_weighting` says otherwise. `seed` also decides, with a client's number,
      its noise: in a simulation only; a deployment draws it in secret, at the client.

  Returns:
    A `StatefulClientsProcess` whose clients keep their scorers.
  """
  students = training.build_students(student_fn)
  scorer = tff_kd.client.companions.certainty.CertaintyScorer(
      input_spec=training.input_spec,
      negatives=negatives,
      feature_fn=feature_fn or tff_kd.client.companions.certainty.flat_inputs,
      epsilon=epsilon,
      delta=delta,
      regularization=regularization,
      seed=options.seed,
  )
  stage = tff_kd.server.distill.DistillationStage(
      'student', student_optimizer, distillation
  )
  return rounds.compose_process(
      rounds.Parts(
          students=students,
          client_optimizer=training.client_optimizer,
          companion=scorer,
          exchange=tff_kd.client.exchanges.for_stages(
              [stage], students.first, transfer_set, consensus_rule,
              tff_kd.knowledge.CertaintyWeighted('given', average='probabilities'),
          ),
          transfer_set=transfer_set,
          stages=[stage],
      ),
      options.with_defaults(knowledge_weighting=tff_kd.tff.learning.ClientWeighting.UNIFORM),
  )


INFO = info.Info(
    build=build_fed_aux,
    summary=(
        "fed_df, each client's predictions weighted by how much the example looks like "
        'its own, under differential privacy'
    ),
    uploads=('weights', 'predictions'),
    client_state=True,
    flags={'delta': 'certainty_delta'},
    consensus='given',
)
