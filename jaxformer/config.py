"""Experiments as data: frozen dataclasses, to and from JSON, changed by dotted path, and hashed.

A part of an experiment (a layer, an optimizer, a data source) is described by a subclass of
`Config`. The *type* of a config selects the part; no string in the code does. In JSON the type
stands under the key `type`:

    {"type": "Attention", "heads": 12, "rotary": {"type": "Rotary", "theta": 10000.0}}

A type from outside the package also has `code`, which says where it is defined:

    {"type": "Mixer", "code": {"module": "my_layer", "file": "/home/me/my_layer.py",
                               "sha256": "..."}}

This module needs no array library and imports only `code_record`, `json_data` and `local_files`
from the package.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import json
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, TypeVar, dataclass_transform

from jaxformer.code_record import code_of, contents, is_named, is_record, package_of, without_paths
from jaxformer.json_data import parse_json
from jaxformer.local_files import PACKAGE

NOTHING: Any = object()


class InputError(ValueError):
  """User input that cannot be used; the command line prints it and exits with code 2.

    InputError('training.steps', 0, 'positive')     training.steps = 0: must be positive
    InputError('data.path', 'x', problem='no such file')       data.path = 'x': no such file
    InputError('no run named x')                               a message without a field

  Attributes:
    field: the dotted path or the option; the whole message where there is no `value`.
    value: what was given.
    accepted: what would be accepted.
    problem: what is wrong, where that is not "must be `accepted`".
  """

  def __init__(self, field: str, value: Any = NOTHING, accepted: str = '', *, problem: str = ''):
    self.field, self.value, self.accepted = field, value, accepted
    self.problem = problem or (f'must be {accepted}' if accepted else '')
    given = '' if value is NOTHING else f' = {shown(value)}'
    message = f'{field}{given}: {self.problem}' if self.problem else f'{field}{given}'
    super().__init__('\n'.join(_shortened(line, 1000) for line in message.split('\n')))

  def under(self, path: str) -> InputError:
    """Return the same error with `path` before its field."""
    return InputError(f'{path}.{self.field}', self.value, self.accepted, problem=self.problem)


def shown(value: Any) -> str:
  """Return a value as a message shows it: its `repr`, shortened, whatever the value is."""
  try:
    return _shortened(repr(value), 200)
  except RecursionError:
    return f'{type(value).__name__} nested too deeply'
  except ValueError:  # an integer beyond the digits that Python writes
    return f'{type(value).__name__} with a number of thousands of digits'


def _shortened(line: str, limit: int) -> str:
  return line if len(line) <= limit else f'{line[: limit * 3 // 4]}...{line[-limit // 5 :]}'


def is_text(value: str) -> bool:
  """Return whether a string can be stored and passed on: UTF-8 without null characters."""
  return '\0' not in value and not any('\ud800' <= c <= '\udfff' for c in value)


def nearest(word: str, known: Iterable[str]) -> str:
  """Return '; did you mean a, b?' with the known words nearest to `word`.

  Where none is near: all of them if they are few, else nothing.
  """
  known = sorted(set(known))
  # no name is that long, and the time is quadratic
  close = difflib.get_close_matches(word, known, n=3, cutoff=0.6) if len(word) < 200 else []
  if close:
    return f'; did you mean {", ".join(close)}?'
  return f'; known: {", ".join(known)}' if 0 < len(known) <= 24 else ''


def first_lines(lines: Sequence[str], limit: int = 12) -> str:
  """Return the first lines, indented for a message, and how many more there are."""
  more = [f'and {len(lines) - limit} more'] if len(lines) > limit else []
  return '\n  '.join([*lines[:limit], *more])


def whole(text: str) -> int | None:
  """Return the number that up to 18 decimal digits stand for, None for any other text."""
  return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


# ---- config types ------------------------------------------------------------------------------

_TYPES: dict[str, list[type[Config]]] = {}
C = TypeVar('C', bound='Config')


@dataclass_transform(
  kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field,)
)
class Config:
  """Base of every config: subclasses become frozen, keyword-only dataclasses whose field types are
  checked on construction.

  A `Config` nested in the class that it configures takes that class's name as its `tag`; any other
  takes its own name. Tags are unique among the types of one base class in the package. Pass
  `abstract=True` in the class statement for a base class, which is never instantiated.

  `validate` may be overridden to check values; it raises `InputError`.
  """

  tag: ClassVar[str] = 'Config'
  # every subclass has them
  __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

  def __init_subclass__(cls, abstract: bool = False, **kwargs):
    super().__init_subclass__(**kwargs)
    if '__doc__' not in cls.__dict__:
      # else dataclass writes the whole signature there
      cls.__doc__ = f'The config of {cls.__qualname__}.'
    dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    cls.tag = cls.__qualname__.removesuffix('.Config').rsplit('.', 1)[-1]
    if abstract:
      return
    same = [c for c in _TYPES.get(cls.tag, []) if _identity(c) != _identity(cls)]
    for other in same:
      if _bases(cls) & _bases(other) and package_of(cls) == package_of(other):
        raise TypeError(
          f'two configs share the tag {cls.tag!r}: {".".join(_identity(other))} and '
          f'{".".join(_identity(cls))}'
        )
    _TYPES[cls.tag] = [*same, cls]

  def __post_init__(self):
    for name, hint in hints(type(self)).items():
      object.__setattr__(self, name, decode(getattr(self, name), hint, f'{self.tag}.{name}'))
    self.validate()

  def validate(self) -> None:
    """Check values against each other; raise `InputError`."""

  def replace(self, **changes: Any) -> Self:
    """Return the same config with some fields changed."""
    return dataclasses.replace(self, **changes)

  def require(self, condition: bool, field: str, accepted: str) -> None:
    """Raise `InputError` for `field` unless `condition` holds."""
    if not condition:
      raise InputError(f'{self.tag}.{field}', getattr(self, field), accepted)

  def require_positive(self, *fields: str) -> None:
    """Raise `InputError` for the first of `fields` that is neither None nor positive."""
    self._require_each(fields, lambda value: value > 0, 'positive')

  def require_not_negative(self, *fields: str) -> None:
    """Raise `InputError` for the first of `fields` that is neither None nor at least 0."""
    self._require_each(fields, lambda value: value >= 0, 'at least 0')

  def require_rate(self, *fields: str) -> None:
    """Raise `InputError` for the first of `fields` that is not in [0, 1): rates of dropout and the
    like."""
    self._require_each(fields, lambda value: 0 <= value < 1, 'at least 0 and below 1')

  def _require_each(self, fields: Iterable[str], holds: Callable[[Any], bool], accepted: str):
    for field in fields:
      value, optional = getattr(self, field), type(None) in union_options(hints(type(self))[field])
      self.require(
        value is None or holds(value), field, f'{accepted}, or none' if optional else accepted
      )


def _identity(cls: type) -> tuple[str, str]:
  return cls.__module__, cls.__qualname__


def _bases(cls: type) -> set[type]:
  return {b for b in cls.__mro__[1:] if issubclass(b, Config) and b is not Config}


@functools.cache
def hints(cls: type[Config]) -> dict[str, Any]:
  """Return field name -> evaluated type, in declaration order."""
  evaluated = typing.get_type_hints(cls)
  return {f.name: evaluated[f.name] for f in dataclasses.fields(cls)}


def forget(cls: type[Config]) -> None:
  """Remove a type from the registry, so that its name is free again."""
  _TYPES[cls.tag] = [c for c in _TYPES.get(cls.tag, []) if c is not cls]


def types_of(base: type[C]) -> list[type[C]]:
  """Return all registered types of a base class, by tag."""
  found = (c for _, same in sorted(_TYPES.items()) for c in same)
  return [c for c in found if issubclass(c, base)]


def find_type(tag: str, base: type[C]) -> type[C] | None:
  """Return the type named `tag`, in any case, among those of `base`: that of the package, or else
  the one that was defined last; None if there is none."""
  same = [c for c in types_of(base) if c.tag.lower() == tag.lower()]
  return max(same, key=lambda c: (package_of(c) == PACKAGE, same.index(c)), default=None)


def config_type(
  tag: str, where: str = 'type', base: type[Config] = Config, code: Mapping[str, Any] | None = None
) -> type[Config]:
  """Return the type named `tag` among those of `base`, in any case.

  With a record of `code` it is the type that was loaded last from a file of the same content or, if
  the user named another file for it, from there. Raises `InputError`.
  """
  if code is None:
    found = find_type(tag, base)
    problem = f'no such type{nearest(tag, (c.tag for c in types_of(base)))}'
  else:
    same = [c for c in types_of(base) if c.tag.lower() == tag.lower()]
    equal = [c for c in same if contents(code_of(c)) == contents(code)]
    fitting = equal or [c for c in same if is_named(c)]
    found = fitting[-1] if fitting else None
    file = code.get('file', f'module {code.get("module")}')
    problem = f'defined in {file}, which is not loaded; name the file with --code'
  if found is None:
    raise InputError(where, tag, problem=problem)
  return found


# ---- values and their types --------------------------------------------------------------------


class CommandLineText(str):
  """A value as typed on the command line: decoded by the type of the field that it is for."""


_PLAIN = {
  int: 'a whole number',
  float: 'a number',
  bool: 'true or false',
  str: 'text',
  type(None): 'none',
}
_SWITCHES = dict.fromkeys(('true', 'yes', 'on', '1'), True) | dict.fromkeys(
  ('false', 'no', 'off', '0'), False
)


def union_options(hint: Any) -> tuple[Any, ...]:
  """The members of a union, or the hint itself."""
  union = typing.get_origin(hint) in (typing.Union, types.UnionType)
  return typing.get_args(hint) if union else (hint,)


def _is_config(hint: Any) -> bool:
  return isinstance(hint, type) and issubclass(hint, Config)


def config_bases(hint: Any) -> tuple[type[Config], ...]:
  return tuple(o for o in union_options(hint) if _is_config(o))


def accepted_by(hint: Any) -> str:
  """Return what a field with a type hint accepts, in words."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if hint in _PLAIN:
    return _PLAIN[hint]
  if origin is Literal:
    return ' or '.join(repr(a) for a in args)
  if len(union_options(hint)) > 1:
    return ' or '.join(accepted_by(a) for a in args)
  if origin is tuple:
    return f'a list of {accepted_by(args[0])}'
  if _is_config(hint):
    return f'a config ({", ".join(c.tag for c in types_of(hint)) or hint.__name__})'
  return getattr(hint, '__name__', str(hint))


