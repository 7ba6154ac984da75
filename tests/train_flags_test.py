"""The flags of `pipelines.train`: help, refusals, dry runs, configurations."""

import copy
import importlib
import json
import os
import pathlib
import re
import sys
import types

from absl import app
from absl import flags
import pytest

import pipelines
from pipelines import run_folders
from pipelines import topics
from pipelines import task_defaults
from pipelines import train_checks
from pipelines import train_flags
from pipelines import train_process
from tests import helpers
import tff_kd
from tff_kd.models import zoo


def test_flags_and_help_do_not_wait_for_tensorflow():
  for script in ('train', 'benchmark'):
    check = (
        f'import sys; from pipelines import {script}; import tff_kd;'
        "assert not {'tensorflow', 'tensorflow_federated'} & set(sys.modules)"
    )
    helpers.new_python(check)
  info = tff_kd.data.TASKS['mnist5k']
  assert info.students == tuple(sorted(zoo.STUDENTS))
  assert info.teachers == tuple(sorted(zoo.TEACHERS))
  for name, algorithm in tff_kd.algorithms.REGISTRY.items():
    assert callable(algorithm.build) and algorithm.build.__name__ == f'build_{name}'


def test_flags_that_do_not_go_together_do_not_wait_for_tensorflow():
  check = (
      'import sys; sys.argv = ["train", "--partition=iid", "--alpha=1", "--target=x",'
      '"--transfer_labels=2000"]; import pipelines; from pipelines import train;'
      'from absl import flags; flags.FLAGS(sys.argv); status = train.main(["train"]);'
      'assert status == 1 and "tensorflow" not in sys.modules'
  )
  done = helpers.new_python(check)
  # All reasons at once.
  for said in ('--alpha has no effect', '--target must be', '--transfer_labels is 2000'):
    assert said in done.stderr


def test_help_lists_the_algorithms():
  done = helpers.train('--help')
  for name in [*tff_kd.algorithms.REGISTRY, *tff_kd.data.TASKS, *topics.by_topic()]:
    assert name in done.stdout
  assert max(map(len, done.stdout.splitlines())) <= 96


