"""Encoder-decoders in the training loop: batches whose arrays and steps differ in shape, and data
that do not fit."""

import jax
import numpy as np
import pytest

from jaxformer.config import InputError
from jaxformer.data import Text, open_data
from jaxformer.data.dataset import Dataset, DatasetConfig, process_rows
from jaxformer.evaluation import evaluate
from jaxformer.models.params import define
from jaxformer.models.zoo import PRESETS
from jaxformer.models.zoo.seq2seq import luong
from jaxformer.models.zoo.transformer import transformer
from jaxformer.sharding import MeshConfig, make_parallel
from jaxformer.task_type import Batch, TaskType
from jaxformer.training import AdamW, Constant, Experiment, RunConfig, TrainingConfig, train
from jaxformer.training.batch_placement import BatchPlacement
from jaxformer.training.experiment import check_fit
from jaxformer.training.run import read_metrics
from tests.tiers import case, thorough

ONE = jax.devices()[:1]
END = 15


class Backwards(DatasetConfig):
  """Sources of 2 to 7 digits, to be said from the end, in two buckets: most steps have another
  shape than the one before."""

  @property
  def positions(self):
    return 8

  @property
  def task(self):
    return TaskType(inputs='pairs', source_vocab_size=16)

  def open(self, folder, log, tokenizer):
    return BackwardsData(self)


class BackwardsData(Dataset):
  tokenizer, vocab_size, source_vocab_size, size, validation_rows = None, 16, 16, 'digits', 16

  def __init__(self, config):
    self.config, self.manifest, self.identity = config, {}, {'data': 'backwards'}

  def train_batch(self, step, batch_size, seed, process_index=0, process_count=1):
    low, high = process_rows(batch_size, process_index, process_count)
    batch = self._batch(np.random.default_rng([seed, step]), batch_size, step % 2)
    return only(batch, slice(low, high))

  def validation_batches(self, batch_size, limit_batches=None, process_index=0, process_count=1):
    low, high = process_rows(batch_size, process_index, process_count)
    for bucket in (0, 1):
      batch = self._batch(np.random.default_rng(bucket), batch_size, bucket)
      yield only(batch, slice(low, high))

  def _batch(self, numbers, rows, bucket):
    S, T = ((5, 4), (9, 8))[bucket]
    source, tokens, targets = (
      np.full((rows, S), -1),
      np.zeros((rows, T), int),
      np.full((rows, T), -1),
    )
    for i in range(rows):
      digits = numbers.integers(1, 8, numbers.integers(2, T))
      source[i, : len(digits) + 1] = [*digits, END]
      tokens[i, : len(digits) + 1] = [END, *digits[::-1]]
      targets[i, : len(digits) + 1] = [*digits[::-1], END]
    source, tokens, targets = (a.astype(np.int32) for a in (source, tokens, targets))
    return Batch(tokens, targets, source_BS=source)


def only(batch, rows):
  return Batch(batch.inputs[rows], batch.targets_BT[rows], source_BS=batch.source_BS[rows])


TINY = transformer(32, 1, 64, 2, vocab_size=16, context_length=16)


def experiment(tmp_path, model=TINY, name='run', mesh=None, **training):
  given = {
    'steps': 12,
    'batch_size': 8,
    'checkpoint_every': 4,
    'eval_every': 6,
    'keep_best': 0,
    'log_every': 1,
    'trackers': (),
  } | training
  return Experiment(
    model=model,
    data=Backwards(),
    optimizer=AdamW(learning_rate=3e-3),
    schedule=Constant(),
    training=TrainingConfig(**given),
    mesh=mesh or MeshConfig(data=1),
    run=RunConfig(name=name, dir=str(tmp_path)),
  )


def test_one_compilation_a_shape_and_tokens_as_they_were(tmp_path):
  result = train(experiment(tmp_path, label_smoothing=0.1), devices=ONE, log=lambda line: None)
  assert result.exit_code == 0
  events = (result.folder / 'events.jsonl').read_text()
  assert events.count('"event": "compile"') == 2
  rows = [r for r in read_metrics(result.folder) if 'train/loss' in r]
  assert [r['tokens'] for r in rows] == list(np.cumsum([8 * 4, 8 * 8] * 6))
  evaluated = [r for r in read_metrics(result.folder) if 'eval/loss' in r]
  assert evaluated[-1]['eval/loss'] < evaluated[0]['eval/loss']


