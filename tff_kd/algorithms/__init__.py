"""Algorithms: each `build_*` function chooses and composes stages."""

import inspect
from typing import Any, Callable, NamedTuple

from tff_kd.algorithms.fed_avg import build_fed_avg
from tff_kd.algorithms.fed_df import build_fed_df
from tff_kd.algorithms.fed_distillation import build_fed_distillation


class Algorithm(NamedTuple):
  """A row of the registry.

  Attributes:
    build: Its `build_*` function.
    summary: One line for a list of algorithms.
  """

  build: Callable[..., Any]
  summary: str

  def takes(self, parameter: str) -> bool:
    """Whether the builder names this parameter, beyond those all have."""
    return parameter in inspect.signature(self.build).parameters


REGISTRY = {
    'fed_avg': Algorithm(
        build_fed_avg, 'weighted averaging of the student (FedAvg, FedOpt)'
    ),
    'fed_df': Algorithm(
        build_fed_df, 'the student learns from the clients\' ensemble (FedDF)'
    ),
    'fed_distillation': Algorithm(
        build_fed_distillation,
        'the fusion: ensemble to teacher, teacher back to student',
    ),
}
