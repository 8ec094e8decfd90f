"""Text that is generated while training, always from the same prompts and seed so that steps can be
compared."""

from __future__ import annotations

from collections.abc import Callable

from jaxformer.data import Dataset
from jaxformer.inference import Sampling, generate_text, request, translate
from jaxformer.models.params import Params, define
from jaxformer.sharding import make_parallel
from jaxformer.task_type import LANGUAGE_MODELING, TRANSLATION
from jaxformer.training.experiment import Experiment

TOKENS = 200
PAIRS = 4
Sample = Callable[[Params, int], str]


def sampler(experiment: Experiment, dataset: Dataset) -> Sample | None:
  """Return a function from parameters and step to text; None for a model that generates none."""
  task = experiment.model.task
  if dataset.tokenizer is None or task not in (LANGUAGE_MODELING, TRANSLATION):
    return None
  return (_continuation if task == LANGUAGE_MODELING else _translations)(experiment, dataset)


def _continuation(experiment: Experiment, dataset: Dataset) -> Sample:
  """Continue the start of a document, or, without a token for that, the first held-out token."""
  definition, tokenizer = define(experiment.model), dataset.tokenizer
  assert tokenizer is not None
  prompt = []
  if tokenizer.end_of_document is None:
    prompt = next(iter(dataset.validation_batches(1))).inputs[0, :1].tolist()
  parallel, most = make_parallel(experiment.mesh), experiment.model.max_len

  def sample(params: Params, step: int) -> str:
    r = request(
      definition,
      params,
      [prompt],
      max_new_tokens=TOKENS if most is None else min(TOKENS, most - 1),
      sampling=Sampling(temperature=0.8),
      end_of_document=tokenizer.end_of_document,
      vocab_size=tokenizer.vocab_size,
      parallel=parallel,
    )
    return tokenizer.decode(prompt) + generate_text(r, tokenizer.decode_bytes)[0].text

  return sample


def _translations(experiment: Experiment, dataset: Dataset) -> Sample:
  """Translate some held-out sources, beside their references."""
  definition, pairs = define(experiment.model), dataset.held_out_pairs(PAIRS)
  tokenizer, parallel = dataset.tokenizer, make_parallel(experiment.mesh)
  assert tokenizer is not None
  end = tokenizer.end_of_document
  assert end is not None
  decode = tokenizer.decode

  def sample(params: Params, step: int) -> str:
    found = translate(
      definition,
      params,
      [p.source_ids.tolist() for p in pairs],
      end=end,
      vocab_size=tokenizer.vocab_size,
      parallel=parallel,
    )
    return '\n'.join(
      f'{p.source} -> {decode(t.tokens)} (reference: {p.reference})'
      for p, t in zip(pairs, found, strict=True)
    )

  return sample
