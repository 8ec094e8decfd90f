"""Classifiers and tasks take the same path as text: loop, checkpoints, metrics, command line."""

import json

import jax
import numpy as np
import pytest

from jaxformer.cli import main
from jaxformer.config import InputError
from jaxformer.data import AssociativeRecall, DataConfig, Digits, InductionHead, ListOps, PydocTopics
from jaxformer.models.classifier import LinearInput, MeanPooling, TokenInput
from jaxformer.models.params import define
from jaxformer.models.zoo.gpt import gpt
from jaxformer.sharding import MeshConfig
from jaxformer.training import AdamW, Cosine, Experiment, RunConfig, TrainingConfig, check, load_experiment, load_params, train
from jaxformer.training.run import read_metrics
from tests.models.test_classifier import classifier
from tests.training.compare import assert_same
from tests.training.conftest import SHORT
from tests.training.test_loop import quiet, stop_at

LISTOPS = ListOps(max_depth=4, max_args=4, min_length=4, max_length=32, train_sequences=40, test_sequences=30)


def model(input_=None):
  return classifier(input_ or TokenInput.Config(vocab_size=15), False, MeanPooling()).replace(classes=10, context=64)


def experiment(folder, name='run', *, of=None, data=LISTOPS, mesh=None, **training):
  return Experiment(
    model=of or model(), data=data, optimizer=AdamW(learning_rate=3e-3), schedule=Cosine(warmup=2),
    training=TrainingConfig(**SHORT | training), mesh=mesh or MeshConfig(data=1), run=RunConfig(name=name, dir=str(folder)))


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
  e = experiment(tmp_path, of=gpt(32, 1, 4, context=32, vocab_size=12), data=task, steps=3, eval_batches=None)
  result = train(e, devices=jax.devices()[:1], log=quiet)
  assert result.metrics['eval/source'] == 'AssociativeRecall test'
  definition = define(e.model)
  params, _ = load_params(result.folder, definition)
  batch = task.rows('test', np.arange(40))
  logits = np.asarray(definition.merge(params)(batch.tokens_BT).y)[:, -1]
  answers = batch.targets_BT[:, -1]
  assert result.metrics['eval/accuracy'] == np.mean(logits.argmax(-1) == answers)
  nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(40), answers]
  assert result.metrics['eval/loss'] == pytest.approx(nll.mean(), rel=1e-5)


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
  pytest.importorskip('sklearn')
  home = tmp_path_factory.mktemp('digits')
  e = experiment(home / 'runs', 'digits', of=model(LinearInput.Config(features=1)), data=Digits(), mesh=MeshConfig(), steps=2,
                 eval_batches=None)
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
    ('generate digits --prompt x', 'a Classifier trained on Digits'), ('convert digits out', 'a Classifier trained on Digits'),
    ('eval digits --by-position', 'one class a sequence'), ('eval digits --data DataConfig', 'without a tokenizer'),
    ('eval digits --data ListOps', 'data = ListOps: have tokens at each position, and model.input reads 1 numbers'),
  ):
    assert main(words.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.quick
@pytest.mark.parametrize(('of', 'data', 'message'), [
  (model(), DataConfig(source=PydocTopics(), sequence_length=32), 'a Classifier names one of its classes, and these data ask for'),
  (model(), InductionHead(), 'a Classifier names one of its classes.*known: Digits, ListOps'),
  (gpt(32, 1, 2, context=64, vocab_size=300), LISTOPS, 'a LanguageModel predicts tokens, and these data ask for a class'),
  (model(), Digits(), 'have 1 numbers at each position, and model.input reads tokens'),
  (model(LinearInput.Config(features=2)), Digits(), 'have 1 numbers at each position, and model.input reads 2 numbers'),
  (model().replace(classes=8), LISTOPS, 'model.classes = 8: must be at least 10, those of ListOps'),
  (model(TokenInput.Config(vocab_size=12)), LISTOPS, 'model.input.vocab_size = 12: must be at least 15, those of ListOps'),
  (gpt(32, 1, 2, context=64, vocab_size=12), InductionHead(), 'model.vocab_size = 12: must be at least 20, those of InductionHead'),
])
def test_models_and_data_that_do_not_fit(tmp_path, of, data, message):
  with pytest.raises(InputError, match=message):
    check(experiment(tmp_path, of=of, data=data))


@pytest.mark.quick
def test_a_task_longer_than_the_learned_positions(tmp_path):
  with pytest.raises(InputError, match=r'data = InductionHead: positions = 31: must be at most 16'):
    experiment(tmp_path, of=gpt(32, 1, 2, context=16, vocab_size=20), data=InductionHead())
