r"""Runs several algorithms on the same problem, several times, and compares them.

  python -m pipelines.compare --algorithms=fed_avg,fed_df,fed_distillation
  python -m pipelines.compare --algorithms=fed_avg,fed_ntd --seeds=0,1 --alpha=0.05
  python -m pipelines.compare --algorithms=fed_avg,fed_df \
      --vary='|--dropout_after=0.3|--dropout_after=0.7'
  python -m pipelines.compare --algorithms=fed_avg,ds_fl --vary='|--epsilon=8' --audit
  python -m pipelines.compare --algorithms=fed_avg,fed_df --task=newsgroups --ceilings

Takes the flags of `pipelines.train`, too; an algorithm gets those that it knows. A seed
decides the split, the initial weights and who takes part in which round, so all
algorithms meet the same. One run a core at a time. Stopped and started again, it goes
on where it was. Leaves table.md, table.csv, curves.png, scores.png (with --vary,
varied.png, too), and each run's own folder.
"""

import dataclasses
import functools
import json
import math
import pathlib
import re
import statistics
from typing import Any, NamedTuple, Optional

from absl import app
from absl import flags

import pipelines
from pipelines import central_flags
from pipelines import parallel
from pipelines import run_folders
from pipelines import tables
from pipelines import train_flags
from tff_kd import algorithms
from tff_kd import cores

flags.adopt_module_key_flags(central_flags)
flags.adopt_module_key_flags(train_flags)
# Set for each run; --output_dir is the folder of all.
_PER_RUN = {'algorithm', 'seed', 'output_dir', 'resume', 'compare_with_fed_avg'}

_ALGORITHMS = flags.DEFINE_list(
    'algorithms', sorted(algorithms.REGISTRY),
    'What to compare, as --algorithm knows them.',
)
_SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'One run of each algorithm a seed.')
_TARGET_ACCURACY = flags.DEFINE_float(
    'target_accuracy', None, 'Rounds and MB are counted to this test accuracy of the '
    "student (of a regression, to this error); if unset, 95% of the best algorithm's "
    'mean accuracy, or 1% above its error.', lower_bound=0.0,
)
_VARY = flags.DEFINE_multi_string(
    'vary', [], 'Flags of pipelines.train to run each algorithm with, one set after the '
    'other, separated by |; an empty one is without. varied.png has a panel for each '
    'algorithm and such list. An algorithm is run with the sets of which it knows every '
    'flag.'
)
_AUDIT = flags.DEFINE_bool(
    'audit', False, 'Attack each run (pipelines.audit), and add what that found to the '
    'table: the AUC of membership inference against the released student, and against '
    "single clients' models."
)
_CEILINGS = flags.DEFINE_bool(
    'ceilings', False, 'Also train the student and the teacher on all examples in one '
    'place (pipelines.centralized), once a seed: a row of the table, and lines in the '
    'picture.'
)
_JOBS = flags.DEFINE_integer(
    'jobs', None, 'Runs at a time; one a core if unset.', lower_bound=1
)
# The names of the ceilings and of the floor in the table and in messages.
_IN_ONE_PLACE = 'in one place'
_CENTRAL_FOLDER = 'centralized'
_ALONE = "the server's labels alone"
# Algorithms whose curves are drawn in one panel; more have one each.
_MOST_TOGETHER = 5
# The columns of the last rounds, beside those of the best round.
_LAST_ROUNDS = 10
_STUDENT_LAST, _TEACHER_LAST = (
    f'{model}, last {_LAST_ROUNDS}' for model in ('student', 'teacher')
)


class _Setting(NamedTuple):
  """An algorithm, and the flags that it is given beside the common ones."""

  algorithm: str
  varied: tuple[str, ...] = ()

  @property
  def name(self) -> str:
    return ' '.join((self.algorithm, *self.varied))