@pytest.mark.parametrize(
    'args, message',
    [
        (['--temperature=0'], 'temperature'),
        (['--target=nobody'], '--target'),
        (['--algorithm=fed_avg', '--temperature=2'], '--temperature has no effect'),
        (['--algorithm=fed_df', '--teacher=cnn'], '--teacher has no effect'),
        (['--partition=iid', '--alpha=1'], '--alpha has no effect'),
        (['--shards_per_client=3'], '--shards_per_client has no effect'),
        (['--local_weight=0.5'], '--local_weight has no effect'),
        (['--prior_smoothing=0.5'], '--prior_smoothing has no effect'),
        (['--algorithm=fd', '--vacant_weight=1'], '--vacant_weight has no effect'),
        (['--noback_distillation', '--back_steps=2'], '--back_steps'),
        (['--data_dir=/nowhere'], '--data_dir has no effect'),
        (['--task=idx', '--data_dir=/nowhere'], 'data_dir'),
        (['--algorithm=fed_kd', '--model_bits=8'], '--model_bits has no effect'),
        (
            ['--noback_distillation', '--student_learning_rate=0.1'],
            '--student_learning_rate has no effect with --noback_distillation',
        ),
        (['--clients_per_round=21'], 'only 20 clients'),
        (['--num_clients=9999'], 'Use fewer clients'),
        (['--min_reports=9'], 'is 9, and a round has 8 reports at most'),
        (['--transfer_labels=2000'], '--transfer_labels'),
        (['--transfer_labels=0', '--pretrain_epochs=1'], 'needs labels'),
        (['--algorithm=fed_per', '--pretrain_epochs=1'], '--pretrain_epochs has no eff'),
        (['--evaluated_clients=5'], '--evaluated_clients has no effect with --algorithm'),
        (['--transfer_labels=0', '--distillation_weight=0.5'], 'needs labels'),
        (['--transfer_size=4000'], 'do not fit'),
        (['--transfer_per_round=2000'], 'subset_size'),
        *(
            (['--target=student', flag], f'{flag.partition("=")[0]} has no effect with')
            for flag in (
                '--consensus=era', '--prediction_bits=4', '--consensus_sharpness=3',
                '--coverage=0.5', '--robust_knowledge=median',
            )
        ),
        (['--target=0', '--prior=uniform'], '--prior has no effect with --target=0'),
        (['--server_patience=2'], '--server_patience has no effect without'),
        (
            ['--server_patience=2', '--validate_every=200'],
            '--server_patience has no effect with --validate_every=200',
        ),
        (['--server_patience=2', '--validate_every=5'], 'validation part'),
        (['--alpha=0'], 'alpha'),
        (['--dropout_before=2'], '`dropout_before` must be from 0 to 1, found 2.0.'),
        (['--algorithm=fd', '--server_optimizer=adam'], '--server_optimizer has no effe'),
        (['--algorithm=fd', '--local_target=student'], '--local_target has no effect'),
        (['--algorithm=cfd', '--prediction_bits=9'], '`up_bits`'),
        (['--algorithm=cfd', '--down_bits=12'], '`down_bits`'),
        (['--algorithm=cfd', '--consensus=era'], '--consensus has no effect'),
        (['--algorithm=fed_df', '--prediction_bits=1'], '--consensus=mean_probabilities'),
        (['--algorithm=ds_fl', '--prediction_bits=9'], 'from 1'),
        (['--algorithm=fed_avg', '--prediction_bits=1'], '--prediction_bits has no'),
        (['--algorithm=fed_df', '--prediction_top=1'], '--consensus=mean_probabilities'),
        (
            ['--algorithm=ds_fl', '--prediction_top=10'],
            '`num_classes` must be below the number of classes, 10',
        ),
        (['--algorithm=ds_fl', '--prediction_bits=1', '--knowledge_bits=8'], 'only one'),
        (['--model_bits=8', '--robust_model=median'], '--model_bits are of a sum'),
        (['--knowledge_norm_bound=-1'], '`norm_bound` must be above 0, found -1.0'),
        (['--trimmed_share=0.2'], '--trimmed_share has no effect'),
        (['--algorithm=fed_md', '--robust_model=median'], '--robust_model has no effect'),
        (['--algorithm=fed_gen', '--split_layer=x'], '`split_layer` must be one of'),
        (['--mentor=cnn'], '--mentor has no effect'),
        (['--resume'], '--output_dir'),
        (['--monitor=accuracy', '--algorithm=fed_avg'], 'validation/student_accuracy'),
        (['--num_negatives=5'], '--num_negatives has no effect'),
        (['--algorithm=fed_aux', '--num_negatives=800'], '--num_negatives is 800'),
        (['--algorithm=fed_aux', '--consensus=era'], '--consensus has no effect'),
        (['--prior=even'], '--prior must be uniform, average, em or'),
        (['--prior=0.5,0.6'], '`prior` must be'),
        (['--prior=0.5,0.5'], '`prior` must have a probability for each class'),
        (['--algorithm=fed_md', '--prior=average'], 'nothing is averaged'),
        (['--algorithm=fed_avg', '--prior=uniform'], '--prior has no effect without'),
        (['--algorithm=fed_avg', '--calibrate', '--prior=em'], "must be 'uniform', or"),
        (['--algorithm=fed_df', '--calibrate'], '--calibrate has no effect'),
        (['--consensus_sharpness=0'], '`sharpness` must be'),
        (
            ['--algorithm=fed_avg', '--clients_start_from=average'],
            '--clients_start_from has no effect without --calibrate',
        ),
        (
            ['--algorithm=ds_fl', '--clients_start_from=average'],
            '--clients_start_from has no effect with --algorithm=ds_fl',
        ),
        (
            ['--noback_distillation', '--clients_start_from=average'],
            '--clients_start_from has no effect with --noback_distillation',
        ),
        (['--algorithm=fed_aux', '--certainty_epsilon=0'], '`epsilon` must be'),
        (['--delta=1e-6'], '--delta has no effect without --epsilon'),
        (['--ray_workers=2'], '--ray_workers has no effect without --ray_address'),
        (['--ray_resources=GPU=1'], '--ray_resources has no effect without'),
        (
            ['--device=CPU', '--runtime=tff'],
            '--device has no effect with --runtime=tff',
        ),
        (
            ['--ray_address=local', '--runtime=tff'],
            '--runtime has no effect with --ray_address',
        ),
        (
            ['--ray_address=local', '--ray_resources=CPU=0'],
            "positive amounts, such as CPU=4,GPU=1, found 'CPU=0'",
        ),
        (['--ray_address=ray://head:10001'], "found 'ray://head:10001'"),
        (['--epsilon=0'], '`epsilon` must be above 0'),
        (['--epsilon=8', '--client_weighting=num_examples'], 'and a weight without a'),
        (['--epsilon=8', '--compare_with_fed_avg'], 'is void'),
        (['--epsilon=8', '--sampling=weighted'], 'which is their secret'),
        (['--epsilon=8', '--private_channels=model'], 'without noise, so that there is'),
        (
            [
                '--algorithm=fed_avg', '--noise_multiplier=5', '--model_clip=1',
                '--private_channels=knowledge',
            ],
            '--private_channels=knowledge is a channel that --algorithm=fed_avg does not',
        ),
        (['--epsilon=8', '--algorithm=cfd'], 'the length of a code'),
        (['--epsilon=8', '--algorithm=fed_gen'], 'no FeatureGenerator'),
        (['--epsilon=8', '--model_bits=8'], '`model_aggregator` must be None'),
        (['--epsilon=8', '--student=mlp_small,cnn'], 'one student only'),
        (['--epsilon=8', '--delta=0.05'], 'well below 1 / --num_clients, 0.05'),
        (
            ['--algorithm=fed_avg', '--noise_multiplier=0.5', '--epsilon=1'],
            'One round costs an epsilon of',
        ),
        (['--secure_bits=8'], '--secure_bits has no effect without'),
        (['--student=mlp_smal'], "Did you mean 'mlp_small'?"),
        (
            ['--client_optimizer=adam', '--client_momentum=0.9'],
            '--client_momentum has no effect with --client_optimizer=adam',
        ),
        (['--client_warmup_rounds=30'], 'is 30, and must be below --rounds'),
        (['--algorithm=fd', '--server_rate_schedule=cosine'], 'no effect with --algor'),
        (
            ['--secure_aggregation', '--secure_knowledge_bound=1', '--algorithm=fed_avg'],
            '--secure_knowledge_bound has no effect with',
        ),
        (
            ['--secure_aggregation', '--secure_bits=8', '--secure_model_bound=1'],
            '`knowledge_bound` must be given',
        ),
    ],
)
def test_bad_flags_are_one_sentence(args, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  error = helpers.refused_here(*args)
  # After what it says that it does.
  said = ('Loading', 'preparing', 'Build')
  lines = [its for its in error.splitlines() if its and not its.startswith(said)]
  assert lines[0].startswith('error: ') and message in error
  # No run was begun; the clients' files serve the next one.
  assert set(tmp_path.glob('runs/*')) <= {tmp_path / 'runs' / 'cache'}


def test_a_dry_run_says_what_would_be_and_leaves_nothing(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  said = helpers.train_here(
      *helpers.TINY_RUN, '--algorithm=fed_md', '--rounds=5', '--dry_run'
  )
  # 60 predictions of 10 classes and their weights; twice, of 2 clients, in 5 rounds.
  knowledge = 4 * 60 * 11 / 1e6
  assert f'up knowledge  {knowledge:17.3g}  {knowledge * 10:23.4g}' in said
  # Four clients with 25,450 weights each.
  kept = next(line for line in said.splitlines() if "clients' own states" in line)
  assert float(kept.split()[-1]) == pytest.approx(4 * 4 * 25450 / 1e6, rel=0.01)
  assert said.endswith('Nothing was trained (--dry_run).\n')
  assert set(tmp_path.glob('runs/*')) <= {tmp_path / 'runs' / 'cache'}


def test_a_config_repeats_a_run_where_nothing_else_is_said(tmp_path):
  path = tmp_path / 'config.json'
  given = ['--algorithm=fed_df', '--seed=4', '--student=cnn', '--output_dir=x']
  with helpers.flags_of(*helpers.TINY_FUSION, *given):
    path.write_text(json.dumps(train_flags.config()))
  with helpers.flags_of(f'--config={path}', '--seed=5'):
    train_flags.take_defaults()
    assert train_flags.ALGORITHM.value == 'fed_df' and train_flags.SEED.value == 5
    assert train_flags.STUDENT.value == ['cnn'] and train_flags.OUTPUT_DIR.value is None
    # As if they were given.
    assert flags.FLAGS['algorithm'].present and not flags.FLAGS['patience'].present
  assert train_flags.ALGORITHM.value == 'fed_distillation'
  assert not flags.FLAGS['algorithm'].present
  for text, message in (
      ('{}', '--config must be the config.json'),
      ('{"flags": {"unheard_of": 1}}', 'not known here: unheard_of'),
      ('{"flags": {"seed": 1}}', 'must say in `given`.* found None. Use the version'),
      ('{"flags": {"seed": 1}, "given": ["rounds"]}', r"found \['rounds'\]"),
  ):
    path.write_text(text)
    with helpers.flags_of(f'--config={path}'):
      with pytest.raises(app.UsageError, match=message):
        train_flags.take_defaults()


def _taken(*names):
  """The values of flags when all have theirs."""
  train_flags.take_defaults()
  return [flags.FLAGS[name].value for name in names]


@pytest.mark.parametrize(
    'given, expected',
    [
        ([], None),
        (['--consensus=aligned'], lambda k: k.Aligned(k.MeanLogits())),
        (['--prior=em'], lambda k: k.Aligned(k.MeanLogits(), prior='em')),
        (
            ['--consensus_sharpness=2'],
            lambda k: k.Aligned(k.MeanLogits(), sharpness=2.0, num_steps=0),
        ),
        (
            ['--algorithm=fed_aux', '--prior=uniform'],
            lambda k: k.Aligned(k.CertaintyWeighted('given', average='probabilities')),
        ),
        (
            ['--algorithm=fed_et', '--prior=uniform'],
            lambda k: k.Aligned(k.CertaintyWithDiversity('variance')),
        ),
        (
            [
                '--consensus=aligned_probabilities', '--prediction_top=3',
                '--prior=0.5,0.5', '--consensus_sharpness=1.5',
            ],
            lambda k: k.Aligned(
                k.TopClasses(k.MeanProbabilities(), 3), prior=(0.5, 0.5), sharpness=1.5
            ),
        ),
        (
            ['--consensus=mean_probabilities', '--prediction_bits=2'],
            lambda k: k.Quantized(k.MeanProbabilities(), 2),
        ),
    ],
)
def test_flags_make_the_consensus_rule(given, expected):
  with helpers.flags_of(*given):
    made = train_process._consensus_rule(train_flags.algorithm())
  if expected is None:
    assert made is train_process._UNSET
  else:
    assert made == expected(tff_kd.knowledge)


_CODE = ('consensus', 'prediction_top', 'prediction_bits')


def test_tasks_have_defaults_of_their_own_with_some_algorithms():
  for algorithm, code in (
      ('fed_distillation', ['mean_probabilities', 5, None]),
      ('fed_df', [None, None, None]),
  ):
    with helpers.flags_of('--task=shakespeare', f'--algorithm={algorithm}'):
      assert _taken(*_CODE, 'num_clients') == [*code, 562]


def test_a_default_that_does_not_fit_what_is_given_gives_way():
  # The consensus stays as it was, whatever becomes of the code or the prior.
  for code in ('prediction_bits', 'knowledge_bits'):
    with helpers.flags_of('--task=shakespeare', f'--{code}=4'):
      taken = _taken('consensus', 'prediction_top', code)
      assert taken == ['mean_probabilities', None, 4]
  for guard in ('--epsilon=8', '--secure_aggregation'):
    with helpers.flags_of('--task=shakespeare', guard):
      assert _taken(*_CODE) == ['mean_probabilities', None, None]
  with helpers.flags_of('--knowledge_bits=8'):
    assert _taken('consensus', 'prior') == ['aligned', 'average']
  with helpers.flags_of('--prior=em'):
    assert _taken('consensus', 'prior') == ['aligned', 'em']
  with helpers.flags_of('--consensus=aligned'):
    assert _taken('consensus', 'prior') == ['aligned', None]
  with helpers.flags_of('--task=shakespeare', '--consensus=era'):
    assert _taken(*_CODE) == ['era', None, None]
  with helpers.flags_of('--task=shakespeare', '--transfer_size=50'):
    assert _taken('transfer_labels', 'transfer_per_round') == [50, 50]
  with helpers.flags_of('--task=movielens', '--transfer_labels=0'):
    assert _taken('distillation_weight') == [None]
  with helpers.flags_of('--task=movielens', '--transfer_labels=10'):
    assert _taken('distillation_weight')[0] > 0.5


def test_a_config_leaves_defaults_to_what_is_run_now(tmp_path):
  path = tmp_path / 'config.json'
  with helpers.flags_of('--task=shakespeare', '--client_epochs=2'):
    train_flags.take_defaults()
    config = train_flags.config()
  assert config['given'] == ['client_epochs', 'task']
  values = config['flags']
  path.write_text(json.dumps(config))
  with helpers.flags_of(f'--config={path}'):
    names = list(values)
    assert dict(zip(names, _taken(*names))) == {**values, 'config': str(path)}
  with helpers.flags_of(f'--config={path}', '--algorithm=fed_avg'):
    assert _taken(*_CODE, 'client_epochs') == [None, None, None, 2]
    # What was asked for in that run still has to fit.
    assert flags.FLAGS['client_epochs'].present and not flags.FLAGS['teacher'].present
  with helpers.flags_of(f'--config={path}', '--task=newsgroups'):
    assert _taken('student', 'num_clients', 'client_epochs') == [['embedding'], 20, 2]


def _config_of(path, *given):
  """Writes the config.json of a run with these flags."""
  with helpers.flags_of(*given):
    train_flags.take_defaults()
    path.write_text(json.dumps(train_flags.config()))


def test_what_is_given_is_given_again_by_a_config_whatever_the_default(tmp_path):
  path = tmp_path / 'config.json'
  _config_of(path, '--num_clients=20', '--server_learning_rate=1')
  # Both are defaults of mnist5k, and of another task and other builders they are not.
  with helpers.flags_of(f'--config={path}', '--task=cifar10'):
    assert _taken('num_clients', 'clients_per_round') == [20, 10]
    assert flags.FLAGS['server_learning_rate'].present


def test_a_config_takes_what_the_run_had_by_other_defaults(tmp_path, monkeypatch):
  path = tmp_path / 'config.json'
  _config_of(path, '--task=shakespeare')
  before = task_defaults.DEFAULTS['shakespeare']
  monkeypatch.setitem(
      task_defaults.DEFAULTS, 'shakespeare', before | {'client_epochs': 3}
  )
  with helpers.flags_of(f'--config={path}'):
    assert _taken('client_epochs', 'num_clients') == [1, 562]
    assert not flags.FLAGS['num_clients'].present
  # What the run had by default gives way to what is given here.
  with helpers.flags_of(f'--config={path}', '--prediction_bits=4'):
    assert _taken(*_CODE) == ['mean_probabilities', None, 4]
  with helpers.flags_of(f'--config={path}', '--transfer_size=50'):
    assert _taken('transfer_labels', 'transfer_per_round') == [50, 50]


def test_what_looks_at_a_run_does_not_run_where_it_ran(tmp_path):
  path = tmp_path / 'config.json'
  where = ['--device=GPU', '--ray_address=auto', '--ray_workers=3']
  _config_of(path, '--seed=4', *where)
  with helpers.flags_of():
    train_flags.take_run(tmp_path)
    assert train_flags.SEED.value == 4
    assert not train_flags.DEVICE.value and train_flags.RAY_ADDRESS.value is None
  with helpers.flags_of(f'--config={path}'):
    assert _taken('device', 'ray_workers') == [['GPU'], 3]


def test_a_device_that_is_not_there_is_a_sentence(tmp_path):
  folder = tmp_path / 'run'
  for further in ([], ['--dry_run']):
    said = helpers.refused_here(
        '--device=TPU:7', f'--output_dir={folder}', *further
    )
    assert "error: --device: There is no device 'TPU:7'. TensorFlow sees CPU" in said
  assert not folder.exists()


def test_an_algorithms_defaults_of_flags_are_below_a_tasks():
  own = {'knowledge_clip': '50'}  # Sums whose weights are secret need a number.
  assert task_defaults.defaults_of('mnist5k', 'fd') == own
  of_task = task_defaults.DEFAULTS['emnist']
  assert task_defaults.defaults_of('emnist', 'fd') == own | of_task
  assert 'knowledge_clip' not in task_defaults.defaults_of('emnist', 'fed_md')


def test_help_breaks_no_words():
  words = set()
  for flag in train_flags.own_flags().values():
    words.update(re.sub('^<[^>]*>: ', '', flag.help).split())
  module = importlib.import_module('pipelines.train')
  found = set(topics.help_text(module.__name__, 40).split())
  assert not words - found


@pytest.mark.parametrize(
    'flag, said',
    [
        ('--ronds=3', 'There is no flag --ronds. Did you mean --rounds?'),
        ('--xyzzy', 'There is no flag --xyzzy.'),
        (
            '--sampling=unifrom',
            '--sampling must be one of cyclic, poisson, uniform, weighted, found '
            "'unifrom'. Did you mean 'uniform'?",
        ),
        ('--algorithm=fed_avrg', "Did you mean 'fed_avg'?"),
        ('--task=movie_lens', "Did you mean 'movielens'?"),
        ('--consensus=mean_logit', "Did you mean 'mean_logits'?"),
        ('--tracker=tensorbord', "Did you mean 'tensorboard'?"),
        ('--rounds=many', '--rounds=many'),
        ('--client_clip_norm=0', '--client_clip_norm must be a finite number above 0'),
    ],
)
def test_a_wrong_flag_names_what_is_near(flag, said, capsys, monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['train', flag])
  # Parsed in copies: what is wrong must not stay.
  monkeypatch.setattr(pipelines.flags, 'FLAGS', copy.deepcopy(flags.FLAGS))
  with pytest.raises(app.UsageError) as error:
    pipelines._parse(['train', flag])
  assert said in str(error.value)


def test_a_wrong_flag_ends_with_how_to_get_help():
  done = helpers.script('pipelines.train', '--ronds=3', status=1)
  assert done.stdout == ''
  assert done.stderr == (
      'error: There is no flag --ronds. Did you mean --rounds?\nTry --help.\n'
  )


def test_without_run_the_runs_are_listed(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)

  def said(path):
    with pytest.raises(pipelines.UserError) as error:
      run_folders.chosen(path, 'audit')
    return str(error.value)

  assert said(None).startswith(
      f'--run must name the folder of a run. There is none in {tmp_path / "runs"}: '
      '`python -m pipelines.train` makes one'
  )
  for age, name in enumerate(('new', 'old')):
    folder = tmp_path / 'runs' / name
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text('{}')
    os.utime(folder / 'config.json', (1000 - age, 1000 - age))
  (tmp_path / 'runs' / 'cache').mkdir()
  assert 'For example: python -m pipelines.audit --run=runs/new\n' in said(None)
  assert said(None).endswith('newest first:\n  runs/new\n  runs/old')
  assert said('runs/cache').startswith('--run=runs/cache holds no run')
  assert run_folders.chosen('runs/old', 'audit') == pathlib.Path('runs/old')


@pytest.mark.parametrize('script', ['evaluate', 'audit', 'export'])
def test_scripts_ask_for_a_run(script):
  done = helpers.script(f'pipelines.{script}', status=1)
  assert done.stderr.startswith('error: --run must name the folder of a run.')


def test_trackers_must_be_installed(monkeypatch):
  monkeypatch.setattr(train_flags.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(flags.IllegalFlagValueError, match='--tracker=wandb needs the pack'):
    with helpers.flags_of('--tracker=tensorboard,wandb'):
      pass


def test_rates_follow_the_rounds_as_flags_say():
  given = ('--client_rate_schedule=cosine', '--client_warmup_rounds=2', '--rounds=6')
  with helpers.flags_of(*given, '--client_learning_rate=0.4'):
    (schedule,) = train_process.schedules()
    expected = tff_kd.simulation.round_schedule(
        'cosine', 0.4, num_rounds=6, warmup_rounds=2
    )
    rounds = range(1, 7)
    assert list(map(schedule._schedule, rounds)) == list(map(expected, rounds))
    assert train_checks.has_falling_rate()
  with helpers.flags_of('--server_warmup_rounds=1'):
    assert len(train_process.schedules()) == 1 and not train_checks.has_falling_rate()
  with helpers.flags_of():
    assert train_process.schedules() == []


@pytest.mark.parametrize(
    ('flag', 'is_replaced'),
    [
        ('--server_warmup_rounds=1', True), ('--server_rate_schedule=linear', True),
        ('--server_learning_rate=1', True), ('--client_warmup_rounds=1', False),
    ],
)
def test_a_builders_own_optimizer_of_the_server_stays_without_a_flag(flag, is_replaced):
  task = types.SimpleNamespace(
      students={'mlp_small': None}, loss_fn=None, metrics_fn=None
  )
  with helpers.flags_of(flag):
    common = train_process.common_arguments(
        task, types.SimpleNamespace(element_spec=None)
    )
    scheduled = {schedule._optimizer for schedule in train_process.schedules()}
  # Its rate is only scheduled where it is that of the flags.
  assert ('server_optimizer' in common) == is_replaced
  assert is_replaced or 'server' not in scheduled


@pytest.mark.slow
def test_a_run_takes_every_flag_of_the_clients_optimizer(tmp_path):
  helpers.train_here(
      *helpers.TINY_RUN, '--rounds=2', f'--output_dir={tmp_path / "run"}',
      '--client_momentum=0.9', '--client_weight_decay=0.01', '--client_clip_norm=1',
      '--client_rate_schedule=linear', '--server_rate_schedule=cosine',
      '--server_warmup_rounds=1',
  )
  rows = helpers.rows(tmp_path / 'run' / 'metrics.csv')
  assert len(rows) == 2 and float(rows[-1]['client_work/train/loss']) > 0
  said = helpers.refused_here(
      f'--config={tmp_path / "run" / "config.json"}',
      f'--output_dir={tmp_path / "run"}', '--rounds=3',
  )
  assert 'other values of --rounds' in said  # The rates would be others.


def test_an_own_algorithm_takes_flags_that_there_are(tmp_path):
  source = (helpers.ROOT / 'examples' / 'own_algorithm.py').read_text()
  path = tmp_path / 'mine.py'
  path.write_text(source.replace("'proximal_weight'", "'my_weight'"))
  assert 'my_weight' in path.read_text()
  with pytest.raises(
      app.UsageError, match='parameter decay the value of --my_weight, which is not a'
  ):
    helpers.train_here(f'--algorithm={path}', f'--output_dir={tmp_path / "out"}')


def test_an_own_algorithm_says_what_clients_keep(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(
      'import dataclasses\n'
      'from tff_kd import algorithms\n'
      "INFO = dataclasses.replace(algorithms.REGISTRY['fed_per'], keeps='model')\n"
  )
  said = helpers.refused_here(f'--algorithm={path}', '--dry_run')
  assert "INFO of fed_per must have keeps='layers', which is what" in said


def test_flags_of_models_that_clients_keep():
  """By which `pipelines.compare` gives each algorithm those that it takes."""
  taken = {
      flag: [
          name for name in ('fed_avg', 'ds_fl', 'fed_kd', 'fed_per', 'fed_md')
          if train_flags.is_taken(tff_kd.algorithms.REGISTRY[name], flag)
      ]
      for flag in ('evaluated_clients', 'pretrain_epochs')
  }
  assert taken == {
      'evaluated_clients': ['ds_fl', 'fed_kd', 'fed_per', 'fed_md'],
      'pretrain_epochs': ['fed_avg', 'fed_kd', 'fed_md'],
  }
