"""What clients send up, aggregated: two channels, metrics and counts.

Everything is a sum over clients. Unless a channel has an aggregation factory of its
own, all of it is one `federated_sum` a round: a federated operation costs each client
a call of the runtime, however little it adds up.
"""

import collections
from typing import Any, NamedTuple, Optional, Union

import numpy as np
import tensorflow as tf
from tff_kd.compat import tff

from tff_kd import client_work
from tff_kd import communication
from tff_kd import graphs
from tff_kd.privacy import secure as secure_lib

AggregationFactory = Union[
    tff.aggregators.WeightedAggregationFactory,
    tff.aggregators.UnweightedAggregationFactory,
]


class Measurements(NamedTuple):
  """What an aggregation measures.

  Attributes:
    client_work: The clients' finalized metrics, `train`, and their counts,
      `participation`.
    aggregator: The measurements of the factories, by channel; () without.
  """

  client_work: Any
  aggregator: Any


def build_client_output_aggregator(
    output_type: tff.Type,
    metric_finalizers: Any,
    *,
    model_factory: Optional[AggregationFactory] = None,
    knowledge_factory: Optional[AggregationFactory] = None,
    metrics_aggregator: Optional[Any] = None,
    secure: Optional[secure_lib.SecureAggregation] = None,
) -> tuple[tff.templates.MeasuredProcess, dict[str, int]]:
  """Aggregates `ClientOutput`s.

  Args:
    output_type: The type of a `ClientOutput`. Without predictions in it there is no
      second channel.
    metric_finalizers: Of the metrics in it, by name.
    model_factory: Aggregates the weight deltas. `None` for the weighted mean of
      deltas that the clients have multiplied by their weights.
    knowledge_factory: Aggregates the predictions, likewise.
    metrics_aggregator: As in `tff.learning.algorithms`; sums, then finalizes, if
      `None`.
    secure: Everything is summed securely, if given; the channels' factories then do so
      themselves.

  Returns:
    A `tff.templates.MeasuredProcess` with `next` of the type (<S@SERVER,
    {ClientOutput}@CLIENTS> -> <S@SERVER, ClientUpdate@SERVER, Measurements@SERVER>);
    and the `communication.aggregated_bytes` of the channels with factories of their own.
  """
  channels = _channels(output_type)
  factories = {'model': model_factory, 'knowledge': knowledge_factory}
  processes = {
      channel: _create_process(
          factories[channel.field],
          channel.of(output_type.update),
          f'{channel.field}_aggregator',
          has_cohorts=channel.cohort is not None,
      )
      for channel in channels
      if factories[channel.field] is not None
  }
  if secure is not None and metrics_aggregator is None and metric_finalizers:
    metrics_aggregator = tff.learning.metrics.secure_sum_then_finalize
  sums_metrics = metrics_aggregator is None
  aggregate_metrics = None
  if not sums_metrics:
    aggregate_metrics = metrics_aggregator(
        metric_finalizers, output_type.metrics
    )
  summed = [channel for channel in channels if channel not in processes]
  summed_type = tff.to_type(
      client_work.ClientOutput(
          update=_update_of({c: c.of(output_type.update) for c in summed}),
          # Not `np.float32`: a pair of a dtype and () reads as a tensor's type.
          weight=_update_of({c: tff.TensorType(np.float32) for c in summed}),
          metrics=output_type.metrics if sums_metrics else (),
          participation=output_type.participation,
      )
  )

  sum_securely = None
  if secure is not None:
    # Only counts are left, each 0 or 1.
    sum_securely = tff.aggregators.SecureSumFactory(1, 0).create(summed_type)

  @graphs.computation(summed_type)
  def finish(sums):
    means = {}
    for channel in summed:
      weight = channel.of(sums.weight)
      means[channel] = tf.nest.map_structure(
          lambda value: value / tf.cast(weight, value.dtype),
          channel.of(sums.update),
      )
    train = ()
    if sums_metrics:
      train = collections.OrderedDict(
          (name, finalize(sums.metrics[name]))
          for name, finalize in metric_finalizers.items()
      )
    return _update_of(means), train, sums.participation

  @tff.federated_computation
  def init_fn():
    states = collections.OrderedDict(
        (channel.name, process.initialize())
        for channel, process in processes.items()
    )
    return tff.federated_zip(states) if states else _nothing(tff.SERVER)

  @tff.federated_computation(
      init_fn.type_signature.result, tff.FederatedType(output_type, tff.CLIENTS)
  )
  def next_fn(state, output):
    if not processes and sums_metrics:
      to_sum = output
    else:
      nothing = _nothing(tff.CLIENTS)
      to_sum = tff.federated_zip(
          client_work.ClientOutput(
              update=_only(output.update, summed),
              weight=_only(output.weight, summed),
              metrics=output.metrics if sums_metrics else nothing,
              participation=output.participation,
          )
      )
    if sum_securely is not None:
      sums = sum_securely.next(_nothing(tff.SERVER), to_sum).result
    else:
      sums = tff.federated_sum(to_sum)
    means, train, participation = tff.federated_map(finish, sums)
    results = {channel: channel.of(means) for channel in summed}
    if not sums_metrics:
      train = aggregate_metrics(output.metrics)
    new_states, measurements = collections.OrderedDict(), collections.OrderedDict()
    for channel, process in processes.items():
      args = [state[channel.name], channel.of(output.update)]
      if process.is_weighted:
        args.append(channel.of(output.weight))
      aggregated = process.next(*args)
      results[channel] = aggregated.result
      new_states[channel.name] = aggregated.state
      measurements[channel.name] = aggregated.measurements
    return tff.templates.MeasuredProcessOutput(
        state=_zip_or_nothing(new_states),
        result=tff.federated_zip(_update_of(results, _nothing(tff.SERVER))),
        measurements=tff.federated_zip(
            Measurements(
                client_work=collections.OrderedDict(
                    train=train, participation=participation
                ),
                aggregator=_zip_or_nothing(measurements),
            )
        ),
    )

  aggregated_bytes = {
      channel.name: communication.aggregated_bytes(process)
      for channel, process in processes.items()
  }
  if secure is not None and secure.bits is not None:
    # In TFF's types they are of 32.
    aggregated_bytes = {
        name: size * secure.message_bits // 32 for name, size in aggregated_bytes.items()
    }
  return (
      tff.templates.MeasuredProcess(init_fn, next_fn, next_is_multi_arg=True),
      aggregated_bytes,
  )


