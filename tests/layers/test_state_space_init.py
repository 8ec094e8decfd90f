"""Initial values of S4, S4D, S5, LSSL and H3 against those of the authors' code, with numbers from
runs of it, and which of them are trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxformer.config import InputError
from jaxformer.layers.h3 import H3
from jaxformer.layers.init import FanInNormal
from jaxformer.layers.layer import Context, LayerPosition, Output
from jaxformer.layers.lssl import LSSL
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.s4 import S4
from jaxformer.layers.s4d import S4D
from jaxformer.layers.s5 import S5
from jaxformer.layers.state_space import dropped
from jaxformer.models.block import PreNorm
from jaxformer.models.params import ParamInfo
from jaxformer.models.zoo import PRESETS
from jaxformer.training import AdamW, Constant
from jaxformer.training.optimizer import Optimizer
from tests.layers.initial import built, log_uniform, normal, uniform, values

pytestmark = pytest.mark.quick
WIDTH, N = 256, 64


def gated_projection(v):
  """PyTorch's default for `Linear`, to twice the width."""
  for name in ('out.kernel', 'out.bias'):
    uniform(v[name], WIDTH**-0.5)
  assert v['out.kernel'].shape == (WIDTH, 2 * WIDTH)


def legs_b(b):
  """B of `nplr('legs', 64)` (state-spaces/s4, models/s4/s4.py, commit 070384a), whose `B_clip` is
  2: eleven imaginary parts are clipped, of which the largest would be 40.75."""
  re, im = np.moveaxis(np.abs(b[0]), -1, 0)
  assert (im == 2).sum() == 11
  assert im.max() == 2
  np.testing.assert_allclose(re.sum(), 2.178372, rtol=1e-4)
  np.testing.assert_allclose(im.sum(), 45.832436, rtol=1e-4)
  np.testing.assert_allclose((b[0] ** 2).sum(), 74.873505, rtol=1e-4)


def test_s4():
  v = values(S4.Config(length=16), WIDTH)
  np.testing.assert_allclose(np.exp(v['log_decay']), 0.5, rtol=1e-5)
  np.testing.assert_allclose(
    v['frequency'][:, [0, -1]].T, [[1303.27384] * WIDTH, [0.2638575] * WIDTH], rtol=1e-5
  )
  legs_b(v['b'])
  np.testing.assert_allclose((v['p'][0] ** 2).sum(), 1024.0, rtol=1e-5)
  log_uniform(np.exp(v['log_dt']), 1e-3, 1e-1)
  normal(v['skip'], 1.0)
  gated_projection(v)


