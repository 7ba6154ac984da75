"""Keras builders in, functions of weights inside, Keras models back out.

`building.build_model_spec` calls a Keras builder once, eagerly, and checks the model
against its data and its loss. From then on it is a function: `ModelSpec.call` takes
values and inputs and returns outputs and values, within a `keras.StatelessScope`. Inside
of TFF's computations there are no variables.

What a model holds is told apart by what a step of training does to it:

- trainable weights take gradient steps;
- *statistics* (batch norm's moving averages) are numbers that a training call changes;
  they are averaged over clients like weights;
- *local* values (seeds of dropout, counters, states of recurrent layers) are reset in
  every local training; seeds are drawn from (seed, round, client);
- all else (frozen layers, adapted preprocessing) is constant: it never moves and never
  travels.
"""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import functools
from typing import Any, NamedTuple, Optional

from absl import logging
import keras
import numpy as np
import tensorflow as tf

from tff_kd import graphs
from tff_kd import internals
from tff_kd import losses
from tff_kd.compat import tff
from tff_kd.models import batches
from tff_kd.models import functional
from tff_kd.models import labels as labels_lib
from tff_kd.models import metrics as metrics_lib
from tff_kd.models import tracing

KerasModelFn = Callable[[], keras.Model]

# The reductions of a `keras.losses.Loss` whose divisor is not the number of losses.
_OVER_WEIGHTS = ('sum', 'mean_with_sample_weight')


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
    """The weights that remain after this training."""
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


