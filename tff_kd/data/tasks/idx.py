"""Any data set in IDX files: MNIST, Fashion-MNIST, EMNIST and their like.

The format: two zero bytes, a type code, the number of dimensions, each dimension
as a big-endian uint32, then the values in C order, big-endian.
"""

import gzip
import math
import os
import pathlib
import zlib

import numpy as np

from tff_kd.data import task as task_lib

_DTYPES: dict[int, np.dtype] = {
    0x08: np.dtype('u1'),
    0x09: np.dtype('i1'),
    0x0B: np.dtype('>i2'),
    0x0C: np.dtype('>i4'),
    0x0D: np.dtype('>f4'),
    0x0E: np.dtype('>f8'),
}


def read_idx(path: os.PathLike) -> np.ndarray:
  """Reads one IDX file, plain or gzipped.

  Raises:
    ValueError: If the file is damaged, truncated, too long or in another format;
      names the file.
  """
  path = os.fspath(path)
  with open(path, 'rb') as file:
    raw = file.read()
  if raw[:2] == b'\x1f\x8b':
    try:
      raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
      raise ValueError(
          f'The file {path} is a damaged or truncated gzip file: {error}. '
          'Fetch it again.'
      ) from error
  if len(raw) < 4 or raw[:2] != b'\0\0' or raw[2] not in _DTYPES:
    raise ValueError(
        f'The file {path} is not an IDX file: it begins with {raw[:4]!r}.'
    )
  dtype, rank = _DTYPES[raw[2]], raw[3]
  start = 4 + 4 * rank
  if len(raw) < start:
    raise ValueError(f'The file {path} is truncated: its header is incomplete.')
  shape = tuple(int(d) for d in np.frombuffer(raw, '>u4', rank, 4))
  expected = start + math.prod(shape) * dtype.itemsize
  if len(raw) != expected:
    problem = 'truncated' if len(raw) < expected else 'too long'
    raise ValueError(
        f'The file {path} is {problem}: its header tells of {shape} values of '
        f'{dtype.itemsize} bytes, {expected} bytes in all, found {len(raw)}.'
    )
  values = np.frombuffer(raw, dtype, offset=start).reshape(shape)
  return values.astype(dtype.newbyteorder('='))


def _find(data_dir: pathlib.Path, split: str, kind: str) -> pathlib.Path:
  """Returns the file of a split, such as `train-images-idx3-ubyte.gz`."""
  found = sorted(
      path
      for path in data_dir.glob(f'*{split}-{kind}*')
      if path.is_file() and 'idx' in path.name
  )
  plain = [path for path in found if path.suffix != '.gz']
  if len(plain) == 1:
    # The gzipped form of the same file is there, too.
    return plain[0]
  if len(found) != 1:
    raise ValueError(
        f'The folder {data_dir} must hold one file *{split}-{kind}*idx*, plain or '
        f'gzipped; found {[path.name for path in found] or "none"}.'
    )
  return found[0]


def _read_split(data_dir: pathlib.Path, splits: tuple[str, ...]) -> task_lib.Examples:
  split = next(
      (s for s in splits if list(data_dir.glob(f'*{s}-images*'))), splits[0]
  )
  images_path = _find(data_dir, split, 'images')
  labels_path = _find(data_dir, split, 'labels')
  images, labels = read_idx(images_path), read_idx(labels_path)
  if labels.ndim != 1 or images.ndim < 2 or len(images) != len(labels):
    raise ValueError(
        f'{images_path} holds values of shape {images.shape} and {labels_path} of '
        f'{labels.shape}: there must be as many images as labels.'
    )
  return task_lib.image_examples(images, labels)


def load(
    *,
    data_dir: os.PathLike,
    seed: int,
    transfer_size: int = 1000,
    validation_size: int = 1000,
) -> task_lib.Task:
  """Loads the task `idx` from a folder.

  Args:
    data_dir: Holds `*train-images*`, `*train-labels*` and `*t10k-*` (or `*test-*`)
      files, plain or gzipped.
    seed: Decides which training examples go to the clients, the transfer set and
      the validation part.
    transfer_size: Examples for the transfer set.
    validation_size: Examples for choosing the best round.

  Returns:
    A `Task`: images in [0, 1] if the files hold bytes; classes from 0 to the
    largest label.
  """
  if not data_dir or not pathlib.Path(data_dir).is_dir():
    raise ValueError(
        'The task idx needs `data_dir`, a folder with IDX files, found '
        f'{data_dir!r}.'
    )
  data_dir = pathlib.Path(data_dir)
  train = _read_split(data_dir, ('train',))
  test = _read_split(data_dir, ('t10k', 'test'))
  if train.inputs.shape[1:] != test.inputs.shape[1:]:
    raise ValueError(
        f'The images in {data_dir} differ in shape: {train.inputs.shape[1:]} for '
        f'training, {test.inputs.shape[1:]} for the test.'
    )
  lowest = min(train.labels.min(), test.labels.min())
  if lowest < 0:
    raise ValueError(f'The labels in {data_dir} must not be negative: {lowest}.')
  return task_lib.split_image_task(
      train, transfer_size=transfer_size, validation_size=validation_size, seed=seed,
      name='idx', test=test,
      num_classes=int(max(train.labels.max(), test.labels.max())) + 1,
  )
