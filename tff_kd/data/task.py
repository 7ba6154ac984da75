"""Tasks: data in four disjoint parts, models, a loss, metrics."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import importlib.metadata
import pathlib
import re
from typing import Any, Optional, Union

import keras
import numpy as np
import tensorflow as tf

from tff_kd.data import augmentation
from tff_kd.data import client_names as client_names_lib
from tff_kd.data import partition
from tff_kd import models
from tff_kd.models import labels as labels_lib
from tff_kd.models import zoo

ModelFn = Callable[[], keras.Model]


class Examples(tuple):
  """Inputs and labels, perhaps with sample weights, parallel along the first axis.

  A tuple `(inputs, labels)` or `(inputs, labels, sample_weight)`, as `keras.Model.fit`
  takes them, whose `len` is the number of examples.
  """

  __slots__ = ()

  def __new__(
      cls, inputs: Any, labels: np.ndarray, sample_weight: Optional[np.ndarray] = None
  ):
    """Makes the tuple.

    Args:
      inputs: An array `[n, ...]`, or a dict of such, by name of the model's input.
      labels: `[n, ...]`, as the loss takes them: class numbers, one-hot or binary
        labels, or float32 numbers of a regression.
      sample_weight: Factors of the losses, finite and 0 or more: float32 `[n]`, or like
        the labels of sequences. An example of weight 0 is padding; its label may be
        anything.
    """
    weights = () if sample_weight is None else (sample_weight,)
    return super().__new__(cls, (inputs, labels, *weights))

  def __getnewargs__(self) -> tuple[Any, ...]:
    return tuple(self)

  def __len__(self) -> int:  # The number of examples, not of parts.
    return len(self.labels)

  @property
  def inputs(self) -> Any:
    """The inputs, an array `[n, ...]` or a dict of arrays."""
    return self[0]

  @property
  def labels(self) -> np.ndarray:
    """The labels, `[n, ...]`."""
    return self[1]

  @property
  def sample_weight(self) -> Optional[np.ndarray]:
    """The weights of the examples, or `None` without any."""
    return models.sample_weight_of(tuple(self))

  @property
  def counted(self) -> np.ndarray:
    """Which examples count, bool `[n]`: those with a weight above 0."""
    if self.sample_weight is None:
      return np.ones(len(self), bool)
    weights = np.asarray(self.sample_weight)
    return np.any(weights > 0, axis=tuple(range(1, weights.ndim)))

  def take(self, rows: Any) -> 'Examples':
    """Returns the examples of some rows.

    Args:
      rows: Integers `[k]`, or a slice.
    """
    return Examples(*tf.nest.map_structure(lambda a: a[rows], tuple(self)))


def _cross_entropy() -> keras.losses.Loss:
  return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _accuracy() -> list[keras.metrics.Metric]:
  return [keras.metrics.SparseCategoricalAccuracy(name='accuracy')]


def _counted_labels(examples: Examples) -> np.ndarray:
  """Returns which labels have a weight above 0, bool in the labels' shape."""
  weights, shape = np.asarray(examples.sample_weight), np.shape(examples.labels)
  weights = weights.reshape(weights.shape + (1,) * (len(shape) - weights.ndim))
  return np.broadcast_to(weights > 0, shape)


_PARTS = ('clients', 'transfer', 'validation', 'test')
# Keras's losses of one-hot labels.
_ONE_HOT_LOSSES = (
    keras.losses.CategoricalCrossentropy, keras.losses.CategoricalFocalCrossentropy,
    keras.losses.CategoricalHinge,
)


