"""What the checks of the contract run: a layer or a model with parameters and compiled calls,
inputs and documents, and comparisons that say where two results differ."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxformer.config import Config
from jaxformer.layers.layer import Context, LayerConfig, LayerPosition, Memory, Output, build_alone
from jaxformer.models.params import Definition, define
from jaxformer.sharding import platform

WIDTH, BATCH, LENGTH = 32, 8, 20  # longer than what operations treat as a short decode
# Long sequences, of a few rows. An implementation in chunks of 16, 32, 64, 128 or 256 tokens has
# several of them in either; WHOLE is a multiple of each, TAIL of none. LONG_DOCUMENTS are twice
# TAIL: some start at the border of a chunk, next to one or inside one; one is longer than a chunk.
ROWS, WHOLE, TAIL = 2, 512, 300
LONG_DOCUMENTS = 64, 1, 107, 84, 344
# relative tolerances, of the largest magnitude of what is compared
OUTPUTS, GRADIENTS = 1e-5, 1e-4


class Alone(Config):
  """A single layer as a model, for `define`."""

  layer: LayerConfig
  width: int = WIDTH
  position: int = 1

  def build(self, rngs: nnx.Rngs) -> nnx.Module:
    position = LayerPosition(index=self.position, depth=3, branches=6)
    return build_alone(self.layer, self.width, rngs, position)


# Compilation is nearly all the time of checks on a CPU, and half of it are LLVM's optimizations,
# which programs that run once do not need.
QUICK = {'xla_backend_optimization_level': 0, 'xla_cpu_parallel_codegen_split_count': 1}


class Case:
  """A layer or a model with parameters and jitted calls; with `quick`, on a CPU, compiled without
  LLVM's optimizations."""

  def __init__(self, config: Any, quick: bool = False):
    options = QUICK if quick and platform() == 'cpu' else None
    self.jit = functools.partial(jax.jit, compiler_options=options)
    self.definition: Definition = define(config)
    # of a single layer; a model reads nothing besides its input
    alone = isinstance(config, Alone)
    self.layer: Any = config.layer if alone else None
    self.reads: dict[str, int] = self.layer.reads(config.width) if alone else {}
    self.memory_width: int | None = self.layer.memory_width(config.width) if alone else None
    self.initial = self.definition.init(jax.random.key(0))
    self.params = self.jit(_moved)(self.initial)
    self.call, self.gradients = self.jit(self.whole), self.jit(self.differentiated)
    self.alone, self.one_by_one = self.jit(self.row_by_row), self.jit(self.token_by_token)
    self.pull_back = self.jit(self.pulled_back)
    self._init_state = self.jit(self.first_state, static_argnums=(2, 3))
    self.step = self.jit(
      lambda p, x, s: _pair(self.definition.merge(p).step(x, self.given(x[:, None], Context()), s))
    )

  def whole(
    self, params: Any, x: Any, ctx: Context = Context(), state: Any = None
  ) -> tuple[Any, Any]:
    """Return outputs and state of a sequence."""
    model: Any = self.definition.merge(params)
    return _pair(model(x, self.given(x, ctx), state))

  def row_by_row(self, params: Any, x: Any, segments_BT: Any = None, memory: Any = None) -> Any:
    """Return the outputs of sequences without a state, each the only row of its batch, which reads
    the memory of the first row unless `memory` has one for each."""

    def row(given: Any) -> Any:
      x, segments_T, memory = jax.tree.map(lambda a: a[None], given)
      return self.whole(params, x, Context(segments_BT=segments_T, memory=memory))[0][0]

    return jax.lax.map(row, (x, segments_BT, memory), batch_size=32)

  def token_by_token(self, params: Any, x: Any, starts_BT: Any) -> Any:
    """Return the outputs of steps, each row by itself, from the state of `init_state`, which is put
    back where a document starts: what all other ways to compute them have to give."""
    model: Any = self.definition.merge(params)

    def row(x: Any, starts_T: Any, memory: Any) -> Any:
      given = () if memory is None else (jax.tree.map(lambda a: a[None], memory),)
      first = model.init_state(1, x.shape[0], *given)

      def step(state: Any, now: Any) -> tuple[Any, Any]:
        x, start = now
        state = jax.tree.map(lambda old, new: jnp.where(start, new, old), state, first)
        y, state = _pair(model.step(x[None], self.given(x[None, None], Context()), state))
        return state, y[0]

      return jax.lax.scan(step, first, (x, starts_T))[1]

    return jax.vmap(row)(x, starts_BT, self.memory(x.shape[0]))

  def given(self, x: Any, ctx: Context) -> Context:
    """Return the context with what the layer reads of earlier layers: values that depend on the
    input at the same position only."""
    if ctx.memory is None:
      ctx = ctx.replace(memory=self.memory(x.shape[0]))
    # Scanned unless a test requires unrolling: half as much to compile.
    return ctx.replace(
      shared={n: jnp.sin(2 * x[..., jnp.arange(c) % x.shape[-1]]) for n, c in self.reads.items()},
      unroll=bool(ctx.unroll),
    )

  def memory(self, batch: int) -> Memory | None:
    """Return an encoder's output for sources of LENGTH, LENGTH - 2, ... tokens; None for a layer
    that reads none."""
    if self.memory_width is None:
      return None
    y = jax.random.normal(jax.random.key(4), (BATCH, LENGTH, self.memory_width))[:batch]
    return Memory(y, jnp.arange(LENGTH)[None] < LENGTH - 2 * jnp.arange(batch)[:, None])

  def init_state(self, batch: int, max_len: int) -> Any:
    return self._init_state(self.params, self.memory(batch), batch, max_len)

  def in_bfloat16(self) -> tuple[Any, Any]:
    """Return the parameters as a model in bfloat16 has them, and the same numbers in float32."""
    low = self.jit(lambda params: self.definition.cast(params, jnp.bfloat16))(self.params)
    return low, {name: np.asarray(p).astype(np.float32) for name, p in low.items()}

  def first_state(self, params: Any, memory: Memory | None, batch: int, max_len: int) -> Any:
    model: Any = self.definition.merge(params)
    return model.init_state(batch, max_len, *(() if memory is None else (memory,)))

  def differentiated(
    self, params: Any, x: Any, ctx: Context = Context(), state: Any = None
  ) -> tuple[Any, Any]:
    """Return (outputs, last state), and gradients of a scalar of all of them with respect to
    parameters, inputs and state."""

    def score(params, x, state):
      y, after = self.whole(params, x, ctx, state)
      numbers = [s for s in jax.tree.leaves(after) if jnp.issubdtype(s.dtype, jnp.floating)]
      late = jnp.sum(jnp.sin(y.astype(jnp.float32)) * (1 + jnp.arange(y.shape[1])[None, :, None]))
      return late + sum(jnp.sum(jnp.sin(s)) for s in numbers), (y, after)

    (_, outputs), gradients = jax.value_and_grad(
      score, argnums=(0, 1, 2), has_aux=True, allow_int=True
    )(params, x, state)
    # counters and masks have no gradient
    return outputs, jax.tree.map(lambda g: None if g.dtype == jax.dtypes.float0 else g, gradients)

  def pulled_back(self, params: Any, x: Any, ctx: Context, weight_BTD: Any) -> tuple[Any, Any]:
    """Return the outputs y, and the gradients of sum(weight y) with respect to parameters and
    inputs."""
    y, pull = jax.vjp(lambda params, x: self.whole(params, x, ctx)[0], params, x)
    return y, pull(weight_BTD.astype(y.dtype))


