"""Corpora and tokenizers that a published recipe names and that are not part of the package.

An experiment that has them can be shown, planned and priced. Nothing can be read through them: to
train, others are given in their place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar

from jaxformer.config import InputError
from jaxformer.data.corpora import Corpus, Row
from jaxformer.data.missing import Missing
from jaxformer.data.tokenizers import Tokenizer, TokenizerConfig


class PublishedCorpus(Corpus):
  """The text that a published model was trained on, by its `name`."""

  path_fields: ClassVar[tuple[str, ...]] = ()

  name: str

  def missing(self) -> Missing:
    return Missing(self.name, 'Files', 'my-texts/')

  def rows(self) -> Iterator[Row]:
    raise self._not_here

  def files(self) -> dict[str, Path]:
    raise self._not_here

  @property
  def _not_here(self) -> InputError:
    return InputError(f'{self.tag}.name', self.name, problem='not part of jaxformer; give a corpus')


class PublishedPairs(PublishedCorpus):
  """The sources and translations that a published model was trained on, by their `name`."""

  columns: ClassVar[int] = 2

  def missing(self) -> Missing:
    return Missing(self.name, 'Tsv', 'my-pairs.tsv')


class PublishedTokenizer(TokenizerConfig):
  """The tokenizer of a published model.

  Attributes:
    name: in words.
    vocab_size: number of tokens.
    hub: the repository on Hugging Face whose `tokenizer.json` it is; None if there is none.
  """

  name: str
  vocab_size: int
  hub: str | None = None

  def validate(self) -> None:
    self.require_positive('vocab_size')

  def missing(self) -> Missing:
    where = '' if self.hub is None else f', {self.hub}'
    return Missing(f'{self.name} ({self.vocab_size:,} tokens{where})', 'TokenizerFile', 'FILE.json')

  def train(self, texts: Iterable[str]) -> Tokenizer:
    raise InputError(
      f'{self.tag}.name', self.name, problem='not part of jaxformer; give a tokenizer'
    )
