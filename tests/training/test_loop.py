import dataclasses
import functools
import json
import math
import os
import re
import signal

import jax
import numpy as np
import pytest

from jaxformer import config
from jaxformer.config import InputError
from jaxformer.data import load_tokenizer
from jaxformer.models.params import define
from jaxformer.sharding import MeshConfig
from jaxformer.training import (
  AdamW,
  Constant,
  TensorBoard,
  load_experiment,
  load_params,
  train,
  train_population,
)
from jaxformer.training.checkpoint import steps_in
from jaxformer.training.report import summary
from jaxformer.training.rows import read_events, read_metrics
from jaxformer.training.run import Run
from jaxformer.training.setup import Setup
from jaxformer.workflows.load import initial_params
from tests.tiers import case, thorough
from tests.training.compare import assert_same, curve, meta
from tests.training.conftest import make_experiment

ONE = jax.devices()[:1]


def stop_at(step: int, number: signal.Signals = signal.SIGTERM):
  """A log that sends this process a signal when it hears of a step."""
  lines = []

  def log(line: str) -> None:
    lines.append(line)
    if line.startswith(f'step {step}/') and 'lr' in line:
      os.kill(os.getpid(), number)

  log.lines = lines
  return log


def quiet(line: str) -> None:
  pass


def test_a_predicted_step_stands_beside_the_measured_one(experiment, dataset):
  e, lines = experiment(), []
  found = train(e, dataset=dataset, devices=ONE, log=quiet, predict=lambda step, mesh: 0.25)
  rows = [r for r in read_metrics(found.folder) if 'train/loss' in r]
  assert {r['predicted_step_seconds'] for r in rows} == {0.25}
  assert summary(rows[0]).endswith('ms (predicted 250)')

  def fails(step, mesh):
    raise KeyError('no such instruction')

  e = experiment(name='unread')
  assert train(e, dataset=dataset, devices=ONE, log=lines.append, predict=fails).exit_code == 0
  [warning] = [line for line in lines if 'warning' in line]
  assert "no predicted time of a step: KeyError: 'no such instruction'" in warning


def test_options_of_the_compiler_are_recorded_and_wrong_ones_refused(experiment, dataset, tmp_path):
  option = 'xla_backend_optimization_level=1'
  found = train(experiment(compiler_options=(option,)), dataset=dataset, devices=ONE, log=quiet)
  [compiled] = [e for e in read_events(found.folder) if e['event'] == 'compile']
  assert compiled['options'] == [option]
  for wrong, problem in (
    ('xla_no_such_option=1', "No such compile option: 'xla_no_such_option'"),
    ('xla_backend_optimization_level=high', 'not a valid int32'),
    ('xla_backend_optimization_level', 'must be NAME=VALUE'),
  ):
    e = experiment(name='refused', compiler_options=(wrong,))
    with pytest.raises(InputError, match=rf'training\.compiler_options = .*{problem}'):
      train(e, dataset=dataset, devices=ONE, log=quiet)
    assert not (Run(e, None, None).folder).exists()


