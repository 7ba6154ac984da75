"""Checks of single values; imports no TensorFlow."""

from collections.abc import Iterable, Mapping
import difflib
from typing import Any

# Above it, all that is left of a divergence is its limit, a squared difference.
_MAX_TEMPERATURE = 1e4


def check_temperature(temperature: float, name: str = 'temperature') -> float:
  """Returns `temperature` as a float, or refuses it unless it is in (0, 10,000].

  Raises:
    ValueError: If the temperature is not a positive number up to 10,000.
  """
  value = float(temperature)
  if not 0.0 < value <= _MAX_TEMPERATURE:
    raise ValueError(
        f'`{name}` must be a number above 0, at most {_MAX_TEMPERATURE:g}, found '
        f'{temperature!r}. Use 1.0 for plain probabilities; higher values soften them, '
        "and from about 100 on it is the squared difference: `loss='mse'`."
    )
  return value


def check_positive_integer(value: int, name: str) -> int:
  """Returns the value, or refuses it unless it is an integer of 1 or more.

  Raises:
    ValueError: If it is not.
  """
  if not isinstance(value, int) or isinstance(value, bool) or value < 1:
    raise ValueError(f'`{name}` must be a positive integer, found {value!r}.')
  return value


def did_you_mean(name: str, names: Iterable[str]) -> str:
  """Returns ' Did you mean ...?' with the name that is near; nothing if none is.

  Args:
    name: What was given.
    names: The names that there are.
  """
  near = difflib.get_close_matches(name, list(names), 1)
  return f' Did you mean {near[0]!r}?' if near else ''


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
  """Returns the entries in which two mappings differ, as text; empty if none.

  Args:
    there: Settings that something was made with.
    here: The present settings.
  """
  return '; '.join(
      f'{name}: {there.get(name)} there, {here.get(name)} here'
      for name in sorted({*there, *here})
      if there.get(name) != here.get(name)
  )
