"""The cache: found again, built again when it must be, whole or not at all."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from jaxformer.config import InputError
from jaxformer.data import (
  ByDocument,
  ByPosition,
  BytePairs,
  Bytes,
  Characters,
  Files,
  Text,
  cache_dir,
  cache_folder,
  open_data,
  splits,
)
from jaxformer.files import WriteError
from jaxformer.user_code import load_file

TEXTS = [f'document {i} ' * 20 for i in range(60)]


def opened(path, **fields):
  """A dataset and what was logged on the way: nothing where the cache was found."""
  lines = []
  fields = {'tokenizer': Bytes(), 'sequence_length': 16} | fields
  return open_data(Text(corpus=Files(path=path), **fields), log=lines.append), lines


def everything(data):
  return [b.inputs for b in data.validation_batches(4)] + [
    data.train_batch(s, 4, 0).inputs for s in range(5)
  ]


def same(a, b):
  return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))


def token_files(cache, name='train.0.tokens'):
  return sorted(cache.glob(f'tokens-*/{name}'))


@pytest.mark.quick
@pytest.mark.parametrize('tokenizer', [Bytes(), Characters(), BytePairs(vocab_size=300)])
def test_built_once(corpus, tokenizer):
  path = corpus(TEXTS)
  first, lines = opened(path, tokenizer=tokenizer)
  assert lines
  second, lines = opened(path, tokenizer=tokenizer)
  assert not lines
  assert same(everything(first), everything(second))
  assert first.manifest == second.manifest
  assert json.loads(json.dumps(first.manifest)) == first.manifest


@pytest.mark.quick
def test_what_differs_is_built_anew(corpus, cache):
  path = corpus(TEXTS)
  opened(path)
  for count, fields in enumerate(
    [{'split': ByPosition()}, {'split': ByDocument(fraction=0.2)}, {'tokenizer': Characters()}], 2
  ):
    _, lines = opened(path, **fields)
    assert lines
    assert len(token_files(cache)) == count
  _, lines = opened(path, sequence_length=32)
  assert not lines


@pytest.mark.quick
@pytest.mark.parametrize('tokenizer', [Bytes(), Characters()])
def test_changed_content_is_noticed(corpus, tokenizer):
  path = corpus(TEXTS)
  before, _ = opened(path, tokenizer=tokenizer)
  corpus([t.replace('document', 'DOCUMENT') for t in TEXTS])  # the same size
  after, lines = opened(path, tokenizer=tokenizer)
  assert lines
  assert not same(everything(before), everything(after))


def truncate(path):
  os.truncate(path, path.stat().st_size // 2)


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


@pytest.mark.quick
@pytest.mark.parametrize('harm', [truncate, flip, os.unlink])
@pytest.mark.parametrize(
  'name',
  [
    'train.0.tokens',
    'validation.0.tokens',
    'train.0.starts.npy',
    'train.0.pairs.npy',
    'index.json',
  ],
)
def test_damage_is_repaired(corpus, cache, harm, name):
  path = corpus(TEXTS)
  whole = everything(opened(path)[0])
  harm(token_files(cache, name)[0])
  again, lines = opened(path)
  assert same(everything(again), whole)
  # a flip within a hash or a count is noticed; one within spaces need not be
  if (name, harm) != ('index.json', flip):
    assert lines
  assert [p.name for p in cache.iterdir() if p.name.startswith('.')] == []


@pytest.mark.quick
def test_damaged_vocabulary_is_learned_again(corpus, cache):
  path = corpus(TEXTS)
  whole = everything(opened(path, tokenizer=Characters())[0])
  truncate(next(cache.glob('tokenizer-*/tokenizer_kind.json')))
  again, lines = opened(path, tokenizer=Characters())
  assert len(lines) == 1
  assert same(everything(again), whole)


@pytest.mark.quick
def test_simultaneous_builds(corpus, cache, monkeypatch):
  path = corpus(TEXTS)
  together, original = threading.Barrier(4), splits.ByDocument.pieces

  def pieces(self, documents, survey):
    together.wait(10)  # all four are past the look into the cache
    yield from original(self, documents, survey)

  monkeypatch.setattr(splits.ByDocument, 'pieces', pieces)
  results, errors = [], []

  def work():
    try:
      results.append(everything(opened(path)[0]))
    except BaseException as e:
      errors.append(e)

  threads = [threading.Thread(target=work) for _ in range(4)]
  for t in threads:
    t.start()
  for t in threads:
    t.join()
  assert errors == []
  assert all(same(r, results[0]) for r in results)
  assert len(list(cache.iterdir())) == 1


@pytest.mark.quick
def test_failed_build_leaves_nothing(corpus, cache):
  path = corpus([*TEXTS, 'x'])
  with open(path, 'a') as file:
    file.write('{broken')
  with pytest.raises(InputError, match=r'corpus\.jsonl:62: not valid JSON'):
    opened(path)
  assert list(cache.iterdir()) == []


def test_killed_build_leaves_no_half_cache(corpus, cache):
  path = corpus([t * 50 for t in TEXTS])
  script = textwrap.dedent("""
    import sys, time
    from jaxformer.data import cache, Bytes, Text, Files, open_data
    cache.BATCH_BYTES = 1
    write = cache._Writer.write
    def slowly(self):
      write(self)
      self.file.flush()
      print('wrote', flush=True)
      time.sleep(0.2)
    cache._Writer.write = slowly
    open_data(Text(corpus=Files(path=sys.argv[1]), sequence_length=16), log=lambda line: None)
  """)
  process = subprocess.Popen(
    [sys.executable, '-c', script, path], stdout=subprocess.PIPE, text=True
  )
  assert process.stdout is not None
  for _ in range(3):
    assert process.stdout.readline() == 'wrote\n'
  process.send_signal(signal.SIGKILL)
  process.wait()
  process.stdout.close()
  left = list(cache.iterdir())
  assert len(left) == 1
  assert left[0].name.startswith('.building-')
  data, lines = opened(path)
  assert lines
  assert data.train_tokens + data.manifest['validation']['tokens'] == sum(
    len(t) * 50 + 1 for t in TEXTS
  )
  # What the killed build left goes once no build can be at work on it.
  old = time.time() - 2 * cache_folder.ABANDONED_SECONDS
  for p in [left[0], *left[0].iterdir()]:
    os.utime(p, (old, old))
  opened(path, split=ByPosition())
  assert not left[0].exists()


@pytest.mark.quick
def test_cache_that_cannot_be_written(corpus, tmp_path, monkeypatch):
  path = corpus(TEXTS)
  (tmp_path / 'file').write_text('')
  with pytest.raises(
    InputError, match=r'cache folder .*file.*: cannot be written \(.*\); set JAXFORMER_CACHE'
  ):
    open_data(
      Text(corpus=Files(path=path), sequence_length=16), cache_dir=tmp_path / 'file' / 'inside'
    )

  def refuse(*args, **kwargs):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr(os, 'mkdir', refuse)  # permissions do not bind the superuser
  with pytest.raises(
    InputError, match=r'cannot be written \(Permission denied\); set JAXFORMER_CACHE'
  ):
    opened(path)


@pytest.mark.quick
def test_cache_within_the_corpus(tmp_path):
  (tmp_path / 'texts').mkdir()
  for i in range(9):
    (tmp_path / 'texts' / f'{i}.txt').write_text(TEXTS[i])
  data = Text(corpus=Files(path=str(tmp_path / 'texts')), sequence_length=16, split=ByPosition())
  with pytest.raises(
    InputError,
    match=r'contains the cache folder .*texts/cache; set JAXFORMER_CACHE to a folder outside',
  ):
    open_data(data, cache_dir=tmp_path / 'texts' / 'cache')
  open_data(data, cache_dir=tmp_path / 'texts' / '.cache')  # hidden files are no part of a corpus
  lines = []
  open_data(data, cache_dir=tmp_path / 'texts' / '.cache', log=lines.append)
  assert not lines


@pytest.mark.quick
def test_where_the_cache_is(monkeypatch, tmp_path):
  assert cache_dir() == tmp_path / 'cache'
  monkeypatch.delenv('JAXFORMER_CACHE')
  monkeypatch.setenv('XDG_CACHE_HOME', '/elsewhere')
  assert str(cache_dir()) == '/elsewhere/jaxformer'
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv('HOME', '/home/someone')
  assert str(cache_dir()) == '/home/someone/.cache/jaxformer'


@pytest.mark.quick
def test_long_documents_come_in_pieces(corpus, monkeypatch, cache):
  texts = ['word\n' * 5000 + str(i) for i in range(3)]
  path = corpus(texts)
  for tokenizer in (Bytes(), BytePairs(vocab_size=260)):
    whole = everything(opened(path, tokenizer=tokenizer)[0])
    with monkeypatch.context() as m:
      m.setattr('jaxformer.data.cache.BATCH_BYTES', 3000)
      m.setattr('jaxformer.data.pieces.SIZE', 1000)
      for p in cache.glob('tokens-*/index.json'):
        p.unlink()
      data, lines = opened(path, tokenizer=tokenizer)
    assert lines
    assert same(everything(data), whole)
    assert data.manifest['train']['documents'] + data.manifest['validation']['documents'] == 3


@pytest.mark.quick
def test_large_vocabularies_take_four_bytes(corpus, cache, tmp_path):
  path = corpus(
    [
      ''.join(chr(0x4E00 + (i * 5000 + j) % 66000 + 0x10000) for j in range(5000))
      for i in range(15)
    ]
  )
  data, _ = opened(path, tokenizer=Characters())
  assert data.vocab_size > 65_536
  assert token_files(cache)[0].stat().st_size == 4 * data.train_tokens
  texts = [json.loads(line)['text'] for line in Path(path).read_text().splitlines()]
  decoded = data.tokenizer.decode(data._validation[0].tokens_N)
  assert {decoded[i : i + 5000] for i in range(0, len(decoded), 5000)} < set(texts)


OWN = """
from jaxformer.data import Corpus, Row, TokenizerConfig
from jaxformer.data.tokenizers import ByteTokenizer

