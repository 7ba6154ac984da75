"""Builds specs of Keras models, and checks what they are built of."""

from collections.abc import Callable
import inspect
from typing import Any, Optional

import keras

from tff_kd.compat import tff
from tff_kd.models import batches
from tff_kd.models import labels as labels_lib
from tff_kd.models import metrics as metrics_lib
from tff_kd.models import spec as spec_lib
from tff_kd.models import tracing

LossFn = Callable[[], keras.losses.Loss]
_LOSS_EXAMPLE = 'lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True)'


def build_model_spec(
    keras_model_fn: spec_lib.KerasModelFn,
    *,
    input_spec: Any,
    loss_fn: LossFn,
    metrics_fn: Optional[metrics_lib.MetricsFn] = None,
    name: str = 'model',
) -> spec_lib.ModelSpec:
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
  input_spec = batches.check_input_spec(input_spec)
  inputs_spec, labels_spec = batches.split_batch(input_spec)
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
  batch_size = tracing.fixed_batch(model, inputs_spec)
  probe_size = batch_size or tracing.PROBE_BATCH
  inputs_spec = batches.with_lengths_of(model, inputs_spec)
  outputs = tracing.probe(model, inputs_spec, probe_size, name)
  labels_spec = batches.with_lengths(labels_spec, outputs.shape)
  labels = batches.example_of(labels_spec, probe_size)
  weight_spec = batches.sample_weight_of(input_spec)
  loss_rank = labels_lib.check_loss(loss, labels, outputs, name)
  if weight_spec is not None:
    weight_spec = batches.with_lengths(weight_spec, outputs.shape)
    weight = batches.example_of(weight_spec, probe_size)
    labels_lib.check_sample_weight(loss, labels, outputs, weight)
  traced = tracing.trace(model, inputs_spec, batch_size, name)
  if not model.trainable_variables:
    raise ValueError(
        f'The {name} has no trainable weights: there is nothing to train. Leave some of '
        'its layers with `trainable=True`.'
    )
  is_regression = isinstance(loss, labels_lib.REGRESSION_LOSSES)
  outputs_shape = traced.output_shape[1:]
  logits_shape = outputs_shape
  if outputs_shape[-1] != 1 and isinstance(loss, labels_lib.BINARY_LOSSES):
    logits_shape = outputs_shape.concatenate([1])
  from_logits = is_regression or labels_lib.check_from_logits(
      loss, traced.activation, name
  )
  variables = tracing.non_trainable_variables(model)
  return spec_lib.ModelSpec(
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
      ignored_label=labels_lib.config_of(loss, 'ignore_class'),
      batch_size=batch_size,
      has_ids=traced.has_ids,
      _model=model,
      _layout=traced.layout,
      _loss_rank=loss_rank,
      _outputs_dtype=traced.output_dtype,
      _mask_shape=traced.mask_shape,
      _has_losses=traced.has_losses,
  )


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
  except ValueError:  # It has no signature to inspect.
    pass
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


def _build_keras_model(keras_model_fn: spec_lib.KerasModelFn, name: str) -> keras.Model:
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
