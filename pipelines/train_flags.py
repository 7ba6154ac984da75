"""The flags of `pipelines.train`; imports no TensorFlow, so that `--help` is quick."""

from collections.abc import Callable
import importlib.util
import json
import pathlib
from typing import Any, Optional, Union

from absl import app
from absl import flags

from pipelines import task_defaults
from pipelines import topics
from tff_kd import algorithms
from tff_kd import checks
from tff_kd import data
from tff_kd.knowledge import rules
from tff_kd import own_files

# The keys of the job's tables.
OPTIMIZERS = ['adam', 'sgd']
SCHEDULES = ['constant', 'cosine']
# Of rates over rounds.
RATE_SCHEDULES = ['constant', 'cosine', 'linear']


topics.topic('What to run')
ALGORITHM = flags.DEFINE_string(
    'algorithm', 'fed_distillation',
    'The algorithm. A path that ends in .py is an algorithm of your own '
    '(examples/own_algorithm.py).\n'
    + '\n'.join(
        f'{name}: {its.summary}. Uploads: {", ".join(its.uploads)}.'
        + (f" Needs: {', '.join(its.needs)}." if its.needs else '')
        for name, its in algorithms.REGISTRY.items()
    ),
)


def _is_known(get: Callable[[str], Any]) -> Callable[[Optional[str]], bool]:
  """Returns a validator of a name, or of the path of a file of the user's."""

  def check(name: Optional[str]) -> bool:
    try:
      if name is not None:
        get(name)
    except ValueError as error:
      raise flags.ValidationError(str(error)) from None
    return True

  return check


flags.register_validator(ALGORITHM, _is_known(algorithms.get))
ROUNDS = flags.DEFINE_integer('rounds', 30, 'Rounds at most.', lower_bound=1)
PATIENCE = flags.DEFINE_integer(
    'patience', 15, 'Stop after so many rounds without a better --monitor; '
    '0 for never.', lower_bound=0,
)
MONITOR = flags.DEFINE_string(
    'monitor', None, 'The metric whose best value makes the best round, a column of '
    'metrics.csv; of errors and losses the lowest is the best. Unset: '
    "validation/student_ and the task's metric: accuracy; of a regression rmse; of a "
    'task of your own, the first of its metrics_fn.'
)
EVALUATED_CLIENTS = flags.DEFINE_integer(
    'evaluated_clients', 100, "Where clients keep models: of how many of these the mean "
    'is reported, drawn once, by the seed.', lower_bound=1,
)
SEED = flags.DEFINE_integer(
    'seed', 0, 'Decides the split, the initial weights, who takes part and every '
    'order of examples.', lower_bound=0,
)
FEDAVG = flags.DEFINE_bool(
    'compare_with_fed_avg', True,
    'Also train plain FedAvg of the same student, to the same bytes, for three times the '
    'rounds at most.'
)

topics.topic('Data and clients')
TASK = flags.DEFINE_string(
    'task', 'mnist5k', 'The data and the models; each task has its own defaults of some '
    'flags. A path that ends in .py is a task of your own (examples/own_task.py).\n'
    + '\n'.join(
        f'{name}: {its.summary}. Students: {", ".join(its.students)}; teachers: '
        f'{", ".join(its.teachers)}.'
        + task_defaults.described(name)
        for name, its in data.TASKS.items()
    ),
)


def _check_task(name: str) -> bool:
  if name not in data.TASKS and not own_files.is_own(name):
    raise flags.ValidationError(
        f'--task must be one of {", ".join(data.TASKS)}, or the path of a file of your '
        f'own that ends in .py, found {name!r}.{checks.did_you_mean(name, data.TASKS)}'
    )
  return True


flags.register_validator(TASK, _check_task)
DATA_DIR = flags.DEFINE_string(
    'data_dir', None, 'A folder with data, for --task=idx and for tasks of your own.'
)
TRANSFER_SIZE = flags.DEFINE_integer(
    'transfer_size', 1000, 'Examples that the server holds.', lower_bound=1
)
VALIDATION_SIZE = flags.DEFINE_integer(
    'validation_size', 500, 'Labelled examples for choosing the best round.',
    lower_bound=1,
)
NUM_CLIENTS = flags.DEFINE_integer('num_clients', 20, 'Clients.', lower_bound=1)
CLIENTS_PER_ROUND = flags.DEFINE_integer(
    'clients_per_round', 8, 'Of these, how many take part.', lower_bound=1
)
PARTITION = flags.DEFINE_enum(
    'partition', 'dirichlet', sorted(data.partition.PARTITIONS),
    'How the examples are split over clients.',
)
ALPHA = flags.DEFINE_float(
    'alpha', 0.1, 'Concentration, for dirichlet and quantity_skew.'
)
SHARDS = flags.DEFINE_integer(
    'shards_per_client', 2, 'For --partition=shards.', lower_bound=1
)

