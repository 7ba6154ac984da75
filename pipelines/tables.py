"""Tables on the terminal and in files."""

from collections.abc import Sequence
import csv
import math
import pathlib
import statistics


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
  """Prints rows in columns; the first row is the head, the first column names."""
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  for number, row in enumerate(rows):
    cells = [row[0].ljust(widths[0])]
    cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
    print('  '.join(cells).rstrip())
    if number == 0:
      print('  '.join('-' * width for width in widths))


def markdown_table(rows: Sequence[tuple[str, ...]]) -> str:
  """Returns the rows as a Markdown table."""
  head, *body = rows
  lines = [head, ('---',) * len(head), *body]
  return ''.join('| ' + ' | '.join(line) + ' |\n' for line in lines)


def write_table(rows: Sequence[tuple[str, ...]], folder: pathlib.Path) -> None:
  """Writes rows into table.csv and table.md of a folder."""
  with open(folder / 'table.csv', 'w', newline='') as file:
    csv.writer(file).writerows(rows)
  (folder / 'table.md').write_text(markdown_table(rows))


def words(name: str) -> str:
  """Returns the name of a metric in words."""
  return name.replace('_', ' ')


def spread(values: Sequence[float], digits: int) -> str:
  """Returns the mean, and the standard deviation if there are several values.

  Args:
    values: Such as the scores of several seeds; of a run that diverged, NaN or infinite.
    digits: How many after the point.

  Returns:
    Such as '0.912 ± 0.004'; an empty text if there is no value.
  """
  if not values:
    return ''
  text = f'{statistics.mean(values):.{digits}f}'
  if len(values) > 1:
    text += f' ± {deviation(values):.{digits}f}'
  return text


def deviation(values: Sequence[float]) -> float:
  """Returns the standard deviation; NaN if a value is not finite, 0 of one value."""
  # `statistics.stdev` fails on such values.
  if not all(map(math.isfinite, values)):
    return math.nan
  return statistics.stdev(values) if len(values) > 1 else 0.0
