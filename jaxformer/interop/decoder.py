"""What the checkpoint formats of dense decoders share: attention and a gated feed-forward layer in
each block, with layers that differ in the reach of their attention and in their positions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxformer.interop.family import depth, part, std_of
from jaxformer.interop.rotary import FULL, SLIDING
from jaxformer.interop.settings import ACTIVATIONS, Settings, Table, activation_name, written
from jaxformer.interop.weights import FEED_FORWARD, MIXER, Rule, modules
from jaxformer.layers.attention import Attention
from jaxformer.layers.init import Normal
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.mlp import GatedMlp
from jaxformer.layers.norm import RMSNorm
from jaxformer.models.block import Block, BranchConfig, PreNorm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import grouped

MODEL: Table = {
  'vocab_size': ('vocab_size', int),
  'width': ('hidden_size', int),
  'context_length': ('max_position_embeddings', int),
  'tied': ('tie_word_embeddings', False),
}

# ---- from their fields -------------------------------------------------------------------------


def read_decoder(
  hf: Settings,
  attention_of: Callable[[int, Attention.Config], LayerConfig],
  *,
  branch: Callable[..., BranchConfig] = PreNorm,
  branch_of: Callable[[int], Callable[..., BranchConfig]] | None = None,
  unit_offset: bool = False,
  activation: str = 'hidden_act',
  mlp_bias: bool = False,
  feed_forward: Callable[[int, GatedMlp.Config], LayerConfig] = lambda _, mlp: mlp,
  **fields: Any,
) -> LanguageModel.Config:
  """The architecture, from the shared fields; `hf` has their defaults.

  Args:
    attention_of: from the index of a layer and the attention of the shared fields to the first
      layer of its block.
    branch: of both layers of a block.
    branch_of: the same, from the index of a layer, where blocks differ.
    unit_offset: of the norms.
    activation: name of the field.
    feed_forward: from the index of a layer and the feed-forward layer of the shared fields to the
      second layer of its block.
    fields: others of the config.
  """
  model = hf.read(MODEL)
  init, norm = Normal(std=hf.get('initializer_range', float, 0.02)), read_norm(hf, unit_offset)
  heads, head_dim = hf.count('num_attention_heads'), hf.count('head_dim', None)
  attention = Attention.Config(
    heads=heads,
    kv_heads=hf.count('num_key_value_heads', heads),
    head_dim=None if head_dim and head_dim * heads == model['width'] else head_dim,
    attention_dropout=hf.get('attention_dropout', float, 0.0),
    init=init,
    out_init=init,
  )
  mlp = GatedMlp.Config(
    hidden=hf.count('intermediate_size'),
    activation=hf.choose(activation, ACTIVATIONS, 'silu'),
    bias=mlp_bias,
    init=init,
    out_init=init,
  )
  blocks = [
    Block.Config(
      branches=tuple(
        (branch_of(i) if branch_of else branch)(layer=layer, norm=norm)
        for layer in (attention_of(i, attention), feed_forward(i, mlp))
      )
    )
    for i in range(hf.count('num_hidden_layers'))
  ]
  return LanguageModel.Config(
    **model, stack=grouped(blocks), final_norm=norm, embedding_init=init, **fields
  )


def read_norm(hf: Settings, unit_offset: bool = False) -> RMSNorm:
  """The norm of all layers."""
  return RMSNorm(eps=hf.get('rms_norm_eps', float, 1e-6), unit_offset=unit_offset)


def read_layer_types(
  hf: Settings, default: Callable[[int], str], kinds: Sequence[str] = (FULL, SLIDING)
) -> list[str]:
  """`layer_types`: the kind of each layer, by default whether it has full or sliding attention;
  `default` of an index, where it is missing."""
  n = hf.count('num_hidden_layers')
  found = hf.value('layer_types') or [default(i) for i in range(n)]
  if not isinstance(found, list) or len(found) != n or not set(kinds).issuperset(found):
    raise hf.fail('layer_types', f'a list of {n} of {" and ".join(kinds)}')
  return found


def read_windows(hf: Settings, types: list[str], window: int | None) -> list[int | None]:
  """The window of each layer; None for full attention."""
  if window is None and SLIDING in types:
    raise hf.fail('layer_types', f'all {FULL} without a sliding window')
  return [window if t == SLIDING else None for t in types]


# ---- to their fields ---------------------------------------------------------------------------


def blocks_of(config: LanguageModel.Config) -> list[Block.Config]:
  """The blocks of a model from the bottom up."""
  return [b for g in config.stack for _ in range(g.repeats) for b in g.pattern]


def attentions_of(config: LanguageModel.Config) -> list[Attention.Config]:
  """The attention layers of a model, the first of each block."""
  return [
    part(block.branches[0].layer, Attention.Config, f'layer 0 of block {i}')
    for i, block in enumerate(blocks_of(config))
  ]


def write_decoder(
  config: LanguageModel.Config,
  attention: Attention.Config,
  mlp: GatedMlp.Config,
  *,
  activation: str = 'hidden_act',
) -> dict[str, Any]:
  """The shared fields, without those of positions, from the layers of the first block."""
  return {
    **written(config, MODEL),
    'intermediate_size': mlp.hidden,
    'num_hidden_layers': depth(config.stack),
    'num_attention_heads': attention.heads,
    'num_key_value_heads': attention.kv_heads or attention.heads,
    'head_dim': attention.head_size(config.width),
    activation: activation_name(mlp.activation),
    'rms_norm_eps': part(config.final_norm, RMSNorm, 'final_norm').eps,
    'initializer_range': std_of(config.embedding_init),
    'attention_dropout': attention.attention_dropout,
  }


def write_windows(config: LanguageModel.Config) -> dict[str, Any]:
  """`layer_types` and `sliding_window`, that of the first layer that has one."""
  windows = [a.window for a in attentions_of(config)]
  return {
    'layer_types': [FULL if w is None else SLIDING for w in windows],
    'sliding_window': next((w for w in windows if w is not None), None),
  }


# ---- weights -----------------------------------------------------------------------------------

LAYER = 'model.layers.{layer}'
PRE_NORMS = {
  f'{MIXER}.norm': f'{LAYER}.input_layernorm',
  f'{FEED_FORWARD}.norm': f'{LAYER}.post_attention_layernorm',
}
NORMS_AFTER = {
  f'{MIXER}.norm': f'{LAYER}.post_attention_layernorm',
  f'{FEED_FORWARD}.norm': f'{LAYER}.post_feedforward_layernorm',
}
SANDWICH_NORMS = {
  f'{MIXER}.norm.before': f'{LAYER}.input_layernorm',
  f'{MIXER}.norm.after': f'{LAYER}.post_attention_layernorm',
  f'{FEED_FORWARD}.norm.before': f'{LAYER}.pre_feedforward_layernorm',
  f'{FEED_FORWARD}.norm.after': f'{LAYER}.post_feedforward_layernorm',
}


ATTENTION = {p: f'{p}_proj' for p in 'qkvo'} | {n: n for n in ('q_norm', 'k_norm')}


def decoder_rules(
  norms: Mapping[str, str] = PRE_NORMS,
  feed_forward: str = 'mlp',
  attention: Mapping[str, str] = ATTENTION,
) -> list[Rule]:
  """The map of weights; `norms` are those of the branches, `feed_forward` their name of
  a feed-forward layer, `attention` the parts of attention."""
  outer = {'embedder.input': 'model.embed_tokens', 'final_norm': 'model.norm', 'head': 'lm_head'}
  mlp = {p: f'{p}_proj' for p in ('gate', 'up', 'down')}
  return [
    *modules({**outer, **norms}),
    *attention_rules(attention),
    *modules(mlp, f'{FEED_FORWARD}.layer.', f'{LAYER}.{feed_forward}.'),
  ]


def attention_rules(parts: Mapping[str, str] = ATTENTION) -> list[Rule]:
  """The map of the weights of attention."""
  return modules(parts, f'{MIXER}.layer.', f'{LAYER}.self_attn.')
