"""The loop of a client's local training.

The loop carries all values that change: the model's weights, statistics and seeds, the
optimizer's state, the metrics' states and the companion's values.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Optional

import tensorflow as tf

from tff_kd.client import class_counts
from tff_kd.client import companions
from tff_kd.client import local_terms as local_terms_lib
from tff_kd.data import client_data as client_data_lib
from tff_kd.data import raw_files
from tff_kd import graphs
from tff_kd import internals
from tff_kd import models
from tff_kd import optimizers

# Maps the round's number, from 0, to a learning rate, as TFF's optimizer schedules do.
LearningRateFn = Callable[[tf.Tensor], Any]

# Separates the random numbers of training (dropout) from other streams of one seed.
_TRAINING_STREAM = 41


class Start(NamedTuple):
  """The inputs of a client's training.

  Attributes:
    values: The student's `ModelValues`.
    received: The trainable weights as the server sent them.
    terms: The `LocalTerm`s beside the supervised loss, in order.
    targets: By name ('student', 'teacher', ...), the `BoundModel`s that terms learn from.
    companion: A companion's `CompanionValues`.
    hparams: The optimizer's hyperparameters in this round.
    round_num: int32 scalar, or () where nothing needs it.
    step_share: float32, the share of the steps that the client takes; all of them if
      `None`.
  """

  values: models.ModelValues
  received: Sequence[tf.Tensor]
  terms: Sequence[local_terms_lib.LocalTerm]
  targets: dict[str, models.BoundModel]
  companion: companions.CompanionValues
  hparams: Any
  round_num: Any
  step_share: Optional[tf.Tensor] = None

  @property
  def needs_class_counts(self) -> bool:
    """Whether a term looks at the counts of the client's classes."""
    return any(term.needs_class_counts for term in self.terms)


class Trained(NamedTuple):
  """The result of a client's training.

  Attributes:
    values: The student's `ModelValues` after it.
    companion: The companion's `CompanionValues` after it.
    metrics: The metrics' states, totals included.
    num_examples: int64, the number of examples in all epochs, without those of weight 0.
    bad_labels: bool, whether there were class labels out of range, or weights that are
      negative or not finite.
    bad_inputs: bool, whether there were ids that an embedding does not have.
    observed: The observers' sums, by the observer's name.
  """

  values: models.ModelValues
  companion: companions.CompanionValues
  metrics: Any
  num_examples: tf.Tensor
  bad_labels: tf.Tensor
  bad_inputs: tf.Tensor
  observed: Any


class _Progress(NamedTuple):
  """The loop's variables."""

  values: models.ModelValues
  companion: companions.CompanionValues
  optimizer: Any
  metrics: Any
  loss_sum: tf.Tensor
  num_examples: tf.Tensor
  num_batches: tf.Tensor
  bad_labels: tf.Tensor
  bad_inputs: tf.Tensor
  observed: Any


def client_seed(seed: int, round_num: Any, client: Optional[tf.Tensor]) -> tf.Tensor:
  """Returns the seed of one client's random draws, int32 `[2]`.

  Args:
    seed: The seed of the process.
    round_num: int32 scalar, or () where the round is not known.
    client: The client's number, int32; `None` if clients come as datasets, which have no
      number: all clients of a round then draw the same.
  """
  folded = tf.constant([seed, _TRAINING_STREAM])
  for number in (round_num, client):
    if tf.is_tensor(number):
      folded = tf.random.experimental.stateless_fold_in(folded, number)
  return folded


