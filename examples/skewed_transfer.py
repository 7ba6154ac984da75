"""The task mnist5k with a transfer set in which the digits 0 to 4 are rare.

  python -m pipelines.train --task=examples/skewed_transfer.py --transfer_labels=0 \
      --consensus=aligned --prior=average --clients_start_from=average \
      --student_start=released --augment

Alignment needs a prior, the class frequencies of the transfer images. Here each of five
digits is a tenth as frequent as each of the others.
"""

import dataclasses

import numpy as np

import tff_kd

_RARE, _SHARE = 5, 0.1


def load(*, seed, **sizes):
  task = tff_kd.data.TASKS['mnist5k'].load(seed=seed, **sizes)
  labels = np.asarray(task.transfer.labels)
  drawn = np.random.default_rng(seed).uniform(size=len(labels))
  rows = np.flatnonzero((labels >= _RARE) | (drawn < _SHARE))
  return dataclasses.replace(
      task, name='mnist5k, skewed transfer set', transfer=task.transfer.take(rows)
  )
