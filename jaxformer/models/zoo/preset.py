"""What a zoo entry is."""

from __future__ import annotations

import dataclasses

from jaxformer.config import Registry
from jaxformer.models.language_model import ModelConfig


@dataclasses.dataclass(frozen=True)
class Preset:
  """A named architecture.

  Attributes:
    name: as published.
    family: models of one family share their blocks; each family has a `FAMILY-tiny` that trains on a CPU in a minute.
    model: the architecture.
  """

  name: str
  family: str
  model: ModelConfig


PRESETS: Registry[Preset] = Registry('preset')


def preset(name: str, family: str, model: ModelConfig) -> None:
  """Registers an architecture under its name."""
  PRESETS.add(name, Preset(name, family, model))
