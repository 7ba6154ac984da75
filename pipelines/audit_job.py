"""The job behind `pipelines.audit`: attacks a finished run, and reports."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
import time
import types
from typing import Any, NamedTuple, Optional

import keras
import numpy as np
import tensorflow as tf
from tff_kd.compat import tff

import pipelines
from pipelines import central
from pipelines import kept
from pipelines import released as released_lib
from pipelines import run_folders
from pipelines import tables
from pipelines import train_checks
from pipelines import train_data
from pipelines import train_flags as args
from pipelines import train_privacy
from pipelines import train_process
from pipelines import train_setup
from pipelines import UserError
import tff_kd
from tff_kd import algorithms
from tff_kd.audits import inversion
from tff_kd.audits import membership
from tff_kd.data import task as data_task
from tff_kd import plots
from tff_kd import privacy

# A client with fewer examples is not attacked: the result would be chance.
_MIN_VICTIM_EXAMPLES = 5
# The number of classes in the picture.
_MAX_SHOWN = 8
# Adam's learning rate and the batch size of shadow models.
_SHADOW_RATE, _SHADOW_BATCH = 0.001, 32
# Fields of what membership inference has found that report.json does not have.
_NOT_IN_JSON = (
    'false_positive_rates', 'true_positive_rates', 'threshold', 'num_shadow_models',
)
_NO_SHADOWS = """\
- Attacks that train models of their own to compare with (shadow models, LiRA), which find
  more at low false positive rates; `--shadow_models=16` runs them.
"""
_WITH_SHADOWS = """\
- Shadow models that are trained as the run was, round by round, and that are asked about
  several variants of an example: closer ones find more. And attacks with shadow models on
  a teacher, or on what single clients send.
"""
_NOT_TESTED = """\
- Attacks that change what is sent (by a malicious server or client), clients that work
  together, and whoever watches a client over many rounds.
- What models tell of a client beside membership: properties, labels, single features.
- Gradients: the server's view here is a client's model and its predictions.
- An AUC of about .5 says that these attacks found nothing. It guarantees nothing; epsilon
  is a guarantee against every attack.
