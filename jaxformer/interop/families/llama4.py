"""The text models of Llama 4 (`llama4_text`): layers with rotary positions and without, attention
within chunks or to all positions, feed-forward layers and mixtures of experts with a shared one.
Gates and hidden units of all experts are one tensor, side by side."""

from collections.abc import Sequence
from typing import Any

from jaxformer.config import InputError
from jaxformer.interop.decoder import (
  attentions_of,
  blocks_of,
  decoder_rules,
  read_decoder,
  write_decoder,
)
from jaxformer.interop.families.mixtral import balance, write_router
from jaxformer.interop.family import family, part
from jaxformer.interop.rotary import FULL, read_rotary, write_rotary
from jaxformer.interop.settings import Settings
from jaxformer.interop.weights import FEED_FORWARD, CheckpointFormat, Rule, arrays, modules
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.moe import Moe
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.position import LogTemperature, Rotary
from jaxformer.layers.router import SigmoidTopK
from jaxformer.models.language_model import LanguageModel

CHUNKED = 'chunked_attention'
DEFAULTS = {
  'vocab_size': 202048,
  'hidden_size': 5120,
  'intermediate_size': 8192,
  'intermediate_size_mlp': 16384,
  'num_hidden_layers': 48,
  'num_attention_heads': 40,
  'num_key_value_heads': 8,
  'head_dim': 128,
  'max_position_embeddings': 131072,
  'rms_norm_eps': 1e-5,
  'num_local_experts': 16,
  'num_experts_per_tok': 1,
  'attention_chunk_size': 8192,
}


def _listed(hf: Settings, name: str, default: Sequence[Any], accepted: set[Any]) -> list[Any]:
  """A list with an entry per layer."""
  found = hf.value(name) or list(default)
  if not isinstance(found, list) or len(found) != len(default) or not accepted.issuperset(found):
    raise hf.fail(name, f'a list of {len(default)} of {sorted(accepted)}')
  return found


def _attentions(hf: Settings) -> list[dict[str, Any]]:
  """What distinguishes the attention of each layer."""
  n, chunk = hf.count('num_hidden_layers'), hf.count('attention_chunk_size', None)
  interval = hf.count('no_rope_layer_interval', 4)
  default = [int((i + 1) % interval != 0) for i in range(n)]
  rotates = _listed(hf, 'no_rope_layers', default, {0, 1})  # 1 where there are rotary positions
  local = [CHUNKED if r and chunk is not None else FULL for r in rotates]
  types = _listed(hf, 'layer_types', local, {CHUNKED, FULL})
  if chunk is None and CHUNKED in types:
    raise hf.fail('layer_types', f'all {FULL} without an attention_chunk_size')
  rotary, norm = read_rotary(hf, 500000.0).replace(interleaved=True), None
  if hf.get('use_qk_norm', bool, True):
    norm = RMSNorm(eps=hf.get('rms_norm_eps', float), scale=False)
    # Theirs is after the rotation, ours before: the same, unless the rotation changes lengths.
    scaling = rotary.scaling
    if scaling is not None and scaling.amplitude != 1:
      raise hf.fail('use_qk_norm', 'false where rotary positions have a factor on their amplitude')
  tuned = hf.get('attn_temperature_tuning', bool, True)
  interval, rate = hf.count('floor_scale', 8192), hf.positive('attn_scale', 0.1)
  temperature = LogTemperature(interval=interval, rate=rate) if tuned else None
  return [
    {
      'position': rotary if r else temperature,
      'qk_norm': norm if r else None,
      'chunk': chunk if kind == CHUNKED else None,
    }
    for r, kind in zip(rotates, types, strict=True)
  ]


