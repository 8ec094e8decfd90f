"""Granite 4 H: Mamba-2 or attention, then a feed-forward layer, which they call shared, alone or
beside experts. On disk, W_gate and W_up are one tensor, and so are those of all experts."""

from typing import Any

from jaxformer.config import InputError
from jaxformer.interop.families import mamba2
from jaxformer.interop.families.mixtral import balance
from jaxformer.interop.family import blocks_of, depth, family, first_of, part, std_of
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
from jaxformer.interop.weights import FEED_FORWARD, MIXER, CheckpointFormat, Rule, fused, modules
from jaxformer.layers.attention import Attention
from jaxformer.layers.init import Normal
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.mamba2 import Mamba2
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.moe import Moe
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.position import Rotary
from jaxformer.layers.router import TopKSoftmax
from jaxformer.models.block import Block, PreNorm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import grouped

MODEL: Table = {
  'vocab_size': ('vocab_size', 32000),
  'width': ('hidden_size', 4096),
  'context_length': ('max_position_embeddings', 2048),
  'tied': ('tie_word_embeddings', False),
}
KINDS = {'linear_attention': 'M', 'full_attention': '*', 'mamba': 'M', 'attention': '*'}
"""Their name of a block's first layer -> its letter. Of several names, the first is written."""
NAMES = {letter: name for name, letter in reversed(KINDS.items())}


def layout(hf: Settings, layers: int) -> str:
  """The letter of each block."""
  found = []
  for name in ('layer_types', 'layers_block_type'):
    kinds = hf.value(name)
    if kinds is not None:
      if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= set(KINDS):
        accepted = f'a list of num_hidden_layers = {layers} of {", ".join(KINDS)}'
        raise hf.fail(name, accepted)
      found.append(''.join(KINDS[kind] for kind in kinds))
      if found[0] != found[-1]:
        raise hf.fail(name, 'equivalent to layer_types')
  return found[0] if found else 'M' * layers


