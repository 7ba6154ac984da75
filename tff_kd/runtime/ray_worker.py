"""What runs in a process of Ray: groups of clients, computed as by `in_process`.

This module needs no Ray by itself: `ray_workers` makes an actor of `Worker`.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
import hashlib
import os
import pathlib
import platform
import threading
from typing import Any, NamedTuple, Optional, Union

import cachetools
import keras
import numpy as np
import tensorflow as tf

from tff_kd import cores
from tff_kd.runtime import clients
from tff_kd.runtime import devices
from tff_kd.runtime import plan as plan_lib

_MAX_PLANS = 128
_MAX_PASSES = 4
_MAX_RUNS = 64
_THREADS_VARIABLE = 'TF_NUM_INTRAOP_THREADS'


class Info(NamedTuple):
  """A worker's description of itself.

  Attributes:
    host: The name of the machine.
    pid: The process.
    versions: The versions that must be equal everywhere, so that results are.
  """

  host: str
  pid: int
  versions: dict[str, str]


class Failure(NamedTuple):
  """A client's failure.

  Attributes:
    client: The client's position in the group.
    of_tensorflow: Whether TensorFlow's graph failed.
    message: The error's message.
  """

  client: int
  of_tensorflow: bool
  message: str


class SentDataset(NamedTuple):
  """A dataset on the way to another process.

  Attributes:
    graph: The serialized graph that makes it.
  """

  graph: bytes


# A tensor on the way to another process.
Sent = Union[np.ndarray, bytes, SentDataset]
# The tensor of each client, by the number of the leaf in `Plan.leaves`.
SentOfClients = Mapping[int, Sequence[Sent]]


def versions() -> dict[str, str]:
  """Returns the versions that must be the same in all processes of a run."""
  sources = hashlib.sha256()
  folder = pathlib.Path(__file__).parent
  # Workers also unpack arguments with `graphs` and count their cores.
  others = [folder.parent / 'graphs.py', folder.parent / 'cores.py']
  for path in (*sorted(folder.glob('*.py')), *others):
    sources.update(path.read_bytes())
  return {
      'Python': '.'.join(platform.python_version_tuple()[:2]),
      'TensorFlow': tf.__version__,
      'Keras': keras.__version__,
      'NumPy': np.__version__,
      'tff_kd (hash of the sources that run)': sources.hexdigest()[:12],
  }


def to_sent(tensor: tf.Tensor) -> Sent:
  """Returns what is sent for a tensor.

  Args:
    tensor: A tensor; a dataset as its variant.

  Returns:
    A NumPy array or scalar, `bytes` for a scalar string, or a `SentDataset`.

  Raises:
    TypeError: If it is a dataset that only this process can read.
  """
  if tensor.dtype != tf.variant:
    return tensor.numpy()
  graph = tf.raw_ops.DatasetToGraphV2(input_dataset=tensor).numpy()
  if b'PyFunc' in graph:
    raise TypeError(
        'A dataset that calls Python functions (`from_generator`, `tf.py_function`, '
        '`tf.numpy_function`) cannot be sent to another process. Use '
        '`tff_kd.FileClientData`, or a dataset of tensors and files.'
    )
  return SentDataset(graph)


def from_sent(sent: Sent, dtype: tf.DType) -> tf.Tensor:
  """Returns the tensor that `to_sent` was given.

  Args:
    sent: What it returned.
    dtype: The tensor's dtype.
  """
  if isinstance(sent, SentDataset):
    return tf.raw_ops.DatasetFromGraph(graph_def=sent.graph)
  return tf.constant(sent, dtype)


def num_threads() -> int:
  """Returns how many threads TensorFlow gives one operation in this process."""
  return int(
      os.environ.get(_THREADS_VARIABLE)
      or tf.config.threading.get_intra_op_parallelism_threads()
      or len(cores.available())
  )


class _Recent:
  """A cache of values by key that makes each value once and holds the latest ones."""

  def __init__(self, max_size: int):
    self._lock = threading.Lock()
    self._made: cachetools.LRUCache = cachetools.LRUCache(max_size)

  def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
    """Returns the key's value; makes it if there is none."""
    with self._lock:
      if key not in self._made:
        self._made[key] = make()
      return self._made[key]


