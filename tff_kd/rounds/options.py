"""The clients' training and options of every algorithm; imports no TensorFlow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import inspect
import re
from typing import Any, Optional

import tff_kd
from tff_kd import checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientTraining:
  """How clients train, whatever the algorithm.

  Attributes:
    input_spec: The clients' `dataset.element_spec`.
    loss_fn: Returns a `keras.losses.Loss`, for all models.
    client_optimizer: The clients' optimizer: a TFF optimizer, or a function that returns
      a Keras one.
    metrics_fn: Returns a list of `keras.metrics.Metric`s.
  """

  input_spec: Any
  loss_fn: tff_kd.models.LossFn
  client_optimizer: tff_kd.optimizers.Optimizer
  metrics_fn: Optional[tff_kd.models.MetricsFn] = None

  def __post_init__(self):
    tff_kd.rounds.arguments.check(vars(self), _parameters(ClientTraining))

  @property
  def _of_models(self) -> dict[str, Any]:
    return dict(
        input_spec=self.input_spec, loss_fn=self.loss_fn, metrics_fn=self.metrics_fn
    )

  def build_students(
      self, student_fn: tff_kd.models.cohorts.StudentFn
  ) -> tff_kd.models.cohorts.Students:
    """Builds the clients' models.

    Args:
      student_fn: Returns a new `keras.Model`; or a list of such functions, one a cohort.

    Returns:
      The checked `Students`.
    """
    return tff_kd.models.cohorts.build_students(student_fn, **self._of_models)

  def build_model(
      self, model_fn: tff_kd.models.KerasModelFn, name: str
  ) -> tff_kd.models.ModelSpec:
    """Builds a model beside the students.

    Args:
      model_fn: Returns a new `keras.Model`.
      name: The model's name in errors.

    Returns:
      The checked `ModelSpec`.
    """
    return tff_kd.models.build_model_spec(model_fn, name=name, **self._of_models)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """The options of every algorithm.

  Attributes:
    client_data: Where and how clients read their examples, a `ClientBatches`. `next`
      then takes client numbers in place of datasets, which is the fastest way. With
      cohorts, `next` takes {'cohort': number, 'data': dataset or number} a client.
    server_optimizer: Applies the mean update to the student (FedOpt); plain averaging
      (SGD with rate 1) if `None`. Only where weights are averaged.
    client_weighting: A client's weight in the mean update: its number of examples
      (`NUM_EXAMPLES`, the default) or 1 (`UNIFORM`). Only where weights are averaged.
    knowledge_weighting: A client's weight in what clients exchange; if `None`, that of
      the mean update, and `UNIFORM` where no weights are averaged, or sums are secure
      (whose bounds would cut predictions that are multiplied by numbers of examples).
    model_aggregator: A `tff.aggregators` factory for the updates; if `None`, the
      weighted mean, as `tff.aggregators.MeanFactory()` but with the products made by the
      clients. Unweighted factories get no weights; in their means, a client that is
      left out counts as zeros. Only where weights are averaged.
    knowledge_aggregator: A factory for what clients exchange; the weighted mean if
      `None`.
    metrics_aggregator: As in `tff.learning.algorithms`.
    local_terms: Further terms of the clients' loss, a sequence of
      `tff_kd.client.local_terms.LocalTerm`s, after the algorithm's own.
    clients_start_from: With which student clients begin a round, where the server
      changes the averaged student before it releases it: 'distilled', the released
      student; or 'average', as averaging left it. The next average begins there, too. If
      `None`, 'distilled', unless the algorithm says otherwise.
    companion: An auxiliary component of the clients' training, a
      `tff_kd.client.companions.Companion`.
    learning_rate_fn: Maps a round's number, an int32 tensor from 0, to the clients'
      learning rate, as in TFF's `build_weighted_fed_avg_with_optimizer_schedule`; needs
      a TFF optimizer.
    reporting: Policy for late, partial or insufficient reports, a `tff_kd.Reporting`.
      `next` then takes {'data': number, 'conditions': `ClientConditions`} a client.
      Needs `client_data`.
    privacy: Makes what clients send differentially private, all channels together, a
      `tff_kd.privacy.DifferentialPrivacy`; no client's metrics are then released. Needs
      `UNIFORM` weights.
    secure_aggregation: Sums what clients send as a secure protocol would, a
      `tff_kd.privacy.SecureAggregation`.
    seed: With the round number, decides the order of the server's examples and what is
      drawn in training.
  """

  client_data: Optional[tff_kd.ClientBatches] = None
  server_optimizer: Optional[tff_kd.optimizers.Optimizer] = None
  client_weighting: Optional[tff_kd.tff.learning.ClientWeighting] = None
  knowledge_weighting: Optional[tff_kd.tff.learning.ClientWeighting] = None
  model_aggregator: Optional[tff_kd.rounds.AggregationFactory] = None
  knowledge_aggregator: Optional[tff_kd.rounds.AggregationFactory] = None
  metrics_aggregator: Optional[Any] = None
  local_terms: Sequence[tff_kd.client.local_terms.LocalTerm] = ()
  clients_start_from: Optional[str] = None
  companion: Optional[tff_kd.client.companions.Companion] = None
  learning_rate_fn: Optional[tff_kd.client.local_training.LearningRateFn] = None
  reporting: Optional[tff_kd.Reporting] = None
  privacy: Optional[tff_kd.privacy.DifferentialPrivacy] = None
  secure_aggregation: Optional[tff_kd.privacy.SecureAggregation] = None
  seed: int = 0

  def __post_init__(self):
    tff_kd.rounds.arguments.check(vars(self), _parameters(Options))

  def count_clients(self, num_clients: Optional[int]) -> int:
    """Returns how many clients there are in all.

    Args:
      num_clients: As a user gives it; that of `client_data` if `None`.

    Raises:
      ValueError: If it is not known, or not that of `client_data`.
    """
    found = None if self.client_data is None else len(self.client_data.data.client_ids)
    if num_clients is None and found is None:
      raise ValueError(
          'This algorithm needs to know how many clients there are in all: pass '
          '`num_clients`, or `client_data`, which tells.'
      )
    if num_clients is not None and found not in (None, num_clients):
      raise ValueError(
          f'`num_clients` must be that of `client_data`, {found}, found {num_clients}. '
          'Leave it out.'
      )
    return found if num_clients is None else num_clients

  def with_defaults(self, **defaults: Any) -> 'Options':
    """Returns these options with an algorithm's values for those that are `None`.

    Args:
      **defaults: By option.
    """
    return dataclasses.replace(
        self,
        **{
            name: value
            for name, value in defaults.items() if getattr(self, name) is None
        },
    )


# The classes whose fields replace an argument of a builder, by the argument's name.
_SPELLED_OUT = {'training': ClientTraining, 'options': Options}
_EMPTY = inspect.Parameter.empty


def _parameters(kind: type) -> Mapping[str, inspect.Parameter]:
  return inspect.signature(kind).parameters


def takes_options(build: Callable[..., Any]) -> Callable[..., Any]:
  """Spells out what every algorithm takes as arguments of a builder, and checks them.

  Args:
    build: Keyword-only, with an argument `options: Options`, and perhaps another one,
      `training: ClientTraining`.

  Returns:
    The builder with the fields of `Options` and `ClientTraining` in place of `options`
    and `training`; `inspect.signature` and `help` show them, with their text.
  """
  signature = inspect.signature(build)
  kinds = {n: kind for n, kind in _SPELLED_OUT.items() if n in signature.parameters}
  parameters: dict[str, inspect.Parameter] = {}
  for name, parameter in signature.parameters.items():
    parameters.update(_parameters(kinds[name]) if name in kinds else {name: parameter})

  @functools.wraps(build)
  def with_options(**kwargs):
    for name in kwargs:
      if name not in parameters:
        hint = checks.did_you_mean(name, parameters)
        raise TypeError(
            f'{build.__name__}() has no argument {name!r}.{hint} Its arguments are '
            f'{", ".join(parameters)}.'
        )
    for name, parameter in parameters.items():
      if parameter.default is _EMPTY and name not in kwargs:
        raise TypeError(f'{build.__name__}() needs the argument {name!r}.')
    made = {}
    for argument, kind in kinds.items():
      names = [name for name in _parameters(kind) if name in kwargs]
      made[argument] = kind(**{name: kwargs.pop(name) for name in names})
    return build(**tff_kd.rounds.arguments.check(kwargs, parameters), **made)

  full = signature.replace(parameters=list(parameters.values()))
  setattr(with_options, '__signature__', full)  # noqa: B010 (no attribute for mypy)
  with_options.__doc__ = _with_docs_of(kinds, build.__doc__)
  return with_options


def _with_docs_of(kinds: Mapping[str, type], doc: Optional[str]) -> Optional[str]:
  """Replaces the items of a docstring that are spelled out by those of their classes."""
  if doc is None or Options.__doc__ is None:  # Python was started with -OO.
    return doc
  doc = inspect.cleandoc(doc)
  for name, kind in kinds.items():
    items = inspect.cleandoc(kind.__doc__).partition('Attributes:\n')[2].rstrip()
    doc = re.sub(rf'(?m)^  {name}: .*\n', lambda _: f'{items}\n', doc)
  return doc
