r"""Runs a worker for scripts on other machines (`pipelines.train --workers`).

  python -m pipelines.worker --port=8000
      on 127.0.0.1 only: for scripts on this machine, or through an SSH tunnel
  python -m pipelines.worker --port=8000 --tls_dir=certificates/worker
      for other machines, whose scripts must hold certificates of the same authority

Ends on Ctrl-C and on SIGTERM. If TFF's worker dies, another one is started.
"""

import contextlib
import os
import signal
import socket
import sys
import tempfile
import time
from typing import Optional

from absl import app
from absl import flags
from absl import logging

import pipelines

_PORT = flags.DEFINE_integer(
    'port', None, 'The port to listen on.', lower_bound=1, upper_bound=65535,
    required=True,
)
_TLS_DIR = flags.DEFINE_string(
    'tls_dir', None, 'The folder `worker` that pipelines.certificates has made; without '
    'it, only this machine can reach the worker.'
)
_HOST = flags.DEFINE_string(
    'host', None, 'With --tls_dir: the address to listen on (default 0.0.0.0, all).'
)
_ALLOW_OPEN = flags.DEFINE_bool(
    'allow_open', False, 'Let anybody who reaches this machine use the worker, without '
    'certificates. They can run what they like as your user, read and write files '
    'included.'
)
_CALLS = flags.DEFINE_integer(
    'max_concurrent_calls', None, 'Clients that compute at a time; the number of '
    'cores if unset.', lower_bound=1
)
_LOG = flags.DEFINE_string(
    'log_path', None, "Where the output of TFF's worker goes, appended; nowhere that "
    'stays if unset.'
)

# A worker that ends sooner than this did not work at all.
_SOON_S = 10.0
_MAX_SOON = 3
_LOOK_EVERY_S = 0.2


def main(argv: list[str]) -> Optional[int]:
  if len(argv) > 1:
    raise app.UsageError(f'Not a flag: {argv[1:]}.')
  from tff_kd.simulation import worker_process

  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)
  # As Ctrl-C does: what was started is ended in order.
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  try:
    _serve()
  except KeyboardInterrupt:
    print('Stopped.', file=sys.stderr)
    return 0
  except (OSError, ValueError, worker_process.RuntimeStartError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  return 0


def _serve() -> None:
  from tff_kd.simulation import channels
  from tff_kd.simulation import tls
  import portpicker

  if _TLS_DIR.value is None and _HOST.value is not None:
    raise ValueError(
        '--host has no effect without --tls_dir: TFF\'s worker is on 127.0.0.1, or on '
        'all addresses with --allow_open.'
    )
  if _TLS_DIR.value is not None and _ALLOW_OPEN.value:
    raise ValueError('--tls_dir and --allow_open contradict each other; choose one.')
  host = _HOST.value or '0.0.0.0'
  _check_free('' if _TLS_DIR.value is None else host, _PORT.value)
  with contextlib.ExitStack() as resources:
    if _LOG.value is None:
      log = resources.enter_context(tempfile.TemporaryFile())
    else:
      log = resources.enter_context(open(_LOG.value, 'a+b'))
    if _TLS_DIR.value is None:
      port = _PORT.value
      ready = (
          f'Worker on port {port} of all addresses, open to everybody.'
          if _ALLOW_OPEN.value
          else f'Worker on {channels.LOOPBACK}:{port}, for this machine only.'
      )
    else:
      port = portpicker.pick_unused_port()
      backend = channels.insecure_channel(f'{channels.LOOPBACK}:{port}')
      resources.callback(backend.close)
      front = tls.serve(f'{host}:{_PORT.value}', _TLS_DIR.value, backend)
      resources.callback(lambda: front.stop(None).wait())
      ready = f'Worker on {host}:{_PORT.value}, for holders of certificates.'
    _keep_running(port, log, ready)


def _check_free(host: str, port: int) -> None:
  try:
    with socket.socket() as probe:
      probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      probe.bind((host, port))
  except OSError as error:
    raise OSError(
        f'Port {port} cannot be used: {error.strerror}. Name another --port, or end '
        'what uses it.'
    ) from error


def _keep_running(port: int, log, ready: str) -> None:
  """Starts TFF's worker whenever it is not there; returns never."""
  from tff_kd.simulation import worker_process

  soon = 0
  while True:
    started = time.monotonic()
    worker = worker_process.WorkerProcess(
        port,
        max_concurrent_calls=_CALLS.value or len(os.sched_getaffinity(0)),
        log=log,
        allow_open=_ALLOW_OPEN.value,
    )
    try:
      print(ready, flush=True)
      while not worker.ending():
        time.sleep(_LOOK_EVERY_S)
    finally:
      worker.stop()
    soon = soon + 1 if time.monotonic() - started < _SOON_S else 0
    if soon >= _MAX_SOON:
      raise worker_process.RuntimeStartError(
          f"TFF's worker does not stay: {worker.ending()}. It said:\n"
          f'{worker.log_tail()}'
      )
    logging.warning("TFF's worker is gone: %s. It is started again.", worker.ending())


if __name__ == '__main__':
  pipelines.run(main)
