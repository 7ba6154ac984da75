"""Differential privacy: clients' reports are clipped, summed, and noised, by channel.

The server adds noise to the sums (central differential privacy). Others, who see the
models and the broadcasts, learn little about any one client. The server itself must be
trusted with the sums and, without secure aggregation, with the clients' reports.
"""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any, Optional, Union

import numpy as np
import tensorflow as tf
from tff_kd.compat import tff
from tff_kd.compat import tensorflow_privacy as tfp
import tree

from tff_kd import checks
from tff_kd import knowledge
from tff_kd.privacy import accounting
from tff_kd.privacy import secure as secure_lib

ADAPTIVE = 'adaptive'
# As TFF's `gaussian_adaptive`.
_INITIAL_MODEL_CLIP, _QUANTILE, _CLIP_RATE = 0.1, 0.5, 0.2
# Represents no clip: a power of two, so that nothing is rounded.
_NO_CLIP = 2.0**100
# A noised weight below this many standard deviations counts as missing.
_MIN_WEIGHT_STDDEVS = 3.0
# The names of a query's settings in the state of an aggregation. In the parts named
# below, two of these names belong to learned values.
_QUERY_SETTINGS = frozenset([
    'l2_norm_clip', 'stddev', 'noise_multiplier', 'denominator', 'target_quantile',
    'learning_rate',
])
_LEARNED_OR_DERIVED = frozenset(['sum_state', 'dp_event'])


