"""Clients' examples by reference: computations read them from files by client number.

`FileClientData` keeps all clients' examples in raw files. `ClientBatches` determines how
a client reads its examples: shuffling, epochs, batches. A process that is built with
`ClientBatches` takes client numbers in place of datasets, so a round sends no examples,
and the order of a client's examples depends only on (seed, round number, client).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from typing import Any, NamedTuple, Optional, Union

from absl import logging
import keras
import numpy as np
import tensorflow as tf
from tff_kd.compat import tff
import tqdm

from tff_kd.data import client_names
from tff_kd.data import partition
from tff_kd.data import raw_files
from tff_kd import models

_WHAT = "The clients' data"
_FORMAT = 1
_INDEX_SPEC = raw_files.RowSpec((), np.dtype(np.int64))
# Keeps these random streams apart from others of the same seed.
_ORDER_STREAM = 1
_LABEL_STREAM, _INPUT_STREAM = 31, 32


class ClientRound(NamedTuple):
  """The arguments of a dataset computation that decide a client's batches.

  Attributes:
    client: The client's number, int32.
    round_num: The round, int32.
  """

  client: Any
  round_num: Any


class FileClientData:
  """The examples of many clients, in files.

  Built by `from_arrays`, `from_clients` or `from_client_data`. The files are written
  once: if the folder already has them, they are used. A damaged file is named in a
  warning and written again. All machines that compute clients must see the folder under
  the same path.

  Attributes:
    client_ids: The clients' names, in the order of their numbers.
    names: The same names as `ClientNames`, which map a name to its number.
    num_examples: int64 `[clients]`, how many examples each has.
    element_spec: The structure of a batch, for `input_spec`.
  """

  def __init__(
      self,
      client_ids: Sequence[str],
      examples: raw_files.RawArrays,
      rows: raw_files.RawArrays,
      starts: raw_files.RawArrays,
  ):
    """Initializes the data from files; call one of the `from_` methods instead.

    Client k has the examples rows[starts[k]:starts[k + 1]].

    Args:
      client_ids: The clients' names.
      examples: All examples, of n rows.
      rows: int64, the rows of all clients' examples, one client after the other.
      starts: int64 `[clients + 1]`, positions in `rows`.
    """
    self.names = client_names.ClientNames(client_ids)
    self.client_ids = list(self.names)
    self.num_examples = np.diff(np.asarray(starts.arrays()))
    self.element_spec = raw_files.batch_spec(examples.spec)
    self._examples = examples
    self._rows = rows
    self._starts = starts

  @classmethod
  def from_arrays(
      cls,
      examples: Any,
      rows: Union[Mapping[str, np.ndarray], Sequence[np.ndarray]],
      *,
      directory: Optional[os.PathLike] = None,
  ) -> 'FileClientData':
    """Builds client data from one pool of examples and the rows of each client.

    Args:
      examples: A pair `(x, y)`, a triple `(x, y, sample_weight)` or a mapping with
        these keys, of arrays of n examples; `x` may be a structure of arrays. Weights
        are finite and not negative.
      rows: Integers in [0, n), by client; a mapping gives the clients their names,
        which otherwise are '0', '1', ... A partition of `tff_kd.data.partition` fits,
        and so does `df.groupby('client').indices` of a pandas table.
      directory: Where the files go; a temporary folder if `None`.

    Returns:
      The `FileClientData`.

    Raises:
      ValueError: If arrays differ in length, rows are no integers or out of range, or
        numbers are not finite.
    """
    examples = raw_files.as_arrays(_as_element(examples))
    size = raw_files.check_rows(examples, "the clients' data")
    rows = {
        name: _row_numbers(name, numbers) for name, numbers in _by_name(rows).items()
    }
    for name, client_rows in rows.items():
      if len(client_rows) and (client_rows.min() < 0 or client_rows.max() >= size):
        raise ValueError(
            f'The rows of client {name!r} must be from 0 to {size - 1}, found '
            f'{client_rows.min()} to {client_rows.max()}.'
        )
    # The files of a temporary folder are never used again.
    key = ''
    if directory is not None:
      key = raw_files.content_digest((examples, list(rows.values())))
    return _prepare(
        directory,
        f'{key} {list(rows)}',
        raw_files.array_specs(examples),
        lambda: (raw_files.chunks_of(examples), rows),
        total=size,
    )

  @classmethod
  def from_clients(
      cls,
      clients: Union[Mapping[str, Any], Sequence[Any]],
      *,
      directory: Optional[os.PathLike] = None,
  ) -> 'FileClientData':
    """Builds client data from the arrays, or the `tf.data.Dataset`, of each client.

    Args:
      clients: By client, arrays, as the examples of `from_arrays`, or an unbatched
        dataset of such examples. All must have one structure, shape and dtype.
      directory: Where the files go; a temporary folder if `None`.

    Returns:
      The `FileClientData`.

    Raises:
      ValueError: If there are no clients, or their examples differ in kind.
    """
    clients = _by_name(clients)
    if not clients:
      raise ValueError('There must be at least one client, found none.')
    arrays = [_arrays_of(client) for client in clients.values()]
    for name, client_arrays in zip(clients, arrays):
      raw_files.check_rows(client_arrays, f'client {name!r}')
    specs = [raw_files.array_specs(client_arrays) for client_arrays in arrays]
    for name, spec in zip(clients, specs):
      if spec != specs[0]:
        raise ValueError(
            f'Every client must have examples of one kind; {name!r} has {spec}, the '
            f'first one {specs[0]}.'
        )
    pool = tf.nest.map_structure(lambda *parts: np.concatenate(parts), *arrays)
    rows = partition.consecutive([len(tf.nest.flatten(a)[0]) for a in arrays])
    return cls.from_arrays(pool, dict(zip(clients, rows)), directory=directory)

  @classmethod
  def from_client_data(
      cls,
      client_data: tff.simulation.datasets.ClientData,
      *,
      directory: Optional[os.PathLike] = None,
      key: Optional[str] = None,
      preprocess_fn: Optional[
          Callable[[tf.data.Dataset], tf.data.Dataset]
      ] = None,
  ) -> 'FileClientData':
    """Builds client data from any TFF client data, read once, client by client.

    Args:
      client_data: A `tff.simulation.datasets.ClientData`.
      directory: Where the files go; a temporary folder if `None`.
      key: Names what is read: with a `directory` that holds files of this key, the
        source is not read again. Needed with a `directory`.
      preprocess_fn: Maps a client's unbatched dataset to one of pairs `(x, y)`, of
        triples `(x, y, sample_weight)` or of mappings with these keys, of fully defined
        shapes.

    Returns:
      The `FileClientData`.

    Raises:
      ValueError: If `key` is missing, or the elements do not fit.
    """
    if directory is not None and not key:
      raise ValueError(
          '`key` must name what is read, so that files of another source are not '
          f'taken for it, found {key!r}. For example: key="emnist, digits only".'
      )
    preprocess = preprocess_fn or (lambda dataset: dataset)

    def dataset_of(name):
      return preprocess(client_data.create_tf_dataset_for_client(name))

    names = client_data.client_ids
    if not names:
      raise ValueError('There must be at least one client, found none.')
    spec = _element_specs(dataset_of(names[0]))

    def read():
      rows, seen = {}, 0

      def chunks():
        nonlocal seen
        for name in names:
          start = seen
          batches = dataset_of(name).batch(raw_files.ROWS_PER_CHUNK)
          for batch in batches.as_numpy_iterator():
            seen += len(tf.nest.flatten(batch)[0])
            yield _as_element(batch)
          rows[name] = np.arange(start, seen)

      return chunks(), rows

    return _prepare(directory, str(key), spec, read)

  def numbers(self, clients: Iterable[client_names.Client]) -> list[int]:
    """Returns the numbers of clients, for `process.next`.

    Args:
      clients: Names, or numbers.

    Raises:
      KeyError: If there is no client of that name.
    """
    return self.names.numbers(clients)

  def check_labels(
      self, loss: keras.losses.Loss, outputs_shape: Sequence[Optional[int]]
  ) -> None:
    """Warns about clients with labels that a loss does not take: rounds leave them out.

    Args:
      loss: The loss.
      outputs_shape: The shape of the model's outputs.

    Raises:
      ValueError: If no client could take part, or the labels seem to count from 1.
    """
    examples = self._examples.arrays()
    labels = np.asarray(models.split_batch(examples)[1])
    counted = np.ones(labels.shape, bool)
    weight = models.sample_weight_of(examples)
    if weight is not None:
      shape = (*weight.shape, *[1] * labels.ndim)[: labels.ndim]
      counted &= np.reshape(weight != 0, shape)
    is_used = np.zeros(len(labels), bool)
    is_used[self._rows.arrays()] = True
    counted[~is_used] = False  # Examples of no client may have any label.
    wrong = counted & models.wrong_labels(labels, loss, outputs_shape)
    if not wrong.any():
      return
    is_wrong = wrong.reshape(len(labels), -1).any(axis=1)[self._rows.arrays()]
    counts = np.diff(np.append(0, np.cumsum(is_wrong))[self._starts.arrays()])
    num_wrong, num_clients = np.sum(counts > 0), np.sum(self.num_examples > 0)
    message = models.wrong_labels_message(labels[counted], loss, outputs_shape)
    if num_wrong == num_clients or message.endswith('subtract 1.'):
      raise ValueError(f"The labels of the clients' data {message}")
    logging.warning(
        'The labels of %d of %d clients are wrong, which are left out of every round: '
        "labels %s", num_wrong, num_clients, message,
    )

  def span(self, client: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns where a client's rows begin in `rows`, and how many there are.

    Args:
      client: The client's number, an int32 scalar.

    Returns:
      Two int64 scalars.
    """
    num_clients = len(self.client_ids)
    check = tf.debugging.Assert(
        (client >= 0) & (client < num_clients),
        [f'Clients are numbered from 0 to {num_clients - 1}, found', client],
    )
    # The check runs before the gather, whose own error is less clear. In eager mode it
    # has run already, and is `None`.
    with tf.control_dependencies([check] if check is not None else []):
      client = tf.identity(client)
    starts = raw_files.gather(self._starts.map(), tf.stack([client, client + 1]))
    return starts[0], starts[1] - starts[0]

  def rows(self, positions: tf.Tensor) -> tf.Tensor:
    """Returns rows of examples, given positions in the list of all clients' rows.

    Args:
      positions: int64 `[n]`.

    Returns:
      int64 `[n]`.
    """
    return raw_files.gather(self._rows.map(), positions)

  def open(self) -> Any:
    """Returns the structure of all examples, mapped; for `raw_files.gather`."""
    return self._examples.map()


