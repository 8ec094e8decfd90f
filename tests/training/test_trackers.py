"""Trackers: by what they know a run, and that a run does not depend on them."""

import contextlib
import json
import shutil
import struct
import sys
import types

import jax
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jaxformer.config import InputError
from jaxformer.training import TensorBoard, TrackerConfig, Trackio, Wandb, train, train_population
from jaxformer.training.report import open_report
from jaxformer.training.run import Run, read_metrics

ONE = jax.devices()[:1]


class Service(types.ModuleType):
  """Stands in for the package of a tracker, with `init` like W&B and Trackio."""

  def __init__(self, name):
    super().__init__(name)
    self.started, self.logged, self.finished = [], [], []

  def init(self, **settings):
    self.started.append(settings)
    return types.SimpleNamespace(
      log=lambda metrics, step: self.logged.append((settings['name'], step)),
      finish=lambda: self.finished.append(settings['name']),
    )


@pytest.fixture
def services(monkeypatch):
  found = [Service('wandb'), Service('trackio')]
  for service in found:
    monkeypatch.setitem(sys.modules, service.__name__, service)
  return found


def started(experiment, dataset):
  """Start a run, and end it before its first step. Returns its folder."""
  with Run(experiment) as run:
    run.lock()
    run.resume_at(0)
    run.start(dataset.manifest, dataset.tokenizer)
    with open_report(run, run.experiment, print, 0):
      return run.folder


def test_trackers_know_a_run_by_the_id_of_its_folder(experiment, dataset, services):
  wandb, trackio = services
  both = {'trackers': (Wandb(), Trackio())}
  folder = started(experiment('exp1/seed0', **both), dataset)
  started(experiment('exp2/seed0', **both), dataset)
  started(experiment('exp1/seed0', **both), dataset)  # resumed
  shutil.rmtree(folder)
  started(experiment('exp1/seed0', **both), dataset)
  first, other, resumed, anew = (s['id'] for s in wandb.started)
  assert first == resumed
  assert len({first, other, anew}) == 3
  assert [s['name'] for s in wandb.started] == [f'exp{i}/seed0' for i in (1, 2, 1, 1)]
  assert [s['name'] for s in trackio.started] == [f'{s["name"]} {s["id"]}' for s in wandb.started]
  assert json.loads((folder / 'config.json').read_text())['id'] == anew


def test_trackio_leaves_standard_output_alone(experiment, dataset, services, capsys, monkeypatch):
  init = services[1].init
  monkeypatch.setattr(services[1], 'init', lambda **more: print('tracking') or init(**more))
  started(experiment(trackers=(Trackio(),)), dataset)
  assert capsys.readouterr() == ('', 'tracking\n')


def test_a_run_of_an_earlier_version_gets_an_id(experiment, dataset, services):
  e = experiment(trackers=(Wandb(),))
  file = started(e, dataset) / 'config.json'
  data = json.loads(file.read_text())
  del data['id']
  file.write_text(json.dumps(data))
  started(e, dataset)
  started(e, dataset)
  ids = [s['id'] for s in services[0].started]
  assert ids[0] != ids[1] == ids[2]


def test_a_run_that_goes_back_is_another_for_trackers(experiment, dataset, services):
  e = experiment(steps=2, checkpoint_every=1, eval_every=2, eval_batches=1, trackers=(Wandb(),))
  for step in (None, 1, 1):  # the third is the second again
    train(e, dataset=dataset, devices=ONE, log=print, resume_from=step)
  ids = [s['id'] for s in services[0].started]
  assert ids[0] != ids[1] == ids[2]
  assert [step for _, step in services[0].logged] == [1, 2, 2, 2, 2]


def test_each_member_of_a_population_is_tracked_by_itself(experiment, dataset, services):
  short = {'steps': 2, 'eval_every': 2, 'eval_batches': 1, 'trackers': (Wandb(),)}
  members = [experiment(f'{name}/seed0', **short) for name in 'ab']
  lines = []
  train_population(members, dataset=dataset, devices=ONE, log=lines.append)
  assert {s['reinit'] for s in services[0].started} == {'create_new'}
  assert len({s['id'] for s in services[0].started}) == 2
  assert sorted(services[0].finished) == ['a/seed0', 'b/seed0']
  assert any(line.startswith('a/seed0 | step 1/2') for line in lines)


def tensorboard_steps(folder):
  """Return the steps of the training loss that a reader of event files shows: it drops those from
  the step of each restart on."""
  steps = []
  for file in sorted((folder / 'tensorboard').iterdir()):
    data, at = file.read_bytes(), 0
    while at < len(data):
      (size,) = struct.unpack_from('<Q', data, at)
      event = Event.FromString(data[at + 12 : at + 12 + size])
      at += 16 + size
      if event.session_log.status == SessionLog.START:
        steps = [s for s in steps if s < event.step]
      steps += [event.step for v in event.summary.value if v.tag == 'train/loss']
  return steps


def test_tensorboard_drops_steps_that_were_undone(experiment, dataset):
  class Died(BaseException):
    pass

  def die(line):
    if line.startswith('step 4/4'):
      raise Died

  e = experiment(
    steps=4, checkpoint_every=2, eval_every=4, eval_batches=1, trackers=(TensorBoard(),)
  )
  with pytest.raises(Died):
    train(e, dataset=dataset, devices=ONE, log=die)
  folder = Run(e).folder
  assert tensorboard_steps(folder) == [1, 2, 3, 4]
  shorter = e.replace(training=e.training.replace(steps=3, eval_every=3))
  train(shorter, dataset=dataset, devices=ONE, log=print)
  assert tensorboard_steps(folder) == [1, 2, 3]
  train(shorter, dataset=dataset, devices=ONE, log=print, resume_from=2)
  assert tensorboard_steps(folder) == [1, 2, 3]
  assert [r['step'] for r in read_metrics(folder) if 'train/loss' in r] == [1, 2, 3]


class Unreliable(TrackerConfig):
  """Fails at the start, at a step, or at the end."""

  at: str = 'start'

  @contextlib.contextmanager
  def open(self, folder, id, name, step, config):
    def fail(now, line=''):
      if now == self.at:
        raise ConnectionError(f'no\nanswer {line}')

    fail('start')
    yield lambda metrics, step: fail('step', step)
    fail('end')


@pytest.mark.parametrize(('at', 'line'), [('start', ''), ('step', ' 1'), ('end', '')])
def test_a_tracker_that_fails_is_a_warning(experiment, dataset, at, line):
  good = TensorBoard()
  e = experiment(steps=2, eval_every=2, eval_batches=1, trackers=(Unreliable(at=at), good))
  lines = []
  result = train(e, dataset=dataset, devices=ONE, log=lines.append)
  assert (result.exit_code, result.step) == (0, 2)
  assert [row['step'] for row in read_metrics(result.folder)] == [1, 2, 2]
  assert [text for text in lines if 'warning' in text] == [
    f'warning: Unreliable: ConnectionError: no answer{line}; the run goes on without this tracker'
  ]
  assert list((result.folder / 'tensorboard').iterdir())


def test_a_tracker_that_is_not_installed_names_the_extra(experiment, dataset, monkeypatch):
  monkeypatch.setitem(sys.modules, 'trackio', None)
  e = experiment(trackers=(Trackio(),))
  with pytest.raises(InputError, match=r'pip install "jaxformer\[track\]"'):
    train(e, dataset=dataset, devices=ONE, log=print)
  assert not Run(e.replace(training=e.training.replace(trackers=()))).folder.exists()
