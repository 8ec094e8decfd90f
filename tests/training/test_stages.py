"""Runs that go on with changed settings, pass over steps, and go back, on purpose."""

import json
import shutil

import jax
import numpy as np
import pytest

from jaxformer import config
from jaxformer.config import InputError
from jaxformer.data import open_data
from jaxformer.models.params import define
from jaxformer.training import WSD, AdamW, Cosine, load_experiment, load_params, train
from jaxformer.training.checkpoint import steps_in
from jaxformer.training.rows import read_events, read_metrics
from jaxformer.training.run import is_of
from jaxformer.training.stages import History, Stage, as_option, undone
from tests.tiers import thorough
from tests.training.compare import assert_same, curve, meta
from tests.training.conftest import CACHE, DATA, make_experiment
from tests.training.test_loop import snapshot, stop_at

ONE = jax.devices()[:1]


def quiet(line):
  pass


SHORT = {'steps': 12, 'eval_every': 4, 'checkpoint_every': 4, 'keep_latest': 4}


@pytest.fixture
def go(experiment, dataset):
  """Trains an experiment of twelve steps."""

  def go(name='run', log=quiet, resume_from=None, data=dataset, **settings):
    e = experiment(name, **SHORT | settings)
    return train(e, dataset=data, devices=ONE, log=log, resume_from=resume_from)

  return go


@pytest.fixture(scope='module')
def stopped(dataset, tmp_path_factory):
  """A run that was stopped after step 4."""
  e = make_experiment(tmp_path_factory.mktemp('stopped'), **SHORT)
  result = train(e, dataset=dataset, devices=ONE, log=stop_at(4))
  assert result.step == 4
  return result.folder


@pytest.fixture
def four(stopped, tmp_path):
  """A copy of that run, where `go` finds it."""
  return shutil.copytree(stopped, tmp_path / 'run')


def config_of(folder):
  return json.loads((folder / 'config.json').read_text())


def events(folder, name):
  return [row for row in read_events(folder) if row['event'] == name]


RATE = {'optimizer.learning_rate': [0.003, 0.001]}


def test_a_changed_rate_is_a_stage_and_the_same_command_again_changes_nothing(go, four, tmp_path):
  shutil.copytree(four, tmp_path / 'whole')
  changes = ('optimizer.learning-rate=1e-3', 'training.batch-size=4')
  stage = {'step': 4, 'changed': RATE | {'training.batch_size': [8, 4]}}
  before = snapshot(four)
  with pytest.raises(InputError) as e:
    go(steps=12, optimizer=AdamW(learning_rate=1e-3), batch_size=4)
  option = '--training.resume-with optimizer.learning-rate=0.001,training.batch-size=4'
  assert f'resume with {option} to go on with the new ones from step 4' in str(e.value)
  assert snapshot(four) == before
  heard = []
  log = stop_at(7)
  first = go(steps=12, resume_with=changes, log=lambda line: (heard.append(line), log(line)))
  assert (first.exit_code, first.step) == (75, 8)
  assert 'at step 4 with ' in heard[0]
  assert 'optimizer.learning_rate: 0.003 -> 0.001; training.batch_size: 8 -> 4' in heard[0]
  assert go(steps=12, resume_with=changes).exit_code == 0
  assert config_of(four)['stages'] == [stage]
  assert [{k: row[k] for k in stage} for row in events(four, 'stage')] == [stage]
  # as one that was not stopped
  assert go('whole', steps=12, resume_with=changes).exit_code == 0
  assert_same(tmp_path / 'whole', four, 12)
  # the rows go on where they were: four batches of 8, then batches of 4
  assert meta(four, 12)['data']['earlier'] == [[4, 8]]
  assert read_metrics(four)[-1]['tokens'] == (4 * 8 + 8 * 4) * 32

  # what is written is read
  found = load_experiment(four)
  assert (found.optimizer.learning_rate, found.training.batch_size) == (0.001, 4)
  assert found.training.resume_with == ()
  assert load_params(four, define(found.model)).step == 12
  assert not is_of(four, found)
  # without the option the settings that it began with are refused, those of its stage are its own
  with pytest.raises(InputError) as e:
    go(steps=12)
  assert f'resume with {option}, as since step 4' in str(e.value)
  own = AdamW(learning_rate=1e-3)
  assert go(steps=12, optimizer=own, batch_size=4).exit_code == 0
  assert config_of(four)['stages'] == [stage]


