"""The process that the flags of `pipelines.train` ask for."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, Optional, Union

from absl import flags
import keras
import numpy as np
from tff_kd.compat import tff

from pipelines import train_checks
from pipelines import train_flags as args
from pipelines import train_privacy
from pipelines import UserError
import tff_kd
from tff_kd.aggregators import robust
from tff_kd import algorithms
from tff_kd import knowledge
from tff_kd.knowledge import rules
from tff_kd import optimizers

_OPTIMIZERS = {
    'sgd': tff.learning.optimizers.build_sgdm,
    'adam': tff.learning.optimizers.build_adam,
}
_SCHEDULES = {'constant': None, 'cosine': tff_kd.cosine_schedule}
# The smallest array that is rounded on its way up.
_ROUNDED_FROM = 1000
# Returned by a maker if the builder's own default is to stay.
_UNSET = object()


def _client_optimizer() -> tff.learning.optimizers.Optimizer:
  """Returns the clients' optimizer, of all flags about it."""
  kwargs = {}
  if args.CLIENT_MOMENTUM.value:
    kwargs['momentum'] = args.CLIENT_MOMENTUM.value
  optimizer = _OPTIMIZERS[args.CLIENT_OPTIMIZER.value](args.CLIENT_RATE.value, **kwargs)
  if args.CLIENT_WEIGHT_DECAY.value:
    optimizer = optimizers.with_weight_decay(optimizer, args.CLIENT_WEIGHT_DECAY.value)
  if args.CLIENT_CLIP_NORM.value is not None:
    optimizer = optimizers.with_clipped_gradients(optimizer, args.CLIENT_CLIP_NORM.value)
  return optimizer


def schedules() -> list[tff_kd.simulation.LearningRateSchedule]:
  """Returns the learning-rate schedules over --rounds that flags ask for."""
  found = []
  for optimizer, kind, rate, warmup in (
      ('client', args.CLIENT_RATE_SCHEDULE, args.CLIENT_RATE, args.CLIENT_WARMUP_ROUNDS),
      ('server', args.SERVER_RATE_SCHEDULE, args.SERVER_RATE, args.SERVER_WARMUP_ROUNDS),
  ):
    if kind.value != 'constant' or warmup.value:
      found.append(
          tff_kd.simulation.LearningRateSchedule(
              tff_kd.simulation.round_schedule(
                  kind.value, rate.value, num_rounds=args.ROUNDS.value,
                  warmup_rounds=warmup.value,
              ),
              optimizer=optimizer,
          )
      )
  return found


def _aggregator(
    methods: Sequence[str], norm_bound: Optional[float], bits: Optional[int]
) -> Optional[tff.aggregators.WeightedAggregationFactory]:
  """Returns the aggregator of a channel; `None` if it is neither coded nor robust."""
  factory = None
  if bits is not None:
    # A resumed run could not repeat TFF's random rounding.
    factory = tff.aggregators.MeanFactory(
        tff.aggregators.EncodedSumFactory.quantize_above_threshold(
            bits, _ROUNDED_FROM - 1, stochastic=False
        )
    )
    # The same as in TFF's compression_aggregator.
    factory = robust.build_adaptive_mean(
        'zeroing' in methods, 'clipping' in methods, factory
    )
  elif 'median' in methods or 'trimmed_mean' in methods:
    factory = robust.TrimmedMeanFactory(
        # With late reports, more clients may report than were chosen.
        sample_size=args.NUM_CLIENTS.value,
        trimmed_share=0.5 if 'median' in methods else args.TRIMMED_SHARE.value,
    )
  elif methods:
    factory = tff.learning.robust_aggregator(
        zeroing='zeroing' in methods, clipping='clipping' in methods
    )
  if norm_bound is not None:
    factory = robust.NormBoundFactory(norm_bound, factory)
  return factory


