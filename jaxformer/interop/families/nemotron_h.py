"""Nemotron-H. Every block has one branch, called `mixer`, whatever its layer is; the blocks are
listed by kind, or as a string of letters. On disk, every expert has separate tensors."""

from typing import Any

from jaxformer.config import InputError
from jaxformer.interop.families import mamba, mamba2
from jaxformer.interop.families.mamba import OURS, STEPS, THEIRS
from jaxformer.interop.family import blocks_of, family, first_of, part, std_of
from jaxformer.interop.settings import ACTIVATIONS, Settings, Table, activation_name, written
from jaxformer.interop.weights import CheckpointFormat, Rule, arrays, modules
from jaxformer.layers.attention import Attention
from jaxformer.layers.init import Init, Normal
from jaxformer.layers.layer import LayerConfig
from jaxformer.layers.mamba import StepBias
from jaxformer.layers.mamba2 import Mamba2
from jaxformer.layers.mlp import Mlp
from jaxformer.layers.moe import Moe
from jaxformer.layers.norm import RMSNorm
from jaxformer.layers.router import BiasBalanced
from jaxformer.models.block import pre_norm
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.stack import grouped

MODEL: Table = {
  'vocab_size': ('vocab_size', 131072),
  'width': ('hidden_size', 4096),
  'context_length': ('max_position_embeddings', 4096),
}
MIXER: Table = {
  'd_state': ('ssm_state_size', 128),
  'heads': ('mamba_num_heads', 128),
  'head_dim': ('mamba_head_dim', 64),
  'groups': ('n_groups', 8),
  'd_conv': ('conv_kernel', 4),
  'bias': ('use_bias', False),
  'conv_bias': ('use_conv_bias', True),
}
ATTENTION: Table = {
  'heads': ('num_attention_heads', 32),
  'kv_heads': ('num_key_value_heads', 8),
  'head_dim': ('head_dim', 128),
  'attention_dropout': ('attention_dropout', 0.0),
}
LETTERS = {
  'linear_attention': 'M',
  'full_attention': '*',
  'mlp': '-',
  'moe': 'E',
  'mamba': 'M',
  'attention': '*',
}
"""Their name of a block's layer -> its letter. Of several names, the first is written."""


def layout(hf: Settings) -> str:
  """The letter of each block."""
  letters = hf.get('hybrid_override_pattern', str, None)
  if letters is not None and not set(letters) <= set(LETTERS.values()):
    raise hf.fail('hybrid_override_pattern', f'of the letters {" ".join(set(LETTERS.values()))}')
  for name in ('layers_block_type', 'layer_types'):
    kinds = hf.value(name)
    if kinds is None:
      continue
    if not isinstance(kinds, list) or not set(kinds) <= set(LETTERS):
      raise hf.fail(name, f'a list of {", ".join(LETTERS)}')
    found = ''.join(LETTERS[kind] for kind in kinds)
    if letters not in (None, found):
      raise hf.fail(name, f'equivalent to {letters!r}')
    letters = found
  letters = 'ME*-' if letters is None else letters
  hf.only('num_hidden_layers', None, len(letters))
  return letters


def read(hf: Settings) -> LanguageModel.Config:
  """Initialization of Mamba-2 layers is the authors', which transformers does not follow. Like
  transformers, clips step sizes at `time_step_min`, whatever `time_step_limit` says."""
  for name in ('attention_bias', 'tie_word_embeddings', 'mamba_proj_bias'):
    hf.only(name, False)
  hf.only('sliding_window', None)
  hf.only('mamba_hidden_act', 'silu', 'swish')
  hf.only('hidden_dropout', 0.0, 0)
  hf.only('num_nextn_predict_layers', 0)
  mamba2.step_limits(hf)
  init, norm = Normal(std=hf.get('initializer_range', float, 0.02)), RMSNorm(eps=_eps(hf))
  steps = StepBias(**hf.read(STEPS))
  mlp = Mlp.Config(
    hidden=hf.count('intermediate_size', 21504),
    activation=hf.choose('mlp_hidden_act', ACTIVATIONS, 'relu2'),
    bias=hf.get('mlp_bias', bool, False),
    init=init,
    out_init=init,
  )
  attention = Attention.Config(**hf.read(ATTENTION), init=init, out_init=init)
  mixer = Mamba2.Config(**hf.read(MIXER), norm_eps=_eps(hf), dt_init=steps, dt_min=steps.low)
  layers: dict[str, LayerConfig] = {'M': mixer, '*': attention, '-': mlp}
  letters = layout(hf)
  if 'E' in letters:
    layers['E'] = _mixture(hf, mlp, init)
  blocks = [pre_norm(norm, layers[letter]) for letter in letters]
  return LanguageModel.Config(
    **hf.read(MODEL),
    stack=grouped(blocks),
    final_norm=norm,
    embedding_init=init,
    residual_dtype='float32' if hf.get('residual_in_fp32', bool, False) else 'compute',
  )