"""


class _Reader(NamedTuple):
  """Reads what models predict as logits of classes, and labels as class numbers.

  Attributes:
    task: The task of the labels.
    spec: A model of the task, which tells whether outputs are logits or probabilities.
  """

  task: tff_kd.data.Task
  spec: tff_kd.models.ModelSpec

  def logits(self, model: keras.Model, inputs: Any) -> np.ndarray:
    """Returns float32 `[n, classes]`; of one output, the log-odds z, those of [0, z]."""
    outputs = released_lib.predict(model, inputs)
    logits = self.spec.class_logits(tf.constant(outputs)).numpy()
    if logits.ndim == 1 or logits.shape[-1] == 1:
      logits = logits.reshape(-1, 1)
      logits = np.concatenate([np.zeros_like(logits), logits], axis=-1)
    return logits

  def predict(
      self, model: keras.Model, examples: tff_kd.data.Examples
  ) -> membership.Predictions:
    return membership.Predictions(
        self.logits(model, examples.inputs), self.task.class_numbers(examples)
    )


class _Run(NamedTuple):
  """A finished run.

  Attributes:
    folder: The folder of the run.
    algorithm: The algorithm.
    task: The data.
    rows: The rows of the examples on which each client was trained.
    batches: The `ClientBatches`.
    took_part: The numbers of the clients with examples that have reported in a round
      up to the best one, whose models are kept.
    released: The released models, by name.
    reader: Reads the predictions of models.
  """

  folder: pathlib.Path
  algorithm: algorithms.Info
  task: tff_kd.data.Task
  rows: Sequence[np.ndarray]
  batches: tff_kd.ClientBatches
  took_part: Sequence[int]
  released: Mapping[str, keras.Model]
  reader: _Reader

  @property
  def keeps_models(self) -> bool:
    """Returns whether clients keep their models, and send something about them."""
    return not self.algorithm.averages and any(
        (self.folder / 'clients').glob('client-*')
    )

  def members(self) -> tff_kd.data.Examples:
    """Returns the examples of all clients that took part, without padding."""
    return _counted(
        self.task,
        self.task.clients.take(np.concatenate([self.rows[k] for k in self.took_part])),
    )


class _Victim(NamedTuple):
  """A client, and its model after local training.

  Attributes:
    client: The client's name.
    model: The Keras model.
    examples: The client's examples.
  """

  client: str
  model: keras.Model
  examples: Any


class _Inversion(NamedTuple):
  """Examples reconstructed from predictions.

  Attributes:
    gains: The gain over the public images, by score; `None` if nothing was tried.
    shown: Images `[height, width, ...]` by title, by the title of the row.
    reason: Why nothing was tried.
  """

  gains: Optional[Mapping[str, membership.Estimate]] = None
  shown: Mapping[str, Mapping[str, np.ndarray]] = types.MappingProxyType({})
  reason: Optional[str] = None


class _Shadows(NamedTuple):
  """The results of the attacks with shadow models.

  Attributes:
    reports: The findings, by released student.
    num_models: The number of shadow models of each released model.
    num_examples: The number of examples that each was trained on.
    max_epochs: The maximum number of passes over these.
  """

  reports: Mapping[str, membership.LiraReport]
  num_models: int
  num_examples: int
  max_epochs: int


class _Results(NamedTuple):
  """All that the audit found.

  Attributes:
    found: The findings of membership inference, by released model.
    leaks: The AUC of the attack by loss on single clients.
    clients: The names of these clients.
    inversion: The reconstruction from their predictions.
    shadows: The attacks with shadow models; `None` without.
    num_members: The number of examples of all clients that took part.
  """

  found: Mapping[str, membership.Report]
  leaks: membership.Estimate
  clients: Sequence[str]
  inversion: _Inversion
  shadows: Optional[_Shadows]
  num_members: int


def run(
    run_dir: pathlib.Path,
    report_dir: pathlib.Path,
    *,
    num_victims: int,
    seed: int,
    num_epochs: int,
    num_shadow_models: int = 0,
    shadow_epochs: int = 20,
) -> None:
  """Attacks a run and writes the report.

  Args:
    run_dir: The folder of the run that is attacked.
    report_dir: Where the report goes.
    num_victims: How many clients are attacked one by one.
    seed: Decides whom, the halves, and what attackers train with.
    num_epochs: The epochs of the inversion's training; 0 for no inversion.
    num_shadow_models: For each released student; 0 for none.
    shadow_epochs: Passes of a shadow model over its examples, at most.

  Raises:
    UserError: If there is no such run, or nothing to attack.
  """
  finished = _open_run(run_dir)
  report_dir.mkdir(parents=True, exist_ok=True)
  members, others = finished.members(), _counted(finished.task, finished.task.test)
  reader = finished.reader
  answers = {
      name: (reader.predict(model, members), reader.predict(model, others))
      for name, model in finished.released.items()
  }
  with train_setup.errors_for_users():
    found = {
        name: membership.infer_membership(*both, seed=seed)
        for name, both in answers.items()
    }
  with train_setup.runtime():
    victims = _train_victims(finished, num_victims, seed)
  with train_setup.errors_for_users():
    leaks = membership.mean_with_interval([
        membership.infer_by_loss(
            reader.predict(victim.model, victim.examples),
            reader.predict(victim.model, others),
        )
        for victim in victims
    ])
  inverted = _invert(finished, victims, num_epochs=num_epochs, seed=seed)
  shadows = None
  if num_shadow_models:
    shadows = _attack_by_shadow_models(
        reader, members, others, answers, num_models=num_shadow_models,
        max_epochs=shadow_epochs, seed=seed,
    )
  _report(
      report_dir, finished,
      _Results(
          found, leaks, [victim.client for victim in victims], inverted, shadows,
          num_members=len(members),
      ),
  )


def _open_run(run_dir: pathlib.Path) -> _Run:
  """Reads a run, and refuses one that cannot be attacked."""
  args.take_run(run_dir)
  if not (run_dir / run_folders.RESULTS).exists():
    raise UserError(
        f'The run in {run_dir} has not ended. Let pipelines.train go on with it first.'
    )
  with train_setup.errors_for_users():
    task = train_data.load_task()
  if task.class_numbers(task.clients) is None:
    raise UserError(
        f'The attacks here are on classifiers with one prediction an example, and '
        f'{task.name} is not such a task.'
    )
  rows = train_data.split_clients(task)
  batches = train_data.build_batches(task, rows)
  algorithm = args.algorithm()
  took_part = _who_took_part(run_dir, batches)
  # The draws above are from all examples of a client, so this comes after them.
  rows = _trained_on(rows, batches, algorithm)
  took_part = [client for client in took_part if len(rows[client])]
  if not took_part:
    raise UserError(
        f'No client with examples took part in the run in {run_dir} up to the best '
        'round, whose models are kept: there is nothing to find out.'
    )
  return _Run(
      run_dir, algorithm, task, rows, batches, took_part,
      released={
          model.name: model.keras_model
          for model in released_lib.load(run_dir, task, must_exist=False)
      },
      reader=_Reader(task, released_lib.build_spec(task, 'student')),
  )


def _trained_on(
    rows: Sequence[np.ndarray], batches: tff_kd.ClientBatches,
    algorithm: algorithms.Info,
) -> Sequence[np.ndarray]:
  """Returns the rows on which each client trains: those with a known label, or all."""
  if not _is_of_labelled(batches, algorithm):
    return rows
  found = []
  for client in range(len(rows)):
    # The rows are the same in every round, in another order.
    used, labelled = batches.rows_and_labelled(tf.constant(client), tf.constant(1))
    found.append(np.unique(used.numpy()[labelled.numpy() > 0]))
  return found


def _is_of_labelled(
    batches: tff_kd.ClientBatches, algorithm: algorithms.Info
) -> bool:
  """Returns whether clients train only on a part of their examples."""
  # Distillation from a --local_target, which is FedGKD's way, learns from all inputs.
  learns_from_all = (
      args.LOCAL_TARGET.value != 'none' or 'local_weight' in algorithm.flags
  )
  return batches.label_share < 1.0 and not learns_from_all


def _who_took_part(
    run_dir: pathlib.Path, batches: tff_kd.ClientBatches
) -> list[int]:
  """Returns the numbers of the clients that reported in a round up to the best one."""
  participation = train_data.build_participation(batches)
  ledger = run_dir / train_privacy.LEDGER
  if ledger.exists():
    participation = dataclasses.replace(
        participation,
        seed=privacy.accounting.read_ledger(ledger)['sampling_seed'],
    )
  # Neither later nor skipped rounds have changed the models that are kept.
  best_round = json.loads((run_dir / run_folders.RESULTS).read_text())['best_round']
  history = run_folders.read_history(run_dir / run_folders.METRICS)
  skipped = {row['round'] for row in history if row.get('round_skipped')}
  found = set()
  for round_num in range(1, best_round + 1):
    if round_num not in skipped:
      found.update(map(_reporting, participation(round_num)))
  # A client without examples cannot be attacked.
  return sorted(k for k in found - {None} if batches.data.num_examples[k])


def _reporting(client: Any) -> Optional[int]:
  """Returns the number of a client in a round; `None` if its report is lost."""
  if not isinstance(client, Mapping):
    return client
  is_lost = 'conditions' in client and not client['conditions'].reports
  return None if is_lost else client['data']


def _counted(
    task: tff_kd.data.Task, examples: tff_kd.data.Examples
) -> tff_kd.data.Examples:
  return examples.take(np.flatnonzero(task.counted(examples)))


def _server_model(released: Mapping[str, keras.Model]) -> Optional[keras.Model]:
  for name in ('teacher', 'student', 'student_0'):
    if name in released:
      return released[name]
  return None


def _train_victims(finished: _Run, num_victims: int, seed: int) -> list[_Victim]:
  """Returns some clients, with the models that they would send next or that they keep."""
  rows, counted = finished.rows, finished.task.counted(finished.task.clients)
  fitting = [
      k for k in finished.took_part if counted[rows[k]].sum() >= _MIN_VICTIM_EXAMPLES
  ]
  if not fitting:
    raise UserError(
        f'No client that took part has {_MIN_VICTIM_EXAMPLES} examples or more: there is '
        'no victim whose data would tell something from chance.'
    )
  order = np.random.default_rng(seed).permutation(len(fitting))
  clients = sorted(fitting[i] for i in order[:num_victims])
  models = _kept_models(finished, clients) if finished.keeps_models else (
      _local_models(finished, clients)
  )
  names = finished.batches.data.names
  return [
      _Victim(
          names[client], model,
          _counted(finished.task, finished.task.clients.take(rows[client])),
      )
      for client, model in zip(clients, models, strict=True)
  ]


def _kept_models(finished: _Run, clients: Sequence[int]) -> list[keras.Model]:
  """Returns the models of clients that keep their own, as of the best round."""
  common = train_process.common_arguments(finished.task, finished.batches)
  process = train_process.build_process(finished.algorithm, finished.task, common)
  models = kept.KeptModels(finished.folder, process)
  return [models.spec(k).to_keras(models.weights(k)) for k in clients]


def _local_models(finished: _Run, clients: Sequence[int]) -> list[keras.Model]:
  """Returns each client's student after local training, as its delta gives it."""
  names = args.STUDENT.value
  found, sent = {}, finished.released
  if (finished.folder / released_lib.SENT).is_dir():
    models = released_lib.load(finished.folder / released_lib.SENT, finished.task)
    sent = {model.name: model.keras_model for model in models}
  for cohort in range(len(names)):
    student = sent.get('student') or sent[f'student_{cohort}']
    common = train_process.common_arguments(finished.task, finished.batches)
    functions = common['student_fn']
    process = algorithms.build_fed_avg(
        **{
            **common,
            'student_fn': functions[cohort] if len(names) > 1 else functions,
            'server_optimizer': tff.learning.optimizers.build_sgdm(1.0),
            'client_weighting': tff.learning.ClientWeighting.UNIFORM,
            'model_aggregator': None,
        }
    )
    state = process.set_model_weights(
        process.initialize(), process.student_spec.weights_of(student)
    )
    for client in clients:
      if client % len(names) == cohort:
        weights = process.get_model_weights(process.next(state, [client]).state)
        found[client] = process.students.first.to_keras(weights)
  return [found[client] for client in clients]


