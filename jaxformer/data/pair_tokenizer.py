"""Two tokenizers as one: that of translations, and beside it that of the texts to translate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int32

from jaxformer.config import InputError
from jaxformer.data.storage import sha256

if TYPE_CHECKING:
  from jaxformer.data.tokenizers import Ids, Tokenizer

SOURCE_FOLDER = 'source'


class PairTokenizer:
  """The tokenizer of translations, with that of their sources as `source`, where they are not the
  same."""

  def __init__(self, source: Tokenizer, target: Tokenizer):
    self.source, self.target = source, target
    self.vocab_size, self.token_bytes = target.vocab_size, target.token_bytes
    self.end_of_document: int | None = target.end_of_document

  def encode(self, text: str) -> Int32[np.ndarray, ' T']:
    return self.target.encode(text)

  def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, ' T']]:
    return self.target.encode_batch(texts)

  def decode(self, ids: Ids) -> str:
    return self.target.decode(ids)

  def decode_bytes(self, ids: Ids) -> bytes:
    return self.target.decode_bytes(ids)

  def pieces(self, text: str, size: int = 1 << 20) -> Iterator[str]:
    return self.target.pieces(text, size)

  def fingerprint(self) -> str:
    return sha256('pair', self.source.fingerprint(), self.target.fingerprint())

  def hugging_face(self) -> str:
    return self.target.hugging_face()

  def save(self, folder: Path | str) -> None:
    """Writes the target's files into the folder and the source's into its folder `source`."""
    inner = Path(folder) / SOURCE_FOLDER
    try:
      inner.mkdir(exist_ok=True)
    except OSError as e:
      raise InputError(f'{folder}: cannot be written ({e.strerror})') from None
    self.target.save(folder)
    self.source.save(inner)


def source_of(tokenizer: Tokenizer) -> Tokenizer:
  """The tokenizer of texts to translate: itself, where one serves both sides."""
  return tokenizer.source if isinstance(tokenizer, PairTokenizer) else tokenizer
