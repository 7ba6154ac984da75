"""Checks of a round's clients before the round begins."""

import collections
from collections.abc import Mapping, Sequence
import numbers
from typing import Any, NamedTuple, Optional

import numpy as np
import tensorflow as tf
from tff_kd.compat import tff

from tff_kd.data import client_data as client_data_lib
from tff_kd import models
from tff_kd.models import cohorts

# The values that are checked; any other (a `tff.Value`, a reference) belongs to TFF.
_PYTHON_VALUES = (
    Sequence, Mapping, set, frozenset, numbers.Number, np.ndarray, np.generic, tf.Tensor,
    tf.data.Dataset,
)
# The arguments of `next`.
_STATE, _CLIENTS, _CLIENT_STATES = 'state', 'client_data', 'client_states'
_HOW_TO_BATCH = '`tf.data.Dataset.from_tensor_slices((x, y)).batch(20)`'


class ClientArguments(NamedTuple):
  """The clients of a round, as `next` takes them.

  Attributes:
    client_data: The `ClientBatches`, of a process that takes numbers; else `None`.
    input_spec: The spec of a batch of a client's dataset.
    num_cohorts: The number of cohorts.
    has_conditions: Whether clients come with `ClientConditions`.
    max_clients: The largest number of clients; any if `None`.
    is_private: Whether sums are private, for which a client can report once a round.
    keeps_state: Whether `next` takes clients' states, too.
    kept_models: The architectures of the models in these; `None` if there are none.
  """

  client_data: Optional[client_data_lib.ClientBatches]
  input_spec: Any
  num_cohorts: int
  has_conditions: bool
  max_clients: Optional[int]
  is_private: bool
  keeps_state: bool
  kept_models: Optional[cohorts.Students]

  def check(self, selected: Any) -> Any:
    """Checks a round's clients, and returns them as TFF takes them.

    Args:
      selected: The clients given to `next`: a list, or an array of numbers.

    Returns:
      A list, with Python's numbers; something that is none of Python's values as it is.

    Raises:
      TypeError, ValueError: If it does not fit; names the place in the list.
    """
    if not isinstance(selected, _PYTHON_VALUES):
      return selected
    if isinstance(selected, (np.ndarray, tf.Tensor)) and selected.ndim == 1:
      selected = as_list(np.asarray(selected))
    if not isinstance(selected, (list, tuple, range)):
      raise TypeError(
          "A round's clients must be a list with one element a client, found "
          f'{_shown(selected)}. Pass `[{"0, 3" if self.client_data else "dataset"}]`.'
      )
    if self.max_clients is not None and len(selected) > self.max_clients:
      raise ValueError(
          f'A round must have at most {self.max_clients} clients, the `max_clients` of '
          f'the `SecureAggregation`, found {len(selected)}: a sum of more could wrap '
          'around its modulus. Pass fewer, or build the process with more `max_clients`.'
      )
    clients = [self._client(place, client) for place, client in enumerate(selected)]
    if self.is_private and self.client_data is not None:
      self._check_once(clients)
    return clients

  def _check_once(self, clients: list[Any]) -> None:
    """Refuses a client that would be in a private sum twice."""
    counts = collections.Counter(
        client['data'] if isinstance(client, Mapping) else client for client in clients
    )
    again = [self.client_data.data.names[k] for k, count in counts.items() if count > 1]
    if again:
      raise ValueError(
          'With differential privacy a client can be in a round once only, found '
          f'{again} more often: the noise covers one report of each client. Pass every '
          'client once.'
      )

  def check_states(self, selected: Any, states: Any) -> None:
    """Checks the states of a round's clients.

    Args:
      selected: The clients, as `check` returns them.
      states: The states given to `next`; `None` if none are given.

    Raises:
      TypeError, ValueError: If there is not one for each client, of its cohort.
    """
    is_checked = states is None or isinstance(states, _PYTHON_VALUES)
    if not self.keeps_state or not isinstance(selected, list) or not is_checked:
      return
    how = (
        'Pass `client_states.load(clients)` of a `tff_kd.simulation.ClientStates`, or '
        'what the last round has returned.'
    )
    if not isinstance(states, (list, tuple)) or hasattr(states, '_fields'):
      raise TypeError(
          "This process needs the states of the round's clients, a list with one a "
          f'client, found {_shown(states)}. {how}'
      )
    if len(states) != len(selected):
      raise ValueError(
          f'There must be one state for each of the {len(selected)} clients of the '
          f'round, in their order, found {len(states)}. {how}'
      )
    if self.kept_models is None or not self.kept_models.has_cohorts:
      return
    for place, (client, state) in enumerate(zip(selected, states)):
      cohort = client['cohort']
      expected = _shapes(self.kept_models.specs[cohort].initial_weights)
      weights = getattr(state, 'weights', ())
      is_by_cohort = len(weights) == len(self.kept_models.specs)
      if not is_by_cohort or _shapes(weights[cohort]) != expected:
        raise ValueError(
            f'The state of client {place} of the round must be of its cohort, {cohort}, '
            "found another. Build the `ClientStates` with the `cohort_fn` of the round's "
            f'clients; a new client has `process.initialize_client()[{cohort}]`.'
        )

  def _client(self, place: int, value: Any) -> Any:
    check = self._dataset if self.client_data is None else self._number
    keys = ['cohort'] * (self.num_cohorts > 1) + ['data']
    keys += ['conditions'] * self.has_conditions
    if isinstance(value, Mapping) and 'conditions' in value and not self.has_conditions:
      raise ValueError(
          f'Client {place} of the round has conditions, and this process takes clients '
          'without. Build it with `reporting=tff_kd.Reporting()`.'
      )
    if len(keys) == 1:
      return check(place, value)
    if not isinstance(value, Mapping) or set(value) != set(keys):
      raise ValueError(
          f'Client {place} of the round must be a dict with the keys {keys}, as this '
          f'process has {"cohorts" if self.num_cohorts > 1 else "a `reporting`"}, found '
          f'{_shown(value)}.'
      )
    checked = {key: value[key] for key in keys}
    checked['data'] = check(place, value['data'])
    if 'cohort' in checked:
      checked['cohort'] = _integer(
          value['cohort'], self.num_cohorts, f'The cohort of client {place} of the round'
      )
    return checked

  def _number(self, place: int, value: Any) -> int:
    size = len(self.client_data.data.client_ids)
    name = f'Client {place} of the round'
    if isinstance(value, str):
      return self.client_data.data.names.number(value)
    if isinstance(value, tf.data.Dataset):
      raise TypeError(
          f'{name} is a dataset, and this process takes numbers from 0 to {size - 1}: it '
          'was built with `client_data=`, from which clients read their examples. Build '
          'it without to pass datasets.'
      )
    return _integer(value, size, name)

  def _dataset(self, place: int, value: Any) -> Any:
    name = f'Client {place} of the round'
    if isinstance(value, tf.data.Dataset):
      self._check_batch(name, value.element_spec)
      return _ordered(value, self.input_spec)
    if isinstance(value, list):
      for batch in value[:1]:
        self._check_batch(f'{name}, a list of batches,', _spec_of(batch))
      return value
    if not isinstance(value, _PYTHON_VALUES):
      return value  # TFF's serialized form.
    if isinstance(value, (numbers.Integral, np.integer)):
      raise TypeError(
          f'{name} is the number {value}, and this process takes datasets. Build it with '
          '`client_data=` to pass numbers.'
      )
    raise TypeError(
        f'{name} must be a batched `tf.data.Dataset`, found {_shown(value)}. Make one: '
        f'{_HOW_TO_BATCH}.'
    )

  def _check_batch(self, name: str, found: Any) -> None:
    """Refuses batches that the model does not take."""
    batch = models.as_batch(found)
    if batch is not None and models.is_compatible(self.input_spec, batch):
      return
    hint = 'Convert the examples, or build the process with their `element_spec`.'
    if models.is_compatible(self.input_spec, _batch_of(batch)):
      hint = f'These are single examples: batch them, {_HOW_TO_BATCH}.'
    raise TypeError(
        f'{name} must have batches like {self.input_spec}, the `input_spec`, found '
        f'{found}. {hint}'
    )


