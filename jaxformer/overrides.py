"""Changes of a config by dotted path, as the command line gives them."""

import contextlib
import typing
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from jaxformer.config import (
  NOTHING,
  C,
  CommandLineText,
  Config,
  InputError,
  accepted_by,
  config_bases,
  decode,
  field_default,
  find_type,
  from_json,
  hints,
  nearest,
  shown,
  type_in,
  union_options,
  whole,
)
from jaxformer.json_data import parse_json
from jaxformer.user_code import named_in_file


class Place(NamedTuple):
  """Where a path leads in a draft.

  Attributes:
    owner, key: the dictionary or list, and the key in it.
    hint: the type of what stands there.
    exact: whether the path names every level; otherwise the place was searched for.
    depth: levels above it.
  """

  owner: Any
  key: Any
  hint: Any
  exact: bool
  depth: int


def _draft(value: Any) -> Any:
  """Return a config as JSON data that can be changed, with classes as `type`."""
  if isinstance(value, Config):
    cls = type(value)
    return {'type': cls} | {name: _draft(getattr(value, name)) for name in hints(cls)}
  return [_draft(v) for v in value] if isinstance(value, tuple) else value


def _defaults(cls: type[Config]) -> dict[str, Any]:
  """Return the draft of a config of which nothing is given."""
  found = {name: field_default(cls, name) for name in hints(cls)}
  return {'type': cls} | {name: _draft(v) for name, v in found.items() if v is not NOTHING}


def _children(node: Any, hint: Any) -> dict[str, tuple[Any, Any, Any]]:
  """Return (key, value, type) by the name that a path gives them: of the fields of a config, of the
  items of a list, of nothing for other values."""
  if isinstance(node, dict):
    cls = node.get('type')
    known = hints(cls) if isinstance(cls, type) else {}
    return {name: (name, node.get(name), kind) for name, kind in known.items()}
  if not isinstance(node, list):
    return {}
  return {str(i): (i, value, _items(hint)) for i, value in enumerate(node)}


def _items(hint: Any) -> Any:
  """Return the type of the items where a list is expected."""
  items = (typing.get_args(o) for o in union_options(hint) if typing.get_origin(o) is tuple)
  return next(items, (Any,))[0]


def _places(
  node: Any, parts: list[str], hint: Any, exact: bool = True, depth: int = 0
) -> list[Place]:
  """Return the places that a path names in a draft, or at any depth below where the first part is
  no field here."""
  head, rest = parts[0], parts[1:]
  children, below = _children(node, hint), depth + 1
  if head in children:
    key, child, kind = children[head]
    if not rest:
      return [Place(node, key, kind, exact, depth)]
    return _places(child, rest, kind, exact, below)
  if whole(head) is not None:
    return []
  return [
    p for _, child, kind in children.values() for p in _places(child, parts, kind, False, below)
  ]


def override(config: C, assignments: Iterable[tuple[str, str]], root: str = '') -> C:
  """Return `config` with fields changed by dotted path, as the command line does:
  `[('model.width', '256'), ('optimizer', 'Lion')]`.

  A path names fields from the top down and items of lists by number. A field name that is not
  found at its level is applied to all nested configs that have it: `model.heads` sets every `heads`
  inside `model`. A value is text, decoded by the type of the field; for a field that holds a config
  it is the name of a config type, which then starts from its defaults, FILE.py:NAME for a type or
  a config of the user's own, or JSON.

  The assignments are one set: configs are applied first, one that holds others before these, then
  fields, general paths before exact ones, in whatever order they were given. If `root` is given,
  all paths begin with it.

  Raises `InputError` for an unknown path, with the nearest names; for a value of a wrong type; and
  for an assignment that another one would overwrite.
  """
  draft, kind = _draft(config), type(config)
  set_place = _Setter()
  given = [(path, _parts(path, config, root), CommandLineText(text)) for path, text in assignments]
  while True:
    found = []
    for i, (path, parts, text) in enumerate(given):
      places = _places(draft, parts, kind)
      values = [_named_config(path, text, p.hint) for p in places]
      if places and NOTHING not in values:
        found.append((max(p.depth for p in places), i, places, values))
    if not found:
      break
    _, i, places, values = min(found, key=lambda f: f[:2])
    path, _, text = given.pop(i)
    for place, value in zip(places, values, strict=True):
      set_place(place, path, text, value)
  for exact in (False, True):
    for path, parts, text in sorted(given, key=lambda g: len(g[1])):
      places = _places(draft, parts, kind)
      if exact and not places:
        raise InputError(f'--{path}: no such field{_suggestion(draft, parts, kind, root)}')
      for place in places:
        if place.exact is exact:
          set_place(place, path, text, text)
  return from_json(draft, root, kind)