def test_output_of_s4_is_made_for_its_length():
  """C~ = C (I - Abar^L) with C complex normal, by `_setup_C` of the same file, which runs once,
  before the first kernel, with the length of the data (`l_max`). Here C is recovered in float64
  from the dense matrix of the system and its conjugate, by Tustin's rule."""
  size, length = 8, 64
  v = {
    n: p.astype(np.float64) for n, p in values(S4.Config(d_state=size, length=length), 256).items()
  }
  a = -np.exp(v['log_decay']) + 1j * v['frequency']
  p, tilde = (v[name] @ [1, 1j] for name in ('p', 'c_tilde'))
  a, p, tilde = (np.concatenate([z, z.conj()], -1) for z in (a, p, tilde[0]))
  half = np.exp(v['log_dt'])[:, None, None] / 2
  A = a[:, :, None] * np.eye(size) - p[:, :, None] * p[:, None].conj()
  step = np.linalg.solve(np.eye(size) - half * A, np.eye(size) + half * A)
  less = np.eye(size) - np.linalg.matrix_power(step, length)
  c = np.linalg.solve(np.swapaxes(less, 1, 2), tilde[..., None])[:, : size // 2, 0]
  for part in (c.real, c.imag):
    normal(part, 0.5**0.5)
  assert abs(np.mean(c.real * c.imag)) < 5 * 0.5 / c.size**0.5
  # C~ itself is far from that: the slowest systems have hardly moved after L steps.
  assert (np.abs(tilde) ** 2).mean() < 0.9


def test_systems_of_listops():
  """`init: legs`, `n_ssm: 1` and `d_state: 4` (state-spaces/s4,
  configs/experiment/lra/s4-listops.yaml, commit 62a14bb), with numbers from a run of `nplr('legs',
  4)` (models/s4/s4.py, commit 070384a), up to the sign of an eigenvector."""
  layer = PRESETS['s4d-listops'].model.stack[0].pattern[0].branches[0].layer
  v = values(layer, 8)
  np.testing.assert_allclose(np.exp(v['log_decay']), [[0.5, 0.5]], rtol=1e-6)
  np.testing.assert_allclose(v['frequency'], [[4.603293, 0.556501]], rtol=1e-5)
  np.testing.assert_allclose(np.abs(v['b']), [[[0.287020, 2.0], [0.646235, 0.719261]]], rtol=1e-5)
  log_uniform(np.log1p(np.exp(values(layer, 256)['log_dt'])), 1e-3, 1e-1)


@pytest.mark.parametrize(
  ('spectrum', 'decay', 'ends'),
  [
    ('lin', 0.5, (0.0, 31 * np.pi)),
    ('inv', 0.5, (1283.4254, 0.323362)),
    ('legs', 0.5, (1303.27384, 0.2638575)),
    ('real', np.arange(1, 33), (0.0, 0.0)),
  ],
)
def test_s4d(spectrum, decay, ends):
  """`dplr` of the same file: A, and B, which is 1 but for `legs`."""
  v = values(S4D.Config(spectrum=spectrum), WIDTH)
  np.testing.assert_allclose(np.exp(v['log_decay']), np.broadcast_to(decay, (WIDTH, 32)), rtol=1e-5)
  np.testing.assert_allclose(v['frequency'][0, [0, -1]], ends, rtol=1e-4)
  if spectrum == 'legs':
    legs_b(v['b'])
  else:
    assert (v['b'] == [1.0, 0.0]).all()
  normal(v['c'], 0.5**0.5)  # complex numbers of variance 1
  normal(v['skip'], 1.0)
  log_uniform(np.exp(v['log_dt']), 1e-3, 1e-1)
  gated_projection(v)


@pytest.mark.parametrize('layer', [S4.Config(d_state=8, length=16), S4D.Config(d_state=8)])
def test_systems_that_channels_share(layer):
  """`n_ssm` and `dt_transform` of the same file: with one system, as in its configs for long
  sequences, A, B and the rank-one part have one row; C and the steps remain per channel. The same
  function as with equal rows."""
  shared = values(layer.replace(n_ssm=2, dt_transform='softplus'), 32)
  alone = values(layer, 32)
  for name in ('log_decay', 'frequency', 'b', *(('p',) if 'p' in alone else ())):
    assert len(shared[name]) == 2
    np.testing.assert_array_equal(shared[name], alone[name][:2])
  assert shared['log_dt'].shape == (32,)
  np.testing.assert_allclose(np.log1p(np.exp(shared['log_dt'])), np.exp(alone['log_dt']), rtol=1e-4)
  with pytest.raises(InputError, match=r'n_ssm = 3: must be a divisor of width = 32'):
    values(layer.replace(n_ssm=3), 32)


def test_s5():
  """Means and standard deviations of lindermanlab/S5 (s5/ssm.py, s5/ssm_init.py, s5/layers.py,
  commits 52fbd83, d133f4d and 8f5109b), run with H = 256, 64 states and 2 blocks: 0.0899 and 0.0884
  of the parts of B, 0.1261 and 0.1237 of those of C, 0.0625 of the gate, 0 of its bias."""
  v = values(S5.Config(blocks=2), WIDTH)
  for part, b, c in ((0, 0.0899, 0.1261), (1, 0.0884, 0.1237)):
    for name, std in (('b', b), ('c', c)):
      found = v[name][..., part]
      assert abs(found.mean()) < 0.005
      assert abs(found.std() - std) < 0.035 * std
  np.testing.assert_allclose((v['b'] ** 2).sum(-1).mean(), 1 / N, rtol=0.03)
  np.testing.assert_allclose((v['c'] ** 2).sum(-1).mean(), 2 / N, rtol=0.03)
  normal(v['gate.kernel'], WIDTH**-0.5, truncated=True)
  assert not v['gate.bias'].any()
  normal(v['skip'], 1.0)
  log_uniform(np.exp(v['log_dt']), 1e-3, 1e-1)
  assert (v['decay'] == -0.5).all()


def test_s5_gates_with_the_tanh_approximation():
  """`flax.linen.gelu` approximates by default."""
  layer = S5.Config(d_state=2).build(4, nnx.Rngs(0), LayerPosition())
  y = jnp.linspace(-3, 3, 8).reshape(1, 2, 4)
  g = jax.nn.gelu(y, approximate=True)
  assert jnp.array_equal(layer._gated(y, Context()), g * jax.nn.sigmoid(layer.gate(g)))


def test_truncated_normal_is_lecun_normal():
  key, shape = jax.random.key(3), (50, 40)
  np.testing.assert_allclose(
    FanInNormal(truncated=True)(key, shape, 50, None),
    jax.nn.initializers.lecun_normal()(key, shape),
    rtol=1e-6,
  )


def test_lssl():
  """state-spaces/s4, src/models/sequence/modules/lssl.py, commit 43f5b0c: C and D standard normal,
  A of HiPPO-LegS; with `learn` 0 (LSSL-fixed) the step sizes are a buffer."""
  v = values(LSSL.Config(d_state=8, copies=4), WIDTH)
  normal(v['c'], 1.0)
  normal(v['skip'], 1.0)
  log_uniform(np.exp(v['log_dt']), 1e-3, 1e-1)
  np.testing.assert_allclose(v['a'][[0, 1, 1], [0, 0, 1]], [-1, -(3**0.5), -2], rtol=1e-6)
  uniform(v['out.kernel'], (4 * WIDTH) ** -0.5)
  # configs/model/layer/lssl.yaml, commit a0c724a: `lr: 0.0001` of A and `dt.lr: 0.001`
  absolute = LSSL.Config(
    d_state=4,
    lr_scale=None,
    learning_rate=1e-3,
    transition_lr_scale=None,
    transition_learning_rate=1e-4,
  )
  info = {n: p.get_metadata() for n, p in built(absolute, 8).items()}
  assert {n: i['learning_rate'] for n, i in info.items() if i['learning_rate'] is not None} == {
    'a': 1e-4,
    'log_dt': 1e-3,
  }
  assert all(i['lr_scale'] == 1 for i in info.values())
  # the factors by default are these at a rate of 0.01
  factors = {n: p.get_metadata()['lr_scale'] for n, p in built(LSSL.Config(d_state=4), 8).items()}
  assert 0.01 * factors['a'] == pytest.approx(1e-4)
  assert 0.01 * factors['log_dt'] == pytest.approx(1e-3)
  for wrong in ({'transition_lr_scale': 0.5}, {'transition': 'fixed'}):
    with pytest.raises(InputError, match=r'transition_lr_scale = \S+: must be 0 if the transition'):
      absolute.replace(**wrong)
  with pytest.raises(InputError, match=r'lr_scale = 0\.1: must be 0 if the transition is fixed'):
    LSSL.Config(transition='fixed', transition_lr_scale=0.0)
  fixed = LSSL.Config(transition='fixed', transition_lr_scale=0.0, lr_scale=0.0)
  assert built(fixed, 8)['log_dt'].get_metadata()['lr_scale'] == 0


def test_what_is_not_trained_has_no_part_in_the_norm():
  """A buffer there has no gradient, which would shrink the others where gradients are clipped."""
  one = {'dtype': jnp.float32, 'axes': (None,), 'decay': False, 'full_precision': True}
  info = {
    n: ParamInfo((2,), lr_scale=s, matmul=False, active=1.0, **one)
    for n, s in (('w', 1.0), ('fixed', 0.0))
  }
  optimizer = Optimizer(AdamW(learning_rate=0.1, clip=1.0), Constant(), 10, info)
  params = {n: jnp.ones(2) for n in info}
  grads = {'w': jnp.array([3.0, 4.0]), 'fixed': jnp.array([100.0, 0.0])}
  after, _, did = optimizer.update(grads, optimizer.init(params), params, 0)
  assert float(did['grad_norm']) == pytest.approx(5.0)
  assert (after['fixed'] == 1).all()


def test_h3():
  """HazyResearch/H3, src/models/ssm: B of the shift system starts as e_1, its C as a convolution's
  kernel, D standard normal, and the diagonal system as S4D-Lin."""
  v = values(H3.Config(), WIDTH)
  assert (v['shift_b'] == np.eye(1, N)).all()
  uniform(v['shift_c'], N**-0.5)
  normal(v['shift_skip'], 1.0)
  normal(v['skip'], 1.0)
  normal(v['c'], 0.5**0.5)
  for name in 'qkvo':
    normal(v[f'{name}.kernel'], 0.02)
    assert not v[f'{name}.bias'].any()
  log_uniform(np.exp(v['log_dt']), 1e-3, 1e-1)


@pytest.mark.parametrize('layer', [S4.Config(length=16), S4D.Config(), S5.Config(), H3.Config()])
def test_learning_rates_of_systems(layer):
  """`lr: {A: 0.001, B: 0.001, dt: null}` (state-spaces/s4, configs/experiment/lra/s4-listops.yaml,
  commit 62a14bb): A and B at 0.001 whatever the rate of the run, the steps at that rate."""
  own = layer.replace(d_state=4, lr_scale=None, learning_rate=1e-3, dt_lr_scale=1.0)
  info = {n: p.get_metadata() for n, p in built(own, 8).items()}
  matrices = {'log_decay', 'frequency', 'decay', 'p', 'b', 'shift_b'} & set(info)
  assert {n for n, i in info.items() if i['learning_rate'] == 1e-3} == matrices
  assert all(i['lr_scale'] == 1 for i in info.values())
  with pytest.raises(InputError, match=r'lr_scale = 0\.5: must be none with a learning_rate'):
    own.replace(lr_scale=0.5)
  with pytest.raises(InputError, match='lr_scale = None: must be none with a learning_rate, else'):
    layer.replace(lr_scale=None)


@pytest.mark.parametrize('layer', [S4D.Config(d_state=2, tied_dropout=0.5), S5.Config(d_state=2)])
def test_tied_dropout_takes_whole_channels(layer):
  """`tie_dropout` of the same code: one mask for all positions, inside the layer and after it, each
  with its own."""
  layer = layer.replace(tied_dropout=0.5)
  ctx = Context(dropout_key=jax.random.key(1))
  inside = dropped(jnp.ones((3, 5, 64)), layer, ctx)
  identity = PreNorm(layer=layer, norm=RMSNorm(), tied_dropout=0.5).build(
    64, nnx.Rngs(0), LayerPosition()
  )
  identity.layer = lambda x, ctx, state: Output(jnp.ones_like(x))
  after = identity(jnp.zeros((3, 5, 64)), ctx, None, False).y
  for y in (inside, after):
    assert set(np.unique(y)) == {0.0, 2.0}
    assert (y == y[:, :1]).all()
    assert 0.35 < np.mean(np.asarray(y[:, 0]) > 0) < 0.65
    assert not (y[0, 0] == y[1, 0]).all()
  assert not (inside == after).all()
  assert (dropped(jnp.ones((3, 5, 64)), layer, Context()) == 1).all()
