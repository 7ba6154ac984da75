"""What `pipelines.train` prints and draws, before a run and after it."""

from collections.abc import Callable, Mapping
import collections
import dataclasses
import datetime
import functools
import pathlib
from typing import Any, NamedTuple, Optional

import numpy as np
import tensorflow as tf

from pipelines import run_folders
from pipelines import tables
from pipelines import train_checks
from pipelines import train_data
from pipelines import train_evaluation
from pipelines import train_flags as args
from pipelines import train_folder
from pipelines import train_privacy
from pipelines import train_setup
import tff_kd

# FedAvg in the comparison has at most this many times the rounds. Where predictions are
# large, the same bytes would take a hundred times the rounds.
_MOST_FED_AVG = 3


class Baseline(NamedTuple):
  """FedAvg of the same student, to compare a run with.

  Attributes:
    rows: The rows of its metrics.csv.
    for_bytes: The number of rounds in which it moves as many bytes as the run.
  """

  rows: list[dict[str, float]]
  for_bytes: int


def most_fed_avg(num_rounds: int) -> int:
  """Returns how many rounds FedAvg is given at most, beside so many of the run."""
  # After the learning rates have fallen to 0, more rounds change nothing.
  if train_checks.has_falling_rate():
    return args.ROUNDS.value
  return _MOST_FED_AVG * num_rounds


def draw_partition(setup: train_setup.Setup, run_dir: pathlib.Path) -> None:
  task = setup.task
  split = args.PARTITION.value if task.client_rows is None else 'its own clients'
  title = f'{task.name}: {len(task.clients)} examples, {split}'
  classes, names = task.class_numbers(task.clients), None
  if classes is None or len(setup.clients) > 100:
    counts = np.array([len(rows) for rows in setup.clients])
  else:
    counts = np.array([
        np.bincount(classes[rows], minlength=task.num_classes) for rows in setup.clients
    ])
    names = task.class_names
  figure = tff_kd.plots.partition(counts, class_names=names, title=title)
  figure.savefig(run_dir / 'partition.png')


def print_setup(
    setup: train_setup.Setup, accountant: Optional[tff_kd.privacy.PrivacyAccountant]
) -> None:
  task, process = setup.task, setup.process
  print(
      f'{args.algorithm().name} on {task.name}: {args.NUM_CLIENTS.value} clients with '
      f'{sum(map(len, setup.clients))} examples, {args.CLIENTS_PER_ROUND.value} a '
      'round; '
      f'transfer {len(task.transfer)} ({args.TRANSFER_LABELS.value} with labels), '
      f'validation {len(task.validation)}, test {len(task.test)}.'
  )
  for name, spec in train_evaluation.specs_of(process).items():
    size = sum(w.size for w in tf.nest.flatten(spec.initial_weights))
    print(f'{name}: {size:,} weights.')
  print(f'The best round: with the {train_evaluation.best_in_words(task)}.')
  train_privacy.print_guards(process, accountant)


