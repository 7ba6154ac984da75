r"""Attacks a finished run, as those could who have its models, or its server.

  python -m pipelines.audit --run=runs/mine
  python -m pipelines.audit --run=runs/mine --victims=20 --attack_seed=1
  python -m pipelines.audit --run=runs/mine --shadow_models=16

Membership inference against the released models and against what single clients send;
inversion of predictions on the transfer set. Leaves report.md, report.json and pictures.
"""

import pathlib

from absl import flags

import pipelines
from pipelines import run_folders

_RUN = flags.DEFINE_string(
    'run', None, 'The folder of a finished run of pipelines.train.'
)
_REPORT_DIR = flags.DEFINE_string(
    'report_dir', None, 'Where the report goes; the folder audit of the run if unset.'
)
_VICTIMS = flags.DEFINE_integer(
    'victims', 10, 'How many clients are attacked as the server could that receives what '
    'they send.', lower_bound=1,
)
_ATTACK_SEED = flags.DEFINE_integer(
    'attack_seed', 0, 'Decides whom, which examples choose an attack and which measure '
    'it, the initial weights of the inverting network, and the shadow models.',
    lower_bound=0,
)
_EPOCHS = flags.DEFINE_integer(
    'inversion_epochs', 60, 'Passes of that over the transfer examples; 0 for no '
    'inversion.', lower_bound=0,
)
_SHADOW_MODELS = flags.DEFINE_integer(
    'shadow_models', 0, 'How many models are trained for each released student, on half '
    'of the examples each, to compare it with (LiRA); even, 4 or more, and 16 is a good '
    'start. Takes as long as so many central trainings; 0 for none.', lower_bound=0,
)
flags.register_validator(
    'shadow_models', lambda value: value == 0 or value >= 4 and value % 2 == 0,
    message='must be 0, or an even number of 4 or more: pairs share the examples out.',
)
_SHADOW_EPOCHS = flags.DEFINE_integer(
    'shadow_epochs', 20, 'Passes of a shadow model over its examples, at most: ends when '
    'the validation score was not better for 3 of them, and keeps the best.',
    lower_bound=1,
)


@pipelines.for_users
def main(argv: list[str]) -> None:
  run_dir = run_folders.chosen(_RUN.value, 'audit')
  # Here and not above: --help and a wrong flag need not wait for TensorFlow.
  from pipelines import audit_job

  audit_job.run(
      run_dir,
      pathlib.Path(_REPORT_DIR.value or run_dir / 'audit'),
      num_victims=_VICTIMS.value,
      seed=_ATTACK_SEED.value,
      num_epochs=_EPOCHS.value,
      num_shadow_models=_SHADOW_MODELS.value,
      shadow_epochs=_SHADOW_EPOCHS.value,
  )


if __name__ == '__main__':
  pipelines.run(main)
