"""Splits a computation into stages: server, clients, server, and so on.

Each stage is a computation of its own, so the clients' ones can run in parts, each on a
worker that holds only its own clients: what a part sends up is the sum over its clients
(the accumulator of a `tff.federated_aggregate`), the parts' sums are merged, and what
a client needs in a later stage stays on its worker. Most rounds have one stage of the
clients; FedGen's has one for each step of its generator.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import enum
from typing import Any, Optional

from tff_kd.compat import tff

from tff_kd.simulation import contexts

_framework = tff.framework
_AGGREGATE = _framework.FEDERATED_AGGREGATE.uri
_CLIENT_WORK = {
    intrinsic.uri
    for intrinsic in (
        _framework.FEDERATED_MAP,
        _framework.FEDERATED_MAP_ALL_EQUAL,
        _framework.FEDERATED_EVAL_AT_CLIENTS,
    )
}
_SERVER_WORK = {
    intrinsic.uri
    for intrinsic in (
        _framework.FEDERATED_APPLY, _framework.FEDERATED_EVAL_AT_SERVER,
    )
}
# These only move or arrange values: every stage that needs them has its own copy.
_ARRANGEMENT = {
    intrinsic.uri
    for intrinsic in (
        _framework.FEDERATED_BROADCAST,
        _framework.FEDERATED_VALUE_AT_CLIENTS,
        _framework.FEDERATED_VALUE_AT_SERVER,
        _framework.FEDERATED_ZIP_AT_CLIENTS,
        _framework.FEDERATED_ZIP_AT_SERVER,
    )
}


class CannotSplitError(ValueError):
  """A computation is none of those that can be split."""


class Source(enum.Enum):
  """Where a stage's input comes from."""

  ARGUMENT = enum.auto()
  CONSTANT = enum.auto()
  SERVER = enum.auto()


@dataclasses.dataclass(frozen=True)
class Input:
  """One value that a stage is sent.

  Attributes:
    source: Where it comes from.
    type_spec: Its type.
    where: The indices that lead to it in the argument (`ARGUMENT`), the value itself
      (`CONSTANT`), or its name among what earlier stages on the server gave (`SERVER`).
  """

  source: Source
  type_spec: tff.Type
  where: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
  """A part of the computation, all on the server or all with the clients.

  Attributes:
    comp: Takes `<<inputs>, sums, held>`, returns `<<fetched>, kept>`.
    of_clients: Whether it is the clients'.
    inputs: What it is sent.
    sums: Names of the sums whose merged accumulators it is given.
    held: Names of what earlier stages of the same place kept.
    fetched: Names of what comes back: values on the server, accumulators of the
      clients' sums, and what each client gets as a result.
    kept: Names of the values that stay for later stages of the same place.
  """

  comp: tff.framework.ConcreteComputation
  of_clients: bool
  inputs: Sequence[Input]
  sums: Sequence[str]
  held: Sequence[str]
  fetched: Sequence[str]
  kept: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Plan:
  """A computation in stages.

  Attributes:
    stages: In the order in which they run.
    merges: For each sum over clients, by name, the computation that merges two of its
      accumulators.
    client_results: Names of the results that are a value for each client; with them
      whether it is the same one for all.
    result: A `tff.structure.Struct` of names, or one name.
    client_bytes: What one client gives to the sums and gets as results, in bytes, as
      far as types tell.
  """

  stages: Sequence[Stage]
  merges: Mapping[str, tff.framework.ConcreteComputation]
  client_results: Mapping[str, bool]
  result: Any
  client_bytes: int


def split(comp: tff.framework.ConcreteComputation) -> Plan:
  """Splits a computation.

  Args:
    comp: As TFF's native compiler returns it
      (`tff.backends.native.desugar_and_transform_to_native`): one list of calls, each
      of an intrinsic.

  Returns:
    The plan.

  Raises:
    CannotSplitError: If it uses an intrinsic that is not known here, or has another
      form; with the reason.
  """
  return _Splitter(comp).plan()


