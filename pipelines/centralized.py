r"""Trains student and teacher on all clients' examples in one place: the ceiling.

  python -m pipelines.centralized
  python -m pipelines.centralized --task=newsgroups --seed=1
  python -m pipelines.centralized --task=shakespeare --central_epochs=5

What no federated algorithm is expected to pass, and what privacy forbids. Takes the flags
of pipelines.train that say what is trained on what. Leaves results.json and the models.
"""

from absl import app
from absl import flags

import pipelines
from pipelines import central_flags
from pipelines import train_flags

flags.adopt_module_key_flags(central_flags)
flags.adopt_module_key_flags(train_flags)


@pipelines.for_users
def main(argv: list[str]) -> None:
  unused = [
      f'--{name}' for name, flag in train_flags.own_flags().items()
      if flag.present and name not in central_flags.OF_TRAIN
  ]
  if unused:
    raise app.UsageError(f'{", ".join(unused)} has no effect here. Leave it out.')
  train_flags.take_defaults()
  # Here and not above: --help and a wrong flag need not wait for TensorFlow.
  from pipelines import centralized_job

  centralized_job.run(
      train_flags.output_dir('centralized'),
      epochs=central_flags.EPOCHS.value,
      learning_rate=central_flags.LEARNING_RATE.value,
      batch_size=central_flags.BATCH_SIZE.value,
  )


if __name__ == '__main__':
  pipelines.run(main)
