"""The only file that knows a mesh: logical axes, the rules that map them to mesh axes, meshes,
`param` and `shard`.

Layers name the axes of their parameters and activations by what they *mean* (`AXES`). A rule table
says which mesh axis divides which logical axis; parameters and activations have a table each, so
FSDP (parameters divided over the axis that also divides the batch) needs no word in any layer.
Without an active mesh every function here is the identity."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxformer.config import Config, InputError, nearest

AXES: Mapping[str, str] = {
  'batch': 'sequences of a batch',
  'time': 'positions of a sequence',
  'layers': 'periods of a stack, scanned',
  'embed': 'the width of the residual stream',
  'heads': 'query heads, or heads times head dimension',
  'kv_heads': 'key/value heads, or these times head dimension',
  'head_dim': 'the inside of one head',
  'mlp': 'hidden units of a feed-forward layer',
  'vocab': 'rows of an embedding or columns of a head',
  'experts': 'experts of a mixture',
  'inner': 'channels inside a recurrent layer',
  'state': 'state of a recurrence, low-rank factors, taps of a convolution',
  'positions': 'rows of a table of learned positions',
  'norm': 'a vector of scales or offsets over the width: small, so replicated',
}

MESH_AXES: Mapping[str, str] = {
  'replica': 'copies of everything across slices, over the slow network between them; divides the '
  'batch',
  'data': 'copies of the parameters, each with its part of the batch',
  'fsdp': 'divides the batch and the parameters; parameters are gathered layer by layer',
  'expert': 'divides the batch and the experts',
  'context': 'divides long sequences',
  'tensor': 'divides heads, hidden units and the vocabulary; the fastest links',
}

# ---- rules -------------------------------------------------------------------------------------

Divided = tuple[str, ...] | None


class AxisRules(Config):
  """For each logical axis the mesh axes that divide it, in order; None where it is whole on every
  device."""

  batch: Divided = None
  time: Divided = None
  layers: Divided = None
  embed: Divided = None
  heads: Divided = None
  kv_heads: Divided = None
  head_dim: Divided = None
  mlp: Divided = None
  vocab: Divided = None
  experts: Divided = None
  inner: Divided = None
  state: Divided = None
  positions: Divided = None
  norm: Divided = None

  def validate(self):
    for axis in AXES:
      names = self[axis]
      if unknown := [n for n in names if n not in MESH_AXES]:
        raise InputError(
          f'AxisRules.{axis} = {list(names)}: no mesh axis '
          f'{unknown[0]!r}{nearest(unknown[0], MESH_AXES)}'
        )
      self.require(len(set(names)) == len(names), axis, 'mesh axes that differ')

  def __getitem__(self, axis: str) -> tuple[str, ...]:
    return getattr(self, axis) or ()


# what stands beside `embed` in a weight
_WEIGHT_COLUMNS = ('heads', 'kv_heads', 'mlp', 'vocab', 'experts', 'inner', 'state')
_TENSOR: dict[str, Any] = dict.fromkeys(('heads', 'kv_heads', 'mlp', 'vocab', 'inner'), ('tensor',))
_ACTIVATIONS = AxisRules(batch=('replica', 'data', 'fsdp', 'expert'), time=('context',))


class Rules(Config):
  """One's own table, as `MeshConfig.rules`. What is not given is as in `fsdp_tensor`.

  Attributes:
    params: which mesh axes divide which logical axes of parameters, their gradients and the
      optimizer's state.
    activations: the same of activations. Of two logical axes of an array that ask for one mesh
      axis, the first is served.
  """

  params: AxisRules = AxisRules(embed=('fsdp',), experts=('expert',), **_TENSOR)
  activations: AxisRules = _ACTIVATIONS.replace(experts=('expert',), **_TENSOR)

  def validate(self):
    for axis in ('batch', 'time'):
      if self.params[axis]:
        raise InputError(
          f'Rules.params.{axis} = {list(self.params[axis])}: must be none, as no parameter has '
          'this axis'
        )
    pairs = [('params', 'embed', other) for other in _WEIGHT_COLUMNS] + [
      ('params', 'experts', 'mlp'),
      ('activations', 'batch', 'time'),
    ]
    for kind, one, other in pairs:
      table = getattr(self, kind)
      if twice := set(table[one]) & set(table[other]):
        raise InputError(
          f'Rules.{kind}: {one} and {other} stand in one array, and mesh axis {min(twice)!r} '
          'cannot divide both'
        )

  def spec(self, axes: Sequence[str | None], *, activations: bool = False) -> PartitionSpec:
    """The partition of an array with these logical axes. A mesh axis asked for twice is an error
    for a parameter; for an activation the first logical axis that asks for it is served."""
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

  def divides(self, mesh_axis: str) -> bool:
    """Whether something is divided over a mesh axis."""
    return any(
      mesh_axis in table[axis] for table in (self.params, self.activations) for axis in AXES
    )


RULES: dict[str, Rules] = {
  'data_parallel': Rules(params=AxisRules(), activations=_ACTIVATIONS),
  'fsdp': Rules(params=AxisRules(embed=('fsdp',)), activations=_ACTIVATIONS),
  'fsdp_tensor': Rules(),
}


def rules_of(rules: Rules | str) -> Rules:
  """A table, or that of a preset's name."""
  return RULES[rules] if isinstance(rules, str) else rules


