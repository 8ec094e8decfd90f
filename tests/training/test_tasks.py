"""Classifiers and tasks take the same path as text: loop, checkpoints, metrics, command line."""

import json

import jax
import numpy as np
import pytest

from experiments.mad_autoencoder import autoencoder
from jaxformer.cli import main
from jaxformer.config import InputError
from jaxformer.data import (
  AssociativeRecall,
  Digits,
  InductionHead,
  ListOps,
  MultiQueryRecall,
  PydocTopics,
  RebindingRecall,
  SelectiveCopying,
  Text,
  open_data,
)
from jaxformer.layers.mamba import Mamba
from jaxformer.models.embedder import LinearInput, TokenInput
from jaxformer.models.params import define
from jaxformer.models.zoo.gpt import gpt
from jaxformer.models.zoo.mamba import mamba
from jaxformer.sharding import MeshConfig
from jaxformer.training import (
  AdamW,
  Cosine,
  Experiment,
  RunConfig,
  TrainingConfig,
  check,
  load_experiment,
  load_params,
  train,
)
from jaxformer.training.experiment import check_fit
from jaxformer.training.run import read_metrics
from tests.data.test_mad_tasks import mad_tasks
from tests.models.test_classifier import classifier
from tests.tiers import case, thorough
from tests.training.compare import assert_same
from tests.training.conftest import SHORT
from tests.training.test_loop import quiet, stop_at

LISTOPS = ListOps(
  max_depth=4, max_args=4, min_length=4, max_length=32, train_sequences=40, test_sequences=30
)


def model(input_=None):
  return classifier(input_ or TokenInput(vocab_size=15), False, 'mean').replace(
    classes=10, context_length=64
  )


def experiment(folder, name='run', *, of=None, data=LISTOPS, mesh=None, **training):
  return Experiment(
    model=of or model(),
    data=data,
    optimizer=AdamW(learning_rate=3e-3),
    schedule=Cosine(warmup=2),
    training=TrainingConfig(**SHORT | training),
    mesh=mesh or MeshConfig(data=1),
    run=RunConfig(name=name, dir=str(folder)),
  )


@thorough
def test_a_classifier_stopped_and_resumed_is_as_never_stopped_bit_for_bit(tmp_path):
  def go(name, log=quiet):
    return train(experiment(tmp_path, name, accumulate=2), devices=jax.devices()[:1], log=log)

  whole, first = go('whole'), go('parts', stop_at(6))
  assert (first.exit_code, first.step) == (75, 7)
  second = go('parts')
  assert (second.exit_code, second.step) == (0, 12)
  assert_same(whole.folder, second.folder, 12)
  rows = read_metrics(whole.folder)
  assert {'eval/loss', 'eval/accuracy', 'eval/source'} < set(rows[-1])
  assert 'eval/bits_per_byte' not in rows[-1]
  assert 'train/accuracy' in rows[0]
  assert rows[-1]['eval/source'] == 'ListOps test, 2 batches of 4'
  assert rows[-2]['tokens'] == 12 * 8 * 32
  assert not (whole.folder / 'tokenizer').exists()
  manifest = json.loads((whole.folder / 'environment.json').read_text())[0]['data']
  assert manifest['task']['type'] == 'ListOps'
  assert load_experiment(whole.folder) == experiment(tmp_path, 'whole', accumulate=2)


def test_a_language_model_on_a_task(tmp_path):
  task = AssociativeRecall(test_sequences=40)
  e = experiment(
    tmp_path,
    of=gpt(32, 1, 4, context_length=32, vocab_size=12),
    data=task,
    steps=3,
    eval_batches=None,
  )
  result = train(e, devices=jax.devices()[:1], log=quiet)
  assert result.metrics['eval/source'] == 'AssociativeRecall test'
  definition = define(e.model)
  params = load_params(result.folder, definition).params
  batch = task.rows('test', np.arange(40))
  logits = np.asarray(jax.jit(lambda p: definition.merge(p)(batch.inputs).y)(params))[:, -1]
  answers = batch.targets_BT[:, -1]
  assert result.metrics['eval/accuracy'] == np.mean(logits.argmax(-1) == answers)
  nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(40), answers]
  assert result.metrics['eval/loss'] == pytest.approx(nll.mean(), rel=1e-5)


@pytest.mark.parametrize(
  'task',
  [
    case(mad_tasks.Compression(length=6, test_sequences=40), id='Compression', standing=True),
    case(
      mad_tasks.Memorization(vocab_size=12, length=6, test_sequences=40),
      id='Memorization',
      standing=False,
    ),
  ],
)
def test_the_score_of_a_suite_task_is_the_fraction_right_of_all_targets(tmp_path, task):
  language_model = gpt(32, 1, 4, context_length=6, vocab_size=16)
  e = experiment(
    tmp_path,
    of=autoencoder(language_model) if task.task.predicts == 'sequence' else language_model,
    data=task,
    steps=3,
    eval_batches=None,
  )
  result = train(e, devices=jax.devices()[:1], log=quiet)
  definition = define(e.model)
  params = load_params(result.folder, definition).params
  batch = task.rows('test', np.arange(40))

  @jax.jit
  def logits(params):
    model = definition.merge(params)
    return model(batch) if task.task.predicts == 'sequence' else model(batch.inputs).y

  right = np.asarray(logits(params)).argmax(-1) == batch.targets_BT
  assert result.metrics['eval/accuracy'] == pytest.approx(
    right.sum() / (batch.targets_BT != -1).sum()
  )