def print_plan(setup: train_setup.Setup) -> None:
  """Prints what would be built, moved and stored."""
  process = setup.process
  accountant = None
  if train_checks.is_private():
    accountant = train_privacy.build_accountant(process, None)
  print_setup(setup, accountant)
  each = tff_kd.communication.round_bytes(process)
  clients, rounds = args.CLIENTS_PER_ROUND.value, args.ROUNDS.value
  rows = [('moved, MB', 'a client, a round', 'all clients, all rounds')]
  for name, value in each._asdict().items():
    if value:
      total = value * clients * rounds / 1e6
      rows.append((tables.words(name), f'{value / 1e6:.3g}', f'{total:.4g}'))
  total = each.total * clients * rounds / 1e6
  rows.append(('all', f'{each.total / 1e6:.3g}', f'{total:.4g}'))
  state = tff_kd.communication.type_bytes(
      process.initialize.type_signature.result.member
  )
  # Two checkpoints are kept, each with the last state and the best one.
  held = [
      ('held, MB', ''),
      ("the server's state", f'{state / 1e6:.3g}'),
      ('the checkpoints', f'{4 * state / 1e6:.3g}'),
  ]
  if isinstance(process, tff_kd.StatefulClientsProcess):
    kept = float(tff_kd.communication.type_bytes(
        process.initialize_client.type_signature.result
    ))
    if process.kept_models is not None:
      kept /= len(process.kept_models.specs)  # The mean over the cohorts.
    held.append(
        ("clients' own states, on disk", f'{kept * args.NUM_CLIENTS.value / 1e6:.3g}')
    )
  print()
  tables.print_table(rows)
  print()
  tables.print_table(held)
  print('\nNothing was trained (--dry_run).')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
  """A training that is over.

  Attributes:
    setup: The parts of the run.
    evaluation: The evaluation of each round.
    result: The result of the training.
    history: The rows of metrics.csv.
    baseline: FedAvg; `None` without that comparison.
    accountant: The privacy accountant; `None` if the run is not private.
    run_dir: The folder of the run.
  """

  setup: train_setup.Setup
  evaluation: train_evaluation.Evaluation
  result: tff_kd.simulation.TrainingResult
  history: list[dict[str, float]]
  baseline: Optional[Baseline]
  accountant: Optional[tff_kd.privacy.PrivacyAccountant]
  run_dir: pathlib.Path

  @property
  def task(self) -> tff_kd.data.Task:
    return self.setup.task

  @functools.cached_property
  def best(self) -> dict[str, float]:
    """Returns the row of the best round."""
    monitor = train_evaluation.monitored(self.task)
    return train_folder.best_row(
        self.history, self.result.round_num, monitor, self.task
    )

  @functools.cached_property
  def scores(self) -> list[str]:
    """Returns the names of the scores in the table."""
    names = tff_kd.evaluation.score_names(self.setup.process.students.first)
    return [name for name in names if name != 'loss']

  @functools.cached_property
  def server_models(self) -> dict[str, Any]:
    """Returns evaluator and weights of each model of the best round, by name."""
    return self.evaluation.models(self.result.best_state)

  @functools.cached_property
  def names(self) -> dict[str, str]:
    """Returns the names of the models in the table and the plots."""
    process = self.setup.process
    has_student = process.get_model_weights is not None
    names = {
        'student': 'student' if has_student else "clients' own models, mean",
        'client': "clients' own models, mean",
        'teacher': 'teacher',
        'student_before': 'student before back-distillation',
    }
    if not args.BACK.value or process.teacher_spec is None:
      names['student_before'] = "student before the server's distillation"
    if args.CALIBRATE.value:
      names['student_before'] = 'student before calibration'
    if process.students.has_cohorts:
      for name in ('student', 'student_before'):
        for i, model in enumerate(args.STUDENT.value):
          names[f'{name}_{i}'] = f'{names[name]}, cohort {i} ({model})'
        names[name] += ', mean of cohorts'
    return names

  def scored(self, values: Mapping[str, float], prefix: str = '') -> list[str]:
    """Returns the table's cells of the scores."""
    return [f'{values[prefix + name]:.4f}' for name in self.scores]


def report(finished: Finished, alone: Callable[[], dict[str, Any]]) -> None:
  """Draws the curves and prints the table.

  Args:
    finished: The training.
    alone: Waits for `train_alone.all_alone`.
  """
  rows = [*_model_rows(finished), *_baseline_rows(finished)]
  of_labels = alone()
  levels = {}
  for name, values in of_labels.items():
    label = f"{name} on the server's {args.TRANSFER_LABELS.value} labels alone"
    rows.append((label, '', *finished.scored(values), '', '', ''))
    levels[label] = values[finished.task.metric]
  _draw_curves(finished, levels)
  further = _further_scores(finished)
  _write_results(finished, of_labels, further)
  print()
  tables.print_table(rows)
  print()
  _print_end(finished)
  print()
  for name, values in further.items():
    print(f'{name}: ' + ', '.join(f'{key} {score:.4f}' for key, score in values.items()))
  tables.print_table([
      ('moved, MB', 'all clients, all rounds', 'a round'),
      *run_folders.moved_rows(finished.history, 'a client that takes part'),
  ])
  print()
  if finished.accountant is not None:
    _print_privacy(finished.accountant)
  seconds = [row[tff_kd.simulation.ROUND_SECONDS] for row in finished.history]
  print(f'Seconds per round: {np.median(seconds):.2f} (median).')
  if finished.baseline is not None:
    _print_comparison(finished)


