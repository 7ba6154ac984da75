"""The model card beside exported models, in Markdown: what a run's folder knows of them.

Source of the form: Mitchell et al., "Model Cards for Model Reporting" (2019).
"""

from collections.abc import Mapping, Sequence
import datetime
import json
import math
import pathlib
from typing import Any, Optional

import tensorflow as tf

from pipelines import released
from pipelines import run_folders
from pipelines import tables
from pipelines import train_checks
from pipelines import train_flags as args
from pipelines import train_privacy
import tff_kd

NAME = 'MODEL_CARD.md'
# Settings that every card names, where the algorithm has them.
_ALWAYS = (
    'student', 'teacher', 'mentor', 'client_optimizer', 'client_learning_rate',
    'client_epochs', 'batch_size', 'server_optimizer', 'server_learning_rate',
)
# Settings that other sections name, or that are about the machine.
_ELSEWHERE = frozenset({
    'algorithm', 'task', 'data_dir', 'transfer_size', 'transfer_labels',
    'validation_size', 'num_clients', 'clients_per_round', 'partition', 'alpha',
    'shards_per_client', 'sampling', 'seed', 'rounds', 'monitor', 'evaluated_clients',
    'compare_with_fed_avg', 'config', 'dry_run', 'output_dir', 'cache_dir', 'resume',
    'tracker', 'rounds_per_checkpoint', 'device', 'runtime', 'ray_address',
    'ray_workers', 'ray_resources',
})
# The code that loads a file, by format; `{feed}` are the inputs by name.
_LOADING = {
    'keras': '''import keras
model = keras.models.load_model('{file}', compile=False{classes})
outputs = model(inputs, training=False)''',
    'saved_model': '''import tensorflow as tf
serve = tf.saved_model.load('{file}').signatures['serving_default']
outputs = serve({arguments})['outputs']''',
    'tflite': '''import tensorflow as tf
runner = tf.lite.Interpreter('{file}').get_signature_runner('serving_default')
outputs = runner({single})['outputs']  # One example a call.''',
    'onnx': '''import onnxruntime
session = onnxruntime.InferenceSession('{file}')
(outputs,) = session.run(['outputs'], {feed})''',
}
_TITLES = {
    'keras': 'Keras', 'saved_model': 'SavedModel', 'tflite': 'TFLite', 'onnx': 'ONNX'
}


def write(
    export_dir: pathlib.Path, run_dir: pathlib.Path, task: tff_kd.data.Task,
    models: Sequence[released.Released], files: Mapping[str, Mapping[str, Any]],
    num_examples: int, worse: Sequence[str],
) -> None:
  """Writes the model card of exported models.

  The flags must have the values of the run.

  Args:
    export_dir: Where the files are, and the card goes.
    run_dir: The folder of the run.
    task: What the run was about.
    models: The exported models.
    files: By the names of the files, what export.json says of them.
    num_examples: On how many test examples the files were compared.
    worse: The names of files that are worse than the model.
  """
  results = _json(run_dir / run_folders.RESULTS)
  metrics_path = run_dir / run_folders.METRICS
  history = run_folders.read_history(metrics_path) if metrics_path.exists() else []
  info = args.algorithm()
  names = ' and '.join(model.name for model in models)
  sections = [
      f'# {names}: {info.name} on {task.name}',
      _purpose(info, results, run_dir),
      '## Files', _files(task, files, num_examples),
      '## How to load', _loading(task, models[0], files),
      '## Data', _data(task),
      '## Split over clients', _split(task),
      '## Algorithm', _algorithm(info, results),
      '## Scores', _scores(task, models, results),
      '## Privacy', _privacy(info, results, run_dir),
      '## Bytes', _bytes(history),
      '## Limits', _limits(task, worse),
  ]
  (export_dir / NAME).write_text('\n\n'.join(sections) + '\n')


def _json(path: pathlib.Path) -> dict[str, Any]:
  """Returns what a JSON file holds; nothing if it is not there."""
  return json.loads(path.read_text()) if path.exists() else {}


def _table(rows: Sequence[tuple[str, ...]]) -> str:
  return tables.markdown_table(rows).rstrip()


def _purpose(
    info: tff_kd.algorithms.Info, results: Mapping[str, Any], run_dir: pathlib.Path
) -> str:
  finished = results.get('finished')
  when = f' Training ended at {finished}.' if finished else ''
  versions = _json(run_dir / run_folders.CONFIG).get('versions', {})
  used = ', '.join(f'{name} {version}' for name, version in versions.items())
  now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds')
  return (
      f'Trained by federated learning with `{info.name}` ({info.summary}) of tff_kd, in '
      f'a simulation on one computer or cluster.{when} Trained with {used}. Exported at '
      f'{now} from the run `{run_dir.resolve().name}` with tff_kd '
      f'{tff_kd.__version__}.'
  )


