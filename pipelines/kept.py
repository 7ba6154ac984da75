"""The models that clients keep, as they were in the best round of a run."""

from collections.abc import Sequence
import json
import pathlib
from typing import Any, Optional

from absl import flags

from pipelines import released
from pipelines import run_folders
from pipelines import train_evaluation
from pipelines import train_folder
from pipelines import train_setup
from pipelines import UserError
import tff_kd

# Flags that decide which examples are whose, and what their models are.
_OF_THE_SPLIT = (
    'task', 'data_dir', 'num_clients', 'partition', 'alpha', 'shards_per_client', 'seed',
    'transfer_size', 'validation_size', 'student', 'mentor',
)


class OtherClientsError(UserError):
  """Raised if flags make other clients than those that keep the models."""


class KeptModels:
  """The models that clients keep, in the folder of a run whose flags have been taken.

  Attributes:
    specs: The architectures of the models, one a cohort.
  """

  def __init__(self, run_dir: pathlib.Path, process: Any):
    """Opens the models.

    Args:
      run_dir: The folder of the run.
      process: The run's process, with `kept_models`.
    """
    results = json.loads((run_dir / run_folders.RESULTS).read_text())
    self._best_round = results['best_round']
    self._students = process.kept_models
    self.specs = self._students.specs
    self._names = process.client_data.data.names
    # In this process, whatever workers the run had.
    with tff_kd.runtime.in_process():
      self._states = train_evaluation.client_states(process, run_dir / 'clients')

  def spec(self, client: int) -> tff_kd.models.ModelSpec:
    """Returns the architecture of a client's model."""
    return self.specs[client % len(self.specs)]

  def weights(self, client: int) -> Any:
    """Returns the `ModelWeights` of a client's model.

    Args:
      client: The client's number.

    Raises:
      UserError: If its file is damaged.
    """
    try:
      (state,) = self._states.load([client], self._best_round)
    except tff_kd.simulation.ClientStatesError as error:
      raise UserError(str(error)) from error
    return self._students.unpack(state.weights)[client % len(self.specs)]

  def released(self, clients: Sequence[str]) -> list[released.Released]:
    """Returns the models of some clients.

    Args:
      clients: Their names, as tables show them.

    Raises:
      UserError: If there is no such client.
    """
    found = []
    for name in clients:
      if name not in self._names:
        raise UserError(
            f'--clients: there is no client {name!r} among the {len(self._names)} of the '
            f'run; the first one is {self._names[0]!r}.'
        )
      number = self._names.number(name)
      spec, weights = self.spec(number), self.weights(number)
      found.append(
          released.Released(
              f'client_{name}', None, spec.to_keras(weights), spec, weights
          )
      )
    return found


def load(run_dir: pathlib.Path) -> Optional[KeptModels]:
  """Returns the models that a run's clients keep; `None` if they keep none.

  Args:
    run_dir: The folder of the run.

  Raises:
    UserError: If the run has not ended.
    OtherClientsError: If flags make other clients.
  """
  if not (run_dir / 'clients').is_dir():
    return None
  if not (run_dir / run_folders.RESULTS).exists():
    raise UserError(
        f'The run in {run_dir} has not ended: it has no {run_folders.RESULTS}. Go on '
        f'with it: {train_folder.resume_command(run_dir)}'
    )
  results = json.loads((run_dir / run_folders.RESULTS).read_text())
  if not results['clients_keep_models']:
    return None  # They keep states that are not models.
  # Checked before the process is built, which may fail with other clients.
  ran_with = json.loads((run_dir / run_folders.CONFIG).read_text())['flags']
  for flag in _OF_THE_SPLIT:
    if flags.FLAGS[flag].value != ran_with[flag]:
      raise OtherClientsError(f'--{flag} makes other clients of the data.')
  with train_setup.errors_for_users():
    process = train_setup.prepare().process
  return KeptModels(run_dir, process)
