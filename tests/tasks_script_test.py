"""A task of one's own, evaluate and export, as a user runs them."""

import dataclasses
import json
import re
import types

from absl import flags
import keras
import numpy as np
import pytest
import tensorflow as tf

from pipelines import audit_job
from pipelines import centralized_job
from pipelines import evaluate_job
from pipelines import export
from pipelines import export_job
from pipelines import released
from pipelines import task_defaults
from pipelines import train_checks
from pipelines import train_data
from pipelines import train_flags
from pipelines import train_process
from pipelines import train_report
from pipelines import UserError
from tests import helpers
from tff_kd import data
from tff_kd import evaluation
from tff_kd import models


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  """Three blobs; each client has two of them."""
  folder = tmp_path_factory.mktemp('own')
  rng = np.random.default_rng(0)
  centres = np.array([[0, 3], [3, -2], [-3, -2]])

  def save(name, labels):
    x = centres[labels] + rng.normal(size=(len(labels), 2))
    np.savez(folder / name, x=x, y=labels)

  for client in range(5):
    save(f'client_{client}.npz', (rng.integers(0, 2, 40) + client) % 3)
  save('server.npz', rng.integers(0, 3, 90))
  return folder


@pytest.fixture(scope='module')
def many_dir(tmp_path_factory):
  """Likewise, of more clients than a run has by default."""
  folder = tmp_path_factory.mktemp('many')
  rng = np.random.default_rng(0)
  for name in ('server', *(f'client_{k:02}' for k in range(22))):
    labels = rng.integers(0, 3, 90 if name == 'server' else 12)
    x = 3 * np.eye(3, 2)[labels] + rng.normal(size=(len(labels), 2))
    np.savez(folder / name, x=x, y=labels)
  return folder


@pytest.fixture(scope='module')
def own_run(data_dir, tmp_path_factory):
  folder = tmp_path_factory.mktemp('run')
  done = helpers.train(
      '--task=examples/own_task.py', f'--data_dir={data_dir}', '--rounds=6',
      f'--output_dir={folder}', f'--cache_dir={folder / "cache"}',
      '--nocompare_with_fed_avg', '--rounds_per_checkpoint=6',
  )
  assert '5 clients with 160 examples, 5 a round; transfer 60 (60 with' in done.stdout
  return folder


def test_an_own_task_learns(own_run):
  results = json.loads((own_run / 'results.json').read_text())
  assert results['metric'] == 'accuracy'
  assert results['best']['test/student_accuracy'] > 0.8
  config = json.loads((own_run / 'config.json').read_text())['flags']
  assert config['task'] == 'examples/own_task.py' and config['num_clients'] == 5
  assert config['student'] == ['small'] and config['teacher'] == 'large'
  assert config['consensus'] == 'aligned'


_OF_FUSION = ('consensus', 'prior', 'clients_start_from', 'batch_size')


@pytest.mark.parametrize(
    ('args', 'expected'),
    [
        ([], ('aligned', 'average', 'average', 10)),
        (['--consensus=variance'], ('variance', None, 'average', 10)),
        (['--algorithm=fed_df'], (None, None, None, 10)),
    ],
)
def test_an_own_tasks_predictions_are_aligned(args, expected, data_dir):
  task = '--task=examples/own_task.py'
  with helpers.flags_of(task, f'--data_dir={data_dir}', *args):
    train_flags.take_defaults()
    train_data.load_task()
    found = tuple(flags.FLAGS[name].value for name in _OF_FUSION)
  assert found == expected


def _loaded():
  """The flags of a run when its task is loaded, once they are checked."""
  train_data.load_task()
  train_checks.run()
  found = train_flags.config()
  return {**found, 'flags': found['flags'] | {'config': None}}


@pytest.mark.parametrize(
    'args', [['--num_clients=20', '--algorithm=fed_avg'], ['--prior=em'], []]
)
def test_a_config_settles_the_flags_of_an_own_task(args, many_dir, tmp_path):
  path = tmp_path / 'config.json'
  own = ['--task=examples/own_task.py', f'--data_dir={many_dir}']
  with helpers.flags_of(*own, *args):
    train_flags.take_defaults()
    ran_with = _loaded()
  path.write_text(json.dumps(ran_with))
  with helpers.flags_of(f'--config={path}'):
    train_flags.take_defaults()
    assert _loaded() == ran_with
  with helpers.flags_of():
    train_flags.take_run(tmp_path)
    assert _loaded() == ran_with


