"""TFF's own runtime on this machine, with a clean start and a clean end.

TFF's default context starts a worker that inherits the script's output and can
outlive it. `local_runtime` starts the same worker as a child that writes to a log
file, dies with its parent whatever ends that, and is gone when the block ends.
"""

import atexit
from collections.abc import Iterator
import contextlib
import functools
import gc
import inspect
import os
import tempfile
from typing import Any, BinaryIO, Optional

from absl import logging
import portpicker
from tff_kd.compat import tff

from tff_kd.simulation import channels
from tff_kd.simulation import contexts
from tff_kd.simulation import transport
from tff_kd.simulation import worker_process

RuntimeStartError = worker_process.RuntimeStartError
_START_ATTEMPTS = 3
_START_TIMEOUT_S = 60.0
# So often a computation may lose its worker before it is given up.
_MAX_LOSSES = 3
_CONTEXT_ARGS = dict(
    compiler_fn=contexts.compile_computation,
    transform_args=tff.tensorflow.transform_args,
    transform_result=tff.tensorflow.transform_result,
)


class Worker:
  """A TFF worker on this machine, which is started again when it is lost.

  Attributes:
    process: The `subprocess.Popen` of the worker.
    traffic: What has crossed so far.
  """

  def __init__(
      self,
      max_concurrent_calls: int,
      log: BinaryIO,
      *,
      silence_s: float = transport.SILENCE_S,
      allow_open: bool = False,
  ):
    """Starts the worker and waits until it answers.

    Args:
      max_concurrent_calls: How many calls it computes at a time.
      log: An open file for its output.
      silence_s: After so many seconds without an answer it is lost.
      allow_open: Whether other machines may reach it.

    Raises:
      RuntimeStartError: If it does not come up; with the end of its output.
    """
    self.traffic = transport.Traffic()
    self._max_concurrent_calls = max_concurrent_calls
    self._log = log
    self._silence_s = silence_s
    self._allow_open = allow_open
    self._start()

  def _start(self) -> None:
    # A free port may be taken before the worker binds it: then try another.
    for attempt in range(1, _START_ATTEMPTS + 1):
      try:
        self._process = worker_process.WorkerProcess(
            portpicker.pick_unused_port(),
            max_concurrent_calls=self._max_concurrent_calls,
            log=self._log,
            allow_open=self._allow_open,
        )
        break
      except RuntimeStartError:
        if attempt == _START_ATTEMPTS:
          raise
    self.process = self._process.process
    address = f'{channels.LOOPBACK}:{self._process.port}'
    self._connection = transport.Connection(
        f'of this machine (process {self.process.pid})',
        channels.insecure_channel(address),
        self.traffic,
        silence_s=self._silence_s,
    )
    self._factory = self._connection.executor_factory()
    reason = self._connection.why_silent(_START_TIMEOUT_S, wait=True)
    if reason is not None:
      self.stop()
      raise RuntimeStartError(
          f'The TFF worker started, but {reason} It said:\n{self._process.log_tail()}'
      )

  def restart(self, error: transport.WorkerLostError, losses: int) -> None:
    """Starts the worker anew after a loss.

    Args:
      error: The loss.
      losses: How many there were in the same computation.

    Raises:
      transport.WorkerLostError: If there were too many; with the end of its output.
      RuntimeStartError: If it does not come up again.
    """
    self._process.wait(1.0)
    how = self._process.ending() or error.reason
    if losses >= _MAX_LOSSES:
      raise transport.WorkerLostError(
          error.worker,
          f'{how.rstrip(".")}, and so were the others that one computation was given '
          f'({losses} in all). The worker said:\n{self._process.log_tail()}',
      ) from error
    logging.warning(
        'The worker %s is lost: %s. It is started again, and the computation is done '
        'again from its beginning. Its output: %s',
        error.worker, how.rstrip('.'), self._log.name,
    )
    self.stop()
    self._start()

  def stop(self) -> None:
    """Ends the worker; returns when it is gone."""
    self._connection.close()
    self._process.stop()

  def executor_factory(self) -> tff.framework.ExecutorFactory:
    """Makes executors on the worker that is there at the time."""
    return _ExecutorFactory(self)

  @property
  def current_factory(self) -> tff.framework.ExecutorFactory:
    """Makes executors on this worker until it is lost."""
    return self._factory


