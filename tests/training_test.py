"""The training loop: convergence, the best state, resuming."""

import asyncio
import collections
import math

import keras
import numpy as np
import pytest
from tff_kd.compat import tff

from tests import helpers
import tff_kd
from tff_kd import optimizers
from tff_kd import simulation


@pytest.fixture(scope='module')
def process():
  return helpers.fed_avg()


def _averaging(**kwargs):
  return helpers.build('fed_avg', **kwargs)


def _csv(folder):
  return tff.program.CSVFileReleaseManager(folder / 'metrics.csv', key_fieldname='round')


def _data(round_num):
  return [helpers.dataset(*helpers.examples(6, round_num))]


def _train(process, num_rounds, select_clients=_data, **kwargs):
  return simulation.train(
      process, select_clients=select_clients, num_rounds=num_rounds, **kwargs
  )


def _scripted(values):
  """An evaluation that returns a value a round."""
  return lambda state: {'score': [0.0, *values][int(state.round_num)]}


def test_stops_at_convergence_with_the_best_state(process):
  scores = [0.1, 0.5, 0.4, math.nan, 0.5, 0.6]
  result = _train(process, 6, evaluate=_scripted(scores), monitor='score', patience=3)
  assert result.converged and result.round_num == 5 and result.best_round == 2
  assert result.state.round_num == 5 and result.best_state.round_num == 2
  assert len(result.history) == 5
  assert result.history[1]['score'] == 0.5
  assert result.history[0]['client_work/participation/num_clients'] == 1
  assert result.history[0][simulation.ROUND_SECONDS] > 0


def test_rounds_end_it_first(process):
  result = _train(process, 2, evaluate=_scripted([0.3, 0.2]), monitor='score', patience=3)
  assert not result.converged and result.round_num == 2 and result.best_round == 1


def test_nothing_monitored_keeps_the_last(process):
  result = _train(process, 2)
  assert result.best_round == 2 and result.best_state is result.state


@pytest.mark.parametrize('rounds_per_saving', [1, 2])
def test_a_resumed_run_is_exact(process, tmp_path, rounds_per_saving):
  scores = [0.1, 0.5, 0.4, 0.2, 0.3]
  kwargs = dict(
      evaluate=_scripted(scores), monitor='score', rounds_per_saving=rounds_per_saving
  )
  whole = _train(process, 5, **kwargs)
  files = dict(
      program_state_manager=tff.program.FileProgramStateManager(
          tmp_path, keep_total=2, keep_first=False
      ),
      release_managers=[_csv(tmp_path)],
  )
  calls = []

  def fails_in_round_4(round_num):
    calls.append(round_num)
    if round_num == 4:
      raise RuntimeError('killed')
    return _data(round_num)

  with pytest.raises(RuntimeError, match='killed'):
    _train(process, 5, select_clients=fails_in_round_4, **files, **kwargs)
  resumed = _train(process, 5, **files, **kwargs)
  assert len(resumed.history) == 5 - (3 if rounds_per_saving == 1 else 2)
  assert resumed.best_round == whole.best_round == 2
  helpers.assert_weights_close(resumed.state, whole.state, rtol=0)
  helpers.assert_weights_close(resumed.best_state, whole.best_state, rtol=0)
  lines = (tmp_path / 'metrics.csv').read_text().splitlines()
  assert len(lines) == 1 + 5
  finished = _train(process, 5, **files, **kwargs)
  assert finished.history == [] and finished.best_round == 2


