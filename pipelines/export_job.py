"""The job behind `pipelines.export`."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
import json
import logging
import os
import pathlib
import re
import sys
import tempfile
from typing import Any, NamedTuple, Optional
import warnings
import zipfile

import keras
import numpy as np
import tensorflow as tf

from pipelines import kept
from pipelines import model_card
from pipelines import released
from pipelines import run_folders
from pipelines import tables
from pipelines import train_data
from pipelines import train_evaluation
from pipelines import train_setup
from pipelines import UserError
import tff_kd
from tff_kd import evaluation
from tff_kd import internals

# A file that is worse by more than this is named: of accuracy, or of an error's own size.
_WORSE = 0.01
# The number of transfer examples that show TFLite the ranges of activations.
_REPRESENTATIVE = 200
_SIGNATURE = 'serving_default'
# Types and policies of Keras layers that become float32 in TFLite and ONNX.
_FLOATS = ('bfloat16', 'float16', 'float64', 'mixed_bfloat16', 'mixed_float16')
Predict = Callable[[Any], np.ndarray]


class _Exported(NamedTuple):
  """A file, loaded again.

  Attributes:
    path: The path of the file.
    size: The bytes of the file, or of all files in the folder.
    score: The task's metric on the examples.
    agreement: The share of examples (positions, of sequences) for which its class is
      the model's; of a regression the root of the mean squared difference.
    largest: The largest difference in any output.
  """

  path: pathlib.Path
  size: int
  score: float
  agreement: float
  largest: float


def run(
    run_dir: pathlib.Path, export_dir: pathlib.Path, *, names: Sequence[str],
    formats: Sequence[str], num_examples: int, clients: Sequence[str] = (),
) -> None:
  """Exports the models of a run, checks each file and reports.

  Args:
    run_dir: The folder of the run.
    export_dir: Where the files, export.json and the model card go.
    names: Which models of the server; all if empty.
    formats: In which formats.
    num_examples: On how many test examples the files are compared.
    clients: The names of clients whose own models are exported, too.

  Raises:
    UserError: If the run has no such model, or a file is not usable.
  """
  with train_setup.errors_for_users():
    task = train_data.load_task()
  of_server = released.load(run_dir, task, must_exist=not clients)
  models = [*_chosen(of_server, names, run_dir), *_of_clients(run_dir, clients)]
  export_dir.mkdir(parents=True, exist_ok=True)
  examples = task.test.take(
      np.random.default_rng(0).permutation(len(task.test))[:num_examples]
  )
  agreement = 'rms_difference' if task.is_regression else 'same_class'
  rows: list[tuple[str, ...]] = [(
      'file', 'KB', f'test {tables.words(task.metric)}', 'difference',
      'RMS difference' if task.is_regression else 'same class', 'largest difference',
  )]
  report, worse = {}, []
  for model in models:
    expected = released.predict(model.keras_model, examples.inputs)
    counted = train_evaluation.unmasked(
        evaluation.CentralEvaluator(model.spec), model.weights, examples
    )
    before = _score(expected, counted, model, task)
    rows.append((
        f'{model.name}, as the run left it',
        '' if model.path is None else f'{os.path.getsize(model.path) / 1e3:.1f}',
        f'{before:.4f}', '', '', '',
    ))
    for name in formats:
      exported = _export(name, model, export_dir, task, counted, expected)
      if _is_worse(exported.score, before, task):
        worse.append(exported.path.name)
      rows.append((
          exported.path.name, f'{exported.size / 1e3:.1f}', f'{exported.score:.4f}',
          f'{exported.score - before:+.4f}', f'{exported.agreement:.4f}',
          f'{exported.largest:.2g}',
      ))
      report[exported.path.name] = {
          'format': name, 'model': model.name, 'bytes': exported.size,
          task.metric: exported.score, f'keras_{task.metric}': before,
          agreement: exported.agreement, 'largest_difference': exported.largest,
      }
  run_folders.write_json(
      export_dir / 'export.json', {'examples': len(examples), 'files': report}
  )
  model_card.write(export_dir, run_dir, task, models, report, len(examples), worse)
  tables.print_table(rows)
  print(
      f'\nEach file was loaded again and compared on {len(examples)} test examples. '
      f'Files in {export_dir}; the same numbers in export.json, and {model_card.NAME} '
      'says how the models were made, what they score and how to load them.'
  )
  if worse:
    print(_warning(worse, task))


def _warning(worse: Sequence[str], task: tff_kd.data.Task) -> str:
  """Returns the warning about files that are worse than the model."""
  limit = f'one hundredth of its {task.metric}' if task.is_lower_better() else 'a point'
  return (
      f'Worse than the model by more than {limit}: {", ".join(worse)}. Take another '
      'format.'
  )


def _chosen(
    models: Sequence[released.Released], names: Sequence[str], run_dir: pathlib.Path
) -> list[released.Released]:
  """Returns the models of these names; all of them if there are no names."""
  known = [model.name for model in models]
  unknown = sorted(set(names) - set(known))
  if unknown:
    raise UserError(
        f'--models: {", ".join(unknown)} not among the models of {run_dir}, '
        f'{", ".join(known)}.'
    )
  return [model for model in models if not names or model.name in names]


def _of_clients(
    run_dir: pathlib.Path, clients: Sequence[str]
) -> list[released.Released]:
  """Returns the models that these clients keep."""
  if not clients:
    return []
  try:
    models = kept.load(run_dir)
  except kept.OtherClientsError as error:
    raise UserError(f'--clients: {error} Leave that out.') from None
  if models is None:
    raise UserError(
        f'--clients: the clients of {run_dir} keep no models of their own. Leave it out.'
    )
  return models.released(clients)


def _is_worse(after: float, before: float, task: tff_kd.data.Task) -> bool:
  """Returns whether the score of a file is so much worse that the user is told."""
  if task.is_lower_better():
    return after - before > _WORSE * before
  return before - after > _WORSE


def _score(
    outputs: np.ndarray, examples: tff_kd.data.Examples, model: released.Released,
    task: tff_kd.data.Task,
) -> float:
  """Returns the task's metric of outputs."""
  return evaluation.score(
      outputs, examples.labels, spec=model.spec, names=[task.metric],
      sample_weight=examples.sample_weight,
  )[task.metric]


