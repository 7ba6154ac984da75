"""Scripts: absl flags and reports, no mathematics."""

from collections.abc import Callable
import functools
import gc
import re
import sys
from typing import Optional
import warnings

from absl import app
from absl import flags
from absl import logging

# Before TensorFlow is imported: `tff_kd` makes its log quiet.
from tff_kd import checks

warnings.filterwarnings('ignore', message='pkg_resources is deprecated')


class UserError(Exception):
  """Raised for an error that the user can mend; shown as one sentence."""


def say(text: str) -> None:
  """Says on standard error what begins and may take long."""
  print(text, file=sys.stderr, flush=True)


def for_users(
    main: Callable[[list[str]], Optional[int]]
) -> Callable[[list[str]], int]:
  """Wraps a script's main so that users see errors as a sentence, without a traceback.

  Args:
    main: Takes arguments that are not flags; returns the exit status. The message of a
      `KeyboardInterrupt` is shown.
  """

  @functools.wraps(main)
  def guarded(argv: list[str]) -> int:
    if len(argv) > 1:
      raise app.UsageError(f'Not a flag: {argv[1:]}.')
    if not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(logging.WARNING)
    try:
      return main(argv) or 0
    except UserError as error:
      print(f'error: {error}', file=sys.stderr)
      return 1
    except KeyboardInterrupt as stopped:
      print(str(stopped) or 'Stopped.', file=sys.stderr)
      return 130

  return guarded


def run(main: Callable[[list[str]], Optional[int]]) -> None:
  """Runs a script like `absl.app.run`; main may import TensorFlow when it runs.

  Args:
    main: Takes the arguments that are not flags; returns the exit status.
  """
  # Graphs are many small objects that stay. With Python's default, the collector looks
  # through all of them so often that a start takes an eighth longer.
  gc.set_threshold(100_000, 20, 20)
  logging.use_absl_handler()
  # Here and not above: it defines a flag.
  from pipelines import topics

  topics.define_help_flags()
  try:
    argv = _parse(sys.argv)
    status = main(argv)
  except app.UsageError as error:
    print(f'error: {error}\nTry --help.', file=sys.stderr)
    status = error.exitcode
  sys.exit(status)


def _parse(argv: list[str]) -> list[str]:
  """Parses the flags; returns the arguments that are none.

  Raises:
    app.UsageError: If a flag is wrong; names what is near.
  """
  try:
    return flags.FLAGS(argv)
  except flags.UnrecognizedFlagError as error:
    near = checks.did_you_mean(error.flagname, sorted(flags.FLAGS)).replace("'", '')
    raise app.UsageError(
        f'There is no flag --{error.flagname}.{near.replace("mean ", "mean --")}'
    ) from error
  except flags.Error as error:
    text = str(error).rstrip('.')
    of_enum = re.search(r'--(\w+)=(.*): value should be one of <(.*)>$', text)
    if of_enum is None:
      raise app.UsageError(f'{text}.') from error
    name, value, names = of_enum[1], of_enum[2], of_enum[3].split('|')
    raise app.UsageError(
        f'--{name} must be one of {", ".join(names)}, found {value!r}.'
        + checks.did_you_mean(value, names)
    ) from error
