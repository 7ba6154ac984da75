"""Each task's own defaults of the flags of `pipelines.train`; imports no TensorFlow."""

from collections.abc import Mapping
from typing import Any

from tff_kd import algorithms
from tff_kd import data
from tff_kd import own_files

DEFAULTS: dict[str, dict[str, Any]] = {
    'fashion_mnist': {'num_clients': 100, 'clients_per_round': 10},
    'cifar10': {
        'num_clients': 100, 'clients_per_round': 10, 'student': ['cnn'],
        'teacher': 'resnet',
    },
    'emnist': {'num_clients': 3383, 'clients_per_round': 20, 'student': ['cnn']},
    'shakespeare': {
        'student': ['gru'], 'teacher': 'gru', 'mentor': 'gru',
        'num_clients': 562, 'clients_per_round': 10, 'client_epochs': 1,
        'batch_size': 4, 'client_learning_rate': 2.0, 'transfer_size': 4000,
        # Labels come free with the text.
        'transfer_labels': 4000, 'transfer_per_round': 100, 'validation_size': 200,
        'server_steps': 60, 'server_batch_size': 32, 'back_steps': 60,
        'teacher_learning_rate': 0.003,
    },
    'newsgroups': {
        'student': ['embedding'], 'teacher': 'attention', 'mentor': 'attention',
        'client_optimizer': 'adam', 'client_learning_rate': 0.01,
        'transfer_size': 3000, 'transfer_labels': 600, 'server_steps': 120,
        'teacher_learning_rate': 0.003,
    },
    'movielens': {
        'student': ['factors'], 'teacher': 'deep', 'mentor': 'deep',
        'num_clients': 843, 'clients_per_round': 40, 'client_epochs': 2,
        'server_optimizer': 'adam', 'server_learning_rate': 0.01, 'rounds': 80,
        'transfer_size': 18_000, 'transfer_per_round': 4000, 'transfer_labels': 9000,
        'validation_size': 2000, 'distillation_weight': 0.95, 'server_steps': 120,
        'server_batch_size': 128, 'back_steps': 30, 'teacher_learning_rate': 0.002,
        'student_learning_rate': 0.0003,
    },
}
# Defaults of `fed_distillation` where an example has one class, measured on digits,
# clothes and posts (docs/results/unlabelled.md).
ALIGNED = {
    'consensus': 'aligned', 'prior': 'average', 'clients_start_from': 'average',
    'student_start': 'released',
}
# Shifts helped on digits and cost accuracy on clothes (measured there, too). Photographs
# are usually shifted. IDX files may hold either, so they are not shifted.
_ALIGNED_AND_SHIFTED = ALIGNED | {'augment': True}
# Defaults by task and algorithm, which take precedence over `DEFAULTS`.
WITH_ALGORITHM: dict[tuple[str, str], dict[str, Any]] = {
    **{
        (task, 'fed_distillation'): ALIGNED
        for task in ('fashion_mnist', 'idx', 'newsgroups')
    },
    **{
        (task, 'fed_distillation'): _ALIGNED_AND_SHIFTED
        for task in ('mnist5k', 'cifar10', 'emnist')
    },
    ('shakespeare', 'fed_df'): {'server_steps': 30},
    # FedDF does not have these: its student needs the rest of the predictions.
    ('shakespeare', 'fed_distillation'): {
        'consensus': 'mean_probabilities', 'prediction_top': 5,
        'transfer_per_round': 400,
    },
    ('shakespeare', 'fed_aux'): {'transfer_labels': 3000},
}


def defaults_of(task: str, algorithm: str) -> dict[str, Any]:
  """Returns the defaults of flags of an algorithm, and over them those of a task.

  Args:
    task: Its name; or the path of a file of the user's, which may have a dict
      `DEFAULTS`, and a dict `DEFAULTS_WITH` of such dicts by algorithm.
    algorithm: The algorithm that is run, or the path of its file.

  Raises:
    ValueError: If there is no such task, or no such algorithm.
  """
  data.task_info(task)
  defaults = dict(algorithms.get(algorithm).flag_defaults)
  if own_files.is_own(task):
    file = own_files.load(task)
    return (
        defaults | getattr(file, 'DEFAULTS', {})
        | getattr(file, 'DEFAULTS_WITH', {}).get(algorithm, {})
    )
  return defaults | DEFAULTS.get(task, {}) | WITH_ALGORITHM.get((task, algorithm), {})


def described(task: str) -> str:
  """Returns a task's defaults in words, for --help; nothing where there are none."""
  text = _listed(' Defaults', DEFAULTS.get(task, {}))
  for (name, algorithm), defaults in WITH_ALGORITHM.items():
    if name == task:
      text += _listed(f' With {algorithm}', defaults)
  return text


def _listed(head: str, defaults: Mapping[str, Any]) -> str:
  if not defaults:
    return ''
  values = (
      f'{name}={",".join(value) if isinstance(value, list) else value}'
      for name, value in defaults.items()
  )
  return f'{head}: {", ".join(values)}.'
