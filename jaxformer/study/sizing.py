"""Scale a family to a target: the width, depth and hidden units that come closest to a number of
parameters, of training FLOPs per token, or of bytes of state.

The costs of layers are polynomials of the shape up to rounding. So a polynomial through a dozen
small models predicts the others, and only the best candidates are built and measured exactly."""

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np

from jaxformer.config import InputError
from jaxformer.models.model import ModelConfig
from jaxformer.models.zoo import FAMILIES, PRESETS, Family
from jaxformer.planning.cost import cost

Match = Literal['params', 'active_params', 'train_flops_per_token', 'state_bytes']
"""What is made equal: all parameters; those used per token; training FLOPs per token at the context
length, attention counted causally; bytes of state at the context length, as a program holds it."""

MATCHED: dict[Match, str] = {
  'params': 'parameters',
  'active_params': 'active parameters',
  'train_flops_per_token': 'training FLOPs per token',
  'state_bytes': 'bytes of state',
}

WIDEST = 2**12  # in steps of a family's width
HIDDEN_STEP = 8
HIDDEN_RANGE = 0.5, 2.0  # of the family's own hidden units; beyond, it is another architecture
CLOSE = 0.01  # sizes closer than this are ranked by their shape
MEASURED = 8  # candidates that are built per target, at most

Shape = tuple[int, int, int | None]
"""Width, layers, and hidden units (None for a family without feed-forward layers)."""


@dataclasses.dataclass(frozen=True)
class Sized:
  """A model scaled to a target.

  Attributes:
    family: its name.
    model: the model.
    width, layers, hidden: its shape; `hidden` is None for a family without feed-forward layers.
    match, target: what is matched, and its target.
    value: the model's value of what is matched.
  """

  family: str
  model: ModelConfig
  width: int
  layers: int
  hidden: int | None
  match: Match
  target: float
  value: float

  @property
  def error(self) -> float:
    """Relative size error."""
    return self.value / self.target - 1


def measure(model: ModelConfig, match: Match) -> float:
  """Return the value of what is matched, at the model's context length."""
  c = cost(model)
  return float((c.decode_state_bytes or 0) if match == 'state_bytes' else getattr(c, match))


def solve(
  family: str | Family,
  match: Match,
  target: float,
  *,
  vocab_size: int,
  context_length: int,
  tolerance: float = 0.02,
  source_vocab_size: int | None = None,
) -> Sized:
  """Return the model of a family that comes closest to a target.

  Widths are multiples of the family's step, layers of its pattern, hidden units of 8. Of sizes
  closer than one per cent, the one is chosen whose ratio of width to depth is nearest to that of
  the family's named models of similar width. `source_vocab_size` is for families of
  encoder-decoders only.

  Raises `InputError` if nothing comes within `tolerance`, naming the closest, and for a family of
  other data."""
  if match not in MATCHED:
    raise InputError('match', match, f'one of {", ".join(MATCHED)}')
  if not target > 0:
    raise InputError(match, target, 'positive')
  f = FAMILIES[family] if isinstance(family, str) else family
  f.maker(source_vocab_size)
  data = vocab_size, context_length, source_vocab_size
  best = _closest(f, data, match, float(target), tolerance)
  if abs(best.error) > tolerance:
    raise InputError(
      f'{f.name}: nothing comes within {tolerance:.0%} of {target:,.0f} {match}; the closest has '
      f'{best.value:,.0f} (width {best.width}, {best.layers} layers); give another target, or a '
      'larger tolerance'
    )
  return best


Data = tuple[int, int, int | None]
"""Vocabulary, context length, and vocabulary of sources."""


def _build(f: Family, data: Data, shape: Shape) -> ModelConfig:
  (vocab_size, context_length, sources), (width, layers, hidden) = data, shape
  units = {} if hidden is None else {'hidden': hidden}
  return f.maker(sources)(
    width=width, layers=layers, vocab_size=vocab_size, context_length=context_length, **units
  )


def _closest(f: Family, data: Data, match: Match, target: float, tolerance: float) -> Sized:
  """Build the best shape by the polynomial; if it misses the prediction, rescale the polynomial and
  try again. Costs that jump, as where heads become larger, follow no polynomial: if nothing comes
  within the tolerance, build the next widths towards the target."""
  weights, factor = np.array(_weights(f, data, match)), 1.0
  if not weights.any():
    raise InputError(f'{f.name}: its models have no {match}, so it cannot be matched')

  def predicted(*shape: int | None) -> float:
    return float(np.dot(weights, _terms(shape)))

  def build(shape: Shape) -> Sized:
    model = _build(f, data, shape)
    value = measure(model, match)
    return Sized(f.name, model, shape[0], _depth(model), shape[2], match, target, value)

  def miss(shape: Shape) -> float:
    return abs(found[shape].error)

  found: dict[Shape, Sized] = {}
  for _ in range(MEASURED):
    shapes = _shapes(f, predicted, target / factor)
    errors = {s: factor * predicted(*s) / target - 1 for s in shapes}
    errors |= {s: sized.error for s, sized in found.items()}
    best = min(errors, key=lambda s: (max(abs(errors[s]), CLOSE), _oddness(f, s)))
    if best in found:
      break
    found[best] = build(best)
    factor = found[best].value / predicted(*best)
  else:
    best = min(found, key=miss)
  if miss(best) > tolerance:
    width, layers, _ = best
    step = f.width_step if found[best].error < 0 else -f.width_step
    for w in range(width + step, width + (MEASURED + 1) * step, step):
      if 0 < w <= WIDEST * f.width_step:
        found[w, layers, _units(f, w)] = build((w, layers, _units(f, w)))
    best = min(found, key=miss)
  return found[best]


