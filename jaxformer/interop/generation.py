"""What a Hugging Face folder says about generation, in `generation_config.json` or, where there is
none, in `config.json`: the ids of special tokens, and tokens that are forced or never generated."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxformer.config import InputError
from jaxformer.interop.family import FAMILIES
from jaxformer.interop.settings import Settings
from jaxformer.interop.tensors import read_json

FILE = 'generation_config.json'
SPECIAL = ('bos_token_id', 'eos_token_id', 'pad_token_id', 'decoder_start_token_id')
RULES = (
  'bad_words_ids',
  'suppress_tokens',
  'begin_suppress_tokens',
  'forced_bos_token_id',
  'forced_eos_token_id',
  'max_length',
  'max_new_tokens',
  'repetition_penalty',
)
NO_TOKEN = -1
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
  'min_length': (0,),
  'min_new_tokens': (0,),
  'no_repeat_ngram_size': (0,),
  'encoder_no_repeat_ngram_size': (0,),
  'encoder_repetition_penalty': (1.0,),
  'sequence_bias': (),
  'force_words_ids': (),
  'constraints': (),
  'forced_decoder_ids': (),
  'exponential_decay_length_penalty': (),
  'stop_strings': (),
  'guidance_scale': (1.0,),
  'penalty_alpha': (0.0,),
  'dola_layers': (),
  'watermarking_config': (),
  'token_healing': (False,),
}
"""Fields that change which tokens are generated and that we do not have -> values with which they
change nothing."""
DRAWING = (
  'do_sample',
  'temperature',
  'top_k',
  'top_p',
  'min_p',
  'num_beams',
  'length_penalty',
  'early_stopping',
)
"""How a token is drawn, which each request says; these fields are kept for other libraries."""

OF_GENERATION = {*SPECIAL, *RULES, *UNSUPPORTED, *DRAWING}
"""All fields of `config.json` that are about generation."""


@dataclasses.dataclass(frozen=True)
class Generation:
  """What is published about generation with a model.

  Attributes:
    begin: the token that a decoder of translations reads first; None if unknown.
    bos: the token that an empty prompt starts from; None if unknown.
    ends: tokens that end a text; () if unknown.
    never, never_first: tokens that are not generated, at all or as the first new one.
    first, last: tokens that are forced, as the first new one and at the limit; None for none.
    max_length: most tokens, with those of the prompt or the first of a decoder; None if unknown.
    max_new_tokens: most new tokens; None if unknown.
    repetition_penalty: of `inference.Sampling`; None for none.
    unsupported: why nothing can be generated as published; None if it can.
  """

  begin: int | None = None
  bos: int | None = None
  ends: tuple[int, ...] = ()
  never: tuple[int, ...] = ()
  never_first: tuple[int, ...] = ()
  first: int | None = None
  last: int | None = None
  max_length: int | None = None
  max_new_tokens: int | None = None
  repetition_penalty: float | None = None
  unsupported: InputError | None = None

  def require_supported(self) -> None:
    """Raise `InputError` if what is generated would not be as published."""
    if self.unsupported is not None:
      raise self.unsupported

  def most_new(self, default: int, before: int) -> int:
    """Return the most new tokens where a request does not say it: `default`, or less where the
    files say so, after `before` tokens."""
    if self.max_new_tokens is not None:
      return self.max_new_tokens
    return default if self.max_length is None else max(1, min(default, self.max_length - before))


UNKNOWN = Generation()
"""Of models without such files."""


def read_generation(folder: str | os.PathLike[str]) -> Generation:
  """Return what a folder says about generation. Ids of special tokens that are missing in
  `generation_config.json` are those of `config.json`.

  Raises `InputError` for values of the wrong type."""
  path, fields = _published(Path(folder))
  return _read(Settings(fields, str(path)))


def _published(folder: Path) -> tuple[Path, dict[str, Any]]:
  """(the file that says it, its fields)."""
  own, model = folder / FILE, folder / 'config.json'
  base = read_json(model) if model.is_file() else {}
  if own.is_file():
    fields = read_json(own)
    special = {k: base[k] for k in SPECIAL if base.get(k) is not None and fields.get(k) is None}
    return own, fields | special
  kind = base.get('model_type')
  defaults = FAMILIES[kind].token_ids if kind in set(FAMILIES) else {}
  below = base.get('vocab_size')
  known = {k: t for k, t in defaults.items() if isinstance(below, int) and t < below}
  return model, known | base


def with_token_ids(
  config: Mapping[str, Any], folder: str | os.PathLike[str] | None, token_ids: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Return a `config.json` and a `generation_config.json` with the ids of special tokens and the
  rules of generation of a folder, or else these `token_ids`."""
  found = {} if folder is None else _published(Path(folder))[1]
  base = {} if folder is None else _fields(Path(folder) / 'config.json')
  own = {} if folder is None else _fields(Path(folder) / FILE)
  ids = {
    k: next((f[k] for f in (base, found, token_ids) if f.get(k) is not None), None) for k in SPECIAL
  }
  start = ids.pop('decoder_start_token_id')
  if config.get('is_encoder_decoder'):
    # Theirs takes no null here, and without the field a default; -1 is an error in generation.
    ids['decoder_start_token_id'] = NO_TOKEN if start is None else start
  generation = own or {
    k: found[k] for k in (*RULES, *UNSUPPORTED, *DRAWING) if found.get(k) is not None
  }
  generation |= {
    k: v for k, v in ids.items() if v not in (None, NO_TOKEN) and generation.get(k) is None
  }
  return {**config, **ids}, generation


