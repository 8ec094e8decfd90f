"""What holds for every tiny preset: the layer contract carried through embedding, stack and head.

`every` is every language model; `all_kinds` has the classifiers and the encoder-decoders too
(test_encoder_decoders.py has the rest of what holds for these).
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers.layer import Context
from jaxformer.models.stack import REMAT
from jaxformer.ops.implementation import implementation
from jaxformer.sharding import MeshConfig, Parallel, make_mesh, make_parallel, use_mesh
from jaxformer.testing import contract
from tests import tiers
from tests.contract.cases import BATCH, CLASSIFIERS, PAIRS, TINY, close, model, segments, tokens
from tests.tiers import families

every = pytest.mark.parametrize('name', families(TINY))
# Of what depends on how a stack is built, and not on the layers in it, which test_layers.py puts on
# a mesh one by one: a family of each build.
BUILDS = (
  'gpt2-tiny',
  'h3-tiny',
  'jamba-tiny',
  'llama3-tiny',
  'lstm-tiny',
  'mamba-tiny',
  'mixtral-tiny',
  'moe-lstm-tiny',
  'rwkv4-tiny',
  'rwkv7-tiny',
  's4d-tiny',
  *CLASSIFIERS,
  *PAIRS,
)
all_kinds = pytest.mark.parametrize('name', families([*TINY, *CLASSIFIERS, *PAIRS]))
LENGTH, DOCUMENTS = 40, (20, 20)
# With every remat policy and on every mesh; the others with what is most likely to break.
IN_EVERY_WAY = ('llama3-tiny', 's4d-tiny')
# One of each kind that is divided in time. Each layer by itself is so divided in test_layers.py.
IN_TIME = ('mamba-tiny', 'rwkv7-tiny', 'mixtral-tiny', 'jamba-tiny')


def batch_of(case):
  if hasattr(case.definition.config, 'classes'):
    return sequences_of(case)
  if hasattr(case.definition.config, 'source_vocab_size'):
    return pairs_of(case)
  t = tokens(case, LENGTH + 1)
  targets = t[:, 1:].at[:, 5].set(-1)
  return types.SimpleNamespace(
    inputs=t[:, :-1], targets_BT=targets, segments_BT=segments(*DOCUMENTS)
  )


def pairs_of(case):
  """Sources of 24, 22, ... tokens and targets of 40, 37, ..."""
  t, where_BT, row_B1 = (
    tokens(case, LENGTH + 1),
    jnp.arange(LENGTH)[None],
    jnp.arange(BATCH)[:, None],
  )
  source = tokens(case, 24 + LENGTH)[:, LENGTH:]
  return types.SimpleNamespace(
    source_BS=jnp.where(where_BT[:, :24] < 24 - 2 * row_B1, source, -1),
    inputs=t[:, :-1],
    targets_BT=jnp.where(where_BT < LENGTH - 3 * row_B1, t[:, 1:], -1),
    segments_BT=None,
  )


def sequences_of(case):
  """Sequences to classify, of lengths 40, 37, 34, ..., padded with what they would go on with."""
  config, length_B = case.definition.config, LENGTH - 3 * jnp.arange(BATCH)
  label_B = jnp.arange(BATCH) % config.classes
  where_BT, length_B1 = jnp.arange(LENGTH)[None], length_B[:, None]
  return types.SimpleNamespace(
    inputs=tokens(case, LENGTH)
    if config.task.features is None
    else jax.random.normal(jax.random.key(3), (BATCH, LENGTH, config.task.features)),
    targets_BT=jnp.where(where_BT == length_B1 - 1, label_B[:, None], -1),
    segments_BT=(where_BT < length_B1).astype(jnp.int32),
  )


def loss_of(case, batch, cast=None):
  """(the loss, its sums) and the gradients of the parameters, which `cast` turns into what the
  model computes with."""

  def loss(params, ctx):
    params = params if cast is None else cast(params)
    sums, aux = case.definition.merge(params).loss(batch, ctx, z_loss=1e-3)
    return sums.loss / sums.count + sum(
      (v for k, v in aux.items() if k.startswith('loss/')), 0.0
    ), sums

  return lambda params, ctx=Context(unroll=False): jax.value_and_grad(loss, has_aux=True)(
    params, ctx
  )


@tiers.newest
@every
@pytest.mark.parametrize('prefill', [0, 20])
def test_sequence_equals_prefill_and_steps(name, prefill):
  case = model(name)
  contract.continued(case, tokens(case, 24), prefill)


@every
def test_packed_documents_equal_separate_ones(name):
  case = model(name)
  x = tokens(case, LENGTH)
  packed = case.call(case.params, x, Context(segments_BT=segments(*DOCUMENTS)))[0]
  apart = [
    case.call(case.params, part, Context(), case.init_state(BATCH, 24))[0]
    for part in jnp.split(x, 2, axis=1)
  ]
  close(packed, jnp.concatenate(apart, axis=1), 1e-5)


@tiers.newest
@every
def test_loss_equals_that_of_the_logits(name):
  case = model(name)
  batch, sums = batch_of(case), on_one_device(name)[0][1]
  logits = np.asarray(
    case.call(case.params, batch.inputs, Context(segments_BT=batch.segments_BT))[0], np.float64
  )
  targets = np.asarray(batch.targets_BT)
  top = logits.max(-1, keepdims=True)
  normaliser = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
  nll = normaliser - np.take_along_axis(logits, np.maximum(targets, 0)[..., None], -1)[..., 0]
  np.testing.assert_allclose(float(sums.nll), nll[targets != -1].sum(), rtol=1e-5)
  assert float(sums.count) == (targets != -1).sum() == BATCH * (LENGTH - 1)


@functools.cache
def on_one_device(name):
  """Loss and gradients, the stack scanned."""
  case = model(name)
  return jax.jit(loss_of(case, batch_of(case)))(case.params)


@tiers.newest
@pytest.mark.parametrize('name', families(BUILDS))
def test_every_way_to_run_the_stack_agrees(name):
  case, scanned = model(name), on_one_device(name)
  loss = loss_of(case, batch_of(case))
  with implementation(every='naive'):
    close(
      jax.jit(lambda *a: loss(*a))(case.params, Context(unroll=True)),
      scanned,
      1e-4,
      'naive, unrolled ',
    )
  ways = [Context(remat='full', unroll=False)]
  if name in IN_EVERY_WAY:
    ways = [
      Context(unroll=True),
      *(Context(remat=r, unroll=False) for r in REMAT if r not in ('none', 'offload')),
    ]
  for ctx in ways:
    close(jax.jit(loss)(case.params, ctx), scanned, 1e-4, f'{ctx.remat} {ctx.unroll} ')


MESHES = {
  'fsdp4-tensor2': MeshConfig(fsdp=4, tensor=2),
  'data8': MeshConfig(data=8, rules='data_parallel'),
  'fsdp8': MeshConfig(fsdp=8, rules='fsdp'),
  'data2-fsdp2-tensor2': MeshConfig(data=2, fsdp=2, tensor=2),
  'expert4-fsdp2': MeshConfig(data=1, expert=4, fsdp=2),  # for models with experts
  'context4-fsdp2': MeshConfig(data=1, context=4, fsdp=2),
  'context2-expert2-tensor2': MeshConfig(data=1, context=2, expert=2, tensor=2),
  'replica2-context2-fsdp2': MeshConfig(data=1, replica=2, context=2, fsdp=2, rules='fsdp'),
}
USUAL_MESHES = 'fsdp4-tensor2', 'data8', 'context4-fsdp2', 'context2-expert2-tensor2'
MIXTURES = {
  'mixtral-tiny': ['context4-fsdp2', 'expert4-fsdp2', 'context2-expert2-tensor2'],
  'jamba-tiny': ['context2-expert2-tensor2'],
}


def meshes_for(name):
  if name in IN_EVERY_WAY:
    return [m for m in MESHES if 'expert' not in m]
  if name in PAIRS:
    return ['fsdp4-tensor2', 'data8']
  return ['fsdp4-tensor2', *MIXTURES.get(name, ['context4-fsdp2'] if name in IN_TIME else [])]


@tiers.newest
@pytest.mark.parametrize(
  ('name', 'mesh'),
  [
    tiers.case(
      n,
      MESHES[m],
      id=f'{n}-{m}',
      standing=n.removesuffix('-tiny') in tiers.STANDING and m in USUAL_MESHES,
    )
    for n in BUILDS
    for m in meshes_for(n)
  ],
)
def test_sharded_equals_unsharded(name, mesh):
  case = model(name)
  batch = batch_of(case)
  reference = on_one_device(name)
  devices = make_mesh(mesh)
  params = jax.device_put(case.params, case.definition.shardings(Parallel(devices, mesh.rules)))
  put = {k: jax.device_put(v, Parallel(devices, mesh.rules).batch) for k, v in vars(batch).items()}
  with use_mesh(Parallel(devices, mesh.rules)):
    where = jax.tree.map(lambda p: p.sharding, params)
    gradient = jax.jit(loss_of(case, types.SimpleNamespace(**put)), out_shardings=(None, where))
    close(gradient(params), reference, 1e-4)


@tiers.newest
@all_kinds
def test_parameters_are_initialized_sharded_and_equal(name):
  case = model(name)
  parallel = make_parallel(MeshConfig(fsdp=4, tensor=2))
  sharded = case.definition.init(jax.random.key(0), parallel)
  for parameter, value in case.initial.items():
    np.testing.assert_array_equal(
      np.asarray(sharded[parameter]), np.asarray(value), err_msg=parameter
    )
  assert max(p.addressable_shards[0].data.size for p in sharded.values()) < max(
    p.size for p in sharded.values()
  )


@all_kinds
def test_bfloat16_loss_is_near_and_its_gradients_finite(name):
  case = model(name)
  loss = loss_of(case, batch_of(case), lambda p: case.definition.cast(p, jnp.bfloat16))
  (value, _), gradients = jax.jit(loss)(case.params)
  np.testing.assert_allclose(value, on_one_device(name)[0][0], rtol=0.02)
  for parameter, g in gradients.items():
    assert g.dtype == jnp.float32
    assert np.all(np.isfinite(np.asarray(g))), parameter


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_padding_leaves_no_trace_in_a_class(name):
  case = model(name)
  batch = sequences_of(case)
  logits = jax.jit(lambda p, b: case.definition.merge(p)(types.SimpleNamespace(**b)))
  together = logits(case.params, vars(batch))
  for i in (1, 7):
    length = int(batch.segments_BT[i].sum())
    alone = {k: v[i : i + 1, :length] for k, v in vars(batch).items()} | {'segments_BT': None}
    close(logits(case.params, alone)[0], together[i], 1e-5)
