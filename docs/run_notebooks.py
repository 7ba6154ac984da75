"""Runs the notebooks of docs/notebooks and stores the outputs in them.

  python docs/run_notebooks.py
  python docs/run_notebooks.py quickstart

Each runs in a kernel of this Python, in a temporary folder. Run it after a change of a
notebook's code; tests/notebooks_test.py runs the notebooks, too.
"""

import os
import pathlib
import sys
import tempfile
import time

import nbclient
import nbformat

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / 'docs' / 'notebooks'
KERNEL = 'python3'  # Of the Python that runs this.
# For a cell that hangs: a busy machine may take many times what an idle one takes.
CELL_TIMEOUT_S = 1800


def kernel_environment() -> dict[str, str]:
  """Returns the environment of a kernel that finds tff_kd."""
  paths = [str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
  return {
      **os.environ,
      'PYTHONPATH': os.pathsep.join(paths),
      # tqdm's, where there are no widgets: the bar is then text.
      'PYTHONWARNINGS': 'ignore:IProgress not found',
  }


def run(notebook: nbformat.NotebookNode, folder: str) -> nbformat.NotebookNode:
  """Runs all cells of a notebook in a new kernel.

  Args:
    notebook: The notebook, which gets the outputs.
    folder: Where the kernel runs.

  Returns:
    The notebook.

  Raises:
    nbclient.exceptions.CellExecutionError: If a cell fails.
  """
  client = nbclient.NotebookClient(
      notebook, timeout=CELL_TIMEOUT_S, kernel_name=KERNEL, record_timing=False,
      coalesce_streams=True,  # Of a progress bar, what is there at the end.
      resources={'metadata': {'path': folder}},
  )
  return client.execute(env=kernel_environment())


def main(names: list[str]) -> None:
  for name in names or sorted(path.stem for path in NOTEBOOKS.glob('*.ipynb')):
    path = NOTEBOOKS / f'{name}.ipynb'
    notebook = nbformat.read(path, as_version=4)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
      run(notebook, folder)
    notebook.metadata.language_info = {'name': 'python'}  # Of any version.
    nbformat.write(notebook, path)
    print(f'{path.relative_to(ROOT)}: {time.monotonic() - start:.0f} s')


if __name__ == '__main__':
  main(sys.argv[1:])