@thorough
def test_every_row_once_though_the_batch_size_changed_twice(go, four, dataset, monkeypatch):
  asked = []
  rows = type(dataset)._train_rows

  def watched(self, position_B, seed):
    asked.extend(position_B.tolist())
    return rows(self, position_B, seed)

  monkeypatch.setattr(type(dataset), '_train_rows', watched)
  go(steps=12, log=stop_at(6), resume_with=('training.batch-size=16',))
  go(steps=12, log=stop_at(9), resume_with=('training.batch-size=4', 'training.accumulate=2'))
  result = go(steps=12, resume_with=('training.batch-size=4', 'training.accumulate=2'))
  assert result.exit_code == 0
  steps = [s['step'] for s in config_of(four)['stages']]
  end = 4 * 8 + (steps[1] - 4) * 16 + (12 - steps[1]) * 4
  assert set(asked) >= set(range(4 * 8, end))
  assert meta(four, 12)['data']['earlier'] == [[4, 8], [steps[1], 16]]
  taken = [row['tokens'] for row in read_metrics(four) if 'train/loss' in row]
  assert [b - a for a, b in zip([0, *taken], taken)] == [8 * 32] * 4 + [16 * 32] * (
    steps[1] - 4
  ) + [4 * 32] * (12 - steps[1])


def resume(folder, dataset, step, settings):
  e = make_experiment(folder.parent, **SHORT | settings)
  train(e, dataset=dataset, devices=ONE, log=quiet, resume_from=step)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (
      {'seed': 1, 'resume_with': ('training.seed=1',)},
      r'training.seed: 0 -> 1 \(the order of the data depends on it',
    ),
    ({'resume_with': ('optimizer=Lion',)}, r'optimizer: .* \(its state belongs to its type'),
    ({'resume_with': ('model.width=64',)}, r'model.width: 32 -> 64 \(the parameters belong'),
    ({'resume_with': ('training.steps=20',)}, r"'training.steps': may always differ: give --train"),
    ({'resume_with': ('optimizer.rate=1',)}, 'no such field'),
    ({'resume_with': ('lower',)}, "training.resume_with = 'lower': must be FIELD=VALUE"),
    ({'skip_steps': ('2:4',)}, "'2:4': the run resumes after step 4, and has taken step 3; must"),
    ({'skip_steps': ('6',)}, "'6': must be START:END"),
    ({'skip_steps': ('6:40',)}, 'at most steps = 12'),
    ({'resume_from': 3}, r'--resume-from = 3: must be the step of a checkpoint: 4'),
  ],
)
def test_what_cannot_be_changed_is_refused_and_nothing_is_written(
  dataset, stopped, settings, message
):
  settings = dict(settings)
  step, before = settings.pop('resume_from', None), snapshot(stopped)
  with pytest.raises(InputError, match=message):
    resume(stopped, dataset, step, settings)
  assert snapshot(stopped) == before


@thorough
def test_data_may_move_but_not_change(go, four, dataset):
  """A path of equal content; rows of another length are other rows."""
  before = snapshot(four)
  given = {'resume_with': ('data.sequence-length=16',)}
  short = open_data(DATA.replace(sequence_length=16), cache_dir=CACHE)
  with pytest.raises(InputError, match=r"data differ from the checkpoint's .*sequence_length: 32"):
    go(data=short, **given)
  assert snapshot(four) == before
  # this fraction divides the few documents as the default does
  assert go(resume_with=('data.split.fraction=0.051',)).exit_code == 0
  assert config_of(four)['stages'][0]['changed'] == {'data.split.fraction': [0.05, 0.051]}


def test_a_new_run_has_nothing_to_go_on_from(go, tmp_path):
  for given in ({'resume_with': ('optimizer.clip=1',)}, {'resume_from': 4}):
    with pytest.raises(InputError, match='run is a new run, which has nothing to go on from'):
      go(**given)
  assert not (tmp_path / 'run').exists()


# ---- steps that are passed over ----------------------------------------------------------------


