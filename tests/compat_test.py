"""TFF on today's platform: what is imported first, and what is refused."""

import sys

import pytest
from tff_kd.compat import tff

from tests import helpers


def test_another_backend_of_keras_is_refused_with_what_to_do():
  done = helpers.new_python('from tff_kd import tff', status=1, KERAS_BACKEND='jax')
  assert "KERAS_BACKEND='jax'" in done.stderr and 'Unset it' in done.stderr


# Starts Python anew; that scripts compute in their own process is in `in_process_test`.
@pytest.mark.slow
@pytest.mark.parametrize('first', ['from tff_kd import tff', 'import tff_kd.runtime'])
def test_whatever_comes_first_computes_in_this_process(first):
  done = helpers.new_python(
      f'{first}\n'
      'import numpy as np, psutil\n'
      'import tensorflow_federated as tff\n'
      '@tff.federated_computation(tff.FederatedType(np.int32, tff.CLIENTS))\n'
      'def total(values):\n'
      '  return tff.federated_sum(values)\n'
      'print(total([1, 2, 3]), psutil.Process().children())\n'
  )
  assert done.stdout.strip() == '6 []', done.stderr
  assert not done.stderr  # None of TensorFlow's lines.


def test_what_tff_takes_of_tensorflow_privacy_is_there():
  for make in (
      lambda: tff.learning.dp_aggregator(1.0, 100),
      lambda: tff.learning.ddp_secure_aggregator(1.0, 100),
      lambda: tff.aggregators.PrivateQuantileEstimationProcess.no_noise(0.5, 0.5, 0.1),
      lambda: tff.learning.compression_aggregator(),
  ):
    assert make() is not None


def test_jax_is_imported_only_for_tff_jax(monkeypatch):
  from tensorflow_federated.python.core.environments import jax as tff_jax

  assert tff.jax is tff_jax
  monkeypatch.setitem(sys.modules, 'jax', None)  # As where it is not installed.
  with pytest.raises(ImportError, match='install jax==0.4.38'):
    tff.jax.computation  # noqa: B018
  with pytest.raises(AttributeError, match='no attribute .other.'):
    tff.jax.other  # noqa: B018
