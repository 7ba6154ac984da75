"""Distillation on the server: teacher from the clients, student from the teacher.

A round's server work is a sequence of stages. A `DistillationStage` lets one model learn
from one target on this round's transfer examples. One loop serves all of them. Its result
is always finite and, with a validation part, not worse than what was there before. A
stage of another kind (`calibration.CalibrationStage`) has the same methods.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple, Optional

import numpy as np
import tensorflow as tf
from tff_kd.compat import tff

from tff_kd.data import transfer
from tff_kd import graphs
from tff_kd import knowledge
from tff_kd import losses
from tff_kd import models
from tff_kd.models import cohorts
from tff_kd import optimizers
from tff_kd.server import settings

_DISTILLATION_LOSSES = {
    'kl': losses.kl_divergence,
    'mae': lambda target, logits, temperature: losses.mean_absolute_error(
        target, logits
    ),
    'mse': lambda target, logits, temperature: losses.mean_squared_error(
        target, logits
    ),
    'label': lambda target, logits, temperature: losses.hard_label_cross_entropy(
        target, logits
    ),
}


def _loss_of(
    distillation: settings.Distillation, *, is_regression: bool
) -> Callable[[tf.Tensor, tf.Tensor, float], tf.Tensor]:
  """Returns the loss between targets and outputs, of classes or of numbers."""
  if callable(distillation.loss):
    return graphs.user_function(distillation.loss)
  unset = 'mse' if is_regression else 'kl'
  return _DISTILLATION_LOSSES[distillation.loss or unset]


def check_outputs(
    distillation: settings.Distillation, learner: models.ModelSpec
) -> None:
  """Raises an error if a loss that compares classes is for a regression model.

  Args:
    distillation: The settings of the stage.
    learner: The model that learns.

  Raises:
    ValueError: If the learner is a regression model and this is not for one.
  """
  if learner.is_regression and (
      distillation.loss in ('kl', 'label') or distillation.temperature != 1.0
  ):
    raise ValueError(
        f'The {learner.name} is a regression model, which has no classes: leave '
        "`temperature` at 1 and `loss` at None (then 'mse'), found "
        f'temperature={distillation.temperature!r}, loss={distillation.loss!r}.'
    )


@dataclasses.dataclass(frozen=True)
class DistillationStage:
  """One direction of the server's distillation.

  Attributes:
    learner: 'teacher' or 'student', the model that learns.
    optimizer: The learner's optimizer, whose state is in the process state; Adam with
      rate 1e-3 if `None`.
    distillation: A `Distillation`.
  """

  learner: str
  optimizer: Optional[optimizers.Optimizer]
  distillation: settings.Distillation

  def __post_init__(self):
    if self.optimizer is None:
      adam = tff.learning.optimizers.build_adam(1e-3)
      object.__setattr__(self, 'optimizer', adam)

  @property
  def uses_ensemble(self) -> bool:
    """Whether clients must send predictions for this stage."""
    return self.distillation.uses_ensemble

  @property
  def learns_from_teacher(self) -> bool:
    """Whether the teacher is the target."""
    return self.distillation.target == 'teacher'

  @property
  def starts_from_released(self) -> bool:
    """Whether a student goes on from the released one (`Distillation.start`)."""
    return self.distillation.start == 'released'

  def check(
      self,
      transfer_set: transfer.TransferSet,
      *,
      has_teacher: bool,
      has_diversity: bool,
  ) -> None:
    """Raises an error if the stage lacks something it needs, before anything is built.

    Args:
      transfer_set: The examples to learn from.
      has_teacher: Whether there is a teacher.
      has_diversity: Whether the consensus has a `diversity`.

    Raises:
      ValueError: If the stage needs a teacher, labels or a validation part that is not
        there, if a model would learn from itself, or if a teacher is to start from the
        released student.
      TypeError: If the stage's optimizer is not one.
    """
    d = self.distillation
    optimizers.check_optimizer(
        self.optimizer,
        f'{self.learner}_optimizer',
        scheduled=d.schedule is not None,
    )
    if self.learner == d.target:
      raise ValueError(
          f'The {self.learner} cannot learn from itself. Choose another `target` '
          'for its distillation.'
      )
    if 'teacher' in (self.learner, d.target) and not has_teacher:
      raise ValueError('This distillation needs a teacher; pass `teacher_fn`.')
    if self.learner == 'teacher' and self.starts_from_released:
      raise ValueError(
          "`start='released'` is of the student's distillation: a teacher goes on from "
          'where it is. Leave `start` out of the teacher\'s.'
      )
    if not transfer_set.labelled and d.distillation_weight not in (None, 1.0):
      raise ValueError(
          f'`distillation_weight` is {d.distillation_weight}, which leaves the '
          'rest of the loss to labels, but the transfer set has none. Give it '
          'labels, or leave the weight at 1.'
      )
    if d.diversity_weight and not has_diversity:
      raise ValueError(
          '`diversity_weight` needs a `consensus_rule` that tells the diversity, such '
          'as `tff_kd.knowledge.CertaintyWithDiversity()`.'
      )
    if not transfer_set.validation_size and (
        d.patience is not None or d.validate_every is not None
    ):
      raise ValueError(
          '`validate_every` and `patience` need a validation part. Build the '
          'transfer set with `validation_size` above 0.'
      )

  def build_lesson(
      self, learner: models.ModelSpec, transfer_set: transfer.TransferSet
  ) -> 'Lesson':
    """Builds the stage for one learner.

    Args:
      learner: The model that learns.
      transfer_set: The examples to learn from.

    Returns:
      The `Lesson`.
    """
    return Lesson(self, learner, transfer_set)


class ServerModels(NamedTuple):
  """The models a server distils between.

  Attributes:
    student: The student's `ModelWeights`.
    teacher: The teacher's `ModelWeights`, or ().
    released: The student that the last round released, where this round began with
      another one; it is released again if the student has nothing to learn from. Else ().
    sent: The average that this round began with, where there is a `released` one; else
      ().
  """

  student: Any
  teacher: Any
  released: Any = ()
  sent: Any = ()


class DistillationState(NamedTuple):
  """The state of the server's distillation.

  Attributes:
    lessons: The optimizers' states, in the order of the stages.
    rule: The state of the consensus rule (`ConsensusRule.initial_state`); () of most.
  """

  lessons: tuple[Any, ...]
  rule: Any


def build_server_distillation(
    students: cohorts.Students,
    teacher: Optional[models.ModelSpec],
    transfer_set: transfer.TransferSet,
    stages: Sequence[Any],
    *,
    consensus_rule: knowledge.ConsensusRule = knowledge.MeanLogits(),
    seed: int = 0,
    has_released: bool = False,
) -> tff.templates.MeasuredProcess:
  """Builds the server's distillation.

  `next` has the type (<S@SERVER, ServerModels@SERVER, knowledge@SERVER,
  int32@SERVER> -> <S@SERVER, ServerModels@SERVER, measurements@SERVER>), where
  `knowledge` is the aggregated `KnowledgePayload`, or () if no stage uses the
  ensemble. The state is a `DistillationState`.

  Args:
    students: The student, or those of the cohorts: each of them learns in turn where
      the student does, and the mean of their logits is the student's target.
    teacher: The teacher, if a stage uses one.
    transfer_set: The examples; models learn from its `round_ids`.
    stages: The stages, in order: `DistillationStage`s, and others that have
      their methods.
    consensus_rule: How the aggregated payload becomes the ensemble's logits.
    seed: With the round number, decides the order of the examples.
    has_released: Whether the student released in the last round comes beside the one that
      learns. A student that takes no step then stays the released one.

  Returns:
    A `tff.templates.MeasuredProcess`. Its measurements, by learner: the number of
    steps, the first and last batch's loss, how many examples had a target, and whether
    the result was rolled back to what was there before; with a validation part, the
    validation loss before and after: the supervised loss where all transfer examples
    have labels, else the distillation loss against the target. Where no validation
    example has a target, it is the supervised loss of those with labels; without
    any, it is 0 and the result is kept, as without a validation part. A model takes no
    steps to learn from a teacher that had nothing to learn from in this round.
  """
  uses_ensemble = any(stage.uses_ensemble for stage in stages)
  if uses_ensemble:
    knowledge.check_rule(consensus_rule, students.first)
  models_type = tff.to_type(
      ServerModels(
          student=students.weights_type,
          teacher=teacher.weights_type if teacher is not None else (),
          released=students.weights_type if has_released else (),
          sent=students.weights_type if has_released else (),
      )
  )
  knowledge_type = tff.to_type(())
  if uses_ensemble:
    knowledge_type = tff.types.tensorflow_to_type(
        consensus_rule.payload_spec(
            knowledge.logits_shape(students.first, transfer_set),
            transfer_set.num_predictions,
        )
    )
  lessons = _Lessons(
      students, teacher, transfer_set, stages, seed,
      consensus_rule if uses_ensemble else None,
  )
  init_tf = graphs.computation()(lessons.initial_state)
  state_type = init_tf.type_signature.result
  next_tf = graphs.computation(state_type, models_type, knowledge_type, np.int32)(
      lessons.__call__
  )

  @tff.federated_computation
  def init_fn():
    return tff.federated_eval(init_tf, tff.SERVER)

  @tff.federated_computation(
      init_fn.type_signature.result,
      tff.FederatedType(models_type, tff.SERVER),
      tff.FederatedType(knowledge_type, tff.SERVER),
      tff.FederatedType(np.int32, tff.SERVER),
  )
  def next_fn(state, server_models, mean_knowledge, round_num):
    return tff.templates.MeasuredProcessOutput(
        *tff.federated_map(next_tf, (state, server_models, mean_knowledge, round_num))
    )

  return tff.templates.MeasuredProcess(init_fn, next_fn, next_is_multi_arg=True)


class _Lessons:
  """All lessons of a round, one after the other."""

  def __init__(
      self,
      students: cohorts.Students,
      teacher: Optional[models.ModelSpec],
      transfer_set: transfer.TransferSet,
      stages: Sequence[DistillationStage],
      seed: int,
      rule: Optional[knowledge.ConsensusRule],
  ):
    """Initializes them; the arguments are those of `build_server_distillation`."""
    self._students, self._teacher, self._seed = students, teacher, seed
    self._rule = rule
    self._transfer_set = transfer_set
    # The stages with their learners; a student's stage is there once for each cohort.
    self._order = [
        (stage, cohort)
        for stage in stages
        for cohort in range(len(students.specs) if stage.learner == 'student' else 1)
    ]
    self._lessons = [
        stage.build_lesson(
            teacher if stage.learner == 'teacher' else students.specs[cohort],
            transfer_set,
        )
        for stage, cohort in self._order
    ]

  def initial_state(self) -> DistillationState:
    """Returns the state before the first round."""
    rule = ()
    if self._rule is not None:
      shape = knowledge.logits_shape(self._students.first, self._transfer_set)
      rule = self._rule.initial_state(shape)
    lessons = tuple(lesson.initial_state() for lesson in self._lessons)
    return DistillationState(lessons, rule)

  def _consensus(
      self,
      state: Any,
      weights: ServerModels,
      mean_knowledge: Any,
      round_num: tf.Tensor,
  ) -> tuple[Any, Optional[knowledge.Consensus]]:
    """Returns the rule's next state and its consensus on the round's rows, if any."""
    if self._rule is None:
      return state, None
    if not self._rule.needs_average:
      return self._rule.decode_next(state, mean_knowledge)
    students = self._students.unpack(weights.student)
    average = self._models(students, weights.teacher, None)['student']
    ids = self._transfer_set.prediction_ids(round_num)
    return self._rule.decode_next(
        state,
        mean_knowledge,
        knowledge.predict_logits(average, self._transfer_set, ids),
    )

  def __call__(self, state, weights, mean_knowledge, round_num):
    """Returns the next state, the `ServerModels` and the measurements."""
    rule, consensus = self._consensus(state.rule, weights, mean_knowledge, round_num)
    students = self._students.unpack(weights.student)
    have_learned = [tf.constant(False)] * len(students)
    starts = self._moved(weights) if weights.released else {}
    teacher, is_taught = weights.teacher, None
    new_state, measurements = [], collections.OrderedDict()
    for index, (stage, cohort) in enumerate(self._order):
      is_teacher = stage.learner == 'teacher'
      if not is_teacher:
        # Later stages go on from what the first one leaves.
        start = starts.pop(cohort, students[cohort])
        students[cohort] = start if stage.starts_from_released else students[cohort]
      learned = self._lessons[index](
          teacher if is_teacher else students[cohort],
          state.lessons[index],
          self._models(students, teacher, None if is_teacher else cohort),
          consensus,
          round_num,
          tf.stack([self._seed, index]),
          may_learn=is_taught if stage.learns_from_teacher else None,
      )
      new_state.append(learned.state)
      if is_teacher:
        teacher = learned.weights
        is_taught = learned.has_learned
      else:
        students[cohort] = learned.weights
        have_learned[cohort] |= learned.has_learned
      name = self._name(stage, cohort)
      if name in measurements:  # It learns in more than one stage.
        name = f'{name}_{index + 1}'
      measurements[name] = learned.measurements
    if weights.released:
      released = self._students.unpack(weights.released)
      students = list(map(graphs.where, have_learned, students, released))
    result = ServerModels(student=self._students.pack(students), teacher=teacher)
    return DistillationState(tuple(new_state), rule), result, measurements

  def _moved(self, weights: ServerModels) -> dict[int, Any]:
    """Returns each cohort's released student, moved by what its average moved.

    What is not trained (statistics of batch norm, say) stays the released student's.
    """
    moved = {}
    of_cohorts = zip(*(
        self._students.unpack(students)
        for students in (weights.released, weights.sent, weights.student)
    ))
    for cohort, (released, sent, average) in enumerate(of_cohorts):
      trainable = tf.nest.map_structure(
          lambda released, sent, average: released + (average - sent),
          released.trainable, sent.trainable, average.trainable,
      )
      moved[cohort] = tff.learning.models.ModelWeights(
          trainable, released.non_trainable
      )
    return moved

  def _models(
      self, students: Sequence[Any], teacher: Any, cohort: Optional[int]
  ) -> dict[str, Any]:
    """Returns the models to learn from; of all cohorts if `cohort` is `None`."""
    bound = [_bound(spec, w) for spec, w in zip(self._students.specs, students)]
    if cohort is None:
      student = _MeanModel(bound) if self._students.has_cohorts else bound[0]
    else:
      student = bound[cohort]
    return {
        'student': student,
        'teacher': None if self._teacher is None else _bound(self._teacher, teacher),
    }

  def _name(self, stage: DistillationStage, cohort: int) -> str:
    """Returns the name of a learner's measurements."""
    if stage.learner == 'student' and self._students.has_cohorts:
      return f'student_{cohort}'
    return stage.learner


