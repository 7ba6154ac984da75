"""The transfer set: public inputs on which predictions are exchanged.

The examples are written once to raw files, which every worker maps into its memory. A
round's graph holds only the file names, and a gather touches only the rows that it
needs. The rows of a round depend only on (seed, round number), so clients and server
agree on them without communication.
"""

from collections.abc import Callable, Iterable, Mapping
import copy
import dataclasses
import os
from typing import Any, Optional

import numpy as np
import tensorflow as tf

from tff_kd.data import raw_files

_WHAT = 'A transfer set'
# Keeps the random stream of the validation part apart from those of rounds.
_VALIDATION_STREAM = -1
# The number of rows in a batch of `map_inputs`, which bounds its memory.
_PASS_BATCH = 512


class TransferSet:
  """Public or server-held inputs, with or without labels.

  Args (constructor):
    inputs: Numeric or boolean arrays of n examples each: one array, or a tuple or dict
      of them for a model with several inputs.
    labels: Optional labels, an array of n.
    label_mask: Optional booleans, an array of n: which labels are known. The others are
      never used. All labels are known if `None`.
    subset_size: The number of examples that a round uses, m; the whole training part if
      `None`.
    validation_size: The number of examples that are set aside, the same in every round,
      to judge the server's distillation. They are never trained on.
    seed: With the round number, decides each round's subset.
    directory: Where the raw files go; if `None`, a temporary folder that is removed when
      the program ends. For several machines, name a folder that all of them see under
      the same path.
  """

  def __init__(
      self,
      inputs: Any,
      labels: Optional[Any] = None,
      *,
      label_mask: Optional[Any] = None,
      subset_size: Optional[int] = None,
      validation_size: int = 0,
      seed: int = 0,
      directory: Optional[os.PathLike] = None,
  ):
    inputs = raw_files.as_arrays(inputs)
    data = (inputs,) if labels is None else (inputs, raw_files.as_arrays(labels))
    if label_mask is not None:
      if labels is None:
        raise ValueError('`label_mask` needs `labels`.')
      data += (np.asarray(label_mask, bool),)
    raw_files.check_rows(data, 'a transfer set')
    self._setup(
        raw_files.chunks_of(data),
        raw_files.array_specs(data),
        labels is not None,
        subset_size=subset_size,
        validation_size=validation_size,
        seed=seed,
        directory=directory,
    )

  @classmethod
  def from_dataset(
      cls, dataset: tf.data.Dataset, *, labelled: bool, **kwargs
  ) -> 'TransferSet':
    """Builds a transfer set from an unbatched `tf.data.Dataset`.

    The examples stream to the files; they are never all in memory.

    Args:
      dataset: Yields inputs, or pairs (inputs, label) if `labelled`, one example
        an element, with fully defined shapes.
      labelled: Whether the elements are pairs with a label.
      **kwargs: As in the constructor; without `label_mask`.

    Returns:
      The transfer set.

    Raises:
      ValueError: If the elements are not pairs although `labelled`, or have no fully
        defined shapes.
    """
    spec = dataset.element_spec
    if labelled and not (isinstance(spec, (tuple, list)) and len(spec) == 2):
      raise ValueError(
          'A labelled transfer set needs a dataset of pairs (inputs, label), '
          f'found elements of {spec}.'
      )
    data_spec = raw_files.element_specs(
        tuple(spec) if labelled else (spec,), 'a transfer set'
    )

    def chunks():
      for batch in dataset.batch(raw_files.ROWS_PER_CHUNK).as_numpy_iterator():
        yield tuple(batch) if labelled else (batch,)

    self = cls.__new__(cls)
    self._setup(chunks(), data_spec, labelled, **kwargs)
    return self

  @classmethod
  def from_files(
      cls, inputs: Any, labels: Optional[os.PathLike] = None, **kwargs
  ) -> 'TransferSet':
    """Builds a transfer set from `.npy` files.

    Args:
      inputs: A path, or a tuple or dict of paths for several inputs.
      labels: An optional path.
      **kwargs: As in the constructor.

    Returns:
      The transfer set.

    Raises:
      ValueError: If a file is damaged or not in NumPy's format; names the file.
    """

    def load(path):
      try:
        return np.load(path, mmap_mode='r', allow_pickle=False)
      except (ValueError, EOFError) as error:
        raise ValueError(
            f'The transfer set file {os.fspath(path)!r} is damaged or not a '
            f'.npy file: {error}'
        ) from error

    arrays = tf.nest.map_structure(load, inputs)
    return cls(arrays, None if labels is None else load(labels), **kwargs)

  def _setup(
      self,
      chunks: Iterable[Any],
      spec: Any,
      labelled: bool,
      *,
      subset_size: Optional[int] = None,
      validation_size: int = 0,
      seed: int = 0,
      directory: Optional[os.PathLike] = None,
  ):
    """Writes the examples, whose specs are `spec`, and checks the options."""
    raw_files.check_dtypes(spec, _WHAT)
    self._arrays = raw_files.RawArrays.write(
        raw_files.open_directory(directory, 'transfer_'), chunks, spec, _WHAT
    )
    self.size = self._arrays.size
    if self.size == 0:
      raise ValueError(
          'The transfer set is empty. Give it at least one example, or use an '
          'algorithm without one (build_fed_avg).'
      )
    if not 0 <= validation_size < self.size:
      raise ValueError(
          f'`validation_size` must be from 0 to {self.size - 1} (the transfer set '
          f'has {self.size} examples and some must be left to learn from), found '
          f'{validation_size}.'
      )
    available = self.size - validation_size
    if subset_size is None:
      subset_size = available
    if not 0 < subset_size <= available:
      raise ValueError(
          f'`subset_size` must be from 1 to {available} ({self.size} examples '
          f'less {validation_size} for validation), found {subset_size}.'
      )
    self._spec = self._arrays.spec
    self.labelled = labelled
    self.fully_labelled = labelled and len(spec) == 2
    self.subset_size = subset_size
    self.validation_size = validation_size
    self.seed = int(seed)

  @property
  def inputs_spec(self) -> Any:
    """The structure of `tf.TensorSpec`s of a batch of inputs."""
    return raw_files.batch_spec(self._spec[0])

  @property
  def labels_spec(self) -> Optional[tf.TensorSpec]:
    """The `tf.TensorSpec` of a batch of labels, `None` without labels."""
    if not self.labelled:
      return None
    return raw_files.batch_spec(self._spec[1])

  def _parts(self) -> tuple[tf.Tensor, tf.Tensor]:
    order = tf.random.experimental.stateless_shuffle(
        tf.range(self.size), [self.seed, _VALIDATION_STREAM]
    )
    return order[: self.validation_size], order[self.validation_size :]

  def validation_ids(self) -> tf.Tensor:
    """Returns the rows set aside for validation, int32 `[validation_size]`."""
    return self._parts()[0]

  @property
  def is_same_every_round(self) -> bool:
    """Whether every round uses the same rows, in the same order."""
    return self.subset_size == self.size - self.validation_size

  def whole(self) -> 'TransferSet':
    """Returns a transfer set of the same examples, all of which every round uses."""
    whole = copy.copy(self)
    whole.subset_size = self.size - self.validation_size
    return whole

  def round_ids(self, round_num: tf.Tensor) -> tf.Tensor:
    """Returns the rows that a round learns from, int32 `[subset_size]`.

    Args:
      round_num: An integer scalar.
    """
    _, training = self._parts()
    if self.is_same_every_round:
      return training
    shuffled = tf.random.experimental.stateless_shuffle(
        training, tf.stack([self.seed, tf.cast(round_num, tf.int32)])
    )
    return shuffled[: self.subset_size]

  def prediction_ids(self, round_num: tf.Tensor) -> tf.Tensor:
    """Returns the rows that clients predict: the round's, then those for validation.

    If all labels are known, validation needs no predictions, and none are sent.

    Args:
      round_num: The round's number, an int32 scalar.

    Returns:
      int32 `[m]`.
    """
    ids = self.round_ids(round_num)
    if self.fully_labelled:
      return ids
    return tf.concat([ids, self.validation_ids()], axis=0)

  @property
  def num_predictions(self) -> int:
    """The number of rows of `prediction_ids`."""
    return self.subset_size + (
        0 if self.fully_labelled else self.validation_size
    )

  def open(self) -> 'OpenTransferSet':
    """Returns the examples, ready to gather; to be called outside loops.

    Opening maps the files, which costs more than the gather of a batch.
    """
    mapped = self._arrays.map()
    return OpenTransferSet(
        mapped[0],
        mapped[1] if self.labelled else None,
        mapped[2] if len(mapped) == 3 else None,
    )

  def map_inputs(
      self, fn: Callable[[Any], tf.Tensor], ids: tf.Tensor
  ) -> tf.Tensor:
    """Applies a function to the inputs of some rows, a few hundred rows at a time.

    Args:
      fn: A batch of inputs -> a tensor `[batch, ...]`.
      ids: int32 `[k]` with a static k.

    Returns:
      A tensor `[k, ...]`.
    """
    num_rows = ids.shape[0]
    examples = self.open()

    def map_batch(rows: tf.Tensor) -> tf.Tensor:
      return fn(examples.gather_inputs(rows))

    parts = [map_batch(ids[:_PASS_BATCH])]
    whole, rest = divmod(max(num_rows - _PASS_BATCH, 0), _PASS_BATCH)
    if whole:
      # One traced body for all further whole batches.
      batches = tf.reshape(
          ids[_PASS_BATCH : _PASS_BATCH * (1 + whole)], [whole, _PASS_BATCH]
      )
      more = tf.map_fn(
          map_batch,
          batches,
          fn_output_signature=tf.TensorSpec(parts[0].shape, parts[0].dtype),
          parallel_iterations=1,
      )
      parts.append(tf.reshape(more, tf.concat([[-1], tf.shape(more)[2:]], 0)))
    if rest:
      parts.append(map_batch(ids[-rest:]))
    result = tf.concat(parts, axis=0)
    return tf.ensure_shape(result, [num_rows, *parts[0].shape[1:]])

  def gather_inputs(self, ids: tf.Tensor) -> Any:
    """Gathers inputs once; see `OpenTransferSet.gather_inputs`.

    Args:
      ids: int32 `[k]`, the rows.

    Returns:
      A structure of tensors `[k, ...]`.
    """
    return self.open().gather_inputs(ids)

  def gather_labels(self, ids: tf.Tensor) -> tf.Tensor:
    """Gathers labels once; see `OpenTransferSet.gather_labels`.

    Args:
      ids: int32 `[k]`, the rows.

    Returns:
      The labels, `[k, ...]`.
    """
    return self.open().gather_labels(ids)

  def gather_label_weights(self, ids: tf.Tensor) -> tf.Tensor:
    """Gathers the weights of labels once; see `OpenTransferSet.gather_label_weights`.

    Args:
      ids: int32 `[k]`, the rows.

    Returns:
      float32 `[k]`.
    """
    return self.open().gather_label_weights(ids)


