"""An algorithm of your own: averaging, with clients that keep their weights small.

  python -m pipelines.train --algorithm=examples/own_algorithm.py --proximal_weight=0.1
"""

import tensorflow as tf
import tff_kd
from tff_kd import rounds


class Decay(tff_kd.client.local_terms.LocalTerm):
  """L + weight / 2 ||w||^2, over the trainable weights."""

  def __init__(self, weight: float):
    self._weight = weight

  def __call__(self, loss, step):
    squares = [tf.reduce_sum(tf.square(w)) for w in step.weights]
    return loss + 0.5 * self._weight * tf.add_n(squares)


@rounds.takes_options  # input_spec=, loss_fn=, seed=, privacy= and so on.
def build_decay(
    *, student_fn, training: rounds.ClientTraining, decay: float = 1e-3,
    options: rounds.Options,
):
  parts = rounds.Parts(
      students=training.build_students(student_fn),
      client_optimizer=training.client_optimizer,
      local_terms=[Decay(decay)],
  )
  return rounds.compose_process(parts, options)


INFO = tff_kd.algorithms.Info(  # The flag's value goes to the builder's parameter.
    build=build_decay, summary='averaging, with weights that are kept small',
    uploads=('weights',), flags={'decay': 'proximal_weight'},
)