def _units(f: Family, width: int) -> int | None:
  """Return the family's own hidden units at a width."""
  return None if f.hidden is None else f.hidden(width)


def _terms(shape: tuple[int | None, ...]) -> list[float]:
  """Return the monomials of costs: 1, w, w^2 and, with hidden units, h, h w and h^2, outside the
  layers and in each."""
  width, layers, hidden = shape
  w = (width or 0) / 512
  terms = [1.0, w, w * w]
  if hidden is not None:
    h = hidden / 512
    terms += [h, h * w, h * h]
  return [*terms, *((layers or 0) * t for t in terms)]


@functools.lru_cache(maxsize=64)
def _weights(f: Family, data: Data, match: Match) -> tuple[float, ...]:
  """Fit the polynomial to as many small models as it has terms, at widths without rounding."""
  shapes, fewest = list[Shape](), max(2 * f.layer_step, f.fewest_layers)
  for layers in (fewest, fewest + f.layer_step):
    shapes += [(w, layers, _units(f, w)) for w in (128, 256, 512)]
    if f.hidden is not None:
      shapes += [(w, layers, times * f.hidden(w)) for w, times in ((128, 2), (256, 2), (128, 3))]
  values = [measure(_build(f, data, s), match) for s in shapes]
  return tuple(np.linalg.solve([_terms(s) for s in shapes], values).tolist())


def _shapes(f: Family, predicted: Callable[..., float], target: float) -> Iterator[Shape]:
  """Yield, for each depth within a factor of two of the family's own, the widths on both sides of
  the target (one more for a fixed depth), with the family's hidden units and with those that fit;
  and the family's own width, for costs that no width changes."""
  step, beside = f.layer_step, 0 if f.grows_deeper else f.width_step

  def own(width: int) -> int:
    return max(step, f.fewest_layers, step * round(width / _aspect(f, width) / step))

  _, usual = _bracket(f, target, lambda width: predicted(width, own(width), _units(f, width)))
  depth = own(usual)
  least = min(depth // 2, depth - 2 * step) // step * step
  depths = range(least, max(2 * depth, depth + 2 * step) + 1, step) if f.grows_deeper else [depth]
  for layers in depths:
    if f.grows_deeper and layers < max(1, f.fewest_layers):
      continue
    yield usual, layers, _units(f, usual)
    low, high = _bracket(f, target, lambda w, layers=layers: predicted(w, layers, _units(f, w)))
    for width in range(max(low - beside, f.width_step), high + beside + 1, f.width_step):
      yield width, layers, _units(f, width)
      if fitting := _fitting_units(f, predicted, target, width, layers):
        yield width, layers, fitting


def _bracket(f: Family, target: float, value: Callable[[int], float]) -> tuple[int, int]:
  """Return neighbouring widths between which a value crosses the target; the smallest width twice
  if it is above the target there."""
  steps = range(1, WIDEST)
  n = bisect.bisect_left(steps, True, key=lambda n: value(n * f.width_step) >= target) + 1
  return max(n - 1, 1) * f.width_step, n * f.width_step


def _fitting_units(
  f: Family, predicted: Callable[..., float], target: float, width: int, layers: int
) -> int | None:
  """Return the hidden units that come closest at a width and depth; None if the target is out of
  the family's range."""
  if f.hidden is None:
    return None
  least, most = (round(f.hidden(width) * end / HIDDEN_STEP) for end in HIDDEN_RANGE)
  units = range(max(1, least) * HIDDEN_STEP, (most + 1) * HIDDEN_STEP, HIDDEN_STEP)
  values = functools.partial(predicted, width, layers)
  below, above = values(units[0]), values(units[-1])
  if above - below <= 1e-6 * below or not below <= target <= above:  # hidden units have no state
    return None
  at = bisect.bisect_left(units, target, key=values)
  return min(units[max(at - 1, 0) : at + 1], key=lambda h: abs(values(h) - target))


def _depth(model: ModelConfig) -> int:
  """Return the number of blocks; in an encoder-decoder, of the encoder."""
  return sum(len(g.pattern) * g.repeats for g in model.stacks[0])


@functools.lru_cache(maxsize=64)
def _named_aspects(family: str) -> tuple[list[float], list[float]]:
  """Return log width and log (width / depth) of a family's named models; those of Llama if it has
  none."""
  models = [PRESETS[name].model for name in PRESETS if PRESETS[name].family == family]
  shapes = [(m.width, _depth(m)) for m in models] or [(128, 4), (4096, 32)]
  named = sorted({(w, w / layers) for w, layers in shapes})
  return [math.log(w) for w, _ in named], [math.log(a) for _, a in named]


def _aspect(f: Family, width: int) -> float:
  """Return the width over depth of a family, interpolated between its named models."""
  return math.exp(float(np.interp(math.log(width), *_named_aspects(f.name))))


def _oddness(f: Family, shape: Shape) -> float:
  """Return how far a shape is from the family's own."""
  width, layers, units = shape
  hidden = 0.0 if f.hidden is None or units is None else abs(math.log(units / f.hidden(width)))
  return abs(math.log(width / layers / _aspect(f, width))) + hidden