class _ExecutorFactory(tff.framework.ExecutorFactory):
  """Leaves nothing of a lost worker for the next one."""

  def __init__(self, worker: Worker):
    self._worker = worker

  def create_executor(self, cardinalities):
    return self._worker.current_factory.create_executor(cardinalities)

  def clean_up_executor(self, cardinalities):
    self._worker.current_factory.clean_up_executor(cardinalities)


class _Context(contexts.CohortContext):
  """Does a computation again if its worker is lost."""

  def __init__(self, worker: Worker):
    super().__init__(worker.executor_factory(), **_CONTEXT_ARGS)
    self._worker = worker

  def invoke(self, comp: tff.Computation, arg: Any) -> Any:
    losses = 0
    while True:
      try:
        return super().invoke(comp, arg)
      except transport.WorkerLostError as error:
        losses += 1
        self._worker.restart(error, losses)


class _AsyncContext(tff.framework.AsyncExecutionContext):
  """Does a computation again if its worker is lost."""

  def __init__(self, worker: Worker):
    super().__init__(worker.executor_factory(), **_CONTEXT_ARGS)
    self._worker = worker

  async def invoke(self, comp: tff.Computation, arg: Any) -> Any:
    if inspect.isawaitable(arg):
      arg = await arg
    losses = 0
    while True:
      process = self._worker.process
      try:
        return await super().invoke(comp, arg)
      except transport.WorkerLostError as error:
        losses += 1
        # Another computation may have had it started already.
        if self._worker.process is process:
          self._worker.restart(error, losses)


@functools.cache
def end_tffs_own_worker_at_exit() -> None:
  """Has TFF's default context end before the interpreter takes modules apart.

  TFF ends the worker of that context, if a computation outside the block started
  one, when the context is collected; at the interpreter's very end that fails, and
  the worker stays.
  """

  def retire():
    tff.framework.set_default_context(
        tff.framework.SyncExecutionContext(
            executor_fn=tff.framework.ResourceManagingExecutorFactory(
                lambda cardinalities: None
            )
        )
    )
    gc.collect()

  atexit.register(retire)


@contextlib.contextmanager
def local_runtime(
    *,
    max_concurrent_calls: Optional[int] = None,
    log_path: Optional[os.PathLike] = None,
    silence_s: float = transport.SILENCE_S,
    allow_open: bool = False,
) -> Iterator[Worker]:
  """Runs TFF on a worker of its own while the block lasts.

  Sets TFF's default context; afterwards puts back the one before, so call every TFF
  computation inside the block (a process's `get_model_weights` is one, too): outside
  it TFF starts a worker of its own, which ends with the program only if that ends
  in order. The worker of the block ends with the block, on an exception and on
  Ctrl-C, and with this process if that is killed. Only this machine can reach it.

  If the worker dies or freezes, that is a warning, another one is started, and the
  computation that ran is done again from its arguments, three times at most.

  Args:
    max_concurrent_calls: How many clients compute at a time; the number of cores
      if `None`.
    log_path: Where the worker's output goes, appended; nowhere that stays if
      `None`.
    silence_s: After so many seconds without an answer the worker is lost.
    allow_open: Whether it may be reached from other machines, where it cannot be
      hidden from them; whoever reaches it can run what they like here.

  Yields:
    The `Worker`.

  Raises:
    RuntimeStartError: If the worker does not come up.
    transport.WorkerLostError: From a computation in the block that lost its worker
      three times.
  """
  end_tffs_own_worker_at_exit()
  if max_concurrent_calls is None:
    max_concurrent_calls = len(os.sched_getaffinity(0))
  with contextlib.ExitStack() as resources:
    if log_path is None:
      log = resources.enter_context(tempfile.TemporaryFile())
    else:
      log = resources.enter_context(open(log_path, 'a+b'))
    worker = Worker(
        max_concurrent_calls, log, silence_s=silence_s, allow_open=allow_open
    )
    context = _Context(worker)
    # Calls that still run end with the worker.
    resources.callback(context.close)
    resources.callback(worker.stop)
    stack = tff.framework.get_context_stack()
    resources.callback(tff.framework.set_default_context, stack.current)
    tff.framework.set_default_context(context)
    yield worker


def build_async_context(worker: Worker) -> tff.framework.AsyncExecutionContext:
  """A context for TFF's federated programs (`tff.program`, `tff.learning.programs`).

  Args:
    worker: The `Worker` of a `local_runtime` block.
  """
  return _AsyncContext(worker)
