"""Modules that load when they are used: TensorFlow takes seconds, `--help` should not."""

from collections.abc import Callable, Mapping
import importlib
from typing import Any


def attach(
    package: str, attributes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
  """Makes the `__getattr__` and `__dir__` of a package (PEP 562).

  Args:
    package: Its `__name__`.
    attributes: Each public name's module, relative to the package; a name that equals
      its module is the module itself.

  Returns:
    The two functions.
  """

  def get(name: str) -> Any:
    if name not in attributes:
      raise AttributeError(f'module {package!r} has no attribute {name!r}')
    module = importlib.import_module(f'{package}.{attributes[name]}')
    return module if attributes[name] == name else getattr(module, name)

  return get, lambda: sorted(attributes)