def test_a_resumed_run_with_another_metric_chooses_the_best_anew(
    process, tmp_path, caplog
):
  # The first metric's best value, .9, is above what the second one's ever is.
  scores, errors = [0.9, 0.2, 0.3, 0.1], [1.0, 2.0, 4.0, 3.0]

  def evaluate(state):
    round_num = int(state.round_num) - 1
    return {'score': scores[round_num], 'error': errors[round_num]}

  evaluate.metric_names = ('score', 'error')
  saved = simulation.Checkpoints(tmp_path)
  kwargs = dict(evaluate=evaluate, program_state_manager=saved)
  result = _train(process, 2, monitor='score', **kwargs)
  assert result.best_round == 1
  changed = dict(monitor='error', monitor_mode='min')
  result = _train(process, 2, **changed, **kwargs)
  assert result.best_round == 2
  helpers.assert_weights_close(result.best_state, result.state, rtol=0)
  assert (
      'round 2 was chosen by score (max), and this training chooses by error (min)'
  ) in caplog.text
  # Its value of round 2 is not known: those after it are chosen among, worse or not.
  assert 'anew among those after it, and until then it is that of round 2.' in caplog.text
  result = _train(process, 4, patience=2, **changed, **kwargs)
  assert result.best_round == 4 and result.best_state.round_num == 4
  assert len(result.history) == 2 and not result.converged
  # The checkpoints after that are the new metric's.
  caplog.clear()
  result = _train(process, 4, **changed, **kwargs)
  assert result.best_round == 4 and 'chosen' not in caplog.text
  # Another mode of it is another choice, too.
  result = _train(process, 4, monitor='error', **kwargs)
  assert 'by error (min), and this training chooses by error (max)' in caplog.text


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(num_rounds=0), 'num_rounds'),
        (dict(patience=2), 'monitor'),
        (dict(patience=0, monitor='score'), 'patience'),
        (dict(monitor_mode='low'), "'max' or 'min', found 'low'"),
        (dict(monitor='scores'), "one of .*'client_work/train/loss'.*'score'"),
    ],
)
def test_bad_arguments_are_refused(process, kwargs, message):
  with pytest.raises(ValueError, match=message):
    _train(process, **{'num_rounds': 1, 'evaluate': _scripted([0.1]), **kwargs})


def test_the_process_own_metrics_can_be_monitored(process):
  result = _train(process, 1, monitor='client_work/train/accuracy')
  assert result.best_round == 1


def test_flatten_metrics():
  nested = collections.OrderedDict(x={'y': 1, 'z': ()}, w=np.float32(2))
  assert simulation.flatten_metrics(nested) == {'x/y': 1, 'w': 2.0}


@pytest.mark.parametrize(
    'change, message',
    [
        (
            dict(client_optimizer=helpers.sgd(0.2)),
            'client_work/learning_rate: 0.1.* there, 0.2.* here',
        ),
        (
            dict(loss_fn=helpers.loss_with(ignore_class=2)),
            'loss of the student: .*None.* there, .*2.* here',
        ),
        # Other weights are in `checkpoints_test`.
        (dict(student_fn=helpers.dense_fn(classes=4)), r'shape \(5, 3\), \(5, 4\) is'),
    ],
)
def test_what_another_process_saved_is_named_and_stays(
    process, tmp_path, change, message
):
  kwargs = dict(program_state_manager=simulation.Checkpoints(tmp_path))
  _train(process, 1, **kwargs)
  other = _averaging(**change)
  with pytest.raises(simulation.CheckpointError, match=message):
    _train(other, 2, **kwargs)
  resumed = _train(process, 2, **kwargs)
  assert len(resumed.history) == 1


def test_another_rate_of_a_keras_optimizer_is_refused(tmp_path):
  def keras_sgd(rate):
    return lambda: keras.optimizers.SGD(rate)

  kwargs = dict(program_state_manager=simulation.Checkpoints(tmp_path))

  def train(num_rounds, client=0.5, server=1.0):
    its = _averaging(
        client_optimizer=keras_sgd(client), server_optimizer=keras_sgd(server)
    )
    return _train(its, num_rounds, **kwargs)

  train(1)
  with pytest.raises(
      simulation.CheckpointError,
      match=r'process \(client_optimizer/learning_rate: 0.5 there, 0.25 here\)',
  ):
    train(2, client=0.25)
  with pytest.raises(
      simulation.CheckpointError, match='server_optimizer/learning_rate: 1.0 there, 0.0 h'
  ):
    train(2, server=0.0)
  # The same settings, made anew, are the same.
  assert len(train(2).history) == 1


@pytest.mark.parametrize(
    'name, argument, of_process',
    [
        ('fed_md', 'digest_optimizer', 'student_optimizer of lesson 1'),
        *helpers.slow_each(
            ('fed_df', 'student_optimizer', 'student_optimizer of lesson 1'),
            ('fed_distillation', 'teacher_optimizer', 'teacher_optimizer of lesson 1'),
            ('fed_gen', 'generator_optimizer', 'companion_optimizer'),
        ),
    ],
)
def test_a_process_knows_every_optimizer(name, argument, of_process):
  parts = dict(
      transfer_set=lambda: tff_kd.TransferSet(helpers.examples(8, 0)[0]),
      teacher_fn=lambda: helpers.dense_fn((4,)),
      num_clients=lambda: 2,
  )
  built = helpers.build_with_parts(
      name, parts, student_fn=helpers.dense_fn((4,)),
      **{argument: lambda: keras.optimizers.Adam(0.25)},
  )
  settings = optimizers.settings(built.description.optimizers[of_process])
  assert settings['type'] == 'Adam' and settings['learning_rate'] == 0.25


