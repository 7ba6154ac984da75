"""Federated EMNIST, digits only, split by writer as in TFF."""

import numpy as np
from tff_kd.compat import tff

from tff_kd.data import task as task_lib
from tff_kd.data.tasks import downloads


def load(
    *, seed: int, transfer_size: int = 1000, validation_size: int = 500
) -> task_lib.Task:
  """Loads the task `emnist`: images `[28, 28, 1]` in [0, 1], ten classes.

  Clients are the 3,383 writers. The transfer set and the validation part are random
  training images, which no client keeps.

  Args:
    seed: Decides which images the server has.
    transfer_size: Images for the transfer set.
    validation_size: Images for choosing the best round.

  Raises:
    OSError: If the images can be neither found nor downloaded.
  """
  train, test = downloads.fetch(
      'emnist', lambda: tff.simulation.datasets.emnist.load_data(only_digits=True),
      '~/.tff',
  )
  return build(train, test, seed, transfer_size, validation_size)


def build(
    train: tff.simulation.datasets.ClientData, test: tff.simulation.datasets.ClientData,
    seed: int, transfer_size: int, validation_size: int,
) -> task_lib.Task:
  """Builds the task from TFF client data of 'pixels' and 'label'."""
  names = train.client_ids
  pool, client_rows = _pool(train, names)
  tests, test_rows = _pool(test, names)
  transfer, validation, kept = task_lib.split_rows(
      len(pool), [transfer_size, validation_size], seed=seed
  )
  kept = np.sort(kept)
  # The clients' rows among those that are kept.
  new_number = np.full(len(pool), -1)
  new_number[kept] = np.arange(len(kept))
  client_rows = [
      numbers[numbers >= 0] for numbers in (new_number[rows] for rows in client_rows)
  ]
  return task_lib.image_task(
      name='emnist', clients=pool.take(kept), client_rows=client_rows,
      client_names=names, transfer=pool.take(transfer),
      validation=pool.take(validation),
      test=tests, test_rows=test_rows, num_classes=10,
  )


def _pool(data, names) -> tuple[task_lib.Examples, list[np.ndarray]]:
  """Returns all clients' examples, and the rows of each client."""
  parts = []
  for name in names:
    batches = list(
        data.create_tf_dataset_for_client(name).batch(4096).as_numpy_iterator()
    )
    parts.append(
        task_lib.image_examples(
            np.concatenate([batch['pixels'] for batch in batches]),
            np.concatenate([batch['label'] for batch in batches]),
        )
    )
  return task_lib.pool(parts)