class _Setter:
  """Sets places of a draft. Raises `InputError` where an assignment would overwrite another."""

  def __init__(self) -> None:
    self._taken: dict[tuple[int, Any, str], tuple[str, str, Any]] = {}

  def __call__(self, place: Place, path: str, text: str, value: Any) -> None:
    owner, key, _, exact, _ = place
    # A path that was searched for gives way to others, but is itself given once.
    if not exact and (id(owner), key, '') in self._taken:
      return
    searched = '' if exact else path.replace('-', '_')
    # with the owner, so that its id stays its own
    other, before, _ = self._taken.setdefault((id(owner), key, searched), (path, text, owner))
    if before != text:
      raise InputError(f'--{path} {text}: also given as --{other} {before}; give it once')
    owner[key] = value
    if value is not text and text.lstrip().startswith(('[', '{')):
      for inner, name in _named_in(value, parse_json(text)):
        self._taken[id(inner), name, ''] = path, text, inner


def _named_in(draft: Any, data: Any) -> Iterator[tuple[Any, Any]]:
  """Yield (owner, key) of each field in a draft that the JSON data it was made from name."""
  if isinstance(data, dict) and isinstance(draft, dict):
    for name, value in data.items():
      if name not in ('type', 'code'):
        yield draft, name
        yield from _named_in(draft[name], value)
  elif isinstance(data, list):
    for i, value in enumerate(data):
      yield draft, i
      yield from _named_in(draft[i], value)


def _parts(path: str, config: Config, root: str) -> list[str]:
  parts = path.replace('-', '_').split('.')
  if root and parts[0] != root:
    raise InputError(f'--{path}: no such field{nearest(parts[0], [root])}')
  below = parts[1:] if root else parts
  if not below:
    known = nearest('', hints(type(config)))
    raise InputError(f'--{path}: {config.tag} is a config; set one of its fields{known}')
  return below


def _named_config(path: str, text: str, hint: Any) -> Any:
  """Return the draft of what the text stands for at a path where `hint` is expected: a type's name,
  FILE.py:NAME, JSON of a config, or a list of these, or none in place of a config; `NOTHING` for
  other text. Raises `InputError` for a file's object of another kind."""
  bases, items = config_bases(hint), _items(hint)
  if not bases and not config_bases(items):
    return NOTHING
  if text.lower() in ('none', 'null') and type(None) in union_options(hint):
    return None
  if text.lower() == 'none' and not bases:
    return []
  if text.lstrip().startswith(('[', '{')):
    try:
      return _draft_of_json(parse_json(text), hint)
    except ValueError:  # which the decoder explains
      return NOTHING
  if not bases:
    found = [_named_config(path, t, items) for t in text.split(',') if t]
    return NOTHING if NOTHING in found else found
  if '.py:' in text:
    named = named_in_file(text)
  else:
    named = next((c for base in bases if (c := find_type(text, base))), NOTHING)
  if isinstance(named, type) and issubclass(named, bases):
    return _defaults(named)
  if named is not NOTHING and not isinstance(named, bases):
    raise InputError(path.replace('-', '_'), text, accepted_by(hint))
  return NOTHING if named is NOTHING else _draft(named)


def _draft_of_json(data: Any, hint: Any) -> Any:
  """Return the draft of JSON data; fields that they leave out have their defaults. Raises
  `InputError` for a type that does not exist or is not known where `hint` is expected."""
  if isinstance(data, list):
    return [_draft_of_json(value, _items(hint)) for value in data]
  bases = config_bases(hint)
  if not isinstance(data, dict) or not bases:
    return data
  cls = _type_in(data, bases)
  known = hints(cls)
  given = {n: v for n, v in data.items() if n not in ('type', 'code')}
  return _defaults(cls) | {n: _draft_of_json(v, known.get(n, Any)) for n, v in given.items()}


def _type_in(data: dict[str, Any], bases: tuple[type[Config], ...]) -> type[Config]:
  *first, last = bases
  for base in first:
    with contextlib.suppress(InputError):
      return type_in(data, '', base)
  return type_in(data, '', last)


def _suggestion(node: Any, parts: list[str], hint: Any, where: str) -> str:
  """Return what is near the first part of an unknown path, for its message. Raises `InputError`
  where the path leads through a value that is itself wrong."""
  for part in parts:
    children = _children(node, hint)
    if part not in children:
      return nearest(part, _names(node, hint)) or nearest(part, children)
    _, node, hint = children[part]
    where = f'{where}.{part}' if where else part
    if not isinstance(node, dict | list):
      decode(node, hint, where)
      return f'; {part} is {shown(node)}, which has no fields'
  return ''


def _names(node: Any, hint: Any) -> set[str]:
  """Return the field names at a place and below."""
  children = _children(node, hint)
  below = (_names(child, kind) for _, child, kind in children.values())
  return set(children if isinstance(node, dict) else ()).union(*below)