def test_clients_that_do_not_count_are_warned_of(process, caplog):
  x, y = helpers.examples(6, 0)
  bad = helpers.dataset(x, np.full(6, helpers.CLASSES, np.int32))
  with caplog.at_level('WARNING'):
    _train(process, 1, select_clients=lambda _: [bad])
  assert 'includes no client (excluded bad labels: 1)' in caplog.text
  caplog.clear()
  with caplog.at_level('WARNING'):
    result = _train(process, 1, select_clients=lambda _: [bad, helpers.dataset(x, y)])
  assert 'leaves out clients (excluded bad labels: 1)' in caplog.text
  assert simulation.left_out(result.history[0]) == {'excluded bad labels': 1}


def test_an_evaluation_that_tells_its_names_is_not_called_to_see_them(process):
  class Evaluation:
    metric_names = ['score']
    rounds = []

    def __call__(self, state):
      self.rounds.append(int(state.round_num))
      return {'score': 1.0}

  _train(process, 1, evaluate=Evaluation(), monitor='score')
  assert Evaluation.rounds == [1]


def test_clients_may_be_chosen_by_numpy():
  batches = helpers.batches([helpers.examples(6, k) for k in range(3)], batch_size=3)
  process = helpers.build('fed_avg', client_data=batches)
  for selected in (np.array([2, 0]), [np.int64(2), np.int32(0)], (2, 0)):
    result = _train(process, 1, select_clients=lambda _, its=selected: its)
    assert result.history[0]['client_work/train/num_examples'] == 12


class _Recorder(simulation.Callback):
  """Writes down what is called, and may act after a round."""

  def __init__(self, after_round=None):
    self.calls, self.after_round = [], after_round or (lambda training: None)

  def on_train_begin(self, training):
    self.calls.append(('begin', training.round_num, training.num_rounds))

  def on_round_end(self, training, metrics):
    assert training.state.round_num == training.round_num
    assert training.history[-1] is metrics
    self.calls.append(('round', training.round_num))
    self.after_round(training)

  def on_train_end(self, training):
    self.calls.append(('end', training.round_num))


def test_callbacks_are_called_around_rounds_and_may_stop_them(process):
  recorder = _Recorder()
  _train(process, 2, callbacks=[recorder])
  assert recorder.calls == [('begin', 0, 2), ('round', 1), ('round', 2), ('end', 2)]
  recorder = _Recorder(lambda training: training.stop('enough'))
  result = _train(process, 9, callbacks=[recorder])
  assert result.round_num == 1 and result.stop_reason == 'enough'
  assert not (result.converged or result.interrupted) and len(result.history) == 1
  assert recorder.calls[-1] == ('end', 1)


def test_a_callback_ends_where_training_fails(process):
  def fail(training):
    raise RuntimeError('broken')

  recorder = _Recorder(fail)
  with pytest.raises(RuntimeError, match='broken'):
    _train(process, 2, callbacks=[recorder])
  assert [its[0] for its in recorder.calls] == ['begin', 'round', 'end']


def _interrupt(training):
  if training.round_num == 3:
    raise KeyboardInterrupt


@pytest.mark.parametrize('rounds_per_saving', [1, 5])
def test_an_interrupted_training_keeps_what_is_whole(
    process, tmp_path, rounds_per_saving
):
  kwargs = dict(
      num_rounds=4, rounds_per_saving=rounds_per_saving,
      program_state_manager=simulation.Checkpoints(tmp_path),
      release_managers=[_csv(tmp_path)],
  )
  recorder = _Recorder(_interrupt)
  result = _train(process, callbacks=[recorder], **kwargs)
  assert result.interrupted and result.round_num == result.best_round == 2
  assert result.state.round_num == 2 and len(result.history) == 2
  assert recorder.calls[-1] == ('end', 2)
  # Saved, whenever the last checkpoint was; and it goes on from there, to the bit.
  resumed = _train(process, **kwargs)
  assert len(resumed.history) == 2 and not resumed.interrupted
  whole = _train(process, 4)
  helpers.assert_weights_close(resumed.state, whole.state, rtol=0)
  assert len((tmp_path / 'metrics.csv').read_text().splitlines()) == 1 + 4


