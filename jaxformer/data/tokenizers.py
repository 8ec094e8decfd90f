"""Tokenizers of bytes and characters, and the base of all; those in the form of a `tokenizer.json`
are in `tokenizer_file.py`."""

from __future__ import annotations

import copy
import itertools
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int32

from jaxformer.config import Config, InputError
from jaxformer.data import pieces
from jaxformer.data.cache_folder import sha256
from jaxformer.data.missing import Missing
from jaxformer.files import write_atomically

END_OF_DOCUMENT = '<|endoftext|>'
KIND_FILE = 'tokenizer_kind.json'
SOURCE_FOLDER = 'source'
Ids = Iterable[int] | np.ndarray


class Tokenizer:
  """Text to token ids 0..vocab_size-1 and back. A subclass adds `encode`.

  Args:
    token_texts: bytes of each token.
    kind: what `load_tokenizer` needs besides a `tokenizer.json`, as JSON data.

  Attributes:
    files: what `save` writes, by the names of the files.
    beginning: ids before every prompt.
    end_of_document: id that ends every document; None where the vocabulary has no such token.
    special_tokens: ids of the tokens that are no text, by how they are written.
    token_bytes: UTF-8 bytes of text per token; 0 for special tokens. Exact for bytes, characters
      and byte-level BPE.
  """

  def __init__(
    self,
    token_texts: Sequence[bytes],
    end_of_document: int | None,
    kind: dict[str, Any],
    beginning: Sequence[int] = (),
  ):
    self.end_of_document, self.files = end_of_document, {KIND_FILE: json.dumps(kind)}
    self.beginning = tuple(beginning)
    self.special_tokens: dict[str, int] = {}
    if end_of_document is not None:
      self.special_tokens[END_OF_DOCUMENT] = end_of_document
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

  def encode_start(self, text: str) -> list[int]:
    """Return the ids of a document that starts with the text: its beginning and those of the
    text."""
    return [*self.beginning, *self.encode(text).tolist()]

  def decode(self, ids: Ids) -> str:
    """Return the text; bytes that are not valid UTF-8 become U+FFFD, special tokens nothing. Raises
    `InputError` for an id out of range."""
    return self.decode_bytes(ids).decode('utf-8', 'replace')

  def decode_bytes(self, ids: Ids) -> bytes:
    """Return the bytes of the text: parts of a sequence decode to parts of its bytes (where
    `token_bytes` is exact)."""
    return b''.join(self._bytes[i] for i in self._checked(ids))

  def cut(self, text: str, start: int, size: int | None = None) -> int | None:
    """Return where the piece of a long text from `start` on ends, of about `size` characters; None
    where the rest is too short for a cut. The encodings of pieces, joined, are the encoding of the
    text (see `pieces.py`)."""
    end = start + (size or pieces.SIZE)
    return end if end < len(text) else None

  def encode_pieces(self, texts: Sequence[tuple[str, str]]) -> list[Int32[np.ndarray, ' T']]:
    """Encode pieces, each given after the end of the piece before it ('' at the start of a
    text)."""
    return self.encode_batch([text for _, text in texts])

  def hugging_face(self) -> str:
    """Return the same tokenizer as the text of a Hugging Face `tokenizer.json`."""
    raise NotImplementedError

  def hugging_face_files(self) -> dict[str, str]:
    """Return the files of the same tokenizer for Hugging Face libraries, by their names."""
    import tokenizers as hf

    data = self.hugging_face()
    model, end = hf.Tokenizer.from_str(data), self.end_of_document
    config = {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'bos_token': model.id_to_token(self.beginning[0]) if self.beginning else None,
      'eos_token': None if end is None else model.id_to_token(end),
      'add_bos_token': bool(self.beginning),
      'clean_up_tokenization_spaces': False,
    }
    return {'tokenizer.json': data, 'tokenizer_config.json': json.dumps(config, indent=2) + '\n'}

  @property
  def vocab_size(self) -> int:
    return len(self.token_bytes)

  @property
  def beginning_of_document(self) -> int | None:
    """The id before every document of a corpus; None for no such token. It is never a target.
    Raises `InputError` where several tokens begin a prompt."""
    if len(self.beginning) > 1:
      raise InputError(
        f'the tokenizer puts {len(self.beginning)} tokens before a text, and a document of a '
        'corpus begins with one at most; prompts begin with all of them'
      )
    return self.beginning[0] if self.beginning else None

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
    into its folder `source`. Raises `OSError`."""
    folder = Path(folder)
    for name, text in self.files.items():
      write_atomically(folder / name, text)
    if self._source is not None:
      (folder / SOURCE_FOLDER).mkdir(exist_ok=True)
      self._source.save(folder / SOURCE_FOLDER)

  def _checked(self, ids: Ids) -> list[int]:
    ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64).reshape(-1)
    wrong = ids[(ids < 0) | (ids >= self.vocab_size)]
    if wrong.size:
      raise InputError(
        f'token id {wrong[0]}: the vocabulary has {self.vocab_size} tokens, ids 0 to '
        f'{self.vocab_size - 1}'
      )
    return ids.tolist()


def encoded(text: str, encoding: str) -> bytes:
  """Return the bytes of a text. Raises `InputError` for half a surrogate pair."""
  try:
    return text.encode(encoding)
  except UnicodeEncodeError as e:
    raise InputError(f'text: half a surrogate pair at character {e.start}') from None


class ByteTokenizer(Tokenizer):
  """Ids 0..255 are bytes, 256 is the end of a document."""

  def __init__(self):
    super().__init__([*(bytes([b]) for b in range(256)), b''], 256, {'kind': 'bytes'})

  def encode(self, text: str) -> Int32[np.ndarray, ' T']:
    return np.frombuffer(encoded(text, 'utf-8'), np.uint8).astype(np.int32)

  def hugging_face(self) -> str:
    import tokenizers as hf

    # BPE without merges; characters of GPT-2 stand for the bytes.
    model = hf.Tokenizer(hf.models.BPE(vocab=gpt2_bytes(), merges=[]))
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
    points = np.frombuffer(encoded(text, 'utf-32-le'), '<u4')
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


def gpt2_bytes() -> dict[str, int]:
  """Return the bytes by the visible characters with which GPT-2 writes them: a byte that is visible
  itself, else characters from 256 on."""
  visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  rest = [b for b in range(256) if b not in visible]
  return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(rest)}


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
