"""Small models and data shared by the tests."""

import asyncio
import contextlib
import csv
import functools
import io
import os
import pathlib
import shutil
import subprocess
import sys

from absl import flags
from absl.testing import flagsaver
import keras
import numpy as np
import pytest
import scipy.special
import tensorflow as tf
from tests import warm_python
import tff_kd
from tff_kd import quiet
from tff_kd.compat import tff

ROOT = pathlib.Path(__file__).parent.parent
DIM, CLASSES = 5, 3
WARM = warm_python.client()
# What tests wait for so many seconds hangs: a busy machine takes many times longer.
HANGING_S = 1800.0
# Flags of a run of `pipelines.train` that begins soon and whose rounds take little.
TINY_RUN = (
    '--algorithm=fed_avg', '--num_clients=4', '--clients_per_round=2',
    '--client_epochs=1', '--alpha=1', '--transfer_size=60', '--transfer_labels=0',
    '--rounds_per_checkpoint=1',
)
# Flags of such a run of the fusion.
TINY_FUSION = (
    '--num_clients=4', '--clients_per_round=2', '--client_epochs=1', '--alpha=1',
    '--server_steps=2', '--back_steps=2', '--teacher=mlp_large',
    '--student=mlp_small',
    '--transfer_size=60', '--transfer_labels=20', '--rounds_per_checkpoint=1',
)


def dense_fn(units=(), classes=CLASSES, dim=DIM, **kwargs):
  """A builder of a dense model on [dim] inputs."""

  def build():
    layers = [keras.layers.InputLayer((dim,))]
    layers += [keras.layers.Dense(u, activation='relu') for u in units]
    layers += [keras.layers.Dense(classes, **kwargs)]
    return keras.Sequential(layers)

  return build


def features_fn(features, hidden=()):
  """A builder of a classifier with a hidden layer 'features', after others."""

  def build():
    return keras.Sequential([
        keras.layers.InputLayer((DIM,)),
        *[keras.layers.Dense(units) for units in hidden],
        keras.layers.Dense(features, activation='tanh', name='features'),
        keras.layers.Dense(CLASSES),
    ])

  return build


def softmax(z):
  """Returns the softmax over the last axis, in float64."""
  return scipy.special.softmax(np.asarray(z, np.float64), axis=-1)


def linear_logits(model, x):
  """Returns the logits of a linear model `[kernel, bias]`."""
  return x @ model[0] + model[1]


def linear_step(model, x, dz, rate):
  """Returns a linear model after a step of SGD with this gradient by the logits."""
  return [model[0] - rate * x.T @ dz, model[1] - rate * dz.sum(0)]


def linear_fit(model, x, y, rate):
  """Returns a linear model after a step of SGD on the cross-entropy with labels."""
  dz = softmax(linear_logits(model, x)) - np.eye(CLASSES)[y]
  return linear_step(model, x, dz / len(x), rate)


def linear_distil(model, x, target, rate):
  """Returns a linear model after a step of SGD on the cross-entropy with a target."""
  dz = softmax(linear_logits(model, x)) - target
  return linear_step(model, x, dz / len(x), rate)


def eager_step(loss, variables):
  """Returns the values of variables after a step of `sgd`, and the loss before it."""
  with tf.GradientTape() as tape:
    value = loss()
  gradients = tape.gradient(value, variables)
  return [v - 0.1 * g for v, g in zip(variables, gradients, strict=True)], value


def distil_once(process, weights, payload=()):
  """Returns the output of the server's distillation in round 0."""

  @tff.federated_computation(process.next.type_signature.parameter)
  def run(args):
    return process.next(*[args[i] for i in range(4)])

  return run(process.initialize(), weights, payload, np.int32(0))


def features_of(model, x):
  """Returns the features of a model of `features_fn` without other layers."""
  return np.tanh(x @ model[0] + model[1])


def features_step(model, x, y, rate, by_features=0.0):
  """Returns such a model after a step of SGD on the cross-entropy with labels.

  Args:
    model: The weights before the step.
    x: The inputs.
    y: The labels.
    rate: The learning rate.
    by_features: The gradient of a further loss by the features.
  """
  z = features_of(model, x)
  dlogits = (softmax(z @ model[2] + model[3]) - np.eye(CLASSES)[y]) / len(y)
  dz = (dlogits @ model[2].T + by_features) * (1 - z**2)
  gradient = [x.T @ dz, dz.sum(0), z.T @ dlogits, dlogits.sum(0)]
  return [w - rate * g for w, g in zip(model, gradient)]