def _attack_by_shadow_models(
    reader: _Reader,
    members: tff_kd.data.Examples,
    others: tff_kd.data.Examples,
    answers: Mapping[str, tuple[membership.Predictions, membership.Predictions]],
    *,
    num_models: int,
    max_epochs: int,
    seed: int,
) -> _Shadows:
  """Compares each released student with models whose training is known."""
  if (members.sample_weight is None) != (others.sample_weight is None):
    members, others = (data_task.Examples(*part[:2]) for part in (members, others))
  audited, _ = data_task.pool([members, others])
  is_member = np.arange(len(audited)) < len(members)
  trained = membership.draw_shadow_membership(num_models, len(audited), seed=seed)
  reports = {}
  for name in answers:
    if not name.startswith('student'):
      continue
    confidences = _train_shadows(
        name, reader, audited, trained, max_epochs=max_epochs, seed=seed
    )
    reports[name] = membership.infer_by_shadow_models(
        np.concatenate(
            [membership.logit_scaled_confidences(answer) for answer in answers[name]]
        ),
        is_member, confidences, trained,
    )
  return _Shadows(reports, num_models, int(trained[0].sum()), max_epochs)


def _train_shadows(
    name: str,
    reader: _Reader,
    audited: tff_kd.data.Examples,
    trained: np.ndarray,
    *,
    max_epochs: int,
    seed: int,
) -> np.ndarray:
  """Trains models as `trained` says; returns their confidences `[models, n]`."""
  pipelines.say(
      f'{name}: trains {len(trained)} shadow models on {trained[0].sum():,} examples '
      f'each, up to {max_epochs} passes each. This can take long.'
  )
  task = reader.task
  spec = released_lib.build_spec(task, name)
  evaluator = tff_kd.evaluation.CentralEvaluator(spec)
  confidences, start = [], time.monotonic()
  for number, rows in enumerate(trained):
    keras.utils.set_random_seed(seed + number)
    fresh = released_lib.builder(task, name)()
    fresh(tf.nest.map_structure(lambda a: a[:1], audited.inputs))
    training = central.Training(
        spec, audited.take(np.flatnonzero(rows)), batch_size=_SHADOW_BATCH,
        seed=seed + number, initial_weights=spec.weights_of(fresh),
        optimizer_fn=lambda: keras.optimizers.Adam(_SHADOW_RATE),
    )
    weights, best = central.fit(training, evaluator, task, max_epochs=max_epochs)
    model = spec.to_keras(weights)
    if not best:
      raise UserError(
          f'A shadow model of the {name} has a validation {task.metric} that is no '
          'number after a pass, so there is nothing to compare with. Leave '
          '--shadow_models out.'
      )
    confidences.append(
        membership.logit_scaled_confidences(reader.predict(model, audited))
    )
    left = (time.monotonic() - start) / (number + 1) * (len(trained) - number - 1)
    pipelines.say(
        f'{name}: shadow model {number + 1} of {len(trained)}, best after pass {best}; '
        f'about {left:,.0f} s to go.'
    )
  return np.stack(confidences)