def test_a_running_loop_is_no_hindrance(process, tmp_path):
  """A notebook's kernel calls its cells from one, with managers as without."""

  async def cell(num_rounds):
    before = asyncio.get_running_loop()
    result = _train(
        process, num_rounds, program_state_manager=simulation.Checkpoints(tmp_path),
        release_managers=[_csv(tmp_path)],
    )
    assert asyncio.get_running_loop() is before
    await asyncio.sleep(0)  # The loop goes on.
    return result

  assert helpers.run(cell(2)).round_num == 2
  resumed = helpers.run(cell(3))
  assert resumed.round_num == 3 and len(resumed.history) == 1
  assert len((tmp_path / 'metrics.csv').read_text().splitlines()) == 1 + 3


def test_an_interrupted_first_round_leaves_the_initial_state(process):
  def interrupted(round_num):
    raise KeyboardInterrupt

  result = _train(process, 2, select_clients=interrupted)
  assert result.interrupted and result.round_num == 0 and result.history == []
  helpers.assert_weights_close(
      result.state.global_model_weights, process.initialize().global_model_weights
  )


def test_early_stopping(process, tmp_path):
  scores = [0.1, 0.5, 0.55, math.nan, 0.52, 0.9]
  kwargs = dict(num_rounds=6, evaluate=_scripted(scores))

  def stopping(**changes):
    arguments = dict(monitor='score', patience=3, min_delta=0.1) | changes
    return simulation.EarlyStopping(**arguments)

  callback = stopping()
  result = _train(process, callbacks=[callback], **kwargs)
  assert result.round_num == 5 and result.stop_reason == (
      'score was not better for 3 rounds'
  )
  again = _train(process, callbacks=[callback], **kwargs)
  assert again.round_num == 5  # It begins anew with each training.
  # A resumed one remembers, and one that has stopped does not go on.
  files = dict(program_state_manager=simulation.Checkpoints(tmp_path))
  _train(process, callbacks=[stopping()], **files, **kwargs | {'num_rounds': 4})
  resumed = _train(process, callbacks=[stopping()], **files, **kwargs)
  assert resumed.round_num == 5 and len(resumed.history) == 1
  ended = _train(process, callbacks=[stopping()], **files, **kwargs)
  assert ended.history == [] and ended.stop_reason is not None
  lowest = _train(
      process, callbacks=[stopping(mode='min', patience=1, min_delta=0.0)], **kwargs
  )
  assert lowest.round_num == 2
  with pytest.raises(ValueError, match="one of .*'score'.*, found 'scores'"):
    _train(process, callbacks=[stopping(monitor='scores')], **kwargs)


def test_early_stopping_that_is_new_to_a_resumed_run_counts_from_there(
    process, tmp_path
):
  # .9 of the first metric is above what the second one's ever is.
  scores = [0.0, 0.9, 0.2, 0.3, 0.1, 0.1, 0.1, 0.1]
  kwargs = dict(
      program_state_manager=simulation.Checkpoints(tmp_path),
      evaluate=lambda state: {
          'score': scores[int(state.round_num)], 'error': 7.0 - int(state.round_num)
      },
  )

  def train(num_rounds, **changes):
    arguments = dict(monitor='score', patience=2) | changes
    callback = simulation.EarlyStopping(**arguments)
    return _train(process, num_rounds, callbacks=[callback], **kwargs)

  assert train(3).stop_reason.startswith('score')
  # The errors fall from round to round, and are above .9 all the time.
  assert train(4, monitor='error', mode='min').stop_reason is None
  # The highest of them is that of the first round from there on, 5.
  result = train(7, monitor='error')
  assert result.round_num == 7 and result.stop_reason.startswith('error')


class _Rates(simulation.Callback):

  def __init__(self, part):
    self.part, self.rates = part, []

  def on_train_begin(self, training):
    hparams = training.process.get_hparams(training.state)
    self.rates.append(float(hparams[self.part]['learning_rate']))

  def on_round_end(self, training, metrics):
    self.on_train_begin(training)


