"""Mixtral: Llama with a mixture of experts as feed-forward layer.

On disk every expert has separate tensors, w1 (gate), w3 (up) and w2 (down), as in the published
files; transformers 5 fuses them in memory only. Its balancing loss is computed over all layers, and
only on request; its weight becomes the weight of our loss per layer."""

from __future__ import annotations

from typing import Any

from jaxformer.interop.families import llama
from jaxformer.interop.family import CheckpointFormat, blocks, branches, family, part
from jaxformer.interop.settings import Settings, activation_name
from jaxformer.interop.weights import Permute, Rule, Unstack, linear
from jaxformer.layers.attention import Attention
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.moe import Moe
from jaxformer.layers.position import Rotary
from jaxformer.layers.router import RouterConfig, TopKSoftmax
from jaxformer.models.block import Block
from jaxformer.models.language_model import LanguageModel

_DEFAULTS = {
  'intermediate_size': 14336,
  'num_key_value_heads': 8,
  'max_position_embeddings': 131072,
  'rms_norm_eps': 1e-5,
  'num_local_experts': 8,
  'num_experts_per_tok': 2,
  'rope_theta': 1e6,
  'router_aux_loss_coef': 0.001,
}
# ours [experts, in, out], theirs one Linear per expert
EXPERTS = (Permute((0, 2, 1)), Unstack())


def balance(hf: Settings, default: float) -> float | None:
  """The weight of the balancing loss; None if it is 0."""
  return hf.get('router_aux_loss_coef', float, default) or None


def read(hf: Settings) -> LanguageModel.Config:
  rope = hf.fields.get('rope_parameters')
  given = {k: v for k, v in hf.fields.items() if v is not None or k not in _DEFAULTS}
  theta = (
    rope['rope_theta']
    if isinstance(rope, dict) and 'rope_theta' in rope
    else _DEFAULTS['rope_theta']
  )
  hf = Settings(_DEFAULTS | {'rope_theta': theta} | given, hf.where)
  hf.only('router_jitter_noise', 0.0, 0, None)
  dense = llama.build(hf, window=hf.count('sliding_window', None))
  (group,) = dense.stack
  (block,) = group.pattern
  attention, feed_forward = block.branches
  router = TopKSoftmax(
    k=hf.count('num_experts_per_tok'), balance=balance(hf, 0.001), init=dense.embedding_init
  )
  expert = part(feed_forward.layer, GatedMlp.Config, 'the feed-forward layer')
  moe = Moe.Config(experts=hf.count('num_local_experts'), expert=expert, router=router)
  sparse = Block.Config(branches=(attention, feed_forward.replace(layer=moe)))
  return dense.replace(stack=(group.replace(pattern=(sparse,)),))


def write_router(router: RouterConfig) -> dict[str, Any]:
  """The fields of a router that Mixtral and Jamba share."""
  return {
    'num_experts_per_tok': round(router.per_token(0)),
    'router_aux_loss_coef': router.balance or 0.0,
    'output_router_logits': False,
  }


def write(config: LanguageModel.Config) -> dict[str, Any]:
  first, second = branches(blocks(config)[0], 2)
  moe = part(second.layer, Moe.Config, 'layer 1 of block 0')
  part(moe.router, TopKSoftmax, 'the router of layer 1 of block 0')
  attention = part(first.layer, Attention.Config, 'layer 0 of block 0')
  part(attention.position, Rotary, 'the position of layer 0 of block 0')
  expert = part(moe.expert, GatedMlp.Config, 'the expert of layer 1 of block 0')
  group = config.stack[0]
  as_dense = Block.Config(branches=(first, second.replace(layer=expert)))
  fields = llama.write(
    config.replace(stack=(group.replace(pattern=(as_dense,), repeats=len(blocks(config))),))
  )
  del fields['attention_bias'], fields['mlp_bias']
  return (
    fields
    | write_router(moe.router)
    | {
      'hidden_act': activation_name(expert.activation),
      'num_local_experts': moe.experts,
      'router_jitter_noise': 0.0,
      'sliding_window': attention.window,
    }
  )


def rules(config: LanguageModel.Config) -> list[Rule]:
  ours, theirs = 'stack.{layer}.branches.1.layer', 'model.layers.{layer}.block_sparse_moe'
  dense = [r for r in llama.rules(config) if '.mlp.' not in r.theirs]
  return [
    *dense,
    linear(f'{ours}.router.kernel', f'{theirs}.gate.weight'),
    *(
      Rule((f'{ours}.expert_{o}.kernel',), f'{theirs}.experts.{{item}}.{t}.weight', EXPERTS)
      for o, t in (('gate', 'w1'), ('up', 'w3'), ('down', 'w2'))
    ),
  ]


family(CheckpointFormat('mixtral', 'MixtralForCausalLM', read, write, rules, llama.names))
