"""Text that is generated while training, always from the same prompts and seed so that steps can be
compared."""

from collections.abc import Iterator
from typing import Any

from jaxformer.data import Dataset
from jaxformer.exit_codes import NotFiniteError
from jaxformer.inference import Sampling, request, stream, translate
from jaxformer.models.params import Params, define
from jaxformer.sharding import make_parallel
from jaxformer.task_type import LANGUAGE_MODELING, TRANSLATION
from jaxformer.training.experiment import Experiment
from jaxformer.training.member import Sample

TOKENS = 200
PAIRS = 4


def sampler(experiment: Experiment, dataset: Dataset) -> Sample | None:
  """Return a function from parameters and step to text: translations of some held-out sources
  beside their references, or the continuation of the start of a document (without a token for that,
  of the first held-out token). None for a model that generates no text."""
  model, tokenizer = experiment.model, dataset.tokenizer
  if tokenizer is None or model.task not in (LANGUAGE_MODELING, TRANSLATION):
    return None
  definition, end = define(model), tokenizer.end_of_document
  decode, decode_bytes = tokenizer.decode, tokenizer.decode_bytes
  known: dict[str, Any] = {
    'vocab_size': tokenizer.vocab_size,
    'parallel': make_parallel(experiment.mesh),
  }
  pairs = dataset.held_out_pairs(PAIRS) if model.task == TRANSLATION else []
  prompt = tokenizer.encode_start('')
  if not prompt and end is None:
    prompt = next(iter(dataset.validation_batches(1))).inputs[0, :1].tolist()
  new_tokens = TOKENS if model.max_len is None else min(TOKENS, model.max_len - 1)

  def translations(params: Params, step: int) -> Iterator[str]:
    assert end is not None
    found = translate(definition, params, [p.source_ids for p in pairs], end=end, **known)
    yield '\n'.join(
      f'{p.source} -> {decode(t.tokens)} (reference: {p.reference})'
      for p, t in zip(pairs, found, strict=True)
    )

  def continuation(params: Params, step: int) -> Iterator[str]:
    r = request(
      definition,
      params,
      [prompt],
      max_new_tokens=new_tokens,
      sampling=Sampling(temperature=0.8),
      end_of_document=end,
      **known,
    )
    yield decode(prompt)
    for (piece,) in stream(r, decode_bytes):
      yield piece

  chosen = translations if model.task == TRANSLATION else continuation
  return lambda params, step: _or_why_not(chosen(params, step))


def _or_why_not(pieces: Iterator[str]) -> Iterator[str]:
  """Yield the pieces of a sample, and why there are no more where logits are not finite: whether
  the run goes on is decided by its loss."""
  try:
    yield from pieces
  except NotFiniteError as e:
    yield f'({e})'
