"""Against transformers' `generate`: the token ids that a folder names decide the same, and what is
exported stops where it stops here."""

import importlib.util
import json

import pytest
import tokenizers as hf

import jaxformer
from jaxformer.config import InputError
from jaxformer.data.tokenizers import ByteTokenizer
from jaxformer.layers.init import Normal, Zeros
from jaxformer.layers.position import Rotary, SinusoidalPositions
from jaxformer.models.params import define
from jaxformer.models.zoo.llama import llama
from jaxformer.models.zoo.transformer import transformer
from jaxformer.workflows.model import Model
from tests.interop.small import noisy

LACKING = [m for m in ('torch', 'transformers') if importlib.util.find_spec(m) is None]
pytestmark = [
  pytest.mark.parity,
  pytest.mark.skipif(
    bool(LACKING), reason=f'{" and ".join(LACKING)} not installed: pip install "jaxformer[parity]"'
  ),
]
V, NEW, PAD, EOS = 60, 12, 59, 0
WORDS = ['</s>', '<unk>', *(f'w{i}' for i in range(V - 3)), '<pad>']
MARIAN = transformer(
  32,
  1,
  64,
  2,
  vocab_size=257,
  context_length=64,
  bias=True,
  head_bias=Zeros(),
  positions=SinusoidalPositions.Config(halves=True),
  init=Normal(),
  embedding_init=Normal(),
)
TEXTS = 'w1 w2 w3', 'w9 w8 w7 w30'


def folder_of(kind, path, seed, **ids):
  """A folder of a random model of transformers with a tokenizer of words."""
  import torch
  import transformers

  torch.manual_seed(seed)
  if kind == 'marian':
    config = transformers.MarianConfig(
      vocab_size=V,
      d_model=32,
      encoder_layers=1,
      decoder_layers=1,
      encoder_attention_heads=2,
      decoder_attention_heads=2,
      encoder_ffn_dim=64,
      decoder_ffn_dim=64,
      max_position_embeddings=64,
      init_std=0.5,
      **{'pad_token_id': PAD, 'eos_token_id': EOS, 'forced_eos_token_id': None} | ids,
    )
    model = transformers.MarianMTModel(config)
  else:
    config = transformers.LlamaConfig(
      vocab_size=V,
      hidden_size=32,
      intermediate_size=64,
      num_hidden_layers=1,
      num_attention_heads=2,
      initializer_range=0.5,
      **{'pad_token_id': PAD, 'eos_token_id': EOS, 'bos_token_id': None} | ids,
    )
    model = transformers.LlamaForCausalLM(config)
  with torch.no_grad():
    for p in model.parameters():
      if p.requires_grad:
        p.add_(torch.randn_like(p) * 0.5)
  for name, value in ids.items():
    setattr(model.generation_config, name, value)
  model.eval().save_pretrained(path)
  tokenizer = hf.Tokenizer(hf.models.WordLevel(dict(zip(WORDS, range(V))), unk_token='<unk>'))
  tokenizer.pre_tokenizer = hf.pre_tokenizers.Whitespace()
  tokenizer.add_special_tokens(['</s>', '<pad>', '<unk>'])
  tokenizer.save(str(path / 'tokenizer.json'))
  return path


def theirs(path, ids, **options):
  import torch
  import transformers

  config = transformers.AutoConfig.from_pretrained(path)
  kind = (
    transformers.AutoModelForSeq2SeqLM
    if config.is_encoder_decoder
    else transformers.AutoModelForCausalLM
  )
  model = kind.from_pretrained(path, dtype=torch.float32).eval()
  found = model.generate(
    torch.tensor([ids]), do_sample=False, num_beams=1, **({'max_new_tokens': NEW} | options)
  )[0].tolist()
  return found[1:] if config.is_encoder_decoder else found[len(ids) :]


def ours(model, text, **options):
  """(the ids of the prompt or source, the new tokens, whether they ended)."""
  if model.translates:
    ((_, found),) = model.translations([text], **({'max_new_tokens': NEW} | options))
    return model._source(text), found.tokens, found.finished
  (found,) = model.complete([text], temperature=0, **({'max_new_tokens': NEW} | options))
  return model.text_tokenizer().encode_start(text), found.tokens, found.finished


