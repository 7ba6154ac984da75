"""The contexts in which TFF's computations run: whole, or over parts of the cohort."""

import math
from typing import Any, Optional

from absl import logging
import cachetools
import numpy as np
from tff_kd.compat import tff

# What the clients' values of one part may take in the worker.
PART_BYTES = 256 * 2**20
_MIN_PART_CLIENTS = 16
# The worker holds so many copies of each client's value until all are summed.
_COPIES = 2
_MAX_FORMS = 32
_STOP_TIMEOUT_S = 5.0


def compile_computation(comp: tff.Computation) -> tff.Computation:
  """Compiles a computation for TFF's workers."""
  return tff.backends.native.desugar_and_transform_to_native(
      sum_in_the_clear(comp)
  )


def sum_in_the_clear(comp: tff.Computation) -> tff.Computation:
  """Replaces secure sums, for which workers have no protocol, by the plain ones."""
  proto = tff.framework.serialize_computation(comp)
  # Looking for them takes a hundredth of the time.
  if b'federated_secure' not in proto.SerializeToString():
    return comp
  return tff.backends.test.replace_secure_intrinsics_with_bodies(comp)


class CohortContext(tff.framework.SyncExecutionContext):
  """Runs large cohorts part by part, so that memory does not grow with them.

  TFF's runtime holds what clients return until all of them have returned. Where that
  would be much, and what clients send is only ever summed (`tff.framework.
  MergeableCompForm`), the clients of a part are summed before the next part starts.
  """

  def __init__(
      self,
      executor_factory: tff.framework.ExecutorFactory,
      *,
      part_bytes: int = PART_BYTES,
      **context_args,
  ):
    """Initializes the context.

    Args:
      executor_factory: Makes the executors.
      part_bytes: What the clients' values of one part may take; a part is never
        fewer than 16 clients.
      **context_args: As `tff.framework.AsyncExecutionContext` has them, for all
        computations.
    """
    super().__init__(executor_factory, **context_args)
    self._part_bytes = part_bytes
    self._async = tff.framework.AsyncExecutionContext(
        executor_factory, **context_args
    )
    # By identity; with the computation, so that it is not given to another.
    self._forms = cachetools.LRUCache(_MAX_FORMS)
    self._in_parts = cachetools.LRUCache(_MAX_FORMS)

  def invoke(self, comp: tff.Computation, arg: Any) -> Any:
    """Runs a computation, in parts if its cohort is large."""
    cohort = num_clients(arg, comp.type_signature.parameter)
    if cohort > _MIN_PART_CLIENTS:
      # What clients send is unknown yet, but seldom more than what they receive.
      likely = num_bytes(comp.type_signature.parameter)
      if cohort > part_size(likely, self._part_bytes):
        form = self._mergeable_form(comp)
        if form is not None:
          sent = num_bytes(form.up_to_merge.type_signature.result)
          num_parts = math.ceil(cohort / part_size(sent, self._part_bytes))
          if num_parts > 1:
            return self._context_of(num_parts).invoke(form, arg)
    return super().invoke(comp, arg)

  def _mergeable_form(
      self, comp: tff.Computation
  ) -> Optional[tff.framework.MergeableCompForm]:
    """The computation in three parts; `None` if it is not one sum, said once."""
    if id(comp) not in self._forms:
      try:
        if tff.types.contains(comp.type_signature.result, _is_of_clients):
          # In parts, clients would do their work again for their own results.
          raise ValueError('It leaves each client a value of its own.')
        form = tff.backends.native.compile_to_mergeable_comp_form(
            sum_in_the_clear(comp)
        )
      except (TypeError, ValueError) as error:
        form = None
        logging.warning(
            "What a round's clients leave is held at once, because it is not one sum: "
            '%s', str(error).splitlines()[0],
        )
      self._forms[id(comp)] = (comp, form)
    return self._forms[id(comp)][1]

  def _context_of(
      self, num_parts: int
  ) -> tff.framework.MergeableCompExecutionContext:
    if num_parts not in self._in_parts:
      self._in_parts[num_parts] = tff.framework.MergeableCompExecutionContext(
          [self._async], num_subrounds=num_parts
      )
    return self._in_parts[num_parts]

  def close(self) -> None:
    """Ends its threads."""
    for context in (self, *self._in_parts.values()):
      end_thread(context)


def end_thread(context: Any) -> None:
  """Ends the thread of one of TFF's synchronous contexts.

  TFF means to end it when the context is collected, which it never is: the running
  thread refers to it.

  Args:
    context: A `tff.framework.SyncExecutionContext` or `MergeableCompExecutionContext`
      with no computation running, or none that will end.
  """
  # pylint: disable=protected-access
  loop = context._async_runner._event_loop
  thread = context._async_runner._thread
  # pylint: enable=protected-access
  loop.call_soon_threadsafe(loop.stop)
  thread.join(_STOP_TIMEOUT_S)


def part_size(client_bytes: int, part_bytes: int) -> int:
  """How many clients are in one part.

  Args:
    client_bytes: What each of them returns, in bytes.
    part_bytes: What all of them may take.
  """
  fitting = part_bytes // max(1, _COPIES * client_bytes)
  return max(_MIN_PART_CLIENTS, fitting)


def held_bytes(client_bytes: int, cohort: int, part_bytes: int = PART_BYTES) -> int:
  """What a worker holds of a round's clients at most.

  Args:
    client_bytes: What each of them returns, in bytes.
    cohort: How many there are.
    part_bytes: What those of one part may take.
  """
  return _COPIES * client_bytes * min(cohort, part_size(client_bytes, part_bytes))


def num_clients(value: Any, type_spec: Optional[tff.Type]) -> int:
  """The number of clients of an argument, 0 if it holds no client's value."""
  if isinstance(type_spec, tff.FederatedType):
    if type_spec.placement is tff.CLIENTS and isinstance(value, (list, tuple)):
      return len(value)
  elif isinstance(type_spec, tff.StructType):
    elements = tff.structure.from_container(value)
    return max(
        (num_clients(v, t) for v, t in zip(elements, type_spec)), default=0
    )
  return 0


def _is_of_clients(type_spec: tff.Type) -> bool:
  return (
      isinstance(type_spec, tff.FederatedType)
      and type_spec.placement is tff.CLIENTS
      and not type_spec.all_equal
  )


def num_bytes(type_spec: tff.Type) -> int:
  """The bytes of all tensors of known shape in a type, one client's of each."""
  if isinstance(type_spec, tff.TensorType):
    shape = [d or 0 for d in type_spec.shape or ()]
    return math.prod(shape) * np.dtype(type_spec.dtype).itemsize
  if isinstance(type_spec, tff.FederatedType):
    return num_bytes(type_spec.member)
  if isinstance(type_spec, tff.StructType):
    return sum(num_bytes(t) for t in type_spec)
  return 0