def _moved(params: Any) -> Any:
  """Move parameters from initialization: one that starts at zero hides what it multiplies."""
  keys = jax.random.split(jax.random.key(1), max(1, len(params)))
  return {
    n: p + 0.05 * jax.random.normal(k, p.shape)
    for k, (n, p) in zip(keys, params.items(), strict=False)
  }


# Arrays of NumPy: each slice of an array of JAX is a program to compile.
@functools.cache
def inputs(dtype: Any = jnp.float32, batch: int = BATCH, length: int = LENGTH) -> Any:
  return np.asarray(jax.random.normal(jax.random.key(2), (batch, length, WIDTH), dtype))


# Only a change is a border: an id comes back, and ids fall and rise.
SEGMENT_IDS = 5, 2, 5, 900


def in_rows(documents: Sequence[Any]) -> Any:
  """Join documents, `[B, T_i, ...]` each, to rows: in row r the r-th comes first, and after the
  last one the first follows. So rows have borders at other positions."""
  n = len(documents)
  documents = [np.asarray(d) for d in documents]
  return np.stack(
    [
      np.concatenate([documents[(r + i) % n][r] for i in range(n)])
      for r in range(len(documents[0]))
    ]
  )


def segments(*lengths: int, batch: int = BATCH) -> Any:
  """Return the segment ids of documents of these lengths, as `in_rows` joins them."""
  ids = np.resize(np.asarray(SEGMENT_IDS, np.int32), len(lengths))
  return np.stack([np.repeat(ids, np.roll(lengths, -r)) for r in range(batch)])


def _pair(out: Output) -> tuple[Any, Any]:
  return out.y, out.state


# ---- comparisons -------------------------------------------------------------------------------


class Broken(AssertionError):
  """A violation of the contract."""


def close(a: Any, b: Any, rtol: float, what: str = '') -> None:
  """Raise `Broken` unless each leaf of a is within `rtol` of the largest magnitude of b's leaf."""
  if jax.tree.structure(a) != jax.tree.structure(b):
    raise Broken(f'{what}: structures {jax.tree.structure(a)} and {jax.tree.structure(b)}')
  for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
    name = f'{what}{jax.tree_util.keystr(path)}'
    gap = _Gap.between(x, y, name)
    if np.any(gap.wrong(rtol)):
      where = np.unravel_index(np.argmax(np.nan_to_num(gap.size, nan=np.inf)), gap.size.shape)
      raise Broken(f'{name.rstrip()} {gap} (at {[int(i) for i in where]})')


def close_outputs(a: Any, b: Any, rtol: float, how: str, first: int = 0) -> None:
  """Raise `Broken` unless outputs `[B, T, ...]` are within `rtol` of the largest magnitude of b;
  say in which row and position they first differ. `first` is the position of the first ones."""
  gap = _Gap.between(a, b, f'{how}: the output')
  wrong_BT = np.any(gap.wrong(rtol), axis=tuple(range(2, gap.size.ndim)))
  if np.any(wrong_BT):
    position, row = np.argwhere(wrong_BT.T)[0]
    raise Broken(f'{how}: the output {gap}, first at position {first + position} of row {row}')


@dataclasses.dataclass(frozen=True)
class _Gap:
  """The differences between two arrays, and the largest magnitude of the second one."""

  size: np.ndarray
  scale: float

  @classmethod
  def between(cls, a: Any, b: Any, name: str) -> '_Gap':
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
      raise Broken(f'{name} has shape {a.shape}, not {b.shape}')
    return cls(np.abs(a - b), max(np.abs(b).max(initial=0.0), 1e-3))

  def wrong(self, rtol: float) -> np.ndarray:
    """True where the difference is too large, or not a number."""
    return ~(self.size <= rtol * self.scale)

  def __str__(self) -> str:
    return f'differs by up to {np.max(self.size):.2g} where values reach {self.scale:.2g}'
