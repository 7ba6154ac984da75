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
