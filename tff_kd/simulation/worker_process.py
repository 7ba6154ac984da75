"""TFF's worker as a process that strangers cannot reach, and that leaves nothing behind.

TFF's `worker_binary` takes commands from whoever connects, and listens on all of the
machine's addresses. Here it is started under a filter of system calls: its `bind` is
stopped, the address in it set to the loopback address, and let go on; a `bind` that
nobody watches fails.
"""

import concurrent.futures
import contextlib
import ctypes
import importlib.util
import ipaddress
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import BinaryIO

import psutil

from tff_kd.simulation import channels

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 5.0
_LOG_TAIL_BYTES = 2000

# Of linux/ptrace.h, for x86-64, which is all that TFF's worker is built for.
_CONT, _DETACH, _SETOPTIONS = 7, 17, 0x4200
_TRACE_EXEC, _TRACE_SECCOMP, _EXIT_KILL = 0x10, 0x80, 0x100000
_SECCOMP_EVENT = 7
_BIND, _LISTEN = 49, 50
# Where `sockaddr_in` and `sockaddr_in6` hold the address.
_ADDRESS_AT = {socket.AF_INET: 4, socket.AF_INET6: 8}
_LOOPBACKS = {
    socket.AF_INET: socket.inet_pton(socket.AF_INET, channels.LOOPBACK),
    socket.AF_INET6: socket.inet_pton(socket.AF_INET6, f'::ffff:{channels.LOOPBACK}'),
}

# Runs in a bare interpreter that turns into the worker. It asks the kernel to kill it
# with the thread that started it (option 1 of prctl is PR_SET_PDEATHSIG), unless that
# is gone; lets its starter watch it; and has `bind` and `listen` stop for the watcher
# (a BPF program: of x86-64's calls, 49 and 50 are traced, all others allowed).
_LAUNCHER = f"""
import ctypes, os, signal, struct, sys
libc = ctypes.CDLL(None, use_errno=True)

def check(result, what):
  if result:
    sys.exit(what + ' is not permitted here (' + os.strerror(ctypes.get_errno())
             + '), so the worker cannot be kept from listening on all addresses. '
             'Where that is no danger, choose allow_open.')

parent, watched = int(sys.argv[1]), sys.argv[2] == 'watched'
libc.prctl(1, signal.SIGKILL)
if os.getppid() != parent: sys.exit(1)
if watched:
  rules = b''.join(struct.pack('HBBI', *rule) for rule in [
      (0x20, 0, 0, 4), (0x15, 0, 4, 0xC000003E), (0x20, 0, 0, 0),
      (0x15, 1, 0, {_BIND}), (0x15, 0, 1, {_LISTEN}),
      (0x06, 0, 0, 0x7FF00000), (0x06, 0, 0, 0x7FFF0000)])
  class Program(ctypes.Structure):
    _fields_ = [('len', ctypes.c_ushort), ('rules', ctypes.c_char_p)]
  check(libc.ptrace(0, 0, 0, 0), 'ptrace')
  os.kill(os.getpid(), signal.SIGSTOP)
  check(libc.prctl(38, 1, 0, 0, 0), 'no_new_privs')
  check(libc.prctl(22, 2, ctypes.byref(Program(7, rules))), 'seccomp')
os.execv(sys.argv[3], sys.argv[3:])
"""


class RuntimeStartError(RuntimeError):
  """The worker did not come up."""


def worker_path() -> str:
  """Where TFF's worker is.

  Raises:
    RuntimeStartError: If it is not there.
  """
  # Not imported: that takes seconds, which `pipelines.worker` need not wait.
  package = importlib.util.find_spec('tensorflow_federated')
  path = pathlib.Path(package.origin).parent / 'data' / 'worker_binary'
  if not path.is_file():
    raise RuntimeStartError(
        f'TFF has no worker at {path}. Install the locked requirements again.'
    )
  return str(path)