def read(hf: Settings) -> LanguageModel.Config:
  hf = hf.with_defaults(DEFAULTS, 'attention_chunk_size')
  hf.only('router_jitter_noise', 0.0, None)
  n, step = hf.count('num_hidden_layers'), hf.count('interleave_moe_layer_step', 1)
  sparse = hf.value('moe_layers')
  sparse = list(range(step - 1, n, step)) if sparse is None else sparse
  if not isinstance(sparse, list) or not set(range(n)).issuperset(sparse):
    raise hf.fail('moe_layers', f'a list of indices of the {n} layers')
  each, bias = _attentions(hf), hf.get('attention_bias', bool, False)
  dense, experts = hf.count('intermediate_size_mlp'), hf.count('num_local_experts')
  router = SigmoidTopK(k=hf.count('num_experts_per_tok'), pooled_balance=balance(hf))

  def feed_forward(i: int, mlp: GatedMlp.Config) -> LayerConfig:
    if i not in sparse:
      return mlp.replace(hidden=dense)
    chosen = router.replace(init=mlp.init)
    return Moe.Config(experts=experts, expert=mlp, router=chosen, weighted='input', shared=mlp)

  return read_decoder(
    hf, lambda i, attention: attention.replace(bias=bias, **each[i]), feed_forward=feed_forward
  )


def write(config: LanguageModel.Config) -> dict[str, Any]:
  attentions = attentions_of(config)
  seconds = [block.branches[-1].layer for block in blocks_of(config)]
  sparse = [i for i, layer in enumerate(seconds) if layer.expert_count]
  if not sparse:
    raise InputError('stack', problem='no block has a mixture of experts')
  where = f'of block {sparse[0]}'
  moe = part(seconds[sparse[0]], Moe.Config, f'the last layer {where}')
  dense = [s for s in seconds if type(s) is GatedMlp.Config]
  rotaries = [a for a in attentions if type(a.position) is Rotary]
  scaled = [a.position for a in attentions if type(a.position) is LogTemperature]
  if not rotaries:
    raise InputError('stack', problem='no layer has rotary positions')
  temperature = scaled[0] if scaled else LogTemperature()
  return {
    'architectures': ['Llama4ForCausalLM'],
    **write_decoder(
      config, attentions[0], part(moe.expert, GatedMlp.Config, f'the expert {where}')
    ),
    **write_rotary(part(rotaries[0].position, Rotary, 'a position')),
    **write_router(part(moe.router, SigmoidTopK, f'the router {where}')),
    'num_local_experts': moe.experts,
    'router_jitter_noise': 0.0,
    'moe_layers': sparse,
    'intermediate_size_mlp': dense[0].hidden if dense else moe.expert.hidden,
    'attention_bias': attentions[0].bias,
    'no_rope_layers': [int(type(a.position) is Rotary) for a in attentions],
    'layer_types': [FULL if a.chunk is None else CHUNKED for a in attentions],
    'attention_chunk_size': next((a.chunk for a in attentions if a.chunk is not None), None),
    'use_qk_norm': rotaries[0].qk_norm is not None,
    'attn_temperature_tuning': bool(scaled),
    'floor_scale': temperature.interval,
    'attn_scale': temperature.rate,
  }


def rules(config: LanguageModel.Config) -> list[Rule]:
  ours, theirs = f'{FEED_FORWARD}.layer.', 'model.layers.{layer}.feed_forward.'
  parts = {p: f'{p}_proj' for p in ('gate', 'up', 'down')}
  gate_up = tuple(f'{ours}expert_{p}.kernel' for p in ('gate', 'up'))
  return [
    *decoder_rules(feed_forward='feed_forward'),
    *modules({'router': 'router'}, ours, theirs),
    *modules(parts, f'{ours}shared.', f'{theirs}shared_expert.'),
    Rule(gate_up, f'{theirs}experts.gate_up_proj'),
    *arrays({'expert_down.kernel': 'experts.down_proj'}, ours, theirs),
  ]


family(
  CheckpointFormat(
    'llama4_text',
    read,
    write,
    rules,
    prefix='model.',
    copies={'lm_head.weight': 'model.embed_tokens.weight'},
  )
)
