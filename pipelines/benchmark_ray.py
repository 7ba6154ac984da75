r"""Measures rounds on Ray: the overhead, two nodes against one, many clients.

  python -m pipelines.benchmark_ray
  python -m pipelines.benchmark_ray --figures=overhead --cases=mlp-10x200 --rounds=21

Everything runs on this machine, with processes of Ray of its own. The figures:

  memory    `--clients` over `--examples` in rounds of `--clients_per_round`, two
            workers: after each round the seconds that it took, those that the script's
            threads were at work, the resident memory of each process and the size of
            the object store
  overhead  rounds with one worker and with two, beside rounds of the same computation
            in the script's process with as many clients at a time; in turns
  nodes     rounds on two nodes of Ray, each with all processes pinned to one core,
            beside rounds on one of the two; in turns

Rounds in turns must have equal results, to the bit; otherwise there is an error.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import csv
import os
import pathlib
import secrets
import statistics
import time
from typing import Any, Optional

from absl import app
from absl import flags

import pipelines
from pipelines import benchmark_work as work
from pipelines import run_folders
from pipelines import tables

_ALL = ['memory', 'overhead', 'nodes']
_FIGURES = flags.DEFINE_list(
    'figures', _ALL, f'What to measure, of {", ".join(_ALL)}.'
)
_CASES = flags.DEFINE_list(
    'cases', ['mlp-10x200', 'mlp-10x2000', 'mlp-16x200'],
    'MODEL-CLIENTSxEXAMPLES of the overhead. Ray is given eight clients at a time: ten '
    'are eight and two.',
)
_NODES_CASE = flags.DEFINE_string(
    'nodes_case', 'cnn-16x600', 'MODEL-CLIENTSxEXAMPLES on one node and on two.'
)
_ROUNDS = flags.DEFINE_integer(
    'rounds', 11, 'Rounds after the warm-up, of which the median counts.', lower_bound=3
)
_WARM_UP = flags.DEFINE_integer('warm_up', 2, 'Rounds before.', lower_bound=1)
_CLIENTS = flags.DEFINE_integer(
    'clients', 10_000, 'The number of clients whose rounds are watched.', lower_bound=1
)
_EXAMPLES = flags.DEFINE_integer(
    'examples', 100_000, 'The number of examples that they have in all.', lower_bound=1
)
_COHORT = flags.DEFINE_integer(
    'clients_per_round', 1000, 'How many of them a round has.', lower_bound=1
)
_WATCHED = flags.DEFINE_integer(
    'watched_rounds', 50, 'How many of their rounds are watched.', lower_bound=2
)
_SEED = flags.DEFINE_integer('seed', 0, 'The seed of the examples and the cohorts.')
_OUTPUT_DIR = flags.DEFINE_string(
    'output_dir', 'runs/benchmark_ray',
    'Where results.json, machines.csv and machines.png go.',
)

_START_S = 300.0
_OBJECT_STORE_BYTES = 2**30
_MIB = 2**20

# Contexts of TFF by name.
_Contexts = Mapping[str, Any]


@contextlib.contextmanager
def _on_ray(num_workers: int, **kwargs: Any) -> Iterator[Any]:
  """Yields a context of Ray once all its workers are ready."""
  import tff_kd

  with tff_kd.runtime.ray(
      num_workers=num_workers, start_timeout_s=_START_S, **kwargs
  ) as context:
    deadline = time.monotonic() + _START_S
    while len(context.workers()) < num_workers:
      if time.monotonic() > deadline:
        raise pipelines.UserError(
            f'{len(context.workers())} of {num_workers} workers of Ray started within '
            f'{_START_S:g} s. `ray status` and the logs in /tmp/ray say why.'
        )
      time.sleep(0.2)
    yield context


def _use_token() -> None:
  """Has Ray turn strangers away; before Ray is imported, which reads it then."""
  os.environ.setdefault('RAY_AUTH_MODE', 'token')
  os.environ.setdefault('RAY_AUTH_TOKEN', secrets.token_hex(32))


# Rounds in turns.


def _round_of(case: work.Case) -> Callable[[], Any]:
  """Returns what runs the first round of a case, each time it is called."""
  batches = case.batches()
  process = work.build_process(
      case, client_data=batches, input_spec=batches.element_spec
  )
  state = process.initialize()
  clients = list(range(case.num_clients))
  return lambda: process.next(state, clients)


def _in_turns(
    run_round: Callable[[], Any], contexts: _Contexts
) -> dict[str, dict[str, Any]]:
  """Runs a round in each context in turns; returns the seconds that they took.

  Raises:
    pipelines.UserError: If the results are not equal to the bit.
  """
  import numpy as np
  import tensorflow as tf
  import tff_kd

  expected: Optional[Sequence[bytes]] = None
  times: dict[str, list[float]] = {name: [] for name in contexts}
  stack = tff_kd.tff.framework.get_context_stack()
  for number in range(-_WARM_UP.value, _ROUNDS.value):
    for name, context in contexts.items():
      with stack.install(context):
        start = time.perf_counter()
        output = run_round()
        seconds = time.perf_counter() - start
      found = [np.asarray(each).tobytes() for each in tf.nest.flatten(output)]
      if expected is not None and found != expected:
        raise pipelines.UserError(f'{name} gives other results than the others.')
      expected = found
      if number >= 0:
        times[name].append(seconds)
  return {
      name: {'seconds': statistics.median(each), 'all_seconds': each}
      for name, each in times.items()
  }


def _measure_overhead(cases: Mapping[str, work.Case]) -> list[dict[str, Any]]:
  """Returns the seconds of rounds on Ray and in this process."""
  import tff_kd

  rounds = {}
  for name, case in cases.items():
    work.say(f'builds {name}')
    rounds[name] = _round_of(case)
  results = []
  for num_workers in (1, 2):
    here = tff_kd.runtime.InProcessContext(max_concurrent_clients=num_workers)
    work.say(f'starts Ray with {num_workers} workers')
    with _on_ray(num_workers) as context:
      for name, run_round in rounds.items():
        work.say(f'{name}, {num_workers} workers')
        found = _in_turns(run_round, {'here': here, 'ray': context})
        results.append({'case': name, 'workers': num_workers, **found})
  return results


@contextlib.contextmanager
def _pinned_nodes() -> Iterator[str]:
  """Starts two nodes of Ray, each on a core; yields the cluster's address."""
  from ray import cluster_utils

  cores = os.sched_getaffinity(0)
  if len(cores) < 2:
    raise pipelines.UserError('Two nodes need two cores, and here is one.')
  size: dict[str, Any] = dict(num_cpus=1, object_store_memory=_OBJECT_STORE_BYTES)
  # Child processes are pinned to the same cores as their parent.
  first, second = sorted(cores)[:2]
  try:
    os.sched_setaffinity(0, {first})
    cluster = cluster_utils.Cluster(
        initialize_head=True,
        head_node_args=dict(
            **size, include_dashboard=False, resources={'any': 1, 'first': 1}
        ),
    )
    os.sched_setaffinity(0, {second})
    cluster.add_node(**size, resources={'any': 1})
  finally:
    os.sched_setaffinity(0, cores)
  try:
    yield cluster.address
  finally:
    cluster.shutdown()


