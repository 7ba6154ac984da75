"""Three algorithms' rounds, on the local runtime or over workers in other networks.

Run as a program in user and network namespaces of its own (`unshare`), it makes two more
network namespaces, each joined to its own by a pair of virtual Ethernet devices, starts a
worker with certificates in each, and saves the weights after some rounds:

  two_machines.py CERTIFICATES WEIGHTS.npz
"""

import contextlib
import os
import socket
import subprocess
import sys

import keras
import numpy as np
import tensorflow as tf

from tests import helpers
import tff_kd
from tff_kd.simulation import connections

_PORT = 8000
_NUM_ROUNDS = 3


def final_weights() -> dict[str, np.ndarray]:
  """All states' numbers after some rounds, in the runtime that is there."""
  cohort = [helpers.dataset(*helpers.examples(4 + k, k)) for k in range(5)]
  transfer_set = tff_kd.TransferSet(helpers.examples(12, 99)[0])
  distillation = tff_kd.Distillation(num_steps=2, batch_size=4)
  student = dict(
      transfer_set=transfer_set,
      student_optimizer=helpers.sgd(),
      distillation=distillation,
  )
  builds = {
      'fed_df': student,
      'fed_distillation': dict(
          student, teacher_fn=helpers.dense_fn((7,)), teacher_optimizer=helpers.sgd()
      ),
      'fml': dict(mentor_fn=helpers.dense_fn((6,))),
  }
  found = {}
  for name, kwargs in builds.items():
    keras.utils.set_random_seed(0)
    process = tff_kd.algorithms.REGISTRY[name].build(**helpers.common(**kwargs))
    state = process.initialize()
    own = None
    if isinstance(process, tff_kd.StatefulClientsProcess):
      own = [process.initialize_client() for _ in cohort]
    for _ in range(_NUM_ROUNDS):
      if own is None:
        state = process.next(state, cohort).state
      else:
        state, own, _ = process.next(state, cohort, own)
    for i, leaf in enumerate(tf.nest.flatten([state, own or []])):
      found[f'{name}/{i}'] = np.asarray(leaf)
  return found


def _call(*command: str) -> None:
  subprocess.run(command, check=True)


@contextlib.contextmanager
def _machine(number: int, tls_dir: str):
  """A worker in a network namespace of its own; yields its address and process."""
  outer, inner, worker = f'veth{number}', f'veth{number}b', f'10.77.{number}.2'
  holder = subprocess.Popen(['unshare', '--net', 'sleep', 'infinity'])
  while os.readlink(f'/proc/{holder.pid}/ns/net') == os.readlink('/proc/self/ns/net'):
    assert holder.poll() is None
  enter = ['nsenter', '--target', str(holder.pid), '--net']
  _call('ip', 'link', 'add', outer, 'type', 'veth', 'peer', 'name', inner,
        'netns', str(holder.pid))
  _call('ip', 'addr', 'add', f'10.77.{number}.1/24', 'dev', outer)
  _call('ip', 'link', 'set', outer, 'up')
  _call(*enter, 'ip', 'addr', 'add', f'{worker}/24', 'dev', inner)
  _call(*enter, 'ip', 'link', 'set', inner, 'up')
  _call(*enter, 'ip', 'link', 'set', 'lo', 'up')
  script = subprocess.Popen(
      [*enter, sys.executable, '-m', 'pipelines.worker', f'--port={_PORT}',
       f'--tls_dir={tls_dir}'],
      stdout=subprocess.PIPE, text=True,
  )
  try:
    assert script.stdout.readline().startswith('Worker on')
    yield worker
  finally:
    for process in (script, holder):
      process.terminate()
      process.wait()


def _open_ports(host: str) -> list[int]:
  """Where a machine takes connections, of the ports that programs may be given."""
  found = []
  for port in range(1024, 65536):
    with socket.socket() as probe:
      probe.settimeout(1.0)
      if probe.connect_ex((host, port)) == 0:
        found.append(port)
  return found


def main(certificates: str, path: str) -> None:
  _call('ip', 'link', 'set', 'lo', 'up')
  with contextlib.ExitStack() as machines:
    addresses = [
        machines.enter_context(_machine(number, f'{certificates}/worker'))
        for number in (1, 2)
    ]
    workers = [
        connections.RemoteWorker(f'{its}:{_PORT}', tls_dir=f'{certificates}/script')
        for its in addresses
    ]
    with tff_kd.simulation.remote_runtime(workers):
      found = final_weights()
    traffic = [worker.traffic.bytes_sent for worker in workers]
    ports = [_open_ports(its) for its in addresses]
  np.savez(path, traffic=traffic, ports=ports, **found)


if __name__ == '__main__':
  main(*sys.argv[1:])