@dataclasses.dataclass(frozen=True)
class _Run:
  """A run of a setting; its results can be read once it is done."""

  setting: _Setting
  seed: int
  folder: pathlib.Path

  @property
  def name(self) -> str:
    return f'{self.setting.name}, seed {self.seed}'

  @property
  def is_done(self) -> bool:
    has_ended = (self.folder / run_folders.RESULTS).is_file()
    return has_ended and _is_of(self.folder, self.setting)

  @functools.cached_property
  def results(self) -> dict[str, Any]:
    return json.loads((self.folder / run_folders.RESULTS).read_text())

  @functools.cached_property
  def history(self) -> list[dict[str, float]]:
    return run_folders.read_history(self.folder / run_folders.METRICS)

  @functools.cached_property
  def megabytes(self) -> list[float]:
    return run_folders.megabytes(self.history)

  @property
  def audit_path(self) -> pathlib.Path:
    return self.folder / 'audit' / 'report.json'

  @functools.cached_property
  def audit(self) -> Optional[dict[str, Any]]:
    """The report of the audit; `None` without."""
    if not _AUDIT.value or not self.audit_path.is_file():
      return None
    return json.loads(self.audit_path.read_text())


def _seeds() -> list[int]:
  try:
    seeds = [int(seed) for seed in _SEEDS.value]
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
      raise ValueError
  except ValueError:
    raise app.UsageError(
        '--seeds must be different numbers, 0 or more, such as 0,1,2; found '
        f'{",".join(_SEEDS.value)!r}.'
    ) from None
  return seeds


def _check_algorithms() -> None:
  if not _ALGORITHMS.value:
    raise app.UsageError(
        f'--algorithms must name some of {", ".join(algorithms.REGISTRY)}, or files of '
        'your own, found none.'
    )
  # Runs that share folders would show the results of one for both.
  found = {_CENTRAL_FOLDER: f'the runs {_IN_ONE_PLACE}'} if _CEILINGS.value else {}
  for algorithm in _ALGORITHMS.value:
    try:
      info = algorithms.get(algorithm)
    except ValueError as error:
      raise app.UsageError(f'--algorithms: {error}') from None
    other = found.setdefault(info.name, algorithm)
    if other != algorithm:
      raise app.UsageError(
          f'--algorithms: the runs of {algorithm} would be in the folders of {other}, as '
          f'its function is called {info.build.__name__}. Rename the function of a file, '
          'or leave one of the two out.'
      )


def _variations() -> list[list[tuple[str, ...]]]:
  """Returns the sets of flags to vary, by row."""
  known = train_flags.own_flags()
  rows = []
  for text in _VARY.value:
    row = [tuple(variant.split()) for variant in text.split('|')]
    if len(set(row)) < len(row):
      raise app.UsageError(f'--vary={text!r} has the same flags twice.')
    rows.append(row)
  for argument in sorted({flag for row in rows for varied in row for flag in varied}):
    name = _flag_name(argument)
    if not argument.startswith('--') or name not in known:
      raise app.UsageError(f'--vary: {argument!r} is not a flag of pipelines.train.')
    if name in _PER_RUN or known[name].present:
      raise app.UsageError(f'--vary: --{name} is set for all runs. Leave one out.')
    if not any(_takes(algorithm, argument) for algorithm in _ALGORITHMS.value):
      raise app.UsageError(
          f'--vary: {argument} has no effect with any of {", ".join(_ALGORITHMS.value)}.'
      )
  _check_folders(rows)
  return rows


def _check_folders(rows: list[list[tuple[str, ...]]]) -> None:
  """Refuses sets of flags that differ in what the names of folders leave out."""
  found = {}
  for varied in (varied for row in rows for varied in row):
    other = found.setdefault(_folder_words(varied), varied)
    if other != varied:
      raise app.UsageError(
          f'--vary: the runs with {" ".join(varied)!r} would be in the folders of those '
          f'with {" ".join(other)!r}. Compare them in two calls, each with its own '
          '--output_dir.'
      )


def _flag_name(argument: str) -> str:
  """Returns the flag's name in --flag=value, --flag or --noflag."""
  name = argument.removeprefix('--').partition('=')[0]
  return name if name in train_flags.own_flags() else name.removeprefix('no')


def _takes(algorithm: str, argument: str) -> bool:
  return train_flags.is_taken(algorithms.get(algorithm), _flag_name(argument))