def test_what_an_own_task_had_by_default_gives_way(many_dir, data_dir, tmp_path):
  path = tmp_path / 'config.json'
  with helpers.flags_of('--task=examples/own_task.py', f'--data_dir={many_dir}'):
    train_flags.take_defaults()
    path.write_text(json.dumps(_loaded()))
  for args, expected in (
      (['--algorithm=fed_avg'], {'consensus': None, 'num_clients': 22}),
      (['--prediction_bits=4', '--consensus=era'], {'consensus': 'era', 'prior': None}),
      ([f'--data_dir={data_dir}'], {'num_clients': 5, 'clients_per_round': 5}),
      (['--num_clients=20'], {'num_clients': 20, 'consensus': 'aligned'}),
  ):
    with helpers.flags_of(f'--config={path}', *args):
      train_flags.take_defaults()
      assert expected.items() <= _loaded()['flags'].items()


def _evaluate(run, *args):
  """The report of `pipelines.evaluate`, and the names of the clients."""
  with helpers.flags_of(*args):
    train_flags.take_run(run)
    evaluate_job.run(run, run / 'evaluation', part='test', num_worst=0)
  report = json.loads((run / 'evaluation' / 'report.json').read_text())
  rows = helpers.rows(run / 'evaluation' / 'clients.csv')
  return report['models'], [row['client'] for row in rows]


def test_an_own_tasks_run_is_gone_on_with_and_looked_at(many_dir, tmp_path, capsys):
  run = tmp_path / 'run'
  helpers.train_here(
      '--task=examples/own_task.py', f'--data_dir={many_dir}', '--algorithm=fml',
      '--rounds=1', '--num_clients=10', '--nocompare_with_fed_avg',
      '--transfer_labels=0', f'--output_dir={run}',
      f'--cache_dir={tmp_path / "cache"}',
  )
  helpers.train_here(
      f'--config={run / "config.json"}', f'--output_dir={run}', '--rounds=2'
  )
  assert len(helpers.rows(run / 'metrics.csv')) == 2
  found, names = _evaluate(run)
  assert set(found) == {'student', 'client'} and len(names) == 10
  with helpers.flags_of():
    train_flags.take_run(run)
    (exported,) = export_job._of_clients(run, names[3:4])
    assert exported.name == f'client_{names[3]}'
  with helpers.flags_of():
    assert list(audit_job._open_run(run).batches.data.names) == names
  # Other clients than those that keep models, and fewer than take part in a round.
  capsys.readouterr()
  found, others = _evaluate(run, '--num_clients=5')
  assert set(found) == {'student'} and len(others) == 5
  said = capsys.readouterr().out
  assert 'Without the models that clients keep: --num_clients makes other' in said
  with helpers.flags_of('--seed=1'):
    train_flags.take_run(run)
    with pytest.raises(UserError, match='--clients: --seed makes other clients'):
      export_job._of_clients(run, names[:1])


def test_an_own_task_has_defaults_with_an_algorithm(tmp_path):
  file = tmp_path / 'task.py'
  file.write_text(
      "DEFAULTS = {'rounds': 3, 'batch_size': 7}\n"
      "DEFAULTS_WITH = {'fed_df': {'rounds': 4, 'server_steps': 5}}\n"
      'def load(**kwargs): pass\n'
  )
  of_fed_df = task_defaults.defaults_of(str(file), 'fed_df')
  assert of_fed_df == {'rounds': 4, 'batch_size': 7, 'server_steps': 5}
  assert task_defaults.defaults_of(str(file), 'fed_avg')['rounds'] == 3


def test_what_an_algorithm_has_for_averaging_stays_unless_a_flag_is_given():
  task = types.SimpleNamespace(
      students={'mlp_small': None}, loss_fn=None, metrics_fn=None
  )
  batches = types.SimpleNamespace(element_spec=None)
  names = {'server_optimizer', 'client_weighting'}
  for args, expected in (
      ([], set()), (['--server_learning_rate=1'], {'server_optimizer'}),
      (['--client_weighting=num_examples'], {'client_weighting'}),
  ):
    with helpers.flags_of('--student=mlp_small', *args):
      common = train_process.common_arguments(task, batches)
    assert names & set(common) == expected


