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


@rounds.takes_options  # seed=, privacy=, model_aggregator= and so on.
def build_decay(
    *, student_fn, input_spec, loss_fn, client_optimizer, decay: float = 1e-3,
    metrics_fn=None, options: rounds.Options,
):
  students = tff_kd.models.cohorts.build_students(
      student_fn, input_spec=input_spec, loss_fn=loss_fn, metrics_fn=metrics_fn
  )
  parts = rounds.Parts(
      students=students, client_optimizer=client_optimizer, local_terms=[Decay(decay)]
  )
  return rounds.compose_process(parts, options)


INFO = tff_kd.algorithms.Info(  # The flag's value goes to the builder's parameter.
    build=build_decay, summary='averaging, with weights that are kept small',
    uploads=('weights',), flags={'decay': 'proximal_weight'},
)