def _settings(rows: list[list[tuple[str, ...]]]) -> dict[_Setting, list[str]]:
  """Returns the settings to compare, each with all flags of its training."""
  known = train_flags.own_flags()
  for name in sorted(_PER_RUN - {'output_dir'}):
    if known[name].present:
      raise app.UsageError(f'--{name} is set for each run. Leave it out.')
  given = [f for f in known.values() if f.present and f.name not in _PER_RUN]
  found, used = {}, set()
  varied_sets = dict.fromkeys(varied for row in rows or [[()]] for varied in row)
  for name in _ALGORITHMS.value:
    info = algorithms.get(name)
    taken = [f for f in given if train_flags.is_taken(info, f.name)]
    used |= {f.name for f in taken}
    arguments = [f.serialize() for f in taken]
    if not known['patience'].present:
      arguments.append('--patience=0')
    for varied in varied_sets:
      if all(_takes(name, argument) for argument in varied):
        found[_Setting(name, varied)] = [*arguments, *varied]
  unused = [f'--{f.name}' for f in given if f.name not in used]
  if unused:
    raise app.UsageError(
        f'{", ".join(unused)} has no effect with any of '
        f'{", ".join(_ALGORITHMS.value)}. Leave it out.'
    )
  return found


def _is_of(folder: pathlib.Path, setting: _Setting) -> bool:
  """Returns whether the run in a folder is of this algorithm, not of a namesake."""
  path = folder / run_folders.CONFIG
  if not path.is_file():
    return False
  return json.loads(path.read_text())['flags'].get('algorithm') == setting.algorithm


def _has_begun(folder: pathlib.Path, setting: _Setting) -> bool:
  """Returns whether a run of a setting, of any seed, has ended a round."""
  return any(
      path.parent.name.rpartition('-')[0] == _folder_name(setting)
      and _is_of(path.parent, setting)
      for path in folder.glob('*/metrics.csv')
  )


def _folder_words(varied: tuple[str, ...]) -> str:
  """Returns flags as they stand in the name of a folder."""
  return ''.join(
      '-' + re.sub('[^A-Za-z0-9_.=,-]', '_', argument[2:]) for argument in varied
  )


def _folder_name(setting: _Setting) -> str:
  """Returns the name of the folders of a setting's runs, without the seed."""
  return algorithms.get(setting.algorithm).name + _folder_words(setting.varied)


def _log(folder: pathlib.Path, suffix: str = '') -> pathlib.Path:
  """Returns the file beside a run's folder in which its output is."""
  return folder.with_name(f'{folder.name}{suffix}.log')


def _check_same_problem(
    folder: pathlib.Path, settings: dict[_Setting, list[str]]
) -> None:
  """Refuses a folder that has rounds with other flags; notes the flags."""
  arguments = {setting.name: flags_of_run for setting, flags_of_run in settings.items()}
  # A run that ended before its first round may go on with other flags.
  begun = {setting.name for setting in settings if _has_begun(folder, setting)}
  if _CEILINGS.value:
    arguments[_IN_ONE_PLACE] = _central_arguments()
    if any(folder.glob(f'{_CENTRAL_FOLDER}-*/results.json')):
      begun.add(_IN_ONE_PLACE)
  path = folder / 'compare.json'
  if path.is_file():
    before = json.loads(path.read_text())
    for name, flags_of_run in arguments.items():
      if name in begun and name in before and before[name] != flags_of_run:
        raise app.UsageError(
            f'{path.parent} holds runs of {name} with {before[name]}, not with '
            f'{flags_of_run}. Go on with the same flags, or choose another --output_dir.'
        )
    arguments = before | arguments
  run_folders.write_json(path, arguments)


def _train_all(
    runs: list[_Run], settings: dict[_Setting, list[str]]
) -> list[str]:
  """Runs what is not done yet, so many at a time; returns what failed."""
  todo = {run.name: run for run in runs if not run.is_done}
  if len(todo) < len(runs):
    print(f'{len(runs) - len(todo)} of {len(runs)} runs are done already.')

  def line(job: parallel.Job, seconds: float) -> str:
    results = todo[job.name].results
    best = results['best'][f"test/student_{results['metric']}"]
    return f'student {best:.3f}, {seconds:.0f} s'

  jobs = [
      parallel.script_job(
          run.name, 'train',
          [
              f'--algorithm={run.setting.algorithm}', f'--seed={run.seed}',
              f'--output_dir={run.folder}', '--nocompare_with_fed_avg',
              *settings[run.setting],
          ],
          _log(run.folder),
      )
      for run in todo.values()
  ]
  return parallel.run_all(jobs, _JOBS.value, line)


def _ceiling_path(seed: int, folder: pathlib.Path) -> pathlib.Path:
  return folder / f'{_CENTRAL_FOLDER}-{seed}' / run_folders.RESULTS


