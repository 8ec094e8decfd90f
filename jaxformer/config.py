"""Experiments as data: frozen dataclasses, to and from JSON, changed by dotted path, hashed, and
found by name.

A part of an experiment (a layer, an optimizer, a data source) is described by a subclass of
`Config`. The *type* of a config says which part it is; there is no string that selects code. In
JSON the type stands under the key `type`:

    {"type": "Attention", "heads": 12, "rotary": {"type": "Rotary", "theta": 10000.0}}

This file knows no array library and imports nothing of the package.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar, cast, dataclass_transform


class InputError(ValueError):
  """The user's input cannot be used. The message names the field, the value and what would be
  accepted; the command line exits 2."""


def nearest(word: str, known: Iterable[str]) -> str:
  """'; did you mean a, b?' for the known words nearest to `word`, or the short list of all of them,
  or nothing."""
  known = sorted(set(known))
  close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
  if close:
    return f'; did you mean {", ".join(close)}?'
  return f'; known: {", ".join(known)}' if 0 < len(known) <= 24 else ''


_TYPES: dict[str, type[Config]] = {}
C = TypeVar('C', bound='Config')


@dataclass_transform(
  kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field,)
)
class Config:
  """Base of every config: subclasses become frozen, keyword-only dataclasses whose field types are
  checked on construction.

  A `Config` nested in the class that it configures takes that class's name as its `tag`; any other
  takes its own name. Pass `abstract=True` in the class statement for a type that only groups others
  and is never instantiated.

  `validate` may be overridden to check values; it raises `InputError`.
  """

  tag: ClassVar[str] = 'Config'
  __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]  # every subclass has them

  def __init_subclass__(cls, abstract: bool = False, **kwargs):
    super().__init_subclass__(**kwargs)
    if '__doc__' not in cls.__dict__:
      # else dataclass writes the whole signature there
      cls.__doc__ = f'The config of {cls.__qualname__}.'
    dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    cls.tag = cls.__qualname__.removesuffix('.Config').rsplit('.', 1)[-1]
    if abstract:
      return
    old = _TYPES.get(cls.tag)
    if old is not None and (old.__module__, old.__qualname__) != (cls.__module__, cls.__qualname__):
      raise TypeError(
        f'two configs share the tag {cls.tag!r}: {old.__module__}.{old.__qualname__} and '
        f'{cls.__module__}.{cls.__qualname__}'
      )
    _TYPES[cls.tag] = cls

  def __post_init__(self):
    for name, hint in hints(type(self)).items():
      object.__setattr__(self, name, _convert(getattr(self, name), hint, f'{self.tag}.{name}'))
    self.validate()

  def validate(self) -> None:
    """Checks values against each other; raises `InputError`."""

  def replace(self, **changes: Any) -> Self:
    """The same config with some fields changed."""
    return dataclasses.replace(self, **changes)

  def require(self, condition: bool, field: str, accepted: str) -> None:
    """Raises `InputError` naming `field`, its value and what is accepted, unless `condition`
    holds."""
    if not condition:
      raise InputError(f'{self.tag}.{field} = {getattr(self, field)!r}: must be {accepted}')


@functools.cache
def hints(cls: type[Config]) -> dict[str, Any]:
  """Field name -> evaluated type, in declaration order."""
  evaluated = typing.get_type_hints(cls)
  return {f.name: evaluated[f.name] for f in dataclasses.fields(cls)}


def config_type(tag: str, where: str = 'type', base: type[Config] = Config) -> type[Config]:
  """The config class registered under `tag`; the message about a typo names those that are a
  `base`."""
  if tag not in _TYPES:
    raise InputError(
      f'{where}: no config type {tag!r}{nearest(tag, (c.tag for c in types_of(base)))}'
    )
  return _TYPES[tag]


def types_of(base: type[C]) -> list[type[C]]:
  """All registered config types that are a `base`, by tag."""
  return [c for _, c in sorted(_TYPES.items()) if issubclass(c, base)]


# ---- values and their types --------------------------------------------------------------------


class _Text(str):
  """A value as typed on the command line: parsed by the type of the field that it lands in."""


_PLAIN = {
  int: 'a whole number',
  float: 'a number',
  bool: 'true or false',
  str: 'text',
  type(None): 'none',
}


def _describe(hint: Any) -> str:
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if hint in _PLAIN:
    return _PLAIN[hint]
  if origin is Literal:
    return ' or '.join(repr(a) for a in args)
  if origin in (typing.Union, types.UnionType):
    return ' or '.join(_describe(a) for a in args)
  if origin is tuple:
    return f'a list of {_describe(args[0])}'
  if isinstance(hint, type) and issubclass(hint, Config):
    return f'a config ({", ".join(sorted(t for t, c in _TYPES.items() if issubclass(c, hint))) or hint.__name__})'
  return getattr(hint, '__name__', str(hint))


def _parse(text: str, hint: Any, where: str) -> Any:
  """Command-line text as the plain value that `_convert` accepts for `hint`."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    if type(None) in args and text.lower() in ('none', 'null'):
      return None
    last = InputError(f'{where} = {text!r}: must be {_describe(hint)}')
    # A string accepts anything: try it last.
    for option in sorted((a for a in args if a is not type(None)), key=lambda a: a is str):
      try:
        return _convert(_Text(text), option, where)
      except InputError as e:
        last = e if len(args) <= 2 else last
    raise last
  if origin is tuple:
    if text.lstrip().startswith('['):
      return _json(text, where)
    if text.lower() == 'none' and _holds_config(args[0]):
      return []
    return [_Text(t) for t in text.split(',') if t]
  if isinstance(hint, type) and issubclass(hint, Config):
    return _json(text, where) if text.lstrip().startswith('{') else {'type': text}
  if hint is bool and text.lower() in ('true', 'yes', 'on', '1', 'false', 'no', 'off', '0'):
    return text.lower() in ('true', 'yes', 'on', '1')
  if hint in (int, float):
    plain = text.replace('_', '')
    for kind in (int, float):
      try:
        number = kind(plain)
      except ValueError:
        continue
      return (
        int(number) if hint is int and math.isfinite(number) and number == int(number) else number
      )
  return str(text)