def test_the_run_folder(experiment, dataset):
  result = train(
    experiment(trackers=(TensorBoard(),), log_every=3, profile=(2, 4)),
    dataset=dataset,
    devices=ONE,
    log=quiet,
    sample=lambda params, step: f'at {step}',
    utilization={'mfu': 100 / 1e9, 'mfu_full': 200 / 1e9},
  )
  folder = result.folder
  assert result.exit_code == 0
  assert result.step == 12
  assert load_experiment(folder) == experiment(
    trackers=(TensorBoard(),), log_every=3, profile=(2, 4)
  )
  assert list((folder / 'profile').rglob('*.xplane.pb'))
  rows = read_metrics(folder)
  assert [r['step'] for r in rows if 'train/loss' in r] == [1, 3, 6, 9, 12]
  assert [r['step'] for r in rows if 'eval/loss' in r] == [4, 8, 12]
  assert set(rows[0]) == {
    'step',
    'tokens',
    'train/loss',
    'train/grad_norm',
    'learning_rate',
    'tokens_per_second',
    'step_seconds',
    'mfu',
    'mfu_full',
  }
  assert rows[-2]['tokens'] == 12 * 8 * 32
  assert rows[0]['mfu_full'] == pytest.approx(2 * rows[0]['mfu'])
  assert rows[0]['mfu'] == pytest.approx(rows[0]['tokens_per_second'] * 100 / 1e9)
  assert rows[-1]['eval/source'] == 'PydocTopics validation, 2 batches of 8'
  targets = np.concatenate([b.targets_BT for b in dataset.validation_batches(8, 2)])
  counted = targets[targets >= 0]
  bits = (
    rows[-1]['eval/loss']
    / math.log(2)
    * counted.size
    / dataset.tokenizer.token_bytes[counted].sum()
  )
  assert rows[-1]['eval/bits_per_byte'] == pytest.approx(bits)
  events = [
    json.loads(line)['event'] for line in (folder / 'events.jsonl').read_text().splitlines()
  ]
  assert events == [
    'start',
    'compile',
    'checkpoint',
    'eval',
    'checkpoint',
    'eval',
    'checkpoint',
    'eval',
    'done',
  ]
  (environment,) = json.loads((folder / 'environment.json').read_text())
  assert environment['data']['corpus'] == dataset.manifest['corpus']
  assert environment['versions']['jax'] == jax.__version__
  assert load_tokenizer(folder / 'tokenizer').fingerprint() == dataset.tokenizer.fingerprint()
  assert list((folder / 'tensorboard').iterdir())
  assert (folder / 'samples.txt').read_text().count('at ') == 3
  again = train(
    experiment(trackers=(TensorBoard(),), log_every=3), dataset=dataset, devices=ONE, log=quiet
  )
  assert (again.exit_code, again.step, again.metrics['eval/loss']) == (
    0,
    12,
    result.metrics['eval/loss'],
  )


@pytest.mark.parametrize(
  ('dtype', 'mesh', 'devices'),
  [('float32', MeshConfig(data=1), 1), ('bfloat16', MeshConfig(data=1, fsdp=2, tensor=2), 4)],
  ids=['float32', 'bfloat16-sharded'],
)
def test_stopped_and_resumed_is_as_never_stopped_bit_for_bit(
  experiment, dataset, dtype, mesh, devices
):
  def go(name, log=quiet):
    e = experiment(
      name, steps=20, dtype=dtype, mesh=mesh, checkpoint_every=10, eval_every=5, dropout=0.1
    )
    return train(e, dataset=dataset, devices=jax.devices()[:devices], log=log)

  whole = go('whole')
  first = go('parts', stop_at(10))
  # it was saved before its evaluation, which is left to the second
  assert (first.exit_code, first.step) == (75, 10)
  assert not any(r['step'] == 10 for r in read_metrics(first.folder) if 'eval/loss' in r)
  assert (
    json.loads((first.folder / 'events.jsonl').read_text().splitlines()[-1])['signal'] == 'SIGTERM'
  )
  second = go('parts')
  assert (second.exit_code, second.step) == (0, 20)
  assert_same(whole.folder, second.folder, 20)


@thorough
def test_a_run_goes_on_elsewhere_with_the_same_losses(experiment, dataset):
  whole = train(experiment('whole', dropout=0.0), dataset=dataset, devices=ONE, log=quiet)
  log = stop_at(5)
  train(experiment('moved', dropout=0.0), dataset=dataset, devices=ONE, log=log)
  moved = experiment('moved', dropout=0.0, mesh=MeshConfig(fsdp=4, tensor=2, data=1))
  heard = []
  result = train(moved, dataset=dataset, log=heard.append)
  assert 'mesh.fsdp: 1 -> 4' in heard[0]
  np.testing.assert_allclose(
    [r['train/loss'] for r in curve(result.folder) if 'train/loss' in r],
    [r['train/loss'] for r in curve(whole.folder) if 'train/loss' in r],
    atol=1e-4,
  )


