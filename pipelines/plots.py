"""Pictures of a run: how the data were split, how accuracy went."""

from collections.abc import Mapping, Sequence
import os
from typing import Any

import matplotlib
from matplotlib import figure as figure_lib
from matplotlib import ticker
import numpy as np


def _subplots(
    num_rows: int = 1, num_columns: int = 1, *, figsize: tuple[float, float], **kwargs
) -> tuple[figure_lib.Figure, Any]:
  """Returns `pyplot.subplots` without global state: any thread may draw."""
  figure = figure_lib.Figure(figsize, layout='constrained')
  return figure, figure.subplots(num_rows, num_columns, **kwargs)


def plot_partition(
    labels: np.ndarray,
    clients: Sequence[np.ndarray],
    num_classes: int,
    title: str,
    path: os.PathLike,
) -> None:
  """Stacked bars: examples of each class at each client.

  Args:
    labels: Class numbers of all examples, `[n]`.
    clients: The rows of each client.
    num_classes: The number of classes.
    title: The picture's title.
    path: The PNG file to write.
  """
  counts = np.array(
      [np.bincount(labels[rows], minlength=num_classes) for rows in clients]
  )
  figure, axes = _subplots(figsize=(9, 4))
  bottom = np.zeros(len(clients))
  colors = matplotlib.colormaps['tab20' if num_classes > 10 else 'tab10']
  for label in range(num_classes):
    axes.bar(
        np.arange(len(clients)), counts[:, label], bottom=bottom,
        color=colors(label % colors.N), label=str(label),
    )
    bottom += counts[:, label]
  axes.set(xlabel='client', ylabel='examples', title=title)
  axes.xaxis.get_major_locator().set_params(integer=True)
  if num_classes <= 20:
    axes.legend(title='class', loc='center left', bbox_to_anchor=(1.0, 0.5))
  figure.savefig(path, dpi=120)


def plot_client_sizes(
    clients: Sequence[np.ndarray], title: str, path: os.PathLike
) -> None:
  """How many clients have how many examples.

  Args:
    clients: The rows of each client.
    title: The picture's title.
    path: The PNG file to write.
  """
  figure, axes = _subplots(figsize=(9, 4))
  axes.hist([len(rows) for rows in clients], bins=40)
  axes.set(xlabel='examples of a client', ylabel='clients', title=title)
  figure.savefig(path, dpi=120)


def plot_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]],
    path: os.PathLike,
    metric: str = 'accuracy',
) -> None:
  """A metric on the test part against rounds and against bytes.

  Args:
    curves: Name -> (rounds, MB per client up to that round, the metric).
    path: The PNG file to write.
    metric: Its name.
  """
  figure, panels = _subplots(1, 2, figsize=(11, 4.2), sharey=True)
  for name, (rounds, megabytes, accuracy) in curves.items():
    style = '--' if 'FedAvg' in name else '-'
    panels[0].plot(rounds, accuracy, style, label=name)
    panels[1].plot(megabytes, accuracy, style, label=name)
  panels[0].xaxis.get_major_locator().set_params(integer=True)
  panels[0].set(xlabel='round', ylabel=f'test {metric}')
  panels[1].set(xlabel='MB moved per participating client (up and down)')
  panels[0].legend(loc='best')
  for panel in panels:
    panel.grid(alpha=0.3)
  figure.savefig(path, dpi=120)


