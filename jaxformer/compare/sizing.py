"""Models of equal size: for each family the width, depth and hidden units that come closest to a number of parameters, of training
FLOPs, or of bytes of state."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Literal, get_args

import numpy as np

from jaxformer.config import InputError
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.language_model import LanguageModel, ModelConfig
from jaxformer.models.params import define
from jaxformer.models.zoo import FAMILIES, PRESETS, Family
from jaxformer.planning.cost import flops_per_token

Match = Literal['params', 'active_params', 'train_flops_per_token', 'state_bytes']
"""What is made equal: all parameters; those that a token uses; training FLOPs a token at the context, attention counted causally;
bytes of state at the context, at 2 bytes a number."""

WIDEST = 2**12           # steps of a family's width
HIDDEN_STEP = 8
HIDDEN_RANGE = 0.5, 2.0   # of the family's own number of hidden units: beyond, it would be another architecture
TRIES = 3                 # at hidden units that fit; where what is matched is proportional to them, the first is the last
CLOSE = 0.01              # within it, shape decides between sizes


@dataclasses.dataclass(frozen=True)
class Sized:
  """A model of a family, and how close it comes.

  Attributes:
    family: its name.
    model: the model.
    width, layers, hidden: its shape; `hidden` is None where the family has no feed-forward layers.
    value: of what is matched.
    error: value / target - 1.
  """

  family: str
  model: ModelConfig
  width: int
  layers: int
  hidden: int | None
  value: float
  error: float


def measure(model: ModelConfig, match: Match) -> float:
  """The value of what is matched, for a model with the context that it will be trained at."""
  if match == 'params':
    return float(define(model).size)
  if match == 'active_params':
    return float(define(model).active_size)
  if match == 'train_flops_per_token':
    return flops_per_token(model, model.context)
  return 2.0 * (model.state_size(model.context) or 0)


def solve(
  family: str | Family, match: Match, target: float, *, vocab_size: int, context: int, tolerance: float = 0.02,
  source_vocab_size: int | None = None,
) -> Sized:
  """The model of a family that comes closest to a target.

  Widths are multiples of the family's step, layers of its pattern, hidden units of 8. Among sizes closer than one per cent the one
  wins whose ratio of width to depth is nearest to that of the family's named models of like width. `source_vocab_size` is for
  families of encoder-decoders, and for them alone.

  Raises `InputError` where nothing comes within `tolerance`, with the closest that there is, and for a family of other data.
  """
  if match not in get_args(Match):
    raise InputError(f'match = {match!r}: must be one of {", ".join(get_args(Match))}')
  if not target > 0:
    raise InputError(f'{match} = {target}: must be positive')
  f = FAMILIES[family] if isinstance(family, str) else family
  make = functools.partial(_sized, f, f.maker(source_vocab_size), match, target, vocab_size, context)
  found = list(_candidates(f, make, match))
  best = min(found, key=lambda s: (max(abs(s.error), CLOSE), _oddness(f, s)))
  if abs(best.error) > tolerance:
    raise InputError(
      f'{f.name}: nothing comes within {tolerance:.0%} of {target:,.0f} {match}; the closest has {best.value:,.0f} '
      f'(width {best.width}, {best.layers} layers); give another target, or a larger tolerance')
  return best


def _sized(
  f: Family, make: Callable[..., ModelConfig], match: Match, target: float, vocab_size: int, context: int, width: int, layers: int,
  hidden: int | None = None,
) -> Sized:
  """The model at one shape; `hidden` is the family's own where it is not given."""
  units = None if f.hidden is None else hidden or f.hidden(width)
  model = make(width=width, layers=layers, hidden=units or 0, vocab_size=vocab_size, context=context)
  value = measure(model, match)
  return Sized(f.name, model, width, layers, units, value, value / target - 1)


def _candidates(f: Family, make: functools.partial[Sized], match: Match) -> Iterator[Sized]:
  """For each of a few depths around the family's own, the widths on either side of the target, with hidden units that fit."""
  def own(steps: int) -> Sized:
    width = steps * f.width_step
    return make(width, max(f.fewest_layers, f.layer_step * round(width / _aspect(f, width) / f.layer_step), f.layer_step))

  steps = _bracket(lambda steps: own(steps).error, 128 // f.width_step)[1]
  depth = own(steps).layers
  depths = {depth + i * f.layer_step for i in range(-2, 3)} if f.grows_deeper else {depth}
  beside = 0 if f.grows_deeper else 1   # other widths where there are no other depths
  for layers in sorted(n for n in depths if n >= f.fewest_layers):
    low, steps = _bracket(lambda steps, layers=layers: make(steps * f.width_step, layers).error, steps)
    for width in range(max(1, low - beside), steps + beside + 1):
      sized = make(width * f.width_step, layers)
      yield sized
      if match != 'state_bytes' and sized.hidden is not None:
        yield from _tuned(make, sized)


def _bracket(error: Callable[[int], float], guess: int) -> tuple[int, int]:
  """Neighbours between which the error of a size turns positive, (1, 1) where it is so from the first on. Costs grow about with the
  square of the width, so a step by the root of the error lands close."""
  low, high, at = 0, WIDEST, max(1, guess)
  while high - low > 1:
    e = error(at)
    low, high = (at, high) if e < 0 else (low, at)
    at = min(max(round(at / math.sqrt(1 + e)), low + 1), high - 1)
  return max(low, 1), high


def _tuned(make: functools.partial[Sized], sized: Sized) -> Iterator[Sized]:
  """The same width and depth with the hidden units that come closest: what is matched grows in proportion to them, or, where they
  are those of recurrences, about so between sizes that are near."""
  assert sized.hidden is not None
  target, near = sized.value / (1 + sized.error), sized
  other = make(sized.width, sized.layers, 2 * sized.hidden)
  for _ in range(TRIES):
    assert near.hidden is not None
    assert other.hidden is not None
    if (other.value - near.value) * (other.hidden - near.hidden) <= 0:
      return
    wanted = near.hidden + (target - near.value) * (other.hidden - near.hidden) / (other.value - near.value)
    units = max(HIDDEN_STEP, round(wanted / HIDDEN_STEP) * HIDDEN_STEP)
    if units in (near.hidden, other.hidden) or not HIDDEN_RANGE[0] <= units / sized.hidden <= HIDDEN_RANGE[1]:
      return
    near, other = make(sized.width, sized.layers, units), near
    yield near


def _aspect(f: Family, width: int) -> float:
  """Width over depth of the family's named models, between them by the logarithm of the width; that of Llama for one without."""
  shapes = [_shape_of(PRESETS[name].model) for name in PRESETS if PRESETS[name].family == f.name]
  named = sorted({(width, width / layers) for width, layers in shapes or [(128, 4), (4096, 32)]})
  return float(np.exp(np.interp(math.log(width), [math.log(w) for w, _ in named], [math.log(a) for _, a in named])))


def _shape_of(model: ModelConfig) -> tuple[int, int]:
  """Width, and layers of the stack, of an encoder-decoder those of its encoder."""
  assert isinstance(model, LanguageModel.Config | EncoderDecoder.Config)
  groups = model.stack if isinstance(model, LanguageModel.Config) else model.encoder
  return model.width, sum(len(g.pattern) * g.repeats for g in groups)


def _oddness(f: Family, s: Sized) -> float:
  """How far a shape is from the family's own."""
  hidden = 0.0 if f.hidden is None or s.hidden is None else abs(math.log(s.hidden / f.hidden(s.width)))
  return abs(math.log(s.width / s.layers / _aspect(f, s.width))) + hidden
