"""Hybrids of recurrences, convolutions and attention: parameter counts in closed form and as
published, the order of their layers, and initial values."""

import jax
import numpy as np
import pytest

from jaxformer.models.params import define
from jaxformer.models.zoo import PRESETS
from jaxformer.models.zoo.lfm2 import lfm2
from tests.layers.initial import normal, uniform

pytestmark = pytest.mark.quick

# Of transformers' models on the meta device, with the published configs.
EXACT = {
  'jamba-1.5-mini': 51_570_323_328,
  'jamba-1.5-large': 398_555_145_696,
  'nemotron-h-8b': 8_100_852_736,
  'granite-4-h-micro-3b': 3_191_396_096,
  'falcon-h1-0.5b': 521_411_104,
  'lfm2-350m': 354_483_968,
  'lfm2-700m': 742_489_344,
  'lfm2-1.2b': 1_170_340_608,
}

EIGHT = 'M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-'
# name -> width, blocks of Mamba-2, attention and feed-forward layers, hidden, heads, heads of
# Mamba-2, state size
NEMOTRON_H = {
  'nemotron-h-4b': (3072, 24, 4, 24, 12288, 32, 112, 128),
  'nemotron-h-8b': (4096, 24, 4, 24, 21504, 32, 128, 128),
  'nemotron-h-47b': (8192, 45, 5, 48, 30720, 64, 256, 256),
  'nemotron-h-56b': (8192, 54, 10, 54, 32768, 64, 256, 256),
}
# name -> width, hidden, heads
LFM2 = {'lfm2-350m': (1024, 4608, 16), 'lfm2-700m': (1536, 6912, 24), 'lfm2-1.2b': (2048, 8192, 32)}
# name -> width, heads, key/value heads, hidden, heads of Mamba-2, experts, their hidden units, and
# how many a token uses
GRANITE4 = {
  'granite-4-h-micro-3b': (2048, 32, 8, 8192, 64, 0, 0, 0),
  'granite-4-h-tiny-7b': (1536, 12, 4, 1024, 48, 64, 512, 6),
  'granite-4-h-small-32b': (4096, 32, 8, 1536, 128, 72, 768, 10),
}
# -> width, layers, hidden, heads, key/value heads of 64, heads of Mamba-2, state size, vocabulary
FALCON_H1 = {'falcon-h1-0.5b': (1024, 36, 2048, 8, 2, 24, 128, 32784)}


def mamba2_count(D, inner, heads, maps, norm=True):
  """W_z, W_x, W_bc and W_dt, a convolution of 4 with offsets, a rate, a step and a skip per head, a
  norm, and the projection out."""
  return D * (2 * inner + maps + heads) + 5 * (inner + maps) + 3 * heads + norm * inner + inner * D


def nemotron_h_count(D, mambas, attentions, mlps, F, H, heads, N, V=131072, G=8, K=128):
  """Embedding, head and norm; each block with a norm: Mamba-2 with 64 channels per head and 8
  groups of maps, attention with 8 key/value heads of 128, or two matrices."""
  mamba = mamba2_count(D, 64 * heads, heads, 2 * 8 * N)
  attention, mlp = 2 * D * K * (H + G), 2 * D * F
  layers = mambas * mamba + attentions * attention + mlps * mlp
  return 2 * V * D + D + layers + (mambas + attentions + mlps) * D


def lfm2_count(D, F, H, V=65536, G=8):
  """A tied embedding and a norm; ten blocks with a convolution of 3 between four matrices, six with
  attention whose queries and keys have norms; SwiGLU and two norms in each."""
  K = D // H
  attention = 2 * D * D + 2 * D * G * K + 2 * K
  return V * D + D + 10 * (4 * D * D + 3 * D) + 6 * attention + 16 * (3 * D * F + 2 * D)


