r"""Trains one algorithm on one task and compares it with FedAvg.

  python -m pipelines.train
  python -m pipelines.train --alpha=1 --rounds=50 --target=0.5
  python -m pipelines.train --algorithm=fed_df --consensus=era --seed=1
  python -m pipelines.train --task=shakespeare --algorithm=fed_df
  python -m pipelines.train --task=idx --data_dir=/data/mnist --num_clients=100
  python -m pipelines.train --task=examples/own_task.py --data_dir=my/npz/files
  python -m pipelines.train --config=runs/mine/config.json --seed=1
  python -m pipelines.train --algorithm=fed_df --num_clients=500 --alpha=1 --dry_run
"""

import sys
from typing import Optional

from absl import app
from absl import flags
from absl import logging

import pipelines
from pipelines import train_checks
from pipelines import train_flags
from tff_kd import data

flags.adopt_module_key_flags(train_flags)


def main(argv: list[str]) -> Optional[int]:
  if len(argv) > 1:
    raise app.UsageError(f'Not a flag: {argv[1:]}.')
  train_flags.take_defaults()
  try:
    if not data.tasks.is_own(train_flags.TASK.value):
      train_checks.run()
    # Here and not above: --help and a wrong flag need not wait for TensorFlow.
    from pipelines import train_job

    if not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(logging.WARNING)
    train_job.run()
  except pipelines.UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print('Stopped. The run goes on if --output_dir names its folder.', file=sys.stderr)
    return 130
  return 0


if __name__ == '__main__':
  pipelines.run(main)
