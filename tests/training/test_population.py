"""Runs trained together are the runs trained one by one."""

import itertools
import os
import signal

import jax
import numpy as np
import pytest

from jaxformer.config import InputError
from jaxformer.training import AdamW, train, train_population
from jaxformer.training.run import read_metrics
from tests.tiers import thorough
from tests.training.compare import curve, meta

ONE = jax.devices()[:1]
MEMBERS = list(itertools.product((0, 1, 2, 3), (1e-3, 4e-3)))


def quiet(line):
  pass


def members(experiment, prefix, **training):
  return [
    experiment(f'{prefix}{seed}-{rate}', seed=seed, optimizer=AdamW(learning_rate=rate), **training)
    for seed, rate in MEMBERS
  ]


def losses(folder):
  return np.array([r['train/loss'] for r in read_metrics(folder) if 'train/loss' in r])


@thorough
def test_eight_together_equal_eight_alone(experiment, dataset):
  """Losses to 1e-5 at the first step and to 1e-3 over 50 (fp32); dropout, evaluations and the place
  in the data are the same."""
  settings = {'steps': 50, 'eval_every': 25, 'checkpoint_every': 50}
  together = train_population(
    members(experiment, 'p', **settings), dataset=dataset, devices=jax.devices()[:4], log=quiet
  )
  for result, alone in zip(together, members(experiment, 'a', **settings), strict=True):
    one = train(alone, dataset=dataset, devices=ONE, log=quiet)
    assert (result.exit_code, result.step) == (0, 50)
    a, b = losses(result.folder), losses(one.folder)
    np.testing.assert_allclose(a[0], b[0], rtol=1e-5)
    np.testing.assert_allclose(a, b, rtol=1e-3)
    assert result.metrics['eval/loss'] == pytest.approx(one.metrics['eval/loss'], rel=1e-3)
    assert meta(result.folder, 50)['data'] == meta(one.folder, 50)['data']
  final = {r.metrics['train/loss'] for r in together}
  assert len(final) == len(MEMBERS)  # seeds and rates did differ


def test_an_interrupted_population_goes_on(experiment, dataset):
  heard = []

  def stop(line):
    heard.append(line)
    if 'step 6/' in line and len([x for x in heard if 'step 6/' in x]) == 1:
      os.kill(os.getpid(), signal.SIGTERM)

  first = train_population(members(experiment, 'i'), dataset=dataset, devices=ONE, log=stop)
  assert {r.exit_code for r in first} == {75}
  assert {r.step for r in first} <= {6, 7}
  # One of them goes on by itself, so that the others come from behind.
  ahead = train(members(experiment, 'i')[0], dataset=dataset, devices=ONE, log=quiet)
  assert ahead.step == 12
  then = train_population(members(experiment, 'i'), dataset=dataset, devices=ONE, log=quiet)
  whole = train_population(members(experiment, 'w'), dataset=dataset, devices=ONE, log=quiet)
  for a, b in zip(then, whole, strict=True):
    assert (a.exit_code, a.step) == (0, 12)
    assert [r['step'] for r in curve(a.folder)] == [r['step'] for r in curve(b.folder)]
    np.testing.assert_allclose(losses(a.folder), losses(b.folder), rtol=1e-4)


def test_one_that_diverges_leaves_the_others_alone(experiment, dataset):
  wild = experiment('wild', optimizer=AdamW(learning_rate=1e30))
  tame = experiment('tame', optimizer=AdamW(learning_rate=1e-3))
  ended = train_population([wild, tame], dataset=dataset, devices=ONE, log=quiet)
  assert [r.exit_code for r in ended] == [70, 0]
  one = train(
    experiment('alone', optimizer=AdamW(learning_rate=1e-3)),
    dataset=dataset,
    devices=ONE,
    log=quiet,
  )
  np.testing.assert_allclose(losses(ended[1].folder), losses(one.folder), rtol=1e-4)


@thorough
def test_members_skip_steps_each_from_where_it_is(experiment, dataset):
  settings = {'skip_steps': ('6:9',), 'steps': 10, 'eval_every': 10, 'checkpoint_every': 2}
  pair = [experiment(f's{seed}', seed=seed, **settings) for seed in (0, 1)]
  train(pair[0], dataset=dataset, devices=ONE, log=lambda line: None)
  ended = train_population(pair, dataset=dataset, devices=ONE, log=quiet)
  alone = train(experiment('alone', seed=1, **settings), dataset=dataset, devices=ONE, log=quiet)
  assert [(r.exit_code, r.step) for r in ended] == [(0, 10)] * 2
  assert [r['step'] for r in curve(ended[1].folder)] == [r['step'] for r in curve(alone.folder)]
  np.testing.assert_allclose(losses(ended[1].folder), losses(alone.folder), rtol=1e-4)


def test_what_is_no_population(experiment):
  with pytest.raises(InputError, match=r'these also differ in training.batch_size'):
    train_population([experiment('a'), experiment('b', batch_size=4)])
  with pytest.raises(InputError, match='one run folder'):
    train_population([experiment('a', seed=0), experiment('a', seed=1)])
  with pytest.raises(InputError, match='at least one'):
    train_population([])
