"""Flags under headings, and a `--help` that prints them so."""

import re
import shutil
import sys
import textwrap

from absl import app
from absl import flags

# By module: headings, each with the number of the module's flags before it.
_HEADINGS: dict[str, list[tuple[str, int]]] = {}
_MAX_WIDTH = 96


def topic(heading: str) -> None:
  """Puts the calling module's flags from here to the next call under a heading."""
  module = sys._getframe(1).f_globals['__name__']
  count = len(flags.FLAGS.flags_by_module_dict().get(module, []))
  _HEADINGS.setdefault(module, []).append((heading, count))


def by_topic() -> dict[str, list[flags.Flag]]:
  """Returns the flags of all modules with headings, in the order of definition."""
  found = {}
  for module, headings in _HEADINGS.items():
    defined = flags.FLAGS.flags_by_module_dict()[module]
    ends = [start for _, start in headings[1:]] + [len(defined)]
    for (heading, start), end in zip(headings, ends):
      found[heading] = defined[start:end]
  return found


def help_text(module: str, width: int) -> str:
  """Returns the help of a script: its purpose and its flags.

  Args:
    module: The script's name in `sys.modules`.
    width: Characters a line, at most.
  """
  doc = (sys.modules[module].__doc__ or '').strip()
  lines = [doc, '', 'Defaults are shown.']
  topics = by_topic()
  key_flags = flags.FLAGS.get_key_flags_for_module(module)
  grouped = {flag.name for of_topic in topics.values() for flag in of_topic}
  own = [flag for flag in key_flags if flag.name not in grouped]
  shown = {flag.name for flag in key_flags}
  if own:
    lines += ['', "This script's", *_of_flags(own, width)]
  for heading, of_topic in topics.items():
    of_topic = [flag for flag in of_topic if flag.name in shown]
    if of_topic:
      lines += ['', heading, *_of_flags(of_topic, width)]
  lines += ['', "--helpfull lists absl's own flags, too, such as --flagfile."]
  return '\n'.join(lines)


def _of_flags(of_topic: list[flags.Flag], width: int) -> list[str]:
  lines = []
  for flag in of_topic:
    if flag.boolean:
      usage = f'--{flag.name}' if not flag.default else f'--[no]{flag.name}'
    elif flag.default in (None, []):
      usage = f'--{flag.name}='
    else:
      # `serialize` would give the present value.
      default = flag.default
      if isinstance(default, list):
        default = ','.join(map(str, default))
      usage = f'--{flag.name}={default}'
    lines.append(f'  {usage}')
    parts = flag.help.split('\n')
    if len(parts) > 1:
      # Remove the values that absl puts first, which the items list: <all|the|values>.
      parts[0] = re.sub('^<[^>]*>: ', '', parts[0])
    for number, part in enumerate(parts):
      lines += textwrap.wrap(
          part, width, initial_indent=' ' * 6,
          subsequent_indent=' ' * (10 if number else 6), break_on_hyphens=False,
          break_long_words=False,
      )
  return lines


class _HelpFlag(app.HelpFlag):
  """The flag `--help`, which prints flags by topic."""

  def parse(self, arg):
    if self._parse(arg):
      width = min(shutil.get_terminal_size().columns, _MAX_WIDTH)
      print(help_text('__main__', max(width, 40)))
      sys.exit(0)


def define_help_flags() -> None:
  """Defines absl's help flags, with a `--help` by topic."""
  app.define_help_flags()
  flag = _HelpFlag()
  flag.allow_override = True
  flags.DEFINE_flag(flag)
