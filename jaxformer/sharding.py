"""Logical axes, the rules that map them to mesh axes, meshes, `param` and `shard`.

Layers name the axes of their parameters and activations by what they *mean* (`AXES`). Rules say
over which mesh axes each logical axis is sharded. Parameters and activations have separate rules,
so FSDP (parameters sharded over an axis that also shards the batch) needs no code in any layer.
Without an active mesh every function here is the identity. This is the only module that knows a
mesh.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Literal, cast

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxformer.config import Config, InputError, nearest

AXES: Mapping[str, str] = {
  'batch': 'sequences of a batch',
  'time': 'positions of a sequence',
  'layers': 'periods of a stack, scanned',
  'embed': 'the width of the residual stream',
  'heads': 'query heads, or heads times head dimension',
  'kv_heads': 'key/value heads, or these times head dimension',
  'head_dim': 'channels of one head',
  'mlp': 'hidden units of a feed-forward layer',
  'vocab': 'rows of an embedding or columns of a head',
  'experts': 'experts of a mixture',
  'inner': 'channels inside a recurrent layer',
  'state': 'state of a recurrence, low-rank factors, the kernel of a convolution',
  'positions': 'rows of a table of learned positions',
  'norm': 'scales or biases over the width: small, so replicated',
}

MESH_AXES: Mapping[str, str] = {
  'replica': 'data parallelism across slices, over the slow network between them',
  'data': 'data parallelism: parameters are replicated, the batch is sharded',
  'fsdp': 'shards the batch and the parameters, which are all-gathered layer by layer',
  'expert': 'shards the batch and the experts',
  'context': 'sequence parallelism: shards time',
  'tensor': 'tensor parallelism: shards heads, hidden units and the vocabulary; the fastest links',
}

# ---- rules -------------------------------------------------------------------------------------

MeshAxes = tuple[str, ...] | None


class AxisRules(Config):
  """The mesh axes over which each logical axis is sharded, in order; None if it is replicated."""

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
    for name in axes:
      if name is not None and name not in AXES:
        raise InputError(f'unknown logical axis {name!r}; known: {", ".join(AXES)}')
      wanted = () if name is None else table[name]
      if not activations and taken & set(wanted):
        raise InputError(
          f'logical axes {tuple(axes)} map to mesh axis {", ".join(sorted(taken & set(wanted)))} '
          'twice'
        )
      free = tuple(a for a in wanted if a not in taken)
      taken |= set(free)
      spec.append(free if len(free) > 1 else free[0] if free else None)
    return PartitionSpec(*spec)

  def uses(self, mesh_axis: str) -> bool:
    """Whether anything is sharded over a mesh axis."""
    return any(
      mesh_axis in table[axis] for table in (self.params, self.activations) for axis in AXES
    )


RULES: dict[str, Rules] = {
  'data_parallel': Rules(params=AxisRules(), activations=_ACTIVATIONS),
  'fsdp': Rules(params=AxisRules(embed=('fsdp',)), activations=_ACTIVATIONS),
  'fsdp_tensor': Rules(),
}


def rules_of(rules: Rules | str) -> Rules:
  """Return rules, by name or as they are."""
  return RULES[rules] if isinstance(rules, str) else rules


# ---- meshes ------------------------------------------------------------------------------------


class MeshConfig(Config):
  """Devices arranged along named axes, whose sizes multiply to the number of devices.

  At most one size may be -1, for the devices that remain.

  `rules` map logical axes to these mesh axes, by name or as custom `Rules`: `data_parallel`
  replicates the parameters, `fsdp` shards them over `fsdp`, `fsdp_tensor` also shards heads, hidden
  units, vocabulary and experts over `tensor` and `expert`. All of them shard the batch over
  `replica`, `data`, `fsdp` and `expert`, and time over `context`.
  """

  replica: int = 1
  data: int = -1
  fsdp: int = 1
  expert: int = 1
  context: int = 1
  tensor: int = 1
  rules: Rules | Literal['data_parallel', 'fsdp', 'fsdp_tensor'] = 'fsdp_tensor'

  def validate(self):
    for axis in MESH_AXES:
      self.require(
        getattr(self, axis) >= 1 or getattr(self, axis) == -1,
        axis,
        'at least 1, or -1 for the remaining devices',
      )
    if sum(getattr(self, axis) == -1 for axis in MESH_AXES) > 1:
      raise InputError('mesh: only one axis may be -1')
    for axis in MESH_AXES:
      if getattr(self, axis) > 1:
        self.require(
          self._uses(axis), axis, f'1 under {self._rules_in_words}, which shard nothing over it'
        )

  def _uses(self, axis: str) -> bool:
    return rules_of(self.rules).uses(axis) and (axis != 'fsdp' or self.rules != 'data_parallel')

  @property
  def _rules_in_words(self) -> str:
    return f'rules {self.rules!r}' if isinstance(self.rules, str) else 'these rules'

  def sizes(self, devices: int) -> dict[str, int]:
    """Return axis -> size for a number of devices. Raises `InputError` if the sizes do not multiply
    to it."""
    sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
    rest = next((a for a, s in sizes.items() if s == -1), None)
    fixed = math.prod(s for s in sizes.values() if s != -1)
    given = ', '.join(f'{a} {s}' for a, s in sizes.items() if s != 1)
    if rest is not None and devices % fixed == 0:
      sizes[rest] = devices // fixed
      if sizes[rest] > 1 and not self._uses(rest):
        raise InputError(
          f'mesh.{rest} = -1 takes the {sizes[rest]} remaining devices, but no rule of '
          f'{self._rules_in_words} shards over it; set it to 1 and use another axis'
        )
    if math.prod(sizes.values()) != devices:
      wanted = f'a multiple of {fixed}' if rest else str(fixed)
      raise InputError(
        f'mesh ({given or "one device"}) needs {wanted} devices; there are '
        f'{devices}{self._that_fit(devices)}'
      )
    return sizes

  def _that_fit(self, devices: int) -> str:
    """Sizes of single axes with which the mesh would multiply to the devices, for a message."""
    sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
    flexible, fixed, fits = -1 in sizes.values(), math.prod(abs(s) for s in sizes.values()), []
    for axis, size in sizes.items():
      # for this axis, and for one that takes what is left
      left, over = divmod(devices, fixed // abs(size))
      if over == 0 and size != -1 and self._uses(axis):
        fits += (
          [f'{axis} {math.gcd(left, size)}' if flexible else f'{axis} {left}']
          if size > 1 or not flexible
          else []
        )
    return f'; with the other axes as they are, {" or ".join(fits)} would fit' if fits else ''


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Return the mesh of a config over `devices` (all by default).

  Devices of several slices lie along `replica`, slice after slice, so that no other axis crosses
  the network between slices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = config.sizes(len(devices))
  shape, names = tuple(sizes.values()), tuple(sizes)
  slices = len({getattr(d, 'slice_index', 0) for d in devices})
  if devices[0].platform == 'cpu':  # fake devices have no topology to respect
    array = np.asarray(devices, dtype=object).reshape(shape)
  else:
    from jax.experimental import mesh_utils

    if slices > 1 and sizes['replica'] % slices and devices[0].platform == 'tpu':
      raise InputError(
        'mesh.replica', sizes['replica'], f'a multiple of {slices}, the number of slices'
      )
    if slices > 1 and sizes['replica'] % slices == 0:
      within = (sizes['replica'] // slices, *shape[1:])
      array = mesh_utils.create_hybrid_device_mesh(
        within, (slices,) + (1,) * (len(shape) - 1), devices, allow_split_physical_axes=True
      )
    else:
      array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return Mesh(array, names, axis_types=(AxisType.Auto,) * len(names))


@dataclasses.dataclass(frozen=True)
class Parallel:
  """A mesh and the rules by which arrays are sharded over it: what travels through the package.

  Attributes:
    mesh: devices along named axes.
    rules: sharding rules, or the name of a preset.
  """

  mesh: Mesh | AbstractMesh
  rules: Rules | str = 'fsdp_tensor'

  @property
  def table(self) -> Rules:
    return rules_of(self.rules)

  def param(self, name: str, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """Return the NamedSharding of a parameter. Raises `InputError` for a mesh axis whose size does
    not divide its dimension."""
    spec = self.table.spec(axes)
    for axis, size, entry in zip(axes, shape, spec, strict=True):
      names = (entry,) if isinstance(entry, str) else entry or ()
      parts = math.prod(self.mesh.shape[n] for n in names)
      if size % parts:
        fits = [str(n) for n in range(1, parts) if size % n == 0][-3:]
        raise InputError(
          f'mesh.{" x mesh.".join(names)} = {parts}: must divide {axis} = {size} of parameter '
          f'{name}; {", ".join(fits)} would'
        )
    return self._named(spec)

  @property
  def platform(self) -> str:
    """The platform of the devices."""
    return cast(Mesh, self.mesh).devices.flat[0].platform

  @property
  def batch(self) -> NamedSharding:
    """The NamedSharding of the arrays of a batch, whose axes are `batch` and `time`."""
    return self._named(self.table.spec(('batch', 'time'), activations=True))

  @property
  def batch_shards(self) -> int:
    """The number of shards of a batch; the global batch size must be a multiple."""
    entry = self.batch.spec[0]
    names = (entry,) if isinstance(entry, str) else entry or ()
    return math.prod(self.mesh.shape[n] for n in names)

  @property
  def replicated(self) -> NamedSharding:
    """The NamedSharding of an array with a copy on every device."""
    return self._named(PartitionSpec())

  def _named(self, spec: PartitionSpec) -> NamedSharding:
    return NamedSharding(cast(Mesh, self.mesh), spec)


def make_parallel(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Parallel:
  """Return the mesh of a config over `devices` (all by default), with its rules."""
  return Parallel(make_mesh(config, devices), config.rules)


# ---- the active mesh ---------------------------------------------------------------------------

_ACTIVE: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar(
  'mesh', default=None
)


@contextlib.contextmanager
def use_mesh(parallel: Parallel) -> Generator[Parallel]:
  """Activate a mesh: `shard` constrains activations, `per_shard` maps kernels over shards, and
  `platform` is that of the mesh's devices."""
  mesh = cast(Mesh, parallel.mesh)
  token = _ACTIVE.set((mesh, parallel.table))
  try:
    with jax.set_mesh(mesh):
      yield parallel
  finally:
    _ACTIVE.reset(token)


