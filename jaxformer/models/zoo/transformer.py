"""The Transformer (Vaswani et al. 2017): post-norm LayerNorm without a norm after the stacks, ReLU,
sinusoidal positions, one table for source, target and head, times sqrt(d). Biases in feed-forward
layers and norms, none in attention or on the logits; with a vocabulary of 37,000 that makes
63,045,632 (base) and 214,171,648 (big)."""

import math
from typing import Any

from jaxformer.layers.attention import Attention
from jaxformer.layers.cross_attention import CrossAttention
from jaxformer.layers.init import GlorotUniform, Init, Normal
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.mlp import ActivationName, Mlp
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.position import PositionConfig, SinusoidalPositions
from jaxformer.models.block import PostNorm
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.stack import Group, group
from jaxformer.models.zoo.preset import HEAD, family, four_times, heads_for, preset
from jaxformer.models.zoo.story import Chapter, step

INTERLEAVED = SinusoidalPositions.Config()
GLOROT = GlorotUniform()


def transformer(
  width: int,
  layers: int,
  hidden: int,
  heads: int,
  *,
  vocab_size: int,
  source_vocab_size: int | None = None,
  decoder_layers: int | None = None,
  decoder_hidden: int | None = None,
  decoder_heads: int | None = None,
  dropout: float = 0.0,
  bias: bool = False,
  scaled: bool = True,
  activation: ActivationName = 'relu',
  positions: PositionConfig = INTERLEAVED,
  attention_dropout: float = 0.0,
  init: Init = GLOROT,
  embedding_init: Init | None = None,
  **fields: Any,
) -> EncoderDecoder.Config:
  """The architecture; the decoder has the sizes of the encoder unless given. Sources and targets of
  one vocabulary share their table. `fields` of the config: `context_length`, `head_bias`.

  The paper gives no initialization. That of the authors' library, tensor2tensor 1.15.7: embeddings
  N(0, 1 / d), so that components have variance 1 after the scale; matrices uniform, with variance
  1 / the mean of inputs and outputs (`uniform_unit_scaling` of gain 1); biases 0. Its releases of
  2017 initialize q, k and v of self-attention, and k and v of cross-attention, as one matrix, which
  makes their variance 1/2 and 2/3 of it."""
  norm = LayerNorm()
  shared: dict[str, Any] = {
    'bias': bias,
    'attention_dropout': attention_dropout,
    'init': init,
    'out_init': init,
  }

  def post_norm(repeats: int, *layers: LayerConfig) -> Group:
    branches = (PostNorm(layer=layer, norm=norm, dropout=dropout) for layer in layers)
    return group(*branches, repeats=repeats)

  def mlp(hidden: int) -> Mlp.Config:
    return Mlp.Config(hidden=hidden, activation=activation, bias=True, init=init, out_init=init)

  def attention(heads: int, causal: bool) -> Attention.Config:
    return Attention.Config(heads=heads, causal=causal, **shared)

  over, sources = decoder_heads or heads, source_vocab_size or vocab_size
  cross = CrossAttention.Config(heads=over, **shared)
  return EncoderDecoder.Config(
    source_vocab_size=sources,
    vocab_size=vocab_size,
    width=width,
    positions=positions,
    embedding_scale=math.sqrt(width) if scaled else None,
    shared_embedding=sources == vocab_size,
    tied=True,
    dropout=dropout,
    embedding_init=embedding_init or Normal(std=width**-0.5),
    encoder=(post_norm(layers, attention(heads, False), mlp(hidden)),),
    decoder=(
      post_norm(
        decoder_layers or layers, attention(over, True), cross, mlp(decoder_hidden or hidden)
      ),
    ),
    **fields,
  )


for name, width, hidden, heads, dropout in (
  ('transformer-base', 512, 2048, 8, 0.1),
  ('transformer-big', 1024, 4096, 16, 0.3),
):
  preset(
    name,
    'transformer',
    transformer(width, 6, hidden, heads, vocab_size=37_000, context_length=512, dropout=dropout),
  )
preset(
  'transformer-tiny', 'transformer', transformer(96, 2, 256, 4, vocab_size=264, context_length=128)
)


def _grown(*, width: int, layers: int, hidden: int, **sizes: Any) -> EncoderDecoder.Config:
  return transformer(width, layers, hidden, heads_for(width), **sizes)


family('transformer', _grown, width_step=HEAD, hidden=four_times, of_pairs=True)

step(
  'transformer',
  Chapter.TRANSFORMERS,
  2017,
  'softmax(q k^T / sqrt(K)) v, then max(0, x W) W',
  'No recurrence is left: all positions are computed at once.',
  'Vaswani et al. 2017',
)
