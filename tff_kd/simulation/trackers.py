"""Experiment trackers as callbacks: MLflow and Weights & Biases.

The libraries are optional, and are imported when a tracker is made.
"""

from collections.abc import Mapping
import importlib
import importlib.util
import os
import time
from typing import Any, Optional

import numpy as np

from tff_kd.simulation import callbacks

# MLflow's limits for one call, and for the length of a parameter's value.
_MAX_PARAMS, _MAX_METRICS, _MAX_LENGTH = 100, 1000, 500
_STATUS = {'finished': 'FINISHED', 'interrupted': 'KILLED', 'failed': 'FAILED'}


def import_library(package: str) -> Any:
  """Imports an optional library.

  Args:
    package: The name of the package, 'mlflow' or 'wandb'.

  Returns:
    The module.

  Raises:
    ImportError: If it is not installed; says how to install it.
  """
  if importlib.util.find_spec(package) is None:
    raise ImportError(
        f'This tracker needs the package {package}, which is not installed. Install it: '
        f'`pip install {package}`.'
    )
  return importlib.import_module(package)


class _Tracker(callbacks.Callback):
  """Keeps the id of the run in checkpoints."""

  _run_id: Optional[str] = None

  def get_state(self) -> Any:
    return self._run_id

  def set_state(self, state: Any) -> None:
    self._run_id = state


class MLflowTracker(_Tracker):
  """Logs a run to MLflow: its parameters once, its metrics after each round.

  Uses MLflow's client, so other active runs are not affected. A resumed training
  continues the same run, whose id is in the checkpoints.
  """

  def __init__(
      self,
      *,
      experiment: str,
      run_name: Optional[str] = None,
      params: Optional[Mapping[str, Any]] = None,
      tracking_uri: Optional[str] = None,
  ):
    """Initializes the tracker.

    Args:
      experiment: The name of the experiment, which is made if there is none.
      run_name: The name of the run; MLflow makes one up if `None`.
      params: The run's parameters, such as the settings.
      tracking_uri: Where MLflow stores the run; if `None`, MLflow's default (the
        environment variable MLFLOW_TRACKING_URI).

    Raises:
      ImportError: If MLflow is not installed.
    """
    self._mlflow = import_library('mlflow')
    self._experiment, self._run_name = experiment, run_name
    self._params, self._tracking_uri = dict(params or {}), tracking_uri
    self._client: Any = None

  def on_train_begin(self, training: callbacks.Training) -> None:
    self._client = self._mlflow.MlflowClient(tracking_uri=self._tracking_uri)
    if training.round_num and self._run_id is not None:
      self._client.update_run(self._run_id, status='RUNNING')
      return
    experiment = self._client.get_experiment_by_name(self._experiment)
    experiment_id = (
        experiment.experiment_id if experiment is not None
        else self._client.create_experiment(self._experiment)
    )
    run = self._client.create_run(experiment_id, run_name=self._run_name)
    self._run_id = run.info.run_id
    params = [
        self._mlflow.entities.Param(name, str(value)[:_MAX_LENGTH])
        for name, value in self._params.items()
    ]
    for start in range(0, len(params), _MAX_PARAMS):
      self._client.log_batch(self._run_id, params=params[start : start + _MAX_PARAMS])

  def on_round_end(
      self, training: callbacks.Training, metrics: Mapping[str, Any]
  ) -> None:
    now = int(1000 * time.time())
    logged = [
        self._mlflow.entities.Metric(name, value, now, training.round_num)
        for name, value in numbers_of(metrics).items()
    ]
    for start in range(0, len(logged), _MAX_METRICS):
      self._client.log_batch(self._run_id, metrics=logged[start : start + _MAX_METRICS])

  def on_train_end(self, training: callbacks.Training) -> None:
    self._client.set_terminated(self._run_id, status=_STATUS[training.ending])


class WandbTracker(_Tracker):
  """Logs a run to Weights & Biases: its configuration, and metrics after each round.

  A resumed training continues the same run, whose id is in the checkpoints (offline, as
  another part of it).
  """

  def __init__(
      self,
      *,
      project: str,
      name: Optional[str] = None,
      config: Optional[Mapping[str, Any]] = None,
      directory: Optional[os.PathLike] = None,
      mode: Optional[str] = None,
  ):
    """Initializes the tracker.

    Args:
      project: The name of the project.
      name: The name of the run; Weights & Biases makes one up if `None`.
      config: The run's configuration, such as the settings.
      directory: Where the run's files go; the library's default if `None`.
      mode: 'online', 'offline' or 'disabled'; if `None`, the library's default (the
        environment variable WANDB_MODE).

    Raises:
      ImportError: If Weights & Biases is not installed.
    """
    self._wandb = import_library('wandb')
    self._arguments = dict(
        project=project, name=name, config=dict(config or {}), mode=mode,
        dir=None if directory is None else os.fspath(directory),
    )
    self._run: Any = None

  def on_train_begin(self, training: callbacks.Training) -> None:
    if training.round_num and self._run_id is not None:
      self._run = self._wandb.init(
          **self._arguments, id=self._run_id, resume='allow'
      )
    else:
      self._run = self._wandb.init(**self._arguments)
    self._run_id = self._run.id

  def on_round_end(
      self, training: callbacks.Training, metrics: Mapping[str, Any]
  ) -> None:
    self._run.log(numbers_of(metrics), step=training.round_num)

  def on_train_end(self, training: callbacks.Training) -> None:
    self._run.finish(exit_code=int(training.ending != 'finished'))


def numbers_of(metrics: Mapping[str, Any]) -> dict[str, float]:
  """Returns the metrics that are single numbers, as Python's floats.

  Args:
    metrics: The flat metrics of a round.
  """
  return {
      name: float(value) for name, value in metrics.items()
      if np.ndim(value) == 0 and np.asarray(value).dtype.kind in 'fiub'
  }
