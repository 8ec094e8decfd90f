"""What layers of a stack have in common: one set of weights at several depths, and values that
belong to the stack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxformer.config import InputError
from jaxformer.layers.attention import Attention
from jaxformer.layers.layer import STACK_INPUT, CommonConfig, Context, Layer, LayerConfig, Output
from jaxformer.layers.mlp import GatedMlp, LinearMap
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.shared import Shared
from jaxformer.layers.stack_input import WithStackInput
from jaxformer.models.block import Block, BlockLayer, Plain, Residual, pre_norm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.params import define
from jaxformer.models.stack import Group, Stack
from jaxformer.planning.cost import cost
from jaxformer.sharding import MeshConfig, Parallel, make_mesh, param, use_mesh

D = 16
ATTENTION, MLP = Attention.Config(heads=2), GatedMlp.Config(hidden=24)
SHARED = Shared.Config(layer=ATTENTION, name='attention'), Shared.Config(layer=MLP, name='mlp')
TOKENS = jax.random.randint(jax.random.key(1), (2, 12), 0, 30)


def model(*groups):
  return LanguageModel.Config(width=D, context_length=16, vocab_size=30, stack=groups)


def groups(attention, mlp):
  """Blocks of the same layers in a stacked group, alone, and beside another block."""
  block, other = pre_norm(RMSNorm(), attention, mlp), pre_norm(RMSNorm(), GatedMlp.Config(hidden=8))
  return (
    Group(pattern=(block,), repeats=2),
    Group(pattern=(block,)),
    Group(pattern=(other, block), repeats=2),
  )


def separate(params, like):
  """The parameters of a stack with weights of their own at every depth, from shared ones."""
  found = {}
  for name, info in define(like).info.items():
    if name in params:
      found[name] = params[name]
      continue
    at, layer = name.split('.layer.')
    part = 'attention' if 'branches.0' in at else 'mlp'
    found[name] = jnp.broadcast_to(params[f'stack.common.{part}.{layer}'], info.shape)
  return found


def logits(config, params, unroll):
  return jax.jit(lambda p: define(config).merge(p)(TOKENS, Context(unroll=unroll)).y)(params)


def test_shared_weights_are_stored_once_and_used_at_every_depth():
  ours, theirs = model(*groups(*SHARED)), model(*groups(ATTENTION, MLP))
  params = define(ours).init(jax.random.key(0))
  names = [n for n in params if 'attention' in n]
  assert names == [f'stack.common.attention.{p}.kernel' for p in 'koqv']
  assert {define(ours).info[n].uses for n in names} == {5}
  np.testing.assert_allclose(
    logits(ours, params, True), logits(theirs, separate(params, theirs), True), atol=1e-6
  )
  np.testing.assert_allclose(logits(ours, params, True), logits(ours, params, False), atol=1e-5)
  once = sum(define(ours).info[n].size for n in params if '.common.' in n)
  assert define(theirs).size - define(ours).size == 4 * once
  assert cost(ours).forward_flops_per_token == cost(theirs).forward_flops_per_token
  assert cost(ours).decode_state_bytes == cost(theirs).decode_state_bytes


def test_gradients_of_shared_weights_are_sums_over_the_depths():
  ours, theirs = model(*groups(*SHARED)), model(*groups(ATTENTION, MLP))
  params = define(ours).init(jax.random.key(0))

  def loss(config, params, unroll=False):
    return jnp.sum(jnp.sin(define(config).merge(params)(TOKENS, Context(unroll=unroll)).y))

  apart = jax.jit(jax.grad(lambda p: loss(theirs, separate(p, theirs))))(params)
  for unroll in (False, True):
    found = jax.jit(jax.grad(lambda p, u=unroll: loss(ours, p, u)))(params)
    for name, g in found.items():
      np.testing.assert_allclose(g, apart[name], atol=1e-4 * float(jnp.abs(g).max()), err_msg=name)


def test_each_depth_has_a_state_of_its_own():
  config = model(*groups(*SHARED))
  params = define(config).init(jax.random.key(0))

  @jax.jit
  def stepped(params):
    module = define(config).merge(params)
    state, found = module.init_state(2, 12), []
    for i in range(TOKENS.shape[1]):
      out = module.step(TOKENS[:, i], Context(), state)
      state = out.state
      found.append(out.y)
    return jnp.stack(found, 1)

  np.testing.assert_allclose(stepped(params), logits(config, params, None), atol=1e-5)


def test_adapters_add_products_of_low_rank():
  mlp = Shared.Config(layer=MLP, name='mlp', rank=3, adapted=('gate', 'down'))
  config = model(Group(pattern=(Block.Config(branches=(Plain(layer=mlp),)),), repeats=2))
  params = define(config).init(jax.random.key(0))
  for i, name in enumerate(n for n in params if 'adapters' in n):
    params[name] = 0.3 * jax.random.normal(jax.random.key(i), params[name].shape)
  # the same model with weights of its own at each depth
  theirs = model(Group(pattern=(Block.Config(branches=(Plain(layer=MLP),)),), repeats=2))
  own = {}
  for name in define(theirs).info:
    if '.layer.' not in name:
      own[name] = params[name]
      continue
    at, projection = name.split('.layer.')[0], name.split('.')[-2]
    kernel = jnp.stack([params[f'stack.common.mlp.{projection}.kernel']] * 2)
    if projection != 'up':
      a, b = (params[f'{at}.layer.adapters.{projection}.{i}.kernel'] for i in (0, 1))
      kernel = kernel + a @ b
    own[name] = kernel
  np.testing.assert_allclose(
    logits(config, params, False), logits(theirs, own, False), rtol=1e-4, atol=1e-5
  )


def test_adapters_that_share_a_matrix_inside_a_block():
  """Paths through lists, and two projections of one input whose adapters have one A."""
  block = pre_norm(RMSNorm(), ATTENTION, MLP)
  paths = 'block.branches.0.layer.q', 'block.branches.1.layer.gate+up'
  layer = Shared.Config(layer=BlockLayer.Config(block=block), name='block', rank=3, adapted=paths)
  config = model(Group(pattern=(Block.Config(branches=(Plain(layer=layer),)),)))
  params = define(config).init(jax.random.key(0))
  adapters = [n for n in params if 'adapters' in n]
  assert len(adapters) == 2 + 3
  for i, name in enumerate(adapters):
    params[name] = 0.3 * jax.random.normal(jax.random.key(i), params[name].shape)
  theirs = model(Group(pattern=(block,)))
  own = {
    n.replace('stack.common.block.block.', 'stack.groups.0.0.'): p
    for n, p in params.items()
    if n not in adapters
  }
  at = 'stack.groups.0.0.branches.0.layer.adapters.'
  for path, branch, names in ((paths[0], 0, ['q']), (paths[1], 1, ['gate', 'up'])):
    a, *b = (params[f'{at}{path.replace(".", "/")}.{i}.kernel'] for i in range(1 + len(names)))
    for name, up in zip(names, b, strict=True):
      own[f'stack.groups.0.0.branches.{branch}.layer.{name}.kernel'] += a @ up
  np.testing.assert_allclose(
    logits(config, params, False), logits(theirs, own, False), rtol=1e-4, atol=1e-5
  )


def test_projections_that_share_a_matrix_have_one_input():
  layer = Shared.Config(layer=MLP, rank=2, adapted=('gate+down',))
  with pytest.raises(InputError, match='projections that have one input'):
    define(model(Group(pattern=(pre_norm(RMSNorm(), layer),))))


def test_a_block_repeats_with_one_set_of_weights():
  """A looped model: norms are shared too."""
  block = pre_norm(RMSNorm(), ATTENTION, MLP)
  looped = Shared.Config(layer=BlockLayer.Config(block=block), name='block')
  config = model(Group(pattern=(Block.Config(branches=(Plain(layer=looped),)),), repeats=4))
  once = model(Group(pattern=(block,)))
  assert define(config).size == define(once).size
  params = define(config).init(jax.random.key(0))
  theirs = {
    n.replace('stack.common.block.block.', 'stack.groups.0.0.'): p for n, p in params.items()
  }

  def repeated(params):
    module = define(once).merge(params)
    x = module.embedder(TOKENS, jnp.zeros_like(TOKENS))
    for _ in range(4):
      x = module.stack(x, Context()).y
    return module.logits(module.final_norm(x))

  np.testing.assert_allclose(
    logits(config, params, False), jax.jit(repeated)(theirs), rtol=1e-5, atol=1e-6
  )


def test_shared_weights_on_a_mesh():
  config = model(*groups(*SHARED))
  mesh = MeshConfig(data=1, fsdp=2, tensor=2)
  parallel = Parallel(make_mesh(mesh, jax.devices()[:4]))
  params = define(config).init(jax.random.key(0))
  expected = logits(config, params, False)
  placed = jax.device_put(params, define(config).shardings(parallel))
  with use_mesh(parallel):
    found = jax.jit(lambda p: define(config).merge(p)(TOKENS, Context(unroll=False)).y)(placed)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_one_name_for_two_modules_is_an_error():
  other = Shared.Config(layer=GatedMlp.Config(hidden=8), name='mlp')
  with pytest.raises(InputError, match="common = 'mlp': layers mean different modules by it"):
    define(model(Group(pattern=(pre_norm(RMSNorm(), SHARED[1], other),))))


@pytest.mark.parametrize(
  ('fields', 'named'),
  [
    ({'rank': 2}, 'adapted'),
    ({'adapted': ('up',)}, 'adapted'),
    ({'name': 'a.b'}, 'name'),
    ({'rank': 0, 'adapted': ('up',)}, 'rank'),
  ],
)
def test_settings_without_effect_are_errors(fields, named):
  with pytest.raises(InputError, match=rf'Shared\.{named}'):
    Shared.Config(layer=MLP, **fields)


def test_an_unknown_projection_is_an_error():
  unknown = Shared.Config(layer=MLP, rank=2, adapted=('q',))
  with pytest.raises(InputError, match=r'a projection of the layer: '):
    define(model(Group(pattern=(pre_norm(RMSNorm(), unknown),))))


# ---- values of the stack -----------------------------------------------------------------------


class Table(nnx.Module):
  def __init__(self, depth, width):
    rows = jnp.arange(float(depth * width)).reshape(depth, width)
    self.rows = param(rows, ('layers', 'norm'), decay=False)


class TableOfStack(CommonConfig):
  def build(self, width, depth, rngs):
    return Table(depth, width)


class AddsRow(Layer):
  """y = row of this layer's depth in a table of the stack."""

  class Config(LayerConfig):
    def common(self, width):
      return {'table': TableOfStack()}

    @classmethod
    def examples(cls):
      return ()

  def __init__(self, config, width, rngs, position):
    pass

  def __call__(self, x_BTD, ctx, state=None):
    row = self.common['table'].rows[...][self.index]
    return Output(jnp.broadcast_to(row[None, None], x_BTD.shape), state)


