"""Draws figures of data, rounds, models and comparisons, from plain data.

Each function returns a `matplotlib.figure.Figure`, which a notebook shows and
`figure.savefig(path)` writes. pyplot is not used, so there is no global state, and any
thread may draw. `import tff_kd` does not load this module, which imports matplotlib.
Titles and names are shown literally: `$` does not begin a formula.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import io
import itertools
import math
import textwrap
from typing import Any, NamedTuple, Optional, Union

from matplotlib import figure as figure_lib
from matplotlib import lines as lines_lib
import numpy as np

# In inches, about the width of a page, so that text has the size of the page's text.
_WIDTH = 8.0
_DPI = 100
_GRAY = '0.4'
_PANELS = 3  # In a row of small multiples.
_MARKERS = ('o', 's', '^', 'D', 'v')
# The most classes whose names are shown on an axis.
_MAX_NAMES = 40
_BAND = {'alpha': 0.15, 'linewidth': 0}
_STYLES = ('-', '--', ':', '-.')
# For text that users may have named. (The tick labels of log axes are formulas.)
_PLAIN: dict[str, Any] = {'parse_math': False}
_MEGABYTES = 'MB moved per participating client (up and down)'


class _Figure(figure_lib.Figure):
  """A figure that a notebook shows, whether or not pyplot was imported."""

  def _repr_png_(self) -> bytes:
    buffer = io.BytesIO()
    self.savefig(buffer, format='png', dpi=_DPI)
    return buffer.getvalue()


class _Run(NamedTuple):
  """A run to draw.

  Attributes:
    rounds: The rounds' numbers, `[n]`.
    rows: The metrics of each round.
    best_round: The round to mark; 0 if none.
  """

  rounds: np.ndarray
  rows: Sequence[Mapping[str, float]]
  best_round: int


def _subplots(
    num_rows: int = 1, num_columns: int = 1, *, height: float, **kwargs
) -> tuple[figure_lib.Figure, Any]:
  """Returns a figure and axes as `pyplot.subplots` does, without pyplot's state.

  Titles and the names of axes are shown literally.
  """
  figure = _Figure((_WIDTH, height), layout='constrained', dpi=_DPI)
  axes = figure.subplots(num_rows, num_columns, **kwargs)
  for panel in figure.axes:
    for text in (panel.title, panel.xaxis.label, panel.yaxis.label):
      text.set(**_PLAIN)
  return figure, axes


def _legend(figure: figure_lib.Figure, handles: Sequence[Any]) -> None:
  """Adds a legend below the panels, off the data, in as many columns as fit."""
  labels = [textwrap.fill(handle.get_label(), 100) for handle in handles]
  longest = max((len(label) for label in labels), default=0)
  if not longest:
    return
  num_columns = max(1, min(len(handles), 110 // (longest + 7)))
  num_lines = sum(label.count('\n') + 1 for label in labels)
  figure.set_figheight(
      figure.get_figheight() + 0.1 + 0.21 * math.ceil(num_lines / num_columns)
  )
  legend = figure.legend(
      handles, labels, loc='outside lower center', ncols=num_columns, fontsize=9
  )
  for text in legend.get_texts():
    text.set(**_PLAIN)


def _finish(
    figure: figure_lib.Figure, title: str, handles: Sequence[Any]
) -> figure_lib.Figure:
  """Adds grids, the title and the legend."""
  for panel in figure.axes:
    panel.grid(alpha=0.3)
  figure.suptitle(title, **_PLAIN)
  _legend(figure, handles)
  return figure


def partition(
    counts: np.ndarray,
    *,
    class_names: Optional[Sequence[str]] = None,
    title: str = '',
) -> figure_lib.Figure:
  """Draws how many examples clients have, of each class if the classes are given.

  With classes, it draws the number of each client's examples above a map of clients and
  classes, which is white where there is no example. Without classes, it draws a histogram
  of the numbers.

  Args:
    counts: int `[clients, classes]`, the examples of each class at each client; or
      `[clients]`, the examples of each.
    class_names: The names of the classes, in their order; their numbers if `None`.
    title: The figure's title.

  Returns:
    The figure.

  Raises:
    ValueError: If `counts` has another rank, or there is not one name for each class.
  """
  counts = np.asarray(counts)
  if counts.ndim not in (1, 2):
    raise ValueError(
        '`counts` must be of shape [clients, classes] or [clients], found '
        f'{counts.shape}.'
    )
  if counts.ndim == 1:
    figure, panel = _subplots(height=3.2)
    panel.hist(counts, bins=40)
    panel.set(xlabel='examples of a client', ylabel='clients', title=title)
    return figure
  num_clients, num_classes = counts.shape
  names = _checked_names(class_names, counts)
  height = float(np.clip(0.2 * num_classes, 1.6, 8.0))
  figure, (sizes, classes) = _subplots(
      2, height=height + 1.9, sharex=True, height_ratios=(1.0, height)
  )
  sizes.bar(np.arange(num_clients), counts.sum(axis=1), width=0.8, color=_GRAY)
  sizes.set(ylabel='examples', title=title)
  # Zero is masked, and therefore white.
  image = classes.imshow(
      np.ma.masked_equal(counts.T, 0), cmap='viridis_r', vmin=0, aspect='auto',
      interpolation='nearest',
  )
  figure.colorbar(image, ax=classes, label='examples of the class', pad=0.01)
  classes.set(xlabel='client', ylabel='class' if class_names is None else '')
  classes.xaxis.get_major_locator().set_params(integer=True)
  if num_classes <= _MAX_NAMES:
    classes.set_yticks(range(num_classes), names, fontsize=8, **_PLAIN)
  return figure


def _checked_names(
    class_names: Optional[Sequence[str]], counts: np.ndarray
) -> Sequence[str]:
  """Returns the names of the classes, numbers if there are none."""
  if class_names is None:
    return [str(label) for label in range(counts.shape[1])]
  if len(class_names) != counts.shape[1]:
    raise ValueError(
        f'`class_names` must name each of {counts.shape[1]} classes of `counts`, found '
        f'{len(class_names)}: {list(class_names)[:5]}.'
    )
  return class_names


def curves(
    history: Any,
    *,
    metric: str = 'accuracy',
    columns: Optional[Mapping[str, str]] = None,
    best_round: Union[int, Mapping[str, int]] = 0,
    levels: Mapping[str, float] = {},
    title: str = '',
) -> figure_lib.Figure:
  """Draws a metric against rounds and, if they are known, against the MB moved.

  A run is the result of `tff_kd.simulation.train`, or a list of rows, one for each round:
  the `history` of such a result, or the `metrics.csv` of a run folder as dicts of
  numbers. If rows have `bytes/client`, a second panel shows MB. For more than about six
  runs, see `small_multiples`.

  Args:
    history: A run; a list of runs that differ in the seed, drawn as their mean and a
      band of one standard deviation; or a mapping from names to either of them.
    metric: The metric's name, on the axis.
    columns: The columns to draw, with their names in the legend. If `None`, all columns
      whose names end in `metric`: those of the clients' training, and those that
      `evaluate` returned.
    best_round: The round to mark, by name if there are several runs. If 0, the best round
      of a `TrainingResult`, and otherwise none.
    levels: By name, values to compare with, drawn as horizontal lines, such as the
      accuracy of a model trained on the server's labels alone.
    title: The figure's title.

  Returns:
    The figure.

  Raises:
    ValueError: If a run has no rows, or no row has such a column.
  """
  runs = _named_runs(history, best_round)
  columns = _columns_of(metric, runs.values()) if columns is None else columns
  lines = _lines(runs, columns)
  has_bytes = all('bytes/client' in run.rows[0] for of in runs.values() for run in of)
  figure, axes = _subplots(
      1, 2 if has_bytes else 1, height=3.3, sharey=True, squeeze=False
  )
  panels = axes[0]
  for panel, against in zip(panels, (_rounds, _megabytes)):
    for number, (label, (of_name, column)) in enumerate(lines.items()):
      color, style = f'C{number % 10}', _STYLES[number // 10 % len(_STYLES)]
      _draw_line(
          panel, of_name, column, against, color=color, linestyle=style, label=label
      )
      if len(of_name) == 1 and of_name[0].best_round:
        _mark(panel, of_name[0], column, against, color)
    _draw_levels(panel, levels)
  panels[0].xaxis.get_major_locator().set_params(integer=True)
  panels[0].set(xlabel='round', ylabel=metric.replace('_', ' '))
  if has_bytes:
    panels[1].set(xlabel=_MEGABYTES)
    _scale_megabytes(
        panels[1], [_megabytes(run)[-1] for of in runs.values() for run in of]
    )
  return _finish(figure, title, _handles(panels[:1]))


def _named_runs(
    history: Any, best_round: Union[int, Mapping[str, int]]
) -> dict[str, list[_Run]]:
  """Returns the runs (one for each seed) by name; a single run has the name ''."""
  if not isinstance(history, Mapping):
    history = {'': history}
  if not isinstance(best_round, Mapping):
    best_round = dict.fromkeys(history, best_round)
  return {name: _runs(of, best_round.get(name, 0)) for name, of in history.items()}


def _runs(value: Any, best_round: int) -> list[_Run]:
  """Returns a run, or those of a list."""
  rows, first_round = value, 1
  if hasattr(value, 'history'):  # A `TrainingResult`; one that went on begins later.
    rows, first_round = value.history, value.round_num - len(value.history) + 1
    best_round = best_round or value.best_round
  if not rows:
    raise ValueError(
        'A run to draw must have rows of metrics, one a round, found none. Run a round '
        'first.'
    )
  if not isinstance(rows[0], Mapping):
    return [run for seed in rows for run in _runs(seed, best_round)]
  rounds = [row.get('round', first_round + i) for i, row in enumerate(rows)]
  return [_Run(np.array(rounds, int), rows, best_round)]


def _columns_of(metric: str, runs: Iterable[Sequence[_Run]]) -> dict[str, str]:
  """Returns the columns of a metric, with their names in the legend."""
  known = {column: None for of in runs for run in of for column in run.rows[0]}
  found = {}
  for column in known:
    part, _, last = column.rpartition('/')
    if last == metric or last.endswith(f'_{metric}'):
      part = {'client_work/train': "clients' training"}.get(part, part.replace('/', ' '))
      model = last.removesuffix(metric).replace('_', ' ')
      found[column] = f'{part} {model}'.strip() or metric
  if not found:
    raise ValueError(
        f'The rows have no column that ends in {metric!r}. Choose another `metric`, or '
        f'`columns` of these: {", ".join(sorted(known))}.'
    )
  return found


def _lines(
    runs: Mapping[str, Sequence[_Run]], columns: Mapping[str, str]
) -> dict[str, tuple[Sequence[_Run], str]]:
  """Returns by label the runs and the column of each line."""
  lines = {}
  for name, of_name in runs.items():
    present = {c: shown for c, shown in columns.items() if c in of_name[0].rows[0]}
    for column, shown in present.items():
      label = f'{name}: {shown}' if name and len(present) > 1 else name or shown
      lines[label] = of_name, column
  if not lines:
    raise ValueError(f'No row has one of the `columns`: {", ".join(columns)}.')
  return lines


def _rounds(run: _Run) -> np.ndarray:
  return run.rounds


def _megabytes(run: _Run) -> np.ndarray:
  """Returns the mean MB that a participating client has moved up to each round."""
  return np.cumsum([row['bytes/client'] for row in run.rows]) / 1e6


def _values(run: _Run, column: str) -> np.ndarray:
  return np.array([row.get(column, np.nan) for row in run.rows], float)


def _mean(
    runs: Sequence[_Run], column: str, against: Callable[[_Run], np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the values on the axis, and the mean and deviation over the seeds.

  The deviation is that of a sample, as in the tables of runs.
  """
  length = min(len(run.rows) for run in runs)
  values = np.array([_values(run, column)[:length] for run in runs])
  with np.errstate(invalid='ignore'):  # A run that has diverged has no deviation.
    deviation = values.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros(length)
  return against(runs[0])[:length], values.mean(axis=0), deviation