def _classes(
    outputs: np.ndarray, examples: tff_kd.data.Examples, model: released.Released
) -> np.ndarray:
  """Returns the predicted classes of the examples that count."""
  logits = model.spec.class_logits(tf.constant(outputs)).numpy()
  counted, _ = evaluation.counted_predictions(
      logits, examples.labels, model.spec, examples.sample_weight
  )
  return counted.argmax(-1)


def _export(
    name: str, model: released.Released, export_dir: pathlib.Path,
    task: tff_kd.data.Task, examples: tff_kd.data.Examples, expected: np.ndarray,
) -> _Exported:
  """Writes one file, loads it again and compares it."""
  suffix, write = _FORMATS[name]
  # A client's name may be a path. Escaped as in a URL, different names stay different.
  file_name = model.name.replace('%', '%25').replace('/', '%2F')
  path = export_dir / f'{file_name}{suffix}'
  outputs = write(model.keras_model, path, task)(examples.inputs)
  if outputs.shape != expected.shape or not np.isfinite(outputs).all():
    raise UserError(
        f'{path} is not usable: loaded again, its outputs have the shape '
        f'{outputs.shape} (the model: {expected.shape}) or are not finite.'
    )
  if task.is_regression:
    agreement = np.sqrt(np.mean(np.square(outputs - expected)))
  else:
    agreement = np.mean(
        _classes(outputs, examples, model) == _classes(expected, examples, model)
    )
  size = sum(file.stat().st_size for file in path.rglob('*') if file.is_file())
  return _Exported(
      path, size or path.stat().st_size, _score(outputs, examples, model, task),
      float(agreement), float(np.abs(outputs - expected).max()),
  )


def _write_keras(
    model: keras.Model, path: pathlib.Path, task: tff_kd.data.Task
) -> Predict:
  del task
  try:
    model.save(path)
  except NotImplementedError as error:
    raise UserError(
        f'{_without_config(model)}, which Keras needs for {path.name}. Give it one, or '
        'leave keras out of --formats.'
    ) from error
  again = _load(path, model)
  return lambda inputs: released.predict(again, inputs)


def _write_saved_model(
    model: keras.Model, path: pathlib.Path, task: tff_kd.data.Task
) -> Predict:
  _save(_copy(model), path, task, batch_size=None)
  serve = tf.saved_model.load(os.fspath(path)).signatures[_SIGNATURE]

  def call(batch: dict[str, np.ndarray]) -> np.ndarray:
    return serve(**tf.nest.map_structure(tf.constant, batch))['outputs'].numpy()

  return lambda inputs: released.in_batches(call, _named(inputs))