def _eps(hf: Settings) -> float:
  return hf.get('layer_norm_epsilon', float, 1e-5)


def _mixture(hf: Settings, mlp: Mlp.Config, init: Init) -> Moe.Config:
  hf.only('moe_latent_size', None)
  hf.only('n_group', 1)
  hf.only('topk_group', 1)
  hf.only('norm_topk_prob', True)
  router = BiasBalanced(
    k=hf.count('num_experts_per_tok', 2), scale=hf.positive('routed_scaling_factor', 1.0), init=init
  )
  return Moe.Config(
    experts=hf.count('n_routed_experts', 8),
    expert=mlp.replace(hidden=hf.count('moe_intermediate_size', 7688), bias=False),
    router=router,
    shared=mlp.replace(hidden=hf.count('moe_shared_expert_intermediate_size', 7688)),
  )


def write(config: LanguageModel.Config) -> dict[str, Any]:
  blocks = blocks_of(config.stack)
  kinds: dict[type[LayerConfig], str] = {
    Mamba2.Config: 'M',
    Attention.Config: '*',
    Mlp.Config: '-',
    Moe.Config: 'E',
  }
  for i, block in enumerate(blocks):
    if len(block.branches) != 1 or type(block.branches[0].layer) not in kinds:
      raise InputError(f'block {i}', problem='has more branches than one, or an unknown layer')
  letters = [kinds[type(block.branches[0].layer)] for block in blocks]
  mixer = first_of(blocks, Mamba2.Config)
  attention = first_of(blocks, Attention.Config)
  moe = first_of(blocks, Moe.Config)
  mlp = first_of(blocks, Mlp.Config)
  if mlp is None and moe is not None:
    mlp = moe.shared
  if mixer is None:
    raise InputError('stack', problem='no block has a Mamba-2 layer')
  mixer = mixer.resolved(config.width)
  return {
    'architectures': ['NemotronHForCausalLM'],
    **written(config, MODEL),
    **written(mixer, MIXER),
    **(written(mixer.dt_init, STEPS) if type(mixer.dt_init) is StepBias else {}),
    'time_step_min': mixer.dt_min,
    **({} if attention is None else written(attention.resolved(config.width), ATTENTION)),
    **({} if mlp is None else _written_mlp(mlp)),
    **({} if moe is None else _written_mixture(moe)),
    'layers_block_type': [
      next(kind for kind, letter in LETTERS.items() if letter == one) for one in letters
    ],
    'layer_norm_epsilon': part(config.final_norm, RMSNorm, 'final_norm').eps,
    'initializer_range': std_of(config.embedding_init),
    'residual_in_fp32': config.residual_dtype == 'float32',
  }


def _written_mlp(mlp: Mlp.Config) -> dict[str, Any]:
  return {
    'intermediate_size': mlp.hidden,
    'mlp_hidden_act': activation_name(mlp.activation),
    'mlp_bias': mlp.bias,
  }


def _written_mixture(moe: Moe.Config) -> dict[str, Any]:
  router = part(moe.router, BiasBalanced, 'the router')
  return {
    'n_routed_experts': moe.experts,
    'num_experts_per_tok': router.k,
    'routed_scaling_factor': router.scale,
    'moe_intermediate_size': moe.expert.hidden,
    'moe_shared_expert_intermediate_size': part(moe.shared, Mlp.Config, 'shared').hidden,
  }


def rules(config: LanguageModel.Config) -> list[Rule]:
  names = {p: f'{p}_proj' for p in ('q', 'k', 'v', 'o', 'up', 'down')}
  experts = {f'expert_{p}': f'{p}_proj' for p in ('up', 'down')}
  shared = {f'shared.{p}': f'shared_experts.{p}_proj' for p in ('up', 'down')}
  return [
    *mamba.shared_rules(),
    *mamba2.layer_rules(THEIRS),
    *modules({**names, **shared}, OURS, THEIRS),
    *modules(experts, OURS, f'{THEIRS}experts.{{item}}.'),
    Rule((f'{OURS}router.kernel',), f'{THEIRS}gate.weight', transposed=True),
    *arrays({'router.bias': 'gate.e_score_correction_bias'}, OURS, THEIRS),
  ]


family(
  CheckpointFormat(
    'nemotron_h',
    read,
    write,
    rules,
    prefix='backbone.',
    aliases={'num_local_experts': 'n_routed_experts'},
  )
)