def _draw_line(
    panel: Any, runs: Sequence[_Run], column: str,
    against: Callable[[_Run], np.ndarray], **look,
) -> None:
  """Draws a run; of several, the mean and a band of one standard deviation."""
  x, mean, deviation = _mean(runs, column, against)
  panel.plot(x, mean, **look)
  if len(runs) > 1:
    panel.fill_between(
        x, mean - deviation, mean + deviation, color=look['color'], **_BAND
    )
    # The legend shows it in gray, because lines have different colours.
    panel.fill_between(
        [], [], [], color=_GRAY, label='one standard deviation over the seeds', **_BAND
    )


def _mark(
    panel: Any, run: _Run, column: str, against: Callable[[_Run], np.ndarray], color: str
) -> None:
  """Marks the run's best round."""
  is_best = run.rounds == run.best_round
  panel.plot(
      against(run)[is_best], _values(run, column)[is_best], 'o', color=color,
      label=f'kept: round {run.best_round}',
  )


def _draw_levels(panel: Any, levels: Mapping[str, float]) -> None:
  for number, (name, value) in enumerate(levels.items()):
    style = _STYLES[(number + 1) % len(_STYLES)]
    panel.axhline(value, color=_GRAY, linewidth=1, linestyle=style, label=name)


def _scale_megabytes(panel: Any, megabytes: Sequence[float]) -> None:
  """Makes the axis logarithmic, with plain numbers, if sizes differ a lot."""
  if max(megabytes) > 10 * min(megabytes) > 0:
    panel.set_xscale('log')
    panel.xaxis.set_major_formatter('{x:g}')
    panel.xaxis.set_minor_formatter('')


