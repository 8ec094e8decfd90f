"""Logical axes, and the rules that map them to mesh axes.

Layers name the axes of their parameters and activations by what they *mean* (`AXES`). Rules say
over which mesh axes each logical axis is sharded. Parameters and activations have separate rules,
so FSDP (parameters sharded over an axis that also shards the batch) needs no code in any layer.
"""

from collections.abc import Sequence
from typing import Any

from jax.sharding import PartitionSpec

from jaxformer.config import Config, InputError, hints, nearest

MESH_AXES = ('replica', 'data', 'fsdp', 'expert', 'context', 'tensor')
MeshAxes = tuple[str, ...] | None


class AxisRules(Config):
  """The mesh axes over which each logical axis is sharded, in order; None if it is replicated.

  Attributes:
    batch: sequences of a batch.
    time: positions of a sequence.
    layers: periods of a stack, scanned.
    embed: the width of the residual stream.
    heads: query heads, or heads times head dimension.
    kv_heads: key/value heads, or these times head dimension.
    head_dim: channels of one head.
    mlp: hidden units of a feed-forward layer.
    vocab: rows of an embedding or columns of a head.
    experts: experts of a mixture.
    inner: channels inside a recurrent layer.
    state: state of a recurrence, low-rank factors, the kernel of a convolution.
    positions: rows of a table of learned positions.
    norm: scales or biases over the width: small, so replicated.
  """

  batch: MeshAxes = None
  time: MeshAxes = None
  layers: MeshAxes = None
  embed: MeshAxes = None
  heads: MeshAxes = None
  kv_heads: MeshAxes = None
  head_dim: MeshAxes = None
  mlp: MeshAxes = None
  vocab: MeshAxes = None
  experts: MeshAxes = None
  inner: MeshAxes = None
  state: MeshAxes = None
  positions: MeshAxes = None
  norm: MeshAxes = None

  def validate(self):
    for axis in AXES:
      names = self[axis]
      if unknown := [n for n in names if n not in MESH_AXES]:
        known = nearest(unknown[0], MESH_AXES)
        raise InputError(
          f'AxisRules.{axis}', list(names), problem=f'no mesh axis {unknown[0]!r}{known}'
        )
      self.require(len(set(names)) == len(names), axis, 'distinct mesh axes')

  def __getitem__(self, axis: str) -> tuple[str, ...]:
    return getattr(self, axis) or ()


AXES = tuple(hints(AxisRules))


def check_axes(axes: Sequence[str | None]) -> None:
  """Raise `InputError` for an unknown logical axis."""
  if unknown := [a for a in axes if a is not None and a not in AXES]:
    raise InputError(f'unknown logical axis {unknown[0]!r}; known: {", ".join(AXES)}')


# the logical axes that share a weight with `embed`
_WEIGHT_COLUMNS = ('heads', 'kv_heads', 'mlp', 'vocab', 'experts', 'inner', 'state')
_TENSOR: dict[str, Any] = dict.fromkeys(('heads', 'kv_heads', 'mlp', 'vocab', 'inner'), ('tensor',))
_ACTIVATIONS = AxisRules(batch=('replica', 'data', 'fsdp', 'expert'), time=('context',))


class Rules(Config):
  """Custom sharding rules for `MeshConfig.rules`; the defaults are those of `fsdp_tensor`.

  Attributes:
    params: for parameters, their gradients and the optimizer state.
    activations: for activations. If two logical axes of an array map to the same mesh axis, the
      first wins.
  """

  params: AxisRules = AxisRules(embed=('fsdp',), experts=('expert',), **_TENSOR)
  activations: AxisRules = _ACTIVATIONS.replace(experts=('expert',), **_TENSOR)

  def validate(self):
    for axis in ('batch', 'time'):
      if self.params[axis]:
        raise InputError(
          f'Rules.params.{axis}', list(self.params[axis]), 'none: no parameter has this axis'
        )
    pairs = [('params', 'embed', other) for other in _WEIGHT_COLUMNS] + [
      ('params', 'experts', 'mlp'),
      ('activations', 'batch', 'time'),
    ]
    for kind, one, other in pairs:
      table = getattr(self, kind)
      if twice := set(table[one]) & set(table[other]):
        raise InputError(
          f'Rules.{kind}: {one} and {other} are axes of one array, and mesh axis {min(twice)!r} '
          'cannot shard both'
        )

  def spec(self, axes: Sequence[str | None], *, activations: bool = False) -> PartitionSpec:
    """Return the partition of an array with these logical axes.

    If two axes map to the same mesh axis, that is an error for a parameter; for an activation the
    first wins.
    """
    table, taken, spec = self.activations if activations else self.params, set(), []
    check_axes(axes)
    for name in axes:
      wanted = () if name is None else table[name]
      if not activations and taken & set(wanted):
        raise InputError(
          f'logical axes {tuple(axes)} map to mesh axis {", ".join(sorted(taken & set(wanted)))} '
          'twice'
        )
      free = tuple(a for a in wanted if a not in taken)
      taken |= set(free)
      spec.append(free or None)
    return PartitionSpec(*spec)

  def uses(self, mesh_axis: str) -> bool:
    """Whether anything is sharded over a mesh axis."""
    return any(
      mesh_axis in table[axis] for table in (self.params, self.activations) for axis in AXES
    )


RULES: dict[str, Rules] = {
  'data_parallel': Rules(
    params=AxisRules(), activations=_ACTIVATIONS.replace(batch=('replica', 'data', 'expert'))
  ),
  'fsdp': Rules(params=AxisRules(embed=('fsdp',)), activations=_ACTIVATIONS),
  'fsdp_tensor': Rules(),
}


def rules_of(rules: Rules | str) -> Rules:
  """Return rules, by name or as they are."""
  return RULES[rules] if isinstance(rules, str) else rules
