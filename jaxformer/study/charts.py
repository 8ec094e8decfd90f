"""Charts as SVG by matplotlib: points with interval bars, lines, linear and logarithmic axes."""

import dataclasses
import html
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

# Okabe and Ito 2008, distinguishable by every kind of colour vision; yellow is darkened for a white
# background. With the markers no two of 56 styles are alike.
COLOURS = ('#000000', '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#56B4E9', '#E69F00', '#B8A800')
MARKERS = ('o', 's', '^', 'D', 'X', 'v', 'P')
SETTINGS: Any = {
  'svg.fonttype': 'none',
  'text.parse_math': False,
  'font.size': 10,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'axes.axisbelow': True,
  'grid.color': '#e4e4e4',
  'legend.frameon': False,
}


class Point(NamedTuple):
  """Position, and the ends of the interval of y; None for no interval."""

  x: float
  y: float
  low: float | None = None
  high: float | None = None


@dataclasses.dataclass(frozen=True)
class Series:
  """Points under one name in the legend, '' for none. `style` numbers the colour and marker; `line`
  joins the points, `dots` marks each."""

  name: str
  style: int
  points: tuple[Point, ...]
  line: bool = False
  dots: bool = True

  @property
  def finite_points(self) -> tuple[Point, ...]:
    """Points that can be drawn."""
    return tuple(p for p in self.points if math.isfinite(p.x) and math.isfinite(p.y))


def line(name: str, style: int, points: Iterable[Point]) -> Series:
  """Return points joined by a line, without markers."""
  return Series(name, style, tuple(points), line=True, dots=False)


@dataclasses.dataclass(frozen=True)
class Axis:
  """Label, scale and number format of an axis."""

  label: str
  log: bool = False
  form: Callable[[float], str] = '{:g}'.format


def chart(series: Sequence[Series], x: Axis, y: Axis, title: str) -> str:
  """Draw an `<svg>` element. `title` is its accessible name. The same input gives the same text.
  Raises `ValueError` if there are no finite points."""
  from matplotlib import rc_context
  from matplotlib.figure import Figure

  shown = [dataclasses.replace(s, points=finite) for s in series if (finite := s.finite_points)]
  if not shown:
    raise ValueError('no points')
  with rc_context(SETTINGS | {'svg.hashsalt': title}):
    figure = Figure(figsize=(6.4, 3.8), layout='constrained')
    axes = figure.add_subplot()
    for s in shown:
      _draw(axes, s)
    every = [p for s in shown for p in s.points]
    _scale(axes.xaxis, x, [p.x for p in every])
    _scale(axes.yaxis, y, [v for p in every for v in p[1:] if v is not None])
    if any(s.name for s in shown):
      figure.legend(loc='outside right center')
    out = io.StringIO()
    figure.savefig(out, format='svg', metadata=dict.fromkeys(('Creator', 'Date', 'Format', 'Type')))
  # Groups are numbered alike in all charts of a page, and nothing refers to them.
  svg = re.sub(r' id="[A-Za-z.\d]*_\d+"', '', out.getvalue())
  name = f'role="img" aria-label="{html.escape(title)}"'
  return svg[svg.index('<svg') :].strip().replace('<svg', f'<svg {name}', 1)


def _draw(axes: Any, s: Series) -> None:
  colour = COLOURS[s.style % len(COLOURS)]
  dash = '-' if s.style < len(COLOURS) else '--'
  axes.plot(
    [p.x for p in s.points],
    [p.y for p in s.points],
    color=colour,
    marker=MARKERS[s.style % len(MARKERS)] if s.dots else None,
    markersize=5.5,
    linewidth=1.5,
    linestyle=dash if s.line else 'none',
    # a leading underscore would hide the name from the legend
    label=f'\u200b{s.name}' if s.name.startswith('_') else s.name or None,
  )
  for p in s.points:
    if p.low is not None and p.high is not None and math.isfinite(p.low) and math.isfinite(p.high):
      middle, half = (p.low + p.high) / 2, (p.high - p.low) / 2
      axes.errorbar(p.x, middle, half, color=colour, fmt='none', capsize=3, linewidth=1.1)


def _scale(axis: Any, a: Axis, values: Sequence[float]) -> None:
  from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

  finite = [v for v in values if math.isfinite(v)]
  low, high = min(finite), max(finite)
  axis.set_label_text(a.label)
  if a.log and low > 0:
    axis.axes.set(**{f'{axis.axis_name}scale': 'log'})
    # Three labels per decade overlap along an x axis of more than three decades.
    subs = (1, 2, 5) if axis.axis_name == 'y' or high < 1000 * low else (1,)
    axis.set_major_locator(LogLocator(subs=subs) if high > 5 * low else MaxNLocator(5))
    axis.set_minor_formatter(NullFormatter())
  axis.set_major_formatter(FuncFormatter(lambda value, _: a.form(value)))
