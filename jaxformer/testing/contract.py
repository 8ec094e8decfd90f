"""The contract of layers (`layers/layer.py`) as checks of one layer: what holds, and what is wrong
where it does not."""

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
from jaxformer.layers.layer import Context, LayerConfig, LayerPosition, Memory, Output
from jaxformer.models.params import Definition, define
from jaxformer.sharding import MeshConfig, batch_sharding, make_mesh, use_mesh

WIDTH, BATCH, LENGTH = 32, 8, 20  # longer than what operations treat as a short decode
# Checks cut sequences at few places, so that they share the programs of their parts.
PREFILLS = 0, 1, 17, LENGTH
# tolerances, relative to the largest magnitude of what is compared
OUTPUTS, GRADIENTS, LOW = 1e-5, 1e-4, 0.05


class Alone(Config):
  """A layer by itself, as something that `define` can take."""

  layer: LayerConfig
  width: int = WIDTH
  position: int = 1

  def build(self, rngs: nnx.Rngs) -> nnx.Module:
    return self.layer.build(
      self.width, rngs, LayerPosition(index=self.position, depth=3, branches=6)
    )


class Case:
  """A layer or a model with parameters, and its calls jitted once."""

  def __init__(self, config: Any):
    self.definition: Definition = define(config)
    params = self.definition.init(jax.random.key(0))
    # Away from the initial values: a parameter that starts at zero hides what it multiplies.
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

  @property
  def layer(self) -> LayerConfig:
    """Of a layer by itself."""
    config: Any = self.definition.config
    return config.layer

  def whole(
    self, params: Any, x: Any, ctx: Context = Context(), state: Any = None
  ) -> tuple[Any, Any]:
    """Outputs and state of a whole sequence."""
    model: Any = self.definition.merge(params)
    return _pair(model(x, self.given(x, ctx), state))

  def given(self, x: Any, ctx: Context) -> Context:
    """The context with what the layer reads of earlier layers: values that follow from the same
    position's input alone."""
    config = self.definition.config
    reads = config.layer.reads(config.width) if isinstance(config, Alone) else {}
    if self.memory_width is not None:
      ctx = ctx.replace(memory=self.memory(x.shape[0]))
    # Scanned unless a test asks otherwise: half of what there is to compile.
    return ctx.replace(
      shared={n: jnp.sin(2 * x[..., jnp.arange(c) % x.shape[-1]]) for n, c in reads.items()},
      unroll=bool(ctx.unroll),
    )

  @property
  def memory_width(self) -> int | None:
    """Of the output of an encoder, for a layer by itself that reads one."""
    config = self.definition.config
    return config.layer.memory_width(config.width) if isinstance(config, Alone) else None

  def memory(self, batch: int) -> Memory:
    """What a layer that reads an encoder's output finds: sources of LENGTH, LENGTH - 2, ...
    tokens."""
    y = jax.random.normal(jax.random.key(4), (BATCH, LENGTH, self.memory_width or 0))[:batch]
    return Memory(y, jnp.arange(LENGTH)[None] < LENGTH - 2 * jnp.arange(batch)[:, None])

  def init_state(self, batch: int, max_len: int, params: Any = None) -> Any:
    model: Any = self.definition.merge(self.params if params is None else params)
    if self.memory_width is None:
      return model.init_state(batch, max_len)
    return model.init_state(batch, max_len, self.memory(batch))

  def differentiated(
    self, params: Any, x: Any, ctx: Context = Context(), state: Any = None
  ) -> tuple[Any, Any]:
    """(a scalar that all outputs and the last state bear on, (outputs, last state)), and its
    gradients with respect to parameters, inputs and state."""

    def score(params, x, state):
      y, after = self.whole(params, x, ctx, state)
      numbers = [s for s in jax.tree.leaves(after) if jnp.issubdtype(s.dtype, jnp.floating)]
      late = jnp.sum(jnp.sin(y.astype(jnp.float32)) * (1 + jnp.arange(y.shape[1])[None, :, None]))
      return late + sum(jnp.sum(jnp.sin(s)) for s in numbers), (y, after)

    value, gradients = jax.value_and_grad(score, argnums=(0, 1, 2), has_aux=True, allow_int=True)(
      params, x, state
    )
    # of counters and masks
    return value, jax.tree.map(lambda g: None if g.dtype == jax.dtypes.float0 else g, gradients)


def inputs(dtype: Any = jnp.float32) -> Any:
  return jax.random.normal(jax.random.key(2), (BATCH, LENGTH, WIDTH), dtype)