class LocalTraining:
  """A client's training as a function, to be called where a computation is traced."""

  def __init__(
      self,
      student: models.ModelSpec,
      optimizer: optimizers.Optimizer,
      client_data: Optional[client_data_lib.ClientBatches],
      attachment: companions.Attachment,
      observers: Mapping[str, companions.Observer],
  ):
    """Initializes the training.

    Args:
      student: The model to train.
      optimizer: A TFF optimizer or a function that returns a Keras one; fresh for every
        client and round.
      client_data: Where clients read their examples, if not from datasets.
      attachment: The companion's part of the training.
      observers: The `Observer`s of the steps, by name.

    Raises:
      ValueError: If an observer needs labels that clients do not know.
    """
    self._student = student
    self._client_data = client_data
    self._attachment = attachment
    self._observers = observers
    if client_data is not None and client_data.label_share < 1.0 and observers:
      raise ValueError(
          'This algorithm adds up something by label over the steps, so all labels must '
          f'be known: `label_share` must be 1, found {client_data.label_share}.'
      )
    self._num_own = len(student.trainable_variables)
    self._stepper = optimizers.build_stepper(
        optimizer, [*student.trainable_variables, *attachment.trainable_variables]
    )

  def __call__(self, data: Any, start: Start) -> Trained:
    """Trains on a client's dataset, or on the examples of its number."""
    progress = _Progress(
        values=start.values,
        companion=start.companion,
        optimizer=self._stepper.initialize(start.hparams),
        metrics=self._student.metrics.initial_state(),
        loss_sum=tf.constant(0.0),
        num_examples=tf.constant(0),
        num_batches=tf.constant(0),
        bad_labels=tf.constant(False),
        bad_inputs=tf.constant(False),
        observed={name: each.zero() for name, each in self._observers.items()},
    )
    run = self._over_dataset if self._client_data is None else self._over_slices
    progress = run(data, start, progress)
    return Trained(
        values=progress.values,
        companion=progress.companion,
        metrics=self._student.metrics.add_totals(
            progress.metrics,
            progress.loss_sum,
            progress.num_examples,
            progress.num_batches,
        ),
        num_examples=tf.cast(progress.num_examples, tf.int64),
        bad_labels=progress.bad_labels,
        bad_inputs=progress.bad_inputs,
        observed=progress.observed,
    )

  def _over_dataset(
      self, dataset: tf.data.Dataset, start: Start, progress: _Progress
  ) -> _Progress:
    dataset = dataset.with_options(_dataset_options())
    counts = None
    if start.needs_class_counts:
      counts = self._counts_of_dataset(dataset, start.values)
    batches = iter(dataset)

    def next_batch(batch: Any, progress: _Progress):
      value = batch.get_value()
      size = tf.shape(tf.nest.flatten(value)[0])[0]
      progress = tf.cond(
          size > 0,
          lambda: self._step(progress, value, start, counts=counts),
          # An empty batch has no loss: 0 / 0.
          lambda: progress,
      )
      return batches.get_next_as_optional(), progress

    return tf.while_loop(
        lambda batch, _: batch.has_value(),
        next_batch,
        (batches.get_next_as_optional(), progress),
    )[1]

  def _over_slices(
      self, client: tf.Tensor, start: Start, progress: _Progress
  ) -> _Progress:
    # Slices, not a `tf.data.Dataset`: its iterator costs as much as a small step.
    client_data = self._client_data
    examples = client_data.data.open()
    rows, labelled = client_data.rows_and_labelled(client, start.round_num)
    if start.step_share is not None:
      rows = rows[: client_data.num_elements(tf.size(rows), start.step_share)]
      if labelled is not None:
        labelled = labelled[: tf.size(rows)]
    observed_inputs = client_data.input_mask(client)
    counts = None
    if start.needs_class_counts:
      known = labelled
      if self._student.has_mask:
        batch = client_data_lib.masked_inputs(
            raw_files.gather(examples, rows), observed_inputs
        )
        inputs = models.split_batch(batch)[0]
        known = self._student.unmasked(start.values, inputs, labelled)
      counts = self._counts_of_rows(examples, rows, known)

    def next_slice(begin: tf.Tensor, progress: _Progress):
      end = begin + client_data.batch_size
      ids = rows[begin:end]
      if client_data.drop_remainder:  # For models of a fixed batch.
        ids = tf.ensure_shape(ids, [client_data.batch_size])
      batch = client_data_lib.masked_inputs(
          raw_files.gather(examples, ids), observed_inputs
      )
      mask = None if labelled is None else labelled[begin:end]
      return end, self._step(
          progress, batch, start, labelled=mask, counts=counts
      )

    return tf.while_loop(
        lambda begin, _: begin < tf.size(rows), next_slice, (0, progress)
    )[1]

  def _counts_of_dataset(
      self, dataset: tf.data.Dataset, values: models.ModelValues
  ) -> tf.Tensor:
    """The counts of the classes in a dataset, float32 `[classes]`."""
    student = self._student

    def add(total: tf.Tensor, batch: Any) -> tf.Tensor:
      inputs, labels = models.split_batch(batch)
      return total + class_counts.count(
          student, labels, student.unmasked(values, inputs), student.sample_weight(batch)
      )

    return dataset.reduce(tf.zeros([class_counts.num_classes(student)]), add)

  def _counts_of_rows(
      self, examples: Any, rows: tf.Tensor, mask: Optional[tf.Tensor]
  ) -> tf.Tensor:
    """The counts of the classes in the rows that a client reads in this round."""
    labels = raw_files.gather(models.split_batch(examples)[1], rows)
    weight = models.sample_weight_of(examples)
    if weight is not None:
      weight = raw_files.gather(weight, rows)
    weight = self._student.sample_weight((None, labels, weight))
    return class_counts.count(self._student, labels, mask, weight)

  def _step(
      self,
      progress: _Progress,
      batch: Any,
      start: Start,
      *,
      labelled: Optional[tf.Tensor] = None,
      counts: Optional[tf.Tensor] = None,
  ) -> _Progress:
    """One gradient step on one batch."""
    student = self._student
    inputs, labels = models.split_batch(batch)
    weight = student.sample_weight(batch)
    trained = [*progress.values.trainable, *progress.companion.trainable]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
      tape.watch(trained)
      outputs, values, regularization, bad_inputs = student.call(
          progress.values, inputs, training=True
      )
      labels, bad = student.usable_labels(labels, weight)
      step = local_terms_lib.LocalStep(
          inputs=inputs,
          logits=student.class_logits(outputs),
          labels=labels,
          labelled=labelled,
          target_logits=None,
          supervised_loss=None,
          step_num=progress.num_batches,
          weights=progress.values.trainable,
          received=start.received,
          counted=models.unmasked(outputs, student.counted_labels(labels)),
          is_regression=student.is_regression,
          model=models.BoundModel(student, progress.values),
          sample_weight=weight,
          class_counts=counts,
      )
      step = step._replace(supervised_loss=self._supervised_loss(outputs, step, start))
      loss, companion = self._with_terms(step, start, progress)
      loss += regularization
    optimizer, trained = self._stepper.apply(
        progress.optimizer, trained, tape.gradient(loss, trained)
    )
    size = tf.shape(outputs)[0]
    seen = {name: each.observe(step) for name, each in self._observers.items()}
    return _Progress(
        values=values._replace(trainable=list(trained[: self._num_own])),
        companion=companion._replace(trainable=list(trained[self._num_own :])),
        optimizer=optimizer,
        metrics=student.metrics.update(
            progress.metrics,
            labels,
            outputs,
            student.metric_mask(labels, outputs, labelled, weight),
            weight,
        ),
        loss_sum=progress.loss_sum + loss * tf.cast(size, tf.float32),
        num_examples=progress.num_examples + models.num_examples(outputs, weight),
        num_batches=progress.num_batches + 1,
        bad_labels=progress.bad_labels | bad,
        bad_inputs=(
            progress.bad_inputs
            if bad_inputs is None
            else progress.bad_inputs | bad_inputs
        ),
        observed=tf.nest.map_structure(tf.add, progress.observed, seen),
    )

  def _supervised_loss(
      self, outputs: tf.Tensor, step: local_terms_lib.LocalStep, start: Start
  ) -> tf.Tensor:
    """The loss on the labels, on the logits as the terms adjust them."""
    logits = step.logits
    for term in start.terms:
      logits = graphs.user_function(term.adjusted_logits)(logits, step)
    if logits is not step.logits:
      mask = internals.keras_mask(outputs)
      outputs = self._student.outputs_of(tf.cast(logits, tf.float32))
      internals.set_keras_mask(outputs, mask)
    loss = self._student.supervised_loss(
        step.labels, outputs, step.labelled, step.sample_weight
    )
    return tf.cast(loss, tf.float32)

  def _with_terms(
      self,
      step: local_terms_lib.LocalStep,
      start: Start,
      progress: _Progress,
  ) -> tuple[tf.Tensor, companions.CompanionValues]:
    """The loss with all further terms, and the companion's values after the step."""
    loss = step.supervised_loss
    target_logits = {
        name: target.logits(step.inputs) for name, target in start.targets.items()
    }
    for term in start.terms:
      seen = step._replace(target_logits=target_logits.get(term.target))
      loss = tf.cast(graphs.user_function(term.__call__)(loss, seen), tf.float32)
    if self._attachment.joint_loss is None:
      return loss, progress.companion
    return self._attachment.joint_loss(loss, step, progress.companion)


def _dataset_options() -> tf.data.Options:
  """Returns options for a few batches that are read once, where tuning does not pay."""
  options = tf.data.Options()
  options.autotune.enabled = False
  options.experimental_optimization.apply_default_optimizations = False
  options.threading.private_threadpool_size = 1
  options.threading.max_intra_op_parallelism = 1
  return options
