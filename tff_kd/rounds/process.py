"""The one composition of a learning process: of an algorithm's `Parts` and `Options`."""

import dataclasses
from typing import Any, Optional, Union

from tff_kd.client import companions
from tff_kd.client import work as work_lib
from tff_kd import communication
from tff_kd.models import cohorts
from tff_kd import optimizers
from tff_kd.rounds import channels
from tff_kd.rounds import checks
from tff_kd.rounds import description as description_lib
from tff_kd.rounds import options as options_lib
from tff_kd.rounds import parts as parts_lib
from tff_kd.rounds import protection as protection_lib
from tff_kd.rounds import round as round_lib
from tff_kd.rounds import round_arguments

_DEFAULT_OPTIONS = options_lib.Options()
Process = Union[
    description_lib.DistillationProcess, description_lib.StatefulClientsProcess
]


def compose_process(
    parts: parts_lib.Parts, options: options_lib.Options = _DEFAULT_OPTIONS
) -> Process:
  """Composes the stages of one round into a learning process.

  Args:
    parts: The algorithm's parts.
    options: The user's options.

  Returns:
    A `DistillationProcess`; where clients keep something from round to round, a
    `StatefulClientsProcess`.

  Raises:
    TypeError, ValueError: If the parts do not fit together.
  """
  parts = dataclasses.replace(
      parts,
      local_terms=[*parts.local_terms, *options.local_terms],
      companion=_one_companion(parts.companion, options.companion),
  )
  checks.check(parts, options)
  protection = protection_lib.build_protection(parts, options)
  factories = protection_lib.build_factories(parts, options, protection)
  if parts.exchange is not None and (options.privacy or options.secure_aggregation):
    parts = dataclasses.replace(parts, exchange=parts.exchange.with_inexact_sums())
  client_work = work_lib.build_client_work(_client_plan(parts, options, factories))
  aggregator, aggregated_bytes = channels.build_aggregator(
      client_work.output_type,
      client_work.plan.metric_finalizers,
      factories,
      metrics_aggregator=options.metrics_aggregator,
      secure=options.secure_aggregation,
  )
  stages = round_lib.Round(parts, options, client_work, aggregator)
  init_fn = stages.build_initialize()
  state_type = init_fn.type_signature.result
  described = _describe(parts, protection, client_work, aggregated_bytes, stages)
  next_fn = round_arguments.checked(
      stages.build_next(state_type),
      round_arguments.ClientArguments(
          client_data=options.client_data,
          input_spec=parts.students.first.input_spec,
          num_cohorts=len(parts.students.specs),
          has_conditions=options.reporting is not None,
          max_clients=protection.max_clients,
          is_private=protection.privacy is not None,
          keeps_state=client_work.plan.keeps_state,
          kept_models=described.kept_models,
      ),
  )
  accessors = stages.build_accessors(state_type.member)
  if client_work.plan.keeps_state:
    return description_lib.StatefulClientsProcess(
        init_fn, next_fn, client_work.initialize_client, described, accessors
    )
  return description_lib.DistillationProcess(init_fn, next_fn, described, accessors)


def _one_companion(
    of_algorithm: Optional[companions.Companion],
    of_user: Optional[companions.Companion],
) -> Optional[companions.Companion]:
  if of_algorithm is not None and of_user is not None:
    raise ValueError(
        f'This algorithm has a companion of its own, {type(of_algorithm).__name__}, and '
        f'there can be one: leave `companion` out, found {of_user!r}.'
    )
  return of_user if of_algorithm is None else of_algorithm


def _client_plan(
    parts: parts_lib.Parts, options: options_lib.Options, factories: dict[str, Any]
) -> work_lib.ClientPlan:
  """Returns what clients do."""
  weightings = protection_lib.weightings(parts, options)
  return work_lib.ClientPlan(
      students=parts.students,
      optimizer=parts.client_optimizer,
      receives_student=parts.averages,
      keeps_model=parts.keeps_model,
      personal=parts.personal,
      weightings=work_lib.ClientUpdate(
          weightings.get('client_weighting'), weightings['knowledge_weighting']
      ),
      applies_weight=work_lib.ClientUpdate(
          model=factories['model'] is None, knowledge=factories['knowledge'] is None
      ),
      client_data=options.client_data,
      exchange=parts.exchange,
      teacher=parts.teacher,
      local_terms=tuple(parts.local_terms),
      companion=parts.companion,
      pretraining=parts.pretraining,
      learning_rate_fn=options.learning_rate_fn,
      reporting=options.reporting,
      releases_metrics=options.privacy is None,
      seed=options.seed,
  )


def _describe(
    parts: parts_lib.Parts,
    protection: description_lib.Protection,
    client_work: work_lib.ClientWork,
    aggregated_bytes: dict[str, int],
    stages: round_lib.Round,
) -> description_lib.Description:
  kept_models, exchanged_bytes = None, (0, 0)
  coded_bytes = communication.CodedBytes()
  if parts.keeps_model:
    kept_models = parts.students
  if parts.companion is not None:
    exchanged_bytes = parts.companion.exchange_bytes()
    if parts.companion.client_spec is not None:
      kept_models = cohorts.as_students(parts.companion.client_spec)
  if parts.exchange is not None:
    coded_bytes = parts.exchange.coded_bytes()
  return description_lib.Description(
      students=parts.server_students or parts.students,
      teacher_spec=parts.teacher,
      kept_models=kept_models,
      transfer_set=parts.distils_on,
      protection=protection,
      broadcast_type=client_work.plan.broadcast_type,
      update_type=client_work.output_type.update,
      coded_bytes=coded_bytes,
      exchanged_bytes=exchanged_bytes,
      aggregated_bytes=aggregated_bytes,
      client_data=client_work.plan.client_data,
      reporting=client_work.plan.reporting,
      sends_average=stages.sends_average,
      optimizers=_optimizers(parts, stages.server_optimizer),
  )


def _optimizers(
    parts: parts_lib.Parts, server_optimizer: Optional[optimizers.Optimizer]
) -> dict[str, optimizers.Optimizer]:
  """Returns every optimizer of a round, by name."""
  of_companion = None if parts.companion is None else parts.companion.optimizer
  found = {
      'client_optimizer': parts.client_optimizer,
      'server_optimizer': server_optimizer,
      'companion_optimizer': of_companion,
  }
  lessons = [*parts.stages]
  if parts.exchange is not None and parts.exchange.digest is not None:
    lessons.append(parts.exchange.digest)
  if parts.pretraining is not None:
    lessons.append(parts.pretraining)
  for number, lesson in enumerate(lessons, 1):
    found[f'{lesson.learner}_optimizer of lesson {number}'] = lesson.optimizer
  return {name: value for name, value in found.items() if value is not None}
