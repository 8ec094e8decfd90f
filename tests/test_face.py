"""The short public face: what a notebook imports."""

import subprocess
import sys

import jax
import pytest
from flax import nnx

import jaxformer
from jaxformer.config import InputError
from jaxformer.data import AssociativeRecall
from jaxformer.models.params import define
from jaxformer.models.zoo import FAMILIES
from jaxformer.study.study import AsIs, Study
from jaxformer.training import load_params


@pytest.mark.quick
def test_all_is_there_and_explained():
  for name in jaxformer.__all__:
    assert getattr(jaxformer, name).__doc__, name


@pytest.mark.quick
def test_importing_it_costs_nothing():
  code = 'import sys, jaxformer; sys.exit(bool({"jax", "flax", "numpy"} & set(sys.modules)))'
  assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0


@pytest.mark.quick
def test_preset_and_build():
  model = jaxformer.preset('gpt2-tiny').replace(width=32)
  state = nnx.to_pure_dict(nnx.state(jaxformer.build(model, seed=3), nnx.Param))
  assert sum(x.size for x in jax.tree.leaves(state)) == define(model).size
  with pytest.raises(InputError, match='did you mean gpt2-tiny'):
    jaxformer.preset('gpt2-tinny')


@pytest.mark.quick
def test_plan():
  assert jaxformer.plan('gpt2').params == 124_439_808
  assert jaxformer.plan(jaxformer.preset('gpt2'), 128).length == 128


@pytest.mark.quick
def test_experiment():
  e = jaxformer.experiment('llama3-tiny', ('training.steps', '7'), ('run.name', 'first'))
  assert (e.training.steps, e.run.name) == (7, 'first')
  with pytest.raises(InputError, match='did you mean steps'):
    jaxformer.experiment('llama3-tiny', ('training.stepz', '7'))


def test_train_and_generate(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  e = jaxformer.experiment(
    'gpt2-tiny',
    ('model.repeats', '1'),
    ('model.width', '64'),
    ('model.heads', '4'),
    ('training.steps', '2'),
    ('training.batch_size', '8'),
    ('training.eval_batches', '1'),
    ('training.trackers', 'none'),
    ('data.corpus', 'PydocTopics'),
    ('data.sequence_length', '32'),
    ('run.name', 'first'),
  )
  lines = []
  result = jaxformer.train(e, log=lines.append)
  assert (result.exit_code, result.step, result.folder) == (0, 2, tmp_path / 'runs' / 'first')
  assert any('eval loss' in line for line in lines)
  text = jaxformer.generate('runs/first', 'def main(', max_new_tokens=8, seed=1)
  assert text == jaxformer.generate('first', 'def main(', max_new_tokens=8, seed=1)
  assert isinstance(text, str)
  # Weights given as a dict are copied: they are still there after training.
  params, _ = load_params('runs/first', define(e.model))
  again = jaxformer.train(
    e.replace(run=e.run.replace(name='second')), init_from=params, log=lines.append
  )
  assert again.exit_code == 0
  assert not any(p.is_deleted() for p in params.values())


def test_compare(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  gru = FAMILIES['gru'].make(width=16, layers=1, hidden=0, vocab_size=10, context_length=8)
  study = Study(
    name='tiny',
    entries=(AsIs(name='a', model_config=gru), AsIs(name='b', model_config=gru)),
    tasks=(AssociativeRecall(length=6, test_sequences=64),),
    tokens=4096,
    batch_size=8,
    learning_rates=(1e-3,),
    contexts=(),
    rounds=0,
  )
  lines = []
  results = jaxformer.compare(
    study, ('study.seeds', '1,2'), ('study.tokens', '512'), log=lines.append
  )
  assert [sorted(o.scores) for o in results.tasks[0].outcomes] == [[1, 2], [1, 2]]
  assert results.study.tokens == 512
  assert (tmp_path / 'runs' / 'tiny' / 'report' / 'report.html').exists()
  assert len([line for line in lines if 'seed' in line]) == 4
  assert results.tasks[0].outcomes[0].difference is None
  # the same model, data and seeds
  assert results.tasks[0].outcomes[1].difference.estimate.mean == 0
  with pytest.raises(InputError, match='did you mean quickstart'):
    jaxformer.compare('quickstrat')
  with pytest.raises(InputError, match='did you mean tokens'):
    jaxformer.compare(study, ('study.tokenz', '5'))