class ReadsInput(Layer):
  """y = the input of the stack."""

  class Config(LayerConfig):
    def reads(self, width):
      return {STACK_INPUT: width}

    @classmethod
    def examples(cls):
      return ()

  def __init__(self, config, width, rngs, position):
    pass

  def __call__(self, x_BTD, ctx, state=None):
    return Output(ctx.shared[STACK_INPUT], state)


def block_of(layer):
  return Block.Config(branches=(Plain(layer=layer),))


@pytest.mark.parametrize('unroll', [True, False])
@pytest.mark.parametrize('remat', ['none', 'full'])
def test_a_layer_reads_the_value_of_its_depth(unroll, remat):
  adds = Block.Config(branches=(Residual(layer=AddsRow.Config()),))
  stack = Stack((Group(pattern=(adds,)), Group(pattern=(adds, adds), repeats=2)), D, nnx.Rngs(0))
  out = jax.jit(lambda x: stack(x, Context(unroll=unroll, remat=remat)).y)(jnp.zeros((1, 3, D)))
  rows = np.arange(5 * D).reshape(5, D)
  np.testing.assert_allclose(out[0, 0], rows.sum(0))


@pytest.mark.parametrize('unroll', [True, False])
def test_a_layer_reads_its_input_beside_that_of_the_stack(unroll):
  """With a sequence, and with one token."""
  layer = WithStackInput.Config(layer=LinearMap.Config(out=D))
  stack = Stack((Group(pattern=(block_of(layer),), repeats=2),), D, nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (2, 3, D))
  ((kernels,),) = (
    [v[...] for v in jax.tree.leaves(stack, is_leaf=lambda v: isinstance(v, nnx.Variable))],
  )
  want = x
  for kernel in kernels:
    want = jnp.concatenate([want, x], -1) @ kernel
  ctx = Context(unroll=unroll)
  np.testing.assert_allclose(stack(x, ctx).y, want, atol=1e-6)
  step = stack(x[:, 0], ctx, stack.init_state(2, 3), one_token=True)
  np.testing.assert_allclose(step.y, want[:, 0], atol=1e-6)


def test_modules_in_common_are_outside_of_a_wider_input():
  layer = WithStackInput.Config(layer=Shared.Config(layer=LinearMap.Config(out=D)))
  with pytest.raises(InputError, match=r'WithStackInput\.layer'):
    define(model(Group(pattern=(block_of(layer),))))


@pytest.mark.parametrize('unroll', [True, False])
def test_a_layer_reads_the_input_of_the_stack(unroll):
  pattern = block_of(MLP), block_of(ReadsInput.Config())
  stack = Stack((Group(pattern=pattern, repeats=2),), D, nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (2, 3, D))
  np.testing.assert_array_equal(stack(x, Context(unroll=unroll)).y, x)
