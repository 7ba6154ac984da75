"""How the mean update moves the student."""

import collections
from typing import Any

import tensorflow as tf
from tff_kd.compat import tff

from tff_kd import graphs
from tff_kd.models import cohorts
from tff_kd import optimizers


def build_student_finalizer(
    students: cohorts.Students, optimizer: optimizers.Optimizer
) -> tff.learning.templates.FinalizerProcess:
  """Builds what moves the student, or each cohort's, along the mean update.

  Trainable weights take a step of the server optimizer (FedOpt); the statistics
  that layers keep (batch norm) take the mean itself. An update that is not
  finite, such as the mean over no client, is rejected whole.

  Args:
    students: The student, or those of the cohorts.
    optimizer: A TFF optimizer, or a function that returns a Keras one.

  Returns:
    A `FinalizerProcess`. `update_non_finite` is 1 if the update was rejected; with
    cohorts, it counts those whose update was, also because none of its clients took
    part.
  """
  weights_type = students.weights_type
  steppers = [
      optimizers.build_stepper(optimizer, spec.trainable_variables)
      for spec in students.specs
  ]

  @graphs.computation()
  def init_tf():
    return students.pack([stepper.initialize() for stepper in steppers])

  state_type = init_tf.type_signature.result

  # A mean over clients has the type of what is averaged.
  @graphs.computation(state_type, weights_type, students.update_type)
  def next_tf(state, weights, update):
    results = [
        _finalize(*arguments)
        for arguments in zip(steppers, *map(students.unpack, (state, weights, update)))
    ]
    states, new_weights, rejected = zip(*results)
    measurements = collections.OrderedDict(update_non_finite=tf.add_n(rejected))
    return students.pack(states), students.pack(new_weights), measurements

  @tff.federated_computation
  def init_fn():
    return tff.federated_eval(init_tf, tff.SERVER)

  @tff.federated_computation(
      init_fn.type_signature.result,
      tff.FederatedType(weights_type, tff.SERVER),
      tff.FederatedType(students.update_type, tff.SERVER),
  )
  def next_fn(state, weights, update):
    return tff.templates.MeasuredProcessOutput(
        *tff.federated_map(next_tf, (state, weights, update))
    )

  hparams_fns = {}
  if isinstance(optimizer, tff.learning.optimizers.Optimizer):
    hparams_fns = _build_hparams_fns(students, optimizer, state_type)
  return tff.learning.templates.FinalizerProcess(init_fn, next_fn, **hparams_fns)


def _finalize(
    stepper: Any, state: Any, weights: Any, update: Any
) -> tuple[Any, Any, tf.Tensor]:
  """Returns the next state and weights, and int32 1 if the update is rejected."""
  finite = graphs.all_finite(update)

  def apply():
    delta = tf.nest.map_structure(lambda u, w: tf.cast(u, w.dtype), update, weights)
    new_state, trainable = stepper.apply(state, weights.trainable, list(delta.trainable))
    statistics = [w - u for w, u in zip(weights.non_trainable, delta.non_trainable)]
    return new_state, tff.learning.models.ModelWeights(list(trainable), statistics)

  new_state, new_weights = tf.cond(finite, apply, lambda: (state, weights))
  return new_state, new_weights, tf.cast(~finite, tf.int32)


def _build_hparams_fns(
    students: cohorts.Students,
    optimizer: tff.learning.optimizers.Optimizer,
    state_type: tff.Type,
) -> dict[str, tff.Computation]:
  """Builds what reads and sets the hyperparameters of all cohorts' optimizers."""

  @graphs.computation(state_type)
  def get_hparams_fn(state):
    return students.pack([optimizer.get_hparams(s) for s in students.unpack(state)])

  @graphs.computation(state_type, get_hparams_fn.type_signature.result)
  def set_hparams_fn(state, hparams):
    return students.pack([
        optimizer.set_hparams(*pair)
        for pair in zip(students.unpack(state), students.unpack(hparams))
    ])

  return dict(get_hparams_fn=get_hparams_fn, set_hparams_fn=set_hparams_fn)
