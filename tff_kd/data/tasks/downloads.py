"""Tasks whose data are downloaded once."""

from collections.abc import Callable, Sequence
from typing import Any

import keras

from tff_kd.data import task as task_lib


def fetch(name: str, load_fn: Callable[[], Any], cache: str) -> Any:
  """Loads data that may have to be downloaded.

  Args:
    name: The task's name.
    load_fn: Reads the data, and downloads what is not in its cache.
    cache: Where `load_fn` looks first, for the error.

  Returns:
    What `load_fn` returns.

  Raises:
    OSError: If the data can be neither found nor downloaded; says what to do.
  """
  try:
    return load_fn()
  # Keras raises `Exception`, TFF the errors of urllib and requests.
  except Exception as error:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise OSError(
        f'The data of the task {name} are not in {cache}, and could not be downloaded '
        f'({reason}). Run it once where the network can be reached and copy that folder '
        'here; or, of data in IDX files, use --task=idx --data_dir=FOLDER; or take a '
        'task whose data are installed: mnist5k, shakespeare, newsgroups, movielens.'
    ) from error


def keras_image_task(
    name: str, seed: int, transfer_size: int, validation_size: int,
    *, class_names: Sequence[str],
) -> task_lib.Task:
  """Returns a task of `keras.datasets`, with the same test images."""
  source = getattr(keras.datasets, name)
  train, test = (
      task_lib.image_examples(*part)
      for part in fetch(name, source.load_data, '~/.keras/datasets')
  )
  return task_lib.split_image_task(
      train, transfer_size=transfer_size, validation_size=validation_size, seed=seed,
      name=name, test=test, num_classes=len(class_names), class_names=class_names,
  )