def _why_not_inverted(finished: _Run, num_epochs: int) -> Optional[str]:
  if not num_epochs:
    return 'It was turned off.'
  if not np.issubdtype(np.asarray(finished.task.transfer.inputs).dtype, np.floating):
    return 'Inputs are numbers of words, not values that could be drawn.'
  if 'logits by class' in finished.algorithm.uploads:
    return 'Clients send one mean for each class, not predictions on examples.'
  if 'prototypes' in finished.algorithm.uploads:
    return 'Clients send mean features of each class, not predictions on examples.'
  if 'predictions' not in finished.algorithm.uploads:
    return 'This algorithm has no channel of predictions: clients send weights only.'
  if _server_model(finished.released) is None:
    return 'The server has no model, whose predictions the attack would compare with.'
  return None


def _invert(
    finished: _Run, victims: Sequence[_Victim], *, num_epochs: int, seed: int
) -> _Inversion:
  """Reconstructs examples, if the run has predictions to reconstruct them from."""
  reason = _why_not_inverted(finished, num_epochs)
  if reason is not None:
    return _Inversion(reason=reason)
  reader, server = finished.reader, _server_model(finished.released)
  public = reader.task.transfer.inputs
  server_public = reader.logits(server, public)
  # The mean image of each class as the server predicts it, without any client.
  of_class = {
      int(label): public[np.argmax(server_public, -1) == label].mean(0)
      for label in np.unique(np.argmax(server_public, -1))
  }
  names = ('class PSNR', 'class SSIM', 'example PSNR', 'example SSIM')
  gains, shown = {name: [] for name in names}, {}
  for victim in victims:
    inverter = inversion.Inverter(
        public, inversion.Pairs(reader.logits(victim.model, public), server_public),
        num_epochs=num_epochs, seed=seed,
    )
    classes = reader.task.class_numbers(victim.examples)
    by_class, images = _invert_classes(inverter, victim, classes, of_class, public)
    shown |= images
    # One number a client, as the examples of a client are alike.
    of_client = [
        *(np.mean(by_class, axis=0) if by_class else (np.nan, np.nan)),
        *_invert_examples(inverter, reader, victim, server, of_class, public),
    ]
    for name, value in zip(gains, of_client):
      if np.isfinite(value):
        gains[name].append(value)
  return _Inversion(
      {
          name: membership.mean_with_interval(values)
          for name, values in gains.items() if values
      },
      dict(list(shown.items())[:_MAX_SHOWN]),
  )


