"""Rotary positions in `config.json`: `rope_parameters` (transformers 5), or `rope_theta` and
`rope_scaling` (before)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxformer.interop.family import part
from jaxformer.interop.settings import Settings, Table, written
from jaxformer.layers.attention import Attention
from jaxformer.layers.position import (
  DynamicScaling,
  LinearScaling,
  Llama3Scaling,
  Rotary,
  RotaryScaling,
  YarnScaling,
)

FACTOR: Table = {'factor': ('factor', float)}
LLAMA3: Table = FACTOR | {
  'low': ('low_freq_factor', float),
  'high': ('high_freq_factor', float),
  'original_context': ('original_max_position_embeddings', int),
}
YARN: Table = FACTOR | {
  'original_context': ('original_max_position_embeddings', int),
  'beta_fast': ('beta_fast', 32.0),
  'beta_slow': ('beta_slow', 1.0),
  'truncate': ('truncate', True),
}
YARN_AMPLITUDE = 'attention_factor', 'mscale', 'mscale_all_dim'


def _read_dynamic(rope: Settings, context: int | None) -> DynamicScaling:
  """Frequencies up to the original context, for which theirs are constant."""
  if context is None:
    raise rope.fail('rope_type', "given with max_position_embeddings where it is 'dynamic'")
  return DynamicScaling(**rope.read(FACTOR), original_context=context, length=context)


def _read_yarn(rope: Settings, context: int | None) -> YarnScaling:
  amplitude = {name: rope.get(name, float, None) for name in YARN_AMPLITUDE}
  scaling = YarnScaling(**rope.read(YARN), **amplitude)
  plain = scaling.replace(attention_factor=None)
  return plain if plain.amplitude == scaling.amplitude else scaling


def _write_yarn(scaling: YarnScaling) -> dict[str, Any]:
  amplitude = {name: getattr(scaling, name) for name in YARN_AMPLITUDE}
  return written(scaling, YARN) | {k: v for k, v in amplitude.items() if v is not None}


_Read = Callable[[Settings, int | None], RotaryScaling]
_Write = Callable[[Any], dict[str, Any]]
SCALINGS: Mapping[str, tuple[type[RotaryScaling], _Read, _Write]] = {
  'linear': (
    LinearScaling,
    lambda rope, _: LinearScaling(**rope.read(FACTOR)),
    lambda scaling: written(scaling, FACTOR),
  ),
  'dynamic': (DynamicScaling, _read_dynamic, lambda scaling: written(scaling, FACTOR)),
  'llama3': (
    Llama3Scaling,
    lambda rope, _: Llama3Scaling(**rope.read(LLAMA3)),
    lambda scaling: written(scaling, LLAMA3),
  ),
  'yarn': (YarnScaling, _read_yarn, _write_yarn),
}
"""`rope_type` -> type of scaling, from their fields and the model's context to ours, and back."""


def read_rotary(hf: Settings, theta: float = 10000.0, *, partial: bool = False) -> Rotary:
  """Rotary positions of all layers. Both forms of the settings must agree if both are given; an
  unknown `rope_type` or field raises `InputError`.

  Args:
    theta: their default.
    partial: whether the model reads `partial_rotary_factor`; it must be 1 where it does not.
  """
  forms = [f for f in ('rope_scaling', 'rope_parameters') if hf.value(f) is not None]
  theta, context = hf.positive('rope_theta', theta), hf.count('max_position_embeddings', None)
  fraction = _fraction(hf, partial)
  found = [
    _rotary(Settings(hf.get(f, dict), f'{hf.where}: {f}'), theta, context, fraction, partial)
    for f in forms
  ] or [Rotary(theta=theta, fraction=fraction)]
  hf.only('original_max_position_embeddings', None)
  if found[0] != found[-1]:
    first, second = forms
    raise hf.fail(first, f'equivalent to {second} = {hf.fields[second]!r}')
  return found[0]


FULL, SLIDING = 'full_attention', 'sliding_attention'


