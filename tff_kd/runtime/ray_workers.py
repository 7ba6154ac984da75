"""The workers of a run on Ray: started, asked whether they live, replaced."""

from collections.abc import Mapping, Sequence
import os
import threading
import time
from typing import Any, Optional
import weakref

from absl import logging

from tff_kd.runtime import plan as plan_lib
from tff_kd.runtime import ray_worker

# How many groups a worker has at a time, so that it need not wait for the next one.
DEPTH = 2
# The concurrency group of calls that are not work.
HEALTH = 'health'
_PING_INTERVAL_S = 1.0
_CHECK_INTERVAL_S = 0.5
# After this many failed starts in a row there is an error if no worker is left, and a
# pause otherwise.
_MAX_FAILED_STARTS = 3
_PAUSE_S = 30.0
# Settings of TensorFlow and Keras that the workers take over from this process.
_SETTINGS = ('TF_', 'XLA_', 'KERAS_')


class NoWorkerError(RuntimeError):
  """No worker is left, or none could be started."""


class WorkerRecord:
  """What the script knows of a worker.

  Attributes:
    name: For messages.
    actor: Ray's handle.
    description: The reference to the worker's `ray_worker.Info`.
    info: The description, once the worker is ready.
    num_groups: How many groups it has.
    lost: Why it is given up, if it is.
  """

  def __init__(self, number: int, actor: Any):
    self.name = f'worker {number}'
    self.actor = actor
    self.description = actor.describe.remote()
    self.info: Optional[ray_worker.Info] = None
    self.num_groups = 0
    self.lost: Optional[str] = None
    self.ping: Any = None
    self.ping_time = 0.0


