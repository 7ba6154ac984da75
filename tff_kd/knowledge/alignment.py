"""Distribution alignment: predictions whose mean over the transfer rows is a prior.

A client that has seen few classes predicts these too often. Its predictions tell more if
what it predicts on average is taken out of them. With p_c the mean of softmax(z)_c over
the rows, the marginal, a step is

  z <- z - log p + log pi,

for a prior pi over the classes. A few such steps bring the marginal to the prior: they
alternate between rows that sum to 1 (softmax) and columns that sum to the prior, as
Sinkhorn's iteration does, and what they add to the logits is one number a class.

Sources: Berthelot et al., "ReMixMatch: Semi-Supervised Learning with Distribution
Matching and Augmentation Anchoring" (ICLR 2020), section 3.1, for one step on unlabelled
examples; Asano et al., "Self-labelling via simultaneous clustering and representation
learning" (ICLR 2020), section 3.1, and Cuturi, "Sinkhorn Distances" (NeurIPS 2013), for
the iteration; Saerens, Latinne & Decaestecker, "Adjusting the Outputs of a Classifier to
New a Priori Probabilities" (Neural Computation 2002), equations 2.4 and 2.9, for the
prior that is estimated by EM; James & Stein, "Estimation with Quadratic Loss" (Berkeley
Symposium 1961), equation 8, for the idea of shrinking by the noise.

What is a class: logits `[m, ..., classes]` have one marginal over rows and positions. A
single logit is the log-odds of the second of two classes. Several single logits an
example, `[m, ..., labels, 1]`, are labels that are present or not (Bernoulli variables),
each with a marginal `[2]` of its own.
"""

import dataclasses
from typing import Any, NamedTuple, Optional

import numpy as np
import tensorflow as tf

from tff_kd.knowledge import consensus
from tff_kd.knowledge import payload as payload_lib
from tff_kd import losses

# Steps of the EM algorithm; each is cheap, and they converge slowly.
_EM_STEPS = 50
_ESTIMATED = ('average', 'em')
# The prior from averages: the share of the running mean that a round keeps, and by how
# many times the square of a deviation must exceed the variance of the noise to count (two
# standard errors).
_KEPT, _NOISE_FACTOR = 0.9, 4.0
# The least share that an estimate gives to a class, so that its logarithm is finite; no
# number of rows tells of less.
_LEAST_SHARE = 1e-8
# The least float32 whose logarithm is a number.
_TINY = float(np.finfo(np.float32).tiny)


def align(
    logits: tf.Tensor,
    mask: tf.Tensor,
    prior: Optional[tf.Tensor] = None,
    *,
    num_steps: int = 5,
) -> tf.Tensor:
  """Brings the marginal of predictions to a prior.

  First the mean over the classes is taken out of each row, then `num_steps` times
  z <- z - log p + log pi, where p is the marginal.

  Args:
    logits: float32 `[m, ..., classes]`; see the module for a last axis of one.
    mask: float32 or bool `[m]`: the rows that count. The others may hold anything and
      are returned as they are.
    prior: pi, float32 `[classes]`, `[2]` of a single logit, `[labels, 2]` (or `[2]` for
      all) of several; uniform if `None`. Shares below 1.2e-38, the least normal float32,
      count as that, since log 0 is not finite.
    num_steps: The number of steps, 0 or more.

  Returns:
    float32 of the shape of `logits`.
  """
  logits = tf.convert_to_tensor(logits)
  present = payload_lib.per_row(tf.cast(mask, tf.bool), logits)
  z = losses.two_classes(tf.where(present, logits, 0.0))
  z -= tf.reduce_mean(z, axis=-1, keepdims=True)
  z += bias_to(z, mask, prior, num_steps=num_steps, is_binary=logits.shape[-1] == 1)
  if logits.shape[-1] == 1:
    z = z[..., 1:] - z[..., :1]
  return tf.where(present, z, logits)


