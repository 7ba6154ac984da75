r"""Times rounds against the arithmetic they consist of, and against others' rounds.

  python -m pipelines.benchmark
  python -m pipelines.benchmark --cases=cnn-10x600,fed_distillation-10x2000 --rounds=15
  python -m pipelines.benchmark --cases= --scaling= --long_rounds=1000 --long_clients=3,25

A case is MODEL-CLIENTSxEXAMPLES. Each side of it is a process of its own, with memory,
threads and a start of its own; they run a round in turns, and wait in between:

  floor   one compiled TensorFlow loop with all cores: exactly the gradient steps of all
          clients (and for `fed_distillation` the predictions on the transfer examples
          and the server's steps), the mean, nothing else
  TFF     `tff.learning.algorithms.build_weighted_fed_avg` as it ships, on the worker that
          it ships, of a model of Keras 2, which is all it takes, datasets in memory
  memory  ours with datasets in memory
  ours    ours with clients' data by reference: the default of `pipelines.train`
  pfl     Apple's pfl-research as it ships, where `import pfl` works; it keeps weights by
          their names, which differ only in Keras 2, so its model is one of that; its
          clients go through their examples in order
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import gc
import importlib
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple, Optional

from absl import app
from absl import flags

import pipelines
from pipelines import benchmark_work as work
from pipelines import run_folders
from pipelines import tables

_CASES = flags.DEFINE_list(
    'cases',
    [
        'mlp-10x100', 'mlp-10x200', 'mlp-10x600', 'mlp-10x2000', 'mlp-100x100',
        'mlp-100x600', 'mlp-100x2000', 'cnn-10x100', 'cnn-10x600',
        'cnn-10x2000', 'cnn-100x100', 'batch_norm-10x600', 'dropout-10x600',
        'subclassed-10x600', 'fed_distillation-10x2000',
    ],
    f'MODEL-CLIENTSxEXAMPLES, of the models {", ".join(work.MODELS)}.',
)
_SCALING = flags.DEFINE_list(
    'scaling', ['10', '100', '1000'],
    'Numbers of clients over the same 20,000 examples; empty for none.',
)
_ROUNDS = flags.DEFINE_integer(
    'rounds', 11, 'Rounds after the warm-up, of which the median counts.', lower_bound=3
)
_WARM_UP = flags.DEFINE_integer('warm_up', 2, 'Rounds before.', lower_bound=1)
_SECONDS = flags.DEFINE_float(
    'seconds', 60.0, 'After so many seconds a case stops at three rounds or more.'
)
_LONG = flags.DEFINE_integer(
    'long_rounds', 200, 'Rounds of the run that watches memory; 0 for none.',
    lower_bound=0,
)
_LONG_CLIENTS = flags.DEFINE_list(
    'long_clients', ['8', '10'],
    'LOW,HIGH: how many clients a round of that run has, drawn anew for each.',
)
_SEED = flags.DEFINE_integer(
    'seed', 0, 'The seed of the examples, the weights and the numbers of clients.'
)
_OUTPUT_DIR = flags.DEFINE_string(
    'output_dir', 'runs/benchmark', 'Where results.json and speed.png go.'
)
_CHILD = flags.DEFINE_string('child', None, 'Used between processes.')

_SCALING_EXAMPLES = 20_000
_LONG_EXAMPLES = 200
_LONG_POINTS = 10
_END_S = 30.0

# Runs a round with a number of clients.
_Round = Callable[[int], Any]


def _parse_scaling(number: str) -> int:
  if not number.isdecimal() or not 1 <= int(number) <= _SCALING_EXAMPLES:
    raise app.UsageError(
        f'--scaling: {number!r} is not a number of clients from 1 to '
        f'{_SCALING_EXAMPLES}.'
    )
  return int(number)


def _parse_long_clients(limits: Sequence[str]) -> tuple[int, int]:
  if all(number.isdecimal() for number in limits) and len(limits) == 2:
    low, high = map(int, limits)
    if 1 <= low <= high:
      return low, high
  raise app.UsageError(
      f'--long_clients: {",".join(limits)!r} is not LOW,HIGH, such as 3,25.'
  )


# What each side does, in its own process. `keras` is Keras 3's or Keras 2's.


def _local_training(model: Any, loss_fn: Callable[..., Any]) -> Callable[..., None]:
  """Returns a client's steps, on the model's variables in place."""
  import tensorflow as tf

  variables = [v.value for v in model.trainable_variables]

  def train(examples, all_labels):
    size = tf.shape(all_labels)[0]
    order = tf.random.shuffle(tf.range(size))
    for step in tf.range(size // work.BATCH):
      rows = order[step * work.BATCH : (step + 1) * work.BATCH]
      inputs, labels = tf.gather(examples, rows), tf.gather(all_labels, rows)
      with tf.GradientTape() as tape:
        loss = loss_fn(labels, model(inputs, training=True))
      for variable, gradient in zip(variables, tape.gradient(loss, variables)):
        variable.assign(variable - work.RATE * gradient)

  return train


def _distillation(learner: Any, inputs: Any) -> Callable[[Any], None]:
  """Returns the server's steps of a model towards targets, in place."""
  import keras
  import tensorflow as tf

  variables = [v.value for v in learner.trainable_variables]
  optimizer = keras.optimizers.Adam(work.SERVER_RATE)
  optimizer.build(learner.trainable_variables)

  def distil(targets):
    drawn = tf.range(work.SERVER_STEPS * work.SERVER_BATCH)
    order = tf.random.shuffle(drawn % work.TRANSFER)
    for step in tf.range(work.SERVER_STEPS):
      rows = order[step * work.SERVER_BATCH : (step + 1) * work.SERVER_BATCH]
      target = tf.nn.softmax(tf.gather(targets, rows))
      with tf.GradientTape() as tape:
        logits = learner(tf.gather(inputs, rows), training=True)
        loss = tf.reduce_mean(
            tf.nn.softmax_cross_entropy_with_logits(target, logits)
        )
      optimizer.apply(tape.gradient(loss, variables))

  return distil


