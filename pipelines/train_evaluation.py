"""Evaluates the models of a run in each round."""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

import numpy as np

from pipelines import train_data
from pipelines import train_flags as args
import tff_kd
from tff_kd.models import cohorts


def specs_of(process) -> dict[str, tff_kd.models.ModelSpec]:
  """Returns the specs by name; the students of cohorts are `student_0` and so on."""
  specs = _by_cohort('student', process.students, process.students.specs)
  if process.teacher_spec is not None:
    specs['teacher'] = process.teacher_spec
  return specs


def _by_cohort(
    name: str, students: cohorts.Students, values: Sequence[Any]
) -> dict[str, Any]:
  if not students.has_cohorts:
    return {name: values[0]}
  return {f'{name}_{i}': value for i, value in enumerate(values)}


def client_states(
    process: tff_kd.StatefulClientsProcess, folder: pathlib.Path
) -> tff_kd.simulation.ClientStates:
  """Opens what clients keep.

  Args:
    process: The process.
    folder: The folder of the clients' states.
  """
  models = process.kept_models
  return tff_kd.simulation.ClientStates(
      process.initialize_client(), folder,
      cohort_fn=train_data.cohort_fn(1 if models is None else len(models.specs)),
  )


class Evaluation:
  """Evaluates the models of a process on the validation and the test part.

  `student` is the server's; where only clients have models, the mean over theirs. Where
  both have, `client` is that mean. Of cohorts, `student` is the mean over their
  students, which are there too.

  Attributes:
    metric_names: The names of the metrics, as of `names`.
    client_states: What clients keep, in `clients_dir`; `None` if they keep nothing.
    evaluators: The evaluators by the names of `specs_of`.
  """

  @staticmethod
  def names(process) -> dict[str, tuple[str, str]]:
    """Returns the names of the metrics, each with the model and the rest of the name."""
    found = {**specs_of(process), 'student': None}
    description = process.description
    if description.kept_models is not None and process.get_model_weights is not None:
      found['client'] = None
    state_type = process.initialize.type_signature.result.member
    if len(getattr(state_type, 'aggregated_model_weights', ())):
      before = process.students.specs
      found |= _by_cohort('student_before', process.students, before)
      found['student_before'] = None
    return {
        f'{part}/{name}_{key}': (name, f'{part}/{key}')
        for part in ('validation', 'test')
        for name in found
        for key in tff_kd.evaluation.score_names(process.students.first)
    }

  def __init__(self, process, task, clients_dir: pathlib.Path):
    self._task = task
    self._students = process.students
    self._has_student = process.get_model_weights is not None
    self._clients = process.description.kept_models
    self.metric_names = self.names(process)
    self.client_states = None
    if isinstance(process, tff_kd.StatefulClientsProcess):
      self.client_states = client_states(process, clients_dir)
    if self._clients is not None:
      self._client_evaluators = [
          tff_kd.evaluation.CentralEvaluator(spec) for spec in self._clients.specs
      ]
    self.evaluators = {
        name: tff_kd.evaluation.CentralEvaluator(spec)
        for name, spec in specs_of(process).items()
    }

  def models(self, state) -> dict[str, tuple[Any, Any]]:
    """Returns evaluator and weights of the server's models in a state, by name."""
    found = {}

    def add(name: str, weights: Any) -> None:
      if len(weights):
        by_name = _by_cohort(name, self._students, self._students.unpack(weights))
        for column, of_student in by_name.items():
          kind = column.replace('student_before', 'student')
          found[column] = (self.evaluators[kind], of_student)

    if self._has_student:
      add('student', state.global_model_weights)
    if 'teacher' in self.evaluators:
      found['teacher'] = (self.evaluators['teacher'], state.teacher_weights)
    add('student_before', getattr(state, 'aggregated_model_weights', ()))
    return found

  def __call__(self, state) -> dict[str, float]:
    metrics = {}
    models = self.models(state)
    for part in ('validation', 'test'):
      examples = getattr(self._task, part)
      found = {
          name: evaluator.evaluate(weights, *examples)
          for name, (evaluator, weights) in models.items()
      }
      if self._clients is not None:
        name = 'client' if 'student' in models else 'student'
        found[name] = self._mean_over_clients(examples)
      for name in ('student', 'student_before'):
        of_cohorts = [
            found[f'{name}_{i}']
            for i in range(len(self._students.specs)) if f'{name}_{i}' in found
        ]
        if of_cohorts:
          found[name] = _mean_of(of_cohorts)
      for name, values in found.items():
        for key, value in values.items():
          metrics[f'{part}/{name}_{key}'] = value
    return metrics

  def _mean_over_clients(self, examples) -> dict[str, float]:
    """Evaluates clients' own models; one that never took part has the initial model."""
    values = []
    numbers = np.random.default_rng(args.SEED.value).permutation(args.NUM_CLIENTS.value)
    for number in sorted(numbers[:args.EVALUATED_CLIENTS.value].tolist()):
      (state,) = self.client_states.load([number])
      cohort = number % len(self._clients.specs)
      weights = self._clients.unpack(state.weights)[cohort]
      evaluator = self._client_evaluators[cohort]
      values.append(evaluator.evaluate(weights, *examples))
    return _mean_of(values)


def _mean_of(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
  return {key: float(np.mean([v[key] for v in values])) for key in values[0]}


def monitored(task: tff_kd.data.Task) -> str:
  """Returns the name of the metric that decides which round is the best."""
  return args.MONITOR.value or f'validation/student_{task.metric}'


def best_in_words(task: tff_kd.data.Task) -> str:
  """Describes the value that the best round has."""
  monitor = monitored(task)
  return f"{'lowest' if task.is_lower_better(monitor) else 'highest'} {monitor}"


def over_clients(
    evaluator: tff_kd.evaluation.CentralEvaluator,
    weights: Any,
    task: tff_kd.data.Task,
    test_split: Sequence[np.ndarray],
) -> tff_kd.evaluation.FederatedEvaluation:
  """Evaluates the task's metric over clients, each on its share of the test part."""
  outputs = evaluator.outputs(weights, task.test.inputs)
  test = unmasked(evaluator, weights, task.test)
  counted = task.counted(test)
  values = [
      metric_of(outputs[rows], test.take(rows), evaluator.spec, task)
      for rows in test_split if counted[rows].any()
  ]
  return tff_kd.evaluation.over_clients(
      np.array(values), lower_is_better=task.is_lower_better()
  )


def unmasked(
    evaluator: tff_kd.evaluation.CentralEvaluator,
    weights: Any,
    examples: tff_kd.data.Examples,
) -> tff_kd.data.Examples:
  """Returns examples whose weights are 0 where Keras masks the model's outputs."""
  sample_weight = evaluator.sample_weight(
      weights, examples.inputs, examples.sample_weight
  )
  return tff_kd.data.Examples(examples.inputs, examples.labels, sample_weight)


def metric_of(
    outputs: np.ndarray,
    examples: tff_kd.data.Examples,
    spec: tff_kd.models.ModelSpec,
    task: tff_kd.data.Task,
) -> float:
  """Returns the task's metric alone; NaN where no example counts."""
  if not task.counted(examples).any():
    return float('nan')
  name = task.metric
  return tff_kd.evaluation.score(
      outputs, examples.labels, spec=spec, names=[name],
      sample_weight=examples.sample_weight,
  )[name]
