"""Writes docs/api.md, the API reference, from the docstrings.

  python docs/build_api.py
"""

from collections.abc import Iterator
import dataclasses
import enum
import inspect
import operator
import pathlib
import sys
from typing import Any

import tff_kd

PATH = pathlib.Path(__file__).with_name('api.md')
_HEAD = '''# API

Made from the docstrings by `python docs/build_api.py`; a test holds it to them. Names are
as in `import tff_kd`; what is not here is not for callers.
'''
# Packages: what they export is public. Of other modules, what they define.
_PACKAGES = (
    'algorithms', 'client.companions', 'data', 'knowledge', 'models', 'privacy', 'rounds',
    'runtime', 'simulation',
)
# Modules of packages that callers use by name.
_INNER = (
    'aggregators.robust', 'aggregators.svd', 'audits.inversion', 'audits.membership',
    'client.class_counts', 'client.companions', 'client.companions.certainty',
    'client.companions.contrast', 'client.companions.control_variates',
    'client.companions.dynamic_regularizer', 'client.companions.generator',
    'client.companions.mutual', 'client.conditions', 'client.exchanges',
    'client.label_skew', 'client.local_terms', 'client.local_training',
    'client.prototypes', 'data.client_data', 'data.client_names',
    'knowledge.alignment', 'knowledge.codecs', 'knowledge.rules', 'models.cohorts',
    'models.split', 'models.zoo', 'server.calibration', 'server.distill',
    'server.settings',
)


def public_names(module: Any) -> list[str]:
  """Returns the names of a module that the page shows.

  Args:
    module: One of `modules`.
  """
  package = module.__name__.removeprefix('tff_kd').removeprefix('.')
  if package == 'algorithms':
    return ['Info', *(f'build_{algorithm}' for algorithm in module.REGISTRY)]
  if package in ('', *_PACKAGES):
    return [name for name in dir(module) if not name.startswith('_')]
  return [
      name
      for name, value in vars(module).items()
      if not name.startswith('_')
      and getattr(value, '__module__', None) == module.__name__
      and (inspect.isclass(value) or inspect.isfunction(value))
  ]


def _signature(value: Any) -> str:
  """The parameters' names and defaults; their types are in the text."""
  try:
    signature = inspect.signature(value)
  except (TypeError, ValueError):
    return ''
  found, is_keyword_only = [], False
  for parameter in signature.parameters.values():
    if parameter.name == 'self':
      continue
    text = parameter.name
    if parameter.kind == parameter.VAR_POSITIONAL:
      text, is_keyword_only = f'*{text}', True
    elif parameter.kind == parameter.VAR_KEYWORD:
      text = f'**{text}'
    elif parameter.kind == parameter.KEYWORD_ONLY and not is_keyword_only:
      found.append('*')
      is_keyword_only = True
    if parameter.default is not parameter.empty:
      default = parameter.default
      is_plain = isinstance(default, (bool, int, float, str, tuple, type(None)))
      is_plain &= not hasattr(default, '_fields')  # It may hold functions.
      if isinstance(default, enum.Enum):
        text += f'={default}'
      else:
        text += f'={default!r}' if is_plain else '=...'
    found.append(text)
  return f'({", ".join(found)})'


def _text(value: Any) -> list[str]:
  # Not `getdoc`, which takes a base class's for an override without one.
  doc = value.__doc__
  return ['```text', inspect.cleandoc(doc), '```', ''] if doc else []


def _entry(name: str, value: Any) -> list[str]:
  lines = [f'### `{name}`', '']
  is_error = inspect.isclass(value) and issubclass(value, BaseException)
  if not is_error:
    short = name.rpartition('.')[2]
    lines += ['```python', f'{short}{_signature(value)}', '```', '']
  lines += _text(value)
  if not inspect.isclass(value):
    return lines
  for member_name, member in members(value).items():
    if inspect.isfunction(member) and member.__doc__:
      lines += [f'**`.{member_name}{_signature(member)}`**', '', *_text(member)]
    elif isinstance(member, property) and member.fget.__doc__:
      lines += [f'**`.{member_name}`**', '', *_text(member.fget)]
  return lines


def members(value: type) -> dict[str, Any]:
  """Returns the public functions and properties that a class itself defines.

  Args:
    value: The class.
  """
  fields = (
      {field.name for field in dataclasses.fields(value)}
      if dataclasses.is_dataclass(value)
      else set(getattr(value, '_fields', ()))
  )
  found = {}
  for name, member in vars(value).items():
    if isinstance(member, (classmethod, staticmethod)):
      member = member.__func__
    is_private = name.startswith('_') and name != '__call__'
    if is_private or name in fields:
      continue
    if inspect.isfunction(member) or isinstance(member, property):
      found[name] = member
  return found


def modules() -> Iterator[tuple[str, Any]]:
  """Yields the modules that the page shows, with their names."""
  yield 'tff_kd', tff_kd
  outer = [name for name in dir(tff_kd) if inspect.ismodule(getattr(tff_kd, name))]
  for name in sorted([*outer, *_INNER]):
    yield f'tff_kd.{name}', operator.attrgetter(name)(tff_kd)


def reference() -> str:
  """The whole page."""
  lines, seen = [_HEAD], set()
  for module_name, module in modules():
    lines += [f'## {module_name}', '', inspect.getdoc(module) or '', '']
    for name in sorted(public_names(module)):
      value = getattr(module, name)
      is_entry = inspect.isclass(value) or inspect.isfunction(value)
      if is_entry and value not in seen:
        seen.add(value)
        lines += _entry(f'{module_name}.{name}', value)
  return '\n'.join(lines).rstrip() + '\n'


if __name__ == '__main__':
  PATH.write_text(reference())
  print(PATH, file=sys.stderr)
