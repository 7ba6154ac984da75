"""Local training, with optional local distillation, and what it sends up.

One `tff.learning.templates.ClientWorkProcess` serves every algorithm: it trains
the student on the client's data and returns two payloads, the weight delta and,
where the server distils from an ensemble, the predictions on this round's
transfer examples.
"""

import collections
import dataclasses
from typing import Any, NamedTuple, Optional

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_kd import knowledge
from tff_kd import losses
from tff_kd import models
from tff_kd import optimizers
from tff_kd import transfer


class Broadcast(NamedTuple):
  """What the server sends down to each client.

  Attributes:
    student: The `ModelWeights` of the global student.
    teacher: The teacher's `ModelWeights` where clients learn from it, else ().
    round_num: int32 scalar; with the seed, tells the round's transfer examples.
      () where no transfer set is used.
  """

  student: Any
  teacher: Any
  round_num: Any


class ClientUpdate(NamedTuple):
  """What a client sends up, or the weights of the two channels.

  Attributes:
    model: A `ModelWeights` of deltas (received minus trained): `trainable`, and
      in `non_trainable` only the statistics that layers keep (batch norm). As a
      weight: a float32 scalar.
    knowledge: A `knowledge.KnowledgePayload`, or () without that channel. As a
      weight: a float32 scalar or ().
  """

  model: Any
  knowledge: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalDistillation:
  """A client's distillation term: (1 - weight) L(y, z) + weight KL_T(target || z).

  Source: Yao et al., "Local-Global Knowledge Distillation in Heterogeneous
  Federated Learning" (FedGKD / FedAvg+KD, 2021), equation 4.

  Attributes:
    target: 'student' (the global student as received) or 'teacher' (its weights
      are then sent down too, and cost bytes).
    weight: Between 0 and 1, the share of the distillation term.
    temperature: Above 0.
  """

  target: str = 'student'
  weight: float = 0.2
  temperature: float = 1.0

  def __post_init__(self):
    losses.check_temperature(self.temperature)
    if self.target not in ('student', 'teacher'):
      raise ValueError(
          "`target` of a local distillation must be 'student' or 'teacher', "
          f'found {self.target!r}.'
      )
    if not 0.0 < self.weight <= 1.0:
      raise ValueError(
          '`weight` of a local distillation must be above 0 and at most 1, found '
          f'{self.weight!r}. Leave the local distillation out to switch it off.'
      )


def model_update_type(student: models.ModelSpec) -> tff.Type:
  """The type of the model channel: trainable deltas and statistics' deltas."""
  with tf.Graph().as_default():
    model = student.model_fn()
    return tff.types.tensorflow_to_type(
        tff.learning.models.ModelWeights(
            trainable=[
                tf.TensorSpec(v.shape, v.dtype)
                for v in model.trainable_variables
            ],
            non_trainable=[
                tf.TensorSpec(v.shape, v.dtype) for v in model.statistics
            ],
        )
    )


