"""RecurrentGemma: recurrent blocks with an RG-LRU and blocks of local attention."""

import math
from typing import Any

from jaxformer.config import InputError
from jaxformer.interop.family import family, part
from jaxformer.interop.settings import ACTIVATIONS, Settings, Table, activation_name, written
from jaxformer.interop.weights import FEED_FORWARD, MIXER, CheckpointFormat, Rule, arrays, fused
from jaxformer.interop.weights import modules as linear
from jaxformer.layers.attention import Attention
from jaxformer.layers.init import FanInNormal, Normal
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.position import Rotary
from jaxformer.layers.rg_lru import DepthNormal, RgLru
from jaxformer.models.block import Block, pre_norm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import grouped
from jaxformer.models.zoo.recurrent_gemma import embedding_scale

CONTEXT_LENGTH = 8192  # that of the published models; files do not say it
MODEL: Table = {
  'vocab_size': ('vocab_size', 256000),
  'width': ('hidden_size', 2560),
  'softcap': ('logits_soft_cap', 30.0),
  'tied': ('tie_word_embeddings', True),
}


def _rotary(hf: Settings) -> Rotary:
  """Rotary positions on a part of each head, from `rope_parameters` (transformers 5) or the fields
  before; frequencies are unscaled."""
  hf.only('rope_scaling', None)
  theta = hf.positive('rope_theta', 10000.0)
  fraction = hf.positive('partial_rotary_factor', 0.5)
  if hf.value('rope_parameters') is None:
    return Rotary(theta=theta, fraction=fraction)
  rope = Settings(hf.get('rope_parameters', dict), f'{hf.where}: rope_parameters')
  for name in ('rope_type', 'type'):
    rope.only(name, 'default', None)
  rotary = Rotary(
    theta=rope.positive('rope_theta', theta),
    fraction=rope.positive('partial_rotary_factor', fraction),
  )
  if unread := rope.unread():
    raise rope.fail(unread[0], 'absent')
  return rotary


def _kinds(hf: Settings) -> list[str]:
  """The kind of every block: the pattern, repeated."""
  pattern = hf.value('block_types')
  pattern = ['recurrent', 'recurrent', 'attention'] if pattern is None else list(pattern)
  if not pattern or not set(pattern) <= {'recurrent', 'attention'}:
    raise hf.fail('block_types', "a list of 'recurrent' and 'attention'")
  return [pattern[i % len(pattern)] for i in range(hf.count('num_hidden_layers', 26))]


