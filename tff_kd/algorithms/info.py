"""Descriptions of algorithms for the registry and the scripts, without TensorFlow."""

from collections.abc import Callable, Mapping
import dataclasses
import inspect
from typing import Any, Optional

# What clients may keep of models.
_KEPT = (None, 'model', 'layers')
# What an algorithm needs whose builder has the parameter.
_NEEDS = {
    'transfer_set': 'transfer set',
    'teacher_fn': 'teacher',
    'mentor_fn': 'mentor',
    'negatives': 'negatives',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info:
  """Describes an algorithm; every algorithm's file has one, named `INFO`.

  Example, of a file that `--algorithm=path/to/file.py` takes:

  ```
  INFO = tff_kd.algorithms.Info(
      build=build_mine,
      summary='averaging, with a term of my own',
      uploads=('weights',),
      flags={'my_weight': 'local_weight'},
  )
  ```

  Attributes:
    build: The algorithm's `build_*` function, decorated with
      `tff_kd.rounds.takes_options`.
    summary: One line for a list of algorithms.
    uploads: The parts of a client's upload, in order; 'weights' if the student's
      weights are averaged.
    client_state: Whether clients keep something from round to round.
    keeps: What clients keep of models from round to round: 'model', a whole one of their
      own; 'layers', those layers of the student that are not averaged, so that the server
      has no whole student; `None` for nothing.
    flags: Flags of `pipelines.train` by the parameters that get their values as they
      are, where the user gives them.
    flag_defaults: The algorithm's own defaults of flags.
    consensus: The name of the rule (`tff_kd.knowledge.rules.RULES`) by which it
      combines predictions unless told otherwise; `None` if it has none, or none to
      choose.

  Raises:
    ValueError: If its function takes a `consensus_rule`, and `consensus` is `None`; or
      if `keeps` is none of these.
  """

  build: Callable[..., Any]
  summary: str
  uploads: tuple[str, ...]
  client_state: bool = False
  keeps: Optional[str] = None
  flags: Mapping[str, str] = dataclasses.field(default_factory=dict)
  flag_defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  consensus: Optional[str] = None

  def __post_init__(self):
    if 'consensus_rule' in self.parameters and self.consensus is None:
      raise ValueError(
          f"INFO of {self.name}: its function takes a `consensus_rule`, so `consensus` "
          "must name the rule that it has by default, such as 'mean_logits'. Flags such "
          'as --consensus and --prior then choose another one.'
      )
    if self.keeps not in _KEPT:
      raise ValueError(
          f'INFO of {self.name}: `keeps` must be one of {_KEPT}, found {self.keeps!r}.'
      )

  @property
  def name(self) -> str:
    """The name of the function, without `build_`."""
    return self.build.__name__.removeprefix('build_')

  @property
  def parameters(self) -> Mapping[str, inspect.Parameter]:
    """The builder's parameters, by name."""
    return inspect.signature(self.build).parameters

  @property
  def averages(self) -> bool:
    """Whether the student's weights go up and are averaged."""
    return 'weights' in self.uploads

  @property
  def sends_knowledge(self) -> bool:
    """Whether something goes up in place of, or beside, weights, as one sum."""
    return bool({'predictions', 'logits by class', 'prototypes'} & set(self.uploads))

  @property
  def needs(self) -> tuple[str, ...]:
    """The requirements of the algorithm besides clients and a student."""
    found = [need for name, need in _NEEDS.items() if name in self.parameters]
    return (*found, *(['client state'] if self.client_state else []))