def _train_ceilings(seeds: list[int], folder: pathlib.Path) -> list[str]:
  """Trains in one place what is not trained yet; returns what failed."""
  jobs = []
  for seed in seeds:
    path = _ceiling_path(seed, folder)
    if not path.is_file():
      given = [f'--seed={seed}', f'--output_dir={path.parent}', *_central_arguments()]
      jobs.append(
          parallel.script_job(
              f'{_IN_ONE_PLACE}, seed {seed}', 'centralized', given, _log(path.parent)
          )
      )
  return parallel.run_all(jobs, _JOBS.value)


def _central_flags() -> list[flags.Flag]:
  defined = flags.FLAGS.flags_by_module_dict()[central_flags.__name__]
  return [flag for flag in defined if flag.present]


def _central_arguments() -> list[str]:
  """Returns the flags of this script for the training in one place."""
  shared = [
      flag
      for name, flag in train_flags.own_flags().items()
      if flag.present and name in central_flags.OF_TRAIN - _PER_RUN
  ]
  return [flag.serialize() for flag in [*shared, *_central_flags()]]


def _ceilings(
    seeds: list[int], folder: pathlib.Path, metric: str, further: list[str]
) -> dict[str, list[float]]:
  """Returns the scores of each seed's models trained in one place, by column.

  Args:
    seeds: The seeds.
    folder: The folder of the comparison.
    metric: The score of student and teacher.
    further: Other scores, of the student.
  """
  cells = {
      'student': ('student', metric), 'teacher': ('teacher', metric),
      **{name: ('student', name) for name in further},
  }
  found = {cell: [] for cell in cells}
  for seed in seeds:
    path = _ceiling_path(seed, folder)
    if _CEILINGS.value and path.is_file():
      models = json.loads(path.read_text())['models']
      for cell, (kind, score) in cells.items():
        # The mean over cohorts.
        found[cell].append(
            statistics.mean(
                of_model[f'test_{score}']
                for name, of_model in models.items() if name.startswith(kind)
            )
        )
  return found


def _further_scores(run: _Run) -> list[str]:
  """Returns the names of the student's scores beside the metric, which tasks can have."""
  return list(run.results['further_scores'].get('student', {}))


def _audit_all(runs: list[_Run]) -> list[str]:
  """Attacks what is not attacked yet; returns what failed."""
  jobs = [
      parallel.script_job(
          f'audit of {run.name}', 'audit',
          [f'--run={run.folder}', '--inversion_epochs=0'], _log(run.folder, '-audit'),
      )
      for run in runs if not run.audit_path.is_file()
  ]
  return parallel.run_all(jobs, _JOBS.value)


