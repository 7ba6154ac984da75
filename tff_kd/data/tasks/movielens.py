"""MovieLens-100k: how many stars a person gives to a film; clients are the people.

The ratings are a file of the package recbole. (GroupLens's terms allow research and
forbid redistribution.)

There are no per-user embeddings: the models have weights of films only, and derive the
user's representation from the ratings on the user's device, which are inputs. Nothing
user-specific is stored, trained or sent, and new users work. (`tff.learning`'s
reconstruction trains such a part when it is needed; here it is a sum.) The transfer set
pairs volunteers, who are not clients, with films, both rated and unrated.

Sources: Koren, "Factorization Meets the Neighborhood" (KDD 2008), section 3.2, asymmetric
SVD: a user is the sum of the rated films, weighted by how far each rating is above its
expectation; He et al., "Neural Collaborative Filtering" (WWW 2017), section 4, the
ranking of one film of each user against 99 unrated ones.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops
import numpy as np

from tff_kd.data import partition
from tff_kd.data import task as task_lib

_PACKAGE = 'recbole'
_FILE = 'recbole/dataset_example/ml-100k/ml-100k.inter'
NUM_RATINGS, NUM_USERS, NUM_FILMS = 100_000, 943, 1682
# The number of a person's other ratings that are inputs.
HISTORY = 40
# People who are not clients; drawn once, the same for every seed.
NUM_VOLUNTEERS = 100
_SPLIT_SEED = 19980422
_TEST_SHARE = 0.1
# How many unrated films a liked one is ranked against, and how many ranks are a hit.
_NUM_OTHERS, _LIST_LENGTH = 99, 10
_LIKED = 4.0


def read_ratings() -> np.ndarray:
  """Reads rows of (person, film, stars); persons count from 0 and films from 1.

  Returns:
    int32 `[100000, 3]`.
  """
  path = task_lib.package_file('movielens', _PACKAGE, _FILE)
  with open(path, encoding='utf-8') as file:
    table = np.loadtxt(file, delimiter='\t', skiprows=1, dtype=np.float64)
  if table.shape != (NUM_RATINGS, 4):
    raise ValueError(
        f'The data file {path} should hold {NUM_RATINGS} rows of 4 columns, found '
        f'{table.shape}.'
    )
  return (table[:, :3] - [1, 0, 0]).astype(np.int32)


def build_examples(
    targets: np.ndarray, histories: dict[int, np.ndarray], rng: np.random.Generator
) -> task_lib.Examples:
  """Builds examples of ratings, each with other ratings of the same person as inputs.

  Args:
    targets: Ratings (person, film, stars), int `[n, 3]`.
    histories: By person, the ratings `[m, 3]` that may be inputs. An example's own
      rating is never among its inputs.
    rng: Draws 40 of them where there are more.

  Returns:
    Inputs film int32 `[n]`, films int32 `[n, 40]` and stars float32 `[n, 40]`, padded
    with 0; labels float32 `[n]`.
  """
  films = np.zeros((len(targets), HISTORY), np.int32)
  stars = np.zeros((len(targets), HISTORY), np.float32)
  for row, (person, film, _) in enumerate(targets):
    history = histories[person]
    history = history[history[:, 1] != film]
    if len(history) > HISTORY:
      history = history[rng.choice(len(history), HISTORY, replace=False)]
    films[row, : len(history)] = history[:, 1]
    stars[row, : len(history)] = history[:, 2]
  inputs = {
      'film': targets[:, 1].astype(np.int32), 'films': films, 'stars': stars,
  }
  return task_lib.Examples(inputs, targets[:, 2].astype(np.float32))


def _inputs() -> dict[str, Any]:
  return {
      'film': keras.Input((), dtype='int32', name='film'),
      'films': keras.Input((HISTORY,), dtype='int32', name='films'),
      'stars': keras.Input((HISTORY,), name='stars'),
  }


@keras.saving.register_keras_serializable(package='tff_kd')
class Tastes(keras.layers.Layer):
  """Predicts the stars of a film from a person's other ratings.

  Let m be the mean of all ratings, b a film's bias, and n the number of other ratings r.
  The person's bias is u = sum(r - m - b) / (n + 5). The person's vector is p = sum((r - m
  - b - u) x) / sqrt(n + 1), with x the vector of a rated film. The prediction for a film
  with the vector q is m + b + u + p q.

  Takes the inputs of the task; returns (stars `[batch, 1]`, p and q, `[batch, width]`).
  """

  def __init__(self, width: int, **kwargs):
    super().__init__(**kwargs)
    self.width = width

    def embedding(width: int, initializer: Any = 'zeros') -> keras.layers.Layer:
      return keras.layers.Embedding(
          NUM_FILMS + 1, width, embeddings_initializer=initializer,
          dtype=self.dtype_policy,
      )

    self.bias = embedding(1)
    self.rated, self.asked = (
        embedding(width, keras.initializers.RandomNormal(stddev=0.05))
        for _ in range(2)
    )

  def build(self, input_shape):
    self.mean = self.add_weight(
        shape=(), initializer=keras.initializers.Constant(3.5), name='mean'
    )
    for embedding in (self.bias, self.rated, self.asked):
      embedding.build(input_shape['films'])
    super().build(input_shape)

  def call(self, inputs):
    films, stars = inputs['films'], inputs['stars']
    there = ops.cast(films > 0, stars.dtype)
    count = ops.sum(there, axis=1, keepdims=True)
    above = (stars - self.mean - self.bias(films)[..., 0]) * there
    own = ops.sum(above, axis=1, keepdims=True) / (count + 5.0)
    above = (above - own) * there
    tastes = ops.sum(above[..., None] * self.rated(films), axis=1)
    tastes /= ops.sqrt(count + 1.0)
    asked = self.asked(inputs['film'])
    affinity = ops.sum(tastes * asked, axis=1, keepdims=True)
    return self.mean + self.bias(inputs['film']) + own + affinity, tastes, asked

  def get_config(self):
    return {**super().get_config(), 'width': self.width}


def build_factors(width: int = 16) -> keras.Model:
  """Builds the asymmetric SVD."""
  inputs = _inputs()
  stars, _, _ = Tastes(width)(inputs)
  return keras.Model(inputs, stars)


def build_deep(
    width: int = 64, units: tuple[int, ...] = (64, 32), decay: float = 3e-3
) -> keras.Model:
  """Builds a wider one with dense layers over both vectors and their product.

  Args:
    width: The size of a film's vectors.
    units: The widths of the dense layers.
    decay: The L2 factor of their kernels.
  """
  small = keras.regularizers.L2(decay)
  layers = keras.layers
  inputs = _inputs()
  stars, tastes, film = Tastes(width)(inputs)
  product = layers.Multiply()([tastes, film])
  x = layers.Concatenate()([tastes, film, product])
  for count in units:
    x = layers.Dense(count, activation='relu', kernel_regularizer=small)(x)
  x = layers.Dense(1, kernel_initializer='zeros', kernel_regularizer=small)(x)
  return keras.Model(inputs, layers.Add()([stars, x]))


def ranking_scores(
    predict_fn: Callable[[Any], np.ndarray], candidates: task_lib.Examples
) -> dict[str, float]:
  """Ranks a liked film of each person against 99 unrated ones.

  Args:
    predict_fn: Maps inputs to outputs `[n, 1]`.
    candidates: 100 consecutive examples for each person, the liked film first.

  Returns:
    `hit_rate_10`, how often the liked film ranks in the top ten, and `ndcg_10`, the mean
    of 1 / log2(1 + rank) over these, and 0 otherwise.
  """
  scores = predict_fn(candidates.inputs).reshape(-1, _NUM_OTHERS + 1)
  # A liked film ranks in the middle of equal scores.
  place = (
      1.0 + (scores[:, 1:] > scores[:, :1]).sum(axis=1)
      + 0.5 * (scores[:, 1:] == scores[:, :1]).sum(axis=1)
  )
  hit = place <= _LIST_LENGTH
  return {
      'hit_rate_10': float(hit.mean()),
      'ndcg_10': float(np.mean(hit / np.log2(1.0 + place))),
  }


def load(
    *, seed: int, transfer_size: int = 1000, validation_size: int = 500
) -> task_lib.Task:
  """Loads the task `movielens`.

  A tenth of each client's ratings is the test part, the same for every seed. These
  ratings are never inputs.

  Args:
    seed: Decides the inputs, and the pairs of the transfer set.
    transfer_size: The number of pairs of a volunteer and a film. The first half of them
      are rated, and the server knows some of these labels (--transfer_labels); the
      others are unrated.
    validation_size: The number of volunteers' ratings that choose the best round.

  Returns:
    A `Task`, a regression: from a film and up to 40 films with stars to the film's stars.

  Raises:
    ValueError: If the volunteers have no more ratings than `validation_size`.
  """
  ratings = read_ratings()
  fixed = np.random.default_rng(_SPLIT_SEED)
  volunteers = fixed.permutation(NUM_USERS)[:NUM_VOLUNTEERS]
  rng = np.random.default_rng(seed)

  by_person = _by_person(ratings)
  histories = {person: by_person[person] for person in volunteers}
  clients = np.setdiff1d(np.arange(NUM_USERS), volunteers)
  train, tests = _train_and_test([by_person[person] for person in clients], fixed)
  histories |= zip(clients, train)

  rated = rng.permutation(ratings[np.isin(ratings[:, 0], volunteers)])
  if validation_size >= len(rated):
    raise ValueError(
        f'--validation_size is {validation_size}, but the volunteers of the task have '
        f'only {len(rated)} ratings. Lower it.'
    )
  validation, labelled = rated[:validation_size], rated[validation_size:]
  num_rated = min(transfer_size // 2, len(labelled))
  asked = np.concatenate([
      labelled[:num_rated],
      _unrated(rng, volunteers, by_person, transfer_size - num_rated),
  ])
  candidates = _candidates(fixed, tests, by_person)

  def build_tests(targets: np.ndarray) -> task_lib.Examples:
    return build_examples(targets, histories, np.random.default_rng(_SPLIT_SEED))

  ranked = build_tests(candidates)
  return task_lib.Task(
      name='movielens',
      clients=build_examples(np.concatenate(train), histories, rng),
      client_rows=partition.consecutive([len(part) for part in train]),
      transfer=build_examples(asked, histories, rng),
      validation=build_examples(validation, histories, rng),
      test=build_tests(np.concatenate(tests)),
      test_rows=partition.consecutive([len(part) for part in tests]),
      num_classes=None,
      num_labelled=num_rated,
      loss_fn=keras.losses.MeanSquaredError,
      metrics_fn=lambda: [keras.metrics.RootMeanSquaredError(name='rmse')],
      scores_fn=lambda predict_fn: ranking_scores(predict_fn, ranked),
      students={'factors': build_factors},
      teachers={'deep': build_deep},
  )


def _by_person(ratings: np.ndarray) -> list[np.ndarray]:
  """Returns the ratings `[m, 3]` of each person, in the order of the file."""
  counts = np.bincount(ratings[:, 0], minlength=NUM_USERS)
  order = np.argsort(ratings[:, 0], kind='stable')
  return np.split(ratings[order], np.cumsum(counts)[:-1])


def _train_and_test(
    parts: Sequence[np.ndarray], rng: np.random.Generator
) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """Sets a random tenth of each person's ratings aside, at least one."""
  train, tests = [], []
  for ratings in parts:
    shuffled = rng.permutation(ratings)
    cut = max(1, round(_TEST_SHARE * len(shuffled)))
    tests.append(shuffled[:cut])
    train.append(shuffled[cut:])
  return train, tests


