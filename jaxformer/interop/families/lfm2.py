"""LFM2: gated short convolutions and attention. `in_proj` of a convolution is W_b, W_c and W_x side
by side."""

from typing import Any

from jaxformer.config import InputError
from jaxformer.interop.family import blocks_of, depth, family, first_of, part, std_of
from jaxformer.interop.rotary import read_rotary, write_rotary
from jaxformer.interop.settings import Settings, Table, written
from jaxformer.interop.weights import (
  FEED_FORWARD,
  MIXER,
  CheckpointFormat,
  Rule,
  depthwise,
  fused,
  modules,
)
from jaxformer.layers.attention import Attention
from jaxformer.layers.init import Normal
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.position import Rotary
from jaxformer.layers.short_convolution import ShortConvolution
from jaxformer.models.block import pre_norm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import grouped

MODEL: Table = {
  'vocab_size': ('vocab_size', 65536),
  'width': ('hidden_size', 2560),
  'context_length': ('max_position_embeddings', 128_000),
  'tied': ('tie_word_embeddings', True),
}
CONVOLUTION: Table = {
  'd_conv': ('conv_L_cache', 3),
  'bias': ('conv_bias', False),
  'conv_bias': ('conv_bias', False),
}
KINDS = ('conv', 'full_attention')


def hidden_units(hf: Settings) -> int:
  """Hidden units of the feed-forward layers: by default two thirds of the number in the file, times
  a factor, rounded up to a multiple."""
  size = hf.count('block_ff_dim', None) or hf.count('intermediate_size', 12288)
  multiple, factor = hf.count('block_multiple_of', 256), hf.value('block_ffn_dim_multiplier', 1.0)
  if not hf.get('block_auto_adjust_ff_dim', bool, True):
    return size
  size = int(2 * size / 3)
  if factor is None:
    return size
  return -(-int(hf.positive('block_ffn_dim_multiplier', 1.0) * size) // multiple) * multiple


def layer_types(hf: Settings) -> list[str]:
  """The kind of each block's first layer."""
  layers, kinds = hf.count('num_hidden_layers', 32), hf.value('layer_types')
  attending = hf.value('full_attn_idxs')
  if kinds is None:
    attending = range(layers) if attending is None else attending
    return [KINDS[i in attending] for i in range(layers)]
  if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= set(KINDS):
    raise hf.fail('layer_types', f'a list of num_hidden_layers = {layers} of {", ".join(KINDS)}')
  return kinds


def read(hf: Settings) -> LanguageModel.Config:
  """Initialization of the convolutions' kernels is PyTorch's."""
  hf = hf.with_defaults({'rope_theta': 1e6})
  tied = hf.get('tie_embedding', bool, None)
  model = hf.read(MODEL)
  if tied is not None:
    model |= {'tied': tied}
  init, norm = (
    Normal(std=hf.get('initializer_range', float, 0.02)),
    RMSNorm(eps=hf.get('norm_eps', float, 1e-5)),
  )
  heads, head_dim = hf.count('num_attention_heads', 32), hf.count('head_dim', None)
  attention = Attention.Config(
    heads=heads,
    kv_heads=hf.count('num_key_value_heads', 8),
    head_dim=None if head_dim and head_dim * heads == model['width'] else head_dim,
    position=read_rotary(hf),
    qk_norm=norm,
    init=init,
    out_init=init,
  )
  mixers: dict[str, LayerConfig] = {
    'conv': ShortConvolution.Config(**hf.read(CONVOLUTION), init=init, out_init=init),
    'full_attention': attention,
  }
  mlp = GatedMlp.Config(hidden=hidden_units(hf), init=init, out_init=init)
  return LanguageModel.Config(
    **model,
    stack=grouped([pre_norm(norm, mixers[kind], mlp) for kind in layer_types(hf)]),
    final_norm=norm,
    embedding_init=init,
  )


def write(config: LanguageModel.Config) -> dict[str, Any]:
  blocks = blocks_of(config.stack)
  convolution = first_of(blocks, ShortConvolution.Config)
  attention = first_of(blocks, Attention.Config)
  mlp = first_of(blocks, GatedMlp.Config)
  if convolution is None or mlp is None:
    raise InputError('stack', problem='no block has a short convolution and a feed-forward layer')
  attention = attention or Attention.Config(position=Rotary())
  return {
    'architectures': ['Lfm2ForCausalLM'],
    **written(config, MODEL),
    **written(convolution, CONVOLUTION),
    'intermediate_size': mlp.hidden,
    'block_auto_adjust_ff_dim': False,
    'num_hidden_layers': depth(config.stack),
    'layer_types': [KINDS[type(b.branches[0].layer) is Attention.Config] for b in blocks],
    'num_attention_heads': attention.heads,
    'num_key_value_heads': attention.kv_heads or attention.heads,
    'head_dim': attention.head_size(config.width),
    'norm_eps': part(config.final_norm, RMSNorm, 'final_norm').eps,
    'initializer_range': std_of(config.embedding_init),
    **write_rotary(part(attention.position, Rotary, 'the position of the attention layers')),
  }


def rules(config: LanguageModel.Config) -> list[Rule]:
  layer, ours = 'model.layers.{layer}.', f'{MIXER}.layer.'
  attention = {p: f'{p}_proj' for p in 'qkv'} | {'o': 'out_proj'}
  return [
    *modules(
      {
        'embedder.input': 'model.embed_tokens',
        f'{MIXER}.norm': f'{layer}operator_norm',
        f'{FEED_FORWARD}.norm': f'{layer}ffn_norm',
        'final_norm': 'model.embedding_norm',
        'head': 'lm_head',
      }
    ),
    *modules(attention, ours, f'{layer}self_attn.'),
    *modules({f'{p}_norm': f'{p}_layernorm' for p in 'qk'}, ours, f'{layer}self_attn.'),
    *fused([ours + p for p in 'bcx'], f'{layer}conv.in_proj'),
    *fused([f'{ours}conv'], f'{layer}conv.conv', reshape=depthwise),
    *modules({'out': 'out_proj'}, ours, f'{layer}conv.'),
    *modules(
      {'gate': 'w1', 'up': 'w3', 'down': 'w2'}, f'{FEED_FORWARD}.layer.', f'{layer}feed_forward.'
    ),
  ]


family(
  CheckpointFormat(
    'lfm2',
    read,
    write,
    rules,
    prefix='model.',
    copies={'lm_head.weight': 'model.embed_tokens.weight'},
  )
)
