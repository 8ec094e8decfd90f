"""Branches: where norm, residual and factors stand, by the formulas in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxformer.config import InputError
from jaxformer.layers.layer import Context, LayerPosition
from jaxformer.layers.mlp import Mlp
from jaxformer.layers.norm import RMSNorm
from jaxformer.models.block import NormAfter, Plain, PostNorm, PreNorm, Residual, SandwichNorm
from jaxformer.models.params import define
from jaxformer.models.zoo.llama import LLAMA3, llama
from jaxformer.task_type import Batch

pytestmark = pytest.mark.quick

D = 8
MLP = Mlp.Config(hidden=16)


def rms(x, scale, eps=1e-5):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def formula(branch, x, f, g, h):
  """x + norm(f(x)) and so on, with g before and h after the layer, as each docstring says."""
  c = 1.0 if branch.scale is None else branch.scale
  return {
    PreNorm: lambda: x + c * f(g(x)),
    PostNorm: lambda: h(x + c * f(x)),
    NormAfter: lambda: x + c * h(f(x)),
    SandwichNorm: lambda: x + c * h(f(g(x))),
    Residual: lambda: x + c * f(x),
    Plain: lambda: f(x),
  }[type(branch)]()


@pytest.mark.parametrize(
  'config',
  [
    PreNorm(layer=MLP, scale=0.22),
    PostNorm(layer=MLP, scale=3.0),
    NormAfter(layer=MLP),
    NormAfter(layer=MLP, scale=0.5),
    SandwichNorm(layer=MLP),
    SandwichNorm(layer=MLP, scale=0.5),
    Residual(layer=MLP, scale=0.5),
    Plain(layer=MLP),
  ],
  ids=lambda b: f'{b.tag}-{b.scale}',
)
def test_branch(config):
  branch = config.build(D, nnx.Rngs(0), LayerPosition())
  graph, params = nnx.split(branch)
  numbers = np.random.default_rng(0)
  params = jax.tree.map(lambda p: jnp.asarray(numbers.normal(1.0, 0.5, p.shape)), params)
  branch, x = nnx.merge(graph, params), numbers.normal(size=(2, 5, D)).astype('float32')
  norm = branch.norm
  before, after = (norm.before, norm.after) if type(config) is SandwichNorm else (norm, norm)
  want = formula(
    config,
    x,
    lambda x: np.asarray(branch.layer(jnp.asarray(x), Context()).y),
    lambda x: rms(x, np.asarray(before.scale[...])),
    lambda x: rms(x, np.asarray(after.scale[...])),
  )
  got = branch(jnp.asarray(x), Context(), None, one_token=False).y
  np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_a_factor_needs_a_residual_stream():
  with pytest.raises(InputError, match=r'Plain.scale = 0.5: must be none'):
    Plain(layer=MLP, scale=0.5)


def test_norm_with_a_unit_offset():
  """y = x / rms(x) (1 + w), multiplied in fp32: with bfloat16 inputs it is the rounded product, not
  the product of rounded factors."""
  x = jax.random.normal(jax.random.key(0), (3, 64), jnp.bfloat16)
  norm = RMSNorm(eps=1e-6, unit_offset=True).build(64)
  np.testing.assert_array_equal(norm.scale[...], 0.0)
  w = jax.random.normal(jax.random.key(1), (64,), jnp.bfloat16)
  norm.scale[...] = w
  y, wide = norm(x), np.asarray(x, np.float64)
  assert y.dtype == jnp.bfloat16
  want = rms(wide, 1 + np.asarray(w, np.float64), 1e-6)
  np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=2.0**-8)
  twice = jnp.asarray(rms(wide, 1.0, 1e-6), jnp.bfloat16) * (1 + w)[None]
  errors = (np.abs(np.asarray(a, np.float64) - want).max() for a in (y, twice))
  assert next(errors) < next(errors)


@pytest.mark.parametrize('softcap', [None, 2.0])
def test_scaled_logits_in_loss_and_scores(softcap):
  """Loss and scores of a model are those of its logits, which `logit_scale` multiplies before the
  cap."""
  model = llama(16, 1, 24, 2, 2, rotary=LLAMA3, vocab_size=30, context_length=12)
  base, scaled = model, model.replace(logit_scale=0.125, softcap=softcap)
  params = define(model).init(jax.random.key(0))
  params['head.kernel'] = 40 * params['head.kernel']
  tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 30)
  plain, built = (define(c).merge(params) for c in (base, scaled))
  logits = 0.125 * plain(tokens).y
  logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
  np.testing.assert_allclose(built(tokens).y, logits, rtol=1e-6, atol=1e-6)
  targets = jnp.roll(tokens, 3, axis=1)
  picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
  batch = Batch(inputs=tokens, targets_BT=targets)
  np.testing.assert_allclose(built.scores(batch)[0], -picked, rtol=1e-5)
  np.testing.assert_allclose(built.loss(batch)[0].nll, -picked.sum(), rtol=1e-5)