def _handles(panels: Iterable[Any]) -> list[Any]:
  """Returns the legend's handles for some panels: each label once, bands last."""
  found = {}
  for panel in panels:
    for handle, label in zip(*panel.get_legend_handles_labels()):
      found.setdefault(label, handle)
  return sorted(found.values(), key=lambda one: not isinstance(one, lines_lib.Line2D))


def small_multiples(
    panels: Mapping[str, Any],
    *,
    metric: str = 'accuracy',
    columns: Optional[Mapping[str, str]] = None,
    levels: Mapping[str, float] = {},
    title: str = '',
) -> figure_lib.Figure:
  """Draws a metric against rounds, in a panel for each of many algorithms or settings.

  Args:
    panels: By title of the panel, a run or a list of seeds, as for `curves`, or several
      of these by name. A panel with a single run shows those of the other panels in light
      gray.
    metric: The metric's name, on the axis.
    columns: As in `curves`. Lines of the first column are solid, others are dashed or
      dotted.
    levels: By name, values to compare with, drawn as horizontal lines.
    title: The figure's title.

  Returns:
    The figure.

  Raises:
    ValueError: If a run has no rows, or no row has such a column.
  """
  named = {panel_title: _named_runs(of, 0) for panel_title, of in panels.items()}
  every = {(t, name): runs for t, of in named.items() for name, runs in of.items()}
  columns = _columns_of(metric, every.values()) if columns is None else columns
  looks = {
      (name, column): {'color': f'C{i % 10}', 'linestyle': style}
      for i, name in enumerate(dict.fromkeys(name for _, name in every))
      for column, style in zip(columns, itertools.cycle(_STYLES))
  }
  figure, shown = _grid(len(named))
  for panel, (panel_title, of_panel) in zip(shown, named.items()):
    if '' in of_panel:
      for (other, _), runs in every.items():
        if other != panel_title and next(iter(columns)) in runs[0].rows[0]:
          x, mean, _ = _mean(runs, next(iter(columns)), _rounds)
          panel.plot(x, mean, color='0.85', linewidth=1, label='the others')
    for name, column in itertools.product(of_panel, columns):
      if column in of_panel[name][0].rows[0]:
        _draw_line(panel, of_panel[name], column, _rounds, **looks[name, column])
    _draw_levels(panel, levels)
    panel.set_title(panel_title, fontsize=9)
  for panel in shown[::_PANELS]:
    panel.set(ylabel=metric.replace('_', ' '))
  return _finish(figure, title, [*_explain(looks, columns), *_handles(shown)])


