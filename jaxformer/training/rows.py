"""Rows of the metrics and the events of a run folder, as they are read. A crash may cut a line
short, and a user may add to the files, so what is no such row is left out."""

import contextlib
import math
from typing import Any

from jaxformer.config import InputError
from jaxformer.files import regular_file
from jaxformer.json_data import parse_json
from jaxformer.training.paths import AnyPath, to_path


def read_metrics(folder: str | AnyPath) -> list[dict[str, Any]]:
  """Return the rows of `metrics.jsonl`: each has a `step`, and values that are finite numbers or
  None, or the text of a `source`. Raises `InputError` for a file that cannot be read."""
  rows = _rows(to_path(folder) / 'metrics.jsonl')
  return [
    r for r in rows if _is_step(r.get('step')) and all(_is_metric(k, v) for k, v in r.items())
  ]


def started_from(folder: str | AnyPath, unknown: str | None = None) -> str | None:
  """Return the name of the parameters that a run was started from (`setup.Initial`), None for
  random ones; `unknown` where its events do not say."""
  starts = [row for row in read_events(folder) if row.get('event') == 'start']
  return starts[-1].get('init_from') if starts else unknown


def read_events(folder: str | AnyPath) -> list[dict[str, Any]]:
  """Return the rows of `events.jsonl`, each with the name of an `event`. Raises `InputError` for a
  file that cannot be read."""
  rows = _rows(to_path(folder) / 'events.jsonl')
  return [r for r in rows if isinstance(r.get('event'), str)]


def _rows(file: AnyPath) -> list[dict[str, Any]]:
  rows = []
  try:
    lines = regular_file(file).read_bytes().splitlines() if file.exists() else []
  except OSError as e:
    raise InputError(f'{file}: cannot be read ({e.strerror})') from None
  for line in lines:
    with contextlib.suppress(ValueError):
      rows.append(parse_json(line))
  return [row for row in rows if isinstance(row, dict)]


def _is_step(value: Any) -> bool:
  return type(value) is int and 0 <= value < 2**63


def _is_metric(name: str, value: Any) -> bool:
  if name.endswith('source'):
    return isinstance(value, str)
  if isinstance(value, int):
    return not isinstance(value, bool) and abs(value) < 2**63
  return value is None or (isinstance(value, float) and math.isfinite(value))
