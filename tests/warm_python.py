"""A Python whose imports are done: scripts run in forks of one process.

Importing TensorFlow, Keras and TFF takes eight seconds of each start of a script. A
server imports them once for a whole test run, computes nothing, and forks for each start.
What asks for it is a program of its own, to be called as Python is: it passes its
arguments, folder, environment, standard streams and cores on, forwards signals, and ends
as the fork ends. What is no `-m pipelines.X` and no `-c` goes to Python itself. The
processes that run tests side by side are such forks, too.

This file is both: `python tests/warm_python.py FOLDER PID` is the server, which lives as
long as the process PID; `client()` writes the program.
"""

import atexit
from collections.abc import Callable
import contextlib
import fcntl
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from typing import NoReturn

_ROOT = pathlib.Path(__file__).parent.parent
# Names the folder of the test run's server.
FOLDER = 'TFF_KD_WARM_PYTHON'
_FORWARDED = (signal.SIGINT, signal.SIGTERM)

_CLIENT = '''#!{python} -IS
import sys
sys.path.insert(0, {tests!r})
import warm_python
sys.exit(warm_python.ask({python!r}, {folder!r}))
'''


def client() -> str:
  """The program to call in place of Python, which asks this test run's server."""
  folder = os.environ[FOLDER]
  path = pathlib.Path(folder, 'python')
  if not path.exists():
    new = path.with_suffix(f'.{os.getpid()}')
    new.write_text(_CLIENT.format(
        python=sys.executable, tests=str(_ROOT / 'tests'), folder=folder
    ))
    new.chmod(0o755)
    new.rename(path)
  return str(path)


def ask(python: str, folder: str) -> int:
  """Has the server run what this program is asked to; returns the exit status."""
  words = sys.argv[1:]
  # As `pytest-xdist` starts the processes that run tests.
  is_worker = words[:1] == ['-u']
  words = words[is_worker:]
  is_script = words[:1] == ['-m'] and words[1].startswith('pipelines.')
  # A benchmark's child measures its own start, and is given a pipe.
  is_child = any(word.startswith('--child=') for word in words[2:])
  if words[:1] != ['-c'] and not is_script or is_child:
    os.execv(python, [python, *sys.argv[1:]])
  server = _connect(python, folder)
  order = dict(
      words=words, folder=os.getcwd(), environ=dict(os.environ),
      cores=sorted(os.sched_getaffinity(0)),
      executable=python if is_worker else os.path.join(folder, 'python'),
  )
  signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
  socket.send_fds(server, [b'.'], [0, 1, 2])
  with server.makefile('w') as file:
    file.write(json.dumps(order) + '\n')
  for number in _FORWARDED:
    signal.signal(number, lambda number, frame: server.send(bytes([number])))
  signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
  line = server.makefile().readline()
  if not line:
    sys.exit(f'The warm Python has ended in mid run: see {folder}/log.')
  status = int(line)
  if status < 0:
    if -status != signal.SIGKILL:
      signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
  return status


