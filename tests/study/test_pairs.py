"""Encoder-decoders in studies: of equal size, on pairs from a task and from a file; and each kind
of model on its own data."""

import pytest

from jaxformer.config import InputError
from jaxformer.data import AssociativeRecall, Dates, Pairs, Tsv
from jaxformer.layers.attention import Attention
from jaxformer.models.params import define
from jaxformer.models.zoo import FAMILIES
from jaxformer.study.report import content, page, report_study
from jaxformer.study.runner import run_study
from jaxformer.study.sizing import solve
from jaxformer.study.study import FixedModel, ScaledFamily, Study, TokenMixer
from jaxformer.training.interrupt import Interrupt
from tests.tiers import thorough

OF_PAIRS = ('gnmt', 'rnnsearch', 'seq2seq-lstm', 'transformer')


@pytest.mark.quick
@pytest.mark.parametrize('name', OF_PAIRS)
def test_sizes_are_met(name):
  found = solve(name, 'params', 3e5, vocab_size=1024, source_vocab_size=300, context_length=32)
  assert define(found.model).size == pytest.approx(3e5, rel=0.02)
  assert found.width % 8 == 0
  assert found.hidden % 8 == 0
  assert (found.model.source_vocab_size, found.model.vocab_size) == (300, 1024)


@pytest.mark.quick
def test_one_vocabulary_is_one_table():
  model = FAMILIES['transformer'].make(
    width=64, layers=1, hidden=64, source_vocab_size=300, vocab_size=300, context_length=32
  )
  assert model.shared_embedding
  assert not model.encoder[0].pattern[0].branches[0].layer.causal


def entry(family):
  small = FAMILIES[family].make(
    width=32,
    layers=FAMILIES[family].fewest_layers,
    hidden=16,
    source_vocab_size=257,
    vocab_size=257,
    context_length=32,
  )
  return FixedModel(name=family, model_config=small)


def study(tmp_path, entries, tasks, **settings):
  small = {
    'target': 3e4,
    'tolerance': 0.5,
    'tokens': 11 * 8 * 4,
    'batch_size': 8,
    'learning_rates': (3e-3,),
    'seeds': (1, 2),
    'runs_per_program': 2,
    'eval_batches': 1,
    'translations': 6,
    'contexts': (8,),
    'timing_repeats': 0,
  }
  return Study(
    name='pairs', entries=entries, tasks=tasks, dir=str(tmp_path / 'runs'), **(small | settings)
  )


@thorough
def test_a_study_of_translations_from_end_to_end(tmp_path):
  s = study(tmp_path, tuple(map(entry, ('rnnsearch', 'transformer'))), (Dates(),))
  said, again = [], []
  results = report_study(s, said.append)
  (task,) = results.tasks
  assert task.metric == 'bits per byte'
  for o in task.outcomes:
    assert len([v for v in o.scores.values() if v is not None and v > 0]) == 2
    assert 0 <= o.translation['exact match'].mean <= 1
    assert o.translation['exact match'].runs == 2
    assert o.position_loss
  # costs of decoding are a language model's
  assert all(c.contexts == () for c in results.costs.values())
  assert 'Scores of translations: Dates' in page('report.md', content(results))
  assert sum('runs in one program' in line for line in said) == 4
  assert report_study(s, again.append).tasks == results.tasks
  assert not [line for line in again if 'seed' in line and 'finished before' not in line]


@thorough
def test_buckets_train_one_run_after_the_other(tmp_path):
  """A population is one program, and buckets are several."""
  lines = [f'word {i} of\tpalabra {i}{" de muchas" * (i % 2)}\t{i % 10}\n' for i in range(80)]
  (tmp_path / 'pairs.tsv').write_text(''.join(lines))
  buckets = Pairs(
    corpus=Tsv(path=str(tmp_path / 'pairs.tsv'), document_column=3),
    source_lengths=(16, 32),
    target_lengths=(16, 32),
  )
  one = buckets.replace(source_lengths=(32,), target_lengths=(32,))
  assert [d.one_shape for d in (Dates(), one, buckets)] == [True, True, False]
  said = []
  with Interrupt() as interrupt:
    done = run_study(
      study(tmp_path, (entry('transformer'),), (buckets,), tokens=8 * 32 * 2),
      said.append,
      interrupt,
    )
  assert [r.seed for r in done['Pairs'][0].runs] == [1, 2]
  assert all(0 < r.loss < 10 for r in done['Pairs'][0].runs)
  assert not [line for line in said if 'runs in one program' in line]


RECALL = AssociativeRecall(length=6)


@pytest.mark.quick
@pytest.mark.parametrize(
  ('entries', 'task', 'parts'),
  [
    (
      (ScaledFamily(family='lstm'),),
      Dates(),
      ['family lstm', 'pairs', 'seq2seq-lstm', 'transformer'],
    ),
    ((ScaledFamily(family='transformer'),), RECALL, ['family transformer', 'pairs', 'llama3']),
    ((TokenMixer(layer=Attention.Config()),), Dates(), ['Attention', 'pairs']),
    ((entry('rnnsearch'),), RECALL, ['EncoderDecoder', 'pairs']),
    (
      (
        FixedModel(
          model_config=FAMILIES['gru'].make(width=8, layers=1, vocab_size=264, context_length=32)
        ),
      ),
      Dates(),
      ['Dates', 'LanguageModel', 'pairs'],
    ),
  ],
)
def test_each_kind_of_model_on_its_own_data(entries, task, parts, tmp_path):
  with Interrupt() as interrupt, pytest.raises(InputError) as e:
    run_study(study(tmp_path, entries, (task,)), lambda line: None, interrupt)
  for part in parts:
    assert part in str(e.value)
  assert not (tmp_path / 'runs').exists()
