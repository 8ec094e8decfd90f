"""What two runs must have in common to be the same."""

import json
from pathlib import Path

from jaxformer.training.run import read_metrics

TIMES = ('tokens_per_second', 'step_seconds')


def curve(folder: Path) -> list[dict]:
  """The rows of a run without what a clock says."""
  return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(folder)]


def meta(folder: Path, step: int) -> dict:
  """What a checkpoint says of its arrays."""
  return json.loads((folder / 'checkpoints' / str(step) / 'meta' / 'data.json').read_text())


def assert_same(one: Path, other: Path, step: int) -> None:
  """Bit for bit: every array of the state by its digest, the random key, the place in the data, and
  the curves."""
  a, b = meta(one, step), meta(other, step)
  for part in ('digests', 'key', 'data', 'step'):
    assert a[part] == b[part], part
  assert len(a['digests']) > 20
  assert curve(one) == curve(other)