def _gains(
    found: np.ndarray, known: np.ndarray, truth: np.ndarray, value_range: float
) -> list[np.ndarray]:
  """Returns the gains in PSNR and SSIM over the public images, by image."""
  return [
      np.asarray(of_found) - np.asarray(of_known)
      for of_found, of_known in zip(*(
          inversion.similarity(images, truth, float(value_range))
          for images in (found, known)
      ))
  ]


def _invert_classes(
    inverter: inversion.Inverter, victim: _Victim, classes: np.ndarray,
    of_class: Mapping[int, np.ndarray], public: np.ndarray,
) -> tuple[list[list[float]], dict[str, dict[str, np.ndarray]]]:
  """Returns the gains of each class of a victim, and the pictures."""
  private = victim.examples
  by_class, shown = [], {}
  for label in np.unique(classes):
    if int(label) not in of_class:
      continue
    own = private.inputs[classes == label]
    image = inverter.invert(inverter.pair_of(int(label)))
    known = of_class[int(label)][np.newaxis]
    by_class.append([
        float(gain[0])
        for gain in _gains(image, known, own.mean(0)[np.newaxis], np.ptp(public))
    ])
    shown[f'client {victim.client},\nclass {label}'] = {
        'private: one example': own[0],
        'private: mean of the class': own.mean(0),
        'reconstructed from predictions': image[0],
        'public: mean of the class': known[0],
    }
  return by_class, shown


