"""Python files of the user's own."""

import sys

import pytest

from tff_kd import own_files


def test_a_file_imports_what_is_beside_it(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, 'path', list(sys.path))
  (tmp_path / 'beside_own_rule.py').write_text('FACTOR = 3')
  # A name that is installed, too, is the installed one.
  (tmp_path / 'numpy.py').write_text('raise ImportError')
  file = tmp_path / 'rule.py'
  file.write_text('import numpy\nfrom beside_own_rule import FACTOR\nRULE = FACTOR + 1')
  module = own_files.load(str(file))
  assert module.RULE == 4
  assert own_files.load(str(file)) is module


def test_a_file_that_is_not_there_is_named(tmp_path):
  with pytest.raises(ValueError, match='There is no file .*nothing.py'):
    own_files.load(str(tmp_path / 'nothing.py'))