def _json(text: str, where: str) -> Any:
  try:
    return json.loads(text)
  except json.JSONDecodeError as e:
    raise InputError(f'{where}: not valid JSON ({e}): {text!r}') from None


def _convert(value: Any, hint: Any, where: str) -> Any:
  """`value` as an instance of `hint`: lists become tuples, integers floats, objects with a `type`
  configs. Raises `InputError`."""
  if isinstance(value, _Text):
    value = _parse(str(value), hint, where)
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  wrong = InputError(f'{where} = {value!r}: must be {_describe(hint)}')
  if hint is Any:
    return value
  if hint is type(None) or hint is None:
    if value is not None:
      raise wrong
    return None
  if origin in (typing.Union, types.UnionType):
    error: InputError | None = None
    for option in args:
      try:
        return _convert(value, option, where)
      except InputError as e:
        # Of several mismatches the one from inside a matching config says most.
        inside = (
          isinstance(value, dict | Config)
          and option is not type(None)
          and typing.get_origin(option) is not Literal
        )
        error = e if inside else error
    raise error or wrong
  if origin is Literal:
    if value not in args:
      raise InputError(f'{wrong}{nearest(str(value), map(str, args)) if len(args) > 4 else ""}')
    return value
  if origin is tuple:
    if not isinstance(value, list | tuple):
      raise wrong
    if len(args) == 2 and args[1] is Ellipsis:
      return tuple(_convert(v, args[0], f'{where}.{i}') for i, v in enumerate(value))
    if len(value) != len(args):
      raise wrong
    return tuple(
      _convert(v, a, f'{where}.{i}') for i, (v, a) in enumerate(zip(value, args, strict=True))
    )
  if isinstance(hint, type) and issubclass(hint, Config):
    if isinstance(value, Mapping):
      value = from_json(value, where, hint)
    if not isinstance(value, hint):
      raise (
        wrong
        if not isinstance(value, Config)
        else InputError(f'{where} = {value.tag}: must be {_describe(hint)}')
      )
    return value
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if (isinstance(value, bool) and hint is not bool) or not isinstance(value, hint):
    raise wrong
  return value


