"""The job behind `pipelines.evaluate`."""

from collections.abc import Sequence
import csv
import functools
import pathlib
from typing import Any, NamedTuple, Optional

import numpy as np
import tensorflow as tf

from pipelines import kept
from pipelines import released
from pipelines import run_folders
from pipelines import tables
from pipelines import train_data
from pipelines import train_evaluation
from pipelines import train_setup
import tff_kd
from tff_kd import evaluation
from tff_kd import plots

# A confusion matrix of more classes cannot be read.
_MAX_CLASSES = 100


class _Evaluated(NamedTuple):
  """A model on the examples, or each client's own model on that client's.

  Attributes:
    name: The name of the model.
    spec: The spec of the model.
    outputs: The outputs of the model, `[n, ...]`.
    examples: The examples.
    scores: The scores on all examples, by name.
    by_client: The metric of each client, NaN where no example counts.
    counted: The numbers of the clients of which an example counts.
  """

  name: str
  spec: tff_kd.models.ModelSpec
  outputs: np.ndarray
  examples: tff_kd.data.Examples
  scores: dict[str, float]
  by_client: np.ndarray
  counted: np.ndarray


def run(
    run_dir: pathlib.Path, report_dir: pathlib.Path, *, part: str, num_worst: int
) -> None:
  """Evaluates the models of a run and reports."""
  with train_setup.errors_for_users():
    task = train_data.load_task()
    clients = train_data.split_clients(task)
  examples = getattr(task, part)
  if part == 'clients':
    rows = clients
  elif part == 'test':
    rows = train_data.split_tests(task, clients)
  else:
    rows = []  # The server's examples belong to no client.
  # Before the models are loaded: building a process may invalidate existing models.
  own = _evaluate_own(run_dir, task, examples, rows)
  models = released.load(run_dir, task, must_exist=own is None)
  found = [_evaluate(model, task, examples, rows) for model in models]
  found += [own] if own is not None else []
  report_dir.mkdir(parents=True, exist_ok=True)
  names = train_data.names_of_clients(task, clients)
  with train_setup.errors_for_users():
    _print(task, part, examples, found, names, clients, rows, num_worst)
    _write(report_dir, task, part, examples, found, names, clients, rows)
  title = f'{task.name}: {len(examples)} examples ({part})'
  files = _draw(report_dir, task, title, found, len(rows) > 0)
  files = ['report.json', *(['clients.csv'] if len(rows) else []), *files]
  print('\n' + ', '.join(str(report_dir / name) for name in files))


def _evaluate(
    model: released.Released, task: tff_kd.data.Task, examples: tff_kd.data.Examples,
    rows: Sequence[np.ndarray],
) -> _Evaluated:
  evaluator = evaluation.CentralEvaluator(model.spec)
  outputs = evaluator.outputs(model.weights, examples.inputs)
  unmasked = train_evaluation.unmasked(evaluator, model.weights, examples)
  by_client = np.array([
      train_evaluation.metric_of(
          outputs[client_rows], unmasked.take(client_rows), model.spec, task
      )
      for client_rows in rows
  ])
  scores = _scores(outputs, unmasked, model.spec)
  if task.scores_fn is not None and examples is task.test:
    scores |= task.scores_fn(functools.partial(evaluator.outputs, model.weights))
  return _Evaluated(
      model.name, model.spec, outputs, unmasked, scores, by_client,
      _counted(task, examples, rows),
  )


def _scores(
    outputs: np.ndarray, examples: tff_kd.data.Examples, spec: tff_kd.models.ModelSpec
) -> dict[str, float]:
  return evaluation.score(
      outputs, examples.labels, spec=spec, sample_weight=examples.sample_weight
  )


