"""Initial values of Mamba and Mamba-2, to the letter of the authors' code, and which parameters
decay."""

import numpy as np
import pytest
from flax import nnx

from jaxformer.config import InputError
from jaxformer.layers.layer import LayerPosition
from jaxformer.layers.mamba import Mamba
from jaxformer.layers.mamba2 import Mamba2

pytestmark = pytest.mark.quick

WIDTH = 128


def built(layer):
  """Parameters by name."""
  module = layer.build(WIDTH, nnx.Rngs(params=0), LayerPosition(index=1, depth=6, branches=6))
  return {n: p for n, p in vars(module).items() if isinstance(p, nnx.Param)}


def values(layer):
  return {n: np.asarray(p[...]) for n, p in built(layer).items()}


def uniform(p, bound):
  """Fills [-bound, bound] and has its standard deviation, to five standard errors."""
  assert np.abs(p).max() <= bound
  assert np.abs(p).max() > 0.95 * bound
  assert abs(p.std() - bound / np.sqrt(3)) < 5 * bound / np.sqrt(p.size)


def log_uniform_steps(b_dt):
  """softplus(b) fills [0.001, 0.1], as many steps below 0.01 as above: -6.907 <= b <= -2.252."""
  steps = np.log1p(np.exp(b_dt.astype(np.float64)))
  assert steps.min() >= 0.999e-3
  assert steps.max() <= 1.001e-1
  assert abs(np.mean(steps < 1e-2) - 0.5) < 2.5 / np.sqrt(steps.size)
  assert steps.max() / steps.min() > 30


def test_mamba():
  v = values(Mamba.Config(bias=True))
  inner, rank = 256, 8
  for name in ('w_x', 'w_z'):
    uniform(v[name], WIDTH**-0.5)
  for name in ('w_conv', 'b_conv'):
    uniform(v[name], 4**-0.5)
  uniform(v['w_s'], inner**-0.5)
  uniform(v['w_dt'], rank**-0.5)
  uniform(v['w_out'], (inner * 6) ** -0.5)  # six residual branches
  log_uniform_steps(v['b_dt'])
  np.testing.assert_allclose(
    np.exp(v['A_log']), np.broadcast_to(np.arange(1, 17), (inner, 16)), rtol=1e-6
  )
  assert (v['D'] == 1).all()
  assert not any(v[name].any() for name in ('b_x', 'b_z', 'b_out'))
  assert v['w_s'].shape == (inner, rank + 2 * 16)


def test_mamba2():
  # many heads, for the sake of the statistics
  v = values(Mamba2.Config(state=32, head_dim=1, bias=True))
  for name in ('w_x', 'w_z', 'w_bc', 'w_dt'):
    uniform(v[name], WIDTH**-0.5)
  for name in ('conv_x', 'conv_bc', 'conv_b_x', 'conv_b_bc'):
    uniform(v[name], 4**-0.5)
  uniform(v['w_out'], (256 * 6) ** -0.5)
  log_uniform_steps(v['b_dt'])
  rates = np.exp(v['A_log'])
  assert 1 <= rates.min() < 1.5
  assert 15.5 < rates.max() <= 16.0001
  assert abs(rates.mean() - 8.5) < 5 * 15 / np.sqrt(12 * rates.size)
  assert (v['D'] == 1).all()
  assert (v['scale'] == 1).all()
  assert not any(v[name].any() for name in ('b_x', 'b_z', 'b_bc', 'b_dt_in', 'b_out'))


@pytest.mark.parametrize(
  ('layer', 'recurrence', 'biases'),
  [
    (Mamba.Config(bias=True), ('A_log', 'D', 'b_dt'), ('b_x', 'b_z', 'b_conv', 'b_out')),
    (
      Mamba2.Config(head_dim=32, bias=True),
      ('A_log', 'D', 'b_dt'),
      ('b_x', 'b_z', 'b_bc', 'b_dt_in', 'conv_b_x', 'conv_b_bc', 'scale', 'b_out'),
    ),
  ],
)
def test_what_decays(layer, recurrence, biases):
  """Weights do, recurrences, offsets and scales do not; recurrences stay in fp32."""
  info = {n: p.get_metadata() for n, p in built(layer).items()}
  assert {n for n, i in info.items() if not i['decay']} == {*recurrence, *biases}
  assert {n for n, i in info.items() if i['full_precision']} == set(recurrence)


def test_rank_follows_the_width():
  assert [Mamba.Config().rank(w) for w in (768, 1000, 2560)] == [48, 63, 160]


def test_sizes_that_do_not_divide():
  with pytest.raises(InputError, match='head_dim = 60 does not divide'):
    Mamba2.Config(head_dim=60).heads(128)
  with pytest.raises(InputError, match='groups = 3 does not divide the 4 heads'):
    Mamba2.Config(groups=3).heads(128)
