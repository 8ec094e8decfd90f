"""RWKV-7 "Goose" (Peng et al. 2025): the World models. Pre-norm LayerNorm and one more norm after
the embedding, time mixing and channel mixing, heads of 64, no biases in projections, untied
head."""

import functools

from jaxformer.layers.rwkv import ChannelMix
from jaxformer.layers.rwkv7 import TimeMix7
from jaxformer.models.block import Block, pre_norm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import Group
from jaxformer.models.zoo.preset import HEAD, TINY, family, four_times, preset
from jaxformer.models.zoo.rwkv4 import LAYER_NORM, rwkv
from jaxformer.models.zoo.story import Chapter, step


def rwkv7(
  width: int,
  layers: int,
  ranks: tuple[int, int, int, int],
  *,
  context_length: int = 4096,
  vocab_size: int = 65536,
  hidden: int | None = None,
  head_dim: int = 64,
) -> LanguageModel.Config:
  """The RWKV-7 architecture. `ranks` are those of decay, in-context learning rate, value mixing and
  gate. The first block shares its values with all others, so it is a group of its own."""
  decay, rate, value, gate = ranks
  first = TimeMix7.Config(
    head_dim=head_dim, decay_rank=decay, rate_rank=rate, value_rank=None, gate_rank=gate
  )
  channels = ChannelMix.Config(version=7, hidden=hidden or 4 * width)

  def block(time: TimeMix7.Config) -> Block.Config:
    return pre_norm(LAYER_NORM, time, channels)

  groups = [Group(pattern=(block(first),))]
  if layers > 1:
    groups.append(Group(pattern=(block(first.replace(value_rank=value)),), repeats=layers - 1))
  return rwkv(width, *groups, context_length=context_length, vocab_size=vocab_size)


for name, width, layers, ranks in (
  ('rwkv7-0.1b', 768, 12, (64, 64, 32, 128)),
  ('rwkv7-0.4b', 1024, 24, (64, 64, 32, 128)),
  ('rwkv7-1.5b', 2048, 24, (96, 96, 64, 256)),
  ('rwkv7-2.9b', 2560, 32, (96, 96, 64, 320)),
):
  preset(name, 'rwkv7', rwkv7(width, layers, ranks))
preset('rwkv7-tiny', 'rwkv7', rwkv7(128, 4, (16, 16, 8, 32), head_dim=HEAD, **TINY))
family(
  'rwkv7',
  functools.partial(rwkv7, ranks=(16, 16, 8, 32), head_dim=HEAD),
  width_step=HEAD,
  hidden=four_times,
)

step(
  'rwkv7',
  Chapter.RWKV,
  2025,
  "S_t = S_{t-1} (diag(w_t) - kappa_t' (a_t * kappa_t)) + v_t' k_t",
  'A generalized delta rule: values are replaced, not only faded.',
  'Peng et al. 2025',
)