def _by_name(clients: Union[Mapping[Any, Any], Sequence[Any]]) -> dict[str, Any]:
  """Returns the clients' values by name; clients without names have their numbers."""
  if not isinstance(clients, Mapping):
    clients = dict(enumerate(clients))
  return dict(zip(client_names.ClientNames(clients), clients.values()))


def _row_numbers(client: str, rows: Any) -> np.ndarray:
  """Returns a client's rows as int64; refuses masks and fractions."""
  rows = np.asarray(rows).ravel()
  if len(rows) and rows.dtype.kind not in 'iu':
    hint = ' Convert a mask by `np.flatnonzero(mask)`.' if rows.dtype.kind == 'b' else ''
    raise ValueError(
        f'The rows of client {client!r} must be integers, the numbers of examples, found '
        f'an array of the dtype {rows.dtype}.{hint}'
    )
  return rows.astype(np.int64)


def _as_element(element: Any) -> Any:
  """Returns examples as a pair, a triple or a mapping, as in an `input_spec`."""
  found = models.as_batch(element)
  if found is None:
    kind = type(element).__name__
    hint = (
        'Put single examples together: `x = np.stack([x for x, _ in examples])`, and `y` '
        'likewise.'
    )
    if isinstance(element, (tuple, list)):
      kind += f' of {len(element)}'
    elif isinstance(element, Mapping):
      kind += f' with the keys {", ".join(map(str, element))}'
      hint = 'Make such pairs first; of datasets with `map`, of TFF client data with '
      hint += '`preprocess_fn`.'
    raise ValueError(
        'Examples must be arrays (x, y), perhaps with sample weights, (x, y, '
        f'sample_weight), or a mapping with these keys, found a {kind}. {hint}'
    )
  return dict(found) if isinstance(found, Mapping) else found


