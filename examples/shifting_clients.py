"""The task mnist5k with students that shift their input images in clients' training.

  python -m pipelines.train --task=examples/shifting_clients.py --algorithm=fed_avg

Each student begins with a Keras layer that shifts its inputs at random.
"""

import dataclasses

import keras

import tff_kd

_SHARE = 2 / 28  # Up to two pixels.


def _shifting(build):
  def student():
    shift = keras.layers.RandomTranslation(_SHARE, _SHARE, fill_mode='constant')
    return keras.Sequential([keras.layers.InputLayer((28, 28, 1)), shift, build()])

  return student


def load(*, seed, **sizes):
  task = tff_kd.data.TASKS['mnist5k'].load(seed=seed, **sizes)
  students = {name: _shifting(build) for name, build in task.students.items()}
  return dataclasses.replace(task, name='mnist5k, clients shift', students=students)
