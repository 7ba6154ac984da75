"""Checks before a round is built: the parts fit, and guarantees hold."""

from collections.abc import Sequence
from typing import Any, Optional

import tensorflow as tf
from tff_kd.compat import tff

from tff_kd import checks as value_checks
from tff_kd.client import class_counts
from tff_kd.client import exchanges
from tff_kd.client import local_terms as local_terms_lib
from tff_kd.data import client_data as client_data_lib
from tff_kd.data import transfer
from tff_kd import graphs
from tff_kd import knowledge
from tff_kd import models
from tff_kd import optimizers
from tff_kd.rounds import options as options_lib
from tff_kd.rounds import parts as parts_lib
from tff_kd.rounds import protection

_UNIFORM = tff.learning.ClientWeighting.UNIFORM


def check(parts: parts_lib.Parts, options: options_lib.Options) -> None:
  """Checks that an algorithm's parts and a user's options go together.

  Raises:
    TypeError, ValueError: If something is missing, or does not fit.
  """
  student = parts.students.first
  if parts.teacher is not None:
    models.check_same_outputs(student, parts.teacher)
  if parts.distils_on is not None:
    check_transfer_set(parts.distils_on, student)
    _check_transfer_ids(parts)
  if options.client_data is not None:
    check_client_data(options.client_data, student)
  optimizers.check_optimizer(parts.client_optimizer, 'client_optimizer')
  optimizers.check_learning_rate_fn(options.learning_rate_fn, parts.client_optimizer)
  _check_local_terms(parts, options.client_data)
  _check_stages(parts)
  _check_exchange(parts, options)
  _check_companion(parts, options)
  if options.reporting is not None and options.client_data is None:
    raise ValueError(
        '`reporting` needs clients that read their examples by reference: pass '
        '`client_data=`.'
    )
  _check_start(parts, options)
  if not parts.averages:
    _check_without_averaging(parts, options)
  if parts.personal:
    _check_personal(parts)


def _check_stages(parts: parts_lib.Parts) -> None:
  """Checks the server's lessons, and that of clients before the first round."""
  transfer_set = parts.distils_on
  rule = parts.exchange.rule if parts.exchange is not None else None
  if transfer_set is None and (parts.stages or parts.pretraining):
    raise ValueError('Distillation and pretraining need a `transfer_set`.')
  for stage in parts.stages:
    stage.check(
        transfer_set,
        has_teacher=parts.teacher is not None,
        has_diversity=rule is not None and rule.has_diversity,
    )
  if parts.pretraining is None:
    return
  if parts.client_model is not parts_lib.ClientModel.KEPT:
    raise ValueError(
        'Pretraining needs clients that keep their models: others begin every round '
        f'with the same weights, found {parts.client_model}.'
    )
  exchanges.check_stage(parts.pretraining, transfer_set, rule)


def _check_exchange(parts: parts_lib.Parts, options: options_lib.Options) -> None:
  """Checks what an exchange needs of the rest."""
  exchange = parts.exchange
  if exchange is None:
    for name in ('knowledge_aggregator', 'knowledge_weighting'):
      if getattr(options, name) is not None:
        raise ValueError(
            f'Clients send no predictions that `{name}` could be about: no stage distils '
            f'from the ensemble. Leave it out, found {getattr(options, name)!r}.'
        )
    return
  if exchange.needs_server_model and not parts.stages:
    raise ValueError(
        "What this exchange sends down is made by the server's model: give it a "
        'stage in `stages`.'
    )
  if exchange.needs_exact_sums:
    _check_exact_sums(options)


def _check_exact_sums(options: options_lib.Options) -> None:
  """Checks that all included clients count the same in the sums."""
  reason = "This exchange leaves a client's own part out of a sum, so that "
  if options.knowledge_aggregator is not None:
    raise ValueError(
        f'{reason}all parts must be in it as they are: `knowledge_aggregator` must be '
        f'`None`, found {options.knowledge_aggregator!r}.'
    )
  if options.knowledge_weighting not in (None, _UNIFORM):
    raise ValueError(
        f'{reason}all parts must weigh the same: `knowledge_weighting` must be '
        '`tff.learning.ClientWeighting.UNIFORM`, found '
        f'{options.knowledge_weighting}.'
    )
  _check_staleness(options, reason)