@dataclasses.dataclass(frozen=True, kw_only=True)
class DifferentialPrivacy:
  """How the sums of a round are made private. The unit of privacy is a client.

  A client's report on a channel is scaled down to the L2 norm `*_clip`, over all of its
  numbers (all predictions of a round together). The server adds Gaussian noise to the
  sum, and divides by `clients_per_round`, however many clients reported. All clients
  count the same.

  A round costs as much as one Gaussian of `noise_multiplier`, however many channels the
  algorithm sends: they share it (`noise_multipliers`).

  Source: McMahan et al., "Learning Differentially Private Recurrent Language Models"
  (ICLR 2018), Algorithm 1 with the fixed denominator; Andrew et al., "Differentially
  Private Learning with Adaptive Clipping" (NeurIPS 2021), for the adaptive clip.

  Attributes:
    noise_multiplier: z, the noise's standard deviation divided by the clip; 0 for no
      noise.
    clients_per_round: The expected number of clients in a round.
    model_clip: The L2 norm to which the weight delta is clipped; 'adaptive' for TFF's
      running estimate of the median norm, whose own noise is part of z; math.inf for no
      clipping, if z is 0.
    knowledge_clip: The L2 norm to which the uploaded predictions are clipped, or
      'adaptive'.
    knowledge_share: The share of the privacy that the predictions get if weights are
      sent, too, between 0 and 1.
    channels: Which of the channels 'model' and 'knowledge' are noised; all that there are
      if `None`. If one is left out, there is no guarantee: its epsilon is infinite. A
      process refuses one that its algorithm does not send.
  """

  noise_multiplier: float
  clients_per_round: int
  model_clip: Union[float, str] = ADAPTIVE
  knowledge_clip: Union[float, str] = ADAPTIVE
  knowledge_share: float = 0.5
  channels: Optional[Sequence[str]] = None

  def __post_init__(self):
    if not 0.0 <= self.noise_multiplier < math.inf:
      raise ValueError(
          '`noise_multiplier` must be finite, 0 or more, found '
          f'{self.noise_multiplier!r}.'
      )
    if self.clients_per_round < 1:
      raise ValueError(
          f'`clients_per_round` must be 1 or more, found {self.clients_per_round!r}.'
      )
    if not 0.0 < self.knowledge_share < 1.0:
      raise ValueError(
          '`knowledge_share` must be between 0 and 1, found '
          f'{self.knowledge_share!r}.'
      )
    if self.channels is not None and (
        not self.channels or not set(self.channels) <= {'model', 'knowledge'}
    ):
      raise ValueError(
          "`channels` must be of 'model' and 'knowledge', found "
          f'{self.channels!r}.'
      )
    for name in ('model_clip', 'knowledge_clip'):
      clip = getattr(self, name)
      if clip == ADAPTIVE:
        continue
      if isinstance(clip, str) or not clip > 0.0:
        raise ValueError(
            f"`{name}` must be above 0, or 'adaptive', found {clip!r}."
        )
      if clip == math.inf and self.noise_multiplier:
        raise ValueError(
            f'`{name}` must be finite: without a clip, no noise gives a guarantee.'
        )

  def is_noised(self, channel: str) -> bool:
    """Returns whether a channel is among `channels`.

    Args:
      channel: 'model' or 'knowledge'.
    """
    return self.channels is None or channel in self.channels

  def check_channels(self, sent: Sequence[str]) -> None:
    """Raises an error if `channels` names one that the algorithm does not send.

    Args:
      sent: The channels that the algorithm sends.

    Raises:
      ValueError: If there is one.
    """
    unsent = [c for c in self.channels or () if c not in sent]
    if unsent:
      raise ValueError(
          f'`channels` names {unsent}, which this algorithm does not send: nothing would '
          f'be noised. It sends {list(sent)}; leave `channels` out to noise all of that.'
      )

  def noise_multipliers(self, sent: Sequence[str]) -> dict[str, float]:
    """Returns the noise multiplier z of each channel's own sum.

    Args:
      sent: The channels that the algorithm sends.

    Returns:
      By channel; 0 for a channel that is not in `channels`. The others compose to
      `noise_multiplier`.
    """
    private = [c for c in sent if self.is_noised(c)]
    shares = {'model': 1.0 - self.knowledge_share, 'knowledge': self.knowledge_share}
    total = sum(shares[c] for c in private)
    return {
        c: self.noise_multiplier / math.sqrt(shares[c] / total) if c in private else 0.0
        for c in sent
    }

  def build_factory(
      self,
      channel: str,
      sent: Sequence[str],
      *,
      has_unit_weights: bool = False,
      num_predictions: int = 1,
      secure: Optional[secure_lib.SecureAggregation] = None,
  ) -> Optional[tff.aggregators.UnweightedAggregationFactory]:
    """Builds a factory of a channel's private mean.

    Args:
      channel: 'model' or 'knowledge'.
      sent: The channels that the algorithm sends.
      has_unit_weights: For 'knowledge', whether the weights reveal nothing about a
        client.
      num_predictions: For 'knowledge', the number of examples that are predicted. An
        adaptive clip begins with a norm of 1 for each.
      secure: A `SecureAggregation` that sums the clipped values.

    Returns:
      The factory; `None` for a channel that is not private.

    Raises:
      ValueError: If a secure sum has a clip that is not a number, or `bits`.
    """
    if not self.is_noised(channel):
      return None
    noise = self.noise_multipliers(sent)[channel]
    clip = getattr(self, f'{channel}_clip')
    clients = float(self.clients_per_round)
    record_factory = None
    if secure is not None:
      if clip in (ADAPTIVE, math.inf) or secure.bits is not None:
        raise ValueError(
            f'A private and secure sum needs a `{channel}_clip` that is a number, which '
            'is the range of its integers, and TFF\'s 32 bits: fewer would round the '
            f'norm up beyond the clip. Found {clip!r} and bits={secure.bits!r}.'
        )
      record_factory = secure.build_sum(float(clip))
    if clip == ADAPTIVE:
      # The estimate of the clip must not cost more than a quarter of the privacy.
      stddev = max(0.05 * clients, noise)
      divide = tff.aggregators.differential_privacy.adaptive_clip_noise_params
      value_noise, stddev = divide(float(noise), clients, stddev if noise else None)
      query = tfp.QuantileAdaptiveClipSumQuery(
          initial_l2_norm_clip=(
              _INITIAL_MODEL_CLIP if channel == 'model' else math.sqrt(num_predictions)
          ),
          noise_multiplier=value_noise,
          target_unclipped_quantile=_QUANTILE,
          learning_rate=_CLIP_RATE,
          clipped_count_stddev=stddev,
          expected_num_records=clients,
          geometric_update=True,
      )
    else:
      bound = _NO_CLIP if clip == math.inf else float(clip)
      query = tfp.GaussianSumQuery(l2_norm_clip=bound, stddev=bound * noise)
    mean = tff.aggregators.DifferentiallyPrivateFactory(
        tfp.NormalizedQuery(query, denominator=clients), record_factory
    )
    if channel == 'model':
      return _FloatsOnlyFactory(mean)
    min_weight = 0.0
    if not has_unit_weights and noise:
      if clip == ADAPTIVE:
        raise ValueError(
            'These clients send weighted sums of predictions, and the clip decides which '
            'noised weights count as missing: `knowledge_clip` must be a number, found '
            "'adaptive'."
        )
      min_weight = _MIN_WEIGHT_STDDEVS * noise * clip / clients
    return _PrivateKnowledgeFactory(
        mean, has_unit_weights=has_unit_weights, min_weight=min_weight
    )


