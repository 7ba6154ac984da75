r"""Runs several algorithms on the same problem, several times, and compares them.

  python -m pipelines.compare --algorithms=fed_avg,fed_df,fed_distillation
  python -m pipelines.compare --algorithms=fed_avg,fed_ntd --seeds=0,1 --alpha=0.05

Takes the flags of `pipelines.train`, too; an algorithm gets those that it knows. A seed
decides the split, the initial weights and who takes part in which round, so all
algorithms meet the same. One run a core at a time. Stopped and started again, it goes
on where it was. Leaves table.md, table.csv and curves.png, and each run's own folder.
"""

import csv
import json
import pathlib
import signal
import statistics
import sys
from typing import Any, NamedTuple, Optional

from absl import app
from absl import flags

import pipelines
from pipelines import parallel
from pipelines import train_flags
from tff_kd import algorithms

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
    "student; if unset, 95% of the best algorithm's mean accuracy.",
    lower_bound=0.0, upper_bound=1.0,
)
_JOBS = flags.DEFINE_integer(
    'jobs', None, 'Runs at a time; one a core if unset.', lower_bound=1
)
_DEFAULT_DIR = 'runs/compare'


class _Run(NamedTuple):
  algorithm: str
  seed: int
  folder: pathlib.Path

  @property
  def name(self) -> str:
    return f'{self.algorithm}, seed {self.seed}'


def _seeds() -> list[int]:
  try:
    seeds = [int(its) for its in _SEEDS.value]
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
      raise ValueError
  except ValueError:
    raise app.UsageError(
        '--seeds must be different numbers, 0 or more, such as 0,1,2; found '
        f'{",".join(_SEEDS.value)!r}.'
    ) from None
  return seeds


def _arguments() -> dict[str, list[str]]:
  """The training flags that each algorithm is given."""
  unknown = [its for its in _ALGORITHMS.value if its not in algorithms.REGISTRY]
  if unknown or not _ALGORITHMS.value:
    raise app.UsageError(
        f'--algorithms: {unknown} not among {", ".join(algorithms.REGISTRY)}.'
    )
  for name in sorted(_PER_RUN - {'output_dir'}):
    if flags.FLAGS[name].present:
      raise app.UsageError(f'--{name} is set for each run. Leave it out.')
  module = flags.FLAGS.flags_by_module_dict()[train_flags.__name__]
  given = [f for f in module if f.present and f.name not in _PER_RUN]
  found, used = {}, set()
  for name in _ALGORITHMS.value:
    its = algorithms.REGISTRY[name]
    taken = [f for f in given if train_flags.is_taken(its, f.name)]
    used |= {f.name for f in taken}
    found[name] = [f.serialize() for f in taken]
    if not flags.FLAGS['patience'].present:
      found[name].append('--patience=0')
  unused = [f'--{f.name}' for f in given if f.name not in used]
  if unused:
    raise app.UsageError(
        f'{", ".join(unused)} has no effect with any of {", ".join(found)}. Leave it '
        'out.'
    )
  return found


def _is_done(run: _Run) -> bool:
  return (run.folder / 'results.json').is_file()


def _job(run: _Run, arguments: list[str]) -> parallel.Job:
  """The training, or the rest of it."""
  command = [
      sys.executable, '-m', 'pipelines.train', f'--algorithm={run.algorithm}',
      f'--seed={run.seed}', f'--output_dir={run.folder}', '--nocompare_with_fed_avg',
      *arguments,
  ]
  return parallel.Job(run.name, command, run.folder.with_suffix('.log'))


def _check_same_problem(runs: list[_Run], arguments: dict[str, list[str]]) -> None:
  """Refuses a folder whose finished runs had other flags."""
  path = pathlib.Path(runs[0].folder.parent, 'compare.json')
  if path.is_file():
    before = json.loads(path.read_text())
    for name, its in arguments.items():
      if name in before and before[name] != its:
        raise app.UsageError(
            f'{path.parent} holds runs of {name} with {before[name]}, not with {its}. '
            'Go on with the same flags, or choose another --output_dir.'
        )
    arguments = before | arguments
  path.write_text(json.dumps(arguments, indent=2) + '\n')


def _train_all(runs: list[_Run], arguments: dict[str, list[str]]) -> list[str]:
  """Runs what is not done yet, so many at a time; returns what failed."""
  todo = {run.name: run for run in runs if not _is_done(run)}
  if len(todo) < len(runs):
    print(f'{len(runs) - len(todo)} of {len(runs)} runs are done already.')

  def line(job: parallel.Job, seconds: float) -> str:
    best = _results(todo[job.name])['best']
    return f"student {best['test/student_accuracy']:.3f}, {seconds:.0f} s"

  jobs = [_job(run, arguments[run.algorithm]) for run in todo.values()]
  return parallel.run_all(jobs, _JOBS.value, line)


