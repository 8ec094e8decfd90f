"""A layer of the user's own, from training to evaluation in another folder, by the command line and
from Python."""

import json
import re
import shutil

import pytest

import jaxformer
from jaxformer.cli import main
from jaxformer.config import InputError
from tests.e2e.program import start
from tests.helpers import temporary_types

pytestmark = [pytest.mark.e2e, pytest.mark.newest]

# It has the name of a layer of the package.
LAYER = '''
import jax
import jax.numpy as jnp

from jaxformer.layers.layer import Layer, LayerConfig, Output
from jaxformer.sharding import param


class Attention(Layer):
  """y_t = mean of x_s W over s <= t (Own 2026, eq. 1)."""

  class Config(LayerConfig):
    scale: float = 1.0

    def build(self, width, rngs, position):
      return Attention(self, width, rngs)

    def state_size(self, width, max_len):
      return width + 1

  def __init__(self, config, width, rngs):
    w = jax.random.normal(rngs.params(), (width, width)) * config.scale / width**0.5
    self.w = param(w, ('embed', 'inner'))

  def init_state(self, batch, max_len, memory=None):
    return jnp.zeros((batch, self.w.shape[1])), jnp.zeros((batch, 1))

  def __call__(self, x_BTD, ctx, state=None):
    y = (x_BTD @ self.w[...].astype(x_BTD.dtype)).astype(jnp.float32)
    total, count = (0.0, 0.0) if state is None else (state[0][:, None], state[1][:, None])
    total = total + jnp.cumsum(y, 1)
    count = count + jnp.ones_like(y[..., :1]).cumsum(1)
    state = None if state is None else (total[:, -1], count[:, -1])
    return Output((total / count).astype(x_BTD.dtype), state)
'''
TRAIN = [
  *('train', 'own.py:Attention', '--params', '100K', '--run.name', 'own'),
  *('--training.eval-batches', '1', '--training.trackers', 'none'),
  *('--data.corpus', 'PydocTopics', '--data.sequence-length', '32'),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
  home = tmp_path / 'home'
  home.mkdir()
  (home / 'own.py').write_text(LAYER)
  monkeypatch.chdir(home)
  with temporary_types():
    yield home


def test_a_layer_of_ones_own(folder, cache, capsys, monkeypatch):
  assert main([*TRAIN, '--training.steps', '1']) == 0
  assert main([*TRAIN, '--training.steps', '2', '--json']) == 0
  trained = json.loads(
    capsys.readouterr().out[-2000:].partition('run folder')[2].partition('\n')[2]
  )
  assert trained['step'] == 2
  away = folder.parent / 'away'
  away.mkdir()
  monkeypatch.chdir(away)
  run = folder / 'runs' / 'own'
  # In another process and another folder, and from Python.
  done = start(['eval', run, '--batches', '1', '--batch-size', '8', '--json'], away, cache)
  assert done.returncode == 0, done.stderr
  scored = json.loads(done.stdout)
  assert scored['loss'] == pytest.approx(trained['metrics']['eval/loss'], rel=1e-5)
  model = jaxformer.load(run)
  assert model.evaluate(batches=1, batch_size=8).loss == pytest.approx(scored['loss'])
  assert len(model.complete(['x'], max_new_tokens=3)[0].tokens) <= 3
  assert 'y_t = mean of x_s W over s <= t' in '\n'.join(jaxformer.describe(str(run)).lines())
  with pytest.raises(InputError, match=r'not PreNorm\(Attention of .*own\.py\)'):
    model.export(away / 'weights')
  shutil.copy(folder / 'own.py', away / 'own.py')
  assert main([*TRAIN, '--training.steps', '1', '--init-from', str(run)]) == 0


def test_code_that_changed_runs_when_it_is_named(folder, cache):
  assert main([*TRAIN, '--training.steps', '1']) == 0
  (folder / 'own.py').write_text(f'{LAYER}\n# changed\n')
  words = ['generate', 'own', '--max-new-tokens', '2']
  refused = start(words, folder, cache)
  assert refused.returncode == 2
  assert re.search(r'has changed since the run was made: .*own\.py', refused.stderr)
  assert '--code' in refused.stderr
  named = start([*words, '--code', 'own.py'], folder, cache)
  assert named.returncode == 0, named.stderr
  assert 'differs from the recorded' in named.stderr