def read(hf: Settings) -> LanguageModel.Config:
  """Initialization of Mamba-2 layers is the authors', which transformers does not follow."""
  model, layers = hf.read(MODEL), hf.count('num_hidden_layers', 32)
  init, norm = (
    Normal(std=hf.get('initializer_range', float, 0.02)),
    RMSNorm(eps=hf.get('rms_norm_eps', float, 1e-6)),
  )
  hf.only('position_embedding_type', None, 'nope', 'rope')
  rotary = read_rotary(hf)
  heads = hf.count('num_attention_heads', 32)
  hf.only('head_dim', None, model['width'] // heads)
  attention = Attention.Config(
    heads=heads,
    kv_heads=hf.count('num_key_value_heads', heads),
    position=rotary if hf.value('position_embedding_type') == 'rope' else None,
    bias=hf.get('attention_bias', bool, False),
    scale=hf.positive('attention_multiplier', 1.0),
    attention_dropout=hf.get('attention_dropout', float, 0.0),
    init=init,
    out_init=init,
  )
  mlp = GatedMlp.Config(
    hidden=hf.count('shared_intermediate_size', 1024),
    activation=hf.choose('hidden_act', ACTIVATIONS, 'silu'),
    init=init,
    out_init=init,
  )
  mixers: dict[str, LayerConfig] = {
    'M': mamba2.read_named(hf, model['width'], None, norm.eps),
    '*': attention,
  }
  feed_forward, scale = _feed_forward(hf, mlp), factor(hf.positive('residual_multiplier', 1.0))

  def block(letter: str) -> Block.Config:
    both = mixers[letter], feed_forward
    return Block.Config(branches=tuple(PreNorm(layer=x, norm=norm, scale=scale) for x in both))

  return LanguageModel.Config(
    **model,
    stack=grouped([block(letter) for letter in layout(hf, layers)]),
    final_norm=norm,
    embedding_scale=factor(hf.positive('embedding_multiplier', 1.0)),
    logit_scale=factor(1.0 / hf.positive('logits_scaling', 1.0)),
    embedding_init=init,
  )


def _feed_forward(hf: Settings, mlp: GatedMlp.Config) -> LayerConfig:
  """The feed-forward layer, with experts beside it if there are any."""
  experts = hf.get('num_local_experts', int, 8)
  if not experts:
    return mlp
  router = TopKSoftmax(
    k=hf.count('num_experts_per_tok', 2), pooled_balance=balance(hf), init=mlp.init
  )
  expert = mlp.replace(hidden=hf.count('intermediate_size', 11008))
  return Moe.Config(experts=experts, expert=expert, router=router, shared=mlp)


def write(config: LanguageModel.Config) -> dict[str, Any]:
  blocks = blocks_of(config.stack)
  mixer, attention = first_of(blocks, Mamba2.Config), first_of(blocks, Attention.Config)
  moe = first_of(blocks, Moe.Config)
  mlp = first_of(blocks, GatedMlp.Config) if moe is None else moe.shared
  if mixer is None or any(len(block.branches) != 2 for block in blocks):
    problem = 'no block has a Mamba-2 layer, or some have no feed-forward layer'
    raise InputError('stack', problem=problem)
  mlp = part(mlp, GatedMlp.Config, 'the feed-forward layer')
  attention = attention or Attention.Config(scale=1.0)
  logits = config.logit_scale or 1.0
  return {
    'architectures': ['GraniteMoeHybridForCausalLM'],
    **written(config, MODEL),
    **mamba2.written_named(mixer, config.width),
    **_written_attention(attention, config.width),
    **_written_experts(moe),
    'shared_intermediate_size': mlp.hidden,
    'hidden_act': activation_name(mlp.activation),
    'num_hidden_layers': depth(config.stack),
    'layer_types': [
      NAMES['*' if type(b.branches[0].layer) is Attention.Config else 'M'] for b in blocks
    ],
    'residual_multiplier': blocks[0].branches[0].scale or 1.0,
    'embedding_multiplier': config.embedding_scale or 1.0,
    'logits_scaling': inverse(logits, lambda x: 1.0 / x, 1.0 / logits),
    'rms_norm_eps': part(config.final_norm, RMSNorm, 'final_norm').eps,
    'initializer_range': std_of(config.embedding_init),
  }


def _written_attention(attention: Attention.Config, width: int) -> dict[str, Any]:
  rotary = attention.position
  positions: dict[str, Any] = {'position_embedding_type': None if rotary is None else 'rope'}
  if rotary is not None:
    positions |= write_rotary(part(rotary, Rotary, 'the position of the attention layers'))
  return {
    **positions,
    'num_attention_heads': attention.heads,
    'num_key_value_heads': attention.kv_heads or attention.heads,
    'attention_bias': attention.bias,
    'attention_multiplier': attention.resolved(width).scale,
    'attention_dropout': attention.attention_dropout,
  }


def _written_experts(moe: Moe.Config | None) -> dict[str, Any]:
  if moe is None:
    return {'num_local_experts': 0, 'num_experts_per_tok': 0}
  router = part(moe.router, TopKSoftmax, 'the router')
  return {
    'num_local_experts': moe.experts,
    'num_experts_per_tok': router.k,
    'router_aux_loss_coef': router.pooled_balance or 0.0,
    'intermediate_size': moe.expert.hidden,
  }


def rules(config: LanguageModel.Config) -> list[Rule]:
  layer, ours, ff = 'model.layers.{layer}.', f'{MIXER}.layer.', f'{FEED_FORWARD}.layer.'
  experts = f'{layer}block_sparse_moe.'
  both = [f'{ff}expert_{p}.kernel' for p in ('gate', 'up')]
  return [
    *modules(
      {
        'embedder.input': 'model.embed_tokens',
        f'{MIXER}.norm': f'{layer}input_layernorm',
        f'{FEED_FORWARD}.norm': f'{layer}post_attention_layernorm',
        'final_norm': 'model.norm',
        'head': 'lm_head',
      }
    ),
    *mamba2.layer_rules(f'{layer}mamba.'),
    *modules({p: f'{p}_proj' for p in 'qkvo'}, ours, f'{layer}self_attn.'),
    *(
      rule
      for at in (ff, f'{ff}shared.')
      for rule in (
        *fused([f'{at}gate', f'{at}up'], f'{layer}shared_mlp.input_linear'),
        *modules({f'{at}down': f'{layer}shared_mlp.output_linear'}),
      )
    ),
    Rule(tuple(both), f'{experts}input_linear.weight', transposed=True),
    Rule((f'{ff}expert_down.kernel',), f'{experts}output_linear.weight', transposed=True),
    Rule((f'{ff}router.kernel',), f'{experts}router.layer.weight', transposed=True),
  ]


family(
  CheckpointFormat(
    'granitemoehybrid',
    read,
    write,
    rules,
    prefix='model.',
    copies={'lm_head.weight': 'model.embed_tokens.weight'},
  )
)
