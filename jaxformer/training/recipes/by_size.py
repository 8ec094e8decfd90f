"""Training of models that are no presets: what a model config or a family at a size stands for."""

import math

from jaxformer.data import (
  Bytes,
  DatasetConfig,
  Pairs,
  PublishedCorpus,
  PublishedPairs,
  PublishedTokenizer,
  Text,
)
from jaxformer.models.model import ModelConfig
from jaxformer.models.params import define
from jaxformer.task_type import LANGUAGE_MODELING, TRANSLATION
from jaxformer.training.experiment import (
  LONGEST,
  Experiment,
  RunConfig,
  TrainingConfig,
  default_experiment,
)
from jaxformer.training.optimizer import AdamW
from jaxformer.training.recipes.gpt import LENGTH, TABLE

# Parameters from which nobody wants the training of a tiny model.
LARGE = 30e6
TOKENS_PER_PARAMETER = 20  # compute-optimal, about (Hoffmann et al. 2022)
BYTES = range(257, 513)  # vocabularies that are meant for bytes


def is_large(model: ModelConfig) -> bool:
  """Return whether a model is too large for the settings of a tiny one."""
  return define(model).size >= LARGE


def model_experiment(model: ModelConfig, name: str) -> Experiment:
  """Return what a model without a recipe is trained with: a small one as a tiny preset; a large one
  on 20 tokens per active parameter, which have to be given, with the batch and the rate of the row
  of GPT-3's table that is nearest in size."""
  data = _data(model)
  if data is None or not is_large(model):
    return default_experiment(model, name)
  definition = define(model)
  _, _, batch, _, rate = min(TABLE, key=lambda row: abs(math.log(row[1] / definition.size)))
  rows = max(1, batch * LENGTH // data.positions)
  tokens = TOKENS_PER_PARAMETER * definition.active_size
  return Experiment(
    model=model,
    data=data,
    optimizer=AdamW(learning_rate=rate),
    training=TrainingConfig(
      steps=max(1, round(tokens / (rows * data.positions))),
      batch_size=rows,
      remat='full',
      eval_every=1000,
      checkpoint_every=1000,
    ),
    run=RunConfig(name=name),
  )


def _data(model: ModelConfig) -> DatasetConfig | None:
  """Return data that have to be given to a large model; None for tasks, which are generated."""
  size = model.task.vocab_size or 0
  tokenizer = Bytes() if size in BYTES else PublishedTokenizer(name='a tokenizer', vocab_size=size)
  if model.task == LANGUAGE_MODELING:
    return Text(
      corpus=PublishedCorpus(name='text'),
      tokenizer=tokenizer,
      sequence_length=min(model.context_length, LONGEST),
    )
  if model.task == TRANSLATION:
    length = min(model.context_length, LONGEST)
    return Pairs(
      corpus=PublishedPairs(name='pairs of texts'),
      tokenizer=tokenizer,
      source_lengths=(length,),
      target_lengths=(length,),
    )
  return None