def _invert_examples(
    inverter: inversion.Inverter, reader: _Reader, victim: _Victim,
    server: keras.Model, of_class: Mapping[int, np.ndarray], public: np.ndarray,
) -> list[float]:
  """Returns the mean gains over the victim's examples whose predictions leak."""
  private = victim.examples.inputs
  pairs = inversion.Pairs(
      reader.logits(victim.model, private), reader.logits(server, private)
  )
  guesses = np.stack([
      of_class.get(int(label), public.mean(0)) for label in np.argmax(pairs.server, -1)
  ])
  return [
      float(np.mean(gain))
      for gain in _gains(inverter.invert(pairs), guesses, private, np.ptp(public))
  ]


def _report(report_dir: pathlib.Path, finished: _Run, results: _Results) -> None:
  """Prints the tables; writes report.md, report.json and the pictures."""
  setup = _setup(finished, results)
  guards = _guards()
  released = _rows_of_released(results.found)
  clients = _rows_of_clients(finished, results)
  _write_text(report_dir, setup, guards, released, clients, results)
  run_folders.write_json(report_dir / 'report.json', _results_as_json(results))
  _draw(report_dir, results)
  print(setup)
  for guard in guards:
    print(guard)
  print()
  if results.found:
    tables.print_table(released)
    print()
  tables.print_table(clients)
  if results.inversion.reason is not None:
    print(f'Predictions were not inverted. {results.inversion.reason}')
  if results.shadows is not None:
    print()
    if results.shadows.reports:
      tables.print_table(_rows_of_shadows(results.shadows))
    else:
      print(_NO_STUDENT)
  print(f'\n{report_dir / "report.md"}')


def _setup(finished: _Run, results: _Results) -> str:
  is_of_labelled = _is_of_labelled(finished.batches, finished.algorithm)
  kind = 'examples with known labels' if is_of_labelled else 'examples'
  attacked = 'keep' if finished.keeps_models else 'would send after one more round'
  setup = (
      f'{args.ALGORITHM.value} on {args.TASK.value}. Members: {results.num_members} '
      f'{kind} of the {len(finished.took_part)} clients that took part up to the best '
      'round, whose models are kept; others: the test part, equally many. Attack, class '
      'and threshold were chosen on one half and measured on the other. '
      f'{len(results.clients)} clients were attacked one by one, with the models that '
      f'they {attacked}. In brackets: 95 % confidence intervals. Chance is an AUC of .5, '
      'an advantage of 0, and no decibel and no SSIM over the public mean.'
  )
  return setup if results.found else f'{setup} This run releases no model.'


