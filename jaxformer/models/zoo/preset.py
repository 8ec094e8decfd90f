"""Zoo entries: presets and families."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from jaxformer.config import InputError, Registry
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.norm import NormConfig
from jaxformer.models.block import pre_norm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.model import ModelConfig
from jaxformer.models.stack import Group


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


Make = Callable[..., ModelConfig]
"""The model of a family at a size, by keyword: `width`, `layers` (of an encoder-decoder, on each
side), `hidden` units where the family has them, `vocab_size`, `context_length`, and for a family
of pairs `source_vocab_size`."""


@dataclasses.dataclass(frozen=True)
class Family:
  """How a family scales: what a comparison may choose to give it the size of others.

  Attributes:
    name: of the family.
    make: its model at a size.
    width_step: widths are multiples of it (of a head, where the heads make up the width).
    layer_step: numbers of layers are multiples of it (of the pattern).
    hidden: hidden units for a width, as the authors choose them: of feed-forward layers, or of
      recurrences that are not as wide as the embedding; None for a family without such layers.
    grows_deeper: whether the number of layers may change; False where it is part of the design.
    fewest_layers: the minimum number of layers.
    of_pairs: whether the family reads source-target pairs; `make` then takes the vocabulary size
      of the sources too.
  """

  name: str
  make: Make
  width_step: int = 8
  layer_step: int = 1
  hidden: Callable[[int], int] | None = None
  grows_deeper: bool = True
  fewest_layers: int = 1
  of_pairs: bool = False

  def maker(self, source_vocab_size: int | None = None) -> Make:
    """Return `make` for data with this source vocabulary size; None for data other than pairs.
    Raises `InputError` where the family reads other data."""
    make = self.make
    if self.of_pairs == (source_vocab_size is not None):
      return functools.partial(make, source_vocab_size=source_vocab_size) if self.of_pairs else make
    able = ', '.join(n for n in FAMILIES if FAMILIES[n].of_pairs != self.of_pairs)
    kinds = 'single sequences', 'source-target pairs'
    raise InputError(
      f'family {self.name}: needs {kinds[self.of_pairs]}, but the data are '
      f'{kinds[not self.of_pairs]}; families that fit: {able}'
    )


FAMILIES: Registry[Family] = Registry('family')


def family(name: str, make: Make, **settings: Any) -> None:
  """Register how a family scales; `settings` are fields of `Family`."""
  FAMILIES.add(name, Family(name, make, **settings))


def as_wide(width: int) -> int:
  """Recurrences as wide as the embedding."""
  return width


TINY: dict[str, Any] = {'vocab_size': 264, 'context_length': 256}  # of the `FAMILY-tiny`: bytes
HEAD = 32  # smallest head dimension in models of a comparison, so the step of their widths


def heads_for(width: int, queries_per_key: int = 1) -> int:
  """The number of heads for a width: of dimension 128 from a width of 2,048 on, as in the large
  published models, 64 from 512 on, 32 below; smaller where these, in groups of `queries_per_key`,
  do not fill the width."""
  sizes = (size for size, least in ((128, 2048), (64, 512)) if width >= least)
  return width // next((s for s in sizes if width % (queries_per_key * s) == 0), HEAD)


def four_times(width: int) -> int:
  """Hidden units of an ungated feed-forward layer (Vaswani et al. 2017)."""
  return 4 * width


def two_thirds(width: int) -> int:
  """Hidden units of a gated layer with the parameters of an ungated one of 4 D: 8/3 D (Shazeer
  2020), in multiples of 8."""
  return round(width / 3) * 8


def pre_norm_model(
  width: int,
  layers: int,
  *blocks: tuple[LayerConfig, ...],
  norm: NormConfig,
  dropout: float = 0.0,
  **fields: Any,
) -> LanguageModel.Config:
  """Return a language model of `layers` pre-norm blocks with the same norm before the head.

  Args:
    blocks: the layers of each block of a period.
    dropout: of the embedding and of every branch.
    fields: others of the config.
  """
  pattern = tuple(pre_norm(norm, *parts, dropout=dropout) for parts in blocks)
  return LanguageModel.Config(
    width=width,
    stack=(Group(pattern=pattern, repeats=layers // len(pattern)),),
    final_norm=norm,
    dropout=dropout,
    **fields,
  )


def preset(name: str, family: str, model: ModelConfig) -> None:
  """Register an architecture under its name."""
  PRESETS.add(name, Preset(name, family, model))