_METRICS_TASK = '''
import keras
import numpy as np
from tff_kd import data

def build_model(units):
  layers = keras.layers
  return keras.Sequential([
      keras.Input((2,)), layers.Dense(units, activation='relu'),
      layers.Dense(1, activation='sigmoid'),
  ])

def examples(n, seed):
  x = np.random.default_rng(seed).normal(size=(n, 2)).astype('float32')
  return data.Examples(x, (x[:, 0] > 0).astype('float32'))

def build_metrics():
  metrics = keras.metrics
  return [
      metrics.MeanSquaredError(name='brier'), metrics.AUC(),
      metrics.F1Score(threshold=0.5),
  ]

def load(**kwargs):
  return data.task_from_clients(
      'metrics', num_classes=2, clients=[examples(30, k) for k in range(3)],
      server=examples(60, 9), students={'small': lambda: build_model(4)},
      teachers={'large': lambda: build_model(16)}, metrics_fn=build_metrics,
      loss_fn=keras.losses.BinaryCrossentropy, **kwargs,
  )
'''


# What a task is measured by is in `tasks_test`, too.
@pytest.mark.slow
def test_a_task_names_its_metrics(tmp_path):
  (tmp_path / 'own.py').write_text(_METRICS_TASK)
  run = tmp_path / 'run'
  printed, bar = helpers.run_here(
      f'--task={tmp_path / "own.py"}', f'--output_dir={run}', '--server_steps=2',
      '--back_steps=2', '--client_learning_rate=0.5', f'--cache_dir={tmp_path}',
      '--rounds=3',
  )
  results = json.loads((run / 'results.json').read_text())
  assert results['metric'] == 'brier' and results['lower_is_better']
  rows = helpers.rows(run / 'metrics.csv')
  briers = [float(row['validation/student_brier']) for row in rows]
  assert results['best_round'] == 1 + int(np.argmin(briers))
  for name in ('student', 'teacher'):
    assert f'{name}=' in bar
    for part in ('validation', 'test'):
      for metric in ('brier', 'auc', 'f1_score_0', 'accuracy'):
        assert 0.0 <= float(rows[-1][f'{part}/{name}_{metric}']) <= 1.0
  assert 0.0 < float(rows[-1]['client_work/train/f1_score_0']) <= 1.0
  assert 'The best round: with the lowest validation/student_brier.' in printed
  assert 'test brier: student=' in bar and 'test f1 score 0' in printed
  assert 'clients: mean brier' in printed and "FedAvg's test brier after 3" in printed
  best = results['best']
  chart = run / 'tensorboard' / 'teacher'
  assert best['test/teacher_brier'] > 0.0 and list(chart.glob('events*'))


def test_evaluate(own_run):
  done = helpers.script('pipelines.evaluate', f'--run={own_run}')
  report = json.loads((own_run / 'evaluation' / 'report.json').read_text())
  best = json.loads((own_run / 'results.json').read_text())['best']
  for name in ('student', 'teacher'):
    its = report['models'][name]
    for metric in ('accuracy', 'top_2', 'calibration_error'):
      assert its['scores'][metric] == pytest.approx(best[f'test/{name}_{metric}'])
    assert its['scores']['accuracy'] <= its['scores']['top_2'] <= 1.0
    assert its['clients']['count'] == 5
    assert its['clients']['worst'] <= its['clients']['mean']
    assert f'confusion_{name}.png' in done.stdout
  assert 'The clients with the worst student' in done.stdout
  for name in ('clients.png', 'calibration.png', 'confusion_student.png'):
    picture = (own_run / 'evaluation' / name).read_bytes()
    assert picture[:4] == b'\x89PNG' and len(picture) > 5000
  lines = (own_run / 'evaluation' / 'clients.csv').read_text().splitlines()
  assert lines[0] == 'client,examples,trained_on,student_accuracy,teacher_accuracy'
  assert [its.split(',')[0] for its in lines[1:]] == [f'client_{k}' for k in range(5)]
  assert re.search(r'\nclient_\d ', done.stdout)


