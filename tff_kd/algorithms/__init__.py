"""Algorithms: each file's `build_*` function composes a round, its `INFO` describes it.

A new algorithm is one file here, an import and a name below; `get` takes one from
elsewhere, too. None of this imports TensorFlow.
"""

from tff_kd import checks
from tff_kd import own_files

from tff_kd.algorithms import cfd
from tff_kd.algorithms.cfd import build_cfd
from tff_kd.algorithms import ds_fl
from tff_kd.algorithms.ds_fl import build_ds_fl
from tff_kd.algorithms import fd
from tff_kd.algorithms.fd import build_fd
from tff_kd.algorithms import fed_aux
from tff_kd.algorithms.fed_aux import build_fed_aux
from tff_kd.algorithms import fed_avg
from tff_kd.algorithms.fed_avg import build_fed_avg
from tff_kd.algorithms import fed_df
from tff_kd.algorithms.fed_df import build_fed_df
from tff_kd.algorithms import fed_distillation
from tff_kd.algorithms.fed_distillation import build_fed_distillation
from tff_kd.algorithms import fed_dyn
from tff_kd.algorithms.fed_dyn import build_fed_dyn
from tff_kd.algorithms import fed_et
from tff_kd.algorithms.fed_et import build_fed_et
from tff_kd.algorithms import fed_gen
from tff_kd.algorithms.fed_gen import build_fed_gen
from tff_kd.algorithms import fed_gkd
from tff_kd.algorithms.fed_gkd import build_fed_gkd
from tff_kd.algorithms import fed_kd
from tff_kd.algorithms.fed_kd import build_fed_kd
from tff_kd.algorithms import fed_md
from tff_kd.algorithms.fed_md import build_fed_md
from tff_kd.algorithms import fed_ntd
from tff_kd.algorithms.fed_ntd import build_fed_ntd
from tff_kd.algorithms import fed_proto
from tff_kd.algorithms.fed_proto import build_fed_proto
from tff_kd.algorithms import fed_per
from tff_kd.algorithms.fed_per import build_fed_per
from tff_kd.algorithms import fed_prox
from tff_kd.algorithms.fed_prox import build_fed_prox
from tff_kd.algorithms import fml
from tff_kd.algorithms.fml import build_fml
from tff_kd.algorithms import info
from tff_kd.algorithms.info import Info
from tff_kd.algorithms import lg_fed_avg
from tff_kd.algorithms.lg_fed_avg import build_lg_fed_avg
from tff_kd.algorithms import moon
from tff_kd.algorithms.moon import build_moon
from tff_kd.algorithms import scaffold
from tff_kd.algorithms.scaffold import build_scaffold

REGISTRY: dict[str, Info] = {
    module.INFO.name: module.INFO
    for module in (
        fed_avg, fed_prox, scaffold, fed_dyn, fed_ntd, fed_gkd, fed_df, fed_et, fed_gen,
        moon, fml, fed_kd, fed_per, lg_fed_avg, fed_aux, fd, fed_proto, fed_md, ds_fl,
        cfd, fed_distillation,
    )
}


def get(name: str) -> Info:
  """Returns what describes an algorithm.

  Args:
    name: One of `REGISTRY`, or the path of a Python file that defines `INFO`.

  Raises:
    ValueError: If there is no such algorithm, or the file defines none.
  """
  if not own_files.is_own(name):
    if name not in REGISTRY:
      raise ValueError(
          f'There is no algorithm {name!r} among {", ".join(REGISTRY)}; the path of a '
          f'file of your own ends in .py.{checks.did_you_mean(name, REGISTRY)}'
      )
    return REGISTRY[name]
  found = getattr(own_files.load(name), 'INFO', None)
  if not isinstance(found, Info):
    raise ValueError(
        f'{name} must define `INFO = tff_kd.algorithms.Info(...)`, found {found!r}.'
    )
  return found
