"""Meshes, the sharding of arrays over them by rules (`sharding_rules`), `param` and `shard`.

Without an active mesh every function here is the identity. This is the only module that knows a
mesh.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any, Literal, cast

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxformer.config import Config, InputError
from jaxformer.sharding_rules import AXES, MESH_AXES, Rules, check_axes, rules_of

# ---- meshes ------------------------------------------------------------------------------------


class MeshConfig(Config):
  """Devices arranged along named axes, whose sizes multiply to the number of devices.

  At most one size may be -1, for the devices that remain.

  Attributes:
    replica: data parallelism across slices, over the slow network between them.
    data: data parallelism: parameters are replicated, the batch is sharded.
    fsdp: shards the batch and the parameters, which are all-gathered layer by layer.
    expert: shards the batch and the experts.
    context: sequence parallelism: shards time.
    tensor: tensor parallelism: shards heads, hidden units and the vocabulary; the fastest links.
    rules: map logical axes to these mesh axes, by name or as custom `Rules`: `data_parallel`
      replicates the parameters, `fsdp` shards them over `fsdp`, `fsdp_tensor` also shards heads,
      hidden units, vocabulary and experts over `tensor` and `expert`. All of them shard the batch
      over `replica`, `data`, `fsdp` and `expert`, and time over `context`.
  """

  replica: int = 1
  data: int = -1
  fsdp: int = 1
  expert: int = 1
  context: int = 1
  tensor: int = 1
  rules: Rules | Literal['data_parallel', 'fsdp', 'fsdp_tensor'] = 'fsdp_tensor'

  def validate(self):
    for axis, size in self.given.items():
      self.require(size >= 1 or size == -1, axis, 'at least 1, or -1 for the remaining devices')
      self.require(
        size <= 1 or rules_of(self.rules).uses(axis),
        axis,
        f'1 under {self._rules_in_words}, which shard nothing over it',
      )
    if list(self.given.values()).count(-1) > 1:
      raise InputError('mesh: only one axis may be -1')

  @property
  def given(self) -> dict[str, int]:
    """Axis -> size, -1 for the remaining devices."""
    return {axis: getattr(self, axis) for axis in MESH_AXES}

  @property
  def _rules_in_words(self) -> str:
    return f'rules {self.rules!r}' if isinstance(self.rules, str) else 'these rules'

  def sizes(self, devices: int) -> dict[str, int]:
    """Return axis -> size for a number of devices. Raises `InputError` if the sizes do not multiply
    to it."""
    sizes = self.given
    rest = next((a for a, s in sizes.items() if s == -1), None)
    fixed = math.prod(map(abs, sizes.values()))
    given = ', '.join(f'{a} {s}' for a, s in sizes.items() if s != 1)
    if rest is not None:
      sizes[rest] = devices // fixed
      if sizes[rest] > 1 and not rules_of(self.rules).uses(rest):
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
    flexible, fixed, fits = -1 in self.given.values(), math.prod(map(abs, self.given.values())), []
    for axis, size in self.given.items():
      # for this axis, and for one that takes what is left
      left, over = divmod(devices, fixed // abs(size))
      fixes = size > 1 or (size == 1 and not flexible)
      if fixes and not over and rules_of(self.rules).uses(axis):
        fits.append(f'{axis} {math.gcd(left, size) if flexible else left}')
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


def _names(entry: str | Sequence[str] | None) -> tuple[str, ...]:
  """Return the mesh axes in one entry of a `PartitionSpec`."""
  return (entry,) if isinstance(entry, str) else tuple(entry or ())


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
      if size % (parts := self.parts(entry)):
        fits = [str(n) for n in range(1, parts) if size % n == 0][-3:]
        raise InputError(
          f'mesh.{" x mesh.".join(_names(entry))} = {parts}: must divide {axis} = {size} of '
          f'parameter {name}; {", ".join(fits)} would'
        )
    return self.named(spec)

  def fitting(
    self, axes: Sequence[str | None], shape: Sequence[int], *, activations: bool = True
  ) -> PartitionSpec:
    """Return the partition of an array with these logical axes, without mesh axes whose size does
    not divide their dimension."""
    spec = self.table.spec(axes, activations=activations)
    fits = (e if size % self.parts(e) == 0 else None for size, e in zip(shape, spec, strict=True))
    return PartitionSpec(*fits)

  def parts(self, entry: str | Sequence[str] | None) -> int:
    """Return the number of shards of a dimension, given its entry of a partition."""
    return math.prod(self.mesh.shape[name] for name in _names(entry))

  @property
  def platform(self) -> str:
    """The platform of the devices."""
    return cast(Mesh, self.mesh).devices.flat[0].platform

  @property
  def batch(self) -> NamedSharding:
    """The NamedSharding of the arrays of a batch, whose axes are `batch` and `time`."""
    return self.named(self.table.spec(('batch', 'time'), activations=True))

  @property
  def batch_shards(self) -> int:
    """The number of shards of a batch; the global batch size must be a multiple."""
    return self.parts(self.batch.spec[0])

  @property
  def replicated(self) -> NamedSharding:
    """The NamedSharding of an array with a copy on every device."""
    return self.named(PartitionSpec())

  def named(self, spec: PartitionSpec) -> NamedSharding:
    """Return a partition as a sharding over the mesh."""
    return NamedSharding(cast(Mesh, self.mesh), spec)


def make_parallel(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Parallel:
  """Return the mesh of a config over `devices` (all by default), with its rules."""
  return Parallel(make_mesh(config, devices), config.rules)


# ---- the active mesh ---------------------------------------------------------------------------

_ACTIVE: contextvars.ContextVar[Parallel | None] = contextvars.ContextVar('parallel', default=None)


@contextlib.contextmanager
def use_mesh(parallel: Parallel | None) -> Generator[None]:
  """Activate a mesh: `shard` constrains activations, `per_shard` maps kernels over shards, and
  `platform` is that of the mesh's devices (of an abstract mesh, for tracing alone, the one that
  `assume_platform` names). None changes nothing."""
  if parallel is None:
    yield
    return
  token, mesh = _ACTIVE.set(parallel), parallel.mesh
  abstract = isinstance(mesh, AbstractMesh)
  try:
    with jax.sharding.use_abstract_mesh(mesh) if abstract else jax.set_mesh(mesh):
      yield
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


def platform_is_assumed() -> bool:
  """Whether `assume_platform` is in effect: the program is traced, and not run."""
  return _ASSUMED.get() is not None


def platform() -> str:
  """Return 'cpu', 'gpu' or 'tpu': the platform of the program that is being traced.

  An active mesh decides, so that a program that is compiled ahead of time for a TPU uses the TPU's
  implementations on any host.
  """
  active, assumed = _ACTIVE.get(), _ASSUMED.get()
  name = assumed or (active.platform if active else jax.default_backend())
  return 'gpu' if name in ('cuda', 'rocm') else name


def device_kind() -> str:
  """Return the `device_kind` of the devices of the program that is being traced, as `platform`
  finds them; '' where no devices are known, only a platform."""
  active = _ACTIVE.get()
  if _ASSUMED.get() or (active and isinstance(active.mesh, AbstractMesh)):
    return ''
  return (active.mesh.devices.flat[0] if active else jax.devices()[0]).device_kind


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
  """Constrain the sharding of activation `x` by its logical axes.

  A mesh axis whose size does not divide the dimension is left out: few key/value heads on a wide
  tensor axis stay replicated.
  """
  return _constrain(x, axes, activations=True)


def shard_param(x: jax.Array, *axes: str | None) -> jax.Array:
  """Constrain `x`, a parameter or its gradient inside a computation, like a parameter with these
  logical axes."""
  return _constrain(x, axes, activations=False)


def _constrain(x: jax.Array, axes: Sequence[str | None], activations: bool) -> jax.Array:
  active = _ACTIVE.get()
  if active is None:
    return x
  spec = active.fitting(axes, x.shape, activations=activations)
  return jax.lax.with_sharding_constraint(x, active.named(spec))


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
  params, activations = active.table.params, active.table.activations
  return any(active.parts(params[a]) > 1 for a in AXES if params[a] != activations[a])


def mesh_axes(axis: str, size: int) -> tuple[str, ...]:
  """Return the mesh axes over which a dimension of an activation is sharded.

  `axis` is its logical axis. Mesh axes of one device are left out. Inside `per_shard` these are the
  axes for collectives.
  """
  active = _ACTIVE.get()
  if active is None:
    return ()
  entry = active.fitting((axis,), (size,))[0]
  return tuple(n for n in _names(entry) if active.mesh.shape[n] > 1)


def shards(axis: str, size: int) -> int:
  """Return the number of shards of a dimension of an activation; 1 without a mesh."""
  active = _ACTIVE.get()
  return 1 if active is None else active.parts(mesh_axes(axis, size))


def all_mesh_axes() -> tuple[str, ...]:
  """Return the axes of the active mesh that have several devices."""
  active = _ACTIVE.get()
  return () if active is None else tuple(n for n, size in active.mesh.shape.items() if size > 1)


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
  if active is None or active.mesh.size == 1:
    return f
  parallel = active

  def mapped(*args):
    specs = [
      PartitionSpec() if axes is None or a is None else parallel.fitting(axes, a.shape)
      for axes, a in zip(in_axes, args, strict=True)
    ]
    taken = {
      name: entry
      for axes, spec in zip(in_axes, specs, strict=True)
      for name, entry in zip(axes or (), spec, strict=False)
      if name
    }
    out = tuple(PartitionSpec(*(taken.get(name) for name in axes)) for axes in out_axes)
    return jax.shard_map(
      f,
      mesh=parallel.mesh,
      in_specs=tuple(map(naming_single, specs, args)),
      out_specs=out if len(out) > 1 else out[0],
      check_vma=False,
    )(*args)

  def naming_single(spec: PartitionSpec, x: Any) -> PartitionSpec:
    """Name the mesh axes of one device too: gradients are summed over all axes that an argument
    does not name."""
    if x is None or not np.ndim(x):
      return spec
    first, *others = (*spec, *(None,) * (np.ndim(x) - len(spec)))
    named = {n for entry in spec for n in _names(entry)}
    single = (n for n, size in parallel.mesh.shape.items() if size == 1 and n not in named)
    return PartitionSpec((*_names(first), *single), *others)

  return mapped


# ---- parameters --------------------------------------------------------------------------------


def param(
  value: jax.Array,
  axes: Sequence[str | None],
  *,
  decay: bool = True,
  lr_scale: float = 1.0,
  learning_rate: float | None = None,
  full_precision: bool = False,
  matmul: bool = True,
  active: float = 1.0,
  uses: int = 1,
) -> nnx.Param:
  """Return a parameter with metadata for the optimizer, the planner and the sharding rules.

  Args:
    value: its initial value, fp32.
    axes: the logical axis of each dimension (`AXES`), None for one that is never sharded.
    decay: whether weight decay applies (not to norms, biases and the parameters of recurrences).
    lr_scale: factor on the learning rate; 0: not trained.
    learning_rate: at the peak of the schedule, whatever that of the run; None for that of the run.
    full_precision: stays fp32 where the others are cast to the compute dtype (decay rates,
      routers).
    matmul: multiplies every token, which costs 2 FLOPs per parameter; False for lookup tables.
      Without effect for vectors.
    active: the fraction that one token uses (k of E experts).
    uses: how often a token uses it: at how many depths of a stack.
  """
  axes = tuple(axes)
  if len(axes) != np.ndim(value):
    raise ValueError(
      f'a parameter of shape {np.shape(value)} needs {np.ndim(value)} axes, got {axes}'
    )
  check_axes(axes)
  return nnx.Param(
    value,
    axes=axes,
    decay=decay,
    lr_scale=lr_scale,
    learning_rate=learning_rate,
    full_precision=full_precision,
    matmul=matmul,
    active=active,
    uses=uses,
  )
