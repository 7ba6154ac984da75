"""Scripts: absl flags and plots, no mathematics."""

from collections.abc import Callable
import functools
import gc
import sys
from typing import Optional
import warnings

from absl import app
from absl import flags
from absl import logging

import tff_kd  # noqa: F401  Before TensorFlow is imported: makes its log quiet.

warnings.filterwarnings('ignore', message='pkg_resources is deprecated')


class UserError(Exception):
  """Something that the user can mend; shown as one sentence."""


def for_users(
    main: Callable[[list[str]], Optional[int]], stopped: str = ''
) -> Callable[[list[str]], int]:
  """A script's main whose refusals are a sentence on stderr, without a traceback.

  Args:
    main: Takes the arguments that are no flags; returns the exit status.
    stopped: What to say on Ctrl-C.
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
    except KeyboardInterrupt:
      if stopped:
        print(stopped, file=sys.stderr)
      return 130

  return guarded


def run(main: Callable[[list[str]], Optional[int]]) -> None:
  """As `absl.app.run`, for a main that imports TensorFlow only when it runs.

  Args:
    main: Takes the arguments that are no flags; returns the exit status.
  """
  # Graphs are many small objects that live on: Python's default looks through all of
  # them so often that a start takes an eighth longer.
  gc.set_threshold(100_000, 20, 20)
  logging.use_absl_handler()
  # Here and not above: it defines a flag.
  from pipelines import topics

  topics.define_help_flags()
  argv = app.parse_flags_with_usage(sys.argv)
  try:
    status = main(argv)
  except app.UsageError as error:
    print(f'error: {error}\nTry --help.', file=sys.stderr)
    status = error.exitcode
  sys.exit(status)