def _element_specs(dataset: tf.data.Dataset) -> Any:
  """Returns the `RowSpec`s of a client's unbatched dataset."""
  return raw_files.element_specs(
      _as_element(dataset.element_spec), "a client's dataset"
  )


def _arrays_of(client: Any) -> Any:
  """Returns a client's examples as a structure of arrays."""
  if not isinstance(client, tf.data.Dataset):
    return raw_files.as_arrays(_as_element(client))
  nothing = tf.nest.map_structure(
      lambda s: np.zeros([0, *s.shape], s.dtype), _element_specs(client)
  )
  batches = client.batch(raw_files.ROWS_PER_CHUNK).as_numpy_iterator()
  return tf.nest.map_structure(
      lambda *parts: np.concatenate(parts), nothing, *map(_as_element, batches)
  )


def _prepare(
    directory: Optional[os.PathLike],
    key: str,
    spec: Any,
    read: Callable[[], tuple[Iterable[Any], dict[str, np.ndarray]]],
    total: Optional[int] = None,
) -> FileClientData:
  """Uses the files of a key that a folder has, or else writes them.

  Args:
    directory: The folder; a temporary one if `None`.
    key: Names the data.
    spec: The structure of `RowSpec`s of the examples.
    read: Returns an iterable of chunks of examples, and a dict of each client's rows,
      which may be filled while the chunks are read.
    total: The number of examples, if known, for the progress bar.
  """
  parts = [*models.split_batch(spec), models.sample_weight_of(spec)]
  raw_files.check_dtypes([part for part in parts if part is not None], _WHAT)
  folder = raw_files.open_directory(directory, 'clients_')
  tag = hashlib.sha256(key.encode()).hexdigest()[:16]
  path = folder / f'clients-{tag}.json'
  found = _find(path, key, spec)
  if found is not None:
    return found

  bar = tqdm.tqdm(
      total=total, desc=f'preparing {path.name}', unit='example', delay=1.0
  )

  def counted(chunks):
    for chunk in chunks:
      _check_weights(models.sample_weight_of(chunk))
      yield chunk
      bar.update(len(tf.nest.flatten(chunk)[0]))

  with bar:
    chunks, rows = read()
    examples = raw_files.RawArrays.write(folder, counted(chunks), spec, _WHAT)
  if not rows:
    raise ValueError('There must be at least one client, found none.')
  columns = {
      'rows': np.concatenate(list(rows.values())),
      'starts': np.cumsum([0, *(len(client_rows) for client_rows in rows.values())]),
  }
  arrays = {'examples': examples} | {
      name: raw_files.RawArrays.write(folder, [column], _INDEX_SPEC, _WHAT)
      for name, column in columns.items()
  }
  saved = {
      'format': _FORMAT,
      'key': key,
      'client_ids': list(rows),
      'arrays': {name: array.to_json() for name, array in arrays.items()},
  }
  partial = path.with_suffix(f'.{os.getpid()}.partial')
  partial.write_text(json.dumps(saved))
  os.replace(partial, path)
  return FileClientData(list(rows), **arrays)


