"""FedGen: averaging, with a generator of features that carries what all clients know.

Zhu, Hong & Zhou, "Data-Free Knowledge Distillation for Heterogeneous Federated Learning"
(ICML 2021), section 4 and Algorithm 1: the server's generator learns, from the clients'
heads, features for each label; from the second round on a client's loss is

  CE(x, y) + a_t CE(h(G(noise', y')), y') + a_t KL(h(G(noise, y)) || z(x)),

where h is its head. The paper's server holds the clients' models; here none of them is
seen, see `tff_kd.client.companions.generator`.
"""

from __future__ import annotations

from typing import Optional

import tff_kd
from tff_kd.algorithms import info
from tff_kd import rounds


@rounds.takes_options
def build_fed_gen(
    *,
    student_fn: tff_kd.models.KerasModelFn,
    training: rounds.ClientTraining,
    split_layer: Optional[str] = None,
    generator_fn: Optional[tff_kd.client.companions.generator.GeneratorFn] = None,
    noise_dim: int = 32,
    hidden_units: int = 256,
    generator_optimizer: Optional[tff_kd.optimizers.Optimizer] = None,
    generator_steps: int = 50,
    generator_batch_size: int = 32,
    generative_weight: float = 1.0,
    generative_decay: float = 0.98,
    options: rounds.Options,
) -> rounds.DistillationProcess:
  """Builds FedGen.

  Labels must be class indices. Each of the generator's steps is an exchange with all
  clients of the round: a batch of features down, as many floats up. With the defaults and
  32 features that is .2 MB both ways a round, and 50 round trips.

  Args:
    student_fn: Returns a new `keras.Model` that applies its layers one after the
      other; one architecture for all clients.
    training: Each field of `tff_kd.rounds.ClientTraining` as an argument of its own.
    split_layer: The name of the student's layer whose outputs are generated; the one
      before the last with weights if `None`.
    generator_fn: Returns a new Keras model from noise and one-hot label, `[batch,
      noise_dim + classes]`, to features `[batch, features]`; one hidden layer if
      `None`.
    noise_dim: The number of noise dimensions of the generator.
    hidden_units: The width of the generator's hidden layer.
    generator_optimizer: Adam with the paper's rate 3e-4 if `None`.
    generator_steps: The number of the generator's steps in a round.
    generator_batch_size: Generated examples a step.
    generative_weight: The weight a in the second round. The paper has 10, with a rate of
      the clients of .01; with a rate of .1 that is too much.
    generative_decay: The factor of a from round to round.
    options: Each field of `tff_kd.rounds.Options` as an argument of its own.

  Returns:
    A `DistillationProcess` without a teacher.

  Raises:
    ValueError: If there are several architectures, or the student cannot be split.
  """
  students = training.build_students(student_fn)
  companion = tff_kd.client.companions.generator.FeatureGenerator(
      students.first,
      optimizer=generator_optimizer or tff_kd.tff.learning.optimizers.build_adam(3e-4),
      split_layer=split_layer,
      generator_fn=generator_fn,
      noise_dim=noise_dim,
      hidden_units=hidden_units,
      num_steps=generator_steps,
      batch_size=generator_batch_size,
      weight=generative_weight,
      decay=generative_decay,
      seed=options.seed,
  )
  return rounds.compose_process(
      rounds.Parts(
          students=students,
          client_optimizer=training.client_optimizer,
          companion=companion,
      ),
      options,
  )


INFO = info.Info(
    build=build_fed_gen,
    summary='averaging; a generator of features carries what all clients know',
    uploads=('weights', 'label counts', 'gradients by generated features'),
    flags={
        'split_layer': 'split_layer',
        'generator_steps': 'generator_steps',
        'generative_weight': 'generative_weight',
    },
)