def _files(
    task: tff_kd.data.Task, files: Mapping[str, Mapping[str, Any]], num_examples: int
) -> str:
  agreement = 'rms_difference' if task.is_regression else 'same_class'
  metric = tables.words(task.metric)
  rows = [(
      'file', 'model', 'format', 'bytes', f'test {metric}', f'{metric} of the model',
      'RMS difference' if task.is_regression else 'same class', 'largest difference',
  )]
  rows += [
      (
          f'`{name}`', file['model'], file['format'], f"{file['bytes']:,}",
          f'{file[task.metric]:.4f}', f"{file[f'keras_{task.metric}']:.4f}",
          f'{file[agreement]:.4f}', f"{file['largest_difference']:.2g}",
      )
      for name, file in files.items()
  ]
  return (
      f'{_table(rows)}\n\nEach file was loaded again and compared with the model on '
      f'{num_examples} test examples.'
  )


def _loading(
    task: tff_kd.data.Task, model: released.Released,
    files: Mapping[str, Mapping[str, Any]],
) -> str:
  """Describes how to load the first model, with a block for each kind of file."""
  specs = task.input_spec[0]
  named = specs if isinstance(specs, dict) else {'inputs': specs}
  value = "inputs['{0}']" if isinstance(specs, dict) else '{0}'
  shapes = ', '.join(f'`{name}` {_described(spec)}' for name, spec in named.items())
  form = (
      f'`inputs` is a dict of arrays: {shapes}' if isinstance(specs, dict)
      else f'`inputs` is an array: {_described(specs)}'
  )
  own = sorted(released.own_classes(model.keras_model))
  blocks = {}
  for name, file in files.items():
    kind = 'tflite' if file['format'].startswith('int8') else file['format']
    if file['model'] == model.name and kind not in blocks:
      values = {key: value.format(key) for key in named}
      blocks[kind] = _LOADING[kind].format(
          file=name,
          arguments=', '.join(f'{key}={each}' for key, each in values.items()),
          single=', '.join(f'{key}={each}[:1]' for key, each in values.items()),
          classes=''.join([
              ', custom_objects={', ', '.join(f"'{each}': {each}" for each in own), '}'
          ]) if own else '',
          feed='{' + ', '.join(f"'{k}': {each}" for k, each in values.items()) + '}',
      )
  outputs = f'float32 [n, {", ".join(map(str, model.spec.outputs_shape))}]'
  meaning = 'numbers' if task.is_regression else (
      'logits' if model.spec.from_logits else 'probabilities'
  )
  text = [f'{form}; `outputs` are {meaning}, {outputs}.']
  if own and 'keras' in blocks:
    text.append(f'Keras needs the classes {", ".join(own)} of the task: import them.')
  for kind, block in blocks.items():
    text.append(f'{_TITLES[kind]}:\n\n```python\n{block}\n```')
  return '\n\n'.join(text)


def _described(spec: tf.TensorSpec) -> str:
  return f'{spec.dtype.name} [n{"".join(f", {size}" for size in spec.shape[1:])}]'


def _data(task: tff_kd.data.Task) -> str:
  info = tff_kd.data.task_info(args.TASK.value)
  source = f'{task.name}: {info.summary}' if info.path is None else (
      f'{task.name}, read by the file `{pathlib.Path(info.path).name}`'
  )
  labelled = args.TRANSFER_LABELS.value
  rows = [
      ('part', 'examples', 'use'),
      ('clients', f'{len(task.clients):,}', 'local training'),
      (
          'transfer', f'{len(task.transfer):,}',
          f'held by the server, {labelled:,} of them with labels',
      ),
      ('validation', f'{len(task.validation):,}', 'to choose the best round'),
      ('test', f'{len(task.test):,}', 'to report scores only'),
  ]
  text = f'{source}. The four parts share no example.\n\n{_table(rows)}'
  if task.num_classes is not None:
    text += f'\n\n{task.num_classes} classes'
    text += f': {", ".join(task.class_names)}.' if task.class_names else '.'
  return text


def _split(task: tff_kd.data.Task) -> str:
  count, seed = args.NUM_CLIENTS.value, args.SEED.value
  if task.client_rows is not None:
    there = len(task.client_rows)
    how = f"{count} of the data's own {there} clients" + (
        f', drawn with the seed {seed}' if count < there else ''
    )
  else:
    setting = {
        'dirichlet': f' with concentration {args.ALPHA.value:g}',
        'quantity_skew': f' with concentration {args.ALPHA.value:g}',
        'shards': f', {args.SHARDS.value} a client',
    }.get(args.PARTITION.value, '')
    how = (
        f'{count} clients, by the partition `{args.PARTITION.value}`{setting}, with the '
        f'seed {seed}'
    )
  expected = ' in expectation' if args.SAMPLING.value == 'poisson' else ''
  return (
      f'{how}. In each round {args.CLIENTS_PER_ROUND.value} were chosen{expected} '
      f'(`{args.SAMPLING.value}` sampling).'
  )


