"""Runs of a layer in a user's own file: trained, resumed and read from any folder."""

import json
import subprocess
import sys
import types

import jax
import pytest

from jaxformer.code_record import code_of
from jaxformer.config import InputError, forget, to_json
from jaxformer.models.block import Block, Residual
from jaxformer.models.stack import Group
from jaxformer.training import load_experiment, train
from jaxformer.training.rows import read_events
from jaxformer.training.run import Run, _is_named, config_text
from jaxformer.training.stages import History
from jaxformer.user_code import load_file, named_code, object_in_file
from tests.helpers import temporary_types
from tests.tiers import thorough
from tests.training.conftest import CACHE, make_experiment
from tests.training.test_kill import environment
from tests.training.test_loop import snapshot

pytestmark = pytest.mark.e2e
ONE = jax.devices()[:1]

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
    return Output(x_BTD * self.weight[None, None], state)
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
  assert python(f"load_params('{run}', define({load}.model)).step", far).startswith('12')
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


def edited(home, helper, named=False):
  """An experiment with a layer whose file imports a helper, after the helper was written."""
  (home / 'mine.py').write_text('from helper import FACTOR\n' + LAYER.replace('0.5', 'FACTOR'))
  (home / 'helper.py').write_text(helper)
  if named:
    load_file(home / 'helper.py', named=True)
  block = Block.Config(branches=(Residual(layer=object_in_file(f'{home}/mine.py:Scale')),))
  e = make_experiment(home / 'runs', 'own', steps=2)
  return e.replace(model=e.model.replace(stack=(*e.model.stack, Group(pattern=(block,)))))


def test_a_run_goes_on_with_an_import_that_has_changed_only_if_it_is_named(tmp_path, dataset):
  with temporary_types():
    first = edited(tmp_path, 'FACTOR = 0.5')
    folder = train(first, dataset=dataset, devices=ONE, log=str).folder
    record = load_experiment(folder).model.stack[-1].pattern[0].branches[0].layer
    assert set(code_of(type(record))['files']) == {'helper.py'}

    before = snapshot(folder)
    with pytest.raises(InputError, match=r'code: \S+/helper.py: sha256 \w+ -> \w+\n.* --code FILE'):
      train(edited(tmp_path, 'FACTOR = 1 / 2'), dataset=dataset, devices=ONE, log=str)
    assert snapshot(folder) == before

    e = edited(tmp_path, 'FACTOR = 1 / 2', named=True)
    said = []
    train(
      e.replace(training=e.training.replace(steps=3)), dataset=dataset, devices=ONE, log=said.append
    )
    assert any('helper.py: sha256' in line for line in said)
    stages = [row for row in read_events(folder) if row['event'] == 'stage']
    ((path, (old, now)),) = stages[0]['changed'].items()
    assert (stages[0]['step'], path.rpartition('.')[2]) == (2, 'code')
    assert old['files'] != now['files']
    assert len(stages) == 1
    train(
      e.replace(training=e.training.replace(steps=4)), dataset=dataset, devices=ONE, log=str
    )  # as recorded
    assert len([row for row in read_events(folder) if row['event'] == 'stage']) == 1


def test_a_file_that_has_no_part_in_the_code_any_more_is_a_change(tmp_path):
  was = {'module': 'm', 'file': '/m.py', 'sha256': 'a', 'files': {'b.py': 'b'}}
  now = {'module': 'm', 'file': '/m.py', 'sha256': 'a'}
  assert not _is_named(was, now, {'b'})
  assert _is_named(was, now, {'a'})


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
