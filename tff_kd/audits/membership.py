"""Membership inference: does a model reveal which examples it was trained on?

There are two families of attacks, on arrays alone.

`infer_membership` needs only the model. It chooses the attack, the class and the
threshold on one half of the examples, and measures their success on the other half, so
that a model that reveals nothing comes out at chance.

`infer_by_shadow_models` compares the model with others that were trained with and without
each example (LiRA). It chooses nothing and reports everything that it computes.
"""

from collections.abc import Sequence
from typing import NamedTuple, Optional
import warnings

import numpy as np
import scipy.special
import scipy.stats
from sklearn import exceptions
from sklearn import linear_model
from sklearn import metrics
from sklearn import model_selection
import threadpoolctl

# The least number of members, and of non-members: one half chooses, one measures.
MIN_EXAMPLES = 20
# Two models with each example and two without: one value has no variance.
MIN_SHADOW_MODELS = 4
# False positive rates at which the attacks with shadow models are measured.
LOW_RATES = (0.001, 0.01)
_CONFIDENCE = 0.95
# For the trained attack: the folds, each of which is scored by a model of the others, the
# inverse strengths of regularization to try, and the folds on which they are tried.
_FOLDS = 2
_STRENGTHS = np.logspace(-4, 2, 10)
_STRENGTH_FOLDS = 3
# With fewer shadow models, a separate variance of each example is mostly noise.
_MIN_FOR_OWN_VARIANCES = 64
# The smallest variance: 0, if shadow models agree exactly, would mean certainty.
_LEAST_VARIANCE = 1e-12

# The scores of members and of non-members, in the order of their examples.
_Scores = tuple[np.ndarray, np.ndarray]


class Predictions(NamedTuple):
  """Predictions of a model on labelled examples.

  Attributes:
    logits: float32 `[n, classes]`.
    labels: Class numbers, int32 `[n]` or `[n, 1]`; or one-hot labels, `[n, classes]`.
  """

  logits: np.ndarray
  labels: np.ndarray

  def with_class_numbers(self) -> 'Predictions':
    """Returns these with labels as class numbers `[n]`.

    Raises:
      ValueError: If labels of the shape of the logits are not one-hot.
    """
    logits, labels = np.asarray(self.logits), np.asarray(self.labels)
    if labels.ndim == 2 and labels.shape[1] == 1:
      labels = labels[:, 0]
    elif labels.ndim == 2 and labels.shape == logits.shape:
      wrong = np.any((labels != 0) & (labels != 1), axis=1) | (labels.sum(axis=1) != 1)
      if wrong.any():
        raise ValueError(
            'One-hot labels must have a single 1 and else 0 in each row, found '
            f'{labels[wrong][0].tolist()} in row {np.flatnonzero(wrong)[0]}. The audit '
            'needs one class for each example.'
        )
      labels = labels.argmax(axis=1)
    return Predictions(logits, labels)


class Estimate(NamedTuple):
  """A number with its 95 % confidence interval."""

  value: float
  low: float
  high: float

  def __str__(self) -> str:
    return f'{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]'


class Finding(NamedTuple):
  """The success of an attack on examples that were not used to choose it.

  Attributes:
    attack: The name of the attack.
    auc: Area under the ROC curve: how often a member scores above a non-member; .5 is
      chance.
    advantage: True minus false positive rate at the chosen threshold.
    num_members: The number of members.
    num_non_members: The number of non-members.
    false_positive_rates: The false positive rates of the ROC curve.
    true_positive_rates: The true positive rate at each of them.
    label: The class of the examples; `None` for all classes.
  """

  attack: str
  auc: Estimate
  advantage: Estimate
  num_members: int
  num_non_members: int
  false_positive_rates: np.ndarray
  true_positive_rates: np.ndarray
  label: Optional[int] = None