def common_arguments(
    task: tff_kd.data.Task, batches: tff_kd.ClientBatches
) -> dict[str, Any]:
  """Returns the arguments of every algorithm, also of FedAvg in the comparison.

  What averaging has by default is left to the algorithm, which may have its own.
  """
  builders = [task.students[name] for name in args.STUDENT.value]
  common = dict(
      student_fn=builders if len(builders) > 1 else builders[0],
      input_spec=batches.element_spec,
      client_data=batches,
      loss_fn=task.loss_fn,
      metrics_fn=task.metrics_fn,
      client_optimizer=_client_optimizer(),
      model_aggregator=_aggregator(
          args.ROBUST_MODEL.value, args.MODEL_NORM_BOUND.value, args.MODEL_BITS.value
      ),
  )
  of_server = (
      args.SERVER_OPTIMIZER, args.SERVER_RATE, args.SERVER_RATE_SCHEDULE,
      args.SERVER_WARMUP_ROUNDS,
  )
  if any(flag.present or flag.value != flag.default for flag in of_server):
    build = _OPTIMIZERS[args.SERVER_OPTIMIZER.value]
    common['server_optimizer'] = build(args.SERVER_RATE.value)
  if args.WEIGHTING.value is not None or train_checks.is_private():
    weighting = args.WEIGHTING.value or 'uniform'
    common['client_weighting'] = tff.learning.ClientWeighting[weighting.upper()]
  return common


def build_process(
    algorithm: algorithms.Info, task: tff_kd.data.Task, common: dict[str, Any]
) -> Union[tff_kd.DistillationProcess, tff_kd.StatefulClientsProcess]:
  """Builds the process from the flags.

  An algorithm's `Info.flags` says which flags go to which of its parameters as they are;
  what is made of several flags has a maker here, by the parameter's name.

  Args:
    algorithm: The algorithm.
    task: The task.
    common: `common_arguments`.
  """
  kwargs = dict(
      common,
      **train_privacy.build_guards(),
      seed=args.SEED.value,
      local_terms=_local_terms(algorithm),
  )
  if not algorithm.averages:
    for name in ('server_optimizer', 'client_weighting', 'model_aggregator'):
      kwargs.pop(name, None)
  for parameter, flag in algorithm.flags.items():
    if flags.FLAGS[flag].value is not None:
      kwargs[parameter] = flags.FLAGS[flag].value
  for parameter, make in _MAKERS.items():
    if parameter in algorithm.parameters and parameter not in kwargs:
      value = make(algorithm, task)
      if value is not _UNSET:
        kwargs[parameter] = value
  # The same initial weights whatever the algorithm, given the seed.
  keras.utils.set_random_seed(args.SEED.value)
  process = algorithm.build(**kwargs)
  _check_keeps(algorithm, process)
  return process


def _check_keeps(
    algorithm: algorithms.Info,
    process: Union[tff_kd.DistillationProcess, tff_kd.StatefulClientsProcess],
) -> None:
  """Refuses a description of other models that clients keep than there are."""
  found = None
  if process.description.kept_models is not None:
    has_parts = algorithm.averages and process.get_model_weights is None
    found = 'layers' if has_parts else 'model'
  if algorithm.keeps != found:
    raise UserError(
        f'INFO of {algorithm.name} must have keeps={found!r}, which is what the clients '
        f'of its process keep of models, found {algorithm.keeps!r}.'
    )


def _local_terms(
    algorithm: algorithms.Info,
) -> list[tff_kd.client.local_terms.LocalTerm]:
  """Returns the terms of the clients' loss that flags add to the algorithm's own."""
  of_algorithm, terms = set(algorithm.flags.values()), []
  if args.LOCAL_TARGET.value != 'none':
    terms.append(
        tff_kd.LocalDistillation(
            target=args.LOCAL_TARGET.value,
            weight=args.LOCAL_WEIGHT.value,
            temperature=args.LOCAL_TEMPERATURE.value,
            history_size=args.HISTORY_SIZE.value,
        )
    )
  if args.NOT_TRUE_WEIGHT.value and 'not_true_weight' not in of_algorithm:
    terms.append(
        tff_kd.NotTrueDistillation(
            weight=args.NOT_TRUE_WEIGHT.value,
            temperature=args.NOT_TRUE_TEMPERATURE.value,
        )
    )
  if args.PROXIMAL_WEIGHT.value and 'proximal_weight' not in of_algorithm:
    terms.append(tff_kd.ProximalTerm(weight=args.PROXIMAL_WEIGHT.value))
  # Terms that look at how often a client has each class.
  if args.PRIOR_TAU.value:
    terms.append(
        tff_kd.PriorCorrection(
            tau=args.PRIOR_TAU.value, smoothing=args.PRIOR_SMOOTHING.value
        )
    )
  if args.VACANT_WEIGHT.value:
    terms.append(tff_kd.VacantClassDistillation(weight=args.VACANT_WEIGHT.value))
  if args.ABSENT_SCALE.value not in (None, 1.0):
    terms.append(tff_kd.RestrictedSoftmax(scale=args.ABSENT_SCALE.value))
  return terms


