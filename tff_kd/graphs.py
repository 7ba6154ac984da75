"""`tf.function` without AutoGraph's reading of all that is called.

AutoGraph would parse and rewrite every function that it meets, of this package and of
TFF, for a quarter of what a script's start takes. None of them needs that: they say
`tf.cond` and `tf.while_loop` themselves.
"""

from collections.abc import Callable
import functools
from typing import Any

import tensorflow as tf

# What AutoGraph is outside of any function: Keras lets it read the user's own layers,
# losses and metrics then. (`autograph=False` alone would forbid that, too.)
_AS_USUAL = tf.__internal__.autograph.control_status_ctx()


def function(fn: Callable[..., Any]) -> Callable[..., Any]:
  """As `tf.function`, but AutoGraph reads only what Keras has it read.

  What else is the user's, such as a schedule, is to be called as a `tf.function`.
  """

  @functools.wraps(fn)
  def as_it_stands(*args, **kwargs):
    with _AS_USUAL:
      return fn(*args, **kwargs)

  return tf.function(as_it_stands, autograph=False)
