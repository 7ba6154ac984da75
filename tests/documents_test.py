"""What README and docs say is run as it stands there."""

import ast
import importlib
import inspect
import json
import re
import shlex
import stat
import subprocess

from absl import flags
import numpy as np
import pytest
import tensorflow as tf

from pipelines import train
from pipelines import train_checks
from pipelines import train_flags
from tests import data_test
from tests import helpers
import tff_kd


def _pages(folder):
  return sorted(f'{folder}/{path.name}' for path in (helpers.ROOT / folder).glob('*.md'))


_DOCS, _RESULTS = ['README.md', *_pages('docs')], _pages('docs/results')
_NOTEBOOKS = sorted(
    str(path.relative_to(helpers.ROOT))
    for path in (helpers.ROOT / 'docs' / 'notebooks').glob('*.ipynb')
)


def _blocks(document, *languages):
  text = (helpers.ROOT / document).read_text()
  if document in _NOTEBOOKS:
    cells = json.loads(text)['cells']
    return [''.join(its['source']) for its in cells if its['cell_type'] == 'code']
  found = re.findall(r'(?ms)^```(\w*)\n(.*?)^```$', text)
  return [block for language, block in found if language in languages]


def _commands():
  """All calls of our scripts: (document, words after `python -m`)."""
  found = []
  for document in _DOCS + _RESULTS:
    for block in _blocks(document, 'sh', 'bash'):
      for line in block.replace('\\\n', ' ').splitlines():
        if line.startswith('python -m pipelines.'):
          words = shlex.split(line, comments=True)
          found.append((document, tuple(words[2:])))
  return found


_COMMANDS = _commands()
# Ray is tried in `ray_test` and `train_flags_test`.
_ELSEWHERE = ('--ray_', '--cache_dir', '--output_dir', '--dry_run')
_TRAIN = sorted({
    tuple(its for its in words[1:] if not its.startswith(_ELSEWHERE))
    for _, words in _COMMANDS
    if words[0] == 'pipelines.train' and '--help' not in words
})
# What is part of another command is tried with that one.
_TRAIN = [its for its in _TRAIN if not any(set(its) < set(other) for other in _TRAIN)]


# Not in the lock: Keras would load it in every start. Its block stands by itself.
_PANDAS = 'import pandas as pd\n'


# A pass of the clients over their examples where there are five, and a smaller teacher.
_SHORTER = {
    'README.md': [
        ('num_epochs=5', 'num_epochs=1'), ("['cnn']", "['mlp_large']"),
        ('num_rounds=3', 'num_rounds=1'),
    ],
    'docs/library.md': [('num_epochs=5', 'num_epochs=1')],
}


def _shortened(document, code):
  for found, shorter in _SHORTER.get(document, ()):
    assert found in code
    code = code.replace(found, shorter)
  return code


# The Python of each of these pages is one script.
_RUN = (
    'README.md', 'docs/library.md', 'docs/bring_your_own.md', 'docs/extending.md',
    'docs/tff_users.md',
)


@pytest.mark.parametrize(
    'document, is_whole',
    [
        ('README.md', False),  # What a user runs first.
        *(helpers.slow(its, its not in _SHORTER) for its in _RUN[1:]),
        *(helpers.slow(document, True) for document in _SHORTER),
    ],
)
def test_the_python_runs(document, is_whole, tmp_path):
  blocks = [
      block for block in _blocks(document, 'python') if _PANDAS not in block
  ]
  if document == 'docs/library.md':
    # The code on privacy says that it goes on where this page's first block ends.
    blocks += _blocks('docs/privacy.md', 'python')
  assert blocks
  code = '\n'.join(blocks)
  done = helpers.python(
      code if is_whole else _shortened(document, code), cwd=tmp_path,
      PYTHONPATH=str(helpers.ROOT),
  )
  if document == 'docs/library.md':
    assert done.stdout.count('sparse_categorical_accuracy') == 3
    assert list(tmp_path.glob('runs/clients/client-*-round-3.npz'))
  if document == 'docs/extending.md':
    printed = dict(line.split(': ', 1) for line in done.stdout.splitlines())
    assert printed['Algorithm'].endswith(', needs transfer set, client state')
    assert printed['Task'] == '160 examples of 4 clients'
    for part in ('Term', 'Rule', 'Companion'):
      assert float(printed[part]) > 0.7, printed
  if document == 'docs/tff_users.md':
    printed = dict(re.findall(r'^(.+): (.+)$', done.stdout, re.M))
    assert printed['Saved'] == 'True'
    assert float(printed['Accuracy']) > 0.8 and float(printed['Worst client']) > 0.6
  if document == 'docs/bring_your_own.md':
    _check_own(dict(line.split(': ', 1) for line in done.stdout.splitlines()))


