"""Algorithms: each `build_*` function chooses and composes stages."""

from tff_kd.algorithms.fed_avg import build_fed_avg
from tff_kd.algorithms.fed_df import build_fed_df
from tff_kd.algorithms.fed_distillation import build_fed_distillation
