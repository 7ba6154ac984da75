"""A task of any labels and any model: trained by the scripts, evaluated, exported."""

import json
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipelines import centralized_job
from pipelines import evaluate_job
from pipelines import export_job
from pipelines import released
from pipelines import train_flags
from pipelines import train_data
from pipelines import UserError
from tests import helpers
from tests import label_kinds
from tff_kd import data

_MODELS = list(label_kinds.MODELS)
# Beside the class numbers of `tasks_script_test`.
_EVERY = helpers.slow_each(
    *((labels, model) for labels in label_kinds.LABELS for model in _MODELS)
)


def _trained(folder, *args, **kwargs):
  """The folder of a run, and the metrics of its best round."""
  _write_kind(folder, *args, **kwargs)
  run_dir = folder / 'run'
  helpers.train_here(
      '--task=tests/label_kinds.py', f'--data_dir={folder}', '--rounds=8',
      '--algorithm=fed_df', '--nocompare_with_fed_avg', '--rounds_per_checkpoint=8',
      f'--output_dir={run_dir}', f'--cache_dir={folder / "cache"}',
  )
  return run_dir, json.loads((run_dir / 'results.json').read_text())['best']


def _write_kind(folder, labels, model, **kwargs):
  kind = {'labels': labels, 'model': model, **kwargs}
  (folder / 'kind.json').write_text(json.dumps(kind))


@pytest.mark.parametrize('labels, model', _EVERY)
def test_a_run_is_reported_evaluated_and_exported(labels, model, tmp_path, capsys):
  run_dir, best = _trained(tmp_path, labels, model)
  assert best['test/student_accuracy'] > 0.7
  # A model that Keras cannot write down leaves its weights.
  is_whole = model != 'subclassed'
  assert (run_dir / 'student.keras').exists() == is_whole
  assert (run_dir / 'student.weights.h5').exists() != is_whole
  formats = ['saved_model', 'tflite', *(['keras'] if is_whole else [])]
  with helpers.flags_of(f'--config={run_dir / "config.json"}'):
    train_flags.take_defaults()
    evaluate_job.run(run_dir, run_dir / 'evaluation', part='test', num_worst=2)
    export_job.run(
        run_dir, run_dir / 'export', names=[], formats=formats, num_examples=40
    )
    if not is_whole:
      with pytest.raises(UserError, match=r'Subclassed has no `get_config\(\)`.*--forma'):
        export_job.run(
            run_dir, run_dir / 'export', names=[], formats=['keras'], num_examples=4
        )
  report = json.loads((run_dir / 'evaluation' / 'report.json').read_text())
  scores = report['models']['student']['scores']
  assert scores['accuracy'] == pytest.approx(best['test/student_accuracy'])
  files = json.loads((run_dir / 'export' / 'export.json').read_text())['files']
  assert len(files) == len(formats)
  for file in files.values():
    assert file['same_class'] == 1.0 and file['largest_difference'] < 1e-4
    assert file['accuracy'] == file['keras_accuracy']


# Rounds with weights are in `weights_test` and `contract_test`.
@pytest.mark.slow
def test_a_task_may_have_sample_weights(tmp_path):
  run_dir, best = _trained(tmp_path, 'class numbers', 'functional', has_weights=True)
  rows = helpers.rows(run_dir / 'metrics.csv')
  # Of the 48 examples that a client trains with, 40 count, about.
  counted = float(rows[0]['client_work/train/num_examples'])
  assert 4 * 36 < counted < 4 * 44
  assert best['test/student_accuracy'] > 0.65
  central = tmp_path / 'central'
  with helpers.flags_of(f'--config={run_dir / "config.json"}'):
    train_flags.take_defaults()
    evaluate_job.run(run_dir, run_dir / 'evaluation', part='test', num_worst=2)
    centralized_job.run(central, epochs=6, learning_rate=0.01, batch_size=10)
  report = json.loads((run_dir / 'evaluation' / 'report.json').read_text())
  scores = report['models']['student']['scores']
  assert scores['accuracy'] == pytest.approx(best['test/student_accuracy'])
  assert scores['loss'] == pytest.approx(best['test/student_loss'], rel=1e-5)
  models = json.loads((central / 'results.json').read_text())['models']
  assert models['student']['test_accuracy'] > 0.7


