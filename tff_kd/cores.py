"""The processor cores that this process may use."""

import os


def available() -> list[int]:
  """Returns the numbers of the cores; all of the machine where none can be chosen."""
  if hasattr(os, 'sched_getaffinity'):  # Linux.
    return sorted(os.sched_getaffinity(0))
  return list(range(os.cpu_count() or 1))


def pin(core: int) -> None:
  """Keeps this process on a core, where the system can do so."""
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {core})
