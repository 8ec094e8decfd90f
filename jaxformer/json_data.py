"""JSON data: results written, and text of users read."""

import dataclasses
import json
import math
from typing import Any


def json_data(value: Any) -> Any:
  """Return JSON data: dataclasses (with the properties that they list as `REPORTED`) and named
  tuples as objects, scalars of NumPy and JAX as numbers, numbers that are not finite as null."""
  if dataclasses.is_dataclass(value):
    names = [*(f.name for f in dataclasses.fields(value)), *getattr(value, 'REPORTED', ())]
    return {name: json_data(getattr(value, name)) for name in names}
  if isinstance(value, dict):
    return {str(k): json_data(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    asdict = getattr(value, '_asdict', None)
    return json_data(asdict()) if asdict else [json_data(v) for v in value]
  if hasattr(value, 'dtype'):
    value = value.item()
  return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_json(text: str | bytes) -> Any:
  """Return JSON data.

  Raises `ValueError`, with the reason, for text that is not valid JSON, for a key that an object
  has twice, and for data beyond what Python can read: deep nesting, integers of thousands of
  digits.
  """
  try:
    return json.loads(text, object_pairs_hook=_object, parse_int=_integer)
  except RecursionError:
    raise ValueError('nested too deeply') from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    keys = [key for key, _ in pairs]
    again = next(key for key in keys if keys.count(key) > 1)
    raise ValueError(f'the key {again!r} is given twice in one object')
  return found


def _integer(digits: str) -> int:
  if len(digits) > 4000:  # Python's own limit is 4,300
    raise ValueError(f'a number of {len(digits):,} digits')
  return int(digits)


def at(data: Any, path: str) -> Any:
  """Return what JSON data have at a dotted path; None where they have nothing."""
  for name in path.split('.'):
    data = data[int(name)] if isinstance(data, list) else data.get(name)
  return data


def set_at(data: Any, path: str, value: Any) -> None:
  """Replace what JSON data have at a dotted path."""
  above, dot, last = path.rpartition('.')
  place = at(data, above) if dot else data
  place[int(last) if isinstance(place, list) else last] = value
