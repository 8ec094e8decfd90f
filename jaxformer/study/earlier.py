"""Earlier reports of a study, kept where the next one would have less."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxformer.files import regular_file, write_atomically
from jaxformer.json_data import parse_json

FILES = ('report.html', 'report.md', 'report.csv', 'report.json')
Place = tuple[str, ...]


def keep_earlier(folder: Path, new: dict[str, Any]) -> list[str]:
  """Copy the report in a folder to `earlier/DIGEST` there if it has what a new one lacks:
  architectures, tasks, seeds, runs (of the same architecture with other code, data or settings) or
  measurements.

  Args:
    folder: of the report.
    new: JSON data of the report that will be written there.

  Returns lines for the user, which say what the new report lacks and where the earlier one is.
  """
  files = [folder / name for name in FILES if (folder / name).is_file()]
  if not files:
    return []
  try:
    old = parse_json(regular_file(folder / 'report.json').read_text())
    now = set(_contents(new))
    lost = [p for p in _contents(old) if p not in now]
    digest = ''.join(c for c in str(old['digest']) if c.isalnum())[:16]
  except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
    old, lost, digest = {}, [('report',)], 'unreadable'
  if not lost:
    return []
  kept = _kept(folder / 'earlier', digest, files)
  return [
    f'the report before this one is kept in {kept}; this one lacks {_in_words(old, new, lost)}'
  ]


def _contents(report: dict[str, Any]) -> Iterator[Place]:
  """Yield the places of the numbers of a report, and its runs by name."""
  yield from _places([*report['tasks'], {'title': 'costs'} | report['costs']], ())


def _places(value: Any, place: Place) -> Iterator[Place]:
  if isinstance(value, dict):
    for key, v in value.items():
      if key == 'runs' and isinstance(v, list):
        yield from ((*place, key, str(name)) for name in v)
      elif key not in ('curve', 'verdict'):
        yield from _places(v, (*place, str(key)))
  elif isinstance(value, list):
    for i, v in enumerate(value):
      name = v.get('title', i) if isinstance(v, dict) else i
      yield from _places(v, (*place, str(name)))
  elif value is not None:
    yield place


def _kept(folder: Path, name: str, files: list[Path]) -> Path:
  """Copy files to a folder of their own below `folder`, and return it; one that holds the same is
  used again."""
  number = 1
  while True:
    place = folder / (name if number == 1 else f'{name}-{number}')
    if not place.exists():
      break
    if all((place / f.name).is_file() and _same(place / f.name, f) for f in files):
      return place
    number += 1
  unfinished = folder / f'.{place.name}'
  shutil.rmtree(unfinished, ignore_errors=True)
  unfinished.mkdir(parents=True)
  for file in files:
    write_atomically(unfinished / file.name, file.read_bytes())
  unfinished.rename(place)
  return place


def _same(a: Path, b: Path) -> bool:
  return a.read_bytes() == b.read_bytes()


def _in_words(old: dict[str, Any], new: dict[str, Any], lost: Sequence[Place]) -> str:
  """Say what a new report lacks."""
  if not old:
    return 'what is in it, which cannot be read'
  tasks, titles = ([_titles(r, of) for r in (old, new)] for of in (_tasks, _entries))
  parts = [
    f'{kind} {", ".join(missing)}'
    for kind, (before, now) in (('tasks', tasks), ('architectures', titles))
    if (missing := [t for t in before if t not in now])
  ]
  if parts:
    return ' and '.join(parts)
  runs = sum('runs' in place for place in lost)
  return f'{runs} runs of other code, data or settings' if runs else 'some of its measurements'


def _titles(report: dict[str, Any], of: Any) -> list[str]:
  return list(dict.fromkeys(of(report)))


def _tasks(report: dict[str, Any]) -> list[str]:
  return [str(task['title']) for task in report['tasks']]


def _entries(report: dict[str, Any]) -> list[str]:
  return [str(o['title']) for task in report['tasks'] for o in [*task['outcomes'], *task['laws']]]