def read(hf: Settings) -> LanguageModel.Config:
  """Initialization is that of the authors, which transformers follows in part."""
  model, heads = hf.read(MODEL), hf.count('num_attention_heads', 10)
  hf.only('head_dim', None, model['width'] // heads)
  hf.only('embeddings_scale_by_sqrt_dim', True, None)
  kv_heads = hf.count('num_key_value_heads', heads)
  attention = Attention.Config(
    heads=heads,
    kv_heads=kv_heads,
    window=hf.count('attention_window_size', 2048),
    position=_rotary(hf),
    bias=hf.get('attention_bias', bool, False),
    out_bias=True,
    attention_dropout=hf.get('attention_dropout', float, 0.0),
    init=FanInNormal(),
    out_init=DepthNormal(),
  )
  activation = hf.choose('hidden_activation', ACTIVATIONS, 'gelu_pytorch_tanh')
  channels = hf.count('lru_width', model['width'])
  recurrent = RgLru.Config(
    hidden=None if channels == model['width'] else channels,
    heads=heads,
    d_conv=hf.count('conv1d_width', 4),
    activation=activation,
  )
  hidden = hf.count('intermediate_size', 7680)
  if hidden % 2:
    raise hf.fail('intermediate_size', 'even: twice the hidden units')
  mlp = GatedMlp.Config(
    hidden=hidden // 2, activation=activation, bias=True, init=FanInNormal(), out_init=DepthNormal()
  )
  norm = RMSNorm(eps=hf.get('rms_norm_eps', float, 1e-6), unit_offset=True)
  layers = {'recurrent': recurrent, 'attention': attention}
  blocks = [pre_norm(norm, layers[kind], mlp) for kind in _kinds(hf)]
  return LanguageModel.Config(
    **model,
    context_length=CONTEXT_LENGTH,
    stack=grouped(blocks),
    final_norm=norm,
    embedding_scale=embedding_scale(model['width']),
    embedding_init=Normal(std=1 / math.sqrt(model['width'])),
  )


def write(config: LanguageModel.Config) -> dict[str, Any]:
  blocks: list[Block.Config] = [b for g in config.stack for b in g.pattern * g.repeats]
  mixers = [b.branches[0].layer for b in blocks]
  found: dict[type, Any] = {type(m): m for m in reversed(mixers)}
  recurrent = part(found.get(RgLru.Config), RgLru.Config, 'the recurrent layer')
  attention = found.get(Attention.Config) or Attention.Config(
    heads=recurrent.heads, position=Rotary(fraction=0.5)
  )
  if any(len(b.branches) != 2 for b in blocks):
    raise InputError('block', problem='must be a mixing and a feed-forward layer')
  mlp = part(blocks[0].branches[1].layer, GatedMlp.Config, 'the feed-forward layer')
  rotary = part(attention.position, Rotary, 'the position of the attention layers')
  rope = {
    'rope_type': 'default',
    'rope_theta': rotary.theta,
    'partial_rotary_factor': rotary.fraction,
  }
  return {
    'architectures': ['RecurrentGemmaForCausalLM'],
    **written(config, MODEL),
    'num_hidden_layers': len(blocks),
    'block_types': ['recurrent' if type(m) is RgLru.Config else 'attention' for m in mixers],
    'intermediate_size': 2 * mlp.hidden,
    'hidden_activation': activation_name(mlp.activation),
    'num_attention_heads': attention.heads,
    'num_key_value_heads': attention.kv_heads or attention.heads,
    'attention_window_size': attention.window or config.context_length,
    'attention_bias': attention.bias,
    'attention_dropout': attention.attention_dropout,
    'rope_parameters': rope,
    'lru_width': recurrent.channels(config.width),
    'conv1d_width': recurrent.d_conv,
    'rms_norm_eps': part(config.final_norm, RMSNorm, 'final_norm').eps,
  }


def rules(config: LanguageModel.Config) -> list[Rule]:
  layer, ours = 'model.layers.{layer}.', f'{MIXER}.layer.'
  mixer = f'{layer}temporal_block.'
  recurrent = {'x': 'linear_x', 'y': 'linear_y', 'out': 'linear_out'}
  gates = {'input_gate': 'input_gate', 'decay_gate': 'recurrent_gate'}
  return [
    *linear(
      {
        'embedder.input': 'model.embed_tokens',
        f'{MIXER}.norm': f'{layer}temporal_pre_norm',
        f'{FEED_FORWARD}.norm': f'{layer}channel_pre_norm',
        'final_norm': 'model.final_norm',
        'head': 'lm_head',
      }
    ),
    *linear({p: f'{p}_proj' for p in 'qkvo'} | recurrent, ours, mixer),
    *fused([f'{ours}conv'], f'{mixer}conv_1d', reshape=lambda shape: (shape[0], 1, shape[1])),
    *arrays(
      {'decay': 'recurrent_param'}
      | {f'{o}.kernel': f'{t}_weight' for o, t in gates.items()}
      | {f'{o}.bias': f'{t}_bias' for o, t in gates.items()},
      ours,
      f'{mixer}rg_lru.',
    ),
    *linear(
      {p: f'{p}_proj' for p in ('gate', 'up', 'down')},
      f'{FEED_FORWARD}.layer.',
      f'{layer}mlp_block.',
    ),
  ]


family(
  CheckpointFormat(
    'recurrent_gemma',
    read,
    write,
    rules,
    prefix='model.',
    copies={'lm_head.weight': 'model.embed_tokens.weight'},
    aliases={'sliding_window': 'attention_window_size'},
  )
)
