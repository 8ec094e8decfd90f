"""GPT-2. Its linear layers are `Conv1D`s, with weights [in, out] as ours; query, key and value are
fused."""

from __future__ import annotations

from typing import Any

from jaxformer.interop.family import CheckpointFormat, blocks, branches, family, layer_of, std_of
from jaxformer.interop.settings import ACTIVATIONS, Settings, activation_name
from jaxformer.interop.weights import Concat, Names, Rule, linear, norm, same
from jaxformer.layers.attention import Attention
from jaxformer.layers.init import Normal, ResidualNormal
from jaxformer.layers.mlp import Mlp
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.position import LearnedPositions
from jaxformer.models.block import Block, PreNorm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import Group


def read(hf: Settings) -> LanguageModel.Config:
  """Dropout of attention weights (`attn_pdrop`) is ignored: our attention has none, and it does not
  affect inference. `reorder_and_upcast_attn` selects fp32 logits, which we always use."""
  hf.only('add_cross_attention', False)
  hf.only('scale_attn_by_inverse_layer_idx', False)
  width, std = hf.count('n_embd', 768), hf.get('initializer_range', float, 0.02)
  norm = LayerNorm(eps=hf.get('layer_norm_epsilon', float, 1e-5))
  attention = Attention.Config(
    heads=hf.count('n_head', 12),
    bias=True,
    scale=None if hf.get('scale_attn_weights', bool, True) else 1.0,
    init=Normal(std=std),
    out_init=ResidualNormal(std=std),
  )
  mlp = Mlp.Config(
    hidden=hf.count('n_inner', 4 * width),
    activation=hf.choose('activation_function', ACTIVATIONS, 'gelu_new'),
    bias=True,
    init=Normal(std=std),
    out_init=ResidualNormal(std=std),
  )
  dropout = hf.get('resid_pdrop', float, 0.1)
  block = Block.Config(
    branches=tuple(PreNorm(layer=layer, norm=norm, dropout=dropout) for layer in (attention, mlp))
  )
  return LanguageModel.Config(
    vocab_size=hf.count('vocab_size', 50257),
    width=width,
    context_length=hf.count('n_positions', 1024),
    positions=LearnedPositions.Config(),
    stack=(Group(pattern=(block,), repeats=hf.count('n_layer', 12)),),
    final_norm=norm,
    tied=hf.get('tie_word_embeddings', bool, True),
    dropout=hf.get('embd_pdrop', float, 0.1),
    embedding_init=Normal(std=std),
  )


def write(config: LanguageModel.Config) -> dict[str, Any]:
  stack = blocks(config)
  first, _ = branches(stack[0], 2)
  attention, mlp = (layer_of(config, 0, Attention.Config), layer_of(config, 1, Mlp.Config))
  return {
    'vocab_size': config.vocab_size,
    'n_positions': config.context_length,
    'n_ctx': config.context_length,
    'n_embd': config.width,
    'n_layer': len(stack),
    'n_head': attention.heads,
    'n_inner': None if mlp.hidden == 4 * config.width else mlp.hidden,
    'activation_function': activation_name(mlp.activation),
    'layer_norm_epsilon': first.norm.eps,
    'scale_attn_weights': attention.scale != 1.0,
    'initializer_range': std_of(config.embedding_init),
    'tie_word_embeddings': config.tied,
    'resid_pdrop': first.dropout,
    'embd_pdrop': config.dropout,
    'attn_pdrop': 0.0,
  }


def conv1d(ours: str, theirs: str) -> list[Rule]:
  return [same(f'{ours}.kernel', f'{theirs}.weight'), same(f'{ours}.bias', f'{theirs}.bias')]


def rules(config: LanguageModel.Config) -> list[Rule]:
  layer, attention, mlp = (
    'transformer.h.{layer}',
    'stack.{layer}.branches.0',
    'stack.{layer}.branches.1',
  )
  return [
    same('embedder.input.table', 'transformer.wte.weight'),
    same('embedder.positions.table', 'transformer.wpe.weight'),
    *norm(f'{attention}.norm', f'{layer}.ln_1'),
    Rule(
      tuple(f'{attention}.layer.{p}.kernel' for p in 'qkv'),
      f'{layer}.attn.c_attn.weight',
      (Concat(1),),
    ),
    Rule(
      tuple(f'{attention}.layer.{p}.bias' for p in 'qkv'), f'{layer}.attn.c_attn.bias', (Concat(0),)
    ),
    *conv1d(f'{attention}.layer.o', f'{layer}.attn.c_proj'),
    *norm(f'{mlp}.norm', f'{layer}.ln_2'),
    *conv1d(f'{mlp}.layer.up', f'{layer}.mlp.c_fc'),
    *conv1d(f'{mlp}.layer.down', f'{layer}.mlp.c_proj'),
    *norm('final_norm', 'transformer.ln_f'),
    linear('head.kernel', 'lm_head.weight'),
  ]


def names(config: LanguageModel.Config) -> Names:
  return Names(
    # buffers of the causal mask
    prefix='transformer.',
    ignored=(r'transformer\.h\.\d+\.attn\.(bias|masked_bias)',),
    copies={'lm_head.weight': 'transformer.wte.weight'} if config.tied else {},
  )


family(CheckpointFormat('gpt2', 'GPT2LMHeadModel', read, write, rules, names))
