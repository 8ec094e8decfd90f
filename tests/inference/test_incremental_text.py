"""Text that is decoded token by token is that of all tokens at once, wherever the prompt ends, for
tokenizers of every kind."""

import itertools

import numpy as np
import pytest
import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers

from jaxformer.data.tokenizer_file import FileTokenizer
from jaxformer.data.tokenizers import ByteTokenizer
from jaxformer.inference.text import TextRow

TEXT = [
  '日本語の文章です。',
  'a quick  brown fox.',
  'naïve Ελληνικά, ελπίδα',
  'हिन्दी में लिखा',
  'العربية 123',
  '🙂👩‍👩‍👧‍👦🙂',
  '\n\tdef f(x):  return x',
  ' ends with a space ',
  '\ufffd is a character',
  "don't, won't !",
]


def byte_fallback():
  """As of Llama 2: BPE without merges, bytes for what it does not know, a space before a text."""
  vocab = {'<unk>': 0, '<s>': 1, '</s>': 2} | {f'<0x{b:02X}>': 3 + b for b in range(256)}
  for piece in ('▁', *'abcdefghijklmnopqrstuvwxyz.,日語'):
    vocab[piece] = len(vocab)
  model = hf.Tokenizer(
    models.BPE(vocab=vocab, merges=[], unk_token='<unk>', fuse_unk=True, byte_fallback=True)
  )
  model.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
  model.decoder = decoders.Sequence(
    [
      decoders.Replace('▁', ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(' ', 1, 0),
    ]
  )
  model.add_special_tokens(['<unk>', '<s>', '</s>'])
  return model


def characters(*pieces):
  return {p: i for i, p in enumerate(sorted({*pieces, *''.join(TEXT)}))}


def metaspace():
  """As of T5: characters, with a mark for spaces, and one before a text."""
  model = hf.Tokenizer(
    models.BPE(vocab=characters('<unk>', '</s>', '▁'), merges=[], unk_token='<unk>')
  )
  model.pre_tokenizer = pre_tokenizers.Metaspace()
  model.decoder = decoders.Metaspace()
  model.add_special_tokens(['<unk>', '</s>'])
  return model


def word_pieces():
  """As of BERT: words and their continuations, with spaces between them and none before marks."""
  inside = (f'##{c}' for c in set(''.join(TEXT)))
  vocab = characters('[UNK]', '[SEP]', 'qui', '##ck', 'f', '##ox', *inside)
  model = hf.Tokenizer(models.WordPiece(vocab=vocab, unk_token='[UNK]'))
  model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  model.decoder = decoders.WordPiece()
  model.add_special_tokens(['[UNK]', '[SEP]'])
  return model


def suffixed():
  """As of GPT: the last piece of a word ends in </w>."""
  ends = (f'{c}</w>' for c in set(''.join(TEXT)))
  vocab = characters('<unk>', '</s>', *ends)
  model = hf.Tokenizer(
    models.BPE(vocab=vocab, merges=[], unk_token='<unk>', end_of_word_suffix='</w>')
  )
  model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  model.decoder = decoders.BPEDecoder(suffix='</w>')
  model.add_special_tokens(['<unk>', '</s>'])
  return model


def byte_level(prefix=False):
  """As of GPT-2, with some merges that end within a character; with a space before a text, it is
  not exact in bytes."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  pairs = [tuple('æĹ'), tuple('ðŁ'), tuple('qu'), ('ðŁ', 'Ļ')]
  vocab = {p: i for i, p in enumerate([*alphabet, *(''.join(p) for p in pairs), '<|endoftext|>'])}
  model = hf.Tokenizer(models.BPE(vocab=vocab, merges=pairs))
  model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
  model.decoder = decoders.ByteLevel()
  model.add_special_tokens(['<|endoftext|>'])
  return model


KINDS = {
  'bytes': ByteTokenizer,
  'byte-level': lambda: FileTokenizer(byte_level().to_str(), None, 'here'),
  'byte-level with a prefix': lambda: FileTokenizer(byte_level(True).to_str(), None, 'here'),
  'byte fallback': lambda: FileTokenizer(byte_fallback().to_str(), None, 'here'),
  'metaspace': lambda: FileTokenizer(metaspace().to_str(), None, 'here'),
  'word pieces': lambda: FileTokenizer(word_pieces().to_str(), None, 'here'),
  'suffixes': lambda: FileTokenizer(suffixed().to_str(), None, 'here'),
}


def written(tokenizer, prompt, new, stops=()):
  row = TextRow(prompt, tokenizer.decode_bytes, stops)
  pieces = [row.push(t) for t in new]
  return ''.join(pieces) + row.close()


def expected(tokenizer, ids, cut):
  """The text of all from the length of the prompt's text on, where the prompt ends with a whole
  character or an incomplete one, which counts as the prompt's."""
  text, prompt = tokenizer.decode(ids), tokenizer.decode(ids[:cut])
  if text.startswith(prompt):
    return text[len(prompt) :]
  whole = next(
    p for n in range(1, 8) if not (p := tokenizer.decode(ids[: cut - n])).endswith('\ufffd')
  )
  return text[len(whole) + 1 :]


@pytest.mark.quick
@pytest.mark.parametrize('kind', KINDS)
def test_pieces_are_the_text_of_all_tokens_wherever_the_prompt_ends(kind):
  tokenizer, numbers = KINDS[kind](), np.random.default_rng(0)
  texts = [*TEXT, *(''.join(numbers.permutation(TEXT)[:3]) for _ in range(4))]
  ended = 0
  for text in texts:
    ids = tokenizer.encode(text).tolist()
    if tokenizer.end_of_document is not None:  # special tokens are no text, also within a character
      ids[len(ids) // 2 : len(ids) // 2] = [tokenizer.end_of_document] * 2
      ids.insert(0, tokenizer.end_of_document)
    for cut in range(len(ids) + 1):
      got, want = written(tokenizer, ids[:cut], ids[cut:]), expected(tokenizer, ids, cut)
      assert got == want, (text, cut)
      ended += not tokenizer.decode(ids).startswith(tokenizer.decode(ids[:cut]))
  assert bool(ended) == ('byte' in kind)  # prompts ended within a character


@pytest.mark.quick
@pytest.mark.parametrize('kind', KINDS)
def test_stop_strings_end_the_text_in_all_kinds(kind):
  tokenizer = KINDS[kind]()
  for text, stop in itertools.product(TEXT, ('fox', '語の', '🙂👩', '. ', 'λλ')):
    ids = tokenizer.encode(text).tolist()
    whole = tokenizer.decode(ids)
    assert written(tokenizer, [], ids, (stop,)) == whole.partition(stop)[0]


@pytest.mark.quick
@pytest.mark.parametrize(
  ('prompt', 'new'),
  [
    ('日本語', '東京大学'),
    ('a', '日本語東京'),
    ('🙂', '🙂🙂🙂 ok'),
    ('hello ', '日本語 abc'),
    ('', ' 日本語の文章です abc'),
  ],
)
def test_runs_of_byte_tokens(prompt, new):
  tokenizer = KINDS['byte fallback']()
  start, ids = tokenizer.encode(prompt).tolist(), tokenizer.encode(prompt + new).tolist()
  assert ids[: len(start)] == start
  row = TextRow(start, tokenizer.decode_bytes, ())
  pieces = [row.push(t) for t in ids[len(start) :]]
  assert not any('\ufffd' in p for p in pieces)  # characters come as they are complete
  assert ''.join(pieces) + row.close() == new


@pytest.mark.quick
@pytest.mark.parametrize(
  ('run', 'shown'),
  [
    ('日'.encode() + b'\xff', '日\ufffd'),
    ('日本'.encode() + b'\xe6', '日本\ufffd'),
    ('日'.encode() + '本'.encode()[:2], '日\ufffd\ufffd'),
    (b'AB\xff', 'AB\ufffd'),
    (b'\xe6' + '日'.encode(), '\ufffd' * 4),
    ('é'.encode() + b'\xff' + 'é'.encode(), 'é' + '\ufffd' * 3),
    ('é'.encode() + b'\xff' * 20, 'é' + '\ufffd' * 20),
  ],
)
@pytest.mark.parametrize('after', ['', 'a'])
def test_runs_that_are_no_text(run, shown, after):
  """As `tokenizers` writes them where all tokens are known; what was shown before stays."""
  tokenizer = KINDS['byte fallback']()
  new = [3 + b for b in run] + tokenizer.encode(after).tolist()[-1:]
  assert written(tokenizer, [], new) == shown + after
  whole = '\ufffd' * len(run) + after
  assert tokenizer.decode(new) == whole
  start = tokenizer.encode('lazy').tolist()
  assert TextRow(start, tokenizer.decode_bytes, ()).rest(new) == whole


@pytest.mark.quick
def test_bytes_that_are_no_text_do_not_hold_back_what_follows():
  tokenizer = KINDS['byte fallback']()
  byte, letter = 3 + 0xFF, tokenizer.encode('a').tolist()[-1:]
  row = TextRow([], tokenizer.decode_bytes, ())
  out = [row.push(t) for t in [byte] * 100 + letter]
  assert sum(map(bool, out)) > 4
  assert ''.join(out) + row.close() == '\ufffd' * 100 + 'a'
