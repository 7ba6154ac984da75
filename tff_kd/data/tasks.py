"""What a task is: data in four disjoint parts, a loss and metrics."""

from collections.abc import Sequence
import dataclasses
from typing import NamedTuple

import numpy as np
import tensorflow as tf


class Examples(NamedTuple):
  """Inputs and labels, parallel along the first axis.

  Attributes:
    inputs: float32 `[n, ...]`.
    labels: int32 `[n]`.
  """

  inputs: np.ndarray
  labels: np.ndarray

  def take(self, rows: np.ndarray) -> 'Examples':
    return Examples(self.inputs[rows], self.labels[rows])

  def __len__(self) -> int:  # Of examples, not of fields.
    return len(self.labels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """A classification task. The four parts share no example.

  Attributes:
    name: As in the registry.
    clients: The pool that is split over the clients.
    transfer: The server's examples for the transfer set (and for central
      pre-training, which uses their labels).
    validation: For choosing the best round.
    test: For reporting only.
    num_classes: How many classes.
  """

  name: str
  clients: Examples
  transfer: Examples
  validation: Examples
  test: Examples
  num_classes: int

  @property
  def input_shape(self) -> Sequence[int]:
    return self.clients.inputs.shape[1:]

  def loss_fn(self) -> tf.keras.losses.Loss:
    return tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)

  def metrics_fn(self) -> list[tf.keras.metrics.Metric]:
    return [tf.keras.metrics.SparseCategoricalAccuracy(name='accuracy')]


def split_examples(
    examples: Examples, sizes: Sequence[int], *, seed: int
) -> list[Examples]:
  """Cuts off random parts of the given sizes; the last part returned is the rest.

  Args:
    examples: All examples.
    sizes: Of all parts but the last.
    seed: Decides the order.

  Raises:
    ValueError: If the sizes leave nothing for the rest.
  """
  if min(sizes, default=0) < 0 or sum(sizes) >= len(examples):
    raise ValueError(
        f'Parts of {list(sizes)} examples leave nothing of {len(examples)} for '
        'the clients. Make them smaller.'
    )
  order = np.random.default_rng(seed).permutation(len(examples))
  return [examples.take(part) for part in np.split(order, np.cumsum(sizes))]


def client_dataset(
    examples: Examples, *, batch_size: int, epochs: int, seed: Sequence[int]
) -> tf.data.Dataset:
  """A client's local training data for one round: shuffled epochs, in batches.

  Args:
    examples: The client's.
    batch_size: The last batch of all epochs together may be smaller.
    epochs: Passes over the data, each in another order.
    seed: Integers that decide the orders, say (seed, round, client).
  """
  dataset = tf.data.Dataset.from_tensor_slices(tuple(examples))
  if len(examples):
    shuffle_seed = int(np.random.default_rng(seed).integers(1, 2**31))
    dataset = dataset.shuffle(len(examples), seed=shuffle_seed)
  return dataset.repeat(epochs).batch(batch_size)
