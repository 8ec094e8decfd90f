"""Sweeps: one job for each combination of the values of some fields."""

import itertools
import re
from collections.abc import Sequence

from jaxformer.config import InputError

Override = tuple[str, str]


def grid(sweeps: Sequence[str]) -> list[tuple[str, tuple[Override, ...]]]:
  """(suffix of the run's name, overrides) for each point of the grid; a single point without
  overrides if nothing is swept.

  A sweep is `FIELD=VALUE,VALUE,...`. In names, a field is abbreviated to its last part if that is
  unique.
  """
  axes = [_axis(text) for text in sweeps]
  fields = [field for field, _ in axes]
  if twice := next((f for f in fields if fields.count(f) > 1), None):
    raise InputError('--sweep', twice, problem='given twice')
  lasts = [field.rpartition('.')[2] for field in fields]
  labels = [
    last if lasts.count(last) == 1 else field for field, last in zip(fields, lasts, strict=True)
  ]
  points = []
  for values in itertools.product(*(values for _, values in axes)):
    name = ''.join(f'-{label}-{_word(value)}' for label, value in zip(labels, values, strict=True))
    points.append((name, tuple(zip(fields, values, strict=True))))
  names = [name for name, _ in points]
  if twice := next((n for n in names if names.count(n) > 1), None):
    raise InputError(f'--sweep: two runs would be called {twice.removeprefix("-")}')
  return points


def _axis(text: str) -> tuple[str, list[str]]:
  field, equals, values = text.partition('=')
  field = field.removeprefix('--').replace('-', '_')
  if not equals or not field or not all(values.split(',')):
    form = 'FIELD=VALUE,VALUE,... such as optimizer.learning-rate=1e-3,3e-4'
    raise InputError('--sweep', text, form)
  if field.partition('.')[0] == 'run':
    outside = 'a field outside `run`; the runs of a sweep are named by their values'
    raise InputError('--sweep', text, outside)
  return field, values.split(',')


def _word(value: str) -> str:
  return re.sub(r'[^\w.+-]+', '-', value).strip('-')
