"""Marian: the Transformer of Vaswani et al. 2017, with biases in attention and on the logits, and
with sines before cosines."""

import math
from typing import Any

from jaxformer.interop.family import branches_of, depth, family, std_of
from jaxformer.interop.settings import ACTIVATIONS, Settings, activation_name
from jaxformer.interop.weights import CheckpointFormat, Rule, arrays, modules
from jaxformer.layers.attention import Attention
from jaxformer.layers.cross_attention import CrossAttention
from jaxformer.layers.init import Normal, Zeros
from jaxformer.layers.mlp import Mlp
from jaxformer.layers.position import SinusoidalPositions
from jaxformer.models.block import PostNorm
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.zoo.transformer import transformer


def read(hf: Settings) -> EncoderDecoder.Config:
  """Dropout inside attention and feed-forward layers, and of entire layers, is ignored: it does not
  affect inference."""
  hf.only('share_encoder_decoder_embeddings', True)
  hf.only('tie_word_embeddings', True)
  vocab_size, width = hf.count('vocab_size', 58101), hf.count('d_model', 1024)
  hf.only('decoder_vocab_size', vocab_size, None)
  init = Normal(std=hf.get('init_std', float, 0.02))
  return transformer(
    width,
    hf.count('encoder_layers', 12),
    hf.count('encoder_ffn_dim', 4096),
    hf.count('encoder_attention_heads', 16),
    vocab_size=vocab_size,
    context_length=hf.count('max_position_embeddings', 1024),
    decoder_layers=hf.count('decoder_layers', 12),
    decoder_hidden=hf.count('decoder_ffn_dim', 4096),
    decoder_heads=hf.count('decoder_attention_heads', 16),
    dropout=hf.get('dropout', float, 0.1),
    attention_dropout=hf.get('attention_dropout', float, 0.0),
    bias=True,
    head_bias=Zeros(),
    scaled=hf.get('scale_embedding', bool, False),
    activation=hf.choose('activation_function', ACTIVATIONS, 'gelu'),
    positions=SinusoidalPositions.Config(halves=True),
    init=init,
    embedding_init=init,
  )


def write(config: EncoderDecoder.Config) -> dict[str, Any]:
  sizes: dict[str, Any] = {}
  for side, stack, layers in (
    ('encoder', config.encoder, (Attention.Config, Mlp.Config)),
    ('decoder', config.decoder, (Attention.Config, CrossAttention.Config, Mlp.Config)),
  ):
    first, *_, last = branches_of(stack, *layers, branch=PostNorm)
    sizes |= {
      f'{side}_layers': depth(stack),
      f'{side}_ffn_dim': last.layer.hidden,
      f'{side}_attention_heads': first.layer.heads,
      'activation_function': activation_name(last.layer.activation),
      'dropout': first.dropout,
      'attention_dropout': first.layer.attention_dropout,
    }
  scaled = config.embedding_scale is not None and math.isclose(
    config.embedding_scale, math.sqrt(config.width)
  )
  return {
    'architectures': ['MarianMTModel'],
    'vocab_size': config.vocab_size,
    'decoder_vocab_size': config.vocab_size,
    'd_model': config.width,
    'max_position_embeddings': config.context_length,
    **sizes,
    'activation_dropout': 0.0,
    'scale_embedding': scaled,
    'share_encoder_decoder_embeddings': True,
    'tie_word_embeddings': True,
    'is_encoder_decoder': True,
    'forced_eos_token_id': None,
    'init_std': std_of(config.embedding_init),
  }


def rules(config: EncoderDecoder.Config) -> list[Rule]:
  attention = {f'{p}': f'{"out" if p == "o" else p}_proj' for p in 'qkvo'}
  found = [
    *modules({'embedder.input': 'model.shared'}),
    *arrays({'head.bias': 'final_logits_bias'}, reshape=lambda shape: (1, *shape)),
  ]
  for stack, names in (
    ('encoder', ('self_attn', 'final')),
    ('decoder', ('self_attn', 'encoder_attn', 'final')),
  ):
    theirs = f'model.{stack}.layers.{{layer}}.'
    for i, name in enumerate(names):
      ours = f'{stack}.{{layer}}.branches.{i}.'
      found += modules({'norm': f'{name}_layer_norm'}, ours, theirs)
      if name == 'final':
        found += modules({'up': 'fc1', 'down': 'fc2'}, f'{ours}layer.', theirs)
      else:
        found += modules(attention, f'{ours}layer.', f'{theirs}{name}.')
  return found


SHARED = 'model.shared.weight'
family(
  CheckpointFormat(
    'marian',
    read,
    write,
    rules,
    model=EncoderDecoder.Config,
    token_ids={
      'decoder_start_token_id': 58100,
      'pad_token_id': 58100,
      'eos_token_id': 0,
      'forced_eos_token_id': 0,
    },
    prefix='model.',
    ignored=(r'model\.(en|de)coder\.embed_positions\.weight',),
    copies={
      'lm_head.weight': SHARED,
      'model.encoder.embed_tokens.weight': SHARED,
      'model.decoder.embed_tokens.weight': SHARED,
    },
    aliases={
      'hidden_size': 'd_model',
      'num_attention_heads': 'encoder_attention_heads',
      'num_hidden_layers': 'encoder_layers',
    },
  )
)
