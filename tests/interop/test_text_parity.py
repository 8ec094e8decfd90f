"""Folders as they are published, against transformers: the same text from the same prompts, stops
included, and the same after export and import."""

import importlib.util
import json

import pytest
import tokenizers as hf

import jaxformer
from jaxformer.interop import read_generation
from tests.inference.test_incremental_text import byte_fallback
from tests.interop.test_generation_parity import EOS, PAD, V, folder_of, theirs

LACKING = [m for m in ('torch', 'transformers') if importlib.util.find_spec(m) is None]
pytestmark = [
  pytest.mark.parity,
  pytest.mark.skipif(
    bool(LACKING), reason=f'{" and ".join(LACKING)} not installed: pip install "jaxformer[parity]"'
  ),
]
NEW, SEEDS = 24, range(2)


def causal(path, seed, tokenizer, bos, ends, **rules):
  """A Llama with random weights that ends texts now and then. As in the published folders of
  Llama 3, `config.json` has one end and `generation_config.json` all."""
  import torch
  import transformers

  torch.manual_seed(seed)
  ids = {t: tokenizer.token_to_id(t) for t in (bos, *ends)}
  special = {'bos_token_id': ids[bos], 'eos_token_id': ids[ends[0]], 'pad_token_id': None}
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=tokenizer.get_vocab_size(),
      hidden_size=32,
      intermediate_size=64,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      initializer_range=0.5,
      **special,
    )
  )
  with torch.no_grad():
    for p in model.parameters():
      p.add_(torch.randn_like(p) * 0.5)
    model.lm_head.weight[[ids[e] for e in ends]] *= 1.4
  model.eval().save_pretrained(path)
  (path / 'generation_config.json').write_text(
    json.dumps({**special, **rules, 'eos_token_id': [ids[e] for e in ends], 'do_sample': True})
  )
  template = hf.processors.TemplateProcessing(
    single=f'{bos} $A', pair=f'{bos} $A $B', special_tokens=[(bos, ids[bos])]
  )
  tokenizer.post_processor = template
  tokenizer.save(str(path / 'tokenizer.json'))
  (path / 'tokenizer_config.json').write_text(
    json.dumps(
      {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'bos_token': bos,
        'eos_token': ends[0],
        'clean_up_tokenization_spaces': False,
      }
    )
  )
  return path


def instruct(path, seed):
  """As Llama 3: bytes, and a list of ends."""
  alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
  tokenizer = hf.Tokenizer(hf.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
  tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = hf.decoders.ByteLevel()
  names = '<|begin_of_text|>', '<|end_of_text|>', '<|eom_id|>', '<|eot_id|>'
  tokenizer.add_special_tokens(list(names))
  return causal(path, seed, tokenizer, names[0], names[1:])


def fallback(path, seed):
  """As Llama 2: bytes for what the vocabulary lacks. Random weights would write parts of
  characters, which streamed text shows otherwise; these write ASCII."""
  tokenizer = byte_fallback()
  never = [tokenizer.token_to_id(f'<0x{b:02X}>') for b in range(128, 256)]
  return causal(path, seed, tokenizer, '<s>', ['</s>', '<unk>'], suppress_tokens=never)


def prefixed(path, seed):
  """Two tokens before a text, a repetition penalty, and settings that do not decide greedy text."""
  instruct(path, seed)
  file, rules = path / 'tokenizer.json', path / 'generation_config.json'
  tokenizer, names = hf.Tokenizer.from_file(str(file)), ('<|begin_of_text|>', '<|eom_id|>')
  tokenizer.post_processor = hf.processors.TemplateProcessing(
    single=f'{" ".join(names)} $A', special_tokens=[(n, tokenizer.token_to_id(n)) for n in names]
  )
  tokenizer.save(str(file))
  settings = {'repetition_penalty': 1.3, 'temperature': 0.6, 'top_p': 0.9, 'pad_token_id': 257}
  rules.write_text(json.dumps(json.loads(rules.read_text()) | settings))
  beside = path / 'tokenizer_config.json'
  beside.write_text(json.dumps(json.loads(beside.read_text()) | {'add_bos_token': False}))
  return path


def free_bytes(path, seed):
  """As `fallback`, with parts of characters, for which streamed text has a rule of its own."""
  fallback(path, seed)
  rules = path / 'generation_config.json'
  fields = json.loads(rules.read_text())
  del fields['suppress_tokens']
  rules.write_text(json.dumps(fields))
  return path


def marian(path, seed):
  ids = {
    'decoder_start_token_id': PAD,
    'bad_words_ids': [[PAD]],
    'eos_token_id': [EOS, *range(2, V, 3)],
  }
  folder_of('marian', path, seed, **ids)
  (path / 'tokenizer_config.json').write_text(
    json.dumps({'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': '</s>'})
  )
  return path


PROMPTS = {
  instruct: ['a quick', 'naïve 日本', 'x', '\n\tdef f('],
  prefixed: ['a quick', 'naïve 日本', 'x'],
  free_bytes: ['a quick', '日本語 日', 'x '],
  fallback: ['a quick', 'naïve 日本', 'x', 'lazy dog'],
  marian: ['w1 w2 w3', 'w9 w8 w7 w30', 'w5', 'w50 w51'],
}


def their_text(path, prompt):
  """(ids of the prompt, text, whether it has an end)."""
  import transformers

  tokenizer = transformers.AutoTokenizer.from_pretrained(path)
  ids = tokenizer(prompt).input_ids
  pairs = json.loads((path / 'config.json').read_text()).get('is_encoder_decoder')
  ids = [*ids, EOS] if pairs else ids
  new, ends = theirs(path, ids, max_new_tokens=NEW), read_generation(path).ends
  at = next((i for i, t in enumerate(new) if t in ends), None)
  new = new[:at]
  before = '' if pairs else tokenizer.decode(ids, skip_special_tokens=True)
  whole = tokenizer.decode(new if pairs else ids + new, skip_special_tokens=True)
  assert whole.startswith(before)
  return ids, whole[len(before) :], at is not None


def our_text(path, prompt, streams=True):
  model = jaxformer.load(path)
  if model.translates:
    ((text, found),) = model.translations([prompt], max_new_tokens=NEW)
    return model._source(prompt), text, found.finished
  (found,) = model.complete([prompt], max_new_tokens=NEW, temperature=0)
  streamed = ''.join(model.stream(prompt, max_new_tokens=NEW, temperature=0))
  assert not streams or streamed == found.text
  return model.text_tokenizer().encode_start(prompt), found.text, found.finished


@pytest.mark.parametrize('kind', PROMPTS)
def test_text_is_theirs(kind, tmp_path):
  ended = []
  for seed in SEEDS:
    path, again, twice = (tmp_path / f'{name}{seed}' for name in ('hf', 'again', 'twice'))
    kind(path, seed)
    jaxformer.convert(str(path), again, log=lambda _: None)
    jaxformer.convert(str(again), twice, log=lambda _: None)
    assert read_generation(again) == read_generation(path)
    for file in path.iterdir():
      if file.name.startswith('tokenizer'):
        assert (again / file.name).read_bytes() == file.read_bytes()
    for file in again.iterdir():
      assert (twice / file.name).read_bytes() == file.read_bytes()
    for prompt in PROMPTS[kind]:
      expected = their_text(path, prompt)
      assert our_text(path, prompt, kind is not free_bytes) == expected
      assert their_text(again, prompt) == expected
      ended.append((expected[-1], len(expected[1])))
  assert any(end and length > 2 for end, length in ended)
  assert not all(end for end, _ in ended)
