"""Weights of other libraries in use: numbers that are not finite, lengths, stops, missing files."""

import dataclasses
import json

import jax.numpy as jnp
import pytest
import tokenizers as hf

import jaxformer
from jaxformer.cli.main import main
from jaxformer.config import InputError
from jaxformer.data.tokenizers import ByteTokenizer
from jaxformer.exit_codes import NOT_FINITE, NotFiniteError
from jaxformer.inference import Beam, translate
from jaxformer.models.params import define
from jaxformer.models.zoo.llama import LLAMA3_1, llama
from jaxformer.workflows import model as workflow
from jaxformer.workflows.model import Model
from tests.interop.small import SMALL, noisy

pytestmark = pytest.mark.quick
CONFIG = llama(16, 1, 24, 4, 2, context_length=32, vocab_size=258, rotary=LLAMA3_1)
NORM = 'final_norm.scale'


def folder_of(path, **changed):
  params = noisy(CONFIG) | changed
  Model('ours', define(CONFIG), lambda: params, ByteTokenizer()).export(path)
  return path


def test_commands_end_with_the_weights_that_are_not_finite(tmp_path, capsys):
  bad = noisy(CONFIG)[NORM].at[2].set(jnp.nan)
  folder = folder_of(tmp_path / 'bad', **{NORM: bad})
  (tmp_path / 'text.txt').write_text('some words to score\n' * 200)
  data = [
    '--data.corpus',
    'Files',
    '--data.corpus.path',
    str(tmp_path / 'text.txt'),
    '--data.split',
    'ByPosition',
  ]
  for command in (
    ['generate', str(folder), '--prompt', 'ab', '--max-new-tokens', '3'],
    ['generate', str(folder), '--prompt', 'ab', '--prompt', 'c', '--max-new-tokens', '3'],
    ['eval', str(folder), *data],
  ):
    assert main(command) == NOT_FINITE
    (line,) = [e for e in capsys.readouterr().err.splitlines() if e.startswith('error: ')]
    assert 'are not finite' in line
    assert line.endswith(f'nor are the weights {NORM}')


def test_activations_that_overflow_are_told_from_weights(tmp_path):
  large = jnp.full_like(noisy(CONFIG)[NORM], 3e38)
  model = jaxformer.load(folder_of(tmp_path / 'large', **{NORM: large}))
  with pytest.raises(
    NotFiniteError, match=r'logits are not finite .* all weights are: activations'
  ):
    model.generate('abc', max_new_tokens=2)


@pytest.mark.parametrize('width', [1, 3])
def test_translation(width):
  config = SMALL['marian']
  definition, params = define(config), noisy(config)
  given = {'end': 0, 'max_new_tokens': 4, 'beam': Beam(width=width)}
  name = 'decoder.groups.0.0.branches.0.layer.q.kernel'
  bad = params | {name: params[name].at[0, 0, 0].set(jnp.inf)}
  with pytest.raises(NotFiniteError, match=f'weights {name}'):
    translate(definition, bad, [[4, 5, 0], [3, 0]], **given)
  # a token that can never come
  barred = params | {'head.bias': params['head.bias'].at[7].set(-jnp.inf)}
  found = translate(definition, barred, [[4, 5, 0]], **given)[0]
  assert jnp.isfinite(found.log_p)
  assert 7 not in found.tokens


def test_a_finished_row_is_not_examined():
  """Its logits are of tokens that nobody asked for."""
  from jaxformer.inference.decoding import _drawn, request

  definition, params = define(CONFIG), noisy(CONFIG)
  r = request(definition, params, [[1], [2]], max_new_tokens=4)
  logits = jnp.stack([jnp.full(258, jnp.nan), jnp.zeros(258)])
  for finished, finite in (([True, False], True), ([False, False], False)):
    start = dataclasses.replace(r.begin(), finished_B=jnp.array(finished))
    d = _drawn(start, logits, jnp.int32(-1), r.sampling, None, r.rules)
    assert bool(d.finite_B.all()) == finite


def test_a_model_says_once_that_it_reads_beyond_its_context(tmp_path, monkeypatch):
  lines = []
  monkeypatch.setattr(workflow, 'log_progress', lines.append)
  model = jaxformer.load(folder_of(tmp_path / 'm'))
  model.generate('abc', max_new_tokens=29)
  assert not lines
  for new in (30, 40):
    model.generate('abc', max_new_tokens=new)
  assert model.score('x' * 50).count == 50
  assert lines == [
    'm: sequences of up to 33 tokens are longer than the context of 32 that the model is meant for'
  ]


def test_stops_of_special_tokens(tmp_path):
  """A special token is no text: generation stops at the token itself."""
  folder = folder_of(tmp_path / 'm')
  tokenizer = hf.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  tokenizer.add_special_tokens(['<|im_end|>'])
  tokenizer.save(str(folder / 'tokenizer.json'))
  never = [i for i in range(257) if not ord('a') <= i <= ord('z')]
  (folder / 'generation_config.json').write_text(json.dumps({'suppress_tokens': never}))
  model = jaxformer.load(folder)
  options = {'max_new_tokens': 200, 'temperature': 1.0, 'seed': 5}
  (free,) = model.complete(['x'], **options)
  at = free.tokens.index(257)
  assert at > 0
  text = bytes(free.tokens[:at]).decode()
  (found,) = model.complete(['x'], stop=['<|im_end|>', 'no such text'], **options)
  assert (found.tokens, found.finished, found.text) == (free.tokens[:at], True, text)
  assert ''.join(model.stream('x', stop=['<|im_end|>'], **options)) == text
  with pytest.raises(InputError, match=r'<\|im_end\|> is a special token'):
    model.generate('x', stop=['a<|im_end|>'])
  with pytest.raises(InputError, match='a list of strings'):
    model.generate('x', stop='a')


def test_a_folder_without_a_tokenizer_and_a_model_without_steps_are_told_in_their_words(tmp_path):
  folder = folder_of(tmp_path / 'm')
  (tmp_path / 'text.txt').write_text('some words to score\n' * 200)
  data = {
    'data.corpus': 'Files',
    'data.corpus.path': str(tmp_path / 'text.txt'),
    'data.split': 'ByPosition',
  }
  scores = jaxformer.load(folder).evaluate(overrides=data)
  assert (scores.step, scores.json()['weights']) == (None, 'Hugging Face folder')
  assert scores.lines()[0].startswith('m (Hugging Face folder), ')
  assert 'gpt2-tiny (initial parameters, not trained): ' in repr(jaxformer.load('gpt2-tiny'))
  (folder / 'tokenizer.json').unlink()
  model = jaxformer.load(folder)
  for use in (
    lambda: model.evaluate(overrides=data),
    lambda: model.generate('x'),
    lambda: model.score('x'),
  ):
    with pytest.raises(InputError, match=r'm: there is no tokenizer\.json in its folder'):
      use()
