"""A model that trains in seconds, on text that is always there."""

import functools
import os
import tempfile
from pathlib import Path

import pytest

from jaxformer.data import PydocTopics, Text, open_data
from jaxformer.models.zoo.gpt import gpt
from jaxformer.sharding import MeshConfig
from jaxformer.training import AdamW, Cosine, Experiment, RunConfig, TrainingConfig, loop, step
from jaxformer.training.optimizer import Optimizer

CACHE = Path(tempfile.gettempdir()) / f'jaxformer-tests-{os.getuid()}' / 'data'
DATA = Text(corpus=PydocTopics(), sequence_length=32)


@functools.lru_cache(maxsize=16)
def _step(definition, config, schedule, steps, how, parallel):
  optimizer = Optimizer(config, schedule, steps, definition.info)
  return step.compiled_train_step(definition, optimizer, how, parallel)


@pytest.fixture(autouse=True, scope='module')
def _one_step_per_experiment():
  """Runs of one experiment in this process, as one that is interrupted, its continuation and one
  that is not, share the traced step: tracing takes a third of the time of a short run."""

  def shared(definition, o, how, parallel):
    return _step(definition, o.config, o.schedule, o.steps, how, parallel)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, 'compiled_train_step', shared)
    yield


@pytest.fixture(scope='session')
def dataset():
  return open_data(DATA, cache_dir=CACHE)


SHORT = {
  'steps': 12,
  'batch_size': 8,
  'checkpoint_every': 4,
  'eval_every': 4,
  'eval_batches': 2,
  'log_every': 1,
  'trackers': (),
}


def make_experiment(
  folder, name='run', *, dropout=0.1, optimizer=None, mesh=None, schedule=None, **training
):
  """An experiment in a folder; other keywords go to `TrainingConfig`."""
  return Experiment(
    model=gpt(32, 2, 2, context_length=32, vocab_size=264, dropout=dropout),
    data=DATA,
    optimizer=optimizer or AdamW(learning_rate=3e-3),
    schedule=schedule or Cosine(warmup=2),
    training=TrainingConfig(**SHORT | training),
    mesh=mesh or MeshConfig(data=1),
    run=RunConfig(name=name, dir=str(folder)),
  )


@pytest.fixture
def experiment(tmp_path):
  """Makes experiments in the test's own folder."""
  return functools.partial(make_experiment, tmp_path)