# ---- meshes ------------------------------------------------------------------------------------


class MeshConfig(Config):
  """Devices arranged along named axes; the sizes multiply to the number of devices. At most one
  size may be -1: what is left.

  `rules` is the table that maps logical axes to these mesh axes, by name or one's own:
  `data_parallel` replicates the parameters, `fsdp` divides them over `fsdp`, `fsdp_tensor` also
  divides heads, hidden units, vocabulary and experts over `tensor` and `expert`. All of them divide
  the batch over `replica`, `data`, `fsdp` and `expert`, and time over `context`."""

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
        'at least 1, or -1 for the devices that are left',
      )
    if sum(getattr(self, axis) == -1 for axis in MESH_AXES) > 1:
      raise InputError('mesh: only one axis may be -1')
    for axis in MESH_AXES:
      if getattr(self, axis) > 1:
        self.require(
          self._divides(axis), axis, f'1 under {self._rules_in_words}, which divide nothing over it'
        )

  def _divides(self, axis: str) -> bool:
    return rules_of(self.rules).divides(axis) and (axis != 'fsdp' or self.rules != 'data_parallel')

  @property
  def _rules_in_words(self) -> str:
    return f'rules {self.rules!r}' if isinstance(self.rules, str) else 'these rules'

  def sizes(self, devices: int) -> dict[str, int]:
    """Axis -> size for a number of devices. Raises `InputError` when they do not multiply to it."""
    sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
    rest = next((a for a, s in sizes.items() if s == -1), None)
    fixed = math.prod(s for s in sizes.values() if s != -1)
    given = ', '.join(f'{a} {s}' for a, s in sizes.items() if s != 1)
    if rest is not None and devices % fixed == 0:
      sizes[rest] = devices // fixed
      if sizes[rest] > 1 and not self._divides(rest):
        raise InputError(
          f'mesh.{rest} = -1 takes the {sizes[rest]} devices that are left, and '
          f'{self._rules_in_words} divide '
          f'nothing over it; give it as 1 and the devices to another axis'
        )
    if math.prod(sizes.values()) != devices:
      wanted = f'a multiple of {fixed}' if rest else str(fixed)
      raise InputError(
        f'mesh ({given or "one device"}) needs {wanted} devices; there are '
        f'{devices}{self._that_fit(devices)}'
      )
    return sizes

  def _that_fit(self, devices: int) -> str:
    """What of one axis would make the mesh multiply to the devices."""
    sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
    flexible, fixed, fits = -1 in sizes.values(), math.prod(abs(s) for s in sizes.values()), []
    for axis, size in sizes.items():
      # for this axis, and for one that takes what is left
      left, over = divmod(devices, fixed // abs(size))
      if over == 0 and size != -1 and self._divides(axis):
        fits += (
          [f'{axis} {math.gcd(left, size)}' if flexible else f'{axis} {left}']
          if size > 1 or not flexible
          else []
        )
    return f'; with the rest as it is, {" or ".join(fits)} would fit' if fits else ''


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh of a config over `devices` (all by default). Devices of several slices lie along
  `replica`, slice after slice, so that nothing else crosses the network between them."""
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
        f'mesh.replica = {sizes["replica"]}: must be a multiple of {slices}, the slices of these '
        'devices'
      )
    if slices > 1 and sizes['replica'] % slices == 0:
      within = (sizes['replica'] // slices, *shape[1:])
      array = mesh_utils.create_hybrid_device_mesh(
        within, (slices,) + (1,) * (len(shape) - 1), devices, allow_split_physical_axes=True
      )
    else:
      array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return Mesh(array, names, axis_types=(AxisType.Auto,) * len(names))


# ---- the active mesh ---------------------------------------------------------------------------

_ACTIVE: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar(
  'mesh', default=None
)


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: Rules | str = 'fsdp_tensor') -> Generator[Mesh]:
  """Within, `shard` constrains activations, `per_shard` maps kernels, and `platform` is that of the
  mesh's devices."""
  token = _ACTIVE.set((mesh, rules_of(rules)))
  try:
    with jax.set_mesh(mesh):
      yield mesh
  finally:
    _ACTIVE.reset(token)


_ASSUMED: contextvars.ContextVar[str | None] = contextvars.ContextVar('platform', default=None)


@contextlib.contextmanager
def assume_platform(name: str) -> Generator[None]:
  """Within, `platform` is 'cpu', 'gpu' or 'tpu' as told: to trace with shapes what would run on
  machines not there."""
  token = _ASSUMED.set(name)
  try:
    yield
  finally:
    _ASSUMED.reset(token)


def platform() -> str:
  """'cpu', 'gpu' or 'tpu': what the program being traced will run on. An active mesh decides, so
  that a program compiled ahead of time for a TPU takes the TPU's routes on any host."""
  active, assumed = _ACTIVE.get(), _ASSUMED.get()
  name = assumed or (active[0].devices.flat[0].platform if active else jax.default_backend())
  return 'gpu' if name in ('cuda', 'rocm') else name


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
  """Constrains activation `x` to the mesh axes of its logical axes. A mesh axis that does not
  divide its dimension is left out (few key/value heads on a wide tensor axis stay replicated)."""
  active = _ACTIVE.get()
  if active is None:
    return x
  mesh, rules = active
  return jax.lax.with_sharding_constraint(
    x, NamedSharding(mesh, _dividing(rules.spec(axes, activations=True), x.shape, mesh))
  )


def shard_param(x: jax.Array, *axes: str | None) -> jax.Array:
  """Constrains `x`, a parameter or its gradient on the way through a computation, like a parameter
  with these logical axes."""
  active = _ACTIVE.get()
  if active is None:
    return x
  mesh, rules = active
  return jax.lax.with_sharding_constraint(
    x, NamedSharding(mesh, _dividing(rules.spec(axes), x.shape, mesh))
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """A parameter as a layer uses it: divided like an activation, so whole over `fsdp`; its gradient
  is divided like itself."""
  return shard(x, *axes)


gathered.defvjp(
  lambda x, axes: (shard(x, *axes), None), lambda axes, _, g: (shard_param(g, *axes),)
)


def gathers() -> bool:
  """Whether `gathered` gathers something: the mesh divides parameters where it does not divide
  activations."""
  active = _ACTIVE.get()
  if active is None:
    return False
  mesh, rules = active
  extra = [rules.params[a] for a in AXES if rules.params[a] != rules.activations[a]]
  return any(mesh.shape[m] > 1 for entry in extra for m in entry)


def mesh_axes(axis: str, size: int) -> tuple[str, ...]:
  """The mesh axes over which `shard` and `per_shard` divide an activation's dimension of this
  logical axis and size; inside `per_shard` collectives go over them. Those of one device are left
  out."""
  active = _ACTIVE.get()
  if active is None:
    return ()
  mesh, rules = active
  entry = _dividing(rules.spec((axis,), activations=True), (size,), mesh)[0]
  return tuple(
    n for n in ((entry,) if isinstance(entry, str) else entry or ()) if mesh.shape[n] > 1
  )


def shards(axis: str, size: int) -> int:
  """In how many parts `shard` and `per_shard` divide an activation's dimension of this logical axis
  and size; 1 without a mesh."""
  active = _ACTIVE.get()
  return 1 if active is None else math.prod(active[0].shape[n] for n in mesh_axes(axis, size))


def all_mesh_axes() -> tuple[str, ...]:
  """The axes of the active mesh that have several devices."""
  active = _ACTIVE.get()
  return () if active is None else tuple(n for n, size in active[0].shape.items() if size > 1)


def _dividing(spec: PartitionSpec, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
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
  """`f` mapped over the shards of its arguments (for kernels that the partitioner cannot divide):
  each argument is given by its logical axes, None for one that is absent or whole everywhere; so is
  each result of `f`. Without a mesh of several devices, `f` itself."""
  active = _ACTIVE.get()
  if active is None or active[0].size == 1:
    return f
  mesh, rules = active

  def mapped(*args):
    specs = [
      PartitionSpec()
      if axes is None or a is None
      else _dividing(rules.spec(axes, activations=True), a.shape, mesh)
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
  """The same partition, naming the mesh axes of one device too: a gradient is added up over all
  that an argument does not name."""
  entries = [
    (e,) if isinstance(e, str) else tuple(e or ()) for e in (*spec, *(None,) * (ndim - len(spec)))
  ]
  named = {n for e in entries for n in e}
  single = tuple(n for n, size in mesh.shape.items() if size == 1 and n not in named)
  return PartitionSpec((*entries[0], *single), *entries[1:]) if ndim else spec


def param_sharding(
  mesh: Mesh, rules: Rules | str, name: str, axes: Sequence[str | None], shape: Sequence[int]
) -> NamedSharding:
  """Where a parameter lives. Raises `InputError` for a mesh axis that does not divide its
  dimension."""
  spec = rules_of(rules).spec(axes)
  for axis, size, entry in zip(axes, shape, spec, strict=True):
    names = (entry,) if isinstance(entry, str) else entry or ()
    parts = math.prod(mesh.shape[n] for n in names)
    if size % parts:
      fits = [str(n) for n in range(1, parts) if size % n == 0][-3:]
      raise InputError(
        f'mesh.{" x mesh.".join(names)} = {parts} does not divide {axis} = {size} of parameter '
        f'{name}; '
        f'{", ".join(fits)} would'
      )
  return NamedSharding(mesh, spec)


def batch_sharding(mesh: Mesh, rules: Rules | str) -> NamedSharding:
  """Where the arrays of a batch live: their first axis is `batch`, their second `time`."""
  return NamedSharding(mesh, rules_of(rules).spec(('batch', 'time'), activations=True))


def batch_shards(mesh: Mesh, rules: Rules | str) -> int:
  """In how many parts a batch is divided; the global batch size must be a multiple."""
  entry = batch_sharding(mesh, rules).spec[0]
  return math.prod(mesh.shape[n] for n in ((entry,) if isinstance(entry, str) else entry or ()))


def replicated(mesh: Mesh) -> NamedSharding:
  """A copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


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
  """A parameter with what others need to know of it, as metadata.

  Args:
    value: its initial value, fp32.
    axes: the logical axis of each dimension (`AXES`), None for one that is never divided.
    decay: whether weight decay applies (not to norms, biases and the parameters of recurrences).
    lr_scale: factor on the learning rate.
    full_precision: stays fp32 where the others are cast to the compute dtype (decay rates,
      routers).
    matmul: multiplies every token, which costs 2 FLOPs a number; False for tables that are looked
      up, norms and biases aside.
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
