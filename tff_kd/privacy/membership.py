"""Membership inference: does a model tell whom it was trained on?

The attacks are tensorflow-privacy's. What is reported is honest about choosing: which
attack, which class and which threshold are chosen on one half of the examples, and what
they achieve is measured on the other, so that a model that tells nothing comes out at
chance.
"""

from collections.abc import Sequence
import contextlib
from typing import NamedTuple, Optional
import warnings

import numpy as np
import scipy.special
import scipy.stats
from sklearn import metrics
from statsmodels.stats import proportion
from tensorflow_privacy.privacy.privacy_tests.membership_inference_attack import (
    data_structures,
)
from tensorflow_privacy.privacy.privacy_tests.membership_inference_attack import (
    membership_inference_attack,
)

_ATTACKS = (
    data_structures.AttackType.THRESHOLD_ATTACK,
    data_structures.AttackType.THRESHOLD_ENTROPY_ATTACK,
    data_structures.AttackType.LOGISTIC_REGRESSION,
)
# Of members and of non-members each, for one half to choose and one to measure.
MIN_EXAMPLES = 20
_CONFIDENCE = 0.95


class Predictions(NamedTuple):
  """What a model says about labelled examples.

  Attributes:
    logits: float32 `[n, classes]`.
    labels: int32 `[n]`.
  """

  logits: np.ndarray
  labels: np.ndarray


class Estimate(NamedTuple):
  """A number with its 95 % confidence interval."""

  value: float
  low: float
  high: float

  def __str__(self) -> str:
    return f'{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]'


class Finding(NamedTuple):
  """What an attack achieved on examples that had no part in choosing it.

  Attributes:
    attack: Its name.
    auc: Area under the ROC curve: how often a member scores above a non-member; .5 is
      chance.
    advantage: True minus false positive rate at the threshold that was chosen.
    num_members: On how many it was measured.
    num_non_members: Likewise.
    false_positive_rates: The ROC curve, for drawing.
    true_positive_rates: Likewise.
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
  """What membership inference found out of a model.

  Attributes:
    overall: Over all examples.
    worst_class: Of the class that looked worst; `None` if none has enough examples.
    member_accuracy: The model's, on members.
    non_member_accuracy: And on non-members. The gap is what attacks live on.
  """

  overall: Finding
  worst_class: Optional[Finding]
  member_accuracy: float
  non_member_accuracy: float


def infer_membership(
    members: Predictions, non_members: Predictions, *, seed: int = 0
) -> Report:
  """Attacks a model, given what it says about members and about others.

  The threshold attacks score by loss and by entropy; the trained one by logistic
  regression on the logits and the loss, each example by a model that was fitted without
  it. Members and non-members are made equally many, at random.

  Source: Yeom et al., "Privacy Risk in Machine Learning: Analyzing the Connection to
  Overfitting" (CSF 2018), for the loss and the advantage; Shokri et al., "Membership
  Inference Attacks against Machine Learning Models" (S&P 2017), for the trained attack.

  Args:
    members: On examples that the model was trained with.
    non_members: On others of the same kind.
    seed: Decides the halves and the folds.

  Returns:
    A `Report`.

  Raises:
    ValueError: If there are too few examples, or the arrays do not fit.
  """
  for name, its in (('members', members), ('non_members', non_members)):
    _check(name, its, members)
  rng = np.random.default_rng(seed)
  size = min(len(members.labels), len(non_members.labels))
  members, non_members = (
      Predictions(*(np.asarray(a)[rows] for a in its))
      for its in (members, non_members)
      for rows in [rng.permutation(len(its.labels))[:size]]
  )
  scores = _scores(members, non_members, int(rng.integers(2**32)))
  # Their order is random: the first half chooses.
  half = size // 2

  def measure(found: Sequence[tuple[str, np.ndarray, np.ndarray]], label=None):
    """Of (attack, members' rows, non-members' rows): the best, on the other half."""
    best, best_auc = None, -1.0
    for attack, inside, outside in found:
      chosen = scores[attack][0][inside[inside < half]], scores[attack][1][
          outside[outside < half]
      ]
      value = auc(*chosen)
      if value > best_auc:
        best, best_auc = (attack, inside, outside, chosen), value
    attack, inside, outside, chosen = best
    return _finding(
        attack,
        best_threshold(*chosen),
        scores[attack][0][inside[inside >= half]],
        scores[attack][1][outside[outside >= half]],
        label,
    )

  everybody = np.arange(size)
  overall = measure([(attack, everybody, everybody) for attack in scores])
  worst, worst_auc = None, -1.0
  for label in np.unique(members.labels):
    rows = [np.flatnonzero(its.labels == label) for its in (members, non_members)]
    if any(min(sum(r < half), sum(r >= half)) < MIN_EXAMPLES // 2 for r in rows):
      continue
    for attack in scores:
      value = auc(
          *(scores[attack][i][r[r < half]] for i, r in enumerate(rows))
      )
      if value > worst_auc:
        worst, worst_auc = (attack, *rows, int(label)), value
  return Report(
      overall=overall,
      worst_class=measure([worst[:3]], worst[3]) if worst is not None else None,
      member_accuracy=_accuracy(members),
      non_member_accuracy=_accuracy(non_members),
  )


def infer_by_loss(members: Predictions, non_members: Predictions) -> float:
  """The AUC of the loss alone, for few examples: there is nothing to choose.

  Non-members count by label as members do, so that the mix of labels tells nothing.

  Args:
    members: On a client's own examples.
    non_members: On others, of which those with labels that no member has are left out.

  Raises:
    ValueError: If no label is in both.
  """
  losses = [_losses(its) for its in (members, non_members)]
  found, weights = [], []
  for label in np.intersect1d(members.labels, non_members.labels):
    inside = losses[0][members.labels == label]
    found.append(auc(-inside, -losses[1][non_members.labels == label]))
    weights.append(len(inside))
  if not found:
    raise ValueError('There is no label that members and non-members share.')
  return float(np.average(found, weights=weights))


def auc(positives: np.ndarray, negatives: np.ndarray) -> float:
  """How often a positive scores above a negative; half of a tie counts."""
  ranks = scipy.stats.rankdata(np.concatenate([positives, negatives]))
  n = len(positives)
  return float(
      (ranks[:n].sum() - n * (n + 1) / 2) / (n * len(negatives))
  )


def auc_with_interval(positives: np.ndarray, negatives: np.ndarray) -> Estimate:
  """The AUC with its confidence interval.

  Source: DeLong, DeLong and Clarke-Pearson, "Comparing the Areas under Two or More
  Correlated Receiver Operating Characteristic Curves" (Biometrics 1988), the variance.

  Args:
    positives: Scores, two or more.
    negatives: Likewise.
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
  """From which score on to say "member", for the largest advantage."""
  labels = np.repeat([1, 0], [len(positives), len(negatives)])
  false, true, thresholds = metrics.roc_curve(
      labels, np.concatenate([positives, negatives])
  )
  return float(thresholds[np.argmax(true - false)])


