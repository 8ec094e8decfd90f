"""`generate` and `align` with an encoder-decoder, from the words of the command to what it
prints."""

import io
import json

import jax
import pytest

import jaxformer
from jaxformer.cli import main
from jaxformer.config import InputError
from jaxformer.data.tokenizers import ByteTokenizer
from jaxformer.models.params import define
from jaxformer.models.zoo import PRESETS
from jaxformer.models.zoo.transformer import transformer
from jaxformer.workflows.model import Model

pytestmark = pytest.mark.newest


@pytest.fixture
def trained(monkeypatch):
  """Makes every RUN a small model of bytes with random weights."""

  def of(model):
    definition = define(model)
    params = definition.init(jax.random.key(0))

    def load(run, code=()):
      return Model(run, definition, lambda: params, ByteTokenizer(), None, 1)

    monkeypatch.setattr(jaxformer, 'load', load)
    monkeypatch.setattr('jaxformer.api.load', load)

  of(transformer(16, 1, 32, 2, vocab_size=264, context_length=64))
  return of


def test_lines_of_standard_input_and_sources_are_translated_alike(trained, monkeypatch, capsys):
  words = ['generate', 'some', '--max-new-tokens', '5', '--beam', '3']
  assert main([*words, '--source', 'one two', '--source', 'three', '--json']) == 0
  found = json.loads(capsys.readouterr().out)
  assert [f['source'] for f in found] == ['one two', 'three']
  assert all(
    len(f['tokens']) <= 5 and f['log_p'] < 0 and max(f['tokens'], default=0) < 257 for f in found
  )
  monkeypatch.setattr('sys.stdin', io.StringIO('one two\nthree\n'))
  assert main(words) == 0
  assert capsys.readouterr().out == ''.join(f'{f["text"]}\n' for f in found)
  nothing = io.StringIO('')
  nothing.isatty = lambda: True
  monkeypatch.setattr('sys.stdin', nothing)
  assert main(words) == 0
  out, err = capsys.readouterr()
  assert out == ''
  assert 'Ctrl-D' in err


def test_the_python_interface_translates_as_the_command_does(trained, capsys):
  words = ['generate', 'some', '--max-new-tokens', '9', '--beam', '3', '--length-penalty', '0.3']
  options = {'beam': 3, 'length_penalty': 0.3, 'max_new_tokens': 9}
  assert main([*words, '--source', 'one two', '--source', 'three']) == 0
  several = jaxformer.translate('some', ['one two', 'three'], **options)
  assert capsys.readouterr().out == ''.join(f'{text}\n' for text in several)
  assert any(several)
  assert jaxformer.translate('some', 'three', **options) == several[1]
  assert jaxformer.translate('some', []) == []
  with pytest.raises(InputError, match='does not continue prompts'):
    jaxformer.generate('some', 'one')


def test_an_alignment_is_drawn(trained, tmp_path, capsys):
  picture = tmp_path / 'a.svg'
  assert (
    main(
      [
        'align',
        'some',
        '--source',
        'abc',
        '--target',
        'xy',
        '--layer',
        '0',
        '--out',
        str(picture),
        '--json',
      ]
    )
    == 0
  )
  found = json.loads(capsys.readouterr().out)
  assert (found['source'], found['target']) == (['a', 'b', 'c', '<end>'], ['x', 'y', '<end>'])
  assert all(sum(row) == pytest.approx(1, abs=1e-5) for row in found['weights'])
  assert '<svg' in picture.read_text()


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['generate', 'some', '--prompt', 'x'], '--prompt: has no effect: some is an encoder-decoder'),
    (
      ['generate', 'some', '--source', 'x', '--top-k', '3'],
      '--top-k: has no effect: some is an encoder-decoder',
    ),
    (['generate', 'some', '--source', 'x', '--beam', '0'], 'Beam.width = 0'),
    (
      ['align', 'some', '--source', 'x', '--target', 'y', '--layer', '1'],
      'layer = 1: must be at least 0 and below 1',
    ),
  ],
)
def test_options_that_have_no_effect_are_errors(trained, words, message, capsys):
  assert main(words) == 2
  assert message in capsys.readouterr().err


def test_a_language_model_has_no_source(trained, capsys):
  trained(PRESETS['gpt2-tiny'].model)
  assert main(['generate', 'some', '--source', 'x']) == 2
  assert '--source: has no effect: some is not an encoder-decoder' in capsys.readouterr().err
  assert main(['align', 'some', '--source', 'x']) == 2
  assert 'not an encoder-decoder' in capsys.readouterr().err
  with pytest.raises(InputError, match='not an encoder-decoder'):
    jaxformer.translate('some', 'x')