def _unrated(
    rng: np.random.Generator, people: np.ndarray, by_person: Sequence[np.ndarray],
    size: int,
) -> np.ndarray:
  """Returns random unrated pairs, `[size, 3]`, with 0 in place of the stars."""
  pairs = []
  while len(pairs) < size:
    person, film = rng.choice(people), rng.integers(1, NUM_FILMS + 1)
    if film not in by_person[person][:, 1]:
      pairs.append((person, film, 0))
  return np.array(pairs, np.int32).reshape(-1, 3)


def _candidates(
    rng: np.random.Generator, tests: list[np.ndarray], by_person: Sequence[np.ndarray]
) -> np.ndarray:
  """Returns a liked film of the test part and 99 unrated ones, for each person."""
  rows = []
  for ratings in tests:
    liked = ratings[ratings[:, 2] >= _LIKED]
    if not len(liked):
      continue
    person = liked[0, 0]
    others = np.setdiff1d(np.arange(1, NUM_FILMS + 1), by_person[person][:, 1])
    others = rng.choice(others, _NUM_OTHERS, replace=False)
    films = np.concatenate([liked[:1, 1], others])
    rows.append(np.stack([np.full(len(films), person), films, 0 * films], axis=1))
  return np.concatenate(rows).astype(np.int32)