def _grid(num_panels: int) -> tuple[figure_lib.Figure, list[Any]]:
  """Returns panels in rows of three; the last panel of each column has tick labels."""
  num_rows = math.ceil(num_panels / _PANELS)
  figure, axes = _subplots(
      num_rows, min(_PANELS, num_panels), height=0.4 + 1.9 * num_rows, sharex=True,
      sharey=True, squeeze=False,
  )
  shown = list(axes.flat)
  for panel in shown[num_panels:]:
    panel.remove()
  for panel in shown[max(num_panels - _PANELS, 0):num_panels]:
    panel.tick_params(labelbottom=True)
    panel.set(xlabel='round')
  shown[0].xaxis.get_major_locator().set_params(integer=True)
  return figure, shown[:num_panels]


def _explain(
    looks: Mapping[tuple[str, str], Mapping[str, Any]], columns: Mapping[str, str]
) -> list[Any]:
  """Returns the legend's handles for colours (names) and line styles (columns)."""
  first = next(iter(columns))
  found = [
      lines_lib.Line2D([], [], color=look['color'], label=name)
      for (name, column), look in looks.items() if name and column == first
  ]
  if len(columns) > 1:
    styles = {columns[column]: look['linestyle'] for (_, column), look in looks.items()}
    found += [
        lines_lib.Line2D([], [], color=_GRAY, linestyle=style, label=shown)
        for shown, style in styles.items()
    ]
  return found