def _decode_text(text: str, hint: Any, where: str) -> Any:
  """Text of the command line as the plain value that `decode` accepts for `hint`."""
  if text.lstrip().startswith(('[', '{')) and (
    typing.get_origin(hint) is tuple or _is_config(hint)
  ):
    try:
      return parse_json(text)
    except ValueError as e:
      raise InputError(where, text, problem=f'not valid JSON ({e})') from None
  if typing.get_origin(hint) is tuple:
    if text.lower() == 'none' and config_bases(typing.get_args(hint)[0]):
      return []
    return [CommandLineText(t) for t in text.split(',') if t]
  if _is_config(hint):
    return {'type': text}
  if hint is type(None):
    return None if text.lower() in ('none', 'null') else text
  if hint is bool:
    return _SWITCHES.get(text.lower(), text)
  if hint in (int, float) and text.isascii():
    for kind in (int, float):
      with contextlib.suppress(ValueError):
        number = kind(text)
        return int(number) if hint is int and number % 1 == 0 else number
  return text


def decode(value: Any, hint: Any, where: str) -> Any:
  """`value` as an instance of `hint`: lists become tuples, integers floats, objects with a `type`
  configs, text what the hint says. Raises `InputError`."""
  if hint is Any:
    return value
  if len(union_options(hint)) > 1:
    return _decode_union(value, hint, where)
  if isinstance(value, CommandLineText):
    value = _decode_text(str(value), hint, where)
  wrong = InputError(where, getattr(value, 'tag', value), accepted_by(hint))
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin is Literal:
    if value not in args:
      known = nearest(str(value), map(str, args)) if len(args) > 4 else ''
      raise InputError(where, value, f'{accepted_by(hint)}{known}')
    return value
  if origin is tuple:
    if not isinstance(value, list | tuple):
      raise wrong
    kinds = (args[0],) * len(value) if len(args) == 2 and args[1] is Ellipsis else args
    if len(value) != len(kinds):
      raise wrong
    return tuple(decode(v, k, f'{where}.{i}') for i, (v, k) in enumerate(zip(value, kinds)))
  if _is_config(hint) and isinstance(value, Mapping):
    return from_json(value, where, hint)
  kind = (int, float) if hint is float else hint
  if (isinstance(value, bool) and hint is not bool) or not isinstance(value, kind):
    raise wrong
  if hint is str and not is_text(value):
    raise InputError(where, value, 'text in UTF-8 without null characters')
  if hint is int and not -(2**63) <= value < 2**63:
    raise InputError(where, value, 'a whole number of 64 bits')
  if hint is float and not abs(value) < 2.0**1023:
    raise InputError(where, value, 'a finite number')
  return float(value) if hint is float else value


