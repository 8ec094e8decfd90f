"""The one face of every layer, and the legend of dimensions. Read this file first.

A layer maps a sequence to a sequence. Attention, recurrences, feed-forward layers and mixtures of
experts all have this face, so a block is a tuple of layers and a model is data. What a layer
remembers from one call to the next is its *state*: a small typed pytree that goes in as an argument
and comes out in the result. No module holds a cache, and there is no decode flag.

Names of dimensions, one legend for the package; arrays whose shape is not plain carry them as a
suffix (`q_BTHK`):

  B batch   T time   S source or cache length   D width   H heads   G key/value heads   K head dim
  F hidden E experts   N state   V vocabulary   C chunk   P periods   L layers

The contract, checked for every layer by `tests/contract`:

- `layer(x_BTD, ctx)` is causal unless the config says otherwise, and the same on any mesh.
- `layer(x_BTD, ctx, state)` continues from `state`; `init_state` is the state before the first
  token. A sequence cut anywhere gives the same outputs and the same final state. `step` is that for
  one token.
- Where `ctx.segments_BT` changes along a row, a new document begins and nothing is carried over.
  The first token of a call always continues what the state holds.
- In an encoder-decoder, `init_state(..., memory)` puts into the state what the layer needs of the
  encoder; steps need the memory no more. Without a state a layer finds the memory in `ctx.memory`.
- Shapes of states do not depend on what was fed in.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxformer.config import Config, InputError

State = Any


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
  """What several layers of a model need beside their input.

  Attributes:
    segments_BT: which packed document each position belongs to; changes mark the borders. None:
      each row is one document.
    dropout_key: randomness for dropout; None where nothing is dropped.
    shared: values of earlier layers by name (`Output.share`).
    memory: what a decoder reads beside its own tokens; None in a decoder-only model, and where
      states hold what is needed of it.
    align: whether layers that attend to the memory return their weights (`Output.alignments`).
    fresh: the states given are those of `init_state`: nothing came before this call. Attention may
      then use the kernels that need keys and queries at the same positions. It changes no result.
    remat: name of the policy of `models.stack.REMAT` by which activations are recomputed in the
      backward pass.
    unroll: whether stacked periods run as a Python loop rather than a scan; None: where it pays.
  """

  segments_BT: Int[Array, 'B T'] | None = None
  dropout_key: Array | None = None
  shared: dict[str, Array] = dataclasses.field(default_factory=dict)
  memory: Memory | None = None
  align: bool = dataclasses.field(default=False, metadata={'static': True})
  fresh: bool = dataclasses.field(default=False, metadata={'static': True})
  remat: str = dataclasses.field(default='none', metadata={'static': True})
  unroll: bool | None = dataclasses.field(default=None, metadata={'static': True})

  def replace(self, **changes: Any) -> Context:
    return dataclasses.replace(self, **changes)

  def fold(self, i: int | Array) -> Context:
    """The context of part `i` of something that has several: each part drops its own units."""
    return (
      self
      if self.dropout_key is None
      else self.replace(dropout_key=jax.random.fold_in(self.dropout_key, i))
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
  """What a layer returns.

  Attributes:
    y: like the input.
    state: the state after the last token where a state was given, else None.
    aux: scalars by name. One whose name starts with `loss/` is added to the training loss, over all
      layers; others are diagnostics, of which a stack gives a vector over its layers, and a
      training its mean, least and largest.
    share: values for all later layers.
    alignments: where `Context.align`, of each layer that attends to the memory its weights `[B, T,
      S]`, the mean over its heads.
  """

  y: Array
  state: State = None
  aux: dict[str, Array] = dataclasses.field(default_factory=dict)
  share: dict[str, Array] = dataclasses.field(default_factory=dict)
  alignments: tuple[Array, ...] = ()


@dataclasses.dataclass(frozen=True)
class LayerPosition:
  """Where in a model a layer is built; official initialisations depend on it.

  Attributes:
    index: index of the layer's block, counted through the whole stack; traced where blocks are
      built stacked.
    depth: number of blocks in the stack.
    branches: number of residual branches in the stack (two a block in a transformer).
  """

  index: int | Array = 0
  depth: int = 1
  branches: int = 1


class Layer(nnx.Module):
  """Base of all layers. Override `__call__`; override `init_state` where there is a state, and
  `step` where one token has a cheaper form."""

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

  def handed_over(self, state: State) -> State:
    """Of a final state in an encoder, what the decoder layer in the same position starts from."""
    return state

  def __call__(self, x_BTD: Float[Array, 'B T D'], ctx: Context, state: State = None) -> Output:
    """A whole sequence; with a state, the sequence that continues from it."""
    raise NotImplementedError

  def step(self, x_BD: Float[Array, 'B D'], ctx: Context, state: State) -> Output:
    """One token."""
    out = self(x_BD[:, None], ctx, state)
    return dataclasses.replace(out, y=out.y[:, 0])


class LayerConfig(Config, abstract=True):
  """Base of all layer configs. The type selects the class: `build` constructs it."""

  def build(self, width: int, rngs: nnx.Rngs, position: LayerPosition) -> Layer:
    """The layer for inputs of `width`, with official initial values for its place in the model."""
    raise NotImplementedError

  @property
  def decodes(self) -> bool:
    """Whether the layer is causal, so that it can continue from a state and decode."""
    return True

  @property
  def expert_count(self) -> int:
    """Number of experts that a mesh axis may shard; 0 for a layer without any."""
    return 0

  @property
  def experts_per_token(self) -> float:
    """Mean number of experts that each token is sent to."""
    return 0

  @property
  def hands_over(self) -> bool:
    """Whether a decoder layer can start from this layer's final state."""
    return False

  def out_width(self, width: int) -> int:
    """The width of the output for inputs of `width`."""
    return width

  def memory_width(self, width: int) -> int | None:
    """The width of the encoder's output that the layer reads; None for a layer that reads none."""
    return None

  def reads(self, width: int) -> dict[str, int]:
    """What the layer needs of earlier layers (`Context.shared`): name -> channels C of a value `[B,
    T, C]`."""
    return {}

  def state_size(self, width: int, max_len: int) -> int:
    """How many numbers of state one sequence of up to `max_len` tokens needs, counters aside; a
    source has `max_len` tokens too."""
    return 0

  @classmethod
  def examples(cls) -> tuple[LayerConfig, ...]:
    """Small configs for width 32 that between them use every setting: what the contract suite
    runs."""
    return (cls(),)

  def mixing_flops_per_token(self, width: int, length: int, causal: bool) -> float:
    """Forward FLOPs a token that are no products with parameters: scores and recurrences, averaged
    over a sequence of `length`.

    `causal` counts only the pairs that a causal mask lets through; otherwise the full convention,
    every pair."""
    return 0.0


