"""Changes of a config by dotted path, as the command line gives them."""

import typing
from collections.abc import Iterable
from typing import Any

from jaxformer.config import (
  NOTHING,
  C,
  CommandLineText,
  Config,
  InputError,
  accepted_by,
  config_bases,
  field_default,
  find_type,
  from_json,
  hints,
  nearest,
  shown,
  union_options,
  whole,
)
from jaxformer.user_code import named_in_file

Place = tuple[Any, Any, Any, bool]
"""Where a path leads in a draft: the dictionary or list, the key in it, the type of what stands
there, and whether the path names every level (otherwise the place was searched for)."""


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
    return {name: (name, node.get(name), kind) for name, kind in hints(node['type']).items()}
  if not isinstance(node, list):
    return {}
  items = (typing.get_args(o) for o in union_options(hint) if typing.get_origin(o) is tuple)
  kind = next(items, (Any,))[0]
  return {str(i): (i, value, kind) for i, value in enumerate(node)}


def _places(node: Any, parts: list[str], hint: Any, exact: bool = True) -> list[Place]:
  """Return the places that a path names in a draft, or at any depth below where the first part is
  no field here."""
  head, rest = parts[0], parts[1:]
  children = _children(node, hint)
  if head in children:
    key, child, kind = children[head]
    return _places(child, rest, kind, exact) if rest else [(node, key, kind, exact)]
  if whole(head) is not None:
    return []
  return [p for _, child, kind in children.values() for p in _places(child, parts, kind, False)]


def override(config: C, assignments: Iterable[tuple[str, str]], root: str = '') -> C:
  """Return `config` with fields changed by dotted path, as the command line does:
  `[('model.width', '256'), ('optimizer', 'Lion')]`.

  A path names fields from the top down and items of lists by number. A field name that is not
  found at its level is applied to all nested configs that have it: `model.heads` sets every `heads`
  inside `model`. A value is text, decoded by the type of the field; for a field that holds a config
  it is the name of a config type, which then starts from its defaults, FILE.py:NAME for a type or
  a config of the user's own, or JSON.

  The assignments are one set: types are applied first, then fields, general paths before exact
  ones, in whatever order they were given. If `root` is given, all paths begin with it.

  Raises `InputError` for an unknown path, with the nearest names; for a value of a wrong type; and
  for an assignment that another one would overwrite.
  """
  draft, kind = _draft(config), type(config)
  taken: dict[tuple[int, Any, str], tuple[str, str]] = {}

  def set_place(place: Place, path: str, text: str, value: Any) -> None:
    owner, key, _, exact = place
    # A path that was searched for gives way to others, but is itself given once.
    searched = '' if exact or value is not text else path.replace('-', '_')
    other, before = taken.setdefault((id(owner), key, searched), (path, text))
    if before != text:
      raise InputError(f'--{path} {text}: also given as --{other} {before}; give it once')
    owner[key] = value

  given = [(path, _parts(path, config, root), CommandLineText(text)) for path, text in assignments]
  fields = []
  for path, parts, text in sorted(given, key=lambda g: len(g[1])):
    places = _places(draft, parts, kind)
    configs = [_named_config(path, text, hint) for _, _, hint, _ in places]
    if places and None not in configs:
      for place, chosen in zip(places, configs, strict=True):
        set_place(place, path, text, chosen)
    else:
      fields.append((path, parts, text))
  for exact in (False, True):
    for path, parts, text in fields:
      places = _places(draft, parts, kind)
      if not places:
        raise InputError(f'--{path}: no such field{_suggestion(draft, parts, kind)}')
      for place in places:
        if place[-1] is exact:
          set_place(place, path, text, text)
  return from_json(draft, root, kind)


def _parts(path: str, config: Config, root: str) -> list[str]:
  parts = path.replace('-', '_').split('.')
  if root and parts[0] != root:
    raise InputError(f'--{path}: no such field{nearest(parts[0], [root])}')
  below = parts[1:] if root else parts
  if not below:
    known = nearest('', hints(type(config)))
    raise InputError(f'--{path}: {config.tag} is a config; set one of its fields{known}')
  return below


def _named_config(path: str, name: str, hint: Any) -> Any:
  """Return the draft of what a type's name, or FILE.py:NAME, stands for at a path where `hint` is
  expected; None for a value that names no config. Raises `InputError` for a file's object of
  another kind."""
  bases = config_bases(hint)
  if bases and '.py:' in name:
    found = named_in_file(name)
  else:
    found = next((c for base in bases if (c := find_type(name, base))), None)
  if isinstance(found, type) and issubclass(found, bases):
    return _defaults(found)
  if found is not None and not isinstance(found, bases):
    raise InputError(path.replace('-', '_'), name, accepted_by(hint))
  return None if found is None else _draft(found)


def _suggestion(node: Any, parts: list[str], hint: Any) -> str:
  """Return what is near the first part of an unknown path, for its message."""
  for part in parts:
    children = _children(node, hint)
    if part not in children:
      return nearest(part, _names(node, hint)) or nearest(part, children)
    _, node, hint = children[part]
    if not isinstance(node, dict | list):
      return f'; {part} is {shown(node)}, which has no fields'
  return ''


def _names(node: Any, hint: Any) -> set[str]:
  """Return the field names at a place and below."""
  children = _children(node, hint)
  below = (_names(child, kind) for _, child, kind in children.values())
  return set(children if isinstance(node, dict) else ()).union(*below)
