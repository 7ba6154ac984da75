"""Fashion-MNIST, as `keras.datasets` has it."""

from tff_kd.data import task as task_lib
from tff_kd.data.tasks import downloads


def load(
    *, seed: int, transfer_size: int = 1000, validation_size: int = 500
) -> task_lib.Task:
  """Loads the task `fashion_mnist`: images `[28, 28, 1]` in [0, 1], ten classes.

  Args:
    seed: Decides which of the 60,000 training images go to the clients, the transfer set
      and the validation part.
    transfer_size: Images for the transfer set.
    validation_size: Images for choosing the best round.

  Raises:
    OSError: If the images can be neither found nor downloaded.
  """
  return downloads.keras_image_task(
      'fashion_mnist', seed, transfer_size, validation_size,
      class_names=(
          'T-shirt', 'trouser', 'pullover', 'dress', 'coat', 'sandal', 'shirt',
          'sneaker', 'bag', 'ankle boot',
      ),
  )
