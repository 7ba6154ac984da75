r"""Exports the models of a run for where they will run, and checks each file.

  python -m pipelines.export --run=runs/mine
  python -m pipelines.export --run=runs/mine --models=student --formats=keras,int8
  python -m pipelines.export --run=runs/mine --clients=0,3

The formats: `keras` (.keras), `saved_model`, `tflite` (floats), `int8` (TFLite, weights
and activations in 8 bits, with the transfer set as representative data) and
`int8_weights` (weights only: what recurrent models want, because TFLite does not quantise
the activations of a loop, so that for `int8` their steps are unrolled); and, where asked
for, `onnx` (needs `pip install tf2onnx onnxruntime`). Each file is loaded again and
compared with the model on test examples. Leaves export.json, too, and MODEL_CARD.md:
the data, the algorithm, scores, privacy, bytes, limits, and how to load each file.
"""

import importlib.util
import pathlib

from absl import flags

import pipelines
from pipelines import run_folders
from pipelines import train_flags

_DEFAULT_FORMATS = ['keras', 'saved_model', 'tflite', 'int8', 'int8_weights']
_FORMATS = [*_DEFAULT_FORMATS, 'onnx']
# What `onnx` needs and the lock does not have: the converter, and what runs the file.
_OF_ONNX = ('tf2onnx', 'onnxruntime')

_RUN = flags.DEFINE_string(
    'run', None, 'The folder of a run of pipelines.train.'
)
_MODELS = flags.DEFINE_list(
    'models', [], 'Which of its models, such as student; all if unset.'
)
_CLIENTS = flags.DEFINE_list(
    'clients', [], "The names of clients whose own models are exported beside the "
    "server's, where clients keep models (fml, fed_md, fed_per and others)."
)
_FORMATS_FLAG = flags.DEFINE_list(
    'formats', _DEFAULT_FORMATS, f'In which formats: of {", ".join(_FORMATS)}.'
)
flags.register_validator(
    _FORMATS_FLAG, lambda names: bool(names) and set(names) <= set(_FORMATS),
    f'--formats must be of {", ".join(_FORMATS)}.'
)
_EXAMPLES = flags.DEFINE_integer(
    'examples', 1000, 'On how many test examples the files are compared.', lower_bound=1
)
_EXPORT_DIR = flags.DEFINE_string(
    'export_dir', None, "Where the files go; the run's folder `export` if unset."
)


def _check_installed() -> None:
  """Refuses a format whose packages are not installed.

  Raises:
    UserError: If one is not.
  """
  if 'onnx' not in _FORMATS_FLAG.value:
    return
  missing = [name for name in _OF_ONNX if importlib.util.find_spec(name) is None]
  if missing:
    raise pipelines.UserError(
        f'--formats=onnx needs what is not installed here: {", ".join(missing)}. Install '
        f'it with `pip install {" ".join(missing)}`, which changes nothing in the lock, '
        'or leave onnx out of --formats.'
    )


@pipelines.for_users
def main(argv: list[str]) -> None:
  _check_installed()
  run_dir = run_folders.chosen(_RUN.value, 'export')
  train_flags.take_run(run_dir)
  # Here and not above: --help and a wrong flag need not wait for TensorFlow.
  from pipelines import export_job

  export_job.run(
      run_dir, pathlib.Path(_EXPORT_DIR.value or run_dir / 'export'),
      names=_MODELS.value, formats=_FORMATS_FLAG.value, num_examples=_EXAMPLES.value,
      clients=_CLIENTS.value,
  )


if __name__ == '__main__':
  pipelines.run(main)
