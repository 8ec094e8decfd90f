"""Falcon-H1: Mamba-2 and attention on one input, then a feed-forward layer. Its multipliers are
constants of our config, at the places where they multiply; the one on the keys is a factor on the
logits of attention, which is the same."""

import math
from typing import Any

from jaxformer.config import InputError
from jaxformer.interop.families import mamba2
from jaxformer.interop.family import branches_of, depth, family, part, std_of
from jaxformer.interop.rotary import read_rotary, write_rotary
from jaxformer.interop.settings import (
  ACTIVATIONS,
  Settings,
  Table,
  activation_name,
  factor,
  inverse,
  written,
)
from jaxformer.interop.weights import FEED_FORWARD, MIXER, CheckpointFormat, Rule, modules
from jaxformer.layers.attention import Attention
from jaxformer.layers.init import Normal
from jaxformer.layers.mamba2 import Mamba2, ProjectionScales
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.parallel import ParallelLayers, Summand
from jaxformer.layers.position import Rotary
from jaxformer.models.block import Block, PreNorm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import Group

MODEL: Table = {
  'vocab_size': ('vocab_size', 128000),
  'width': ('hidden_size', 4096),
  'context_length': ('max_position_embeddings', 8192),
  'tied': ('tie_word_embeddings', False),
}
PROJECTIONS = ('z', 'x', 'B', 'C', 'dt')


def _multipliers(hf: Settings, name: str, count: int) -> list[float]:
  """A list of this many positive numbers; ones if it is missing."""
  given = hf.value(name)
  if given is None:
    return [1.0] * count
  numbers = [x for x in given if isinstance(x, int | float) and 0 < x < math.inf]
  if not isinstance(given, list | tuple) or len(given) != count or len(numbers) != count:
    raise hf.fail(name, f'a list of {count} positive numbers')
  return [float(x) for x in numbers]


def _mixer(hf: Settings, width: int, eps: float) -> Mamba2.Config:
  mamba = mamba2.read_named(hf, width, hf.count('mamba_d_ssm', None) or _inner(hf), eps)
  hf.only('projectors_bias', mamba.bias)
  scales = _multipliers(hf, 'ssm_multipliers', len(PROJECTIONS))
  if any(s != 1.0 for s in scales):
    mamba = mamba.replace(scales=ProjectionScales(**dict(zip(PROJECTIONS, scales, strict=True))))
  before_gate = hf.get('mamba_norm_before_gate', bool, True)
  if not hf.get('mamba_rms_norm', bool, False):
    return mamba.replace(norm_eps=None)
  return mamba.replace(norm_before_gate=before_gate)


def _inner(hf: Settings) -> int | None:
  """Channels of Mamba-2 where `mamba_d_ssm` is null or missing: then `mamba_expand` or the
  default."""
  return None if 'mamba_d_ssm' in hf.fields else 1024


def read(hf: Settings) -> LanguageModel.Config:
  """Initialization of Mamba-2 layers is the authors' of Mamba-2, which transformers does not
  follow."""
  hf.only('sliding_window', None)
  model, layers = hf.read(MODEL), hf.count('num_hidden_layers', 32)
  hf.only('layers_block_type', None, ['hybrid'] * layers)
  hf.only('layer_types', None, ['hybrid'] * layers)
  init, norm = (
    Normal(std=hf.get('initializer_range', float, 0.02)),
    RMSNorm(eps=hf.get('rms_norm_eps', float, 1e-5)),
  )
  heads = hf.count('num_attention_heads', 32)
  head_dim = hf.count('head_dim', None) or model['width'] // heads
  attention = Attention.Config(
    heads=heads,
    kv_heads=hf.count('num_key_value_heads', 8),
    head_dim=head_dim,
    position=read_rotary(hf),
    bias=hf.get('attention_bias', bool, False),
    scale=hf.positive('key_multiplier', 1.0) / math.sqrt(head_dim),
    attention_dropout=hf.get('attention_dropout', float, 0.0),
    init=init,
    out_init=init,
  )

  def summand(layer: Any, name: str) -> Summand:
    before, after = (hf.positive(f'{name}_{side}_multiplier', 1.0) for side in ('in', 'out'))
    return Summand(layer=layer, in_scale=factor(before), out_scale=factor(after))

  summands = summand(_mixer(hf, model['width'], norm.eps), 'ssm'), summand(attention, 'attention')
  gate, down = _multipliers(hf, 'mlp_multipliers', 2)
  mlp = GatedMlp.Config(
    hidden=hf.count('intermediate_size', 14336),
    activation=hf.choose('hidden_act', ACTIVATIONS, 'silu'),
    bias=hf.get('mlp_bias', bool, False),
    gate_scale=factor(gate),
    init=init,
    out_init=init,
  )
  branches = (
    PreNorm(layer=ParallelLayers.Config(summands=summands), norm=norm),
    PreNorm(layer=mlp, norm=norm, scale=factor(down)),
  )
  return LanguageModel.Config(
    **model,
    stack=(Group(pattern=(Block.Config(branches=branches),), repeats=layers),),
    final_norm=norm,
    embedding_scale=factor(hf.positive('embedding_multiplier', 1.0)),
    logit_scale=factor(hf.positive('lm_head_multiplier', 1.0)),
    embedding_init=init,
  )


