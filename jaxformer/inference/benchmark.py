"""Timing of prefill and decoding."""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxformer.config import InputError
from jaxformer.inference.decoding import request
from jaxformer.inference.sampling import GREEDY, Sampling
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.params import Definition, Params
from jaxformer.sharding import Parallel


class DecodeTime(NamedTuple):
  """Medians over the repeats.

  Attributes:
    prefill_seconds: reading all prompts of the batch and sampling one token each.
    seconds_per_token: one more token for each row of the batch.
    compile_seconds: the first run, including compilation.
  """

  prefill_seconds: float
  seconds_per_token: float
  compile_seconds: float


def time_decode(
  definition: Definition[LanguageModel],
  params: Params,
  prompt_length: int,
  new_tokens: int,
  batch: int = 1,
  repeats: int = 5,
  *,
  sampling: Sampling = GREEDY,
  dtype: Any = None,
  parallel: Parallel | None = None,
) -> DecodeTime:
  """Time prompts of `prompt_length` random tokens continued by `new_tokens`, after a warm-up;
  prefill and decoding separately."""
  if new_tokens < 2 or prompt_length < 1 or batch < 1 or repeats < 1:
    raise InputError(
      f'prompt_length = {prompt_length}, batch = {batch} and repeats = {repeats} must be positive, '
      f'new_tokens = {new_tokens} at least 2'
    )
  prompts = (
    np.random.default_rng(0)
    .integers(0, definition.config.vocab_size, (batch, prompt_length))
    .tolist()
  )
  r = request(
    definition,
    params,
    prompts,
    max_new_tokens=new_tokens,
    sampling=sampling,
    dtype=dtype,
    parallel=parallel,
  )
  start = time.perf_counter()
  jax.block_until_ready(r.advance(r.begin(), new_tokens))
  compile_seconds = time.perf_counter() - start
  prefill, decode, first = [], [], max(1, new_tokens // 4)
  for _ in range(repeats):
    start = time.perf_counter()
    begun = jax.block_until_ready(r.begin())
    prefill.append(time.perf_counter() - start)
    # The timer starts inside the loop: when it starts, memory of the prompt is freed, which takes
    # longer for longer prompts.
    going = jax.block_until_ready(r.advance(begun, first))
    start = time.perf_counter()
    jax.block_until_ready(r.advance(going, new_tokens))
    decode.append((time.perf_counter() - start) / (new_tokens - first))
  return DecodeTime(statistics.median(prefill), statistics.median(decode), compile_seconds)