def build_client_work(
    student: models.ModelSpec,
    *,
    optimizer: optimizers.Optimizer,
    model_weighting: tff.learning.ClientWeighting,
    knowledge_weighting: tff.learning.ClientWeighting,
    transfer_set: Optional[transfer.TransferSet] = None,
    teacher: Optional[models.ModelSpec] = None,
    local_distillation: Optional[LocalDistillation] = None,
    metrics_aggregator: Optional[Any] = None,
) -> tff.learning.templates.ClientWorkProcess:
  """Builds the client's part of a round.

  `next` has the type (<S@SERVER, {Broadcast}@CLIENTS, {D*}@CLIENTS> ->
  <S@SERVER, {ClientResult(ClientUpdate, ClientUpdate)}@CLIENTS, metrics@SERVER>);
  the update weights are one scalar a channel. A client is left out of both
  channels and of the metrics, and counted, if it has no examples, if its
  training ends in numbers that are not finite, or if it has class labels out of
  range.

  Args:
    student: The model to train.
    optimizer: A TFF optimizer or a function that returns a Keras one; fresh for
      every client and round.
    model_weighting: The weight of a client's delta: by examples, or 1.
    knowledge_weighting: The weight of a client's predictions, likewise.
    transfer_set: On what to send predictions; none are sent if `None`.
    teacher: The teacher, if the local distillation's target is it.
    local_distillation: An optional distillation term in the local loss.
    metrics_aggregator: As in `tff.learning.algorithms`; sums, then finalizes, if
      `None`.

  Returns:
    A `tff.learning.templates.ClientWorkProcess`.
  """
  if metrics_aggregator is None:
    metrics_aggregator = tff.learning.metrics.sum_then_finalize
  with tf.Graph().as_default():
    aggregate_metrics = metrics_aggregator(
        student.model_fn().metric_finalizers()
    )
  targets_teacher = (
      local_distillation is not None and local_distillation.target == 'teacher'
  )
  hparams = optimizers.initial_hparams(optimizer)
  broadcast_type = tff.to_type(
      Broadcast(
          student=student.weights_type,
          teacher=teacher.weights_type if targets_teacher else (),
          round_num=np.int32 if transfer_set is not None else (),
      )
  )
  data_type = tff.SequenceType(tff.types.tensorflow_to_type(student.input_spec))

  @tff.federated_computation
  def init_fn():
    return tff.federated_value(hparams, tff.SERVER)

  hparams_type = init_fn.type_signature.result.member

  @tff.tensorflow.computation(hparams_type, broadcast_type, data_type)
  def client_computation(client_hparams, broadcast, dataset):
    model = student.model_fn()
    target = None
    if local_distillation is not None:
      target = (teacher if targets_teacher else student).model_fn()
    train = _build_training(model, target, optimizer, local_distillation)

    @tf.function
    def client_update():
      # A read-only view of what came in, before any variable changes.
      received = broadcast.student
      model.assign(received)
      if target is not None:
        target.assign(broadcast.teacher if targets_teacher else received)
      num_examples, bad_labels = train(client_hparams, dataset)

      delta = tf.nest.map_structure(
          tf.subtract, _exchanged(model, received), _exchanged(model)
      )
      finite = tf.reduce_all(
          [tf.reduce_all(tf.math.is_finite(d)) for d in tf.nest.flatten(delta)]
      )
      is_empty = tf.equal(num_examples, 0)
      included = finite & ~is_empty & ~bad_labels
      delta = tf.nest.map_structure(
          lambda d: tf.where(included, d, tf.zeros_like(d)), delta
      )
      if not included:
        model.reset_metrics()

      payload, knowledge_weight = (), ()
      if transfer_set is not None:
        payload = tf.cond(
            included,
            lambda: knowledge.encode(
                knowledge.predict_logits(
                    model,
                    transfer_set,
                    transfer_set.prediction_ids(broadcast.round_num),
                )
            ),
            lambda: knowledge.zero_payload(
                student.logits_shape, transfer_set.num_predictions
            ),
        )
        knowledge_weight = _client_weight(
            knowledge_weighting, num_examples, included
        )
      result = tff.learning.templates.ClientResult(
          update=ClientUpdate(model=delta, knowledge=payload),
          update_weight=ClientUpdate(
              model=_client_weight(model_weighting, num_examples, included),
              knowledge=knowledge_weight,
          ),
      )
      counts = collections.OrderedDict(
          num_clients=tf.constant(1),
          num_included=tf.cast(included, tf.int32),
          num_excluded_empty=tf.cast(is_empty, tf.int32),
          num_excluded_bad_labels=tf.cast(bad_labels, tf.int32),
          num_excluded_non_finite=tf.cast(~finite & ~bad_labels, tf.int32),
      )
      return result, model.report_local_unfinalized_metrics(), counts

    return client_update()

  @tff.federated_computation(
      init_fn.type_signature.result,
      tff.FederatedType(broadcast_type, tff.CLIENTS),
      tff.FederatedType(data_type, tff.CLIENTS),
  )
  def next_fn(state, broadcast, client_data):
    result, unfinalized_metrics, counts = tff.federated_map(
        client_computation,
        (tff.federated_broadcast(state), broadcast, client_data),
    )
    measurements = tff.federated_zip(
        collections.OrderedDict(
            train=aggregate_metrics(unfinalized_metrics),
            participation=tff.federated_sum(counts),
        )
    )
    return tff.templates.MeasuredProcessOutput(state, result, measurements)

  @tff.tensorflow.computation(hparams_type)
  def get_hparams_fn(state):
    return state

  @tff.tensorflow.computation(hparams_type, hparams_type)
  def set_hparams_fn(state, hparams):
    del state
    return hparams

  return tff.learning.templates.ClientWorkProcess(
      init_fn,
      next_fn,
      get_hparams_fn=get_hparams_fn,
      set_hparams_fn=set_hparams_fn,
  )


