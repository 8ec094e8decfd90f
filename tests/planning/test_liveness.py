"""Bytes that are in memory at once, of programs that are counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from jaxformer.ops.attention import ATTENTION
from jaxformer.ops.masks import Mask
from jaxformer.planning.decoding_state import tiled_bytes
from jaxformer.planning.liveness import peak_bytes
from jaxformer.planning.residuals import traced
from jaxformer.sharding import assume_platform

pytestmark = pytest.mark.quick

KB = 1024
X, UP, DOWN = (16, 16), (16, 64), (64, 16)  # 1 KB, 4 KB and 4 KB in fp32


def peak(f, *shapes, shards=None, outputs=True):
  closed = jax.make_jaxpr(f)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
  shards = shards or [None] * len(shapes)
  given = [traced(v.aval, s) for v, s in zip(closed.jaxpr.invars, shards, strict=True)]
  return peak_bytes(closed.jaxpr, given, outputs)


def gated(x, gate, up, down):
  return (jax.nn.silu(x @ gate) * (x @ up)) @ down


@pytest.mark.parametrize(
  ('f', 'shapes', 'size'),
  [
    (lambda x, up: jnp.exp(x @ up) + 1.0, (X, UP), 4 * KB),  # elementwise operations are fused
    (lambda x: x + 1.0, (X,), 0),
    (gated, (X, UP, UP, DOWN), 9 * KB),  # two hidden arrays, and the product of theirs
    (jax.jit(gated), (X, UP, UP, DOWN), 9 * KB),
    # the first hidden array is not needed any more when the second is there
    (lambda x, up, down: (((x @ up) @ down) @ up) @ down, (X, UP, DOWN), 5 * KB),
    # a column of x is all that an iteration has; the results of all are stacked
    (lambda x: jax.lax.scan(lambda c, row: (c, row[None] @ x), 0.0, x)[1], (X,), 1 * KB + 68),
    # a carry is updated in place
    (
      lambda x: jax.lax.scan(lambda c, i: (c.at[i].set(1.0), None), x @ x, jnp.arange(16))[0],
      (X,),
      2 * KB,
    ),
  ],
)
def test_peak(f, shapes, size):
  assert peak(f, *shapes) == pytest.approx(size, abs=8)


def test_attention_of_a_gpu_holds_no_logits():
  """cuDNN's kernel writes its output alone; its stand-in in a trace computes the logits, 64 KB."""
  mask, q = Mask(), jax.ShapeDtypeStruct((1, 128, 1, 16), jnp.bfloat16)

  def attend(q):
    return ATTENTION['cudnn'](q, q, q, mask, scale=0.25)

  with assume_platform('gpu'):
    for f in (attend, jax.jit(attend)):
      closed = jax.make_jaxpr(f)(q)
      assert peak_bytes(closed.jaxpr, [traced(q)]) == 4 * KB


def test_shards_and_results_are_not_counted():
  half = [None, (1, 2), (1, 2), (2, 1)]
  assert peak(gated, X, UP, UP, DOWN, shards=half) == 5 * KB
  assert peak(lambda x, up: x @ up, X, UP, outputs=False) == 0


@pytest.mark.parametrize(
  ('shape', 'itemsize', 'padded'),
  [
    # The layouts of arguments by the TPU compiler (jax 0.10.2, libtpu 0.0.42.1)
    ((31, 8, 40, 64, 64), 4, 2.0),
    ((16, 1, 8192, 8, 64), 2, 1.0),
    ((24, 4, 3, 3072), 2, 1.0),
    ((24, 4, 1536, 16), 4, 1.0),
    ((24, 2, 4, 200, 80), 4, 1.28),
    ((12, 32, 768, 5), 4, 1.0),
    ((6, 3, 3072, 4), 2, 1.0),
    ((24, 8, 3, 100), 2, 1.28),
    ((24, 1, 1, 2048), 4, 1.0),
  ],
)
def test_tiles(shape, itemsize, padded):
  exact = itemsize
  for n in shape:
    exact *= n
  assert tiled_bytes(shape, itemsize) == pytest.approx(padded * exact)
