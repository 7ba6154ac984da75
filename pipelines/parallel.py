"""Several runs of scripts at once, one a core."""

from collections.abc import Callable, Iterator, Sequence
import concurrent.futures
import contextlib
import fcntl
import functools
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
from typing import NamedTuple, Optional

from pipelines import UserError
from tff_kd import cores


class Job(NamedTuple):
  """One run of a program.

  Attributes:
    name: The name in messages.
    command: The program and its arguments.
    log: The file for its output.
  """

  name: str
  command: Sequence[str]
  log: pathlib.Path


def script_job(
    name: str, script: str, arguments: Sequence[str], log: pathlib.Path
) -> Job:
  """Returns the job that runs a script of `pipelines`.

  Args:
    name: The name in messages.
    script: The script, such as 'train'.
    arguments: The flags that it is given.
    log: The file for its output.
  """
  return Job(name, [sys.executable, '-m', f'pipelines.{script}', *arguments], log)


@contextlib.contextmanager
def exclusive_lock(folder: pathlib.Path) -> Iterator[None]:
  """Holds a folder, so that no second script runs the same jobs in it.

  Raises:
    UserError: If another script holds it.
  """
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / 'lock', 'w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(
          f'{folder} is in use by another run of a script. Wait for it, or choose '
          'another --output_dir.'
      ) from None
    yield


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
  """Ends jobs on SIGTERM as on Ctrl-C, and says how to go on.

  Raises:
    KeyboardInterrupt: On either; with the text for the user.
  """
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  try:
    yield
  except KeyboardInterrupt:
    raise KeyboardInterrupt('Stopped. The same command goes on.') from None


def run_all(
    jobs: Sequence[Job],
    num_at_once: Optional[int] = None,
    on_done: Callable[[Job, float], str] = lambda job, seconds: f'{seconds:.0f} s',
) -> list[str]:
  """Runs jobs, several at a time, and prints a line for each that ends.

  A job that fails does not stop the others. Ctrl-C ends those that run.

  Args:
    jobs: The jobs.
    num_at_once: How many run at a time; one a core, pinned to it, if `None`.
    on_done: Maps a job and its seconds to the text of its line.

  Returns:
    The names of the jobs that failed.
  """
  available = cores.available()
  count = min(num_at_once or len(available), max(1, len(jobs)))
  free, running, is_stopped = queue.SimpleQueue(), set(), threading.Event()
  for place in range(count):
    # Jobs are pinned only if there is one for each core.
    free.put(available[place] if count == len(available) > 1 else None)

  def run(job: Job) -> float:
    core = free.get()
    try:
      return _run(job, core, running, is_stopped)
    finally:
      free.put(core)

  failed = []
  with concurrent.futures.ThreadPoolExecutor(count) as pool:
    started = {pool.submit(run, job): job for job in jobs}
    try:
      for number, future in enumerate(concurrent.futures.as_completed(started), 1):
        job = started[future]
        try:
          line = f'{job.name}: {on_done(job, future.result())}'
        except RuntimeError as error:
          failed.append(job.name)
          line = f'{job.name} failed: {error}'
        print(f'[{number}/{len(jobs)}] {line}', flush=True)
    except BaseException:  # Ctrl-C, or what `on_done` raises.
      is_stopped.set()
      pool.shutdown(wait=False, cancel_futures=True)
      # Not SIGINT, which processes that a shell started in the background ignore.
      for process in list(running):
        process.terminate()
      raise
  return failed


def _run(
    job: Job, core: Optional[int], running: set[subprocess.Popen],
    is_stopped: threading.Event,
) -> float:
  """Runs one job; returns its seconds.

  Raises:
    RuntimeError: If it fails; with the end of what it said.
  """
  pin = None if core is None else functools.partial(cores.pin, core)
  start = time.perf_counter()
  with open(job.log, 'w') as file:
    process = subprocess.Popen(
        job.command, stdout=file, stderr=file, stdin=subprocess.DEVNULL,
        preexec_fn=pin,
    )
    running.add(process)
    # It may have started after the others were ended.
    if is_stopped.is_set():
      process.terminate()
    code = process.wait()
    running.discard(process)
  if code:
    lines = job.log.read_text().splitlines()
    said = [line for line in lines if line.startswith('error:')] or lines[-5:]
    raise RuntimeError('\n'.join(said) + f'\n(the whole: {job.log})')
  return time.perf_counter() - start