def _check_weights(weights: Optional[np.ndarray]) -> None:
  """Refuses negative sample weights; `RawArrays.write` refuses NaN and infinity."""
  if weights is not None and np.any(np.asarray(weights) < 0):
    raise ValueError(
        f'Sample weights must not be negative, found {np.min(weights)}. Use 0 for '
        'examples that do not count.'
    )


def _find(path: pathlib.Path, key: str, spec: Any) -> Optional[FileClientData]:
  """Returns what `_prepare` wrote; `None`, with a warning, if files are damaged."""
  if not path.is_file():
    return None
  specs = {'examples': spec, 'rows': _INDEX_SPEC, 'starts': _INDEX_SPEC}
  try:
    saved = json.loads(path.read_text())
    if saved['format'] != _FORMAT or saved['key'] != key:
      return None
    arrays = {
        name: raw_files.RawArrays.from_json(saved['arrays'][name], spec, path.parent)
        for name, spec in specs.items()
    }
    if None in arrays.values():
      return None
    damaged = [file for array in arrays.values() for file in array.damaged()]
    client_ids = list(saved['client_ids'])
  except (ValueError, KeyError, TypeError):
    damaged = [path]
  if damaged:
    logging.warning(
        "Files of the clients' data are damaged or missing and are written again: "
        '%s', ', '.join(map(str, damaged)),
    )
    return None
  return FileClientData(client_ids, **arrays)


