"""Several real processes on this machine: they train as one, stop as one, and other numbers of them
go on."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxformer.training.checkpoint import steps_in
from jaxformer.training.run import read_metrics
from tests.e2e.program import SMALL, environment, last
from tests.tiers import case, thorough
from tests.training.compare import curve, meta

pytestmark = [pytest.mark.e2e, pytest.mark.newest]
STEPS, DEVICES = 40, 4
TRAIN = [
  'train',
  'gpt2-tiny',
  *SMALL,
  '--training.steps',
  str(STEPS),
  '--training.eval-every',
  str(STEPS),
  '--training.checkpoint-every',
  str(STEPS),
]
SHARDED, WHOLE = (
  ['--mesh.data', '2', '--mesh.fsdp', '2'],
  ['--mesh.data', '4', '--mesh.rules', 'data_parallel'],
)


def start(count, words, folder, cache, command=TRAIN, more=()):
  """`jaxformer COMMAND WORDS`, training by default, in `count` processes that share four
  devices; with `more` words, or variables of the environment, for the last of them."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]

  own_words = [w.format(folder) for w in more if '=' not in w]
  variables = dict(w.split('=') for w in more if '=' in w)

  def process(i):
    own = {
      'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} '
      f'--xla_force_host_platform_device_count={DEVICES // count}'
    }
    if count > 1:
      own |= {
        'JAXFORMER_COORDINATOR': f'127.0.0.1:{port}',
        'JAXFORMER_PROCESSES': str(count),
        'JAXFORMER_PROCESS': str(i),
      }
    own |= variables if i else {}
    return subprocess.Popen(
      [sys.executable, '-m', 'jaxformer', *last([*command, *words, *(own_words if i else ())])],
      cwd=folder,
      env=environment(cache) | own,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  return [process(i) for i in range(count)]


def await_step(step, programs, run):
  """Wait until a run has taken a step."""
  end = time.monotonic() + 200
  while max((r['step'] for r in read_metrics(run)), default=0) < step and time.monotonic() < end:
    assert not any(p.poll() is not None for p in programs), finish(programs)
    time.sleep(0.005)


def finish(programs, timeout=240):
  """(exit code, stdout, stderr) of each; none outlives the test."""
  try:
    said = [p.communicate(timeout=timeout) for p in programs]
  finally:
    for p in programs:
      p.kill()
  return [(p.returncode, *s) for p, s in zip(programs, said, strict=True)]


@thorough
@pytest.mark.parametrize(
  ('second', 'problem'),
  [
    (['--data.corpus.path', '{}/other'], r'process 1 \(.*\): data.train.0: '),
    (['--data.corpus.path', '{}/missing'], r'process 1 of 2 \(.*\) has stopped: .*missing'),
    (['--optimizer.learning-rate', '0.5'], r'process 1 .*optimizer.learning_rate: 0.003 -> 0.5'),
    (['--training.seed', '7'], r'process 1 \(.*\): training.seed: 0 -> 7'),
    (['--run.name', 'elsewhere'], r'process 1 \(.*\): run folder: '),
    (['JAX_DEFAULT_MATMUL_PRECISION=highest'], r'default_matmul_precision: null -> "highest"'),
    (['--model.widht', '7'], r'process 1 of 2 \(.*\) has stopped: .*widht'),
  ],
)
def test_hosts_with_other_text_or_settings_do_not_train(tmp_path, cache, second, problem):
  """All of them stop at once with the same words, and nothing is written."""
  for name, word in (('corpus', 'one'), ('other', 'two')):
    (tmp_path / name).mkdir()
    for i in range(9):
      (tmp_path / name / f'{i}.txt').write_text(f'{word} {i} ' * 400)
  words = ['--data.corpus', 'Files', '--data.corpus.path', f'{tmp_path}/corpus', *SHARDED]
  programs = start(2, [*words, '--run.name', 'x'], tmp_path, cache, more=second)
  ended = finish(programs, timeout=100)
  assert [code for code, _, _ in ended] == [2, 2], ended
  for _, _, err in ended:
    assert 'Traceback' not in err
  assert re.search(problem, ended[0][2]), ended[0][2]
  assert not (tmp_path / 'runs').exists()


@thorough
def test_a_full_disk_of_the_first_ends_both(tmp_path, cache):
  """Between two meetings, while the other waits on its devices. A limit on the size of files stands
  in for the disk."""
  often = ['--training.steps', '4000', '--training.checkpoint-every', '4000']
  programs = start(2, [*SHARDED, '--run.name', 'x', *often], tmp_path, cache)
  await_step(3, programs, tmp_path / 'runs' / 'x')
  resource.prlimit(programs[0].pid, resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
  (code, _, err), (other, _, seen) = finish(programs, timeout=200)
  assert (code, other) == (1, 1), (err, seen)
  what = f'{tmp_path}/runs/x/metrics.jsonl: cannot be written (File too large)'
  assert err.splitlines()[-1] == f'error: {what}'
  assert re.search(rf'^error: process 0 of 2 .* has stopped: {re.escape(what)}$', seen, re.M)


def losses(folder):
  return {r['step']: r['train/loss'] for r in curve(folder) if 'train/loss' in r}


@pytest.fixture(scope='module')
def home(tmp_path_factory, cache):
  """A folder with `runs/alone`, by one process, and `runs/two`, by two of which the second was
  asked to stop."""
  folder = tmp_path_factory.mktemp('processes')
  (alone,) = finish(start(1, [*SHARDED, '--run.name', 'alone'], folder, cache))
  assert alone[0] == 0, alone
  two = start(2, [*SHARDED, '--run.name', 'two'], folder, cache)
  await_step(3, two, folder / 'runs' / 'two')
  os.kill(two[1].pid, signal.SIGTERM)  # the one that writes nothing
  ended = finish(two)
  assert [code for code, _, _ in ended] == [75, 75], ended
  assert ended[0][2].count('run the same command to resume') == 1
  assert 'the same command' not in ended[1][2]
  return folder


def test_the_preempted_step_is_one(home):
  steps = steps_in(home / 'runs' / 'two' / 'checkpoints')
  assert len(steps) == 1
  assert 3 <= steps[0] < STEPS
  assert max(losses(home / 'runs' / 'two')) == steps[0]


@pytest.mark.parametrize(
  ('count', 'mesh'),
  [
    case(2, SHARDED, id='two', standing=False),
    case(1, WHOLE, id='one, whole', standing=False),
    case(4, SHARDED, id='four', standing=False),
  ],
)
def test_other_numbers_of_processes_go_on(home, cache, count, mesh):
  """With the same next examples, so with the same losses as one process that was never stopped, to
  1e-5; across meshes to 1e-4."""
  name, runs = f'on-{count}', home / 'runs'
  shutil.copytree(runs / 'two', runs / name)
  first = steps_in(runs / name / 'checkpoints')[0]
  done = finish(start(count, [*mesh, '--run.name', name], home, cache))
  assert [code for code, _, _ in done] == [0] * count, done
  assert f'at step {first}' in done[0][2]
  alone, again = losses(runs / 'alone'), losses(runs / name)
  assert list(again) == list(alone) == list(range(1, STEPS + 1))
  np.testing.assert_allclose(
    list(again.values()), list(alone.values()), rtol=1e-5 if mesh == SHARDED else 1e-4
  )
  assert meta(runs / name, STEPS)['data'] == meta(runs / 'alone', STEPS)['data']
  # one of them speaks
  assert [out.count('run folder: ') for _, out, _ in done] == [1] + [0] * (count - 1)


def test_two_processes_evaluate_as_one(home, cache):
  """To 1e-6, and standard output is one JSON value, of the first."""
  words = ['alone', '--batches', '1', '--json']
  ((one, out, err),) = finish(start(1, words, home, cache, ['eval']))
  assert one == 0, err
  two = finish(start(2, words, home, cache, ['eval']))
  assert [code for code, _, _ in two] == [0, 0], two
  assert two[1][1] == ''
  assert json.loads(two[0][1])['loss'] == pytest.approx(json.loads(out)['loss'], rel=1e-6)