def granite4_count(D, H, G, F, heads, E, M, k, active=False, V=100_352):
  """A tied embedding and a norm; 36 blocks with Mamba-2 of 64 channels per head and 128 states,
  four with attention; SwiGLU, E more of them with a router, and two norms in each."""
  mamba, attention = mamba2_count(D, 64 * heads, heads, 256), 2 * D * D + 2 * D * G * (D // H)
  experts = 3 * D * M * (k if active else E) + D * E
  return V * D + D + 36 * mamba + 4 * attention + 40 * (3 * D * F + experts + 2 * D)


def falcon_h1_count(D, L, F, H, G, heads, N, V, K=64):
  """Embedding, head and norm; attention beside Mamba-2 without a norm; SwiGLU and two norms."""
  mamba = mamba2_count(D, 64 * heads, heads, 2 * N, norm=False)
  return 2 * V * D + D + L * (mamba + 2 * D * K * (H + G) + 3 * D * F + 2 * D)


# compared in test_counts.py
COUNTED = {
  name: formula(*sizes)
  for formula, table in (
    (nemotron_h_count, NEMOTRON_H),
    (lfm2_count, LFM2),
    (granite4_count, GRANITE4),
    (falcon_h1_count, FALCON_H1),
  )
  for name, sizes in table.items()
}


@pytest.mark.parametrize('name', EXACT)
def test_published(name):
  assert define(PRESETS[name].model).size == EXACT[name]


def test_granite_uses_some_of_its_experts():
  """7B of which a token uses 1B, and 32B of which it uses 9B. Their files have 12.93 and 59.99 GiB
  in bfloat16."""
  for name, total, active in (('tiny-7b', 12.93, 1), ('small-32b', 59.99, 9)):
    name = f'granite-4-h-{name}'
    definition = define(PRESETS[name].model)
    assert abs(2 * definition.size / 2**30 - total) < 0.01
    assert definition.active_size == granite4_count(*GRANITE4[name], active=True)
    assert round(definition.active_size / 1e9) == active


# ---- the order of layers -----------------------------------------------------------------------


def layout(name, letters):
  """The letter of each block's first layer."""
  groups = PRESETS[name].model.stack
  blocks = [b for g in groups for _ in range(g.repeats) for b in g.pattern]
  return ''.join(letters[b.branches[0].layer.tag] for b in blocks)


def test_layouts():
  letters = {'Mamba2': 'M', 'Attention': '*', 'Mlp': '-'}
  assert layout('nemotron-h-8b', letters) == EIGHT
  assert layout('nemotron-h-56b', letters).count('*') == 10
  assert '---MM---' in layout('nemotron-h-47b', letters)
  letters = {'Mamba2': 'M', 'Attention': '*'}
  micro = layout('granite-4-h-micro-3b', letters)
  assert [i for i, letter in enumerate(micro) if letter == '*'] == [5, 15, 25, 35]
  letters = {'ShortConvolution': 'c', 'Attention': 'a'}
  assert layout('lfm2-1.2b', letters) == 'ccaccaccacacacac'


# ---- initial values ----------------------------------------------------------------------------


def drawn(config):
  params = define(config).init(jax.random.key(0))
  return {n: np.asarray(p) for n, p in params.items()}


def of_parts(name, p, seen):
  """Matrices and embeddings N(0, 0.02^2), norms 1."""
  seen.add(name.split('.')[-1])
  if name.endswith(('kernel', 'table')):
    normal(p, 0.02)
  else:
    assert name.endswith('scale'), name
    assert (p == 1).all()


def test_lfm2():
  """Published only as `initializer_range`; the convolutions' kernels are PyTorch's."""
  config = lfm2(64, 'ccacca', 96, 4, 2, vocab_size=96, context_length=16)
  seen = set()
  for name, p in drawn(config).items():
    if name.endswith('conv.kernel'):
      uniform(p, 3**-0.5)
    else:
      of_parts(name, p, seen)
  assert seen == {'kernel', 'table', 'scale'}


MAMBA2 = 'z', 'x', 'bc', 'dt', 'conv_x', 'conv_bc', 'out'


@pytest.mark.parametrize('family', ['nemotron-h', 'granite4', 'falcon-h1'])
def test_hybrids_of_mamba2(family):
  """Mamba-2 layers as the authors of Mamba-2 (tests/layers/test_mamba_init.py), all else N(0,
  0.02^2); of the published Granite N(0, 0.1^2)."""
  seen = set()
  for name, p in drawn(PRESETS[f'{family}-tiny'].model).items():
    if name.split('.')[-2] not in MAMBA2 and not name.endswith(('A_log', 'D', 'dt_bias')):
      of_parts(name, p, seen)
  assert seen == {'kernel', 'table', 'scale'}