def _algorithm(info: tff_kd.algorithms.Info, results: Mapping[str, Any]) -> str:
  """Describes the algorithm, how long it was trained, and the settings."""
  text = f'`{info.name}`: {info.summary}. Clients upload {", ".join(info.uploads)}.'
  if 'best_round' in results:
    monitor = args.MONITOR.value or f"validation/student_{results['metric']}"
    text += (
        f" The models are those of round {results['best_round']} of "
        f"{results['rounds']}, the best by `{monitor}`."
    )
  flags = args.own_flags()
  shown = {
      name: flag.value for name, flag in flags.items()
      if args.is_taken(info, name) and name not in _ELSEWHERE
      and (name in _ALWAYS or flag.value != flag.default)
  }
  rows = [('setting', 'value')]
  rows += [(f'`--{name}`', f'`{_value(value)}`') for name, value in shown.items()]
  return (
      f'{text}\n\n{_table(rows)}\n\nOther settings have their defaults; config.json in '
      "the run's folder has all of them, and `python -m pipelines.train --config=` that "
      'file repeats the training.'
  )


def _value(value: Any) -> str:
  return ','.join(map(str, value)) if isinstance(value, list) else str(value)


def _scores(
    task: tff_kd.data.Task, models: Sequence[released.Released],
    results: Mapping[str, Any],
) -> str:
  if 'best' not in results:
    return (
        "The run's results.json is not there, so only the scores above are known: the "
        'run did not come to its end.'
    )
  best, further = results['best'], results.get('further_scores', {})
  of_models = {
      model.name: {
          **{
              key.removeprefix(f'test/{model.name}_'): value
              for key, value in best.items()
              if key.startswith(f'test/{model.name}_')
              and not key.startswith(f'test/{model.name}_before_')
          },
          **further.get(model.name, {}),
      }
      for model in models
  }
  alone = {
      f"{name}, trained on the server's labels alone": scores
      for name, scores in results.get('alone', {}).items()
      if name in of_models
  }
  known = dict.fromkeys(key for scores in of_models.values() for key in scores)
  keys = sorted(known, key=lambda key: key != task.metric)  # It comes first.
  rows = [('model', *map(tables.words, keys))]
  for name, scores in (of_models | alone).items():
    rows.append(
        (name, *(f'{scores[key]:.4f}' if key in scores else '' for key in keys))
    )
  finished = results.get('finished')
  when = f', at the end of the training ({finished})' if finished else ''
  lower = [key for key in keys if task.is_lower_better(key)]
  hint = f' Lower is better: {", ".join(map(tables.words, lower))}.' if lower else ''
  return (
      f'On the {len(task.test):,} test examples{when}.{hint}\n\n{_table(rows)}'
  )


def _privacy(
    info: tff_kd.algorithms.Info, results: Mapping[str, Any], run_dir: pathlib.Path
) -> str:
  epsilon: Optional[float] = results.get('epsilon')
  if not train_checks.is_private() or (
      epsilon is not None and not math.isfinite(epsilon)
  ):
    text = (
        '**No privacy guarantee.** '
        + (
            'Noise was added to a part of what clients upload only. '
            if train_checks.is_private()
            else 'The models were trained without differential privacy. '
        )
        + "They may reveal clients' examples; `python -m pipelines.audit` measures how "
        'much simple attacks find.'
    )
    if args.is_taken(info, 'certainty_epsilon'):
      text += (
          ' Only the certainty scores that clients upload are differentially private; '
          'weights and predictions are not.'
      )
  elif epsilon is None:
    text = (
        "The run's results.json is not there, so what the training has spent is not in "
        'this card: see privacy.json and metrics.csv in its folder.'
    )
  else:
    neighbors = train_privacy.sampling().neighbors
    # Rounds that were begun again after a crash count each time.
    rounds, ledger = results['rounds'], run_dir / train_privacy.LEDGER
    if ledger.exists():
      begun = tff_kd.privacy.accounting.read_ledger(ledger)['begun']
      rounds = sum(begun.values())
    text = (
        f'Differential privacy with epsilon {epsilon:.4g} at delta '
        f'{args.DELTA.value:g}, of a client with all of its examples ({neighbors}; '
        f'{args.SAMPLING.value} sampling), for all that {rounds} rounds '
        'released. The server added the noise and is trusted. The transfer and '
        'validation examples of the server are not protected.'
    )
  if args.SECURE_AGGREGATION.value:
    text += (
        ' Secure aggregation was simulated in its numerics only: sums were taken in the '
        'clear.'
    )
  return text


def _bytes(history: Sequence[dict[str, float]]) -> str:
  """Describes the bytes moved in all rounds, by channel."""
  if not history:
    return "The run's metrics.csv is not there."
  rows = [
      ('moved, MB', 'all rounds', 'a round'),
      *run_folders.moved_rows(history, 'by a client that takes part in each round'),
  ]
  return (
      f'In {len(history)} rounds; all clients together, but for the last line.\n\n'
      + _table(rows)
  )


def _limits(task: tff_kd.data.Task, worse: Sequence[str]) -> str:
  limits = [
      f'The scores are of the test part of {task.name}. How the models do on other data '
      'was not measured.',
      'Clients, their faults and the network were simulated. No device took part.',
  ]
  if worse:
    limits.append(
        'These files are worse than the model that they were made of: '
        + ', '.join(f'`{name}`' for name in worse) + '.'
    )
  return '\n'.join(f'- {limit}' for limit in limits)