class Report(NamedTuple):
  """The results of membership inference against a model.

  Attributes:
    overall: The finding over all examples.
    worst_class: The finding for the class with the largest AUC on the half that chooses;
      `None` if no class has enough examples.
    member_accuracy: The model's accuracy on members.
    non_member_accuracy: The model's accuracy on non-members. Attacks exploit the gap.
  """

  overall: Finding
  worst_class: Optional[Finding]
  member_accuracy: float
  non_member_accuracy: float


class Detection(NamedTuple):
  """How many members an attack finds at a low false positive rate.

  Attributes:
    allowed_rate: The requested false positive rate.
    true_positive_rate: The share of members above the threshold, with an exact interval.
    false_positive_rate: The share of non-members above the threshold, with an exact
      interval of the threshold's rate on further non-members. The upper end exceeds
      `allowed_rate` if there are too few non-members.
    threshold: Examples with scores above it count as members.
  """

  allowed_rate: float
  true_positive_rate: Estimate
  false_positive_rate: Estimate
  threshold: float


class LiraFinding(NamedTuple):
  """The success of an attack with a fixed rule, for which nothing was chosen.

  Attributes:
    attack: The name of the attack.
    auc: Area under the ROC curve; .5 is chance.
    detections: The detections at the false positive rates `LOW_RATES`.
    num_members: The number of members.
    num_non_members: The number of non-members.
    false_positive_rates: The false positive rates of the ROC curve.
    true_positive_rates: The true positive rate at each of them.
  """

  attack: str
  auc: Estimate
  detections: tuple[Detection, ...]
  num_members: int
  num_non_members: int
  false_positive_rates: np.ndarray
  true_positive_rates: np.ndarray


class LiraReport(NamedTuple):
  """The results of the likelihood-ratio attacks against a model.

  Attributes:
    online: The attack with shadow models with and without each example.
    offline: The attack with only the shadow models without each example.
    loss: The attack with the model's own confidence, without shadow models.
    of_shadow: The online attack on the first shadow model, with all others except its
      pair, as a reference. `None` with fewer than `MIN_SHADOW_MODELS` others.
    num_shadow_models: The number of shadow models.
    fixed_variance: Whether all examples shared one variance.
  """

  online: LiraFinding
  offline: LiraFinding
  loss: LiraFinding
  of_shadow: Optional[LiraFinding]
  num_shadow_models: int
  fixed_variance: bool


class _Candidate(NamedTuple):
  """An attack on some of the examples.

  Attributes:
    attack: The name of the attack.
    members: The rows of the members, int `[m]`.
    non_members: The rows of the non-members, int `[k]`.
    label: The class of these examples; `None` for all classes.
  """

  attack: str
  members: np.ndarray
  non_members: np.ndarray
  label: Optional[int] = None


def infer_membership(
    members: Predictions, non_members: Predictions, *, seed: int = 0
) -> Report:
  """Attacks a model, given its predictions on members and on non-members.

  The threshold attacks score by the loss and by modified entropy. The trained attack
  scores by logistic regression on the logits and the loss, each example with a model that
  was fitted without it. A random choice makes members and non-members equally many.

  Source: Yeom et al., "Privacy Risk in Machine Learning: Analyzing the Connection to
  Overfitting" (CSF 2018), for the loss and the advantage; Song and Mittal, "Systematic
  Evaluation of Privacy Risks of Machine Learning Models" (USENIX Security 2021),
  equation 8, for the entropy; Shokri et al., "Membership Inference Attacks against
  Machine Learning Models" (S&P 2017), for the trained attack.

  Args:
    members: Predictions on examples that the model was trained with.
    non_members: Predictions on other examples of the same kind.
    seed: Decides the halves and the folds.

  Returns:
    A `Report`.

  Raises:
    ValueError: If there are too few examples, or the arrays do not fit.
  """
  members, non_members = members.with_class_numbers(), non_members.with_class_numbers()
  for name, predictions in (('members', members), ('non_members', non_members)):
    _check(name, predictions, members)
  rng = np.random.default_rng(seed)
  size = min(len(members.labels), len(non_members.labels))
  members, non_members = (
      Predictions(*(np.asarray(a)[rows] for a in predictions))
      for predictions in (members, non_members)
      for rows in [rng.permutation(len(predictions.labels))[:size]]
  )
  scores = _score(members, non_members, int(rng.integers(2**32)))
  # The examples are in random order: the first half chooses, the second one measures.
  rows = np.arange(size)
  chooses = rows < size // 2
  overall = _choose(
      [_Candidate(attack, rows, rows) for attack in scores], scores, chooses
  )
  of_classes = _candidates_of_classes(members, non_members, list(scores), chooses)
  worst = _choose(of_classes, scores, chooses)
  return Report(
      overall=_measure(overall, scores, chooses),
      worst_class=_measure(worst, scores, chooses) if worst is not None else None,
      member_accuracy=_accuracy(members),
      non_member_accuracy=_accuracy(non_members),
  )