@pytest.mark.parametrize('labels, model', _EVERY)
def test_exports_predict_the_same(labels, model, tmp_path):
  _write_kind(tmp_path, labels, model)
  task = label_kinds.load(
      data_dir=tmp_path, seed=0, transfer_size=40, validation_size=20
  )
  trained = task.students['small']()
  examples = task.test.take(np.arange(20))
  expected = np.asarray(trained(examples.inputs))
  writers = [export_job._write_saved_model, export_job._write_tflite]
  if model != 'subclassed':
    writers.append(export_job._write_keras)
  for write in writers:
    found = write(trained, tmp_path / f'{write.__name__}.keras', task)(examples.inputs)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize('labels', label_kinds.LABELS)
@pytest.mark.parametrize('model', ['functional', 'per position'])
def test_examples_have_a_class_or_none(labels, model, tmp_path):
  _write_kind(tmp_path, labels, model, has_clients=False)
  flag = ['--task=tests/label_kinds.py', f'--data_dir={tmp_path}', '--num_clients=4']
  with helpers.flags_of(*flag):
    train_flags.take_defaults()
    task = train_data.load_task()
    classes = task.class_numbers(task.clients)
    if model == 'per position' or 'several' in labels:
      assert classes is None
    else:
      kind = label_kinds.LABELS[labels]
      shown = kind.of(np.eye(3, dtype=np.float32)[[0, 1, 2]])  # Scores.
      found = task.class_numbers(data.Examples(np.eye(3), shown))
      is_binary = 'binary' in labels or 'bool' in labels
      np.testing.assert_array_equal(found, [1, 0, 0] if is_binary else [0, 1, 2])
      assert classes.dtype == np.int64 and classes.shape == (len(task.clients),)
    clients = train_data.split_clients(task)
    tests = train_data.split_tests(task, clients)
  for rows, examples in ((clients, task.clients), (tests, task.test)):
    assert len(rows) == 4
    np.testing.assert_array_equal(
        np.sort(np.concatenate(rows)), np.arange(len(examples))
    )


def test_a_split_by_class_needs_classes(tmp_path):
  _write_kind(tmp_path, 'several', 'functional', has_clients=False)
  flag = ['--task=tests/label_kinds.py', f'--data_dir={tmp_path}', '--partition=shards']
  with helpers.flags_of(*flag):
    train_flags.take_defaults()
    task = train_data.load_task()
    with pytest.raises(UserError, match='=shards splits by class.*of iid, quantity_sk'):
      train_data.split_clients(task)


class _Recurrent(keras.Model):
  """Has no `get_config`, and a layer whose copy would have to be another one."""

  def __init__(self, units):
    super().__init__()
    self.gru = keras.layers.GRU(units)

  def call(self, inputs):
    return self.gru(inputs)


def test_what_cannot_be_copied_and_has_to_be_is_refused(tmp_path):
  model = _Recurrent(3)
  model(tf.zeros([1, 4, 2]))
  with pytest.raises(UserError, match='_Recurrent has no.*its recurrent layers'):
    export_job._copy(model)
  released.save(model, tmp_path, 'student')
  assert [path.name for path in tmp_path.iterdir()] == ['student.weights.h5']


class _Configured(_Recurrent):
  """Has one, and is registered nowhere."""

  def get_config(self):
    return {'units': 3}


def test_classes_need_not_be_registered(tmp_path):
  model = _Configured(3)
  x = np.ones([2, 4, 2], np.float32)
  expected = model(x)
  task = types.SimpleNamespace(transfer=data.Examples(x, np.zeros(2)))
  for write in (export_job._write_keras, export_job._write_saved_model):
    found = write(model, tmp_path / f'{write.__name__}.keras', task)(x)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
  assert export_job._copy(model, unroll=True).gru.unroll and not model.gru.unroll
