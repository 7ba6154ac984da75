"""Temporary folders: their owner's only, and gone however their process ended."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest
import tensorflow as tf

from tests import helpers
from tff_kd import graphs
from tff_kd import temporary

# Makes a file, says where, and does what its argument says.
_SCRIPT = """
import os, pathlib, sys, time
from tff_kd import temporary
def make():
  path = temporary.new_directory('clients_') / 'examples.bin'
  path.write_text('secret')
  print(path, flush=True)
make()
"""


def _start(folder, then):
  """A process that has made its file: itself, and the file's path."""
  process = subprocess.Popen(
      [sys.executable, '-c', _SCRIPT + then], cwd=helpers.ROOT, text=True,
      stdout=subprocess.PIPE, stdin=subprocess.PIPE,
      env={**os.environ, 'TMPDIR': str(folder)},
  )
  return process, pathlib.Path(process.stdout.readline().strip())


def _run(folder, then=''):
  """Likewise, when it has ended."""
  process, path = _start(folder, then)
  process.communicate()
  assert process.returncode == 0
  return path


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_the_next_start_removes_what_a_killed_process_left(tmp_path, number):
  killed, left = _start(tmp_path, 'time.sleep(60)')
  alive, kept = _start(tmp_path, 'sys.stdin.read()')
  with killed, alive:
    killed.send_signal(number)
    assert killed.wait() == -number
    assert left.exists()
    _run(tmp_path)
    assert not left.exists()
    assert list(tmp_path.iterdir()) == [kept.parents[1]]
    assert kept.read_text() == 'secret'
    alive.communicate()
  assert not list(tmp_path.iterdir())


def test_a_process_that_never_reaches_its_exit_handlers(tmp_path):
  left = _run(tmp_path, 'os._exit(0)')
  assert left.exists()
  _run(tmp_path)
  assert not list(tmp_path.iterdir())


def test_a_forked_process_has_a_folder_of_its_own(tmp_path):
  """Its end removes nothing of its parent's; what it uses outlives a killed parent."""
  then = """
parent = next(pathlib.Path(os.environ['TMPDIR']).glob('*/*/*'))
child = os.fork()
if not child:
  make()
  sys.exit()
os.waitpid(child, 0)
assert parent.exists() and len(os.listdir(os.environ['TMPDIR'])) == 1
"""
  _run(tmp_path, then)
  assert not list(tmp_path.iterdir())
  then = """
if os.fork():
  os._exit(0)
os.close(1)
sys.stdin.read()
"""
  process, path = _start(tmp_path, then)
  process.wait()
  _run(tmp_path)
  assert path.exists()
  process.communicate()


def test_only_the_owner_reads_the_folder(tmp_path):
  kept = _start(tmp_path, 'sys.stdin.read()')
  with kept[0]:
    for folder in kept[1].parents[:2]:
      assert folder.stat().st_mode & 0o777 == 0o700
    kept[0].communicate()


def test_what_is_not_ours_stays(tmp_path):
  for name in ('tff_kd_elsewhere_1_abcdefgh', 'tff_kd_mine', 'other'):
    (tmp_path / name).mkdir()
  host = os.uname().nodename
  (tmp_path / f'tff_kd_{host}_1_abcdefgh').symlink_to(tmp_path / 'other')
  _run(tmp_path)
  assert len(list(tmp_path.iterdir())) == 4


def test_generated_code_is_in_the_folder():
  def double_if_positive(x):
    if x > 0:
      x = x * 2
    return x

  before = set(sys.modules)
  traced = tf.function(graphs.user_function(double_if_positive), autograph=False)
  assert traced(tf.constant(3)).numpy() == 6
  generated = [its for its in set(sys.modules) - before if its.startswith('__autograph')]
  assert generated
  mine = temporary.new_directory('any_').parent
  assert {pathlib.Path(sys.modules[its].__file__).parent for its in generated} == {mine}