def _results(run: _Run) -> dict[str, Any]:
  return json.loads((run.folder / 'results.json').read_text())


def _history(run: _Run) -> list[dict[str, float]]:
  with open(run.folder / 'metrics.csv', newline='') as file:
    return [
        {key: float(value) for key, value in row.items() if value}
        for row in csv.DictReader(file)
    ]


def _spread(values: list[float], digits: int) -> str:
  """Mean, and the standard deviation over the seeds where there are several."""
  if not values:
    return ''
  text = f'{statistics.mean(values):.{digits}f}'
  if len(values) > 1:
    text += f' ± {statistics.stdev(values):.{digits}f}'
  return text


def _rows(runs: list[_Run]) -> list[tuple[str, ...]]:
  """The table: one algorithm a row."""
  results = {run: _results(run) for run in runs}
  histories = {run: _history(run) for run in runs}
  by_algorithm = {}
  for run in runs:
    by_algorithm.setdefault(run.algorithm, []).append(run)

  def best(its: list[_Run], model: str) -> list[float]:
    key = f'test/{model}_accuracy'
    return [results[run]['best'][key] for run in its if key in results[run]['best']]

  target = _TARGET_ACCURACY.value
  if target is None:
    target = 0.95 * max(
        statistics.mean(best(its, 'student')) for its in by_algorithm.values()
    )
  rows = [(
      'algorithm', 'student', 'teacher', f'rounds to {target:.3f}',
      f'MB to {target:.3f}', 'MB a round', 's a round', 'seeds',
  )]
  for name, its in by_algorithm.items():
    reached, megabytes = [], []
    for run in its:
      first = next(
          (
              row['round'] for row in histories[run]
              if row['test/student_accuracy'] >= target
          ),
          None,
      )
      if first is not None:
        reached.append(first)
        megabytes.append(first * results[run]['bytes_per_round'] / 1e6)
    missed = f' ({len(reached)} of {len(its)})' if len(reached) < len(its) else ''
    seconds = [
        statistics.median(row['round_seconds'] for row in histories[run])
        for run in its
    ]
    rows.append((
        name, _spread(best(its, 'student'), 3), _spread(best(its, 'teacher'), 3),
        _spread(reached, 1) + missed, _spread(megabytes, 2) + missed,
        f"{results[its[0]]['bytes_per_round'] / 1e6:.3f}",
        f'{statistics.mean(seconds):.2f}', str(len(its)),
    ))
  return rows


def _report(runs: list[_Run], folder: pathlib.Path) -> None:
  from pipelines import plots
  from pipelines import tables

  rows = _rows(runs)
  with open(folder / 'table.csv', 'w', newline='') as file:
    csv.writer(file).writerows(rows)
  (folder / 'table.md').write_text(tables.markdown_table(rows))
  curves = {}
  for run in runs:
    history = _history(run)
    curves.setdefault(run.algorithm, []).append((
        [row['round'] for row in history],
        [row['round'] * _results(run)['bytes_per_round'] / 1e6 for row in history],
        [row['test/student_accuracy'] for row in history],
    ))
  plots.plot_comparison(curves, folder / 'curves.png')
  print()
  tables.print_table(rows)
  print(
      '\nTest accuracy in the round that is best by validation, mean ± standard '
      'deviation over the\nseeds; MB up and down per participating client; seconds '
      f'with {_JOBS.value or parallel.num_cores()} runs at a time.\n'
      f"{folder / 'table.md'}, {folder / 'table.csv'}, {folder / 'curves.png'}"
  )


def main(argv: list[str]) -> Optional[int]:
  if len(argv) > 1:
    raise app.UsageError(f'Not a flag: {argv[1:]}.')
  seeds, arguments = _seeds(), _arguments()
  folder = pathlib.Path(train_flags.OUTPUT_DIR.value or _DEFAULT_DIR)
  with parallel.only_user(folder):
    return _compare(folder, seeds, arguments)


def _compare(
    folder: pathlib.Path, seeds: list[int], arguments: dict[str, list[str]]
) -> int:
  """Trains what is missing, and reports; returns the exit status."""
  runs = [
      _Run(name, seed, folder / f'{name}-{seed}')
      for seed in seeds for name in arguments
  ]
  _check_same_problem(runs, arguments)
  # As Ctrl-C: the runs are stopped, too.
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  try:
    failed = _train_all(runs, arguments)
  except KeyboardInterrupt:
    print('Stopped. The same command goes on.', file=sys.stderr)
    return 130
  done = [run for run in runs if _is_done(run)]
  if done:
    _report(sorted(done, key=lambda run: _ALGORITHMS.value.index(run.algorithm)), folder)
  if failed:
    print(f'error: failed: {"; ".join(failed)}.', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  pipelines.run(main)
