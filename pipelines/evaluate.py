r"""Evaluates the models that a run has left: centrally, client by client, in pictures.

  python -m pipelines.evaluate --run=runs/mine
  python -m pipelines.evaluate --run=runs/mine --part=clients --worst=20
  python -m pipelines.evaluate --run=runs/mine --alpha=1 --num_clients=50

Takes the flags of `pipelines.train`, too: those that are given replace the run's, so that
its models can be looked at under another split, another seed or another --data_dir.
Leaves report.json, clients.csv and pictures.
"""

import pathlib

from absl import flags

import pipelines
from pipelines import run_folders
from pipelines import train_flags

flags.adopt_module_key_flags(train_flags)

_RUN = flags.DEFINE_string(
    'run', None, 'The folder of a run of pipelines.train.'
)
_PART = flags.DEFINE_enum(
    'part', 'test', ['test', 'validation', 'clients'], 'On which examples: the test '
    'part; the validation part, which chose the best round; or those that clients '
    'trained on.'
)
_WORST = flags.DEFINE_integer(
    'worst', 5, 'How many of the worst clients are listed.', lower_bound=0
)
_REPORT_DIR = flags.DEFINE_string(
    'report_dir', None, "Where the report goes; the run's folder `evaluation` if unset."
)


@pipelines.for_users
def main(argv: list[str]) -> None:
  run_dir = run_folders.chosen(_RUN.value, 'evaluate')
  train_flags.take_run(run_dir)
  # Here and not above: --help and a wrong flag need not wait for TensorFlow.
  from pipelines import evaluate_job

  evaluate_job.run(
      run_dir, pathlib.Path(_REPORT_DIR.value or run_dir / 'evaluation'),
      part=_PART.value, num_worst=_WORST.value,
  )


if __name__ == '__main__':
  pipelines.run(main)
