"""What every algorithm of the registry keeps to: one table, in which no cell is empty.

Each algorithm is built once: two cohorts with architectures of their own, examples with
weights, and reports that may be too few. All cells are rounds of that one process, but
for secure sums: they take as long to build as the rest, and have a process of their own.
Where a builder refuses one of these, `_REFUSED` has its reason, and a test holds that it
does refuse.
"""

import pathlib
import tempfile

import keras
import numpy as np
import pytest
from tff_kd.compat import tff

from tests import helpers
import tff_kd
from tff_kd import algorithms
from tff_kd import communication
from tff_kd import privacy
from tff_kd.simulation import checkpoints

_NAMES = sorted(algorithms.REGISTRY)
# These are composed as others (after the colon), with other terms, weights or models:
# their cells are in `make slow`.
_LIKE_ANOTHER = {
    'cfd': 'ds_fl', 'fed_df': 'fed_distillation', 'fed_dyn': 'scaffold',
    'fed_et': 'fed_distillation', 'fed_md': 'ds_fl', 'fed_ntd': 'fed_gkd',
    'fed_prox': 'fed_gkd', 'fml': 'fed_kd', 'lg_fed_avg': 'fed_per', 'moon': 'scaffold',
}
# What is left out of an algorithm's process, and the reason that its builder gives.
_REFUSED = {
    ('cfd', 'secure'): 'what masks hide cannot be told by a code',
    ('fed_dyn', 'cohorts'): 'DynamicRegularizer is built for .* one architecture',
    ('fed_gen', 'cohorts'): 'FeatureGenerator is built for .* one architecture',
    ('fed_gen', 'secure'): 'what it exchanges with clients is not summed securely',
    ('fed_kd', 'secure'): 'it may need what single clients send',
    ('moon', 'cohorts'): 'ModelContrast is built for .* one architecture',
    ('scaffold', 'cohorts'): 'ControlVariates is built for .* one architecture',
    ('scaffold', 'secure'): 'With secure aggregation there can be no',
}
# With bounds, as estimating them takes as long to build as the rest.
_SECURE = privacy.SecureAggregation(model_bound=100.0, knowledge_bound=100.0)
# The test that holds whole rounds of the algorithm against NumPy.
_IN_NUMPY = {
    'cfd': 'private_process_test.py::test_cfd_in_numpy',
    'ds_fl': 'private_process_test.py::test_ds_fl_in_numpy',
    'fd': 'private_process_test.py::test_fd_in_numpy',
    'fed_aux': 'certainty_test.py::test_rounds_in_numpy_and_one_fit_a_client',
    'fed_avg': 'process_test.py::'
               'test_without_distillation_three_rounds_equal_tffs_fed_avg',
    'fed_df': 'cohorts_test.py::test_prototypes_learn_from_the_ensemble_of_all',
    'fed_distillation': 'process_test.py::test_two_rounds_equal_numpy',
    'fed_dyn': 'client_drift_test.py::test_rounds_equal_numpy',
    'fed_et': 'knowledge_test.py::test_fed_et_in_numpy',
    'fed_gen': 'generator_test.py::'
               'test_three_rounds_equal_the_objective_with_all_heads_in_one_place',
    'fed_gkd': 'local_terms_test.py::test_fed_gkd_in_numpy',
    'fed_kd': 'mutual_test.py::test_rounds_equal_numpy',
    'fed_md': 'private_process_test.py::test_fed_md_in_numpy',
    'fed_ntd': 'local_terms_test.py::test_fed_ntd_in_numpy',
    'fed_prox': 'local_terms_test.py::test_fed_prox_in_numpy',
    'fed_proto': 'fed_proto_test.py::test_rounds_equal_numpy',
    'fed_per': 'personal_test.py::test_rounds_equal_numpy',
    'fml': 'mutual_test.py::test_rounds_equal_numpy',
    'lg_fed_avg': 'personal_test.py::test_rounds_equal_numpy',
    'moon': 'moon_test.py::test_rounds_equal_numpy',
    'scaffold': 'client_drift_test.py::test_rounds_equal_numpy',
}