def _free_names(expr: tff.framework.ComputationBuildingBlock) -> Iterator[str]:
  """The names that an expression refers to and does not bind."""
  if isinstance(expr, _framework.Reference):
    yield expr.name
  elif isinstance(expr, _framework.Selection):
    yield from _free_names(expr.source)
  elif isinstance(expr, _framework.Struct):
    for element in expr:
      yield from _free_names(element)
  elif isinstance(expr, _framework.Call):
    yield from _free_names(expr.function)
    if expr.argument is not None:
      yield from _free_names(expr.argument)
  elif isinstance(expr, _framework.Lambda):
    yield from (n for n in _free_names(expr.result) if n != expr.parameter_name)
  elif isinstance(expr, _framework.Block):
    bound = set()
    for name, value in expr.locals:
      yield from (n for n in _free_names(value) if n not in bound)
      bound.add(name)
    yield from (n for n in _free_names(expr.result) if n not in bound)


def _substitute(expr, refs: Mapping[str, Any], depth: int = 0):
  """Replaces names by building blocks; a function's parameter gets a standard name."""
  if isinstance(expr, _framework.Reference):
    return refs.get(expr.name, expr)
  if isinstance(expr, _framework.Selection):
    source = _substitute(expr.source, refs, depth)
    if isinstance(source, _framework.Struct):
      return source[expr.as_index()]
    return _framework.Selection(source, index=expr.as_index())
  if isinstance(expr, _framework.Struct):
    return _framework.Struct([
        (name, _substitute(value, refs, depth))
        for name, value in tff.structure.iter_elements(expr)
    ])
  if isinstance(expr, _framework.Call):
    argument = expr.argument
    if argument is not None:
      argument = _substitute(argument, refs, depth)
    return _framework.Call(_substitute(expr.function, refs, depth), argument)
  if isinstance(expr, _framework.Lambda):
    if expr.parameter_name is None:
      return _framework.Lambda(None, None, _substitute(expr.result, refs, depth + 1))
    inner = _framework.Reference(f'x{depth}', expr.parameter_type)
    return _framework.Lambda(
        inner.name,
        expr.parameter_type,
        _substitute(expr.result, {**refs, expr.parameter_name: inner}, depth + 1),
    )
  if isinstance(expr, _framework.Block):
    refs = dict(refs)
    locals_ = []
    for i, (name, value) in enumerate(expr.locals):
      value = _substitute(value, refs, depth + 1)
      refs[name] = _framework.Reference(f'y{depth}_{i}', value.type_signature)
      locals_.append((refs[name].name, value))
    return _framework.Block(locals_, _substitute(expr.result, refs, depth + 1))
  return expr


def _uri(expr) -> Optional[str]:
  """Of the intrinsic that an expression calls."""
  if isinstance(expr, _framework.Call) and isinstance(
      expr.function, _framework.Intrinsic
  ):
    return expr.function.uri
  return None


def _selection(expr) -> Optional[tuple[str, tuple[int, ...]]]:
  """The name and the indices, if a step only selects from an earlier value."""
  if _uri(expr) not in _CLIENT_WORK | _SERVER_WORK or not isinstance(
      expr.argument, _framework.Struct
  ):
    return None
  fn, source = expr.argument
  if not isinstance(fn, _framework.Lambda) or not isinstance(
      source, _framework.Reference
  ):
    return None
  indices = []
  selected = fn.result
  while isinstance(selected, _framework.Selection):
    indices.insert(0, selected.as_index())
    selected = selected.source
  if (
      not isinstance(selected, _framework.Reference)
      or selected.name != fn.parameter_name
  ):
    return None
  return source.name, tuple(indices)


def _is_placed(type_spec: tff.Type) -> bool:
  return tff.types.contains(type_spec, lambda t: isinstance(t, tff.FederatedType))


def _clients_stage(ready: int) -> int:
  """The first stage of the clients in which something can be done."""
  return ready + 1 if ready % 2 == 0 else max(ready, 1)


def _part_sum(aggregate: tff.framework.Call) -> tff.framework.Call:
  """The accumulator of one part's clients: the sum without its report."""
  value, zero, accumulate, merge, _ = aggregate.argument
  type_spec = merge.type_signature.result
  report = _framework.Lambda('x', type_spec, _framework.Reference('x', type_spec))
  # The types that it takes, which may leave open lengths that those given have.
  types = list(aggregate.function.type_signature.parameter)
  types[-1] = report.type_signature
  return _framework.Call(
      _framework.Intrinsic(
          _AGGREGATE,
          tff.FunctionType(types, tff.FederatedType(type_spec, tff.SERVER)),
      ),
      _framework.Struct([value, zero, accumulate, merge, report]),
  )


