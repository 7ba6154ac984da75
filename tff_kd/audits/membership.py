"""Membership inference: does a model tell whom it was trained on?

Two families of attacks, on arrays alone.

`infer_membership` needs the model only. It is honest about choosing: which attack, which
class and which threshold are chosen on one half of the examples, and what they achieve is
measured on the other, so that a model that tells nothing comes out at chance.

`infer_by_shadow_models` compares the model with others, trained with and without each
example (LiRA). Nothing is chosen there: all that is computed is reported.
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
# For each example, two models with it and two without: a mean alone has no variance.
MIN_SHADOW_MODELS = 4
# False positive rates at which the attacks with shadow models are measured.
LOW_RATES = (0.001, 0.01)
_CONFIDENCE = 0.95
# Of the trained attack: folds, of which each is scored by a model of the others, and
# within those the inverse strengths of regularization to try, and folds to try them on.
_FOLDS = 2
_STRENGTHS = np.logspace(-4, 2, 10)
_STRENGTH_FOLDS = 3
# With fewer shadow models, a variance of each example's own is mostly noise.
_MIN_FOR_OWN_VARIANCES = 64
# Where shadow models agree to the last digit, a variance of 0 would be certainty.
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
    attack: Its name.
    auc: Area under the ROC curve: how often a member scores above a non-member; .5 is
      chance.
    advantage: True minus false positive rate at the threshold that was chosen.
    num_members: On how many it was measured.
    num_non_members: The number of non-members.
    false_positive_rates: The ROC curve, for drawing.
    true_positive_rates: The true positive rate at each of them.
    label: The class that it is about; `None` for all.
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
    overall: Over all examples.
    worst_class: The class that looked worst; `None` if no class has enough examples.
    member_accuracy: The model's, on members.
    non_member_accuracy: And on non-members. The gap is what attacks live on.
  """

  overall: Finding
  worst_class: Optional[Finding]
  member_accuracy: float
  non_member_accuracy: float


class Detection(NamedTuple):
  """How many members an attack finds while it accuses few others.

  Attributes:
    allowed_rate: The false positive rate that was asked for.
    true_positive_rate: Members found at the threshold; an exact interval.
    false_positive_rate: Non-members taken for members there; an exact interval of what
      that threshold does on further ones. Its upper end is above `allowed_rate` where
      there are too few non-members to tell.
    threshold: Scores above it count as members.
  """

  allowed_rate: float
  true_positive_rate: Estimate
  false_positive_rate: Estimate
  threshold: float


class LiraFinding(NamedTuple):
  """The success of an attack with a fixed rule, for which nothing was chosen.

  Attributes:
    attack: Its name.
    auc: Area under the ROC curve; .5 is chance.
    detections: At the false positive rates `LOW_RATES`.
    num_members: On how many it was measured.
    num_non_members: The number of non-members.
    false_positive_rates: The ROC curve, for drawing.
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
    online: By shadow models with and without each example.
    offline: By those without it alone.
    loss: By the model's own confidence: what one achieves without shadow models.
    of_shadow: The online attack on the first shadow model, by all but its pair: what it
      finds where training is known. `None` with fewer than `MIN_SHADOW_MODELS` others.
    num_shadow_models: The number of shadow models.
    fixed_variance: Whether all examples had one variance.
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
    attack: Its name.
    members: int `[m]`, which members.
    non_members: int `[k]`, which non-members.
    label: The class that they have; `None` for all.
  """

  attack: str
  members: np.ndarray
  non_members: np.ndarray
  label: Optional[int] = None


def infer_membership(
    members: Predictions, non_members: Predictions, *, seed: int = 0
) -> Report:
  """Attacks a model, given what it says about members and about others.

  The threshold attacks score by loss and by modified entropy; the trained one by
  logistic regression on the logits and the loss, each example by a model that was
  fitted without it. Members and non-members are made equally many, at random.

  Source: Yeom et al., "Privacy Risk in Machine Learning: Analyzing the Connection to
  Overfitting" (CSF 2018), for the loss and the advantage; Song and Mittal, "Systematic
  Evaluation of Privacy Risks of Machine Learning Models" (USENIX Security 2021),
  equation 8, for the entropy; Shokri et al., "Membership Inference Attacks against
  Machine Learning Models" (S&P 2017), for the trained attack.

  Args:
    members: On examples that the model was trained with.
    non_members: On others of the same kind.
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
  """Returns the AUC of the loss alone, for few examples: there is nothing to choose.

  Non-members count by label as members do, so that the mix of labels tells nothing.

  Args:
    members: On a client's own examples.
    non_members: On others, of which those with labels that no member has are left out.

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
      # Without its pair, or each member would have one model fewer than each other.
      of_shadow=(
          attack('LiRA, online', confidences[0], membership[0], 2, True)
          if len(membership) >= MIN_SHADOW_MODELS + 2 else None
      ),
      num_shadow_models=len(membership),
      fixed_variance=bool(fixed_variance),
  )


