"""One run of `pipelines.reproduce_fedgen_table`."""

from collections.abc import Callable
import dataclasses
import functools
import os
import pathlib
from typing import Any, Optional

import keras
import numpy as np
import tensorflow as tf
from tff_kd.compat import tff

from pipelines import run_folders
import tff_kd
from tff_kd import algorithms

# The paper's setting.
_USERS, _USERS_PER_ROUND = 20, 10
_BATCH_SIZE, _STEPS = 32, 20
_EXAMPLES_PER_CLASS = 1500
# A user that has so many images gets none of the classes still to be dealt out.
_CAP = 1500
_RATE, _RATE_DECAY = 0.01, 0.99
# Our choice: on how many of the 15,000 images a round distils, in how many steps.
_TRANSFER_PER_ROUND, _SERVER_STEPS, _SERVER_BATCH = 640, 50, 64
_SPLIT_LAYER = 'features'


def _network(filters: tuple[int, int], units: int) -> keras.Model:
  """Builds the paper's network for (6, 16) filters and 32 units: 26,434 weights."""
  layers = keras.layers
  model = keras.Sequential([layers.InputLayer((28, 28, 1))])
  for count in filters:
    model.add(layers.Conv2D(count, 3, 2, padding='same'))
    # The defaults of the framework of the paper.
    model.add(layers.BatchNormalization(momentum=0.9, epsilon=1e-5))
    model.add(layers.ReLU())
  model.add(layers.Flatten())
  model.add(layers.Dense(units, name=_SPLIT_LAYER))
  model.add(layers.Dense(10))
  return model


_student = functools.partial(_network, (6, 16), 32)
_teacher = functools.partial(_network, (16, 32), 128)


def _learning_rate(round_num: tf.Tensor) -> tf.Tensor:
  return _RATE * _RATE_DECAY ** tf.cast(round_num, tf.float32)


def _build(
    name: str, batches: tff_kd.ClientBatches, inputs: np.ndarray,
    task: tff_kd.data.Task, seed: int,
) -> Any:
  """Builds the process of an algorithm in this setting."""
  algorithm = algorithms.REGISTRY[name]
  kwargs = dict(
      student_fn=_student,
      input_spec=batches.element_spec,
      client_data=batches,
      loss_fn=task.loss_fn,
      metrics_fn=task.metrics_fn,
      client_optimizer=tff.learning.optimizers.build_sgdm(_RATE),
      learning_rate_fn=_learning_rate,
      seed=seed,
  )
  if 'transfer_set' in algorithm.parameters:
    # As in the paper: the server has the training images, without labels.
    kwargs['transfer_set'] = tff_kd.TransferSet(
        inputs, subset_size=min(_TRANSFER_PER_ROUND, len(inputs)), seed=seed
    )
  steps = dict(num_steps=_SERVER_STEPS, batch_size=_SERVER_BATCH)
  if 'distillation' in algorithm.parameters:
    kwargs['distillation'] = tff_kd.Distillation(
        target='ensemble', schedule=tff_kd.cosine_schedule, reset_optimizer=True,
        **steps,
    )
  if 'teacher_fn' in algorithm.parameters:
    # As the scripts' defaults on images (docs/results/unlabelled.md).
    kwargs['teacher_fn'] = _teacher
    kwargs['consensus_rule'] = tff_kd.knowledge.Aligned(tff_kd.knowledge.MeanLogits())
    kwargs['clients_start_from'] = 'average'
    steps['augment'] = task.augment
    # The teacher goes on learning; the student is only refreshed.
    kwargs['distillation'] = tff_kd.Distillation(target='ensemble', **steps)
    kwargs['back_distillation'] = tff_kd.Distillation(
        target='teacher', start='released', schedule=tff_kd.cosine_schedule,
        reset_optimizer=True, **steps,
    )
  if 'split_layer' in algorithm.parameters:
    kwargs['split_layer'] = _SPLIT_LAYER
  if 'generative_weight' in algorithm.parameters:
    kwargs['generative_weight'] = 10.0
  keras.utils.set_random_seed(seed)
  return algorithm.build(**kwargs)


