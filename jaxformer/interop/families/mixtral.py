"""Mixtral: Llama with a mixture of experts as feed-forward layer.

On disk every expert has separate tensors, w1 (gate), w3 (up) and w2 (down), as in the published
files; transformers 5 fuses them in memory only. Its balancing loss is one over the tokens of
all layers (`load_balancing_loss_func`), computed only on request."""

import dataclasses
from typing import Any

from jaxformer.interop.families import llama
from jaxformer.interop.family import branches_of, family, part
from jaxformer.interop.settings import Settings
from jaxformer.interop.weights import FEED_FORWARD, Rule, modules
from jaxformer.layers.attention import Attention
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.moe import Moe
from jaxformer.layers.router import RouterConfig, TopKSoftmax
from jaxformer.models.language_model import LanguageModel

_DEFAULTS = {
  'intermediate_size': 14336,
  'num_key_value_heads': 8,
  'max_position_embeddings': 131072,
  'rms_norm_eps': 1e-5,
  'num_local_experts': 8,
  'num_experts_per_tok': 2,
  'rope_theta': 1e6,
}


def balance(hf: Settings) -> float | None:
  """The weight of the balancing loss; None if it is 0."""
  return hf.get('router_aux_loss_coef', float, 0.001) or None


def read(hf: Settings) -> LanguageModel.Config:
  hf = hf.with_defaults(_DEFAULTS)
  hf.only('router_jitter_noise', 0.0, 0, None)
  router = TopKSoftmax(k=hf.count('num_experts_per_tok'), pooled_balance=balance(hf))
  experts = hf.count('num_local_experts')
  return llama.build(
    hf,
    window=hf.count('sliding_window', None),
    feed_forward=lambda mlp: Moe.Config(
      experts=experts, expert=mlp, router=router.replace(init=mlp.init)
    ),
  )


def write_router(router: RouterConfig) -> dict[str, Any]:
  """The fields of a router that Mixtral and Jamba share."""
  return {
    'num_experts_per_tok': round(router.per_token(0)),
    'router_aux_loss_coef': router.pooled_balance or 0.0,
    'output_router_logits': False,
  }


def write(config: LanguageModel.Config) -> dict[str, Any]:
  first, second = branches_of(config.stack, Attention.Config, Moe.Config)
  attention, moe = first.layer, second.layer
  part(moe.router, TopKSoftmax, 'the router of layer 1 of block 0')
  expert = part(moe.expert, GatedMlp.Config, 'the expert of layer 1 of block 0')
  return {
    'architectures': ['MixtralForCausalLM'],
    **llama.write_shared(config, attention, expert),
    **write_router(moe.router),
    'num_local_experts': moe.experts,
    'router_jitter_noise': 0.0,
    'sliding_window': attention.window,
  }


def rules(config: LanguageModel.Config) -> list[Rule]:
  ours, theirs = f'{FEED_FORWARD}.layer.', 'model.layers.{layer}.block_sparse_moe.'
  experts = {'expert_gate': 'w1', 'expert_up': 'w3', 'expert_down': 'w2'}
  return [
    *llama.rules(config),
    *modules({'router': 'gate'}, ours, theirs),
    *modules(experts, ours, f'{theirs}experts.{{item}}.'),
  ]


family(
  dataclasses.replace(
    llama.LLAMA,
    name='mixtral',
    read=read,
    write=write,
    rules=rules,
    aliases={'num_experts': 'num_local_experts'},
  )
)