def _clients():
  """Six clients.

  2 and 3 differ from 0 and 1 in examples of weight 0 only; 4 has no others, and what 5
  has is finite, but no model's outputs of it are.
  """
  clients = []
  for number in range(4):
    x, y = helpers.examples(8, number % 2)
    others = helpers.examples(4, 50 + number)
    x, y = (np.concatenate([a[:4], b, a[4:]]) for a, b in zip((x, y), others))
    clients.append((x, y, np.float32([1, 2, 0.5, 1, 0, 0, 0, 0, 3, 1, 1, 2])))
  x, y, weights = clients[0]
  return [*clients, (x, y, 0 * weights), (np.full_like(x, 3e38), y, weights)]


@pytest.fixture(scope='module')
def batches():
  return helpers.batches(_clients(), batch_size=5, num_epochs=2, shuffle=False)


_STUDENTS = (helpers.dense_fn(), helpers.dense_fn(use_bias=False))


def _split_fn(**kwargs):
  """A builder of a linear model in two layers."""
  return lambda: keras.Sequential([
      keras.layers.InputLayer((helpers.DIM,)),
      keras.layers.Dense(4, **kwargs),
      keras.layers.Dense(helpers.CLASSES, **kwargs),
  ])


# Where an algorithm works with a hidden layer's features.
_SPLIT = (_split_fn(), _split_fn(use_bias=False))
_HAS_FEATURES = ('fed_gen', 'fed_per', 'fed_proto', 'lg_fed_avg', 'moon')


@helpers.shared
def _build(name, batches, cohorts, secure):
  students = _SPLIT if name in _HAS_FEATURES else _STUDENTS
  parts = dict(
      transfer_set=lambda: tff_kd.TransferSet(helpers.examples(12, 9)[0]),
      teacher_fn=helpers.dense_fn,
      mentor_fn=helpers.dense_fn,
      negatives=lambda: helpers.examples(12, 10)[0],
      epsilon=lambda: None,  # The noise is a client's own.
      generator_steps=lambda: 2,
      hidden_units=lambda: 4,
      noise_dim=lambda: 2,
      distillation=lambda: tff_kd.Distillation(num_steps=2, batch_size=6),
      num_clients=lambda: 6,
      # Terms of the loss leave out what it leaves out: in plain averaging, and beside a
      # companion.
      local_terms=lambda: (name in ('fed_avg', 'fed_gen') and not secure) * [
          tff_kd.LocalDistillation(weight=0.3), tff_kd.NotTrueDistillation(weight=0.5),
      ],
  )
  return helpers.build_with_parts(
      name, parts, metrics_fn=None,
      student_fn=students if cohorts else students[0],
      input_spec=batches.element_spec, client_data=batches,
      reporting=tff_kd.Reporting(min_reports=2),
      secure_aggregation=_SECURE if secure else None,
  )


class _Rounds:
  """An algorithm's process, and what its rounds are given."""

  def __init__(self, name, batches):
    self.name, self.info = name, algorithms.REGISTRY[name]
    self.cohorts = (name, 'cohorts') not in _REFUSED
    self.process = _build(name, batches, self.cohorts, secure=False)
    self.keeps_state = isinstance(self.process, tff_kd.StatefulClientsProcess)

  def states(self, folder):
    """The clients' states in a folder; those at the beginning, if it is empty."""
    initial = self.process.initialize_client()
    # One a cohort, where it is of the cohort's model.
    is_of_cohort = not hasattr(initial, '_fields')
    return tff_kd.simulation.ClientStates(
        initial, folder, cohort_fn=(lambda number: number % 2) if is_of_cohort else None
    )

  def run(self, state, clients, kept=None, lost=()):
    """One round; `kept` is the clients' states, those at the beginning if not given."""
    arguments = [
        {
            **({'cohort': number % 2} if self.cohorts else {}), 'data': number,
            'conditions': tff_kd.ClientConditions(reports=np.bool_(number not in lost)),
        }
        for number in clients
    ]
    if not self.keeps_state:
      return self.process.next(state, arguments)
    if kept is None:
      with tempfile.TemporaryDirectory() as folder:
        kept = self.states(folder).load(clients)
    return self.process.next(state, arguments, kept)


@pytest.fixture(
    scope='module',
    params=[helpers.slow(name) if name in _LIKE_ANOTHER else name for name in _NAMES],
)
def rounds(request, batches):
  return _Rounds(request.param, batches)