def _evaluate_own(
    run_dir: pathlib.Path, task: tff_kd.data.Task, examples: tff_kd.data.Examples,
    rows: Sequence[np.ndarray],
) -> Optional[_Evaluated]:
  """Evaluates the models that clients keep, of the best round; `None` without any."""
  try:
    models = kept.load(run_dir) if len(rows) else None
  except kept.OtherClientsError as error:
    print(f'Without the models that clients keep: {error}\n')
    return None
  if models is None:
    return None
  specs = models.specs
  evaluators = [evaluation.CentralEvaluator(spec) for spec in specs]
  parts, seen, by_client, counted = [], [], [], _counted(task, examples, rows)
  for client, client_rows in enumerate(rows):
    own = examples.take(client_rows)
    if not len(own):
      by_client.append(float('nan'))
      continue
    evaluator = evaluators[client % len(specs)]
    parts.append(evaluator.outputs(models.weights(client), own.inputs))
    seen.append(train_evaluation.unmasked(evaluator, models.weights(client), own))
    by_client.append(train_evaluation.metric_of(parts[-1], seen[-1], specs[0], task))
  outputs = np.concatenate(parts)
  examples = examples.take(np.concatenate(rows))
  if any(spec.has_mask for spec in specs):
    weights = np.concatenate(list(map(_weights, seen, parts)))
    examples = tff_kd.data.Examples(examples.inputs, examples.labels, weights)
  return _Evaluated(
      'client', specs[0], outputs, examples, _scores(outputs, examples, specs[0]),
      np.array(by_client), counted,
  )


def _weights(own: tff_kd.data.Examples, outputs: np.ndarray) -> np.ndarray:
  """Returns the weights of the outputs, 1 without any, like those without the last axis.
  """
  weights = np.ones(len(own)) if own.sample_weight is None else own.sample_weight
  weights = np.reshape(weights, weights.shape + (1,) * (outputs.ndim - 1 - weights.ndim))
  return np.broadcast_to(weights, outputs.shape[:-1])


def _counted(
    task: tff_kd.data.Task, examples: tff_kd.data.Examples, rows: Sequence[np.ndarray]
) -> np.ndarray:
  """Returns the numbers of the clients of which an example counts."""
  counts = task.counted(examples)
  return np.array([k for k, of_k in enumerate(rows) if counts[of_k].any()], int)


def _worst_first(found: _Evaluated, task: tff_kd.data.Task) -> np.ndarray:
  """Returns the clients of which an example counts, the worst and NaN first."""
  sign = -1.0 if task.is_lower_better() else 1.0
  values = sign * found.by_client[found.counted]
  values[np.isnan(values)] = -np.inf
  return found.counted[np.argsort(values, kind='stable')]


def _over_clients(
    found: _Evaluated, task: tff_kd.data.Task
) -> evaluation.FederatedEvaluation:
  """Summarises the metric over the clients of which an example counts."""
  values = found.by_client[_worst_first(found, task)]
  return evaluation.over_clients(values, lower_is_better=task.is_lower_better())


def _print(
    task, part, examples, found, names, clients, rows, num_worst
) -> None:
  metric = task.metric
  # The clients' own models do not have the further scores of the task.
  keys = list(dict.fromkeys(key for model in found for key in model.scores))
  name_of = {'clients': 'training'}.get(part, part)
  head = ['model', *(f'{name_of} {tables.words(key)}' for key in keys)]
  if len(rows):
    head += [f'clients: mean {tables.words(metric)}', '10th pct.', 'worst']
  table = [tuple(head)]
  for model in found:
    row = [model.name]
    row += [f'{model.scores[key]:.4f}' if key in model.scores else '' for key in keys]
    if len(rows):
      summary = _over_clients(model, task)
      row += [
          f'{number:.4f}'
          for number in (summary.mean, summary.percentile_10, summary.worst)
      ]
    table.append(tuple(row))
  print(f'{task.name}: {len(examples)} examples ({part}).\n')
  tables.print_table(table)
  if not len(rows) or not num_worst:
    return
  worst = _worst_first(found[0], task)[:num_worst]
  print(f'\nThe clients with the worst {found[0].name}:\n')
  classes = task.class_numbers(task.clients)
  head = ['client', *(f'{model.name} {metric}' for model in found), 'examples here',
          'trained on']
  if classes is not None:
    head.append('most of it')
  table = [tuple(head)]
  for client in worst:
    row = [
        names[client], *(f'{model.by_client[client]:.4f}' for model in found),
        str(len(rows[client])), str(len(clients[client])),
    ]
    if classes is not None:
      counts = np.bincount(classes[clients[client]])
      row.append(
          ', '.join(
              f'{_class_names(task)[label]} ({counts[label]})'
              for label in np.argsort(-counts)[:3] if counts[label]
          )
      )
    table.append(tuple(row))
  tables.print_table(table)


