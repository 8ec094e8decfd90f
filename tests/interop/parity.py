"""Comparison of a model with that of transformers, the oracle, in fp32 on a CPU: the same logits
and the same greedy tokens, in both directions."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.interop import load_hf, save_hf
from jaxformer.layers.layer import Context
from jaxformer.models.params import define
from tests.interop.small import noisy

LACKING = [m for m in ('torch', 'transformers') if importlib.util.find_spec(m) is None]
MARKS = [
  pytest.mark.parity,
  pytest.mark.skipif(
    bool(LACKING), reason=f'{" and ".join(LACKING)} not installed: pip install "jaxformer[parity]"'
  ),
]

TOLERANCE = 1e-4
LENGTH, NEW = 96, 48

VOCABULARY = 97


def random_model(family, fields):
  """A model of transformers with parameters of which none is constant."""
  import torch
  import transformers

  torch.manual_seed(0)
  config = getattr(transformers, f'{family}Config')(**fields, bos_token_id=None, eos_token_id=None)
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  with torch.no_grad():
    for p in model.parameters():  # scales of ones and offsets of zeros would hide a wrong map
      p.add_(torch.randn_like(p) * 0.1)
  return model


def biases_of_choice(model):
  """The biases of routers that balance without a loss, which transformers counts as buffers; adds
  noise to them."""
  import torch

  biases = [b for n, b in model.named_buffers() if n.endswith('e_score_correction_bias')]
  for bias in biases:
    bias.add_(torch.randn_like(bias) * 0.1)
  return biases


def tokens(seed=0, length=LENGTH):
  return np.random.default_rng(seed).integers(0, VOCABULARY, (2, length))


def their_logits(model, ids):
  import torch

  with torch.no_grad():
    return model(torch.from_numpy(ids)).logits.float().numpy()


def our_logits(config, params, ids):
  return np.asarray(_logits(config, params, jnp.asarray(ids)))


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, ids):
  return define(config).merge(params)(ids).y


def agree(ours, expected, what):
  difference = np.abs(ours - expected).max()
  print(f'{what}: max abs difference {difference:.2e} of logits up to {np.abs(expected).max():.2f}')
  assert np.abs(expected).max() > 0.5  # else a small difference says nothing
  assert difference < TOLERANCE


def same_after_import(model, config, params, what):
  """Their model and ours, after `save_pretrained` and `load_hf`."""
  agree(our_logits(config, params, tokens()), their_logits(model, tokens()), f'import {what}')


def same_after_export(config, folder, what, computed=''):
  """Ours with noise in every parameter, and theirs after `save_hf` and `from_pretrained`.

  Args:
    computed: pattern of their buffers that follow from the config and are not written.
  """
  import transformers

  initial, noise = define(config).init(jax.random.key(3)), noisy(config, seed=7, std=0.05)
  # `noisy` has scales around 1, those of norms that start at 1
  params = {n: p + noise[n] - ('scale' in n) for n, p in initial.items()}
  save_hf(folder, config, params)
  model, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
  assert not any(told[k] for k in ('unexpected_keys', 'mismatched_keys')), told
  assert all(re.fullmatch(computed, k) for k in told['missing_keys']), told
  agree(
    our_logits(config, params, tokens(1)), their_logits(model.eval(), tokens(1)), f'export {what}'
  )
  assert load_hf(folder)[0] == config


def same_greedy_tokens(model, config, params, rows=2, use_cache=True):
  """48 tokens, ours by prefill and steps, theirs by their own cache, or without one."""
  import torch

  prompt, definition = tokens(2, 40)[:rows], define(config)

  @jax.jit
  def greedy(params, ids):
    module = definition.merge(params)
    out = module(ids, Context(), module.init_state(ids.shape[0], ids.shape[1] + NEW))

    def step(carry, _):
      token, state = carry
      out = module.step(token, Context(), state)
      return (out.y.argmax(-1), out.state), token

    return jax.lax.scan(step, (out.y[:, -1].argmax(-1), out.state), length=NEW)[1].T

  with torch.no_grad():
    expected = model.generate(
      torch.from_numpy(prompt),
      attention_mask=torch.ones(prompt.shape, dtype=torch.long),
      do_sample=False,
      max_new_tokens=NEW,
      min_new_tokens=NEW,
      pad_token_id=0,
      use_cache=use_cache,
    )
  np.testing.assert_array_equal(
    np.asarray(greedy(params, jnp.asarray(prompt))), expected[:, prompt.shape[1] :].numpy()
  )