def infer_by_loss(members: Predictions, non_members: Predictions) -> float:
  """Returns the AUC of the loss alone, for few examples: it chooses nothing.

  The AUC is computed within each label, so that the mix of labels has no influence.

  Args:
    members: Predictions on a client's own examples.
    non_members: Predictions on other examples; those with labels that no member has are
      left out.

  Returns:
    The AUC within each label, averaged over the members.

  Raises:
    ValueError: If no label is in both.
  """
  members, non_members = members.with_class_numbers(), non_members.with_class_numbers()
  losses = [_losses(predictions) for predictions in (members, non_members)]
  found, weights = [], []
  for label in np.intersect1d(members.labels, non_members.labels):
    inside = losses[0][members.labels == label]
    found.append(auc(-inside, -losses[1][non_members.labels == label]))
    weights.append(len(inside))
  if not found:
    raise ValueError('There is no label that members and non-members share.')
  return float(np.average(found, weights=weights))


def infer_by_shadow_models(
    target_confidences: np.ndarray,
    is_member: np.ndarray,
    shadow_confidences: np.ndarray,
    shadow_membership: np.ndarray,
    *,
    fixed_variance: Optional[bool] = None,
) -> LiraReport:
  """Attacks a model by comparison with models whose training is known (LiRA).

  Source: Carlini et al., "Membership Inference Attacks From First Principles" (S&P
  2022), algorithm 1 and its offline variant.

  Args:
    target_confidences: float `[n]`, of the attacked model, from
      `logit_scaled_confidences`.
    is_member: bool `[n]`, which examples it was trained with; both kinds must occur
      twice or more.
    shadow_confidences: float `[models, n]`, the same for the shadow models.
    shadow_membership: bool `[models, n]`, from `draw_shadow_membership`: models 2k and
      2k + 1 are a pair, and each is trained with what the other is trained without.
    fixed_variance: See `lira_scores`; if `None`, `True` for fewer than 64 shadow
      models.

  Returns:
    A `LiraReport`.

  Raises:
    ValueError: If the arrays do not fit, are not finite, or there are too few models.
  """
  target = np.asarray(target_confidences, np.float64)
  is_member = np.asarray(is_member, bool)
  confidences = np.asarray(shadow_confidences, np.float64)
  membership = np.asarray(shadow_membership, bool)
  _check_shadows(target, is_member, membership)
  if fixed_variance is None:
    fixed_variance = len(membership) < _MIN_FOR_OWN_VARIANCES

  def attack(name, target, truth, first, online) -> LiraFinding:
    scores = lira_scores(
        target, confidences[first:], membership[first:], online=online,
        fixed_variance=fixed_variance,
    )
    return _lira_finding(name, scores[truth], scores[~truth])

  return LiraReport(
      online=attack('LiRA, online', target, is_member, 0, True),
      offline=attack('LiRA, offline', target, is_member, 0, False),
      loss=_lira_finding('loss alone', target[is_member], target[~is_member]),
      # Without the pair of the first model: otherwise members would have one model fewer.
      of_shadow=(
          attack('LiRA, online', confidences[0], membership[0], 2, True)
          if len(membership) >= MIN_SHADOW_MODELS + 2 else None
      ),
      num_shadow_models=len(membership),
      fixed_variance=bool(fixed_variance),
  )