def check_private(
    dp: DifferentialPrivacy,
    *,
    has_cohorts: bool,
    weightings: Mapping[str, tff.learning.ClientWeighting],
    aggregators: Mapping[str, Any],
    metrics_aggregator: Any,
    rule: Optional[knowledge.ConsensusRule],
    reporting: Any,
    companion: Any,
) -> None:
  """Refuses settings that would void the privacy guarantee.

  Args:
    dp: How sums are made private.
    has_cohorts: Whether there are several cohorts.
    weightings: The weightings of clients, by the argument's name.
    aggregators: The channels' own factories, or `None`, by the argument's name.
    metrics_aggregator: The aggregator of clients' metrics, or `None`.
    rule: How predictions are combined, or `None`.
    reporting: A `Reporting`, or `None`.
    companion: A `companions.Companion`, or `None`.

  Raises:
    TypeError, ValueError: If there is such a setting.
  """
  if not isinstance(dp, DifferentialPrivacy):
    raise TypeError(
        '`privacy` must be a `tff_kd.privacy.DifferentialPrivacy`, found '
        f'{dp!r}.'
    )

  _check_private_weights(weightings, aggregators, metrics_aggregator)
  if has_cohorts:
    _refuse(
        'there can be one student only',
        "the accountant does not cover how many of a round's clients each cohort has.",
        'Pass one `student_fn`.',
    )
  if rule is not None and rule.is_coded:
    _refuse(
        f'the rule cannot be coded, found {rule!r}',
        'the length of a code tells what is in it.',
        'Pass the rule inside it.',
    )
  if reporting is not None and reporting.max_delay:
    _refuse(
        f'`max_delay` must be 0, found {reporting.max_delay}',
        'a late client could be in one sum twice, and the choice of clients would depend '
        'on earlier rounds.',
        'Build the process without delays.',
    )
  if reporting is not None and reporting.min_reports:
    _refuse(
        f'`min_reports` must be 0, found {reporting.min_reports}',
        'a skipped round reveals how many clients reported.',
        'Build the process without it.',
    )
  if companion is not None and companion.exchanges:
    _refuse(
        f'there can be no {type(companion).__name__}',
        'what it exchanges with clients is not noised by this.',
        'Choose an algorithm without one.',
    )
  if companion is not None and companion.corrects_student:
    _refuse(
        f'there can be no {type(companion).__name__}',
        'the student would depend on the number of reports without noise.',
        'Choose an algorithm without one.',
    )


def _refuse(use: str, why: str, remedy: str) -> None:
  raise ValueError(f'With differential privacy {use}: {why} {remedy}')