class Pool:
  """The workers of a context. Several threads may use it.

  Attributes:
    ray: The package, connected to a cluster.
    silence_s: A worker that does not answer for so long is given up.
  """

  def __init__(
      self,
      ray: Any,
      num_workers: Optional[int],
      resources: Mapping[str, float],
      silence_s: float,
      start_timeout_s: float,
  ):
    """Initializes it and starts the workers.

    Args:
      ray: The package, connected to a cluster.
      num_workers: The number of workers; if `None`, as many as the cluster has resources
        for, also when that changes.
      resources: The resources that each one asks of Ray, such as
        `{'CPU': 4, 'GPU': 1}`.
      silence_s: A worker that does not answer for so long is given up.
      start_timeout_s: How long to wait for a worker where there is none.
    """
    self.ray = ray
    self._num_workers = num_workers
    self._resources = dict(resources)
    self.silence_s = silence_s
    self._start_timeout_s = start_timeout_s
    self._lock = threading.RLock()
    self._workers: list[WorkerRecord] = []
    self._plans: weakref.WeakKeyDictionary[plan_lib.Plan, Any] = (
        weakref.WeakKeyDictionary()
    )
    self._number = 0
    self._failed_starts = 0
    self._last_failure = ''
    self._last_failure_time = 0.0
    self._checked = 0.0
    self._fill()

  def plan_reference(self, plan: plan_lib.Plan) -> Any:
    """Returns Ray's reference to a plan's serialized computation, put there once."""
    with self._lock:
      if plan not in self._plans:
        self._plans[plan] = self.ray.put(plan.proto)
      return self._plans[plan]

  def ready(self) -> Sequence[WorkerRecord]:
    """Returns the workers that are ready, as of a check twice a second."""
    with self._lock:
      if time.monotonic() - self._checked > _CHECK_INTERVAL_S:
        self._note_started()
        self._fill()
        self._checked = time.monotonic()
      return [worker for worker in self._workers if worker.info is not None]

  def wait_for_one(self, stop: Optional[threading.Event] = None) -> None:
    """Waits until a worker is ready, or `stop` is set.

    Raises:
      NoWorkerError: If there is none after the timeout, or starts fail.
    """
    stop = stop or threading.Event()
    deadline = time.monotonic() + self._start_timeout_s
    while not self.ready() and not stop.is_set():
      if self._failed_starts >= _MAX_FAILED_STARTS:
        raise NoWorkerError(
            f'No Ray worker is left: {self._failed_starts} starts in a row failed, the '
            f'last one because: {self._last_failure}'
        )
      if time.monotonic() > deadline:
        raise NoWorkerError(self._none_came())
      stop.wait(_CHECK_INTERVAL_S / 5)

  def _none_came(self) -> str:
    alive = sum(node['Alive'] for node in self.ray.nodes())
    return (
        f'No Ray worker is left, and none started within {self._start_timeout_s:g} s. '
        f'Each worker asks for {self._resources}; the {alive} nodes of the cluster have '
        f'{_amounts(self.ray.cluster_resources())}, of which '
        f'{_amounts(self.ray.available_resources())} are free. Start more nodes '
        '(`ray start --address=...`), ask for less (`resources`), or wait longer '
        '(`start_timeout_s`).'
        + (f' The last failure: {self._last_failure}' if self._last_failure else '')
    )

  def check_silent(self, workers: Sequence[WorkerRecord]) -> None:
    """Gives up workers that do not answer.

    Args:
      workers: The workers to ask, which have work.
    """
    now = time.monotonic()
    for worker in workers:
      if worker.lost is not None:
        continue
      with self._lock:
        if worker.ping is None:
          if now - worker.ping_time > _PING_INTERVAL_S:
            call = worker.actor.ping.options(concurrency_group=HEALTH)
            worker.ping, worker.ping_time = call.remote(), now
          continue
        answered, _ = self.ray.wait([worker.ping], timeout=0)
        if answered:  # A worker that died is noticed by its groups.
          worker.ping, worker.ping_time = None, now
          continue
      if now - worker.ping_time > self.silence_s:
        self.lose(worker, f'it has not answered for {self.silence_s:g} s')

  def lose(self, worker: WorkerRecord, reason: str) -> None:
    """Gives up a worker and starts another.

    Args:
      worker: The worker.
      reason: Why, for the warning.
    """
    with self._lock:
      if worker.lost is not None:
        return
      worker.lost = reason
      self._workers.remove(worker)
      info = worker.info
      where = f' (process {info.pid} on {info.host})' if info else ''
      logging.warning(
          'The Ray %s%s is lost: %s. Its groups of clients are computed elsewhere, and '
          'another worker is started.', worker.name, where, reason,
      )
      self.ray.kill(worker.actor)
      self._fill()

  def close(self) -> None:
    """Ends all workers."""
    with self._lock:
      for worker in self._workers:
        self.ray.kill(worker.actor)
      self._workers = []
      self._num_workers = 0

  def _fill(self) -> None:
    """Starts workers until there are enough."""
    wanted = self._num_workers
    if wanted is None:
      wanted = max(1, self._num_fitting())
    pause_ends = self._last_failure_time + _PAUSE_S
    if self._failed_starts >= _MAX_FAILED_STARTS and time.monotonic() < pause_ends:
      wanted = 0
    while len(self._workers) < wanted:
      self._workers.append(WorkerRecord(self._number, self._start()))
      self._number += 1

  def _num_fitting(self) -> int:
    """Returns how many workers the cluster's nodes have resources for."""
    needed = {name: amount for name, amount in self._resources.items() if amount}
    return sum(
        int(min(
            node['Resources'].get(name, 0) // amount for name, amount in needed.items()
        ))
        for node in self.ray.nodes() if node['Alive']
    )

  def _start(self) -> Any:
    resources = dict(self._resources)
    settings = {
        name: value for name, value in os.environ.items() if name.startswith(_SETTINGS)
    }
    num_gpus = resources.pop('GPU', 0)
    if not num_gpus:
      settings['CUDA_VISIBLE_DEVICES'] = '-1'  # TensorFlow would take all GPUs' memory.
    num_cpus = resources.pop('CPU', 0)
    # Pings and stops have threads of their own.
    make = self.ray.remote(concurrency_groups={HEALTH: 2}, max_concurrency=DEPTH)
    actor_class = make(ray_worker.Worker).options(
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        memory=resources.pop('memory', None),
        resources=resources,
        scheduling_strategy='SPREAD',
        # Ray's head process would keep a record of each group, up to 100,000 of them.
        enable_task_events=False,
        runtime_env={'env_vars': settings},
    )
    return actor_class.remote(
        self.ray.get,
        None if num_gpus else max(1, int(num_cpus)),
        ray_worker.num_threads(),
    )

  def _note_started(self) -> None:
    """Notes the workers that have become ready, or could not start."""
    starting = {
        worker.description: worker for worker in self._workers if worker.info is None
    }
    if not starting:
      return
    done, _ = self.ray.wait(list(starting), num_returns=len(starting), timeout=0)
    for reference in done:
      worker = starting[reference]
      try:
        info = self.ray.get(reference, timeout=self.silence_s)
        _check_versions(info)
      except (self.ray.exceptions.RayError, RuntimeError) as error:
        self._failed_starts += 1
        self._last_failure = str(error)
        self._last_failure_time = time.monotonic()
        self.lose(worker, f'it could not start: {error}')
      else:
        worker.info = info
        self._failed_starts = 0


def _check_versions(info: ray_worker.Info) -> None:
  """Raises an error if a worker has other versions than this process."""
  here = ray_worker.versions()
  different = [
      f'{name} {info.versions[name]} there, {version} here'
      for name, version in here.items() if info.versions[name] != version
  ]
  if different:
    raise RuntimeError(
        f'The node {info.host} has other versions than this process '
        f'({"; ".join(different)}), so that results would differ. Install the same '
        'lock on all nodes.'
    )


def _amounts(resources: Mapping[str, float]) -> str:
  shown = {
      name: amount for name, amount in sorted(resources.items())
      if not name.startswith(('node:', 'object_store'))
  }
  return ', '.join(f'{amount:g} {name}' for name, amount in shown.items()) or 'nothing'
