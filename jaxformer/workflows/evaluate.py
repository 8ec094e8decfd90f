"""Scores of a trained model on held-out data, as one value."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypedDict

from jaxformer.config import InputError
from jaxformer.data import Dataset, DatasetConfig, Text, open_data
from jaxformer.evaluation import (
  EvalResult,
  TranslationResult,
  evaluate,
  evaluate_translation,
  loss_by_position,
)
from jaxformer.inference import translate
from jaxformer.overrides import override
from jaxformer.task_type import TRANSLATION
from jaxformer.training.experiment import Experiment, check_fit
from jaxformer.workflows.names import Overrides, pairs_of
from jaxformer.workflows.progress import Log
from jaxformer.workflows.progress import log as log_progress
from jaxformer.workflows.sizes import Pairs

if TYPE_CHECKING:
  from jaxformer.workflows.model import Model

LONGEST = 1024  # tokens per sequence for weights of another library
SHOWN_POSITIONS = (0, 1, 3, 7, 15, 31, 63, 127, 255, 511, 1023, 2047, 4095)


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Scores of a trained model.

  Attributes:
    name, step: of the model.
    source: of the data.
    held_out: what the sequences that were scored are called.
    result: loss, accuracy, bits per byte and perplexity.
    baselines: bits per byte of models of single bytes, by name ('unigram_bits_per_byte'); empty for
      data other than text.
    translation: scores of translations; None for data other than pairs.
    loss_by_position: nats per target at each position; None if not asked for.
  """

  name: str
  step: int | None
  source: str
  held_out: str
  result: EvalResult
  baselines: dict[str, float]
  translation: TranslationResult | None = None
  loss_by_position: list[float] | None = None

  def json(self) -> dict[str, Any]:
    r = self.result
    value: dict[str, Any] = {
      'run': self.name,
      'step': self.step,
      'source': self.source,
      'loss': r.loss,
      'targets': r.count,
    }
    if r.bytes is not None:
      value |= {'bits_per_byte': r.bits_per_byte, 'perplexity': r.perplexity, 'bytes': r.bytes}
    if not self.baselines:
      value['accuracy'] = r.accuracy
    value |= self.baselines
    if self.translation is not None:
      value['translation'] = self.translation.json()
    if self.loss_by_position is not None:
      value['loss_by_position'] = self.loss_by_position
    return value

  def lines(self) -> list[str]:
    r = self.result
    step = '' if self.step is None else f' at step {self.step}'
    head = f'{self.name}{step}, {self.held_out}: {r.count:,} targets'
    if r.bytes is None:
      lines = [head, f'  {r.accuracy:.2%} correct, {r.loss:.4f} nats per target']
    else:
      known = ', '.join(f'{n.partition("_")[0]} {v:.4f}' for n, v in self.baselines.items())
      known = f' (models of bytes: {known})' if known else ''
      lines = [
        f'{head}, {r.bytes:,} bytes',
        f'  {r.bits_per_byte:.4f} bits per byte{known}',
        f'  {r.loss:.4f} nats per token, perplexity {r.perplexity:.2f}, top-1 accuracy '
        f'{r.accuracy:.2%}',
      ]
    if self.translation is not None:
      lines += [f'  {line}' for line in self.translation.lines()]
    if (losses := self.loss_by_position) is not None:
      at = (f'{i}: {losses[i]:.3f}' for i in SHOWN_POSITIONS if i < len(losses))
      lines.append(f'  nats at position {", ".join(at)}')
    return lines


class EvaluateOptions(TypedDict, total=False):
  """Options of `evaluate`.

  Attributes:
    data: in place of the data that the model was trained on.
    overrides: of fields of the data, `{'data.corpus': 'Files', 'data.corpus.path': 'other.txt'}`.
    batch_size: sequences per batch (16); changes no score.
    batches: at most so many batches, spread over the split; all by default.
    translations: of pairs, at most so many held-out sources are translated and scored (200).
    by_position: also the loss at each position of a document.
    log: receives progress; the logger 'jaxformer' by default.
  """

  data: DatasetConfig | None
  overrides: Overrides
  batch_size: int
  batches: int | None
  translations: int
  by_position: bool
  log: Log


def evaluate_model(
  model: Model,
  *,
  data: DatasetConfig | None = None,
  overrides: Overrides = (),
  batch_size: int = 16,
  batches: int | None = None,
  translations: int = 200,
  by_position: bool = False,
  log: Log = log_progress,
) -> Evaluation:
  """Score a model; see `jaxformer.evaluate`."""
  for field, value in (('batch_size', batch_size), ('batches', batches)):
    if value is not None and value < 1:
      raise InputError(field, value, 'positive')
  if translations < 0:
    raise InputError('translations', translations, 'at least 0')
  chosen = _data(model, data, pairs_of(overrides))
  check_fit(model.config, chosen)
  if by_position and chosen.task.predicts == 'class':
    raise InputError(f'by_position: {chosen.tag} has one class per sequence')
  dataset = open_data(chosen, log=log, tokenizer=model.tokenizer)
  check_fit(model.config, chosen, dataset.vocab_size, dataset.source_vocab_size)

  def held_out() -> Any:
    return dataset.validation_batches(batch_size, batches)

  bytes_V = None if dataset.tokenizer is None else dataset.tokenizer.token_bytes
  result = evaluate(model.definition, model.params, held_out(), token_bytes_V=bytes_V)
  positions = None
  if by_position:
    found = loss_by_position(model.definition, model.params, held_out())
    positions = found.loss_T.tolist()
  translated = None
  if chosen.task == TRANSLATION and translations:
    translated = _translation(model, dataset, translations, batch_size)
  return Evaluation(
    model.name,
    model.step,
    chosen.title,
    chosen.validation_name,
    result,
    dataset.baselines(),
    translated,
    positions,
  )


def _data(model: Model, data: DatasetConfig | None, overrides: Pairs) -> DatasetConfig:
  """Return the data that a model is scored on."""
  for path, _ in overrides:
    field = path.replace('-', '_')
    if field.partition('.')[0] != 'data' or field.startswith(
      ('data.tokenizer', 'data.source_tokenizer')
    ):
      raise InputError(
        f'--{path}: evaluation takes overrides of data only, and the tokenizer is that of the model'
      )
  experiment = model.experiment or Experiment(
    model=model.config, data=Text(sequence_length=min(model.config.context_length, LONGEST))
  )
  if data is not None:
    experiment = experiment.replace(data=data)
  chosen = override(experiment, overrides).data
  if model.tokenizer is None and chosen.has_text:
    raise InputError(
      f'{model.name}: has no tokenizer; it was trained on {experiment.data.tag} and cannot be '
      'scored on text'
    )
  return chosen


def _translation(model: Model, dataset: Dataset, limit: int, batch_size: int) -> TranslationResult:
  """Return scores of greedy translations of held-out sources."""
  tokenizer = model.text_tokenizer()
  end = tokenizer.end_of_document
  assert end is not None, 'pairs end with a token'

  def search(sources: Any) -> list[list[int]]:
    found = translate(
      model.definition,
      model.params,
      sources,
      end=end,
      vocab_size=dataset.vocab_size,
      batch_size=batch_size,
    )
    return [t.tokens for t in found]

  return evaluate_translation(search, dataset.held_out_pairs(limit), tokenizer)