def _floor(case: work.Case, stack: contextlib.ExitStack) -> Callable[[], _Round]:
  """Runs the arithmetic of a round and nothing else."""
  del stack
  import keras
  import numpy as np
  import tensorflow as tf

  xs, ys = (tf.constant(np.stack(part)) for part in zip(*case.examples()))
  public = tf.constant(case.transfer_examples())

  def build():
    model = work.build_model(keras, case.model, case.shape)
    model(tf.zeros((1, *case.shape)))
    variables = [v.value for v in model.trainable_variables]
    weights = [tf.Variable(v) for v in variables]
    train = _local_training(model, work.build_loss(keras))
    distills = case.model == 'fed_distillation'
    if distills:
      teacher = work.build_model(keras, 'teacher', case.shape)
      teach, refresh = _distillation(teacher, public), _distillation(model, public)

    @tf.function
    def run():
      totals = [tf.zeros_like(weight) for weight in weights]
      logits = tf.zeros([work.TRANSFER, 10])
      for client in tf.range(case.num_clients):
        for variable, weight in zip(variables, weights):
          variable.assign(weight)
        train(xs[client], ys[client])
        totals = [total + variable for total, variable in zip(totals, variables)]
        if distills:
          logits += model(public, training=False)
      for variable, total in zip(variables, totals):
        variable.assign(total / case.num_clients)
      if distills:
        teach(logits / case.num_clients)
        refresh(teacher(public, training=False))
      for variable, weight in zip(variables, weights):
        weight.assign(variable)

    return lambda num_clients: run()

  return build


def _datasets(case: work.Case) -> list[Any]:
  import tensorflow as tf

  datasets = [
      tf.data.Dataset.from_tensor_slices(part) for part in case.examples()
  ]
  return [each.shuffle(case.num_examples).batch(work.BATCH) for each in datasets]


def _rounds_of(process: Any, data: Sequence[Any]) -> _Round:
  """Initializes a process; each call of the result runs a round."""
  state = process.initialize()

  def one_round(num_clients: int) -> None:
    nonlocal state
    state = process.next(state, data[:num_clients]).state

  return one_round


