"""FedGen: averaging, with a generator of features that carries what all clients know.

Zhu, Hong & Zhou, "Data-Free Knowledge Distillation for Heterogeneous Federated Learning"
(ICML 2021), section 4 and Algorithm 1: the server's generator learns, from the clients'
heads, features for each label; from the second round on a client's loss is

  CE(x, y) + a_t CE(h(G(noise', y')), y') + a_t KL(h(G(noise, y)) || z(x)),

where h is its head. The paper's server holds the clients' models; here none of them is
seen, see `tff_kd.generator`.
"""

from typing import Any, Optional

from tff_kd.compat import tff

from tff_kd import arguments
from tff_kd import generator
from tff_kd import models
from tff_kd import optimizers
from tff_kd import process


@arguments.checked
def build_fed_gen(
    *,
    student_fn: models.KerasModelFn,
    input_spec: Any,
    loss_fn: models.LossFn,
    client_optimizer: optimizers.Optimizer,
    split_layer: Optional[str] = None,
    generator_fn: Optional[generator.GeneratorFn] = None,
    noise_dim: int = 32,
    hidden_units: int = 256,
    generator_optimizer: Optional[optimizers.Optimizer] = None,
    generator_steps: int = 50,
    generator_batch_size: int = 32,
    generative_weight: float = 1.0,
    generative_decay: float = 0.98,
    metrics_fn: Optional[models.MetricsFn] = None,
    seed: int = 0,
    **kwargs,
) -> process.DistillationProcess:
  """Builds FedGen.

  Each of the generator's steps is an exchange with all clients of the round: a batch of
  features down, as many floats up. With the defaults and 32 features that is .2 MB both
  ways a round, and 50 round trips.

  Args:
    student_fn: Returns a new `keras.Model` that applies its layers one after the
      other; one architecture for all clients.
    input_spec: The clients' `dataset.element_spec`; labels are class indices.
    loss_fn: Returns a `keras.losses.Loss`.
    client_optimizer: The clients' optimizer.
    split_layer: The name of the student's layer whose outputs are generated; the one
      before the last with weights if `None`.
    generator_fn: Returns a new Keras model from noise and one-hot label, `[batch,
      noise_dim + classes]`, to features `[batch, features]`; one hidden layer if `None`.
    noise_dim: Of the generator.
    hidden_units: Of the generator.
    generator_optimizer: Adam with the paper's rate 3e-4 if `None`.
    generator_steps: A round.
    generator_batch_size: Generated examples a step.
    generative_weight: a of the second round. The paper has 10, with a clients' rate of
      .01; with a rate of .1 that is too much.
    generative_decay: a's factor from round to round.
    metrics_fn: Returns a list of `keras.metrics.Metric`s.
    seed: With the round number, decides what is generated.
    **kwargs: Further arguments of `process.build_distillation_process`.

  Returns:
    A `DistillationProcess` without a teacher.

  Raises:
    ValueError: If there are several architectures, or the student cannot be split.
  """
  if isinstance(student_fn, (list, tuple)):
    raise ValueError(
        'FedGen has one architecture, in whose features the generator works; found '
        f'{len(student_fn)} builders in `student_fn`.'
    )
  student = models.build_model_spec(
      student_fn,
      input_spec=input_spec,
      loss_fn=loss_fn,
      metrics_fn=metrics_fn,
      name='student',
  )
  companion = generator.FeatureGenerator(
      student,
      optimizer=generator_optimizer or tff.learning.optimizers.build_adam(3e-4),
      split_layer=split_layer,
      generator_fn=generator_fn,
      noise_dim=noise_dim,
      hidden_units=hidden_units,
      num_steps=generator_steps,
      batch_size=generator_batch_size,
      weight=generative_weight,
      decay=generative_decay,
      seed=seed,
  )
  return process.build_distillation_process(
      student,
      client_optimizer=client_optimizer,
      companion=companion,
      seed=seed,
      **kwargs,
  )