class _MeanModel:
  """Several students as one to learn from: the mean of their logits."""

  def __init__(self, students: Sequence[models.BoundModel]):
    self._students = students

  def logits(self, inputs: Any) -> tf.Tensor:
    return tf.add_n([s.logits(inputs) for s in self._students]) / len(self._students)


def _bound(spec: models.ModelSpec, weights: Any) -> models.BoundModel:
  return models.BoundModel(spec, spec.values(weights))


class _Examples(NamedTuple):
  """Rows of the transfer set with their targets, parallel along the first axis."""

  ids: tf.Tensor
  target_logits: Any = ()
  mask: Any = ()
  diversity_logits: Any = ()
  diversity_mask: Any = ()


class _Round(NamedTuple):
  """The values that all steps of a lesson share.

  Attributes:
    opened: The transfer set.
    seed: int32 `[2]`, decides how inputs are changed.
    asked: The model whose predictions on changed inputs are the targets; `None` if the
      targets are computed once, on the inputs as they were.
  """

  opened: transfer.OpenTransferSet
  seed: tf.Tensor
  asked: Optional[Any]


class _Steps(NamedTuple):
  """The loop variables of a lesson."""

  step: tf.Tensor
  values: models.ModelValues
  optimizer: Any
  first_loss: tf.Tensor
  last_loss: tf.Tensor


