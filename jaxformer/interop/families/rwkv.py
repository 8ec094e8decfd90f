"""RWKV-4. transformers may halve weights and residuals every few blocks when it runs a model,
against overflow in fp16; files hold the weights as trained, and so do our parameters."""

from __future__ import annotations

from typing import Any

from jaxformer.interop.family import CheckpointFormat, blocks, branches, family, part
from jaxformer.interop.settings import Settings
from jaxformer.interop.weights import Names, NewAxis, Rule, linear, norm, same
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.rwkv import ChannelMix
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.zoo.rwkv4 import rwkv4

CONTEXT = 1024
# Of the last norm, which in transformers always has the default.
EPS = 1e-5


def read(hf: Settings) -> LanguageModel.Config:
  """`rescale_every` is ignored: it does not affect the function, up to the norms' eps."""
  width = hf.count('hidden_size', 4096)
  hf.only('attention_hidden_size', None, width)
  norm, tied = (
    LayerNorm(eps=hf.get('layer_norm_epsilon', float, EPS)),
    hf.get('tie_word_embeddings', bool, False),
  )
  config = rwkv4(
    width,
    hf.count('num_hidden_layers', 32),
    context_length=hf.count('context_length', CONTEXT),
    vocab_size=hf.count('vocab_size', 50277),
    hidden=hf.count('intermediate_size', 4 * width),
    norm=norm,
  )
  return config.replace(
    final_norm=LayerNorm(eps=EPS), tied=tied, head_init=None if tied else config.head_init
  )


def write(config: LanguageModel.Config) -> dict[str, Any]:
  """Without rescaling, so that the logits equal ours; to run a deep model in fp16, set
  `rescale_every` to 6."""
  stack = blocks(config)
  time, channels = branches(stack[0], 2)
  return {
    'vocab_size': config.vocab_size,
    'context_length': config.context_length,
    'hidden_size': config.width,
    'attention_hidden_size': config.width,
    'num_hidden_layers': len(stack),
    'intermediate_size': part(channels.layer, ChannelMix.Config, 'layer 1 of block 0').hidden,
    'layer_norm_epsilon': time.norm.eps,
    'rescale_every': 0,
    'tie_word_embeddings': config.tied,
    'use_cache': True,
  }


def rules(config: LanguageModel.Config) -> list[Rule]:
  block, att, ffn = (
    'rwkv.blocks.{layer}',
    'rwkv.blocks.{layer}.attention',
    'rwkv.blocks.{layer}.feed_forward',
  )
  time, channels = 'stack.{layer}.branches.0', 'stack.{layer}.branches.1'
  norms = {
    'embedder.norm': 'rwkv.blocks.0.pre_ln',
    f'{time}.norm': f'{block}.ln1',
    f'{channels}.norm': f'{block}.ln2',
    'final_norm': 'rwkv.ln_out',
  }
  words = {'r': 'receptance', 'k': 'key', 'v': 'value', 'o': 'output'}
  mixes = [(f'{time}.layer', att, z) for z in 'rkv'] + [(f'{channels}.layer', ffn, z) for z in 'rk']
  matrices = [(f'{time}.layer', att, z) for z in 'rkvo'] + [
    (f'{channels}.layer', ffn, z) for z in 'rkv'
  ]
  return [
    same('embedder.input.table', 'rwkv.embeddings.weight'),
    *(rule for ours, theirs in norms.items() for rule in norm(ours, theirs)),
    *(
      Rule((f'{ours}.mix_{z}',), f'{theirs}.time_mix_{words[z]}', (NewAxis(0), NewAxis(0)))
      for ours, theirs, z in mixes
    ),
    *(linear(f'{ours}.{z}.kernel', f'{theirs}.{words[z]}.weight') for ours, theirs, z in matrices),
    same(f'{time}.layer.decay', f'{att}.time_decay'),
    same(f'{time}.layer.bonus', f'{att}.time_first'),
    linear('head.kernel', 'head.weight'),
  ]


def names(config: LanguageModel.Config) -> Names:
  return Names(
    prefix='rwkv.', copies={'head.weight': 'rwkv.embeddings.weight'} if config.tied else {}
  )


family(CheckpointFormat('rwkv', 'RwkvForCausalLM', read, write, rules, names))
