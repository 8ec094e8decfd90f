"""Long texts are cut into pieces of bounded size whose tokens are those of the whole text."""

import json
import random

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformer.data import Bytes, PydocTopics, pieces
from jaxformer.data.tokenizer_file import FileTokenizer

pytestmark = pytest.mark.quick
SIZE = 1000
PROSE = '\n\n'.join(row.texts[0] for row in PydocTopics().rows())[:200_000]
LLAMA_3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
  r'\s*[\r\n]+|\s+(?!\S)|\s+'
)
NUMBERS = random.Random(0)
CHINESE = '自然语言处理是人工智能领域中的一个重要方向。它研究人与计算机之间用自然语言进行有效通信，'
TEXTS = {
  'prose': PROSE[:30_000],
  'prose in sentences': ('The cat sat on the mat, twice.\n' * 900),
  'one long line': PROSE[:30_000].replace('\n', ' '),
  'code': 'def f(x):\n    return {x: [x_1 + 2]}\n\n\n' * 700,
  'no spaces': PROSE[:60_000].replace(' ', '').replace('\n', ''),
  'chinese': CHINESE * 500,
  'digits': ''.join(NUMBERS.choices('0123456789', k=20_000)),
  'emoji and words': 'good 😀😁 morning 👩\u200d👧 all\n' * 900,
  'mixed line ends': 'one\r\ntwo\n\nthree\r\n\r\n four\rfive \n' * 700,
  'floats': ' '.join(f'{NUMBERS.random():.6f}' for _ in range(3000)),
}
# Texts without a place at which the tokenizers cut: one word from beginning to end.
UNBROKEN = {
  'letters': ''.join(NUMBERS.choices('ACGT', k=30_000)),
  'chinese': CHINESE.replace('。', '').replace('，', '') * 600,
  'emoji': '😀😁👩🏽' * 8000,
}


def byte_level(pattern=None) -> hf.Tokenizer:
  model, before = hf.Tokenizer(hf.models.BPE()), hf.pre_tokenizers
  level = before.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
  if pattern is not None:
    level = before.Sequence([before.Split(hf.Regex(pattern), 'isolated'), level])
  model.pre_tokenizer, model.decoder = level, hf.decoders.ByteLevel()
  return trained(
    model, hf.trainers.BpeTrainer, initial_alphabet=sorted(before.ByteLevel.alphabet())
  )


def metaspace(scheme) -> hf.Tokenizer:
  model = hf.Tokenizer(hf.models.BPE(unk_token='<unk>', byte_fallback=True, fuse_unk=True))
  model.pre_tokenizer = hf.pre_tokenizers.Metaspace(prepend_scheme=scheme)
  fallback = [f'<0x{b:02X}>' for b in range(256)]
  return trained(model, hf.trainers.BpeTrainer, special_tokens=['<unk>', '</s>', *fallback])