@thorough
def test_interrupted_training_counts_and_learns_the_same(tmp_path):
  whole = train(experiment(tmp_path, name='whole'), devices=ONE, log=lambda line: None)
  train(experiment(tmp_path, name='parts', steps=5), devices=ONE, log=lambda line: None)
  parts = train(experiment(tmp_path, name='parts'), devices=ONE, log=lambda line: None)
  for name in ('tokens', 'train/loss', 'eval/loss'):
    assert parts.metrics[name] == whole.metrics[name], name


@pytest.mark.parametrize(
  'model',
  [
    case(TINY, id='transformer', standing=False),
    case(
      luong(32, 1, None, source_vocab_size=16, vocab_size=16, context_length=16),
      id='luong',
      standing=False,
    ),
  ],
)
def test_eight_devices_learn_what_one_does(tmp_path, model):
  one = train(experiment(tmp_path, model, 'one'), devices=ONE, log=lambda line: None)
  eight = train(
    experiment(tmp_path, model, 'eight', MeshConfig(data=8, rules='data_parallel')),
    devices=jax.devices(),
    log=lambda line: None,
  )
  for name in ('train/loss', 'eval/loss'):
    assert eight.metrics[name] == pytest.approx(one.metrics[name], rel=1e-4), name


@thorough
def test_accumulated_microbatches_are_the_batch(tmp_path):
  whole = train(experiment(tmp_path, name='whole', steps=4), devices=ONE, log=lambda line: None)
  parts = train(
    experiment(tmp_path, name='parts', steps=4, accumulate=4), devices=ONE, log=lambda line: None
  )
  assert parts.metrics['train/loss'] == pytest.approx(whole.metrics['train/loss'], rel=1e-5)


def test_scores_do_not_depend_on_how_rows_are_batched():
  data, definition = open_data(Backwards()), define(TINY)
  params = definition.init(jax.random.key(0))
  batch = next(iter(data.validation_batches(16)))
  together = evaluate(definition, params, [batch])
  apart = evaluate(
    definition, params, [only(batch, rows) for rows in (slice(0, 11), slice(11, 16))]
  )
  assert (together.count, together.correct) == (apart.count, apart.correct)
  assert together.loss == pytest.approx(apart.loss, rel=1e-5)
  with pytest.raises(InputError, match='source tokens from 0 to 99'):
    evaluate(definition, params, [batch._replace(source_BS=np.array([[0, 99]] * 16))])


@pytest.mark.parametrize(
  ('model', 'data', 'message'),
  [
    ('transformer-tiny', Text(), 'EncoderDecoder is a model for "source-target pairs'),
    ('gpt2-tiny', Backwards(), 'the task is "source-target pairs .* use an EncoderDecoder'),
    (
      's4d-classifier-tiny',
      Backwards(),
      'the task is "source-target pairs .* use an EncoderDecoder',
    ),
  ],
)
def test_models_and_data_that_do_not_fit(model, data, message):
  with pytest.raises(InputError, match=message):
    check_fit(PRESETS[model].model, data)


def test_vocabularies_that_do_not_fit():
  small = TINY.replace(source_vocab_size=12, shared_embedding=False)
  with pytest.raises(InputError, match=r'model\.source_vocab_size = 12: must be at least 16'):
    check_fit(small, Backwards())
  with pytest.raises(InputError, match=r'model\.vocab_size = 16: must be at least 17'):
    check_fit(TINY, Backwards(), 17, 16)


def test_a_batch_that_the_mesh_does_not_divide():
  feed = BatchPlacement(make_parallel(MeshConfig(data=8)), 8, 8)
  with pytest.raises(InputError, match='12 rows of 4 positions'):
    feed(Batch(*(np.zeros((12, 4), np.int32) for _ in range(3))))
