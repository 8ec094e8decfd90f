"""Checks of one layer against the contract of layers (`layers/layer.py`)."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer import config as configs
from jaxformer.config import InputError
from jaxformer.layers.layer import Context, LayerConfig, Output, starts_BT
from jaxformer.sharding import MeshConfig, make_parallel, use_mesh
from jaxformer.testing.case import (
  BATCH,
  GRADIENTS,
  LENGTH,
  LONG_DOCUMENTS,
  OUTPUTS,
  ROWS,
  TAIL,
  WHOLE,
  WIDTH,
  Alone,
  Broken,
  Case,
  close,
  close_outputs,
  in_rows,
  inputs,
  segments,
)
from jaxformer.testing.gradients import (
  DOCUMENTS,
  LOW_GRADIENTS,
  differentiable,
  in_both_dtypes,
  near,
)

# Few lengths, so that checks share compiled programs.
PREFILLS = 0, 1, 17
# Relative tolerance in bfloat16, whose numbers have 8 bits: a value of 1 is off by up to 0.004.
LOW = 0.03
# Root mean square of errors in bfloat16, relative to that of the outputs: it is at least what the
# rounding of outputs makes, and by length grows to at most GROWTH times that of the first EARLY
# positions. In the layers of the package it grows by less than a fifth, whatever they remember.
LOW_ROUNDING, GROWTH, EARLY = 0.002, 2, 16


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


def check_layer(layer: LayerConfig) -> Iterator[Verdict]:
  """Yield the result of each check. Exceptions of the layer's own are violations too; a layer that
  cannot be built ends the checks."""
  case: Any = None
  for name, check in CHECKS.items():
    try:
      case = Case(Alone(layer=layer), quick=True) if case is None else case
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


def rows_apart(case: Case) -> None:
  """A row gives the same in a batch, whose other rows have other inputs and other documents, and
  as the only one."""
  x, ids = inputs(), segments(2, 13, 5)
  together = case.call(case.params, x, Context(segments_BT=ids))[0]
  apart = case.alone(case.params, x, ids, case.memory(BATCH))
  close_outputs(together, apart, OUTPUTS, f'a row in a batch of {BATCH} against by itself')


def causal(case: Case) -> None:
  """No output depends on a later input, and each depends on its own.

  Inputs are replaced from a position on, and outputs before it compared. Those of an implementation
  that computes all positions at once, as by Fourier transforms, then differ by rounding, which is
  relative to the largest outputs; a dependence has no such limit."""
  if found := later_or_none(case, [*range(1, LENGTH), *range(LENGTH, TAIL, 4)]):
    # with every position, to name the one
    raise Broken(later_or_none(case, list(range(1, TAIL))) or found)


def later_or_none(case: Case, cuts: list[int]) -> str | None:
  """Return how outputs depend on inputs from these positions on, if not as they should."""
  x, other = inputs(batch=2, length=TAIL)
  replaced_NT = np.arange(TAIL)[None] >= np.asarray([*cuts, TAIL])[:, None]
  y = np.asarray(case.alone(case.params, np.where(replaced_NT[..., None], other, x)), np.float64)
  same_NT = np.max(np.abs(y[:-1] - y[-1]), axis=-1) <= OUTPUTS * np.max(np.abs(y[-1]))
  later_TN = (~same_NT & ~replaced_NT[:-1]).T
  if np.any(later_TN):
    position = np.argmax(np.any(later_TN, axis=1))
    cut = cuts[np.flatnonzero(later_TN[position])[-1]]
    return (
      f'the output at position {position} depends on the input at position {cut}, which comes '
      f'later (in a row of {TAIL})'
    )
  for cut, same_T in zip(cuts, same_NT, strict=True):
    if same_T[cut]:
      return f'the output at position {cut} does not depend on the input there'
  return None


def continued(case: Case, x: Any, prefill: int) -> None:
  """A sequence equals its first `prefill` tokens in one call and the others step by step, for
  inputs `[B, T, ...]` of a layer or the tokens of a model."""
  state, ys = case.init_state(BATCH, x.shape[1]), []
  whole, final = case.call(case.params, x, Context(), state)
  if prefill:
    y, state = case.call(case.params, x[:, :prefill], Context(), state)
    ys.append(y)
  for t in range(prefill, x.shape[1]):
    y, state = case.step(case.params, x[:, t], state)
    ys.append(y[:, None])
  how = f'prefill of {prefill} and {x.shape[1] - prefill} steps against the full sequence'
  close_outputs(np.concatenate(ys, axis=1), whole, OUTPUTS, how)
  close(state, final, OUTPUTS, f'{how}: the final state ')


def every_prefill(case: Case) -> None:
  """A sequence equals a prefill and steps."""
  for prefill in PREFILLS:
    continued(case, inputs(), prefill)


def two_parts(case: Case) -> None:
  """A sequence with several documents gives the same in two parts, wherever it is split."""
  x, ids = inputs(), segments(2, 13, 5)
  whole = case.call(case.params, x, Context(segments_BT=ids))[0]
  early, late = in_two(case, x, ids, 3), in_two(case, x, ids, 17)
  close_outputs(early[0], whole, OUTPUTS, 'split at 3')
  close_outputs(late[0], whole, OUTPUTS, 'split at 17')
  close(late[1], early[1], OUTPUTS, 'split at 17 against split at 3: the final state ')
  x, ids, apart = long_documents(case)
  how = f'a sequence of {2 * TAIL} split at {TAIL}, against its tokens one by one'
  close_outputs(in_two(case, x, ids, TAIL)[0], apart, OUTPUTS, how)


def in_two(case: Case, x: Any, ids: Any, cut: int) -> tuple[Any, Any]:
  """Return outputs and the final state of a sequence in two calls."""
  first = case.init_state(*x.shape[:2])
  y, state = case.call(case.params, x[:, :cut], Context(segments_BT=ids[:, :cut]), first)
  ctx = Context(segments_BT=ids[:, cut:])
  rest, state = case.call(case.params, x[:, cut:], ctx, state)
  return np.concatenate([y, rest], axis=1), state


def long_documents(case: Case) -> tuple[Any, Any, Any]:
  """Return inputs and segment ids of LONG_DOCUMENTS in rows, and the outputs of their tokens one by
  one."""
  x, ids = inputs(batch=ROWS, length=2 * TAIL), segments(*LONG_DOCUMENTS, batch=ROWS)
  return x, ids, case.one_by_one(case.params, x, starts_BT(ids, *ids.shape))


def long(case: Case) -> None:
  """A long sequence equals its tokens one by one, and so does what is decoded after it."""
  x, steps = inputs(batch=ROWS, length=2 * TAIL), 4
  tokens = case.one_by_one(case.params, x, np.zeros(x.shape[:2], bool))
  how = 'a sequence of {} in one call, against its tokens one by one'
  whole = case.call(case.params, x[:, :WHOLE])[0]
  close_outputs(whole, tokens[:, :WHOLE], OUTPUTS, how.format(WHOLE))
  state = case.init_state(ROWS, 2 * TAIL)
  y, state = case.call(case.params, x[:, :TAIL], Context(), state)
  close_outputs(y, tokens[:, :TAIL], OUTPUTS, how.format(TAIL))
  ys = []
  for t in range(TAIL, TAIL + steps):
    y, state = case.step(case.params, x[:, t], state)
    ys.append(y[:, None])
  close_outputs(
    np.concatenate(ys, axis=1),
    tokens[:, TAIL : TAIL + steps],
    OUTPUTS,
    f'{steps} steps after a prefill of {TAIL}, against the tokens one by one',
    TAIL,
  )


def packed(case: Case) -> None:
  """Documents packed into a row equal separate ones, in short and long rows."""
  packed_in_calls(case, inputs(), (1, 1, 17, 1))
  if not case.layer.decodes:
    packed_in_calls(case, inputs(batch=ROWS, length=TAIL), DOCUMENTS)
    return
  x, ids, apart = long_documents(case)
  together = case.call(case.params, x[:, :TAIL], Context(segments_BT=ids[:, :TAIL]))[0]
  how = f'documents in a row of {TAIL}, against the tokens of each one by one'
  close_outputs(together, apart[:, :TAIL], OUTPUTS, how)


def packed_in_calls(case: Case, x: Any, lengths: tuple[int, ...]) -> None:
  """Documents of these lengths, which stand in another order in each row, equal separate ones."""
  parts = np.split(x, np.cumsum(lengths)[:-1], axis=1)
  first = case.init_state(len(x), x.shape[1]) if case.layer.decodes else None
  apart = [case.call(case.params, part, Context(), first)[0] for part in parts]
  ctx = Context(segments_BT=segments(*lengths, batch=len(x)))
  together = case.call(case.params, in_rows(parts), ctx)[0]
  how = f'documents of {", ".join(map(str, lengths))} tokens in a row, against separate ones'
  close_outputs(together, in_rows(apart), OUTPUTS, how)


def declared(case: Case) -> None:
  """The state has the declared size, and a call preserves its shapes."""
  before = jax.eval_shape(lambda: case.first_state(case.params, case.memory(1), 1, LENGTH))
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
  """Outputs of a long row in bfloat16 are close to those that the same numbers give in float32, and
  gradients are finite and near."""
  (y, gradients), (reference, right) = in_both_dtypes(case)
  if y.dtype != jnp.bfloat16:
    raise Broken(f'bfloat16 inputs give outputs of {y.dtype}')
  close_outputs(y, reference, LOW, f'a row of {TAIL} in bfloat16 against float32')
  gap = np.asarray(y, np.float64) - np.asarray(reference, np.float64)

  def error(begin: int, end: int) -> float:
    at = slice(begin, end)
    return float(np.linalg.norm(gap[:, at]) / (np.linalg.norm(reference[:, at]) + 1e-30))

  first = max(error(0, EARLY), LOW_ROUNDING)
  for begin in range(0, TAIL, 4 * EARLY):
    end = min(begin + 4 * EARLY, TAIL)
    if not error(begin, end) <= GROWTH * first:
      raise Broken(
        f'the error in bfloat16 grows with the length: {first:.2g} of the outputs at the first '
        f'{EARLY} positions, {error(begin, end):.2g} at positions {begin} to {end - 1}'
      )
  near(gradients, right, LOW_GRADIENTS, 'in bfloat16 against float32')


def sharded(case: Case) -> str | None:
  """Sharded over all mesh axes at once, outputs and gradients equal those on one device; over those
  without `tensor` if the config does not divide over it."""
  count = jax.device_count()
  if count not in (2, 4, 8):
    return f'needs 2, 4 or 8 devices; there {"are" if count > 1 else "is"} {count}'
  mesh, left_out = MeshConfig(data=max(1, count // 4), fsdp=min(2, count // 2), tensor=2), None
  try:
    case.definition.shardings(make_parallel(mesh))
  except InputError as e:
    mesh, left_out = mesh.replace(data=2 * mesh.data, tensor=1), f'over a tensor axis: {e}'
  x, ctx = inputs(), Context(segments_BT=segments(7, 8, 5))
  unsharded, parallel = case.gradients(case.params, x, ctx), make_parallel(mesh)
  params = jax.device_put(
    jax.tree.map(np.asarray, case.params), case.definition.shardings(parallel)
  )
  with use_mesh(parallel):
    # a function of its own, so that nothing traced without the mesh is reused
    on_mesh = case.jit(lambda *a: case.differentiated(*a))
    sharded = on_mesh(params, jax.device_put(x, parallel.batch), ctx)
  close(sharded, unsharded, GRADIENTS, f'on {count} devices against one: outputs and gradients ')
  return left_out


def survives_json(case: Case) -> None:
  """The config survives a round trip through JSON."""
  if configs.from_json(configs.to_json(case.layer)) != case.layer:
    raise Broken('the config read back from its JSON differs')


CHECKS: dict[str, Callable[[Case], str | None]] = {
  'builds, with outputs like inputs': shape,
  'no row depends on the others of its batch': rows_apart,
  'no output depends on a later input': causal,
  'a sequence equals a prefill and steps': every_prefill,
  'a sequence split anywhere gives the same': two_parts,
  'a long sequence equals its tokens one by one': long,
  'packed documents equal separate ones': packed,
  'the state has the declared size': declared,
  'gradients equal differences of outputs': differentiable,
  'bfloat16 is close to float32, with finite gradients': bfloat16,
  'sharded equals unsharded': sharded,
  'the config survives JSON': survives_json,
}
"""What should hold -> its check, which raises `Broken` or returns why it was skipped."""

DECODING = {causal, every_prefill, two_parts, long, declared}
"""The checks that only a layer that decodes can pass."""


def checked_examples(layer: LayerConfig) -> tuple[LayerConfig, ...]:
  """Return the layer and the examples of its class."""
  try:
    examples = type(layer).examples()
  except (InputError, TypeError):  # a config with fields that have no defaults
    return (layer,)
  return (layer, *(e for e in examples if e != layer))