topics.topic(
    'What hinders clients; all is drawn from the seed, the round and the client'
)
SAMPLINGS = ['cyclic', 'poisson', 'uniform', 'weighted']
SAMPLING = flags.DEFINE_enum(
    'sampling', 'uniform', SAMPLINGS,
    "How a round's clients are chosen; weighted: by their number of examples; poisson: "
    'each by itself, so that there are --clients_per_round in expectation.'
)
AVAILABILITY = flags.DEFINE_string(
    'availability', None, 'A CSV file of when clients can be reached: lines of client '
    '(its name or number), first round, last round, below a header. Always if unset.'
)
DROPOUT_BEFORE = flags.DEFINE_float(
    'dropout_before', 0.0, 'Probability that a chosen client is gone before it begins.'
)
DROPOUT_AFTER = flags.DEFINE_float(
    'dropout_after', 0.0, 'Probability that what a client sends does not arrive.'
)
STRAGGLER_SHARE = flags.DEFINE_float(
    'straggler_share', 0.0, 'Probability that a client does only a part of its steps.'
)
STRAGGLER_STEPS = flags.DEFINE_float(
    'straggler_steps', 0.5, 'The smallest such part.'
)
DELAY_SHARE = flags.DEFINE_float(
    'delay_share', 0.0, 'Probability that a client reports in a later round.'
)
MAX_DELAY = flags.DEFINE_integer(
    'max_delay', 0, 'By how many rounds at most; drawn evenly from 1.', lower_bound=0
)
STALENESS_POWER = flags.DEFINE_float(
    'staleness_power', 0.5, "a of the factor (1 + delay)^-a of a late client's weight.",
    lower_bound=0.0,
)
COVERAGE = flags.DEFINE_float(
    'coverage', 1.0, 'The part of the transfer examples on which each client predicts.'
)
MIN_REPORTS = flags.DEFINE_integer(
    'min_reports', 0, 'A round with fewer reports is skipped.', lower_bound=0
)
LABEL_SHARE = flags.DEFINE_float(
    'label_share', 1.0, "The part of a client's examples whose labels it knows; the "
    'others serve a --local_target only.'
)
INPUT_SHARE = flags.DEFINE_float(
    'input_share', 1.0, 'The part of the input features that a client observes.'
)

topics.topic('What a few bad clients may do')
ROBUST_MODEL = flags.DEFINE_list(
    'robust_model', [], "How clients' weights are combined: TFF's adaptive zeroing "
    'and clipping, one or both; or, number by number, median or trimmed_mean, for which '
    'the server holds the weights of single clients. Their weighted mean if unset.'
)
ROBUST_KNOWLEDGE = flags.DEFINE_list(
    'robust_knowledge', [], "Likewise, of clients' predictions."
)
for _flag in (ROBUST_MODEL, ROBUST_KNOWLEDGE):
  flags.register_validator(
      _flag,
      lambda its: set(its) <= {'zeroing', 'clipping'}
      or its in (['median'], ['trimmed_mean']),
      f'--{_flag.name} must be of zeroing and clipping, or one of median and '
      'trimmed_mean.'
  )
TRIMMED_SHARE = flags.DEFINE_float(
    'trimmed_share', 0.1, 'Of trimmed_mean: the share of clients left out at each end.',
    lower_bound=0.0, upper_bound=0.5,
)
MODEL_NORM_BOUND = flags.DEFINE_float(
    'model_norm_bound', None, 'A client whose weights have moved further than this (L2 '
    'norm) is left out of their mean, and counted.'
)
KNOWLEDGE_NORM_BOUND = flags.DEFINE_float(
    'knowledge_norm_bound', None, 'Likewise, of the L2 norm of all its predictions.'
)