def _model_rows(finished: Finished) -> list[tuple[str, ...]]:
  """Returns the table's head, and a row for each model of the best round."""
  task, test = finished.task, finished.best
  test_split = train_data.split_tests(task, finished.setup.clients)
  rows = [(
      'model', 'round', *(f'test {tables.words(name)}' for name in finished.scores),
      f'clients: mean {tables.words(task.metric)}', '10th pct.', 'worst',
  )]
  best_round = str(finished.result.best_round)
  for name, (evaluator, weights) in finished.server_models.items():
    by_client = train_evaluation.over_clients(evaluator, weights, task, test_split)
    rows.append((
        finished.names[name], best_round, *finished.scored(test, f'test/{name}_'),
        f'{by_client.mean:.4f}', f'{by_client.percentile_10:.4f}',
        f'{by_client.worst:.4f}',
    ))
  for name in ('student', 'client', 'student_before'):
    is_known = f'test/{name}_{task.metric}' in test
    if name not in finished.server_models and is_known:
      scores = finished.scored(test, f'test/{name}_')
      rows.append((finished.names[name], best_round, *scores, '', '', ''))
  return rows


def _baseline_rows(finished: Finished) -> list[tuple[str, ...]]:
  """Returns the table's rows of FedAvg."""
  if finished.baseline is None:
    return []
  num_rounds, for_bytes = finished.result.round_num, finished.baseline.for_bytes
  most = most_fed_avg(num_rounds)
  lasts = {'FedAvg, same rounds': num_rounds}
  if 1 <= for_bytes <= most:
    lasts['FedAvg, same bytes'] = for_bytes
  elif for_bytes > most > num_rounds and not train_checks.has_falling_rate():
    lasts[f'FedAvg, {_MOST_FED_AVG} times the rounds'] = most
  rows = []
  for name, last in lasts.items():
    best = train_folder.best_row(
        finished.baseline.rows, last, f'validation/student_{finished.task.metric}',
        finished.task,
    )
    scores = finished.scored(best, 'test/student_')
    rows.append((name, f"{best['round']:.0f}", *scores, '', '', ''))
  return rows


def _draw_curves(finished: Finished, levels: Mapping[str, float]) -> None:
  """Draws the test metric of each model, and what the labels give alone."""
  task = finished.task
  runs = {'': finished.history}
  if finished.baseline is not None:
    runs['FedAvg'] = finished.baseline.rows
  figure = tff_kd.plots.curves(
      runs, metric=f'test {task.metric}',
      columns={
          f'test/{name}_{task.metric}': shown for name, shown in finished.names.items()
      },
      best_round={'': finished.result.best_round}, levels=levels,
      title=f'{args.algorithm().name} on {task.name}',
  )
  figure.savefig(finished.run_dir / 'curves.png')


def _further_scores(finished: Finished) -> dict[str, dict[str, float]]:
  """Returns the task's own scores of a model, if the task has any."""
  task, specs = finished.task, train_evaluation.specs_of(finished.setup.process)
  if task.scores_fn is None:
    return {}
  return {
      name: dict(
          task.scores_fn(
              functools.partial(finished.evaluation.evaluators[name].outputs, weights)
          )
      )
      for name, (_, weights) in finished.server_models.items() if name in specs
  }


