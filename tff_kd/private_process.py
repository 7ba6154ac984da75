"""Clients that keep their model: only predictions travel, and a consensus comes back.

```
 state -> consensus -> digest -> local training -> predictions -> rule -> consensus
             |                                                              |
             |      each client's own model, in and out         server_distillation
```

A round of this process ends where the papers' ends in the middle: the consensus of a
round is digested at the beginning of the client's next one, so that a client computes
once a round.
"""

import collections
from typing import Any, NamedTuple, Optional

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_kd import aggregation
from tff_kd import client_data as client_data_lib
from tff_kd import client_work as client_work_lib
from tff_kd import knowledge
from tff_kd import models
from tff_kd import optimizers
from tff_kd import server_distillation as server_distillation_lib
from tff_kd import transfer


class ClientState(NamedTuple):
  """What a client keeps for itself.

  Attributes:
    weights: The `ModelWeights` of its own model.
  """

  weights: Any


class PrivateState(NamedTuple):
  """The server's state.

  Attributes:
    global_model_weights: The server's `ModelWeights`, or () without a server model.
    consensus: The `Consensus` of the last round, for clients to digest.
    round_num: int32, the number of finished rounds.
    client_work: The client optimizer's hyperparameters.
    aggregator: The state of the predictions' aggregator.
    server_distillation: The state of the server model's optimizer.
  """

  global_model_weights: Any
  consensus: Any
  round_num: Any
  client_work: Any
  aggregator: Any
  server_distillation: Any


class PrivateOutput(NamedTuple):
  """What a round leaves.

  Attributes:
    state: The next `PrivateState`.
    client_states: The clients' next `ClientState`s, in their order.
    metrics: As of a `LearningProcess`.
  """

  state: Any
  client_states: Any
  metrics: Any


class PrivateBroadcast(NamedTuple):
  """What goes down to a client.

  Attributes:
    consensus: The `Consensus` on the last round's transfer examples.
    round_num: int32 scalar.
  """

  consensus: Any
  round_num: Any


class PrivateProcess(tff.templates.IterativeProcess):
  """Rounds of clients with models of their own.

  `next` has the type (<S@SERVER, {D}@CLIENTS, {ClientState}@CLIENTS> ->
  PrivateOutput). `tff_kd.simulation.ClientStates` keeps the clients' states.

  Attributes:
    initialize_client: A `tff.Computation` ( -> ClientState).
    get_model_weights: A `tff.Computation` (S -> the server model's `ModelWeights`), or
      `None` without a server model.
    broadcast_type: The `tff.Type` that goes down to each client.
    update_type: The `tff.Type` that comes up.
    student_spec: The `ModelSpec` of the clients' and the server's model.
    transfer_set: The `TransferSet`.
  """

  def __init__(
      self,
      initialize_fn: tff.Computation,
      next_fn: tff.Computation,
      *,
      initialize_client_fn: tff.Computation,
      get_model_weights_fn: Optional[tff.Computation],
      broadcast_type: tff.Type,
      update_type: tff.Type,
      student_spec: models.ModelSpec,
      transfer_set: transfer.TransferSet,
  ):
    super().__init__(initialize_fn, next_fn)
    self.initialize_client = initialize_client_fn
    self.get_model_weights = get_model_weights_fn
    self.broadcast_type = broadcast_type
    self.update_type = update_type
    self.student_spec = student_spec
    self.transfer_set = transfer_set
    self.teacher_spec = None