topics.topic('What is rounded on its way up')
MODEL_BITS = flags.DEFINE_integer(
    'model_bits', None, "Bits of each number of clients' weights on their way up, in "
    'arrays of 1,000 or more; floats if unset. With --robust_model=zeroing,clipping this '
    "is TFF's compression_aggregator.", lower_bound=1, upper_bound=16
)
KNOWLEDGE_BITS = flags.DEFINE_integer(
    'knowledge_bits', None, 'Likewise, of what clients send of their predictions.',
    lower_bound=1, upper_bound=16
)

topics.topic(
    'What others can learn of a client; --epsilon or --noise_multiplier turn noise on'
)
EPSILON = flags.DEFINE_float(
    'epsilon', None, 'Differential privacy, of a client with all of its examples: the '
    'budget at --delta. Finds the noise with which it is spent after --rounds, unless '
    '--noise_multiplier gives that; ends before it is passed.', lower_bound=0.0,
)
DELTA = flags.DEFINE_float(
    'delta', 1e-5, 'The delta of that; well below 1 / --num_clients.'
)
NOISE_MULTIPLIER = flags.DEFINE_float(
    'noise_multiplier', None, 'The standard deviation of the noise by the clip, worth as '
    'much as that of all channels together.', lower_bound=0.0,
)
_IS_CLIP = '--%s must be a number above 0, inf, or adaptive.'


def _is_clip(text: Optional[str]) -> bool:
  try:
    return text in (None, 'adaptive') or float(text) > 0.0
  except ValueError:
    return False


MODEL_CLIP = flags.DEFINE_string(
    'model_clip', 'adaptive', "To what L2 norm a client's weight delta is scaled down; "
    'adaptive: to the running median of norms, estimated privately.'
)
KNOWLEDGE_CLIP = flags.DEFINE_string(
    'knowledge_clip', None, 'Likewise, all that a client sends of its predictions in a '
    'round; adaptive if unset, but of fd 50.'
)
for _clip in (MODEL_CLIP, KNOWLEDGE_CLIP):
  flags.register_validator(_clip, _is_clip, _IS_CLIP % _clip.name)
KNOWLEDGE_SHARE = flags.DEFINE_float(
    'knowledge_share', 0.5, 'The share of the privacy that predictions get where weights '
    'travel, too.'
)
PRIVATE_CHANNELS = flags.DEFINE_list(
    'private_channels', [], 'Noise on one channel only, model or knowledge, to see what '
    'it does; where the other travels, too, that is no guarantee.'
)
SECURE_AGGREGATION = flags.DEFINE_bool(
    'secure_aggregation', False, 'Clip, round and sum what clients send as a secure '
    'protocol would. The simulation sums in the clear: it shows the numerics, and keeps '
    'nothing secret.'
)
SECURE_BITS = flags.DEFINE_integer(
    'secure_bits', None, 'Of that: bits of a number, summed under a modulus; needs '
    '--secure_model_bound and --secure_knowledge_bound. 32 if unset.', lower_bound=2,
    upper_bound=24,
)
SECURE_MODEL_BOUND = flags.DEFINE_float(
    'secure_model_bound', None, "The largest number in a client's weight delta; it is "
    'estimated if unset.'
)
SECURE_KNOWLEDGE_BOUND = flags.DEFINE_float(
    'secure_knowledge_bound', None, 'Likewise, in what it sends of its predictions.'
)