def comparison(
    points: Mapping[str, Sequence[float]],
    *,
    metric: str = 'accuracy',
    against: str = _MEGABYTES,
    levels: Mapping[str, float] = {},
    title: str = '',
) -> figure_lib.Figure:
  """Draws the final score of each algorithm against the MB that it moves.

  Args:
    points: By name, the MB, the score and, if known, the score's deviation. Each is drawn
      as a point with its name and an error bar.
    metric: The score's name, on the axis.
    against: The name of the MB, on the axis.
    levels: By name, values to compare with, drawn as horizontal lines.
    title: The figure's title.

  Returns:
    The figure.

  Raises:
    ValueError: If a point is not of two or three numbers.
  """
  for name, point in points.items():
    if len(point) not in (2, 3):
      raise ValueError(
          'A point must be (MB, score) or (MB, score, deviation), found '
          f'{tuple(point)} of {name!r}.'
      )
  figure, panel = _subplots(height=4.6)
  for megabytes, score, *deviation in points.values():
    panel.errorbar(
        megabytes, score, deviation[0] if deviation else None, fmt='o', capsize=2,
        color='C0', ecolor='#9ec5e3', elinewidth=1, markersize=5,
    )
  _scale_megabytes(panel, [megabytes for megabytes, *_ in points.values()])
  panel.margins(x=0.12, y=0.12)
  _draw_levels(panel, levels)
  panel.set(xlabel=against, ylabel=metric.replace('_', ' '))
  _finish(figure, title, _handles([panel]))
  _write_names(figure, panel, points)
  return figure


def scores(
    rows: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    metric: str = 'accuracy',
    title: str = '',
) -> figure_lib.Figure:
  """Draws final scores as points in rows, such as several models in many settings.

  Args:
    rows: By name of the row, from the top, and by name of the model, the score and its
      deviation. Each is drawn as a point with an error bar.
    metric: The scores' name, on the axis.
    title: The figure's title.

  Returns:
    The figure.
  """
  series = list(dict.fromkeys(name for row in rows.values() for name in row))
  figure, panel = _subplots(height=0.8 + 0.3 * len(rows))
  for number, name in enumerate(series):
    found = [(i, *row[name]) for i, row in enumerate(rows.values()) if name in row]
    y, score, deviation = np.array(found, float).T
    panel.errorbar(
        score, y + 0.12 * (number - (len(series) - 1) / 2), xerr=deviation, label=name,
        fmt=_MARKERS[number % len(_MARKERS)], markersize=5, capsize=2, elinewidth=1,
    )
  names = [textwrap.fill(name, 34) for name in rows]
  panel.set_yticks(range(len(rows)), names, fontsize=8, **_PLAIN)
  panel.set(ylim=(len(rows) - 0.5, -0.5), xlabel=metric.replace('_', ' '))
  return _finish(figure, title, panel.get_legend_handles_labels()[0])


