"""Whole rounds in this process equal those on the C++ worker that TFF ships."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import helpers
import tff_kd


@pytest.fixture(scope='module')
def batches():
  return helpers.batches(
      [helpers.examples(n, n) for n in (9, 4, 12)], num_epochs=2, seed=0
  )


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
  parts = dict(
      transfer_set=lambda: tff_kd.TransferSet(helpers.examples(16, 99)[0]),
      teacher_fn=lambda: helpers.dense_fn((7,)),
      mentor_fn=lambda: helpers.dense_fn((6,)),
      generator_steps=lambda: 3,
      # The server divides by it, and so multiplies what is rounded.
      dynamic_weight=lambda: 1.0,
  )
  return helpers.build_with_parts(
      name, parts, student_fn=_student_fn, input_spec=batches.element_spec,
      client_data=batches, seed=3,
  )


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
  here, _ = helpers.rounds(process, [0, 1, 2])
  with tff_kd.runtime.tff_worker():
    there, _ = helpers.rounds(process, [0, 1, 2])
  tf.nest.assert_same_structure(here, there)
  for found, expected in zip(tf.nest.flatten(here), tf.nest.flatten(there)):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
