"""Mixtures of experts: each implementation against the naive one, on one device and with
tokens exchanged between shards of the experts.

Tolerances are relative to the largest magnitude: 1e-5 for outputs and gradients on one device, 1e-4
on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops import moe
from jaxformer.ops.grouped_matmul import grouped_matmul, grouped_matmul_naive, megablox
from jaxformer.ops.implementation import implementation
from jaxformer.ops.moe import Experts, Form, dispatch_with_capacity, dropless
from jaxformer.ops.routing import assign_slots
from jaxformer.planning.collectives import list_collectives
from jaxformer.sharding import MeshConfig, make_parallel, use_mesh
from tests.helpers import forced

pytestmark = pytest.mark.quick
B, T, D, F, E, K = 8, 6, 16, 24, 8, 2


def act(activation):
  return Form(lambda up, gate: activation(up) if gate is None else activation(gate) * up)


SILU, RELU = act(jax.nn.silu), act(jax.nn.relu)
ON_INPUT = Form(SILU.hidden, on_input=True)


def near(a, b, rtol):
  for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert np.abs(x - y).max(initial=0) <= rtol * max(np.abs(y).max(initial=0), 1e-3), (
      jax.tree_util.keystr(path)
    )


def examples(skewed=False, gated=True, biased=False):
  """Inputs, choices, weights of experts, and a cotangent; skewed: nearly all tokens choose the same
  two experts."""
  keys = jax.random.split(jax.random.key(0), 7)
  x, g = jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[6], (B, T, D))
  logits = jax.random.normal(keys[1], (B, T, E)) + (
    5.0 * (jnp.arange(E) < 2) if skewed else jnp.zeros(E)
  ).reshape(1, 1, E)
  top, expert = jax.lax.top_k(logits, K)
  w = [
    0.3 * jax.random.normal(k, s)
    for k, s in zip(keys[2:5], ((E, D, F), (E, D, F), (E, F, D)), strict=True)
  ]
  b = [
    jax.random.normal(k, (E, n)) if biased else None
    for k, n in zip(jax.random.split(keys[5], 3), (F, F, D), strict=True)
  ]
  experts = Experts(w[0], w[1] if gated else None, w[2], b[0], b[1] if gated else None, b[2])
  return x, expert, jax.nn.softmax(top), experts, g


def value_and_gradients(f, x, expert, weight, experts, g, form=SILU):
  def run(x, weight, experts, g):
    y, pull = jax.vjp(
      lambda x, weight, experts: f(x, expert, weight, experts, form), x, weight, experts
    )
    return y, pull(g)

  return jax.jit(run)(x, weight, experts, g)


def by_pairs(x, expert, weight, experts, form):
  with implementation(moe_dropless='naive'):
    return dropless(x, expert, weight, experts, form)


def by_slots(x, expert, weight, experts, form, capacity=T):
  return dispatch_with_capacity(x, expert, weight, experts, form, capacity)[0]


def test_naive_is_a_sum_over_experts():
  """Against a loop in numpy over tokens and their experts."""
  x, expert, weight, experts, _ = examples(gated=False)
  got = np.asarray(by_pairs(x, expert, weight, experts, RELU))
  for b, t in ((0, 0), (3, 5), (7, 2)):
    expected = np.zeros(D)
    for e, w in zip(np.asarray(expert[b, t]), np.asarray(weight[b, t]), strict=True):
      hidden = np.maximum(
        np.asarray(x[b, t], np.float64) @ np.asarray(experts.w_in[e], np.float64), 0
      )
      expected += w * (hidden @ np.asarray(experts.w_out[e], np.float64))
    np.testing.assert_allclose(got[b, t], expected, rtol=1e-4, atol=1e-5)


def test_weights_on_the_input_and_biases():
  """expert(w x), against a loop in numpy; a choice of weight 0 leaves nothing, not even biases."""
  x, expert, weight, experts, _ = examples(gated=False, biased=True)
  weight = weight.at[0, 0, 1].set(0.0)
  got = np.asarray(by_pairs(x, expert, weight, experts, Form(RELU.hidden, on_input=True)))
  w_in, w_out, b_in, b_out = (
    np.asarray(w, np.float64) for w in (experts.w_in, experts.w_out, experts.b_in, experts.b_out)
  )
  for b, t in ((0, 0), (3, 5)):
    expected = np.zeros(D)
    for e, w in zip(np.asarray(expert[b, t]), np.asarray(weight[b, t]), strict=True):
      hidden = np.maximum(w * np.asarray(x[b, t], np.float64) @ w_in[e] + b_in[e], 0)
      expected += (hidden @ w_out[e] + b_out[e]) * (w != 0)
    np.testing.assert_allclose(got[b, t], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('form', [SILU, ON_INPUT], ids=['on output', 'on input'])
@pytest.mark.parametrize('chosen', [dropless, by_slots])
def test_biases_are_pair_by_pair(chosen, form):
  case = examples(True, biased=True)
  expected = value_and_gradients(by_pairs, *case, form)
  near(value_and_gradients(chosen, *case, form), expected, 1e-5)


@pytest.mark.parametrize('skewed', [False, True], ids=['spread', 'skewed'])
@pytest.mark.parametrize('gated', [False, True], ids=['plain', 'gated'])
def test_dropless_is_pair_by_pair(skewed, gated):
  case = examples(skewed, gated)
  near(value_and_gradients(dropless, *case), value_and_gradients(by_pairs, *case), 1e-5)


def test_slots_for_all_are_pair_by_pair():
  case = examples(True)
  near(value_and_gradients(by_slots, *case), value_and_gradients(by_pairs, *case), 1e-5)


def test_slots_go_to_the_first_tokens():
  """Three tokens, all of which want expert 1 first: with one place the first has it; the others
  keep their second choices."""
  expert = jnp.array([[[1, 0], [1, 2], [1, 3]]])
  weight = jnp.array([[[0.6, 0.4], [0.7, 0.3], [0.8, 0.2]]])
  token, kept, dropped = assign_slots(expert, weight, 4, 1)
  np.testing.assert_array_equal(kept[0, :, 0], np.float32([0.4, 0.6, 0.3, 0.2]))
  np.testing.assert_array_equal(token[0, :, 0], [0, 0, 1, 2])
  assert float(dropped) == pytest.approx(2 / 6)
  assert float(assign_slots(expert, weight, 4, 2)[2]) == pytest.approx(1 / 6)
  assert float(assign_slots(expert, weight, 4, 3)[2]) == 0


def test_dropped_choices_are_missing_and_nothing_else():
  x, expert, weight, experts, _ = examples(True)
  got = by_slots(x, expert, weight, experts, SILU, capacity=2)
  count = np.zeros((B, E), int)
  kept = np.zeros((B, T, K), np.float32)
  for b, t, k in np.ndindex(B, T, K):
    e = int(expert[b, t, k])
    kept[b, t, k], count[b, e] = count[b, e] < 2, count[b, e] + 1
  assert kept.mean() < 0.6
  near(got, by_pairs(x, expert, weight * kept, experts, SILU), 1e-5)


# ---- the grouped matmul ------------------------------------------------------------------------

SIZES = {
  'spread': (5, 0, 9, 18),
  'one': (0, 0, 40, 0),
  'some rows of none': (3, 8, 0, 2),
  'none at all': (0, 0, 0, 0),
}


@pytest.mark.parametrize('sizes', SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize(
  'chosen',
  [forced(grouped_matmul, grouped_matmul='tiles'), functools.partial(megablox, interpret=True)],
  ids=['tiles', 'megablox'],
)
def test_grouped_matmul_is_the_naive_one(chosen, sizes):
  keys = jax.random.split(jax.random.key(0), 3)
  x, w, g = (
    jax.random.normal(k, s) for k, s in zip(keys, ((40, 24), (4, 24, 136), (40, 136)), strict=True)
  )
  sizes = jnp.array(sizes)

  def run(f):
    y, pull = jax.vjp(lambda x, w: f(x, w, sizes), x, w)
    return y, pull(g)

  near(run(chosen), run(grouped_matmul_naive), 1e-5)


def test_tiles_smaller_than_groups(monkeypatch):
  """Several tiles a group, the last of which hang over into the next groups."""
  from jaxformer.ops import grouped_matmul as module

  monkeypatch.setattr(module, '_tile_rows', lambda rows: 8)
  test_grouped_matmul_is_the_naive_one(
    forced(grouped_matmul, grouped_matmul='tiles'), SIZES['spread']
  )


# ---- shards of the experts ---------------------------------------------------------------------

MESHES = {
  'expert4-fsdp2': MeshConfig(data=1, expert=4, fsdp=2),
  'expert2-tensor2-data2': MeshConfig(data=2, expert=2, tensor=2),
  'expert8': MeshConfig(data=1, expert=8),
}


@pytest.mark.parametrize('mesh', MESHES.values(), ids=list(MESHES))
@pytest.mark.parametrize('chosen', [dropless, by_slots])
def test_shards_of_experts_equal_one_device(chosen, mesh):
  case = examples()
  expected = value_and_gradients(chosen, *case)
  with use_mesh(make_parallel(mesh)):
    near(value_and_gradients(chosen, *case), expected, 1e-4)


@pytest.mark.parametrize('mesh', ['expert4-fsdp2', 'expert2-tensor2-data2'])
@pytest.mark.parametrize('form', [SILU, ON_INPUT], ids=['on output', 'on input'])
@pytest.mark.parametrize('chosen', [dropless, by_slots])
def test_biases_on_shards_of_experts(chosen, form, mesh):
  """The bias of the output is added once, where hidden units are sharded too."""
  case = examples(biased=True)
  expected = value_and_gradients(chosen, *case, form)
  with use_mesh(make_parallel(MESHES[mesh])):
    near(value_and_gradients(chosen, *case, form), expected, 1e-4)
  x, expert, weight, experts, g = case
  few = x[:3], expert[:3], weight[:3], experts, g[:3], form
  expected = value_and_gradients(chosen, *few)
  with use_mesh(make_parallel(MESHES[mesh])):
    near(value_and_gradients(chosen, *few), expected, 1e-4)


def test_rounds_carry_any_imbalance(monkeypatch):
  """All tokens want the same two experts, of one shard, and a round has room for few of them."""
  case = examples(skewed=True)
  # of the 12 pairs of each of eight devices
  monkeypatch.setattr(moe, '_bucket_rows', lambda pairs, shards: 2)
  expected = value_and_gradients(by_pairs, *case)
  with use_mesh(make_parallel(MESHES['expert4-fsdp2'])):
    near(value_and_gradients(dropless, *case), expected, 1e-4)


@pytest.mark.parametrize('chosen', [dropless, by_slots])
def test_few_sequences_stay_where_they_are(chosen):
  """Three sequences are not sharded: every shard has all tokens and computes its experts' part."""
  x, expert, weight, experts, g = examples()
  case = x[:3], expert[:3], weight[:3], experts, g[:3]
  expected = value_and_gradients(chosen, *case)
  with use_mesh(make_parallel(MESHES['expert4-fsdp2'])):
    near(value_and_gradients(chosen, *case), expected, 1e-4)