def test_training_in_one_place_needs_no_split():
  # So many that no draw of the split would give each an example.
  with helpers.flags_of('--num_clients=1000', '--alpha=0.01', '--transfer_size=60'):
    task = train_data.load_task()
    assert centralized_job._examples(task) is task.clients
    own = dataclasses.replace(task, client_rows=[np.arange(2), np.arange(3, 5)])
  with helpers.flags_of('--num_clients=1'):
    assert len(centralized_job._examples(own)) == 2


def _softmax_model():
  layers = keras.layers
  return keras.Sequential(
      [keras.Input((2,)), layers.Dense(3, activation='softmax')]
  )


def _released(name):
  """A task, and a model of it that a run has left."""
  x = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
  task = helpers.task(
      data.Examples(x, np.arange(6, dtype=np.int32) % 3),
      loss_fn=keras.losses.SparseCategoricalCrossentropy,
      scores_fn=lambda predict: {'sum': float(predict(x).sum())},
  )
  spec = models.build_model_spec(
      _softmax_model, input_spec=task.input_spec, loss_fn=task.loss_fn
  )
  model = spec.to_keras(spec.initial_weights)
  return task, released.Released(name, None, model, spec, spec.initial_weights)


def test_a_tasks_own_scores_are_of_what_models_return():
  task, one = _released('student')
  spec = one.spec
  evaluator = evaluation.CentralEvaluator(spec)
  scores = [evaluate_job._evaluate(one, task, task.test, []).scores]
  scores.append(centralized_job._test_scores(task, evaluator, one.keras_model))
  scores.append(
      train_report._further_scores(
          types.SimpleNamespace(
              task=task, evaluation=types.SimpleNamespace(
                  evaluators={'student': evaluator}
              ),
              setup=types.SimpleNamespace(
                  process=types.SimpleNamespace(
                      students=types.SimpleNamespace(has_cohorts=False, specs=[spec]),
                      teacher_spec=None,
                  )
              ),
              server_models={'student': (evaluator, spec.initial_weights)},
          )
      )['student']
  )
  for each in scores:
    assert each['sum'] == pytest.approx(6.0)


def test_evaluate_shows_models_with_other_scores_and_without_numbers(capsys, tmp_path):
  nan = float('nan')
  examples = data.Examples(np.zeros((5, 2)), np.zeros(5, np.int32))
  rows = [np.array([0, 1]), np.array([], int), np.array([2]), np.array([3, 4])]

  task = types.SimpleNamespace(
      name='own', metric='rmse', is_lower_better=lambda: True, clients=examples,
      class_numbers=lambda examples: None, counted=lambda examples: examples.counted,
  )

  def found(name, scores, by_client):
    return evaluate_job._Evaluated(
        name, None, None, examples, scores, np.array(by_client),
        evaluate_job._counted(task, examples, rows),
    )

  models_found = [
      found('student', {'rmse': 2.0, 'hits': 0.5}, [1.0, nan, 3.0, 2.0]),
      found('teacher', {'rmse': nan, 'hits': nan}, [nan] * 4),
      found('client', {'rmse': 1.5}, [1.0, nan, nan, 2.0]),
  ]
  common = examples, models_found, ['a', 'b', 'c', 'd'], rows, rows
  evaluate_job._print(task, 'test', *common, 4)
  lines = [re.split(' {2,}', line) for line in capsys.readouterr().out.splitlines()]
  assert ['student', '2.0000', '0.5000', '2.0000', '2.8000', '3.0000'] in lines
  assert ['teacher', *['nan'] * 5] in lines
  assert ['client', '1.5000', *['nan'] * 3] in lines
  assert ['c', '3.0000', 'nan', 'nan', '1', '1'] in lines
  assert not any(line[0] == 'b' for line in lines)
  evaluate_job._write(tmp_path, task, 'test', *common)
  report = json.loads((tmp_path / 'report.json').read_text())['models']
  counts = [report[name]['clients']['count'] for name in report]
  assert counts == [3, 3, 3] and np.isnan(report['client']['clients']['mean'])


