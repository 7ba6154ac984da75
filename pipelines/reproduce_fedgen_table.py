r"""FedGen's Table 1 on full MNIST, with our implementations beside the paper's numbers.

  python -m pipelines.reproduce_fedgen_table --data_dir=/data/mnist

The setting of Zhu, Hong & Zhou, "Data-Free Knowledge Distillation for Heterogeneous
Federated Learning" (ICML 2021), section 5: 20 users, 10 a round, 200 rounds of 20 steps
of 32 examples, a small network with batch norm, Dirichlet over 15,000 training images.
--data_dir is a folder with MNIST's IDX files, plain or gzipped. One run a core at a time;
stopped and started again, it goes on. Leaves table.md, table.csv, table.json and each
run's results; other data need another --output_dir.

Tests on 'all' classes (the 10,000 test images) and, as the paper, on 'own classes' (every
user on test images of the classes that it has). At the end also on own classes with each
user's own batch-norm statistics, as the paper's code tests. 'last' is the accuracy after
the last round. What the paper's own plotting code prints is the mean over each run's five
best rounds by test accuracy, which the numbers in its table may be, too: 'best five' is
that, of the rounds that were tested.
"""

import json
import pathlib
import statistics
from typing import Any, NamedTuple

from absl import app
from absl import flags

import pipelines
from pipelines import parallel
from pipelines import run_folders
from pipelines import tables
from tff_kd import algorithms

# The paper's Table 1, MNIST, in percent, by algorithm and alpha.
PAPER = {
    'fed_avg': {0.05: 87.70, 0.1: 90.16, 1.0: 93.84},
    'fd': {0.05: 70.56, 0.1: 64.11, 1.0: 79.88},
    'fed_df': {0.05: 90.02, 0.1: 91.11, 1.0: 93.37},
    'fed_gen': {0.05: 91.30, 0.1: 93.03, 1.0: 95.52},
    'fed_distillation': {},
}

_DATA_DIR = flags.DEFINE_string('data_dir', None, "The folder with MNIST's IDX files.")
_OUTPUT_DIR = flags.DEFINE_string(
    'output_dir', 'runs/fedgen_table', 'Where the runs and the table are.'
)
_ALGORITHMS = flags.DEFINE_list('algorithms', list(PAPER), 'Which rows.')
_ALPHAS = flags.DEFINE_list('alphas', ['0.05', '0.1', '1'], 'Which columns.')
_SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'One run of each a seed.')
_ROUNDS = flags.DEFINE_integer('rounds', 200, 'Rounds of each run.', lower_bound=1)
_ROUNDS_PER_EVALUATION = flags.DEFINE_integer(
    'rounds_per_evaluation', 10, 'Rounds between two looks at the test images.',
    lower_bound=1,
)
_JOBS = flags.DEFINE_integer(
    'jobs', None, 'Runs at a time; one a core if unset.', lower_bound=1
)
# Given when the script calls itself for one run.
_ONLY = flags.DEFINE_string('only', None, 'One run, as algorithm:alpha:seed.')


class _Run(NamedTuple):
  algorithm: str
  alpha: float
  seed: int

  @property
  def name(self) -> str:
    return f'{self.algorithm}:{self.alpha:g}:{self.seed}'

  @property
  def folder(self) -> pathlib.Path:
    return pathlib.Path(_OUTPUT_DIR.value, self.name.replace(':', '-'))

  @property
  def results(self) -> pathlib.Path:
    return self.folder / f'results-{_ROUNDS.value}.json'


def _runs() -> list[_Run]:
  """Returns all runs, those of one seed and alpha together."""
  unknown = sorted(set(_ALGORITHMS.value) - set(PAPER))
  if unknown or not _ALGORITHMS.value:
    raise app.UsageError(f'--algorithms: {unknown} not among {", ".join(PAPER)}.')
  try:
    alphas, seeds = [float(a) for a in _ALPHAS.value], [int(s) for s in _SEEDS.value]
    if min(alphas, default=0) <= 0 or min(seeds, default=-1) < 0:
      raise ValueError
    if len(set(alphas)) < len(alphas) or len(set(seeds)) < len(seeds):
      raise ValueError
  except ValueError:
    raise app.UsageError(
        '--alphas must be different numbers above 0 and --seeds from 0, found '
        f'{",".join(_ALPHAS.value)!r} and {",".join(_SEEDS.value)!r}.'
    ) from None
  return [
      _Run(algorithm, alpha, seed)
      for seed in seeds for alpha in alphas for algorithm in _ALGORITHMS.value
  ]


def _cells(runs: list[_Run]) -> list[dict[str, Any]]:
  """Returns the cells of the table, in percent by seed."""
  found = {}
  for run in runs:
    if not run.results.is_file():
      continue
    results = json.loads(run.results.read_text())
    for key, value in results['last'].items():
      model, test = key.split('/')
      cell = found.setdefault((run.algorithm, model, test, run.alpha), {
          'algorithm': run.algorithm, 'model': model, 'test': test,
          'alpha': run.alpha, 'seeds': [], 'last': [], 'best five': [], 'paper': None,
      })
      tested = sorted(row[key] for row in results['curve'] if key in row)
      cell['seeds'].append(run.seed)
      cell['last'].append(100 * value)
      if tested:
        cell['best five'].append(100 * statistics.mean(tested[-5:]))
      if model == 'student' and test == 'own classes':
        cell['paper'] = PAPER[run.algorithm].get(run.alpha)
  return list(found.values())