def _consensus_rule(algorithm: algorithms.Info) -> Any:
  """Returns how clients' predictions are combined and compressed."""
  if algorithm.consensus is None or not args.predicts():
    return _UNSET  # A task's default may name a rule; a given one is refused.
  given = (
      args.CONSENSUS, args.PREDICTION_BITS, args.PREDICTION_TOP, args.PRIOR,
      args.SHARPNESS,
  )
  if all(flag.value is None for flag in given):
    return _UNSET
  rule = rules.get(args.CONSENSUS.value or algorithm.consensus)
  aligned = knowledge.Aligned(rule, num_steps=0)  # Neither aligned nor sharpened.
  if isinstance(rule, knowledge.Aligned):
    aligned, rule = rule, rule.rule
  # Clients code what they have aligned.
  changes = dict(rule=_coded(rule))
  if args.SHARPNESS.value is not None:
    changes['sharpness'] = args.SHARPNESS.value
  if args.PRIOR.value is not None:
    steps = aligned.num_steps or knowledge.Aligned.num_steps
    changes.update(prior=args.prior(), num_steps=steps)
  found = dataclasses.replace(aligned, **changes)
  return found if found.num_steps or found.sharpness != 1.0 else found.rule


def _companion(algorithm: algorithms.Info, task: tff_kd.data.Task) -> Any:
  """Returns the companion that gives the densities by which some rules weigh."""
  if algorithm.consensus is None or args.CONSENSUS.value not in rules.BY_DENSITY:
    return _UNSET
  if not args.predicts():
    return _UNSET
  if task.num_classes is None:
    raise UserError(
        f'--consensus={args.CONSENSUS.value} weighs by how frequent the classes are at a '
        f'client, and {task.name} has none. Take mean_logits.'
    )
  return tff_kd.client.companions.density.LabelDensity(max(task.num_classes, 2))


def _coded(rule: knowledge.ConsensusRule) -> knowledge.ConsensusRule:
  """Returns a rule over predictions that are coded, if flags say so."""
  bits, top = args.PREDICTION_BITS.value, args.PREDICTION_TOP.value
  if bits is None and top is None:
    return rule
  if not rule.over_probabilities:
    raise UserError(
        '--prediction_bits and --prediction_top change probabilities, and here the '
        'predictions are combined as logits. Add --consensus=mean_probabilities, era, '
        'enhanced_era or aligned_probabilities.'
    )
  if bits is not None:
    return knowledge.Quantized(rule, bits)
  return knowledge.TopClasses(rule, top)


def _split_transfer(
    algorithm: algorithms.Info, task: tff_kd.data.Task
) -> tuple[tff_kd.data.Examples, tff_kd.data.Examples]:
  """Returns the transfer examples to distil on, and those that are negatives."""
  rows = np.arange(len(task.transfer))
  left = len(rows)
  if 'negatives' in algorithm.parameters:
    left -= args.NUM_NEGATIVES.value
  return task.transfer.take(rows[:left]), task.transfer.take(rows[left:])


def _negatives(algorithm: algorithms.Info, task: tff_kd.data.Task) -> Any:
  negatives = _split_transfer(algorithm, task)[1]
  return tff_kd.TransferSet(negatives.inputs, directory=args.CACHE_DIR.value)


def _transfer_set(algorithm: algorithms.Info, task: tff_kd.data.Task) -> Any:
  public = _split_transfer(algorithm, task)[0]
  has_labels = np.arange(len(public)) < args.TRANSFER_LABELS.value
  has_labels &= public.counted
  return tff_kd.TransferSet(
      public.inputs,
      public.labels if has_labels.any() else None,
      label_mask=None if has_labels.all() or not has_labels.any() else has_labels,
      subset_size=args.TRANSFER_PER_ROUND.value,
      validation_size=args.TRANSFER_VALIDATION.value,
      seed=args.SEED.value,
      directory=args.CACHE_DIR.value,
  )


