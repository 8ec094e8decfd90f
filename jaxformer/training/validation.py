"""Bits per byte of held-out text, during training."""

from __future__ import annotations

from typing import Any, Protocol

from jax.sharding import Mesh

from jaxformer.data import Dataset
from jaxformer.evaluation import evaluate
from jaxformer.models.params import Definition, Params
from jaxformer.training.feed import Feed


class Evaluate(Protocol):
  def __call__(self, params: Params) -> dict[str, Any]: ...


def validator(
  definition: Definition, dataset: Dataset, mesh: Mesh, rules: str, dtype: Any, batch_size: int, limit_batches: int | None
) -> Evaluate:
  """A function from parameters to `eval/loss` (nats a target), `eval/bits_per_byte` and `eval/source`.

  Bits per byte compare models across tokenizers: they count the bytes that the targets stand for. With `limit_batches` the text is
  a sample of the validation side, always the same, and `eval/source` says so.
  """
  feed = Feed(mesh, rules, batch_size, dataset.config.sequence_length)
  whole = limit_batches is None or sum(1 for _ in dataset.validation_batches(batch_size, limit_batches + 1)) <= limit_batches
  source = f'{dataset.config.source.tag} validation' + ('' if whole else f', {limit_batches} batches of {batch_size}')

  def run(params: Params) -> dict[str, Any]:
    batches = dataset.validation_batches(batch_size, limit_batches, feed.index, feed.count)
    r = evaluate(definition, params, batches, token_bytes_V=dataset.tokenizer.token_bytes, mesh=mesh, rules=rules, dtype=dtype)
    return {'eval/loss': r.loss, 'eval/bits_per_byte': r.bits_per_byte, 'eval/source': source}

  return run