def _spread(values: list[float], num_seeds: int) -> str:
  """Returns mean and standard deviation; the number of seeds, if some are missing."""
  text = tables.spread(values, 2)
  if len(values) < num_seeds:
    text += f' ({len(values)} of {num_seeds})'
  return text


def _label(algorithm: str, model: str) -> str:
  if model != 'student':
    return f'{algorithm}, {model}'
  if not algorithms.REGISTRY[algorithm].averages:
    return f"{algorithm}, users' own models"
  return algorithm


def _rows(cells: list[dict[str, Any]]) -> list[tuple[str, ...]]:
  """Returns the table, with the paper's numbers below the rows that they compare to."""
  alphas = sorted(float(alpha) for alpha in _ALPHAS.value)
  rows = [('algorithm', 'test', 'rounds', *(f'alpha {alpha:g}' for alpha in alphas))]
  lines = {}
  for cell in cells:
    line = lines.setdefault((cell['algorithm'], cell['model'], cell['test']), {})
    line[cell['alpha']] = cell
  for algorithm, model, test in sorted(
      lines, key=lambda line: (_ALGORITHMS.value.index(line[0]), line)
  ):
    line = lines[algorithm, model, test]
    for rounds in ('last', 'best five'):
      if not any(cell[rounds] for cell in line.values()):
        continue
      rows.append((
          _label(algorithm, model), test, rounds,
          *(
              _spread(line[alpha][rounds], len(_SEEDS.value)) if alpha in line else ''
              for alpha in alphas
          ),
      ))
    if any(cell['paper'] for cell in line.values()):
      paper = PAPER[algorithm]
      rows.append((
          f'{algorithm}, paper', test, '',
          *(f'{paper[alpha]:.2f}' if alpha in paper else '' for alpha in alphas),
      ))
  return rows


def _report(runs: list[_Run]) -> None:
  cells = _cells(runs)
  rows = _rows(cells)
  folder = pathlib.Path(_OUTPUT_DIR.value)
  tables.write_table(rows, folder)
  run_folders.write_json(folder / 'table.json', cells)
  print()
  tables.print_table(rows)
  print(
      f'\nTest accuracy in percent, {_ROUNDS.value} rounds, mean ± standard deviation '
      f'over the seeds.\n{folder / "table.md"}, {folder / "table.csv"}, '
      f'{folder / "table.json"}'
  )


@pipelines.for_users
def main(argv: list[str]) -> None:
  if not _DATA_DIR.value or not pathlib.Path(_DATA_DIR.value).is_dir():
    raise app.UsageError(
        "--data_dir must be a folder with MNIST's IDX files, found "
        f'{_DATA_DIR.value!r}.'
    )
  runs = _runs()
  if _ONLY.value:
    from pipelines import fedgen_table_job

    (run,) = [each for each in runs if each.name == _ONLY.value]
    fedgen_table_job.run(
        run.algorithm, run.alpha, run.seed, data_dir=pathlib.Path(_DATA_DIR.value),
        folder=run.folder, results=run.results, num_rounds=_ROUNDS.value,
        rounds_per_evaluation=_ROUNDS_PER_EVALUATION.value,
    )
    return
  with parallel.exclusive_lock(pathlib.Path(_OUTPUT_DIR.value)):
    _check_same_problem()
    _run_all(runs)


def _check_same_problem() -> None:
  """Refuses a folder whose runs had other data, or tests; notes this one's."""
  folder = pathlib.Path(_OUTPUT_DIR.value)
  path = folder / 'problem.json'
  # The path is the same wherever the script is called.
  problem = {
      _DATA_DIR.name: str(pathlib.Path(_DATA_DIR.value).resolve()),
      _ROUNDS_PER_EVALUATION.name: _ROUNDS_PER_EVALUATION.value,
  }
  # A run that ended before its first round may go on with other data.
  if path.is_file() and any(folder.glob('*/metrics.csv')):
    before = json.loads(path.read_text())
    for name, value in problem.items():
      if before[name] != value:
        raise app.UsageError(
            f'{folder} holds runs with --{name}={before[name]}, not {value}. Go on with '
            'the same, or choose another --output_dir.'
        )
  run_folders.write_json(path, problem)


def _run_all(runs: list[_Run]) -> None:
  """Runs what is missing, and reports.

  Raises:
    UserError: If a run has failed.
  """
  todo = {run.name: run for run in runs if not run.results.is_file()}
  if len(todo) < len(runs):
    print(f'{len(runs) - len(todo)} of {len(runs)} runs are done already.')
  jobs = []
  for run in todo.values():
    run.folder.mkdir(parents=True, exist_ok=True)
    arguments = [
        f'--only={run.name}',
        *(f'--{flag.name}={flag.value}' for flag in (
            _DATA_DIR, _OUTPUT_DIR, _ROUNDS, _ROUNDS_PER_EVALUATION,
        )),
        f'--algorithms={run.algorithm}', f'--alphas={run.alpha}', f'--seeds={run.seed}',
    ]
    jobs.append(
        parallel.script_job(
            run.name, 'reproduce_fedgen_table', arguments, run.folder / 'log'
        )
    )

  def line(job: parallel.Job, seconds: float) -> str:
    last = json.loads(todo[job.name].results.read_text())['last']
    found = ', '.join(f'{key} {value:.4f}' for key, value in sorted(last.items()))
    return f'{found}, {seconds:.0f} s'

  with parallel.stoppable():
    failed = parallel.run_all(jobs, _JOBS.value, line)
  if len(failed) < len(runs):
    _report(runs)
  if failed:
    raise pipelines.UserError(f'failed: {"; ".join(failed)}.')


if __name__ == '__main__':
  pipelines.run(main)
