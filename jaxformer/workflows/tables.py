"""Plain-text tables and short numbers, for results that people read."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
  """Return rows as lines of aligned columns; the first `left` columns are flush left, the others
  right."""
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  return [
    '  '.join(
      c.ljust(w) if i < left else c.rjust(w)
      for i, (c, w) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]


def amount(n: float) -> str:
  """Return a count with three digits and a suffix: 6.7B."""
  for unit, size in (('T', 1e12), ('B', 1e9), ('M', 1e6), ('K', 1e3)):
    if abs(n) >= size:
      return f'{n / size:.3g}{unit}'
  return f'{n:.3g}'
