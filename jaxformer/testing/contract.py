"""Checks of one layer against the contract of layers (`layers/layer.py`)."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxformer import config as configs
from jaxformer.config import Config, InputError
from jaxformer.layers.layer import Context, LayerConfig, LayerPosition, Memory, Output
from jaxformer.models.params import Definition, define
from jaxformer.sharding import MeshConfig, make_parallel, use_mesh

WIDTH, BATCH, LENGTH = 32, 8, 20  # longer than what operations treat as a short decode
# Few lengths, so that checks share compiled programs.
PREFILLS = 0, 1, 17, LENGTH
# relative tolerances, of the largest magnitude of what is compared
OUTPUTS, GRADIENTS, LOW = 1e-5, 1e-4, 0.05


class Alone(Config):
  """A single layer as a model, for `define`."""

  layer: LayerConfig
  width: int = WIDTH
  position: int = 1

  def build(self, rngs: nnx.Rngs) -> nnx.Module:
    return self.layer.build(
      self.width, rngs, LayerPosition(index=self.position, depth=3, branches=6)
    )


class Case:
  """A layer or a model with parameters and jitted calls."""

  def __init__(self, config: Any):
    self.definition: Definition = define(config)
    # of a single layer; a model reads nothing besides its input
    alone = isinstance(config, Alone)
    self.layer: Any = config.layer if alone else None
    self.reads: dict[str, int] = self.layer.reads(config.width) if alone else {}
    self.memory_width: int | None = self.layer.memory_width(config.width) if alone else None
    params = self.definition.init(jax.random.key(0))
    # Moved away from initialization: a parameter that starts at zero hides what it multiplies.
    keys = jax.random.split(jax.random.key(1), max(1, len(params)))
    self.initial = params
    self.params = {
      n: p + 0.05 * jax.random.normal(k, p.shape)
      for k, (n, p) in zip(keys, params.items(), strict=False)
    }
    self.call, self.gradients = jax.jit(self.whole), jax.jit(self.differentiated)
    self.step = jax.jit(
      lambda p, x, s: _pair(self.definition.merge(p).step(x, self.given(x[:, None], Context()), s))
    )

  def whole(
    self, params: Any, x: Any, ctx: Context = Context(), state: Any = None
  ) -> tuple[Any, Any]:
    """Return outputs and state of a sequence."""
    model: Any = self.definition.merge(params)
    return _pair(model(x, self.given(x, ctx), state))

  def given(self, x: Any, ctx: Context) -> Context:
    """Return the context with what the layer reads of earlier layers: values that depend on the
    input at the same position only."""
    if self.memory_width is not None:
      ctx = ctx.replace(memory=self.memory(x.shape[0]))
    # Scanned unless a test requires unrolling: half as much to compile.
    return ctx.replace(
      shared={n: jnp.sin(2 * x[..., jnp.arange(c) % x.shape[-1]]) for n, c in self.reads.items()},
      unroll=bool(ctx.unroll),
    )

  def memory(self, batch: int) -> Memory:
    """Return an encoder's output for sources of LENGTH, LENGTH - 2, ... tokens."""
    y = jax.random.normal(jax.random.key(4), (BATCH, LENGTH, self.memory_width or 0))[:batch]
    return Memory(y, jnp.arange(LENGTH)[None] < LENGTH - 2 * jnp.arange(batch)[:, None])

  def init_state(self, batch: int, max_len: int) -> Any:
    model: Any = self.definition.merge(self.params)
    memory = () if self.memory_width is None else (self.memory(batch),)
    return model.init_state(batch, max_len, *memory)

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


def inputs(dtype: Any = jnp.float32) -> Any:
  return jax.random.normal(jax.random.key(2), (BATCH, LENGTH, WIDTH), dtype)


def segments(*lengths: int) -> Any:
  """Return the segment ids of documents of these lengths, in every row."""
  return jnp.broadcast_to(
    jnp.asarray(np.repeat(np.arange(len(lengths)), lengths))[None], (BATCH, sum(lengths))
  )


def _pair(out: Output) -> tuple[Any, Any]:
  return out.y, out.state