def _write_onnx(
    model: keras.Model, path: pathlib.Path, task: tff_kd.data.Task
) -> Predict:
  # Optional packages, for which `pipelines.export` has looked.
  import onnxruntime
  import tf2onnx

  model = _copy(model, in_float32=True)
  signature = _signature(task, batch_size=None)
  serve = _serving(model, task)

  @tf.function(autograph=False, input_signature=list(signature.values()))
  def convertible(*inputs):
    return serve(**dict(zip(signature, inputs)))

  logging.getLogger('tf2onnx').setLevel(logging.CRITICAL)  # Errors are exceptions.
  try:
    with _quiet():
      tf2onnx.convert.from_function(
          convertible, input_signature=list(signature.values()), output_path=path
      )
      session = onnxruntime.InferenceSession(path)
  # The errors of the converter and of the runtime have no public types.
  except Exception as error:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    raise UserError(
        f'ONNX does not take the model {model.name} ({lines[0]}). Leave onnx out of '
        '--formats.'
    ) from error
  call = lambda batch: session.run(['outputs'], batch)[0]
  return lambda inputs: released.in_batches(call, _named(inputs))


def _named(inputs: Any) -> dict[str, np.ndarray]:
  """Inputs by name, as a signature takes them."""
  return dict(inputs) if isinstance(inputs, dict) else {'inputs': inputs}


def _signature(
    task: tff_kd.data.Task, batch_size: Optional[int]
) -> dict[str, tf.TensorSpec]:
  """Returns the specs of a model's inputs by name.

  Args:
    task: What the inputs are like.
    batch_size: The batch size; any if `None`.
  """
  return {
      name: tf.TensorSpec([batch_size, *a.shape[1:]], a.dtype, name=name)
      for name, a in _named(task.transfer.inputs).items()
  }


def _serving(
    model: keras.Model, task: tff_kd.data.Task
) -> Callable[..., dict[str, tf.Tensor]]:
  """Returns the function of a model's inputs by name that a file holds."""
  has_names = isinstance(task.transfer.inputs, dict)

  def serve(**inputs):
    # Names of Keras layers (`__mine`) may not be valid at the root of a graph.
    with tf.name_scope('model'):
      outputs = model(inputs if has_names else inputs['inputs'], training=False)
    return {'outputs': tf.cast(outputs, tf.float32)}

  return serve


def _save(
    model: keras.Model, path: pathlib.Path, task: tff_kd.data.Task,
    batch_size: Optional[int],
) -> None:
  """Saves a SavedModel with one signature, of named inputs to `outputs`.

  `model.export` would name the outputs by number, and holds each weight twice.

  Args:
    model: The model.
    path: The folder to write.
    task: What its inputs are like.
    batch_size: The batch size of the signature; any if `None`.
  """
  serve = tf.function(_serving(model, task), autograph=False)
  module = tf.Module()
  # TFLite does not find the variables in a Keras model. With the model itself in the
  # module they would be saved twice; layers without any can have tables.
  module.variables_of_layers = [variable.value for variable in model.variables]
  module.other_layers = [
      layer for layer in internals.all_layers(model) if not layer.variables
  ]
  concrete = serve.get_concrete_function(**_signature(task, batch_size))
  tf.saved_model.save(module, os.fspath(path), signatures={_SIGNATURE: concrete})


def _write_tflite(
    model: keras.Model, path: pathlib.Path, task: tff_kd.data.Task, *,
    int8_weights: bool = False, int8_activations: bool = False,
) -> Predict:
  """Writes a TFLite file that takes one example at a time.

  Args:
    model: The model.
    path: The file to write.
    task: What its inputs are like; its transfer examples show the ranges of activations.
    int8_weights: Whether weights get 8 bits.
    int8_activations: Whether activations do.

  Returns:
    What predicts by the file.

  Raises:
    UserError: If TFLite does not have what the model computes.
  """
  named = _named(task.transfer.inputs)

  def representative() -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    for row in range(min(_REPRESENTATIVE, len(task.transfer))):
      yield _SIGNATURE, {name: a[row : row + 1] for name, a in named.items()}

  # TFLite crashes (a segmentation fault) on a loop whose activations are quantised.
  model = _copy(model, unroll=int8_activations, in_float32=True)
  with tempfile.TemporaryDirectory() as folder:
    _save(model, pathlib.Path(folder), task, batch_size=1)
    converter = tf.lite.TFLiteConverter.from_saved_model(
        folder, signature_keys=[_SIGNATURE]
    )
    if int8_weights:
      converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if int8_activations:
      converter.representative_dataset = representative
    try:
      with _quiet():
        content = converter.convert()
    except Exception as error:  # The converter's own type has no public name.
      missing = sorted(set(re.findall(r"'tf\.(\w+)' op", str(error))))
      lines = str(error).strip().splitlines() or [type(error).__name__]
      reason = f'it has no {", ".join(missing)}' if missing else lines[0]
      raise UserError(
          f'TFLite does not take the model {model.name} ({reason}). Leave tflite, '
          'int8 and int8_weights out of --formats.'
      ) from error
  path.write_bytes(content)
  return _tflite_predict(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Hides what a converter's C++ prints; its errors are exceptions."""
  sys.stderr.flush()
  kept = os.dup(2)
  nowhere = os.open(os.devnull, os.O_WRONLY)
  try:
    os.dup2(nowhere, 2)
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)
    os.close(nowhere)