def plot_comparison(
    curves: Mapping[
        str, Sequence[tuple[Sequence[float], Sequence[float], Sequence[float]]]
    ],
    path: os.PathLike,
    metric: str = 'accuracy',
    levels: Mapping[str, float] = {},
) -> None:
  """Test accuracy of several algorithms against rounds and against bytes.

  Args:
    curves: Name -> a run of each seed: (rounds, MB per client up to that round,
      accuracy). The line is their mean; the band, one standard deviation.
    path: The PNG file to write.
    metric: What stands in place of accuracy, a name.
    levels: Name -> a value to compare with, a horizontal line.
  """
  figure, panels = _subplots(1, 2, figsize=(13, 4.8), sharey=True)
  colors, styles = matplotlib.colormaps['tab10'], ('-', '--', ':')
  for number, (name, runs) in enumerate(curves.items()):
    length = min(len(accuracy) for _, _, accuracy in runs)
    accuracy = np.array([accuracies[:length] for _, _, accuracies in runs])
    mean, deviation = accuracy.mean(axis=0), accuracy.std(axis=0)
    for panel, x in zip(panels, runs[0][:2]):
      color, style = colors(number % 10), styles[number // 10 % len(styles)]
      panel.plot(x[:length], mean, style, color=color, label=name)
      panel.fill_between(
          x[:length], mean - deviation, mean + deviation, color=color, alpha=0.12,
          linewidth=0,
      )
  for (name, value), style in zip(levels.items(), ('--', ':')):
    for panel in panels:
      panel.axhline(value, color='black', linewidth=1, linestyle=style, label=name)
  panels[0].xaxis.get_major_locator().set_params(integer=True)
  panels[0].set(xlabel='round', ylabel=f"student's test {metric}")
  panels[1].set(
      xlabel='MB moved per participating client (up and down)', xscale='log'
  )
  panels[1].xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
  panels[1].xaxis.set_major_formatter('{x:g}')
  panels[1].xaxis.set_minor_formatter(ticker.NullFormatter())
  figure.legend(*panels[0].get_legend_handles_labels(), loc='outside right center')
  for panel in panels:
    panel.grid(alpha=0.3)
  figure.savefig(path, dpi=120)


def plot_variations(
    panels: Mapping[tuple[int, str], Mapping[str, Mapping[str, Sequence[Any]]]],
    num_rows: int,
    columns: Sequence[str],
    path: os.PathLike,
    metric: str = 'accuracy',
) -> None:
  """Test accuracy against rounds as something varies; the teacher's is dashed.

  Args:
    panels: (Row, name of the column) -> what it is with -> `student`, and `teacher`
      where there is one -> a run of each seed, the accuracy after each round. The line
      is their mean; the band, one standard deviation.
    num_rows: The number of rows.
    columns: The names of the columns, in order.
    path: The PNG file to write.
    metric: What stands in place of accuracy, a name.
  """
  figure, axes = _subplots(
      num_rows, len(columns), figsize=(1 + 4.2 * len(columns), 3.4 * num_rows),
      sharex=True, sharey=True, squeeze=False,
  )
  colors = matplotlib.colormaps['tab10']
  for (row, column), lines in panels.items():
    panel = axes[row][columns.index(column)]
    for number, (label, models) in enumerate(lines.items()):
      for model, runs in models.items():
        length = min(len(run) for run in runs)
        accuracy = np.array([run[:length] for run in runs])
        mean, deviation = accuracy.mean(axis=0), accuracy.std(axis=0)
        rounds, color = np.arange(1, length + 1), colors(number % 10)
        # A flag a line: long sets would cover the panel, or leave it.
        style, shown = '--', None
        if model == 'student':
          style, shown = '-', label.replace(' ', '\n')
        panel.plot(rounds, mean, style, color=color, label=shown)
        panel.fill_between(
            rounds, mean - deviation, mean + deviation, color=color, alpha=0.12,
            linewidth=0,
        )
  for row in axes:
    row[0].set(ylabel=f'test {metric}')
    for panel in row:
      panel.grid(alpha=0.3)
      if panel.get_legend_handles_labels()[0]:
        panel.legend(loc='lower right', fontsize=8)
  for panel, name in zip(axes[0], columns):
    panel.set_title(name)
  for panel in axes[-1]:
    panel.set(xlabel='round')
    panel.xaxis.get_major_locator().set_params(integer=True)
  figure.suptitle(
      'Solid: student. Dashed: teacher. Bands: one standard deviation over the seeds.',
      fontsize=9,
  )
  figure.savefig(path, dpi=110)


def plot_speed(results: Mapping[str, Any], path: os.PathLike) -> None:
  """Rounds against the floor, and against the number of clients.

  Args:
    results: As `pipelines.benchmark` writes them.
    path: The PNG file to write.
  """
  figure, (left, right) = _subplots(1, 2, figsize=(13, 4.8), width_ratios=[3, 1])
  cases = results['cases']
  labels = {
      'tff': "TFF's FedAvg", 'pfl': 'pfl-research',
      'memory': 'tff_kd, datasets in memory', 'ours': 'tff_kd, data by reference',
  }
  sides = [side for side in labels if any(side in c['seconds'] for c in cases)]
  width = 0.84 / max(len(sides), 1)
  for number, side in enumerate(sides):
    shown = [
        (i, c['seconds'][side] / c['seconds']['floor'])
        for i, c in enumerate(cases) if side in c['seconds']
    ]
    offset = width * (number - (len(sides) - 1) / 2)
    bars = left.bar(
        [i + offset for i, _ in shown], [r for _, r in shown], width, label=labels[side]
    )
    left.bar_label(bars, fmt='%.1f', fontsize=7)
  left.axhline(1.0, color='black', linewidth=0.8)
  left.set(
      yscale='log', ylabel='time of a round / floor',
      title=f"Rounds against one compiled loop ({results['cores']} cores)",
  )
  left.set_xticks(range(len(cases)), [c['case'] for c in cases], rotation=40, ha='right')
  if sides:
    left.legend(loc='upper right')
  scaling = results['scaling']
  right.plot(
      [s['clients'] for s in scaling], [s['seconds'] for s in scaling], 'o-'
  )
  right.set(
      xscale='log', xlabel='clients', ylabel='seconds a round',
      title='The same examples, more clients', ylim=(0, None),
  )
  right.grid(alpha=0.3)
  figure.savefig(path, dpi=120)


def plot_roc(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray, float]],
    path: os.PathLike,
) -> None:
  """ROC curves of membership inference, where few false alarms are allowed, too.

  Args:
    curves: Model -> (false positive rates, true positive rates, area).
    path: The PNG file to write.
  """
  figure, panels = _subplots(1, 2, figsize=(9, 4.2))
  for name, (false, true, area) in curves.items():
    for panel in panels:
      panel.plot(false, true, label=f'{name}, AUC {area:.3f}')
  ends = np.array([1e-3, 1.0])
  for panel in panels:
    panel.plot(ends, ends, ':', color='gray', label='chance')
    panel.set(xlabel='others taken for members', ylabel='members found')
    panel.grid(alpha=0.3)
  panels[1].set(xscale='log', yscale='log', xlim=ends, ylim=ends, ylabel='')
  panels[0].legend(loc='lower right')
  figure.savefig(path, dpi=120)