def _tff(case: work.Case, stack: contextlib.ExitStack) -> Callable[[], _Round]:
  """Runs the rounds of TFF on the worker that it ships."""
  from tff_kd import tff
  from tff_kd import runtime
  import tf_keras

  data = _datasets(case)

  def model_fn():
    return tff.learning.models.from_keras_model(
        work.build_model(tf_keras, case.model, case.shape),
        loss=work.build_loss(tf_keras), input_spec=data[0].element_spec,
    )

  def build():
    stack.enter_context(runtime.tff_worker())
    process = tff.learning.algorithms.build_weighted_fed_avg(
        model_fn, client_optimizer_fn=tff.learning.optimizers.build_sgdm(work.RATE)
    )
    return _rounds_of(process, data)

  return build


def _memory(case: work.Case, stack: contextlib.ExitStack) -> Callable[[], _Round]:
  """Runs our rounds, with datasets in memory."""
  del stack
  data = _datasets(case)
  return lambda: _rounds_of(
      work.build_process(case, input_spec=data[0].element_spec), data
  )


def _ours(case: work.Case, stack: contextlib.ExitStack) -> Callable[[], _Round]:
  """Runs our rounds, with clients' data by reference."""
  del stack
  batches = case.batches()
  return lambda: _rounds_of(
      work.build_process(
          case, client_data=batches, input_spec=batches.element_spec
      ),
      list(range(case.num_clients)),
  )


def _pfl(case: work.Case, stack: contextlib.ExitStack) -> Callable[[], _Round]:
  """Runs the rounds of Apple's pfl-research, with TensorFlow."""
  del stack
  from pfl.aggregate import simulate
  from pfl.algorithm import base
  from pfl.algorithm import federated_averaging
  from pfl.data import federated_dataset
  from pfl.data import sampling
  from pfl.data import tensorflow as pfl_data
  from pfl.hyperparam import base as hyperparam
  from pfl.model import tensorflow as pfl_model
  import tensorflow as tf
  import tf_keras

  data = [
      pfl_data.TFTensorDataset(*map(tf.constant, arrays)) for arrays in case.examples()
  ]
  sampler = sampling.get_user_sampler('minimize_reuse', list(range(case.num_clients)))
  clients = federated_dataset.FederatedDataset(data.__getitem__, sampler)

  def build():
    keras_model = work.build_model(tf_keras, case.model, case.shape)
    sgd = tf_keras.optimizers.SGD
    keras_model.compile(optimizer=sgd(work.RATE), loss=work.build_loss(tf_keras))
    model = pfl_model.TFModel(keras_model, metrics={}, central_optimizer=sgd(1.0))
    backend = simulate.SimulatedBackend(clients, clients, [])
    algorithm = federated_averaging.FederatedAveraging()
    train = hyperparam.NNTrainHyperParams(
        local_batch_size=work.BATCH, local_num_epochs=1, local_learning_rate=work.RATE
    )
    number = 0

    def one_round(num_clients: int) -> None:
      nonlocal number
      number += 1
      # It continues after the rounds that it has run, up to this number in all.
      params = base.NNAlgorithmParams(
          central_num_iterations=number, evaluation_frequency=sys.maxsize,
          train_cohort_size=num_clients, val_cohort_size=None,
      )
      algorithm.run(params, backend, model, train, send_metrics_to_platform=False)

    return one_round

  return build


class _Side(NamedTuple):
  """One side of a case.

  Attributes:
    imports: The modules whose import is timed.
    prepare: Makes the data; returns a function that builds what runs rounds.
    models: The models that the side can train.
    environment: Environment variables of the side's process.
  """

  imports: Sequence[str]
  prepare: Callable[[work.Case, contextlib.ExitStack], Callable[[], _Round]]
  models: Sequence[str]
  environment: dict[str, str]


_OUR_IMPORTS = ['tff_kd.compat', 'tff_kd.algorithms', 'tff_kd.algorithms.fed_avg']
_SIDES = {
    'floor': _Side(['tensorflow', 'keras'], _floor, work.MODELS, {}),
    'tff': _Side(['tff_kd.compat', 'tf_keras'], _tff, work.MODELS[:-1], {}),
    'memory': _Side(_OUR_IMPORTS, _memory, work.MODELS, {}),
    'ours': _Side(_OUR_IMPORTS, _ours, work.MODELS, {}),
    'pfl': _Side(
        ['tf_keras', 'pfl.model.tensorflow', 'pfl.algorithm.federated_averaging'], _pfl,
        ['mlp', 'cnn'], {'TF_USE_LEGACY_KERAS': '1'},
    ),
}