class _Share(keras.losses.Loss):
  """The share of a batch's losses that have weight 1 and not 0, as Keras counts them."""

  def __init__(self, rank: int, dtype: Any):
    super().__init__(dtype=dtype)
    self._rank = rank

  def call(self, y_true, y_pred):
    return tf.ones(tf.shape(y_pred)[: self._rank])


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
    logits_shape: The static shape of one example's logits, with classes last; for a model
      whose outputs are separate labels, `[..., labels, 1]`.
    from_logits: Whether the model's outputs are logits (or probabilities).
    loss: The loss.
    metrics: The `Metrics`.
    is_regression: Whether the outputs are numbers to be fitted, not classes. They are
      then compared by the squared distance in place of the divergence of logits.
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
  _layout: tracing.Layout
  _loss_rank: int
  _outputs_dtype: tf.DType
  _mask_shape: Optional[tf.TensorShape]
  _has_losses: bool

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
    """The `weights_spec` of sums over clients, which has 32 bits in place of 16.

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
    variables = tracing.non_trainable_variables(self._model)
    return [variables[place] for place in self._layout.statistics]

  @property
  def layers(self) -> list[keras.layers.Layer]:
    """The layers of the model, to be called within `BoundModel.scope`."""
    return list(self._model.layers)

  @property
  def has_mask(self) -> bool:
    """Whether Keras masks some of the outputs as padding (`mask_zero`, `Masking`)."""
    return self._mask_shape is not None

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
    """Returns all values in the order of `tracing.non_trainable_variables`."""
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
    outputs, non_trainable, own_losses, bad = tracing.call_model(
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
    """Calls the model in inference mode in batches of the fixed size."""
    size = tf.shape(tf.nest.flatten(inputs)[0])[0]
    padding = -size % self.batch_size

    def batched(leaf: tf.Tensor) -> tf.Tensor:
      widths = [[0, padding]] + [[0, 0]] * (leaf.shape.rank - 1)
      return tf.reshape(
          tf.pad(leaf, widths), [-1, self.batch_size, *leaf.shape[1:]]
      )

    def call(batch: Any) -> tuple[tf.Tensor, tf.Tensor, Any]:
      called = self.call(values, batch)
      mask = internals.keras_mask(called.outputs) if self.has_mask else ()
      return called.outputs, called.bad_inputs if self.has_ids else False, mask

    def joined(batches: tf.Tensor, shape: tf.TensorShape) -> tf.Tensor:
      rows = tf.reshape(batches, tf.concat([[-1], tf.shape(batches)[2:]], axis=0))
      return tf.ensure_shape(rows, [None, *shape])[:size]

    batches, bad_inputs, masks = tf.map_fn(
        call,
        tf.nest.map_structure(batched, inputs),
        fn_output_signature=(
            tf.TensorSpec([self.batch_size, *self.outputs_shape], self._outputs_dtype),
            tf.TensorSpec([], tf.bool),
            tf.TensorSpec(self._mask_shape, tf.bool) if self.has_mask else (),
        ),
    )
    outputs = joined(batches, self.outputs_shape)
    if self.has_mask:
      internals.set_keras_mask(outputs, joined(masks, self._mask_shape[1:]))
    return Outputs(
        outputs, values, tf.zeros([]), tf.reduce_any(bad_inputs) if self.has_ids else None
    )

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
    with internals.eager_mode():  # Also where something is traced.
      example = batches.example_of(inputs_spec, self.batch_size or 1)
      return self.logits(self.initial_weights, example).shape[1:]

  def unmasked(
      self, values: ModelValues, inputs: Any, mask: Optional[tf.Tensor] = None
  ) -> Optional[tf.Tensor]:
    """Returns which outputs for some inputs count, before there are any outputs.

    In a graph, little of the model is computed for it.

    Args:
      values: The model's values.
      inputs: A batch of inputs.
      mask: As in `batches.unmasked`, whose result this is.
    """
    if not self.has_mask:
      return mask
    return batches.unmasked(self.call(values, inputs).outputs, mask)

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

  def sample_weight(self, batch: Any) -> Optional[tf.Tensor]:
    """Returns the weights of a batch's examples, or of their positions.

    Args:
      batch: A batch of the structure of `input_spec`.

    Returns:
      float32 with the axes of the outputs but the last, each of its size or of one;
      `None` if the batch has no weights.
    """
    weight = batches.sample_weight_of(batch)
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
      outputs: The model's outputs for it; those that Keras masks do not count.
      mask: Optional 0/1 float32 `[batch]`; the mean (or the sum, by the loss's
        `reduction`) is over the ones, and 0 where there are none.
      sample_weight: As `sample_weight` returns it: factors of the losses. As in Keras's
        `fit` the sum is divided by how many losses there are.
    """
    labels = labels_lib.with_axis_of_outputs(labels, outputs)
    counted = self.counted_labels(labels)
    if mask is None and counted is None:
      return self.loss(labels, outputs, sample_weight=sample_weight)
    if counted is not None:
      # The mean of Keras is 0 / 0 if all labels are ignored.
      usable = tf.where(counted > 0.0, labels, tf.zeros_like(labels))
      dtype = self.loss.dtype
      each = self.loss.call(tf.cast(usable, dtype), tf.cast(outputs, dtype))
      counted = losses.with_rank(counted, each.shape.rank)
      mask = batches.unmasked(outputs, mask)
      if mask is not None:
        counted *= losses.with_rank(mask, each.shape.rank)
      return self._reduced(each, counted, sample_weight)
    # For sequences, Keras would take weights `[batch]` for those of positions.
    weights = losses.with_rank(mask, self._loss_rank)
    if sample_weight is not None:
      weights = losses.with_rank(mask, sample_weight.shape.rank) * sample_weight
    loss = self.loss(labels, outputs, sample_weight=weights)
    if self._reduction in _OVER_WEIGHTS:
      return loss
    # Keras divides by the number of all losses (or by that of a Keras mask).
    share = _Share(self._loss_rank, self.loss.dtype)(
        labels, outputs, sample_weight=losses.with_rank(mask, self._loss_rank)
    )
    return tf.math.divide_no_nan(loss, tf.cast(share, loss.dtype))

  @property
  def _reduction(self) -> Optional[str]:
    return labels_lib.config_of(self.loss, 'reduction')

  def _reduced(
      self, each: tf.Tensor, counted: tf.Tensor, sample_weight: Optional[tf.Tensor]
  ) -> tf.Tensor:
    """Reduces the losses of all labels, of which `counted` (0/1) count, to one."""
    if self._reduction in _OVER_WEIGHTS and sample_weight is not None:
      counted *= losses.with_rank(sample_weight, counted.shape.rank)
      sample_weight = None
    if self._reduction == 'sum':
      return tf.reduce_sum(tf.math.multiply_no_nan(each, counted))
    return losses.weighted_mean(each, counted, sample_weight)

  def counted_labels(self, labels: Any) -> Optional[tf.Tensor]:
    """Returns which labels count, if the loss has an `ignore_class` (padding).

    Outputs that Keras masks are another thing, see `batches.unmasked`.

    Args:
      labels: A tensor of labels.

    Returns:
      0/1, float32 in the labels' shape; `None` if the loss ignores no class.
    """
    if self.ignored_label is None:
      return None
    return 1.0 - tf.cast(self._is_ignored(labels), tf.float32)

  def _is_ignored(self, labels: Any) -> tf.Tensor:
    """Returns which labels are the ignored one, bool in their shape."""
    # In a wide type: cast to a bool, -1 is True, and to a uint8, 255.
    wide = labels if labels.dtype.is_floating else tf.cast(labels, tf.int64)
    return tf.equal(wide, tf.cast(self.ignored_label, wide.dtype))

  def usable_labels(
      self, labels: Any, sample_weight: Optional[tf.Tensor] = None
  ) -> tuple[Any, tf.Tensor]:
    """Brings class indices into range, so that a bad one can't end the round.

    Args:
      labels: The labels of a batch.
      sample_weight: As `sample_weight` returns it for it.

    Returns:
      The labels, with those outside `[0, classes)` replaced by 0 (for a binary
      cross-entropy, those outside [0, 1]), and a boolean scalar that tells whether there
      were any. Labels of any other loss are not changed. The label of an example of
      weight 0 may be anything, and becomes 0; a weight that is negative or not finite
      counts as a bad label.
    """
    bad = tf.constant(False)
    if sample_weight is not None:
      bad = ~tf.reduce_all((sample_weight >= 0.0) & tf.math.is_finite(sample_weight))
    highest = labels_lib.highest_label(self.loss, self.outputs_shape)
    if highest is None:
      return labels, bad
    # In a wide type, as 256 is no uint8. NaN is not in range.
    wide = labels if labels.dtype.is_floating else tf.cast(labels, tf.int64)
    in_range = (wide >= 0) & (wide <= tf.cast(highest, wide.dtype))
    if self.ignored_label is not None:
      in_range |= self._is_ignored(labels)
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
      outputs: The model's outputs for it, `[batch, ..., classes]`; those that Keras
        masks do not count.
      mask: Optional 0/1 float32 of leading axes of the outputs: which of them count
        otherwise.
      sample_weight: As `sample_weight` returns it for it; those of weight 0 do not
        count.

    Returns:
      0/1 float32 `[batch, ...]`, one for each position; `None` if all of them count.
    """
    masks = [self.counted_labels(labels), batches.unmasked(outputs, mask)]
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
  def metric_update(self) -> graphs.TracedFunction:
    """Maps (state, labels, float32 outputs) of a batch to the metrics' next state."""
    return self._traced_metric_update([])

  @functools.cached_property
  def weighted_metric_update(self) -> graphs.TracedFunction:
    """`metric_update` with the sample weights as a fourth argument."""
    weights = tf.TensorSpec([None] * len(self.outputs_shape), tf.float32)
    return self._traced_metric_update([weights])

  @functools.cached_property
  def metric_scores(self) -> graphs.TracedFunction:
    """Maps a state of the metrics to `Metrics.scores`."""
    return graphs.TracedFunction(self.metrics.scores, [self._metric_state_spec])

  @property
  def _metric_state_spec(self) -> Any:
    return tf.nest.map_structure(
        tf.TensorSpec.from_tensor, self.metrics.initial_state()
    )

  def _traced_metric_update(
      self, weights: Sequence[tf.TensorSpec]
  ) -> graphs.TracedFunction:
    _, labels = batches.split_batch(self.input_spec)
    labels = tf.TensorSpec([None, *labels.shape[1:]], labels.dtype)
    outputs = tf.TensorSpec([None, *self.outputs_shape], tf.float32)

    def update(state, labels, outputs, sample_weight=None):
      if sample_weight is not None:
        labels, _ = self.usable_labels(labels, sample_weight)
      mask = self.metric_mask(labels, outputs, sample_weight=sample_weight)
      return self.metrics.update(state, labels, outputs, mask, sample_weight)

    specs = [self._metric_state_spec, labels, outputs, *weights]
    return graphs.TracedFunction(update, specs)

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
    # A subclassed model has no variables before its first call, which changes states.
    inputs_spec = batches.with_lengths_of(model, batches.split_batch(self.input_spec)[0])
    example = batches.example_of(inputs_spec, self.batch_size or 1)
    model(batches.by_name(model, example), training=False)
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
      tracing.non_trainable_variables(model)[place].assign(value)
    tracing.reset_states(model)

  def weights_of(self, model: keras.Model) -> tff.learning.models.ModelWeights:
    """Returns the weights of a model of the same builder.

    Args:
      model: A built Keras model.

    Returns:
      `ModelWeights` of NumPy arrays.
    """
    variables = dict(enumerate(tracing.non_trainable_variables(model)))
    return tff.learning.models.ModelWeights(
        trainable=[v.numpy() for v in model.trainable_variables],
        non_trainable=[
            variables[i].numpy() for i in self._layout.statistics if i in variables
        ],
    )

  @functools.cached_property
  def functional_model(self) -> tff.learning.models.FunctionalModel:
    """The model as `tff.learning` takes it (`build_weighted_fed_avg`, `build_fed_eval`).

    TFF averages trainable weights only, and statistics stay as they were. It leaves out
    the losses of the model's layers (regularizers, `add_loss`), of which a warning tells.

    Raises:
      ValueError: If there are sample weights or a mask of Keras's, which TFF would leave
        out.
    """
    if self.has_mask:
      raise ValueError(
          f'Keras masks outputs of the {self.name} (`mask_zero`, `Masking`), and '
          "TFF's own algorithms would count them, padding included. Take the algorithms "
          'of `tff_kd.algorithms`, or give padding a label that the loss ignores '
          '(`ignore_class`) and build the model without the mask.'
      )
    if batches.sample_weight_of(self.input_spec) is not None:
      raise ValueError(
          "TFF's own algorithms have no sample weights, and the `input_spec` has some: "
          f'{self.input_spec}. Take the algorithms of `tff_kd.algorithms`, or build the '
          'model with batches (x, y).'
      )
    if self._has_losses:
      logging.warning(
          "TFF's own algorithms train the %s without the losses of its layers "
          '(regularizers, `add_loss`). Those of `tff_kd.algorithms` train with them.',
          self.name,
      )
    return functional.functional_model(self)


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
        *zip(
            tracing.non_trainable_variables(model),
            self.spec._non_trainable(self.values),
        ),
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
