"""TensorFlow Federated 0.87 on the Python, TensorFlow and Keras of today.

`from tff_kd import tff` gives TensorFlow Federated. Its last release asks for Python 3.11
and TensorFlow 2.14 in its metadata, but its Python part runs on what is current, once
the imports below are out of the way. A program that imports `tensorflow_federated` itself
must import this first.

Each shim says why it is there and when it can go.
"""

import importlib
import os
import sys
import types

# Keras chooses its backend when it is imported: this must be known before.
_backend = os.environ.get('KERAS_BACKEND', 'tensorflow')
if _backend != 'tensorflow':
  raise ImportError(
      f'tff_kd needs Keras with the TensorFlow backend, found KERAS_BACKEND={_backend!r} '
      "in the environment. Unset it, or set it to 'tensorflow', before Keras is imported."
  )

import keras

if keras.backend.backend() != 'tensorflow':  # Chosen in ~/.keras/keras.json.
  raise ImportError(
      'tff_kd needs Keras with the TensorFlow backend, found '
      f'{keras.backend.backend()!r}. Set KERAS_BACKEND=tensorflow in the environment.'
  )

# Where the DP queries that TFF and we use are defined in tensorflow_privacy.
_DP_QUERIES = {
    'dp_query': ('DPQuery', 'SumAggregationDPQuery'),
    'gaussian_query': ('GaussianSumQuery',),
    'normalized_query': ('NormalizedQuery',),
    'no_privacy_query': ('NoPrivacySumQuery',),
    'quantile_estimator_query': (
        'NoPrivacyQuantileEstimatorQuery', 'QuantileEstimatorQuery',
    ),
    'quantile_adaptive_clip_sum_query': ('QuantileAdaptiveClipSumQuery',),
    'quantile_adaptive_clip_tree_query': ('QAdaClipTreeResSumQuery',),
    'tree_aggregation_query': ('TreeResidualSumQuery',),
    'tree_range_query': ('TreeRangeSumQuery',),
    'restart_query': ('RestartQuery',),
    'distributed_discrete_gaussian_query': ('DistributedDiscreteGaussianSumQuery',),
    'distributed_skellam_query': ('DistributedSkellamSumQuery',),
}


def _import_privacy():
  """Imports tensorflow_privacy without the parts that need `tf.estimator`.

  Why: its package imports `tf.estimator`, which TensorFlow dropped in 2.16. It has a
  switch that leaves the package empty; the queries are then found where they are defined,
  when they are used (the distributed ones load tensorflow_probability, a second or more).
  Until: tensorflow-privacy releases a version that imports with TensorFlow 2.16 or later.
  """
  had_switch = hasattr(sys, 'skip_tf_privacy_import')
  sys.skip_tf_privacy_import = True
  try:
    package = importlib.import_module('tensorflow_privacy')
  finally:
    if not had_switch:
      del sys.skip_tf_privacy_import
  if hasattr(package, 'DPQuery'):
    return package  # It was there, and whole.
  modules = {name: module for module, names in _DP_QUERIES.items() for name in names}

  def get(name: str):
    if name not in modules:
      raise AttributeError(f'module {package.__name__!r} has no attribute {name!r}')
    return getattr(
        importlib.import_module(f'tensorflow_privacy.privacy.dp_query.{modules[name]}'),
        name,
    )

  package.__getattr__ = get
  return package


tensorflow_privacy = _import_privacy()


def _defer_jax():
  """Imports TFF's JAX frontend (`tff.jax`) when it is used.

  Why: `import tensorflow_federated` imports it, and it needs `jax.lib.xla_client`, which
  JAX dropped after 0.4.38. Nothing else in TFF uses JAX, which takes 400 MB on disk and
  100 MB of memory.
  Until: TFF's JAX frontend imports with current JAX.
  """
  name = 'tensorflow_federated.python.core.environments.jax'
  module = types.ModuleType(name, 'Libraries for interacting with a JAX frontend.')

  def get(attribute: str):
    if attribute != 'computation':
      raise AttributeError(f'module {name!r} has no attribute {attribute!r}')
    try:
      frontend = importlib.import_module(
          'tensorflow_federated.python.core.environments.jax_frontend.jax_computation'
      )
    except ImportError as error:
      raise ImportError(
          f'tff.jax needs `jax.lib.xla_client` ({error}): install jax==0.4.38 and '
          'jaxlib==0.4.38, or write the computation in TensorFlow '
          '(`tff.tensorflow.computation`).'
      ) from error
    return frontend.jax_computation

  module.__getattr__ = get
  sys.modules.setdefault(name, module)


_defer_jax()

try:
  import tensorflow_federated as tff  # noqa: F401
except ImportError as error:
  raise ImportError(
      'TensorFlow Federated does not import with the packages that are installed '
      f'({error}). Install the versions of requirements.txt, without resolving them: '
      '`pip install --no-deps --ignore-requires-python --require-hashes -r '
      'requirements.txt` (README, "Without make").'
  ) from error

# Importing the runtime makes this process TFF's default. Here and not above: it takes
# `tff` from this module.
import tff_kd.runtime  # noqa: F401
