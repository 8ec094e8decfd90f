"""xLSTM[7:1] (Beck et al. 2024): counts in closed form and initial values of every parameter, as in
the authors' code."""

import numpy as np

from jaxformer.models.zoo import PRESETS
from tests.layers.initial import uniform
from tests.models.test_recent_init import is_normal, parameters

# name -> width, blocks, of which with an sLSTM, hidden units
SIZES = {
  'xlstm-7-1-125m': (768, 24, 2, 1024),
  'xlstm-7-1-350m': (1024, 48, 6, 1344),
  'xlstm-7-1-760m': (1536, 48, 6, 2048),
  'xlstm-7-1-1.3b': (2048, 48, 6, 2688),
}
HEADS = 4


def xlstm_count(D, L, scalar, F, V=50304):
  """Embedding and head; of a block with an mLSTM three projections of 2 D (6 D^2), blocks (24 D),
  a convolution (10 D), two gates of 6 D per head, a skip, a norm of heads and that of the block (5
  D); one with an sLSTM: four gates and their recurrent weights in four blocks (2 D^2), biases (4
  D), a convolution (5 D), a norm of heads, three matrices of F, two norms; the final norm."""
  matrix = 6 * D * D + 24 * D + 10 * D + 2 * HEADS * (6 * D + 1) + 5 * D
  gated = 2 * D * D + 4 * D + 5 * D + D + 3 * D * F + 2 * D
  return 2 * V * D + (L - scalar) * matrix + scalar * gated + D


COUNTED = {name: xlstm_count(*sizes) for name, sizes in SIZES.items()}


def test_initial_values():
  """Small initialization sqrt(2 / 5 D), outputs 2 / (blocks sqrt(D)) for the width D whatever their
  inputs are, recurrent weights and the weights of the mLSTM's gates 0, biases of forget gates from
  3 to 6 or by a power law; convolutions as PyTorch draws them."""
  model = PRESETS['xlstm-7-1-tiny'].model
  D, blocks = model.width, 8
  for name, p in parameters('xlstm-7-1').items():
    if name.endswith(('scale', 'skip')):
      assert (p == 1).all()
    elif 'forget_gate.bias' in name:
      np.testing.assert_allclose(p, np.broadcast_to(np.linspace(3, 6, HEADS), p.shape))
    elif 'input_gate.bias' in name:
      assert 0.03 < p.std() < 0.2
    elif name.endswith(('gate.kernel', 'recurrent_kernel')) and 'branches.0' in name:
      assert not p.any()
    elif name.endswith('layer.bias'):
      i, f, z, o = np.moveaxis(p, 1, 0)
      k = np.arange(D // HEADS) / (D // HEADS - 1)
      np.testing.assert_allclose(
        f, [5 - 12 * k ** (0.3 + 1.3 * 3 / 7)] * HEADS, rtol=1e-5, atol=1e-5
      )
      assert not np.stack([i, z, o]).any()
    elif '.conv.' in name:
      assert np.abs(p).max() <= 4**-0.5
      if p.size > 100:
        uniform(p, 4**-0.5)
    elif name.endswith(('out.kernel', 'down.kernel')):
      is_normal(p, 2 / blocks / np.sqrt(D))
    else:
      is_normal(p, np.sqrt(2 / (5 * D)))