def llama_2() -> hf.Tokenizer:
  """Without a pre-tokenizer: a normalizer puts a mark before the text and for every space."""
  data = json.loads(metaspace('first').to_str())
  steps = [
    {'type': 'Prepend', 'prepend': '▁'},
    {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'},
  ]
  data |= {'pre_tokenizer': None, 'normalizer': {'type': 'Sequence', 'normalizers': steps}}
  return hf.Tokenizer.from_str(json.dumps(data))


def words() -> hf.Tokenizer:
  model = hf.Tokenizer(hf.models.WordPiece(unk_token='[UNK]'))
  model.normalizer = hf.normalizers.BertNormalizer()
  model.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
  return trained(model, hf.trainers.WordPieceTrainer, special_tokens=['[UNK]', '[SEP]'])


def trained(model, trainer, **options) -> hf.Tokenizer:
  options = {'vocab_size': 700, 'show_progress': False} | options
  model.train_from_iterator([PROSE[-60_000:], CHINESE], trainer(**options))
  return model


MAKERS = {
  'gpt-2': byte_level,
  'llama 3': lambda: byte_level(LLAMA_3),
  'metaspace': lambda: metaspace('first'),
  'llama 2': llama_2,
  'words': words,
}


@pytest.fixture(scope='module')
def tokenizers():
  made = {name: FileTokenizer(make().to_str(), None, name) for name, make in MAKERS.items()}
  return made | {'bytes': Bytes().train(())}


def cut(tokenizer, text, size=SIZE) -> list[tuple[str, str]]:
  """The pieces of a text, each after the end of the one before."""
  found, start, before = [], 0, ''
  while (end := tokenizer.cut(text, start, size)) is not None:
    found.append((before, text[start:end]))
    before, start = text[start:end][-pieces.WINDOW :], end
  return [*found, (before, text[start:])]


def joined(tokenizer, found) -> np.ndarray:
  return np.concatenate([np.array([], np.int32), *tokenizer.encode_pieces(found)])


@pytest.mark.parametrize('text', TEXTS)
@pytest.mark.parametrize('name', [*MAKERS, 'bytes'])
def test_pieces_encode_as_the_whole(tokenizers, name, text):
  tokenizer, text = tokenizers[name], TEXTS[text]
  found = cut(tokenizer, text)
  assert ''.join(piece for _, piece in found) == text
  assert np.array_equal(joined(tokenizer, found), tokenizer.encode(text))
  assert max(len(piece) for _, piece in found) <= 8 * SIZE + 1 + pieces.WINDOW


@pytest.mark.parametrize('text', ['prose', 'prose in sentences', 'one long line', 'code'])
@pytest.mark.parametrize('name', MAKERS)
def test_pieces_of_usual_text_are_of_the_size_that_was_asked_for(tokenizers, name, text):
  sizes = [len(piece) for _, piece in cut(tokenizers[name], TEXTS[text])[:-1]]
  assert np.mean(sizes) < 1.3 * SIZE


@pytest.mark.parametrize('text', UNBROKEN)
@pytest.mark.parametrize('name', [*MAKERS, 'bytes'])
def test_pieces_are_bounded_where_the_tokenizer_cuts_nowhere(tokenizers, name, text):
  tokenizer, text = tokenizers[name], UNBROKEN[text]
  found = cut(tokenizer, text)
  assert ''.join(piece for _, piece in found) == text
  assert max(len(piece) for _, piece in found) <= 8 * SIZE + 1 + pieces.WINDOW
  if name != 'words':  # a long word is unknown as a whole
    assert tokenizer.decode(joined(tokenizer, found)) == tokenizer.decode(tokenizer.encode(text))


ATOMS = [
  'a',
  'ab',
  "'s",
  ' ',
  '  ',
  '\n',
  '\n\n',
  '\t',
  '.',
  ' x',
  '12',
  '/',
  '\r\n',
  'é',
  '_',
  '日本',
]


@settings(max_examples=40, deadline=None)
@given(words=st.lists(st.sampled_from(ATOMS), max_size=400), size=st.integers(1, 100))
def test_pieces_of_any_text(tokenizers, words, size):
  text = ''.join(words)
  for tokenizer in tokenizers.values():
    found = cut(tokenizer, text, size)
    assert ''.join(piece for _, piece in found) == text
    assert np.array_equal(joined(tokenizer, found), tokenizer.encode(text))


def test_cutting_is_linear_in_the_length_of_a_text(tokenizers, monkeypatch):
  """Every character is looked at a bounded number of times."""
  seen = 0
  tokenizer, text = tokenizers['gpt-2'], UNBROKEN['letters'] * 3
  scan = pieces.WordCuts.ends

  def counted(self, text):
    nonlocal seen
    seen += len(text)
    return scan(self, text)

  monkeypatch.setattr(pieces.WordCuts, 'ends', counted)
  cut(tokenizer, text)
  assert 0 < seen < len(text)