@pytest.mark.parametrize('optimizer, part', [
    ('client', 'client_work'), ('server', 'finalizer'),
])
def test_learning_rates_follow_the_rounds(process, tmp_path, optimizer, part):
  schedule = lambda round_num: [0.5, 0.2, 0.0][round_num - 1]
  callback = simulation.LearningRateSchedule(schedule, optimizer=optimizer)
  rates = _Rates(part)
  kwargs = dict(callbacks=[callback, rates])
  result = _train(process, 3, **kwargs)
  np.testing.assert_allclose(rates.rates, [0.5, 0.2, 0.0, 0.0])
  assert result.best_state is result.state
  # The rate of the last round is 0: nothing moves.
  two = _train(process, 2, **kwargs)
  helpers.assert_weights_close(
      result.state.global_model_weights, two.state.global_model_weights, rtol=0
  )
  by_hand = process.initialize()
  for round_num in (1, 2):
    hparams = process.get_hparams(by_hand)
    hparams[part]['learning_rate'] = np.float32(schedule(round_num))
    by_hand = process.next(process.set_hparams(by_hand, hparams), _data(round_num)).state
  helpers.assert_weights_close(
      two.state.global_model_weights, by_hand.global_model_weights, rtol=0
  )
  files = dict(program_state_manager=simulation.Checkpoints(tmp_path))
  _train(process, 1, **files, **kwargs)
  resumed = _train(process, 3, **files, **kwargs)
  helpers.assert_weights_close(
      resumed.state.global_model_weights, result.state.global_model_weights, rtol=0
  )
  # There is no fourth round, whose rate the schedule does not have.
  finished = _train(process, 3, **files, **kwargs)
  hparams = process.get_hparams(finished.state)
  assert hparams[part]['learning_rate'] == 0.0 and not finished.history


def test_a_schedule_needs_a_rate_to_set():
  process = helpers.build('fed_avg', client_optimizer=lambda: keras.optimizers.SGD(0.1))
  for schedule, message in (
      (lambda r: 0.1, 'no learning rate of a client optimizer'),
      (lambda r: math.nan, 'finite rates of 0 or more, found nan for round 1'),
  ):
    with pytest.raises(ValueError, match=message):
      _train(process, 1, callbacks=[simulation.LearningRateSchedule(schedule)])


def test_schedules_in_closed_form():
  cosine = simulation.round_schedule('cosine', 0.4, num_rounds=6, warmup_rounds=2)
  np.testing.assert_allclose(
      [cosine(r) for r in range(1, 7)],
      [0.2, 0.4, 0.4, *(0.2 * (1 + np.cos(np.pi * its / 4)) for its in (1, 2, 3))],
  )
  linear = simulation.round_schedule('linear', 1.0, num_rounds=4)
  assert [linear(r) for r in range(1, 5)] == [1.0, 0.75, 0.5, 0.25]
  constant = simulation.round_schedule('constant', 0.3, num_rounds=4, warmup_rounds=3)
  np.testing.assert_allclose([constant(r) for r in (1, 2, 3, 4)], [0.1, 0.2, 0.3, 0.3])
  for arguments in (dict(warmup_rounds=4), dict(warmup_rounds=-1)):
    with pytest.raises(ValueError, match='below the 4 rounds'):
      simulation.round_schedule('linear', 1.0, num_rounds=4, **arguments)
  with pytest.raises(ValueError, match="one of .*'cosine'.*, found 'step'"):
    simulation.round_schedule('step', 1.0, num_rounds=4)


@pytest.mark.parametrize(
    'make, error, message',
    [
        (lambda: simulation.EarlyStopping('x', patience=0), ValueError, '1 or more'),
        (
            lambda: simulation.EarlyStopping('x', patience=1, mode='up'), ValueError,
            "'max' or 'min'",
        ),
        (
            lambda: simulation.EarlyStopping('x', patience=1, min_delta=-1.0),
            ValueError, '`min_delta` must be finite, 0 or more',
        ),
        (lambda: simulation.LearningRateSchedule(0.1), TypeError, 'must be a function'),
        (
            lambda: simulation.LearningRateSchedule(min, optimizer='teacher'), ValueError,
            "one of .'client', 'server'., found 'teacher'",
        ),
    ],
)
def test_bad_arguments_of_callbacks_are_refused(make, error, message):
  with pytest.raises(error, match=message):
    make()


@pytest.mark.parametrize('callbacks', [[print], print])
def test_what_is_no_callback_is_refused(process, callbacks):
  with pytest.raises(TypeError, match='callback'):
    _train(process, 1, callbacks=callbacks)


def test_the_progress_is_shown(process, capsys):
  kwargs = dict(num_rounds=2)
  _train(process, **kwargs)
  shown = capsys.readouterr().err
  assert 'training:' in shown and '0/2' in shown and 'the first round' in shown
  assert '2/2' in shown and 'loss=' in shown and 'accuracy=' in shown
  _train(process, evaluate=_scripted([0.25, 0.5]), monitor='score', **kwargs)
  assert 'score=0.5' in capsys.readouterr().err
  bar = simulation.ProgressBar('mine', lambda training, metrics: f'<{len(metrics)}>')
  result = _train(process, progress_bar=bar, **kwargs)
  shown = capsys.readouterr().err
  assert 'mine:' in shown and f'<{len(result.history[0])}>' in shown
  _train(process, progress_bar=False, **kwargs)
  assert not capsys.readouterr().err