class _Table:
  """The table, with a row for each algorithm and set of flags."""

  def __init__(
      self, runs: list[_Run], floor: dict[str, list[float]],
      ceilings: dict[str, list[float]],
  ):
    self._metric = runs[0].results['metric']
    self._is_error = runs[0].results['lower_is_better']
    self._further = _further_scores(runs[0])
    self._has_audits = any(run.audit for run in runs)
    by_setting = _by_setting(runs)
    self._target = _TARGET_ACCURACY.value
    if self._target is None:
      means = [statistics.mean(self._best(of, 'student')) for of in by_setting.values()]
      # Runs that diverged do not count.
      means = [mean for mean in means if math.isfinite(mean)] or [math.nan]
      self._target = 1.01 * min(means) if self._is_error else 0.95 * max(means)
    self.rows = [self._head()]
    self.rows += [self._row(setting, of) for setting, of in by_setting.items()]
    if floor['student']:
      self._add_reference(_ALONE, floor)
    if ceilings['student']:
      self._add_reference(_IN_ONE_PLACE, ceilings)

  def _head(self) -> tuple[str, ...]:
    audits = ['AUC: student', 'AUC: one client'] if self._has_audits else []
    return (
        'algorithm', 'student', 'teacher',
        *map(tables.words, self._further), _STUDENT_LAST, _TEACHER_LAST,
        f'rounds to {self._target:.3f}', f'MB to {self._target:.3f}', 'MB a round',
        's a round', *audits, 'seeds',
    )

  def _best(self, runs: list[_Run], model: str) -> list[float]:
    """Returns the test score of each run in the round that is best by validation."""
    key = f'test/{model}_{self._metric}'
    return [run.results['best'][key] for run in runs if key in run.results['best']]

  def _last(self, runs: list[_Run], model: str) -> list[float]:
    """Returns the mean test score of the last rounds of each run."""
    key = f'test/{model}_{self._metric}'
    lasts = [run.history[-_LAST_ROUNDS:] for run in runs]
    return [
        statistics.mean(row[key] for row in last if key in row)
        for last in lasts if any(key in row for row in last)
    ]

  def _reached(self, runs: list[_Run]) -> tuple[list[float], list[float]]:
    """Returns rounds and MB a client until the target, of the runs that reach it."""
    sign = -1.0 if self._is_error else 1.0
    rounds, megabytes = [], []
    for run in runs:
      for row, moved in zip(run.history, run.megabytes):
        if sign * row[f'test/student_{self._metric}'] >= sign * self._target:
          rounds.append(row['round'])
          megabytes.append(moved)
          break
    return rounds, megabytes

  def _row(self, setting: _Setting, runs: list[_Run]) -> tuple[str, ...]:
    rounds, megabytes = self._reached(runs)
    missed = f' ({len(rounds)} of {len(runs)})' if len(rounds) < len(runs) else ''
    a_round = [run.megabytes[-1] / len(run.history) for run in runs]
    seconds = [
        statistics.median(row['round_seconds'] for row in run.history) for run in runs
    ]
    further = [run.results['further_scores'] for run in runs]
    return (
        setting.name,
        *(tables.spread(self._best(runs, model), 3) for model in ('student', 'teacher')),
        *(
            tables.spread([f['student'][name] for f in further if 'student' in f], 3)
            for name in self._further
        ),
        *(tables.spread(self._last(runs, model), 3) for model in ('student', 'teacher')),
        tables.spread(rounds, 1) + missed, tables.spread(megabytes, 2) + missed,
        f'{statistics.mean(a_round):.3g}', f'{statistics.mean(seconds):.2f}',
        *(_leaks(runs) if self._has_audits else []), str(len(runs)),
    )

  def _add_reference(self, name: str, cells: dict[str, list[float]]) -> None:
    """Adds a row of models that no federated training made."""
    row = [name, *(tables.spread(values, 3) for values in cells.values())]
    blank = [''] * (len(self.rows[0]) - len(row) - 1)
    self.rows.append((*row, *blank, str(len(cells['student']))))


def _floor(runs: list[_Run], metric: str) -> dict[str, list[float]]:
  """Returns the scores of models trained on the server's labels alone, one a seed.

  Runs with varied flags are left out: they may differ in these labels.
  """
  found = {'student': {}, 'teacher': {}}
  for run in runs:
    alone = run.results['alone'] if not run.setting.varied else {}
    for kind, by_seed in found.items():
      # The mean over cohorts.
      values = [scores[metric] for name, scores in alone.items() if name.startswith(kind)]
      if values:
        by_seed.setdefault(run.seed, statistics.mean(values))
  return {name: list(by_seed.values()) for name, by_seed in found.items()}


def _leaks(runs: list[_Run]) -> list[str]:
  """Returns the AUCs of membership inference on the student and on single clients."""
  audits = [run.audit for run in runs if run.audit]
  students = [
      audit['membership']['student']['overall']['auc']['value']
      for audit in audits if 'student' in audit['membership']
  ]
  clients = [audit['clients']['membership_auc']['value'] for audit in audits]
  return [tables.spread(students, 3), tables.spread(clients, 3)]


def _by_setting(runs: list[_Run]) -> dict[_Setting, list[_Run]]:
  found = {}
  for run in runs:
    found.setdefault(run.setting, []).append(run)
  return found


def _report(
    runs: list[_Run], rows: list[list[tuple[str, ...]]], seeds: list[int],
    folder: pathlib.Path,
) -> None:
  metric = runs[0].results['metric']
  floor = _floor(runs, metric)
  ceilings = _ceilings(seeds, folder, metric, _further_scores(runs[0]))
  table = _Table(runs, floor, ceilings).rows
  tables.write_table(table, folder)
  files = ['table.md', 'table.csv']
  levels = {
      f'{model}, {where}': statistics.mean(of[model])
      for where, of in ((_ALONE, floor), (_IN_ONE_PLACE, ceilings))
      for model in ('student', 'teacher') if of[model]
  }
  for name, figure in _figures(runs, rows, metric, levels).items():
    figure.savefig(folder / name)
    files.append(name)
  print()
  tables.print_table(table)
  print(
      f'\nTest {metric} in the round that is best by validation, and the mean of the '
      f'last {_LAST_ROUNDS}\nrounds; mean ± standard deviation over the seeds; MB up and '
      'down per participating client;\nseconds with '
      f'{_JOBS.value or len(cores.available())} runs at a time.\n'
      + ', '.join(str(folder / name) for name in files)
  )