@dataclasses.dataclass(frozen=True, eq=False)
class OpenTransferSet:
  """The examples of a transfer set inside a computation, read where it runs.

  Attributes:
    inputs: The mapped inputs.
    labels: The mapped labels, or `None` without labels.
    known: Whether each label is known, mapped; `None` if all are.
  """

  inputs: Any
  labels: Optional[tf.Tensor]
  known: Optional[tf.Tensor]

  def gather_inputs(self, ids: tf.Tensor) -> Any:
    """Returns the inputs of some rows.

    Args:
      ids: An int32 tensor `[k]`.

    Returns:
      The structure of inputs, each `[k, ...]`.
    """
    return raw_files.gather(self.inputs, ids)

  def gather_labels(self, ids: tf.Tensor) -> tf.Tensor:
    """Returns the labels of some rows, `[k, ...]`.

    Raises:
      ValueError: If the transfer set has no labels.
    """
    if self.labels is None:
      raise ValueError('This transfer set has no labels.')
    return raw_files.gather(self.labels, ids)

  def gather_label_weights(self, ids: tf.Tensor) -> tf.Tensor:
    """Returns 1 for rows whose label is known, else 0, float32 `[k]`."""
    if self.labels is None:
      return tf.zeros(tf.shape(ids))
    if self.known is None:
      return tf.ones(tf.shape(ids))
    return tf.cast(raw_files.gather(self.known, ids), tf.float32)


