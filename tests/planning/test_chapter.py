"""The chapter's numbers: what `experiments/chapter_numbers.py` prints, held to the figures in
print."""

import importlib.util
import pathlib

import pytest

PATH = pathlib.Path(__file__).parents[2] / 'experiments' / 'chapter_numbers.py'
pytestmark = pytest.mark.quick


@pytest.fixture(scope='module')
def chapter():
  spec = importlib.util.spec_from_file_location('chapter_numbers', PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize(
  ('name', 'printed'),
  [
    ('llama2-7b', (32, 4096, 11008, 32000, 4096)),
    ('llama2-13b', (40, 5120, 13824, 32000, 4096)),
    ('llama2-70b', (80, 8192, 28672, 32000, 4096)),
    ('llama3.1-8b', (32, 4096, 14336, 128256, 131072)),
    ('llama3.1-70b', (80, 8192, 28672, 128256, 131072)),
    ('llama3.1-405b', (126, 16384, 53248, 128256, 131072)),
  ],
)
def test_llama_table(chapter, name, printed):
  assert chapter.shape(name) == printed


def test_the_printed_hidden_width_is_not_that_of_70b(chapter):
  assert chapter.of('llama2-70b').params == 68_976_648_192
  assert chapter.of('llama2-70b').params - 3 * 80 * 8192 * (28_672 - 22_016) == 55_890_419_712


def test_seven_billion_parameters_need_14_gb(chapter):
  assert chapter.of('llama2-7b').weight_bytes == 2 * 6_738_415_616


def test_days_and_price_of_gpt3(chapter):
  a_day = chapter.H100_FLOPS * chapter.DAY
  assert a_day == pytest.approx(5.2e18, rel=0.005)
  assert int(chapter.gpt3_days()) == 236
  assert round(chapter.gpt3_price(236), 2) == 4_142_811.43
  assert round(chapter.gpt3_price(256), 2) != 4_142_811.43  # its formula as printed
  assert 6 * chapter.of('gpt3-175b').params * 300e9 == pytest.approx(3.14e23, rel=0.005)
  assert chapter.DAY == 24 * 60 * 60


def test_training_tokens(chapter):
  trained = {name: (n, d) for name, n, d in chapter.TRAINED}
  assert trained['LaMDA'] == (137e9, 168e9)
  assert trained['Chinchilla'] == (70e9, 1.4e12)
  assert trained['Chinchilla'][1] / trained['Chinchilla'][0] == pytest.approx(20)


def test_mixtures(chapter):
  mixtral, jamba = chapter.of('mixtral-8x7b'), chapter.of('jamba-v0.1')
  assert (round(mixtral.params / 1e9, 1), round(mixtral.active_params / 1e9, 1)) == (46.7, 12.9)
  assert (round(jamba.params / 1e9), round(jamba.active_params / 1e9)) == (52, 12)


def test_cache_at_256k(chapter):
  gib = {
    name: chapter.cache_bytes(name) / 2**30 for name in ('jamba-v0.1', 'mixtral-8x7b', 'llama2-7b')
  }
  # Table 1 of the Jamba paper: 4, 32 and 128 GB.
  assert round(gib['jamba-v0.1']) == 4
  assert gib['mixtral-8x7b'] == 32
  assert gib['llama2-7b'] == 128
  # one byte a weight
  assert chapter.of('jamba-v0.1').params + chapter.cache_bytes('jamba-v0.1') < 80e9


def test_the_note_is_what_it_prints(chapter):
  for line in chapter.lines():
    assert f'    {line}'.rstrip() in chapter.__doc__.splitlines()
