"""Terms of the clients' loss for clients that have some classes only.

Each looks at how often the client has each class (`LocalStep.class_counts`). The counts
are of the client's own labels in this round and stay at the client: they go up in no
channel, so these terms leave the account of differential privacy as it is.
"""

import dataclasses

import tensorflow as tf

from tff_kd import checks
from tff_kd.client import local_terms
from tff_kd import losses

# A finite stand-in for minus infinity: its softmax is 0, and its product with 0 is 0.
_NEVER = -1e4


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriorCorrection(local_terms.LocalTerm):
  """The supervised loss on z + tau log pi, pi being the client's shares of the classes.

  The model then need not learn how frequent a class is at this client, and its own
  logits z, which all else sees, are those of balanced classes. It changes what the
  supervised loss sees, and adds no term. With tau 1 and smoothing 0 it is balanced
  softmax, log n_k and log pi_k differing by a constant.

  Sources: Menon et al., "Long-tail learning via logit adjustment" (ICLR 2021), equation
  10; Chen & Chao, "On Bridging Generic and Personalized Federated Learning for Image
  Classification" (FedRoD, ICLR 2022), section 4.2, balanced softmax.

  Attributes:
    tau: Above 0.
    smoothing: The share of the uniform distribution in pi, at least 0 and below 1.
      Without it (as in the papers), a class that the client does not have gets no
      gradient, and a client of one class learns nothing at all; a loss with label
      smoothing needs it.
  """

  tau: float = 1.0
  smoothing: float = 0.1

  needs_class_counts = True

  def __post_init__(self):
    local_terms.check_weight('tau', self.tau)
    if not 0.0 <= self.smoothing < 1.0:
      raise ValueError(
          '`smoothing` is a share of the uniform distribution and must be at least 0 and '
          f'below 1, found {self.smoothing!r}.'
      )

  def adjusted_logits(self, logits, step):
    counts = step.class_counts
    share = tf.math.divide_no_nan(counts, tf.reduce_sum(counts))
    share = (1.0 - self.smoothing) * share + self.smoothing / counts.shape[0]
    log_prior = tf.where(
        share > 0.0, self.tau * tf.math.log(tf.maximum(share, 1e-30)), _NEVER
    )
    if logits.shape[-1] == 1:
      log_prior = log_prior[1:] - log_prior[:1]
    return logits + log_prior

  def __call__(self, loss, step):
    return loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestrictedSoftmax(local_terms.LocalTerm):
  """The supervised loss on logits that are scaled down for the classes of no example.

  It changes what the supervised loss sees, and adds no term. A single logit z stands for
  the two classes' logits -z/2 and z/2; the logits of a model that ends in softmax are
  its log-probabilities.

  Source: Li & Zhan, "FedRS: Federated Learning with Restricted Softmax for Label
  Distribution Non-IID Data" (KDD 2021), equation 5.

  Attributes:
    scale: alpha, the factor of the logits of classes that the client does not have, at
      least 0 and below 1.
  """

  scale: float = 0.5

  needs_class_counts = True

  def __post_init__(self):
    if not 0.0 <= self.scale < 1.0:
      raise ValueError(
          f'`scale` must be at least 0 and below 1, found {self.scale!r}. Leave the term '
          'out to switch it off.'
      )

  def adjusted_logits(self, logits, step):
    factors = tf.where(step.class_counts > 0.0, 1.0, self.scale)
    if logits.shape[-1] == 1:
      factors = tf.reduce_mean(factors, keepdims=True)
    return logits * factors

  def __call__(self, loss, step):
    return loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class VacantClassDistillation(local_terms.LocalTerm):
  """L + weight KL_T(received student || z) over the classes that the client lacks.

  The softmax is over these classes only, so that a client keeps what the received student
  says of them among each other. With fewer than two such classes the term is 0.

  Source: Guo et al., "Exploring Vacant Classes in Label-Skewed Federated Learning"
  (FedVLS, AAAI 2025), vacant-class distillation; with `PriorCorrection` it is that
  paper's loss but for the suppression of logits.

  Attributes:
    weight: lambda, above 0.
    temperature: T, above 0.
  """

  weight: float = 0.1
  temperature: float = 1.0
  target: str = dataclasses.field(default='student', init=False)

  needs_class_counts = True

  def __post_init__(self):
    checks.check_temperature(self.temperature)
    local_terms.check_weight('weight', self.weight)

  def __call__(self, loss, step):
    is_vacant = step.class_counts <= 0.0
    target, own = (
        tf.where(is_vacant, losses.two_classes(logits), _NEVER * self.temperature)
        for logits in (step.target_logits, step.logits)
    )
    return loss + self.weight * step.mean(
        losses.kl_divergence(target, own, self.temperature)
    )
