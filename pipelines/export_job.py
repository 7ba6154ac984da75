"""The job behind `pipelines.export`."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import json
import os
import pathlib
import sys
import tempfile
from typing import Any, NamedTuple, Optional

import keras
import numpy as np
import tensorflow as tf

from pipelines import released
from pipelines import tables
from pipelines import train_job
from pipelines import UserError
import tff_kd
from tff_kd import evaluation

# A file that is worse by more than this is named: of accuracy, or of an error's own size.
_WORSE = 0.01
# Transfer examples that show TFLite the ranges of what it quantises.
_REPRESENTATIVE = 200
_SIGNATURE = 'serving_default'
Predict = Callable[[Any], np.ndarray]


class _Exported(NamedTuple):
  """A file, loaded again.

  Attributes:
    path: Where it is.
    size: In bytes, of all that is below.
    scores: Its scores on the examples.
    agreement: The share of examples (positions, of sequences) for which its class is the
      model's; of a regression the root of the mean squared difference.
    largest: The largest difference in any output.
  """

  path: pathlib.Path
  size: int
  scores: dict[str, float]
  agreement: float
  largest: float


def run(
    run_dir: pathlib.Path, export_dir: pathlib.Path, *, names: Sequence[str],
    formats: Sequence[str], num_examples: int,
) -> None:
  """The whole job."""
  with train_job.errors_for_users():
    task = train_job.load_task()
  models = released.load(run_dir, task)
  known = [model.name for model in models]
  unknown = sorted(set(names) - set(known))
  if unknown:
    raise UserError(
        f'--models: {", ".join(unknown)} not among the models of {run_dir}, '
        f'{", ".join(known)}.'
    )
  export_dir.mkdir(parents=True, exist_ok=True)
  examples = task.test.take(
      np.random.default_rng(0).permutation(len(task.test))[:num_examples]
  )
  rows = [(
      'file', 'KB', task.metric, 'difference',
      'RMS difference' if task.is_regression else 'same class', 'largest difference',
  )]
  report, worse = {}, []
  for model in models:
    if names and model.name not in names:
      continue
    expected = np.asarray(
        model.keras_model.predict(examples.inputs, batch_size=256, verbose=0)
    )
    before = evaluation.score(
        _logits(expected, model), examples.labels, spec=model.spec
    )[task.metric]
    rows.append((
        f'{model.name}, as the run left it',
        f'{os.path.getsize(run_dir / f"{model.name}.keras") / 1e3:.1f}',
        f'{before:.4f}', '', '', '',
    ))
    for name in formats:
      its = _export(name, model, export_dir, task, examples, expected)
      after = its.scores[task.metric]
      lost, most = before - after, _WORSE
      if task.is_regression:
        lost, most = after - before, _WORSE * before
      if lost > most:
        worse.append(its.path.name)
      rows.append((
          str(its.path.relative_to(export_dir)), f'{its.size / 1e3:.1f}',
          f'{after:.4f}', f'{after - before:+.4f}', f'{its.agreement:.4f}',
          f'{its.largest:.2g}',
      ))
      report[its.path.name] = {
          'format': name, 'model': model.name, 'bytes': its.size,
          task.metric: after, f'keras_{task.metric}': before,
          'rms_difference' if task.is_regression else 'same_class': its.agreement,
          'largest_difference': its.largest,
      }
  (export_dir / 'export.json').write_text(
      json.dumps({'examples': len(examples), 'files': report}, indent=2) + '\n'
  )
  tables.print_table(rows)
  print(
      f'\nEach file was loaded again and compared on {len(examples)} test examples. '
      f'Files in {export_dir}; the same numbers in export.json.'
  )
  if worse:
    what = f'one hundredth of its {task.metric}' if task.is_regression else 'a point'
    print(
        f'Worse than the model by more than {what}: {", ".join(worse)}. Take another '
        'format.'
    )


def _logits(outputs: np.ndarray, model: released.Released) -> np.ndarray:
  if model.spec.from_logits:
    return outputs
  return tff_kd.losses.logits_from_probabilities(tf.constant(outputs)).numpy()


def _export(
    name: str, model: released.Released, export_dir: pathlib.Path,
    task: tff_kd.data.Task, examples: tff_kd.data.Examples, expected: np.ndarray,
) -> _Exported:
  """Writes one file, loads it again and compares it."""
  writers = {
      'keras': _write_keras, 'saved_model': _write_saved_model,
      'tflite': _write_tflite, 'int8': _write_int8, 'int8_weights': _write_int8_weights,
  }
  suffix = {
      'keras': '.keras', 'saved_model': '', 'tflite': '.tflite', 'int8': '_int8.tflite',
      'int8_weights': '_int8_weights.tflite',
  }[name]
  path = export_dir / f'{model.name}{suffix}'
  predict = writers[name](model.keras_model, path, task)
  outputs = predict(examples.inputs)
  if outputs.shape != expected.shape or not np.isfinite(outputs).all():
    raise UserError(
        f'{path} is not usable: loaded again, its outputs have the shape '
        f'{outputs.shape} (the model: {expected.shape}) or are not finite.'
    )
  if task.is_regression:
    agreement = np.sqrt(np.mean(np.square(outputs - expected)))
  else:
    counted = np.ones(examples.labels.shape, bool)
    if model.spec.ignored_label is not None:
      counted = examples.labels != model.spec.ignored_label
    agreement = np.mean((outputs.argmax(-1) == expected.argmax(-1))[counted])
  size = sum(its.stat().st_size for its in path.rglob('*') if its.is_file())
  return _Exported(
      path, size or path.stat().st_size,
      evaluation.score(_logits(outputs, model), examples.labels, spec=model.spec),
      float(agreement), float(np.abs(outputs - expected).max()),
  )


def _write_keras(model: keras.Model, path: pathlib.Path, task) -> Predict:
  del task
  model.save(path)
  again = keras.models.load_model(path, compile=False)
  return lambda inputs: again.predict(inputs, batch_size=256, verbose=0)


def _write_saved_model(
    model: keras.Model, path: pathlib.Path, task: tff_kd.data.Task
) -> Predict:
  _save(model, path, task, batch_size=None)
  serve = tf.saved_model.load(os.fspath(path)).signatures[_SIGNATURE]

  def predict(inputs: Any) -> np.ndarray:
    named = _named(inputs)
    size = len(next(iter(named.values())))
    return np.concatenate([
        serve(**{
            name: tf.constant(a[start : start + 256]) for name, a in named.items()
        })['outputs'].numpy()
        for start in range(0, size, 256)
    ])

  return predict


def _write_tflite(
    model: keras.Model, path: pathlib.Path, task: tff_kd.data.Task
) -> Predict:
  path.write_bytes(_convert(model, task))
  return _tflite_predict(path)


def _write_int8_weights(
    model: keras.Model, path: pathlib.Path, task: tff_kd.data.Task
) -> Predict:
  path.write_bytes(_convert(model, task, quantised=True))
  return _tflite_predict(path)


def _write_int8(
    model: keras.Model, path: pathlib.Path, task: tff_kd.data.Task
) -> Predict:
  named = _named(task.transfer.inputs)

  def representative() -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    for row in range(min(_REPRESENTATIVE, len(task.transfer))):
      yield _SIGNATURE, {name: a[row : row + 1] for name, a in named.items()}

  path.write_bytes(
      _convert(model, task, quantised=True, representative=representative)
  )
  return _tflite_predict(path)


def _named(inputs: Any) -> dict[str, np.ndarray]:
  """Inputs by name, as a signature takes them."""
  return dict(inputs) if isinstance(inputs, dict) else {'inputs': inputs}


def _save(
    model: keras.Model, path: pathlib.Path, task: tff_kd.data.Task,
    batch_size: Optional[int],
) -> None:
  """Saves a signature of named inputs to `outputs`."""
  has_names = isinstance(task.transfer.inputs, dict)
  signature = {
      name: tf.TensorSpec([batch_size, *a.shape[1:]], a.dtype, name=name)
      for name, a in _named(task.transfer.inputs).items()
  }

  module = tf.Module()
  module.model = model

  @tf.function(autograph=False)
  def serve(**inputs):
    outputs = model(inputs if has_names else inputs['inputs'], training=False)
    return {'outputs': outputs}

  concrete = serve.get_concrete_function(**signature)
  tf.saved_model.save(
      module, os.fspath(path), signatures={_SIGNATURE: concrete}
  )


def _convert(
    model: keras.Model, task: tff_kd.data.Task, *, quantised: bool = False,
    representative: Any = None,
) -> bytes:
  """TFLite's form of a model that takes one example at a time.

  Args:
    model: The model.
    task: What its inputs are like.
    quantised: Whether weights get 8 bits.
    representative: Gives the inputs that show the ranges of activations, which then get
      8 bits, too.
  """
  layers = keras.layers
  # Its op for whole sequences would keep the state from one call to the next.
  unrolled = [layers.LSTM]
  if representative is not None:
    # It dies (a segmentation fault) of a loop whose activations it is to quantise.
    unrolled += [layers.GRU, layers.SimpleRNN]
  model = _unrolled(model, tuple(unrolled))
  with tempfile.TemporaryDirectory() as folder:
    _save(model, pathlib.Path(folder), task, batch_size=1)
    converter = tf.lite.TFLiteConverter.from_saved_model(
        folder, signature_keys=[_SIGNATURE]
    )
    if quantised:
      converter.optimizations = [tf.lite.Optimize.DEFAULT]
      converter.representative_dataset = representative
    with _quiet():
      return converter.convert()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Nothing of what C++ prints: the converter's own words; errors are exceptions."""
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


def _unrolled(
    model: keras.Model, kinds: tuple[type[keras.layers.Layer], ...]
) -> keras.Model:
  """The same with the loops of some recurrent layers unrolled."""
  if not any(isinstance(layer, kinds) for layer in model.layers):
    return model

  def clone(layer: keras.layers.Layer) -> keras.layers.Layer:
    config = layer.get_config()
    if isinstance(layer, kinds):
      config['unroll'] = True
    return type(layer).from_config(config)

  unrolled = keras.models.clone_model(model, clone_function=clone)
  unrolled.set_weights(model.get_weights())
  return unrolled


def _tflite_predict(path: pathlib.Path) -> Predict:
  interpreter = tf.lite.Interpreter(os.fspath(path))
  runner = interpreter.get_signature_runner(_SIGNATURE)

  def predict(inputs: Any) -> np.ndarray:
    named = _named(inputs)
    size = len(next(iter(named.values())))
    return np.concatenate([
        runner(**{name: a[row : row + 1] for name, a in named.items()})['outputs']
        for row in range(size)
    ])

  return predict