def _check_without_averaging(
    parts: parts_lib.Parts, options: options_lib.Options
) -> None:
  """Checks that nothing is given that belongs to the averaging of weights."""
  for name in ('server_optimizer', 'client_weighting', 'model_aggregator'):
    if getattr(options, name) is not None:
      raise ValueError(
          f'`{name}` is about the average of weights, and in this algorithm weights '
          f'never leave clients: leave it out, found {getattr(options, name)!r}.'
      )
  for term in parts.local_terms:
    if term.target in ('student', 'student_history') or term.needs_received:
      raise ValueError(
          f'{term!r} compares with the student that the server sends, and in this '
          'algorithm it sends none. Leave the term out.'
      )
  if parts.companion is not None and parts.companion.has_client_state:
    raise ValueError(
        f'{type(parts.companion).__name__} keeps a state at clients, and so do the '
        'clients of this algorithm: it needs an algorithm that averages weights.'
    )


def _check_personal(parts: parts_lib.Parts) -> None:
  """Checks that nothing needs a whole student of the server's."""
  for term in parts.local_terms:
    if term.target in ('student', 'student_history'):
      raise ValueError(
          f'{term!r} learns from the student that the server sends, which here lacks the '
          'layers that clients keep. Leave the term out.'
      )
  if parts.companion is not None or parts.stages:
    found = parts.companion or parts.stages
    raise ValueError(
        'Companions and distillation on the server need a whole student, and here '
        f'clients keep some of its layers: leave out {found!r}.'
    )


def _check_start(parts: parts_lib.Parts, options: options_lib.Options) -> None:
  """Checks that 'average' and 'distilled' are two students."""
  start = options.clients_start_from
  if start is not None and not parts.refines_student:
    why = 'this algorithm averages no weights'
    if parts.averages:
      why = 'the server leaves the student as averaging made it'
    raise ValueError(
        '`clients_start_from` chooses between the averaged student and what the server '
        f'makes of it, and {why}: leave it out, found {start!r}.'
    )


def _check_local_terms(
    parts: parts_lib.Parts, client_data: Optional[client_data_lib.ClientBatches]
) -> None:
  """Checks that each term has the models, labels and classes that it needs."""
  for term in parts.local_terms:
    if term.target not in (None, *local_terms_lib.TARGETS):
      raise ValueError(
          f'The `target` of a local term must be one of {local_terms_lib.TARGETS} '
          f'or None, found {term.target!r}.'
      )
    if term.target == 'teacher' and parts.teacher is None:
      raise ValueError(
          "A local term with target='teacher' needs a teacher; pass `teacher_fn`."
      )
    if term.needs_labels and client_data is not None and client_data.label_share < 1.0:
      raise ValueError(
          f'{term} needs the label of every example: `label_share` must be 1, found '
          f'{client_data.label_share}.'
      )
    if term.needs_classes:
      models.check_has_classes(parts.students.first, type(term).__name__)
    if term.needs_class_counts:
      for spec in parts.students.specs:
        class_counts.check(spec, type(term).__name__)
  history_size(parts.local_terms)


def history_size(terms: Sequence[local_terms_lib.LocalTerm]) -> int:
  """Returns how many past students the terms need.

  Raises:
    ValueError: If they do not agree.
  """
  sizes = {term.history_size for term in terms if term.target == 'student_history'}
  for size in sizes:
    value_checks.check_positive_integer(size, 'history_size')
  if len(sizes) > 1:
    raise ValueError(
        f'Local terms must agree on `history_size`, found {sorted(sizes)}.'
    )
  return max(sizes, default=0)


def _check_companion(parts: parts_lib.Parts, options: options_lib.Options) -> None:
  """Checks that a companion fits the rest, and gives certainties where a rule needs any.
  """
  companion = parts.companion
  rule: Optional[knowledge.ConsensusRule] = None
  if parts.exchange is not None:
    rule = parts.exchange.rule
  gives = companion is not None and companion.gives_certainty
  needs = rule is not None and rule.needs_certainty
  if needs and not gives:
    raise ValueError(
        f'The rule {rule!r} weighs by a certainty that is given, but no companion '
        'gives one. Pass '
        '`companion=tff_kd.client.companions.density.LabelDensity(...)` or '
        '`certainty.CertaintyScorer(...)`, or a rule that takes it from the predictions, '
        "such as CertaintyWeighted('variance')."
    )
  if gives and not needs:
    raise ValueError(
        "A companion that gives clients' certainties needs a distillation from the "
        f"ensemble and a rule that weighs by them, CertaintyWeighted('given'), found "
        f'{rule!r}.'
    )
  if companion is None:
    return
  name, num_cohorts = type(companion).__name__, len(parts.students.specs)
  if companion.needs_one_architecture and num_cohorts > 1:
    raise ValueError(
        f'{name} is built for clients of one architecture, and there are {num_cohorts} '
        'students. Pass one `student_fn` (--student), or choose another algorithm or '
        'companion.'
    )
  if companion.corrects_student and parts.averages:
    _check_plain_mean(name, parts, options)
  if companion.needs_plain_sgd:
    optimizers.check_plain_sgd(
        parts.client_optimizer,
        'client_optimizer',
        f"{name} tells a client's mean gradient from the change of its weights.",
    )
  if companion.needs_client_number and options.client_data is None:
    raise ValueError(
        'This companion needs clients that read their examples by reference: pass '
        '`client_data=`. (For a private certainty: a dataset may hold an example '
        'several times, and the noise covers one.) Without noise, epsilon=None, '
        'datasets will do.'
    )


