"""The job behind `pipelines.audit`: attacks a finished run, and reports."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any, NamedTuple, Optional

from absl import flags

import keras
import numpy as np
import tensorflow as tf
from tff_kd.compat import tff

from pipelines import plots
from pipelines import tables
from pipelines import train_flags as args
from pipelines import train_job
from pipelines import train_privacy
from pipelines import UserError
import tff_kd
from tff_kd import algorithms
from tff_kd import privacy
from tff_kd.privacy import inversion
from tff_kd.privacy import membership

# A client with fewer is no victim: what it sends can be told from chance by luck only.
_MIN_VICTIM_EXAMPLES = 5
# Classes that a picture shows.
_MAX_SHOWN = 8
_NOT_TESTED = """\
## What this does not test

- Attacks that train models of their own to compare with (shadow models, LiRA), which find
  more at low false positive rates; those that change what is sent (a malicious server, a
  malicious client), clients that work together, and whoever watches a client over many
  rounds.
- What models tell of a client beside membership: properties, labels, single features.
- Gradients: the server's view here is a client's model and its predictions.
- An AUC of about .5 says that these attacks found nothing. It is no guarantee; epsilon is
  one, about every attack.
"""


class _Victim(NamedTuple):
  """A client, and its model after local training.

  Attributes:
    client: Its number.
    model: A Keras model.
    examples: Its own.
  """

  client: int
  model: keras.Model
  examples: Any


class _Inverted(NamedTuple):
  """A class of a victim, to be drawn.

  Attributes:
    title: Which.
    images: By what they are, `[height, width, ...]` each.
  """

  title: str
  images: Mapping[str, np.ndarray]


def run(
    run_dir: pathlib.Path,
    report_dir: pathlib.Path,
    *,
    num_victims: int,
    seed: int,
    num_epochs: int,
) -> None:
  """The whole job."""
  config = _restore_flags(run_dir)
  algorithm = algorithms.REGISTRY[args.ALGORITHM.value]
  task = train_job.load_task()
  if task.is_regression or task.clients.labels.ndim > 1:
    raise UserError(
        f'The attacks here are on classifiers with one prediction an example, and '
        f'{task.name} is no such task.'
    )
  rows = train_job.split_clients(task)
  report_dir.mkdir(parents=True, exist_ok=True)
  batches = train_job.build_batches(task, rows)
  took_part = _who_took_part(run_dir, batches)
  if not took_part:
    raise UserError(
        f'No client with examples took part in the run in {run_dir}: there is nothing to '
        'find out.'
    )
  members = task.clients.take(np.concatenate([rows[k] for k in took_part]))
  released = {
      path.stem: keras.models.load_model(path, compile=False)
      for path in sorted(run_dir.glob('*.keras'))
  }
  found = {
      name: membership.infer_membership(
          _predict(model, members), _predict(model, task.test), seed=seed
      )
      for name, model in released.items()
  }
  with train_job.runtime(report_dir):
    victims = _train_victims(
        run_dir, algorithm, task, rows, batches, released, took_part, num_victims, seed
    )
  leaks = membership.mean_with_interval([
      membership.infer_by_loss(
          _predict(its.model, its.examples), _predict(its.model, task.test)
      )
      for its in victims
  ])
  inverted, shown = None, []
  reason = _why_not_inverted(algorithm, task, released, num_epochs)
  if reason is None:
    inverted, shown = _invert(
        task, _server_model(released), victims, num_epochs=num_epochs, seed=seed
    )
  _report(
      report_dir, config, found, leaks, victims, inverted, shown, reason,
      num_members=len(members), num_clients=len(took_part),
      keeps_models=_keeps_models(run_dir, algorithm),
  )


def _restore_flags(run_dir: pathlib.Path) -> dict[str, Any]:
  """Gives `train_flags` the values of the run."""
  try:
    config = json.loads((run_dir / 'config.json').read_text())['flags']
  except (OSError, ValueError, KeyError):
    raise UserError(
        f'{run_dir} holds no run: there is no config.json of pipelines.train in it. '
        'Name the folder that --output_dir named.'
    ) from None
  if not (run_dir / train_job.RESULTS).exists():
    raise UserError(
        f'The run in {run_dir} has not ended. Let pipelines.train go on with it first.'
    )
  known = {flag.name for flag in flags.FLAGS.flags_by_module_dict()[args.__name__]}
  unknown = sorted(set(config) - known)
  if unknown:
    raise UserError(
        f'The run in {run_dir} was made with flags that are not known here: '
        f'{", ".join(unknown)}. Audit it with the version that made it.'
    )
  for name, value in config.items():
    flags.FLAGS[name].value = value
  return config


def _who_took_part(
    run_dir: pathlib.Path, batches: tff_kd.ClientBatches
) -> list[int]:
  """The numbers of the clients that were in any round."""
  participation = train_job.build_participation(batches)
  ledger = run_dir / train_privacy.LEDGER
  if ledger.exists():
    participation = dataclasses.replace(
        participation,
        seed=privacy.accounting.read_ledger(ledger)['sampling_seed'],
    )
  num_rounds = json.loads((run_dir / train_job.RESULTS).read_text())['rounds']
  found = set()
  for round_num in range(1, num_rounds + 1):
    for client in participation(round_num):
      found.add(client['data'] if isinstance(client, Mapping) else client)
  # An empty client has nothing to be found out.
  return sorted(its for its in found if batches.data.num_examples[its])


def _predict(model: keras.Model, examples) -> membership.Predictions:
  logits = model.predict(examples.inputs, batch_size=256, verbose=0)
  return membership.Predictions(np.asarray(logits, np.float32), examples.labels)


def _server_model(released: Mapping[str, keras.Model]) -> Optional[keras.Model]:
  for name in ('teacher', 'student', 'student_0'):
    if name in released:
      return released[name]
  return None


def _train_victims(
    run_dir, algorithm, task, rows, batches, released, took_part, num_victims, seed
) -> list[_Victim]:
  """Some clients with the models that they would send, or keep, after one more round."""
  fitting = [k for k in took_part if len(rows[k]) >= _MIN_VICTIM_EXAMPLES]
  if not fitting:
    raise UserError(
        f'No client that took part has {_MIN_VICTIM_EXAMPLES} examples or more: there is '
        'no victim whose data would tell something from chance.'
    )
  order = np.random.default_rng(seed).permutation(len(fitting))
  clients = sorted(fitting[i] for i in order[:num_victims])
  names = args.STUDENT.value

  def build(cohort: int) -> keras.Model:
    model = task.students[names[cohort]]()
    model(task.test.inputs[:1])  # Until then a subclassed one has no weights to set.
    return model

  if _keeps_models(run_dir, algorithm):
    weights = _kept_weights(run_dir, algorithm, task, batches, clients)
  else:
    weights = _local_weights(task, batches, released, clients)
  victims = []
  for client, its in zip(clients, weights, strict=True):
    model = build(client % len(names))
    its.assign_weights_to(model)
    victims.append(_Victim(client, model, task.clients.take(rows[client])))
  return victims


def _keeps_models(run_dir: pathlib.Path, algorithm: algorithms.Algorithm) -> bool:
  """Whether clients go on with models of their own, and send something about these."""
  return not algorithm.averages and any((run_dir / 'clients').glob('client-*'))


def _kept_weights(run_dir, algorithm, task, batches, clients):
  """Of clients that keep their models: those."""
  process = train_job.build_process(
      algorithm, task, train_job.common_arguments(task, batches)
  )
  count = len(process.clients.specs)
  states = tff_kd.simulation.ClientStates(
      process.initialize_client(), run_dir / 'clients',
      cohort_fn=(lambda client: client % count) if count > 1 else None,
  ).load(clients)
  return [
      tff.learning.models.ModelWeights(
          *process.clients.unpack(its.weights)[client % count]
      )
      for client, its in zip(clients, states)
  ]


def _local_weights(task, batches, released, clients):
  """Of the others: the student after their local training, as their delta gives it."""
  names = args.STUDENT.value
  found = {}
  for cohort in range(len(names)):
    student = released.get('student') or released[f'student_{cohort}']
    common = train_job.common_arguments(task, batches)
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
        process.initialize(), tff_kd.models.weights_of(student)
    )
    for client in clients:
      if client % len(names) == cohort:
        output = process.next(state, [client])
        found[client] = process.get_model_weights(output.state)
  return [found[client] for client in clients]


def _why_not_inverted(algorithm, task, released, num_epochs: int) -> Optional[str]:
  if not num_epochs:
    return 'It was turned off.'
  if not np.issubdtype(np.asarray(task.transfer.inputs).dtype, np.floating):
    return 'Inputs are numbers of words, not values that could be drawn.'
  if algorithm.takes('regularizer_weight'):
    return 'Clients send one mean for each class, not predictions on examples.'
  if not algorithm.takes('transfer_set'):
    return 'This algorithm has no channel of predictions: clients send weights only.'
  if _server_model(released) is None:
    return 'The server has no model, whose predictions the attack would compare with.'
  return None


def _invert(
    task, server: keras.Model, victims: Sequence[_Victim], *, num_epochs, seed
) -> tuple[dict[str, membership.Estimate], list[_Inverted]]:
  """Scores of the reconstructions, each against what needs no client; and pictures."""
  public = task.transfer.inputs
  value_range = float(np.ptp(public))

  def logits(model, inputs) -> np.ndarray:
    return model.predict(inputs, batch_size=256, verbose=0)

  server_public = logits(server, public)
  # What the server thinks that a class looks like, without any client.
  of_class = {
      int(label): public[np.argmax(server_public, -1) == label].mean(0)
      for label in np.unique(np.argmax(server_public, -1))
  }
  gains = {name: [] for name in ('class PSNR', 'class SSIM', 'example PSNR',
                                 'example SSIM')}
  shown = []
  for victim in victims:
    inverter = inversion.Inverter(
        public, inversion.Pairs(logits(victim.model, public), server_public),
        num_epochs=num_epochs, seed=seed,
    )
    private = victim.examples
    by_class = []
    for label in np.unique(private.labels):
      if int(label) not in of_class:
        continue
      mean = private.inputs[private.labels == label].mean(0)
      image = inverter.invert(inverter.pair_of(int(label)))[0]
      known = of_class[int(label)]
      scores = [
          inversion.similarity(its[np.newaxis], mean[np.newaxis], value_range)
          for its in (image, known)
      ]
      by_class.append([float(a[0] - b[0]) for a, b in zip(*scores)])
      if len(shown) < _MAX_SHOWN:
        shown.append(
            _Inverted(
                f'client {victim.client},\nclass {label}',
                {
                    'private: one example': private.inputs[private.labels == label][0],
                    'private: mean of the class': mean,
                    'reconstructed from predictions': image,
                    'public: mean of the class': known,
                },
            )
        )
    pairs = inversion.Pairs(
        logits(victim.model, private.inputs), logits(server, private.inputs)
    )
    guesses = np.stack([
        of_class.get(int(label), public.mean(0)) for label in np.argmax(pairs.server, -1)
    ])
    scores = [
        inversion.similarity(its, private.inputs, value_range)
        for its in (inverter.invert(pairs), guesses)
    ]
    # One number a client: its examples are alike.
    of_client = [
        *(np.mean(by_class, axis=0) if by_class else (np.nan, np.nan)),
        *(float(np.mean(a - b)) for a, b in zip(*scores)),
    ]
    for name, value in zip(gains, of_client):
      if np.isfinite(value):
        gains[name].append(value)
  return {
      name: membership.mean_with_interval(values)
      for name, values in gains.items() if values
  }, shown


def _report(
    report_dir, config, found, leaks, victims, inverted, shown, reason, *, num_members,
    num_clients, keeps_models,
) -> None:
  """Prints the tables; writes report.md, report.json and the pictures."""
  rows = [(
      'released model', 'accuracy: members', 'others', 'AUC', 'advantage', 'worst class',
      'its AUC', 'attack',
  )]
  for name, its in found.items():
    worst = its.worst_class
    rows.append((
        name, f'{its.member_accuracy:.3f}', f'{its.non_member_accuracy:.3f}',
        str(its.overall.auc), str(its.overall.advantage),
        str(worst.label) if worst is not None else '',
        str(worst.auc) if worst is not None else 'too few examples',
        its.overall.attack,
    ))
  whose = (
      "clients' own models, about which they send something"
      if keeps_models
      else "single clients' models, as one that sees what they send"
  )
  clients = [
      ('against', 'found', 'mean over clients'),
      (whose, 'membership by loss, AUC', str(leaks)),
  ]
  if inverted is not None:
    named = {
        'class': 'classes, reconstructed, over the public mean',
        'example': 'examples whose predictions leak, likewise',
    }
    for name, its in inverted.items():
      kind, score = name.split()
      clients.append(('predictions', f'{score} of {named[kind]}', str(its)))
  guards = []
  if config.get('epsilon') is not None or config.get('noise_multiplier') is not None:
    guards.append(
        'The run was differentially private: what is released is; what single clients '
        'send to the server, before its noise, is not.'
    )
  if config.get('secure_aggregation'):
    guards.append(
        'Under a secure protocol the server would see sums only. What single clients '
        'send is attacked here as if it saw that.'
    )
  setup = (
      f'{config["algorithm"]} on {config["task"]}. Members: {num_members} examples of '
      f'the {num_clients} clients that took part; others: the test part, equally many. '
      'Attack, class and threshold were chosen on one half and measured on the other. '
      f'{len(victims)} clients were attacked one by one, with '
      + (
          'the models that they keep. In'
          if keeps_models
          else 'the models that they would send after one more round. In'
      )
      + ' brackets: 95 % confidence intervals. Chance '
      'is an AUC of .5, an advantage of 0, and no decibel and no SSIM over the public '
      'mean.'
  )
  if not found:
    setup += ' This run releases no model.'
  text = [f'# Audit\n\n{setup}\n']
  text += [f'{its}\n' for its in guards]
  text.append('## As one who has the released models\n')
  if found:
    text.append(tables.markdown_table(rows) + '\n![ROC curves](membership.png)\n')
  else:
    text.append('There is none.\n')
  text.append('## As the server that sees what single clients send\n')
  text.append(tables.markdown_table(clients))
  if reason is not None:
    text.append(f'Predictions were not inverted. {reason}\n')
  elif shown:
    text.append('![Reconstructions](inversion.png)\n')
  text.append(_NOT_TESTED)
  (report_dir / 'report.md').write_text('\n'.join(text))
  (report_dir / 'report.json').write_text(
      json.dumps(
          {
              'membership': {name: _as_json(its) for name, its in found.items()},
              'clients': {
                  'membership_auc': leaks._asdict(),
                  'numbers': [its.client for its in victims],
              },
              'inversion': inverted and {
                  name: its._asdict() for name, its in inverted.items()
              },
          },
          indent=2,
      )
      + '\n'
  )
  if found:
    plots.plot_roc(
        {
            name: (
                its.overall.false_positive_rates, its.overall.true_positive_rates,
                its.overall.auc.value,
            )
            for name, its in found.items()
        },
        report_dir / 'membership.png',
    )
  if shown:
    plots.plot_images({its.title: its.images for its in shown}, report_dir /
                      'inversion.png')
  print(setup)
  for its in guards:
    print(its)
  print()
  if found:
    tables.print_table(rows)
    print()
  tables.print_table(clients)
  if reason is not None:
    print(f'Predictions were not inverted. {reason}')
  print(f'\n{report_dir / "report.md"}')


def _as_json(report: membership.Report) -> dict[str, Any]:

  def of(finding: Optional[membership.Finding]) -> Optional[dict[str, Any]]:
    return finding and {
        'attack': finding.attack,
        'auc': finding.auc._asdict(),
        'advantage': finding.advantage._asdict(),
        'num_members': finding.num_members,
        'num_non_members': finding.num_non_members,
        'label': finding.label,
    }

  return {
      'overall': of(report.overall),
      'worst_class': of(report.worst_class),
      'member_accuracy': report.member_accuracy,
      'non_member_accuracy': report.non_member_accuracy,
  }
