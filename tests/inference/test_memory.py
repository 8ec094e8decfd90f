"""What cannot fit the memory is refused before it is begun."""

import jax
import pytest

import jaxformer
from jaxformer import memory
from jaxformer.config import InputError
from jaxformer.inference import Beam, request, time_decode, translate
from jaxformer.models.params import define

GIGABYTE = 10**9
NONE = {}  # parameters, which are not looked at

pytestmark = pytest.mark.quick


@pytest.fixture
def gigabyte(monkeypatch):
  """A machine with this much memory."""
  monkeypatch.setattr(memory, 'memory_of', lambda device: (GIGABYTE, True))


@pytest.mark.parametrize(('size', 'fits'), [('gpt2', True), ('gpt2-xl', False)])
def test_parameters(size, fits, gigabyte, monkeypatch):
  monkeypatch.setattr('jaxformer.models.params._initialiser', lambda *_: lambda key: iter(info))
  definition = define(jaxformer.preset(size))
  info = definition.info
  if fits:
    assert definition.init(jax.random.key(0)).keys() == info.keys()
    return
  with pytest.raises(InputError, match='1,557,611,200 parameters need at least'):
    definition.init(jax.random.key(0))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'max_new_tokens': 10**9}, 'max_new_tokens = 1000000000: .*this machine has 1.0 GB'),
    ({'max_new_tokens': 10**12}, 'max_new_tokens = 1000000000000: must be below 2'),
    ({'max_new_tokens': 10**6}, None),
  ],
)
def test_continuations(options, message, gigabyte):
  text = define(jaxformer.preset('mamba-tiny')), NONE
  if message is None:
    request(*text, [[1]], **options)
    return
  with pytest.raises(InputError, match=message):
    request(*text, [[1]], **options)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'beam': Beam(width=10**9)}, 'beam = 1000000000: 16,000,000,000 sequences'),
    ({'max_new_tokens': 10**9}, 'max_new_tokens = 1000000000: 16 sequences'),
  ],
)
def test_translations(options, message, gigabyte):
  pairs = define(jaxformer.preset('seq2seq-lstm-tiny')), NONE
  with pytest.raises(InputError, match=message):
    translate(*pairs, [[1, 2]], end=2, **options)


def test_prompts_of_a_benchmark(gigabyte):
  text = define(jaxformer.preset('mamba-tiny')), NONE
  with pytest.raises(InputError, match=r'context_length = 1000000000: .* need at least'):
    time_decode(*text, 10**9, 2)
  with pytest.raises(InputError, match=r'new_tokens = 1000000000: .* need at least'):
    time_decode(*text, 2, 10**9)


def test_a_batch_to_evaluate(gigabyte):
  model = jaxformer.load('gpt2-tiny')
  with pytest.raises(InputError, match='batch_size = 1000000000: 1,000,000,000 sequences of 256'):
    model.evaluate(batch_size=10**9)