def _copy(
    model: keras.Model, *, unroll: bool = False, in_float32: bool = False
) -> keras.Model:
  """Copies a model so that it computes with operations that every device has.

  Args:
    model: The model.
    unroll: Whether the loops of recurrent layers are unrolled.
    in_float32: Whether all layers compute in float32, whatever their dtype policy.

  Returns:
    A new model with the same weights and vocabularies; the model itself, if Keras
    cannot write it down and there is nothing to change.

  Raises:
    UserError: If there is something to change in such a model.
  """
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'model.keras'
    try:
      model.save(path)
    except NotImplementedError as error:
      if not _is_fit_for_devices(model, in_float32):
        raise UserError(
            f'{_without_config(model)}, without which its recurrent layers, or layers '
            'of other types than float32, cannot be exported but as they are.'
        ) from error
      return model
    if in_float32:
      _rewrite_in_float32(path)
    copy = _load(path, model)
  for layer in internals.all_layers(copy):
    if isinstance(layer, keras.layers.RNN):
      layer.unroll = unroll or layer.unroll
      # On a GPU, GRU and LSTM would use cuDNN, which other devices do not have.
      layer.use_cudnn = False
  return copy


def _without_config(model: keras.Model) -> str:
  return f'The model {type(model).__name__} has no `get_config()`'


def _is_fit_for_devices(model: keras.Model, in_float32: bool) -> bool:
  """Returns whether a copy would compute as the model does."""
  layers = internals.all_layers(model)
  return not any(isinstance(layer, keras.layers.RNN) for layer in layers) and not (
      in_float32 and any(layer.dtype_policy.name in _FLOATS for layer in layers)
  )


def _load(path: pathlib.Path, model: keras.Model) -> keras.Model:
  """Loads a model, whose classes need not be registered with Keras."""
  return keras.models.load_model(
      path, compile=False, custom_objects=released.own_classes(model)
  )


def _rewrite_in_float32(path: pathlib.Path) -> None:
  """Makes a .keras file one of a model that computes in float32."""
  with zipfile.ZipFile(path) as file:
    parts = {name: file.read(name) for name in file.namelist()}
  config = _float32_config(json.loads(parts['config.json']))
  parts['config.json'] = json.dumps(config).encode()
  with zipfile.ZipFile(path, 'w') as file:
    for name, content in parts.items():
      file.writestr(name, content)


def _float32_config(config: Any) -> Any:
  """Replaces each floating-point type in a model's configuration by float32."""
  if isinstance(config, list):
    return [_float32_config(part) for part in config]
  if not isinstance(config, dict):
    return config
  if config.get('class_name') == 'DTypePolicy':
    name = config['config']['name']
    return {**config, 'config': {'name': 'float32' if name in _FLOATS else name}}
  return {
      key: 'float32' if key == 'dtype' and value in _FLOATS
      else _float32_config(value)
      for key, value in config.items()
  }


def _tflite_predict(path: pathlib.Path) -> Predict:
  with _quiet(), warnings.catch_warnings():
    # It warns that TensorFlow 2.20 will remove it, but 2.21 has it.
    warnings.simplefilter('ignore', UserWarning)
    interpreter = tf.lite.Interpreter(os.fspath(path))
    interpreter.allocate_tensors()
    runner = interpreter.get_signature_runner(_SIGNATURE)
  call = lambda batch: runner(**batch)['outputs']
  return lambda inputs: released.in_batches(call, _named(inputs), batch_size=1)


# The suffix of a file, and what writes it and returns what predicts by it.
_FORMATS: dict[str, tuple[str, Callable[..., Predict]]] = {
    'keras': ('.keras', _write_keras),
    'saved_model': ('', _write_saved_model),
    'tflite': ('.tflite', _write_tflite),
    'int8': (
        '_int8.tflite',
        functools.partial(_write_tflite, int8_weights=True, int8_activations=True),
    ),
    'int8_weights': (
        '_int8_weights.tflite', functools.partial(_write_tflite, int8_weights=True)
    ),
    'onnx': ('.onnx', _write_onnx),
}
