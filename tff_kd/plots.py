"""Draws figures of data, rounds, models and comparisons, from plain data.

Each function returns a `matplotlib.figure.Figure`, which a notebook shows and
`figure.savefig(path)` writes. pyplot is not used: no state is left, and any thread may
draw. matplotlib is imported with this module, which `import tff_kd` does not load.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import io
from typing import Any, NamedTuple, Optional, Union

from matplotlib import figure as figure_lib
import numpy as np

# Inches: about a page's, so that text is as large as the page's.
_WIDTH = 8.0
_DPI = 100
_GRAY = '0.4'
# Up to so many classes have names on an axis.
_MAX_NAMES = 40
# Lines in one panel, as many as there are colours.
_MAX_LINES = 10
_STYLES = ('-', '--', ':', '-.')
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
  """Returns `pyplot.subplots` without its state, at a page's width."""
  figure = _Figure((_WIDTH, height), layout='constrained', dpi=_DPI)
  return figure, figure.subplots(num_rows, num_columns, **kwargs)


def _legend(figure: figure_lib.Figure, handles: Sequence[Any]) -> None:
  """Puts a legend below the panels, off the data, in as many columns as fit."""
  longest = max((len(handle.get_label()) for handle in handles), default=0)
  if longest:
    num_columns = max(1, min(len(handles), 110 // (longest + 7)))
    figure.legend(
        handles=handles, loc='outside lower center', ncols=num_columns, fontsize=9
    )


def partition(
    counts: np.ndarray,
    *,
    class_names: Optional[Sequence[str]] = None,
    title: str = '',
) -> figure_lib.Figure:
  """Draws how many examples clients have, of each class if the classes are given.

  With classes, a map of clients and classes, white where there is no example, below the
  sizes of the clients. Without, a histogram of the sizes.

  Args:
    counts: int `[clients, classes]`, the examples of each class at each client; or
      `[clients]`, the examples of each.
    class_names: The names of the classes, in their order; their numbers if `None`.
    title: The figure's title.

  Returns:
    The figure.

  Raises:
    ValueError: If `counts` has another rank, or the names are not one a class.
  """
  counts = np.asarray(counts)
  if counts.ndim not in (1, 2):
    raise ValueError(
        '`counts` must be of shape [clients, classes] or [clients], found '
        f'{counts.shape}.'
    )
  if class_names is not None and (
      counts.ndim == 1 or len(class_names) != counts.shape[1]
  ):
    raise ValueError(
        '`class_names` must name each class of `counts`, found '
        f'{len(class_names)} names and counts of shape {counts.shape}.'
    )
  if counts.ndim == 1:
    figure, panel = _subplots(height=3.2)
    panel.hist(counts, bins=40)
    panel.set(xlabel='examples of a client', ylabel='clients', title=title)
    return figure
  num_clients, num_classes = counts.shape
  height = float(np.clip(0.2 * num_classes, 1.6, 8.0))
  figure, (sizes, classes) = _subplots(
      2, height=height + 1.9, sharex=True, height_ratios=(1.0, height)
  )
  sizes.bar(np.arange(num_clients), counts.sum(axis=1), width=0.8, color=_GRAY)
  sizes.set(ylabel='examples', title=title)
  # White is none.
  image = classes.imshow(
      np.ma.masked_equal(counts.T, 0), cmap='viridis_r', vmin=0, aspect='auto',
      interpolation='nearest',
  )
  figure.colorbar(image, ax=classes, label='examples of the class', pad=0.01)
  classes.set(xlabel='client', ylabel='class' if class_names is None else '')
  classes.xaxis.get_major_locator().set_params(integer=True)
  if num_classes <= _MAX_NAMES:
    names = range(num_classes) if class_names is None else class_names
    classes.set_yticks(range(num_classes), names, fontsize=8)
  return figure


def curves(
    history: Any,
    *,
    metric: str = 'accuracy',
    columns: Optional[Mapping[str, str]] = None,
    best_round: Union[int, Mapping[str, int]] = 0,
    levels: Mapping[str, float] = {},
    title: str = '',
) -> figure_lib.Figure:
  """Draws a metric against rounds and, where they are known, against the MB moved.

  A run is what `tff_kd.simulation.train` returns, or rows, one a round: the `history` of
  that, or the `metrics.csv` of a run folder as dicts of numbers. If rows have
  `bytes/client`, there is a second panel, of MB.

  Args:
    history: A run; a list of runs that differ in the seed, drawn as their mean and a
      band of one standard deviation; or by name, either of them.
    metric: The metric's name, on the axis.
    columns: By name of a column of the rows, what the legend calls it. If `None`, all
      whose names end in `metric`: those of the clients' training, and those that
      `evaluate` returned.
    best_round: The round that is marked, by name if there are several runs; 0 for none.
      If 0, that of a `TrainingResult`.
    levels: By name, values to compare with, drawn as horizontal lines: such as the
      accuracy of a model trained on the server's labels alone.
    title: The figure's title.

  Returns:
    The figure.

  Raises:
    ValueError: If a run has no rows, no row has such a column, or there are more than
      ten lines, for which `small_multiples` is.
  """
  runs = _named_runs(history, best_round)
  columns = _columns_of(metric, runs) if columns is None else columns
  lines = _lines(runs, columns)
  if len(lines) > _MAX_LINES:
    raise ValueError(
        f'{_MAX_LINES} lines can be told apart in a panel, found {len(lines)}. Choose '
        'fewer `columns`, or use `small_multiples`.'
    )
  has_bytes = all('bytes/client' in run.rows[0] for of in runs.values() for run in of)
  figure, axes = _subplots(
      1, 2 if has_bytes else 1, height=3.8, sharey=True, squeeze=False
  )
  panels = axes[0]
  for panel, against in zip(panels, (_rounds, _megabytes)):
    for number, (label, (of_name, column)) in enumerate(lines.items()):
      _draw_line(panel, of_name, column, against, color=f'C{number}', label=label)
    _draw_levels(panel, levels)
    panel.grid(alpha=0.3)
  panels[0].xaxis.get_major_locator().set_params(integer=True)
  panels[0].set(xlabel='round', ylabel=metric.replace('_', ' '))
  if has_bytes:
    panels[1].set(xlabel=_MEGABYTES)
  figure.suptitle(title)
  _legend(figure, _handles(panels[:1]))
  return figure


def _named_runs(
    history: Any, best_round: Union[int, Mapping[str, int]]
) -> dict[str, list[_Run]]:
  """Returns the runs by name, one a seed; the name is empty if there is none."""
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


def _columns_of(metric: str, runs: Mapping[str, Sequence[_Run]]) -> dict[str, str]:
  """Returns the columns of a metric, and what the legend calls each."""
  known = {column: None for of in runs.values() for run in of for column in run.rows[0]}
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


def _draw_line(
    panel: Any, runs: Sequence[_Run], column: str,
    against: Callable[[_Run], np.ndarray], **look,
) -> None:
  """Draws the mean over the seeds and the band, or the one run and the marked round."""
  length = min(len(run.rows) for run in runs)
  x = against(runs[0])[:length]
  values = np.array(
      [[row.get(column, np.nan) for row in run.rows[:length]] for run in runs], float
  )
  mean, deviation = values.mean(axis=0), values.std(axis=0)
  panel.plot(x, mean, **look)
  color, first = look['color'], runs[0]
  if len(runs) > 1:
    panel.fill_between(
        x, mean - deviation, mean + deviation, color=color, alpha=0.15, linewidth=0
    )
    # In gray, as it is of each colour.
    panel.fill_between(
        [], [], [], color=_GRAY, alpha=0.15, linewidth=0,
        label='one standard deviation over the seeds',
    )
  elif first.best_round:
    panel.plot(
        x[first.rounds == first.best_round], mean[first.rounds == first.best_round],
        'o', color=color, label=f'kept: round {first.best_round}',
    )


def _draw_levels(panel: Any, levels: Mapping[str, float]) -> None:
  for number, (name, value) in enumerate(levels.items()):
    style = _STYLES[(number + 1) % len(_STYLES)]
    panel.axhline(value, color=_GRAY, linewidth=1, linestyle=style, label=name)


def _handles(panels: Iterable[Any]) -> list[Any]:
  """Returns what the legend shows of the panels: each label once, the lines first."""
  found = {}
  for panel in panels:
    for handle, label in zip(*panel.get_legend_handles_labels()):
      found.setdefault(label, handle)
  return list(found.values())