class _Best(NamedTuple):
  """The best weights and optimizer state of a lesson so far, by validation."""

  weights: Any
  optimizer: Any
  loss: tf.Tensor
  step: tf.Tensor
  looks_waited: tf.Tensor


class Learned(NamedTuple):
  """The result of a lesson.

  Attributes:
    weights: The learner's `ModelWeights`.
    state: The optimizer's state.
    measurements: See `build_server_distillation`.
    has_learned: bool scalar, whether there was anything to learn from.
  """

  weights: Any
  state: Any
  measurements: collections.OrderedDict[str, tf.Tensor]
  has_learned: tf.Tensor


class Lesson:
  """A stage for one learner as a function, to be called where a computation is traced."""

  def __init__(
      self,
      stage: DistillationStage,
      learner: models.ModelSpec,
      transfer_set: transfer.TransferSet,
  ):
    """Initializes the lesson.

    Args:
      stage: The stage.
      learner: The model that learns.
      transfer_set: The examples to learn from.

    Raises:
      ValueError: If the settings do not fit the learner or the transfer inputs.
    """
    d = stage.distillation
    check_outputs(d, learner)
    self._distillation = d
    self._learner, self._transfer_set = learner, transfer_set
    self._loss = _loss_of(d, is_regression=learner.is_regression)
    self._stepper = optimizers.build_stepper(
        stage.optimizer, learner.trainable_variables
    )
    self._distillation_weight = d.distillation_weight
    if self._distillation_weight is None:
      self._distillation_weight = 0.5 if transfer_set.labelled else 1.0
    self._batch_size = min(d.batch_size, transfer_set.subset_size)
    self._has_validation = transfer_set.validation_size > 0
    if d.augment is not None:
      _check_augment(d.augment, transfer_set)

  def initial_state(self) -> Any:
    """Returns the optimizer's state before the first round."""
    return self._stepper.initialize()

  def __call__(
      self,
      weights: Any,
      state: Any,
      models_by_name: Mapping[str, Any],
      consensus: Optional[knowledge.Consensus],
      round_num: tf.Tensor,
      seed: tf.Tensor,
      *,
      may_learn: Optional[tf.Tensor] = None,
  ) -> Learned:
    """Learns.

    Args:
      weights: The learner's `ModelWeights`.
      state: The optimizer's state; a fresh one if `None`.
      models_by_name: The models to learn from, by the name of the target; each has a
        method `logits(inputs)`.
      consensus: The ensemble's, where the stage uses it.
      round_num: int32 scalar.
      seed: int32 `[2]`, decides the order of the examples and what training draws.
      may_learn: A bool scalar; no steps are taken if it is false.
    """
    if self._distillation.reset_optimizer or state is None:
      state = self._stepper.initialize()
    # The predictions of a model on changed inputs are computed step by step.
    asked = None
    if self._distillation.augment is not None:
      asked = models_by_name.get(str(self._distillation.target))
    learn, validation = self._examples(
        models_by_name, consensus, round_num, learns_from=asked
    )
    num_targets = tf.reduce_sum(learn.mask)
    draws = tf.random.experimental.stateless_fold_in(seed, round_num)
    values = self._learner.values(weights, draws)
    before = self._validation_loss(values, validation)
    begin = _Steps(tf.constant(0), values, state, tf.zeros([]), tf.zeros([]))
    best = _Best(values.weights, state, before, tf.constant(0), tf.constant(0))
    order = _batch_order(
        self._transfer_set.subset_size,
        self._distillation.num_steps * self._batch_size,
        round_num,
        seed,
    )
    done, best = self._run(
        begin, best, learn, validation, order, self._num_steps(num_targets, may_learn),
        _Round(self._transfer_set.open(), draws, asked),
    )
    measurements = collections.OrderedDict(
        num_steps=done.step,
        num_targets=num_targets,
        first_loss=done.first_loss,
        last_loss=done.last_loss,
        best_step=best.step,
        rolled_back=tf.cast((done.step > 0) & tf.equal(best.step, 0), tf.int32),
    )
    if validation is not None:
      measurements['validation_loss_before'] = before
      measurements['validation_loss_after'] = best.loss
    return Learned(best.weights, best.optimizer, measurements, done.step > 0)

  def _num_steps(
      self, num_targets: tf.Tensor, may_learn: Optional[tf.Tensor]
  ) -> tf.Tensor:
    """Returns how many steps to take at most, an int32 scalar."""
    num_steps = tf.constant(self._distillation.num_steps)
    # With neither targets nor labels there is nothing to learn from.
    if self._distillation_weight == 1.0:
      num_steps = tf.where(num_targets > 0.0, num_steps, 0)
    return num_steps if may_learn is None else tf.where(may_learn, num_steps, 0)

  def _run(
      self,
      begin: _Steps,
      best: _Best,
      learn: _Examples,
      validation: Optional[_Examples],
      order: tf.Tensor,
      num_steps: tf.Tensor,
      shared: _Round,
  ) -> tuple[_Steps, _Best]:
    """Takes the steps, looking at the validation part between them."""
    d = self._distillation

    def take_step(now: _Steps) -> tuple[_Steps]:
      rows = order[now.step * self._batch_size : (now.step + 1) * self._batch_size]
      rows = tf.ensure_shape(rows, [self._batch_size])
      batch = tf.nest.map_structure(lambda a: tf.gather(a, rows), learn)
      return (self._step(now, shared, batch),)

    check_every = min(d.validate_every or d.num_steps, d.num_steps)

    def steps_and_look(now: _Steps, best: _Best) -> tuple[_Steps, _Best]:
      until = tf.minimum(now.step + check_every, num_steps)
      (now,) = tf.while_loop(lambda now: now.step < until, take_step, (now,))
      return now, self._better(now, best, validation)

    if check_every == d.num_steps:
      return steps_and_look(begin, best)
    patience = d.patience or d.num_steps
    return tf.while_loop(
        lambda now, best: (now.step < num_steps) & (best.looks_waited < patience),
        steps_and_look,
        (begin, best),
    )

  def _examples(
      self, models_by_name, consensus, round_num, *, learns_from
  ) -> tuple[_Examples, Optional[_Examples]]:
    """The rows to learn from and to validate on.

    Targets are computed once, unless the steps have them from a model (`learns_from`).
    """
    d, transfer_set = self._distillation, self._transfer_set
    ids = transfer_set.round_ids(round_num)
    needs_targets = self._has_validation and not transfer_set.fully_labelled
    all_ids = transfer_set.prediction_ids(round_num) if needs_targets else ids
    count, m = all_ids.shape[0], transfer_set.subset_size
    if learns_from is not None and not needs_targets:
      validation = None
      if self._has_validation:
        validation = _Examples(transfer_set.validation_ids())
      return _Examples(ids, mask=tf.ones([m])), validation

    def predictions(name):
      return knowledge.predict_logits(models_by_name[name], transfer_set, all_ids)

    mask = tf.ones([count])
    if not d.uses_ensemble:
      targets = predictions(d.target)
    else:
      targets, mask = consensus.logits[:count], consensus.mask[:count]
      if isinstance(d.target, (int, float)):
        targets = d.target * targets + (1.0 - d.target) * predictions('student')
    learn = _Examples(ids, targets[:m], mask[:m])
    if d.diversity_weight:
      learn = learn._replace(
          diversity_logits=consensus.diversity.logits[:m],
          diversity_mask=consensus.diversity.mask[:m],
      )
    if not self._has_validation:
      return learn, None
    if transfer_set.fully_labelled:
      return learn, _Examples(transfer_set.validation_ids())
    return learn, _Examples(all_ids[m:], targets[m:], mask[m:])

  def _step(self, now: _Steps, shared: _Round, batch: _Examples) -> _Steps:
    """One gradient step."""
    d = self._distillation
    trainable = now.values.trainable
    inputs = shared.opened.gather_inputs(batch.ids)
    if d.augment is not None:
      seed = tf.random.experimental.stateless_fold_in(shared.seed, now.step)
      inputs = graphs.user_function(d.augment)(inputs, seed)
      if shared.asked is not None:
        batch = batch._replace(target_logits=shared.asked.logits(inputs))
    with tf.GradientTape(watch_accessed_variables=False) as tape:
      tape.watch(trainable)
      outputs, values, regularization, _ = self._learner.call(
          now.values, inputs, training=True
      )
      loss = self._batch_loss(outputs, shared.opened, batch) + regularization
    rate_scale = None
    if d.schedule is not None:
      rate_scale = graphs.user_function(d.schedule)(
          tf.cast(now.step, tf.float32) / float(d.num_steps)
      )
    state, trainable = self._stepper.apply(
        now.optimizer, trainable, tape.gradient(loss, trainable), rate_scale
    )
    return _Steps(
        now.step + 1,
        values._replace(trainable=list(trainable)),
        state,
        tf.where(tf.equal(now.step, 0), loss, now.first_loss),
        loss,
    )

  def _batch_loss(
      self, outputs: tf.Tensor, opened: transfer.OpenTransferSet, batch: _Examples
  ) -> tf.Tensor:
    """The distillation's loss on a batch, with that on its labels."""
    d, weight = self._distillation, self._distillation_weight
    logits = self._learner.class_logits(outputs)
    loss = losses.weighted_mean(
        self._loss(batch.target_logits, logits, d.temperature),
        models.unmasked(outputs, batch.mask),
    )
    if d.diversity_weight:
      loss += d.diversity_weight * losses.weighted_mean(
          losses.kl_divergence(batch.diversity_logits, logits, d.temperature),
          models.unmasked(outputs, batch.diversity_mask),
      )
    loss *= weight
    if weight < 1.0:
      # Where a label is unknown, its entry may be anything.
      labels, _ = self._learner.usable_labels(opened.gather_labels(batch.ids))
      supervised = self._learner.supervised_loss(
          labels, outputs, opened.gather_label_weights(batch.ids)
      )
      loss += (1.0 - weight) * tf.cast(supervised, tf.float32)
    return loss

  def _validation_loss(
      self, values: models.ModelValues, validation: Optional[_Examples]
  ) -> tf.Tensor:
    """The loss on the validation part; 0 where there is nothing to compare with."""
    if validation is None:
      return tf.zeros([])
    transfer_set, learner = self._transfer_set, self._learner

    def supervised() -> tf.Tensor:
      outputs = learner.call(
          values, transfer_set.gather_inputs(validation.ids)
      ).outputs
      labels = transfer_set.gather_labels(validation.ids)
      mask = None
      if not transfer_set.fully_labelled:
        # Where a label is unknown, its entry may be anything.
        labels, _ = learner.usable_labels(labels)
        mask = transfer_set.gather_label_weights(validation.ids)
      return tf.cast(learner.supervised_loss(labels, outputs, mask), tf.float32)

    def distilled() -> tf.Tensor:
      logits = knowledge.predict_logits(
          models.BoundModel(learner, values), transfer_set, validation.ids
      )
      mask = validation.mask
      if learner.has_mask:
        kept = transfer_set.map_inputs(
            lambda inputs: learner.unmasked(values, inputs), validation.ids
        )
        mask = kept * losses.with_rank(mask, kept.shape.rank)
      loss = losses.weighted_mean(
          self._loss(validation.target_logits, logits, self._distillation.temperature),
          mask,
      )
      return tf.cast(loss, tf.float32)

    if transfer_set.fully_labelled:
      return supervised()
    if not transfer_set.labelled:
      return distilled()
    return tf.cond(tf.reduce_any(validation.mask > 0.0), distilled, supervised)

  def _can_validate(self, validation: _Examples) -> tf.Tensor:
    """Returns whether an example of the validation part has a target or a label."""
    transfer_set = self._transfer_set
    if transfer_set.fully_labelled:
      return tf.constant(True)
    labelled = transfer_set.gather_label_weights(validation.ids)
    return tf.reduce_any(validation.mask > 0.0) | tf.reduce_any(labelled > 0.0)

  def _better(
      self, now: _Steps, best: _Best, validation: Optional[_Examples]
  ) -> _Best:
    """The better of what there is now and the best so far."""
    current = (now.values.weights, now.optimizer)
    improved, loss = graphs.all_finite(current), best.loss
    if validation is not None:
      current_loss = self._validation_loss(now.values, validation)
      # False for a loss that is not a number.
      improved &= (current_loss < loss) | ~self._can_validate(validation)
      loss = tf.where(improved, current_loss, loss)
    weights, optimizer = graphs.where(
        improved, current, (best.weights, best.optimizer)
    )
    return _Best(
        weights,
        optimizer,
        loss,
        tf.where(improved, now.step, best.step),
        tf.where(improved, 0, best.looks_waited + 1),
    )