def test_export(own_run):
  helpers.script('pipelines.export', f'--run={own_run}', '--examples=40')
  files = json.loads((own_run / 'export' / 'export.json').read_text())['files']
  assert len(files) == 10
  for its in files.values():
    assert its['bytes'] > 500
    assert abs(its['accuracy'] - its['keras_accuracy']) <= 0.01 + 1 / 40
    if not its['format'].startswith('int8'):
      assert its['same_class'] == 1.0 and its['largest_difference'] < 1e-4
  interpreter = tf.lite.Interpreter(str(own_run / 'export' / 'student.tflite'))
  runner = interpreter.get_signature_runner('serving_default')
  assert runner(inputs=np.zeros((1, 2), np.float32))['outputs'].shape == (1, 3)


@pytest.mark.parametrize('name', ['saved_model', 'keras'])
def test_a_clients_name_may_be_a_path(name, tmp_path):
  task, one = _released('client_a/b%2F')
  expected = released.predict(one.keras_model, task.test.inputs)
  exported = export_job._export(name, one, tmp_path, task, task.test, expected)
  assert exported.path.parent == tmp_path
  assert exported.path.name.startswith('client_a%2Fb%252F')
  assert exported.agreement == 1.0


@pytest.fixture
def card(own_run):
  """The model card that `test_export` has left."""
  return (own_run / 'export' / 'MODEL_CARD.md').read_text()


def test_the_model_card_says_what_the_run_knows(card, own_run):
  results = json.loads((own_run / 'results.json').read_text())
  files = json.loads((own_run / 'export' / 'export.json').read_text())['files']
  assert card.startswith('# student and teacher: fed_distillation on own_task\n')
  assert f"Training ended at {results['finished']}." in card
  for name, file in files.items():
    cells = (f'`{name}`', file['model'], file['format'], f"{file['bytes']:,}")
    assert f'| {" | ".join(cells)} |' in card
  assert 'own_task, read by the file `own_task.py`' in card and '3 classes.' in card
  assert '| clients | 160 | local training |' in card
  assert '| transfer | 60 | held by the server, 60 of them with labels |' in card
  assert "5 of the data's own 5 clients. In each round 5 were chosen" in card
  best, rounds = results['best_round'], results['rounds']
  assert f'of round {best} of {rounds}, the best by `validation/student_accuracy`' in card
  assert '| `--student` | `small` |' in card and '| `--client_epochs` | `5` |' in card
  scores = dict(re.findall(r'\| (student|teacher) \| ([01]\.\d+) \|', card))
  for name, score in scores.items():
    assert score == f"{results['best'][f'test/{name}_accuracy']:.4f}"
  assert len(scores) == 2 and '**No privacy guarantee.**' in card
  moved = sum(
      float(row['bytes/up_model']) for row in helpers.rows(own_run / 'metrics.csv')
  )
  assert f'| up model | {moved / 1e6:.4g} |' in card
  # Nothing of this machine.
  assert str(own_run.parent) not in card


def test_the_model_card_says_how_to_load_the_files(card, own_run, monkeypatch):
  monkeypatch.chdir(own_run / 'export')
  inputs = np.random.default_rng(0).normal(size=(7, 2)).astype(np.float32)
  model = keras.models.load_model(own_run / 'student.keras', compile=False)
  expected = model.predict(inputs, verbose=0)
  blocks = re.findall(r'(?ms)^```python\n(.*?)^```$', card)
  assert len(blocks) == 3
  for block in blocks:
    names = {'inputs': inputs}
    exec(block, names)
    outputs = np.asarray(names['outputs'])
    np.testing.assert_allclose(outputs, expected[: len(outputs)], atol=1e-5)


def test_onnx_that_is_not_installed_is_said(monkeypatch, capsys):
  monkeypatch.setattr(export.importlib.util, 'find_spec', lambda name: None)
  with helpers.flags_of('--formats=keras,onnx'):
    assert export.main(['export']) == 1
  said = capsys.readouterr().err
  assert '--formats=onnx needs what is not installed here: tf2onnx, onnxruntime.' in said
  assert '`pip install tf2onnx onnxruntime`' in said


def _written(write, model, path, inputs):
  """The outputs of a model's file, which is written by the look of these inputs."""
  transfer = data.Examples(inputs, np.zeros(len(tf.nest.flatten(inputs)[0])))
  return write(model, path, types.SimpleNamespace(transfer=transfer))(inputs)


