"""The token before a document: found, used in the corpus and before prompts, never predicted."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers as hf

import jaxformer
from jaxformer.config import InputError
from jaxformer.data import Files, Pairs, Text, TokenizerFile, Tsv, load_tokenizer, open_data
from jaxformer.data.tokenizers import KIND_FILE
from jaxformer.evaluation import evaluate
from jaxformer.models.params import define
from jaxformer.task_type import IGNORE, Batch
from jaxformer.workflows import model as workflow
from jaxformer.workflows.model import Model

pytestmark = pytest.mark.quick
TEXTS = [f'document {i} of the corpus' * (i % 4 + 1) for i in range(80)]
BEGIN, END = '<|begin_of_text|>', '<|end_of_text|>'


@pytest.fixture
def folder(tmp_path):
  """Write a tokenizer.json with a post-processor, and settings beside it."""

  def write(template=f'{BEGIN} $A', name='llama', **settings) -> str:
    model = hf.Tokenizer(hf.models.BPE())
    model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = hf.decoders.ByteLevel()
    alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    trainer = hf.trainers.BpeTrainer(
      vocab_size=300,
      initial_alphabet=alphabet,
      special_tokens=[BEGIN, END, '<lang>'],
      show_progress=False,
    )
    model.train_from_iterator(TEXTS, trainer)
    if template is not None:
      special = [(t, model.token_to_id(t)) for t in (BEGIN, END, '<lang>') if t in template]
      steps = hf.processors.TemplateProcessing(single=template, special_tokens=special)
      level = hf.processors.ByteLevel(trim_offsets=False)
      model.post_processor = hf.processors.Sequence([level, steps])
    path = tmp_path / name
    path.mkdir(exist_ok=True)
    (path / 'tokenizer.json').write_text(model.to_str())
    if settings:
      (path / 'tokenizer_config.json').write_text(json.dumps(settings))
    return str(path)

  return write


def beginning(path, **fields) -> str | None:
  tokenizer = TokenizerFile(path=path, **fields).train(())
  index = tokenizer.beginning_of_document
  return None if index is None else tokenizer._model.id_to_token(index)


def test_it_is_found_as_the_tokenizer_asks(folder):
  assert beginning(folder()) == BEGIN
  assert beginning(folder(f'$A {END}', 'a')) is None
  assert beginning(folder(None, 'b')) is None
  assert beginning(folder(name='c', add_bos_token=False, bos_token=BEGIN)) == BEGIN
  assert beginning(folder(None, 'd', add_bos_token=True, bos_token={'content': BEGIN})) is None
  assert beginning(folder(None, 'e', bos_token=BEGIN)) is None
  assert beginning(folder(), beginning_of_document='<lang>') == '<lang>'
  assert beginning(folder(), beginning_of_document='') is None
  with pytest.raises(InputError, match=r"beginning_of_document = '<s>' is not in the vocabulary"):
    beginning(folder(), beginning_of_document='<s>')
  with pytest.raises(InputError, match=r'puts 2 tokens before a text \(.*\), .* must name it'):
    beginning(folder(f'{BEGIN} <lang> $A', 'f'))
  path = folder(name='g')
  Path(path, 'tokenizer_config.json').write_text('{"eos')
  with pytest.raises(InputError, match=r'tokenizer_config\.json: not valid JSON'):
    beginning(path)


def make_bert(path):
  file = Path(path, 'tokenizer.json')
  steps = {'type': 'BertProcessing', 'sep': [END, 1], 'cls': [BEGIN, 0]}
  file.write_text(json.dumps(json.loads(file.read_text()) | {'post_processor': steps}))


def test_that_of_bert(folder):
  path = folder(None, 'bert')
  make_bert(path)
  assert beginning(path) == BEGIN


@pytest.mark.parametrize(
  ('template', 'begin', 'ends'),
  [
    (None, BEGIN, []),
    (f'{BEGIN} $A', '', []),
    (f'{BEGIN} $A {END}', '', [END]),
    (f'{BEGIN} <lang> $A {END}', '<lang>', [END]),
    ('bert', '', [END]),
    ('bert', '<lang>', [END]),
    (f'$A {END}', BEGIN, [END]),
  ],
)
def test_an_exported_tokenizer_begins_as_this_one(folder, template, begin, ends):
  path = folder(None if template == 'bert' else template)
  if template == 'bert':
    make_bert(path)
  tokenizer = TokenizerFile(path=path, beginning_of_document=begin).train(())
  exported = hf.Tokenizer.from_str(tokenizer.hugging_face_files()['tokenizer.json'])
  expected = [*tokenizer.encode_start('document 7'), *map(exported.token_to_id, ends)]
  assert exported.encode('document 7').ids == expected
  assert len(exported.encode('one', 'two').tokens) > len(exported.encode('one').tokens)
  assert exported.encode('a', add_special_tokens=False).ids == tokenizer.encode('a').tolist()


def test_it_decides_the_identity_of_data_alone_where_there_is_one(folder, corpus, tmp_path):
  path, text = folder(), Files(path=corpus(TEXTS))
  with_it, without = (
    open_data(Text(corpus=text, tokenizer=tokenizer, sequence_length=16))
    for tokenizer in (TokenizerFile(path=path), TokenizerFile(path=path, beginning_of_document=''))
  )
  assert with_it.identity != without.identity
  plain = folder(f'$A {END}', 'plain')
  kind = json.loads(TokenizerFile(path=plain).train(()).files[KIND_FILE])
  assert kind == {'kind': 'tokenizer.json', 'end_of_document': END}


@pytest.mark.parametrize('packing', ['packed', 'stream', 'random_windows'])
def test_every_document_begins_with_it_and_it_is_never_a_target(folder, corpus, packing):
  data = open_data(
    Text(
      corpus=Files(path=corpus(TEXTS)),
      tokenizer=TokenizerFile(path=folder()),
      sequence_length=16,
      packing=packing,
    )
  )
  begin = data.tokenizer.beginning_of_document
  assert begin is not None
  for column in data._train + data._validation:
    starts = column.tokens_N[column.starts_R1[:-1]]
    assert (starts == begin).all()
    assert (column.tokens_N == begin).sum() == column.rows
  batches = [*data.validation_batches(4), *(data.train_batch(s, 4, 0) for s in range(20))]
  assert all((b.targets_BT != begin).all() for b in batches)
  # Every byte of the validation text is a target once, the first of each document too.
  targets = np.concatenate([b.targets_BT.ravel() for b in data.validation_batches(4)])
  scored = data.tokenizer.token_bytes[targets[targets >= 0]].sum()
  assert scored == data.manifest['validation']['bytes']
  assert data.tokenizer.token_bytes[begin] == 0


def test_a_document_of_the_corpus_and_a_prompt_begin_alike(folder, corpus, tmp_path):
  data = Text(
    corpus=Files(path=corpus(TEXTS)), tokenizer=TokenizerFile(path=folder()), sequence_length=16
  )
  opened = open_data(data)
  tokenizer, (column,) = opened.tokenizer, opened._train
  document = column.ids(0)
  text = tokenizer.decode(document)
  assert text in TEXTS
  assert tokenizer.encode_start(text) == document[:-1].tolist()
  assert tokenizer.encode_start('') == [tokenizer.beginning_of_document]
  (tmp_path / 'saved').mkdir()
  tokenizer.save(tmp_path / 'saved')
  assert load_tokenizer(tmp_path / 'saved').encode_start('') == tokenizer.encode_start('')
  assert load_tokenizer(folder()).encode_start('') == tokenizer.encode_start('')


def test_sources_begin_with_it_and_translations_do_not(folder, tmp_path):
  (tmp_path / 'a.tsv').write_text(''.join(f'source {i}\ttarget {i}\n' for i in range(80)))
  data = open_data(
    Pairs(
      corpus=Tsv(path=str(tmp_path / 'a.tsv')),
      tokenizer=TokenizerFile(path=folder()),
      source_lengths=(40,),
      target_lengths=(40,),
    )
  )
  batch, begin = data.train_batch(0, 4, 0), data.tokenizer.beginning_of_document
  assert (batch.source_BS[:, 0] == begin).all()
  assert (batch.targets_BT != begin).all()
  assert (batch.inputs[:, 0] == data.tokenizer.end_of_document).all()
  pair = data.held_out_pairs(1)[0]
  assert pair.source_ids[0] == begin


def built(tokenizer) -> Model:
  config = jaxformer.preset('llama3-tiny').replace(vocab_size=tokenizer.vocab_size)
  definition = define(config)
  return Model('a', definition, lambda: definition.init(jax.random.key(0)), tokenizer)


def test_prompts_begin_with_it(folder, monkeypatch):
  """A model is given what it was trained with."""
  monkeypatch.setattr(workflow, 'request', lambda definition, params, prompts, **options: prompts)
  path = folder()
  with_it = TokenizerFile(path=path).train(())
  without = TokenizerFile(path=path, beginning_of_document='').train(())
  begin, text = with_it.beginning_of_document, with_it.encode('document').tolist()
  for tokenizer, start in ((with_it, [begin]), (without, [])):
    model = dataclasses.replace(built(tokenizer), make_params=dict)
    assert model._request(['document', '']) == [[*start, *text], start]


def test_prompts_begin_with_all_that_the_tokenizer_puts_first(folder):
  path = folder(f'{BEGIN} <lang> $A')
  tokenizer, theirs = load_tokenizer(path), hf.Tokenizer.from_file(f'{path}/tokenizer.json')
  ids, text = tokenizer.encode_start('document'), tokenizer.encode('document').tolist()
  assert ids == theirs.encode('document').ids
  assert ids[2:] == text
  assert tokenizer.decode(ids) == 'document'
  assert tokenizer.hugging_face() == Path(path, 'tokenizer.json').read_text()
  model, row = built(tokenizer), np.array([ids], np.int32)
  assert model.score('document').count == len(text)
  targets = row[:, 1:].copy()
  targets[:, 0] = IGNORE
  expected = evaluate(model.definition, model.params, [Batch(row[:, :-1], targets)])
  assert model.score('document').nll_sum == pytest.approx(expected.nll_sum)
  with pytest.raises(InputError, match='puts 2 tokens before a text, and a document of a corpus'):
    _ = tokenizer.beginning_of_document


@pytest.mark.thorough
def test_scores_begin_with_it(folder):
  tokenizer = TokenizerFile(path=folder()).train(())
  model, begin = built(tokenizer), tokenizer.beginning_of_document
  text = tokenizer.encode('document').tolist()
  assert model.score('document').count == len(text)
  row = np.array([[begin, *text]], np.int32)
  expected = evaluate(model.definition, model.params, [Batch(row[:, :-1], row[:, 1:])])
  assert model.score('document').nll_sum == pytest.approx(expected.nll_sum)
