"""FedGen's generator: knowledge that comes down as made-up features, without any data.

A generator G(noise, label) in the space of one layer's outputs learns on the server to
please the clients' heads (what their students do after that layer), and clients learn
from its features while they train. No head leaves its client: in each of the generator's
steps the server sends generated features down, and what comes up, added over the clients,
is the gradient of their losses by these features. That is the gradient of the paper's
objective, exactly; its price is one exchange a step, of as many floats both ways as the
generated batch has.

Source: Zhu, Hong & Zhou, "Data-Free Knowledge Distillation for Heterogeneous Federated
Learning" (FedGen, ICML 2021), section 4 and Algorithm 1.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any, NamedTuple, Optional

import keras
import numpy as np
import tensorflow as tf
from tff_kd.compat import tff

from tff_kd import checks
from tff_kd.client import class_counts
from tff_kd.client import companions
from tff_kd.client import local_terms
from tff_kd import graphs
from tff_kd import losses
from tff_kd import models
from tff_kd.models import split
from tff_kd import optimizers

_CLIENT_STREAM, _SERVER_STREAM = 21, 22

GeneratorFn = Callable[[], keras.Model]


class GeneratorState(NamedTuple):
  """The server's state.

  Attributes:
    weights: The generator's `ModelWeights`.
    optimizer: The state of the generator's optimizer.
    seen: float32 `[classes]`, 1 for each class that some client has had.
  """

  weights: Any
  optimizer: Any
  seen: tf.Tensor


class _Broadcast(NamedTuple):
  weights: Any
  seen: tf.Tensor


class _Kept(NamedTuple):
  """The values that a client holds for the exchange.

  Attributes:
    head: The values of the variables of its trained head.
    counts: float32 `[classes]`, how often it has seen each class in this round.
  """

  head: Any
  counts: tf.Tensor


class _Generated(NamedTuple):
  """A generated batch.

  Attributes:
    features: float32 `[batch, features]`.
    labels: int32 `[batch]`.
  """

  features: tf.Tensor
  labels: tf.Tensor


class _Answer(NamedTuple):
  """The clients' answer about a generated batch, a sum over clients.

  Attributes:
    gradients: float32 `[batch, features]`, of `losses` by the features.
    losses: float32 `[batch]`, each client's cross-entropy times its count of the label.
  """

  gradients: tf.Tensor
  losses: tf.Tensor


def diversity_loss(noise: tf.Tensor, features: tf.Tensor) -> tf.Tensor:
  """Computes exp(-mean over pairs of the noise's distance times the features').

  Distances are the mean square and the mean absolute difference of the entries, as in
  the authors' implementation.

  Args:
    noise: float32 `[batch, noise_dim]`.
    features: float32 `[batch, features]`.

  Returns:
    A float32 scalar.
  """
  noise_distance = tf.reduce_mean(
      tf.math.squared_difference(noise[:, tf.newaxis], noise[tf.newaxis]), axis=-1
  )
  distance = tf.reduce_mean(
      tf.abs(features[:, tf.newaxis] - features[tf.newaxis]), axis=-1
  )
  return tf.exp(-tf.reduce_mean(noise_distance * distance))


class FeatureGenerator(companions.Companion):
  """Trains a generator of features, from which clients learn."""

  needs_one_architecture = True

  def __init__(
      self,
      student: models.ModelSpec,
      *,
      optimizer: optimizers.Optimizer,
      split_layer: Optional[str] = None,
      generator_fn: Optional[GeneratorFn] = None,
      noise_dim: int = 32,
      hidden_units: int = 256,
      num_steps: int = 50,
      batch_size: int = 32,
      weight: float = 1.0,
      decay: float = 0.98,
      seed: int = 0,
  ):
    """Initializes the generator.

    Args:
      student: The clients' model.
      optimizer: The generator's; its state lives in the process state.
      split_layer: As `models.split.split_layers` has it.
      generator_fn: Returns a new Keras model from `[batch, noise_dim + classes]`
        (noise, then the label as one-hot) to `[batch, features]`, the features
        flattened; one hidden layer with relu if `None`. (The authors' has batch norm
        after it.)
      noise_dim: The size of the normally distributed noise of a generated example.
      hidden_units: The width of the generator's hidden layer.
      num_steps: The generator's steps a round, each an exchange with all clients.
      batch_size: Generated examples a step.
      weight: alpha = beta of the clients' terms in the second round; they begin there.
      decay: Their factor from round to round.
      seed: With the round number, decides what is generated.

    Raises:
      ValueError: If a number is out of range, labels are not class indices, or the
        student cannot be split.
    """
    self.optimizer = optimizers.check_optimizer(optimizer, 'generator_optimizer')
    for name, value in (
        ('noise_dim', noise_dim), ('hidden_units', hidden_units),
        ('generator_steps', num_steps), ('generator_batch_size', batch_size),
    ):
      checks.check_positive_integer(value, name)
    if not 0.0 < weight < math.inf or not 0.0 < decay <= 1.0:
      raise ValueError(
          '`generative_weight` must be above 0 and finite, and `generative_decay` above '
          f'0 and at most 1, found {weight!r} and {decay!r}.'
      )
    class_counts.check_indices(student, 'The generator')
    if len(student.logits_shape) != 1:
      raise ValueError(
          'The generator needs one prediction an example, found logits of shape '
          f'{student.logits_shape}.'
      )
    self._classes = student.logits_shape[-1]
    self._split = split.SplitModel(student, split_layer)
    self._generator_fn = generator_fn or self._default_generator
    self._noise_dim, self._hidden_units = noise_dim, hidden_units
    self._num_steps, self._batch_size = num_steps, batch_size
    self._weight, self._decay = weight, decay
    self._seed = seed
    self._generator = self._build_generator()
    self._stepper = optimizers.build_stepper(
        optimizer, self._generator.trainable_variables
    )

  def _default_generator(self) -> keras.Model:
    return keras.Sequential([
        keras.layers.InputLayer((self._noise_dim + self._classes,)),
        keras.layers.Dense(self._hidden_units, activation='relu'),
        keras.layers.Dense(self._split.num_features),
    ])

  def _build_generator(self) -> models.ModelSpec:
    generator = models.build_model_spec(
        self._generator_fn,
        input_spec=(
            tf.TensorSpec([None, self._noise_dim + self._classes]),
            tf.TensorSpec([None, self._split.num_features]),
        ),
        loss_fn=keras.losses.MeanSquaredError,  # Not used: the clients are the loss.
        name='generator',
    )
    if generator.logits_shape.as_list() != [self._split.num_features]:
      raise ValueError(
          '`generator_fn` must return a model with outputs of shape [batch, '
          f'{self._split.num_features}] (the features of one example), found '
          f'{generator.logits_shape} an example.'
      )
    return generator

  def _generate(self, weights: Any, noise: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    one_hot = tf.one_hot(labels, self._classes)
    inputs = tf.concat([noise, one_hot], axis=-1)
    return self._generator.call(self._generator.values(weights), inputs).outputs

  def _head_logits(self, student: models.BoundModel, features: tf.Tensor) -> tf.Tensor:
    """Returns a student's logits of generated features."""
    with student.scope():
      return self._split.head_logits(features)

  def initial_server_state(self):
    return GeneratorState(
        weights=tf.nest.map_structure(tf.constant, self._generator.initial_weights),
        optimizer=self._stepper.initialize(),
        seen=tf.zeros([self._classes]),
    )

  def broadcast(self, server_state):
    return _Broadcast(server_state.weights, server_state.seen)

  def attach(self, student):
    del student  # The one that this generator was built for.

    def begin(beginning):
      received, round_num = beginning.received, beginning.round_num
      seed = tf.random.experimental.stateless_fold_in(
          tf.constant([self._seed, _CLIENT_STREAM]), round_num
      )
      term = _GeneratorTerm(
          lambda student, noise, labels: self._head_logits(
              student, self._generate(received.weights, noise, labels)
          ),
          noise_dim=self._noise_dim,
          weight=self._weight * self._decay ** tf.cast(round_num - 1, tf.float32),
          is_on=round_num > 0,
          seen=received.seen,
          seed=seed,
      )
      return [term], companions.CompanionValues()

    def end(observed, student, companion):
      del companion
      with student.scope():
        head = [tf.convert_to_tensor(v.value) for v in self._split.head_variables]
      return (), _Kept(head, observed)

    def count(step):
      return tf.reduce_sum(step.one_hot_labels(), axis=0)

    return companions.Attachment(
        begin,
        end,
        observer=companions.Observer(lambda: tf.zeros([self._classes]), count),
    )

  def exchange(self, server_state, exchanged, round_num):
    counts_type = tff.TensorType(np.float32, [self._classes])
    state_type = server_state.type_signature.member

    @graphs.computation(state_type, counts_type, np.int32)
    def start(state, counts, round_num):
      return self._generated(state.weights, 0, round_num, counts)

    generated_type = start.type_signature.result
    answer = graphs.computation(exchanged.type_signature.member, generated_type)(
        self._answer
    )
    advance = graphs.computation(
        state_type, counts_type, np.int32, np.int32, answer.type_signature.result
    )(self._advance)
    counts = tff.federated_sum(exchanged.counts)
    generated = tff.federated_map(start, (server_state, counts, round_num))
    state, loss, diversity = server_state, None, None
    for step in range(self._num_steps):
      answers = tff.federated_sum(
          tff.federated_map(answer, (exchanged, tff.federated_broadcast(generated)))
      )
      place = tff.federated_value(np.int32(step), tff.SERVER)
      state, generated, loss, diversity = tff.federated_map(
          advance, (state, counts, round_num, place, answers)
      )
    return state, tff.federated_zip(
        dict(generator_loss=loss, diversity_loss=diversity)
    )

  def _draw(self, step, round_num, counts) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the noise and labels of a step: labels that some client has, alike."""
    seed = tf.constant([self._seed, _SERVER_STREAM])
    for number in (round_num, step):
      seed = tf.random.experimental.stateless_fold_in(seed, number)
    noise = tf.random.stateless_normal([self._batch_size, self._noise_dim], seed)
    labels = tf.random.stateless_categorical(
        tf.math.log(tf.cast(counts > 0.0, tf.float32))[tf.newaxis],
        self._batch_size,
        seed,
        dtype=tf.int32,
    )[0]
    # Out of range where there is no label at all; then nothing is learned either.
    return noise, tf.minimum(labels, self._classes - 1)

  def _generated(self, weights, step, round_num, counts) -> '_Generated':
    """Returns the features of a step, with their labels."""
    noise, labels = self._draw(step, round_num, counts)
    return _Generated(self._generate(weights, noise, labels), labels)

  def _answer(self, kept, generated) -> '_Answer':
    """Returns what a client's head says of generated features."""
    scope = keras.StatelessScope(list(zip(self._split.head_variables, kept.head)))
    with tf.GradientTape() as tape, scope:
      tape.watch(generated.features)
      each = tf.nn.sparse_softmax_cross_entropy_with_logits(
          generated.labels, self._split.head_logits(generated.features)
      ) * tf.gather(kept.counts, generated.labels)
    return _Answer(tape.gradient(each, generated.features), each)

  def _advance(self, state, counts, round_num, step, answers):
    """Takes a step of the generator; returns its state, the next features, its losses."""
    noise, labels = self._draw(step, round_num, counts)
    # Each client's share of its label, and the mean over the batch.
    share = tf.math.divide_no_nan(1.0 / self._batch_size, tf.gather(counts, labels))
    trained = list(state.weights.trainable)
    with tf.GradientTape() as tape:
      tape.watch(trained)
      features = self._generate(
          tff.learning.models.ModelWeights(trained, state.weights.non_trainable),
          noise, labels,
      )
      diversity = diversity_loss(noise, features)
      # The gradient by the features is that of the clients' losses.
      surrogate = tf.reduce_sum(features * answers.gradients * share[:, tf.newaxis])
      loss = surrogate + diversity
    gradients = tape.gradient(loss, trained)
    new_optimizer, trained = tf.cond(
        tf.reduce_sum(counts) > 0.0,
        lambda: self._stepper.apply(state.optimizer, trained, gradients),
        lambda: (state.optimizer, trained),
    )
    weights = tff.learning.models.ModelWeights(trained, state.weights.non_trainable)
    seen = tf.maximum(state.seen, tf.cast(counts > 0.0, tf.float32))
    return (
        GeneratorState(weights, new_optimizer, seen),
        self._generated(weights, step + 1, round_num, counts),
        tf.reduce_sum(answers.losses * share),
        diversity,
    )

  def exchange_bytes(self):
    features = 4 * self._batch_size * self._split.num_features
    down = self._num_steps * (features + 4 * self._batch_size)
    up = self._num_steps * (features + 4 * self._batch_size) + 4 * self._classes
    return down, up