# Maps a prediction function, (inputs -> outputs), to further scores by name.
ScoresFn = Callable[[Callable[[Any], np.ndarray]], Mapping[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """A task: models, a loss, metrics, and data in four disjoint parts.

  The examples of each part may have sample weights. Clients' training, evaluation and
  central training use them; the server's distillation does not, and takes transfer
  examples of weight 0 as unlabelled.

  Attributes:
    name: As in the registry.
    clients: The pool of all clients' examples.
    client_rows: The rows of each client, where the data have clients of their own;
      `None` where the pool is to be split (`partition`).
    transfer: The server's examples for the transfer set (and for central
      pre-training, which uses their labels).
    validation: For choosing the best round.
    test: For reporting only.
    client_names: The names of these clients, in their order; their numbers if `None`.
    test_rows: The rows of each client in the test part; `None` where a split like the
      clients' is to be drawn. With `client_rows` only.
    students: Name -> a function that returns a new, small model; the first one is the
      default.
    teachers: The large models, by name.
    num_classes: The number of classes; `None` of a regression.
    loss_fn: Returns a new loss; decides whether the task is a regression, and which
      label is padding (`ignore_class`).
    metrics_fn: Returns new metrics, the most telling one first: by it scripts choose
      the best round, and they report it for student and teacher, beside all others. As
      in Keras, metrics see what the models return (logits or probabilities). Unset,
      'accuracy', or 'rmse' of a regression.
    lower_is_better: The names of metrics that are better the lower they are, where
      neither Keras's own metric nor its name (an error, a loss) tells.
    scores_fn: Further scores of a model on the test part, if there are any.
    class_names: For pictures; the numbers if `None`.
    num_labelled: Only the first so many transfer examples have labels; all if `None`.
    augment: Changes a batch of inputs at random where their labels stay the same, as
      `tff_kd.Distillation.augment`; `None` if there is no such change.

  Raises:
    ValueError: If the parts do not fit, a label is out of the loss's range, or sample
      weights do not fit the labels, are negative or not finite.
  """

  name: str
  clients: Examples
  transfer: Examples
  validation: Examples
  test: Examples
  students: Mapping[str, ModelFn]
  teachers: Mapping[str, ModelFn]
  num_classes: Optional[int]
  client_rows: Optional[Sequence[np.ndarray]] = None
  client_names: Optional[Sequence[str]] = None
  test_rows: Optional[Sequence[np.ndarray]] = None
  loss_fn: Callable[[], keras.losses.Loss] = _cross_entropy
  metrics_fn: Optional[models.MetricsFn] = None
  lower_is_better: Sequence[str] = ()
  scores_fn: Optional[ScoresFn] = None
  class_names: Optional[Sequence[str]] = None
  num_labelled: Optional[int] = None
  augment: Optional[Callable[[Any, Any], Any]] = None

  def __post_init__(self):
    if self.metrics_fn is None:
      has_numbers = isinstance(
          self.loss_fn(), keras.losses.SparseCategoricalCrossentropy
      )
      # With other labels, evaluation's own scores.
      metrics_fn = _accuracy if has_numbers else list
      object.__setattr__(self, 'metrics_fn', metrics_fn)
    if not len(self.clients):
      raise ValueError(
          f'The task {self.name} has no examples of clients (`clients`). Fewer may go to '
          'the server and to the tests: --transfer_size, --validation_size.'
      )
    count = len(self.client_rows) if self.client_rows is not None else 0
    for name in ('client_names', 'test_rows'):
      values = getattr(self, name)
      if values is not None and len(values) != count:
        raise ValueError(
            f'A task must have as many `{name}` as `client_rows`, found {len(values)} '
            f'and {count}.'
        )
    if self.client_names is not None:
      client_names_lib.ClientNames(self.client_names)  # Refuses one name for two.
    for part in _PARTS:
      self._check_weights(part)
    if self.num_classes is None:
      return
    loss = self.loss_fn()
    for part in _PARTS:
      examples = getattr(self, part)
      labels = np.asarray(examples.labels)
      if part == 'transfer':
        labels = labels[: self.num_labelled]
      if examples.sample_weight is not None:
        labels = labels[_counted_labels(examples)[: len(labels)]]
      if models.wrong_labels(labels, loss, (self.num_classes,)).any():
        raise ValueError(
            f'The labels of the task {self.name}, of its part `{part}`, '
            + models.wrong_labels_message(labels, loss, (self.num_classes,))
        )

  def _check_weights(self, part: str) -> None:
    examples = getattr(self, part)
    if examples.sample_weight is None:
      return
    weights, shape = np.asarray(examples.sample_weight), np.shape(examples.labels)
    if weights.dtype.kind not in 'fiu' or weights.ndim > max(len(shape), 1) or any(
        size not in (1, expected) for size, expected in zip(weights.shape[1:], shape[1:])
    ) or weights.shape[:1] != shape[:1]:
      raise ValueError(
          f'The sample weights of the task {self.name}, of its part `{part}`, must be '
          f'numbers [{len(examples)}], or have the shape of the labels {shape}, found '
          f'{weights.dtype} {weights.shape}.'
      )
    wrong = ~((weights >= 0) & np.isfinite(weights))
    if wrong.any():
      raise ValueError(
          f'The sample weights of the task {self.name}, of its part `{part}`, must be '
          f'finite and 0 or more, found {weights[wrong][0]}.'
      )

  @property
  def is_regression(self) -> bool:
    """Whether labels are numbers, not classes."""
    return self.num_classes is None

  def counted(self, examples: Examples) -> np.ndarray:
    """Returns which examples have a label that counts and a weight above 0.

    Args:
      examples: Examples of this task.

    Returns:
      bool `[n]`; `False` also where the loss ignores all labels of an example.
    """
    labels = np.asarray(examples.labels)
    ignored = labels_lib.config_of(self.loss_fn(), 'ignore_class')
    counts = np.ones(labels.shape, bool) if ignored is None else labels != ignored
    if examples.sample_weight is not None:
      counts &= _counted_labels(examples)
    return counts.any(axis=tuple(range(1, counts.ndim)))

  def class_numbers(self, examples: Examples) -> Optional[np.ndarray]:
    """Returns the class of each example, int64 `[n]`, for labels of any form.

    Args:
      examples: Examples of this task.

    Returns:
      The classes; 0 and 1 for binary labels. An example has class 0 if its weight is 0,
      or if the loss ignores its label and the label is no class. `None` if examples have
      several labels, or numbers.
    """
    labels, loss = np.asarray(examples.labels), self.loss_fn()
    if examples.sample_weight is not None:
      labels = np.where(_counted_labels(examples), labels, np.zeros_like(labels))
    if self.is_regression:
      return None
    ignored = labels_lib.config_of(loss, 'ignore_class')
    if ignored is not None and not 0 <= ignored < self.num_classes:
      labels = np.where(labels == ignored, np.zeros_like(labels), labels)
    if isinstance(loss, _ONE_HOT_LOSSES) and labels.ndim == 2:
      return labels.argmax(axis=-1)
    if labels.ndim == 2 and labels.shape[-1] == 1:
      labels = labels[:, 0]
    if labels.ndim > 1:
      return None
    if isinstance(loss, models.BINARY_LOSSES):
      labels = labels > 0.5  # For a hinge loss they may be -1 and 1.
    return labels.astype(np.int64)

  @property
  def input_spec(self) -> tuple[Any, tf.TensorSpec]:
    """The `TensorSpec`s of a batch's inputs and labels."""
    return tf.nest.map_structure(
        lambda a: tf.TensorSpec([None, *a.shape[1:]], a.dtype), tuple(self.clients)
    )

  @functools.cached_property
  def _metrics(self) -> Mapping[str, keras.metrics.Metric]:
    return models.new_metrics(self.metrics_fn).by_name

  @property
  def metric(self) -> str:
    """The name of the score that matters most: of the first metric."""
    own = 'rmse' if self.is_regression else 'accuracy'
    return next(iter(self._metrics), own)

  def is_lower_better(self, name: Optional[str] = None) -> bool:
    """Returns whether lower values of a score are better.

    Args:
      name: The score's name, or that of a column that ends in it; `metric` if `None`.
    """
    name = self.metric if name is None else name
    if any(re.search(rf'(^|[_/]){re.escape(error_name)}(_\d+)?$', name)
           for error_name in self.lower_is_better):
      return True
    return models.lower_is_better(name, self._metrics)


def image_task(*, num_classes: int, clients: Examples, **kwargs) -> Task:
  """Returns a task of classifying images, with the models of `keras_models`.

  Args:
    num_classes: The number of classes.
    clients: As of `Task`; inputs `[n, height, width, channels]`.
    **kwargs: Further arguments of `Task`.
  """
  shape = clients.inputs.shape[1:]
  kwargs.setdefault('augment', augmentation.RandomShift())
  return Task(
      students=zoo.of_shape(zoo.STUDENTS, num_classes, shape),
      teachers=zoo.of_shape(zoo.TEACHERS, num_classes, shape),
      num_classes=num_classes,
      clients=clients,
      **kwargs,
  )


def pool(parts: Sequence[Examples]) -> tuple[Examples, list[np.ndarray]]:
  """Returns all examples of several clients, and the rows of each.

  Raises:
    ValueError: If some clients' examples have sample weights and others' have none.
  """
  weighted = [part.sample_weight is not None for part in parts]
  if any(weighted) and not all(weighted):
    raise ValueError(
        'Either all clients\' examples have sample weights or none: client '
        f'{weighted.index(False)} has none, and client {weighted.index(True)} has some. '
        'Give weights of 1 where examples count alike.'
    )
  together = tf.nest.map_structure(
      lambda *arrays: np.concatenate(arrays), *(tuple(part) for part in parts)
  )
  return Examples(*together), partition.consecutive([len(part) for part in parts])


def image_examples(images: np.ndarray, labels: np.ndarray) -> Examples:
  """Returns examples of images and class numbers, as `image_task` takes them.

  Args:
    images: `[n, height, width]` or `[n, height, width, channels]`. Bytes are scaled to
      [0, 1].
    labels: Class numbers, `[n]` or `[n, 1]`.
  """
  if images.ndim == 3:
    images = images[..., np.newaxis]
  scale = 255.0 if images.dtype == np.uint8 else 1.0
  return Examples(
      images.astype(np.float32) / scale, labels.reshape(-1).astype(np.int32)
  )


def split_image_task(
    train: Examples, *, transfer_size: int, validation_size: int, seed: int, **kwargs
) -> Task:
  """Returns an `image_task` whose parts are random parts of the training examples.

  Args:
    train: The training examples.
    transfer_size: How many of them form the transfer set.
    validation_size: How many form the validation part. The others are the clients'.
    seed: Decides which examples go where.
    **kwargs: Further arguments of `image_task`.
  """
  transfer, validation, clients = split_examples(
      train, [transfer_size, validation_size], seed=seed
  )
  return image_task(clients=clients, transfer=transfer, validation=validation, **kwargs)


def task_from_clients(
    name: str,
    *,
    clients: Union[Sequence[Examples], Mapping[str, Examples]],
    server: Examples,
    seed: int,
    transfer_size: int,
    validation_size: int,
    test_share: float = 0.2,
    **kwargs,
) -> Task:
  """Returns a task whose data are already split over clients.

  Args:
    name: What the task is called.
    clients: Each client's examples, with sample weights or without; a mapping gives the
      clients their names.
    server: The server's examples, for the transfer set and for validation; no client
      holds them.
    seed: Decides which of the server's examples are for which of the two.
    transfer_size: The largest number of them in the transfer set.
    validation_size: How many of them choose the best round, at most a third.
    test_share: The share of each client's examples that forms the test part, the same
      for every seed. A client with two or more examples has at least one in it.
    **kwargs: Further arguments of `Task`, such as its models.

  Raises:
    ValueError: If there are no clients, or fewer than three examples of the server.
  """
  if not clients or len(server) < 3:
    raise ValueError(
        f'The task {name} needs clients and at least 3 examples of the server, found '
        f'{len(clients)} clients and {len(server)} examples.'
    )
  names = None
  if isinstance(clients, Mapping):
    names, clients = list(map(str, clients)), list(clients.values())
  fixed = np.random.default_rng(0)
  train, test = [], []
  for examples in clients:
    order = fixed.permutation(len(examples))
    cut = max(round(test_share * len(examples)), min(1, len(examples) - 1))
    test.append(examples.take(order[:cut]))
    train.append(examples.take(order[cut:]))
  order = np.random.default_rng(seed).permutation(len(server))
  num_validation = min(validation_size, len(server) // 3)
  (pooled, client_rows), (tests, test_rows) = pool(train), pool(test)
  return Task(
      name=name, clients=pooled, client_rows=client_rows, client_names=names,
      test=tests, test_rows=test_rows, validation=server.take(order[:num_validation]),
      transfer=server.take(order[num_validation:][:transfer_size]), **kwargs,
  )


def package_file(task: str, package: str, file: str) -> pathlib.Path:
  """Returns the path of a file of an installed package that need not be importable.

  Raises:
    FileNotFoundError: If the package is not installed.
  """
  try:
    path = importlib.metadata.distribution(package).locate_file(file)
  except importlib.metadata.PackageNotFoundError as error:
    raise FileNotFoundError(
        f'The task {task} reads {file} of the package {package}, which is not '
        'installed. Install requirements-data.txt.'
    ) from error
  return pathlib.Path(str(path))


def split_rows(count: int, sizes: Sequence[int], *, seed: int) -> list[np.ndarray]:
  """Cuts random rows into parts of the given sizes and, as the last part, the rest.

  Args:
    count: The number of rows.
    sizes: The sizes of all parts but the last.
    seed: Decides the order.

  Raises:
    ValueError: If there are not so many rows.
  """
  if min(sizes, default=0) < 0 or sum(sizes) > count:
    raise ValueError(
        f'Parts of {list(sizes)} examples do not fit {count} examples. Make them smaller '
        '(in the scripts: --transfer_size, --validation_size).'
    )
  return np.split(np.random.default_rng(seed).permutation(count), np.cumsum(sizes))


def split_examples(
    examples: Examples, sizes: Sequence[int], *, seed: int
) -> list[Examples]:
  """Cuts examples as `split_rows` cuts their rows.

  Args:
    examples: All examples.
    sizes: The sizes of all parts but the last.
    seed: Decides the order.
  """
  return [examples.take(rows) for rows in split_rows(len(examples), sizes, seed=seed)]


def client_dataset(
    examples: Examples, *, batch_size: int, epochs: int, seed: Sequence[int]
) -> tf.data.Dataset:
  """Returns a client's local training data for one round: shuffled epochs, in batches.

  Args:
    examples: The client's examples.
    batch_size: The last batch of all epochs together may be smaller.
    epochs: Passes over the data, each in another order.
    seed: Integers that decide the orders, say (seed, round, client).
  """
  dataset = tf.data.Dataset.from_tensor_slices(tuple(examples))
  if len(examples):
    shuffle_seed = int(np.random.default_rng(seed).integers(1, 2**31))
    dataset = dataset.shuffle(len(examples), seed=shuffle_seed)
  return dataset.repeat(epochs).batch(batch_size)