@thorough
def test_skipped_steps_are_not_taken_and_their_batches_not_seen(go, four, dataset, monkeypatch):
  shutil.copytree(four, four.parent / 'whole')
  rows, asked = type(dataset)._train_rows, set()

  def watched(self, position_B, seed):
    asked.update(position_B // 8 + 1)
    return rows(self, position_B, seed)

  monkeypatch.setattr(type(dataset), '_train_rows', watched)
  heard = []
  whole = go('whole', skip_steps=('6:9',), log=heard.append)
  assert 'skipping step 6 to 8' in heard
  assert asked.isdisjoint({6, 7, 8})
  assert [r['step'] for r in read_metrics(whole.folder) if 'train/loss' in r] == [
    *range(1, 6),
    *range(9, 13),
  ]
  assert read_metrics(whole.folder)[-1]['tokens'] == 9 * 8 * 32
  assert steps_in(whole.folder / 'checkpoints') == [4, 12]
  assert load_experiment(whole.folder).training.skip_steps == ('6:9',)
  # stopped in front of them, and after them resumed by a command without the option
  go(skip_steps=('6:9',), log=stop_at(5))
  go(log=stop_at(9))
  assert go().exit_code == 0
  assert_same(whole.folder, four, 12)
  with pytest.raises(
    InputError, match="'5:9': the run resumes after step 12, and has taken step 5"
  ):
    go(skip_steps=('5:9',))


# ---- back to an earlier checkpoint -------------------------------------------------------------


def test_going_back_keeps_what_came_later_and_happens_once(go, four, dataset):
  go()
  later = [r for r in read_metrics(four) if r['step'] > 8]
  kept = meta(four, 12)
  changes = ('optimizer.learning-rate=1e-3',)
  heard = []
  log = stop_at(10)
  first = go(resume_from=8, resume_with=changes, log=lambda x: (heard.append(x), log(x)))
  assert (first.exit_code, first.step) == (75, 11)
  assert 'at step 8 with optimizer.learning_rate' in heard[0]
  aside = four / 'undone' / '1'
  assert read_metrics(aside) == later
  assert json.loads((aside / 'checkpoints' / '12' / 'meta' / 'data.json').read_text()) == kept
  (event,) = events(four, 'resume_from')
  assert (event['step'], event['checkpoints'], event['rows']) == (8, [12], len(later))
  # the same command again, after the stop
  second = go(resume_from=8, resume_with=changes)
  assert (second.exit_code, second.step) == (0, 12)
  assert len(events(four, 'resume_from')) == 1
  assert config_of(four)['stages'] == [{'step': 8, 'changed': RATE}]
  assert meta(four, 12)['digests'] != kept['digests']
  # back again with the settings that it had there: as if nothing had been changed
  third = go(resume_from=8)
  assert third.step == 12
  assert meta(four, 12) == kept
  assert [r for r in curve(four) if r['step'] > 8] == [
    {k: v for k, v in r.items() if k in curve(four)[-2] | curve(four)[-1]} for r in later
  ]
  assert config_of(four)['stages'] == []
  assert sorted(p.name for p in (four / 'undone').iterdir()) == ['1', '2']


# ---- a run of another length -------------------------------------------------------------------


@thorough
def test_a_longer_run_keeps_its_warm_up(go, dataset):
  """By default it is a tenth of the steps."""
  rates = {}
  for steps in (20, 40):
    folder = go(steps=steps, schedule=Cosine(), eval_every=20, checkpoint_every=20).folder
    assert config_of(folder)['warmup_steps'] == 2
    rates |= {r['step']: r['learning_rate'] for r in read_metrics(folder) if 'learning_rate' in r}
  assert config_of(folder)['training']['steps'] == 40
  expected = [0.003 * float(Cosine(warmup=2).factor(s - 1, 40)) for s in range(21, 41)]
  np.testing.assert_allclose([rates[s] for s in range(21, 41)], expected, rtol=1e-5)


# ---- the history itself ------------------------------------------------------------------------


@pytest.mark.quick
def test_stages_after_an_earlier_checkpoint_become_one():
  history = History(2, (Stage(10, {'a': [1, 2]}), Stage(20, {'a': [2, 3], 'b': [1, 5]})))
  assert history.at(30, {}) == history
  assert history.at(20, {'b': [5, 6]}).stages[1] == Stage(20, {'a': [2, 3], 'b': [1, 6]})
  assert history.at(5, {}).stages == (Stage(5, {'a': [1, 3], 'b': [1, 5]}),)
  assert history.at(15, {'a': [3, 2]}).stages == (history.stages[0], Stage(15, {'b': [1, 5]}))
  saved = {'a': 3, 'b': 5}
  assert undone(saved, history, 20) == {'a': 2, 'b': 1}
  assert undone(saved, history, 10) == {'a': 1, 'b': 1}
  assert undone(saved, history, 21) == saved


@pytest.mark.quick
@pytest.mark.parametrize(
  ('changes', 'text'),
  [
    ({'optimizer.clip': [1.0, None]}, 'optimizer.clip=none'),
    (
      {'schedule': [{}, config.to_json(WSD(decay=0.5))], 'training.batch_size': [1, 2]},
      'schedule=WSD,schedule.decay=0.5,training.batch-size=2',
    ),
    ({'data.lengths': [[1], [1, 2]]}, '\'["data.lengths=[1, 2]"]\''),
  ],
)
def test_the_option_that_a_refusal_names(changes, text):
  assert as_option(changes) == f'--training.resume-with {text}'