# ---- JSON, text, hash --------------------------------------------------------------------------


def to_json(value: Any) -> Any:
  """A config (or a tuple or plain value inside one) as JSON data; every field is written, defaults
  included."""
  if isinstance(value, Config):
    return {'type': value.tag} | {
      f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)
    }
  if isinstance(value, tuple | list):
    return [to_json(v) for v in value]
  return value


def from_json(data: Any, where: str = '', base: type[Config] = Config) -> Config:
  """The config that `to_json` wrote. A field left out takes its default; an unknown one is an
  error. `base` serves messages."""
  if not isinstance(data, Mapping) or 'type' not in data:
    raise InputError(f'{where or "config"}: expected an object with a "type", found {data!r}')
  cls = config_type(str(data['type']), where or 'type', base)
  if not issubclass(cls, base):
    raise InputError(f'{where or "config"} = {cls.tag}: must be {_describe(base)}')
  known = hints(cls)
  for name in data:
    if name != 'type' and name not in known:
      raise InputError(
        f'{where or "config"}: {cls.tag} has no field {name!r}{nearest(name, known)}'
      )
  missing = [
    f.name
    for f in dataclasses.fields(cls)
    if f.name not in data and f.default is f.default_factory is dataclasses.MISSING
  ]
  if missing:
    raise InputError(f'{where or "config"}: {cls.tag} needs {", ".join(missing)}')
  return cls(
    **{
      name: _convert(v, known[name], f'{where}.{name}' if where else name)
      for name, v in data.items()
      if name != 'type'
    }
  )


def text(config: Config) -> str:
  """The canonical text of a config: what golden files, run folders and `digest` hold."""
  return json.dumps(to_json(config), indent=2, ensure_ascii=False) + '\n'


def digest(config: Config) -> str:
  """The first 16 hex digits of the SHA-256 of the canonical text."""
  return hashlib.sha256(text(config).encode()).hexdigest()[:16]


def differences(old: Any, new: Any, path: str = '') -> list[str]:
  """'path: old -> new' for every place where two JSON values differ."""
  if isinstance(old, dict) and isinstance(new, dict) and old.get('type') == new.get('type'):
    keys = [*old, *(k for k in new if k not in old)]
    return [
      d for k in keys for d in differences(old.get(k), new.get(k), f'{path}.{k}' if path else k)
    ]
  if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
    return [
      d
      for i, pair in enumerate(zip(old, new, strict=True))
      for d in differences(*pair, f'{path}.{i}')
    ]
  return [] if old == new else [f'{path}: {_short(old)} -> {_short(new)}']


def _short(value: Any) -> str:
  line = json.dumps(value)
  return line if len(line) <= 60 else f'{line[:57]}...'


# ---- overrides ---------------------------------------------------------------------------------


def override(config: C, assignments: Iterable[tuple[str, str]], root: str = '') -> C:
  """`config` with fields changed by dotted path, as the command line does: `[('model.width',
  '256'), ('optimizer', 'Lion')]`.

  A path names fields from the top down, list places by number. A name that is no field where it
  stands is looked for below: `model.heads` sets every `heads` inside `model`. A value is text,
  parsed by the field's type; for a field that holds a config it is the name of a config type (which
  then starts from its defaults) or JSON. All is checked together at the end, so the order of
  assignments that depend on each other does not matter. A `root` such as 'data' is the path of
  `config` itself: all paths begin with it.

  Raises `InputError` with the nearest names for a path that leads nowhere, and for values of a
  wrong type."""
  tree = to_json(config)
  for path, value in assignments:
    parts = path.replace('-', '_').split('.')
    below = parts[1:] if root else parts
    if root and parts[0] != root:
      raise InputError(f'--{path}: no such field{nearest(parts[0], [root])}')
    if not below:
      raise InputError(
        f'--{path}: a whole {config.tag} cannot be given; name a field of '
        f'it{nearest("", hints(type(config)))}'
      )
    if not _assign(tree, below, _Text(value)):
      raise InputError(f'--{path}: no such field{_instead(tree, below)}')
  return cast(C, from_json(tree, root))