class _Test:
  """Tests models in several ways, from the accuracy in each class.

  'all': the whole test part. 'own classes', as the paper's: each user is tested on an
  equal part of the test images of each class that it has, and all users' answers are
  pooled; here by expectation, over all images of the class.
  """

  def __init__(self, task: tff_kd.data.Task, user_labels: list[np.ndarray]):
    self._task = task
    has = np.array([
        np.isin(np.arange(task.num_classes), labels) for labels in user_labels
    ])
    counts = np.bincount(task.test.labels, minlength=task.num_classes)
    self._share = counts / counts.sum()
    self._own = has * counts

  def _by_class(self, logits: np.ndarray) -> np.ndarray:
    right = logits.argmax(-1) == self._task.test.labels
    return np.array([
        right[self._task.test.labels == c].mean() for c in range(len(self._share))
    ])

  def __call__(
      self, evaluator: tff_kd.evaluation.CentralEvaluator, weights: list[Any]
  ) -> dict[str, float]:
    """Evaluates one model for all users, or each user's own model."""
    by_class = np.array([
        self._by_class(evaluator.logits(of_user, self._task.test.inputs))
        for of_user in weights
    ])
    return {
        'all': float((by_class @ self._share).mean()),
        'own classes': float((by_class * self._own).sum() / float(self._own.sum())),
    }

  def with_own_statistics(
      self,
      evaluator: tff_kd.evaluation.CentralEvaluator,
      spec: tff_kd.models.ModelSpec,
      weights: Any,
      batches: tff_kd.ClientBatches,
      round_num: int,
  ) -> float:
    """Tests a model on own classes, with the batch-norm statistics of each user.

    As the paper's: there the statistics stay with the users. Training does not see
    them, so it is the same; a round's batches bring them to the user's.
    """
    model = spec.to_keras(weights)
    of_users = []
    for user in range(_USERS):
      spec.assign(model, weights)
      for inputs, _ in batches.dataset(user, round_num):
        model(inputs, training=True)
      of_users.append(spec.weights_of(model))
    return self(evaluator, of_users)['own classes']


