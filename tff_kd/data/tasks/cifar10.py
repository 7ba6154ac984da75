"""CIFAR-10, as `keras.datasets` has it."""

from tff_kd.data import task as task_lib
from tff_kd.data.tasks import downloads


def load(
    *, seed: int, transfer_size: int = 1000, validation_size: int = 500
) -> task_lib.Task:
  """Loads the task `cifar10`: images `[32, 32, 3]` in [0, 1], ten classes.

  Args:
    seed: Decides which of the 50,000 training images go to the clients, the transfer set
      and the validation part.
    transfer_size: Images for the transfer set.
    validation_size: Images for choosing the best round.

  Raises:
    OSError: If the images can be neither found nor downloaded.
  """
  return downloads.keras_image_task(
      'cifar10', seed, transfer_size, validation_size,
      class_names=(
          'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse',
          'ship', 'truck',
      ),
  )
