"""Datasets of the Hugging Face Hub, and local files in its formats."""

import functools
import glob
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from jaxformer.config import InputError
from jaxformer.data.corpora import CACHE_INSIDE, Corpus, OnBadRow, Row
from jaxformer.data.folders import Unusable, files_below, files_of_pattern, holds
from jaxformer.data.readers import text_of
from jaxformer.files import user_path

# Names that mean a format of files and not a dataset of the Hub.
FORMATS = {
  'arrow',
  'audiofolder',
  'csv',
  'hdf5',
  'imagefolder',
  'json',
  'pandas',
  'parquet',
  'text',
  'videofolder',
  'webdataset',
  'xml',
}
COMMIT = re.compile(r'[0-9a-f]{40}')


class HuggingFace(Corpus):
  """A dataset of the Hugging Face Hub, or local `data_files` in one of its formats (`name` 'json',
  'parquet', ...) or of a local folder (`name`), read as a stream.

  Needs the extra `hf`. A dataset of the Hub is identified by its commit: `revision` is looked up at
  every use unless it is one, which a machine without a network needs. Local files, also those of
  patterns, are identified by their content, and files at other addresses (`https://`, `s3://`) by
  the address alone. The first use reads the dataset twice, or three times where a tokenizer is
  trained on it.

  Attributes:
    on_bad_row: whether a row without text in `text_field` (missing, null or of another type) is an
      error, or skipped and counted.
  """

  path_fields: ClassVar[tuple[str, ...]] = ()

  name: str
  config: str | None = None
  split: str = 'train'
  revision: str | None = None
  data_files: tuple[str, ...] = ()
  text_field: str = 'text'
  max_documents: int | None = None
  on_bad_row: OnBadRow = 'error'

  def validate(self) -> None:
    self.require_positive('max_documents')

  def rows(self) -> Iterator[Row]:
    return self.usable(self._texts(), self.on_bad_row)

  def _texts(self) -> Iterator[tuple[str] | InputError]:
    try:
      for number, row in enumerate(itertools.islice(self._open(), self.max_documents), 1):
        yield self._text(row, number)
    except InputError:
      raise
    # The library raises many types for a wrong name or split and for a lost connection.
    except Exception as e:
      reason = f'{type(e).__name__}: {(str(e).splitlines() or [""])[0]}'
      raise InputError(
        f'{self.tag}.name = {self.name!r} (config {self.config}, split {self.split}): {reason}'
      ) from e

  def _text(self, row: dict[str, Any], number: int) -> tuple[str] | InputError:
    try:
      return (text_of(row, self.text_field, f'{self.name} row {number}', 'text_field'),)
    except InputError as e:
      return e

  def _open(self) -> Any:
    try:
      import datasets  # ty: ignore[import-not-found]
    except ImportError:
      raise InputError(
        f"{self.tag}: needs the package 'datasets'; install the extra: pip install 'jaxformer[hf]'"
      ) from None
    return datasets.load_dataset(
      self.name,
      self.config,
      split=self.split,
      revision=self.commit,
      data_files=list(self.data_files) or None,
      streaming=True,
    )

  def check_cache(self, folder: Path) -> None:
    if self.name not in FORMATS and self._root.is_dir() and holds(self._root, folder):
      problem = CACHE_INSIDE.format(folder.resolve())
      raise InputError(f'{self.tag}.name', self.name, problem=problem)

  # ---- identity --------------------------------------------------------------------------------

  @property
  def is_local(self) -> bool:
    """Whether `name` is a format or a path, and not a dataset of the Hub."""
    return self.name in FORMATS or self._root.exists()

  @property
  def commit(self) -> str | None:
    """The commit of the Hub that is read; None for local files. Raises `InputError` where it cannot
    be looked up."""
    if self.is_local or COMMIT.fullmatch(self.revision or ''):
      return self.revision
    return _commit_of(self.name, self.revision)

  def deciding_settings(self) -> dict[str, Any]:
    settings = super().deciding_settings() | {'revision': self.commit}
    if self._root.exists() and self.name not in FORMATS:
      settings.pop('name')
    if self.is_local:
      settings['data_files'] = [f for f in self.data_files if _is_remote(f)]
    return settings

  def manifest(self, memo: Path | None = None) -> dict[str, Any]:
    return super().manifest(memo) | {'commit': self.commit}

  @property
  def _root(self) -> Path:
    return user_path(self.name, f'{self.tag}.name')

  def files(self) -> dict[str, Path]:
    if not self.is_local:
      return {}
    found, base = {}, Path()
    try:
      if self.name not in FORMATS:
        base = self._root if self._root.is_dir() else self._root.parent
        found = files_below(base) if self._root.is_dir() else {self._root.name: self._root}
      for i, pattern in enumerate(self.data_files):
        if not _is_remote(pattern):
          found |= {f'{i}/{name}': path for name, path in self._matches(base, pattern).items()}
    except (OSError, Unusable) as e:
      raise InputError(f'{self.tag}: {getattr(e, "strerror", None) or e}') from None
    return found

  def _matches(self, base: Path, pattern: str) -> dict[str, Path]:
    path = base / pattern
    if path.is_file():
      return {path.name: path}
    found = files_below(path) if path.is_dir() else {}
    if not path.exists() and glob.has_magic(pattern):
      found = files_of_pattern(str(path))
    if not found:
      problem = f'no file matches {pattern!r}'
      raise InputError(f'{self.tag}.data_files', self.data_files, problem=problem)
    return found


def _is_remote(file: str) -> bool:
  return '://' in file


@functools.lru_cache
def _commit_of(name: str, revision: str | None) -> str:
  try:
    from huggingface_hub import HfApi

    found = HfApi().dataset_info(name, revision=revision, timeout=30).sha
  except Exception as e:  # no such dataset, no network, no package
    reason = f'{type(e).__name__}: {(str(e).splitlines() or [""])[0]}'
    raise InputError(
      'HuggingFace.revision',
      revision,
      problem=f'the commit of {name} cannot be looked up ({reason}); give one of 40 hex digits',
    ) from None
  assert found is not None, 'the Hub names the commit of every dataset'
  return found