class _Channel(NamedTuple):
  """One mean over clients: weights (of one cohort, if there are several), knowledge.

  Attributes:
    field: That of a `ClientUpdate`.
    cohort: Whose, or `None` without cohorts.
  """

  field: str
  cohort: Optional[int] = None

  @property
  def name(self) -> str:
    return self.field if self.cohort is None else f'{self.field}_{self.cohort}'

  def of(self, update: Any) -> Any:
    value = getattr(update, self.field)
    return value if self.cohort is None else value[self.cohort]


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


def _update_of(
    entries: dict[_Channel, Any], nothing: Any = ()
) -> client_work.ClientUpdate:
  by_cohort = tuple(v for c, v in entries.items() if c.cohort is not None)
  whole = {c.field: v for c, v in entries.items() if c.cohort is None}
  return client_work.ClientUpdate(
      model=by_cohort or whole.get('model', nothing),
      knowledge=whole.get('knowledge', nothing),
  )


def _only(update: tff.Value, channels: list[_Channel]) -> client_work.ClientUpdate:
  """The clients' `ClientUpdate`s in these channels; nothing for the others."""
  return _update_of({c: c.of(update) for c in channels}, _nothing(tff.CLIENTS))


def _nothing(placement) -> tff.Value:
  return tff.federated_value((), placement)


def _zip_or_nothing(values: collections.OrderedDict[str, Any]) -> tff.Value:
  return tff.federated_zip(values) if values else _nothing(tff.SERVER)


def _create_process(
    factory: AggregationFactory, value_type: tff.Type, name: str, has_cohorts: bool
) -> tff.templates.AggregationProcess:
  if isinstance(factory, tff.aggregators.WeightedAggregationFactory):
    return factory.create(value_type, tff.TensorType(np.float32))
  if isinstance(factory, tff.aggregators.UnweightedAggregationFactory):
    if has_cohorts:
      raise ValueError(
          f'`{name}` must be weighted where there are several cohorts, found '
          f'{factory!r}: the clients of other cohorts have weight 0.'
      )
    return factory.create(value_type)
  raise TypeError(
      f'`{name}` must be a `tff.aggregators.WeightedAggregationFactory` or '
      f'`UnweightedAggregationFactory`, found {factory!r}.'
  )