def mean_payload(rule, logits, weights):
  """Returns the weighted mean of what clients with these logits send."""
  payloads = [rule.encode(tf.constant(z)) for z in logits]
  return tf.nest.map_structure(
      lambda *parts: sum(w * part for w, part in zip(weights, parts)) / sum(weights),
      *payloads,
  )


def examples(n, seed, dim=DIM):
  rng = np.random.default_rng(seed)
  return (
      rng.normal(size=(n, dim)).astype(np.float32),
      rng.integers(0, CLASSES, n).astype(np.int32),
  )


def dataset(x, y, batch_size=4):
  return tf.data.Dataset.from_tensor_slices((x, y)).batch(batch_size)


def is_allowed(*command):
  """Returns whether a program is there, and may do what it is called for."""
  return shutil.which(command[0]) is not None and (
      subprocess.run(command, capture_output=True).returncode == 0
  )


def run(coroutine):
  """Runs a coroutine; `asyncio.run` would take away the loop that TFF wants."""
  with contextlib.closing(asyncio.new_event_loop()) as loop:
    return loop.run_until_complete(coroutine)


def loss_fn():
  return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def loss_with(**kwargs):
  """Returns a builder as `loss_fn`, with other arguments of the loss."""
  arguments = {'from_logits': True, **kwargs}
  return lambda: keras.losses.SparseCategoricalCrossentropy(**arguments)


def metrics_fn():
  return [keras.metrics.SparseCategoricalAccuracy(name='accuracy')]


INPUT_SPEC = dataset(*examples(4, 0)).element_spec


def sgd(rate=0.1, momentum=None):
  return tff.learning.optimizers.build_sgdm(rate, momentum)


def common(**kwargs):
  """The arguments that every `build_*` takes."""
  defaults = dict(
      student_fn=dense_fn(),
      input_spec=INPUT_SPEC,
      loss_fn=loss_fn,
      metrics_fn=metrics_fn,
      client_optimizer=sgd(),
  )
  return {**defaults, **kwargs}


def build(name, **kwargs):
  """Builds the process of an algorithm of the registry, with `common` arguments."""
  return tff_kd.algorithms.REGISTRY[name].build(**common(**kwargs))


def build_with_parts(name, parts, **kwargs):
  """As `build`, with those of the further arguments that the builder takes.

  Args:
    name: The name of the algorithm.
    parts: Functions that make the further arguments, by parameter.
    **kwargs: Arguments that every builder takes.
  """
  taken = tff_kd.algorithms.REGISTRY[name].parameters
  return build(
      name, **kwargs, **{key: make() for key, make in parts.items() if key in taken}
  )


def model_spec(keras_model_fn=None, **kwargs):
  """Builds the spec of a classifier of `INPUT_SPEC`; a linear one if none is given."""
  if keras_model_fn is None:
    keras_model_fn = dense_fn()
  defaults = dict(input_spec=INPUT_SPEC, loss_fn=loss_fn)
  return tff_kd.models.build_model_spec(keras_model_fn, **{**defaults, **kwargs})


def task(part, **kwargs):
  """Returns a task all of whose parts have these examples, unless others are given."""
  parts = dict.fromkeys(('clients', 'transfer', 'validation', 'test'), part)
  defaults = dict(name='mine', num_classes=CLASSES, students={}, teachers={})
  return tff_kd.data.Task(**{**parts, **defaults, **kwargs})


def batches(clients, batch_size=4, **kwargs):
  """Writes clients' examples to files, and returns them in batches."""
  data = tff_kd.FileClientData.from_clients(clients)
  return tff_kd.ClientBatches(data=data, batch_size=batch_size, **kwargs)


def round_of(process, state, datasets, states):
  """Runs a round of clients that keep states, and returns its output.

  Args:
    process: A process whose clients keep states.
    state: The server's state.
    datasets: The dataset of each client of this round, by number.
    states: The state of each client, by number; those of this round are replaced.
  """
  output = process.next(state, list(datasets.values()), [states[k] for k in datasets])
  states.update(zip(datasets, output.client_states, strict=True))
  return output


def rounds(process, clients, num_rounds=2):
  """The last output of some rounds, and what the clients keep, if they do."""
  state, kept = process.initialize(), None
  if isinstance(process, tff_kd.StatefulClientsProcess):
    kept = [process.initialize_client()] * len(clients)
  for _ in range(num_rounds):
    if kept is None:
      output = process.next(state, clients)
    else:
      output = process.next(state, clients, kept)
      kept = output.client_states
    state = output.state
  return output, kept