class Numbers(Corpus):
  path_fields = ()
  def rows(self):
    return (Row((f'WORD {i} ' * 9,)) for i in range(60))

class Shifted(ByteTokenizer):
  def encode(self, text):
    return (super().encode(text) + SHIFT) % 256

class Shift(TokenizerConfig):
  def train(self, texts):
    return Shifted()
"""


@pytest.mark.quick
@pytest.mark.parametrize('changed', [{'WORD': 'two'}, {'SHIFT': '2'}])
def test_code_of_a_user_is_part_of_what_a_cache_is_found_by(tmp_path, changed):
  file, found = tmp_path / 'own.py', []
  for words in ({}, {}, changed):
    text = OWN
    for name, value in ({'WORD': 'one', 'SHIFT': '1'} | words).items():
      text = text.replace(name, value)
    file.write_text(text)
    own, lines = load_file(file), []
    data = Text(corpus=own.Numbers(), tokenizer=own.Shift(), sequence_length=16)
    found.append((open_data(data, log=lines.append).identity['train'], bool(lines)))
  assert [built for _, built in found] == [True, False, True]
  assert found[0][0] == found[1][0] != found[2][0]


@pytest.mark.quick
def test_a_full_disk_and_a_cache_that_can_only_be_read(corpus, cache, monkeypatch):
  path = corpus(TEXTS)
  whole = everything(opened(path)[0])

  def full(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as m:
    for name in ('mkdir', 'rename', 'replace'):
      m.setattr(os, name, full)
    again, lines = opened(path)  # nothing is written where the cache is found
    assert same(everything(again), whole)
    assert not lines
  with monkeypatch.context() as m:
    m.setattr(np, 'save', full)
    with pytest.raises(WriteError, match=r'cannot be written \(No space left on device\); set JAX'):
      opened(path, split=ByPosition())
  assert len(list(cache.iterdir())) == 1
