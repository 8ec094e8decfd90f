"""Charts as SVG text: points with interval bars, lines, linear and logarithmic axes, labels beside
what they name."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Callable, Sequence

# Okabe and Ito 2008: told apart by every kind of colour vision. Yellow is darkened: on white it
# could not be seen.
COLOURS = ('#000000', '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#56B4E9', '#E69F00', '#B8A800')
# with the colours no two of 56 are alike
MARKERS = ('circle', 'square', 'triangle', 'diamond', 'cross', 'down', 'plus')
WIDTH, HEIGHT = 536, 350
LEFT, RIGHT, TOP, BOTTOM = 84, 112, 14, 50
FONT, LABEL = 14, 13
MOST_TICKS = 6
CLASSES = """svg text { fill: #1a1a1a; }
svg .grid { stroke: #e4e4e4; stroke-width: 1; }
svg .halo { paint-order: stroke; stroke: #fff; stroke-width: 3px; stroke-linejoin: round; }
svg .axis { stroke: #666; stroke-width: 1; fill: none; }
"""

Format = Callable[[float], str]


@dataclasses.dataclass(frozen=True)
class Point:
  """Where, and the ends of the interval of y; None where there is none."""

  x: float
  y: float
  low: float | None = None
  high: float | None = None


@dataclasses.dataclass(frozen=True)
class Series:
  """Points of one name, '' for none. `style` is the number of its colour and marker; `line` joins
  them, `dots` marks each."""

  name: str
  style: int
  points: tuple[Point, ...]
  line: bool = False
  dots: bool = True

  def __post_init__(self):
    object.__setattr__(
      self, 'points', tuple(p for p in self.points if math.isfinite(p.x) and math.isfinite(p.y))
    )


@dataclasses.dataclass(frozen=True)
class Axis:
  """What an axis says; `form` writes its numbers."""

  label: str
  log: bool = False
  form: Format = '{:g}'.format


class _Scale:
  """Values of an axis to pixels."""

  def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float):
    self.axis, self.start, self.end = axis, start, end
    self.log = axis.log and min(values) > 0
    low, high = min(values), max(values)
    if self.log:
      low, high = math.log10(low), math.log10(high)
    pad = 0.06 * (high - low) or (0.1 if self.log else 0.1 * abs(low) or 1.0)
    self.low, self.high = low - pad, high + pad

  def __call__(self, value: float) -> float:
    at = math.log10(value) if self.log else value
    return self.start + (at - self.low) / (self.high - self.low) * (self.end - self.start)

  def ticks(self) -> list[float]:
    if self.log:
      decades = range(math.floor(self.low), math.ceil(self.high) + 1)
      for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [
          d * 10.0**e for e in decades for d in digits if self.low <= math.log10(d) + e <= self.high
        ]
        if len(found) <= MOST_TICKS:
          break
      if len(found) >= 2:
        return found[:: -(-len(found) // MOST_TICKS)]
      low, high = 10.0**self.low, 10.0**self.high
    else:
      low, high = self.low, self.high
    step = 10.0 ** math.floor(math.log10((high - low) / (MOST_TICKS - 1)))
    step *= next(f for f in (1, 2, 5, 10) if (high - low) / (f * step) <= MOST_TICKS - 1)
    first = math.ceil(low / step)
    return [n * step for n in range(first, math.floor(high / step) + 1)]


def chart(series: Sequence[Series], x: Axis, y: Axis, title: str) -> str:
  """An `<svg>` element. `title` is read out to those who cannot see it. Raises `ValueError` where
  there is nothing to draw."""
  points = [p for s in series for p in s.points]
  if not points:
    raise ValueError('no points')
  ends = [v for p in points for v in (p.y, p.low, p.high) if v is not None and math.isfinite(v)]
  sx = _Scale(x, [p.x for p in points], LEFT, WIDTH - RIGHT)
  sy = _Scale(y, ends, HEIGHT - BOTTOM, TOP)
  parts = [
    f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}" '
    f'font-size="{FONT}">',
    *_axes(sx, sy),
    *(part for s in series for part in _marks(s, sx, sy)),
    *(_beside if all(len(s.points) < 2 for s in series) else _margin)(series, sx, sy),
    '</svg>',
  ]
  return '\n'.join(parts)


def standalone(svg: str) -> str:
  """A chart as a file of its own, with what a report's page gives it: the name space, a font, a
  white ground and its classes."""
  opening, rest = svg.split('>', 1)
  head = opening.replace(
    '<svg ', f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" ', 1
  )
  return f'{head} font-family="system-ui, sans-serif"><style>{CLASSES}</style><rect width="100%" height="100%" fill="#fff"/>{rest}'


def marker(style: int, x: float, y: float, size: float = 4.5) -> str:
  """The marker of a style."""
  kind, fill = MARKERS[style % len(MARKERS)], COLOURS[style % len(COLOURS)]
  s = size
  if kind == 'circle':
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{s:.1f}" fill="{fill}"/>'
  if kind in ('cross', 'plus'):
    a, b = (s, s) if kind == 'cross' else (1.3 * s, 0)
    d = f'M{x - a:.1f} {y - b:.1f}L{x + a:.1f} {y + b:.1f}M{x - b:.1f} {y + a:.1f}L{x + b:.1f} {y - a:.1f}'
    return f'<path d="{d}" stroke="{fill}" stroke-width="2.4" fill="none"/>'
  corners = {
    'square': ((-s, -s), (s, -s), (s, s), (-s, s)),
    'diamond': ((0, -1.4 * s), (1.4 * s, 0), (0, 1.4 * s), (-1.4 * s, 0)),
    'triangle': ((0, -1.2 * s), (1.2 * s, s), (-1.2 * s, s)),
    'down': ((0, 1.2 * s), (1.2 * s, -s), (-1.2 * s, -s)),
  }[kind]
  at = ' '.join(f'{x + dx:.1f},{y + dy:.1f}' for dx, dy in corners)
  return f'<polygon points="{at}" fill="{fill}"/>'


def key(style: int, name: str) -> str:
  """A line of a legend, as HTML."""
  return (
    '<span class="key"><svg viewBox="0 0 16 16" width="16" height="16" '
    f'aria-hidden="true">{marker(style, 8, 8)}</svg>'
    f'{html.escape(name)}</span>'
  )


def _axes(sx: _Scale, sy: _Scale) -> list[str]:
  bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
  parts = []
  for tick in sx.ticks():
    at = sx(tick)
    parts += [
      f'<line x1="{at:.1f}" y1="{TOP}" x2="{at:.1f}" y2="{bottom}" class="grid"/>',
      f'<text x="{at:.1f}" y="{bottom + 17}" '
      f'text-anchor="middle">{html.escape(sx.axis.form(tick))}</text>',
    ]
  for tick in sy.ticks():
    at = sy(tick)
    parts += [
      f'<line x1="{LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}" class="grid"/>',
      f'<text x="{LEFT - 6}" y="{at + 4:.1f}" '
      f'text-anchor="end">{html.escape(sy.axis.form(tick))}</text>',
    ]
  middle = (TOP + bottom) / 2
  return [
    *parts,
    f'<path d="M{LEFT} {TOP}V{bottom}H{right}" class="axis"/>',
    f'<text x="{(LEFT + right) / 2:.0f}" y="{HEIGHT - 8}" '
    f'text-anchor="middle">{html.escape(sx.axis.label)}</text>',
    f'<text transform="translate(13 {middle:.0f}) rotate(-90)" '
    f'text-anchor="middle">{html.escape(sy.axis.label)}</text>',
  ]


def _marks(s: Series, sx: _Scale, sy: _Scale) -> list[str]:
  colour, parts = COLOURS[s.style % len(COLOURS)], []
  if s.line and len(s.points) > 1:
    path = 'L'.join(f'{sx(p.x):.1f} {sy(p.y):.1f}' for p in s.points)
    dash = '' if s.style < len(COLOURS) else ' stroke-dasharray="6 3"'
    parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}/>')
  for p in s.points:
    at = sx(p.x)
    if p.low is not None and p.high is not None and math.isfinite(p.low) and math.isfinite(p.high):
      low, high = sy(p.low), sy(p.high)
      parts.append(
        f'<path d="M{at:.1f} {low:.1f}V{high:.1f}M{at - 4:.1f} {low:.1f}h8M{at - 4:.1f} '
        f'{high:.1f}h8" '
        f'fill="none" stroke="{colour}" stroke-width="1.2"/>'
      )
    if s.dots:
      parts.append(marker(s.style, at, sy(p.y)))
  return parts


def _margin(series: Sequence[Series], sx: _Scale, sy: _Scale) -> list[str]:
  """Names in the right margin at the height of each last point, moved apart, with a thin line to
  it."""
  named = sorted((s for s in series if s.points and s.name), key=lambda s: sy(s.points[-1].y))
  if not named:
    return []
  room = (HEIGHT - BOTTOM - TOP) / max(len(named) - 1, 1)
  gap, heights = min(LABEL + 2.0, room), [sy(s.points[-1].y) for s in named]
  for i in range(1, len(heights)):
    heights[i] = max(heights[i], heights[i - 1] + gap)
  excess = heights[-1] - (HEIGHT - BOTTOM)
  if excess > 0:
    heights[-1] -= excess
    for i in range(len(heights) - 2, -1, -1):
      heights[i] = min(heights[i], heights[i + 1] - gap)
  parts = []
  for s, height in zip(named, heights, strict=True):
    last, start = s.points[-1], WIDTH - RIGHT + 8
    colour = COLOURS[s.style % len(COLOURS)]
    parts += [
      f'<path d="M{sx(last.x) + 6:.1f} {sy(last.y):.1f}L{start:.1f} {height:.1f}" '
      f'stroke="{colour}" stroke-width="0.7" '
      'stroke-dasharray="2 2" fill="none"/>',
      marker(s.style, start + 5, height, 3.6),
      f'<text x="{start + 13}" y="{height + 4:.1f}" '
      f'font-size="{LABEL}">{html.escape(_short(s.name))}</text>',
    ]
  return parts


def _beside(series: Sequence[Series], sx: _Scale, sy: _Scale) -> list[str]:
  """Names beside single points: of a few places around each the first that covers no other name or
  point."""
  at = [(sx(s.points[0].x), sy(s.points[0].y), _short(s.name)) for s in series if s.points]
  taken = [(x - 6, y - 6, x + 6, y + 6) for x, y, _ in at]
  parts = []
  for own, (x, y, name) in enumerate(at):
    length = 0.62 * LABEL * len(name)
    places = [
      (x + dx - (length if dx < 0 else 0), y + dy)
      for dy in (0, -13, 13, -26, 26, -39, 39)
      for dx in (9, -9)
    ]
    boxes = [
      (left, middle - LABEL / 2, left + length, middle + LABEL / 2) for left, middle in places
    ]
    others = [box for i, box in enumerate(taken) if i != own]
    inside = [
      b for b in boxes if b[0] > LEFT and b[2] < WIDTH and b[1] > 0 and b[3] < HEIGHT - BOTTOM
    ]
    box = next((b for b in inside if not any(_overlap(b, o) for o in others)), boxes[0])
    taken.append(box)
    middle = (box[1] + box[3]) / 2
    if abs(middle - y) > 14:
      near = box[0] if box[0] > x else box[2]
      parts.append(
        f'<path d="M{x:.1f} {y:.1f}L{near:.1f} {middle:.1f}" class="axis" stroke-dasharray="2 2"/>'
      )
    at_x, anchor = (box[0], 'start') if box[0] > x else (box[2], 'end')
    parts.append(
      f'<text x="{at_x:.1f}" y="{middle + 4:.1f}" text-anchor="{anchor}" font-size="{LABEL}" '
      'class="halo">'
      f'{html.escape(name)}</text>'
    )
  return parts


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
  return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _short(name: str) -> str:
  return name if len(name) <= 13 else f'{name[:12]}…'