_ASSUMED: contextvars.ContextVar[str | None] = contextvars.ContextVar('platform', default=None)


@contextlib.contextmanager
def assume_platform(name: str) -> Generator[None]:
  """Make `platform` return `name` ('cpu', 'gpu' or 'tpu'), to trace programs of other machines."""
  token = _ASSUMED.set(name)
  try:
    yield
  finally:
    _ASSUMED.reset(token)


def platform() -> str:
  """Return 'cpu', 'gpu' or 'tpu': the platform of the program that is being traced.

  An active mesh decides, so that a program that is compiled ahead of time for a TPU uses the TPU's
  implementations on any host.
  """
  active, assumed = _ACTIVE.get(), _ASSUMED.get()
  name = assumed or (active[0].devices.flat[0].platform if active else jax.default_backend())
  return 'gpu' if name in ('cuda', 'rocm') else name


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
  """Constrain the sharding of activation `x` by its logical axes.

  A mesh axis whose size does not divide the dimension is left out: few key/value heads on a wide
  tensor axis stay replicated.
  """
  active = _ACTIVE.get()
  if active is None:
    return x
  mesh, rules = active
  return jax.lax.with_sharding_constraint(
    x, NamedSharding(mesh, _fitting(rules.spec(axes, activations=True), x.shape, mesh))
  )