class WorkerProcess:
  """One of TFF's workers on a port of this machine.

  It is killed by the kernel when this process ends, however that ends.

  Attributes:
    port: Its port.
    process: The `subprocess.Popen`.
  """

  def __init__(
      self,
      port: int,
      *,
      max_concurrent_calls: int,
      log: BinaryIO,
      allow_open: bool = False,
  ):
    """Starts the worker; returns when it takes connections.

    Args:
      port: A free port.
      max_concurrent_calls: How many calls it computes at a time.
      log: An open file for its output.
      allow_open: Whether it may be reached from other machines: it then listens on
        all addresses, and whoever reaches it can run what they like here.

    Raises:
      RuntimeStartError: If it does not come up, or can be reached from other machines
        though it must not.
    """
    self.port = port
    self._log = log
    self._allow_open = allow_open
    # The kernel ties the worker's life to the thread that starts it: this one lasts.
    self._starter = concurrent.futures.ThreadPoolExecutor(
        1, thread_name_prefix='worker starter'
    )
    try:
      self._starter.submit(self._start, max_concurrent_calls).result()
      self._wait_until_connected()
      if not allow_open:
        self._check_loopback()
    except BaseException:
      self.stop()
      raise

  def _start(self, max_concurrent_calls: int) -> None:
    env = {
        **os.environ,
        # One thread an operation and one call a core beat every other setting.
        'TF_NUM_INTRAOP_THREADS': '1',
        'TF_CPP_MIN_LOG_LEVEL': os.environ.get('TF_CPP_MIN_LOG_LEVEL', '2'),
    }
    command = [
        sys.executable, '-I', '-S', '-c', _LAUNCHER,
        str(os.getpid()), 'open' if self._allow_open else 'watched',
        worker_path(),
        f'--port={self.port}',
        f'--max_concurrent_computation_calls={max_concurrent_calls}',
        f'--grpc_max_message_length_megabytes={channels.MAX_MESSAGE_MB}',
    ]
    self.process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=self._log,
        stderr=self._log,
        env=env,
        # Ctrl-C is for the script, which then stops the worker in order.
        start_new_session=True,
    )
    if not self._allow_open:
      end = threading.Timer(_START_TIMEOUT_S, self.process.kill)
      end.start()
      try:
        _confine(self.process)
      finally:
        end.cancel()

  def _wait_until_connected(self) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and self.process.poll() is None:
      try:
        socket.create_connection((channels.LOOPBACK, self.port), 1.0).close()
        return
      except OSError:
        time.sleep(0.005)
    raise RuntimeStartError(
        f'The TFF worker did not start ({self.ending() or "no answer"}). It said:\n'
        f'{self.log_tail()}'
    )

  def _check_loopback(self) -> None:
    sockets = psutil.Process(self.process.pid).net_connections('inet')
    listening = [s.laddr for s in sockets if s.status == psutil.CONN_LISTEN]
    if not listening or not all(_is_loopback(its.ip) for its in listening):
      raise RuntimeStartError(
          f'The TFF worker listens on {listening}, so that other machines could reach '
          'it. It was ended. Where that is no danger, choose `allow_open`.'
      )

  def ending(self) -> str:
    """How it ended; empty while it runs."""
    code = self.process.poll()
    if code is None:
      return ''
    if code >= 0:
      return f'it ended with exit code {code}'
    hint = ', perhaps for lack of memory' if -code == signal.SIGKILL else ''
    return f'it was ended by {signal.Signals(-code).name}{hint}'

  def log_tail(self) -> str:
    """The end of its output."""
    self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
    return self._log.read().decode(errors='replace')

  def wait(self, timeout_s: float) -> None:
    """Waits a while for its end."""
    with contextlib.suppress(subprocess.TimeoutExpired):
      self.process.wait(timeout_s)

  def stop(self) -> None:
    """Ends the worker; returns when it is gone."""
    process = getattr(self, 'process', None)
    if process is not None and process.poll() is None:
      process.terminate()
      try:
        process.wait(_STOP_TIMEOUT_S)
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    self._starter.shutdown()


def _is_loopback(address: str) -> bool:
  its = ipaddress.ip_address(address)
  return (getattr(its, 'ipv4_mapped', None) or its).is_loopback


def _ptrace(request: int, pid: int, data: int = 0) -> None:
  libc = ctypes.CDLL(None, use_errno=True)
  arguments = [ctypes.c_long(value) for value in (request, pid, 0, data)]
  if libc.ptrace(*arguments) == -1:
    number = ctypes.get_errno()
    raise OSError(number, f'ptrace: {os.strerror(number)}')


def _confine(process: subprocess.Popen) -> None:
  """Watches the worker until it listens; sets the addresses that it binds.

  Returns early if the worker ends.
  """
  pid = process.pid
  if _next_stop(process) is None:
    return
  _ptrace(_SETOPTIONS, pid, _TRACE_EXEC | _TRACE_SECCOMP | _EXIT_KILL)
  deliver = 0
  while True:
    _ptrace(_CONT, pid, deliver)
    status = _next_stop(process)
    if status is None:
      return
    event = status >> 16
    # What is no event of ours is a signal for the worker.
    deliver = 0 if event else os.WSTOPSIG(status)
    if event == _SECCOMP_EVENT:
      call = pathlib.Path(f'/proc/{pid}/syscall').read_text().split()
      if int(call[0]) == _LISTEN:
        _ptrace(_DETACH, pid)
        return
      _set_loopback(pid, int(call[2], 16), int(call[3], 16))


def _next_stop(process: subprocess.Popen) -> int | None:
  """The status with which the worker stops next; `None` if it ends."""
  _, status = os.waitpid(process.pid, 0)
  if os.WIFSTOPPED(status):
    return status
  # It has been waited for, so `Popen` cannot find out any more.
  process.returncode = os.waitstatus_to_exitcode(status)
  return None


def _set_loopback(pid: int, at: int, length: int) -> None:
  """Replaces the wildcard address by the loopback address in a worker's memory."""
  with open(f'/proc/{pid}/mem', 'r+b', buffering=0) as memory:
    memory.seek(at)
    address = memory.read(length)
    family = int.from_bytes(address[:2], sys.byteorder)
    if family in _LOOPBACKS:
      start = _ADDRESS_AT[family]
      its = _LOOPBACKS[family]
      if not any(address[start : start + len(its)]):
        memory.seek(at + start)
        memory.write(its)
