"""The scripts as commands: `tff-kd-train` is `python -m pipelines.train`, and so on."""

from collections.abc import Callable
import runpy


def _command(script: str) -> Callable[[], None]:
  """Returns what runs a script as `python -m` does, with the command's arguments."""

  def run() -> None:
    runpy.run_module(f'pipelines.{script}', run_name='__main__', alter_sys=True)

  return run


audit = _command('audit')
benchmark = _command('benchmark')
centralized = _command('centralized')
compare = _command('compare')
evaluate = _command('evaluate')
export = _command('export')
train = _command('train')
