"""Against the `rwkv` package, the oracle: the same logits in both directions, fp32 on a CPU.

The package decides by an environment variable, when it is imported, whether it runs RWKV-7: each
model has a process of its own."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.interop import load_rwkv, save_rwkv
from jaxformer.models.params import define
from tests.interop.small import RWKV, noisy_rwkv

LACKING = [m for m in ('torch', 'rwkv') if importlib.util.find_spec(m) is None]
pytestmark = [
  pytest.mark.parity,
  pytest.mark.skipif(
    bool(LACKING), reason=f'{" and ".join(LACKING)} not installed: pip install "jaxformer[parity]"'
  ),
]

TOLERANCE = 1e-4
TOKENS = np.random.default_rng(0).integers(0, 50, 40).tolist()

THEIRS = """
import json, sys
from rwkv.model import RWKV
tokens = json.loads(sys.argv[2])
model = RWKV(model=sys.argv[1], strategy='cpu fp32')
whole, _ = model.forward(list(tokens), None, full_output=True)
first, state = model.forward(list(tokens[:25]), None)
for token in tokens[25:]:
  last, state = model.forward([token], state)
print('LOGITS' + json.dumps([whole.tolist(), last.tolist()]))
"""


def their_logits(path, version):
  """Of every position `[T, V]` and after the last, token by token `[V]`, of the `.pth` file
  `path`."""
  environment = (
    os.environ
    | {'RWKV_JIT_ON': '0', 'RWKV_CUDA_ON': '0'}
    | ({'RWKV_V7_ON': '1'} if version == 'rwkv7' else {})
  )
  done = subprocess.run(
    [sys.executable, '-c', THEIRS, str(path.with_suffix('')), json.dumps(TOKENS)],
    env=environment,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return [np.asarray(x) for x in json.loads(done.stdout.rpartition('LOGITS')[2])]


def agree(ours, whole, last, what):
  gaps, most = (np.abs(ours - whole).max(), np.abs(ours[-1] - last).max()), np.abs(whole).max()
  print(
    f'{what}: max abs difference {gaps[0]:.2e}, token by token {gaps[1]:.2e}, of logits up to '
    f'{most:.2f}'
  )
  assert most > 0.5  # else a small difference says nothing
  assert max(gaps) < TOLERANCE


@pytest.mark.parametrize('version', RWKV)
def test_same_logits_in_both_directions(version, tmp_path):
  """Ours, written, runs in the package with the logits that it has here; and what the package ran
  is read back the same."""
  config = RWKV[version]
  params = noisy_rwkv(config)
  save_rwkv(tmp_path / 'ours.pth', config, params)
  whole, last = their_logits(tmp_path / 'ours.pth', version)
  for what, (model, weights) in {
    'export': (config, params),
    'import': load_rwkv(tmp_path / 'ours.pth'),
  }.items():
    ours = np.asarray(
      jax.jit(lambda p, x, m=model: define(m).merge(p)(x).y)(weights, jnp.asarray([TOKENS]))
    )[0]
    agree(ours, whole, last, f'{version} {what}')


@pytest.mark.parametrize('version', RWKV)
def test_a_file_of_theirs_is_read(version, tmp_path):
  """A state dict with the names and shapes of the official training code, from PyTorch, and as the
  package runs it."""
  import torch

  shapes = OFFICIAL[version]()
  torch.manual_seed(0)
  # Large low-rank matrices (`_w1`, `_w2`) make a function so steep that the package's own two ways
  # to run it lie 4e-5 apart.
  scale = {
    n: 0.1 if re.search('_w[12]$', n) else 0.3 if len(s) > 1 else 0.2 for n, s in shapes.items()
  }
  tensors = {
    n: torch.randn(s) * scale[n] + ('ln' in n and n.endswith('weight')) for n, s in shapes.items()
  }
  torch.save(tensors, tmp_path / 'theirs.pth')
  config, params = load_rwkv(tmp_path / 'theirs.pth')
  ours = np.asarray(
    jax.jit(lambda p, x: define(config).merge(p)(x).y)(params, jnp.asarray([TOKENS]))
  )[0]
  whole, last = their_logits(tmp_path / 'theirs.pth', version)
  agree(ours, whole, last, f'{version} theirs')


def _official(D, L, F, V, att, ffn):
  shapes = {'emb.weight': (V, D), 'blocks.0.ln0.weight': (D,), 'blocks.0.ln0.bias': (D,)}
  for i in range(L):
    norms = {f'{n}.{p}': (D,) for n in ('ln1', 'ln2', 'att.ln_x') for p in ('weight', 'bias')}
    shapes |= {f'blocks.{i}.{n}': s for n, s in (norms | att(i) | ffn).items()}
  return shapes | {'ln_out.weight': (D,), 'ln_out.bias': (D,), 'head.weight': (V, D)}


def _official_7(D=64, K=16, L=3, F=96, V=50):
  ranks = {'w': 8, 'a': 6, 'v': 5, 'g': 12}

  def att(i):
    rows = ['x_r', 'x_w', 'x_k', 'x_v', 'x_a', 'x_g', 'w0', 'a0', 'v0', 'k_k', 'k_a']
    low_rank = {f'att.{z}1': (D, n) for z, n in ranks.items()} | {
      f'att.{z}2': (n, D) for z, n in ranks.items()
    }
    matrices = {f'att.{n}.weight': (D, D) for n in ('receptance', 'key', 'value', 'output')}
    # v0, v1, v2 in block 0 too
    return {f'att.{n}': (1, 1, D) for n in rows} | low_rank | matrices | {'att.r_k': (D // K, K)}

  return _official(
    D, L, F, V, att, {'ffn.x_k': (1, 1, D), 'ffn.key.weight': (F, D), 'ffn.value.weight': (D, F)}
  )


def _channels(D, F, mix):
  """Channel mixing with a receptance: RWKV-4 to 6."""
  return {
    f'ffn.{mix}_k': (1, 1, D),
    f'ffn.{mix}_r': (1, 1, D),
    'ffn.key.weight': (F, D),
    'ffn.receptance.weight': (D, D),
    'ffn.value.weight': (D, F),
  }


def _official_4(D=64, L=3, F=256, V=50):
  att = {'att.time_decay': (D,), 'att.time_first': (D,)} | {
    f'att.time_mix_{z}': (1, 1, D) for z in 'kvr'
  }
  att |= {f'att.{n}.weight': (D, D) for n in ('key', 'value', 'receptance', 'output')}
  shapes = _official(D, L, F, V, lambda i: att, _channels(D, F, 'time_mix'))
  return {n: s for n, s in shapes.items() if 'ln_x' not in n}


def _official_5(D=64, K=16, L=3, F=224, V=50):
  att = {f'att.time_mix_{z}': (1, 1, D) for z in 'kvrg'} | {
    'att.time_decay': (D // K, K),
    'att.time_faaaa': (D // K, K),
  }
  att |= {f'att.{n}.weight': (D, D) for n in ('receptance', 'key', 'value', 'output', 'gate')}
  return _official(D, L, F, V, lambda i: att, _channels(D, F, 'time_mix'))


def _official_6(D=64, K=16, L=3, F=224, V=50):
  att = {f'att.time_maa_{z}': (1, 1, D) for z in 'xwkvrg'} | {
    'att.time_maa_w1': (D, 5 * 32),
    'att.time_maa_w2': (5, 32, D),
  }
  att |= {
    'att.time_decay': (1, 1, D),
    'att.time_decay_w1': (D, 64),
    'att.time_decay_w2': (64, D),
    'att.time_faaaa': (D // K, K),
  }
  att |= {f'att.{n}.weight': (D, D) for n in ('receptance', 'key', 'value', 'output', 'gate')}
  return _official(D, L, F, V, lambda i: att, _channels(D, F, 'time_maa'))


OFFICIAL = {'rwkv4': _official_4, 'rwkv5': _official_5, 'rwkv6': _official_6, 'rwkv7': _official_7}