def _write_results(
    finished: Finished, alone: dict[str, Any], further: dict[str, Any]
) -> None:
  """Writes results.json."""
  now = datetime.datetime.now(datetime.timezone.utc)
  results = {
      'finished': now.isoformat(timespec='seconds'),
      'rounds': finished.result.round_num,
      'best_round': finished.result.best_round,
      'best': finished.best,
      'metric': finished.task.metric,
      'lower_is_better': finished.task.is_lower_better(),
      'further_scores': further,
      'alone': alone,
      'clients_keep_models': (
          finished.setup.process.description.kept_models is not None
      ),
  }
  if finished.accountant is not None:
    # The best round is chosen among all rounds, so all of them count.
    results['epsilon'] = finished.accountant.epsilon()
  run_folders.write_json(finished.run_dir / run_folders.RESULTS, results)


def _print_end(finished: Finished) -> None:
  """Says how the training ended, and which round is kept."""
  result, task = finished.result, finished.task
  ending = 'converged' if result.converged else 'reached the number of rounds'
  if result.budget_spent:
    ending = 'another round would pass the privacy budget'
  if result.stop_reason is not None:
    ending = result.stop_reason
  print(
      f'Ended after round {result.round_num} ({ending}); the round with the '
      f'{train_evaluation.best_in_words(task)} is kept. On {len(task.test)} test '
      'examples.'
  )
  _print_left_out(finished.history)
  _print_if_average_was_better(finished)


def _print_if_average_was_better(finished: Finished) -> None:
  """Says so if validation prefers the average to what the server made of it."""
  task, history = finished.task, finished.history
  names = [f'validation/{model}_{task.metric}' for model in ('student', 'student_before')]
  if not set(names) <= set(history[0]):
    return
  rows = [
      train_folder.best_row(history, finished.result.round_num, name, task)
      for name in names
  ]
  student, average = (row[name] for row, name in zip(rows, names))
  if average < student if task.is_lower_better(names[0]) else average > student:
    what = finished.names['student_before']
    print(
        f'By validation the {what} was better than after it: {tables.words(task.metric)} '
        f"{average:.4f} in round {rows[1]['round']:.0f}, the student {student:.4f} in "
        f"round {rows[0]['round']:.0f}. Compare with --algorithm=fed_avg, which costs "
        'less.'
    )


def _print_left_out(history: list[dict[str, float]]) -> None:
  """Prints how many rounds were skipped, how many reports did not count, and why."""
  skipped = sum(bool(row.get('round_skipped')) for row in history)
  if skipped:
    print(
        f'Rounds that were skipped, with fewer than {args.MIN_REPORTS.value} reports: '
        f'{skipped} of {len(history)}.'
    )
  causes = collections.Counter()
  for row in history:
    causes.update(tff_kd.simulation.left_out(row))
  if causes:
    print(
        'Reports of clients that did not count, in all rounds: '
        + ', '.join(f'{name} {count}' for name, count in causes.items()) + '.'
    )


def _print_privacy(accountant: tff_kd.privacy.PrivacyAccountant) -> None:
  """Prints what all rounds have cost."""
  print(
      f'Privacy: epsilon {accountant.epsilon():.4g} at delta {accountant.delta:g} for '
      f'all that {accountant.rounds} rounds released ({accountant.sampling.neighbors}).'
  )


def _print_comparison(finished: Finished) -> None:
  """Says in which round the student was as good as FedAvg at the end."""
  task, num_rounds = finished.task, finished.result.round_num
  column = f'test/student_{task.metric}'
  rows = finished.baseline.rows
  goal = rows[min(num_rounds, len(rows)) - 1][column]
  sign = -1.0 if task.is_lower_better() else 1.0
  reached = next(
      (r['round'] for r in finished.history if sign * r[column] >= sign * goal), None
  )
  ending = 'student did not reach it.'
  if reached is not None:
    ending = f'student reached it in round {reached:.0f}.'
  print(
      f"FedAvg's test {tables.words(task.metric)} after {num_rounds} rounds is "
      f'{goal:.4f}; the {ending}'
  )