def _write_names(
    figure: figure_lib.Figure, panel: Any, points: Mapping[str, Sequence[float]]
) -> None:
  """Writes each name beside its point, apart from other names, lines and points."""
  figure.draw_without_rendering()  # So that places in pixels are known.
  inside, taken = panel.get_window_extent().extents, []
  for x, y, deviation in (tuple([*point, 0.0][:3]) for point in points.values()):
    low, high = panel.transData.transform([(x, y - deviation), (x, y + deviation)])
    taken.append([*(low - 5), *(high + 5)])
  for name, (x, y, *_) in sorted(points.items(), key=lambda point: -point[1][1]):
    name = textwrap.fill(name, 40)
    text = figure.text(0, 0, name, fontsize=8, **_PLAIN)
    size = text.get_window_extent().size
    text.remove()
    place = np.array(panel.transData.transform((x, y)))
    right, up = _free_offset(place, np.array(size), taken, inside)
    panel.annotate(
        name, (x, y), xytext=(right * 72 / figure.dpi, up * 72 / figure.dpi),
        textcoords='offset points', fontsize=8, va='center', **_PLAIN,
        ha='right' if right < 0 else 'left', arrowprops={
            'arrowstyle': '-', 'color': _GRAY, 'linewidth': 0.6, 'shrinkA': 1,
            'relpos': (float(right < 0), 0.5),
        },
    )


def _free_offset(
    place: np.ndarray, size: np.ndarray, taken: list[Any], inside: np.ndarray
) -> tuple[int, int]:
  """Returns the nearest offset with the fewest overlaps, and marks its place as taken.

  Args:
    place: The point, in pixels.
    size: The name's width and height.
    taken: The boxes that are taken, each [left, bottom, right, top]; extended in place.
    inside: The box in which names may be.

  Returns:
    The offset, to the right and up, from the point to the middle of the name's nearer
    edge.
  """
  offsets = [(x, y) for x in range(-297, 298, 11) for y in range(-220, 221, 11) if x]
  offsets.sort(key=lambda offset: math.hypot(offset[0], 1.5 * offset[1]))
  best, fewest = (offsets[0], np.empty((0, 4))), math.inf
  for offset in offsets:
    low = place + offset - size * (float(offset[0] < 0), 0.5)
    if (low < inside[:2]).any() or (low + size > inside[2:]).any():
      continue
    # Includes boxes along the line to the point, except where it begins.
    on_line = place + np.linspace(0.4, 1.0, 8)[:, np.newaxis] * offset
    boxes = np.vstack([[*low, *(low + size)], np.hstack([on_line - 1, on_line + 1])])
    one, other = boxes[:, np.newaxis], np.array(taken)
    meets = (one[..., :2] < other[:, 2:]) & (other[:, :2] < one[..., 2:])
    count = int(meets.all(axis=-1).sum())
    if count < fewest:
      best, fewest = (offset, boxes), count
    if not count:
      break
  taken += best[1].tolist()
  return best[0]