def plot_images(
    columns: Mapping[str, Mapping[str, np.ndarray]], path: os.PathLike
) -> None:
  """A grid of images.

  Args:
    columns: Title -> by row's name, an image `[height, width, ...]`; the rows of all
      are the same. Examples of another rank are drawn as one line of pixels.
    path: The PNG file to write.
  """
  rows = list(next(iter(columns.values())))
  figure, grid = _subplots(
      len(rows), len(columns), squeeze=False,
      figsize=(1.5 * len(columns) + 1.5, 1.6 * len(rows)),
  )
  for j, (title, images) in enumerate(columns.items()):
    for i, name in enumerate(rows):
      image = np.asarray(images[name])
      if image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
      if image.ndim == 1 or image.ndim > 3:
        image = image.reshape(1, -1)
      panel = grid[i][j]
      panel.imshow(image, cmap='gray', aspect='auto' if image.shape[0] == 1 else 'equal')
      panel.set(xticks=[], yticks=[])
      if i == 0:
        panel.set_title(title, fontsize=9)
      if j == 0:
        panel.set_ylabel(
            name.replace(': ', ':\n').replace('from', '\nfrom'), fontsize=8, rotation=0,
            ha='right', va='center',
        )
  figure.savefig(path, dpi=120)


def plot_reliability(
    models: Mapping[str, tuple[np.ndarray, np.ndarray]], path: os.PathLike,
    num_bins: int = 15,
) -> None:
  """How often predictions are right against how sure they are.

  Args:
    models: Name -> (confidence `[n]` in [0, 1], whether it was right `[n]`).
    path: The PNG file to write.
    num_bins: Bins of equal width over the confidence.
  """
  figure, panels = _subplots(
      2, 1, figsize=(6, 6.5), sharex=True, height_ratios=(3, 1)
  )
  panels[0].plot([0, 1], [0, 1], color='gray', linewidth=1, label='calibrated')
  edges = np.linspace(0.0, 1.0, num_bins + 1)
  for name, (confidence, right) in models.items():
    bins = np.clip(np.digitize(confidence, edges) - 1, 0, num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    used = counts > 0
    means = [
        np.bincount(bins, values, minlength=num_bins)[used] / counts[used]
        for values in (confidence, right.astype(float))
    ]
    panels[0].plot(*means, 'o-', markersize=4, label=name)
    panels[1].stairs(counts / counts.sum(), edges)
  panels[0].set(ylabel='share that is right')
  panels[1].set(xlabel='confidence', ylabel='share of all')
  panels[0].legend()
  panels[0].grid(alpha=0.3)
  figure.savefig(path, dpi=120)


def plot_confusion(
    counts: np.ndarray, class_names: Sequence[str], title: str, path: os.PathLike
) -> None:
  """Which classes are taken for which, as shares of each true class.

  Args:
    counts: `[classes, classes]`, true classes down, predicted ones across.
    class_names: The names of the classes; not written if there are more than 30.
    title: The picture's title.
    path: The PNG file to write.
  """
  size = len(class_names)
  figure, axes = _subplots(
      figsize=(min(4 + 0.35 * size, 12),) * 2
  )
  shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  image = axes.imshow(shares, cmap='Blues', vmin=0.0, vmax=1.0)
  figure.colorbar(image, ax=axes, shrink=0.7, label='share of the true class')
  axes.set(xlabel='predicted', ylabel='true', title=title)
  if size <= 30:
    axes.set_xticks(range(size), class_names, rotation=90)
    axes.set_yticks(range(size), class_names)
  if size <= 12:
    for row, column in np.ndindex(size, size):
      if counts[row, column]:
        axes.text(
            column, row, f'{counts[row, column]:,}', ha='center', va='center',
            fontsize=7, color='white' if shares[row, column] > 0.5 else 'black',
        )
  figure.savefig(path, dpi=120)


def plot_errors(
    models: Mapping[str, tuple[np.ndarray, np.ndarray]], path: os.PathLike
) -> None:
  """Plots a regression's errors, and its predictions by the true value.

  Args:
    models: Name -> (predictions `[n]`, true values `[n]`).
    path: The PNG file to write.
  """
  figure, panels = _subplots(1, 2, figsize=(11, 4.2))
  every_label = np.concatenate([labels for _, labels in models.values()])
  values = np.unique(every_label)
  # Ten ranges if there are many different values.
  groups = np.quantile(every_label, np.linspace(0, 1, 11)) if len(values) > 20 else None
  errors = np.concatenate([predicted - labels for predicted, labels in models.values()])
  edges = np.linspace(errors.min(), errors.max(), 61)
  for name, (predictions, labels) in models.items():
    panels[0].hist(predictions - labels, bins=edges, histtype='step', label=name)
    if groups is None:
      parts = [labels == value for value in values]
    else:
      of_group = np.clip(np.digitize(labels, groups) - 1, 0, 9)
      parts = [of_group == number for number in np.unique(of_group)]
    panels[1].errorbar(
        [labels[part].mean() for part in parts],
        [predictions[part].mean() for part in parts],
        [predictions[part].std() for part in parts], fmt='o-', capsize=3, label=name,
    )
  ends = [every_label.min(), every_label.max()]
  panels[1].plot(ends, ends, color='gray', linewidth=1)
  panels[0].set(xlabel='predicted - true', ylabel='examples')
  panels[1].set(xlabel='true', ylabel='predicted: mean, standard deviation')
  for panel in panels:
    panel.legend()
    panel.grid(alpha=0.3)
  figure.savefig(path, dpi=120)


def plot_client_scores(
    models: Mapping[str, np.ndarray], metric: str, path: os.PathLike
) -> None:
  """The metric of each client, from the worst on.

  Args:
    models: Name -> a value a client.
    metric: Its name.
    path: The PNG file to write.
  """
  figure, axes = _subplots(figsize=(8, 4))
  for name, values in models.items():
    axes.plot(np.linspace(0, 1, len(values)), np.sort(values), label=name)
  axes.set(xlabel='share of clients', ylabel=f"{metric} on a client's own examples")
  axes.grid(alpha=0.3)
  axes.legend()
  figure.savefig(path, dpi=120)