def as_transfer_set(
    value: Any, name: str = 'transfer_set', *, has_labels: bool = True
) -> TransferSet:
  """Converts a value to a `TransferSet`, unless it is one.

  Args:
    value: A `TransferSet`; inputs without labels: an array, or a dict of arrays; or an
      unbatched `tf.data.Dataset` of inputs, or of pairs (inputs, label).
    name: The argument's name, for the error.
    has_labels: Whether there may be labels. If not, `value` may also be a list, which is
      one array, or a tuple, which is several inputs.

  Raises:
    TypeError: If `value` is none of these.
  """
  if isinstance(value, TransferSet):
    return value
  if isinstance(value, tf.data.Dataset):
    spec = value.element_spec
    labelled = isinstance(spec, (tuple, list)) and len(spec) == 2
    return TransferSet.from_dataset(value, labelled=labelled)
  inputs = (np.ndarray, tf.Tensor, Mapping)
  if isinstance(value, inputs if has_labels else (*inputs, tuple, list)):
    return TransferSet(value)
  raise TypeError(
      f'`{name}` must be a `tff_kd.TransferSet`, an array of inputs or an unbatched '
      f'`tf.data.Dataset`, found {type(value).__name__}.'
      + (' With labels: `tff_kd.TransferSet(inputs, labels)`.' if has_labels else '')
  )