def _decode_union(value: Any, hint: Any, where: str) -> Any:
  # Text accepts anything, so it is tried last; none may also be the name of something else.
  options = sorted(union_options(hint), key=lambda o: (o is str, o is not type(None)))
  kept: InputError | None = None
  for option in options:
    try:
      return decode(value, option, where)
    except InputError as e:
      # Of several mismatches that of the option with the structure of the value says most.
      same = (isinstance(value, Mapping | Config) and _is_config(option)) or (
        isinstance(value, list | tuple) and typing.get_origin(option) is tuple
      )
      only = isinstance(value, CommandLineText) and len(options) == 2 and option is not type(None)
      kept = e if same or only else kept
  raise kept or InputError(where, getattr(value, 'tag', value), accepted_by(hint))


# ---- JSON, text, hash --------------------------------------------------------------------------


def to_json(value: Any) -> Any:
  """Return a config (or a tuple or plain value inside one) as JSON data, all fields written."""
  if isinstance(value, Config):
    code = code_of(type(value))
    fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return {'type': value.tag} | ({} if code is None else {'code': code}) | fields
  if isinstance(value, tuple | list):
    return [to_json(v) for v in value]
  return value


def type_in(data: Any, where: str, base: type[C]) -> type[C]:
  """Return the type that JSON data of a config name. Raises `InputError` where it is no `base`."""
  cls = data.get('type') if isinstance(data, Mapping) else None
  if isinstance(cls, str):
    code = data.get('code')
    if code is not None and not is_record(code):
      raise InputError(
        f'{where}.code' if where else 'code', code, 'a record {module, file, sha256, files}'
      )
    cls = config_type(cls, where or 'type', base, code)
  if not isinstance(cls, type) or not issubclass(cls, base):
    raise InputError(f'{where or "config"}: expected an object with a "type", found {shown(data)}')
  return cls


