"""Sequences sharded over a mesh in time: what the contract suite does not reach, and what compiled
programs send.

Tolerances are relative to the largest magnitude of what is compared: 1e-5 for outputs, 1e-4 for
gradients (fp32)."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxformer.layers.h3 import H3
from jaxformer.layers.layer import Context, LayerPosition
from jaxformer.layers.lstm import Lstm
from jaxformer.layers.mamba import Mamba
from jaxformer.layers.mamba2 import Mamba2
from jaxformer.layers.rwkv4 import TimeMix4
from jaxformer.layers.rwkv5 import TimeMix5
from jaxformer.layers.rwkv6 import TimeMix6
from jaxformer.layers.rwkv7 import TimeMix7
from jaxformer.layers.s4 import S4
from jaxformer.layers.s4d import S4D
from jaxformer.layers.s5 import S5
from jaxformer.ops.attention import attention, attention_naive
from jaxformer.ops.attention_sequence_parallel import attention_sharded
from jaxformer.ops.convolution import short_convolution
from jaxformer.ops.implementation import implementation
from jaxformer.ops.masks import Mask
from jaxformer.ops.recurrence import gru
from jaxformer.ops.routing import assign_slots, has_slot
from jaxformer.ops.wkv6 import wkv6
from jaxformer.planning.collectives import list_collectives
from jaxformer.sharding import MeshConfig, Parallel, make_mesh, make_parallel, use_mesh
from tests.tiers import case


def context(n: int, **sizes: int):
  config = MeshConfig(**{'data': 1, 'context': n} | sizes)
  return use_mesh(make_parallel(config, jax.devices()[: math.prod(sizes.values()) * n]))


def normal(seed: int, *shape: int):
  return jax.random.normal(jax.random.key(seed), shape)


def close(a, b, rtol):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert np.abs(x - y).max(initial=0.0) <= rtol * max(np.abs(y).max(initial=0.0), 1e-3)


def equal_in_time(f, *arguments, n: int, **sizes: int):
  """f and the gradient of a scalar of it, on n shards of time and on one device."""

  def both(*arguments):
    def score(*arguments):
      out = f(*arguments)
      places = [
        jnp.arange(y.shape[1]).reshape(1, -1, *(1,) * (y.ndim - 2)) for y in jax.tree.leaves(out)
      ]
      return sum(
        jnp.sum(jnp.sin(y + t)) for y, t in zip(jax.tree.leaves(out), places, strict=True)
      ), out

    return jax.grad(score, argnums=tuple(range(len(arguments))), has_aux=True)(*arguments)

  gradients, out = jax.jit(lambda *a: both(*a))(*arguments)
  with context(n, **sizes):
    sharded_gradients, sharded = jax.jit(lambda *a: both(*a))(*arguments)
  close(sharded, out, 1e-5)
  close(sharded_gradients, gradients, 1e-4)


# ---- attention ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('mask', 'softcap', 'T'),
  [
    (Mask(), None, 1024),
    (Mask(segments_BT=jnp.arange(1024)[None] // 300), None, 1024),
    (Mask(window=200), 3.0, 512),
    (Mask(causal=False), None, 512),
    (Mask(), None, 4608),  # the gradient of queries has a kernel of its own
  ],
  ids=['causal', 'segments', 'window', 'all', 'long'],
)
def test_splash_attention_of_each_shards_queries(mask, softcap, T):
  """The kernel, interpreted, on four shards of time, against the naive form on one device."""
  K = 64
  inputs = [normal(i, 1, T, heads, K) for i, heads in enumerate((2, 1, 1, 2))]
  options = {'scale': K**-0.5, 'softcap': softcap}
  segments = mask.segments_BT

  def both(f):
    def score(q, k, v, segments):
      out = f(q, k, v, dataclasses.replace(mask, segments_BT=segments), **options)
      return jnp.sum(out * inputs[3]), out

    return jax.jit(jax.grad(score, argnums=(0, 1, 2), has_aux=True))(*inputs[:3], segments)

  gradients, out = both(attention_naive)
  with context(4):
    sharded_gradients, sharded = both(
      functools.partial(attention_sharded, splash=True, interpret=True)
    )
  close(sharded, out, 1e-5)
  close(sharded_gradients, gradients, 1e-4)


@pytest.mark.parametrize(
  ('n', 'mask', 'options'),
  [
    (8, Mask(), {}),
    # an odd number of shards sends its halves another way round
    (3, Mask(), {'softcap': 3.0}),
    (4, Mask(), {'slopes_H': jnp.asarray([0.5, 0.25, 0.1, 0.05])}),
    # a window longer than a shard's part is balanced, a short one need not be
    (4, Mask(window=17), {}),
    (4, Mask(window=5), {}),
    (4, Mask(causal=False), {}),
    (4, Mask(causal=False, window=9), {}),
  ],
  ids=['8', '3-softcap', '4-alibi', '4-window17', '4-window5', '4-both-ways', '4-band'],
)
@pytest.mark.parametrize('packed', [False, True])
def test_attention(n, mask, options, packed):
  T = 48
  segments = (
    jnp.broadcast_to(jnp.asarray(np.repeat([0, 1, 2], [7, 25, 16]))[None], (2, T))
    if packed
    else None
  )
  mask = Mask(mask.causal, mask.window, segments)
  q, k, v = normal(0, 2, T, 4, 8), normal(1, 2, T, 2, 8), normal(2, 2, T, 2, 8)
  equal_in_time(lambda q, k, v: attention(q, k, v, mask, scale=0.3, **options), q, k, v, n=n)


def test_attention_of_parts_that_cannot_be_halved():
  q, k = normal(0, 2, 20, 4, 8), normal(1, 2, 20, 2, 8)
  equal_in_time(lambda q, k: attention(q, k, k, Mask(), scale=0.3), q, k, n=4, tensor=2)


def test_causal_attention_is_balanced():
  """Every shard visits as many pairs of blocks: the ranges of keys that its queries can see are
  equally long in all."""
  from jaxformer.ops.attention_sequence_parallel import _workers

  for n in (2, 3, 4, 8):
    firsts, seconds = (dict(p) for p in _workers(n))
    halves = {i: [] for i in range(n)}
    for home, (first, second) in enumerate(zip(firsts.values(), seconds.values(), strict=True)):
      halves[first].append(2 * home)
      halves[second].append(2 * home + 1)
    assert {sum(half + 1 for half in own) for own in halves.values()} == {2 * n + 1}


# ---- recurrences -------------------------------------------------------------------------------


@pytest.mark.parametrize('d_conv', [1, 4, 9])
def test_a_convolution_longer_than_a_part_is_not_sharded(d_conv):
  """Parts are of 5 positions: nothing to send, what the part before has, and more than that."""
  x, w = normal(0, 2, 20, 6), normal(1, d_conv, 6)
  starts = jnp.zeros((2, 20), bool).at[:, jnp.asarray([4, 5, 13])].set(True)
  equal_in_time(lambda x, w: short_convolution(x, w, None, None, starts), x, w, n=4)


@pytest.mark.parametrize('rows', [1, 3, 8])
def test_any_number_of_rows_goes_through_a_gru_as_a_pipeline(rows):
  x, w, u, h = normal(0, rows, 16, 5), normal(1, 5, 3, 6), normal(2, 6, 3, 6), normal(3, rows, 6)
  starts = jnp.zeros((rows, 16), bool).at[:, 4].set(True)
  equal_in_time(lambda x, u, h: gru(x, w, u, None, h, starts), x, u, h, n=4)


def test_decays_that_are_the_same_for_all_tokens_and_the_kernel():
  r, k, v = normal(0, 2, 32, 2, 8), normal(1, 2, 32, 2, 8), normal(2, 2, 32, 2, 8)
  decay, u, S = -jnp.exp(normal(3, 1, 1, 2, 8)), normal(4, 2, 8), normal(5, 2, 2, 8, 8)
  starts = jnp.zeros((2, 32), bool).at[:, 9].set(True)
  equal_in_time(lambda r, k, v, S: wkv6(r, k, v, decay, u, S, starts), r, k, v, S, n=4)
  with implementation(wkv6='pallas'):
    equal_in_time(lambda r, k, v, S: wkv6(r, k, v, decay, u, S, starts), r, k, v, S, n=2)


def test_slots_are_those_of_the_complete_sequence():
  expert = jax.random.randint(jax.random.key(0), (3, 16, 2), 0, 4)
  weight = jnp.ones(expert.shape)
  _, kept, _ = assign_slots(expert, weight, 4, 5)
  with context(4):
    has = jax.jit(lambda e: has_slot(e, 4, 5))(expert)
  counted = jnp.sum(jnp.where(has[..., None], jax.nn.one_hot(expert, 4), 0), axis=(1, 2))
  np.testing.assert_array_equal(counted, kept.sum(-1))
  assert int((~has).sum()) > 0


# ---- what is sent ------------------------------------------------------------------------------

B, T, D = 2, 1024, 32
LINEAR = (
  Mamba.Config(d_state=4),
  Mamba2.Config(d_state=8, head_dim=8),
  TimeMix4.Config(),
  TimeMix5.Config(head_dim=8),
  TimeMix6.Config(head_dim=8),
  TimeMix7.Config(head_dim=8, value_rank=None),
  S4.Config(d_state=8, length=64),
  S4D.Config(d_state=8),
  S5.Config(d_state=8),
  S4D.Config(d_state=8, causal=False),
  H3.Config(d_state=8),
  Lstm.Config(),
)


@pytest.mark.parametrize(
  'config', [case(c, id=c.tag, standing=i % 3 == 0) for i, c in enumerate(LINEAR)]
)
def test_no_sequence_is_all_gathered(config):
  """Of one layer forward and backward on four shards of time, all that is sent is smaller than a
  shard's part of the sequence."""
  graph, params = nnx.split(
    config.build(D, nnx.Rngs(0), LayerPosition(index=0, depth=2, branches=2))
  )

  def loss(params, x, segments_BT):
    return jnp.sum(jnp.sin(nnx.merge(graph, params)(x, Context(segments_BT=segments_BT)).y))

  config = MeshConfig(data=1, context=4)
  mesh = make_mesh(config, jax.devices()[:4])
  where = Parallel(mesh, config.rules).batch
  x, ids = (
    jax.ShapeDtypeStruct((B, T, D), jnp.float32, sharding=where),
    jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=where),
  )
  with use_mesh(Parallel(mesh, config.rules)):
    compiled = (
      jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=(None, where))
      .lower(params, x, ids)
      .compile()
    )
  sent = list_collectives(compiled)
  assert sent
  assert not [c for c in sent if max(map(numbers, c.shapes)) >= B * T * D // 4]


def numbers(shape: str) -> int:
  return math.prod(int(d) for d in re.findall(r'\d+', shape.split('[')[1]))