def logit_scaled_confidences(predictions: Predictions) -> np.ndarray:
  """Returns the confidence in the true label on the scale of logits, log(p / (1 - p)).

  It is about normally distributed over models, unlike p and log p. It is computed from
  logits, because p rounds to 1 while the confidence still grows.

  Source: Carlini et al., "Membership Inference Attacks From First Principles" (S&P
  2022), algorithm 1, phi.

  Args:
    predictions: Finite predictions of two classes or more.

  Returns:
    float64 `[n]`.

  Raises:
    ValueError: If there are fewer than two classes, or a logit is not finite.
  """
  logits = np.asarray(predictions.logits, np.float64)
  if logits.ndim != 2 or logits.shape[1] < 2 or not np.all(np.isfinite(logits)):
    raise ValueError(
        'Logits must be finite numbers [n, classes] of two classes or more, found '
        f'{logits.shape}.'
    )
  rows = np.arange(len(logits))
  labels = predictions.with_class_numbers().labels
  others = logits.copy()
  others[rows, labels] = -np.inf
  return logits[rows, labels] - scipy.special.logsumexp(others, axis=-1)


def draw_shadow_membership(
    num_models: int, num_examples: int, *, seed: int = 0
) -> np.ndarray:
  """Returns which shadow model is trained with which examples.

  Models 2k and 2k + 1 divide the examples at random, so that exactly half of the models
  are trained with each example, and each model with half of the examples (the first of a
  pair with one more if their number is odd).

  Args:
    num_models: An even number.
    num_examples: The number of examples.
    seed: Decides the halves.

  Returns:
    bool `[num_models, num_examples]`.

  Raises:
    ValueError: If `num_models` is odd or too small.
  """
  if num_models < MIN_SHADOW_MODELS or num_models % 2:
    raise ValueError(
        'The number of shadow models must be even, because pairs share the examples '
        f'out, and {MIN_SHADOW_MODELS} or more; found {num_models}.'
    )
  rng = np.random.default_rng(seed)
  first = np.zeros((num_models // 2, num_examples), bool)
  for membership in first:
    membership[rng.permutation(num_examples)[: -(-num_examples // 2)]] = True
  return np.stack([first, ~first], axis=1).reshape(num_models, num_examples)


def lira_scores(
    target_confidences: np.ndarray,
    shadow_confidences: np.ndarray,
    shadow_membership: np.ndarray,
    *,
    online: bool = True,
    fixed_variance: bool = True,
) -> np.ndarray:
  """Computes the scores of the likelihood-ratio attack; members tend to score higher.

  For each example, normals are fitted to the confidences of the shadow models with it
  and without it. Online, the score is the logarithm of the ratio of the two densities
  at the target's confidence (0: both are equally likely). Offline, it is the target's
  distance from the mean without, in standard deviations: in the same order as the
  source's 1 - P[Z > phi], which rounds to 1 for the surest members.

  Source: Carlini et al., "Membership Inference Attacks From First Principles" (S&P
  2022), algorithm 1 and its offline variant. The fixed variance is that of the deviations
  from each example's own mean; it leaves out the spread of the means, which the attack
  removes.

  Args:
    target_confidences: float `[n]`, of the attacked model, about normal over models,
      such as `logit_scaled_confidences`.
    shadow_confidences: float `[models, n]`, the same for the shadow models.
    shadow_membership: bool `[models, n]`, whether the model was trained with the
      example.
    online: Whether to compare with the models with the example, too.
    fixed_variance: Whether all examples have one variance with, and one without, for
      few shadow models; otherwise, each its own.

  Returns:
    float64 `[n]`.

  Raises:
    ValueError: If the arrays do not fit, are not finite, or an example has too few
      models to fit a normal.
  """
  target = np.asarray(target_confidences, np.float64)
  confidences = np.asarray(shadow_confidences, np.float64)
  membership = np.asarray(shadow_membership, bool)
  if (
      target.ndim != 1 or confidences.shape[1:] != target.shape
      or membership.shape != confidences.shape
  ):
    raise ValueError(
        'Confidences must be [n] of the target and [models, n] of the shadow models, and '
        f'the membership [models, n], found {target.shape}, {confidences.shape} and '
        f'{membership.shape}.'
    )
  if not (np.all(np.isfinite(target)) and np.all(np.isfinite(confidences))):
    raise ValueError('Confidences must be finite.')
  mean, variance = _fit_normals(confidences, ~membership, fixed_variance)
  if not online:
    return (target - mean) / np.sqrt(variance)
  log_without = scipy.stats.norm.logpdf(target, mean, np.sqrt(variance))
  mean, variance = _fit_normals(confidences, membership, fixed_variance)
  return scipy.stats.norm.logpdf(target, mean, np.sqrt(variance)) - log_without


def tpr_at_fpr(positives: np.ndarray, negatives: np.ndarray, rate: float) -> Detection:
  """Returns how many positives score above all but a small share of the negatives.

  The threshold is the smallest one that at most `rate` of the negatives exceed. Only the
  negatives decide it, so the number of positives above it is binomial. The threshold's
  rate on further negatives has a beta distribution, whose upper quantile is that of the
  exact binomial interval.

  Source: Clopper and Pearson, "The Use of Confidence or Fiducial Limits Illustrated in
  the Case of the Binomial" (Biometrika 1934), the intervals; David and Nagaraja, "Order
  Statistics" (2003), the distribution of an order statistic.

  Args:
    positives: Scores, float `[n]`, one or more.
    negatives: Scores of non-members, float `[m]`, one or more.
    rate: Between 0 and 1, exclusively. Below 1 / m, no negative may be above.

  Returns:
    A `Detection`.

  Raises:
    ValueError: If there are no scores, or `rate` is out of range.
  """
  positives, negatives = np.asarray(positives), np.asarray(negatives)
  if not (len(positives) and len(negatives)):
    raise ValueError('There must be scores of positives and of negatives.')
  if not 0.0 < rate < 1.0:
    raise ValueError(f'`rate` must be between 0 and 1, exclusively, found {rate}.')
  allowed = int(np.floor(rate * len(negatives) + 1e-9))  # .001 * 3000 may be below 3.
  threshold = np.sort(negatives)[len(negatives) - 1 - allowed]
  exceeding = int(np.sum(negatives > threshold))
  false = proportion_with_interval(exceeding, len(negatives))
  return Detection(
      allowed_rate=rate,
      true_positive_rate=proportion_with_interval(
          int(np.sum(positives > threshold)), len(positives)
      ),
      # Ties leave fewer above than allowed, but not among further negatives.
      false_positive_rate=false._replace(
          high=proportion_with_interval(allowed, len(negatives)).high
      ),
      threshold=float(threshold),
  )


def proportion_with_interval(count: int, total: int) -> Estimate:
  """Returns a proportion with its exact interval.

  Source: Clopper and Pearson, "The Use of Confidence or Fiducial Limits Illustrated in
  the Case of the Binomial" (Biometrika 1934).

  Args:
    count: Successes.
    total: Trials, one or more.

  Returns:
    The proportion, with an interval that covers with 95 % or more.
  """
  tail = (1.0 - _CONFIDENCE) / 2
  beta = scipy.stats.beta
  return Estimate(
      count / total,
      float(beta.ppf(tail, count, total - count + 1)) if count else 0.0,
      float(beta.isf(tail, count + 1, total - count)) if count < total else 1.0,
  )


def auc(positives: np.ndarray, negatives: np.ndarray) -> float:
  """Returns how often a positive scores above a negative; half of a tie counts.

  Args:
    positives: Scores, float `[n]`, one or more.
    negatives: Scores of non-members, float `[m]`, one or more.

  Returns:
    Between 0 and 1.
  """
  ranks = scipy.stats.rankdata(np.concatenate([positives, negatives]))
  n = len(positives)
  return float(
      (ranks[:n].sum() - n * (n + 1) / 2) / (n * len(negatives))
  )


def auc_with_interval(positives: np.ndarray, negatives: np.ndarray) -> Estimate:
  """Returns the AUC with its confidence interval.

  Source: DeLong, DeLong and Clarke-Pearson, "Comparing the Areas under Two or More
  Correlated Receiver Operating Characteristic Curves" (Biometrics 1988), the variance.

  Args:
    positives: Scores, float `[n]`, two or more.
    negatives: Scores of non-members, float `[m]`, one or more.

  Returns:
    The AUC with a normal interval, cut at 0 and 1.
  """
  n, m = len(positives), len(negatives)
  ranks = scipy.stats.rankdata(np.concatenate([positives, negatives]))
  # The share of negatives below each positive, and of positives above each negative.
  above = (ranks[:n] - scipy.stats.rankdata(positives)) / m
  below = 1.0 - (ranks[n:] - scipy.stats.rankdata(negatives)) / n
  stderr = np.sqrt(above.var(ddof=1) / n + below.var(ddof=1) / m)
  value = float(above.mean())
  reach = scipy.stats.norm.ppf(0.5 + _CONFIDENCE / 2) * stderr
  return Estimate(
      value, float(max(0.0, value - reach)), float(min(1.0, value + reach))
  )


def best_threshold(positives: np.ndarray, negatives: np.ndarray) -> float:
  """Returns the lowest score of a "member", for the largest advantage.

  Args:
    positives: Scores of members, float `[n]`, one or more.
    negatives: Scores of non-members, float `[m]`, one or more.

  Returns:
    A score; infinity if it is best to call no example a member.
  """
  false, true, thresholds = _roc(positives, negatives)
  return float(thresholds[np.argmax(true - false)])


def mean_with_interval(values: Sequence[float]) -> Estimate:
  """Returns a mean with Student's interval, such as over clients.

  Args:
    values: Two or more numbers; the interval of a single one is infinite.

  Returns:
    The mean.
  """
  array = np.asarray(values, np.float64)
  mean = float(array.mean())
  if len(array) < 2:
    return Estimate(mean, -np.inf, np.inf)
  quantile = scipy.stats.t.ppf(0.5 + _CONFIDENCE / 2, len(array) - 1)
  reach = quantile * array.std(ddof=1) / np.sqrt(len(array))
  return Estimate(mean, float(mean - reach), float(mean + reach))


def difference_with_interval(
    count: int, total: int, other_count: int, other_total: int
) -> Estimate:
  """Returns the difference of two independent proportions with its interval.

  Source: Newcombe, "Interval Estimation for the Difference between Independent
  Proportions: Comparison of Eleven Methods" (Statistics in Medicine 1998), method 10,
  from the intervals of Wilson.

  Args:
    count: Successes of the first.
    total: Trials of the first, one or more.
    other_count: Successes of the second, which is subtracted.
    other_total: Trials of the second, one or more.

  Returns:
    `count / total - other_count / other_total`.
  """
  first, second = count / total, other_count / other_total
  low, high = _wilson(count, total)
  other_low, other_high = _wilson(other_count, other_total)
  difference = first - second
  return Estimate(
      difference,
      float(difference - np.hypot(first - low, other_high - second)),
      float(difference + np.hypot(high - first, second - other_low)),
  )


def _candidates_of_classes(
    members: Predictions,
    non_members: Predictions,
    attacks: Sequence[str],
    chooses: np.ndarray,
) -> list[_Candidate]:
  """Returns each attack on each class that has enough examples in both halves."""
  candidates = []
  for label in np.unique(members.labels):
    of_members = np.flatnonzero(members.labels == label)
    others = np.flatnonzero(non_members.labels == label)
    if any(
        min(sum(chooses[rows]), sum(~chooses[rows])) < MIN_EXAMPLES // 2
        for rows in (of_members, others)
    ):
      continue
    candidates += [
        _Candidate(attack, of_members, others, int(label)) for attack in attacks
    ]
  return candidates


def _choose(
    candidates: Sequence[_Candidate], scores: dict[str, _Scores], chooses: np.ndarray
) -> Optional[_Candidate]:
  """Returns the candidate with the largest AUC on the half that chooses, if any."""
  return max(
      candidates, key=lambda c: auc(*_scores_of(c, scores, chooses)), default=None
  )


def _measure(
    candidate: _Candidate, scores: dict[str, _Scores], chooses: np.ndarray
) -> Finding:
  """Measures an attack on one half with the threshold that the other half chooses."""
  threshold = best_threshold(*_scores_of(candidate, scores, chooses))
  inside, outside = _scores_of(candidate, scores, ~chooses)
  false, true, _ = _roc(inside, outside)
  return Finding(
      attack=candidate.attack,
      auc=auc_with_interval(inside, outside),
      advantage=difference_with_interval(
          int(np.sum(inside >= threshold)), len(inside),
          int(np.sum(outside >= threshold)), len(outside),
      ),
      num_members=len(inside),
      num_non_members=len(outside),
      false_positive_rates=false,
      true_positive_rates=true,
      label=candidate.label,
  )


def _scores_of(
    candidate: _Candidate, scores: dict[str, _Scores], is_used: np.ndarray
) -> _Scores:
  """Returns the scores of those of the candidate's examples that are used."""
  inside, outside = scores[candidate.attack]
  members, others = candidate.members, candidate.non_members
  return inside[members[is_used[members]]], outside[others[is_used[others]]]


def _lira_finding(
    attack: str, positives: np.ndarray, negatives: np.ndarray
) -> LiraFinding:
  false, true, _ = _roc(positives, negatives)
  return LiraFinding(
      attack=attack,
      auc=auc_with_interval(positives, negatives),
      detections=tuple(tpr_at_fpr(positives, negatives, rate) for rate in LOW_RATES),
      num_members=len(positives),
      num_non_members=len(negatives),
      false_positive_rates=false,
      true_positive_rates=true,
  )


def _fit_normals(
    confidences: np.ndarray, used: np.ndarray, fixed_variance: bool
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the means `[n]` and the variances `[n]`, or one, of the used confidences."""
  counts = used.sum(axis=0)
  freedom = counts - 1
  if np.any(counts < 1) or (
      np.sum(freedom) < 1 if fixed_variance else np.any(freedom < 1)
  ):
    raise ValueError(
        'There are too few shadow models: for each example, one or more must be trained '
        'with it and as many without it (two with `fixed_variance=False`), and for some '
        'example two.'
    )
  means = np.sum(confidences, axis=0, where=used) / counts
  squares = np.sum(np.square(confidences - means), axis=0, where=used)
  variances = (
      squares.sum() / float(freedom.sum()) if fixed_variance else squares / freedom
  )
  return means, np.maximum(variances, _LEAST_VARIANCE)


def _score(
    members: Predictions, non_members: Predictions, seed: int
) -> dict[str, _Scores]:
  """Returns the scores of members and of non-members by attack."""
  return {
      'threshold': (-_losses(members), -_losses(non_members)),
      'threshold entropy': (
          -_modified_entropies(members), -_modified_entropies(non_members)
      ),
      'logistic regression': _regress(members, non_members, seed),
  }


def _regress(members: Predictions, non_members: Predictions, seed: int) -> _Scores:
  """Returns the probability of membership by models fitted without the example."""
  features = np.concatenate(
      [np.column_stack([p.logits, _losses(p)]) for p in (members, non_members)]
  )
  size = len(members.labels)
  is_member = np.arange(len(features)) < size
  order = np.random.RandomState(seed).permutation(len(features))
  scores = np.empty(len(features))
  folds = model_selection.StratifiedKFold(_FOLDS).split(features, is_member[order])
  for fitted, held_out in folds:
    search = model_selection.GridSearchCV(
        linear_model.LogisticRegression(max_iter=1000), {'C': _STRENGTHS},
        cv=_STRENGTH_FOLDS,
    )
    # The arrays are small: several threads would only wait for each other.
    with threadpoolctl.threadpool_limits(1), warnings.catch_warnings():
      # Perfectly separable features do not converge; any separating model will do.
      warnings.simplefilter('ignore', exceptions.ConvergenceWarning)
      search.fit(features[order[fitted]], is_member[order[fitted]])
    scores[order[held_out]] = search.predict_proba(features[order[held_out]])[:, 1]
  return scores[:size], scores[size:]


def _roc(
    positives: np.ndarray, negatives: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns false positive rates, true positive rates, and their thresholds."""
  return metrics.roc_curve(
      np.repeat([1, 0], [len(positives), len(negatives)]),
      np.concatenate([positives, negatives]),
  )


def _wilson(count: int, total: int) -> tuple[float, float]:
  """Returns Wilson's interval of a proportion."""
  z = scipy.stats.norm.ppf(0.5 + _CONFIDENCE / 2)
  center = (count + z**2 / 2) / (total + z**2)
  reach = z * np.sqrt(count * (total - count) / total + z**2 / 4) / (total + z**2)
  return center - reach, center + reach


def _check(name: str, predictions: Predictions, like: Predictions) -> None:
  logits, labels = np.asarray(predictions.logits), np.asarray(predictions.labels)
  if logits.ndim != 2 or labels.shape != logits.shape[:1] or (
      logits.shape[1] != np.shape(like.logits)[1]
  ):
    raise ValueError(
        f'`{name}` must have logits [n, classes] and labels [n] or one-hot labels, of '
        f'the same classes for both, found {logits.shape} and {labels.shape}.'
    )
  if len(labels) < MIN_EXAMPLES:
    raise ValueError(
        f'`{name}` must be {MIN_EXAMPLES} examples or more, half of which choose the '
        f'attack and half measure it; found {len(labels)}.'
    )
  if not np.all(np.isfinite(logits)):
    raise ValueError(
        f'`{name}` has logits that are not finite: the model that made them is broken.'
    )


def _check_shadows(
    target: np.ndarray, is_member: np.ndarray, membership: np.ndarray
) -> None:
  if is_member.shape != target.shape:
    raise ValueError(
        '`is_member` must be as long as `target_confidences`, found '
        f'{is_member.shape} and {target.shape}.'
    )
  if min(np.sum(is_member), np.sum(~is_member)) < 2:
    raise ValueError('`is_member` must name two members and two others, or more of both.')
  if len(membership) % 2 or np.any(membership[::2] == membership[1::2]):
    raise ValueError(
        '`shadow_membership` must be of pairs of models, each trained with what the '
        'other is trained without, as `draw_shadow_membership` gives it.'
    )


def _losses(predictions: Predictions) -> np.ndarray:
  logits = np.asarray(predictions.logits, np.float64)
  return -scipy.special.log_softmax(logits, axis=-1)[
      np.arange(len(logits)), predictions.labels
  ]


def _modified_entropies(predictions: Predictions) -> np.ndarray:
  """Returns the modified entropy: small if a prediction is confident and right.

  Source: Song and Mittal (USENIX Security 2021), equation 8: -(1 - p_y) log p_y minus
  the sum over other classes i of p_i log(1 - p_i).
  """
  logits = np.asarray(predictions.logits, np.float64)
  rows, top = np.arange(len(logits)), np.argmax(logits, axis=-1)
  log_p = scipy.special.log_softmax(logits, axis=-1)
  # log(1 - p); for the largest p, which may round to 1, from the other classes.
  others = log_p.copy()
  others[rows, top] = -np.inf
  p, log_rest = np.exp(log_p), np.zeros_like(log_p)
  small = np.arange(logits.shape[1]) != top[:, np.newaxis]
  log_rest[small] = np.log1p(-p[small])
  log_rest[rows, top] = scipy.special.logsumexp(others, axis=-1)
  of_label = rows, predictions.labels
  of_others = p * log_rest
  of_others[of_label] = np.exp(log_rest[of_label]) * log_p[of_label]
  return -of_others.sum(axis=-1)


def _accuracy(predictions: Predictions) -> float:
  return float(np.mean(np.argmax(predictions.logits, axis=-1) == predictions.labels))
