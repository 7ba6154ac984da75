"""Ids that an embedding does not have, found before they are looked up.

TensorFlow ends a computation at such an id where it runs on a CPU and takes zeros on a
GPU, and Keras counts a negative one from the end. One client's ids must neither end the
round for all nor train on what they do not mean.
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
  """A `checked_ids`.

  Attributes:
    graph: The graph in which it began; `None` if eager.
    training: Whether the model trains.
    bad: The list that it yields.
  """

  graph: Optional[tf.Graph]
  training: bool
  bad: list[tf.Tensor]


# One at a time replaces what all embeddings share; those of other threads are left alone.
_LOCK = threading.RLock()
_BLOCK: contextvars.ContextVar[Optional[_Block]] = contextvars.ContextVar(
    'block', default=None
)


@contextlib.contextmanager
def checked_ids(*, training: bool) -> Iterator[list[tf.Tensor]]:
  """Within it, embeddings look up only ids that they have.

  What an embedding returns for another id is not a number; in training, it is whatever
  there is for id 0, and the list tells. (In a graph within the block's own, such as the
  body of a loop, it is not a number in training, too.)

  Args:
    training: Whether the model that is called trains.

  Yields:
    A list, which gets a bool scalar for each lookup in the block's own graph: whether it
    met an id that the embedding does not have.
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
  """`Embedding.call` with a look at the ids."""

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