def _guards() -> list[str]:
  """Returns the run's protections against these attacks, and the missing ones."""
  guards = []
  if train_checks.is_private():
    guards.append(
        'The run was differentially private: what is released is; what single clients '
        'send to the server, before its noise, is not.'
    )
  if args.SECURE_AGGREGATION.value:
    guards.append(
        'Under a secure protocol the server would see sums only. What single clients '
        'send is attacked here as if it saw that.'
    )
  return guards


def _rows_of_released(found: Mapping[str, membership.Report]) -> list[tuple[str, ...]]:
  rows: list[tuple[str, ...]] = [(
      'released model', 'accuracy: members', 'others', 'AUC', 'advantage', 'worst class',
      'its AUC', 'attack',
  )]
  for name, report in found.items():
    worst = report.worst_class
    rows.append((
        name, f'{report.member_accuracy:.3f}', f'{report.non_member_accuracy:.3f}',
        str(report.overall.auc), str(report.overall.advantage),
        str(worst.label) if worst is not None else '',
        str(worst.auc) if worst is not None else 'too few examples',
        report.overall.attack,
    ))
  return rows


def _rows_of_clients(finished: _Run, results: _Results) -> list[tuple[str, ...]]:
  attacked = (
      "clients' own models, about which they send something"
      if finished.keeps_models
      else "single clients' models, as one that sees what they send"
  )
  rows: list[tuple[str, ...]] = [
      ('against', 'found', 'mean over clients'),
      (attacked, 'membership by loss, AUC', str(results.leaks)),
  ]
  named = {
      'class': 'classes, reconstructed, over the public mean',
      'example': 'examples whose predictions leak, over the public mean',
  }
  for name, gain in (results.inversion.gains or {}).items():
    kind, score = name.split()
    rows.append(('predictions', f'{score} of {named[kind]}', str(gain)))
  return rows


def _rows_of_shadows(shadows: _Shadows) -> list[tuple[str, ...]]:
  rows = [(
      'attacked', 'attack', 'AUC',
      *(f'members found at {100 * rate:g} %' for rate in membership.LOW_RATES),
  )]
  for name, report in shadows.reports.items():
    for attacked, finding in (
        (name, report.online), (name, report.offline), (name, report.loss),
        (f'a shadow model of the {name}', report.of_shadow),
    ):
      if finding is not None:
        rows.append((
            attacked, finding.attack, str(finding.auc),
            *(str(found.true_positive_rate) for found in finding.detections),
        ))
  return rows


def _about_shadows(shadows: _Shadows) -> str:
  """Explains the attacks with shadow models and what they can show."""
  first = next(iter(shadows.reports.values()))
  rates = ' '.join(
      f'At {100 * found.allowed_rate:g} %, '
      f'{round(found.false_positive_rate.value * first.online.num_non_members)} of '
      f'{first.online.num_non_members:,} others pass, so up to '
      f'{100 * found.false_positive_rate.high:.2g} % of further ones would.'
      for found in first.online.detections
  )
  text = (
      f'{shadows.num_models} models of each released student were trained in one place, '
      f'each with half ({shadows.num_examples:,}) of the members and the others, the '
      f'best of up to {shadows.max_epochs} passes by validation. LiRA asks of each '
      "example whether the student's confidence in its label is more like that of shadow "
      'models with it or without it (online), or how far it is above those without it '
      '(offline, for those who cannot train with it). The loss alone needs no shadow '
      'models. Nothing was chosen: all that was tried is here. "Members found at 0.1 %" '
      'is the share of members above a threshold that at most 0.1 % of the others pass; '
      'chance is 0.001 there. In brackets: 95 % intervals, of shares the exact ones '
      f'(Clopper and Pearson). {rates}\n\n'
      '**What it tests:** those who have the student, know its architecture, and have '
      'the examples in question with others like them. **What it does not:** the shadow '
      'models were trained with Adam in one place, not by the algorithm of the run, so '
      'they are like the student only as far as the two trainings agree; an attack that '
      'repeats the run may find more.'
  )
  if first.of_shadow is not None:
    text += (
        ' The attack on a shadow model shows what it finds where they do agree: if it '
        'finds something there and nothing in the student, either the run learns less by '
        'heart or the shadow models are too unlike it, and this audit cannot tell which.'
    )
  return text


