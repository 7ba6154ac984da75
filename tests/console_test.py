"""The scripts as commands of an installed package."""

import configparser
import importlib.util
import subprocess
import sys

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
  done = subprocess.run(
      [sys.executable, '-c', _LISTED], cwd=helpers.ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  in_the_wheel = set(done.stdout.splitlines())
  on_disk = {
      path.relative_to(helpers.ROOT).as_posix()
      for folder in ('tff_kd', 'pipelines')
      for path in (helpers.ROOT / folder).rglob('*')
      if path.is_file() and '__pycache__' not in path.parts
  }
  assert in_the_wheel == on_disk and 'tff_kd/py.typed' in on_disk


def test_a_command_takes_flags_and_names_what_is_wrong():
  run = subprocess.run(
      [
          sys.executable, '-c', 'from pipelines import console; console.train()',
          '--no_such_flag=1',
      ],
      cwd=helpers.ROOT, capture_output=True, text=True,
  )
  assert run.returncode == 1 and 'no_such_flag' in run.stderr
  assert 'Traceback' not in run.stderr