def stop_in_evaluation(monkeypatch, dataset, at):
  """Send SIGTERM before batch `at` of an evaluation, counted over all; return the list of batches
  that were asked for."""
  asked, batches = [], type(dataset).validation_batches

  def watched(self, *arguments):
    for batch in batches(self, *arguments):
      asked.append(len(asked))
      if len(asked) == at:
        os.kill(os.getpid(), signal.SIGTERM)
      yield batch

  monkeypatch.setattr(type(dataset), 'validation_batches', watched)
  return asked


@pytest.mark.parametrize('at', [1, case(7, standing=False)], ids=['middle', 'last'])
def test_a_stop_in_an_evaluation_saves_and_leaves_the_rest_to_the_next_start(
  experiment, dataset, monkeypatch, at
):
  """Of an evaluation between checkpoints, and of the one after the last step."""
  settings = {'checkpoint_every': 8, 'eval_batches': 3}
  with monkeypatch.context() as patch:
    asked = stop_in_evaluation(patch, dataset, at)
    first = train(experiment('stopped', **settings), dataset=dataset, devices=ONE, log=quiet)
  step = {1: 4, 7: 12}[at]
  assert (first.exit_code, first.step) == (75, step)
  assert len(asked) == at
  assert steps_in(first.folder / 'checkpoints')[-1] == step
  evaluated = [r['step'] for r in read_metrics(first.folder) if 'eval/loss' in r]
  assert evaluated == list(range(4, step, 4))
  second = train(experiment('stopped', **settings), dataset=dataset, devices=ONE, log=quiet)
  assert (second.exit_code, second.step) == (0, 12)
  never = train(experiment('never', **settings), dataset=dataset, devices=ONE, log=quiet)
  assert_same(never.folder, second.folder, 12)


@thorough
def test_a_stop_in_a_sample_leaves_it_to_the_next_start(experiment, dataset):
  def sample(params, step):
    yield f'text of {step}'
    if stop:
      os.kill(os.getpid(), stop.pop())
    yield ', all of it'

  stop = [signal.SIGHUP]
  e = experiment(steps=2, eval_every=2, checkpoint_every=2)
  first = train(e, dataset=dataset, devices=ONE, log=quiet, sample=sample)
  assert (first.exit_code, first.step) == (75, 2)
  assert not (first.folder / 'samples.txt').exists()
  again = train(e, dataset=dataset, devices=ONE, log=quiet, sample=sample)
  assert again.exit_code == 0
  assert (first.folder / 'samples.txt').read_text() == '==== step 2 ====\ntext of 2, all of it\n'
  assert [r['step'] for r in read_metrics(first.folder) if 'eval/loss' in r] == [2]


@thorough
def test_a_signal_that_nohup_ignores_stays_ignored(experiment, dataset):
  old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    log = stop_at(2, signal.SIGHUP)
    assert train(experiment(steps=3), dataset=dataset, devices=ONE, log=log).exit_code == 0
  finally:
    signal.signal(signal.SIGHUP, old)


SAVING = [
  signal.SIGINT,
  signal.SIGUSR1,
  *(case(s, standing=False, id=s.name) for s in (signal.SIGHUP, signal.SIGUSR2)),
]


@pytest.mark.parametrize('number', SAVING)
def test_signals_save_and_ask_to_be_run_again(experiment, dataset, number):
  log = stop_at(3, number)
  before = signal.getsignal(number)
  result = train(experiment(), dataset=dataset, devices=ONE, log=log)
  assert result.exit_code == 75
  assert steps_in(result.folder / 'checkpoints') == [4]
  assert number.name in log.lines[-1]
  assert signal.getsignal(number) == before


def test_a_second_interrupt_aborts(experiment, dataset):
  def log(line):
    if line.startswith('step 3/'):
      os.kill(os.getpid(), signal.SIGINT)
      os.kill(os.getpid(), signal.SIGINT)

  with pytest.raises(KeyboardInterrupt):
    train(experiment(), dataset=dataset, devices=ONE, log=log)
  # and leaves a run that can go on
  assert train(experiment(), dataset=dataset, devices=ONE, log=quiet).step == 12