def _onnx_models():
  """One model a kind of inputs: arrays, sequences, several by name."""
  layers = keras.layers
  image = keras.Sequential([
      keras.Input((6, 6, 1)), layers.Conv2D(3, 3, activation='relu'), layers.Flatten(),
      layers.Dense(3),
  ])
  text = keras.Sequential([
      keras.Input((9,), dtype='int32'), layers.Embedding(7, 4),
      layers.GRU(5, return_sequences=True, dtype='mixed_float16'), layers.Dense(7),
  ])
  first, second = keras.Input((4,), name='first'), keras.Input((2,), name='second')
  named = keras.Model(
      {'first': first, 'second': second},
      layers.Dense(1)(layers.Concatenate()([first, second])),
  )
  return {'image': image, 'text': text, 'named': named}


@pytest.mark.parametrize('kind', ['image', 'text', 'named'])
def test_onnx_gives_the_outputs_of_the_model(kind, tmp_path):
  # Optional, and not in the lock.
  pytest.importorskip('tf2onnx')
  onnxruntime = pytest.importorskip('onnxruntime')
  rng = np.random.default_rng(0)
  floats = lambda *shape: rng.normal(size=shape).astype(np.float32)
  inputs = {
      'image': floats(20, 6, 6, 1), 'text': rng.integers(0, 7, (20, 9)).astype(np.int32),
      'named': {'first': floats(20, 4), 'second': floats(20, 2)},
  }[kind]
  model, path = _onnx_models()[kind], tmp_path / 'model.onnx'
  outputs = _written(export_job._write_onnx, model, path, inputs)
  assert outputs.dtype == np.float32
  expected = model.predict(inputs, verbose=0)
  tolerance = 0.01 if kind == 'text' else 1e-5  # That one computes in 16 bits.
  np.testing.assert_allclose(outputs, expected, atol=tolerance)
  session = onnxruntime.InferenceSession(path)
  names = ['first', 'second'] if kind == 'named' else ['inputs']
  assert [each.name for each in session.get_inputs()] == names
  assert [each.name for each in session.get_outputs()] == ['outputs']


# A GRU's loop is in the next test, too.
@pytest.mark.parametrize('kind', [helpers.slow('GRU'), helpers.slow('LSTM')])
def test_recurrent_models(kind, tmp_path):
  """A call knows nothing of those before it; without its loop, a file is much larger."""
  inputs = keras.Input((20,), dtype=tf.int32)
  x = keras.layers.Embedding(9, 4)(inputs)
  x = getattr(keras.layers, kind)(32, return_sequences=True)(x)
  model = keras.Model(inputs, keras.layers.Dense(9)(x))
  # What cuDNN computes has no other device.
  assert export_job._copy(model).layers[2].use_cudnn is False
  tokens = np.random.default_rng(0).integers(0, 9, (20, 20)).astype(np.int32)
  expected = model.predict(tokens, verbose=0)
  sizes = {}
  for name, tolerance in (('tflite', 1e-5), ('int8_weights', 0.05), ('int8', 0.1)):
    suffix, write = export_job._FORMATS[name]
    path = tmp_path / f'model{suffix}'
    outputs = _written(write, model, path, tokens)
    np.testing.assert_allclose(outputs, expected, atol=tolerance)
    sizes[name] = path.stat().st_size
  assert sizes['int8_weights'] < sizes['tflite']
  assert 2 * sizes['tflite'] < sizes['int8']


@pytest.mark.slow
def test_another_policy_and_a_loop_in_a_layer(tmp_path):
  """TFLite computes in float32, whatever the model does, and has no loop in 8 bits."""
  layers = keras.layers
  inputs = keras.Input((10, 3), dtype='float32')
  x = layers.Bidirectional(layers.GRU(4, dtype='mixed_float16'), dtype='mixed_float16')
  model = keras.Model(inputs, layers.Dense(3, dtype='mixed_float16')(x(inputs)))
  given = np.random.default_rng(0).normal(size=(20, 10, 3)).astype(np.float32)
  expected = model.predict(given, verbose=0)
  assert expected.dtype == np.float16
  for name in ('keras', 'saved_model', 'tflite', 'int8_weights', 'int8'):
    suffix, write = export_job._FORMATS[name]
    outputs = _written(write, model, tmp_path / f'model{suffix}', given)
    assert outputs.dtype == np.float32
    np.testing.assert_allclose(outputs, expected, atol=0.05)
  assert not x.forward_layer.unroll  # The model is as before.


