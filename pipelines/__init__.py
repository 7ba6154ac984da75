"""Scripts: absl flags and plots, no mathematics."""

from collections.abc import Callable
import os
import sys
from typing import Optional
import warnings

from absl import app
from absl import logging

# Before TensorFlow is imported: keeps its start-up notes off the screen.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
warnings.filterwarnings('ignore', message='pkg_resources is deprecated')


class UserError(Exception):
  """Something that the user can mend; shown as one sentence."""


def run(main: Callable[[list[str]], Optional[int]]) -> None:
  """As `absl.app.run`, for a main that imports TensorFlow only when it runs.

  In a process whose TensorFlow was first imported under `absl.app.run`, Keras cannot
  build functional models (TensorFlow 2.14), so that one does not serve.

  Args:
    main: Takes the arguments that are no flags; returns the exit status.
  """
  logging.use_absl_handler()
  # Here and not above: it defines a flag.
  from pipelines import topics

  topics.define_help_flags()
  argv = app.parse_flags_with_usage(sys.argv)
  try:
    status = main(argv)
  except app.UsageError as error:
    app.usage(shorthelp=True, detailed_error=error, exitcode=error.exitcode)
  finally:
    if 'tensorflow_federated' in sys.modules:
      from tff_kd.simulation import runtime

      runtime.end_tffs_own_worker_at_exit()
  sys.exit(status)
