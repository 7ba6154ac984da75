"""The options of every algorithm; imports no TensorFlow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
import inspect
import re
from typing import Any, Optional

import tff_kd
from tff_kd import checks


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
      clients. Unweighted factories get no weights. Only where weights are averaged.
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
    tff_kd.rounds.arguments.check(vars(self), _OPTION_PARAMETERS)

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


_OPTION_PARAMETERS = inspect.signature(Options).parameters
_EMPTY = inspect.Parameter.empty


def takes_options(build: Callable[..., Any]) -> Callable[..., Any]:
  """Spells the fields of `Options` out as arguments of a builder, and checks them.

  Args:
    build: Keyword-only, with an argument `options: Options`.

  Returns:
    The builder with the fields of `Options` in place of `options`; `inspect.signature`
    and `help` show them, with the text of `Options`.
  """
  signature = inspect.signature(build)
  own = {
      name: parameter
      for name, parameter in signature.parameters.items() if name != 'options'
  }
  full = signature.replace(parameters=[*own.values(), *_OPTION_PARAMETERS.values()])
  names = list(full.parameters)

  @functools.wraps(build)
  def with_options(**kwargs):
    for name in kwargs:
      if name not in names:
        hint = checks.did_you_mean(name, names)
        raise TypeError(
            f'{build.__name__}() has no argument {name!r}.{hint} Its arguments are '
            f'{", ".join(names)}.'
        )
    missing = [n for n, p in own.items() if p.default is _EMPTY and n not in kwargs]
    if missing:
      raise TypeError(f'{build.__name__}() needs the argument {missing[0]!r}.')
    chosen = {name: kwargs.pop(name) for name in _OPTION_PARAMETERS if name in kwargs}
    options = Options(**chosen)
    return build(**tff_kd.rounds.arguments.check(kwargs, own), options=options)

  setattr(with_options, '__signature__', full)  # noqa: B010 (no attribute for mypy)
  with_options.__doc__ = _with_option_docs(build.__doc__)
  return with_options


def _with_option_docs(doc: Optional[str]) -> Optional[str]:
  """Replaces the item `options` of a docstring by the attributes of `Options`."""
  if doc is None or Options.__doc__ is None:  # Python was started with -OO.
    return doc
  attributes = inspect.cleandoc(Options.__doc__).partition('Attributes:\n')[2]
  items = f'{attributes.rstrip()}\n'
  return re.sub(r'(?m)^  options: .*\n', lambda _: items, inspect.cleandoc(doc))
