"""Against transformers' Marian: the same logits and the same greedy translations, in both
directions, fp32 on a CPU."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.inference import translate
from jaxformer.interop import load_hf, save_hf
from jaxformer.models.params import define
from tests.interop.small import noisy

LACKING = [m for m in ('torch', 'transformers') if importlib.util.find_spec(m) is None]
pytestmark = [
  pytest.mark.parity,
  pytest.mark.skipif(
    bool(LACKING), reason=f'{" and ".join(LACKING)} not installed: pip install "jaxformer[parity]"'
  ),
]

TOLERANCE = 1e-4
PAD, EOS = 96, 0
SIZE = {
  'vocab_size': 97,
  'd_model': 48,
  'encoder_layers': 2,
  'decoder_layers': 2,
  'encoder_ffn_dim': 96,
  'decoder_ffn_dim': 96,
  'encoder_attention_heads': 4,
  'decoder_attention_heads': 4,
  'max_position_embeddings': 64,
  'pad_token_id': PAD,
  'eos_token_id': EOS,
  'forced_eos_token_id': None,
  'decoder_start_token_id': PAD,
}
MODELS = {
  'vaswani': SIZE | {'activation_function': 'relu', 'scale_embedding': True},
  'unusual': SIZE
  | {
    'activation_function': 'swish',
    'decoder_layers': 3,
    'decoder_ffn_dim': 64,
    'encoder_attention_heads': 2,
    'decoder_attention_heads': 6,
  },
}


def theirs(name):
  import torch
  import transformers

  torch.manual_seed(0)
  model = transformers.MarianMTModel(transformers.MarianConfig(**MODELS[name])).eval()
  with torch.no_grad():
    for p in model.parameters():  # scales of ones and offsets of zeros would hide a wrong map
      if p.requires_grad:  # the table of positions does not
        p.add_(torch.randn_like(p) * 0.1)
    model.final_logits_bias.add_(torch.randn_like(model.final_logits_bias))
  return model


@pytest.fixture(scope='module', params=MODELS)
def imported(request, tmp_path_factory):
  """(their model, our config, our params) after `save_pretrained` and `load_hf`."""
  model, folder = theirs(request.param), tmp_path_factory.mktemp('hf') / 'theirs'
  model.save_pretrained(folder)
  return model, *load_hf(folder)


def batch():
  """Sources of 17, 12 and 3 tokens, and what a decoder reads."""
  numbers = np.random.default_rng(0)
  source, tokens = numbers.integers(1, 96, (3, 17)), numbers.integers(1, 96, (3, 11))
  mask = np.arange(17)[None] < np.array([17, 12, 3])[:, None]
  return source, mask, tokens


def agree(model, config, params, what):
  import torch

  source, mask, tokens = batch()
  with torch.no_grad():
    expected = model(
      input_ids=torch.from_numpy(source),
      attention_mask=torch.from_numpy(mask).long(),
      decoder_input_ids=torch.from_numpy(tokens),
    ).logits.numpy()
  run = jax.jit(lambda p, s, t: define(config).merge(p)(s, t).y)
  ours = run(params, jnp.asarray(np.where(mask, source, -1)), jnp.asarray(tokens))
  difference = np.abs(np.asarray(ours) - expected).max()
  print(f'{what}: max abs difference {difference:.2e} of logits up to {np.abs(expected).max():.2f}')
  assert np.abs(expected).max() > 0.5
  assert difference < TOLERANCE


def test_import_gives_the_same_logits(imported, request):
  model, config, params = imported
  agree(model, config, params, f'import {request.node.callspec.id}')


def test_export_gives_the_same_logits(imported, request, tmp_path):
  import transformers

  _, config, _ = imported
  initial, noise = define(config).init(jax.random.key(3)), noisy(config, seed=7, std=0.05)
  params = {n: noise[n] if 'scale' in n else p + noise[n] for n, p in initial.items()}
  save_hf(tmp_path / 'ours', config, params)
  model, told = transformers.AutoModelForSeq2SeqLM.from_pretrained(
    tmp_path / 'ours', output_loading_info=True
  )
  assert not any(told[k] for k in ('unexpected_keys', 'mismatched_keys')), told
  # made by their code, never stored
  assert {k for k in told['missing_keys'] if 'embed_positions' not in k} == set()
  agree(model.eval(), config, params, f'export {request.node.callspec.id}')
  assert load_hf(tmp_path / 'ours')[0] == config


def test_greedy_translations_are_the_same(imported):
  import torch

  model, config, params = imported
  source, mask, _ = batch()
  with torch.no_grad():
    expected = model.generate(
      torch.from_numpy(np.where(mask, source, PAD)),
      attention_mask=torch.from_numpy(mask).long(),
      do_sample=False,
      num_beams=1,
      max_new_tokens=24,
      bad_words_ids=[[PAD]],
    ).numpy()[:, 1:]
  found = translate(
    define(config),
    params,
    [s[m].tolist() for s, m in zip(source, mask, strict=True)],
    end=EOS,
    begin=PAD,
    max_new_tokens=24,
    vocab_size=PAD,
  )
  for t, row in zip(found, expected, strict=True):
    ended = np.flatnonzero(row == EOS)
    assert t.tokens == row[: ended[0] if len(ended) else None].tolist()
