"""Models of equal size: for each family the width, depth and hidden units that come closest to a
number of parameters, of training FLOPs, or of bytes of state.

Every layer's costs are polynomials of its shape, but for a few roundings. So a dozen shapes tell
those of all the others, and of these only the best are built, to be measured exactly."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Literal, get_args

import numpy as np

from jaxformer.config import InputError
from jaxformer.models.model import ModelConfig
from jaxformer.models.params import define
from jaxformer.models.zoo import FAMILIES, PRESETS, Family
from jaxformer.planning.cost import flops_per_token

Match = Literal['params', 'active_params', 'train_flops_per_token', 'state_bytes']
"""What is made equal: all parameters; those that a token uses; training FLOPs a token at the
context, attention counted causally; bytes of state at the context, at 2 bytes a number."""

WIDEST = 2**12  # steps of a family's width
HIDDEN_STEP = 8
# of the family's own number of hidden units: beyond, it would be another architecture
HIDDEN_RANGE = 0.5, 2.0
# at hidden units that fit; where what is matched is proportional to them, the first is the last
TRIES = 3
CLOSE = 0.01  # within it, shape decides between sizes
MEASURED = 8  # shapes at most that are built for a target


@dataclasses.dataclass(frozen=True)
class Sized:
  """A model of a family, and how close it comes.

  Attributes:
    family: its name.
    model: the model.
    width, layers, hidden: its shape; `hidden` is None where the family has no feed-forward layers.
    match, target: what is matched, and to how much.
    value: of what is matched.
    error: value / target - 1.
  """

  family: str
  model: ModelConfig
  width: int
  layers: int
  hidden: int | None
  match: Match
  target: float
  value: float
  error: float


def measure(model: ModelConfig, match: Match) -> float:
  """The value of what is matched, for a model with the context that it will be trained at."""
  if match == 'params':
    return float(define(model).size)
  if match == 'active_params':
    return float(define(model).active_size)
  if match == 'train_flops_per_token':
    return flops_per_token(model, model.context_length)
  return 2.0 * (model.state_size(model.context_length) or 0)


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
  """The model of a family that comes closest to a target.

  Widths are multiples of the family's step, layers of its pattern, hidden units of 8. Among sizes
  closer than one per cent the one wins whose ratio of width to depth is nearest to that of the
  family's named models of like width. `source_vocab_size` is for families of encoder-decoders, and
  for them alone.

  Raises `InputError` where nothing comes within `tolerance`, with the closest that there is, and
  for a family of other data."""
  if match not in get_args(Match):
    raise InputError(f'match = {match!r}: must be one of {", ".join(get_args(Match))}')
  if not target > 0:
    raise InputError(f'{match} = {target}: must be positive')
  f = FAMILIES[family] if isinstance(family, str) else family
  best = _closest(_Builder(f, vocab_size, context_length, source_vocab_size), match, float(target))
  if abs(best.error) > tolerance:
    raise InputError(
      f'{f.name}: nothing comes within {tolerance:.0%} of {target:,.0f} {match}; the closest has '
      f'{best.value:,.0f} '
      f'(width {best.width}, {best.layers} layers); give another target, or a larger tolerance'
    )
  return best


Shape = tuple[int, int, int | None]  # width, layers, hidden units


@dataclasses.dataclass(frozen=True)
class _Builder:
  """Models of a family for some data."""

  family: Family
  vocab_size: int
  context_length: int
  source_vocab_size: int | None

  def __call__(self, shape: Shape) -> ModelConfig:
    width, layers, hidden = shape
    make = self.family.maker(self.source_vocab_size)
    return make(
      width=width,
      layers=layers,
      hidden=hidden or 0,
      vocab_size=self.vocab_size,
      context_length=self.context_length,
    )


def _closest(build: _Builder, match: Match, target: float) -> Sized:
  """Builds the best shape by the law; where it misses what the law said, the law is corrected by
  that, and asked again."""
  f, law, factor = build.family, _law(build, match), 1.0
  if not any(law.weights):
    raise InputError(f'{f.name}: a model of it has no {match}, so none can be made equal')
  found: dict[Shape, Sized] = {}
  for _ in range(MEASURED):
    errors = {
      s: found[s].error if s in found else factor * law(*s) / target - 1
      for s in _shapes(f, law, target / factor)
    }
    errors |= {s: sized.error for s, sized in found.items()}
    best = min(errors, key=lambda s: (max(abs(errors[s]), CLOSE), _oddness(f, s)))
    if best in found:
      return found[best]
    model = build(best)
    value = measure(model, match)
    found[best] = Sized(
      f.name, model, best[0], _shape_of(model)[1], best[2], match, target, value, value / target - 1
    )
    factor = value / law(*best)
  return min(found.values(), key=lambda s: abs(s.error))


# ---- what shapes cost --------------------------------------------------------------------------


def _terms(width: int, layers: int, hidden: int | None) -> list[float]:
  """What costs are sums of: 1, w, w^2 and, with hidden units, h, h w and h^2, outside the layers
  and in each."""
  w, h = width / 512, None if hidden is None else hidden / 512
  terms = [1.0, w, w * w] if h is None else [1.0, w, w * w, h, h * w, h * h]
  return [*terms, *(layers * t for t in terms)]


@dataclasses.dataclass(frozen=True)
class _Law:
  """What is matched, as a function of the shape."""

  weights: tuple[float, ...]

  def __call__(self, width: int, layers: int, hidden: int | None) -> float:
    return float(np.dot(self.weights, _terms(width, layers, hidden)))


@functools.lru_cache(maxsize=64)
def _law(build: _Builder, match: Match) -> _Law:
  """The law through as many small models as it has terms. Their widths are those at which nothing
  is rounded."""
  f, shapes = build.family, list[Shape]()
  fewest = max(2 * f.layer_step, f.fewest_layers)
  for layers in (fewest, fewest + f.layer_step):
    shapes += [(w, layers, None if f.hidden is None else f.hidden(w)) for w in (128, 256, 512)]
    if f.hidden is not None:
      shapes += [(w, layers, times * f.hidden(w)) for w, times in ((128, 2), (256, 2), (128, 3))]
  values = [measure(build(s), match) for s in shapes]
  return _Law(tuple(np.linalg.solve([_terms(*s) for s in shapes], values).tolist()))


# ---- shapes ------------------------------------------------------------------------------------


def _shapes(f: Family, law: _Law, target: float) -> Iterator[Shape]:
  """For each depth up to a factor of two from the family's own, the widths on either side of the
  target (a step further where there is but one depth), with the family's hidden units and with
  those that fit; and the family's own width, since there are costs that no width changes."""
  step = f.layer_step

  def units(width: int) -> int | None:
    return None if f.hidden is None else f.hidden(width)

  def own(width: int) -> int:
    return max(step, f.fewest_layers, step * round(width / _aspect(f, width) / step))

  _, usual = _bracket(f, target, lambda width: law(width, own(width), units(width)))
  depth = own(usual)
  depths = range(
    min(depth // 2, depth - 2 * step) // step * step, max(2 * depth, depth + 2 * step) + 1, step
  )
  beside = 0 if f.grows_deeper else f.width_step
  for layers in [n for n in depths if n >= max(1, f.fewest_layers)] if f.grows_deeper else [depth]:
    yield usual, layers, units(usual)
    low, high = _bracket(f, target, lambda width, layers=layers: law(width, layers, units(width)))
    for width in range(max(low - beside, f.width_step), high + beside + 1, f.width_step):
      yield width, layers, units(width)
      if fitting := _fitting_units(f, law, target, width, layers):
        yield width, layers, fitting


def _bracket(f: Family, target: float, value: Callable[[int], float]) -> tuple[int, int]:
  """Neighbouring widths between which a value passes the target; the first twice where it does so
  from there on."""
  n = (
    bisect.bisect_left(range(1, WIDEST), True, key=lambda n: value(n * f.width_step) >= target) + 1
  )
  return max(n - 1, 1) * f.width_step, n * f.width_step


def _fitting_units(f: Family, law: _Law, target: float, width: int, layers: int) -> int | None:
  """The hidden units that come closest at a width and depth; None where none within what the family
  may have does."""
  if f.hidden is None:
    return None
  least, most = (round(f.hidden(width) * end / HIDDEN_STEP) for end in HIDDEN_RANGE)
  units = range(max(1, least) * HIDDEN_STEP, (most + 1) * HIDDEN_STEP, HIDDEN_STEP)
  below, above = law(width, layers, units[0]), law(width, layers, units[-1])
  if above - below <= 1e-6 * below or not below <= target <= above:  # hidden units have no state
    return None
  at = bisect.bisect_left(units, target, key=lambda h: law(width, layers, h))
  return min(units[max(at - 1, 0) : at + 1], key=lambda h: abs(law(width, layers, h) - target))


def _aspect(f: Family, width: int) -> float:
  """Width over depth of the family's named models, between them by the logarithm of the width; that
  of Llama for one without."""
  named = _named_aspects(f.name)
  return float(
    np.exp(
      np.interp(math.log(width), [math.log(w) for w, _ in named], [math.log(a) for _, a in named])
    )
  )


@functools.lru_cache(maxsize=64)
def _named_aspects(family: str) -> list[tuple[int, float]]:
  shapes = [_shape_of(PRESETS[name].model) for name in PRESETS if PRESETS[name].family == family]
  return sorted({(width, width / layers) for width, layers in shapes or [(128, 4), (4096, 32)]})


def _shape_of(model: ModelConfig) -> tuple[int, int]:
  """Width and number of blocks; in an encoder-decoder, blocks of the encoder."""
  return model.width, sum(len(g.pattern) * g.repeats for g in model.stacks[0])


def _oddness(f: Family, shape: Shape) -> float:
  """How far a shape is from the family's own."""
  width, layers, units = shape
  hidden = 0.0 if f.hidden is None or units is None else abs(math.log(units / f.hidden(width)))
  return abs(math.log(width / layers / _aspect(f, width))) + hidden
