"""What a zoo entry is."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol

from jaxformer.config import InputError, Registry
from jaxformer.models.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class Preset:
  """A named architecture.

  Attributes:
    name: as published.
    family: models of one family share their blocks; each family has a `FAMILY-tiny` that trains on
      a CPU in a minute.
    model: the architecture.
  """

  name: str
  family: str
  model: ModelConfig


PRESETS: Registry[Preset] = Registry('preset')


class Make(Protocol):
  """The model of a family at a size. `hidden` are the units of its feed-forward layers."""

  def __call__(
    self, *, width: int, layers: int, hidden: int, vocab_size: int, context_length: int
  ) -> ModelConfig: ...


class MakePairs(Protocol):
  """The same of an encoder-decoder, which has a vocabulary of its sources besides. `layers` are
  those of either side."""

  def __call__(
    self,
    *,
    width: int,
    layers: int,
    hidden: int,
    source_vocab_size: int,
    vocab_size: int,
    context_length: int,
  ) -> ModelConfig: ...


@dataclasses.dataclass(frozen=True)
class Family:
  """How a family grows: what a comparison may choose to give it the size of others.

  Attributes:
    name: of the family.
    make: its model at a size.
    width_step: widths are multiples of it (of a head, where the heads make up the width).
    layer_step: layers are multiples of it (of the pattern).
    hidden: units of a feed-forward layer (of recurrences that are not as wide as the embedding, of
      those) for a width, as the authors choose them; None for a family without such layers.
    grows_deeper: whether it may have other numbers of layers; False where their number is the
      design.
    fewest_layers: that it can have.
    of_pairs: whether it reads pairs of a source and a target; `make` then takes the vocabulary of
      the sources too.
  """

  name: str
  make: Make | MakePairs
  width_step: int = 8
  layer_step: int = 1
  hidden: Callable[[int], int] | None = None
  grows_deeper: bool = True
  fewest_layers: int = 1
  of_pairs: bool = False

  def maker(self, source_vocab_size: int | None = None) -> Callable[..., ModelConfig]:
    """`make` for data whose sources have a vocabulary of this size, None for data that are no
    pairs. Raises `InputError` where the family reads other data."""
    make: Callable[..., ModelConfig] = self.make
    if self.of_pairs == (source_vocab_size is not None):
      return functools.partial(make, source_vocab_size=source_vocab_size) if self.of_pairs else make
    able = ', '.join(n for n in FAMILIES if FAMILIES[n].of_pairs != self.of_pairs)
    mine, theirs = 'pairs of a source and a target', 'one sequence after the other'
    mine, theirs = (mine, theirs) if self.of_pairs else (theirs, mine)
    raise InputError(
      f'family {self.name}: reads {mine}, and the data are {theirs}, which {able} read'
    )


FAMILIES: Registry[Family] = Registry('family')


def family(
  name: str,
  make: Make,
  *,
  width_step: int = 8,
  layer_step: int = 1,
  hidden: Callable[[int], int] | None = None,
  grows_deeper: bool = True,
) -> None:
  """Registers how a family grows."""
  FAMILIES.add(name, Family(name, make, width_step, layer_step, hidden, grows_deeper))


def pair_family(
  name: str,
  make: MakePairs,
  *,
  hidden: Callable[[int], int],
  width_step: int = 8,
  grows_deeper: bool = True,
  fewest_layers: int = 1,
) -> None:
  """Registers how a family of encoder-decoders grows."""
  FAMILIES.add(
    name, Family(name, make, width_step, 1, hidden, grows_deeper, fewest_layers, of_pairs=True)
  )


def as_wide(width: int) -> int:
  """Units of recurrences as wide as the embedding."""
  return width


HEAD = 32  # width of a head in models of a comparison, and so the step of their widths


def four_times(width: int) -> int:
  """Hidden units of an ungated feed-forward layer (Vaswani et al. 2017)."""
  return 4 * width


def two_thirds(width: int) -> int:
  """Hidden units of a gated layer with the parameters of an ungated one of 4 D: 8/3 D (Shazeer
  2020), in multiples of 8."""
  return round(width / 3) * 8


def preset(name: str, family: str, model: ModelConfig) -> None:
  """Registers an architecture under its name."""
  PRESETS.add(name, Preset(name, family, model))