@thorough
def test_a_trained_model_is_scored_at_another_length(tmp_path, monkeypatch, capsys):
  """As Mamba is on induction heads: the length of the task is all that differs."""
  task, of = (
    InductionHead(length=15, vocab_size=16, test_sequences=8),
    mamba(Mamba.Config(), 16, 1, vocab_size=16, context_length=16),
  )
  e = experiment(tmp_path / 'runs', 'short', of=of, data=task, steps=2)
  train(e, devices=jax.devices()[:1], log=quiet)
  monkeypatch.chdir(tmp_path)
  for length in (15, 63):
    assert main(['eval', 'short', '--data.length', str(length), '--json']) == 0
    value = json.loads(capsys.readouterr().out)
    assert (value['targets'], value['source']) == (8, 'InductionHead')
  assert main(['eval', 'short', '--data.length', '2']) == 2
  assert 'length = 2: must be at least 3' in capsys.readouterr().err


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
  pytest.importorskip('sklearn')
  home = tmp_path_factory.mktemp('digits')
  e = experiment(
    home / 'runs',
    'digits',
    of=model(LinearInput.Config(features=1)),
    data=Digits(),
    mesh=MeshConfig(),
    steps=2,
    eval_batches=None,
  )
  assert train(e, log=quiet).exit_code == 0
  return home


def test_the_command_line_on_a_classifier(digits, monkeypatch, capsys):
  monkeypatch.chdir(digits)
  assert main(['eval', 'digits', '--json']) == 0
  value = json.loads(capsys.readouterr().out)
  trained = read_metrics(digits / 'runs' / 'digits')[-1]
  assert value['accuracy'] == pytest.approx(trained['eval/accuracy'])
  assert value['loss'] == pytest.approx(trained['eval/loss'], rel=1e-5)
  assert (value['targets'], value['source'], value['step']) == (359, 'Digits', 2)
  assert 'bits_per_byte' not in value
  assert main(['eval', 'digits']) == 0
  assert 'Digits test: 359 targets' in capsys.readouterr().out
  for words, message in (
    ('generate digits --prompt x', 'a Classifier trained on Digits'),
    ('convert digits out', 'a Classifier trained on Digits'),
    ('eval digits --by-position', 'one class per sequence'),
    ('eval digits --data Text', 'no tokenizer'),
    (
      'eval digits --data ListOps',
      'data = ListOps: the task is "tokens -> one class per sequence", but Classifier is a model '
      'for "1 features',
    ),
  ):
    assert main(words.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.quick
@pytest.mark.parametrize(
  ('of', 'data', 'message'),
  [
    (
      model(),
      Text(corpus=PydocTopics(), sequence_length=32),
      'Classifier is a model for "tokens -> one class.* use a LanguageModel',
    ),
    (model(), InductionHead(), r'use a LanguageModel or use data that fit the model \(ListOps\)'),
    (
      gpt(32, 1, 2, context_length=64, vocab_size=300),
      LISTOPS,
      'the task is "tokens -> one class per sequence".*use a Classifier',
    ),
    (model(), Digits(), 'the task is "1 features per position .*model for "tokens -> one class'),
    (
      model(LinearInput.Config(features=2)),
      Digits(),
      'the task is "1 features per position .*model for "2 features',
    ),
    (
      model().replace(classes=8),
      LISTOPS,
      'model.classes = 8: must be at least 10, that of ListOps',
    ),
    (
      model(TokenInput(vocab_size=12)),
      LISTOPS,
      'model.vocab_size = 12: must be at least 15, that of ListOps',
    ),
    (
      gpt(32, 1, 2, context_length=64, vocab_size=12),
      InductionHead(),
      'model.vocab_size = 12: must be at least 20, that of InductionHead',
    ),
    (
      gpt(32, 1, 2, context_length=64, vocab_size=16),
      mad_tasks.Compression(),
      'from its last hidden state", but LanguageModel .* use an Autoencoder',
    ),
    (
      autoencoder(gpt(32, 1, 2, context_length=64, vocab_size=20)),
      InductionHead(),
      'Autoencoder is a model for .* last hidden state"; use a LanguageModel',
    ),
    (
      autoencoder(gpt(32, 1, 2, context_length=64, vocab_size=15)),
      mad_tasks.Compression(),
      'model.vocab_size = 15: must be at least 16',
    ),
    (
      model(),
      mad_tasks.Compression(),
      'Classifier is a model for .*; use an Autoencoder .* or use data',
    ),
  ],
)
def test_models_and_data_that_do_not_fit(tmp_path, of, data, message):
  with pytest.raises(InputError, match=message):
    check(experiment(tmp_path, of=of, data=data))


@pytest.mark.quick
def test_a_task_longer_than_the_learned_positions(tmp_path):
  with pytest.raises(InputError, match=r'data\.positions = 31: must be at most 16'):
    experiment(tmp_path, of=gpt(32, 1, 2, context_length=16, vocab_size=20), data=InductionHead())


@pytest.mark.quick
@pytest.mark.parametrize(
  'task',
  [t for t in mad_tasks.mad_suite() if t == type(t)()]
  + [MultiQueryRecall(), RebindingRecall(), SelectiveCopying()],
  ids=lambda t: t.tag,
)
def test_a_model_with_the_vocabulary_of_a_task_can_read_it(task):
  vocab_size, of = (
    open_data(task).vocab_size,
    autoencoder if task.task.predicts == 'sequence' else lambda m: m,
  )
  check_fit(of(gpt(32, 1, 2, context_length=8, vocab_size=vocab_size)), task, vocab_size)
  with pytest.raises(
    InputError, match=rf'model.vocab_size = {vocab_size - 1}: must be at least {vocab_size}'
  ):
    check_fit(of(gpt(32, 1, 2, context_length=8, vocab_size=vocab_size - 1)), task)
