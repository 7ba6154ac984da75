"""Keras builders in, functions of weights inside, Keras models back out.

`build_model_spec` calls a Keras builder once, eagerly, and checks the model against its
data and its loss. From then on the model is a function: `ModelSpec.call` takes values and
inputs and returns outputs and values, within a `keras.StatelessScope`. Inside of TFF's
computations there are no variables.

What a model holds is told apart by what a step of training does to it:

- trainable weights take gradient steps;
- *statistics* (batch norm's moving averages) are numbers that a training call changes;
  they are averaged over clients like weights;
- *local* values (seeds of dropout, counters, states of recurrent layers) are reset in
  every local training; seeds are drawn from (seed, round, client);
- all else (frozen layers, adapted preprocessing) is constant: it never moves and never
  travels.
"""

from collections.abc import Callable, Mapping, Sequence
import collections
import contextlib
import dataclasses
import functools
import inspect
from typing import Any, NamedTuple, Optional

import keras
import numpy as np
import tensorflow as tf

from tff_kd import graphs
from tff_kd import internals
from tff_kd import losses
from tff_kd.compat import tff
from tff_kd.models import embeddings
from tff_kd.models import metrics as metrics_lib

KerasModelFn = Callable[[], keras.Model]
LossFn = Callable[[], keras.losses.Loss]

_PROBE_BATCH = 16
_UNKNOWN_DIMENSION = 16
# The key of the weights in a batch that is a mapping, as an argument of Keras's `fit`.
_SAMPLE_WEIGHT = 'sample_weight'
# Keras's name of the state of a `keras.random.SeedGenerator`.
_SEED_STATE = 'seed_generator_state'


def split_batch(batch: Any) -> tuple[Any, Any]:
  """Returns the (inputs, labels) of a batch or of an `input_spec`.

  Args:
    batch: A pair, a triple or a mapping.
  """
  if isinstance(batch, Mapping):
    return batch['x'], batch['y']
  return batch[0], batch[1]


def sample_weight_of(batch: Any) -> Any:
  """Returns the sample weights of a batch or of an `input_spec`.

  Args:
    batch: A pair, a triple or a mapping.

  Returns:
    The weights, or `None` without any.
  """
  if isinstance(batch, Mapping):
    return batch.get(_SAMPLE_WEIGHT)
  return batch[2] if len(batch) == 3 else None


def num_examples(outputs: tf.Tensor, sample_weight: Optional[tf.Tensor]) -> tf.Tensor:
  """Counts the examples of a batch; those of weight 0 do not count.

  Args:
    outputs: The model's outputs for it.
    sample_weight: As `ModelSpec.sample_weight` returns it for it.

  Returns:
    An int32 scalar.
  """
  if sample_weight is None:
    return tf.shape(outputs)[0]
  has_weight = tf.reduce_any(
      sample_weight > 0.0, axis=list(range(1, sample_weight.shape.rank))
  )
  return tf.reduce_sum(tf.cast(has_weight, tf.int32))


def as_batch(batch: Any) -> Any:
  """Returns a batch, or its spec, in the one structure that its parts have here.

  Args:
    batch: (x, y), (x, y, sample_weight), or a mapping with these keys.

  Returns:
    A tuple, or an `OrderedDict` with the keys in order, as TFF wants them; `None` if it
    is neither.
  """
  if isinstance(batch, Mapping):
    if set(batch) - {_SAMPLE_WEIGHT} != {'x', 'y'}:
      return None
    return collections.OrderedDict((key, batch[key]) for key in sorted(batch))
  if isinstance(batch, (tuple, list)):
    batch = tuple(batch)  # `len` of `tff_kd.data.Examples` is the number of examples.
    return batch if len(batch) in (2, 3) else None
  return None


class ModelValues(NamedTuple):
  """All values of a model that can change, as tensors.

  Attributes:
    trainable: A list, in the order of `keras.Model.trainable_variables`.
    statistics: A list of what training calls change and clients average.
    local: A list of seeds, counters and states, for this training alone.
  """

  trainable: list[Any]
  statistics: list[Any]
  local: list[Any]

  @property
  def weights(self) -> tff.learning.models.ModelWeights:
    """The part that belongs to the model beyond this training."""
    return tff.learning.models.ModelWeights(list(self.trainable), list(self.statistics))


class Outputs(NamedTuple):
  """The results of a call of a model.

  Attributes:
    outputs: The output tensor `[batch, ...]`.
    values: The `ModelValues` after the call.
    regularization_loss: A scalar, the sum of the layers' own losses; in training it is
      not a number if `bad_inputs`.
    bad_inputs: A bool scalar: whether an embedding was asked for an id that it does not
      have, whose outputs are then not numbers (in training, its loss); `None` if
      nothing can be asked for.
  """

  outputs: tf.Tensor
  values: ModelValues
  regularization_loss: tf.Tensor
  bad_inputs: Optional[tf.Tensor] = None