def build_private_process(
    student: models.ModelSpec,
    *,
    client_optimizer: optimizers.Optimizer,
    transfer_set: transfer.TransferSet,
    digest: server_distillation_lib.DistillationStage,
    consensus_rule: knowledge.ConsensusRule = knowledge.MeanLogits(),
    server_stage: Optional[server_distillation_lib.DistillationStage] = None,
    pretraining: Optional[server_distillation_lib.DistillationStage] = None,
    client_data: Optional[client_data_lib.ClientBatches] = None,
    knowledge_weighting: tff.learning.ClientWeighting = (
        tff.learning.ClientWeighting.UNIFORM
    ),
    knowledge_aggregator: Optional[aggregation.AggregationFactory] = None,
    metrics_aggregator: Optional[Any] = None,
    seed: int = 0,
) -> PrivateProcess:
  """Composes a round of clients that keep their models.

  Args:
    student: The model of each client, and of the server if it has one.
    client_optimizer: For the clients' own examples.
    transfer_set: The examples on which knowledge is exchanged.
    digest: How a client's model learns from the consensus, before its own examples.
    consensus_rule: How the clients' predictions become the consensus.
    server_stage: How the server's model learns from it; there is none if `None`.
    pretraining: How a new client's model, and the server's, learn from the transfer
      set's labels before the first round; not at all if `None`.
    client_data: Where and how clients read their examples; `next` then takes numbers.
    knowledge_weighting: A client's weight in the consensus.
    knowledge_aggregator: Aggregates the predictions; their weighted mean if `None`.
    metrics_aggregator: As in `tff.learning.algorithms`.
    seed: With the round number, decides the order of the transfer examples.

  Returns:
    A `PrivateProcess`.

  Raises:
    TypeError, ValueError: If the parts do not fit together.
  """
  stages = [its for its in (digest, server_stage, pretraining) if its is not None]
  server_distillation_lib.check_stages(
      stages,
      has_teacher=False,
      labelled=transfer_set.labelled,
      has_validation=transfer_set.validation_size > 0,
      has_diversity=consensus_rule.has_diversity,
  )
  optimizers.check_optimizer(client_optimizer, 'client_optimizer')
  logits_shape = student.logits_shape
  hparams = optimizers.initial_hparams(client_optimizer)
  payload_type = tff.types.tensorflow_to_type(
      consensus_rule.payload_spec(logits_shape, transfer_set.num_predictions)
  )

  def nothing_yet() -> knowledge.Consensus:
    return consensus_rule.decode(
        consensus_rule.zero_payload(logits_shape, transfer_set.num_predictions)
    )._replace(diversity=())

  @tff.tensorflow.computation
  def initial_consensus():
    return nothing_yet()

  @tff.tensorflow.computation
  def initial_weights():
    model = student.blank_model_fn()
    pretrain = None
    if pretraining is not None:
      pretrain = server_distillation_lib.build_stage(
          pretraining, {'student': model}, transfer_set
      )

    @tf.function
    def run():
      model.assign(tf.nest.map_structure(tf.constant, student.initial_weights))
      if pretrain is not None:
        stepper_state, _ = pretrain(
            None, nothing_yet(), tf.constant(0), tf.constant([seed, 2])
        )
        del stepper_state
      return tf.nest.map_structure(tf.convert_to_tensor, model.weights())

    return run()

  @tff.tensorflow.computation
  def initialize_client():
    return ClientState(weights=initial_weights())

  broadcast_type = tff.to_type(
      PrivateBroadcast(
          consensus=initial_consensus.type_signature.result, round_num=np.int32
      )
  )
  if client_data is not None:
    data_type = tff.TensorType(np.int32)
  else:
    data_type = tff.SequenceType(
        tff.types.tensorflow_to_type(student.input_spec)
    )
  client_state_type = initialize_client.type_signature.result

  @tff.federated_computation
  def initial_hparams():
    return tff.federated_value(hparams, tff.SERVER)

  hparams_type = initial_hparams.type_signature.result.member

  @tff.tensorflow.computation(
      hparams_type, broadcast_type, data_type, client_state_type
  )
  def client_computation(client_hparams, broadcast, data, client_state):
    model = student.blank_model_fn()
    learn = server_distillation_lib.build_stage(
        digest, {'student': model}, transfer_set
    )
    train = client_work_lib.build_training(
        model, {}, client_optimizer, (), client_data
    )

    @tf.function
    def client_update():
      before = client_state.weights
      model.assign(before)
      consensus = knowledge.Consensus(
          broadcast.consensus.logits, broadcast.consensus.mask
      )
      # On the examples of the round that the consensus comes from.
      last_round = tf.maximum(broadcast.round_num - 1, 0)
      _, digested = learn(
          None, consensus, last_round, tf.constant([seed, 1])
      )
      num_examples, bad_labels = train(
          client_hparams, data, broadcast.round_num, ()
      )
      after = tf.nest.map_structure(tf.convert_to_tensor, model.weights())
      finite = tf.reduce_all([
          tf.reduce_all(tf.math.is_finite(w))
          for w in tf.nest.flatten(after) if w.dtype.is_floating
      ])
      is_empty = tf.equal(num_examples, 0)
      included = finite & ~is_empty & ~bad_labels
      if not included:
        model.reset_metrics()
      weight = client_work_lib.client_weight(
          knowledge_weighting, num_examples, included
      )
      multiplied = 1.0 if knowledge_aggregator is not None else weight
      payload = tf.cond(
          included,
          lambda: tf.nest.map_structure(
              lambda t: t * multiplied,
              consensus_rule.encode(
                  knowledge.predict_logits(
                      model,
                      transfer_set,
                      transfer_set.prediction_ids(broadcast.round_num),
                  )
              ),
          ),
          lambda: consensus_rule.zero_payload(
              logits_shape, transfer_set.num_predictions
          ),
      )
      kept = tf.nest.map_structure(
          lambda new, old: tf.where(included, new, old), after, before
      )
      metrics = model.report_local_unfinalized_metrics()
      output = client_work_lib.ClientOutput(
          update=client_work_lib.ClientUpdate(model=(), knowledge=payload),
          weight=client_work_lib.ClientUpdate(model=weight, knowledge=weight),
          metrics=metrics,
          participation=collections.OrderedDict(
              client_work_lib.participation(included, is_empty, bad_labels, finite),
              num_digested=tf.cast(digested['num_steps'] > 0, tf.int32),
          ),
      )
      return output, ClientState(weights=kept)

    return client_update()

  output_type, _ = client_computation.type_signature.result
  with tf.Graph().as_default():
    metric_finalizers = student.blank_model_fn().metric_finalizers()
  aggregator = aggregation.build_client_output_aggregator(
      output_type,
      metric_finalizers,
      knowledge_factory=knowledge_aggregator,
      metrics_aggregator=metrics_aggregator,
  )
  server_distillation = None
  if server_stage is not None:
    server_distillation = server_distillation_lib.build_server_distillation(
        student, None, transfer_set, [server_stage], consensus_rule=consensus_rule,
        seed=seed,
    )

  @tff.tensorflow.computation(payload_type)
  def decode(mean_payload):
    return consensus_rule.decode(
        knowledge.KnowledgePayload(mean_payload.values, mean_payload.weights)
    )._replace(diversity=())

  @tff.tensorflow.computation(np.int32)
  def add_one(x):
    return x + 1

  @tff.federated_computation
  def init_fn():
    nothing = tff.federated_value((), tff.SERVER)
    return tff.federated_zip(
        PrivateState(
            global_model_weights=(
                tff.federated_eval(initial_weights, tff.SERVER)
                if server_stage is not None else nothing
            ),
            consensus=tff.federated_eval(initial_consensus, tff.SERVER),
            round_num=tff.federated_value(np.int32(0), tff.SERVER),
            client_work=initial_hparams(),
            aggregator=aggregator.initialize(),
            server_distillation=(
                server_distillation.initialize()
                if server_stage is not None else nothing
            ),
        )
    )

  state_type = init_fn.type_signature.result

  @tff.federated_computation(
      state_type,
      tff.FederatedType(data_type, tff.CLIENTS),
      tff.FederatedType(client_state_type, tff.CLIENTS),
  )
  def next_fn(state, client_data, client_states):
    nothing = tff.federated_value((), tff.SERVER)
    broadcast = tff.federated_zip(
        PrivateBroadcast(consensus=state.consensus, round_num=state.round_num)
    )
    output, new_client_states = tff.federated_map(
        client_computation,
        (
            tff.federated_broadcast(state.client_work),
            tff.federated_broadcast(broadcast),
            client_data,
            client_states,
        ),
    )
    aggregated = aggregator.next(state.aggregator, output)
    weights, distillation_state = state.global_model_weights, nothing
    distillation_metrics = nothing
    if server_stage is not None:
      distilled = server_distillation.next(
          state.server_distillation,
          tff.federated_zip(
              server_distillation_lib.ServerModels(student=weights, teacher=nothing)
          ),
          aggregated.result.knowledge,
          state.round_num,
      )
      weights = distilled.result.student
      distillation_state = distilled.state
      distillation_metrics = distilled.measurements
    new_state = tff.federated_zip(
        PrivateState(
            global_model_weights=weights,
            consensus=tff.federated_map(decode, aggregated.result.knowledge),
            round_num=tff.federated_map(add_one, state.round_num),
            client_work=state.client_work,
            aggregator=aggregated.state,
            server_distillation=distillation_state,
        )
    )
    metrics = tff.federated_zip(
        collections.OrderedDict(
            client_work=aggregated.measurements.client_work,
            aggregator=aggregated.measurements.aggregator,
            server_distillation=distillation_metrics,
        )
    )
    return PrivateOutput(new_state, new_client_states, metrics)

  get_model_weights = None
  if server_stage is not None:

    @tff.tensorflow.computation(state_type.member)
    def get_model_weights(state):
      return state.global_model_weights

  return PrivateProcess(
      init_fn,
      next_fn,
      initialize_client_fn=initialize_client,
      get_model_weights_fn=get_model_weights,
      broadcast_type=broadcast_type,
      update_type=output_type.update,
      student_spec=student,
      transfer_set=transfer_set,
  )