def write(config: LanguageModel.Config) -> dict[str, Any]:
  first, second = branches_of(config.stack, ParallelLayers.Config, GatedMlp.Config)
  if len(first.layer.summands) != 2:
    raise InputError('block 0', problem='must have two layers side by side')
  ssm, heads = first.layer.summands
  mamba = part(ssm.layer, Mamba2.Config, 'the first of the parallel layers').resolved(config.width)
  attention = part(heads.layer, Attention.Config, 'the second of the parallel layers')
  attention, mlp = attention.resolved(config.width), second.layer
  head_dim = attention.head_size(config.width)
  scales, root = mamba.scales or ProjectionScales(), math.sqrt(head_dim)
  scale = attention.scale or 1.0 / root
  return {
    'architectures': ['FalconH1ForCausalLM'],
    **written(config, MODEL),
    **mamba2.written_named(mamba, config.width),
    **write_rotary(part(attention.position, Rotary, 'the position of the attention')),
    'mamba_d_ssm': mamba.channels(config.width),
    'projectors_bias': mamba.bias,
    'mamba_rms_norm': mamba.norm_eps is not None,
    'mamba_norm_before_gate': mamba.norm_before_gate,
    'num_attention_heads': attention.heads,
    'num_key_value_heads': attention.kv_heads,
    'head_dim': head_dim,
    'attention_bias': attention.bias,
    'attention_dropout': attention.attention_dropout,
    'intermediate_size': mlp.hidden,
    'hidden_act': activation_name(mlp.activation),
    'mlp_bias': mlp.bias,
    'num_hidden_layers': depth(config.stack),
    'rms_norm_eps': part(config.final_norm, RMSNorm, 'final_norm').eps,
    'initializer_range': std_of(config.embedding_init),
    'embedding_multiplier': config.embedding_scale or 1.0,
    'lm_head_multiplier': config.logit_scale or 1.0,
    'key_multiplier': inverse(scale, lambda x: x / root, scale * root),
    'attention_in_multiplier': heads.in_scale or 1.0,
    'attention_out_multiplier': heads.out_scale or 1.0,
    'ssm_in_multiplier': ssm.in_scale or 1.0,
    'ssm_out_multiplier': ssm.out_scale or 1.0,
    'ssm_multipliers': [getattr(scales, name) for name in PROJECTIONS],
    'mlp_multipliers': [mlp.gate_scale or 1.0, second.scale or 1.0],
  }


def rules(config: LanguageModel.Config) -> list[Rule]:
  layer, ours = 'model.layers.{layer}.', f'{MIXER}.layer.layers.'
  return [
    *modules(
      {
        'embedder.input': 'model.embed_tokens',
        f'{MIXER}.norm': f'{layer}input_layernorm',
        f'{FEED_FORWARD}.norm': f'{layer}pre_ff_layernorm',
        'final_norm': 'model.final_layernorm',
        'head': 'lm_head',
      }
    ),
    *mamba2.layer_rules(f'{layer}mamba.', f'{ours}0.'),
    *modules({p: f'{p}_proj' for p in 'qkvo'}, f'{ours}1.', f'{layer}self_attn.'),
    *modules(
      {p: f'{p}_proj' for p in ('gate', 'up', 'down')},
      f'{FEED_FORWARD}.layer.',
      f'{layer}feed_forward.',
    ),
  ]


family(
  CheckpointFormat(
    'falcon_h1',
    read,
    write,
    rules,
    prefix='model.',
    copies={'lm_head.weight': 'model.embed_tokens.weight'},
  )
)