def from_json(data: Any, where: str = '', base: type[Config] = Config) -> Any:
  """Return the config that `to_json` wrote, a `base`. As `type` the class itself may stand for its
  name.

  A field that is left out takes its default. Raises `InputError` for an unknown field, a missing
  one, or a value of a wrong type.
  """
  cls = type_in(data, where, base)
  known = hints(cls)
  given = {k: v for k, v in data.items() if k not in ('type', 'code')}
  for name in given:
    if name not in known:
      raise InputError(
        f'{where or "config"}: {cls.tag} has no field {name!r}{nearest(name, known)}'
      )
  if missing := [
    name for name in known if name not in given and field_default(cls, name) is NOTHING
  ]:
    raise InputError(f'{where or "config"}: {cls.tag} needs {", ".join(missing)}')
  path = f'{where}.' if where else ''
  return cls(**{name: decode(v, known[name], f'{path}{name}') for name, v in given.items()})


def whole_numbers(value: Any, path: str = '') -> Iterator[tuple[str, int]]:
  """Yield the dotted path and the value of each integer in a config."""
  if isinstance(value, Config):
    for name in hints(type(value)):
      yield from whole_numbers(getattr(value, name), f'{path or value.tag}.{name}')
  elif isinstance(value, tuple):
    for i, inner in enumerate(value):
      yield from whole_numbers(inner, f'{path}.{i}')
  elif isinstance(value, int) and not isinstance(value, bool):
    yield path, value


