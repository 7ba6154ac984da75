"""Functions are short and have few parameters; exceptions are listed with a reason."""

import ast
import configparser
import inspect
import re
import textwrap

import pytest

from tests import helpers
import tff_kd
from tff_kd import own_files

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


_SECTION = re.compile(r'(?m)^(Args|Attributes|Returns|Yields|Raises):$')
# Words that end in an s and are no verbs.
_NOUNS = ('Bytes', 'Clients', 'Labels', 'Logits', 'Models', 'Terms', 'This', 'Weights')


def _api():
  """Yields the name of the module, the name, and each function or class of the page."""
  build_api = own_files.load(f'{helpers.ROOT}/docs/build_api.py')
  seen = set()
  for _, module in build_api.modules():
    for name in build_api.public_names(module):
      value = getattr(module, name)
      if not (inspect.isclass(value) or inspect.isfunction(value)) or value in seen:
        continue
      seen.add(value)
      yield value.__module__, value.__qualname__, value
      if inspect.isclass(value):
        for member_name, member in build_api.members(value).items():
          if not any(hasattr(base, member_name) for base in value.__mro__[1:]):
            yield value.__module__, f'{value.__qualname__}.{member_name}', member


class _Body(ast.NodeVisitor):
  """What a function returns and raises, without the functions that it defines."""

  def __init__(self, function):
    self.returns, self.raised = False, set()
    for statement in ast.parse(textwrap.dedent(inspect.getsource(function))).body[0].body:
      self.visit(statement)

  def visit_FunctionDef(self, node):
    pass

  visit_AsyncFunctionDef = visit_ClassDef = visit_Lambda = visit_FunctionDef

  def visit_Return(self, node):
    is_none = isinstance(node.value, ast.Constant) and node.value.value is None
    self.returns |= node.value is not None and not is_none

  def visit_Raise(self, node):
    name = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
    if isinstance(name, ast.Name) and name.id in ('TypeError', 'ValueError'):
      self.raised.add(name.id)


def _faults_of_docstring(value):
  """Yields what a docstring lacks."""
  doc = value.__doc__
  if not doc:
    yield 'has no docstring'
    return
  if inspect.isclass(value) or isinstance(value, property):
    return
  head, *parts = _SECTION.split(inspect.cleandoc(doc))
  sections = dict(zip(parts[::2], parts[1::2]))
  first = head.split()[0]
  if not re.fullmatch('[A-Z][a-z]+s', first) or first in _NOUNS:
    yield f'begins with {first!r}, which is no verb'
  for name in inspect.signature(value).parameters:
    described = rf'(?m)^  (\*{{0,2}}\w+, )*\*{{0,2}}{name}(, \w+)*: '
    if name not in ('self', 'cls') and not re.search(described, sections.get('Args', '')):
      yield f'does not describe the argument {name!r}'
  body = _Body(inspect.unwrap(value))
  if body.returns and 'Returns' not in sections and first != 'Returns':
    yield 'does not say what it returns'
  for error in body.raised:
    if error not in sections.get('Raises', ''):
      yield f'does not say when it raises a {error}'


def test_docstrings_of_the_api_are_whole():
  faults = [
      f'{module}: {name} {fault}'
      for module, name, value in _api()
      for fault in _faults_of_docstring(value)
  ]
  assert not faults, '\n'.join(faults)


# The first is about what is imported before TFF is there.
_INTERNALS = (
    'tff_kd/compat.py', 'tff_kd/internals.py', 'tff_kd/runtime/tff_internals.py',
)
_OF_LIBRARIES = re.compile(
    r'\btf\.__internal__|\bkeras\.src|\btensorflow\.python\b'
    r'|\btensorflow_federated\.(python|proto)\b'
    # An attribute with an underscore of something that is not our own.
    r'|getattr\([^()]*, [\'"]_(?!_|fields)'
    r'|\b(tf|tff|keras|graph|layer|loop|metric|model|optimizer|tensor|variable)\._[a-z]'
)


def test_names_that_are_not_public_are_used_in_one_place():
  for folder in ('tff_kd', 'pipelines'):
    for path in (helpers.ROOT / folder).rglob('*.py'):
      if str(path.relative_to(helpers.ROOT)) not in _INTERNALS:
        found = _OF_LIBRARIES.search(path.read_text())
        assert not found, f'{path} uses {found[0]}; see tff_kd/internals.py.'


def test_the_package_says_its_version_and_that_it_has_type_hints():
  config = configparser.ConfigParser()
  config.read(helpers.ROOT / 'setup.cfg')
  assert config['metadata']['version'] == 'attr: tff_kd.__version__'
  assert re.fullmatch(r'\d+\.\d+\.\d+', tff_kd.__version__)
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
