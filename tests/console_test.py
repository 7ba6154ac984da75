"""The scripts as commands of an installed package."""

import configparser
import importlib.util

import pytest

from tests import helpers


def _commands():
  config = configparser.ConfigParser()
  config.read(helpers.ROOT / 'setup.cfg')
  lines = config['options.entry_points']['console_scripts'].split('\n')
  return dict(line.split(' = ') for line in lines if line)


@pytest.mark.parametrize('command, target', _commands().items())
def test_each_command_is_a_script(command, target):
  module, _, name = target.partition(':')
  assert module == 'pipelines.console' and command == f'tff-kd-{name}'
  assert importlib.util.find_spec(f'pipelines.{name}') is not None


_LISTED = '''
import pathlib
from setuptools import dist
distribution = dist.Distribution({'script_name': 'setup.py'})
distribution.parse_config_files()
build = distribution.get_command_obj('build_py')
build.ensure_finalized()
files = [pathlib.PurePath(name) for name in build.get_source_files()]
for _, folder, _, names in build.data_files:
  files += [pathlib.PurePath(folder, name) for name in names]
print(*(file.as_posix() for file in files), sep=chr(10))
'''


def test_a_wheel_has_all_files():
  in_the_wheel = set(helpers.new_python(_LISTED).stdout.splitlines())
  on_disk = {
      path.relative_to(helpers.ROOT).as_posix()
      for folder in ('tff_kd', 'pipelines')
      for path in (helpers.ROOT / folder).rglob('*')
      if path.is_file() and '__pycache__' not in path.parts
  }
  assert in_the_wheel == on_disk and 'tff_kd/py.typed' in on_disk


def test_a_command_takes_flags_and_names_what_is_wrong():
  code = (
      'import sys; sys.argv.append("--no_such_flag=1");'
      'from pipelines import console; console.train()'
  )
  done = helpers.new_python(code, status=1)
  assert 'no_such_flag' in done.stderr and 'Traceback' not in done.stderr