def _load(
    alpha: float, seed: int, data_dir: os.PathLike, cache: pathlib.Path
) -> tuple[tff_kd.data.Task, list[np.ndarray], tff_kd.ClientBatches]:
  """Draws the images and splits them over the users.

  Returns:
    The task, with the 15,000 training images as the clients' examples; each user's rows
    of these; and the users' examples as they are read.
  """
  task = tff_kd.data.TASKS['idx'].load(
      data_dir=data_dir, seed=seed, transfer_size=1, validation_size=1
  )
  rng = np.random.default_rng(seed)
  rows = np.sort(np.concatenate([
      rng.permutation(np.flatnonzero(task.clients.labels == c))[:_EXAMPLES_PER_CLASS]
      for c in range(task.num_classes)
  ]))
  train, test = (
      # From [0, 1] to [-1, 1].
      tff_kd.data.Examples(2 * part.inputs - 1, part.labels)
      for part in (task.clients.take(rows), task.test)
  )
  split = tff_kd.data.partition.dirichlet(
      train.labels, _USERS, alpha=alpha, seed=seed, min_examples=10, cap=_CAP
  )
  fewest = min(map(len, split))
  batches = tff_kd.ClientBatches(
      data=tff_kd.FileClientData.from_arrays(tuple(train), split, directory=cache),
      batch_size=_BATCH_SIZE,
      num_epochs=-(-_STEPS * _BATCH_SIZE // fewest),
      max_batches=_STEPS,
      seed=seed,
  )
  return dataclasses.replace(task, clients=train, test=test), split, batches


class _Evaluation:
  """Tests the student and the teacher of a state every so many rounds."""

  def __init__(
      self,
      process: Any,
      test_fn: _Test,
      store: Optional[tff_kd.simulation.ClientStates],
      is_tested: Callable[[int], bool],
  ):
    self._test_fn, self._store, self._is_tested = test_fn, store, is_tested
    specs = {'student': process.student_spec, 'teacher': process.teacher_spec}
    self.evaluators = {
        name: tff_kd.evaluation.CentralEvaluator(spec)
        for name, spec in specs.items() if spec is not None
    }

  def __call__(self, state: Any) -> dict[str, float]:
    """Returns the accuracies by model and way of testing; none between two tests."""
    if not self._is_tested(int(state.round_num)):
      return {}
    weights = {'student': [state.global_model_weights]}
    if not len(weights['student'][0]):
      # There are only the users' own models.
      weights['student'] = [kept.weights for kept in self._store.load(range(_USERS))]
    if 'teacher' in self.evaluators:
      weights['teacher'] = [state.teacher_weights]
    return {
        f'{name}/{test}': value
        for name, of_model in weights.items()
        for test, value in self._test_fn(self.evaluators[name], of_model).items()
    }


def run(
    algorithm: str,
    alpha: float,
    seed: int,
    *,
    data_dir: os.PathLike,
    folder: pathlib.Path,
    results: pathlib.Path,
    num_rounds: int,
    rounds_per_evaluation: int,
) -> None:
  """Trains and tests; writes the accuracies by model and way of testing.

  Args:
    algorithm: Its name in the registry.
    alpha: The concentration of the Dirichlet split.
    seed: Decides the images, the split, the initial weights and who takes part.
    data_dir: Holds the IDX files.
    folder: For checkpoints and each round's metrics; a run that was stopped goes on
      from them.
    results: The file to write.
    num_rounds: Rounds.
    rounds_per_evaluation: Rounds between two tests; the last round is tested, too.
  """
  task, split, batches = _load(alpha, seed, data_dir, folder.parent / 'cache')
  process = _build(algorithm, batches, task.clients.inputs, task, seed)
  sample = tff.simulation.build_uniform_sampling_fn(range(_USERS), random_seed=seed)
  metrics_path = folder / 'metrics.csv'
  with tff_kd.runtime.in_process():
    store = None
    if isinstance(process, tff_kd.StatefulClientsProcess):
      initial = process.initialize_client()
      store = tff_kd.simulation.ClientStates(initial, folder / 'clients')
    test_fn = _Test(task, [task.clients.labels[rows] for rows in split])
    evaluate = _Evaluation(
        process, test_fn, store,
        lambda n: n % rounds_per_evaluation == 0 or n == num_rounds,
    )
    result = tff_kd.simulation.train(
        process,
        select_clients=lambda n: [int(k) for k in sample(n, _USERS_PER_ROUND)],
        num_rounds=num_rounds,
        evaluate=evaluate,
        client_states=store,
        program_state_manager=tff.program.FileProgramStateManager(
            folder / 'checkpoints', keep_total=1, keep_first=False
        ),
        rounds_per_saving=rounds_per_evaluation,
        release_managers=[
            tff.program.CSVFileReleaseManager(metrics_path, key_fieldname='round')
        ],
        progress_bar=False,  # It would fill the log.
    )
    if result.interrupted:
      raise KeyboardInterrupt
    last = evaluate(result.state)
    tested = [*last]
    if store is None:
      last['student/own statistics'] = test_fn.with_own_statistics(
          evaluate.evaluators['student'], process.student_spec,
          result.state.global_model_weights, batches, num_rounds,
      )
  _write(results, last, tested, metrics_path)


def _write(
    results: pathlib.Path, last: dict[str, float], tested: list[str],
    metrics_path: pathlib.Path,
) -> None:
  """Writes the results, with the curve of the rounds before a stop, too."""
  rounds = run_folders.read_history(metrics_path)
  content = {
      'last': last,
      'curve': [
          {key: row[key] for key in ('round', *tested)}
          for row in rounds if set(tested) <= row.keys()
      ],
      'seconds_per_round': float(
          np.median([row[tff_kd.simulation.ROUND_SECONDS] for row in rounds])
      ),
  }
  run_folders.write_json(results, content)