topics.topic('Models and local training')
STUDENT = flags.DEFINE_list(
    'student', ['mlp_small'], "The student model, one of the task's. Several, separated "
    'by commas, make cohorts: client k is of cohort k modulo their number.'
)
flags.register_validator(STUDENT, bool, '--student must name a model.')
TEACHER = flags.DEFINE_string('teacher', 'cnn', "The teacher model, one of the task's.")
PRETRAIN_EPOCHS = flags.DEFINE_integer(
    'pretrain_epochs', 0, 'Epochs of central training, of student and teacher, on '
    'the labelled transfer examples, before round 1.', lower_bound=0,
)
CLIENT_OPTIMIZER = flags.DEFINE_enum(
    'client_optimizer', 'sgd', OPTIMIZERS, "The clients' optimizer."
)
CLIENT_RATE = flags.DEFINE_float(
    'client_learning_rate', 0.1, 'Its rate.', lower_bound=0.0
)
CLIENT_MOMENTUM = flags.DEFINE_float(
    'client_momentum', None, 'Momentum of the clients\' SGD, which begins at 0 in each '
    'round; none if unset.', lower_bound=0.0, upper_bound=1.0,
)
CLIENT_WEIGHT_DECAY = flags.DEFINE_float(
    'client_weight_decay', 0.0, 'Decoupled weight decay of the clients: each step also '
    'takes this share, times the learning rate, off each weight.', lower_bound=0.0,
)
CLIENT_CLIP_NORM = flags.DEFINE_float(
    'client_clip_norm', None, 'Scale the gradient of each local step down to this norm, '
    'over all weights together; no clipping if unset.',
)
flags.register_validator(
    CLIENT_CLIP_NORM, lambda its: its is None or 0.0 < its < float('inf'),
    '--client_clip_norm must be a finite number above 0.'
)
CLIENT_RATE_SCHEDULE = flags.DEFINE_enum(
    'client_rate_schedule', 'constant', RATE_SCHEDULES,
    "How the clients' learning rate follows the rounds: constant; or falling to 0 after "
    'the last of --rounds, as half a cosine or linearly.'
)
CLIENT_WARMUP_ROUNDS = flags.DEFINE_integer(
    'client_warmup_rounds', 0, 'In so many of the first rounds the clients\' learning '
    'rate rises in equal steps.', lower_bound=0,
)
CLIENT_EPOCHS = flags.DEFINE_integer(
    'client_epochs', 5, 'Local epochs a round.', lower_bound=1
)
BATCH_SIZE = flags.DEFINE_integer(
    'batch_size', 20, 'Examples a local step.', lower_bound=1
)
SERVER_OPTIMIZER = flags.DEFINE_enum(
    'server_optimizer', 'sgd', OPTIMIZERS,
    'Applies the mean delta to the student.',
)
SERVER_RATE = flags.DEFINE_float(
    'server_learning_rate', 1.0, 'Its rate.', lower_bound=0.0
)
SERVER_RATE_SCHEDULE = flags.DEFINE_enum(
    'server_rate_schedule', 'constant', RATE_SCHEDULES,
    'How the learning rate of --server_optimizer follows the rounds.',
)
SERVER_WARMUP_ROUNDS = flags.DEFINE_integer(
    'server_warmup_rounds', 0, 'In so many of the first rounds that rate rises in equal '
    'steps.', lower_bound=0,
)
WEIGHTING = flags.DEFINE_enum(
    'client_weighting', None, ['num_examples', 'uniform'],
    "A client's weight in both means; num_examples if unset, uniform where they are "
    'private.',
)
LOCAL_TARGET = flags.DEFINE_enum(
    'local_target', 'none', ['none', 'student', 'student_history', 'teacher'],
    'What clients distil from while they train, with any algorithm.',
)
LOCAL_WEIGHT = flags.DEFINE_float(
    'local_weight', 0.2, 'The share of that in their loss; of fed_gkd, too.'
)
LOCAL_TEMPERATURE = flags.DEFINE_float(
    'local_temperature', 1.0, 'T of that.', lower_bound=0.0
)
HISTORY_SIZE = flags.DEFINE_integer(
    'history_size', 5, 'Of how many global students student_history (and fed_gkd) '
    'is the mean.', lower_bound=1,
)
PROXIMAL_WEIGHT = flags.DEFINE_float(
    'proximal_weight', None, 'mu of the proximal term; 0.01 with fed_prox, off with '
    'the others, if unset.', lower_bound=0.0,
)
NOT_TRUE_WEIGHT = flags.DEFINE_float(
    'not_true_weight', None, 'beta of the not-true distillation; 1 with fed_ntd, off '
    'with the others, if unset.', lower_bound=0.0,
)
NOT_TRUE_TEMPERATURE = flags.DEFINE_float(
    'not_true_temperature', 1.0, 'tau of that.', lower_bound=0.0
)
PRIOR_TAU = flags.DEFINE_float(
    'prior_tau', None, 'Label skew: tau of prior-corrected cross-entropy, '
    "CE(z + tau log pi) with the client's own shares pi of the classes (1: balanced "
    'softmax); off if unset. Class counts stay at the client, here and in the next '
    'three.', lower_bound=0.0,
)
PRIOR_SMOOTHING = flags.DEFINE_float(
    'prior_smoothing', 0.0, 'The share of the uniform distribution in pi of that.',
    lower_bound=0.0,
)
VACANT_WEIGHT = flags.DEFINE_float(
    'vacant_weight', None, 'Label skew: lambda of the distillation from the received '
    'student over the classes that the client does not have (FedVLS: 0.1, with '
    '--prior_tau=1); off if unset.', lower_bound=0.0,
)
ABSENT_SCALE = flags.DEFINE_float(
    'absent_scale', None, 'Label skew: factor of the logits of classes that the client '
    "does not have, in the labels' loss only (FedRS); off if unset.",
    lower_bound=0.0, upper_bound=1.0,
)

