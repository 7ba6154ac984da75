"""What is in the figures: their lines, points, labels and legends."""

import subprocess
import sys

import numpy as np
import pytest

from tests import helpers
from tff_kd import plots
from tff_kd import simulation


def _rows(values, name='test/student_accuracy', **further):
  return [
      {'round': float(i), name: value, 'bytes/client': 5e5, **further}
      for i, value in enumerate(values, 1)
  ]


def _result(rows, best_round):
  return simulation.TrainingResult(
      state=None, round_num=len(rows), best_state=None, best_round=best_round,
      history=rows, converged=False,
  )


def _legend(figure):
  return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def _lines(panel):
  """By label, the points of each line."""
  return {line.get_label(): line.get_xydata().tolist() for line in panel.get_lines()}


def test_matplotlib_is_not_imported_before_a_plot_is_asked_for():
  code = (
      'import sys, tff_kd; assert "matplotlib" not in sys.modules; tff_kd.plots.curves; '
      'assert "matplotlib.pyplot" not in sys.modules'
  )
  subprocess.run([sys.executable, '-c', code], check=True, cwd=helpers.ROOT)


def test_a_notebook_shows_a_figure():
  assert plots.partition(np.ones(3, int))._repr_png_().startswith(b'\x89PNG')


def test_partition_names_the_classes_and_shows_every_count():
  counts = np.array([[3, 0, 1], [0, 0, 5]])
  figure = plots.partition(counts, class_names=['a', 'b', 'c'], title='split')
  sizes, classes = figure.axes[:2]
  assert [bar.get_height() for bar in sizes.patches] == [4, 5]
  assert [label.get_text() for label in classes.get_yticklabels()] == ['a', 'b', 'c']
  shown = classes.images[0].get_array()
  np.testing.assert_array_equal(shown.filled(0), counts.T)
  np.testing.assert_array_equal(shown.mask, counts.T == 0)
  assert sizes.get_title() == 'split'
  assert len(figure.axes) == 3  # The third is the colour bar.


def test_partition_without_classes_shows_the_sizes():
  panel, = plots.partition(np.array([1, 1, 9])).axes
  heights = [bar.get_height() for bar in panel.patches]
  assert sum(heights) == 3 and heights[0] == 2 and heights[-1] == 1


def test_partition_refuses_what_does_not_fit():
  with pytest.raises(ValueError, match='each of 2 classes .* found 3'):
    plots.partition(np.ones((4, 2)), class_names=['a', 'b', 'c'])
  with pytest.raises(ValueError, match=r'\[clients, classes\]'):
    plots.partition(np.ones((4, 2, 1)))


def test_curves_of_a_training_mark_the_kept_round():
  rows = _rows([0.5, 0.9, 0.8], loss=1.0)
  figure = plots.curves(_result(rows, 2), levels={'labels alone': 0.6}, title='run')
  rounds, megabytes = figure.axes
  lines = _lines(rounds)
  assert lines['test student'] == [[1, 0.5], [2, 0.9], [3, 0.8]]
  assert lines['kept: round 2'] == [[2, 0.9]]
  assert _lines(megabytes)['kept: round 2'] == [[1.0, 0.9]]
  assert [y for _, y in lines['labels alone']] == [0.6, 0.6]
  assert _legend(figure) == ['test student', 'kept: round 2', 'labels alone']
  assert not rounds.get_legend()  # Off the data.
  assert figure.get_suptitle() == 'run' and rounds.get_ylabel() == 'accuracy'


def test_curves_of_a_training_that_went_on_begin_in_its_first_round():
  rows = [{'accuracy': 0.5}, {'accuracy': 0.6}]
  panel, = plots.curves(_result(rows, 0)._replace(round_num=9)).axes
  assert _lines(panel) == {'accuracy': [[8, 0.5], [9, 0.6]]}


def test_curves_of_rows_without_bytes_have_one_panel():
  rows = [{'client_work/train/accuracy': 0.5, 'validation/accuracy': 0.4, 'loss': 2.0}]
  figure = plots.curves(rows)
  assert len(figure.axes) == 1
  assert _legend(figure) == ["clients' training", 'validation']


def test_curves_of_several_runs_are_named():
  teacher = _rows([0.5, 0.7], **{'test/teacher_accuracy': 0.8})
  figure = plots.curves(
      {'ours': teacher, 'FedAvg': _rows([0.3, 0.4])},
      columns={'test/student_accuracy': 'student', 'test/teacher_accuracy': 'teacher'},
      best_round={'FedAvg': 1},
  )
  assert _legend(figure) == ['ours: student', 'ours: teacher', 'FedAvg', 'kept: round 1']


def test_curves_of_seeds_are_their_mean_and_a_band():
  figure = plots.curves({'a': [_rows([0.2, 0.4]), _rows([0.4, 0.8, 0.9])]})
  panel = figure.axes[0]
  np.testing.assert_allclose(_lines(panel)['a'], [[1, 0.3], [2, 0.6]])
  band = panel.collections[0].get_paths()[0].vertices
  assert {0.2, 0.4} <= set(band[:, 1].round(6)) and {0.4, 0.8} <= set(band[:, 1].round(6))
  assert _legend(figure) == ['a', 'one standard deviation over the seeds']


def test_curves_refuse_what_they_cannot_draw():
  with pytest.raises(ValueError, match='found none'):
    plots.curves([])
  with pytest.raises(ValueError, match='ends in \'auc\'.*test/student_accuracy'):
    plots.curves(_rows([0.5]), metric='auc')
  with pytest.raises(ValueError, match='found 11'):
    plots.curves({str(i): _rows([0.5]) for i in range(11)})
