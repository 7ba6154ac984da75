"""The aggregators of a round's channels: those given, or private and secure ones."""

from typing import Any

from tff_kd.compat import tff

from tff_kd.privacy import differential
from tff_kd.rounds import description
from tff_kd.rounds import options as options_lib
from tff_kd.rounds import parts as parts_lib

_UNIFORM = tff.learning.ClientWeighting.UNIFORM


def build_protection(
    parts: parts_lib.Parts, options: options_lib.Options
) -> description.Protection:
  """Returns how the channels of a process are protected."""
  channels = []
  if parts.averages:
    channels.append('model')
  if parts.exchange is not None:
    channels.append('knowledge')
  return description.Protection(
      tuple(channels), options.privacy, options.secure_aggregation
  )


def weightings(
    parts: parts_lib.Parts, options: options_lib.Options
) -> dict[str, tff.learning.ClientWeighting]:
  """Returns a client's weighting in each channel, by the name of the option."""
  by_model = options.client_weighting or tff.learning.ClientWeighting.NUM_EXAMPLES
  by_knowledge = options.knowledge_weighting
  if by_knowledge is None:
    # Where sums are secure, rows beyond the bound are scaled down to it: of numbers of
    # examples as weights, little would be left, and that would depend on predictions.
    follows = parts.averages and options.secure_aggregation is None
    by_knowledge = by_model if follows else _UNIFORM
  found = dict(knowledge_weighting=by_knowledge)
  return dict(client_weighting=by_model, **found) if parts.averages else found


def build_factories(
    parts: parts_lib.Parts,
    options: options_lib.Options,
    protection: description.Protection,
) -> dict[str, Any]:
  """Builds the aggregation factory of each channel.

  Args:
    parts: The algorithm's.
    options: The user's.
    protection: How the channels are protected.

  Returns:
    By channel a factory, or `None` for the weighted mean.

  Raises:
    TypeError, ValueError: If a guarantee would be false.
  """
  given = dict(
      model=options.model_aggregator, knowledge=options.knowledge_aggregator
  )
  rule, num_predictions = None, 1
  if parts.exchange is not None:
    rule = parts.exchange.rule
    if parts.exchange.transfer_set is not None:
      num_predictions = parts.exchange.transfer_set.num_predictions
  if protection.privacy is not None:
    _check_statistics(parts, protection.privacy)
    differential.check_private(
        protection.privacy,
        has_cohorts=parts.students.has_cohorts,
        weightings=weightings(parts, options),
        aggregators={f'{name}_aggregator': factory for name, factory in given.items()},
        metrics_aggregator=options.metrics_aggregator,
        rule=rule,
        reporting=options.reporting,
        companion=parts.companion,
    )
  return differential.build_aggregators(
      protection.channels,
      given,
      privacy=protection.privacy,
      secure=protection.secure_aggregation,
      # A client with conditions may predict on some of the examples only.
      has_unit_weights=(
          rule is not None and rule.has_unit_weights and options.reporting is None
      ),
      num_predictions=num_predictions,
      rule=rule,
      companion=parts.companion,
  )


def _check_statistics(
    parts: parts_lib.Parts, privacy: differential.DifferentialPrivacy
) -> None:
  """Refuses noise on statistics, of which a variance may not be negative."""
  if parts.averages_statistics and privacy.noise_multipliers(('model',))['model']:
    raise ValueError(
        'With differential privacy the student can have no statistics that move while it '
        'trains, as those of BatchNormalization: noise makes a variance negative, and '
        'what the student then predicts is no number. Take GroupNormalization or '
        'LayerNormalization, or freeze these layers (`layer.trainable = False`).'
    )
