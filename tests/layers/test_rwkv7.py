"""RWKV-7's initial values, which are part of the architecture, and how its layers stand in a
stack."""

import jax
import numpy as np
import pytest

from jaxformer.config import InputError
from jaxformer.layers.rwkv7 import TimeMix7
from jaxformer.models.params import define
from jaxformer.models.stack import Group
from jaxformer.models.zoo import PRESETS
from jaxformer.models.zoo.rwkv7 import rwkv7

D, L, K, V = 128, 6, 64, 300


@pytest.fixture(scope='module')
def model():
  """(definition, initial values by name): two heads of the published size, six blocks."""
  definition = define(rwkv7(D, L, (8, 8, 4, 16), vocab_size=V))
  return definition, {n: np.asarray(p) for n, p in definition.init(jax.random.key(0)).items()}


def of_block(params, block, branch, name):
  group, row = (0, None) if block == 0 else (1, block - 1)
  value = params[f'stack.groups.{group}.0.branches.{branch}.layer.{name}']
  return value if row is None else value[row]


def official(name, layer):
  """What the constructor of the official time mixing computes, number by number as it does."""
  deep, shallow = layer / (L - 1), 1.0 - layer / L
  values = np.zeros(D)
  for n in range(D):
    line = n / (D - 1) - 0.5
    zigzag = ((n % K) - ((K - 1) / 2)) / ((K - 1) / 2)
    zigzag *= abs(zigzag)
    values[n] = {
      'decay.bias': -6 + 6 * (n / (D - 1)) ** (1 + deep**0.3) + 0.5 + 2.5 * zigzag,
      'rate.bias': -0.19 + 0.3 * zigzag + 0.4 * line,
      'value.bias': 0.73 - 0.4 * line,
      'xi': 0.71 - 0.1 * line,
      'alpha': 1.02,
      'rho': -0.04,
      'norm.scale': ((1 + layer) / L) ** 0.7,
      **{
        f'mix_{z}': 1 - (n / D) ** (e * shallow)
        for z, e in zip('rwkvag', (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True)
      },
    }[name]
  return values


VECTORS = (
  'decay.bias',
  'rate.bias',
  'value.bias',
  'xi',
  'alpha',
  'rho',
  'norm.scale',
  *(f'mix_{z}' for z in 'rwkvag'),
)


@pytest.mark.parametrize('layer', [0, 1, 5])
def test_vectors_of_time_mixing(model, layer):
  for name in VECTORS:
    if (layer, name) != (0, 'value.bias'):
      np.testing.assert_allclose(
        of_block(model[1], layer, 0, name),
        official(name, layer),
        rtol=2e-5,
        atol=2e-6,
        err_msg=name,
      )


def test_golden_numbers(model):
  """A few of them, by hand: w0 begins at -5.5 - 2.5 and ends at 0.5 + 2.5 in every block; channel
  32 is 1 / 31.5 into its zigzag times half of that."""
  params = model[1]
  for layer in range(L):
    w0 = of_block(params, layer, 0, 'decay.bias')
    np.testing.assert_allclose(w0[[0, 127]], [-8.0, 3.0], rtol=1e-6)
  np.testing.assert_allclose(
    of_block(params, 0, 0, 'decay.bias')[32],
    -5.5 + 6 * 32 / 127 + 2.5 * (0.5 / 31.5) ** 2,
    rtol=1e-6,
  )
  np.testing.assert_allclose(
    of_block(params, 0, 0, 'rate.bias')[[0, 127]], [-0.69, 0.31], rtol=1e-5
  )
  np.testing.assert_allclose(
    of_block(params, 3, 0, 'value.bias')[[0, 127]], [0.93, 0.53], rtol=1e-5
  )
  np.testing.assert_allclose(of_block(params, 3, 1, 'mix_k')[64], 1 - 0.5 ** (0.5**4), rtol=1e-5)
  assert of_block(params, 0, 0, 'mix_r')[0] == 1.0


def test_matrices(model):
  """Every matrix as `generate_init_weight` of the official code draws it (BlinkDL/RWKV-LM,
  RWKV-v7/train_temp/src/model.py, commit 118e451): after the modules' own, uniform, initializers it
  draws `receptance` and `value` again, orthogonal of gain 1, `att.key` of 0.1 and `ffn.key`, [4 D,
  D] there, of 1, so that each of them has the standard deviation gain / sqrt(D)."""
  params = model[1]
  for layer in (0, 4):
    for name, gain in (('r.kernel', 1.0), ('v.kernel', 1.0), ('k.kernel', 0.1)):
      w = of_block(params, layer, 0, name)
      np.testing.assert_allclose(w @ w.T, gain**2 * np.eye(D), atol=1e-5, err_msg=name)
      assert abs(w.mean()) < 5 * gain / D**1.5, name  # five standard errors
    h = of_block(params, layer, 1, 'k.kernel')
    assert h.shape == (D, 4 * D)
    np.testing.assert_allclose(h @ h.T, np.eye(D), atol=1e-5)
    for branch, name in ((0, 'o.kernel'), (1, 'v.kernel'), (0, 'decay.a'), (0, 'gate.a')):
      assert not of_block(params, layer, branch, name).any(), name
    for name, rank in (('decay', 8), ('rate', 8), ('gate', 16)):
      b = of_block(params, layer, 0, f'{name}.b')
      np.testing.assert_allclose(b @ b.T, 0.01 * np.eye(rank), atol=1e-6)
  assert 0.99e-4 < np.abs(params['embedder.input.table']).max() <= 1e-4
  np.testing.assert_allclose(
    params['head.kernel'] @ params['head.kernel'].T, 0.25 * V / D * np.eye(D), atol=1e-4
  )


def test_what_the_optimizer_is_told(model):
  """Decay on the matrices that the official code calls weights, twice the learning rate on w0."""
  for name, info in model[0].info.items():
    last = name.rpartition('.')[2]
    matrix = last in ('kernel', 'table')
    assert info.decay == matrix, name
    assert info.lr_scale == (2.0 if name.endswith('decay.bias') else 1.0), name
    assert info.full_precision == name.endswith('decay.bias'), name


def test_only_the_first_block_may_do_without_values():
  tiny = PRESETS['rwkv7-tiny'].model
  later = Group(pattern=tiny.stack[1].pattern)
  wrong = define(tiny.replace(stack=(later,)))
  with pytest.raises(InputError, match='value_rank = None'):
    jax.eval_shape(lambda p: wrong.merge(p)(np.zeros((1, 4), np.int32)), wrong.abstract())
  with pytest.raises(InputError, match='must be a divisor of width = 100'):
    define(tiny.replace(width=100))
  with pytest.raises(InputError, match='value_rank'):
    TimeMix7.Config(value_rank=0)
