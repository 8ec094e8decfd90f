"""Tokenizers: there and back, bytes accounted for, errors."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxformer.config import InputError
from jaxformer.data import (
  ByPosition,
  BytePairs,
  Bytes,
  Characters,
  Files,
  PydocTopics,
  TokenizerFile,
  load_tokenizer,
  train_bpe,
)
from jaxformer.data.cache import open_tokenizer
from jaxformer.data.cache_folder import build_atomically
from jaxformer.data.tokenizer_file import FileTokenizer
from jaxformer.data.tokenizers import ByteTokenizer, CharacterTokenizer

pytestmark = pytest.mark.quick
TOPICS = [row.texts[0] for row in PydocTopics().rows()]


@pytest.fixture(scope='module')
def pairs(tmp_path_factory) -> str:
  """The path of a byte-level tokenizer.json."""
  path = tmp_path_factory.mktemp('pairs') / 'tokenizer.json'
  assert train_bpe(TOPICS, 600, path) == 600
  return str(path)


@pytest.fixture(scope='module')
def every(pairs):
  """The tokenizers whose bytes are exact and that take any text."""
  return [Bytes().train(()), TokenizerFile(path=pairs).train(())]


@settings(max_examples=150, deadline=None)
@given(text=st.text())
def test_any_text_comes_back_with_its_bytes_accounted_for(every, text):
  for tokenizer in [*every, CharacterTokenizer(''.join(sorted(set(text) | {'a'})))]:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert (
      tokenizer.decode_bytes(ids)
      == text.encode()
      == b''.join(tokenizer.decode_bytes([i]) for i in ids.tolist())
    )
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert all((ids >= 0) & (ids < tokenizer.vocab_size))


def test_invalid_bytes_decode_to_replacements():
  tokenizer = Bytes().train(())
  assert tokenizer.decode([0xC3, 65, 256]) == '\ufffdA'
  assert tokenizer.decode_bytes([0xC3, 65, 256]) == b'\xc3A'
  assert (tokenizer.vocab_size, tokenizer.end_of_document, tokenizer.token_bytes[256]) == (
    257,
    256,
    0,
  )


def test_ids_out_of_range(every):
  for tokenizer in [*every, CharacterTokenizer('abc')]:
    for wrong in (-1, tokenizer.vocab_size):
      with pytest.raises(
        InputError, match=f'token id {wrong}: the vocabulary has {tokenizer.vocab_size} tokens'
      ):
        tokenizer.decode([0, wrong])


def test_half_a_surrogate_pair_is_no_text(every):
  for tokenizer in [*every, CharacterTokenizer('abc')]:
    with pytest.raises(InputError, match='half a surrogate pair at character 1'):
      tokenizer.encode('a\ud800')


def test_characters_are_those_of_all_the_corpus(tmp_path):
  (tmp_path / 'a.txt').write_text('hello wörld' * 20 + 'Z')

  def opened(name):
    corpus = Files(path=str(tmp_path / name))
    return open_tokenizer(Characters(), corpus, (0,), ByPosition(), tmp_path / 'c', print)

  tokenizer = opened('a.txt')
  assert tokenizer.decode(range(tokenizer.vocab_size)) == ''.join(sorted(set('hello wörldZ')))
  assert tokenizer.end_of_document is None
  with pytest.raises(InputError, match=r"the character 'Q' is not among the \d+ of the vocabulary"):
    tokenizer.encode('hello Q')
  (tmp_path / 'empty.txt').write_text('')
  with pytest.raises(InputError, match='the corpus holds no text'):
    opened('empty.txt')


def test_pairs_are_trained_deterministically_from_the_training_side(tmp_path):
  (tmp_path / 'a.txt').write_text('the cat sat on the mat\n' * 300 + 'zyzzyva ' * 50)
  corpus = Files(path=str(tmp_path / 'a.txt'))
  first, second = (
    open_tokenizer(BytePairs(vocab_size=300), corpus, (0,), ByPosition(), tmp_path / folder, print)
    for folder in ('one', 'two')
  )
  assert first.fingerprint() == second.fingerprint()
  assert len(first.encode('zyzzyva')) == 7  # never seen in training
  assert len(first.encode('the cat')) <= 2
  assert first.end_of_document == 0
  assert first.vocab_size < 300  # the text has no more pairs
  with pytest.raises(InputError, match=r'BytePairs\.vocab_size = 256: must be at least 257'):
    BytePairs(vocab_size=256)


def test_trained_file_is_deterministic(tmp_path, pairs):
  train_bpe(TOPICS, 600, tmp_path / 'again.json')
  assert (tmp_path / 'again.json').read_bytes() == Path(pairs).read_bytes()


def test_a_file_that_is_no_tokenizer_is_not_replaced(tmp_path, pairs):
  def texts():
    raise AssertionError('a text was read')
    yield ''

  (tmp_path / 'mine.txt').write_text('my text')
  (tmp_path / 'file').write_text('')
  for name, message in (
    ('mine.txt', 'exists and is no tokenizer.json'),
    ('', r'cannot be written \('),
    ('file/a.json', r'cannot be written \('),
    ('x' * 300, 'too long'),
  ):
    with pytest.raises(InputError, match=message):
      train_bpe(texts(), 600, tmp_path / name)
  assert (tmp_path / 'mine.txt').read_text() == 'my text'
  assert train_bpe(TOPICS[:3], 300, tmp_path / 'b.json') == 300
  assert train_bpe(TOPICS[:3], 280, tmp_path / 'b.json') == 280


def test_text_that_looks_like_a_special_token_is_text(pairs):
  tokenizer = TokenizerFile(path=pairs).train(())
  ids = tokenizer.encode('a <|endoftext|> b')
  assert tokenizer.end_of_document not in ids
  assert tokenizer.decode(ids) == 'a <|endoftext|> b'


def test_saved_tokenizers_come_back(tmp_path, every):
  characters = CharacterTokenizer('\n aé日')
  for i, tokenizer in enumerate([*every, characters]):
    (tmp_path / str(i)).mkdir()
    tokenizer.save(tmp_path / str(i))
    again = load_tokenizer(tmp_path / str(i))
    assert again.fingerprint() == tokenizer.fingerprint()
    assert again.encode('a é').tolist() == tokenizer.encode('a é').tolist()
    assert again.end_of_document == tokenizer.end_of_document
    assert np.array_equal(again.token_bytes, tokenizer.token_bytes)
  with pytest.raises(InputError, match='holds no tokenizer'):
    load_tokenizer(tmp_path)
  (tmp_path / 'tokenizer_kind.json').write_text('{"kind": "char')
  with pytest.raises(InputError, match='corrupt'):
    load_tokenizer(tmp_path)


def test_folder_of_a_hub_tokenizer(tmp_path, pairs):
  data = json.loads(Path(pairs).read_text())
  data['added_tokens'].append({**data['added_tokens'][0], 'id': 600, 'content': '</s>'})
  (tmp_path / 'tokenizer.json').write_text(json.dumps(data))

  def end(**fields):
    return TokenizerFile(path=str(tmp_path), **fields).train(()).end_of_document

  assert end() == 0
  assert end(end_of_document='</s>') == 600
  (tmp_path / 'tokenizer_config.json').write_text('{"eos_token": {"content": "</s>"}}')
  assert end() == 600
  (tmp_path / 'tokenizer_config.json').write_text('{"eos_token": "</s>"}')
  assert end() == 600
  with pytest.raises(
    InputError, match=r"end_of_document = '</t>' is not in the vocabulary; did you mean </s>"
  ):
    end(end_of_document='</t>')


def test_bad_tokenizer_files(tmp_path):
  def build(path):
    return TokenizerFile(path=str(path)).train(())

  with pytest.raises(InputError, match=r'tokenizer\.json: cannot be read \(No such file'):
    build(tmp_path)
  (tmp_path / 'x.json').write_text('{}')
  with pytest.raises(InputError, match=r'not a tokenizer\.json'):
    build(tmp_path / 'x.json')


def test_tokenizer_that_is_not_byte_level(tmp_path):
  import tokenizers as hf

  model = hf.Tokenizer(hf.models.BPE(unk_token='<unk>', byte_fallback=True))
  model.pre_tokenizer = hf.pre_tokenizers.Metaspace()
  model.decoder = hf.decoders.Sequence([hf.decoders.ByteFallback(), hf.decoders.Metaspace()])
  fallback = [f'<0x{b:02X}>' for b in range(256)]
  trainer = hf.trainers.BpeTrainer(
    vocab_size=500, special_tokens=['<unk>', '</s>'], show_progress=False
  )
  model.train_from_iterator(['the cat sat on the mat, the dog did not'] * 20, trainer)
  model.add_tokens(fallback)
  tokenizer = FileTokenizer(model.to_str(), None, 'here')
  text = 'the cat sat on the mat'
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  # The first token holds a space that decoding takes away: lengths count it.
  assert tokenizer.token_bytes[ids].sum() == len(text) + 1
  assert tokenizer.token_bytes[tokenizer.end_of_document] == 0


def test_trained_tokenizers_fit_the_cache(tmp_path):
  tokenizer = CharacterTokenizer('abc')
  calls = []

  def build(folder):
    calls.append(folder)
    tokenizer.save(folder)

  def load(folder):
    return load_tokenizer(folder) if folder.exists() else None

  for _ in range(2):
    assert (
      build_atomically(tmp_path / 'c' / 't', build, load).fingerprint() == tokenizer.fingerprint()
    )
  assert len(calls) == 1


@pytest.mark.quick
def test_the_hugging_face_form_is_the_same_tokenizer(tmp_path):
  import tokenizers as hf

  text = 'naïve\n\ttabs 日本 €'
  for tokenizer in (ByteTokenizer(), CharacterTokenizer(''.join(sorted(set(text))))):
    folder = tmp_path / type(tokenizer).__name__
    folder.mkdir()
    (folder / 'tokenizer.json').write_text(tokenizer.hugging_face())
    assert (
      hf.Tokenizer.from_file(str(folder / 'tokenizer.json')).encode(text).ids
      == tokenizer.encode(text).tolist()
    )
    again = load_tokenizer(folder)
    assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert again.decode(again.encode(text)) == text
    assert again.end_of_document == tokenizer.end_of_document
    assert again.token_bytes.tolist() == tokenizer.token_bytes.tolist()