def field_default(cls: type[Config], name: str) -> Any:
  """The default of a field, `NOTHING` where it has none."""
  f = cls.__dataclass_fields__[name]
  if f.default is not dataclasses.MISSING:
    return f.default
  return NOTHING if f.default_factory is dataclasses.MISSING else f.default_factory()


def text(config: Config) -> str:
  """Return the canonical text of a config: what golden files and run folders hold."""
  return json_text(to_json(config))


def json_text(data: Any) -> str:
  """Return the canonical text of JSON data."""
  return json.dumps(data, indent=2, ensure_ascii=False) + '\n'


def digest(config: Config) -> str:
  """Return 16 hex digits of the SHA-256 of the canonical text.

  Of the code of users the content counts, not where the file is.
  """
  return hashlib.sha256(json_text(without_paths(to_json(config))).encode()).hexdigest()[:16]


def filled(data: Any, complete: Any) -> Any:
  """Return JSON data of a config with the fields that it leaves out, taken from `complete`: the
  JSON data of the same config with all fields."""
  if isinstance(data, list):
    return [filled(*pair) for pair in zip(data, complete, strict=True)]
  if not isinstance(data, dict):
    return data
  return complete | {k: v if k == 'code' else filled(v, complete[k]) for k, v in data.items()}


def differences(old: Any, new: Any) -> list[str]:
  """Return 'path: old -> new' for every place where two JSON values differ."""
  return [difference(*change) for change in changes(old, new)]


def difference(path: str, old: Any, new: Any) -> str:
  """Return a place where two JSON values differ in words."""
  return f'{path}: {_short(old)} -> {_short(new)}'


def changes(old: Any, new: Any, path: str = '') -> list[tuple[str, Any, Any]]:
  """Return (path, old, new) for every place where two JSON values differ."""
  if isinstance(old, dict) and isinstance(new, dict) and old.get('type') == new.get('type'):
    keys = [*old, *(k for k in new if k not in old)]
    pairs = [(k, old.get(k), new.get(k)) for k in keys]
  elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
    pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
  else:
    return [] if old == new else [(path, old, new)]
  return [c for k, a, b in pairs for c in changes(a, b, f'{path}.{k}' if path else k)]


def _short(value: Any) -> str:
  line = json.dumps(value)
  return line if len(line) <= 60 else f'{line[:57]}...'


# ---- registry of names -------------------------------------------------------------------------

Named = TypeVar('Named')


class Registry(dict[str, Named]):
  """Values by name, in the order in which they were added: presets, families, studies."""

  def __init__(self, kind: str):
    super().__init__()
    self.kind = kind

  def add(self, name: str, value: Named) -> Named:
    if name in self:
      raise ValueError(f'{self.kind} {name!r} is already there')
    self[name] = value
    return value

  def __missing__(self, name: str) -> Named:
    raise InputError(f'no {self.kind} named {name!r}{nearest(name, self)}')