def _measure_nodes(case: work.Case) -> dict[str, Any]:
  """Returns the seconds of rounds on one pinned node and on two."""
  work.say('builds the case of the nodes')
  run_round = _round_of(case)
  work.say('starts two nodes of Ray')
  with _pinned_nodes() as address, contextlib.ExitStack() as stack:
    enter = lambda number, resource: stack.enter_context(
        _on_ray(number, address=address, resources={'CPU': 0.5, resource: 1})
    )
    contexts = {'one': enter(1, 'first'), 'two': enter(2, 'any')}
    work.say(f'{_NODES_CASE.value}, one node and two')
    found = _in_turns(run_round, contexts)
  ratio = found['two']['seconds'] / found['one']['seconds']
  return {'case': _NODES_CASE.value, 'ratio': ratio, **found}


# Memory over many rounds.


def _resident_mib(pid: int) -> float:
  """Returns the MiB of a process without the memory that it shares with others."""
  return work.mib(pid, 'RssAnon', 'RssFile')


def _object_store_mib(raylet: int) -> float:
  """Returns the MiB of the files in memory in which a raylet keeps objects."""
  sizes = {}
  for path in pathlib.Path(f'/proc/{raylet}/fd').iterdir():
    with contextlib.suppress(OSError):
      if os.readlink(path).startswith('/dev/shm/'):
        status = path.stat()
        sizes[status.st_ino] = 512 * status.st_blocks
  return sum(sizes.values()) / _MIB


