"""Examples in raw files that workers map into their memory.

A graph that reads rows holds only file names. A gather touches only the rows that it
needs, and processes on one machine share the pages. Each array has one file, which is
named after its contents, so that damage is detected.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import hashlib
import os
import pathlib
import tempfile
from typing import Any, Optional

import numpy as np
import tensorflow as tf

from tff_kd import temporary

ROWS_PER_CHUNK = 4096
# A dtype of the package ml_dtypes, which NumPy does not count as floating.
_BFLOAT16 = np.dtype(tf.bfloat16.as_numpy_dtype)


@dataclasses.dataclass(frozen=True)
class RowSpec:
  """The shape and the dtype of one row of an array; `tf.nest` takes it as a leaf."""

  shape: tuple[int, ...]
  dtype: np.dtype


def as_arrays(value: Any) -> Any:
  """Converts tuples and dicts to structures of arrays, all else (also lists) to arrays.

  Raises:
    ValueError: If the rows of a list have different lengths.
  """
  if isinstance(value, Mapping):
    return {key: as_arrays(part) for key, part in value.items()}
  if isinstance(value, tuple):
    return tuple(map(as_arrays, value))
  try:
    return np.asarray(value)
  except ValueError as error:
    raise ValueError(
        f'A list of {len(value)} is not an array: its rows have different lengths or '
        'shapes. Pad them to one length.'
    ) from error


def check_rows(arrays: Any, owner: str) -> int:
  """Returns the number of rows, which must be the same for all arrays.

  Args:
    arrays: A structure of arrays.
    owner: What the arrays belong to, for the error.

  Raises:
    ValueError: If the numbers of rows differ, or an array is a scalar.
  """
  sizes = {len(a) if a.ndim else 0 for a in tf.nest.flatten(arrays)}
  if len(sizes) != 1 or not all(a.ndim for a in tf.nest.flatten(arrays)):
    raise ValueError(
        f'Every array of {owner} must have one row an example, found arrays of '
        f'{sorted(sizes)} rows.'
    )
  return sizes.pop()


def array_specs(arrays: Any) -> Any:
  """Returns the `RowSpec`s of a structure of arrays."""
  return tf.nest.map_structure(lambda a: RowSpec(a.shape[1:], a.dtype), arrays)


def element_specs(element_spec: Any, owner: str) -> Any:
  """Returns the `RowSpec`s of a dataset's elements.

  Args:
    element_spec: The `element_spec` of an unbatched dataset.
    owner: Whose elements they are, for the error.

  Raises:
    ValueError: If a shape is not fully defined.
  """

  def row_spec(spec: Any) -> RowSpec:
    if not isinstance(spec, tf.TensorSpec) or not spec.shape.is_fully_defined():
      raise ValueError(
          f'The elements of {owner} must have fully defined shapes, found {spec}. Pass '
          'them unbatched, and padded if their lengths differ.'
      )
    return RowSpec(tuple(spec.shape), np.dtype(spec.dtype.as_numpy_dtype))

  return tf.nest.map_structure(row_spec, element_spec)


def _plain(spec: Any) -> Any:
  """Returns a structure with tuples in place of NamedTuples, as `as_arrays` does."""
  if isinstance(spec, Mapping):
    return {key: _plain(part) for key, part in spec.items()}
  return tuple(map(_plain, spec)) if isinstance(spec, tuple) else spec


def batch_spec(spec: Any) -> Any:
  """Returns the `tf.TensorSpec`s of a batch."""
  return tf.nest.map_structure(
      lambda s: tf.TensorSpec([None, *s.shape], s.dtype), spec
  )


# How to encode each part of an example as numbers.
_ENCODINGS = {
    'inputs': 'Encode the inputs first: text with `keras.layers.TextVectorization`, say.',
    'labels': 'Encode them: `names, y = np.unique(labels, return_inverse=True)`.',
    'sample weights': 'Convert them: `weights.astype(np.float32)`.',
}


def check_dtypes(example_spec: Sequence[Any], owner: str) -> None:
  """Checks that arrays can be stored in raw files.

  Args:
    example_spec: The structures of `RowSpec`s of the inputs and, if there are any, of
      labels and sample weights.
    owner: What error messages call the whole.

  Raises:
    ValueError: If an array holds neither numbers nor booleans.
  """
  for (part, hint), spec in zip(_ENCODINGS.items(), example_spec):
    for leaf in tf.nest.flatten(spec):
      if leaf.dtype.kind == 'O':
        hint = (
            'Rows of different lengths make such an array: pad them to one length. '
            + hint
        )
      if leaf.dtype.kind not in 'fiub' and leaf.dtype != _BFLOAT16:
        raise ValueError(
            f'{owner} holds numbers and booleans, found {part} of the dtype '
            f'{leaf.dtype}. {hint}'
        )


def check_finite(values: np.ndarray, seen: int, owner: str) -> None:
  """Checks that numbers are finite; NaN or infinity would ruin every model.

  Args:
    values: The numbers.
    seen: How many examples have been checked, these included, for the error.
    owner: What the numbers belong to, for the error.

  Raises:
    ValueError: If a number is not finite.
  """
  if values.dtype == _BFLOAT16:
    values = values.astype(np.float32)
  if values.dtype.kind == 'f' and not np.isfinite(values).all():
    raise ValueError(
        f'{owner} must be finite everywhere, found NaN or infinity among its first '
        f'{seen} examples. Mend or drop them.'
    )


def open_directory(directory: Optional[os.PathLike], prefix: str) -> pathlib.Path:
  """Returns the absolute path of the folder for the files, and makes it if need be.

  Only the owner can read a folder that is made here. If `directory` is `None`, the
  folder is temporary: it stays until the program ends, because computations name its
  files and may outlive the object that wrote them.
  """
  if directory is None:
    return temporary.new_directory(prefix)
  path = pathlib.Path(directory).expanduser().absolute()
  path.mkdir(mode=0o700, parents=True, exist_ok=True)
  return path


def _digest(path: pathlib.Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()[:32]


class RawArrays:
  """A structure of arrays with equally many rows, each in a file.

  Attributes:
    spec: The structure of `RowSpec`s.
    size: The number of rows.
    files: The files' paths, in tf.nest's order.
  """

  def __init__(self, spec: Any, size: int, files: list[pathlib.Path]):
    self.spec = _plain(spec)
    self.size = size
    self.files = files
    self._leaves = tf.nest.flatten(spec)

  @classmethod
  def write(
      cls,
      directory: pathlib.Path,
      chunks: Iterable[Any],
      spec: Any,
      owner: str,
  ) -> 'RawArrays':
    """Writes the files: all of them, or none.

    Args:
      directory: The folder.
      chunks: Structures of arrays with any number of rows each.
      spec: The structure of `RowSpec`s.
      owner: What error messages call the whole ('A transfer set').

    Returns:
      The `RawArrays`.

    Raises:
      ValueError: If a number is not finite.
    """
    leaves = tf.nest.flatten(spec)
    partial = [
        tempfile.NamedTemporaryFile(dir=directory, suffix='.partial', delete=False)
        for _ in leaves
    ]
    try:
      digests = [hashlib.sha256() for _ in leaves]
      size = 0
      for chunk in chunks:
        rows = tf.nest.flatten(chunk)
        size += len(rows[0])
        for file, digest, leaf, values in zip(
            partial, digests, leaves, rows, strict=True
        ):
          check_finite(np.asarray(values), size, owner)
          raw = np.ascontiguousarray(values, leaf.dtype).tobytes()
          file.write(raw)
          digest.update(raw)
      files = []
      for file, digest in zip(partial, digests):
        file.close()
        files.append(directory / f'{digest.hexdigest()[:32]}.bin')
        os.replace(file.name, files[-1])
      return cls(spec, size, files)
    except BaseException:
      for file in partial:
        file.close()
        pathlib.Path(file.name).unlink(missing_ok=True)
      raise

  def damaged(self) -> list[pathlib.Path]:
    """Returns the files that are missing or do not hold what was written."""
    return [
        path for path, leaf in zip(self.files, self._leaves)
        if not path.is_file()
        or path.stat().st_size
        != self.size * leaf.dtype.itemsize * int(np.prod(leaf.shape))
        or _digest(path) != path.stem
    ]

  def map(self) -> Any:
    """Returns the arrays as tensors over the mapped files, in their structure.

    Every run of the op opens and maps the file again, so call this outside loops and
    gather rows inside. A gather reads only the rows that it needs.
    """

    def map_leaf(leaf: RowSpec, path: pathlib.Path) -> tf.Tensor:
      if not self.size:  # An empty file cannot be mapped.
        return tf.zeros([0, *leaf.shape], leaf.dtype)
      return tf.raw_ops.ImmutableConst(
          dtype=tf.as_dtype(leaf.dtype),
          shape=[self.size, *leaf.shape],
          memory_region_name=str(path),
      )

    return tf.nest.pack_sequence_as(
        self.spec,
        [map_leaf(*leaf_and_file) for leaf_and_file in zip(self._leaves, self.files)],
    )

  def arrays(self) -> Any:
    """Returns the arrays as NumPy arrays over the files, in their structure."""
    leaves = [
        np.memmap(path, leaf.dtype, 'r', shape=(self.size, *leaf.shape))
        if self.size and all(leaf.shape)
        else np.zeros((self.size, *leaf.shape), leaf.dtype)
        for leaf, path in zip(self._leaves, self.files)
    ]
    return tf.nest.pack_sequence_as(self.spec, leaves)

  def to_json(self) -> dict[str, Any]:
    """Returns the arguments of `from_json`, without the structure."""
    return {
        'size': self.size,
        'files': [path.name for path in self.files],
        'rows': [_row_to_json(s) for s in self._leaves],
    }

  @classmethod
  def from_json(
      cls, saved: dict[str, Any], spec: Any, directory: pathlib.Path
  ) -> Optional['RawArrays']:
    """Returns the arrays that `to_json` described; `None` if they have another spec."""
    leaves = [_row_to_json(s) for s in tf.nest.flatten(spec)]
    if saved['rows'] != leaves:
      return None
    return cls(spec, saved['size'], [directory / name for name in saved['files']])


def _row_to_json(spec: RowSpec) -> list[Any]:
  # For bfloat16 `dtype.str` says only that it has two bytes.
  name = 'bfloat16' if spec.dtype == _BFLOAT16 else spec.dtype.str
  return [list(spec.shape), name]


def gather(mapped: Any, ids: tf.Tensor) -> Any:
  """Gathers rows of a structure of (mapped) tensors.

  Args:
    mapped: The structure.
    ids: An integer tensor `[k]`; a static k stays static.

  Returns:
    The rows, `[k, ...]` each.
  """

  def gather_leaf(tensor: tf.Tensor) -> tf.Tensor:
    rows = tf.gather(tensor, ids)
    rows.set_shape([ids.shape[0], *tensor.shape[1:]])
    return rows

  return tf.nest.map_structure(gather_leaf, mapped)


def chunks_of(arrays: Any) -> Iterable[Any]:
  """Yields a structure of arrays, `ROWS_PER_CHUNK` rows at a time."""
  size = len(tf.nest.flatten(arrays)[0])
  for start in range(0, size, ROWS_PER_CHUNK):
    yield tf.nest.map_structure(
        lambda a: a[start : start + ROWS_PER_CHUNK], arrays
    )


def content_digest(arrays: Any) -> str:
  """Returns a hash of the contents of a structure of arrays."""
  digest = hashlib.sha256()
  for array in tf.nest.flatten(arrays):
    digest.update(f'{array.dtype.str}{array.shape}'.encode())
    for chunk in chunks_of(array):
      chunk = np.ascontiguousarray(chunk)
      # NumPy has no buffers of bfloat16.
      digest.update((chunk.view(np.uint16) if chunk.dtype == _BFLOAT16 else chunk).data)
  return digest.hexdigest()[:32]
