"""Private and secure runs of `pipelines.train`, as a user starts them."""

import dataclasses
import json

import numpy as np
import pytest

from pipelines import export_job
from pipelines import train_flags
from pipelines import train_privacy
from pipelines import UserError
from tests import helpers
from tff_kd import data


def _train(folder, *args):
  return helpers.train_here(*helpers.TINY_RUN, f'--output_dir={folder}', *args)


@pytest.fixture(scope='module')
def private_run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('private') / 'run'
  args = ('--epsilon=20', '--rounds=3', '--sampling=poisson')
  return folder, args, _train(folder, *args)


def test_it_says_what_is_private_and_what_that_cost(private_run):
  folder, _, printed = private_run
  assert 'one client added or removed; poisson sampling' in printed
  assert 'the server adds the noise, and is trusted' in printed
  assert '\nPrivacy: epsilon ' in printed
  rows = helpers.rows(folder / 'metrics.csv')
  costs = [float(row['privacy/epsilon']) for row in rows]
  assert costs == sorted(costs) and 19 < costs[-1] <= 20
  assert json.loads((folder / 'results.json').read_text())['epsilon'] == costs[-1]
  ledger = json.loads((folder / 'privacy.json').read_text())
  assert ledger['begun'] == [[1, 3, 1]]
  # A secret: nobody finds out by trying who took part.
  assert ledger['sampling_seed'] > 2**64


def test_the_model_card_has_the_privacy_account(private_run):
  folder, _, _ = private_run
  with helpers.flags_of(f'--config={folder / "config.json"}'):
    train_flags.take_defaults()
    export_job.run(
        folder, folder / 'export', names=[], formats=['keras'], num_examples=20
    )
  card = (folder / 'export' / 'MODEL_CARD.md').read_text()
  epsilon = json.loads((folder / 'results.json').read_text())['epsilon']
  assert f'Differential privacy with epsilon {epsilon:.4g} at delta 1e-05' in card
  assert 'one client added or removed; poisson sampling' in card
  assert 'for all that 3 rounds released' in card and 'No privacy guarantee' not in card
  # The seed of the participation stays a secret.
  seed = json.loads((folder / 'privacy.json').read_text())['sampling_seed']
  assert str(seed) not in card


def test_it_leaves_nothing_of_single_clients(private_run):
  folder, _, _ = private_run
  header = (folder / 'metrics.csv').read_text().splitlines()[0]
  for name in ('num_', 'client_work', 'participation'):
    assert name not in header
  assert not (folder / 'partition.png').exists()
  assert not list(folder.glob('fed_avg_*'))


def test_a_lost_ledger_or_other_rounds_are_refused(private_run):
  folder, args, _ = private_run

  def refusal(*more):
    return helpers.refused_here(
        *helpers.TINY_RUN, f'--output_dir={folder}', *args, *more
    )

  assert 'had other values of --rounds (3)' in refusal('--rounds=9')
  ledger = (folder / 'privacy.json').rename(folder / 'elsewhere')
  error = refusal()
  ledger.rename(folder / 'privacy.json')
  assert 'what the rounds of this run have spent is not known' in error


@pytest.mark.slow
def test_rounds_that_were_begun_are_spent_and_the_budget_ends_the_run(private_run):
  folder, args, _ = private_run
  # As if three rounds had been begun after the last checkpoint, and lost.
  for path in folder.glob('checkpoints/*'):
    if path.name.rpartition('_')[2] not in ('1', '2'):
      path.rename(folder / 'newest')
  assert 'another round would pass the privacy budget' in _train(folder, *args)
  assert json.loads((folder / 'privacy.json').read_text())['begun'] == [[1, 3, 1]]


@pytest.mark.slow
def test_secure_aggregation_says_that_it_keeps_nothing_secret(tmp_path):
  done = helpers.train(
      *helpers.TINY_RUN, f'--output_dir={tmp_path / "run"}', '--rounds=1',
      '--secure_aggregation', '--secure_bits=12', '--secure_model_bound=100',
  )
  assert 'sums in the clear and keeps nothing secret' in done.stdout
  assert 'never used' not in done.stderr


def test_a_server_example_that_is_a_clients_is_refused():
  rng = np.random.default_rng(0)

  def examples(n):
    return data.Examples(np.float32(rng.random((n, 3))), np.zeros(n, np.int32))

  clients, transfer = examples(5), examples(4)
  task = helpers.task(
      clients, transfer=transfer, validation=examples(3), test=examples(3)
  )
  train_privacy.check_disjoint(task)
  shared = data.Examples(
      np.concatenate([transfer.inputs, clients.inputs[1:3]]), np.zeros(6, np.int32)
  )
  with pytest.raises(UserError, match="2 of the server's transfer examples"):
    train_privacy.check_disjoint(dataclasses.replace(task, transfer=shared))
