"""Models small enough to convert many times, whose every parameter differs from every other."""

import jax
import numpy as np

from jaxformer.layers.init import Normal, Zeros
from jaxformer.layers.mamba import Mamba
from jaxformer.layers.mamba2 import Mamba2
from jaxformer.layers.position import SinusoidalPositions
from jaxformer.models.params import define
from jaxformer.models.zoo.gpt import gpt
from jaxformer.models.zoo.jamba import jamba
from jaxformer.models.zoo.llama import LLAMA3_1, llama
from jaxformer.models.zoo.mamba import mamba
from jaxformer.models.zoo.mixtral import mixtral
from jaxformer.models.zoo.rwkv4 import rwkv4
from jaxformer.models.zoo.rwkv5 import rwkv5
from jaxformer.models.zoo.rwkv6 import rwkv6
from jaxformer.models.zoo.rwkv7 import rwkv7
from jaxformer.models.zoo.transformer import transformer


def noisy(config, seed=0, std=0.1):
  """Parameters of which none is constant: scales of ones and offsets of zeros would hide a wrong
  map."""
  info, numbers = define(config).info, np.random.default_rng(seed)
  return {
    n: jax.numpy.asarray(numbers.normal('scale' in n, std, i.shape), 'float32')
    for n, i in info.items()
  }


SMALL = {
  'gpt2': gpt(16, 3, 2, context_length=12, vocab_size=30),
  'llama': llama(16, 3, 24, 4, 2, context_length=12, vocab_size=30, rotary=LLAMA3_1),
  'tied': llama(16, 1, 24, 4, 2, context_length=12, vocab_size=30, rotary=LLAMA3_1, tied=True),
  'mamba': mamba(
    Mamba.Config(d_state=3, dt_rank=2, bias=True), 8, 2, context_length=12, vocab_size=30
  ),
  'mixtral': mixtral(16, 3, 24, 4, 2, experts=4, context_length=12, vocab_size=30, balance=0.02),
  'jamba': jamba(16, 8, 24, 4, 2, experts=3, d_state=3, context_length=12, vocab_size=30),
  'mamba2': mamba(
    Mamba2.Config(d_state=3, head_dim=4, groups=2, bias=True),
    8,
    2,
    context_length=12,
    vocab_size=30,
  ),
  'rwkv4': rwkv4(8, 3, context_length=12, vocab_size=30, hidden=12),
  'marian': transformer(
    16,
    2,
    24,
    4,
    decoder_layers=3,
    vocab_size=30,
    context_length=12,
    bias=True,
    head_bias=Zeros(),
    positions=SinusoidalPositions.Config(halves=True),
    init=Normal(),
    embedding_init=Normal(),
  ),
}

RWKV = {
  'rwkv4': rwkv4(64, 3, vocab_size=50, hidden=96),
  'rwkv5': rwkv5(64, 3, vocab_size=50, hidden=96, head_dim=16),
  'rwkv6': rwkv6(64, 3, (6, 10), vocab_size=50, hidden=96, head_dim=16),
  'rwkv7': rwkv7(64, 3, (8, 6, 5, 12), vocab_size=50, hidden=96, head_dim=16),
}


def noisy_rwkv(config, seed=0, std=0.1):
  """Official initial values, each with noise: some of them decide whether a recurrence is
  stable."""
  initial, noise = define(config).init(jax.random.key(3)), noisy(config, seed, std)
  return {n: noise[n] if 'scale' in n else p + noise[n] for n, p in initial.items()}
