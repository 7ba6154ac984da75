"""TensorFlow's log: quiet by default, as the user says otherwise, and never lost."""

import shutil
import signal

import pytest

from tests import helpers
from tff_kd import quiet

_LINES = (
    'WARNING: All log messages before absl::InitializeLog() is called are written',
    'I0000 00:00:1795812589.579664    1258 cudart_stub.cc:31] No cuda drivers.',
    'W0000 00:00:1795812589.579664    1258 tpu.cc:7] Something.',
    'E0000 00:00:1795812589.579664    1258 cuda_platform.cc:52] No device.',
    'F0000 00:00:1795812589.579664    1258 cpu_feature_guard.cc:1] No AVX.',
    'a warning of Python: I0000 is no number',
)


def _python(code, **kwargs):
  """What the code writes to standard output, and the lines to standard error."""
  done = helpers.new_python(f'import os, sys\n{code}', **kwargs)
  return done.stdout.strip(), done.stderr.splitlines()


def _writing(level, then=''):
  lines = '\\n'.join(_LINES) + '\\n'
  return (
      'from tff_kd import quiet\n'
      f'with quiet.filtered_stderr({level}):\n'
      f'  os.write(2, b"""{lines}""")\n'
      f'  {then}\n'
      'os.write(2, b"I0000 00:00:1.0 1 later.cc:1] after")\n'
  )


@pytest.mark.parametrize('level, shown', [(1, 2), (2, 3), (3, 4)])
def test_lines_below_the_level_are_left_out(level, shown):
  if not shutil.which('grep'):
    pytest.skip('There is no grep.')
  _, lines = _python(_writing(level))
  assert lines == [*_LINES[shown:], 'I0000 00:00:1.0 1 later.cc:1] after']


def test_what_is_written_before_a_crash_is_shown():
  _, lines = _python(_writing(3, 'os.abort()'), status=-signal.SIGABRT)
  assert set(_LINES[4:]) <= set(lines)


def test_without_grep_all_lines_are_shown():
  _, lines = _python(f'os.environ["PATH"] = "nowhere"\n{_writing(3)}')
  assert lines[:-1] == list(_LINES)


def test_without_a_standard_error_it_goes_on():
  code = 'os.close(2)\nfrom tff_kd import quiet\nwith quiet.filtered_stderr(3): print(1)'
  assert _python(code)[0] == '1'


@pytest.mark.parametrize('given', [None, '0', '1', '3', 'x'])
def test_the_users_level_holds(given):
  code = (
      'import tff_kd\n'
      'finders = [its for its in sys.meta_path if "quiet" in type(its).__module__]\n'
      f'print(os.environ["{quiet.LEVEL}"], len(finders), "tensorflow" in sys.modules)'
  )
  printed, _ = _python(code, **({} if given is None else {quiet.LEVEL: given}))
  level, filters, has_tensorflow = printed.split()
  assert level in ('2', '3') if given is None else level == given
  assert int(filters) == (given not in ('0', 'x')) and has_tensorflow == 'False'


def test_after_tensorflow_nothing_is_set():
  code = (
      'sys.modules["tensorflow"] = sys\nimport tff_kd\n'
      f'print(os.environ.get("{quiet.LEVEL}"))'
  )
  assert _python(code)[0] == 'None'
