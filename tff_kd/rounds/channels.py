"""Aggregation of uploads: two channels, metrics and counts.

Everything is a sum over clients. Unless a channel has an aggregation factory of its
own, all of it is one `federated_sum` a round: a federated operation costs each client
a call of the runtime, however little it adds up.
"""

import collections
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional, Union

import numpy as np
import tensorflow as tf
from tff_kd.compat import tff

from tff_kd.client import work
from tff_kd import communication
from tff_kd import graphs
from tff_kd.privacy import secure as secure_lib

AggregationFactory = Union[
    tff.aggregators.WeightedAggregationFactory,
    tff.aggregators.UnweightedAggregationFactory,
]


class Measurements(NamedTuple):
  """The measurements of an aggregation.

  Attributes:
    client_work: The clients' finalized metrics, `train`, and their counts,
      `participation`.
    aggregator: The measurements of the factories, by channel; () without.
  """

  client_work: Any
  aggregator: Any

# The range of a client's sums of metrics, to which TFF clips them in secure sums.
_METRIC_RANGE = (-float(2**20 - 1), float(2**20 - 1))


def build_aggregator(
    output_type: tff.Type,
    metric_finalizers: Mapping[str, Any],
    factories: Mapping[str, Optional[AggregationFactory]],
    *,
    metrics_aggregator: Optional[Any] = None,
    secure: Optional[secure_lib.SecureAggregation] = None,
) -> tuple[tff.templates.MeasuredProcess, dict[str, int]]:
  """Builds what aggregates `ClientOutput`s.

  Args:
    output_type: The type of a `ClientOutput`. Without predictions in it there is no
      second channel.
    metric_finalizers: The finalizers of the metrics in it, by name.
    factories: By channel, 'model' and 'knowledge', what aggregates it. `None` for the
      weighted mean of what the clients have multiplied by their weights.
    metrics_aggregator: As in `tff.learning.algorithms`; sums, then finalizes, if
      `None`.
    secure: Everything is summed securely, if given; the channels' factories then do so
      themselves.

  Returns:
    A `tff.templates.MeasuredProcess` with `next` of the type (<S@SERVER,
    {ClientOutput}@CLIENTS> -> <S@SERVER, ClientUpdate@SERVER, Measurements@SERVER>);
    and the `communication.aggregated_bytes` of the channels with factories of their
    own.
  """
  channels = _channels(output_type)
  processes = {
      channel: _create_process(
          factories[channel.field],
          channel.of(output_type.update),
          f'{channel.field}_aggregator',
          has_cohorts=channel.cohort is not None,
      )
      for channel in channels if factories[channel.field] is not None
  }
  if secure is not None and metrics_aggregator is None and metric_finalizers:
    metrics_aggregator = _secure_metrics
  aggregate_metrics = None
  if metrics_aggregator is not None:
    aggregate_metrics = metrics_aggregator(metric_finalizers, output_type.metrics)
  common_sum = _CommonSum(
      [channel for channel in channels if channel not in processes],
      output_type,
      metric_finalizers if aggregate_metrics is None else None,
      secure,
  )
  aggregator = _build_process(output_type, processes, common_sum, aggregate_metrics)
  return aggregator, _aggregated_bytes(processes, secure)


def _secure_metrics(finalizers: Any, metrics_type: tff.Type) -> tff.Computation:
  """Sums metrics securely; floats may be below 0, where TFF's own range begins."""
  ranges = collections.OrderedDict(
      (name, [_METRIC_RANGE if np.issubdtype(t.dtype, np.floating) else None for t in of])
      for name, of in tff.structure.iter_elements(metrics_type)
  )
  return tff.learning.metrics.secure_sum_then_finalize(
      finalizers, metrics_type, metric_value_ranges=ranges
  )


def _build_process(
    output_type: tff.Type,
    processes: Mapping['_Channel', tff.templates.AggregationProcess],
    common_sum: '_CommonSum',
    aggregate_metrics: Optional[tff.Computation],
) -> tff.templates.MeasuredProcess:
  """Builds the process of the channels' own factories and the sum of all else."""

  @tff.federated_computation
  def init_fn():
    states = collections.OrderedDict(
        (channel.name, process.initialize()) for channel, process in processes.items()
    )
    return _zip_or_nothing(states)

  @tff.federated_computation(
      init_fn.type_signature.result, tff.FederatedType(output_type, tff.CLIENTS)
  )
  def next_fn(state, output):
    results, train, participation = common_sum(
        output, is_all=not processes and aggregate_metrics is None
    )
    if aggregate_metrics is not None:
      train = aggregate_metrics(output.metrics)
    states, measurements = collections.OrderedDict(), collections.OrderedDict()
    for channel, process in processes.items():
      arguments = [state[channel.name], channel.of(output.update)]
      if process.is_weighted:
        arguments.append(channel.of(output.weight))
      aggregated = process.next(*arguments)
      results[channel] = aggregated.result
      states[channel.name] = aggregated.state
      measurements[channel.name] = aggregated.measurements
    client_work = collections.OrderedDict(train=train, participation=participation)
    return tff.templates.MeasuredProcessOutput(
        state=_zip_or_nothing(states),
        result=tff.federated_zip(_update_of(results, _nothing(tff.SERVER))),
        measurements=tff.federated_zip(
            Measurements(client_work, _zip_or_nothing(measurements))
        ),
    )

  return tff.templates.MeasuredProcess(init_fn, next_fn, next_is_multi_arg=True)