def _exchanged(
    model: models.KerasModel,
    weights: Optional[tff.learning.models.ModelWeights] = None,
) -> tff.learning.models.ModelWeights:
  """The part of the weights that a client sends: trained ones and statistics.

  Args:
    model: Tells which those are.
    weights: Values to pick from; the model's own variables if `None`.
  """
  if weights is None:
    weights = model.weights()
  sent = {v.ref() for v in model.statistics}
  return tff.learning.models.ModelWeights(
      trainable=[tf.convert_to_tensor(w) for w in weights.trainable],
      non_trainable=[
          tf.convert_to_tensor(w)
          for v, w in zip(
              model.non_trainable_variables, weights.non_trainable, strict=True
          )
          if v.ref() in sent
      ],
  )


def _client_weight(
    weighting: tff.learning.ClientWeighting,
    num_examples: tf.Tensor,
    included: tf.Tensor,
) -> tf.Tensor:
  if weighting is tff.learning.ClientWeighting.NUM_EXAMPLES:
    weight = tf.cast(num_examples, tf.float32)
  else:
    weight = tf.constant(1.0)
  return tf.where(included, weight, 0.0)


def _build_training(
    model: models.KerasModel,
    target: Optional[models.KerasModel],
    optimizer: optimizers.Optimizer,
    distillation: Optional[LocalDistillation],
):
  """Returns (hparams, dataset) -> (num_examples int64, bad_labels bool)."""
  trainable = model.trainable_variables
  stepper = optimizers.build_stepper(optimizer, trainable)

  def gradients_on(batch):
    inputs, labels = models.split_batch(batch)
    with tf.GradientTape() as tape:
      outputs = model.keras_model(inputs, training=True)
      labels, bad = model.usable_labels(labels, outputs.shape)
      loss = model.supervised_loss(labels, outputs)
      if target is not None:
        loss *= 1.0 - distillation.weight
        loss += distillation.weight * tf.reduce_mean(
            losses.kl_divergence(
                target.logits(inputs),
                model.class_logits(outputs),
                distillation.temperature,
            )
        )
      loss += model.regularization_loss()
    model.update_metrics(labels, outputs, loss)
    return tape.gradient(loss, trainable), tf.shape(outputs)[0], bad

  def train(hparams: Any, dataset: tf.data.Dataset):
    carry = stepper.begin(stepper.initialize(hparams))
    num_examples = tf.constant(0, tf.int64)
    bad_labels = tf.constant(False)
    for batch in iter(dataset):
      gradients, batch_size, bad = gradients_on(batch)
      # A batch without examples has a mean loss of 0 / 0: it takes no step.
      if batch_size > 0:
        carry = stepper.apply(carry, gradients)
      num_examples += tf.cast(batch_size, tf.int64)
      bad_labels = tf.logical_or(bad_labels, bad)
    return num_examples, bad_labels

  return train
