r"""Trains student and teacher on all clients' examples in one place: the ceiling.

  python -m pipelines.centralized
  python -m pipelines.centralized --task=newsgroups --seed=1
  python -m pipelines.centralized --task=shakespeare --central_epochs=5

What no federated algorithm is expected to pass, and what privacy forbids. Takes the flags
of pipelines.train that say what is trained on what. Leaves results.json and the models.
"""

import pathlib
import sys
from typing import Optional

from absl import app
from absl import flags

import pipelines
from pipelines import central_flags
from pipelines import train_flags

flags.adopt_module_key_flags(central_flags)
flags.adopt_module_key_flags(train_flags)
_DEFAULT_DIR = 'runs/centralized'


def main(argv: list[str]) -> Optional[int]:
  if len(argv) > 1:
    raise app.UsageError(f'Not a flag: {argv[1:]}.')
  unused = [
      f'--{name}' for name, flag in train_flags.own_flags().items()
      if flag.present and name not in central_flags.OF_TRAIN
  ]
  if unused:
    raise app.UsageError(f'{", ".join(unused)} has no effect here. Leave it out.')
  train_flags.take_defaults()
  # Here and not above: --help and a wrong flag need not wait for TensorFlow.
  from pipelines import centralized_job

  try:
    centralized_job.run(
        pathlib.Path(train_flags.OUTPUT_DIR.value or _DEFAULT_DIR),
        epochs=central_flags.EPOCHS.value,
        learning_rate=central_flags.LEARNING_RATE.value,
        batch_size=central_flags.BATCH_SIZE.value,
    )
  except pipelines.UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    return 130
  return 0


if __name__ == '__main__':
  pipelines.run(main)
