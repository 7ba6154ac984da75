"""What is in the figures: their lines, points, labels and legends."""

import json

import matplotlib.text
import numpy as np
import pytest

from tests import helpers
from tff_kd import own_files
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
  helpers.new_python(code)


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
  # The deviation of a sample: of two values, half their distance times sqrt(2).
  expected = {0.158579, 0.441421, 0.317157, 0.882843}
  assert expected <= set(band[:, 1].round(6))
  assert _legend(figure) == ['a', 'one standard deviation over the seeds']


def test_curves_refuse_what_they_cannot_draw():
  with pytest.raises(ValueError, match='found none'):
    plots.curves([])
  with pytest.raises(ValueError, match='ends in \'auc\'.*test/student_accuracy'):
    plots.curves(_rows([0.5]), metric='auc')


def test_lines_of_one_colour_differ_in_style():
  lines = plots.curves({str(i): _rows([0.5]) for i in range(11)}).axes[0].get_lines()
  looks = {(line.get_color(), line.get_linestyle()) for line in lines}
  assert len(looks) == len(lines) == 11


def test_small_multiples_show_each_run_before_the_others():
  runs = {name: _rows([0.1 * i, 0.2 * i]) for i, name in enumerate('abcde', 1)}
  figure = plots.small_multiples(runs, levels={'in one place': 0.9})
  assert [panel.get_title() for panel in figure.axes] == list('abcde')
  for panel, rows in zip(figure.axes, runs.values()):
    lines = panel.get_lines()
    assert [line.get_label() for line in lines[:4]] == ['the others'] * 4
    own = [[i, row['test/student_accuracy']] for i, row in enumerate(rows, 1)]
    assert lines[4].get_xydata().tolist() == own and lines[4].get_color() == 'C0'
  assert _legend(figure) == ['the others', 'in one place']
  # The last of each column has numbers, below whichever row it is.
  assert [bool(panel.get_xlabel()) for panel in figure.axes] == [
      False, False, True, True, True,
  ]


def test_small_multiples_explain_colours_and_styles():
  both = _rows([0.5], **{'test/teacher_accuracy': 0.8})
  figure = plots.small_multiples(
      {'ours': {'defaults': [both, both], '--x': both}, 'FedAvg': {'--x': _rows([0.3])}},
      columns={'test/student_accuracy': 'student', 'test/teacher_accuracy': 'teacher'},
  )
  assert _legend(figure) == [
      'defaults', '--x', 'student', 'teacher', 'one standard deviation over the seeds',
  ]
  looks = [[(line.get_color(), line.get_linestyle()) for line in panel.get_lines()]
           for panel in figure.axes]
  assert looks == [
      [('C0', '-'), ('C0', '--'), ('C1', '-'), ('C1', '--')], [('C1', '-')],
  ]


def test_comparison_names_every_point_without_overlaps():
  points = {f'algorithm_{i}': (0.2, 0.85 + 0.003 * i, 0.01) for i in range(12)}
  points |= {'tiny': (0.0008, 0.3), 'f' * 60: (5.0, 0.9)}
  figure = plots.comparison(points, metric='accuracy', levels={'labels alone': 0.5})
  panel, = figure.axes
  names = {text.get_text().replace('\n', '') for text in panel.texts}
  assert names == set(points)
  assert {text.xy for text in panel.texts} == {point[:2] for point in points.values()}
  assert panel.get_xscale() == 'log' and _legend(figure) == ['labels alone']
  figure.draw_without_rendering()
  # Without the lines to the points.
  boxes = [matplotlib.text.Text.get_window_extent(text) for text in panel.texts]
  inside = panel.get_window_extent()
  for i, box in enumerate(boxes):
    assert not any(box.overlaps(other) for other in boxes[:i])
    assert inside.x0 <= box.x0 and box.x1 <= inside.x1


def test_comparison_has_plain_numbers_where_sizes_are_alike():
  panel, = plots.comparison({'a': (2.0, 0.5), 'b': (3.0, 0.6, 0.1)}).axes
  assert panel.get_xscale() == 'linear'
  with pytest.raises(ValueError, match="found \\(1,\\) of 'a'"):
    plots.comparison({'a': (1,)})


def test_calibration_shows_accuracy_by_confidence():
  confidence = np.array([0.05, 0.15, 0.95, 0.95, 1.0, 0.91])
  is_right = np.array([False, True, True, True, True, False])
  figure = plots.calibration({'student': (confidence, is_right)}, num_bins=10)
  accuracy, shares = figure.axes
  line = accuracy.get_lines()[1]
  expected = [[0.05, 0.0], [0.15, 1.0], [3.81 / 4, 0.75]]
  np.testing.assert_allclose(line.get_xydata(), expected)
  error = (0.05 + 0.85 + 4 * (3.81 / 4 - 0.75)) / 6
  assert _legend(figure) == ['calibrated', f'student (calibration error {error:.3f})']
  np.testing.assert_allclose(
      shares.patches[0].get_data().values, np.array([1, 1, *7 * [0], 4]) / 6
  )


