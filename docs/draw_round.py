"""Draws docs/round.png: what moves in a round of teacher-student federated distillation.

  python docs/draw_round.py
"""

import pathlib

import matplotlib

matplotlib.use('Agg')

from matplotlib import patches
import matplotlib.pyplot as plt

_BLUE, _ORANGE, _GREEN, _GREY = '#1f77b4', '#e07b00', '#2a8a2a', '#555555'


def _box(axes, x, y, width, height, text, color, **kwargs):
  axes.add_patch(
      patches.FancyBboxPatch(
          (x, y), width, height, boxstyle='round,pad=0.02,rounding_size=0.12',
          facecolor=color + '18', edgecolor=color, linewidth=1.6,
      )
  )
  axes.text(
      x + width / 2, y + height / 2, text, ha='center', va='center', fontsize=10,
      **kwargs,
  )


def _arrow(axes, start, end, color, text='', offset=(0.0, 0.0), **kwargs):
  axes.annotate(
      '', end, start,
      arrowprops=dict(arrowstyle='-|>', color=color, linewidth=2, **kwargs),
  )
  middle = [(a + b) / 2 + o for a, b, o in zip(start, end, offset)]
  axes.text(*middle, text, color=color, fontsize=9.5, ha='center', va='center')


def main():
  figure, axes = plt.subplots(figsize=(10, 5.6), layout='constrained')
  axes.set(xlim=(0, 10), ylim=(0, 5.6))
  axes.axis('off')
  axes.text(0.1, 5.35, 'Server', fontsize=12, weight='bold', color=_GREY)
  axes.add_patch(
      patches.Rectangle(
          (0.05, 2.75), 9.9, 2.5, fill=False, edgecolor=_GREY, linestyle=':'
      )
  )
  _box(axes, 0.4, 3.3, 2.1, 1.2, 'student\n(weighted mean)', _BLUE)
  _box(axes, 4.0, 3.3, 2.1, 1.2, "ensemble's\npredictions", _ORANGE)
  _box(axes, 7.5, 3.3, 2.1, 1.2, 'teacher\n(large, own optimizer)', _GREEN)
  _arrow(axes, (6.15, 3.9), (7.45, 3.9), _ORANGE, '3  teach', (0, 0.22))
  _arrow(
      axes, (8.5, 4.55), (1.5, 4.55), _GREEN,
      '4  back-distillation: the teacher refreshes the student', (0, 0.5),
      connectionstyle='arc3,rad=0.1',
  )
  axes.text(
      8.1, 2.95, 'transfer set: public inputs, labels for some', ha='center',
      fontsize=9, color=_GREY,
  )
  axes.text(0.1, 0.08, 'Clients', fontsize=12, weight='bold', color=_GREY)
  for number, x in enumerate((1.4, 4.3, 7.2)):
    _box(
        axes, x, 0.4, 2.2, 0.95,
        f'client {number + 1}: student\nlearns from its own data', _BLUE,
    )
    _arrow(
        axes, (x + 0.6, 1.4), (1.2 + 0.25 * number, 3.25), _BLUE, linestyle='-',
        alpha=0.75,
    )
    _arrow(axes, (x + 1.4, 1.4), (4.75 + 0.3 * number, 3.25), _ORANGE, alpha=0.75)
  _arrow(axes, (0.7, 3.25), (0.7, 0.82), _BLUE)
  axes.annotate(
      '', (1.35, 0.87), (0.68, 0.87),
      arrowprops=dict(arrowstyle='-|>', color=_BLUE, linewidth=2),
  )
  axes.text(
      0.08, 2.25, '1  down:\nthe student', color=_BLUE, fontsize=9.5, ha='left',
      bbox=dict(facecolor='white', edgecolor='none', pad=1),
  )
  axes.text(
      8.0, 1.85, '2  up, as sums: weights (blue)\nand predictions on the\n'
      'transfer set (orange)', color=_GREY, fontsize=9.5, ha='left',
  )
  figure.savefig(pathlib.Path(__file__).with_name('round.png'), dpi=110)


if __name__ == '__main__':
  main()