class _Layout(NamedTuple):
  """The places of a model's values among its `_non_trainable_variables`."""

  statistics: tuple[int, ...]
  local: Mapping[int, np.ndarray]
  seeds: frozenset[int]
  constants: Mapping[int, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ModelSpec:
  """A checked Keras model as a function of its weights.

  Attributes:
    name: The model's name in error messages ('student', 'teacher').
    keras_model_fn: The builder. Its own random initialisation differs from call to
      call.
    input_spec: The (inputs, labels) or (inputs, labels, sample_weight) structure of
      `tf.TensorSpec`, batched.
    initial_weights: The weights of the builder's model as NumPy arrays: a
      `tff.learning.models.ModelWeights` of `trainable` weights and, in `non_trainable`,
      the statistics.
    outputs_shape: The static shape of one example's outputs.
    logits_shape: That of its logits, classes last. Where each output is a label of its
      own, each is a position with one logit: `[..., labels, 1]`.
    from_logits: Whether the model's outputs are logits (or probabilities).
    loss: The loss.
    metrics: The `Metrics`.
    is_regression: Whether the outputs are numbers to be fitted, not classes. They are
      then compared by their squared distance wherever logits are by their divergence.
    ignored_label: The label that counts nowhere (padding), if the loss has one.
    batch_size: The only size of a batch that the model takes, if it is fixed
      (`keras.Input(batch_shape=...)`, recurrent layers with `stateful=True`).
    has_ids: Whether its inputs are, or become, ids that embeddings look up.
  """

  name: str
  keras_model_fn: KerasModelFn
  input_spec: Any
  initial_weights: tff.learning.models.ModelWeights
  outputs_shape: tf.TensorShape
  logits_shape: tf.TensorShape
  from_logits: bool
  loss: keras.losses.Loss
  metrics: metrics_lib.Metrics
  is_regression: bool
  ignored_label: Optional[int]
  batch_size: Optional[int]
  has_ids: bool
  _model: keras.Model
  _layout: _Layout
  _loss_rank: int

  @property
  def loss_description(self) -> str:
    """The loss and what it was built with, for messages."""
    config = {}
    with contextlib.suppress(Exception):  # A user's loss may have no config.
      config = {k: v for k, v in self.loss.get_config().items() if k != 'name'}
    return f'{type(self.loss).__name__}({config})'

  def __repr__(self) -> str:
    return f'ModelSpec(name={self.name!r}, model={type(self._model).__name__})'

  @functools.cached_property
  def weights_spec(self) -> tff.learning.models.ModelWeights:
    """The `ModelWeights` of `tf.TensorSpec`s."""
    return tf.nest.map_structure(
        lambda w: tf.TensorSpec(w.shape, w.dtype), self.initial_weights
    )

  @functools.cached_property
  def update_spec(self) -> tff.learning.models.ModelWeights:
    """As `weights_spec`, of what clients add up: numbers of 16 bits are so in 32.

    In bfloat16 a sum of ones ends at 256, and in float16 it is infinite from 65,520 on.
    """
    return tf.nest.map_structure(
        lambda s: tf.TensorSpec(s.shape, graphs.wide_dtype(s.dtype)), self.weights_spec
    )

  @functools.cached_property
  def weights_type(self) -> tff.StructType:
    """The TFF type of the model's `ModelWeights`."""
    return tff.types.tensorflow_to_type(self.weights_spec)

  @property
  def is_multi_label(self) -> bool:
    """Whether each output is a label of its own, present or not."""
    return len(self.logits_shape) > len(self.outputs_shape)

  @property
  def trainable_variables(self) -> list[keras.Variable]:
    """The Keras variables of the trainable weights: names, shapes and constraints."""
    return list(self._model.trainable_variables)

  @property
  def statistics_variables(self) -> list[keras.Variable]:
    """The Keras variables of the statistics."""
    variables = _non_trainable_variables(self._model)
    return [variables[place] for place in self._layout.statistics]

  @property
  def layers(self) -> list[keras.layers.Layer]:
    """The layers of the model, to be called within `BoundModel.scope`."""
    return list(self._model.layers)

  @property
  def is_random(self) -> bool:
    """Whether training draws random numbers (dropout)."""
    return bool(self._layout.seeds)

  def values(
      self, weights: Any, seed: Optional[tf.Tensor] = None
  ) -> ModelValues:
    """Returns the values with which a training begins.

    Args:
      weights: A structure with `trainable` and `non_trainable`.
      seed: int32 `[2]`, decides what the training draws; the seeds of the builder's
        model if `None`, for calls that draw nothing.
    """
    local = []
    for place, initial in self._layout.local.items():
      value = tf.constant(initial)
      if seed is not None and place in self._layout.seeds:
        bits = tf.random.experimental.stateless_fold_in(seed, place)
        positive = tf.bitwise.right_shift(tf.bitcast(bits, tf.uint32), 1)
        value = tf.cast(positive, value.dtype)
      local.append(value)
    return ModelValues(
        [tf.convert_to_tensor(w) for w in weights.trainable],
        [tf.convert_to_tensor(w) for w in weights.non_trainable],
        local,
    )

  def _non_trainable(self, values: ModelValues) -> list[tf.Tensor]:
    """All values in the order of `keras.Model.non_trainable_variables`."""
    by_place = {
        **dict(zip(self._layout.statistics, values.statistics)),
        **dict(zip(self._layout.local, values.local)),
        **{place: tf.constant(v) for place, v in self._layout.constants.items()},
    }
    return [by_place[place] for place in sorted(by_place)]

  def call(
      self, values: ModelValues, inputs: Any, *, training: bool = False
  ) -> Outputs:
    """Calls the model.

    Args:
      values: The model's values; they are not changed.
      inputs: A batch of inputs.
      training: Whether the model is in training mode.

    Returns:
      The `Outputs`.

    Raises:
      ValueError: If the model takes one size of a batch only and trains on another.
    """
    size = tf.nest.flatten(inputs)[0].shape[0]
    if self.batch_size is not None and size != self.batch_size:
      if training:
        raise ValueError(
            f'The {self.name} takes batches of {self.batch_size} examples only, found '
            f'{"any number" if size is None else size} in a batch. Give it batches of '
            'that size (`drop_remainder=True`), or build it without a fixed batch.'
        )
      return self._call_in_batches(values, inputs)
    outputs, non_trainable, own_losses, bad = _call(
        self._model,
        values.trainable,
        self._non_trainable(values),
        inputs,
        training=training,
    )
    after = ModelValues(
        list(values.trainable),
        [tf.convert_to_tensor(non_trainable[i]) for i in self._layout.statistics],
        [tf.convert_to_tensor(non_trainable[i]) for i in self._layout.local],
    )
    regularization = tf.add_n(
        [tf.zeros([])] + [tf.cast(loss, tf.float32) for loss in own_losses]
    )
    if not bad:
      return Outputs(outputs, after, regularization)
    bad_inputs = functools.reduce(tf.logical_or, bad)
    if training:
      regularization = tf.where(bad_inputs, float('nan'), regularization)
    return Outputs(outputs, after, regularization, bad_inputs)

  def _call_in_batches(self, values: ModelValues, inputs: Any) -> Outputs:
    """An inference call of any number of examples, in batches of the fixed size."""
    size = tf.shape(tf.nest.flatten(inputs)[0])[0]
    padding = -size % self.batch_size

    def batched(leaf: tf.Tensor) -> tf.Tensor:
      widths = [[0, padding]] + [[0, 0]] * (leaf.shape.rank - 1)
      return tf.reshape(
          tf.pad(leaf, widths), [-1, self.batch_size, *leaf.shape[1:]]
      )

    def call(batch: Any) -> tuple[tf.Tensor, tf.Tensor]:
      called = self.call(values, batch)
      return called.outputs, called.bad_inputs if self.has_ids else False

    batches, bad_inputs = tf.map_fn(
        call,
        tf.nest.map_structure(batched, inputs),
        fn_output_signature=(
            tf.TensorSpec([self.batch_size, *self.outputs_shape], self._outputs_dtype),
            tf.TensorSpec([], tf.bool),
        ),
    )
    outputs = tf.reshape(batches, tf.concat([[-1], tf.shape(batches)[2:]], axis=0))
    outputs = tf.ensure_shape(outputs, [None, *self.outputs_shape])[:size]
    return Outputs(
        outputs, values, tf.zeros([]), tf.reduce_any(bad_inputs) if self.has_ids else None
    )

  @property
  def _outputs_dtype(self) -> tf.DType:
    return tf.as_dtype(self._model.compute_dtype)

  def logits(self, weights: Any, inputs: Any) -> tf.Tensor:
    """Computes predictions in inference mode.

    Args:
      weights: The `ModelWeights` to predict with.
      inputs: A batch of inputs, a structure of tensors `[batch, ...]`.

    Returns:
      Logits, float32 `[batch, ..., classes]`.
    """
    return BoundModel(self, self.values(weights)).logits(inputs)

  def logits_shape_for(self, inputs_spec: Any) -> tf.TensorShape:
    """Returns `logits_shape` for inputs of known length where the model takes any.

    Args:
      inputs_spec: The structure of `tf.TensorSpec`s of a batch of inputs.

    Returns:
      The static shape of one example's logits, without unknown dimensions.
    """
    if self.logits_shape.is_fully_defined():
      return self.logits_shape
    key = tuple(tuple(leaf.shape[1:]) for leaf in tf.nest.flatten(inputs_spec))
    if key not in self._logits_shapes:
      with internals.eager_mode():  # Also where something is traced.
        example = _example(inputs_spec, self.batch_size or 1)
        self._logits_shapes[key] = self.logits(self.initial_weights, example).shape[1:]
    return self._logits_shapes[key]

  @functools.cached_property
  def _logits_shapes(self) -> dict[Any, tf.TensorShape]:
    """The shapes that `logits_shape_for` has found."""
    return {}

  def class_logits(self, outputs: tf.Tensor) -> tf.Tensor:
    """Returns outputs as logits; those of a softmax model as log-probabilities.

    Args:
      outputs: The model's outputs, `[batch, ...]`.

    Returns:
      float32 `[batch, ..., classes]`.
    """
    outputs = tf.cast(outputs, tf.float32)
    if self.is_multi_label:
      outputs = outputs[..., tf.newaxis]
    if self.from_logits:
      return outputs
    return losses.logits_from_probabilities(outputs)

  def outputs_of(self, logits: tf.Tensor) -> tf.Tensor:
    """Returns outputs as the loss takes them, given their logits.

    Args:
      logits: float32 `[batch, ..., classes]`.

    Returns:
      float32 outputs, whose `class_logits` are these.
    """
    if not self.from_logits:
      is_binary = logits.shape[-1] == 1
      logits = tf.sigmoid(logits) if is_binary else tf.nn.softmax(logits)
    return tf.squeeze(logits, axis=-1) if self.is_multi_label else logits

  def constrained(self, trainable: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Applies the constraints of the model's variables to values after a step.

    Args:
      trainable: The values of the trainable weights.

    Returns:
      The values under the constraints.
    """
    return apply_constraints(self.trainable_variables, trainable)

  def sample_weight(self, batch: Any) -> Optional[tf.Tensor]:
    """Returns the weights of a batch's examples, or of their positions.

    Args:
      batch: A batch as `input_spec` has it.

    Returns:
      float32 with the axes of the outputs but the last, each of its size or of one;
      `None` if the batch has no weights.
    """
    weight = sample_weight_of(batch)
    if weight is None:
      return None
    return losses.with_rank(tf.cast(weight, tf.float32), len(self.outputs_shape))

  def supervised_loss(
      self,
      labels: Any,
      outputs: tf.Tensor,
      mask: Optional[tf.Tensor] = None,
      sample_weight: Optional[tf.Tensor] = None,
  ) -> tf.Tensor:
    """Returns the user's loss on the model's outputs, without regularisation.

    Args:
      labels: The labels of a batch.
      outputs: The model's outputs for it.
      mask: Optional 0/1 float32 `[batch]`; the mean is over the ones, and 0 where
        there are none.
      sample_weight: As `sample_weight` returns it: factors of the losses. As in Keras's
        `fit` the sum is divided by how many losses there are.
    """
    labels = metrics_lib.with_axis_of_outputs(labels, outputs)
    counted = self.counted_labels(labels)
    if mask is None and counted is None:
      return self.loss(labels, outputs, sample_weight=sample_weight)
    if counted is not None:
      # Keras's own mean over what is not ignored is 0 / 0 where all of it is.
      each = keras.losses.sparse_categorical_crossentropy(
          tf.where(counted > 0.0, labels, tf.zeros_like(labels)),
          tf.cast(outputs, self.loss.dtype), from_logits=self.from_logits,
      )
      counted = losses.with_rank(counted, each.shape.rank)
      if mask is not None:
        counted *= losses.with_rank(mask, each.shape.rank)
      return losses.weighted_mean(each, counted, sample_weight)
    # For sequences, Keras would take weights `[batch]` for those of positions.
    weights = losses.with_rank(mask, self._loss_rank)
    if sample_weight is not None:
      weights = losses.with_rank(mask, sample_weight.shape.rank) * sample_weight
    loss = self.loss(labels, outputs, sample_weight=weights)
    # Keras divides by the size of the batch, not by the sum of the weights.
    size = tf.cast(tf.shape(mask)[0], loss.dtype)
    return tf.math.divide_no_nan(loss * size, tf.cast(tf.reduce_sum(mask), loss.dtype))

  def counted_labels(self, labels: Any) -> Optional[tf.Tensor]:
    """Returns which labels count, where the loss has an `ignore_class` (padding).

    `None` where the loss ignores no class: all labels count.

    Args:
      labels: A tensor of labels.

    Returns:
      0/1, float32 in the labels' shape; `None` if the loss ignores no class.
    """
    if self.ignored_label is None:
      return None
    ignored = tf.equal(labels, tf.cast(self.ignored_label, labels.dtype))
    return 1.0 - tf.cast(ignored, tf.float32)

  def usable_labels(
      self, labels: Any, sample_weight: Optional[tf.Tensor] = None
  ) -> tuple[Any, tf.Tensor]:
    """Brings class indices into range, so that a bad one can't end the round.

    Args:
      labels: The labels of a batch.
      sample_weight: As `sample_weight` returns it for it.

    Returns:
      The labels, with those outside `[0, classes)` replaced by 0, and a boolean
      scalar that tells whether there were any; of a binary cross-entropy, those outside
      [0, 1]. Labels of another loss pass as they are. The label of an example of weight
      0 may be anything, and becomes 0; a weight that is negative or not finite counts
      as a bad label.
    """
    bad = tf.constant(False)
    if sample_weight is not None:
      bad = ~tf.reduce_all((sample_weight >= 0.0) & tf.math.is_finite(sample_weight))
    highest = highest_label(self.loss, self.outputs_shape)
    if highest is None:
      return labels, bad
    # In a wide type: 256 is not a uint8. False for NaN, where labels are floats.
    wide = labels if labels.dtype.is_floating else tf.cast(labels, tf.int64)
    in_range = (wide >= 0) & (wide <= tf.cast(highest, wide.dtype))
    if self.ignored_label is not None:
      in_range |= tf.equal(labels, tf.cast(self.ignored_label, labels.dtype))
    used = in_range
    if sample_weight is not None:
      weightless = losses.with_rank(sample_weight, labels.shape.rank) <= 0.0
      in_range |= weightless
      used &= ~weightless
    return (
        tf.where(used, labels, tf.zeros_like(labels)),
        bad | ~tf.reduce_all(in_range),
    )

  def metric_mask(
      self,
      labels: Any,
      outputs: tf.Tensor,
      mask: Optional[tf.Tensor] = None,
      sample_weight: Optional[tf.Tensor] = None,
  ) -> Optional[tf.Tensor]:
    """Returns which predictions count in metrics.

    Args:
      labels: The labels of a batch.
      outputs: The model's outputs for it, `[batch, ..., classes]`.
      mask: Optional 0/1 float32 `[batch]`: which examples count.
      sample_weight: As `sample_weight` returns it for it; those of weight 0 do not
        count.

    Returns:
      0/1 float32 `[batch, ...]`, one for each position; `None` if all of them count.
    """
    masks = [self.counted_labels(labels), mask]
    if sample_weight is not None:
      masks.append(tf.cast(sample_weight > 0.0, tf.float32))
    if all(each is None for each in masks):
      return None
    positions = outputs.shape[:-1]
    counted = tf.ones(tf.shape(outputs)[:-1])
    for each in masks:
      if each is not None:
        counted *= losses.with_rank(each, positions.rank)
    return tf.ensure_shape(counted, positions)

  @functools.cached_property
  def metric_functions(
      self,
  ) -> tuple[graphs.TracedFunction, graphs.TracedFunction]:
    """The user's metrics for evaluation: two functions, traced once.

    The first one maps (state, labels, float32 outputs) of a batch to the next state;
    the second, a state to `Metrics.scores`.
    """
    metrics = self.metrics
    _, labels = split_batch(self.input_spec)
    labels = tf.TensorSpec([None, *labels.shape[1:]], labels.dtype)
    outputs = tf.TensorSpec([None, *self.outputs_shape], tf.float32)
    state = tf.nest.map_structure(tf.TensorSpec.from_tensor, metrics.initial_state())

    def update(state, labels, outputs):
      mask = self.metric_mask(labels, outputs)
      return metrics.update(state, labels, outputs, mask)

    return (
        graphs.TracedFunction(update, [state, labels, outputs]),
        graphs.TracedFunction(metrics.scores, [state]),
    )

  @functools.cached_property
  def weighted_metric_update(self) -> graphs.TracedFunction:
    """The first of `metric_functions`, with the weights as a fourth argument."""
    metrics = self.metrics
    _, labels = split_batch(self.input_spec)
    labels = tf.TensorSpec([None, *labels.shape[1:]], labels.dtype)
    outputs = tf.TensorSpec([None, *self.outputs_shape], tf.float32)
    state = tf.nest.map_structure(tf.TensorSpec.from_tensor, metrics.initial_state())
    weights = tf.TensorSpec([None] * len(self.outputs_shape), tf.float32)

    def update(state, labels, outputs, sample_weight):
      labels, _ = self.usable_labels(labels, sample_weight)
      mask = self.metric_mask(labels, outputs, sample_weight=sample_weight)
      return metrics.update(state, labels, outputs, mask, sample_weight)

    return graphs.TracedFunction(update, [state, labels, outputs, weights])

  def to_keras(self, weights: Any) -> keras.Model:
    """Returns a Keras model of the builder with these weights.

    Args:
      weights: A `ModelWeights` of this model, such as
        `process.get_model_weights(state)`.

    Returns:
      A new model. Frozen and adapted values are those of the model that was checked.

    Raises:
      ValueError: If the weights are of another model.
    """
    model = self.keras_model_fn()
    self.assign(model, weights)
    return model

  def assign(self, model: keras.Model, weights: Any) -> None:
    """Assigns weights to a model of the same builder.

    Args:
      model: The Keras model; it is changed.
      weights: `ModelWeights`.

    Raises:
      ValueError: If the weights, or the model, are not of this builder.
    """
    # Subclassed models have no variables before their first call.
    inputs_spec = _with_lengths_of(model, split_batch(self.input_spec)[0])
    model(_example(inputs_spec, self.batch_size or 1), training=False)
    expected = [tuple(w.shape) for w in tf.nest.flatten(self.initial_weights)]
    for kind, values in (('weights', weights), ('model', self.weights_of(model))):
      found = [np.shape(w) for w in [*values.trainable, *values.non_trainable]]
      if found != expected:
        raise ValueError(
            f'The {kind} to assign {"are" if kind == "weights" else "is"} not of the '
            f'{self.name}: expected arrays of shapes {expected}, found {found}.'
        )
    for variable, value in zip(model.trainable_variables, weights.trainable, strict=True):
      variable.assign(value)
    values = {
        **dict(zip(self._layout.statistics, weights.non_trainable)),
        **self._layout.constants,
    }
    for place, value in values.items():
      _non_trainable_variables(model)[place].assign(value)

  def weights_of(self, model: keras.Model) -> tff.learning.models.ModelWeights:
    """Returns the weights of a model of the same builder.

    Args:
      model: A built Keras model.

    Returns:
      `ModelWeights` of NumPy arrays.
    """
    variables = dict(enumerate(_non_trainable_variables(model)))
    return tff.learning.models.ModelWeights(
        trainable=[v.numpy() for v in model.trainable_variables],
        non_trainable=[
            variables[i].numpy() for i in self._layout.statistics if i in variables
        ],
    )

  @functools.cached_property
  def functional_model(self) -> tff.learning.models.FunctionalModel:
    """The model as `tff.learning` takes it (`build_weighted_fed_avg`, `build_fed_eval`).

    TFF averages trainable weights only, and statistics stay as they were.

    Raises:
      ValueError: If there are sample weights, which TFF would leave out.
    """
    if sample_weight_of(self.input_spec) is not None:
      raise ValueError(
          "TFF's own algorithms have no sample weights, and the `input_spec` has some: "
          f'{self.input_spec}. Take the algorithms of `tff_kd.algorithms`, or build the '
          'model with batches (x, y).'
      )
    return _functional_model(self)


class BoundModel(NamedTuple):
  """A model with values, as what computes predictions.

  Attributes:
    spec: The `ModelSpec`.
    values: Its `ModelValues`.
  """

  spec: ModelSpec
  values: ModelValues

  def logits(self, inputs: Any) -> tf.Tensor:
    """Computes predictions in inference mode.

    Args:
      inputs: A batch of inputs, a structure of tensors `[batch, ...]`.

    Returns:
      Logits, float32 `[batch, ..., classes]`.
    """
    return self.spec.class_logits(self.spec.call(self.values, inputs).outputs)

  def scope(self) -> contextlib.AbstractContextManager:
    """Returns a context in which the model's layers have these values.

    What the layers assign within it is dropped at its end.
    """
    # pylint: disable=protected-access
    model = self.spec._model
    return keras.StatelessScope([
        *zip(model.trainable_variables, self.values.trainable),
        *zip(_non_trainable_variables(model), self.spec._non_trainable(self.values)),
    ])


def apply_constraints(
    variables: Sequence[keras.Variable], values: Sequence[tf.Tensor]
) -> list[tf.Tensor]:
  """Applies the constraints of variables to values after a step.

  Args:
    variables: The variables; they are not changed.
    values: A tensor for each variable.

  Returns:
    The values under the constraints.
  """
  return [
      value if v.constraint is None else tf.convert_to_tensor(v.constraint(value))
      for v, value in zip(variables, values, strict=True)
  ]


def build_model_spec(
    keras_model_fn: KerasModelFn,
    *,
    input_spec: Any,
    loss_fn: LossFn,
    metrics_fn: Optional[metrics_lib.MetricsFn] = None,
    name: str = 'model',
) -> ModelSpec:
  """Checks a Keras builder against its data and its loss.

  Args:
    keras_model_fn: A no-argument function that returns a `keras.Model` with one output
      tensor `[batch, ..., classes]`. It is called once here; the weights of its model
      become the initial weights, so a builder may load or adapt; call
      `keras.utils.set_random_seed` before for reproducible ones.
    input_spec: The spec of the clients' batches, e.g. `dataset.element_spec`: a
      pair `(x, y)`, a triple `(x, y, sample_weight)` or a mapping with these keys,
      batched; `x` may be a structure of several inputs. Weights are numbers `[batch]`,
      or one a position where an example has several predictions.
    loss_fn: A no-argument function that returns a `keras.losses.Loss`.
    metrics_fn: An optional no-argument function that returns a list of new
      `keras.metrics.Metric`s, or {'metrics': list, 'weighted_metrics': list}: the
      latter weigh each example by its sample weight.
    name: The model's name in error messages.

  Returns:
    A `ModelSpec`.

  Raises:
    TypeError: If an argument has the wrong type.
    ValueError: If the model has a training step of its own, does not take inputs of
      `input_spec`, has several outputs, or if its outputs contradict the loss:
      probabilities under `from_logits=True`, or logits under a cross-entropy with
      `from_logits=False`.
  """
  input_spec = check_input_spec(input_spec)
  inputs_spec, labels_spec = split_batch(input_spec)
  check_model_fn(keras_model_fn, name)
  loss = check_loss_fn(loss_fn)()
  if not isinstance(loss, keras.losses.Loss):
    raise TypeError(
        f'`loss_fn` must return a `keras.losses.Loss`, found {loss!r}. Pass, for '
        f'example, `loss_fn={_LOSS_EXAMPLE}`.'
    )
  if metrics_fn is not None:
    check_metrics_fn(metrics_fn)
  metrics = metrics_lib.new_metrics(metrics_fn)
  model = _build_keras_model(keras_model_fn, name)
  batch_size = _fixed_batch(model, inputs_spec)
  inputs_spec = _with_lengths_of(model, inputs_spec)
  outputs = _probe(model, inputs_spec, batch_size or _PROBE_BATCH, name)
  labels_spec = _with_lengths(labels_spec, outputs.shape)
  labels = _example(labels_spec, batch_size or _PROBE_BATCH)
  weight_spec = sample_weight_of(input_spec)
  loss_rank = _check_loss(loss, labels, outputs, name)
  if weight_spec is not None:
    _check_sample_weight(
        loss, labels, outputs,
        _example(_with_lengths(weight_spec, outputs.shape), batch_size or _PROBE_BATCH),
    )
  traced = _trace(model, inputs_spec, batch_size, name)
  if not model.trainable_variables:
    raise ValueError(
        f'The {name} has no trainable weights: there is nothing to train. Leave some of '
        'its layers with `trainable=True`.'
    )
  is_regression = isinstance(loss, _REGRESSION_LOSSES)
  outputs_shape = traced.output_shape[1:]
  logits_shape = outputs_shape
  if outputs_shape[-1] != 1 and isinstance(loss, BINARY_LOSSES):
    logits_shape = outputs_shape.concatenate([1])
  from_logits = is_regression or _check_from_logits(loss, traced.activation, name)
  variables = _non_trainable_variables(model)
  return ModelSpec(
      name=name,
      keras_model_fn=keras_model_fn,
      input_spec=input_spec,
      initial_weights=tff.learning.models.ModelWeights(
          trainable=[v.numpy() for v in model.trainable_variables],
          non_trainable=[variables[i].numpy() for i in traced.layout.statistics],
      ),
      outputs_shape=outputs_shape,
      logits_shape=logits_shape,
      from_logits=from_logits,
      loss=loss,
      metrics=metrics_lib.Metrics(
          metrics, labels, outputs, from_logits=from_logits and not is_regression
      ),
      is_regression=is_regression,
      ignored_label=_config_of(loss, 'ignore_class'),
      batch_size=batch_size,
      has_ids=traced.has_ids,
      _model=model,
      _layout=traced.layout,
      _loss_rank=loss_rank,
  )


_LOSS_EXAMPLE = 'lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True)'


def is_builder(value: Any) -> bool:
  """Returns whether a value is a function without arguments, and no Keras object.

  Losses, metrics, layers and models are callable as well, but what is needed is a
  function that makes them.

  Args:
    value: Any value.
  """
  if not callable(value) or isinstance(
      value, (keras.losses.Loss, keras.metrics.Metric, keras.layers.Layer)
  ):
    return False
  try:
    inspect.signature(value).bind()
  except TypeError:  # It needs arguments, such as `keras.losses.mean_squared_error`.
    return False
  except ValueError:  # It does not tell.
    return True
  return True


def check_loss_fn(loss_fn: Any, name: str = 'loss_fn') -> LossFn:
  """Checks that a value makes losses, and returns it.

  Args:
    loss_fn: The value.
    name: The argument's name, for the error.

  Returns:
    The value.

  Raises:
    TypeError: If it is not a function without arguments.
  """
  return _check_builder(loss_fn, name, _LOSS_EXAMPLE)


def check_metrics_fn(
    metrics_fn: Any, name: str = 'metrics_fn'
) -> metrics_lib.MetricsFn:
  """Checks that a value makes metrics, and returns it.

  Args:
    metrics_fn: The value.
    name: The argument's name, for the error.

  Returns:
    The value.

  Raises:
    TypeError: If it is not a function without arguments.
  """
  return _check_builder(metrics_fn, name, 'lambda: [keras.metrics.AUC(), ...]')


def _check_builder(fn: Any, name: str, example: str) -> Any:
  if not is_builder(fn):
    raise TypeError(
        f'`{name}` must be a function without arguments that returns a new one, found '
        f'{fn!r}. Pass, for example, `{name}={example}`.'
    )
  return fn


def check_model_fn(keras_model_fn: Any, name: str) -> None:
  """Raises an error if a value cannot make models.

  Args:
    keras_model_fn: The value.
    name: The model's name, for the error, such as 'student'.

  Raises:
    TypeError: If it is not a function without arguments.
  """
  if not is_builder(keras_model_fn):
    raise TypeError(
        f'The {name} must be a function without arguments that returns a `keras.Model`, '
        f'found {keras_model_fn!r}. Wrap the construction of the model: '
        '`def build(): return keras.Sequential([...])`.'
    )


def _build_keras_model(keras_model_fn: KerasModelFn, name: str) -> keras.Model:
  """Calls the builder; refuses what is no Keras 3 model, or trains by itself."""
  model = keras_model_fn()
  if not isinstance(model, keras.Model):
    hint = ''
    if type(model).__mro__[-2].__module__.startswith('tensorflow') or any(
        'tf_keras' in c.__module__ for c in type(model).__mro__
    ):
      hint = (
          ' Models of Keras 2 (`tf_keras`, or `tf.keras` under TF_USE_LEGACY_KERAS=1) '
          'cannot be used: build the model with `import keras` (Keras 3).'
      )
    raise TypeError(
        f'The {name} builder must return a `keras.Model`, found '
        f'{type(model).__module__}.{type(model).__name__}.{hint}'
    )
  for method in ('train_step', 'compute_loss'):
    if getattr(type(model), method) is not getattr(keras.Model, method):
      raise ValueError(
          f'The {name}, a {type(model).__name__}, has a `{method}` of its own, which '
          'federated training would not use. Put the model into a plain `keras.Model`, '
          'its loss into `loss_fn`, and further terms into `self.add_loss` or a '
          '`tff_kd.client.local_terms.LocalTerm`.'
      )
  return model


def highest_label(
    loss: keras.losses.Loss, outputs_shape: Sequence[Optional[int]]
) -> Optional[int]:
  """The highest label under a loss, of which the lowest is 0; `None` if any will do.

  Args:
    loss: The loss.
    outputs_shape: The shape of the model's outputs.
  """
  if isinstance(loss, keras.losses.SparseCategoricalCrossentropy):
    return outputs_shape[-1] - 1
  return 1 if isinstance(loss, _BINARY_CROSS_ENTROPIES) else None


def wrong_labels(
    labels: np.ndarray, loss: keras.losses.Loss, outputs_shape: Sequence[Optional[int]]
) -> np.ndarray:
  """Returns which labels are out of a loss's range, bool in their shape.

  Args:
    labels: An array of labels.
    loss: The loss. Those that it ignores are in its range.
    outputs_shape: The shape of the model's outputs.

  Raises:
    ValueError: If they are not numbers.
  """
  if labels.dtype.kind not in 'fiub':
    raise ValueError(
        f'Labels must be numbers, found an array of the dtype {labels.dtype}. Encode '
        'them: `names, y = np.unique(labels, return_inverse=True)`.'
    )
  highest = highest_label(loss, outputs_shape)
  if highest is None:
    return np.zeros(labels.shape, bool)
  ignored = _config_of(loss, 'ignore_class')
  wrong = ~((labels >= 0) & (labels <= highest))  # Also what is not a number.
  return wrong if ignored is None else wrong & (labels != ignored)


def wrong_labels_message(
    labels: np.ndarray, loss: keras.losses.Loss, outputs_shape: Sequence[Optional[int]]
) -> str:
  """Says which labels a loss takes, which labels there are, and what to do.

  Args:
    labels: An array of labels, some of which are wrong.
    loss: The loss.
    outputs_shape: The shape of the model's outputs.

  Returns:
    The end of a sentence that begins with the labels.
  """
  highest, ignored = highest_label(loss, outputs_shape), _config_of(loss, 'ignore_class')
  used = labels[labels != ignored] if ignored is not None else labels
  hint = 'Mend them, or give the model an output for each class.'
  if (used.min(), used.max()) == (1, highest + 1):
    hint = 'They seem to be counted from 1: subtract 1.'
  elif isinstance(loss, _BINARY_CROSS_ENTROPIES):
    hint = 'Mend them, or take another loss.'
  return (
      f'must be from 0 to {highest}, as {type(loss).__name__} takes them'
      + (f' (or {ignored}, which it ignores)' if ignored is not None else '')
      + f', found {used.min()} to {used.max()}. {hint}'
  )


_BINARY_CROSS_ENTROPIES = (
    keras.losses.BinaryCrossentropy, keras.losses.BinaryFocalCrossentropy
)
# Keras's losses of outputs that are labels of their own, present or not.
BINARY_LOSSES = (
    *_BINARY_CROSS_ENTROPIES, keras.losses.Hinge, keras.losses.SquaredHinge
)
# Keras's losses of numbers. Another loss of numbers is taken for one of logits.
_REGRESSION_LOSSES = (
    keras.losses.MeanSquaredError,
    keras.losses.MeanAbsoluteError,
    keras.losses.MeanAbsolutePercentageError,
    keras.losses.MeanSquaredLogarithmicError,
    keras.losses.Huber,
    keras.losses.LogCosh,
    keras.losses.Poisson,
)


def _config_of(loss: keras.losses.Loss, key: str) -> Any:
  """Returns an argument that a loss was built with; `None` if it is not known."""
  value = getattr(loss, key, None)
  if value is None:
    with contextlib.suppress(Exception):  # A user's loss may have no config.
      value = loss.get_config().get(key)
  return value


def check_has_classes(spec: ModelSpec, subject: str) -> None:
  """Raises an error if a model has no classes, where something is about classes.

  Args:
    spec: The model.
    subject: What is about classes, as the subject of the error's sentence.

  Raises:
    ValueError: If the model's outputs are numbers.
  """
  if spec.is_regression:
    raise ValueError(
        f'{subject} is about classes, and the {spec.name} is a regression model (by its '
        'loss). Use an algorithm and a consensus that compare outputs as they are: '
        'fed_avg, fed_prox, scaffold, fed_dyn, fed_gkd, moon, fed_per, lg_fed_avg, '
        'fed_kd, fml, fed_df, fed_distillation or fed_md, with mean_logits.'
    )


def is_compatible(expected: Any, found: Any) -> bool:
  """Returns whether batches of one spec, of any size, can stand for those of another.

  Args:
    expected: A structure of `tf.TensorSpec`s.
    found: Another one; dimensions that it leaves open fit.
  """
  try:
    tf.nest.assert_same_structure(expected, found)
  except (TypeError, ValueError):
    return False

  def fits(e: tf.TensorSpec, f: Any) -> bool:
    if not isinstance(f, tf.TensorSpec) or e.dtype != f.dtype:
      return False
    if f.shape.rank is None:
      return True
    return e.shape.rank == f.shape.rank and (
        e.shape[1:].is_compatible_with(f.shape[1:])
    )

  return all(map(fits, tf.nest.flatten(expected), tf.nest.flatten(found)))


def check_same_outputs(first: ModelSpec, second: ModelSpec) -> None:
  """Raises an error if the predictions of two models cannot be compared.

  Args:
    first: A model.
    second: Another one.

  Raises:
    ValueError: If the output shapes differ.
  """
  if first.logits_shape.as_list() != second.logits_shape.as_list():
    raise ValueError(
        f'The {first.name} and the {second.name} must have outputs of the same shape '
        f'to learn from each other, found {first.logits_shape} and '
        f'{second.logits_shape} (an example, without batch).'
    )


def check_input_spec(input_spec: Any) -> Any:
  """Checks an `input_spec`, and returns it as a batch.

  Args:
    input_spec: A structure of `tf.TensorSpec`s, such as a dataset's `element_spec`.

  Returns:
    A pair, a triple or a mapping; see `as_batch`.

  Raises:
    TypeError: If it does not only hold `tf.TensorSpec`s.
    ValueError: If it does not describe batches of inputs and labels.
  """
  batch_spec = as_batch(input_spec)
  if batch_spec is None:
    raise ValueError(
        '`input_spec` must describe batches as a pair (x, y), a triple (x, y, '
        "sample_weight) or a mapping with the keys 'x', 'y' and perhaps "
        f"'sample_weight', found {input_spec!r}. Pass the clients' "
        '`dataset.element_spec`.'
    )
  for spec in tf.nest.flatten(input_spec):
    if not isinstance(spec, tf.TensorSpec):
      raise TypeError(
          f'`input_spec` must hold only `tf.TensorSpec`s, found {spec!r}.'
      )
    if spec.shape.rank is None:
      raise ValueError(
          f'`input_spec` must tell how many dimensions there are, found {spec!r}. Give '
          '`tf.data.Dataset.from_generator` an `output_signature` with shapes.'
      )
    if spec.shape.rank < 1:
      raise ValueError(
          f'`input_spec` must have a batch dimension, found {spec!r}. Call '
          '`.batch(...)` on the datasets.'
      )
  _, labels_spec = split_batch(batch_spec)
  if not isinstance(labels_spec, tf.TensorSpec):
    raise ValueError(
        f'The labels must be one tensor, found {labels_spec!r}. Train on one output of '
        'the model at a time, or put the labels side by side in one array.'
    )
  if labels_spec.dtype == tf.string:
    raise ValueError(
        'The labels must be numbers, found strings. Encode them: '
        '`names, y = np.unique(labels, return_inverse=True)`.'
    )
  weight_spec = sample_weight_of(batch_spec)
  if weight_spec is not None and (
      not isinstance(weight_spec, tf.TensorSpec)
      or weight_spec.dtype in (tf.string, tf.complex64, tf.complex128)
  ):
    raise ValueError(
        'The sample weights must be one tensor of numbers `[batch]`, found '
        f'{weight_spec!r}.'
    )
  return batch_spec


def _example(spec: Any, batch_size: int, rng=None) -> Any:
  """Zeros (or random values) of a batched spec."""

  def make(leaf: tf.TensorSpec):
    shape = [batch_size] + [
        d if d is not None else _UNKNOWN_DIMENSION
        for d in leaf.shape.as_list()[1:]
    ]
    if rng is None or leaf.dtype == tf.string:
      return tf.zeros(shape, leaf.dtype) if leaf.dtype != tf.string else tf.fill(
          shape, ''
      )
    if leaf.dtype.is_floating:
      return tf.constant(rng.standard_normal(shape), leaf.dtype)
    return tf.cast(tf.constant(rng.integers(0, 2, shape)), leaf.dtype)

  return tf.nest.map_structure(make, spec)


def _with_lengths(spec: tf.TensorSpec, shape: Sequence[Optional[int]]) -> tf.TensorSpec:
  """A batched spec whose unknown dimensions are those of a shape that it fits."""
  known = [*shape, *[None] * spec.shape.rank][: spec.shape.rank]
  dims = [d if d is not None else k for d, k in zip(spec.shape.as_list(), known)]
  return tf.TensorSpec([spec.shape[0], *dims[1:]], spec.dtype)


def _with_lengths_of(model: keras.Model, inputs_spec: Any) -> Any:
  """A spec of inputs whose unknown dimensions are those that the model declares."""
  declared = getattr(model, 'inputs', None) or ()
  specs = tf.nest.flatten(inputs_spec)
  if len(declared) != len(specs):
    return inputs_spec
  if isinstance(inputs_spec, Mapping):
    named = {tensor.name: tensor.shape for tensor in declared}
    shapes = [named.get(name, ()) for name in sorted(inputs_spec)]
  else:
    shapes = [tensor.shape for tensor in declared]
  return tf.nest.pack_sequence_as(
      inputs_spec,
      [
          _with_lengths(leaf, shape) if len(shape) == leaf.shape.rank else leaf
          for leaf, shape in zip(specs, shapes)
      ],
  )


def _fixed_batch(model: keras.Model, inputs_spec: Any) -> Optional[int]:
  """The only size of a batch that a model takes, or `None` if it takes any."""
  declared = [t.shape[0] for t in getattr(model, 'inputs', None) or ()]
  if declared and declared[0] is not None:
    return declared[0]
  if _recurrent_layers(model):
    return tf.nest.flatten(inputs_spec)[0].shape[0]
  return None


def _probe(
    keras_model: keras.Model, inputs_spec: Any, batch_size: int, name: str
) -> tf.Tensor:
  """The model's outputs on a random batch; builds the model."""
  rng = np.random.default_rng(0)
  try:
    outputs = keras_model(
        _example(inputs_spec, batch_size, rng), training=False
    )
  except Exception as error:
    tried = ''
    if any(not s.shape[1:].is_fully_defined() for s in tf.nest.flatten(inputs_spec)):
      tried = (
          f' It was tried with a length of {_UNKNOWN_DIMENSION}, as the spec has none: '
          'if the model takes one length only, give it in `keras.Input` or in the spec.'
      )
    raise ValueError(
        f'The {name} does not take inputs of the spec {inputs_spec}. Make the '
        f"model's inputs and the datasets' `element_spec` agree.{tried} Keras says: "
        f'{error}'
    ) from error
  if not tf.is_tensor(outputs):
    raise ValueError(
        f'The {name} must have one output tensor, found '
        f'{tf.nest.map_structure(lambda t: getattr(t, "shape", t), outputs)}. Train one '
        'output at a time, `keras.Model(model.inputs, model.outputs[0])`, or put outputs '
        'of one loss side by side with `keras.layers.Concatenate`.'
    )
  if not outputs.dtype.is_floating:
    raise ValueError(
        f'The outputs of the {name} must be floating-point numbers, found '
        f'{outputs.dtype.name}. Return logits or probabilities.'
    )
  if outputs.shape.rank < 2 or outputs.shape[0] != batch_size:
    raise ValueError(
        f'The {name} must return outputs of shape [batch, ..., classes], found '
        f'{outputs.shape} for a batch of {batch_size}.'
    )
  return outputs


def _call(
    model: keras.Model,
    trainable: Sequence[tf.Tensor],
    non_trainable: Sequence[tf.Tensor],
    inputs: Any,
    *,
    training: bool,
) -> tuple[tf.Tensor, list[tf.Tensor], list[tf.Tensor], list[tf.Tensor]]:
  """Calls a built model with values.

  Returns its outputs, non-trainable values, losses, and of each lookup in an embedding
  whether it was for ids that are not there.

  Unlike `keras.Model.stateless_call` it goes through `__call__`, so that layers know
  the mode of training, and inputs are cast, as in `fit`.
  """
  scope = keras.StatelessScope(
      [
          *zip(model.trainable_variables, trainable, strict=True),
          *zip(_non_trainable_variables(model), non_trainable, strict=True),
      ],
      collect_losses=True,
  )
  # Keras's names of layers (`__mine`) may be none of TensorFlow's at the root of a graph.
  with tf.name_scope('model'), scope, embeddings.checked_ids(training=training) as bad:
    outputs = model(inputs, training=training)
    own_losses = list(model.losses)
  after = [scope.get_current_value(v) for v in _non_trainable_variables(model)]
  return outputs, after, own_losses, bad


class _Traced(NamedTuple):
  """Facts that the graph of a model shows.

  Attributes:
    layout: The `_Layout`.
    activation: 'softmax' or 'sigmoid' if the model ends in one, else `None`.
    output_shape: The static shape of its outputs, the batch included.
    has_ids: Whether embeddings look something up.
  """

  layout: _Layout
  activation: Optional[str]
  output_shape: tf.TensorShape
  has_ids: bool


def _trace(
    model: keras.Model, inputs_spec: Any, batch_size: Optional[int], name: str
) -> _Traced:
  """Traces an inference and a training call of a built model."""
  variables = _non_trainable_variables(model)
  moved, looked_up = [], []

  def calls(trainable, non_trainable, inputs):
    outputs, _, _, looked_up[:] = _call(
        model, trainable, non_trainable, inputs, training=False
    )
    _, after, *_ = _call(model, trainable, non_trainable, inputs, training=True)
    moved[:] = [
        i for i, (old, new) in enumerate(zip(non_trainable, after)) if new is not old
    ]
    return outputs

  def spec_of(variable: keras.Variable) -> tf.TensorSpec:
    return tf.TensorSpec(variable.shape, variable.dtype)

  batch_spec = tf.nest.map_structure(
      lambda s: tf.TensorSpec([batch_size, *s.shape[1:]], s.dtype), inputs_spec
  )
  try:
    traced = graphs.function(calls).get_concrete_function(
        [spec_of(v) for v in model.trainable_variables],
        [spec_of(v) for v in variables],
        batch_spec,
    )
  except Exception as error:
    raise ValueError(
        f'The {name} cannot be called in training mode in a graph, as Keras\'s `fit` '
        f'would: {error}'
    ) from error
  recurrent = {
      id(state)
      for layer in _recurrent_layers(model)
      for state in tf.nest.flatten(layer.states)
  }
  seeds = frozenset(
      i for i in moved if variables[i].name == _SEED_STATE
  )
  statistics = tuple(
      i
      for i in moved
      if tf.as_dtype(variables[i].dtype).is_floating and id(variables[i]) not in recurrent
  )
  layout = _Layout(
      statistics=statistics,
      local={i: variables[i].numpy() for i in moved if i not in statistics},
      seeds=seeds,
      constants={
          i: v.numpy() for i, v in enumerate(variables) if i not in moved
      },
  )
  output = traced.outputs[0]
  shape = output.shape
  if shape.rank is None:
    example = _example(inputs_spec, batch_size or _PROBE_BATCH)
    shape = model(example, training=False).shape
  return _Traced(layout, _last_activation(output), shape, bool(looked_up))


def _non_trainable_variables(model: keras.Model) -> list[keras.Variable]:
  """Those of Keras, and the states of recurrent layers, which Keras does not list."""
  variables = list(model.non_trainable_variables)
  listed = {id(v) for v in variables}
  return variables + [
      state
      for layer in _recurrent_layers(model)
      for state in tf.nest.flatten(layer.states)
      if id(state) not in listed
  ]


def _recurrent_layers(model: keras.Model) -> list[keras.layers.RNN]:
  """The recurrent layers with `stateful=True`."""
  pending, found = [model], []
  while pending:
    layer = pending.pop()
    if isinstance(layer, keras.layers.RNN) and layer.stateful:
      found.append(layer)
    pending += getattr(layer, 'layers', ())
    wrapped = getattr(layer, 'layer', None)
    pending += [] if wrapped is None else [wrapped]
  return found


# What leaves the values as they are.
_PASSING = frozenset(['Identity', 'Reshape', 'Cast', 'Squeeze', 'ExpandDims'])


def _last_activation(output: tf.Tensor) -> Optional[str]:
  """The activation in which a traced model ends, as far as it decides the loss."""
  op = output.op
  while op.type in _PASSING:
    op = op.inputs[0].op
  return {'Softmax': 'softmax', 'Sigmoid': 'sigmoid'}.get(op.type)


def _check_loss(loss, labels, outputs, name) -> int:
  """Refuses a loss that does not fit; returns the rank of what it averages."""
  try:
    value = loss(labels, outputs)
  except Exception as error:
    shapes = tf.nest.map_structure(lambda t: (t.shape, t.dtype.name), labels)
    raise ValueError(
        f'The loss {type(loss).__name__} does not take labels of shape and dtype '
        f'{shapes} with outputs of shape {outputs.shape} of the {name}. '
        f'Keras says: {error}'
    ) from error
  if value.shape.rank != 0:
    raise ValueError(
        f'The loss {type(loss).__name__} must return a scalar, found the shape '
        f'{value.shape}. Leave its `reduction` at the default.'
    )
  try:
    labels = metrics_lib.with_axis_of_outputs(labels, outputs)
    return max(tf.convert_to_tensor(loss.call(labels, outputs)).shape.rank, 1)
  except NotImplementedError:  # It has a `__call__` of its own.
    return 1


def _check_sample_weight(loss, labels, outputs, weight) -> None:
  try:
    weight = losses.with_rank(tf.cast(weight, tf.float32), outputs.shape.rank - 1)
    loss(labels, outputs, sample_weight=weight)
  except Exception as error:
    raise ValueError(
        'The sample weights must be `[batch]`, or have the shape of the outputs without '
        f'the last axis, found weights of shape {weight.shape} with outputs of shape '
        f'{outputs.shape} and the loss {type(loss).__name__}. Keras says: {error}'
    ) from error


def _check_from_logits(loss, activation: Optional[str], name: str) -> bool:
  """Whether the outputs are logits; refuses a loss that takes them otherwise."""
  from_logits = _config_of(loss, 'from_logits')
  if from_logits and activation is not None:
    raise ValueError(
        f'The {name} ends in {activation} (its outputs are probabilities), but '
        f'{type(loss).__name__} has from_logits=True and would apply {activation}'
        f' again. Remove the last activation of the {name}, or build the loss '
        'with from_logits=False.'
    )
  if from_logits is False and activation is None:
    raise ValueError(
        f'{type(loss).__name__} has from_logits=False and expects probabilities, '
        f'but the outputs of the {name} are not probabilities: it ends in no softmax or '
        f'sigmoid. Build the loss with from_logits=True, or end the {name} in one.'
    )
  return activation is None if from_logits is None else bool(from_logits)


def _functional_model(spec: ModelSpec) -> tff.learning.models.FunctionalModel:
  """A `ModelSpec` as TFF's functional model."""

  def predict(training: bool):
    def fn(trainable, non_trainable, inputs, seed):
      weights = tff.learning.models.ModelWeights(list(trainable), list(non_trainable))
      called = spec.call(spec.values(weights, seed), inputs, training=training)
      if called.bad_inputs is None:
        return called.outputs
      nan = tf.constant(float('nan'), called.outputs.dtype)
      return tf.where(called.bad_inputs, nan, called.outputs)

    return graphs.placed(fn)

  predict_fns = {training: predict(training) for training in (False, True)}

  @tf.function(autograph=False)
  def predict_on_batch(model_weights, x, training):
    seed = tf.random.uniform([2], maxval=tf.int32.max, dtype=tf.int32)
    return predict_fns[bool(training)](*map(tuple, model_weights), x, seed)

  def loss(output, label, sample_weight=None):
    del sample_weight
    return graphs.placed(spec.supervised_loss)(label, output)

  def update(state, labels, batch_output, sample_weight=None):
    del sample_weight

    def fn(state, labels, predictions, num_examples, loss):
      mask = spec.metric_mask(labels, predictions)
      state = spec.metrics.update(state, labels, predictions, mask)
      loss_sum = loss * tf.cast(num_examples, loss.dtype)
      return spec.metrics.add_totals(state, loss_sum, num_examples, tf.constant(1))

    return graphs.placed(fn)(
        state, labels, batch_output.predictions, batch_output.num_examples,
        batch_output.loss,
    )

  def finalize(state):
    return collections.OrderedDict(
        (name, finalizer(state[name]))
        for name, finalizer in spec.metrics.finalizers().items()
    )

  return tff.learning.models.FunctionalModel(
      initial_weights=(
          tuple(spec.initial_weights.trainable),
          tuple(spec.initial_weights.non_trainable),
      ),
      predict_on_batch_fn=predict_on_batch,
      loss_fn=loss,
      metrics_fns=(
          tf.function(spec.metrics.initial_state, autograph=False),
          tf.function(update, autograph=False),
          tf.function(finalize, autograph=False),
      ),
      input_spec=spec.input_spec,
  )