def _check_private_weights(
    weightings: Mapping[str, tff.learning.ClientWeighting],
    aggregators: Mapping[str, Any],
    metrics_aggregator: Any,
) -> None:
  """Refuses weights and aggregations that the accountant does not cover."""
  for name, weighting in weightings.items():
    if weighting is not tff.learning.ClientWeighting.UNIFORM:
      _refuse(
          f'`{name}` must be UNIFORM, found {weighting}',
          "a client's number of examples is private, and a weight without a bound would "
          'give its report an unlimited influence.',
          'Pass `tff.learning.ClientWeighting.UNIFORM`.',
      )
  for name, aggregator in aggregators.items():
    if aggregator is not None:
      _refuse(
          f'`{name}` must be None, found {aggregator!r}',
          'what another aggregation does to clipped values is not in the account.',
          'Leave it out; `privacy` clips by itself.',
      )
  if metrics_aggregator is not None:
    _refuse(
        '`metrics_aggregator` must be None',
        "clients' metrics would be released without noise.",
        'Leave it out, and evaluate the released models.',
    )


class _FloatsOnlyFactory(tff.aggregators.UnweightedAggregationFactory):
  """Refuses values that cannot be noised."""

  def __init__(self, inner: tff.aggregators.UnweightedAggregationFactory):
    self._inner = inner

  def create(self, value_type: tff.Type) -> tff.templates.AggregationProcess:
    _check_floats(value_type)
    return self._inner.create(value_type)


class _PrivateKnowledgeFactory(tff.aggregators.UnweightedAggregationFactory):
  """The private mean of `KnowledgePayload`s.

  Weights that are 1 for every client need no noise: the mean weight is 1. Other weights
  are clipped and noised together with the values. Predictions whose mean weight does not
  exceed its noise are treated as missing.
  """

  def __init__(
      self,
      inner: tff.aggregators.UnweightedAggregationFactory,
      *,
      has_unit_weights: bool,
      min_weight: float,
  ):
    self._inner = inner
    self._has_unit_weights = has_unit_weights
    self._min_weight = min_weight

  def create(self, value_type: tff.Type) -> tff.templates.AggregationProcess:
    value_type = tff.to_type(value_type)
    _check_floats(value_type)
    has_unit_weights, min_weight = self._has_unit_weights, self._min_weight

    @tff.tensorflow.computation(value_type)
    def select(payload):
      fields = collections.OrderedDict(values=payload.values)
      if not has_unit_weights:
        fields['weights'] = payload.weights
      return fields

    inner = self._inner.create(select.type_signature.result)

    @tff.tensorflow.computation(select.type_signature.result)
    def finish(mean):
      values = mean['values']
      if has_unit_weights:
        return knowledge.KnowledgePayload(values, tf.ones(value_type.weights.shape))
      weights = mean['weights']
      is_present = weights > min_weight
      shape = [*weights.shape, *[1] * (values.shape.rank - weights.shape.rank)]
      return knowledge.KnowledgePayload(
          values=tf.where(tf.reshape(is_present, shape), values, 0.0),
          weights=tf.where(is_present, weights, 0.0),
      )

    @tff.federated_computation(
        inner.initialize.type_signature.result,
        tff.FederatedType(value_type, tff.CLIENTS),
    )
    def next_fn(state, value):
      aggregated = inner.next(state, tff.federated_map(select, value))
      return tff.templates.MeasuredProcessOutput(
          state=aggregated.state,
          result=tff.federated_map(finish, aggregated.result),
          measurements=aggregated.measurements,
      )

    return tff.templates.AggregationProcess(inner.initialize, next_fn)


def _check_floats(value_type: tff.Type) -> None:
  for leaf in tff.structure.flatten(value_type):
    if not np.issubdtype(leaf.dtype, np.floating):
      raise TypeError(
          'Only floating numbers can be noised, found '
          f'{value_type}. Layers with integer weights, such as counters, cannot be in a '
          'private sum.'
      )


def check_initial_state(state: Any, of_process: Any) -> None:
  """Refuses an initial state with another noise or clip than those of the process.

  A round takes both from the state, but the accountant takes them from the process.

  Args:
    state: The initial state of a private process.
    of_process: The state that the process initializes.

  Raises:
    ValueError: If the two differ.
  """
  there, here = _query_settings(state.aggregator), _query_settings(of_process.aggregator)
  changed = checks.differences(there, here)
  if changed:
    raise ValueError(
        '`initial_state` is of a process with another `privacy`, and would bring its '
        f'noise or clip along ({changed}). Begin with '
        '`process.set_model_weights(process.initialize(), weights)`.'
    )


