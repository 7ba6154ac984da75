"""What a Keras model does and holds, found by calling and tracing it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

import keras
import numpy as np
import tensorflow as tf

from tff_kd import graphs
from tff_kd import internals
from tff_kd.models import batches
from tff_kd.models import embeddings

PROBE_BATCH = 16
# Keras's name of the state of a `keras.random.SeedGenerator`.
_SEED_STATE = 'seed_generator_state'
# Operations that do not change the values.
_PASSING = frozenset(['Identity', 'Reshape', 'Cast', 'Squeeze', 'ExpandDims'])


class Layout(NamedTuple):
  """The places of a model's values among its `non_trainable_variables`."""

  statistics: tuple[int, ...]
  local: Mapping[int, np.ndarray]
  seeds: frozenset[int]
  constants: Mapping[int, np.ndarray]


def non_trainable_variables(model: keras.Model) -> list[keras.Variable]:
  """Returns Keras's list, and the states of recurrent layers, which are not in it."""
  variables = list(model.non_trainable_variables)
  listed = {id(v) for v in variables}
  return variables + [state for state in _states(model) if id(state) not in listed]


def _recurrent_layers(model: keras.Model) -> list[keras.layers.RNN]:
  """Returns the recurrent layers with `stateful=True`."""
  return [
      layer for layer in internals.all_layers(model)
      if isinstance(layer, keras.layers.RNN) and layer.stateful
  ]


def _states(model: keras.Model) -> list[keras.Variable]:
  """Returns the states of recurrent layers of a built model."""
  layers = [each for each in _recurrent_layers(model) if each.states is not None]
  return tf.nest.flatten([layer.states for layer in layers])


def reset_states(model: keras.Model) -> None:
  """Sets the states of recurrent layers to 0, as they are before any call."""
  for state in _states(model):
    state.assign(tf.zeros_like(state))


def call_model(
    model: keras.Model,
    trainable: Sequence[tf.Tensor],
    non_trainable: Sequence[tf.Tensor],
    inputs: Any,
    *,
    training: bool,
) -> tuple[tf.Tensor, list[tf.Tensor], list[tf.Tensor], list[tf.Tensor]]:
  """Calls a built model with values.

  Returns the outputs, the non-trainable values, the losses, and for each lookup in an
  embedding whether an id was not there.

  Unlike `keras.Model.stateless_call` it goes through `__call__`, so that layers know
  the mode of training, and inputs are cast, as in `fit`.
  """
  scope = keras.StatelessScope(
      [
          *zip(model.trainable_variables, trainable, strict=True),
          *zip(non_trainable_variables(model), non_trainable, strict=True),
      ],
      collect_losses=True,
  )
  # Keras's names of layers (`__mine`) may be none of TensorFlow's at the root of a graph.
  with tf.name_scope('model'), scope, embeddings.checked_ids(training=training) as bad:
    outputs = model(batches.by_name(model, inputs), training=training)
    own_losses = list(model.losses)
  after = [scope.get_current_value(v) for v in non_trainable_variables(model)]
  return outputs, after, own_losses, bad


class _Traced(NamedTuple):
  """Facts that the graph of a model shows.

  Attributes:
    layout: The `Layout`.
    activation: 'softmax' or 'sigmoid' if the model ends in one, else `None`.
    output_shape: The static shape of its outputs, the batch included.
    output_dtype: The dtype of its outputs.
    mask_shape: The static shape of Keras's mask of its outputs; `None` without one.
    has_ids: Whether embeddings look something up.
    has_losses: Whether its layers have losses of their own.
  """

  layout: Layout
  activation: Optional[str]
  output_shape: tf.TensorShape
  output_dtype: tf.DType
  mask_shape: Optional[tf.TensorShape]
  has_ids: bool
  has_losses: bool


def trace(
    model: keras.Model, inputs_spec: Any, batch_size: Optional[int], name: str
) -> _Traced:
  """Traces an inference and a training call of a built model."""
  variables = non_trainable_variables(model)
  moved, looked_up, own_losses, masks = [], [], [], []

  def calls(trainable, non_trainable, inputs):
    outputs, _, _, looked_up[:] = call_model(
        model, trainable, non_trainable, inputs, training=False
    )
    _, after, own_losses[:], _ = call_model(
        model, trainable, non_trainable, inputs, training=True
    )
    moved[:] = [
        i for i, (old, new) in enumerate(zip(non_trainable, after)) if new is not old
    ]
    masks[:] = [internals.keras_mask(outputs)]
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
  layout = _layout(model, variables, moved)
  output = traced.outputs[0]
  shape = output.shape
  if shape.rank is None:
    example = batches.example_of(inputs_spec, batch_size or PROBE_BATCH)
    shape = model(batches.by_name(model, example), training=False).shape
  return _Traced(
      layout,
      _last_activation(output),
      shape,
      output.dtype,
      None if masks[0] is None else masks[0].shape,
      bool(looked_up),
      bool(own_losses),
  )


def _layout(
    model: keras.Model, variables: Sequence[keras.Variable], moved: Sequence[int]
) -> Layout:
  """Tells a model's values apart, given the places of those that training changes."""
  recurrent = {id(state) for state in _states(model)}
  statistics = tuple(
      i
      for i in moved
      if tf.as_dtype(variables[i].dtype).is_floating and id(variables[i]) not in recurrent
  )
  return Layout(
      statistics=statistics,
      local={i: variables[i].numpy() for i in moved if i not in statistics},
      seeds=frozenset(i for i in moved if variables[i].name == _SEED_STATE),
      constants={i: v.numpy() for i, v in enumerate(variables) if i not in moved},
  )


def _last_activation(output: tf.Tensor) -> Optional[str]:
  """Returns 'softmax' or 'sigmoid' if a traced model ends in one, else `None`."""
  op = output.op
  while op.type in _PASSING:
    op = op.inputs[0].op
  return {'Softmax': 'softmax', 'Sigmoid': 'sigmoid'}.get(op.type)


def probe(
    keras_model: keras.Model, inputs_spec: Any, batch_size: int, name: str
) -> tf.Tensor:
  """Builds a model and returns its outputs for a random batch; its states stay 0."""
  rng = np.random.default_rng(0)
  try:
    example = batches.example_of(inputs_spec, batch_size, rng)
    outputs = keras_model(batches.by_name(keras_model, example), training=False)
  except Exception as error:
    tried = ''
    if any(not s.shape[1:].is_fully_defined() for s in tf.nest.flatten(inputs_spec)):
      tried = (
          f' It was tried with a length of {batches.UNKNOWN_DIMENSION}, as the spec has '
          'none: if the model takes one length only, give it in `keras.Input` or in the '
          'spec.'
      )
    raise ValueError(
        f'The {name} does not take inputs of the spec {inputs_spec}. Make the '
        f"model's inputs and the datasets' `element_spec` agree.{tried} Keras says: "
        f'{error}'
    ) from error
  reset_states(keras_model)
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


def fixed_batch(model: keras.Model, inputs_spec: Any) -> Optional[int]:
  """Returns the only batch size that a model takes; `None` if it takes any."""
  declared = [t.shape[0] for t in getattr(model, 'inputs', None) or ()]
  if declared and declared[0] is not None:
    return declared[0]
  if _recurrent_layers(model):
    return tf.nest.flatten(inputs_spec)[0].shape[0]
  return None