def bias_to(
    logits: tf.Tensor,
    mask: tf.Tensor,
    prior: Optional[tf.Tensor] = None,
    *,
    num_steps: int,
    is_binary: bool = False,
) -> tf.Tensor:
  """Returns what is to be added to logits for their marginal to be the prior.

  Args:
    logits: float32 `[m, ..., classes]`, two classes or more.
    mask: As in `align`.
    prior: As in `align`.
    num_steps: As in `align`.
    is_binary: Whether the two classes are those of a single logit.

  Returns:
    float32 `[classes]`; of labels that are present or not, `[labels, 2]`.
  """
  rows, counted = _grouped(logits, mask, is_binary)
  log_prior = -tf.math.log(float(logits.shape[-1]))
  if prior is not None:
    log_prior = tf.math.log(tf.maximum(tf.cast(prior, tf.float32), _TINY))

  (bias,) = tf.while_loop(
      lambda bias: True,
      lambda bias: (bias + log_prior - _log_marginal(rows + bias, counted),),
      (tf.zeros(rows.shape[1:]),),
      maximum_iterations=num_steps,
  )
  # Without a row there is nothing to align.
  bias = tf.where(tf.reduce_any(counted), bias, 0.0)
  return bias if bias.shape[0] > 1 else bias[0]