def _check_plain_mean(
    name: str, parts: parts_lib.Parts, options: options_lib.Options
) -> None:
  """Checks that all reports weigh the same: then their mean tells what they add up to.
  """
  reason = f"{name} tells from the mean update what clients' changes add up to: "
  weighting = protection.weightings(parts, options)['client_weighting']
  if weighting is not _UNIFORM:
    raise ValueError(
        f'{reason}all must weigh the same: `client_weighting` must be '
        f'`tff.learning.ClientWeighting.UNIFORM`, found {weighting}.'
    )
  _check_staleness(options, reason)


def _check_staleness(options: options_lib.Options, reason: str) -> None:
  reporting = options.reporting
  if reporting is not None and reporting.max_delay and reporting.staleness_power:
    raise ValueError(
        f'{reason}late clients must weigh as much as others: `staleness_power` must be '
        f'0, found {reporting.staleness_power}.'
    )


def check_client_data(
    client_data: client_data_lib.ClientBatches, student: models.ModelSpec
) -> None:
  """Checks that clients' examples are of the kind that the model takes.

  Raises:
    ValueError: If they are not.
  """
  if not models.is_compatible(student.input_spec, client_data.element_spec):
    raise ValueError(
        '`input_spec` and `client_data` must have batches of one kind, found '
        f'{student.input_spec} and {client_data.element_spec}. Pass '
        '`input_spec=client_data.element_spec`.'
    )
  client_data.data.check_labels(student.loss, student.outputs_shape)


def check_transfer_set(
    transfer_set: transfer.TransferSet, student: models.ModelSpec
) -> None:
  """Checks that transfer examples are of the kind that the models take.

  Raises:
    ValueError: If they are not, or if a label has no meaning.
  """
  inputs_spec, labels_spec = models.split_batch(student.input_spec)
  pairs = [('inputs', inputs_spec, transfer_set.inputs_spec)]
  if transfer_set.labelled:
    pairs.append(('labels', labels_spec, transfer_set.labels_spec))
  for part, expected, found in pairs:
    if not models.is_compatible(expected, found):
      raise ValueError(
          f"The transfer set's {part} must be like the clients' {part}: expected "
          f'{expected}, found {found}. Convert them to that shape and dtype.'
      )
  if transfer_set.labelled:
    _check_labels(transfer_set, student)


def _check_labels(
    transfer_set: transfer.TransferSet, student: models.ModelSpec
) -> None:
  rows = tf.range(transfer_set.size)
  known = tf.boolean_mask(
      transfer_set.gather_labels(rows), transfer_set.gather_label_weights(rows) > 0.0
  )
  _, bad = student.usable_labels(known)
  if not bad:
    return
  num_logits = student.logits_shape[-1]
  expected = (
      '0, 1 or between'
      if num_logits == 1
      else f'class numbers from 0 to {num_logits - 1}'
  )
  raise ValueError(
      f"The transfer set's labels must be {expected}, found {known.numpy().min()} to "
      f'{known.numpy().max()}. Mend them, or mark them as unknown in `label_mask`.'
  )


def _check_transfer_ids(parts: parts_lib.Parts) -> None:
  """Checks that the models' embeddings have the ids among the transfer inputs."""
  transfer_set = parts.distils_on
  rows = tf.range(transfer_set.size)
  specs = [*parts.students.specs, *([parts.teacher] if parts.teacher else [])]
  for spec in specs:
    if not spec.has_ids:
      continue

    def has_bad_ids(inputs: Any, spec: models.ModelSpec = spec) -> tf.Tensor:
      bad = spec.call(spec.values(spec.initial_weights), inputs).bad_inputs
      return tf.fill([tf.shape(tf.nest.flatten(inputs)[0])[0]], bad)

    if tf.reduce_any(graphs.function(transfer_set.map_inputs)(has_bad_ids, rows)):
      raise ValueError(
          "The transfer set's inputs have ids that an embedding of the "
          f'{spec.name} does not have: they must be from 0 to one below its '
          '`input_dim`. Mend them, or give the embedding a larger `input_dim`.'
      )