def test_numbers_that_are_not_finite_stop_the_run(experiment, dataset):
  e = experiment(optimizer=AdamW(learning_rate=1e30, clip=None), checkpoint_every=1, eval_every=100)
  heard = []
  result = train(e, dataset=dataset, devices=ONE, log=heard.append)
  assert result.exit_code == 70
  last = read_metrics(result.folder)[-1]
  assert last['step'] == result.step
  assert last['train/loss'] is None or last['train/grad_norm'] is None
  assert f'--training.skip-steps {result.step}:{result.step + 1}' in heard[-1]
  kept = steps_in(result.folder / 'checkpoints')
  assert kept
  assert kept[-1] < result.step
  params = load_params(result.folder, define(e.model)).params
  assert all(np.isfinite(p).all() for p in params.values())


def test_a_state_that_is_not_finite_is_not_saved(experiment, dataset):
  """The loss and the gradient of its step were finite; in the first, of a population, one alone
  ends."""
  settings = {'schedule': Constant(warmup=0), 'steps': 3, 'checkpoint_every': 1, 'eval_every': 1}
  wild = experiment('wild', optimizer=AdamW(learning_rate=3.4e38), **settings)
  tame = experiment('tame', **settings)
  heard = []
  ended = train_population([wild, tame], dataset=dataset, devices=ONE, log=heard.append)
  assert [(r.exit_code, r.step) for r in ended] == [(70, 1), (0, 3)]
  (line,) = (x for x in heard if x.startswith('wild') and 'not finite' in x)
  assert 'step 1 is not finite; there is no checkpoint' in line
  assert steps_in(ended[0].folder / 'checkpoints') == []
  again = train(wild, dataset=dataset, devices=ONE, log=heard.append)
  assert (again.exit_code, again.step) == (70, 1)
  assert read_metrics(again.folder)[0]['train/loss'] is not None


def test_a_checkpoint_whose_evaluation_is_not_finite_does_not_stay(
  experiment, dataset, monkeypatch
):
  losses = iter((5.0, math.nan))
  scores = {'eval/bits_per_byte': 1.0, 'eval/source': 'made up'}
  with monkeypatch.context() as patch:
    patch.setattr(Setup, 'evaluate', lambda self, *_: {'eval/loss': next(losses), **scores})
    heard = []
    result = train(experiment(keep_latest=1), dataset=dataset, devices=ONE, log=heard.append)
  assert (result.exit_code, result.step) == (70, 8)
  assert 'evaluation of step 8 is not finite; the latest checkpoint is of step 4' in heard[-1]
  assert steps_in(result.folder / 'checkpoints') == [4]
  assert train(experiment(keep_latest=1), dataset=dataset, devices=ONE, log=quiet).step == 12


@pytest.fixture(scope='module')
def whole(dataset, tmp_path_factory):
  return train(
    make_experiment(tmp_path_factory.mktemp('whole')), dataset=dataset, devices=ONE, log=quiet
  )


