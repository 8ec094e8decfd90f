"""Continuations of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxformer.inference.decoding import request
from jaxformer.inference.sampling import PLAIN, Sampling
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.params import Definition, Params
from jaxformer.sharding import Parallel
from jaxformer.task_type import IGNORE


class Generated(NamedTuple):
  """A continuation.

  Attributes:
    tokens: the new tokens, without the end of document.
    finished: whether the model sampled the end of document; False where `max_new_tokens` was
      reached.
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
  parallel: Parallel | None = None,
  vocab_size: int | None = None,
) -> list[Generated]:
  """Continue each prompt; results are in the same order.

  A result depends on its prompt, the seed and its index in the list, not on the other prompts.

  Args:
    prompts: token ids, of any lengths; an empty one starts from the end of document.
    max_new_tokens: maximum number of new tokens per prompt. The loop runs until all have ended.
    end_of_document: the token that ends a continuation; None if the vocabulary has none.
    dtype: compute dtype; None for that of the parameters.
    max_len: maximum length of prompt and new tokens in the model's state; None for what is needed.
      Pass one value to calls of different lengths to compile only once.
    parallel: mesh and rules of the parameters; None for one device.
    vocab_size: of the tokenizer, where the model's is padded: the rows beyond it are never sampled.

  Raises:
    InputError: token ids out of range, an empty prompt without an end of document, or more tokens
      than the model has positions.
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
    parallel=parallel,
    vocab_size=vocab_size,
  )
  last = r.advance(r.begin(), max_new_tokens)
  tokens_BN, finished_B = np.asarray(last.tokens_BN), np.asarray(last.finished_B)
  return [Generated(row[row != IGNORE].tolist(), bool(f)) for row, f in zip(tokens_BN, finished_B)]
