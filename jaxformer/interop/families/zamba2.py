"""Zamba2. The weights of a shared block are stored once, in the first layer that uses it; there are
lists of the adapters of all its uses, by the number of the use among those of all shared blocks."""

import math
from typing import Any

from jaxformer.config import InputError
from jaxformer.interop.families import mamba2
from jaxformer.interop.families.mamba import STEPS
from jaxformer.interop.family import blocks_of, depth, family, first_of, part, std_of
from jaxformer.interop.rotary import read_rotary, write_rotary
from jaxformer.interop.settings import ACTIVATIONS, Settings, Table, activation_name, written
from jaxformer.interop.weights import CheckpointFormat, Rule, fused, modules
from jaxformer.layers.attention import Attention
from jaxformer.layers.init import Normal
from jaxformer.layers.mamba import StepBias
from jaxformer.layers.mamba2 import Mamba2
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.position import Rotary
from jaxformer.layers.shared import Shared
from jaxformer.layers.stack_input import WithStackInput
from jaxformer.models.block import Block, BlockLayer
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.zoo.zamba2 import ON_ATTENTION, PUBLISHED, attention_of, zamba2

MODEL: Table = {
  'vocab_size': ('vocab_size', 32000),
  'width': ('hidden_size', 2560),
  'context_length': ('max_position_embeddings', 4096),
}
MIXER: Table = {
  'd_state': ('mamba_d_state', 64),
  'groups': ('mamba_ngroups', 1),
  'd_conv': ('mamba_d_conv', 4),
}
KINDS = {'linear_attention': False, 'mamba': False, 'hybrid': True}  # whether it has a shared block
ADDED = 'stack.{layer}.branches.0.layer.block.branches.0.layer.block.branches.'
AFTER = 'stack.{layer}.branches.0.layer.block.branches.1.'


def _hybrids(hf: Settings) -> tuple[int, list[int]]:
  """The number of layers, and those with a shared block."""
  layers, kinds = hf.count('num_hidden_layers', 54), None
  for name in ('layers_block_type', 'layer_types'):
    given = hf.value(name)
    if given is None:
      continue
    wrong = not isinstance(given, list) or len(given) != layers or not set(given) <= set(KINDS)
    if wrong or kinds not in (None, [KINDS[kind] for kind in given]):
      raise hf.fail(name, f'a list of {layers} of {", ".join(KINDS)}')
    kinds = [KINDS[kind] for kind in given]
  if kinds is None and layers != 54:
    raise hf.fail('layers_block_type', 'given where there are not 54 layers')
  found = list(PUBLISHED) if kinds is None else [i for i, shared in enumerate(kinds) if shared]
  hf.only('hybrid_layer_ids', None, found)
  return layers, found