def test_confusion_has_shares_counts_and_names():
  figure = plots.confusion(
      np.array([[3, 1], [0, 0]]), class_names=['no', 'yes'], title='student'
  )
  panel = figure.axes[0]
  np.testing.assert_allclose(panel.images[0].get_array(), [[0.75, 0.25], [0, 0]])
  assert [text.get_text() for text in panel.texts] == ['3', '1']
  assert [label.get_text() for label in panel.get_xticklabels()] == ['no', 'yes']
  assert (panel.get_ylabel(), panel.get_title()) == ('true class', 'student')
  with pytest.raises(ValueError, match=r'\[classes, classes\], found \(1, 2\)'):
    plots.confusion(np.ones((1, 2), int))


def test_clients_are_sorted():
  figure = plots.clients({'student': np.array([0.9, 0.5])}, metric='top_2')
  panel, = figure.axes
  assert panel.get_lines()[0].get_xydata().tolist() == [[0.25, 0.5], [0.75, 0.9]]
  assert _legend(figure) == ['student (mean 0.700)']
  assert panel.get_ylabel() == "top 2 on a client's own examples"


def test_errors_show_each_model_and_no_model_hides_another():
  labels = np.array([1.0, 1.0, 3.0])
  figure = plots.errors({
      'student': (np.array([1.0, 2.0, 2.0]), labels),
      'teacher': (np.array([1.0, 2.0, 2.0]), labels),
  })
  shares, means = figure.axes
  first, second = shares.get_lines()
  np.testing.assert_allclose(first.get_ydata().sum(), 1.0)
  assert first.get_linewidth() > second.get_linewidth()
  assert (first.get_linestyle(), second.get_linestyle()) == ('-', '--')
  assert means.containers[0].lines[0].get_xydata().tolist() == [[1.0, 1.5], [3.0, 2.0]]
  assert _legend(figure) == ['student', 'teacher', 'prediction equals true value']


def test_roc_names_the_rates():
  rates = np.array([0.0, 1.0])
  figure = plots.roc({'student': (rates, rates, 0.5)})
  assert [panel.get_xlabel() for panel in figure.axes] == ['false positive rate'] * 2
  assert figure.axes[0].get_ylabel() == 'true positive rate'
  assert figure.axes[1].get_xscale() == figure.axes[1].get_yscale() == 'log'
  assert _legend(figure) == ['student (area 0.500)', 'chance']


def test_what_is_not_finite_is_drawn():
  nan, infinite = np.array([np.nan, 0.5]), _rows([np.inf, -np.inf])
  for figure in (
      plots.calibration({'student': (nan, np.array([True, False]))}),
      plots.errors({'student': (nan, np.array([1.0, 2.0]))}),
      plots.comparison({'a': (1.0, np.nan), 'b': (2.0, 0.5)}),
      plots.curves(_rows(nan)),
      plots.comparison({'a': (1.0, np.inf), 'b': (2.0, 0.5, np.nan)}),
      plots.curves({'a': [infinite, _rows([0.5, 0.6])]}, levels={'b': np.inf}),
      plots.small_multiples({'a': infinite, 'b': _rows([0.5])}, levels={'c': np.nan}),
  ):
    assert figure._repr_png_().startswith(b'\x89PNG')


def test_names_are_no_formulas():
  names = ['up to $5', 'from $5_to_$10']
  both, rates = '$_{ $', np.array([0.0, 1.0])
  run, counts = {both: _rows([0.5])}, np.array([[1, 0], [0, 1]])
  texts = dict(title=both)
  for figure in (
      plots.partition(counts, class_names=names, **texts),
      plots.confusion(counts, class_names=names, **texts),
      plots.partition(counts[0], **texts),
      plots.curves(run, levels={names[1]: 0.4}, **texts),
      plots.small_multiples({names[1]: run}, **texts),
      plots.comparison({names[1]: (1.0, 0.5)}, metric=both, against=both, **texts),
      plots.scores({names[1]: {both: (0.5, 0.1)}}, **texts),
      plots.calibration({both: (rates, rates > 0)}, **texts),
      plots.clients({both: rates}, metric=both, **texts),
      plots.errors({both: (rates, rates)}, **texts),
      plots.roc({both: (rates, rates, 0.5)}, **texts),
      plots.images({both: {both: np.ones((2, 2))}}),
  ):
    assert figure._repr_png_().startswith(b'\x89PNG')
    shown = [t for t in figure.findobj(matplotlib.text.Text) if '$' in t.get_text()]
    # Without the ticks of log axes.
    shown = [text for text in shown if r'$\mathdefault' not in text.get_text()]
    assert shown and not any(text.get_parse_math() for text in shown)