class _Channel(NamedTuple):
  """One mean over clients: weights (of one cohort, if there are several), knowledge.

  Attributes:
    field: The field of the `ClientUpdate`.
    cohort: The cohort's number; `None` without cohorts.
  """

  field: str
  cohort: Optional[int] = None

  @property
  def name(self) -> str:
    return self.field if self.cohort is None else f'{self.field}_{self.cohort}'

  def of(self, update: Any) -> Any:
    """Returns the part of a `ClientUpdate`."""
    value = getattr(update, self.field)
    return value if self.cohort is None else value[self.cohort]


class _CommonSum:
  """The one sum of all that has no aggregator of its own."""

  def __init__(
      self,
      channels: Sequence[_Channel],
      output_type: tff.Type,
      metric_finalizers: Optional[Mapping[str, Any]],
      secure: Optional[secure_lib.SecureAggregation],
  ):
    """Initializes the sum.

    Args:
      channels: The channels that are summed here.
      output_type: The type of a `ClientOutput`.
      metric_finalizers: By metric's name; `None` if metrics are not summed here.
      secure: The `SecureAggregation`; a plain sum if `None`.
    """
    self._channels, self._sums_metrics = channels, metric_finalizers is not None
    summed_type = tff.to_type(
        work.ClientOutput(
            update=_update_of({c: c.of(output_type.update) for c in channels}),
            # Not `np.float32`: a pair of a dtype and () reads as a tensor's type.
            weight=_update_of({c: tff.TensorType(np.float32) for c in channels}),
            metrics=output_type.metrics if self._sums_metrics else (),
            participation=output_type.participation,
        )
    )
    self._secure_sum = None
    if secure is not None:
      # Only counts are left, each 0 or 1.
      self._secure_sum = tff.aggregators.SecureSumFactory(1, 0).create(summed_type)

    @graphs.computation(summed_type)
    def finish(sums):
      means = {}
      for channel in channels:
        weight = channel.of(sums.weight)
        means[channel] = tf.nest.map_structure(
            lambda value, weight=weight: value / tf.cast(weight, value.dtype),
            channel.of(sums.update),
        )
      train: Any = ()
      if metric_finalizers is not None:
        train = collections.OrderedDict(
            (name, finalize(sums.metrics[name]))
            for name, finalize in metric_finalizers.items()
        )
      return _update_of(means), train, sums.participation

    self._finish = finish

  def __call__(
      self, output: tff.Value, *, is_all: bool
  ) -> tuple[dict[_Channel, tff.Value], tff.Value, tff.Value]:
    """Sums clients' outputs.

    Args:
      output: `ClientOutput`s.
      is_all: Whether nothing of it is aggregated elsewhere.

    Returns:
      The channels' means, the finalized metrics and the counts.
    """
    to_sum = output
    if not is_all:
      nothing = _nothing(tff.CLIENTS)
      to_sum = tff.federated_zip(
          work.ClientOutput(
              update=self._only(output.update),
              weight=self._only(output.weight),
              metrics=output.metrics if self._sums_metrics else nothing,
              participation=output.participation,
          )
      )
    if self._secure_sum is not None:
      sums = self._secure_sum.next(_nothing(tff.SERVER), to_sum).result
    else:
      sums = tff.federated_sum(to_sum)
    means, train, participation = tff.federated_map(self._finish, sums)
    return {c: c.of(means) for c in self._channels}, train, participation

  def _only(self, update: tff.Value) -> work.ClientUpdate:
    """Returns the clients' `ClientUpdate`s in these channels; nothing for the others."""
    return _update_of({c: c.of(update) for c in self._channels}, _nothing(tff.CLIENTS))


def _channels(output_type: tff.Type) -> list[_Channel]:
  def is_sent(update: tff.Type) -> bool:
    return len(tff.structure.flatten(update)) > 0

  channels = []
  weight = output_type.weight.model
  if is_sent(output_type.update.model):
    if isinstance(weight, tff.TensorType):
      channels.append(_Channel('model'))
    else:
      channels += [_Channel('model', i) for i in range(len(weight))]
  if is_sent(output_type.update.knowledge):
    channels.append(_Channel('knowledge'))
  return channels


def _update_of(entries: Mapping[_Channel, Any], nothing: Any = ()) -> work.ClientUpdate:
  by_cohort = tuple(v for c, v in entries.items() if c.cohort is not None)
  whole = {c.field: v for c, v in entries.items() if c.cohort is None}
  return work.ClientUpdate(
      model=by_cohort or whole.get('model', nothing),
      knowledge=whole.get('knowledge', nothing),
  )


def _nothing(placement) -> tff.Value:
  return tff.federated_value((), placement)


def _zip_or_nothing(values: Mapping[str, Any]) -> tff.Value:
  return tff.federated_zip(values) if values else _nothing(tff.SERVER)


def _aggregated_bytes(
    processes: Mapping[_Channel, tff.templates.AggregationProcess],
    secure: Optional[secure_lib.SecureAggregation],
) -> dict[str, int]:
  """Returns what one client hands to each channel's own aggregator, in bytes."""
  found = {
      channel.name: communication.aggregated_bytes(process)
      for channel, process in processes.items()
  }
  if secure is not None and secure.bits is not None:
    # The integers have 32 bits in TFF's types.
    found = {name: size * secure.message_bits // 32 for name, size in found.items()}
  return found


def _create_process(
    factory: AggregationFactory, value_type: tff.Type, name: str, has_cohorts: bool
) -> tff.templates.AggregationProcess:
  if isinstance(factory, tff.aggregators.WeightedAggregationFactory):
    return factory.create(value_type, tff.TensorType(np.float32))
  if has_cohorts:
    raise ValueError(
        f'`{name}` must be weighted where there are several cohorts, found '
        f'{factory!r}: the clients of other cohorts have weight 0.'
    )
  return factory.create(value_type)