def _class_names(task: tff_kd.data.Task) -> Sequence[str]:
  return task.class_names or [str(label) for label in range(task.num_classes)]


def _write(report_dir, task, part, examples, found, names, clients, rows) -> None:
  report: dict[str, Any] = {
      'task': task.name, 'part': part, 'examples': len(examples), 'models': {}
  }
  for model in found:
    report['models'][model.name] = {'scores': model.scores}
    if len(rows):
      summary = _over_clients(model, task)
      report['models'][model.name]['clients'] = {
          'metric': task.metric, 'count': summary.num_clients, 'mean': summary.mean,
          'percentile_10': summary.percentile_10, 'worst': summary.worst,
      }
  run_folders.write_json(report_dir / 'report.json', report)
  if not len(rows):
    return
  with open(report_dir / 'clients.csv', 'w', newline='') as file:
    writer = csv.writer(file)
    writer.writerow([
        'client', 'examples', 'trained_on',
        *(f'{model.name}_{task.metric}' for model in found),
    ])
    for client, client_rows in enumerate(rows):
      values = [model.by_client[client] for model in found]
      writer.writerow([
          names[client], len(client_rows), len(clients[client]),
          *('' if np.isnan(value) else value for value in values),
      ])


def _draw(report_dir, task, title, found, has_clients: bool) -> list[str]:
  """Draws the pictures; returns the names of their files."""
  shown = {model.name: tables.words(model.name) for model in found}
  if 'client' in shown:
    shown['client'] = "clients' own models"
  figures = {}
  if has_clients:
    figures['clients.png'] = plots.clients(
        {
            shown[model.name]: model.by_client[_worst_first(model, task)]
            for model in found
        },
        metric=task.metric, title=title,
    )
  if task.is_regression:
    errors = {}
    for model in found:
      counted = model.examples.counted
      errors[shown[model.name]] = (
          model.outputs[counted].reshape(-1), model.examples.labels[counted].reshape(-1)
      )
    figures['errors.png'] = plots.errors(errors, title=title)
  else:
    sure = {}
    for model in found:
      logits, labels = evaluation.counted_predictions(
          model.spec.class_logits(tf.constant(model.outputs)).numpy(),
          model.examples.labels, model.spec, model.examples.sample_weight,
      )
      name = shown[model.name]
      sure[name] = tf.nn.softmax(logits).numpy().max(-1), logits.argmax(-1) == labels
      if logits.shape[-1] <= _MAX_CLASSES:
        names = _class_names(task)
        if len(names) != logits.shape[-1]:  # Each label is present or not.
          names = ['no', 'yes']
        figures[f'confusion_{model.name}.png'] = plots.confusion(
            tf.math.confusion_matrix(labels, logits.argmax(-1), logits.shape[-1]).numpy(),
            class_names=names,
            title=f"{title}\n{name}, accuracy {model.scores['accuracy']:.3f}",
        )
    figures['calibration.png'] = plots.calibration(sure, title=title)
  for name, figure in figures.items():
    figure.savefig(report_dir / name)
  return list(figures)
