"""Marian: the Transformer of Vaswani et al. 2017, with biases in attention and on the logits, and
with sines before cosines."""

from __future__ import annotations

import math
from typing import Any

from jaxformer.config import InputError
from jaxformer.interop.family import CheckpointFormat, family, part, std_of
from jaxformer.interop.settings import ACTIVATIONS, Settings, activation_name
from jaxformer.interop.weights import Names, NewAxis, Rule, dense, norm, same
from jaxformer.layers.attention import Attention
from jaxformer.layers.init import Normal
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.mlp import Mlp
from jaxformer.layers.position import SinusoidalPositions
from jaxformer.models.block import PostNorm
from jaxformer.models.encoder_decoder import EncoderDecoder
from jaxformer.models.stack import Group
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
    bias=True,
    head_bias=True,
    scaled=hf.get('scale_embedding', bool, False),
    activation=hf.choose('activation_function', ACTIVATIONS, 'gelu'),
    positions=SinusoidalPositions.Config(halves=True),
    init=init,
    embedding_init=init,
  )


def _layers(
  groups: tuple[Group, ...], count: int, where: str
) -> tuple[list[LayerConfig], int, float]:
  """(layers of the first block, number of blocks, dropout) of a stack."""
  blocks = [b for g in groups for _ in range(g.repeats) for b in g.pattern]
  branches = [part(b, PostNorm, f'a branch of block 0 of the {where}') for b in blocks[0].branches]
  if len(branches) != count:
    raise InputError(f'block 0 of the {where} has {len(branches)} branches, not {count}')
  return [b.layer for b in branches], len(blocks), branches[0].dropout


def write(config: EncoderDecoder.Config) -> dict[str, Any]:
  """The first token of a decoder is not in our config; the last token of the vocabulary is written,
  Marian's padding."""
  config = part(config, EncoderDecoder.Config, 'model')
  (attention, mlp), layers, dropout = _layers(config.encoder, 2, 'encoder')
  (over, _, mlp_over), layers_over, _ = _layers(config.decoder, 3, 'decoder')
  attention, over = (part(a, Attention.Config, 'layer 0 of block 0') for a in (attention, over))
  mlp, mlp_over = (part(m, Mlp.Config, 'the last layer of block 0') for m in (mlp, mlp_over))
  scaled = config.embedding_scale is not None and math.isclose(
    config.embedding_scale, math.sqrt(config.width)
  )
  return {
    'vocab_size': config.vocab_size,
    'decoder_vocab_size': config.vocab_size,
    'd_model': config.width,
    'max_position_embeddings': config.context_length,
    'encoder_layers': layers,
    'decoder_layers': layers_over,
    'encoder_ffn_dim': mlp.hidden,
    'decoder_ffn_dim': mlp_over.hidden,
    'encoder_attention_heads': attention.heads,
    'decoder_attention_heads': over.heads,
    'activation_function': activation_name(mlp.activation),
    'dropout': dropout,
    'attention_dropout': 0.0,
    'activation_dropout': 0.0,
    'scale_embedding': scaled,
    'share_encoder_decoder_embeddings': True,
    'tie_word_embeddings': True,
    'is_encoder_decoder': True,
    'decoder_start_token_id': config.vocab_size - 1,
    'forced_eos_token_id': None,
    'init_std': std_of(config.embedding_init),
  }


def rules(config: EncoderDecoder.Config) -> list[Rule]:
  found = [
    same('embedder.input.table', 'model.shared.weight'),
    Rule(('head.bias',), 'final_logits_bias', (NewAxis(0),)),
  ]
  for stack, names in (
    ('encoder', ('self_attn', '')),
    ('decoder', ('self_attn', 'encoder_attn', '')),
  ):
    theirs = f'model.{stack}.layers.{{layer}}'
    for i, name in enumerate(names):
      ours = f'{stack}.{{layer}}.branches.{i}'
      their_norm = f'{theirs}.{name or "final"}_layer_norm'
      found += norm(f'{ours}.norm', their_norm)
      parts = (
        [(p, f'{name}.{"out" if p == "o" else p}_proj') for p in 'qkvo']
        if name
        else [('up', 'fc1'), ('down', 'fc2')]
      )
      for mine, other in parts:
        found += dense(f'{ours}.layer.{mine}', f'{theirs}.{other}')
  return found


def names(config: EncoderDecoder.Config) -> Names:
  copies = (
    'lm_head.weight',
    'model.encoder.embed_tokens.weight',
    'model.decoder.embed_tokens.weight',
  )
  positions = r'model\.(en|de)coder\.embed_positions\.weight'
  return Names(
    prefix='model.', ignored=(positions,), copies=dict.fromkeys(copies, 'model.shared.weight')
  )


family(CheckpointFormat('marian', 'MarianMTModel', read, write, rules, names))
