"""Algorithms: each `build_*` function chooses and composes stages."""

import ast
import functools
import pathlib
from typing import Any, Callable, NamedTuple

from tff_kd import _lazy


class Algorithm(NamedTuple):
  """A row of the registry.

  Attributes:
    name: That of its module here, and of its `build_*` function.
    summary: One line for a list of algorithms.
    up: What a client sends.
    needs: What must be there, beside clients and a student.
  """

  name: str
  summary: str
  up: str
  needs: tuple[str, ...] = ()

  @property
  def averages(self) -> bool:
    """Whether the student's weights go up and are averaged."""
    return self.up.startswith('weights')

  @property
  def build(self) -> Callable[..., Any]:
    """Its `build_*` function."""
    return __getattr__(f'build_{self.name}')

  def takes(self, parameter: str) -> bool:
    """Whether the builder names this parameter, beyond those all have."""
    return parameter in _parameters(self.name)


@functools.cache
def _parameters(name: str) -> frozenset[str]:
  """Those of a builder, read off its source: its import would take TensorFlow's time."""
  source = pathlib.Path(__file__).with_name(f'{name}.py').read_text('utf-8')
  (build,) = (
      node for node in ast.parse(source).body
      if isinstance(node, ast.FunctionDef) and node.name == f'build_{name}'
  )
  its = build.args
  return frozenset(arg.arg for arg in (*its.posonlyargs, *its.args, *its.kwonlyargs))


# A new algorithm is one file and one line.
REGISTRY = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm(
            'fed_avg', 'weighted averaging of the student (FedAvg, FedOpt)', 'weights'
        ),
        Algorithm(
            'fed_prox', 'averaging; clients stay near the global student', 'weights'
        ),
        Algorithm(
            'fed_ntd',
            'averaging; clients keep what the global student says of other classes',
            'weights',
        ),
        Algorithm(
            'fed_gkd', 'averaging; clients learn from past global students', 'weights'
        ),
        Algorithm(
            'fed_df',
            "the student learns from the clients' ensemble",
            'weights and predictions',
            needs=('transfer set',),
        ),
        Algorithm(
            'fed_et',
            "a large server model learns from the clients' certainty-weighted ensemble",
            'weights and predictions',
            needs=('transfer set', 'teacher'),
        ),
        Algorithm(
            'fed_gen',
            'averaging; a generator of features carries what all clients know',
            'weights, label counts, gradients by generated features',
            needs=('layer to split at',),
        ),
        Algorithm(
            'fml',
            "averaging; clients' private mentors and the student teach each other",
            'weights',
            needs=('mentor', 'client state'),
        ),
        Algorithm(
            'fed_kd',
            'as fml, adaptive; updates travel as truncated decompositions',
            'weights of low rank',
            needs=('mentor', 'client state'),
        ),
        Algorithm(
            'fed_aux',
            "fed_df, each client's predictions weighted by how much the example looks "
            'like its own, under differential privacy',
            'weights and predictions',
            needs=('transfer set', 'negatives', 'client state'),
        ),
        Algorithm(
            'fd',
            "clients keep their models and exchange each class's mean logits",
            'logits by class',
            needs=('client state',),
        ),
        Algorithm(
            'fed_md',
            'clients keep their models and learn from the mean of all predictions',
            'predictions',
            needs=('transfer set', 'client state'),
        ),
        Algorithm(
            'ds_fl',
            "clients keep their models; a sharpened consensus teaches them and the "
            "server's",
            'predictions',
            needs=('transfer set', 'client state'),
        ),
        Algorithm(
            'cfd',
            "clients begin anew each round and learn the server's labels; labels of a "
            'few bits',
            'quantised predictions',
            needs=('transfer set', 'client state'),
        ),
        Algorithm(
            'fed_distillation',
            'the fusion: ensemble to teacher, teacher back to student',
            'weights and predictions',
            needs=('transfer set', 'teacher'),
        ),
    )
}

__getattr__, __dir__ = _lazy.attach(
    __name__, {f'build_{name}': name for name in REGISTRY} | {n: n for n in REGISTRY}
)
