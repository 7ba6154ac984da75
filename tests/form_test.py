"""Functions are short and have few parameters; exceptions are listed with a reason."""

import ast
import configparser
import re

import pytest

from tests import helpers
import tff_kd

_LINES, _PARAMETERS = 60, 8


def _is_builder(node):
  """Whether options of a builder are spelled out: that is what it is for."""
  return node.name.startswith('build_') and any(
      argument.arg == 'options' for argument in node.args.kwonlyargs
  )


def _docstring_lines(node):
  if not ast.get_docstring(node):
    return 0
  return node.body[0].end_lineno - node.body[0].lineno + 1


def _long_functions():
  """By `folder/file.py name`, what is too long or has too many parameters."""
  found = {}
  for folder in ('tff_kd', 'pipelines', 'examples', 'docs'):
    for path in (helpers.ROOT / folder).rglob('*.py'):
      for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef) or _is_builder(node):
          continue
        lines = node.end_lineno - node.lineno + 1 - _docstring_lines(node)
        names = [a.arg for a in (*node.args.args, *node.args.kwonlyargs)]
        count = len([name for name in names if name not in ('self', 'cls')])
        if lines > _LINES or count > _PARAMETERS:
          name = f'{path.relative_to(helpers.ROOT)} {node.name}'
          found[name] = f'{lines} lines, {count} parameters'
  return found


def test_long_functions_are_listed_with_a_reason():
  notes = (helpers.ROOT / 'BUILD_NOTES.md').read_text()
  section = notes.partition('## Long functions\n')[2].partition('\n## ')[0]
  listed = dict(re.findall(r'(?m)^- `([\w/.]+ \w+)`: (.+)', section))
  found = _long_functions()
  missing = {name: size for name, size in found.items() if name not in listed}
  assert not missing, f'Split these, or list them with a reason: {missing}'
  gone = set(listed) - set(found)
  assert not gone, f'These are short now, take them off the list: {gone}'


def test_version_is_that_of_the_package_metadata():
  config = configparser.ConfigParser()
  config.read(helpers.ROOT / 'setup.cfg')
  assert config['metadata']['version'] == 'attr: tff_kd.__version__'
  assert re.fullmatch(r'\d+\.\d+\.\d+', tff_kd.__version__)


def test_package_says_that_it_has_type_hints():
  config = configparser.ConfigParser()
  config.read(helpers.ROOT / 'setup.cfg')
  assert config['options.package_data']['tff_kd'] == 'py.typed'
  assert (helpers.ROOT / 'tff_kd' / 'py.typed').is_file()


@pytest.mark.parametrize('folder', ['tff_kd/algorithms', 'tff_kd/rounds/options.py'])
def test_an_algorithm_imports_no_other(folder):
  root = helpers.ROOT / folder
  for path in root.glob('*.py') if root.is_dir() else [root]:
    if path.name == '__init__.py':
      continue
    imported = re.findall(r'(?m)^(?:from|import) (tff_kd[\w.]*)', path.read_text())
    assert set(imported) <= {'tff_kd', 'tff_kd.algorithms'}, path