@pytest.mark.parametrize(
  'damage', [case(d, standing=d == 'bit') for d in ('bit', 'truncated', 'meta')]
)
def test_a_corrupt_checkpoint_is_noticed_and_passed_over(experiment, dataset, whole, damage):
  first = train(experiment('hurt'), dataset=dataset, devices=ONE, log=stop_at(9))
  newest = first.folder / 'checkpoints' / '10'
  file = (
    newest / 'meta' / 'data.json'
    if damage == 'meta'
    else max((newest / 'params').rglob('*'), key=lambda f: f.stat().st_size)
  )
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 4
  file.write_bytes(content[: len(content) // 2] if damage == 'truncated' else content)
  with pytest.raises(InputError, match=r'10: corrupt: .*other steps'):
    load_params(first.folder, define(load_experiment(first.folder).model))
  heard = []
  second = train(experiment('hurt'), dataset=dataset, devices=ONE, log=heard.append)
  assert any(re.match('warning: checkpoint 10 is corrupt', line) for line in heard)
  assert (first.folder / 'corrupt' / '10').is_dir()
  assert_same(whole.folder, second.folder, 12)


def test_where_every_checkpoint_is_corrupt_the_run_is_left_alone(experiment, dataset):
  result = train(experiment(steps=2, keep_best=0), dataset=dataset, devices=ONE, log=quiet)
  (result.folder / 'checkpoints' / '2' / 'meta' / 'data.json').unlink()
  before = snapshot(result.folder)
  with pytest.raises(InputError, match='no valid checkpoint: 2: its metadata cannot be read'):
    train(experiment(steps=2, keep_best=0), dataset=dataset, devices=ONE, log=quiet)
  assert snapshot(result.folder) == before


def snapshot(folder):
  """Times and contents of a folder and all that is in it."""
  found = (folder, *sorted(folder.rglob('*')))
  return {f: (f.stat().st_mtime_ns, f.is_file() and f.read_bytes()) for f in found}


def test_another_experiment_of_the_same_name_is_refused_and_nothing_is_written(experiment, dataset):
  folder = train(experiment(steps=2), dataset=dataset, devices=ONE, log=quiet).folder
  before = snapshot(folder)
  other = experiment(steps=2, optimizer=AdamW(learning_rate=9e-3), batch_size=4)
  with pytest.raises(
    InputError,
    match=r'optimizer.learning_rate: 0.003 -> 0.009\n  training.batch_size: 8 -> 4\n.*--run.name',
  ):
    train(other, dataset=dataset, devices=ONE, log=quiet)
  assert snapshot(folder) == before


def test_a_folder_that_is_no_run_is_left_alone(experiment, dataset, tmp_path):
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'thesis.txt').write_text('mine')
  with pytest.raises(InputError, match='not a run folder'):
    train(experiment(), dataset=dataset, devices=ONE, log=quiet)


def test_a_folder_in_which_a_process_trains_is_locked(experiment, dataset):
  e = experiment(steps=2)
  with Run(e) as run:
    run.lock()
    with pytest.raises(InputError, match='another process trains in this folder'):
      train(e, dataset=dataset, devices=ONE, log=quiet)
  assert train(e, dataset=dataset, devices=ONE, log=quiet).step == 2


def test_more_steps_extend_a_run(experiment, dataset):
  first = train(experiment(steps=3), dataset=dataset, devices=ONE, log=quiet)
  second = train(experiment(steps=5), dataset=dataset, devices=ONE, log=quiet)
  assert second.step == 5
  assert load_experiment(first.folder).training.steps == 5
  assert [r['step'] for r in curve(first.folder) if 'train/loss' in r] == [1, 2, 3, 4, 5]
  before = snapshot(first.folder)
  with pytest.raises(InputError, match=r'training.steps = 4: the run resumes after step 5; must'):
    train(experiment(steps=4), dataset=dataset, devices=ONE, log=quiet)
  assert snapshot(first.folder) == before


def test_the_newest_and_the_best_checkpoints_are_kept(experiment, dataset, monkeypatch):
  losses = iter((5.0, 4.0, 1.0, 3.0, 2.0, 4.0))
  monkeypatch.setattr(
    Setup,
    'evaluate',
    lambda self, params, until: {
      'eval/loss': next(losses),
      'eval/bits_per_byte': 1.0,
      'eval/source': 'made up',
    },
  )
  e = experiment(steps=6, eval_every=1, checkpoint_every=1, keep_latest=2, keep_best=2)
  assert steps_in(train(e, dataset=dataset, devices=ONE, log=quiet).folder / 'checkpoints') == [
    3,
    5,
    6,
  ]


@thorough
def test_checkpoints_at_multiples_are_kept_for_ever(experiment, dataset):
  e = experiment(steps=9, eval_every=9, checkpoint_every=1, keep_latest=1, keep_every=3)
  folder = train(e, dataset=dataset, devices=ONE, log=stop_at(7)).folder
  assert steps_in(folder / 'checkpoints') == [3, 6, 8]
  train(e, dataset=dataset, devices=ONE, log=quiet)
  assert steps_in(folder / 'checkpoints') == [3, 6, 9]
  branch = experiment('branch', steps=2, checkpoint_every=2)
  assert train(branch, init_from=f'{folder}@3', dataset=dataset, devices=ONE, log=quiet).step == 2


def test_a_run_keeps_the_parameters_that_it_was_started_from(experiment, dataset):
  go = functools.partial(train, dataset=dataset, devices=ONE, log=quiet)
  a, b = (go(experiment(name, steps=2)).folder for name in 'ab')
  folder = go(experiment('x', steps=2), init_from=a).folder
  assert read_events(folder)[-1]['event'] == 'done'
  (a.parent / 'link').symlink_to(a)
  for other_name in (a, a / '..' / 'a', a.parent / 'link'):
    assert go(experiment('x', steps=3), init_from=other_name).step == 3
  before = snapshot(folder)
  arrays = {
    n: np.asarray(v) for n, v in load_params(a, define(experiment('x').model)).params.items()
  }
  for other in (b, f'{a}@2', arrays):
    with pytest.raises(InputError, match=f'was started from {a} and would be resumed'):
      go(experiment('x', steps=4), init_from=other)
  assert snapshot(folder) == before
  assert go(experiment('x', steps=4)).step == 4
  go(experiment('y', steps=2), init_from=arrays)
  assert go(experiment('y', steps=3), init_from=arrays).step == 3
  with pytest.raises(InputError, match=r'was started from \d+ arrays with digest'):
    go(experiment('y', steps=4), init_from={n: v + 1 for n, v in arrays.items()})
  with pytest.raises(InputError, match='was started from random weights'):
    go(experiment('a', steps=4), init_from=b)
  go(experiment('z', steps=2), init_from=f'{a}@2')
  a.rename(a.parent / 'moved')
  for name in (f'{a}@2', f'{a}@02', str(a / 'checkpoints' / '2')):  # none of which is read
    source = initial_params(name, experiment('z', steps=3))
    assert go(experiment('z', steps=3), init_from=source).step == 3
  with pytest.raises(InputError, match=r'no run .*/a'):
    initial_params(str(a), experiment('z', steps=3))


def test_a_run_may_begin_with_the_parameters_of_another(experiment, dataset):
  source = train(
    experiment('source', steps=8, checkpoint_every=4), dataset=dataset, devices=ONE, log=quiet
  )
  small = AdamW(learning_rate=1e-12)
  for path, step in ((f'{source.folder}@4', 4), (source.folder / 'checkpoints' / '8', 8)):
    e = experiment(f'from-{len(str(path))}', steps=1, optimizer=small, schedule=Constant(warmup=0))
    result = train(e, init_from=path, dataset=dataset, devices=ONE, log=quiet)
    expected = {r['step']: r['eval/loss'] for r in read_metrics(source.folder) if 'eval/loss' in r}[
      step
    ]
    assert result.metrics['eval/loss'] == pytest.approx(expected, abs=1e-6)
    assert meta(result.folder, 1)['step'] == 1
  assert load_params(source.folder, define(e.model)).step == 8
  wrong = experiment('wrong')
  wrong = wrong.replace(model=wrong.model.replace(vocab_size=300))
  with pytest.raises(
    InputError, match=r'embedder.input.table: \(264, 32\) found, the model has \(300, 32\)'
  ):
    train(wrong, init_from=source.folder, dataset=dataset, devices=ONE, log=quiet)
  with pytest.raises(InputError, match='no checkpoint there'):
    train(
      experiment('wrong'),
      init_from=source.folder.parent / 'nowhere',
      dataset=dataset,
      devices=ONE,
      log=quiet,
    )
  assert not (source.folder.parent / 'wrong').exists()


def test_other_data_than_the_checkpoint_was_trained_on_are_refused(experiment, dataset):
  folder = train(experiment(), dataset=dataset, devices=ONE, log=stop_at(3)).folder
  other, before = type(dataset).__new__(type(dataset)), snapshot(folder)
  other.__dict__.update(dataset.__dict__, identity=dataset.identity | {'corpus': 'changed'})
  with pytest.raises(InputError, match="data differ from the checkpoint's"):
    train(experiment(), dataset=other, devices=ONE, log=quiet)
  assert snapshot(folder) == before


@pytest.mark.quick
def test_an_experiment_without_a_name_is_named_by_its_digest(experiment):
  from jaxformer.training.run import run_folder

  e = experiment()
  e = e.replace(run=dataclasses.replace(e.run, name=None))
  assert run_folder(e).name == f'run-{config.digest(e)[:8]}'