@pytest.mark.parametrize('chosen', [dropless, by_slots])
def test_tokens_travel_and_weights_stay(chosen):
  x, expert, weight, experts, g = examples()
  config = MESHES['expert4-fsdp2']
  parallel = make_parallel(config)
  tokens = parallel.batch
  stored = Experts(
    *(
      jax.device_put(w, parallel.param('w', axes, w.shape))
      for w, axes in zip(
        experts[:3],
        (('experts', 'embed', 'mlp'),) * 2 + (('experts', 'mlp', 'embed'),),
        strict=True,
      )
    )
  )
  put = [jax.device_put(a, tokens) for a in (x, expert, weight, g)]

  def run(x, expert, weight, experts, g):
    y, pull = jax.vjp(
      lambda x, weight, experts: chosen(x, expert, weight, experts, SILU), x, weight, experts
    )
    return y, pull(g)

  with use_mesh(parallel):
    where = tokens, (tokens, tokens, jax.tree.map(lambda w: w.sharding, stored))
    compiled = (
      jax.jit(run, out_shardings=where).lower(put[0], put[1], put[2], stored, put[3]).compile()
    )
  sent = list_collectives(compiled)
  travelling = [c for c in sent if c.kind == 'all-to-all']
  assert len(travelling) >= 4  # there and back, forwards and backwards
  gathered = [s for c in sent if c.kind == 'all-gather' for s in c.shapes]
  assert gathered  # weights over fsdp, of the experts of one shard
  assert not [s for s in gathered if s.startswith((f'f32[{E},{D},', f'f32[{E},{F},'))], gathered
  near(
    compiled(put[0], put[1], put[2], stored, put[3]),
    value_and_gradients(chosen, x, expert, weight, experts, g),
    1e-4,
  )