def _query_settings(aggregator_state: Any) -> dict[str, float]:
  """Returns the settings of an aggregation's queries, by their paths."""
  return {
      '/'.join(map(str, path)): float(leaf)
      for path, leaf in tree.flatten_with_path(aggregator_state)
      if path[-1] in _QUERY_SETTINGS and not _LEARNED_OR_DERIVED.intersection(path)
  }


def build_accountant(protection: Any, **kwargs) -> accounting.PrivacyAccountant:
  """Returns the accountant of a private process.

  Args:
    protection: The process's `protection`.
    **kwargs: `sampling`, `delta` and further arguments of `PrivacyAccountant`.

  Raises:
    ValueError: If the process is not private.
  """
  if protection.privacy is None:
    raise ValueError(
        'There is nothing to account for: the process is not built with `privacy`.'
    )
  return accounting.PrivacyAccountant(
      list(protection.privacy.noise_multipliers(protection.channels).values()), **kwargs
  )


def build_aggregators(
    sent: Sequence[str],
    aggregators: Mapping[str, Any],
    *,
    privacy: Optional[DifferentialPrivacy],
    secure: Optional[secure_lib.SecureAggregation],
    has_unit_weights: bool,
    num_predictions: int,
    rule: Optional[knowledge.ConsensusRule],
    companion: Any,
) -> dict[str, Any]:
  """Returns the aggregation factories of a process's channels.

  Args:
    sent: The channels that the process sends.
    aggregators: The factories that the user gave, or `None`, by channel; returned
      unchanged without `privacy` and `secure`.
    privacy: How sums are made private, checked by `check_private`, or `None`.
    secure: How sums are made secure, or `None`.
    has_unit_weights: Whether the weights of predictions reveal nothing about a client.
    num_predictions: The number of predicted examples.
    rule: How predictions are combined, or `None`.
    companion: A `companions.Companion`, or `None`.

  Raises:
    TypeError, ValueError: If these do not go together.
  """
  if secure is not None:
    _check_secure(sent, aggregators, secure, privacy, rule, companion)
  if privacy is not None:
    privacy.check_channels(sent)
  factories = dict(aggregators)
  for channel in sent:
    factory = None
    if privacy is not None:
      factory = privacy.build_factory(
          channel,
          sent,
          has_unit_weights=has_unit_weights,
          num_predictions=num_predictions,
          secure=secure,
      )
    if factory is None and secure is not None:
      factory = secure.build_mean(channel)
    if factory is not None:
      factories[channel] = factory
  return factories


def _check_secure(
    sent: Sequence[str],
    aggregators: Mapping[str, Any],
    secure: secure_lib.SecureAggregation,
    privacy: Optional[DifferentialPrivacy],
    rule: Optional[knowledge.ConsensusRule],
    companion: Any,
) -> None:
  if not isinstance(secure, secure_lib.SecureAggregation):
    raise TypeError(
        '`secure_aggregation` must be a `tff_kd.privacy.SecureAggregation`, found '
        f'{secure!r}.'
    )
  # Private channels are clipped to their own range.
  unnoised = [c for c in sent if privacy is None or not privacy.is_noised(c)]
  secure.check_channels(unnoised)
  for name, aggregator in aggregators.items():
    if aggregator is not None:
      raise ValueError(
          f'With secure aggregation `{name}_aggregator` must be None, found '
          f'{aggregator!r}: it may need what single clients send.'
      )
  if rule is not None and rule.is_coded:
    raise ValueError(
        f'With secure aggregation the rule cannot be coded, found {rule!r}: what masks '
        'hide cannot be told by a code. `SecureAggregation(bits=...)` makes its numbers '
        'short.'
    )
  if companion is not None and companion.exchanges and not companion.sums_securely:
    raise ValueError(
        f'With secure aggregation there can be no {type(companion).__name__}: what it '
        'exchanges with clients is not summed securely.'
    )
