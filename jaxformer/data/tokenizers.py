"""Tokenizers: bytes, characters, byte pairs trained on the corpus, and any `tokenizer.json`."""

from __future__ import annotations

import copy
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
from jaxtyping import Int32

from jaxformer.config import Config, InputError, nearest
from jaxformer.data.cache_folder import sha256
from jaxformer.data.missing import Missing
from jaxformer.data.readers import read_text
from jaxformer.files import write_atomically

END_OF_DOCUMENT = '<|endoftext|>'
USUAL_ENDS = (END_OF_DOCUMENT, '<|end_of_text|>', '</s>', '<|eot_id|>', '<eos>', '[SEP]')
KIND_FILE = 'tokenizer_kind.json'
SOURCE_FOLDER = 'source'
PIECE_CHARACTERS = 1 << 20
WORD_LINE_WORD = re.compile(r'(?<=[^\W_]\n)(?=[^\W_])')
Ids = Iterable[int] | np.ndarray


class Tokenizer:
  """Text to token ids 0..vocab_size-1 and back. A subclass adds `encode`.

  Args:
    token_texts: bytes of each token.
    kind: what `load_tokenizer` needs besides a `tokenizer.json`, as JSON data.

  Attributes:
    files: what `save` writes, by the names of the files.
    end_of_document: id that ends every document; None where the vocabulary has no such token.
    token_bytes: UTF-8 bytes of text per token; 0 for special tokens. Exact for bytes, characters
      and byte-level BPE.
  """

  def __init__(
    self, token_texts: Sequence[bytes], end_of_document: int | None, kind: dict[str, Any]
  ):
    self.end_of_document, self.files = end_of_document, {KIND_FILE: json.dumps(kind)}
    self._bytes = token_texts
    self._source: Tokenizer | None = None
    self.token_bytes: Int32[np.ndarray, ' V'] = np.array([len(b) for b in token_texts], np.int32)

  def encode(self, text: str) -> Int32[np.ndarray, ' T']:
    """Return the ids, without an end of document. Text that looks like a special token is text.
    Raises `InputError` for text that no token stands for."""
    raise NotImplementedError

  def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, ' T']]:
    """Encode each text."""
    return [self.encode(t) for t in texts]

  def decode(self, ids: Ids) -> str:
    """Return the text; bytes that are not valid UTF-8 become U+FFFD, special tokens nothing. Raises
    `InputError` for an id out of range."""
    return self.decode_bytes(ids).decode('utf-8', 'replace')

  def decode_bytes(self, ids: Ids) -> bytes:
    """Return the bytes of the text: parts of a sequence decode to parts of its bytes (where
    `token_bytes` is exact)."""
    return b''.join(self._bytes[i] for i in self._checked(ids))

  def pieces(self, text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut the text into pieces of about `size` characters whose encodings, joined, are the encoding
    of the text."""
    return (text[i : i + size] for i in range(0, len(text), size))

  def hugging_face(self) -> str:
    """Return the same tokenizer as the text of a Hugging Face `tokenizer.json`."""
    raise NotImplementedError

  @property
  def vocab_size(self) -> int:
    return len(self.token_bytes)

  @property
  def source(self) -> Tokenizer:
    """The tokenizer of the sources, where this one is of their translations: itself, unless set by
    `with_source`."""
    return self._source or self

  def with_source(self, source: Tokenizer) -> Tokenizer:
    """Return this tokenizer with another one for the sources of pairs."""
    pair = copy.copy(self)
    pair._source = source
    return pair

  def fingerprint(self) -> str:
    """Return a hash (hex) that changes when an encoding can."""
    own = sha256(*itertools.chain(*self.files.items()))
    return own if self._source is None else sha256('pair', self._source.fingerprint(), own)

  def manifest(self) -> dict[str, Any]:
    """Return what a run records about the tokenizer, as JSON data."""
    name = type(self).__name__
    return {'type': name, 'vocab_size': self.vocab_size, 'fingerprint': self.fingerprint()}

  def save(self, folder: Path | str) -> None:
    """Write what `load_tokenizer` needs into an existing folder; another tokenizer of the sources
    into its folder `source`."""
    folder = Path(folder)
    try:
      for name, text in self.files.items():
        write_atomically(folder / name, text)
      if self._source is not None:
        (folder / SOURCE_FOLDER).mkdir(exist_ok=True)
        self._source.save(folder / SOURCE_FOLDER)
    except OSError as e:
      raise InputError(f'{folder}: cannot be written ({e.strerror})') from None

  def _checked(self, ids: Ids) -> list[int]:
    ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64).reshape(-1)
    wrong = ids[(ids < 0) | (ids >= self.vocab_size)]
    if wrong.size:
      raise InputError(
        f'token id {wrong[0]}: the vocabulary has {self.vocab_size} tokens, ids 0 to '
        f'{self.vocab_size - 1}'
      )
    return ids.tolist()


def _encoded(text: str, encoding: str) -> bytes:
  try:
    return text.encode(encoding)
  except UnicodeEncodeError as e:
    raise InputError(f'text: half a surrogate pair at character {e.start}') from None


class ByteTokenizer(Tokenizer):
  """Ids 0..255 are bytes, 256 is the end of a document."""

  def __init__(self):
    super().__init__([*(bytes([b]) for b in range(256)), b''], 256, {'kind': 'bytes'})

  def encode(self, text: str) -> Int32[np.ndarray, ' T']:
    return np.frombuffer(_encoded(text, 'utf-8'), np.uint8).astype(np.int32)

  def hugging_face(self) -> str:
    import tokenizers as hf

    # BPE without merges; characters of GPT-2 stand for the bytes.
    model = hf.Tokenizer(hf.models.BPE(vocab=_gpt2_bytes(), merges=[]))
    model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = hf.decoders.ByteLevel()
    model.add_special_tokens([END_OF_DOCUMENT])
    return model.to_str()


class CharacterTokenizer(Tokenizer):
  """Id i is the i-th of the given characters, which are distinct."""

  def __init__(self, characters: str):
    kind = {'kind': 'characters', 'characters': characters}
    super().__init__([c.encode() for c in characters], None, kind)
    self.characters = characters
    self._ids = np.full(sys.maxunicode + 1, -1, np.int32)
    self._ids[[ord(c) for c in characters]] = np.arange(len(characters))

  def encode(self, text: str) -> Int32[np.ndarray, ' T']:
    points = np.frombuffer(_encoded(text, 'utf-32-le'), '<u4')
    ids = self._ids[points]
    if (ids < 0).any():
      unknown = chr(points[int(np.argmax(ids < 0))])
      raise InputError(
        f'text: the character {unknown!r} is not among the {self.vocab_size} of the vocabulary'
      )
    return ids

  def hugging_face(self) -> str:
    import tokenizers as hf

    model = hf.Tokenizer(hf.models.WordLevel(vocab={c: i for i, c in enumerate(self.characters)}))
    model.pre_tokenizer = hf.pre_tokenizers.Split(hf.Regex(r'[\s\S]'), 'isolated')
    model.decoder = hf.decoders.Fuse()
    return model.to_str()


class FileTokenizer(Tokenizer):
  """A Hugging Face `tokenizer.json`.

  Args:
    data: its text.
    end: the token that ends a document; None for the first usual one that the vocabulary has, if
      there is one.
    where: for messages.
  """

  def __init__(self, data: str, end: str | None, where: str):
    import tokenizers as hf

    try:
      self._model = hf.Tokenizer.from_str(data)
    except Exception as e:  # the library raises a plain Exception
      raise InputError(f'{where}: not a tokenizer.json ({e})') from None
    self._model.no_truncation()
    self._model.no_padding()
    self._model.encode_special_tokens = True  # text that looks like a special token is text
    vocabulary = self._model.get_vocab(with_added_tokens=True)
    if end is None:
      end = next((t for t in USUAL_ENDS if t in vocabulary), None)
    if end is not None and end not in vocabulary:
      specials = [t.content for t in self._model.get_added_tokens_decoder().values() if t.special]
      raise InputError(
        f'{where}: end_of_document = {end!r} is not in the vocabulary{nearest(end, specials)}'
      )
    end_id = None if end is None else vocabulary[end]
    self._byte_level = _is_byte_level(json.loads(data))
    table = _byte_table(self._model, max(vocabulary.values()) + 1, end_id)
    super().__init__(table, end_id, {'kind': 'tokenizer.json', 'end_of_document': end})
    self.files = {'tokenizer.json': data} | self.files
    if not self._byte_level:
      self.token_bytes = _decoded_lengths(self._model, self.vocab_size, end_id)

  def encode(self, text: str) -> Int32[np.ndarray, ' T']:
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, ' T']]:
    for text in texts:
      if not text.isascii():
        _encoded(text, 'utf-8')
    encoded = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(e.ids, np.int32) for e in encoded]

  def decode(self, ids: Ids) -> str:
    if self._byte_level:
      return super().decode(ids)
    kept = [i for i in self._checked(ids) if i != self.end_of_document]
    return self._model.decode(kept, skip_special_tokens=True)

  def decode_bytes(self, ids: Ids) -> bytes:
    return super().decode_bytes(ids) if self._byte_level else self.decode(ids).encode()

  def pieces(self, text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    return _line_pieces(text, size) if self._byte_level else iter([text])

  def hugging_face(self) -> str:
    return self.files['tokenizer.json']


# ---- tokenizer.json ----------------------------------------------------------------------------


def _line_pieces(text: str, size: int) -> Iterator[str]:
  """Cut only after a line end between two letters or digits: neither the pattern of GPT-2 nor those
  derived from it (cl100k, Llama 3, o200k) join the two sides of such a place."""
  start = 0
  while len(text) - start > size:
    cut = WORD_LINE_WORD.search(text, start + size)
    if cut is None:
      break
    yield text[start : cut.start()]
    start = cut.start()
  yield text[start:]


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
  """Return the steps of a pre-tokenizer or decoder, which is one step or a sequence of them."""
  return [] if part is None else cast(list, part[inner]) if part['type'] == 'Sequence' else [part]


def _is_byte_level(data: dict[str, Any]) -> bool:
  """Whether tokens stand for exact bytes of the text: no normalizer, no added prefix, bytes written
  as in GPT-2."""
  before = _steps(data.get('pre_tokenizer'), 'pretokenizers')
  levels = [s for s in before if s['type'] == 'ByteLevel']
  return (
    data.get('normalizer') is None
    and [s['type'] for s in _steps(data.get('decoder'), 'decoders')] == ['ByteLevel']
    and len(levels) == 1
    and not levels[0].get('add_prefix_space')
    and all(s['type'] in ('ByteLevel', 'Split', 'Digits') for s in before)
    and not any(s.get('behavior') == 'Removed' for s in before)
  )


def _gpt2_bytes() -> dict[str, int]:
  """Return the bytes by the visible characters with which GPT-2 writes them: a byte that is visible
  itself, else characters from 256 on."""
  visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  rest = [b for b in range(256) if b not in visible]
  return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(rest)}


def _byte_table(model: Any, vocab_size: int, end: int | None) -> list[bytes]:
  """Return the bytes of every token; none for special tokens, the end of a document and unused
  ids."""
  table, alphabet = [b''] * vocab_size, _gpt2_bytes()
  added = model.get_added_tokens_decoder()
  for token, index in model.get_vocab(with_added_tokens=True).items():
    if index in added:
      table[index] = b'' if added[index].special else token.encode()
    else:
      table[index] = bytes(alphabet[c] for c in token if c in alphabet)
  if end is not None:
    table[end] = b''
  return table


def _decoded_lengths(model: Any, vocab_size: int, end: int | None) -> Int32[np.ndarray, ' V']:
  """Return the UTF-8 bytes that each token adds after another one: decoders strip the start of a
  text, so alone it can be shorter."""
  special = {end} | {i for i, t in model.get_added_tokens_decoder().items() if t.special}
  used = sorted(set(model.get_vocab(with_added_tokens=True).values()) - special)
  alone = model.decode_batch([[i] for i in used], skip_special_tokens=True)
  before = next((i for i, text in zip(used, alone) if text.isalnum() and text.isascii()), used[0])
  base = len(model.decode([before], skip_special_tokens=True).encode())
  lengths = np.zeros(vocab_size, np.int32)
  after = model.decode_batch([[before, i] for i in used], skip_special_tokens=True)
  for i, text in zip(used, after, strict=True):
    is_byte = re.fullmatch(r'<0x[0-9A-Fa-f]{2}>', model.id_to_token(i))
    lengths[i] = 1 if is_byte else max(len(text.encode()) - base, 0)
  return lengths


# ---- configs -----------------------------------------------------------------------------------


class TokenizerConfig(Config, abstract=True):
  """Which tokenizer an experiment uses."""

  # Whether it is trained on the corpus; the result is then kept in the cache.
  needs_training: ClassVar[bool] = False
  # Whether it is trained on the validation text too.
  reads_all: ClassVar[bool] = False

  def missing(self) -> Missing | None:
    """Return what the config stands for where it makes no tokenizer; None for one that does."""
    return None

  def train(self, texts: Iterable[str]) -> Tokenizer:
    """Return the tokenizer, trained on `texts` where it `needs_training`."""
    raise NotImplementedError


class Bytes(TokenizerConfig):
  """UTF-8 bytes, and one token for the end of a document: a vocabulary of 257 for any text."""

  def train(self, texts: Iterable[str]) -> Tokenizer:
    return ByteTokenizer()


class Characters(TokenizerConfig):
  """The distinct characters of the corpus, sorted, as in the published character-level benchmarks:
  of all its text, without an end of document."""

  needs_training: ClassVar[bool] = True
  reads_all: ClassVar[bool] = True

  def train(self, texts: Iterable[str]) -> Tokenizer:
    seen: set[str] = set()
    for text in texts:
      seen.update(text)
    if not seen:
      raise InputError(f'{self.tag}: the corpus holds no text')
    return CharacterTokenizer(''.join(sorted(seen)))


class BytePairs(TokenizerConfig):
  """Byte-level byte-pair encoding (Sennrich et al. 2016; on bytes as in GPT-2), trained on the
  training text.

  A small corpus can run out of pairs before `vocab_size`; the vocabulary is then smaller.
  """

  vocab_size: int = 4096

  needs_training: ClassVar[bool] = True

  def validate(self) -> None:
    self.require(
      self.vocab_size >= 257, 'vocab_size', 'at least 257: the bytes and the end of a document'
    )

  def train(self, texts: Iterable[str]) -> Tokenizer:
    import tokenizers as hf

    texts = iter(texts)
    first = next((t for t in texts if t), None)
    if first is None:
      raise InputError(f'{self.tag}: the corpus holds no text')
    model = hf.Tokenizer(hf.models.BPE())
    model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
      vocab_size=self.vocab_size,
      initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
      special_tokens=[END_OF_DOCUMENT],
      show_progress=False,
    )
    pieces = (_line_pieces(t, PIECE_CHARACTERS) for t in itertools.chain([first], texts))
    model.train_from_iterator(itertools.chain.from_iterable(pieces), trainer)
    return FileTokenizer(model.to_str(), END_OF_DOCUMENT, self.tag)


class TokenizerFile(TokenizerConfig):
  """A Hugging Face `tokenizer.json`, or a folder that holds one. The end of a document is the token
  named here, else the `eos_token` of `tokenizer_config.json` beside it, else the first usual one
  that the vocabulary has, else there is none."""

  path: str
  end_of_document: str | None = None

  def train(self, texts: Iterable[str]) -> Tokenizer:
    path, where = Path(self.path).expanduser(), f'{self.tag}.path = {self.path!r}'
    path = path / 'tokenizer.json' if path.is_dir() else path
    try:
      data = read_text(path)
    except InputError as e:
      raise InputError(f'{where}: {e}') from None
    return FileTokenizer(data, self.end_of_document or _configured_end(path), where)


def _configured_end(path: Path) -> str | None:
  try:
    config = json.loads((path.parent / 'tokenizer_config.json').read_text(encoding='utf-8'))
    end = config.get('eos_token')
  except (OSError, ValueError, AttributeError):
    return None
  return end.get('content') if isinstance(end, dict) else end


def train_bpe(texts: Iterable[str], vocab_size: int, out_path: Path | str) -> int:
  """Train byte pairs on texts and write a `tokenizer.json`. The same texts give the same file.
  Returns the size of the vocabulary, smaller than `vocab_size` where the texts run out of pairs."""
  tokenizer = BytePairs(vocab_size=vocab_size).train(texts)
  out_path = Path(out_path)
  try:
    out_path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out_path, tokenizer.hugging_face())
  except OSError as e:
    raise InputError(f'{out_path}: cannot be written ({e.strerror})') from None
  return tokenizer.vocab_size


# ---- saved tokenizers --------------------------------------------------------------------------


def load_tokenizer(folder: Path | str) -> Tokenizer:
  """Return the tokenizer that `save` wrote into a folder, or the `tokenizer.json` of a folder from
  elsewhere."""
  folder = Path(folder)
  try:
    tokenizer = _load(folder)
    if (folder / SOURCE_FOLDER / KIND_FILE).exists():
      tokenizer = tokenizer.with_source(_load(folder / SOURCE_FOLDER))
    return tokenizer
  except OSError as e:
    raise InputError(f'{folder}: holds no tokenizer ({e.filename}: {e.strerror})') from None
  except InputError:
    raise
  except (ValueError, KeyError, TypeError) as e:
    raise InputError(f'{folder / KIND_FILE}: corrupt ({e})') from None


def _load(folder: Path) -> Tokenizer:
  path = folder / 'tokenizer.json'
  if not (folder / KIND_FILE).exists() and path.exists():
    return FileTokenizer(path.read_text(encoding='utf-8'), _configured_end(path), str(folder))
  saved = json.loads((folder / KIND_FILE).read_text(encoding='utf-8'))
  if saved['kind'] == 'bytes':
    return ByteTokenizer()
  if saved['kind'] == 'characters':
    return CharacterTokenizer(saved['characters'])
  return FileTokenizer(path.read_text(encoding='utf-8'), saved['end_of_document'], str(folder))
