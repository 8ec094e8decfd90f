"""Timing of prefill and decoding."""

import statistics
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxformer.config import InputError
from jaxformer.inference.decoding import check_positive, check_state, request
from jaxformer.inference.sampling import GREEDY
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.params import Definition, Params


class DecodeTime(NamedTuple):
  """Times of one length of prompts, medians over the repeats.

  Attributes:
    context_length: tokens of each prompt.
    state_bytes: of the model's state for one sequence, in a program that computes in bfloat16.
    prefill_seconds: reading all prompts of the batch and sampling one token each.
    seconds_per_token: one more token for each row of the batch.
    compile_seconds: the first run, including compilation.
  """

  context_length: int
  state_bytes: int
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
  dtype: Any = None,
) -> DecodeTime:
  """Time greedy continuations by `new_tokens` of prompts of `prompt_length` random tokens, after a
  warm-up; prefill and decoding separately."""
  check_positive(prompt_length=prompt_length, batch=batch, repeats=repeats)
  if new_tokens < 2:
    raise InputError('new_tokens', new_tokens, 'at least 2')
  config, shape = definition.config, (batch, prompt_length)
  given = {'context_length': prompt_length}
  if new_tokens > prompt_length:
    given = {'new_tokens': new_tokens}
  check_state(config, batch, prompt_length + new_tokens, None, **given)
  prompts = np.random.default_rng(0).integers(0, config.vocab_size, shape).tolist()
  r = request(definition, params, prompts, max_new_tokens=new_tokens, sampling=GREEDY, dtype=dtype)
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
  return DecodeTime(
    prompt_length,
    config.state_bytes(prompt_length + new_tokens) or 0,
    statistics.median(prefill),
    statistics.median(decode),
    compile_seconds,
  )