def _check_own(printed):
  """What was brought is learned."""
  assert printed['CSV'].startswith("['ada', 'ben', 'cleo'] 0.")
  assert float(printed['CSV'].split()[-1]) > 0.7
  assert re.findall(r"'(\w+)': 0\.[6-9]", printed['By name']) == ['ada', 'ben', 'cleo']
  assert printed['TFF client data'].endswith('[30 30 30]')
  assert printed['Datasets'].startswith('[30 30 30] ')
  dtype, accuracy = printed['uint8'].rsplit(' ', 1)
  assert 'uint8' in dtype and float(accuracy) > 0.8
  assert printed['Text'] == '1'
  assert printed['Frozen body'] == 'up 520.0 bytes a client'  # (64 + 1) * 2 floats.
  assert float(printed['Binary'].split()[-1]) > 0.8
  assert float(printed['Multi-label']) > 0.8


def test_the_python_with_pandas_runs(capsys):
  pytest.importorskip('pandas')
  found = [
      block for page in _DOCS for block in _blocks(page, 'python') if _PANDAS in block
  ]
  assert len(found) == 1
  exec(found[0], {})
  assert capsys.readouterr().out == "DataFrame: ['ada', 'ben', 'cleo'] [2 1 1]\n"


def test_no_other_page_has_python():
  tested = (*_RUN, 'docs/privacy.md')
  for document in {*_DOCS, *_RESULTS} - {*tested, 'docs/api.md'}:
    assert not _blocks(document, 'python'), document


class _Names(ast.NodeVisitor):
  """Looks up what a page imports from this package and TFF, and what it calls with."""

  def __init__(self):
    self.known, self.num_calls = {}, 0

  def visit_Import(self, node):
    for its in node.names:
      if its.name.startswith('tff_kd') and its.asname is None:
        importlib.import_module(its.name)
        self.known['tff_kd'] = tff_kd

  def visit_ImportFrom(self, node):
    if node.module.startswith('tff_kd'):
      for its in node.names:
        found = getattr(importlib.import_module(node.module), its.name)
        self.known[its.asname or its.name] = found

  def _found(self, node):
    """What a dotted name is; `None` if it does not begin with what is imported."""
    if isinstance(node, ast.Name):
      return self.known.get(node.id)
    if isinstance(node, ast.Attribute):
      owner = self._found(node.value)
      is_known = inspect.ismodule(owner) or inspect.isclass(owner)
      return getattr(owner, node.attr) if is_known else None
    return None

  def visit_Attribute(self, node):
    self._found(node)
    self.generic_visit(node)

  def visit_Call(self, node):
    called = self._found(node.func)
    if callable(called):
      named = {its.arg: None for its in node.keywords if its.arg}
      signature = inspect.signature(called)
      is_whole = len(named) == len(node.keywords) and not any(
          isinstance(its, ast.Starred) for its in node.args
      )
      bind = signature.bind if is_whole else signature.bind_partial
      bind(*(None for its in node.args if not isinstance(its, ast.Starred)), **named)
      self.num_calls += 1
    self.generic_visit(node)


@pytest.mark.parametrize('document', (*_RUN, 'docs/privacy.md', *_NOTEBOOKS))
def test_the_names_and_arguments_of_the_python_are_there(document):
  names = _Names()
  if document == 'docs/privacy.md':  # It goes on where that page's first block ends.
    names.visit(ast.parse(_blocks('docs/library.md', 'python')[0]))
  for block in _blocks(document, 'python'):
    names.visit(ast.parse(block))
  assert names.num_calls > 4


@pytest.fixture(scope='module')
def workplace(tmp_path_factory):
  """What the commands of the documents find: data, and the folder of a run."""
  folder = tmp_path_factory.mktemp('workplace')
  data = folder / 'DIR'
  data.mkdir()
  data_test._write_idx(data, n_train=6000, n_test=200, zipped=True)
  rng = np.random.default_rng(0)
  for name in ('server', *(f'client_{i}' for i in range(4))):
    np.savez(data / f'{name}.npz', x=rng.normal(size=(60, 2)), y=rng.integers(0, 3, 60))
  run = folder / 'runs' / 'mine'
  run.mkdir(parents=True)
  values = {name: flag.default for name, flag in train_flags.own_flags().items()}
  (run / 'config.json').write_text(json.dumps({'flags': values, 'given': []}))
  (folder / 'examples').symlink_to(helpers.ROOT / 'examples')
  return folder


