"""What the data of a published recipe lack, and what may be given in its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from jaxformer.config import InputError


class Missing(NamedTuple):
  """A corpus or a tokenizer that an experiment names and that is not part of the package.

  Attributes:
    what: its name, for people.
    instead: the type that usually takes its place, a config with a `path`.
    path: an example of that path.
  """

  what: str
  instead: str
  path: str

  def options(self, field: str) -> str:
    """Return the options of the command line that give something in its place."""
    return f'--{field} {self.instead} --{field}.path {self.path}'


class Part(Protocol):
  """A corpus or a tokenizer."""

  def missing(self) -> Missing | None: ...


def missing_of(**parts: Part | None) -> dict[str, Missing]:
  """Return what is missing among the parts of a data set, by their fields."""
  found = ((field, part.missing()) for field, part in parts.items() if part is not None)
  return {field: missing for field, missing in found if missing is not None}


def check_given(missing: Mapping[str, Missing]) -> None:
  """Raise `InputError` if something is missing: it names all that is, by field of the data, and the
  options that give it."""
  if not missing:
    return
  named = {f'data.{field.replace("_", "-")}': m for field, m in missing.items()}
  (field, first), *others = named.items()
  also = ''.join(f', and {name} ({m.what})' for name, m in others)
  options = ' '.join(m.options(name) for name, m in named.items())
  raise InputError(
    field, first.what, problem=f'not part of jaxformer; give it{also}, for example {options}'
  )
