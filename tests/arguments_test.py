"""Every builder refuses wrong arguments in a sentence, before it builds a model."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from tff_kd.compat import tff

from tests import helpers
import tff_kd
from tff_kd import algorithms
from tff_kd import knowledge

_X, _Y = helpers.examples(8, 0)
_OPTIMIZERS = (
    'adam', ['adam'], 0.1, keras.optimizers.SGD(), keras.losses.MeanSquaredError(),
    lambda rate: keras.optimizers.SGD(rate), tff.learning.optimizers.build_adam,
)
_MODELS = ('cnn', 3, lambda units: None, keras.layers.Dense(3))
_DISTILLATIONS = ('teacher', 0.5, [tff_kd.Distillation()], tff_kd.Distillation)
_WEIGHTINGS = ('uniform', 1, tff.learning.ClientWeighting)
# By argument: what is wrong, and what a sentence says of it.
_WRONG = {
    'student_fn': (_MODELS, r'The student must be a function.*Wrap'),
    'teacher_fn': (_MODELS, r'The teacher must be a function.*Wrap'),
    'mentor_fn': (_MODELS, r'The mentor must be a function.*Wrap'),
    'generator_fn': (_MODELS, r'The generator must be a function.*Wrap'),
    'input_spec': (
        (helpers.dataset(_X, _Y), 'images', tf.TensorSpec([None, 5])),
        r'`input_spec` must describe batches as a pair.*element_spec',
    ),
    'loss_fn': (
        (
            'mse', ['mse'], keras.losses.MeanSquaredError(),
            keras.losses.mean_squared_error, None,
        ),
        r'`loss_fn` must be a function without arguments.*lambda: keras.losses',
    ),
    'metrics_fn': (
        (
            'accuracy', ['accuracy'], [keras.metrics.AUC()], keras.metrics.AUC(),
            keras.metrics.binary_accuracy,
        ),
        r'`metrics_fn` must be a function without arguments.*lambda: \[keras.metrics',
    ),
    'client_optimizer': (
        (*_OPTIMIZERS, None), r'`client_optimizer` must be a.*(build_sgdm|lambda)'
    ),
    **{
        name: (_OPTIMIZERS, rf'`{name}` must be a.*(build_sgdm|lambda)')
        for name in (
            'server_optimizer', 'student_optimizer', 'teacher_optimizer',
            'digest_optimizer', 'generator_optimizer',
        )
    },
    'learning_rate_fn': ((0.1, 'cosine'), r'`learning_rate_fn` must be a function'),
    'client_data': (
        ([helpers.dataset(_X, _Y)], _X), r'`client_data` must be a `tff_kd.ClientBatches`'
    ),
    'distillation': (_DISTILLATIONS, r'`distillation` must be a.*Distillation\(num_ste'),
    'back_distillation': (_DISTILLATIONS, r'`back_distillation` must be a.*Distillation'),
    'consensus_rule': (
        ('mean', knowledge.MeanLogits, None),
        r'`consensus_rule` must be a.*MeanLogits\(\)`, found',
    ),
    'prior': (('even', [0.5, 0.6], 3.0), r'`prior` must be .*uniform|probabilities'),
    'calibrate_on': (('mnist', 1), r'`calibrate_on` must be a `tff_kd.TransferSet`'),
    'clients_start_from': (
        ('teacher', 1, True), r"`clients_start_from` must be 'distilled', 'average'"
    ),
    'local_terms': (
        (tff_kd.ProximalTerm(), 'proximal', [tff_kd.ProximalTerm]),
        r'`local_terms` must be a list of.*`local_terms=\[tff_kd.ProximalTerm',
    ),
    'client_weighting': (_WEIGHTINGS, r'`client_weighting` must be.*NUM_EXAMPLES` or'),
    'knowledge_weighting': (_WEIGHTINGS, r'`knowledge_weighting` must be.*NUM_EXAMPLES'),
    **{
        name: (
            ('mean', 1, tff.aggregators.MeanFactory),
            rf'`{name}` must be a `tff.aggregators.Weighted',
        )
        for name in ('model_aggregator', 'knowledge_aggregator')
    },
    'metrics_aggregator': (('sum', 1), r'`metrics_aggregator` must be a function'),
    'companion': (
        ('fml', tff_kd.client.companions.Companion), r'`companion` must be a `tff_kd'
    ),
    'reporting': ((3, tff_kd.Reporting), r'`reporting` must be a `tff_kd.Reporting`'),
    'privacy': ((1.0, 'dp'), r'`privacy` must be a `tff_kd.privacy.DifferentialPriv'),
    'secure_aggregation': (
        (True, 'sum'), r'`secure_aggregation` must be a `tff_kd'
    ),
    'num_clients': ((0, 2.0, True), r'`num_clients` must be a positive integer'),
    'feature_fn': (('flat', 1), r'`feature_fn` must be a function from inputs to feat'),
    'transfer_set': (
        ((_X, _Y), [_X], 'mnist', None),
        r'`transfer_set` must be a `tff_kd.TransferSet`, an array .*found (tuple|list|st'
        r'r|NoneType)\. With labels',
    ),
    'negatives': (('mnist', None), r'`negatives` must be a `tff_kd.TransferSet`'),
}


class _ModelWasBuilt(Exception):
  pass


def _never():
  raise _ModelWasBuilt


def _names(name):
  """The arguments that a builder takes, of those in the table."""
  build = algorithms.REGISTRY[name].build
  return set(_WRONG) & set(inspect.signature(build).parameters)


def _arguments(name, **kwargs):
  """Right ones, whose models are never to be built."""
  parts = dict(
      transfer_set=_X, negatives=_X, teacher_fn=_never, mentor_fn=_never,
      num_clients=4,
  )
  build = algorithms.REGISTRY[name].build
  taken = {k: v for k, v in parts.items() if k in inspect.signature(build).parameters}
  return {**helpers.common(student_fn=_never), **taken, **kwargs}


def test_the_table_has_every_argument_of_a_kind():
  """What a builder takes and is not in the table is a number, a name or a text."""
  for name, algorithm in algorithms.REGISTRY.items():
    for parameter in inspect.signature(algorithm.build).parameters.values():
      if parameter.name in _WRONG:
        continue
      assert isinstance(parameter.default, (int, float)) or (
          parameter.name == 'split_layer'
      ), (name, parameter.name)


@pytest.mark.parametrize('name', algorithms.REGISTRY)
def test_wrong_arguments_are_refused_before_a_model_is_built(name):
  build = algorithms.REGISTRY[name].build
  names = _names(name)
  assert {'loss_fn', 'metrics_fn', 'client_optimizer', 'student_fn'} <= names
  for argument in sorted(names):
    values, message = _WRONG[argument]
    default = inspect.signature(build).parameters[argument].default
    for value in values:
      if value is None and default is None:
        continue
      with pytest.raises((TypeError, ValueError), match=f'(?s){message}'):
        build(**_arguments(name, **{argument: value}))


@pytest.mark.parametrize('name', algorithms.REGISTRY)
def test_right_arguments_come_to_the_model(name):
  build = algorithms.REGISTRY[name].build
  pairs = tf.data.Dataset.from_tensor_slices((_X, _Y))
  for public in (
      _X, tf.constant(_X), pairs, pairs.map(lambda x, y: x), tff_kd.TransferSet(_X, _Y)
  ):
    given = {
        argument: public
        for argument in ('transfer_set', 'negatives') if argument in _names(name)
    }
    with pytest.raises(_ModelWasBuilt):
      build(**_arguments(name, **given))
    if not given:
      break


def test_what_functions_return_is_checked_before_a_model_is_built():
  for kwargs, message in (
      (dict(loss_fn=lambda: 'mse'), r"`loss_fn` must return a .*found 'mse'.*Pass"),
      (dict(metrics_fn=keras.metrics.AUC), '`metrics_fn` must return a list.*found <AUC'),
      (dict(metrics_fn=lambda: ['accuracy']), r"must return a list.*\['accuracy'\]"),
      (dict(metrics_fn=lambda: 'accuracy'), r"must return a list.*'accuracy'"),
      (dict(metrics_fn=lambda: None), 'must return a list.*None'),
      (dict(metrics_fn=lambda: 2 * [keras.metrics.AUC(name='a')]), "named 'a', which"),
      (dict(client_optimizer=lambda: 'adam'), r"`client_optimizer` must be.*'adam'"),
  ):
    with pytest.raises((TypeError, ValueError), match=f'(?s){message}'):
      algorithms.build_fed_avg(**_arguments('fed_avg', **kwargs))


def test_an_array_serves_where_clients_keep_their_models():
  process = helpers.build('fed_md', transfer_set=_X)
  assert isinstance(process.transfer_set, tff_kd.TransferSet)
  np.testing.assert_array_equal(process.transfer_set.gather_inputs(tf.range(8)), _X)
