"""The interface for Python: what a notebook imports."""

import json
import math

import jax
import pytest
from flax import nnx

import jaxformer
from jaxformer.config import InputError
from jaxformer.data import AssociativeRecall
from jaxformer.models.params import define
from jaxformer.models.zoo import FAMILIES, PRESETS
from jaxformer.study.study import FixedModel, Study
from jaxformer.training import Lion, checkpoint


@pytest.mark.quick
def test_all_is_there_and_explained():
  for name in jaxformer.__all__:
    assert getattr(jaxformer, name).__doc__, name
  with pytest.raises(AttributeError, match='no attribute'):
    jaxformer.no_such_name  # noqa: B018


@pytest.mark.quick
def test_preset_and_build():
  model = jaxformer.preset('gpt2-tiny').replace(width=32)
  state = nnx.to_pure_dict(nnx.state(jaxformer.build(model, seed=3), nnx.Param))
  assert sum(x.size for x in jax.tree.leaves(state)) == define(model).size
  with pytest.raises(InputError, match='did you mean gpt2-tiny'):
    jaxformer.preset('gpt2-tinny')


@pytest.mark.quick
def test_plan():
  found = jaxformer.plan('gpt2')
  assert found.params == 124_439_808
  assert found.json()['train_flops_per_token'] == found.train_flops_per_token
  assert found.lines()[0] == 'gpt2: 124,439,808 parameters'
  assert jaxformer.plan(jaxformer.preset('gpt2'), length=128).length == 128
  on_slice = jaxformer.plan('gpt2', target='v5e-16', utilization=0.5, price=2.0, tokens='1B')
  assert on_slice.report['run']['price_usd'] == pytest.approx(
    2.0 * on_slice.report['run']['chip_hours']
  )
  sized = jaxformer.plan('mamba', params='1M')
  assert sized.shape is not None
  assert abs(sized.params / 1e6 - 1) < 0.02
  for wrong in ({'price': 2.0}, {'phase': 'decode'}, {'compile': True}):
    with pytest.raises(InputError, match='needs a target'):
      jaxformer.plan('gpt2', **wrong)
  with pytest.raises(InputError, match='utilization = 2'):
    jaxformer.plan('gpt2', target='v5e-16', utilization=2)


@pytest.mark.quick
def test_experiment_takes_values_texts_and_configs():
  e = jaxformer.experiment(
    'llama3-tiny',
    overrides={
      'training.steps': 7,
      'run.name': 'first',
      'training.trackers': (),
      'training.eval_batches': None,
      'optimizer': Lion(learning_rate=1e-4),
      'model.tied': True,
      'data.sequence-length': '64',
    },
  )
  assert (e.training.steps, e.run.name, e.training.trackers) == (7, 'first', ())
  assert e.training.eval_batches is None
  assert e.optimizer == Lion(learning_rate=1e-4)
  assert e.model.tied
  assert e.data.sequence_length == 64
  assert jaxformer.experiment(e, overrides={'training.steps': 8}).training.steps == 8
  assert jaxformer.experiment(e.model).model == e.model
  assert jaxformer.experiment('mamba', params=5e5).run.name == 'mamba-500K'
  with pytest.raises(InputError, match='did you mean steps'):
    jaxformer.experiment('llama3-tiny', overrides={'training.stepz': 7})
  with pytest.raises(TypeError, match='overides'):
    jaxformer.experiment('llama3-tiny', overides={'training.steps': 7})
  with pytest.raises(InputError, match='needs a family by name'):
    jaxformer.experiment(e, params=5e5)


@pytest.mark.quick
@pytest.mark.parametrize(
  'name', ['jamba-tiny', 'transformer-tiny', 'gpt2-tiny', 's4d-tiny', 'gnmt-tiny']
)
def test_the_sums_of_a_description_are_the_totals_of_a_plan(name):
  d, plan = jaxformer.describe(name), jaxformer.plan(name)
  assert sum(p.params for p in d.parts) == d.params == plan.params
  assert sum(p.active_params for p in d.parts) == d.active_params == plan.active_params
  assert sum(p.flops for p in d.parts) == plan.forward_flops_per_token
  assert sum(p.state_bytes for p in d.parts) == d.state_bytes == plan.decode_state_bytes
  text = '\n'.join(d.lines())
  assert all(p.name in text and p.formula in text for p in d.parts)
  assert json.loads(json.dumps(d.json()))['params'] == d.params


@pytest.mark.quick
def test_a_description_names_the_implementations_of_this_machine_and_of_a_target():
  d = jaxformer.describe('mamba-tiny', target='v5e-64')
  here, there = d.implementations.values()
  assert here['training']['selective_scan'] == ['chunked']
  assert there['training']['selective_scan'] == ['pallas']
  assert 'decoding' in here


@pytest.mark.quick
def test_presets_are_listed_as_recorded():
  rows = jaxformer.presets().json()
  assert sorted(r['name'] for r in rows) == sorted(PRESETS)