def test_tables_are_in_the_files(tmp_path):
  lookup = keras.layers.IntegerLookup()
  lookup.adapt(np.array([7, 7, 5]))
  inputs = keras.Input((2,), dtype='int64')
  x = keras.layers.Flatten()(keras.layers.Embedding(4, 3)(lookup(inputs)))
  model = keras.Model(inputs, keras.layers.Dense(3)(x))
  given = np.array([[7, 5], [5, 9]])
  found = _written(export_job._write_saved_model, model, tmp_path / 'saved', given)
  np.testing.assert_allclose(found, model.predict(given, verbose=0), atol=1e-6)


@pytest.mark.parametrize(
    'write, needed, message',
    [
        (export_job._write_tflite, (), 'inverse .it has no MatrixInverse.*--formats'),
        (
            export_job._write_onnx, ('tf2onnx', 'onnxruntime'),
            'ONNX does not take the model inverse.*--formats',
        ),
    ],
)
def test_what_a_format_does_not_take_is_said(write, needed, message, tmp_path):
  for package in needed:
    pytest.importorskip(package)
  inputs = keras.Input((2, 2))
  outputs = keras.layers.Flatten()(keras.ops.linalg.inv(inputs))
  model = keras.Model(inputs, outputs, name='inverse')
  with pytest.raises(UserError, match=message):
    _written(write, model, tmp_path / 'file', np.eye(2, dtype=np.float32)[None])


@pytest.mark.parametrize('flag', ['--alpha=1', '--partition=iid'])
def test_a_split_of_clients_that_are_there_is_refused(flag, data_dir):
  task = '--task=examples/own_task.py'
  refused = helpers.refused_here(task, f'--data_dir={data_dir}', '--dry_run', flag)
  assert f'{flag.partition("=")[0]} has no effect with {task}' in refused


@pytest.mark.parametrize(
    'args,message',
    [
        (['--task=shakespeare', '--student=cnn'], 'Choose of gru'),
        (['--task=movielens', '--alpha=1'], 'data have their clients'),
    ],
)
def test_what_does_not_fit_is_refused(args, message):
  assert message in helpers.refused_here(*args)


@pytest.mark.parametrize('task', ['examples/own_task.py', 'idx'])
def test_a_folder_of_data_that_is_needed_and_not_given_is_asked_for(task):
  said = helpers.refused_here(f'--task={task}')
  assert f'--task={task} needs --data_dir' in said


def test_labels_counted_from_1_are_a_sentence(tmp_path):
  x, y = np.zeros((30, 2)), np.arange(30) % 3 + 1
  for name in ('client_0', 'client_1', 'server'):
    np.savez(tmp_path / f'{name}.npz', x=x, y=y)
  said = helpers.refused_here('--task=examples/own_task.py', f'--data_dir={tmp_path}')
  assert 'found 1 to 3. They seem to be counted from 1: subtract 1.' in said


def test_more_labels_than_the_task_has_transfer_examples_are_refused():
  said = helpers.refused_here(
      '--task=examples/skewed_transfer.py', '--transfer_size=1000',
      '--transfer_labels=900', '--dry_run',
  )
  assert re.search(r'labels is 900, but only (\d+) of the \1 transfer examples', said)


def test_more_clients_than_the_data_have_are_refused(data_dir):
  said = helpers.refused_here(
      '--task=examples/own_task.py', f'--data_dir={data_dir}', '--num_clients=9'
  )
  assert 'have 5 clients' in said


@pytest.mark.parametrize(
    'module,args,message',
    [
        ('train', ['--task=nothing'], '--task must be one of mnist5k'),
        ('train', ['--task=nowhere.py'], 'There is no file nowhere.py'),
        ('evaluate', ['--run=/nowhere'], 'config.json'),
    ],
)
def test_wrong_usage_is_a_sentence(module, args, message):
  done = helpers.script(f'pipelines.{module}', *args, status=1)
  assert message in done.stderr + done.stdout
  assert 'Traceback' not in done.stderr