def _integer(value: Any, size: int, name: str) -> int:
  """A number from 0 to one below the size, as Python's."""
  is_array = isinstance(value, (np.ndarray, tf.Tensor)) and not value.ndim
  number = np.asarray(value).item() if is_array else value
  is_integer = isinstance(number, (numbers.Integral, np.integer)) and (
      not isinstance(number, bool)
  )
  if not is_integer or not 0 <= number < size:
    raise (ValueError if is_integer else TypeError)(
        f'{name} must be an integer from 0 to {size - 1}, found {_shown(value)}: there '
        f'are {size}, numbered from 0.'
    )
  return int(number)


def as_list(selected: Any) -> list[Any]:
  """Clients in a list, their numbers as Python's."""
  if isinstance(selected, np.ndarray):
    selected = selected.tolist()

  def number(value: Any) -> Any:
    return int(value) if isinstance(value, np.integer) else value

  return [
      {**client, 'data': number(client['data'])}
      if isinstance(client, dict) and 'data' in client
      else number(client)
      for client in selected
  ]


def _spec_of(batch: Any) -> Any:
  """Returns the specs of a batch of arrays."""
  batch = models.as_batch(batch)
  if batch is None:
    return None
  arrays = tf.nest.map_structure(np.asarray, batch)
  return tf.nest.map_structure(lambda a: tf.TensorSpec(a.shape, a.dtype), arrays)