def _reported(
    aggregate: tff.framework.Call, accumulator: tff.framework.Reference
) -> tff.framework.Call:
  """What a sum is, from the merged accumulator, which is placed nowhere yet."""
  type_spec = accumulator.type_signature
  at_server = tff.FederatedType(type_spec, tff.SERVER)
  value_at_server = _framework.Call(
      _framework.Intrinsic(
          _framework.FEDERATED_VALUE_AT_SERVER.uri,
          tff.FunctionType(type_spec, at_server),
      ),
      accumulator,
  )
  arguments = _framework.Struct([aggregate.argument[4], value_at_server])
  return _framework.Call(
      _framework.Intrinsic(
          _framework.FEDERATED_APPLY.uri,
          tff.FunctionType(arguments.type_signature, aggregate.type_signature),
      ),
      arguments,
  )


class _Splitter:
  """Gives each step of a computation its stage, then builds the stages.

  Stages have numbers: even ones are the server's, odd ones the clients'. Clients work as
  early as they can, so that a client does all that it can at once; the server as late as
  it can, so that what only the result needs is in the last stage.
  """

  def __init__(self, comp: tff.framework.ConcreteComputation):
    root = comp.to_building_block()
    if not isinstance(root, _framework.Lambda) or root.parameter_name is None:
      raise CannotSplitError('It takes no argument.')
    if not isinstance(root.result, _framework.Block):
      raise CannotSplitError('It is no list of calls.')
    # Names of what is in the argument: the indices that lead there, and the type.
    self.arguments: dict[str, tuple[tuple[int, ...], tff.Type]] = {}
    # The steps by name: what they are; if they do work, in which stage (a sum: where it
    # is reported); if they only select, from what; if they are a constant, which.
    self.steps: dict[str, Any] = {}
    self.stages: dict[str, int] = {}
    self.sources: dict[str, str] = {}
    self.constants: dict[str, Any] = {}
    # The stages in which clients add up, by the sum's name.
    self.sums: dict[str, int] = {}
    # What has to come back from a stage, and what has to stay for later ones.
    self.fetched: dict[int, dict[str, None]] = {}
    self.kept: dict[int, dict[str, None]] = {}
    self._comps: dict[bytes, tff.framework.ConcreteComputation] = {}

    refs = {root.parameter_name: self._argument(root.parameter_type, ())}
    # The stage from which on a value can be used.
    self._ready = {name: -1 for name in self.arguments}
    same: dict[Any, tff.framework.Reference] = {}
    for name, expr in root.result.locals:
      expr = _substitute(expr, refs)
      selection = _selection(expr)
      refs[name] = _framework.Reference(name, expr.type_signature)
      if selection is not None:
        # Each use has a selection of its own, also of the same.
        refs[name] = same.setdefault(selection, refs[name])
      if refs[name].name == name:
        self._add_step(name, expr)
    self._last = max([t for t in self._ready.values() if t % 2 == 0], default=0)
    self._result = _substitute(root.result.result, refs)

  def _argument(self, type_spec: tff.Type, path: tuple[int, ...]):
    if isinstance(type_spec, tff.StructType) and _is_placed(type_spec):
      return _framework.Struct([
          (name, self._argument(element, path + (i,)))
          for i, (name, element) in enumerate(tff.structure.iter_elements(type_spec))
      ])
    name = '/'.join(['argument', *map(str, path)])
    self.arguments[name] = (path, type_spec)
    return _framework.Reference(name, type_spec)

  def _add_step(self, name: str, expr) -> None:
    uri = _uri(expr)
    ready = max((self._ready[n] for n in _free_names(expr)), default=-1)
    self.steps[name] = expr
    self._ready[name] = ready
    selection = _selection(expr)
    if selection is not None:
      source, indices = selection
      self.sources[name] = source
      if uri in _SERVER_WORK and source in self.arguments:
        path, _ = self.arguments[source]
        self.arguments[name] = (path + indices, expr.type_signature)
      return
    if uri == _AGGREGATE:
      self.sums[name] = _clients_stage(ready)
      self.stages[name] = self._ready[name] = self.sums[name] + 1
    elif uri in _CLIENT_WORK:
      self.stages[name] = self._ready[name] = _clients_stage(ready)
    elif uri in _SERVER_WORK:
      self.stages[name] = self._ready[name] = max(ready, 0)
    elif uri in _ARRANGEMENT:
      if isinstance(expr.argument, _framework.Literal):
        self.constants[name] = expr.argument.value
    elif uri is not None:
      raise CannotSplitError(f'It uses {uri}.')
    elif _is_placed(expr.type_signature):
      raise CannotSplitError(f'It has a step that is no intrinsic: {name}.')

  def plan(self) -> Plan:
    """Builds the stages, from the last to the first: each asks earlier ones for more."""
    results = dict(self._result_types(self._result))
    self._settle(results)
    stages = []
    for number in range(max(self.fetched, default=-1), -1, -1):
      if number in self.fetched or number in self.kept:
        stages.insert(0, _StageBuilder(self, number).build())
    return Plan(
        stages=stages,
        merges={
            name: self.computation(self.steps[name].argument[3])
            for stage in stages
            if stage.of_clients
            for name in stage.fetched
            if name in self.sums
        },
        client_results={
            name: type_spec.all_equal
            for name, type_spec in results.items()
            if type_spec.placement is tff.CLIENTS
        },
        result=self._names(self._result),
        client_bytes=sum(
            contexts.num_bytes(type_spec)
            for type_spec in (
                *(self.steps[name].argument[0].type_signature for name in self.sums),
                *(t for t in results.values() if t.placement is tff.CLIENTS),
            )
        ),
    )

  def _result_types(self, result) -> Iterator[tuple[str, tff.FederatedType]]:
    if isinstance(result, _framework.Struct):
      for element in result:
        yield from self._result_types(element)
    elif isinstance(result, _framework.Reference) and isinstance(
        result.type_signature, tff.FederatedType
    ):
      yield result.name, result.type_signature
    else:
      raise CannotSplitError('It has a result that is placed nowhere.')

  def _names(self, result) -> Any:
    if isinstance(result, _framework.Struct):
      return tff.structure.Struct(
          (name, self._names(element))
          for name, element in tff.structure.iter_elements(result)
      )
    return result.name

  def _settle(self, results: Mapping[str, tff.FederatedType]) -> None:
    """Moves the server's work to where it is first needed; asks for the results."""
    needed: dict[str, int] = {}

    def need(names: Iterable[str], stage: int) -> None:
      for name in self._work_in(names):
        needed[name] = min(needed.get(name, stage), stage)

    of_clients = {
        name: _clients_stage(self._ready[name])
        for name, type_spec in results.items()
        if type_spec.placement is tff.CLIENTS
    }
    for name in results:
      need([name], of_clients[name] - 1 if name in of_clients else self._last)
    for name, expr in reversed(self.steps.items()):
      if name in self.sums:
        self.stages[name] = needed.get(name, self._last)
        need(_free_names(expr), self.sums[name] - 1)
      elif name in self.stages and self.stages[name] % 2:
        need(_free_names(expr), self.stages[name] - 1)
      elif name in self.stages:
        self.stages[name] = needed.get(name, self._last)
        need(_free_names(expr), self.stages[name])
    for name in results:
      # What a single step gives is fetched where it is made.
      made = self.stages.get(self.root(name), self._last)
      self.fetched.setdefault(of_clients.get(name, made), {})[name] = None

  def _work_in(self, names: Iterable[str]) -> set[str]:
    """The steps of work from which values are arranged."""
    found, seen, left = set(), set(), list(names)
    while left:
      name = left.pop()
      if name in seen or name in self.arguments:
        continue
      seen.add(name)
      if name in self.stages:
        found.add(name)
      else:
        left.extend(_free_names(self.steps[name]))
    return found

  def root(self, name: str) -> str:
    """What a step selects from; itself if it does not."""
    while name in self.sources:
      name = self.sources[name]
    return name

  def computation(self, expr) -> tff.framework.ConcreteComputation:
    """The same object for the same building block: a worker is sent it once."""
    key = expr.proto.SerializeToString(deterministic=True)
    if key not in self._comps:
      self._comps[key] = tff.framework.ConcreteComputation(
          computation_proto=expr.proto,
          context_stack=tff.framework.get_context_stack(),
      )
    return self._comps[key]


