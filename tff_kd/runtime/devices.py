"""The devices on which clients and the server compute."""

from collections.abc import Iterator, Sequence
import contextlib
import os
from typing import Optional, Union

import tensorflow as tf

from tff_kd import cores
from tff_kd.runtime import executables

Device = Union[None, str, Sequence[str]]

_CPU = 'CPU'
# TensorFlow holds these in the host's memory, whatever the device.
_ON_HOST = {tf.int32, tf.string, tf.variant, tf.resource}


class Slot:
  """A place where one client at a time computes.

  Attributes:
    name: The device; `None` if TensorFlow places each operation.
    on_cpu: Whether all of it is on a CPU.
  """

  def __init__(self, name: Optional[str], on_cpu: bool):
    self.name = name
    self.on_cpu = on_cpu

  @contextlib.contextmanager
  def scope(self) -> Iterator[None]:
    """Places what is computed in the block."""
    with tf.init_scope(), tf.device(self.name):
      yield

  def put(self, tensors: Sequence[tf.Tensor]) -> Sequence[tf.Tensor]:
    """Returns the tensors on this device; a CPU fetches them itself."""
    if self.on_cpu or self.name is None:
      return tensors
    return [
        tensor
        if tensor.dtype in _ON_HOST or tensor.device.endswith(self.name)
        else tf.identity(tensor)
        for tensor in tensors
    ]

  def run(
      self, function: executables.Executable, tensors: Sequence[tf.Tensor]
  ) -> Sequence[tf.Tensor]:
    """Runs a function here; call it in a `scope`."""
    return function(self.put(tensors), self.on_cpu)


def prepare(device: Device, max_concurrent_clients: Optional[int]) -> None:
  """Checks the arguments of `find_slots`, and makes operations single-threaded.

  Args:
    device: As `in_process` takes it.
    max_concurrent_clients: As `find_slots` takes it.

  Raises:
    ValueError: If there is no such device, or no slot.
  """
  if max_concurrent_clients is not None and max_concurrent_clients < 1:
    raise ValueError(
        f'max_concurrent_clients must be at least 1, found {max_concurrent_clients}.'
    )
  _use_one_thread_an_operation()
  if device is not None:
    _devices_of(device)


def find_slots(device: Device, max_concurrent_clients: Optional[int]) -> list[Slot]:
  """Returns the slots; the server computes on the first one's device.

  This initializes TensorFlow.

  Args:
    device: As `in_process` takes it.
    max_concurrent_clients: The number of slots; if `None`, one an accelerator and one a
      core.
  """
  num_cores = len(cores.available())
  if device is None:
    on_cpu = only_cpus()
    slots = [Slot(None, on_cpu)] * (num_cores if on_cpu else 1)
  else:
    names = _devices_of(device)
    slots = [Slot(name, False) for name in names if _CPU not in name]
    cpus = [Slot(name, True) for name in names if _CPU in name]
    if cpus:
      slots += [cpus[i % len(cpus)] for i in range(max(num_cores, len(cpus)))]
  if max_concurrent_clients is not None:
    slots = [slots[i % len(slots)] for i in range(max_concurrent_clients)]
  return slots


def check_device(device: Union[str, Sequence[str]]) -> None:
  """Raises an error if `in_process` and `ray` would refuse a device.

  Args:
    device: As `in_process` takes it.

  Raises:
    ValueError: If TensorFlow sees no such device.
  """
  _devices_of(device)


def only_cpus() -> bool:
  """Returns whether TensorFlow sees no accelerator."""
  return all(each.device_type == _CPU for each in tf.config.list_logical_devices())


def _devices_of(device: Union[str, Sequence[str]]) -> list[str]:
  """Returns the names of devices, such as '/device:CPU:0'."""
  there = [device.name for device in tf.config.list_logical_devices()]
  found = []
  for name in [device] if isinstance(device, str) else device:
    wanted = name.upper().removeprefix('/').removeprefix('DEVICE:')
    matching = [
        each for each in there
        if each.removeprefix('/device:') == wanted or each.split(':')[1] == wanted
    ]
    if not matching:
      raise ValueError(
          f'There is no device {name!r}. TensorFlow sees '
          f'{", ".join(each.removeprefix("/device:") for each in there)}.'
      )
    found += [each for each in matching if each not in found]
  if not found:
    raise ValueError('At least one device is needed, found an empty list.')
  return found


def _use_one_thread_an_operation() -> None:
  """Makes operations single-threaded, as clients keep the cores busy.

  It does nothing if the user has chosen, or if TensorFlow has been used already.
  """
  threading_config = tf.config.threading
  if (
      'TF_NUM_INTRAOP_THREADS' in os.environ
      or threading_config.get_intra_op_parallelism_threads()
  ):
    return
  with contextlib.suppress(RuntimeError):
    threading_config.set_intra_op_parallelism_threads(1)
