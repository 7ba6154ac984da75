"""The rounds that the benchmarks measure: models, examples, processes of tff_kd."""

from collections.abc import Iterator
import pathlib
from typing import Any, NamedTuple

from absl import app

import pipelines

MODELS = ['mlp', 'cnn', 'batch_norm', 'dropout', 'subclassed', 'fed_distillation']
BATCH = 20
RATE = 0.1
TRANSFER = 1000
SERVER_STEPS, SERVER_BATCH, SERVER_RATE = 50, 64, 1e-3


class Case(NamedTuple):
  """The work of a round.

  Attributes:
    model: One of `MODELS`.
    num_clients: The number of clients.
    num_examples: The number of examples of each.
    seed: The seed of the examples.
  """

  model: str
  num_clients: int
  num_examples: int
  seed: int = 0

  @property
  def shape(self) -> tuple[int, ...]:
    """Returns the shape of an example."""
    return (28, 28, 1) if self.model == 'cnn' else (784,)

  def examples(self) -> Iterator[tuple[Any, Any]]:
    """Draws each client's examples and labels."""
    import numpy as np

    for client in range(self.num_clients):
      rng = np.random.default_rng((self.seed, client))
      x = rng.random((self.num_examples, *self.shape), np.float32)
      yield x, rng.integers(0, 10, self.num_examples).astype(np.int32)

  def batches(self) -> Any:
    """Writes each client's examples into files; returns the `ClientBatches`."""
    import tff_kd

    return tff_kd.ClientBatches(
        data=tff_kd.FileClientData.from_clients(list(self.examples())),
        batch_size=BATCH, seed=self.seed,
    )

  def transfer_examples(self) -> Any:
    """Draws the inputs of the server's transfer set."""
    import numpy as np

    return np.random.default_rng(self.seed).random((TRANSFER, *self.shape), np.float32)


def say(text: str) -> None:
  """Says on standard error what is measured next."""
  pipelines.say(f'  {text} ...')


def mib(pid: int, *fields: str) -> float:
  """Returns the sum of fields of a process's /proc/PID/status, such as VmRSS, in MiB."""
  lines = pathlib.Path(f'/proc/{pid}/status').read_text().splitlines()
  kib = dict(line.split(':', 1) for line in lines)
  return sum(int(kib[field].split()[0]) for field in fields) / 1024


def parse_case(flag: str, text: str, seed: int) -> Case:
  """Returns the case that a flag names.

  Args:
    flag: The name of the flag, for the error.
    text: MODEL-CLIENTSxEXAMPLES.
    seed: The seed of the examples.

  Raises:
    app.UsageError: If it names none.
  """
  try:
    model, size = text.split('-')
    clients, examples = map(int, size.split('x'))
    if model not in MODELS or clients < 1 or examples < 1 or examples % BATCH:
      raise ValueError
  except ValueError:
    raise app.UsageError(
        f'--{flag}: {text!r} is not MODEL-CLIENTSxEXAMPLES, with a model of '
        f'{MODELS} and a multiple of {BATCH} examples, such as mlp-10x200.'
    ) from None
  return Case(model, clients, examples, seed)


def build_model(keras: Any, name: str, shape: tuple[int, ...]) -> Any:
  """Builds a model.

  Args:
    keras: The package of Keras 3, or of Keras 2.
    name: One of `MODELS`, or 'teacher', which is that of `fed_distillation`.
    shape: The shape of an example.
  """
  layers = keras.layers
  relu = lambda units: layers.Dense(units, activation='relu')
  if name == 'subclassed':
    return _subclassed(keras)
  if name == 'cnn':
    hidden = [
        layers.Conv2D(32, 3, activation='relu'), layers.MaxPool2D(),
        layers.Conv2D(64, 3, activation='relu'), layers.MaxPool2D(),
        layers.Flatten(),
    ]
  elif name == 'teacher':
    hidden = [relu(400), relu(400)]
  elif name == 'batch_norm':
    hidden = [
        relu(200), layers.BatchNormalization(), relu(200), layers.BatchNormalization(),
    ]
  elif name == 'dropout':
    hidden = [relu(200), layers.Dropout(0.2), relu(200), layers.Dropout(0.2)]
  else:
    hidden = [relu(200), relu(200)]
  return keras.Sequential([layers.InputLayer(shape), *hidden, layers.Dense(10)])


def _subclassed(keras: Any) -> Any:
  class Subclassed(keras.Model):

    def __init__(self):
      super().__init__()
      relu = lambda: keras.layers.Dense(200, activation='relu')
      self.first, self.second = relu(), relu()
      self.head = keras.layers.Dense(10)

    def call(self, inputs):
      return self.head(self.second(self.first(inputs)))

  return Subclassed()


def build_loss(keras: Any) -> Any:
  """Builds the clients' loss.

  Args:
    keras: The package of Keras 3, or of Keras 2.
  """
  return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def build_process(case: Case, **kwargs: Any) -> Any:
  """Builds the process of tff_kd whose rounds are the case's.

  Args:
    case: The case.
    **kwargs: `input_spec`, and `client_data` where examples are in files.

  Returns:
    The process.
  """
  import keras
  import tff_kd

  kwargs |= dict(
      student_fn=lambda: build_model(keras, case.model, case.shape),
      loss_fn=lambda: build_loss(keras),
      client_optimizer=tff_kd.tff.learning.optimizers.build_sgdm(RATE),
  )
  if case.model != 'fed_distillation':
    return tff_kd.algorithms.build_fed_avg(**kwargs)
  adam = tff_kd.tff.learning.optimizers.build_adam(SERVER_RATE)
  size = dict(num_steps=SERVER_STEPS, batch_size=SERVER_BATCH)
  return tff_kd.algorithms.build_fed_distillation(
      **kwargs,
      teacher_fn=lambda: build_model(keras, 'teacher', case.shape),
      transfer_set=tff_kd.TransferSet(case.transfer_examples()),
      teacher_optimizer=adam,
      student_optimizer=adam,
      distillation=tff_kd.Distillation(**size),
      back_distillation=tff_kd.Distillation(target='teacher', **size),
  )
