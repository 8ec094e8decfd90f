"""One set of weights at several depths: layers that share parameters with others of their stack."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaxformer.config import InputError
from jaxformer.layers.dense import Dense
from jaxformer.layers.init import FanInUniform, Init, Zeros
from jaxformer.layers.layer import (
  CommonConfig,
  Context,
  Layer,
  LayerConfig,
  LayerPosition,
  Memory,
  Output,
  State,
)
from jaxformer.layers.mlp import GatedMlp


class SharedLayer(CommonConfig):
  """A layer whose parameters the stack has once.

  Attributes:
    layer: the layer, initialized as at the bottom of the stack.
  """

  layer: LayerConfig

  def build(self, width: int, depth: int, rngs: nnx.Rngs) -> Layer:
    return self.layer.build(width, rngs, LayerPosition(depth=depth))


class Adapted:
  """y = dense(x) + (x A) B: a projection with a low-rank adapter (Hu et al. 2022, eq. 3)."""

  def __init__(self, dense: Dense, down: Dense, up: Dense):
    self.dense, self.down, self.up = dense, down, up
    self.dtype, self.kernel, self.bias = dense.dtype, dense.kernel, dense.bias

  def __call__(self, x: Float[Array, '*B D']) -> Float[Array, '*B F']:
    return self.dense(x) + self.up(self.down(x))


class Shared(Layer):
  """y = layer(x; W + A_l B_l) with one W for all depths l, and an adapter of low rank per depth
  (Dehghani et al. 2019, section 2.1; adapters: Glorioso et al. 2024, section 2).

  Every layer of a stack that shares by one name has the same W. Each has a state of its own."""

  layer: Layer  # once it is bound

  class Config(LayerConfig):
    """
    Attributes:
      layer: what is shared.
      name: layers that share by this name have one set of weights.
      rank: of the adapters; None for none.
      adapted: the projections of `layer` that have an adapter at each depth: dotted paths of
        `Dense` modules in it, as `gate` or `block.branches.0.layer.q`. Projections of one module
        that share A, as they have one input, are joined by a plus: `gate+up`.
      init: of A; B starts at 0.
    """

    layer: LayerConfig = GatedMlp.Config()
    name: str = 'shared'
    rank: int | None = None
    adapted: tuple[str, ...] = ()
    init: Init = FanInUniform()

    def validate(self):
      self.require_positive('rank')
      self.require(bool(self.name) and '.' not in self.name, 'name', 'a word without dots')
      problem = 'the projections that have adapters' if self.rank else 'none without a rank'
      self.require((self.rank is None) == (not self.adapted), 'adapted', problem)

    def resolved(self, width: int) -> Shared.Config:
      return self.replace(layer=self.layer.resolved(width))

    def common(self, width: int) -> dict[str, CommonConfig]:
      return {self.name: SharedLayer(layer=self.layer), **self.layer.common(width)}

    @property
    def decodes(self) -> bool:
      return self.layer.decodes

    @property
    def hands_over(self) -> bool:
      return self.layer.hands_over

    @property
    def expert_count(self) -> int:
      return self.layer.expert_count

    @property
    def experts_per_token(self) -> float:
      return self.layer.experts_per_token

    def out_width(self, width: int) -> int:
      return self.layer.out_width(width)

    def memory_width(self, width: int) -> int | None:
      return self.layer.memory_width(width)

    def reads(self, width: int) -> dict[str, int]:
      return self.layer.reads(width)

    @classmethod
    def examples(cls):
      mlp = GatedMlp.Config(hidden=24)
      return cls(layer=mlp), cls(layer=mlp, name='other', rank=3, adapted=('gate+up', 'down'))

    def mixing_flops_per_token(self, width, length, causal):
      return self.layer.mixing_flops_per_token(width, length, causal)

  def __init__(self, config: Shared.Config, width: int, rngs: nnx.Rngs, position: LayerPosition):
    self.config = config
    self.adapters = nnx.Dict()
    if config.rank is not None:
      shared = nnx.eval_shape(lambda: config.layer.build(width, nnx.Rngs(0), LayerPosition()))
      dense = functools.partial(Dense, rngs=rngs, position=position)
      for path in config.adapted:
        kernels = [_kernel(shared, *parents, name) for *parents, name in _projections(path)]
        ((inputs, axis), *others) = {(k.shape[0], k.get_metadata()['axes'][0]) for k in kernels}
        if others:
          raise InputError('Shared.adapted', path, 'projections that have one input')
        self.adapters[path.replace('.', '/')] = nnx.List(
          [
            dense(config.init, (inputs, config.rank), (axis, None)),
            *(
              dense(Zeros(), (config.rank, k.shape[1]), (None, k.get_metadata()['axes'][1]))
              for k in kernels
            ),
          ]
        )

  def bind(self, common: Mapping[str, Any], index: int | Array) -> None:
    layer = jax.tree.map(
      lambda v: v, common[self.config.name], is_leaf=lambda v: isinstance(v, nnx.Variable)
    )
    layer.bind(common, index)
    for path, (down, *ups) in self.adapters.items():
      for (*parents, name), up in zip(_projections(path.replace('/', '.')), ups, strict=True):
        parent = functools.reduce(_part, parents, layer)
        vars(parent)[name] = Adapted(getattr(parent, name), down, up)
    vars(self)['layer'] = layer

  def init_state(self, batch: int, max_len: int, memory: Memory | None = None) -> State:
    return self.layer.init_state(batch, max_len, memory)

  def select_rows(self, state, index, same_source=False) -> State:
    return self.layer.select_rows(state, index, same_source)

  def handed_over(self, state: State) -> State:
    return self.layer.handed_over(state)

  def __call__(self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: State = None) -> Output:
    return self.layer(x_BTD, ctx, state)

  def step(self, x_BD: Float[Array, 'B D'], ctx: Context, state: State) -> Output:
    return self.layer.step(x_BD, ctx, state)


def _projections(path: str) -> list[list[str]]:
  """The names on the way to each projection of a path."""
  *parents, names = path.split('.')
  return [[*parents, name] for name in names.split('+')]


def _part(module: Any, name: str) -> Any:
  """A part of a module, or of a list by its index; None where there is none."""
  if isinstance(module, nnx.List):
    return module[int(name)] if name.isdecimal() and int(name) < len(module) else None
  return getattr(module, name, None)


def _kernel(layer: Any, *path: str) -> nnx.Param:
  """The kernel of a projection. Raises `InputError` where there is none."""
  found = functools.reduce(_part, path, layer)
  if not isinstance(found, Dense):
    known = [n for n, v in vars(layer).items() if isinstance(v, Dense)]
    accepted = f'a projection of the layer: {", ".join(known)}, ...'
    raise InputError('Shared.adapted', '.'.join(path), accepted)
  return found.kernel
