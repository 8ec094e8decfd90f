"""The contract of layers (`layers/layer.py`) as checks of one layer: what holds, and what is wrong where it does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxformer import config as configs
from jaxformer.config import Config, InputError
from jaxformer.layers.layer import Context, LayerConfig, Output, Site
from jaxformer.models.params import define
from jaxformer.sharding import MeshConfig, batch_sharding, make_mesh, use_mesh

WIDTH, BATCH, LENGTH = 32, 8, 20   # longer than what operations treat as a short decode
OUTPUTS, GRADIENTS, LOW = 1e-5, 1e-4, 0.05   # tolerances, relative to the largest magnitude of what is compared


class Checked(Config):
  """A layer by itself, as something that `define` can take."""

  layer: LayerConfig
  width: int = WIDTH

  def build(self, rngs: nnx.Rngs) -> nnx.Module:
    return self.layer.build(self.width, rngs, Site(layer=1, layers=3, branches=6))


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Of one check. `wrong` says what does not hold; None where all does. `skipped` says why there was nothing to check."""

  check: str
  wrong: str | None = None
  skipped: str | None = None

  @property
  def passed(self) -> bool:
    return self.wrong is None

  def to_json(self) -> dict[str, Any]:
    word = 'fails' if self.wrong else 'skipped' if self.skipped else 'holds'
    return {'check': self.check, 'verdict': word, 'wrong': self.wrong}

  @property
  def line(self) -> str:
    word = 'FAILS' if self.wrong else 'skipped' if self.skipped else 'holds'
    return f'{word:8} {self.check}' + (f': {self.wrong or self.skipped}' if self.wrong or self.skipped else '')


class _Broken(Exception):
  """What is wrong."""


class _Skipped(Exception):
  """Why there is nothing to check."""


def check_layer(layer: LayerConfig) -> Iterator[Verdict]:
  """One verdict a check, as they come. What the layer raises is a verdict too. Parameters are moved away from their initial values:
  one that starts at zero hides what it multiplies. A layer that cannot be built ends the checks."""
  try:
    subject = _Subject(layer)
    yield Verdict('builds, and gives outputs like its inputs', subject.shape_wrong())
  except Exception as e:
    yield Verdict('builds, and gives outputs like its inputs', _said(e))
    return
  for name, check in CHECKS.items():
    try:
      check(subject)
      yield Verdict(name)
    except _Broken as e:
      yield Verdict(name, str(e))
    except _Skipped as e:
      yield Verdict(name, skipped=str(e))
    except Exception as e:   # the layer's own
      yield Verdict(name, _said(e))


def _said(e: Exception) -> str:
  lines = str(e).strip().splitlines()
  return f'{type(e).__name__}: {lines[0][:300]}' if lines else type(e).__name__


class _Subject:
  """A layer with parameters, and its calls."""

  def __init__(self, layer: LayerConfig):
    self.layer, self.definition = layer, define(Checked(layer=layer))
    params = self.definition.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), max(len(params), 1))
    self.params = {n: p + 0.05 * jax.random.normal(k, p.shape) for k, (n, p) in zip(keys, params.items(), strict=False)}
    self.x = jax.random.normal(jax.random.key(2), (BATCH, LENGTH, WIDTH))
    self.call = jax.jit(lambda p, x, ctx, state: _pair(self.whole(p, x, ctx, state)))
    self.step = jax.jit(lambda p, x, state: _pair(self.definition.merge(p).step(x, self.given(x[:, None], Context()), state)))

  def given(self, x: Any, ctx: Context) -> Context:
    """The context with what the layer reads of earlier layers: values that follow from the same position's input alone."""
    reads = self.layer.reads(WIDTH)
    return ctx.replace(
      shared={n: jnp.sin(2 * x[..., jnp.arange(c) % x.shape[-1]]) for n, c in reads.items()}, unroll=bool(ctx.unroll))

  def whole(self, params: Any, x: Any, ctx: Context, state: Any = None) -> Output:
    return self.definition.merge(params)(x, self.given(x, ctx), state)

  def y(self, x: Any, segments: Any = None) -> Any:
    return self.call(self.params, x, Context(segments_BT=segments), None)[0]

  def state(self, batch: int = BATCH) -> Any:
    return self.definition.merge(self.params).init_state(batch, LENGTH)

  def loss(self, params: Any, x: Any) -> Any:
    """A scalar that every output bears on."""
    y = self.whole(params, x, Context(segments_BT=_segments(12, 8))).y.astype(jnp.float32)
    return jnp.sum(jnp.sin(y) * (1 + jnp.arange(y.shape[1])[None, :, None]))

  def shape_wrong(self) -> str | None:
    out = jax.eval_shape(lambda p, x: self.whole(p, x, Context()), self.params, self.x)
    if not isinstance(out, Output):
      return f'it returns {type(out).__name__}, not Output'
    same = (out.y.shape, out.y.dtype) == (self.x.shape, self.x.dtype)
    return None if same else f'inputs {self.x.dtype}{self.x.shape} give outputs {out.y.dtype}{out.y.shape}'