def _fields(path: Path) -> dict[str, Any]:
  return read_json(path) if path.is_file() else {}


def _read(hf: Settings) -> Generation:
  ends, words = _ids(hf, 'eos_token_id', True), hf.fields.get('bad_words_ids') or []
  unsupported: InputError | None = None
  for field, neutral in UNSUPPORTED.items():
    value = hf.fields.get(field)
    if value is not None and value not in neutral and value != []:
      accepted = ' or '.join(['absent', *map(repr, neutral)])
      unsupported = unsupported or hf.fail(field, f'{accepted}; generation has no such rule')
  if not isinstance(words, list) or not all(_is_ids(w) and w for w in words):
    raise hf.fail('bad_words_ids', 'lists of token ids')
  if any(len(w) > 1 for w in words):
    unsupported = unsupported or hf.fail('bad_words_ids', 'single tokens, [[id], [id], ...]')
  never = {w[0] for w in words} - set(ends) | set(_ids(hf, 'suppress_tokens'))
  last, penalty = _ids(hf, 'forced_eos_token_id', True), hf.positive('repetition_penalty', 1.0)
  if len(last) > 1:
    unsupported = unsupported or hf.fail('forced_eos_token_id', 'one token')
  return Generation(
    begin=_id(hf, 'decoder_start_token_id'),
    bos=_id(hf, 'bos_token_id'),
    ends=ends,
    never=tuple(sorted(never)),
    never_first=_ids(hf, 'begin_suppress_tokens'),
    first=_id(hf, 'forced_bos_token_id'),
    last=last[0] if last else None,
    max_length=hf.count('max_length', None),
    max_new_tokens=hf.count('max_new_tokens', None),
    repetition_penalty=None if penalty == 1 else penalty,
    unsupported=unsupported,
  )


def _is_ids(value: Any) -> bool:
  return isinstance(value, list) and all(
    isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value
  )


def _id(hf: Settings, field: str) -> int | None:
  found = _ids(hf, field, True)
  if len(found) > 1:
    raise hf.fail(field, 'one token id')
  return found[0] if found else None


def _ids(hf: Settings, field: str, single: bool = False) -> tuple[int, ...]:
  """Token ids; with `single`, one may stand for a list. -1 stands for no token, as for
  transformers, which stops at none then."""
  value = hf.fields.get(field)
  value = [value] if single and not isinstance(value, list) else value
  value = [] if value is None else value
  value = (
    [i for i in value if i is not None and i != NO_TOKEN] if isinstance(value, list) else value
  )
  if not _is_ids(value):
    raise hf.fail(field, 'a token id, or a list of them' if single else 'a list of token ids')
  return tuple(value)
