"""RWKV-4 (Peng et al. 2023): the models trained on the Pile. Pre-norm LayerNorm and one more norm
after the embedding, time mixing and channel mixing of 4 D, no biases in projections, untied
head."""

from typing import Any

from jaxformer.layers.init import Orthogonal, Uniform
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.rwkv import ChannelMix
from jaxformer.layers.rwkv4 import TimeMix4
from jaxformer.models.block import pre_norm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import Group
from jaxformer.models.zoo.preset import TINY, family, four_times, preset
from jaxformer.models.zoo.story import Chapter, step

LAYER_NORM = LayerNorm()


def rwkv(
  width: int, *groups: Group, norm: LayerNorm = LAYER_NORM, embedding: float = 1e-4, **fields: Any
) -> LanguageModel.Config:
  """Blocks in the frame of RWKV-4 to 7: norms, embedding and head. Embeddings are initialized to
  numbers up to `embedding`."""
  return LanguageModel.Config(
    width=width,
    stack=groups,
    embedding_norm=norm,
    final_norm=norm,
    embedding_init=Uniform(bound=embedding),
    head_init=Orthogonal(gain=0.5),
    **fields,
  )


def rwkv4(
  width: int,
  layers: int,
  *,
  context_length: int = 1024,
  vocab_size: int = 50277,
  hidden: int | None = None,
  norm: LayerNorm = LAYER_NORM,
  embedding: float = 1e-4,
) -> LanguageModel.Config:
  """The RWKV-4 architecture."""
  channels = ChannelMix.Config(version=4, hidden=hidden or 4 * width, init=Orthogonal())
  group = Group(pattern=(pre_norm(norm, TimeMix4.Config(), channels),), repeats=layers)
  sizes = {'context_length': context_length, 'vocab_size': vocab_size}
  return rwkv(width, group, norm=norm, embedding=embedding, **sizes)


# width, layers, and the learning rate, up to which the official code draws the embeddings
# (RWKV-v4neo, `generate_init_weight`)
for name, width, layers, rate in (
  ('rwkv4-169m', 768, 12, 6e-4),
  ('rwkv4-430m', 1024, 24, 4e-4),
  ('rwkv4-1b5', 2048, 24, 3e-4),
  ('rwkv4-3b', 2560, 32, 1.5e-4),
  ('rwkv4-7b', 4096, 32, 1.5e-4),
  ('rwkv4-14b', 5120, 40, 1e-4),
):
  preset(name, 'rwkv4', rwkv4(width, layers, embedding=rate))
preset('rwkv4-tiny', 'rwkv4', rwkv4(128, 4, **TINY))
family('rwkv4', rwkv4, hidden=four_times)

step(
  'rwkv4',
  Chapter.RWKV,
  2023,
  'y_t = (sum_s e^{-(t-s) w + k_s} v_s + e^{u + k_t} v_t) / (the same without v)',
  'A recurrent network with a decay per channel trains in parallel, up to 14B parameters.',
  'Peng et al. 2023',
)
