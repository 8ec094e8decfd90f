"""Answers for people and programs: plain-text tables, short numbers."""

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Answer:
  """What a command answers: JSON data, and lines for people."""

  value: Any
  text: list[str]

  def json(self) -> Any:
    return self.value

  def lines(self) -> list[str]:
    return self.text


def table(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
  """Return rows as lines of aligned columns; the first `left` columns are flush left, the others
  right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
    '  '.join(
      c.ljust(w) if i < left else c.rjust(w)
      for i, (c, w) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]


def parameters(params: int, active: int) -> str:
  """Return how many parameters a model has, and of them active if that is not all."""
  return f'{params:,} parameters' + ('' if active == params else f', {active:,} active')


def amount(n: float) -> str:
  """Return a count with three digits and a suffix: 6.7B."""
  for unit, size in (('T', 1e12), ('B', 1e9), ('M', 1e6), ('K', 1e3)):
    if abs(n) >= size:
      return f'{n / size:.3g}{unit}'
  return f'{n:.3g}'
