"""Labels and models of every kind: shared by tests, and an own task of the scripts.

As a task, --data_dir is a folder with a file `kind.json`: the names of labels and model,
whether the data have clients of their own, and whether examples have sample weights.
"""

import dataclasses
import json
import pathlib
from typing import NamedTuple

import keras
import numpy as np

from tff_kd import data

DIM, POSITIONS = 5, 4
_DIRECTIONS = np.random.default_rng(0).normal(size=(DIM, 3))
# Of flags of pipelines.train.
DEFAULTS = {
    'client_learning_rate': 0.3, 'batch_size': 10, 'client_epochs': 1, 'server_steps': 20,
    'server_batch_size': 20, 'transfer_size': 60,
}


class Labels(NamedTuple):
  """Labels, and a loss for them.

  Attributes:
    of: Makes labels of the scores of three directions, `[..., 3]`.
    loss_fn: The loss.
    units: How many outputs the model has.
    activation: In which it ends.
  """

  of: object
  loss_fn: object
  units: int = 3
  activation: object = None

  def examples(self, n, seed, per_position=False):
    """Inputs `[n, DIM]` or `[n, POSITIONS, DIM]`, and their labels."""
    shape = (n, POSITIONS, DIM) if per_position else (n, DIM)
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return x, self.of(x @ _DIRECTIONS)


def _best(scores):
  return scores.argmax(axis=-1)


def _is_positive(scores):
  return scores[..., 0] > 0


def _sparse():
  return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _binary(from_logits=True):
  return lambda: keras.losses.BinaryCrossentropy(from_logits=from_logits)


LABELS = {
    'class numbers': Labels(lambda s: _best(s).astype(np.int32), _sparse),
    'class numbers, uint8': Labels(lambda s: _best(s).astype(np.uint8), _sparse),
    'class numbers, [n, 1]': Labels(lambda s: _best(s)[..., np.newaxis], _sparse),
    'bool as class numbers': Labels(_is_positive, _sparse, units=2),
    'one-hot': Labels(
        lambda s: np.eye(3, dtype=np.float32)[_best(s)],
        lambda: keras.losses.CategoricalCrossentropy(from_logits=True),
    ),
    'one-hot, softmax': Labels(
        lambda s: np.eye(3, dtype=np.int32)[_best(s)],
        keras.losses.CategoricalCrossentropy, activation='softmax',
    ),
    'one-hot, hinge': Labels(
        lambda s: np.eye(3, dtype=np.float32)[_best(s)], keras.losses.CategoricalHinge
    ),
    'binary, [n]': Labels(
        lambda s: _is_positive(s).astype(np.int32), _binary(), units=1
    ),
    'binary, float [n]': Labels(
        lambda s: _is_positive(s).astype(np.float32), _binary(), units=1
    ),
    'binary, float [n, 1]': Labels(
        lambda s: _is_positive(s)[..., np.newaxis].astype(np.float32), _binary(),
        units=1,
    ),
    'binary, bool, sigmoid': Labels(
        _is_positive, _binary(from_logits=False), units=1, activation='sigmoid'
    ),
    'binary, hinge': Labels(
        lambda s: np.where(_is_positive(s), 1, -1)[..., np.newaxis], keras.losses.Hinge,
        units=1,
    ),
    'binary, hinge, [n]': Labels(
        lambda s: np.where(_is_positive(s), 1, -1), keras.losses.Hinge, units=1
    ),
    # All three agree: as classes of a softmax they would share one.
    'several': Labels(
        lambda s: np.repeat(_is_positive(s)[..., np.newaxis], 3, -1).astype(np.int32),
        _binary(),
    ),
    'several, sigmoid': Labels(
        lambda s: (s > 0).astype(np.float32), _binary(from_logits=False),
        activation='sigmoid',
    ),
}


class Subclassed(keras.Model):
  """Registered nowhere, unbuilt until it is called."""

  def __init__(self, units, activation):
    super().__init__()
    self.hidden = keras.layers.Dense(6, activation='relu')
    self.head = keras.layers.Dense(units, activation=activation)

  def call(self, inputs):
    return self.head(self.hidden(inputs))


def _functional(units, activation):
  inputs = keras.Input((DIM,))
  x = keras.layers.Dense(6, activation='relu')(inputs)
  x = keras.layers.Concatenate()([x, inputs])
  return keras.Model(inputs, keras.layers.Dense(units, activation=activation)(x))


def _batch_norm(units, activation):
  return keras.Sequential([
      keras.Input((DIM,)), keras.layers.Dense(6), keras.layers.BatchNormalization(),
      keras.layers.ReLU(), keras.layers.Dense(units, activation=activation),
  ])


def _per_position(units, activation):
  return keras.Sequential([
      keras.Input((POSITIONS, DIM)), keras.layers.Dense(6, activation='relu'),
      keras.layers.Dense(units, activation=activation),
  ])


# By name: (units, activation) -> a new model.
MODELS = {
    'functional': _functional, 'subclassed': Subclassed, 'batch norm': _batch_norm,
    'per position': _per_position,
}


def load(*, data_dir, **kwargs):
  kind = json.loads((pathlib.Path(data_dir) / 'kind.json').read_text())
  labels, build = LABELS[kind['labels']], MODELS[kind['model']]

  def examples(n, seed):
    x, y = labels.examples(n, seed, kind['model'] == 'per position')
    if not kind.get('has_weights', False):
      return data.Examples(x, y)
    # Every sixth is padding, whose label is none.
    weights = np.resize(np.float32([1, 0.5, 2, 1, 0, 1.5]), n)
    y[weights == 0] = -1
    return data.Examples(x, y, weights)

  def model_fn():
    return build(labels.units, labels.activation)

  task = data.task_from_clients(
      'label_kinds', clients=[examples(60, k) for k in range(4)],
      server=examples(120, 99), num_classes=max(labels.units, 2),
      loss_fn=labels.loss_fn, metrics_fn=lambda: [], students={'small': model_fn},
      teachers={'large': model_fn}, **kwargs,
  )
  if kind.get('has_clients', True):
    return task
  return dataclasses.replace(task, client_rows=None, test_rows=None)
