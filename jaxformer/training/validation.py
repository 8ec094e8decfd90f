"""Scores on held-out data, during training."""

from __future__ import annotations

from typing import Any, Protocol

from jax.sharding import Mesh

from jaxformer.data import Dataset
from jaxformer.evaluation import evaluate
from jaxformer.models.params import Definition, Params
from jaxformer.sharding import Rules
from jaxformer.training.feed import Feed


class Evaluate(Protocol):
  def __call__(self, params: Params) -> dict[str, Any]: ...


def validator(
  definition: Definition,
  dataset: Dataset,
  mesh: Mesh,
  rules: Rules | str,
  dtype: Any,
  batch_size: int,
  limit_batches: int | None,
) -> Evaluate:
  """A function from parameters to `eval/loss` (nats a target), `eval/source`, and
  `eval/bits_per_byte` of text or `eval/accuracy` over what a task asks.

  Bits per byte compare models across tokenizers: they count the bytes that the targets stand for.
  With `limit_batches` the held-out rows are a sample, always the same, and `eval/source` says so.
  """
  feed = Feed(mesh, rules, batch_size, dataset.config.positions)
  whole = limit_batches is None or dataset.validation_rows <= limit_batches * batch_size
  source = dataset.config.held_out + ('' if whole else f', {limit_batches} batches of {batch_size}')
  bytes_V = None if dataset.tokenizer is None else dataset.tokenizer.token_bytes

  def run(params: Params) -> dict[str, Any]:
    batches = dataset.validation_batches(batch_size, limit_batches, feed.index, feed.count)
    r = evaluate(
      definition, params, batches, token_bytes_V=bytes_V, mesh=mesh, rules=rules, dtype=dtype
    )
    score = (
      {'eval/accuracy': r.accuracy} if bytes_V is None else {'eval/bits_per_byte': r.bits_per_byte}
    )
    return {'eval/loss': r.loss, **score, 'eval/source': source}

  return run
