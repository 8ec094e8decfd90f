"""Continuations of prompts, all at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxformer.inference.decoding import request
from jaxformer.inference.sampling import PLAIN, Sampling
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.params import Definition, Params
from jaxformer.sharding import Rules
from jaxformer.task_type import IGNORE


class Generated(NamedTuple):
  """A continuation.

  Attributes:
    tokens: the new tokens, without the end of document.
    finished: the model drew the end of document; False where `max_new_tokens` ended it.
  """

  tokens: list[int]
  finished: bool


def generate(
  definition: Definition[LanguageModel],
  params: Params,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  sampling: Sampling = PLAIN,
  seed: int = 0,
  end_of_document: int | None = None,
  dtype: Any = None,
  max_len: int | None = None,
  mesh: Mesh | None = None,
  rules: Rules | str = 'fsdp_tensor',
  vocab_size: int | None = None,
) -> list[Generated]:
  """A continuation of each prompt, in their order.

  A row's result depends on its prompt, the seed and its place in the list, not on the other
  prompts.

  Args:
    prompts: token ids, of any lengths; an empty one starts from the end of document.
    max_new_tokens: at most so many tokens each. All rows run until each has ended.
    end_of_document: the token that ends a continuation; None where the vocabulary has none.
    dtype: what to compute in; None for the parameters' own.
    max_len: room for prompt and new tokens in the model's state; None for what is needed. Give one
      value to calls of different lengths to compile once for all.
    mesh, rules: where the parameters live; None for one device.
    vocab_size: of the tokenizer, where the model's is rounded up: the rows beyond are no tokens and
      are never drawn.

  Raises:
    InputError: token ids out of range, an empty prompt without an end of document, or more tokens
      than the model has positions for.
  """
  r = request(
    definition,
    params,
    prompts,
    max_new_tokens=max_new_tokens,
    sampling=sampling,
    seed=seed,
    end_of_document=end_of_document,
    dtype=dtype,
    max_len=max_len,
    mesh=mesh,
    rules=rules,
    vocab_size=vocab_size,
  )
  last = r.advance(r.begin(), max_new_tokens)
  tokens_BN, finished_B = np.asarray(last.tokens_BN), np.asarray(last.finished_B)
  return [Generated(row[row != IGNORE].tolist(), bool(f)) for row, f in zip(tokens_BN, finished_B)]