# ---- verdicts ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Result of one check.

  Attributes:
    check: what should hold.
    wrong: how it is violated; None if it holds.
    skipped: why it was not checked; None if it was.
  """

  check: str
  wrong: str | None = None
  skipped: str | None = None

  @property
  def word(self) -> str:
    """`holds`, `fails` or `skipped`."""
    return 'fails' if self.wrong else 'skipped' if self.skipped else 'holds'

  def json(self) -> dict[str, Any]:
    return {'check': self.check, 'verdict': self.word, 'wrong': self.wrong}

  @property
  def passed(self) -> bool:
    return self.wrong is None

  @property
  def line(self) -> str:
    """The result as a line of text."""
    word, reason = self.word.upper() if self.wrong else self.word, self.wrong or self.skipped
    return f'{word:8} {self.check}' + (f': {reason}' if reason else '')


class Broken(AssertionError):
  """A violation of the contract."""


def check_layer(layer: LayerConfig) -> Iterator[Verdict]:
  """Yield the result of each check. Exceptions of the layer's own are violations too; a layer that
  cannot be built ends the checks."""
  case: Any = None
  for name, check in CHECKS.items():
    try:
      case = Case(Alone(layer=layer)) if case is None else case
      if check in DECODING and not layer.decodes:
        yield Verdict(name, skipped='the config declares that the layer does not decode')
      else:
        yield Verdict(name, skipped=check(case))
    except Exception as e:
      yield Verdict(name, str(e) if isinstance(e, Broken) else _first_line(e))
      if check is shape:
        return


def _first_line(e: Exception) -> str:
  lines = str(e).strip().splitlines()
  return f'{type(e).__name__}: {lines[0][:300]}' if lines else type(e).__name__


def close(a: Any, b: Any, rtol: float, what: str = '') -> None:
  """Raise `Broken` unless each leaf of a is within `rtol` of the largest magnitude of b's leaf."""
  if jax.tree.structure(a) != jax.tree.structure(b):
    raise Broken(f'{what}: structures {jax.tree.structure(a)} and {jax.tree.structure(b)}')
  for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.shape != y.shape:
      raise Broken(f'{what}{jax.tree_util.keystr(path)} has shape {x.shape}, not {y.shape}')
    scale, gap = max(np.abs(y).max(initial=0.0), 1e-3), np.abs(x - y)
    if not np.all(gap <= rtol * scale):
      where = [
        int(i) for i in np.unravel_index(np.argmax(np.where(np.isnan(gap), np.inf, gap)), gap.shape)
      ]
      name = f'{what}{jax.tree_util.keystr(path)}'.rstrip()
      raise Broken(
        f'{name} differs by up to {np.max(gap):.2g} where values reach {scale:.2g} (at {where})'
      )


# ---- checks ------------------------------------------------------------------------------------


def shape(case: Case) -> None:
  """Outputs have the shape and dtype of inputs."""
  x, model = inputs(), case.definition
  out = jax.eval_shape(
    lambda p, x: model.merge(p)(x, case.given(x, Context()), None), case.params, x
  )
  if not isinstance(out, Output):
    raise Broken(f'the layer returns {type(out).__name__}, not Output')
  if (out.y.shape, out.y.dtype) != (x.shape, x.dtype):
    raise Broken(f'inputs {x.dtype}{x.shape} give outputs {out.y.dtype}{out.y.shape}')


def causal(case: Case) -> None:
  """No output depends on a later input, and each depends on its own, by the gradient."""
  # [T, B, T, D]
  sums = jax.jit(
    jax.jacrev(lambda x: jnp.sum(jnp.sin(case.whole(case.params, x)[0]), axis=(0, 2)))
  )(inputs())
  influence = np.abs(np.asarray(sums)).sum(axis=(1, 3))
  later = np.argwhere(~(np.triu(influence, 1) == 0))
  if len(later):
    raise Broken(
      f'the output at position {later[0][0]} depends on the input at position {later[0][1]}, which '
      'comes later'
    )
  if not np.all(np.diag(influence) > 0):
    raise Broken(
      f'the output at position {np.argmin(np.diag(influence))} does not depend on the input there'
    )


def continued(case: Case, x: Any, prefill: int) -> None:
  """A sequence equals its first `prefill` tokens in one call and the others step by step, for
  inputs `[B, T, ...]` of a layer or the tokens of a model."""
  length = x.shape[1]
  whole, _ = case.call(case.params, x, Context(), case.init_state(BATCH, length))
  what = 'a call without a state against one with: the output '
  close(case.call(case.params, x)[0], whole, OUTPUTS, what)
  how = f'prefill of {prefill} and {length - prefill} steps against the full sequence'
  in_parts(case, x, (prefill,) if prefill else (), how)


def in_parts(case: Case, x: Any, ends: tuple[int, ...], how: str, segments_BT: Any = None) -> None:
  """A sequence equals its parts: calls for those with these `ends`, then steps."""
  whole_ctx, state = Context(segments_BT=segments_BT), case.init_state(BATCH, x.shape[1])
  whole, final = case.call(case.params, x, whole_ctx, state)
  ys = []
  for begin, end in itertools.pairwise((0, *ends)):
    ctx = Context(segments_BT=None if segments_BT is None else segments_BT[:, begin:end])
    y, state = case.call(case.params, x[:, begin:end], ctx, state)
    ys.append(y)
  for t in range(max(ends, default=0), x.shape[1]):
    y, state = case.step(case.params, x[:, t], state)
    ys.append(y[:, None])
  close(jnp.concatenate(ys, axis=1), whole, OUTPUTS, f'{how}: the output ')
  close(state, final, OUTPUTS, f'{how}: the final state ')