def _assign(node: Any, parts: list[str], value: _Text) -> int:
  """Sets the place that `parts` names in JSON data, or every place that they name further down; how
  many were set."""
  head, rest = parts[0], parts[1:]
  if isinstance(node, list):
    if head.isdigit():
      if int(head) >= len(node):
        return 0
      if rest:
        return _assign(node[int(head)], rest, value)
      node[int(head)] = value
      return 1
    return sum(_assign(child, parts, value) for child in node)
  if not isinstance(node, dict) or 'type' not in node:
    return 0
  known = hints(config_type(node['type']))
  if head not in known:
    return sum(_assign(child, parts, value) for child in node.values())
  if rest:
    return _assign(node[head], rest, value) if head in node else 0
  tag = _tag_for(str(value), known[head])
  node[head] = value if tag is None else to_json_defaults(tag)
  return 1


def to_json_defaults(tag: str) -> dict[str, Any]:
  """A config type as JSON data with its defaults, the fields that have none left out."""
  fields = {
    f.name: f.default if f.default is not dataclasses.MISSING else f.default_factory
    for f in dataclasses.fields(_TYPES[tag])
  }
  return {'type': tag} | {
    k: to_json(v() if callable(v) else v) for k, v in fields.items() if v is not dataclasses.MISSING
  }


def _tag_for(name: str, hint: Any) -> str | None:
  """The tag of the config type that a name stands for where `hint` is expected; upper and lower
  case count the same."""
  options = (
    typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
  )
  bases = tuple(o for o in options if isinstance(o, type) and issubclass(o, Config))
  return (
    next(
      (t for t, cls in _TYPES.items() if issubclass(cls, bases) and t.lower() == name.lower()), None
    )
    if bases
    else None
  )


def _holds_config(hint: Any) -> bool:
  options = (
    typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
  )
  return any(isinstance(o, type) and issubclass(o, Config) for o in options)


def _instead(node: Any, parts: list[str]) -> str:
  """For the message about a path that leads nowhere: what is near the first part that does not
  fit."""
  for part in parts:
    place = int(part) if isinstance(node, list) and part.isdigit() else part
    inside = (
      place < len(node) if isinstance(place, int) else isinstance(node, dict) and place in node
    )
    if not inside:
      own = hints(config_type(node['type'])) if isinstance(node, dict) and 'type' in node else ()
      return nearest(part, _names(node)) or nearest(part, own)
    node = node[place]
    if not isinstance(node, dict | list):
      return f'; {part} is {json.dumps(node)}, which has no fields'
  return ''


def _names(node: Any) -> set[str]:
  """The field names at a place and below."""
  children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
  own = (
    set(hints(config_type(node['type']))) if isinstance(node, dict) and 'type' in node else set()
  )
  return own.union(*(_names(child) for child in children))


# ---- registry of names -------------------------------------------------------------------------

Named = TypeVar('Named')


class Registry(Generic[Named]):
  """Things by name, in the order in which they were added: presets, corpora, tasks."""

  def __init__(self, kind: str):
    self.kind = kind
    self._things: dict[str, Named] = {}

  def add(self, name: str, thing: Named) -> Named:
    if name in self._things:
      raise ValueError(f'{self.kind} {name!r} is already there')
    self._things[name] = thing
    return thing

  def __getitem__(self, name: str) -> Named:
    if name not in self._things:
      raise InputError(f'no {self.kind} named {name!r}{nearest(name, self._things)}')
    return self._things[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._things)

  def __len__(self) -> int:
    return len(self._things)