# ---- documents in a row ------------------------------------------------------------------------


def required(memory: Memory | None, layer: str) -> Memory:
  """Return the memory that a layer reads. Raises `InputError` if there is none."""
  if memory is None:
    raise InputError(f'{layer}: reads the output of an encoder, which only an encoder-decoder has')
  return memory


def starts_BT(segments_BT: Int[Array, 'B T'] | None, batch: int, length: int) -> Bool[Array, 'B T']:
  """True where a packed document begins. The first position is False: there the incoming state
  decides."""
  if segments_BT is None:
    return jnp.zeros((batch, length), bool)
  return jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)))


def positions_BT(
  starts: Bool[Array, 'B T'], offset_B: Int[Array, ' B'] | None = None
) -> Int[Array, 'B T']:
  """The position of each token within its document; the document of the first token has already had
  `offset_B` tokens."""
  B, T = starts.shape
  index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
  first = jnp.zeros((B,), jnp.int32) if offset_B is None else -offset_B.astype(jnp.int32)
  began = jnp.where(starts, index, jnp.broadcast_to(first[:, None], (B, T)))
  return index - jax.lax.cummax(began, axis=1)


def dropout(x: Array, rate: float, ctx: Context) -> Array:
  """Zeroes each number with probability `rate` and scales the rest by 1 / (1 - rate) (Srivastava et
  al. 2014), where `ctx` has a key."""
  if rate == 0.0 or ctx.dropout_key is None:
    return x
  keep = jax.random.bernoulli(ctx.dropout_key, 1.0 - rate, x.shape)
  return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))
