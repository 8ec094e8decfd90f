"""A model with its parameters and tokenizer: what `jaxformer.load` returns."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypedDict, TypeVar, Unpack, cast

import jax.numpy as jnp
import numpy as np

from jaxformer.config import InputError
from jaxformer.data import Tokenizer
from jaxformer.evaluation import EvalResult, evaluate
from jaxformer.inference import (
  Beam,
  Generated,
  Request,
  Sampling,
  TokenRules,
  Translation,
  align,
  draw,
  generate_text,
  request,
  stream,
  translate,
)
from jaxformer.interop import UNKNOWN, Generation, is_rwkv, save_hf, save_rwkv
from jaxformer.models.model import ModelConfig
from jaxformer.models.params import Definition, Params
from jaxformer.sharding import platform
from jaxformer.task_type import IGNORE, LANGUAGE_MODELING, TRANSLATION, Batch
from jaxformer.training.experiment import Experiment
from jaxformer.workflows.describe import Description, describe_model
from jaxformer.workflows.evaluate import evaluate_model
from jaxformer.workflows.progress import log_progress

END = '<end>'
NEW_TOKENS = 200
Texts = TypeVar('Texts', str, list[str])
"""One text, or several."""


class GenerateOptions(TypedDict, total=False):
  """Options of `generate`. The fields from `temperature` on are those of `inference.Sampling`.

  Attributes:
    max_new_tokens: at most so many tokens follow the prompt (200).
    stop: strings and special tokens that end the text; they are not part of it.
    seed: of the random draws (0).
    dtype: 'float32' or 'bfloat16' for weights and activations; by default bfloat16 on TPU and GPU.
    temperature: divides the logits (0.8); 0 is greedy.
    top_k: keep the k most likely tokens; 0 for all.
    top_p: keep the most likely tokens whose probabilities add up to p; 1 for all.
    min_p: keep tokens at least min_p times as likely as the most likely one; 0 for all.
    repetition_penalty: makes tokens that have occurred less likely; 1 for no penalty. By default
      that of a Hugging Face folder, else none.
  """

  max_new_tokens: int | None
  stop: Sequence[str]
  seed: int
  dtype: str | None
  temperature: float
  top_k: int | None
  top_p: float | None
  min_p: float | None
  repetition_penalty: float | None


class TranslateOptions(TypedDict, total=False):
  """Options of `translate`.

  Attributes:
    beam: hypotheses kept by beam search; 1 is greedy decoding (1).
    length_penalty: length-normalization exponent alpha of Wu et al. 2016 (0.6).
    coverage_penalty: weight beta of source tokens without attention, Wu et al. 2016 (0).
    max_new_tokens: by default 2 x source length + 10.
    dtype: as in `GenerateOptions`.
  """

  beam: int
  length_penalty: float
  coverage_penalty: float
  max_new_tokens: int | None
  dtype: str | None


def _like(given: Texts, answers: Callable[[list[str]], list[str]]) -> Texts:
  """Return the answer to one text, or a list of those to several."""
  if isinstance(given, str):
    return cast(Texts, answers([given])[0])
  return cast(Texts, answers(list(given)))


def _dtype(name: str | None) -> Any:
  return jnp.dtype(name or ('float32' if platform() == 'cpu' else 'bfloat16'))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Model:
  """A model with its parameters and tokenizer.

  Attributes:
    name: of the run, the folder, the file or the preset.
    definition: the structure of the model.
    experiment: what it was trained by; None for weights of another library.
    tokenizer: None for a model that was not trained on text.
    step: of the checkpoint; None for other weights, and for initial parameters.
    source: the folder of Hugging Face weights that these are; None for others.
    generation: what was published about generation with these weights.
    validation_sha256: of the data that its run holds out (`Dataset.validation_sha256`); None if
      unknown.
  """

  name: str
  definition: Definition
  make_params: Callable[[], Params]
  tokenizer: Tokenizer | None = None
  experiment: Experiment | None = None
  step: int | None = None
  source: pathlib.Path | None = None
  generation: Generation = UNKNOWN
  validation_sha256: str | None = None

  @property
  def config(self) -> ModelConfig:
    return self.definition.config

  @property
  def weights(self) -> str:
    """What the parameters are, in words."""
    if self.step is not None:
      return f'checkpoint of step {self.step:,}'
    if self.experiment is not None:
      return 'initial parameters, not trained'
    return 'RWKV file' if self.source is None else 'Hugging Face folder'

  @property
  def translates(self) -> bool:
    """Whether the model is an encoder-decoder, which translates rather than continues text."""
    return self.config.task == TRANSLATION

  @functools.cached_property
  def params(self) -> Params:
    """Parameters by name."""
    return self.make_params()

  def describe(self, target: str | None = None) -> Description:
    """Return the model read from top to bottom; see `jaxformer.describe`."""
    return describe_model(self.name, self.config, target)

  def __repr__(self) -> str:
    step = f' ({self.weights})' if self.step is None else f' at step {self.step:,}'
    d = describe_model(f'{self.name}{step}', self.config)
    return '\n'.join([d.title, '', *d.table()])

  def remark_length(self, tokens: int) -> None:
    """Log, once per model, that sequences are longer than those that it is meant for."""
    context, known = self.config.context_length, (self.experiment or self.source) is not None
    if known and tokens > context and not self._remarks:
      self._remarks.append(
        f'{self.name}: sequences of up to {tokens:,} tokens are longer than the context of '
        f'{context:,} that the model is meant for'
      )
      log_progress(self._remarks[-1])

  @functools.cached_property
  def _remarks(self) -> list[str]:
    return []

  # ---- text ------------------------------------------------------------------------------------

  def text_tokenizer(self) -> Tokenizer:
    """Return the tokenizer. Raises `InputError` for a model that was not trained on text."""
    if self.tokenizer is not None:
      return self.tokenizer
    if self.experiment is None:
      where = 'beside it' if self.source is None else 'in its folder'
      raise InputError(
        f'{self.name}: there is no tokenizer.json {where}, which text needs; take the one that was '
        'published with the weights, or where there are other tokenizer files only, write it with '
        "transformers: AutoTokenizer.from_pretrained('IN').save_pretrained('OUT')"
      )
    raise InputError(
      f'{self.name}: holds no tokenizer; a {self.config.tag} trained on '
      f'{self.experiment.data.tag} neither continues nor translates text without one '
      '(`jaxformer eval` scores it)'
    )

  def complete(self, prompts: Sequence[str], **options: Unpack[GenerateOptions]) -> list[Generated]:
    """Return the continuations of prompts as text and tokens, and whether each ended by itself."""
    stop, ends = self._stops(options.pop('stop', ()))
    r = self._request(prompts, ends, **options)
    return generate_text(r, self.text_tokenizer().decode_bytes, stop=stop)

  def stream(self, prompt: str, **options: Unpack[GenerateOptions]) -> Iterator[str]:
    """Return the continuation of a prompt piece by piece, as it is generated."""
    stop, ends = self._stops(options.pop('stop', ()))
    r = self._request([prompt], ends, **options)
    return (p for (p,) in stream(r, self.text_tokenizer().decode_bytes, stop=stop))

  def generate(
    self,
    prompt: Texts = '',  # ty: ignore[invalid-parameter-default]
    **options: Unpack[GenerateOptions],
  ) -> Texts:
    """Return the continuation of a prompt, without the prompt; of several prompts, a list."""
    return _like(prompt, lambda texts: [t.text for t in self.complete(texts, **options)])

  def _stops(self, stop: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return the strings of `stop` that are text, and the special tokens among them, which end a
    text as tokens. Raises `InputError` for a string of both, which no text has."""
    if isinstance(stop, str):
      raise InputError('stop', stop, 'a list of strings')
    special = self.text_tokenizer().special_tokens
    strings = [s for s in stop if s not in special]
    for s in strings:
      if found := [token for token in special if token in s]:
        problem = f'{found[0]} is a special token and no text; must be given by itself'
        raise InputError('stop', s, problem=problem)
    return strings, [special[s] for s in stop if s in special]

  def _request(
    self,
    prompts: Sequence[str],
    ends: Sequence[int] = (),
    *,
    max_new_tokens: int | None = None,
    seed: int = 0,
    dtype: str | None = None,
    temperature: float = 0.8,
    **sampling: Any,
  ) -> Request:
    """Return the request to continue prompts; the defaults are those of `GenerateOptions`."""
    tokenizer, published = self.text_tokenizer(), self.generation
    if sampling.get('repetition_penalty') is None:
      sampling['repetition_penalty'] = published.repetition_penalty
    how = Sampling(temperature=temperature, **sampling)
    if self.config.task != LANGUAGE_MODELING:
      raise InputError(
        f'{self.name}: an {self.config.tag} does not continue prompts; use translate'
      )
    end, rules = self._rules()
    rules = rules.replace(ends=(*rules.ends, *(e for e in ends if e not in (end, *rules.ends))))
    if rules.last is not None:
      problem = 'a language model has no rule for the last of the new tokens'
      raise InputError(f'{self.name}: forced_eos_token_id', rules.last, problem=problem)
    bos = [] if published.bos is None else [published.bos]  # where a prompt is empty
    ids = [tokenizer.encode_start(p) or bos for p in prompts]
    if rules.first is not None:
      # As in transformers, it is the second token of a text, not the first after any prompt.
      if any(len(p) == 1 for p in ids):
        problem = 'a language model has no rule for the first of the new tokens'
        raise InputError(f'{self.name}: forced_bos_token_id', rules.first, problem=problem)
      rules = rules.replace(first=None)
    if max_new_tokens is None:
      max_new_tokens = published.most_new(NEW_TOKENS, max(map(len, ids), default=0))
    self.remark_length(max(map(len, ids), default=0) + max_new_tokens)
    return request(
      self.definition,
      self.params,
      ids,
      max_new_tokens=max_new_tokens,
      sampling=how,
      seed=seed,
      end_of_document=end,
      dtype=_dtype(dtype),
      vocab_size=tokenizer.vocab_size,
      rules=rules,
    )

  def _rules(self) -> tuple[int | None, TokenRules]:
    """Return the token that ends what is generated, and the other rules of generation, as published
    or else those of the tokenizer. Raises `InputError` for rules that are not supported."""
    published = self.generation
    published.require_supported()
    first, *others = published.ends or (self.text_tokenizer().end_of_document,)
    return first, TokenRules(
      ends=tuple(others),
      never=published.never,
      never_first=published.never_first,
      first=published.first,
      last=published.last,
    )

  # ---- translation -----------------------------------------------------------------------------

  def translations(
    self, sources: Sequence[str], **options: Unpack[TranslateOptions]
  ) -> list[tuple[str, Translation]]:
    """Return translations as text, and as tokens with their log-probability."""
    tokenizer, decoding = self.text_tokenizer(), self.decoding()
    given: dict[str, Any] = {'length_penalty': 0.6, **options}
    most, dtype = given.pop('max_new_tokens', None), given.pop('dtype', None)
    most = self.generation.max_new_tokens if most is None else most
    ids = [self._source(text) for text in sources]
    self.remark_length(max([most or 0, *map(len, ids)]))
    found = translate(
      self.definition,
      self.params,
      ids,
      **decoding,
      beam=Beam(width=given.pop('beam', 1), **given),
      max_new_tokens=most,
      vocab_size=tokenizer.vocab_size,
      dtype=_dtype(dtype),
    )
    return [(tokenizer.decode(t.tokens), t) for t in found]

  def translate(self, source: Texts, **options: Unpack[TranslateOptions]) -> Texts:
    """Return the translation of a text by an encoder-decoder; of several texts, a list."""
    return _like(source, lambda texts: [text for text, _ in self.translations(texts, **options)])

  def align(
    self, source: str, target: str | None = None, *, beam: int = 1, layer: int | None = None
  ) -> AlignedText:
    """Return the cross-attention between a source and a translation, by default the model's own.

    Args:
      beam: hypotheses kept in making a translation.
      layer: of the layers with cross-attention, from 0 at the bottom; None for their mean.
    """
    tokenizer, ids, end = self.text_tokenizer(), self._source(source), self._end()
    if target is None:
      tokens = self.translations([source], beam=beam, length_penalty=0.0)[0][1].tokens
    else:
      tokens = tokenizer.encode(target).tolist()
    found = align(self.definition, self.params, ids, tokens, begin=self.decoder_start)
    layers = len(found)
    if layer is not None and not 0 <= layer < layers:
      raise InputError('layer', layer, f'at least 0 and below {layers}, the layers with attention')
    weights = found.mean(0) if layer is None else found[layer]
    columns = _names(tokenizer.source, ids)
    return AlignedText(columns, _names(tokenizer, [*tokens, end]), weights)

  def _source(self, text: str) -> list[int]:
    """Return a text as an encoder reads it, with the end of the document."""
    source, end = self.text_tokenizer().source, self._end()
    own = source.end_of_document
    return [*source.encode_start(text), end if own is None else own]

  @property
  def decoder_start(self) -> int:
    """The token that the decoder reads first: as published, or else the end of a document, as in
    training here. Raises `InputError` for a model without a decoder."""
    published, end = self.generation, self._end()
    return next((t for t in (published.begin, published.bos) if t is not None), end)

  def decoding(self) -> dict[str, Any]:
    """Return how translations are decoded, as arguments of `inference.translate`. Raises
    `InputError` for other models."""
    own, penalty = self._end(), self.generation.repetition_penalty
    end, rules = self._rules()
    if penalty is not None:
      problem = 'must be absent or 1.0; translations have no such rule'
      raise InputError(f'{self.name}: repetition_penalty', penalty, problem=problem)
    return {
      'begin': self.decoder_start,
      'end': own if end is None else end,
      'rules': rules,
      'max_length': self.generation.max_length,
    }

  def as_read(self, pairs: Batch) -> Batch:
    """Return a batch of pairs with the token that the decoder reads first."""
    start, inputs = self.decoder_start, np.array(pairs.inputs)
    inputs[:, 0] = start
    return pairs._replace(inputs=inputs)

  def _end(self) -> int:
    """Return the token that ends sources. Raises `InputError` for models that read none."""
    end = self.text_tokenizer().end_of_document
    if not self.translates:
      raise InputError(
        f'{self.name}: a {self.config.tag} is not an encoder-decoder and has no source; '
        'use generate'
      )
    if end is None:
      raise InputError(
        f'{self.name}: its tokenizer has no end-of-document token, which ends sources and '
        'translations'
      )
    return end

  # ---- scores and weights ----------------------------------------------------------------------

  evaluate = evaluate_model

  def score(self, text: str, source: str | None = None) -> EvalResult:
    """Return the log-likelihood of a text, as sums over its tokens: `.nll_sum`, `.loss`,
    `.bits_per_byte`, `.perplexity`. An encoder-decoder scores it as the translation of `source`."""
    tokenizer = self.text_tokenizer()
    ids, end = tokenizer.encode(text).tolist(), tokenizer.end_of_document
    if source is not None:
      sources = np.array([self._source(source)], np.int32)
      batch = Batch(_row(self.decoder_start, *ids), _row(*ids, end), source_BS=sources)
    elif self.translates:
      raise InputError('source', None, 'the text that was translated')
    else:
      start = tokenizer.encode_start('') or ([] if end is None else [end])
      self.remark_length(len(start) + len(ids))
      whole = _row(*start, *ids)
      targets = whole[:, 1:].copy()
      targets[:, : len(start) - 1] = IGNORE
      batch = Batch(whole[:, :-1], targets)
    if not (batch.targets_BT != IGNORE).any():
      raise InputError('text', text, 'a text with a token to predict')
    return evaluate(self.definition, self.params, [batch], token_bytes_V=tokenizer.token_bytes)

  def export(self, out: str | pathlib.Path, *, dtype: str = 'float32') -> None:
    """Write the weights for other libraries: a folder of Hugging Face weights with the tokenizer,
    or, under a name that ends in .safetensors or .pth, a file of RWKV weights."""
    if is_rwkv(out):
      save_rwkv(out, self.config, self.params, dtype=dtype)
      return
    if self.source is not None and self.tokenizer is None:
      save_hf(out, self.config, self.params, dtype=dtype, source=self.source)
      return
    tokenizer = self.text_tokenizer()
    if tokenizer.source is not tokenizer:
      problem = (
        'has a tokenizer of sources and another of translations, and such a folder holds one'
      )
      raise InputError('model', self.name, problem=problem)
    begin = tokenizer.beginning[0] if tokenizer.beginning else None
    ids = {'eos_token_id': tokenizer.end_of_document, 'bos_token_id': begin}
    if self.translates:
      ids['decoder_start_token_id'] = self.decoder_start
    save_hf(
      out,
      self.config,
      self.params,
      dtype=dtype,
      source=self.source,
      token_ids=ids,
      texts=tokenizer.hugging_face_files(),
    )


@dataclasses.dataclass(frozen=True)
class AlignedText:
  """Cross-attention weights: a row per token of the target, a column per token of the source."""

  source: list[str]
  target: list[str]
  weights_TS: np.ndarray

  def json(self) -> dict[str, Any]:
    return {'source': self.source, 'target': self.target, 'weights': self.weights_TS.tolist()}

  def lines(self) -> list[str]:
    return [
      f'{row}\t{self.source[int(w.argmax())]}\t{w.max():.2f}'
      for row, w in zip(self.target, self.weights_TS, strict=True)
    ]

  def draw(self, path: str | pathlib.Path) -> None:
    """Write the weights as a picture; the ending of the path selects the format."""
    draw(path, self.weights_TS, self.source, self.target)


def _row(*ids: int | None) -> np.ndarray:
  return np.array([ids], np.int32)


def _names(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
  return [END if i == tokenizer.end_of_document else tokenizer.decode([i]) for i in ids]
