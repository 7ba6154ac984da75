"""What `tff_kd.runtime.ray` calls of Ray, in this process and at once.

Values and calls are pickled, as on the way to another process, and results and errors
wait in their references. What Ray itself does (processes, nodes, what is lost) is in the
tests that start it, in `make slow`.
"""

import contextlib
import os
import pickle
import types
from typing import Any, NamedTuple
import uuid

from tff_kd import runtime
from tff_kd.runtime import ray_worker
from tff_kd.runtime import ray_workers
from tff_kd.runtime import tff_internals


class _RayError(Exception):
  pass


class _RayActorError(_RayError):
  pass


class _RayTaskError(_RayError):
  """What a call has raised, when its result is asked for."""

  def __init__(self, cause):
    super().__init__(str(cause))
    self.cause = cause


class _Reference(NamedTuple):
  name: str

  def hex(self):
    return self.name


class _Call:
  """A method of an actor; `options` and `remote` as Ray has them."""

  def __init__(self, ray, method, num_returns=1):
    self._ray, self._method, self._num_returns = ray, method, num_returns

  def options(self, num_returns=1, concurrency_group=None):
    return _Call(self._ray, self._method, num_returns)

  def remote(self, *args):
    args = [
        self._ray.get(arg) if isinstance(arg, _Reference) else arg
        for arg in pickle.loads(pickle.dumps(args))
    ]
    try:
      found = self._method(*args)
    except Exception as error:  # Raised where the result is asked for.
      found = _RayTaskError(error)
    if self._num_returns == 1:
      return self._ray.put(found)
    if isinstance(found, _RayTaskError):
      found = [found] * self._num_returns
    return [self._ray.put(each) for each in found]


class _Actor:

  def __init__(self, ray, worker):
    self._ray, self._worker = ray, worker

  def __getattr__(self, name):
    return _Call(self._ray, getattr(self._worker, name))


class StandIn:
  """In place of the package `ray`."""

  exceptions = types.SimpleNamespace(
      RayError=_RayError, RayActorError=_RayActorError, RayTaskError=_RayTaskError
  )

  def __init__(self):
    self._values: dict[_Reference, bytes] = {}

  def put(self, value: Any) -> _Reference:
    reference = _Reference(uuid.uuid4().hex)
    self._values[reference] = pickle.dumps(value)
    return reference

  def get(self, reference: _Reference, timeout: Any = None) -> Any:
    value = pickle.loads(self._values[reference])
    if isinstance(value, _RayError):
      raise value
    return value

  def wait(self, references, num_returns=1, timeout=None):
    return references[:num_returns], references[num_returns:]

  def kill(self, actor):
    pass

  def remote(self, **_):
    """Ray's decorator of a class of actors."""

    def decorated(worker_class):
      make = lambda *args: _Actor(self, worker_class(*args))
      of_options = types.SimpleNamespace(remote=make)
      return types.SimpleNamespace(options=lambda **_: of_options)

    return decorated


@contextlib.contextmanager
def context(num_workers: int):
  """As `tff_kd.runtime.ray`, without Ray."""
  ray = StandIn()
  # TensorFlow runs already, and a worker would set its threads.
  os.environ.setdefault(ray_worker._THREADS_VARIABLE, str(ray_worker.num_threads()))
  pool = ray_workers.Pool(
      ray, num_workers, {'CPU': 1.0}, silence_s=30.0, start_timeout_s=30.0
  )
  try:
    found = runtime.RayContext(None, pool)
    pool.wait_for_one()
    with tff_internals.default_context(found):
      yield found
  finally:
    pool.close()
