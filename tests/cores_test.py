"""The processor cores that a process may use, with affinity and without."""

import os

from tff_kd import cores


def test_cores_are_those_of_the_process():
  assert cores.available() == sorted(os.sched_getaffinity(0))


def test_without_affinity_all_cores_count_and_none_is_pinned(monkeypatch):
  monkeypatch.delattr(os, 'sched_getaffinity')
  monkeypatch.delattr(os, 'sched_setaffinity')
  assert cores.available() == list(range(os.cpu_count()))
  cores.pin(0)
