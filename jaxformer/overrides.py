"""Changes of a config by dotted path, as the command line gives them."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterable
from typing import Any, cast

from jaxformer.config import (
  NOTHING,
  PACKAGE,
  C,
  CommandLineText,
  Config,
  InputError,
  config_bases,
  decode,
  field_default,
  hints,
  nearest,
  package_of,
  types_of,
  union_options,
)


@dataclasses.dataclass
class _Draft:
  """A config that is being changed: its type, and its fields as drafts, lists, values or text."""

  cls: type[Config]
  fields: dict[str, Any]

  @classmethod
  def of(cls, value: Any) -> Any:
    if isinstance(value, Config):
      known = hints(type(value))
      return cls(type(value), {name: cls.of(getattr(value, name)) for name in known})
    return [cls.of(v) for v in value] if isinstance(value, tuple) else value

  @classmethod
  def with_defaults(cls, kind: type[Config]) -> _Draft:
    defaults = {name: field_default(kind, name) for name in hints(kind)}
    return cls(kind, {k: cls.of(v) for k, v in defaults.items() if v is not NOTHING})


def _finish(draft: Any, hint: Any, where: str) -> Any:
  """The value of a draft. Raises `InputError`."""
  if isinstance(draft, _Draft):
    known = hints(draft.cls)
    if missing := [
      k for k in known if k not in draft.fields and field_default(draft.cls, k) is NOTHING
    ]:
      raise InputError(f'{where or "config"}: {draft.cls.tag} needs {", ".join(missing)}')
    path = f'{where}.' if where else ''
    return decode(
      draft.cls(**{k: _finish(v, known[k], f'{path}{k}') for k, v in draft.fields.items()}),
      hint,
      where,
    )
  if isinstance(draft, list):
    args = next(
      (typing.get_args(o) for o in union_options(hint) if typing.get_origin(o) is tuple), ()
    )
    kind = args[0] if len(args) == 2 and args[1] is Ellipsis else Any
    return decode([_finish(v, kind, f'{where}.{i}') for i, v in enumerate(draft)], hint, where)
  return decode(draft, hint, where)


@dataclasses.dataclass(frozen=True)
class _Place:
  """A field of a draft or an item of a list, found by a path."""

  owner: Any
  key: Any
  hint: Any
  exact: bool

  def set(self, value: Any) -> None:
    (self.owner.fields if isinstance(self.owner, _Draft) else self.owner)[self.key] = value


def _places(node: Any, parts: list[str], hint: Any, exact: bool = True) -> list[_Place]:
  """The places that a path names in a draft, or at any depth below where the first part is no
  field here."""
  head, rest = parts[0], parts[1:]
  if isinstance(node, list):
    args = next(
      (typing.get_args(o) for o in union_options(hint) if typing.get_origin(o) is tuple), ()
    )
    kind = args[0] if args else Any
    if head.isascii() and head.isdigit():
      if int(head) >= len(node):
        return []
      return (
        _places(node[int(head)], rest, kind, exact)
        if rest
        else [_Place(node, int(head), kind, exact)]
      )
    return [p for child in node for p in _places(child, parts, kind, False)]
  if not isinstance(node, _Draft):
    return []
  known = hints(node.cls)
  if head in known:
    if rest:
      return _places(node.fields.get(head), rest, known[head], exact)
    return [_Place(node, head, known[head], exact)]
  below = ((node.fields[name], known[name]) for name in known if name in node.fields)
  return [p for child, kind in below for p in _places(child, parts, kind, False)]


def override(config: C, assignments: Iterable[tuple[str, str]], root: str = '') -> C:
  """Return `config` with fields changed by dotted path, as the command line does:
  `[('model.width', '256'), ('optimizer', 'Lion')]`.

  A path names fields from the top down and items of lists by number. A field name that is not
  found at its level is applied to all nested configs that have it: `model.heads` sets every `heads`
  inside `model`. A value is text, decoded by the type of the field; for a field that holds a config
  it is the name of a config type, which then starts from its defaults, or JSON.

  The assignments are one set: types are applied first, then fields, general paths before exact
  ones, in whatever order they were given. If `root` is given, all paths begin with it.

  Raises `InputError` for an unknown path, with the nearest names; for a value of a wrong type; and
  for an assignment that another one would overwrite.
  """
  whole = _Draft.of(config)
  given = [
    (path, _parts(path, config, root), CommandLineText(value)) for path, value in assignments
  ]
  taken: dict[tuple[int, Any], tuple[str, str]] = {}
  fields = []
  for path, parts, value in sorted(given, key=lambda g: len(g[1])):
    places = _places(whole, parts, type(config))
    types_ = [(p, _type_for(value, p.hint)) for p in places]
    if places and all(kind is not None for _, kind in types_):
      for place, kind in types_:
        _claim(taken, place, path, str(value))
        place.set(_Draft.with_defaults(cast('type[Config]', kind)))
    else:
      fields.append((path, parts, value))
  for exact in (False, True):
    for path, parts, value in fields:
      places = _places(whole, parts, type(config))
      if not places:
        raise InputError(f'--{path}: no such field{_suggestion(whole, parts)}')
      for place in places:
        if place.exact is exact:
          if exact:
            _claim(taken, place, path, str(value))
          place.set(value)
  return cast(C, _finish(whole, type(config), root))


def _parts(path: str, config: Config, root: str) -> list[str]:
  parts = path.replace('-', '_').split('.')
  if root and parts[0] != root:
    raise InputError(f'--{path}: no such field{nearest(parts[0], [root])}')
  below = parts[1:] if root else parts
  if not below:
    known = nearest('', hints(type(config)))
    raise InputError(f'--{path}: {config.tag} is a config; set one of its fields{known}')
  return below


def _claim(taken: dict[tuple[int, Any], tuple[str, str]], place: _Place, path: str, value: str):
  """Note that an assignment sets a place. Raises `InputError` if another one set another value."""
  key = id(place.owner), place.key
  other, before = taken.setdefault(key, (path, value))
  if before != value:
    raise InputError(f'--{path} {value}: also given as --{other} {before}; give it once')


def _type_for(name: str, hint: Any) -> type[Config] | None:
  """The config type that a name stands for where `hint` is expected, or None."""
  bases = config_bases(hint)
  found = (c for b in bases for c in types_of(b) if c.tag.lower() == name.lower())
  ranked = sorted(found, key=lambda c: package_of(c) != PACKAGE)
  return ranked[0] if ranked else None


def _suggestion(node: Any, parts: list[str]) -> str:
  """What is near the first part of an unknown path, for its message."""
  for part in parts:
    if isinstance(node, list) and part.isdigit() and int(part) < len(node):
      node = node[int(part)]
    elif isinstance(node, _Draft) and part in node.fields:
      node = node.fields[part]
    else:
      own = hints(node.cls) if isinstance(node, _Draft) else ()
      return nearest(part, _names(node)) or nearest(part, own)
    if not isinstance(node, _Draft | list):
      return f'; {part} is {json.dumps(node)}, which has no fields'
  return ''


def _names(node: Any) -> set[str]:
  """The field names at a place and below."""
  if isinstance(node, list):
    return set().union(*(_names(child) for child in node))
  if not isinstance(node, _Draft):
    return set()
  return set(hints(node.cls)).union(*(_names(child) for child in node.fields.values()))
