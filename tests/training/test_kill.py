"""Programs that die at the worst moment, and are started again with the same command."""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from jaxformer import config
from jaxformer.training.checkpoint import steps_in
from jaxformer.training.run import read_metrics
from tests.training.compare import assert_same, curve
from tests.training.conftest import CACHE, make_experiment

pytestmark = [pytest.mark.e2e, pytest.mark.newest]
HERE = Path(__file__).parent
LONG = {
  'steps': 300,
  'checkpoint_every': 20,
  'eval_every': 100,
  'eval_batches': 1,
  'keep_latest': 3,
}


def written(experiment):
  """A file with the experiment."""
  file = Path(experiment.run.dir) / 'configs' / f'{experiment.run.name}.json'
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(config.text(experiment))
  return file


def start(experiment):
  command = [sys.executable, HERE / 'program.py', written(experiment), CACHE]
  return subprocess.Popen(
    [str(c) for c in command], env=environment(), stderr=subprocess.PIPE, text=True
  )


def environment():
  return os.environ | {
    'PYTHONPATH': str(HERE.parent.parent),
    'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir,
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }


def finish(program, timeout=180):
  _, err = program.communicate(timeout=timeout)
  return program.returncode, err


def wait_for(condition, program, timeout=120):
  """Polls until a condition holds or the program ends."""
  end = time.monotonic() + timeout
  while program.poll() is None and time.monotonic() < end:
    with contextlib.suppress(OSError, ValueError):  # files come and go
      if condition():
        return
    time.sleep(0.001)
  raise AssertionError(f'it ended or waited too long: {program.poll()}')


def steps_done(folder):
  return max((r['step'] for r in read_metrics(folder)), default=0)


@pytest.fixture
def long(experiment):
  return lambda name: experiment(name, **LONG)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp('whole')
  code, err = finish(start(make_experiment(folder, 'whole', **LONG)))
  assert code == 0, err
  return folder / 'whole'


def test_killed_at_any_moment_and_run_again_it_ends_the_same_bit_for_bit(long, whole, tmp_path):
  folder = tmp_path / 'killed'
  moment = random.Random(time.time_ns()).randrange(25, 200)
  print(f'killed at step {moment} and in the save after it')
  program = start(long('killed'))
  # The first save, at step 20, may still be under way then.
  wait_for(lambda: steps_done(folder) >= moment and steps_in(folder / 'checkpoints'), program)
  program.kill()
  assert finish(program)[0] == -signal.SIGKILL
  program = start(long('killed'))
  began = steps_in(folder / 'checkpoints')[-1]
  wait_for(
    lambda: (
      steps_done(folder) > began
      and any('tmp' in p.name for p in (folder / 'checkpoints').iterdir())
    ),
    program,
  )
  program.kill()
  assert finish(program)[0] == -signal.SIGKILL
  with (folder / 'metrics.jsonl').open('a') as f:
    f.write('{"step": 299, "train/lo')  # and a line cut short
  code, err = finish(start(long('killed')))
  assert code == 0, err
  assert f'resuming {folder}' in err
  assert_same(whole, folder, 300)
  assert [r['step'] for r in curve(folder) if 'train/loss' in r] == list(range(1, 301))


# ---- at calls of the operating system ----------------------------------------------------------


@pytest.fixture(scope='module')
def killing(tmp_path_factory):
  """Trains an experiment in a process that dies at a call, and returns its exit code."""
  if shutil.which('gcc') is None:
    pytest.skip('gcc is not on the path')
  killer = tmp_path_factory.mktemp('killer') / 'killer.so'
  source = str(HERE / 'killer.c')
  subprocess.run(['gcc', '-shared', '-fPIC', '-O1', '-o', killer, source, '-ldl'], check=True)
  log = killer.with_suffix('.log').open('w')
  program = subprocess.Popen(
    [sys.executable, str(HERE / 'killed.py'), str(killer), str(CACHE)],
    env=environment() | {'LD_PRELOAD': str(killer)},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=log,
    text=True,
  )

  def train(experiment, n=0, back=None):
    words = [str(written(experiment)), experiment.run.dir, n, back]
    program.stdin.write(json.dumps(words) + '\n')
    program.stdin.flush()
    return int(program.stdout.readline())

  yield train
  program.stdin.close()
  program.wait(timeout=60)
  log.close()


@pytest.mark.thorough
@pytest.mark.parametrize(('kind', 'kills'), [('plain', 60), ('changed', 20), ('back', 20)])
def test_killed_at_random_calls_it_ends_the_same_bit_for_bit(tmp_path, killing, kind, kills):
  """In all of a run, in one that goes on with another batch size, and in one that goes back."""
  chance = random.Random(kind)
  settings = {'steps': 24, 'checkpoint_every': 2, 'eval_every': 4, 'keep_every': 8}

  def experiment(name, **more):
    return make_experiment(tmp_path, name, **settings | more)

  def trained(name, n=lambda: 0):
    """Returns how often it was killed."""
    back, more, died = None, {}, 0
    if kind != 'plain':
      steps = {'changed': 8, 'back': 24}[kind]
      assert killing(experiment(name, steps=steps)) == 0
      more = {'resume_with': ('training.batch-size=4', 'optimizer.learning-rate=0.01')}
      back = {'changed': None, 'back': 8}[kind]
    while code := killing(experiment(name, **more), n(), back):
      assert code == -signal.SIGKILL
      died += 1
    return died

  trained('whole')
  done = 0
  for name in (f'killed-{i}' for i in itertools.count()):
    died = trained(name, lambda: chance.randrange(1, 400))
    assert_same(tmp_path / 'whole', tmp_path / name, 24)
    files = [tmp_path / n / 'config.json' for n in ('whole', name)]
    configs = [json.loads(f.read_text())['training'] for f in files]
    assert configs[0] == configs[1]
    if kind == 'back':
      rows = [r for n in (tmp_path / name / 'undone').iterdir() for r in read_metrics(n)]
      assert {r['step'] for r in rows} >= set(range(9, 25))
      kept = (tmp_path / name / 'undone').glob('*/checkpoints/*')
      assert {int(p.name) for p in kept} >= {16, 22, 24}
    done += died
    if done >= kills:
      break
  print(f'{done} kills')


def test_a_scheduler_that_wants_the_machine_back_gets_75(long, whole, tmp_path):
  folder = tmp_path / 'preempted'
  program = start(long('preempted'))
  wait_for(lambda: steps_done(folder) >= 30, program)
  program.send_signal(signal.SIGTERM)
  code, err = finish(program)
  assert code == 75, err
  assert 'run the same command to resume' in err
  code, err = finish(start(long('preempted')))
  assert code == 0, err
  assert_same(whole, folder, 300)


def test_a_full_disk_is_said_plainly(long, tmp_path):
  """A limit on the size of files stands in for the disk."""
  program = [sys.executable, str(HERE / 'program.py'), str(written(long('full'))), str(CACHE)]
  # KiB, less than the arrays have
  command = ['bash', '-c', 'trap "" XFSZ; ulimit -f 60; exec "$@"', '-', *program]
  # its files would be cut short too
  env = environment() | {'JAX_ENABLE_COMPILATION_CACHE': 'false'}
  done = subprocess.run(
    command, env=env, stderr=subprocess.PIPE, text=True, check=False, timeout=180
  )
  assert done.returncode == 1
  assert f'warning: checkpoint 20 in {tmp_path}/full/checkpoints: ' in done.stderr
  assert 'SaveError: checkpoint 40' in done.stderr.splitlines()[-1]
