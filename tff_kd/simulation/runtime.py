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
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import BinaryIO, Optional

import grpc
import portpicker
import tensorflow_federated as tff

from tff_kd.simulation import contexts
from tff_kd.simulation import transport

_START_TIMEOUT_S = 60.0
_START_ATTEMPTS = 3
_LOG_TAIL_BYTES = 2000
_STOP_TIMEOUT_S = 5.0
_MAX_MESSAGE_MB = 2000
_CHANNEL_OPTIONS = [
    (f'grpc.{name}', _MAX_MESSAGE_MB * 1000 * 1000)
    for name in (
        'max_message_length',
        'max_receive_message_length',
        'max_send_message_length',
    )
]
# Runs in a bare interpreter that turns into the worker: asks the kernel to kill
# it with its parent (option 1 of prctl is PR_SET_PDEATHSIG), unless that is gone.
_LAUNCHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]): sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class RuntimeStartError(RuntimeError):
  """The worker did not come up."""


def _worker_path() -> str:
  path = pathlib.Path(tff.__file__).parent / 'data' / 'worker_binary'
  if not path.is_file():
    raise RuntimeStartError(
        f'TFF has no worker at {path}. Install the locked requirements again.'
    )
  return str(path)


class Worker:
  """One TFF worker process on a loopback port.

  Attributes:
    process: The `subprocess.Popen` of the worker.
    traffic: What has crossed so far.
  """

  def __init__(self, max_concurrent_calls: int, log: BinaryIO):
    """Starts the worker and waits until it answers.

    Args:
      max_concurrent_calls: How many calls it computes at a time.
      log: An open file for its output.

    Raises:
      RuntimeStartError: If it does not come up; with the end of its output.
    """
    self.traffic = transport.Traffic()
    # A free port may be taken before the worker binds it: then try another.
    for _ in range(_START_ATTEMPTS):
      port = portpicker.pick_unused_port()
      self._start(port, max_concurrent_calls, log)
      if self._wait_until_ready():
        return
      self.stop()
    log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
    raise RuntimeStartError(
        f'The TFF worker did not start in {_START_ATTEMPTS} attempts. It said:\n'
        + log.read().decode(errors='replace')
    )

  def _start(self, port: int, max_concurrent_calls: int, log: BinaryIO) -> None:
    env = {
        **os.environ,
        # One thread an operation and one call a core beat every other setting.
        'TF_NUM_INTRAOP_THREADS': '1',
        'TF_CPP_MIN_LOG_LEVEL': os.environ.get('TF_CPP_MIN_LOG_LEVEL', '2'),
    }
    command = [
        sys.executable, '-I', '-S', '-c', _LAUNCHER, str(os.getpid()),
        _worker_path(),
        f'--port={port}',
        f'--max_concurrent_computation_calls={max_concurrent_calls}',
        f'--grpc_max_message_length_megabytes={_MAX_MESSAGE_MB}',
    ]
    self.process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=env,
        # Ctrl-C is for the script, which then stops the worker in order.
        start_new_session=True,
    )
    self.channel = grpc.insecure_channel(f'localhost:{port}', _CHANNEL_OPTIONS)
    self._stub = transport.CountingStub(self.channel, self.traffic)

  def _wait_until_ready(self) -> bool:
    ready = grpc.channel_ready_future(self.channel)
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and self.process.poll() is None:
      try:
        ready.result(timeout=0.2)
        return True
      except grpc.FutureTimeoutError:
        continue
    ready.cancel()
    return False

  def stop(self) -> None:
    """Ends the worker; returns when it is gone."""
    self._stub.ended = True
    self.channel.close()
    if self.process.poll() is None:
      self.process.terminate()
      try:
        self.process.wait(_STOP_TIMEOUT_S)
      except subprocess.TimeoutExpired:
        self.process.send_signal(signal.SIGKILL)
    self.process.wait()

  def executor_factory(self) -> tff.framework.ExecutorFactory:
    def stack_fn(cardinalities):
      cardinalities.setdefault(tff.CLIENTS, 0)
      executor = transport.Executor(self._stub, self.traffic)
      executor.set_cardinalities(cardinalities)
      return executor

    return tff.framework.ResourceManagingExecutorFactory(stack_fn)


def _context(worker: Worker, context_type):
  return context_type(
      worker.executor_factory(),
      compiler_fn=tff.backends.native.desugar_and_transform_to_native,
      transform_args=tff.tensorflow.transform_args,
      transform_result=tff.tensorflow.transform_result,
  )


@functools.cache
def _end_tffs_own_worker_at_exit() -> None:
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
) -> Iterator[Worker]:
  """Runs TFF on a worker of its own while the block lasts.

  Sets TFF's default context; afterwards puts back the one before, so call every TFF
  computation inside the block (a process's `get_model_weights` is one, too): outside
  it TFF starts a worker of its own, which ends with the program only if that ends
  in order. The worker of the block ends with the block, on an exception and on
  Ctrl-C, and with this process if that is killed. To be entered from the main thread,
  which the worker's life is tied to.

  Args:
    max_concurrent_calls: How many clients compute at a time; the number of cores
      if `None`.
    log_path: Where the worker's output goes, appended; nowhere that stays if
      `None`.

  Yields:
    The `Worker`.

  Raises:
    RuntimeStartError: If the worker does not come up.
  """
  _end_tffs_own_worker_at_exit()
  if max_concurrent_calls is None:
    max_concurrent_calls = len(os.sched_getaffinity(0))
  with contextlib.ExitStack() as resources:
    if log_path is None:
      log = resources.enter_context(tempfile.TemporaryFile())
    else:
      log = resources.enter_context(open(log_path, 'a+b'))
    worker = Worker(max_concurrent_calls, log)
    resources.callback(worker.stop)
    stack = tff.framework.get_context_stack()
    resources.callback(tff.framework.set_default_context, stack.current)
    tff.framework.set_default_context(
        _context(worker, contexts.CohortContext)
    )
    yield worker


def build_async_context(worker: Worker) -> tff.framework.AsyncExecutionContext:
  """A context for TFF's federated programs (`tff.program`, `tff.learning.programs`).

  Args:
    worker: The `Worker` of a `local_runtime` block.
  """
  return _context(worker, tff.framework.AsyncExecutionContext)
