"""Pictures of a run: how the data were split, how accuracy went."""

from collections.abc import Mapping, Sequence
import os

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # pylint: disable=g-import-not-at-top
import numpy as np


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
    num_classes: How many classes.
    title: The picture's title.
    path: The PNG file to write.
  """
  counts = np.array(
      [np.bincount(labels[rows], minlength=num_classes) for rows in clients]
  )
  figure, axes = plt.subplots(figsize=(9, 4), layout='constrained')
  bottom = np.zeros(len(clients))
  colors = plt.get_cmap('tab20' if num_classes > 10 else 'tab10')
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
  plt.close(figure)


def plot_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]],
    path: os.PathLike,
) -> None:
  """Test accuracy against rounds and against bytes.

  Args:
    curves: Name -> (rounds, MB per client up to that round, accuracy).
    path: The PNG file to write.
  """
  figure, panels = plt.subplots(
      1, 2, figsize=(11, 4.2), sharey=True, layout='constrained'
  )
  for name, (rounds, megabytes, accuracy) in curves.items():
    style = '--' if 'FedAvg' in name else '-'
    panels[0].plot(rounds, accuracy, style, label=name)
    panels[1].plot(megabytes, accuracy, style, label=name)
  panels[0].xaxis.get_major_locator().set_params(integer=True)
  panels[0].set(xlabel='round', ylabel='test accuracy')
  panels[1].set(xlabel='MB moved per participating client (up and down)')
  panels[0].legend(loc='lower right')
  for panel in panels:
    panel.grid(alpha=0.3)
  figure.savefig(path, dpi=120)
  plt.close(figure)
