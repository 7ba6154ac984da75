"""Checks for flags of `pipelines.train` that exclude each other, without TensorFlow.

These are absl's validators, but for the time: absl would ask them before flags have the
values of --config and of the task. `run` asks them, once all flags have theirs.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Union

from absl import flags

from pipelines import train_flags as args
from pipelines import UserError
from tff_kd import checks
from tff_kd import data
from tff_kd import own_files

# Whether the checks are being run.
_running = False
# Flags that have an effect with differential privacy only.
_OF_PRIVACY = (
    'delta', 'model_clip', 'knowledge_clip', 'knowledge_share', 'private_channels',
)
# Flags that have an effect where clients send predictions only.
_OF_PREDICTIONS = (
    'consensus', 'prior', 'consensus_sharpness', 'prediction_bits', 'prediction_top',
    'knowledge_bits', 'robust_knowledge', 'knowledge_norm_bound', 'knowledge_clip',
    'knowledge_share', 'secure_knowledge_bound', 'coverage',
)
_OF_SECURE_SUMS = ('secure_bits', 'secure_model_bound', 'secure_knowledge_bound')


def run() -> None:
  """Runs all checks.

  Raises:
    UserError: If flags do not go together; a line for each reason.
  """
  global _running
  _running = True
  try:
    flags.FLAGS.validate_all_flags()
  except flags.IllegalFlagValueError as error:
    raise UserError(str(error)) from None
  finally:
    _running = False


def must_resume() -> bool:
  return args.RESUME.value and bool(flags.FLAGS['resume'].present)


def is_private() -> bool:
  return args.EPSILON.value is not None or args.NOISE_MULTIPLIER.value is not None


def has_falling_rate() -> bool:
  """Returns whether a learning rate falls until the last round."""
  schedules = (args.CLIENT_RATE_SCHEDULE, args.SERVER_RATE_SCHEDULE)
  return any(flag.value != 'constant' for flag in schedules)


def check_models(flag: str, known: Sequence[str]) -> None:
  """Refuses names of models that the task does not have.

  Raises:
    flags.ValidationError: If there is one.
  """
  names = flags.FLAGS[flag].value
  unknown = sorted(set(names if isinstance(names, list) else [names]) - set(known))
  if unknown:
    raise flags.ValidationError(
        f'--{flag}={",".join(unknown)} is no such model of --task={args.TASK.value}. '
        f'Choose of {", ".join(known)}.{checks.did_you_mean(unknown[0], known)}'
    )


def check_models_of(task: 'Union[data.Task, data.tasks.TaskInfo]') -> None:
  """Refuses names of models that a task does not have, as far as they have an effect.

  Raises:
    flags.ValidationError: If there is one.
  """
  for flag, known in (
      ('student', task.students), ('teacher', task.teachers), ('mentor', task.teachers)
  ):
    if _takes(flag):
      check_models(flag, list(known))


def check_partition(has_clients: bool) -> None:
  """Refuses flags of a split where the data have clients of their own.

  Args:
    has_clients: Whether they have.

  Raises:
    flags.ValidationError: If there is one.
  """
  for name in ('partition', 'alpha'):
    if has_clients and flags.FLAGS[name].present:
      raise flags.ValidationError(
          f'--{name} has no effect with --task={args.TASK.value}, whose data have their '
          'clients. Leave it out.'
      )


def _together(*names: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
  """Registers a check of these flags, which raises `flags.ValidationError`."""

  def register(check):
    def ask(_) -> bool:
      if _running:
        check()
      return True

    flags.register_multi_flags_validator(names, ask)
    return check

  return register


def _is_own_flag(name: str) -> bool:
  """Returns whether the algorithm takes a flag as one of its own."""
  return name in args.algorithm().flags.values()


def _task() -> data.tasks.TaskInfo:
  return data.task_info(args.TASK.value)


def _no_effect(name: str, other: str, is_used: Callable[[], bool], why: str) -> None:
  """Refuses a flag that is given and has no effect.

  Args:
    name: The flag.
    other: The flag that decides whether it has an effect.
    is_used: Returns whether it has.
    why: When it has none: 'with --...' or 'without --...'; {} is the other's value.
  """

  @_together(name, other)
  def _():
    if flags.FLAGS[name].present and not is_used():
      reason = why.format(flags.FLAGS[other].value)
      raise flags.ValidationError(f'--{name} has no effect {reason}. Leave it out.')


def _takes(name: str) -> bool:
  return args.is_taken(args.algorithm(), name)


def _register_unused() -> None:
  for name in args.own_flags():
    if name != 'algorithm':
      _no_effect(
          name, 'algorithm', functools.partial(_takes, name), 'with --algorithm={}'
      )
  _no_effect(
      'alpha', 'partition',
      lambda: args.PARTITION.value in ('dirichlet', 'quantity_skew'),
      'with --partition={}',
  )
  _no_effect(
      'shards_per_client', 'partition', lambda: args.PARTITION.value == 'shards',
      'with --partition={}',
  )
  for name in ('local_weight', 'local_temperature'):
    _no_effect(
        name, 'local_target',
        lambda: args.LOCAL_TARGET.value != 'none' or _is_own_flag('local_weight'),
        'without --local_target',
    )
  _no_effect(
      'history_size', 'local_target',
      lambda: args.LOCAL_TARGET.value == 'student_history'
      or _is_own_flag('history_size'),
      'without --local_target=student_history',
  )
  _no_effect(
      'not_true_temperature', 'not_true_weight',
      lambda: bool(args.NOT_TRUE_WEIGHT.value) or _is_own_flag('not_true_weight'),
      'without --not_true_weight',
  )
  _no_effect(
      'prior_smoothing', 'prior_tau', lambda: bool(args.PRIOR_TAU.value),
      'without --prior_tau',
  )
  _no_effect(
      'student_start', 'clients_start_from',
      lambda: args.CLIENTS_START_FROM.value == 'average',
      'without --clients_start_from=average',
  )
  for name in (
      'back_steps', 'student_learning_rate', 'clients_start_from', 'student_start'
  ):
    _no_effect(
        name, 'back_distillation',
        lambda: args.BACK.value or not _takes('back_distillation'),
        'with --noback_distillation',
    )
  for name in ('prior', 'clients_start_from'):
    _no_effect(
        name, 'calibrate',
        lambda: args.CALIBRATE.value or not _takes('calibrate'),
        'without --calibrate',
    )
  _no_effect(
      'data_dir', 'task', lambda: 'data_dir' in _task().options, 'with --task={}'
  )
  _no_effect(
      'straggler_steps', 'straggler_share', lambda: args.STRAGGLER_SHARE.value > 0,
      'without --straggler_share',
  )
  _no_effect(
      'trimmed_share', 'robust_model',
      lambda: 'trimmed_mean' in args.ROBUST_MODEL.value + args.ROBUST_KNOWLEDGE.value,
      'without trimmed_mean',
  )
  _no_effect(
      'staleness_power', 'max_delay', lambda: args.MAX_DELAY.value > 0,
      'without --max_delay',
  )
  for name in _OF_PREDICTIONS:
    _no_effect(name, 'target', args.predicts, 'with --target={}')
  for name in _OF_PRIVACY:
    _no_effect(name, 'epsilon', is_private, 'without --epsilon or --noise_multiplier')
  for name in _OF_SECURE_SUMS:
    _no_effect(
        name, 'secure_aggregation', lambda: args.SECURE_AGGREGATION.value,
        'without --secure_aggregation',
    )
  for name in ('ray_workers', 'ray_resources'):
    _no_effect(
        name, 'ray_address', lambda: bool(args.RAY_ADDRESS.value), 'without --ray_address'
    )
  _no_effect(
      'device', 'runtime',
      lambda: bool(args.RAY_ADDRESS.value) or args.RUNTIME.value != 'tff',
      'with --runtime={}',
  )
  _no_effect(
      'runtime', 'ray_address', lambda: not args.RAY_ADDRESS.value, 'with --ray_address'
  )
  _no_effect(
      'client_momentum', 'client_optimizer',
      lambda: args.CLIENT_OPTIMIZER.value == 'sgd', 'with --client_optimizer={}',
  )


_register_unused()


def ray_resources() -> dict[str, float]:
  """Returns --ray_resources as amounts by name.

  Raises:
    flags.ValidationError: If one is not of the form name=amount, with a positive
      amount.
  """
  resources = {}
  for text in args.RAY_RESOURCES.value:
    name, _, amount = text.partition('=')
    try:
      resources[name] = float(amount)
      is_amount = bool(name) and 0.0 < resources[name] < float('inf')
    except ValueError:
      is_amount = False
    if not is_amount:
      raise flags.ValidationError(
          '--ray_resources must be a list of name=amount with positive amounts, such as '
          f'CPU=4,GPU=1, found {text!r}.'
      )
  return resources


@_together('ray_resources')
def _():
  ray_resources()


@_together('student', 'teacher', 'mentor', 'task', 'algorithm')
def _():
  # The models of a user's own task are known when it is loaded.
  if not own_files.is_own(args.TASK.value):
    check_models_of(_task())


@_together('partition', 'alpha', 'task')
def _():
  # For a user's own task this is checked when it is loaded.
  check_partition(_task().has_clients)


for _side in ('client', 'server'):

  @_together(f'{_side}_warmup_rounds', 'rounds')
  def _(side: str = _side):
    warmup = flags.FLAGS[f'{side}_warmup_rounds'].value
    if warmup >= args.ROUNDS.value:
      raise flags.ValidationError(
          f'--{side}_warmup_rounds is {warmup}, and must be below --rounds, '
          f'{args.ROUNDS.value}.'
      )


@_together('clients_per_round', 'num_clients')
def _():
  if args.CLIENTS_PER_ROUND.value > args.NUM_CLIENTS.value:
    raise flags.ValidationError(
        f'--clients_per_round is {args.CLIENTS_PER_ROUND.value}, but there are only '
        f'{args.NUM_CLIENTS.value} clients. Lower it, or raise --num_clients.'
    )


@_together('transfer_labels', 'transfer_size')
def _():
  if args.TRANSFER_LABELS.value > args.TRANSFER_SIZE.value:
    raise flags.ValidationError(
        f'--transfer_labels is {args.TRANSFER_LABELS.value}, but the transfer set has '
        f'only {args.TRANSFER_SIZE.value} examples. Lower it, or raise --transfer_size.'
    )


@_together('num_negatives', 'transfer_size', 'transfer_labels', 'algorithm')
def _():
  unlabelled = args.TRANSFER_SIZE.value - args.TRANSFER_LABELS.value
  takes_negatives = 'negatives' in args.algorithm().parameters
  if takes_negatives and args.NUM_NEGATIVES.value >= unlabelled:
    raise flags.ValidationError(
        f'--num_negatives is {args.NUM_NEGATIVES.value}, to be taken from the '
        f'{args.TRANSFER_SIZE.value} transfer examples beside the '
        f'{args.TRANSFER_LABELS.value} with labels, and some must be left. Lower it, or '
        'raise --transfer_size.'
    )


@_together('pretrain_epochs', 'transfer_labels')
def _():
  if args.PRETRAIN_EPOCHS.value and not args.TRANSFER_LABELS.value:
    raise flags.ValidationError('--pretrain_epochs needs labels: set --transfer_labels.')


@_together('distillation_weight', 'transfer_labels')
def _():
  if args.DISTILLATION_WEIGHT.value not in (None, 1.0) and not args.TRANSFER_LABELS.value:
    raise flags.ValidationError(
        '--distillation_weight below 1 needs labels: set --transfer_labels.'
    )


def server_steps() -> dict[str, int]:
  """Returns the steps a round of the server's stages, by the builder's parameter."""
  parameters, found = args.algorithm().parameters, {}
  for name, steps in (
      ('distillation', args.SERVER_STEPS), ('back_distillation', args.BACK_STEPS)
  ):
    if name in parameters and (name != 'back_distillation' or args.BACK.value):
      found[name] = steps.value or parameters[name].default.num_steps
  return found


@_together(
    'server_patience', 'validate_every', 'server_steps', 'back_steps',
    'back_distillation', 'algorithm',
)
def _():
  every = args.VALIDATE_EVERY.value
  if args.SERVER_PATIENCE.value is None or not _takes('server_patience'):
    return
  if every is None:
    raise flags.ValidationError(
        '--server_patience has no effect without --validate_every: it counts the '
        'validations between steps. Set both.'
    )
  steps = max(server_steps().values())
  if every >= steps:
    raise flags.ValidationError(
        f'--server_patience has no effect with --validate_every={every}: the server '
        f'takes {steps} steps a round, and validates once, after them. Validate more '
        'often.'
    )


@_together('target')
def _():
  args.target()


@_together('prior')
def _():
  args.prior()


@_together('prediction_bits', 'prediction_top', 'knowledge_bits', 'algorithm')
def _():
  codes = (
      args.PREDICTION_BITS.value, args.PREDICTION_TOP.value, args.KNOWLEDGE_BITS.value
  )
  if not _is_own_flag('prediction_bits') and sum(code is not None for code in codes) > 1:
    raise flags.ValidationError(
        'Of --prediction_bits, --prediction_top and --knowledge_bits only one can be the '
        'code of the predictions.'
    )


for _channel in ('model', 'knowledge'):

  @_together(f'{_channel}_bits', f'robust_{_channel}')
  def _(channel: str = _channel):
    methods = flags.FLAGS[f'robust_{channel}'].value
    is_sum = set(methods) <= {'zeroing', 'clipping'}
    if flags.FLAGS[f'{channel}_bits'].value is not None and not is_sum:
      raise flags.ValidationError(
          f'--{channel}_bits are of a sum, and --robust_{channel}={methods[0]} is none. '
          'Leave one out, or take zeroing and clipping.'
      )


@_together('resume', 'output_dir')
def _():
  if must_resume() and not args.OUTPUT_DIR.value:
    raise flags.ValidationError(
        '--resume needs the --output_dir of the run to go on with.'
    )


# What would make the guarantee of privacy false, where the process does not see it.


@_together('compare_with_fed_avg', 'epsilon', 'noise_multiplier')
def _():
  flag = flags.FLAGS['compare_with_fed_avg']
  if is_private() and flag.present and flag.value:
    raise flags.ValidationError(
        '--compare_with_fed_avg would train the same clients without noise, and with '
        'that what differential privacy promises them is void. Leave it out, and compare '
        'with a run of its own.'
    )


@_together('client_weighting', 'epsilon', 'noise_multiplier')
def _():
  if is_private() and args.WEIGHTING.value == 'num_examples':
    raise flags.ValidationError(
        '--client_weighting=num_examples and differential privacy do not go together: '
        'how many examples a client has is its secret, and a weight without a bound '
        'would make its part as large as it likes. Leave it out.'
    )


@_together('delta', 'num_clients')
def _():
  if is_private() and args.DELTA.value * args.NUM_CLIENTS.value >= 1.0:
    raise flags.ValidationError(
        '--delta must be well below 1 / --num_clients, '
        f'{1 / args.NUM_CLIENTS.value:.2g}, found {args.DELTA.value:g}: it is the '
        'probability with which a client may be told in full.'
    )


@_together('availability', 'epsilon', 'noise_multiplier')
def _():
  if is_private() and args.AVAILABILITY.value is not None:
    raise flags.ValidationError(
        '--availability and differential privacy do not go together: the fewer clients '
        'can be reached, the more likely each of them is chosen, and that is not in the '
        'account. Leave one out.'
    )


@_together('sampling', 'epsilon', 'noise_multiplier')
def _():
  if is_private() and args.SAMPLING.value == 'weighted':
    raise flags.ValidationError(
        '--sampling=weighted and differential privacy do not go together: clients would '
        'be chosen by how many examples they have, which is their secret. Take poisson, '
        'uniform or cyclic.'
    )


@_together('private_channels', 'algorithm')
def _():
  algorithm = args.algorithm()
  sends = {'model': algorithm.averages, 'knowledge': algorithm.sends_knowledge}
  for channel in args.PRIVATE_CHANNELS.value:
    if not sends.get(channel, True):
      raise flags.ValidationError(
          f'--private_channels={channel} is a channel that --algorithm={algorithm.name} '
          'does not send, so that nothing would have noise. Leave it out.'
      )


@_together('private_channels', 'epsilon')
def _():
  if args.PRIVATE_CHANNELS.value and args.EPSILON.value is not None:
    raise flags.ValidationError(
        '--private_channels leaves the other channel without noise, so that there is no '
        'noise with which --epsilon would hold. Leave it out; or give '
        '--noise_multiplier in place of --epsilon, to see what noise does.'
    )