def every_prefill(case: Case) -> None:
  """A sequence equals a prefill and steps."""
  for prefill in PREFILLS:
    continued(case, inputs(), prefill)


def two_parts(case: Case) -> None:
  """A sequence with several documents gives the same in two parts, wherever it is split."""
  for cut in (3, 17):
    in_parts(case, inputs(), (cut, LENGTH), f'split at {cut}', segments(2, 13, 5))


def packed(case: Case) -> None:
  """Documents packed into a row equal separate ones."""
  x, begin, lengths = inputs(), 0, (1, 1, 17, 1)
  first = case.init_state(BATCH, LENGTH) if case.layer.decodes else None
  together = case.call(case.params, x, Context(segments_BT=segments(*lengths)), first)[0]
  for length in lengths:
    end = begin + length
    close(
      together[:, begin:end],
      case.call(case.params, x[:, begin:end], Context(), first)[0],
      OUTPUTS,
      f'the document at positions {begin} to {end - 1}, packed against separate: the output ',
    )
    begin = end


def declared(case: Case) -> None:
  """The state has the declared size, and a call preserves its shapes."""
  before = jax.eval_shape(lambda: case.init_state(1, LENGTH))
  numbers = sum(
    leaf.size for leaf in jax.tree.leaves(before) if jnp.issubdtype(leaf.dtype, jnp.floating)
  )
  said = case.layer.state_size(WIDTH, LENGTH)
  if numbers != said:
    raise Broken(f'state_size declares {said:,} numbers, but init_state returns {numbers:,}')
  x = jax.ShapeDtypeStruct((1, 4, WIDTH), jnp.float32)
  after = jax.eval_shape(case.whole, case.params, x, Context(), before)[1]
  if after != before:
    raise Broken(f'a call turns the state {_shapes(before)} into {_shapes(after)}')


def _shapes(tree: Any) -> str:
  return ', '.join(f'{leaf.dtype}{leaf.shape}' for leaf in jax.tree.leaves(tree)) or 'nothing'


def bfloat16(case: Case) -> None:
  """Outputs in bfloat16 are close to those in float32, and gradients are finite."""
  x, low = inputs(), case.definition.cast(case.params, jnp.bfloat16)
  y = case.call(low, x.astype(jnp.bfloat16))[0]
  if y.dtype != jnp.bfloat16:
    raise Broken(f'bfloat16 inputs give outputs of {y.dtype}')
  close(y, case.call(case.params, x)[0], LOW, 'bfloat16 against float32: the output ')
  for name, g in case.gradients(low, x.astype(jnp.bfloat16))[1][0].items():
    if not np.all(np.isfinite(np.asarray(g, np.float32))):
      raise Broken(f'the gradient of {name} is not finite in bfloat16')


def sharded(case: Case) -> str | None:
  """Sharded over all mesh axes at once, outputs and gradients equal those on one device."""
  count = jax.device_count()
  if count not in (2, 4, 8):
    return f'needs 2, 4 or 8 devices; there {"are" if count > 1 else "is"} {count}'
  mesh = MeshConfig(data=max(1, count // 4), fsdp=min(2, count // 2), tensor=2)
  x, ctx = inputs(), Context(segments_BT=segments(7, 8, 5))
  unsharded, parallel = case.gradients(case.params, x, ctx), make_parallel(mesh)
  params = jax.device_put(case.params, case.definition.shardings(parallel))
  with use_mesh(parallel):
    # a function of its own, so that nothing traced without the mesh is reused
    on_mesh = jax.jit(lambda *a: case.differentiated(*a))
    sharded = on_mesh(params, jax.device_put(x, parallel.batch), ctx)
  close(sharded, unsharded, GRADIENTS, f'on {count} devices against one: outputs and gradients ')
  return None


def survives_json(case: Case) -> None:
  """The config survives a round trip through JSON."""
  if configs.from_json(configs.to_json(case.layer)) != case.layer:
    raise Broken('the config read back from its JSON differs')


CHECKS: dict[str, Callable[[Case], str | None]] = {
  'builds, with outputs like inputs': shape,
  'no output depends on a later input': causal,
  'a sequence equals a prefill and steps': every_prefill,
  'a sequence split anywhere gives the same': two_parts,
  'packed documents equal separate ones': packed,
  'the state has the declared size': declared,
  'bfloat16 is close to float32, with finite gradients': bfloat16,
  'sharded equals unsharded': sharded,
  'the config survives JSON': survives_json,
}
"""What should hold -> its check, which raises `Broken` or returns why it was skipped."""

DECODING = {causal, every_prefill, two_parts, declared}
"""The checks that only a layer that decodes can pass."""


def checked_examples(layer: LayerConfig) -> tuple[LayerConfig, ...]:
  """Return the layer and the examples of its class."""
  try:
    examples = type(layer).examples()
  except (InputError, TypeError):  # a config with fields that have no defaults
    return (layer,)
  return (layer, *(e for e in examples if e != layer))