def _figures(
    runs: list[_Run], rows: list[list[tuple[str, ...]]], metric: str,
    levels: dict[str, float],
) -> dict[str, Any]:
  """Returns the figures by the names of their files."""
  from tff_kd import plots

  test = f'test {tables.words(metric)}'
  student = {f'test/student_{metric}': 'student'}
  columns = student | {f'test/teacher_{metric}': 'teacher'}
  histories, points = {}, {}
  for setting, of_setting in _by_setting(runs).items():
    histories[setting] = [run.history for run in of_setting]
    scores = [run.results['best'][f'test/student_{metric}'] for run in of_setting]
    points[setting.name] = (
        statistics.mean(run.megabytes[-1] for run in of_setting),
        statistics.mean(scores), tables.deviation(scores),
    )
  named = {setting.name: seeds for setting, seeds in histories.items()}
  if len(named) > _MOST_TOGETHER:
    curves = plots.small_multiples(named, metric=test, columns=columns, levels=levels)
  else:
    curves = plots.curves(
        named, metric=f"student's {test}", columns=student, levels=levels
    )
  figures = {
      'curves.png': curves,
      'scores.png': plots.comparison(
          points, metric=f"student's {test}", levels=levels
      ),
  }
  panels = _panels(histories, rows)
  if panels:
    figures['varied.png'] = plots.small_multiples(
        panels, metric=test, columns=columns, levels=levels
    )
  return figures


def _panels(
    histories: dict[_Setting, Any], rows: list[list[tuple[str, ...]]]
) -> dict[str, dict[str, Any]]:
  """Returns by algorithm and --vary the histories of what varies."""
  panels = {}
  for number, row in enumerate(rows, 1):
    for algorithm in _ALGORITHMS.value:
      title = f'{algorithm}, --vary {number}' if len(rows) > 1 else algorithm
      for varied in row:
        seeds = histories.get(_Setting(algorithm, varied))
        if seeds:
          panels.setdefault(title, {})[' '.join(varied) or 'defaults'] = seeds
  return panels


@pipelines.for_users
def main(argv: list[str]) -> None:
  _check_algorithms()
  if _central_flags() and not _CEILINGS.value:
    raise app.UsageError(
        f'--{_central_flags()[0].name} has no effect without --ceilings. Leave it out.'
    )
  if train_flags.DRY_RUN.value:
    raise app.UsageError(
        '--dry_run is of one run: python -m pipelines.train --dry_run. Leave it out.'
    )
  if train_flags.CONFIG.value is not None:
    train_flags.take_given(_PER_RUN)
  seeds, rows = _seeds(), _variations()
  settings = _settings(rows)
  folder = train_flags.output_dir('compare')
  with parallel.exclusive_lock(folder):
    _compare(folder, seeds, rows, settings)


def _compare(
    folder: pathlib.Path,
    seeds: list[int],
    rows: list[list[tuple[str, ...]]],
    settings: dict[_Setting, list[str]],
) -> None:
  """Trains what is missing, and reports.

  Raises:
    UserError: If a run has failed.
  """
  runs = [
      _Run(setting, seed, folder / f'{_folder_name(setting)}-{seed}')
      for seed in seeds for setting in settings
  ]
  _check_same_problem(folder, settings)
  with parallel.stoppable():
    failed = _train_all(runs, settings)
    done = [run for run in runs if run.is_done]
    if _CEILINGS.value:
      failed += _train_ceilings(seeds, folder)
    if _AUDIT.value:
      failed += _audit_all(done)
  if done:
    order = list(settings)
    _report(sorted(done, key=lambda run: order.index(run.setting)), rows, seeds, folder)
  if failed:
    raise pipelines.UserError(f'failed: {"; ".join(failed)}.')


if __name__ == '__main__':
  pipelines.run(main)
