"""The benchmark as a user runs it, on a case of seconds."""

import functools
import json

import pytest

from tests import helpers


_run = functools.partial(helpers.script, 'pipelines.benchmark')


_SIDES = """
import contextlib
from absl import flags
from pipelines import benchmark
from pipelines import benchmark_work

flags.FLAGS(['benchmark'])
case = benchmark_work.Case('fed_distillation', 2, 20)
with contextlib.ExitStack() as stack:
  for name in ('floor', 'ours'):
    run_round = benchmark._SIDES[name].prepare(case, stack)()
    run_round(2)
    print(name)
"""


def test_the_sides_run_rounds():
  assert helpers.python(_SIDES).stdout == 'floor\nours\n'


def _check_memory(results, folder):
  assert results['memory']['rounds'] == [1, 2, 3]
  assert all(mib > 100 for mib in results['memory']['mib'])
  assert (folder / 'speed.png').stat().st_size > 10_000


_LONG = ('--scaling=', '--long_rounds=3', '--long_clients=1,3')


@pytest.mark.slow
def test_memory_over_rounds(tmp_path):
  done = _run('--cases=', *_LONG, f'--output_dir={tmp_path}')
  assert 'rounds of 1 to 3 clients' in done.stdout
  _check_memory(json.loads((tmp_path / 'results.json').read_text()), tmp_path)


# Starts Python six times.
@pytest.mark.slow
def test_a_small_case(tmp_path):
  done = _run(
      '--cases=mlp-2x20', *_LONG, '--rounds=3', '--warm_up=1',
      f'--output_dir={tmp_path}',
  )
  assert 'mlp-2x20' in done.stdout and 'rounds of 1 to 3 clients' in done.stdout
  results = json.loads((tmp_path / 'results.json').read_text())
  (case,) = results['cases']
  # Where it is installed, it takes part.
  sides = {'floor', 'tff', 'memory', 'ours'}
  assert set(case['seconds']) - {'pfl'} == sides
  assert ('pfl' in case['seconds']) != ('Without pfl' in done.stderr)
  assert all(len(times) == 3 for times in case['all_seconds'].values())
  for found in case['sides'].values():
    assert set(found) == {'import_s', 'build_s', 'first_round_s', 'peak_mib'}
    assert min(found.values()) > 0
  # Ours starts nothing; TFF's has its worker's memory, too.
  assert case['sides']['tff']['peak_mib'] > case['sides']['floor']['peak_mib']
  _check_memory(results, tmp_path)


@pytest.mark.parametrize(
    'case',
    ['rnn-10x20', *helpers.slow_each('mlp', 'mlp-10', 'mlp-10x30', 'mlp-0x20')],
)
def test_a_bad_case_is_a_sentence(case):
  done = _run(f'--cases={case}', status=1)
  assert f"'{case}' is not MODEL-CLIENTSxEXAMPLES" in done.stderr


@pytest.mark.parametrize(
    'flag, message',
    [
        ('--long_clients=9,3', "'9,3' is not LOW,HIGH"),
        helpers.slow('--long_clients=3', "'3' is not LOW,HIGH"),
        ('--scaling=10,few', "'few' is not a number of clients"),
        helpers.slow('--scaling=20001', "'20001' is not a number of clients"),
    ],
)
def test_numbers_of_clients_that_make_no_sense_are_a_sentence(flag, message):
  done = _run(flag, status=1)
  assert message in done.stderr and 'Traceback' not in done.stderr
