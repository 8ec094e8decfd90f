"""RWKV-4. transformers may halve weights and residuals every few blocks when it runs a model,
against overflow in fp16; files hold the weights as trained, and so do our parameters."""

from typing import Any

from jaxformer.interop.family import branches_of, depth, family
from jaxformer.interop.settings import Settings, Table, written
from jaxformer.interop.weights import (
  FEED_FORWARD,
  MIXER,
  CheckpointFormat,
  Rule,
  arrays,
  as_row,
  modules,
)
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.rwkv import ChannelMix
from jaxformer.layers.rwkv4 import TimeMix4
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.zoo.rwkv4 import rwkv4

# Of the last norm, which in transformers always has the default.
EPS = 1e-5
MODEL: Table = {
  'vocab_size': ('vocab_size', 50277),
  'width': ('hidden_size', 4096),
  'context_length': ('context_length', 1024),
  'tied': ('tie_word_embeddings', False),
}


def read(hf: Settings) -> LanguageModel.Config:
  """`rescale_every` is ignored: it does not affect the function, up to the norms' eps."""
  model = hf.read(MODEL)
  width = model['width']
  hf.only('attention_hidden_size', None, width)
  config = rwkv4(
    width,
    hf.count('num_hidden_layers', 32),
    hidden=hf.count('intermediate_size', 4 * width),
    norm=LayerNorm(eps=hf.get('layer_norm_epsilon', float, EPS)),
  )
  head_init = None if model['tied'] else config.head_init
  return config.replace(**model, final_norm=LayerNorm(eps=EPS), head_init=head_init)


def write(config: LanguageModel.Config) -> dict[str, Any]:
  """Without rescaling, so that the logits equal ours; to run a deep model in fp16, set
  `rescale_every` to 6."""
  time, channels = branches_of(config.stack, TimeMix4.Config, ChannelMix.Config)
  return {
    'architectures': ['RwkvForCausalLM'],
    **written(config, MODEL),
    'attention_hidden_size': config.width,
    'num_hidden_layers': depth(config.stack),
    'intermediate_size': channels.layer.hidden,
    'layer_norm_epsilon': time.norm.eps,
    'rescale_every': 0,
    'use_cache': True,
  }


def rules(config: LanguageModel.Config) -> list[Rule]:
  block, words = (
    'rwkv.blocks.{layer}.',
    {'r': 'receptance', 'k': 'key', 'v': 'value', 'o': 'output'},
  )
  time, att = f'{MIXER}.layer.', f'{block}attention.'
  channels, ffn = f'{FEED_FORWARD}.layer.', f'{block}feed_forward.'
  mixes = {f'mix_{z}': f'time_mix_{words[z]}' for z in 'rkv'}
  return [
    *modules(
      {
        'embedder.input': 'rwkv.embeddings',
        'embedder.norm': 'rwkv.blocks.0.pre_ln',
        f'{MIXER}.norm': f'{block}ln1',
        f'{FEED_FORWARD}.norm': f'{block}ln2',
        'final_norm': 'rwkv.ln_out',
        'head': 'head',
      }
    ),
    *modules(words, time, att),
    *modules(words, channels, ffn),
    *arrays(mixes, time, att, as_row),
    *arrays(mixes, channels, ffn, as_row),
    *arrays({'decay': 'time_decay', 'bonus': 'time_first'}, time, att),
  ]


family(
  CheckpointFormat(
    'rwkv',
    read,
    write,
    rules,
    prefix='rwkv.',
    copies={'head.weight': 'rwkv.embeddings.weight'},
    aliases={'max_position_embeddings': 'context_length'},
  )
)
