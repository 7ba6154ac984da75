"""How certain a client is of a transfer example: whether it looks like its own data.

Source: Sattler et al., "FedAUX: Leveraging Unlabeled Auxiliary Data in Federated
Learning" (2021). Each client fits, once, a logistic regression that tells its examples
(t = +1) from public negatives (t = -1), on features h of norm at most 1:

  w_k = argmin_w mean log(1 + exp(-t <w, h(x)>)) + regularization / 2 ||w||^2,

the mean being over the n examples and negatives. Its certainty of x is s_k(x) =
sigmoid(<w_k, h(x)>) + 1e-8.

Privacy is by output perturbation (Chaudhuri, Monteleoni and Sarwate, "Differentially
Private Empirical Risk Minimization", 2011), with Gaussian noise. The gradient of one
example's loss has a norm of at most ||h(x)|| <= 1, so that another example in its place
moves the gradient of the mean by 2 / n at most; the objective is strongly convex with
modulus `regularization`, so that its minimiser moves by at most

  2 / (regularization n).

Noise for that makes w_k (epsilon, delta)-differentially private with respect to the
replacement of one of the client's examples (their number is taken to be known), and
with it whatever is computed from w_k and public examples: all of a client's scores, in
every round. The model updates and the predictions that clients send beside them are NOT
covered, and a client that takes part in several runs releases a scorer in each.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple, Optional

from dp_accounting.pld import accountant
from dp_accounting.pld import common
import tensorflow as tf

from tff_kd.client import companions
from tff_kd.data import transfer
from tff_kd import graphs
from tff_kd import models

# Inputs -> float [n, d], in plain TensorFlow.
FeatureFn = Callable[[Any], tf.Tensor]

# The largest distance of a fit from the minimiser.
FIT_TOLERANCE = 1e-6
_LOWEST_SCORE = 1e-8
# Separates this random stream from others of the same seed.
_NOISE_STREAM = 2


class ScorerState(NamedTuple):
  """A client's state: its scorer, once it has one.

  Attributes:
    weights: float32 `[d + 1]`, w_k with its noise.
    is_fitted: bool, whether they are there yet.
  """

  weights: Any
  is_fitted: Any


def flat_inputs(inputs: Any) -> tf.Tensor:
  """Flattens the inputs: the default features.

  Args:
    inputs: A structure of tensors `[n, ...]`.

  Returns:
    float32 `[n, d]`.
  """
  flat = [tf.cast(t, tf.float32) for t in tf.nest.flatten(inputs)]
  return tf.concat(
      [tf.reshape(t, [tf.shape(t)[0], math.prod(t.shape[1:])]) for t in flat], axis=1
  )


def bounded_features(features: tf.Tensor) -> tf.Tensor:
  """Returns features of norm at most 1, with a constant entry for the bias.

  Args:
    features: float `[n, d]`. Rows of a norm above 1 are scaled down to 1.

  Returns:
    float32 `[n, d + 1]`, h in the paper.
  """
  clipped = tf.clip_by_norm(tf.cast(features, tf.float32), 1.0, axes=[1])
  return tf.concat([clipped, tf.ones_like(clipped[:, :1])], axis=1) / math.sqrt(2.0)


def num_steps(regularization: float) -> int:
  """Returns after how many steps `fit` is within `FIT_TOLERANCE` of the minimiser.

  Args:
    regularization: The weight of the squared norm, above 0.
  """
  # The objective's excess is at most log 2 (1 - 1 / root)^steps, as it is log 2 at 0, and
  # at least regularization / 2 times the squared distance.
  excess = regularization / 2 * FIT_TOLERANCE**2
  return math.ceil(_root(regularization) * math.log(math.log(2) / excess))


def _root(regularization: float) -> float:
  """The root of the condition number: a logistic loss bends by 1/4 at most."""
  return math.sqrt((0.25 + regularization) / regularization)


def fit(
    positives: tf.Tensor, negatives: tf.Tensor, regularization: float
) -> tf.Tensor:
  """Returns the regularised logistic regression that tells positives from negatives.

  As features are bounded, the objective's curvature is known, and with it a rate and a
  number of steps (Nesterov's constant scheme for strongly convex functions) that reach
  the minimiser whatever the data.

  Args:
    positives: float32 `[p, d]`, rows of norm at most 1.
    negatives: float32 `[q, d]`, of public examples; p + q is 1 or more.
    regularization: Above 0.

  Returns:
    float64 `[d]`.
  """
  # In double precision: rounding is magnified by 1 / regularization.
  signed = tf.cast(tf.concat([positives, -negatives], axis=0), tf.float64)
  signed = tf.ensure_shape(signed, [None, positives.shape[1]])
  n = tf.cast(tf.shape(signed)[0], tf.float64)
  smoothness = 0.25 + regularization
  root = _root(regularization)
  momentum = (root - 1.0) / (root + 1.0)

  def step(w, ahead):
    pull = tf.sigmoid(-tf.linalg.matvec(signed, ahead)) / n
    gradient = regularization * ahead - tf.linalg.matvec(
        signed, pull, transpose_a=True
    )
    new = ahead - gradient / smoothness
    return new, new + momentum * (new - w)

  start = tf.zeros([signed.shape[1]], tf.float64)
  return tf.while_loop(
      lambda *_: tf.constant(True),
      step,
      (start, start),
      maximum_iterations=num_steps(regularization),
  )[0]


def sensitivity(regularization: float, n: Any) -> Any:
  """Returns how far a fit moves, in l2, if one example is replaced.

  2 / (regularization n) of the minimiser, and what two fits may be off it.

  Args:
    regularization: Above 0.
    n: All examples of the fit, positives and negatives.
  """
  return 2.0 / (regularization * n) + 2.0 * FIT_TOLERANCE


def noise_multiplier(epsilon: float, delta: float) -> float:
  """Returns the smallest noise of a single Gaussian mechanism for (epsilon, delta).

  dp-accounting calibrates it.

  Args:
    epsilon: Above 0.
    delta: Above 0 and below 1.

  Returns:
    The standard deviation of the noise divided by the sensitivity.

  Raises:
    ValueError: If `epsilon` is not above 0 or `delta` not between 0 and 1.
  """
  if not 0.0 < epsilon < math.inf:
    raise ValueError(
        '`epsilon` must be finite and above 0, or None for no noise and no privacy, '
        f'found {epsilon!r}.'
    )
  if not 0.0 < delta < 1.0:
    raise ValueError(
        f'`delta` must be above 0 and below 1 (well below 1 / examples), found {delta!r}.'
    )
  return accountant.get_smallest_gaussian_noise(
      common.DifferentialPrivacyParameters(epsilon, delta)
  )


def score(weights: tf.Tensor, features: tf.Tensor) -> tf.Tensor:
  """Returns the certainty score s(x), above 0 and at most 1.

  Args:
    weights: float32 `[d]`.
    features: float32 `[n, d]`, of `bounded_features`.

  Returns:
    float32 `[n]`.
  """
  certainty = tf.sigmoid(tf.linalg.matvec(features, weights))
  return tf.minimum(certainty + _LOWEST_SCORE, 1.0)


class CertaintyScorer(companions.Companion):
  """Fits a client's scorer in its first round; tells its certainty in every round.

  For a rule that weighs by a given certainty, `knowledge.CertaintyWeighted('given')`,
  in any algorithm that averages students and sends predictions.

  A client's noise follows from the seed and the client's number, so that a resumed or
  repeated simulation releases the same scorer. Whoever knows the seed can take the
  noise off: a deployment must draw it at the client, in secret.
  """

  gives_certainty = True
  # Certainties go up within the predictions' sums.
  exchanges = False

  def __init__(
      self,
      *,
      input_spec: Any,
      negatives: Any,
      feature_fn: FeatureFn = flat_inputs,
      epsilon: Optional[float],
      delta: float = 1e-5,
      regularization: float = 0.01,
      seed: int = 0,
  ):
    """Initializes the companion.

    Args:
      input_spec: The clients' `dataset.element_spec`.
      negatives: Public inputs unlike any one client's: arrays `[n, ...]`, an unbatched
        `tf.data.Dataset` or a `TransferSet`; not those of the transfer set, of which
        clients would become uncertain.
      feature_fn: Inputs to features, float `[n, d]`: what the scorer sees of an
        example. A trained extractor brings its weights as constants.
      epsilon: The privacy that the noise gives; no noise and no privacy if `None`.
      delta: The delta of that privacy.
      regularization: lambda. The larger, the less noise and the flatter the scores.
      seed: Decides the noise, with a client's number.

    Raises:
      ValueError: If a number is out of range, the negatives are not such inputs, or the
        features no matrix.
    """
    if not 0.0 < regularization < math.inf:
      raise ValueError(
          f'`regularization` must be finite and above 0, found {regularization!r}: '
          'without it nothing bounds what one example changes.'
      )
    self._multiplier = None if epsilon is None else noise_multiplier(epsilon, delta)
    # A dataset may repeat an example, which would then move the fit further than the
    # noise allows for.
    self.needs_client_number = epsilon is not None
    self._regularization = regularization
    self._feature_fn, self._seed = feature_fn, seed
    inputs_spec, _ = models.split_batch(input_spec)
    self._negatives = transfer.as_transfer_set(
        negatives, 'negatives', has_labels=False
    )
    if not models.is_compatible(inputs_spec, self._negatives.inputs_spec):
      raise ValueError(
          f"`negatives` must be like the clients' inputs: expected {inputs_spec}, found "
          f'{self._negatives.inputs_spec}. Convert them to that shape and dtype.'
      )
    self._dim = _num_features(feature_fn, inputs_spec) + 1

  def initial_client_state(self):
    return ScorerState(tf.zeros([self._dim]), tf.constant(False))

  def attach(self, student):
    del student  # A scorer knows the examples only.

    def begin(beginning):
      kept = beginning.client_state
      scorer = tf.cond(
          kept.is_fitted,
          lambda: kept.weights,
          lambda: self._release(beginning.examples),
      )
      return (), companions.CompanionValues(state=scorer)

    def end(observed, student, companion):
      del observed, student
      return ScorerState(companion.state, tf.constant(True)), ()

    return companions.Attachment(
        begin=begin,
        end=end,
        certainty=lambda inputs, companion: score(
            companion.state, self._features(inputs)
        ),
    )

  def _features(self, inputs: Any) -> tf.Tensor:
    return bounded_features(graphs.user_function(self._feature_fn)(inputs))

  def _release(self, examples: companions.ClientExamples) -> tf.Tensor:
    """A client's scorer with its noise."""
    positives = examples.map_inputs(self._features)
    negatives = self._negatives.map_inputs(
        self._features, tf.range(self._negatives.size)
    )
    weights = fit(positives, negatives, self._regularization)
    if self._multiplier is not None:
      n = tf.shape(positives)[0] + self._negatives.size
      sigma = self._multiplier * sensitivity(
          self._regularization, tf.cast(n, tf.float64)
      )
      seed = tf.random.experimental.stateless_fold_in(
          tf.constant([self._seed, _NOISE_STREAM]), examples.client
      )
      weights += sigma * tf.random.stateless_normal(
          [self._dim], seed, dtype=tf.float64
      )
    return tf.cast(weights, tf.float32)


def _num_features(feature_fn: FeatureFn, inputs_spec: Any) -> int:
  features = tf.function(feature_fn).get_concrete_function(inputs_spec).outputs[0]
  shape = features.shape
  if shape.rank != 2 or shape[1] is None or not features.dtype.is_floating:
    raise ValueError(
        '`feature_fn` must return floats [n, d] with a d that is known, found '
        f'{features.dtype.name} {shape}. Flatten or pool what it returns.'
    )
  return shape[1]