def _processes(context: Any) -> dict[str, int]:
  """Returns the numbers of the processes of a run on this machine, by name."""
  import psutil

  workers = {f'worker {i}': info.pid for i, info in enumerate(context.workers(), 1)}
  ray = {
      process.name(): process.pid
      for process in psutil.Process().children(recursive=True)
      if process.name() in ('raylet', 'gcs_server')
  }
  return {'script': os.getpid(), **workers, **ray}


def _many_clients() -> Any:
  """Writes the examples of the clients that are watched; returns the batches."""
  import numpy as np
  import tff_kd

  rng = np.random.default_rng(_SEED.value)
  x = rng.random((_EXAMPLES.value, 784), np.float32)
  y = rng.integers(0, 10, _EXAMPLES.value).astype(np.int32)
  rows = np.array_split(np.arange(_EXAMPLES.value), _CLIENTS.value)
  return tff_kd.ClientBatches(
      data=tff_kd.FileClientData.from_arrays((x, y), rows),
      batch_size=work.BATCH, seed=_SEED.value,
  )


def _measure_memory() -> list[dict[str, float]]:
  """Runs rounds of many clients; returns the seconds and MiB of each."""
  import tff_kd

  work.say(f'writes {_EXAMPLES.value:,} examples of {_CLIENTS.value:,} clients')
  batches = _many_clients()
  case = work.Case('mlp', _COHORT.value, 0, _SEED.value)
  process = work.build_process(
      case, client_data=batches, input_spec=batches.element_spec
  )
  sample = tff_kd.simulation.Participation(
      num_clients=_CLIENTS.value, clients_per_round=_COHORT.value, seed=_SEED.value
  )
  rows = []
  work.say('starts Ray with two workers')
  with _on_ray(2) as context:
    pids = _processes(context)
    work.say(f'{_WATCHED.value} rounds of {_COHORT.value:,} clients')
    state = process.initialize()
    for number in range(1, _WATCHED.value + 1):
      clients = sample(number)
      start, cpu_start = time.perf_counter(), time.process_time()
      state = process.next(state, clients).state
      row = {
          'round': number,
          'seconds': time.perf_counter() - start,
          'script CPU seconds': time.process_time() - cpu_start,
      }
      row |= {f'{name} MiB': _resident_mib(pid) for name, pid in pids.items()}
      row['object store MiB'] = _object_store_mib(pids['raylet'])
      rows.append(row)
  return rows


# What is written and printed.


def _write_csv(rows: Sequence[Mapping[str, float]], path: pathlib.Path) -> None:
  with path.open('w', newline='') as file:
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    for row in rows:
      writer.writerow({
          name: value if name == 'round' else f'{value:.3f}'
          for name, value in row.items()
      })