topics.topic("The server's distillation; unset: the algorithm's own defaults")
TRANSFER_LABELS = flags.DEFINE_integer(
    'transfer_labels', 200, 'How many of the transfer examples have labels: the '
    "server's limited labelled set. 0 for none.", lower_bound=0,
)
TRANSFER_PER_ROUND = flags.DEFINE_integer(
    'transfer_per_round', None, 'Transfer examples a round; all if unset.',
    lower_bound=1,
)
TRANSFER_VALIDATION = flags.DEFINE_integer(
    'transfer_validation', 0, 'Transfer examples set aside to judge the '
    "server's distillation and roll it back.", lower_bound=0,
)
TARGET = flags.DEFINE_string(
    'target', None, 'ensemble, student, or a number between 0 (student) and 1 '
    '(ensemble).'
)
TEMPERATURE = flags.DEFINE_float(
    'temperature', None, "T, in the server's distillation."
)
CONSENSUS = flags.DEFINE_string(
    'consensus', None,
    "How the clients' predictions are combined: their mean (mean_logits), the mean of "
    'probabilities plain (mean_probabilities) or sharpened (era, enhanced_era), or a '
    'mean of logits weighted by certainty (variance, confidence, entropy). A path that '
    'ends in .py is a rule of your own (examples/own_rule.py). Unset: the '
    "algorithm's own.",
)
# Without TensorFlow, unless the rule is of the user's own.
flags.register_validator(CONSENSUS, _is_known(rules.check))
PREDICTION_BITS = flags.DEFINE_integer(
    'prediction_bits', None, "Bits of a class's probability in what clients send, 1 "
    '(the most likely class only) to 8; floats if unset. Needs a consensus of '
    'probabilities (mean_probabilities, era, enhanced_era). Of cfd: 1 if unset, 32 for '
    'floats.', lower_bound=1,
)
PREDICTION_TOP = flags.DEFINE_integer(
    'prediction_top', None, 'Of each prediction clients send the probabilities of so '
    'many of the most likely classes; of all if unset. Needs a consensus of '
    'probabilities.',
    lower_bound=1
)
DISTILLATION_WEIGHT = flags.DEFINE_float(
    'distillation_weight', None, 'The share of the distillation in the loss, where '
    'there are --transfer_labels; the rest is their cross-entropy.'
)
SERVER_STEPS = flags.DEFINE_integer(
    'server_steps', None, 'Steps a round.', lower_bound=1
)
SERVER_BATCH = flags.DEFINE_integer(
    'server_batch_size', None, 'Examples a step.', lower_bound=1
)
SCHEDULE = flags.DEFINE_enum(
    'server_schedule', None, SCHEDULES,
    "The learning rate's course within a round.",
)
VALIDATE_EVERY = flags.DEFINE_integer(
    'validate_every', None, 'Steps between looks at --transfer_validation.',
    lower_bound=1,
)
SERVER_PATIENCE = flags.DEFINE_integer(
    'server_patience', None, 'Looks without improvement before stopping.',
    lower_bound=1,
)
TEACHER_RATE = flags.DEFINE_float(
    'teacher_learning_rate', None, "The teacher's Adam.", lower_bound=0.0
)
BACK = flags.DEFINE_bool(
    'back_distillation', True, 'Refresh the student from the teacher.'
)
BACK_STEPS = flags.DEFINE_integer(
    'back_steps', None, 'Steps of that a round.', lower_bound=1
)
STUDENT_RATE = flags.DEFINE_float(
    'student_learning_rate', None, "The student's Adam on the server.",
    lower_bound=0.0,
)