def mean_with_interval(values: Sequence[float]) -> Estimate:
  """A mean with Student's interval, such as over clients.

  Args:
    values: Two or more; the interval of one is everything.
  """
  values = np.asarray(values, np.float64)
  mean = float(values.mean())
  if len(values) < 2:
    return Estimate(mean, -np.inf, np.inf)
  reach = scipy.stats.t.ppf(0.5 + _CONFIDENCE / 2, len(values) - 1) * values.std(
      ddof=1
  ) / np.sqrt(len(values))
  return Estimate(mean, float(mean - reach), float(mean + reach))


def _finding(attack, threshold, inside, outside, label) -> Finding:
  hits, misses = int(np.sum(inside >= threshold)), int(np.sum(outside >= threshold))
  low, high = proportion.confint_proportions_2indep(
      hits, len(inside), misses, len(outside), compare='diff', method='newcomb',
      alpha=1.0 - _CONFIDENCE,
  )
  false, true, _ = metrics.roc_curve(
      np.repeat([1, 0], [len(inside), len(outside)]), np.concatenate([inside, outside])
  )
  return Finding(
      attack=attack,
      auc=auc_with_interval(inside, outside),
      advantage=Estimate(
          hits / len(inside) - misses / len(outside), float(low), float(high)
      ),
      num_members=len(inside),
      num_non_members=len(outside),
      false_positive_rates=false,
      true_positive_rates=true,
      label=label,
  )


def _scores(
    members: Predictions, non_members: Predictions, seed: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """By attack, the scores of members and of non-members, in their order."""
  data = data_structures.AttackInputData(
      logits_train=members.logits,
      logits_test=non_members.logits,
      labels_train=members.labels,
      labels_test=non_members.labels,
  )
  with _numpy_seed(seed), warnings.catch_warnings(), np.errstate(all='ignore'):
    warnings.simplefilter('ignore')
    results = membership_inference_attack.run_attacks(data, attack_types=_ATTACKS)
  return {
      its.attack_type.name.removesuffix('_ATTACK').lower().replace('_', ' '): (
          np.ravel(its.membership_scores_train), np.ravel(its.membership_scores_test)
      )
      for its in results.single_attack_results
  }


@contextlib.contextmanager
def _numpy_seed(seed: int):
  """tensorflow-privacy shuffles by NumPy's global generator."""
  before = np.random.get_state()
  np.random.seed(seed)
  try:
    yield
  finally:
    np.random.set_state(before)


def _check(name: str, its: Predictions, like: Predictions) -> None:
  logits, labels = np.asarray(its.logits), np.asarray(its.labels)
  if logits.ndim != 2 or labels.shape != logits.shape[:1] or (
      logits.shape[1] != np.shape(like.logits)[1]
  ):
    raise ValueError(
        f'`{name}` must have logits [n, classes] and labels [n], of the same classes for '
        f'both, found {logits.shape} and {labels.shape}.'
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


def _losses(its: Predictions) -> np.ndarray:
  logits = np.asarray(its.logits, np.float64)
  return -scipy.special.log_softmax(logits, axis=-1)[
      np.arange(len(logits)), its.labels
  ]


def _accuracy(its: Predictions) -> float:
  return float(np.mean(np.argmax(its.logits, axis=-1) == its.labels))
