"""A context that spreads clients over machines with Ray.

Moritz et al. (2018), "Ray: A Distributed Framework for Emerging AI Applications".
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import functools
import importlib.util
import logging
import os
import pathlib
import re
import secrets
from typing import Any, Optional

from tff_kd import cores
from tff_kd.compat import tff
from tff_kd.runtime import devices
from tff_kd.runtime import ray_clients
from tff_kd.runtime import ray_worker
from tff_kd.runtime import ray_workers
from tff_kd.runtime import running
from tff_kd.runtime import tff_internals

_INSTALL = (
    'Runs on several machines need Ray. Install it with `pip install ray` (or, with '
    'hashes, `pip install --require-hashes -r requirements-ray.txt`), on all machines.'
)
_ADDRESS = re.compile(r'local|auto|[^\s:/]+:\d+')
_TOKEN_FILE = '.ray/auth_token'


class RayContext(tff.framework.SyncContext):
  """Runs computations with the clients on Ray and the server in this process."""

  def __init__(self, device: devices.Device, pool: ray_workers.Pool):
    """Initializes the context; use `tff_kd.runtime.ray` to make one.

    Args:
      device: Where the server computes.
      pool: The workers.
    """
    self._pool = pool
    make_clients = functools.partial(ray_clients.ClientsOnRay, pool)
    self._runner = running.Runner(device, None, make_clients)

  def invoke(self, comp: tff.framework.ConcreteComputation, arg: Any) -> Any:
    """Runs a computation; see `tff.framework.SyncContext`.

    Args:
      comp: The computation.
      arg: Its argument; `None` if it takes none.

    Returns:
      Its result, of the same Python types as from TFF's own context.

    Raises:
      ComputationError: If it fails while it runs; a client's failure names the client.
      NotImplementedError: If it uses an operator that does not run in process.
      NoWorkerError: If no worker is left.
      TypeError: If the argument does not fit the computation's type.
    """
    return self._runner.run(comp, arg)

  def workers(self) -> Sequence[ray_worker.Info]:
    """Returns the workers that are ready now; others may still be starting.

    Returns:
      For each one a tuple of the machine's name (`host`), the number of the process
      (`pid`) and the `versions` that it has.
    """
    return [worker.info for worker in self._pool.ready()]


@contextlib.contextmanager
def ray(
    address: str = 'local',
    num_workers: Optional[int] = None,
    resources: Optional[Mapping[str, float]] = None,
    *,
    device: devices.Device = None,
    silence_s: float = 30.0,
    start_timeout_s: float = 120.0,
) -> Iterator[RayContext]:
  """Runs TFF's computations with clients on Ray's workers while the block lasts.

  Each worker computes clients as `in_process` does. The clients of a round are split
  into the same groups of consecutive clients as there, and the groups' sums are added
  up in their order: results equal those of `in_process` to the bit, whatever the number
  of workers, on machines with processors of one kind. The server computes in this
  process.

  A worker that is lost is named in a warning, its groups are computed by others, and
  another worker is started as soon as the cluster has room for it. Examples do not
  travel: all machines read the files of `FileClientData` under the same path.

  Moritz et al. (2018), "Ray: A Distributed Framework for Emerging AI Applications".

  Args:
    address: 'local' starts Ray on this machine, and ends it with the block or with this
      process; 'auto' is the cluster that this machine is a node of; 'host:port' is the
      address of a head node. Where this process is connected to Ray already, that
      connection is used, and left open.
    num_workers: The number of workers; if `None`, as many as the cluster has
      resources for, also when nodes come or go.
    resources: The resources that each worker asks of Ray, such as
      `{'CPU': 4, 'GPU': 1}`; `{'CPU': 1}` if `None`. As many clients compute at a time
      in a worker as it has CPUs, or one on each of its GPUs.
    device: Where the server computes, as `in_process` takes it.
    silence_s: A worker that does not answer for so many seconds is lost.
    start_timeout_s: The number of seconds to wait for a worker where there is none.

  Yields:
    The context.

  Raises:
    ImportError: If Ray is not installed.
    ConnectionError: If there is no cluster at the address.
    NoWorkerError: If no worker starts.
    ValueError: If an argument is not one of those above.
  """
  check_ray(address, num_workers, resources)
  for name, value in (('silence_s', silence_s), ('start_timeout_s', start_timeout_s)):
    if not value > 0:
      raise ValueError(f'`{name}` must be above 0 seconds, found {value!r}.')
  resources = {'CPU': 1.0} if resources is None else dict(resources)
  with _connection(address, num_workers, resources) as package:
    pool = ray_workers.Pool(
        package, num_workers, resources, silence_s, start_timeout_s
    )
    try:
      context = RayContext(device, pool)
      pool.wait_for_one()
      with tff_internals.default_context(context):
        yield context
    finally:
      pool.close()


def check_ray(
    address: str = 'local',
    num_workers: Optional[int] = None,
    resources: Optional[Mapping[str, float]] = None,
) -> None:
  """Raises an error if `ray` would refuse its arguments, or Ray is not installed.

  Args:
    address: As `ray` takes it.
    num_workers: As `ray` takes it.
    resources: As `ray` takes it.

  Raises:
    ImportError: If Ray is not installed.
    ValueError: If an argument is not one that `ray` takes.
  """
  if not isinstance(address, str) or not _ADDRESS.fullmatch(address):
    raise ValueError(
        "`address` must be 'local', 'auto' or the 'host:port' of a head node, found "
        f'{address!r}. With ray:// addresses, run the script on a node of the cluster '
        'instead (`ray job submit`).'
    )
  if num_workers is not None and (
      not isinstance(num_workers, int) or isinstance(num_workers, bool) or num_workers < 1
  ):
    raise ValueError(
        f'`num_workers` must be a positive integer or None, found {num_workers!r}.'
    )
  if resources is not None and not (
      resources and all(amount > 0 for amount in resources.values())
  ):
    raise ValueError(
        "`resources` must name positive amounts, such as {'CPU': 4, 'GPU': 1}, found "
        f'{resources!r}.'
    )
  if importlib.util.find_spec('ray') is None:
    raise ImportError(_INSTALL)


@contextlib.contextmanager
def _connection(
    address: str, num_workers: Optional[int], resources: Mapping[str, float]
) -> Iterator[Any]:
  """Connects to a cluster while the block lasts; yields the package `ray`."""
  import ray as package

  if package.is_initialized():
    yield package
    return
  options: dict[str, Any] = dict(log_to_driver=False, logging_level=logging.ERROR)
  if address == 'local':
    os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
    _use_own_token()
    options.update(include_dashboard=False, **_local_resources(num_workers, resources))
  try:
    package.init(address=address, **options)
  except (RuntimeError, ValueError) as error:
    raise ConnectionError(
        f'There is no Ray cluster at {address!r} that this machine is a node of: '
        f'{str(error).strip()} Start one with `ray start --head`, and join it with `ray '
        "start --address=host:port`; address='local' starts one by itself."
    ) from error
  try:
    yield package
  finally:
    package.shutdown()


def _local_resources(
    num_workers: Optional[int], resources: Mapping[str, float]
) -> dict[str, Any]:
  """Returns what Ray on this machine is told to have: enough for the workers."""
  if num_workers is None:
    return {}
  needed = {name: num_workers * amount for name, amount in resources.items()}
  needed.pop('memory', None)
  cpus = max(needed.pop('CPU', 0), len(cores.available()))
  needed.pop('GPU', None)
  return {'num_cpus': int(cpus), 'resources': needed}


def _use_own_token() -> None:
  """Gives Ray on this machine a token of this process's own, if the user has none.

  Ray would write one into the home folder, where others may read it.
  """
  variables = ('RAY_AUTH_MODE', 'RAY_AUTH_TOKEN', 'RAY_AUTH_TOKEN_PATH')
  if any(name in os.environ for name in variables):
    return
  if (pathlib.Path.home() / _TOKEN_FILE).exists():
    return
  os.environ['RAY_AUTH_TOKEN'] = secrets.token_hex(32)