topics.topic('Of single algorithms; unset: their own defaults')
MENTOR = flags.DEFINE_string(
    'mentor', 'mlp_large', 'Of fml and fed_kd: the model that each client keeps for '
    "itself, one of the task's teachers."
)
NUM_NEGATIVES = flags.DEFINE_integer(
    'num_negatives', 400, 'Of fed_aux: how many of the transfer examples, from the end, '
    "are set aside to stand for what is not a client's own.", lower_bound=1,
)
CERTAINTY_EPSILON = flags.DEFINE_float(
    'certainty_epsilon', None, "Of fed_aux: the privacy that clients' certainty scores "
    'cost, and nothing else of what they send; inf for no noise.',
)
CERTAINTY_DELTA = flags.DEFINE_float('certainty_delta', None, 'The delta of that.')
DOWN_BITS = flags.DEFINE_integer(
    'down_bits', None, "Of cfd: bits of a class's probability in the server's labels.",
    lower_bound=1,
)
DIGEST_EPOCHS = flags.DEFINE_integer(
    'digest_epochs', None, 'Of fed_md: passes over the consensus a round.',
    lower_bound=1,
)
DIGEST_BATCH = flags.DEFINE_integer(
    'digest_batch_size', None, 'Of fed_md: examples a step of that.', lower_bound=1
)
PROTOTYPE_WEIGHT = flags.DEFINE_float(
    'prototype_weight', None, "Of fed_proto: lambda of the distance to the classes' "
    'prototypes.', lower_bound=0.0,
)
REGULARIZER_WEIGHT = flags.DEFINE_float(
    'regularizer_weight', None, "Of fd: lambda of the term with the classes' logits.",
    lower_bound=0.0,
)
SPLIT_LAYER = flags.DEFINE_string(
    'split_layer', None, 'Of fed_gen, moon and fed_proto: the name of the layer whose '
    'outputs are the features; the one before the last with weights if unset.'
)
GENERATOR_STEPS = flags.DEFINE_integer(
    'generator_steps', None, 'Of fed_gen: steps a round, each an exchange with all '
    'clients.', lower_bound=1,
)
GENERATOR_RATE = flags.DEFINE_float(
    'generator_learning_rate', None, "Of fed_gen: the generator's Adam.", lower_bound=0.0
)
GENERATIVE_WEIGHT = flags.DEFINE_float(
    'generative_weight', None, "Of fed_gen: of its terms in the clients' loss.",
    lower_bound=0.0,
)
CONTRAST_WEIGHT = flags.DEFINE_float(
    'contrast_weight', None, 'Of moon: mu of the model-contrastive term.',
    lower_bound=0.0,
)
CONTRAST_TEMPERATURE = flags.DEFINE_float(
    'contrast_temperature', None, 'Of moon: tau of that.', lower_bound=0.0
)
DYNAMIC_WEIGHT = flags.DEFINE_float(
    'dynamic_weight', None, 'Of fed_dyn: alpha of the dynamic regularisation.',
    lower_bound=0.0,
)
ENERGY_ROUNDS = flags.DEFINE_integer(
    'energy_rounds', None, 'Of fed_kd: from which round on the most of the energy of '
    'updates is sent.', lower_bound=1,
)

topics.topic('The run folder')
CONFIG = flags.DEFINE_string(
    'config', None, 'The config.json of a run, whose flags are taken where none are '
    'given here: repeats it in a folder of its own.'
)
DRY_RUN = flags.DEFINE_bool(
    'dry_run', False, 'Say what would be built, moved and held, and train nothing.'
)
OUTPUT_DIR = flags.DEFINE_string(
    'output_dir', None, 'The run folder; one under runs/ if unset.'
)
CACHE_DIR = flags.DEFINE_string(
    'cache_dir', 'runs/cache', "Where the clients' examples and the transfer set are "
    'kept for the workers to read; shared by runs.'
)
RESUME = flags.DEFINE_bool(
    'resume', True, 'Go on with the run in --output_dir, if it holds one, where it was '
    'stopped; --noresume refuses such a folder.'
)
TRACKERS = ['tensorboard', 'mlflow', 'wandb']
TRACKER = flags.DEFINE_list(
    'tracker', ['tensorboard'], 'Where metrics go after each round, beside metrics.csv: '
    'tensorboard (the folder tensorboard of the run), mlflow (where MLFLOW_TRACKING_URI '
    "says, or else the folder mlruns of the run), wandb (Weights & Biases, as it is set "
    'up; WANDB_MODE=offline for the folder wandb of the run); several, separated by '
    'commas, or none with --tracker=. mlflow and wandb must be installed.'
)


def _check_trackers(names: list[str]) -> bool:
  for name in names:
    if name not in TRACKERS:
      raise flags.ValidationError(
          f'--tracker must be of {", ".join(TRACKERS)}, found {name!r}.'
          + checks.did_you_mean(name, TRACKERS)
      )
    if name != 'tensorboard' and importlib.util.find_spec(name) is None:
      raise flags.ValidationError(
          f'--tracker={name} needs the package {name}, which is not installed. Install '
          f'it: `pip install {name}`.'
      )
  return True