def _connect(python: str, folder: str) -> socket.socket:
  """A connection to the server, which is started if it is not there."""
  address = os.path.join(folder, 'socket')
  with open(os.path.join(folder, 'lock'), 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    deadline = time.monotonic() + 1800
    process = None
    while True:
      connection = socket.socket(socket.AF_UNIX)
      try:
        connection.connect(address)
        return connection
      except OSError:
        connection.close()
      if process is None:
        process = _start(python, folder)
      if process.poll() is not None or time.monotonic() > deadline:
        with open(os.path.join(folder, 'log')) as log:
          raise RuntimeError(f'There is no warm Python:\n{log.read()[-3000:]}')
      time.sleep(0.05)


def _start(python: str, folder: str) -> subprocess.Popen:
  with open(os.path.join(folder, 'pid')) as file:
    owner = file.read()
  # Not of the test process that asks first: it serves all of them.
  environ = {k: v for k, v in os.environ.items() if k != 'TFF_KD_TESTS'}
  with open(os.path.join(folder, 'log'), 'w') as log:
    return subprocess.Popen(
        [python, str(_ROOT / 'tests' / 'warm_python.py'), folder, owner], cwd=_ROOT,
        env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        start_new_session=True,
    )


class _Server:
  """Forks for each connection; tells each how its fork has ended."""

  def __init__(self, folder: str):
    self._listener = socket.socket(socket.AF_UNIX)
    self._listener.bind(os.path.join(folder, 'socket'))
    self._listener.listen(64)
    self._woken, self._waker = socket.socketpair()
    for its in (self._woken, self._waker):
      its.setblocking(False)
    signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    self._forks: dict[int, socket.socket] = {}

  def run(self, owner: int) -> dict | None:
    """Serves until the owner ends; returns the order in a fork, `None` at the end."""
    import select

    while _is_alive(owner):
      sockets = [self._listener, self._woken, *self._forks.values()]
      ready, _, _ = select.select(sockets, [], [], 1.0)
      if self._woken in ready:
        with contextlib.suppress(BlockingIOError):
          self._woken.recv(1000)
      for pid, connection in list(self._forks.items()):
        if connection in ready:
          said = connection.recv(1)
          # Whoever asked was killed, or was sent a signal.
          os.kill(pid, said[0] if said else signal.SIGKILL)
          if not said:
            self._forget(pid)
      self._reap()
      if self._listener in ready:
        order = self._fork()
        if order is not None:
          return order
    for pid in self._forks:
      os.kill(pid, signal.SIGKILL)
    return None

  def _forget(self, pid: int) -> None:
    self._forks.pop(pid).close()

  def _reap(self) -> None:
    with contextlib.suppress(ChildProcessError):
      while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
          return
        if pid in self._forks:
          with contextlib.suppress(OSError):
            self._forks[pid].send(b'%d\n' % os.waitstatus_to_exitcode(status))
          self._forget(pid)

  def _fork(self) -> dict | None:
    connection, _ = self._listener.accept()
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    order = json.loads(connection.makefile().readline())
    pid = os.fork()
    if pid:
      self._forks[pid] = connection
      for stream in streams:
        os.close(stream)
      return None
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    ours = (self._listener, self._woken, self._waker, connection)
    for its in (*ours, *self._forks.values()):
      its.close()
    for number, stream in enumerate(streams):
      os.dup2(stream, number)
      os.close(stream)
    return order


def _is_alive(pid: int) -> bool:
  return os.path.exists(f'/proc/{pid}')


def _end(call: Callable[[], None]) -> NoReturn:
  """Ends a fork as Python ends, but leaves the memory to the system: a second less."""
  import threading
  import traceback

  status = 0
  try:
    call()
  except SystemExit as error:
    status = error.code if isinstance(error.code, int) else int(error.code is not None)
    if status and not isinstance(error.code, int):
      print(error.code, file=sys.stderr)
  except BaseException:
    traceback.print_exc()
    status = 1
  threading._shutdown()  # pylint: disable=protected-access
  atexit._run_exitfuncs()  # pylint: disable=protected-access
  with contextlib.suppress(OSError):
    sys.stdout.flush()
    sys.stderr.flush()
  os._exit(status)


def _run(order: dict) -> None:
  """What Python does with these arguments, in a fork."""
  import runpy
  import tempfile

  tempfile.tempdir = None  # As the environment says.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  os.chdir(order['folder'])
  os.environ.clear()
  os.environ.update(order['environ'])
  os.sched_setaffinity(0, order['cores'])
  # What a script starts is warm as well.
  sys.executable = order['executable']
  option, what, *arguments = order['words']
  paths = order['environ'].get('PYTHONPATH', '').split(os.pathsep)
  sys.path[:0] = ['', *filter(None, paths)]
  sys.argv = [option, *arguments]
  if option == '-m':
    runpy.run_module(what, run_name='__main__', alter_sys=True)
    return
  module = type(sys)('__main__')
  sys.modules['__main__'] = module
  exec(compile(what, '<string>', 'exec'), vars(module))


def _serve(folder: str, owner: int) -> None:
  import gc
  import warnings

  sys.path[0] = str(_ROOT)
  import pipelines  # noqa: F401, which keeps TensorFlow's notes off the screen.
  import tests.preloaded  # noqa: F401

  # A fork has none of these threads, and would wait for them for ever.
  tasks = pathlib.Path('/proc/self/task').glob('*/comm')
  if any(task.read_text().startswith('tf_Compute') for task in tasks):
    sys.exit(
        'An import of tff_kd computes or traces something: it has started the threads of '
        'TensorFlow. Find it in what tests/preloaded.py imports.'
    )
  warnings.filterwarnings('ignore', message='.*use of fork')
  gc.freeze()
  order = _Server(folder).run(owner)
  if order is not None:
    sys.path.remove(str(_ROOT))
    _end(lambda: _run(order))


if __name__ == '__main__':
  _serve(sys.argv[1], int(sys.argv[2]))
