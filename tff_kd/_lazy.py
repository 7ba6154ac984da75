"""Modules that load when they are used: TensorFlow takes seconds, `--help` should not."""

from collections.abc import Callable, Mapping, Sequence
import importlib
from typing import Any, Optional


def attach(
    package: str,
    modules: Sequence[str],
    names: Optional[Mapping[str, Sequence[str]]] = None,
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
  """Returns the `__getattr__` and `__dir__` of a package (PEP 562).

  Args:
    package: The package's `__name__`.
    modules: Its public modules, relative to the package.
    names: By module, the names of the module that are public in the package, too.
  """
  owners = {name: owner for owner, owned in (names or {}).items() for name in owned}

  def get(name: str) -> Any:
    if name in modules:
      return importlib.import_module(f'{package}.{name}')
    if name in owners:
      return getattr(importlib.import_module(f'{package}.{owners[name]}'), name)
    raise AttributeError(f'module {package!r} has no attribute {name!r}')

  return get, lambda: sorted([*modules, *owners])