def masked_inputs(batch: Any, mask: Any) -> Any:
  """Sets the inputs of a batch to 0 where a client does not observe them.

  Args:
    batch: A pair, a triple or a mapping.
    mask: As `ClientBatches.input_mask` returns it.

  Returns:
    The batch with the floating-point inputs times the mask; the batch itself if the mask
    is `None`.
  """
  if mask is None:
    return batch
  inputs, _ = models.split_batch(batch)
  inputs = tf.nest.map_structure(
      lambda x, m: x * m if x.dtype.is_floating else x, inputs, mask
  )
  return {**batch, 'x': inputs} if isinstance(batch, Mapping) else (inputs, *batch[1:])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientBatches:
  """How a client reads its examples in a round.

  The passes over the examples, each in its own order, are concatenated, cut to
  `max_elements`, and divided into batches, like `shuffle`, `repeat`, `take` and `batch`
  of a `tf.data.Dataset`. TFF's baselines preprocess in the same way.

  Attributes:
    data: The `FileClientData`.
    batch_size: Examples a step; the last batch of all may be smaller.
    num_epochs: Passes over the client's examples.
    shuffle: Whether each pass has a random order, drawn from (seed, round, client).
    max_elements: At most so many examples over all passes.
    max_batches: At most so many batches.
    drop_remainder: Whether to leave out a last batch that is smaller.
    label_share: The share of a client's examples whose labels are known, above 0; the
      choice depends on (seed, client). The other examples take part only in the terms of
      the loss that need no label, such as `LocalDistillation`.
    input_share: The share of the (floating-point) input features that a client observes,
      above 0; the choice depends on (seed, client). The others are 0.
    seed: Decides the orders, and which labels and features are missing.
  """

  data: FileClientData
  batch_size: int
  num_epochs: int = 1
  shuffle: bool = True
  max_elements: Optional[int] = None
  max_batches: Optional[int] = None
  drop_remainder: bool = False
  label_share: float = 1.0
  input_share: float = 1.0
  seed: int = 0

  def __post_init__(self):
    if not isinstance(self.data, FileClientData):
      raise TypeError(
          f'`data` must be a `tff_kd.FileClientData`, found {self.data!r}.'
      )
    for name in ('batch_size', 'num_epochs', 'max_elements', 'max_batches'):
      value = getattr(self, name)
      optional = name.startswith('max_')
      if not (optional and value is None) and (
          not isinstance(value, int) or value < 1
      ):
        raise ValueError(f'`{name}` must be a positive integer, found {value!r}.')
    for name in ('label_share', 'input_share'):
      value = getattr(self, name)
      if not 0.0 < value <= 1.0:
        raise ValueError(f'`{name}` must be above 0 and at most 1, found {value!r}.')

  @property
  def element_spec(self) -> Any:
    """The structure of a batch, for `input_spec`."""
    return self.data.element_spec

  @property
  def num_batches(self) -> np.ndarray:
    """int64 `[clients]`, how many steps each client does in a round."""
    total = self.data.num_examples * self.num_epochs
    total = np.minimum(total, self._limit)
    if self.drop_remainder:
      return total // self.batch_size
    return -(-total // self.batch_size)

  @property
  def _limit(self) -> int:
    limits = [np.iinfo(np.int32).max]
    if self.max_elements is not None:
      limits.append(self.max_elements)
    if self.max_batches is not None:
      limits.append(self.max_batches * self.batch_size)
    return min(limits)

  def rows(self, client: tf.Tensor, round_num: tf.Tensor) -> tf.Tensor:
    """Returns the client's examples in the order of use, as rows of `data.open()`.

    Args:
      client: The client's number, an int32 scalar.
      round_num: The round, an int32 scalar.

    Returns:
      int64 `[n]`; the batches are its parts of `batch_size`.
    """
    return self.rows_and_labelled(client, round_num)[0]

  def rows_and_labelled(
      self, client: tf.Tensor, round_num: tf.Tensor
  ) -> tuple[tf.Tensor, Optional[tf.Tensor]]:
    """Returns a client's examples in the order of use, and which labels it knows.

    Args:
      client: The client's number, an int32 scalar.
      round_num: The round's number, an int32 scalar.

    Returns:
      int64 `[n]`, rows of `data.open()`, as `rows` returns them; and float32 `[n]`, 1
      where the client knows the label, or `None` if it knows all.
    """
    start, count = self.data.span(client)
    # Draws no more passes than the limits allow.
    needed = -(-self._limit // tf.maximum(count, 1))
    num_epochs = tf.minimum(tf.cast(needed, tf.int32), self.num_epochs)
    shape = tf.stack([num_epochs, tf.cast(count, tf.int32)])
    if self.shuffle:
      seed = self._seed_of(_ORDER_STREAM, round_num, client)
      keys = tf.random.stateless_uniform(
          shape, seed, minval=None, maxval=None, dtype=tf.int32
      )
      order = tf.cast(tf.argsort(keys, axis=-1), tf.int64)
    else:
      order = tf.broadcast_to(tf.range(count), shape)
    order = tf.reshape(order, [-1])[: self._limit]
    if self.drop_remainder:
      whole = tf.size(order) // self.batch_size * self.batch_size
      order = order[:whole]
    labelled = None
    if self.label_share < 1.0:
      draws = tf.random.stateless_uniform(
          count[tf.newaxis], self._seed_of(_LABEL_STREAM, client)
      )
      labelled = tf.gather(tf.cast(draws < self.label_share, tf.float32), order)
    return self.data.rows(order + start), labelled

  def _seed_of(self, stream: int, *numbers: tf.Tensor) -> tf.Tensor:
    seed = tf.stack([self.seed, stream])
    for number in numbers:
      seed = tf.random.experimental.stateless_fold_in(seed, number)
    return seed

  def num_elements(self, total: tf.Tensor, step_share: tf.Tensor) -> tf.Tensor:
    """Returns how many examples a share of a client's steps uses; at least one step.

    Args:
      total: int32, the number of examples of all steps.
      step_share: float32, the share of the steps, above 0 and at most 1.

    Returns:
      An int32 scalar.
    """
    steps = tf.cast(tf.math.ceil(total / self.batch_size), tf.float32)
    # A rounding error must not add a step.
    steps = tf.math.ceil(steps * step_share - 1e-4)
    steps = tf.maximum(tf.cast(steps, tf.int32), 1)
    return tf.minimum(steps * self.batch_size, total)

  def input_mask(self, client: tf.Tensor) -> Any:
    """Returns which features a client observes.

    Args:
      client: The client's number, an int32 scalar.

    Returns:
      A structure like the inputs of one example: 0/1 of the inputs' dtype, all 1 for
      integers (indices); `None` if all features are observed.
    """
    if self.input_share == 1.0:
      return None
    specs, _ = models.split_batch(self.element_spec)
    masks = []
    for i, spec in enumerate(tf.nest.flatten(specs)):
      mask = tf.ones(spec.shape[1:], spec.dtype)
      if spec.dtype.is_floating:
        seed = self._seed_of(_INPUT_STREAM, client, tf.constant(i))
        draws = tf.random.stateless_uniform(spec.shape[1:], seed)
        mask = tf.cast(draws < self.input_share, spec.dtype)
      masks.append(mask)
    return tf.nest.pack_sequence_as(specs, masks)

  def dataset(self, client: Any, round_num: Any = 0) -> tf.data.Dataset:
    """Returns the same batches as a `tf.data.Dataset`, which holds file names only.

    Use it for TFF's own processes, for evaluation, or to look at the data.

    Args:
      client: The client's number or name.
      round_num: The round.

    Raises:
      KeyError: If there is no client of that name.
      ValueError: If `label_share` is below 1: a dataset cannot mark unknown labels.
    """
    if self.label_share < 1.0:
      raise ValueError(
          'A dataset cannot say which labels are unknown: `label_share` must be 1 here, '
          f'found {self.label_share}.'
      )
    if not tf.is_tensor(client):  # Within `dataset_computation` it is one.
      client = self.data.names.number(client)
    client = tf.convert_to_tensor(client, tf.int32)
    rows = self.rows(client, tf.convert_to_tensor(round_num, tf.int32))

    def read(ids):
      # Opened in the function: captured tensors would be sent with the dataset.
      batch = raw_files.gather(self.data.open(), ids)
      return masked_inputs(batch, self.input_mask(client))

    return tf.data.Dataset.from_tensor_slices(rows).batch(self.batch_size).map(read)

  @functools.cached_property
  def dataset_computation(self) -> tff.Computation:
    """A `tff.Computation` (`ClientRound` -> batches*).

    For `tff.simulation.compose_dataset_computation_with_learning_process`.
    """

    @tff.tensorflow.computation(ClientRound(np.int32, np.int32))
    def dataset_computation(client_round):
      return self.dataset(client_round.client, client_round.round_num)

    return dataset_computation