def _check_augment(
    augment: Callable[[Any, tf.Tensor], Any], transfer_set: transfer.TransferSet
) -> None:
  """Checks that a change of inputs keeps their form.

  Raises:
    ValueError: If it returns inputs of another structure, shape or dtype.
  """
  batch = tf.nest.map_structure(
      lambda spec: tf.TensorSpec([None, *spec.shape[1:]], spec.dtype),
      transfer_set.inputs_spec,
  )
  found = graphs.TracedFunction(
      graphs.user_function(augment), [batch, tf.TensorSpec([2], tf.int32)]
  ).output
  try:
    tf.nest.assert_same_structure(batch, found)
    is_same = all(
        given.dtype == changed.dtype and given.shape.is_compatible_with(changed.shape)
        for given, changed in zip(tf.nest.flatten(batch), tf.nest.flatten(found))
    )
  except (TypeError, ValueError):
    is_same = False
  if not is_same:
    raise ValueError(
        '`augment` must return a batch of inputs of the form of what it is given, '
        f'{batch}, found {found}.'
    )


def _batch_order(
    num_examples: int, total: int, round_num: tf.Tensor, seed: tf.Tensor
) -> tf.Tensor:
  """Row numbers of all batches, end to end: one permutation after another.

  Args:
    num_examples: m.
    total: Steps times batch size.
    round_num: int32 scalar.
    seed: int32 `[2]`.

  Returns:
    int32 `[total]` in [0, m); every row is used equally often, give or take one.
  """
  passes = -(-total // num_examples)
  seed = tf.random.experimental.stateless_fold_in(seed, round_num)
  orders = tf.map_fn(
      lambda i: tf.random.experimental.stateless_shuffle(
          tf.range(num_examples),
          tf.random.experimental.stateless_fold_in(seed, i),
      ),
      tf.range(passes),
  )
  return tf.reshape(orders, [-1])[:total]
