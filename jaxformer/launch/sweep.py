"""Sweeps: one job for each combination of the values of some fields."""

import hashlib
import itertools
import re
from collections.abc import Sequence

from jaxformer.config import InputError

Override = tuple[str, str]
LONGEST = 100  # of a suffix, in bytes


def grid(sweeps: Sequence[str]) -> list[tuple[str, tuple[Override, ...]]]:
  """(suffix of the run's name, overrides) for each point of the grid; a single point without
  overrides if nothing is swept.

  A sweep is `FIELD=VALUE,VALUE,...`; commas inside brackets, braces and quotes belong to a value.
  In names, a field is abbreviated to its last part if that is unique. A name that is long, or
  would be that of another run on a cluster, is cut and ends in a digest.
  """
  axes = [_axis(text) for text in sweeps]
  fields = [field for field, _ in axes]
  if twice := next((f for f in fields if fields.count(f) > 1), None):
    raise InputError('--sweep', twice, problem='given twice')
  lasts = [field.rpartition('.')[2] for field in fields]
  labels = [
    last if lasts.count(last) == 1 else field for field, last in zip(fields, lasts, strict=True)
  ]
  points: list[tuple[str, tuple[Override, ...]]] = []
  for values in itertools.product(*(values for _, values in axes)):
    name = ''.join(f'-{label}-{_word(value)}' for label, value in zip(labels, values, strict=True))
    points.append((name, tuple(zip(fields, values, strict=True))))
  for field, values in axes:
    if twice := next((v for v in values if values.count(v) > 1), None):
      raise InputError('--sweep', f'{field}={twice}', problem='given twice')
  alike = [re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-') for name, _ in points]
  return [
    (name if alike.count(key) == 1 and len(name.encode()) <= LONGEST else _cut(name, point), point)
    for key, (name, point) in zip(alike, points, strict=True)
  ]


def _cut(name: str, point: tuple[Override, ...]) -> str:
  """Return a name with a digest of what it stands for."""
  digest = hashlib.sha256(repr(point).encode()).hexdigest()[:8]
  return f'{name.encode()[: LONGEST - 9].decode(errors="ignore").rstrip("-")}-{digest}'


def _axis(text: str) -> tuple[str, list[str]]:
  field, equals, values = text.partition('=')
  field = field.removeprefix('--').replace('-', '_')
  split = _values(values)
  if not equals or not field or not all(split):
    form = 'FIELD=VALUE,VALUE,... such as optimizer.learning-rate=1e-3,3e-4'
    raise InputError('--sweep', text, form)
  if field.partition('.')[0] == 'run':
    outside = 'a field outside `run`; the runs of a sweep are named by their values'
    raise InputError('--sweep', text, outside)
  return field, split


def _values(text: str) -> list[str]:
  """Split at the commas that are inside no brackets, braces or quotes."""
  found, depth, quoted = [''], 0, False
  for character, before in zip(text, f' {text}', strict=False):
    if character == '"' and before != '\\':
      quoted = not quoted
    elif not quoted:
      depth += (character in '[{(') - (character in ')}]')
    if character == ',' and not quoted and depth <= 0:
      found.append('')
    else:
      found[-1] += character
  return found


def _word(value: str) -> str:
  return re.sub(r'[^\w.+-]+', '-', value).strip('-')
