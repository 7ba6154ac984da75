r"""Times rounds against the arithmetic they consist of, and against TFF's own.

  python -m pipelines.benchmark
  python -m pipelines.benchmark --cases=cnn-10x600,fusion-10x2000 --rounds=15

A case is MODEL-CLIENTSxEXAMPLES. In each, in one process and in turns, round by round:

  floor   one compiled TensorFlow loop in this process, with all its cores: exactly the
          gradient steps of all clients (and for `fusion` the predictions on the
          transfer examples and the server's steps), the mean, nothing else
  TFF     `tff.learning.algorithms.build_weighted_fed_avg` as it ships, on its default
          runtime's worker, with datasets in memory
  memory  ours with datasets in memory
  ours    ours with clients' data by reference: the default of `pipelines.train`

Each case has a process of its own, so that memory and start-up are its own.
"""

import gc
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any, Optional

from absl import app
from absl import flags

import pipelines

_MODELS = ['mlp', 'cnn', 'batch_norm', 'dropout', 'subclassed', 'fusion']
_CASES = flags.DEFINE_list(
    'cases',
    [
        'mlp-10x100', 'mlp-10x200', 'mlp-10x600', 'mlp-10x2000', 'mlp-100x100',
        'mlp-100x600', 'mlp-100x2000', 'cnn-10x100', 'cnn-10x600',
        'cnn-10x2000', 'cnn-100x100', 'batch_norm-10x600', 'dropout-10x600',
        'subclassed-10x600', 'fusion-10x2000',
    ],
    f'MODEL-CLIENTSxEXAMPLES, of the models {", ".join(_MODELS)}.',
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
_SEED = flags.DEFINE_integer('seed', 0, 'Of the examples and the weights.')
_OUTPUT_DIR = flags.DEFINE_string(
    'output_dir', 'runs/benchmark', 'Where results.json and speed.png go.'
)
_CHILD = flags.DEFINE_string('child', None, 'Used between processes.')

_BATCH = 20
_RATE = 0.1
_SCALING_EXAMPLES = 20_000
_TRANSFER = 1000
_SERVER_STEPS, _SERVER_BATCH, _SERVER_RATE = 50, 64, 1e-3


def _parse(case: str) -> tuple[str, int, int]:
  try:
    model, size = case.split('-')
    clients, examples = map(int, size.split('x'))
    if model not in _MODELS or clients < 1 or examples < 1 or examples % _BATCH:
      raise ValueError
  except ValueError:
    raise app.UsageError(
        f'--cases: {case!r} is not MODEL-CLIENTSxEXAMPLES, with a model of '
        f'{_MODELS} and a multiple of {_BATCH} examples, such as mlp-10x200.'
    ) from None
  return model, clients, examples


class _Sides:
  """One case: its data and the functions that run a round of each side."""

  def __init__(self, model: str, num_clients: int, num_examples: int):
    started = time.perf_counter()
    import keras
    import numpy as np
    import tensorflow as tf
    from tff_kd.compat import tff
    import tff_kd
    # The package's modules load when they are used.
    tff_kd.algorithms.build_fed_avg, tff_kd.simulation.local_runtime  # noqa: B018
    self.seconds = {'import': time.perf_counter() - started}
    keras.utils.set_random_seed(_SEED.value)
    self.num_clients, self.num_examples = num_clients, num_examples
    self.shape = (28, 28, 1) if model == 'cnn' else (784,)
    rng = np.random.default_rng(_SEED.value)
    self.x = rng.random((num_clients, num_examples, *self.shape), np.float32)
    self.y = rng.integers(0, 10, (num_clients, num_examples)).astype(np.int32)
    self.public = rng.random((_TRANSFER, *self.shape), np.float32)
    self.student_fn = _model_fns(tf, self.shape)[model]
    self.teacher_fn = _model_fns(tf, self.shape)['teacher']
    self.fusion = model == 'fusion'
    self.tff = tff
    self._tf, self._kd = tf, tff_kd

  def loss_fn(self):
    return self._keras.losses.SparseCategoricalCrossentropy(from_logits=True)

  def optimizer(self):
    return self.tff.learning.optimizers.build_sgdm(_RATE)

  def batches(self):
    data = self._kd.FileClientData.from_clients(list(zip(self.x, self.y)))
    return self._kd.ClientBatches(
        data=data, batch_size=_BATCH, seed=_SEED.value
    )

  def datasets(self):
    return [
        self._tf.data.Dataset.from_tensor_slices(its)
        .shuffle(self.num_examples).batch(_BATCH)
        for its in zip(self.x, self.y)
    ]

  def floor(self):
    """Returns a function that runs the round's arithmetic and nothing else."""
    tf = self._tf
    model, loss_fn = self.student_fn(), self.loss_fn()
    model(tf.zeros((1, *self.shape)))
    xs, ys = tf.constant(self.x), tf.constant(self.y)
    weights = [tf.Variable(v) for v in model.trainable_variables]
    public = tf.constant(self.public)
    teacher = self.teacher_fn() if self.fusion else None
    num_clients, num_examples = self.num_clients, self.num_examples
    variables = model.trainable_variables

    def distil(learner, targets, optimizer):
      order = tf.random.shuffle(tf.range(_SERVER_STEPS * _SERVER_BATCH) % _TRANSFER)
      for step in tf.range(_SERVER_STEPS):
        rows = order[step * _SERVER_BATCH : (step + 1) * _SERVER_BATCH]
        inputs, target = tf.gather(public, rows), tf.gather(targets, rows)
        with tf.GradientTape() as tape:
          loss = tf.reduce_mean(
              tf.nn.softmax_cross_entropy_with_logits(
                  tf.nn.softmax(target), learner(inputs, training=True)
              )
          )
        gradients = tape.gradient(loss, learner.trainable_variables)
        optimizer.apply_gradients(zip(gradients, learner.trainable_variables))

    if self.fusion:
      adams = {
          name: keras.optimizers.Adam(_SERVER_RATE, jit_compile=False)
          for name in ('teacher', 'student')
      }
      adams['teacher'].build(teacher.trainable_variables)
      adams['student'].build(variables)

    @tf.function
    def run():
      totals = [tf.zeros_like(w) for w in weights]
      logits = tf.zeros([_TRANSFER, 10])
      for client in tf.range(num_clients):
        for variable, weight in zip(variables, weights):
          variable.assign(weight)
        order = tf.random.shuffle(tf.range(num_examples))
        for step in tf.range(num_examples // _BATCH):
          rows = order[step * _BATCH : (step + 1) * _BATCH]
          inputs, labels = tf.gather(xs[client], rows), tf.gather(ys[client], rows)
          with tf.GradientTape() as tape:
            loss = loss_fn(labels, model(inputs, training=True))
          for variable, gradient in zip(
              variables, tape.gradient(loss, variables)
          ):
            variable.assign_sub(_RATE * gradient)
        totals = [total + v for total, v in zip(totals, variables)]
        if self.fusion:
          logits += model(public, training=False)
      for variable, weight, total in zip(variables, weights, totals):
        weight.assign(total / num_clients)
        variable.assign(weight)
      if self.fusion:
        distil(teacher, logits / num_clients, adams['teacher'])
        distil(model, teacher(public, training=False), adams['student'])
        for variable, weight in zip(variables, weights):
          weight.assign(variable)

    # Traced before TFF traces anything: its graphs turn Keras's classes into those of
    # TensorFlow 1, which a model made before then does not fit.
    run()
    return run

  def ours(self, by_reference: bool):
    """Returns the process and a round's client data."""
    if by_reference:
      batches = self.batches()
      kwargs = dict(client_data=batches, input_spec=batches.element_spec)
      data = list(range(self.num_clients))
    else:
      data = self.datasets()
      kwargs = dict(input_spec=data[0].element_spec)
    kwargs |= dict(
        student_fn=self.student_fn, loss_fn=self.loss_fn,
        client_optimizer=self.optimizer(),
    )
    if not self.fusion:
      return self._kd.algorithms.build_fed_avg(**kwargs), data
    adam = self.tff.learning.optimizers.build_adam(_SERVER_RATE)
    distillation = self._kd.Distillation(
        num_steps=_SERVER_STEPS, batch_size=_SERVER_BATCH
    )
    process = self._kd.algorithms.build_fed_distillation(
        **kwargs,
        teacher_fn=self.teacher_fn,
        transfer_set=self._kd.TransferSet(self.public),
        teacher_optimizer=adam,
        student_optimizer=adam,
        distillation=distillation,
        back_distillation=self._kd.Distillation(
            target='teacher', num_steps=_SERVER_STEPS, batch_size=_SERVER_BATCH
        ),
    )
    return process, data

  def tff_fed_avg(self):
    """Returns TFF's process and a round's datasets."""
    data = self.datasets()

    def model_fn():
      return self.tff.learning.models.from_keras_model(
          self.student_fn(), loss=self.loss_fn(), input_spec=data[0].element_spec
      )

    process = self.tff.learning.algorithms.build_weighted_fed_avg(
        model_fn, client_optimizer_fn=self.optimizer()
    )
    return process, data


def _model_fns(tf, shape) -> dict[str, Any]:
  """Builders by name; `teacher` is the fusion's."""
  layers = keras.layers

  def dense(units, *between):
    def build():
      model = [layers.InputLayer(shape)]
      for u in units:
        model.append(layers.Dense(u, activation='relu'))
        model += [make() for make in between]
      return keras.Sequential([*model, layers.Dense(10)])

    return build

  def cnn():
    return keras.Sequential([
        layers.InputLayer(shape),
        layers.Conv2D(32, 3, activation='relu'), layers.MaxPool2D(),
        layers.Conv2D(64, 3, activation='relu'), layers.MaxPool2D(),
        layers.Flatten(), layers.Dense(10),
    ])

  class Subclassed(keras.Model):

    def __init__(self):
      super().__init__()
      self.hidden = [layers.Dense(200, activation='relu') for _ in range(2)]
      self.head = layers.Dense(10)

    def call(self, inputs):
      for layer in self.hidden:
        inputs = layer(inputs)
      return self.head(inputs)

  return {
      'mlp': dense((200, 200)),
      'fusion': dense((200, 200)),
      'teacher': dense((400, 400)),
      'batch_norm': dense((200, 200), layers.BatchNormalization),
      'dropout': dense((200, 200), lambda: layers.Dropout(0.2)),
      'subclassed': Subclassed,
      'cnn': cnn,
  }


def _memory(pid: int, field: str) -> float:
  """MiB of a process: VmHWM, the most it had, or VmRSS, what it has."""
  for line in pathlib.Path(f'/proc/{pid}/status').read_text().splitlines():
    if line.startswith(field):
      return int(line.split()[1]) / 1024
  raise RuntimeError(f'No {field} of process {pid}.')


def _timed(function) -> tuple[Any, float]:
  start = time.perf_counter()
  result = function()
  return result, time.perf_counter() - start


class _Rounds:
  """A process in training: each call runs a round."""

  def __init__(self, built):
    self._process, self._data = built
    self._state = self._process.initialize()

  def __call__(self):
    self._state = self._process.next(self._state, self._data).state


def _measure_case(case: str) -> dict[str, Any]:
  """The medians of all sides of a case, round by round in turns."""
  sides = _Sides(*_parse(case))
  from tff_kd.simulation import runtime

  found = {'case': case, **{f'{k}_s': v for k, v in sides.seconds.items()}}
  install = sides.tff.framework.get_context_stack().install
  run = {'floor': sides.floor()}
  contexts = {}
  if not sides.fusion:
    # TFF's own local runtime, with its defaults and a worker of its own.
    contexts['tff'] = (
        sides.tff.backends.native.create_sync_local_cpp_execution_context()
    )
    with install(contexts['tff']):
      run['tff'] = _Rounds(sides.tff_fed_avg())
  opened, found['worker_start_s'] = _timed(
      lambda: _entered(runtime.local_runtime())
  )
  context, worker = opened
  ours = sides.tff.framework.get_context_stack().current
  try:
    for name, by_reference in (('memory', False), ('ours', True)):
      built, found['build_s'] = _timed(lambda b=by_reference: sides.ours(b))
      run[name], _ = _timed(lambda its=built: _Rounds(its))
    times = {name: [] for name in run}
    start = time.perf_counter()
    for number in range(_WARM_UP.value + _ROUNDS.value):
      done = number - _WARM_UP.value
      if done >= 3 and time.perf_counter() - start > _SECONDS.value:
        break
      for name, one_round in run.items():
        with install(contexts.get(name, ours)):
          sent, received = worker.traffic.bytes_sent, worker.traffic.bytes_received
          _, seconds = _timed(one_round)
        if name == 'ours':
          found['sent'] = worker.traffic.bytes_sent - sent
          found['received'] = worker.traffic.bytes_received - received
          if number == 0:
            found['first_round_s'] = seconds
        if done >= 0:
          times[name].append(seconds)
    found['rounds'] = len(times['ours'])
    found['seconds'] = {n: statistics.median(t) for n, t in times.items()}
    found['all_seconds'] = times
    # The script's includes the other sides; the worker is ours alone.
    found['script_peak_mib'] = _memory(os.getpid(), 'VmHWM')
    found['worker_peak_mib'] = _memory(worker.process.pid, 'VmHWM')
  finally:
    context.__exit__(None, None, None)
    # TFF ends the worker of its context when that is collected.
    run.clear()
    contexts.clear()
    gc.collect()
  return found


def _entered(context):
  return context, context.__enter__()


def _measure_scaling(num_clients: int) -> dict[str, Any]:
  """Ours alone, over the same examples whatever the number of clients."""
  sides = _Sides('mlp', num_clients, _SCALING_EXAMPLES // num_clients)
  from tff_kd.simulation import runtime

  with runtime.local_runtime() as worker:
    built, build_s = _timed(lambda: sides.ours(True))
    one_round = _Rounds(built)
    sides.x = sides.y = None  # They are in files now.
    _, first_s = _timed(one_round)
    times = [_timed(one_round)[1] for _ in range(_WARM_UP.value + _ROUNDS.value)]
    return {
        'clients': num_clients,
        'seconds': statistics.median(times[_WARM_UP.value :]),
        'build_s': build_s,
        'first_round_s': first_s,
        'script_peak_mib': _memory(os.getpid(), 'VmHWM'),
        'worker_peak_mib': _memory(worker.process.pid, 'VmHWM'),
    }


def _measure_long(num_rounds: int) -> dict[str, Any]:
  """Memory over many rounds, with a number of clients that changes."""
  sides = _Sides('mlp', 10, 200)
  from tff_kd.simulation import runtime

  with runtime.local_runtime() as worker:
    process, _ = sides.ours(True)
    state = process.initialize()
    found = {'rounds': [], 'script_mib': [], 'worker_mib': []}
    for number in range(1, num_rounds + 1):
      state = process.next(state, list(range(8 + number % 3))).state
      if number % max(1, num_rounds // 10) == 0:
        found['rounds'].append(number)
        found['script_mib'].append(_memory(os.getpid(), 'VmRSS'))
        found['worker_mib'].append(_memory(worker.process.pid, 'VmRSS'))
    return found


def _in_child(kind: str, argument: Any) -> dict[str, Any]:
  """Runs one measurement in a process of its own."""
  print(f'  {kind} {argument} ...', file=sys.stderr, flush=True)
  path = pathlib.Path(_OUTPUT_DIR.value, f'.{os.getpid()}.json')
  command = [
      sys.executable, '-m', 'pipelines.benchmark',
      '--child=' + json.dumps([kind, argument, str(path)]),
  ]
  for flag in (_ROUNDS, _WARM_UP, _SECONDS, _SEED):
    command.append(f'--{flag.name}={flag.value}')
  try:
    done = subprocess.run(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
      raise RuntimeError(f'{kind} {argument} failed:\n{done.stderr[-3000:]}')
    return json.loads(path.read_text())
  finally:
    path.unlink(missing_ok=True)


def _run_child(kind: str, argument: Any, path: str) -> None:
  measure = {
      'case': _measure_case, 'scaling': _measure_scaling, 'memory': _measure_long
  }[kind]
  pathlib.Path(path).write_text(json.dumps(measure(argument)))


def _case_rows(cases: list[dict[str, Any]]) -> list[tuple[str, ...]]:
  rows = [(
      'case', 'floor s', 'ours s', 'ours/floor', 'memory/floor', 'TFF/floor',
      'TFF/ours', 'KB sent', 'KB back', 'import s', 'worker s', 'build s',
      'first s', 'script MiB', 'worker MiB', 'rounds',
  )]
  for its in cases:
    s = its['seconds']
    ratio = {name: t / s['floor'] for name, t in s.items()}
    rows.append((
        its['case'], f"{s['floor']:.3f}", f"{s['ours']:.3f}",
        f"{ratio['ours']:.2f}", f"{ratio['memory']:.2f}",
        f"{ratio['tff']:.2f}" if 'tff' in s else '',
        f"{s['tff'] / s['ours']:.1f}" if 'tff' in s else '',
        f"{its['sent'] / 1e3:.0f}", f"{its['received'] / 1e3:.0f}",
        f"{its['import_s']:.1f}", f"{its['worker_start_s']:.1f}",
        f"{its['build_s']:.1f}", f"{its['first_round_s']:.1f}",
        f"{its['script_peak_mib']:.0f}", f"{its['worker_peak_mib']:.0f}",
        str(its['rounds']),
    ))
  return rows


def main(argv: list[str]) -> Optional[int]:
  if len(argv) > 1:
    raise app.UsageError(f'Not a flag: {argv[1:]}.')
  if _CHILD.value:
    _run_child(*json.loads(_CHILD.value))
    return 0
  for case in _CASES.value:
    _parse(case)
  from pipelines import plots
  from pipelines import tables

  folder = pathlib.Path(_OUTPUT_DIR.value)
  folder.mkdir(parents=True, exist_ok=True)
  results = {'cores': len(os.sched_getaffinity(0))}
  results['cases'] = [_in_child('case', case) for case in _CASES.value]
  results['scaling'] = [_in_child('scaling', int(n)) for n in _SCALING.value]
  if _LONG.value:
    results['memory'] = _in_child('memory', _LONG.value)
  (folder / 'results.json').write_text(json.dumps(results, indent=1) + '\n')
  plots.plot_speed(results, folder / 'speed.png')

  print(f"{results['cores']} cores; batch {_BATCH}; medians of rounds in turns.\n")
  if results['cases']:
    tables.print_table(_case_rows(results['cases']))
  if results['scaling']:
    print(f'\nThe same {_SCALING_EXAMPLES:,} examples over more clients (MLP, ours):')
    tables.print_table([
        ('clients', 's a round', 'ms a client', 'script peak MiB', 'worker peak MiB'),
        *(
            (
                f"{its['clients']}", f"{its['seconds']:.3f}",
                f"{1e3 * its['seconds'] / its['clients']:.2f}",
                f"{its['script_peak_mib']:.0f}", f"{its['worker_peak_mib']:.0f}",
            )
            for its in results['scaling']
        ),
    ])
  if _LONG.value:
    print('\nMemory over rounds, 8 to 10 clients in turn (MiB now):')
    its = results['memory']
    tables.print_table([
        ('round', *map(str, its['rounds'])),
        ('script', *(f'{m:.0f}' for m in its['script_mib'])),
        ('worker', *(f'{m:.0f}' for m in its['worker_mib'])),
    ])
  print(f"\n{folder / 'results.json'}, {folder / 'speed.png'}")
  return 0


if __name__ == '__main__':
  pipelines.run(main)