def _peak_mib() -> float:
  """Returns the peak MiB of this process and of those that it has started."""
  import psutil

  pids = [child.pid for child in psutil.Process().children(recursive=True)]
  return sum(work.mib(pid, 'VmHWM') for pid in [os.getpid(), *pids])


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
  start = time.perf_counter()
  result = function()
  return result, time.perf_counter() - start


def _serve(name: str, case: work.Case, pipe: int) -> None:
  """Runs a round of a side for each line on stdin, and answers on a pipe."""
  os.set_inheritable(pipe, False)
  with os.fdopen(pipe, 'w') as answers, contextlib.ExitStack() as stack:
    answer = lambda **found: print(json.dumps(found), file=answers, flush=True)
    _, import_s = _timed(lambda: [*map(importlib.import_module, _SIDES[name].imports)])
    import tensorflow as tf

    tf.random.set_seed(case.seed)
    build = _SIDES[name].prepare(case, stack)
    gc.collect()
    # The peak does not count the making of the examples.
    with contextlib.suppress(OSError):
      pathlib.Path('/proc/self/clear_refs').write_text('5')
    one_round, build_s = _timed(build)
    answer(import_s=import_s, build_s=build_s)
    for line in sys.stdin:
      if line.strip() == 'end':
        answer(peak_mib=_peak_mib())
        return
      _, seconds = _timed(lambda: one_round(int(line)))
      answer(seconds=seconds, mib=work.mib(os.getpid(), 'VmRSS'))


# The parent.


class _Child:
  """A side in its own process.

  Attributes:
    found: The seconds to import, to build and of the first round; after `end`, the
      peak memory, too.
  """

  def __init__(self, name: str, case: work.Case):
    """Starts the process, and waits until it is ready for rounds."""
    self._name, self._case = name, case
    read, write = os.pipe()
    child = json.dumps([name, case, write])
    command = [sys.executable, '-m', 'pipelines.benchmark', f'--child={child}']
    self._log = tempfile.TemporaryFile('w+', errors='replace')
    try:
      self._process = subprocess.Popen(
          command, pass_fds=[write], text=True,
          stdin=subprocess.PIPE, stdout=self._log, stderr=self._log,
          env={**os.environ, **_SIDES[name].environment},
      )
    finally:
      os.close(write)
    self._answers = os.fdopen(read)
    try:
      self.found = self._answer()
    except BaseException:
      self.close()
      raise

  def _answer(self) -> dict[str, Any]:
    line = self._answers.readline()
    if line:
      return json.loads(line)
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._process.wait(_END_S)
    self._log.seek(0)
    raise pipelines.UserError(
        f'{self._name} of {self._case} has failed:\n{self._log.read()[-3000:]}'
    )

  def _ask(self, line: str) -> dict[str, Any]:
    with contextlib.suppress(BrokenPipeError):
      print(line, file=self._process.stdin, flush=True)
    return self._answer()

  def run_round(self, num_clients: Optional[int] = None) -> dict[str, float]:
    """Runs a round; returns its seconds, and the MiB afterwards."""
    answer = self._ask(str(num_clients or self._case.num_clients))
    self.found.setdefault('first_round_s', answer['seconds'])
    return answer

  def end(self) -> None:
    """Asks for the peak memory, after which the process ends."""
    self.found |= self._ask('end')

  def close(self) -> None:
    """Ends the process, whatever it is doing."""
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.close()  # This ends the process and its worker.
    try:
      self._process.wait(_END_S)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._answers.close()
    self._log.close()

  def __enter__(self) -> '_Child':
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()


