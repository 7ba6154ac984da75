"""A task of your own: Keras models, and an .npz file with x and y for each client.

  python -m pipelines.train --task=examples/own_task.py --data_dir=FOLDER

FOLDER has client_*.npz, and server.npz with the examples that the server holds.
"""

import pathlib

import keras
import numpy as np

from tff_kd import data

DEFAULTS = {'rounds': 10, 'batch_size': 10}  # Defaults of the flags of pipelines.train.


def build_model(units):
  layers = keras.layers
  return keras.Sequential(
      [keras.Input((2,)), layers.Dense(units, activation='relu'), layers.Dense(3)]
  )


def build_metrics():  # The first one chooses the best round.
  return [
      keras.metrics.SparseCategoricalAccuracy(name='accuracy'),
      keras.metrics.SparseTopKCategoricalAccuracy(k=2, name='top_2'),
  ]


def read(path):
  with np.load(path) as file:
    return data.Examples(file['x'].astype('float32'), file['y'].astype('int32'))


def load(*, data_dir, **kwargs):
  folder = pathlib.Path(data_dir)
  return data.task_from_clients(
      'own_task', num_classes=3, server=read(folder / 'server.npz'),
      clients={path.stem: read(path) for path in sorted(folder.glob('client_*.npz'))},
      students={'small': lambda: build_model(8)},
      teachers={'large': lambda: build_model(64)}, metrics_fn=build_metrics, **kwargs,
  )
