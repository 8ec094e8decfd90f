"""Checkpoints that were changed on the disk: the run ends the same bit for bit, and what was
changed is moved aside with a word."""

import asyncio
import gc
import random
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from jaxformer.training import checkpoint, digests, train
from jaxformer.training.checkpoint import steps_in
from tests.tiers import case
from tests.training.compare import assert_same
from tests.training.conftest import make_experiment
from tests.training.test_loop import stop_at

ONE = jax.devices()[:1]
SETTINGS = {'steps': 8, 'checkpoint_every': 2, 'eval_every': 2, 'keep_latest': 3}


def quiet(line):
  pass


@pytest.fixture(scope='module')
def runs(dataset, tmp_path_factory):
  """`whole`, and `stopped` after step 6 with three checkpoints."""
  home = tmp_path_factory.mktemp('runs')
  train(make_experiment(home, 'whole', **SETTINGS), dataset=dataset, devices=ONE, log=quiet)
  train(make_experiment(home, 'stopped', **SETTINGS), dataset=dataset, devices=ONE, log=stop_at(6))
  assert steps_in(home / 'stopped' / 'checkpoints') == [2, 4, 6]
  return home


def files(folder):
  return sorted(p for p in folder.rglob('*') if p.is_file())


def damage(chance, folder):
  """Change some checkpoints of a run in a random way; return what was done, in words."""
  home = folder / 'checkpoints'
  step = chance.choice((6, 6, 6, 4))
  file = chance.choice(files(home / str(step)))
  content = bytearray(file.read_bytes())
  kind = chance.choice(('bits', 'cut', 'deleted', 'emptied', 'swapped', 'mixed', 'renamed', 'junk'))
  if kind == 'bits' and content:
    for _ in range(chance.choice((1, 1, 5))):
      content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)
  elif kind == 'cut':
    file.write_bytes(content[: chance.randrange(len(content) + 1)])
  elif kind == 'deleted':
    file.unlink()
  elif kind == 'emptied':
    file.write_bytes(b'')
  elif kind == 'swapped':  # two files of one checkpoint
    other = chance.choice(files(home / str(step)))
    file.write_bytes(other.read_bytes())
    other.write_bytes(content)
  elif kind == 'mixed':  # a file of another checkpoint
    other = chance.choice(files(home / '2'))
    target = home / str(step) / other.relative_to(home / '2')
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(other, target)
  elif kind == 'renamed':  # two checkpoints change places
    (home / '6').rename(home / 'x')
    (home / '4').rename(home / '6')
    (home / 'x').rename(home / '4')
  else:
    file.write_bytes(chance.randbytes(len(content)))
  return f'{kind} {file.relative_to(home)}'


@pytest.mark.parametrize(
  ('seed', 'count'),
  [case(0, 2, standing=True), *(case(s, 14, standing=False) for s in range(1, 8))],
)
def test_resumed_the_same_whatever_was_changed(runs, dataset, tmp_path, seed, count):
  chance = random.Random(seed)
  for i in range(count):
    folder = shutil.copytree(runs / 'stopped', tmp_path / f'{i}')
    done = [damage(chance, folder) for _ in range(chance.choice((1, 1, 2)))]
    heard = []
    e = make_experiment(tmp_path, f'{i}', **SETTINGS)
    result = train(e, dataset=dataset, devices=ONE, log=heard.append)  # one is always left
    assert result.exit_code == 0, done
    assert_same(runs / 'whole', folder, 8)
    began = int(next(x for x in heard if 'resuming' in x).partition(' at step ')[2].split()[0])
    moved = {int(p.name) for p in (folder / 'corrupt').glob('*')}
    warned = sum('is corrupt' in line for line in heard)
    assert len(moved) == warned, done
    assert all(step > began for step in moved), done
    shutil.rmtree(folder)


@pytest.mark.quick
def test_reads_that_fail_together_are_told_once(tmp_path, caplog, monkeypatch):
  async def read():
    raise ValueError('gone')

  async def read_all():
    for task in [asyncio.create_task(read()) for _ in range(3)]:
      await task

  monkeypatch.setattr(ocp, 'load_checkpointables', lambda *_: asyncio.run(read_all()))
  with pytest.raises(checkpoint.Corrupt, match=r'it cannot be read \(ValueError: gone\)'):
    checkpoint._read(tmp_path, {'shapes': {}}, {})
  gc.collect()
  assert caplog.records == []


@pytest.mark.quick
def test_only_late_reads_of_a_closed_loop_are_silent(monkeypatch):
  shown = []
  monkeypatch.setattr(sys, '__unraisablehook__', shown.append)
  for error in (RuntimeError('Event loop is closed'), RuntimeError('x'), ValueError('x')):
    found = types.SimpleNamespace(exc_type=type(error), exc_value=error)
    checkpoint._except_late_reads(found)
  assert [str(found.exc_value) for found in shown] == ['x', 'x']


@pytest.mark.parametrize(
  ('dtype', 'shape', 'broken'),
  [
    ('float32', (), False),
    ('float32', (3, 0), False),
    ('float32', (5, 7), True),
    ('bfloat16', (2, 3, 4), False),
    ('bfloat16', (6,), True),
    ('int32', (4, 4), False),
    ('uint8', (9,), False),
    ('bool', (3, 5), False),
  ],
)
def test_the_digest_is_the_same_by_numpy_and_by_a_program(dtype, shape, broken):
  values = np.random.default_rng(0).normal(size=shape) * 3
  if broken:
    values.flat[-1] = np.nan
  array = jnp.asarray(np.asarray(values).astype(dtype))
  digest, finite = digests._examined_on_host(np.asarray(array))
  assert (digest, finite) == tuple(jax.device_get(digests._examined(array)))
  assert finite is not broken