flags.register_validator(TRACKER, _check_trackers)
ROUNDS_PER_CHECKPOINT = flags.DEFINE_integer(
    'rounds_per_checkpoint', 5, 'Rounds between checkpoints.', lower_bound=1
)

topics.topic('Where it runs')
DEVICE = flags.DEFINE_list(
    'device', [], 'TensorFlow devices that compute, such as GPU, GPU:0 or CPU. Clients '
    'run in parallel on CPU cores, in turn on one accelerator, spread over several. '
    'Where TensorFlow places them if unset.'
)
RUNTIME = flags.DEFINE_enum(
    'runtime', 'in_process', ['in_process', 'tff'], "in_process: the script's own "
    "TensorFlow computes; tff: TensorFlow Federated's own C++ worker does, on the CPU."
)
WORKERS = flags.DEFINE_list(
    'workers', [], 'host:port of workers (pipelines.worker) over which the clients of '
    'each round are spread; --cache_dir must be the same folder for all of them. This '
    'process computes if unset.'
)
TLS_DIR = flags.DEFINE_string(
    'tls_dir', None, 'The folder `script` that pipelines.certificates has made, for '
    '--workers on other machines.'
)
ALLOW_OPEN = flags.DEFINE_bool(
    'allow_open', False, 'Use workers that other machines can reach without '
    'certificates.'
)
SILENCE = flags.DEFINE_float(
    'silence_s', 30.0, 'A worker that does not answer for so many seconds is lost.',
    lower_bound=0.1,
)


def output_dir(script: str) -> pathlib.Path:
  """--output_dir, or a script's folder for the task."""
  task = pathlib.Path(TASK.value).stem
  return pathlib.Path(OUTPUT_DIR.value or f'runs/{script}-{task}')


def target() -> Union[None, float, str]:
  """--target: a name, or the share of the ensemble.

  Raises:
    flags.ValidationError: If it is neither.
  """
  if TARGET.value is None or TARGET.value in ('ensemble', 'student'):
    return TARGET.value
  try:
    return float(TARGET.value)
  except ValueError:
    raise flags.ValidationError(
        '--target must be ensemble, student or a number between 0 and 1, found '
        f'{TARGET.value!r}.'
    ) from None


# Flags that are made into a parameter of builders, which only some algorithms have.
_FLAGS_OF_PARAMETER = {
    'transfer_set': [
        'coverage', 'transfer_per_round', 'transfer_validation', 'consensus',
        'prediction_bits', 'prediction_top', 'knowledge_bits', 'robust_knowledge',
        'knowledge_norm_bound',
    ],
    'negatives': ['num_negatives'],
    'epsilon': ['certainty_epsilon'],
    'distillation': [
        'target', 'temperature', 'distillation_weight', 'server_steps',
        'server_batch_size', 'server_schedule', 'validate_every', 'server_patience',
    ],
    'teacher_fn': ['teacher'],
    'teacher_optimizer': ['teacher_learning_rate'],
    'back_distillation': ['back_distillation', 'back_steps'],
    'student_optimizer': ['student_learning_rate'],
    'mentor_fn': ['mentor'],
    'generator_optimizer': ['generator_learning_rate'],
}
# Flags of the averaging of weights, whether an algorithm has such parameters or not.
_AVERAGING = (
    'server_optimizer', 'server_learning_rate', 'server_rate_schedule',
    'server_warmup_rounds', 'client_weighting', 'local_target',
    'local_weight', 'local_temperature', 'history_size', 'proximal_weight',
    'not_true_weight', 'not_true_temperature', 'vacant_weight', 'robust_model',
    'model_norm_bound', 'model_bits', 'model_clip', 'secure_model_bound',
    'pretrain_epochs',
)
# Flags that some algorithm takes as they are.
_OF_ALGORITHMS = frozenset(
    flag for its in algorithms.REGISTRY.values() for flag in its.flags.values()
)


def algorithm() -> algorithms.Info:
  """Returns what describes the algorithm that is asked for."""
  return algorithms.get(ALGORITHM.value)