def read(hf: Settings) -> LanguageModel.Config:
  """Initialization of Mamba-2 layers is the authors', which transformers does not follow. Like
  transformers, clips step sizes at `time_step_min`."""
  # Without it transformers does not share the blocks either.
  hf.only('tie_word_embeddings', True)
  hf.only('use_conv_bias', True)
  hf.only('add_bias_linear', False)
  hf.only('use_long_context', False)
  hf.only('use_shared_mlp_adapter', True, None)
  hf.only('use_shared_block_lora', True, None)
  model, (layers, hybrids) = hf.read(MODEL), _hybrids(hf)
  D, heads = model['width'], hf.count('num_attention_heads', 32)
  for name in ('attention_hidden_size', 'attention_head_dim', 'head_dim'):
    hf.only(name, None, 2 * D if name == 'attention_hidden_size' else 2 * D // heads)
  kv_heads = hf.count('num_key_value_heads', heads)
  adapted = hf.get('use_shared_attention_adapter', bool, False)
  if adapted and kv_heads != heads:
    raise hf.fail('num_key_value_heads', 'num_attention_heads where attention has adapters')
  init = Normal(std=hf.get('initializer_range', float, 0.02))
  inner, mamba_heads = hf.count('mamba_expand', 2) * D, hf.count('n_mamba_heads', 8)
  if inner % mamba_heads:
    raise hf.fail('n_mamba_heads', f'a divisor of {inner}')
  hf.only('mamba_headdim', None, inner // mamba_heads)
  steps, rotary = StepBias(**hf.read(STEPS)), read_rotary(hf)
  return zamba2(
    layers=layers,
    hybrids=hybrids,
    attention=attention_of(
      D,
      heads,
      kv_heads=None if kv_heads == heads else kv_heads,
      position=rotary if hf.get('use_mem_rope', bool, False) else None,
      attention_dropout=hf.get('attention_dropout', float, 0.0),
      init=init,
      out_init=init,
    ),
    mlp=GatedMlp.Config(
      hidden=hf.count('intermediate_size', 4 * D),
      activation=hf.choose('hidden_act', ACTIVATIONS, 'gelu'),
      init=init,
      out_init=init,
    ),
    mamba=Mamba2.Config(
      **hf.read(MIXER),
      heads=mamba_heads,
      head_dim=inner // mamba_heads,
      dt_init=steps,
      dt_min=steps.low,
    ),
    shared=hf.count('num_mem_blocks', 1),
    rank=hf.count('adapter_rank', 128),
    adapted_attention=adapted,
    norm=RMSNorm(eps=hf.get('rms_norm_eps', float, 1e-5)),
    init=init,
    **model,
  )


# ---- to their fields ---------------------------------------------------------------------------


def _inner(layer: Any, where: str) -> Block.Config:
  """The block that a layer stands for."""
  return part(layer, BlockLayer.Config, where).block


def uses(config: LanguageModel.Config) -> dict[int, tuple[Shared.Config, Mamba2.Config]]:
  """The layers with a shared block: index -> the block, and the Mamba-2 layer after it."""
  found = {}
  for i, block in enumerate(blocks_of(config.stack)):
    if type(block.branches[0].layer) is Mamba2.Config:
      continue
    where = f'the layer of block {i}'
    added, mamba = _inner(block.branches[0].layer, where).branches[:2]
    shared = part(_inner(added.layer, where).branches[0].layer, Shared.Config, where)
    found[i] = shared, part(mamba.layer, Mamba2.Config, where)
  return found


def write(config: LanguageModel.Config) -> dict[str, Any]:
  shared = uses(config)
  if not shared:
    raise InputError('stack', problem='no block has a shared transformer block')
  block, mamba = next(iter(shared.values()))
  mamba = (first_of(blocks_of(config.stack), Mamba2.Config) or mamba).resolved(config.width)
  inner = part(block.layer, WithStackInput.Config, 'the shared layer').layer
  first, second = _inner(inner, 'the shared block').branches[:2]
  attention = part(first.layer, Attention.Config, 'the attention')
  mlp = part(second.layer, GatedMlp.Config, 'the feed-forward layer')
  heads = mamba.head_count(config.width)
  rotary = attention.position
  return {
    'architectures': ['Zamba2ForCausalLM'],
    **written(config, MODEL),
    'tie_word_embeddings': config.tied,
    **written(mamba, MIXER),
    **(written(mamba.dt_init, STEPS) if type(mamba.dt_init) is StepBias else {}),
    'time_step_min': mamba.dt_min,
    'num_hidden_layers': depth(config.stack),
    'layers_block_type': [
      'hybrid' if i in shared else 'linear_attention' for i in range(depth(config.stack))
    ],
    'mamba_expand': math.ceil(heads * mamba.head_dim / config.width),
    'n_mamba_heads': heads,
    'num_attention_heads': attention.heads,
    'num_key_value_heads': attention.kv_heads or attention.heads,
    'attention_dropout': attention.attention_dropout,
    'intermediate_size': mlp.hidden,
    'hidden_act': activation_name(mlp.activation),
    'num_mem_blocks': len({block.name for block, _ in shared.values()}),
    'adapter_rank': block.rank,
    'use_shared_attention_adapter': ON_ATTENTION[0] in block.adapted,
    'use_mem_rope': rotary is not None,
    **write_rotary(Rotary() if rotary is None else part(rotary, Rotary, 'the positions')),
    'rms_norm_eps': part(config.final_norm, RMSNorm, 'final_norm').eps,
    'initializer_range': std_of(config.embedding_init),
  }


# ---- weights -----------------------------------------------------------------------------------


def rules(config: LanguageModel.Config) -> list[Rule]:
  hybrid, first = 'model.layers.{layer}.mamba_decoder.', dict[str, int]()
  found = [
    *modules(
      {
        'embedder.input': 'model.embed_tokens',
        'final_norm': 'model.final_layernorm',
        'head': 'lm_head',
        'stack.{layer}.branches.0.norm': 'model.layers.{layer}.input_layernorm',
        f'{AFTER}norm': f'{hybrid}input_layernorm',
        f'{ADDED}1.layer.out': 'model.layers.{layer}.linear',
      }
    ),
    *mamba2.layer_rules('model.layers.{layer}.mamba.'),
    *mamba2.layer_rules(f'{hybrid}mamba.', f'{AFTER}layer.'),
  ]
  for use, (layer, (block, _)) in enumerate(uses(config).items()):
    source = first.setdefault(block.name, layer)
    theirs = f'model.layers.{source}.shared_transformer.'
    if source == layer:
      found += _shared(f'stack.common.{block.name}.layer.block.branches.', theirs)
    adapters = f'{ADDED}0.layer.adapters.'.replace('{layer}', str(layer))
    for path in block.adapted:
      ours, name = adapters + path.replace('.', '/'), path.rsplit('.', 1)[-1]
      kind = 'feed_forward.gate_up_proj' if '+' in name else f'self_attn.linear_{name}'
      ups = [f'{ours}.{i}' for i in range(1, 2 + name.count('+'))]
      found += fused([f'{ours}.0'], f'{theirs}{kind}_adapter_list.{use}.0')
      found += fused(ups, f'{theirs}{kind}_adapter_list.{use}.1')
  return found


def _shared(ours: str, theirs: str) -> list[Rule]:
  """Rules for the weights of a shared block."""
  return [
    *modules({'0.norm': 'input_layernorm', '1.norm': 'pre_ff_layernorm'}, ours, theirs),
    *modules({f'0.layer.{p}': f'self_attn.{p}_proj' for p in 'qkvo'}, ours, theirs),
    *fused([f'{ours}1.layer.gate', f'{ours}1.layer.up'], f'{theirs}feed_forward.gate_up_proj'),
    *modules({'1.layer.down': 'feed_forward.down_proj'}, ours, theirs),
  ]


family(CheckpointFormat('zamba2', read, write, rules, prefix='model.'))
