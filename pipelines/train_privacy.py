"""The privacy flags of `pipelines.train`: checks, protections, the account."""

import hashlib
import pathlib
import secrets
from typing import Any, Optional, Union

import numpy as np

from pipelines import run_folders
from pipelines import train_checks
from pipelines import train_flags as args
from pipelines import UserError
import tff_kd
from tff_kd import privacy

# The ledger, in a run folder.
LEDGER = 'privacy.json'


def sampling() -> privacy.ClientSampling:
  """Returns how the clients of a round are chosen, as the privacy account sees it."""
  return privacy.ClientSampling(
      num_clients=args.NUM_CLIENTS.value,
      clients_per_round=args.CLIENTS_PER_ROUND.value,
      sampling=args.SAMPLING.value,
  )


def build_guards() -> dict[str, Any]:
  """Returns the arguments of a process for privacy and secure aggregation."""
  found = {}
  if train_checks.is_private():
    noise = args.NOISE_MULTIPLIER.value
    if noise is None:
      noise = privacy.find_noise_multiplier(
          args.EPSILON.value, args.DELTA.value, args.ROUNDS.value, sampling()
      )

    def clip(text: str) -> Union[float, str]:
      return text if text == 'adaptive' else float(text)

    found['privacy'] = privacy.DifferentialPrivacy(
        noise_multiplier=noise,
        clients_per_round=args.CLIENTS_PER_ROUND.value,
        model_clip=clip(args.MODEL_CLIP.value),
        knowledge_clip=clip(args.KNOWLEDGE_CLIP.value or 'adaptive'),
        knowledge_share=args.KNOWLEDGE_SHARE.value,
        channels=args.PRIVATE_CHANNELS.value or None,
    )
  if args.SECURE_AGGREGATION.value:
    found['secure_aggregation'] = privacy.SecureAggregation(
        model_bound=args.SECURE_MODEL_BOUND.value,
        knowledge_bound=args.SECURE_KNOWLEDGE_BOUND.value,
        bits=args.SECURE_BITS.value,
        # With late reports, more clients may report than were chosen.
        max_clients=args.NUM_CLIENTS.value,
    )
  return found


def check_disjoint(task: tff_kd.data.Task) -> None:
  """Refuses server examples that are clients', too: no noise would hide them."""

  def keys(examples) -> list[bytes]:
    inputs = examples.inputs
    arrays = list(inputs.values()) if isinstance(inputs, dict) else [inputs]
    flat = [np.ascontiguousarray(a).reshape(len(examples), -1) for a in arrays]
    return [
        hashlib.sha256(b'|'.join(row.tobytes() for row in rows)).digest()
        for rows in zip(*flat)
    ]

  of_clients = set(keys(task.clients))
  for name in ('transfer', 'validation'):
    shared = sum(key in of_clients for key in keys(getattr(task, name)))
    if shared:
      raise UserError(
          f"{shared} of the server's {name} examples are clients' examples, too: what "
          'the server has in the clear no noise can hide. Take them out of one of the '
          'two.'
      )


def check_budget(process) -> None:
  """Refuses a budget that the first round would pass."""
  accountant = build_accountant(process, None)
  if not accountant.allows_another_round(1):
    raise UserError(
        f'One round costs an epsilon of {accountant.epsilon(1):.3g}, more than '
        f'--epsilon={args.EPSILON.value:g}. Raise --noise_multiplier, or leave it out.'
    )


def build_accountant(
    process, run_dir: Optional[pathlib.Path]
) -> privacy.PrivacyAccountant:
  """Builds the accountant of a private run; the ledger is in the folder, if given."""
  return privacy.build_accountant(
      process.protection,
      sampling=sampling(),
      delta=args.DELTA.value,
      max_epsilon=np.inf if args.EPSILON.value is None else args.EPSILON.value,
      ledger_path=run_dir / LEDGER if run_dir is not None else None,
  )


def sampling_seed(run_dir: pathlib.Path) -> int:
  """Returns the secret seed of participation, which the privacy account requires."""
  path = run_dir / LEDGER
  if not path.exists():
    if (run_dir / run_folders.METRICS).exists():
      raise UserError(
          f'{path} is not there, so that what the rounds of this run have spent is not '
          'known. Bring it back from a copy, or name another --output_dir.'
      )
    privacy.accounting.write_ledger(
        path, {'begun': {}, 'sampling_seed': secrets.randbits(128)}
    )
  return privacy.accounting.read_ledger(path)['sampling_seed']


def print_guards(process, accountant: Optional[privacy.PrivacyAccountant]) -> None:
  names = {'model': 'weights', 'knowledge': 'predictions'}
  if accountant is not None:
    noise = process.protection.privacy.noise_multipliers(process.protection.channels)
    print(
        'Differential privacy, of a client with all of its examples ('
        f'{accountant.sampling.neighbors}; {args.SAMPLING.value} sampling): noise '
        + ', '.join(f'{z:.3g} x clip on {names[c]}' for c, z in noise.items())
        + f'; epsilon {accountant.epsilon(args.ROUNDS.value):.3g} at delta '
        f'{accountant.delta:g} after {args.ROUNDS.value} rounds. It is against those who '
        'see models and broadcasts; the server adds the noise, and is trusted.'
    )
    if process.description.kept_models is not None:
      print(
          "The accuracy of clients' own models is the simulator's look at what never "
          'leaves them: it is in no account.'
      )
  if process.protection.secure_aggregation is not None:
    print(
        'Secure aggregation: its numerics only. This simulation sums in the clear and '
        'keeps nothing secret.'
    )