def test_images_of_any_rank():
  column = {'gray': np.ones((4, 4, 1)), 'colour': np.ones((4, 4, 3)), 'row': np.ones(5)}
  figure = plots.images({'one': column, 'two': column})
  assert len(figure.axes) == 6
  assert [panel.get_title() for panel in figure.axes[:3]] == ['one', 'two', '']
  assert [panel.get_ylabel() for panel in figure.axes[::2]] == list(column)
  assert figure.axes[4].images[0].get_array().shape == (1, 5)


def test_scores_have_a_row_each_and_a_marker_for_each_that_is_compared():
  figure = plots.scores(
      {'few labels': {'a': (0.5, 0.1), 'b': (0.7, 0.0)}, 'none': {'b': (0.6, 0.2)}},
      metric='test accuracy',
  )
  panel, = figure.axes
  assert [label.get_text() for label in panel.get_yticklabels()] == ['few labels', 'none']
  first, second = (bars.lines[0] for bars in panel.containers)
  assert first.get_xdata().tolist() == [0.5] and second.get_xdata().tolist() == [0.7, 0.6]
  assert second.get_ydata().round().tolist() == [0, 1]
  assert first.get_marker() != second.get_marker() and _legend(figure) == ['a', 'b']
  assert panel.yaxis_inverted()


@pytest.fixture(name='draw_results', scope='module')
def _draw_results():
  return own_files.load(f'{helpers.ROOT}/docs/draw_results.py')


def test_pictures_of_the_pages_show_their_tables(draw_results):
  figures = {name: draw() for name, draw in draw_results.PICTURES.items()}
  pages = ''.join(path.read_text() for path in draw_results.FOLDER.glob('*.md'))
  for name in figures:
    assert f']({name})' in pages and (draw_results.FOLDER / name).is_file()
  panel = figures['algorithms-alpha-0.1.png'].axes[0]
  table = draw_results.tables('algorithms.md')[0]
  assert len(panel.texts) == len(table) - 1 == 21
  for text in panel.texts:
    cells, = (row for row in table if row[0].partition(' ')[0] == text.get_text())
    assert cells[2].startswith(f'{text.xy[1]:.3f} ± '.lstrip('0'))
    assert float(cells[4]) == text.xy[0]
  for name, rows, models in (('client_faults.png', 8, 4), ('privacy.png', 8, 3)):
    panel = figures[name].axes[0]
    assert (len(panel.get_yticklabels()), len(panel.containers)) == (rows, models)
  best, last = figures['ablation.png'].axes[0].containers
  assert best.lines[0].get_xdata()[:2].tolist() == [0.898, 0.856]
  assert last.lines[0].get_xdata()[:2].tolist() == [0.893, 0.814]
  student, teacher = figures['movielens.png'].axes[0].containers
  assert student.lines[0].get_xdata().tolist() == [0.939, 0.935, 0.935, 0.982, 0.925]
  assert teacher.lines[0].get_xdata().tolist() == [0.937, 0.984, 0.925]


def test_pictures_of_runs(draw_results, tmp_path, monkeypatch):
  flags = 'consensus=mean_logits-clients_start_from=distilled-noaugment'
  rows = _rows([0.5, 0.6])
  with_teacher = _rows([0.5, 0.6], **{'test/teacher_accuracy': 0.7})
  alone = {'student': {'accuracy': 0.4}, 'teacher': {'accuracy': 0.45}}
  for run in (
      'unlabelled-0.05/fed_avg', 'unlabelled-0.05/fed_avg-calibrate',
      'unlabelled-0.05/fed_distillation', f'unlabelled-0.05/fed_distillation-{flags}',
      'unlabelled-0.1/fed_avg', 'labelled/fed_distillation',
  ):
    for seed in (3, 4, 5, 6, 7):
      folder = tmp_path / f'{run}-{seed}'
      folder.mkdir(parents=True)
      has_teacher = 'distil' in run
      helpers.write_rows(folder / 'metrics.csv', with_teacher if has_teacher else rows)
      (folder / 'results.json').write_text(json.dumps({'alone': alone}))
  monkeypatch.setattr(draw_results, 'PICTURES', {})
  monkeypatch.setattr(draw_results, 'FOLDER', tmp_path)
  draw_results.main([str(tmp_path)])
  for name in ('unlabelled.png', 'labelled.png'):
    assert (tmp_path / name).read_bytes().startswith(b'\x89PNG')
  figures = dict(draw_results._of_runs(tmp_path))
  assert _legend(figures['unlabelled.png']) == [
      'FedAvg', 'fed_distillation: student', 'fed_distillation: teacher',
      'FedAvg, calibrated', 'fed_distillation as the first edition had it',
      'one standard deviation over the seeds',
  ]
  levels = _lines(figures['labelled.png'].axes[0])
  assert levels["teacher on the server's 200 labels alone"][0][1] == pytest.approx(0.45)
