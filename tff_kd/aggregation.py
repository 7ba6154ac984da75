"""What clients send up, aggregated: two channels, metrics and counts.

Everything is a sum over clients. Unless a channel has an aggregation factory of its
own, all of it is one `federated_sum` a round: a federated operation costs each client
a call of the runtime, however little it adds up.
"""

import collections
from typing import Any, NamedTuple, Optional, Union

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from tff_kd import client_work

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
) -> tff.templates.MeasuredProcess:
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

  Returns:
    A `tff.templates.MeasuredProcess` with `next` of the type (<S@SERVER,
    {ClientOutput}@CLIENTS> -> <S@SERVER, ClientUpdate@SERVER, Measurements@SERVER>).
  """
  channels = ['model']
  if len(tff.structure.flatten(output_type.update.knowledge)):
    channels.append('knowledge')
  factories = {'model': model_factory, 'knowledge': knowledge_factory}
  processes = {
      name: _create_process(
          factories[name], getattr(output_type.update, name), f'{name}_aggregator'
      )
      for name in channels
      if factories[name] is not None
  }
  sums_metrics = metrics_aggregator is None
  aggregate_metrics = None
  if not sums_metrics:
    aggregate_metrics = metrics_aggregator(
        metric_finalizers, output_type.metrics
    )
  summed = [name for name in channels if name not in processes]
  summed_type = tff.to_type(
      client_work.ClientOutput(
          update=_update_of(
              {name: getattr(output_type.update, name) for name in summed}
          ),
          # Not `np.float32`: a pair of a dtype and () reads as a tensor's type.
          weight=_update_of(
              {name: tff.TensorType(np.float32) for name in summed}
          ),
          metrics=output_type.metrics if sums_metrics else (),
          participation=output_type.participation,
      )
  )

  @tff.tensorflow.computation(summed_type)
  def finish(sums):
    means = {}
    for name in summed:
      weight = getattr(sums.weight, name)
      means[name] = tf.nest.map_structure(
          lambda value: value / tf.cast(weight, value.dtype),
          getattr(sums.update, name),
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
        (name, process.initialize()) for name, process in processes.items()
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
    means, train, participation = tff.federated_map(
        finish, tff.federated_sum(to_sum)
    )
    results = {name: getattr(means, name) for name in summed}
    if not sums_metrics:
      train = aggregate_metrics(output.metrics)
    new_states, measurements = collections.OrderedDict(), collections.OrderedDict()
    for name, process in processes.items():
      args = [state[name], getattr(output.update, name)]
      if process.is_weighted:
        args.append(getattr(output.weight, name))
      aggregated = process.next(*args)
      results[name] = aggregated.result
      new_states[name] = aggregated.state
      measurements[name] = aggregated.measurements
    results.setdefault('knowledge', _nothing(tff.SERVER))
    return tff.templates.MeasuredProcessOutput(
        state=_zip_or_nothing(new_states),
        result=tff.federated_zip(_update_of(results)),
        measurements=tff.federated_zip(
            Measurements(
                client_work=collections.OrderedDict(
                    train=train, participation=participation
                ),
                aggregator=_zip_or_nothing(measurements),
            )
        ),
    )

  return tff.templates.MeasuredProcess(init_fn, next_fn, next_is_multi_arg=True)


def _update_of(entries: dict[str, Any]) -> client_work.ClientUpdate:
  return client_work.ClientUpdate(
      model=entries.get('model', ()), knowledge=entries.get('knowledge', ())
  )


def _only(update: tff.Value, names: list[str]) -> client_work.ClientUpdate:
  """The named channels of the clients' `ClientUpdate`s; nothing for the others."""
  return client_work.ClientUpdate(
      *(
          getattr(update, name) if name in names else _nothing(tff.CLIENTS)
          for name in client_work.ClientUpdate._fields
      )
  )


def _nothing(placement) -> tff.Value:
  return tff.federated_value((), placement)


def _zip_or_nothing(values: collections.OrderedDict[str, Any]) -> tff.Value:
  return tff.federated_zip(values) if values else _nothing(tff.SERVER)


def _create_process(
    factory: AggregationFactory, value_type: tff.Type, name: str
) -> tff.templates.AggregationProcess:
  if isinstance(factory, tff.aggregators.WeightedAggregationFactory):
    return factory.create(value_type, tff.TensorType(np.float32))
  if isinstance(factory, tff.aggregators.UnweightedAggregationFactory):
    return factory.create(value_type)
  raise TypeError(
      f'`{name}` must be a `tff.aggregators.WeightedAggregationFactory` or '
      f'`UnweightedAggregationFactory`, found {factory!r}.'
  )
