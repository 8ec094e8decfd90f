"""Runs of a layer in a user's own file: trained, resumed and read from any folder."""

import json
import subprocess
import sys
import types

import pytest

from jaxformer.config import InputError, forget, to_json
from jaxformer.models.block import Block, Residual
from jaxformer.models.stack import Group
from jaxformer.training import load_experiment
from jaxformer.training.run import Run, config_text
from jaxformer.training.stages import History
from jaxformer.user_code import named_code, object_in_file
from tests.tiers import thorough
from tests.training.conftest import CACHE, make_experiment
from tests.training.test_kill import environment

pytestmark = pytest.mark.e2e

LAYER = """
import jax.numpy as jnp
from jaxformer.layers.layer import Layer, LayerConfig, Output
from jaxformer.sharding import param

class Scale(Layer):
  class Config(LayerConfig):
    factor: float = 0.5

    def build(self, width, rngs, position):
      return Scale(self, width)

  def __init__(self, config, width):
    self.weight = param(jnp.full((width,), config.factor), ('embed',))

  def __call__(self, x_BTD, ctx, state=None):
    return Output(x_BTD * self.weight, state)
"""
RUN = """
import sys
import jax
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 1)
from jaxformer.config import InputError
from jaxformer.data import open_data
from jaxformer.models.block import Block, Residual
from jaxformer.models.params import define
from jaxformer.models.stack import Group
from jaxformer.training import load_experiment, load_params, train
from jaxformer.user_code import load_file, object_in_file
from tests.training.conftest import CACHE, make_experiment

def experiment(file, home, name, **training):
  e = make_experiment(home, name, **training)
  block = Block.Config(branches=(Residual(layer=object_in_file(f'{file}:Scale')),))
  model = e.model.replace(stack=(*e.model.stack, Group(pattern=(block,))))
  return e.replace(model=model)

def go(e, **more):
  return train(e, dataset=open_data(e.data, cache_dir=CACHE), log=lambda line: None, **more)

try:
  print(BODY)
except InputError as e:
  print('refused:', e)
"""


def python(body, cwd):
  words = [sys.executable, '-c', RUN.replace('BODY', body)]
  done = subprocess.run(
    words, cwd=cwd, env=environment(), capture_output=True, text=True, check=False, timeout=180
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.strip() + done.stderr


@pytest.fixture
def home(tmp_path, dataset):
  assert CACHE.exists()  # the data are there, opened by the fixture
  (tmp_path / 'code').mkdir()
  (tmp_path / 'elsewhere').mkdir()
  (tmp_path / 'code' / 'mine.py').write_text(LAYER)
  made = python("go(experiment('code/mine.py', 'runs', 'own', steps=2)).step", tmp_path)
  assert made.startswith('2'), made
  return tmp_path


@thorough
def test_a_run_of_a_users_layer_is_read_resumed_and_continued_from_any_folder(home):
  run, far = home / 'runs' / 'own', home / 'elsewhere'
  (entry,) = json.loads((run / 'environment.json').read_text())
  assert [r['file'] for r in entry['code']] == [str(home / 'code' / 'mine.py')]
  load = f"load_experiment('{run}')"
  assert '12' in python(f'go({load}.replace(training={load}.training.replace(steps=12))).step', far)
  assert python(f"load_params('{run}', define({load}.model))[1]", far).startswith('12')
  new = f"{load}.replace(run={load}.run.replace(name='new'))"
  assert python(f"go({new}, init_from='{run}').step", far).startswith('12')
  # the same content in another file is the same layer
  (far / 'moved.py').write_text(LAYER)
  assert python(f"go(experiment('moved.py', '{home}/runs', 'own')).step", far).startswith('12')


@thorough
def test_changed_code_runs_only_if_it_is_named(home):
  run, file = home / 'runs' / 'own', home / 'code' / 'mine.py'
  file.write_text(LAYER.replace('x_BTD * self', 'x_BTD * 2 * self'))
  assert 'has changed since the run was made' in python(f"load_experiment('{run}')", home)
  named = python(f"load_experiment('{run}', code=['{file}']).model.vocab_size", home)
  assert named.startswith('264')
  assert 'differs from the recorded' in named
  again = f"go(experiment('{file}', 'runs', 'own', steps=3)).step"
  refused = python(again, home)
  assert 'created by a different experiment' in refused
  assert '.code: ' in refused
  assert '--code' in refused
  assert python(f"load_file('{file}', named=True) and {again}", home).startswith('3')


def test_a_field_that_is_newer_than_a_run_of_a_users_layer_has_its_default(tmp_path):
  (tmp_path / 'mine.py').write_text(LAYER)
  layer = object_in_file(f'{tmp_path}/mine.py:Scale')
  try:
    block = Block.Config(branches=(Residual(layer=layer),))
    e = make_experiment(tmp_path / 'runs', 'own')
    e = e.replace(model=e.model.replace(stack=(*e.model.stack, Group(pattern=(block,)))))
    data = json.loads(config_text(e, History(0)))
    del data['training']['label_smoothing'], data['model']['stack'][-1]['repeats']
    del data['model']['stack'][-1]['pattern'][0]['branches'][0]['layer']['factor']
    (tmp_path / 'runs' / 'own').mkdir(parents=True)
    (tmp_path / 'runs' / 'own' / 'config.json').write_text(json.dumps(data))
    assert Run(e).changed == []
    smoothed = e.replace(training=e.training.replace(label_smoothing=0.1))
    with pytest.raises(InputError, match=r'training.label_smoothing: 0.0 -> 0.1'):
      Run(smoothed)
  finally:
    forget(type(layer))


def test_a_run_of_the_first_version_is_refused_in_one_line(tmp_path):
  data = to_json(make_experiment(tmp_path, 'old'))
  (tmp_path / 'config.json').write_text(json.dumps(data))
  with pytest.raises(InputError, match=r'was written by jaxformer 0\.1') as refused:
    load_experiment(tmp_path)
  assert '\n' not in str(refused.value)


def test_modules_that_answer_for_any_name_are_no_user_code(monkeypatch):
  lazy = types.ModuleType('lazy')
  lazy.__getattr__ = lambda name: 'something'
  monkeypatch.setitem(sys.modules, 'lazy', lazy)
  assert 'something' not in named_code()
