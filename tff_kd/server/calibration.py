"""Calibration on the server, which sets the last bias of the averaged student.

One number a class is added to the logits, such that the mean prediction over unlabelled
inputs, the marginal, is a prior. That takes a pass over the inputs and no training, and
is the baseline for distillation without labels under label skew. Sources:
`tff_kd.knowledge.alignment`.
"""

import collections
import dataclasses
from typing import Any, Optional

import numpy as np
import tensorflow as tf

from tff_kd.data import transfer
from tff_kd import graphs
from tff_kd.knowledge import alignment
from tff_kd import knowledge
from tff_kd import losses
from tff_kd import models
from tff_kd.server import distill

# The marginal is then within rounding of the prior; a step costs little.
_NUM_STEPS = 50
# The search for the bias: the number of examples, and the largest difference of logits,
# as models may compute in 16 bits.
_PROBES, _TOLERANCE = 4, 0.02


@dataclasses.dataclass(frozen=True)
class CalibrationStage:
  """Sets a model's last bias, so that its marginal on the round's rows is a prior.

  A stage as `distill.DistillationStage`, without an optimizer.

  Attributes:
    learner: 'student' or 'teacher', the model that is calibrated.
    prior: As `alignment.checked_prior` returns it: a tuple, or `None` for uniform.
  """

  learner: str = 'student'
  prior: Optional[tuple[Any, ...]] = None

  # As `distill.DistillationStage` has them.
  optimizer = None
  uses_ensemble = False
  learns_from_teacher = False
  starts_from_released = False

  def check(
      self, transfer_set: transfer.TransferSet, *, has_teacher: bool, has_diversity: bool
  ) -> None:
    """Raises an error if there is no model to calibrate.

    Args:
      transfer_set: Not used; see `distill.DistillationStage.check`.
      has_teacher: Whether there is a teacher.
      has_diversity: Not used.

    Raises:
      ValueError: If the learner is a teacher that does not exist.
    """
    del transfer_set, has_diversity
    if self.learner == 'teacher' and not has_teacher:
      raise ValueError('This calibration needs a teacher; pass `teacher_fn`.')

  def build_lesson(
      self, learner: models.ModelSpec, transfer_set: transfer.TransferSet
  ) -> 'Calibration':
    """Builds the stage for one learner; see `output_bias`.

    Args:
      learner: The model that is calibrated.
      transfer_set: The examples to calibrate on.

    Returns:
      The `Calibration`.

    Raises:
      ValueError: If the learner has no classes, or others than the prior, or no bias
        that is added to its logits (`output_bias`).
    """
    models.check_has_classes(learner, 'Calibration')
    if self.prior is not None:
      alignment.check_prior_fits(self.prior, learner.logits_shape)
    return Calibration(self.prior, learner, transfer_set)


class Calibration:
  """A `CalibrationStage` for one learner as a function, as `distill.Lesson`."""

  def __init__(
      self,
      prior: Optional[tuple[Any, ...]],
      learner: models.ModelSpec,
      transfer_set: transfer.TransferSet,
  ):
    """Initializes the calibration.

    Args:
      prior: As in `CalibrationStage`.
      learner: The model that is calibrated.
      transfer_set: The examples on which the marginal is taken.

    Raises:
      ValueError: If the model has no bias that is added to its logits.
    """
    self._prior, self._learner, self._transfer_set = prior, learner, transfer_set
    self._place = output_bias(learner, transfer_set)

  def initial_state(self) -> tuple[()]:
    """Returns the state before the first round: there is none."""
    return ()

  def __call__(
      self, weights, state, models_by_name, consensus, round_num, seed, *,
      may_learn=None,
  ) -> distill.Learned:
    """Calibrates the model; takes the arguments of `distill.Lesson`."""
    del models_by_name, consensus, seed, may_learn
    ids = self._transfer_set.round_ids(round_num)
    values = self._learner.values(weights)
    logits = knowledge.predict_logits(
        models.BoundModel(self._learner, values), self._transfer_set, ids
    )
    present = knowledge.finite_rows(logits)
    is_binary = logits.shape[-1] == 1
    shift = alignment.bias_to(
        losses.two_classes(logits), present, self._prior,
        num_steps=_NUM_STEPS, is_binary=is_binary,
    )
    if is_binary:
      shift = shift[..., 1:] - shift[..., :1]
    before = self._distance(logits, present)
    after = self._distance(logits + shift, present)
    trainable = list(values.trainable)
    bias = trainable[self._place]
    trainable[self._place] = bias + tf.cast(tf.reshape(shift, bias.shape), bias.dtype)
    measurements = collections.OrderedDict(
        num_targets=tf.math.count_nonzero(present, dtype=tf.float32),
        marginal_distance_before=before,
        marginal_distance_after=after,
    )
    calibrated = values._replace(trainable=trainable).weights
    return distill.Learned(calibrated, state, measurements, tf.reduce_any(present))

  def _distance(self, logits: tf.Tensor, present: tf.Tensor) -> tf.Tensor:
    """Returns the total variation between marginal and prior; of labels their mean."""
    found = alignment.marginal(logits, present)
    prior = 1.0 / found.shape[-1] if self._prior is None else self._prior
    return tf.reduce_mean(0.5 * tf.reduce_sum(tf.abs(found - prior), axis=-1))


def output_bias(spec: models.ModelSpec, transfer_set: transfer.TransferSet) -> int:
  """Finds the bias that is added to a model's logits.

  It is found by trying: numbers added to the last trainable weights of the right shape
  must appear in the logits of a few transfer inputs.

  Args:
    spec: The model.
    transfer_set: The examples to try it with.

  Returns:
    The place of the bias among the model's trainable weights.

  Raises:
    ValueError: If there is none.
  """
  weights = spec.initial_weights
  size = spec.outputs_shape[-1]
  ids = tf.range(min(transfer_set.size, _PROBES))
  shift = np.random.default_rng(0).uniform(-0.5, 0.5, size).astype(np.float32)

  @graphs.function
  def logits_of(trainable):
    values = spec.values(weights)._replace(trainable=trainable)
    return transfer_set.map_inputs(models.BoundModel(spec, values).logits, ids)

  def normalized(logits):
    # Softmax does not depend on a constant that is added to the logits.
    return logits - logits.mean(-1, keepdims=True) if logits.shape[-1] > 1 else logits

  trainable = [tf.constant(w) for w in weights.trainable]
  before = normalized(logits_of(trainable).numpy())
  expected = normalized(shift[:, np.newaxis] if spec.is_multi_label else shift)
  for place in reversed(range(len(trainable))):
    weight = trainable[place]
    if weight.shape != [size] or not weight.dtype.is_floating:
      continue
    moved = list(trainable)
    moved[place] = weight + tf.cast(shift, weight.dtype)
    found = normalized(logits_of(moved).numpy()) - before
    if np.allclose(found, expected, atol=_TOLERANCE):
      return place
  raise ValueError(
      f'To calibrate the {spec.name} it needs a trainable bias of shape [{size}] that is '
      'added to its logits, such as that of a last layer '
      f'`keras.layers.Dense({size})`, and there is none. Leave `use_bias` of the last '
      'layer at True, and the layer trainable.'
  )