def segments(*lengths: int) -> Any:
  """Documents of these lengths in every row."""
  return jnp.broadcast_to(
    jnp.asarray(np.repeat(np.arange(len(lengths)), lengths))[None], (BATCH, sum(lengths))
  )


def _pair(out: Output) -> tuple[Any, Any]:
  return out.y, out.state


# ---- verdicts ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Of one check. `wrong` says what does not hold; None where all does. `skipped` says why there
  was nothing to check."""

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
    return f'{word:8} {self.check}' + (
      f': {self.wrong or self.skipped}' if self.wrong or self.skipped else ''
    )


class Broken(AssertionError):
  """What is wrong."""


class _Skipped(Exception):
  """Why there is nothing to check."""


def check_layer(layer: LayerConfig) -> Iterator[Verdict]:
  """One verdict a check, as they come. What the layer raises is a verdict too; one that cannot be
  built ends the checks."""
  first = 'builds, and gives outputs like its inputs'
  try:
    case = Case(Alone(layer=layer))
    shape(case)
    yield Verdict(first)
  except Exception as e:
    yield Verdict(first, str(e) if isinstance(e, Broken) else _said(e))
    return
  for name, check in CHECKS.items():
    try:
      check(case)
      yield Verdict(name)
    except Broken as e:
      yield Verdict(name, str(e))
    except _Skipped as e:
      yield Verdict(name, skipped=str(e))
    except Exception as e:  # the layer's own
      yield Verdict(name, _said(e))


def _said(e: Exception) -> str:
  lines = str(e).strip().splitlines()
  return f'{type(e).__name__}: {lines[0][:300]}' if lines else type(e).__name__


def close(a: Any, b: Any, rtol: float, what: str = '') -> None:
  """Equal up to `rtol` of the largest magnitude of b, leaf by leaf. Raises `Broken`."""
  if jax.tree.structure(a) != jax.tree.structure(b):
    raise Broken(f'{what}: one is {jax.tree.structure(a)}, the other {jax.tree.structure(b)}')
  for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.shape != y.shape:
      raise Broken(f'{what}{jax.tree_util.keystr(path)} has the shape {x.shape}, not {y.shape}')
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
  """Outputs are like inputs."""
  x, model = inputs(), case.definition
  out = jax.eval_shape(
    lambda p, x: model.merge(p)(x, case.given(x, Context()), None), case.params, x
  )
  if not isinstance(out, Output):
    raise Broken(f'it returns {type(out).__name__}, not Output')
  if (out.y.shape, out.y.dtype) != (x.shape, x.dtype):
    raise Broken(f'inputs {x.dtype}{x.shape} give outputs {out.y.dtype}{out.y.shape}')


def _decodes(case: Case) -> None:
  if not case.layer.decodes:
    raise _Skipped('the config says that the layer does not decode')


def causal(case: Case) -> None:
  """No output depends on a later input, and each on its own: by the gradient."""
  _decodes(case)
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


def prefill_and_steps(case: Case, prefill: int) -> None:
  """A whole sequence equals its first `prefill` tokens at once and the others one by one."""
  _decodes(case)
  continued(case, inputs(), prefill)


def continued(case: Case, x: Any, prefill: int) -> None:
  """The same, of inputs `[B, T, ...]` of a layer or the tokens of a model."""
  length = x.shape[1]
  whole, final = case.call(case.params, x, Context(), case.init_state(BATCH, length))
  close(
    case.call(case.params, x)[0],
    whole,
    OUTPUTS,
    'what comes without a state, against with one: the output ',
  )
  state, ys = case.init_state(BATCH, length), []
  if prefill:
    y, state = case.call(case.params, x[:, :prefill], Context(), state)
    ys.append(y)
  for t in range(prefill, length):
    y, state = case.step(case.params, x[:, t], state)
    ys.append(y[:, None])
  how = f'prefill of {prefill} and {length - prefill} steps against the whole sequence: the '
  close(jnp.concatenate(ys, axis=1), whole, OUTPUTS, f'{how}output ')
  close(state, final, OUTPUTS, f'{how}final state ')


def every_prefill(case: Case) -> None:
  for prefill in PREFILLS:
    prefill_and_steps(case, prefill)


def two_parts(case: Case) -> None:
  """A sequence with several documents equals its parts, wherever it is cut."""
  _decodes(case)
  x, ctx = inputs(), Context(segments_BT=segments(2, 13, 5))
  assert ctx.segments_BT is not None
  whole, final = case.call(case.params, x, ctx, case.init_state(BATCH, LENGTH))
  for cut in (3, 17):
    parts = [Context(segments_BT=s) for s in (ctx.segments_BT[:, :cut], ctx.segments_BT[:, cut:])]
    first, state = case.call(case.params, x[:, :cut], parts[0], case.init_state(BATCH, LENGTH))
    second, state = case.call(case.params, x[:, cut:], parts[1], state)
    close(jnp.concatenate([first, second], axis=1), whole, OUTPUTS, f'cut at {cut}: the output ')
    close(state, final, OUTPUTS, f'cut at {cut}: the final state ')


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
      f'the document at positions {begin} to {end - 1}, packed against alone: the output ',
    )
    begin = end


def declared(case: Case) -> None:
  """The state is of the size that the config says, and a call leaves its shapes as they are."""
  _decodes(case)
  before = jax.eval_shape(lambda: case.init_state(1, LENGTH))
  numbers = sum(
    leaf.size for leaf in jax.tree.leaves(before) if jnp.issubdtype(leaf.dtype, jnp.floating)
  )
  said = case.layer.state_size(WIDTH, LENGTH)
  if numbers != said:
    raise Broken(f'state_size says {said:,} numbers, and init_state gives {numbers:,}')
  x = jax.ShapeDtypeStruct((1, 4, WIDTH), jnp.float32)
  after = jax.eval_shape(case.whole, case.params, x, Context(), before)[1]
  if after != before:
    raise Broken(f'a call turns a state of {_shapes(before)} into {_shapes(after)}')


def _shapes(tree: Any) -> str:
  return ', '.join(f'{leaf.dtype}{leaf.shape}' for leaf in jax.tree.leaves(tree)) or 'nothing'


def bfloat16(case: Case) -> None:
  """In bfloat16 outputs are near those of float32, and gradients finite."""
  x, low = inputs(), case.definition.cast(case.params, jnp.bfloat16)
  y = case.call(low, x.astype(jnp.bfloat16))[0]
  if y.dtype != jnp.bfloat16:
    raise Broken(f'bfloat16 inputs give outputs of {y.dtype}')
  close(y, case.call(case.params, x)[0], LOW, 'bfloat16 against float32: the output ')
  for name, g in case.gradients(low, x.astype(jnp.bfloat16))[1][0].items():
    if not np.all(np.isfinite(np.asarray(g, np.float32))):
      raise Broken(f'the gradient of {name} is not finite in bfloat16')


def sharded(case: Case) -> None:
  """Divided over all devices in every way at once, loss and gradients are those of one device."""
  count = jax.device_count()
  if count not in (2, 4, 8):
    raise _Skipped(f'{count} device{"s" if count > 1 else ""} here; 2, 4 or 8 are needed')
  mesh = {
    2: MeshConfig(fsdp=1, tensor=2),
    4: MeshConfig(fsdp=2, tensor=2),
    8: MeshConfig(data=2, fsdp=2, tensor=2),
  }[count]
  x, ctx = inputs(), Context(segments_BT=segments(7, 8, 5))
  (value, _), gradients = case.gradients(case.params, x, ctx)
  devices = make_mesh(mesh)
  params = jax.device_put(case.params, case.definition.shardings(devices, mesh.rules))
  with use_mesh(devices, mesh.rules):
    x = jax.device_put(x, batch_sharding(devices, mesh.rules))
    (found, _), found_gradients = jax.jit(lambda *a: case.differentiated(*a))(params, x, ctx)
  close(
    (found, found_gradients),
    (value, gradients),
    GRADIENTS,
    f'on {count} devices against one: loss and gradients ',
  )


def survives_json(case: Case) -> None:
  """The config is the same after JSON."""
  if configs.from_json(configs.to_json(case.layer)) != case.layer:
    raise Broken('the config read back from its JSON is another')


CHECKS: dict[str, Callable[[Case], None]] = {
  'no output depends on a later input': causal,
  'the whole sequence equals a prefill and steps': every_prefill,
  'a sequence cut anywhere gives the same': two_parts,
  'packed documents equal separate ones': packed,
  'the state is of the size that the config declares': declared,
  'bfloat16 gives near outputs and finite gradients': bfloat16,
  'sharded equals unsharded': sharded,
  'the config survives JSON': survives_json,
}


def checked_examples(layer: LayerConfig) -> tuple[LayerConfig, ...]:
  """The layer, and what its class names as examples of its settings."""
  try:
    examples = type(layer).examples()
  except (InputError, TypeError):  # a config with fields that have no defaults
    return (layer,)
  return (layer, *(e for e in examples if e != layer))
