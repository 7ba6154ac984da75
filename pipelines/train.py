r"""Trains one algorithm on one task and compares it with FedAvg.

  python -m pipelines.train
  python -m pipelines.train --alpha=1 --rounds=50 --target=0.5
  python -m pipelines.train --algorithm=fed_df --consensus=era --seed=1
  python -m pipelines.train --task=shakespeare --algorithm=fed_df
  python -m pipelines.train --task=idx --data_dir=/data/mnist --num_clients=100
  python -m pipelines.train --task=examples/own_task.py --data_dir=my/npz/files
  python -m pipelines.train --algorithm=examples/own_algorithm.py
  python -m pipelines.train --config=runs/mine/config.json --seed=1
  python -m pipelines.train --algorithm=fed_df --num_clients=500 --alpha=1 --dry_run
"""

from absl import flags

import pipelines
from pipelines import train_checks
from pipelines import train_flags
from tff_kd import own_files

flags.adopt_module_key_flags(train_flags)


@pipelines.for_users
def main(argv: list[str]) -> None:
  train_flags.take_defaults()
  if not own_files.is_own(train_flags.TASK.value):
    train_checks.run()
  # Here and not above: --help and a wrong flag need not wait for TensorFlow.
  from pipelines import train_job

  train_job.run()


if __name__ == '__main__':
  pipelines.run(main)