def _batch_of(example: Any) -> Any:
  """The spec of a batch of examples of a spec."""

  def batched(spec: Any) -> Any:
    if not isinstance(spec, tf.TensorSpec) or spec.shape.rank is None:
      return None
    return tf.TensorSpec([None, *spec.shape], spec.dtype)

  return tf.nest.map_structure(batched, example)


def _ordered(dataset: tf.data.Dataset, input_spec: Any) -> tf.data.Dataset:
  """A dataset whose mappings have their keys in the order of the spec, as TFF wants."""

  def is_ordered(spec: Any, found: Any) -> bool:
    if isinstance(spec, Mapping):
      names = list(found)
      return (
          names == list(spec)
          # TFF takes the names of a dict in order only.
          and (isinstance(found, collections.OrderedDict) or names == sorted(names))
          and all(is_ordered(spec[name], found[name]) for name in names)
      )
    return not isinstance(spec, tuple) or all(map(is_ordered, spec, found))

  def ordered(spec: Any, found: Any) -> Any:
    if isinstance(spec, Mapping):
      return collections.OrderedDict((k, ordered(spec[k], found[k])) for k in spec)
    return tuple(map(ordered, spec, found)) if isinstance(spec, tuple) else found

  if is_ordered(input_spec, dataset.element_spec):
    return dataset

  def ordered_batch(*parts: Any) -> Any:
    return ordered(input_spec, parts[0] if isinstance(input_spec, Mapping) else parts)

  return dataset.map(ordered_batch)


def _shapes(arrays: Any) -> list[tuple[int, ...]]:
  """Returns the shapes of the arrays of a structure."""
  return [tuple(np.shape(array)) for array in tf.nest.flatten(arrays)]


def _shown(value: Any) -> str:
  text = repr(value)
  if len(text) > 60 or '\n' in text:
    text = f'a {type(value).__name__}'
    if isinstance(value, (Sequence, Mapping, np.ndarray)):
      text += f' of {len(value)}'
  return text


class _CheckedComputation(tff.framework.ConcreteComputation):
  """A process's `next` that looks at its clients before it runs."""

  arguments: ClientArguments

  def __call__(self, *args, **kwargs):
    given = dict(zip((_STATE, _CLIENTS, _CLIENT_STATES), args)) | kwargs
    if _CLIENTS in given:
      clients = self.arguments.check(given[_CLIENTS])
      self.arguments.check_states(clients, given.get(_CLIENT_STATES))
      if len(args) > 1:
        args = (args[0], clients, *args[2:])
      else:
        kwargs[_CLIENTS] = clients
    return super().__call__(*args, **kwargs)


def checked(next_fn: tff.Computation, arguments: ClientArguments) -> tff.Computation:
  """The computation, of <state, client_data, ...>, with checks of the clients."""
  computation = _CheckedComputation(
      computation_proto=tff.framework.ConcreteComputation.get_proto(next_fn),
      context_stack=tff.framework.get_context_stack(),
      annotated_type=next_fn.type_signature,
  )
  computation.arguments = arguments
  return computation
