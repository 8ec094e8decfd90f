"""A model as a pure function of a flat dictionary of arrays.

Modules are built once to learn their structure; training, checkpoints and weight conversion see
`{name: array}`, which costs the least to dispatch, reads well in a checkpoint, and needs no library
to walk. `Definition.merge` turns it into a module again, inside a jitted function."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jaxformer.config import InputError, whole_numbers
from jaxformer.memory import check_fits
from jaxformer.sharding import Parallel

Params = dict[str, Array]
M_co = TypeVar('M_co', bound=nnx.Module, covariant=True)


@dataclasses.dataclass(frozen=True)
class ParamInfo:
  """A parameter without its value; the fields after `dtype` are those of
  `jaxformer.sharding.param`."""

  shape: tuple[int, ...]
  dtype: Any
  axes: tuple[str | None, ...]
  decay: bool
  lr_scale: float
  full_precision: bool
  matmul: bool
  active: float
  learning_rate: float | None = None
  uses: int = 1

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def matrix_axes(self) -> tuple[str | None, ...]:
    """The axes of one layer's parameter: without those over which independent ones are stacked."""
    return tuple(a for a in self.axes if a not in ('layers', 'experts'))


@dataclasses.dataclass(frozen=True, eq=False)
class Definition(Generic[M_co]):
  """The structure of a model, without arrays: enough to initialize it, run it and compute its cost.

  Definitions compare by identity, so that one can be a static argument of a jitted function;
  `define` returns the same one for the same config.

  Attributes:
    config: of the model or layer that was built.
    info: every parameter by name, in a fixed order.
  """

  config: Any
  info: dict[str, ParamInfo]
  _graph: Any = dataclasses.field(repr=False)
  _tree: Any = dataclasses.field(repr=False)

  def merge(self, params: Params) -> M_co:
    """The module with these values for parameters."""
    return nnx.merge(
      self._graph, jax.tree.unflatten(self._tree, [params[name] for name in self.info])
    )

  def init(self, key: Array, parallel: Parallel | None = None) -> Params:
    """Initialize the parameters; on a mesh directly with their sharding, and equal to those of one
    device. Raises `InputError` for more than fit the memory of a device."""
    needed = sum(
      i.dtype.itemsize
      * math.prod(i.shape if a.sharding is None else a.sharding.shard_shape(i.shape))
      for i, a in zip(self.info.values(), self.abstract(parallel).values(), strict=True)
    )
    check_fits(
      needed, 'params', self.size, f'{self.size:,} parameters', 'a smaller model, or more devices'
    )
    where = None if parallel is None else tuple(self.shardings(parallel).values())
    return dict(zip(self.info, _initialiser(self, where)(key), strict=True))

  def shardings(self, parallel: Parallel) -> dict[str, jax.sharding.NamedSharding]:
    """The sharding of each parameter. Raises `InputError` for a mesh axis that does not divide a
    dimension."""
    return {name: parallel.param(name, i.axes, i.shape) for name, i in self.info.items()}

  def abstract(
    self, parallel: Parallel | None = None, dtype: Any = None
  ) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes (with `dtype`, those of `cast`) and, with a mesh, shardings."""
    where = dict.fromkeys(self.info) if parallel is None else self.shardings(parallel)
    return {
      name: jax.ShapeDtypeStruct(
        i.shape, i.dtype if dtype is None or i.full_precision else dtype, sharding=where[name]
      )
      for name, i in self.info.items()
    }

  def cast(self, params: Params, dtype: Any) -> Params:
    """The parameters in the compute dtype, those marked `full_precision` left in fp32."""
    return {
      name: p if self.info[name].full_precision else p.astype(dtype) for name, p in params.items()
    }

  @property
  def size(self) -> int:
    """The number of parameters, exactly."""
    return sum(i.size for i in self.info.values())

  @property
  def active_size(self) -> int:
    """The number of parameters that one token uses: of a mixture, only those of its experts."""
    return sum(round(i.size * i.active) for i in self.info.values())


class _Stream(nnx.RngStream):
  """The keys of `nnx.RngStream`. Its count is set as a whole: NNX compares shardings where it is
  set by index, which tracers of jax 0.10 answer slowly enough to double the time of a trace."""

  def __call__(self) -> Array:
    count = self.count[...]
    self.count.set_value(count + 1)
    return jax.random.fold_in(self.key[...], count)


def _rngs(key: Array) -> nnx.Rngs:
  rngs: Any = nnx.Rngs()
  rngs.params = _Stream(key, tag='params')
  return rngs


def options_for_one_call(device: jax.Device) -> dict[str, int] | None:
  """Options of the compiler for a program that runs once or twice: on a CPU without LLVM's
  optimizations, since for a small model compiling it takes as long as some ten training steps."""
  return {'xla_backend_optimization_level': 0} if device.platform == 'cpu' else None


@functools.lru_cache(maxsize=64)
def _initialiser(
  definition: Definition, where: tuple[jax.sharding.NamedSharding, ...] | None
) -> Callable[[Array], tuple[Array, ...]]:
  """Compiled once for all keys."""
  device = jax.devices()[0] if where is None else next(iter(where[0].device_set))
  options = options_for_one_call(device)

  def values(key: Array) -> tuple[Array, ...]:
    return tuple(jax.tree.leaves(nnx.split(definition.config.build(_rngs(key)))[1]))

  return jax.jit(values, out_shardings=where, compiler_options=options)


@functools.lru_cache(maxsize=64)
def define(config: Any) -> Definition[Any]:
  """The structure of the config of a model or a layer, which has `build(rngs)`, found from abstract
  shapes: no parameter is allocated, at any size. Raises `InputError` for sizes that no array can
  have."""
  for path, number in whole_numbers(config):
    if abs(number) >= 2**31:
      raise InputError(path, number, 'below 2^31, as the sizes of arrays are')
  graph, state = nnx.split(nnx.eval_shape(lambda: config.build(_rngs(jax.random.key(0)))))
  info = {}
  for path, variable in nnx.to_flat_state(state):
    meta = variable.get_metadata()
    # shape and dtype come first
    fields = {f.name: meta[f.name] for f in dataclasses.fields(ParamInfo)[2:]}
    info['.'.join(map(str, path))] = ParamInfo(variable.shape, variable.dtype, **fields)
  return Definition(config, info, graph, jax.tree.structure(state))


def stacked(build: Any, count: int, rngs: nnx.Rngs, first: int, stride: int) -> Any:
  """`count` modules made by `build(rngs, layer)` as one whose parameters have a leading `layers`
  axis.

  `layer` is traced: `first`, `first + stride`, ...
  """
  graphs = []  # of the one trace: tracing takes nearly all of the time of `define`

  def state(key: Array, layer: Array):
    graph, values = nnx.split(build(_rngs(key), layer))
    graphs.append(graph)
    return values

  values = jax.vmap(state)(
    jax.random.split(rngs.params(), count), first + stride * jnp.arange(count)
  )
  values = jax.tree.map(
    lambda v: v.replace(axes=('layers', *v.get_metadata()['axes'])),
    values,
    is_leaf=lambda v: isinstance(v, nnx.Variable),
  )
  return nnx.merge(graphs[0], values)
