"""Consensus rules by name, for scripts; imports no TensorFlow until one is asked for."""

from collections.abc import Callable
from typing import Any

import tff_kd
from tff_kd import checks
from tff_kd import own_files


def _given() -> Any:
  return tff_kd.knowledge.CertaintyWeighted('given', average='probabilities')


# Functions that return the rules, by name.
RULES: dict[str, Callable[[], Any]] = {
    'mean_logits': lambda: tff_kd.knowledge.MeanLogits(),
    'mean_probabilities': lambda: tff_kd.knowledge.MeanProbabilities(),
    'era': lambda: tff_kd.knowledge.MeanProbabilities(temperature=0.1),
    'enhanced_era': lambda: tff_kd.knowledge.MeanProbabilities(power=2.0),
    'variance': lambda: tff_kd.knowledge.CertaintyWeighted('variance'),
    'confidence': lambda: tff_kd.knowledge.CertaintyWeighted('confidence'),
    'entropy': lambda: tff_kd.knowledge.CertaintyWeighted('entropy'),
    'soft_entropy': lambda: tff_kd.knowledge.CertaintyWeighted(
        'entropy', temperature=4.0
    ),
    'diversity': lambda: tff_kd.knowledge.CertaintyWithDiversity('variance'),
    'aligned': lambda: tff_kd.knowledge.Aligned(tff_kd.knowledge.MeanLogits()),
    'aligned_probabilities': lambda: tff_kd.knowledge.Aligned(
        tff_kd.knowledge.MeanProbabilities()
    ),
    'aligned_entropy': lambda: tff_kd.knowledge.Aligned(
        tff_kd.knowledge.CertaintyWeighted('entropy', temperature=4.0)
    ),
    # By the certainty that a companion gives: that of the algorithm ...
    'given': _given,
    # ... or `client.companions.density.LabelDensity`, whose certainties are densities.
    'density': _given,
    'aligned_density': lambda: tff_kd.knowledge.Aligned(_given()),
}
# The rules that need a `LabelDensity`.
BY_DENSITY = ('density', 'aligned_density')


def check(name: str) -> None:
  """Checks that there is a rule, without TensorFlow unless it is in a file.

  Args:
    name: One of `RULES`, or the path of a Python file that defines `RULE`.

  Raises:
    ValueError: If there is no such rule, or the file defines none.
  """
  if own_files.is_own(name):
    get(name)
  elif name not in RULES:
    raise ValueError(
        f'There is no consensus rule {name!r} among {", ".join(RULES)}; the path of a '
        f'file of your own ends in .py.{checks.did_you_mean(name, RULES)}'
    )


def get(name: str) -> Any:
  """Returns the consensus rule of a name.

  Args:
    name: One of `RULES`, or the path of a Python file that defines `RULE`.

  Returns:
    A `tff_kd.knowledge.ConsensusRule`.

  Raises:
    ValueError: If there is no such rule, or the file defines none.
  """
  if not own_files.is_own(name):
    check(name)
    return RULES[name]()
  rule = getattr(own_files.load(name), 'RULE', None)
  if not isinstance(rule, tff_kd.knowledge.ConsensusRule):
    raise ValueError(
        f'{name} must define `RULE`, a `tff_kd.knowledge.ConsensusRule`, found {rule!r}.'
    )
  return rule
