"""gpt-oss: attention with sinks and biases, in windows in some layers, and in every block a mixture
of experts, whose gates and hidden units alternate in one tensor. Published files in MXFP4 must be
converted to floating-point numbers first."""

from typing import Any

from jaxformer.interop.decoder import (
  attentions_of,
  blocks_of,
  decoder_rules,
  read_decoder,
  read_layer_types,
  read_windows,
  write_decoder,
  write_windows,
)
from jaxformer.interop.families.mixtral import balance, write_router
from jaxformer.interop.family import family, part
from jaxformer.interop.rotary import FULL, SLIDING, read_rotary, write_rotary
from jaxformer.interop.settings import Settings
from jaxformer.interop.weights import FEED_FORWARD, MIXER, CheckpointFormat, Rule, arrays, modules
from jaxformer.layers.attention import Attention
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.moe import Moe
from jaxformer.layers.position import Rotary
from jaxformer.layers.router import TopKSoftmax
from jaxformer.models.language_model import LanguageModel

DEFAULTS = {
  'vocab_size': 201088,
  'hidden_size': 2880,
  'intermediate_size': 2880,
  'num_hidden_layers': 36,
  'num_attention_heads': 64,
  'num_key_value_heads': 8,
  'head_dim': 64,
  'max_position_embeddings': 131072,
  'rms_norm_eps': 1e-5,
  'sliding_window': 128,
  'num_local_experts': 128,
  'num_experts_per_tok': 4,
}
YARN = {
  'rope_type': 'yarn',
  'factor': 32.0,
  'beta_fast': 32.0,
  'beta_slow': 1.0,
  'truncate': False,
  'original_max_position_embeddings': 4096,
}


def read(hf: Settings) -> LanguageModel.Config:
  rope = {} if hf.value('rope_scaling') else {'rope_parameters': YARN}
  hf = hf.with_defaults(DEFAULTS | rope, 'sliding_window')
  hf.only('hidden_act', 'silu', 'swish')  # which theirs ignores: the gate's is x sigmoid(1.702 x)
  hf.only('swiglu_alpha', 1.702)
  types = read_layer_types(hf, lambda i: FULL if i % 2 else SLIDING)
  windows = read_windows(hf, types, hf.count('sliding_window', None))
  rotary, bias = read_rotary(hf, 150000.0), hf.get('attention_bias', bool, True)
  router = TopKSoftmax(
    k=hf.count('num_experts_per_tok'), logit_bias=True, pooled_balance=balance(hf)
  )
  experts, limit = hf.count('num_local_experts'), hf.positive('swiglu_limit', 7.0)

  def attention_of(i: int, attention: Attention.Config) -> Attention.Config:
    return attention.replace(position=rotary, window=windows[i], bias=bias, sinks=True)

  def feed_forward(_: int, mlp: GatedMlp.Config) -> Moe.Config:
    expert = mlp.replace(activation='gelu_sigmoid', bias=True, limit=limit, up_offset=1.0)
    return Moe.Config(experts=experts, expert=expert, router=router.replace(init=mlp.init))

  return read_decoder(hf, attention_of, feed_forward=feed_forward)


def write(config: LanguageModel.Config) -> dict[str, Any]:
  attention = attentions_of(config)[0]
  moe = part(blocks_of(config)[0].branches[-1].layer, Moe.Config, 'the last layer of block 0')
  expert = part(moe.expert, GatedMlp.Config, 'the expert of block 0')
  part(moe.router, TopKSoftmax, 'the router of block 0')
  return {
    'architectures': ['GptOssForCausalLM'],
    **write_decoder(config, attention, expert),
    **write_rotary(part(attention.position, Rotary, 'the position of block 0')),
    **write_windows(config),
    **write_router(moe.router),
    'hidden_act': 'silu',
    'attention_bias': attention.bias,
    'num_local_experts': moe.experts,
    'swiglu_alpha': 1.702,
    'swiglu_limit': expert.limit,
  }


def rules(config: LanguageModel.Config) -> list[Rule]:
  ours, theirs = f'{FEED_FORWARD}.layer.', 'model.layers.{layer}.mlp.'
  moe = part(blocks_of(config)[0].branches[-1].layer, Moe.Config, 'the last layer of block 0')
  gate_up = [
    Rule(
      tuple(f'{ours}expert_{p}.{name}' for p in ('gate', 'up')),
      f'{theirs}experts.gate_up_proj{end}',
      groups=moe.expert.hidden,
    )
    for name, end in (('kernel', ''), ('bias', '_bias'))
  ]
  down = {'expert_down.kernel': 'down_proj', 'expert_down.bias': 'down_proj_bias'}
  return [
    *decoder_rules(),
    *arrays({f'{MIXER}.layer.sink': 'model.layers.{layer}.self_attn.sinks'}),
    *modules({'router': 'router'}, ours, theirs),
    *arrays({'router.logit_bias': 'router.bias'}, ours, theirs),
    *gate_up,
    *arrays(down, ours, f'{theirs}experts.'),
  ]


family(
  CheckpointFormat(
    'gpt_oss',
    read,
    write,
    rules,
    prefix='model.',
    copies={'lm_head.weight': 'model.embed_tokens.weight'},
    aliases={'num_experts': 'num_local_experts'},
  )
)