def shared(build):
  """A builder that gives what it has built before for the same arguments.

  `build.anew` is the builder itself. What cannot be hashed is built anew, too. All are
  built from the same seed, whichever test is the first to ask.
  """

  @functools.wraps(build)
  def seeded(*args, **kwargs):
    keras.utils.set_random_seed(0)
    return build(*args, **kwargs)

  kept = functools.lru_cache(maxsize=32)(seeded)

  @functools.wraps(build)
  def call(*args, **kwargs):
    try:
      hash((args, tuple(kwargs.values())))
    except TypeError:
      return seeded(*args, **kwargs)
    return kept(*args, **kwargs)

  call.anew = seeded
  return call


@shared
def fed_avg():
  """FedAvg of a linear model on datasets, built once for all files of tests."""
  return tff_kd.algorithms.build_fed_avg(**common())


def slow(*values, **kwargs):
  """Values of a parametrized test that a shorter test covers in a run of minutes."""
  return pytest.param(*values, marks=pytest.mark.slow, **kwargs)


def slow_each(*values):
  """Each of several values, or tuples of values, as `slow` marks one."""
  return [slow(*its) if isinstance(its, tuple) else slow(its) for its in values]


def assert_weights_close(actual, expected, **kwargs):
  actual, expected = tf.nest.flatten(actual), tf.nest.flatten(expected)
  assert len(actual) == len(expected) > 0
  for a, e in zip(actual, expected):
    np.testing.assert_allclose(a, e, **kwargs)


def changed_fields(before, after):
  """Returns the names of the fields in which two states differ."""
  return {
      field
      for field, old, new in zip(before._fields, before, after, strict=True)
      if any(
          not np.array_equal(a, b)
          for a, b in zip(tf.nest.flatten(old), tf.nest.flatten(new), strict=True)
      )
  }


@contextlib.contextmanager
def flags_of(*args):
  """A script's flags in this process, as if it was called with these arguments."""
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(['test'])
  parsed = {}
  for arg in args:
    name, _, value = arg.removeprefix('--').partition('=')
    if name.startswith('no') and not value:
      name, value = name.removeprefix('no'), 'false'
    parsed[name] = value or 'true'
  with flagsaver.as_parsed(**parsed):
    yield


def _ended(command, status, cwd=ROOT, env=None):
  """Runs a program to its end, which must have this exit status."""
  done = subprocess.run(
      [str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True,
      timeout=HANGING_S, check=False,
  )
  assert done.returncode == status, done.stdout + done.stderr
  return done


def script(module, *args, status=0):
  """Runs `python -m module` to its end, in a warm Python, as a user would."""
  return _ended([WARM, '-m', module, *args], status)


def python(code, *args, cwd=ROOT, **environment):
  """Runs `python -c code` to its end, in a warm Python, with further variables."""
  return _ended([WARM, '-c', code, *args], 0, cwd, {**os.environ, **environment})


def new_python(code, status=0, **environment):
  """As `python`, in a Python without imports, which says by itself how much it logs."""
  kept = {k: v for k, v in os.environ.items() if k != quiet.LEVEL}
  return _ended([sys.executable, '-c', code], status, env={**kept, **environment})


@contextlib.contextmanager
def running(*python_args, python=sys.executable):
  """A Python script in the repository's root, to be sent signals; never left over.

  A test run that was itself started in the background ignores Ctrl-C, and what it
  starts would inherit that: `env` puts the default back.
  """
  script = subprocess.Popen(
      ['env', '--default-signal=INT', python, *python_args],
      cwd=ROOT,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )
  try:
    yield script
  finally:
    script.kill()
    script.communicate()


def train(*args):
  """Runs the script with its output in pipes; hangs if a worker keeps them."""
  return script('pipelines.train', *args)


def run_here(*args, status=0):
  """Runs `pipelines.train` in this process; returns what it printed, and to stderr."""
  from pipelines import train as script

  out, err = io.StringIO(), io.StringIO()
  with (
      flags_of(*args), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
  ):
    assert script.main(['train']) == status, err.getvalue()
  return out.getvalue(), err.getvalue()


def train_here(*args):
  """As `train`, in this process, which spares a start; returns what it printed."""
  return run_here(*args)[0]


def refused_here(*args):
  """Likewise, of a run that does not begin; returns why."""
  return run_here(*args, status=1)[1]


def write_rows(path, rows):
  """Writes a CSV file with the columns of the first row."""
  with open(path, 'w', newline='') as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)


def rows(path):
  """Returns the rows of a CSV file, as dicts of texts."""
  with open(path, newline='') as file:
    return list(csv.DictReader(file))
