"""What scripts and tests import, without what defines flags; none starts TensorFlow."""

import importlib
import pkgutil

from tff_kd.compat import tff  # noqa: F401, before all else.
import tff_kd

for module in pkgutil.walk_packages(tff_kd.__path__, 'tff_kd.'):
  importlib.import_module(module.name)
for name in (
    'matplotlib.figure', 'matplotlib.backends.backend_agg', 'tqdm', 'numpy',
    'hypothesis.strategies', 'hypothesis.extra.numpy',
):
  importlib.import_module(name)
