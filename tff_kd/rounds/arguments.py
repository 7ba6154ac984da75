"""Checks of the arguments of builders, before anything is built.

A model costs seconds to build and to trace, so a wrong argument is refused before that.
An array of inputs, or a dataset, is taken as a transfer set.
"""

from collections.abc import Callable, Mapping
import functools
import inspect
from typing import Any

from tff_kd.compat import tff

from tff_kd import checks
from tff_kd.client import companions
from tff_kd.client import conditions
from tff_kd.client import local_terms
from tff_kd.data import client_data
from tff_kd.data import transfer
from tff_kd import knowledge
from tff_kd.knowledge import alignment
from tff_kd import models
from tff_kd import optimizers
from tff_kd.privacy import differential
from tff_kd.privacy import secure
from tff_kd.server import settings


def check(
    arguments: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]
) -> dict[str, Any]:
  """Checks what is passed to a builder, by the arguments' names.

  Args:
    arguments: By name. `None` passes where the parameter is annotated as `Optional`.
    parameters: The builder's.

  Returns:
    The arguments for the builder.

  Raises:
    TypeError, ValueError: Naming the argument, what was expected, what was found, and
      what to pass.
  """
  return {
      name: value
      if name not in _CHECKS or (value is None and _may_be_none(parameters[name]))
      else _CHECKS[name](value, name)
      for name, value in arguments.items()
  }


def _may_be_none(parameter: inspect.Parameter) -> bool:
  return parameter.default is None or 'Optional' in str(parameter.annotation)


def _instance(kind: Any, expected: str) -> Callable[[Any, str], Any]:
  """A check for an object of a class, or of one of several."""

  def check(value: Any, name: str) -> Any:
    if not isinstance(value, kind):
      raise TypeError(f'`{name}` must be {expected}, found {value!r}.')
    return value

  return check


def _function(expected: str) -> Callable[[Any, str], Any]:
  """A check for a function with arguments."""

  def check(value: Any, name: str) -> Any:
    if not callable(value):
      raise TypeError(f'`{name}` must be a function {expected}, found {value!r}.')
    return value

  return check


def _model_fn(value: Any, name: str) -> Any:
  models.check_model_fn(value, name.removesuffix('_fn'))
  return value


def _student_fn(value: Any, name: str) -> Any:
  builders = value if isinstance(value, (list, tuple)) else [value]
  for builder in builders:
    _model_fn(builder, name)
  return value


def _input_spec(value: Any, name: str) -> Any:
  del name
  models.check_input_spec(value)
  return value


def _local_terms(value: Any, name: str) -> Any:
  terms = value if isinstance(value, (list, tuple)) else [value]
  wrong = [term for term in terms if not isinstance(term, local_terms.LocalTerm)]
  if terms is not value or wrong:
    raise TypeError(
        f'`{name}` must be a list of `tff_kd.client.local_terms.LocalTerm`s, found '
        f'{value!r}. Pass, for example, `{name}=[tff_kd.ProximalTerm(weight=0.01)]`.'
    )
  return value


def _start(value: Any, name: str) -> Any:
  if value not in ('average', 'distilled'):
    raise ValueError(
        f"`{name}` must be 'distilled', 'average' or None, found {value!r}."
    )
  return value


_distillation = _instance(
    settings.Distillation,
    'a `tff_kd.Distillation`, such as `tff_kd.Distillation(num_steps=60)`',
)
_aggregator = _instance(
    (
        tff.aggregators.WeightedAggregationFactory,
        tff.aggregators.UnweightedAggregationFactory,
    ),
    'a `tff.aggregators.WeightedAggregationFactory` or `UnweightedAggregationFactory`, '
    'such as `tff.aggregators.MeanFactory()`',
)
_weighting = _instance(
    tff.learning.ClientWeighting,
    '`tff.learning.ClientWeighting.NUM_EXAMPLES` or `.UNIFORM`',
)

# By the name of the argument: (value, name) -> what the builder gets.
_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    'student_fn': _student_fn,
    'teacher_fn': _model_fn,
    'mentor_fn': _model_fn,
    'generator_fn': _model_fn,
    'input_spec': _input_spec,
    'loss_fn': models.check_loss_fn,
    'metrics_fn': models.check_metrics_fn,
    'client_optimizer': optimizers.check_optimizer,
    'server_optimizer': optimizers.check_optimizer,
    'student_optimizer': optimizers.check_optimizer,
    'teacher_optimizer': optimizers.check_optimizer,
    'digest_optimizer': optimizers.check_optimizer,
    'generator_optimizer': optimizers.check_optimizer,
    'learning_rate_fn': _function(
        "from a round's number, from 0, to a learning rate; a constant one belongs to "
        'the optimizer'
    ),
    'client_data': _instance(
        client_data.ClientBatches,
        'a `tff_kd.ClientBatches`, which says how clients read a '
        '`tff_kd.FileClientData`',
    ),
    'distillation': _distillation,
    'back_distillation': _distillation,
    'consensus_rule': _instance(
        knowledge.ConsensusRule,
        'a `tff_kd.knowledge.ConsensusRule`, such as `tff_kd.knowledge.MeanLogits()`',
    ),
    'clients_start_from': _start,
    'prior': lambda value, name: alignment.checked_prior(value),
    'local_terms': _local_terms,
    'companion': _instance(
        companions.Companion, 'a `tff_kd.client.companions.Companion`'
    ),
    'model_aggregator': _aggregator,
    'knowledge_aggregator': _aggregator,
    'metrics_aggregator': _function(
        'such as `tff.learning.metrics.sum_then_finalize`'
    ),
    'reporting': _instance(
        conditions.Reporting, 'a `tff_kd.Reporting`, such as `tff_kd.Reporting()`'
    ),
    'privacy': _instance(
        differential.DifferentialPrivacy, 'a `tff_kd.privacy.DifferentialPrivacy`'
    ),
    'secure_aggregation': _instance(
        secure.SecureAggregation,
        'a `tff_kd.privacy.SecureAggregation`, such as '
        '`tff_kd.privacy.SecureAggregation()`',
    ),
    'client_weighting': _weighting,
    'knowledge_weighting': _weighting,
    'num_clients': checks.check_positive_integer,
    'feature_fn': _function('from inputs to features `[n, d]`'),
    # Last: these may be large, and go to files.
    'transfer_set': transfer.as_transfer_set,
    'negatives': functools.partial(transfer.as_transfer_set, has_labels=False),
    'calibrate_on': functools.partial(transfer.as_transfer_set, has_labels=False),
}