def logit_scaled_confidences(predictions: Predictions) -> np.ndarray:
  """Returns the confidence in the true label on the scale of logits, log(p / (1 - p)).

  About normal over models, where p and log p are not. From logits, not from p: p rounds
  to 1 long before a model's confidence stops to grow.

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

  Models 2k and 2k + 1 share the examples out at random, so that each example is in
  exactly half of the models, and each model has half of the examples (the first of a
  pair one more, of an odd number).

  Args:
    num_models: An even number.
    num_examples: The number of examples that are shared out.
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
  2022), algorithm 1 and its offline variant. The fixed variance is that of the
  deviations from each example's own mean; the spread of the means, which it would
  otherwise hold, too, is what the attack takes out.

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

  The threshold is the smallest one that at most `rate` of the negatives exceed. Only
  negatives decide it, so the positives above it are binomial. Of further negatives,
  what the threshold's rate is follows a beta distribution, whose upper quantile is the
  one of the exact binomial interval.

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
    ValueError: If there are no scores, or the rate is none.
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
      # Ties leave fewer above than are allowed; that says nothing of further ones.
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
    The proportion; its interval covers with 95 % or more.
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
  # Of each positive, the share of negatives below; of each negative, of positives above.
  above = (ranks[:n] - scipy.stats.rankdata(positives)) / m
  below = 1.0 - (ranks[n:] - scipy.stats.rankdata(negatives)) / n
  stderr = np.sqrt(above.var(ddof=1) / n + below.var(ddof=1) / m)
  value = float(above.mean())
  reach = scipy.stats.norm.ppf(0.5 + _CONFIDENCE / 2) * stderr
  return Estimate(
      value, float(max(0.0, value - reach)), float(min(1.0, value + reach))
  )


def best_threshold(positives: np.ndarray, negatives: np.ndarray) -> float:
  """Returns the score from which on to say "member", for the largest advantage.

  Args:
    positives: Scores of members, float `[n]`, one or more.
    negatives: Scores of non-members, float `[m]`, one or more.

  Returns:
    A score; infinity where it is best to say "member" of nobody.
  """
  false, true, thresholds = _roc(positives, negatives)
  return float(thresholds[np.argmax(true - false)])


def mean_with_interval(values: Sequence[float]) -> Estimate:
  """Returns a mean with Student's interval, such as over clients.

  Args:
    values: Two or more; the interval of one is everything.

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
  """Means `[n]` and variances `[n]` (or one) of the used ones of `[models, n]`."""
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
  """By attack, the scores of members and of non-members, in their order."""
  return {
      'threshold': (-_losses(members), -_losses(non_members)),
      'threshold entropy': (
          -_modified_entropies(members), -_modified_entropies(non_members)
      ),
      'logistic regression': _regress(members, non_members, seed),
  }


def _regress(members: Predictions, non_members: Predictions, seed: int) -> _Scores:
  """The probability of membership by models that were fitted without the example."""
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
    # One thread: the arrays are small, and several wait for each other.
    with threadpoolctl.threadpool_limits(1), warnings.catch_warnings():
      # Features that separate perfectly, where any direction serves.
      warnings.simplefilter('ignore', exceptions.ConvergenceWarning)
      search.fit(features[order[fitted]], is_member[order[fitted]])
    scores[order[held_out]] = search.predict_proba(features[order[held_out]])[:, 1]
  return scores[:size], scores[size:]


def _roc(
    positives: np.ndarray, negatives: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """False and true positive rates, and the scores from which on they are."""
  return metrics.roc_curve(
      np.repeat([1, 0], [len(positives), len(negatives)]),
      np.concatenate([positives, negatives]),
  )


def _wilson(count: int, total: int) -> tuple[float, float]:
  """Wilson's interval of a proportion: where the normal test of it does not reject."""
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
  """The entropy of the predictions that knows the label: small if sure and right.

  Source: Song and Mittal (USENIX Security 2021), equation 8: -(1 - p_y) log p_y minus
  the sum over other classes i of p_i log(1 - p_i).
  """
  logits = np.asarray(predictions.logits, np.float64)
  rows, top = np.arange(len(logits)), np.argmax(logits, axis=-1)
  log_p = scipy.special.log_softmax(logits, axis=-1)
  # log(1 - p): where p may round to 1, of what is left of the others.
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