def test_every_algorithm_is_in_the_table():
  assert set(_TYPES) == set(_IN_NUMPY) == set(_NAMES)
  assert {name for name, _ in _REFUSED} <= set(_NAMES)
  assert set(_LIKE_ANOTHER.values()) <= set(_NAMES) - set(_LIKE_ANOTHER)


@pytest.mark.parametrize('name', _NAMES)
def test_whole_rounds_are_held_against_numpy(name):
  file, test = _IN_NUMPY[name].split('::')
  source = (pathlib.Path(__file__).parent / file).read_text()
  place = source.find(f'\ndef {test}(')
  assert place > 0, f'There is no {_IN_NUMPY[name]}.'
  assert '@pytest.mark.slow' not in source[source.rindex('\n\n\n', 0, place) : place]


@pytest.mark.parametrize(('name', 'what'), sorted(_REFUSED))
def test_what_is_left_out_is_refused(name, what, batches):
  with pytest.raises(ValueError, match=_REFUSED[name, what]):
    _build.anew(name, batches, cohorts=what == 'cohorts', secure=what == 'secure')


def test_type_signatures(rounds):
  down, up, kept = _TYPES[rounds.name]
  described = rounds.process.description
  found = described.broadcast_type
  nothing = tff.to_type(())
  assert {
      name: str(value)
      for name, value in tff.structure.iter_elements(found) if value != nothing
  } == {**down, 'round_num': 'int32'}
  assert str(described.update_type) == up
  parameter = rounds.process.next.type_signature.parameter
  cohort = 'cohort=int32,' if rounds.cohorts else ''
  assert str(parameter[1]) == (
      f'{{<{cohort}data=int32,conditions=<delay=int32,step_share=float32,reports=bool,'
      'coverage=float32,seed=int32[2]>>}@CLIENTS'
  )
  assert rounds.info.client_state == rounds.keeps_state == (kept is not None)
  assert (rounds.info.keeps is not None) == (described.kept_models is not None)
  has_student = rounds.process.get_model_weights is not None
  assert (rounds.info.keeps == 'layers') == (rounds.info.averages and not has_student)
  if rounds.keeps_state:
    assert str(parameter[2]) == f'{{{kept}}}@CLIENTS'
  else:
    assert isinstance(rounds.process, tff.learning.templates.LearningProcess)


# Of each kind of sum: weights, beside predictions, classes, certainties, prototypes.
_OFTEN_SECURE = ('fed_avg', 'fed_distillation', 'fd', 'fed_aux', 'fed_proto')


@pytest.mark.parametrize(
    'name',
    [
        name if name in _OFTEN_SECURE else helpers.slow(name)
        for name in _NAMES if (name, 'secure') not in _REFUSED
    ],
)
def test_nothing_is_summed_in_the_clear(name, batches):
  process = _build(name, batches, cohorts=False, secure=True)
  tff.test.assert_not_contains_unsecure_aggregation(process.next)


def test_sums_are_in_the_clear_unless_they_are_secure(rounds):
  tff.test.assert_contains_unsecure_aggregation(rounds.process.next)


def test_cohorts_have_a_ledger(rounds):
  output = rounds.run(rounds.process.initialize(), [0, 1])
  metrics = tff_kd.simulation.flatten_metrics(output.metrics)
  assert metrics['client_work/participation/num_included'] == 2
  assert np.isfinite(metrics['client_work/train/loss'])
  found = communication.ledger(communication.round_bytes(rounds.process), metrics)
  down, _, _ = _TYPES[rounds.name]
  expected = {f'bytes/down_{name}' for name in down if name != 'shared_round'}
  expected |= {'bytes/down_round', communication.CLIENT_BYTES}
  if rounds.info.averages:
    expected.add('bytes/up_model')
  if rounds.process.description.update_type.knowledge != tff.to_type(()):
    expected.add('bytes/up_knowledge')
  if 'companion' in down:
    expected.add('bytes/up_companion')
  assert set(found) == expected and all(value > 0 for value in found.values())


def _one_round(rounds):
  """The state, and the clients' states, if they keep any."""
  output = rounds.run(rounds.process.initialize(), [0, 1])
  return output.state, getattr(output, 'client_states', None)