def _calibrate_on(task: tff_kd.data.Task) -> Any:
  if not args.CALIBRATE.value:
    return None
  return tff_kd.TransferSet(task.transfer.inputs, directory=args.CACHE_DIR.value)


def _clients_start_from(algorithm: algorithms.Info) -> Optional[str]:
  if 'back_distillation' in algorithm.parameters and not args.BACK.value:
    return None  # It is a task's default; a given value is refused.
  return args.CLIENTS_START_FROM.value


def _knowledge_aggregator(algorithm: algorithms.Info) -> Any:
  if 'transfer_set' not in algorithm.parameters or not args.predicts():
    return _UNSET
  return _aggregator(
      args.ROBUST_KNOWLEDGE.value, args.KNOWLEDGE_NORM_BOUND.value,
      args.KNOWLEDGE_BITS.value,
  )


def _epsilon() -> Any:
  epsilon = args.CERTAINTY_EPSILON.value
  if epsilon is None:
    return _UNSET
  return None if np.isposinf(epsilon) else epsilon


def _distillation(
    algorithm: algorithms.Info, task: tff_kd.data.Task, parameter: str, **own: Any
) -> Any:
  """Returns the builder's default settings, changed by the flags that were set."""
  if args.AUGMENT.value and task.augment is None:
    raise UserError(
        f'--augment: the task {task.name} has no random change of its inputs '
        '(`Task.augment`). Leave the flag out.'
    )
  every, patience = args.VALIDATE_EVERY.value, args.SERVER_PATIENCE.value
  if every is not None and every >= train_checks.server_steps()[parameter]:
    patience = None  # Of the other stage, which is longer: this one has one look only.
  changes = dict(
      own,
      temperature=args.TEMPERATURE.value,
      distillation_weight=args.DISTILLATION_WEIGHT.value,
      batch_size=args.SERVER_BATCH.value,
      validate_every=every,
      patience=patience,
      augment=task.augment if args.AUGMENT.value else None,
  )
  return dataclasses.replace(
      algorithm.parameters[parameter].default,
      **{name: value for name, value in changes.items() if value is not None},
  )


def _forward(algorithm: algorithms.Info, task: tff_kd.data.Task) -> Any:
  # A teacher always starts from its present weights.
  is_student = 'teacher_fn' not in algorithm.parameters
  found = _distillation(
      algorithm, task, 'distillation', target=args.target(),
      num_steps=args.SERVER_STEPS.value,
      start=args.STUDENT_START.value if is_student else None,
  )
  if args.SCHEDULE.value is None:
    return found
  return dataclasses.replace(found, schedule=_SCHEDULES[args.SCHEDULE.value])


def _back(algorithm: algorithms.Info, task: tff_kd.data.Task) -> Any:
  if not args.BACK.value:
    return None
  return _distillation(
      algorithm, task, 'back_distillation', num_steps=args.BACK_STEPS.value,
      start=args.STUDENT_START.value,
  )


def _adam(learning_rate: Optional[float]) -> Any:
  if learning_rate is None:
    return _UNSET
  return tff.learning.optimizers.build_adam(learning_rate)


# By parameter of a builder, the function that makes its value of the flags.
_MAKERS: dict[str, Callable[[algorithms.Info, tff_kd.data.Task], Any]] = {
    'negatives': _negatives,
    'epsilon': lambda algorithm, task: _epsilon(),
    'transfer_set': _transfer_set,
    'calibrate_on': lambda algorithm, task: _calibrate_on(task),
    'prior': lambda algorithm, task: args.prior() if args.CALIBRATE.value else None,
    'clients_start_from': lambda algorithm, task: _clients_start_from(algorithm),
    'consensus_rule': lambda algorithm, task: _consensus_rule(algorithm),
    'companion': _companion,
    'knowledge_aggregator': lambda algorithm, task: _knowledge_aggregator(algorithm),
    'mentor_fn': lambda algorithm, task: task.teachers[args.MENTOR.value],
    'teacher_fn': lambda algorithm, task: task.teachers[args.TEACHER.value],
    'generator_optimizer': lambda algorithm, task: _adam(args.GENERATOR_RATE.value),
    'teacher_optimizer': lambda algorithm, task: _adam(args.TEACHER_RATE.value),
    'student_optimizer': lambda algorithm, task: _adam(args.STUDENT_RATE.value),
    'distillation': _forward,
    'back_distillation': _back,
}