@pytest.mark.parametrize('arguments', _TRAIN, ids=' '.join)
def test_flags_of_training_go_together(arguments, workplace, monkeypatch):
  monkeypatch.chdir(workplace)
  with helpers.flags_of(*arguments):
    train_flags.take_defaults()
    train_checks.run()


# What reads files is built here, too; for the others that takes seconds each.
_OF_FILES = ('--config', '--task=examples', '--task=idx')


@pytest.mark.parametrize(
    'arguments',
    [
        pytest.param(
            its, id=' '.join(its),
            marks=() if its[0].startswith(_OF_FILES) else pytest.mark.slow,
        )
        for its in _TRAIN
    ],
)
def test_what_would_be_trained_can_be(arguments, workplace, monkeypatch):
  monkeypatch.chdir(workplace)
  if '--device=GPU' in arguments and not tf.config.list_logical_devices('GPU'):
    said = helpers.refused_here(*arguments, '--dry_run')
    assert "There is no device 'GPU'. TensorFlow sees CPU:0" in said
    return
  assert 'Nothing was trained' in helpers.train_here(*arguments, '--dry_run')


@pytest.mark.parametrize('script', sorted({words[0] for _, words in _COMMANDS}))
def test_the_scripts_know_the_flags(script):
  """Of each command; what they then do is tested with the scripts."""
  calls = sorted({words[1:] for _, words in _COMMANDS if words[0] == script})
  calls = [its for its in calls if '--help' not in its]
  check = (
      f'import json, sys; from absl import flags; import {script}\n'
      'for call in json.loads(sys.argv[1]):\n'
      '  flags.FLAGS.unparse_flags()\n'
      '  assert flags.FLAGS(["x", *call]) == ["x"], call'
  )
  helpers.python(check, json.dumps(calls))


def _anchors(path):
  """Those that GitHub makes of the headings of a page."""
  headings = re.findall(r'(?m)^#+ (.+)$', path.read_text())
  return {re.sub(r'[^\w -]', '', each.lower()).replace(' ', '-') for each in headings}


def test_links_lead_to_files_and_headings():
  for document in _DOCS + _RESULTS:
    path = helpers.ROOT / document
    for target, anchor in re.findall(r'\]\(([^)#:]*)(?:#([^)]*))?\)', path.read_text()):
      page = path.parent / target if target else path
      assert page.exists(), (document, target)
      assert not anchor or anchor in _anchors(page), (document, target, anchor)


def test_the_api_page_is_the_docstrings():
  done = helpers.python(
      'import build_api; print(build_api.reference(), end="")',
      PYTHONPATH=f'{helpers.ROOT}:{helpers.ROOT / "docs"}',
  )
  assert done.stdout == (helpers.ROOT / 'docs' / 'api.md').read_text(), (
      'The docstrings have changed: run python docs/build_api.py.'
  )


def test_all_flags_have_a_topic():
  from pipelines import topics

  of_topics = [flag.name for its in topics.by_topic().values() for flag in its]
  assert sorted(of_topics) == sorted(train_flags.own_flags())
  assert all(flag.help for flag in flags.FLAGS.get_key_flags_for_module(train))


def test_the_wrong_python_is_one_sentence(tmp_path):
  fake = tmp_path / 'python'
  fake.write_text(
      '#!/bin/sh\ncase "$1" in --version) echo Python 3.13.1;; *) exit 1;; esac\n'
  )
  fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
  done = subprocess.run(
      ['make', 'install', f'PYTHON={fake}', f'VENV={tmp_path / "venv"}'],
      cwd=helpers.ROOT, capture_output=True, text=True, timeout=helpers.HANGING_S,
      check=False,
  )
  assert done.returncode != 0
  lines = done.stderr.strip().splitlines()
  assert lines[0].startswith('tff_kd needs Python 3.13, 3.12 or 3.11 that runs')
  assert f'but {fake} is none' in lines[0] and 'make PYTHON=' in lines[0]
  assert len(lines) == 2  # That, and make's own line.