_NO_STUDENT = 'There are no attacks with shadow models: this run releases no student.'


def _write_text(
    report_dir: pathlib.Path, setup: str, guards: Sequence[str],
    released: Sequence[tuple[str, ...]], clients: Sequence[tuple[str, ...]],
    results: _Results,
) -> None:
  """Writes report.md."""
  text = [f'# Audit\n\n{setup}\n']
  text += [f'{guard}\n' for guard in guards]
  text.append('## As one who has the released models\n')
  if results.found:
    text.append(tables.markdown_table(released) + '\n![ROC curves](membership.png)\n')
  else:
    text.append('There is none.\n')
  if results.shadows is not None:
    text.append('## As one who also trains shadow models\n')
    if results.shadows.reports:
      text += [
          _about_shadows(results.shadows) + '\n',
          tables.markdown_table(_rows_of_shadows(results.shadows)),
          '![ROC curves with shadow models](shadow_models.png)\n',
      ]
    else:
      text.append(f'{_NO_STUDENT}\n')
  text.append('## As the server that sees what single clients send\n')
  text.append(tables.markdown_table(clients))
  if results.inversion.reason is not None:
    text.append(f'Predictions were not inverted. {results.inversion.reason}\n')
  elif results.inversion.shown:
    text.append('![Reconstructions](inversion.png)\n')
  tested = results.shadows is not None and results.shadows.reports
  text.append(
      '## What this does not test\n\n'
      + (_WITH_SHADOWS if tested else _NO_SHADOWS) + _NOT_TESTED
  )
  (report_dir / 'report.md').write_text('\n'.join(text))


def _draw(report_dir: pathlib.Path, results: _Results) -> None:

  def curve(finding) -> tuple[np.ndarray, np.ndarray, float]:
    return (
        finding.false_positive_rates, finding.true_positive_rates, finding.auc.value
    )

  if results.found:
    figure = plots.roc(
        {name: curve(report.overall) for name, report in results.found.items()}
    )
    figure.savefig(report_dir / 'membership.png')
  if results.shadows is not None and results.shadows.reports:
    figure = plots.roc({
        f'{name}, {finding.attack}': curve(finding)
        for name, report in results.shadows.reports.items()
        for finding in (report.online, report.offline, report.loss)
    })
    figure.savefig(report_dir / 'shadow_models.png')
  if results.inversion.shown:
    plots.images(results.inversion.shown).savefig(report_dir / 'inversion.png')


def _results_as_json(results: _Results) -> dict[str, Any]:
  shadows = results.shadows
  return {
      'membership': _as_json(results.found),
      'clients': {
          'membership_auc': _as_json(results.leaks), 'names': list(results.clients)
      },
      'inversion': _as_json(results.inversion.gains),
      'shadow_models': shadows and {
          'num_models': shadows.num_models,
          'num_examples': shadows.num_examples,
          'max_epochs': shadows.max_epochs,
          'students': _as_json(shadows.reports),
      },
  }


def _as_json(value: Any) -> Any:
  """Returns named tuples as dicts, without the fields that report.json leaves out."""
  if hasattr(value, '_asdict'):
    value = value._asdict()
  if isinstance(value, Mapping):
    return {
        name: _as_json(each) for name, each in value.items() if name not in _NOT_IN_JSON
    }
  if isinstance(value, tuple):
    return [_as_json(each) for each in value]
  return value
