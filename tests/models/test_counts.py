"""Parameter counts of the named models, exactly: published integers, and closed forms written here from the papers' tables.

Nothing is allocated; the sizes come from abstract shapes.
"""

import pytest

from jaxformer.models.params import define
from jaxformer.models.zoo import PRESETS

pytestmark = pytest.mark.quick

EXACT = {
  'gpt2': 124_439_808, 'gpt3-175b': 174_604_259_328, 'llama2-7b': 6_738_415_616, 'llama2-13b': 13_015_864_320,
  'llama2-70b': 68_976_648_192, 'llama3-8b': 8_030_261_248, 'llama3.1-8b': 8_030_261_248, 'llama3-70b': 70_553_706_496,
  'llama3.1-70b': 70_553_706_496, 'llama3.1-405b': 405_853_388_800,
  'h3-125m': 126_387_456,   # as the authors' README prints it
}

# name -> width, layers, context. Heads do not change the count.
GPT = {
  'gpt2': (768, 12, 1024), 'gpt2-medium': (1024, 24, 1024), 'gpt2-large': (1280, 36, 1024), 'gpt2-xl': (1600, 48, 1024),
  'gpt3-125m': (768, 12, 2048), 'gpt3-350m': (1024, 24, 2048), 'gpt3-760m': (1536, 24, 2048), 'gpt3-1.3b': (2048, 24, 2048),
  'gpt3-2.7b': (2560, 32, 2048), 'gpt3-6.7b': (4096, 32, 2048), 'gpt3-13b': (5120, 40, 2048), 'gpt3-175b': (12288, 96, 2048),
}
# name -> width, layers, hidden, heads, key/value heads, vocabulary, tied
LLAMA = {
  'llama2-7b': (4096, 32, 11008, 32, 32, 32000, False), 'llama2-13b': (5120, 40, 13824, 40, 40, 32000, False),
  'llama2-70b': (8192, 80, 28672, 64, 8, 32000, False), 'llama3-8b': (4096, 32, 14336, 32, 8, 128256, False),
  'llama3-70b': (8192, 80, 28672, 64, 8, 128256, False), 'llama3.1-8b': (4096, 32, 14336, 32, 8, 128256, False),
  'llama3.1-70b': (8192, 80, 28672, 64, 8, 128256, False), 'llama3.1-405b': (16384, 126, 53248, 128, 8, 128256, False),
  'llama3.2-1b': (2048, 16, 8192, 32, 8, 128256, True), 'llama3.2-3b': (3072, 28, 8192, 24, 8, 128256, True),
}


# name -> width, which is also the number of units
ZAREMBA = {'lstm-zaremba-small': 200, 'lstm-zaremba-medium': 650, 'lstm-zaremba-large': 1500}


def lstm_count(D, V=10_000, layers=2):
  """Embedding, head and its offsets; a layer: four gates, each with two matrices and one vector of offsets."""
  return 2 * V * D + V + layers * 4 * (2 * D * D + D)


# name -> width, layers, of which with attention
H3 = {'h3-125m': (768, 12, 1), 'h3-355m': (1024, 24, 2), 'h3-1.3b': (2048, 24, 2), 'h3-2.7b': (2560, 32, 3)}


def h3_count(D, L, attention, V=50264, N=64):
  """Tied embedding, norm; a block: four projections and a feed-forward of 4 D (12 D^2), their offsets (9 D), two norms (4 D); of
  those without attention: B and C of the shift system (2 N D), a skip, and of the diagonal one, for N / 2 complex numbers a
  channel, A, B and C (3 N D), a step and a skip."""
  return V * D + 2 * D + L * (12 * D * D + 13 * D) + (L - attention) * (5 * N * D + 3 * D)


def gpt_count(D, L, T, V=50257):
  """Embedding, positions; a block: q, k, v, o and a feed-forward of 4 D (12 D^2), their offsets (9 D), two norms (4 D); a norm."""
  return V * D + T * D + L * (12 * D * D + 13 * D) + 2 * D


def llama_count(D, L, F, H, G, V, tied):
  """Embedding and head; a block: q and o (2 D^2), k and v of G heads, three projections of the feed-forward, two norms; a norm."""
  return V * D * (1 if tied else 2) + L * (2 * D * D + 2 * D * G * (D // H) + 3 * D * F + 2 * D) + D


@pytest.mark.parametrize('name', EXACT)
def test_published(name):
  assert define(PRESETS[name].model).size == EXACT[name]


@pytest.mark.parametrize('name', GPT)
def test_gpt(name):
  assert define(PRESETS[name].model).size == gpt_count(*GPT[name])


@pytest.mark.parametrize('name', LLAMA)
def test_llama(name):
  assert define(PRESETS[name].model).size == llama_count(*LLAMA[name])


@pytest.mark.parametrize('name', ZAREMBA)
def test_lstm(name):
  """20M and 66M parameters, as papers that compare with them quote medium and large."""
  assert define(PRESETS[name].model).size == lstm_count(ZAREMBA[name])
  assert {200: 4.65e6, 650: 19.8e6, 1500: 66.0e6}[ZAREMBA[name]] == pytest.approx(lstm_count(ZAREMBA[name]), rel=0.003)


@pytest.mark.parametrize('name', H3)
def test_h3(name):
  assert define(PRESETS[name].model).size == h3_count(*H3[name])


@pytest.mark.parametrize(('name', 'attention'), [
  ('h3-125m', {6}), ('h3-355m', {8, 16}), ('h3-1.3b', {8, 16}), ('h3-2.7b', {8, 16, 24})])
def test_h3_attends_in_the_published_places(name, attention):
  layers = [b.branches[0].layer.tag for g in PRESETS[name].model.stack for _ in range(g.repeats) for b in g.pattern]
  assert {i for i, tag in enumerate(layers) if tag == 'Attention'} == attention
  assert len(layers) == H3[name][1]


def test_every_preset_of_these_families_is_counted():
  families = ('gpt2', 'gpt3', 'llama2', 'llama3', 'lstm', 'h3')
  named = {n for n in PRESETS if PRESETS[n].family in families and not n.endswith('-tiny')}
  assert named == set(GPT) | set(LLAMA) | set(ZAREMBA) | set(H3)


@pytest.mark.parametrize(('name', 'width', 'heads'), [
  ('llama3.2-1b', 64, 32), ('llama3.2-3b', 128, 24), ('gpt3-1.3b', 128, 16), ('gpt3-13b', 128, 40)])
def test_head_sizes(name, width, heads):
  """Head counts leave no trace in the totals; the papers give these."""
  model = PRESETS[name].model
  attention = model.stack[0].pattern[0].branches[0].layer
  assert (attention.head_size(model.width), attention.heads) == (width, heads)


@pytest.mark.parametrize(('width', 'factor', 'multiple', 'hidden'), [
  (4096, 1.0, 256, 11008), (5120, 1.0, 256, 13824), (8192, 1.3, 4096, 28672), (4096, 1.3, 1024, 14336)])
def test_llama_hidden_sizes_follow_the_published_rule(width, factor, multiple, hidden):
  """Two thirds of 4 D, times a factor, rounded up."""
  raw = int(factor * int(2 * 4 * width / 3))
  assert -(-raw // multiple) * multiple == hidden
  assert hidden in {m[2] for m in LLAMA.values() if m[0] == width}


def test_dense_models_use_all_their_parameters():
  for name in ('gpt2', 'llama3.2-1b'):
    assert define(PRESETS[name].model).active_size == define(PRESETS[name].model).size
