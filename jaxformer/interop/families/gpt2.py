"""GPT-2. Its linear layers are `Conv1D`s, with weights [in, out] as ours; query, key and value are
fused."""

from typing import Any

from jaxformer.interop.family import branches_of, depth, family, part, std_of
from jaxformer.interop.settings import ACTIVATIONS, Settings, Table, activation_name, written
from jaxformer.interop.weights import FEED_FORWARD, MIXER, CheckpointFormat, Rule, fused, modules
from jaxformer.layers.attention import Attention
from jaxformer.layers.init import Normal
from jaxformer.layers.mlp import Mlp
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.position import LearnedPositions
from jaxformer.models.block import Block, PreNorm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import Group

MODEL: Table = {
  'vocab_size': ('vocab_size', 50257),
  'width': ('n_embd', 768),
  'context_length': ('n_positions', 1024),
  'tied': ('tie_word_embeddings', True),
  'dropout': ('embd_pdrop', 0.1),
}


def read(hf: Settings) -> LanguageModel.Config:
  """`reorder_and_upcast_attn` selects fp32 logits, which we always use."""
  hf.only('add_cross_attention', False)
  hf.only('scale_attn_by_inverse_layer_idx', False)
  model, std = hf.read(MODEL), hf.get('initializer_range', float, 0.02)
  norm = LayerNorm(eps=hf.get('layer_norm_epsilon', float, 1e-5))
  attention = Attention.Config(
    heads=hf.count('n_head', 12),
    bias=True,
    scale=None if hf.get('scale_attn_weights', bool, True) else 1.0,
    attention_dropout=hf.get('attn_pdrop', float, 0.1),
    init=Normal(std=std),
    out_init=Normal(residual=True, std=std),
  )
  mlp = Mlp.Config(
    hidden=hf.count('n_inner', 4 * model['width']),
    activation=hf.choose('activation_function', ACTIVATIONS, 'gelu_new'),
    bias=True,
    init=Normal(std=std),
    out_init=Normal(residual=True, std=std),
  )
  dropout = hf.get('resid_pdrop', float, 0.1)
  block = Block.Config(
    branches=tuple(PreNorm(layer=layer, norm=norm, dropout=dropout) for layer in (attention, mlp))
  )
  return LanguageModel.Config(
    **model,
    positions=LearnedPositions(),
    stack=(Group(pattern=(block,), repeats=hf.count('n_layer', 12)),),
    final_norm=norm,
    embedding_init=Normal(std=std),
  )


def write(config: LanguageModel.Config) -> dict[str, Any]:
  first, second = branches_of(config.stack, Attention.Config, Mlp.Config)
  attention, mlp = first.layer, second.layer
  return written(config, MODEL) | {
    'architectures': ['GPT2LMHeadModel'],
    'n_ctx': config.context_length,
    'n_layer': depth(config.stack),
    'n_head': attention.heads,
    'n_inner': None if mlp.hidden == 4 * config.width else mlp.hidden,
    'activation_function': activation_name(mlp.activation),
    'layer_norm_epsilon': part(config.final_norm, LayerNorm, 'final_norm').eps,
    'scale_attn_weights': attention.scale != 1.0,
    'initializer_range': std_of(config.embedding_init),
    'resid_pdrop': first.dropout,
    'attn_pdrop': attention.attention_dropout,
  }


def rules(config: LanguageModel.Config) -> list[Rule]:
  layer = 'transformer.h.{layer}'
  conv1d = {
    f'{layer}.attn.c_attn': [f'{MIXER}.layer.{p}' for p in 'qkv'],
    f'{layer}.attn.c_proj': [f'{MIXER}.layer.o'],
    f'{layer}.mlp.c_fc': [f'{FEED_FORWARD}.layer.up'],
    f'{layer}.mlp.c_proj': [f'{FEED_FORWARD}.layer.down'],
  }
  others = {
    'embedder.input': 'transformer.wte',
    'embedder.positions': 'transformer.wpe',
    f'{MIXER}.norm': f'{layer}.ln_1',
    f'{FEED_FORWARD}.norm': f'{layer}.ln_2',
    'final_norm': 'transformer.ln_f',
    'head': 'lm_head',
  }
  return [
    *(rule for theirs, ours in conv1d.items() for rule in fused(ours, theirs, transposed=False)),
    *modules(others),
  ]


family(
  CheckpointFormat(
    'gpt2',
    read,
    write,
    rules,
    prefix='transformer.',
    # buffers of the causal mask
    ignored=(r'transformer\.h\.\d+\.attn\.(bias|masked_bias)',),
    copies={'lm_head.weight': 'transformer.wte.weight'},
    aliases={
      'hidden_size': 'n_embd',
      'max_position_embeddings': 'n_positions',
      'num_attention_heads': 'n_head',
      'num_hidden_layers': 'n_layer',
    },
  )
)
