"""Text to numbers and back: bytes, characters, any `tokenizer.json`, and byte pairs learned from
the corpus."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import numpy as np
from jaxtyping import Int32

from jaxformer.config import Config, InputError, nearest
from jaxformer.data.pair_tokenizer import SOURCE_FOLDER, PairTokenizer
from jaxformer.data.sources import Source
from jaxformer.data.splits import Split, divide
from jaxformer.data.storage import sha256, write_atomically

END_OF_DOCUMENT = '<|endoftext|>'
USUAL_ENDS = (END_OF_DOCUMENT, '<|end_of_text|>', '</s>', '<|eot_id|>', '<eos>', '[SEP]')
KIND_FILE = 'tokenizer_kind.json'
PIECE_CHARACTERS = 1 << 20
WORD_LINE_WORD = re.compile(r'(?<=[^\W_]\n)(?=[^\W_])')
Ids = Iterable[int] | np.ndarray


@runtime_checkable
class Tokenizer(Protocol):
  """The face of every tokenizer. Ids are 0..vocab_size-1."""

  vocab_size: int
  # The id that stands after every document; None where the vocabulary has no such token.
  end_of_document: int | None
  # How many UTF-8 bytes of text a token stands for; 0 for special tokens. Exact for bytes,
  # characters and byte-level BPE.
  token_bytes: Int32[np.ndarray, ' V']

  def encode(self, text: str) -> Int32[np.ndarray, ' T']:
    """The ids, without an end of document. Text that looks like a special token is text.
    `InputError` for what has no token."""
    ...

  def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, ' T']]:
    """`encode` of each text."""
    ...

  def decode(self, ids: Ids) -> str:
    """The text; bytes that are not valid UTF-8 become U+FFFD, special tokens nothing. `InputError`
    for an id out of range."""
    ...

  def decode_bytes(self, ids: Ids) -> bytes:
    """The exact bytes of the text: pieces of a sequence decode to pieces of its bytes (where
    `token_bytes` is exact)."""
    ...

  def pieces(self, text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """The text cut into pieces of about `size` characters whose encodings, joined, are the encoding
    of the whole."""
    ...

  def fingerprint(self) -> str:
    """A hash (hex) that changes when an encoding can."""
    ...

  def hugging_face(self) -> str:
    """The same tokenizer as the text of a Hugging Face `tokenizer.json`."""
    ...

  def save(self, folder: Path | str) -> None:
    """Writes what `load_tokenizer` needs into an existing folder."""
    ...


class TokenizerConfig(Config, abstract=True):
  """Which tokenizer an experiment uses."""

  # Whether building it means reading the corpus; the result is then kept in the cache.
  learned: ClassVar[bool] = False

  def build(self, source: Source, split: Split) -> Tokenizer:
    """The tokenizer, learned from the text to train on where it is `learned`."""
    return self.learn(
      p.text for p in divide(source.documents, split, source.tag) if p.side == 'train'
    )

  def learn(self, texts: Iterator[str]) -> Tokenizer:
    """The tokenizer, learned from all of `texts` where it is `learned`, else without a look at
    them."""
    raise NotImplementedError


class Bytes(TokenizerConfig):
  """UTF-8 bytes, and one token for the end of a document: a vocabulary of 257 that any text
  fits."""

  def learn(self, texts: Iterator[str]) -> Tokenizer:
    return ByteTokenizer()


class Characters(TokenizerConfig):
  """The distinct characters of the corpus, sorted, as in the published character-level benchmarks:
  no end of document."""

  learned: ClassVar[bool] = True

  def build(self, source: Source, split: Split) -> Tokenizer:
    return self.learn(d.text for d in source.documents())

  def learn(self, texts: Iterator[str]) -> Tokenizer:
    seen: set[str] = set()
    for text in texts:
      seen.update(text)
    if not seen:
      raise InputError(f'{self.tag}: the corpus holds no text')
    return CharacterTokenizer(''.join(sorted(seen)))


class BytePairs(TokenizerConfig):
  """Byte-level byte-pair encoding (Sennrich et al. 2016; on bytes as in GPT-2), learned from the
  text to train on.

  A small corpus can run out of pairs before `vocab_size`; the vocabulary is then smaller.
  """

  vocab_size: int = 4096

  learned: ClassVar[bool] = True

  def validate(self) -> None:
    self.require(
      self.vocab_size >= 257, 'vocab_size', 'at least 257: the bytes and the end of a document'
    )

  def learn(self, texts: Iterator[str]) -> Tokenizer:
    return FileTokenizer(_learn_pairs(texts, self.vocab_size), END_OF_DOCUMENT, self.tag)


class TokenizerFile(TokenizerConfig):
  """A Hugging Face `tokenizer.json`, or a folder that holds one. The end of a document is the token
  named here, else the `eos_token` of `tokenizer_config.json` beside it, else the first usual one
  that the vocabulary has, else there is none."""

  path: str
  end_of_document: str | None = None

  def learn(self, texts: Iterator[str]) -> Tokenizer:
    path = Path(self.path).expanduser()
    path = path / 'tokenizer.json' if path.is_dir() else path
    try:
      data = path.read_text(encoding='utf-8')
    except OSError as e:
      raise InputError(
        f'{self.tag}.path = {self.path!r}: {path.name} cannot be read ({e.strerror})'
      ) from None
    except UnicodeDecodeError as e:
      raise InputError(
        f'{self.tag}.path = {self.path!r}: not valid UTF-8 at byte offset {e.start}'
      ) from None
    return FileTokenizer(
      data, self.end_of_document or _configured_end(path), f'{self.tag}.path = {self.path!r}'
    )


def _configured_end(path: Path) -> str | None:
  try:
    end = json.loads((path.parent / 'tokenizer_config.json').read_text(encoding='utf-8')).get(
      'eos_token'
    )
  except (OSError, ValueError, AttributeError):
    return None
  return end.get('content') if isinstance(end, dict) else end


def train_bpe(
  source: Source, vocab_size: int, out_path: Path | str, split: Split | None = None
) -> int:
  """Learns byte pairs from a source (with a `split`, from its training side alone) and writes a
  `tokenizer.json` to `out_path`. The same text gives the same file. Returns the size of the
  vocabulary, smaller than asked where the text runs out of pairs."""
  if split is None:
    return write_bpe((d.text for d in source.documents()), vocab_size, out_path)
  return write_bpe(
    (p.text for p in divide(source.documents, split, source.tag) if p.side == 'train'),
    vocab_size,
    out_path,
  )


def write_bpe(texts: Iterator[str], vocab_size: int, out_path: Path | str) -> int:
  """`train_bpe` on texts at hand."""
  data = _learn_pairs(texts, BytePairs(vocab_size=vocab_size).vocab_size)
  out_path = Path(out_path)
  try:
    out_path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out_path, data.encode())
  except OSError as e:
    raise InputError(f'{out_path}: cannot be written ({e.strerror})') from None
  return FileTokenizer(data, END_OF_DOCUMENT, str(out_path)).vocab_size


def _learn_pairs(texts: Iterator[str], vocab_size: int) -> str:
  """The text of a `tokenizer.json`."""
  import tokenizers as hf

  first = next((t for t in texts if t), None)
  if first is None:
    raise InputError('byte pairs: there is no text to learn from')
  model = hf.Tokenizer(hf.models.BPE())
  model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = hf.decoders.ByteLevel()
  trainer = hf.trainers.BpeTrainer(
    vocab_size=vocab_size,
    initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
    special_tokens=[END_OF_DOCUMENT],
    show_progress=False,
  )
  pieces = (
    piece
    for text in itertools.chain([first], texts)
    for piece in _line_pieces(text, PIECE_CHARACTERS)
  )
  model.train_from_iterator(pieces, trainer)
  return model.to_str()


def load_tokenizer(folder: Path | str) -> Tokenizer:
  """The tokenizer that `save` wrote into a folder, or the `tokenizer.json` of a folder from
  elsewhere."""
  folder = Path(folder)
  try:
    if (folder / SOURCE_FOLDER / KIND_FILE).exists():
      return PairTokenizer(load_tokenizer(folder / SOURCE_FOLDER), _load(folder))
    return _load(folder)
  except OSError as e:
    raise InputError(f'{folder}: holds no tokenizer ({e.filename}: {e.strerror})') from None
  except (ValueError, KeyError, TypeError) as e:
    raise (
      e if isinstance(e, InputError) else InputError(f'{folder / KIND_FILE}: damaged ({e})')
    ) from None


def _load(folder: Path) -> Tokenizer:
  if not (folder / KIND_FILE).exists() and (folder / 'tokenizer.json').exists():
    path = folder / 'tokenizer.json'
    return FileTokenizer(path.read_text(encoding='utf-8'), _configured_end(path), str(folder))
  data = json.loads((folder / KIND_FILE).read_text(encoding='utf-8'))
  if data['kind'] == 'bytes':
    return ByteTokenizer()
  if data['kind'] == 'characters':
    return CharacterTokenizer(data['characters'])
  model = (folder / 'tokenizer.json').read_text(encoding='utf-8')
  return FileTokenizer(model, data['end_of_document'], str(folder), find_end=False)


def _save(folder: Path | str, files: dict[str, str]) -> None:
  for name, text in files.items():
    try:
      write_atomically(Path(folder) / name, text.encode())
    except OSError as e:
      raise InputError(f'{folder}: cannot be written ({e.strerror})') from None


def _checked(ids: Ids, vocab_size: int) -> np.ndarray:
  ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64).reshape(-1)
  wrong = ids[(ids < 0) | (ids >= vocab_size)]
  if wrong.size:
    raise InputError(
      f'token id {wrong[0]}: the vocabulary has {vocab_size} tokens, ids 0 to {vocab_size - 1}'
    )
  return ids


def _encoded(text: str, encoding: str) -> bytes:
  try:
    return text.encode(encoding)
  except UnicodeEncodeError as e:
    raise InputError(f'text: half a surrogate pair at character {e.start}') from None


def _slices(text: str, size: int) -> Iterator[str]:
  return (text[i : i + size] for i in range(0, len(text), size))


def _line_pieces(text: str, size: int) -> Iterator[str]:
  """Cut only after a line end between two letters or digits: there neither the pattern of GPT-2 nor
  those derived from it (cl100k, Llama 3, o200k) join what stands on both sides."""
  start = 0
  while len(text) - start > size:
    cut = WORD_LINE_WORD.search(text, start + size)
    if cut is None:
      break
    yield text[start : cut.start()]
    start = cut.start()
  yield text[start:]


class ByteTokenizer:
  """Ids 0..255 are bytes, 256 is the end of a document."""

  vocab_size = 257
  end_of_document: int | None = 256

  def __init__(self):
    self.token_bytes = np.concatenate([np.ones(256, np.int32), np.zeros(1, np.int32)])

  def encode(self, text: str) -> Int32[np.ndarray, ' T']:
    return np.frombuffer(_encoded(text, 'utf-8'), np.uint8).astype(np.int32)

  def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, ' T']]:
    return [self.encode(t) for t in texts]

  def decode(self, ids: Ids) -> str:
    return self.decode_bytes(ids).decode('utf-8', 'replace')

  def decode_bytes(self, ids: Ids) -> bytes:
    checked = _checked(ids, self.vocab_size)
    return checked[checked < 256].astype(np.uint8).tobytes()

  def pieces(self, text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    return _slices(text, size)

  def fingerprint(self) -> str:
    return sha256('bytes')

  def save(self, folder: Path | str) -> None:
    _save(folder, {KIND_FILE: json.dumps({'kind': 'bytes'})})

  def hugging_face(self) -> str:
    import tokenizers as hf

    # Byte pairs without a pair; GPT-2's stand-in characters name the bytes.
    model = hf.Tokenizer(hf.models.BPE(vocab=_gpt2_bytes(), merges=[]))
    model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = hf.decoders.ByteLevel()
    model.add_special_tokens([END_OF_DOCUMENT])
    return model.to_str()


class CharacterTokenizer:
  """Id i is the i-th of the given characters, which are distinct."""

  end_of_document: int | None = None

  def __init__(self, characters: str):
    self.characters = characters
    self.vocab_size = len(characters)
    self.token_bytes = np.array([len(c.encode()) for c in characters], np.int32)
    self._points = np.array([ord(c) for c in characters], np.uint32)
    self._ids = np.full(sys.maxunicode + 1, -1, np.int32)
    self._ids[self._points] = np.arange(self.vocab_size)

  def encode(self, text: str) -> Int32[np.ndarray, ' T']:
    points = np.frombuffer(_encoded(text, 'utf-32-le'), '<u4')
    ids = self._ids[points]
    if (ids < 0).any():
      unknown = chr(points[int(np.argmax(ids < 0))])
      raise InputError(
        f'text: the character {unknown!r} is not among the {self.vocab_size} of the vocabulary'
      )
    return ids

  def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, ' T']]:
    return [self.encode(t) for t in texts]

  def decode(self, ids: Ids) -> str:
    return self._points[_checked(ids, self.vocab_size)].astype('<u4').tobytes().decode('utf-32-le')

  def decode_bytes(self, ids: Ids) -> bytes:
    return self.decode(ids).encode()

  def pieces(self, text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    return _slices(text, size)

  def fingerprint(self) -> str:
    return sha256('characters', self.characters)

  def save(self, folder: Path | str) -> None:
    _save(folder, {KIND_FILE: json.dumps({'kind': 'characters', 'characters': self.characters})})

  def hugging_face(self) -> str:
    import tokenizers as hf

    model = hf.Tokenizer(hf.models.WordLevel(vocab={c: i for i, c in enumerate(self.characters)}))
    model.pre_tokenizer = hf.pre_tokenizers.Split(hf.Regex(r'[\s\S]'), 'isolated')
    model.decoder = hf.decoders.Fuse()
    return model.to_str()


class FileTokenizer:
  """A Hugging Face `tokenizer.json`, given as its text. `where` is for messages."""

  def __init__(self, data: str, end: str | None, where: str, find_end: bool = True):
    import tokenizers as hf

    try:
      self._model = hf.Tokenizer.from_str(data)
    except Exception as e:  # the library raises a plain Exception
      raise InputError(f'{where}: not a tokenizer.json ({e})') from None
    self._model.no_truncation()
    self._model.no_padding()
    self._model.encode_special_tokens = True  # text that looks like a special token is text
    self._data = data
    vocabulary = self._model.get_vocab(with_added_tokens=True)
    self.vocab_size = max(vocabulary.values()) + 1
    if find_end and end is None:
      end = next((t for t in USUAL_ENDS if t in vocabulary), None)
    if end is not None and end not in vocabulary:
      raise InputError(
        f'{where}: end_of_document = {end!r} is not in the '
        f'vocabulary{nearest(end, _specials(self._model))}'
      )
    self._end = end
    self.end_of_document: int | None = None if end is None else vocabulary[end]
    self._byte_level = _is_byte_level(json.loads(data))
    self._bytes = (
      _byte_table(self._model, self.vocab_size, self.end_of_document) if self._byte_level else None
    )
    self.token_bytes = (
      np.array([len(b) for b in self._bytes], np.int32)
      if self._bytes is not None
      else _decoded_lengths(self._model, self.vocab_size, self.end_of_document)
    )

  def encode(self, text: str) -> Int32[np.ndarray, ' T']:
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, ' T']]:
    for text in texts:
      if not text.isascii():
        _encoded(text, 'utf-8')
    return [
      np.array(e.ids, np.int32)
      for e in self._model.encode_batch_fast(list(texts), add_special_tokens=False)
    ]

  def decode(self, ids: Ids) -> str:
    if self._bytes is not None:
      return self.decode_bytes(ids).decode('utf-8', 'replace')
    special = self.end_of_document
    return self._model.decode(
      [i for i in _checked(ids, self.vocab_size).tolist() if i != special], skip_special_tokens=True
    )

  def decode_bytes(self, ids: Ids) -> bytes:
    if self._bytes is None:
      return self.decode(ids).encode()
    return b''.join(self._bytes[i] for i in _checked(ids, self.vocab_size))

  def pieces(self, text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    return _line_pieces(text, size) if self._byte_level else iter([text])

  def fingerprint(self) -> str:
    return sha256('tokenizer.json', self._data, self._end or '')

  def save(self, folder: Path | str) -> None:
    _save(
      folder,
      {
        'tokenizer.json': self._data,
        KIND_FILE: json.dumps({'kind': 'tokenizer.json', 'end_of_document': self._end}),
      },
    )

  def hugging_face(self) -> str:
    return self._data


def _specials(model: Any) -> list[str]:
  return [t.content for t in model.get_added_tokens_decoder().values() if t.special]


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
  """The steps of a pre-tokenizer or decoder, which is one step or a sequence of them."""
  return [] if part is None else cast(list, part[inner]) if part['type'] == 'Sequence' else [part]


def _is_byte_level(data: dict[str, Any]) -> bool:
  """Whether tokens stand for exact bytes of the text: no normalizer, nothing put before the text,
  bytes written as GPT-2 does."""
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
  """GPT-2 writes a byte as a visible character: itself where it is one, else one from 256 on."""
  visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  rest = [b for b in range(256) if b not in visible]
  return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(rest)}


def _byte_table(model: Any, vocab_size: int, end: int | None) -> list[bytes]:
  """The bytes of every token; none for special tokens, the end of a document and ids that are not
  in use."""
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


def _decoded_lengths(model: Any, vocab_size: int, end: int | None) -> np.ndarray:
  """UTF-8 length of what each token adds after another one: decoders strip the start of a text, so
  that alone it can be shorter."""
  special = {end} | {i for i, t in model.get_added_tokens_decoder().items() if t.special}
  used = sorted(set(model.get_vocab(with_added_tokens=True).values()) - special)
  alone = model.decode_batch([[i] for i in used], skip_special_tokens=True)
  before = next((i for i, text in zip(used, alone) if text.isalnum() and text.isascii()), used[0])
  base = len(model.decode([before], skip_special_tokens=True).encode())
  lengths = np.zeros(vocab_size, np.int32)
  for i, text in zip(
    used, model.decode_batch([[before, i] for i in used], skip_special_tokens=True)
  ):
    is_byte = re.fullmatch(r'<0x[0-9A-Fa-f]{2}>', model.id_to_token(i))
    lengths[i] = 1 if is_byte else max(len(text.encode()) - base, 0)
  return lengths