def agree(path, ends=(EOS,), **options):
  model, lengths = jaxformer.load(path), []
  for text in TEXTS:
    ids, tokens, finished = ours(model, text, **options)
    expected = theirs(path, ids, **options)
    at = next((i for i, t in enumerate(expected) if t in ends), None)
    assert tokens == expected[:at]
    assert finished == (at is not None)
    lengths.append(len(expected))
  return lengths


RULES = {
  'none': {},
  'bad words': {'bad_words_ids': [[PAD], [41], [30]]},
  'suppressed': {'suppress_tokens': [17, 24, 41, 30]},
  'suppressed first': {'begin_suppress_tokens': [30, 41, 24, 17, 5]},
  'forced first': {'forced_bos_token_id': 7},
  'several ends': {'eos_token_id': [EOS, *range(2, V, 3)]},
}


@pytest.mark.parametrize('seed', range(2))
@pytest.mark.parametrize('rule', [*RULES, 'forced last', 'begins with bos'])
@pytest.mark.parametrize('kind', ['marian', 'llama'])
def test_token_ids_of_a_folder_decide(kind, rule, seed, tmp_path):
  special = {'forced last': {'forced_eos_token_id': 0}, 'begins with bos': {'bos_token_id': 3}}
  ids = {'decoder_start_token_id': PAD} if kind == 'marian' else {}
  ids |= RULES.get(rule) or special.get(rule, {})
  path = folder_of(kind, tmp_path / 'hf', seed, **ids)
  if rule == 'begins with bos':
    (path / 'generation_config.json').write_text('{"bos_token_id": 3, "eos_token_id": 0}')
    config = json.loads((path / 'config.json').read_text())
    config.pop('decoder_start_token_id', None)
    (path / 'config.json').write_text(json.dumps(config))
  ends = (EOS, *range(2, V, 3)) if rule == 'several ends' else (EOS,)
  if kind == 'llama' and rule == 'forced last':
    with pytest.raises(InputError, match='forced_eos_token_id'):
      agree(path)
    return
  lengths = agree(path, ends)
  if rule == 'several ends':
    assert min(lengths) < NEW
  jaxformer.convert(str(path), tmp_path / 'again', log=lambda _: None)
  assert agree(tmp_path / 'again', ends) == lengths


def test_ids_of_config_json_alone(tmp_path):
  path = folder_of('marian', tmp_path / 'hf', 0, decoder_start_token_id=5)
  (path / 'generation_config.json').unlink()
  config = json.loads((path / 'config.json').read_text())
  config |= {'bad_words_ids': [[41]], 'decoder_start_token_id': 5, 'max_length': 6}
  (path / 'config.json').write_text(json.dumps(config))
  agree(path)
  assert agree(path, max_new_tokens=9) == [9, 9]


@pytest.mark.parametrize('kind', ['marian', 'llama'])
def test_a_model_of_ours_stops_in_transformers_where_it_stops_here(kind, tmp_path):
  """Bytes, whose end of document is 256, from the token that training here begins with."""
  tokenizer = ByteTokenizer()
  end = tokenizer.end_of_document
  config = llama(32, 1, 64, 2, 2, context_length=64, vocab_size=257, rotary=Rotary())
  config = MARIAN if kind == 'marian' else config
  definition = define(config)
  for seed in range(40):
    params = noisy(config, seed, std=0.5)
    if 'head.bias' in params:
      params['head.bias'] = params['head.bias'].at[end].add(0.3 * seed)
    model = Model('ours', definition, lambda p=params: p, tokenizer)
    _, tokens, finished = ours(model, 'abc', max_new_tokens=24)
    if finished and tokens:
      break
  assert finished
  model.export(tmp_path / 'out')
  ids, tokens, _ = ours(model, 'abc', max_new_tokens=24)
  assert theirs(tmp_path / 'out', ids, max_new_tokens=24) == [*tokens, end]
  again = jaxformer.load(tmp_path / 'out')
  assert ours(again, 'abc', max_new_tokens=24) == (ids, tokens, True)
  import transformers

  their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
  assert their_tokenizer.eos_token_id == end
  assert their_tokenizer.decode(their_tokenizer('añ 日', add_special_tokens=False).input_ids) == (
    'añ 日'
  )
