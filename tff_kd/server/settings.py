"""How a model on the server learns: settings only; imports no TensorFlow."""

from collections.abc import Callable
import dataclasses
import math
from typing import Any, Optional, Union

from tff_kd import checks

# The losses that `Distillation.loss` may name.
LOSSES = ('kl', 'label', 'mae', 'mse')
# What a blend is that has one part only.
_ENDS = {0.0: 'student', 1.0: 'ensemble'}
_WITHOUT_TEMPERATURE = ('label', 'mae', 'mse')


def cosine_schedule(progress: Any) -> Any:
  """Scales the learning rate from 1 to 0 along half a cosine (FedDF's schedule).

  Args:
    progress: float32 scalar, the share of the stage's steps that are done.

  Returns:
    A float32 scalar.
  """
  import tensorflow as tf  # Here: seconds that settings alone do not need.

  return 0.5 * (1.0 + tf.cos(math.pi * progress))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation:
  """How one model learns from a target on the transfer set.

  The loss is (1 - w) L(y, outputs) + w KL_T(target || outputs), plus the model's
  own regularisation losses, where L is the model's supervised loss over those
  examples of the batch that have labels.

  Attributes:
    target: 'ensemble' (the clients' consensus), 'student', 'teacher', or a number
      b between 0 and 1: the blend b * ensemble + (1 - b) * student of logits; 0 becomes
      'student', and 1 'ensemble'.
    temperature: T, above 0, of 'kl', of the diversity term, and of a function as `loss`.
      The other losses have none, and it must be 1.
    distillation_weight: w. If `None`: 0.5 where the transfer set has labels, else
      1. Without labels it must be 1.
    loss: 'kl', 'mae' or 'mse' (these two on logits), 'label' (the target's most likely
      class as label), or a function (target_logits, logits, temperature) -> one loss an
      example or a position. If `None`: 'kl', and 'mse' between regression models.
    diversity_weight: The weight of Fed-ET's diversity term, lambda KL_T(diversity ||
      outputs) on the examples on which clients disagree; part of the distillation term.
      Needs target 'ensemble' and a consensus rule that tells the diversity.
    num_steps: The number of steps a round at most.
    batch_size: Examples a step; the whole subset if it is smaller.
    schedule: Maps the share of steps done, a float32 scalar in [0, 1), to a factor on the
      learning rate, such as `cosine_schedule`; a constant rate if `None`.
    validate_every: Steps between looks at the validation part of the transfer
      set; at the end only if `None`. The best weights seen win, those from before
      the stage included.
    patience: The number of looks without improvement after which to stop; never if
      `None`. Needs a `validate_every` below `num_steps`.
    reset_optimizer: Whether every round starts with a fresh optimizer state.
    augment: Optional; changes a batch of transfer inputs at random before a step, such
      as `tff_kd.data.RandomShift()`: a function of the inputs and a seed,
      int32 `[2]`, to inputs of the same shapes and dtypes. A target that is a model
      ('teacher', 'student') is asked about the changed inputs, so that both see the same;
      the ensemble's consensus, and labels, are those of the inputs as they were (Beyer et
      al., "Knowledge Distillation: A Good Teacher Is Patient and Consistent", CVPR 2022).
    start: Where the student's distillation begins if clients go on from the average
      (`clients_start_from='average'`): 'average', each round's average; or 'released',
      the student that was last released, moved by what the average moved, so that it
      learns from round to round. Without effect otherwise, as both are then the same.
  """

  target: Union[str, float] = 'ensemble'
  temperature: float = 1.0
  distillation_weight: Optional[float] = None
  loss: Optional[Union[str, Callable[[Any, Any, float], Any]]] = None
  diversity_weight: float = 0.0
  num_steps: int = 100
  batch_size: int = 64
  schedule: Optional[Callable[[Any], Any]] = None
  validate_every: Optional[int] = None
  patience: Optional[int] = None
  reset_optimizer: bool = False
  augment: Optional[Callable[[Any, Any], Any]] = None
  start: str = 'average'

  def __post_init__(self):
    checks.check_temperature(self.temperature)
    if isinstance(self.target, (int, float)) and not isinstance(self.target, bool):
      if not 0.0 <= self.target <= 1.0:
        raise ValueError(
            'A blended `target` must be between 0 (student) and 1 (ensemble), '
            f'found {self.target!r}.'
        )
      if self.target in _ENDS:
        object.__setattr__(self, 'target', _ENDS[self.target])
    elif self.target not in ('ensemble', 'student', 'teacher'):
      raise ValueError(
          "`target` must be 'ensemble', 'student', 'teacher' or a number between "
          f'0 and 1, found {self.target!r}.'
      )
    w = self.distillation_weight
    if w is not None and not 0.0 <= w <= 1.0:
      raise ValueError(
          f'`distillation_weight` must be between 0 and 1, found {w!r}.'
      )
    if not callable(self.loss) and self.loss not in (None, *LOSSES):
      raise ValueError(
          f'`loss` must be one of {sorted(LOSSES)} or a function, '
          f'found {self.loss!r}.'
      )
    if not 0.0 <= self.diversity_weight < float('inf'):
      raise ValueError(
          '`diversity_weight` must be finite and not below 0, found '
          f'{self.diversity_weight!r}.'
      )
    if self.diversity_weight and self.target != 'ensemble':
      raise ValueError(
          "A `diversity_weight` needs target='ensemble', found "
          f'{self.target!r}.'
      )
    if (
        self.temperature != 1.0
        and self.loss in _WITHOUT_TEMPERATURE
        and not self.diversity_weight
    ):
      raise ValueError(
          f'loss={self.loss!r} has no temperature: leave `temperature` at 1, or take '
          f"loss='kl', found {self.temperature!r}."
      )
    if self.augment is not None and not callable(self.augment):
      raise ValueError(
          '`augment` must be a function of a batch of inputs and a seed, such as '
          f'`tff_kd.data.RandomShift()`, found {self.augment!r}.'
      )
    if self.start not in ('average', 'released'):
      raise ValueError(
          f"`start` must be 'average' or 'released', found {self.start!r}."
      )
    self._check_steps()

  def _check_steps(self):
    checks.check_positive_integer(self.num_steps, 'num_steps')
    checks.check_positive_integer(self.batch_size, 'batch_size')
    if self.validate_every is not None:
      checks.check_positive_integer(self.validate_every, 'validate_every')
    if self.patience is not None:
      checks.check_positive_integer(self.patience, 'patience')
      if self.validate_every is None or self.validate_every >= self.num_steps:
        raise ValueError(
            f'`patience` needs a look before the last of the {self.num_steps} steps: set '
            f'`validate_every` below `num_steps`, found {self.validate_every!r}.'
        )

  @property
  def uses_ensemble(self) -> bool:
    """Whether clients must send predictions for this."""
    return self.target not in ('student', 'teacher')


# FedDF's (Lin et al., NeurIPS 2020, section 4.1 and appendix): Adam, a cosine, a fresh
# state each round. FedAUX has the same.
FED_DF_DISTILLATION = Distillation(
    target='ensemble',
    temperature=1.0,
    distillation_weight=1.0,
    num_steps=200,
    batch_size=128,
    schedule=cosine_schedule,
    reset_optimizer=True,
)
