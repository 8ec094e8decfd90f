"""Initial values of RWKV-4, 5.2 and 6, to the letter of the official code, and what the optimizer
is told of each parameter."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from jaxformer.config import InputError
from jaxformer.layers.layer import LayerPosition
from jaxformer.layers.rwkv import ChannelMix
from jaxformer.layers.rwkv4 import TimeMix4
from jaxformer.layers.rwkv5 import TimeMix5
from jaxformer.layers.rwkv6 import TimeMix6
from jaxformer.models.params import define
from jaxformer.models.zoo import PRESETS
from jaxformer.models.zoo.rwkv4 import rwkv4
from jaxformer.models.zoo.rwkv5 import rwkv5
from jaxformer.models.zoo.rwkv6 import rwkv6
from jaxformer.training.recipes import RECIPES
from tests.layers import initial

pytestmark = pytest.mark.quick
D, L, K = 128, 6, 32
TIME = {
  4: TimeMix4.Config(),
  5: TimeMix5.Config(head_dim=K),
  6: TimeMix6.Config(head_dim=K, mix_rank=8, decay_rank=12),
}
CHANNELS = {4: rwkv4(D, L), 5: rwkv5(D, L), 6: rwkv6(D, L)}
CHANNELS = {v: m.stack[0].pattern[0].branches[1].layer for v, m in CHANNELS.items()}


def values(layer, index):
  return initial.values(layer, D, **position(index))


def position(index):
  return {'index': index, 'depth': L, 'branches': 2 * L}


def official(version, name, layer):
  """What the constructors of the official code compute, number by number as they do. RWKV-6 keeps
  what RWKV-5 takes from 1."""
  deep, shallow = layer / (L - 1), 1.0 - layer / L
  slow, fast = (-5, 8) if version == 4 else (-6, 5)
  result = np.zeros(D)
  for n in range(D):
    zigzag = (n + 1) % 3 - 1
    x = n / D
    mixes = {
      'mix_k': x**shallow,
      'mix_v': x**shallow + 0.3 * deep,
      'mix_r': x ** (0.5 * shallow),
      'mix_g': x ** (0.5 * shallow),
      'mix_x': x**shallow,
      'mix_w': x**shallow,
    }
    bonus = (
      math.log(0.3) + 0.5 * zigzag if version == 4 else deep * (1 - n / (D - 1)) + 0.1 * zigzag
    )
    result[n] = {
      'decay': slow + fast * (n / (D - 1)) ** (0.7 + 1.3 * deep),
      'bonus': bonus,
      'norm.scale': ((1 + layer) / L) ** 0.7,
      'norm.bias': 0.0,
      **{z: 1.0 - m if version == 6 else m for z, m in mixes.items()},
    }[name]
  return result


@pytest.mark.parametrize('layer', [0, 3, 5])
@pytest.mark.parametrize('version', TIME)
def test_vectors_of_time_mixing(version, layer):
  vectors = {
    n.replace('decay.bias', 'decay'): v
    for n, v in values(TIME[version], layer).items()
    if v.ndim == 1
  }
  assert len(vectors) == {4: 5, 5: 8, 6: 10}[version]
  for name, value in vectors.items():
    np.testing.assert_allclose(
      value, official(version, name, layer), rtol=2e-5, atol=2e-6, err_msg=name
    )


@pytest.mark.parametrize('version', CHANNELS)
def test_channel_mixing(version):
  """RWKV-6's exponent is 1 - layer / L, as in BlinkDL/RWKV-LM, RWKV-v5/src/model.py, at commit
  43045b7, with which the published models were trained; since November 2024 it is cubed there."""
  found, F = values(CHANNELS[version], 3), 4 * D if version == 4 else 448
  for name in ('mix_k', 'mix_r'):
    expected = (np.arange(D) / D) ** (1 - 3 / L)
    np.testing.assert_allclose(
      found[name], 1 - expected if version == 6 else expected, rtol=1e-5, atol=1e-6
    )
  gain = F / D if version == 4 else 1.0  # squared
  np.testing.assert_allclose(found['k.kernel'] @ found['k.kernel'].T, gain * np.eye(D), atol=1e-5)
  assert found['k.kernel'].shape == (D, F)
  assert not found['v.kernel'].any()
  assert not found['r.kernel'].any()


def test_published_numbers_of_rwkv4():
  """Of the 169M model (12 layers, width 768), as its official constructor gives them."""
  # without the matrix, which takes a second to draw
  time = TimeMix4.Config(init=TimeMix4.Config().out_init)

  def of(layer):
    module = time.build(768, nnx.Rngs(params=0), LayerPosition(index=layer, depth=12, branches=24))
    return {n: np.asarray(p[...]) for n, p in vars(module).items() if isinstance(p, nnx.Param)}

  first, last = of(0), of(11)
  np.testing.assert_allclose(
    first['decay'][[0, 1, 384, 767]], [-5, -4.923487, -0.070929, 3], rtol=1e-5
  )
  np.testing.assert_allclose(first['bonus'][:3], [-1.203973, -0.703973, -1.703973], rtol=1e-6)
  np.testing.assert_allclose(
    last['decay'][[0, 1, 384, 767]], [-5, -4.999986, -2.994781, 3], rtol=1e-6
  )
  for name, number in (('mix_k', 0.574848), ('mix_v', 0.874848), ('mix_r', 0.758187)):
    np.testing.assert_allclose(last[name][1], number, rtol=2e-6, err_msg=name)


@pytest.mark.parametrize('version', TIME)
def test_matrices_of_time_mixing(version):
  found = values(TIME[version], 4)
  gains = {4: {'r': 0.0, 'k': 0.0, 'v': 1.0, 'o': 0.0}}.get(
    version, {'r': 1.0, 'k': 0.1, 'v': 1.0, 'g': 0.1, 'o': 0.0}
  )
  for name, gain in gains.items():
    np.testing.assert_allclose(
      found[f'{name}.kernel'] @ found[f'{name}.kernel'].T,
      gain**2 * np.eye(D),
      atol=1e-5,
      err_msg=name,
    )
  rest = {n: v for n, v in found.items() if v.ndim > 1 and not n.endswith('.kernel')}
  assert {n: v.shape for n, v in rest.items()} == (
    {}
    if version < 6
    else {'mix_a': (D, 5 * 8), 'mix_b': (5, 8, D), 'decay.a': (D, 12), 'decay.b': (12, D)}
  )
  for name, value in rest.items():
    if name.endswith('a'):
      assert not value.any()
    else:
      assert 0.0098 < np.abs(value).max() <= 0.01


def test_embedding_and_head():
  """Of all versions: numbers up to 1e-4, or up to the learning rate in the published models of
  RWKV-4 (BlinkDL/RWKV-LM, RWKV-v4neo/src/model.py, commit 038f06b: `scale = -1 * lr_init`), and an
  orthogonal head of gain 1/2, larger by the root of V / D."""
  for name, preset in PRESETS.items():
    if preset.family == 'rwkv4' and name in RECIPES:
      rate = RECIPES[name].experiment.optimizer.learning_rate
      assert preset.model.embedding_init.bound == rate
  for model in (
    rwkv4(32, 1, vocab_size=70),
    rwkv5(32, 1, vocab_size=70, head_dim=K),
    rwkv6(32, 1, vocab_size=70, head_dim=K),
  ):
    assert (model.embedding_init, model.head_init) == (
      rwkv4(8, 1).embedding_init,
      rwkv4(8, 1).head_init,
    )
  params = define(model).init(jax.random.key(0))
  assert 0.99e-4 < np.abs(params['embedder.input.table']).max() <= 1e-4
  np.testing.assert_allclose(
    params['head.kernel'] @ params['head.kernel'].T, 0.25 * 70 / 32 * np.eye(32), atol=1e-5
  )


@pytest.mark.parametrize('version', TIME)
def test_what_the_optimizer_is_told(version):
  """Decay on plain matrices alone; two and, in RWKV-4, three times the learning rate; decays and
  bonuses stay fp32."""
  layers = TIME[version], CHANNELS[version]
  found = {n: p for c in layers for n, p in initial.built(c, D, **position(1)).items()}
  for name, p in found.items():
    meta = p.get_metadata()
    rates = {'decay': 2.0, 'decay.bias': 2.0, 'bonus': 3.0 if version == 4 else 1.0}
    assert meta['decay'] == name.endswith('.kernel'), name
    assert meta['lr_scale'] == rates.get(name, 1.0), name
    assert meta['full_precision'] == (name in rates), name


def test_settings_that_do_not_fit():
  for layer in (TimeMix5.Config(head_dim=24), TimeMix6.Config(head_dim=24)):
    with pytest.raises(
      InputError, match=rf'{layer.tag}\.head_dim = 24: must be a divisor of width = 128'
    ):
      layer.build(D, nnx.Rngs(params=0), LayerPosition())
  with pytest.raises(InputError, match='at least 2'):
    TimeMix4.Config().build(1, nnx.Rngs(params=0), LayerPosition())
  with pytest.raises(InputError, match=r'TimeMix6\.mix_rank = 0'):
    TimeMix6.Config(mix_rank=0)
  with pytest.raises(InputError, match=r'TimeMix5\.head_dim = 0'):
    TimeMix5.Config(head_dim=0)
  with pytest.raises(InputError, match='hidden = 0'):
    ChannelMix.Config(hidden=0)
  with pytest.raises(InputError, match='version = 3: must be 4, 5, 6 or 7'):
    ChannelMix.Config(version=3)