def read_rotary_by_type(
  hf: Settings, theta: Mapping[str, float], old: Mapping[str, str]
) -> dict[str, Rotary]:
  """Rotary positions of layers with full and with sliding attention.

  `rope_parameters` has settings for each type of layer. Before transformers 5 there were fields of
  the bases, and `rope_scaling`, for full attention alone; it replaces fields of `rope_parameters`
  where both are given.

  Args:
    theta: their default of each type.
    old: the field of the base of each type; a type without one has its default.
  """
  given = dict(hf.get('rope_parameters', dict, {}))
  scaling, context = hf.get('rope_scaling', dict, {}), hf.count('max_position_embeddings', None)
  hf.only('original_max_position_embeddings', None)
  hf.only('partial_rotary_factor', 1.0, None)
  if others := set(given) - {FULL, SLIDING}:
    raise hf.fail('rope_parameters', f'settings of {FULL} and {SLIDING}, not {min(others)}')
  found = {}
  for kind in (FULL, SLIDING):
    fields = dict(given.get(kind) or {}) | (scaling if kind == FULL else {})
    rope = Settings(fields, f'{hf.where}: rope_parameters: {kind}')
    rope.only('truncate', True, None)  # theirs reads it beside the types, where it cannot be
    base = hf.positive(old[kind], theta[kind]) if kind in old else theta[kind]
    found[kind] = _rotary(rope, base, context, 1.0, False)
  return found


def _fraction(settings: Settings, partial: bool, default: float = 1.0) -> float:
  if partial:
    return settings.positive('partial_rotary_factor', default)
  settings.only('partial_rotary_factor', 1.0, None)
  return 1.0


def _rotary(
  rope: Settings, theta: float, context: int | None, fraction: float, partial: bool
) -> Rotary:
  # Files have `type`, `rope_type` or both; without either, frequencies are unscaled.
  names = [n for n in ('rope_type', 'type') if rope.value(n) is not None]
  for name in names:
    rope.only(name, 'default', *SCALINGS)
  kinds = {rope.value(n) for n in names} or {'default'}
  if len(kinds) > 1:
    raise rope.fail('type', f'rope_type, {rope.fields["rope_type"]!r}')
  (kind,) = kinds
  fraction, theta = _fraction(rope, partial, fraction), rope.positive('rope_theta', theta)
  scaling = SCALINGS[kind][1](rope, context) if kind in SCALINGS else None
  if unread := rope.unread():
    known = ', '.join(map(repr, SCALINGS))
    raise rope.fail(
      unread[0], 'absent' if names else f'with a rope_type, {known}, which is missing'
    )
  return Rotary(theta=theta, scaling=scaling, fraction=fraction)


def parameters(rotary: Rotary) -> dict[str, Any]:
  """`rope_parameters` of transformers 5."""
  return {'rope_theta': rotary.theta, **_kind(rotary), **_partial(rotary)}


def _partial(rotary: Rotary) -> dict[str, Any]:
  return {} if rotary.fraction == 1 else {'partial_rotary_factor': rotary.fraction}


def _kind(rotary: Rotary) -> dict[str, Any]:
  for kind, (scaling, _, write) in SCALINGS.items():
    if type(rotary.scaling) is scaling:
      return {'rope_type': kind, **write(rotary.scaling)}
  return {'rope_type': 'default'}


def write_rotary(rotary: Rotary) -> dict[str, Any]:
  """The fields of transformers 4 and of transformers 5."""
  return {
    'rope_theta': rotary.theta,
    'rope_scaling': None if rotary.scaling is None else _kind(rotary),
    'rope_parameters': parameters(rotary),
    **_partial(rotary),
  }


def rotary_by_type(attentions: Sequence[Attention.Config]) -> dict[str, Rotary]:
  """The positions of the first layer of each type; of the other type where there is none."""
  found = {
    FULL if a.window is None else SLIDING: part(a.position, Rotary, 'the position of attention')
    for a in reversed(attentions)
  }
  other = next(iter(found.values()))
  return {kind: found.get(kind, other) for kind in (FULL, SLIDING)}


def write_rotary_by_type(rotary: Mapping[str, Rotary], old: Mapping[str, str]) -> dict[str, Any]:
  """The fields of transformers 4 and of transformers 5, as `read_rotary_by_type` reads them."""
  full = rotary[FULL]
  return {
    **{field: rotary[kind].theta for kind, field in old.items()},
    'rope_scaling': None if full.scaling is None else _kind(full),
    'rope_parameters': {kind: parameters(r) for kind, r in rotary.items()},
  }
