"""The flags of `pipelines.train`; imports no TensorFlow, so that `--help` is quick."""

from collections.abc import Callable, Iterable, Mapping, Set
import importlib.util
import json
import pathlib
from typing import Any, Optional, Union

from absl import app
from absl import flags

from pipelines import run_folders
from pipelines import task_defaults
from pipelines import topics
from tff_kd import algorithms
from tff_kd import checks
from tff_kd import data
from tff_kd.knowledge import rules
from tff_kd import own_files

# The keys of the tables in `train_process`.
OPTIMIZERS = ['adam', 'sgd']
SCHEDULES = ['constant', 'cosine']
# Schedules of learning rates over rounds.
RATE_SCHEDULES = ['constant', 'cosine', 'linear']


topics.topic('What to run')
ALGORITHM = flags.DEFINE_string(
    'algorithm', 'fed_distillation',
    'The algorithm. A path that ends in .py is an algorithm of your own '
    '(examples/own_algorithm.py).\n'
    + '\n'.join(
        f'{name}: {info.summary}. Uploads: {", ".join(info.uploads)}.'
        + (f" Needs: {', '.join(info.needs)}." if info.needs else '')
        for name, info in algorithms.REGISTRY.items()
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
ROUNDS = flags.DEFINE_integer(
    'rounds', 30,
    'The maximum number of rounds.', lower_bound=1,
)
PATIENCE = flags.DEFINE_integer(
    'patience', 15,
    'Stop after this many rounds without a better --monitor; 0 never stops early.',
    lower_bound=0,
)
MONITOR = flags.DEFINE_string(
    'monitor', None,
    'The metric that decides which round is the best, a column of metrics.csv; for '
    "errors and losses, lower is better. If unset, validation/student_ and the task's "
    'metric: accuracy, rmse for regression, or the first of the metrics_fn of a task '
    'of your own.',
)
EVALUATED_CLIENTS = flags.DEFINE_integer(
    'evaluated_clients', 100,
    'If clients keep their models: the number of clients over which the mean is '
    'reported, drawn once from the seed.', lower_bound=1,
)
SEED = flags.DEFINE_integer(
    'seed', 0,
    'Determines the split, the initial weights, the clients of each round and every '
    'order of examples.', lower_bound=0,
)
FEDAVG = flags.DEFINE_bool(
    'compare_with_fed_avg', True,
    'Also train FedAvg of the same student, with the same optimizers and aggregation, '
    'for as many rounds, and on until it has moved the same bytes, for at most three '
    'times the rounds.',
)

topics.topic('Data and clients')
TASK = flags.DEFINE_string(
    'task', 'mnist5k', 'The data and the models; each task has its own defaults of some '
    'flags. A path that ends in .py is a task of your own (examples/own_task.py).\n'
    + '\n'.join(
        f'{name}: {info.summary}. Students: {", ".join(info.students)}; teachers: '
        f'{", ".join(info.teachers)}.'
        + task_defaults.described(name)
        for name, info in data.TASKS.items()
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
    'transfer_size', 1000,
    'The number of examples that the server holds.', lower_bound=1
)
VALIDATION_SIZE = flags.DEFINE_integer(
    'validation_size', 500,
    'The number of labelled examples for choosing the best round.',
    lower_bound=1,
)
NUM_CLIENTS = flags.DEFINE_integer(
    'num_clients', 20,
    'The number of clients.', lower_bound=1,
)
CLIENTS_PER_ROUND = flags.DEFINE_integer(
    'clients_per_round', 8,
    'The number of clients that take part in a round.', lower_bound=1
)
PARTITION = flags.DEFINE_enum(
    'partition', 'dirichlet', sorted(data.partition.PARTITIONS),
    'How the examples are split over clients.',
)
ALPHA = flags.DEFINE_float(
    'alpha', 0.1,
    'The concentration of --partition=dirichlet and quantity_skew; smaller is more '
    'skewed.',
)
SHARDS = flags.DEFINE_integer(
    'shards_per_client', 2,
    'The number of shards of a client, with --partition=shards.', lower_bound=1
)

topics.topic(
    'Client faults and stragglers, drawn from the seed, the round and the client'
)
SAMPLINGS = ['cyclic', 'poisson', 'uniform', 'weighted']
SAMPLING = flags.DEFINE_enum(
    'sampling', 'uniform', SAMPLINGS,
    'How the clients of a round are chosen; weighted: by their number of examples; '
    'poisson: each independently, --clients_per_round in expectation.',
)
AVAILABILITY = flags.DEFINE_string(
    'availability', None,
    'A CSV file that says when clients are available: below a header, lines of client '
    '(name or number), first round, last round. Always available if unset.',
)
DROPOUT_BEFORE = flags.DEFINE_float(
    'dropout_before', 0.0,
    'The probability that a chosen client drops out before it begins.',
)
DROPOUT_AFTER = flags.DEFINE_float(
    'dropout_after', 0.0,
    "The probability that a client's report is lost.",
)
STRAGGLER_SHARE = flags.DEFINE_float(
    'straggler_share', 0.0,
    'The probability that a client does only part of its steps.',
)
STRAGGLER_STEPS = flags.DEFINE_float(
    'straggler_steps', 0.5,
    'The smallest share of the steps that a straggler does.',
)
DELAY_SHARE = flags.DEFINE_float(
    'delay_share', 0.0,
    'The probability that a client reports in a later round.',
)
MAX_DELAY = flags.DEFINE_integer(
    'max_delay', 0,
    'The maximum delay in rounds; delays are drawn uniformly from 1.', lower_bound=0
)
STALENESS_POWER = flags.DEFINE_float(
    'staleness_power', 0.5,
    'a in the factor (1 + delay)^-a of the weight of a late report.',
    lower_bound=0.0,
)
COVERAGE = flags.DEFINE_float(
    'coverage', 1.0,
    'The share of the transfer examples on which each client predicts.',
)
MIN_REPORTS = flags.DEFINE_integer(
    'min_reports', 0,
    'Skip a round with fewer reports.', lower_bound=0
)
LABEL_SHARE = flags.DEFINE_float(
    'label_share', 1.0,
    "The share of a client's examples whose labels it knows; the others serve only a "
    '--local_target.',
)
INPUT_SHARE = flags.DEFINE_float(
    'input_share', 1.0,
    'The share of the input features that a client observes.',
)

topics.topic('Robust aggregation')
ROBUST_MODEL = flags.DEFINE_list(
    'robust_model', [],
    "How clients' weights are aggregated: TFF's adaptive zeroing and clipping, one or "
    'both; or, coordinate by coordinate, median or trimmed_mean, for which the server '
    'holds the weights of single clients. Their weighted mean if unset.',
)
ROBUST_KNOWLEDGE = flags.DEFINE_list(
    'robust_knowledge', [],
    "How clients' predictions are aggregated; the same choices as --robust_model.",
)
for _flag in (ROBUST_MODEL, ROBUST_KNOWLEDGE):
  flags.register_validator(
      _flag,
      lambda names: set(names) <= {'zeroing', 'clipping'}
      or names in (['median'], ['trimmed_mean']),
      f'--{_flag.name} must be of zeroing and clipping, or one of median and '
      'trimmed_mean.'
  )
TRIMMED_SHARE = flags.DEFINE_float(
    'trimmed_share', 0.1,
    'The share of clients that trimmed_mean leaves out at each end.',
    lower_bound=0.0, upper_bound=0.5,
)
MODEL_NORM_BOUND = flags.DEFINE_float(
    'model_norm_bound', None,
    'Leave out a client whose weight delta has a larger L2 norm, and count it.',
)
KNOWLEDGE_NORM_BOUND = flags.DEFINE_float(
    'knowledge_norm_bound', None,
    'Leave out the predictions of a client if their L2 norm is larger, and count it.',
)

topics.topic('Compression of uploads')
MODEL_BITS = flags.DEFINE_integer(
    'model_bits', None,
    "The bits of each number of clients' weight deltas, in arrays of 1,000 or more; "
    "floats if unset. With --robust_model=zeroing,clipping this is TFF's "
    'compression_aggregator, but for rounding to the nearest.',
    lower_bound=1, upper_bound=16,
)
KNOWLEDGE_BITS = flags.DEFINE_integer(
    'knowledge_bits', None,
    "The bits of each number of clients' uploaded predictions, in arrays of 1,000 or "
    'more; floats if unset.',
    lower_bound=1, upper_bound=16
)

topics.topic(
    'Privacy; --epsilon or --noise_multiplier turn noise on'
)
EPSILON = flags.DEFINE_float(
    'epsilon', None,
    'The budget of differential privacy at --delta, for a client with all of its '
    'examples. Finds the noise that spends it in --rounds, unless --noise_multiplier '
    'is given; training ends before it is exceeded.', lower_bound=0.0,
)
DELTA = flags.DEFINE_float(
    'delta', 1e-5,
    'The delta of --epsilon; well below 1 / --num_clients.',
)
NOISE_MULTIPLIER = flags.DEFINE_float(
    'noise_multiplier', None,
    'The standard deviation of the noise divided by the clip, equivalent to that of '
    'all channels together.', lower_bound=0.0,
)


def _is_clip(text: Optional[str]) -> bool:
  try:
    return text in (None, 'adaptive') or float(text) > 0.0
  except ValueError:
    return False


MODEL_CLIP = flags.DEFINE_string(
    'model_clip', 'adaptive',
    "The L2 norm to which a client's weight delta is clipped; adaptive: the running "
    'median of norms, estimated privately.',
)
KNOWLEDGE_CLIP = flags.DEFINE_string(
    'knowledge_clip', None,
    "The L2 norm to which a client's uploaded predictions of a round are clipped; if "
    'unset adaptive, and 50 for fd and fed_proto. Predictions that are weighed by their '
    'certainty (fed_et, fed_aux) need a number.',
)
for _clip in (MODEL_CLIP, KNOWLEDGE_CLIP):
  flags.register_validator(
      _clip, _is_clip, f'--{_clip.name} must be a number above 0, inf, or adaptive.'
  )
KNOWLEDGE_SHARE = flags.DEFINE_float(
    'knowledge_share', 0.5,
    'The share of the privacy budget for predictions, if weights are uploaded as well.',
)
PRIVATE_CHANNELS = flags.DEFINE_list(
    'private_channels', [],
    'Add noise to one channel only, model or knowledge, to see its effect; if the '
    'other channel is uploaded as well, there is no privacy guarantee.',
)
SECURE_AGGREGATION = flags.DEFINE_bool(
    'secure_aggregation', False, 'Clip, round and sum what clients send as a secure '
    'protocol would. The simulation sums in the clear: it shows the numerics, and keeps '
    'nothing secret.'
)
SECURE_BITS = flags.DEFINE_integer(
    'secure_bits', None,
    'The bits of a number under --secure_aggregation, summed under a modulus; needs '
    'the bound of what is sent, --secure_model_bound, --secure_knowledge_bound or both. '
    '32 if unset.', lower_bound=2,
    upper_bound=24,
)
SECURE_MODEL_BOUND = flags.DEFINE_float(
    'secure_model_bound', None,
    "The largest absolute value in a client's weight delta times the client's weight, "
    'which is the number of its examples, or 1 with --client_weighting=uniform; '
    'estimated if unset.',
)
SECURE_KNOWLEDGE_BOUND = flags.DEFINE_float(
    'secure_knowledge_bound', None,
    "The largest absolute value in a client's uploaded predictions, and the most that "
    'one counts: what is beyond it is scaled down, and counts less; estimated if unset.',
)

topics.topic('Models and local training')
STUDENT = flags.DEFINE_list(
    'student', ['mlp_small'],
    "The student model, one of the task's. Several models, separated by commas, make "
    'cohorts: client k belongs to cohort k modulo the number of models.',
)
flags.register_validator(STUDENT, bool, '--student must name a model.')
TEACHER = flags.DEFINE_string('teacher', 'cnn', "The teacher model, one of the task's.")
PRETRAIN_EPOCHS = flags.DEFINE_integer(
    'pretrain_epochs', 0,
    'Epochs of central training of student and teacher on the labelled transfer '
    'examples before round 1.', lower_bound=0,
)
CLIENT_OPTIMIZER = flags.DEFINE_enum(
    'client_optimizer', 'sgd', OPTIMIZERS, "The clients' optimizer."
)
CLIENT_RATE = flags.DEFINE_float(
    'client_learning_rate', 0.1,
    "The learning rate of the clients' optimizer.", lower_bound=0.0
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
    CLIENT_CLIP_NORM, lambda norm: norm is None or 0.0 < norm < float('inf'),
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
    'client_epochs', 5,
    'Local epochs per round.', lower_bound=1
)
BATCH_SIZE = flags.DEFINE_integer(
    'batch_size', 20,
    'Examples per local step.', lower_bound=1
)
SERVER_OPTIMIZER = flags.DEFINE_enum(
    'server_optimizer', 'sgd', OPTIMIZERS,
    'The optimizer that applies the mean delta to the student.',
)
SERVER_RATE = flags.DEFINE_float(
    'server_learning_rate', 1.0,
    'The learning rate of --server_optimizer.', lower_bound=0.0
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
    "A client's weight in the mean of weights, and in that of predictions (which weigh "
    'the same in fed_et, in fed_aux and under secure sums); if unset num_examples, and '
    'uniform with differential privacy, scaffold and fed_dyn.',
)
LOCAL_TARGET = flags.DEFINE_enum(
    'local_target', 'none', ['none', 'student', 'student_history', 'teacher'],
    'The model from which clients distil during local training, with algorithms that '
    'average whole students; teacher: that have one.',
)
LOCAL_WEIGHT = flags.DEFINE_float(
    'local_weight', 0.2,
    "The share of the distillation from --local_target in the clients' loss; also for "
    'fed_gkd.',
)
LOCAL_TEMPERATURE = flags.DEFINE_float(
    'local_temperature', 1.0,
    'The temperature of the distillation from --local_target.', lower_bound=0.0
)
HISTORY_SIZE = flags.DEFINE_integer(
    'history_size', 5,
    'The number of past global students that student_history (and fed_gkd) averages.',
    lower_bound=1,
)
PROXIMAL_WEIGHT = flags.DEFINE_float(
    'proximal_weight', None,
    'The weight mu of the proximal term; if unset, 0.01 for fed_prox and 0 for the '
    'others.', lower_bound=0.0,
)
NOT_TRUE_WEIGHT = flags.DEFINE_float(
    'not_true_weight', None,
    'The weight beta of the not-true distillation; if unset, 1 for fed_ntd and 0 for '
    'the others.', lower_bound=0.0,
)
NOT_TRUE_TEMPERATURE = flags.DEFINE_float(
    'not_true_temperature', 1.0,
    'The temperature tau of the not-true distillation.', lower_bound=0.0
)
PRIOR_TAU = flags.DEFINE_float(
    'prior_tau', None, 'Label skew: tau of prior-corrected cross-entropy, '
    "CE(z + tau log pi) with the client's own shares pi of the classes (1: balanced "
    'softmax); off if unset. Class counts stay at the client, here and in the next '
    'three.', lower_bound=0.0,
)
PRIOR_SMOOTHING = flags.DEFINE_float(
    'prior_smoothing', 0.1, 'The share of the uniform distribution in pi of that; 0: '
    'classes that a client does not have get no gradient.',
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

topics.topic("The server's distillation; unset: the algorithm's defaults")
TRANSFER_LABELS = flags.DEFINE_integer(
    'transfer_labels', 200,
    'The number of transfer examples with labels, which the server may learn from; 0 '
    'for none.', lower_bound=0,
)
TRANSFER_PER_ROUND = flags.DEFINE_integer(
    'transfer_per_round', None,
    'The number of transfer examples per round; all if unset.',
    lower_bound=1,
)
TRANSFER_VALIDATION = flags.DEFINE_integer(
    'transfer_validation', 0,
    "The number of transfer examples set aside to judge the server's distillation and "
    'roll it back.', lower_bound=0,
)
TARGET = flags.DEFINE_string(
    'target', None,
    'What the server distils from: ensemble, student, or a number between 0 (student) '
    'and 1 (ensemble).',
)
TEMPERATURE = flags.DEFINE_float(
    'temperature', None,
    "The temperature of the server's distillation.",
)
CONSENSUS = flags.DEFINE_string(
    'consensus', None,
    "How the clients' predictions are combined: their mean (mean_logits), the mean of "
    'probabilities plain (mean_probabilities) or sharpened (era, enhanced_era), or a '
    'mean of logits weighted by certainty (variance, confidence, entropy; soft_entropy: '
    'at temperature 4; diversity: as variance, with the opinion of those who disagree, '
    'for fed_et), or a mean of probabilities weighted by how dense the data of the '
    'client are at the example, going by its classes (density). The aligned ones '
    '(aligned: mean_logits; aligned_probabilities, aligned_entropy, aligned_density) '
    "first take out of each client's predictions what it predicts on average, for "
    'clients whose classes differ; see --prior. A path that ends in .py is '
    "a rule of your own (examples/own_rule.py). Unset: the algorithm's own, or the "
    "task's default, whose prior and code do not come with another rule.",
)
# Needs no TensorFlow, unless the rule is the user's own.
flags.register_validator(CONSENSUS, _is_known(rules.check))
PRIOR = flags.DEFINE_string(
    'prior', None,
    "Aligns the clients' predictions, whatever the --consensus, and brings the consensus "
    'to these shares of the classes on the transfer examples: uniform; probabilities '
    'separated by commas; average, what the averaged students of all rounds predict on '
    'average, as far as that is more than noise; em, by EM under label shift. With '
    "--calibrate: uniform or probabilities. Unset: the task's default, else uniform, if "
    'predictions are aligned.',
)
SHARPNESS = flags.DEFINE_float(
    'consensus_sharpness', None,
    'A factor of the logits of the consensus; above 1 makes its predictions surer. 1 if '
    'unset.', lower_bound=0.0,
)
PREDICTION_BITS = flags.DEFINE_integer(
    'prediction_bits', None,
    "The bits of a class's probability in uploaded predictions, 1 (only the most "
    'likely class) to 8; floats if unset. Needs a consensus of probabilities '
    '(mean_probabilities, era, enhanced_era, aligned_probabilities). For cfd: 1 if '
    'unset, 32 for floats.',
    lower_bound=1,
)
PREDICTION_TOP = flags.DEFINE_integer(
    'prediction_top', None,
    'The number of most likely classes of each prediction whose probabilities clients '
    'upload; all if unset. Needs a consensus of probabilities.',
    lower_bound=1
)
CLIENTS_START_FROM = flags.DEFINE_enum(
    'clients_start_from', None, ['average', 'distilled'],
    "What clients are sent where the server's distillation changes the student: the "
    'distilled student, which is also what is evaluated and released, or the average as '
    "it was before. Unset: the task's default, else distilled; with --calibrate average.",
)
DISTILLATION_WEIGHT = flags.DEFINE_float(
    'distillation_weight', None,
    "The share of the distillation in the server's loss if there are "
    '--transfer_labels; the rest is the cross-entropy with them.',
)
SERVER_STEPS = flags.DEFINE_integer(
    'server_steps', None,
    "Steps of the server's distillation per round.", lower_bound=1
)
SERVER_BATCH = flags.DEFINE_integer(
    'server_batch_size', None,
    "Examples per step of the server's distillation.", lower_bound=1
)
SCHEDULE = flags.DEFINE_enum(
    'server_schedule', None, SCHEDULES,
    "The learning-rate schedule within a round of the server's distillation.",
)
VALIDATE_EVERY = flags.DEFINE_integer(
    'validate_every', None,
    'Steps between two validations on --transfer_validation.',
    lower_bound=1,
)
SERVER_PATIENCE = flags.DEFINE_integer(
    'server_patience', None,
    'Stop the distillation of a round after this many validations without improvement.',
    lower_bound=1,
)
AUGMENT = flags.DEFINE_bool(
    'augment', False,
    "Change the transfer inputs at random in each step of the server's distillation, as "
    'the task knows how to (images: shifts by up to 2 pixels).',
)
TEACHER_RATE = flags.DEFINE_float(
    'teacher_learning_rate', None,
    "The learning rate of the teacher's Adam.", lower_bound=0.0
)
BACK = flags.DEFINE_bool(
    'back_distillation', True,
    'Distil the teacher back into the student.',
)
BACK_STEPS = flags.DEFINE_integer(
    'back_steps', None,
    'Steps of --back_distillation per round.', lower_bound=1
)
STUDENT_START = flags.DEFINE_enum(
    'student_start', None, ['average', 'released'],
    "Where the student's distillation begins if clients start from the average: at the "
    'average of the round, or at the student that was last released, moved by what the '
    "average moved. Unset: the task's default, else average.",
)
STUDENT_RATE = flags.DEFINE_float(
    'student_learning_rate', None,
    "The learning rate of the student's Adam on the server.",
    lower_bound=0.0,
)

topics.topic("Options of single algorithms; unset: the algorithm's defaults")
CALIBRATE = flags.DEFINE_bool(
    'calibrate', False,
    'fed_avg: release the average with its last bias set so that it predicts the '
    'classes on the transfer examples, without their labels, as often as --prior says. '
    'A baseline for distillation on the same examples.',
)
MENTOR = flags.DEFINE_string(
    'mentor', 'mlp_large',
    "fml, fed_kd: the model that each client keeps for itself, one of the task's "
    'teachers.',
)
NUM_NEGATIVES = flags.DEFINE_integer(
    'num_negatives', 400,
    'fed_aux: the number of transfer examples, from the end, that stand for examples '
    "that are not a client's own.", lower_bound=1,
)
CERTAINTY_EPSILON = flags.DEFINE_float(
    'certainty_epsilon', None,
    "fed_aux: the privacy that clients' certainty scores cost, and nothing else that "
    'they upload; inf adds no noise.',
)
CERTAINTY_DELTA = flags.DEFINE_float(
    'certainty_delta', None,
    'fed_aux: the delta of --certainty_epsilon.',
)
DOWN_BITS = flags.DEFINE_integer(
    'down_bits', None,
    "cfd: the bits of a class's probability in the server's labels.",
    lower_bound=1,
)
DIGEST_EPOCHS = flags.DEFINE_integer(
    'digest_epochs', None,
    'fed_md: passes over the consensus per round.',
    lower_bound=1,
)
DIGEST_BATCH = flags.DEFINE_integer(
    'digest_batch_size', None,
    'fed_md: examples per step of learning the consensus.', lower_bound=1
)
PROTOTYPE_WEIGHT = flags.DEFINE_float(
    'prototype_weight', None, "Of fed_proto: lambda of the distance to the classes' "
    'prototypes.', lower_bound=0.0,
)
REGULARIZER_WEIGHT = flags.DEFINE_float(
    'regularizer_weight', None,
    'fd: the weight lambda of the term with the mean logits of the classes.',
    lower_bound=0.0,
)
SPLIT_LAYER = flags.DEFINE_string(
    'split_layer', None,
    'fed_gen, fed_proto, moon, fed_per, lg_fed_avg: the name of the layer whose outputs '
    'are the features, after which the head begins; if unset, the one before the last '
    'layer with weights.',
)
GENERATOR_STEPS = flags.DEFINE_integer(
    'generator_steps', None,
    'fed_gen: steps of the generator per round, each an exchange with all clients.',
    lower_bound=1,
)
GENERATOR_RATE = flags.DEFINE_float(
    'generator_learning_rate', None,
    "fed_gen: the learning rate of the generator's Adam.", lower_bound=0.0
)
GENERATIVE_WEIGHT = flags.DEFINE_float(
    'generative_weight', None,
    "fed_gen: the weight of the generator's terms in the clients' loss.",
    lower_bound=0.0,
)
CONTRAST_WEIGHT = flags.DEFINE_float(
    'contrast_weight', None, 'moon: the weight mu of the model-contrastive term.',
    lower_bound=0.0,
)
CONTRAST_TEMPERATURE = flags.DEFINE_float(
    'contrast_temperature', None, 'moon: the temperature tau of that term.',
    lower_bound=0.0,
)
DYNAMIC_WEIGHT = flags.DEFINE_float(
    'dynamic_weight', None, 'fed_dyn: the weight alpha of the dynamic regularisation.',
    lower_bound=0.0,
)
ENERGY_ROUNDS = flags.DEFINE_integer(
    'energy_rounds', None,
    'fed_kd: the round from which on the largest share of the energy of updates is '
    'sent.', lower_bound=1,
)

topics.topic('The run folder')
CONFIG = flags.DEFINE_string(
    'config', None,
    'The config.json of a run, whose flags are used unless they are given here; '
    'repeats the run in a folder of its own.',
)
DRY_RUN = flags.DEFINE_bool(
    'dry_run', False,
    'Say what would be built, moved and stored, without training.',
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
    "says, or else mlflow.db in the run's folder), wandb (Weights & Biases, as it is set "
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
RAY_ADDRESS = flags.DEFINE_string(
    'ray_address', None, "Spread each round's clients over a Ray cluster: `local` starts "
    'Ray on this machine, `auto` is the cluster that it is a node of, or host:port of a '
    'head node. --cache_dir must be the same folder on all nodes; --device is then where '
    'the server computes. This process computes if unset.'
)
RAY_WORKERS = flags.DEFINE_integer(
    'ray_workers', None, 'How many workers Ray starts; as many as it has CPUs for if '
    'unset.', lower_bound=1
)
RAY_RESOURCES = flags.DEFINE_list(
    'ray_resources', ['CPU=1'], 'What each worker asks of Ray, such as CPU=4,GPU=1. As '
    'many clients compute at a time in a worker as it has CPUs, or one on each GPU.'
)


def output_dir(script: str) -> pathlib.Path:
  """Returns --output_dir, or a script's folder for the task."""
  task = pathlib.Path(TASK.value).stem
  return pathlib.Path(OUTPUT_DIR.value or f'runs/{script}-{task}')


def prior() -> Union[None, str, list[float]]:
  """Returns --prior: a name, or probabilities.

  Raises:
    flags.ValidationError: If it is neither.
  """
  if PRIOR.value in (None, 'uniform', 'average', 'em'):
    return PRIOR.value
  try:
    return [float(text) for text in PRIOR.value.split(',')]
  except ValueError:
    raise flags.ValidationError(
        '--prior must be uniform, average, em or a probability for each class, such as '
        f'0.5,0.3,0.2, found {PRIOR.value!r}.'
    ) from None


def target() -> Union[None, float, str]:
  """Returns --target: a name, or the share of the ensemble.

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


def predicts() -> bool:
  """Returns whether the server distils from clients' predictions, going by --target."""
  return not is_taken(algorithm(), 'target') or target() not in ('student', 0.0)


# By parameter of builders, the flags that it is made of; not all algorithms have it.
_FLAGS_OF_PARAMETER = {
    'transfer_set': [
        'coverage', 'transfer_per_round', 'transfer_validation', 'consensus',
        'prediction_bits', 'prediction_top', 'knowledge_bits', 'robust_knowledge',
        'knowledge_norm_bound',
    ],
    'calibrate_on': ['calibrate'],
    'negatives': ['num_negatives'],
    'epsilon': ['certainty_epsilon'],
    'distillation': [
        'target', 'temperature', 'distillation_weight', 'server_steps',
        'server_batch_size', 'server_schedule', 'validate_every', 'server_patience',
        'augment',
    ],
    'teacher_fn': ['teacher'],
    'teacher_optimizer': ['teacher_learning_rate'],
    'back_distillation': ['back_distillation', 'back_steps'],
    'student_optimizer': ['student_learning_rate'],
    'mentor_fn': ['mentor'],
    'generator_optimizer': ['generator_learning_rate'],
}
# Flags that have an effect with all algorithms that average weights.
_AVERAGING = (
    'server_optimizer', 'server_learning_rate', 'server_rate_schedule',
    'server_warmup_rounds', 'client_weighting', 'local_target',
    'local_weight', 'local_temperature', 'history_size', 'proximal_weight',
    'not_true_weight', 'not_true_temperature', 'vacant_weight', 'robust_model',
    'model_norm_bound', 'model_bits', 'model_clip', 'secure_model_bound',
)
# Flags that some algorithm takes as they are.
_OF_ALGORITHMS = frozenset(
    flag for info in algorithms.REGISTRY.values() for flag in info.flags.values()
)


def algorithm() -> algorithms.Info:
  """Returns what describes the algorithm that is asked for."""
  return algorithms.get(ALGORITHM.value)


def is_taken(algorithm: algorithms.Info, name: str) -> bool:
  """Returns whether a flag has an effect with an algorithm."""
  if name in algorithm.flags.values():
    return True
  if name == 'model_bits' and 'start_energy' in algorithm.parameters:
    return False  # Clients send factors, which it does not round.
  if name in _AVERAGING:
    return algorithm.averages
  if name == 'pretrain_epochs':  # Of the server's whole student.
    return algorithm.averages and algorithm.keeps != 'layers'
  if name == 'evaluated_clients':
    return algorithm.keeps is not None
  if name in ('knowledge_clip', 'secure_knowledge_bound'):
    return algorithm.sends_knowledge
  if name == 'knowledge_share':
    return algorithm.averages and algorithm.sends_knowledge
  if name in ('consensus', 'prediction_top', 'knowledge_bits'):
    return algorithm.consensus not in (None, 'given')
  if name == 'consensus_sharpness':
    return algorithm.consensus is not None
  if name == 'prior':
    return algorithm.consensus is not None or 'calibrate_on' in algorithm.parameters
  if name == 'clients_start_from':
    # These make the released student differ from the average.
    changes = {'student_optimizer', 'calibrate_on'} & set(algorithm.parameters)
    return algorithm.averages and bool(changes)
  if name == 'student_start':
    return algorithm.averages and 'student_optimizer' in algorithm.parameters
  owners = [p for p, names in _FLAGS_OF_PARAMETER.items() if name in names]
  if not owners:
    return name not in _OF_ALGORITHMS
  return all(parameter in algorithm.parameters for parameter in owners)


# A resumed run may change these: they do not change what a round does.
FREE_ON_RESUME = {
    'config', 'dry_run',
    'rounds', 'patience', 'output_dir', 'resume', 'rounds_per_checkpoint', 'tracker',
    'compare_with_fed_avg', 'cache_dir', 'device', 'runtime', 'ray_address',
    'ray_workers', 'ray_resources',
}


# Flags in a config.json that are about the run's folder, not about the run.
_NOT_REPEATED = frozenset({'config', 'dry_run', 'output_dir', 'resume'})
# Flags about where it runs.
_WHERE = frozenset({'device', 'runtime', 'ray_address', 'ray_workers', 'ray_resources'})
# Flags that decide what the others are by default.
_OF_DEFAULTS = ('task', 'algorithm', 'data_dir')


def own_flags() -> dict[str, flags.Flag]:
  """Returns the flags of this module, by name."""
  by_module = flags.FLAGS.flags_by_module_dict()
  return {flag.name: flag for flag in by_module[__name__]}


# Flags that code predictions, of which there can be one.
_CODES = frozenset({'prediction_bits', 'prediction_top', 'knowledge_bits'})
# By a flag that is given, those whose defaults do not go with it: the prior is of the
# default consensus, and so is the code. Coded predictions can be neither noised nor
# summed securely.
_REPLACED = {
    'consensus': _CODES | {'prior'},
    **dict.fromkeys(
        (*_CODES, 'epsilon', 'noise_multiplier', 'secure_aggregation'), _CODES
    ),
}


def _task_defaults(task: str, algorithm: str) -> dict[str, Any]:
  """Returns the defaults of a task with an algorithm.

  Raises:
    app.UsageError: If there is no such task or algorithm, or it names what is no flag.
  """
  try:
    defaults = task_defaults.defaults_of(task, algorithm)
    parameters = algorithms.get(algorithm).flags
  except ValueError as error:
    raise app.UsageError(str(error)) from None
  for parameter, name in parameters.items():
    if name not in own_flags():
      raise app.UsageError(
          f'INFO.flags of --algorithm={algorithm} gives the parameter {parameter} the '
          f'value of --{name}, which is not a flag. A file cannot define flags: take one '
          'that there is (--help), such as --local_weight, which then means that '
          'parameter.'
      )
  for name in defaults:
    if name not in own_flags():
      raise app.UsageError(
          f'The defaults of --task={task} or --algorithm={algorithm} name --{name}, '
          'which is not a flag.'
      )
  return defaults


def settled(names: Iterable[str]) -> set[str]:
  """Returns the flags that a further default must leave as they are.

  Args:
    names: Those that have a value for a reason, beside those that are given or of the
      run that is repeated or looked at.
  """
  found = set(names) | {
      name for name, flag in own_flags().items()
      if flag.present or not flag.using_default_value
  }
  return found.union(*(_REPLACED.get(name, ()) for name in found))


def _take(defaults: Mapping[str, Any]) -> set[str]:
  """Gives the flags that are not given these values.

  A default that does not go with what is given gives way.

  Args:
    defaults: Of flags, by name.

  Returns:
    The flags that have taken theirs.
  """
  defaults, given = dict(defaults), settled([])
  if 'transfer_size' in given:
    for name in ('transfer_labels', 'transfer_per_round'):
      if defaults.get(name) is not None:
        defaults[name] = min(defaults[name], TRANSFER_SIZE.value)
  if 'transfer_labels' in given and not TRANSFER_LABELS.value:
    given.add('distillation_weight')  # There are no labels to share the loss with.
  taken = set(defaults) - given
  for name in taken:
    flags.FLAGS[name].value = defaults[name]
  return taken


def take_defaults() -> None:
  """Gives the flags that are not given the values of --config, or of the task.

  What was given to the run of a --config counts as given here. What that run had by
  default is taken from it, too, unless the task, its data or the algorithm are others
  here: then so are the defaults.

  Raises:
    app.UsageError: If it is not such a file, or of another version's flags; or if
      there is no such task.
  """
  if CONFIG.value is None:
    _take(_task_defaults(TASK.value, ALGORITHM.value))
  else:
    _take_config(pathlib.Path(CONFIG.value), _NOT_REPEATED)


def take_run(run_dir: pathlib.Path) -> None:
  """Gives the flags that are not given those of a run that a script looks at.

  But for those that say where it runs: that is this script's own.

  Args:
    run_dir: The folder of the run.

  Raises:
    app.UsageError: As `take_defaults`.
  """
  _take_config(run_dir / run_folders.CONFIG, _NOT_REPEATED | _WHERE)


def take_given(left: Set[str]) -> None:
  """Gives the flags that are not given those that the run of --config was given.

  Each algorithm then has its own defaults, also where the run had others.

  Args:
    left: Flags that are not taken.
  """
  values, given = _read_config(pathlib.Path(CONFIG.value))
  _give({name: values[name] for name in given - _NOT_REPEATED - left})
  own_flags()['config'].unparse()


def _give(values: Mapping[str, Any]) -> None:
  """Sets flags as if they were given, so that a conflict with others is an error."""
  known = own_flags()
  for name, value in values.items():
    if not known[name].present:
      known[name].value, known[name].present = value, 1


def _take_config(path: pathlib.Path, left: Set[str]) -> None:
  """Takes the flags of a run, but for those that are left out."""
  values, given = _read_config(path)
  known = own_flags()
  _give({name: values[name] for name in given - left})
  for name in _OF_DEFAULTS:
    if not known[name].present and name in values:
      known[name].value = values[name]
  defaults = _task_defaults(TASK.value, ALGORITHM.value)
  ran_with = [values.get(name, known[name].value) for name in _OF_DEFAULTS]
  if [known[name].value for name in _OF_DEFAULTS] != ran_with:
    _take(defaults)
    return
  of_run = {
      name: value for name, value in values.items() if name not in given | left
  }
  for name in _take(defaults | of_run) & set(of_run):
    # The defaults of a user's own task, taken once it is loaded, must not replace it.
    known[name].using_default_value = False


def _read_config(path: pathlib.Path) -> tuple[dict[str, Any], set[str]]:
  """Returns the flags of a run, and which of them were given.

  Raises:
    app.UsageError: If there is no such file, or it is of another version.
  """
  try:
    content = json.loads(path.read_text())
    values = dict(content['flags'])
  except (OSError, ValueError, TypeError, KeyError):
    raise app.UsageError(
        '--config must be the config.json in the folder of a run, and --run that folder; '
        f'found {str(path)!r}.'
    ) from None
  unknown = sorted(set(values) - set(own_flags()))
  if unknown:
    raise app.UsageError(
        f'{path} has flags that are not known here: {", ".join(unknown)}. Use the '
        'version that made it, or take them out.'
    )
  given = content.get('given')
  if not isinstance(given, list) or not set(given) <= set(values):
    raise app.UsageError(
        f'{path} must say in `given`, a list, which of its flags were given, found '
        f'{given!r}. Use the version that made it, or add that list.'
    )
  return values, set(given)


def config() -> dict[str, Any]:
  """Returns what `_read_config` reads: all flags, and which of them are given."""
  known = sorted(own_flags().items())
  return {
      'flags': {name: flag.value for name, flag in known},
      'given': [
          name for name, flag in known if flag.present and name not in _NOT_REPEATED
      ],
  }
