"""Scores of a trained model on held-out data, as one value."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, TypedDict

from jaxformer.config import InputError, to_json
from jaxformer.data import DatasetConfig, Text, open_data
from jaxformer.data.local_paths import paths_of
from jaxformer.evaluation import EvalResult, evaluate, loss_by_position, translate_held_out
from jaxformer.inference.decoding import check_positive
from jaxformer.inference.finite import require_finite
from jaxformer.memory import check_fits
from jaxformer.overrides import override
from jaxformer.task_type import TRANSLATION
from jaxformer.training.experiment import Experiment, check_fit
from jaxformer.workflows.overrides import Overrides, Pairs, pairs_of
from jaxformer.workflows.progress import Log, log_progress

if TYPE_CHECKING:
  from jaxformer.workflows.model import Model

LONGEST = 1024  # tokens per sequence for weights of another library


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
) -> EvalResult:
  """Return scores on held-out data, by default of the data that the model was trained on. The
  options are `EvaluateOptions`."""
  check_positive(batch_size=batch_size, batches=batches)
  if translations < 0:
    raise InputError('translations', translations, 'at least 0')
  chosen = _data(model, data, pairs_of(overrides))
  check_fit(model.config, chosen)
  if by_position and chosen.task.predicts == 'class':
    raise InputError(f'by_position: {chosen.tag} has one class per sequence')
  check_fits(
    batch_size * chosen.positions * (8 + 2 * model.config.width),  # token ids and the last layer
    'batch_size',
    batch_size,
    f'{batch_size:,} sequences of {chosen.positions:,} tokens',
    'a smaller batch',
  )
  dataset = open_data(chosen, log=log, tokenizer=model.tokenizer)
  check_fit(model.config, chosen, dataset.vocab_size, dataset.source_vocab_size)
  model.remark_length(chosen.positions)
  same = None
  if None not in (model.validation_sha256, dataset.validation_sha256):
    same = model.validation_sha256 == dataset.validation_sha256
  if same is False and data is None and not _names_data(chosen, pairs_of(overrides)):
    raise _other_data(model, chosen)

  def held_out() -> Any:
    found = dataset.validation_batches(batch_size, batches)
    return map(model.as_read, found) if chosen.task == TRANSLATION else found

  bytes_V = None if dataset.tokenizer is None else dataset.tokenizer.token_bytes
  result = evaluate(model.definition, model.params, held_out(), token_bytes_V=bytes_V)
  require_finite('losses', math.isfinite(result.nll_sum), model.params)
  positions = None
  if by_position:
    found = loss_by_position(model.definition, model.params, held_out())
    positions = [None if r is None else r.loss for r in found]
  translated = None
  if chosen.task == TRANSLATION and translations:
    translated = translate_held_out(
      model.definition,
      model.params,
      dataset,
      translations,
      batch_size=batch_size,
      **model.decoding(),
    )
  return dataclasses.replace(
    result,
    name=model.name,
    step=model.step,
    weights=model.weights,
    source=chosen.title,
    held_out=chosen.validation_name,
    validation_sha256=dataset.validation_sha256,
    of_run=same,
    baselines=dataset.baselines(),
    translation=translated,
    loss_by_position=positions,
  )


def _names_data(data: DatasetConfig, overrides: Pairs) -> bool:
  """Whether overrides say which data to score, and not only in sequences of which length."""
  return any(path.replace('-', '_') != f'data.{data.length_field}' for path, _ in overrides)


def _other_data(model: Model, data: DatasetConfig) -> InputError:
  """The error for data that have changed since the run was made."""
  read = ', '.join(f'{field} = {text}' for field, text in paths_of(to_json(data), 'data'))
  return InputError(
    f'{model.name}: {data.validation_name} is not what the run holds out, by its hash: '
    + (f'{read} was changed' if read else f'{data.title} differs here')
    + '; restore it, or name the data to score with --data...'
    + (' (as --data.corpus.path)' if read else '')
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
    if model.experiment is None:
      model.text_tokenizer()  # raises an error that says what to do
    raise InputError(
      f'{model.name}: has no tokenizer; it was trained on {experiment.data.tag} and cannot be '
      'scored on text'
    )
  return chosen
