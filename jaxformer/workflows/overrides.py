"""Overrides as users give them."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from jaxformer.config import Config, to_json

Overrides = Mapping[str, Any] | Iterable[tuple[str, Any]]
"""Values by dotted path, `{'training.steps': 100}`: Python values, configs, or text as the command
line has it."""
Pairs = list[tuple[str, str]]


def pairs_of(overrides: Overrides) -> Pairs:
  """Return overrides as (path, text) in their order."""
  items = overrides.items() if isinstance(overrides, Mapping) else overrides
  return [(str(path), _text(value)) for path, value in items]


def _text(value: Any) -> str:
  if value is None:
    return 'none'
  if isinstance(value, Config | list | tuple):
    return json.dumps(to_json(value))
  return str(value).lower() if isinstance(value, bool) else str(value)
