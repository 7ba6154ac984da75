"""Keras builders in, TFF models inside, weights back out into Keras models.

`build_model_spec` calls a Keras builder once, eagerly, to check it and to read
its shapes and initial weights; inside TFF computations the builder is called
again and wrapped as a `KerasModel`, a `tff.learning.models.VariableModel` that
takes any Keras model with one output: sequential, functional or subclassed, with
several inputs, dropout, batch norm, regularisation losses and frozen layers.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any, Optional

import keras
import numpy as np
import tensorflow as tf
from tff_kd.compat import tff

from tff_kd import graphs
from tff_kd import losses

KerasModelFn = Callable[[], keras.Model]
LossFn = Callable[[], keras.losses.Loss]
MetricsFn = Callable[[], Sequence[keras.metrics.Metric]]

_PROBE_BATCH = 16
_UNKNOWN_DIMENSION = 16


def split_batch(batch: Any) -> tuple[Any, Any]:
  """Returns the (inputs, labels) of a batch or of an `input_spec`."""
  if isinstance(batch, Mapping):
    return batch['x'], batch['y']
  return batch[0], batch[1]


class KerasModel(tff.learning.models.VariableModel):
  """A Keras model, its loss and its metrics as a TFF model.

  Not built by hand: `ModelSpec.model_fn` returns fresh ones.
  """

  def __init__(
      self,
      keras_model: keras.Model,
      *,
      input_spec: Any,
      loss: keras.losses.Loss,
      metrics_fn: Optional[MetricsFn],
      from_logits: bool,
  ):
    self._keras_model = keras_model
    self._input_spec = input_spec
    self._loss = loss
    self._from_logits = from_logits
    self._ignored_label = _ignored_label(loss)
    self._metric_constructors = _metric_constructors(metrics_fn)
    self._metrics = collections.OrderedDict(
        (name, make()) for name, make in self._metric_constructors.items()
    )

  @property
  def keras_model(self) -> keras.Model:
    return self._keras_model

  @property
  def is_regression(self) -> bool:
    return _is_regression(self._loss)

  @property
  def trainable_variables(self):
    return self._keras_model.trainable_variables

  @property
  def non_trainable_variables(self):
    return self._keras_model.non_trainable_variables

  @property
  def statistics(self) -> list[tf.Variable]:
    """Float variables that layers keep themselves (batch norm's moving averages).

    They are averaged over clients like weights. A frozen layer's weights are not
    among them: they never change.
    """
    return [
        v for v in self.non_trainable_variables
        if v.dtype.is_floating and not v.trainable
    ]

  @property
  def local_variables(self):
    return [v for m in self._metrics.values() for v in m.variables]

  @property
  def input_spec(self):
    return self._input_spec

  def weights(self) -> tff.learning.models.ModelWeights:
    return tff.learning.models.ModelWeights.from_model(self)

  def assign(self, weights: tff.learning.models.ModelWeights) -> None:
    """Assigns weights of the same structure to the model's variables."""
    for variables, values in (
        (self.trainable_variables, weights.trainable),
        (self.non_trainable_variables, weights.non_trainable),
    ):
      for variable, value in zip(variables, values, strict=True):
        variable.assign(value)

  def supervised_loss(
      self, labels: Any, outputs: tf.Tensor, mask: Optional[tf.Tensor] = None
  ) -> tf.Tensor:
    """The user's loss on the model's outputs, without regularisation.

    Args:
      labels: The labels of a batch.
      outputs: The model's outputs for it.
      mask: Optional 0/1 float32 `[batch]`; the mean is over the ones, and 0 where
        there are none.
    """
    if self.is_regression and labels.shape.rank == outputs.shape.rank - 1:
      # Else Keras squeezes the outputs, and has one loss for the whole batch.
      labels = labels[..., tf.newaxis]
    counted = self.counted_labels(labels)
    if mask is None and counted is None:
      return self._loss(y_true=labels, y_pred=outputs)
    if counted is not None:
      # Keras's own mean over what is not ignored is 0 / 0 where all of it is.
      weights = counted
      if mask is not None:
        weights *= tf.reshape(mask, [-1] + [1] * (counted.shape.rank - 1))
      each = keras.losses.sparse_categorical_crossentropy(
          tf.where(counted > 0.0, labels, tf.zeros_like(labels)),
          outputs, from_logits=self._from_logits,
      )
      return losses.weighted_mean(each, weights)
    loss = self._loss(y_true=labels, y_pred=outputs, sample_weight=mask)
    # Keras divides by the size of the batch, not by the sum of the weights.
    size = tf.cast(tf.shape(mask)[0], loss.dtype)
    return tf.math.divide_no_nan(loss * size, tf.reduce_sum(mask))

  def counted_labels(self, labels: Any) -> Optional[tf.Tensor]:
    """0/1 float32 in the labels' shape: 0 at the loss's `ignore_class` (padding).

    `None` where the loss ignores no class: all labels count.
    """
    if self._ignored_label is None:
      return None
    ignored = tf.equal(labels, tf.cast(self._ignored_label, labels.dtype))
    return 1.0 - tf.cast(ignored, tf.float32)

  def regularization_loss(self) -> tf.Tensor:
    """The sum of the layers' own losses, after a call of the model."""
    return tf.add_n([tf.zeros([])] + list(self._keras_model.losses))

  def class_logits(self, outputs: tf.Tensor) -> tf.Tensor:
    """The outputs as float32 logits; a softmax model's as log-probabilities."""
    outputs = tf.cast(outputs, tf.float32)
    if self._from_logits:
      return outputs
    return losses.logits_from_probabilities(outputs)

  def logits(self, inputs: Any) -> tf.Tensor:
    """Predictions in inference mode, as float32 logits `[batch, ..., classes]`."""
    return self.class_logits(self._keras_model(inputs, training=False))

  def usable_labels(
      self, labels: Any, outputs_shape: tf.TensorShape
  ) -> tuple[Any, tf.Tensor]:
    """Brings class indices into range, so that a bad one can't end the round.

    Args:
      labels: The labels of a batch.
      outputs_shape: The static shape of the model's outputs.

    Returns:
      The labels, with those outside `[0, classes)` replaced by 0, and a boolean
      scalar that tells whether there were any. Labels of a loss other than
      `SparseCategoricalCrossentropy` pass as they are.
    """
    if not isinstance(self._loss, keras.losses.SparseCategoricalCrossentropy):
      return labels, tf.constant(False)
    classes = tf.cast(outputs_shape[-1], labels.dtype)
    # Also False for NaN, where labels are floats.
    in_range = tf.logical_and(labels >= 0, labels < classes)
    if self._ignored_label is not None:
      in_range = tf.logical_or(
          in_range, tf.equal(labels, tf.cast(self._ignored_label, labels.dtype))
      )
    return (
        tf.where(in_range, labels, tf.zeros_like(labels)),
        tf.logical_not(tf.reduce_all(in_range)),
    )

  def update_metrics(
      self, labels: Any, outputs: tf.Tensor, mask: Optional[tf.Tensor] = None
  ) -> None:
    """Updates the user's metrics by a batch.

    Args:
      labels: The labels of the batch.
      outputs: The model's outputs for it.
      mask: Optional 0/1 float32 `[batch]`: which labels count.
    """
    counted = self.counted_labels(labels)
    if counted is not None and mask is not None:
      mask = counted * tf.reshape(mask, [-1] + [1] * (counted.shape.rank - 1))
    elif counted is not None:
      mask = counted
    weights = {} if mask is None else {'sample_weight': mask}
    for name, metric in self._metrics.items():
      if self._metric_constructors[name] not in _TOTALS:
        metric.update_state(y_true=labels, y_pred=outputs, **weights)

  def add_totals(
      self, loss_sum: tf.Tensor, num_examples: tf.Tensor, num_batches: tf.Tensor
  ) -> None:
    """Adds to the metrics that are plain sums, for one batch or for many.

    Args:
      loss_sum: The sum over examples of the loss.
      num_examples: How many.
      num_batches: In how many batches.
    """
    for name, metric in self._metrics.items():
      make = self._metric_constructors[name]
      if make is _LossMean:
        metric.add(loss_sum, num_examples)
      elif make is tff.learning.metrics.NumExamplesCounter:
        metric.variables[0].assign_add(tf.cast(num_examples, tf.int64))
      elif make is tff.learning.metrics.NumBatchesCounter:
        metric.variables[0].assign_add(tf.cast(num_batches, tf.int64))

  @graphs.function
  def predict_on_batch(self, batch_input, training=True):
    return self._keras_model(batch_input, training=training)

  @graphs.function
  def forward_pass(self, batch_input, training=True):
    inputs, labels = split_batch(batch_input)
    outputs = self._keras_model(inputs, training=training)
    loss = self.supervised_loss(labels, outputs) + self.regularization_loss()
    num_examples = tf.shape(outputs)[0]
    self.update_metrics(labels, outputs)
    self.add_totals(
        loss * tf.cast(num_examples, loss.dtype), num_examples, tf.constant(1)
    )
    return tff.learning.models.BatchOutput(
        loss=loss, predictions=outputs, num_examples=num_examples
    )

  @graphs.function
  def report_local_unfinalized_metrics(self):
    return collections.OrderedDict(
        (name, [v.read_value() for v in metric.variables])
        for name, metric in self._metrics.items()
    )

  def metric_finalizers(self):
    return collections.OrderedDict(
        (name, tff.learning.metrics.create_keras_metric_finalizer(make))
        for name, make in self._metric_constructors.items()
    )

  @graphs.function
  def reset_metrics(self):
    for metric in self._metrics.values():
      metric.reset_state()

  def reset_metrics_unless(self, condition: tf.Tensor) -> None:
    """Forgets what was counted, unless a bool scalar is true."""

    def reset() -> bool:
      self.reset_metrics()
      return False

    tf.cond(condition, lambda: True, reset)


class _LossMean(keras.metrics.Mean):
  """The mean loss of an example."""

  def __init__(self, name='loss', dtype=None):
    super().__init__(name, dtype)

  def add(self, loss_sum: tf.Tensor, num_examples: tf.Tensor) -> None:
    self.total.assign_add(tf.cast(loss_sum, self.total.dtype))
    self.count.assign_add(tf.cast(num_examples, self.count.dtype))


# Always reported, unless the user has a metric of that name. As sums they are kept by
# the training loop itself: in every step they would cost as much as a small layer.
_TOTALS = (
    tff.learning.metrics.NumExamplesCounter,
    tff.learning.metrics.NumBatchesCounter,
    _LossMean,
)


def _metric_constructors(
    metrics_fn: Optional[MetricsFn],
) -> dict[str, Callable[[], keras.metrics.Metric]]:
  """The user's metrics by name, and the totals where they are missing."""
  metrics = list(metrics_fn()) if metrics_fn is not None else []
  constructors = collections.OrderedDict()
  for index, metric in enumerate(metrics):
    if not isinstance(metric, keras.metrics.Metric):
      raise TypeError(
          '`metrics_fn` must return a list of `keras.metrics.Metric`, found '
          f'{metric!r} in it.'
      )
    if metric.name in constructors or metric.name == 'loss':
      raise ValueError(
          f'`metrics_fn` returns a metric named {metric.name!r}, which is taken. '
          'Give each metric its own `name`; "loss" is always reported.'
      )
    constructors[metric.name] = lambda index=index: list(metrics_fn())[index]
  for make in _TOTALS:
    constructors.setdefault(make().name, make)
  return constructors


@dataclasses.dataclass(frozen=True)
class ModelSpec:
  """A checked Keras builder: what TFF computations need to know of it.

  Attributes:
    name: What error messages call the model ('student', 'teacher').
    model_fn: Returns a fresh `KerasModel`; also fits every `model_fn` argument of
      `tff.learning` (`build_fed_eval`, `build_weighted_fed_avg`).
    blank_model_fn: The same with trainable weights of zero, for computations that
      assign them: drawing random ones would take longer than a step.
    input_spec: The (inputs, labels) structure of `tf.TensorSpec`, batched.
    weights_type: The TFF type of the model's `ModelWeights`.
    initial_weights: The builder's own initial weights, as NumPy arrays.
    logits_shape: The static shape of one example's logits, classes last.
    from_logits: Whether the model's outputs are logits (or probabilities).
    is_regression: Whether the outputs are numbers to be fitted, not classes. They are
      then compared by their squared distance wherever logits are by their divergence.
    ignored_label: The label that counts nowhere (padding), if the loss has one.
  """

  name: str
  model_fn: Callable[[], KerasModel]
  blank_model_fn: Callable[[], KerasModel]
  input_spec: Any
  weights_type: tff.StructType
  initial_weights: tff.learning.models.ModelWeights
  logits_shape: tf.TensorShape
  from_logits: bool
  is_regression: bool = False
  ignored_label: Optional[int] = None


def build_model_spec(
    keras_model_fn: KerasModelFn,
    *,
    input_spec: Any,
    loss_fn: LossFn,
    metrics_fn: Optional[MetricsFn] = None,
    name: str = 'model',
) -> ModelSpec:
  """Checks a Keras builder against its data and its loss.

  Args:
    keras_model_fn: A no-argument function that returns a new `keras.Model`
      on each call, with one output tensor `[batch, ..., classes]`. The weights
      of its first model become the initial weights, so a builder may load
      trained ones; call `keras.utils.set_random_seed` before for
      reproducible ones.
    input_spec: What the clients' datasets yield, e.g. `dataset.element_spec`: a
      pair `(x, y)` or a mapping with keys 'x' and 'y', batched; `x` may be a
      structure of several inputs.
    loss_fn: A no-argument function that returns a `keras.losses.Loss`.
    metrics_fn: An optional no-argument function that returns a list of new
      `keras.metrics.Metric`s.
    name: What error messages call the model.

  Returns:
    A `ModelSpec`.

  Raises:
    TypeError: If an argument has the wrong type.
    ValueError: If the builder returns one model (or shares variables) twice, if
      the model does not take inputs of `input_spec`, has several outputs, or if
      its outputs contradict the loss: probabilities under `from_logits=True`,
      or logits under a cross-entropy with `from_logits=False`.
  """
  input_spec = _checked_input_spec(input_spec)
  inputs_spec, labels_spec = split_batch(input_spec)
  if not callable(keras_model_fn) or isinstance(keras_model_fn, keras.Model):
    raise TypeError(
        f'The {name} must be a function that returns a new `keras.Model`, '
        f'found {keras_model_fn!r}. Wrap the construction of the model: '
        '`def build(): return keras.Sequential([...])`.'
    )
  keras_model, second = keras_model_fn(), keras_model_fn()
  for model in (keras_model, second):
    if not isinstance(model, keras.Model):
      raise TypeError(
          f'The {name} builder must return a `keras.Model`, found '
          f'{type(model).__name__}.'
      )
  if keras_model is second:
    raise ValueError(
        f'The {name} builder returned the same model twice. It must construct a '
        'new model on every call, because each TFF computation needs its own '
        'variables.'
    )
  loss = loss_fn()
  if not isinstance(loss, keras.losses.Loss):
    raise TypeError(
        '`loss_fn` must return a `keras.losses.Loss`, found '
        f'{type(loss).__name__}.'
    )

  outputs = _probe(keras_model, inputs_spec, name)
  _probe(second, inputs_spec, name)
  if {v.ref() for v in keras_model.variables} & {
      v.ref() for v in second.variables
  }:
    raise ValueError(
        f'Two models of the {name} builder share variables. Construct every '
        'layer inside the builder.'
    )
  _check_loss(loss, labels_spec, outputs, name)
  is_regression = _is_regression(loss)
  from_logits = is_regression or _check_from_logits(loss, outputs, name)

  def model_fn() -> KerasModel:
    model = keras_model_fn()
    # Subclassed models have no variables before their first call.
    model(_example(inputs_spec, batch_size=1), training=False)
    return KerasModel(
        model,
        input_spec=input_spec,
        loss=loss_fn(),
        metrics_fn=metrics_fn,
        from_logits=from_logits,
    )

  def blank_model_fn() -> KerasModel:
    blank = []
    with tf.variable_creator_scope(functools.partial(_create_blank, blank)):
      model = model_fn()
    if {v.ref() for v in blank} <= {v.ref() for v in model.keras_model.variables}:
      return model
    # The builder keeps a weight where Keras, and so `assign`, does not see it.
    return model_fn()

  with tf.Graph().as_default():
    weights_type = tff.learning.models.weights_type_from_model(blank_model_fn())

  return ModelSpec(
      name=name,
      model_fn=model_fn,
      blank_model_fn=blank_model_fn,
      input_spec=input_spec,
      weights_type=weights_type,
      initial_weights=weights_of(keras_model),
      logits_shape=outputs.shape[1:],
      from_logits=from_logits,
      is_regression=is_regression,
      ignored_label=_ignored_label(loss),
  )


def _create_blank(blank: list[tf.Variable], create_fn, **kwargs) -> tf.Variable:
  """A variable creator that starts trainable variables at zero."""
  shape, dtype = kwargs.get('shape'), kwargs.get('dtype')
  is_blank = (
      kwargs.get('trainable')
      and callable(kwargs.get('initial_value'))
      and dtype is not None
      and shape is not None
      and tf.TensorShape(shape).is_fully_defined()
  )
  if not is_blank:
    return create_fn(**kwargs)
  variable = create_fn(
      **{**kwargs, 'initial_value': lambda: tf.zeros(shape, dtype)}
  )
  blank.append(variable)
  return variable


def weights_of(keras_model: keras.Model) -> tff.learning.models.ModelWeights:
  """The weights of a built Keras model as a value for `set_model_weights`."""
  return tff.learning.models.ModelWeights(
      trainable=[v.numpy() for v in keras_model.trainable_variables],
      non_trainable=[v.numpy() for v in keras_model.non_trainable_variables],
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


def _is_regression(loss: keras.losses.Loss) -> bool:
  return isinstance(loss, _REGRESSION_LOSSES)


def _ignored_label(loss: keras.losses.Loss) -> Optional[int]:
  return getattr(loss, '_fn_kwargs', {}).get('ignore_class')


def check_has_classes(spec: ModelSpec, what: str) -> None:
  """Refuses a regression model where something is about classes.

  Raises:
    ValueError: If the model's outputs are numbers.
  """
  if spec.is_regression:
    raise ValueError(
        f'{what} is about classes, and the {spec.name} is a regression model (by its '
        'loss). Use an algorithm and a consensus that compare outputs as they are: '
        'fed_avg, fed_prox, fed_gkd, fed_kd, fml, fed_df, fed_distillation or fed_md, '
        'with mean_logits.'
    )


def check_same_outputs(first: ModelSpec, second: ModelSpec) -> None:
  """Refuses a pair whose predictions cannot be compared.

  Raises:
    ValueError: If the output shapes differ.
  """
  if first.logits_shape.as_list() != second.logits_shape.as_list():
    raise ValueError(
        f'The {first.name} and the {second.name} must have outputs of the same shape '
        f'to learn from each other, found {first.logits_shape} and '
        f'{second.logits_shape} (an example, without batch).'
    )


def _checked_input_spec(input_spec: Any) -> Any:
  """The pair or mapping of `tf.TensorSpec`s, or a clear error."""
  is_mapping = isinstance(input_spec, Mapping)
  is_pair = isinstance(input_spec, (tuple, list)) and len(input_spec) == 2
  if not ((is_mapping and set(input_spec) == {'x', 'y'}) or is_pair):
    raise ValueError(
        '`input_spec` must describe batches as a pair (x, y) or a mapping with '
        f"exactly the keys 'x' and 'y', found {input_spec!r}. Pass the clients' "
        '`dataset.element_spec`.'
    )
  for spec in tf.nest.flatten(input_spec):
    if not isinstance(spec, tf.TensorSpec):
      raise TypeError(
          f'`input_spec` must hold only `tf.TensorSpec`s, found {spec!r}.'
      )
    if spec.shape.rank is None or spec.shape.rank < 1:
      raise ValueError(
          f'`input_spec` must have a batch dimension, found {spec!r}. Call '
          '`.batch(...)` on the datasets.'
      )
  if is_mapping:
    return collections.OrderedDict(x=input_spec['x'], y=input_spec['y'])
  return tuple(input_spec)


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


def _probe(keras_model: keras.Model, inputs_spec: Any, name: str) -> tf.Tensor:
  """The model's outputs on a random batch, with their static shape."""
  rng = np.random.default_rng(0)
  try:
    outputs = keras_model(
        _example(inputs_spec, _PROBE_BATCH, rng), training=False
    )
  except Exception as error:
    raise ValueError(
        f'The {name} does not take inputs of the spec {inputs_spec}. Make the '
        "model's inputs and the datasets' `element_spec` agree. Keras says: "
        f'{error}'
    ) from error
  if not tf.is_tensor(outputs) or not outputs.dtype.is_floating:
    raise ValueError(
        f'The {name} must have one floating-point output tensor, found '
        f'{tf.nest.map_structure(lambda t: getattr(t, "shape", t), outputs)}.'
    )
  if outputs.shape.rank < 2 or outputs.shape[0] != _PROBE_BATCH:
    raise ValueError(
        f'The {name} must return outputs of shape [batch, ..., classes], found '
        f'{outputs.shape} for a batch of {_PROBE_BATCH}.'
    )
  return outputs


def _check_loss(loss, labels_spec, outputs, name) -> None:
  labels = _example(labels_spec, _PROBE_BATCH)
  try:
    value = loss(labels, outputs)
  except Exception as error:
    raise ValueError(
        f'The loss {type(loss).__name__} does not take labels of the spec '
        f'{labels_spec} with outputs of shape {outputs.shape} of the {name}. '
        f'Keras says: {error}'
    ) from error
  if value.shape.rank != 0:
    raise ValueError(
        f'The loss {type(loss).__name__} must return a scalar, found the shape '
        f'{value.shape}. Leave its `reduction` at the default.'
    )


def _check_from_logits(loss, outputs: tf.Tensor, name: str) -> bool:
  """Whether the outputs are logits; refuses a loss that takes them otherwise."""
  if outputs.shape[-1] == 1:
    looks_like = bool(
        tf.reduce_all((outputs > 0.0) & (outputs < 1.0))
    )
    activation = 'sigmoid'
  else:
    sums = tf.reduce_sum(outputs, axis=-1)
    looks_like = bool(
        tf.reduce_all(outputs >= 0.0)
        & tf.reduce_all(tf.abs(sums - 1.0) < 1e-3)
    )
    activation = 'softmax'
  from_logits = getattr(loss, '_fn_kwargs', {}).get(
      'from_logits', getattr(loss, 'from_logits', None)
  )
  if from_logits and looks_like:
    raise ValueError(
        f'The {name} ends in {activation} (its outputs are probabilities), but '
        f'{type(loss).__name__} has from_logits=True and would apply {activation}'
        f' again. Remove the last activation of the {name}, or build the loss '
        'with from_logits=False.'
    )
  if from_logits is False and not looks_like:
    raise ValueError(
        f'{type(loss).__name__} has from_logits=False and expects probabilities, '
        f'but the outputs of the {name} are not probabilities. Build the loss '
        f'with from_logits=True, or end the {name} in {activation}.'
    )
  return not looks_like if from_logits is None else bool(from_logits)