def test_a_preset_has_initial_parameters():
  model = jaxformer.load('gpt2-tiny', seed=3)
  assert 'gpt2-tiny (initial parameters, not trained): LanguageModel' in repr(model)
  assert sum(p.size for p in model.params.values()) == model.definition.size
  assert jaxformer.load('llama3.1-405b').definition.size == 405_853_388_800  # nothing is allocated


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A small run, with the folder that it is in."""
  home = tmp_path_factory.mktemp('home')
  e = jaxformer.experiment(
    'gpt2-tiny',
    overrides={
      'model.repeats': 1,
      'model.width': 64,
      'model.heads': 4,
      'training.steps': 2,
      'training.batch_size': 8,
      'training.eval_batches': 1,
      'training.trackers': (),
      'data.corpus': 'PydocTopics',
      'data.sequence_length': 32,
      'run.name': 'first',
      'run.dir': str(home / 'runs'),
    },
  )
  lines = []
  return home, jaxformer.train(e, log=lines.append), lines, e


def test_train_and_generate(trained, monkeypatch):
  home, result, lines, e = trained
  monkeypatch.chdir(home)
  assert (result.exit_code, result.step, result.folder) == (0, 2, home / 'runs' / 'first')
  assert any('eval loss' in line for line in lines)
  assert 'bits per byte' in '\n'.join(result.lines())
  options = {'max_new_tokens': 8, 'seed': 1, 'temperature': 0.5, 'top_k': 50}
  text = jaxformer.generate('runs/first', 'def main(', **options)
  assert text == jaxformer.generate('first', 'def main(', **options)
  assert isinstance(text, str)
  several = jaxformer.generate('first', ['def main(', 'class'], **options)
  assert len(several) == 2
  with pytest.raises(InputError, match='top_k = -1'):
    jaxformer.generate('first', 'x', top_k=-1)
  with pytest.raises(InputError, match=r'gone\.py'):
    jaxformer.generate('first', 'x', code=['gone.py'])
  # Weights given as a dict are copied: they are still there after training.
  params = jaxformer.load('first').params
  again = jaxformer.train(
    e.replace(run=e.run.replace(name='second')), init_from=params, log=lines.append
  )
  assert again.exit_code == 0
  assert not any(p.is_deleted() for p in params.values())


def test_a_loaded_model(trained, monkeypatch, tmp_path):
  monkeypatch.chdir(trained[0])
  reads, read = [], checkpoint._read_meta
  monkeypatch.setattr(checkpoint, '_read_meta', lambda path: reads.append(path) or read(path))
  model = jaxformer.load('first')
  assert len(reads) == 1
  assert model.validation_sha256
  assert (model.name, model.step, model.config.width) == ('first', 2, 64)
  assert 'first at step 2: LanguageModel' in repr(model)
  assert 'Attention' in repr(model)
  pieces = ''.join(model.stream('def', max_new_tokens=6, temperature=0))
  assert pieces == model.generate('def', max_new_tokens=6, temperature=0)
  scores = model.evaluate(batch_size=8, batches=1, by_position=True)
  assert scores.loss == pytest.approx(trained[1].metrics['eval/loss'], rel=1e-5)
  assert len(scores.loss_by_position) == 32
  assert scores.json()['bits_per_byte'] == scores.bits_per_byte
  other = jaxformer.evaluate(model, overrides={'data.corpus': 'StandardLibrary'}, batches=1)
  assert other.source == 'StandardLibrary'
  with pytest.raises(InputError, match='data only'):
    jaxformer.evaluate(model, overrides={'model.width': 3})
  likely, other = model.score('the cat'), model.score('the \x00\x01')
  assert likely.count == likely.bytes == len('the cat')
  assert likely.loss < other.loss
  assert math.isfinite(likely.bits_per_byte)
  assert likely.json()['bits_per_byte'] == likely.bits_per_byte
  assert likely.lines()[0] == '7 targets, 7 bytes'
  with pytest.raises(InputError, match="text = ''"):
    model.score('')
  model.export(tmp_path / 'weights')
  again = jaxformer.load(tmp_path / 'weights')
  assert again.generate('def', max_new_tokens=6, temperature=0) == pieces
  with pytest.raises(InputError, match='not an encoder-decoder'):
    model.translate('x')


def test_a_score_of_a_translation_needs_its_source():
  model = jaxformer.load('transformer-tiny')
  assert math.isfinite(model.score('1996-03-05', source='March 5th, 1996').loss)
  with pytest.raises(InputError, match='source'):
    model.score('1996-03-05')


def test_compare(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  gru = FAMILIES['gru'].make(width=16, layers=1, vocab_size=10, context_length=8)
  study = Study(
    name='tiny',
    entries=(FixedModel(name='a', model_config=gru), FixedModel(name='b', model_config=gru)),
    tasks=(AssociativeRecall(length=6, test_sequences=64),),
    tokens=4096,
    batch_size=8,
    learning_rates=(1e-3,),
    contexts=(),
    timing_repeats=0,
  )
  lines = []
  small = {'study.seeds': (1, 2), 'study.tokens': 512}
  results = jaxformer.compare(study, overrides=small, log=lines.append)
  assert [sorted(o.scores) for o in results.tasks[0].outcomes] == [[1, 2], [1, 2]]
  assert results.study.tokens == 512
  assert (tmp_path / 'runs' / 'tiny' / 'report' / 'report.html').exists()
  assert len([line for line in lines if 'seed' in line]) == 4
  assert results.tasks[0].outcomes[0].difference is None
  # the same model, data and seeds
  assert results.tasks[0].outcomes[1].difference.estimate.mean == 0
  again = jaxformer.report(study, overrides=small, log=lines.append)
  assert again.json()['tasks'] == results.json()['tasks']
  with pytest.raises(InputError, match='did you mean quickstart'):
    jaxformer.compare('quickstrat')
  with pytest.raises(InputError, match='did you mean tokens'):
    jaxformer.compare(study, overrides={'study.tokenz': 5})
