"""Ids of special tokens and rules of generation: honoured or refused by name, and exported."""

import json

import numpy as np
import pytest

import jaxformer
from jaxformer.config import InputError
from jaxformer.data.tokenizers import ByteTokenizer
from jaxformer.inference import TokenRules, translate
from jaxformer.interop import read_generation, save_hf
from jaxformer.models.params import define
from jaxformer.models.zoo.llama import LLAMA3_1, llama
from jaxformer.workflows.model import Model
from tests.interop.small import SMALL, noisy

pytestmark = pytest.mark.quick
BYTES = llama(16, 1, 24, 4, 2, context_length=32, vocab_size=257, rotary=LLAMA3_1)


def fields(folder, name='config.json'):
  return json.loads((folder / name).read_text())


@pytest.fixture
def exported(tmp_path):
  """A folder of a model of bytes."""
  config, params = BYTES, noisy(BYTES)
  model = Model('ours', define(config), lambda: params, ByteTokenizer())
  model.export(tmp_path / 'out')
  return tmp_path / 'out'


def test_the_end_of_a_document_is_exported(exported, tmp_path):
  for name in ('config.json', 'generation_config.json'):
    assert fields(exported, name)['eos_token_id'] == 256
  assert fields(exported, 'tokenizer_config.json')['eos_token'] == '<|endoftext|>'
  again = jaxformer.load(exported)
  assert again.tokenizer.end_of_document == 256
  again.export(tmp_path / 'again')
  for path in exported.iterdir():
    assert path.read_bytes() == (tmp_path / 'again' / path.name).read_bytes()


def test_nothing_of_a_folder_is_lost(exported, tmp_path):
  """Fields that we do not read, the tokenizer's files, and the format of the folder."""
  config = fields(exported) | {
    'model_type': 'mistral',
    'sliding_window': None,
    'rope_parameters': None,
    'eos_token_id': [256, 7],
    'pad_token_id': 3,
    'pretraining_tp': 2,
    'num_beams': 4,
  }
  (exported / 'config.json').write_text(json.dumps(config))
  (exported / 'generation_config.json').unlink()
  (exported / 'chat_template.jinja').write_text('{{ x }}')
  (exported / 'added_tokens.json').write_text('{"x": 5}')
  jaxformer.convert(str(exported), tmp_path / 'again', dtype='bfloat16', log=lambda _: None)
  assert fields(tmp_path / 'again') == config | {'dtype': 'bfloat16', 'torch_dtype': 'bfloat16'}
  generation = fields(tmp_path / 'again', 'generation_config.json')
  assert generation == {'eos_token_id': [256, 7], 'pad_token_id': 3, 'num_beams': 4}
  for name in ('chat_template.jinja', 'added_tokens.json', 'tokenizer_config.json'):
    assert (tmp_path / 'again' / name).read_text() == (exported / name).read_text()


def test_a_source_of_another_model_is_refused(exported, tmp_path):
  with pytest.raises(InputError, match='source'):
    save_hf(tmp_path / 'no', SMALL['llama'], noisy(SMALL['llama']), source=exported)
  assert not (tmp_path / 'no').exists()


def test_a_decoder_begins_with_what_is_published(tmp_path):
  config = SMALL['marian']
  save_hf(tmp_path / 'out', config, noisy(config), token_ids={'decoder_start_token_id': 7})
  assert fields(tmp_path / 'out')['decoder_start_token_id'] == 7
  assert read_generation(tmp_path / 'out').begin == 7
  save_hf(tmp_path / 'unknown', config, noisy(config))
  assert read_generation(tmp_path / 'unknown').begin is None


def test_what_is_not_supported_is_refused_by_name_when_text_is_generated(exported):
  path = exported / 'generation_config.json'
  for field, value in (
    ('no_repeat_ngram_size', 3),
    ('bad_words_ids', [[1, 2]]),
    ('sequence_bias', [[[1], 2.0]]),
    ('min_length', 5),
    ('forced_eos_token_id', 4),
  ):
    path.write_text(json.dumps({field: value}))
    model = jaxformer.load(exported)
    assert model.score('abc').count == 3
    with pytest.raises(InputError, match=field):
      model.generate('abc', max_new_tokens=1)
  for field, value in (('eos_token_id', 'x'), ('suppress_tokens', 4), ('bad_words_ids', [4])):
    path.write_text(json.dumps({field: value}))
    with pytest.raises(InputError, match=f'generation_config.json: {field}'):
      jaxformer.load(exported)


def test_the_repetition_penalty_of_a_folder_is_the_default(exported):
  path = exported / 'generation_config.json'

  def tokens(**options):
    model = jaxformer.load(exported)
    return model.complete(['abc'], max_new_tokens=14, temperature=0, **options)[0].tokens

  given = {penalty: tokens(repetition_penalty=penalty) for penalty in (1.0, 50.0)}
  assert given[1.0] == tokens() != given[50.0]
  path.write_text(json.dumps({'repetition_penalty': 50.0}))
  assert tokens() == given[50.0]
  assert tokens(repetition_penalty=1) == given[1.0]
  path.write_text(json.dumps({'repetition_penalty': -1}))
  with pytest.raises(InputError, match='repetition_penalty = -1'):
    jaxformer.load(exported)


def test_translations_have_no_repetition_penalty(tmp_path):
  config = SMALL['marian'].replace(vocab_size=257, source_vocab_size=257)
  model = Model('ours', define(config), lambda: noisy(config), ByteTokenizer())
  model.export(tmp_path / 'out')
  path = tmp_path / 'out/generation_config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'repetition_penalty': 1.2}))
  with pytest.raises(InputError, match=r'repetition_penalty = 1\.2'):
    jaxformer.load(tmp_path / 'out').translate('abc', max_new_tokens=3)


def test_lengths_of_a_folder_are_defaults(exported):
  path = exported / 'generation_config.json'
  model = jaxformer.load(exported)
  assert len(model.complete(['abc'], max_new_tokens=9, temperature=0)[0].tokens) == 9
  for given, expected in (({'max_length': 8}, 5), ({'max_new_tokens': 6, 'max_length': 8}, 6)):
    path.write_text(json.dumps(given))
    found = jaxformer.load(exported).complete(['abc'], temperature=0)[0]
    assert len(found.tokens) == expected


def test_rules_in_a_beam():
  config = SMALL['marian'].replace(context_length=32)
  definition, params = define(config), noisy(SMALL['marian'])
  given = {'end': 0, 'begin': 3, 'max_new_tokens': 6}
  free = translate(definition, params, [[4, 5, 0]], **given)[0]
  used = tuple(set(free.tokens))
  rules = TokenRules(never=used, first=9, last=0, never_first=(11,))
  found = translate(definition, params, [[4, 5, 0]], rules=rules, **given)[0]
  assert found.tokens[0] == 9
  assert not set(used) - {9} & set(found.tokens)
  assert found.finished
  assert np.isfinite(found.log_p)
  with pytest.raises(InputError, match='never'):
    translate(definition, params, [[4, 0]], rules=TokenRules(never=(999,)), **given)