def test_a_round_with_too_few_reports_is_skipped(rounds):
  state, kept = _one_round(rounds)
  output = rounds.run(state, [0, 1], kept, lost=[1])
  assert output.metrics['round_skipped'] == 1
  assert helpers.changed_fields(state, output.state) == {'round_num'}
  if rounds.keeps_state:
    # Also of the client whose report came.
    helpers.assert_weights_close(output.client_states, kept, rtol=0)
  assert rounds.run(output.state, [0, 1]).metrics['round_skipped'] == 0


def _two_rounds(rounds, clients):
  state, kept = rounds.process.initialize(), None
  for _ in range(2):
    output = rounds.run(state, clients, kept)
    state, kept = output.state, getattr(output, 'client_states', None)
  return output


def test_examples_of_weight_0_count_nowhere(rounds):
  plain, padded = (_two_rounds(rounds, clients) for clients in ([0, 1], [2, 3]))
  for output in (plain, padded):
    assert output.metrics['client_work']['train']['num_examples'] == 2 * 2 * 8
    assert output.metrics['client_work']['participation']['num_included'] == 2
  helpers.assert_weights_close(plain, padded, rtol=1e-5, atol=1e-6)


def test_who_cannot_take_part_is_counted_and_changes_nothing(rounds):
  state, kept = _one_round(rounds)
  alone = rounds.run(state, [0, 1], kept)
  # 4 is of the cohort of 0, and 5 of that of 1.
  output = rounds.run(state, [0, 4, 1, 5], kept and [k for k in kept for _ in range(2)])
  counts = output.metrics['client_work']['participation']
  assert counts['num_clients'] == 4 and counts['num_included'] == 2
  assert counts['num_excluded_empty'] == counts['num_excluded_non_finite'] == 1
  found, expected = [output.state], [alone.state]
  if rounds.keeps_state:
    found += output.client_states
    after = alone.client_states
    expected += [after[0], kept[0], after[1], kept[1]]
  helpers.assert_weights_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_run_is_resumed_to_the_bit(rounds, tmp_path):
  state = rounds.process.initialize()
  output = rounds.run(state, [0, 1])
  whole = rounds.run(output.state, [1, 0], getattr(output, 'client_states', [])[::-1])
  saved = checkpoints.Checkpoints(tmp_path / 'saved')
  helpers.run(saved.save(output.state, 1))
  kept = None
  if rounds.keeps_state:
    rounds.states(tmp_path / 'clients').save([0, 1], output.client_states, 1)
    # As another program would: of the files alone.
    kept = rounds.states(tmp_path / 'clients').load([1, 0])
  loaded, version = helpers.run(
      checkpoints.Checkpoints(tmp_path / 'saved').load_latest(
          rounds.process.initialize()
      )
  )
  assert version == 1
  resumed = rounds.run(loaded, [1, 0], kept)
  helpers.assert_weights_close(resumed, whole, rtol=0)


def test_a_server_model_is_of_the_first_cohort(batches):
  rounds = _Rounds('ds_fl', batches)
  process = rounds.process
  assert len(process.students.specs) == 1 and len(process.kept_models.specs) == 2
  output = rounds.run(process.initialize(), [0, 1])
  assert [w.shape for w in process.get_model_weights(output.state).trainable] == [
      (helpers.DIM, helpers.CLASSES), (helpers.CLASSES,)
  ]


def test_local_targets_are_the_cohorts_own(batches):
  output = _two_rounds(_Rounds('fed_gkd', batches), [0, 1])
  first = _Rounds('fed_gkd', batches).process.initialize().global_model_weights
  # The first student sent is in the first place.
  for places, weights in zip(output.state.student_history.sent, first, strict=True):
    for place, sent in zip(places.trainable, weights.trainable, strict=True):
      np.testing.assert_allclose(place[0], sent)
  assert np.isfinite(output.metrics['client_work']['train']['loss'])


_MODEL = '<trainable=<float32[5,3],float32[3]>,non_trainable=<>>'
_MODELS = f'<{_MODEL},<trainable=<float32[5,3]>,non_trainable=<>>>'
# Those of clients that keep them: the shapes are their cohort's.
_OWN = (
    '<<trainable=<float32[?,?],float32[?]>,non_trainable=<>>,'
    '<trainable=<float32[?,?]>,non_trainable=<>>>'
)
_SPLIT_MODEL = (
    '<trainable=<float32[5,4],float32[4],float32[4,3],float32[3]>,non_trainable=<>>'
)
_PREDICTIONS = '<values=float32[12,3],weights=float32[12]>'
_CONSENSUS = dict(
    shared='<logits=float32[12,3],mask=float32[12],diversity=<>>', shared_round='int32'
)