@dataclasses.dataclass(frozen=True, eq=False)
class _GeneratorTerm(local_terms.LocalTerm):
  """L + a CE(h(G(noise', y')), y') + a KL(h(G(noise, y)) || z), y' of classes seen."""

  logits_fn: Callable[[models.BoundModel, tf.Tensor, tf.Tensor], tf.Tensor]
  noise_dim: int
  weight: tf.Tensor
  is_on: tf.Tensor
  seen: tf.Tensor
  seed: tf.Tensor

  def __call__(self, loss, step):
    labels = tf.reshape(tf.cast(step.labels, tf.int32), [-1])
    size = tf.shape(step.logits)[0]
    seed = self.seed
    # The labels make it differ from client to client.
    for number in (step.step_num, tf.reduce_sum(labels * tf.range(1, size + 1))):
      seed = tf.random.experimental.stateless_fold_in(seed, number)
    seeds = tf.random.experimental.stateless_split(seed, 3)

    def noise(seed: tf.Tensor) -> tf.Tensor:
      return tf.random.stateless_normal([size, self.noise_dim], seed)

    def terms() -> tf.Tensor:
      others = tf.random.stateless_categorical(
          tf.math.log(self.seen)[tf.newaxis], size, seeds[0], dtype=tf.int32
      )[0]
      taught = tf.nn.sparse_softmax_cross_entropy_with_logits(
          others, self.logits_fn(step.model, noise(seeds[1]), others)
      )
      near = losses.kl_divergence(
          self.logits_fn(step.model, noise(seeds[2]), labels), step.logits
      )
      return loss + self.weight * (tf.reduce_mean(taught) + step.mean(near))

    return tf.cond(self.is_on & (tf.reduce_sum(self.seen) > 0.0), terms, lambda: loss)
