"""Whole rounds in this process equal those on the C++ worker that TFF ships."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import helpers
import tff_kd
from tff_kd import algorithms

_ROUNDS = 2


@pytest.fixture(scope='module')
def batches():
  data = tff_kd.FileClientData.from_clients(
      [helpers.examples(n, n) for n in (9, 4, 12)]
  )
  return tff_kd.ClientBatches(data=data, batch_size=4, num_epochs=2, seed=0)


def _student_fn():
  return keras.Sequential([
      keras.layers.InputLayer((helpers.DIM,)),
      keras.layers.Dense(4, activation='relu'),
      keras.layers.BatchNormalization(),
      keras.layers.Dropout(0.2),
      keras.layers.Dense(helpers.CLASSES),
  ])


def build(name, batches):
  keras.utils.set_random_seed(0)
  algorithm = algorithms.REGISTRY[name]
  parts = dict(
      transfer_set=tff_kd.TransferSet(helpers.examples(16, 99)[0]),
      teacher_fn=helpers.dense_fn((7,)),
      mentor_fn=helpers.dense_fn((6,)),
      generator_steps=3,
      # The server divides by it, and so multiplies what is rounded.
      dynamic_weight=1.0,
  )
  return algorithm.build(
      **helpers.common(
          student_fn=_student_fn,
          input_spec=batches.element_spec,
          client_data=batches,
          seed=3,
      ),
      **{name: part for name, part in parts.items() if name in algorithm.parameters},
  )


def _rounds(process):
  state = process.initialize()
  if not isinstance(process, tff_kd.StatefulClientsProcess):
    for _ in range(_ROUNDS):
      output = process.next(state, [0, 1, 2])
      state = output.state
    return state, output.metrics
  kept = [process.initialize_client() for _ in range(3)]
  for _ in range(_ROUNDS):
    output = process.next(state, [0, 1, 2], kept)
    state, kept = output.state, output.client_states
  return state, output.metrics, kept


@pytest.mark.parametrize(
    'name',
    [
        'fed_df',
        *helpers.slow_each(
            'fed_distillation', 'fd', 'fed_avg', 'fed_gen', 'scaffold', 'fed_dyn', 'fml',
            'ds_fl',
        ),
    ],
)
def test_both_runtimes_give_the_same_rounds(name, batches):
  process = build(name, batches)
  here = _rounds(process)
  with tff_kd.runtime.tff_worker():
    there = _rounds(process)
  tf.nest.assert_same_structure(here, there)
  for found, expected in zip(tf.nest.flatten(here), tf.nest.flatten(there)):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