def _up(model='<>', knowledge='<>'):
  return f'<model={model},knowledge={knowledge}>'


def _kept(weights, sent='<>', sent_round='<>'):
  return f'<weights={weights},sent={sent},sent_round={sent_round}>'


_OWN_SPLIT = (
    '<<trainable=<float32[?,?],float32[?],float32[?,?],float32[?]>,non_trainable=<>>,'
    '<trainable=<float32[?,?],float32[?,?]>,non_trainable=<>>>'
)
_BODIES = (
    '<<trainable=<float32[5,4],float32[4]>,non_trainable=<>>,'
    '<trainable=<float32[5,4]>,non_trainable=<>>>'
)
_HEADS = (
    '<<trainable=<float32[4,3],float32[3]>,non_trainable=<>>,'
    '<trainable=<float32[4,3]>,non_trainable=<>>>'
)
_AVERAGING = (dict(student=_MODELS), _up(_MODELS), None)
_AVERAGING_AND_PREDICTIONS = (dict(student=_MODELS), _up(_MODELS, _PREDICTIONS), None)
_BY_CLASS = '<values=float32[3,3],weights=float32[3]>'
_PROTOTYPES = '<values=float32[3,4],weights=float32[3]>'
# What goes down, beside the round's number; what goes up; what a client keeps.
_TYPES = {
    'cfd': (
        _CONSENSUS, _up(knowledge=_PREDICTIONS), _kept('<>', _PREDICTIONS, 'int32')
    ),
    'ds_fl': (_CONSENSUS, _up(knowledge=_PREDICTIONS), _kept(_OWN)),
    'fd': (
        dict(shared=_BY_CLASS, shared_round='int32'), _up(knowledge=_BY_CLASS),
        _kept(_OWN, _BY_CLASS, 'int32'),
    ),
    'fed_aux': (*_AVERAGING_AND_PREDICTIONS[:2], '<weights=float32[6],is_fitted=bool>'),
    'fed_avg': _AVERAGING,
    'fed_df': _AVERAGING_AND_PREDICTIONS,
    'fed_distillation': _AVERAGING_AND_PREDICTIONS,
    'fed_dyn': (
        dict(student=_MODEL), _up(_MODEL), '<values=<float32[5,3],float32[3]>>'
    ),
    'fed_et': _AVERAGING_AND_PREDICTIONS,
    'fed_gen': (
        dict(
            student=_SPLIT_MODEL,
            companion='<weights=<trainable=<float32[5,4],float32[4],float32[4,4],'
                      'float32[4]>,non_trainable=<>>,seen=float32[3]>',
        ),
        _up(_SPLIT_MODEL), None,
    ),
    'fed_gkd': (dict(student=_MODELS, student_history=_MODELS), _up(_MODELS), None),
    'fed_kd': (*_AVERAGING[:2], _kept(_MODEL)),
    'fed_md': (_CONSENSUS, _up(knowledge=_PREDICTIONS), _kept(_OWN)),
    'fed_ntd': _AVERAGING,
    'fed_per': (dict(student=_BODIES), _up(_BODIES), _kept(_OWN_SPLIT)),
    'fed_prox': _AVERAGING,
    'fed_proto': (
        dict(shared=_PROTOTYPES, shared_round='int32'), _up(knowledge=_PROTOTYPES),
        _kept(_OWN_SPLIT),
    ),
    'fml': (*_AVERAGING[:2], _kept(_MODEL)),
    'lg_fed_avg': (dict(student=_HEADS), _up(_HEADS), _kept(_OWN_SPLIT)),
    'moon': (dict(student=_SPLIT_MODEL), _up(_SPLIT_MODEL), _kept(_SPLIT_MODEL)),
    'scaffold': (
        dict(student=_MODEL, companion='<values=<float32[5,3],float32[3]>>'),
        _up(_MODEL), '<values=<float32[5,3],float32[3]>>',
    ),
}