def marginal(logits: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
  """Returns the mean of the predicted probabilities over rows and positions.

  Args:
    logits: float32 `[m, ..., classes]`.
    mask: As in `align`.

  Returns:
    float32 `[classes]`, `[2]` of a single logit, `[labels, 2]` of several; uniform
    where no row counts.
  """
  logits = tf.convert_to_tensor(logits)
  z = losses.two_classes(logits)
  rows, counted = _grouped(z, mask, logits.shape[-1] == 1)
  found = tf.exp(_log_marginal(rows, counted))
  found = tf.where(tf.reduce_any(counted), found, 1.0 / z.shape[-1])
  return found if found.shape[0] > 1 else found[0]


def em_prior(logits: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
  """Estimates the classes' shares among examples by EM under label shift.

  The logits are those of a classifier for which all classes are equally likely. From a
  uniform pi, 50 times

    q_i = softmax(z_i + log pi)   (expectation: the posterior under pi),
    pi  = mean over i of q_i      (maximisation),

  which climbs to the pi under which the examples are the most likely. The share of a
  class that no example has falls to 0 by a factor a step: in the end shares below 1e-8
  are raised to that, and all are divided by their sum, so that log pi is finite.

  Source: Saerens et al. (2002), equation 2.9.

  Args:
    logits: float32 `[m, ..., classes]`.
    mask: As in `align`.

  Returns:
    As `marginal`.
  """
  logits = tf.convert_to_tensor(logits)
  z = losses.two_classes(logits)
  rows, counted = _grouped(z, mask, logits.shape[-1] == 1)
  log_prior = tf.fill(rows.shape[1:], -tf.math.log(float(z.shape[-1])))
  (log_prior,) = tf.while_loop(
      lambda log_prior: True,
      lambda log_prior: (_log_marginal(rows + log_prior, counted),),
      (log_prior,),
      maximum_iterations=_EM_STEPS,
  )
  found = tf.where(
      tf.reduce_any(counted), _at_least(tf.exp(log_prior)), 1.0 / z.shape[-1]
  )
  return found if found.shape[0] > 1 else found[0]


class Marginals(NamedTuple):
  """Running sums over rounds of an average's marginal m; each round keeps .9 of them.

  Attributes:
    weight: float32, the sum of the rounds' weights: 1 - .9^t after t rounds.
    shares: float32 of the shape that `marginal` returns, the sum of m, with shares below
      1e-8 raised to that.
    logs: The sum of log m less its mean over the classes, of the same shape.
    squares: The sum of the squares of these logarithms, of the same shape.
  """

  weight: tf.Tensor
  shares: tf.Tensor
  logs: tf.Tensor
  squares: tf.Tensor


def initial_marginals(logits_shape: tf.TensorShape) -> Marginals:
  """Returns the sums before the first round.

  Args:
    logits_shape: The shape of one example's logits, `[..., classes]`.
  """
  classes = max(logits_shape[-1], 2)
  is_several = logits_shape[-1] == 1 and len(logits_shape) > 1
  zeros = tf.zeros([logits_shape[-2], 2] if is_several else [classes])
  return Marginals(tf.zeros([]), zeros, zeros, zeros)


def next_marginals(
    state: Marginals, logits: tf.Tensor, mask: tf.Tensor
) -> Marginals:
  """Adds a round's average to the sums; nothing where no row counts.

  Args:
    state: The sums.
    logits: The average's logits, float32 `[m, ..., classes]`.
    mask: As in `align`.

  Returns:
    The next sums.
  """
  found = _at_least(marginal(logits, mask))
  logs = _centred_log(found)
  is_there = tf.reduce_any(tf.cast(mask, tf.bool)) & tf.reduce_all(
      tf.math.is_finite(logs)
  )
  new = Marginals(tf.ones([]), found, logs, tf.square(logs))
  return tf.nest.map_structure(
      lambda old, new: tf.where(is_there, _KEPT * old + (1.0 - _KEPT) * new, old),
      state,
      new,
  )


def prior_from(state: Marginals) -> tf.Tensor:
  """Estimates the classes' shares from the averages of all rounds so far.

  One round's average predicts what its clients' classes are, which differ from round to
  round; what stays is what the rows are. With M the running mean of the marginals, h the
  logarithm of M less the mean of that over the classes, v the variance over rounds of
  the logarithms and q the share of v that is left in a running mean,

    q     = .1 / 1.9 (1 + .9^t) / (1 - .9^t)
    v q   = (E[l^2] - E[l]^2) q / (1 - q)        (l: logs; E: the running mean)
    kappa = max(0, 1 - 4 mean(v q) / mean(h^2))
    prior = softmax(kappa h).

  So the prior is uniform as long as the deviation of M from uniform is below two of its
  standard errors (as in the first round), and M where it is far above them.

  Args:
    state: The sums.

  Returns:
    float32 of the shape of `marginal`.
  """
  weight = state.weight
  q = (1.0 - _KEPT) / (1.0 + _KEPT) * tf.math.divide_no_nan(2.0 - weight, weight)
  mean_logs = tf.math.divide_no_nan(state.logs, weight)
  spread = tf.math.divide_no_nan(state.squares, weight) - tf.square(mean_logs)
  # After one round q is 1, but for rounding: nothing is known of the spread.
  is_known = (weight > 0.0) & (q < 0.999)
  factor = tf.where(is_known, q / tf.where(is_known, 1.0 - q, 1.0), 0.0)
  noise = tf.reduce_mean(tf.maximum(spread, 0.0) * factor, axis=-1, keepdims=True)
  h = _centred_log(tf.where(weight > 0.0, state.shares, 1.0))
  signal = tf.reduce_mean(tf.square(h), axis=-1, keepdims=True)
  kappa = tf.maximum(1.0 - _NOISE_FACTOR * tf.math.divide_no_nan(noise, signal), 0.0)
  return tf.nn.softmax(tf.where(is_known, kappa, 0.0) * h)


def _at_least(shares: tf.Tensor) -> tf.Tensor:
  """Returns shares that are `_LEAST_SHARE` or more and sum to 1; NaN stays NaN."""
  raised = tf.where(shares < _LEAST_SHARE, _LEAST_SHARE, shares)
  return raised / tf.reduce_sum(raised, axis=-1, keepdims=True)


def _centred_log(shares: tf.Tensor) -> tf.Tensor:
  """Returns log shares less the mean of that over the classes."""
  logs = tf.math.log(shares)
  return logs - tf.reduce_mean(logs, axis=-1, keepdims=True)


def _grouped(
    logits: tf.Tensor, mask: tf.Tensor, is_binary: bool
) -> tuple[tf.Tensor, tf.Tensor]:
  """Returns logits `[n, labels, classes]` and bool `[n, 1, 1]`, which of n count."""
  labels = logits.shape[-2] if is_binary and logits.shape.rank > 2 else 1
  rows = tf.reshape(logits, [-1, labels, logits.shape[-1]])
  counted = tf.cast(mask, tf.bool)
  positions = tf.shape(rows)[0] // tf.shape(counted)[0]
  counted = tf.repeat(counted, positions)[:, tf.newaxis, tf.newaxis]
  return tf.where(counted, rows, 0.0), counted


def _log_marginal(rows: tf.Tensor, counted: tf.Tensor) -> tf.Tensor:
  """Returns the logarithm of the mean of softmax, `[labels, classes]`."""
  log_p = tf.where(counted, tf.nn.log_softmax(rows), float('-inf'))
  count = tf.math.count_nonzero(counted, dtype=tf.float32)
  return tf.reduce_logsumexp(log_p, axis=0) - tf.math.log(count)


@dataclasses.dataclass(frozen=True)
class Aligned(consensus.WrappedRule):
  """Another rule, over predictions whose marginal is brought to a prior.

  Each client takes out of its predictions what it predicts on average: over the rows
  that it answers it aligns them to the uniform prior (`align`), before the inner rule's
  `encode`. So codes are of aligned predictions, and the clipping of differential
  privacy comes after: neither the bytes nor the account change. On the server the inner
  rule's consensus, times `sharpness`, is aligned to `prior` over the rows that have
  one.

  A prior that is wrong costs accuracy: if the transfer rows are not distributed as it
  says, the consensus is made to say so all the same.

  Rows whose logits are not all finite are missing, and left out. Positions of sequences
  all count, padding too. Single logits are aligned label by label; see the module.
  Regression models have no classes and are refused.

  Attributes:
    rule: The inner rule, over logits or probabilities. Its diversity, where it has one,
      is of aligned predictions, and is not aligned again.
    prior: 'uniform', or `None`, which is the same; probabilities, all above 0, that sum
      to 1: `[classes]`, `[2]` of a single logit (no and yes), `[labels, 2]` or `[2]` of
      labels that are present or not; 'average', from what the averaged student
      predicts on the rows that have a consensus, over all rounds so far (`prior_from`);
      or 'em', EM under label shift (`em_prior`) over the inner rule's consensus of
      aligned predictions.
    sharpness: s, by which the consensus's logits are multiplied before they are
      aligned; above 1 for surer targets.
    num_steps: The steps of the alignment, of each client and of the consensus. With 0
      nothing is aligned, and `Aligned(rule, num_steps=0)` is the inner rule itself.
  """

  prior: Any = None
  sharpness: float = 1.0
  num_steps: int = 5

  needs_classes = True

  def __post_init__(self):
    if not isinstance(self.rule, consensus.ConsensusRule):
      raise TypeError(
          '`Aligned` wraps a consensus rule, such as `tff_kd.knowledge.MeanLogits()`, '
          f'found {self.rule!r}.'
      )
    # As a tuple it can be compared and hashed, as fields of frozen dataclasses are.
    object.__setattr__(self, 'prior', checked_prior(self.prior, _ESTIMATED))
    if not 0.0 < self.sharpness < float('inf'):
      raise ValueError(
          f'`sharpness` must be a finite number above 0, found {self.sharpness!r}.'
      )
    steps = self.num_steps
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
      raise ValueError(f'`num_steps` must be an integer, 0 or more, found {steps!r}.')
    if not self.num_steps and self.prior is not None:
      raise ValueError(
          'With `num_steps=0` nothing is aligned to a prior: leave `prior` out, found '
          f'{self.prior!r}.'
      )

  @property
  def has_unit_weights(self):
    return self.rule.has_unit_weights

  @property
  def needs_average(self):
    return self.keeps_state or self.rule.needs_average

  @property
  def keeps_state(self):
    return self.prior == 'average'

  def payload_spec(self, logits_shape, num_rows):
    if isinstance(self.prior, tuple):
      check_prior_fits(self.prior, logits_shape)
    return self.rule.payload_spec(logits_shape, num_rows)

  def encode(self, logits, *certainty):
    if self.num_steps:
      present = payload_lib.finite_rows(logits)
      logits = align(logits, present, num_steps=self.num_steps)
    return self.rule.encode(logits, *certainty)

  def decode(self, mean_payload, *average_logits):
    """Decodes as in the first round: a prior of averages is uniform then."""
    state = ()
    if self.keeps_state:
      state = self.initial_state(average_logits[0].shape[1:])
    return self.decode_next(state, mean_payload, *average_logits)[1]

  def initial_state(self, logits_shape):
    return initial_marginals(logits_shape) if self.keeps_state else ()

  def decode_next(self, state, mean_payload, *average_logits):
    inner = average_logits if self.rule.needs_average else ()
    found = self.rule.decode(mean_payload, *inner)
    logits, mask = self.sharpness * found.logits, found.mask
    if self.num_steps:
      prior = self.prior
      if prior == 'average':
        state = next_marginals(state, average_logits[0], mask)
        prior = prior_from(state)
      elif prior == 'em':
        prior = em_prior(found.logits, mask)
      logits = align(logits, mask, prior, num_steps=self.num_steps)
    aligned = payload_lib.consensus_of(logits, mask)
    return state, aligned._replace(diversity=found.diversity)


def checked_prior(prior: Any, estimated: tuple[str, ...] = ()) -> Any:
  """Returns a prior as a name, a tuple of floats, or `None` where it is uniform.

  Args:
    prior: `None`, 'uniform', one of `estimated`, or numbers, as in `Aligned`.
    estimated: The names of priors that are estimated.

  Raises:
    ValueError: If it is neither, or if the numbers are not probabilities.
  """
  if prior is None or isinstance(prior, str):
    if prior not in (None, 'uniform', *estimated):
      names = ', '.join(map(repr, ('uniform', *estimated)))
      raise ValueError(
          f'`prior` must be {names}, or the probabilities of the classes, found '
          f'{prior!r}.'
      )
    return None if prior == 'uniform' else prior
  try:
    values = np.asarray(prior, np.float64)
  except (TypeError, ValueError):
    values = np.zeros([0])
  is_distribution = (
      values.ndim in (1, 2)
      and values.size > 0
      and bool((values > 0.0).all())
      and np.allclose(values.sum(axis=-1), 1.0, atol=1e-4)
  )
  if not is_distribution:
    raise ValueError(
        '`prior` must be probabilities above 0 that sum to 1, `[classes]`, or '
        f'`[labels, 2]` of labels that are present or not, found {prior!r}. Give a class '
        'that the transfer set hardly has a small share, such as 0.001.'
    )
  values = values / values.sum(axis=-1, keepdims=True)
  if values.ndim == 1:
    return tuple(values.tolist())
  return tuple(map(tuple, values.tolist()))


def check_prior_fits(prior: tuple[Any, ...], logits_shape: tf.TensorShape) -> None:
  """Checks that a given prior has the model's classes.

  Args:
    prior: As `checked_prior` returns it.
    logits_shape: The shape of one example's logits, `[..., classes]`.

  Raises:
    ValueError: If it does not.
  """
  expected: list[tuple[int, ...]] = [(max(logits_shape[-1], 2),)]
  if logits_shape[-1] == 1 and len(logits_shape) > 1:
    expected.append((logits_shape[-2], 2))
  if np.shape(prior) not in expected:
    raise ValueError(
        '`prior` must have a probability for each class of the model, of shape '
        f'{" or ".join(map(str, expected))}, found shape {np.shape(prior)}.'
    )
