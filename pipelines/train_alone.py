"""Trains models on the server's labels alone: to begin with, or to compare with."""

from collections.abc import Iterable, Mapping
import collections
import concurrent.futures
import re
import sys

import numpy as np
import tqdm

from pipelines import central
import pipelines
from pipelines import tables
from pipelines import train_flags as args
import tff_kd
from tff_kd.compat import tff

_CENTRAL_BATCH = 32
# The steps are at most those of the run's server, within these bounds.
_ALONE_STEPS, _ALONE_LEAST_STEPS, _ALONE_EPOCHS = 1500, 100, 100
# The minimum of steps between looks at the validation score.
_ALONE_LOOK = 50
_ALONE_PATIENCE = 10


def _on_server_labels(
    spec: tff_kd.models.ModelSpec, task: tff_kd.data.Task
) -> central.Training:
  """Returns the training of a model on the server's examples with labels."""
  labelled = task.transfer.take(np.arange(args.TRANSFER_LABELS.value))
  return central.Training(
      spec, labelled, batch_size=_CENTRAL_BATCH, seed=args.SEED.value
  )


def pretrain(
    spec: tff_kd.models.ModelSpec, task: tff_kd.data.Task
) -> tff.learning.models.ModelWeights:
  """Trains a model for --pretrain_epochs on the server's labelled examples."""
  training = _on_server_labels(spec, task)
  training.run(args.PRETRAIN_EPOCHS.value)
  return training.weights


def _train_alone(
    evaluator: tff_kd.evaluation.CentralEvaluator,
    task: tff_kd.data.Task,
    most_steps: int,
    bar: tqdm.tqdm,
) -> dict[str, float]:
  """Trains a model on the server's labels alone; returns its test scores."""
  steps = -(-args.TRANSFER_LABELS.value // _CENTRAL_BATCH)  # Of an epoch.
  done = 0

  def show(epoch: int, score: float) -> None:
    nonlocal done
    bar.update((epoch - done) * steps)
    bar.set_postfix_str(
        f'{evaluator.spec.name}: validation {tables.words(task.metric)} {score:.4g}'
    )
    done = epoch

  weights, _ = central.fit(
      _on_server_labels(evaluator.spec, task),
      evaluator,
      task,
      max_epochs=min(_ALONE_EPOCHS, -(-most_steps // steps)),
      epochs_per_look=-(-_ALONE_LOOK // steps),
      patience=_ALONE_PATIENCE,
      on_look=show,
  )
  return evaluator.evaluate(weights, *task.test)


def all_alone(
    evaluators: Mapping[str, tff_kd.evaluation.CentralEvaluator],
    names: Iterable[str],
    task: tff_kd.data.Task,
    history: list[dict[str, float]],
) -> dict[str, dict[str, float]]:
  """Trains models on the server's labels alone, at the same time.

  Each is trained for at most as many steps as the server has taken with it in the run,
  but for no fewer than a minimum.

  Args:
    evaluators: The evaluators, by model.
    names: The names of the models.
    task: The task.
    history: The rows of metrics.csv.

  Returns:
    The test scores, by model.
  """
  taken = collections.Counter()
  for row in history:
    for metric, value in row.items():
      found = re.fullmatch('server_distillation/(.+)/num_steps', metric)
      if found:
        taken[found[1]] += int(value)
  most = max(taken.values(), default=0) or _ALONE_STEPS
  steps = {
      name: min(max(taken[name] or most, _ALONE_LEAST_STEPS), _ALONE_STEPS)
      for name in names
  }
  pipelines.say(
      f"Training {', '.join(steps)} on the server's labels alone, to compare with: at "
      f'most {sum(steps.values()):,} steps.'
  )
  with (
      tqdm.tqdm(
          total=sum(steps.values()), desc='labels alone', unit='step', file=sys.stderr,
          dynamic_ncols=True,
      ) as bar,
      concurrent.futures.ThreadPoolExecutor() as pool,
  ):
    def train(name: str) -> dict[str, float]:
      return _train_alone(evaluators[name], task, steps[name], bar)

    return dict(zip(steps, pool.map(train, steps)))