class Worker:
  """Computes groups of clients."""

  def __init__(
      self,
      fetch: Callable[[Any], Any],
      max_concurrent_clients: Optional[int],
      intra_op_threads: int,
  ):
    """Initializes it.

    Args:
      fetch: Gets the value of one of Ray's references.
      max_concurrent_clients: As `in_process` takes it.
      intra_op_threads: The threads that one operation has; the same in all processes, as
        results may depend on it.
    """
    self._fetch = fetch
    if _THREADS_VARIABLE not in os.environ:
      tf.config.threading.set_intra_op_parallelism_threads(intra_op_threads)
    self._workers = clients.Workers(devices.find_slots(None, max_concurrent_clients))
    self._plans = _Recent(_MAX_PLANS)
    self._passes = _Recent(_MAX_PASSES)
    self._stops = _Recent(_MAX_RUNS)

  def describe(self) -> Info:
    """Returns the worker's description of itself."""
    return Info(platform.node(), os.getpid(), versions())

  def ping(self) -> None:
    """Returns, which shows that the worker is not frozen."""

  def stop(self, run: str) -> None:
    """Lets no client of a run start any more.

    Args:
      run: The name of the run.
    """
    self._stops.get(run, threading.Event).set()

  def run_group(
      self,
      run: str,
      references: Sequence[Any],
      stage_number: int,
      size: int,
      own: SentOfClients,
      *kept: SentOfClients,
  ) -> tuple[Union[Failure, Sequence[Sent], None], SentOfClients]:
    """Does the work of one stage for one group of clients.

    Args:
      run: The name of the run.
      references: References to the serialized computation and to what all clients of the
        pass are given; each is fetched once.
      stage_number: The stage's place in the plan.
      size: How many clients the group has.
      own: What each of them is given.
      *kept: What earlier passes have kept of each client.

    Returns:
      The accumulators of the group (`None` if the stage has no sums), or what failed; and
      what the stage keeps of each client.
    """
    plan_ref, shared_ref = references
    plan = self._plans.get(
        plan_ref.hex(), lambda: plan_lib.compile_computation(self._fetch(plan_ref))
    )
    stage = plan.stages[stage_number]
    with self._workers.server.scope():
      scope = self._passes.get(
          shared_ref.hex(), lambda: self._tensors(plan, self._fetch(shared_ref))
      )
      of_clients = {}
      for sent in (own, *kept):
        of_clients |= {
            plan.leaves[number]: [
                from_sent(each, plan.leaves[number].tensor_spec.dtype)
                for each in clients_sent
            ]
            for number, clients_sent in sent.items()
        }
      one_pass = clients.ClientPass(stage, {}, scope, of_clients, size)
      try:
        total = one_pass.run(self._workers, self._stops.get(run, threading.Event))
      except clients.ClientFailure as failure:
        return _describe(failure), {}
      numbers = {leaf: number for number, leaf in enumerate(plan.leaves)}
      keeps = {
          numbers[leaf]: [to_sent(tensor) for tensor in of_clients[leaf]]
          for leaf in stage.kept
      }
      return None if total is None else [to_sent(each) for each in total], keeps

  def _tensors(
      self, plan: plan_lib.Plan, sent: Mapping[int, Sent]
  ) -> Mapping[Any, tf.Tensor]:
    return {
        plan.leaves[number]: from_sent(each, plan.leaves[number].tensor_spec.dtype)
        for number, each in sent.items()
    }


def _describe(failure: clients.ClientFailure) -> Failure:
  error = failure.__cause__
  if isinstance(error, tf.errors.OpError):
    return Failure(failure.client, True, error.message)
  return Failure(failure.client, False, f'{type(error).__name__}: {error}')