def shard_param(x: jax.Array, *axes: str | None) -> jax.Array:
  """Constrain `x`, a parameter or its gradient inside a computation, like a parameter with these
  logical axes."""
  active = _ACTIVE.get()
  if active is None:
    return x
  mesh, rules = active
  return jax.lax.with_sharding_constraint(
    x, NamedSharding(mesh, _fitting(rules.spec(axes), x.shape, mesh))
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def unshard(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """Return a parameter as a layer uses it, sharded like an activation and so all-gathered over
  `fsdp`; its gradient is sharded like the parameter."""
  return shard(x, *axes)


unshard.defvjp(lambda x, axes: (shard(x, *axes), None), lambda axes, _, g: (shard_param(g, *axes),))


def needs_all_gather() -> bool:
  """Whether `unshard` all-gathers anything: parameters are sharded where activations are not."""
  active = _ACTIVE.get()
  if active is None:
    return False
  mesh, rules = active
  extra = [rules.params[a] for a in AXES if rules.params[a] != rules.activations[a]]
  return any(mesh.shape[m] > 1 for entry in extra for m in entry)


def mesh_axes(axis: str, size: int) -> tuple[str, ...]:
  """Return the mesh axes over which a dimension of an activation is sharded.

  `axis` is its logical axis. Mesh axes of one device are left out. Inside `per_shard` these are the
  axes for collectives.
  """
  active = _ACTIVE.get()
  if active is None:
    return ()
  mesh, rules = active
  entry = _fitting(rules.spec((axis,), activations=True), (size,), mesh)[0]
  return tuple(
    n for n in ((entry,) if isinstance(entry, str) else entry or ()) if mesh.shape[n] > 1
  )


def shards(axis: str, size: int) -> int:
  """Return the number of shards of a dimension of an activation; 1 without a mesh."""
  active = _ACTIVE.get()
  return 1 if active is None else math.prod(active[0].shape[n] for n in mesh_axes(axis, size))


def all_mesh_axes() -> tuple[str, ...]:
  """Return the axes of the active mesh that have several devices."""
  active = _ACTIVE.get()
  return () if active is None else tuple(n for n, size in active[0].shape.items() if size > 1)


def _fitting(spec: PartitionSpec, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
  """The partition without mesh axes whose size does not divide their dimension."""
  kept = []
  for size, entry in zip(shape, spec, strict=True):
    names = () if entry is None else (entry,) if isinstance(entry, str) else entry
    kept.append(entry if size % math.prod(mesh.shape[n] for n in names) == 0 else None)
  return PartitionSpec(*kept)


def per_shard(
  f: Callable[..., Any],
  in_axes: Sequence[tuple[str | None, ...] | None],
  *out_axes: tuple[str | None, ...],
) -> Callable[..., Any]:
  """Return `f` mapped over the shards of its arguments, for kernels that the partitioner cannot
  shard.

  Args:
    in_axes: logical axes of each argument; None for one that is absent or replicated.
    out_axes: logical axes of each result.

  Without a mesh of several devices this is `f` itself.
  """
  active = _ACTIVE.get()
  if active is None or active[0].size == 1:
    return f
  mesh, rules = active

  def mapped(*args):
    specs = [
      PartitionSpec()
      if axes is None or a is None
      else _fitting(rules.spec(axes, activations=True), a.shape, mesh)
      for axes, a in zip(in_axes, args, strict=True)
    ]
    taken = {
      name: entry
      for axes, spec in zip(in_axes, specs, strict=True)
      for name, entry in zip(axes or (), spec, strict=False)
      if name
    }
    out = tuple(
      PartitionSpec(*(taken.get(name) if name else None for name in axes)) for axes in out_axes
    )
    specs = tuple(
      s if a is None else _naming_single(s, np.ndim(a), mesh)
      for s, a in zip(specs, args, strict=True)
    )
    return jax.shard_map(
      f, mesh=mesh, in_specs=specs, out_specs=out if len(out) > 1 else out[0], check_vma=False
    )(*args)

  return mapped


def _naming_single(spec: PartitionSpec, ndim: int, mesh: Mesh) -> PartitionSpec:
  """The same partition with the mesh axes of one device named too: gradients are summed over all
  axes that an argument does not name."""
  entries = [
    (e,) if isinstance(e, str) else tuple(e or ()) for e in (*spec, *(None,) * (ndim - len(spec)))
  ]
  named = {n for e in entries for n in e}
  single = tuple(n for n, size in mesh.shape.items() if size == 1 and n not in named)
  return PartitionSpec((*entries[0], *single), *entries[1:]) if ndim else spec


# ---- parameters --------------------------------------------------------------------------------


def param(
  value: jax.Array,
  axes: Sequence[str | None],
  *,
  decay: bool = True,
  lr_scale: float = 1.0,
  full_precision: bool = False,
  matmul: bool = True,
  active: float = 1.0,
) -> nnx.Param:
  """Return a parameter with metadata for the optimizer, the planner and the sharding rules.

  Args:
    value: its initial value, fp32.
    axes: the logical axis of each dimension (`AXES`), None for one that is never sharded.
    decay: whether weight decay applies (not to norms, biases and the parameters of recurrences).
    lr_scale: factor on the learning rate.
    full_precision: stays fp32 where the others are cast to the compute dtype (decay rates,
      routers).
    matmul: multiplies every token, which costs 2 FLOPs per parameter; False for lookup tables.
      Without effect for vectors.
    active: the fraction that one token uses (k of E experts).
  """
  axes = tuple(axes)
  if len(axes) != np.ndim(value):
    raise ValueError(
      f'a parameter of shape {np.shape(value)} needs {np.ndim(value)} axes, got {axes}'
    )
  if unknown := [a for a in axes if a is not None and a not in AXES]:
    raise ValueError(f'unknown logical axis {unknown[0]!r}; known: {", ".join(AXES)}')
  return nnx.Param(
    value,
    axes=axes,
    decay=decay,
    lr_scale=lr_scale,
    full_precision=full_precision,
    matmul=matmul,
    active=active,
  )
