"""Tables on the terminal."""

from collections.abc import Sequence


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
  """The same rows as a Markdown table."""
  head, *body = rows
  lines = [head, ('---',) * len(head), *body]
  return ''.join('| ' + ' | '.join(line) + ' |\n' for line in lines)


def words(name: str) -> str:
  """A name of a metric as it is read."""
  return name.replace('_', ' ')
