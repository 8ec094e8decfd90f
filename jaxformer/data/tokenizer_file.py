"""Tokenizers in the form of a Hugging Face `tokenizer.json`: byte pairs trained on the corpus, and
any such file; and tokenizers that were saved."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
from jaxtyping import Int32

from jaxformer.config import InputError, nearest
from jaxformer.data import pieces
from jaxformer.data.readers import read_text
from jaxformer.data.tokenizers import (
  END_OF_DOCUMENT,
  KIND_FILE,
  SOURCE_FOLDER,
  ByteTokenizer,
  CharacterTokenizer,
  Ids,
  Tokenizer,
  TokenizerConfig,
  encoded,
  gpt2_bytes,
)
from jaxformer.files import regular_file, unwritable, user_path, write_atomically

USUAL_ENDS = (END_OF_DOCUMENT, '<|end_of_text|>', '</s>', '<|eot_id|>', '<eos>', '[SEP]')


class FileTokenizer(Tokenizer):
  """A Hugging Face `tokenizer.json`.

  Args:
    data: its text.
    end: the token that ends a document; None for the first usual one that the vocabulary has, if
      there is one.
    where: for messages.
    beginning: the tokens before a document or prompt.
  """

  def __init__(self, data: str, end: str | None, where: str, beginning: Sequence[str] = ()):
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
    kind: dict[str, Any] = {'kind': 'tokenizer.json', 'end_of_document': end}
    if beginning:
      kind['beginning_of_document'] = beginning[0] if len(beginning) == 1 else list(beginning)
    used = [] if end is None else [('end_of_document', end)]
    for field, token in [*used, *(('beginning_of_document', t) for t in beginning)]:
      if token not in vocabulary:
        specials = [t.content for t in self._model.get_added_tokens_decoder().values() if t.special]
        raise InputError(
          f'{where}: {field} = {token!r} is not in the vocabulary{nearest(token, specials)}'
        )
    end_id = None if end is None else vocabulary[end]
    beginning_ids = [vocabulary[t] for t in beginning]
    outside = {i for i in (end_id, *beginning_ids) if i is not None}
    self._byte_level = _is_byte_level(json.loads(data))
    self._words = pieces.WordCuts(self._model.pre_tokenizer) if self._byte_level else None
    table = _byte_table(self._model, max(vocabulary.values()) + 1, outside)
    super().__init__(table, end_id, kind, beginning_ids)
    self._outside = outside
    added = self._model.get_added_tokens_decoder()
    self.special_tokens = {
      token: i
      for token, i in vocabulary.items()
      if i in outside or (i in added and added[i].special)
    }
    self.files = {'tokenizer.json': data} | self.files
    if not self._byte_level:
      self.token_bytes = _decoded_lengths(self._model, self.vocab_size, outside)

  def encode(self, text: str) -> Int32[np.ndarray, ' T']:
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, ' T']]:
    for text in texts:
      if not text.isascii():
        encoded(text, 'utf-8')
    found = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(e.ids, np.int32) for e in found]

  def decode(self, ids: Ids) -> str:
    if self._byte_level:
      return super().decode(ids)
    kept = [i for i in self._checked(ids) if i not in self._outside]
    return self._model.decode(kept, skip_special_tokens=True)

  def decode_bytes(self, ids: Ids) -> bytes:
    return super().decode_bytes(ids) if self._byte_level else self.decode(ids).encode()

  def cut(self, text: str, start: int, size: int | None = None) -> int | None:
    scan = None if self._words is None else self._words.ends
    return pieces.cut(text, start, self._separates, scan, self._tokens_separate, size)

  def encode_pieces(self, texts: Sequence[tuple[str, str]]) -> list[Int32[np.ndarray, ' T']]:
    if self._byte_level:
      return super().encode_pieces(texts)
    # Normalizers and pre-tokenizers may treat the start of a text differently, as by a prefix.
    before = self.encode_batch([before for before, _ in texts])
    both = self.encode_batch([before + text for before, text in texts])
    return [
      ids[left.size :] if np.array_equal(ids[: left.size], left) else self.encode(text)
      for left, ids, (_, text) in zip(before, both, texts, strict=True)
    ]

  def _separates(self, left: str, right: str) -> bool:
    return self._tokens_separate(left, right) and (
      self._words is None or self._words.separates(left, right)
    )

  def _tokens_separate(self, left: str, right: str) -> bool:
    try:
      first, second, both = self.encode_batch([left, right, left + right])
    except InputError:
      return False  # no text: an error of the piece that holds it
    if self._byte_level:
      return np.array_equal(both, np.concatenate([first, second]))
    return bool(left) and np.array_equal(both[: first.size], first)

  def hugging_face(self) -> str:
    """Return the file; where it puts other tokens before a text than this tokenizer does, with a
    post-processor that puts the same."""
    data = self.files['tokenizer.json']
    if _first_tokens(data) == [self._model.id_to_token(i) for i in self.beginning]:
      return data
    index = self.beginning_of_document
    token = '' if index is None else str(self._model.id_to_token(index))
    return json.dumps(_beginning_with(json.loads(data), index, token), ensure_ascii=False)


# ---- tokenizer.json ----------------------------------------------------------------------------


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


def _byte_table(model: Any, vocab_size: int, outside: Set[int]) -> list[bytes]:
  """Return the bytes of every token; none for special tokens, those outside the text (the beginning
  and the end of a document) and unused ids."""
  table, alphabet = [b''] * vocab_size, gpt2_bytes()
  added = model.get_added_tokens_decoder()
  for token, index in model.get_vocab(with_added_tokens=True).items():
    if index in added:
      table[index] = b'' if added[index].special else token.encode()
    else:
      table[index] = bytes(alphabet[c] for c in token if c in alphabet)
  for index in outside:
    table[index] = b''
  return table


def _decoded_lengths(model: Any, vocab_size: int, outside: Set[int]) -> Int32[np.ndarray, ' V']:
  """Return the UTF-8 bytes that each token adds after another one: decoders strip the start of a
  text, so alone it can be shorter."""
  special = outside | {i for i, t in model.get_added_tokens_decoder().items() if t.special}
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


# ---- configs ---------------------------------------------------------------------------------


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
    # the trainer reserves memory for all of them
    self.require(self.vocab_size <= 2**24, 'vocab_size', 'at most 16,777,216')

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
    cuts = pieces.usual_words()
    parts = (pieces.pieces(t, cuts) for t in itertools.chain([first], texts))
    model.train_from_iterator(itertools.chain.from_iterable(parts), trainer)
    return FileTokenizer(model.to_str(), END_OF_DOCUMENT, self.tag)


class TokenizerFile(TokenizerConfig):
  """A Hugging Face `tokenizer.json`, or a folder that holds one, perhaps with
  `tokenizer_config.json` beside it.

  Attributes:
    end_of_document: the token after every document; None for the `eos_token` of
      `tokenizer_config.json`, else the first usual one that the vocabulary has, else none.
    beginning_of_document: the token before every document and every prompt; None for the special
      token that the post-processor of `tokenizer.json` begins with (as those of Llama do), if there
      is one: as in transformers 5, it alone decides, and not `add_bos_token` beside it. '' for none
      in any case. It is never a target, and the first token of the text is one. Translations have
      none.
  """

  path: str
  end_of_document: str | None = None
  beginning_of_document: str | None = None

  def train(self, texts: Iterable[str]) -> Tokenizer:
    where = f'{self.tag}.path = {self.path!r}'
    path = user_path(self.path, f'{self.tag}.path')
    try:
      path = path / 'tokenizer.json' if path.is_dir() else path
      data = read_text(path)
    except InputError as e:
      raise InputError(f'{where}: {e}') from None
    except OSError as e:
      raise InputError(f'{where}: cannot be read ({e.strerror})') from None
    given = self.beginning_of_document
    beginning = _first_tokens(data) if given is None else [given] if given else []
    if len(beginning) > 1:
      raise InputError(
        f'{where}: puts {len(beginning)} tokens before a text ({", ".join(beginning)}), and a '
        "document begins with one: beginning_of_document must name it, or '' for none"
      )
    return FileTokenizer(data, self.end_of_document or _found_end(path), where, beginning)


def _found_end(path: Path) -> str | None:
  return _token(_configured(path).get('eos_token'))


def _first_tokens(data: str) -> list[str]:
  """Return the special tokens that the post-processor of a tokenizer puts before a text."""
  try:
    steps = _steps(json.loads(data).get('post_processor'), 'processors')
    for step in steps:
      if 'cls' in step:  # as of BERT and RoBERTa
        return [step['cls'][0]]
      if step['type'] == 'TemplateProcessing':
        named = itertools.takewhile(lambda part: 'SpecialToken' in part, step['single'])
        ids = [part['SpecialToken']['id'] for part in named]
        return [t for i in ids for t in step['special_tokens'][i]['tokens']]
  except (ValueError, AttributeError, LookupError, TypeError):  # reported by the library
    pass
  return []


def _beginning_with(data: dict[str, Any], index: int | None, token: str = '') -> dict[str, Any]:
  """Return the data of a tokenizer whose post-processor puts this token before a text, and nothing
  else; after a text it puts what it put before."""
  texts: list[dict[str, Any]] = [{'Sequence': {'id': i, 'type_id': t}} for t, i in enumerate('AB')]
  steps = _steps(data.get('post_processor'), 'processors')
  at = next((i for i, s in enumerate(steps) if 'cls' in s or 'single' in s), len(steps))
  old = steps[at] if at < len(steps) else {}
  end, end_index = old.get('sep', ('', None))
  ends = [{'SpecialToken': {'id': end, 'type_id': 0}}] if end else []
  plain = {'single': [texts[0], *ends], 'pair': [texts[0], *ends, texts[1], *ends]}
  first = [{'SpecialToken': {'id': token, 'type_id': 0}}] if token else []
  new = {
    kind: first + list(itertools.dropwhile(lambda p: 'SpecialToken' in p, old.get(kind, parts)))
    for kind, parts in plain.items()
  }
  special = {t: {'id': t, 'ids': [i], 'tokens': [t]} for t, i in ((end, end_index), (token, index))}
  special = old.get('special_tokens', {}) | {t: v for t, v in special.items() if t}
  steps[at : at + 1] = [{'type': 'TemplateProcessing', **new, 'special_tokens': special}]
  return data | {'post_processor': {'type': 'Sequence', 'processors': steps}}


def _configured(path: Path) -> dict[str, Any]:
  """Return the settings beside a `tokenizer.json`; nothing where there are none."""
  file = path.parent / 'tokenizer_config.json'
  if not file.exists():
    return {}
  try:
    found = json.loads(read_text(file))
  except (ValueError, RecursionError) as e:  # InputError is a ValueError
    raise e if isinstance(e, InputError) else InputError(f'{file}: not valid JSON ({e})') from None
  return found if isinstance(found, dict) else {}


def _token(value: Any) -> str | None:
  """Return a token that is given as text or as an object."""
  value = value.get('content') if isinstance(value, dict) else value
  return value if isinstance(value, str) else None


def train_bpe(texts: Iterable[str], vocab_size: int, out_path: Path | str) -> int:
  """Train byte pairs on texts and write a `tokenizer.json`. The same texts give the same file.
  Returns the size of the vocabulary, smaller than `vocab_size` where the texts run out of pairs.

  Raises `InputError`, before a text is read, where the file cannot be written or would replace one
  that is no `tokenizer.json`."""
  config, out_path = BytePairs(vocab_size=vocab_size), user_path(out_path, 'out')
  try:
    _require_replaceable(out_path)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out_path.parent, os.W_OK):
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    tokenizer = config.train(texts)
    write_atomically(out_path, tokenizer.hugging_face())
  except OSError as e:
    raise unwritable(out_path, e) from None
  return tokenizer.vocab_size


def _require_replaceable(path: Path) -> None:
  if not path.exists():
    return
  try:
    known = 'model' in json.loads(regular_file(path).read_bytes())
  except (ValueError, TypeError, RecursionError):
    known = False
  if not known:
    raise InputError(
      'out', str(path), problem='exists and is no tokenizer.json; give a name that is free'
    )


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
    data, where = regular_file(path).read_text(encoding='utf-8'), str(folder)
    return FileTokenizer(data, _found_end(path), where, _first_tokens(data))
  saved = json.loads((folder / KIND_FILE).read_text(encoding='utf-8'))
  if saved['kind'] == 'bytes':
    return ByteTokenizer()
  if saved['kind'] == 'characters':
    return CharacterTokenizer(saved['characters'])
  end, beginning = saved['end_of_document'], saved.get('beginning_of_document', [])
  beginning = [beginning] if isinstance(beginning, str) else beginning
  return FileTokenizer(path.read_text(encoding='utf-8'), end, str(folder), beginning)