def _measure_case(name: str, case: work.Case, sides: Sequence[str]) -> dict[str, Any]:
  """Returns the medians of all sides of a case, round by round in turns."""
  work.say(name)
  with contextlib.ExitStack() as stack:
    children = {
        side: stack.enter_context(_Child(side, case))
        for side in sides if case.model in _SIDES[side].models
    }
    times = {side: [] for side in children}
    start = time.perf_counter()
    for number in range(-_WARM_UP.value, _ROUNDS.value):
      if number >= 3 and time.perf_counter() - start > _SECONDS.value:
        break
      for side, child in children.items():
        seconds = child.run_round()['seconds']
        if number >= 0:
          times[side].append(seconds)
    for child in children.values():
      child.end()
    return {
        'case': name,
        'rounds': len(times['ours']),
        'seconds': {side: statistics.median(times[side]) for side in times},
        'all_seconds': times,
        'sides': {side: child.found for side, child in children.items()},
    }


def _measure_scaling(num_clients: int) -> dict[str, Any]:
  """Times our rounds over the same examples, whatever the number of clients."""
  work.say(f'{num_clients} clients')
  size = _SCALING_EXAMPLES // num_clients
  case = work.Case('mlp', num_clients, size, _SEED.value)
  with _Child('ours', case) as child:
    times = [
        child.run_round()['seconds'] for _ in range(_WARM_UP.value + _ROUNDS.value)
    ]
    child.end()
    seconds = statistics.median(times[_WARM_UP.value :])
    return {'clients': num_clients, 'seconds': seconds, **child.found}