class _StageBuilder:
  """Copies into one stage what its outputs need; names the rest as its inputs."""

  def __init__(self, splitter: _Splitter, number: int):
    self._splitter = splitter
    self._number = number
    self._of_clients = bool(number % 2)
    self._inputs: dict[str, Input] = {}
    self._sums: dict[str, tff.Type] = {}
    self._held: dict[str, tff.Type] = {}
    # By name in the computation, under which name and type it is in the stage. Names
    # are given in order: stages that do the same are then the same computation.
    self._refs: dict[str, tff.framework.Reference] = {}
    self._locals: list[tuple[str, Any]] = []

  def build(self) -> Stage:
    """Builds the stage."""
    splitter = self._splitter
    fetched = list(splitter.fetched.get(self._number, ()))
    kept = list(splitter.kept.get(self._number, ()))
    outputs = [self._output(name) for name in fetched + kept]
    there = [f'merged {name}' for name in self._sums] + list(self._held)
    argument = _framework.Reference(
        'argument',
        tff.StructType([
            tff.StructType([its.type_spec for its in self._inputs.values()]),
            *(self._refs[name].type_signature for name in there),
        ]),
    )
    sent = _framework.Selection(argument, index=0)
    given = [
        (self._refs[name].name, _framework.Selection(sent, index=i))
        for i, name in enumerate(self._inputs)
    ] + [
        (self._refs[name].name, _framework.Selection(argument, index=i))
        for i, name in enumerate(there, 1)
    ]
    result = _framework.Struct(
        [_framework.Struct(outputs[: len(fetched)]), *outputs[len(fetched) :]]
    )
    return Stage(
        comp=splitter.computation(
            _framework.Lambda(
                argument.name,
                argument.type_signature,
                _framework.Block(given + self._locals, result),
            )
        ),
        of_clients=self._of_clients,
        inputs=list(self._inputs.values()),
        sums=list(self._sums),
        held=list(self._held),
        fetched=fetched,
        kept=kept,
    )

  def _output(self, name: str) -> tff.framework.Reference:
    if self._of_clients and name in self._splitter.sums:
      aggregate = self._splitter.steps[name]
      for needed in _free_names(aggregate):
        self._add(needed)
      name = f'sum {name}'
      self._add_local(name, _substitute(_part_sum(aggregate), self._refs))
    else:
      self._add(name)
    return self._refs[name]

  def _add(self, name: str) -> None:
    """Makes a value known in this stage."""
    splitter = self._splitter
    if name in self._refs:
      return
    if name in splitter.arguments:
      path, type_spec = splitter.arguments[name]
      self._add_input(name, Input(Source.ARGUMENT, type_spec, path))
      return
    expr = splitter.steps[name]
    made = splitter.stages.get(splitter.root(name), self._number)
    if name in splitter.constants:
      self._add_input(
          name, Input(Source.CONSTANT, expr.type_signature, splitter.constants[name])
      )
    elif made != self._number and made % 2 == self._number % 2:
      splitter.kept.setdefault(made, {})[name] = None
      self._held[name] = expr.type_signature
      self._new_ref(name, expr.type_signature)
    elif made != self._number:
      splitter.fetched.setdefault(made, {})[name] = None
      self._add_input(name, Input(Source.SERVER, expr.type_signature, name))
    elif name in splitter.sums:
      splitter.fetched.setdefault(splitter.sums[name], {})[name] = None
      self._sums[name] = expr.argument[3].type_signature.result
      self._new_ref(f'merged {name}', self._sums[name])
      self._add_local(name, _reported(expr, self._refs[f'merged {name}']))
    else:
      for needed in _free_names(expr):
        self._add(needed)
      self._add_local(name, _substitute(expr, self._refs))

  def _add_input(self, name: str, its: Input) -> None:
    self._inputs[name] = its
    self._new_ref(name, its.type_spec)

  def _add_local(self, name: str, expr) -> None:
    self._locals.append((self._new_ref(name, expr.type_signature), expr))

  def _new_ref(self, name: str, type_spec: tff.Type) -> str:
    self._refs[name] = _framework.Reference(f'v{len(self._refs)}', type_spec)
    return self._refs[name].name

