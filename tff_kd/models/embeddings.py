"""Ids that an embedding does not have, found before they are looked up.

At such an id TensorFlow fails on a CPU and returns zeros on a GPU, and Keras counts a
negative one from the end. The ids of one client must neither end the round for all
clients nor train rows of the embedding that they do not mean.
"""

from collections.abc import Callable, Iterator
import contextlib
import contextvars
import functools
import threading
from typing import Any, NamedTuple, Optional
from unittest import mock

import keras
import tensorflow as tf


class _Block(NamedTuple):
  """One active `checked_ids` block.

  Attributes:
    graph: The graph in which it began; `None` if eager.
    training: Whether the model trains.
    bad: The list that it yields.
  """

  graph: Optional[tf.Graph]
  training: bool
  bad: list[tf.Tensor]


# `Embedding.call` is shared by all threads: one block at a time replaces it, and calls of
# other threads pass through.
_LOCK = threading.RLock()
_BLOCK: contextvars.ContextVar[Optional[_Block]] = contextvars.ContextVar(
    'block', default=None
)


@contextlib.contextmanager
def checked_ids(*, training: bool) -> Iterator[list[tf.Tensor]]:
  """Makes embeddings look up only ids that they have, while the block lasts.

  For any other id an embedding returns NaN. In training it returns the vector of id 0
  instead, and the yielded list records the bad id. (In a graph within the graph of the
  block, such as the body of a loop, it returns NaN in training, too.)

  Args:
    training: Whether the model that is called trains.

  Yields:
    A list that gets a bool scalar for each lookup in the graph of the block: whether an
    id was not in the embedding.
  """
  block = _Block(_graph(), training, [])
  token = _BLOCK.set(block)
  try:
    with _LOCK, mock.patch.object(
        keras.layers.Embedding, 'call', _checked(keras.layers.Embedding.call)
    ):
      yield block.bad
  finally:
    _BLOCK.reset(token)


def _graph() -> Optional[tf.Graph]:
  return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def _checked(call: Callable[..., Any]) -> Callable[..., Any]:
  """Returns `Embedding.call` with a check of the ids."""

  @functools.wraps(call)
  def checked_call(layer, inputs, *args, **kwargs):
    block = _BLOCK.get()
    if block is None or not isinstance(inputs, tf.Tensor):
      return call(layer, inputs, *args, **kwargs)
    ids = inputs if inputs.dtype.is_integer else tf.cast(inputs, tf.int32)
    wide = tf.cast(ids, tf.int64)
    is_known = (wide >= 0) & (wide < layer.input_dim)
    found = call(layer, tf.where(is_known, ids, tf.zeros_like(ids)), *args, **kwargs)
    if _graph() is block.graph:
      block.bad.append(~tf.reduce_all(is_known))
      if block.training:
        return found
    nan = tf.constant(float('nan'), found.dtype)
    return tf.where(is_known[..., tf.newaxis], found, nan)

  return checked_call
