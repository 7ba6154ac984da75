"""The clients' architectures: one for all, or one for each cohort of clients.

With several, a client's cohort is a number beside its data. Weights are averaged within
a cohort; what crosses cohorts is knowledge.
"""

from collections.abc import Sequence
from typing import Any, Optional, Union

import tensorflow as tf
from tff_kd.compat import tff

from tff_kd import models

StudentFn = Union[models.KerasModelFn, Sequence[models.KerasModelFn]]


class Students:
  """The checked architectures, and how values of each become one structure.

  With one architecture, values are as they are; with several, tuples by cohort.

  Attributes:
    specs: Their `ModelSpec`s by cohort.
  """

  def __init__(self, specs: Sequence[models.ModelSpec]):
    """Initializes the students.

    Args:
      specs: The student of each cohort, one or more.

    Raises:
      ValueError: If there is none, or if their outputs differ in shape.
    """
    self.specs = tuple(specs)
    if not self.specs:
      raise ValueError('There must be at least one student, found none.')
    for other in self.specs[1:]:
      models.check_same_outputs(self.first, other)

  @property
  def first(self) -> models.ModelSpec:
    """The student of the first cohort."""
    return self.specs[0]

  @property
  def has_cohorts(self) -> bool:
    """Whether there are several students."""
    return len(self.specs) > 1

  @property
  def weights_type(self) -> tff.Type:
    """The type of the packed weights of all cohorts."""
    return tff.to_type(self.pack([spec.weights_type for spec in self.specs]))

  @property
  def update_type(self) -> tff.Type:
    """The type of the clients' weight deltas, and of their mean."""
    return tff.to_type(
        self.pack([
            tff.types.tensorflow_to_type(spec.update_spec) for spec in self.specs
        ])
    )

  @property
  def initial_weights(self) -> Any:
    """The packed initial weights of all cohorts."""
    return self.pack([spec.initial_weights for spec in self.specs])

  def pack(self, values: Sequence[Any]) -> Any:
    """Packs one value for each cohort into one structure.

    Args:
      values: By cohort.

    Returns:
      A tuple; with one cohort, the value itself.
    """
    return tuple(values) if self.has_cohorts else values[0]

  def unpack(self, packed: Any) -> list[Any]:
    """Returns the values that `pack` has packed, by cohort.

    Args:
      packed: As `pack` returns it.
    """
    if not self.has_cohorts:
      return [packed]
    return [packed[i] for i in range(len(self.specs))]

  def only(self, cohort: int, weights: Any) -> Any:
    """Packs the weights of one cohort, with empty arrays for the others.

    Args:
      cohort: The cohort's number.
      weights: Its weights.

    Returns:
      As `pack` returns it.
    """
    return self.pack([
        weights
        if i == cohort
        else tf.nest.map_structure(
            lambda w: tf.zeros([0] * len(w.shape), w.dtype), spec.initial_weights
        )
        for i, spec in enumerate(self.specs)
    ])


def as_students(student: Union[models.ModelSpec, Students]) -> Students:
  """Wraps a single model in `Students`.

  Args:
    student: A model, or `Students`, which are returned as they are.

  Returns:
    The students.
  """
  return student if isinstance(student, Students) else Students([student])


def build_students(
    student_fn: StudentFn,
    *,
    input_spec: Any,
    loss_fn: models.LossFn,
    metrics_fn: Optional[models.MetricsFn] = None,
) -> Students:
  """Checks the builders of all cohorts.

  Args:
    student_fn: Returns a new `keras.Model`; or a list of such functions, one a
      cohort.
    input_spec: The clients' `dataset.element_spec`.
    loss_fn: Returns a `keras.losses.Loss`.
    metrics_fn: Returns a list of `keras.metrics.Metric`s.

  Returns:
    The `Students`.
  """
  builders = student_fn if isinstance(student_fn, (list, tuple)) else [student_fn]
  return Students([
      models.build_model_spec(
          fn,
          input_spec=input_spec,
          loss_fn=loss_fn,
          metrics_fn=metrics_fn,
          name='student' if len(builders) == 1 else f'student of cohort {i}',
      )
      for i, fn in enumerate(builders)
  ])
