"""Switch (Fedus et al. 2022): one expert per token, in every second feed-forward layer, ReLU,
pre-norm RMSNorm, no biases.

The published models are encoder-decoders (T5); this is their decoder without the attention to an
encoder, at a size that was not published, so it has no published name. It has rotary positions
where T5 has learned biases of attention. And it drops no token: `--model.capacity-factor 1.25`
limits the experts as the paper does."""

from typing import Any

from jaxformer.layers.attention import Attention
from jaxformer.layers.init import TRUNCATED_STD, FanInNormal, Normal
from jaxformer.layers.mlp import Mlp
from jaxformer.layers.moe import Moe
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.position import Rotary
from jaxformer.layers.router import SoftmaxTopK
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.zoo.preset import (
  HEAD,
  TINY,
  family,
  four_times,
  heads_for,
  pre_norm_model,
  preset,
)
from jaxformer.models.zoo.story import Chapter, step


def switch(
  width: int, layers: int, hidden: int, heads: int, experts: int, **fields: Any
) -> LanguageModel.Config:
  """A decoder of Switch layers. Initial values: N(0, 0.1 / fan_in) of which what lies beyond two
  standard deviations is drawn again, the paper's smaller scale (section 2.4); that leaves 0.88 of
  the standard deviation. `fields` of the config: `vocab_size`, `context_length`."""
  init = FanInNormal(gain=0.1**0.5 * TRUNCATED_STD, truncated=True)
  attention = Attention.Config(heads=heads, position=Rotary(), init=init, out_init=init)
  mlp = Mlp.Config(hidden=hidden, activation='relu', init=init, out_init=init)
  moe = Moe.Config(
    experts=experts, expert=mlp, router=SoftmaxTopK(k=1, jitter=0.01, balance=0.01, init=init)
  )
  return pre_norm_model(
    width,
    layers,
    (attention, mlp),
    (attention, moe),
    norm=RMSNorm(eps=1e-6),
    embedding_init=Normal(std=1.0),
    head_init=init,
    **fields,
  )


preset('switch-tiny', 'switch', switch(128, 4, 384, 4, 4, **TINY))


def _grown(*, width: int, layers: int, hidden: int, **sizes: Any) -> LanguageModel.Config:
  return switch(width, layers, hidden, heads_for(width), 4, **sizes)


family('switch', _grown, width_step=HEAD, layer_step=2, hidden=four_times)

step(
  'switch',
  Chapter.EXPERTS,
  2021,
  'y = p_e(x) E_e(x), e = argmax p(x)',
  'One expert per token suffices.',
  'Fedus et al. 2022',
)
