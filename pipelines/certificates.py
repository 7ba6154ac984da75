r"""Makes the certificates with which scripts and workers know each other.

  python -m pipelines.certificates --output_dir=certificates

Copy certificates/worker to the workers' machines (`pipelines.worker --tls_dir`), and
keep certificates/script for the scripts (`pipelines.train --tls_dir`). Who has the
latter can run what they like on the workers.
"""

import sys
from typing import Optional

from absl import app
from absl import flags

import pipelines

_OUTPUT_DIR = flags.DEFINE_string(
    'output_dir', 'certificates', 'The folder to make them in.'
)
_DAYS = flags.DEFINE_integer(
    'days', 365, 'How long they are valid.', lower_bound=1
)


def main(argv: list[str]) -> Optional[int]:
  if len(argv) > 1:
    raise app.UsageError(f'Not a flag: {argv[1:]}.')
  from tff_kd.simulation import tls

  try:
    tls.make_certificates(_OUTPUT_DIR.value, days=_DAYS.value)
  except OSError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  print(
      f'{_OUTPUT_DIR.value}/{tls.WORKER_DIR}: for pipelines.worker --tls_dir, on each '
      f"worker's machine.\n{_OUTPUT_DIR.value}/{tls.SCRIPT_DIR}: for pipelines.train "
      '--tls_dir. Keep it secret.'
  )
  return 0


if __name__ == '__main__':
  pipelines.run(main)
