"""Initial values of Mamba and Mamba-2, to the letter of the authors' code, and which parameters
decay."""

import numpy as np
import pytest

from jaxformer.config import InputError
from jaxformer.layers.mamba import Mamba
from jaxformer.layers.mamba2 import Mamba2
from tests.layers.initial import built, log_uniform, uniform, values

pytestmark = pytest.mark.quick

WIDTH = 128


def log_uniform_steps(b_dt):
  """softplus(b) fills [0.001, 0.1], as many steps below 0.01 as above: -6.907 <= b <= -2.252."""
  log_uniform(np.log1p(np.exp(b_dt.astype(np.float64))), 1e-3, 1e-1)


def test_mamba():
  v = values(Mamba.Config(bias=True), WIDTH)
  inner, rank = 256, 8
  for name in ('x.kernel', 'z.kernel'):
    uniform(v[name], WIDTH**-0.5)
  for name in ('conv.kernel', 'conv.bias'):
    uniform(v[name], 4**-0.5)
  uniform(v['selection.kernel'], inner**-0.5)
  uniform(v['dt.kernel'], rank**-0.5)
  uniform(v['out.kernel'], (inner * 6) ** -0.5)  # six residual branches
  log_uniform_steps(v['dt_bias'])
  np.testing.assert_allclose(
    np.exp(v['A_log']), np.broadcast_to(np.arange(1, 17), (inner, 16)), rtol=1e-6
  )
  assert (v['D'] == 1).all()
  assert not any(v[name].any() for name in ('x.bias', 'z.bias', 'out.bias'))
  assert v['selection.kernel'].shape == (inner, rank + 2 * 16)


def test_mamba2():
  # many heads, for the sake of the statistics
  v = values(Mamba2.Config(d_state=32, head_dim=1, bias=True), WIDTH)
  for name in ('x.kernel', 'z.kernel', 'bc.kernel', 'dt.kernel'):
    uniform(v[name], WIDTH**-0.5)
  for name in ('conv_x.kernel', 'conv_bc.kernel', 'conv_x.bias', 'conv_bc.bias'):
    uniform(v[name], 4**-0.5)
  uniform(v['out.kernel'], (256 * 6) ** -0.5)
  log_uniform_steps(v['dt_bias'])
  rates = np.exp(v['A_log'])
  assert 1 <= rates.min() < 1.5
  assert 15.5 < rates.max() <= 16.0001
  assert abs(rates.mean() - 8.5) < 5 * 15 / np.sqrt(12 * rates.size)
  assert (v['D'] == 1).all()
  assert (v['scale'] == 1).all()
  assert not any(v[name].any() for name in ('x.bias', 'z.bias', 'bc.bias', 'dt.bias', 'out.bias'))


@pytest.mark.parametrize(
  ('layer', 'recurrence', 'biases'),
  [
    (
      Mamba.Config(bias=True),
      ('A_log', 'D', 'dt_bias'),
      ('x.bias', 'z.bias', 'conv.bias', 'out.bias'),
    ),
    (
      Mamba2.Config(head_dim=32, bias=True),
      ('A_log', 'D', 'dt_bias'),
      (*(f'{name}.bias' for name in ('x', 'z', 'bc', 'dt', 'conv_x', 'conv_bc', 'out')), 'scale'),
    ),
  ],
)
def test_what_decays(layer, recurrence, biases):
  """Weights do, recurrences, offsets and scales do not; recurrences stay in fp32."""
  info = {n: p.get_metadata() for n, p in built(layer, WIDTH).items()}
  assert {n for n, i in info.items() if not i['decay']} == {*recurrence, *biases}
  assert {n for n, i in info.items() if i['full_precision']} == set(recurrence)


def test_rank_follows_the_width():
  assert [Mamba.Config().rank(w) for w in (768, 1000, 2560)] == [48, 63, 160]


def test_sizes_that_do_not_divide():
  with pytest.raises(InputError, match='head_dim = 60: must be a divisor of expand x width = 256'):
    Mamba2.Config(head_dim=60).head_count(128)
  with pytest.raises(InputError, match='groups = 3: must be a divisor of the number of heads = 4'):
    Mamba2.Config(groups=3).head_count(128)