def _measure_long(num_rounds: int, low: int, high: int) -> dict[str, Any]:
  """Returns the memory over many rounds with a changing number of clients."""
  work.say(f'{num_rounds} rounds')
  rng = random.Random(_SEED.value)
  points = {-(-i * num_rounds // _LONG_POINTS) for i in range(1, _LONG_POINTS + 1)}
  found: dict[str, list[Any]] = {'clients': [low, high], 'rounds': [], 'mib': []}
  case = work.Case('mlp', high, _LONG_EXAMPLES, _SEED.value)
  with _Child('ours', case) as child:
    for number in range(1, num_rounds + 1):
      answer = child.run_round(rng.randint(low, high))
      if number in points:
        found['rounds'].append(number)
        found['mib'].append(answer['mib'])
  return found


def _without_pfl() -> str:
  """Returns why there is no pfl; empty if there is."""
  side = _SIDES['pfl']
  done = subprocess.run(
      [sys.executable, '-c', f'import {", ".join(side.imports)}'],
      capture_output=True, text=True, env={**os.environ, **side.environment},
  )
  return done.stderr.strip().splitlines()[-1] if done.returncode else ''


def _case_rows(cases: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
  with_pfl = any('pfl' in found['seconds'] for found in cases)
  rows = [(
      'case', 'floor s', 'ours s', 'ours/floor', 'memory/floor', 'TFF/floor', 'TFF/ours',
      *(['pfl/ours'] if with_pfl else []), 'import s', 'build s', 'first s', 'ours MiB',
      'TFF MiB', 'rounds',
  )]
  for found in cases:
    seconds, sides = found['seconds'], found['sides']

    def ratio(side, other, digits=2):
      if side not in seconds:
        return ''
      return f'{seconds[side] / seconds[other]:.{digits}f}'

    rows.append((
        found['case'], f"{seconds['floor']:.3f}", f"{seconds['ours']:.3f}",
        ratio('ours', 'floor'), ratio('memory', 'floor'), ratio('tff', 'floor'),
        ratio('tff', 'ours', 1), *([ratio('pfl', 'ours', 1)] if with_pfl else []),
        f"{sides['ours']['import_s']:.1f}", f"{sides['ours']['build_s']:.1f}",
        f"{sides['ours']['first_round_s']:.1f}", f"{sides['ours']['peak_mib']:.0f}",
        f"{sides['tff']['peak_mib']:.0f}" if 'tff' in sides else '',
        str(found['rounds']),
    ))
  return rows


def _print_results(results: dict[str, Any]) -> None:
  print(f"{results['cores']} cores; batch {work.BATCH}; medians of rounds in turns.\n")
  if results['cases']:
    tables.print_table(_case_rows(results['cases']))
  if results['scaling']:
    print(f'\nThe same {_SCALING_EXAMPLES:,} examples over more clients (MLP, ours):')
    rows = [('clients', 's a round', 'ms a client', 'first s', 'peak MiB')]
    for found in results['scaling']:
      rows.append((
          f"{found['clients']}", f"{found['seconds']:.3f}",
          f"{1e3 * found['seconds'] / found['clients']:.2f}",
          f"{found['first_round_s']:.1f}", f"{found['peak_mib']:.0f}",
      ))
    tables.print_table(rows)
  if 'memory' in results:
    found = results['memory']
    low, high = found['clients']
    print(f'\nMemory over rounds of {low} to {high} clients (MLP, ours; MiB now):')
    tables.print_table([
        ('round', *map(str, found['rounds'])),
        ('MiB', *(f'{mib:.0f}' for mib in found['mib'])),
    ])


def _draw(results: Mapping[str, Any], path: pathlib.Path) -> None:
  """Draws rounds against the floor, and against the number of clients."""
  from matplotlib import figure as figure_lib

  figure = figure_lib.Figure((8, 7), layout='constrained')
  upper, lower = figure.subplots(2, 1, height_ratios=[2, 1])
  cases = results['cases']
  labels = {
      'tff': "TFF's FedAvg", 'pfl': 'pfl-research',
      'memory': 'tff_kd, datasets in memory', 'ours': 'tff_kd, data by reference',
  }
  sides = [side for side in labels if any(side in c['seconds'] for c in cases)]
  width = 0.84 / max(len(sides), 1)
  for number, side in enumerate(sides):
    shown = [
        (i, c['seconds'][side] / c['seconds']['floor'])
        for i, c in enumerate(cases) if side in c['seconds']
    ]
    offset = width * (number - (len(sides) - 1) / 2)
    bars = upper.bar(
        [i + offset for i, _ in shown], [r for _, r in shown], width, label=labels[side]
    )
    upper.bar_label(bars, fmt='%.1f', fontsize=7)
  upper.axhline(1.0, color='black', linewidth=0.8)
  upper.set(
      yscale='log', ylabel='time of a round / floor',
      title=f"Rounds against one compiled loop ({results['cores']} cores)",
  )
  upper.set_xticks(range(len(cases)), [c['case'] for c in cases], rotation=40, ha='right')
  if sides:
    figure.legend(loc='outside lower center', ncols=len(sides))
  scaling = results['scaling']
  lower.plot(
      [s['clients'] for s in scaling], [s['seconds'] for s in scaling], 'o-'
  )
  lower.set(
      xscale='log', xlabel='clients', ylabel='seconds a round',
      title='The same examples, more clients', ylim=(0, None),
  )
  lower.grid(alpha=0.3)
  figure.savefig(path)


@pipelines.for_users
def main(argv: list[str]) -> None:
  if _CHILD.value:
    name, case, pipe = json.loads(_CHILD.value)
    _serve(name, work.Case(*case), pipe)
    return
  cases = {
      case: work.parse_case(_CASES.name, case, _SEED.value) for case in _CASES.value
  }
  scaling = [_parse_scaling(number) for number in _SCALING.value]
  low, high = _parse_long_clients(_LONG_CLIENTS.value)
  folder = pathlib.Path(_OUTPUT_DIR.value)
  folder.mkdir(parents=True, exist_ok=True)
  sides = list(_SIDES)
  if any(case.model in _SIDES['pfl'].models for case in cases.values()):
    reason = _without_pfl()
    if reason:
      print(f'Without pfl: {reason}', file=sys.stderr)
      sides.remove('pfl')
  results: dict[str, Any] = {'cores': len(os.sched_getaffinity(0))}
  results['cases'] = [
      _measure_case(name, case, sides) for name, case in cases.items()
  ]
  results['scaling'] = [_measure_scaling(number) for number in scaling]
  if _LONG.value:
    results['memory'] = _measure_long(_LONG.value, low, high)
  run_folders.write_json(folder / 'results.json', results)
  _draw(results, folder / 'speed.png')
  _print_results(results)
  print(f"\n{folder / 'results.json'}, {folder / 'speed.png'}")


if __name__ == '__main__':
  pipelines.run(main)