def calibration(
    models: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    num_bins: int = 15,
    title: str = '',
) -> figure_lib.Figure:
  """Draws how often predictions are right against how confident they are.

  Source: Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), figure 1:
  accuracy against confidence, and how many examples have that confidence.

  Args:
    models: By name, the confidence of each prediction, float `[n]` in [0, 1], and whether
      it is right, bool `[n]`.
    num_bins: The number of bins of equal width over the confidence.
    title: The figure's title.

  Returns:
    The figure.
  """
  figure, (accuracy, shares) = _subplots(1, 2, height=3.3)
  accuracy.plot([0, 1], [0, 1], ':', color=_GRAY, label='calibrated')
  edges = np.linspace(0.0, 1.0, num_bins + 1)
  for name, (confidence, is_right) in models.items():
    bins = np.clip(np.digitize(confidence, edges) - 1, 0, num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    used = counts > 0
    x, y = (
        np.bincount(bins, values, minlength=num_bins)[used] / counts[used]
        for values in (confidence, np.asarray(is_right, float))
    )
    error = np.abs(x - y) @ counts[used] / counts.sum()
    accuracy.plot(
        x, y, 'o-', markersize=4, label=f'{name} (calibration error {error:.3f})'
    )
    shares.stairs(counts / counts.sum(), edges, linewidth=1.5)
  accuracy.set(xlabel='confidence', ylabel='accuracy')
  shares.set(xlabel='confidence', ylabel='share of the predictions')
  return _finish(figure, title, _handles([accuracy]))


def confusion(
    counts: np.ndarray,
    *,
    class_names: Optional[Sequence[str]] = None,
    title: str = '',
) -> figure_lib.Figure:
  """Draws which classes are predicted for which, as shares of each true class.

  Args:
    counts: int `[classes, classes]`, the examples of each true class (rows) by the
      predicted class (columns). For up to twelve classes the numbers are shown.
    class_names: The names of the classes, in their order; their numbers if `None`.
    title: The figure's title.

  Returns:
    The figure.

  Raises:
    ValueError: If `counts` is not square, or there is not one name for each class.
  """
  counts = np.asarray(counts)
  if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
    raise ValueError(
        f'`counts` must be of shape [classes, classes], found {counts.shape}.'
    )
  names = _checked_names(class_names, counts)
  size = len(counts)
  figure, panel = _subplots(height=float(np.clip(2.5 + 0.3 * size, 4.0, 7.5)))
  shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  image = panel.imshow(shares, cmap='Blues', vmin=0.0, vmax=1.0)
  figure.colorbar(image, ax=panel, shrink=0.8, label='share of the true class')
  panel.set(xlabel='predicted class', ylabel='true class', title=title)
  if size <= _MAX_NAMES:
    is_long = max(map(len, names)) > 3
    look = {'fontsize': 8, **_PLAIN}
    panel.set_xticks(range(size), names, rotation=90 if is_long else 0, **look)
    panel.set_yticks(range(size), names, **look)
  for row, column in np.argwhere(counts) if size <= 12 else ():
    panel.text(
        column, row, f'{counts[row, column]:,}', ha='center', va='center', fontsize=7,
        color='white' if shares[row, column] > 0.5 else 'black',
    )
  return figure


def clients(
    models: Mapping[str, np.ndarray],
    *,
    metric: str = 'accuracy',
    title: str = '',
) -> figure_lib.Figure:
  """Draws a metric of every client, sorted, to show how unequally a model serves them.

  Args:
    models: By name, the metric on the examples of each client, float `[clients]`.
    metric: The metric's name, on the axis.
    title: The figure's title.

  Returns:
    The figure.
  """
  figure, panel = _subplots(height=3.3)
  for name, values in models.items():
    share = (np.arange(len(values)) + 0.5) / len(values)
    style = 'o-' if len(values) <= 50 else '-'
    label = f'{name} (mean {np.mean(values):.3f})'
    panel.plot(share, np.sort(values), style, markersize=4, label=label)
  panel.set(
      xlabel='share of the clients', xlim=(0, 1),
      ylabel=f"{metric.replace('_', ' ')} on a client's own examples",
  )
  return _finish(figure, title, _handles([panel]))


def errors(
    models: Mapping[str, tuple[np.ndarray, np.ndarray]], *, title: str = ''
) -> figure_lib.Figure:
  """Draws the errors of regressions, and the predictions against the true values.

  Args:
    models: By name, the predictions and the true values, float `[n]` each.
    title: The figure's title.

  Returns:
    The figure.
  """
  figure, (shares, means) = _subplots(1, 2, height=3.3)
  every_label = np.concatenate([labels for _, labels in models.values()])
  every_error = np.concatenate([found - labels for found, labels in models.values()])
  edges = np.linspace(every_error.min(), every_error.max(), 41)
  values = np.unique(every_label)
  if len(values) > 20:  # Ten ranges with about as many examples each.
    values = np.unique(np.quantile(every_label, np.linspace(0.0, 1.0, 11))[:-1])
  for number, (name, (predictions, labels)) in enumerate(models.items()):
    # Later lines are thinner and dashed, so that those below are visible.
    look: dict[str, Any] = {
        'linestyle': _STYLES[number % len(_STYLES)],
        'linewidth': max(3.0 - 1.5 * number, 1.0), 'label': name,
    }
    counts = np.histogram(predictions - labels, edges)[0]
    shares.plot((edges[1:] + edges[:-1]) / 2, counts / len(labels), **look)
    group = np.searchsorted(values, labels, side='right') - 1
    parts = [group == part for part in np.unique(group)]
    means.errorbar(
        [labels[part].mean() for part in parts],
        [predictions[part].mean() for part in parts],
        [predictions[part].std() for part in parts], marker='o', markersize=4,
        capsize=3 * look['linewidth'], **look,
    )
  ends = [every_label.min(), every_label.max()]
  means.plot(ends, ends, ':', color=_GRAY, label='prediction equals true value')
  shares.set(xlabel='predicted - true', ylabel='share of the examples')
  means.set(xlabel='true value', ylabel='predicted: mean, standard deviation')
  return _finish(figure, title, _handles([shares, means]))


def roc(
    models: Mapping[str, tuple[np.ndarray, np.ndarray, float]], *, title: str = ''
) -> figure_lib.Figure:
  """Draws ROC curves of membership inference, and their beginning on log axes.

  Low false positive rates matter most: an attack that surely finds a few members is a
  leak, whatever the area is. Source: Carlini et al., "Membership Inference Attacks From
  First Principles" (S&P 2022), section IV.

  Args:
    models: By name, the false positive rates (of examples that are no members) and the
      true positive rates (of members), float `[n]` each, and the area below the curve.
    title: The figure's title.

  Returns:
    The figure.
  """
  figure, panels = _subplots(1, 2, height=3.3)
  ends = np.array([1e-3, 1.0])
  for panel in panels:
    for name, (false_positives, true_positives, area) in models.items():
      panel.plot(false_positives, true_positives, label=f'{name} (area {area:.3f})')
    panel.plot(ends, ends, ':', color=_GRAY, label='chance')
    panel.set(xlabel='false positive rate', ylabel='true positive rate')
  panels[1].set(xscale='log', yscale='log', xlim=ends, ylim=ends, ylabel='')
  return _finish(figure, title, _handles(panels[:1]))


def images(columns: Mapping[str, Mapping[str, np.ndarray]]) -> figure_lib.Figure:
  """Draws a grid of images, such as reconstructed ones beside the true ones.

  Args:
    columns: By title of the column, the images by name of the row, `[height, width]` or
      `[height, width, channels]`; all columns have the same rows. An example of another
      rank is drawn as one line of pixels.

  Returns:
    The figure.
  """
  rows = list(next(iter(columns.values())))
  size = min(1.3, (_WIDTH - 1.5) / len(columns))
  figure, grid = _subplots(
      len(rows), len(columns), height=0.5 + size * len(rows), squeeze=False
  )
  for (j, (title, column)), (i, name) in itertools.product(
      enumerate(columns.items()), enumerate(rows)
  ):
    image = np.asarray(column[name])
    if image.ndim not in (2, 3):
      image = image.reshape(1, -1)
    panel = grid[i][j]
    panel.imshow(image, cmap='gray', aspect='auto' if len(image) == 1 else 'equal')
    panel.set(xticks=[], yticks=[])
    if i == 0:
      panel.set_title(title, fontsize=9)
    if j == 0:
      panel.set_ylabel(
          textwrap.fill(name, 22), fontsize=8, rotation=0, ha='right', va='center'
      )
  return figure