def is_taken(algorithm: algorithms.Info, name: str) -> bool:
  """Returns whether a flag has an effect with an algorithm."""
  if name in algorithm.flags.values():
    return True
  if name in _AVERAGING:
    return algorithm.averages
  if name in ('knowledge_clip', 'secure_knowledge_bound'):
    return algorithm.sends_knowledge
  if name == 'knowledge_share':
    return algorithm.averages and algorithm.sends_knowledge
  if name in ('consensus', 'prediction_top', 'knowledge_bits'):
    return algorithm.consensus not in (None, 'given')
  owners = [p for p, names in _FLAGS_OF_PARAMETER.items() if name in names]
  if not owners:
    return name not in _OF_ALGORITHMS
  return all(parameter in algorithm.parameters for parameter in owners)


# A resumed run may change these: they do not change what a round does.
FREE_ON_RESUME = {
    'config', 'dry_run',
    'rounds', 'patience', 'output_dir', 'resume', 'rounds_per_checkpoint', 'tracker',
    'compare_with_fed_avg', 'cache_dir', 'device', 'runtime', 'workers', 'tls_dir',
    'allow_open', 'silence_s',
}


# Of a config.json: what is about the run's folder, not about the run.
_NOT_REPEATED = {'config', 'dry_run', 'output_dir', 'resume'}


def own_flags() -> dict[str, flags.Flag]:
  """The flags of this module, by name."""
  by_module = flags.FLAGS.flags_by_module_dict()
  return {flag.name: flag for flag in by_module[__name__]}


# How predictions are combined and coded: a task's defaults of these go together.
_OF_PREDICTIONS = frozenset(
    {'consensus', 'prediction_bits', 'prediction_top', 'knowledge_bits'}
)


def _task_defaults(task: str, algorithm: str) -> dict[str, Any]:
  """The defaults of a task with an algorithm.

  Raises:
    app.UsageError: If there is no such task, or it has defaults of what is no flag.
  """
  try:
    defaults = task_defaults.defaults_of(task, algorithm)
  except ValueError as error:
    raise app.UsageError(str(error)) from None
  for name in defaults:
    if name not in own_flags():
      raise app.UsageError(
          f'The defaults of --task={task} or --algorithm={algorithm} name --{name}, '
          'which is no flag.'
      )
  return defaults


def _take_task_defaults() -> None:
  """Gives the flags that are not given what the task has for them.

  A default that does not go with what is given gives way.
  """
  defaults = _task_defaults(TASK.value, ALGORITHM.value)
  given = {name for name, flag in own_flags().items() if flag.present}
  if given & _OF_PREDICTIONS:
    given |= _OF_PREDICTIONS
  if 'transfer_size' in given:
    for name in ('transfer_labels', 'transfer_per_round'):
      if name in defaults:
        defaults[name] = min(defaults[name], TRANSFER_SIZE.value)
  if 'transfer_labels' in given and not TRANSFER_LABELS.value:
    given.add('distillation_weight')  # There is nothing else to learn from.
  for name, value in defaults.items():
    if name not in given:
      flags.FLAGS[name].value = value


def take_defaults() -> None:
  """Gives the flags that are not given the values of --config, or of the task.

  Of a --config, what the run had by default is left to the defaults: they may be others
  for another --task or --algorithm.

  Raises:
    app.UsageError: If the file is no such one, or of another version's flags; or if
      there is no such task.
  """
  path = CONFIG.value
  if path is None:
    _take_task_defaults()
    return
  try:
    with open(path) as file:
      values = json.load(file)['flags']
  except (OSError, ValueError, TypeError, KeyError):
    raise app.UsageError(
        '--config must be the config.json in the folder of a run, and --run that folder; '
        f'found {path!r}.'
    ) from None
  unknown = sorted(set(values) - set(own_flags()))
  if unknown:
    raise app.UsageError(
        f'{path} has flags that are not known here: {", ".join(unknown)}. Use the '
        'version that made it, or take them out.'
    )
  for name in ('task', 'algorithm'):
    flag = flags.FLAGS[name]
    if not flag.present and values.get(name, flag.value) != flag.value:
      flag.value, flag.present = values[name], 1
  _take_task_defaults()
  before = {name: flag.default for name, flag in own_flags().items()}
  before |= _task_defaults(
      values.get('task', TASK.value), values.get('algorithm', ALGORITHM.value)
  )
  for name, value in values.items():
    flag = flags.FLAGS[name]
    if name in _NOT_REPEATED or flag.present or value in (flag.value, before[name]):
      continue
    flag.value = value
    # As if it was given: that it does not fit the other flags must be said.
    flag.present = 1