def _draw(rows: Sequence[Mapping[str, float]], path: pathlib.Path) -> None:
  """Draws the seconds and the memory of each round."""
  from matplotlib import figure as figure_lib

  figure = figure_lib.Figure((8, 6), layout='constrained')
  upper, lower = figure.subplots(2, 1, sharex=True)
  rounds = [row['round'] for row in rows]
  for name, label in {'seconds': 'round', 'script CPU seconds': "script's CPU"}.items():
    upper.plot(rounds, [row[name] for row in rows], label=label)
  upper.set(ylabel='seconds', title='Time of each round')
  for name in rows[0]:
    if name.endswith(' MiB'):
      memory = [row[name] for row in rows]
      lower.plot(rounds, memory, label=name.removesuffix(' MiB'))
  lower.set(xlabel='round', ylabel='resident MiB', title='Memory after each round')
  for panel in (upper, lower):
    panel.set_ylim(bottom=0)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(alpha=0.3)
    panel.legend(loc='center left', bbox_to_anchor=(1.0, 0.5))
  figure.savefig(path)


def _print_results(results: Mapping[str, Any]) -> None:
  print(f"{results['cores']} cores; batch {work.BATCH}; medians of rounds in turns.")
  if 'overhead' in results:
    print('\nRounds on Ray beside the same rounds in the script:')
    tables.print_table([
        ('case', 'workers', 'here s', 'Ray s', 'overhead ms'),
        *(
            (
                found['case'], str(found['workers']), f"{found['here']['seconds']:.3f}",
                f"{found['ray']['seconds']:.3f}",
                f"{1e3 * (found['ray']['seconds'] - found['here']['seconds']):.0f}",
            )
            for found in results['overhead']
        ),
    ])
  if 'nodes' in results:
    found = results['nodes']
    print(
        f"\n{found['case']}: one node {found['one']['seconds']:.3f} s, two nodes "
        f"{found['two']['seconds']:.3f} s a round, ratio {found['ratio']:.2f}"
    )
  if 'memory' in results:
    _print_memory(results['memory'])


def _print_memory(rows: Sequence[Mapping[str, float]]) -> None:
  points = sorted({0, 1, len(rows) // 2, len(rows) - 1})
  print(f'\nRounds of {_COHORT.value:,} of {_CLIENTS.value:,} clients:')
  lines = [('round', *(f"{rows[i]['round']}" for i in points))]
  for name in rows[0]:
    digits = 2 if name.endswith('seconds') else 0
    if name != 'round':
      lines.append((name, *(f'{rows[i][name]:.{digits}f}' for i in points)))
  tables.print_table(lines)


@pipelines.for_users
def main(argv: list[str]) -> None:
  parse = lambda flag, text: work.parse_case(flag.name, text, _SEED.value)
  cases = {text: parse(_CASES, text) for text in _CASES.value}
  nodes_case = parse(_NODES_CASE, _NODES_CASE.value)
  if not _FIGURES.value or not set(_FIGURES.value) <= set(_ALL):
    raise app.UsageError(f'--figures must be some of {_ALL}, found {_FIGURES.value}.')
  if not _COHORT.value <= _CLIENTS.value <= _EXAMPLES.value:
    raise app.UsageError(
        '--clients_per_round must be at most --clients, and that at most --examples.'
    )
  _use_token()
  folder = pathlib.Path(_OUTPUT_DIR.value)
  folder.mkdir(parents=True, exist_ok=True)
  # Memory first: what the other figures leave in memory would be counted.
  results: dict[str, Any] = {'cores': len(os.sched_getaffinity(0))}
  if 'memory' in _FIGURES.value:
    results['memory'] = _measure_memory()
    _write_csv(results['memory'], folder / 'machines.csv')
    _draw(results['memory'], folder / 'machines.png')
  if 'overhead' in _FIGURES.value:
    results['overhead'] = _measure_overhead(cases)
  if 'nodes' in _FIGURES.value:
    results['nodes'] = _measure_nodes(nodes_case)
  run_folders.write_json(folder / 'results.json', results)
  _print_results(results)
  print(f'\n{folder}')


if __name__ == '__main__':
  pipelines.run(main)