def _pair(out: Output) -> tuple[Any, Any]:
  return out.y, out.state


def _segments(*lengths: int) -> Any:
  return jnp.broadcast_to(jnp.asarray(np.repeat(np.arange(len(lengths)), lengths))[None], (BATCH, sum(lengths)))


def _equal(a: Any, b: Any, tolerance: float, what: str) -> None:
  """Raises `_Broken` where leaves differ by more than `tolerance` of the largest magnitude of b's."""
  if jax.tree.structure(a) != jax.tree.structure(b):
    raise _Broken(f'{what}: one is {jax.tree.structure(a)}, the other {jax.tree.structure(b)}')
  for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.shape != y.shape:
      raise _Broken(f'{what}{jax.tree_util.keystr(path)} has the shape {x.shape}, not {y.shape}')
    scale, gap = max(np.abs(y).max(initial=0.0), 1e-3), np.abs(x - y)
    if not np.all(gap <= tolerance * scale):
      where = [int(i) for i in np.unravel_index(np.nanargmax(np.where(np.isnan(gap), np.inf, gap)), gap.shape)]
      raise _Broken(
        f'{what}{jax.tree_util.keystr(path)} differ by up to {np.max(gap):.2g} where values reach {scale:.2g} (at {where})')


def _decodes(s: _Subject) -> None:
  if not s.layer.decodes:
    raise _Skipped('the config says that the layer does not decode')


def _causal(s: _Subject) -> None:
  _decodes(s)
  sums = jax.jit(jax.jacrev(lambda x: jnp.sum(jnp.sin(s.whole(s.params, x, Context()).y), axis=(0, 2))))(s.x)   # [T, B, T, D]
  influence = np.abs(np.asarray(sums)).sum(axis=(1, 3))
  later = np.argwhere(~(np.triu(influence, 1) == 0))
  if len(later):
    raise _Broken(f'the output at position {later[0][0]} depends on the input at position {later[0][1]}, which comes later')


def _steps(s: _Subject) -> None:
  _decodes(s)
  whole, final = s.call(s.params, s.x, Context(), s.state())
  _equal(s.y(s.x), whole, OUTPUTS, 'outputs with and without a state given')
  for prefill in (0, 1, 17):
    state, ys = s.state(), []
    if prefill:
      y, state = s.call(s.params, s.x[:, :prefill], Context(), state)
      ys.append(y)
    for t in range(prefill, LENGTH):
      y, state = s.step(s.params, s.x[:, t], state)
      ys.append(y[:, None])
    how = f'prefill of {prefill} and {LENGTH - prefill} steps against the whole sequence: '
    _equal(jnp.concatenate(ys, axis=1), whole, OUTPUTS, f'{how}outputs')
    _equal(state, final, OUTPUTS, f'{how}final states')


def _packed(s: _Subject) -> None:
  packed = s.y(s.x, _segments(9, 1, 10))
  apart = [s.y(part) for part in (s.x[:, :9], s.x[:, 9:10], s.x[:, 10:])]
  for begin, length, alone in zip((0, 9, 10), (9, 1, 10), apart, strict=True):
    _equal(packed[:, begin : begin + length], alone, OUTPUTS,
           f'the document at positions {begin} to {begin + length - 1}, packed against alone: outputs')


