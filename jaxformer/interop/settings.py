"""Typed access to another library's `config.json`: every field that affects the function is either
used or refused, never ignored."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from jaxformer.config import Config, InputError
from jaxformer.layers.mlp import ActivationName

T = TypeVar('T')
_NEEDED = object()
_KINDS: dict[type, str] = {
  int: 'an integer',
  float: 'a number',
  bool: 'true or false',
  str: 'a string',
  dict: 'an object',
  list: 'a list',
}
Table = Mapping[str, tuple[str, Any]]
"""Our field of a config -> (their field, its default in their library, or its type where it has
none), read in both directions."""


def written(config: Config, table: Table) -> dict[str, Any]:
  """Their fields, with the values of ours."""
  return {theirs: getattr(config, ours) for ours, (theirs, _) in table.items()}


def inverse(value: float, forward: Callable[[float], float], guess: float) -> float:
  """Return the number near `guess` of which `forward` makes exactly `value`, so that what is
  written and read again is equal; `guess` if there is none."""
  near = [guess, math.nextafter(guess, math.inf), math.nextafter(guess, -math.inf)]
  return next((x for x in near if forward(x) == value), guess)


def factor(value: float) -> float | None:
  """Their constant factor as a setting of ours, which is None for 1."""
  return None if value == 1.0 else value


class Settings:
  """The fields of a `config.json`, with type checks. Every message starts with `where`.

  Attributes:
    read_names: the names of fields that were read.
  """

  def __init__(self, fields: Mapping[str, Any], where: str = 'config.json'):
    self.fields, self.where = fields, where
    self.read_names: set[str] = set()

  def with_defaults(self, defaults: Mapping[str, Any], *nullable: str) -> 'Settings':
    """Return these fields with defaults for those that are missing or, except for `nullable`, null;
    what is read of the one counts as read of the other."""
    given = {
      k: v for k, v in self.fields.items() if v is not None or k not in defaults or k in nullable
    }
    found = Settings({**defaults, **given}, self.where)
    found.read_names = self.read_names
    return found

  def unread(self) -> list[str]:
    """Return the names of fields with a value that was not read."""
    return [k for k, v in self.fields.items() if v is not None and k not in self.read_names]

  def value(self, name: str, default: Any = None) -> Any:
    """Return the field as it stands in the file; `default` if it is missing."""
    self.read_names.add(name)
    return self.fields.get(name, default)

  def fail(self, name: str, accepted: str) -> InputError:
    """The error for an unsupported value."""
    return InputError(f'{self.where}: {name}', self.fields.get(name), accepted)

  def get(self, name: str, kind: type[T], default: Any = _NEEDED) -> T:
    """The field as `kind`; `default`, that of the other library, if it is missing or null."""
    value = self.value(name)
    if value is None:
      if default is _NEEDED:
        raise InputError(f'{self.where}: {name}', problem='is missing')
      return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
      value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
      raise self.fail(name, _KINDS[kind])
    return value

  def count(self, name: str, default: Any = _NEEDED) -> int:
    """A positive integer."""
    value = self.get(name, int, default)
    if value is not None and value < 1:
      raise self.fail(name, 'positive')
    return value

  def positive(self, name: str, default: Any = _NEEDED) -> float:
    """A positive and finite number."""
    value = self.get(name, float, default)
    if not 0 < value < math.inf:
      raise self.fail(name, 'positive and finite')
    return value

  def read(self, table: Table) -> dict[str, Any]:
    """Our fields, with the values of theirs; integers are positive."""
    values = {}
    for ours, (theirs, default) in table.items():
      kind, default = (default, _NEEDED) if isinstance(default, type) else (type(default), default)
      values[ours] = self.count(theirs, default) if kind is int else self.get(theirs, kind, default)
    return values

  def only(self, name: str, *accepted: Any) -> None:
    """Raise `InputError` unless the value is one of `accepted`; the first is the default."""
    if self.value(name, accepted[0]) not in accepted:
      raise self.fail(name, ' or '.join(repr(a) for a in accepted))

  def choose(self, name: str, values: Mapping[str, T], default: str) -> T:
    """The entry of `values` for the field's text."""
    text = self.get(name, str, default)
    if text not in values:
      raise self.fail(name, 'one of ' + ', '.join(values))
    return values[text]


ACTIVATIONS: dict[str, ActivationName] = {
  'gelu': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'gelu_fast': 'gelu_tanh',
  'quick_gelu': 'gelu_sigmoid',
  'relu': 'relu',
  'relu2': 'squared_relu',
  'silu': 'silu',
  'swish': 'silu',
  'sigmoid': 'sigmoid',
  'tanh': 'tanh',
  'linear': 'identity',
}
"""Their name of an activation -> ours. Of several names, the first is written."""


def activation_name(ours: str) -> str:
  """Their name of an activation of ours."""
  return next(theirs for theirs, name in ACTIVATIONS.items() if name == ours)
