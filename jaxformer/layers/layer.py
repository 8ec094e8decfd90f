"""The interface of every layer, and the legend of dimensions. Read this file first.

A layer maps a sequence to a sequence. Attention, recurrences, feed-forward layers and mixtures of
experts share this interface, so a block is a tuple of layers and a model is data. What a layer
carries from one call to the next is its *state*: a small typed pytree, an argument and a result. No
module holds a cache, and there is no decode flag.

Dimensions, one legend for the package. Arrays whose shape is not obvious carry it as a suffix
(`q_BTHK`):

  B batch    T time            S source or cache length   D width       H heads
  G key/value heads            K head dim                 F hidden      E experts
  N state    V vocabulary      C chunk, or channels of sources, values   P periods   L layers

The contract, checked for every registered layer by `jaxformer.testing.contract` and by
`tests/contract`:

- *Causality.* `layer(x_BTD, ctx)` is causal unless `config.decodes` is False, and gives the same on
  every mesh.
- *State.* `layer(x_BTD, ctx, state)` continues from `state`; `init_state` is the state before the
  first token. A sequence cut anywhere gives the same outputs and the same final state. `step` is
  the call for one token. No call changes the shapes or dtypes of a state.
- *Packed documents.* Where `ctx.segments_BT` changes along a row a new document starts, and nothing
  crosses the border; ids have no other meaning. The first token of a call always continues the
  document of the state.
- *Rows.* No row of a batch depends on the others.
- *Numbers.* Gradients are those of what is computed. In bfloat16 no error grows with the length:
  sums over time are fp32.
- *Encoder-decoders.* `init_state(batch, max_len, memory)` puts into the state what the layer needs
  of the encoder; steps then need the memory no more. Without a state a layer reads `ctx.memory`.
- *Values beside the output* are returned, never stored: `Output.aux` holds scalars (losses and
  diagnostics), `Output.share` holds arrays that later layers read from `ctx.shared`.
- *Parts in common*: a module that several layers of a stack share belongs to the stack. A layer
  names it in `config.common`, and gets it by `bind` before each call.
- *Randomness* comes from `ctx.dropout_key` alone. `ctx.fold(i)` gives part `i` of a layer, block or
  stack a key of its own; without a key nothing is dropped.
- *Costs.* `config.mixing_flops_per_token` agrees with what the layer does.

To add a layer, write one file: a `Layer` with its `Config` nested in it. The first paragraph of the
class's docstring is its formula followed by its source in parentheses (`layer_summary`).
`Config.examples()` are the configs that the contract suite runs.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxformer.config import Config, InputError

State = Any
STACK_INPUT = 'stack_input'
"""The name in `Context.shared` of the input of the stack, for layers that declare to read it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
  """What a decoder reads of an encoder.

  Attributes:
    y_BSC: the encoder's output at each position of the source.
    mask_BS: True at tokens, False at padding.
    states: final states of the encoder's layers, by block from the bottom up; () where the decoder
      does not start from them.
    state: of `states`, that of the encoder layer in the same position as the layer which reads
      this; None if there is none. `Stack` and `Block` select it.
  """

  y_BSC: Float[Array, 'B S C']
  mask_BS: Bool[Array, 'B S']
  states: tuple[tuple[State, ...], ...] = ()
  state: State = None

  def replace(self, **changes: Any) -> Memory:
    return dataclasses.replace(self, **changes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
  """Inputs that several layers of a model need besides the sequence itself.

  Attributes:
    segments_BT: the packed document that each position belongs to; a change marks a border. None:
      each row is one document.
    dropout_key: randomness for dropout; None for no dropout.
    shared: values of earlier layers by name (`Output.share`).
    memory: what a decoder reads besides its own tokens; None in a decoder-only model, and where
      states hold what is needed of it.
    align: whether layers that attend to the memory return their weights (`Output.alignments`).
    fresh: the states given are those of `init_state`: nothing precedes this call. Attention may
      then use the kernels that need keys and queries at the same positions. Results do not depend
      on it.
    compute_dtype: dtype in which layers get the residual stream; None for that of the stream.
    remat: name of the policy of `models.stack.REMAT` by which activations are recomputed in the
      backward pass.
    unroll: whether stacked periods run as a Python loop rather than a scan; None: whichever is
      faster.
  """

  segments_BT: Int[Array, 'B T'] | None = None
  dropout_key: Array | None = None
  shared: dict[str, Array] = dataclasses.field(default_factory=dict)
  memory: Memory | None = None
  align: bool = dataclasses.field(default=False, metadata={'static': True})
  fresh: bool = dataclasses.field(default=False, metadata={'static': True})
  compute_dtype: Any = dataclasses.field(default=None, metadata={'static': True})
  remat: str = dataclasses.field(default='none', metadata={'static': True})
  unroll: bool | None = dataclasses.field(default=None, metadata={'static': True})

  def replace(self, **changes: Any) -> Context:
    return dataclasses.replace(self, **changes)

  def starts(self, x_BTD: Float[Array, 'B T D']) -> Bool[Array, 'B T']:
    """Return True where a packed document starts in a sequence (`starts_BT`)."""
    return starts_BT(self.segments_BT, *x_BTD.shape[:2])

  def positions(
    self, x_BTD: Float[Array, 'B T D'], offset_B: Int[Array, ' B'] | None = None
  ) -> Int[Array, 'B T']:
    """Return the position of each token within its document (`positions_BT`)."""
    return positions_BT(self.segments_BT, *x_BTD.shape[:2], offset_B)

  def fold(self, i: int | Array) -> Context:
    """Return the context for part `i` of several, with a dropout key of its own."""
    if self.dropout_key is None:
      return self
    return self.replace(dropout_key=jax.random.fold_in(self.dropout_key, i))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
  """Result of a layer.

  Attributes:
    y: the output, shaped like the input.
    state: the state after the last token if a state was given, else None.
    aux: scalars by name. Those whose name starts with `loss/` are added to the training loss,
      summed over layers; others are diagnostics, which a stack returns as a vector over its layers
      and a training run logs as mean, minimum and maximum. A pair of vectors `[1, 2, n]`, named
      `pooled/NAME/...`, is part of a loss of all layers: a stack averages each vector over the
      layers that return the name, and adds the inner product to `loss/NAME`.
    share: values for all later layers (`Context.shared`).
    alignments: if `Context.align`, the attention weights `[B, T, S]` of each layer that attends to
      the memory, averaged over its heads.
  """

  y: Array
  state: State = None
  aux: dict[str, Array] = dataclasses.field(default_factory=dict)
  share: dict[str, Array] = dataclasses.field(default_factory=dict)
  alignments: tuple[Array, ...] = ()


@dataclasses.dataclass(frozen=True)
class LayerPosition:
  """Where in a model a layer is built; published initializations depend on it.

  Attributes:
    index: index of the layer's block in the stack; traced where blocks are built stacked.
    depth: number of blocks in the stack.
    branches: number of residual branches in the stack (two per block in a transformer).
  """

  index: int | Array = 0
  depth: int = 1
  branches: int = 1


class Layer(nnx.Module):
  """Base of all layers. Override `__call__`; override `init_state` if there is a state, and `step`
  if one token has a cheaper form.

  A `Config` nested in a subclass builds that subclass, `Subclass(config, width, rngs, position)`,
  unless it overrides `build`.

  Attributes:
    common: modules of the stack by name, once they are bound (`bind`).
    index: of the layer's block in the stack, likewise.
  """

  common: Mapping[str, Any]
  index: int | Array

  def __init_subclass__(cls, **kwargs: Any):
    super().__init_subclass__(**kwargs)
    if 'Config' in cls.__dict__:
      cls.__dict__['Config'].layer_class = cls

  def init_state(self, batch: int, max_len: int, memory: Memory | None = None) -> State:
    """Return the state before the first token, for sequences of up to `max_len` tokens; `()` for a
    layer without a state.

    In a decoder, `memory` is what the encoder made of the source, and `memory.state` the final
    state of the encoder layer in the same position, or None."""
    return ()

  def select_rows(self, state: State, index: Int[Array, ' N'], same_source: bool = False) -> State:
    """Return the state of the rows `index` of a batch, as beam search reorders hypotheses.

    With `same_source`, each row is replaced by one with the same source, so what a state holds of
    the source stays as it is. By default every array that is not a scalar has the batch first."""
    return jax.tree.map(lambda x: x if x.ndim == 0 else jnp.take(x, index, axis=0), state)

  def bind(self, common: Mapping[str, Any], index: int | Array) -> None:
    """Take the modules of the stack that `config.common` names, before states are made or sequences
    read. `index` is that of the layer's block in the stack; traced where blocks are scanned.

    Called on a copy of the layer within one trace: what is bound is no parameter of the layer. A
    layer that contains layers binds these."""
    vars(self)['common'], vars(self)['index'] = common, index

  def handed_over(self, state: State) -> State:
    """Of a final state in an encoder, what the decoder layer in the same position starts from."""
    return state

  def __call__(self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: State = None) -> Output:
    """Run on a sequence; with a state, continue from it."""
    raise NotImplementedError

  def step(self, x_BD: Float[Array, 'B D'], ctx: Context, state: State) -> Output:
    """Run on one token."""
    out = self(x_BD[:, None], ctx, state)
    return dataclasses.replace(out, y=out.y[:, 0])


class CommonConfig(Config, abstract=True):
  """Base of what several layers of a stack have in common: one set of parameters, used at several
  depths."""

  def build(self, width: int, depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """Make the module, for layers with inputs of `width` in a stack of `depth` blocks."""
    raise NotImplementedError


class LayerConfig(Config, abstract=True):
  """Base of all layer configs. The type of a config selects the class that `build` constructs."""

  layer_class: ClassVar[type[Any]] = Layer

  def build(self, width: int, rngs: nnx.Rngs, position: LayerPosition) -> Layer:
    """Construct the layer for inputs of `width`, initialized as published for its position."""
    return self.layer_class(self, width, rngs, position)

  def resolved(self, width: int) -> Self:
    """Return the config with every size that None derives from the width spelt out."""
    return self

  @property
  def decodes(self) -> bool:
    """Whether the layer is causal, so that it can continue from a state and decode."""
    return True

  @property
  def hands_over(self) -> bool:
    """Whether a decoder layer can start from this layer's final state."""
    return False

  @property
  def expert_count(self) -> int:
    """Number of experts that a mesh axis may shard; 0 for a layer without any."""
    return 0

  @property
  def experts_per_token(self) -> float:
    """Mean number of experts that each token is sent to."""
    return 0

  def out_width(self, width: int) -> int:
    """Width of the output for inputs of `width`."""
    return width

  def memory_width(self, width: int) -> int | None:
    """Width of the encoder's output that the layer reads; None for a layer that reads none."""
    return None

  def reads(self, width: int) -> dict[str, int]:
    """Values of earlier layers that the layer reads (`Context.shared`): name -> channels C of a
    value `[B, T, C]`."""
    return {}

  def common(self, width: int) -> dict[str, CommonConfig]:
    """Modules that the layer has in common with others of its stack, by name. Layers that use one
    name must mean equal configs at equal widths."""
    return {}

  def state_size(self, width: int, max_len: int) -> int:
    """Number of elements in the state of one sequence of up to `max_len` tokens, not counting
    integers; a source has `max_len` tokens too. Found from the shapes of `init_state`."""
    return sum(leaf.size for leaf in _abstract_state(self, width, max_len))

  def state_bytes(self, width: int, max_len: int) -> int:
    """Bytes of the same state in a program that computes in bfloat16: keys and values take 2 bytes
    each, what a recurrence accumulates in fp32 takes 4. Found from the dtypes of `init_state`."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in _abstract_state(self, width, max_len))

  @classmethod
  def examples(cls) -> tuple[LayerConfig, ...]:
    """Small configs for width 32 that together use every setting: what the contract suite runs."""
    return (cls(),)

  def mixing_flops_per_token(self, width: int, length: int, causal: bool) -> float:
    """Forward FLOPs per token that are no products with parameters (attention scores, recurrences),
    averaged over a sequence of `length`.

    `causal` counts only the pairs that a causal mask lets through; otherwise every pair, the usual
    convention."""
    return 0.0

  def quotient(self, size: int, field: str, of: str = 'width') -> int:
    """Return `size` over the value of `field`; raise `InputError` if it is no divisor."""
    self.require(size % getattr(self, field) == 0, field, f'a divisor of {of} = {size}')
    return size // getattr(self, field)


@functools.lru_cache(maxsize=1024)
def _abstract_state(
  config: LayerConfig, width: int, max_len: int
) -> tuple[jax.ShapeDtypeStruct, ...]:
  """The floating arrays of the state of one sequence, of a layer with parameters in bfloat16."""

  def cast(variable: nnx.Variable) -> nnx.Variable:
    value, kept = variable.get_value(), variable.get_metadata().get('full_precision', False)
    floating = jnp.issubdtype(value.dtype, jnp.floating)
    return variable.replace(value.astype(jnp.bfloat16)) if floating and not kept else variable

  def state() -> State:
    source_width, memory = config.memory_width(width), None
    if source_width is not None:
      source = jnp.zeros((1, max_len, source_width), jnp.bfloat16)
      memory = Memory(source, jnp.ones((1, max_len), bool))
    graph, values = nnx.split(build_alone(config, width, nnx.Rngs(params=0), LayerPosition()))
    values = jax.tree.map(cast, values, is_leaf=lambda v: isinstance(v, nnx.Variable))
    return nnx.merge(graph, values).init_state(1, max_len, memory)

  leaves = jax.tree.leaves(jax.eval_shape(state))
  return tuple(leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))


class _Alone(Layer):
  """A layer outside a stack, with the modules that it would have in common with others."""

  def __init__(self, config: LayerConfig, width: int, rngs: nnx.Rngs, position: LayerPosition):
    self.layer = config.build(width, rngs, position)
    parts = config.common(width)
    self.parts = nnx.Dict({n: c.build(width, position.depth, rngs) for n, c in parts.items()})
    self.position = position.index

  def _bound(self) -> Layer:
    return bound([self.layer], self.parts, self.position)[0]

  def init_state(self, batch, max_len, memory=None) -> State:
    return self._bound().init_state(batch, max_len, memory)

  def select_rows(self, state, index, same_source=False) -> State:
    return self._bound().select_rows(state, index, same_source)

  def __call__(self, x_BTD, ctx, state=None) -> Output:
    return self._bound()(x_BTD, ctx, state)

  def step(self, x_BD, ctx, state) -> Output:
    return self._bound().step(x_BD, ctx, state)


def build_alone(config: LayerConfig, width: int, rngs: nnx.Rngs, position: LayerPosition) -> Layer:
  """Build a layer that is in no stack: with parts of its own for what it would have in common with
  others."""
  if not config.common(width):
    return config.build(width, rngs, position)
  return _Alone(config, width, rngs, position)


def bound(parts: Any, common: Mapping[str, nnx.Module], first: int | Array) -> Any:
  """Return a copy of layers or blocks in which each has the modules of `common` (`Layer.bind`).
  Their indices in the stack are `first`, `first + 1`, ..."""
  parts = jax.tree.map(lambda v: v, parts, is_leaf=lambda v: isinstance(v, nnx.Variable))
  for i, part in enumerate(parts):
    part.bind(common, first + i)
  return parts


def layer_summary(config: LayerConfig) -> tuple[str, str]:
  """Return formula and source of a layer, for people: the formula in one line, and the paper with
  section or equation.

  They are the first paragraph of its class's docstring: the formula, then the source in the last
  parentheses. Either is '' if it is not there."""
  first = ' '.join((config.layer_class.__doc__ or '').strip().split('\n\n')[0].split())
  found = re.fullmatch(r'(.*?)\s*\((\D[^()]*\d{4}[^()]*)\)\.?', first)
  return (found[1], found[2]) if found else (first.removesuffix('.'), '')


# ---- what layers share ------------------------------------------------------------------------


def required(memory: Memory | None, layer: str) -> Memory:
  """Return the memory that a layer reads. Raises `InputError` if there is none."""
  if memory is None:
    raise InputError(f'{layer}: reads the output of an encoder, which only an encoder-decoder has')
  return memory


def starts_BT(segments_BT: Int[Array, 'B T'] | None, batch: int, length: int) -> Bool[Array, 'B T']:
  """Return True where a packed document starts. The first position is False: it continues the
  incoming state."""
  if segments_BT is None:
    return jnp.zeros((batch, length), bool)
  return jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)))


def positions_BT(
  segments_BT: Int[Array, 'B T'] | None,
  batch: int,
  length: int,
  offset_B: Int[Array, ' B'] | None = None,
) -> Int[Array, 'B T']:
  """Return the position of each token within its document; `offset_B` tokens of the first token's
  document precede the call."""
  B, T = batch, length
  index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
  first = jnp.zeros((B,), jnp.int32) if offset_B is None else -offset_B.astype(jnp.int32)
  began = jnp.broadcast_to(first[:, None], (B, T))
  if segments_BT is not None:
    began = jax.lax.cummax(jnp.where(starts_BT(segments_BT, B, T), index, began), axis=1)
  return index - began


def take_positions(x: Array, index_BT: Int[Array, 'B T']) -> Array:
  """Return the positions `index_BT` of each row of x, `[B, T, ...]`."""
  return jnp.take_along_axis(x, index_BT.reshape(*index_BT.shape, *(1,) * (x.ndim - 2)), axis=1)


def merge_aux(a: dict[str, Array], b: dict[str, Array]) -> dict[str, Array]:
  """Merge the auxiliary values of two parts, b after a: losses (`loss/...`) are added, others
  become an array with an entry for every layer that returns the name."""

  def both(name: str, v: Array) -> Array:
    if name.startswith('loss/'):
      return a[name] + v if name in a else v
    v = jnp.atleast_1d(v)
    return jnp.concatenate([a[name], v]) if name in a else v

  return a | {name: both(name, v) for name, v in b.items()}


def dropout(x: Array, rate: float, ctx: Context, *, tied: bool = False) -> Array:
  """Zero each element with probability `rate` and scale the rest by 1 / (1 - rate) (Srivastava et
  al. 2014), if `ctx` has a key. With `tied`, the elements are the channels of each row, over all of
  its positions on axis 1."""
  if rate == 0.0 or ctx.dropout_key is None:
    return x
  shape = (x.shape[0], 1, *x.shape[2:]) if tied else x.shape
  keep = jax.random.bernoulli(ctx.dropout_key, 1.0 - rate, shape)
  return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))