def _cut(s: _Subject) -> None:
  _decodes(s)
  segments = _segments(3, 12, 5)
  whole, final = s.call(s.params, s.x, Context(segments_BT=segments), s.state())
  for cut in (2, 17):
    first, state = s.call(s.params, s.x[:, :cut], Context(segments_BT=segments[:, :cut]), s.state())
    second, state = s.call(s.params, s.x[:, cut:], Context(segments_BT=segments[:, cut:]), state)
    _equal(jnp.concatenate([first, second], axis=1), whole, OUTPUTS, f'cut at {cut}: outputs')
    _equal(state, final, OUTPUTS, f'cut at {cut}: final states')


def _declared(s: _Subject) -> None:
  _decodes(s)
  before = jax.eval_shape(lambda: s.state(1))
  numbers = sum(leaf.size for leaf in jax.tree.leaves(before) if jnp.issubdtype(leaf.dtype, jnp.floating))
  if numbers != s.layer.state_size(WIDTH, LENGTH):
    raise _Broken(f'state_size says {s.layer.state_size(WIDTH, LENGTH):,} numbers, and init_state gives {numbers:,}')
  x = jax.ShapeDtypeStruct((1, 4, WIDTH), jnp.float32)
  after = jax.eval_shape(lambda p, x, state: s.whole(p, x, Context(), state).state, s.params, x, before)
  if after != before:
    raise _Broken(f'a call turns a state of {_shapes(before)} into {_shapes(after)}')


def _shapes(tree: Any) -> str:
  return ', '.join(f'{leaf.dtype}{leaf.shape}' for leaf in jax.tree.leaves(tree)) or 'nothing'


def _bfloat16(s: _Subject) -> None:
  low, x = s.definition.cast(s.params, jnp.bfloat16), s.x.astype(jnp.bfloat16)
  y = s.call(low, x, Context(), None)[0]
  if y.dtype != jnp.bfloat16:
    raise _Broken(f'bfloat16 inputs give outputs of {y.dtype}')
  _equal(y, s.y(s.x), LOW, 'bfloat16 against float32: outputs')
  for name, g in jax.jit(jax.grad(s.loss))(low, x).items():
    if not np.all(np.isfinite(np.asarray(g, np.float32))):
      raise _Broken(f'the gradient of {name} is not finite in bfloat16')


def _sharded(s: _Subject) -> None:
  count = jax.device_count()
  if count < 2 or BATCH % count:
    raise _Skipped(f'{count} device{"s" if count > 1 else ""} here; 2, 4 or 8 are needed')
  value = jax.jit(jax.value_and_grad(s.loss))(s.params, s.x)
  mesh = MeshConfig(data=2, fsdp=2, tensor=2) if count == 8 else MeshConfig(fsdp=count // 2, tensor=2)
  devices = make_mesh(mesh)
  params = jax.device_put(s.params, s.definition.shardings(devices, mesh.rules))
  with use_mesh(devices, mesh.rules):
    x = jax.device_put(s.x, batch_sharding(devices, mesh.rules))
    found = jax.jit(jax.value_and_grad(lambda *a: s.loss(*a)))(params, x)
  _equal(found, value, GRADIENTS, f'on {count} devices against one: loss and gradients')


def _survives_json(s: _Subject) -> None:
  if configs.from_json(configs.to_json(s.layer)) != s.layer:
    raise _Broken('the config read back from its JSON is another')


CHECKS: dict[str, Callable[[_Subject], None]] = {
  'no output depends on a later input': _causal,
  'the whole sequence equals a prefill and steps': _steps,
  'a sequence cut anywhere gives the same': _cut,
  'packed documents equal separate ones': _packed,
  'the state is of the size that the config declares': _declared,
  'bfloat16 gives near outputs and finite gradients': _bfloat16,
  'sharded equals unsharded': _sharded,
  'the config survives JSON': _survives_json,
}


def checked_examples(layer: LayerConfig) -> tuple[LayerConfig, ...]:
  """The layer, and what its class names as examples of its settings."""
  try:
    examples = type(layer).examples()
  except (InputError, TypeError):   # a config with fields that have no defaults
    return (layer,)
  return (layer, *(e for e in examples if e != layer))
