"""Recurrent families decode in constant memory and time per token, however long the context."""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers.layer import Context
from jaxformer.models.language_model import LanguageModel
from jaxformer.models.params import define
from jaxformer.models.zoo import PRESETS
from tests.tiers import thorough

SHORT, LONG, PART = 1024, 32768, 256
RECURRENT = {
  *('lstm', 'gru', 'moe-lstm', 'lssl', 's4', 's4d', 's5'),
  *('rwkv4', 'rwkv5', 'rwkv6', 'rwkv7', 'mamba', 'mamba2', 'mamba3', 'mamba3-mimo'),
  *('retnet', 'gla', 'hgrn2', 'deltanet', 'gated-deltanet', 'kda'),
  *('xlstm', 'xlstm-7-1', 'mingru', 'minlstm', 'recurrentgemma'),
}
TINY = {
  p.family: p.model.replace(context_length=2 * LONG)
  for name, p in PRESETS.items()
  if name.endswith('-tiny') and type(p.model) is LanguageModel.Config
}


@pytest.mark.quick
def test_families_whose_state_does_not_grow():
  flat = {f for f, model in TINY.items() if model.state_size(SHORT) == model.state_size(LONG)}
  assert flat == RECURRENT | {'mistral'}  # attention, all of it in a window


@thorough
@pytest.mark.parametrize('family', sorted(RECURRENT))
def test_a_step_takes_as_long_after_32768_tokens_as_after_1024(family):
  """Medians of rounds in turns, after as many tokens were read."""
  definition = define(TINY[family])
  params = definition.init(jax.random.key(0))
  tokens = np.random.default_rng(0).integers(0, 256, (LONG // PART, 1, PART), np.int32)

  @jax.jit
  def read(params, tokens_BT, state):
    return definition.merge(params)(tokens_BT, Context(), state).state

  @jax.jit
  def decode(params, tokens_BT, state):
    module = definition.merge(params)
    return jax.lax.scan(
      lambda state, token_B: (module.step(token_B, Context(), state).state, None),
      state,
      tokens_BT.T,
    )[0]

  states, times = [], [[], []]
  for length in (SHORT, LONG):
    state = definition.merge(params).init_state(1, length + PART)
    for part in tokens[: length // PART]:
      state = read(params, part, state)
    states.append(jax.block_until_ready(decode(params, tokens[0], state)))
  assert len({str(jax.tree.map(jnp.shape, s)) for s in states}) == 1
  for _ in range(15):
    for state, found in zip(states, times, strict=True):
      begin = time.perf_counter()
      jax.block_until_ready(decode(params, tokens[0], state))
      found.append(time.perf_counter() - begin)
  short, long = map(statistics.median, times)
  print(f'{family}: {long / short:.3f} times the time per token')
  assert long < 1.3 * short
