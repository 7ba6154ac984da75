"""The notebooks of the docs, run in real kernels.

That is in `make slow`; what stands in README is in `make test` (`documents_test`), and so
are the names and arguments that the notebooks use.
"""

import os
import re
import signal
import threading
import time

import nbclient
import nbformat
import pytest

from tests import helpers
from tff_kd import own_files

run_notebooks = own_files.load(f'{helpers.ROOT}/docs/run_notebooks.py')
_NAMES = sorted(path.stem for path in run_notebooks.NOTEBOOKS.glob('*.ipynb'))
# Fewer rounds, and one pass of the clients over their examples where there are five.
_SHORTER = {
    'quickstart': [('num_epochs=5', 'num_epochs=1'), ('num_rounds=15', 'num_rounds=2')],
    'tutorial': [
        ('epochs=5', 'epochs=1'), ('num_rounds = 10', 'num_rounds = 1'),
        ('num_rounds=10', 'num_rounds=1'),
    ],
}
# Of the training that is interrupted.
_MANY_ROUNDS = 1000


def _read(name):
  return nbformat.read(run_notebooks.NOTEBOOKS / f'{name}.ipynb', as_version=4)


def _shortened(name):
  notebook = _read(name)
  for found, shorter in _SHORTER[name]:
    assert any(found in cell.source for cell in notebook.cells)
    for cell in notebook.cells:
      cell.source = cell.source.replace(found, shorter)
  return notebook


def _printed(cells):
  """What the cells have written to standard output and to standard error."""
  return {
      name: ''.join(
          output.text for cell in cells for output in cell.get('outputs', ())
          if output.output_type == 'stream' and output.name == name
      )
      for name in ('stdout', 'stderr')
  }


def _num_pictures(notebook):
  return sum(
      'image/png' in output.get('data', {})
      for cell in notebook.cells for output in cell.get('outputs', ())
  )


@pytest.mark.slow
@pytest.mark.parametrize('is_whole', [False, True])
def test_the_tutorial_runs(is_whole, tmp_path):
  notebook = _read('tutorial') if is_whole else _shortened('tutorial')
  run_notebooks.run(notebook, str(tmp_path))
  printed = _printed(notebook.cells)
  scores = dict(re.findall(r'(.+): (0\.\d+)', printed['stdout']))
  assert len(scores) == 7
  if is_whole:
    assert float(scores['With 200 labels']) > float(scores['FedAvg of tff_kd'])
  assert printed['stderr'].count('training: 100%') == 5
  assert _num_pictures(notebook) == 3
  assert (tmp_path / 'tutorial' / 'student.keras').exists()


@pytest.mark.slow
def test_the_quickstart_runs_as_it_is(tmp_path):
  notebook = _read('quickstart')
  run_notebooks.run(notebook, str(tmp_path))
  scores = dict(re.findall(r'(.+): .* (0\.\d+)', _printed(notebook.cells)['stdout']))
  assert float(scores['student']) > float(scores['student of FedAvg'])


def _interrupt_after_a_round(cell, kernel_pid):
  """Waits until the bar shows a round, and does what the stop button does."""
  deadline = time.monotonic() + helpers.HANGING_S
  while not re.search(rf'\b[1-9]\d*/{_MANY_ROUNDS}\b', _printed([cell])['stderr']):
    if time.monotonic() > deadline:
      break
    time.sleep(0.1)
  os.kill(kernel_pid, signal.SIGINT)


@pytest.mark.slow
def test_the_quickstart_runs_and_a_training_is_interrupted_and_run_again(tmp_path):
  notebook = _shortened('quickstart')
  (number,) = (
      i for i, cell in enumerate(notebook.cells) if cell.source.startswith('result = ')
  )
  training = notebook.cells[number]
  interrupted = nbformat.v4.new_code_cell(
      training.source.replace('num_rounds=2', f'num_rounds={_MANY_ROUNDS}')
  )
  say = 'print(result.interrupted, result.round_num, len(result.history))'
  notebook.cells[number : number + 1] = [
      interrupted, nbformat.v4.new_code_cell(say), training,
      nbformat.v4.new_code_cell(say),
  ]
  client = nbclient.NotebookClient(
      notebook, timeout=run_notebooks.CELL_TIMEOUT_S, kernel_name=run_notebooks.KERNEL,
      resources={'metadata': {'path': str(tmp_path)}},
  )
  with client.setup_kernel(env=run_notebooks.kernel_environment()):
    for index, cell in enumerate(notebook.cells):
      if cell is interrupted:
        pid = client.km.provisioner.pid
        threading.Thread(target=_interrupt_after_a_round, args=(cell, pid)).start()
      client.execute_cell(cell, index)
  first, again = (
      _printed([notebook.cells[number + i]])['stdout'].split() for i in (1, 3)
  )
  assert first[0] == 'True' and 1 <= int(first[1]) < _MANY_ROUNDS
  assert first[1] == first[2] and again == ['False', '2', '2']
  printed = _printed(notebook.cells[number + 4 :])
  models = re.findall(r'(.+): .* weights, test accuracy 0\.\d+', printed['stdout'])
  assert models == ['student', 'teacher', 'student of FedAvg']
  assert _num_pictures(notebook) == 2 and (tmp_path / 'teacher.keras').exists()


@pytest.mark.parametrize('name', _NAMES)
def test_outputs_are_stored(name):
  """So that they can be read where no kernel is."""
  path = run_notebooks.NOTEBOOKS / f'{name}.ipynb'
  notebook = _read(name)
  nbformat.validate(notebook)
  cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
  assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
  assert _num_pictures(notebook) >= 2 and path.stat().st_size < 500_000
  for cell in notebook.cells:
    if cell.cell_type == 'markdown':
      for target in re.findall(r'\]\(([^)#:]+)\)', cell.source):
        assert (path.parent / target).exists(), target
  text = path.read_text()
  for word in ('Traceback', 'Warning', 'site-packages'):
    assert word not in text, word
  for cell in cells:
    said = [cell.source]
    for output in cell.outputs:
      said += [output.get('text', ''), output.get('data', {}).get('text/plain', '')]
    # An absolute path would be of the machine that ran it.
    assert not any(re.search(r'(?<![\w./:])/\w+/', part) for part in said), said
