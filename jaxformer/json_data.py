"""Results as JSON data."""

import dataclasses
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
