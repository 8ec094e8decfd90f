"""Zamba2 (Glorioso et al. 2024): counts in closed form, which weights are shared, and initial
values as in transformers, of Mamba-2 as its authors have them."""

from jaxformer.models.params import define
from jaxformer.models.zoo import PRESETS
from tests.models.test_recent_init import is_normal, parameters


def zamba2_count(D, L, uses, blocks, F, H, rank, N=64, V=32000):
  """One embedding; a layer of Mamba-2 with 2 D channels: in ([z, x, B, C, dt]) and out, four taps
  with offsets over [x, B, C], three numbers per head, the gated norm, a norm; a shared block: q, k
  and v of 2 D (12 D^2), o (2 D^2), three matrices of F, norms of 2 D and of D; a use of it: an
  adapter to 2 F and a matrix; the final norm."""
  inner = 2 * D
  maps = 2 * N
  mamba = D * (2 * inner + maps + H) + inner * D + 5 * (inner + maps) + 3 * H + inner + D
  block = 14 * D * D + 3 * D * F + 3 * D
  return V * D + L * mamba + blocks * block + uses * (rank * (D + 2 * F) + D * D) + D


COUNTED = {'zamba2-2.7b': zamba2_count(2560, 54, 9, 2, 10240, 80, 128)}


def test_shared_blocks_are_used_in_turn():
  info = define(PRESETS['zamba2-2.7b'].model).info
  uses = {n.split('.')[2]: i.uses for n, i in info.items() if n.startswith('stack.common.')}
  assert uses == {'transformer0': 5, 'transformer1': 4}


def test_initial_values():
  """N(0, 0.02^2) outside Mamba-2, whose initialization is that of the layer; adapters start as
  nothing."""
  seen = 0
  for name, p in parameters('zamba2').items():
    mamba = any(
      part in name for part in ('.A_log', '.D', '.dt', '.conv', '.bc.', '.x.kernel', '.z.kernel')
    )
    if 'scale' in name:
      assert (p == 1).all()
    elif '.adapters.' in name and not name.endswith('.0.kernel'):
      assert not p.any()
    elif not (mamba or (name.endswith('.out.kernel') and p.shape[-2] == 128)):
      is_normal(p, 0.02)
      seen += 1
  assert seen == 19  # the embedding, 2 x 7 of the shared blocks, two matrices and two adapters
